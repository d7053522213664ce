"""Gaussian diffusion and flow matching: schedules, paths, losses and samplers, written from the equations."""

from .flow import FlowMatching
from .gaussian import GaussianDiffusion, create_diffusion
from .schedules import beta_schedule, respace, space_timesteps
from .solvers import QUICK, SAMPLERS, SOLVERS, make_sampler

# The counterpart of create_diffusion: a flow is built from its arguments alone.
create_flow = FlowMatching

__all__ = [
    "QUICK",
    "SAMPLERS",
    "SOLVERS",
    "FlowMatching",
    "GaussianDiffusion",
    "beta_schedule",
    "create_diffusion",
    "create_flow",
    "make_sampler",
    "respace",
    "space_timesteps",
]
