"""The checkpoint format of this project.

A checkpoint is a dict of plain types and tensors, written by torch.save and read with torch.load(weights_only=True):

    format, version     identify the format
    config              everything that is needed to build the model again, in parts:
        model           the argument of `checkpoint.build_model`, with all arguments, also those with default values:
            name            name of the model, such as "RemixDiT-S/2", or "custom"
            architecture    name of the backbone's record in models/, such as "DiT"
            backbone        the keyword arguments of its class
            remix           the keyword arguments of `remix.RemixDiT`; None for a plain model
        diffusion       the keyword arguments of `diffusion.create_process`
        data            images, image size, classes, autoencoder and normalization of the latents
        training        the options of the training run; None for a file of another project
        source          only if the weights were changed when a file of another project was read, or by convert.py
    step                number of completed training steps
    model, ema          state dicts of the raw weights and of their exponential moving average (EMA)
    optimizer, scaler   state of the optimizer and of the gradient scaler
    averages            only with --ema-snapshots: the power-function averages of the trained tensors
    window              sums of the metrics since the last log line

A .safetensors file holds one state dict, and format, version and config in its metadata, as text.
"""

import argparse
import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from interop import diffusers
from mixing.experts import stored_state
from runtime.errors import UserError, first_line, warn
from runtime.files import atomic_write
from runtime.hub import local_file

FORMAT = "remix-dit"
# Since version 3, the config names its backbone and is complete.
VERSION = 3


def save_checkpoint(path, state: dict):
    """Write a training state atomically: `path` always holds the complete old file or the complete new one."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)


def save_safetensors(path, model: nn.Module, config: dict):
    """Write the weights of a model as a .safetensors file with the config in its metadata, atomically."""
    with atomic_write(path) as temporary:
        metadata = {"format": FORMAT, "version": str(VERSION), "config": json.dumps(config)}
        save_file(stored_state(model), temporary, metadata=metadata)


def write(path, models: dict[str, nn.Module], config: dict):
    """Write the EMA weights with `save_safetensors`. `interop` documents the arguments."""
    save_safetensors(path, models["ema"], config)


def read_checkpoint(path, allow_pickle: bool = False, verify: bool = False) -> dict:
    """Read a file of tensors and plain types onto the CPU, without executing code from it.

    The file may have this project's format or another one. A .safetensors file is a state dict, or one with a config in
    its metadata (see `save_safetensors`). argparse.Namespace, which facebookresearch/DiT and the original Remix-DiT
    store in their files, is the only class that is allowed besides tensors. Tensors in a zip file, which torch.save
    writes, are mapped into memory: each is read from disk when it is used.

    Args:
        path: the file, or hf:OWNER/REPOSITORY/FILE for a file on the Hugging Face hub.
        allow_pickle: also read pickles of other classes, which can execute code.
        verify: compare all parts of the file with their checksums first.

    Returns:
        The content of the file.

    Raises:
        UserError: if the file is missing, damaged, from another version of this code, or not a dict.
    """
    path = Path(local_file(path))
    if not path.is_file():
        raise UserError(f"{path} is a folder without checkpoints" if path.is_dir() else f"{path}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, allow_pickle, verify)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if content.get("format") == FORMAT and (version := content.get("version")) != VERSION:
        age = "a newer" if isinstance(version, int) and version > VERSION else "an earlier"
        raise UserError(
            f"{path} was written by {age} version of this code, in format {version} instead of {VERSION}: use that "
            "version, or make the file again"
        )
    if content.get("format") == FORMAT and not {"config", "model", "ema"} <= content.keys():
        raise UserError(f"{path} is a checkpoint without its config or weights")
    if content.get("format") == FORMAT:
        _drop_rest(path, content["config"])
    return content


def _drop_rest(path, config: dict):
    """Remove the option `rest` of earlier versions, which had no effect unless it was "separate"."""
    model = config.get("model") if isinstance(config, dict) else None
    mixing = model.get("remix") if isinstance(model, dict) else None
    if isinstance(mixing, dict) and mixing.pop("rest", "shared") != "shared":
        raise UserError(f"{path} holds experts with separate parameters (rest), which this version does not support")


def _read_torch(path: Path, allow_pickle: bool, verify: bool):
    """Read what torch.save wrote. Raises UserError if the file is damaged or needs `allow_pickle`."""
    # torch.save writes a zip file. Before PyTorch 1.6 it was a pickle, which begins with the byte 0x80.
    zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if not zipped and file.read(1) != b"\x80":
            raise UserError(f"{path} is not a complete checkpoint (truncated, or another kind of file)")
    if verify and zipped and (reason := find_corruption(path)):
        raise UserError(f"{path} is damaged: {reason}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=zipped)
    except Exception as error:
        # A damaged file can cause errors of any kind.
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path} holds pickled Python objects, which can execute code: use --trust-pickle if you trust it"
            ) from None
        raise UserError(f"{path} is not a complete checkpoint (truncated or damaged): {first_line(error)}") from None


def _read_safetensors(path: Path) -> dict:
    """Read a .safetensors file: as a checkpoint if it holds a config, otherwise as a state dict."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, `file` is not a dict
    except Exception as error:
        # A damaged file can cause errors of any kind.
        raise UserError(f"{path} is not a complete .safetensors file: {first_line(error)}") from None
    try:
        config = json.loads(metadata.get("config", "null"))
        # Earlier versions wrote no version.
        version = int(metadata.get("version", 2))
    except ValueError as error:
        if metadata.get("format") == FORMAT:
            raise UserError(f"{path}: its metadata are not those of a checkpoint: {error}") from None
        # Of another project, which may store any text.
        return state
    if metadata.get("format") != FORMAT:
        # What another project says of its model is compared with the tensors.
        return {"model": state, "config": config} if isinstance(config, dict) else state
    return {"format": FORMAT, "version": version, "config": config, "model": state, "ema": state}


