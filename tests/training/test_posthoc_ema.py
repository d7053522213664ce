"""Post-hoc EMA: the widths of profiles, the least-squares weights, and averages that were also tracked directly."""

import csv
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, make_trainer, random_microbatch, random_remix_dit, run, training_flags
from ema_pytorch import PostHocEMA

from checkpoint import load_model
from diffusion import create_process
from mixing.experts import stored_parameters, stored_state
from reports.ema import error_measure
from runtime.errors import UserError
from training.posthoc_ema import (
    TRACKED_STDS,
    decay_at,
    fit_snapshots,
    gamma_of_std,
    reconstruct,
    solve_weights,
    write_snapshot,
)
from training.statistics import HeldOutErrors


@pytest.mark.parametrize("std", [0.01, 0.1, 0.28])
def test_the_width_of_a_profile(std):
    """The profile gamma + 1 times tau^gamma on [0, 1] has the moments (gamma + 1) / (gamma + 1 + n)."""
    gamma = gamma_of_std(std)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(std, rel=1e-6)


def test_the_first_average_is_the_weights():
    assert decay_at(1, 0.1) == 0


def test_weights_solve_the_least_squares_problem():
    """The profiles are compared as functions, at Gauss-Legendre points between the snapshots, where they are smooth.

    The condition that the weights sum to 1 replaces the last weight by 1 minus the others.
    """
    times = [300, 700, 1000, 1300, 2000]
    steps, stds = [t for t in times for _ in TRACKED_STDS], [std for _ in times for std in TRACKED_STDS]
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    edges = np.array([0, *times])
    tau = np.concatenate([a + (b - a) * (nodes + 1) / 2 for a, b in pairwise(edges)])
    weight = np.concatenate([(b - a) / 2 * node_weights for a, b in pairwise(edges)])

    def profile(step, std):
        gamma = gamma_of_std(std)
        return np.where(tau < step, (gamma + 1) / step * (tau / step) ** gamma, 0)

    for std in (0.03, 0.07, 0.15):
        basis = np.stack([profile(*item) for item in zip(steps, stds, strict=True)], axis=1)
        root = np.sqrt(weight)
        first, last = basis[:, :-1], basis[:, -1:]
        wanted = profile(2000, std)
        others = np.linalg.lstsq((first - last) * root[:, None], (wanted - last[:, 0]) * root, rcond=None)[0]
        weights, residual = solve_weights(steps, stds, 2000, std)
        np.testing.assert_allclose(weights, [*others, 1 - others.sum()], rtol=0, atol=1e-8)
        difference = np.linalg.norm((basis @ weights - wanted) * root) / np.linalg.norm(wanted * root)
        assert residual == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50, 400])
@pytest.mark.parametrize("std", [0.01, 0.05, 0.06, 0.2, 0.28])
def test_weights_sum_to_1(n, std):
    """Also of snapshots at irregular steps, and of the first steps."""
    times = np.unique((np.linspace(1, n**0.5, n) ** 2 * 10).astype(int))
    steps, stds = [int(t) for t in times for _ in TRACKED_STDS], [s for _ in times for s in TRACKED_STDS]
    weights, _ = solve_weights(steps, stds, steps[-1], std)
    assert weights.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-7), ("float16", 5e-4)])
