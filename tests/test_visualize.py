"""Figures of a trained model: mixing coefficients, losses of the experts, grids side by side."""

import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, file_limit, run, training_flags
from PIL import Image

import visualize
from checkpoint import build_model, load_model
from diffusion import create_diffusion, create_process
from features.dataset import FeatureDataset
from interop.own import save_checkpoint
from training.statistics import HeldOutErrors


def rows_of(path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


def test_coefficients_are_drawn(ckpt, tmp_path):
    run("visualize.py", "coefficients", ckpt, "--out", tmp_path / "alpha.png")
    rows = rows_of(tmp_path / "alpha.csv")
    assert rows[0] == ["block", "expert", "first_timestep", "last_timestep", "basis_0", "basis_1"]
    alpha = load_model(ckpt)[0].coefficients()
    assert [[float(v) for v in row[4:]] for row in rows[1:]] == [pytest.approx(row) for row in alpha.tolist()]
    assert [row[2:4] for row in rows[1:]][:2] == [["0", "165"], ["166", "332"]]
    assert Image.open(tmp_path / "alpha.png").width > 500


def test_a_runs_folder_stands_for_its_newest_checkpoint(ckpt, tmp_path):
    folder = shutil.copytree(ckpt.parent.parent, tmp_path / "run")
    run("visualize.py", "coefficients", folder)
    run("visualize.py", "coefficients", ckpt, "--out", tmp_path / "file.png")
    assert (folder / "coefficients.csv").read_text() == (tmp_path / "file.csv").read_text()


def test_a_full_disk(ckpt, tmp_path):
    with file_limit(10_000):
        stderr = run("visualize.py", "coefficients", ckpt, "--out", tmp_path / "alpha.png", expect=2).stderr
    assert stderr == f"visualize.py: error: {tmp_path / 'alpha.png'}: File too large\n"
    assert not list(tmp_path.iterdir())


def test_a_plain_model_has_no_coefficients(tmp_path):
    torch.save(torch.load(GOLDEN / "dit.pt", weights_only=True)["state_dict"], tmp_path / "dit.pt")
    assert "plain DiT" in run("visualize.py", "coefficients", tmp_path / "dit.pt", "--num-heads", 4, expect=2).stderr


def test_losses_of_the_experts_are_drawn(ckpt, features, tmp_path):
    """One row per expert, one column per interval: the expert's error relative to the pretrained model's, minus one."""
    state = torch.load(ckpt, weights_only=True)
    config = {**state["config"]["model"], "name": "DiT-T/2", "remix": None}
    torch.save(build_model(config).state_dict(), tmp_path / "dit.pt")
    flags = (f"--data-path={features}", f"--pretrained={tmp_path / 'dit.pt'}", "--images=8", "--per-interval=3")
    run("visualize.py", "losses", ckpt, *flags, "--out", tmp_path / "losses.png")
    rows = rows_of(tmp_path / "losses.csv")
    assert rows[0][:3] == ["expert", "t_0_165", "t_166_332"]
    assert len(rows) == 2 + 6
    model, _ = load_model(ckpt)
    x, y = FeatureDataset(features).__getitems__(np.random.default_rng(0).permutation(24)[:8].tolist())
    measure, timesteps = HeldOutErrors(create_diffusion(), x, y, per_time=8), [500, 582, 665]
    expert_error = measure(model.expert(3), timesteps).mean()
    base, _ = load_model(tmp_path / "dit.pt")
    base_error = measure(base, timesteps).mean()
    assert float(rows[2 + 3][1 + 3]) == pytest.approx(float(expert_error / base_error - 1), abs=1e-4)
    wrong = run("visualize.py", "losses", ckpt, *flags, f"--pretrained={ckpt}", expect=2).stderr
    assert "not the plain DiT" in wrong
    # Other names would have other labels, as after --new-classes.
    config = {**state["config"], "model": config, "data": state["config"]["data"] | {"classes": ["a", "b", "c"]}}
    weights = torch.load(tmp_path / "dit.pt", weights_only=True)
    save_checkpoint(tmp_path / "old.pt", state | {"config": config, "model": weights, "ema": weights})
    old = run("visualize.py", "losses", ckpt, flags[0], f"--pretrained={tmp_path / 'old.pt'}", expect=2).stderr
    assert "was trained with other classes than" in old
    other = shutil.copytree(features, tmp_path / "other")
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"classes": ["a", "b", "c"]}))
    refused = run("visualize.py", "losses", ckpt, f"--data-path={other}", "--out", tmp_path / "no.png", expect=2).stderr
    assert "differs from the features of" in refused and "in classes: " in refused
    # Without it, the errors are relative to the best expert of each interval.
    flags = [flag for flag in flags if "pretrained" not in flag]
    run("visualize.py", "losses", ckpt, *flags, "--out", tmp_path / "best.png")
    [header, best, *experts] = rows_of(tmp_path / "best.csv")
    assert (header, best[:2]) == (rows[0], ['"best', ' absolute"'])
    ratios = 1 + np.array(rows[2:], float)[:, 1:]
    np.testing.assert_allclose(np.array(experts, float)[:, 1:], ratios / ratios.min(0) - 1, atol=1e-5)
    np.testing.assert_allclose(np.array(best[2:], float), np.array(rows[1][2:], float) * ratios.min(0), rtol=1e-5)
    assert Image.open(tmp_path / "best.png").width == Image.open(tmp_path / "losses.png").width / 2


