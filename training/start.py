"""The start of a run: its data, the model at step 0, its configuration, and the checkpoint to resume from."""

import json
import logging
from dataclasses import asdict
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np

from checkpoint import load_model, model_config
from diffusion import NOISE_LEVELS, FlowMatching, GaussianDiffusion, process_name
from diffusion.intervals import equal_boundaries
from features.dataset import OMITTED, FeatureDataset
from interop.own import VERSION, checkpoints, find_checkpoint, find_corruption, read_checkpoint
from interop.shapes import assumed_vae, flow_target
from models import DiT, DiT_models
from remix import RemixDiT, RemixDiT_models
from runtime.command_line import number
from runtime.errors import UserError, is_first_process
from runtime.files import write_json
from runtime.processes import World
from training.batches import BatchSampler, sample_timesteps
from training.dry_run import AssumedFeatures
from training.settings import RunSettings

# Options that may differ from those of the checkpoint that a run resumes from. `extend_schedule` checks two of them.
MAY_DIFFER = ("training.load_weight", "training.max_steps", "training.schedule_steps")


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
    value = number(float, 0, 1000)(text)
    return int(value) if value.is_integer() else value


def expert_boundaries(diffusion: GaussianDiffusion | FlowMatching, n_experts: int) -> list[float]:
    """Return the default boundaries between experts: N + 1 noise levels, which bound intervals of equal probability.

    Raises:
        UserError: if an interval of a flow contains no training times.
    """
    if isinstance(diffusion, FlowMatching):
        # Rounded, so that other versions of SciPy give the same.
        levels = [round(level, 9) for level in diffusion.quantiles(n_experts)]
        try:
            diffusion.sample_times(np.zeros(n_experts), np.array(levels[:-1]), np.array(levels[1:]))
        except ValueError as error:
            raise UserError(f"{n_experts} experts of equal probability: {error}") from None
        return levels
    return equal_boundaries(n_experts, diffusion.num_timesteps)


def check_noise_levels(
    flag: str, levels: list[float], process: str, diffusion: GaussianDiffusion | FlowMatching, complete: bool = False
):
    """Check the noise levels that a flag gives.

    Args:
        flag: the flag, for error messages.
        levels: the noise levels.
        process: "gaussian" or "flow".
        diffusion: the process of that name.
        complete: whether they must begin and end with the lowest and the highest noise level.

    Raises:
        UserError: unless they increase, are in the process's range, and each interval between them contains times.
    """
    given = f"{flag} {' '.join(f'{level:g}' for level in levels)}"
    if any(low >= high for low, high in pairwise(levels)):
        raise UserError(f"{given}: the noise levels must increase")
    lowest, highest = NOISE_LEVELS[process]
    if levels[-1] > highest or (complete and [levels[0], levels[-1]] != [lowest, highest]):
        raise UserError(f"{given}: the noise levels run from {lowest} to {highest} with --process {process}")
    n = len(levels) - 1
    try:
        flow = diffusion if process == "flow" else None
        sample_timesteps(0, 0, n, n, n, boundaries=levels, flow=flow)
    except ValueError as error:
        raise UserError(f"{given}: {error}") from None


def make_model(
    name: str,
    shape: dict,
    mixing: dict | None,
    prior_bonus: float,
    load_weight: str | None = None,
    allow_pickle: bool = False,
    process: dict | None = None,
    classes: list[str] | None = None,
    new_classes: bool = False,
    freeze: bool = False,
) -> DiT | RemixDiT:
    """Build the model at step 0.

    Args:
        name: name of the model, of DiT_models or RemixDiT_models.
        shape: keyword arguments of the DiT, from `model_shape`, and its frequency_shift if the user gives one.
        mixing: keyword arguments of the RemixDiT, from `mixing_options`; None for a plain DiT.
        prior_bonus: initial lead of the prior's basis in the mixing logits.
        load_weight: file of the initial weights; None for random weights.
        allow_pickle: whether that file may run code.
        process: keyword arguments of `create_process`, which a file that is a flow must fit.
        classes: names of the dataset's classes; None if they are not known.
        new_classes: whether the file may be a model of other classes, whose embeddings are initialized again.
        freeze: whether only the bases and the coefficients are trained.

    Raises:
        UserError: if the options do not fit together, or the file is missing or damaged or does not fit them.
    """
    try:
        if load_weight:
            known = process or {}, classes, new_classes
            model = load_initial_model(name, shape, mixing, prior_bonus, load_weight, allow_pickle, *known)
        elif mixing:
            model = RemixDiT_models[name](**shape, **mixing, prior_bonus=prior_bonus)
        else:
            model = DiT_models[name](**shape)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if freeze:
        model.freeze_shared()
    return model


