"""Scales of noise levels, and the intervals of noise levels that experts own."""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from runtime.errors import warn

from .interpolants import TimeDistribution

# Number of timesteps of the default process, which is that of the published models.
TIMESTEPS = 1000
# How far float32 noise levels can be from the exact ones, relative to the highest level.
ROUNDING = 2.0**-20
# The types of numbers that noise levels arrive as, after those in `level_dtype`.
LEVEL_DTYPES = (torch.long, torch.float32, torch.bfloat16, torch.float16)
# Whether noise levels are computed from times that decrease with the noise: see `inner_boundaries`.
DIRECT, REVERSED, EITHER = (False,), (True,), (False, True)


@dataclass(frozen=True)
class NoiseScale:
    """The numbers that stand for noise levels, from 0 (data) to `highest` (noise), and the times that a network sees.

    A network of Gaussian diffusion sees the noise level itself, the timestep t. A network of flow matching sees the
    time t = 1 - u of the noise level u. Another highest level that is no whole number is that of a network which sees
    the noise level itself.

    Attributes:
        highest: the highest noise level: the number of timesteps T, 1 for flows, or a number that is not whole.
        unit: what a noise level is called in texts.
        symbol: letter of the noise level in tables.
        columns: names of an interval's two ends in tables.
        whole: whether noise levels are whole numbers, so that the largest that occurs is T - 1.
        reverses: whether the network sees 1 minus the noise level.
    """

    highest: float
    unit: str
    symbol: str
    columns: tuple[str, str]
    whole: bool
    reverses: bool = False

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
        return 1 - t if self.reverses else t

    def time(self, level: np.ndarray) -> np.ndarray:
        """Return the network's times of noise levels."""
        return 1 - level if self.reverses else level

    def equal_boundaries(self, n: int) -> list[float]:
        """Return the n + 1 boundaries of n equal intervals: floor(i T / n) for timesteps, i / n for flows."""
        return [i * self.highest // n if self.whole else i / n * self.highest for i in range(n + 1)]

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
            rounded = levels if self.whole else levels.astype(np.float32)
            inside = [find_interval([0, low, high, self.highest], level) == 1 for level in rounded]
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
    reverses=True,
)


def timestep_scale(timesteps: float) -> NoiseScale:
    """Return the scale of a number of timesteps T."""
    columns = ("first_timestep", "last_timestep")
    return NoiseScale(timesteps, "timestep", "t", columns, whole=True)


def scale_of(boundaries: Sequence[float]) -> NoiseScale:
    """Return the scale of boundaries, the last of which is its highest noise level: 1 for a flow."""
    highest = boundaries[-1]
    if highest == 1:
        return FLOW_LEVELS
    if highest == math.floor(highest):
        return timestep_scale(highest)
    return NoiseScale(highest, FLOW_LEVELS.unit, FLOW_LEVELS.symbol, FLOW_LEVELS.columns, whole=False)


def equal_boundaries(n_experts: int, highest: float) -> list[float]:
    """Return the N + 1 boundaries of equal intervals of levels from 0 to `highest`; see `NoiseScale`."""
    return scale_of([0, highest]).equal_boundaries(n_experts)


def check_boundaries(boundaries: Sequence[float], n_experts: int, highest: float, name: str = "boundaries"):
    """Check the boundaries between experts, or others, whose name is for the messages.

    Raises:
        ValueError: unless they are `n_experts` + 1 increasing numbers from 0 to `highest`.
    """
    if len(boundaries) != n_experts + 1:
        raise ValueError(f"{n_experts} experts need {n_experts + 1} boundaries, but there are {len(boundaries)}")
    if boundaries[0] != 0 or boundaries[-1] != highest:
        raise ValueError(
            f"{name} must run from 0 to {exact(highest)}, but they run from {exact(boundaries[0])} to "
            f"{exact(boundaries[-1])}"
        )
    if any(not low < high for low, high in pairwise(boundaries)):
        raise ValueError(f"{name} must increase, but they are {', '.join(map(exact, boundaries))}")


