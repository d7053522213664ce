"""Gaussian diffusion and flow matching: schedules, paths, losses and samplers, written from the equations."""

from .flow import FLOW_SAMPLERS, FlowMatching
from .gaussian import GaussianDiffusion, create_diffusion
from .schedules import beta_schedule, respace, space_timesteps
from .solvers import (
    NOISE_LEVELS,
    PROCESS_SAMPLERS,
    QUICK,
    SAMPLERS,
    SOLVERS,
    create_process,
    make_sampler,
    process_name,
)

# The counterpart of create_diffusion: a flow is built from its arguments alone.
create_flow = FlowMatching

__all__ = [
    "FLOW_SAMPLERS",
    "NOISE_LEVELS",
    "PROCESS_SAMPLERS",
    "QUICK",
    "SAMPLERS",
    "SOLVERS",
    "FlowMatching",
    "GaussianDiffusion",
    "beta_schedule",
    "create_diffusion",
    "create_flow",
    "create_process",
    "make_sampler",
    "process_name",
    "respace",
    "space_timesteps",
]
