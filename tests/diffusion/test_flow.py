"""Flow matching: SiT's published numbers, closed forms for Gaussian data, the time distribution, and wrong input."""

import math

import numpy as np
import pytest
import torch
from conftest import golden, relative
from scipy.special import ndtr

from diffusion import FlowMatching, as_denoiser, create_flow
from diffusion.interpolants import DIFFUSION_FORMS, PATHS
from diffusion.intervals import inner_boundaries
from models import DiT, classifier_free_guidance

PREDICTIONS = ("velocity", "noise", "score")
# Data of independent Gaussian pixels, whose velocity is known exactly.
MEAN, STD = 0.4, 0.5


@pytest.fixture(scope="module")
def transport():
    return golden("transport.pt")


@pytest.fixture(scope="module")
def network():
    vectors = golden("sit.pt")
    model = DiT(**vectors["config"])
    model.load_state_dict(vectors["state_dict"])
    return model.eval().requires_grad_(False)


def path_name(name: str) -> str:
    return {"Linear": "linear"}.get(name, name)


def wide(t: torch.Tensor) -> torch.Tensor:
    return t.view(-1, 1, 1, 1)


# SiT's numbers


def test_network_and_guidance(network):
    vectors = golden("sit.pt")
    assert relative(network(vectors["x"], vectors["t"], vectors["y"])[:, :4], vectors["out"]) < 1e-5
    guided = vectors["cfg"]
    out = classifier_free_guidance(network, guided["x"], guided["t"], guided["y"], guided["scale"])
    assert relative(out[:, :4], guided["out"]) < 1e-5


@pytest.mark.parametrize("name", ["Linear", "GVP", "VP"])
def test_paths_conversions_and_diffusion_forms(transport, name):
    expected, t = transport["quantities"][name], transport["t"]
    path = PATHS[path_name(name)](t)
    for quantity, value in path._asdict().items():
        torch.testing.assert_close(value, expected[quantity], rtol=1e-5, atol=0)
    x, out = expected["xt"], expected["model_output"]
    assert relative(create_flow(path_name(name)).q_sample(transport["x1"], t, transport["x0"]), x) < 1e-6
    velocity, noise = create_flow(path_name(name)).velocity_and_noise(t)
    assert relative(wide(velocity[0]) * x + wide(velocity[1]) * out, out) == 0
    eps = wide(noise[0]) * x + wide(noise[1]) * out
    assert relative(eps, expected["noise_from_velocity"]) < 1e-5
    assert relative(-eps / wide(path.sigma), expected["score_from_velocity"]) < 1e-5
    velocity, _ = create_flow(path_name(name), "score").velocity_and_noise(t)
    score = expected["score_from_velocity"]
    assert relative(wide(velocity[0]) * x + wide(velocity[1]) * score, out) < 1e-4
    score = wide(velocity[0]) * x + wide(velocity[1]) * out
    assert relative(score, expected["velocity_from_score"]) < 1e-5
    for form, value in expected["diffusion"].items():
        found = DIFFUSION_FORMS[form.replace("inccreasing", "increasing")](t, path)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7, msg=form)


def test_losses_and_intervals(transport, network):
    inputs = ({"y": transport["y"]}, transport["x0"])
    for name, expected in transport["losses"].items():
        if name.startswith("interval/"):
            _, path, prediction = name.split("/")
            flow = create_flow(path_name(path), prediction)
            intervals = flow.interval(training=True), flow.interval(), flow.interval(last_step_size=0.04)
            np.testing.assert_allclose(np.ravel(intervals), expected.numpy(), rtol=0, atol=1e-12, err_msg=name)
        else:
            path, prediction, weight = name.split("/")
            flow = create_flow(path_name(path), prediction, weight)
            losses = flow.training_losses(network, transport["x1"], transport["t"], *inputs)
            torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=0, msg=name)


