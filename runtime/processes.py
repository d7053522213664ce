"""Processes, signals and seeds: the process group, logging on rank 0, stop signals and per-sample random generators.

The process group uses NCCL on GPUs and gloo on CPUs. Without torchrun there is one process and no group.
"""

import functools
import logging
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch.distributed.rendezvous import rendezvous

from runtime.command_line import counted
from runtime.errors import LocalError, UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# SLURM can send SIGUSR1 some time before it ends a job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# How long a process waits for the others, for example while one of them works through a larger share.
TIMEOUT = timedelta(minutes=30)


def worker_count(given: int | None) -> int:
    """Return how many worker processes read images.

    Args:
        given: the value of --num-workers. The default (None) is 4, or the number of CPU cores that this process may use
            if there are fewer, because PyTorch warns of more workers than that.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores) if given is None else given


@dataclass(frozen=True)
class World:
    """This process's place among all processes.

    Attributes:
        rank: index of this process, 0 to size - 1.
        size: number of processes.
        device: this process's device.
        hosts: gloo group for communication without the GPUs; None where the default group is gloo's or there is none.
    """

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self):
        """Wait until all processes have reached this call."""
        if self.size > 1:
            dist.barrier()

    def autocast(self, precision: str) -> torch.autocast:
        """Return a context that computes matrix products in "bf16" or "fp16"; "fp32" changes nothing."""
        return torch.autocast(self.device.type, PRECISIONS[precision], enabled=precision != "fp32")

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is True on any process; the hosts synchronize, the GPUs do not."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.hosts)
        return [bool(value) for value in values.tolist()]

    def check_same_files(self, count: int, flag: str):
        """Check that all processes count as many files in a folder; the hosts synchronize, the GPUs do not.

        Args:
            count: the number of files that this process has found, or has found to be missing.
            flag: the flag that selects the folder, for the error message.

        Raises:
            UserError: if the numbers differ.
        """
        if self.size == 1:
            return
        bounds = torch.tensor([count, -count])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.hosts)
        if bounds.sum():
            raise UserError(
                f"the processes see different files: all nodes need the same {flag}, on a shared file system"
            )

    def from_main(self, value: str | None) -> str | None:
        """Return the value that rank 0 passes; the hosts synchronize, the GPUs do not."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.hosts)
        return values[0]

    def gather(self, value) -> list | None:
        """Return the values of all processes, by rank, on rank 0; None on the others. The GPUs do not synchronize."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, group=self.hosts)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def world_size() -> int:
    """Return the number of processes; it is known before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup() -> World:
    """Join the process group that torchrun describes, if any, and select this process's device.

    A script may call this before each of several runs: the first call joins, and every call waits for all processes.

    When a process dies, torchrun ends the other processes of its node at once. Processes of other nodes wait up to
    TIMEOUT.

    Returns:
        This process's place. The device is the GPU with the local rank's index, or the CPU if there is no GPU.

    Raises:
        LocalError: if the node has more processes than GPUs.
    """
    world = _make_world()
    # No process may write before every process has checked the files that are there.
    world.barrier()
    return world


@functools.cache
def _make_world() -> World:
    """Join the process group and select this process's device, once per process."""
    rank = int(os.environ.get("RANK", 0))
    size = world_size()
    device = _select_device(int(os.environ.get("LOCAL_RANK", 0)))
    hosts = None
    if size > 1:
        rank, size = _join_group(device)
        if device.type == "cuda":
            hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return World(rank, size, device, hosts)


def _select_device(local_rank: int) -> torch.device:
    """Select the GPU of a local rank, and TF32 matrix products; or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise LocalError(
            f"process {local_rank} of this node has no GPU: "
            f"start at most {counted(n_gpus, 'process', 'processes')} per node (--nproc_per_node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def _join_group(device: torch.device) -> tuple[int, int]:
    """Join torchrun's process group and return this process's rank and the number of processes."""
    # torchrun keeps one store across all restarts of the processes. With a prefix per restart, a new group does not
    # read the addresses of the previous group, whose processes no longer exist. The agents of several nodes may count
    # restarts differently, so the prefix is the same for all restarts there. On several nodes, setting
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment gives each restart a store of its own.
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id)
    return rank, size


def use_deterministic_algorithms():
    """Select algorithms that give the same bits in every run on the same GPUs. Call this before any GPU is used."""
    # cuBLAS reads this when it starts. With two streams, it would otherwise share its workspace in no fixed order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling new memory with NaN would only help to find reads of memory that was never written.
    torch.utils.deterministic.fill_uninitialized_memory = False


def seed_for(*position: int) -> int:
    """Return a 63-bit seed that is a function of the position alone, such as (seed, step)."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0]) >> 1


class SampleGenerators:
    """One random generator per sample, so that a sample's draws do not depend on the batch it is in.

    The idea is StackedRandomGenerator of NVlabs/edm2.

    Args:
        seed: seed shared by all samples.
        samples: indices of the samples; sample i's generator is seeded from (seed, i).
        device: device of the generators and of the draws.
    """

    def __init__(self, seed: int, samples: Iterable[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(seed_for(seed, i)) for i in samples]

    def randn(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw standard normal noise.

        Args:
            shape: shape of one sample's noise.

        Returns:
            Noise [number of samples, *shape], float32. Each call continues every sample's own random stream.
        """
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])


def rank0_logger(world: World, path: Path | None = None) -> logging.Logger:
    """Make a logger that writes to the terminal and to a file.

    Args:
        world: this process's place; ranks other than 0 log errors only, and only to the terminal.
        path: file to append to; None for none.

    Returns:
        The logger. Each line begins with the date and time.
    """
    # If the disk is full, writing to the file fails silently and the terminal still shows the line.
    logging.raiseExceptions = False
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
    """Records a signal that asks the run to stop, so that the run can stop after its current step.

    Schedulers and torchrun may send a signal twice. A second Ctrl-C more than two seconds after the first signal ends
    the run at once with KeyboardInterrupt.

    Attributes:
        requested: name of the first signal that arrived, or None.
        since: time of its arrival, in seconds of time.monotonic().
    """

    def __init__(self):
        self.requested = None
        self.since = 0.0
        for which in STOP_SIGNALS:
            signal.signal(which, self._record)

    def _record(self, which: int, frame):
        if self.requested is None:
            self.requested = signal.Signals(which).name
            self.since = time.monotonic()
        elif which == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt


def restore_signals():
    """Restore Python's default handling of the stop signals."""
    for which in STOP_SIGNALS:
        signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)


def ignore_signals(worker: int):
    """Ignore the stop signals in a DataLoader's worker process, so that the run can still read data while it stops.

    Args:
        worker: index of the worker, which DataLoader passes to its worker_init_fn; unused.
    """
    for which in STOP_SIGNALS:
        signal.signal(which, signal.SIG_IGN)
