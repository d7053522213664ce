"""Gaussian diffusion: schedules, forward process, losses, respacing and samplers, written from the equations."""

from .gaussian import GaussianDiffusion
from .schedules import beta_schedule, respace, space_timesteps

__all__ = ["GaussianDiffusion", "beta_schedule", "create_diffusion", "respace", "space_timesteps"]


def create_diffusion(
    timestep_respacing: str | list[int] | None = "",
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """Build the diffusion process; the arguments and their meanings are facebookresearch/DiT's.

    timestep_respacing: "" for every step, "250" for that many evenly spaced ones, "ddim50" for DDIM's fixed stride,
    "10,15,20" for that many in each of equally long sections. Raises ValueError for an unknown schedule or spacing.
    """
    betas = beta_schedule(noise_schedule, diffusion_steps)
    timesteps = space_timesteps(diffusion_steps, timestep_respacing or [diffusion_steps])
    return GaussianDiffusion(
        respace(betas, timesteps),
        timestep_map=timesteps,
        predict_xstart=predict_xstart,
        variance="learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        loss="kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
    )
