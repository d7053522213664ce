"""Files of images and statistics: .npz files, folders of images, and checks of both."""

import hashlib
import math
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.scores import NEIGHBOURS
from features.images import describe_counts, find_files, read_image
from runtime.errors import UserError

# The covariance matrix of more features would need more than 3 GB.
MAX_FEATURES = 20_000
# ADM's network. Any .pth file is taken to hold its weights.
INCEPTION = "inception-2015-12-05"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def check_file(path):
    """Raise UserError if a path is not a folder of images or a complete .npz file of images or statistics."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
    if not Path(path).is_dir() and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a complete .npz file")
    try:
        if has_images(path):
            next(read_images(path, 1))
        if has_statistics(path):
            read_statistics(path)
            read_network(path)
    except UserError:
        raise
    # A damaged archive raises errors of many types.
    except Exception as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not has_images(path) and not has_statistics(path):
        raise UserError(f"{path} holds neither images (arr_0) nor statistics ({', '.join(STATISTICS)})")


def array_names(path) -> set[str]:
    """Return the names of the arrays in an .npz file."""
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def has_images(path) -> bool:
    """Return whether a path is a folder, or an .npz file with images."""
    return Path(path).is_dir() or "arr_0" in array_names(path)


def has_statistics(path) -> bool:
    """Return whether a path is an .npz file with all statistics."""
    return not Path(path).is_dir() and array_names(path) >= set(STATISTICS)


def content_hash(path) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of the sizes and contents of a file, or of all images of a folder."""
    # Features of folders depend on how their files are read: since version 3, as they are displayed, in sRGB.
    digest = hashlib.sha256(b"images, version 3 " if Path(path).is_dir() else b"")
    files = find_files(path).images if Path(path).is_dir() else [Path(path)]
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"hashing {Path(path).name}", leave=False, delay=2) as bar:
        for file in files:
            digest.update(b"%d " % file.stat().st_size)
            with open(file, "rb") as stream:
                while data := stream.read(2**24):
                    digest.update(data)
                    bar.update(len(data))
    return digest.hexdigest()[:32]


def read_statistics(path) -> dict[str, np.ndarray]:
    """Read mu [D], sigma [D, D] (pooled features), mu_s [S] and sigma_s [S, S] (spatial features) from an .npz file.

    Raises:
        UserError: if they are no means and covariances of features, or do not match each other.
    """
    with zipfile.ZipFile(path) as archive:
        for name in STATISTICS:
            with archive.open(f"{name}.npy") as file:
                shape, _, dtype = read_header(path, file, archive.getinfo(f"{name}.npy").file_size)
                fits = shape == ((shape or (0,))[0],) * (2 if name.startswith("sigma") else 1)
                if not fits or not 0 < shape[0] <= MAX_FEATURES or dtype.kind != "f":
                    raise UserError(f"{path}: {name} ({dtype} {shape}) is not a mean or covariance of features")
    with np.load(path, allow_pickle=False) as file:
        statistics = {name: file[name] for name in STATISTICS}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if len(statistics[mu]) != len(statistics[sigma]):
            raise UserError(f"{path}: {mu} {statistics[mu].shape} and {sigma} {statistics[sigma].shape} do not match")
    return statistics


def read_network(path) -> str:
    """Return the name of the network of a file's statistics; ADM's own files, which have no name, are Inception's."""
    with np.load(path, allow_pickle=False) as file:
        return str(file["network"])[:64] if "network" in file else INCEPTION


def compare_sizes(reference, samples: str, size: tuple[int, int]) -> str | None:
    """Return a warning if the images of a reference have another size than samples, as networks may resize both.

    Args:
        reference: the file or folder of the reference. Its size is not known if it holds statistics only.
        samples: what the samples are called.
        size: height and width of the samples.
    """
    if not has_images(reference):
        return None
    height, width = next(read_images(reference, 1))[0].shape[1:3]
    if (height, width) == size:
        return None
    return (
        f"{samples} have {size[1]}x{size[0]} pixels, the images of {reference} have {width}x{height}: the scores show "
        "this difference, too"
    )


def read_header(path, file, length: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return the shape, the Fortran order flag and the type of the array in an open .npy file of `length` bytes.

    Raise UserError if they do not match `length`, before any memory is allocated for the array.
    """
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds an array that cannot be read ({error})") from None
    if dtype.hasobject or min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != length:
        raise UserError(f"{path} holds an array that is not as long as its header says, {dtype} {shape}")
    return shape, fortran, dtype


def read_images(path, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield batches of images, uint8 [b, H, W, 3], with the total number of images, from an .npz file or a folder.

    Raises:
        UserError: if the file or folder is damaged, or does not hold enough images of one size.
    """
    if Path(path).is_dir():
        yield from read_folder(path, batch_size)
        return
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, fortran, dtype = read_header(path, file, archive.getinfo("arr_0.npy").file_size)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or shape[0] <= NEIGHBOURS:
            raise UserError(
                f"{path}: arr_0 is {dtype} {shape}, expected at least {NEIGHBOURS + 1} uint8 images [n, H, W, 3] "
                "in C order"
            )
        for first in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - first)
            try:
                data = file.read(count * math.prod(shape[1:]))
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is damaged: {error}") from None
            if len(data) != count * math.prod(shape[1:]):
                raise UserError(f"{path} is truncated")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:]), shape[0]


def read_folder(folder, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Read the images of a folder in batches, as read_images. At the end, print what was applied to them.

    Raises:
        UserError: if there are not enough images, or they differ in size.
    """
    paths = find_files(folder).images
    if len(paths) <= NEIGHBOURS:
        raise UserError(f"{folder} holds {len(paths)} images, expected at least {NEIGHBOURS + 1}")
    first, shape, treated = paths[0], None, Counter()
    with ThreadPoolExecutor() as threads:
        for i in range(0, len(paths), batch_size):
            images, treatments = zip(*threads.map(read_pixels, paths[i : i + batch_size]), strict=True)
            treated.update(line for lines in treatments for line in lines)
            shape = shape or images[0].shape
            for path, image in zip(paths[i : i + batch_size], images, strict=True):
                if image.shape != shape:
                    size, first_size = (f"{s[1]}x{s[0]}" for s in (image.shape, shape))
                    raise UserError(f"{path} is {size}, {first} is {first_size}: all images must have one size")
            yield np.stack(images), len(paths)
    if treated:
        print(f"note: {folder}: {describe_counts(treated)}", file=sys.stderr)


def read_pixels(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read an image as uint8 [H, W, 3], and what of its file was applied or left out (see `read_image`).

    Raises:
        UserError: if it cannot be read.
    """
    try:
        image, treatment = read_image(path)
        return np.asarray(image), treatment
    # A decoder may raise any error on a damaged file.
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image: {type(error).__name__}: {str(error)[:200]}") from None
