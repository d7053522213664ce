"""Statistics of a run: running sums of the losses, non-finite steps, throughput, the report line, held-out errors."""

import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion import Process
from runtime.command_line import counted
from runtime.processes import PRECISIONS, World, seed_for
from training.batches import BatchSampler
from training.experts import Experts


class NonFiniteSteps(NamedTuple):
    """The steps whose loss or gradient was not finite.

    Attributes:
        count: number of non-finite steps so far.
        streak: number of consecutive non-finite steps up to the latest step.
        longest_streak: largest streak so far.
        step: the last step of the longest streak.
        loss: the loss of that step.
        norm: the gradient norm of that step.
    """

    count: float = 0
    streak: float = 0
    longest_streak: float = 0
    step: float = 0
    loss: float = 0
    norm: float = 0


class TrainingStats:
    """Sums of the losses since the last report, and the non-finite steps so far.

    The losses of a step stay on the device until its work is done. They are then added to the sums on the host, which
    never waits for them in a step.

    Args:
        world: this process's place among all processes.
        names: names of the losses.
    """

    def __init__(self, world: World, names: tuple[str, ...]):
        self.world = world
        self.names = names
        # Of this process: the sum of each part of the loss, and the number of steps that were added.
        self.sums = [0.0] * (len(names) + 1)
        # The loss is this process's share.
        self.nonfinite = NonFiniteSteps()
        self.steps = []  # those whose losses have not been copied to the host
        self.values = []  # their losses and gradient norms on the device
        self.copy = None  # the steps, the values on the host and the event of a copy that has not been added yet

    def add(self, step: int, losses: Tensor, norm: Tensor):
        """Count a step. Its losses are added to the sums only if the gradient norm is finite.

        Args:
            step: the training step, from 0.
            losses: mean losses over this process's rows, in the order of `names`.
            norm: gradient norm [] over all processes, which is not finite if the loss of any process is not.
        """
        self.steps.append(step)
        self.values.append(torch.cat([losses, norm.view(1)]))

    def longest_streak(self) -> int:
        """Return the largest number of consecutive non-finite steps, without waiting for the device.

        On a GPU, the steps count whose losses have arrived on the host.
        """
        if self.copy is None or self.copy[2] is None or self.copy[2].query():
            self._add_copy()
            self._start_copy()
            if self.world.device.type != "cuda":
                self._add_copy()
        return int(self.nonfinite.longest_streak)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of all processes together, for a checkpoint.

        Every process must call this, and the host waits for the device. Each process then continues from its share of
        the state, as it would after loading the checkpoint, so that a resumed run stays equal to an uninterrupted one.
        """
        sums, nonfinite = self._sum_processes()
        state = {"sums": torch.tensor(sums, dtype=torch.float64), "bad": torch.tensor(nonfinite, dtype=torch.float64)}
        self.load_state_dict(state)
        return state

    def load_state_dict(self, state: dict[str, Tensor]):
        """Continue from a state of all processes, of which each process takes an equal share."""
        self.sums = (state["sums"].double() / self.world.size).tolist()
        nonfinite = NonFiniteSteps(*state["bad"].tolist())
        self.nonfinite = nonfinite._replace(loss=nonfinite.loss / self.world.size)

    def read(self) -> tuple[dict[str, float | None], NonFiniteSteps]:
        """Return the mean losses since the last call, and the non-finite steps so far.

        Every process must call this. The host waits for the device.

        Returns:
            A dict from each name in `names` to the mean over the finite steps, or to None if there was no finite step;
            and the non-finite steps of all processes.
        """
        (*sums, steps), nonfinite = self._sum_processes()
        self.sums = [0.0] * len(self.sums)
        means = {name: value / steps if steps else None for name, value in zip(self.names, sums, strict=True)}
        return means, nonfinite

    def _start_copy(self):
        """Start to copy the losses of the steps since the last copy to the host."""
        if not self.steps:
            return
        values, event = torch.stack(self.values), None
        if values.device.type == "cuda":
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.copy = self.steps, values, event
        self.steps, self.values = [], []

    def _add_copy(self):
        """Add the copied losses, if there are any. The host waits until they have arrived."""
        if self.copy is None:
            return
        steps, values, event = self.copy
        if event is not None:
            event.synchronize()
        for step, row in zip(steps, values.tolist(), strict=True):
            self._add_row(step, row[:-1], row[-1])
        self.copy = None

    def _add_row(self, step: int, losses: list[float], norm: float):
        """Add the losses of a step to the sums, or count it as non-finite."""
        if math.isfinite(norm):
            shares = [value / self.world.size for value in (*losses, 1.0)]
            self.sums = [total + share for total, share in zip(self.sums, shares, strict=True)]
            self.nonfinite = self.nonfinite._replace(streak=0)
            return
        count, streak, longest, *_ = self.nonfinite
        self.nonfinite = self.nonfinite._replace(count=count + 1, streak=streak + 1)
        if streak + 1 >= longest:
            loss = losses[0] / self.world.size
            self.nonfinite = NonFiniteSteps(count + 1, streak + 1, streak + 1, step, loss, norm)

    def _sum_processes(self) -> tuple[list[float], NonFiniteSteps]:
        """Return the sums and the non-finite steps of all processes. The host waits for the device."""
        self._add_copy()
        self._start_copy()
        self._add_copy()
        values = torch.tensor([*self.sums, self.nonfinite.loss], dtype=torch.float64, device=self.world.device)
        *sums, loss = self.world.sum(values).tolist()
        return sums, self.nonfinite._replace(loss=loss)


class ThroughputTimer:
    """Measures the speed of training. The time of pauses, such as writing a checkpoint, does not count.

    Args:
        device: the device that trains.
        flops_per_image: FLOPs of a training step per image, from `Experts.training_flops`.
        peak_flops_per_s: FLOP/s of a large matrix product on all devices together, from `matmul_rate`.

    Attributes:
        last_pause: seconds of the latest pause; 0 before the first.
    """

    def __init__(self, device: torch.device, flops_per_image: float, peak_flops_per_s: float):
        self.device = device
        self.flops_per_image = flops_per_image
        self.peak_flops_per_s = peak_flops_per_s
        self.images = 0
        self.last_pause = 0.0
        self.start = time.perf_counter()

    def add(self, images: int):
        """Count the images of a step."""
        self.images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of this context. The device finishes its steps first, because their time counts."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        paused_at = time.perf_counter()
        yield
        self.last_pause = time.perf_counter() - paused_at
        self.start += self.last_pause

    def read(self) -> dict[str, float]:
        """Return the speed since the last call. The device must have finished its steps.

        Returns:
            "images_per_s"; "mfu", the part of `peak_flops_per_s` that is used; and "memory_gib", from `memory_gib`.
        """
        now = time.perf_counter()
        images_per_s = self.images / (now - self.start)
        self.images, self.start = 0, now
        mfu = images_per_s * self.flops_per_image / self.peak_flops_per_s
        return {"images_per_s": images_per_s, "mfu": mfu, "memory_gib": memory_gib(self.device)}


def matmul_rate(device: torch.device, precision: str, times: int = 3) -> float:
    """Measure the rate of a large matrix product, in FLOP/s: the best of several runs.

    Args:
        device: the device to measure.
        precision: "fp32" (TF32 if that is enabled), "fp64", "bf16" or "fp16".
        times: number of runs.
    """
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(torch.float64 if precision == "fp64" else PRECISIONS[precision])
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def memory_gib(device: torch.device) -> float:
    """Return the largest memory that this process has used so far, of the GPU or else of the host, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # macOS reports bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def report_line(metrics: dict, max_steps: int, batch_size: int, pause_s: float = 0) -> str:
    """Return the line of log.txt for the metrics of a step.

    Args:
        metrics: the metrics, see `training.outputs.Outputs.report`.
        max_steps: number of steps of the run.
        batch_size: images per global batch.
        pause_s: seconds that the remaining pictures and scores will take.
    """
    terms = [name for name in metrics if f"{name}_weight" in metrics]
    means = [f"{name} {metrics[name]:.4f}" for name in ("loss", "mse", *terms) if metrics.get(name) is not None]
    parts = [f"step {metrics['step']:07d}/{max_steps:07d}", *(means or ["no finite loss"])]
    if "entropy" in metrics:
        parts.append(f"entropy {np.mean(metrics['entropy']):.3f}")
    if "expert_spread" in metrics:
        parts.append(f"spread {metrics['expert_spread']:.4f}")
    if metrics["bad_steps"]:
        parts.append(counted(metrics["bad_steps"], "non-finite step"))
    remaining = (max_steps - metrics["step"]) * batch_size / metrics["images_per_s"] + pause_s
    parts += [
        f"lr {metrics['lr']:.2e}",
        f"{metrics['images_per_s']:,.0f} images/s",
        f"MFU {metrics['mfu']:.2f}",
        f"{metrics['memory_gib']:.1f} GiB",
        f"{timedelta(seconds=round(remaining))} left",
    ]
    return "  ".join(parts)


