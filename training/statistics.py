"""Statistics of a run: running sums of the losses, non-finite steps, throughput, the report line, held-out errors."""

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

from common import counted
from diffusion import GaussianDiffusion
from distributed import World, seed_for
from models import DiT
from remix import RemixDiT
from training.batches import BatchSampler

# The parts of the loss of Gaussian diffusion, in the order of the tensors that hold them. "loss" is "mse" plus "vb".
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

    count: float | Tensor
    streak: float | Tensor
    longest_streak: float | Tensor
    step: float | Tensor
    loss: float | Tensor
    norm: float | Tensor


class TrainingStats:
    """Sums of the losses since the last report, and the non-finite steps so far.

    Both stay on the device until they are read, so that counting a step does not make the host wait.

    Args:
        world: this process's place among all processes.
        names: names of the losses.
    """

    def __init__(self, world: World, names: tuple[str, ...] = LOSSES):
        self.world = world
        self.names = names
        # One sum per part of the loss, and the number of steps that were added.
        self.sums = torch.zeros(len(names) + 1, device=world.device)
        # The fields of NonFiniteSteps as one tensor. Its loss is this process's share.
        self.nonfinite = torch.zeros(len(NonFiniteSteps._fields), device=world.device)
        self.host_copy = None
        self.copied = None

    def add(self, step: int, losses: Tensor, norm: Tensor, nonfinite: Tensor):
        """Count a step. Its losses are added to the sums only if the step is finite.

        Args:
            step: the training step, from 0.
            losses: mean losses over this process's rows, in the order of `names`.
            norm: gradient norm [].
            nonfinite: whether the loss or the gradient is not finite on any process [], bool.
        """
        values = torch.cat([losses.nan_to_num(0, 0, 0), torch.ones_like(losses[:1])])
        self.sums += values * ~nonfinite / self.world.size

        before = NonFiniteSteps(*self.nonfinite.unbind())
        streak = (before.streak + 1) * nonfinite
        replace = nonfinite & (streak >= before.longest_streak)
        now = NonFiniteSteps(
            count=before.count + nonfinite,
            streak=streak,
            longest_streak=before.longest_streak.maximum(streak),
            step=torch.full_like(norm, step).where(replace, before.step),
            loss=(losses[0] / self.world.size).where(replace, before.loss),
            norm=norm.where(replace, before.norm),
        )
        self.nonfinite = torch.stack(now)

    def longest_streak(self) -> int:
        """Return the largest number of consecutive non-finite steps, without waiting for the device.

        On a GPU the result is that of the latest copy that has arrived on the host, or 0 if none has arrived since the
        last call.
        """
        if self.world.device.type == "cpu":
            return int(NonFiniteSteps(*self.nonfinite).longest_streak)
        known = 0
        if self.copied is not None and self.copied.query():
            known = int(NonFiniteSteps(*self.host_copy).longest_streak)
            self.copied = None
        if self.copied is None:
            self.host_copy = torch.empty(self.nonfinite.shape, pin_memory=True).copy_(self.nonfinite, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        return known

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of all processes together, for a checkpoint.

        Every process must call this. Each process then continues from its share of the state, as it would after loading
        the checkpoint, so that a resumed run stays equal to an uninterrupted one.
        """
        state = {"sums": self.world.sum(self.sums), "bad": self._sum_nonfinite()}
        self.load_state_dict(state)
        return state

    def load_state_dict(self, state: dict[str, Tensor]):
        """Continue from a state of all processes, of which each process takes an equal share."""
        self.sums = state["sums"].to(self.world.device) / self.world.size
        values = NonFiniteSteps(*state["bad"].to(self.world.device))
        self.nonfinite = torch.stack(values._replace(loss=values.loss / self.world.size))

    def read(self) -> tuple[dict[str, float | None], NonFiniteSteps]:
        """Return the mean losses since the last call, and the non-finite steps so far.

        Every process must call this. The host waits for the device.

        Returns:
            A dict from each name in `names` to the mean over the finite steps, or to None if there was no finite step;
            and the non-finite steps of all processes.
        """
        *sums, steps = self.world.sum(self.sums.clone()).tolist()
        self.sums.zero_()
        means = {name: value / steps if steps else None for name, value in zip(self.names, sums, strict=True)}
        return means, NonFiniteSteps(*self._sum_nonfinite().tolist())

    def _sum_nonfinite(self) -> Tensor:
        """Return the fields of NonFiniteSteps with the loss summed over the processes."""
        values = NonFiniteSteps(*self.nonfinite.unbind())
        return torch.stack(values._replace(loss=self.world.sum(values.loss.clone())))


class ThroughputTimer:
    """Measures the speed of training. The time of pauses, such as writing a checkpoint, does not count.

    Args:
        device: the device that trains.
        flops_per_image: FLOPs of a training step per image, from `plan.training_flops`.
        peak_flops_per_s: FLOP/s of a large matrix product on all devices together, from `plan.matmul_rate`.

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


def report_line(metrics: dict, max_steps: int, batch_size: int, pictures_s: float = 0) -> str:
    """Return the line of log.txt for the metrics of a step.

    Args:
        metrics: metrics from `build_metrics`.
        max_steps: number of steps of the run.
        batch_size: images per global batch.
        pictures_s: seconds that the remaining pictures will take.
    """
    means = [f"{name} {metrics[name]:.4f}" for name in ("loss", "mse") if metrics.get(name) is not None]
    parts = [f"step {metrics['step']:07d}/{max_steps:07d}", *(means or ["no finite loss"])]
    if "entropy" in metrics:
        parts += [f"entropy {np.mean(metrics['entropy']):.3f}", f"spread {metrics['expert_spread']:.4f}"]
    if metrics["bad_steps"]:
        parts.append(counted(metrics["bad_steps"], "non-finite step"))
    remaining = (max_steps - metrics["step"]) * batch_size / metrics["images_per_s"] + pictures_s
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


@torch.no_grad()
def noise_errors(
    model,
    diffusion: GaussianDiffusion,
    x: Tensor,
    y: Tensor,
    timesteps: Iterable[int],
    per_timestep: int = 32,
    seed: int = 0,
    timesteps_per_batch: int = 1,
) -> Tensor:
    """Compute the mean squared error of the predicted noise at each of some timesteps.

    Each timestep uses `per_timestep` of the images, in turn, and noise that depends only on (seed, timestep). Therefore
    two models are evaluated on the same noisy images.

    Args:
        model: a network called as model(x, t, y). By default every batch has one timestep, so it may be a folded
            RemixDiT.
        diffusion: the process that adds the noise.
        x: images [n, C, H, W], usually held out from training.
        y: labels [n], int64.
        timesteps: timesteps to evaluate.
        per_timestep: images per timestep.
        seed: seed of the noise.
        timesteps_per_batch: timesteps that the model processes at once.

    Returns:
        Errors [number of timesteps], float32.
    """
    errors = []
    for ts in torch.tensor([int(t) for t in timesteps]).split(timesteps_per_batch):
        rows = (torch.arange(per_timestep) + ts[:, None] * per_timestep).flatten() % len(x)
        generators = (torch.Generator().manual_seed(seed_for(seed, t)) for t in ts.tolist())
        noise = torch.cat([torch.randn(per_timestep, *x.shape[1:], generator=g) for g in generators]).to(x.device)
        ts = ts.repeat_interleave(per_timestep).to(x.device)
        noisy = diffusion.q_sample(x[rows], ts, noise)
        squares = (model(noisy, ts, y[rows])[:, : x.shape[1]] - noise).square()
        errors.append(squares.view(len(ts) // per_timestep, -1).mean(1))
    return torch.cat(errors)
