"""Loads the models that a checkpoint or several hold, for sampling."""

from itertools import pairwise

from checkpoint import load_model
from diffusion import NOISE_LEVELS, process_name
from models import DiT
from remix import RemixDiT
from runtime.errors import UserError
from sampling.experts import ExpertSwitch, IndependentExperts, for_sampling


def choose_process(path, config: dict, process: str | None):
    """Set the diffusion process in the config of a file of another project, which does not record it.

    Args:
        path: the file, for error messages.
        config: the config of the file. Its part "diffusion" is replaced if the file does not record its process.
        process: "gaussian" or "flow"; None to use what the config says.

    Raises:
        UserError: if the file records another process.
    """
    recorded = process_name(config["diffusion"])
    if process in (None, recorded):
        return
    # The config of a file without one is determined from its tensors: it has no training options.
    if config["training"] or "process" in config["diffusion"] or config["model"]["remix"]:
        raise UserError(f"--process {process}, but {path} was trained with --process {recorded}")
    config["diffusion"] = {"process": process}


def load_denoiser(
    paths: list, ema: bool = True, allow_pickle: bool = False, **overrides
) -> tuple[DiT | ExpertSwitch, dict]:
    """Load a model for sampling.

    Args:
        paths: one checkpoint, or the checkpoints of independent experts in any order. Independent experts are plain
            DiTs trained on intervals of timesteps (train_fast.py --timesteps), which together must cover all timesteps
            exactly once.
        ema, allow_pickle, overrides: see `load_model`.

    Returns:
        The model in eval mode on the CPU, and its config. The model is a DiT, a FoldedRemix, or IndependentExperts
        with the config of the expert that has the lowest timesteps.

    Raises:
        UserError: if a file cannot be loaded, or if several files are not independent experts of one architecture
            whose intervals cover all timesteps exactly once.
    """
    loaded = [(path, *load_model(path, ema, allow_pickle, **overrides)) for path in paths]
    if len(loaded) == 1:
        _, model, config = loaded[0]
        return for_sampling(model), config
    for path, model, config in loaded:
        if isinstance(model, RemixDiT) or not config["training"]:
            raise UserError(
                f"{path} is not an independent expert (a DiT from train_fast.py --timesteps): give only one --ckpt"
            )
        if model.config != loaded[0][1].config:
            raise UserError(f"{path} and {loaded[0][0]} hold models of different shapes")
        if config["diffusion"] != loaded[0][2]["diffusion"]:
            raise UserError(f"{path} and {loaded[0][0]} were trained with different processes")
    loaded.sort(key=lambda item: item[2]["training"]["timesteps"])
    intervals = [config["training"]["timesteps"] for _, _, config in loaded]
    bounds = [intervals[0][0], *(high for _, high in intervals)]
    lowest, highest = NOISE_LEVELS[process_name(loaded[0][2]["diffusion"])]
    if intervals != [list(pair) for pair in pairwise(bounds)] or (bounds[0], bounds[-1]) != (lowest, highest):
        raise UserError(
            f"the experts' timesteps {intervals} do not cover the range from {lowest} to {highest} exactly once"
        )
    return IndependentExperts([model for _, model, _ in loaded], bounds).eval(), loaded[0][2]
