"""Image grids and heat maps."""

import numpy as np
from PIL import Image

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


def test_the_coefficients_of_a_flow_are_drawn(tmp_path):
    model = RemixDiT(DiT_models["DiT-T/4"](8), n_basis=2, n_experts=3, boundaries=[0, 0.25, 0.5, 1])
    save_coefficients(tmp_path / "alpha.png", model, "a flow")
    assert Image.open(tmp_path / "alpha.png").width > 300