def load_initial_model(
    name: str,
    shape: dict,
    mixing: dict | None,
    prior_bonus: float,
    path: str,
    allow_pickle: bool,
    process: dict,
    classes: list[str] | None,
    new_classes: bool,
) -> DiT | RemixDiT:
    """Load the weights at step 0 and check that they fit the run; the arguments are those of `make_model`."""
    overrides = {key: value for key, value in shape.items() if key == "frequency_shift"}
    loaded, config = load_model(path, allow_pickle=allow_pickle, verify=True, **overrides)
    # A flow may start from a DiT, which has learned other features of the same images. The reverse is a mistake.
    for key, trained in flow_target(config["diffusion"]).items():
        if trained != process.get(key):
            run = process.get(key, "gaussian")
            raise UserError(f"--load-weight {path} was trained with {key}={trained}, this run has {run}")
    choose_classes(loaded, path, config["data"].get("classes"), classes, shape["num_classes"], new_classes)
    loaded_config = loaded.backbone_config
    needed_config = DiT_models[name.removeprefix("Remix")](**shape).config
    for key, value in needed_config.items():
        # Flows do not use the variance half of the output, which REPA's networks do not have.
        if loaded_config[key] != value and not (process and key == "learn_sigma"):
            raise UserError(f"--load-weight {path} has {key}={loaded_config[key]}, this run needs {value}")
    if not isinstance(loaded, RemixDiT):
        return RemixDiT(loaded, **mixing, prior_bonus=prior_bonus) if mixing else loaded
    if not mixing:
        raise UserError(f"--load-weight {path} holds a RemixDiT, which cannot start a {name}")
    for key, value in mixing.items():
        # A config without boundaries or rank has the default.
        if loaded.config.get(key) != value:
            raise UserError(f"--load-weight {path} has {key}={loaded.config.get(key)}, this run asks for {value}")
    return loaded


def choose_classes(
    model: DiT | RemixDiT,
    path: str,
    old: list[str] | None,
    new: list[str] | None,
    num_classes: int,
    new_classes: bool,
):
    """Check that a loaded model has the classes of the dataset, or initialize their embeddings again.

    Args:
        model: the loaded model. Its embeddings are replaced if `new_classes` is true.
        path: its file, for error messages.
        old: names of the model's classes; None if they are not known.
        new: names of the dataset's classes; None if they are not known.
        num_classes: number of classes of the run.
        new_classes: replace the embeddings, except those of classes with equal names.

    Raises:
        UserError: if the classes differ and `new_classes` is false.
    """
    if new_classes:
        backbone = model.backbone if isinstance(model, RemixDiT) else model
        kept = {new.index(name): old.index(name) for name in {*(old or [])} & {*(new or [])}}
        backbone.reset_classes(num_classes, kept)
        return
    remedy = "--new-classes initializes the embeddings of classes with other names again"
    if model.num_classes != num_classes:
        raise UserError(f"--load-weight {path} has {model.num_classes} classes, this run has {num_classes}: {remedy}")
    for i, (before, now) in enumerate(zip_longest(old or [], new or [])):
        if old and new and before != now:
            raise UserError(f"--load-weight {path}: its class {i} is {before}, in the features it is {now}: {remedy}")


