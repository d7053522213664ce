"""The shell scripts: shellcheck, and a simulated SLURM job on two nodes.

Two agents of torchrun on this machine stand for two nodes, and short shell scripts replace srun and scontrol.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_weights, losses, run, training_flags, training_processes, wait_for

SCRIPTS = sorted([*ROOT.glob("*/*.sh"), *ROOT.glob("scripts/*.sbatch"), ROOT / ".ci" / "run"])
SRUN = """#!/usr/bin/env bash
tasks=()
for _ in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
waiting=1
trap 'waiting=1; kill -USR1 "${tasks[@]}"' USR1
while [ -n "$waiting" ]; do waiting=; for task in "${tasks[@]}"; do wait "$task" && code=0 || code=$?; done; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$*" = "show hostnames nodes[1-2]" ]; then printf 'localhost\\nnode2\\n'; else echo "$*" >> "$SCONTROL_LOG"; fi
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_reports_nothing(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", "-s", "bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.faults
def test_a_job_on_two_nodes_is_stopped_requeued_killed_and_finished(features, tmp_path):
    """A signal stops the job, which is requeued; then one process is killed. The result equals a run of one process."""
    steps = ("--max-steps=200", "--lr=1e-4")
    run("train_fast.py", *training_flags(features, tmp_path, "one"), *steps)

    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    # The job script derives its port from the job's number.
    job = next(number for number in range(10_000) if is_free(20_000 + number))
    slurm = {"JOB_ID": job, "JOB_NODELIST": "nodes[1-2]", "JOB_NUM_NODES": 2, "GPUS_ON_NODE": 1}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["SCONTROL_LOG"] = str(tmp_path / "scontrol.log")
    command = ["bash", "scripts/train.sbatch", *training_flags(features, tmp_path, "two-nodes"), *steps]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    batch, metrics = start(), tmp_path / "two-nodes/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    batch.send_signal(signal.SIGUSR1)
    _, stderr = batch.communicate(timeout=90)
    assert batch.returncode == 0, stderr[-3000:]
    assert "on 2 x" in stderr
    assert "stopped by SIGUSR1" in stderr
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n"

    environment["SLURM_RESTART_COUNT"] = "1"
    batch, done = start(), len(losses(tmp_path / "two-nodes"))
    wait_for(lambda: len(metrics.read_text().splitlines()) > done + 3)
    os.kill(training_processes("two-nodes")[1], signal.SIGKILL)
    _, stderr = batch.communicate(timeout=90)
    assert batch.returncode == 0, stderr[-3000:]
    assert stderr.count("resumed from") == 2, "once by the requeued job, once after torchrun's restart"
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n", "a finished job is not requeued"
    assert losses(tmp_path / "two-nodes") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert_same_weights(
        tmp_path / "one/checkpoints/0000200.pt", tmp_path / "two-nodes/checkpoints/0000200.pt", exact=False
    )


def is_free(port: int) -> bool:
    """Return whether no process listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0
