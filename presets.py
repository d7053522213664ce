"""Which layers of known transformers are mixed, and which of their arguments holds the noise level."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Preset:
    """How `remix.Remix` wraps a class of transformers.

    Attributes:
        layers: names of the mixed layers, see `remix.Remix`.
        timestep: the argument that holds the noise level.
        highest_level: the largest noise level.
        unbatched: arguments that are no batches.
    """

    layers: tuple[str, ...]
    timestep: str = "timestep"
    highest_level: int = 1000
    unbatched: tuple[str, ...] = ()


def inside(blocks: str, *layers: str) -> tuple[str, ...]:
    """Return the names of layers inside all blocks of a list."""
    return tuple(f"{blocks}.*.{layer}" for layer in layers)


SELF_ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
CROSS_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
JOINT_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")

# The classes of diffusers, by name, so that diffusers need not be imported.
PRESETS = {
    "DiTTransformer2DModel": Preset(inside("transformer_blocks", *SELF_ATTENTION, *FEED_FORWARD)),
    "PixArtTransformer2DModel": Preset(inside("transformer_blocks", *SELF_ATTENTION, *CROSS_ATTENTION, *FEED_FORWARD)),
    "SD3Transformer2DModel": Preset(inside("transformer_blocks", *JOINT_ATTENTION, *FEED_FORWARD)),
    # Its pipeline divides the timesteps by 1000.
    "FluxTransformer2DModel": Preset(
        inside("transformer_blocks", *JOINT_ATTENTION, *FEED_FORWARD)
        + inside("single_transformer_blocks", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"),
        highest_level=1,
        unbatched=("img_ids", "txt_ids"),
    ),
    "WanTransformer3DModel": Preset(inside("blocks", *SELF_ATTENTION, *CROSS_ATTENTION, "ffn.net.0.proj", "ffn.net.2")),
}


def find_preset(module: nn.Module) -> Preset:
    """Return the preset of a module's class.

    Raises:
        ValueError: if the class is not known.
    """
    for kind in type(module).__mro__:
        if kind.__name__ in PRESETS:
            return PRESETS[kind.__name__]
    raise ValueError(
        f"layers and timestep must be given for a {type(module).__name__}; presets exist for {', '.join(PRESETS)}"
    )
