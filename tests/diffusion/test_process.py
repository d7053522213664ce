"""What every process answers, and the processes by name."""

import pickle

import numpy as np
import pytest
import torch

from diffusion import PROCESSES, create_diffusion, create_flow, create_process


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_knows_its_name_losses_and_samplers(name):
    process = create_process(name)
    assert process.name == name
    losses = process.training_losses(
        lambda x, t: torch.cat([x, x], 1), torch.randn(2, 4, 2, 2), torch.ones(2).to(process.scale.dtype)
    )
    assert set(losses) == set(process.loss_names)
    assert process.loss_names[0] == "loss"
    for sampler in process.samplers:
        assert process.make_sampler(sampler, "4").evaluations in (None, 4, 8)
    assert process.make_sampler(*process.quick).evaluations == 20


def test_an_unknown_process():
    with pytest.raises(ValueError, match="unknown process 'cold': choose from gaussian, flow"):
        create_process("cold")


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_are_checked(name):
    process = create_process(name)
    top = process.scale.highest
    process.check_levels([0.1 * top, 0.25 * top, 0.5 * top])
    process.check_levels(process.expert_boundaries(20), complete=True)
    for levels, complete, message in (
        ([0, 0.5 * top, 0.5 * top], False, "must increase"),
        ([0, 2 * top], False, f"the process {name} run from 0 to {top}"),
        ([0, 0.5 * top], True, f"the process {name} run from 0 to {top}"),
        ([0.1 * top, top], True, f"the process {name} run from 0 to {top}"),
    ):
        with pytest.raises(ValueError, match=message):
            process.check_levels(levels, complete)


def test_intervals_without_training_times_are_refused():
    with pytest.raises(ValueError, match="no timestep"):
        create_diffusion().check_levels([0, 0.5, 0.75, 1000])
    for levels in ([0, 0.5, 0.5 + 1e-7, 1], [0, 1e-9, 1]):
        with pytest.raises(ValueError, match="no training times"):
            create_flow().check_levels(levels)


def test_the_default_boundaries_of_a_flow_are_rounded_quantiles():
    flow = create_flow(time_sampling="logit-normal", shift=2.0)
    boundaries = flow.expert_boundaries(7)
    assert boundaries == [round(level, 9) for level in flow.quantiles(7)] != flow.quantiles(7)
    with pytest.raises(ValueError, match="no training times"):
        create_flow(prediction="noise").expert_boundaries(1000)
    assert create_diffusion(diffusion_steps=100).expert_boundaries(3) == [0, 33, 66, 100]


@pytest.mark.parametrize("name", PROCESSES)
def test_each_row_is_drawn_from_its_own_interval(name):
    process, rows = create_process(name), np.arange(600) % 3
    boundaries = np.array(process.expert_boundaries(3))
    times = process.sample_times(np.random.default_rng(0), boundaries[rows], boundaries[rows + 1])
    assert torch.from_numpy(times).dtype == process.scale.dtype
    levels = process.scale.level(torch.from_numpy(times)).numpy()
    assert (boundaries[rows] <= levels).all()
    assert (levels < boundaries[rows + 1]).all()
    again = process.sample_times(np.random.default_rng(0), boundaries[rows], boundaries[rows + 1])
    assert np.array_equal(times, again)


def test_a_process_is_sent_to_other_processes_without_its_tensors():
    process = create_diffusion("50").to(torch.device("cpu"))
    assert process._tensors
    copy = pickle.loads(pickle.dumps(process))
    assert not copy._tensors
    assert np.array_equal(copy.betas, process.betas)
    assert process._tensors, "the process keeps its own"
