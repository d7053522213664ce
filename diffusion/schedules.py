"""Noise schedules and the choice of the timesteps to sample with, computed in float64."""

import math

import numpy as np

from .intervals import TIMESTEPS


def beta_schedule(name: str, steps: int) -> np.ndarray:
    """Return the variances beta_t of the steps of the forward process.

    Args:
        name: "linear" (DDPM, arXiv 2006.11239, section 4, scaled by 1000 / steps) or "squaredcos_cap_v2" (the cosine
            schedule of Improved DDPM, arXiv 2102.09672, eq. 17, with each beta at most 0.999).
        steps: number of timesteps.

    Returns:
        Variances, float64 [steps].

    Raises:
        ValueError: if the name is unknown or `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"the number of diffusion steps must be at least 1, but it is {steps}")
    if name == "linear":
        return np.linspace(0.0001, 0.02, steps, dtype=np.float64) * (TIMESTEPS / steps)
    if name == "squaredcos_cap_v2":
        alpha_bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(steps)], dtype=np.float64)
    raise ValueError(f"unknown noise schedule {name!r}: it must be linear or squaredcos_cap_v2")


def space_timesteps(num_timesteps: int, spacing: str | list[int]) -> list[int]:
    """Choose the timesteps that a respaced process keeps.

    Args:
        num_timesteps: number of timesteps of the original process.
        spacing: "ddimN" keeps every s-th timestep, with the integer stride s that leaves exactly N of them. A list of
            counts, or a string such as "10,15,20", divides the process into equally long sections and keeps that many
            evenly spaced timesteps of each section, including its first and last.

    Returns:
        Timesteps of the original process, ascending.

    Raises:
        ValueError: if the spacing cannot be read, or a section is shorter than its count, or no stride leaves N.
    """
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        count = _parse_counts(spacing.removeprefix("ddim"))[0]
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"no integer stride leaves exactly {count} of {num_timesteps} timesteps")
    counts = _parse_counts(spacing) if isinstance(spacing, str) else list(spacing)
    size, extra = divmod(num_timesteps, len(counts))
    start = 0
    chosen = []
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"cannot keep {count} timesteps of section {section + 1}: the number must be from 1 to {length}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # A running sum rounds as the published code does. A product would round some timesteps differently.
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride
        start += length
    return chosen


def _parse_counts(text: str) -> list[int]:
    """Parse comma-separated integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"the timesteps must be given as a number, a list such as 10,15,20, or ddimN, but got {text!r}"
        ) from None


def respace(betas: np.ndarray, timesteps: list[int]) -> np.ndarray:
    """Return the variances of the process that visits only some of the timesteps.

    Its cumulative products of 1 - beta equal those of the original process at these timesteps (Improved DDPM, arXiv
    2102.09672, section 4).

    Args:
        betas: variances of the original process, float64 [T].
        timesteps: timesteps to keep [S], ascending.

    Returns:
        Variances, float64 [S].
    """
    alphas_cumprod = np.cumprod(1.0 - betas)[timesteps]
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
