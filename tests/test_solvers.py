import numpy as np
import pytest
import torch

from checkpoint import load_model
from diffusion import create_diffusion
from diffusion.solvers import SAMPLERS, SOLVERS, make_sampler, make_scheduler
from remix import FoldedRemixDiT

ALPHA_BAR = torch.from_numpy(create_diffusion().alphas_cumprod)
MEAN, DEVIATION = 0.4, 0.5  # of the data, which is Gaussian: its noise is known, and where its ODE leads, too


def known_noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The exact noise prediction for such data, beside a variance that means nothing."""
    assert t.dtype == torch.long, "the network is trained on whole timesteps"
    bar = ALPHA_BAR[t].view(-1, 1, 1, 1)
    noise = (1 - bar).sqrt() * (x - bar.sqrt() * MEAN) / (bar * DEVIATION**2 + 1 - bar)
    return torch.cat([noise, torch.full_like(noise, 1e3)], dim=1)


def known_end(noise: torch.Tensor) -> torch.Tensor:
    """Where the ODE leads: the place within the distribution, in standard deviations, never changes."""
    bar = ALPHA_BAR[-1]
    return MEAN + DEVIATION * (noise - bar.sqrt() * MEAN) / (bar * DEVIATION**2 + 1 - bar).sqrt()


def error(name: str, steps: int) -> float:
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loop, timesteps = make_sampler(name, str(steps))
    assert len(timesteps) == steps
    x = loop(known_noise, noise.shape, noise=noise, clip_denoised=False)
    return (x - known_end(noise)).abs().max().item()


@pytest.mark.parametrize("name", [*SOLVERS, "ddim"])
def test_a_known_ode_is_solved(name):
    errors = [error(name, steps) for steps in (10, 50, 250)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (0.05 if name in ("euler", "ddim") else 0.005)


def test_second_order_solvers_need_fewer_steps():
    assert max(error("dpmpp", 20), error("unipc", 20)) < error("ddim", 20) / 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_right_distribution(name):
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(2)
    loop, _ = make_sampler(name, "200", learn_sigma=False)
    x = loop(
        lambda x, t: known_noise(x, t)[:, :1],
        noise.shape,
        noise=noise,
        clip_denoised=False,
        step_noise=lambda i: torch.randn(noise.shape, generator=draws),
    )
    assert x.mean() == pytest.approx(MEAN, abs=0.02)
    assert x.std() == pytest.approx(DEVIATION, abs=0.02)


@pytest.mark.parametrize("name", SOLVERS)
def test_timesteps_are_whole_and_spaced_evenly(name):
    for steps in (1, 10, 61, 103, 250, 999):
        timesteps = make_scheduler(name, create_diffusion().betas, steps).timesteps.double().numpy()
        assert (len(timesteps), timesteps[0]) == (steps, 999)
        assert np.array_equal(timesteps, timesteps.round())
        gaps = -np.diff(np.append(timesteps, 0))
        assert gaps.min() >= 1
        assert np.ptp(gaps) <= 1
    for wrong in ("0", "1000", "ddim50", "10,15,20", "2.5", ""):
        with pytest.raises(ValueError, match="whole number of steps"):
            make_sampler(name, wrong)


@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_stay_within_the_pixels_range(name):
    def far_off(x, t):
        return torch.cat([-10 * torch.ones_like(x), x], dim=1)

    loop, _ = make_sampler(name, "10")
    noise = torch.randn(2, 1, 4, 4)
    assert loop(far_off, noise.shape, noise=noise, clip_denoised=True).abs().max() <= 1 + 1e-5
    assert loop(far_off, noise.shape, noise=noise, clip_denoised=False).abs().max() > 2


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", ["10", "33"])
def test_each_timestep_is_denoised_by_its_own_expert(ckpt, name, steps, monkeypatch):
    folded = FoldedRemixDiT(load_model(ckpt)[0])
    seen = []
    select = folded.select
    monkeypatch.setattr(folded, "select", lambda i: seen.append(i) or select(i))
    asked = []

    def denoise(x, t):
        asked.append(int(t[0]))
        return folded(x, t, torch.zeros_like(t))

    loop, timesteps = make_sampler(name, steps)
    loop(denoise, (2, 3, 8, 8), noise=torch.randn(2, 3, 8, 8), step_noise=lambda i: torch.zeros(2, 3, 8, 8))
    n, bounds = folded.remix.n_experts, [i * 1000 // folded.remix.n_experts for i in range(folded.remix.n_experts + 1)]
    assert asked == timesteps  # what was promised
    assert len(seen) == len(asked)
    assert set(seen) == set(range(n))
    assert all(bounds[i] <= t < bounds[i + 1] for i, t in zip(seen, asked, strict=True))
