"""The results of the Fashion-MNIST study: their files, comparisons, tables and figures, and the text about them."""

import csv
import re
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "studies"))

import plots
from measurements import add_result, compare, read_results, with_common_seeds
from tables import all_tables, paired_table, with_star
from variants import SETTINGS, baseline

RESULTS = ROOT / "studies" / "results" / "fashion"


def result(variant: str, seed: int, errors, **values) -> dict:
    """A row of `read_results`, whose errors are the same on test and validation images."""
    errors = np.broadcast_to(errors, 1000)
    return {"variant": variant, "seed": seed, "fid": 1.0, "errors": {"test": errors, "validation": errors}} | values


# The files


def test_results_are_read_as_they_were_added(tmp_path):
    """A seed that is computed twice must not count twice."""
    generator, added = np.random.default_rng(0), []
    for seed in (0, 1, 2, 1):
        errors = {split: generator.random(1000, np.float32) for split in ("test", "validation")}
        added.append(errors)
        add_result(tmp_path, "pixels", {"variant": "raw", "seed": seed, "test_error": "0.5"}, errors)
    rows = read_results(tmp_path, "pixels")
    assert [row["seed"] for row in rows] == [0, 1, 2]
    for row, errors in zip(rows, added, strict=False):
        assert row["test_error"] == 0.5
        for split, values in errors.items():
            assert np.array_equal(row["errors"][split], values)
    assert read_results(tmp_path, "latents") == []


def test_errors_without_a_row_are_replaced(tmp_path):
    """A run that is killed between the two files leaves errors without a row."""
    first, second = ({split: np.full(1000, x, np.float32) for split in ("test", "validation")} for x in (1, 2))
    add_result(tmp_path, "pixels", {"variant": "raw", "seed": 0}, first)
    (tmp_path / "pixels.csv").unlink()
    add_result(tmp_path, "pixels", {"variant": "raw", "seed": 0}, second)
    (row,) = read_results(tmp_path, "pixels")
    assert (row["errors"]["test"] == 2).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_committed_results_have_their_errors_and_origin_and_occur_once(setting):
    rows = read_results(RESULTS, setting)
    assert len({(row["variant"], row["seed"]) for row in rows}) == len(rows) > 0
    for row in rows:
        for split, errors in row["errors"].items():
            assert errors.mean() == pytest.approx(row[f"{split}_error"], rel=1e-5)
    with open(RESULTS / f"{setting}.csv", newline="") as file:
        assert all(row["commit"] and row["command"] and row["machine"] for row in csv.DictReader(file))


# Comparisons


def test_a_variant_is_compared_with_continued_training_of_as_many_steps_and_the_same_width():
    assert baseline("remix-4-20") == baseline("bonus-8") == "continued"
    assert baseline("remix-4-20-steps-10000") == "continued-steps-10000"
    assert baseline("pretrained-width-96") == "continued-width-96"
    rows = []
    for end, factor in (("", 1.0), ("-width-96", 0.5), ("-steps-1250", 2.0)):
        for name, own in (("continued", 1.0), ("remix-4-20", 0.9)):
            rows.append(result(name + end, 0, factor * own, fid=10 * factor * own))
    remix = [row for row in compare(rows) if row["variant"].startswith("remix")]
    assert [row["error_change"] for row in remix] == pytest.approx([-10] * 3)
    assert [row["fid_change"] for row in remix] == pytest.approx([-1, -0.5, -2])


def test_changes_are_paired_by_seed():
    """Half the error below t = 200, where errors are ten times as large, and nothing else."""
    rows = [result("raw", 2, 1.0)]
    for seed in (0, 1):
        base = np.where(np.arange(1000) < 200, 10.0, 1.0) * (1 + seed)
        better = np.where(np.arange(1000) < 200, 0.5, 1.0) * base
        rows.append(result("continued", seed, base, fid=21 + 10 * seed))
        rows.append(result("remix-4-20", seed, better, fid=20 + 10 * seed))
    compared = [row for row in compare(rows) if row["variant"] != "continued"]
    assert [(row["variant"], row["seed"]) for row in compared] == [("remix-4-20", 0), ("remix-4-20", 1)]
    for row in compared:
        assert row["fid_change"] == -1
        assert row["fifth_changes"] == pytest.approx([-50, 0, 0, 0, 0])
        assert row["ratio_change"] == pytest.approx(-10)
        assert row["error_change"] == pytest.approx(100 * (1800 / 2800 - 1))


def test_on_validation_images_no_score_of_test_images_is_shown():
    scores = dict(fid=1.0, validation_fid=5.0, kid=2.0, imagenet_fid=3.0, inception_score=6.0)
    (row,) = compare([result("continued", 0, 1.0, **scores)], "validation")
    assert (row["fid"], row["inception_score"]) == (5.0, 6.0)
    assert not {"kid", "imagenet_fid"} & row.keys()


def test_a_variant_is_compared_on_the_seeds_of_its_baseline():
    """A width of which only one seed is known does not leave out the seeds of the other widths."""
    known = {"continued": (0, 1, 2), "remix-4-20": (0, 1), "continued-width-96": (5,), "remix-4-20-width-96": (5, 6)}
    rows = [{"variant": name, "seed": seed} for name, seeds in known.items() for seed in seeds]
    chosen = with_common_seeds(list(known), rows)
    found = {(row["variant"], row["seed"]) for row in chosen}
    common = {("continued", 0), ("continued", 1), ("remix-4-20", 0), ("remix-4-20", 1)}
    assert found == common | {("continued-width-96", 5), ("remix-4-20-width-96", 5)}
    assert len(chosen) == len(found)


