"""Boundaries between the noise levels of neighbouring experts."""

import bisect
import math
from itertools import pairwise

import numpy as np
from torch import Tensor


def equal_boundaries(n_experts: int, highest: int) -> list[float]:
    """Return the N + 1 boundaries of equal intervals: floor(i T / N) for T = `highest` timesteps, i / N for T = 1."""
    return [i / n_experts if highest == 1 else i * highest // n_experts for i in range(n_experts + 1)]


def check_boundaries(boundaries: list[float], n_experts: int, highest: float):
    """Check the boundaries between experts.

    Raises:
        ValueError: unless they are `n_experts` + 1 increasing numbers from 0 to `highest`.
    """
    if len(boundaries) != n_experts + 1:
        raise ValueError(f"{n_experts} experts need {n_experts + 1} boundaries, but there are {len(boundaries)}")
    if boundaries[0] != 0 or boundaries[-1] != highest:
        raise ValueError(
            f"boundaries must run from 0 to {highest:g}, but they run from {boundaries[0]:g} to {boundaries[-1]:g}"
        )
    if any(low >= high for low, high in pairwise(boundaries)):
        raise ValueError(f"boundaries must increase, but they are {', '.join(f'{b:g}' for b in boundaries)}")


def inner_boundaries(boundaries: list[float]) -> list[float]:
    """Return the N - 1 boundaries between experts, for comparison with rounded noise levels.

    A flow's noise level is rounded, and many samplers take steps on boundaries, such as 0.15. The boundaries of flows
    are therefore lowered by 2^-20, so that these steps belong to the expert above. Training keeps twice this distance
    from every boundary (`diffusion.flow.MARGIN`).
    """
    return [boundary - (2.0**-20 if boundaries[-1] == 1 else 0) for boundary in boundaries[1:-1]]


def noise_level(boundaries: list[float], t: Tensor | float) -> Tensor | np.float32:
    """Return the noise level of the times t that a DiT sees, a tensor or a number, in float32.

    For Gaussian diffusion it is the timestep t. For flow matching, whose boundaries end at 1, it is 1 - t.
    """
    t = t.float() if isinstance(t, Tensor) else np.float32(t)
    return 1 - t if boundaries[-1] == 1 else t


def check_levels(boundaries: list[float], low: float, high: float):
    """Check that the noise levels from `low` to `high` have experts.

    Raises:
        ValueError: if they are outside the boundaries or not numbers.
    """
    first, last = boundaries[0], boundaries[-1]
    if not first <= low <= high <= last:
        raise ValueError(f"noise levels must be from {first:g} to {last:g}, but they are from {low:g} to {high:g}")


def find_interval(boundaries: list[float], level: float) -> int:
    """Return the index of the interval between boundaries that a noise level belongs to.

    The numbers are rounded to float32 as in tensors, so that host and device find the same expert.

    Raises:
        ValueError: if the level is outside the boundaries.
    """
    check_levels(boundaries, level, level)
    inner = [np.float32(boundary) for boundary in inner_boundaries(boundaries)]
    return bisect.bisect_right(inner, np.float32(level))


def is_flow(model) -> bool:
    """Return whether the noise levels of a model are those of a flow, from 0 to 1, and not timesteps."""
    return model.boundaries[-1] == 1


def intervals(model) -> list[tuple[float, float]]:
    """Return the noise levels of each expert as (low, high): the timesteps from low to high - 1, or those of a flow."""
    if is_flow(model):
        return list(pairwise(model.boundaries))
    # As in tensors, which hold the boundaries in float32.
    return list(pairwise(math.ceil(np.float32(boundary)) for boundary in model.boundaries))


def interval_labels(model, separator: str = "-") -> list[str]:
    """Return the lowest and the highest noise level of each expert as text."""
    if is_flow(model):
        return [f"{low:.3g}{separator}{high:.3g}" for low, high in intervals(model)]
    return [f"{low}{separator}{high - 1}" for low, high in intervals(model)]
