"""Noise schedules and the choice of timesteps, in float64."""

import math

import numpy as np


def beta_schedule(name: str, steps: int) -> np.ndarray:
    """Return the variances beta_t of the forward process, float64 [steps].

    "linear" is DDPM's (section 4), scaled to keep its end points when steps is not 1000; "squaredcos_cap_v2" is
    Improved DDPM's cosine (eq. 17), each beta capped at 0.999. Raises ValueError for another name.
    """
    if steps < 1:
        raise ValueError(f"a diffusion process needs at least one step, not {steps}")
    if name == "linear":
        return np.linspace(0.0001, 0.02, steps, dtype=np.float64) * (1000 / steps)
    if name == "squaredcos_cap_v2":
        alpha_bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(steps)], dtype=np.float64)
    raise ValueError(f"unknown noise schedule {name!r}: use linear or squaredcos_cap_v2")


def space_timesteps(num_timesteps: int, spacing: str | list[int]) -> list[int]:
    """Choose the timesteps, sorted, that a respaced process keeps.

    spacing: "ddimN" keeps every s-th step, s the whole stride that leaves exactly N; a list of counts (or "10,15,20")
    cuts the process into equal sections and keeps that many evenly spaced steps of each, both ends included.
    Raises ValueError where that cannot be done.
    """
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        count = _counts(spacing[len("ddim") :])[0]
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"no whole stride leaves {count} of {num_timesteps} timesteps")
    counts = _counts(spacing) if isinstance(spacing, str) else list(spacing)
    size, extra = divmod(num_timesteps, len(counts))
    start, chosen = 0, []
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} of the {length} timesteps of section {section + 1}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):  # a running sum, so that ties round as in the published code
            chosen.append(start + round(position))
            position += stride
        start += length
    return chosen


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected a number of steps, a list such as 10,15,20, or ddimN, got {text!r}") from None


def respace(betas: np.ndarray, timesteps: list[int]) -> np.ndarray:
    """The betas of the process that visits only `timesteps`: its cumulative products are the original's there."""
    alphas_cumprod = np.cumprod(1.0 - betas)[timesteps]
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
