"""The start of a run: the features, the model at step 0, the run's configuration, and the checkpoint to resume from."""

from dataclasses import asdict
from pathlib import Path

from checkpoint import VERSION, checkpoints, find_corruption, load_model, model_config, read_checkpoint
from common import UserError
from features import FeatureDataset
from interop.shapes import PUBLISHED_VAE
from models import DiT, DiT_models
from remix import RemixDiT, RemixDiT_models
from training.plan import AssumedFeatures, RunSettings


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
        shape: keyword arguments of the DiT, from `model_shape`.
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
    loaded, _ = load_model(path, allow_pickle=allow_pickle, verify=True)
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
    resume: str | None, folder: Path, config: dict
) -> tuple[Path | str | None, dict | None, dict[Path, str]]:
    """Find and read the checkpoint to resume from, and check that it belongs to the same run.

    Args:
        resume: a checkpoint, or "auto" for the newest undamaged one of the run; None for a new run.
        folder: the run's folder.
        config: configuration of this run.

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
    before, now = flatten(state["config"]), flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key != "training.load_weight":
            raise UserError(
                f"--resume {path} was trained with {key}={before.get(key)}, this run asks for {now.get(key)}: "
                "use the same settings, or start a new run with --load-weight and another --prefix"
            )
    return path, state, damaged


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
