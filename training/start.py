"""The start of a run: the model at step 0, the run's configuration, and the checkpoint to resume from."""

from dataclasses import asdict
from pathlib import Path

from checkpoint import VERSION, checkpoints, find_corruption, load_model, model_config, read_checkpoint
from common import UserError
from features import FeatureDataset
from interop.shapes import PUBLISHED_VAE
from models import DiT, DiT_models
from remix import RemixDiT, RemixDiT_models
from training.plan import RunSettings

# Options that may differ from those of the checkpoint that a run resumes from. `extend_schedule` checks two of them.
MAY_DIFFER = ("training.load_weight", "training.max_steps", "training.schedule_steps")


def make_model(
    name: str,
    shape: dict,
    mixing: dict | None,
    prior_bonus: float,
    load_weight: str | None = None,
    allow_pickle: bool = False,
) -> DiT | RemixDiT:
    """Build the model at step 0.

    Args:
        name: name of the model, of DiT_models or RemixDiT_models.
        shape: keyword arguments of the DiT, from `model_shape`, and its frequency_shift if the user gives one.
        mixing: keyword arguments of the RemixDiT, from `mixing_options`; None for a plain DiT.
        prior_bonus: initial lead of the prior's basis in the mixing logits.
        load_weight: file of the initial weights; None for random weights.
        allow_pickle: whether that file may run code.
    """
    try:
        if load_weight:
            return load_initial_model(name, shape, mixing, prior_bonus, load_weight, allow_pickle)
        if mixing:
            return RemixDiT_models[name](**shape, **mixing, prior_bonus=prior_bonus)
        return DiT_models[name](**shape)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def load_initial_model(
    name: str, shape: dict, mixing: dict | None, prior_bonus: float, path: str, allow_pickle: bool
) -> DiT | RemixDiT:
    """Load the weights at step 0 and check that they fit the model; the arguments are those of `make_model`."""
    overrides = {key: value for key, value in shape.items() if key == "frequency_shift"}
    loaded, _ = load_model(path, allow_pickle=allow_pickle, verify=True, **overrides)
    loaded_config = loaded.backbone_config if isinstance(loaded, RemixDiT) else loaded.config
    needed_config = DiT_models[name.removeprefix("Remix")](**shape).config
    for key, value in needed_config.items():
        if loaded_config[key] != value:
            raise UserError(f"--load-weight {path} has {key}={loaded_config[key]}, this run needs {value}")
    if not isinstance(loaded, RemixDiT):
        return RemixDiT(loaded, **mixing, prior_bonus=prior_bonus) if mixing else loaded
    if not mixing:
        raise UserError(f"--load-weight {path} holds a RemixDiT, which cannot start a {name}")
    for key, value in mixing.items():
        if loaded.config[key] != value:
            raise UserError(f"--load-weight {path} has {key}={loaded.config[key]}, this run asks for {value}")
    return loaded


def run_config(
    name: str, model: DiT | RemixDiT, dataset: FeatureDataset, image_size: int | None, settings: RunSettings
) -> dict:
    """Return the configuration that, together with the data, determines the run; every checkpoint stores it."""
    vae = {"vae": dataset.vae, "scale": dataset.scale} if dataset.vae else PUBLISHED_VAE
    image_size = dataset.image_size or image_size or 256
    data = dict(images=len(dataset), image_size=image_size, classes=dataset.classes, **vae)
    # Omitted for the default, so that checkpoints written by earlier versions still match.
    if dataset.store != "draw":
        data["store"] = dataset.store
    return {"model": model_config(name, model), "diffusion": {}, "data": data, "training": asdict(settings)}


def find_resume(
    resume: str | None, folder: Path, config: dict, extend: str
) -> tuple[Path | str | None, dict | None, dict[Path, str]]:
    """Find and read the checkpoint to resume from, and check that it belongs to the same run.

    Args:
        resume: a checkpoint, or "auto" for the newest undamaged one of the run; None for a new run.
        folder: the run's folder.
        config: configuration of this run. Its schedule_steps is set if the run has been extended, or is now.
        extend: what happens to the schedules if a finished run gets more steps: "hold" keeps their final values, and
            "stretch" lets them fall over all steps of the longer run.

    Returns:
        The checkpoint's path and content, both None for a new run; and the newer checkpoints that are damaged, each
        with a description of the damage.

    Raises:
        UserError: if the folder holds another run, or the checkpoint has another configuration or an earlier
            version, or cannot be read.
    """
    present = checkpoints(folder / "checkpoints")
    path, damaged = resume, {}
    if resume == "auto":
        path, damaged = newest_checkpoint(present)
    if path is None:
        if present:
            raise UserError(
                f"{folder} already holds a run, up to {present[0].name}: "
                "use --resume auto to continue it, or another --prefix to start a new one"
            )
        return None, None, {}
    if present and present[0].parent.resolve() != Path(path).resolve().parent:
        raise UserError(f"{folder} already holds a different run from that of --resume {path}: use another --prefix")
    state = read_checkpoint(path, mmap=False, verify=True)
    if not {"config", "step", "model", "ema", "optimizer", "scaler", "window"} <= state.keys():
        raise UserError(f"--resume {path} holds weights but no training state: use it with --load-weight")
    if state.get("version", 0) < VERSION:
        raise UserError(
            f"--resume {path} was written by an earlier version of this code, which drew other random numbers: "
            "use --load-weight with another --prefix to start a new run from its weights"
        )
    extend_schedule(path, state, config["training"], extend)
    before, now = flatten(state["config"]), flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in MAY_DIFFER:
            raise UserError(
                f"--resume {path} was trained with {key}={before.get(key)}, this run asks for {now.get(key)}"
            )
    return path, state, damaged


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
