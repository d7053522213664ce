"""The checkpoint format of this project, and loading of models from it and from the formats in interop/.

A checkpoint is a dict of plain types and tensors, written by torch.save and read with torch.load(weights_only=True):

    format, version     identify the format
    config              everything that is needed to build the model again, in parts:
        model           the argument of `build_model`
        diffusion       the keyword arguments of `create_process`; without "process" it is Gaussian diffusion
        data            image size, classes, autoencoder and scale of the latents
        training        the options of the training run
        source          only if the weights were changed when a file of another project was read, or by convert.py
    step                number of completed training steps
    model, ema          state dicts of the raw weights and of their exponential moving average (EMA)
    optimizer, scaler   state of the optimizer and of the gradient scaler
    averages            only with --ema-snapshots: the power-function averages of the trained tensors
    window              sums of the metrics since the last log line
"""

import argparse
import hashlib
import json
import pickle
import threading
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common import UserError, atomic_write, first_line
from diffusion import NOISE_LEVELS, process_name
from experts import ExpertSwitch, IndependentExperts, for_sampling
from hub import local_file
from interop import diffusers, dit, original, sit
from models import DiT
from posthoc_ema import write_snapshot
from remix import RemixDiT

FORMAT = "remix-dit"
# Version 2 changed the random draws of training: a file of version 1 has the same content, but cannot be resumed from.
VERSION = 2


def build_model(config: dict) -> DiT | RemixDiT:
    """Build the model that the "model" part of a config specifies, with newly initialized weights."""
    backbone = DiT(**config["backbone"])
    return RemixDiT(backbone, **config["remix"]) if config["remix"] else backbone


def model_config(name: str, model: DiT | RemixDiT) -> dict:
    """Return the "model" part of a config, from which `build_model` builds the same architecture.

    Args:
        name: the model's name in the registry, such as "RemixDiT-S/2".
        model: the model.
    """
    remix = model.config if isinstance(model, RemixDiT) else None
    return {"name": name, "backbone": model.backbone_config, "remix": remix}


