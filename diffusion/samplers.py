"""Samplers: functions of a denoiser and of times that are chosen beforehand.

A denoiser is a function denoise(x, time) -> output for noisy samples x [B, C, ...]. `time` is one number for the whole
batch, in host memory: a timestep of the original process or a flow's time. It selects experts and guidance scales
without waiting for the device.
"""

import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .intervals import ROUNDING

if TYPE_CHECKING:
    from .flow import FlowMatching
    from .gaussian import GaussianDiffusion

Denoiser = Callable[[Tensor, float], Tensor]
# Times of a flow keep this distance from the boundaries between experts, so that rounding to float32 does not move them
# across. It is twice the distance by which `intervals.inner_boundaries` lowers the boundaries of float32 levels.
MARGIN = 2 * ROUNDING

# Name of each solver of the diffusers library: its class, and the arguments of the class.
SOLVERS = {
    # DPM-Solver++ (2M), arXiv 2211.01095
    "dpmpp": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),
    # UniPC, arXiv 2302.04867
    "unipc": ("UniPCMultistepScheduler", dict(solver_order=2)),
    # Euler, arXiv 2206.00364, algorithm 2 without added noise
    "euler": ("EulerDiscreteScheduler", {}),
}


class Sampler(Protocol):
    """A sampler whose steps are chosen.

    Attributes:
        evaluations: number of calls of the denoiser; None if the sampler chooses it while it runs.
    """

    evaluations: int | None

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        clip_denoised: bool = True,
        step_noise: Callable[[int], Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples.

        Args:
            denoise: the denoiser.
            x: standard normal noise to start from, [B, C, ...].
            clip_denoised: clip the predicted x_0 to [-1, 1]. Flows ignore it.
            step_noise: step_noise(i) returns the noise of the i-th step, like x, if the sampler adds any. Drawn by
                default.
            progress: show a progress bar.

        Returns:
            The samples, like x.
        """


def time_tensor(x: Tensor, time: float) -> Tensor:
    """Return the times [B] that a network sees for a batch x [B, ...]: int64, or for flows of x's precision."""
    dtype = torch.long if isinstance(time, numbers.Integral) else torch.promote_types(x.dtype, torch.float32)
    return torch.full((len(x),), time, device=x.device, dtype=dtype)


def as_denoiser(model, model_kwargs: dict | None = None) -> Denoiser:
    """Return the denoiser of a network, which is called as model(x, t, **model_kwargs) with a tensor t [B]."""
    return lambda x, time: model(x, time_tensor(x, time), **(model_kwargs or {}))


def as_network(denoise: Denoiser, time: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a denoiser at one time as a function of x and a tensor t, which it ignores."""
    return lambda x, t: denoise(x, time)


def drop_variance(out: Tensor, x: Tensor) -> Tensor:
    """Return a flow network's output at x [B, C, ...], in x's dtype, without the second half of 2C channels.

    Raises:
        ValueError: if the output has neither C nor 2C channels.
    """
    channels = x.shape[1]
    if out.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"the model must return {channels} or {2 * channels} channels, it returns {out.shape[1]}")
    return out.to(x.dtype)[:, :channels]


@dataclass(frozen=True)
class Ancestral:
    """DDPM or DDIM: a step from x_t to x_{t-1} for every step t of a process, which is respaced to few timesteps.

    Attributes:
        process: the process.
        step: its method `p_sample` or `ddim_sample`.
        noisy: whether the steps add noise.
    """

    process: "GaussianDiffusion"
    step: Callable[..., dict[str, Tensor]]
    noisy: bool

    @property
    def evaluations(self) -> int:
        return self.process.num_timesteps

    @torch.no_grad()
    def __call__(
        self, denoise: Denoiser, x: Tensor, clip_denoised: bool = True, step_noise=None, progress: bool = False
    ) -> Tensor:
        last = self.evaluations - 1
        for i in tqdm(range(last + 1), desc="sampling", leave=False, disable=not progress):
            t = torch.full((len(x),), last - i, device=x.device)  # [B]
            network = as_network(denoise, self.process.timestep_map[last - i])
            noise = step_noise(i) if step_noise is not None and self.noisy and i < last else None
            x = self.step(network, x, t, clip_denoised=clip_denoised, noise=noise)["sample"]
        return x


def ddpm(process: "GaussianDiffusion", steps: str) -> Ancestral:
    """Make DDPM's sampler (arXiv 2006.11239, algorithm 2) on the timesteps that `GaussianDiffusion.respaced` keeps."""
    process = process.respaced(steps)
    return Ancestral(process, process.p_sample, noisy=True)


def ddim(process: "GaussianDiffusion", steps: str) -> Ancestral:
    """Make DDIM's sampler without noise (arXiv 2010.02502) on the timesteps that `GaussianDiffusion.respaced` keeps."""
    process = process.respaced(steps)
    return Ancestral(process, process.ddim_sample, noisy=False)


def make_scheduler(name: str, betas: np.ndarray, steps: int):
    """Build the diffusers scheduler of a solver, ready for its first step.

    Its timesteps are integers, evenly spaced from T - 1 to about T / steps, and its last step leads to x_0. The model
    is therefore called only for timesteps that it was trained on, each of which belongs to one expert.

    Args:
        name: one of `SOLVERS`.
        betas: variances of the process, float64 [T].
        steps: number of steps, from 1 to T - 1.

    Returns:
        A scheduler that takes predictions of x_0.
    """
    # Importing diffusers takes seconds, and the other samplers do not need it.
    import diffusers

    class_name, settings = SOLVERS[name]
    process = dict(num_train_timesteps=len(betas), trained_betas=betas.tolist(), timestep_spacing="linspace")
    scheduler = getattr(diffusers, class_name)(**process, **settings, prediction_type="sample")
    if name == "euler":
        # The timesteps that this scheduler chooses itself are not integers.
        scheduler.set_timesteps(timesteps=np.linspace(0, len(betas) - 1, steps + 1).round()[:0:-1].tolist())
    else:
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


class ODESolver:
    """A solver of the probability-flow ODE of a diffusion process. It is deterministic and uses no learned variance.

    Args:
        name: one of `SOLVERS`.
        process: the process, not respaced.
        steps: number of steps in digits, from 1 to T - 1.

    Raises:
        ValueError: if the number of steps is wrong.
    """

    def __init__(self, name: str, process: "GaussianDiffusion", steps: str):
        if not steps.isdecimal() or not 1 <= int(steps) < process.num_timesteps:
            limit = process.num_timesteps - 1
            raise ValueError(f"{name} takes a whole number of steps from 1 to {limit}, but got {steps!r}")
        self.name = name
        self.process = process
        self.evaluations = int(steps)

    @torch.no_grad()
    def __call__(
        self, denoise: Denoiser, x: Tensor, clip_denoised: bool = True, step_noise=None, progress: bool = False
    ) -> Tensor:
        # A scheduler keeps the state of one sampling run.
        scheduler = make_scheduler(self.name, self.process.betas, self.evaluations)
        x = x * scheduler.init_noise_sigma
        for timestep in tqdm(scheduler.timesteps, desc="sampling", leave=False, disable=not progress):
            step = int(timestep)
            t = torch.full((len(x),), step, device=x.device)  # [B]
            network = as_network(denoise, self.process.timestep_map[step])
            # Euler's x grows with the noise level. The input of the model is scaled to unit variance.
            model_input = scheduler.scale_model_input(x, timestep)
            out = self.process.p_mean_variance(network, model_input, t, clip_denoised)
            x = scheduler.step(out["pred_xstart"], timestep, x).prev_sample
        return x


@dataclass(frozen=True)
class FixedSteps:
    """A sampler of flows with fixed steps, as numbers on the host, so that no step waits for the device.

    Attributes:
        method: "euler" or "heun". With noise, a step of heun adds its noise, then takes Heun's step of the drift.
        times: the n + 1 grid points, increasing.
        drift: one pair (a, b) per grid point; the drift is a x + b output.
        noise: the standard deviations of the n steps' noise; empty for an ODE.
        last: the pair (a, b) of the SDE's last step, which gives the result a x + b output at the last grid point; None
            if there is no such step.
    """

    method: str
    times: list[float]
    drift: list[tuple[float, float]]
    noise: list[float]
    last: tuple[float, float] | None

    @property
    def evaluations(self) -> int:
        return (len(self.times) - 1) * (2 if self.method == "heun" else 1) + (self.last is not None)

    @torch.no_grad()
    def __call__(
        self, denoise: Denoiser, x: Tensor, clip_denoised: bool = True, step_noise=None, progress: bool = False
    ) -> Tensor:
        def evaluate(x: Tensor, i: int, pair: tuple[float, float]) -> Tensor:
            return pair[0] * x + pair[1] * drop_variance(denoise(x, self.times[i]), x)

        n = len(self.times) - 1
        for i in tqdm(range(n), desc="sampling", leave=False, disable=not progress):
            h = self.times[i + 1] - self.times[i]
            draw = 0.0
            if self.noise:
                draw = self.noise[i] * (torch.randn_like(x) if step_noise is None else step_noise(i))
            if self.method == "euler":
                x = x + h * evaluate(x, i, self.drift[i]) + draw
            else:
                x = x + draw
                slope = evaluate(x, i, self.drift[i])
                x = x + h / 2 * (slope + evaluate(x + h * slope, i + 1, self.drift[i + 1]))
        return x if self.last is None else evaluate(x, n, self.last)


@dataclass(frozen=True)
class Dopri5:
    """The adaptive solver dopri5 of a flow's ODE, with atol 1e-6 and rtol 1e-3 and steps that are common to the batch.

    It chooses its times on the device, and the host waits for each of them.

    Attributes:
        process: the flow.
        boundaries: noise levels at which it restarts, so that no step uses two experts or two guidance scales.
    """

    process: "FlowMatching"
    boundaries: Iterable[float] = ()

    evaluations = None

    @torch.no_grad()
    def __call__(
        self, denoise: Denoiser, x: Tensor, clip_denoised: bool = True, step_noise=None, progress: bool = False
    ) -> Tensor:
        from torchdiffeq import odeint  # not needed by any other sampler

        def velocity(first: float, last: float, t: Tensor, x: Tensor) -> Tensor:
            t = t.clamp(first, last)
            (a, b), _ = self.process.velocity_and_noise(t)
            return a * x + b * drop_variance(denoise(x, t.item()), x)

        t0, t1 = self.process.interval()
        inner = []
        for time in sorted({1 - level for level in self.boundaries}):
            # Boundaries that nearly coincide count as one.
            if (inner or [t0])[-1] + 2 * MARGIN < time < t1 - 2 * MARGIN:
                inner.append(time)
        points = list(pairwise([t0, *inner, t1]))
        for start, end in tqdm(points, desc="sampling", leave=False, disable=not progress):
            # The network sees no time outside this interval, which belongs to one expert.
            first = start + MARGIN if start in inner else start
            last = end - MARGIN if end in inner else end
            times = torch.tensor([start, end], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
            settings = dict(method="dopri5", atol=1e-6, rtol=1e-3, options={"step_t": times[1:]})
            x = odeint(partial(velocity, first, last), x, times, **settings)[-1]
        return x
