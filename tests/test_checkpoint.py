import argparse

import pytest
import torch
from conftest import GOLDEN, golden, relative

from checkpoint import build_model, load_model, model_config, read_checkpoint, save_checkpoint
from common import UserError, atomic_write
from models import DiT, DiT_models
from remix import RemixDiT, RemixDiT_models


def save(path, model, name, **more):
    config = {"model": model_config(name, model), "diffusion": {}, "data": {}, "training": {}}
    averaged = {key: value + 1 for key, value in model.state_dict().items()}
    save_checkpoint(path, {"config": config, "step": 3, "model": model.state_dict(), "ema": averaged, **more})


@pytest.mark.parametrize("mixer", ["softmax", "raw", "one-hot"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_round_trip(tmp_path, mixer, scope):
    model = RemixDiT_models["RemixDiT-T/2"](
        input_size=8, num_classes=5, n_basis=2, n_experts=6, mixer=mixer, scope=scope
    )
    save(tmp_path / "a.pt", model, "RemixDiT-T/2")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 3
    raw, config = load_model(tmp_path / "a.pt", ema=False)
    averaged, _ = load_model(tmp_path / "a.pt")
    assert not raw.training
    assert config["model"]["name"] == "RemixDiT-T/2"
    for key, value in model.state_dict().items():
        assert torch.equal(raw.state_dict()[key], value)
        assert torch.equal(averaged.state_dict()[key], value + 1)
    assert build_model(config["model"]).config == model.config


@pytest.mark.parametrize("wrap", ["bare", "ema", "ddp"])
@torch.no_grad()
def test_facebooks_files(tmp_path, wrap):
    g = golden("dit.pt")
    state = g["state_dict"]
    if wrap == "ema":
        state = {"ema": state, "model": {}, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2 of old")}
    elif wrap == "ddp":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save(state, tmp_path / "dit.pt")
    model, config = load_model(tmp_path / "dit.pt", num_heads=4)
    assert relative(model(g["x"], g["t"], g["y"]), g["out"]) < 1e-5
    read = config["model"]["backbone"]
    assert {key: read[key] for key in g["config"]} == g["config"]
    assert (config["data"]["scale"], config["data"]["image_size"]) == (0.18215, 64)


def test_registry_names_a_foreign_file(tmp_path):
    torch.save(DiT_models["DiT-T/2"](input_size=8, num_classes=7).state_dict(), tmp_path / "t.pt")
    model, config = load_model(tmp_path / "t.pt")
    assert isinstance(model, DiT)
    assert config["model"]["name"] == "DiT-T/2"
    assert model.config["num_heads"] == 3
    load_model(tmp_path / "t.pt", model="DiT-T/2")
    for wrong in (
        {"model": "RemixDiT-T/2"},
        {"model": "DiT-S/2"},
        {"model": "DiT-U/2"},
        {"num_classes": 9},
        {"colour": 1},
    ):
        with pytest.raises(UserError):
            load_model(tmp_path / "t.pt", **wrong)


def test_original_remix_files():
    model, _ = load_model(GOLDEN / "remix_original_checkpoint.pt", num_heads=4)
    assert isinstance(model, RemixDiT)
    assert (model.n_basis, model.n_experts) == (2, 4)
    with pytest.raises(UserError, match="cannot be built"):
        load_model(GOLDEN / "remix_original_checkpoint.pt", num_heads=5)
    with pytest.raises(UserError, match="number of heads"):
        load_model(GOLDEN / "remix_original_checkpoint.pt")


def test_overrides_must_not_contradict_our_files(tmp_path):
    save(tmp_path / "a.pt", DiT_models["DiT-T/4"](input_size=8), "DiT-T/4")
    load_model(tmp_path / "a.pt", model="DiT-T/4", num_classes=1000)
    with pytest.raises(UserError, match="holds model=DiT-T/4, not DiT-S/4"):
        load_model(tmp_path / "a.pt", model="DiT-S/4")


class Harmful:
    def __reduce__(self):
        return (open, ("/tmp/remix-dit-test-was-here", "w"))


def test_files_that_are_no_checkpoints(tmp_path):
    model = DiT_models["DiT-T/2"](input_size=8)
    save(tmp_path / "good.pt", model, "DiT-T/2")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    save_checkpoint(tmp_path / "bare.pt", {"step": 3})
    torch.save({"model": Harmful()}, tmp_path / "harmful.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    save_checkpoint(tmp_path / "newer.pt", {"version": 99})
    for name in ("missing", "bare", "cut", "text", "empty", "harmful", "list", "other", "newer"):
        with pytest.raises(UserError) as caught:
            load_model(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
        assert f"{name}.pt" in str(caught.value)
    with pytest.raises(UserError, match="does not fit the model"):
        state = read_checkpoint(tmp_path / "good.pt")
        state["config"]["model"]["backbone"]["hidden_size"] = 96
        save_checkpoint(tmp_path / "wrong.pt", {**state, "version": 1})
        load_model(tmp_path / "wrong.pt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
