"""The scripts do not import what they do not need, because imports take most of the time of a short run."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, training_flags

# Each takes between a twentieth and the whole of the time of importing PyTorch.
SLOW = {"torch._dynamo", "triton", "torchvision", "timm", "diffusers", "scipy", "matplotlib", "sklearn", "datasets"}
SLOW |= {"wandb", "torch_fidelity", "transformers", "huggingface_hub"}
SCRIPTS = ("extract_features", "train_fast", "sample_ddp", "evaluator", "visualize", "convert", "demo")
# Runs each command line in a fork of one process that has imported PyTorch, and prints the exit code and the modules.
SERVER = """
import json, os, runpy, sys
import torch

sys.path.insert(0, os.getcwd())
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv, code = words, 0
        os.dup2(2, 1)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        os.write(int(os.environ["RESULTS"]), (json.dumps([code, sorted(sys.modules)]) + "\\n").encode())
        os._exit(0)
    os.wait()
"""


def run_all(commands: list[list[str]], results) -> list[tuple[int, set[str]]]:
    """Run scripts, and return the exit code of each and the slow modules that it has imported.

    Args:
        commands: command lines.
        results: file that the processes write to.
    """
    with open(results, "w") as file:
        subprocess.run(
            [sys.executable, "-c", SERVER, json.dumps(commands)],
            env={"PATH": "", "RESULTS": str(file.fileno()), "OMP_NUM_THREADS": "1"},
            pass_fds=[file.fileno()],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == len(commands)
    return [(code, SLOW & set(modules)) for code, modules in lines]


CODES = {(f"{script}.py", flag): code for flag, code in (("--help", 0), ("--wrong", 2)) for script in SCRIPTS}


@pytest.fixture(scope="module")
def results(features, tmp_path_factory) -> dict[tuple[str, ...], tuple[int, set[str]]]:
    """The results of the command lines of CODES, of a training and of sampling, by the first two words of each."""
    folder = tmp_path_factory.mktemp("imports")
    train = ["train_fast.py", *training_flags(features, folder, "run"), "--max-steps=2"]
    ckpt = folder / "run/checkpoints/0000002.pt"
    sample = ["sample_ddp.py", "--num-fid-samples=2", f"--ckpt={ckpt}", f"--sample-dir={folder}"]
    commands = [*map(list, CODES), train, [*sample, "--num-sampling-steps=2"]]
    done = run_all(commands, folder / "results")
    return {tuple(words[:2]): result for words, result in zip(commands, done, strict=True)}


def test_the_command_line_is_parsed_without_slow_imports(results):
    assert {words: results[words] for words in CODES} == {words: (code, set()) for words, code in CODES.items()}


def test_training_and_sampling_on_a_cpu_import_neither_the_compiler_nor_figures(results):
    assert [result for words, result in results.items() if words not in CODES] == [(0, set()), (0, set())]
