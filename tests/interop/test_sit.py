"""Files of SiT and REPA: outputs equal those of the published network, and the file says which flow it is."""

import argparse

import pytest
import torch
from conftest import golden, relative, run, training_flags

from checkpoint import load_model
from diffusion import create_process
from features.autoencoder import Normalization
from interop import sit
from interop.shapes import PUBLISHED_VAE
from models import DiT, DiT_models
from remix import RemixDiT
from runtime.errors import UserError
from sampling.loading import choose_process

CONFIG = {"diffusion": {"process": "flow", "path": "GVP"}, "data": {"image_size": 64}}


def sit_args(**changes) -> argparse.Namespace:
    """The arguments in a training checkpoint of SiT that this project reads."""
    args = dict(model="an unregistered SiT", path_type="Linear", prediction="velocity", loss_weight=None)
    return argparse.Namespace(**args | changes)


def tiny(**options) -> DiT:
    """A tiny DiT whose output is not zero."""
    dit = DiT_models["DiT-T/4"](**{"input_size": 8, "num_classes": 7} | options)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit.eval().requires_grad_(False)


def inputs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x and y, and times from 0 to 1."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 8, 8, generator=generator), torch.linspace(0, 1, n), torch.arange(n)


@pytest.mark.parametrize("wrap", ["bare", "checkpoint"])
@torch.no_grad()
def test_published_files_give_published_outputs(tmp_path, wrap):
    g = golden("sit.pt")
    bare = g["state_dict"]
    torch.save(
        {"ema": bare, "model": {}, "opt": {}, "args": sit_args()} if wrap == "checkpoint" else bare, tmp_path / "a"
    )
    model, config = load_model(tmp_path / "a", num_heads=g["config"]["num_heads"])
    if wrap == "bare":
        # The process of a bare state dict is what the user says.
        choose_process(tmp_path / "a", config, "flow")
    assert relative(model(g["x"], g["t"], g["y"])[:, :4], g["out"]) < 1e-5
    flow = create_process(**config["diffusion"])
    assert (flow.path, flow.prediction, flow.weight) == ("linear", "velocity", "none")
    assert config["data"] == {"image_size": 64, "classes": None, **PUBLISHED_VAE}


def test_the_weight_of_a_velocity_prediction_is_ignored():
    content = {"ema": tiny().state_dict(), "args": sit_args(model="SiT-T/4", loss_weight="velocity")}
    config, _ = sit.read("a", content, True, {})
    assert create_process(**config["diffusion"]).weight == "none"


def test_the_training_arguments_say_which_flow_it_is(tmp_path):
    args = sit_args(path_type="VP", prediction="noise", loss_weight="likelihood")
    torch.save({"ema": tiny().state_dict(), "args": args}, tmp_path / "a")
    _, config = load_model(tmp_path / "a")
    flow = create_process(**config["diffusion"])
    assert (flow.path, flow.prediction, flow.weight) == ("VP", "noise", "likelihood")
    with pytest.raises(UserError, match="was trained with --process flow"):
        choose_process(tmp_path / "a", config, "gaussian")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path_type": "curved"}, "unknown path type 'curved'"),
        ({"model": "SiT-S/2"}, "holds DiT-T/4, not DiT-S/2"),
        ({"prediction": "colour"}, "says prediction='colour'"),
        ({"encoder_depth": 2, "path_type": "linear", "prediction": "x"}, "REPA's networks predict the velocity"),
        ({"encoder_depth": 2, "path_type": "cosine", "prediction": "v", "weighting": "lognormal"}, "REPA's path 'cosi"),
        ({"encoder_depth": 2, "path_type": "linear", "prediction": "v", "weighting": "beta"}, "the weighting 'beta'"),
        ({"num_classes": 99}, "says num_classes=99, but its table of classes has 8 rows"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, changes, message):
    torch.save({"ema": tiny().state_dict(), "args": sit_args(**changes)}, tmp_path / "a")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a")


def test_the_weighting_of_repa_is_a_distribution_of_times():
    """Its lognormal sigmas give times sigma / (1 + sigma), from a standard normal variable z = log(sigma)."""
    content = {"ema": tiny(learn_sigma=False).state_dict()}
    for weighting, expected in (("uniform", "uniform"), (None, "uniform"), ("lognormal", "logit-normal")):
        content["args"] = sit_args(path_type="linear", prediction="v", encoder_depth=2, weighting=weighting)
        config, _ = sit.read("a", content, True, {})
        flow = create_process(**config["diffusion"])
        assert flow.times.sampling == expected
    # REPA's time is the noise level.
    quantiles = flow.expert_boundaries(4)[1:-1]
    z = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.25, 0.5, 0.75]))
    assert quantiles == pytest.approx((z.exp() / (1 + z.exp())).tolist(), abs=1e-4)


