"""The files of the study's results, and the comparison of each variant with its baseline.

The folder of results has a file <setting>.csv for each setting, with one row per variant and seed, and errors.npz with
the errors of each of them at every timestep.
"""

import csv
import subprocess
from pathlib import Path

import numpy as np
from variants import baseline

from runtime.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SCORES = ["fid", "kid", "inception_score", "precision", "recall", "validation_fid", "imagenet_fid", "imagenet_kid"]
ORIGIN = ["minutes", "commit", "command", "machine", "date"]
COLUMNS = ["variant", "seed", "steps", "test_error", "validation_error", *SCORES, *ORIGIN]


def add_result(out: Path, setting: str, row: dict, errors: dict[str, np.ndarray]):
    """Add the result of a variant with one seed; a result of them that exists is kept.

    Args:
        out: folder of the results, which no other process writes to.
        setting: key of SETTINGS.
        row: values of COLUMNS.
        errors: for the splits "test" and "validation", the errors at every timestep, float32 [1000].
    """
    if any((row["variant"], row["seed"]) == (known["variant"], known["seed"]) for known in read_results(out, setting)):
        return
    names, stored = _read_arrays(out)
    name = f"{setting}/{row['variant']}/{row['seed']}"
    # The errors are written first: a row in the CSV file always has errors.
    stored = {split: np.concatenate([stored[split][names != name], values[None]]) for split, values in errors.items()}
    with atomic_write(out / "errors.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, names=np.append(names[names != name], name), **stored)
    append_row(out / f"{setting}.csv", COLUMNS, row)


def append_row(path: Path, columns: list[str], row: dict):
    """Add a row to a CSV file, which is created if it does not exist."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, columns)
        if new:
            table.writeheader()
        table.writerow(row)


def code_version() -> str:
    """Return the commit of this code."""
    git = ["git", "-C", ROOT, "describe", "--always", "--abbrev=10", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def _read_arrays(out: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the names setting/variant/seed [n] of errors.npz, and for each split the errors, float32 [n, 1000]."""
    if not (out / "errors.npz").exists():
        return np.empty(0, "U1"), {split: np.empty((0, 1000), np.float32) for split in ("test", "validation")}
    with np.load(out / "errors.npz") as file:
        return file["names"], {split: file[split] for split in ("test", "validation")}


def read_results(out: Path, setting: str) -> list[dict]:
    """Return the results of a setting.

    Args:
        out: folder of the results.
        setting: key of SETTINGS.

    Returns:
        For each variant and seed, the numbers in the CSV file, and "errors": for each split, the errors at every
        timestep, float64 [1000].
    """
    path = out / f"{setting}.csv"
    if not path.exists():
        return []
    names, errors = _read_arrays(out)
    places = {name: i for i, name in enumerate(names.tolist())}
    results = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            i = places[f"{setting}/{row['variant']}/{row['seed']}"]
            numbers = {key: float(row[key]) for key in ("test_error", "validation_error", *SCORES) if row[key]}
            own_errors = {split: values[i].astype(np.float64) for split, values in errors.items()}
            results.append({"variant": row["variant"], "seed": int(row["seed"]), **numbers, "errors": own_errors})
    return results


def compare(rows: list[dict], split: str = "test") -> list[dict]:
    """Compare each result with continued training of the same seed, for as many steps and of the same width.

    Args:
        rows: what `read_results` returns.
        split: "test", or "validation", whose error and FID then replace those of the test images.

    Returns:
        The rows whose seed has a result of continued training, with more columns: "error", the error of the split;
        "ratios" [1000], the errors relative to those of continued training; "error_change", the change of the error, in
        percent; "ratio_change", the mean over the timesteps of the relative change, in percent; "fifth_changes" [5],
        the changes of the mean errors in fifths of the timesteps, from the least noise to the most, in percent; and
        "fid_change", the difference of FID.
    """
    if split == "validation":
        # The other scores are known for test images only, so they must not be shown beside these.
        known = "variant", "seed", "inception_score", "errors"
        rows = [{key: row[key] for key in known} | {"fid": row["validation_fid"]} for row in rows]
    by_name = {(row["variant"], row["seed"]): row for row in rows}
    compared = []
    for row in rows:
        reference = by_name.get((baseline(row["variant"]), row["seed"]))
        if reference is None:
            continue
        own, base = row["errors"][split], reference["errors"][split]
        fifths = own.reshape(5, -1).mean(1) / base.reshape(5, -1).mean(1)
        changes = dict(error_change=100 * (own.mean() / base.mean() - 1), ratio_change=100 * ((own / base).mean() - 1))
        changes |= dict(error=own.mean(), ratios=own / base, fifth_changes=100 * (fifths - 1))
        compared.append(row | changes | {"fid_change": row["fid"] - reference["fid"]})
    return compared


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
