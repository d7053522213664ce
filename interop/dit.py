"""Files of facebookresearch/DiT: state dicts, bare or under "ema" and "model".

This project's DiT has the same parameter names and shapes, so that the tensors are used unchanged.
"""

import torch
from torch import Tensor, nn

from interop.shapes import (
    backbone_from_shapes,
    find_state_dict,
    gaussian_process,
    make_config,
    stored_model_name,
    stored_settings,
    warn_of_data,
    warn_of_flow,
    warn_of_frequencies,
)
from runtime.files import atomic_write


def read(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read a published DiT. `interop` documents the arguments and the result."""
    state = find_state_dict(content, ema)
    backbone = backbone_from_shapes(state)
    if backbone is None:
        return None
    stored = stored_settings(content)
    config = make_config(path, backbone, None, stored_model_name(stored) | overrides, stored)
    return config | {"diffusion": gaussian_process(path, stored, backbone["learn_sigma"])}, state


def write(path, models: dict[str, nn.Module], config: dict):
    """Write plain DiTs as one file, their state dicts under the keys of `models`. `interop` documents the arguments."""
    warn_of_flow(path, config)
    warn_of_data(path, config)
    warn_of_frequencies(path, config)
    with atomic_write(path) as temporary:
        torch.save({key: model.state_dict() for key, model in models.items()}, temporary)
