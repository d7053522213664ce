"""Determine a model's config from the shapes of its tensors, for files that hold no config."""

import argparse
import inspect
import math
import re
from collections.abc import Iterable

from torch import Tensor

from diffusion import FlowMatching, GaussianDiffusion, create_process
from diffusion.intervals import TIMESTEPS
from features.autoencoder import SHORT_NAMES, encoder_name
from models import DIT, TIMESTEP_FREQUENCIES, Backbone, model_names
from runtime.command_line import positive_int
from runtime.errors import UserError, warn

# The autoencoder of all published DiTs, and the factor by which they multiply its latents.
PUBLISHED_VAE = {"vae": SHORT_NAMES["ema"], "scale": 0.18215, "shift": 0.0}

# DistributedDataParallel and torch.compile put these before every parameter name.
WRAPPER_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")

# What files of other kinds hold, and a pattern of the names that only their tensors have. A state dict of a training
# checkpoint of PyTorch Lightning has names that begin with that of the network.
OTHER_FILES = {
    "a JiT (arXiv 2511.13720), which is not read: it denoises pixels and has a patch embedding of two layers": (
        r"x_embedder\.proj1\.|in_context_posemb$"
    ),
    "a DDT (arXiv 2504.05741), which is not read: only RAE's DiTDH, which is made after it, is": (
        r"^(ema_)?denoiser\.|(^|\.)s_embedder\."
    ),
    "an autoencoder such as VA-VAE, not a denoiser: convert it for diffusers, and use it as --vae": (
        r"^(module\.)?(encoder\..*|decoder\..*)conv_(in|out)\."
    ),
}
# Parts of a file's config that describe its model, its data and its process.
CONFIG_PARTS = ("model", "data", "diffusion", "transport")
# Arguments of `create_diffusion` that a file may store, with their defaults.
GAUSSIAN_DEFAULTS = dict(noise_schedule="linear", predict_xstart=False, sigma_small=False, diffusion_steps=TIMESTEPS)
# Options that tensor shapes do not always show. An override replaces their values.
HIDDEN_OPTIONS = ("num_heads", "class_dropout_prob", "frequency_shift")
# Flags of the scripts that read files of other projects.
TRUST_PICKLE_FLAG = dict(
    action="store_true",
    help="load files with pickled Python objects, which can execute code: only for files that you trust",
)
TIMESTEP_FREQUENCIES_FLAG = dict(
    choices=[*TIMESTEP_FREQUENCIES],
    help="frequencies of the timestep embedding that the weights were trained with: those of the published DiT, or "
    "those of diffusers' DiTTransformer2DModel (default: the file's, or published)",
)


