"""Running sums, non-finite steps and throughput of a run."""

import time

import pytest
import torch

from diffusion import PROCESSES, create_diffusion, create_process
from models import DiT_models
from remix import RemixDiT_models
from runtime.processes import World
from training.batches import BatchSampler
from training.experts import experts_of
from training.statistics import (
    HeldOutErrors,
    NonFiniteSteps,
    ThroughputTimer,
    TrainingStats,
    explain_failure,
    report_line,
)

LOSSES = ("loss", "mse", "vb", "prior")


def test_non_finite_steps_are_counted_apart_from_the_losses():
    """The streaks have the lengths 1, 2 and 1. The details are those of the last step of the longest one."""
    stats = TrainingStats(World(0, 1, torch.device("cpu")), LOSSES)
    for step, loss in enumerate([1.0, float("nan"), 2.0, float("inf"), float("nan"), 3.0, float("inf")]):
        losses = torch.tensor([loss, 10 * loss, 0.0, 0.5])
        stats.add(step, losses, norm=torch.tensor(loss))
        assert stats.longest_streak() == (0, 1, 1, 1, 2, 2, 2)[step]
    saved = stats.state_dict()
    assert {name: value.shape for name, value in saved.items()} == {"sums": (5,), "bad": (6,)}
    restored = TrainingStats(World(0, 1, torch.device("cpu")), LOSSES)
    restored.load_state_dict(saved)
    for each in (stats, restored):
        means, nonfinite = each.read()
        assert means == {"loss": 2.0, "mse": 20.0, "vb": 0.0, "prior": 0.5}
        assert nonfinite[:4] == (4, 1, 2, 4)
        assert str(nonfinite.loss) == str(nonfinite.norm) == "nan"
        assert each.read()[0] == {"loss": None, "mse": None, "vb": None, "prior": None}, "the sums start again"


def test_the_line_of_a_report():
    performance = {"images_per_s": 4, "mfu": 0.3, "memory_gib": 2}
    schedule = {"lr": 1e-4, "coeff_lr": 1e-2, "prior_weight": 1e-5}
    metrics = {"step": 10, **dict.fromkeys(LOSSES, 0.5), "bad_steps": 3, **schedule, **performance}
    line = report_line(metrics, max_steps=20, batch_size=8)
    assert line.startswith("step 0000010/0000020  loss 0.5000  mse 0.5000  prior 0.5000  ")
    assert line.endswith("3 non-finite steps  lr 1.00e-04  4 images/s  MFU 0.30  2.0 GiB  0:00:20 left")
    assert report_line(metrics, max_steps=20, batch_size=8, pause_s=70).endswith("0:01:30 left")
    assert "  1 non-finite step  " in report_line(metrics | {"bad_steps": 1}, max_steps=20, batch_size=8)


def test_pauses_do_not_count_as_training_time(monkeypatch):
    clock = iter([100.0, 101.0, 151.0, 152.0, 162.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = ThroughputTimer(torch.device("cpu"), flops_per_image=2.0, peak_flops_per_s=8.0)
    timer.add(30)
    with timer.paused():
        pass
    assert timer.last_pause == 50
    assert timer.read()["images_per_s"] == pytest.approx(30 / 2)
    timer.add(40)
    speed = timer.read()
    assert speed["images_per_s"] == pytest.approx(40 / 10)
    assert speed["mfu"] == pytest.approx(4 * 2 / 8)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_failure_names_the_noise_levels_of_the_step(name):
    sampler = BatchSampler(0, 8, World(0, 1, torch.device("cpu")), process=create_process(name))
    text = explain_failure(NonFiniteSteps(3, 0, 3, 7, float("nan"), 1.0), sampler, experts_of(DiT_models["DiT-T/4"](8)))
    assert "3 steps in a row" in text
    assert f"the last, step 7: {sampler.process.scale.describe(sampler.timesteps(7))}, loss nan" in text


def test_errors_of_a_batch_of_times_equal_those_of_single_times():
    """Two times use other images and other noise; the same time uses the same in any batch."""
    x, y = torch.randn(6, 4, 8, 8), torch.arange(6) % 2
    model = RemixDiT_models["RemixDiT-T/4"](input_size=8, num_classes=2).expert(2)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    measure = HeldOutErrors(create_diffusion(), x, y, per_time=4)
    one, several = (measure(model, [3, 500, 999, 500], n) for n in (1, 2))
    torch.testing.assert_close(one, several)
    assert len(set(one.tolist())) == 3
    other = HeldOutErrors(create_diffusion(), x, y, per_time=4, seed=1)
    assert not torch.equal(other(model, [3]), one[:1])
