"""Scales of noise levels, and the intervals that experts own."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion import create_diffusion, create_flow
from diffusion.intervals import (
    DIRECT,
    FLOW_LEVELS,
    REVERSED,
    check_boundaries,
    equal_boundaries,
    find_interval,
    find_time,
    inner_boundaries,
    interval_labels,
    intervals,
    sample_levels,
    scale_of,
    separates_steps,
    timestep_scale,
    warn_of_short_intervals,
)
from models import DiT_models
from remix import Remix, RemixDiT


def test_the_last_boundary_tells_the_scale():
    assert scale_of([0, 0.5, 1]) == FLOW_LEVELS == create_flow(shift=3.0).scale
    assert scale_of([0, 500, 1000]) == timestep_scale(1000) == create_diffusion("ddim50").scale
    assert create_diffusion(diffusion_steps=400).scale == scale_of([0, 400]) != timestep_scale(1000)
    assert (FLOW_LEVELS.range, FLOW_LEVELS.dtype) == ([0, 1], torch.float32)
    assert (timestep_scale(400).range, timestep_scale(400).dtype) == ([0, 400], torch.long)


@pytest.mark.parametrize("scale", [timestep_scale(1000), FLOW_LEVELS])
def test_times_and_levels_of_a_scale_are_inverse(scale):
    levels = np.array([0, 0.25, 0.5, 1]) * scale.highest
    times = scale.time(levels)
    assert np.array_equal(scale.level(torch.from_numpy(times)).numpy(), levels.astype(np.float32))
    assert [scale.level(time) for time in times] == levels.tolist(), "a number has the level of a tensor"
    # Higher levels are noisier, whatever the direction of time.
    assert scale.time(scale.highest) == (0 if scale is FLOW_LEVELS else 1000)


def test_a_flows_level_on_a_boundary_belongs_to_the_expert_above():
    boundaries = [0, 0.15, 0.7, 1]
    assert inner_boundaries(boundaries) == [0.15 - 2**-20, 0.7 - 2**-20]
    assert [find_time(boundaries, np.float32(1 - level)) for level in (0.14, 0.15, 0.69, 0.7)] == [0, 1, 1, 2]
    assert inner_boundaries([0, 150, 700, 1000]) == [150, 700], "integers are exact"
    assert inner_boundaries([0, 150, 700, 1000], torch.float32) == [150 - 1000 / 2**20, 700 - 1000 / 2**20]
    assert [find_time([0, 150, 700, 1000], t) for t in (149, 150, 699, 700)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="must be from 0 to 1, but they are from 2 to 2"):
        find_interval(boundaries, 2)


@pytest.mark.parametrize(
    ("n_experts", "boundaries"), [(1, None), (6, None), (20, None), (4, [0, 1, 100.5, 333.3333, 1000]), (1, [0, 1000])]
)
def test_intervals_hold_the_timesteps_of_their_expert(n_experts, boundaries):
    dit = DiT_models["DiT-T/4"](input_size=8, num_classes=2)
    model = RemixDiT(dit, n_basis=2, n_experts=n_experts, boundaries=boundaries)
    timesteps = [(i, t) for i, (low, high) in enumerate(intervals(model.boundaries)) for t in range(low, high)]
    assert [t for _, t in timesteps] == list(range(1000))
    assert all(model.expert_index(t) == i for i, t in timesteps)


def test_the_noise_levels_between_boundaries():
    flow, timesteps = [0, 0.125, 0.875, 1], [0, 12.5, 875, 1000]
    assert intervals(flow) == [(0, 0.125), (0.125, 0.875), (0.875, 1)]
    assert interval_labels(flow) == ["0-0.125", "0.125-0.875", "0.875-1"]
    assert intervals(timesteps) == [(0, 13), (13, 875), (875, 1000)]
    assert interval_labels(timesteps, "_") == ["0_12", "13_874", "875_999"]
    assert [find_interval(timesteps, t) for t in (12, 13, 874, 875)] == [0, 1, 1, 2]


@pytest.mark.parametrize("boundaries", [[0, 0.125, 0.875, 1], [0, 12.5, 875, 1000]])
def test_times_between_boundaries_belong_to_their_interval(boundaries):
    scale = scale_of(boundaries)
    for i in range(3):
        times = scale.times_between(boundaries[i], boundaries[i + 1], 5)
        assert {find_time(boundaries, time) for time in times} == {i}
        levels = scale.level(torch.from_numpy(times)).numpy()
        assert np.allclose(np.diff(levels, 2), 0, atol=1 if scale.whole else 1e-6), "evenly spaced"


@pytest.mark.parametrize("scale", [timestep_scale(1000), FLOW_LEVELS])
def test_the_grids_of_experts_are_parts_of_the_whole_grid(scale):
    boundaries = scale.equal_boundaries(7)
    assert boundaries == equal_boundaries(7, scale.highest)
    whole = scale.grid(50)
    parts = [scale.grid(50, pair) for pair in pairwise(boundaries)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert all(find_time(boundaries, time) == i for i, part in enumerate(parts) for time in part)
    # An interval between two points of the grid has its middle.
    low, high = 0.001 * scale.highest, 0.003 * scale.highest
    [time] = scale.grid(50, (low, high))
    assert low <= scale.level(time) < high


def test_the_range_of_times_as_text():
    assert timestep_scale(1000).describe(np.array([7, 3, 12])) == "timesteps 3 to 12"
    assert FLOW_LEVELS.describe(np.array([0.25, 0.9], np.float32)) == "noise levels 0.1000 to 0.7500"


HALF = (torch.bfloat16, torch.float16)
# How a level from 0 to 1 becomes one from 0 to `highest` of a type. FluxPipeline rounds twice.
ROUNDINGS = {
    "once": lambda level, highest, dtype: (level * highest).to(dtype),
    "after timesteps": lambda level, highest, dtype: (1000 * level).to(dtype) / (1000 / highest),
    "after sigmas": lambda level, highest, dtype: level.to(dtype) * highest,
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("highest", [1, 1000, 14.6146, 400])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_rounded_steps_on_boundaries_belong_to_the_expert_above(dtype, highest, rounding):
    for n in (2, 3, 5, 7, 20, 64):
        boundaries = [i / n * highest for i in range(n + 1)]
        levels = ROUNDINGS[rounding](torch.arange(n + 1) / n, highest, dtype)
        assert levels.dtype == dtype
        assert [find_interval(boundaries, level) for level in levels] == [*range(n), n - 1]
        # Steps between boundaries stay where they are.
        middle = ROUNDINGS[rounding]((torch.arange(n) + 0.5) / n, highest, dtype)
        assert [find_interval(boundaries, level) for level in middle] == [*range(n)]


@pytest.mark.parametrize("dtype", HALF)
def test_rounded_times_of_flows_on_boundaries_belong_to_the_expert_above(dtype):
    boundaries = scale_of([0, 1]).equal_boundaries(20)
    times = 1 - torch.arange(20) / 20
    for rounded in (times.to(dtype), (1000 * times).to(dtype) / 1000):
        assert [find_time(boundaries, t) for t in rounded] == [*range(20)]
    # 1 - bf16(0.95) is 0.0508, and 1 - bf16(bf16(950) / 1000) is 0.0469.
    assert inner_boundaries(boundaries, torch.bfloat16, REVERSED)[0] == 0.046875
    assert inner_boundaries(boundaries, torch.bfloat16, DIRECT)[0] == pytest.approx(0.05, abs=2**-12)


def test_float32_steps_of_a_shifted_schedule_belong_to_the_expert_above():
    """With shift 3, sigma 1 / 3 is the timestep 599.99994."""
    sigma = torch.tensor([1, 2 / 3, 1 / 3])
    timesteps = 1000 * (3 * sigma / (1 + 2 * sigma))
    assert timesteps[2] < 600
    assert [find_interval(equal_boundaries(5, 1000), t) for t in timesteps] == [4, 4, 3]
    assert find_interval(equal_boundaries(5, 1000), float(timesteps[2])) == 3


def test_integers_are_compared_exactly():
    boundaries = [0, 150.0005, 700, 1000]
    for level in (150, np.int64(150), torch.tensor(150)):
        assert find_interval(boundaries, level) == 0
    assert find_interval(boundaries, 150.0) == 1


def test_intervals_that_are_too_short_for_a_type_are_reported_once(capsys):
    warn_of_short_intervals.cache_clear()
    boundaries = equal_boundaries(1000, 1000)
    assert [separates_steps(boundaries, dtype) for dtype in (torch.long, torch.float32, *HALF)] == [
        True,
        True,
        False,
        True,
    ]
    # Numbers of the type still run the experts that they belong to.
    levels = torch.arange(1000).to(torch.bfloat16).clamp(max=996)
    assert [find_interval(boundaries, level) for level in levels] == levels.int().tolist()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "bfloat16 noise levels" in warnings[0]


def test_levels_outside_the_boundaries_are_printed_exactly():
    with pytest.raises(ValueError, match=r"from 0 to 1, but they are from 1\.0000001 to 1\.0000001"):
        find_interval([0, 0.5, 1], 1.0000001)
    with pytest.raises(ValueError, match=r"from 0 to 1, but they run from 0 to 1\.0000001"):
        check_boundaries([0, 0.5, 1.0000001], 2, 1)


def test_the_highest_level_may_be_no_integer():
    quarters = [0, 0.4, 0.8, 1.2, np.pi / 2]
    # Rounded, this is more than the last boundary.
    for dtype in (torch.float32, *HALF):
        levels = torch.tensor([0, 0.39, 0.4, 0.8, 1.2, np.pi / 2], dtype=torch.float64).to(dtype)
        assert [find_interval(quarters, level) for level in levels] == [0, 0, 1, 2, 3, 3]
    with pytest.raises(ValueError, match=r"from 0 to 1\.5707963267948966, but they are from 1\.58"):
        find_interval(quarters, 1.58)
    assert equal_boundaries(4, 14.6146) == [0, 14.6146 / 4, 14.6146 / 2, 0.75 * 14.6146, 14.6146]
    scale = scale_of(quarters)
    assert (scale.dtype, scale.level(0.25), scale.time(0.25)) == (torch.float32, 0.25, 0.25)


# Noise levels for training


@pytest.mark.parametrize(("boundary", "shift", "above"), [(875, 12, 0.63), (900, 5, 0.36)])
def test_drawn_levels_keep_the_shifted_distribution(boundary, shift, above):
    generator = torch.Generator().manual_seed(0)
    levels = sample_levels([0, 300, boundary, 1000], 20000, shift, "drawn", generator=generator)
    assert (levels >= boundary).float().mean().item() == pytest.approx(above, abs=0.005)
    # Without the shift, they are uniform.
    u = (levels.double() / 1000).numpy()
    u = np.sort(u / (shift - (shift - 1) * u))
    assert np.abs(u - (np.arange(20000) + 0.5) / 20000).max() < 0.015


@pytest.mark.parametrize("shift", [1, 5])
def test_levels_of_an_expert_follow_the_distribution_in_its_interval(shift):
    boundaries = [0, 0.1, 0.7, 1]
    levels = sample_levels(boundaries, 30000, shift, generator=torch.Generator().manual_seed(0)).view(3, -1)
    for row, (low, high) in zip(levels, pairwise(boundaries), strict=True):
        assert low <= row.min() < row.max() < high
        u = np.sort(row.double().numpy())
        u, ends = (x / (shift - (shift - 1) * x) for x in (u, np.array([low, high])))
        expected = ends[0] + (ends[1] - ends[0]) * (np.arange(10000) + 0.5) / 10000
        assert np.abs(u - expected).max() < 0.02 * (ends[1] - ends[0])


def test_shares_of_the_experts():
    def counts(n, share, **settings):
        levels = sample_levels([0, 200, 500, 1000], n, 3, share, generator=torch.Generator().manual_seed(n), **settings)
        experts = torch.bucketize(levels, torch.tensor([200.0, 500.0]), right=True)
        assert torch.equal(experts, experts.sort().values)
        return experts.bincount(minlength=3).tolist()

    assert counts(9, "equal") == [3, 3, 3]
    assert counts(8, [1, 0, 3]) == [2, 0, 6]
    assert counts(8, [0, 1, 0]) == [0, 8, 0]
    # Rounded up or down.
    drawn = torch.tensor([counts(n, "equal") for n in range(4, 200, 3)])
    assert (drawn.max(1).values - drawn.min(1).values).max() == 1
    # Groups of one expert each, also where there are fewer groups than experts.
    grouped = [
        sample_levels([0, 200, 500, 1000], 8, 3, groups=2, generator=torch.Generator().manual_seed(s))
        for s in range(60)
    ]
    experts = torch.bucketize(torch.stack(grouped), torch.tensor([200.0, 500.0]), right=True).view(60, 2, 4)
    assert torch.equal(experts.amin(2), experts.amax(2))
    assert (experts[:, 0, 0] != experts[:, 1, 0]).all()
    used = experts[:, :, 0].flatten().bincount(minlength=3) / 120
    assert used.sub(1 / 3).abs().max() < 0.1


def test_levels_depend_on_the_generator_only():
    draws = [sample_levels([0, 0.5, 1], 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(*draws[:2])
    assert not torch.equal(draws[0], draws[2])
    assert (draws[0].dtype, draws[0].shape) == (torch.float32, (6,))


def test_a_remix_runs_the_groups_that_were_drawn():
    """Each group runs its own expert, in every type of timesteps, although the intervals are narrow."""
    boundaries = [i / 40 * 1000 for i in range(41)]
    remix = Remix(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), ["0"], 2, boundaries=boundaries, timestep=lambda input: input[:, 0]
    )
    for seed in range(20):
        levels = sample_levels(remix, 160, 5, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(remix.expert_index(levels), torch.arange(40).repeat_interleave(4))
        # As in a call with groups: rounding moves some levels to the expert above.
        for dtype in HALF:
            assert torch.equal(remix.expert_index(levels.to(dtype)).view(40, 4).amin(1), torch.arange(40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(n=0), "must be a positive integer and a multiple of groups=None, but it is 0"),
        (dict(n=8.0), "must be a positive integer .*, but it is 8.0"),
        (dict(groups=2.0), "a multiple of groups=2.0, but it is 4"),
        (dict(n=5, groups=2), "a multiple of groups=2, but it is 5"),
        (dict(shift=0), "shift must be a positive number, but it is 0"),
        (dict(share="half"), "share must be equal, drawn or 2 numbers, but it is 'half'"),
        (dict(share=[1, 2, 3]), "share must be 2 numbers of at least 0"),
        (dict(share=[0, 0]), "not all of them 0"),
        (dict(boundaries=[0.1, 0.5, 1]), "boundaries must run from 0"),
        (dict(boundaries=[1]), "need 2 boundaries"),
    ],
)
def test_wrong_arguments_of_the_levels_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_levels(**dict(boundaries=[0, 0.5, 1], n=4) | arguments)
