"""Gaussian diffusion and flow matching: schedules, paths, losses and samplers, written from the equations."""

from .flow import FlowMatching
from .gaussian import GaussianDiffusion, create_diffusion
from .process import Process
from .samplers import as_denoiser
from .schedules import beta_schedule, respace, space_timesteps

# The counterpart of create_diffusion: a flow is built from its arguments alone.
create_flow = FlowMatching

# The processes by name. A new one is added here.
PROCESSES = {process.name: process for process in (GaussianDiffusion, FlowMatching)}


def create_process(process: str = GaussianDiffusion.name, **options) -> Process:
    """Build the process that a checkpoint's config specifies.

    Args:
        process: a key of `PROCESSES`.
        **options: the arguments of `create_diffusion` or of `FlowMatching`.

    Raises:
        ValueError: if the process is unknown or its options are invalid.
    """
    if process not in PROCESSES:
        raise ValueError(f"unknown process {process!r}: choose from {', '.join(PROCESSES)}")
    return PROCESSES[process].create(**options)


__all__ = [
    "PROCESSES",
    "FlowMatching",
    "GaussianDiffusion",
    "Process",
    "as_denoiser",
    "beta_schedule",
    "create_diffusion",
    "create_flow",
    "create_process",
    "respace",
    "space_timesteps",
]
