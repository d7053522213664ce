"""Everything that is drawn for a training step: images and views, timesteps, experts, label dropout and noise.

Every draw is a function of the global seed, the step and the place in the global batch. It depends neither on the
number of processes nor on when the run was resumed.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distributed import World, ignore_signals, seed_for
from features import FeatureDataset


class Stream(IntEnum):
    """Independent streams of random numbers; a stream's number is the last part of its seed.

    Other values would change the draws of every run. Two draws have no stream number: the noise of a step is seeded
    with (seed, step), and the draws from the VAE's posterior in an epoch with (seed, epoch).

    Attributes:
        IMAGE_ORDER: order and views of the images of an epoch, seeded with (seed, epoch, stream).
        EXPERTS: permutation of the experts, seeded with (seed, round, stream).
        TIMESTEPS: timesteps of a step, seeded with (seed, step, stream).
        LABEL_DROPOUT: labels dropped in a step, seeded with (seed, step, stream).
    """

    IMAGE_ORDER = 0
    EXPERTS = 1
    TIMESTEPS = 2
    LABEL_DROPOUT = 3


class GlobalBatches:
    """The images of each global batch, as a DataLoader's batch sampler.

    Each epoch visits all images in a new random order. The epochs are concatenated and cut into batches, so no image is
    dropped or repeated. Each visit draws one of the image's views. An item is (image, view, draw), where `draw` selects
    the draw from the VAE's posterior and is the same for a whole epoch.

    Args:
        n_images: number of images of the dataset.
        n_views: number of stored views per image.
        batch_size: images per global batch.
        seed: global seed.
        steps: the steps to draw batches for.
        rows: the part of each global batch to return.
    """

    def __init__(self, n_images: int, n_views: int, batch_size: int, seed: int, steps: range, rows: slice):
        self.n_images = n_images
        self.n_views = n_views
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.rows = rows

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, images, draw = -1, None, 0
        for step in self.steps:
            items = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]:
                if place // self.n_images != epoch:
                    epoch = place // self.n_images
                    images, draw = self._epoch(epoch), seed_for(self.seed, epoch)
                items.append((*images[place % self.n_images].tolist(), draw))
            yield items

    def _epoch(self, epoch: int) -> np.ndarray:
        """Draw the order of an epoch: image and view [n_images, 2]."""
        generator = np.random.default_rng([self.seed, epoch, Stream.IMAGE_ORDER])
        order = generator.permutation(self.n_images)
        views = generator.integers(self.n_views, size=self.n_images)
        return np.stack([order, views], axis=1)


def sample_experts(seed: int, step: int, n_experts: int, experts_per_batch: int) -> np.ndarray:
    """Choose the experts that a step trains.

    Experts are taken in turn from a random permutation of all N. If `experts_per_batch` does not divide N, the
    permutation is repeated until a whole number of steps has used all of it, and then redrawn. Every expert is used
    equally often, and no expert is repeated within a step if N is large enough.

    Args:
        seed: global seed.
        step: the training step, from 0.
        n_experts: number of experts N.
        experts_per_batch: number of experts to choose.

    Returns:
        Indices of the experts [experts_per_batch], int64.
    """
    steps_per_round = n_experts // math.gcd(n_experts, experts_per_batch)
    generator = np.random.default_rng([seed, step // steps_per_round, Stream.EXPERTS])
    permutation = generator.permutation(n_experts)
    first = (step % steps_per_round) * experts_per_batch
    return permutation[np.arange(first, first + experts_per_batch) % n_experts]


def sample_timesteps(
    seed: int,
    step: int,
    batch_size: int,
    n_experts: int = 1,
    experts_per_batch: int = 1,
    timesteps: tuple[int, int] = (0, 1000),
) -> np.ndarray:
    """Draw the timesteps of a global batch (arXiv 2412.05628, algorithm 2, with several experts per batch).

    The batch consists of `experts_per_batch` equal contiguous groups. Each group's timesteps are drawn uniformly from
    the interval of one expert. If the intervals cannot be equal, their lengths differ by one timestep. With one expert
    this is the usual uniform draw.

    Args:
        seed: global seed.
        step: the training step, from 0.
        batch_size: images per global batch.
        n_experts: number of experts N, whose intervals divide `timesteps`.
        experts_per_batch: number of groups.
        timesteps: lowest timestep, and highest timestep plus one.

    Returns:
        Timesteps [batch_size], int64.

    Raises:
        ValueError: if `experts_per_batch` does not divide `batch_size`.
    """
    if batch_size % experts_per_batch:
        raise ValueError(f"{experts_per_batch} experts do not divide a batch of {batch_size}")
    experts = sample_experts(seed, step, n_experts, experts_per_batch).repeat(batch_size // experts_per_batch)
    start, length = timesteps[0], timesteps[1] - timesteps[0]
    low = start + experts * length // n_experts
    high = start + (experts + 1) * length // n_experts
    return np.random.default_rng([seed, step, Stream.TIMESTEPS]).integers(low, high)


def count_groups(n_images: int, group_size: int) -> int:
    """Return the number of equal groups of a microbatch of a RemixDiT, each of which needs one expert only.

    A microbatch may begin or end within a group of the global batch. The groups are then divided further, until all of
    the microbatch's groups are equal.

    Args:
        n_images: images per microbatch.
        group_size: images per group of the global batch.
    """
    return n_images // math.gcd(n_images, group_size)


@dataclass(frozen=True)
class BatchSampler:
    """Draws the global batch of every step and returns this process's rows of it.

    Attributes:
        seed: global seed.
        batch_size: images per global batch.
        world: this process's place among all processes.
        n_experts: number of experts of a RemixDiT; None for a plain DiT.
        experts_per_batch: experts per global batch.
        timestep_range: lowest timestep, and highest timestep plus one.
        label_dropout: probability that a label is replaced by the null class.
        grad_accum: microbatches per process and step.
    """

    seed: int
    batch_size: int
    world: World
    n_experts: int | None = None
    experts_per_batch: int = 1
    timestep_range: tuple[int, int] = (0, 1000)
    label_dropout: float = 0.0
    grad_accum: int = 1

    @property
    def rows(self) -> slice:
        """This process's rows of a global batch."""
        rank, size = self.world.rank, self.world.size
        return slice(rank * self.batch_size // size, (rank + 1) * self.batch_size // size)

    @contextmanager
    def load(self, dataset: FeatureDataset, steps: range, num_workers: int) -> Iterator[Iterator]:
        """Read this process's images of every step in advance; the reading processes end with the context.

        Args:
            dataset: the encoded images.
            steps: the steps to read images for.
            num_workers: number of reading processes; with 0 this process reads.

        Yields:
            An iterator of (features [rows, C, H, W], labels [rows]), one pair per step.
        """
        images = GlobalBatches(len(dataset), dataset.views, self.batch_size, self.seed, steps, self.rows)
        batches = iter(
            DataLoader(
                dataset,
                batch_sampler=images,
                collate_fn=_identity,
                num_workers=num_workers,
                pin_memory=self.world.device.type == "cuda",
                worker_init_fn=ignore_signals,
            )
        )
        try:
            yield batches
        finally:
            # The workers ignore stop signals, so after an error they would not end by themselves.
            if num_workers:
                batches._shutdown_workers()

    def timesteps(self, step: int) -> np.ndarray:
        """Draw the timesteps of a step's global batch: [batch_size], int64."""
        n_experts = self.n_experts or 1
        return sample_timesteps(
            self.seed, step, self.batch_size, n_experts, self.experts_per_batch, self.timestep_range
        )

    def label_drop(self, step: int) -> np.ndarray:
        """Draw which labels of a step's global batch are replaced by the null class: [batch_size], bool."""
        generator = np.random.default_rng([self.seed, step, Stream.LABEL_DROPOUT])
        return generator.random(self.batch_size) < self.label_dropout

    def noise(self, step: int, shape: tuple[int, ...]) -> Tensor:
        """Draw the noise of a step's global batch on the device: [batch_size, *shape], float32."""
        device = self.world.device
        generator = torch.Generator(device).manual_seed(seed_for(self.seed, step))
        return torch.randn((self.batch_size, *shape), generator=generator, device=device)

    def microbatches(self, step: int, batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor, dict, Tensor]]:
        """Add a step's random draws to this process's images and divide them into microbatches.

        Every process draws for the whole global batch and keeps its own rows. The host does not wait for the device.

        Args:
            step: the training step, from 0.
            batch: features [rows, C, H, W] and labels [rows] of this process.

        Returns:
            For each of the `grad_accum` microbatches (x, t, conditions, noise), as `training_losses` takes them:
            x [B, C, H, W], t [B], the model's keyword arguments, noise [B, C, H, W], on the device.
        """
        x, y = batch
        t = torch.from_numpy(self.timesteps(step)[self.rows])
        label_drop = torch.from_numpy(self.label_drop(step)[self.rows])
        noise = self.noise(step, x.shape[1:])[self.rows]
        if self.world.device.type == "cuda":
            t, label_drop = t.pin_memory(), label_drop.pin_memory()
        x, t, y, label_drop = (part.to(self.world.device, non_blocking=True) for part in (x, t, y, label_drop))
        microbatches = []
        chunks = (tensor.chunk(self.grad_accum) for tensor in (x, t, y, label_drop, noise))
        for x, t, y, label_drop, noise in zip(*chunks, strict=True):
            conditions = {"y": y, "label_drop": label_drop}
            if self.n_experts is not None:
                conditions["groups"] = count_groups(len(x), self.batch_size // self.experts_per_batch)
            microbatches.append((x, t, conditions, noise))
        return microbatches


def _identity(batch):
    """Return a batch unchanged, as a DataLoader's collate function, because the dataset returns whole batches."""
    return batch