@pytest.mark.parametrize("path_type", ["linear", "cosine", None])
def test_repa_is_called_at_one_minus_t_and_negated(tmp_path, capsys, path_type):
    network = tiny(learn_sigma=False)
    projectors = {"projectors.0.0.weight": torch.zeros(5, 48), "projectors.0.0.bias": torch.zeros(5)}
    content = {"ema": network.state_dict() | projectors}
    if path_type:
        content["args"] = argparse.Namespace(path_type=path_type, prediction="v", encoder_depth=2, model="SiT-T/4")
    torch.save(content, tmp_path / "repa.pt")
    model, config = load_model(tmp_path / "repa.pt")
    x, t, y = inputs()
    assert relative(model(x, t, y), -network(x, 1 - t, y)) < 1e-5
    assert model.config["learn_sigma"] is False
    path = "GVP" if path_type == "cosine" else "linear"
    assert config["diffusion"] == {"process": "flow", "path": path, "prediction": "velocity"}
    assert "called at 1 - t and its output is negated" in config["source"]
    left_out = f"{tmp_path / 'repa.pt'}: left out REPA's projector heads (245 parameters)"
    assert capsys.readouterr().err == f"warning: {left_out}\n"


@pytest.mark.parametrize("encoder_depth", [1, 2])
def test_the_block_names_of_earlier_versions_of_repa(tmp_path, encoder_depth):
    network = tiny(learn_sigma=False)
    state = {}
    for key, value in network.state_dict().items():
        parts = key.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= encoder_depth:
            parts[:2] = "decoder_blocks", str(int(parts[1]) - encoder_depth)
        state[".".join(parts)] = value
    torch.save({"ema": state}, tmp_path / "repa.pt")
    model, config = load_model(tmp_path / "repa.pt")
    x, t, y = inputs()
    assert relative(model(x, t, y), -network(x, 1 - t, y)) < 1e-5
    assert config["diffusion"] == {"process": "flow", "path": "linear", "prediction": "velocity"}


def test_written_files_are_read(tmp_path, capsys):
    models = {"ema": tiny(), "model": tiny()}
    config = CONFIG | {"model": {"name": "DiT-T/4", "backbone": models["ema"].config}}
    sit.write(tmp_path / "a.pt", models, config | {"diffusion": CONFIG["diffusion"] | {"shift": 3.0}})
    assert "cannot record the shift 3" in capsys.readouterr().err
    # No permission to execute code is needed, whatever the version of PyTorch.
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    expected = {"model": "SiT-T/4", "path_type": "GVP", "prediction": "velocity", "loss_weight": None}
    assert stored["args"] == {**expected, "image_size": 64, "num_classes": 7}
    for key, model in models.items():
        back, config = load_model(tmp_path / "a.pt", ema=key == "ema")
        assert create_process(**config["diffusion"]).path == "GVP"
        for name, value in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], value)


@torch.no_grad()
def test_a_folded_expert_is_a_sit(tmp_path):
    """All experts of a RemixDiT whose bases are the published network are the published network."""
    g = golden("sit.pt")
    dit = DiT(**g["config"])
    dit.load_state_dict(g["state_dict"])
    expert = RemixDiT(dit, n_basis=2, n_experts=4, boundaries=[0, 0.25, 0.5, 0.75, 1]).expert(2)
    sit.write(tmp_path / "a.pt", {"ema": expert}, CONFIG | {"model": {"name": "custom", "backbone": dit.config}})
    model, _ = load_model(tmp_path / "a.pt", num_heads=g["config"]["num_heads"])
    assert relative(model(g["x"], g["t"], g["y"])[:, :4], g["out"]) < 1e-5


def test_only_flows_are_written(tmp_path):
    config = {"diffusion": {}, "data": {}, "model": {"name": "DiT-T/4"}}
    with pytest.raises(UserError, match="trained with Gaussian diffusion"):
        sit.write(tmp_path / "a.pt", {"ema": tiny()}, config)
    assert not list(tmp_path.iterdir())


def test_content_of_other_formats_is_not_read():
    state = tiny().state_dict()
    for content in (
        {},
        state,
        {"ema": state, "args": argparse.Namespace(model="DiT-T/4")},
        {"ema": {}, "args": sit_args()},
        {"args": "text", **state},
    ):
        assert sit.read("a.pt", content, True, {}) is None


