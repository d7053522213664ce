"""Fault injection: killed at random moments, stopped by signals, out of disk space, or with one process killed.

Each test compares the results with those of an undisturbed run, bit for bit.
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    PIXELS,
    ROOT,
    assert_same_weights,
    losses,
    make_images,
    run,
    sampled_images,
    start,
    training_flags,
    training_processes,
    wait_for,
)

from interop.own import checkpoints, find_corruption

pytestmark = pytest.mark.faults
KILLS = 20


def start_script(log: Path, script: str, *flags):
    """Start a script in a process of its own, which prints to `log`."""
    return start([ROOT / script, *flags], log, log)


def run_to_end(log: Path, script: str, *flags) -> float:
    """Run a script and return the seconds it took."""
    began = time.perf_counter()
    process = start_script(log, script, *flags)
    process.join(120)
    assert process.exitcode == 0, log.read_text()[-3000:]
    return time.perf_counter() - began


def kill_at_random_moments(log: Path, seconds: float, script: str, *flags):
    """Start a script and kill it within `seconds`, KILLS times; a run that finishes earlier is simply started again."""
    generator = random.Random(0)
    for _ in range(KILLS):
        process = start_script(log, script, *flags)
        process.join(generator.uniform(0.02, seconds))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def assert_same_run(a: Path, b: Path):
    """Check that two runs have the same last checkpoint and the same logged losses, bit for bit."""
    (last_a, *_), (last_b, *_) = checkpoints(a / "checkpoints"), checkpoints(b / "checkpoints")
    assert last_a.name == last_b.name
    assert_same_weights(last_a, last_b)
    assert losses(a) == losses(b)


def test_training_killed_at_random_moments(features, tmp_path):
    flags = ["--max-steps=60", "--ckpt-every=1", "--keep=3"]
    seconds = run_to_end(tmp_path / "log", "train_fast.py", *training_flags(features, tmp_path, "undisturbed"), *flags)
    killed = [*training_flags(features, tmp_path, "killed"), *flags, "--resume=auto"]
    kill_at_random_moments(tmp_path / "log", seconds / 4, "train_fast.py", *killed)
    assert all(find_corruption(path) is None for path in checkpoints(tmp_path / "killed/checkpoints"))
    run_to_end(tmp_path / "log", "train_fast.py", *killed)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


def test_extraction_killed_at_random_moments(tmp_path):
    tree = make_images(tmp_path / "images", classes=5, per_class=900)
    flags = ["--data-path", tree, *PIXELS, "--features-path"]
    seconds = run_to_end(tmp_path / "log", "extract_features.py", *flags, tmp_path / "undisturbed")
    kill_at_random_moments(tmp_path / "log", seconds / 4, "extract_features.py", *flags, tmp_path / "killed")
    run_to_end(tmp_path / "log", "extract_features.py", *flags, tmp_path / "killed")
    names = {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert names == {path.name for path in (tmp_path / "killed").iterdir() if not path.name.startswith(".")}
    for name in names:
        assert (tmp_path / "undisturbed" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_sampling_killed_at_random_moments(trained, tmp_path):
    flags = ["--ckpt", trained / "checkpoints/0000004.pt", "--num-fid-samples=120", "--per-proc-batch-size=10"]
    flags += ["--num-sampling-steps=20", "--sample-dir", tmp_path, "--name"]
    seconds = run_to_end(tmp_path / "log", "sample_ddp.py", *flags, "undisturbed")
    kill_at_random_moments(tmp_path / "log", seconds / 4, "sample_ddp.py", *flags, "killed")
    run_to_end(tmp_path / "log", "sample_ddp.py", *flags, "killed")
    a, b = tmp_path / "undisturbed", tmp_path / "killed"
    assert np.array_equal(sampled_images(a), sampled_images(b))
    assert np.array_equal(np.load(a / "samples.npz")["arr_1"], np.load(b / "samples.npz")["arr_1"])
    assert (a / "grid.png").read_bytes() == (b / "grid.png").read_bytes()


@pytest.mark.parametrize(
    "which", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(features, tmp_path, which):
    """The signal is sent twice to the whole process group, as schedulers do; the DataLoader's workers ignore it."""
    flags = ["--max-steps=200", "--ckpt-every=1000", "--num-workers=2"]
    run_to_end(tmp_path / "log", "train_fast.py", *training_flags(features, tmp_path, "undisturbed"), *flags)
    stopped = [*training_flags(features, tmp_path, "stopped"), *flags, "--resume=auto"]
    process = start_script(tmp_path / "log", "train_fast.py", *stopped)
    metrics = tmp_path / "stopped/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5)
    os.killpg(process.pid, which)
    time.sleep(0.02)
    os.killpg(process.pid, which)
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    assert f"stopped by {which.name}" in (tmp_path / "stopped/log.txt").read_text()
    assert len(checkpoints(tmp_path / "stopped/checkpoints")) == 1
    run_to_end(tmp_path / "log", "train_fast.py", *stopped)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "stopped")


def test_two_runs_with_the_same_folder(features, tmp_path):
    """Started together, one of them trains undisturbed and the other is refused."""
    flags = ["--max-steps=60", "--ckpt-every=20"]
    run_to_end(tmp_path / "log", "train_fast.py", *training_flags(features, tmp_path, "alone"), *flags)
    logs = [tmp_path / "first", tmp_path / "second"]
    runs = [start_script(log, "train_fast.py", *training_flags(features, tmp_path, "shared"), *flags) for log in logs]
    for process in runs:
        process.join(120)
    assert sorted(process.exitcode for process in runs) == [0, 2]
    (writer, _), (_, refused) = sorted(zip(runs, logs, strict=True), key=lambda pair: pair[0].exitcode)
    assert f"is in use by process {writer.pid} on" in refused.read_text()
    assert_same_run(tmp_path / "alone", tmp_path / "shared")


