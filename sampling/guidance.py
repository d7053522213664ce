"""Guidance in sampling: its scale at each noise level, and the denoiser that a sampler calls.

Classifier-free guidance (arXiv 2207.12598), guidance in an interval of noise levels (arXiv 2404.07724), and
autoguidance, in which a weaker model takes the place of the model without a class (arXiv 2406.02507).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffusion.intervals import ROUNDING, find_time
from diffusion.samplers import time_tensor
from models import DiT, classifier_free_guidance, default_guided_channels
from sampling.experts import ExpertSwitch


@dataclass(frozen=True)
class GuidanceSchedule:
    """A guidance scale for each interval of noise levels.

    Attributes:
        boundaries: n + 1 increasing noise levels, from 0 to the highest one of the process. Interval i holds the levels
            with boundaries[i] <= level < boundaries[i + 1], the last interval also the highest level.
        scales: scale in each interval [n]; 1 for no guidance.
    """

    boundaries: list[float]
    scales: list[float]

    @property
    def guides(self) -> bool:
        """Whether there is guidance at any noise level."""
        return any(scale != 1 for scale in self.scales)

    def scale_at(self, t: float) -> float:
        """Return the scale at a time that the network sees: a timestep of the original process, or a flow's time."""
        return self.scales[find_time(self.boundaries, t)]


def make_schedule(
    scale: float | str, interval: list[float] | None, highest: float, closed: bool = False
) -> GuidanceSchedule:
    """Build a guidance schedule.

    Args:
        scale: a scale for all noise levels, or text as in `parse_pieces`. Levels that the text leaves out are unguided.
        interval: lowest and highest noise level with guidance; None for all levels.
        highest: highest noise level of the process.
        closed: whether `interval` holds its highest level, too.

    Raises:
        ValueError: if the intervals overlap, or are not increasing numbers from 0 to `highest`.
    """
    pieces = parse_pieces(scale) if isinstance(scale, str) else [(scale, 0, highest)]
    low, high = interval or (0, highest)
    if not 0 <= low < high <= highest:
        raise ValueError(f"{low:g} to {high:g} is not an interval of the noise levels from 0 to {highest}")
    if closed:
        # Noise levels are rounded. Boundaries are compared as lower ones, by up to ROUNDING.
        high = min(high + 2 * ROUNDING * highest, highest)
    boundaries, scales, end = [0], [], 0
    for value, start, stop in sorted(pieces, key=lambda piece: piece[1]):
        if not end <= start < stop <= highest:
            raise ValueError(
                f"{start:g}:{stop:g} is not an interval of the levels from 0 to {highest}, or overlaps another one"
            )
        end = stop
        start, stop = max(start, low), min(stop, high)
        if start >= stop:
            continue
        if start > boundaries[-1]:
            boundaries.append(start)
            scales.append(1.0)
        boundaries.append(stop)
        scales.append(value)
    if boundaries[-1] < highest:
        boundaries.append(highest)
        scales.append(1.0)
    return GuidanceSchedule(boundaries, scales)


def parse_pieces(text: str) -> list[tuple[float, float, float]]:
    """Parse scales with their intervals of noise levels, such as "1.0@0:200,2.0@200:1000".

    Returns:
        The scale, the lowest and the highest noise level of each interval.

    Raises:
        ValueError: if the text has another form, or a number is negative or not finite.
    """
    pieces = []
    for part in text.split(","):
        scale, _, interval = part.partition("@")
        low, _, high = interval.partition(":")
        pieces.append((float(scale), float(low), float(high)))
        if not all(0 <= value < float("inf") for value in pieces[-1]):
            raise ValueError(f"{part}: the numbers must be finite and at least 0")
    return pieces


def predict(network: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Call the network; as a function, so that torch.compile compiles it once for all experts."""
    return network(x, t, y)


class GuidedDenoiser:
    """The denoiser that a sampler calls, see `diffusion.samplers`.

    Its output is guide + scale (model - guide), in which the guide is the model without a class (arXiv 2207.12598, eq.
    6), or another model with the same class (arXiv 2406.02507, eq. 3). At noise levels with scale 1, only the model
    runs, on the batch with its classes.

    Args:
        model: the network, or the switch between several experts.
        labels: classes [B], int64.
        null_label: label that stands for no class.
        schedule: guidance scale at each noise level.
        guide: the weaker model of autoguidance. None for classifier-free guidance.
        channels: number of leading channels that are guided. None for `models.default_guided_channels`.
        run: `predict`, or its compiled form.
    """

    def __init__(
        self,
        model: DiT | ExpertSwitch,
        labels: Tensor,
        null_label: int,
        schedule: GuidanceSchedule,
        guide: DiT | ExpertSwitch | None = None,
        channels: int | None = None,
        *,
        run: Callable[[DiT, Tensor, Tensor, Tensor], Tensor] = predict,
    ):
        self.model = model
        self.labels = labels
        self.both_labels = torch.cat([labels, torch.full_like(labels, null_label)])  # [2B]
        self.schedule = schedule
        self.guide = guide
        self.channels = channels
        self.run = run

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """Denoise a batch at one time: a timestep of the original process, or a flow's time.

        Args:
            x: noisy images or latents [B, C, H, W].
            time: the time, a number in host memory.

        Returns:
            Output [B, C or 2C, H, W].
        """
        t = time_tensor(x, time)  # [B]
        scale = self.schedule.scale_at(time)
        network = partial(self.run, at_time(self.model, time))
        if scale == 1:
            return network(x, t, self.labels)
        if self.guide is not None:
            out = network(x, t, self.labels)
            weak = self.run(at_time(self.guide, time), x, t, self.labels)
            channels = min(self.channels or default_guided_channels(x.shape[1]), x.shape[1])
            return autoguidance(out, weak, scale, channels)
        # [B, ...] -> [2B, ...]: with the class, and without.
        x_both, t_both = torch.cat([x, x]), torch.cat([t, t])
        out = classifier_free_guidance(network, x_both, t_both, self.both_labels, scale, self.channels)
        return out[: len(x)]


def at_time(model: DiT | ExpertSwitch, time: float) -> DiT:
    """Return the network of a time: the model itself, or one of its experts."""
    return model.for_timestep(time) if isinstance(model, ExpertSwitch) else model


def autoguidance(out: Tensor, weak: Tensor, scale: float, guided_channels: int) -> Tensor:
    """Guide the output of a model with that of a weaker one (Karras et al., arXiv 2406.02507, eq. 3).

    Args:
        out: output of the model [B, C or 2C, H, W].
        weak: output of the weaker model for the same inputs, likewise.
        scale: guidance scale. 1 gives the output of the model, 0 that of the weaker one.
        guided_channels: number of leading channels that are guided.

    Returns:
        Output, like `out`. The channels that are not guided are the model's.
    """
    weak = weak[:, :guided_channels]
    return torch.cat([weak + scale * (out[:, :guided_channels] - weak), out[:, guided_channels:]], dim=1)
