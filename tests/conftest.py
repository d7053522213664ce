"""Fixtures: golden vectors, small image trees and features, and a way to run the scripts as users do."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes on two cores must not fight
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)
GOLDEN = ROOT / "tests" / "golden"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def golden(name: str):
    return torch.load(GOLDEN / name, weights_only=True)


def run(script: str, *flags, processes: int = 1, expect: int = 0) -> subprocess.CompletedProcess:
    """Run a script of the project, failing unless it exits with `expect`.

    Several processes run under torchrun; a single one runs in this process, which spares seconds of imports.
    """
    arguments = [str(ROOT / script), *map(str, flags)]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    else:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", arguments)
            try:
                runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def make_images(folder: Path, classes: int = 3, per_class: int = 8, size: int = 8, seed: int = 0) -> Path:
    """An ImageFolder tree of smooth random RGB images."""
    generator = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            small = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            small.resize((size + 2, size), Image.Resampling.BICUBIC).save(folder / f"class{label}" / f"{i}.png")
    return folder


PIXELS = ("--vae", "none", "--image-size", "8", "--num-workers", "0")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def features(tmp_path_factory, images) -> Path:
    """24 images of 3 classes, encoded as 8x8 RGB pixels with their mirror images."""
    path = tmp_path_factory.mktemp("features") / "encoded"
    run("extract_features.py", "--data-path", images, "--features-path", path, *PIXELS)
    return path


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A tiny AutoencoderKL with random weights: 4 latent channels, half the side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        **kinds, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, scaling_factor=0.5
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, features) -> Path:
    """A RemixDiT-T/2 with K=2 and N=6, trained for four steps: its run's folder."""
    path = tmp_path_factory.mktemp("outputs")
    run("train_fast.py", *training_flags(features, path, "trained"), "--max-steps", 4)
    return path / "trained"


@pytest.fixture(scope="session")
def ckpt(trained, tmp_path_factory) -> Path:
    """The four-step model with its bases pushed apart, so that the experts differ."""
    from checkpoint import save_checkpoint

    state = torch.load(trained / "checkpoints/0000004.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for key, value in state["ema"].items():
        if value.ndim >= 2 and "pos_embed" not in key:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("sampling") / "run" / "checkpoints" / "0000004.pt"
    save_checkpoint(path, state)
    return path


def training_flags(features: Path, results: Path, prefix: str, model: str = "RemixDiT-T/2") -> list:
    """Flags of train_fast.py for a small run that reports every step."""
    # test_faults.py finds a run's processes by the prefix as a separate word of their command lines.
    flags = [f"--data-path={features}", f"--results-dir={results}", "--prefix", prefix, f"--model={model}"]
    remix = ["--n-basis=2", "--n-experts=6"] if model.startswith("Remix") else []
    size = ["--num-workers=0", "--global-batch-size=12", "--log-every=1", "--lr=1e-3", "--ema-decay=0.9"]
    return [*flags, *remix, *size]


def losses(run_folder: Path) -> dict[int, float]:
    """The logged loss of each step of a run."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "every step is logged once"
    return {line["step"]: line["loss"] for line in lines}


def assert_same_weights(a: Path, b: Path, exact: bool = True):
    """Check that two checkpoints hold the same weights and the same EMA."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    for part in ("model", "ema"):
        for key, value in a[part].items():
            if exact:
                assert torch.equal(value, b[part][key]), f"{part}.{key}"
            else:
                # Where a gradient is nothing but rounding error, Adam turns its sign into a full step.
                torch.testing.assert_close(value, b[part][key], rtol=1e-3, atol=2e-4, msg=f"{part}.{key}")
