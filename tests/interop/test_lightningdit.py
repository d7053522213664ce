"""Files of LightningDiT: outputs equal those of the published network, and what the tensors show is found."""

import pytest
import torch
from conftest import golden, relative, run, training_flags

from checkpoint import load_model, model_config
from diffusion import create_flow, create_process
from interop import lightningdit
from interop.own import save_checkpoint
from models import DiT, DiT_models, LightningDiT, LightningDiT_models
from remix import RemixDiT
from runtime import hub
from runtime.errors import UserError

SETTINGS = ("xl-vavae", "qknorm", "qknorm-layernorm", "no-shift", "rope-only", "rmsnorm-only", "learn-sigma")
# What a training checkpoint of LightningDiT says of xl-vavae.
CONFIG = {
    "model": {"model_type": "a size of one's own", "use_swiglu": True, "use_rope": True, "use_rmsnorm": True},
    "data": {"image_size": 64, "num_classes": 10},
    "transport": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None},
}
CONFIG["model"] |= {"use_qknorm": False, "wo_shift": False, "in_chans": 32}


@pytest.fixture(scope="module")
def published() -> dict:
    return golden("lightningdit.pt")


def wrapped(state: dict, wrap: str) -> dict:
    """A state dict as one kind of file holds it."""
    prefixed = {f"module.{key}": value for key, value in state.items()}
    return {
        "bare": state,
        "ddp": prefixed,
        "ema": {"ema": state, "model": {}, "opt": {}, "config": CONFIG},
        "model": {"model": prefixed},
    }[wrap]


def tiny(**options) -> LightningDiT:
    """A tiny model whose output is not zero."""
    shape = dict(input_size=4, in_channels=32, num_classes=7)
    model = LightningDiT_models["LightningDiT-T/1"](**shape | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_published_files_give_published_outputs(published, tmp_path, name):
    """The numbers of heads are those of the tables of angles, or of the normalization of queries, if there are any."""
    g = published[name]
    torch.save(g["state_dict"], tmp_path / "a.pt")
    shown = g["config"].keys() & {"use_rope", "use_qknorm"}
    if not shown:
        with pytest.raises(UserError, match="specify its number of heads"):
            load_model(tmp_path / "a.pt")
    model, config = load_model(tmp_path / "a.pt", **({} if shown else {"num_heads": 3}))
    assert g["config"].items() <= model.config.items()
    assert relative(model(g["x"], g["t"], g["y"])[:, : g["x"].shape[1]], g["out"]) < 1e-5
    remix = RemixDiT(model, n_basis=1, n_experts=1, mixer="one-hot", boundaries=[0, 1])
    assert relative(remix(g["x"], g["t"], g["y"], groups=1)[:, : g["x"].shape[1]], g["out"]) < 1e-5
    # Written and read again, bit for bit.
    lightningdit.write(tmp_path / "b.pt", {"ema": remix.expert(0), "model": model}, config)
    state = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]
    assert state.keys() == g["state_dict"].keys()
    assert all(torch.equal(value, g["state_dict"][key]) for key, value in state.items())
    again, config_again = load_model(tmp_path / "b.pt")
    assert (again.config, config_again) == (model.config, config)


