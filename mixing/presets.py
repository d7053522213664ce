"""Which layers of known transformers are mixed, and which of their arguments holds the noise level."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Preset:
    """How `remix.Remix` wraps a class of transformers.

    Attributes:
        layers: names of the mixed layers, see `remix.Remix`.
        optional_layers: names of mixed layers that only some configurations have.
        timestep: the argument that holds the noise level, as its name or as a function of the arguments.
        highest_level: the largest noise level.
        reverses: whether the argument is `highest_level` for data and 0 for noise.
        unbatched: arguments that are no batches.
        batch_dims: dimension of the batch in the tensors of some arguments, which may be lists of such tensors.
    """

    layers: Sequence[str]
    optional_layers: tuple[str, ...] = ()
    timestep: str | Callable[..., Tensor] = "timestep"
    highest_level: float = 1000
    unbatched: tuple[str, ...] = ()
    batch_dims: Mapping[str, int] = field(default_factory=dict)
    reverses: bool = False


def inside(blocks: str, *layers: str) -> tuple[str, ...]:
    """Return the names of layers inside all blocks of a list."""
    return tuple(f"{blocks}.*.{layer}" for layer in layers)


def attention(name: str) -> tuple[str, ...]:
    """Return the names of the four projections of an attention layer."""
    return tuple(f"{name}.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))


def feed_forward(name: str) -> tuple[str, ...]:
    """Return the names of the two layers of an MLP."""
    return f"{name}.net.0.proj", f"{name}.net.2"


def aura_feed_forward(name: str) -> tuple[str, ...]:
    """Return the names of the three layers of an MLP of AuraFlow."""
    return f"{name}.linear_1", f"{name}.linear_2", f"{name}.out_projection"


# The projections of the text in joint attention.
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
# The positions of the tokens.
POSITIONS = ("img_ids", "txt_ids")

# The classes of diffusers, by name, so that diffusers need not be imported. As in the paper, all linear layers of the
# attention and of the MLPs in the blocks are mixed. Modulation, embeddings and the output layer are not.
PRESETS = {
    "DiTTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *feed_forward("ff")),
        batch_dims={"cross_attention_kwargs": 0},
    ),
    "PixArtTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *attention("attn2"), *feed_forward("ff")),
        batch_dims={"cross_attention_kwargs": 0},
    ),
    "SD3Transformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *feed_forward("ff"), *TEXT_ATTENTION[:3]),
        # The last block does not output the text. SD3.5-medium has a second attention in some blocks.
        inside("transformer_blocks", TEXT_ATTENTION[3], *feed_forward("ff_context"), *attention("attn2")),
        unbatched=("skip_layers",),
        # Lists of tensors: those of the blocks of a ControlNet, and the images of IP-Adapters.
        batch_dims={"block_controlnet_hidden_states": 0, "joint_attention_kwargs": 0},
    ),
    "FluxTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *feed_forward("ff"))
        + inside("transformer_blocks", *TEXT_ATTENTION, *feed_forward("ff_context"))
        # In these blocks, attention and MLP share the layer proj_out.
        + inside("single_transformer_blocks", *attention("attn")[:3], "proj_mlp", "proj_out"),
        # Its pipeline divides the timesteps by 1000.
        highest_level=1,
        unbatched=POSITIONS,
        batch_dims={
            "controlnet_block_samples": 0,
            "controlnet_single_block_samples": 0,
            "joint_attention_kwargs": 0,
        },
    ),
    "ChromaTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *feed_forward("ff"))
        + inside("transformer_blocks", *TEXT_ATTENTION, *feed_forward("ff_context"))
        + inside("single_transformer_blocks", *attention("attn")[:3], "proj_mlp", "proj_out"),
        highest_level=1,
        unbatched=POSITIONS,
        batch_dims={
            "controlnet_block_samples": 0,
            "controlnet_single_block_samples": 0,
            "joint_attention_kwargs": 0,
        },
    ),
    "Flux2Transformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), "ff.linear_in", "ff.linear_out")
        + inside("transformer_blocks", *TEXT_ATTENTION, "ff_context.linear_in", "ff_context.linear_out")
        # In these blocks, the projections of attention and MLP are one layer.
        + inside("single_transformer_blocks", "attn.to_qkv_mlp_proj", "attn.to_out"),
        highest_level=1,
        unbatched=POSITIONS,
        batch_dims={"joint_attention_kwargs": 0},
    ),
    "QwenImageTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *TEXT_ATTENTION)
        + inside("transformer_blocks", *feed_forward("img_mlp"), *feed_forward("txt_mlp")),
        highest_level=1,
        batch_dims={"controlnet_block_samples": 0, "attention_kwargs": 0},
    ),
    "AuraFlowTransformer2DModel": Preset(
        inside("joint_transformer_blocks", *attention("attn"), *TEXT_ATTENTION, *aura_feed_forward("ff"))
        + inside("joint_transformer_blocks", *aura_feed_forward("ff_context"))
        + inside("single_transformer_blocks", *attention("attn"), *aura_feed_forward("ff")),
        highest_level=1,
        batch_dims={"attention_kwargs": 0},
    ),
    "Lumina2Transformer2DModel": Preset(
        inside("layers", *attention("attn"), *(f"feed_forward.linear_{i}" for i in (1, 2, 3)))
        + inside("noise_refiner", *attention("attn"), *(f"feed_forward.linear_{i}" for i in (1, 2, 3))),
        highest_level=1,
        reverses=True,
        batch_dims={"attention_kwargs": 0},
    ),
    "ZImageTransformer2DModel": Preset(
        inside("layers", *attention("attention"), *(f"feed_forward.w{i}" for i in (1, 2, 3)))
        + inside("noise_refiner", *attention("attention"), *(f"feed_forward.w{i}" for i in (1, 2, 3))),
        timestep="t",
        highest_level=1,
        reverses=True,
    ),
    "HunyuanVideoTransformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *feed_forward("ff"))
        + inside("transformer_blocks", *TEXT_ATTENTION, *feed_forward("ff_context"))
        + inside("single_transformer_blocks", *attention("attn")[:3], "proj_mlp", "proj_out"),
        batch_dims={"attention_kwargs": 0},
    ),
    "MochiTransformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *feed_forward("ff"))
        + inside("transformer_blocks", "attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
        # The last block does not output the text.
        inside("transformer_blocks", "attn1.to_add_out", *feed_forward("ff_context")),
        reverses=True,
        batch_dims={"attention_kwargs": 0},
    ),
    "LTXVideoTransformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *attention("attn2"), *feed_forward("ff")),
        unbatched=("rope_interpolation_scale",),
        batch_dims={"attention_kwargs": 0},
    ),
    "CogVideoXTransformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *feed_forward("ff")),
        # The cosines and sines of the positions.
        unbatched=("image_rotary_emb",),
        batch_dims={"attention_kwargs": 0},
    ),
    "CogView4Transformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *feed_forward("ff")),
        batch_dims={"attention_kwargs": 0},
    ),
    # Its MLPs are convolutions.
    "SanaTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *attention("attn2")),
        batch_dims={"controlnet_block_samples": 0, "attention_kwargs": 0},
    ),
    "WanTransformer3DModel": Preset(
        inside("blocks", *attention("attn1"), *attention("attn2"), *feed_forward("ffn")),
        # The keys and values of an image, in Wan 2.1 image-to-video.
        inside("blocks", "attn2.add_k_proj", "attn2.add_v_proj"),
        batch_dims={"attention_kwargs": 0},
    ),
}


def preset_table() -> list[str]:
    """Return the lines of the table of docs/any-transformer.md."""
    rows = [
        f"| `{name}` | `{preset.timestep}` | {preset.highest_level:g} | {'data' if preset.reverses else 'noise'} |"
        for name, preset in sorted(PRESETS.items())
    ]
    return ["| class | argument | highest level | the highest level is |", "| --- | --- | --- | --- |", *rows]


def complete_preset(module: nn.Module, given: Preset, boundaries: Sequence[float] | None) -> Preset:
    """Return how a module is wrapped: as the arguments say, and otherwise as the preset of its class.

    Args:
        module: the module.
        given: what the arguments of a Remix give. Of its layers, timestep and highest_level, None stands for that of
            the class. Its unbatched and batch_dims are added to those of the class.
        boundaries: boundaries between experts or stages. They end at the highest noise level of a class that is not
            known.

    Raises:
        ValueError: if the module is no `nn.Module`, if it lacks an argument that is named, or if something is
            missing and the class is not known.
    """
    name = type(module).__name__
    layers, timestep, highest_level = given.layers, given.timestep, given.highest_level
    unbatched, batch_dims = given.unbatched, given.batch_dims
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be an nn.Module, such as a pipeline's transformer, but it is a {name}")
    if isinstance(unbatched, str):
        raise ValueError(f"unbatched must be a list of names of arguments, but it is {unbatched!r}")
    parameters = inspect.signature(module.forward).parameters
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        for argument in (*unbatched, *batch_dims):
            if argument not in parameters:
                raise ValueError(f"{name}.forward has no argument {argument!r}, only {', '.join(parameters)}")
    known = next((PRESETS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in PRESETS), None)
    if known is None:
        if layers is None or timestep is None:
            raise ValueError(f"layers and timestep must be given for a {name}; presets exist for {', '.join(PRESETS)}")
        if highest_level is None and boundaries is None:
            raise ValueError(f"highest_level or boundaries must be given for a {name}: its highest noise level")
        known = Preset(layers, highest_level=float(boundaries[-1]) if highest_level is None else highest_level)
    elif isinstance(known.timestep, str) and known.timestep not in parameters:
        raise ValueError(f"the preset of a {name} does not fit this version of it, which has no {known.timestep!r}")
    return Preset(
        known.layers if layers is None else layers,
        known.optional_layers if layers is None else (),
        timestep or known.timestep,
        known.highest_level if highest_level is None else highest_level,
        (*unbatched, *known.unbatched),
        {**known.batch_dims, **batch_dims},
        known.reverses and timestep in (None, known.timestep),
    )
