"""Samplers by name: DDPM, DDIM, and solvers of the probability-flow ODE from the diffusers library."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .gaussian import GaussianDiffusion, create_diffusion

# Name of each solver: its class in diffusers, and the arguments of the class.
SOLVERS = {
    # DPM-Solver++ (2M), arXiv 2211.01095
    "dpmpp": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),
    # UniPC, arXiv 2302.04867
    "unipc": ("UniPCMultistepScheduler", dict(solver_order=2)),
    # Euler, arXiv 2206.00364, algorithm 2 without added noise
    "euler": ("EulerDiscreteScheduler", {}),
}
SAMPLERS = ("ddpm", "ddim", *SOLVERS)

# Sampler and number of steps for previews. studies/README.md, "Samplers", compares the samplers.
QUICK = ("dpmpp", "20")


def make_sampler(name: str, steps: str, **options) -> tuple[Callable[..., Tensor], list[int]]:
    """Build a sampler.

    Args:
        name: one of `SAMPLERS`.
        steps: for "ddpm" and "ddim" the `timestep_respacing` of `create_diffusion`, for a solver the number of steps.
        **options: the other arguments of `create_diffusion`.

    Returns:
        A function with the arguments of `GaussianDiffusion.p_sample_loop`, and the timesteps for which it calls the
        model, in this order.

    Raises:
        ValueError: if the steps or options are invalid.
    """
    if name not in SOLVERS:
        diffusion = create_diffusion(steps, **options)
        loop = diffusion.ddim_sample_loop if name == "ddim" else diffusion.p_sample_loop
        return loop, [int(t) for t in reversed(diffusion.timestep_map)]
    diffusion = create_diffusion(**options)
    if not steps.isdecimal() or not 1 <= int(steps) < diffusion.num_timesteps:
        limit = diffusion.num_timesteps - 1
        raise ValueError(f"{name} takes a whole number of steps from 1 to {limit}, but got {steps!r}")
    solver = ODESolver(name, diffusion, int(steps))
    return solver.sample_loop, solver.timesteps


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
    """A solver of the probability-flow ODE of a diffusion process.

    Args:
        name: one of `SOLVERS`.
        diffusion: the process, not respaced.
        steps: number of steps, from 1 to T - 1.
    """

    def __init__(self, name: str, diffusion: GaussianDiffusion, steps: int):
        self.name = name
        self.diffusion = diffusion
        self.steps = steps
        self.timesteps = [int(t) for t in self._scheduler().timesteps]

    def _scheduler(self):
        """Build a scheduler for one sampling run: a scheduler keeps the state of the run."""
        return make_scheduler(self.name, self.diffusion.betas, self.steps)

    @torch.no_grad()
    def sample_loop(
        self,
        model,
        shape,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device=None,
        progress: bool = False,
        step_noise=None,
    ) -> Tensor:
        """Draw samples of `shape` by solving the ODE.

        The arguments are those of `GaussianDiffusion.p_sample_loop`. The solvers are deterministic, so `step_noise` is
        not called, and a learned variance is not used.
        """
        scheduler = self._scheduler()
        x = (torch.randn(*shape, device=device) if noise is None else noise) * scheduler.init_noise_sigma
        for timestep in tqdm(scheduler.timesteps, desc="sampling", leave=False, disable=not progress):
            t = torch.full((shape[0],), int(timestep), device=x.device, dtype=torch.long)  # [B]
            # Euler's x grows with the noise level. The input of the model is scaled to unit variance.
            model_input = scheduler.scale_model_input(x, timestep)
            out = self.diffusion.p_mean_variance(model, model_input, t, clip_denoised, model_kwargs)
            x = scheduler.step(out["pred_xstart"], timestep, x).prev_sample
        return x
