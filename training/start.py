"""The start of a run: its data, the model at step 0, its configuration, and the checkpoint to resume from."""

import json
import logging
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from checkpoint import load_model, model_config
from diffusion import Process
from diffusion.intervals import TIMESTEPS
from features.dataset import FeatureDataset
from interop.own import checkpoints, find_checkpoint, find_corruption, read_checkpoint
from interop.shapes import assumed_vae, flow_target
from models import build_plain, find_backbone, meta_device
from remix import RemixDiT, build_remix
from runtime.command_line import number
from runtime.errors import UserError, is_first_process
from runtime.files import write_json
from runtime.processes import World
from training.batches import BatchSampler
from training.experts import NoExperts, experts_of
from training.settings import RunSettings

# Options that may differ from those of the checkpoint that a run resumes from. `extend_schedule` checks two of them.
MAY_DIFFER = ("training.load_weight", "training.max_steps", "training.schedule_steps")


class AssumedFeatures:
    """Features that do not exist yet, for a dry run: ImageNet's training set, encoded by the published VAE.

    Args:
        path: the folder that does not exist.
        image_size: side of the images in pixels.

    Raises:
        UserError: if the VAE cannot encode images of that size.
    """

    def __init__(self, path: str, image_size: int):
        if image_size % 8:
            raise UserError(f"--image-size {image_size} is not a multiple of 8, which the VAE needs")
        self.path = Path(path)
        self.image_size = image_size
        self.shape = (4, image_size // 8, image_size // 8)
        self.labels = torch.tensor([0, 999])
        self.classes = None
        self.vae, self.store, self.dtype = None, "draw", "float32"

    def __len__(self) -> int:
        return 1_281_167


def open_features(path: str, image_size: int | None, assume: bool) -> FeatureDataset | AssumedFeatures:
    """Open the encoded images and check their size.

    Args:
        path: folder of features.
        image_size: side of the images in pixels that the user expects; None to accept any.
        assume: if the folder does not exist, assume ImageNet's features.

    Returns:
        The dataset; or the number, shape and labels of ImageNet's features if they are assumed.

    Raises:
        UserError: if the folder holds no features, or features of images of another size.
    """
    if assume and not Path(path).exists():
        return AssumedFeatures(path, image_size or 256)
    dataset = FeatureDataset(path)
    if image_size and dataset.image_size and image_size != dataset.image_size:
        raise UserError(f"--image-size {image_size}, but {path} holds features of {dataset.image_size}-pixel images")
    return dataset


def model_shape(dataset: FeatureDataset | AssumedFeatures, num_classes: int | None) -> dict:
    """Return the keyword arguments of a DiT that depend on the data.

    Args:
        dataset: the encoded images.
        num_classes: number of classes; None for that of the dataset, or 1000 if the dataset does not record it.

    Raises:
        UserError: if a label is not below the number of classes, or the features are not square.
    """
    channels, height, width = dataset.shape
    num_classes = num_classes or (len(dataset.classes) if dataset.classes else 1000)
    low, high = dataset.labels.min(), dataset.labels.max()
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{dataset.path} has labels from {low} to {high}, but the model has labels from 0 to {num_classes - 1}: "
            "set --num-classes"
        )
    if height != width:
        raise UserError(f"{dataset.path} holds features of {height} x {width} pixels, which are not square")
    return dict(input_size=height, in_channels=channels, num_classes=num_classes)


def level_argument(text: str) -> float:
    """Convert a string to a noise level, as an argparse type; whole numbers become integers."""
    value = number(float, 0, TIMESTEPS)(text)
    return int(value) if value.is_integer() else value


def expert_boundaries(process: Process, n_experts: int, given: list[float] | None) -> list[float]:
    """Return the boundaries between experts: those that the user gives, or those of intervals of equal probability.

    Raises:
        UserError: if an interval contains no training times, or if the given ones are not those of all noise levels.
    """
    if given:
        check_noise_levels("--boundaries", given, process, complete=True)
        return given
    try:
        return process.expert_boundaries(n_experts)
    except ValueError as error:
        raise UserError(f"{n_experts} experts of equal probability: {error}") from None


def check_noise_levels(flag: str, levels: list[float], process: Process, complete: bool = False):
    """Check the noise levels that a flag gives.

    Args:
        flag: the flag, for error messages.
        levels: the noise levels.
        process: the process.
        complete: whether they must begin and end with the lowest and the highest noise level.

    Raises:
        UserError: unless they increase, are in the process's range, and each interval between them contains times.
    """
    try:
        process.check_levels(levels, complete)
    except ValueError as error:
        raise UserError(f"{flag} {' '.join(f'{level:g}' for level in levels)}: {error}") from None


