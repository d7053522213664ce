"""Train a DiT or a RemixDiT on encoded features.

    torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model RemixDiT-S/2 --load-weight pretrained/DiT_S_2_2M.pt \\
        --data-path data/imagenet_encoded --epochs 20 --prefix RemixDiT-S-4-20-100K --n-basis 4 --n-experts 20

The run's folder is outputs/<prefix>/. It holds config.json, log.txt, metrics.jsonl, checkpoints/<step>.pt, and the
pictures samples/<step>.png and coefficients/<step>.png. The images, timesteps, experts and noise of a step depend only
on the seed, the step and the position in the global batch. They depend neither on the device, nor on the number of
processes, nor on when the run was resumed.
"""

import argparse
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from diffusion import NOISE_LEVELS, PROCESS_SAMPLERS, FlowMatching, GaussianDiffusion, create_process
from diffusion.flow import FLOW_OPTIONS, PREDICTIONS, WEIGHTS
from diffusion.interpolants import PATHS, TIME_SAMPLINGS
from evaluation.scores import NEIGHBOURS
from interop.shapes import TIMESTEP_FREQUENCIES_FLAG, frequency_override
from models import DiT_models
from remix import MIXED_LAYERS, MIXERS, MODULATION, PRIOR_BONUS, SCOPES, RemixDiT_models
from runtime.command_line import ArgumentParser, counted, folder_name, number, positive_int, run_script, seed_int
from runtime.errors import UserError, is_first_process
from runtime.files import lock_folder, remove_leftovers
from runtime.processes import (
    PRECISIONS,
    StopSignal,
    rank0_logger,
    restore_signals,
    setup,
    use_deterministic_algorithms,
    world_size,
)
from training.batches import default_experts_per_batch
from training.dry_run import (
    Parallelism,
    check_checkpoint_space,
    choose_sharding,
    count_checkpoints,
    describe_run,
    dry_run,
    matmul_rate,
    training_flops,
)
from training.loggers import MetricLogger, logger_names, open_loggers
from training.posthoc_ema import SNAPSHOT_DTYPES, TRACKED_STDS, count_snapshots, snapshot_folder
from training.previews import SamplePreview, choose_decoder
from training.scoring import FID_SAMPLES, make_scorer
from training.settings import RunSettings
from training.start import (
    advice,
    check_interval,
    check_new,
    check_noise_levels,
    default_prefix,
    expert_boundaries,
    find_resume,
    level_argument,
    log_introduction,
    make_batch_sampler,
    make_model,
    model_shape,
    open_features,
    prepare_folder,
    read_resume,
    run_config,
)
from training.statistics import ThroughputTimer, build_metrics, explain_failure, report_line
from training.trainer import Trainer, save_checkpoint
from training.writer import CheckpointWriter

# The values of flags that are not given, by --recipe; None: see `resolve_settings`. In the published runs, each of
# eight processes drew one expert per step.
RECIPES = {
    "default": dict(
        experts_per_batch=None, coeff_lr=1e-2, coeff_lr_end=None, prior_strength=1e-4, prior_bonus=PRIOR_BONUS
    ),
    "paper": dict(experts_per_batch=8, coeff_lr=1e-2, coeff_lr_end=1e-5, prior_strength=1e-4, prior_bonus=3.0),
}
# With several processes, the decision to stop is exchanged every STOP_CHECK steps only, because in the exchange each
# process waits for all others.
STOP_CHECK = 4


def main(args: argparse.Namespace):
    """Train a model, or several independent experts one after the other, as the flags say; see `make_parser`."""
    for run in independent_runs(args) if args.independent else [args]:
        if not train(run):
            break
        if args.independent:
            # The compiler limits how often it compiles the same code for another model.
            torch.compiler.reset()


