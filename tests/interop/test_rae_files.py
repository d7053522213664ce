"""Files of RAE's DiT^DH: the network that is read gives the published outputs, negated and at 1 - t."""

import pytest
import torch
from conftest import golden, relative, run, training_flags

from checkpoint import load_model, model_config
from diffusion import create_process
from interop import rae
from interop.own import save_safetensors
from interop.sit import TIME_LAYER
from models import DiTDH, DiTDH_models
from remix import RemixDiT
from runtime.errors import UserError

SETTINGS = ("dh", "same-width", "layernorm-gelu", "qknorm-no-pos")


@pytest.fixture(scope="module")
def published() -> dict:
    return golden("ditdh.pt")


def tiny(**options) -> DiTDH:
    """A tiny model whose output is not zero."""
    model = DiTDH_models["DiTDH-T/1"](**dict(input_size=4, in_channels=24, num_classes=7) | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("wrap", ["bare", "ddp", "ema", "model"])
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_published_files_give_published_outputs(published, tmp_path, name, wrap):
    g = published[name]
    state = {f"module.{key}" if wrap == "ddp" else key: value for key, value in g["state_dict"].items()}
    torch.save({wrap: state} if wrap in ("ema", "model") else state, tmp_path / "a.pt")
    model, config = load_model(tmp_path / "a.pt")
    assert g["config"].items() <= model.config.items()
    out = -model(g["x"], 1 - g["t"], g["y"])
    assert relative(out, g["out"]) < 1e-5
    remix = RemixDiT(model, n_basis=1, n_experts=1, mixer="one-hot", boundaries=[0, 1])
    assert relative(-remix(g["x"], 1 - g["t"], g["y"], groups=1), g["out"]) < 1e-5
    shift = (24 * 4 * 4 / 4096) ** 0.5
    assert config["diffusion"] == {"process": "flow", "path": "linear", "prediction": "velocity", "shift": shift}
    assert "called at 1 - t and its output is negated" in config["source"]
    # Written and read again, bit for bit, except for the layer that is rotated and rotated back.
    rae.write(tmp_path / "b.pt", {"ema": remix.expert(0)}, config)
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert state.keys() == g["state_dict"].keys()
    assert (state.pop(TIME_LAYER) - g["state_dict"][TIME_LAYER]).abs().max() < 1e-6
    assert all(torch.equal(value, g["state_dict"][key]) for key, value in state.items())
    assert load_model(tmp_path / "b.pt")[1] == config


@torch.no_grad()
def test_losses_match_the_published_implementation(published, tmp_path):
    g = golden("ditdh_transport.pt")
    torch.save(published["dh"]["state_dict"], tmp_path / "a.pt")
    model, config = load_model(tmp_path / "a.pt")
    flow = create_process(**config["diffusion"])
    for vectors in g["losses"].values():
        losses = flow.training_losses(model, g["x1"], 1 - vectors["t"], {"y": g["y"]}, g["x0"])
        assert relative(losses["loss"], vectors["loss"]) < 1e-5


def test_what_the_tensors_show(tmp_path):
    """The heads without rotary embeddings, and the blocks of each part if both have one width, may be hidden."""
    torch.save(tiny().state_dict(), tmp_path / "t.pt")
    _, config = load_model(tmp_path / "t.pt", num_heads=(3, 2))
    assert config["model"]["name"] == "DiTDH-T/1"
    assert config["data"]["image_size"] == 4
    torch.save(tiny(use_rope=False).state_dict(), tmp_path / "t.pt")
    assert load_model(tmp_path / "t.pt")[0].config["num_heads"] == [3, 2], "that of the registry"
    torch.save(tiny(use_rope=False, depth=[1, 1], mlp_ratio=3.3).state_dict(), tmp_path / "t.pt")
    with pytest.raises(UserError, match=r"width \[48, 64\], depth \[1, 1\]\): specify its number of heads"):
        load_model(tmp_path / "t.pt")
    for given, heads in ((4, [4, 4]), ([3, 2], [3, 2])):
        assert load_model(tmp_path / "t.pt", num_heads=given)[0].config["num_heads"] == heads
    torch.save(tiny(hidden_size=[48, 48], depth=[2, 1], num_heads=[3, 3]).state_dict(), tmp_path / "t.pt")
    with pytest.raises(UserError, match="specify how its 3 blocks are divided"):
        load_model(tmp_path / "t.pt")
    for given in ([2, 1], (2, 1)):
        assert load_model(tmp_path / "t.pt", depth=given)[0].config["depth"] == [2, 1]
    torch.save({"ema": torch.load(tmp_path / "t.pt"), "args": {"depth": ["2", "1"]}}, tmp_path / "t.pt")
    with pytest.raises(UserError, match="specify how its 3 blocks are divided"):
        load_model(tmp_path / "t.pt")


@pytest.mark.parametrize(
    ("stored", "overrides", "message"),
    [
        ({"hidden_size": [48, 48]}, {}, r"says hidden_size=\[48, 48\], but its tensors have \[48, 64\]"),
        ({"depth": [1, 2]}, {}, r"says depth=\[1, 2\], but its tensors have \[2, 1\]"),
        ({"num_heads": [3, 4]}, {}, r"says num_heads=\[3, 4\], but its tensors have \[3, 2\]"),
        ({"num_heads": ["3", 4]}, {}, "says '3' where a number is needed"),
        ({"use_pos_embed": False}, {}, "says use_pos_embed=False, but its tensors have True"),
        ({}, {"num_heads": 3}, r"holds num_heads=\[3, 2\], not \[3, 3\]"),
        ({}, {"model": "DiTDH-XL/1"}, "holds DiTDH-T/1, not DiTDH-XL/1"),
    ],
)
def test_contradictions(tmp_path, stored, overrides, message):
    torch.save({"ema": tiny().state_dict(), "args": stored}, tmp_path / "t.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "t.pt", **overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({TIME_LAYER: None}, "it has no tensor t_embedder.mlp.0.weight"),
        ({"final_layer.linear.weight": None}, "it has no tensor final_layer.linear.weight"),
        ({"t_embedder.W": torch.zeros(5)}, "t_embedder.mlp.0.weight does not have 10 columns"),
    ],
)
def test_damaged_files(tmp_path, changes, message):
    state = {key: value for key, value in (tiny().state_dict() | changes).items() if value is not None}
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "t.pt")


