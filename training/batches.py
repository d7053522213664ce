"""Everything that is drawn for a training step: images and views, timesteps, experts, label dropout and noise.

Every draw is a function of the global seed, the step and the place in the global batch. It depends neither on the
number of processes, nor on when the run was resumed, nor on the device: all random numbers are drawn on CPUs, in the
processes that read the images.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion import Process, create_process
from features.dataset import FeatureDataset
from runtime.processes import World, ignore_signals, seed_for, worker_count
from training.settings import Execution, RunSettings


class Stream(IntEnum):
    """Independent streams of random numbers; a stream's number is a part of its seed.

    Other values would change the draws of every run. One draw has no stream number: the draws from the VAE's posterior
    in an epoch are seeded with (seed, epoch).

    Attributes:
        IMAGE_ORDER: order and views of the images of an epoch, seeded with (seed, epoch, stream).
        EXPERTS: permutation of the experts, seeded with (seed, round, stream).
        TIMESTEPS: timesteps of a step, seeded with (seed, step, stream).
        LABEL_DROPOUT: label dropout of a row of a step, from `row_generators`.
        NOISE: noise of a row of a step, from `row_generators`.
    """

    IMAGE_ORDER = 0
    EXPERTS = 1
    TIMESTEPS = 2
    LABEL_DROPOUT = 3
    NOISE = 4


class Microbatch(NamedTuple):
    """What the losses of B images are computed from.

    Attributes:
        x: features [B, C, H, W], float32.
        t: timesteps [B], int64, or the times of a flow [B], float32.
        conditions: the keyword arguments of the model: the labels "y" [B], "label_drop" [B], and "groups" of a Remix.
        noise: standard normal noise [B, C, H, W], float32.
        extras: further tensors by name, see `StepBatch`.
    """

    x: Tensor
    t: Tensor
    conditions: dict[str, Any]
    noise: Tensor
    extras: dict[str, Tensor] | None = None


class StepBatch(NamedTuple):
    """What one process trains on in one step: its rows of the global batch, R in number.

    Attributes:
        x: features [R, C, H, W], float32.
        y: labels [R], int64.
        t: timesteps [R], int64, or the times of a flow [R], float32.
        label_drop: whether the label is replaced by the null class [R], bool.
        noise: standard normal noise [R, C, H, W], float32.
        extras: further tensors [R, ...] by name, which a term of the loss needs; see training/terms.py.
    """

    x: Tensor
    y: Tensor
    t: Tensor
    label_drop: Tensor
    noise: Tensor
    extras: dict[str, Tensor] | None = None


def row_generators(seed: int, step: int, rows: range, stream: Stream) -> Iterator[np.random.Generator]:
    """Iterate over the random generators of some rows of a step's global batch.

    Row r's generator is NumPy's Generator on Philox4x64-10 with the key (seed, step) and the initial counter
    (0, r, stream, 0), least significant word first. Therefore any rows can be drawn without the others, and each
    row has 2^66 random 64-bit numbers of its own.

    Args:
        seed: global seed.
        step: the training step, from 0.
        rows: indices of the rows in the global batch.
        stream: what is drawn.

    Yields:
        The generator of each row. It is the same object with another state each time, so finish the draws of a row
        before the next row is requested.
    """
    philox = np.random.Philox(key=np.array([seed, step], np.uint64))
    generator = np.random.Generator(philox)
    # Setting the state takes a few microseconds, and a new Philox several times as long.
    state = philox.state
    for row in rows:
        state["state"]["counter"][:] = 0, row, stream, 0
        philox.state = state
        yield generator


def draw_noise(seed: int, step: int, rows: range, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the noise of some rows of a step's global batch.

    Row r's noise is the first standard_normal(shape, float32) of its generator (see `row_generators`).

    Args:
        seed: global seed.
        step: the training step, from 0.
        rows: indices of the rows in the global batch.
        shape: shape of an image or latent, (C, H, W).

    Returns:
        Standard normal noise [number of rows, *shape], float32.
    """
    noise = np.empty((len(rows), *shape), np.float32)
    for row, generator in zip(noise, row_generators(seed, step, rows, Stream.NOISE), strict=True):
        generator.standard_normal(out=row, dtype=np.float32)
    return noise


