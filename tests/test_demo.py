"""The demo's commands, images, figure and tables, and its committed results. .ci/run runs the demo itself."""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import demo
from figures import CAPTION_HEIGHT, GAP, SMALLEST_TILE
from runtime.errors import UserError


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[tuple[str, list[str]]]:
    """The commands that a demo in an empty folder would run. The scores and the pictures exist beforehand."""
    monkeypatch.chdir(tmp_path)
    folder = Path("demo")
    folder.mkdir()
    (folder / "settings.json").write_text('{"seed": 0, "quick": false}')
    recorded = []

    def record(processes: int, script: str, *words):
        recorded.append((script, list(map(str, words))))
        if script == "evaluator.py":
            scores = {"Inception Score": 6.0, "FID": 17.0, "sFID": 1.0, "Precision": 0.8, "Recall": 0.7}
            (folder / "scores.json").write_text(json.dumps(dict.fromkeys(demo.MODELS, scores)))

    monkeypatch.setattr(demo, "run", record)
    monkeypatch.setattr(demo, "write_images", lambda out, per_class: None)
    monkeypatch.setattr(demo, "draw_garments", lambda samples, path: None)
    monkeypatch.setattr(demo, "draw_errors", lambda errors, path: None)
    monkeypatch.setattr(demo, "heldout_errors", lambda checkpoint, features, per_time: np.full(200, 0.04))
    demo.main(argparse.Namespace(out=None, quick=False, processes=1, seed=0))
    return recorded


def test_every_step_is_run_for_every_model(commands):
    scripts = [script for script, _ in commands]
    assert scripts == (
        ["extract_features.py"] * 2 + ["train_fast.py"] * 2 + ["sample_ddp.py"] * 3 + ["evaluator.py", "visualize.py"]
    )
    # Both runs have the same images, steps and rates.
    continued, remix = (set(words) for script, words in commands if script == "train_fast.py")
    assert continued - remix == {"--prefix=continued", "--model=DiT-T/4"}
    assert remix - continued == {
        *("--prefix=remix", "--model=RemixDiT-T/4", "--n-basis=4", "--n-experts=20", "--prior-bonus=3")
    }


def test_the_scripts_accept_the_flags(commands):
    """Every command ends because its input does not exist, except the sampling of the pretrained model."""
    for script, words in commands:
        if "--name=pretrained" not in words:
            assert "no such f" in run(script, *words, expect=2).stderr


def test_a_demo_that_was_interrupted_skips_what_is_finished(commands, capsys):
    finished = ["features/train/index.json", "features/test/index.json", "samples/pretrained/samples.npz"]
    for path in (*finished, "runs/continued/checkpoints/0002500.pt"):
        (Path("demo") / path).parent.mkdir(parents=True, exist_ok=True)
        (Path("demo") / path).touch()
    commands.clear()
    demo.main(argparse.Namespace(out="demo", quick=False, processes=1, seed=0))
    (training,) = (words for script, words in commands if script == "train_fast.py")
    assert {"--prefix=remix", "--resume=auto", "--ckpt-every=500"} <= set(training)
    assert [script for script, _ in commands] == ["train_fast.py", "sample_ddp.py", "sample_ddp.py", "visualize.py"]


def test_only_the_same_demo_continues_in_a_folder(commands):
    with pytest.raises(UserError, match="seed=0, not 3"):
        demo.main(argparse.Namespace(out="demo", quick=False, processes=1, seed=3))
    Path("other").mkdir()
    Path("other", "file").touch()
    with pytest.raises(UserError, match="--out other is not empty"):
        demo.main(argparse.Namespace(out="other", quick=False, processes=1, seed=0))


def test_the_images_are_those_of_the_sheets(tmp_path):
    """Of both splits, in 16x16 pixels: the rows of a sheet are cut from left to right."""
    demo.write_images(tmp_path, per_class=2)
    sheet = np.asarray(Image.open(demo.IMAGES / "train" / "9-ankle-boot.png"))
    assert np.array_equal(demo.cut_sheet(demo.IMAGES / "train" / "9-ankle-boot.png")[101], sheet[16:32, 16:32])
    for number in (0, 1):
        written = np.asarray(Image.open(tmp_path / "train" / "9-ankle-boot" / f"{number:04d}.png"))
        assert np.array_equal(written, sheet[:16, 16 * number : 16 * (number + 1)])
    assert len(list(tmp_path.glob("train/*/*.png"))) == len(list(tmp_path.glob("test/*/*.png"))) == 20
    with np.load(tmp_path / "test.npz") as file:
        assert file["arr_0"].shape == (20, 16, 16, 3)
        assert np.array_equal(file["arr_0"][-1, ..., 2], Image.open(tmp_path / "test" / "9-ankle-boot" / "0001.png"))


