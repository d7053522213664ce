"""The errors of every expert in the intervals of all experts, measured and drawn."""

from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from diffusion.intervals import interval_labels, scale_of
from figures import save_png, write_csv
from remix import Remix
from training.statistics import HeldOutErrors


def expert_errors(
    remix: Remix, pretrained: nn.Module | None, measure: HeldOutErrors, per_interval: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the error of the prediction in every interval: of the predicted noise, or of what a flow predicts.

    Args:
        remix: model with N experts.
        pretrained: plain model of the same architecture, or None.
        measure: measures the error of a model, on the device of both models.
        per_interval: number of evenly spaced times in each interval.

    Returns:
        Mean squared error of the pretrained model in each interval, or of the best expert if there is no pretrained
        model, [N]; and the error of each expert in each interval relative to it, minus 1, [N experts, N intervals].
    """
    plain = [pretrained] if pretrained is not None else []
    scale = scale_of(remix.boundaries)
    times = np.concatenate([scale.times_between(*pair, per_interval) for pair in pairwise(remix.boundaries)])

    def interval_errors(model: nn.Module) -> np.ndarray:
        errors = measure(model, times, times_per_batch=8)
        return errors.view(remix.n_experts, -1).mean(1).cpu().numpy()

    models = chain(plain, map(remix.expert, range(remix.n_experts)))
    errors = [interval_errors(model) for model in tqdm(models, total=len(plain) + remix.n_experts, desc="models")]
    experts = np.stack(errors[len(plain) :])
    reference = errors[0] if plain else experts.min(0)
    return reference, experts / reference - 1


def draw_losses(
    out: Path, reference: np.ndarray, errors: np.ndarray, model: Remix, name: str, relative_to_best: bool = False
):
    """Draw the results of expert_errors as heat maps. Rows are experts, columns are intervals.

    The left one is relative to the pretrained model, the right one to the best expert of each interval. Where the
    experts are good in their own intervals, the diagonal of the right one is 0. If `relative_to_best`, the errors are
    relative to the best expert already, and there is only this heat map.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    above_best = (1 + errors) / (1 + errors).min(0) - 1
    # Differences are tenths of a percent inside an expert's interval, and up to a factor of ten far outside it.
    scale = partial(SymLogNorm, linthresh=0.5, vmax=100)
    maps = (
        (100 * errors, "RdBu_r", scale(vmin=-100), "the pretrained model", [-100, -10, -1, 0, 1, 10, 100]),
        (100 * above_best, "viridis_r", scale(vmin=0), "the best expert of the interval", [0, 1, 10, 100]),
    )
    maps = maps[1:] if relative_to_best else maps
    figure = Figure((7 * len(maps), 6), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    noise_scale = scale_of(model.boundaries)
    for axis, (values, colors, norm, baseline, ticks) in zip(axes, maps, strict=True):
        image = axis.imshow(values, cmap=colors, norm=norm)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(f"interval of {noise_scale.unit}s (interval 0: least noise)")
        axis.set_ylabel("expert")
        figure.colorbar(image, ax=axis, label=f"error relative to {baseline}, %", ticks=ticks, format="%d")
    own_is_best = float((errors.argmin(0) == np.arange(model.n_experts)).mean())
    figure.suptitle(f"{name}: the interval's own expert has the lowest error in {own_is_best:.0%}", fontsize=10)
    save_png(figure, out)

    header = ["expert", *(f"{noise_scale.symbol}_{label}" for label in interval_labels(model.boundaries, "_"))]
    first = "best, absolute" if relative_to_best else "pretrained, absolute"
    rows = [[first, *reference], *([i, *row] for i, row in enumerate(errors.tolist()))]
    write_csv(out, header, rows)