def save_checkpoint(path, state: dict):
    """Write a training state atomically: `path` always holds the complete old file or the complete new one."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)


def save_safetensors(path, model: DiT | RemixDiT, config: dict):
    """Write the weights of a model as a .safetensors file with the config in its metadata, atomically."""
    with atomic_write(path) as temporary:
        save_file(model.state_dict(), temporary, metadata={"config": json.dumps(config)})


class CheckpointWriter:
    """Write the checkpoints of a run in a background thread, one at a time, and delete old ones.

    An error, such as a full disk, is logged and does not end the training. The last good checkpoint is kept.

    Args:
        folder: the folder of the checkpoints.
        logger: has the methods `info` and `error`.
        keep: number of most recent checkpoints to keep. None keeps all of them.
        keep_every: checkpoints at multiples of this number of steps are kept as well.

    Attributes:
        failed: whether the latest checkpoint could not be written. It is valid after `wait`.
    """

    def __init__(self, folder: Path, logger, keep: int | None = None, keep_every: int | None = None):
        self.folder = Path(folder)
        self.logger = logger
        self.keep = keep
        self.keep_every = keep_every
        self.thread = None
        self.failed = False

    def save(self, step: int, state: dict):
        """Start writing a state, after the previous checkpoint has been written.

        Args:
            step: number of steps done.
            state: the content, in host memory. It must not be changed afterwards.
        """
        self._start(self._write, self.folder / f"{step:07d}.pt", state)

    def save_snapshot(self, step: int, averages: dict[str, dict[str, Tensor]], dtype: str):
        """Start writing a snapshot for post-hoc EMA, likewise; see `posthoc_ema.write_snapshot` for the arguments."""
        self._start(self._write_snapshot, step, averages, dtype)

    def _start(self, write, *arguments):
        """Call a function in the thread, after the previous file has been written."""
        self.wait()
        self.thread = threading.Thread(target=write, args=arguments)
        self.thread.start()

    def wait(self):
        """Wait until no checkpoint is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, path: Path, state: dict):
        self.failed = True
        try:
            save_checkpoint(path, state)
        except Exception as error:
            # File systems raise errors of many kinds, and none of them may end the training.
            self.logger.error(f"COULD NOT SAVE {path}: {first_line(error)}; the last good checkpoint is kept")
            return
        self.failed = False
        self.logger.info(f"saved {path}")
        try:
            self._delete_old(path)
        except OSError as error:
            self.logger.error(f"could not delete an old checkpoint: {error}")

    def _write_snapshot(self, step: int, averages: dict[str, dict[str, Tensor]], dtype: str):
        try:
            write_snapshot(self.folder.parent, step, averages, dtype)
        except Exception as error:
            self.logger.error(f"COULD NOT SAVE the snapshot of step {step}: {first_line(error)}; training continues")

    def _delete_old(self, saved: Path):
        """Delete the checkpoints that are not to be kept.

        Checkpoints of later steps than `saved` are left alone: they exist when a run was resumed from an earlier step.
        """
        older = [path for path in checkpoints(self.folder) if int(path.stem) <= int(saved.stem)]
        for path in older[self.keep :] if self.keep else []:
            if not (self.keep_every and int(path.stem) % self.keep_every == 0):
                path.unlink(missing_ok=True)


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
        UserError: if the file is missing, damaged, from a newer version of this code, or not a dict.
    """
    path = Path(local_file(path))
    if not path.is_file():
        raise UserError(f"{path} is a folder without checkpoints" if path.is_dir() else f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_torch(path, allow_pickle, verify)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if content.get("format") == FORMAT and content.get("version", 0) > VERSION:
        raise UserError(f"{path} was written by a newer version of this code (format {content['version']})")
    if content.get("format") == FORMAT and not {"config", "model", "ema"} <= content.keys():
        raise UserError(f"{path} is a checkpoint without its config or weights")
    return content


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
                f"{path} holds other classes than tensors and plain types: loading it could execute code, "
                "which requires --trust-pickle"
            ) from None
        raise UserError(f"{path} is not a complete checkpoint (truncated or damaged): {first_line(error)}") from None


def _read_safetensors(path: Path) -> dict:
    """Read a .safetensors file: as a checkpoint if it holds a config, otherwise as a state dict."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, `file` is not a dict
        config = json.loads(metadata["config"]) if "config" in metadata else None
    except Exception as error:
        # A damaged file can cause errors of any kind.
        raise UserError(f"{path} is not a complete .safetensors file: {first_line(error)}") from None
    return {"format": FORMAT, "config": config, "model": state, "ema": state} if config else state


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
        return " ".join(map(fingerprint, files))
    path = local_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.CRC, part.file_size) for part in archive.infolist()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(
    path, ema: bool = True, allow_pickle: bool = False, verify: bool = False, **overrides
) -> tuple[DiT | RemixDiT, dict]:
    """Load a model for inference.

    Args:
        path: a checkpoint of this project, of facebookresearch/DiT or willisma/SiT (a state dict, also under "ema" or
            "model"), of REPA or of the original Remix-DiT, or a DiT in diffusers' layout (a folder or a name on the
            Hugging Face hub). hf:OWNER/REPOSITORY/FILE is a file on the hub. The folder of a run of this project stands
            for its newest checkpoint.
        ema: load the EMA weights if the file has them, otherwise the raw weights.
        allow_pickle: let the file execute code.
        verify: compare the file with its checksums first.
        overrides: what the caller expects or knows about the model: `model`, its name such as "RemixDiT-S/2", and its
            keyword arguments. `num_heads` is required if the file holds no config and no registered model has its
            width and depth.

    Returns:
        The model in eval mode on the CPU, and its config. If the file holds no config, the config is determined from
        the shapes of the tensors, and its part "training" is None.

    Raises:
        UserError: if the file is missing or damaged, has an unknown format, or contradicts the overrides.
    """
    key = "ema" if ema else "model"
    models, config = load_models(path, (key,), allow_pickle, verify, **overrides)
    return models[key], config


def load_models(
    path, keys: tuple[str, ...], allow_pickle: bool = False, verify: bool = False, **overrides
) -> tuple[dict[str, DiT | RemixDiT], dict]:
    """Load models from one file, as `load_model` does: for the key "ema" with the EMA, for "model" with raw weights.

    The file is read once. Only the keys that are given are in the result.
    """
    path = find_checkpoint(path)
    transformer = diffusers.find_transformer(path)
    weights_file = transformer[1] if transformer else path
    content = read_checkpoint(weights_file, allow_pickle, verify)
    models = {}
    for key in keys:
        config, state = _read_any(path, content, key == "ema", overrides)
        try:
            check_shapes(path, config["model"], state)
            model = build_model(config["model"])
        except UserError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} specifies a model that cannot be built: {error}") from None
        load_weights(model, state, path)
        models[key] = model.eval()
    return models, config


