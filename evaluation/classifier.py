"""A small classifier of one's own images, whose features the scores can compare instead of Inception's."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from evaluation.files import read_header, read_images
from evaluation.networks import save_program
from runtime.errors import UserError

# One image in this many is held out, for the accuracy that is printed.
HELD_OUT = 10
# The training: passes over the images, with at least this number of steps, the batch size and the peak learning rate.
EPOCHS, LEAST_STEPS, BATCH, RATE = 10, 300, 64, 2e-3
# Number of pooled features, and the largest number of spatial features.
POOLED, SPATIAL = 128, 2048


class Classifier(nn.Module):
    """A convolutional classifier of square images.

    The side is halved until it is at most 4. Spatial features are the first channels of the first maps that are small
    enough, pooled features those of the last hidden layer.

    Args:
        side: side of the images in pixels.
        n_classes: number of classes.
    """

    def __init__(self, side: int, n_classes: int):
        super().__init__()
        blocks, width = [nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())], 32
        while side > 4:
            wider = min(2 * width, 128)
            blocks.append(nn.Sequential(nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.ReLU()))
            side, width = -(-side // 2), wider
        self.blocks = nn.ModuleList(blocks)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(width * side**2, POOLED), nn.ReLU())
        self.logits = nn.Linear(POOLED, n_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 [B, 3, side, side].

        Returns:
            Pooled features [B, 128], spatial features [B, at most 2048] and logits [B, classes].
        """
        x, spatial = images.float() / 127.5 - 1, None
        for block in self.blocks:
            x = block(x)
            if spatial is None and x.shape[2] <= 16:
                spatial = x[:, : max(1, SPATIAL // x.shape[2] ** 2)].flatten(1)
        pooled = self.hidden(x)
        return pooled, spatial, self.logits(pooled)


def read_labelled(path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images [n, H, W, 3], uint8, and the labels [n] of an .npz file of extract_features.py --reference.

    The labels are numbered from 0, in their order, so that each class has an image.

    Raises:
        UserError: if it holds no images and labels of at least two classes, or if the images are not square.
    """
    if not zipfile.is_zipfile(path) or not {"arr_0.npy", "arr_1.npy"} <= set(zipfile.ZipFile(path).namelist()):
        raise UserError(f"{path} holds no labelled images: write them with extract_features.py --reference OUT.npz")
    with zipfile.ZipFile(path) as archive, archive.open("arr_1.npy") as file:
        shape, _, dtype = read_header(path, file, archive.getinfo("arr_1.npy").file_size)
    images = np.concatenate([batch for batch, _ in read_images(path, 1024)])
    if dtype.kind not in "iu" or shape != (len(images),):
        raise UserError(f"{path}: arr_1 is {dtype} {shape}, expected the labels of {len(images)} images")
    with np.load(path, allow_pickle=False) as file:
        classes, labels = np.unique(file["arr_1"], return_inverse=True)
    if images.shape[1] != images.shape[2] or len(classes) < 2:
        raise UserError(f"{path} must hold square images of at least two classes")
    return images, labels


def fit_classifier(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Classifier, float, int]:
    """Train a classifier on nine tenths of labelled images, from seed 0.

    Args:
        images: uint8 [n, side, side, 3].
        labels: int64 [n], each number from 0 to the highest at least once.
        device: device of the training.

    Returns:
        The classifier on the CPU in eval mode, its accuracy on the other tenth, and the number of images in it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(images.shape[1], int(labels.max()) + 1).to(device)
    order = torch.randperm(len(images), generator=generator)
    held_out, own = order[: -(-len(order) // HELD_OUT)], order[-(-len(order) // HELD_OUT) :]
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    batches = -(-len(own) // BATCH)
    epochs = max(EPOCHS, -(-LEAST_STEPS // batches))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in tqdm(range(epochs), desc="training the classifier", unit="epoch"):
        for rows in own[torch.randperm(len(own), generator=generator)].split(BATCH):
            logits = network(x[rows].to(device))[2]
            cross_entropy(logits, y[rows].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    network.eval().requires_grad_(False)
    right = sum(
        (network(x[rows].to(device))[2].argmax(1).cpu() == y[rows]).sum().item() for rows in held_out.split(BATCH)
    )
    return network.cpu(), right / len(held_out), len(held_out)


def write_classifier(reference, out: Path, device: torch.device) -> str:
    """Train a classifier on the labelled images of a file, and write it as a program for evaluator.py --weights.

    Returns:
        A line with its accuracy.
    """
    images, labels = read_labelled(reference)
    network, accuracy, n_held_out = fit_classifier(images, labels, device)
    save_program(network, out, images.shape[1])
    return (
        f"{out}: accuracy {accuracy:.4f} on {n_held_out:,} held-out images of {labels.max() + 1} classes "
        f"(the most frequent class: {np.bincount(labels).max() / len(labels):.4f})"
    )
