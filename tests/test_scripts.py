"""Clusters, rehearsed on one machine: two of torchrun's agents are two nodes, and a few lines of bash are SLURM."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, training_flags
from test_faults import wait_for, workers
from test_train import assert_same_weights, losses

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
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", "-s", "bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.faults
def test_a_job_on_two_nodes_is_stopped_requeued_killed_and_finished(features, tmp_path):
    """A signal to the job, then a SIGKILL to one of its processes; what is left is the run of one process, within rounding."""
    flags = [*training_flags(features, tmp_path, "one"), "--max-steps", 200, "--lr", 1e-4]
    run("train_fast.py", *flags)

    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = next(number for number in range(10_000) if free(20_000 + number))
    slurm = {"JOB_ID": job, "JOB_NODELIST": "nodes[1-2]", "JOB_NUM_NODES": 2, "GPUS_ON_NODE": 1}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["SCONTROL_LOG"] = str(tmp_path / "scontrol.log")
    flags = [*training_flags(features, tmp_path, "two-nodes"), "--max-steps", 200, "--lr", 1e-4]
    command = ["bash", "scripts/train.sbatch", *map(str, flags)]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    batch, metrics = start(), tmp_path / "two-nodes/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    batch.send_signal(signal.SIGUSR1)
    _, said = batch.communicate(timeout=90)
    assert batch.returncode == 0, said[-3000:]
    assert "on 2 x" in said
    assert "stopped by SIGUSR1" in said
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n"

    environment["SLURM_RESTART_COUNT"] = "1"
    batch, done = start(), len(losses(tmp_path / "two-nodes"))
    wait_for(lambda: len(metrics.read_text().splitlines()) > done + 3)
    os.kill(workers("two-nodes")[1], signal.SIGKILL)
    _, said = batch.communicate(timeout=90)
    assert batch.returncode == 0, said[-3000:]
    assert said.count("resumed from") == 2, "by the job and, on both nodes, by torchrun"
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n", "a run that is done does not come back"
    assert losses(tmp_path / "two-nodes") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert_same_weights(
        tmp_path / "one/checkpoints/0000200.pt", tmp_path / "two-nodes/checkpoints/0000200.pt", exact=False
    )


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0
