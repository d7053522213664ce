"""Every recipe's commands are understood by the scripts, its models can be built, and the hours that it expects are --dry-run's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.sh") if path.name != "common.sh")


def dry_run(recipe: Path, path: str = f"{Path(sys.executable).parent}:{os.environ['PATH']}") -> str:
    """What a recipe's dry run says, where `path` is the PATH: by default this very python comes first."""
    command = ["bash", recipe, "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=True).stdout


@pytest.fixture(scope="module")
def no_python(tmp_path_factory) -> str:
    """A PATH whose python does nothing: the tests run the commands themselves, in this process."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").symlink_to("/bin/true")
    return f"{folder}:{os.environ['PATH']}"


def test_there_is_a_recipe_for_every_published_run():
    kinds = ("pretraining", "4-8", "4-20", "continued", "independent")
    assert {path.stem for path in RECIPES} == {f"{size}-{kind}" for size in "SBL" for kind in kinds}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_commands_are_understood_and_the_hours_are_right(recipe, no_python, monkeypatch, tmp_path):
    commands = re.findall(r"^\$ (?:torchrun|python) (?:--\S+ )*(\w+\.py) (.*)$", dry_run(recipe, no_python), re.M)
    order = ["extract_features.py", "train_fast.py", "sample_ddp.py", "evaluator.py"]
    assert list(dict.fromkeys(script for script, _ in commands)) == order
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    hours, costs = 0.0, {}
    for script, flags in commands:
        flags = shlex.split(flags)
        if script != "train_fast.py":
            assert "no such f" in run(script, *flags, expect=2).stderr, "all that is missing is a file or a folder"
            continue
        model = " ".join(flags).partition(" --prefix")[0]  # independent experts differ in what follows
        if model not in costs:
            costs[model] = run(script, *flags, "--dry-run").stdout
            assert re.search(
                r"memory per GPU: [\d.]+ GiB: [\d.]+ weights, .* AdamW's moments, [\d.]+ activ", costs[model]
            )
        else:
            assert "no such f" in run(script, *flags, expect=2).stderr
        hours += float(re.search(r"time: ([\d.]+) hours", costs[model])[1])
    expected = float(re.search(r"about ([\d.]+) hours of training", recipe.read_text())[1])
    assert hours == pytest.approx(expected, rel=0.03, abs=0.06)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_as_users_run_it():
    said = dry_run(ROOT / "recipes" / "S-4-20.sh")
    assert said.count("\n$ ") == 3
    assert "RemixDiT-S/2: 96.79 M parameters" in said
    assert "100,091 steps of batch 256 on 8 GPUs, bf16, 16 experts per batch" in said


def test_a_wrong_flag_of_a_recipe():
    done = subprocess.run(["bash", ROOT / "recipes" / "S-4-20.sh", "--quick"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr
