"""Files of facebookresearch/DiT: outputs equal the published ones, and what the tensors show is found."""

import argparse

import pytest
import torch
from conftest import golden, relative
from safetensors.torch import save_file

from checkpoint import load_model, model_config
from interop import dit
from models import DiT, DiT_models
from runtime.errors import UserError


@pytest.mark.parametrize("wrap", ["bare", "ema", "ddp"])
@torch.no_grad()
def test_published_files_give_published_outputs(tmp_path, wrap):
    g = golden("dit.pt")
    state = g["state_dict"]
    if wrap == "ema":
        state = {"ema": state, "model": {}, "opt": {}, "args": argparse.Namespace(model="an unregistered DiT-XL/2")}
    elif wrap == "ddp":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save(state, tmp_path / "dit.pt")
    model, config = load_model(tmp_path / "dit.pt", num_heads=4)
    assert relative(model(g["x"], g["t"], g["y"]), g["out"]) < 1e-5
    backbone = config["model"]["backbone"]
    assert {key: backbone[key] for key in g["config"]} == g["config"]
    assert (config["data"]["scale"], config["data"]["image_size"]) == (0.18215, 64)


def test_registered_models_are_recognized(tmp_path):
    torch.save(DiT_models["DiT-T/2"](input_size=8, num_classes=7).state_dict(), tmp_path / "t.pt")
    model, config = load_model(tmp_path / "t.pt")
    assert isinstance(model, DiT)
    assert config["model"]["name"] == "DiT-T/2"
    assert model.config["num_heads"] == 3
    load_model(tmp_path / "t.pt", model="DiT-T/2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "RemixDiT-T/2"}, "holds DiT-T/2, not RemixDiT-T/2"),
        ({"model": "DiT-S/2"}, "holds DiT-T/2, not DiT-S/2"),
        ({"model": "DiT-U/2"}, "unknown model 'DiT-U/2'"),
        ({"num_classes": 9}, "holds num_classes=7, not 9"),
        ({"colour": 1}, "unknown model option colour"),
    ],
)
def test_overrides_must_not_contradict_the_tensors(tmp_path, overrides, message):
    torch.save(DiT_models["DiT-T/2"](input_size=8, num_classes=7).state_dict(), tmp_path / "t.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "t.pt", **overrides)


def test_stored_training_arguments_name_the_model(tmp_path):
    state = DiT_models["DiT-T/2"](input_size=8).state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(model="DiT-S/2")}, tmp_path / "t.pt")
    with pytest.raises(UserError, match="holds DiT-T/2, not DiT-S/2"):
        load_model(tmp_path / "t.pt")
    load_model(tmp_path / "t.pt", model="DiT-T/2")