def test_ode_chains(transport, network):
    z, y = transport["z"], {"y": transport["y"]}
    chains = {name: out for name, out in transport["chains"].items() if name.startswith("ode/")}
    assert len(chains) == 12
    for name, expected in chains.items():
        _, path, prediction, method, points = name.split("/")
        flow = create_flow(path_name(path), prediction)
        method = method.removesuffix("2")
        out = flow.ode_sample_loop(network, z.shape, noise=z, method=method, steps=int(points) - 1, model_kwargs=y)
        assert relative(out, expected) < (1e-3 if method == "dopri5" else 1e-5), name


def test_sde_chains(transport, network):
    z, y = transport["z"], {"y": transport["y"]}
    chains = {name: out for name, out in transport["chains"].items() if name.startswith("sde/")}
    assert len(chains) == 8
    for name, chain in chains.items():
        _, path, prediction, method, form, last_step, steps = name.split("/")
        out = create_flow(path_name(path), prediction).sde_sample_loop(
            network,
            z.shape,
            noise=z,
            method=method.lower(),
            steps=int(steps),
            model_kwargs=y,
            form=form,
            last_step=last_step.lower(),
            step_noise=list(chain["noise"]).__getitem__,
        )
        assert relative(out, chain["out"]) < 1e-5, name


# Gaussian data


def gaussian(path, prediction):
    """The exact prediction for Gaussian data, beside a second half of channels that must be dropped."""

    def model(x, t):
        alpha, sigma, d_alpha, d_sigma = (wide(value) for value in PATHS[path](t.double()))
        deviation = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x_1, eps = MEAN + alpha * STD**2 * deviation, sigma * deviation
        out = {"velocity": d_alpha * x_1 + d_sigma * eps, "noise": eps, "score": -deviation}[prediction]
        return torch.cat([out, torch.full_like(out, 1e3)], dim=1)

    return model


