"""Models in the layout of Hugging Face diffusers: read from a folder or the Hugging Face hub, written to a folder.

diffusers keeps the query, key and value projections of an attention layer separate, and gives every block its own copy
of the timestep and label embedders. Every other tensor has one counterpart under facebookresearch/DiT's names. A
RemixDiT has the K bases of its mixed layers in tensors with one more dimension, and its embedders once.
"""

import functools
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import FlowMatching, beta_schedule
from diffusion.flow import FLOW_OPTIONS
from diffusion.intervals import TIMESTEPS
from features.autoencoder import Normalization
from interop.shapes import backbone_from_shapes, flow_target, make_config
from mixing.presets import inside
from models import TIMESTEP_FREQUENCIES, sincos_positions
from remix import Remix
from runtime.errors import LocalError, UserError, first_line, warn
from runtime.files import name_write_errors
from runtime.hub import offline

# Layers of a block: our name -> diffusers' names, whose tensors are concatenated.
BLOCK_LAYERS = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
# Layers of which diffusers has one copy per block.
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
OTHER_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# The settings that make a Transformer2DModel a DiT.
DIT_SETTINGS = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
# The weights were trained with 1e-6. Converted models may have 1e-5, the default of diffusers.
LARGEST_NORM_EPS = 1e-5
# The name of a DiT's class in older versions of diffusers.
OLD_CLASS = "Transformer2DModel"
# The class in the file that is exported with a RemixDiT.
REMIX_CLASS = "RemixDiTTransformer2DModel"
CLASSES = ("DiTTransformer2DModel", OLD_CLASS, REMIX_CLASS)
# The files of the weights are diffusion_pytorch_model.SUFFIX, or diffusion_pytorch_model.VARIANT.SUFFIX such as .fp16.
WEIGHTS = "diffusion_pytorch_model"
# A .bin file is a pickle, used only where there is no .safetensors file.
SUFFIXES = ("safetensors", "bin")
# An index lists the shards of weights that are stored in several files.
INDEX = WEIGHTS + r"\.{suffix}\.index(?:\.([\w-]+))?\.json"
ONE_FILE = WEIGHTS + r"(?:\.(?!.*-\d+-of-\d+\.)([\w-]+))?\.{suffix}"
# What the config of a scheduler says of a Gaussian process, with the defaults of DDPMScheduler.
GAUSSIAN_SETTINGS = {
    "num_train_timesteps": TIMESTEPS,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "variance_type": None,
}
# In patches. It limits the memory that a config with wrong numbers can take, as the position embedding is computed.
LARGEST_SIDE = 256
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".tar")


def find_transformer(path) -> tuple[Path, list[Path]] | None:
    """Find the files of the transformer in a folder or on the Hugging Face hub.

    Args:
        path: the folder of a DiTTransformer2DModel or RemixDiTTransformer2DModel, the folder of a pipeline (which has
            the model in transformer/), or a hub name such as facebook/DiT-XL-2-256, whose files huggingface_hub
            downloads unless it has them.

    Returns:
        The paths of config.json and of the files of the weights, or None if `path` is that of a file, which may be
        missing.

    Raises:
        UserError: if the folder holds no model, or only several variants of one; if a shard is missing; or if the hub
            name is not found.
    """
    folder = Path(path)
    # A missing file in an existing folder is a wrong path, not a hub name.
    missing_file = folder.suffix.lower() in FILE_SUFFIXES or folder.parent.is_dir()
    if not folder.exists() and HUB_NAME.fullmatch(str(path)) and not missing_file:
        folder = _download(str(path))
    if not folder.is_dir():
        return None
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = folder / "config.json"
    weights = _find_weights(folder)
    if not config.is_file() or not weights:
        missing = folder / f"{WEIGHTS}.{SUFFIXES[0]}" if config.is_file() else config
        raise UserError(
            f"{path} holds neither a run's checkpoints nor a DiTTransformer2DModel in diffusers' layout: "
            f"there is no {missing}"
        )
    return config, weights


