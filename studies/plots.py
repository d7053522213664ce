"""The figures of the study: where Remix-DiT helps, over the timesteps, the number of steps and the width."""

from pathlib import Path

import matplotlib
import numpy as np
from measurements import common_seeds, compare, read_results
from variants import OTHER_STEPS, OTHER_WIDTHS, SETTINGS, STEPS, WIDTH

from runtime.command_line import counted
from runtime.files import atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OVER_TIMESTEPS = {
    "remix-4-20": "Remix-DiT 4-20",
    "remix-4-8": "Remix-DiT 4-8",
    "experts-per-batch-1": "Remix-DiT 4-20, one expert per batch",
    "independent-8": "8 independent experts",
    "bonus-8": "Remix-DiT 4-20, prior bonus 8",
    "bonus-8-weighted": "Remix-DiT 4-20, prior bonus 8, loss weight",
    "one-hot": "Remix-DiT 4-20, one-hot",
}
IN_SERIES = {"continued": "continued training"}
IN_SERIES |= {name: OVER_TIMESTEPS[name] for name in ("remix-4-20", "independent-8", "bonus-8")}
# For each key of a result, the title of its panel.
SERIES_PANELS = {"fid": "FID", "fid_change": "change of FID", "error_change": "change of the test error, %"}
# The errors are averaged over this number of neighbouring timesteps.
BIN = 25


def draw_figures(out: Path):
    """Draw all figures for which a folder of results has the results, to its folder figures."""
    for setting in SETTINGS:
        rows = compare(read_results(out, setting))
        figures = {"timesteps": draw_timesteps(rows)}
        for kind, label, default, others in (
            ("steps", "fine-tuning steps", STEPS, OTHER_STEPS),
            ("width", "width of the model", WIDTH, OTHER_WIDTHS),
        ):
            ends = {value: f"-{kind}-{value}" for value in others} | {default: ""}
            figures[kind] = draw_series(label, dict(sorted(ends.items())), rows)
        for name, figure in figures.items():
            if figure:
                path = out / "figures" / f"{name}-{setting}.png"
                figure.tight_layout()
                with atomic_write(path) as temporary:
                    figure.savefig(temporary, format="png", dpi=120)
                plt.close(figure)
                print(f"wrote {path}")


def changes_per_bin(name: str, rows: list[dict]) -> np.ndarray:
    """Return the mean changes of a variant's error in bins of BIN timesteps, in percent, [seeds, bins].

    Args:
        name: the variant.
        rows: what `compare` returns.
    """
    ratios = [row["ratios"].reshape(-1, BIN).mean(1) for row in rows if row["variant"] == name]
    return 100 * (np.array(ratios) - 1)


def draw_timesteps(rows: list[dict]) -> plt.Figure | None:
    """Draw the mean change over the seeds against the timestep, with the standard deviation of three or more seeds."""
    changes = {name: values for name in OVER_TIMESTEPS if len(values := changes_per_bin(name, rows))}
    if not changes:
        return None
    figure, axes = plt.subplots(figsize=(7, 5))
    timesteps = np.arange(1000).reshape(-1, BIN).mean(1)
    for name, values in changes.items():
        mean = values.mean(0)
        (line,) = axes.plot(timesteps, mean, label=f"{OVER_TIMESTEPS[name]} ({counted(len(values), 'seed')})")
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
    return figure


def draw_series(label: str, ends: dict[int, str], rows: list[dict]) -> plt.Figure | None:
    """Draw FID, and the changes of FID and error relative to continued training, against a number.

    The seeds are those that continued training and Remix-DiT 4-20 have for every value, because different seeds differ
    more than the values do. The other variants are drawn if they have results of all these seeds.

    Args:
        label: what the number is.
        ends: for each value of the number, the end of the variants' names.
        rows: what `compare` returns.
    """
    found = {(row["variant"], row["seed"]): row for row in rows}
    seeds = sorted(common_seeds([name + end for end in ends.values() for name in ("continued", "remix-4-20")], rows))
    if not seeds:
        return None
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.5))
    for axes, (key, title) in zip(panels, SERIES_PANELS.items(), strict=True):
        for name, text in IN_SERIES.items():
            if all((name + end, seed) in found for end in ends.values() for seed in seeds):
                values = np.array([[found[name + end, seed][key] for seed in seeds] for end in ends.values()])
                spread = values.std(1, ddof=1) if len(seeds) > 2 else None
                axes.errorbar(list(ends), values.mean(1), spread, marker="o", capsize=3, label=text)
        axes.set(xscale="log", xlabel=label, title=title)
        axes.set_xticks(list(ends), [f"{x:,}" for x in ends])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(title=counted(len(seeds), "seed"), fontsize=8)
    return figure
