"""Print the table of training speeds from result files of benchmark.py.

python benchmarks/table.py                     # all results in benchmarks/results/
python benchmarks/table.py a.json b.json       # these results
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime.command_line import ArgumentParser, run_script
from runtime.errors import UserError

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["model", "device", "images per GPU", "images/s", "speed / plain", "MFU", "GiB", "commit"]


def main(args: argparse.Namespace):
    rows = [row for path in args.results or sorted(RESULTS.glob("*.json")) for row in table_rows(path)]
    print("\n".join(f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]))


def table_rows(path: Path) -> list[list[str]]:
    """Return the rows of one result file: one for each model that was trained.

    Raises:
        UserError: if it is not a result file of benchmark.py.
    """
    try:
        result = json.loads(path.read_text())
        machine, settings = result["machine"], result["settings"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is not a result file of benchmark.py") from None
    rows = []
    for row in result.get("training", []):
        backbone = settings.get("backbone", "DiT")
        name = row["model"].replace(backbone, f"{backbone}-{settings['model']}")
        shown = f"{row['images/s']:,.4g}", f"{row[f'speed / {backbone}']:.2f}", f"{row['MFU']:.2f}"
        memory = f"{row['peak GiB']:.1f}" if "peak GiB" in row else ""
        mode = f", {settings['precision']}{', compiled' if settings['compile'] else ''}"
        device = machine["device"] + ("" if "usual" in name else mode)
        rows.append([name, device, str(settings["batch_size"]), *shown, memory, machine["commit"]])
    return rows


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="result files (default: those in benchmarks/results/)")
    run_script(main, parser)