def _find_weights(folder: Path) -> list[Path]:
    """Return the files of the weights in a folder: one, or the shards of an index; an empty list if there are none.

    As in diffusers, an index precedes a single file. Weights without a variant precede those of a variant.

    Raises:
        UserError: if there are only weights of several variants.
    """
    found = {}
    for suffix in SUFFIXES:
        for pattern in (INDEX, ONE_FILE):
            for path in sorted(folder.iterdir()):
                if path.is_file() and (match := re.fullmatch(pattern.format(suffix=suffix), path.name)):
                    found.setdefault(match[1], path)
    if len(found) > 1 and None not in found:
        raise UserError(
            f"{folder} holds the variants {' and '.join(sorted(found))}, and no weights without a variant: copy "
            "config.json and one variant to another folder"
        )
    chosen = found.get(None, next(iter(found.values()), None))
    if chosen is None:
        return []
    return _find_shards(chosen) if chosen.suffix == ".json" else [chosen]


def _find_shards(index: Path) -> list[Path]:
    """Return the files that an index lists. Raises UserError if the index is damaged, or a file is missing."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{index} is not an index of the files of a model's weights") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} lists {name}, which is not the name of a file in its folder")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} lists {name}, which is missing")
    return [index.parent / name for name in names]


@functools.cache
def _download(name: str) -> Path:
    """Download a repository from the hub unless it is in the cache, and return its local folder.

    The result is cached, so that a process uses the same revision throughout.

    Raises:
        UserError: if the hub has no such repository or cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download

        # Variants of the same weights are downloaded only if there are no others.
        variants = (f"{WEIGHTS}.*.{SUFFIXES[0]}", f"{WEIGHTS}.{SUFFIXES[0]}.index.*.json")
        single = [(f"{WEIGHTS}.{x}", f"{WEIGHTS}.{x}.index.json", f"{WEIGHTS}-*-of-*.{x}") for x in SUFFIXES]
        for names in (*single, variants):
            patterns = [place + file for place in ("", "transformer/") for file in ("config.json", *names)]
            patterns.append("scheduler/scheduler_config.json")
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline()))
            if any(_find_weights(place) for place in (folder, folder / "transformer") if place.is_dir()):
                break
        return folder
    except UserError:
        raise
    except Exception as error:
        # The network, the hub and huggingface_hub raise errors of many kinds.
        raise LocalError(
            f"{name}: not a file or folder, and not found on the Hugging Face hub: {first_line(error)}"
        ) from None


