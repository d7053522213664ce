"""Files of SiT (willisma/SiT) and of REPA (sihyun-yu/REPA), whose models are flows with the network of a DiT.

A training checkpoint of SiT holds state dicts under "ema" and "model", and the arguments of the training run under
"args", which tell it from a DiT's. A bare state dict of SiT cannot be told from a DiT's: `dit` reads it, and the user
says that it is a flow (--process flow).

REPA's time s is 0 for data and 1 for noise, and its network predicts the velocity noise - data. At SiT's time t = 1 - s
the same flow has the velocity v(x, t) = -v_REPA(x, 1 - t). Both changes are linear maps of single layers, so that
`read` makes them in the weights, and nothing else needs to know of REPA's convention.
"""

import math

import torch
from torch import Tensor, nn

from diffusion import FlowMatching, create_process
from interop.shapes import (
    backbone_from_shapes,
    count_blocks,
    find_state_dict,
    flow_target,
    make_config,
    stored_model_name,
    stored_settings,
    warn_of_data,
    warn_of_frequencies,
)
from models import sinusoid_frequencies
from models.dit import SINUSOIDS
from runtime.errors import UserError, warn
from runtime.files import atomic_write

# Our names of the paths -> SiT's and REPA's. REPA's cosine path is the generalized variance-preserving one.
SIT_PATHS = {"linear": "Linear", "GVP": "GVP", "VP": "VP"}
REPA_PATHS = {"linear": "linear", "GVP": "cosine"}
# The heads that REPA trains together with the network, to predict the features of an image encoder.
PROJECTORS = "projectors."
# Earlier versions of REPA numbered the blocks after those that the projectors read from 0 again, under this name.
DECODER = "decoder_blocks."
# The batch norm of REPA-E (arXiv 2504.10483), which normalizes the latents.
LATENT_NORM = "bn."
# The layers that a reversal of the time changes.
TIME_LAYER = "t_embedder.mlp.0.weight"
OUTPUT_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")
REPA_CHANGES = "REPA: the network is called at 1 - t and its output is negated, both as a change of the weights"


