"""Runs as a table: the last and the best numbers of metrics.jsonl, and the scores of evaluator.py."""

import math
import textwrap
from pathlib import Path
from statistics import median

from figures import save_png, write_csv
from reports.runs import RunRecord
from runtime.files import atomic_write

# Where more is better; of all other numbers except steps, less is. NAMES are no numbers.
HIGHER = ("Inception Score", "Precision", "Recall", "images/s")
NAMES = ("run", "samples")
# The evaluator's uncertainty of a score is a score of its own, with this ending.
STD = " std"


def compare_runs(runs: list[RunRecord]) -> tuple[list[str], list[list]]:
    """Return the header and the rows of a table of runs.

    A run has one row, or one for each folder of its samples that evaluator.py has scored. A column that would be empty
    is left out, and a missing number is None.
    """
    rows = []
    for run in runs:
        row = {"run": run.name, "last step": run.last_step}
        last = run.reports[-1] if run.reports else {}
        row |= {name: last.get(name) for name in ("loss", "mse")}
        for name, title in (("held_out_loss", "held-out loss"), ("fid", "FID while training")):
            steps, values = run.series(name)
            if values:
                row[title] = values[-1]
                row[f"lowest {title}"], row[f"{title}: lowest at step"] = min(zip(values, steps, strict=True))
        speeds = run.series("images_per_s")[1]
        row["images/s"] = median(speeds) if speeds else None
        evaluated = [{"samples": e.samples, **e.scores} for e in run.evaluations]
        rows += [row | scores for scores in evaluated or [{}]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    # The evaluator's scores follow the numbers of the runs.
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    return names, [[row.get(name) for name in names] for row in rows]


def table_cells(header: list[str], rows: list[list]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Return a table for reading: each cell is a text and whether it is the best of its column.

    A standard deviation is written behind its score, and numbers have five significant digits.
    """
    shown = [i for i, name in enumerate(header) if not name.endswith(STD)]
    stds = {i: header.index(header[i] + STD) for i in shown if header[i] + STD in header}
    best = {}
    for i in shown:
        if header[i] in NAMES or "step" in header[i]:
            continue
        values = [row[i] for row in rows if row[i] is not None and math.isfinite(row[i])]
        if len(set(values)) > 1:
            best[i] = (max if header[i] in HIGHER else min)(values)
    cells = []
    for row in rows:
        line = []
        for i in shown:
            text = format_number(row[i])
            if i in stds and row[stds[i]] is not None:
                std = row[stds[i]]
                text += f" ± {std:.2g}" if std < 100 else f" ± {std:.0f}"
            line.append((text, row[i] is not None and row[i] == best.get(i)))
        cells.append(line)
    return [header[i] for i in shown], cells


def format_number(value: float | str | None) -> str:
    """Return a number with up to five significant digits, and a missing one as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_table(out: Path, runs: list[RunRecord]) -> list[Path]:
    """Write the table of runs as PNG, CSV and Markdown, and return the files.

    Args:
        out: path of the PNG. The other files have its name with their own suffixes.
        runs: the runs.
    """
    header, rows = compare_runs(runs)
    titles, cells = table_cells(header, rows)
    write_csv(out, header, rows)
    with atomic_write(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(titles, cells))
    draw_table(out, titles, cells)
    return table_files(out)


def table_files(out: Path) -> list[Path]:
    """Return the files of a table whose PNG is `out`."""
    return [out, out.with_suffix(".csv"), out.with_suffix(".md")]


def markdown(titles: list[str], cells: list[list[tuple[str, bool]]]) -> str:
    """Return a table in Markdown, with the best numbers in bold."""
    lines = [titles, ["---"] * len(titles)]
    lines += [[f"**{text}**" if best else text for text, best in row] for row in cells]
    return "".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |\n" for line in lines)


def draw_table(out: Path, titles: list[str], cells: list[list[tuple[str, bool]]]):
    """Draw a table as PNG, with the best numbers in bold. Long titles are broken into lines."""
    from matplotlib.figure import Figure

    titles = ["\n".join(textwrap.wrap(title, 15)) for title in titles]
    columns = [[title, *(row[i][0] for row in cells)] for i, title in enumerate(titles)]
    # In characters of the default font at its default size.
    widths = [max(len(line) for text in column for line in text.split("\n")) + 2 for column in columns]
    n_lines = max(title.count("\n") + 1 for title in titles)
    figure = Figure((0.085 * sum(widths) + 0.2, 0.28 * (len(cells) + 0.8 * n_lines) + 0.25))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, sum(widths)), ylim=(len(cells) + 0.2, -0.8 * n_lines - 0.4))
    axis.set_axis_off()
    left = 0
    for i, width in enumerate(widths):
        place, align = (left + 1, "left") if titles[i] in NAMES else (left + width - 1, "right")
        axis.text(place, -0.2, titles[i], ha=align, va="bottom", color="dimgray")
        for j, row in enumerate(cells):
            text, best = row[i]
            # A name with dollar signs is no formula.
            style = {"weight": "bold" if best else "normal", "parse_math": False}
            axis.text(place, j + 0.5, text, ha=align, va="center", **style)
        left += width
    for j in range(len(cells) + 1):
        axis.axhline(j, color="lightgray" if j else "gray", linewidth=0.8)
    save_png(figure, out)