def read(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read a DiT or a RemixDiT from a folder or a hub name. `interop` documents the arguments and the result.

    `content` is the loaded content of the files of weights that `find_transformer` returns. `ema` has no effect,
    because the folder holds one set of weights.

    Raises:
        UserError: if the folder is damaged or of another layout, or contradicts the overrides.
    """
    files = find_transformer(path)
    if files is None:
        return None
    config_file, _ = files
    try:
        stored = json.loads(config_file.read_text())
        _check_settings(path, stored)
        content = dict(content)
        remix, logits = None, None
        if stored["_class_name"] == REMIX_CLASS:
            remix, logits = _read_mixing(stored, content)
        state = _rename_to_ours(path, content, shared_embedders=remix is not None)
        _check_sizes(path, stored, state)
        side = stored["sample_size"] // state["x_embedder.proj.weight"].shape[-1]
        state.setdefault("pos_embed", sincos_positions(len(state["x_embedder.proj.bias"]), side).unsqueeze(0))
        num_heads = stored["num_attention_heads"]
    except KeyError as error:
        raise UserError(f"{path} holds no DiT in diffusers' layout: {error} is missing") from None
    except UserError:
        raise
    except Exception as error:
        # Damaged content can cause errors of any kind.
        raise UserError(f"{path} holds no DiT in diffusers' layout: {first_line(error)}") from None
    backbone = backbone_from_shapes(state)
    if backbone is None:
        raise UserError(f"{path} holds no DiT in diffusers' layout: its tensors have other dimensions")
    if overrides.get("num_heads", num_heads) != num_heads:
        raise UserError(f"{path} holds num_heads={num_heads}, not {overrides['num_heads']}")
    shift = _frequency_shift(path, stored, overrides)
    config = make_config(path, backbone, remix, overrides | {"num_heads": num_heads, "frequency_shift": shift})
    config["data"] |= _find_vae(config_file, backbone)
    if flow := stored.get("flow"):
        config["diffusion"] = {"process": FlowMatching.name} | {key: flow[key] for key in FLOW_OPTIONS if key in flow}
    changed = _find_scheduler(config_file, config["diffusion"])
    if remix and changed:
        raise UserError(f"{path} holds a RemixDiT of the published process, but its scheduler has {changed}")
    config["diffusion"] |= changed
    if remix:
        state = {"logits": logits} | {f"backbone.{key}": value for key, value in state.items()}
    return config, state


def _read_mixing(stored: dict, content: dict[str, Tensor]) -> tuple[dict, Tensor]:
    """Return the keyword arguments of a RemixDiT and its logits, which are removed from `content`."""
    layer_of = {parts[0]: layer for layer, parts in BLOCK_LAYERS.items()}
    remix = {name: stored[name] for name in ("n_basis", "n_experts", "mixer", "scope", "boundaries")}
    remix["layers"] = inside("blocks", *(layer_of[name] for name in stored["mixed_layers"] if name in layer_of))
    logits = content.pop("logits")
    return remix, logits if remix["scope"] == "local" else logits.squeeze(0)


def _frequency_shift(path, stored: dict, overrides: dict) -> int:
    """Return the shift of the timestep frequencies (see `models.TimestepEmbedder`) that weights were trained with.

    Prints a warning if neither the config.json nor the user gives it.

    Raises:
        UserError: if the user and the config.json contradict each other.
    """
    given, recorded = overrides.get("frequency_shift"), stored.get("frequency_shift")
    # Earlier exports of this project have a class with the published frequencies.
    if recorded is None and "PublishedDiT" in str(stored.get("auto_map")):
        recorded = TIMESTEP_FREQUENCIES["published"]
    if None not in (given, recorded) and given != recorded:
        raise UserError(f"{path} holds frequency_shift={recorded}, not {given}")
    if given is None and recorded is None:
        warn(
            f"{path} does not say whether it was trained with the timestep frequencies of the published DiT (assumed) "
            "or with those of diffusers' class (--timestep-frequencies diffusers)"
        )
    return given if given is not None else recorded or TIMESTEP_FREQUENCIES["published"]


def _check_settings(path, stored: dict):
    """Raise UserError unless a config.json has the settings of a DiT."""
    kind = stored.get("_class_name")
    if kind not in CLASSES:
        raise UserError(f"{path} holds a {kind}, not a DiTTransformer2DModel")
    for key, expected in DIT_SETTINGS.items():
        # A Transformer2DModel has other defaults.
        found = stored.get(key, None if kind == OLD_CLASS else expected)
        if found != expected:
            raise UserError(f"{path} has {key}={found}, a DiT has {expected}")
    if stored.get("norm_eps", LARGEST_NORM_EPS) > LARGEST_NORM_EPS:
        raise UserError(f"{path} has norm_eps={stored['norm_eps']}, a DiT has 1e-06")


def _check_sizes(path, stored: dict, state: dict[str, Tensor]):
    """Raise UserError unless the sizes in a config.json fit the tensors; KeyError if one of the two is missing."""
    width = len(state["x_embedder.proj.bias"])
    num_heads, head_dim = stored["num_attention_heads"], stored["attention_head_dim"]
    if num_heads * head_dim != width or num_heads < 1:
        raise UserError(f"{path} has {num_heads} heads of {head_dim} channels, but a width of {width}")
    side = stored["sample_size"] // state["x_embedder.proj.weight"].shape[-1]
    if not 1 <= side <= LARGEST_SIDE:
        raise UserError(f"{path} has sample_size={stored['sample_size']}, {side} patches per side")
    patch, channels = state["x_embedder.proj.weight"].shape[-1], state["x_embedder.proj.weight"].shape[1]
    out_channels = len(state["final_layer.linear.bias"]) // patch**2
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    sizes = {"patch_size": patch, "in_channels": channels, "out_channels": out_channels, "num_layers": depth}
    for key, found in sizes.items():
        if stored.get(key) is not None and stored[key] != found:
            raise UserError(f"{path} has {key}={stored[key]}, but its tensors have {found}")
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    if stored["num_embeds_ada_norm"] != num_classes:
        raise UserError(
            f"{path} has num_embeds_ada_norm={stored['num_embeds_ada_norm']}, but a table of {num_classes} classes"
        )


def _find_scheduler(config_file: Path, process: dict) -> dict:
    """Return what the scheduler of a transformer's pipeline, if there is one, says of the process.

    What only concerns sampling is not read, such as timestep_spacing and steps_offset: the samplers of this project
    choose their timesteps themselves.

    Args:
        config_file: the transformer's config.json.
        process: the "diffusion" part of a config.

    Returns:
        Options of Gaussian diffusion with other values than the defaults.

    Raises:
        UserError: if the scheduler is damaged, contradicts the process, or has one that this project does not have.
    """
    file = config_file.parent.parent / "scheduler" / "scheduler_config.json"
    if config_file.parent.name != "transformer" or not file.is_file():
        return {}
    target = flow_target(process)
    try:
        stored = json.loads(file.read_text())
        name = stored["_class_name"]
        flow_sigmas = stored.get("use_flow_sigmas") or stored.get("prediction_type") == "flow_prediction"
        if (name.startswith("FlowMatch") or bool(flow_sigmas)) != bool(target):
            kind = "a flow" if target else "Gaussian diffusion"
            raise UserError(f"{file} is a {name} of another process than the transformer, which is a model of {kind}")
        if not target:
            return _read_gaussian(file, stored, learn_sigma=process.get("learn_sigma", True))
        shift, steps = stored.get("flow_shift" if flow_sigmas else "shift", 1.0), stored.get("num_train_timesteps")
        if shift != process.get("shift", 1.0) or stored.get("use_dynamic_shifting"):
            shift = "dynamic" if stored.get("use_dynamic_shifting") else shift
            raise UserError(f"{file} has shift={shift}, but the transformer's config says {process.get('shift', 1.0)}")
        if steps not in (None, TIMESTEPS):
            raise UserError(f"{file} has num_train_timesteps={steps}, a flow has {TIMESTEPS}")
        return {}
    except UserError:
        raise
    # Damaged content can cause errors of any kind.
    except Exception as error:
        raise UserError(f"{file} is not the config of a scheduler: {first_line(error)}") from None


def _read_gaussian(file: Path, stored: dict, learn_sigma: bool) -> dict:
    """Return the options of `create_diffusion` that the config of a scheduler changes. See `_find_scheduler`."""
    if not {"beta_schedule", "trained_betas"} & stored.keys():
        raise UserError(f"{file} is a {stored['_class_name']}, not a scheduler of Gaussian diffusion with betas")
    given = {key: stored[key] for key in GAUSSIAN_SETTINGS if stored.get(key) is not None}
    said = GAUSSIAN_SETTINGS | given
    steps, schedule = said["num_train_timesteps"], said["beta_schedule"]
    known = {name: beta_schedule(name, steps) for name in ("linear", "squaredcos_cap_v2")}
    betas = known.get(schedule)
    if said["trained_betas"] is not None:
        betas = np.asarray(said["trained_betas"], np.float64)
    elif schedule == "linear":
        betas = np.linspace(said["beta_start"], said["beta_end"], steps)
    # Schedulers compute in float32.
    equal = [name for name in known if betas is not None and np.allclose(betas, known[name], rtol=1e-4, atol=0)]
    if not equal or said["rescale_betas_zero_snr"]:
        said["trained_betas"] = "..." if said["trained_betas"] else None
        raise UserError(
            f"{file} has other betas than the schedules linear (0.0001 to 0.02 of {TIMESTEPS} timesteps) and "
            f"squaredcos_cap_v2: {', '.join(f'{key}={said[key]}' for key in [*GAUSSIAN_SETTINGS][:6])}"
        )
    if said["prediction_type"] not in ("epsilon", "sample"):
        raise UserError(f"{file} has prediction_type={said['prediction_type']}, which must be epsilon or sample")
    variance = said["variance_type"]
    if variance == "learned" or (variance == "learned_range" and not learn_sigma):
        raise UserError(f"{file} has variance_type={variance}, but the transformer does not predict such a variance")
    changed = {"noise_schedule": equal[0]} if equal[0] != "linear" else {}
    changed |= {"diffusion_steps": steps} if steps != TIMESTEPS else {}
    changed |= {"predict_xstart": True} if said["prediction_type"] == "sample" else {}
    return changed | ({"sigma_small": True} if not learn_sigma and str(variance).startswith("fixed_small") else {})


def _find_vae(config_file: Path, backbone: dict) -> dict:
    """Return the entries of a config's "data" part for the VAE in the transformer's pipeline, if there is one."""
    folder = config_file.parent.parent / "vae"
    if config_file.parent.name != "transformer" or not (folder / "config.json").is_file():
        return {}
    try:
        stored = json.loads((folder / "config.json").read_text())
        normalization = Normalization.from_vae(stored).record()
        channels, blocks = stored.get("latent_channels", 4), stored.get("block_out_channels", (64,))
        factor = 2 ** (len(blocks) - 1)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is not the config of an AutoencoderKL: {error}") from None
    if channels != backbone["in_channels"]:
        raise UserError(f"{folder} has {channels} channels, but the transformer denoises {backbone['in_channels']}")
    return {"image_size": backbone["input_size"] * factor, "vae": str(folder), **normalization}


def _rename_to_ours(path, state: dict[str, Tensor], shared_embedders: bool) -> dict[str, Tensor]:
    """Return a transformer's tensors under facebookresearch/DiT's names.

    Args:
        path: for error messages.
        state: the transformer's tensors.
        shared_embedders: whether the transformer has its embedders once, not once per block.

    Raises:
        KeyError: for a missing tensor.
        UserError: for an additional tensor, or for embedders that differ between blocks.
    """
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks.")), default=-1)
    if not 1 <= depth <= len(state):
        raise KeyError("transformer_blocks.0")
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    left = dict(state)
    ours = {}
    for layer, theirs in OTHER_LAYERS.items():
        for kind in ("weight", "bias"):
            ours[f"{layer}.{kind}"] = left.pop(f"{theirs}.{kind}")
    for layer, theirs in EMBEDDERS.items():
        for kind in ("weight", "bias") if "mlp" in layer else ("weight",):
            modules = ["embedder"] if shared_embedders else [f"{block}.norm1.emb" for block in blocks]
            first, *others = (left.pop(f"{module}.{theirs}.{kind}") for module in modules)
            if not all(torch.equal(other, first) for other in others):
                raise UserError(f"{path} has blocks with different values of {theirs}: a DiT has one for all blocks")
            ours[f"{layer}.{kind}"] = first
    for i, block in enumerate(blocks):
        for layer, theirs in BLOCK_LAYERS.items():
            for kind in ("weight", "bias"):
                values = [left.pop(f"{block}.{part}.{kind}") for part in theirs]
                ours[f"blocks.{i}.{layer}.{kind}"] = torch.cat(values, dim=-2 if kind == "weight" else -1)
    if "pos_embed.pos_embed" in left:
        ours["pos_embed"] = left.pop("pos_embed.pos_embed")
    if left:
        raise UserError(f"{path} holds tensors that a DiT does not have, such as {sorted(left)[0]}")
    return ours


def _rename_to_theirs(state: dict[str, Tensor], embedders: list[str]) -> dict[str, Tensor]:
    """Return the tensors of a DiT or of a RemixDiT's backbone under diffusers' names.

    `embedders` lists the modules that get a copy of the timestep and label embedders. The position embedding is left
    out, because diffusers computes it.
    """
    theirs = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if layer in OTHER_LAYERS:
            theirs[f"{OTHER_LAYERS[layer]}.{kind}"] = value
        elif layer in EMBEDDERS:
            theirs |= {f"{module}.{EMBEDDERS[layer]}.{kind}": value for module in embedders}
        elif layer.startswith("blocks."):
            _, i, layer = layer.split(".", 2)
            parts = value.chunk(len(BLOCK_LAYERS[layer]), dim=-2 if kind == "weight" else -1)
            names = (f"transformer_blocks.{i}.{part}.{kind}" for part in BLOCK_LAYERS[layer])
            theirs |= dict(zip(names, parts, strict=True))
    return theirs


def write(path, models: dict[str, nn.Module], config: dict, vae=None, pipeline: bool = False):
    """Write the EMA model as a folder for diffusers.

    A DiT becomes the folder of a DiTTransformer2DModel, or that of a pipeline. A RemixDiT or a flow always becomes the
    folder of a pipeline, which holds all the code that diffusers needs to run it.

    Args:
        path: the folder to create.
        models: "ema" maps to the model to write.
        config: the config of the checkpoint that the model comes from.
        vae: a diffusers.AutoencoderKL to store in the pipeline, or None.
        pipeline: write a pipeline also for a DiT.

    Raises:
        UserError: if diffusers cannot represent the model, or the VAE has another number of channels.
    """
    model = models["ema"]
    make_transformer = _mixed_transformer if config["model"]["remix"] else _plain_transformer
    transformer = make_transformer(model, config)
    if pipeline or is_pipeline(config):
        _write_pipeline(path, transformer, config, vae)
    else:
        with _new_folder(path) as folder:
            transformer.save_pretrained(folder)


def is_pipeline(config: dict) -> bool:
    """Return whether `write` always writes a pipeline, because the model needs more than diffusers' own one of DiTs."""
    return config["model"]["remix"] is not None or _flow(config) is not None


def _flow(config: dict) -> dict | None:
    """Return the settings of a flow, or None for Gaussian diffusion."""
    if not (target := flow_target(config["diffusion"])):
        return None
    settings = target | config["diffusion"]
    return {key: settings[key] for key in FLOW_OPTIONS if key in settings}


def _plain_transformer(dit: nn.Module, config: dict):
    """Return a DiTTransformer2DModel with the weights of a DiT.

    The timestep embedding of diffusers' class has other frequencies than the published DiT. The class in the exported
    Python file has those of the model, and AutoModel loads it with trust_remote_code=True.
    """
    # diffusers takes seconds to import.
    from interop.diffusers_files.remix_transformer import PublishedDiTTransformer2DModel

    transformer = PublishedDiTTransformer2DModel(**_transformer_arguments(dit, config))
    recorded = {"frequency_shift": dit.frequency_shift, "flow": _flow(config)}
    transformer.register_to_config(**{key: value for key, value in recorded.items() if value is not None})
    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(dit.config["depth"])]
    transformer.load_state_dict(_rename_to_theirs(dit.state_dict(), embedders))
    return transformer


