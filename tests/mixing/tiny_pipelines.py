"""The pipelines of diffusers around tiny transformers, without text encoders. Random embeddings replace the prompts."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from tiny_transformers import SIDE, TEXT, TINY, packed_text, tiny
from torch import Tensor, nn

from mixing.presets import PRESETS

STEPS = 8


def normal(*shape: int) -> Tensor:
    """The same random numbers in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def embeddings(*names: str, shape: tuple[int, ...] = (1, TEXT, 16)) -> dict:
    """Embeddings of a prompt and of a negative prompt, by the names of the arguments."""
    return {f"{kind}{name}": normal(*shape) for name in names for kind in ("", "negative_")}


def masks(*names: str) -> dict:
    return {f"{kind}{name}": torch.ones(1, TEXT, dtype=torch.bool) for name in names for kind in ("", "negative_")}


def diffusers(name: str, **settings) -> Any:
    """An object of a class of diffusers, which is imported only when it is needed."""
    return getattr(importlib.import_module("diffusers"), name)(**settings)


# Its shift depends on the size of the image.
SHIFTED = dict(use_dynamic_shifting=True)


@dataclass
class Run:
    """How a pipeline runs.

    Attributes:
        pipeline: name of its class. None: there is none to run, and its `scheduler` drives the transformer.
        shift: arguments of its scheduler.
        scheduler: name of the class of its scheduler.
        call: more arguments of a call. The others, see `arguments`, are found by their names.
        parts: a function that returns other parts, such as an autoencoder. Those that are missing are None.
        settings: changes of the settings of the transformer.
        prepare: is called with the pipeline, to replace what needs a text encoder or an image encoder.
        argument: without a pipeline, what the pipeline of the class makes of a timestep of the scheduler.
    """

    pipeline: str | None
    shift: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    parts: Callable[[], dict] = dict
    settings: dict = field(default_factory=dict)
    prepare: Callable = lambda pipe: None
    argument: Callable[[Tensor], Tensor] = lambda t: t


class Part:
    """Only what a pipeline reads of a part that does not compute anything for latents."""

    def __init__(self, config: dict, **attributes):
        vars(self).update(attributes, config=type("Config", (), config))


