"""The study of a pair of stages: its runner on a few images, and that its table and texts equal its results."""

import re
import sys
from argparse import Namespace
from itertools import product

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "studies"))

import dataset
import pair

from models import DiT_models

RESULTS = ROOT / "studies" / "results" / "pair"


def test_the_table_is_that_of_the_committed_results():
    results = pair.read_results(RESULTS)
    assert (RESULTS / "table.md").read_text() == pair.make_table(results)
    runs = [(row["variant"], float(row["lr"]), int(row["steps"]), int(row["seed"])) for row in results]
    assert len({*runs}) == len(runs)
    assert {*product(pair.VARIANTS, pair.RATES, [300], range(3))} <= {*runs}
    for row in results:
        assert (float(row["low"]) + float(row["high"])) / 2 == pytest.approx(float(row["error"]), abs=1e-6)


def test_numbers_in_the_text_are_those_of_the_table():
    table = (RESULTS / "table.md").read_text()
    (page,) = re.findall(r"## Does sharing help\?\n(.*)", (ROOT / "docs" / "wan.md").read_text(), re.DOTALL)
    numbers = re.findall(r"-?\d+\.\d+ ± \d+\.\d+", page)
    assert numbers
    assert all(number in table for number in numbers)


def test_all_variants_have_as_many_trained_numbers_in_their_pairs():
    sizes = set()
    for variant in pair.VARIANTS:
        stages = [DiT_models["DiT-T/4"](input_size=16, in_channels=1, num_classes=10) for _ in range(2)]
        remix = pair.adapt(stages, variant, (torch.zeros(8, 1, 16, 16), torch.zeros(8).long()), 0, 1, 1e-3)
        sizes.add(sum(p.numel() for p in remix.pairs.parameters()))
    assert len(sizes) == 1


def test_sheets_are_read_as_they_were_written():
    x, y = dataset.read_sheets("test")
    assert (x.shape, x.min().item(), x.max().item()) == ((10_000, 1, 16, 16), -1, 1)
    assert y.bincount().tolist() == [1000] * 10


@pytest.mark.slow
def test_the_runner_computes_only_what_is_missing(tmp_path, capsys):
    settings = dict(pair_steps=2, per_timestep=1, out=str(tmp_path / "out"), work=str(tmp_path / "work"))
    settings |= dict(seeds=[0], rates=[1e-2])
    pair.main(Namespace(steps=2, **settings))
    rows = pair.read_results(tmp_path / "out")
    assert [row["variant"] for row in rows] == ["pair", *pair.VARIANTS]
    capsys.readouterr()
    pair.main(Namespace(steps=2, **settings))
    assert not capsys.readouterr().out
    assert pair.read_results(tmp_path / "out") == rows

    pair.main(Namespace(steps=1, **settings))
    longer = pair.read_results(tmp_path / "out")
    assert longer[: len(rows)] == rows
    assert [(row["variant"], row["steps"]) for row in longer[len(rows) :]] == [(name, "1") for name in pair.VARIANTS]
