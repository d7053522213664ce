"""Nothing is lost: killed at random moments, out of disk, one process gone; and then the same as if nothing had been."""

import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PIXELS, ROOT, make_images, training_flags

from checkpoint import checkpoints, find_corruption

pytestmark = pytest.mark.faults
MOMENTS = 20

# Children are forked from a server that has the scripts' libraries loaded: a start costs no seconds of imports.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train_fast", "extract_features", "sample_ddp"])


def child(log: str, script: str, flags: list[str]):
    os.setsid()
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115, it lasts as long as the process
    sys.argv = [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(log: Path, script: str, *flags):
    process = context.Process(target=child, args=(str(log), script, [str(flag) for flag in flags]))
    process.start()
    return process


def finish(log: Path, script: str, *flags) -> float:
    """Run to the end; return the seconds it took."""
    began = time.perf_counter()
    process = start(log, script, *flags)
    process.join(120)
    assert process.exitcode == 0, log.read_text()[-3000:]
    return time.perf_counter() - began


def kill_at_random_moments(log: Path, seconds: float, script: str, *flags):
    """Start and kill, MOMENTS times; a run that comes to its end before is started, and found to be done, again."""
    generator = random.Random(0)
    for _ in range(MOMENTS):
        process = start(log, script, *flags)
        process.join(generator.uniform(0.02, seconds))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def same_run(a: Path, b: Path):
    """The last checkpoints and the logged losses are the same, bit for bit."""
    (last_a, *_), (last_b, *_) = checkpoints(a / "checkpoints"), checkpoints(b / "checkpoints")
    assert last_a.name == last_b.name
    states = [torch.load(path, weights_only=True) for path in (last_a, last_b)]
    for part in ("model", "ema"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), key
    assert losses(a) == losses(b)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def test_training_killed_at_random_moments(features, tmp_path):
    flags = ["--max-steps", 60, "--ckpt-every", 1, "--keep", 3]
    seconds = finish(tmp_path / "log", "train_fast.py", *training_flags(features, tmp_path, "whole"), *flags)
    killed = [*training_flags(features, tmp_path, "killed"), *flags, "--resume", "auto"]
    kill_at_random_moments(tmp_path / "log", seconds / 4, "train_fast.py", *killed)
    assert all(find_corruption(path) is None for path in checkpoints(tmp_path / "killed/checkpoints")), (
        "only whole files have names"
    )
    finish(tmp_path / "log", "train_fast.py", *killed)
    same_run(tmp_path / "whole", tmp_path / "killed")


def test_extraction_killed_at_random_moments(tmp_path):
    tree = make_images(tmp_path / "images", classes=5, per_class=900)
    flags = ["--data-path", tree, *PIXELS, "--features-path"]
    seconds = finish(tmp_path / "log", "extract_features.py", *flags, tmp_path / "whole")
    kill_at_random_moments(tmp_path / "log", seconds / 4, "extract_features.py", *flags, tmp_path / "killed")
    finish(tmp_path / "log", "extract_features.py", *flags, tmp_path / "killed")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "killed").iterdir() if not path.name.startswith(".")}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_sampling_killed_at_random_moments(trained, tmp_path):
    flags = ["--ckpt", trained / "checkpoints/0000004.pt", "--num-fid-samples", 120, "--per-proc-batch-size", 10]
    flags += ["--num-sampling-steps", 20, "--sample-dir", tmp_path, "--name"]
    seconds = finish(tmp_path / "log", "sample_ddp.py", *flags, "whole")
    kill_at_random_moments(tmp_path / "log", seconds / 4, "sample_ddp.py", *flags, "killed")
    finish(tmp_path / "log", "sample_ddp.py", *flags, "killed")
    a, b = (np.load(tmp_path / which / "samples.npz") for which in ("whole", "killed"))
    assert np.array_equal(a["arr_0"], b["arr_0"])
    assert np.array_equal(a["arr_1"], b["arr_1"])
    assert (tmp_path / "whole/grid.png").read_bytes() == (tmp_path / "killed/grid.png").read_bytes()


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(features, tmp_path, which):
    """The signal goes to the whole process group, twice, as schedulers send it: the loader's processes live through it."""
    flags = ["--max-steps", 300, "--ckpt-every", 1000, "--num-workers", 2]
    finish(tmp_path / "log", "train_fast.py", *training_flags(features, tmp_path, "whole"), *flags)
    stopped = [*training_flags(features, tmp_path, "stopped"), *flags, "--resume", "auto"]
    process = start(tmp_path / "log", "train_fast.py", *stopped)
    metrics = tmp_path / "stopped/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5)
    os.killpg(process.pid, which)
    time.sleep(0.02)
    os.killpg(process.pid, which)
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    assert f"stopped by {which.name}" in (tmp_path / "stopped/log.txt").read_text()
    assert len(checkpoints(tmp_path / "stopped/checkpoints")) == 1
    finish(tmp_path / "log", "train_fast.py", *stopped)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_to_one_process_of_two_stops_both(features, tmp_path):
    agent = torchrun(features, tmp_path, "signalled")
    wait_for(lambda: checkpoints(tmp_path / "signalled/checkpoints"))
    os.kill(workers("signalled")[1], signal.SIGUSR1)
    _, said = agent.communicate(timeout=90)
    assert agent.returncode == 0, said[-3000:]
    assert "stopped by another process" in said
    before = checkpoints(tmp_path / "signalled/checkpoints")[0]
    agent = torchrun(features, tmp_path, "signalled")
    _, said = agent.communicate(timeout=90)
    assert f"resumed from {before}" in said


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_full_disk_costs_a_checkpoint_and_no_more(features, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=True)
    try:
        flags = [*training_flags(features, disk, "run"), "--max-steps", 150, "--ckpt-every", 10, "--keep", 1]
        process = start(tmp_path / "log", "train_fast.py", *flags)
        wait_for(lambda: checkpoints(disk / "run/checkpoints"))
        wait_for(lambda: fill(disk / "filler") or "COULD NOT SAVE" in (tmp_path / "log").read_text())
        process.join(120)
        said = (tmp_path / "log").read_text()
        assert process.exitcode == 0, said[-3000:]
        assert "COULD NOT SAVE" in said
        assert "done" in said.splitlines()[-1]
        left = checkpoints(disk / "run/checkpoints")
        assert left
        assert all(find_corruption(path) is None for path in left)
        assert "not enough disk space" in run_again(
            tmp_path, *training_flags(features, disk, "other"), "--max-steps", 2
        )
    finally:
        subprocess.run(["umount", disk], check=True)


