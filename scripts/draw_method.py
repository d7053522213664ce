"""Draw the README's figure of the method: K basis models, mixing coefficients, N experts over the timesteps.

    python scripts/draw_method.py assets/method.png

The coefficients in the figure are those that `make demo` learned, see assets/coefficients.png.
"""

import argparse

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

# Alpha in percent: one row per basis, one column per expert.
ALPHA = """
    79 68 57 48 40 30 27 22 19 16 17 15 12 10  9  1  1  0  0  1
     9 16 27 36 44 49 51 49 44 37 15  7  4  1  1  1  1  1  1  1
     8 10  9  8  9 12 15 22 32 40 62 70 78 87 89  0  0  0  0  0
     4  6  7  8  7  9  7  7  5  7  6  8  6  2  1 98 98 99 99 98
"""
# The expert whose column is marked.
EXAMPLE = 14
COLORS = ("#5b8fd1", "#55a868", "#d29a2e", "#d1605e")
INK, GREY = "#222222", "#666666"
STYLE = {"mathtext.fontset": "dejavusans", "text.color": INK}

# Positions in inches. The rows are, from the top: the heat map of alpha, the experts, the images.
WIDTH, HEIGHT = 12.4, 5.6
LEFT, CELL_WIDTH, CELL_HEIGHT = 3.6, 0.42, 0.46
HEAT_MAP, EXPERTS, IMAGES = 2.95, 1.55, 0.45
TALL = 0.7


def draw_method(path: str):
    """Draw the figure and save it to `path`, a PNG."""
    alpha = np.array([line.split() for line in ALPHA.strip().splitlines()], dtype=float) / 100
    with rc_context(STYLE):
        figure = Figure((WIDTH, HEIGHT))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        draw_bases(axes, alpha)
        draw_experts(axes, alpha)
        draw_images(axes, n_experts=alpha.shape[1])
        draw_example(axes, alpha)
        figure.savefig(path, dpi=150)


def draw_bases(axes: Axes, alpha: np.ndarray):
    """Draw the bases, and beside each of them its row of the heat map of alpha."""
    n_basis, n_experts = alpha.shape
    top = HEAT_MAP + n_basis * CELL_HEIGHT
    heading(axes, 0.25, top + 0.5, f"$K$ = {n_basis} basis models", "Learned. Each has the shape of a plain DiT.")
    heading(
        axes,
        LEFT,
        top + 0.5,
        "Mixing coefficients $\\alpha$",
        "Learned: $\\alpha$ = softmax($\\pi$). Row: basis. Column: expert. The entries of a column sum to 1.",
    )
    for k in range(n_basis):
        y = top - (k + 1) * CELL_HEIGHT
        box = FancyBboxPatch(
            (0.3, y + 0.09), 2.65, CELL_HEIGHT - 0.18, boxstyle="round,pad=0.04", color=COLORS[k], linewidth=0
        )
        axes.add_patch(box)
        axes.text(0.42, y + CELL_HEIGHT / 2, f"basis {k}", color="white", size=11, weight="bold", va="center")
        axes.text(2.83, y + CELL_HEIGHT / 2, f"weights $\\beta_{k}$", color="white", size=11, ha="right", va="center")
        axes.plot((3.02, LEFT - 0.06), [y + CELL_HEIGHT / 2] * 2, color=COLORS[k], linewidth=2)
        for i in range(n_experts):
            color = 1 - alpha[k, i] * (1 - np.array(to_rgb(COLORS[k])))
            x = LEFT + i * CELL_WIDTH
            axes.add_patch(Rectangle((x, y), CELL_WIDTH, CELL_HEIGHT, facecolor=color, edgecolor="white"))
            text = f"{alpha[k, i]:.2f}".removeprefix("0")
            axes.text(x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2, text, size=8, ha="center", va="center")


def draw_experts(axes: Axes, alpha: np.ndarray):
    """Draw each expert as a box whose parts have the bases' colors and the coefficients' heights."""
    n_experts = alpha.shape[1]
    heading(
        axes,
        0.25,
        EXPERTS + TALL,
        f"$N$ = {n_experts} experts",
        "Each is a plain DiT. Its weights are an\naverage of the bases, weighted by $\\alpha$.",
    )
    for i in range(n_experts):
        x, y = LEFT + i * CELL_WIDTH, EXPERTS + TALL
        for share, color in zip(alpha[:, i] / alpha[:, i].sum(), COLORS, strict=True):
            y -= share * TALL
            axes.add_patch(Rectangle((x + 0.05, y), CELL_WIDTH - 0.1, share * TALL, facecolor=color, linewidth=0))
        axes.text(x + CELL_WIDTH / 2, EXPERTS - 0.06, str(i), size=8.5, ha="center", va="top")


