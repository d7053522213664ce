"""Image files: which files are read, and how they become sRGB pixels of 8 bits per channel."""

import functools
import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Pillow's limit: an image of more pixels may be a small file that was made to fill the memory.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
# Folders of operating systems and servers, which hold previews, copies and deleted files. Others begin with a dot.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
# Pillow's mode of the pixels that a colour profile describes, by the profile's colour space.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# A profile that changes no colour by more, of 255 levels, is one of the many of sRGB, which differ by rounding.
SRGB_TOLERANCE = 2
# sRGB's gamma, and the chromaticities of its white, red, green and blue, as PNG files record them.
PNG_SRGB = {"gamma": 0.45455, "chromaticity": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)}
# Code points of ITU-T H.273 of other primaries and transfer functions than those that are displayed as sRGB: BT.2020,
# DCI-P3 and Display P3; linear, PQ and HLG.
OTHER_PRIMARIES, OTHER_TRANSFERS = {9, 11, 12}, {8, 16, 18}
# The metadata of files with these code points come first.
HEADER_BYTES = 65536


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
    """Read an image as sRGB with 8 bits per channel, as it is displayed.

    Its EXIF orientation is applied, and colours of another ICC profile are converted to sRGB (relative colorimetric,
    with black point compensation). Grayscale images of 12 and 16 bits are scaled, so that black and white stay black
    and white.

    Args:
        path: the path of the file, or an open file.
        mode: "RGB" or "L" (grayscale).
        max_pixels: largest number of pixels, which is also set as Pillow's limit.

    Returns:
        The image, and one line for each thing that was applied or left out: orientation, colours, transparency, frames.

    Raises:
        ValueError: if the image has more pixels, or pixels of 32 bits, whose range is not known. A damaged file may
            raise any exception.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(path) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {max_pixels:,}")
        # Before other metadata are read, for which Pillow loads PNG files and closes them.
        other_colours = _records_other_colours(image)
        orientation = _orientation(image)
        treatment = ["EXIF orientation applied"] if orientation != 1 else []
        treatment += _describe_left_out(image)
        profile = image.info.get("icc_profile")
        # Pillow applies the orientation of TIFF files itself.
        if orientation != 1 and image.format != "TIFF":
            ImageOps.exif_transpose(image, in_place=True)
        # Pillow reads a .pgm file of 16 bits as 32-bit integers.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            image = _scale_to_8_bits(image)
        elif image.mode in ("I", "F"):
            kind = "integers" if image.mode == "I" else "floats"
            raise ValueError(f"pixels are 32-bit {kind}: convert them to 8 or 16 bits")
        if profile:
            image, colours = _apply_profile(image, profile)
        elif image.mode == "CMYK":
            colours = "CMYK without a colour profile converted by a formula"
        else:
            colours = "colours other than sRGB's, recorded without a profile, not applied" if other_colours else ""
        return image.convert(mode), treatment + [colours] * bool(colours)


def _orientation(image: Image.Image) -> int:
    """Return the orientation that an image's metadata record, from 1 to 8; 1, as stored, if they are damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    # Damaged metadata may raise any exception, and the image is readable nevertheless.
    except Exception:
        return 1
    return value if value in range(2, 9) else 1


def _describe_left_out(image: Image.Image) -> list[str]:
    """Say what of an open file beside its colours is left out: transparency and frames."""
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    # A photo in the format MPO holds further photos, such as one for each eye, or a gain map for HDR displays.
    frames = getattr(image, "is_animated", False) and image.format != "MPO"
    lines = {"transparency left out": transparent, "frames after the first left out": frames}
    return [line for line, holds in lines.items() if holds]


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a grayscale image of 12 or 16 bits to 8 bits, with rounding."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    # Pillow scales the other formats to 16 bits.
    white = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65535
    pixels = np.asarray(image, np.uint32)
    # Pillow inverts an image whose white is 0 only if it has at most 8 bits.
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        pixels = white - pixels
    return Image.fromarray(((pixels * 255 + white // 2) // white).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Convert the colours of an image with an ICC profile to sRGB, without transparency.

    Returns:
        The image, and what was done: nothing if the profile is sRGB's.
    """
    try:
        described, transform = _srgb_transform(profile)
    # A damaged profile may raise any exception, and the image is readable nevertheless.
    except Exception:
        return image, "damaged or unknown colour profile not applied"
    if transform is None:
        return image, ""
    # Palettes, and colours with transparency, are RGB.
    mode = {"1": "L", "LA": "L", "CMYK": "CMYK", "L": "L", "LAB": "LAB"}.get(image.mode, "RGB")
    if mode != described:
        return image, f"colour profile of {described} not applied to pixels of {mode}"
    return ImageCms.applyTransform(image.convert(mode), transform), "colours converted to sRGB with their profile"


@functools.lru_cache(maxsize=64)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode of the pixels that an ICC profile describes, and their transform to sRGB; None if it is sRGB."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = PROFILE_MODES[opened.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode not in ("RGB", "L"):
        return mode, transform
    # The names of profiles do not tell: many others mention sRGB.
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)).convert(mode)
    converted = np.asarray(ImageCms.applyTransform(colours, transform), np.int16)
    change = np.abs(converted - np.asarray(colours.convert("RGB"))).max()
    return mode, None if change <= SRGB_TOLERANCE else transform


def _records_other_colours(image: Image.Image) -> bool:
    """Return whether the metadata of an open file without an ICC profile say that its colours are not those of sRGB.

    They are the gamma, chromaticities and code points of PNG, the code points of AVIF, and the mark of cameras that
    store Adobe RGB.
    """
    if image.format in ("PNG", "AVIF"):
        position = image.fp.tell()
        image.fp.seek(0)
        header = image.fp.read(HEADER_BYTES)
        image.fp.seek(position)
        name, size = (b"cICP", 1) if image.format == "PNG" else (b"colrnclx", 2)
        start = header.find(name) + len(name)
        if start >= len(name):
            primaries, transfer = (int.from_bytes(header[start + i * size :][:size]) for i in range(2))
            return primaries in OTHER_PRIMARIES or transfer in OTHER_TRANSFERS
    if image.format == "PNG" and "srgb" not in image.info:
        recorded = (image.info.get(key, srgb) for key, srgb in PNG_SRGB.items())
        return not all(np.allclose(x, srgb, atol=0.01) for x, srgb in zip(recorded, PNG_SRGB.values(), strict=True))
    try:
        return image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03"
    # As in _orientation.
    except Exception:
        return False


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
