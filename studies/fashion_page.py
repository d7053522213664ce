"""The results of the Fashion-MNIST study: the files that hold them, and the tables of the page.

The folder of results holds for each setting <setting>.csv, one row per variant and seed, and in errors/ the errors of
each of them at every timestep. The tables of README.md are made from these files alone.
"""

import csv
import fcntl
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from runs import mean_and_std
from scipy.stats import ttest_1samp

from models import DiT_models
from remix import RemixDiT_models
from runtime.files import atomic_write

# For each setting: side of the images in pixels, and patch size of the models.
SETTINGS = {"pixels": (16, 4), "latents": (32, 2)}
# For each number that table 4 varies: its value in the other tables, and the others.
STEPS, OTHER_STEPS = 5_000, (1_250, 2_500, 10_000, 20_000)
WIDTH, OTHER_WIDTHS = 48, (24, 96, 192)
# The methods that table 4 compares with continued training of the same width.
METHODS = ("independent-8", "remix-4-20", "bonus-8")
# For each table, its parts: title and variants. Every table also has the pretrained model and continued training.
TABLES = {
    1: {
        "Table 1: the same number of images, and the same FLOPs for `-equal-flops`": [
            "independent-8",
            "remix-4-8",
            "remix-4-20",
            "experts-per-batch-1",
            "remix-4-8-equal-flops",
            "remix-4-20-equal-flops",
        ]
    },
    2: {
        "Table 2: mixers": ["remix-4-20", "raw", "one-hot"],
        "Table 2: scopes and mixed layers": ["remix-4-20", "local", "modulation-too"],
        "Table 2: K and N": ["remix-4-8", "remix-4-20", "remix-4-100", "remix-2-20", "remix-8-20"],
        "Table 2: prior": ["remix-4-20", "no-prior", "bonus-0", "bonus-8", "strength-0", "strength-1e-2"],
        "Table 2: final rate of the coefficients (that of remix-4-20 is 5e-4)": ["remix-4-20", "coefficients-to-1e-5"],
        "Table 2: `--recipe paper`, but with the study's learning rate of 1e-3": ["remix-4-20", "recipe-paper"],
        "Table 2: experts per batch (remix-4-20 has 16)": [
            "experts-per-batch-1",
            "experts-per-batch-4",
            "experts-per-batch-8",
            "remix-4-20",
            "experts-per-batch-20",
        ],
    },
    3: {"Table 3: low-rank bases": ["remix-4-20", "rank-4", "rank-8", "rank-16", "rank-16-frozen"]},
    4: {
        "Table 4: number of fine-tuning steps, elsewhere 5,000; the baseline is continued training for as many steps": [
            "remix-4-20",
            *(f"{name}-steps-{steps}" for steps in OTHER_STEPS for name in ("continued", "remix-4-20")),
        ],
        "Table 4: width of the model, elsewhere 48; the baseline is continued training of the same width": [
            *METHODS,
            *(f"{name}-width-{width}" for width in OTHER_WIDTHS for name in ("pretrained", "continued", *METHODS)),
        ],
    },
    5: {
        "Table 5: ideas past the paper, on validation images": [
            "remix-4-20",
            "one-hot",
            "recipe-paper",
            "bonus-5",
            "bonus-8",
            "bonus-12",
            "strength-1e-1",
            "bonus-8-coefficients-1e-3",
            "bonus-8-local",
            "bonus-8-8-20",
            "bonus-8-fine-at-low-noise",
            "continued-fine-at-low-noise",
            "independent-8-fine-at-low-noise",
            "bonus-8-fine-at-high-noise",
            "continued-min-snr-5",
            "bonus-8-min-snr-5",
            "bonus-8-min-snr-50",
            "continued-weighted",
            "independent-8-weighted",
            "remix-4-20-weighted",
            "bonus-8-weighted",
        ]
    },
    6: {
        "Table 6: the best ideas of table 5, on test images": [
            "independent-8",
            "recipe-paper",
            "remix-4-20",
            "bonus-8",
            "bonus-8-fine-at-low-noise",
            "continued-fine-at-low-noise",
            "independent-8-fine-at-low-noise",
            "continued-weighted",
            "independent-8-weighted",
            "bonus-8-weighted",
        ]
    },
}
IN_TABLE_1 = ("pretrained", "continued", *itertools.chain(*TABLES[1].values()))
# The variants of tables 1 and 6, which are scored with both networks.
MAIN = tuple(dict.fromkeys([*IN_TABLE_1, *itertools.chain(*TABLES[6].values())]))
# For each table, the variants that are compared seed by seed with others that have the same baseline: in tables 1, 2
# and 4 with those of the same part, in the other tables with those in MAIN.
BEST = ["bonus-8", "bonus-8-fine-at-low-noise", "bonus-8-weighted"]
PAIRED = {
    1: ["remix-4-20"],
    2: ["remix-4-20"],
    4: [f"{name}-width-{width}" for width in OTHER_WIDTHS for name in ("remix-4-20", "bonus-8")],
    5: BEST,
    6: BEST,
}
# The table that settings are chosen by.
ON_VALIDATION = 5
# In these tables, variants may have different numbers of seeds.
WITH_ALL_SEEDS = (1, 2, 5, 6)
# Measured by benchmarks/benchmark.py with the width, depth, tokens and batch of the setting pixels, and more classes.
SPEED = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "cpu-fashion-low-rank.json"
# For each measured variant, its name in that file, and the options of its RemixDiT; None for a DiT.
MEASURED = {
    "continued": ("DiT", None),
    "remix-4-20": ("RemixDiT G=16", dict(n_basis=4, n_experts=20)),
    **{f"rank-{r}": (f"RemixDiT rank {r} G=16", dict(n_basis=4, n_experts=20, rank=r)) for r in (4, 8, 16)},
}
SCORES = ["fid", "kid", "inception_score", "precision", "recall", "validation_fid", "imagenet_fid", "imagenet_kid"]
ORIGIN = ["minutes", "commit", "command", "machine", "date"]
COLUMNS = ["variant", "seed", "steps", "test_error", "validation_error", *SCORES, *ORIGIN]
MARK = "<!-- fashion_tables.py writes everything below this line -->"


