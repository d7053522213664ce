"""Statistics of a run: running sums of the losses and of non-finite steps, and held-out errors of the predicted noise."""

import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from distributed import World, seed_for

PARTS = ("loss", "mse", "vb", "prior")  # of the loss, as they are logged


class TrainingStats:
    """Sums over the steps since the last log line, and what is known of bad ones: on the device until they are read."""

    def __init__(self, world: World):
        self.world = world
        self.sums = torch.zeros(len(PARTS) + 1, device=world.device)  # the parts of the loss, and the steps that count
        # Bad steps in all, in a row, in the longest row; and of the last one of that: step, loss, gradient norm.
        self.bad = torch.zeros(6, device=world.device)
        self.copy, self.copied = None, None

    def add(self, step: int, parts: Tensor, norm: Tensor, bad: Tensor):
        """Count a step's losses (of this process's rows), or, if it is bad, the step alone."""
        values = torch.cat([parts.nan_to_num(0, 0, 0), torch.ones_like(parts[:1])])
        self.sums += values * ~bad / self.world.size
        total, row, longest, *last = self.bad.unbind()
        row = (row + 1) * bad
        known = torch.stack([torch.full_like(norm, step), parts[0] / self.world.size, norm])
        last = known.where(bad & (row >= longest), torch.stack(last))
        self.bad = torch.cat([torch.stack([total + bad, row, longest.maximum(row)]), last])

    def longest_streak(self) -> int:
        """The most bad steps in a row, as far as the host can know without waiting for the device."""
        if self.world.device.type == "cpu":
            return int(self.bad[2])
        known = 0
        if self.copied is not None and self.copied.query():
            known, self.copied = int(self.copy[2]), None
        if self.copied is None:
            self.copy = torch.empty(self.bad.shape, pin_memory=True).copy_(self.bad, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        return known

    def state(self) -> dict:
        """For a checkpoint; every process takes part, and goes on from what it would load."""
        bad = self.bad.clone()
        bad[4] = self.world.sum(bad[4].clone())
        state = {"sums": self.world.sum(self.sums), "bad": bad}
        self.load(state)
        return state

    def load(self, state: dict):
        self.sums = state["sums"].to(self.world.device) / self.world.size
        self.bad = state["bad"].to(self.world.device, copy=True)
        self.bad[4] /= self.world.size

    def read(self) -> tuple[dict, list[float]]:
        """The mean of each part since the last reading, and what is known of bad steps. The host waits for the device."""
        *sums, steps = self.world.sum(self.sums.clone()).tolist()
        self.sums.zero_()
        means = {name: value / steps if steps else None for name, value in zip(PARTS, sums, strict=True)}
        bad = self.bad.clone()
        bad[4] = self.world.sum(bad[4].clone())
        return means, bad.tolist()


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
