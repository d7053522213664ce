"""How well a model denoises, by itself and apart from sampling; and how fast a machine can be at best."""

import time

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion import GaussianDiffusion
from distributed import PRECISIONS, seed_for
from models import DiT


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


def training_flops(config: dict) -> int:
    """FLOPs of a training step of a DiT(**config), per image: those of the matrix products, forward and twice that backward.

    A RemixDiT's are counted as its backbone's: mixing is not what it is for.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        dit = DiT(**config).eval()
        x = torch.empty(1, dit.in_channels, config["input_size"], config["input_size"])
        dit(x, torch.empty(1), torch.empty(1, dtype=torch.long))
    return 3 * counter.get_total_flops()


def matmul_rate(device: torch.device, precision: str, times: int = 3) -> float:
    """FLOP/s of a large matrix product in "fp32" (TF32 where that is on), "fp64", "bf16" or "fp16": the best of `times`."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(torch.float64 if precision == "fp64" else PRECISIONS[precision])
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