def test_figures_of_a_flow_name_its_noise_levels(features, tmp_path):
    flags = ["--process=flow", "--max-steps=1", "--n-experts=2", "--boundaries", 0, 0.875, 1]
    run("train_fast.py", *training_flags(features, tmp_path, "flow"), *flags)
    ckpt = tmp_path / "flow/checkpoints/0000001.pt"
    model, config = load_model(ckpt)
    run("visualize.py", "coefficients", ckpt, "--out", tmp_path / "alpha.png")
    rows = rows_of(tmp_path / "alpha.csv")
    assert rows[0][:4] == ["block", "expert", "lowest_noise_level", "highest_noise_level"]
    assert [row[1:4] for row in rows[1:]] == [["0", "0", "0.875"], ["1", "0.875", "1"]]

    torch.manual_seed(0)
    base = build_model({**config["model"], "name": "DiT-T/2", "remix": None}).eval()
    torch.save(base.state_dict(), tmp_path / "dit.pt")
    flags = (f"--data-path={features}", f"--pretrained={tmp_path / 'dit.pt'}", "--images=8", "--per-interval=2")
    run("visualize.py", "losses", ckpt, *flags, "--out", tmp_path / "losses.png")
    rows = rows_of(tmp_path / "losses.csv")
    assert rows[0] == ["expert", "u_0_0.875", "u_0.875_1"]
    x, y = FeatureDataset(features).__getitems__(np.random.default_rng(0).permutation(24)[:8].tolist())
    measure = HeldOutErrors(create_process(**config["diffusion"]), x, y, per_time=8)
    errors = [measure(each, [1 - 0.875 / 4, 1 - 0.875 * 3 / 4]).mean() for each in (model.expert(1), base)]
    assert float(rows[2 + 1][1]) == pytest.approx(float(errors[0] / errors[1] - 1), abs=1e-4)


def test_coefficients_over_training_are_drawn(trained, tmp_path):
    run("visualize.py", "training", trained, "--out", tmp_path / "training.png")
    rows = rows_of(tmp_path / "training.csv")
    assert [row[0] for row in rows] == ["step", "1", "2", "3", "4"]
    raw, _ = load_model(trained / "checkpoints/0000004.pt", ema=False)
    assert [float(v) for v in rows[-1][1:]] == pytest.approx(raw.coefficients().flatten().tolist(), abs=1e-5)


@pytest.fixture
def figure(monkeypatch):
    """The figures that are drawn, instead of their files."""
    drawn = []
    monkeypatch.setattr(visualize, "save_png", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr(visualize, "write_csv", lambda *arguments: None)
    return drawn


def test_the_figure_of_training_has_a_title_and_whole_experts(trained, figure, tmp_path):
    visualize.draw_training(tmp_path / "a.png", Namespace(run=trained))
    assert figure[0].get_suptitle() == "trained: mixing coefficients over training"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    # One heat map per basis, with a row for each expert and the last step on the right.
    for k, axis in enumerate(figure[0].axes[:2]):
        drawn = axis.images[0].get_array()
        assert drawn[:, -1].tolist() == [alpha[k] for alpha in lines[-1]["coefficients"]]
        assert all(tick == round(tick) for tick in axis.get_yticks())


def test_grids_side_by_side(sampled, tmp_path):
    samples = sampled / "samples.npz"
    run("visualize.py", "grids", samples, sampled, "--images=5", "--out", tmp_path / "two.png")
    picture = np.array(Image.open(tmp_path / "two.png"))
    half = picture.shape[0] // 2
    assert np.array_equal(picture[20:half], picture[half + 18 : 2 * half - 2])


def save_samples(folder, labels: list[int] | None):
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", images, *([np.array(labels)] if labels else []))


def test_the_samples_of_a_column_have_one_class(tmp_path):
    for name, labels in {"a": [3, 1, 4, 1], "b": [3, 1, 5, 1], "foreign": None, "c": [3, 1, 4, 2]}.items():
        save_samples(tmp_path / name, labels)
    a, b, foreign, c = (tmp_path / name for name in ("a", "b", "foreign", "c"))
    wrong = run("visualize.py", "grids", a, foreign, b, "--out", tmp_path / "g.png", expect=2).stderr
    assert f"sample 2 has the label 4 in {a / 'samples.npz'}, and 5 in {b / 'samples.npz'}" in wrong
    assert wrong.count("\n") == 1 and not (tmp_path / "g.png").exists()
    wrong = run("visualize.py", "grids", foreign, a, c, "--out", tmp_path / "g.png", expect=2).stderr
    assert "sample 3 has the label 1" in wrong
    # Only the samples that are drawn count.
    run("visualize.py", "grids", a, b, "--images=2", "--out", tmp_path / "two.png")
    run("visualize.py", "grids", a, c, foreign, "--images=3", "--out", tmp_path / "three.png")


def test_existing_files_are_not_replaced(ckpt, trained, tmp_path):
    """As by convert.py; also if only the numbers of the figure exist."""
    for figure, source, suffix in (
        ("coefficients", ckpt, ".png"),
        ("coefficients", ckpt, ".csv"),
        ("training", trained, ".csv"),
        ("grids", "nowhere.npz", ".png"),
        ("ema", "nowhere.pt", ".csv"),
    ):
        existing = (tmp_path / figure).with_suffix(suffix)
        existing.write_text("kept")
        done = run("visualize.py", figure, source, "--out", tmp_path / f"{figure}.png", expect=2)
        assert done.stderr == f"visualize.py: error: {existing} exists: choose another name, or remove it\n"
        assert existing.read_text() == "kept"
        existing.unlink()
    assert not list(tmp_path.iterdir())
    # A grid has no CSV file.
    save_samples(tmp_path / "a", [0, 1, 2, 3])
    (tmp_path / "g.csv").write_text("kept")
    done = run("visualize.py", "grids", tmp_path / "a", "--out", tmp_path / "g.png")
    assert done.stdout.endswith(f"wrote {tmp_path / 'g.png'}\n")