def explain_failure(nonfinite: NonFiniteSteps, sampler: BatchSampler, experts: Experts) -> str:
    """Return a description of the non-finite steps that ended the run."""
    t = sampler.timesteps(int(nonfinite.step))
    owners = experts.owners(t.tolist())
    who = f"experts {sorted(set(owners))}, " if owners else ""
    return (
        f"{counted(int(nonfinite.longest_streak), 'step')} in a row had a loss or gradient that is not finite; "
        f"the last, step {nonfinite.step:.0f}: {who}{sampler.process.scale.describe(t)}, "
        f"loss {nonfinite.loss}, gradient norm {nonfinite.norm}. These steps did not change the weights. The run ends. "
        "--resume repeats these steps. To change a setting, start a new run from a checkpoint with --load-weight"
    )


@dataclass(frozen=True)
class HeldOutErrors:
    """Measures the error of a model's prediction at some times: the squared error of the noise, or the loss of a flow.

    Each time uses `per_time` of the images, in turn, and noise that depends only on the seed and the time, see
    `Process.seed_numbers`. Therefore two models are evaluated on the same noisy images.

    Attributes:
        process: the process that adds the noise.
        x: images [n, C, H, W], usually held out from training.
        y: labels [n], int64.
        per_time: images per time.
        seed: seed of the noise.
    """

    process: Process
    x: Tensor
    y: Tensor
    per_time: int = 32
    seed: int = 0

    @torch.no_grad()
    def __call__(self, model, times: Iterable[float], times_per_batch: int = 1) -> Tensor:
        """Return the error at each time, float32 [number of times].

        Args:
            model: a network called as model(x, t, y). By default every batch has one time, so it may be a folded
                RemixDiT.
            times: timesteps, or times of a flow.
            times_per_batch: times that the model processes at once.
        """
        x, y, errors = self.x, self.y, []
        for chunk in torch.as_tensor(list(times)).split(times_per_batch):
            numbers = self.process.seed_numbers(chunk)
            rows = (torch.arange(self.per_time) + numbers[:, None] * self.per_time).flatten() % len(x)
            generators = (torch.Generator().manual_seed(seed_for(self.seed, number)) for number in numbers.tolist())
            noise = torch.cat([torch.randn(self.per_time, *x.shape[1:], generator=g) for g in generators]).to(x.device)
            ts = chunk.to(self.process.scale.dtype).repeat_interleave(self.per_time).to(x.device)
            error = self.process.held_out_errors(model, x[rows], ts, y[rows], noise)
            errors.append(error.reshape(len(chunk), -1).mean(1))
        return torch.cat(errors)
