"""This project's checkpoint format: written, read, damaged, harmful, kept and deleted."""

import errno
import os
import signal

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, disk_full_of, losses, run, training_flags

from checkpoint import build_model, load_model, model_config
from interop.own import checkpoints, find_checkpoint, find_corruption, read_checkpoint, save_checkpoint
from models import DiT_models
from remix import RemixDiT_models
from runtime.errors import UserError


def save(path, model, name):
    """Save a model with EMA weights that are larger than its raw weights by one."""
    config = {"model": model_config(name, model), "diffusion": {}, "data": {}, "training": {}}
    ema = {key: value + 1 for key, value in model.state_dict().items()}
    save_checkpoint(path, {"config": config, "step": 3, "model": model.state_dict(), "ema": ema})


@pytest.mark.parametrize("mixer", ["softmax", "raw", "one-hot"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_round_trip(tmp_path, mixer, scope):
    shape = dict(input_size=8, num_classes=5, n_basis=2, n_experts=6)
    model = RemixDiT_models["RemixDiT-T/2"](**shape, mixer=mixer, scope=scope)
    save(tmp_path / "a.pt", model, "RemixDiT-T/2")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 3
    raw, config = load_model(tmp_path / "a.pt", ema=False)
    ema, _ = load_model(tmp_path / "a.pt")
    assert not raw.training
    assert config["model"]["name"] == "RemixDiT-T/2"
    for key, value in model.state_dict().items():
        assert torch.equal(raw.state_dict()[key], value)
        assert torch.equal(ema.state_dict()[key], value + 1)
    assert build_model(config["model"]).mixing_config == model.mixing_config
    assert config["model"] == model_config("RemixDiT-T/2", model), "nothing is left out"


def test_files_with_the_option_rest_of_earlier_versions(tmp_path):
    path, model = tmp_path / "a.pt", RemixDiT_models["RemixDiT-T/2"](input_size=8, n_basis=2, n_experts=3)
    save(path, model, "RemixDiT-T/2")
    content = read_checkpoint(path)
    content["config"]["model"]["remix"]["rest"] = "shared"
    save_checkpoint(path, content)
    assert load_model(path)[0].mixing_config == model.mixing_config
    content["config"]["model"]["remix"]["rest"] = "separate"
    save_checkpoint(path, content)
    with pytest.raises(UserError, match="holds experts with separate parameters"):
        load_model(path)


def test_overrides_must_not_contradict_the_config(tmp_path):
    save(tmp_path / "a.pt", DiT_models["DiT-T/4"](input_size=8), "DiT-T/4")
    load_model(tmp_path / "a.pt", model="DiT-T/4", num_classes=1000)
    with pytest.raises(UserError, match="holds model=DiT-T/4, not DiT-S/4"):
        load_model(tmp_path / "a.pt", model="DiT-S/4")


class Harmful:
    """Creates a folder when it is unpickled."""

    path = "/tmp/remix-dit-test-was-here"

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_invalid_files_cause_one_line(tmp_path):
    save(tmp_path / "good.pt", DiT_models["DiT-T/2"](input_size=8), "DiT-T/2")
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


def test_a_config_must_fit_the_tensors(tmp_path):
    save(tmp_path / "good.pt", DiT_models["DiT-T/2"](input_size=8), "DiT-T/2")
    state = read_checkpoint(tmp_path / "good.pt")
    state["config"]["model"]["backbone"]["hidden_size"] = 96
    save_checkpoint(tmp_path / "wrong.pt", state)
    with pytest.raises(UserError, match="does not fit the model"):
        load_model(tmp_path / "wrong.pt")


def test_a_config_of_a_huge_model_takes_no_memory(trained, tmp_path):
    for changes in ({"hidden_size": 10**6, "num_heads": 10}, {"depth": 10**7}):
        state = torch.load(trained / "checkpoints/0000004.pt", weights_only=True)
        state["config"]["model"]["backbone"] |= changes
        torch.save(state, tmp_path / "huge.pt")
        assert "does not fit the model" in run("sample_ddp.py", "--ckpt", tmp_path / "huge.pt", expect=2).stderr


def test_harmful_pickles_are_not_executed(features, tmp_path):
    torch.save({"ema": Harmful()}, tmp_path / "harmful.pt")
    flags = [*training_flags(features, tmp_path, "run"), "--load-weight", tmp_path / "harmful.pt"]
    for command in (
        ("train_fast.py", *flags),
        ("sample_ddp.py", "--ckpt", tmp_path / "harmful.pt"),
        ("visualize.py", "coefficients", tmp_path / "harmful.pt"),
        ("convert.py", tmp_path / "harmful.pt", tmp_path / "out.pt", "--to", "original"),
    ):
        assert "--trust-pickle" in run(*command, expect=2).stderr
    assert not os.path.exists(Harmful.path)


class Note:
    """A class that a user may have stored in a file of their own."""


def test_pickles_can_be_allowed(tmp_path):
    state = DiT_models["DiT-T/2"](input_size=8).state_dict()
    torch.save({"ema": state, "note": Note()}, tmp_path / "own.pt")
    load_model(tmp_path / "own.pt", allow_pickle=True)


def test_truncation_and_changed_bytes_are_found(tmp_path):
    state = {"config": {}, "model": {"w": torch.randn(5000)}, "ema": {"w": torch.randn(5000)}}
    save_checkpoint(tmp_path / "intact.pt", state)
    assert find_corruption(tmp_path / "intact.pt") is None
    data = (tmp_path / "intact.pt").read_bytes()
    for tenth in range(10):
        (tmp_path / "cut.pt").write_bytes(data[: len(data) * tenth // 10])
        assert find_corruption(tmp_path / "cut.pt"), f"truncated to {tenth}0%"
    generator = np.random.default_rng(0)
    for position in generator.integers(len(data), size=60):
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        (tmp_path / "flipped.pt").write_bytes(flipped)
        if find_corruption(tmp_path / "flipped.pt") is None:
            # The byte was padding, which is not read.
            back = torch.load(tmp_path / "flipped.pt", weights_only=True)
            assert torch.equal(back["model"]["w"], state["model"]["w"])
            assert torch.equal(back["ema"]["w"], state["ema"]["w"])


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_model(tmp_path / "run")
    for name in ("0000020.pt", "0000100.pt", "0000300.pt.damaged"):
        (folder / name).touch()
    newest = str(folder / "0000100.pt")
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(folder) == find_checkpoint(newest) == newest
    with pytest.raises(UserError, match="neither a run's checkpoints nor"):
        load_model(tmp_path)


def test_which_checkpoints_are_kept(features, tmp_path):
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=9", "--ckpt-every=1"]
    run("train_fast.py", *flags, "--keep=2", "--keep-every=4")
    assert [int(path.stem) for path in checkpoints(tmp_path / "run/checkpoints")] == [9, 8, 4]
    assert "--keep-every needs --keep" in run("train_fast.py", *flags, "--keep-every=4", "--prefix=no", expect=2).stderr


def test_a_new_checkpoint_is_never_deleted(features, tmp_path):
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=6", "--ckpt-every=2"]
    run("train_fast.py", *flags)
    folder = tmp_path / "run/checkpoints"
    (folder / "0000006.pt").write_bytes(b"damaged")
    run("train_fast.py", *flags, "--keep=1", "--resume", folder / "0000002.pt")
    assert [path.name for path in checkpoints(folder)] == ["0000006.pt"]
    assert find_corruption(folder / "0000006.pt") is None


def test_a_killed_writers_file_does_not_fill_the_disk(features, tmp_path):
    with disk_full_of(tmp_path / "run/checkpoints/.0000002.pt.99999.tmp"):
        run("train_fast.py", *training_flags(features, tmp_path, "run"), "--max-steps=2", "--resume=auto")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_that_cannot_save_its_last_checkpoint_fails(trained, features, tmp_path, monkeypatch, stopped):
    def save_first(path, state):
        if state["step"] > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_checkpoint(path, state)
        if stopped:
            os.kill(os.getpid(), signal.SIGUSR1)

    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=4", "--keep=1"]
    with monkeypatch.context() as patch:
        patch.setattr("training.writer.save_checkpoint", save_first)
        stderr = run("train_fast.py", *flags, "--ckpt-every=2", expect=1).stderr
    assert "COULD NOT SAVE" in stderr
    assert "free disk space" in stderr.splitlines()[-1]
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["0000002.pt"]
    run("train_fast.py", *flags, "--resume=auto")
    assert_same_weights(trained / "checkpoints/0000004.pt", tmp_path / "run/checkpoints/0000004.pt")
    assert losses(trained) == losses(tmp_path / "run")


def test_resume_skips_damaged_checkpoints_and_reports_them(features, tmp_path):
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=6", "--ckpt-every=2"]
    run("train_fast.py", *flags)
    intact = (tmp_path / "run/checkpoints/0000006.pt").read_bytes()
    (tmp_path / "run/checkpoints/0000006.pt").write_bytes(intact[:3000])
    four = bytearray((tmp_path / "run/checkpoints/0000004.pt").read_bytes())
    four[len(four) // 2] ^= 0xFF
    (tmp_path / "run/checkpoints/0000004.pt").write_bytes(four)
    stderr = run("train_fast.py", *flags, "--resume", "auto").stderr
    assert "SKIPPED" in stderr
    assert stderr.index("0000006.pt") < stderr.index("0000004.pt") < stderr.index("resumed from")
    assert "0000002.pt" in stderr[stderr.index("resumed from") :]
    (tmp_path / "first.pt").write_bytes(intact)
    back = torch.load(tmp_path / "run/checkpoints/0000006.pt", weights_only=True)
    for key, value in torch.load(tmp_path / "first.pt", weights_only=True)["model"].items():
        assert torch.equal(back["model"][key], value)


def test_resume_refuses_damaged_checkpoints_only(features, tmp_path):
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=6"]
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    for name in ("0000004.pt", "0000006.pt"):
        (folder / name).write_bytes(b"damaged")
    assert "none of the checkpoints" in run("train_fast.py", *flags, "--resume", "auto", expect=2).stderr
    stderr = run("train_fast.py", *flags, "--resume", folder / "0000004.pt", expect=2).stderr
    assert "is not a complete checkpoint" in stderr


def test_files_of_an_earlier_version_are_refused(features, tmp_path):
    """Earlier versions left defaults out of the config."""
    model = DiT_models["DiT-T/2"](input_size=8)
    save(tmp_path / "a.pt", model, "DiT-T/2")
    save_checkpoint(tmp_path / "earlier.pt", torch.load(tmp_path / "a.pt", weights_only=True) | {"version": 2})
    with pytest.raises(UserError, match=r"earlier\.pt was written by an earlier version of this code, in format 2"):
        load_model(tmp_path / "earlier.pt")
    flags = [*training_flags(features, tmp_path, "run"), "--resume", tmp_path / "earlier.pt"]
    stderr = run("train_fast.py", *flags, expect=2).stderr
    assert "earlier version" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
