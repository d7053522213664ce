"""Measure what the start of each script costs, in CPU seconds, beside an older checkout.

    python benchmarks/start.py
    python benchmarks/start.py --against PATH      # a folder with another checkout

The table has the import of PyTorch, --help and the refusal of a wrong flag of each script, and complete runs of
train_fast.py with one step and of sample_ddp.py with one image, on a tiny model. A number is the smallest of several
rounds. In a round, the two checkouts take turns. CPU time is used because other work on the machine changes it less
than the time on the clock.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime.command_line import ArgumentParser, flags, positive_int, run_script
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("extract_features", "train_fast", "sample_ddp", "evaluator", "visualize", "convert", "demo")
IMPORT = "import torch"


class Command(NamedTuple):
    """A command line of Python, and the exit code that it should have."""

    words: list[str]
    code: int = 0


def main(args: argparse.Namespace):
    trees = [ROOT, *([args.against] if args.against else [])]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(len(trees))]
        for tree, folder in zip(trees, folders, strict=True):
            prepare(tree, folder)
        seconds = [dict.fromkeys(commands(folder, 0), float("inf")) for folder in folders]
        for round_ in range(args.rounds):
            for name in seconds[0]:
                for tree, folder, best in zip(trees, folders, seconds, strict=True):
                    best[name] = min(best[name], cpu_seconds(tree, commands(folder, round_)[name]))
    print("\n".join(table_rows(*seconds)))


def prepare(tree: Path, folder: Path):
    """Write the input of a checkout's runs: ten images, their features, and the checkpoint of a tiny model."""
    draws = np.random.default_rng(0)
    for i in range(10):
        path = folder / "images" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    words = flags(data_path=folder / "images", features_path=folder / "features", vae="none", image_size=8)
    cpu_seconds(tree, Command(["extract_features.py", *words, *flags(num_workers=0)]))
    cpu_seconds(tree, Command(training(folder, "model")))


def training(folder: Path, prefix: str) -> list[str]:
    """Return the command line of a training run of one step."""
    words = flags(data_path=folder / "features", results_dir=folder, prefix=prefix, model="RemixDiT-T/2", max_steps=1)
    return ["train_fast.py", *words, *flags(n_basis=2, n_experts=4, global_batch_size=8, num_workers=0)]


def commands(folder: Path, round_: int) -> dict[str, Command]:
    """Return the commands to measure by their names.

    Args:
        folder: the folder that `prepare` has written to.
        round_: number of the round. Each round writes to folders of its own.
    """
    measured = {IMPORT: Command(["-c", IMPORT])}
    for script in map("{}.py".format, SCRIPTS):
        measured[f"{script} --help"] = Command([script, "--help"])
        measured[f"{script} --wrong"] = Command([script, "--wrong"], code=2)
    measured["train_fast.py, one step"] = Command(training(folder, f"round-{round_}"))
    words = flags(ckpt=folder / "model/checkpoints/0000001.pt", sample_dir=folder / "samples", name=f"round-{round_}")
    words += flags(num_fid_samples=1, num_sampling_steps=1)
    measured["sample_ddp.py, one image"] = Command(["sample_ddp.py", *words])
    return measured


def cpu_seconds(tree: Path, command: Command) -> float:
    """Run a command in a checkout, and return the CPU time of its process and of all processes that it started.

    Raises:
        UserError: if its exit code is not the expected one.
    """
    before = children_seconds()
    # With one thread, no thread waits in a loop for work, which would count as CPU time.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command.words], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != command.code:
        line = " ".join(command.words)
        raise UserError(f"{tree}: {line} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return children_seconds() - before


def children_seconds() -> float:
    """Return the CPU time of all processes that this one has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table_rows(seconds: dict[str, float], against: dict[str, float] | None = None) -> Iterator[str]:
    """Yield the rows of the table.

    Args:
        seconds: CPU seconds by the names of the commands.
        against: those of the older checkout.
    """
    columns = ["command", "CPU s", f"/ {IMPORT}"]
    if against is not None:
        columns += ["older, CPU s", f"/ {IMPORT}", "now / older"]
    yield table_row(columns)
    yield table_row(["---"] * len(columns))
    for name, value in seconds.items():
        numbers = [value, value / seconds[IMPORT]]
        if against is not None:
            numbers += [against[name], against[name] / against[IMPORT], value / against[name]]
        yield table_row([name, *map("{:.2f}".format, numbers)])


def table_row(cells: list[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", type=Path, metavar="PATH", help="folder with another checkout, which the same Python runs"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="rounds, of which the smallest time counts")
    run_script(main, parser)
