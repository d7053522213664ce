"""The charts of a run's page, as SVG without colours of its own: the page's style sheet gives them for light and dark.

Text stays text, in the page's font. Importing matplotlib takes a second, so the functions import it.
"""

import html
import io
import re
from itertools import pairwise

import numpy as np

from diffusion.intervals import scale_of
from reports.runs import SPEED, RunRecord

# The colours in the figures stand for variables of the style sheet, by which they are replaced in the SVG.
INK, GRID = "#010101", "#020202"
SERIES = [f"#0300{i:02x}" for i in range(8)]
VARIABLES = {INK: "--ink", GRID: "--grid"} | {color: f"--series-{i}" for i, color in enumerate(SERIES)}
# More runs than colours differ by the style of their lines.
STYLES = ("-", "--", ":", "-.")
# Width and height of a chart in inches of 72 CSS pixels.
SIZE = (6.0, 3.1)
# Values that differ by more than this factor are drawn on a logarithmic axis.
LOG_RATIO = 8
# So many scored steps of a run are drawn in the chart over the noise levels, evenly spaced, with the last one.
SCORED_STEPS = 4
# Columns of a heat map over the steps.
COLUMNS = 240
TITLES = {
    "loss": "training loss",
    "mse": "error of the prediction (mse)",
    "vb": "variational bound (vb)",
    "prior": "cross-entropy of the prior (prior)",
    "fid": "FID of the EMA weights (fid)",
    "held_out_loss": "held-out loss of the EMA weights (held_out_loss)",
    "lr": "learning rate of the weights (lr)",
    "coeff_lr": "learning rate of the mixing logits (coeff_lr)",
    "entropy": "entropy of the coefficients, nats, mean over the experts (entropy)",
    "prior_weight": "weight of the prior in the loss (prior_weight)",
    "expert_spread": "relative distance of the experts from their mean (expert_spread)",
    "images_per_s": "images per second (images_per_s)",
    "bad_steps": "non-finite steps so far (bad_steps)",
}


