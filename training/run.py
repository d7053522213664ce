"""The start of a run of train_fast.py: first everything is checked and read, then the processes join."""

import argparse
import inspect
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from diffusion import Process, create_process
from features.autoencoder import Autoencoder
from features.dataset import FeatureDataset
from interop.shapes import frequency_override
from models import find_model
from runtime.command_line import counted
from runtime.errors import UserError, is_first_process
from runtime.files import lock_folder, remove_leftovers, write_json
from runtime.processes import World, rank0_logger, world_size
from training.batches import BatchSampler
from training.experts import Experts, experts_of
from training.initial import AssumedFeatures, InitialWeights, make_model, model_shape, open_features, run_config
from training.loggers import MetricLogger, open_loggers
from training.posthoc_ema import SNAPSHOT_DTYPES, count_snapshots, snapshot_folder
from training.previews import choose_decoder
from training.resolve import (
    default_prefix,
    left_over_steps,
    loss_weight,
    mixing_options,
    process_options,
    resolve_settings,
)
from training.resume import Resume, falling_steps
from training.scoring import Scorer, ScoreSettings, changed_measures, make_scorer
from training.settings import Execution, RunSettings
from training.sharding import choose_sharding
from training.writer import Retention, check_checkpoint_space, count_checkpoints

# Settings of the optimizer that are described where they differ from the published ones.
OPTIMIZER = ("lr_schedule", "warmup", "beta2", "weight_decay", "clip_grad")

# Of the boundaries of more experts, the log shows the first and the last ones.
MAX_BOUNDARIES = 33
# If the EMA holds more than the first part of the initial weights at the end, the log advises a decay that leaves about
# the second part.
EMA_INITIAL = 0.02, 0.01


