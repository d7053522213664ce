"""Flow matching with stochastic interpolants: SiT's losses and samplers (Ma et al., arXiv 2401.08740).

A path mixes data x_1 and noise eps to x_t = alpha x_1 + sigma eps. The time t is the number that the network sees:
t = 1 is data and t = 0 is noise. Users set and read noise levels u = 1 - t instead.
"""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .interpolants import DIFFUSION_FORMS, PATHS, TIME_SAMPLINGS, TimeDistribution, shift_noise_levels
from .intervals import FLOW_LEVELS, TIMESTEPS
from .process import Process
from .samplers import MARGIN, Dopri5, FixedSteps, as_denoiser, drop_variance

PREDICTIONS = ("velocity", "noise", "score")
WEIGHTS = ("none", "velocity", "likelihood")
# The arguments of `FlowMatching`. train_fast.py has a flag for each.
FLOW_OPTIONS = ("path", "prediction", "weight", "time_sampling", "time_mean", "time_std", "shift", "time_max")
LAST_STEPS = ("none", "mean", "euler", "tweedie")


class FlowMatching(Process):
    """Losses and samplers of one stochastic interpolant. Names are matched without regard to case.

    Args:
        path: "linear", "GVP" or "VP".
        prediction: what the network predicts: "velocity" (alpha' x_1 + sigma' eps), "noise" (eps) or "score".
        weight: the loss weight of a noise or score prediction: "none", "velocity" (that of the velocity's error) or
            "likelihood".
        time_sampling: the distribution of training noise levels, "uniform" or "logit-normal" (arXiv 2403.03206).
        time_mean: mean of logit(u) of logit-normal noise levels.
        time_std: standard deviation of logit(u) of logit-normal noise levels.
        shift: s > 0 moves noise levels u to s u / (1 + (s - 1) u), in training and in sampling (arXiv 2403.03206,
            eq. 23).
        time_max: highest noise level of training, before the shift; RAE (arXiv 2510.11690) trains up to 0.999.

    Raises:
        ValueError: if a name is unknown, a number is out of range, or a weight is given for a velocity prediction.
    """

    name = "flow"
    title = "flow matching"
    loss_names = ("loss",)
    samplers: ClassVar = {
        "euler": lambda flow, steps, **options: flow.ode_steps("euler", steps, **options),
        "heun": lambda flow, steps, **options: flow.ode_steps("heun", steps, **options),
        "dopri5": lambda flow, steps, boundaries=(): Dopri5(flow, boundaries),
        "sde": lambda flow, steps, **options: flow.sde_steps(steps=steps, **options),
    }
    # On handwritten digits, Heun's method in 10 steps was within 1 % of its best FID (one model).
    quick = ("heun", "10")
    scale = FLOW_LEVELS

    def __init__(
        self,
        path: str = "linear",
        prediction: str = "velocity",
        weight: str = "none",
        time_sampling: str = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        *,
        shift: float = 1.0,
        time_max: float = 1.0,
    ):
        self.path = _choose("path", path, PATHS)
        self.prediction = _choose("prediction", prediction, PREDICTIONS)
        self.weight = _choose("weight", weight, WEIGHTS)
        if self.prediction == "velocity" and self.weight != "none":
            raise ValueError(
                f"weight {self.weight} needs a noise or score prediction; a velocity prediction takes none"
            )
        if not math.isfinite(time_mean):
            raise ValueError(f"time_mean must be a finite number, not {time_mean}")
        for name, value in (("time_std", time_std), ("shift", shift)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value}")
        if not 0 < time_max <= 1:
            raise ValueError(f"time_max must be above 0 and at most 1, not {time_max}")
        time_sampling = _choose("time sampling", time_sampling, TIME_SAMPLINGS)
        self.times = TimeDistribution(time_sampling, float(time_mean), float(time_std), float(shift))
        self.time_max = float(time_max)

    @property
    def config(self) -> dict:
        """The keyword arguments that build this object."""
        times = dict(time_sampling=self.times.sampling, time_mean=self.times.mean, time_std=self.times.std)
        times |= dict(shift=self.times.shift)
        # Left out at its default, so that runs of earlier versions resume.
        times |= dict(time_max=self.time_max) if self.time_max < 1 else {}
        return dict(path=self.path, prediction=self.prediction, weight=self.weight, **times)

    def sampler_settings(self, name: str) -> dict:
        settings = {} if name == "dopri5" else super().sampler_settings(name) | {"time_shift": None}
        if name == "sde":
            settings |= {"diffusion_form": "sigma", "last_step": "mean", "last_step_size": 0.04}
        elif name != "dopri5":
            settings |= {"last_level": None}
        return settings

    def interval(self, training: bool = False, last_step_size: float = 0.0) -> tuple[float, float]:
        """Return the times (t0, t1) that training or sampling uses. They are SiT's and avoid divisions by zero.

        Args:
            training: return the interval of training instead of sampling.
            last_step_size: the part of the time that the SDE's last step covers.
        """
        if self.path == "VP":
            t0, t1 = 0.0, 1 - (1e-5 if training else 1e-3)
        elif self.prediction == "velocity":
            t0, t1 = 0.0, 1.0
        else:
            t0, t1 = 1e-3, 1 - 1e-3
        if training and self.time_max < 1:
            t0 = max(t0, 1 - float(shift_noise_levels(self.time_max, self.times.shift)))
        return t0, 1 - last_step_size if last_step_size else t1

    def quantiles(self, n: int) -> list[float]:
        """Return the n + 1 noise levels, from 0 to 1, that bound n intervals of equal probability.

        Raises:
            ValueError: if n is below 1.
        """
        if n < 1:
            raise ValueError(f"the number of intervals must be at least 1, not {n}")
        if self.time_max == 1:
            return self.times.quantile(np.arange(n + 1) / n).tolist()
        highest = shift_noise_levels(self.time_max, self.times.shift)
        return [*self.times.quantile(np.arange(n) / n * self.times.cdf(highest)).tolist(), 1.0]

    def expert_boundaries(self, n: int) -> list[float]:
        # Rounded, so that other versions of SciPy give the same.
        levels = [round(level, 9) for level in self.quantiles(n)]
        self.quantile_times(np.zeros(n), np.array(levels[:-1]), np.array(levels[1:]))
        return levels

    def sample_times(self, generator: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return self.quantile_times(generator.random(len(low)), low, high)

    def quantile_times(
        self, uniform: np.ndarray, low: np.ndarray | float = 0.0, high: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Turn uniform random numbers into training times, by the inverse of the distribution function.

        Args:
            uniform: random numbers from 0 to 1, [B].
            low: noise levels, [B] or one number. The distribution is restricted to the interval [low, high).
            high: noise levels, [B] or one number.

        Returns:
            The times that the network sees, float32 [B].

        Raises:
            ValueError: if an interval contains no training times, or is too narrow for float32.
        """
        t0, t1 = self.interval(training=True)
        low, high = np.maximum(low, 1 - t1), np.minimum(high, 1 - t0)
        start, end = self.times.cdf(low), self.times.cdf(high)
        if not np.all((start < end) & (high - low > 4 * MARGIN)):
            limits = f"between {1 - t1:g} and {1 - t0:g}"
            raise ValueError(f"an interval of noise levels contains no training times; they are drawn {limits}")
        u = self.times.quantile(start + (end - start) * np.asarray(uniform, dtype=np.float64))
        return (1 - np.clip(u, low + MARGIN, high - MARGIN)).astype(np.float32)

    def seed_numbers(self, times: Tensor) -> Tensor:
        # In thousandths, so that a flow and Gaussian diffusion have the same noise at corresponding levels.
        return (TIMESTEPS * (1 - times)).round().long()

    def held_out_errors(self, model, x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return the training losses [B]. See `Process.held_out_errors`."""
        return self.training_losses(model, x, t, {"y": y}, noise)["loss"]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mix data x_start [B, ...] with noise at times t [B]: x_t = alpha x_1 + sigma eps (SiT, eq. 1)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        path = PATHS[self.path](t)
        return _expand(path.alpha, x_start) * x_start + _expand(path.sigma, x_start) * noise

    def velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the velocity of data x_start [B, ...] and noise at times t [B]: alpha' x_1 + sigma' eps."""
        path = PATHS[self.path](t)
        return _expand(path.d_alpha, x_start) * x_start + _expand(path.d_sigma, x_start) * noise

    def training_losses(
        self, model, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the training loss of each sample (SiT, section 2).

        Args:
            model: model(x_t, t, **model_kwargs) returns C channels, or 2C channels whose second half is dropped.
            x_start: data, [B, C, H, W].
            t: times, [B].
            model_kwargs: further arguments of the model.
            noise: the noise, like x_start. Default: drawn here.

        Returns:
            A dictionary with `loss`, [B].
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        out = drop_variance(model(x_t, t, **(model_kwargs or {})), x_t)
        path = PATHS[self.path](t)
        if self.prediction == "velocity":
            error = out - self.velocity(x_start, t, noise)
        elif self.prediction == "noise":
            error = out - noise
        else:  # the score is -eps / sigma
            error = _expand(path.sigma, out) * out + noise
        loss = error.square().flatten(1).mean(1)
        if self.weight == "velocity":
            loss = loss * (path.spread / path.alpha).square()
        elif self.weight == "likelihood":
            loss = loss * path.spread / (path.alpha * path.sigma)
        return {"loss": loss}

    def velocity_and_noise(self, t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the velocity and the noise at times t [n], each a pair (a, b) [n] of the sum a x + b output."""
        path = PATHS[self.path](t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        if self.prediction == "velocity":
            # eps = (alpha' x - alpha v) / (alpha' sigma - alpha sigma')
            return (zero, one), (path.d_alpha / path.spread, -path.alpha / path.spread)
        eps = one if self.prediction == "noise" else -path.sigma
        # v = alpha' / alpha x - (alpha' sigma - alpha sigma') / alpha eps
        return (path.d_alpha / path.alpha, -path.spread / path.alpha * eps), (zero, eps)

    def _grid(self, t0: float, t1: float, n: int, shift: float | None = None, last_level: float = 0.0) -> Tensor:
        """Return n + 1 times from t0 to t1, float64 rounded to float32: an even grid of noise levels, shifted.

        Args:
            t0, t1: the first and the last time.
            n: number of steps.
            shift: see `ode_steps`.
            last_level: see `ode_steps`. The last time is that of this level if it comes before t1.

        Raises:
            ValueError: if the shift or the last level is out of range.
        """
        shift = self.times.shift if shift is None else shift
        if not 0 < shift < math.inf:
            raise ValueError(f"the shift must be a positive number, not {shift}")
        start, end = shift_noise_levels(np.array([1 - t0, 1 - t1]), 1 / shift)
        if not 0 <= last_level < start:
            raise ValueError(f"the last noise level must be at least 0 and below {start:g}, not {last_level}")
        times = 1 - shift_noise_levels(np.linspace(start, max(end, last_level), n + 1), shift)
        times[0] = t0
        if last_level <= end:
            times[-1] = t1
        return torch.from_numpy(times.astype(np.float32)).double()

    def ode_steps(
        self, method: str = "euler", steps: int | str = 250, shift: float | None = None, last_level: float = 0.0
    ) -> FixedSteps:
        """Prepare the steps of `ode_sample_loop` for the methods "euler" and "heun".

        Args:
            method: "euler" or "heun".
            steps: number of steps.
            shift: shift of the noise levels of the steps. None for that of training.
            last_level: noise level before the shift at which the steps end. The result is the sample at this level.

        Raises:
            ValueError: if a name is unknown, or a number is out of range.
        """
        method = _choose("method", method, ("euler", "heun"))
        times = self._grid(*self.interval(), _check_steps(steps, least=1), shift, last_level)
        velocity, _ = self.velocity_and_noise(times)
        return FixedSteps(method, times.tolist(), _pairs(velocity), noise=[], last=None)

    def sde_steps(
        self,
        method: str = "euler",
        steps: int | str = 250,
        form: str = "sigma",
        last_step: str = "mean",
        last_step_size: float = 0.04,
        shift: float | None = None,
    ) -> FixedSteps:
        """Prepare the steps of `sde_sample_loop`, which explains the arguments; for `shift` see `ode_steps`.

        Raises:
            ValueError: see `sde_sample_loop`; or if the method, the form or the path divides by zero at one of the
                times.
        """
        method = _choose("method", method, ("euler", "heun"))
        form = _choose("diffusion form", form, DIFFUSION_FORMS)
        last_step = _choose("last step", last_step, LAST_STEPS)
        has_last = last_step != "none"
        if has_last and not 0 < last_step_size < 1 - self.interval()[0]:
            raise ValueError(f"last_step_size must be between 0 and {1 - self.interval()[0]:g}, not {last_step_size}")
        n = _check_steps(steps, least=1 + has_last) - has_last
        times = self._grid(*self.interval(last_step_size=last_step_size if has_last else 0.0), n, shift)
        path = PATHS[self.path](times)
        if has_last and path.sigma[-1] == 0:
            raise ValueError(f"last_step_size {last_step_size} is too small for float32")
        if form == "SBDM" and path.alpha[0] == 0:
            raise ValueError(
                f"diffusion form SBDM divides by zero at t = 0, where velocities of the {self.path} path start: "
                "choose another form, such as sigma"
            )
        if method == "heun" and path.sigma[-1] == 0:
            raise ValueError("method heun divides by zero at t = 1: choose a last step, or method euler")

        # The drift is v + D score, and the score is -eps / sigma.
        velocity, noise = self.velocity_and_noise(times)
        diffusion = DIFFUSION_FORMS[form](times, path)
        drift = tuple(v - diffusion / path.sigma * eps for v, eps in zip(velocity, noise, strict=True))
        if last_step == "tweedie":
            # E[x_1 | x_t] = (x - sigma eps) / alpha
            last = (1 - path.sigma * noise[0]) / path.alpha, -path.sigma * noise[1] / path.alpha
        else:
            slope = velocity if last_step == "euler" else drift
            last = 1 + last_step_size * slope[0], last_step_size * slope[1]
        stds = (2 * diffusion[:-1] * times.diff()).sqrt()
        return FixedSteps(method, times.tolist(), _pairs(drift), stds.tolist(), _pairs(last)[-1] if has_last else None)

    def ode_sample_loop(
        self,
        model,
        shape,
        noise: Tensor | None = None,
        method: str = "euler",
        steps: int = 250,
        model_kwargs: dict | None = None,
        *,
        device=None,
        progress: bool = False,
        step_noise: Callable[[int], Tensor] | None = None,
        boundaries: Iterable[float] = (),
    ) -> Tensor:
        """Draw samples by the probability-flow ODE dx = v dt (SiT, eq. 2).

        Args:
            model: as in `training_losses`.
            shape: shape of the samples, (B, C, H, W).
            noise: the noise at the start, of that shape. Default: drawn here.
            method: "euler", "heun" (two network evaluations per step) or "dopri5" (adaptive steps, common to the batch,
                with atol 1e-6 and rtol 1e-3).
            steps: number of steps of euler and heun.
            model_kwargs: further arguments of the model.
            device: device of the noise that is drawn here.
            progress: whether to show a progress bar.
            step_noise: not called. It is accepted so that both loops take the same arguments.
            boundaries: noise levels at which dopri5 restarts, the boundaries between experts. Other methods ignore it.

        Returns:
            The samples, of `shape`.

        Raises:
            ValueError: if a name is unknown, or the number of steps is wrong.
        """
        method = _choose("method", method, ("euler", "heun", "dopri5"))
        sampler = Dopri5(self, boundaries) if method == "dopri5" else self.ode_steps(method, steps)
        x = torch.randn(*shape, device=device) if noise is None else noise
        return sampler(as_denoiser(model, model_kwargs), x, progress=progress)

    def sde_sample_loop(
        self,
        model,
        shape,
        noise: Tensor | None = None,
        method: str = "euler",
        steps: int = 250,
        model_kwargs: dict | None = None,
        *,
        device=None,
        progress: bool = False,
        form: str = "sigma",
        last_step: str = "mean",
        last_step_size: float = 0.04,
        step_noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Draw samples by the SDE dx = (v + D score) dt + sqrt(2 D) dW (SiT, section 2).

        Args:
            model, shape, noise, model_kwargs, device, progress: as in `ode_sample_loop`.
            method: "euler" (Euler-Maruyama) or "heun" (each step adds its noise, then takes Heun's step of the drift).
            steps: number of steps, the last step included.
            form: the diffusion coefficient D: "constant", "SBDM", "sigma", "linear", "decreasing" or
                "increasing-decreasing".
            last_step: a step without noise to t = 1: "mean" (along the drift), "euler" (along the velocity), "tweedie"
                (the expected data), or "none".
            last_step_size: the part of the time that the last step covers.
            step_noise: step_noise(i) returns the i-th step's standard normal noise. Default: drawn here.

        Returns:
            The samples, of `shape`.

        Raises:
            ValueError: if a name is unknown, a number is out of range, or the drift is infinite at a time that is used.
        """
        sampler = self.sde_steps(method, steps, form, last_step, last_step_size)
        x = torch.randn(*shape, device=device) if noise is None else noise
        return sampler(as_denoiser(model, model_kwargs), x, step_noise=step_noise, progress=progress)


def _expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Return a coefficient [B] in the dtype of `like` [B, ...], shaped to broadcast over it."""
    return coefficient.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _pairs(coefficients: tuple[Tensor, Tensor]) -> list[tuple[float, float]]:
    """Return two tensors [n] as a list of n pairs."""
    return list(zip(*(row.tolist() for row in coefficients), strict=True))


def _check_steps(steps: int | str, least: int) -> int:
    """Return the number of steps. Raises ValueError unless it is a whole number or its digits, and at least `least`."""
    steps = int(steps) if str(steps).isdecimal() else steps
    if not isinstance(steps, int) or steps < least:
        raise ValueError(f"the number of steps must be a whole number and at least {least}, not {steps!r}")
    return steps


def _choose(what: str, name: str, choices: Iterable[str]) -> str:
    """Return the choice with this name. Raises ValueError if there is none."""
    known = {choice.lower(): choice for choice in choices}
    if str(name).lower() not in known:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known.values())}")
    return known[str(name).lower()]
