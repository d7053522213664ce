"""What the width of the EMA changes: errors and FID of averages of a run's weights, measured and drawn."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from figures import save_png, write_csv
from mixing.experts import stored_state
from runtime.command_line import counted
from sampling.experts import for_sampling
from training.posthoc_ema import Fit, reconstruct
from training.statistics import HeldOutErrors

# Evenly spaced noise levels at which the error of an EMA is measured.
EMA_LEVELS = 50


class Measure(NamedTuple):
    """What is measured of a model.

    Attributes:
        whole: function of a model that returns the number.
        part: function of a model that does one of `parts` equal parts of this work.
        parts: number of parts.
        text: what is measured.
    """

    whole: Callable[[nn.Module], float]
    part: Callable[[nn.Module], Any]
    parts: int
    text: str


def error_measure(errors: HeldOutErrors, interval: list[float]) -> Measure:
    """Return the measure of the mean error of a model over EMA_LEVELS evenly spaced noise levels, those of an interval.

    Args:
        errors: measures the error at some times.
        interval: lowest and highest noise level that the model is trained on.
    """
    levels = errors.process.scale.grid(EMA_LEVELS, interval)
    return Measure(
        lambda network: errors(network, levels).mean().item(),
        lambda network: errors(network, levels[:1]),
        len(levels),
        f"the error at {counted(len(levels), 'noise level')}",
    )


def estimate_seconds(network: nn.Module, measure: Measure) -> float:
    """Return the time that one measurement of a network will take, from the time of one of its parts."""
    start = time.perf_counter()
    measure.part(network)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * measure.parts


def ema_scores(
    model: nn.Module, fits: list[Fit], measures: dict[str, Measure], device: torch.device
) -> dict[float | None, dict[str, float]]:
    """Measure averages of the weights of several widths.

    Args:
        model: the model of a run with snapshots, with the EMA of the training.
        fits: the averages to make, one per width.
        measures: what is measured, by name. Before the first, the time that all will take is printed.
        device: device on which the averages are measured.

    Returns:
        The results by width and name; those of the training's EMA have the width None.
    """
    state = {name: tensor.clone() for name, tensor in stored_state(model).items()}
    network = for_sampling(model).to(device)
    seconds = (1 + len(fits)) * sum(estimate_seconds(network, measure) for measure in measures.values())
    texts = " and ".join(measure.text for measure in measures.values())
    print(
        f"{counted(1 + len(fits), 'EMA')} (that of the training and {counted(len(fits), 'width')}), of each {texts}: "
        f"about {timedelta(seconds=round(seconds))} in all (fewer --stds or --score-samples take less)",
        flush=True,
    )
    scores = {}
    for fit in tqdm([None, *fits], desc="widths"):
        model.load_state_dict(state if fit is None else reconstruct(fit, state))
        network = for_sampling(model).to(device)
        scores[fit.std if fit else None] = {name: measure.whole(network) for name, measure in measures.items()}
    return scores


def draw_ema(out: Path, scores: dict[float | None, dict[str, float]], name: str):
    """Draw the results of ema_scores, one panel for each score."""
    from matplotlib.figure import Figure

    stds = sorted(std for std in scores if std is not None)
    kinds = list(scores[None])
    figure = Figure((7 * len(kinds), 4), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.plot(stds, [scores[std][kind] for std in stds], marker="o", label="post-hoc EMA")
        axis.axhline(scores[None][kind], color="gray", linestyle="--", label="EMA of the training")
        axis.set_xlabel("relative standard deviation of the EMA")
        axis.set_ylabel("held-out error" if kind == "error" else kind)
        axis.legend()
    figure.suptitle(name, fontsize=10)
    save_png(figure, out)
    rows = [[std or "training", *scores[std].values()] for std in (None, *stds)]
    write_csv(out, ["std", *kinds], rows)
