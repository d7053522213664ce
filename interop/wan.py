"""Wan 2.2's pair of transformers, read as the two stages of a Remix, and written back.

Of the pair, `transformer` denoises the timesteps of at least 1000 * `boundary_ratio`, and `transformer_2` those below.
Stage 0, which has the least noise, is `transformer_2`. The pair is read from the layout of diffusers, or from two files
with the names of the original, as ComfyUI uses them.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from diffusion.intervals import TIMESTEPS
from interop.shapes import count_blocks
from mixing import fsdp
from mixing.stages import find_difference, layout
from remix import Remix
from runtime.errors import UserError, first_line
from runtime.files import write_json

INDEX = "model_index.json"
# The transformer of high noise, and that of low noise.
PARTS = ("transformer", "transformer_2")
# All published models of Wan have heads of this size. The tensors do not show it.
HEAD = 128
# The names of the original and those of diffusers, in the order in which they are replaced.
NAMES = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
NAMES_IN_BLOCKS = {
    "self_attn.": "attn1.",
    "cross_attn.": "attn2.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
    ".k_img.": ".add_k_proj.",
    ".v_img.": ".add_v_proj.",
    ".norm_k_img.": ".norm_added_k.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    ".norm3.": ".norm2.",
    ".modulation": ".scale_shift_table",
}
# What fp8 "scaled" files of ComfyUI hold beside the weights. The scale of the input is for products in fp8.
SCALE, INPUT_SCALE, SCALED = ".scale_weight", ".scale_input", "scaled_fp8"


def read_pair(
    source,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 16,
    *,
    boundary_ratio: float | None = None,
    config: dict | None = None,
    **options,
) -> Remix:
    """Read a pair of transformers as a Remix of two frozen stages, which share low-rank bases.

    With the initial pairs, whose B is zero, the Remix is the pair.

    Args:
        source: the folder of a pipeline; a loaded pipeline, whose transformers become parts of the Remix; or two
            safetensors files (high, low) with the original's names, that of high noise first. Weights in fp8 are
            converted to `dtype`, also "scaled" ones. Use the Remix, or a `FoldedRemix` of it, in the place of both
            transformers.
        dtype: dtype of the parameters that are read from files, except those that diffusers keeps in float32.
        rank: rank r of the bases.
        boundary_ratio: the least noise of the first transformer, divided by 1000: 0.875 for text to video, and 0.9 for
            image to video. None: that of the pipeline. Two files do not hold it.
        config: the config of two files, keyword arguments of diffusers' WanTransformer3DModel. None: that of their
            tensors, with heads of 128 channels.
        **options: further arguments of `remix.Remix`, such as n_basis, and n_experts or boundaries. By default, each
            stage is one expert.

    Raises:
        UserError: if there is no pair or no boundary, the files are no transformers of Wan in the original's layout, or
            the transformers differ in their shapes.
        ValueError: see `remix.Remix`.
    """
    files = isinstance(source, Sequence) and not isinstance(source, str)
    folder = isinstance(source, str | Path)
    if config is not None and not files:
        raise UserError("config is only for two files: a pipeline has its own")
    if files:
        stored = None
    elif folder:
        stored = _read_index(Path(source)).get("boundary_ratio")
    else:
        high, low = (getattr(source, part, None) for part in PARTS)
        stored = getattr(getattr(source, "config", None), "boundary_ratio", None)
        if high is None or low is None:
            raise UserError(
                f"a pair needs transformer, transformer_2 and boundary_ratio, but of a {type(source).__name__} "
                f"they are {type(high).__name__}, {type(low).__name__} and {stored}"
            )
    ratio = _choose_ratio(boundary_ratio, stored)
    if files:
        high, low = _read_files(source, dtype, config)
    elif folder:
        high, low = _load(Path(source), dtype)
    if found := find_difference(layout(high), layout(low)):
        raise UserError(f"the transformers of the pair differ in their names or shapes, such as {found}")
    # As WanPipeline calculates it.
    return Remix([low, high], stages=[0, ratio * TIMESTEPS, TIMESTEPS], rank=rank, **options)


def _choose_ratio(given: float | None, stored: float | None) -> float:
    """Return the boundary ratio of a pair: the argument of `read_pair`, or that of the pipeline.

    Raises:
        UserError: if both are missing, they contradict each other, or the ratio is out of range.
    """
    if stored is not None and given not in (None, stored):
        raise UserError(f"boundary_ratio is {given}, but that of the pipeline is {stored}")
    ratio = given if stored is None else stored
    if ratio is None:
        raise UserError("boundary_ratio is None: give 0.875 for text to video, or 0.9 for image to video")
    if not 0 < ratio < 1:
        raise UserError(f"boundary_ratio must be between 0 and 1, but it is {ratio}")
    return ratio


def write_pair(remix: Remix, folder):
    """Write a Remix of WanTransformer3DModels as a pair: of each stage, the mean of its experts.

    Args:
        remix: the Remix of two stages, or of one module with two experts. If it is sharded (`mixing.fsdp`), every
            process calls this, and rank 0 writes.
        folder: folder of a pipeline, of which the pair is replaced; or a new folder, to which the other parts of a
            pipeline can be added. `WanPipeline.from_pretrained` takes them as arguments too.

    Raises:
        UserError: if the Remix has neither two stages nor two experts, or is no Remix of WanTransformer3DModels.
    """
    name, stages = remix.arguments.owner, remix.stages
    parts = [[i] for i in range(remix.n_experts)]
    if len(stages) > 1:
        parts = [stages.experts(s) for s in range(len(stages))]
    if name != "WanTransformer3DModel" or len(parts) != 2:
        raise UserError(
            "a pair is written from 2 stages, or from 2 experts, of a WanTransformer3DModel, not from "
            f"{len(stages)} stages with {remix.n_experts} experts of a {name}"
        )
    folder = Path(folder)
    for part, experts in zip(PARTS[::-1], parts, strict=True):
        # Of a sharded Remix, only rank 0 gets a module.
        if (plain := remix.merge([float(i in experts) for i in range(remix.n_experts)])) is not None:
            _replace(folder, part, plain)
    config = remix.backbone.config
    # The transformers of image-to-video also get the latents of the image.
    image = config.in_channels > config.out_channels
    index = {"_class_name": "WanImageToVideoPipeline" if image else "WanPipeline"}
    with fsdp.written_once(remix) as writes:
        if writes:
            if (folder / INDEX).is_file():
                index = _read_index(folder)
            index |= {part: ["diffusers", name] for part in PARTS}
            boundary = remix.boundaries[parts[1][0]]
            write_json(folder / INDEX, index | {"boundary_ratio": boundary / remix.boundaries[-1]})


def _replace(folder: Path, part: str, model: nn.Module):
    """Write a transformer to a part of a pipeline's folder, in the place of what is there."""
    # The tensors of the model may be those of the files that are replaced, mapped into memory.
    new = folder / f".{part}"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    shutil.rmtree(folder / part, ignore_errors=True)
    new.rename(folder / part)


