"""The dry run of train_fast.py: sizes, FLOPs and memory."""

import re
from functools import partial

import pytest
import torch
from conftest import run

from diffusion import create_diffusion
from remix import RemixDiT_models
from training.plan import activation_bytes, count_checkpoints


def test_a_dry_run_with_features_that_exist(features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--model=DiT-T/2", f"--data-path={features}", "--max-steps=3")
    report = run("train_fast.py", *flags, "--dry-run").stdout
    assert f"24 images of 3 classes as 3 x 8 x 8 (from {features})" in report
    assert "GiB" in report and "hours" in report
    flow = run("train_fast.py", *flags, "--dry-run", "--process=flow", "--time-shift=3").stdout
    assert "flow matching: path=linear, prediction=velocity" in flow
    assert "shift=3.0" in flow
    wrong = run("train_fast.py", "--data-path", "nowhere", "--image-size", 20, "--dry-run", expect=2)
    assert wrong.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "parameters", "gmacs"), [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71)])
def test_sizes_and_flops_are_those_of_the_dit_paper(tmp_path, monkeypatch, size, parameters, gmacs):
    """Peebles & Xie, arXiv 2212.09748, tables 1 and 4 (their Gflops are multiply-adds)."""
    monkeypatch.chdir(tmp_path)
    report = run("train_fast.py", f"--model=DiT-{size}/2", "--data-path=x", "--dry-run").stdout
    assert float(re.search(r"([\d.]+) M parameters", report)[1]) == pytest.approx(parameters, abs=0.6)
    assert float(re.search(r"([\d.]+) TFLOP per step", report)[1]) == pytest.approx(
        3 * 2 * gmacs * 256 / 1000, rel=0.01
    )


def test_activation_bytes_are_what_autograd_stores():
    """The count without computing equals the count with real tensors."""
    stored = {}

    def store(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    build = partial(RemixDiT_models["RemixDiT-T/2"], input_size=8, n_basis=2, n_experts=4)
    model, diffusion = build(), create_diffusion()
    x, t = torch.randn(8, 4, 8, 8), torch.arange(4).repeat_interleave(2) * 250
    conditions = {"y": torch.zeros_like(t), "label_drop": t > 0, "groups": 4}
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        graph = diffusion.training_losses(model, x, t, conditions, torch.randn_like(x))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    real = sum(size for address, size in stored.items() if address not in weights)
    del graph
    with torch.device("meta"):
        shapes = build()
    counted = activation_bytes(shapes, diffusion, 8, 4, torch.bfloat16)
    assert counted == pytest.approx(real, rel=0.02)


def test_the_space_for_checkpoints(tmp_path):
    """The counts are those of the checkpoints that exist at the same time, beyond those that exist now."""
    assert count_checkpoints(tmp_path, 0, 10, every=3, keep=None, keep_every=None) == 4
    assert count_checkpoints(tmp_path, 6, 10, every=3, keep=None, keep_every=None) == 2
    assert count_checkpoints(tmp_path, 0, 100, every=5, keep=2, keep_every=None) == 3
    assert count_checkpoints(tmp_path, 0, 100, every=5, keep=2, keep_every=50) == 5
    (tmp_path / "checkpoints").mkdir()
    for step in (45, 50):
        (tmp_path / f"checkpoints/{step:07d}.pt").touch()
    assert count_checkpoints(tmp_path, 50, 100, every=5, keep=2, keep_every=50) == 3