@pytest.mark.parametrize("wrap", ["bare", "ddp", "ema", "model"])
@torch.no_grad()
def test_every_kind_of_file_is_read(published, tmp_path, monkeypatch, wrap):
    """Also from the hub."""
    g = published["xl-vavae"]
    torch.save(wrapped(g["state_dict"], wrap), tmp_path / "a.pt")
    monkeypatch.setattr("runtime.hub.offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(tmp_path / "a.pt"))
    hub.local_file.cache_clear()
    model, config = load_model("hf:hustvl/lightningdit/a.pt")
    hub.local_file.cache_clear()
    assert isinstance(model, LightningDiT)
    assert relative(model(g["x"], g["t"], g["y"]), g["out"]) < 1e-5
    flow = create_process(**config["diffusion"])
    assert (flow.path, flow.prediction, flow.weight) == ("linear", "velocity", "none")
    assert config["data"] == {"image_size": 64, "classes": None, "vae": "none", "scale": 1.0, "shift": 0.0}


@torch.no_grad()
def test_losses_and_chains_match_the_published_implementation(published, tmp_path):
    """The chains without guidance. A shift s of the time t is one of 1 / s of the noise levels."""
    g = golden("lightningdit_transport.pt")
    torch.save(published["xl-vavae"]["state_dict"], tmp_path / "a.pt")
    model, config = load_model(tmp_path / "a.pt")
    losses = create_process(**config["diffusion"]).training_losses(model, g["x1"], g["t"], {"y": g["y"]}, g["x0"])
    assert relative(losses["loss"], g["mse"]) < 1e-5
    for shift in (0.0, 0.3, 3.0):
        flow = create_flow(shift=1 / shift if shift else 1.0)
        out = flow.ode_sample_loop(model, g["z"].shape, g["z"], steps=10, model_kwargs={"y": g["y"]})
        assert relative(out, g["chains"][f"euler/points=11/shift={shift}/scale=1.0/interval_start=0.0"]) < 1e-4


def test_the_number_of_heads_on_the_command_line(published, tmp_path):
    g = published["rmsnorm-only"]
    torch.save(g["state_dict"], tmp_path / "a.pt")
    run("convert.py", "--num-heads", 3, tmp_path / "a.pt", tmp_path / "b.pt", "--to=lightningdit")
    assert load_model(tmp_path / "b.pt")[0].config["num_heads"] == 3
    for heads, message in (
        ("3,3", "specifies a model that cannot be built"),
        ("3,a", "expected a whole number at least 1"),
    ):
        done = run("convert.py", tmp_path / "a.pt", tmp_path / "c.pt", "--to=sit", "--num-heads", heads, expect=2)
        assert message in done.stderr


def test_registered_models_are_recognized(tmp_path):
    """Whatever the options are."""
    model = tiny(use_qknorm=True, wo_shift=True, mlp_ratio=3.3)
    torch.save({"ema": model.state_dict(), "config": {"model": {"model_type": "LightningDiT-T/1"}}}, tmp_path / "t.pt")
    loaded, config = load_model(tmp_path / "t.pt", num_classes=7, use_rope=True)
    assert config["model"]["name"] == "LightningDiT-T/1"
    assert loaded.blocks[0].mlp.w3.in_features == model.blocks[0].mlp.w3.in_features
    assert loaded.config["num_heads"] == 3
    # Registered models need no angles to show their heads.
    torch.save(tiny(use_rope=False).state_dict(), tmp_path / "t.pt")
    assert load_model(tmp_path / "t.pt")[0].config["num_heads"] == 3


@pytest.mark.parametrize(("use_swiglu", "inner"), [(True, 81), (False, 122)])
def test_a_ratio_that_is_rounded(tmp_path, use_swiglu, inner):
    """In floating point, 28 * (122 / 28) is below 122."""
    shape = dict(hidden_size=28, num_heads=1, depth=1, use_qknorm=True, use_rope=False)
    model = tiny(**shape, use_swiglu=use_swiglu, mlp_ratio=122.5 / 28)
    torch.save(model.state_dict(), tmp_path / "t.pt")
    mlp = load_model(tmp_path / "t.pt")[0].blocks[0].mlp
    assert (mlp.w3 if use_swiglu else mlp.fc2).in_features == inner


@pytest.mark.parametrize(
    ("stored", "overrides", "message"),
    [
        ({"use_rope": False}, {}, "says use_rope=False, but its tensors have True"),
        ({"use_qknorm": True}, {}, "says use_qknorm=True, but its tensors have False"),
        ({"wo_shift": True}, {}, "says wo_shift=True, but its tensors have False"),
        ({"in_chans": 4}, {}, "says in_channels=4, but its tensors have 32"),
        ({"num_classes": 9}, {}, "says num_classes=9, but its table of classes has 8 rows"),
        ({"num_heads": 6}, {}, "says num_heads=6, but its tensors have 3"),
        ({"model_type": "LightningDiT-XL/1"}, {}, "holds LightningDiT-T/1, not LightningDiT-XL/1"),
        ({"path_type": "curved"}, {}, "unknown path type 'curved'"),
        ({"prediction": "colour"}, {}, "says prediction='colour'"),
        ({}, {"model": "DiT-T/2"}, "holds LightningDiT-T/1, not DiT-T/2"),
        ({}, {"num_heads": 6}, "holds num_heads=3, not 6"),
        ({}, {"frequency_shift": 1}, "unknown model option frequency_shift"),
    ],
)
def test_contradictions(tmp_path, stored, overrides, message):
    torch.save({"ema": tiny().state_dict(), "config": {"data": {}, "model": stored}}, tmp_path / "t.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "t.pt", **overrides)


def test_an_expert_is_converted_and_trained_on(tmp_path, features):
    """An expert of a Remix becomes a file of LightningDiT with EMA and raw weights, which starts a run."""
    shape = dict(input_size=8, in_channels=3, num_classes=3, patch_size=2, use_qknorm=True)
    remix = RemixDiT(tiny(**shape), n_basis=2, n_experts=4, boundaries=[0, 0.25, 0.5, 0.75, 1])
    for _, layer in remix.mixed():
        layer.weight.data += 0.1 * torch.randn_like(layer.weight)
    config = {"model": model_config("custom", remix), "diffusion": {"process": "flow"}, "training": {}}
    config["data"] = {"image_size": 8, "classes": None, "vae": "none", "scale": 1.0, "shift": 0.0}
    state = remix.state_dict()
    save_checkpoint(tmp_path / "remix.pt", {"config": config, "model": state, "ema": state})
    run("convert.py", tmp_path / "remix.pt", tmp_path / "expert.pt", "--to=lightningdit", "--expert=2")
    expert, loaded = load_model(tmp_path / "expert.pt", ema=False)
    assert loaded["data"] == config["data"]
    assert all(torch.equal(value, expert.state_dict()[key]) for key, value in remix.expert(2).state_dict().items())
    flags = [*training_flags(features, tmp_path, "warm", "RemixLightningDiT-T/2"), "--process=flow", "--max-steps=1"]
    flags += ["--lr=1e-9", "--coeff-lr=0"]
    run("train_fast.py", *flags, "--load-weight", tmp_path / "expert.pt")
    trained, _ = load_model(tmp_path / "warm/checkpoints/0000001.pt")
    assert trained.backbone_config["use_qknorm"], "options that no flag sets are those of the file"
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)
    with torch.no_grad():
        assert relative(trained(x, t, y), remix.expert(2)(x, t, y)) < 1e-4
    torch.save(tiny(input_size=8, num_classes=3, patch_size=2).state_dict(), tmp_path / "latents.pt")
    torch.save({"state_dict": {"encoder.conv_in.weight": x}}, tmp_path / "vavae.pt")
    for file, message in (
        ("latents.pt", "latents.pt has in_channels=32, this run needs 3"),
        ("vavae.pt", "holds an autoencoder such as VA-VAE, not a denoiser"),
    ):
        done = run("train_fast.py", *flags, "--prefix=no", "--load-weight", tmp_path / file, expect=2)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    for to, message in (("rae", "for a DiTDH"), ("dit", "for a DiT,"), ("diffusers", "for a DiT,")):
        done = run("convert.py", tmp_path / "remix.pt", tmp_path / "no", "--to", to, "--expert=2", expect=2)
        assert message in done.stderr
    save_checkpoint(tmp_path / "gaussian.pt", {"config": config | {"diffusion": {}}, "model": state, "ema": state})
    done = run("convert.py", tmp_path / "gaussian.pt", tmp_path / "no", "--to=lightningdit", "--merge=mean", expect=2)
    assert "was trained with Gaussian diffusion" in done.stderr
    assert not (tmp_path / "no").exists()


def test_files_that_are_not_read(published, tmp_path):
    """Each refusal says what the file holds, in one line."""
    plain = DiT(input_size=4, patch_size=1, in_channels=32, hidden_size=48, depth=1, num_heads=3, learn_sigma=False)
    bare, config = plain.state_dict(), {"model": {"model_type": "LightningDiT-XL/1"}}
    lightning = published["xl-vavae"]["state_dict"]
    renamed = {key.replace("x_embedder.proj", "x_embedder.proj1"): value for key, value in lightning.items()}
    decoder = {"encoder.conv_in.weight": torch.zeros(1), "decoder.conv_out.weight": torch.zeros(1)}
    for content, message in (
        ({"ema": bare, "config": config}, "holds a LightningDiT without rotary embeddings"),
        (bare, "holds a network of REPA, .* or a LightningDiT without any of its options"),
        ({"model": {f"net.{key}": value for key, value in renamed.items()}}, "holds a JiT"),
        ({"state_dict": {f"denoiser.{key}": value for key, value in lightning.items()}}, "holds a DDT"),
        ({"s_embedder.proj.weight": torch.zeros(48, 16), **lightning}, "holds a DDT"),
        ({"state_dict": decoder}, "holds an autoencoder such as VA-VAE, not a denoiser"),
        (decoder, "holds an autoencoder such as VA-VAE, not a denoiser"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=message) as error:
            load_model(tmp_path / "a.pt")
        assert "\n" not in str(error.value)


def test_content_of_other_formats_is_not_read():
    state = tiny().state_dict()
    for content in (
        {},
        DiT_models["DiT-T/4"](input_size=8).state_dict(),
        {**state, "pos_embed": torch.zeros(())},
        {**state, "blocks.0.mlp.w3.weight": torch.zeros(())},
        {key: value for key, value in state.items() if "y_embedder" not in key},
    ):
        assert lightningdit.read("a.pt", content, True, {}) is None