def test_the_grid_has_a_row_for_each_class(tmp_path):
    """Of each class, as many samples as all classes have. A sample's gray level is ten times its label."""
    labels = np.array([*range(10), *range(10), 9, 9])
    images = np.full((22, 16, 16, 3), 10) * labels[:, None, None, None]
    np.savez(tmp_path / "samples.npz", arr_0=images.astype(np.uint8), arr_1=labels)
    demo.draw_garments(tmp_path / "samples.npz", tmp_path / "garments.png")
    grid = np.asarray(Image.open(tmp_path / "garments.png"))
    height, width = CAPTION_HEIGHT + SMALLEST_TILE + GAP, SMALLEST_TILE + GAP
    assert grid.shape[:2] == (10 * height + GAP, 2 * width + GAP)
    for label in range(10):
        assert (grid[(label + 1) * height - 20, [20, width + 20]] == 10 * label).all()


def test_the_errors_are_those_of_the_predicted_noise(monkeypatch, tmp_path):
    """A model that predicts no noise has the error 1 at every timestep."""
    from sampling import loading

    class Zero(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:])

    pixels = ["--vae=none", "--grayscale", "--no-mirror", "--image-size=16", "--num-workers=0"]
    demo.write_images(tmp_path, per_class=10)
    run("extract_features.py", f"--data-path={tmp_path / 'test'}", f"--features-path={tmp_path / 'features'}", *pixels)
    monkeypatch.setattr(loading, "load_denoiser", lambda paths: (Zero(), {"diffusion": {"process": "gaussian"}}))
    errors = demo.heldout_errors(tmp_path / "any.pt", tmp_path / "features", per_time=100)
    assert errors.shape == (1000 // demo.EVERY,)
    assert errors == pytest.approx(np.ones(200), abs=0.05)
    assert errors.mean() == pytest.approx(1, abs=0.002)


def test_the_figure_has_the_changes_of_each_part_of_the_timesteps(tmp_path):
    base = np.linspace(1, 0.01, 200)
    errors = dict(pretrained=base, continued=0.9 * base, remix=np.where(np.arange(200) < 100, 1.0, 0.5) * base)
    changes = demo.error_changes(errors)
    assert changes["pretrained"] == pytest.approx(np.zeros(40))
    assert changes["continued"] == pytest.approx(np.full(40, -10))
    assert changes["remix"] == pytest.approx(np.repeat([0, -50], 20))
    demo.draw_errors(errors, tmp_path / "errors.png")
    assert Image.open(tmp_path / "errors.png").width > 500


def test_the_time_left_follows_the_speed_of_the_machine(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(demo, "SECONDS", {"images": 10, "encode": 20, "score": 30})
    progress = demo.Progress()
    progress.heading("images", "Write")
    # Skipped, because an earlier run finished it.
    progress.heading("encode", "Encode")
    # Three times as slow: 60 seconds for 20. The estimate counts as 30 seconds.
    now[0] += 60
    progress.heading("score", "Score")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line] == [
        "== 1 of 3: Write (0:01:00 left)",
        "== 2 of 3: Encode (0:00:50 left)",
        "== 3 of 3: Score (0:00:54 left)",
    ]


# The committed results of five seeds


def results() -> dict[str, list[dict]]:
    rows = demo.read_rows(demo.RESULTS)
    return {name: [row for row in rows if row["model"] == name] for name in demo.MODELS}


def test_in_all_five_seeds_fid_and_error_fall_with_each_model():
    rows = results()
    assert {tuple(row["seed"] for row in rows[name]) for name in demo.MODELS} == {("0", "1", "2", "3", "4")}
    for key in ("FID", "error"):
        values = np.array([[float(row[key]) for row in rows[name]] for name in demo.MODELS])  # [models, seeds]
        assert (values[0] > values[1]).all()
        assert (values[1] > values[2]).all()


def test_the_demo_states_the_spread_over_the_seeds():
    text = demo.seed_table(demo.read_rows(demo.RESULTS))
    fid = {name: np.array([float(row["FID"]) for row in rows]) for name, rows in results().items()}
    change = fid["remix"] - fid["continued"]
    spread = f"{change.mean():.2f} ± {np.std(change, ddof=1):.2f}, lower in 5 of 5"
    assert f"Remix-DiT 4-20 relative to continued training: {spread}" in text


def test_the_documentation_has_the_results():
    def spread(numbers, digits: int = 2) -> str:
        return f"{numbers.mean():.{digits}f} ± {numbers.std(ddof=1):.{digits}f}"

    keys = (*demo.SCORES, "error")
    values = {
        name: {key: np.array([float(row[key]) for row in rows]) for key in keys} for name, rows in results().items()
    }
    fid = [values[name]["FID"] for name in demo.MODELS]
    changes = [spread(after - before) for before, after in pairwise(fid)]
    cells = [f"{own.mean():.2f} ({change})" for own, change in zip(fid[1:], changes, strict=True)]
    line = " | ".join(["| FID", f"{fid[0].mean():.2f}", *cells]) + " |"
    assert line in (ROOT / "README.md").read_text().splitlines()
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for name, title in demo.MODELS.items():
        shown = [spread(values[name][key], digits) for key, digits in zip(demo.SCORES, (2, 2, 3, 3), strict=True)]
        change = 100 * (values[name]["error"] / values["pretrained"]["error"] - 1)
        shown.append("0" if name == "pretrained" else f"{spread(change)} %")
        assert " | ".join([f"| {title}", *shown]) + " |" in page.splitlines()
    for change in changes:
        assert change in page
