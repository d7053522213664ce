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
        caches: arguments that hold activations of earlier calls, which may be another expert's. They are refused.
    """

    layers: Sequence[str]
    optional_layers: tuple[str, ...] = ()
    timestep: str | Callable[..., Tensor] = "timestep"
    highest_level: float = 1000
    unbatched: tuple[str, ...] = ()
    batch_dims: Mapping[str, int] = field(default_factory=dict)
    reverses: bool = False
    caches: tuple[str, ...] = ()


def inside(blocks: str, *layers: str) -> tuple[str, ...]:
    """Return the names of layers inside all blocks of a list."""
    return tuple(f"{blocks}.*.{layer}" for layer in layers)


def parts(name: str, *layers: str) -> tuple[str, ...]:
    """Return the names of layers of a module."""
    return tuple(f"{name}.{layer}" for layer in layers)


def attention(name: str) -> tuple[str, ...]:
    """Return the names of the four projections of an attention layer."""
    return parts(name, "to_q", "to_k", "to_v", "to_out.0")


def kandinsky_attention(name: str) -> tuple[str, ...]:
    """Return the names of the four projections of an attention layer of Kandinsky."""
    return parts(name, "to_query", "to_key", "to_value", "out_layer")


def feed_forward(name: str) -> tuple[str, ...]:
    """Return the names of the two layers of an MLP."""
    return parts(name, "net.0.proj", "net.2")


def gated_mlp(name: str) -> tuple[str, ...]:
    """Return the names of the three layers of a gated MLP."""
    return parts(name, "w1", "w2", "w3")


def aura_feed_forward(name: str) -> tuple[str, ...]:
    """Return the names of the three layers of an MLP of AuraFlow."""
    return parts(name, "linear_1", "linear_2", "out_projection")


# The projections of the text in joint attention.
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
# The positions of the tokens.
POSITIONS = ("img_ids", "txt_ids")
# The layers of Flux and of the classes that follow it. In the single blocks, attention and MLP share proj_out.
FLUX = (
    inside("transformer_blocks", *attention("attn"), *feed_forward("ff"))
    + inside("transformer_blocks", *TEXT_ATTENTION, *feed_forward("ff_context"))
    + inside("single_transformer_blocks", *attention("attn")[:3], "proj_mlp", "proj_out")
)
CONTROLNET_OF_FLUX = {"controlnet_block_samples": 0, "controlnet_single_block_samples": 0}
# Those of Wan, and the keys and values of an image, in image-to-video.
WAN = inside("blocks", *attention("attn1"), *attention("attn2"), *feed_forward("ffn"))
IMAGE_OF_WAN = inside("blocks", "attn2.add_k_proj", "attn2.add_v_proj")
# Those of CogVideoX and CogView.
COG = inside("transformer_blocks", *attention("attn1"), *feed_forward("ff"))
# Those of JoyImage-Edit.
JOY = inside("double_blocks", *feed_forward("img_mlp"), *feed_forward("txt_mlp"))
JOY += inside("double_blocks", *parts("attn", "img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj"))
# Those of PixArt.
PIXART = inside("transformer_blocks", *attention("attn1"), *attention("attn2"), *feed_forward("ff"))
# LTX-2: attention in the video and in the audio, to the text, and between video and audio.
ATTENTION_OF_LTX2 = [f"{kind}attn{i}" for kind in ("", "audio_") for i in (1, 2)]
ATTENTION_OF_LTX2 += ["audio_to_video_attn", "video_to_audio_attn"]

# The classes of diffusers, by name, so that diffusers need not be imported. As in the paper, all linear layers of the
# attention and of the MLPs in the blocks are mixed. Modulation, embeddings and the output layer are not. The highest
# level is that of the argument in the pipelines of diffusers, most of which divide the timesteps of Flux and of later
# classes by 1000.
PRESETS = {
    "DiTTransformer2DModel": Preset(COG, batch_dims={"cross_attention_kwargs": 0}),
    "AllegroTransformer3DModel": Preset(PIXART, unbatched=("image_rotary_emb",)),
    "AuraFlowTransformer2DModel": Preset(
        inside("joint_transformer_blocks", *attention("attn"), *TEXT_ATTENTION, *aura_feed_forward("ff"))
        + inside("joint_transformer_blocks", *aura_feed_forward("ff_context"))
        + inside("single_transformer_blocks", *attention("attn"), *aura_feed_forward("ff")),
        highest_level=1,
        batch_dims={"attention_kwargs": 0},
    ),
    # Of the text, the perceiver is not mixed.
    "BriaFibo2Transformer2DModel": Preset(
        inside("layers", *attention("attention"), *gated_mlp("feed_forward"))
        + inside("noise_refiner", *attention("attention"), *gated_mlp("feed_forward")),
        inside("layers", *attention("cross_attention")),
        highest_level=1,
        batch_dims={"context_latents": 0},
    ),
    "BriaFiboTransformer2DModel": Preset(
        FLUX, unbatched=POSITIONS, batch_dims={"text_encoder_layers": 0, "joint_attention_kwargs": 0}
    ),
    "BriaTransformer2DModel": Preset(
        FLUX, unbatched=POSITIONS, batch_dims={"attention_kwargs": 0, **CONTROLNET_OF_FLUX}
    ),
    "ChromaTransformer2DModel": Preset(
        FLUX,
        highest_level=1,
        unbatched=POSITIONS,
        batch_dims={"joint_attention_kwargs": 0, **CONTROLNET_OF_FLUX},
    ),
    "ChronoEditTransformer3DModel": Preset(WAN, IMAGE_OF_WAN, batch_dims={"attention_kwargs": 0}),
    "CogVideoXTransformer3DModel": Preset(
        # image_rotary_emb are the cosines and sines of the positions.
        COG,
        unbatched=("image_rotary_emb",),
        batch_dims={"attention_kwargs": 0},
    ),
    "CogView3PlusTransformer2DModel": Preset(COG),
    "CogView4Transformer2DModel": Preset(COG, batch_dims={"attention_kwargs": 0}),
    "ConsisIDTransformer3DModel": Preset(
        COG, unbatched=("image_rotary_emb",), batch_dims={"id_vit_hidden": 0, "attention_kwargs": 0}
    ),
    "EasyAnimateTransformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *feed_forward("ff")),
        # The last blocks may have no parameters of their own for the text.
        inside("transformer_blocks", *(name.replace("attn", "attn1") for name in TEXT_ATTENTION))
        + inside("transformer_blocks", *feed_forward("txt_ff")),
    ),
    # The first dimension of the inputs of its MLPs is the sequence. They are not mixed.
    "ErnieImageTransformer2DModel": Preset(inside("layers", *attention("self_attention"))),
    "Flux2Transformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), "ff.linear_in", "ff.linear_out")
        + inside("transformer_blocks", *TEXT_ATTENTION, "ff_context.linear_in", "ff_context.linear_out")
        # In these blocks, the projections of attention and MLP are one layer.
        + inside("single_transformer_blocks", "attn.to_qkv_mlp_proj", "attn.to_out"),
        highest_level=1,
        unbatched=POSITIONS,
        batch_dims={"joint_attention_kwargs": 0},
        caches=("kv_cache",),
    ),
    "Flux3Transformer2DModel": Preset(
        inside("mode_blocks.image", *attention("attn"), "ff.linear_in", "ff.linear_out")
        + inside("txt_mode_blocks", *attention("attn"), "ff.linear_in", "ff.linear_out")
        + inside("single_transformer_blocks", *attention("attn"), "ff.linear_in", "ff.linear_out"),
        # Those of reference images, which a call may have.
        inside("mode_blocks.image_cond", *attention("attn"), "ff.linear_in", "ff.linear_out"),
        highest_level=1,
        unbatched=(*POSITIONS, "image_cond_ids"),
        batch_dims={"attention_kwargs": 0},
    ),
    "FluxTransformer2DModel": Preset(
        FLUX,
        highest_level=1,
        unbatched=POSITIONS,
        batch_dims={"joint_attention_kwargs": 0, **CONTROLNET_OF_FLUX},
    ),
    "HeliosTransformer3DModel": Preset(
        WAN,
        # The positions of the frames.
        unbatched=(
            "indices_hidden_states",
            *(f"indices_latents_history_{kind}" for kind in ("short", "mid", "long")),
        ),
        batch_dims={"attention_kwargs": 0},
    ),
    # The routed experts of its MLPs see tokens. They are not mixed.
    "HiDreamImageTransformer2DModel": Preset(
        inside("double_stream_blocks", *parts("block.attn1", "to_q", "to_k", "to_v", "to_out"))
        + inside("double_stream_blocks", *parts("block.attn1", "to_q_t", "to_k_t", "to_v_t", "to_out_t"))
        + inside("double_stream_blocks", *gated_mlp("block.ff_t"))
        + inside("single_stream_blocks", *parts("block.attn1", "to_q", "to_k", "to_v", "to_out")),
        inside("double_stream_blocks", *gated_mlp("block.ff_i"), *gated_mlp("block.ff_i.shared_experts"))
        + inside("single_stream_blocks", *gated_mlp("block.ff_i"), *gated_mlp("block.ff_i.shared_experts")),
        timestep="timesteps",
        # The text of Llama is [layers, B, length, width].
        batch_dims={"encoder_hidden_states_llama3": 1, "attention_kwargs": 0},
    ),
    "HunyuanDiT2DModel": Preset(
        inside("blocks", *attention("attn1"), *attention("attn2"), *feed_forward("ff")),
        unbatched=("image_rotary_emb",),
        batch_dims={"controlnet_block_samples": 0},
    ),
    "HunyuanImageTransformer2DModel": Preset(FLUX, batch_dims={"attention_kwargs": 0}),
    "HunyuanVideo15Transformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *feed_forward("ff"))
        + inside("transformer_blocks", *TEXT_ATTENTION, *feed_forward("ff_context")),
        batch_dims={"attention_kwargs": 0},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Preset(
        FLUX,
        # The positions of the frames.
        unbatched=("indices_latents", *(f"indices_latents_{kind}" for kind in ("clean", "history_2x", "history_4x"))),
        batch_dims={"attention_kwargs": 0},
    ),
    "HunyuanVideoTransformer3DModel": Preset(FLUX, batch_dims={"attention_kwargs": 0}),
    "Ideogram4Transformer2DModel": Preset(
        inside("layers", *attention("attention"), *gated_mlp("feed_forward")),
        highest_level=1,
        reverses=True,
        batch_dims={"attention_kwargs": 0},
    ),
    "JoyImageEditPlusTransformer3DModel": Preset(JOY),
    "JoyImageEditTransformer3DModel": Preset(JOY),
    # The blocks of the text are not mixed.
    "Kandinsky5Transformer3DModel": Preset(
        inside("visual_transformer_blocks", *kandinsky_attention("self_attention"))
        + inside("visual_transformer_blocks", *kandinsky_attention("cross_attention"))
        + inside("visual_transformer_blocks", "feed_forward.in_layer", "feed_forward.out_layer"),
        unbatched=("visual_rope_pos", "text_rope_pos", "scale_factor", "sparse_params"),
    ),
    "Kandinsky6SRTransformer3DModel": Preset(
        inside("visual_transformer_blocks", *kandinsky_attention("self_attention"), *feed_forward("feed_forward")),
    ),
    "Kandinsky6Transformer3DModel": Preset(
        inside("visual_transformer_blocks", *kandinsky_attention("video_dec_block.self_attention"))
        + inside("visual_transformer_blocks", *kandinsky_attention("video_dec_block.cross_attention"))
        + inside("visual_transformer_blocks", *feed_forward("video_dec_block.feed_forward")),
        # Those of the audio, which a call may have.
        inside("visual_transformer_blocks", *kandinsky_attention("audio_dec_block.self_attention"))
        + inside("visual_transformer_blocks", *kandinsky_attention("audio_dec_block.cross_attention"))
        + inside("visual_transformer_blocks", *feed_forward("audio_dec_block.feed_forward"))
        + inside("visual_transformer_blocks", *kandinsky_attention("va_cross_attention"))
        + inside("visual_transformer_blocks", *kandinsky_attention("av_cross_attention")),
        unbatched=("visual_rope_pos",),
    ),
    "Krea2Transformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), "attn.to_gate", *parts("ff", "gate", "up", "down")),
        highest_level=1,
        unbatched=("position_ids",),
        batch_dims={"attention_kwargs": 0},
    ),
    "LTX2VideoTransformer3DModel": Preset(
        inside("transformer_blocks", *(layer for name in ATTENTION_OF_LTX2 for layer in attention(name)))
        + inside("transformer_blocks", *feed_forward("ff"), *feed_forward("audio_ff")),
        # The gates of LTX-2.3.
        inside("transformer_blocks", *(f"{name}.to_gate_logits" for name in ATTENTION_OF_LTX2)),
        unbatched=("spatio_temporal_guidance_blocks",),
        batch_dims={"attention_kwargs": 0},
    ),
    "LTXVideoTransformer3DModel": Preset(
        PIXART, unbatched=("rope_interpolation_scale",), batch_dims={"attention_kwargs": 0}
    ),
    "LatteTransformer3DModel": Preset(
        PIXART + inside("temporal_transformer_blocks", *attention("attn1"), *feed_forward("ff")),
    ),
    "LongCatImageTransformer2DModel": Preset(FLUX, highest_level=1, unbatched=POSITIONS),
    "Lumina2Transformer2DModel": Preset(
        inside("layers", *attention("attn"), *parts("feed_forward", "linear_1", "linear_2", "linear_3"))
        + inside("noise_refiner", *attention("attn"), *parts("feed_forward", "linear_1", "linear_2", "linear_3")),
        highest_level=1,
        reverses=True,
        batch_dims={"attention_kwargs": 0},
    ),
    "LuminaNextDiT2DModel": Preset(
        inside("layers", *attention("attn1")[:3], *attention("attn2"))
        + inside("layers", *parts("feed_forward", "linear_1", "linear_2", "linear_3")),
        highest_level=1,
        reverses=True,
        unbatched=("image_rotary_emb",),
        batch_dims={"cross_attention_kwargs": 0},
    ),
    "MochiTransformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *feed_forward("ff"))
        + inside("transformer_blocks", "attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
        # The last block does not output the text.
        inside("transformer_blocks", "attn1.to_add_out", *feed_forward("ff_context")),
        reverses=True,
        batch_dims={"attention_kwargs": 0},
    ),
    "MotifVideoTransformer3DModel": Preset(
        FLUX,
        # Attention to the text, which some configurations have.
        inside("transformer_blocks", *attention("cross_attn"))
        + inside("single_transformer_blocks", *attention("cross_attn")),
        batch_dims={"attention_kwargs": 0},
    ),
    # The routed experts of its MLPs are no linear layers. They are not mixed.
    "NucleusMoEImageTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *TEXT_ATTENTION[1:3]),
        # The MLPs of some blocks have routed experts, and a shared one.
        inside("transformer_blocks", *feed_forward("img_mlp"), *feed_forward("img_mlp.shared_expert")),
        highest_level=1,
        batch_dims={"attention_kwargs": 0},
    ),
    "OvisImageTransformer2DModel": Preset(
        FLUX, highest_level=1, unbatched=POSITIONS, batch_dims={"joint_attention_kwargs": 0}
    ),
    "PRXTransformer2DModel": Preset(
        inside("blocks", *parts("attention", "img_qkv_proj", "txt_kv_proj", "to_out.0"))
        + inside("blocks", "gate_proj", "up_proj", "down_proj"),
        highest_level=1,
        batch_dims={"attention_kwargs": 0},
    ),
    "PixArtTransformer2DModel": Preset(PIXART, batch_dims={"cross_attention_kwargs": 0}),
    "QwenImage21Transformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *parts("img_mlp", "proj", "out", "gate_layer")),
        highest_level=1,
        batch_dims={"attention_kwargs": 0},
        caches=("kv_cache",),
    ),
    "QwenImageTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *TEXT_ATTENTION)
        + inside("transformer_blocks", *feed_forward("img_mlp"), *feed_forward("txt_mlp")),
        highest_level=1,
        batch_dims={"controlnet_block_samples": 0, "attention_kwargs": 0},
    ),
    "SD3Transformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn"), *feed_forward("ff"), *TEXT_ATTENTION[:3]),
        # The last block does not output the text. SD3.5-medium has a second attention in some blocks.
        inside("transformer_blocks", TEXT_ATTENTION[3], *feed_forward("ff_context"), *attention("attn2")),
        unbatched=("skip_layers",),
        # Lists of tensors: those of the blocks of a ControlNet, and the images of IP-Adapters.
        batch_dims={"block_controlnet_hidden_states": 0, "joint_attention_kwargs": 0},
    ),
    # The MLPs of both are convolutions.
    "SanaTransformer2DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *attention("attn2")),
        batch_dims={"controlnet_block_samples": 0, "attention_kwargs": 0},
    ),
    "SanaVideoTransformer3DModel": Preset(
        inside("transformer_blocks", *attention("attn1"), *attention("attn2")),
        batch_dims={"controlnet_block_samples": 0, "attention_kwargs": 0},
    ),
    # Of several times, those of the frames, the one of the most noise selects the expert.
    "SanaWMTransformer3DModel": Preset(
        inside("blocks", *parts("attn", "qkv", "proj", "beta_proj", "gate_proj", "output_gate"))
        + inside("blocks", *parts("cross_attn", "q_linear", "kv_linear", "proj")),
        # Those of the camera, which a call may have. In some configurations, the MLPs are convolutions.
        inside("blocks", *parts("attn", "q_proj_cam", "k_proj_cam", "v_proj_cam", "out_proj_cam"))
        + inside("blocks", "mlp.fc1", "mlp.fc2"),
        unbatched=("pos_embeds",),
        batch_dims={"data_info": 0, "cam_pos_embeds": 0},
    ),
    "SkyReelsV2Transformer3DModel": Preset(WAN, IMAGE_OF_WAN, batch_dims={"attention_kwargs": 0}),
    "WanAnimateTransformer3DModel": Preset(
        WAN + inside("face_adapter", "to_q", "to_k", "to_v", "to_out"),
        IMAGE_OF_WAN,
        batch_dims={"attention_kwargs": 0},
    ),
    "WanTransformer3DModel": Preset(WAN, IMAGE_OF_WAN, batch_dims={"attention_kwargs": 0}),
    "WanVACETransformer3DModel": Preset(
        WAN + inside("vace_blocks", *attention("attn1"), *attention("attn2"), *feed_forward("ffn")),
        IMAGE_OF_WAN + inside("vace_blocks", "attn2.add_k_proj", "attn2.add_v_proj"),
        unbatched=("control_hidden_states_scale",),
        batch_dims={"attention_kwargs": 0},
    ),
    "ZImageTransformer2DModel": Preset(
        inside("layers", *attention("attention"), *gated_mlp("feed_forward"))
        + inside("noise_refiner", *attention("attention"), *gated_mlp("feed_forward")),
        timestep="t",
        highest_level=1,
        reverses=True,
    ),
}


# Why other classes have no preset. Layers and noise level are given for them.
WITHOUT_PRESET = {
    "AnyFlowFARTransformer3DModel": "a call has two times, `timestep` and `r_timestep`",
    "AnyFlowTransformer3DModel": "a call has two times, `timestep` and `r_timestep`",
    "CosmosTransformer3DModel": "its pipelines pass different numbers: timesteps, sigma / (sigma + 1) or sigma",
    "DreamLiteTransformer2DModel": "it is a part of a U-Net",
    "DualTransformer2DModel": "it is a part of a U-Net",
    "GlmImageTransformer2DModel": "its pipeline passes t - 1: give `timestep` as a function that adds 1",
    "MiniMaxH3Transformer3DModel": "`timestep` holds the distinct times of a batch, which `timestep_indices` selects",
    "OmniGenTransformer2DModel": "`input_image_sizes` names samples by their index, so that no batch can be divided",
    "SanaWMLTX2RefinerTransformer3DModel": "all steps read the keys and values of clean frames: those of expert 0",
    "Transformer2DModel": "it is a part of a U-Net",
    "WanAnimate2Transformer3DModel": "all steps read the keys and values of a reference: those of the last expert",
}


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
            reason = WITHOUT_PRESET.get(name)
            reason = f": {reason}" if reason else f"; presets exist for {', '.join(PRESETS)}"
            raise ValueError(f"layers and timestep must be given for a {name}{reason}")
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
        known.caches,
    )