def independent_runs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the flags of each independent expert's run, which differ in --timesteps and --prefix."""
    if args.model in RemixDiT_models or args.timesteps:
        raise UserError("--independent trains a plain DiT per interval: use it with --model DiT-... and no --timesteps")
    if args.resume not in (None, "auto"):
        raise UserError("--independent resumes its runs with --resume auto only")
    diffusion = create_process(**process_options(args))
    boundaries = args.boundaries
    if boundaries is None:
        boundaries = expert_boundaries(diffusion, args.independent)
    else:
        check_noise_levels("--boundaries", boundaries, args.process, diffusion, complete=True)
    if len(boundaries) != args.independent + 1:
        raise UserError(
            f"--independent {args.independent} needs {args.independent + 1} --boundaries, not {len(boundaries)}"
        )
    prefix = args.prefix or default_prefix(args.model, None)
    runs = []
    for i, interval in enumerate(pairwise(boundaries)):
        values = {"timesteps": list(interval), "boundaries": None, "prefix": f"{prefix}-{i}"}
        run = argparse.Namespace(**vars(args) | values)
        runs.append(run)
        # Check all experts before the first is trained.
        folder = Path(args.results_dir) / run.prefix
        if run.resume:
            check_interval(folder, run.timesteps, run.process)
        else:
            check_new(folder)
    # The dry runs of all experts are the same.
    return runs[:1] if args.dry_run else runs


