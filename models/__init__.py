"""The plain backbones: DiT, LightningDiT and DiT^DH, with one record for each.

A record (`Backbone`) says everything that the rest of the code needs to know about a backbone. To add one, write its
class and a record in a module of this folder, and add the record to BACKBONES. docs/backbones.md lists what else there
is to do.
"""

from typing import NamedTuple

from torch import nn

from .backbone import Backbone, data_shape, meta_device
from .dit import (
    DIT,
    TIMESTEP_FREQUENCIES,
    Attention,
    DiT,
    DiT_models,
    Mlp,
    PatchEmbed,
    TanhGELU,
    choose_attention,
    classifier_free_guidance,
    default_guided_channels,
    sincos_positions,
    sinusoid_frequencies,
)
from .ditdh import DITDH, DiTDH, DiTDH_models
from .lightningdit import LIGHTNINGDIT, LightningDiT, LightningDiT_models

# Every backbone, by its name.
BACKBONES = {backbone.name: backbone for backbone in (DIT, LIGHTNINGDIT, DITDH)}


def find_backbone(module: nn.Module) -> Backbone:
    """Return the record of a module's class.

    Raises:
        ValueError: if the class has none.
    """
    # PyTorch's wrappers, such as fully_shard, make subclasses.
    for kind in type(module).__mro__:
        for backbone in BACKBONES.values():
            if backbone.module is kind:
                return backbone
    raise ValueError(f"a {type(module).__name__} is none of the backbones {', '.join(BACKBONES)}")


def model_names() -> list[str]:
    """Return the names of all models: those of the backbones, and then those with experts, such as "RemixDiT-S/2"."""
    names = [name for backbone in BACKBONES.values() for name in backbone.models()]
    return [*names, *(f"Remix{name}" for name in names)]


class ModelName(NamedTuple):
    """What the name of a model says: its backbone, its size such as "S/2", and whether it has experts."""

    backbone: Backbone
    size: str
    with_experts: bool


def find_model(name: str) -> ModelName:
    """Look up the name of a model, one of `model_names`.

    Raises:
        KeyError: if no model has this name.
    """
    kind, _, size = name.removeprefix("Remix").partition("-")
    backbone = BACKBONES[kind]
    if size not in backbone.sizes:
        raise KeyError(name)
    return ModelName(backbone, size, name.startswith("Remix"))


def build_plain(name: str, **options) -> nn.Module:
    """Build a plain backbone.

    Args:
        name: name of the model, such as "DiT-S/2", or that of its model with experts, "RemixDiT-S/2".
        **options: further arguments of its class, such as `input_size`.

    Raises:
        ValueError: see the class.
    """
    backbone, size, _ = find_model(name)
    return backbone.module(**backbone.sizes[size] | options)


__all__ = [
    "BACKBONES",
    "DIT",
    "DITDH",
    "LIGHTNINGDIT",
    "TIMESTEP_FREQUENCIES",
    "Attention",
    "Backbone",
    "DiT",
    "DiTDH",
    "DiTDH_models",
    "DiT_models",
    "LightningDiT",
    "LightningDiT_models",
    "Mlp",
    "ModelName",
    "PatchEmbed",
    "TanhGELU",
    "build_plain",
    "choose_attention",
    "classifier_free_guidance",
    "data_shape",
    "default_guided_channels",
    "find_backbone",
    "find_model",
    "meta_device",
    "model_names",
    "sincos_positions",
    "sinusoid_frequencies",
]
