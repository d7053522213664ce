import numpy as np
import pytest
import torch

from checkpoint import load_model
from diffusion import SAMPLERS, SOLVERS, create_diffusion, make_sampler
from diffusion.solvers import make_scheduler
from sampling.experts import FoldedRemix

ALPHA_BAR = torch.from_numpy(create_diffusion().alphas_cumprod)

# Mean and standard deviation of the data. The data are Gaussian, so the best noise prediction and the solution of the
# ODE are known.
MEAN, STD = 0.4, 0.5


def exact_noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the exact noise prediction, followed by an arbitrary output in place of the variance."""
    assert t.dtype == torch.long, "timesteps must be integers"
    bar = ALPHA_BAR[t].view(-1, 1, 1, 1)
    noise = (1 - bar).sqrt() * (x - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar)
    return torch.cat([noise, torch.full_like(noise, 1e3)], dim=1)


def exact_sample(noise: torch.Tensor) -> torch.Tensor:
    """Return the solution of the ODE: a sample keeps its distance from the mean, in standard deviations."""
    bar = ALPHA_BAR[-1]
    return MEAN + STD * (noise - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar).sqrt()


def error(name: str, steps: int) -> float:
    """Return the largest error of a sampler, compared with the solution of the ODE."""
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loop, timesteps = make_sampler(name, str(steps))
    assert len(timesteps) == steps
    x = loop(exact_noise, noise.shape, noise=noise, clip_denoised=False)
    return (x - exact_sample(noise)).abs().max().item()


@pytest.mark.parametrize("name", [*SOLVERS, "ddim"])
def test_samplers_converge_to_the_solution_of_the_ode(name):
    errors = [error(name, steps) for steps in (10, 50, 250)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (0.05 if name in ("euler", "ddim") else 0.005)


def test_second_order_solvers_need_fewer_steps():
    assert max(error("dpmpp", 20), error("unipc", 20)) < error("ddim", 20) / 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_distribution_of_the_data(name):
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    loop, _ = make_sampler(name, "200", learn_sigma=False)
    x = loop(
        lambda x, t: exact_noise(x, t)[:, :1],
        noise.shape,
        noise=noise,
        clip_denoised=False,
        step_noise=lambda i: torch.randn(noise.shape, generator=generator),
    )
    assert x.mean() == pytest.approx(MEAN, abs=0.02)
    assert x.std() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("name", SOLVERS)
def test_timesteps_are_integers_and_evenly_spaced(name):
    for steps in (1, 10, 61, 103, 250, 999):
        timesteps = make_scheduler(name, create_diffusion().betas, steps).timesteps.double().numpy()
        assert (len(timesteps), timesteps[0]) == (steps, 999)
        assert np.array_equal(timesteps, timesteps.round())
        gaps = -np.diff(np.append(timesteps, 0))
        assert gaps.min() >= 1
        assert np.ptp(gaps) <= 1
    for invalid in ("0", "1000", "ddim50", "10,15,20", "2.5", ""):
        with pytest.raises(ValueError, match="whole number of steps"):
            make_sampler(name, invalid)


@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_are_clipped_only_on_request(name):
    def out_of_range(x, t):
        return torch.cat([-10 * torch.ones_like(x), x], dim=1)

    loop, _ = make_sampler(name, "10")
    noise = torch.randn(2, 1, 4, 4)
    assert loop(out_of_range, noise.shape, noise=noise, clip_denoised=True).abs().max() <= 1 + 1e-5
    assert loop(out_of_range, noise.shape, noise=noise, clip_denoised=False).abs().max() > 2


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", ["10", "33"])
def test_each_timestep_is_denoised_by_its_own_expert(ckpt, name, steps, monkeypatch):
    folded = FoldedRemix(load_model(ckpt)[0])
    selected = []
    select = folded.select
    monkeypatch.setattr(folded, "select", lambda i: selected.append(i) or select(i))
    timesteps_seen = []

    def denoise(x, t):
        timesteps_seen.append(int(t[0]))
        return folded(x, t, torch.zeros_like(t))

    loop, timesteps = make_sampler(name, steps)
    loop(denoise, (2, 3, 8, 8), noise=torch.randn(2, 3, 8, 8), step_noise=lambda i: torch.zeros(2, 3, 8, 8))
    n, bounds = folded.remix.n_experts, [i * 1000 // folded.remix.n_experts for i in range(folded.remix.n_experts + 1)]
    assert timesteps_seen == timesteps
    assert len(selected) == len(timesteps_seen)
    assert set(selected) == set(range(n))
    assert all(bounds[i] <= t < bounds[i + 1] for i, t in zip(selected, timesteps_seen, strict=True))