def test_a_merged_remix_is_converted_and_trained_on(tmp_path, features):
    plain = tiny(input_size=8, in_channels=3, num_classes=3)
    remix = RemixDiT(plain, n_basis=2, n_experts=4, boundaries=[0, 0.25, 0.5, 0.75, 1])
    config = {"model": model_config("custom", remix), "diffusion": {"process": "flow"}, "training": None}
    config["data"] = {"image_size": 8, "classes": None, "vae": "none", "scale": 1.0, "shift": 0.0}
    save_safetensors(tmp_path / "remix.safetensors", remix, config)
    run("convert.py", tmp_path / "remix.safetensors", tmp_path / "rae.pt", "--to=rae", "--merge=mean")
    back = load_model(tmp_path / "rae.pt")[0].state_dict()
    for key, value in remix.merge().state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=1e-6 if key == TIME_LAYER else 0)
    flags = [*training_flags(features, tmp_path, "warm", "RemixDiTDH-T/1"), "--process=flow", "--max-steps=1"]
    flags += ["--lr=1e-9", "--coeff-lr=0", "--checkpoint-activations"]
    run("train_fast.py", *flags, "--load-weight", tmp_path / "rae.pt")
    trained, _ = load_model(tmp_path / "warm/checkpoints/0000001.pt")
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)
    with torch.no_grad():
        assert relative(trained(x, t, y), plain(x, t, y)) < 1e-4
    for process in ({"process": "gaussian"}, {"process": "flow", "path": "GVP"}):
        with pytest.raises(UserError, match="holds a flow of the linear path"):
            rae.write(tmp_path / "no.pt", {"ema": remix.merge()}, config | {"diffusion": process})


def test_content_of_other_formats_is_not_read():
    state = tiny().state_dict()
    for content in ({}, {key: value for key, value in state.items() if key != "t_embedder.W"}):
        assert rae.read("a.pt", content, True, {}) is None
    assert rae.read("a.pt", state | {"blocks.2.mlp.w3.weight": torch.zeros(1)}, True, {}) is None
