"""Loads the models that a checkpoint or several hold, for sampling."""

from itertools import pairwise

from torch import nn

from checkpoint import load_model
from diffusion import GaussianDiffusion, create_process
from runtime.errors import UserError, warn
from sampling.experts import IndependentExperts, for_sampling


def choose_process(path, config: dict, process: str | None):
    """Set the diffusion process in the config of a file of another project, which does not record it.

    Args:
        path: the file, for error messages.
        config: the config of the file. Its part "diffusion" is replaced if the file does not record its process.
        process: "gaussian" or "flow"; None to use what the config says.

    Raises:
        UserError: if the file records another process.
    """
    recorded = create_process(**config["diffusion"]).name
    if process in (None, recorded):
        return
    # Of a file without a config, Gaussian diffusion is assumed. It has no training options.
    if config["training"] or recorded != GaussianDiffusion.name or config["model"]["remix"]:
        raise UserError(f"--process {process}, but {path} was trained with --process {recorded}")
    config["diffusion"] = {"process": process}


def check_data(flag: str, path, config: dict, other, other_config: dict):
    """Check that two models denoise the same data, as far as both files record it.

    Args:
        flag: the flag that gives `path`, for error messages.
        path, other: the files.
        config, other_config: their configs.

    Raises:
        UserError: if the names of the classes or the normalization of the latents differ.
    """
    # Files of other projects assume a normalization.
    if not (config["training"] and other_config["training"]):
        return
    for what, keys in (("classes", ("classes",)), ("normalization of the latents", ("scale", "shift"))):
        parts = [[part["data"][key] for key in keys] for part in (config, other_config)]
        if parts[0] != parts[1] and all(part[0] is not None for part in parts):
            raise UserError(f"{flag} {path} was trained with other {what} than {other}")


def load_denoiser(paths: list, ema: bool = True, allow_pickle: bool = False, **overrides) -> tuple[nn.Module, dict]:
    """Load a model for sampling.

    Args:
        paths: one checkpoint, or the checkpoints of independent experts in any order. Independent experts are plain
            models trained on intervals of timesteps (train_fast.py --timesteps), which together must cover all
            timesteps exactly once.
        ema, allow_pickle, overrides: see `load_model`.

    Returns:
        The model in eval mode on the CPU, and its config. The model is a plain one, a FoldedRemix, or
        IndependentExperts with the config of the expert that has the lowest timesteps.

    Raises:
        UserError: if a file cannot be loaded, or if several files are not independent experts of one architecture
            with the same data, whose intervals cover all timesteps exactly once.
    """
    loaded = [(path, *load_model(path, ema, allow_pickle, **overrides)) for path in paths]
    if len(loaded) == 1:
        path, model, config = loaded[0]
        scale = create_process(**config["diffusion"]).scale
        if config["training"] and (interval := config["training"]["timesteps"]) != scale.range:
            low, high = scale.ends(*interval)
            warn(
                f"{path} was trained on the {scale.unit}s {low:g} to {high:g} only: samples need the independent "
                "experts of the others too"
            )
        return for_sampling(model), config
    shape = {key: loaded[0][2]["model"][key] for key in ("architecture", "backbone")}
    for path, _, config in loaded:
        if config["model"]["remix"] or not config["training"]:
            raise UserError(
                f"{path} is not an independent expert (a DiT from train_fast.py --timesteps): give only one --ckpt"
            )
        if not shape.items() <= config["model"].items():
            raise UserError(f"{path} and {loaded[0][0]} hold models of different shapes")
        if config["diffusion"] != loaded[0][2]["diffusion"]:
            raise UserError(f"{path} and {loaded[0][0]} were trained with different processes")
        check_data("--ckpt", path, config, loaded[0][0], loaded[0][2])
    loaded.sort(key=lambda item: item[2]["training"]["timesteps"])
    intervals = [config["training"]["timesteps"] for _, _, config in loaded]
    bounds = [intervals[0][0], *(high for _, high in intervals)]
    lowest, highest = create_process(**loaded[0][2]["diffusion"]).scale.range
    if intervals != [list(pair) for pair in pairwise(bounds)] or (bounds[0], bounds[-1]) != (lowest, highest):
        raise UserError(
            f"the experts' timesteps {intervals} do not cover the range from {lowest} to {highest} exactly once"
        )
    return IndependentExperts([model for _, model, _ in loaded], bounds).eval(), loaded[0][2]
