"""Prepare a small real dataset that needs no download: scikit-learn's handwritten digits, 1,797 images of 8x8 pixels.

    python studies/digits.py --out data/digits

Writes three disjoint splits: train, validation (for choosing settings) and heldout (for reported results). A split is a
folder of PNG images, with one folder per class, and an .npz file for evaluator.py. Also writes classifier.pt2, a small
network trained on the training split, which evaluator.py uses instead of Inception.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SPLITS = {"train": 1197, "validation": 300, "heldout": 300}


class Classifier(nn.Module):
    """A small convolutional classifier of digits, whose features replace Inception's."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()
        )
        self.high = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 [B, 3, 8, 8].

        Returns:
            Pooled features [B, 64], spatial features [B, 128] and logits [B, 10].
        """
        low = self.low(images.float().mean(1, keepdim=True) / 127.5 - 1)  # [B, 64, 4, 4]
        pool = self.high(low)  # [B, 64]
        return pool, low[:, :8].flatten(1), self.logits(pool)


def main(args: argparse.Namespace):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    splits = split_digits()
    for split, (images, labels) in splits.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = out / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        np.savez(out / f"{split}.npz", arr_0=np.repeat(images[..., None], 3, axis=-1), arr_1=labels)

    classifier = train_classifier(*splits["train"])
    for split, (images, labels) in splits.items():
        print(f"{split}: {len(images)} images, classifier accuracy {accuracy(classifier, images, labels):.3f}")
    example = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    program = torch.export.export(classifier, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, out / "unfinished.pt2")
    # The classifier is renamed last: if it exists, all other files do.
    (out / "unfinished.pt2").rename(out / "classifier.pt2")
    print(f"wrote {out}")


def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the images and labels of each split, which are the same on every call.

    Returns:
        For each split, images, uint8 [n, 8, 8] (the dataset's 0..16 scaled to 0..255), and labels [n].
    """
    digits = load_digits()
    images, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
    rest, heldout = train_test_split(
        np.arange(len(images)), test_size=SPLITS["heldout"], stratify=labels, random_state=0
    )
    train, validation = train_test_split(rest, test_size=SPLITS["validation"], stratify=labels[rest], random_state=0)
    rows = {"train": train, "validation": validation, "heldout": heldout}
    return {split: (images[i], labels[i]) for split, i in rows.items()}


def train_classifier(images: np.ndarray, labels: np.ndarray, epochs: int = 30) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    x, y = as_input(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(x[rows])[2], y[rows]).backward()
            optimizer.step()
    return classifier.eval()


def as_input(images: np.ndarray) -> Tensor:
    """Repeat grayscale images [n, 8, 8] as three channels, [n, 3, 8, 8]."""
    return torch.from_numpy(images).unsqueeze(1).expand(-1, 3, -1, -1)


@torch.no_grad()
def accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    return (classifier(as_input(images))[2].argmax(1) == torch.from_numpy(labels)).double().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write scikit-learn's digits as image folders, with a small classifier."
    )
    parser.add_argument("--out", required=True, help="folder to write")
    main(parser.parse_args())