def read(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read a training checkpoint of SiT or a checkpoint of REPA. `interop` documents the arguments and the result.

    The config's part "source" says how the weights of a REPA model were changed.

    Raises:
        UserError: if it is a model of REPA that does not predict the velocity.
    """
    args = stored_settings(content)
    state = find_state_dict(content, ema)
    legacy = any(key.startswith(DECODER) for key in state)
    state = _join_blocks(state) if legacy else state
    projectors = [key for key in state if key.startswith(PROJECTORS)]
    norm = {key.removeprefix(LATENT_NORM): state[key] for key in state if key.startswith(LATENT_NORM)}
    repa = legacy or bool(projectors or norm) or "encoder_depth" in args
    backbone = backbone_from_shapes(state)
    if backbone is None or not (repa or {"path_type", "prediction"} <= args.keys()):
        return None
    name = str(args.get("model")).replace("SiT-", "DiT-")
    if norm:
        # REPA-E names the kind of VAE that it starts from. Its own is none of the published ones.
        args.pop("vae", None)
    config = make_config(path, backbone, None, stored_model_name({"model": name}) | overrides, args)
    if not repa:
        config["diffusion"] = stored_process(path, args)
        return config, state
    if args.get("prediction", "v") not in ("v", "velocity"):
        raise UserError(f"{path} says prediction={args['prediction']!r}, but REPA's networks predict the velocity (v)")
    args = {"path_type": "linear", **args, "prediction": "velocity"}
    config["diffusion"] = _process(path, REPA_PATHS, args) | _repa_times(path, args)
    config["source"] = REPA_CHANGES
    if projectors:
        n_parameters = sum(state[key].numel() for key in projectors)
        warn(f"{path}: left out REPA's projector heads ({n_parameters:,} parameters)")
    if norm:
        config["data"] |= _latent_normalization(path, norm, backbone["in_channels"])
    left_out = (*projectors, *(f"{LATENT_NORM}{key}" for key in norm))
    kept = {key: value for key, value in state.items() if key not in left_out}
    frequencies = sinusoid_frequencies(SINUSOIDS, shift=config["model"]["backbone"].get("frequency_shift", 0))
    return config, reverse_time(path, kept, frequencies)


def _latent_normalization(path, norm: dict[str, Tensor], channels: int) -> dict:
    """Return the entries of the config's part "data" for the batch norm over the latents of REPA-E.

    It has no affine parameters: z becomes (z - mean) / sqrt(var) in each channel. The VAE was trained together with the
    network, so that the file's latents are those of no published VAE.

    Raises:
        UserError: if the batch norm does not hold a mean and a positive variance per channel, or is affine.
    """
    mean, var = norm.get("running_mean"), norm.get("running_var")
    fits = mean is not None and var is not None and mean.shape == var.shape == (channels,)
    if not fits or not (mean.isfinite() & var.isfinite() & (var > 0)).all():
        raise UserError(f"{path}: its batch norm over the latents (bn) does not have a mean and variance per channel")
    if norm.keys() & {"weight", "bias"}:
        raise UserError(f"{path}: its batch norm over the latents (bn) has affine parameters, which REPA-E's has not")
    return {"vae": None, "scale": var.double().rsqrt().tolist(), "shift": mean.double().tolist()}


def _join_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of an earlier version of REPA (its --legacy) with all blocks in one list."""
    first = count_blocks(state)
    renamed = {}
    for key, value in state.items():
        if key.startswith(DECODER):
            number, _, rest = key.removeprefix(DECODER).partition(".")
            key = f"blocks.{first + int(number)}.{rest}"
        renamed[key] = value
    return renamed


def _process(path, paths: dict[str, str], args: dict) -> dict:
    """Return the "diffusion" part of a config for training arguments, whose path types `paths` lists."""
    for ours, theirs in paths.items():
        if theirs == args["path_type"]:
            process = {"process": FlowMatching.name, "path": ours, "prediction": args["prediction"]}
            try:
                create_process(**process)
            except ValueError as error:
                raise UserError(f"{path} says prediction={args['prediction']!r}: {error}") from None
            return process
    raise UserError(f"{path} was trained with the unknown path type {args['path_type']!r}")


def stored_process(path, args: dict) -> dict:
    """Return the "diffusion" part of a config for the settings of SiT's transport that a file stores."""
    # SiT ignores the weight of velocity predictions.
    weight = "none" if args["prediction"] == "velocity" else args.get("loss_weight") or "none"
    return _process(path, SIT_PATHS, args) | {"weight": weight}


def flow_options(process: dict, paths: dict[str, str]) -> dict:
    """Return the settings of SiT's transport for the "diffusion" part of a config, with the path names of `paths`."""
    target, weight = flow_target(process), process.get("weight", "none")
    return {
        "path_type": paths[target["path"]],
        "prediction": target["prediction"],
        "loss_weight": None if weight == "none" else weight,
    }


def warn_of_shift(path, config: dict, usual: float = 1):
    """Print a warning if the noise levels have another shift than the usual one, which a file cannot say."""
    if not math.isclose(shift := config["diffusion"].get("shift", 1), usual):
        warn(f"{path} cannot record the shift {shift:g} of the noise levels, which sampling would use")


def _repa_times(path, args: dict) -> dict:
    """Return the options of the distribution of training times that REPA's argument --weighting names."""
    weighting = args.get("weighting") or "uniform"
    if weighting == "uniform":
        return {}
    # sigma / (1 + sigma) with a lognormal sigma is logit-normal. That of REPA's cosine path is another distribution.
    if (weighting, args["path_type"]) == ("lognormal", "linear"):
        return {"time_sampling": "logit-normal"}
    raise UserError(
        f"{path} was trained with the weighting {weighting!r} of REPA's path {args['path_type']!r}, whose distribution "
        "of times this project does not have"
    )


def reverse_time(path, state: dict[str, Tensor], frequencies: Tensor, sines_first: bool = False) -> dict[str, Tensor]:
    """Change the weights of v(x, t) to those of -v(x, 1 - t). Twice gives the same weights again, except for rounding.

    The first layer of the time embedding reads cos(f s) and sin(f s), which the addition theorems write as sums of
    cos(f t) and sin(f t) with s = 1 - t.

    Args:
        path: the file, for error messages.
        state: the state dict.
        frequencies: the frequencies f [F], in radians per unit of time.
        sines_first: whether the layer reads the sines before the cosines.

    Returns:
        The state dict with three other tensors.

    Raises:
        UserError: if it does not have the three tensors, or not as many time features as frequencies.
    """
    for key in (TIME_LAYER, *OUTPUT_LAYER):
        if key not in state:
            raise UserError(f"{path} does not fit the model: it has no tensor {key}")
    first, f = state[TIME_LAYER], frequencies.double()
    if first.shape[1:] != (2 * len(f),):
        raise UserError(f"{path} does not fit the model: {TIME_LAYER} does not have {2 * len(f)} columns")
    halves = first.double().chunk(2, dim=1)
    sines, cosines = halves if sines_first else reversed(halves)
    rotated = [cosines * f.sin() - sines * f.cos(), cosines * f.cos() + sines * f.sin()]
    rotated = torch.cat(rotated if sines_first else rotated[::-1], dim=1)
    return state | {key: -state[key] for key in OUTPUT_LAYER} | {TIME_LAYER: rotated.to(first.dtype)}


def write(path, models: dict[str, nn.Module], config: dict):
    """Write flow DiTs as a training checkpoint of SiT. `interop` documents the arguments.

    The arguments of the training run are stored as a dict, which torch.load reads without further permission.

    Raises:
        UserError: if the model was trained with Gaussian diffusion.
    """
    process, name = config["diffusion"], config["model"]["name"]
    if not flow_target(process):
        raise UserError("a file of SiT holds a flow, and this model was trained with Gaussian diffusion")
    warn_of_frequencies(path, config)
    warn_of_data(path, config)
    warn_of_shift(path, config)
    args = flow_options(process, SIT_PATHS) | {
        "model": name.removeprefix("Remix").replace("DiT-", "SiT-"),
        "image_size": config["data"]["image_size"],
        "num_classes": config["model"]["backbone"]["num_classes"],
    }
    with atomic_write(path) as temporary:
        torch.save({key: model.state_dict() for key, model in models.items()} | {"args": args}, temporary)