def test_files_start_training(features, tmp_path):
    """A REPA model starts a flow, with its C output channels. A flow does not start Gaussian diffusion."""
    network = tiny(in_channels=3, num_classes=3, learn_sigma=False)
    args = argparse.Namespace(path_type="linear", prediction="v", encoder_depth=2)
    torch.save({"ema": network.state_dict(), "args": args}, tmp_path / "repa.pt")
    flags = [
        *training_flags(features, tmp_path, "warm", "RemixDiT-T/4"),
        "--load-weight",
        tmp_path / "repa.pt",
        "--max-steps=1",
    ]
    run("train_fast.py", *flags, "--process=flow", "--lr=1e-9", "--coeff-lr=0")
    model, config = load_model(tmp_path / "warm/checkpoints/0000001.pt")
    assert config["diffusion"]["process"] == "flow"
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)
    with torch.no_grad():
        assert relative(model(x, t, y), -network(x, 1 - t, y)) < 1e-4
    for wrong, message in (
        ([], "was trained with process=flow, this run has gaussian"),
        (["--process=flow", "--path=GVP"], "was trained with path=linear, this run has GVP"),
    ):
        assert message in run("train_fast.py", *flags, *wrong, "--prefix=no", expect=2).stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({sit.TIME_LAYER: None}, "it has no tensor t_embedder.mlp.0.weight"),
        ({"final_layer.linear.weight": None}, "it has no tensor final_layer.linear.weight"),
        ({sit.TIME_LAYER: torch.zeros(48, 255)}, "t_embedder.mlp.0.weight does not have 256 columns"),
    ],
)
def test_damaged_files_of_repa(tmp_path, changes, message):
    state = {key: value for key, value in (tiny().state_dict() | changes).items() if value is not None}
    torch.save({"ema": state, "args": argparse.Namespace(encoder_depth=2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a.pt")


def test_timestep_frequencies_of_a_repa(tmp_path):
    """The time is reversed with the frequencies that the user gives."""
    network = tiny(frequency_shift=1, learn_sigma=False)
    torch.save({"ema": network.state_dict(), "args": argparse.Namespace(encoder_depth=2)}, tmp_path / "a.pt")
    model, _ = load_model(tmp_path / "a.pt", frequency_shift=1)
    x, t, y = inputs()
    assert relative(model(x, t, y), -network(x, 1 - t, y)) < 1e-5


def batch_norm(channels: int) -> dict[str, torch.Tensor]:
    """The tensors of REPA-E's batch norm over the latents."""
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    return {"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(7)}


@pytest.mark.parametrize("channels", [4, 32])
def test_the_batch_norm_of_repa_e_is_the_normalization_of_the_latents(tmp_path, capsys, channels):
    network, norm = tiny(learn_sigma=False, in_channels=channels), batch_norm(channels)
    kind, pixels = ("f8d4", 64) if channels == 4 else ("f16d32", 128)
    args = argparse.Namespace(path_type="linear", prediction="v", encoder_depth=2, vae=kind, resolution=pixels)
    content = {"ema": network.state_dict() | norm, "vae": {}, "discriminator": {}, "args": args, "steps": 3}
    torch.save(content, tmp_path / "repa-e.pt")
    model, config = load_model(tmp_path / "repa-e.pt")
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, channels, 8, 8, generator=generator), torch.tensor([0.2, 0.7]), torch.arange(2)
    assert relative(model(x, t, y), -network(x, 1 - t, y)) < 1e-5
    expected = (x - norm["bn.running_mean"][:, None, None]) / norm["bn.running_var"].sqrt()[:, None, None]
    torch.testing.assert_close(Normalization.from_record(config["data"]).apply(x, x)[0], expected)
    assert config["data"]["vae"] is None, "its VAE was trained with it"
    assert config["data"]["image_size"] == pixels
    sit.write(tmp_path / "sit.pt", {"ema": model}, config)
    assert "cannot record the VAE and the normalization of the latents" in capsys.readouterr().err
    # The second is the default of extract_features.py.
    for name in ("stabilityai/sd-vae-ft-mse", "ema"):
        published = config["data"] | PUBLISHED_VAE | {"vae": name}
        sit.write(tmp_path / "sit.pt", {"ema": model}, config | {"data": published})
        assert ("cannot record" in capsys.readouterr().err) == (channels != 4), "published VAEs give equal latents"
    named = config | {"data": published | {"classes": ["a", "b"]}}
    sit.write(tmp_path / "sit.pt", {"ema": model}, named)
    number = config["model"]["backbone"]["num_classes"]
    assert f"cannot record that only 2 of its {number} classes were trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn.running_var": torch.ones(3)}, "does not have a mean and variance per channel"),
        ({"bn.running_var": torch.zeros(4)}, "does not have a mean and variance per channel"),
        ({"bn.running_var": torch.full((4,), torch.inf)}, "does not have a mean and variance per channel"),
        ({"bn.running_mean": torch.full((4,), torch.nan)}, "does not have a mean and variance per channel"),
        ({"bn.weight": torch.ones(4)}, "has affine parameters"),
    ],
)
def test_a_damaged_batch_norm(tmp_path, changes, message):
    torch.save({"ema": tiny(learn_sigma=False).state_dict() | batch_norm(4) | changes}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a.pt")
