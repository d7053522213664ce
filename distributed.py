"""Processes: the group (NCCL on GPUs, gloo on CPUs, none without torchrun), rank-0 logging, and seeds."""

import logging
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common import LocalError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what SLURM can send in advance


@dataclass(frozen=True)
class World:
    """This process's place among all of them."""

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None  # a gloo group beside NCCL's, for what needs no device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def autocast(self, precision: str) -> torch.autocast:
        """The context in which matrix products are taken in "bf16" or "fp16"; "fp32" changes nothing."""
        return torch.autocast(self.device.type, PRECISIONS[precision], enabled=precision != "fp32")

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process; the hosts meet for it, the devices do not."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.hosts)
        return bool(flags.item())

    def same(self, value: int) -> bool:
        """Whether all processes have the same value."""
        if self.size == 1:
            return True
        bounds = torch.tensor([value, -value])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.hosts)
        return int(bounds.sum()) == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def world_size() -> int:
    """The number of processes, known before any of them has joined the group."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup() -> World:
    """Join the process group that torchrun describes, if it does, and take a device: this rank's GPU, or the CPU.

    A process waits half an hour for the others (while one of them works through a larger share, say). When one of them
    dies, torchrun ends the others of its node at once.
    """
    size, rank, local_rank = world_size(), int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise LocalError(
                f"process {local_rank} of this node has no GPU: start at most {torch.cuda.device_count()} a node (--nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    else:
        device = torch.device("cpu")
    patience = timedelta(minutes=30)
    if size > 1:
        # torchrun keeps one store for all the times it restarts the processes: without a name of its own, a new group
        # would read the addresses of the one before and wait for the dead. The agents of several nodes do not count
        # restarts alike; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment gives each its own store.
        alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        store, rank, size = next(rendezvous("env://", timeout=patience))
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience, device_id=bound)
    hosts = dist.new_group(backend="gloo", timeout=patience) if size > 1 and device.type == "cuda" else None
    world = World(rank, size, device, hosts)
    world.barrier()  # nobody starts to write before everybody has looked at what is there
    return world


def seed_for(*position: int) -> int:
    """A 63-bit seed that is a function of the position alone, such as (seed, step)."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> 1)


def rank0_logger(world: World, path: Path | None = None) -> logging.Logger:
    """A logger to the terminal and, if given, to the end of `path`; silent on the other ranks."""
    logging.raiseExceptions = False  # where a disk is full, the terminal still gets the line
    logger = logging.getLogger("remix-dit")
    logger.setLevel(logging.INFO if world.is_main else logging.ERROR)
    logger.handlers.clear()
    logger.propagate = False
    handlers = [logging.StreamHandler()]
    if path is not None and world.is_main:
        handlers.append(logging.FileHandler(path))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class StopSignal:
    """Notes a signal that asks the run to stop. Schedulers and torchrun may send it twice; a Ctrl-C after seconds ends the run."""

    def __init__(self):
        self.requested, self.since = None, 0.0
        for which in STOP_SIGNALS:
            signal.signal(which, self._note)

    def _note(self, which: int, frame):
        if self.requested is None:
            self.requested, self.since = signal.Signals(which).name, time.monotonic()
        elif which == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt


def restore_signals():
    for which in STOP_SIGNALS:
        signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)


def ignore_signals(worker: int):
    """For the loader's processes: a signal to the whole group stops the run in its own time, with their help."""
    for which in STOP_SIGNALS:
        signal.signal(which, signal.SIG_IGN)
