"""What training and sampling ask of every process."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .intervals import NoiseScale
from .samplers import Sampler


class Process:
    """Base class of the processes, which answer for themselves, so that no caller asks which one it has.

    Each also has `q_sample` and `training_losses`, see `GaussianDiffusion`.

    Attributes:
        name: name of the process in flags and configs.
        title: name of the process in texts.
        loss_names: names of its training losses, the first of which is differentiated.
        samplers: name of each sampler, and what makes it from the process, the number of steps and further options. The
            first is the default.
        quick: sampler and number of steps for previews and scores, whose samples need few evaluations.
        scale: the scale of its noise levels.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    loss_names: ClassVar[tuple[str, ...]]
    samplers: ClassVar[dict[str, Callable[..., Sampler]]]
    quick: ClassVar[tuple[str, str]]
    scale: NoiseScale

    @classmethod
    def create(cls, **options) -> "Process":
        """Build the process from the options of a config."""
        return cls(**options)

    def to(self, device: torch.device) -> "Process":
        """Move what losses need to a device, and return this process."""
        return self

    def make_sampler(self, name: str, steps: int | str | None, **options) -> Sampler:
        """Make a sampler of this process.

        Args:
            name: a key of `samplers`.
            steps: the number of steps, or for "ddpm" and "ddim" the `timestep_respacing` of `create_diffusion`. It is
                ignored by samplers that choose their steps.
            options: further options of the sampler.

        Raises:
            ValueError: if the process does not have this sampler, or if the steps or options are invalid.
        """
        if name not in self.samplers:
            raise ValueError(f"unknown sampler {name!r}: choose from {', '.join(self.samplers)}")
        return self.samplers[name](self, steps, **options)

    def sampler_settings(self, name: str) -> dict:
        """Return the settings of sample_ddp.py that one of `samplers` has, by name, with their defaults."""
        return {"num_sampling_steps": "250"}

    def sample_times(self, generator: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Draw the training times of the rows of a batch.

        Args:
            generator: the random numbers.
            low: lowest noise level of each row [B].
            high: noise level of each row below which its noise level stays [B].

        Returns:
            The times that the network sees [B], in the scale's dtype.

        Raises:
            ValueError: if an interval contains no training times.
        """
        raise NotImplementedError

    def expert_boundaries(self, n: int) -> list[float]:
        """Return the default boundaries of n experts: n + 1 noise levels, which bound intervals of equal probability.

        Raises:
            ValueError: if an interval contains no training times.
        """
        raise NotImplementedError

    def check_levels(self, levels: Sequence[float], complete: bool = False):
        """Check noise levels that bound intervals.

        Args:
            levels: the noise levels.
            complete: whether they must begin and end with the lowest and the highest noise level.

        Raises:
            ValueError: unless they increase, are in the process's range, and each interval contains training times.
        """
        if any(not low < high for low, high in pairwise(levels)):
            raise ValueError("the noise levels must increase")
        lowest, highest = self.scale.range
        if levels[-1] > highest or (complete and [levels[0], levels[-1]] != [lowest, highest]):
            raise ValueError(f"the noise levels of the process {self.name} run from {lowest} to {highest}")
        self.sample_times(np.random.default_rng(0), np.array(levels[:-1]), np.array(levels[1:]))

    def seed_numbers(self, times: Tensor) -> Tensor:
        """Return the whole number by which held-out errors choose images and noise at each of some times, int64 [n]."""
        raise NotImplementedError

    def held_out_errors(self, model, x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return errors of a model's prediction.

        Args:
            model: called as model(x_t, t, y).
            x: data [B, C, H, W].
            t: times [B].
            y: labels [B].
            noise: standard normal noise, like x.

        Returns:
            Errors [B, ...], whose mean is the error of the batch.
        """
        raise NotImplementedError
