"""Seeds and per-sample random generators. The tests of the scripts cover processes and signals."""

import os

import torch

from runtime.processes import SampleGenerators, seed_for, worker_count


def test_a_seed_is_a_function_of_the_position():
    seeds = {seed_for(seed, i) for seed in range(20) for i in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints and samples of earlier versions depend on these values.
    assert seed_for(0, 5) == 6102389744414414618
    assert seed_for(0, 5) != seed_for(5, 0)


def test_a_samples_draws_do_not_depend_on_the_batch():
    many, one = SampleGenerators(3, range(4, 9)), SampleGenerators(3, [7])
    for shape in ((2, 3), (5,)):
        draws = many.randn(shape)
        assert draws.shape == (5, *shape)
        assert torch.equal(draws[3:4], one.randn(shape))


def test_a_samples_draws_are_those_of_a_generator_with_its_seed():
    generator = torch.Generator().manual_seed(seed_for(3, 7))
    generators = SampleGenerators(3, [6, 7])
    for _ in range(2):
        assert torch.equal(generators.randn((2, 3))[1], torch.randn(2, 3, generator=generator))


def test_no_more_workers_than_cores_by_default(monkeypatch):
    for cores, workers in ((1, 1), (2, 2), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        assert worker_count(None) == workers
    assert worker_count(0) == 0 and worker_count(12) == 12
