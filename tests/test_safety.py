"""Training on data that are not finite."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import run, training_flags

from checkpoint import checkpoints, find_corruption, load_model
from features import write_index, write_shard


@pytest.fixture(scope="module")
def with_nan(tmp_path_factory):
    """48 images, one of them all NaN, which makes one of four batches of 12 non-finite."""
    path = tmp_path_factory.mktemp("nan")
    rows = np.random.default_rng(0).normal(size=(48, 1, 3, 8, 8))
    rows[5] = np.nan
    write_shard(path, 0, rows, np.arange(48) % 3, [])
    write_index(path, 1, vae="none", scale=1.0, image_size=8, classes=["a", "b", "c"])
    return path


def test_a_nan_on_one_process_of_two_is_skipped_on_both(with_nan, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        run("train_fast.py", *training_flags(with_nan, tmp_path, name), "--max-steps", 8, processes=processes)
    one, two = (load_model(tmp_path / name / "checkpoints/0000008.pt")[0].state_dict() for name in ("one", "two"))
    for key, value in one.items():
        assert value.isfinite().all()
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-4)
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        counts = [line["bad_steps"] for line in lines]
        assert counts[-1] == 2
        non_finite = [count > before for before, count in itertools.pairwise([0, *counts])]
        assert non_finite == [line["loss"] is None for line in lines]
    state = torch.load(tmp_path / "one/checkpoints/0000008.pt", weights_only=True)
    steps = {moments["step"].item() for moments in state["optimizer"]["state"].values()}
    assert steps == {6}, "AdamW counts only finite steps"


def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path):
    rows = np.full((48, 1, 3, 8, 8), np.nan)
    write_shard(tmp_path / "f", 0, rows, np.arange(48) % 3, [])
    write_index(tmp_path / "f", 1, vae="none", scale=1.0, image_size=8, classes=["a", "b", "c"])
    flags = training_flags(tmp_path / "f", tmp_path, "nan")
    stderr = run("train_fast.py", *flags, "--max-steps=50", "--max-bad-steps=5", "--ckpt-every=2", expect=1).stderr
    assert "5 steps in a row" in stderr
    assert "the last, step 4: experts [0, 1, 2, 3, 4, 5], timesteps" in stderr
    assert "gradient norm nan" in stderr
    assert all(find_corruption(path) is None for path in checkpoints(tmp_path / "nan/checkpoints"))
