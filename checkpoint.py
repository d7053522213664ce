"""The one file format for weights and training state, and the foreign files that can stand in for it.

A checkpoint is what torch.save writes of one dict of plain types and tensors, so that torch.load(weights_only=True)
reads it: format, version, config, step, model, ema, optimizer, scaler, window (the metrics since the last log line).
`config` says how everything was made: config["model"] is what `build_model` takes, config["diffusion"] what
`create_diffusion` takes, config["data"] describes the images, and config["training"] the run.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import threading
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from common import UserError, atomic_write, first_line
from interop.diffusers import find_transformer, read_transformer, stored_vae
from models import SIZES, DiT, DiT_models
from remix import MIXED_LAYERS, ExpertSwitch, FoldedRemixDiT, IndependentExperts, RemixDiT, RemixDiT_models

FORMAT, VERSION = "remix-dit", 1
ORIGINAL_LOGITS = "coefficients.weight"  # pi in the original Remix-DiT's files
PUBLISHED_VAE = {"vae": "stabilityai/sd-vae-ft-ema", "scale": 0.18215}  # what every published DiT was trained on


def build_model(config: dict) -> DiT | RemixDiT:
    """Build the model that a config's "model" part describes, with fresh weights."""
    dit = DiT(**config["backbone"])
    return RemixDiT(dit, **config["remix"]) if config["remix"] else dit


def model_config(name: str, model: DiT | RemixDiT) -> dict:
    """The "model" part of a config, from which `build_model` builds `model` again."""
    if isinstance(model, RemixDiT):
        return {"name": name, "backbone": model.backbone_config, "remix": model.config}
    return {"name": name, "backbone": dict(model.config), "remix": None}


def save_checkpoint(path, state: dict):
    """Write a training state; `path` holds the old file or the whole new one, never half of either."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)


def read_checkpoint(path, allow_pickle: bool = False, mmap: bool = True, verify: bool = False) -> dict:
    """Read a file of tensors and plain types onto the CPU; nothing in it is executed, unless you `trust` it.

    argparse.Namespace, which facebookresearch/DiT and the original Remix-DiT store, is the one class let in.
    A .safetensors file is a bare state dict, or one with the config that convert.py wrote beside it.
    mapped: read the tensors that are used, when they are; whole: see first that all parts match their checksums. Raises
    UserError for a missing, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    zipped = zipfile.is_zipfile(path)  # torch.save's format; before PyTorch 1.6 it was a bare pickle
    with open(path, "rb") as file:
        if not zipped and file.read(1) != b"\x80":
            raise UserError(f"{path} is not a whole checkpoint (truncated, or another kind of file)")
    if verify and zipped and (reason := find_corruption(path)):
        raise UserError(f"{path} is damaged: {reason}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=zipped and mmap)
    except Exception as error:  # a damaged file may provoke anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path} holds more than tensors and plain types: it could run code, and is loaded with --trust-pickle only"
            ) from None
        raise UserError(f"{path} is not a whole checkpoint (truncated or damaged): {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if content.get("format") == FORMAT and content.get("version", 0) > VERSION:
        raise UserError(f"{path} was written by a newer version of this code (format {content['version']})")
    if content.get("format") == FORMAT and not {"config", "model", "ema"} <= content.keys():
        raise UserError(f"{path} is a checkpoint without its config or weights")
    return content


def _read_safetensors(path: Path) -> dict:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        config = json.loads(metadata["config"]) if "config" in metadata else None
    except Exception as error:  # a damaged file may provoke anything
        raise UserError(f"{path} is not a whole .safetensors file: {first_line(error)}") from None
    return {"format": FORMAT, "config": config, "model": state, "ema": state} if config else state


def fingerprint(path) -> str:
    """What tells a file's content from another's, at little cost: the checksums that a zip file keeps of its parts."""
    if found := find_transformer(path):
        return " ".join(map(fingerprint, found))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.CRC, part.file_size) for part in archive.infolist()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder) -> list[Path]:
    """The checkpoints in a run's checkpoints/ folder, the latest step first."""
    files = [path for path in Path(folder).glob("*.pt") if path.stem.isdigit()]
    return sorted(files, key=lambda path: int(path.stem), reverse=True)