@dataclass(frozen=True)
class InitialWeights:
    """The file that a run starts from, and what it has to fit.

    Attributes:
        path: the file.
        allow_pickle: whether it may run code.
        process: keyword arguments of `create_process`, which a file that is a flow must fit.
        classes: names of the dataset's classes; None if they are not known.
        new_classes: whether the file may be a model of other classes, whose embeddings are initialized again.
    """

    path: str
    allow_pickle: bool = False
    process: dict = field(default_factory=dict)
    classes: list[str] | None = None
    new_classes: bool = False


def make_model(
    name: str,
    shape: dict,
    mixing: dict | None,
    prior_bonus: float,
    start: InitialWeights | None = None,
    freeze: bool = False,
) -> nn.Module:
    """Build the model at step 0.

    Args:
        name: name of the model, one of `models.model_names`.
        shape: keyword arguments of the backbone, from `model_shape`, and its frequency_shift if the user gives one.
        mixing: keyword arguments of the RemixDiT, from `mixing_options`; None for a plain model.
        prior_bonus: initial lead of the prior's basis in the mixing logits.
        start: file of the initial weights; None for random weights.
        freeze: whether only the bases and the coefficients are trained.

    Raises:
        UserError: if the options do not fit together, or the file is missing or damaged or does not fit them.
    """
    try:
        if start:
            model = load_initial_model(name, shape, mixing, prior_bonus, start)
        elif mixing:
            model = build_remix(name, **shape, **mixing, prior_bonus=prior_bonus)
        else:
            model = build_plain(name, **shape)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if freeze:
        model.freeze_shared()
    return model


def load_initial_model(
    name: str, shape: dict, mixing: dict | None, prior_bonus: float, start: InitialWeights
) -> nn.Module:
    """Load the weights at step 0 and check that they fit the run; the arguments are those of `make_model`."""
    path = start.path
    overrides = {key: value for key, value in shape.items() if key == "frequency_shift"}
    loaded, config = load_model(path, allow_pickle=start.allow_pickle, verify=True, **overrides)
    # A flow may start from a DiT, which has learned other features of the same images. The reverse is a mistake.
    for key, trained in flow_target(config["diffusion"]).items():
        if trained != start.process.get(key):
            run = start.process.get(key, "gaussian")
            raise UserError(f"--load-weight {path} was trained with {key}={trained}, this run has {run}")
    backbone = loaded.backbone if config["model"]["remix"] else loaded
    choose_classes(backbone, start, config["data"].get("classes"), shape["num_classes"])
    # The draws of these weights, which are not used, precede those of the mixing logits.
    needed = model_config(name, build_plain(name, **shape))
    if (architecture := config["model"]["architecture"]) != needed["architecture"]:
        raise UserError(f"--load-weight {path} holds a {architecture}, this run trains a {needed['architecture']}")
    for key, value in needed["backbone"].items():
        # Flows do not use the variance half of the output, which REPA's networks do not have. The frequencies are those
        # of the file, which `load_model` has compared with the user's.
        ignored = key == "frequency_shift" or (key == "learn_sigma" and flow_target(start.process))
        if backbone.config[key] != value and not ignored:
            raise UserError(f"--load-weight {path} has {key}={backbone.config[key]}, this run needs {value}")
    if not config["model"]["remix"]:
        return RemixDiT(loaded, **mixing, prior_bonus=prior_bonus) if mixing else loaded
    if not mixing:
        raise UserError(f"--load-weight {path} holds a RemixDiT, which cannot start a {name}")
    with meta_device():
        asked = RemixDiT(build_plain(name, **shape), **mixing).mixing_config
    for key, value in asked.items():
        if (found := loaded.mixing_config[key]) != value:
            raise UserError(f"--load-weight {path} has {key}={found}, this run asks for {value}")
    return loaded


def choose_classes(backbone: nn.Module, start: InitialWeights, old: list[str] | None, num_classes: int):
    """Check that a loaded model has the classes of the dataset, or initialize their embeddings again.

    Args:
        backbone: the loaded model, or what its Remix wraps. Its embeddings are replaced if `start.new_classes`, except
            those of classes with equal names.
        start: its file, and the names of the dataset's classes.
        old: names of the model's classes; None if they are not known.
        num_classes: number of classes of the run.

    Raises:
        UserError: if the classes differ and `start.new_classes` is false.
    """
    path, new = start.path, start.classes
    if start.new_classes:
        kept = {new.index(name): old.index(name) for name in {*(old or [])} & {*(new or [])}}
        find_backbone(backbone).reset_classes(backbone, num_classes, kept)
        return
    has = backbone.config["num_classes"]
    remedy = "--new-classes initializes the embeddings of classes with other names again"
    if has != num_classes:
        raise UserError(f"--load-weight {path} has {has} classes, this run has {num_classes}: {remedy}")
    for i, (before, now) in enumerate(zip_longest(old or [], new or [])):
        if old and new and before != now:
            raise UserError(f"--load-weight {path}: its class {i} is {before}, in the features it is {now}: {remedy}")


