"""Post-hoc EMA: averages of the weights of any width, made after the training (Karras et al., arXiv 2312.02696).

Training tracks two averages whose profiles are powers of the training time, and stores snapshots of them. An average of
any other width is a linear combination of the snapshots, whose profile fits the wanted one best (section 3.2, appendix
C). The width of a profile is its standard deviation relative to the training time, sigma_rel (section 3.1).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.files import atomic_write

# The widths that the paper tracks.
TRACKED_STDS = (0.05, 0.10)
# The width of gamma = 0, the plain mean of all weights, is 1 / sqrt(12) = 0.2887. Wider profiles are not used.
WIDEST = 0.28
SNAPSHOT_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def gamma_of_std(std: float) -> float:
    """Return the exponent gamma of the power profile of a relative standard deviation (section 3.1, appendix C)."""
    # std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    return np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()


def decay_at(step: int, std: float) -> float:
    """Return the decay of the power-function average in the update after a step, counted from 1 (section 3.1)."""
    return (1 - 1 / step) ** (gamma_of_std(std) + 1)


def products(steps: np.ndarray, gammas: np.ndarray, other_steps: np.ndarray, other_gammas: np.ndarray) -> np.ndarray:
    """Return the inner products [n, m] of n power profiles with m others (appendix C).

    The profile of step t and exponent gamma is (gamma + 1) tau^gamma / t^(gamma + 1) for 0 < tau < t.
    """
    t, g = steps[:, None].astype(np.float64), gammas[:, None].astype(np.float64)
    u, h = other_steps[None].astype(np.float64), other_gammas[None].astype(np.float64)
    shorter = np.minimum(t, u)
    # The ratios are at most 1, so that no power overflows.
    ratio = (shorter / t) ** (g + 1) * (shorter / u) ** (h + 1)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio / shorter


def solve_weights(steps: list[int], stds: list[float], step: int, std: float) -> np.ndarray:
    """Compute the combination of snapshots whose profile is nearest to a wanted one, in least squares (appendix C).

    Args:
        steps: training step of each snapshot [n].
        stds: relative standard deviation of each snapshot's profile [n].
        step: training step of the wanted average.
        std: its relative standard deviation.

    Returns:
        The weight of each snapshot, float64 [n].
    """
    steps, gammas = np.array(steps), np.array([gamma_of_std(value) for value in stds])
    target = np.array([step]), np.array([gamma_of_std(std)])
    matrix = products(steps, gammas, steps, gammas)
    return np.linalg.solve(matrix, products(steps, gammas, *target)[:, 0])


def snapshot_folder(run_folder: Path) -> Path:
    """Return the folder of a run's snapshots."""
    return Path(run_folder) / "ema"


def count_snapshots(first_step: int, max_steps: int, every: int | None) -> int:
    """Return the number of snapshots that a run writes from a step on, one of them after its last step."""
    return -(-max_steps // every) - first_step // every if every else 0


def write_snapshot(run_folder: Path, step: int, averages: dict[str, dict[str, Tensor]], dtype: str):
    """Write the power-function averages after a step, atomically.

    Args:
        run_folder: the run's folder.
        step: number of steps done.
        averages: for each relative standard deviation, as text, the average of each trained tensor by its name.
        dtype: type of the stored numbers, one of `SNAPSHOT_DTYPES`.
    """
    stored = {
        std: {name: tensor.to(SNAPSHOT_DTYPES[dtype]) for name, tensor in state.items()}
        for std, state in averages.items()
    }
    with atomic_write(snapshot_folder(run_folder) / f"{step:07d}.pt") as temporary:
        torch.save(stored, temporary)


def reconstruct(ckpt, std: float, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the EMA of a width from the snapshots of a run.

    Args:
        ckpt: a checkpoint of the run, in its folder. The average is that after the step of this checkpoint.
        std: relative standard deviation of the average's profile.
        state: a state dict of the model, which gives the tensors that are not trained.

    Returns:
        The state dict with the averages, in the dtypes of `state`.

    Raises:
        UserError: if the run has no snapshot at the step of the checkpoint.
    """
    ckpt = Path(ckpt)
    folder = snapshot_folder(ckpt.parent.parent)
    steps = sorted(int(path.stem) for path in folder.glob("*.pt") if path.stem.isdigit())
    step = int(ckpt.stem) if ckpt.stem.isdigit() else None
    if step not in steps:
        present = f"there are snapshots of steps {steps[0]} to {steps[-1]}" if steps else "train with --ema-snapshots"
        raise UserError(f"{folder} has no snapshot of the step of {ckpt}: {present}")
    steps = [value for value in steps if value <= step]
    # Mapped into memory: one tensor of all snapshots is read at a time.
    files = [torch.load(folder / f"{value:07d}.pt", weights_only=True, mmap=True) for value in steps]
    snapshots = [(value, text, file[text]) for value, file in zip(steps, files, strict=True) for text in file]
    weights = solve_weights([item[0] for item in snapshots], [float(item[1]) for item in snapshots], step, std)
    averages = {}
    for name in snapshots[0][2]:
        # Weights of both signs cancel each other.
        parts = (weight * item[2][name].double() for weight, item in zip(weights, snapshots, strict=True))
        averages[name] = sum(parts).to(state[name].dtype)
    return state | averages