def style_of(number: int) -> dict:
    """Return the colour and the style of the lines of a run."""
    return {"color": SERIES[number % len(SERIES)], "linestyle": STYLES[number // len(SERIES) % len(STYLES)]}


def chart_of_series(name: str, runs: list[RunRecord], last_step: int) -> str:
    """Draw a number of metrics.jsonl over the steps, one line per run, as SVG.

    Args:
        name: name of the number.
        runs: the runs; those without this number have no line.
        last_step: right end of the axis.
    """
    figure = new_figure()
    axis = figure.subplots()
    low = []
    for number, run in enumerate(runs):
        steps, values = run.series(name)
        if steps:
            few = len(steps) <= 40
            axis.plot(steps, values, **style_of(number), linewidth=1.6, marker="o" if few else None, markersize=3.5)
            low += values
    if name not in SPEED and not name.endswith("_weight") and 0 < min(low) < max(low) / LOG_RATIO:
        axis.set_yscale("log")
        plain_log_ticks(axis)
    axis.set(xlabel="step", xlim=(0, max(last_step, 1)))
    axis.axvline(0, color=INK, linewidth=1, alpha=0.5, gid="cursor")
    return to_svg(figure, f"series-{name}", TITLES.get(name, name))


def chart_of_noise_levels(runs: list[RunRecord], highest: float) -> str | None:
    """Draw the held-out loss of each expert over its interval of the noise levels, as SVG; None without such losses.

    Of one run, several scored steps are drawn, the later the stronger; of several runs, the last one of each.

    Args:
        runs: the runs.
        highest: the highest noise level. Runs of processes with another one are left out.
    """
    figure = new_figure(2 * SIZE[0], SIZE[1])
    axis = figure.subplots()
    drawn, values = [], []
    for number, run in enumerate(runs):
        lines = [line for line in run.scores if run.expert_errors(line)]
        if not lines or run.boundaries is None or run.boundaries[-1] != highest:
            continue
        chosen = sorted({round(i) for i in np.linspace(0, len(lines) - 1, SCORED_STEPS)}) if len(runs) == 1 else [-1]
        for place, i in enumerate(chosen):
            errors = run.expert_errors(lines[i])
            ends = list(pairwise(run.boundaries))
            # An expert whose interval holds none of the measured noise levels has no value: a gap.
            heights = [errors.get(expert, np.nan) for expert in range(len(ends))]
            alpha = 0.35 + 0.65 * (place + 1) / len(chosen) if len(chosen) > 1 else 1
            line = axis.stairs(
                heights,
                run.boundaries,
                baseline=None,
                color=style_of(number)["color"],
                linestyle=STYLES[(len(chosen) - 1 - place) % len(STYLES)] if len(runs) == 1 else "-",
                linewidth=1.6,
                alpha=alpha,
                # Above the grid, as the lines of the other charts.
                zorder=2,
            )
            drawn.append((line, f"step {lines[i]['step']:,}" if len(runs) == 1 else run.name))
            values += errors.values()
    if not drawn:
        return None
    if 0 < min(values) < max(values) / LOG_RATIO:
        axis.set_yscale("log")
        plain_log_ticks(axis)
    axis.set_xlabel(f"{scale_of([0, highest]).unit} (left: least noise)")
    axis.margins(x=0)
    legend = axis.legend(*zip(*drawn, strict=True), fontsize=12, labelcolor=INK, framealpha=0, edgecolor=GRID)
    for text in legend.get_texts():
        # A name with dollar signs is no formula.
        text.set_parse_math(False)
    return to_svg(figure, f"noise-levels-{highest:g}", "held-out loss of each expert over its noise levels")


def chart_of_coefficients(run: RunRecord, number: int, last_step: int) -> str | None:
    """Draw the coefficients of a run over its steps, one heat map per basis, as SVG; None without coefficients."""
    steps, alpha = coefficients_over_steps(run)
    if not len(steps):
        return None
    n_basis = alpha.shape[-1]
    figure = new_figure(2 * SIZE[0], 0.9 + 1.05 * -(-n_basis // 2))
    draw_coefficients_over_steps(figure, steps, alpha, run.last_step, columns=2 if n_basis > 1 else 1)
    for axis in figure.axes:
        if axis.images:
            # A run of fewer steps ends where it has ended, on the axis of all runs.
            axis.set_xlim(right=max(last_step, steps[0] + 1))
            axis.axvline(steps[0], color=INK, linewidth=1, alpha=0.5, gid="cursor")
    return to_svg(figure, f"coefficients-{number}", f"{run.name}: coefficients over the steps")


def coefficients_over_steps(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps [S] of the reports with coefficients, and the coefficients [S, N, K], of a local scope the
    mean over the blocks. Without coefficients, both are empty.
    """
    lines = [line for line in run.reports if "coefficients" in line]
    steps, alpha = np.array([line["step"] for line in lines]), np.array([line["coefficients"] for line in lines])
    return steps, alpha.mean(1) if alpha.ndim == 4 else alpha


def draw_coefficients_over_steps(figure, steps: np.ndarray, alpha: np.ndarray, last_step: int, columns: int = 1):
    """Draw one heat map per basis on a matplotlib figure: the steps from left to right, the experts from top to bottom.

    Args:
        figure: the figure.
        steps: the steps [S] of the coefficients.
        alpha: the coefficients [S, N, K].
        last_step: the last step of the run, up to which its last coefficients are drawn.
        columns: heat maps per row.
    """
    from matplotlib.ticker import MaxNLocator

    n_experts, n_basis = alpha.shape[1:]
    axes = figure.subplots(-(-n_basis // columns), columns, sharex=True, sharey=True, squeeze=False)
    # Reports may be unevenly spaced, for example after a resumed run: a column shows the latest one up to its step.
    places = np.linspace(steps[0], max(last_step, steps[0] + 1), min(COLUMNS, 8 * len(steps)))
    latest = np.searchsorted(steps, places, side="right") - 1
    for k, axis in enumerate(axes.flat):
        if k >= n_basis:
            axis.set_visible(False)
            continue
        image = axis.imshow(
            alpha[latest, :, k].T,
            aspect="auto",
            cmap="viridis",
            vmin=min(0, alpha.min()),
            vmax=max(1, alpha.max()),
            extent=(places[0], places[-1], n_experts - 0.5, -0.5),
            interpolation="none",
        )
        axis.set_ylabel(f"basis {k}\nexpert")
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.colorbar(image, ax=axes.ravel().tolist(), label="coefficient", pad=0.01)


def plain_log_ticks(axis):
    """Label a logarithmic axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float = SIZE[0], height: float = SIZE[1]):
    """Return an empty matplotlib figure in the page's style."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=72, layout="constrained")


def to_svg(figure, name: str, title: str) -> str:
    """Return a figure as an SVG element.

    Args:
        figure: the figure, whose colours are INK, GRID or one of SERIES.
        name: a name that no other figure of the page has; the identifiers within the element start with it.
        title: what the figure shows, for readers that do not see it.
    """
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    cursors = [line for axis in figure.axes for line in axis.lines if line.get_gid() == "cursor"]
    for axis in figure.axes:
        axis.tick_params(which="both", colors=INK, labelsize=12)
        axis.spines[:].set_color(GRID)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set(color=INK, fontsize=12)
        if not axis.images and axis.get_label() != "<colorbar>":
            axis.grid(color=GRID, linewidth=0.7)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_xlabel() == "step":
                axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # The first step of each cursor, and by how much a step moves it, in units of the SVG. They are read after the
    # figure is saved, because each drawing of a figure with a colour bar changes its layout a little.
    firsts = [line.get_xdata()[0] for line in cursors]
    moves = [np.ptp(line.axes.transData.transform([(0, 0), (1, 0)])[:, 0]) for line in cursors]
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style in a figure would hold for the whole page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # The page gives the size.
    svg = re.sub(r' (width|height)="[^"]*"', "", svg, count=2)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    for move, first in zip(moves, firsts, strict=True):
        svg = svg.replace('<g id="cursor">', f'<g class="cursor" data-first="{first}" data-move="{move:.6g}">', 1)
    # Identifiers are made unique on the page.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
