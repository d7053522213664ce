"""The demo's commands. .ci/run runs the demo itself."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import run

import demo


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[tuple[str, list[str]]]:
    """The commands of a demo whose output files, except the scores and the grid, do not exist."""
    monkeypatch.chdir(tmp_path)
    for prefix in demo.MODELS:
        folder = tmp_path / "demo" / "samples" / prefix
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps({"FID": 1.0}))
        (folder / "grid.png").touch()
    recorded = []
    monkeypatch.setattr(demo, "run", lambda _, script, *words: recorded.append((script, list(map(str, words)))))
    monkeypatch.setattr(demo, "write_digits", lambda out: None)
    demo.main(argparse.Namespace(out=None, quick=False, processes=1))
    return recorded


def test_every_step_is_run_for_every_model(commands):
    scripts = [script for script, _ in commands]
    counts = {"train_fast.py": 4, "sample_ddp.py": 4, "evaluator.py": 4, "visualize.py": 1}
    assert scripts == ["extract_features.py", *(s for s, n in counts.items() for _ in range(n))]


def test_the_scripts_accept_the_flags(commands):
    """Every command ends because its input does not exist."""
    for script, words in commands:
        assert "no such f" in run(script, *words, expect=2).stderr


def test_the_splits_are_disjoint_and_stratified_and_always_the_same():
    splits, again = demo.split_digits(), demo.split_digits()
    assert {name: len(images) for name, (images, _) in splits.items()} == {
        "train": 1197,
        "validation": 300,
        "heldout": 300,
    }
    for name, (images, labels) in splits.items():
        assert np.bincount(labels).min() / len(labels) > 0.09
        assert np.array_equal(images, again[name][0])
        assert np.array_equal(labels, again[name][1])


def test_the_digits_are_written_with_a_classifier_of_any_number_of_images(tmp_path, monkeypatch):
    splits = {name: (images[:40], labels[:40]) for name, (images, labels) in demo.split_digits().items()}
    monkeypatch.setattr(demo, "split_digits", lambda: splits)
    demo.write_digits(tmp_path)
    for name, (images, labels) in splits.items():
        assert len(list((tmp_path / name).glob("*/*.png"))) == 40
        with np.load(tmp_path / f"{name}.npz") as file:
            assert np.array_equal(file["arr_0"], np.repeat(images[..., None], 3, axis=-1))
            assert np.array_equal(file["arr_1"], labels)
    classifier = torch.export.load(tmp_path / "classifier.pt2").module()
    for count in (1, 7):
        pool, spatial, logits = classifier(torch.zeros(count, 3, 8, 8, dtype=torch.uint8))
        assert (pool.shape, spatial.shape, logits.shape) == ((count, 64), (count, 128), (count, 10))
