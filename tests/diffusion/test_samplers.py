"""Samplers: exact solutions for Gaussian data, the times that they ask for, and no wait for the device."""

import numpy as np
import pytest
import torch
from conftest import random_remix_dit

from checkpoint import load_model
from diffusion import PROCESSES, GaussianDiffusion, as_denoiser, create_diffusion, create_process
from diffusion.samplers import SOLVERS, make_scheduler
from sampling.experts import FoldedRemix
from sampling.guidance import GuidedDenoiser, make_schedule

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
    sampler = create_diffusion().make_sampler(name, str(steps))
    assert sampler.evaluations == steps
    x = sampler(as_denoiser(exact_noise), noise, clip_denoised=False)
    return (x - exact_sample(noise)).abs().max().item()


@pytest.mark.parametrize("name", [*SOLVERS, "ddim"])
def test_samplers_converge_to_the_solution_of_the_ode(name):
    errors = [error(name, steps) for steps in (10, 50, 250)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (0.05 if name in ("euler", "ddim") else 0.005)


def test_second_order_solvers_need_fewer_steps():
    assert max(error("dpmpp", 20), error("unipc", 20)) < error("ddim", 20) / 2


@pytest.mark.parametrize("name", GaussianDiffusion.samplers)
def test_samples_have_the_distribution_of_the_data(name):
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    x = create_diffusion(learn_sigma=False).make_sampler(name, "200")(
        as_denoiser(lambda x, t: exact_noise(x, t)[:, :1]),
        noise,
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
            create_diffusion().make_sampler(name, invalid)


@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_are_clipped_only_on_request(name):
    def out_of_range(x, time):
        return torch.cat([-10 * torch.ones_like(x), x], dim=1)

    sampler = create_diffusion().make_sampler(name, "10")
    noise = torch.randn(2, 1, 4, 4)
    assert sampler(out_of_range, noise, clip_denoised=True).abs().max() <= 1 + 1e-5
    assert sampler(out_of_range, noise, clip_denoised=False).abs().max() > 2


@pytest.mark.parametrize("name", GaussianDiffusion.samplers)
@pytest.mark.parametrize("steps", ["10", "33"])
def test_each_timestep_is_denoised_by_its_own_expert(ckpt, name, steps, monkeypatch):
    folded = FoldedRemix(load_model(ckpt)[0])
    selected = []
    select = folded.select
    monkeypatch.setattr(folded, "select", lambda i: selected.append(i) or select(i))
    timesteps_seen = []

    def denoise(x, time):
        assert isinstance(time, int)
        timesteps_seen.append(time)
        return folded.for_timestep(time)(x, torch.full((2,), time), torch.zeros(2, dtype=torch.long))

    sampler = create_diffusion().make_sampler(name, steps)
    sampler(denoise, torch.randn(2, 3, 8, 8), step_noise=lambda i: torch.zeros(2, 3, 8, 8))
    n, bounds = folded.remix.n_experts, [i * 1000 // folded.remix.n_experts for i in range(folded.remix.n_experts + 1)]
    assert timesteps_seen == sorted(timesteps_seen, reverse=True)
    assert len(selected) == len(timesteps_seen) == sampler.evaluations == int(steps)
    assert set(selected) == set(range(n))
    assert all(bounds[i] <= t < bounds[i + 1] for i, t in zip(selected, timesteps_seen, strict=True))


EVERY_SAMPLER = [(process, name) for process in PROCESSES for name in PROCESSES[process].samplers]


@pytest.mark.parametrize(("process", "name"), EVERY_SAMPLER)
@torch.no_grad()
def test_guided_experts_do_not_wait_for_the_device(process, name):
    """The host knows each time, its expert and its guidance scale without reading a tensor, which the meta device does
    not allow. Only dopri5 decides on the device how long its steps are."""
    process = create_process(process)
    highest = process.scale.highest
    # The host's copy of the coefficients is made on the CPU.
    folded = FoldedRemix(random_remix_dit(boundaries=process.expert_boundaries(20))).to("meta")
    schedule = make_schedule(2.0, [0.2 * highest, 0.6 * highest], highest)
    denoise = GuidedDenoiser(folded, torch.tensor([1, 2], device="meta"), 10, schedule)
    times, noise, sampler = [], torch.empty(2, 4, 8, 8, device="meta"), process.make_sampler(name, "8")

    def run() -> torch.Tensor:
        return sampler(lambda x, time: times.append(time) or denoise(x, time), noise, clip_denoised=False)

    if sampler.evaluations is None:
        with pytest.raises(RuntimeError, match="meta tensors"):
            run()
        return
    assert run().device.type == "meta"
    assert len(times) == sampler.evaluations
    assert all(isinstance(time, int | float) for time in times)


def test_an_unknown_sampler():
    for process in PROCESSES:
        with pytest.raises(ValueError, match="unknown sampler 'cosine': choose from"):
            create_process(process).make_sampler("cosine", "10")


def test_respacing_a_process_equals_building_it_respaced():
    options = dict(noise_schedule="squaredcos_cap_v2", predict_xstart=True, learn_sigma=False, min_snr=5.0)
    built, respaced = create_diffusion("ddim50", **options), create_diffusion("10", **options).respaced("ddim50")
    assert built.timestep_map == respaced.timestep_map
    assert (built.variance, built.loss, built.scale) == (respaced.variance, respaced.loss, respaced.scale)
    arrays = {name: value for name, value in vars(built).items() if isinstance(value, np.ndarray)}
    assert "mse_weight" in arrays
    for name, value in arrays.items():
        assert np.array_equal(value, getattr(respaced, name)), name