def fill(path: Path):
    with open(path, "ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def run_again(tmp_path: Path, *flags) -> str:
    process = start(tmp_path / "refused", "train_fast.py", *flags)
    process.join(60)
    assert process.exitcode == 2
    return (tmp_path / "refused").read_text()


def torchrun(features: Path, tmp_path: Path, prefix: str, *more) -> subprocess.Popen:
    flags = [*training_flags(features, tmp_path, prefix), "--max-steps", 400, "--ckpt-every", 20, "--resume", "auto"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *more,
        ROOT / "train_fast.py",
    ]
    return subprocess.Popen([*map(str, command), *map(str, flags)], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def workers(prefix: str) -> list[int]:
    """The training processes of a run: rank 0 first."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [int(item[5:]) for item in environment if item.startswith(b"RANK=")]
        if entry.name.isdigit() and prefix.encode() in words and ranks:
            found.append((ranks[0], int(entry.name)))
    return [pid for _, pid in sorted(found)]


def test_one_process_dies(features, tmp_path):
    agent = torchrun(features, tmp_path, "dies")
    wait_for(lambda: checkpoints(tmp_path / "dies/checkpoints"))
    os.kill(workers("dies")[1], signal.SIGKILL)
    _, said = agent.communicate(timeout=90)
    assert agent.returncode != 0
    assert "rank      : 1" in said
    assert not workers("dies"), "no orphan is left"


def test_one_process_dies_and_torchrun_brings_the_run_back(features, tmp_path):
    whole = torchrun(features, tmp_path, "whole")
    whole.communicate(timeout=120)
    agent = torchrun(features, tmp_path, "back", "--max-restarts=1")
    wait_for(lambda: checkpoints(tmp_path / "back/checkpoints"))
    os.kill(workers("back")[1], signal.SIGKILL)
    _, said = agent.communicate(timeout=120)
    assert agent.returncode == 0, said[-3000:]
    assert "resumed from" in said
    same_run(tmp_path / "whole", tmp_path / "back")