def run_config(
    name: str,
    model: DiT | RemixDiT,
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
    # Omitted for the default, so that checkpoints written by earlier versions still match.
    if dataset.store != "draw":
        data["store"] = dataset.store
    if dataset.dtype not in (None, "float32"):
        data["dtype"] = dataset.dtype
    return {"model": model_config(name, model), "diffusion": process, "data": data, "training": asdict(settings)}


def make_batch_sampler(
    settings: RunSettings,
    model: DiT | RemixDiT,
    diffusion: GaussianDiffusion | FlowMatching,
    world: World,
    grad_accum: int,
) -> BatchSampler:
    """Return what draws the batches of the run."""
    remix = isinstance(model, RemixDiT)
    return BatchSampler(
        settings.global_seed,
        settings.global_batch_size,
        world,
        n_experts=model.n_experts if remix else None,
        experts_per_batch=settings.experts_per_batch,
        timestep_range=tuple(settings.timesteps),
        label_dropout=model.backbone_config["class_dropout_prob"],
        grad_accum=grad_accum,
        boundaries=model.boundaries if remix else None,
        flow=diffusion if isinstance(diffusion, FlowMatching) else None,
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
    if trained != interval and process_name(config["diffusion"]) == process:
        raise UserError(
            f"--resume auto: {folder} was trained with the timesteps {trained}, this run asks for {interval}: "
            "use the same --independent and --boundaries, or another --prefix to start new runs"
        )


def find_resume(
    resume: str | None, folder: Path, config: dict, extend: str
) -> tuple[Path | str | None, dict | None, dict[Path, str]]:
    """Find and read the checkpoint to resume from, and check that it belongs to the same run.

    The whole file is read to compare it with its checksums. Therefore only the first process does this. The others get
    its path later and call `read_resume`.

    Args:
        resume: a checkpoint, or "auto" for the newest undamaged one of the run; None for a new run.
        folder: the run's folder.
        config: configuration of this run. Its schedule_steps is set if the run has been extended, or is now.
        extend: what happens to the schedules if a finished run gets more steps: "hold" keeps their final values, and
            "stretch" lets them fall over all steps of the longer run.

    Returns:
        The checkpoint's path and content, both None for a new run and on all processes but the first; and the newer
        checkpoints that are damaged, each with a description of the damage.

    Raises:
        UserError: if the folder holds another run, or the checkpoint has another configuration or an earlier
            version, or cannot be read.
    """
    if not is_first_process():
        return None, None, {}
    present = checkpoints(folder / "checkpoints")
    path, damaged = resume, {}
    if resume == "auto":
        path, damaged = newest_checkpoint(present)
    elif resume:
        path = find_checkpoint(resume)
    if path is None:
        check_new(folder)
        return None, None, {}
    if present and present[0].parent.resolve() != Path(path).resolve().parent:
        raise UserError(f"{folder} already holds a different run from that of --resume {path}: use another --prefix")
    # The newest checkpoint has been compared with its checksums already.
    return path, read_resume(path, config, extend, verify=resume != "auto"), damaged


def read_resume(path: Path | str, config: dict, extend: str, verify: bool = False) -> dict:
    """Read the checkpoint to resume from, mapped into memory, and check that it belongs to the same run.

    Args:
        path: the checkpoint.
        config: configuration of this run. Its schedule_steps is set, see `find_resume`, and its prior_bonus becomes
            that of the checkpoint.
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
    if state.get("version", 0) < VERSION:
        raise UserError(
            f"--resume {path} was written by an earlier version of this code, which drew other random numbers: "
            "use --load-weight with another --prefix to start a new run from its weights"
        )
    trained, asked = (process_name(part["diffusion"]) for part in (state["config"], config))
    if trained != asked:
        raise UserError(f"--resume {path} was trained with --process {trained}, this run asks for {asked}")
    extend_schedule(path, state, config["training"], extend)
    # It has no effect after step 0, and its default was 3 in earlier versions.
    config["training"]["prior_bonus"] = state["config"]["training"]["prior_bonus"]
    omitted = {f"data.{name}": value for name, value in OMITTED.items()}
    before, now = omitted | flatten(state["config"]), omitted | flatten(config)
    if "training.coeff_lr_end" not in before and config["model"]["remix"]:
        # Earlier versions had no such option.
        before["training.coeff_lr_end"] = before["training.coeff_lr"] / 2
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in MAY_DIFFER:
            raise UserError(
                f"--resume {path} was trained with {key}={before.get(key)}, this run asks for {now.get(key)}: "
                "use the same settings, or start a new run with --load-weight and another --prefix"
            )
    return state


def extend_schedule(path, state: dict, training: dict, extend: str):
    """Set schedule_steps in the "training" part of a config that resumes from `state`. See `find_resume` for `extend`.

    Raises:
        UserError: if the number of steps differs from that of the checkpoint, and the checkpoint is not that of a
            finished run with fewer steps.
    """
    before = state["config"]["training"]
    steps, more_steps = before["max_steps"], training["max_steps"]
    training["schedule_steps"] = before.get("schedule_steps")
    if more_steps == steps:
        return
    if more_steps < steps or state["step"] < steps:
        raise UserError(
            f"--resume {path} belongs to a run of {steps} steps, this run asks for {more_steps}: "
            "only a finished run can be extended, with more steps"
        )
    training["schedule_steps"] = (before.get("schedule_steps") or steps) if extend == "hold" else None


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


def advice(model: DiT | RemixDiT, settings: RunSettings) -> list[str]:
    """Return advice about the settings, if there is any."""
    if isinstance(model, RemixDiT) and settings.experts_per_batch < min(8, model.n_experts):
        return ["fewer than 8 experts per batch: in studies/README.md, the error was higher than with 8 or more"]
    return []


def log_introduction(log: logging.Logger, description: list[str], damaged: dict[Path, str], notes: list[str]):
    """Log what the run will do, and the damaged checkpoints that it does not resume from."""
    skipped = [f"SKIPPED {path}: {reason}" for path, reason in damaged.items()]
    for line in [*description, *skipped, *notes]:
        log.info(line)
