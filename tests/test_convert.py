"""convert.py, run as a user runs it. The format's own tests are in test_interop_*.py."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import file_limit, run, training_flags

from checkpoint import load_model, model_config
from diffusion import create_flow
from interop.own import save_checkpoint
from models import DiT, DiT_models
from remix import RemixDiT_models
from runtime.errors import UserError
from training.initial import InitialWeights, make_model


@pytest.fixture
def four_experts(tmp_path):
    """A checkpoint of K = 2 bases and N = 4 experts, numbers that the original Remix-DiT can run."""
    shape = dict(input_size=8, in_channels=3, num_classes=3, n_basis=2, n_experts=4)
    models = {key: RemixDiT_models["RemixDiT-T/2"](**shape) for key in ("model", "ema")}
    config = {"model": model_config("RemixDiT-T/2", models["ema"]), "diffusion": {}, "data": {}, "training": {}}
    save_checkpoint(tmp_path / "four.pt", {"config": config} | {k: m.state_dict() for k, m in models.items()})
    return tmp_path / "four.pt"


def test_to_the_original_format_and_back(four_experts, tmp_path):
    ckpt = four_experts
    run("convert.py", ckpt, tmp_path / "original.pt", "--to", "original")
    state = torch.load(tmp_path / "original.pt", weights_only=True)
    assert state["ema"]["coefficients.weight"].shape == (4, 2)
    assert state["ema"]["blocks.0.attn.qkv.weight"].shape == (2, 144, 48)
    for ema in (True, False):
        ours, back = load_model(ckpt, ema=ema)[0], load_model(tmp_path / "original.pt", ema=ema)[0]
        for key, value in ours.state_dict().items():
            assert torch.equal(value, back.state_dict()[key])


def test_an_original_file_starts_training(four_experts, features, tmp_path):
    ckpt = four_experts
    run("convert.py", ckpt, tmp_path / "original.pt", "--to", "original")
    flags = [*training_flags(features, tmp_path, "warm"), "--n-experts=4", "--load-weight", tmp_path / "original.pt"]
    run("train_fast.py", *flags, "--max-steps", 1, "--lr", 1e-9, "--coeff-lr", 0)
    before, after = load_model(ckpt)[0], load_model(tmp_path / "warm/checkpoints/0000001.pt")[0]
    for key, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert "asks for 3" in run("train_fast.py", *flags, "--n-basis", 3, "--prefix", "no", expect=2).stderr


def test_an_expert_becomes_a_dit(ckpt, tmp_path):
    run("convert.py", ckpt, tmp_path / "expert.pt", "--to", "dit", "--expert", 4)
    expert, _ = load_model(tmp_path / "expert.pt")
    assert torch.equal(expert.blocks[1].mlp.fc1.weight, load_model(ckpt)[0].expert(4).blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("merge", ["mean", "interval"])
def test_merged_experts_are_a_dit(ckpt, tmp_path, merge):
    """N = 6 experts: with 1000 timesteps, their intervals have 166 or 167 timesteps."""
    remix, config = load_model(ckpt)
    run("convert.py", ckpt, tmp_path / "merged.safetensors", "--to=safetensors", f"--merge={merge}")
    merged, merged_config = load_model(tmp_path / "merged.safetensors", model="DiT-T/2")
    counts = torch.bincount(remix.expert_index(torch.arange(1000))).double()
    weights = counts / 1000 if merge == "interval" else torch.full((6,), 1 / 6).double()
    experts = [remix.expert(i).state_dict() for i in range(6)]
    for key, value in merged.state_dict().items():
        expected = sum(weight * expert[key].double() for weight, expert in zip(weights, experts, strict=True))
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
    assert merged_config["data"] == config["data"]


def test_a_bare_state_dict_becomes_a_file_of_sit(tmp_path):
    """Only the user knows that a bare state dict is a flow. The file that is written says it."""
    torch.save(DiT_models["DiT-T/4"](input_size=8).state_dict(), tmp_path / "bare.pt")
    run("convert.py", tmp_path / "bare.pt", tmp_path / "sit.pt", "--to", "sit", "--process", "flow")
    _, config = load_model(tmp_path / "sit.pt")
    assert config["diffusion"]["process"] == "flow"
    run("convert.py", tmp_path / "bare.pt", tmp_path / "flow.safetensors", "--to", "safetensors", "--process", "flow")
    shape, flow = dict(input_size=8, in_channels=4, num_classes=1000), {"process": "flow", **create_flow().config}
    start = InitialWeights(tmp_path / "flow.safetensors", process=flow)
    assert isinstance(make_model("DiT-T/4", shape, None, 0.0, start), DiT)
    with pytest.raises(UserError, match="was trained with path=linear, this run has GVP"):
        make_model("DiT-T/4", shape, None, 0.0, replace(start, process=flow | {"path": "GVP"}))
    done = run("convert.py", tmp_path / "sit.pt", tmp_path / "dit.pt", "--to", "dit")
    assert "cannot record that the model is a flow" in done.stderr


def test_to_safetensors_and_back(trained, tmp_path, capsys):
    ckpt = trained / "checkpoints/0000004.pt"
    run("convert.py", ckpt, tmp_path / "a.safetensors", "--to", "safetensors")
    (ours, config), (back, config_back) = load_model(ckpt), load_model(tmp_path / "a.safetensors")
    assert config == config_back
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in ours.state_dict().items())
    assert "EMA weights only" not in capsys.readouterr().err
    load_model(tmp_path / "a.safetensors", ema=False)
    assert "a.safetensors holds the EMA weights only" in capsys.readouterr().err
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:999])
    stderr = run("sample_ddp.py", "--ckpt", tmp_path / "cut.safetensors", expect=2).stderr
    assert "not a complete .safetensors file" in stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to=dit",), "choose one with --expert"),
        (("--to=dit", "--expert=6"), "0 to 5"),
        (("--to=original", "--merge=mean"), "not --to original"),
        (("--to=dit", "--merge=mean", "--expert=1"), "not allowed with"),
        (("--to=sit", "--expert=0"), "trained with Gaussian diffusion"),
        (("--to=safetensors", "--process=flow"), "was trained with --process gaussian"),
        (("--to=original", "--expert=1"), "not --to original"),
        (("--to=safetensors", "--vae=ema"), "--vae is stored in a pipeline"),
        (("--to=diffusers", "--expert=2", "--vae=ema"), "one expert denoises only its own noise levels"),
        (("--to=original",), "an N that divides 1000"),
        (("--to=diffusers", "--vae=/no/such/vae"), "cannot load the VAE"),
    ],
)
def test_wrong_flags(ckpt, tmp_path, flags, message):
    done = run("convert.py", ckpt, tmp_path / "out", *flags, expect=2)
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_plain_dit_has_no_experts(tmp_path):
    torch.save(DiT_models["DiT-T/4"](input_size=8).state_dict(), tmp_path / "dit.pt")
    done = run("convert.py", tmp_path / "dit.pt", tmp_path / "out.pt", "--to=dit", "--expert=0", expect=2)
    assert "holds a plain DiT, which has no experts" in done.stderr


@pytest.mark.parametrize("flags", [("dit", "--expert=1"), ("safetensors",), ("diffusers",)])
def test_a_full_disk(ckpt, tmp_path, flags):
    with file_limit(10_000):
        stderr = run("convert.py", ckpt, tmp_path / "out", "--to", *flags, expect=2).stderr
    assert f"{tmp_path / 'out'}: " in stderr
    assert stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [("dit", "--expert=1"), ("safetensors",), ("diffusers",)])
def test_files_have_the_permissions_of_the_umask(ckpt, tmp_path, flags):
    before = os.umask(0o027)
    try:
        run("convert.py", ckpt, tmp_path / "out", "--to", *flags)
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_existing_files_are_not_replaced(ckpt, tmp_path):
    (tmp_path / "out.pt").touch()
    assert "exists" in run("convert.py", ckpt, tmp_path / "out.pt", "--to", "original", expect=2).stderr