def find_corruption(path) -> str | None:
    """What is wrong with a checkpoint, by the checksums it carries of all its parts; None if it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        return f"its part {part} does not match its checksum" if part else None
    except Exception as error:  # a damaged file may provoke anything
        return first_line(error)


class CheckpointWriter:
    """Writes a run's checkpoints from a thread, one at a time, while training goes on; then deletes those not kept.

    keep: the most recent ones to keep, or None for all of them; keep_every: steps whose multiples are kept as well.
    A checkpoint that cannot be written (a full disk, say) is reported and given up: training does not end for it, and
    the last good one stays.
    """

    def __init__(self, folder: Path, logger, keep: int | None = None, keep_every: int | None = None):
        self.folder, self.logger, self.keep, self.keep_every = Path(folder), logger, keep, keep_every
        self.thread = None

    def save(self, step: int, state: dict):
        """Copy the state to host memory and start to write it; waits for the one before to be written."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(self.folder / f"{step:07d}.pt", _host_copy(state)))
        self.thread.start()

    def wait(self):
        """Return when nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, path: Path, state: dict):
        try:
            save_checkpoint(path, state)
        except Exception as error:  # whatever a file system can think of
            self.logger.error(
                f"COULD NOT SAVE {path}: {first_line(error)}; training goes on, the last good checkpoint stays"
            )
            return
        self.logger.info(f"saved {path}")
        try:
            self._prune(path)
        except OSError as error:
            self.logger.error(f"could not delete an old checkpoint: {error}")

    def _prune(self, saved: Path):
        """Delete what is older than the most recent ones; what is newer (a run resumed from the middle) is not ours."""
        older = [path for path in checkpoints(self.folder) if int(path.stem) <= int(saved.stem)]
        for path in older[self.keep :] if self.keep else []:
            if not (self.keep_every and int(path.stem) % self.keep_every == 0):
                path.unlink(missing_ok=True)


def _host_copy(state):
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _host_copy(value) for key, value in state.items()}
    return [_host_copy(value) for value in state] if isinstance(state, list) else state


def load_model(
    path, ema: bool = True, allow_pickle: bool = False, verify: bool = False, **overrides
) -> tuple[DiT | RemixDiT, dict]:
    """Load a model for inference: (model in eval mode on the CPU, config).

    Reads this project's checkpoints, facebookresearch/DiT's (a bare state dict, or one under "ema" or "model"), the
    original Remix-DiT's, and DiTs in diffusers' layout (a folder, or a name on the hub). ema: the averaged weights where
    the file has them, else the raw ones. In a foreign file the sizes are read off the tensors; overrides:
    model="RemixDiT-S/2" names the architecture, num_heads=6 gives what no tensor shows where no registry entry fits, any
    other keyword argument of DiT is taken as it is. Overrides that contradict the file raise UserError, as does a file
    that is no checkpoint. trust: let the file run code. whole: check all of the file first.
    """
    transformer = find_transformer(path)
    content = read_checkpoint(transformer[1] if transformer else path, allow_pickle, verify=verify)
    if transformer:
        state, heads = read_transformer(path, transformer[0], content)
        if overrides.setdefault("num_heads", heads) != heads:
            raise UserError(f"{path} holds num_heads={heads}, not {overrides['num_heads']}")
        config, state = _foreign_config(path, state, overrides)
        config["data"] |= stored_vae(transformer[0])
    elif content.get("format") == FORMAT:
        config = content["config"]
        known = {"model": config["model"]["name"], **config["model"]["backbone"], **(config["model"]["remix"] or {})}
        for key, value in overrides.items():
            if known.get(key) != value:
                raise UserError(f"{path} holds {key}={known.get(key)}, not {value}")
        state = content["ema" if ema else "model"]
    else:
        state, name = _foreign_state(path, content, ema)
        config, state = _foreign_config(path, state, {"model": name} | overrides if name else overrides)
    try:
        check_shapes(path, config["model"], state)
        model = build_model(config["model"])
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} describes a model that cannot be built: {error}") from None
    load_weights(model, state, path)
    return model.eval(), config


def check_shapes(path, config: dict, state: dict[str, Tensor]):
    """Raise UserError unless the model that a file describes has the shapes of its tensors, before it takes any memory."""
    if config["backbone"]["depth"] > len(state):
        raise UserError(f"{path} does not fit the model: {config['backbone']['depth']} blocks, {len(state)} tensors")
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            shapes = f"{list(state[key].shape)}, not {list(value.shape)}"
            raise UserError(f"{path} does not fit the model: {key} has the shape {shapes}")


def load_denoiser(
    paths: list, ema: bool = True, allow_pickle: bool = False, **overrides
) -> tuple[DiT | ExpertSwitch, dict]:
    """Load what a sampler needs: a DiT, a RemixDiT folded, or independent experts; and the (first) file's config.

    Several files are plain DiTs trained on intervals of timesteps (train_fast.py --timesteps), in any order, which must
    tile all of them. The other arguments are `load_model`'s. Raises UserError as it does, and for files that do not tile.
    """
    loaded = [(path, *load_model(path, ema, allow_pickle, **overrides)) for path in paths]
    if len(loaded) == 1:
        _, model, config = loaded[0]
        return (FoldedRemixDiT(model).eval() if isinstance(model, RemixDiT) else model), config
    for path, model, config in loaded:
        if isinstance(model, RemixDiT) or not config["training"]:
            raise UserError(f"{path} is no independent expert (a DiT from train_fast.py --timesteps): give it alone")
        if model.config != loaded[0][1].config:
            raise UserError(f"{path} and {loaded[0][0]} hold models of different shapes")
    loaded.sort(key=lambda item: item[2]["training"]["timesteps"])
    intervals = [config["training"]["timesteps"] for _, _, config in loaded]
    bounds = [intervals[0][0], *(high for _, high in intervals)]
    if intervals != [list(pair) for pair in pairwise(bounds)] or (bounds[0], bounds[-1]) != (0, 1000):
        raise UserError(f"the experts' timesteps {intervals} do not tile 0 to 1000")
    return IndependentExperts([model for _, model, _ in loaded], bounds).eval(), loaded[0][2]


def load_weights(model: nn.Module, state: dict[str, Tensor], path):
    """load_state_dict, with a one-line UserError for weights of another model."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        complaint = str(error).splitlines()[1].strip() if "\n" in str(error) else first_line(error)
        raise UserError(f"{path} does not fit the model: {complaint[:300]}") from None


