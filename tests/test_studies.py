"""The splits of the digits, and the commands and tables of the study of the paper's tables."""

import csv
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT

from diffusion import create_diffusion

sys.path.insert(0, str(ROOT / "studies"))

import digits
import flow
import runs
import tables


def test_splits_are_disjoint_and_stratified():
    splits = digits.split_digits()
    assert {name: len(images) for name, (images, _) in splits.items()} == digits.SPLITS
    assert sum(len(images) for images, _ in splits.values()) == 1797
    for _, labels in splits.values():
        assert np.bincount(labels).min() / len(labels) > 0.09


def test_every_split_is_always_the_same():
    for name, (images, labels) in digits.split_digits().items():
        again = digits.split_digits()[name]
        assert np.array_equal(images, again[0])
        assert np.array_equal(labels, again[1])


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that the study would run."""
    recorded = []
    monkeypatch.setattr(runs, "run", lambda script, *words: recorded.append([script, *map(str, words)]))
    return recorded


@pytest.mark.parametrize("name", ["pretrained", *tables.VARIANTS])
def test_every_variant_trains_what_it_returns(name, commands, tmp_path):
    checkpoints, steps = tables.train_variant(tmp_path, name, seed=1, pretraining=160, finetuning=80)
    assert len(checkpoints) == (8 if name == "independent-8" else 1)
    pretraining, *finetuning = commands
    assert "--global-seed=1" in pretraining
    trained = []
    for command, checkpoint in zip(finetuning or [pretraining], checkpoints, strict=True):
        flags = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
        trained.append(int(flags["max-steps"]))
        assert checkpoint == tmp_path / "runs" / flags["prefix"] / "checkpoints" / f"{trained[-1]:07d}.pt"
        assert flags["global-seed"] == ("1" if name == "pretrained" else "1001")
    assert sum(trained) == steps


def test_equal_flops_take_fewer_steps():
    """16 groups of 4 bases in a batch of 80 images of 4 tokens: 20 % more FLOPs than a plain DiT."""
    assert tables.relative_flops(n_basis=4, n_experts=20) == pytest.approx(1.2)


def test_the_readme_holds_the_tables_of_the_results():
    with open(ROOT / "studies" / "results.csv", newline="") as file:
        rows = [
            {key: value if key == "variant" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    assert list(rows[0]) == tables.COLUMNS
    readme = (ROOT / "studies" / "README.md").read_text().partition(tables.MARK)[2]
    for title, names in tables.TABLES.items():
        assert tables.markdown_table(title, names, rows) in readme


@pytest.mark.parametrize("process", [{}, {"process": "flow"}])
def test_the_held_out_error_of_a_flow_is_that_of_its_noise(monkeypatch, tmp_path, process):
    """Without data and with an output of zeros, DDPM's predicted noise is 0 and the flow's is x_t = (1 - t) eps."""
    monkeypatch.setattr(flow, "load_denoiser", lambda paths: (lambda x, t, y: 0 * x, {"diffusion": process}))
    images = MagicMock(__len__=lambda _: 8)
    images.__getitems__ = lambda rows: (torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
    monkeypatch.setattr(flow, "FeatureDataset", lambda path: images)
    data = create_diffusion().alphas_cumprod[::4]
    noise_level = np.sqrt(1 - data) / (np.sqrt(data) + np.sqrt(1 - data))
    expected = ((1 - noise_level) ** 2).mean() if process else 1
    assert flow.heldout_error(tmp_path, tmp_path) == pytest.approx(expected, rel=0.02)


def test_the_readme_holds_the_table_of_the_flows(capsys):
    with open(ROOT / "studies" / "results" / "flow" / "flow.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"steps": int(row["steps"] or 0), "fid": float(row["fid"])}
    flow.print_table(rows, flow.EVALUATIONS)
    assert capsys.readouterr().out.strip() in (ROOT / "studies" / "README.md").read_text()
