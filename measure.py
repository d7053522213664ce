"""How well a model denoises, by itself and apart from sampling."""

import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from distributed import seed_for


@torch.no_grad()
def noise_errors(
    model, diffusion: GaussianDiffusion, x: Tensor, y: Tensor, timesteps, per_timestep: int = 32, seed: int = 0
) -> Tensor:
    """Mean squared error of the predicted noise at each of `timesteps`, float32 [len(timesteps)].

    x [n, C, H, W] and y [n] are images that the model should be judged on; at each timestep `per_timestep` of them, in
    turn, meet noise that depends on (seed, timestep) alone: two models, or two runs of one, are asked the same questions.
    All of a batch shares its timestep, so model(x, t, y) may be a folded one.
    """
    errors = []
    for t in timesteps:
        rows = (torch.arange(per_timestep) + int(t) * per_timestep) % len(x)
        noise = torch.randn(x[rows].shape, generator=torch.Generator().manual_seed(seed_for(seed, int(t)))).to(x.device)
        ts = torch.full((per_timestep,), int(t), device=x.device)
        noisy = diffusion.q_sample(x[rows], ts, noise)
        errors.append((model(noisy, ts, y[rows])[:, : x.shape[1]] - noise).square().mean())
    return torch.stack(errors)
