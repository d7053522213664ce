"""Runs as a table: its numbers are those of metrics.jsonl and of the evaluator's files."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run
from PIL import Image

from interop.own import fingerprint
from reports.table import table_cells


def write_scores(folder: Path, ckpt: Path, scores: dict):
    """Write what sample_ddp.py and evaluator.py leave of scored samples."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"ckpt": [str(ckpt)]}))
    (folder / "scores.json").write_text(json.dumps(scores))


def test_the_table_of_runs_holds_the_numbers_of_their_files(runs, tmp_path):
    remix, plain = runs
    first = {"Inception Score": 9.5, "FID": 12.25, "FID std": 0.5, "sFID": 5.0, "Recall": None}
    second = first | {"FID": 14.5, "KID": 0.0123456789, "KID std": 0.001}
    write_scores(tmp_path / "a", remix / "checkpoints/0001000.pt", first)
    write_scores(tmp_path / "b", plain / "checkpoints/0000300.pt", second)
    write_scores(tmp_path / "c", plain / "checkpoints/0000200.pt", second)
    # One file of several samples, and one that lies with its samples.
    both = {str(tmp_path / name): json.loads((tmp_path / name / "scores.json").read_text()) for name in "ab"}
    (tmp_path / "both.json").write_text(json.dumps(both))
    files = [tmp_path / "both.json", tmp_path / "c/scores.json"]
    done = run("visualize.py", "compare", remix, plain, "--scores", *files, "--out", tmp_path / "t.png")

    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["samples"]) for row in rows] == [("remix", "a"), ("plain", "b"), ("plain", "c")]
    assert [(row["FID"], row["KID"], row["KID std"]) for row in rows] == [
        ("12.25", "", ""),
        *[("14.5", "0.0123456789", "0.001")] * 2,
    ]
    for folder, row in zip((remix, plain, plain), rows, strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line[-1] == "}"]
        reports, scores = ([line for line in lines if key in line] for key in ("loss", "fid"))
        assert int(row["last step"]) == lines[-1]["step"]
        assert [float(row[key]) for key in ("loss", "mse")] == [reports[-1][key] for key in ("loss", "mse")]
        for title, key in (("FID while training", "fid"), ("held-out loss", "held_out_loss")):
            best = min(scores, key=lambda line: line[key])
            assert float(row[title]) == scores[-1][key]
            assert (float(row[f"lowest {title}"]), int(row[f"{title}: lowest at step"])) == (best[key], best["step"])
    assert "Recall" not in rows[0]

    text = (tmp_path / "t.md").read_text()
    assert done.stdout.startswith(text)
    assert "**12.25 ± 0.5**" in text and "0.012346 ± 0.001" in text and "FID std" not in text
    assert Image.open(tmp_path / "t.png").width > 1000

    run("visualize.py", "run", plain, "--scores", *files[1:])
    [table] = re.findall(r'<table class="scores">.*?</table>', (plain / "page.html").read_text())
    assert "<td>c</td><td>9.5</td><td>14.5 ± 0.5</td><td>5</td><td>0.012346 ± 0.001</td>" in table


def test_runs_that_were_scored_in_different_ways_are_warned_about(runs, tmp_path):
    for run_folder, samples in zip(runs, (None, 100), strict=True):
        config = json.loads((run_folder / "config.json").read_text())
        flags = {"score_every": 1, "score_against": "ref.npz", "held_out": "h"}
        config["flags"] = flags | ({"score_samples": samples} if samples else {})
        (run_folder / "config.json").write_text(json.dumps(config))
    assert run("visualize.py", "compare", *runs, "--out", tmp_path / "t.png").stderr.splitlines() == [
        "warning: remix was scored with --score-samples 5000, plain with 100: do not compare these scores"
    ]


def test_scores_of_unknown_samples(runs, tmp_path):
    """Scores of another run are left out with a warning; a file that does not say whose scores it holds is refused."""
    write_scores(tmp_path / "a", tmp_path / "other/checkpoints/0000001.pt", {"FID": 1.0})
    done = run("visualize.py", "compare", runs[0], "--scores", tmp_path / "a/scores.json", "--out", tmp_path / "t.png")
    assert "which is none of the runs: left out" in done.stderr
    assert "samples" not in (tmp_path / "t.csv").read_text()
    # A run that was started again under the same name.
    ckpt = runs[0] / "checkpoints/0001000.pt"
    ckpt.parent.mkdir()
    torch.save({"step": 1}, ckpt)
    write_scores(tmp_path / "c", ckpt, {"FID": 1.0})
    (tmp_path / "c/settings.json").write_text(
        json.dumps({"ckpt": [str(ckpt)], "ckpt_fingerprint": [fingerprint(ckpt)]})
    )
    compare = ("visualize.py", "compare", runs[0], "--scores", tmp_path / "c/scores.json", "--out")
    assert "left out" not in run(*compare, tmp_path / "v.png").stderr
    torch.save({"step": 2}, ckpt)
    assert "0001000.pt has changed since" in run(*compare, tmp_path / "w.png").stderr
    assert (
        "FID" in (tmp_path / "v.csv").read_text().split("samples")[1]
        and "samples" not in (tmp_path / "w.csv").read_text()
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b/settings.json").write_text('{"image_size": 8}')
    (tmp_path / "b/scores.json").write_text('{"FID": 1.0}')
    (tmp_path / "a/settings.json").unlink()
    (tmp_path / "list.json").write_text("[1]")
    for file, message in (
        ("a/scores.json", "--json samples/NAME/scores.json"),
        ("b/scores.json", "settings.json is not a file of sample_ddp.py"),
        ("list.json", "is not a file of evaluator.py"),
    ):
        flags = ("--scores", tmp_path / file, "--out", tmp_path / "u.png")
        assert message in run("visualize.py", "compare", runs[0], *flags, expect=2).stderr


def test_runs_of_equal_names_are_told_apart(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "elsewhere/plain")
    run("visualize.py", "compare", runs[1], tmp_path / "elsewhere/plain", "--out", tmp_path / "t.png")
    rows = (tmp_path / "t.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [f"{tmp_path.name}/plain", "elsewhere/plain"]
    (tmp_path / "link").symlink_to(runs[1])
    twice = run("visualize.py", "compare", runs[1], tmp_path / "link", "--out", tmp_path / "u.png", expect=2)
    assert twice.stderr.endswith("is given twice\n")


def test_the_best_of_a_column_is_a_number():
    """Values that are missing or not finite are never the best."""
    header = ["run", "last step", "loss", "images/s"]
    rows = [["a", 1, math.nan, 3.0], ["b", 2, 0.5, 2.0], ["c", 3, 0.25, None], ["d", 4, math.inf, math.nan]]
    _, cells = table_cells(header, rows)
    best = [[text for text, best in row if best] for row in cells]
    assert best == [["3"], [], ["0.25"], []]


@pytest.mark.parametrize("out", ["t.csv", "t"])
def test_the_table_is_named_by_its_picture(runs, tmp_path, out):
    assert "must end in .png" in run("visualize.py", "compare", runs[0], "--out", tmp_path / out, expect=2).stderr