def _write_pipeline(path, transformer, config: dict, vae):
    """Write the folder of a pipeline. That of a RemixDiT holds the K bases and mixes them when it runs."""
    # diffusers takes seconds to import.
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    from interop.diffusers_files.pipeline import RemixDiTPipeline

    shape, flow = transformer.config, _flow(config)
    if vae is not None and shape.in_channels != vae.config.latent_channels:
        raise UserError(f"the model denoises {shape.in_channels} channels, the VAE has {vae.config.latent_channels}")
    if flow is None:
        scheduler = DDPMScheduler(
            variance_type="learned_range" if shape.out_channels > shape.in_channels else "fixed_large",
            clip_sample=config["data"]["vae"] == "none",
            timestep_spacing="linspace",
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=flow.get("shift", 1.0))
    if vae is not None:
        # The model was trained on latents that were normalized as recorded, whatever the VAE's own config contains.
        recorded = config["data"]["vae"] != "none"
        own = Normalization.from_record(config["data"]) if recorded else Normalization.from_vae(vae.config)
        vae.register_to_config(**own.vae_config())
    with _new_folder(path) as folder:
        RemixDiTPipeline(transformer, scheduler, vae).save_pretrained(folder)


def _mixed_transformer(remix: Remix, config: dict):
    """Return a RemixDiTTransformer2DModel with the weights of a Remix of a DiT."""
    # diffusers takes seconds to import.
    from interop.diffusers_files.remix_transformer import RemixDiTTransformer2DModel

    layers = [name.removeprefix("blocks.*.") for name in remix.mixing_config["layers"]]
    transformer = RemixDiTTransformer2DModel(
        **_transformer_arguments(remix.backbone, config),
        n_basis=remix.n_basis,
        n_experts=remix.n_experts,
        mixer=remix.mixer,
        scope=remix.scope,
        mixed_layers=[part for layer in layers for part in BLOCK_LAYERS[layer]],
        boundaries=remix.boundaries,
        frequency_shift=remix.backbone.frequency_shift,
        flow=_flow(config),
    )
    weights = _rename_to_theirs(remix.backbone.state_dict(), ["embedder"])
    weights["logits"] = remix.logits.detach().view(-1, remix.n_experts, remix.n_basis)
    transformer.load_state_dict(weights)
    return transformer


