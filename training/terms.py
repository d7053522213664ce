"""The terms that are added to the loss of the process: each has a name, a weight and a function of a step's tensors.

To add a term, write a function that returns a `LossTerm`, or None for models and settings that do not use it, and add
it to `TERMS`. Its mean value and its weight are then part of the loss, the log line and metrics.jsonl.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Process
from diffusion.samplers import drop_variance
from training.experts import Experts
from training.settings import RunSettings


class StepTensors(NamedTuple):
    """The tensors of a microbatch of B images, after the forward pass.

    Attributes:
        model: the model in training.
        x: features [B, C, H, W].
        t: timesteps, or times of a flow [B].
        conditions: the keyword arguments of the model.
        noise: the noise in the model's input [B, C, H, W].
        extras: further tensors of the batch by name, see `training.batches.StepBatch`.
        out: output of the model [B, C or 2C, H, W].
        process: the process.
    """

    model: nn.Module
    x: Tensor
    t: Tensor
    conditions: dict[str, Any]
    noise: Tensor
    extras: dict[str, Tensor]
    out: Tensor
    process: Process


@dataclass(frozen=True)
class LossTerm:
    """A term of the training loss.

    Attributes:
        name: its name in the log and in metrics.jsonl, where `name` is its mean value without the weight, and
            `name_weight` is the weight.
        weight: its weight, as a function of the completed fraction of the schedule, from 0 to 1.
        value: its value [], as a function of the step's tensors. It is a part of the compiled graph.
    """

    name: str
    weight: Callable[[float], float]
    value: Callable[[StepTensors], Tensor]


def prior_term(experts: Experts, settings: RunSettings) -> LossTerm | None:
    """Return the cross-entropy between the coefficients and their one-hot prior.

    Its weight falls linearly from `settings.prior_strength` to 0. Models without trained logits have no such term.
    """
    if not experts.logits:
        return None
    return LossTerm(
        "prior",
        weight=lambda progress: settings.prior_strength * (1 - progress),
        value=lambda step: step.model.prior_loss(),
    )


def cosine_term(experts: Experts, settings: RunSettings) -> LossTerm | None:
    """Return 1 minus the cosine similarity of a flow's predicted velocity and its target (arXiv 2501.01423).

    The similarity is that of the vectors of all channels at one position, and is averaged over the positions.
    """
    if not settings.cosine_weight:
        return None

    def value(step: StepTensors) -> Tensor:
        target = step.process.velocity(step.x, step.t, step.noise)
        return 1 - F.cosine_similarity(drop_variance(step.out, step.x), target, dim=1).mean()

    return LossTerm("cosine", weight=lambda progress: settings.cosine_weight, value=value)


TERMS: list[Callable[[Experts, RunSettings], LossTerm | None]] = [prior_term, cosine_term]


def loss_terms(experts: Experts, settings: RunSettings) -> list[LossTerm]:
    """Return the terms that a run adds to the loss of its process."""
    return [term for make in TERMS if (term := make(experts, settings)) is not None]
