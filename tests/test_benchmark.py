"""The benchmark runs at toy size, its results are consistent, and the table follows from them."""

import json
import os
import runpy
import shlex
import subprocess

import pytest
from conftest import ROOT, run

from runtime.command_line import flags

TOY = flags(toy=True, model="T/8", batch_size=4)


def test_every_part_is_measured(tmp_path):
    settings = flags(precision="fp32", compile=False, warmup=1, rounds=2, experts_per_batch=(1, 4), data_batch_size=16)
    report = run("benchmarks/benchmark.py", *TOY, *settings, *flags(out=tmp_path, name="toy")).stdout
    results = json.loads((tmp_path / "toy.json").read_text())
    machine = results["machine"]
    assert machine["device"] and machine["versions"] and machine["commit"]

    training = results["training"]
    assert [row["model"] for row in training] == ["DiT, the usual way", "DiT", "RemixDiT G=1", "RemixDiT G=4"]
    for row in training[1:]:
        stages = [value for key, value in row.items() if key.endswith(" %")]
        assert len(stages) == 5
        # The shares are medians, which need not sum to 100.
        assert 80 < sum(stages) < 120
        assert 0 < row["floor ms"] < row["ms/step"]
        assert row["peak GiB"] > 0
    assert training[1]["peak GiB"] < training[3]["peak GiB"]

    assert [row["model"] for row in results["sampling"]] == ["DiT", "folded", "mixed in every step"]
    assert results["data"][0]["images/s"] > 0
    assert results["extraction"][-1]["VAE busy"] > 0
    assert all(row["relative difference"] < 1e-4 for row in results["evaluator"][:-1])
    assert all(f"## {part}" in report for part in ("training", "sampling", "data", "extraction", "evaluator"))


def test_another_backbone_is_measured(tmp_path):
    settings = flags(precision="fp32", compile=False, warmup=1, rounds=1, experts_per_batch=(4,), parts=("training",))
    settings += flags(toy=True, backbone="LightningDiT", model="T/2", input_size=8, batch_size=4, skip_usual=True)
    run("benchmarks/benchmark.py", *settings, *flags(out=tmp_path, name="toy"))
    results = json.loads((tmp_path / "toy.json").read_text())
    assert [row["model"] for row in results["training"]] == ["LightningDiT", "RemixLightningDiT G=4"]
    assert results["training"][0]["speed / LightningDiT"] == 1
    table = run("benchmarks/table.py", tmp_path / "toy.json").stdout
    assert "| RemixLightningDiT-T/2 G=4 |" in table
    for wrong, message in (
        (("--model=T/4",), "--model T/4: a LightningDiT has 1p6B/1"),
        (("--input-size=5",), "--input-size 5: patch_size must divide input_size, but they are 2 and 5"),
        (("--parts", "training", "sampling"), "--backbone LightningDiT can only measure --parts training"),
    ):
        done = run("benchmarks/benchmark.py", *settings, *wrong, *flags(out=tmp_path), expect=2)
        assert message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "name"), [((), "RemixDiT G=2"), (("--shard-bases",), "RemixDiT G=2, sharded bases")]
)
def test_training_is_measured_on_several_processes(tmp_path, sharded, name):
    settings = flags(parts=("training",), precision="fp32", compile=False, warmup=1, rounds=2, experts_per_batch=(2,))
    run("benchmarks/benchmark.py", *TOY, *settings, *flags(out=tmp_path, name="two"), *sharded, processes=2)
    results = json.loads((tmp_path / "two.json").read_text())
    assert results["machine"]["device"].startswith("2 x ")
    assert [row["model"] for row in results["training"]] == [
        "DiT",
        "RemixDiT G=2" + (", sharded bases" if sharded else ""),
    ]
    for row in results["training"]:
        assert row["images/s"] == pytest.approx(2 * 4 / row["ms/step"] * 1e3)


def test_error_for_groups_that_do_not_divide_the_batch(tmp_path):
    settings = flags(experts_per_batch=(3,), parts=("training",), out=tmp_path)
    assert "does not divide" in run("benchmarks/benchmark.py", *TOY, *settings, expect=2).stderr


RESULT = ROOT / "benchmarks" / "results" / "cpu-s2-b8-bf16-compiled.json"


