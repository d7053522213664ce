"""The features of a run, its model at step 0, and its configuration."""

import argparse
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

from checkpoint import load_model, model_config
from diffusion import GaussianDiffusion
from features.autoencoder import Normalization
from features.dataset import FeatureDataset
from interop.shapes import assumed_vae, flow_target
from models import build_plain, find_backbone, find_model, meta_device
from remix import RemixDiT, build_remix
from runtime.errors import UserError, warn
from training.settings import RunSettings


class AssumedFeatures:
    """Features that do not exist yet, for a dry run: ImageNet's training set, encoded as for the published models.

    Args:
        path: the folder that does not exist.
        image_size: side of the images in pixels.
        latents: number of channels of the latents, and pixels of an image per latent along each side.

    Raises:
        UserError: if the VAE cannot encode images of that size.
    """

    def __init__(self, path: str, image_size: int, latents: tuple[int, int]):
        channels, factor = latents
        if image_size % factor:
            raise UserError(f"--image-size {image_size} is not a multiple of {factor}, which the VAE needs")
        self.path = Path(path)
        self.image_size = image_size
        self.shape = (channels, image_size // factor, image_size // factor)
        self.labels = torch.tensor([0, 999])
        self.classes = None
        self.vae, self.store, self.dtype, self.normalization = None, "draw", "float32", None
        self.vae_fingerprint = None
        self.views, self.fingerprint = 2, None

    def __len__(self) -> int:
        return 1_281_167


def open_features(args: argparse.Namespace) -> FeatureDataset | AssumedFeatures:
    """Open the encoded images that the flags name, and check their size.

    Args:
        args: the flags.

    Returns:
        The dataset; or, in a dry run without features, the number, shape and labels of ImageNet's features.

    Raises:
        UserError: if the folder holds no features, features of images of another size, or latents with --vae none.
    """
    path, image_size = args.data_path, args.image_size
    if args.dry_run and not Path(path).exists():
        return AssumedFeatures(path, image_size or 256, find_model(args.model).backbone.latents)
    dataset = FeatureDataset(path, args.latent_stats)
    if dataset.published and args.vae == "none":
        raise UserError(f"--vae none is for pixels: {path} holds latents")
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


@dataclass(frozen=True)
class InitialWeights:
    """The file that a run starts from, and what it has to fit.

    Attributes:
        path: the file.
        allow_pickle: whether it may run code.
        process: keyword arguments of `create_process`, which a file that is a flow must fit.
        classes: names of the dataset's classes; None if they are not known.
        new_classes: whether the file may be a model of other classes, whose embeddings are initialized again.
        normalization: normalization of the dataset's latents; None if it is not known.
    """

    path: str
    allow_pickle: bool = False
    process: dict = field(default_factory=dict)
    classes: list[str] | None = None
    new_classes: bool = False
    normalization: Normalization | None = None


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
    """Load the weights at step 0 and check that they fit the run; the arguments are those of `make_model`.

    Raises:
        UserError: if they do not.
    """
    path = start.path
    record = find_model(name).backbone
    # What the user says about a file's options is compared with the file.
    overrides = {key: value for key, value in shape.items() if key in record.file_options}
    loaded, config = load_model(path, allow_pickle=start.allow_pickle, verify=True, **overrides)
    # A flow may start from a DiT, which has learned other features of the same images. The reverse is a mistake.
    for key, trained in flow_target(config["diffusion"]).items():
        if trained != start.process.get(key):
            run = start.process.get(key, GaussianDiffusion.name)
            raise UserError(f"--load-weight {path} was trained with {key}={trained}, this run has {run}")
    if (architecture := config["model"]["architecture"]) != record.name:
        raise UserError(f"--load-weight {path} holds a {architecture}, this run trains a {record.name}")
    # Of a file of another project it is assumed.
    if config["training"] and start.normalization not in (None, Normalization.from_record(config["data"])):
        warn(
            f"--load-weight {path} was trained on latents of another normalization than those of the features, which "
            "changes what its layers see"
        )
    backbone = loaded.backbone if config["model"]["remix"] else loaded
    choose_classes(backbone, start, config["data"].get("classes"), shape["num_classes"])
    shape = shape | {key: backbone.config[key] for key in record.file_options}
    # The draws of these weights, which are not used, precede those of the mixing logits.
    needed = model_config(name, build_plain(name, **shape))
    for key, value in needed["backbone"].items():
        # Flows do not use the variance half of the output, which REPA's networks do not have.
        ignored = key == "learn_sigma" and flow_target(start.process)
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
    vae = assumed_vae(dataset.shape[0])
    if dataset.normalization is not None:
        vae = {"vae": dataset.vae, **dataset.normalization.record()}
    if dataset.vae_fingerprint:
        vae = vae | {"vae_fingerprint": dataset.vae_fingerprint}
    image_size = dataset.image_size or image_size or 256
    data = dict(images=len(dataset), image_size=image_size, classes=dataset.classes, **vae)
    data |= dict(store=dataset.store, dtype=dataset.dtype, views=dataset.views, fingerprint=dataset.fingerprint)
    return {"model": model_config(name, model), "diffusion": process, "data": data, "training": asdict(settings)}
