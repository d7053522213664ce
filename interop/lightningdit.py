"""Files of LightningDiT (hustvl/LightningDiT): state dicts, bare or under "ema" and "model".

Time and velocity are those of SiT: t = 1 is data, and the velocity is data - noise. Training checkpoints hold the
configuration under "config", in parts, which is compared with the tensors.

A LightningDiT without any of its options has the tensor names of REPA's networks, whose time has the opposite
direction. Such files are refused.
"""

import math

import torch
from torch import Tensor, nn

from interop.shapes import (
    backbone_from_shapes,
    count_blocks,
    find_state_dict,
    flow_target,
    make_config,
    size_ratio,
    stored_model_name,
    stored_settings,
    warn_of_data,
)
from interop.sit import SIT_PATHS, flow_options, stored_process, warn_of_shift
from models import LIGHTNINGDIT
from models.lightningdit import swiglu_size
from runtime.errors import UserError
from runtime.files import atomic_write

# The names of the options, here and there.
OPTIONS = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")
# Channels of VA-VAE's latents, for which the published models are made.
VAVAE_CHANNELS = 32
DEFAULT_PROCESS = {"path_type": "Linear", "prediction": "velocity"}


def read(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read a LightningDiT. `interop` documents the arguments and the result."""
    state, stored = find_state_dict(content, ema), stored_settings(content)
    said = stored.pop("model_type", stored.pop("model", None))
    stored |= {"in_channels": stored["in_chans"]} if "in_chans" in stored else {}
    backbone = _network_from_shapes(state)
    if backbone is None or not any(backbone[option] for option in OPTIONS):
        _refuse_without_options(path, state, content, said)
        return None
    overrides = stored_model_name({"model": said}) | overrides
    config = make_config(path, backbone, None, overrides, stored, LIGHTNINGDIT)
    config["diffusion"] = stored_process(path, DEFAULT_PROCESS | stored)
    return config, state


def _refuse_without_options(path, state: dict[str, Tensor], content: dict, said):
    """Raise UserError for a file that holds, or may hold, a LightningDiT without options."""
    plain = backbone_from_shapes(state)
    if plain is None:
        return
    if str(said).startswith("LightningDiT"):
        raise UserError(
            f"{path} holds a LightningDiT without rotary embeddings, RMSNorm, SwiGLU, QK normalization or modulation "
            "without shift: such files cannot be told from REPA's, and are not read"
        )
    bare = not stored_settings(content) and not any(key.startswith(("projectors.", "bn.")) for key in state)
    if bare and plain["in_channels"] == VAVAE_CHANNELS and not plain["learn_sigma"]:
        raise UserError(
            f"{path} holds a network of REPA, whose time runs from data to noise, or a LightningDiT without any of its "
            "options, whose time runs from noise to data: use a training checkpoint of REPA or SiT, which says which"
        )


def _network_from_shapes(state: dict[str, Tensor]) -> dict | None:
    """Determine the keyword arguments of a LightningDiT from the shapes of its tensors.

    Args:
        state: a state dict under LightningDiT's parameter names.

    Returns:
        The keyword arguments of `models.LightningDiT`, or None if the tensors are not those of one. `num_heads` is
        missing if the model has neither rotary embeddings nor normalized queries.
    """
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        out_channels = len(state["final_layer.linear.bias"]) // patch_size**2
        if "s_embedder.proj.weight" in state or state["t_embedder.mlp.0.weight"].ndim != 2:
            return None
        return dict(
            input_size=math.isqrt(state["pos_embed"].shape[1]) * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=count_blocks(state),
            class_dropout_prob=0.1,
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=out_channels == 2 * in_channels,
            **block_options(state, 0, "feat_rope", hidden_size),
        )
    except (LookupError, ValueError, TypeError, ArithmeticError):
        # A missing tensor, or one with other dimensions.
        return None


def block_options(state: dict[str, Tensor], i: int, rope: str, hidden_size: int) -> dict:
    """Determine the keyword arguments that concern the blocks, from the shapes of one of them.

    Args:
        state: the state dict.
        i: index of the block.
        rope: name of the module of the rotary embeddings.
        hidden_size: width D of the block.

    Returns:
        The arguments, without `num_heads` if the shapes do not depend on it.

    Raises:
        LookupError, ArithmeticError: if the tensors are not those of a block.
    """
    block = f"blocks.{i}"
    modulation = len(state[f"{block}.adaLN_modulation.1.bias"])
    use_swiglu, use_qknorm = f"{block}.mlp.w12.weight" in state, f"{block}.attn.q_norm.weight" in state
    options = dict(
        use_qknorm=use_qknorm,
        use_swiglu=use_swiglu,
        use_rope=f"{rope}.freqs_cos" in state,
        use_rmsnorm=f"{block}.norm1.weight" in state,
        wo_shift=modulation == 4 * hidden_size,
    )
    inner = state[f"{block}.mlp.{'w3' if use_swiglu else 'fc2'}.weight"].shape[1]
    if use_swiglu:
        # A ratio of 4, or the smallest one that gives this inner size.
        inner = 4 * hidden_size if swiglu_size(4 * hidden_size) == inner else math.ceil(inner * 3 / 2)
    options["mlp_ratio"] = size_ratio(inner, hidden_size)
    if options["use_rope"]:
        options["num_heads"] = hidden_size // state[f"{rope}.freqs_cos"].shape[1]
    elif use_qknorm:
        options["num_heads"] = hidden_size // len(state[f"{block}.attn.q_norm.weight"])
    return options


def write(path, models: dict[str, nn.Module], config: dict):
    """Write LightningDiTs as one file, with a config that LightningDiT's scripts have. `interop` documents it.

    Raises:
        UserError: if the model was trained with Gaussian diffusion, or could not be told from one of REPA.
    """
    if not flow_target(config["diffusion"]):
        raise UserError("a file of LightningDiT holds a flow, and this model was trained with Gaussian diffusion")
    warn_of_shift(path, config)
    warn_of_data(path, config)
    name, backbone = config["model"]["name"], config["model"]["backbone"]
    if not any(backbone[option] for option in OPTIONS):
        raise UserError("a file of a LightningDiT without any of its options cannot be told from one of REPA")
    model = {"model_type": name.removeprefix("Remix"), "in_chans": backbone["in_channels"]}
    model |= {key: backbone[key] for key in (*OPTIONS, "num_heads", "class_dropout_prob")}
    data = {"image_size": config["data"]["image_size"], "num_classes": backbone["num_classes"]}
    said = {"model": model, "data": data, "transport": flow_options(config["diffusion"], SIT_PATHS)}
    with atomic_write(path) as temporary:
        torch.save({key: model.state_dict() for key, model in models.items()} | {"config": said}, temporary)
