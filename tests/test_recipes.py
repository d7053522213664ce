"""recipes/run.sh: the scripts accept every command, and the dry run confirms the hours of the table."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MISSING, ROOT, run

pytestmark = pytest.mark.usefixtures("no_hub")
RECIPE = ROOT / "recipes" / "run.sh"
RUNS = dict.fromkeys(("S", "B", "L"), ("pretraining", "continued", "4-8", "4-20", "independent"))
RUNS |= {f"SiT-{size}": ("published", "continued", "4-8", "4-20") for size in ("S", "B", "L", "XL")}
ROW = re.compile(r"^\| (\S+) \| (\S+) \| [^|]+ \| [\d., -]+ \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
HOURS = {(size, run): float(hours) for size, run, hours, _ in ROW.findall(RECIPE.with_name("README.md").read_text())}


def recipe(*arguments: str, path: str = f"{Path(sys.executable).parent}:{os.environ['PATH']}", expect: int = 0):
    """Run recipes/run.sh with `path` as the PATH; by default this Python comes first."""
    done = subprocess.run(["bash", RECIPE, *arguments], capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def no_python(tmp_path_factory) -> str:
    """A PATH whose python does nothing: the tests run the commands themselves, in this process."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").symlink_to("/bin/true")
    return f"{folder}:{os.environ['PATH']}"


def test_the_table_has_a_row_for_every_published_run():
    assert list(HOURS) == [(size, run) for size, runs in RUNS.items() for run in runs]


# The models of these sizes are those of B and L.
REPEATED = ("SiT-B", "SiT-L")


@pytest.mark.parametrize(
    ("size", "name"), [pytest.param(*row, marks=[pytest.mark.slow] * (row[0] in REPEATED)) for row in HOURS]
)
def test_the_scripts_accept_every_command_and_the_dry_run_confirms_the_hours(
    size, name, no_python, monkeypatch, tmp_path
):
    printed = recipe(size, name, "--dry-run", path=no_python).stdout
    commands = re.findall(r"^\$ (?:torchrun|python) (?:--\S+ )*(\w+\.py) (.*)$", printed, re.MULTILINE)
    order = ["extract_features.py", "train_fast.py", "sample_ddp.py", "evaluator.py"]
    order = order[2:] if name == "published" else order
    assert list(dict.fromkeys(script for script, _ in commands)) == order
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    hours = 0.0
    for script, flags in commands:
        flags = shlex.split(flags)
        if script != "train_fast.py":
            assert MISSING.search(run(script, *flags, expect=2).stderr), "only a file or a folder is missing"
            continue
        report = run(script, *flags, "--dry-run").stdout
        assert re.search(
            r"memory per GPU: [\d.]+ GiB \(estimate\): [\d.]+ weights, .* AdamW's moments, [\d.]+ activ", report
        )
        # The report is about one of the independent experts.
        runs = 8 if "--independent" in flags else 1
        hours += runs * float(re.search(r"time: ([\d.]+) hours", report)[1])
    assert hours == pytest.approx(HOURS[size, name], rel=0.03, abs=0.06)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_as_users_run_it():
    printed = recipe("S", "4-20", "--dry-run").stdout
    assert printed.count("\n$ ") == 3
    assert "RemixDiT-S/2: 96.79 M parameters" in printed
    assert re.search(r"100,091 steps of batch 256 on 8 GPUs, bf16, 16 experts per batch", printed)


def test_without_dry_run_the_commands_are_executed_in_order(tmp_path):
    """Stubs of the three commands write down how they were called."""
    for name in ("torchrun", "python", "install"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n')
        (tmp_path / name).chmod(0o755)
    printed = recipe("S", "pretraining", path=f"{tmp_path}:{os.environ['PATH']}").stdout
    assert (tmp_path / "called").read_text() == printed.replace("$ ", "")
    assert printed.count("$ ") == 5


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("S",),
        ("XL", "4-20"),
        ("S", "4-9"),
        ("S", "published"),
        ("SiT-S", "independent"),
        ("S", "4-20", "8"),
        ("S", "4-20", "--quick"),
    ],
)
def test_wrong_arguments_give_one_line(arguments):
    done = recipe(*arguments, expect=2)
    assert re.fullmatch(r"recipes/run\.sh: .*--help.*\n", done.stderr)
    assert not done.stdout


def test_help_names_every_size_and_run():
    printed = recipe("--help").stdout
    assert "recipes/run.sh SIZE RUN [--dry-run]" in printed
    assert all(size in re.findall(r"[\w-]+", printed) for size in RUNS)
    assert all(f"\n  {run} " in printed for runs in RUNS.values() for run in runs)