def find_state_dict(content: dict, ema: bool) -> dict[str, Tensor]:
    """Find the state dict in a file that a published training script wrote.

    Args:
        content: a state dict, or a dict with state dicts under "ema", "model" or both.
        ema: prefer the state dict under "ema" to the one under "model".

    Returns:
        The state dict without the name prefixes of DistributedDataParallel and torch.compile. It is empty if `content`
        holds no state dict.
    """
    order = ("ema", "model") if ema else ("model", "ema")
    state = next((content[key] for key in order if key in content), content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        return {}
    return {WRAPPER_PREFIXES.sub("", key): value for key, value in state.items()}


def recognize_other(content: dict) -> str | None:
    """Say what a file holds that no format reads, if the names of its tensors tell: None if they do not."""
    names = set()
    for value in (content, *content.values()):
        names |= {key for key in value if isinstance(key, str)} if isinstance(value, dict) else set()
    for kind, pattern in OTHER_FILES.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return None


def stored_settings(content: dict) -> dict:
    """Return what a file says of its model beside the tensors: its training arguments, and entries of its config.

    Of a config in parts, those that describe the model, the data and the process are read. Arguments come first.
    """
    found = {}
    for entry in (content.get("args"), content.get("config")):
        entry = vars(entry) if isinstance(entry, argparse.Namespace) else entry
        parts = [entry] if isinstance(entry, dict) else []
        parts += [entry[key] for part in parts[:1] for key in CONFIG_PARTS if isinstance(part.get(key), dict)]
        for part in parts:
            found = {key: value for key, value in part.items() if not isinstance(value, dict)} | found
    return found


def stored_model_name(stored: dict) -> dict[str, str]:
    """Return {"model": name} if the settings stored in a file name a registered model, otherwise {}."""
    name = stored.get("model")
    return {"model": name} if isinstance(name, str) and name in model_names() else {}


def gaussian_process(path, stored: dict, learn_sigma: bool) -> dict:
    """Return the "diffusion" part of a config of Gaussian diffusion, for the settings stored in a file.

    Raises:
        UserError: if the settings are those of a flow, or of no diffusion process.
    """
    if "path_type" in stored or str(stored.get("model")).startswith("SiT-"):
        raise UserError(
            f"{path} says that its model is a flow, but not its path_type and prediction: save its state dict alone, "
            "and use it with --process flow"
        )
    changed = {key: stored[key] for key, value in GAUSSIAN_DEFAULTS.items() if stored.get(key, value) != value}
    options = {"process": GaussianDiffusion.name} | ({} if learn_sigma else {"learn_sigma": False}) | changed
    try:
        create_process(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} says that its process is {changed}: {error}") from None
    return options


def backbone_from_shapes(state: dict[str, Tensor]) -> dict | None:
    """Determine the keyword arguments of a DiT from the shapes of its tensors.

    Args:
        state: a state dict under facebookresearch/DiT's parameter names. The tensors of mixed layers may have a
            leading dimension of K bases.

    Returns:
        The keyword arguments of `models.DiT`, or None if the tensors are not those of a DiT. `num_heads` is missing,
        because the shapes do not depend on it, and `class_dropout_prob` is the published 0.1.
    """
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        out_channels = len(state["final_layer.linear.bias"]) // patch_size**2
        return dict(
            input_size=math.isqrt(state["pos_embed"].shape[1]) * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=count_blocks(state),
            mlp_ratio=size_ratio(state["blocks.0.mlp.fc1.bias"].shape[-1], hidden_size),
            class_dropout_prob=0.1,
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=out_channels == 2 * in_channels,
        )
    except (LookupError, ValueError, TypeError, ArithmeticError):
        # A missing tensor, or one with other dimensions than a DiT's.
        return None


def count_blocks(names: Iterable[str]) -> int:
    """Return the number of blocks of a model, whose tensors are named blocks.0, blocks.1 and so on."""
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)


def size_ratio(inner_size: int, hidden_size: int) -> float:
    """Return the mlp_ratio of an MLP, so that int(hidden_size * mlp_ratio) is its inner size also after rounding."""
    ratio = inner_size / hidden_size
    return ratio if int(hidden_size * ratio) == inner_size else math.nextafter(ratio, math.inf)


def make_config(
    path, backbone: dict, remix: dict | None, overrides: dict, stored: dict | None = None, record: Backbone = DIT
) -> dict:
    """Make the config of a model from a file that holds no config.

    Args:
        path: the file, for error messages.
        backbone: the keyword arguments of the backbone that the shapes show, such as the result of
            `backbone_from_shapes`.
        remix: the keyword arguments of `remix.RemixDiT` that the file shows, or None for a plain model.
        overrides: the overrides of `checkpoint.load_model`. Those of HIDDEN_OPTIONS are used as given. `model`, the
            expected name, and all other options are compared with the tensors.
        stored: the settings that the file stores, see `stored_settings`.
        record: record of the backbone.

    Returns:
        The config (see own.py). Its part "training" is None.

    Raises:
        UserError: if an override contradicts the tensors or is unknown, if the stored settings contradict them, or if
            the number of heads is not known.
    """
    stored = stored or {}
    hidden = {key for key in HIDDEN_OPTIONS if key in inspect.signature(record.module).parameters}
    hidden -= {"num_heads"} & backbone.keys()
    backbone = _count_classes(path, dict(backbone), stored, overrides)
    if "num_heads" in hidden:
        # The number of heads does not depend on the patch size.
        if similar := record.find_size({key: value for key, value in backbone.items() if key != "patch_size"}):
            backbone["num_heads"] = record.sizes[similar]["num_heads"]
        if (heads := stored.get("num_heads")) is not None:
            if overrides.get("num_heads", heads) != heads:
                raise UserError(f"{path} holds num_heads={heads}, not {overrides['num_heads']}")
            backbone["num_heads"] = heads
    size = record.find_size(backbone)
    _check_stored(path, stored, backbone | (remix or {}))
    name = f"{'Remix' if remix else ''}{record.name}-{size}" if size else None
    options = {key: value for key, value in overrides.items() if key != "model"}
    kind = f"{'Remix' if remix else ''}{record.name}"
    _check_name(path, overrides.get("model", name), name, f"a {kind} of {_shape(backbone)}")
    _check_options(path, options, backbone | (remix or {}), hidden)
    backbone |= {key: options[key] for key in hidden & options.keys()}
    if "num_heads" not in backbone:
        shape = f"width {backbone['hidden_size']}, depth {backbone['depth']}"
        raise UserError(f"{path} fits no registered model ({shape}): specify its number of heads (num_heads)")
    return {
        "model": {"name": name or "custom", "architecture": record.name, "backbone": backbone, "remix": remix},
        "diffusion": {"process": GaussianDiffusion.name}
        | ({} if backbone.get("learn_sigma") else {"learn_sigma": False}),
        "data": _guess_data(path, backbone, stored, record),
        "training": None,
    }


