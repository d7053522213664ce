"""Interpolation paths between noise and data, the SDE's diffusion coefficients, and the distribution of training times.

The time t is SiT's (arXiv 2401.08740): t = 1 is data and t = 0 is noise. Noise levels are u = 1 - t.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TIME_SAMPLINGS = ("uniform", "logit-normal")


class PathValues(NamedTuple):
    """A path's coefficients and their derivatives in t, each with t's shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def spread(self) -> Tensor:
        """alpha' sigma - alpha sigma', which converts between velocity and noise."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


def linear_path(t: Tensor) -> PathValues:
    """Return the straight line between noise and data."""
    return PathValues(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


def gvp_path(t: Tensor) -> PathValues:
    """Return the generalized variance-preserving path: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""
    alpha = torch.sin(math.pi / 2 * t)
    # The cosine, in a form that is exact near t = 1.
    sigma = torch.sin(math.pi / 2 * (1 - t))
    return PathValues(alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha)


def vp_path(t: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> PathValues:
    """Return the path of the variance-preserving diffusion (arXiv 2011.13456, appendix C) with time reversed."""
    u = 1 - t
    log_alpha = -u.square() * (beta_max - beta_min) / 4 - u * beta_min / 2
    d_log_alpha = u * (beta_max - beta_min) / 2 + beta_min / 2
    alpha = log_alpha.exp()
    # sqrt(1 - alpha^2), in a form without cancellation near t = 1.
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    return PathValues(alpha, sigma, alpha * d_log_alpha, -alpha.square() * d_log_alpha / sigma)


PATHS = {"linear": linear_path, "GVP": gvp_path, "VP": vp_path}

# Diffusion coefficients D of the SDE dx = (v + D score) dt + sqrt(2 D) dW, from the times and the path's values. The
# distribution of x_t is the same for each of them; the errors of a network and of a solver are not (SiT, section 2).
DIFFUSION_FORMS = {
    "constant": lambda t, path: torch.ones_like(t),
    "SBDM": lambda t, path: path.sigma * path.spread / path.alpha,
    "sigma": lambda t, path: path.sigma,
    "linear": lambda t, path: 1 - t,
    "decreasing": lambda t, path: (torch.cos(math.pi * t) + 1).square() / 4,
    "increasing-decreasing": lambda t, path: torch.sin(math.pi * t).square(),
}


def shift_noise_levels(u: np.ndarray, shift: float) -> np.ndarray:
    """Shift noise levels u to s u / (1 + (s - 1) u) (arXiv 2403.03206, eq. 23). A shift of 1 / s is the inverse."""
    # In this form 0 and 1 are exact fixed points.
    return shift * u / (shift * u + (1 - u))


def dimension_shift(shape: Iterable[int]) -> float:
    """Return RAE's shift of the noise levels of latents, sqrt(C H W / 4096), for their shape (arXiv 2510.11690)."""
    return math.sqrt(math.prod(shape) / 4096)


class TimeDistribution(NamedTuple):
    """The distribution of training noise levels, over 0 to 1.

    Attributes:
        sampling: "uniform" or "logit-normal" (arXiv 2403.03206, section 3.1).
        mean: mean of logit(u) before the shift, for logit-normal noise levels u.
        std: standard deviation of logit(u), likewise.
        shift: see `shift_noise_levels`.
    """

    sampling: str
    mean: float
    std: float
    shift: float

    def cdf(self, u: np.ndarray) -> np.ndarray:
        """Return the probability of a noise level below u."""
        u = shift_noise_levels(np.asarray(u, dtype=np.float64), 1 / self.shift)
        if self.sampling == "uniform":
            return u
        # Only runs with logit-normal times pay for this import.
        from scipy.special import logit, ndtr

        return ndtr((logit(u) - self.mean) / self.std)

    def quantile(self, p: np.ndarray) -> np.ndarray:
        """Return the noise levels of probabilities: the inverse of `cdf`."""
        p = np.asarray(p, dtype=np.float64)
        if self.sampling == "uniform":
            return shift_noise_levels(p, self.shift)
        from scipy.special import expit, ndtri

        return shift_noise_levels(expit(self.mean + self.std * ndtri(p)), self.shift)