@pytest.mark.parametrize("as_config", [False, True])
@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"num_classes": 9}, "says num_classes=9, but its table of classes has 8 rows"),
        ({"num_classes": 8, "cfg_prob": 0.1}, "says num_classes=8 and a label dropout of 0.1, but its table"),
        ({"class_dropout_prob": 0, "num_classes": 7}, "says num_classes=7 and a label dropout of 0, but"),
        ({"num_classes": "7"}, "says '7' where a number is needed"),
        ({"in_channels": 3}, "says in_channels=3, but its tensors have 4"),
        ({"patch_size": 4}, "says patch_size=4, but its tensors have 2"),
        ({"depth": 5}, "says depth=5, but its tensors have"),
        ({"learn_sigma": False}, "says learn_sigma=False, but its tensors have True"),
        ({"image_size": 128}, "says that its images have 128 pixels per side, but"),
        ({"model": "DiT-S/2"}, "holds DiT-T/2, not DiT-S/2"),
        ({"path_type": "Linear"}, "says that its model is a flow, but not"),
        ({"model": "SiT-T/2"}, "says that its model is a flow, but not"),
        ({"noise_schedule": "wave"}, "says that its process is"),
        ({"vae": "owner/other-vae"}, "says vae='owner/other-vae', whose normalization it does not say"),
    ],
)
def test_what_a_file_says_is_compared_with_its_tensors(tmp_path, as_config, stored, message):
    state = DiT_models["DiT-T/2"](input_size=8, num_classes=7).state_dict()
    said = {"config": {"data": {}, **stored}} if as_config else {"args": argparse.Namespace(**stored)}
    torch.save({"ema": state} | said, tmp_path / "t.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "t.pt")


@pytest.mark.parametrize(
    ("channels", "stored", "message"),
    [
        (16, {"image_size": 64}, None),
        (32, {"image_size": 128}, None),
        (16, {"image_size": 60}, "60 pixels per side, but its model denoises 16 channels of side 8"),
        (16, {"resolution": 24}, "24 pixels per side, but its model denoises 16 channels of side 8"),
        (3, {"image_size": 64}, "64 pixels per side, but its model denoises 3 channels of side 8"),
        (16, {"vae": "ema"}, "says vae='ema', whose latents have 4 channels, but its tensors have 16"),
        (3, {"vae": "stabilityai/sd-vae-ft-mse"}, "whose latents have 4 channels, but its tensors have 3"),
    ],
)
def test_images_and_vaes_of_other_channels(capsys, channels, stored, message):
    content = {"ema": DiT_models["DiT-T/2"](input_size=8, in_channels=channels).state_dict(), "args": stored}
    if message:
        with pytest.raises(UserError, match=message):
            dit.read("a.pt", content, True, {})
    else:
        config, _ = dit.read("a.pt", content, True, {})
        data = {**stored, "classes": None, "vae": "none", "scale": 1.0, "shift": 0.0}
        assert config["data"] == data
        assert "it does not say of which VAE" in capsys.readouterr().err


def test_what_a_file_says_is_used(tmp_path):
    dit = DiT_models["DiT-T/2"](input_size=8, num_classes=8, class_dropout_prob=0)
    cases = (
        ({"args": {"num_classes": 8}}, {}),
        ({"config": {"model": {"class_dropout_prob": 0.0}}}, {}),
        ({}, {"class_dropout_prob": 0}),
    )
    for said, overrides in cases:
        torch.save({"ema": dit.state_dict()} | said, tmp_path / "t.pt")
        model, _ = load_model(tmp_path / "t.pt", **overrides)
        assert (model.num_classes, model.config["class_dropout_prob"]) == (8, 0)
    stored = dict(
        num_heads=4, vae="mse", noise_schedule="squaredcos_cap_v2", image_size=64, num_classes=7, cfg_prob=0.2
    )
    torch.save({"ema": dit.state_dict(), "args": argparse.Namespace(**stored)}, tmp_path / "t.pt")
    model, config = load_model(tmp_path / "t.pt")
    assert (model.config["num_heads"], model.config["class_dropout_prob"], model.num_classes) == (4, 0.2, 7)
    assert (config["model"]["name"], config["data"]["vae"]) == ("custom", "stabilityai/sd-vae-ft-mse")
    assert config["diffusion"] == {"process": "gaussian", "noise_schedule": "squaredcos_cap_v2"}
    with pytest.raises(UserError, match="holds num_heads=4, not 3"):
        load_model(tmp_path / "t.pt", num_heads=3)


def test_written_files_are_read(tmp_path):
    models = {key: DiT_models["DiT-T/4"](input_size=8) for key in ("ema", "model")}
    dit.write(tmp_path / "t.pt", models, {"model": model_config("DiT-T/4", models["ema"]), "diffusion": {}, "data": {}})
    for key, model in models.items():
        back, _ = load_model(tmp_path / "t.pt", ema=key == "ema")
        for name, value in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], value)


@pytest.mark.parametrize("text", ["a text", "[1, 2]", "3", "{", ""])
def test_a_config_of_another_project_in_safetensors_is_no_config_of_ours(tmp_path, text):
    dit = DiT_models["DiT-T/4"](input_size=8)
    save_file(dit.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt", "config": text})
    model, _ = load_model(tmp_path / "a.safetensors")
    assert torch.equal(model.state_dict()["pos_embed"], dit.state_dict()["pos_embed"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "{", "version": "3"}, "its metadata are not those of a checkpoint: Expecting"),
        ({"config": "{}", "version": "three"}, "its metadata are not those of a checkpoint: invalid literal"),
        ({"config": '{"model": "DiT-T/4"}', "version": "3"}, "its config does not describe a model"),
        ({"config": "[]", "version": "3"}, "its config does not describe a model"),
    ],
)
def test_damaged_metadata_of_ours_are_named(tmp_path, metadata, message):
    state = DiT_models["DiT-T/4"](input_size=8).state_dict()
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "remix-dit"} | metadata)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a.safetensors")


def test_content_of_other_formats_is_not_read():
    state = DiT_models["DiT-T/4"](input_size=8).state_dict()
    for content in (
        {},
        {"ema": None},
        {"step": 3, "weight": torch.zeros(2)},
        {"weight": torch.zeros(2)},
        {**state, "pos_embed": torch.zeros(())},
        {**state, "x_embedder.proj.weight": torch.zeros(0, 4, 0, 0)},
    ):
        assert dit.read("a.pt", content, True, {}) is None