def exact(number: float) -> str:
    """Return a number as the shortest text that no other number of its type has."""
    return str(number).removesuffix(".0")


def level_dtype(level: Tensor | float) -> torch.dtype:
    """Return which of `LEVEL_DTYPES` decides how noise levels or times, a tensor or a number, are rounded.

    Raises:
        TypeError: if they have another floating-point type of less than 32 bits.
    """
    if not isinstance(level, Tensor):
        dtype = np.asarray(level).dtype
        return torch.long if dtype.kind in "biu" else torch.float16 if dtype.itemsize == 2 else torch.float32
    dtype = level.dtype if level.is_floating_point() else torch.long
    dtype = torch.float32 if dtype == torch.float64 else dtype
    if dtype not in LEVEL_DTYPES:
        raise TypeError(f"noise levels must be integers or floats of at least 16 bits, but they are {dtype}")
    return dtype


def rounded_levels(
    boundaries: Sequence[float], dtype: torch.dtype, directions: tuple[bool, ...], error: float
) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest number that steps on boundaries can arrive as, float64 [N + 1] each.

    In reduced precision, a step is rounded to the nearest number of its type. It may be rounded twice: FluxPipeline
    rounds a timestep from 0 to 1000, and rounds its thousandth again.

    Args:
        boundaries: the N + 1 boundaries.
        dtype: floating-point type of the noise levels.
        directions: see `inner_boundaries`.
        error: error of the float32 numbers that are rounded, relative to the highest level.
    """
    levels = torch.tensor(boundaries, dtype=torch.float64, device="cpu")
    highest = levels[-1].item()
    found = [levels - error * highest, levels + error * highest]
    # Float32 levels are within the error, however often they are rounded.
    for reverse in directions if dtype.itemsize < 4 or not error else ():
        parts = (highest - levels if reverse else levels) / highest
        for unit in (1, TIMESTEPS, highest):
            for shift in (-error, error):
                first = ((parts + shift) * unit).float().to(dtype).double() / unit
                second = ((first + shift) * highest).float().to(dtype).double()
                found.append(highest - second if reverse else second)
    found = torch.stack(found)
    return found.amin(0), found.amax(0)


def inner_boundaries(
    boundaries: Sequence[float],
    dtype: torch.dtype | None = None,
    directions: tuple[bool, ...] = DIRECT,
    unrounded: Sequence[float] = (),
) -> list[float]:
    """Return the N - 1 boundaries between experts, lowered for comparison with noise levels of a type.

    Noise levels are rounded, and many samplers take steps on boundaries, such as 0.15. With lowered boundaries, these
    steps belong to the expert above. Integers are exact. Training keeps twice the distance of float32 levels from every
    boundary (`diffusion.samplers.MARGIN`).

    Args:
        boundaries: N + 1 increasing noise levels from 0.
        dtype: one of `LEVEL_DTYPES`, in which the noise levels arrive. None: the type of times of the scale.
        directions: whether the noise levels are the highest level minus rounded times (`REVERSED`), are rounded
            themselves (`DIRECT`), or may be either (`EITHER`).
        unrounded: boundaries that are not lowered: levels of all types are compared with them as they are.
    """
    dtype = dtype or scale_of(boundaries).dtype
    return list(_inner_boundaries(tuple(boundaries), dtype, directions, tuple(unrounded))[0])


@functools.lru_cache
def _inner_boundaries(
    boundaries: tuple[float, ...], dtype: torch.dtype, directions: tuple[bool, ...], unrounded: tuple[float, ...]
) -> tuple[list[float], bool]:
    """Return the result of `inner_boundaries`, and whether it separates all steps on boundaries."""
    if not dtype.is_floating_point or len(boundaries) < 3:
        return list(boundaries[1:-1]), True
    low, high = rounded_levels(boundaries, dtype, directions, ROUNDING)
    levels = torch.tensor(boundaries, dtype=torch.float64, device="cpu")
    # Not below the middle of the interval, so that short intervals keep the levels at their beginning.
    low = torch.where(torch.tensor([level in unrounded for level in boundaries], device="cpu"), levels, low)
    inner = torch.maximum(low, (levels + levels.roll(1)) / 2)[1:-1]
    separates = torch.equal(inner, low[1:-1]) and bool((high[1:-2] < inner[1:]).all())
    return inner.tolist(), separates


def separates_steps(
    boundaries: Sequence[float],
    dtype: torch.dtype,
    directions: tuple[bool, ...] = DIRECT,
    unrounded: Sequence[float] = (),
) -> bool:
    """Return whether all steps on boundaries run the expert above; see `inner_boundaries` for the arguments."""
    return _inner_boundaries(tuple(boundaries), dtype, directions, tuple(unrounded))[1]


@functools.lru_cache
def warn_of_short_intervals(dtype: torch.dtype):
    """Print once that some intervals are too short for a type of noise levels."""
    name = str(dtype).removeprefix("torch.")
    warn(
        f"some intervals of experts are too short for the spacing of {name} noise levels, so that a step on a boundary "
        "can run a neighbouring expert: use float32 noise levels or fewer experts"
    )


def check_levels(
    boundaries: Sequence[float],
    low: float,
    high: float,
    dtype: torch.dtype = torch.float32,
    directions: tuple[bool, ...] = DIRECT,
):
    """Check that the noise levels from `low` to `high` have experts. The ends may be rounded outwards.

    Raises:
        ValueError: if they are outside the boundaries or not numbers.
    """
    first, last = boundaries[0], boundaries[-1]
    if first <= low <= high <= last:
        return
    lowest, highest = first, last
    if dtype.is_floating_point:
        ends = rounded_levels((first, last), dtype, directions, 0)
        lowest, highest = ends[0][0].item(), ends[1][1].item()
    if not lowest <= low <= high <= highest:
        low, high = exact(np.float32(low)), exact(np.float32(high))
        raise ValueError(
            f"noise levels must be from {exact(first)} to {exact(last)}, but they are from {low} to {high}"
        )


def find_interval(
    boundaries: Sequence[float],
    level: Tensor | float,
    dtype: torch.dtype | None = None,
    directions: tuple[bool, ...] = DIRECT,
    unrounded: Sequence[float] = (),
) -> int:
    """Return the index of the interval between boundaries that a noise level belongs to.

    The numbers are rounded to float32 as in tensors, so that host and device find the same expert.

    Args:
        boundaries: increasing noise levels from 0.
        level: the noise level, a number or a tensor [].
        dtype: the type in which the level or the time has arrived; see `inner_boundaries`. None: that of `level`.
        directions, unrounded: see `inner_boundaries`.

    Raises:
        ValueError: if the level is outside the boundaries.
    """
    dtype, boundaries = dtype or level_dtype(level), tuple(boundaries)
    level = np.float32(float(level))
    check_levels(boundaries, float(level), float(level), dtype, directions)
    inner, separates = _inner_boundaries(boundaries, dtype, directions, tuple(unrounded))
    if not separates:
        warn_of_short_intervals(dtype)
    return bisect.bisect_right(inner, level, key=np.float32)


def find_time(boundaries: Sequence[float], t: float, dtype: torch.dtype | None = None) -> int:
    """Return the index of the interval between boundaries that a network's time belongs to. See `find_interval`."""
    scale = scale_of(boundaries)
    return find_interval(boundaries, scale.level(t), dtype or level_dtype(t), (scale.reverses,))


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