@pytest.mark.parametrize(("n", "std"), [(1, 0.075), (2, 0.06), (2, 0.125), (10, 0.03), (10, 0.2), (50, 0.28)])
def test_a_parameter_that_never_changes_keeps_its_value(tmp_path, n, std, dtype, tolerance):
    values = torch.tensor([-3.0, 1e-3, 0.1, 7.3])
    for step in range(1, n + 1):
        write_snapshot(tmp_path, 100 * step, {str(s): {"w": values} for s in TRACKED_STDS}, dtype)
    fit = fit_snapshots(tmp_path / f"checkpoints/{100 * n:07d}.pt", std)
    result = reconstruct(fit, {"w": torch.zeros(4)})["w"]
    torch.testing.assert_close(result, values, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("n", "std", "percent"), [(2, 0.2, "44.9"), (5, 0.03, "14.5"), (1, 0.28, "135."), (10, 0.28, "29.7")]
)
def test_a_width_that_the_snapshots_do_not_give_is_refused(tmp_path, n, std, percent):
    for step in range(1, n + 1):
        write_snapshot(tmp_path, step * 1000 // n, {str(s): {"w": torch.ones(1)} for s in TRACKED_STDS}, "float32")
    with pytest.raises(UserError, match=rf"is off by {percent}\d+%, more than 10%: .* closer to 0.05 or 0.1") as caught:
        fit_snapshots(tmp_path / "checkpoints/0001000.pt", std)
    assert "\n" not in str(caught.value)


def random_walk(steps: int, size: int = 40):
    """Yield the weights after each step of a training with decreasing changes."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(size, generator=generator, dtype=torch.float64)
    for step in range(1, steps + 1):
        weights = weights + 1e-3 * (1 - step / steps / 2) * torch.randn(size, generator=generator, dtype=torch.float64)
        yield step, weights


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_a_width_equals_the_average_that_was_tracked_directly(tmp_path, dtype, tolerance):
    wanted = (0.05, 0.075, 0.1, 0.15)
    tracked = {std: torch.zeros(40, dtype=torch.float64) for std in wanted}
    for step, weights in random_walk(1000):
        for std, average in tracked.items():
            average.lerp_(weights, 1 - decay_at(step, std))
        if step % 20 == 0:
            averages = {str(std): {"w": tracked[std]} for std in TRACKED_STDS}
            write_snapshot(tmp_path, step, averages, dtype)
    state = {"w": torch.zeros(40), "fixed": torch.ones(3)}
    for std in wanted:
        result = reconstruct(fit_snapshots(tmp_path / "checkpoints/0001000.pt", std), state)
        error = (result["w"] - tracked[std]).norm() / tracked[std].norm()
        assert error < tolerance, f"width {std}"
        assert torch.equal(result["fixed"], state["fixed"])


def test_ema_pytorch_agrees(tmp_path):
    """Its averages of the same weights, and its combination of its own snapshots.

    The weights of its combination (version 0.8.3) do not have to sum to 1. Here they do, to less than 1e-4, because
    there are 20 snapshots.
    """
    model = torch.nn.Linear(40, 1, bias=False).double()
    settings = dict(checkpoint_every_num_steps=10, checkpoint_folder=str(tmp_path / "theirs"))
    theirs = PostHocEMA(model, sigma_rels=TRACKED_STDS, update_every=1, checkpoint_dtype=torch.float32, **settings)
    tracked = {str(std): {"weight": torch.zeros(1, 40, dtype=torch.float64)} for std in TRACKED_STDS}
    for step, weights in random_walk(200):
        model.weight.data.copy_(weights)
        theirs.update()
        for std, state in tracked.items():
            state["weight"].lerp_(model.weight.data, 1 - decay_at(step, float(std)))
        if step % 10 == 0:
            write_snapshot(tmp_path, step, tracked, "float32")
    fit = fit_snapshots(tmp_path / "checkpoints/0000200.pt", 0.08)
    ours = reconstruct(fit, {"weight": model.weight.data})["weight"]
    expected = theirs.synthesize_ema_model(sigma_rel=0.08, step=200).ema_model.weight.data
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-3


def test_training_averages_the_weights_after_each_step():
    """The weight of step k in the average after step t is (k / t)^(gamma + 1) - ((k - 1) / t)^(gamma + 1)."""
    trainer = make_trainer(random_remix_dit(depth=1), lr=1e-2, ema_stds=TRACKED_STDS)
    history = []
    for step in range(4):
        trainer.step(step, [random_microbatch(step)])
        history.append({name: p.detach().double().clone() for name, p in stored_parameters(trainer.model).items()})
    for std, state in trainer.whole_averages().items():
        shares = np.diff((np.arange(5) / 4) ** (gamma_of_std(float(std)) + 1))
        assert "backbone.pos_embed" not in state, "it is not trained"
        for name, average in state.items():
            expected = sum(share * weights[name] for share, weights in zip(shares, history, strict=True))
            torch.testing.assert_close(average, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_run_with_snapshots(features, tmp_path):
    """The averages continue after an interruption, an EMA of another width is exported, and the figure is drawn."""
    flags = [*training_flags(features, tmp_path, "run"), "--ema-snapshots=2", "--ckpt-every=2", "--sample-every=0"]
    run("train_fast.py", *flags, "--max-steps=4", "--ema-snapshot-dtype=float32")
    last = tmp_path / "run/checkpoints/0000004.pt"
    snapshot = torch.load(tmp_path / "run/ema/0000004.pt", weights_only=True)
    shutil.copy(last, tmp_path / "whole.pt")
    last.unlink()
    run("train_fast.py", *flags, "--max-steps=4", "--ema-snapshot-dtype=float32", "--resume=auto")
    assert_same_weights(last, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "run/ema/0000004.pt", weights_only=True)
    assert snapshot.keys() == {"0.05", "0.1"}
    assert all(torch.equal(value, again[std][name]) for std in snapshot for name, value in snapshot[std].items())

    done = run("convert.py", last, tmp_path / "ema.safetensors", "--to=safetensors", "--ema-std=0.1")
    assert "EMA of width 0.1: the profile of the combination of 4 tracked averages is off by 0.00%" in done.stdout
    model, config = load_model(tmp_path / "ema.safetensors")
    assert "0.1" in config["source"]
    for name, value in snapshot["0.1"].items():
        torch.testing.assert_close(stored_state(model)[name], value, rtol=1e-5, atol=1e-6)

    done = run("visualize.py", "ema", last, "--data-path", features, "--images=2", "--stds", 0.05, 0.1)
    # What it will take is said before it is done.
    plan = "3 EMAs (that of the training and 2 widths), of each the error at 50 noise levels: about 0:00:"
    assert plan in done.stdout[: done.stdout.index("wrote")]
    with open(last.with_name("0000004-ema.csv")) as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["std", "training", "0.05", "0.1"]
    new = "--out", tmp_path / "new.png"
    refused = run("visualize.py", "ema", last, "--data-path", features, "--stds", 0.05, 0.28, *new, expect=2).stderr
    assert "EMA of width 0.28" in refused and refused.count("\n") == 1
    assert "ema needs --data-path" in run("visualize.py", "ema", last, *new, expect=2).stderr
    ignored = run("visualize.py", "ema", last, "--data-path", features, "--score-samples=8", *new, expect=2)
    assert "need --score-against" in ignored.stderr


def test_the_error_of_an_independent_expert_is_that_on_its_noise_levels():
    seen = []

    def model(x, t, y):
        seen.append(int(t))
        return x.repeat(1, 2, 1, 1)

    errors = HeldOutErrors(create_process(), torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long), per_time=1)
    measure = error_measure(errors, [250, 500])
    measure.whole(model)
    assert seen == [*range(250, 500, 20)] and measure.parts == len(seen)


def test_a_checkpoint_follows_the_snapshot_of_its_step(features, tmp_path, monkeypatch):
    """A run that is killed between the two resumes from an earlier step, and writes both."""
    order = []
    monkeypatch.setattr("training.writer.write_snapshot", lambda folder, step, *_: order.append(("snapshot", step)))
    monkeypatch.setattr(
        "training.writer.save_checkpoint", lambda path, state: order.append(("checkpoint", state["step"]))
    )
    flags = [*training_flags(features, tmp_path, "run"), "--ema-snapshots=2", "--ckpt-every=2", "--max-steps=4"]
    run("train_fast.py", *flags)
    assert order == [("snapshot", 2), ("checkpoint", 2), ("snapshot", 4), ("checkpoint", 4)]


def test_a_run_without_snapshots_has_no_other_widths(ckpt, tmp_path):
    done = run("convert.py", ckpt, tmp_path / "out.pt", "--to=original", "--ema-std=0.1", expect=2)
    assert "train with --ema-snapshots" in done.stderr
    assert not list(tmp_path.iterdir())
