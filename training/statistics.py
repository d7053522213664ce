"""Statistics of a run: running sums of the losses, non-finite steps, throughput, the report line, held-out errors."""

import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion import NOISE_LEVELS, FlowMatching, GaussianDiffusion
from diffusion.intervals import find_interval
from models import DiT
from remix import RemixDiT
from runtime.command_line import counted
from runtime.processes import World, seed_for
from training.batches import BatchSampler

# The parts of the loss of Gaussian diffusion, in the order of the tensors that hold them. "loss" is "mse", weighted
# if the run has a loss weight, plus "vb".
LOSSES = ("loss", "mse", "vb", "prior")


class NonFiniteSteps(NamedTuple):
    """What is known about the steps whose loss or gradient was not finite.

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

    def __init__(self, world: World, names: tuple[str, ...] = LOSSES):
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
        flops_per_image: FLOPs of a training step per image, from `dry_run.training_flops`.
        peak_flops_per_s: FLOP/s of a large matrix product on all devices together, from `dry_run.matmul_rate`.

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


def build_metrics(
    step: int,
    losses: dict[str, float | None],
    nonfinite: NonFiniteSteps,
    model: DiT | RemixDiT,
    schedule: dict[str, float],
    performance: dict[str, float],
) -> dict:
    """Return everything that is reported for a step, under its name in metrics.jsonl.

    Args:
        step: number of steps done.
        losses: mean losses since the last report, from `TrainingStats.read`.
        nonfinite: non-finite steps so far, from `TrainingStats.read`.
        model: the model in training.
        schedule: values that change during the run: "lr", "coeff_lr" and "prior_weight".
        performance: "images_per_s", "mfu" and "memory_gib", from `ThroughputTimer.read`.
    """
    metrics = {"step": step, **losses, "bad_steps": int(nonfinite.count), **schedule, **performance}
    if isinstance(model, RemixDiT):
        return metrics | mixing_metrics(model)
    # A plain DiT has no mixing logits and no prior.
    return {name: value for name, value in metrics.items() if name not in ("prior", "coeff_lr", "prior_weight")}


@torch.no_grad()
def mixing_metrics(model: RemixDiT) -> dict:
    """Return numbers that show how the experts mix the bases, and whether they have become equal.

    Returns:
        A dict of nested lists and numbers:
        "coefficients": alpha [N, K], or [depth, N, K] if the scope is local.
        "entropy": entropy of each expert's coefficients [N], in nats; 0 is one-hot.
        "basis_distances": relative distances between the bases [K, K]; all 0 if the bases are equal.
        "expert_spread": relative distance of the experts from their mean; 0 if the experts are equal.
    """
    alpha = model.coefficients()
    entropy = -(alpha * alpha.clamp(min=1e-12).log()).sum(-1)
    basis_distances, expert_spread = model.distances()
    return {
        "coefficients": alpha.tolist(),
        "entropy": entropy.view(-1, model.n_experts).mean(0).tolist(),
        "basis_distances": basis_distances.tolist(),
        "expert_spread": expert_spread.item(),
    }


def memory_gib(device: torch.device) -> float:
    """Return the largest memory that this process has used so far, of the GPU or else of the host, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # macOS reports bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def report_line(metrics: dict, max_steps: int, batch_size: int, pause_s: float = 0) -> str:
    """Return the line of log.txt for the metrics of a step.

    Args:
        metrics: metrics from `build_metrics`.
        max_steps: number of steps of the run.
        batch_size: images per global batch.
        pause_s: seconds that the remaining pictures and scores will take.
    """
    means = [f"{name} {metrics[name]:.4f}" for name in ("loss", "mse") if metrics.get(name) is not None]
    parts = [f"step {metrics['step']:07d}/{max_steps:07d}", *(means or ["no finite loss"])]
    if "entropy" in metrics:
        parts += [f"entropy {np.mean(metrics['entropy']):.3f}", f"spread {metrics['expert_spread']:.4f}"]
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


def explain_failure(nonfinite: NonFiniteSteps, sampler: BatchSampler, model: DiT | RemixDiT) -> str:
    """Return a description of the non-finite steps that ended the run."""
    t = sampler.timesteps(int(nonfinite.step))
    times = (
        f"noise levels {1 - t.max():.4f} to {1 - t.min():.4f}" if sampler.flow else f"timesteps {t.min()} to {t.max()}"
    )
    experts = ""
    if isinstance(model, RemixDiT):
        experts = f"experts {sorted(set(model.expert_index(torch.from_numpy(t)).tolist()))}, "
    return (
        f"{counted(int(nonfinite.longest_streak), 'step')} in a row had a loss or gradient that is not finite; "
        f"the last, step {nonfinite.step:.0f}: {experts}{times}, "
        f"loss {nonfinite.loss}, gradient norm {nonfinite.norm}. These steps did not change the weights. The run ends. "
        "--resume repeats these steps. To change a setting, start a new run from a checkpoint with --load-weight"
    )


