"""sharding.py: gradients, norms, losses and bytes of several processes with and without sharded bases."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import random_remix_dit, relative
from torch.multiprocessing import start_processes

from diffusion import create_diffusion
from distributed import World
from sharding import gather_rows
from training.batches import BatchSampler
from training.trainer import Trainer

BATCH = 16
CPU = torch.device("cpu")


def in_processes(function, size: int, *arguments):
    """Run function(world, *arguments) in `size` processes of one gloo group."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    start_processes(_process, (size, store.port, function, *arguments), nprocs=size, start_method="fork")


def _process(rank: int, size: int, port: int, function, *arguments):
    store = dist.TCPStore("localhost", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    function(World(rank, size, CPU), *arguments)
    dist.destroy_process_group()


def microbatches(world: World, step: int, accumulate: int) -> list:
    """This process's microbatches of a global batch of 16 rows in four groups, for `random_remix_dit`."""
    sampler = BatchSampler(0, BATCH, world, n_experts=20, experts_per_batch=4, grad_accum=accumulate)
    x = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    return sampler.microbatches(sampler.draw(step, x[sampler.rows], torch.arange(BATCH)[sampler.rows] % 10))


def train(world: World, accumulate: int = 1, steps: int = 20, **options) -> dict:
    """Train for some steps; return the first step's gradients (whole, on rank 0) and norm, and all losses."""
    trainer = Trainer(random_remix_dit(), create_diffusion(), world, lr=1e-3, **options)
    update = trainer._update_weights
    gradients, losses = {}, []

    def record(nonfinite):
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and name not in gradients:
                gradient = parameter.grad.clone()
                sharded = name in trainer.shards
                gradients[name] = gather_rows(gradient, world.rank, world.size) if sharded else gradient
        update(nonfinite)

    trainer._update_weights = record
    for step in range(steps):
        trainer.step(step, microbatches(world, step, accumulate), 1e-4)
        means, _ = trainer.stats.read()
        losses.append(means["loss"])
    return {"gradients": gradients, "losses": losses}


def compare(world: World, folder: Path, compiled: bool):
    expected = torch.load(folder / "one.pt")
    for shard in (False, True):
        for accumulate in (1, 2):
            torch._dynamo.reset()
            found = train(world, accumulate, shard=shard, compile=compiled)
            if world.is_main:
                for name, gradient in expected["gradients"].items():
                    error = relative(found["gradients"][name], gradient)
                    print(shard, accumulate, name, error)
                print(
                    shard,
                    accumulate,
                    max(abs(a / b - 1) for a, b in zip(found["losses"], expected["losses"], strict=True)),
                )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_and_losses_are_those_of_one_process(tmp_path, size, compiled):
    torch.save(train(World(0, 1, CPU)), tmp_path / "one.pt")
    in_processes(compare, size, tmp_path, compiled)
