"""Files of the original Remix-DiT repository (VainF/Remix-DiT): state dicts under "ema" and "model".

The parameter names are facebookresearch/DiT's. The tensors of mixed layers have a leading dimension of K bases, and one
more tensor holds the mixing logits pi [N, K].
"""

import torch
from torch import Tensor, nn

from diffusion.intervals import equal_boundaries
from interop.shapes import (
    backbone_from_shapes,
    find_state_dict,
    gaussian_process,
    make_config,
    stored_model_name,
    stored_settings,
    warn_of_data,
    warn_of_flow,
)
from mixing.experts import stored_state
from models import DIT
from remix import Remix
from runtime.errors import UserError
from runtime.files import atomic_write

LOGITS = "coefficients.weight"


def read(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read an original Remix-DiT. `interop` documents the arguments and the result."""
    state = find_state_dict(content, ema)
    backbone = backbone_from_shapes(state)
    if backbone is None or LOGITS not in state or state[LOGITS].ndim != 2:
        return None
    n_experts, n_basis = state[LOGITS].shape
    remix = dict(n_basis=n_basis, n_experts=n_experts)
    renamed = {"logits" if key == LOGITS else f"backbone.{key}": value for key, value in state.items()}
    stored = stored_settings(content)
    config = make_config(path, backbone, remix, stored_model_name(stored) | overrides, stored)
    return config | {"diffusion": gaussian_process(path, stored, backbone["learn_sigma"])}, renamed


def write(path, models: dict[str, nn.Module], config: dict):
    """Write models as one file, their state dicts under the keys of `models`. `interop` documents the arguments."""
    to_state_dict = _mixed_state_dict if config["model"]["remix"] else nn.Module.state_dict
    states = {key: to_state_dict(model) for key, model in models.items()}
    warn_of_flow(path, config)
    warn_of_data(path, config)
    with atomic_write(path) as temporary:
        torch.save(states, temporary)


def _mixed_state_dict(model: Remix) -> dict[str, Tensor]:
    """Return the weights of a Remix of a DiT under the original repository's names."""
    layers = tuple(model.mixing_config["layers"])
    if (model.mixer, model.scope, layers) != ("softmax", "global", DIT.mixed_layers):
        raise UserError(
            "the original Remix-DiT supports softmax mixers of global scope over attention and MLP layers only"
        )
    numbers = f"K={model.n_basis}, N={model.n_experts}"
    if model.boundaries != equal_boundaries(model.n_experts, 1000):
        raise UserError(f"the original Remix-DiT supports only intervals of equal length, not these of {numbers}")
    # Its experts have T // N timesteps each, and its prior gives N // K experts to every basis.
    if model.highest_level % model.n_experts or model.n_experts % model.n_basis:
        raise UserError(
            f"the original needs an N that divides {model.highest_level}, and a K that divides N, not {numbers}"
        )
    if model.backbone.frequency_shift:
        raise UserError("the original Remix-DiT supports only the timestep frequencies of the published DiT")
    return {
        LOGITS if key == "logits" else key.removeprefix("backbone."): value
        for key, value in stored_state(model).items()
    }