def draw_label_dropout(seed: int, step: int, rows: range, probability: float) -> np.ndarray:
    """Draw which labels of some rows of a step's global batch are replaced by the null class.

    Row r's label is replaced if the first random() of its generator (see `row_generators`) is below `probability`.

    Args:
        seed: global seed.
        step: the training step, from 0.
        rows: indices of the rows in the global batch.
        probability: probability that a label is replaced.

    Returns:
        Whether each label is replaced [number of rows], bool.
    """
    generators = row_generators(seed, step, rows, Stream.LABEL_DROPOUT)
    return np.array([generator.random() < probability for generator in generators])


class GlobalBatches:
    """The images of each global batch.

    Each epoch visits all images in a new random order. The epochs are concatenated and cut into batches, so no image is
    dropped or repeated. Each time an image is used, one of its views is drawn at random: the image or, if stored, its
    mirror image. An item is (image, view, draw). `draw` is the number of the draw from the VAE's posterior. It is the
    same for a whole epoch.

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


def default_experts_per_batch(batch_size: int, n_experts: int) -> int:
    """Return the largest divisor of the global batch size that is at most 16 and at most the number of experts.

    It does not depend on the number of processes, because that number must not change a run's results.
    """
    return max(n for n in range(1, min(16, n_experts) + 1) if batch_size % n == 0)


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


def draw_times(
    seed: int, step: int, batch_size: int, process: Process, boundaries: Sequence[float], experts_per_batch: int = 1
) -> np.ndarray:
    """Draw the times of a global batch (arXiv 2412.05628, algorithm 2, with several experts per batch).

    The batch consists of `experts_per_batch` equal contiguous groups. Each group's times are drawn from the interval of
    one expert: whole timesteps uniformly, those of a flow from its distribution of times, restricted to the interval.
    With one expert this is the usual draw.

    Args:
        seed: global seed.
        step: the training step, from 0.
        batch_size: images per global batch.
        process: the process.
        boundaries: the N + 1 noise levels between which the experts' intervals lie; for a plain DiT the lowest and the
            highest noise level that it is trained on.
        experts_per_batch: number of groups.

    Returns:
        The times that the network sees [batch_size]: int64 timesteps, or the float32 times of a flow.

    Raises:
        ValueError: if `experts_per_batch` does not divide `batch_size`, or if an expert's interval is empty.
    """
    if batch_size % experts_per_batch:
        raise ValueError(f"{experts_per_batch} experts do not divide a batch of {batch_size}")
    experts = sample_experts(seed, step, len(boundaries) - 1, experts_per_batch)
    experts = experts.repeat(batch_size // experts_per_batch)
    boundaries = np.asarray(boundaries)
    generator = np.random.default_rng([seed, step, Stream.TIMESTEPS])
    return process.sample_times(generator, boundaries[experts], boundaries[experts + 1])


def count_groups(n_images: int, group_size: int) -> int:
    """Return the number of equal groups of a microbatch of a RemixDiT, each of which needs one expert only.

    A microbatch may begin or end within a group of the global batch. The groups are then divided further, until all of
    the microbatch's groups are equal.

    Args:
        n_images: images per microbatch.
        group_size: images per group of the global batch.
    """
    return n_images // math.gcd(n_images, group_size)


def microbatch_shape(settings: RunSettings, execution: Execution, n_experts: int | None) -> tuple[int, int | None]:
    """Return the images of a microbatch and the number of its groups, which is None for a plain model.

    Args:
        settings: the settings of the run.
        execution: how the work is divided.
        n_experts: number of experts; None for a plain model.
    """
    n_images = settings.global_batch_size // execution.processes // execution.grad_accum
    if n_experts is None:
        return n_images, None
    return n_images, count_groups(n_images, settings.global_batch_size // settings.experts_per_batch)


@dataclass(frozen=True)
class BatchSampler:
    """Draws the global batch of every step and returns this process's rows of it.

    Attributes:
        seed: global seed.
        batch_size: images per global batch.
        world: this process's place among all processes.
        n_experts: number of experts of a RemixDiT; None for a plain DiT.
        experts_per_batch: experts per global batch.
        timestep_range: lowest and highest noise level of a plain DiT; None for the whole range.
        label_dropout: probability that a label is replaced by the null class.
        grad_accum: microbatches per process and step.
        boundaries: the noise levels between the experts' intervals; None for intervals of equal length.
        process: the process.
    """

    seed: int
    batch_size: int
    world: World
    n_experts: int | None = None
    experts_per_batch: int = 1
    timestep_range: tuple[float, float] | None = None
    label_dropout: float = 0.0
    grad_accum: int = 1
    boundaries: Sequence[float] | None = None
    process: Process = field(default_factory=create_process)

    @property
    def rows(self) -> slice:
        """This process's rows of a global batch."""
        rank, size = self.world.rank, self.world.size
        return slice(rank * self.batch_size // size, (rank + 1) * self.batch_size // size)

    @contextmanager
    def load(self, dataset: FeatureDataset, steps: range, num_workers: int | None) -> Iterator[Iterator[StepBatch]]:
        """Prepare this process's part of every step in advance; the preparing processes end with the context.

        Args:
            dataset: the encoded images.
            steps: the steps to prepare.
            num_workers: number of processes that read images and draw random numbers; with 0 this process does. None
                stands for the default of `worker_count`.

        Yields:
            An iterator of one StepBatch per step, in host memory, which is pinned if this process has a GPU.
        """
        num_workers = worker_count(num_workers)
        images = GlobalBatches(len(dataset), dataset.views, self.batch_size, self.seed, steps, self.rows)
        batches = iter(
            DataLoader(
                _StepDataset(dataset, self),
                sampler=zip(steps, images, strict=True),
                batch_size=None,
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
        """Draw the times of a step's global batch: [batch_size], see `draw_times`."""
        boundaries = self.boundaries
        if boundaries is None and self.n_experts is None:
            boundaries = self.timestep_range or self.process.scale.range
        elif boundaries is None:
            boundaries = self.process.scale.equal_boundaries(self.n_experts)
        return draw_times(self.seed, step, self.batch_size, self.process, boundaries, self.experts_per_batch)

    def draw(self, step: int, x: Tensor, y: Tensor, extras: dict[str, Tensor] | None = None) -> StepBatch:
        """Add a step's random draws to this process's images.

        Args:
            step: the training step, from 0.
            x: features [R, C, H, W] of this process's rows.
            y: labels [R].
            extras: further tensors of these rows by name, if the dataset has any.
        """
        rows = range(self.batch_size)[self.rows]
        label_drop = draw_label_dropout(self.seed, step, rows, self.label_dropout)
        noise = draw_noise(self.seed, step, rows, x.shape[1:])
        # The copy does not keep the other processes' rows in memory.
        t = self.timesteps(step)[self.rows].copy()
        t, label_drop, noise = map(torch.from_numpy, (t, label_drop, noise))
        return StepBatch(x, y, t, label_drop, noise, extras)

    def microbatches(self, batch: StepBatch) -> list[Microbatch]:
        """Divide a step's batch into `grad_accum` microbatches on the device. The host does not wait for the device.

        Args:
            batch: this process's part of the step, from `load` or `draw`.
        """

        def divide(part: Tensor) -> tuple[Tensor, ...]:
            return part.to(self.world.device, non_blocking=True).chunk(self.grad_accum)

        *tensors, extras = batch
        rows = zip(*map(divide, tensors), strict=True)
        extras = {name: divide(part) for name, part in (extras or {}).items()}
        microbatches = []
        for i, (x, y, t, label_drop, noise) in enumerate(rows):
            conditions = {"y": y, "label_drop": label_drop}
            if self.n_experts is not None:
                conditions["groups"] = count_groups(len(x), self.batch_size // self.experts_per_batch)
            microbatches.append(Microbatch(x, t, conditions, noise, {name: parts[i] for name, parts in extras.items()}))
        return microbatches


class _StepDataset(Dataset):
    """The steps of a run as a dataset: an item is addressed as (step, images) and is a StepBatch.

    Args:
        dataset: the encoded images.
        sampler: draws the steps' random numbers.
    """

    def __init__(self, dataset: FeatureDataset, sampler: BatchSampler):
        self.dataset = dataset
        # A process group cannot be sent to a worker process, and drawing needs none.
        self.sampler = replace(sampler, world=replace(sampler.world, hosts=None))

    def __getitem__(self, item: tuple[int, list[tuple[int, int, int]]]) -> StepBatch:
        step, images = item
        x, y, *extras = self.dataset.__getitems__(images)
        return self.sampler.draw(step, x, y, extras[0] if extras else None)


def _identity(batch):
    """Return a batch unchanged, as a DataLoader's collate function, because the dataset returns whole batches."""
    return batch
