"""Image grids and heat maps."""

import numpy as np
from PIL import Image, ImageFont

from figures import CAPTION_HEIGHT, GAP, save_coefficients, save_grid, shorten
from models import DiT_models
from remix import RemixDiT


def test_a_grid_has_a_tile_for_every_image(tmp_path):
    """Five images of 8x8 pixels in rows of three: enlarged to 64x64, with the last tile empty."""
    images = np.stack([np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)])
    save_grid(tmp_path / "grid.png", images, [""] * 5, columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (64 + CAPTION_HEIGHT + GAP) + GAP, 3 * (64 + GAP) + GAP, 3)
    for i in range(6):
        top = GAP + i // 3 * (64 + CAPTION_HEIGHT + GAP) + CAPTION_HEIGHT
        left = GAP + i % 3 * (64 + GAP)
        assert (grid[top : top + 64, left : left + 64] == (40 * i if i < 5 else 255)).all()


def test_captions_fit_their_tiles(tmp_path):
    """Tiles of small images grow until their captions fit; of large ones, captions are shortened, or continue."""
    images, caption = np.full((2, 80, 80, 3), 255, np.uint8), "a caption that is wider than its image"
    for clip in (True, False):
        save_grid(tmp_path / f"{clip}.png", images, [caption, ""], columns=2, clip_captions=clip)
    second = slice(GAP + 80 + GAP, None)
    clipped, continued = (np.asarray(Image.open(tmp_path / f"{clip}.png")) for clip in (True, False))
    assert (clipped[:, second] == 255).all()
    assert (continued[:, second] < 255).any() and (continued[:, -GAP:] == 255).all()
    assert continued.shape[1] > clipped.shape[1]
    font = ImageFont.load_default(11)
    assert font.getlength(shorten(caption, 80, font)) <= 80 and shorten(caption, 80, font).startswith("a caption")
    assert shorten("fits", 80, font) == "fits"

    save_grid(tmp_path / "small.png", np.full((2, 28, 28, 3), 255, np.uint8), ["Ankle boot, brown", ""], columns=2)
    [width, _] = Image.open(tmp_path / "small.png").size
    assert width == 2 * (28 * 4 + GAP) + GAP, "28 pixels times 3 are too few for the caption"


def test_the_coefficients_of_a_flow_are_drawn(tmp_path):
    model = RemixDiT(DiT_models["DiT-T/4"](8), n_basis=2, n_experts=3, boundaries=[0, 0.25, 0.5, 1])
    save_coefficients(tmp_path / "alpha.png", model, "a flow")
    assert Image.open(tmp_path / "alpha.png").width > 300
