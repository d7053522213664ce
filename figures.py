"""Pictures that people look at."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import atomic_write
from remix import RemixDiT


def save_grid(path, images: np.ndarray, captions: list[str], columns: int = 10, clip_captions: bool = True):
    """Save uint8 images [n, H, W, 3] as a PNG of rows of tiles, each under its caption. Small images are enlarged.

    clip_captions: shorten what is wider than its tile, rather than let it run on over the next.
    """
    n, height, width, _ = images.shape
    zoom = max(1, -(-48 // height))
    height, width, line, gap = height * zoom, width * zoom, 14, 4
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + line + gap)
        while clip_captions and draw.textlength(caption, font=font) > width:
            caption = caption[:-1]
        draw.text((left, top), caption, fill="black", font=font)
        grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), (left, top + line))
    with atomic_write(Path(path)) as temporary:
        grid.save(temporary, format="PNG")


def intervals(model: RemixDiT) -> list[tuple[int, int]]:
    """Each expert's timesteps, from low to high - 1."""
    return list(pairwise(i * model.num_timesteps // model.n_experts for i in range(model.n_experts + 1)))


def save_coefficients(path, model: RemixDiT, title: str):
    """Save a heat map of alpha as a PNG: experts along x with their timesteps, bases along y, values in the cells."""
    from matplotlib.figure import Figure  # a second to import, and most runs of most scripts draw no figure

    alpha = model.coefficients().detach().cpu().view(-1, model.n_experts, model.n_basis)
    blocks, n_experts, n_basis = alpha.shape
    small = n_experts <= 40
    size = (max(4, (0.55 if small else 0.12) * n_experts + 2), max(2, 0.45 * n_basis) * blocks + 1.4)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(blocks, 1, squeeze=False)
    for block, axis in enumerate(axes[:, 0]):
        values = alpha[block].T
        image = axis.imshow(values, cmap="viridis", vmin=min(0, alpha.min()), vmax=max(1, alpha.max()), aspect="auto")
        axis.set_yticks(range(n_basis), [f"basis {k}" for k in range(n_basis)])
        if small:
            ticks = [f"{i}\n{low}-{high - 1}" for i, (low, high) in enumerate(intervals(model))]
            axis.set_xticks(range(n_experts), ticks, fontsize=6)
            middle = (image.norm.vmin + image.norm.vmax) / 2
            for (k, i), value in np.ndenumerate(values.numpy()):
                color = "black" if value > middle else "white"
                axis.text(i, k, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        if blocks > 1:
            axis.set_title(f"block {block}", fontsize=8)
    axes[-1, 0].set_xlabel("expert and its timesteps (0 is the least noise)")
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="coefficient")
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