def checkpoints(folder) -> list[Path]:
    """Return the checkpoints in the checkpoints/ folder of a run, the latest step first."""
    files = [path for path in Path(folder).glob("*.pt") if path.stem.isdigit()]
    return sorted(files, key=lambda path: int(path.stem), reverse=True)


def find_checkpoint(path):
    """Return the newest checkpoint of a run.

    Args:
        path: folder of a run, or its folder of checkpoints. Any other path is returned unchanged.

    Raises:
        UserError: if the folder of checkpoints is empty.
    """
    folder = Path(path)
    places = [folder / "checkpoints", folder] if folder.is_dir() else []
    for place in places:
        if found := checkpoints(place):
            return str(found[0])
    if places and places[0].is_dir():
        raise UserError(f"{path} holds no checkpoint: {places[0]} has no file such as 0010000.pt")
    return path


def find_corruption(path) -> str | None:
    """Compare all parts of a checkpoint with the checksums that the file stores.

    Args:
        path: a file written by torch.save, which is a zip file.

    Returns:
        A description of the damage, or None if the file is intact.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        return f"its part {part} does not match its checksum" if part else None
    except Exception as error:
        # A damaged file can cause errors of any kind.
        return first_line(error)


def fingerprint(path) -> str:
    """Return a hash that identifies the content of a checkpoint.

    For a zip file it is the hash of the checksums that the file stores, which is fast even if the file is large.

    Args:
        path: a file (also hf:OWNER/REPOSITORY/FILE), or a folder or hub name in diffusers' layout.
    """
    if files := diffusers.find_transformer(path):
        config, weights = files
        return " ".join(map(fingerprint, (config, *weights)))
    path = local_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.CRC, part.file_size) for part in archive.infolist()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read this project's format. `interop` documents the arguments and the result.

    Raises:
        UserError: if the config describes no model, or contradicts the overrides.
    """
    if content.get("format") != FORMAT:
        return None
    config = content["config"]
    try:
        known = {"model": config["model"]["name"]} | config["model"]["backbone"] | (config["model"]["remix"] or {})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: its config does not describe a model: {error!r}") from None
    for key, value in overrides.items():
        if known.get(key) != value:
            raise UserError(f"{path} holds {key}={known.get(key)}, not {value}")
    if not ema and content["model"] is content["ema"]:
        warn(f"{path} holds the EMA weights only, which take the place of the raw weights")
    return config, content["ema" if ema else "model"]