@dataclass(frozen=True)
class Run:
    """A run whose flags have been checked, and its model. No device and no other process has been used.

    Attributes:
        args: the flags, see training/flags.py.
        folder: the run's folder.
        dataset: the encoded images.
        model: the model at step 0; on the meta device in a dry run.
        process: the process.
        settings: the settings that determine the results.
        execution: how the work of a step is divided and computed.
        config: the configuration that checkpoints store.
        notes: lines for the log.
    """

    args: argparse.Namespace
    folder: Path
    dataset: FeatureDataset
    model: nn.Module
    process: Process
    settings: RunSettings
    execution: Execution
    config: dict
    notes: list[str]

    @property
    def can_sample(self) -> bool:
        """Whether the model is trained on all noise levels."""
        return self.settings.timesteps == self.process.scale.range

    def describe(self, devices: str) -> list[str]:
        """Return the lines that describe a run: its model, its data, its steps, and what is special about its loss.

        Args:
            devices: the number and kind of the devices.
        """
        model, dataset, settings = self.model, self.dataset, self.settings
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        shape = " x ".join(map(str, dataset.shape))
        source = f"from {dataset.path}"
        if isinstance(dataset, AssumedFeatures):
            source = f"ImageNet, assumed because {dataset.path} does not exist"
        experts = f", {counted(settings.experts_per_batch, 'expert')} per batch" if experts_of(model).n_experts else ""
        classes = counted(self.config["model"]["backbone"]["num_classes"], "class", "classes")
        batch = f"batch {settings.global_batch_size} on {devices}, {settings.precision}"
        options = [f"{name}={value}" for name, value in self.config["diffusion"].items() if name != "process"]
        lines = [
            f"{self.args.model}: {parameters:,.2f} M parameters, from {settings.load_weight or 'scratch'}",
            f"{counted(len(dataset), 'image')} of {classes} as {shape} ({source})",
            f"{counted(settings.max_steps, 'step')} of {batch}{experts}",
            *left_over_steps(self.args, len(dataset)),
            *self.describe_training(),
            *([f"{self.process.title}: {', '.join(options)}"] if options else []),
        ]
        changed = {
            name: value for name in OPTIMIZER if (value := getattr(settings, name)) != getattr(RunSettings, name)
        }
        if changed:
            lines.append("optimizer: " + ", ".join(f"{name}={value}" for name, value in changed.items()))
        if settings.cosine_weight:
            lines.append(f"loss plus {settings.cosine_weight:g} x (1 - cosine similarity of the velocities)")
        if settings.min_snr:
            lines.append(f"loss weight min(SNR, {settings.min_snr}) / SNR, at least {settings.min_weight or 0}")
        return lines

    def describe_training(self) -> list[str]:
        """Return the lines that say which parameters are trained, on which noise levels, and what the EMA will hold."""
        settings, scale, mixing = self.settings, self.process.scale, self.config["model"]["remix"]
        counts = [p.numel() for p in self.model.parameters()]
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        text = f"trained parameters: {trained / 1e6:,.2f} M of {sum(counts) / 1e6:,.2f} M"
        if settings.freeze:
            text += ": the bases and the coefficients, not what the experts share (--freeze)"
        lines = [text]
        if mixing:
            bases = f"pairs of matrices of rank {mixing['rank']}" if mixing["rank"] else "whole layers"
            scope = "one set of coefficients for all blocks" if mixing["scope"] == "global" else "one set per block"
            ends = [f"{level:g}" for level in mixing["boundaries"]]
            ends = ends if len(ends) <= MAX_BOUNDARIES else [*ends[:4], "...", *ends[-3:]]
            mixture = f"{counted(mixing['n_basis'], 'basis', 'bases')} ({bases})"
            lines.append(
                f"{mixture}, {counted(mixing['n_experts'], 'expert')}, mixer {mixing['mixer']}, {scope}; "
                f"boundaries of the experts' {scale.unit}s: {', '.join(ends)}"
            )
        if settings.timesteps != scale.range:
            low, high = scale.ends(*settings.timesteps)
            lines.append(f"an independent expert: trained on the {scale.unit}s {low:g} to {high:g} only")
        initial = settings.ema_decay**settings.max_steps
        if initial > EMA_INITIAL[0]:
            better = 1 - float(f"{1 - EMA_INITIAL[1] ** (1 / settings.max_steps):.2g}")
            lines.append(
                f"EMA: at the end it still holds {initial:.0%} of the weights of step 0, which pictures, scores and "
                f"samples show (decay {settings.ema_decay:g} over {counted(settings.max_steps, 'step')}); with "
                f"--ema-decay {better:.6g} it would hold {better**settings.max_steps:.0%}"
            )
        return lines

    def resumed(self, config: dict) -> "Run":
        """Return this run with the configuration that it has after resuming from a checkpoint."""
        return replace(self, config=config, settings=RunSettings(**config["training"]))

    @property
    def retention(self) -> Retention:
        """Which checkpoints the run writes and keeps."""
        return Retention(self.args.ckpt_every, self.args.keep, self.args.keep_every)

    def check_space(self, step: int) -> str:
        """Check that what the run writes after a step fits on the disk; see `check_checkpoint_space`."""
        max_steps = self.settings.max_steps
        return check_checkpoint_space(
            self.folder,
            self.model,
            count_checkpoints(self.folder, step, max_steps, self.retention),
            count_snapshots(step, max_steps, self.args.ema_snapshots),
            SNAPSHOT_DTYPES[self.args.ema_snapshot_dtype].itemsize,
        )


@dataclass(frozen=True)
class Inputs:
    """What a run reads in addition to its features and its checkpoint.

    Attributes:
        scorer: what scores the run; None if nothing does.
        decoder: decodes the samples of the pictures; None if nothing does.
        notes: lines for the log.
    """

    scorer: Scorer | None
    decoder: Autoencoder | None
    notes: list[str]


def plan_run(args: argparse.Namespace) -> Run:
    """Check the flags of a run against each other and the features, and build its model.

    Raises:
        UserError: if they contradict each other.
    """
    dataset = open_features(args)
    shape = model_shape(dataset, args.num_classes) | frequency_override(args.timestep_frequencies)
    options = process_options(args, dataset.shape)
    backbone = find_model(args.model).backbone
    if args.timestep_frequencies and "frequency_shift" not in inspect.signature(backbone.module).parameters:
        raise UserError(f"--timestep-frequencies: a {backbone.name} has no such option")
    process = create_process(**options, **loss_weight(args))
    settings = resolve_settings(args, len(dataset), process)
    mixing = mixing_options(args, process)
    folder = Path(args.results_dir) / (args.prefix or default_prefix(args.model, mixing))
    # This seed is for the initial weights and mixing logits. The draws of each step have seeds of their own.
    torch.manual_seed(settings.global_seed)
    start = None
    if settings.load_weight and not args.dry_run:
        start = InitialWeights(
            settings.load_weight,
            args.trust_pickle,
            options,
            dataset.classes,
            new_classes=bool(args.new_classes),
            normalization=dataset.normalization,
        )
    with torch.device("meta" if args.dry_run else "cpu"):
        model = make_model(args.model, shape, mixing, settings.prior_bonus, start, bool(args.freeze))
    config = run_config(args.model, model, dataset, args.image_size, settings, options)
    # Published features do not record it.
    config["data"]["vae"] = config["data"]["vae"] or args.vae
    execution = Execution(
        world_size(),
        args.grad_accum,
        checkpoint_activations=bool(args.checkpoint_activations),
        compile=torch.cuda.is_available() if args.compile is None else args.compile,
    )
    shard, notes = choose_sharding(args.shard_bases, experts_of(model), settings, execution)
    execution = replace(execution, shard=shard)
    return Run(args, folder, dataset, model, process, settings, execution, config, notes)


