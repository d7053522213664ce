"""Image grids and the intervals of heat maps."""

import numpy as np
import pytest
from PIL import Image

from diffusion.intervals import interval_labels, intervals
from figures import CAPTION_HEIGHT, GAP, save_coefficients, save_grid
from models import DiT_models
from remix import RemixDiT


def test_a_grid_has_a_tile_for_every_image(tmp_path):
    """Five images of 8x8 pixels in rows of three: enlarged to 48x48, with the last tile empty."""
    images = np.stack([np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)])
    save_grid(tmp_path / "grid.png", images, [""] * 5, columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (48 + CAPTION_HEIGHT + GAP) + GAP, 3 * (48 + GAP) + GAP, 3)
    for i in range(6):
        top = GAP + i // 3 * (48 + CAPTION_HEIGHT + GAP) + CAPTION_HEIGHT
        left = GAP + i % 3 * (48 + GAP)
        assert (grid[top : top + 48, left : left + 48] == (40 * i if i < 5 else 255)).all()


def test_captions_are_cut_at_the_width_of_their_tile(tmp_path):
    images = np.full((2, 48, 48, 3), 255, np.uint8)
    for clip in (True, False):
        save_grid(tmp_path / f"{clip}.png", images, ["a long caption", ""], clip_captions=clip)
    second = slice(GAP + 48 + GAP, None)
    clipped, continued = (np.asarray(Image.open(tmp_path / f"{clip}.png"))[:, second] for clip in (True, False))
    assert (clipped == 255).all()
    assert (continued < 255).any()


@pytest.mark.parametrize(
    ("n_experts", "boundaries"), [(1, None), (6, None), (20, None), (4, [0, 1, 100.5, 333.3333, 1000]), (1, [0, 1000])]
)
def test_intervals_hold_the_timesteps_of_their_expert(n_experts, boundaries):
    dit = DiT_models["DiT-T/4"](input_size=8, num_classes=2)
    model = RemixDiT(dit, n_basis=2, n_experts=n_experts, boundaries=boundaries)
    timesteps = [(i, t) for i, (low, high) in enumerate(intervals(model)) for t in range(low, high)]
    assert [t for _, t in timesteps] == list(range(1000))
    assert all(model.expert_index(t) == i for i, t in timesteps)


@pytest.mark.parametrize("boundaries", [[0, 0.125, 0.875, 1], [0, 12.5, 875, 1000]])
def test_intervals_are_those_between_the_boundaries(boundaries):
    model = RemixDiT(DiT_models["DiT-T/4"](8), n_basis=2, n_experts=3, boundaries=boundaries)
    if boundaries[-1] == 1:
        assert intervals(model) == [(0, 0.125), (0.125, 0.875), (0.875, 1)]
        assert interval_labels(model) == ["0-0.125", "0.125-0.875", "0.875-1"]
    else:
        assert intervals(model) == [(0, 13), (13, 875), (875, 1000)]
        assert interval_labels(model) == ["0-12", "13-874", "875-999"]
        assert [model.expert_index(t) for t in (12, 13, 874, 875)] == [0, 1, 1, 2]


def test_the_coefficients_of_a_flow_are_drawn(tmp_path):
    model = RemixDiT(DiT_models["DiT-T/4"](8), n_basis=2, n_experts=3, boundaries=[0, 0.25, 0.5, 1])
    save_coefficients(tmp_path / "alpha.png", model, "a flow")
    assert Image.open(tmp_path / "alpha.png").width > 300
