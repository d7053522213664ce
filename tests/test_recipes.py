"""recipes/run.sh: the scripts accept its commands, and the dry run builds every kind of model."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MISSING, ROOT, run

pytestmark = pytest.mark.usefixtures("no_hub")
RECIPE = ROOT / "recipes" / "run.sh"
RUNS = dict.fromkeys(("S", "B", "L"), ("pretraining", "continued", "4-8", "4-20", "independent"))
RUNS |= dict.fromkeys(
    (*(f"SiT-{size}" for size in ("S", "B", "L", "XL")), "LightningDiT-XL", "DiTDH-XL"),
    ("published", "continued", "4-8", "4-20"),
)
RUNS = [(size, run) for size, runs in RUNS.items() for run in runs]
# The others differ in the names of the models and the files, and in the number of experts and steps.
DIFFERENT = [("S", run) for run in ("pretraining", "continued", "4-20", "independent")]
DIFFERENT += [(size, run) for size in ("SiT-S", "LightningDiT-XL", "DiTDH-XL") for run in ("published", "continued")]
LARGE = [("B", "pretraining"), ("L", "4-20"), ("SiT-XL", "4-20"), ("LightningDiT-XL", "4-8"), ("DiTDH-XL", "4-20")]


def recipe(
    *arguments: str,
    path: str = f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    expect: int = 0,
    script: Path = RECIPE,
):
    """Run recipes/run.sh, or a copy of it, with `path` as the PATH; by default this Python comes first."""
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def no_python(tmp_path_factory) -> str:
    """A PATH whose python does nothing: the tests run the commands themselves, in this process."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").symlink_to("/bin/true")
    return f"{folder}:{os.environ['PATH']}"


def test_the_tables_have_a_row_for_every_published_run(no_python):
    """Every run has a row, and run.sh knows it and gives its models the size of the row."""
    rows = re.findall(r"^\| ((?:\w+-)?[SBLX]+) \| (\S+) \|", RECIPE.with_name("README.md").read_text(), re.MULTILINE)
    assert rows == RUNS
    for size, name in RUNS:
        printed = recipe(size, name, "--dry-run", path=no_python).stdout
        trained = re.findall(r"^\$ torchrun .* train_fast\.py --model (\w+)-(\w+)/[12] ", printed, re.MULTILINE)
        kind, _, width = size.rpartition("-")
        remix = "Remix" if name.startswith("4-") else ""
        assert trained == [(remix + (kind if kind not in ("", "SiT") else "DiT"), width)] * (name != "published")


@pytest.mark.parametrize(("size", "name"), [*DIFFERENT, *(pytest.param(*run, marks=pytest.mark.slow) for run in LARGE)])
def test_the_scripts_accept_every_command(size, name, no_python, monkeypatch, tmp_path):
    printed = recipe(size, name, "--dry-run", path=no_python).stdout
    commands = re.findall(r"^\$ (?:torchrun|python) (?:--\S+ )*(\w+\.py) (.*)$", printed, re.MULTILINE)
    order = ["extract_features.py", "train_fast.py", "sample_ddp.py", "evaluator.py"]
    # LightningDiT's latents are downloaded.
    order = order[2:] if name == "published" else order[1:] if size == "LightningDiT-XL" else order
    assert list(dict.fromkeys(script for script, _ in commands)) == order
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for script, flags in commands:
        flags = shlex.split(flags)
        if script == "train_fast.py":
            report = run(script, *flags, "--dry-run").stdout
            assert "TFLOP per step and GPU" in report
            if (size, name) == ("S", "4-20"):
                assert "RemixDiT-S/2: 96.79 M parameters" in report
                assert "100,091 steps of batch 256 on 8 GPUs, bf16, 16 experts per batch" in report
        else:
            assert MISSING.search(run(script, *flags, expect=2).stderr), "only a file or a folder is missing"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_plans_every_training_for_eight_gpus(tmp_path):
    """A stub of python prints how it was called, below the command that a dry run leaves out."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$WORLD_SIZE processes: $*"\n')
    (tmp_path / "python").chmod(0o755)
    printed = recipe("S", "4-20", "--dry-run", path=f"{tmp_path}:{os.environ['PATH']}").stdout
    extracting, training, planning, sampling, scoring = printed.splitlines()
    assert planning == training.replace("$ torchrun --nnodes=1 --nproc_per_node=8", "8 processes:") + " --dry-run"
    assert all(command.startswith("$ ") for command in (extracting, sampling, scoring))


def test_published_runs_say_the_scores_to_compare_with(no_python):
    """They are those of the table."""
    for size, scores in (("SiT-XL", "2.06, 2.15"), ("LightningDiT-XL", "1.35, 2.17"), ("DiTDH-XL", "1.13")):
        printed = recipe(size, "published", "--dry-run", path=no_python).stdout
        assert re.findall(r"\b\d\.\d\d\b", printed.splitlines()[0]) == scores.split(", ")
        assert f"| {size} | published | - | {scores} |" in RECIPE.with_name("README.md").read_text()


def test_without_dry_run_the_commands_are_executed_in_order(tmp_path):
    """Stubs of the three commands write down how they were called."""
    for name in ("torchrun", "python", "install"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n')
        (tmp_path / name).chmod(0o755)
    printed = recipe("S", "pretraining", path=f"{tmp_path}:{os.environ['PATH']}").stdout
    assert (tmp_path / "called").read_text() == printed.replace("$ ", "")
    assert printed.count("$ ") == 5


def test_latents_are_unpacked_again_after_an_interruption(tmp_path):
    """Half of the archive is unpacked first. Stubs take the place of the commands that download and train."""
    script = tmp_path / "recipes/run.sh"
    for folder in ("bin", "recipes", "data/vavae/splits", "latents"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(RECIPE, script)
    for name in ("hf", "torchrun", "python"):
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    for shard in range(2):
        (tmp_path / f"latents/latents_rank00_shard00{shard}.safetensors").write_bytes(os.urandom(5000))
    archive = Path(shutil.make_archive(tmp_path / "all", "gztar", tmp_path / "latents")).read_bytes()
    path, features = f"{tmp_path / 'bin'}:{os.environ['PATH']}", tmp_path / "data/imagenet_vavae"
    (tmp_path / "data/vavae/splits/split_a").write_bytes(archive[:7000])
    recipe("LightningDiT-XL", "continued", path=path, script=script, expect=2)
    assert not features.exists()
    (tmp_path / "data/vavae/splits/split_b").write_bytes(archive[7000:])
    for _ in range(2):
        recipe("LightningDiT-XL", "continued", path=path, script=script)
        assert len(list(features.glob("latents_rank*"))) == 2
        (tmp_path / "data/vavae/splits/split_b").unlink(missing_ok=True)


def test_wrong_arguments_give_one_line():
    for arguments in ((), ("XL", "4-20"), ("S", "published"), ("DiTDH-XL", "independent"), ("S", "4-20", "--quick")):
        done = recipe(*arguments, expect=2)
        assert re.fullmatch(r"recipes/run\.sh: .*\n", done.stderr), arguments
        assert not done.stdout
