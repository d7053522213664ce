"""The random draws of a step: images, views, experts and timesteps."""

import math

import numpy as np
import pytest
import torch

from diffusion import create_flow, create_process
from features.dataset import FeatureDataset
from models import DiT_models
from remix import RemixDiT
from runtime.processes import World
from training.batches import (
    BatchSampler,
    GlobalBatches,
    Stream,
    draw_label_dropout,
    draw_noise,
    draw_times,
    row_generators,
)

GAUSSIAN = create_process()


def timesteps(step: int, batch_size: int, n_experts: int, experts_per_batch: int, seed: int = 0) -> np.ndarray:
    """The timesteps of a step for experts of equal intervals."""
    return draw_times(seed, step, batch_size, GAUSSIAN, GAUSSIAN.expert_boundaries(n_experts), experts_per_batch)


def test_every_epoch_visits_every_image_once():
    batches = list(GlobalBatches(10, 2, 4, seed=0, steps=range(10), rows=slice(0, 4)))
    items = [item for batch in batches for item in batch]
    for epoch in range(4):
        part = items[10 * epoch : 10 * (epoch + 1)]
        assert sorted(image for image, *_ in part) == list(range(10))
        assert len({draw for *_, draw in part}) == 1
    assert {view for _, view, _ in items} == {0, 1}
    assert [image for image, *_ in items[:10]] != [image for image, *_ in items[10:20]]
    assert len({draw for *_, draw in items}) == 4, "every epoch has draws of its own"


def test_images_depend_only_on_seed_and_step():
    whole = list(GlobalBatches(10, 2, 4, seed=3, steps=range(8), rows=slice(0, 4)))
    halves = [
        list(GlobalBatches(10, 2, 4, seed=3, steps=range(5, 8), rows=rows)) for rows in (slice(0, 2), slice(2, 4))
    ]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole[5:]
    assert whole != list(GlobalBatches(10, 2, 4, seed=4, steps=range(8), rows=slice(0, 4)))


def test_a_batch_larger_than_the_data():
    (batch,) = GlobalBatches(3, 1, 8, seed=0, steps=range(1), rows=slice(0, 8))
    assert [sorted(image for image, *_ in part) for part in (batch[:3], batch[3:6])] == [[0, 1, 2]] * 2


@pytest.mark.parametrize(("n_experts", "per_batch"), [(20, 1), (20, 16), (20, 20), (7, 4), (3, 6), (1, 1)])
def test_every_expert_is_used_equally_often(n_experts, per_batch):
    used = np.zeros(n_experts, dtype=int)
    rounds = n_experts // math.gcd(n_experts, per_batch)
    for step in range(3 * rounds):
        t = timesteps(step, 8 * per_batch, n_experts, per_batch)
        groups = ((n_experts * (t + 1) - 1) // 1000).reshape(per_batch, 8)
        assert (groups == groups[:, :1]).all(), "a group must lie within one expert's timesteps"
        assert len(set(groups[:, 0])) == min(per_batch, n_experts), "no expert is repeated while N allows"
        np.add.at(used, groups[:, 0], 1)
    assert (used == used[0]).all()


def test_timesteps_depend_only_on_seed_and_step():
    assert np.array_equal(timesteps(5, 16, 20, 8, seed=1), timesteps(5, 16, 20, 8, seed=1))
    assert not np.array_equal(timesteps(5, 16, 20, 8, seed=1), timesteps(5, 16, 20, 8, seed=2))
    assert not np.array_equal(timesteps(5, 16, 20, 8, seed=1), timesteps(6, 16, 20, 8, seed=1))
    with pytest.raises(ValueError, match="do not divide"):
        timesteps(0, 10, 20, 4)


@pytest.mark.parametrize(
    ("per_batch", "n_experts"), [(1, 7), (8, 7), (8, 1000), pytest.param(1, 1000, marks=pytest.mark.slow)]
)
def test_timesteps_are_uniform_in_the_long_run(n_experts, per_batch):
    from scipy.stats import chisquare

    batch = 8 * per_batch
    rounds = 40 if n_experts == 1000 else 2000
    steps = rounds // math.gcd(n_experts, per_batch) * n_experts // per_batch
    drawn = [timesteps(step, batch, n_experts, per_batch, seed=3) for step in range(steps)]
    assert chisquare(np.bincount(np.concatenate(drawn), minlength=1000)).pvalue > 1e-3


def test_timesteps_of_an_independent_expert():
    t = draw_times(0, 0, 4000, GAUSSIAN, (125, 250))
    assert (t.min(), t.max()) == (125, 249)
    assert set(draw_times(0, 0, 4000, GAUSSIAN, (0.5, 3.5))) == {1, 2, 3}


def owners(boundaries: list[float], t: np.ndarray) -> np.ndarray:
    """The experts that own the times t, according to a model with these boundaries."""
    model = RemixDiT(DiT_models["DiT-T/4"](8), 2, len(boundaries) - 1, boundaries=boundaries)
    return model.expert_index(torch.from_numpy(t)).numpy()


@pytest.mark.parametrize("boundaries", [[0, 875, 1000], [0, 0.5, 1.5, 400.25, 1000]])
def test_timesteps_lie_within_the_boundaries_of_their_expert(boundaries):
    n = len(boundaries) - 1
    t = np.concatenate([draw_times(0, s, 600 * n, GAUSSIAN, boundaries, n) for s in range(4)])
    experts = owners(boundaries, t)
    assert (np.bincount(experts) == 4 * 600).all(), "experts are sampled equally often"
    for i in range(n):
        drawn = t[experts == i]
        possible = [level for level in range(1000) if boundaries[i] <= level < boundaries[i + 1]]
        assert {drawn.min(), drawn.max()} <= set(possible)
        assert abs(drawn.mean() - np.mean(possible)) <= 0.15 * (len(possible) - 1)


@pytest.mark.parametrize("options", [{}, {"time_sampling": "logit-normal", "time_mean": -0.5, "shift": 3.0}])
def test_times_of_a_flow_follow_its_distribution_within_each_expert(options):
    """With the quantiles as boundaries, the times of all experts together have the undivided distribution."""
    from scipy.stats import kstest

    flow = create_flow(**options)
    boundaries = flow.quantiles(20)
    t = [draw_times(1, s, 160, flow, boundaries, 16) for s in range(50)]
    assert all(part.dtype == np.float32 for part in t)
    for part in t:
        groups = owners(boundaries, part).reshape(16, 10)
        assert (groups == groups[:, :1]).all(), "a group lies within one expert's noise levels"
    levels = 1 - np.concatenate(t).astype(np.float64)
    assert kstest(flow.times.cdf(levels), "uniform").pvalue > 1e-3
    alone = 1 - draw_times(0, 0, 4000, flow, (0.25, 0.5))
    assert 0.25 <= alone.min() < 0.26
    assert 0.49 < alone.max() < 0.5


@pytest.mark.parametrize("process", [GAUSSIAN, create_flow()])
def test_a_sampler_without_boundaries_draws_from_the_whole_range(process):
    """A plain DiT has one interval, experts have equal ones."""
    options = dict(seed=1, batch_size=12, world=World(0, 1, torch.device("cpu")), process=process)
    for experts, boundaries in (({}, process.scale.range), ({"n_experts": 3}, process.scale.equal_boundaries(3))):
        drawn = BatchSampler(**options, **experts).timesteps(5)
        assert np.array_equal(drawn, draw_times(1, 5, 12, process, boundaries))
    part = [0.25 * process.scale.highest, 0.5 * process.scale.highest]
    drawn = BatchSampler(**options, timestep_range=tuple(part)).timesteps(5)
    assert np.array_equal(drawn, draw_times(1, 5, 12, process, part))


def test_intervals_without_times_are_errors():
    with pytest.raises(ValueError, match="no timestep"):
        draw_times(0, 0, 3, GAUSSIAN, [0, 0.5, 0.75, 1000], 3)
    with pytest.raises(ValueError, match="no training times"):
        draw_times(0, 0, 2, create_flow(prediction="noise"), [0, 1e-4, 1], 2)


@pytest.mark.parametrize("process", [GAUSSIAN, create_flow()])
def test_two_processes_draw_the_two_halves_of_the_batch_of_one(process):
    """With six groups of two images, each of the two processes' two microbatches of three needs three groups of one."""
    x, y = torch.zeros(12, 3, 8, 8), torch.arange(12)
    experts = dict(n_experts=20, experts_per_batch=6, boundaries=process.expert_boundaries(20), process=process)

    def draw(rank: int, size: int):
        world = World(rank, size, torch.device("cpu"))
        sampler = BatchSampler(5, 12, world, **experts, label_dropout=0.5, grad_accum=2)
        return sampler.microbatches(sampler.draw(7, x[sampler.rows], y[sampler.rows]))

    whole, halves = draw(0, 1), [*draw(0, 2), *draw(1, 2)]
    assert [batch.conditions["groups"] for batch in whole] == [3, 3]
    assert [batch.conditions["groups"] for batch in halves] == [3, 3, 3, 3]
    for part in (
        lambda batch: batch.t,
        lambda batch: batch.conditions["y"],
        lambda batch: batch.conditions["label_drop"],
        lambda batch: batch.noise,
    ):
        assert torch.equal(torch.cat([part(batch) for batch in whole]), torch.cat([part(batch) for batch in halves]))


def test_a_row_draws_the_same_alone_and_among_others():
    noise = draw_noise(3, 5, range(8), (4, 6, 5))
    dropout = draw_label_dropout(3, 5, range(8), 0.5)
    for row in range(8):
        # 120 is no multiple of the number of values that Philox makes at once.
        assert np.array_equal(draw_noise(3, 5, range(row, row + 1), (4, 6, 5))[0], noise[row])
        counters = np.array([0, row, Stream.NOISE, 0], np.uint64)
        philox = np.random.Philox(key=np.array([3, 5], np.uint64), counter=counters)
        assert np.array_equal(np.random.Generator(philox).standard_normal((4, 6, 5), np.float32), noise[row])
    assert np.array_equal(draw_label_dropout(3, 5, range(2, 7), 0.5), dropout[2:7])


def test_rows_steps_seeds_and_streams_draw_differently():
    positions = [
        (seed, step, row, stream) for seed in (0, 2**63 - 1) for step in (0, 9) for row in (0, 7) for stream in Stream
    ]
    first = {next(row_generators(a, b, range(c, c + 1), d)).random() for a, b, c, d in positions}
    assert len(first) == len(positions)


def test_noise_is_standard_normal_and_independent():
    from scipy.stats import kstest

    noise = np.stack([draw_noise(1, step, range(32), (256,)) for step in range(8)]).astype(np.float64)
    assert kstest(noise.ravel(), "norm").pvalue > 1e-3
    # Neighbours along each axis: steps, rows and elements.
    for axis in range(3):
        a, b = np.split(noise, 2, axis=axis)
        assert abs((a * b).mean()) < 4 / a.size**0.5
    dropped = [draw_label_dropout(1, step, range(32), 0.1).mean() for step in range(200)]
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.015)


def test_worker_processes_draw_what_this_process_draws(features):
    sampler = BatchSampler(5, 12, World(1, 2, torch.device("cpu")), n_experts=20, experts_per_batch=6)
    runs = []
    for num_workers in (0, 2):
        with sampler.load(FeatureDataset(features), range(3, 7), num_workers) as batches:
            runs.append(list(batches))
    assert len(runs[0]) == len(runs[1]) == 4
    for alone, worker in zip(*runs, strict=True):
        assert alone.noise.shape == alone.x.shape == (6, 3, 8, 8)
        assert all(torch.equal(a, b) for a, b in zip(alone[:5], worker[:5], strict=True))