def run_config(
    name: str,
    model: nn.Module,
    dataset: FeatureDataset,
    image_size: int | None,
    settings: RunSettings,
    process: dict,
) -> dict:
    """Return the configuration that, together with the data, determines the run; every checkpoint stores it.

    Args:
        name: name of the model.
        model: the model at step 0.
        dataset: the encoded images.
        image_size: side of the images in pixels, if the dataset does not record it; None for 256.
        settings: the settings of the run.
        process: keyword arguments of `create_process`.
    """
    vae = {"vae": dataset.vae, **dataset.normalization.record()} if dataset.vae else assumed_vae(dataset.shape[0])
    image_size = dataset.image_size or image_size or 256
    data = dict(images=len(dataset), image_size=image_size, classes=dataset.classes, **vae)
    data |= dict(store=dataset.store, dtype=dataset.dtype)
    return {"model": model_config(name, model), "diffusion": process, "data": data, "training": asdict(settings)}


def make_batch_sampler(
    settings: RunSettings,
    experts: NoExperts,
    process: Process,
    world: World,
    grad_accum: int,
) -> BatchSampler:
    """Return what draws the batches of the run."""
    return BatchSampler(
        settings.global_seed,
        settings.global_batch_size,
        world,
        process=process,
        n_experts=experts.n_experts,
        experts_per_batch=settings.experts_per_batch,
        timestep_range=tuple(settings.timesteps),
        label_dropout=experts.backbone.config["class_dropout_prob"],
        grad_accum=grad_accum,
        boundaries=experts.boundaries,
    )


def check_new(folder: Path):
    """Raise UserError if a folder holds a run."""
    if present := checkpoints(folder / "checkpoints"):
        raise UserError(
            f"{folder} already holds a run, up to {present[0].name}: "
            "use --resume auto to continue it, or another --prefix to start a new one"
        )


def check_interval(folder: Path, interval: list, process: str):
    """Raise UserError if a folder holds the run of an independent expert that has another interval of timesteps.

    A run of another process is left to `read_resume`, because its intervals are not comparable.
    """
    path = folder / "config.json"
    if not (checkpoints(folder / "checkpoints") and path.exists()):
        return
    config = json.loads(path.read_text())
    trained = config["training"]["timesteps"]
    if trained != interval and config["diffusion"]["process"] == process:
        raise UserError(
            f"--resume auto: {folder} was trained with the timesteps {trained}, this run asks for {interval}: "
            "use the same --independent and --boundaries, or another --prefix to start new runs"
        )


class Resume(NamedTuple):
    """How a run begins.

    Attributes:
        config: the configuration of the run. If it resumes, schedule_steps and prior_bonus are those that it goes on
            with.
        path: the checkpoint to resume from; None for a new run.
        state: its content, mapped into memory; None for a new run.
        damaged: the newer checkpoints that are damaged, each with a description of the damage.
    """

    config: dict
    path: Path | str | None = None
    state: dict | None = None
    damaged: dict[Path, str] = {}  # noqa: RUF012, it is not changed

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return self.state["step"] if self.state else 0


def find_resume(resume: str | None, folder: Path, config: dict, extend: str) -> Resume:
    """Find and read the checkpoint to resume from, and check that it belongs to the same run.

    The whole file is read to compare it with its checksums. Therefore only the first process does this. The others get
    its path later and call `read_resume`.

    Args:
        resume: a checkpoint, or "auto" for the newest undamaged one of the run; None for a new run.
        folder: the run's folder.
        config: configuration of this run.
        extend: what happens to the schedules if a finished run gets more steps: "hold" keeps their final values, and
            "stretch" lets them fall over all steps of the longer run.

    Returns:
        How the run begins; on all processes but the first, as a new run.

    Raises:
        UserError: if the folder holds another run, or the checkpoint has another configuration or an earlier
            version, or cannot be read.
    """
    if not is_first_process():
        return Resume(config)
    present = checkpoints(folder / "checkpoints")
    path, damaged = resume, {}
    if resume == "auto":
        path, damaged = newest_checkpoint(present)
    elif resume:
        path = find_checkpoint(resume)
    if path is None:
        check_new(folder)
        return Resume(config)
    if present and present[0].parent.resolve() != Path(path).resolve().parent:
        raise UserError(f"{folder} already holds a different run from that of --resume {path}: use another --prefix")
    # The newest checkpoint has been compared with its checksums already.
    return read_resume(path, config, extend, verify=resume != "auto")._replace(damaged=damaged)


