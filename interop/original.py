"""Files of the original Remix-DiT repository (VainF/Remix-DiT): state dicts under "ema" and "model".

The parameter names are facebookresearch/DiT's. The tensors of mixed layers have a leading dimension of K bases, and one
more tensor holds the mixing logits pi [N, K].
"""

import torch
from torch import Tensor

from interop.shapes import backbone_from_shapes, find_state_dict, make_config, stored_model_name
from models import DiT
from remix import MIXED_LAYERS, RemixDiT
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
    return make_config(path, backbone, remix, stored_model_name(content) | overrides), renamed


def write(path, models: dict[str, DiT | RemixDiT], config: dict):
    """Write models as one file, their state dicts under the keys of `models`. `interop` documents the arguments."""
    states = {key: _state_dict(model) for key, model in models.items()}
    with atomic_write(path) as temporary:
        torch.save(states, temporary)


def _state_dict(model: DiT | RemixDiT) -> dict[str, Tensor]:
    """Return the weights under the original repository's names."""
    if not isinstance(model, RemixDiT):
        return model.state_dict()
    mixed_layers = tuple(model.config["mixed_layers"])
    if (model.mixer, model.scope, mixed_layers) != ("softmax", "global", MIXED_LAYERS):
        raise UserError(
            "the original Remix-DiT supports softmax mixers of global scope over attention and MLP layers only"
        )
    numbers = f"K={model.n_basis}, N={model.n_experts}"
    if "boundaries" in model.config:
        raise UserError(f"the original Remix-DiT supports only intervals of equal length, not these of {numbers}")
    # Its experts have T // N timesteps each, and its prior gives N // K experts to every basis.
    if model.num_timesteps % model.n_experts or model.n_experts % model.n_basis:
        raise UserError(
            f"the original needs an N that divides {model.num_timesteps}, and a K that divides N, not {numbers}"
        )
    if model.backbone.frequency_shift:
        raise UserError("the original Remix-DiT supports only the timestep frequencies of the published DiT")
    return {
        LOGITS if key == "logits" else key.removeprefix("backbone."): value for key, value in model.state_dict().items()
    }
