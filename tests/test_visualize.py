"""Figures of a trained model: mixing coefficients, losses of the experts, grids side by side."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run, training_flags
from PIL import Image

from checkpoint import build_model, load_model
from diffusion import create_diffusion, create_process
from features import FeatureDataset
from training.statistics import noise_errors


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
    diffusion = create_diffusion()
    timesteps = [500, 582, 665]
    expert_error = noise_errors(model.expert(3), diffusion, x, y, timesteps, per_timestep=8).mean()
    base, _ = load_model(tmp_path / "dit.pt")
    base_error = noise_errors(base, diffusion, x, y, timesteps, per_timestep=8).mean()
    assert float(rows[2 + 3][1 + 3]) == pytest.approx(float(expert_error / base_error - 1), abs=1e-4)
    wrong = run("visualize.py", "losses", ckpt, *flags, f"--pretrained={ckpt}", expect=2).stderr
    assert "not the plain DiT" in wrong


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
    flow, times = create_process(**config["diffusion"]), [1 - 0.875 / 4, 1 - 0.875 * 3 / 4]
    errors = [noise_errors(each, flow, x, y, times, per_timestep=8).mean() for each in (model.expert(1), base)]
    assert float(rows[2 + 1][1]) == pytest.approx(float(errors[0] / errors[1] - 1), abs=1e-4)


def test_coefficients_over_training_are_drawn(trained, tmp_path):
    run("visualize.py", "training", trained, "--out", tmp_path / "training.png")
    rows = rows_of(tmp_path / "training.csv")
    assert [row[0] for row in rows] == ["step", "1", "2", "3", "4"]
    raw, _ = load_model(trained / "checkpoints/0000004.pt", ema=False)
    assert [float(v) for v in rows[-1][1:]] == pytest.approx(raw.coefficients().flatten().tolist(), abs=1e-5)


def test_grids_side_by_side(sampled, tmp_path):
    samples = sampled / "samples.npz"
    run("visualize.py", "grids", samples, samples, "--images=5", "--out", tmp_path / "two.png")
    picture = np.array(Image.open(tmp_path / "two.png"))
    half = picture.shape[0] // 2
    assert np.array_equal(picture[20:half], picture[half + 18 : 2 * half - 2])
