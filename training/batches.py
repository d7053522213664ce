"""Everything that is drawn for a training step: images and views, timesteps, experts, label dropout and noise."""

import argparse
import math
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader

from distributed import World, ignore_signals, seed_for
from features import FeatureDataset
from models import DiT
from remix import RemixDiT


class GlobalBatches:
    """Which images make up each global batch: (image, view, draw) for the rows of this process, step after step.

    Images are shuffled anew every epoch, the epochs laid end to end and cut into batches, so that nothing is dropped or
    repeated; each time an image is met, one of its views is drawn, and the number of the epoch's draws from the VAE's
    posterior comes with it. A function of (seed, step) alone.
    """

    def __init__(self, n_images: int, n_views: int, batch: int, seed: int, steps: range, rows: slice):
        self.n_images, self.n_views, self.batch, self.seed = n_images, n_views, batch, seed
        self.steps, self.rows = steps, rows

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        epoch, order, draw = -1, None, 0
        for step in self.steps:
            items = []
            for place in range(step * self.batch, (step + 1) * self.batch)[self.rows]:
                if place // self.n_images != epoch:
                    epoch = place // self.n_images
                    order, draw = self._epoch(epoch), seed_for(self.seed, epoch)
                items.append((*order[place % self.n_images].tolist(), draw))
            yield items

    def _epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch, 0])
        return np.stack(
            [generator.permutation(self.n_images), generator.integers(self.n_views, size=self.n_images)], axis=1
        )


def sample_timesteps(
    seed: int,
    step: int,
    batch: int,
    n_experts: int = 1,
    experts_per_batch: int = 1,
    timesteps: tuple[int, int] = (0, 1000),
) -> np.ndarray:
    """The timesteps [batch] (int64) of a global batch: paper, algorithm 2, for several experts at a time.

    The batch is `experts_per_batch` equal contiguous groups, each drawn uniformly within one expert's interval. The
    experts are dealt from a shuffled deck, laid out again and again until it comes out even and then shuffled anew: none
    is repeated within a batch while N allows, and all serve equally often. A function of (seed, step) alone. With one
    expert this is the ordinary uniform draw from `timesteps`, low to high - 1. Intervals that cannot be equal differ by
    one timestep, and their timesteps' frequencies by that much. Raises ValueError if the groups do not divide the batch.
    """
    if batch % experts_per_batch:
        raise ValueError(f"{experts_per_batch} experts do not divide a batch of {batch}")
    round_length = n_experts // math.gcd(n_experts, experts_per_batch)  # steps until the deck comes out even
    deck = np.random.default_rng([seed, step // round_length, 1]).permutation(n_experts)
    first = (step % round_length) * experts_per_batch
    experts = deck[np.arange(first, first + experts_per_batch) % n_experts].repeat(batch // experts_per_batch)
    start, length = timesteps[0], timesteps[1] - timesteps[0]
    low, high = start + experts * length // n_experts, start + (experts + 1) * length // n_experts
    return np.random.default_rng([seed, step, 2]).integers(low, high)


def identity(batch):
    return batch


@contextmanager
def prefetched(args: argparse.Namespace, dataset: FeatureDataset, steps: range, rows: slice, world: World):
    """This process's rows of every global batch, read ahead; the readers end with the block."""
    chosen = GlobalBatches(len(dataset), dataset.views, args.global_batch_size, args.global_seed, steps, rows)
    batches = iter(
        DataLoader(
            dataset,
            batch_sampler=chosen,
            collate_fn=identity,
            num_workers=args.num_workers,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )
    )
    try:
        yield batches
    finally:
        if args.num_workers:
            batches._shutdown_workers()  # they would outlive an error, ignoring signals


def microbatches(args: argparse.Namespace, step: int, batch, model: DiT | RemixDiT, rows: slice, world: World):
    """Yield (x, t, conditions, noise) for each accumulated part of this process's rows of a step's global batch.

    Timesteps, label dropout and noise are drawn for the whole global batch by every process, which keeps its rows.
    """
    x, y = batch
    seed, size, remix = args.global_seed, args.global_batch_size, isinstance(model, RemixDiT)
    config = model.backbone_config if remix else model.config
    t = sample_timesteps(seed, step, size, args.n_experts if remix else 1, args.experts_per_batch, args.timesteps)[rows]
    label_drop = np.random.default_rng([seed, step, 3]).random(size)[rows] < config["class_dropout_prob"]
    generator = torch.Generator(world.device).manual_seed(seed_for(seed, step))
    noise = torch.randn((size, *x.shape[1:]), generator=generator, device=world.device)[rows]
    t, label_drop = torch.from_numpy(t), torch.from_numpy(label_drop)
    if world.device.type == "cuda":
        t, label_drop = t.pin_memory(), label_drop.pin_memory()
    on_device = [tensor.to(world.device, non_blocking=True) for tensor in (x, t, y, label_drop)]
    for part in zip(*(tensor.chunk(args.grad_accum) for tensor in (*on_device, noise)), strict=True):
        x, t, y, label_drop, noise = part
        conditions = {"y": y, "label_drop": label_drop}
        if remix:  # groups that a microbatch cuts through are cut finer, until all of its groups are equal
            conditions["groups"] = len(x) // math.gcd(len(x), size // args.experts_per_batch)
        yield x, t, conditions, noise