def flow_target(process: dict) -> dict[str, str]:
    """Return what the network of a flow learns: its process, path and prediction; nothing for Gaussian diffusion.

    Args:
        process: the "diffusion" part of a config, which may omit defaults.
    """
    if process.get("process") != FlowMatching.name:
        return {}
    defaults = FlowMatching().config
    return {"process": FlowMatching.name} | {key: process.get(key, defaults[key]) for key in ("path", "prediction")}


def warn_of_flow(path, config: dict):
    """Print a warning if a file cannot say that its model is a flow."""
    if flow_target(config["diffusion"]):
        warn(f"{path} cannot record that the model is a flow: use --to sit")


def warn_of_frequencies(path, config: dict):
    """Print a warning if a file cannot say that its model has other timestep frequencies than the published DiT."""
    if config["model"]["backbone"]["frequency_shift"]:
        warn(f"{path} cannot record the timestep frequencies: load it with --timestep-frequencies diffusers")


def warn_of_data(path, config: dict):
    """Print a warning if a file cannot say what its latents or its classes are, and a reader would assume others."""
    data, assumed = config["data"], assumed_vae(config["model"]["backbone"]["in_channels"])
    found = {key: data.get(key, value) for key, value in assumed.items()}
    if found["vae"]:
        found["vae"] = encoder_name(found["vae"])
    if found != assumed:
        warn(f"{path} cannot record the VAE and the normalization of the latents: --to safetensors does")
    classes, n_classes = data.get("classes"), config["model"]["backbone"]["num_classes"]
    if classes and len(classes) < n_classes:
        warn(
            f"{path} cannot record that only {len(classes)} of its {n_classes} classes were trained: --to safetensors "
            "does; otherwise sample them with --labels"
        )


def _shape(backbone: dict) -> str:
    """Describe the shape of a backbone."""
    return "width {hidden_size}, depth {depth} and patch size {patch_size}".format(**backbone)


def _check_name(path, expected: str | None, name: str | None, kind: str):
    """Raise UserError if the user expects another model than the one that the tensors belong to, of this kind."""
    if expected == name:
        return
    if expected not in model_names():
        raise UserError(f"unknown model {expected!r}: use one of {', '.join(model_names())}")
    raise UserError(f"{path} holds {name or kind}, not {expected}")


def _check_options(path, options: dict, known: dict, hidden: set[str]):
    """Raise UserError for an option that the model does not have, or that contradicts the tensors.

    Args:
        path: the file, for error messages.
        options: the options.
        known: those that the tensors show.
        hidden: names of those that they do not show.
    """
    for key, value in options.items():
        if key not in known and key not in hidden:
            raise UserError(f"unknown model option {key}")
        if key not in hidden and known[key] not in (None, value):
            raise UserError(f"{path} holds {key}={known[key]}, not {value}")


