"""Scores while training: FID of samples of the EMA weights, and their error on held-out images."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import Process, create_process
from evaluation.files import check_file, compare_sizes, has_statistics, read_network, read_statistics
from evaluation.networks import FEATURE_BATCH, FeatureExtractor, make_extractor, network_name
from evaluation.scores import GaussianStatistics, frechet_distance
from features.autoencoder import Autoencoder
from features.dataset import ENCODING, FeatureDataset
from runtime.command_line import counted
from runtime.errors import UserError, first_line, is_first_process, warn
from runtime.files import cache_folder
from runtime.processes import StopSignal, World
from sampling.experts import for_sampling
from sampling.pipeline import SAMPLE_BATCH, Pipeline, SampleSettings, make_pipeline, sample
from training.experts import experts_of
from training.loggers import MetricLogger
from training.previews import GUIDANCE
from training.statistics import HeldOutErrors

# The held-out error is measured on this many images, at this many noise levels, with 32 images per noise level.
HELD_OUT_IMAGES = 1024
HELD_OUT_LEVELS = 200
IMAGES_PER_LEVEL = 32
FID_SAMPLES = 5000
# The flags that determine FID and the held-out loss, by the flag that asks for it.
SCORE_FLAGS = {"score_against": ("score_against", "weights", "score_samples", "vae"), "held_out": ("held_out",)}
# What flags that are not given stand for. Without a VAE, samples are pixels.
SCORE_DEFAULTS = {"score_samples": FID_SAMPLES, "vae": "none"}
# The log line of more experts would be too long to read.
MAX_LOGGED_EXPERTS = 20


class Interrupted(Exception):
    """A process was asked to stop."""


class FailedScore(Exception):
    """A process has failed, and has reported why."""


class FidScore:
    """FID of samples, which equals that of sample_ddp.py and evaluator.py in every digit.

    The parts of the work are the batches of the feature network.

    Args:
        pipeline: what the run determines about sampling. Its model is replaced by the one to score.
        settings: the settings of sample_ddp.py.
        extractor: the feature network.
        reference: file of images or statistics to compare with.
    """

    name = "fid"

    def __init__(self, pipeline: Pipeline, settings: SampleSettings, extractor: FeatureExtractor, reference: str):
        self.pipeline = pipeline
        self.settings = settings
        self.extractor = extractor
        self.reference = reference
        total = settings.num_fid_samples
        self.parts = [range(i, min(i + FEATURE_BATCH, total)) for i in range(0, total, FEATURE_BATCH)]

    def start(self, world: World, stop: StopSignal | None = None):
        """Move the networks to the device, and compute the statistics of the reference on rank 0.

        Args:
            world: this process's place.
            stop: a stop signal that raises Interrupted in `measure`; None if there is none.
        """
        self.world = world
        self.loop = interruptible(self.pipeline.loop, stop) if stop else self.pipeline.loop
        self.pipeline.autoencoder.to(world.device)
        self.extractor.to(world.device)
        if world.is_main:
            stored = has_statistics(self.reference)
            statistics = read_statistics(self.reference) if stored else self.extractor(self.reference)
            self.statistics = statistics["mu"], statistics["sigma"]

    def measure(self, numbers: range, model: nn.Module) -> Tensor:
        """Return the pooled features [n, D], in host memory, of the samples with these numbers."""
        pipeline = replace(self.pipeline, model=model, loop=self.loop)
        # The same batches as in sample_ddp.py and evaluator.py, because rounding depends on them.
        batches = [numbers[i : i + SAMPLE_BATCH] for i in range(0, len(numbers), SAMPLE_BATCH)]
        options = dict(world=self.world, compiled=False, show_steps=False)
        images = [sample(pipeline, self.settings, batch, **options) for batch in batches]
        return self.extractor.run(self.extractor.network, np.concatenate(images))[0].cpu()

    def combine(self, features: list[Tensor]) -> dict[str, float]:
        """Return the FID of all features.

        Raises:
            UserError: if a feature or the FID is not finite.
        """
        statistics = GaussianStatistics()
        for pooled in features:
            if not pooled.isfinite().all():
                raise UserError("the feature network gives features of samples that are not finite")
            statistics.add(pooled.to(self.world.device))
        mu, sigma = statistics.result()
        fid = frechet_distance(self.statistics[0], self.statistics[1], mu, sigma)
        if not math.isfinite(fid):
            raise UserError(f"the FID against {self.reference} is not finite")
        return {self.name: fid}

    def evaluate(self, model: nn.Module) -> float:
        """Return the FID of a model, measured by this process alone."""
        return self.combine([self.measure(numbers, model) for numbers in self.parts])[self.name]

    def __str__(self) -> str:
        settings = self.settings
        sampler = f"{settings.sampler}, {settings.num_sampling_steps} steps, guidance scale {settings.cfg_scale}"
        return f"FID of {counted(settings.num_fid_samples, 'sample')} ({sampler}) against {self.reference}"


class HeldOutLoss:
    """Error of the predicted noise on held-out images; for a flow, the loss. The parts of the work are noise levels.

    Args:
        dataset: the held-out images.
        process: the process.
        times: timesteps, or a flow's times, [n].
        owners: index of the expert that owns each time; None if there are no experts.
        seed: seed of the choice of images and of the noise, which are the same for all models and in all steps.
    """

    name = "held_out_loss"

    def __init__(
        self,
        dataset: FeatureDataset,
        process: Process,
        times: np.ndarray,
        owners: list[int] | None,
        seed: int,
    ):
        self.path = dataset.path
        self.parts = times.tolist()
        self.owners = owners
        rows = np.random.default_rng(seed).permutation(len(dataset))[:HELD_OUT_IMAGES]
        x, y = dataset.__getitems__(rows.tolist())
        self.errors = HeldOutErrors(process, x, y, min(IMAGES_PER_LEVEL, len(x)), seed)

    def start(self, world: World, stop: StopSignal):
        """Move the images to the device."""
        self.errors = replace(self.errors, x=self.errors.x.to(world.device), y=self.errors.y.to(world.device))

    def measure(self, t: float, model: nn.Module) -> float:
        """Return the error at one time."""
        return self.errors(model, [t]).item()

    def combine(self, errors: list[float]) -> dict[str, float]:
        """Return the mean error, and that of each expert that owns some of the noise levels."""
        scores = {self.name: float(np.mean(errors))}
        for i in sorted(set(self.owners or [])):
            own = [error for error, owner in zip(errors, self.owners, strict=True) if owner == i]
            scores[f"{self.name}/expert_{i:02d}"] = float(np.mean(own))
        return scores

    def __str__(self) -> str:
        return f"held-out loss on {counted(len(self.errors.x), 'image')} of {self.path}"


class Scorer:
    """Scores the EMA weights at an interval of steps from step 0 on, and at the last step.

    The processes share the work. Scoring does not change the weights or the random draws of the run.

    Args:
        every: steps between scores.
        max_steps: number of steps of the run.
        scores: what is measured.
    """

    def __init__(self, every: int, max_steps: int, scores: list[FidScore | HeldOutLoss]):
        self.every = every
        self.max_steps = max_steps
        self.scores = scores
        self.latest = None  # the latest step that was scored
        self.seconds = 0.0  # the time that it took

    def __str__(self) -> str:
        return f"scores every {counted(self.every, 'step')}: {'; '.join(map(str, self.scores))}"

    @property
    def decoder(self) -> Autoencoder | None:
        """What decodes the samples; None if none are drawn."""
        return next((score.pipeline.autoencoder for score in self.scores if isinstance(score, FidScore)), None)

    def start(
        self, folder: Path, step: int, world: World, stop: StopSignal, loggers: MetricLogger, log: logging.Logger
    ):
        """Prepare for training from a step. Every process must call this, after the loggers have been opened."""
        self.world, self.stop, self.loggers, self.log = world, stop, loggers, log
        for score in self.scores:
            score.start(world, stop)
        # A run may have been stopped after it saved this step and before it scored it.
        names = {score.name for score in self.scores}
        [scored] = world.any(world.is_main and step > 0 and is_scored(folder / "metrics.jsonl", step, names))
        self.latest = step if scored else None
        if scored and world.is_main:
            log.info(f"step {step} is scored already")

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be scored, and has not been yet."""
        return step != self.latest and (step % self.every == 0 or step == self.max_steps)

    def remaining_s(self, step: int) -> float:
        """Return the seconds that the scores of the later steps will take, as long as the latest."""
        return self.seconds * (-(-self.max_steps // self.every) - step // self.every)

    def score(self, step: int, model: nn.Module) -> bool:
        """Score a model and log the results. Every process must call this.

        Args:
            step: number of steps done.
            model: the EMA model, in eval mode, with whole bases on every process. It is moved to the device.

        Returns:
            Whether scoring came to its end: False if it was interrupted, because a process was asked to stop. If a
            score fails on any process, this is reported, and the score and those after it are left out.
        """
        began = time.perf_counter()
        results = {}
        try:
            network = self._together(step, partial(prepare, model, self.world.device))
            for score in self.scores:
                results |= self._measure(score, step, network)
        except Interrupted:
            return False
        except FailedScore:
            pass
        # Training may need the memory that was allocated for batches of other sizes.
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self.latest = step
        self.seconds = time.perf_counter() - began
        if results:
            self.loggers.log_metrics(step, {"step": step} | results)
            self.log.info(score_line(results, step, self.max_steps, self.seconds))
        return True

    def _measure(self, score: FidScore | HeldOutLoss, step: int, model: nn.Module) -> dict[str, float]:
        """Measure one score, and return the results; they are empty on all processes but rank 0."""
        rank, size = self.world.rank, self.world.size
        values = []
        for first in range(0, len(score.parts), size):
            own = score.parts[first : first + size][rank : rank + 1]
            values += self._together(step, partial(measure_parts, score, own, model))
        gathered = self.world.gather(values)

        def combine() -> dict[str, float]:
            return score.combine([gathered[i % size][i // size] for i in range(len(score.parts))]) if gathered else {}

        return self._together(step, combine)

    def _together(self, step: int, work: Callable[[], Any]) -> Any:
        """Call a function on every process, and return its result, unless one of them fails or is asked to stop.

        Raises:
            Interrupted: on all processes, if one was asked to stop.
            FailedScore: on all processes, if one failed.
        """
        result, failed = None, False
        try:
            result = work()
        except Interrupted:
            pass
        # For example too little GPU memory, or samples that are not finite.
        except Exception as error:
            failed = True
            self.log.error(f"COULD NOT SCORE step {step}: {first_line(error)}; training continues")
        failed, stopped = self.world.any(failed, self.stop.requested is not None)
        if stopped:
            raise Interrupted
        if failed:
            raise FailedScore
        return result


def prepare(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the network that computes the scores of a model, on a device."""
    return for_sampling(model.to(device))


def measure_parts(score: FidScore | HeldOutLoss, parts: list, model: nn.Module) -> list:
    """Measure some parts of a score."""
    return [score.measure(part, model) for part in parts]


def interruptible(loop: Callable[..., Tensor], stop: StopSignal) -> Callable[..., Tensor]:
    """Return a sampling loop that raises Interrupted before it calls the network if a stop signal has arrived."""

    def interruptible_loop(denoise: Callable[[Tensor, Tensor], Tensor], *arguments, **options) -> Tensor:
        def checked(x: Tensor, t: Tensor) -> Tensor:
            if stop.requested is not None:
                raise Interrupted
            return denoise(x, t)

        return loop(checked, *arguments, **options)

    return interruptible_loop


def is_scored(metrics: Path, step: int, names: set[str]) -> bool:
    """Return whether a file of metrics holds all scores of these names of a step."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return any(line["step"] == step and names <= line.keys() for line in lines)


def score_line(results: dict[str, float], step: int, max_steps: int, seconds: float) -> str:
    """Return the line of log.txt for the scores of a step."""
    parts = [f"step {step:07d}/{max_steps:07d}"]
    if "fid" in results:
        parts.append(f"FID {results['fid']:.4f}")
    if "held_out_loss" in results:
        parts.append(f"held-out loss {results['held_out_loss']:.5f}")
    experts = [f"{value:.4f}" for name, value in results.items() if "expert" in name]
    if 0 < len(experts) <= MAX_LOGGED_EXPERTS:
        parts.append(f"of the experts {' '.join(experts)}")
    return "  ".join([*parts, f"scored in {timedelta(seconds=round(seconds))}"])


@dataclass(frozen=True)
class ScoreSettings:
    """What a run scores, as its flags say.

    Attributes:
        every: steps between scores; None for no scores.
        reference: what FID compares the samples with, as in evaluator.py; None for no FID.
        weights: feature network of FID; None for Inception.
        n_samples: number of samples of FID; None for FID_SAMPLES.
        held_out: folder of held-out features; None for no held-out loss.
        vae: name of the VAE that decodes the samples; None for the pixels of a dataset of pixels.
    """

    every: int | None = None
    reference: str | None = None
    weights: str | None = None
    n_samples: int | None = None
    held_out: str | None = None
    vae: str | None = None

    def check(self):
        """Raise UserError if settings are missing or need others."""
        if self.every is None:
            if self.reference or self.weights or self.n_samples or self.held_out:
                raise UserError("--score-against, --weights, --score-samples and --held-out need --score-every")
        elif not self.reference and not self.held_out:
            raise UserError(
                "--score-every needs --score-against for FID, --held-out for the loss on other images, or both"
            )
        for flag, value in (("--weights", self.weights), ("--score-samples", self.n_samples)):
            if value and not self.reference:
                raise UserError(f"{flag} needs --score-against")


def changed_measures(folder: Path, settings: ScoreSettings, step: int) -> list[str]:
    """Return what a run that resumes scores in another way than before, as lines for the log.

    Args:
        folder: the run's folder, with the config.json of the steps before.
        settings: what is scored from now on.
        step: number of steps that are done.
    """
    try:
        before = dict(json.loads((folder / "config.json").read_text())["flags"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    now = {
        "score_every": settings.every,
        "score_against": settings.reference,
        "weights": settings.weights,
        "score_samples": settings.n_samples,
        "vae": settings.vae,
        "held_out": settings.held_out,
    }
    return [
        f"scores up to step {step:,} had {flag} {old}, not {new}: later ones cannot be compared"
        for flag, old, new in differing_measures(before, now)
    ]


def differing_measures(flags: dict, others: dict) -> list[tuple[str, Any, Any]]:
    """Return the flags by which two runs measure a score of one name in different ways, each with its two values.

    Args:
        flags, others: the flags of the runs, as their config.json records them.
    """
    found = []
    for score, names in SCORE_FLAGS.items():
        # Without this flag, there is no such score.
        if not all(part.get("score_every") and part.get(score) for part in (flags, others)):
            continue
        for name in names:
            old, new = (part.get(name) or SCORE_DEFAULTS.get(name) for part in (flags, others))
            paths = [isinstance(value, str) and Path(value).resolve() for value in (old, new)]
            if old != new and not (paths[0] and paths[0] == paths[1]):
                found.append((f"--{name.replace('_', '-')}", old, new))
    return found


def make_scorer(
    settings: ScoreSettings,
    dataset: FeatureDataset,
    config: dict,
    model: nn.Module,
    process: Process,
) -> Scorer | None:
    """Check what a run scores, and the files that it needs.

    Args:
        settings: what is scored.
        dataset: the encoded images of the run.
        config: configuration of the run.
        model: the model in training.
        process: its process.

    Returns:
        What scores the run; None if nothing is scored.

    Raises:
        UserError: if a setting is missing or wrong, or if a file is.
    """
    settings.check()
    if settings.every is None:
        return None
    training = config["training"]
    scores = []
    if settings.held_out:
        images = open_held_out(settings.held_out, dataset, config["model"]["backbone"]["num_classes"])
        times = process.scale.grid(HELD_OUT_LEVELS, training["timesteps"])
        owners = experts_of(model).owners(times.tolist())
        scores.append(HeldOutLoss(images, process, times, owners, training["global_seed"]))
    if settings.reference:
        scores.append(make_fid(settings, config, model, "this run"))
    return Scorer(settings.every, training["max_steps"], scores)


def make_fid(settings: ScoreSettings, config: dict, model: nn.Module, name: str) -> FidScore:
    """Check what FID needs, and load its networks.

    Args:
        settings: what is scored; `every` has no effect.
        config: config of the model.
        model: the model.
        name: what the model is called in error messages.

    Raises:
        UserError: if a file is missing or wrong, or if the model is not trained on all noise levels.
    """
    training, process = config["training"], create_process(**config["diffusion"])
    if training["timesteps"] != process.scale.range:
        raise UserError("--score-against needs a model that is trained on all noise levels")
    decoder = settings.vae or ("none" if config["data"]["vae"] == "none" else None)
    if decoder is None:
        raise UserError("--score-against needs --vae, which decodes the samples")
    sampler, steps = process.quick
    sampling = SampleSettings(
        num_fid_samples=settings.n_samples or FID_SAMPLES,
        sampler=sampler,
        num_sampling_steps=steps,
        diffusion_form=None,
        last_step=None,
        last_step_size=None,
        cfg_scale=GUIDANCE,
        guidance_interval=None,
        cfg_all_channels=False,
        ema=True,
        global_seed=training["global_seed"],
        per_proc_batch_size=SAMPLE_BATCH,
        save_png=False,
        precision=training["precision"],
        labels=None,
    )
    pipeline = make_pipeline(model, None, config, sampling, decoder, name)
    return FidScore(pipeline, sampling, open_network(settings, pipeline), settings.reference)


def open_held_out(path: str, dataset: FeatureDataset, num_classes: int) -> FeatureDataset:
    """Open held-out features, and check that they are encoded as those of the run.

    Args:
        path: their folder.
        dataset: the features of the run.
        num_classes: number of classes of the model.

    Raises:
        UserError: if the folder holds no features, or features of another shape, VAE or classes.
    """
    held_out = FeatureDataset(path, normalization=dataset.normalization)
    encoding = {name: getattr(dataset, name) for name in ENCODING}
    held_out.check_encoding("--held-out", encoding, num_classes, dataset.path)
    return held_out


def open_network(settings: ScoreSettings, pipeline: Pipeline) -> FeatureExtractor:
    """Load the feature network of FID, and check it and the reference.

    Args:
        settings: what is scored.
        pipeline: what the run determines about sampling.

    Raises:
        UserError: if a file is missing or wrong, or if the reference is of another network.
    """
    reference = settings.reference
    check_file(reference)
    network = network_name(settings.weights)
    if has_statistics(reference) and (other := read_network(reference)) != network:
        raise UserError(f"--score-against {reference} holds statistics of another network than --weights: {other}")
    extractor = make_extractor(settings.weights, cache_folder(), FEATURE_BATCH, torch.device("cpu"))
    side = pipeline.shape[-1] * pipeline.autoencoder.factor
    if difference := compare_sizes(reference, "samples of this run", (side, side)):
        warn(difference)
    width = extractor.check_network(np.zeros((2, side, side, 3), np.uint8), "samples of this run")
    if not has_statistics(reference):
        # Its features are computed on rank 0 only, and only once.
        if is_first_process():
            extractor.check(reference)
        return extractor
    statistics = read_statistics(reference)
    if len(statistics["mu"]) != width:
        raise UserError(f"--score-against {reference} has another number of features than --weights: not {width}")
    if not all(np.isfinite(statistics[name]).all() for name in ("mu", "sigma")):
        raise UserError(f"--score-against {reference} holds statistics that are not finite")
    return extractor
