"""Scales of noise levels, and the intervals of noise levels that experts own."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Number of timesteps of the default process, which is that of the published models.
TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseScale:
    """The numbers that stand for noise levels, from 0 (data) to `highest` (noise), and the times that a network sees.

    A network of Gaussian diffusion sees the noise level itself, the timestep t. A network of flow matching sees the
    time t = 1 - u of the noise level u.

    Attributes:
        highest: the highest noise level: the number of timesteps T, or 1 for flows.
        unit: what a noise level is called in texts.
        symbol: letter of the noise level in tables.
        columns: names of an interval's two ends in tables.
        whole: whether noise levels are whole numbers, so that the largest that occurs is T - 1.
        margin: how far inner boundaries are lowered. The noise level of a flow is rounded, and many samplers take steps
            on boundaries, such as 0.15. With lowered boundaries, these steps belong to the expert above. Training keeps
            twice this distance from every boundary (`diffusion.samplers.MARGIN`).
    """

    highest: float
    unit: str
    symbol: str
    columns: tuple[str, str]
    whole: bool
    margin: float

    @property
    def range(self) -> list[float]:
        """The lowest and the highest noise level."""
        return [0, self.highest]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of times."""
        return torch.long if self.whole else torch.float32

    def level(self, t: Tensor | float) -> Tensor | np.float32:
        """Return the noise level of the network's times t, a tensor or a number, in float32."""
        t = t.float() if isinstance(t, Tensor) else np.float32(t)
        return t if self.whole else 1 - t

    def time(self, level: np.ndarray) -> np.ndarray:
        """Return the network's times of noise levels."""
        return level if self.whole else 1 - level

    def equal_boundaries(self, n: int) -> list[float]:
        """Return the n + 1 boundaries of n equal intervals: floor(i T / n) for timesteps, i / n for flows."""
        return [i * self.highest // n if self.whole else i / n for i in range(n + 1)]

    def interval(self, low: float, high: float) -> tuple[float, float]:
        """Return the noise levels between two boundaries as (low, high): those from low to below high."""
        # Rounded as in tensors, which hold the boundaries in float32.
        return (math.ceil(np.float32(low)), math.ceil(np.float32(high))) if self.whole else (low, high)

    def ends(self, low: float, high: float) -> tuple[float, float]:
        """Return the lowest and the highest noise level between two boundaries."""
        low, high = self.interval(low, high)
        return low, high - 1 if self.whole else high

    def times_between(self, low: float, high: float, n: int) -> np.ndarray:
        """Return n times [n] whose noise levels are evenly spaced between two boundaries."""
        low, high = self.ends(low, high)
        if self.whole:
            return np.linspace(low, high, n).round().astype(int)
        return self.time(low + (high - low) * ((np.arange(n) + 0.5) / n))

    def grid(self, n: int, interval: Sequence[float] | None = None) -> np.ndarray:
        """Return a fixed grid of times at which all models are measured. It does not depend on the model.

        Args:
            n: number of equal parts of the whole range, whose midpoints are the noise levels.
            interval: lowest and highest noise level of an expert that is measured alone; None for the whole range.

        Returns:
            The times in increasing noise, int64 or float64. With an interval only those in it, or its middle if there
            are none.
        """
        levels = (np.arange(n) + 0.5) * self.highest / n
        if self.whole:
            levels = levels.astype(np.int64)
        if interval is not None:
            low, high = interval
            # The rule by which experts own noise levels.
            inside = [find_interval([0, low, high, self.highest], level) == 1 for level in levels.astype(np.float32)]
            middle = (math.ceil(low) + math.ceil(high) - 1) // 2 if self.whole else (low + high) / 2
            levels = levels[inside] if any(inside) else np.array([middle])
        return self.time(levels)

    def describe(self, times: np.ndarray) -> str:
        """Return the range of the noise levels of some times as text."""
        levels = self.time(times)
        form = "d" if self.whole else ".4f"
        return f"{self.unit}s {levels.min():{form}} to {levels.max():{form}}"


FLOW_LEVELS = NoiseScale(
    highest=1,
    unit="noise level",
    symbol="u",
    columns=("lowest_noise_level", "highest_noise_level"),
    whole=False,
    margin=2.0**-20,
)


def timestep_scale(timesteps: float) -> NoiseScale:
    """Return the scale of a number of timesteps T."""
    columns = ("first_timestep", "last_timestep")
    return NoiseScale(timesteps, "timestep", "t", columns, whole=True, margin=0)


def scale_of(boundaries: Sequence[float]) -> NoiseScale:
    """Return the scale of boundaries, the last of which is its highest noise level: 1 for a flow."""
    return FLOW_LEVELS if boundaries[-1] == 1 else timestep_scale(boundaries[-1])


def equal_boundaries(n_experts: int, highest: float) -> list[float]:
    """Return the N + 1 boundaries of equal intervals: floor(i T / N) for T = `highest` timesteps, i / N for T = 1."""
    return scale_of([0, highest]).equal_boundaries(n_experts)


def check_boundaries(boundaries: Sequence[float], n_experts: int, highest: float):
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


def inner_boundaries(boundaries: Sequence[float]) -> list[float]:
    """Return the N - 1 boundaries between experts, lowered by the margin of their scale, for comparison with levels."""
    margin = scale_of(boundaries).margin
    return [boundary - margin for boundary in boundaries[1:-1]]


def check_levels(boundaries: Sequence[float], low: float, high: float):
    """Check that the noise levels from `low` to `high` have experts.

    Raises:
        ValueError: if they are outside the boundaries or not numbers.
    """
    first, last = boundaries[0], boundaries[-1]
    if not first <= low <= high <= last:
        raise ValueError(f"noise levels must be from {first:g} to {last:g}, but they are from {low:g} to {high:g}")


def find_interval(boundaries: Sequence[float], level: float) -> int:
    """Return the index of the interval between boundaries that a noise level belongs to.

    The numbers are rounded to float32 as in tensors, so that host and device find the same expert.

    Raises:
        ValueError: if the level is outside the boundaries.
    """
    check_levels(boundaries, level, level)
    inner = [np.float32(boundary) for boundary in inner_boundaries(boundaries)]
    return bisect.bisect_right(inner, np.float32(level))


def find_time(boundaries: Sequence[float], t: float) -> int:
    """Return the index of the interval between boundaries that a network's time belongs to. See `find_interval`."""
    return find_interval(boundaries, scale_of(boundaries).level(t))


def intervals(boundaries: Sequence[float]) -> list[tuple[float, float]]:
    """Return the noise levels of each expert as (low, high): the timesteps from low to high - 1, or those of a flow."""
    scale = scale_of(boundaries)
    return [scale.interval(low, high) for low, high in pairwise(boundaries)]


def interval_labels(boundaries: Sequence[float], separator: str = "-") -> list[str]:
    """Return the lowest and the highest noise level of each expert as text."""
    scale = scale_of(boundaries)
    ends = [scale.ends(low, high) for low, high in pairwise(boundaries)]
    form = "d" if scale.whole else ".3g"
    return [f"{low:{form}}{separator}{high:{form}}" for low, high in ends]