@pytest.fixture
def commands(tmp_path):
    """Run benchmarks/gpu.sh with commands that only write down how they are called; those for XL/2 fail."""
    for name in ("python", "torchrun"):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n! echo "$*" | grep -q XL/2\n')
        stub.chmod(0o755)

    def call(*stages, gpus: int = 1, expect: int = 0) -> tuple[list[str], str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "GPUS": str(gpus), "OUT": str(tmp_path / "out")}
        script = ROOT / "benchmarks" / "gpu.sh"
        done = subprocess.run(["bash", script, *stages], capture_output=True, text=True, env=environment)
        assert done.returncode == expect, done.stderr
        called = tmp_path / "called"
        return called.read_text().splitlines() if called.exists() else [], done.stderr

    return call


def test_a_failure_on_the_gpu_does_not_end_the_other_measurements(commands):
    called, errors = commands(expect=1, gpus=8)
    sizes = [size for size in ("S/2", "B/2", "L/2", "XL/2") for command in called if f"--model {size}" in command]
    assert set(sizes) == {"S/2", "B/2", "L/2", "XL/2"}
    assert called[-8:] == [command for command in called if command.startswith("torchrun")]
    assert "--parts sampling" in " ".join(called) and "pytest" in called[0]
    failed = [line.removeprefix("failed: ") for line in errors.splitlines()]
    assert failed == [command for command in called if "XL/2" in command]
    assert len(failed) == 4


def test_one_gpu_is_measured_without_torchrun(commands):
    called, errors = commands("s", "l")
    assert called and not errors
    assert all(command.startswith("python benchmarks/benchmark.py") for command in called)
    assert "unknown stage q" in commands("s", "q", expect=2)[1]


def test_the_benchmark_accepts_the_commands_for_gpus(commands):
    called, _ = commands(expect=1, gpus=8)
    grouped = [
        command for command in called if "--experts-per-batch " in command and "--experts-per-batch 1 " not in command
    ]
    assert len(grouped) >= 8
    for command in grouped:
        flags = shlex.split(command.partition("benchmark.py ")[2])
        # The last flag wins: all flags are understood before the experts are found not to divide the batch.
        assert "does not divide" in run("benchmarks/benchmark.py", *flags, "--batch-size=7", expect=2).stderr


def test_the_table_of_training_speeds_from_results(tmp_path):
    measured = json.loads(RESULT.read_text())
    header, _, *rows = run("benchmarks/table.py", RESULT).stdout.splitlines()
    assert header.startswith("| model | device |")
    assert len(rows) == len(measured["training"])
    remix = next(row for row in rows if row.startswith("| RemixDiT-S/2 G=4 |"))
    assert "2 threads, bf16, compiled" in remix and "| 8 |" in remix
    speed = next(row["speed / DiT"] for row in measured["training"] if row["model"] == "RemixDiT G=4")
    assert f"| {speed:.2f} |" in remix
    (tmp_path / "other.json").write_text("[]")
    assert "not a result file" in run("benchmarks/table.py", tmp_path / "other.json", expect=2).stderr


def test_the_start_of_scripts_is_compared_with_another_checkout(tmp_path):
    """Scripts that do nothing stand for those of two checkouts. Those of the second one compute before they end."""
    start = runpy.run_path(str(ROOT / "benchmarks/start.py"))
    script = "import sys, time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
    script += "sys.exit(2 if '--wrong' in sys.argv else 0)\n"
    for name, seconds in (("fast", 0), ("slow", 0.2)):
        (tmp_path / name).mkdir()
        for stem in start["SCRIPTS"]:
            (tmp_path / name / f"{stem}.py").write_text(script.format(seconds))
    commands = {
        name: command
        for name, command in start["commands"](tmp_path / "runs", 0).items()
        if name in ("train_fast.py --help", "train_fast.py --wrong", "sample_ddp.py, one image")
    }
    fast, slow = (
        {"import torch": 0.5} | {name: start["cpu_seconds"](tmp_path / tree, c) for name, c in commands.items()}
        for tree in ("fast", "slow")
    )
    rows = [row.strip("| ").split(" | ") for row in start["table_rows"](fast, slow)]
    assert [row[0] for row in rows] == ["command", "---", "import torch", *commands]
    for name, now, ratio, older, _, change in rows[3:]:
        assert fast[name] < 0.2 <= slow[name]
        assert [float(now), float(ratio), float(older), float(change)] == pytest.approx(
            [fast[name], fast[name] / 0.5, slow[name], fast[name] / slow[name]], abs=0.006
        )
    (tmp_path / "fast/train_fast.py").write_text("raise SystemExit('broken')")
    with pytest.raises(start["UserError"], match=r"train_fast\.py --help ended with exit code 1: broken"):
        start["cpu_seconds"](tmp_path / "fast", commands["train_fast.py --help"])
