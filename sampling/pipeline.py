"""Sampling: what a checkpoint and the settings determine, and the images of given sample numbers.

The label and the noise of sample i depend only on the seed, i and the type of device, so the batch size and the number
of processes change the images by rounding only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from diffusion import create_process
from diffusion.samplers import Sampler
from features.autoencoder import Autoencoder, Normalization, load_autoencoder
from models import BACKBONES, DiT, data_shape
from runtime.errors import UserError
from runtime.processes import SampleGenerators, World
from sampling.experts import ExpertSwitch
from sampling.guidance import GuidanceSchedule, GuidedDenoiser, make_schedule, predict

# Images per batch and process. Rounding depends on it.
SAMPLE_BATCH = 32


@dataclass(frozen=True)
class SampleSettings:
    """The flags of sample_ddp.py that the results depend on, in addition to the checkpoint and the VAE.

    settings.json records them. Those that have no meaning for the sampler are None.
    """

    num_fid_samples: int
    sampler: str
    num_sampling_steps: str | None
    diffusion_form: str | None
    last_step: str | None
    last_step_size: float | None
    cfg_scale: float | str
    guidance_interval: list[float] | None
    cfg_all_channels: bool
    ema: bool
    global_seed: int
    per_proc_batch_size: int
    save_png: bool
    precision: str
    labels: str | list[int] | None
    time_shift: float | None = None
    last_level: float | None = None
    guided_channels: int | None = None


@dataclass(frozen=True)
class Pipeline:
    """What the checkpoint determines about sampling.

    Attributes:
        ckpt: name of the checkpoint, for error messages.
        model: the network, or the switch between the networks of several experts.
        guide: the weaker model of autoguidance, if there is one.
        schedule: guidance scale at each noise level.
        loop: the sampler.
        evaluations: number of times that the sampler calls the denoiser. None if it chooses it while it runs.
        autoencoder: decodes the samples.
        shape: shape (C, H, W) of a sample before it is decoded.
        classes: names of the classes, or None if they are not known.
        n_classes: number of classes that the model was trained on.
        null_label: label that stands for no class.
    """

    ckpt: str
    model: DiT | ExpertSwitch
    guide: DiT | ExpertSwitch | None
    schedule: GuidanceSchedule
    loop: Sampler | Callable[..., torch.Tensor]
    evaluations: int | None
    autoencoder: Autoencoder
    shape: tuple[int, int, int]
    classes: list[str] | None
    n_classes: int
    null_label: int


def trained_classes(config: dict) -> int:
    """Return the number of classes in the training data; the model may have more."""
    return len(config["data"]["classes"] or []) or config["model"]["backbone"]["num_classes"]


def published_settings(config: dict) -> dict:
    """Return the settings with which the published models of a checkpoint's backbone and process are sampled.

    Args:
        config: config of the model.

    Returns:
        See `models.Backbone.sampling`; an empty dict for a backbone that has none.
    """
    process = create_process(**config["diffusion"]).name
    return BACKBONES[config["model"]["architecture"]].sampling.get(process, {})


def make_pipeline(
    model: DiT | ExpertSwitch,
    guide: DiT | ExpertSwitch | None,
    config: dict,
    settings: SampleSettings,
    vae: str,
    ckpt: str,
) -> Pipeline:
    """Make the sampler and the guidance schedule, and load the autoencoder, that fit a checkpoint.

    Args:
        model: the network, or the switch between the networks of several experts.
        guide: the weaker model of autoguidance; None for classifier-free guidance.
        config: config of the model.
        settings: what the flags determine.
        vae: name of the autoencoder, see `autoencoder.load_autoencoder`.
        ckpt: name of the checkpoint, for error messages.

    Raises:
        UserError: if the settings of sampler or guidance are invalid, or if the VAE cannot be loaded or does not suit
            the model.
    """
    backbone = config["model"]["backbone"]
    if isinstance(settings.labels, list) and max(settings.labels) >= trained_classes(config):
        raise UserError(f"--labels {max(settings.labels)}: {ckpt} has the classes 0 to {trained_classes(config) - 1}")
    process = create_process(**config["diffusion"])
    try:
        closed = published_settings(config).get("closed_interval", False)
        schedule = make_schedule(settings.cfg_scale, settings.guidance_interval, process.scale.highest, closed)
    except ValueError as error:
        raise UserError(f"--cfg-scale or --guidance-interval: {error}") from None
    if not schedule.guides and (guide is not None or settings.guidance_interval):
        raise UserError("--guide-ckpt and --guidance-interval need a --cfg-scale other than 1 within the interval")
    if (settings.guided_channels or 0) > backbone["in_channels"]:
        raise UserError(
            f"--guided-channels {settings.guided_channels}: {ckpt} denoises {backbone['in_channels']} channels"
        )
    options = {"shift": settings.time_shift, "last_level": settings.last_level}
    options = {name: value for name, value in options.items() if value is not None}
    if settings.sampler == "sde":
        options |= {"form": settings.diffusion_form, "last_step": settings.last_step}
        options["last_step_size"] = settings.last_step_size
    elif settings.sampler == "dopri5":
        switches = [network.boundaries for network in (model, guide) if isinstance(network, ExpertSwitch)]
        options = {"boundaries": {level for levels in (schedule.boundaries, *switches) for level in levels}}
    try:
        sampler = process.make_sampler(settings.sampler, settings.num_sampling_steps, **options)
    except ValueError as error:
        raise UserError(f"--sampler {settings.sampler}: {error}") from None
    autoencoder = load_autoencoder(vae)
    if backbone["in_channels"] not in autoencoder.channels:
        channels = " or ".join(map(str, autoencoder.channels))
        raise UserError(f"{ckpt} denoises {backbone['in_channels']} channels, but --vae {vae} decodes {channels}")
    # The training data may have been normalized differently from what the VAE's own config says. But a file of another
    # project says nothing about a VAE with other than four channels: pixels are assumed.
    if config["data"]["vae"] != "none":
        autoencoder.normalization = Normalization.from_record(config["data"])
    return Pipeline(
        ckpt=ckpt,
        model=model,
        guide=guide,
        schedule=schedule,
        loop=sampler,
        evaluations=sampler.evaluations,
        autoencoder=autoencoder,
        shape=data_shape(backbone),
        classes=config["data"]["classes"],
        n_classes=trained_classes(config),
        null_label=backbone["num_classes"],
    )


@torch.no_grad()
def sample(
    pipeline: Pipeline, settings: SampleSettings, numbers: range, world: World, compiled: bool, show_steps: bool
) -> np.ndarray:
    """Sample the images with the given numbers.

    Args:
        pipeline: what the checkpoint determines.
        settings: what the flags determine.
        numbers: numbers of the samples.
        world: this process's place.
        compiled: run the network through torch.compile.
        show_steps: show a progress bar of the sampling steps.

    Returns:
        RGB images [n, H, W, 3], uint8.

    Raises:
        UserError: if a sample is not finite, because the model's training has diverged.
    """
    n = len(numbers)
    if compiled:
        # The network is compiled for one batch size: a smaller last batch is extended, and the extra samples dropped.
        full = min(settings.per_proc_batch_size, settings.num_fid_samples)
        numbers = range(numbers.start, numbers.start + full)
    seed = settings.global_seed
    generators = SampleGenerators(seed, numbers, world.device)
    labels = [label_of(seed, i, pipeline.n_classes, settings.labels) for i in numbers]
    denoiser = GuidedDenoiser(
        pipeline.model,
        torch.tensor(labels, device=world.device),
        pipeline.null_label,
        pipeline.schedule,
        pipeline.guide,
        channels=pipeline.shape[0] if settings.cfg_all_channels else settings.guided_channels,
        run=torch.compile(predict, dynamic=False) if compiled else predict,
    )

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        with world.autocast(settings.precision):
            return denoiser(x, time)

    samples = pipeline.loop(
        denoise,
        generators.randn(pipeline.shape),
        clip_denoised=pipeline.autoencoder.bounded,
        step_noise=lambda step: generators.randn(pipeline.shape),
        progress=show_steps,
    )
    finite = samples[:n].isfinite().flatten(1).all(1)
    images = pipeline.autoencoder.decode(samples[:n]).cpu().numpy()
    if not finite.all():
        first = numbers[int(finite.int().argmin())]
        raise UserError(f"sample {first} is not finite: the training of {pipeline.ckpt} has diverged")
    return images


def label_of(seed: int, i: int, n_classes: int, labels: str | list[int] | None = None) -> int:
    """Return the label of a sample, which does not depend on the other samples.

    Args:
        seed: the seed.
        i: number of the sample.
        n_classes: number of classes.
        labels: a list of labels, or "equal" for the list of all classes. The samples take the labels of the list in
            turn. By default, the labels are drawn at random.
    """
    if labels is None:
        return int(np.random.default_rng([seed, i]).integers(n_classes))
    return i % n_classes if labels == "equal" else labels[i % len(labels)]
