"""Gaussian diffusion: noise schedules, training losses, respacing and samplers."""

from .gaussian import GaussianDiffusion, create_diffusion
from .schedules import beta_schedule, respace, space_timesteps
from .solvers import QUICK, SAMPLERS, SOLVERS, make_sampler

__all__ = [
    "QUICK",
    "SAMPLERS",
    "SOLVERS",
    "GaussianDiffusion",
    "beta_schedule",
    "create_diffusion",
    "make_sampler",
    "respace",
    "space_timesteps",
]