def draw_images(axes: Axes, n_experts: int):
    """Draw an image at increasing noise levels below the experts, and the axis of the timesteps."""
    text = "From the clean image to noise.\nEach expert denoises one interval."
    heading(axes, 0.25, IMAGES + TALL, "Timesteps $t$", text)
    # The linear schedule of DDPM: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    generator = np.random.default_rng(0)
    image = example_image(48)
    per_image = 2
    for i in range(0, n_experts, per_image):
        t = (2 * i + per_image) * 1000 // (2 * n_experts)
        signal, noise = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
        noisy = signal * image + noise * generator.standard_normal(image.shape)
        # Scaled, so that little of the noise lies outside the range of the colors.
        noisy = noisy / (1 + noise)
        center = LEFT + (i + per_image / 2) * CELL_WIDTH
        extent = (center - TALL / 2, center + TALL / 2, IMAGES, IMAGES + TALL)
        axes.imshow((noisy.clip(-1, 1) + 1) / 2, extent=extent, aspect="auto", interpolation="none")
    y = IMAGES - 0.08
    axes.plot((LEFT, LEFT + n_experts * CELL_WIDTH), (y, y), color=INK, linewidth=0.8)
    for boundary in range(0, n_experts + 1, 5):
        x = LEFT + boundary * CELL_WIDTH
        axes.plot((x, x), (y, y - 0.06), color=INK, linewidth=0.8)
        axes.text(x, y - 0.1, str(min(boundary * 1000 // n_experts, 999)), size=9, ha="center", va="top")


def example_image(side: int) -> np.ndarray:
    """A landscape with a sun, float [side, side, 3] in [-1, 1]."""
    y, x = np.mgrid[0:side, 0:side] / side
    image = np.stack([0.45 + 0.4 * y, 0.65 + 0.2 * y, 0.95 - 0.1 * y], axis=-1)
    image[np.hypot(x - 0.7, y - 0.28) < 0.14] = (1.0, 0.85, 0.25)
    image[y > 0.62 - 0.16 * np.sin(3.4 * x + 0.2)] = (0.42, 0.60, 0.42)
    image[y > 0.80 - 0.10 * np.sin(4.5 * x + 2.4)] = (0.18, 0.40, 0.25)
    return 2 * image - 1


def draw_example(axes: Axes, alpha: np.ndarray):
    """Mark one column, and write out how the weights of its expert are computed."""
    n_basis, n_experts = alpha.shape
    x = LEFT + EXAMPLE * CELL_WIDTH
    low, high = (i * 1000 // n_experts for i in (EXAMPLE, EXAMPLE + 1))
    for y, height in ((HEAT_MAP, n_basis * CELL_HEIGHT), (EXPERTS, TALL)):
        axes.add_patch(Rectangle((x, y), CELL_WIDTH, height, fill=False, edgecolor=INK, linewidth=1.8, zorder=3))
    arrow = dict(arrowstyle="-|>", color=INK, linewidth=1.8, shrinkA=0, shrinkB=0, mutation_scale=14)
    center = x + CELL_WIDTH / 2
    axes.annotate("", (center, EXPERTS + TALL), (center, HEAT_MAP), arrowprops=arrow)
    terms = " + ".join(f"{value:.2f} $\\beta_{k}$" for k, value in enumerate(alpha[:, EXAMPLE]))
    y = (HEAT_MAP + EXPERTS + TALL) / 2
    axes.text(
        center - 0.2,
        y,
        f"Expert {EXAMPLE}, timesteps {low} to {high - 1}:   $\\Theta_{{{EXAMPLE}}}$ = {terms}",
        size=10.8,
        ha="right",
        va="center",
    )


def heading(axes: Axes, x: float, y: float, title: str, text: str):
    """Write a bold title whose upper edge is at `y`, and a text below it."""
    axes.text(x, y, title, size=13, weight="bold", va="top")
    axes.text(x, y - 0.25, text, size=9.5, color=GREY, va="top", linespacing=1.35)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the README's figure of the method.")
    parser.add_argument("out", help="the PNG to write")
    draw_method(parser.parse_args().out)