def test_only_differences_beyond_the_spread_of_three_seeds_have_a_star():
    assert with_star([-1.0, -1.1, -0.9]).endswith(" *")
    assert with_star([-1.0, -1.1]) == "-1.05", "no spread of two seeds"
    assert not with_star([-1.0, 1.1, 0.2]).endswith("*")


def test_variants_are_compared_in_the_seeds_of_both():
    rows = [
        {"variant": name, "seed": seed, "error": error, "fid": fid}
        for name, values in {
            "remix-4-20": [(0.9, 9), (0.9, 12), (0.9, 8), (0.9, 7)],
            "continued": [(1.0, 10), (1.0, 11), (0.8, 9)],
            "independent-8": [(1.8, 10)],
            "continued-width-96": [(1.0, 1)],
        }.items()
        for seed, (error, fid) in enumerate(values)
    ]
    # Scored with both networks in one seed only.
    for row in rows:
        if row["seed"] == 0 and row["variant"] in ("remix-4-20", "independent-8"):
            row["imagenet_fid"] = 30.0 if row["variant"] == "independent-8" else 32.5
    others = ("continued", "independent-8", "continued-width-96", "raw")
    _, _, *lines = paired_table("remix-4-20", others, rows).splitlines()
    assert lines == [
        "| continued | 3 | 2 of 3 | -2.50 ± 12.99 | 2 of 3 | -0.33 ± 1.15 | - | - |",
        "| independent-8 | 1 | 1 of 1 | -50.00 | 1 of 1 | -1.00 | 0 of 1 | 2.50 |",
    ]


# Figures


def test_the_figure_shows_the_change_of_each_part_of_the_timesteps():
    factors = {"continued": 1.0, "remix-4-20": np.where(np.arange(1000) < 500, 1.0, 0.9)}
    rows = compare([result(name, 0, np.linspace(1, 0.01, 1000) * factor) for name, factor in factors.items()])
    assert plots.changes_per_bin("remix-4-20", rows) == pytest.approx(np.repeat([[0, -10]], 20).reshape(1, 40))
    (axes,) = plots.draw_timesteps(rows).axes
    assert axes.lines[0].get_ydata() == pytest.approx(np.repeat([0, -10], 20))
    assert plots.draw_timesteps([]) is None


def test_a_series_has_the_seeds_of_all_its_points():
    ends = {24: "-width-24", 48: ""}
    rows = [result(name, seed, 1.0, fid=seed) for name in ("continued", "remix-4-20") for seed in (0, 1, 2)]
    assert plots.draw_series("width", ends, compare(rows)) is None
    rows += [result(f"{name}-width-24", seed, 1.0, fid=9) for name in ("continued", "remix-4-20") for seed in (0, 2)]
    # This variant lacks one of the seeds.
    rows += [result(f"bonus-8{end}", 2, 1.0) for end in ends.values()]
    axes = plots.draw_series("width", ends, compare(rows)).axes[0]
    lines = [container.lines[0] for container in axes.containers]
    assert len(lines) == 2
    for line in lines:
        assert line.get_xdata().tolist() == [24, 48]
        assert line.get_ydata().tolist() == [9, 1], "the means of seeds 0 and 2"


def test_figures_are_drawn_of_the_results_that_exist(tmp_path):
    for end in ("", "-steps-1250", "-steps-2500", "-steps-10000", "-steps-20000"):
        for name in ("continued", "remix-4-20"):
            errors = {split: np.ones(1000, np.float32) for split in ("test", "validation")}
            add_result(tmp_path, "pixels", {"variant": name + end, "seed": 0, "fid": 1}, errors)
    plots.draw_figures(tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"timesteps-pixels.png", "steps-pixels.png"}


# Tables and text


def test_the_committed_tables_are_those_of_the_results():
    assert (RESULTS / "tables.md").read_text() == all_tables(RESULTS)


def test_the_numbers_in_the_text_are_those_of_the_tables():
    values = re.findall(r"-?\d+\.\d+ ± \d+\.\d+", (RESULTS / "README.md").read_text())
    assert values
    assert set(values) <= set(re.findall(r"-?\d+\.\d+ ± \d+\.\d+", (RESULTS / "tables.md").read_text()))


def test_the_methods_of_a_width_are_compared_with_each_other():
    _, _, rest = (RESULTS / "tables.md").read_text().partition("| remix-4-20-width-96 compared with |")
    names = [line.split("|")[1].strip() for line in rest.partition("\n\n")[0].splitlines()[2:]]
    assert names == [f"{name}-width-96" for name in ("pretrained", "continued", "independent-8", "bonus-8")]


def test_the_readme_holds_the_results_of_the_tables():
    readme = (ROOT / "README.md").read_text().partition("| compared with continued training |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines()[2:]]
    names = {
        "pretrained": "pretrained",
        "8 independent experts": "independent-8",
        "Remix 4-20 with the published prior": "remix-4-20",
        "Remix 4-20": "bonus-8",
    }
    assert [label for label, *_ in rows] == list(names)
    _, pixels, latents = (RESULTS / "tables.md").read_text().split("## Results: ")
    for label, *cells in rows:
        for section, shown in ((pixels, cells[:2]), (latents, cells[2:])):
            table = section.partition("### Table 6")[2]
            line = next(line for line in table.splitlines() if line.startswith(f"| {names[label]} |"))
            expected = [cell.strip(" *") for cell in line.strip("|").split("|")]
            assert shown == [f"{expected[3]} %", expected[6]]


def test_the_links_of_the_text_resolve():
    links = re.findall(r"\]\(([^)\s#]+)", (RESULTS / "README.md").read_text())
    assert "tables.md" in links
    assert all((RESULTS / link).exists() for link in links)
