"""Draw where Remix-DiT helps in the Fashion-MNIST study: at which timesteps, for how many steps, at which width.

    python studies/fashion_figures.py

Reads the results of studies/fashion_tables.py and writes to <out>/figures, for every setting that has the results:
timesteps-<setting>.png, the change of the test error over the timesteps; steps-<setting>.png and width-<setting>.png,
FID and the test error for several numbers of fine-tuning steps and for several widths of the model.
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
    compare,
    read_errors,
    read_results,
)

from common import ArgumentParser, UserError, atomic_write, counted, run_script

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
            points = {value: f"-{kind}-{value}" for value in others} | {default: ""}
            if any(row["variant"] == f"remix-4-20{suffix}" for row in rows for suffix in points.values() if suffix):
                drawn.append(out / "figures" / f"{kind}-{setting}.png")
                draw_series(drawn[-1], label, dict(sorted(points.items())), rows)
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


def draw_series(path: Path, label: str, points: dict[int, str], rows: list[dict]):
    """Draw FID and the test error of continued training and of Remix-DiT 4-20 against a number.

    Args:
        path: the file to write.
        label: what the number is.
        points: for each number, the end of the variants' names.
        rows: what `compare` returns.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5))
    for axes, key, name in zip(panels, ("fid", "error"), ("FID", "test error"), strict=True):
        for variant, title in (("continued", "continued training"), ("remix-4-20", "Remix-DiT 4-20")):
            found = {x: [row[key] for row in rows if row["variant"] == variant + end] for x, end in points.items()}
            found = {x: values for x, values in found.items() if values}
            spread = [np.std(values, ddof=1) if len(values) > 2 else 0 for values in found.values()]
            axes.errorbar(list(found), [np.mean(v) for v in found.values()], spread, marker="o", capsize=3, label=title)
        axes.set(xscale="log", xlabel=label, ylabel=name)
        axes.set_xticks(list(points), [f"{x:,}" for x in points])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
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