def _read_index(folder: Path) -> dict:
    """Return the index of a pipeline's folder, which has both transformers."""
    for part in (INDEX, *PARTS):
        if not (folder / part).exists():
            raise UserError(f"{folder} holds no pair of transformers in diffusers' layout: there is no {folder / part}")
    try:
        return json.loads((folder / INDEX).read_text())
    except ValueError as error:
        raise UserError(f"{folder / INDEX} is no JSON: {error}") from None


def _load(folder: Path, dtype: torch.dtype) -> list[nn.Module]:
    """Return both transformers of a pipeline's folder, that of high noise first."""
    from diffusers import WanTransformer3DModel

    return [WanTransformer3DModel.from_pretrained(folder / part, torch_dtype=dtype) for part in PARTS]


def _read_files(files: Sequence, dtype: torch.dtype, config: dict | None) -> list[nn.Module]:
    """Return the transformers of two files, that of high noise first."""
    if len(files) != 2 or not all(isinstance(file, str | Path) for file in files):
        kinds = ", ".join(type(file).__name__ for file in files)
        raise UserError(f"a pair is two files, that of high noise first, but there are {len(files)}: {kinds}")
    for file, other in zip(files, ("low_noise", "high_noise"), strict=True):
        if other in Path(file).name.lower():
            raise UserError(
                f"the file of high noise comes first, and then that of low noise, but got {Path(file).name}"
            )
    return [read_original(file, dtype, config) for file in files]