def original_state(model: DiT | RemixDiT) -> dict[str, Tensor]:
    """The weights under the original Remix-DiT's names. Raises UserError for a model that its code cannot express."""
    if not isinstance(model, RemixDiT):
        return model.state_dict()
    if (model.mixer, model.scope, model.mixed_layers) != ("softmax", "global", MIXED_LAYERS):
        raise UserError("the original code has softmax mixers of global scope over the four linears only")
    return {
        ORIGINAL_LOGITS if key == "logits" else key.removeprefix("backbone."): value
        for key, value in model.state_dict().items()
    }


def _foreign_state(path, content: dict, ema: bool) -> tuple[dict[str, Tensor], str | None]:
    """The state dict of a foreign file, and the model's name if the file's args say one that the registries know."""
    state = next((content[key] for key in (("ema", "model") if ema else ("model", "ema")) if key in content), content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict")
    name = getattr(content.get("args"), "model", None)
    prefixes = re.compile(r"^(module\.|_orig_mod\.)+")  # what DDP and torch.compile put before every name
    state = {prefixes.sub("", key): value for key, value in state.items()}
    return state, name if name in DiT_models or name in RemixDiT_models else None


def _foreign_config(path, state: dict[str, Tensor], overrides: dict) -> tuple[dict, dict[str, Tensor]]:
    """The config that a foreign state dict's shapes and the overrides describe, and the state under our names."""
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        out_channels = len(state["final_layer.linear.bias"]) // patch_size**2
        backbone = dict(
            input_size=math.isqrt(state["pos_embed"].shape[1]) * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            mlp_ratio=state["blocks.0.mlp.fc1.bias"].shape[-1] / hidden_size,
            class_dropout_prob=0.1,
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=out_channels == 2 * in_channels,
        )
    except (KeyError, ValueError):
        raise UserError(f"{path} holds no DiT: its tensors have other names") from None

    remix = None
    if ORIGINAL_LOGITS in state:
        n_experts, n_basis = state[ORIGINAL_LOGITS].shape
        remix = dict(n_basis=n_basis, n_experts=n_experts)
        state = {"logits" if key == ORIGINAL_LOGITS else f"backbone.{key}": value for key, value in state.items()}

    overrides = dict(overrides)
    size = next(
        (size for size, shape in SIZES.items() if (shape["hidden_size"], shape["depth"]) == (hidden_size, depth)), None
    )
    found = f"{'Remix' if remix else ''}DiT-{size}/{patch_size}" if size else None
    name = overrides.pop("model", found)
    if name != found:
        if name not in DiT_models and name not in RemixDiT_models:
            raise UserError(f"unknown model {name!r}: use one of {', '.join([*DiT_models, *RemixDiT_models])}")
        shape = f"{'RemixDiT' if remix else 'DiT'} of width {hidden_size}, depth {depth} and patch {patch_size}"
        raise UserError(f"{path} holds {found or f'a {shape}'}, not {name}")
    if size:
        backbone["num_heads"] = SIZES[size]["num_heads"]
    for key, value in overrides.items():
        known = (backbone | (remix or {})).get(key)
        if key not in (*backbone, *(remix or ()), "num_heads"):
            raise UserError(f"unknown model option {key}")
        if known not in (None, value) and key not in ("num_heads", "class_dropout_prob"):
            raise UserError(f"{path} holds {key}={known}, not {value}")
        if key in ("num_heads", "class_dropout_prob"):
            backbone[key] = value
    if "num_heads" not in backbone:
        raise UserError(
            f"{path} fits no registered model (width {hidden_size}, depth {depth}): give its number of heads (num_heads)"
        )

    latent = in_channels == 4
    data = {"image_size": backbone["input_size"] * (8 if latent else 1), "classes": None}
    data |= PUBLISHED_VAE if latent else {"vae": "none", "scale": 1.0}
    config = {
        "model": {"name": name or "custom", "backbone": backbone, "remix": remix},
        "diffusion": {},
        "data": data,
        "training": None,
    }
    if not backbone["learn_sigma"]:
        config["diffusion"] = {"learn_sigma": False}
    return config, state
