"""Untrusted files given to the evaluator, and training on numbers that are not finite."""

import io
import itertools
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from conftest import run, training_flags

from checkpoint import checkpoints, find_corruption, load_model
from features import write_index, write_shard

MARKER = "/tmp/remix-dit-test-was-here"


class Harmful:
    """An object whose pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return (os.mkdir, (MARKER,))


def test_pickles_in_an_exported_program_are_not_loaded(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "p.pt2", "w") as archive,
        archive.open("p/data/sample_inputs/model.pt", "w") as file,
    ):
        torch.save(Harmful(), file)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    files = (tmp_path / "a.npz", tmp_path / "a.npz", "--weights", tmp_path / "p.pt2")
    assert "cannot be loaded" in run("evaluator.py", *files, expect=2).stderr
    assert not os.path.exists(MARKER)


def test_an_exported_network_that_declares_its_weights_as_pickles_is_refused(tmp_path):
    """Since PyTorch 2.9, the configuration inside a program's file says which of its tensors are pickled."""
    honest, harmful = tmp_path / "honest.pt2", tmp_path / "harmful.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),)), honest)
    pickled = io.BytesIO()
    torch.save(Harmful(), pickled)
    with zipfile.ZipFile(honest) as archive, zipfile.ZipFile(harmful, "w") as changed:
        config = next(name for name in archive.namelist() if name.endswith("weights_config.json"))
        entries = json.loads(archive.read(config))
        entry = next(iter(entries["config"].values()))
        entry["use_pickle"] = True
        for name in archive.namelist():
            content = pickled.getvalue() if name.endswith(f"/{entry['path_name']}") else archive.read(name)
            changed.writestr(name, json.dumps(entries) if name == config else content)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    files = (tmp_path / "a.npz", tmp_path / "a.npz", "--weights", harmful)
    assert "holds pickles" in run("evaluator.py", *files, expect=2).stderr
    assert not os.path.exists(MARKER)


def write_npz_header(path, shape):
    """Write an .npz file whose arr_0 has a header with this shape and no data."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def test_npz_files_with_a_false_header_are_refused(tmp_path):
    write_npz_header(tmp_path / "false.npz", (10, 10**6, 10**6, 3))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}] * 9, dtype=object))
    for path in (tmp_path / "false.npz", tmp_path / "objects.npz"):
        assert "not as long" in run("evaluator.py", path, path, expect=2).stderr


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