def interval_times(intervals: list[tuple[float, float]], per_interval: int, flow: bool) -> np.ndarray:
    """Return evenly spaced timesteps, or a flow's times, in each of N intervals of noise levels [N, per_interval].

    Args:
        intervals: lowest and highest noise level of each, as in `figures.intervals`.
        per_interval: number of times in each.
        flow: whether the noise levels are those of a flow.
    """
    if flow:
        parts = (np.arange(per_interval) + 0.5) / per_interval
        return np.stack([1 - (low + (high - low) * parts) for low, high in intervals])
    return np.stack([np.linspace(low, high - 1, per_interval).round().astype(int) for low, high in intervals])


def grid_times(count: int, process: str, interval: list[float] | None = None) -> np.ndarray:
    """Return a fixed grid of timesteps, or of a flow's times, at which all models are measured.

    The noise levels are the midpoints of `count` equal parts of the whole range. They do not depend on the model.

    Args:
        count: number of parts.
        process: name of the process, as in `diffusion.process_name`.
        interval: lowest and highest noise level of an expert that is measured alone; None for the whole range.

    Returns:
        Timesteps [n], int64, or times [n], float64, in increasing noise. Those in the interval, or the middle of the
        interval if there are none.
    """
    is_flow, (_, last) = process == "flow", NOISE_LEVELS[process]
    levels = (np.arange(count) + 0.5) * last / count
    if not is_flow:
        levels = levels.astype(np.int64)
    if interval is not None:
        low, high = interval
        # The rule by which a RemixDiT's experts own noise levels.
        inside = [find_interval([0, low, high, last], level) == 1 for level in levels.astype(np.float32)]
        middle = (low + high) / 2 if is_flow else (math.ceil(low) + math.ceil(high) - 1) // 2
        levels = levels[inside] if any(inside) else np.array([middle])
    return 1 - levels if is_flow else levels


@torch.no_grad()
def noise_errors(
    model,
    diffusion: GaussianDiffusion | FlowMatching,
    x: Tensor,
    y: Tensor,
    timesteps: Iterable[float],
    per_timestep: int = 32,
    seed: int = 0,
    timesteps_per_batch: int = 1,
) -> Tensor:
    """Compute the mean squared error of the predicted noise at each of some timesteps.

    Each timestep uses `per_timestep` of the images, in turn, and noise that depends only on (seed, timestep). Therefore
    two models are evaluated on the same noisy images. For a flow the error is the training loss, and the noise depends
    on the noise level in thousandths.

    Args:
        model: a network called as model(x, t, y). By default every batch has one timestep, so it may be a folded
            RemixDiT.
        diffusion: the process that adds the noise.
        x: images [n, C, H, W], usually held out from training.
        y: labels [n], int64.
        timesteps: timesteps, or times of a flow, to evaluate.
        per_timestep: images per timestep.
        seed: seed of the noise.
        timesteps_per_batch: timesteps that the model processes at once.

    Returns:
        Errors [number of timesteps], float32.
    """
    errors = []
    is_flow = isinstance(diffusion, FlowMatching)
    for chunk in torch.as_tensor(list(timesteps)).split(timesteps_per_batch):
        numbers = (1000 * (1 - chunk)).round().long() if is_flow else chunk.long()
        rows = (torch.arange(per_timestep) + numbers[:, None] * per_timestep).flatten() % len(x)
        generators = (torch.Generator().manual_seed(seed_for(seed, number)) for number in numbers.tolist())
        noise = torch.cat([torch.randn(per_timestep, *x.shape[1:], generator=g) for g in generators]).to(x.device)
        ts = (chunk.float() if is_flow else numbers).repeat_interleave(per_timestep).to(x.device)
        if is_flow:
            error = diffusion.training_losses(model, x[rows], ts, {"y": y[rows]}, noise)["loss"]
        else:
            noisy = diffusion.q_sample(x[rows], ts, noise)
            error = (model(noisy, ts, y[rows])[:, : x.shape[1]] - noise).square()
        errors.append(error.view(len(chunk), -1).mean(1))
    return torch.cat(errors)