def marginal(path: str, t: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    alpha, sigma, *_ = (value.item() for value in PATHS[path](torch.tensor(t, dtype=torch.float64)))
    return alpha * MEAN, math.sqrt(alpha**2 * STD**2 + sigma**2)


def ode_error(path, prediction, method, steps, **options) -> float:
    """The largest distance to the exact end: the ODE keeps each pixel's place within the distribution."""
    flow, places = create_flow(path, prediction, **options), torch.linspace(-3, 3, 64, dtype=torch.float64)
    (start_mean, start_std), (end_mean, end_std) = (marginal(path, t) for t in flow.interval())
    noise = (start_mean + start_std * places).view(64, 1, 1, 1)
    model = gaussian(path, prediction)
    out = flow.ode_sample_loop(model, noise.shape, noise=noise, method=method, steps=steps)
    return (out.flatten() - end_mean - end_std * places).abs().max().item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_ode_solvers(path, method, order):
    for shift in (1.0, 3.0):
        coarse, fine = (ode_error(path, "velocity", method, steps, shift=shift) for steps in (200, 400))
        assert fine < (0.02 if method == "euler" else 5e-4)
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_ode_solvers_agree_on_all_predictions(path, prediction):
    assert ode_error(path, prediction, "heun", 200) < 2e-3
    assert ode_error(path, prediction, "dopri5", 1) < 0.02


def sde_moments(path, prediction, method, steps, **options) -> tuple[float, float]:
    """Mean and standard deviation of the SDE's samples, without sampling error.

    The prediction is linear in x. A sample is therefore a constant plus a linear map of the start and of each step's
    noise. Row 0 of the batch has none of them, and each other row one of them.
    """
    flow, rows = create_flow(path, prediction), steps + 1
    mean, std = marginal(path, flow.interval()[0])
    unit = torch.eye(rows + 1, dtype=torch.float64)[1:].view(rows, rows + 1, 1, 1, 1)
    out = flow.sde_sample_loop(
        gaussian(path, prediction),
        (rows + 1, 1, 1, 1),
        noise=mean + std * unit[0],
        method=method,
        steps=steps,
        step_noise=lambda i: unit[i + 1],
        **options,
    ).flatten()
    return out[0].item(), (out[1:] - out[0]).norm().item()


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_order_of_the_sde_solvers(form, method):
    end = marginal("VP", 1 - 1e-3)
    errors = []
    for steps in (200, 400):
        moments = sde_moments("VP", "noise", method, steps, form=form, last_step="none")
        errors.append(max(abs(moments[0] - end[0]), abs(moments[1] - end[1])))
    assert errors[1] < 0.005
    # Heun's steps of the drift do not raise the order of the noise; they do where no noise is added at both ends.
    order = 2 if (form, method) == ("increasing-decreasing", "heun") else 1
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie"])
@pytest.mark.parametrize("path, prediction", [("linear", "velocity"), ("GVP", "noise"), ("linear", "score")])
def test_sde_with_a_last_step(path, prediction, last_step):
    mean, std = sde_moments(path, prediction, "euler", 250, last_step=last_step)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_prediction_has_the_smallest_loss(prediction):
    generator = torch.Generator().manual_seed(0)
    shape = (4000, 1, 1, 1)
    data = MEAN + STD * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    t = torch.rand(4000, generator=generator, dtype=torch.float64)
    exact, flow = gaussian("linear", prediction), create_flow(prediction=prediction)

    def loss(scale: float) -> torch.Tensor:
        return flow.training_losses(lambda x, t: scale * exact(x, t), data, t, noise=noise)["loss"].mean()

    assert loss(1.0) < min(loss(0.9), loss(1.1))


# Times


@pytest.mark.parametrize("name", FlowMatching.samplers)
@pytest.mark.parametrize("last_step", ["none", "mean"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_times_of_the_network(name, last_step, method):
    seen, tensors = [], []

    def denoise(x, time):
        seen.append(time)
        return network(x, time)

    @as_denoiser
    def network(x, t):
        tensors.append(t)
        return torch.zeros_like(x)

    options = dict(last_step=last_step, method=method) if name == "sde" else {}
    sampler = create_flow("VP", shift=2.0).make_sampler(name, "7", **options)
    sampler(denoise, torch.randn(2, 1, 2, 2), step_noise=lambda i: torch.zeros(2, 1, 2, 2))
    assert all(t.dtype == torch.float32 and t.tolist() == [time] * 2 for t, time in zip(tensors, seen, strict=True))
    assert 0 <= min(seen) <= max(seen) <= np.float32(0.999)
    if name == "dopri5":
        assert sampler.evaluations is None
    else:
        assert len(seen) == sampler.evaluations
        assert sampler.evaluations == 7 or "heun" in (name, method)
        # Heun's second evaluation of a step is at the time of the next step's first.
        assert seen == sorted(seen)
        assert seen.count(max(seen)) == 1 + ((name, last_step, method) == ("sde", "mean", "heun"))


def test_the_grid_is_even_before_the_shift():
    assert create_flow().ode_steps("euler", 4).times == [0, 0.25, 0.5, 0.75, 1]
    u = 1 - np.array(create_flow(shift=3.0).ode_steps("euler", 4).times)
    np.testing.assert_allclose(u, [1, 9 / 10, 3 / 4, 1 / 2, 0], atol=1e-7)
    times = create_flow(shift=3.0).sde_steps("euler", 50).times
    assert len(times) == 50
    assert times[-1] == pytest.approx(0.96)
    # A shift of sampling alone, and a last noise level before it.
    assert (
        create_flow(shift=2.0).ode_steps("heun", 4, shift=3.0).times == create_flow(shift=3.0).ode_steps(steps=4).times
    )
    u = 1 - np.array(create_flow(shift=3.0).ode_steps("euler", 2, last_level=0.2).times)
    np.testing.assert_allclose(u, [1, 9 / 11, 3 / 7], atol=1e-7)
    times = create_flow().sde_steps("euler", 50, shift=3.0).times
    assert times == create_flow(shift=3.0).sde_steps("euler", 50).times


def test_dopri5_asks_one_expert_at_a_time():
    boundaries, seen = create_flow().quantiles(10), []

    def model(x, t):
        # As float32 arithmetic decides.
        seen.append(torch.bucketize(1 - t[0], torch.tensor(boundaries[1:-1]), right=True).item())
        # Experts that disagree: without a restart, a step would mix the two sides of a boundary.
        return torch.full_like(x, float(seen[-1]))

    zeros = torch.zeros(2, 1, 2, 2)
    out = create_flow().ode_sample_loop(model, zeros.shape, noise=zeros, method="dopri5", boundaries=boundaries)
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == set(range(10))
    assert relative(out, torch.full_like(out, 4.5)) < 1e-5


def test_dopri5_restarts_change_little():
    model, noise = gaussian("linear", "velocity"), torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    outs = [
        create_flow().ode_sample_loop(
            lambda x, t: model(x, t).float(), noise.shape, noise=noise, method="dopri5", boundaries=boundaries
        )
        for boundaries in ((), (0, 0.25, 0.875, 1), (1e-9, 1 / 3, 0.33333333))
    ]
    assert relative(outs[1], outs[0]) < 5e-3
    assert relative(outs[2], outs[0]) < 5e-3


DISTRIBUTIONS = {
    "uniform": dict(),
    "uniform shifted": dict(shift=3.0),
    "logit-normal": dict(time_sampling="logit-normal", time_mean=-0.4, time_std=0.8),
    "logit-normal shifted": dict(time_sampling="logit-normal", time_mean=0.2, time_std=1.5, shift=0.5),
}


def density_integral(options: dict, u: np.ndarray) -> np.ndarray:
    """The probability of a noise level below u: the shift's inverse, then the logit's normal distribution."""
    shift = options.get("shift", 1.0)
    u = u / (shift - (shift - 1) * u)
    if "time_sampling" not in options:
        return u
    return ndtr((np.log(u / (1 - u)) - options["time_mean"]) / options["time_std"])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution_of_times(name):
    options = DISTRIBUTIONS[name]
    flow, levels = create_flow(**options), np.linspace(0.02, 0.98, 25)
    uniform = np.random.default_rng(0).random(200_000)
    t = flow.quantile_times(uniform)
    assert t.dtype == np.float32
    found = np.searchsorted(np.sort(1 - t.astype(np.float64)), levels) / len(t)
    np.testing.assert_allclose(found, density_integral(options, levels), atol=0.005)
    # Within an interval the distribution is the same, restricted and normalized.
    low, high = 0.3, 0.6
    u = np.sort(1 - flow.quantile_times(uniform, low, high).astype(np.float64))
    levels = np.linspace(low, high, 9)
    start, end = density_integral(options, np.array([low, high]))
    expected = (density_integral(options, levels) - start) / (end - start)
    np.testing.assert_allclose(np.searchsorted(u, levels) / len(u), expected, atol=0.005)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quantiles_are_equally_probable(name):
    flow = create_flow(**DISTRIBUTIONS[name])
    for n in (1, 3, 8, 1000):
        boundaries = flow.quantiles(n)
        assert (len(boundaries), boundaries[0], boundaries[-1]) == (n + 1, 0, 1)
        assert np.all(np.diff(boundaries) > 0)
        np.testing.assert_allclose(np.diff(density_integral(DISTRIBUTIONS[name], np.array(boundaries[1:-1]))), 1 / n)
    u = 1 - flow.quantile_times(np.random.default_rng(1).random(80_000)).astype(np.float64)
    counts = np.histogram(u, flow.quantiles(8))[0]
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


@pytest.mark.parametrize("shift", [1.0, 6.9282])
def test_a_highest_noise_level_of_training(shift):
    """RAE draws u uniformly from 0 to 0.999, and shifts it. The experts' intervals have equal probability."""
    flow, uniform = create_flow(shift=shift, time_max=0.999), np.linspace(0, 1, 1001)
    before = 0.999 * uniform
    expected = shift * before / (1 + (shift - 1) * before)
    np.testing.assert_allclose(1 - flow.quantile_times(uniform), expected, atol=3e-6)
    boundaries = np.array(flow.expert_boundaries(8))
    assert (boundaries[0], boundaries[-1]) == (0, 1)
    np.testing.assert_allclose(boundaries[:-1], expected[:1000:125], atol=1e-8)
    assert flow.config["time_max"] == 0.999
    assert "time_max" not in create_flow(shift=shift).config


def test_quantiles_of_uniform_times_are_equal_intervals():
    assert create_flow().quantiles(4) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_times_stay_within_their_interval(name, dtype):
    flow = create_flow(**DISTRIBUTIONS[name])
    boundaries = np.array(flow.quantiles(37))
    for uniform in (0.0, 1e-9, 0.5, 1 - 2.0**-53, 1.0):
        t = flow.quantile_times(np.full(37, uniform), boundaries[:-1], boundaries[1:])
        lowered = np.array([0, *inner_boundaries(boundaries), 1]).astype(dtype)
        experts = np.searchsorted(lowered, dtype(1) - t.astype(dtype), side="right") - 1
        np.testing.assert_array_equal(experts, np.arange(37))


def test_training_times_avoid_divisions_by_zero():
    for path in PATHS:
        for prediction in PREDICTIONS:
            flow = create_flow(path, prediction)
            t = flow.quantile_times(np.array([0.0, 0.5, 1.0]))
            t0, t1 = flow.interval(training=True)
            assert t0 <= t.min() <= t.max() <= t1
            assert t[1] == pytest.approx((t0 + t1) / 2)


# Wrong input


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(path="cubic"), "unknown path 'cubic': choose from linear, GVP, VP"),
        (dict(prediction="noise", weight="snr"), "unknown weight 'snr'"),
        (dict(weight="likelihood"), "weight likelihood needs a noise or score prediction"),
        (dict(shift=math.nan), "shift must be a positive number"),
        (dict(time_std=0.0), "time_std must be a positive number"),
        (dict(time_mean=math.inf), "time_mean must be a finite number"),
        (dict(time_max=1.5), "time_max must be above 0 and at most 1"),
    ],
)
def test_wrong_process(options, message):
    with pytest.raises(ValueError, match=message):
        create_flow(**options)


