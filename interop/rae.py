"""Files of the DiT^DH of RAE (bytetriper/RAE): state dicts, bare or under "ema" and "model".

RAE's time s is 0 for data and 1 for noise, and its network predicts the velocity noise - data. At this project's time
t = 1 - s, the same flow has the velocity v(x, t) = -v_RAE(x, 1 - t). Both changes are linear maps of single layers, so
that `read` makes them in the weights and `write` undoes them, as in sit.py.
"""

import math

import torch
from torch import Tensor, nn

from diffusion import FlowMatching
from diffusion.interpolants import dimension_shift
from interop.lightningdit import block_options
from interop.shapes import (
    count_blocks,
    find_state_dict,
    flow_target,
    make_config,
    stored_model_name,
    stored_settings,
    warn_of_data,
)
from interop.sit import reverse_time, warn_of_shift
from models import DITDH, data_shape
from runtime.errors import UserError
from runtime.files import atomic_write

PROCESS = {"process": FlowMatching.name, "path": "linear", "prediction": "velocity"}
CHANGES = "RAE: the network is called at 1 - t and its output is negated, both as a change of the weights"


def read(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read a DiT^DH. `interop` documents the arguments and the result.

    The config's part "source" says how the weights were changed.
    """
    state = find_state_dict(content, ema)
    backbone = _network_from_shapes(state)
    if backbone is None:
        return None
    stored = stored_settings(content)
    if backbone["depth"] is None:
        backbone["depth"] = _said_depth(path, count_blocks(state), overrides.get("depth", stored.get("depth")))
    if heads := overrides.get("num_heads"):
        overrides = overrides | {"num_heads": [heads] * 2 if isinstance(heads, int) else [*heads]}
    config = make_config(path, backbone, None, stored_model_name(stored) | overrides, stored, DITDH)
    config["diffusion"], config["source"] = PROCESS | {"shift": usual_shift(backbone)}, CHANGES
    return config, _reverse_time(path, state)


def _network_from_shapes(state: dict[str, Tensor]) -> dict | None:
    """Determine the keyword arguments of a DiT^DH from the shapes of its tensors.

    Args:
        state: a state dict under RAE's parameter names.

    Returns:
        The keyword arguments of `models.DiTDH`, or None if the tensors are not those of one. `num_heads` is missing if
        the model has neither rotary embeddings nor normalized queries. `depth` is None if the tensors do not show it.
    """
    try:
        width, in_channels, patch_size, _ = state["s_embedder.proj.weight"].shape
        widths = [len(state[f"blocks.{i}.attn.proj.weight"]) for i in range(count_blocks(state))]
        head_width = len(state["x_embedder.proj.weight"])
        depth = [widths.count(width), widths.count(head_width)]
        if width == head_width:
            # Each part has at least one block.
            depth = [1, 1] if len(widths) == 2 else None
        encoder = block_options(state, 0, "enc_feat_rope", width)
        head = block_options(state, len(widths) - 1, "dec_feat_rope", head_width)
        heads = [part.pop("num_heads") for part in (encoder, head) if "num_heads" in part]
        # The same ratio can give sizes whose smallest ratios differ by rounding.
        encoder["mlp_ratio"] = head["mlp_ratio"] = max(encoder["mlp_ratio"], head["mlp_ratio"])
        if encoder != head or state["t_embedder.W"].ndim != 1:
            return None
        positions = state["pos_embed"] if "pos_embed" in state else state["enc_feat_rope.freqs_cos"][None]
        return dict(
            input_size=math.isqrt(positions.shape[1]) * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=[width, head_width],
            depth=depth,
            class_dropout_prob=0.1,
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            use_pos_embed="pos_embed" in state,
            **encoder,
            **({"num_heads": heads} if heads else {}),
        )
    except (LookupError, ValueError, TypeError, ArithmeticError):
        # A missing tensor, or one with other dimensions.
        return None


def _said_depth(path, n_blocks: int, said) -> list[int]:
    """Return the numbers of blocks of both parts as the file or the user says them, if they suit the tensors."""
    if isinstance(said, list) and all(isinstance(n, int) for n in said) and len(said) == 2 and sum(said) == n_blocks:
        return said
    raise UserError(
        f"{path} holds a DiTDH whose encoder and head have one width: specify how its {n_blocks} blocks are "
        "divided, by two numbers (depth of load_model, or in the config of the file)"
    )


def usual_shift(backbone: dict) -> float:
    """Return the shift of the noise levels with which RAE trains and samples latents of this size."""
    return dimension_shift(data_shape(backbone))


def _reverse_time(path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change the weights of v(x, t) to those of -v(x, 1 - t), see `sit.reverse_time`."""
    return reverse_time(path, state, 2 * math.pi * state["t_embedder.W"].double(), sines_first=True)


def write(path, models: dict[str, nn.Module], config: dict):
    """Write the EMA weights of a DiT^DH as a bare state dict, which RAE's scripts load. `interop` documents it.

    Raises:
        UserError: if the process is not that of RAE's files.
    """
    if flow_target(config["diffusion"]) != PROCESS:
        raise UserError("a file of RAE holds a flow of the linear path that predicts the velocity, which this is not")
    warn_of_shift(path, config, usual_shift(config["model"]["backbone"]))
    warn_of_data(path, config)
    with atomic_write(path) as temporary:
        torch.save(_reverse_time(path, models["ema"].state_dict()), temporary)
