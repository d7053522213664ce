"""The options of a Remix, and their checks."""

import math
from numbers import Integral

from diffusion.intervals import check_boundaries, equal_boundaries, scale_of

MIXERS = ("softmax", "raw", "one-hot")
SCOPES = ("global", "local")
RESTS = ("shared", "separate")
# The published bonus is 3. With 8, the bases of high noise learn from their own experts: see
# studies/results/fashion/README.md.
PRIOR_BONUS = 8.0


def complete_options(options: dict) -> dict:
    """Check the options of a Remix, and return them with the number of experts and the boundaries, if they are missing.

    Args:
        options: n_basis, n_experts, boundaries, mixer, scope, highest_level, rank and rest, as in `remix.Remix`.

    Raises:
        ValueError: if one is out of range, unknown or no integer, or if both the number of experts and the boundaries
            are missing.
    """
    boundaries = options["boundaries"]
    if options["n_experts"] is None:
        if boundaries is None:
            raise ValueError("n_experts or boundaries must be given")
        options = options | {"n_experts": len(boundaries) - 1}
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
    if boundaries is None and scale_of([highest]).whole and highest < n_experts:
        raise ValueError(
            f"n_experts must be from 1 to highest_level={highest}, but it is {n_experts}; if the noise levels are no "
            "integers, give boundaries"
        )
    for name, known in (("mixer", MIXERS), ("scope", SCOPES), ("rest", RESTS)):
        if options[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, but it is {options[name]!r}")
    if options["rank"] is not None and options["rank"] < 1:
        raise ValueError(f"rank must be at least 1, but it is {options['rank']}")
    if boundaries is None:
        boundaries = equal_boundaries(n_experts, highest)
    check_boundaries(boundaries, n_experts, highest)
    # As Python numbers, also from arrays.
    return options | {"boundaries": [b if isinstance(b, int) else float(b) for b in boundaries]}
