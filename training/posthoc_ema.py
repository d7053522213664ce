"""Post-hoc EMA: averages of the weights of any width, made after the training (Karras et al., arXiv 2312.02696).

Training tracks two averages whose profiles are powers of the training time, and stores snapshots of them. An average of
any other width is a linear combination of the snapshots, whose profile fits the wanted one best (section 3.2, appendix
C). The width of a profile is its standard deviation relative to the training time, sigma_rel (section 3.1).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.files import atomic_write

# The widths that the paper tracks.
TRACKED_STDS = (0.05, 0.10)
# The width of gamma = 0, the plain mean of all weights, is 1 / sqrt(12) = 0.2887. Wider profiles are not used.
WIDEST = 0.28
# Of the fit of a profile, see `solve_weights`. With 10 evenly spaced snapshots, the residual is 8 % at a width of 0.03,
# 1 % at 0.075 and 5 % at 0.20; with 2 snapshots it is 5 % at 0.075 and 45 % at 0.20.
LARGEST_RESIDUAL = 0.1
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


def solve_weights(steps: list[int], stds: list[float], step: int, std: float) -> tuple[np.ndarray, float]:
    """Compute the combination of snapshots whose profile is nearest to a wanted one, in least squares (appendix C).

    The weights sum to 1, because the integral of every profile is 1. Without this condition, the combination of few
    snapshots is scaled: with 2 snapshots and a width of 0.20, a parameter that never changed is multiplied by 0.758.

    Args:
        steps: training step of each snapshot [n].
        stds: relative standard deviation of each snapshot's profile [n].
        step: training step of the wanted average.
        std: its relative standard deviation.

    Returns:
        The weight of each snapshot, float64 [n], and the residual of the fit: the L2 norm of the difference of the two
        profiles, relative to that of the wanted profile.
    """
    steps, gammas = np.array(steps), np.array([gamma_of_std(value) for value in stds])
    target = np.array([step]), np.array([gamma_of_std(std)])
    # The products of profiles on [0, step], times `step`, so that all numbers of the system have a similar size.
    matrix, rhs = (step * products(steps, gammas, *others) for others in ((steps, gammas), target))
    # The condition's Lagrange multiplier is one more unknown.
    system = np.pad(matrix, (0, 1), constant_values=1.0)
    system[-1, -1] = 0
    weights = np.linalg.solve(system, np.append(rhs[:, 0], 1.0))[:-1]
    norm = step * products(*target, *target).item()
    # Rounding can make the square of a perfect fit negative.
    square = max(0.0, weights @ matrix @ weights - 2 * weights @ rhs[:, 0] + norm)
    return weights, float(np.sqrt(square / norm))


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


class Fit(NamedTuple):
    """A combination of the snapshots of a run.

    Attributes:
        std: relative standard deviation of the wanted profile.
        snapshots: the average of each trained tensor by its name, for each snapshot [n]; mapped into memory.
        weights: the weight of each snapshot, float64 [n]. They sum to 1.
        residual: see `solve_weights`.
    """

    std: float
    snapshots: list[dict[str, Tensor]]
    weights: np.ndarray
    residual: float

    def __str__(self) -> str:
        averages = f"the combination of {len(self.snapshots)} tracked averages"
        return f"post-hoc EMA of width {self.std:g}: the profile of {averages} is off by {self.residual:.2%}"


def fit_snapshots(ckpt, std: float) -> Fit:
    """Find the combination of the snapshots of a run that is nearest to the EMA of a width.

    Args:
        ckpt: a checkpoint of the run, in its folder. The average is that after the step of this checkpoint.
        std: relative standard deviation of the average's profile.

    Raises:
        UserError: if the run has no snapshot at the step of the checkpoint, or if the residual of the fit is larger
            than `LARGEST_RESIDUAL`.
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
    tracked = [(value, float(text), file[text]) for value, file in zip(steps, files, strict=True) for text in file]
    steps, stds, snapshots = map(list, zip(*tracked, strict=True))
    fit = Fit(std, snapshots, *solve_weights(steps, stds, step, std))
    if fit.residual > LARGEST_RESIDUAL:
        tracked = " or ".join(f"{value:g}" for value in sorted(set(stds)))
        raise UserError(
            f"{folder}: {fit}, more than {LARGEST_RESIDUAL:.0%}: choose a width closer to {tracked}, or train with "
            "more --ema-snapshots"
        )
    return fit


def reconstruct(fit: Fit, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the EMA of a width from the snapshots of a run.

    Args:
        fit: the combination of the snapshots.
        state: a state dict of the model, which gives the tensors that are not trained.

    Returns:
        The state dict with the averages, in the dtypes of `state`.
    """
    averages = {}
    for name in fit.snapshots[0]:
        # Weights of both signs cancel each other.
        parts = (weight * item[name].double() for weight, item in zip(fit.weights, fit.snapshots, strict=True))
        averages[name] = sum(parts).to(state[name].dtype)
    return state | averages
