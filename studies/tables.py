"""The tables of the study as Markdown, made from the files of its results alone."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from measurements import compare, read_results, with_common_seeds
from scipy.stats import ttest_1samp
from variants import SETTINGS, TABLES, baseline

from runtime.files import atomic_write

HEAD = """# Tables of the Fashion-MNIST study

`studies/fashion.py` writes this file from the CSV files and errors.npz. [README.md](README.md) explains the names, the
columns and the stars, and says what the tables show.
"""


def write_tables(out: Path):
    """Write the tables of all results in a folder to its file tables.md."""
    with atomic_write(out / "tables.md") as temporary:
        temporary.write_text(all_tables(out))


def all_tables(out: Path) -> str:
    """Return the tables of all results in a folder."""
    parts = [HEAD.rstrip()]
    for setting in SETTINGS:
        results = read_results(out, setting)
        compared = {split: compare(results, split) for split in ("test", "validation")}
        parts.append(f"## Results: {setting}")
        if not results:
            parts.append("There are no results yet.")
        shown = {split: {"pretrained", "continued"} for split in compared}
        for table, title in ((each, title) for each in TABLES.values() for title in each.parts):
            names, rows = table.parts[title].split(), compared[table.split]
            if not table.all_seeds:
                rows = with_common_seeds(["pretrained", "continued", *names], rows)
            present = [name for name in ("pretrained", "continued", *names) if any(r["variant"] == name for r in rows)]
            # A part is shown if it has a result that no part before it has.
            if shown[table.split].issuperset(present):
                continue
            shown[table.split].update(present)
            parts += [f"### {title}, {setting}", score_table(present, rows), fifths_table(present, rows)]
            others = names if table.others is None else table.others
            parts += [paired_table(name, others, rows) for name in table.paired if name in present]
    return "\n\n".join(parts) + "\n"


def markdown(header: str, lines: Iterable[list[str]]) -> str:
    """Return a Markdown table with a header such as "a | b" and lines of cells."""
    rule = " | ".join("---" for _ in header.split(" | "))
    return "\n".join(f"| {line} |" for line in (header, rule, *map(" | ".join, lines)))


def score_table(names: list[str], rows: list[dict]) -> str:
    """Return the errors and scores of variants as a Markdown table."""
    lines = []
    for name in names:
        variant = [row for row in rows if row["variant"] == name]
        keys = ("error", "error_change", "ratio_change", "fid", "fid_change", "inception_score", "kid", "imagenet_fid")
        values = {key: [row[key] for row in variant if key in row] for key in keys}
        cells = [
            name,
            str(len(variant)),
            mean_and_std(values["error"], 5),
            change(name, values["error_change"]),
            change(name, values["ratio_change"]),
            mean_and_std(values["fid"]),
            change(name, values["fid_change"]),
            mean_and_std(values["inception_score"]),
            # Scores that some of the seeds lack are not comparable with the others.
            *(mean_and_std(values[key]) if len(values[key]) == len(variant) else "-" for key in keys[-2:]),
        ]
        lines.append(cells)
    return markdown(
        "variant | seeds | error | change, % | mean change over timesteps, % | FID | change | IS | KID "
        "| FID, ImageNet's features",
        lines,
    )


def fifths_table(names: list[str], rows: list[dict]) -> str:
    """Return the changes of variants' errors in fifths of the timesteps as a Markdown table."""
    lines = []
    for name in names:
        changes = np.array([row["fifth_changes"] for row in rows if row["variant"] == name])  # [seeds, 5]
        lines.append([name, *(change(name, column) for column in changes.T)])
    return markdown("change of the error, % | t < 200 | 200 to 399 | 400 to 599 | 600 to 799 | 800 and above", lines)


def paired_table(own: str, others: Iterable[str], rows: list[dict]) -> str:
    """Return the comparison of a variant with those of others that have its baseline, seed by seed, as Markdown."""
    by_name = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["seed"]] = row
    lines = []
    for name in others:
        pairs = [(by_name[own][seed], row) for seed, row in by_name.get(name, {}).items() if seed in by_name[own]]
        if name == own or not pairs or baseline(name) != baseline(own):
            continue
        cells = [name, str(len(pairs))]
        errors = [100 * (a["error"] / b["error"] - 1) for a, b in pairs]
        fids, imagenet = (
            [a[key] - b[key] for a, b in pairs if key in a and key in b] for key in ("fid", "imagenet_fid")
        )
        for values in (errors, fids, imagenet):
            count = f"{sum(value < 0 for value in values)} of {len(values)}"
            cells += [count, with_star(values)] if values else ["-", "-"]
        lines.append(cells)
    return markdown(
        f"{own} compared with | seeds | with a lower error | change, % | with a lower FID | change "
        "| with a lower FID, ImageNet's features | change",
        lines,
    )


def change(name: str, values) -> str:
    """Return the differences of a variant from its baseline as `with_star` does, or "0" for the baseline."""
    return "0" if name == baseline(name) else with_star(values)


def with_star(values) -> str:
    """Return the mean and standard deviation of paired differences, with a star if they are significant.

    The star means p < 0.05 in a t test of three or more seeds, not corrected for the number of comparisons.
    """
    sure = len(values) >= 3 and ttest_1samp(values, 0).pvalue < 0.05
    return mean_and_std(values) + (" *" if sure else "")


def mean_and_std(values, digits: int = 2) -> str:
    """Return the mean over the seeds as text, with the standard deviation if there are three or more."""
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 2 else ""
    return f"{np.mean(values):.{digits}f}{std}"
