"""Image files: which files are read, and how they become pixels of 8 bits per channel."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Pillow's limit: an image of more pixels may be a small file that was made to fill the memory.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS


def is_image(name) -> bool:
    """Return whether a file has the suffix of an image that is read."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def describe_kinds(names: Iterable) -> str:
    """Count the files of each kind, the most frequent kind first: "12 .gif, 1 without suffix"."""
    kinds = Counter(Path(name).suffix.lower() or "without suffix" for name in names)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def read_image(path, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image with 8 bits per channel.

    Grayscale images of 16 bits are divided by 257, so that black and white stay black and white.

    Args:
        path: the path of the file, or an open file.
        mode: "RGB" or "L" (grayscale).
        max_pixels: largest number of pixels, which is also set as Pillow's limit.

    Raises:
        ValueError: if the image has more pixels, or pixels of 32 bits, whose range is not known. A damaged file may
            raise any exception.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(path) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {max_pixels:,}")
        # Pillow reads a .pgm file of 16 bits as 32-bit integers.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            kind = "integers" if image.mode == "I" else "floats"
            raise ValueError(f"pixels are 32-bit {kind}: convert them to 8 or 16 bits")
        return image.convert(mode)