def train(args: argparse.Namespace) -> bool:
    """Train one model, and return whether it was trained for all its steps."""
    # Check all input, build the model and read the checkpoint, before any device or process group is used.
    dataset = open_features(args.data_path, args.image_size, assume=args.dry_run)
    shape = model_shape(dataset, args.num_classes) | frequency_override(args.timestep_frequencies)
    process = process_options(args)
    diffusion = create_process(**process, **loss_weight(args))
    settings = resolve_settings(args, len(dataset), diffusion)
    mixing = mixing_options(args, diffusion)
    folder = Path(args.results_dir) / (args.prefix or default_prefix(args.model, mixing))
    saving = {"every": args.ckpt_every, "keep": args.keep, "keep_every": args.keep_every}
    if args.dry_run:
        with torch.device("meta"):
            model = make_model(args.model, shape, mixing, settings.prior_bonus, freeze=args.freeze)
        n_checkpoints = count_checkpoints(folder, 0, settings.max_steps, **saving)
        shard, _ = choose_sharding(args.shard_bases, model, settings, world_size(), args.grad_accum)
        parallelism = Parallelism(world_size(), args.grad_accum, shard, args.checkpoint_activations)
        if args.independent:
            print(f"each of {args.independent} independent experts:")
        print("\n".join(dry_run(args.model, model, dataset, settings, process, parallelism, folder, n_checkpoints)))
        return False
    # This seed is for the initial weights and mixing logits. The draws of each step have seeds of their own.
    torch.manual_seed(settings.global_seed)
    weights = settings.load_weight, args.trust_pickle, process, dataset.classes, args.new_classes
    model = make_model(args.model, shape, mixing, settings.prior_bonus, *weights, freeze=args.freeze)
    config = run_config(args.model, model, dataset, args.image_size, settings, process)
    shard, sharding_notes = choose_sharding(args.shard_bases, model, settings, world_size(), args.grad_accum)
    lock_folder(folder, "--prefix")
    remove_leftovers(
        folder, snapshot_folder(folder), folder / "checkpoints", folder / "samples", folder / "coefficients"
    )
    resume_path, state, damaged = find_resume(args.resume, folder, config, args.extend)
    step = state["step"] if state else 0
    can_sample = settings.timesteps == NOISE_LEVELS[args.process]
    scores = args.score_against, args.weights, args.score_samples, args.held_out, args.vae
    scorer = make_scorer(args.score_every, *scores, dataset, config, model, diffusion)
    loaded = scorer.decoder if scorer else None
    autoencoder, preview_note = choose_decoder(args.sample_every, can_sample, args.vae, dataset, loaded)
    n_checkpoints = count_checkpoints(folder, step, settings.max_steps, **saving)
    disk_note = None
    if is_first_process():
        n_snapshots = count_snapshots(step, settings.max_steps, args.ema_snapshots)
        snapshot_bytes = SNAPSHOT_DTYPES[args.ema_snapshot_dtype].itemsize
        disk_note = check_checkpoint_space(folder, model, n_checkpoints, n_snapshots, snapshot_bytes)

    # Join the other processes and prepare the run's folder.
    if args.deterministic:
        use_deterministic_algorithms()
    world = setup()
    stop = StopSignal()
    # Only rank 0 has searched for the checkpoint and verified its checksums. The others now read the same file.
    resume_path = world.from_main(resume_path)
    if resume_path and not world.is_main:
        state = read_resume(resume_path, config, args.extend)
        step = state["step"]
    # The loggers start before anything else is written to the folder, because one of them may fail to start.
    backends = open_loggers(args.log_to, folder, config, step) if world.is_main else []
    if world.is_main:
        prepare_folder(folder, config, damaged)
    log = rank0_logger(world, folder / "log.txt")
    compiled = torch.cuda.is_available() if args.compile is None else args.compile
    devices = f"{world.size} x {world.device.type}{', compiled' if compiled else ''}"
    description = describe_run(args.model, model, dataset, settings, process, devices)
    notes = [*sharding_notes, disk_note, preview_note, *([str(scorer)] if scorer else []), *advice(model, settings)]
    log_introduction(log, description, damaged, notes)

    # Set up the training state.
    trainer = Trainer(
        model,
        diffusion,
        world,
        lr=settings.lr,
        coeff_lr=settings.coeff_lr,
        coeff_lr_end=settings.coeff_lr_end,
        ema_decay=settings.ema_decay,
        clip_grad=settings.clip_grad,
        precision=settings.precision,
        compile=compiled,
        checkpoint_activations=args.checkpoint_activations,
        shard=shard,
        ema_stds=settings.ema_stds or (),
    )
    if state:
        trainer.load_state_dict(state, resume_path)
        log.info(f"resumed from {resume_path}")
    del state
    sampler = make_batch_sampler(settings, model, diffusion, world, args.grad_accum)
    writer = CheckpointWriter(folder / "checkpoints", log, args.keep, args.keep_every)
    loggers = MetricLogger(backends, log)
    if scorer:
        scorer.start(folder, step, world, stop, loggers, log)
    previews = None
    if args.sample_every and world.is_main:
        run = folder, args.model, settings.global_seed, dataset.classes
        autocast = partial(world.autocast, settings.precision)
        previews = SamplePreview(*run, autoencoder, process if can_sample else None, autocast, world.device, log)

    # A run that was stopped while it scored a step scores it now.
    stopped = scorer is not None and scorer.is_due(step) and not scorer.score(step, trainer.whole_ema(True))

    # Train. `step` counts the steps that are done. find_resume sets schedule_steps if the run is extended.
    schedule_steps = config["training"]["schedule_steps"] or settings.max_steps
    peak_flops_per_s = matmul_rate(world.device, settings.precision) * world.size
    timer = ThroughputTimer(world.device, training_flops(config["model"]["backbone"]), peak_flops_per_s)
    last_picture_s = 0.0
    failed = False
    with closing(loggers), sampler.load(dataset, range(step, settings.max_steps), args.num_workers) as batches:
        done = stopped or step == settings.max_steps
        while not done:
            progress = min(1, step / schedule_steps)
            prior_weight = settings.prior_strength * (1 - progress)
            trainer.set_progress(progress)
            trainer.step(step, sampler.microbatches(next(batches)), prior_weight)
            timer.add(settings.global_batch_size)
            step += 1

            # Decide together with the other processes whether this was the last step. Then `finished`, `failed` and
            # `stopped` are the same on all processes, so all of them take the same branches below.
            finished = step == settings.max_steps
            if world.size == 1 or step % STOP_CHECK == 0 or finished:
                streak = trainer.stats.longest_streak()
                failed, stopped = world.any(streak >= args.max_bad_steps, stop.requested is not None)
                stopped = stopped and not (failed or finished)
            done = finished or failed or stopped

            if step % args.log_every == 0 or finished:
                losses, nonfinite = trainer.stats.read()
                speed = timer.read()
                schedule = trainer.learning_rates() | {"prior_weight": prior_weight}
                # All processes call this: with sharded bases, each has only some rows, and the distances need all.
                metrics = build_metrics(step, losses, nonfinite, model, schedule, speed)
                if world.is_main:
                    loggers.log_metrics(step, metrics)
                    remaining = settings.max_steps // args.sample_every - step // args.sample_every if previews else 0
                    pause_s = remaining * last_picture_s + (scorer.remaining_s(step) if scorer else 0)
                    log.info(report_line(metrics, settings.max_steps, settings.global_batch_size, pause_s))
            # The snapshot of a step is written before its checkpoint. A run that resumes from that checkpoint does not
            # write the snapshot again.
            if args.ema_snapshots and (step % args.ema_snapshots == 0 or finished):
                with timer.paused():
                    averages = trainer.whole_averages()
                    if world.is_main:
                        writer.save_snapshot(step, averages, args.ema_snapshot_dtype)
                    del averages
            if step % args.ckpt_every == 0 or finished or stopped:
                with timer.paused():
                    save_checkpoint(writer, trainer, config, step)
            if args.sample_every and step % args.sample_every == 0:
                # Only rank 0 draws the pictures. The other processes wait for it in their next step.
                with timer.paused():
                    ema = trainer.whole_ema()
                    for kind, path in previews.draw(step, ema).items() if previews else ():
                        loggers.log_image(step, kind, path)
                    del ema
                last_picture_s = timer.last_pause
            if scorer and scorer.is_due(step) and not (failed or stopped):
                with timer.paused():
                    stopped = not scorer.score(step, trainer.whole_ema(True))
                    if stopped and not finished and step % args.ckpt_every:
                        save_checkpoint(writer, trainer, config, step)
                done = done or stopped

    # Wait until the last checkpoint is written, and report how the run ended.
    writer.wait()
    restore_signals()
    if failed:
        _, nonfinite = trainer.stats.read()
        if world.is_main:
            log.error(explain_failure(nonfinite, sampler, model))
        raise SystemExit(1)
    # Only rank 0 writes. The other processes do not wait for its last checkpoint.
    if writer.failed:
        log.error(
            f"the run ends after step {step:,} without a checkpoint of this step: free disk space, then --resume auto "
            "repeats the steps after the last good checkpoint"
        )
        raise SystemExit(1)
    if stopped:
        cause = stop.requested or "another process"
        log.info(f"stopped by {cause} after step {step:,}; --resume auto continues the run")
    else:
        log.info("done")
    return not stopped


