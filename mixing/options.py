"""The options of a Remix, and their checks."""

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np

from diffusion.intervals import check_boundaries, equal_boundaries, exact, scale_of

MIXERS = ("softmax", "raw", "one-hot")
SCOPES = ("global", "local")
# The published bonus is 3. With 8, the bases of high noise learn from their own experts: see
# studies/results/fashion/README.md.
PRIOR_BONUS = 8.0


def complete_options(options: dict) -> dict:
    """Check the options of a Remix, and return them with the number of experts and the boundaries, if they are missing.

    Args:
        options: n_basis, n_experts, boundaries, mixer, scope, highest_level, rank and stages, as in `remix.Remix`.
            The result has no stages if they are None.

    Raises:
        ValueError: if one is out of range, unknown or no integer, or if the number of experts, the boundaries and the
            stages are missing.
    """
    options = dict(options)
    boundaries, stages = options["boundaries"], options.pop("stages")
    if options["n_experts"] is None:
        if boundaries is None and stages is None:
            raise ValueError("n_experts or boundaries must be given")
        options["n_experts"] = len(stages if boundaries is None else boundaries) - 1
    _check_values(options)
    n_experts, highest = options["n_experts"], options["highest_level"]
    if stages is not None:
        stages = _numbers(stages)
        check_boundaries(stages, len(stages) - 1, highest, "stages")
        if n_experts < len(stages) - 1:
            raise ValueError(f"each of {len(stages) - 1} stages needs an expert, but n_experts is {n_experts}")
    if boundaries is None:
        boundaries = equal_boundaries(n_experts, highest) if stages is None else divide_stages(stages, n_experts)
    boundaries = _numbers(boundaries)
    check_boundaries(boundaries, n_experts, highest)
    for level in stages or ():
        if level not in boundaries:
            known = ", ".join(map(exact, boundaries))
            raise ValueError(f"a stage ends at {exact(level)}, which is no boundary of the experts: {known}")
    return options | {"boundaries": boundaries} | ({} if stages is None else {"stages": stages})


def _check_values(options: dict):
    """Raise ValueError if an option of a Remix other than boundaries and stages is out of range or unknown."""
    for name in ("n_basis", "n_experts", "rank"):
        if not isinstance(options[name], Integral) and (name, options[name]) != ("rank", None):
            raise ValueError(f"{name} must be an integer, but it is {options[name]!r}")
    n_experts, highest = options["n_experts"], options["highest_level"]
    if options["n_basis"] < 1:
        raise ValueError(f"n_basis must be at least 1, but it is {options['n_basis']}")
    if not 0 < highest < math.inf:
        raise ValueError(f"highest_level must be a positive number, but it is {highest}")
    if n_experts < 1:
        raise ValueError(f"n_experts must be at least 1, but it is {n_experts}")
    if options["boundaries"] is None and scale_of([highest]).whole and highest < n_experts:
        raise ValueError(
            f"n_experts must be from 1 to highest_level={highest}, but it is {n_experts}; if the noise levels are no "
            "integers, give boundaries"
        )
    for name, known in (("mixer", MIXERS), ("scope", SCOPES)):
        if options[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, but it is {options[name]!r}")
    if options["rank"] is not None and options["rank"] < 1:
        raise ValueError(f"rank must be at least 1, but it is {options['rank']}")


def divide_stages(stages: list[float], n_experts: int) -> list[float]:
    """Return N + 1 boundaries of experts that divide each stage into equal intervals.

    Every stage gets one expert. Each further expert is added to the stage that then has the longest intervals, or to
    the first of them.

    Args:
        stages: the S + 1 boundaries of the stages.
        n_experts: number of experts N, at least S.
    """
    lengths, counts = np.diff(stages), np.ones(len(stages) - 1, int)
    for _ in range(n_experts - len(counts)):
        counts[(lengths / counts).argmax()] += 1
    whole = scale_of(stages).whole
    boundaries = []
    for low, length, count in zip(stages, lengths.tolist(), counts.tolist(), strict=False):
        inner = [low + i * length / count for i in range(1, count)]
        boundaries += [low, *(map(math.floor, inner) if whole else inner)]
    return [*boundaries, stages[-1]]


def _numbers(values: Sequence[float]) -> list[float]:
    """Return values as Python numbers, also those of arrays."""
    return [value if isinstance(value, int) else float(value) for value in values]
