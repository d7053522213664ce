"""Draw where Remix-DiT helps in the Fashion-MNIST study: at which timesteps, for how many steps, at which width.

    python studies/fashion_figures.py

Reads the results of studies/fashion_tables.py and writes to <out>/figures, for every setting that has the results:
timesteps-<setting>.png, the change of the test error over the timesteps; steps-<setting>.png and width-<setting>.png,
FID, and the changes of FID and of the test error relative to continued training, for several numbers of fine-tuning
steps and for several widths of the model.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from fashion_page import (
    OTHER_STEPS,
    OTHER_WIDTHS,
    SETTINGS,
    STEPS,
    WIDTH,
    common_seeds,
    compare,
    read_errors,
    read_results,
)

from runtime.command_line import ArgumentParser, counted, run_script
from runtime.errors import UserError
from runtime.files import atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VARIANTS = {
    "remix-4-20": "Remix-DiT 4-20",
    "remix-4-8": "Remix-DiT 4-8",
    "experts-per-batch-1": "Remix-DiT 4-20, one expert per batch",
    "independent-8": "8 independent experts",
    "bonus-8": "Remix-DiT 4-20, prior bonus 8",
    "bonus-8-weighted": "Remix-DiT 4-20, prior bonus 8, loss weight",
    "one-hot": "Remix-DiT 4-20, one-hot",
}
# For each suffix of a variant's name: label of the axis, the value without suffix, and the other values.
SERIES = {
    "steps": ("fine-tuning steps", STEPS, OTHER_STEPS),
    "width": ("width of the model", WIDTH, OTHER_WIDTHS),
}
SERIES_VARIANTS = {
    "continued": "continued training",
    **{name: VARIANTS[name] for name in ("remix-4-20", "independent-8", "bonus-8")},
}
# These determine the points and seeds of a series. The other variants are drawn if they have results for all.
REQUIRED = ("continued", "remix-4-20")
# For each key of a result, the title of its panel.
SERIES_PANELS = {"fid": "FID", "fid_change": "change of FID", "error_change": "change of the test error, %"}
# The errors are averaged over this number of neighbouring timesteps.
BIN = 25


def main(args: argparse.Namespace):
    out = Path(args.out)
    drawn = []
    for setting in SETTINGS:
        rows = compare(out, setting, read_results(out / f"{setting}.csv"))
        changes = {name: change_per_bin(out, setting, name, rows) for name in VARIANTS}
        changes = {name: values for name, values in changes.items() if len(values)}
        if changes:
            drawn.append(out / "figures" / f"timesteps-{setting}.png")
            draw(drawn[-1], changes)
        for kind, (label, default, others) in SERIES.items():
            points, series = read_series({value: f"-{kind}-{value}" for value in others} | {default: ""}, rows)
            if len(points) > 1 and series["continued"][0]:
                drawn.append(out / "figures" / f"{kind}-{setting}.png")
                draw_series(drawn[-1], label, points, series)
    for path in drawn:
        print(f"wrote {path}")
    if not drawn:
        raise UserError(f"{out} has no results of a variant and of continued training: run studies/fashion_tables.py")


def change_per_bin(out: Path, setting: str, name: str, rows: list[dict]) -> np.ndarray:
    """Return the changes of a variant's test error relative to continued training, in percent.

    Args:
        out: folder of the results.
        setting: key of SETTINGS.
        name: the variant.
        rows: what `compare` returns.

    Returns:
        Mean changes in bins of BIN timesteps [seeds, bins].
    """
    changes = []
    for row in rows:
        if row["variant"] == name:
            own, base = (read_errors(out, setting, variant, row["seed"])["test"] for variant in (name, "continued"))
            changes.append(100 * ((own / base).reshape(-1, BIN).mean(1) - 1))
    return np.array(changes)


def draw(path: Path, changes: dict[str, np.ndarray]):
    """Draw the mean change over the seeds against the timestep, with the standard deviation of three or more seeds."""
    figure, axes = plt.subplots(figsize=(7, 5))
    timesteps = np.arange(1000).reshape(-1, BIN).mean(1)
    for name, values in changes.items():
        mean = values.mean(0)
        (line,) = axes.plot(timesteps, mean, label=f"{VARIANTS[name]} ({counted(len(values), 'seed')})")
        if len(values) > 2:
            std = values.std(0, ddof=1)
            axes.fill_between(timesteps, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    axes.axhline(0, color="gray", linewidth=0.8)
    # Linear between -5 and 5 %, and logarithmic beyond, because the changes at high noise are much larger.
    axes.set_yscale("symlog", linthresh=5, linscale=1.5)
    ticks = [-60, -30, -15, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 15, 30, 60]
    limits = axes.get_ylim()
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_ylim(limits)
    axes.minorticks_off()
    axes.set(xlabel="timestep", ylabel="change of the test error relative to\ncontinued training, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(path, figure)


def read_series(points: dict[int, str], rows: list[dict]) -> tuple[list[int], dict[str, list[list[dict]]]]:
    """Select the results of SERIES_VARIANTS for several values of a number.

    Args:
        points: for each value of the number, the end of the variants' names.
        rows: what `compare` returns.

    Returns:
        The values that have results, and for each variant its rows: one list for each value, of the seeds that all of
        these values have. Different seeds cannot be compared, as they differ more than the values do.
    """
    found = {(row["variant"], row["seed"]): row for row in rows}
    known = {name for name, _ in found}
    points = {x: end for x, end in sorted(points.items()) if all(name + end in known for name in REQUIRED)}
    seeds = sorted(common_seeds([name + end for end in points.values() for name in REQUIRED], rows))
    names = [
        name
        for name in SERIES_VARIANTS
        if all((name + end, seed) in found for end in points.values() for seed in seeds)
    ]
    return list(points), {
        name: [[found[name + end, seed] for seed in seeds] for end in points.values()] for name in names
    }


def draw_series(path: Path, label: str, points: list[int], series: dict[str, list[list[dict]]]):
    """Draw FID, and the changes of FID and error relative to continued training, against a number.

    Args:
        path: the file to write.
        label: what the number is.
        points: its values.
        series: from `read_series`.
    """
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.5))
    seeds = len(series["continued"][0])
    for axes, (key, title) in zip(panels, SERIES_PANELS.items(), strict=True):
        for name, results in series.items():
            values = np.array([[row[key] for row in rows] for rows in results])
            spread = values.std(1, ddof=1) if seeds > 2 else None
            axes.errorbar(points, values.mean(1), spread, marker="o", capsize=3, label=SERIES_VARIANTS[name])
        axes.set(xscale="log", xlabel=label, title=title)
        axes.set_xticks(points, [f"{x:,}" for x in points])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(title=counted(seeds, "seed"), fontsize=8)
    save_figure(path, figure)


def save_figure(path: Path, figure: plt.Figure):
    """Save a figure as PNG, and close it."""
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = ArgumentParser(
        description="Draw at which timesteps, for how many steps and at which width Remix-DiT helps."
    )
    parser.add_argument("--out", default="studies/results/fashion", metavar="FOLDER", help="results")
    run_script(main, parser)
