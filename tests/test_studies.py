"""The splits of the digits, and the commands and tables of the studies of samplers and of flow matching."""

import csv
import subprocess
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT

from diffusion import create_diffusion

sys.path.insert(0, str(ROOT / "studies"))

import digit_runs
import digits
import flow
import runs
import samplers

from train_fast import make_parser


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["digits", "fashion", "fashion_figures", "fashion_gradients", "fashion_tables", "flow", "samplers", "vae"]
)
def test_every_script_starts(name, tmp_path):
    """In a process of its own, because this one finds the project's modules already."""
    command = [sys.executable, ROOT / "studies" / f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {name}.py")


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_the_digits_train_what_is_returned(process, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(runs, "run", lambda script, *words: commands.append([script, *map(str, words)]))
    checkpoint = digit_runs.train(tmp_path, "a-run", max_steps=80, global_seed=3, process=process)
    ((script, *flags),) = commands
    assert checkpoint == tmp_path / "runs" / "a-run" / "checkpoints" / "0000080.pt"
    assert script == "train_fast.py"
    assert {"--prefix=a-run", "--max-steps=80", "--global-seed=3", f"--process={process}"} <= set(flags)
    make_parser().parse_args(flags)


@pytest.mark.parametrize("process", [{}, {"process": "flow"}])
def test_the_held_out_error_of_a_flow_is_that_of_its_noise(monkeypatch, tmp_path, process):
    """Without data and with an output of zeros, DDPM's predicted noise is 0 and the flow's is x_t = (1 - t) eps."""
    monkeypatch.setattr(flow, "load_denoiser", lambda paths: (lambda x, t, y: 0 * x, {"diffusion": process}))
    images = MagicMock(__len__=lambda _: 8)
    images.__getitems__ = lambda rows: (torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
    monkeypatch.setattr(runs, "FeatureDataset", lambda path: images)
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


def test_the_readme_holds_the_table_of_the_samplers():
    with open(ROOT / "studies" / "results" / "samplers" / "samplers.csv", newline="") as file:
        rows = [row | {"steps": int(row["steps"]), "fid": float(row["fid"])} for row in csv.DictReader(file)]
    assert samplers.table(rows, samplers.STEPS) in (ROOT / "studies" / "README.md").read_text()