@pytest.mark.parametrize(
    "name, steps, options, message",
    [
        ("ddpm", 10, {}, "unknown sampler 'ddpm': choose from euler, heun, dopri5, sde"),
        ("euler", 0, {}, "at least 1, not 0"),
        ("euler", 2.5, {}, "must be a whole number"),
        ("euler", 5, dict(shift=0.0), "the shift must be a positive number"),
        ("heun", 5, dict(last_level=1.0), "the last noise level must be at least 0 and below 1"),
        ("sde", 1, {}, "at least 2, not 1"),
        ("sde", 10, dict(form="cosine"), "unknown diffusion form 'cosine'"),
        ("sde", 10, dict(last_step_size=1.0), "last_step_size must be between 0 and 1, not 1.0"),
        ("sde", 10, dict(last_step_size=1e-9), "last_step_size 1e-09 is too small"),
        ("sde", 10, dict(method="dopri5"), "unknown method 'dopri5'"),
        ("sde", 10, dict(form="SBDM"), "SBDM divides by zero at t = 0"),
        ("sde", 10, dict(method="heun", last_step="none"), "heun divides by zero at t = 1"),
    ],
)
def test_wrong_sampler(name, steps, options, message):
    with pytest.raises(ValueError, match=message):
        create_flow().make_sampler(name, steps, **options)


def test_wrong_intervals_of_times():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        create_flow().quantiles(0)
    for low, high in ((0.5, 0.5), (0.6, 0.4), (1.2, 1.5)):
        with pytest.raises(ValueError, match="contains no training times"):
            create_flow().quantile_times(np.array([0.5]), low, high)
    with pytest.raises(ValueError, match=r"drawn between 0.001 and 0.999"):
        create_flow(prediction="noise").quantile_times(np.full(2, 0.5), np.array([0.0, 0.5]), np.array([5e-4, 1.0]))


def test_model_of_the_wrong_width():
    with pytest.raises(ValueError, match="must return 4 or 8 channels, it returns 3"):
        create_flow().training_losses(lambda x, t: x[:, :3], torch.zeros(1, 4, 2, 2), torch.tensor([0.5]))