def append_row(path: Path, row: dict):
    """Add a row to a CSV file, unless it has one of this variant and seed; several processes may do so at once."""
    with open(path, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if any((row["variant"], row["seed"]) == (other["variant"], other["seed"]) for other in read_results(path)):
            return
        # Another process may have written since the file was opened.
        file.seek(0, os.SEEK_END)
        table = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            table.writeheader()
        table.writerow(row)


def read_results(path: Path) -> list[dict]:
    """Return the rows of a CSV file of results, with numbers where the columns hold numbers."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            {
                "variant": row["variant"],
                "seed": int(row["seed"]),
                **{key: float(row[key]) for key in ("test_error", "validation_error", *SCORES) if row[key]},
            }
            for row in csv.DictReader(file)
        ]


def errors_path(out: Path, setting: str, name: str, seed: int) -> Path:
    """Return the file that holds the errors of a variant."""
    return out / "errors" / f"{setting}-{name}-{seed}.npz"


# Many variants are compared with the same one, and a file does not change after its row is in the results.
@functools.cache
def read_errors(out: Path, setting: str, name: str, seed: int) -> dict[str, np.ndarray]:
    """Return the errors of a variant at every timestep, float64 [1000], for each split."""
    with np.load(errors_path(out, setting, name, seed)) as file:
        return {split: errors.astype(np.float64) for split, errors in file.items()}


def common_seeds(names: list[str], rows: list[dict]) -> set[int]:
    """Return the seeds that all of these variants have, so that their values can be compared."""
    found = {(row["variant"], row["seed"]) for row in rows}
    return {seed for _, seed in found if all((name, seed) in found for name in names)}


def with_common_seeds(names: list[str], rows: list[dict]) -> list[dict]:
    """Return the rows of these variants whose seeds all of the variants with the same baseline have."""
    chosen = []
    known = {row["variant"] for row in rows}
    for reference in dict.fromkeys(map(baseline, names)):
        compared = [name for name in names if name in known and baseline(name) == reference]
        seeds = common_seeds(compared, rows)
        chosen += [row for row in rows if row["variant"] in compared and row["seed"] in seeds]
    return chosen


def write_page(out: Path):
    """Write the tables of README.md, below MARK."""
    page = out / "README.md"
    head, _, _ = page.read_text().partition(MARK) if page.exists() else ("", "", "")
    with atomic_write(page) as temporary:
        temporary.write_text(f"{head}{MARK}\n\n{page_tables(out)}\n")


def page_tables(out: Path) -> str:
    """Return the tables of all results in a folder, as Markdown."""
    parts = []
    for setting in SETTINGS:
        results = read_results(out / f"{setting}.csv")
        compared = {split: compare(out, setting, results, split) for split in ("test", "validation")}
        parts.append(f"## Results: {setting}")
        if not results:
            parts.append("There are no results yet.")
        shown = {split: {"pretrained", "continued"} for split in compared}
        for table, title, names in ((table, *item) for table, items in TABLES.items() for item in items.items()):
            split = "validation" if table == ON_VALIDATION else "test"
            rows = compared[split]
            if table not in WITH_ALL_SEEDS:
                rows = with_common_seeds(["pretrained", "continued", *names], rows)
            present = [name for name in ("pretrained", "continued", *names) if any(r["variant"] == name for r in rows)]
            # A part is shown if it has a result that no part before it has.
            if shown[split].issuperset(present):
                continue
            shown[split].update(present)
            parts += [f"### {title}, {setting}", score_table(present, rows), fifths_table(present, rows)]
            others = {1: IN_TABLE_1, 2: names, 4: names}.get(table, MAIN)
            parts += [paired_table(name, others, rows) for name in PAIRED.get(table, ()) if name in present]
            if table == 3 and setting == "pixels" and SPEED.exists():
                parts.append(cost_table())
    return "\n\n".join(parts)


def compare(out: Path, setting: str, rows: list[dict], split: str = "test") -> list[dict]:
    """Compare each row with continued training of the same seed.

    Args:
        out: folder of the results.
        setting: key of SETTINGS.
        rows: what `read_results` returns.
        split: "test", or "validation", whose error and FID then replace those of the test images.

    Returns:
        The rows whose seed has a result of continued training, for the same number of steps and the same width. More
        columns are "error", the error of the split; "error_change", its change relative to continued training, in
        percent; "ratio_change", the mean over the timesteps of the relative change, in percent; "fifth_changes" [5],
        the relative changes of the mean errors in fifths of the timesteps, from the least noise to the most, in
        percent; and "fid_change", the difference of FID.
    """
    if split == "validation":
        # The other scores are known for test images only, so they must not be shown beside these.
        known = "variant", "seed", "inception_score"
        rows = [{key: row[key] for key in known} | {"fid": row["validation_fid"]} for row in rows]
    fids = {(row["variant"], row["seed"]): row["fid"] for row in rows}
    compared = []
    for row in rows:
        reference = baseline(row["variant"])
        if (reference, row["seed"]) not in fids:
            continue
        own, base = (read_errors(out, setting, name, row["seed"])[split] for name in (row["variant"], reference))
        fifths = own.reshape(5, -1).mean(1) / base.reshape(5, -1).mean(1)
        changes = dict(error_change=100 * (own.mean() / base.mean() - 1), ratio_change=100 * ((own / base).mean() - 1))
        changes |= dict(error=own.mean(), fifth_changes=100 * (fifths - 1))
        changes["fid_change"] = row["fid"] - fids[reference, row["seed"]]
        compared.append(row | changes)
    return compared


def baseline(name: str) -> str:
    """Return the name of the continued training that a variant is compared with."""
    suffix = re.search(r"-(steps|width)-\d+$", name)
    return "continued" + (suffix[0] if suffix else "")


def score_table(names: list[str], rows: list[dict]) -> str:
    """Return the errors and scores of variants as a Markdown table."""
    lines = [
        "| variant | seeds | error | change, % | mean change over timesteps, % | FID | change | IS | KID "
        "| FID, ImageNet's features |",
        "|" + " --- |" * 10,
    ]
    for name in names:
        variant = [row for row in rows if row["variant"] == name]
        values = {
            key: [row[key] for row in variant if key in row]
            for key in ("error", "fid", "kid", "inception_score", "imagenet_fid")
        }
        cells = [
            name,
            str(len(variant)),
            mean_and_std(values["error"], 5),
            change(name, [row["error_change"] for row in variant]),
            change(name, [row["ratio_change"] for row in variant]),
            mean_and_std(values["fid"], 2),
            change(name, [row["fid_change"] for row in variant]),
            mean_and_std(values["inception_score"], 2),
            # Scores that some of the seeds lack are not comparable with the others.
            *(mean_and_std(values[k], 2) if len(values[k]) == len(variant) else "-" for k in ("kid", "imagenet_fid")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fifths_table(names: list[str], rows: list[dict]) -> str:
    """Return the changes of variants' errors in fifths of the timesteps as a Markdown table."""
    lines = [
        "| change of the error, % | t < 200 | 200 to 399 | 400 to 599 | 600 to 799 | 800 and above |",
        "|" + " --- |" * 6,
    ]
    for name in names:
        changes = np.array([row["fifth_changes"] for row in rows if row["variant"] == name])  # [seeds, 5]
        lines.append(f"| {' | '.join([name, *(change(name, column) for column in changes.T)])} |")
    return "\n".join(lines)


def paired_table(own: str, others: Iterable[str], rows: list[dict]) -> str:
    """Return the comparison of a variant with those of others that have its baseline, seed by seed, as Markdown."""
    by_name = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["seed"]] = row
    lines = [
        f"| {own} compared with | seeds | with a lower error | change, % | with a lower FID | change "
        "| with a lower FID, ImageNet's features | change |",
        "|" + " --- |" * 8,
    ]
    for name in others:
        pairs = [(by_name[own][seed], row) for seed, row in by_name.get(name, {}).items() if seed in by_name[own]]
        if name == own or not pairs or baseline(name) != baseline(own):
            continue
        errors = [100 * (a["error"] / b["error"] - 1) for a, b in pairs]
        fids = [a["fid"] - b["fid"] for a, b in pairs]
        imagenet = [
            a["imagenet_fid"] - b["imagenet_fid"] for a, b in pairs if "imagenet_fid" in a and "imagenet_fid" in b
        ]
        cells = [name, str(len(pairs))]
        for values in (errors, fids, imagenet):
            count = f"{sum(value < 0 for value in values)} of {len(values)}"
            cells += [count, with_star(values)] if values else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table() -> str:
    """Return the numbers of parameters and the speed with low-rank bases as a Markdown table."""
    results = json.loads(SPEED.read_text())
    measured = {row["model"]: row for row in results["training"]}
    lines = [
        f"One run of `benchmarks/benchmark.py` on one thread of an {results['machine']['device'].partition(',')[0]} "
        f"({SPEED.name}); the models take turns:",
        "",
        "| variant | trained parameters, M | step, ms | speed relative to continued |",
        "|" + " --- |" * 4,
    ]
    shape = dict(input_size=16, in_channels=1, num_classes=10)
    for name, (model, options) in MEASURED.items():
        with torch.device("meta"):
            network = RemixDiT_models["RemixDiT-T/4"](**shape, **options) if options else DiT_models["DiT-T/4"](**shape)
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        row = measured[model]
        cells = name, f"{parameters / 1e6:.3f}", f"{row['ms/step']:.1f}", f"{row['speed / DiT']:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def change(name: str, values) -> str:
    """Return the differences of a variant from its baseline as `with_star` does, or "0" for the baseline."""
    return "0" if name == baseline(name) else with_star(values)


def with_star(values) -> str:
    """Return the mean and standard deviation of paired differences, with a star if they are significant.

    The star means p < 0.05 in a t test of three or more seeds, not corrected for the number of comparisons.
    """
    sure = len(values) >= 3 and ttest_1samp(values, 0).pvalue < 0.05
    return mean_and_std(values, 2) + (" *" if sure else "")
