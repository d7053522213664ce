"""Samplers by name: DDPM, DDIM, solvers of the probability-flow ODE from the diffusers library, and those of flows."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .flow import FLOW_SAMPLERS, FlowMatching
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

# What sample_ddp.py can do with each process. The first sampler is the default.
PROCESS_SAMPLERS = {"gaussian": SAMPLERS, "flow": FLOW_SAMPLERS}
# Sampler and number of steps for previews. studies/README.md, "Samplers" and "Flow matching", compares the samplers.
QUICK = {"gaussian": ("dpmpp", "20"), "flow": ("heun", "10")}
# Lowest and highest noise level: the timestep t of Gaussian diffusion, and 1 - t of a flow's time t.
NOISE_LEVELS = {"gaussian": [0, 1000], "flow": [0, 1]}


def create_process(process: str = "gaussian", **options) -> GaussianDiffusion | FlowMatching:
    """Build the process that a checkpoint's config specifies.

    Args:
        process: "gaussian" or "flow".
        **options: the arguments of `create_diffusion` or of `FlowMatching`.

    Raises:
        ValueError: if the process is unknown or its options are invalid.
    """
    if process not in PROCESS_SAMPLERS:
        raise ValueError(f"unknown process {process!r}: choose from {', '.join(PROCESS_SAMPLERS)}")
    return FlowMatching(**options) if process == "flow" else create_diffusion(**options)


def process_name(options: dict) -> str:
    """Return "gaussian" or "flow" for keyword arguments of `create_process`, such as a config's "diffusion" part."""
    return options.get("process", "gaussian")


def make_sampler(
    name: str, steps: str, process: str = "gaussian", solver: dict | None = None, **options
) -> tuple[Callable[..., Tensor], list[int] | list[float] | None]:
    """Build a sampler.

    Args:
        name: a sampler of the process, see `PROCESS_SAMPLERS`.
        steps: for "ddpm" and "ddim" the `timestep_respacing` of `create_diffusion`, otherwise the number of steps.
        process: "gaussian" or "flow".
        solver: the options of `FlowMatching.make_sampler`. Gaussian diffusion has none.
        **options: the other arguments of `create_diffusion`, or those of `FlowMatching`.

    Returns:
        A function with the arguments of `GaussianDiffusion.p_sample_loop`, and the timesteps or times for which it
        calls the model, in this order. Flows ignore `clip_denoised`. The times of "dopri5" are None, because it chooses
        them while it runs.

    Raises:
        ValueError: if the process does not have this sampler, or if the steps or options are invalid.
    """
    if process == "flow":
        loop, times = FlowMatching(**options).make_sampler(name, steps, **(solver or {}))

        def sample_loop(model, shape, *, clip_denoised: bool = False, **arguments) -> Tensor:
            return loop(model, shape, **arguments)

        return sample_loop, times
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r} of Gaussian diffusion: choose from {', '.join(SAMPLERS)}")
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
