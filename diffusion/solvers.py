"""The samplers by name: DDPM and DDIM from diffusion/, and diffusers' solvers of the probability-flow ODE."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import GaussianDiffusion, create_diffusion

SOLVERS = {  # name: diffusers' class, and how it is set up
    "dpmpp": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),  # arXiv 2211.01095
    "unipc": ("UniPCMultistepScheduler", dict(solver_order=2)),  # arXiv 2302.04867
    "euler": ("EulerDiscreteScheduler", {}),  # arXiv 2206.00364, algorithm 2 without churn
}
SAMPLERS = ("ddpm", "ddim", *SOLVERS)
QUICK = ("dpmpp", "20")  # sampler and steps for a quick look: studies/README.md, "Samplers"


def make_sampler(name: str, steps: str, **options) -> tuple[Callable[..., Tensor], list[int]]:
    """A sampling loop, with `GaussianDiffusion.p_sample_loop`'s arguments, and the timesteps that it asks the model for.

    steps: for "ddpm" and "ddim" what `create_diffusion` takes; for a solver a whole number. options: the process,
    `create_diffusion`'s other arguments. Raises ValueError for steps that cannot be.
    """
    if name not in SOLVERS:
        diffusion = create_diffusion(steps, **options)
        loop = diffusion.ddim_sample_loop if name == "ddim" else diffusion.p_sample_loop
        return loop, [int(t) for t in reversed(diffusion.timestep_map)]
    diffusion = create_diffusion(**options)
    if not steps.isdecimal() or not 1 <= int(steps) < diffusion.num_timesteps:
        raise ValueError(f"{name} takes a whole number of steps, 1 to {diffusion.num_timesteps - 1}")
    timesteps = make_scheduler(name, diffusion.betas, int(steps)).timesteps
    return partial(solve, name, diffusion, int(steps)), [int(t) for t in timesteps]


def make_scheduler(name: str, betas: np.ndarray, steps: int):
    """diffusers' scheduler for a solver, which takes predictions of x_0, ready for its first step.

    Its timesteps are whole numbers from the process's last down to about T / steps, evenly spaced, and the last step leads
    to x_0: the model is asked for no timestep that it was not trained on, and each has one expert.
    """
    import diffusers  # seconds to import, and the other samplers never need it

    kind, settings = SOLVERS[name]
    process = dict(num_train_timesteps=len(betas), trained_betas=betas.tolist(), timestep_spacing="linspace")
    scheduler = getattr(diffusers, kind)(**process, **settings, prediction_type="sample")
    if name == "euler":  # whose own would be fractions
        scheduler.set_timesteps(timesteps=np.linspace(0, len(betas) - 1, steps + 1).round()[:0:-1].tolist())
    else:
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()
def solve(
    name: str,
    diffusion: GaussianDiffusion,
    n_steps: int,
    model,
    shape,
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    model_kwargs: dict | None = None,
    device=None,
    progress: bool = False,
    step_noise=None,
) -> Tensor:
    """Solve the probability-flow ODE of an unspaced `diffusion` in `n_steps`, starting from `noise`.

    The arguments after n_steps are `p_sample_loop`'s. Solvers draw nothing on their way: step_noise is not called, and
    a learned variance is not used.
    """
    scheduler = make_scheduler(name, diffusion.betas, n_steps)
    x = (torch.randn(*shape, device=device) if noise is None else noise) * scheduler.init_noise_sigma
    for timestep in tqdm(scheduler.timesteps, desc="sampling", leave=False, disable=not progress):
        t = torch.full((shape[0],), int(timestep), device=x.device, dtype=torch.long)
        seen = scheduler.scale_model_input(x, timestep)  # Euler's x grows with the noise, the model's has unit variance
        x_start = diffusion.p_mean_variance(model, seen, t, clip_denoised, model_kwargs)["pred_xstart"]
        x = scheduler.step(x_start, timestep, x).prev_sample
    return x