def _read_own(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]] | None:
    """Read this project's format, as the `read` functions in `interop` read theirs."""
    if content.get("format") != FORMAT:
        return None
    config = content["config"]
    # Omitted options of the model have their default.
    known = {"frequency_shift": 0, "model": config["model"]["name"]}
    known |= config["model"]["backbone"] | (config["model"]["remix"] or {})
    for key, value in overrides.items():
        if known.get(key) != value:
            raise UserError(f"{path} holds {key}={known.get(key)}, not {value}")
    return config, content["ema" if ema else "model"]


# Files of an original Remix-DiT and of SiT have all the tensor names of a published DiT, and are tried before it.
READERS = (diffusers.read, _read_own, original.read, sit.read, dit.read)


def _read_any(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]]:
    """Return the config and the state dict of a file of any known format."""
    for read in READERS:
        if found := read(path, content, ema, overrides):
            return found
    raise UserError(f"{path} holds no state dict of a DiT or RemixDiT in a known format")


def check_shapes(path, config: dict, state: dict[str, Tensor]):
    """Check that the tensors of a file fit the model that its config specifies, without allocating the model.

    Args:
        path: the file, for error messages.
        config: the "model" part of the config.
        state: the state dict.

    Raises:
        UserError: if a tensor has another shape than in the model, or if the model has more blocks than the file has
            tensors.
    """
    depth = config["backbone"]["depth"]
    if depth > len(state):
        raise UserError(f"{path} does not fit the model: {depth} blocks, but {len(state)} tensors")
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            shapes = f"{list(state[key].shape)}, not {list(value.shape)}"
            raise UserError(f"{path} does not fit the model: {key} has the shape {shapes}")


def load_weights(model: nn.Module, state: dict[str, Tensor], path):
    """Load a state dict into a model. Raises a UserError of one line, which names `path`, if it does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # The first line of the message contains only the name of the class.
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else first_line(error)
        raise UserError(f"{path} does not fit the model: {reason[:300]}") from None


def choose_process(path, config: dict, process: str | None):
    """Set the diffusion process in the config of a file of another project, which does not record it.

    Args:
        path: the file, for error messages.
        config: the config of the file. Its part "diffusion" is replaced if the file does not record its process.
        process: "gaussian" or "flow"; None to use what the config says.

    Raises:
        UserError: if the file records another process.
    """
    recorded = process_name(config["diffusion"])
    if process in (None, recorded):
        return
    # The config of a file without one is determined from its tensors: it has no training options.
    if config["training"] or "process" in config["diffusion"] or config["model"]["remix"]:
        raise UserError(f"--process {process}, but {path} was trained with --process {recorded}")
    config["diffusion"] = {"process": process}


def load_denoiser(
    paths: list, ema: bool = True, allow_pickle: bool = False, **overrides
) -> tuple[DiT | ExpertSwitch, dict]:
    """Load a model for sampling.

    Args:
        paths: one checkpoint, or the checkpoints of independent experts in any order. Independent experts are plain
            DiTs trained on intervals of timesteps (train_fast.py --timesteps), which together must cover all timesteps
            exactly once.
        ema, allow_pickle, overrides: see `load_model`.

    Returns:
        The model in eval mode on the CPU, and its config. The model is a DiT, a FoldedRemix, or IndependentExperts
        with the config of the expert that has the lowest timesteps.

    Raises:
        UserError: if a file cannot be loaded, or if several files are not independent experts of one architecture
            whose intervals cover all timesteps exactly once.
    """
    loaded = [(path, *load_model(path, ema, allow_pickle, **overrides)) for path in paths]
    if len(loaded) == 1:
        _, model, config = loaded[0]
        return for_sampling(model), config
    for path, model, config in loaded:
        if isinstance(model, RemixDiT) or not config["training"]:
            raise UserError(
                f"{path} is not an independent expert (a DiT from train_fast.py --timesteps): give only one --ckpt"
            )
        if model.config != loaded[0][1].config:
            raise UserError(f"{path} and {loaded[0][0]} hold models of different shapes")
        if config["diffusion"] != loaded[0][2]["diffusion"]:
            raise UserError(f"{path} and {loaded[0][0]} were trained with different processes")
    loaded.sort(key=lambda item: item[2]["training"]["timesteps"])
    intervals = [config["training"]["timesteps"] for _, _, config in loaded]
    bounds = [intervals[0][0], *(high for _, high in intervals)]
    lowest, highest = NOISE_LEVELS[process_name(loaded[0][2]["diffusion"])]
    if intervals != [list(pair) for pair in pairwise(bounds)] or (bounds[0], bounds[-1]) != (lowest, highest):
        raise UserError(
            f"the experts' timesteps {intervals} do not cover the range from {lowest} to {highest} exactly once"
        )
    return IndependentExperts([model for _, model, _ in loaded], bounds).eval(), loaded[0][2]