def process_options(args: argparse.Namespace) -> dict:
    """Return the keyword arguments of `create_process` that the flags give."""
    options = {name: value for name in FLOW_OPTIONS if (value := getattr(args, name)) is not None}
    if args.process == "gaussian":
        if options:
            raise UserError("--path, --prediction, --weight and --time-* need --process flow")
        return {}
    if options.keys() & {"time_mean", "time_std"} and args.time_sampling != "logit-normal":
        raise UserError("--time-mean and --time-std need --time-sampling logit-normal")
    try:
        return {"process": "flow", **FlowMatching(**options).config}
    except ValueError as error:
        raise UserError(str(error)) from None


def loss_weight(args: argparse.Namespace) -> dict:
    """Return the keyword arguments of `create_process` that concern the loss only, as the flags give them."""
    weight = {"min_snr": args.min_snr, "min_weight": args.min_weight}
    weight = {name: value for name, value in weight.items() if value is not None}
    if weight and args.process != "gaussian":
        raise UserError("--min-snr and --min-weight need --process gaussian")
    if "min_weight" in weight and "min_snr" not in weight:
        raise UserError("--min-weight needs --min-snr")
    if weight.get("min_weight") == 1:
        raise UserError("--min-weight 1 makes every weight 1: leave out --min-snr and --min-weight")
    return weight


