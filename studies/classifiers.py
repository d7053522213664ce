"""Small classifiers of grayscale images, whose features evaluator.py uses instead of Inception's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from runtime.files import atomic_write


class Classifier(nn.Module):
    """A small convolutional classifier of 10 classes.

    Args:
        side: side of the images in pixels, a power of two from 8.
    """

    def __init__(self, side: int):
        super().__init__()
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()]
        channels = 32
        while side > 4:
            layers += [nn.Conv2d(channels, 64, 3, padding=1, stride=2), nn.ReLU()]
            channels, side = 64, side // 2
        self.low = nn.Sequential(*layers)
        self.high = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 [B, 3, side, side].

        Returns:
            Pooled features [B, 64], spatial features [B, 128] and logits [B, 10].
        """
        low = self.low(images.float().mean(1, keepdim=True) / 127.5 - 1)  # [B, 64, 4, 4]
        pool = self.high(low)  # [B, 64]
        return pool, low[:, :8].flatten(1), self.logits(pool)


def train_classifier(images: np.ndarray, labels: np.ndarray, epochs: int) -> Classifier:
    """Train a classifier, from seed 0.

    Args:
        images: uint8 [n, side, side].
        labels: labels [n], 0 to 9.
        epochs: passes over the images.
    """
    torch.manual_seed(0)
    classifier = Classifier(images.shape[-1])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    x, y = as_input(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(x[rows])[2], y[rows]).backward()
            optimizer.step()
    return classifier.eval()


def as_input(images: np.ndarray) -> Tensor:
    """Repeat grayscale images [n, H, W] as three channels, [n, 3, H, W]."""
    return torch.from_numpy(images).unsqueeze(1).expand(-1, 3, -1, -1)


@torch.no_grad()
def accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of images [n, side, side] whose class is found."""
    correct = [
        classifier(x)[2].argmax(1) == y
        for x, y in zip(as_input(images).split(500), torch.from_numpy(labels).split(500), strict=True)
    ]
    return torch.cat(correct).double().mean().item()


def export(network: nn.Module, side: int, path: Path, any_side: bool = False):
    """Write a network as an exported program of uint8 images [B, 3, side, side] for any B, atomically.

    Args:
        network: the network.
        side: side of the images in pixels.
        path: file to write.
        any_side: whether the network accepts images of other sides too.
    """
    axes = {0: torch.export.Dim("batch", min=1)}
    if any_side:
        axes |= {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    program = torch.export.export(network, (example,), dynamic_shapes=(axes,))
    with atomic_write(path) as temporary:
        # torch.export.save accepts only this suffix.
        program_path = temporary.with_name(f"{temporary.name}.pt2")
        torch.export.save(program, program_path)
        program_path.rename(temporary)


def save_split(out: Path, split: str, images: np.ndarray, labels: np.ndarray):
    """Write a split for evaluator.py: <split>.npz with the images [n, H, W] as RGB images, and their labels [n]."""
    with atomic_write(out / f"{split}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=np.repeat(images[..., None], 3, axis=-1), arr_1=labels)