def _count_classes(path, backbone: dict, stored: dict, overrides: dict) -> dict:
    """Return a backbone's arguments with the number of classes and whether its table has a row for the null class.

    The table alone does not tell, so that it is taken to have one unless the file or the user says something else.

    Raises:
        UserError: if the file contradicts its tensors.
    """
    rows = backbone["num_classes"] + 1
    classes, dropout = stored.get("num_classes"), stored.get("class_dropout_prob", stored.get("cfg_prob"))
    dropout = overrides.get("class_dropout_prob", dropout)
    heads = stored.get("num_heads")
    for value in (classes, dropout, *(heads if isinstance(heads, list) else [heads])):
        if value is not None and not isinstance(value, int | float):
            raise UserError(f"{path} says {value!r} where a number is needed (classes, label dropout or heads)")
    if classes is None:
        classes = rows if dropout == 0 else rows - 1
    null_classes = int(dropout > 0) if dropout is not None else int(classes != rows)
    if classes + null_classes != rows:
        expected = f"num_classes={classes}" + ("" if dropout is None else f" and a label dropout of {dropout}")
        raise UserError(f"{path} says {expected}, but its table of classes has {rows} rows")
    default = backbone["class_dropout_prob"] if null_classes else 0.0
    return backbone | {"num_classes": classes, "class_dropout_prob": default if dropout is None else dropout}


def _check_stored(path, stored: dict, known: dict):
    """Raise UserError if a stored setting that has the name of a model's argument contradicts the tensors."""
    for key in known.keys() - {"class_dropout_prob", "num_classes"}:
        if (said := stored.get(key)) is not None and known[key] is not None and said != known[key]:
            raise UserError(f"{path} says {key}={said}, but its tensors have {known[key]}")


def _guess_data(path, backbone: dict, stored: dict, record: Backbone) -> dict:
    """Return the "data" part of a config.

    Four channels are the latents of a published VAE, and as many as the published models of the backbone denoise are
    theirs, whose VAE is not known. Others are pixels.

    Raises:
        UserError: if what the file says about its images does not suit its tensors.
    """
    channels, latent_side = backbone["in_channels"], backbone["input_size"]
    vae = dict(assumed_vae(channels))
    side = latent_side * dict([DIT.latents, record.latents]).get(channels, 1)
    said = stored.get("image_size", stored.get("resolution"))
    if isinstance(said, int) and said != side:
        if vae["vae"] != "none":
            raise UserError(
                f"{path} says that its images have {said} pixels per side, but the published VAE gives latents of side "
                f"{latent_side} for {side}: save its state dict alone to use it with another VAE"
            )
        # A VAE halves the side some times.
        factor, rest = divmod(said, latent_side)
        if rest or factor.bit_count() != 1 or channels in (1, 3):
            raise UserError(
                f"{path} says that its images have {said} pixels per side, but its model denoises {channels} channels "
                f"of side {latent_side}, which are not its pixels: save its state dict alone to use it with a VAE"
            )
        warn(f"{path} holds a model of latents, for images of {said} pixels: it does not say of which VAE (--vae)")
        side = said
    name = stored.get("vae")
    if isinstance(name, str) and (name in SHORT_NAMES or name in SHORT_NAMES.values()):
        if channels != 4:
            raise UserError(f"{path} says vae={name!r}, whose latents have 4 channels, but its tensors have {channels}")
        vae["vae"] = SHORT_NAMES.get(name, name)
    elif name and vae["vae"] != "none":
        raise UserError(
            f"{path} says vae={name!r}, whose normalization it does not say: save its state dict alone to use it with "
            "another VAE than the published ones"
        )
    return {"image_size": side, "classes": None, **vae}


def assumed_vae(channels: int) -> dict:
    """Return the VAE and its normalization for data that do not record them: four channels are the published VAE's."""
    return PUBLISHED_VAE if channels == 4 else {"vae": "none", "scale": 1.0, "shift": 0.0}


def head_numbers(text: str) -> int | list[int]:
    """Convert the value of --num-heads, as an argparse type: a number, or several that are separated by commas."""
    numbers = [positive_int(part) for part in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


NUM_HEADS_FLAG = dict(
    type=head_numbers,
    metavar="N",
    help="number of attention heads, for a file without a config that fits no registered model; of encoder and head, "
    "such as 16,16, for a DiTDH",
)


def frequency_override(choice: str | None) -> dict[str, int]:
    """Return the keyword argument of a DiT that a choice of --timestep-frequencies gives; none without the flag."""
    return {} if choice is None else {"frequency_shift": TIMESTEP_FREQUENCIES[choice]}


def given_overrides(args: argparse.Namespace) -> dict:
    """Return the overrides of `checkpoint.load_model` that --num-heads and --timestep-frequencies give."""
    heads = {"num_heads": args.num_heads} if args.num_heads else {}
    return heads | frequency_override(args.timestep_frequencies)