def mixing_options(args: argparse.Namespace, diffusion: GaussianDiffusion | FlowMatching) -> dict | None:
    """Return the keyword arguments of a RemixDiT that the flags give, or None for a plain DiT."""
    if args.model not in RemixDiT_models:
        for name in ("boundaries", "rank", "freeze", "mix_modulation"):
            if getattr(args, name):
                other = " or --independent" if name == "boundaries" else ""
                raise UserError(f"--{name.replace('_', '-')} needs a RemixDiT{other}, not {args.model}")
        return None
    boundaries = args.boundaries
    if boundaries:
        check_noise_levels("--boundaries", boundaries, args.process, diffusion, complete=True)
    elif isinstance(diffusion, FlowMatching):
        boundaries = expert_boundaries(diffusion, args.n_experts)
    mixed_layers = [*MIXED_LAYERS, MODULATION] if args.mix_modulation else [*MIXED_LAYERS]
    return dict(
        n_basis=args.n_basis,
        n_experts=args.n_experts,
        mixer=args.mixer,
        scope=args.mixer_scope,
        mixed_layers=mixed_layers,
        boundaries=boundaries,
        rank=args.rank,
    )


def resolve_settings(
    args: argparse.Namespace, n_images: int, diffusion: GaussianDiffusion | FlowMatching
) -> RunSettings:
    """Check that the flags fit together, and fill in the defaults that depend on other flags or on the data.

    Args:
        args: the flags.
        n_images: number of images of the dataset.
        diffusion: the process.

    Raises:
        UserError: if flags contradict each other, or a number does not divide the batch size as it must.
    """
    recipe = {name: value for name, value in vars(args).items() if name in RECIPES["default"] and value is not None}
    recipe = RECIPES[args.recipe] | recipe
    batch_size = args.global_batch_size
    if batch_size % (world_size() * args.grad_accum):
        processes = counted(world_size(), "process", "processes")
        parts = f" with {args.grad_accum} microbatches each" if args.grad_accum > 1 else ""
        raise UserError(f"--global-batch-size {batch_size} cannot be divided equally among {processes}{parts}")
    if args.keep_every and (not args.keep or args.keep_every % args.ckpt_every):
        raise UserError("--keep-every needs --keep, and must be a multiple of --ckpt-every")
    for flag, value in (("new-classes", args.new_classes), ("freeze", args.freeze)):
        if value and not args.load_weight:
            raise UserError(f"--{flag} needs --load-weight")
    remix = args.model in RemixDiT_models
    timesteps = args.timesteps or NOISE_LEVELS[args.process]
    if remix and timesteps != NOISE_LEVELS[args.process]:
        raise UserError("--timesteps: a RemixDiT trains on all timesteps")
    check_noise_levels("--timesteps", timesteps, args.process, diffusion)
    experts_per_batch = 1
    if remix:
        experts_per_batch = recipe["experts_per_batch"] or default_experts_per_batch(batch_size, args.n_experts)
    if batch_size % experts_per_batch:
        raise UserError(f"--experts-per-batch {experts_per_batch} does not divide --global-batch-size {batch_size}")
    max_steps = (args.max_steps or max(1, args.epochs * n_images // batch_size)) // (args.independent or 1)
    if not max_steps:
        raise UserError(f"--independent {args.independent}: there are fewer steps than experts")
    lr = args.lr or (2e-5 if args.load_weight else 1e-4)
    coeff_lr, coeff_lr_end = recipe["coeff_lr"], recipe["coeff_lr_end"]
    if coeff_lr_end is None:
        coeff_lr_end = min(lr / 2, coeff_lr)
    return RunSettings(
        max_steps=max_steps,
        global_batch_size=batch_size,
        experts_per_batch=experts_per_batch,
        timesteps=timesteps,
        lr=lr,
        coeff_lr=coeff_lr,
        coeff_lr_end=coeff_lr_end if remix else None,
        ema_decay=args.ema_decay,
        clip_grad=args.clip_grad,
        prior_strength=recipe["prior_strength"],
        prior_bonus=recipe["prior_bonus"],
        # A dry run describes a run on GPUs.
        precision=args.precision or ("bf16" if args.dry_run or torch.cuda.is_available() else "fp32"),
        global_seed=args.global_seed,
        load_weight=args.load_weight,
        ema_stds=[*TRACKED_STDS] if args.ema_snapshots else None,
        freeze=args.freeze or None,
        min_snr=args.min_snr,
        min_weight=args.min_weight,
    )


def make_parser() -> ArgumentParser:
    """Return the parser of the flags."""
    parser = ArgumentParser(description="Train a DiT or a RemixDiT on features from extract_features.py.")

    add = parser.add_argument_group("run").add_argument
    add("--data-path", required=True, metavar="FOLDER", help="features, packed or in the original layout")
    add("--prefix", type=folder_name, metavar="NAME", help="name of the run's folder (default: from the model's name)")
    add("--results-dir", default="outputs", metavar="FOLDER", help="folder that holds the runs' folders")
    add(
        "--resume",
        metavar="PATH|auto",
        help="checkpoint to resume from; auto: the newest undamaged one of this run, or a new run if there is none",
    )
    add(
        "--extend",
        choices=["hold", "stretch"],
        default="hold",
        help="with --resume, if a finished run gets more steps: hold the final learning rates, or stretch the schedule "
        "over all steps",
    )
    add("--global-seed", type=seed_int, default=0, metavar="SEED", help="seed of all random draws")
    add(
        "--dry-run",
        action="store_true",
        help="print the run's size and disk space and estimates of its memory and time on GPUs, and end; needs neither "
        "GPUs nor data; the environment variable WORLD_SIZE sets the number of GPUs",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        choices=[*DiT_models, *RemixDiT_models],
        default="RemixDiT-S/2",
        metavar="NAME",
        help="DiT or RemixDiT, then the size -T, -S, -B, -L or -XL, then the patch size /2, /4 or /8",
    )
    add(
        "--load-weight",
        metavar="PATH",
        help="initial weights: a checkpoint of a DiT, SiT or RemixDiT, hf:OWNER/REPOSITORY/FILE for one on the Hugging "
        "Face hub, or a DiT in diffusers' layout (a folder, or a hub name such as facebook/DiT-XL-2-256) (default: "
        "random weights)",
    )
    add(
        "--new-classes",
        action="store_true",
        help="let --load-weight be a model of other classes: the class embeddings are initialized again, except those "
        "of the null class and of classes whose names occur in both the model and the features",
    )
    add("--timestep-frequencies", **TIMESTEP_FREQUENCIES_FLAG)
    add("--n-basis", type=positive_int, default=4, metavar="K", help="number of basis models")
    add("--n-experts", type=number(int, 1, 1000), default=20, metavar="N", help="number of experts")
    add(
        "--boundaries",
        type=level_argument,
        nargs="+",
        metavar="LEVEL",
        help="N + 1 increasing noise levels that bound the intervals of a RemixDiT's experts, or of --independent "
        "experts: timesteps from 0 to 1000, or from 0 to 1 for flows. Experts are trained equally often: boundaries "
        "other than the default change the density of the training times (default: intervals of equal probability)",
    )
    add(
        "--mixer",
        choices=MIXERS,
        default="softmax",
        help="coefficients: softmax of the logits, the logits themselves (raw), or one-hot",
    )
    add(
        "--mixer-scope",
        choices=SCOPES,
        default="global",
        help="global: one set of coefficients for all blocks; local: one per block",
    )
    add(
        "--rank",
        type=positive_int,
        metavar="R",
        help="low-rank bases: one DiT, and K pairs of matrices of rank R for each mixed layer, as in LoRA (default: "
        "every basis is a whole layer)",
    )
    add("--freeze", action="store_true", help="train only the bases and the coefficients, not what the experts share")
    add("--mix-modulation", action="store_true", help="also mix the adaLN layer of each block")
    add(
        "--timesteps",
        type=level_argument,
        nargs=2,
        metavar=("LO", "HI"),
        help="train a plain DiT on the timesteps LO to HI - 1 only, or on a flow's noise levels LO to HI, as one of "
        "several independent experts (default: all)",
    )
    add(
        "--independent",
        type=number(int, 2, 1000),
        metavar="N",
        help="train N plain DiTs one after the other, on the noise levels that a RemixDiT's N experts would have (see "
        "--boundaries); --max-steps is the total, each trains for an N-th of it; their folders are <prefix>-0, "
        "<prefix>-1, ...",
    )
    add("--image-size", type=positive_int, metavar="PIXELS", help="side of the images, which the features must have")
    add("--num-classes", type=positive_int, metavar="N", help="number of classes (default: the features', or 1000)")

    add = parser.add_argument_group("process").add_argument
    add("--process", choices=PROCESS_SAMPLERS, default="gaussian", help="Gaussian diffusion, or flow matching")
    add(
        "--min-snr",
        type=number(float, 0, above=True),
        metavar="GAMMA",
        help="multiply the squared error of the noise by min(SNR, GAMMA) / SNR, which is small for low noise "
        "(arXiv 2303.09556; default: no weight)",
    )
    add(
        "--min-weight",
        type=number(float, 0, 1),
        metavar="W",
        help="lower bound of the factor of --min-snr (default: 0)",
    )
    add("--path", choices=PATHS, help="path of a flow between noise and data (default: linear)")
    add("--prediction", choices=PREDICTIONS, help="what the model of a flow predicts (default: velocity)")
    add("--weight", choices=WEIGHTS, help="loss weight of a noise or score prediction (default: none)")
    add("--time-sampling", choices=TIME_SAMPLINGS, help="distribution of a flow's noise levels (default: uniform)")
    add(
        "--time-mean",
        type=number(float),
        metavar="MEAN",
        help="mean of logit(u) for logit-normal noise levels u, before --time-shift (default: 0)",
    )
    add("--time-std", type=number(float, 0, above=True), metavar="STD", help="std of logit(u) (default: 1)")
    add(
        "--time-shift",
        type=number(float, 0, above=True),
        dest="shift",
        metavar="S",
        help="move a flow's noise levels u to S u / (1 + (S - 1) u), in training and in sampling (default: 1)",
    )

    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs",
        type=positive_int,
        default=20,
        help="passes over the images; 20 passes over ImageNet are the published 100,000 steps",
    )
    add("--max-steps", type=positive_int, metavar="STEPS", help="number of steps, instead of --epochs")
    add(
        "--recipe",
        choices=RECIPES,
        default="default",
        help="paper: the published settings where no flag gives others: 8 experts per batch, mixing logits with a "
        "learning rate from 1e-2 to 1e-5, and a prior with bonus 3 and weight 1e-4; the published --lr is the default",
    )
    add(
        "--global-batch-size",
        type=positive_int,
        default=256,
        metavar="IMAGES",
        help="images per step, on all processes together",
    )
    add("--grad-accum", type=positive_int, default=1, metavar="N", help="microbatches per step on each process")
    add(
        "--experts-per-batch",
        type=positive_int,
        metavar="E",
        help="experts per global batch, each on an equal part of it; with 1, all images of a step have timesteps of "
        "one interval (default: the largest divisor of the batch size that is at most 16 and N)",
    )
    add(
        "--lr",
        type=number(float, 0, above=True),
        help="peak learning rate of the bases and shared weights; it falls to half of it by a cosine over the run "
        "(default: the published 2e-5 with --load-weight, otherwise DiT's 1e-4)",
    )
    add(
        "--coeff-lr",
        type=number(float, 0),
        metavar="LR",
        help=f"peak learning rate of the mixing logits (default: {RECIPES['default']['coeff_lr']:g})",
    )
    add(
        "--coeff-lr-end",
        type=number(float, 0),
        metavar="LR",
        help="final learning rate of the mixing logits, to which theirs falls by a cosine (default: half of --lr, as "
        "published, but not above --coeff-lr)",
    )
    add(
        "--prior-strength",
        type=number(float, 0),
        metavar="WEIGHT",
        help="weight of the prior's cross-entropy at step 0; it falls linearly to 0 "
        f"(default: {RECIPES['default']['prior_strength']:g})",
    )
    add(
        "--prior-bonus",
        type=number(float, 0),
        metavar="BONUS",
        help="number added to the initial logit of each expert's basis in the prior, which is floor(i K / N); a "
        f"resumed run keeps its own (default: {RECIPES['default']['prior_bonus']:g})",
    )
    add("--ema-decay", type=number(float, 0, 1), default=0.9999, metavar="DECAY", help="EMA decay per step")
    add(
        "--ema-snapshots",
        type=positive_int,
        metavar="STEPS",
        help="track two more averages for post-hoc EMA (arXiv 2312.02696), and store them in the run's folder ema/ at "
        "this interval; from them, convert.py --ema-std makes an EMA of any width (default: none)",
    )
    add("--ema-snapshot-dtype", choices=SNAPSHOT_DTYPES, default="float16", help="type of the numbers in the snapshots")
    add("--clip-grad", type=number(float, 0), default=0.0, metavar="NORM", help="largest gradient norm; 0 for no limit")
    add(
        "--precision",
        choices=PRECISIONS,
        help="precision of the matrix products; fp32 is TF32 on GPUs (default: bf16 on GPUs, fp32 on CPUs)",
    )

    add = parser.add_argument_group("speed and reports").add_argument
    add("--compile", action=argparse.BooleanOptionalAction, help="compile model and loss (default: on GPUs only)")
    add(
        "--checkpoint-activations",
        action="store_true",
        help="compute the activations of each block again in the backward pass: less memory, about a third more time",
    )
    add(
        "--deterministic",
        action="store_true",
        help="on GPUs, use slower algorithms whose results do not vary from run to run, so that a resumed run can "
        "equal an uninterrupted one bit for bit; on CPUs this is always so",
    )
    add(
        "--shard-bases",
        action=argparse.BooleanOptionalAction,
        help="each process owns a part of every basis, and the processes exchange the mixtures instead of the "
        "gradients of the bases (default: with more than 8 processes, if that sends less)",
    )
    add(
        "--num-workers",
        type=number(int, 0),
        default=4,
        metavar="N",
        help="processes that read features and draw noise, per training process",
    )
    add(
        "--max-bad-steps",
        type=positive_int,
        default=10,
        metavar="STEPS",
        help="consecutive steps with a non-finite loss or gradient after which the run ends",
    )
    add("--log-every", type=positive_int, default=100, metavar="STEPS", help="steps between reports of the metrics")
    add("--log-to", type=logger_names, metavar="NAMES", help="tensorboard, wandb, or both separated by a comma")
    add("--ckpt-every", type=positive_int, default=10_000, metavar="STEPS", help="steps between checkpoints")
    add("--keep", type=positive_int, metavar="N", help="number of recent checkpoints to keep (default: all)")
    add("--keep-every", type=positive_int, metavar="STEPS", help="with --keep: also keep every multiple of STEPS")
    add(
        "--sample-every",
        type=number(int, 0),
        default=10_000,
        metavar="STEPS",
        help="steps between pictures of samples and coefficients, which take as long as a few steps; 0 for no pictures",
    )
    add(
        "--vae",
        metavar="NAME",
        help="VAE that decodes the samples: ema, mse, a name on the Hugging Face hub or a folder (default: show three "
        "latent channels as colours)",
    )
    add(
        "--trust-pickle",
        action="store_true",
        help="allow pickles in --load-weight, which can execute code: only for files that you trust",
    )
    add("--strict", action="store_true", help="no effect: --load-weight must always fit (a flag of the original)")

    about = "FID, as sample_ddp.py and evaluator.py compute it, and the loss on other images, both of the EMA weights."
    add = parser.add_argument_group("scores while training", about).add_argument
    add("--score-every", type=positive_int, metavar="STEPS", help="steps between scores; the last step is scored too")
    add("--score-against", metavar="PATH", help="reference of FID: an .npz file or a folder, as for evaluator.py")
    samples_help = f"samples for FID (default: {FID_SAMPLES})"
    add("--score-samples", type=number(int, NEIGHBOURS + 1), metavar="N", help=samples_help)
    add("--weights", metavar="PATH", help="feature network, as for evaluator.py (default: Inception, downloaded)")
    add("--held-out", metavar="FOLDER", help="features of other images, for the loss of each expert")
    return parser


if __name__ == "__main__":
    run_script(main, make_parser())
