"""Image grids and heat maps of mixing coefficients, saved as PNG, and the numbers of figures as CSV."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion.intervals import interval_labels, scale_of
from remix import RemixDiT
from runtime.files import atomic_write

# Sizes in an image grid, in pixels.
SMALLEST_TILE = 64
# Tiles are enlarged up to this height until their captions fit.
WIDE_TILE = 144
CAPTION_HEIGHT = 14
GAP = 4
# A heat map of more experts has no noise levels and no values in its cells.
MAX_LABELLED_EXPERTS = 40


def save_grid(path, images: np.ndarray, captions: list[str], columns: int = 10, clip_captions: bool = True):
    """Save images as a grid in one PNG, each below its caption.

    Args:
        path: file to write.
        images: uint8 [n, H, W, 3]. Images of less than 64 pixels height are enlarged by a whole factor, and by a larger
            one, up to 144 pixels, if their captions need it.
        captions: n captions.
        columns: images per row.
        clip_captions: shorten captions that are wider than their image. Otherwise they continue over the next image,
            and the grid is as wide as they are.
    """
    n, height, width, _ = images.shape
    font = ImageFont.load_default(11)
    widest = max(map(font.getlength, captions))
    zoom = max(1, -(-SMALLEST_TILE // height))
    while clip_captions and widest > width * zoom and height * (zoom + 1) <= WIDE_TILE:
        zoom += 1
    height, width = height * zoom, width * zoom
    columns = min(columns, n)
    rows = -(-n // columns)
    size = (columns * (width + GAP) + GAP, rows * (height + CAPTION_HEIGHT + GAP) + GAP)
    if not clip_captions:
        size = (max(size[0], round(widest) + 2 * GAP), size[1])
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = GAP + i % columns * (width + GAP)
        top = GAP + i // columns * (height + CAPTION_HEIGHT + GAP)
        draw.text((left, top), shorten(caption, width, font) if clip_captions else caption, fill="black", font=font)
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        grid.paste(tile, (left, top + CAPTION_HEIGHT))
    with atomic_write(Path(path)) as temporary:
        grid.save(temporary, format="PNG")


def shorten(caption: str, width: int, font) -> str:
    """Return a caption that is at most `width` pixels wide in a font; what is left out is marked by dots."""
    if font.getlength(caption) <= width:
        return caption
    while caption and font.getlength(caption + "...") > width:
        caption = caption[:-1]
    return caption.rstrip() + "..."


def save_coefficients(path, model: RemixDiT, title: str):
    """Save a heat map of the mixing coefficients alpha as a PNG, with one panel per block if the scope is local.

    Args:
        path: file to write.
        model: its experts are the columns, its bases the rows.
        title: title of the figure.
    """
    # Importing matplotlib takes a second, and few runs draw a figure.
    from matplotlib.figure import Figure

    alpha = model.coefficients().detach().cpu().view(-1, model.n_experts, model.n_basis)
    blocks, n_experts, n_basis = alpha.shape
    labelled = n_experts <= MAX_LABELLED_EXPERTS
    size = (max(4, (0.55 if labelled else 0.12) * n_experts + 2), max(2, 0.45 * n_basis) * blocks + 1.4)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(blocks, 1, squeeze=False)
    for block, axis in enumerate(axes[:, 0]):
        values = alpha[block].T  # [K, N]
        image = axis.imshow(values, cmap="viridis", vmin=min(0, alpha.min()), vmax=max(1, alpha.max()), aspect="auto")
        axis.set_yticks(range(n_basis), [f"basis {k}" for k in range(n_basis)])
        if labelled:
            ticks = [f"{i}\n{label}" for i, label in enumerate(interval_labels(model.boundaries))]
            axis.set_xticks(range(n_experts), ticks, fontsize=6)
            middle = (image.norm.vmin + image.norm.vmax) / 2
            for (k, i), value in np.ndenumerate(values.numpy()):
                color = "black" if value > middle else "white"
                axis.text(i, k, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        if blocks > 1:
            axis.set_title(f"block {block}", fontsize=8)
    axes[-1, 0].set_xlabel(f"expert and its {scale_of(model.boundaries).unit}s (expert 0: least noise)")
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="coefficient")
    save_png(figure, Path(path))


def save_png(figure, path: Path):
    """Save a matplotlib figure as a PNG."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def write_csv(figure: Path, header: list, rows: list[list]):
    """Write the numbers of a figure to the CSV file of the same name."""
    with atomic_write(figure.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