def two_process_flags(features: Path, results: Path, prefix: str) -> list[str]:
    return [*training_flags(features, results, prefix), "--max-steps=400", "--ckpt-every=20", "--resume=auto"]


@pytest.fixture(scope="module")
def undisturbed(features, tmp_path_factory) -> Path:
    """The folder of a run of two processes."""
    path = tmp_path_factory.mktemp("undisturbed")
    run("train_fast.py", *two_process_flags(features, path, "run"), processes=2)
    return path / "run"


def torchrun(features: Path, tmp_path: Path, prefix: str, *more) -> subprocess.Popen:
    """Start training on two processes; `more` are flags of torchrun."""
    flags = two_process_flags(features, tmp_path, prefix)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *more]
    return subprocess.Popen([*command, ROOT / "train_fast.py", *flags], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_signal_to_one_process_of_two_stops_both(features, tmp_path):
    agent = torchrun(features, tmp_path, "signalled")
    wait_for(lambda: checkpoints(tmp_path / "signalled/checkpoints"))
    os.kill(training_processes("signalled")[1], signal.SIGUSR1)
    _, stderr = agent.communicate(timeout=90)
    assert agent.returncode == 0, stderr[-3000:]
    assert "stopped by another process" in stderr
    before = checkpoints(tmp_path / "signalled/checkpoints")[0]
    agent = torchrun(features, tmp_path, "signalled")
    _, stderr = agent.communicate(timeout=90)
    assert f"resumed from {before}" in stderr


@pytest.mark.slow
def test_one_process_of_two_is_killed(features, tmp_path):
    agent = torchrun(features, tmp_path, "killed")
    wait_for(lambda: checkpoints(tmp_path / "killed/checkpoints"))
    os.kill(training_processes("killed")[1], signal.SIGKILL)
    _, stderr = agent.communicate(timeout=90)
    assert agent.returncode != 0
    assert "rank      : 1" in stderr
    assert not training_processes("killed"), "no process is left"


# The simulated job of test_scripts.py is restarted as well.
@pytest.mark.slow
def test_one_process_of_two_is_killed_and_torchrun_restarts_the_run(undisturbed, features, tmp_path):
    agent = torchrun(features, tmp_path, "restarted", "--max-restarts=1")
    wait_for(lambda: checkpoints(tmp_path / "restarted/checkpoints"))
    os.kill(training_processes("restarted")[1], signal.SIGKILL)
    _, stderr = agent.communicate(timeout=120)
    assert agent.returncode == 0, stderr[-3000:]
    assert "resumed from" in stderr
    assert_same_run(undisturbed, tmp_path / "restarted")


def test_training_ends_when_torchrun_is_killed(undisturbed, features, tmp_path):
    """A run that is started too early is refused; one that is started later resumes where the first one stopped."""
    agent = torchrun(features, tmp_path, "orphaned")
    wait_for(lambda: checkpoints(tmp_path / "orphaned/checkpoints"))
    orphans = training_processes("orphaned")
    assert len(orphans) == 2
    for pid in orphans:
        os.kill(pid, signal.SIGSTOP)
    agent.kill()
    early = torchrun(features, tmp_path, "orphaned")
    _, stderr = early.communicate(timeout=90)
    assert early.returncode != 0
    assert f"is in use by process {orphans[0]} on" in stderr
    for pid in orphans:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not training_processes("orphaned"))
    agent.communicate()
    assert "stopped by" in (tmp_path / "orphaned/log.txt").read_text()
    before = checkpoints(tmp_path / "orphaned/checkpoints")[0]
    resumed = torchrun(features, tmp_path, "orphaned")
    _, stderr = resumed.communicate(timeout=120)
    assert f"resumed from {before}" in stderr
    assert_same_run(undisturbed, tmp_path / "orphaned")


def fill(path: Path):
    """Fill the disk by writing to `path`."""
    with open(path, "ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def test_a_full_disk_costs_only_checkpoints(features, tmp_path):
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    steps = ["--max-steps=150", "--ckpt-every=10", "--keep=1"]
    run_to_end(tmp_path / "first", "train_fast.py", *training_flags(features, tmp_path, "undisturbed"), *steps)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=True)
    try:
        flags = [*training_flags(features, disk, "run"), *steps]
        process = start_script(log, "train_fast.py", *flags)
        wait_for(lambda: checkpoints(disk / "run/checkpoints"))
        wait_for(lambda: fill(disk / "filler") or "COULD NOT SAVE" in log.read_text())
        process.join(120)
        output = log.read_text()
        assert process.exitcode == 1, output[-3000:]
        assert "COULD NOT SAVE" in output
        assert "after step 150 without a checkpoint" in output.splitlines()[-1]
        left = checkpoints(disk / "run/checkpoints")
        assert left
        assert all(find_corruption(path) is None for path in left)

        refused = tmp_path / "refused"
        process = start_script(refused, "train_fast.py", *training_flags(features, disk, "other"), "--max-steps=2")
        process.join(60)
        assert process.exitcode == 2
        assert "not enough disk space" in refused.read_text()

        (disk / "filler").unlink()
        run_to_end(log, "train_fast.py", *flags, "--resume=auto")
        assert_same_run(tmp_path / "undisturbed", disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
