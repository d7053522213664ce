"""What the studies share: running the project's scripts, training one variant, and the errors of its model."""

import contextlib
import csv
import os
import runpy
import shlex
import sys
from pathlib import Path

# Models run in parallel, with one core each.
os.environ["OMP_NUM_THREADS"] = "1"
# GPUs compute in fp32 without TF32, as CPUs do.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from diffusion import create_diffusion  # noqa: E402
from features.dataset import FeatureDataset  # noqa: E402
from runtime.command_line import flags  # noqa: E402
from sampling.loading import load_denoiser  # noqa: E402
from training.statistics import noise_errors  # noqa: E402


def run(script: str, *words):
    """Run one of the project's scripts in this process, as `python script words`."""
    arguments = [str(ROOT / script), *map(str, words)]
    print(f"$ python {shlex.join([script, *arguments[1:]])}", flush=True)
    argv = sys.argv
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.argv = argv


@contextlib.contextmanager
def output_to(log: Path):
    """Append everything that is printed to a file; an error names the file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    except BaseException:
        print(f"stopped: see {log}", file=sys.stderr)
        raise


def train(results: Path, prefix: str, independent: int = 1, *, max_steps: int, **values) -> list[Path]:
    """Run train_fast.py, unless its checkpoints exist; an interrupted run continues.

    Args:
        results: folder of the runs.
        prefix: name of the run.
        independent: number of plain DiTs, as --independent of train_fast.py.
        max_steps: total number of steps.
        **values: further flags of train_fast.py.

    Returns:
        The checkpoints, one for each independent expert.
    """
    names = [f"{prefix}-{i}" for i in range(independent)] if independent > 1 else [prefix]
    paths = [results / name / "checkpoints" / f"{max_steps // independent:07d}.pt" for name in names]
    if not all(path.exists() for path in paths):
        if independent > 1:
            values["independent"] = independent
        # Pictures are not needed. The newest checkpoint is enough to continue from.
        quiet = flags(num_workers=0, log_every=500, sample_every=0, ckpt_every=1000, keep=1, resume="auto")
        run("train_fast.py", *flags(results_dir=results, prefix=prefix, max_steps=max_steps, **values), *quiet)
    return paths


def heldout_errors(paths: list[Path], split: Path, timesteps: range, per_timestep: int) -> torch.Tensor:
    """Compute the errors of a model's predicted noise on a split that it was not trained on.

    Args:
        paths: checkpoint of the model, or those of independent experts.
        split: folder of the split's features.
        timesteps: timesteps to evaluate.
        per_timestep: images per timestep.

    Returns:
        Mean squared errors with EMA weights [number of timesteps].
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_denoiser(paths)
    x, y = (tensor.to(device) for tensor in shuffled_images(split))
    diffusion = create_diffusion(**config["diffusion"])
    return noise_errors(model.to(device), diffusion, x, y, timesteps, per_timestep).cpu()


def shuffled_images(split: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all encoded images and labels of a split in a random order, which is always the same.

    They are stored class by class. In this order, any few of them are of many classes.
    """
    dataset = FeatureDataset(split)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return dataset.__getitems__(order.tolist())


def write_csv(path: Path, rows: list[dict]):
    """Write rows with the same keys as a CSV file; its folder is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def mean_and_std(values: list[float], digits: int) -> str:
    """Return the mean over the seeds as text, with the standard deviation if there are three or more."""
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 2 else ""
    return f"{np.mean(values):.{digits}f}{std}"