def sample_levels(
    boundaries: Sequence[float],
    n: int,
    shift: float = 1.0,
    share: str | Sequence[float] = "equal",
    groups: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw noise levels for training the experts of a flow.

    The levels of each expert follow the distribution of training, restricted to its interval: u uniform in [0, 1],
    moved to s u / (1 + (s - 1) u) by the shift s (arXiv 2403.03206, eq. 23), times the highest level. The boundaries
    are levels after the shift.

    Args:
        boundaries: the N + 1 boundaries between experts, from 0 to the highest level; or the Remix.
        n: number of noise levels.
        shift: the shift s > 0, such as 12 for text to video of Wan 2.2 and 5 for image to video.
        share: each expert's share of the levels: "equal"; "drawn", which keeps the distribution of training as a whole;
            or N numbers in proportion to the shares. An expert gets n times its share, rounded up or down at random.
        groups: draw this many equal contiguous groups of levels, each for one expert, as the `groups` of `remix.Remix`
            promises. It must divide n. With equal shares and a multiple of N levels, the levels are N such groups
            without it.
        generator: the generator of the random numbers, on the CPU. None: that of PyTorch.

    Returns:
        The noise levels, float32 [n] on the CPU, those of expert 0 first. A model that takes the time of the data gets
        the highest level minus them.

    Raises:
        ValueError: if an argument is out of range.
    """
    boundaries = getattr(boundaries, "boundaries", boundaries)
    check_boundaries(boundaries, max(len(boundaries) - 1, 1), boundaries[-1])
    if not 0 < shift < math.inf:
        raise ValueError(f"the shift must be a positive number, but it is {shift}")
    parts = n if groups is None else groups
    if not all(isinstance(number, Integral) and number > 0 for number in (n, parts)) or n % parts:
        raise ValueError(
            f"the number of levels must be a positive integer and a multiple of groups={groups}, but it is {n}"
        )
    # Relative to the highest level.
    ends = np.array(boundaries, dtype=np.float64) / boundaries[-1]
    times = TimeDistribution("uniform", 0.0, 1.0, float(shift))
    low, high = times.cdf(ends[:-1]), times.cdf(ends[1:])  # [N]
    shares = _expert_shares(share, high - low)

    # Expert i owns the part of a line of this length in proportion to its share. The line is cut at regular distances,
    # from a random start.
    line = shares.cumsum() / shares.sum() * parts
    line = np.where(np.abs(line - line.round()) < 1e-9 * parts, line.round(), line)
    # In float32, so that no sum of it and an integer is rounded up to the next one.
    start = torch.rand((), generator=generator, dtype=torch.float32, device="cpu").item()
    experts = np.searchsorted(line, np.arange(parts) + start, side="right").repeat(n // parts)  # [n]

    uniform = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu").numpy()
    levels = times.quantile(low[experts] + (high - low)[experts] * uniform)
    # As in the training of flows, rounding leaves a level in the interval of its expert.
    margin = np.minimum(2 * ROUNDING, np.diff(ends) / 4)[experts]
    levels = np.clip(levels, ends[:-1][experts] + margin, ends[1:][experts] - margin)
    return torch.from_numpy(levels * boundaries[-1]).float()


def _expert_shares(share: str | Sequence[float], drawn: np.ndarray) -> np.ndarray:
    """Return numbers [N] in proportion to the experts' shares of the levels; see `sample_levels`.

    Args:
        share: see `sample_levels`.
        drawn: probability of each expert's interval in training [N].

    Raises:
        ValueError: if they are no shares.
    """
    if isinstance(share, str):
        known = {"equal": np.ones_like(drawn), "drawn": drawn}
        if share not in known:
            raise ValueError(f"share must be {', '.join(known)} or {len(drawn)} numbers, but it is {share!r}")
        return known[share]
    shares = np.asarray(share, dtype=np.float64)
    if shares.shape != drawn.shape or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() == 0:
        raise ValueError(f"share must be {len(drawn)} numbers of at least 0, not all of them 0, but it is {share}")
    return shares