def read_original(path, dtype: torch.dtype = torch.bfloat16, config: dict | None = None) -> nn.Module:
    """Read a transformer of Wan from a safetensors file with the original's names. `read_pair` documents the arguments.

    Tensors whose dtype stays are mapped into memory, and the others are converted one at a time.

    Raises:
        UserError: if the file is damaged or of another layout, or if the config does not fit.
    """
    from diffusers import WanTransformer3DModel

    try:
        file = safe_open(path, framework="pt")
    except Exception as error:
        # A damaged file can cause errors of any kind.
        raise UserError(f"{path} is not a complete .safetensors file: {first_line(error)}") from None
    with file:
        keys = {key.removeprefix("model.").removeprefix("diffusion_model."): key for key in file.keys()}  # noqa: SIM118
        if not {"head.head.weight", "patch_embedding.weight"} <= keys.keys():
            raise UserError(
                f"{path} holds no transformer of Wan in the original's layout: there is no head.head.weight"
            )
        shapes = {key: file.get_slice(stored).get_shape() for key, stored in keys.items()}
        weights = (key for key in keys if key != SCALED and not key.endswith((SCALE, INPUT_SCALE)))
        names = {key: diffusers_name(key) for key in weights}
        config = infer_config(path, shapes) if config is None else config
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(config)
        _check_shapes(path, model, {name: (key, shapes[key]) for key, name in names.items()})
        state = {}
        for key, name in names.items():
            tensor, scale = file.get_tensor(keys[key]), keys.get(f"{key.removesuffix('.weight')}{SCALE}")
            if not tensor.is_floating_point():
                raise UserError(f"{path}: {key} is quantized as {tensor.dtype}, but only fp8 can be read")
            if scale is not None:
                scale = file.get_tensor(scale).float()
                if scale.numel() > 1 and scale.shape != (len(tensor), 1):
                    shape = [*scale.shape]
                    raise UserError(f"{path}: the scale of {key} is neither one number nor one per row: {shape}")
                tensor = tensor.float() * scale
            kept = not {*name.split(".")}.isdisjoint(model._keep_in_fp32_modules or ())
            state[name] = tensor.to(torch.float32 if kept else dtype)
    model.load_state_dict(state, assign=True)
    # Its buffers are in no file.
    model.rope = type(model.rope)(
        model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len
    )
    return model.eval()


def _check_shapes(path, model: nn.Module, stored: dict[str, tuple[str, list[int]]]):
    """Raise UserError unless a file holds the tensors of a model.

    Args:
        path: the file, for error messages.
        model: the model.
        stored: the original's name and the shape of each tensor of the file, by diffusers' name.
    """
    expected = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    name = find_difference(expected, {name: shape for name, (_, shape) in stored.items()})
    if name is None:
        return
    key, shape = stored.get(name, (name, None))
    if shape is None:
        problem = "is missing"
    elif name not in expected:
        problem = "is not in this class"
    else:
        problem = f"has the shape {shape}, not {expected[name]}"
    raise UserError(f"{path} does not fit a WanTransformer3DModel: {key} {problem}")


def diffusers_name(key: str) -> str:
    """Return diffusers' name of a parameter of Wan's original."""
    if not key.startswith("blocks."):
        return next((key.replace(old, new, 1) for old, new in NAMES.items() if key.startswith(old)), key)
    for old, new in NAMES_IN_BLOCKS.items():
        key = key.replace(old, new, 1)
    return key


def infer_config(path, shapes: dict[str, list[int]]) -> dict:
    """Return the config of a transformer of Wan from the shapes of its tensors under the original's names.

    Raises:
        UserError: if a tensor is missing, or the width is no multiple of 128.
    """
    try:
        width, in_channels, *patch = shapes["patch_embedding.weight"]
        config = dict(
            patch_size=tuple(patch),
            in_channels=in_channels,
            out_channels=shapes["head.head.weight"][0] // (patch[0] * patch[1] * patch[2]),
            text_dim=shapes["text_embedding.0.weight"][1],
            freq_dim=shapes["time_embedding.0.weight"][1],
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} holds no transformer of Wan in the original's layout: {error!r}") from None
    if width % HEAD:
        raise UserError(f"{path} has the width {width}, no multiple of {HEAD}, the size of Wan's heads: give config")
    config |= dict(num_attention_heads=width // HEAD, attention_head_dim=HEAD)
    config |= dict(num_layers=count_blocks(shapes), cross_attn_norm="blocks.0.norm3.weight" in shapes)
    if "blocks.0.cross_attn.k_img.weight" in shapes:
        config |= dict(added_kv_proj_dim=width, image_dim=shapes.get("img_emb.proj.0.weight", [None])[0])
    if "img_emb.emb_pos" in shapes:
        config |= dict(pos_embed_seq_len=shapes["img_emb.emb_pos"][1])
    return config
