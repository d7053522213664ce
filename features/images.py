"""Image files: which files are read, and how they become pixels of 8 bits per channel."""

import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Pillow's limit: an image of more pixels may be a small file that was made to fill the memory.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
# Folders of operating systems and servers, which hold previews, copies and deleted files. Others begin with a dot.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}


class FoundFiles(NamedTuple):
    """The files below a folder.

    Attributes:
        images: the images that are read, sorted.
        hidden: images that are not read because they are hidden, sorted.
        others: files of other kinds that are not hidden.
    """

    images: list[Path]
    hidden: list[Path]
    others: list[Path]

    def notes(self) -> list[str]:
        """Return a line for each kind of files that is left out."""
        lines = [describe_hidden(self.hidden)] if self.hidden else []
        return lines + ([f"files of other kinds are left out: {describe_kinds(self.others)}"] if self.others else [])


def is_image(name) -> bool:
    """Return whether a file has the suffix of an image that is read."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_hidden(path) -> bool:
    """Return whether a path, relative to the folder of the data, is hidden or in a hidden folder or a system folder."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in str(path).split(os.sep))


def find_files(folder) -> FoundFiles:
    """Find the files at any depth below a folder, also in folders that are symbolic links."""
    found = FoundFiles([], [], [])
    for root, _, names in os.walk(folder, followlinks=True):
        within = is_hidden(os.path.relpath(root, folder)) if root != str(folder) else False
        for name in names:
            hidden, path = within or is_hidden(name), Path(root, name)
            if is_image(name) and path.is_file():
                (found.hidden if hidden else found.images).append(path)
            elif not hidden and path.is_file():
                found.others.append(path)
    found.images.sort()
    found.hidden.sort()
    return found


def describe_hidden(paths: list) -> str:
    """Say how many hidden images are left out, with an example."""
    return f"hidden images, and those in hidden folders, are left out: {len(paths):,}, such as {paths[0]}"


def describe_kinds(names: Iterable) -> str:
    """Count the files of each kind, the most frequent kind first: "12 .gif, 1 without suffix"."""
    kinds = Counter(Path(name).suffix.lower() or "without suffix" for name in names)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def read_image(path, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, list[str]]:
    """Read an image with 8 bits per channel, as it is displayed: its EXIF orientation is applied.

    Grayscale images of 16 bits are divided by 257, so that black and white stay black and white.

    Args:
        path: the path of the file, or an open file.
        mode: "RGB" or "L" (grayscale).
        max_pixels: largest number of pixels, which is also set as Pillow's limit.

    Returns:
        The image, and what of the file was applied or left out, see `describe_treatment`.

    Raises:
        ValueError: if the image has more pixels, or pixels of 32 bits, whose range is not known. A damaged file may
            raise any exception.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(path) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {max_pixels:,}")
        orientation = _orientation(image)
        treatment = describe_treatment(image, orientation)
        # Pillow applies the orientation of TIFF files itself.
        if orientation != 1 and image.format != "TIFF":
            ImageOps.exif_transpose(image, in_place=True)
        # Pillow reads a .pgm file of 16 bits as 32-bit integers.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            kind = "integers" if image.mode == "I" else "floats"
            raise ValueError(f"pixels are 32-bit {kind}: convert them to 8 or 16 bits")
        return image.convert(mode), treatment


def _orientation(image: Image.Image) -> int:
    """Return the orientation that an image's metadata record, from 1 to 8; 1, as stored, if they are damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    # Damaged metadata may raise any exception, and the image is readable nevertheless.
    except Exception:
        return 1
    return value if value in range(2, 9) else 1


def describe_treatment(image: Image.Image, orientation: int) -> list[str]:
    """Say what of an open file beside its pixels is applied or left out: orientation, profile, transparency, frames."""
    profile = image.info.get("icc_profile") or b""
    srgb = not profile or b"sRGB" in profile or "sRGB".encode("utf-16-be") in profile
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    # A photo in the format MPO holds further photos, such as one for each eye.
    frames = getattr(image, "is_animated", False) and image.format != "MPO"
    lines = {
        "EXIF orientation applied": orientation != 1,
        "colour profile other than sRGB not applied": not srgb,
        "transparency left out": transparent,
        "frames after the first left out": frames,
    }
    return [line for line, holds in lines.items() if holds]


def write_images(path, chunks: Iterable[bytes], shape: tuple[int, int, int, int], labels: np.ndarray):
    """Write images as the .npz file that ADM's evaluator reads. Only one chunk at a time is in memory.

    Args:
        path: the file.
        chunks: the pixels, uint8 in C order, in any parts.
        shape: (n, H, W, 3).
        labels: labels, int64 [n].
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk)
        with archive.open("arr_1.npy", "w") as file:
            np.save(file, labels)


def describe_counts(treated: dict[str, int]) -> str:
    """Return the number of images of each treatment: "EXIF orientation applied (3 images)"."""
    return ", ".join(f"{line} ({count:,} image{'s' * (count != 1)})" for line, count in sorted(treated.items()))
