import numpy as np
import pytest
import torch
from conftest import golden, relative

from diffusion import create_diffusion, space_timesteps
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
def g():
    return golden("diffusion.pt")


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_schedules(g, name):
    diffusion = create_diffusion(noise_schedule=name)
    for array, expected in g[name].items():
        np.testing.assert_allclose(getattr(diffusion, array), expected.numpy(), rtol=1e-12, atol=1e-12, err_msg=array)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses(g, objective):
    options, inputs = OBJECTIVES[objective], g["train_inputs"]
    channels = 8 if options.get("learn_sigma", True) else 4
    model = lambda x, t: inputs["model_output"][:, :channels]  # noqa: E731
    losses = create_diffusion(**options).training_losses(model, inputs["x0"], inputs["t"], noise=inputs["noise"])
    for name, expected in g["train"][objective].items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=0, msg=name)


def test_bound_trains_the_variance_alone(g):
    inputs = g["train_inputs"]
    out = inputs["model_output"].clone().requires_grad_()
    losses = create_diffusion().training_losses(lambda x, t: out, inputs["x0"], inputs["t"], noise=inputs["noise"])
    losses["vb"].sum().backward()
    assert not out.grad[:, :4].any()
    assert out.grad[:, 4:].any()


def test_q_sample(g):
    inputs = g["train_inputs"]
    assert relative(create_diffusion().q_sample(inputs["x0"], inputs["t"], inputs["noise"]), g["q_sample"]) < 1e-6


def test_spacing(g):
    for spacing, expected in g["space"].items():
        assert create_diffusion(spacing).timestep_map == list(expected), spacing
    np.testing.assert_allclose(create_diffusion("50").betas, g["respaced_betas_50"].numpy(), rtol=1e-12)


@pytest.mark.parametrize("spacing", ["0", "1001", "ddim999", "ten", "600,600", "", "5,,5"])
def test_spacing_that_cannot_be(spacing):
    with pytest.raises(ValueError):
        space_timesteps(1000, spacing)


def test_respaced_marginals_are_the_originals():
    whole, some = create_diffusion(), create_diffusion("10,15,20")
    np.testing.assert_allclose(some.alphas_cumprod, whole.alphas_cumprod[some.timestep_map], rtol=1e-12)


@pytest.mark.parametrize("clip", [False, True])
def test_p_mean_variance(g, clip):
    out = create_diffusion("50").p_mean_variance(
        lambda x, t: g["train_inputs"]["model_output"],
        g["step_inputs"]["x_t"],
        g["step_inputs"]["t"],
        clip_denoised=clip,
    )
    for name, expected in g[f"p_mean_variance_clip{int(clip)}"].items():
        assert relative(out[name], expected) < 1e-5, name


def test_ddim_step(g):
    out = create_diffusion("50").ddim_sample(
        lambda x, t: g["train_inputs"]["model_output"],
        g["step_inputs"]["x_t"],
        g["step_inputs"]["t"],
        clip_denoised=False,
    )
    assert relative(out["sample"], g["ddim_eta0"]) < 1e-5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_chains(g, sampler):
    vectors = golden("dit.pt")
    model = DiT(**vectors["config"])
    model.load_state_dict(vectors["state_dict"])
    chain, diffusion = g[f"chain_{sampler}10"], create_diffusion("10")
    how = dict(noise=chain["z"], clip_denoised=False, model_kwargs={"y": chain["y"]})
    if sampler == "ddpm":
        out = diffusion.p_sample_loop(model.eval(), chain["z"].shape, step_noise=lambda i: chain["noise"][i], **how)
    else:
        out = diffusion.ddim_sample_loop(model.eval(), chain["z"].shape, **how)
    assert relative(out, chain["out"]) < 1e-4


def test_ddim_with_eta_1_has_ddpms_small_variance():
    diffusion = create_diffusion("50", learn_sigma=False, sigma_small=True)
    model = lambda x, t: 0.3 * x  # noqa: E731
    torch.manual_seed(0)
    x, t, noise = torch.randn(4, 1, 8, 8), torch.tensor([1, 10, 30, 49]), torch.randn(4, 1, 8, 8)
    ddpm = diffusion.p_sample(model, x, t, clip_denoised=False, noise=noise)["sample"]
    ddim = diffusion.ddim_sample(model, x, t, clip_denoised=False, eta=1.0, noise=noise)["sample"]
    assert relative(ddim, ddpm) < 1e-4


def test_the_model_is_told_original_timesteps():
    diffusion, seen = create_diffusion("4", learn_sigma=False), []
    diffusion.p_sample_loop(lambda x, t: seen.append(t[0].item()) or x, (1, 1, 2, 2))
    assert seen == [999, 666, 333, 0]


def test_model_of_the_wrong_width():
    with pytest.raises(ValueError, match="channels"):
        create_diffusion().training_losses(lambda x, t: x, torch.zeros(1, 4, 2, 2), torch.tensor([0]))


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown noise schedule"):
        create_diffusion(noise_schedule="cubic")
