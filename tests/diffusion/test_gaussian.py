from functools import partial

import numpy as np
import pytest
import torch
from conftest import golden, relative

from diffusion import create_diffusion
from models import DiT

OBJECTIVES = {
    "eps_learned": {},
    "x0_learned": {"predict_xstart": True},
    "eps_fixedlarge": {"learn_sigma": False},
    "eps_fixedsmall": {"learn_sigma": False, "sigma_small": True},
    "rescaled": {"rescale_learned_sigmas": True},
    "kl": {"use_kl": True},
}


@pytest.fixture(scope="module")
def vectors():
    return golden("diffusion.pt")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_match_the_published_implementation(vectors, objective):
    options, inputs = OBJECTIVES[objective], vectors["train_inputs"]
    channels = 8 if options.get("learn_sigma", True) else 4
    model = lambda x, t: inputs["model_output"][:, :channels]  # noqa: E731
    losses = create_diffusion(**options).training_losses(model, inputs["x0"], inputs["t"], noise=inputs["noise"])
    for name, expected in vectors["train"][objective].items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=0, msg=name)


def test_the_bound_trains_only_the_variance(vectors):
    inputs = vectors["train_inputs"]
    out = inputs["model_output"].clone().requires_grad_()
    losses = create_diffusion().training_losses(lambda x, t: out, inputs["x0"], inputs["t"], noise=inputs["noise"])
    losses["vb"].sum().backward()
    assert not out.grad[:, :4].any()
    assert out.grad[:, 4:].any()


def test_min_snr_weights_equal_predictions_of_noise_and_data_equally(vectors):
    inputs = vectors["train_inputs"]
    x0, t, noise = inputs["x0"], inputs["t"], inputs["noise"]
    plain, weighted = create_diffusion(), create_diffusion(min_snr=5)
    data = create_diffusion(min_snr=5, predict_xstart=True, learn_sigma=False)
    out = inputs["model_output"]
    losses = weighted.training_losses(lambda x, t: out, x0, t, noise=noise)
    snr = torch.from_numpy(plain.alphas_cumprod / (1 - plain.alphas_cumprod))[t]
    assert (snr > 5).any()
    assert (snr < 5).any()
    torch.testing.assert_close(
        losses["loss"].double(), losses["mse"] * (5 / snr).clamp(max=1) + losses["vb"], rtol=1e-5, atol=0
    )
    unweighted = plain.training_losses(lambda x, t: out, x0, t, noise=noise)
    assert torch.equal(losses["mse"], unweighted["mse"])
    assert torch.equal(losses["vb"], unweighted["vb"])

    # The same prediction, expressed as data: x0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar).
    alpha_bar = torch.from_numpy(plain.alphas_cumprod)[t].view(-1, 1, 1, 1)
    as_data = lambda x, t: ((x - (1 - alpha_bar).sqrt() * out[:, :4]) / alpha_bar.sqrt()).float()  # noqa: E731
    expected = losses["loss"] - losses["vb"]
    actual = data.training_losses(as_data, x0, t, noise=noise)["loss"]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("predict_xstart", [False, True])
def test_the_loss_weight_has_a_lower_bound(predict_xstart):
    free, bounded = (
        create_diffusion(min_snr=5, min_weight=bound, predict_xstart=predict_xstart).mse_weight for bound in (0, 0.2)
    )
    snr = create_diffusion().alphas_cumprod / (1 - create_diffusion().alphas_cumprod)
    unit = snr if predict_xstart else np.ones(1000)
    assert bounded == pytest.approx(np.maximum(free, 0.2 * unit))
    assert bounded[0] == pytest.approx(0.2 * unit[0])
    assert bounded[999] == pytest.approx(unit[999])


@pytest.mark.parametrize(
    "options", [{"min_snr": 0}, {"min_snr": 5, "use_kl": True}, {"min_weight": 0.2}, {"min_snr": 5, "min_weight": 2}]
)
def test_an_impossible_loss_weight_is_refused(options):
    with pytest.raises(ValueError, match=r"min_snr|min_weight"):
        create_diffusion(**options)


def test_q_sample_matches_the_published_implementation(vectors):
    inputs = vectors["train_inputs"]
    assert relative(create_diffusion().q_sample(inputs["x0"], inputs["t"], inputs["noise"]), vectors["q_sample"]) < 1e-6


@pytest.mark.parametrize("clip", [False, True])
def test_p_mean_variance_matches_the_published_implementation(vectors, clip):
    out = create_diffusion("50").p_mean_variance(
        lambda x, t: vectors["train_inputs"]["model_output"],
        vectors["step_inputs"]["x_t"],
        vectors["step_inputs"]["t"],
        clip_denoised=clip,
    )
    for name, expected in vectors[f"p_mean_variance_clip{int(clip)}"].items():
        assert relative(out[name], expected) < 1e-5, name


def test_a_ddim_step_matches_the_published_implementation(vectors):
    out = create_diffusion("50").ddim_sample(
        lambda x, t: vectors["train_inputs"]["model_output"],
        vectors["step_inputs"]["x_t"],
        vectors["step_inputs"]["t"],
        clip_denoised=False,
    )
    assert relative(out["sample"], vectors["ddim_eta0"]) < 1e-5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_match_the_published_implementation(vectors, sampler):
    published = golden("dit.pt")
    model = DiT(**published["config"])
    model.load_state_dict(published["state_dict"])
    chain, diffusion = vectors[f"chain_{sampler}10"], create_diffusion("10")
    loop = diffusion.ddim_sample_loop
    if sampler == "ddpm":
        loop = partial(diffusion.p_sample_loop, step_noise=lambda i: chain["noise"][i])
    model_kwargs = {"y": chain["y"]}
    out = loop(model.eval(), chain["z"].shape, noise=chain["z"], clip_denoised=False, model_kwargs=model_kwargs)
    assert relative(out, chain["out"]) < 1e-4


def test_ddim_with_eta_1_equals_ddpm_with_fixed_small_variance():
    diffusion = create_diffusion("50", learn_sigma=False, sigma_small=True)
    model = lambda x, t: 0.3 * x  # noqa: E731
    torch.manual_seed(0)
    x, t, noise = torch.randn(4, 1, 8, 8), torch.tensor([1, 10, 30, 49]), torch.randn(4, 1, 8, 8)
    ddpm = diffusion.p_sample(model, x, t, clip_denoised=False, noise=noise)["sample"]
    ddim = diffusion.ddim_sample(model, x, t, clip_denoised=False, eta=1.0, noise=noise)["sample"]
    assert relative(ddim, ddpm) < 1e-4


def test_the_model_is_called_with_original_timesteps():
    diffusion = create_diffusion("4", learn_sigma=False)
    timesteps = []
    diffusion.p_sample_loop(lambda x, t: timesteps.append(t[0].item()) or x, (1, 1, 2, 2))
    assert timesteps == [999, 666, 333, 0]


def test_a_model_with_the_wrong_number_of_channels():
    with pytest.raises(ValueError, match="channels"):
        create_diffusion().training_losses(lambda x, t: x, torch.zeros(1, 4, 2, 2), torch.tensor([0]))