def read_resume(path: Path | str, config: dict, extend: str, verify: bool = False) -> Resume:
    """Read the checkpoint to resume from, mapped into memory, and check that it belongs to the same run.

    Args:
        path: the checkpoint.
        config: configuration of this run.
        extend: see `find_resume`.
        verify: compare all parts of the file with their checksums first.

    Raises:
        UserError: see `find_resume`.
    """
    if not Path(path).exists():
        where = "" if is_first_process() else ": all nodes need the same --results-dir on a shared file system"
        raise UserError(f"{path}: no such file{where}")
    state = read_checkpoint(path, verify=verify)
    if not {"config", "step", "model", "ema", "optimizer", "scaler", "window"} <= state.keys():
        raise UserError(f"--resume {path} holds weights but no training state: use it with --load-weight")
    trained, asked = (part["diffusion"]["process"] for part in (state["config"], config))
    if trained != asked:
        raise UserError(f"--resume {path} was trained with --process {trained}, this run asks for {asked}")
    # The prior's bonus has no effect after step 0.
    kept = {"prior_bonus": state["config"]["training"]["prior_bonus"]}
    kept["schedule_steps"] = schedule_steps(path, state, config["training"], extend)
    config = config | {"training": config["training"] | kept}
    before, now = flatten(state["config"]), flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in MAY_DIFFER:
            raise UserError(
                f"--resume {path} was trained with {key}={before.get(key)}, this run asks for {now.get(key)}: "
                "use the same settings, or start a new run with --load-weight and another --prefix"
            )
    return Resume(config, path, state)


def schedule_steps(path, state: dict, training: dict, extend: str) -> int | None:
    """Return the schedule_steps of a run that resumes from `state`.

    Args:
        path: the checkpoint, for error messages.
        state: its content.
        training: the "training" part of the run's config.
        extend: see `find_resume`.

    Raises:
        UserError: if the number of steps differs from that of the checkpoint, and the checkpoint is not that of a
            finished run with fewer steps.
    """
    before = state["config"]["training"]
    steps, more_steps = before["max_steps"], training["max_steps"]
    if more_steps == steps:
        return before["schedule_steps"]
    if more_steps < steps or state["step"] < steps:
        raise UserError(
            f"--resume {path} belongs to a run of {steps} steps, this run asks for {more_steps}: "
            "only a finished run can be extended, with more steps"
        )
    return (before["schedule_steps"] or steps) if extend == "hold" else None


def newest_checkpoint(present: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """Return the first undamaged checkpoint of a list, and the damaged ones before it with what is wrong with them."""
    damaged = {}
    for path in present:
        reason = find_corruption(path)
        if reason is None:
            return path, damaged
        damaged[path] = reason
    if present:
        folder, reason = present[0].parent, damaged[present[0]]
        raise UserError(f"none of the checkpoints in {folder} is complete ({reason}): remove them to start a new run")
    return None, {}


def flatten(config: dict, prefix: str = "") -> dict:
    """Turn {"a": {"b": 1}} into {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def prepare_folder(folder: Path, config: dict, damaged: dict[Path, str]):
    """Create the run's folder, and write its config.json. Damaged checkpoints are renamed."""
    for path in damaged:
        path.rename(path.with_suffix(".pt.damaged"))
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


def default_prefix(name: str, mixing: dict | None) -> str:
    """Return the name of the run's folder if --prefix does not give it."""
    if not mixing:
        return name.replace("/", "-")
    rank = f"-r{mixing['rank']}" if mixing["rank"] else ""
    return f"{name.replace('/', '-')}-{mixing['n_basis']}-{mixing['n_experts']}{rank}"


def advice(model: nn.Module, settings: RunSettings) -> list[str]:
    """Return advice about the settings, if there is any."""
    if settings.experts_per_batch < min(8, experts_of(model).n_experts or 0):
        return ["fewer than 8 experts per batch: in studies/results/fashion, the error was higher than with 8 or more"]
    return []


def log_introduction(log: logging.Logger, description: list[str], damaged: dict[Path, str], notes: list[str]):
    """Log what the run will do, and the damaged checkpoints that it does not resume from."""
    skipped = [f"SKIPPED {path}: {reason}" for path, reason in damaged.items()]
    for line in [*description, *skipped, *notes]:
        log.info(line)