def lock_run(folder: Path):
    """Lock a run's folder, and remove what a killed run has left in it."""
    lock_folder(folder, "--prefix")
    remove_leftovers(
        folder, snapshot_folder(folder), folder / "checkpoints", folder / "samples", folder / "coefficients"
    )


def read_inputs(run: Run, step: int) -> Inputs:
    """Check and read what a run needs from a step on.

    Raises:
        UserError: if something is missing or wrong, or does not fit the run, or if there is too little disk space.
    """
    args, dataset = run.args, run.dataset
    scores = ScoreSettings(
        args.score_every, args.score_against, args.weights, args.score_samples, args.held_out, args.vae
    )
    scorer = make_scorer(scores, dataset, run.config, run.model, run.process)
    loaded = scorer.decoder if scorer else None
    decoder, preview_note = choose_decoder(args.sample_every, run.can_sample, args.vae, dataset, loaded)
    notes = [preview_note, *([str(scorer)] if scorer else []), *advice(run.model, run.settings)]
    notes += changed_measures(run.folder, scores, step) if step else []
    if is_first_process():
        notes.insert(0, run.check_space(step))
    return Inputs(scorer, decoder, notes)


def open_folder(run: Run, inputs: Inputs, resume: Resume, world: World) -> tuple[logging.Logger, MetricLogger]:
    """Prepare the run's folder, open its loggers, and log what the run will do."""
    # The loggers start before anything else is written to the folder, because one of them may fail to start.
    backends = open_loggers(run.args.log_to, run.folder, run.config, resume.step) if world.is_main else []
    outdated = 0
    if world.is_main:
        # The number of steps of an independent expert is a part of those that the flags give.
        steps = {"max_steps": run.settings.max_steps} if run.args.independent else {}
        outdated = remove_outdated(run.folder, run.config, resume.step)
        prepare_folder(run.folder, run.config | {"flags": run.args.recorded | steps}, resume.damaged or {})
    log = rank0_logger(world, run.folder / "log.txt")
    devices = f"{world.size} x {world.device.type}{', compiled' if run.execution.compile else ''}"
    notes = [*run.notes, *inputs.notes]
    if outdated:
        notes.append(f"REMOVED {counted(outdated, 'file')} of an earlier run or schedule: EMA snapshots and pictures")
    log_introduction(log, run.describe(devices), resume.damaged or {}, notes)
    return log, MetricLogger(backends, log)


def make_batch_sampler(
    settings: RunSettings,
    experts: Experts,
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


def remove_outdated(folder: Path, config: dict, step: int) -> int:
    """Remove the snapshots and pictures in a run's folder that are not of this run, and would be taken for its own.

    A run that was lost before its first checkpoint leaves them, and so do later steps of another schedule.

    Args:
        folder: the run's folder.
        config: configuration of the run.
        step: number of steps that are done. If it is 0, the run is new, and everything is removed; otherwise what is of
            later steps, if they had other settings.

    Returns:
        The number of files that were removed.
    """
    steps = falling_steps(config["training"])
    try:
        before = falling_steps(json.loads((folder / "config.json").read_text())["training"])
    except (OSError, ValueError, KeyError, TypeError):
        before = steps
    if step and before == steps:
        return 0
    files = [
        *snapshot_folder(folder).glob("*.pt"),
        *(folder / "samples").glob("*.png"),
        *(folder / "coefficients").glob("*.png"),
    ]
    outdated = [path for path in files if path.stem.isdigit() and (not step or int(path.stem) > step)]
    for path in outdated:
        path.unlink()
    return len(outdated)


def prepare_folder(folder: Path, config: dict, damaged: dict[Path, str]):
    """Create the run's folder, and write its config.json. Damaged checkpoints are renamed."""
    for path in damaged:
        path.rename(path.with_suffix(".pt.damaged"))
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


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
