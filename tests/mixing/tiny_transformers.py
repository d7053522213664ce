"""Tiny models of the classes of diffusers that have presets, and the arguments of a call of each."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from mixing.presets import PRESETS, feed_forward
from remix import Remix

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
SIDE, TEXT = 4, 5
# Noise levels of four samples, relative to the highest one, and the experts of N = 4 that own them.
LEVELS, EXPERTS = torch.tensor([0.1, 0.9, 0.3, 0.95]), [0, 3, 1, 3]


def image(n: int, channels: int = 4) -> dict:
    return dict(hidden_states=torch.randn(n, channels, SIDE, SIDE))


def text(n: int, width: int = 16, name: str = "encoder_hidden_states", length: int = TEXT) -> dict:
    return {name: torch.randn(n, length, width)}


def tokens(n: int, width: int = 4) -> dict:
    return dict(hidden_states=torch.randn(n, SIDE * SIDE, width))


def positions(axes: int = 3) -> dict:
    grid = torch.arange(SIDE * SIDE * float(axes)).view(-1, axes) % SIDE
    return dict(img_ids=grid, txt_ids=torch.zeros(TEXT, axes))


def video(n: int, channels: int = 4) -> dict:
    return dict(hidden_states=torch.randn(n, channels, 2, SIDE, SIDE))


def mask(n: int, name: str = "encoder_attention_mask", length: int = TEXT) -> dict:
    return {name: torch.ones(n, length, dtype=torch.bool)}


def sizes(n: int) -> dict:
    return {name: torch.full((n, 2), 4.0) for name in ("original_size", "target_size", "crop_coords")}


def packed_text(n: int) -> dict:
    """A sequence of text and image in which the role of each token is given."""
    length, where = TEXT + SIDE * SIDE, torch.arange(TEXT + SIDE * SIDE)
    roles = torch.where(where < TEXT, 3, 2).expand(n, -1)
    grid = torch.stack([where, where // SIDE, where % SIDE], -1).expand(n, -1, -1)
    return dict(hidden_states=torch.randn(n, length, 4), **text(n, length=length)) | dict(
        position_ids=grid, segment_ids=torch.zeros(n, length, dtype=torch.long), indicator=roles
    )


@dataclass
class Tiny:
    """A tiny model.

    Attributes:
        settings: arguments of the class.
        arguments: return the arguments of a call with n samples, without the noise level.
        unused: names of mixed layers without gradients: the text that the last block computes and does not use.
        without: what is not tested or does not exist, each with the reason: "pipeline", "compile", "checkpointing" or
            "LoRA".
        lora: what reads files of LoRA: "pipeline", or "transformer" if its pipeline has no `load_lora_weights`.
        times: what the argument of the noise level holds for samples with some times [n].
    """

    settings: dict
    arguments: Callable[[int], dict]
    unused: tuple[str, ...] = ()
    without: dict[str, str] = field(default_factory=dict)
    lora: str = "pipeline"
    times: Callable[[torch.Tensor], torch.Tensor] = lambda t: t


NO_LORA = {"LoRA": "diffusers reads none"}
NO_CHECKPOINTING = {"checkpointing": "diffusers has none"}
NO_GRAPH = {"compile": "its graph breaks"}

# The layers of the text in a last block that uses only its keys and values.
LAST_TEXT = ("attn.add_q_proj", "attn.to_add_out")
FLUX = dict(**HEADS, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(4, 4, 8))
WAN = dict(**HEADS, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)
WAN |= dict(rope_max_seq_len=32)
COGVIDEO = dict(**HEADS, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=16, num_layers=2)
COGVIDEO |= dict(sample_width=SIDE, sample_height=SIDE, sample_frames=5, max_text_seq_length=TEXT)
COGVIEW = dict(**HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=16, time_embed_dim=8)
COGVIEW |= dict(condition_dim=4, pos_embed_max_size=8, sample_size=SIDE)
HUNYUAN = dict(**HEADS, in_channels=4, out_channels=4, num_layers=1, num_refiner_layers=1, text_embed_dim=16)
JOY = dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 4, 8])
LAST_TEXT_OF_JOY = tuple(f"double_blocks.1.{name}" for name in ("attn.txt_attn_proj", *feed_forward("txt_mlp")))
PIXART = dict(**HEADS, sample_size=SIDE, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4)

TINY = {
    "AllegroTransformer3DModel": Tiny(
        dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2)
        | dict(cross_attention_dim=48, sample_height=SIDE, sample_width=SIDE, sample_frames=2, caption_channels=16),
        lambda n: video(n) | text(n) | mask(n) | dict(image_rotary_emb=allegro_positions()),
        without=NO_LORA,
    ),
    "AuraFlowTransformer2DModel": Tiny(
        dict(**HEADS, sample_size=SIDE, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16)
        | dict(caption_projection_dim=32, pos_embed_max_size=16),
        lambda n: image(n) | text(n),
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16)
        | dict(injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4)
        | dict(gist_step=1, gist_min_text_len=2, gist_max_text_len=8, axes_dims=(4, 4, 8), axes_lens=(64, 32, 32)),
        lambda n: image(n) | dict(encoder_hidden_states=torch.randn(n, 2, TEXT, 16)),
    ),
    "BriaFiboTransformer2DModel": Tiny(
        FLUX | dict(text_encoder_dim=16),
        lambda n: tokens(n) | text(n) | positions() | dict(text_encoder_layers=[torch.randn(n, TEXT, 16)] * 2),
    ),
    "BriaTransformer2DModel": Tiny(FLUX, lambda n: tokens(n) | text(n) | positions(), lora="transformer"),
    "ChromaTransformer2DModel": Tiny(
        FLUX | dict(approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1),
        lambda n: tokens(n) | text(n) | positions(),
    ),
    "ChronoEditTransformer3DModel": Tiny(WAN, lambda n: video(n) | text(n)),
    "CogVideoXTransformer3DModel": Tiny(
        COGVIDEO, lambda n: dict(hidden_states=torch.randn(n, 2, 4, SIDE, SIDE)) | text(n)
    ),
    "CogView3PlusTransformer2DModel": Tiny(COGVIEW, lambda n: image(n) | text(n) | sizes(n), without=NO_LORA),
    "CogView4Transformer2DModel": Tiny(COGVIEW | dict(rope_axes_dim=(8, 8)), lambda n: image(n) | text(n) | sizes(n)),
    "ConsisIDTransformer3DModel": Tiny(
        COGVIDEO,
        lambda n: dict(hidden_states=torch.randn(n, 2, 4, SIDE, SIDE)) | text(n),
        without={"pipeline": "needs OpenCV"},
        lora="transformer",
    ),
    "DiTTransformer2DModel": Tiny(
        PIXART | dict(num_embeds_ada_norm=10),
        lambda n: image(n) | dict(class_labels=torch.arange(n) % 10),
        without=NO_LORA,
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=4, patch_size=2, sample_width=SIDE, sample_height=SIDE)
        | dict(num_layers=2, mmdit_layers=1, time_embed_dim=4, text_embed_dim=16),
        lambda n: video(n) | text(n),
        without=NO_LORA,
    ),
    "ErnieImageTransformer2DModel": Tiny(
        dict(hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4)
        | dict(text_in_dim=16, rope_axes_dim=(4, 4, 8)),
        lambda n: image(n) | text(n, name="text_bth") | dict(text_lens=torch.full((n,), TEXT)),
    ),
    "Flux2Transformer2DModel": Tiny(
        FLUX | dict(axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16),
        lambda n: tokens(n) | text(n) | positions(4) | dict(guidance=torch.rand(n)),
    ),
    "Flux3Transformer2DModel": Tiny(
        FLUX | dict(cond_in_channels=4, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda n: (
            tokens(n)
            | text(n)
            | positions(4)
            | dict(image_cond_hidden_states=torch.randn(n, 4, 4), image_cond_ids=torch.ones(4, 4))
        ),
        without={"pipeline": "only modular"},
        lora="transformer",
    ),
    "FluxTransformer2DModel": Tiny(
        FLUX | dict(pooled_projection_dim=16, guidance_embeds=True),
        lambda n: (
            tokens(n) | text(n) | positions() | dict(pooled_projections=torch.randn(n, 16), guidance=torch.rand(n))
        ),
    ),
    "HeliosTransformer3DModel": Tiny(
        {key: value for key, value in WAN.items() if key != "rope_max_seq_len"} | dict(rope_dim=(4, 4, 8)),
        lambda n: (
            video(n)
            | text(n)
            | dict(indices_hidden_states=torch.arange(7, 9)[None])
            | {f"indices_latents_history_{kind}": torch.arange(2)[None] for kind in ("short", "mid")}
            | dict(indices_latents_history_long=torch.arange(4)[None])
            | dict(latents_history_short=torch.randn(n, 4, 2, SIDE, SIDE))
            | dict(latents_history_mid=torch.randn(n, 4, 2, SIDE, SIDE))
            | dict(latents_history_long=torch.randn(n, 4, 4, SIDE, SIDE))
        ),
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        dict(**HEADS, patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, caption_channels=[16, 16])
        | dict(text_emb_dim=16, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 4, 8))
        | dict(max_resolution=(8, 8), llama_layers=[0, 1]),
        lambda n: (
            image(n)
            | text(n, name="encoder_hidden_states_t5")
            | dict(encoder_hidden_states_llama3=torch.randn(2, n, TEXT, 16), pooled_embeds=torch.randn(n, 16))
        ),
        without=NO_GRAPH,
    ),
    "HunyuanDiT2DModel": Tiny(
        dict(**HEADS, in_channels=4, patch_size=2, sample_size=SIDE, hidden_size=32, num_layers=2)
        | dict(cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=TEXT)
        | dict(text_len_t5=TEXT, activation_fn="gelu-approximate"),
        lambda n: (
            image(n)
            | text(n)
            | text(n, name="encoder_hidden_states_t5")
            | mask(n, "text_embedding_mask")
            | mask(n, "text_embedding_mask_t5")
            | dict(image_meta_size=torch.rand(n, 6), style=torch.zeros(n, dtype=torch.long))
            | dict(image_rotary_emb=(torch.rand(4, 16), torch.rand(4, 16)))
        ),
        without=NO_LORA | NO_CHECKPOINTING,
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        HUNYUAN | dict(num_single_layers=1, text_embed_2_dim=8, rope_axes_dim=(8, 8)),
        lambda n: (
            image(n) | text(n) | mask(n) | text(n, 8, "encoder_hidden_states_2") | mask(n, "encoder_attention_mask_2")
        ),
        without=NO_GRAPH,
        lora="transformer",
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        HUNYUAN | dict(text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(4, 4, 8)),
        lambda n: (
            video(n)
            | text(n)
            | mask(n)
            | text(n, 8, "encoder_hidden_states_2")
            | mask(n, "encoder_attention_mask_2")
            | text(n, 8, "image_embeds", 3)
        ),
        without=NO_GRAPH,
        lora="transformer",
        unused=tuple(f"transformer_blocks.0.{name}" for name in (*LAST_TEXT, *feed_forward("ff_context"))),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        HUNYUAN
        | dict(num_single_layers=1, pooled_projection_dim=8, rope_axes_dim=(4, 4, 8))
        | dict(has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True),
        lambda n: (
            video(n)
            | text(n)
            | mask(n)
            | text(n, 8, "image_embeds", 3)
            | dict(pooled_projections=torch.randn(n, 8), guidance=torch.full((n,), 1000.0))
            | dict(indices_latents=torch.arange(2), indices_latents_clean=torch.arange(2))
            | dict(indices_latents_history_2x=torch.arange(2), indices_latents_history_4x=torch.arange(4))
            | dict(latents_clean=torch.randn(n, 4, 2, SIDE, SIDE))
            | dict(latents_history_2x=torch.randn(n, 4, 2, SIDE, SIDE))
            | dict(latents_history_4x=torch.randn(n, 4, 4, SIDE, SIDE))
        ),
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        HUNYUAN | dict(num_single_layers=1, pooled_projection_dim=8, rope_axes_dim=(4, 4, 8)),
        lambda n: (
            video(n) | text(n) | mask(n) | dict(pooled_projections=torch.randn(n, 8), guidance=torch.full((n,), 1000.0))
        ),
    ),
    "Ideogram4Transformer2DModel": Tiny(
        dict(**HEADS, in_channels=4, num_layers=2, intermediate_size=32, adaln_dim=8, llm_features_dim=16)
        | dict(mrope_section=(4, 2, 2)),
        packed_text,
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        JOY,
        # Patches of a target of 4 and of a reference of 2, and one of padding.
        lambda n: (
            dict(hidden_states=torch.randn(n, 7, 4, 1, 2, 2), shape_list=[[(1, 2, 2), (1, 1, 2)]] * n)
            | text(n)
            | mask(n, "encoder_hidden_states_mask")
        ),
        unused=LAST_TEXT_OF_JOY,
        without=NO_LORA,
    ),
    "JoyImageEditTransformer3DModel": Tiny(JOY, lambda n: video(n) | text(n), unused=LAST_TEXT_OF_JOY, without=NO_LORA),
    "Kandinsky5Transformer3DModel": Tiny(
        dict(in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=32, ff_dim=32)
        | dict(num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 8)),
        lambda n: (
            dict(hidden_states=torch.randn(n, 2, SIDE, SIDE, 4), pooled_projections=torch.randn(n, 8))
            | text(n)
            | dict(
                visual_rope_pos=[torch.arange(2), torch.arange(2), torch.arange(2)], text_rope_pos=torch.arange(TEXT)
            )
        ),
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        dict(in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=32, ff_dim=32, num_visual_blocks=2)
        | dict(axes_dims=(4, 4, 8), tile_sizes=((128, 128),)),
        lambda n: dict(hidden_states=torch.randn(n, 2, 8, 8, 9)),
        lora="transformer",
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, model_dim=32, ff_dim=32)
        | dict(num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8), in_audio_dim=4, out_audio_dim=4)
        | dict(ca_rope=True, cross_gates=True, fix_modulation=True, visual_token_type_num_embeddings=2),
        lambda n: (
            dict(hidden_states=torch.randn(n, 2, SIDE, SIDE, 9), pooled_projections=torch.randn(n, 8))
            | text(n)
            | text(n, 4, "audio_hidden_states", 3)
            # The second frame is a reference at the position of the first one.
            | dict(visual_rope_pos=(torch.zeros(2).long(), torch.arange(2), torch.arange(2)))
            | dict(visual_token_type_ids=torch.arange(2).expand(n, -1))
        ),
        lora="transformer",
    ),
    "Krea2Transformer2DModel": Tiny(
        dict(**HEADS, in_channels=4, num_layers=2, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16)
        | dict(text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2)
        | dict(text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1)
        | dict(axes_dims_rope=(4, 4, 8)),
        lambda n: (
            tokens(n)
            | dict(encoder_hidden_states=torch.randn(n, TEXT, 2, 16))
            | mask(n)
            | dict(position_ids=torch.arange(3.0 * (TEXT + SIDE * SIDE)).view(-1, 3) % SIDE)
        ),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4)
        | dict(audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2)
        | dict(caption_channels=16, gated_attn=True, audio_gated_attn=True),
        lambda n: (
            tokens(n)
            | text(n)
            | text(n, name="audio_encoder_hidden_states")
            | text(n, 4, "audio_hidden_states", 3)
            | dict(num_frames=1, height=SIDE, width=SIDE, audio_num_frames=3, fps=24.0)
        ),
    ),
    "LTXVideoTransformer3DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=16),
        lambda n: tokens(n) | text(n) | mask(n) | dict(num_frames=1, height=SIDE, width=SIDE),
    ),
    "LatteTransformer3DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=SIDE)
        | dict(patch_size=2, caption_channels=16, video_length=2, norm_type="ada_norm_single")
        | dict(num_embeds_ada_norm=1000, activation_fn="gelu-approximate", attention_bias=True)
        | dict(norm_elementwise_affine=False, norm_eps=1e-6),
        lambda n: video(n) | text(n),
        without=NO_LORA,
    ),
    "LongCatImageTransformer2DModel": Tiny(
        FLUX | dict(pooled_projection_dim=16),
        lambda n: tokens(n) | text(n) | positions(),
        lora="transformer",
    ),
    "Lumina2Transformer2DModel": Tiny(
        dict(sample_size=SIDE, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, cap_feat_dim=16)
        | dict(num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(32, 16, 16)),
        lambda n: image(n) | text(n) | mask(n),
        without=NO_GRAPH,
    ),
    "LuminaNextDiT2DModel": Tiny(
        dict(sample_size=SIDE, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1)
        | dict(multiple_of=16, cross_attention_dim=16),
        lambda n: (
            image(n)
            | text(n)
            | mask(n, "encoder_mask")
            | dict(image_rotary_emb=lumina_positions(), cross_attention_kwargs={})
        ),
        without=NO_LORA | NO_CHECKPOINTING,
    ),
    "MochiTransformer3DModel": Tiny(
        dict(**HEADS, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4)
        | dict(max_sequence_length=TEXT),
        lambda n: video(n) | text(n) | mask(n),
        unused=("transformer_blocks.1.attn1.add_q_proj",),
    ),
    "MotifVideoTransformer3DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, num_decoder_layers=1)
        | dict(text_embed_dim=16, rope_axes_dim=(4, 4, 8), enable_text_cross_attention_dual=True)
        | dict(enable_text_cross_attention_single=True),
        lambda n: video(n) | text(n) | mask(n),
        lora="transformer",
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        dict(**HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8))
        | dict(dense_moe_strategy="leave_first_block_dense", num_experts=2, moe_intermediate_dim=16, mlp_ratio=6.0)
        | dict(capacity_factors=1.0),
        lambda n: (
            tokens(n, 16) | text(n) | mask(n, "encoder_hidden_states_mask") | dict(img_shapes=[(1, SIDE, SIDE)] * n)
        ),
        lora="transformer",
    ),
    "OvisImageTransformer2DModel": Tiny(FLUX, lambda n: tokens(n) | text(n) | positions(), lora="transformer"),
    "PRXTransformer2DModel": Tiny(
        dict(in_channels=4, context_in_dim=16, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]),
        lambda n: image(n) | text(n),
        without=NO_LORA,
    ),
    "PixArtTransformer2DModel": Tiny(
        PIXART | dict(cross_attention_dim=32, caption_channels=16, use_additional_conditions=False),
        lambda n: image(n) | text(n) | dict(added_cond_kwargs=dict(resolution=None, aspect_ratio=None)),
        without=NO_LORA,
    ),
    "QwenImage21Transformer2DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=2, context_in_dim=16, axes_dims_rope=(4, 4, 8)),
        lambda n: (
            tokens(n)
            | text(n)
            | dict(img_shapes=[[(1, SIDE, SIDE)]] * n, img_mask=(torch.arange(TEXT + 4) >= TEXT).expand(n, -1))
        ),
        without=NO_GRAPH,
    ),
    "QwenImageTransformer2DModel": Tiny(
        dict(**HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8)),
        lambda n: (
            tokens(n, 16)
            | text(n)
            | dict(img_shapes=[[(1, SIDE, SIDE)]] * n, encoder_hidden_states_mask=torch.ones(n, TEXT, dtype=torch.long))
        ),
        unused=tuple(f"transformer_blocks.1.{name}" for name in (*LAST_TEXT, *feed_forward("txt_mlp"))),
    ),
    "SD3Transformer2DModel": Tiny(
        dict(**HEADS, sample_size=SIDE, pos_embed_max_size=8, in_channels=4, out_channels=4, num_layers=2)
        | dict(joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16)
        | dict(dual_attention_layers=(0,), qk_norm="rms_norm"),
        lambda n: image(n) | text(n) | dict(pooled_projections=torch.randn(n, 16)),
        unused=("transformer_blocks.1.attn.add_q_proj",),
    ),
    "SanaTransformer2DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, sample_size=SIDE)
        | dict(cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16),
        lambda n: image(n) | text(n),
    ),
    "SanaVideoTransformer3DModel": Tiny(
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, sample_size=SIDE)
        | dict(cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16, rope_max_seq_len=32),
        lambda n: video(n) | text(n),
    ),
    "SanaWMTransformer3DModel": Tiny(
        dict(in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16)
        | dict(caption_channels=16, chunk_plucker_channels=4),
        lambda n: (
            video(n)
            | dict(encoder_hidden_states=torch.randn(n, 1, TEXT, 16))
            | mask(n)
            | dict(camera_conditions=cameras(n), chunk_plucker=torch.randn(n, 4, 2, SIDE, SIDE))
        ),
        # The gates of a block with softmax.
        unused=("blocks.1.attn.beta_proj", "blocks.1.attn.gate_proj"),
        without=NO_LORA,
        # The first frame is clean.
        times=lambda t: torch.stack([0 * t, t], -1)[:, None],
    ),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, lambda n: video(n) | text(n)),
    "WanAnimateTransformer3DModel": Tiny(
        WAN
        | dict(in_channels=12, latent_channels=4, image_dim=8, added_kv_proj_dim=32, inject_face_latents_blocks=2)
        | dict(motion_encoder_channel_sizes={"16": 4, "8": 4, "4": 4}, motion_encoder_size=16, motion_style_dim=8)
        | dict(motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2),
        lambda n: (
            video(n, 12)
            | text(n, length=512)
            | text(n, 8, "encoder_hidden_states_image", 3)
            | dict(pose_hidden_states=torch.randn(n, 4, 1, SIDE, SIDE), face_pixel_values=torch.randn(n, 3, 1, 16, 16))
        ),
    ),
    "WanTransformer3DModel": Tiny(
        WAN | dict(image_dim=8, added_kv_proj_dim=32),
        lambda n: video(n) | text(n, length=512) | text(n, 8, "encoder_hidden_states_image", 3),
    ),
    "WanVACETransformer3DModel": Tiny(
        WAN | dict(vace_layers=[0, 1], vace_in_channels=8),
        lambda n: video(n) | text(n) | dict(control_hidden_states=torch.randn(n, 8, 2, SIDE, SIDE)),
    ),
    "ZImageTransformer2DModel": Tiny(
        dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16)
        | dict(axes_dims=[4, 4, 8], axes_lens=[64, 32, 32]),
        lambda n: dict(x=[*torch.randn(n, 4, 1, SIDE, SIDE)], cap_feats=[*torch.randn(n, TEXT, 16)]),
    ),
}


def cameras(n: int) -> torch.Tensor:
    """A camera for each of two frames of n videos: its pose as a matrix, the focal lengths and the center."""
    poses = torch.eye(4).repeat(n, 2, 1, 1)
    poses[:, :, :3, 3] = torch.rand(n, 2, 3)
    return torch.cat([poses.flatten(2), torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(n, 2, -1)], -1)


def allegro_positions() -> tuple:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *angles, frames, rows, columns = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (2, 2)), (2, 2), 2)
    grid = torch.cartesian_prod(frames.long(), rows.long(), columns.long())
    return tuple(angles), tuple(grid.T.unsqueeze(1))


def lumina_positions() -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(16, 384, 384)


def tiny(name: str, **settings) -> nn.Module:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    module = getattr(importlib.import_module("diffusers"), name)(**TINY[name].settings | settings).eval()
    for key, parameter in module.named_parameters():
        # The routed experts of Nucleus are not initialized.
        if not parameter.any() or key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            nn.init.normal_(parameter, std=0.1)
    return module


def randomize(remix: Remix, std: float = 0.1) -> Remix:
    """Make the bases of a Remix differ."""
    with torch.no_grad():
        for _, layer in remix.mixed():
            for basis in layer.bases():
                basis += std * torch.randn_like(basis)
    return remix


def arguments_of(name: str) -> dict:
    """The arguments of four samples of three experts."""
    torch.manual_seed(1)
    preset = PRESETS[name]
    levels = 1 - LEVELS if preset.reverses else LEVELS
    times = TINY[name].times(levels * preset.highest_level)
    return TINY[name].arguments(len(LEVELS)) | {preset.timestep: times}
