"""The demo's commands. .ci/run runs the demo itself."""

import argparse
import json

import pytest
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
    demo.main(argparse.Namespace(out=None, quick=False, processes=1))
    return recorded


def test_every_step_is_run_for_every_model(commands):
    scripts = [script for script, _ in commands]
    counts = {"train_fast.py": 4, "sample_ddp.py": 4, "evaluator.py": 4, "visualize.py": 1}
    assert scripts == ["studies/digits.py", "extract_features.py", *(s for s, n in counts.items() for _ in range(n))]


def test_the_scripts_accept_the_flags(commands):
    """Every command except the first ends because its input does not exist."""
    for script, words in commands[1:]:
        assert "no such f" in run(script, *words, expect=2).stderr