class Connectors(nn.Module):
    """The text of LTX-2 for video and audio."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, text: Tensor, mask: Tensor, padding_side: str) -> tuple[Tensor, Tensor, Tensor]:
        return text, text / 2, mask


def autoencoder(**settings) -> nn.Module:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    torch.manual_seed(0)
    return diffusers(
        "AutoencoderKL", **blocks, latent_channels=4, block_out_channels=[8, 8], norm_num_groups=4, **settings
    )


def wan_autoencoder() -> nn.Module:
    torch.manual_seed(0)
    down = [False, True, True]
    return diffusers(
        "AutoencoderKLWan", base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=down
    )


def hunyuan_autoencoder() -> nn.Module:
    torch.manual_seed(0)
    blocks = {f"{kind.lower()}_block_types": [f"HunyuanVideo{kind}Block3D"] * 4 for kind in ("Down", "Up")}
    return diffusers(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        **blocks,
    )


def helios_autoencoder() -> Part:
    scales = dict(scale_factor_temporal=4, scale_factor_spatial=8)
    return Part(
        dict(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4) | scales,
        dtype=torch.float32,
        decode=lambda latents, return_dict: (latents,),
    )


def kandinsky_autoencoder() -> Part:
    """Instead of an image, the first latents are random numbers. The image consists of the first three channels."""
    return Part(
        dict(scaling_factor=1.0),
        dtype=torch.float32,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
        encode=lambda video, return_dict: (Part({}, mode=lambda: normal(1, 4, 1, 8, 8)),),
        decode=lambda latents, return_dict: (latents[:, :3].repeat_interleave(16, 3).repeat_interleave(16, 4) / 10,),
    )


def prepare_fibo(pipe):
    text, layers = normal(1, TEXT, 16), [normal(1, TEXT, 16)] * 2
    ones = torch.ones(1, TEXT)
    pipe.encode_prompt = lambda **_: (text, -text, torch.zeros(1, TEXT, 3), ones, ones, layers, layers)


def prepare_ideogram(pipe):
    packed = packed_text(1)
    roles = [packed[name] for name in ("position_ids", "segment_ids", "indicator")]
    pipe.encode_prompt = lambda **_: (normal(1, TEXT + SIDE * SIDE, 16), *roles)


def prepare_joy(pipe):
    pipe.encode_prompt_multiple_images = lambda **_: (normal(1, TEXT, 16), torch.ones(1, TEXT))


def prepare_longcat(pipe):
    pipe._encode_prompt = lambda prompt: normal(1, TEXT, 16)


def prepare_image(pipe):
    pipe.encode_image = lambda *_, **__: normal(1, 3, 8)


def prepare_sana_wm(pipe):
    pipe._encode_first_frame = lambda *_: normal(1, 4, 1, 4, 4)


PICTURE = dict(image=Image.new("RGB", (32, 32), (100, 150, 200)), height=32, width=32)
NO_BINS = dict(use_resolution_binning=False)
TWO_TEXTS = embeddings("prompt_embeds_2", shape=(1, TEXT, 8)) | masks("prompt_embeds_mask_2")

RUNS = {
    "AllegroTransformer3DModel": Run(
        "AllegroPipeline", scheduler="EulerAncestralDiscreteScheduler", call=dict(num_frames=8, negative_prompt=None)
    ),
    "AuraFlowTransformer2DModel": Run("AuraFlowPipeline"),
    "BriaFibo2Transformer2DModel": Run(
        "BriaFibo2Pipeline", SHIFTED, embeddings("prompt_embeds", shape=(1, 2, TEXT, 16))
    ),
    "BriaFiboTransformer2DModel": Run("BriaFiboPipeline", SHIFTED, dict(prompt=""), prepare=prepare_fibo),
    "BriaTransformer2DModel": Run("BriaPipeline", parts=lambda: dict(vae=autoencoder(shift_factor=0.1))),
    "ChromaTransformer2DModel": Run(
        "ChromaPipeline", call=masks("prompt_attention_mask"), settings=dict(in_channels=16)
    ),
    "ChronoEditTransformer3DModel": Run(
        "ChronoEditPipeline",
        call=PICTURE | embeddings("prompt_embeds", shape=(1, 512, 16)),
        parts=lambda: dict(vae=wan_autoencoder()),
        settings=dict(in_channels=36, out_channels=16, image_dim=8, added_kv_proj_dim=32),
        prepare=prepare_image,
    ),
    "CogVideoXTransformer3DModel": Run("CogVideoXPipeline", scheduler="CogVideoXDDIMScheduler"),
    "CogView3PlusTransformer2DModel": Run("CogView3PlusPipeline", scheduler="CogVideoXDDIMScheduler"),
    "CogView4Transformer2DModel": Run("CogView4Pipeline", SHIFTED),
    "ConsisIDTransformer3DModel": Run(None, scheduler="CogVideoXDPMScheduler"),
    "DiTTransformer2DModel": Run(
        "DiTPipeline",
        scheduler="DDIMScheduler",
        call=dict(class_labels=[1], output_type="np"),
        parts=lambda: dict(vae=autoencoder()),
        settings=dict(num_embeds_ada_norm=1000),
    ),
    "EasyAnimateTransformer3DModel": Run(
        "EasyAnimatePipeline",
        parts=lambda: dict(
            vae=Part(dict(latent_channels=4), spatial_compression_ratio=8, temporal_compression_ratio=4)
        ),
    ),
    "ErnieImageTransformer2DModel": Run(
        "ErnieImagePipeline",
        call={f"{kind}prompt_embeds": [normal(TEXT, 16)] for kind in ("", "negative_")},
    ),
    "Flux2Transformer2DModel": Run("Flux2Pipeline", SHIFTED),
    "Flux3Transformer2DModel": Run(None, argument=lambda t: t / 1000),
    "FluxTransformer2DModel": Run("FluxPipeline"),
    "HeliosTransformer3DModel": Run(
        "HeliosPyramidPipeline",
        scheduler="HeliosScheduler",
        call=dict(pyramid_num_inference_steps_list=[3, 3, 3], history_sizes=[4, 2, 1], num_latent_frames_per_chunk=2),
        parts=lambda: dict(vae=helios_autoencoder()),
    ),
    "HiDreamImageTransformer2DModel": Run(
        "HiDreamImagePipeline",
        call=embeddings("prompt_embeds_t5") | embeddings("prompt_embeds_llama3", shape=(2, 1, TEXT, 16)),
        prepare=lambda pipe: setattr(pipe, "default_sample_size", 8),
    ),
    "HunyuanDiT2DModel": Run(
        "HunyuanDiTPipeline",
        scheduler="DDPMScheduler",
        call=NO_BINS | embeddings("prompt_embeds_2") | masks("prompt_attention_mask_2"),
    ),
    "HunyuanImageTransformer2DModel": Run("HunyuanImagePipeline", call=TWO_TEXTS),
    "HunyuanVideo15Transformer3DModel": Run(
        "HunyuanVideo15Pipeline",
        call=TWO_TEXTS,
        parts=lambda: (
            dict(guider=diffusers("ClassifierFreeGuidance"))
            | dict(vae=Part(dict(latent_channels=4), spatial_compression_ratio=16, temporal_compression_ratio=4))
        ),
        settings=dict(in_channels=9),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Run(
        "HunyuanVideoFramepackPipeline",
        call=PICTURE | dict(latent_window_size=2) | embeddings("pooled_prompt_embeds", shape=(1, 8)),
        parts=lambda: dict(vae=hunyuan_autoencoder()),
        prepare=prepare_image,
    ),
    "HunyuanVideoTransformer3DModel": Run(
        "HunyuanVideoPipeline", call=embeddings("pooled_prompt_embeds", shape=(1, 8))
    ),
    "Ideogram4Transformer2DModel": Run(
        "Ideogram4Pipeline",
        call=dict(prompt="", max_sequence_length=TEXT, guidance_scale=3.0, guidance_schedule=None),
        parts=lambda: dict(unconditional_transformer=tiny("Ideogram4Transformer2DModel")),
        prepare=prepare_ideogram,
    ),
    "JoyImageEditPlusTransformer3DModel": Run(
        "JoyImageEditPlusPipeline",
        # It refuses embeddings without a prompt, and prompts with embeddings.
        call=dict(prompt="") | dict.fromkeys([*embeddings("prompt_embeds"), *masks("prompt_embeds_mask")]),
        prepare=prepare_joy,
    ),
    "JoyImageEditTransformer3DModel": Run("JoyImageEditPipeline"),
    "Kandinsky5Transformer3DModel": Run(
        "Kandinsky5T2IPipeline",
        call=embeddings("prompt_embeds_qwen")
        | embeddings("prompt_embeds_clip", shape=(1, 8))
        | {f"{kind}prompt_cu_seqlens": torch.tensor([0, TEXT]) for kind in ("", "negative_")},
    ),
    "Kandinsky6SRTransformer3DModel": Run(
        "Kandinsky6SRPipeline",
        call=dict(video=normal(1, 1, 3, 64, 64), resolution_scale=2, output_type="pt"),
        parts=lambda: dict(vae=kandinsky_autoencoder()),
    ),
    "Kandinsky6Transformer3DModel": Run(
        "Kandinsky6TI2VAPipeline",
        call=embeddings("pooled_prompt_embeds", shape=(1, 8)),
        parts=lambda: dict(vocoder=Part({}), audio_vae=Part(dict(sample_rate=16000), latent_hop_length=1024)),
    ),
    "Krea2Transformer2DModel": Run("Krea2Pipeline", SHIFTED, embeddings("prompt_embeds", shape=(1, TEXT, 2, 16))),
    "LTX2VideoTransformer3DModel": Run(
        "LTX2Pipeline",
        SHIFTED,
        dict(spatio_temporal_guidance_blocks=[1]),
        parts=lambda: dict(
            connectors=Connectors(),
            audio_vae=Part(
                dict(mel_bins=4, latent_channels=4, sample_rate=16000, mel_hop_length=160),
                mel_compression_ratio=4,
                temporal_compression_ratio=4,
                latents_mean=torch.zeros(4),
                latents_std=torch.ones(4),
            ),
            vae=Part(
                dict(scaling_factor=1.0),
                latents_mean=torch.zeros(4),
                latents_std=torch.ones(4),
                spatial_compression_ratio=32,
                temporal_compression_ratio=8,
            ),
        ),
    ),
    "LTXVideoTransformer3DModel": Run("LTXPipeline", SHIFTED),
    "LatteTransformer3DModel": Run(
        "LattePipeline", scheduler="DDIMScheduler", call=dict(video_length=2, negative_prompt=None)
    ),
    "LongCatImageTransformer2DModel": Run(
        "LongCatImagePipeline",
        SHIFTED,
        dict(prompt=[""], negative_prompt=[""], prompt_embeds=None, negative_prompt_embeds=None)
        | dict(enable_prompt_rewrite=False),
        settings=dict(in_channels=64),
        prepare=prepare_longcat,
    ),
    "Lumina2Transformer2DModel": Run("Lumina2Pipeline"),
    "LuminaNextDiT2DModel": Run("LuminaPipeline"),
    "MochiTransformer3DModel": Run("MochiPipeline", dict(invert_sigmas=True)),
    "MotifVideoTransformer3DModel": Run(
        "MotifVideoPipeline",
        parts=lambda: (
            dict(guider=diffusers("ClassifierFreeGuidance"))
            | dict(vae=Part(dict(z_dim=4, scale_factor_temporal=4, scale_factor_spatial=8)))
        ),
        settings=dict(in_channels=9),
    ),
    "NucleusMoEImageTransformer2DModel": Run("NucleusMoEImagePipeline", SHIFTED),
    "OvisImageTransformer2DModel": Run(
        "OvisImagePipeline", SHIFTED, dict(negative_prompt=None), settings=dict(in_channels=64, out_channels=64)
    ),
    "PRXTransformer2DModel": Run("PRXPipeline", call=NO_BINS),
    "PixArtTransformer2DModel": Run(
        "PixArtAlphaPipeline", scheduler="DPMSolverMultistepScheduler", call=NO_BINS | dict(negative_prompt=None)
    ),
    "QwenImage21Transformer2DModel": Run(
        "QwenImage21Pipeline",
        SHIFTED,
        dict(use_kv_cache=False),
        parts=lambda: dict(
            processor=Part({}, apply_chat_template=lambda *_, **__: [[0]], tokenizer=Part({}, encode=lambda _: [1]))
        ),
    ),
    "QwenImageTransformer2DModel": Run("QwenImagePipeline", SHIFTED),
    "SD3Transformer2DModel": Run("StableDiffusion3Pipeline"),
    "SanaTransformer2DModel": Run(
        "SanaPipeline", scheduler="DPMSolverMultistepScheduler", call=NO_BINS | dict(negative_prompt=None)
    ),
    "SanaVideoTransformer3DModel": Run(
        "SanaVideoPipeline",
        scheduler="DPMSolverMultistepScheduler",
        call=NO_BINS | dict(negative_prompt=None, frames=5),
    ),
    "SanaWMTransformer3DModel": Run(
        "SanaWMPipeline",
        call=embeddings("prompt_embeds", shape=(1, 1, TEXT, 16))
        | dict(image=PICTURE["image"], height=128, width=128, prompt="", num_frames=9)
        | dict(c2w=torch.eye(4).repeat(9, 1, 1).numpy(), intrinsics=[32, 32, 16, 16]),
        settings=dict(chunk_plucker_channels=48, ffn_type="mlp"),
        prepare=prepare_sana_wm,
    ),
    "SkyReelsV2Transformer3DModel": Run("SkyReelsV2Pipeline", scheduler="UniPCMultistepScheduler"),
    "WanAnimateTransformer3DModel": Run(
        "WanAnimatePipeline",
        call=PICTURE
        | embeddings("prompt_embeds", shape=(1, 512, 16))
        | dict(pose_video=[PICTURE["image"]] * 5, face_video=[PICTURE["image"].resize((16, 16))] * 5)
        | dict(segment_frame_length=5, guidance_scale=2.0),
        parts=lambda: dict(vae=wan_autoencoder()),
        settings=dict(in_channels=36, latent_channels=16, out_channels=16),
        prepare=prepare_image,
    ),
    "WanTransformer3DModel": Run("WanPipeline"),
    "WanVACETransformer3DModel": Run(
        "WanVACEPipeline",
        call=dict(height=32, width=32),
        parts=lambda: dict(vae=wan_autoencoder()),
        settings=dict(in_channels=16, out_channels=16, vace_in_channels=96),
    ),
    "ZImageTransformer2DModel": Run(
        "ZImagePipeline",
        SHIFTED,
        {f"{kind}prompt_embeds": [normal(TEXT, 16)] for kind in ("", "negative_")},
    ),
}


def pipeline(name: str, transformer: nn.Module):
    """The pipeline of a class around a transformer. Parts that are not given are None."""
    run = RUNS[name]
    kind = getattr(importlib.import_module("diffusers"), run.pipeline)
    needed = {key for key, part in inspect.signature(kind).parameters.items() if part.default is part.empty}
    parts = dict.fromkeys(needed - {"scheduler"}) | run.parts() | dict(transformer=transformer)
    pipe = kind(**parts, scheduler=diffusers(run.scheduler, **run.shift))
    pipe.set_progress_bar_config(disable=True)
    run.prepare(pipe)
    return pipe


def arguments(call: Callable) -> dict:
    """The arguments of a call of a pipeline, as far as it has them: one prompt, with classifier-free guidance."""
    found = dict(height=64, width=64, num_frames=5, num_inference_steps=STEPS, output_type="latent")
    for name in inspect.signature(call).parameters:
        if re.fullmatch("(negative_)?prompt_embeds", name):
            found[name] = normal(1, TEXT, 16)
        elif re.fullmatch("(negative_)?pooled_prompt_embeds|(negative_)?prompt_embeds_pooled", name):
            found[name] = normal(1, 16)
        elif re.fullmatch("(negative_)?prompt_(attention|embeds)_mask", name):
            found[name] = torch.ones(1, TEXT, dtype=torch.bool)
    return {name: value for name, value in found.items() if name in inspect.signature(call).parameters}


def run(name: str, transformer: nn.Module, prepare: Callable = lambda pipe: None) -> Tensor:
    """The latents of the pipeline of a class, or its image, if it has no latents as output.

    Args:
        name: name of the class.
        transformer: the transformer of the pipeline.
        prepare: is called with the pipeline.
    """
    if RUNS[name].pipeline is None:
        return run_scheduler(name, transformer)
    pipe = pipeline(name, transformer)
    prepare(pipe)
    call = arguments(pipe.__call__) | dict(generator=torch.Generator().manual_seed(0)) | RUNS[name].call
    output = pipe(**call, return_dict=False)
    output = output[0] if isinstance(output, tuple) else output
    # Some pipelines return a list of latents.
    return torch.cat([part.flatten() for part in output]) if isinstance(output, list) else torch.as_tensor(output)


@torch.no_grad()
def run_scheduler(name: str, transformer: nn.Module) -> Tensor:
    """Call a transformer with the timesteps of its scheduler, and subtract its outputs."""
    scheduler = diffusers(RUNS[name].scheduler)
    scheduler.set_timesteps(STEPS)
    torch.manual_seed(0)
    call = TINY[name].arguments(1)
    for t in scheduler.timesteps:
        call[PRESETS[name].timestep] = RUNS[name].argument(t).expand(1)
        call["hidden_states"] = call["hidden_states"] - transformer(**call).sample / STEPS
    return call["hidden_states"]