def _transformer_arguments(dit: nn.Module, config: dict) -> dict:
    """Return DiTTransformer2DModel's keyword arguments for a DiT. Raises UserError if diffusers cannot represent it."""
    shape = dit.config
    if shape["mlp_ratio"] != 4 or not shape["class_dropout_prob"]:
        raise UserError("diffusers supports only DiTs with an MLP ratio of 4 and a null class")
    positions = sincos_positions(shape["hidden_size"], shape["input_size"] // shape["patch_size"])
    if not torch.allclose(dit.pos_embed[0], positions, atol=1e-5):
        raise UserError("diffusers supports only DiTs with the published position embedding")
    flow = _flow(config)
    if flow and (flow["path"], flow["prediction"]) != ("linear", "velocity"):
        raise UserError("of flows, only those with a linear path and a velocity prediction can be exported")
    if flow is None and (changed := set(config["diffusion"]) - {"process", "learn_sigma"}):
        raise UserError(
            f"only models of the published diffusion process can be exported, this one has another {', '.join(changed)}"
        )
    return dict(
        num_attention_heads=shape["num_heads"],
        attention_head_dim=shape["hidden_size"] // shape["num_heads"],
        in_channels=dit.in_channels,
        out_channels=dit.out_channels,
        num_layers=shape["depth"],
        sample_size=shape["input_size"],
        patch_size=shape["patch_size"],
        num_embeds_ada_norm=shape["num_classes"],
        norm_eps=1e-6,
    )


@contextmanager
def _new_folder(path):
    """Yield a temporary folder in the parent folder of `path`.

    It is renamed to `path` on success, and removed on failure.

    Its files get the permissions that the user's umask gives new files; safetensors gives them to the owner only.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    mode = temporary.stat().st_mode & 0o666
    try:
        with name_write_errors(path):
            yield temporary
        for file in temporary.rglob("*.safetensors"):
            file.chmod(mode)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
