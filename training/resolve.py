"""What the flags of train_fast.py mean together: the settings of a run, its process and the options of its model."""

import argparse
import inspect
from itertools import pairwise
from pathlib import Path

import torch

from diffusion import FlowMatching, GaussianDiffusion, Process, create_process
from diffusion.flow import FLOW_OPTIONS
from diffusion.interpolants import dimension_shift
from models import find_model
from runtime.command_line import counted
from runtime.errors import UserError
from runtime.processes import world_size
from training.batches import default_experts_per_batch
from training.initial import open_features
from training.posthoc_ema import TRACKED_STDS
from training.resume import check_interval, check_new
from training.settings import RunSettings

# The values of flags that are not given, by --recipe, after those of "default"; None: see `resolve_settings`. In the
# paper's runs, each of eight processes drew one expert per step.
RECIPES = {
    "default": dict(
        experts_per_batch=None,
        coeff_lr=RunSettings.coeff_lr,
        coeff_lr_end=None,
        prior_strength=RunSettings.prior_strength,
        prior_bonus=RunSettings.prior_bonus,
        beta2=RunSettings.beta2,
        cosine_weight=RunSettings.cosine_weight,
    ),
    "paper": dict(experts_per_batch=8, coeff_lr=1e-2, coeff_lr_end=1e-5, prior_strength=1e-4, prior_bonus=3.0),
    "lightningdit": dict(process=FlowMatching.name, time_sampling="logit-normal", cosine_weight=1.0, beta2=0.95),
    # The shift depends on the features, see `process_options`.
    "rae": dict(process=FlowMatching.name, time_max=0.999, shift="dimension"),
}


def independent_runs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the flags of each run: one, or one per independent expert, which differ in --timesteps and --prefix.

    Raises:
        UserError: if other flags do not suit --independent.
    """
    if not args.independent:
        return [args]
    if find_model(args.model).with_experts or args.timesteps:
        raise UserError("--independent trains a plain DiT per interval: use it with --model DiT-... and no --timesteps")
    if args.resume not in (None, "auto"):
        raise UserError("--independent resumes its runs with --resume auto only")
    process = create_process(**process_options(args, open_features(args).shape))
    boundaries = expert_boundaries(process, args.independent, args.boundaries)
    if len(boundaries) != args.independent + 1:
        raise UserError(
            f"--independent {args.independent} needs {args.independent + 1} --boundaries, not {len(boundaries)}"
        )
    prefix = args.prefix or default_prefix(args.model, None)
    runs = []
    for i, interval in enumerate(pairwise(boundaries)):
        # Its config.json starts this expert alone.
        left_out = ("independent", "boundaries", "epochs")
        recorded = {name: value for name, value in args.recorded.items() if name not in left_out}
        recorded |= {"timesteps": list(interval)}
        values = {"timesteps": list(interval), "boundaries": None, "prefix": f"{prefix}-{i}", "recorded": recorded}
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


def process_options(args: argparse.Namespace, shape: tuple[int, ...]) -> dict:
    """Return the keyword arguments of `create_process` that the flags give.

    Args:
        args: the flags.
        shape: shape (C, H, W) of the features.

    Raises:
        UserError: if flags contradict each other, the process or the recipe.
    """
    options = {name: value for name in FLOW_OPTIONS if (value := getattr(args, name)) is not None}
    recipe = RECIPES[args.recipe]
    if args.process != FlowMatching.name:
        if options or args.cosine_weight:
            raise UserError("--path, --prediction, --weight, --time-* and --cosine-weight need --process flow")
        if recipe.get("process", args.process) != args.process:
            raise UserError(f"--recipe {args.recipe} needs --process {recipe['process']}")
        # Some backbones have no outputs for a learned variance.
        parameters = inspect.signature(find_model(args.model).backbone.module).parameters
        learns_sigma = "learn_sigma" in parameters and parameters["learn_sigma"].default
        return {"process": args.process} | ({} if learns_sigma else {"learn_sigma": False})
    options = {name: recipe[name] for name in FLOW_OPTIONS if name in recipe} | options
    if options.get("shift") == "dimension":
        options["shift"] = dimension_shift(shape)
    if options.keys() & {"time_mean", "time_std"} and options.get("time_sampling") != "logit-normal":
        raise UserError("--time-mean and --time-std need --time-sampling logit-normal")
    try:
        return {"process": args.process, **FlowMatching(**options).config}
    except ValueError as error:
        raise UserError(str(error)) from None


def loss_weight(args: argparse.Namespace) -> dict:
    """Return the keyword arguments of `create_process` that concern the loss only, as the flags give them.

    Raises:
        UserError: if flags contradict each other or the process.
    """
    weight = {"min_snr": args.min_snr, "min_weight": args.min_weight}
    weight = {name: value for name, value in weight.items() if value is not None}
    if weight and args.process != GaussianDiffusion.name:
        raise UserError("--min-snr and --min-weight need --process gaussian")
    if "min_weight" in weight and "min_snr" not in weight:
        raise UserError("--min-weight needs --min-snr")
    if weight.get("min_weight") == 1:
        raise UserError("--min-weight 1 makes every weight 1: leave out --min-snr and --min-weight")
    return weight


def mixing_options(args: argparse.Namespace, process: Process) -> dict | None:
    """Return the keyword arguments of a RemixDiT that the flags give, or None for a plain DiT.

    Raises:
        UserError: if flags of a RemixDiT are given to a plain DiT.
    """
    backbone, _, with_experts = find_model(args.model)
    if not with_experts:
        for name in ("boundaries", "rank", "freeze", "mix_modulation"):
            if getattr(args, name):
                other = " or --independent" if name == "boundaries" else ""
                raise UserError(f"--{name.replace('_', '-')} needs a RemixDiT{other}, not {args.model}")
        return None
    return dict(
        n_basis=args.n_basis,
        n_experts=args.n_experts,
        mixer=args.mixer,
        scope=args.mixer_scope,
        layers=[*backbone.mixed_layers, *(backbone.modulation if args.mix_modulation else ())],
        boundaries=expert_boundaries(process, args.n_experts, args.boundaries),
        rank=args.rank,
    )


def total_steps(args: argparse.Namespace, n_images: int) -> int:
    """Return the number of steps that the flags ask for, of all independent experts together."""
    return args.max_steps or max(1, args.epochs * n_images // args.global_batch_size)


def left_over_steps(args: argparse.Namespace, n_images: int) -> list[str]:
    """Return a line about the steps that --independent does not train, if there are any."""
    total = total_steps(args, n_images)
    left = total % (args.independent or 1)
    if not left:
        return []
    steps = counted(total // args.independent, "step")
    return [
        f"--independent {args.independent} does not divide {total:,} steps: each expert trains for {steps}, together "
        f"{total - left:,}"
    ]


def resolve_settings(args: argparse.Namespace, n_images: int, process: Process) -> RunSettings:
    """Check that the flags fit together, and fill in the defaults that depend on other flags or on the data.

    Args:
        args: the flags.
        n_images: number of images of the dataset.
        process: the process.

    Raises:
        UserError: if flags contradict each other, or a number does not divide the batch size as it must.
    """
    given = {name: value for name, value in vars(args).items() if name in RECIPES["default"] and value is not None}
    recipe = RECIPES["default"] | RECIPES[args.recipe] | given
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
    remix = find_model(args.model).with_experts
    timesteps = args.timesteps or process.scale.range
    if remix and timesteps != process.scale.range:
        raise UserError("--timesteps: a RemixDiT trains on all timesteps")
    check_noise_levels("--timesteps", timesteps, process)
    experts_per_batch = 1
    if remix:
        experts_per_batch = recipe["experts_per_batch"] or default_experts_per_batch(batch_size, args.n_experts)
    if batch_size % experts_per_batch:
        raise UserError(f"--experts-per-batch {experts_per_batch} does not divide --global-batch-size {batch_size}")
    max_steps = total_steps(args, n_images) // (args.independent or 1)
    if not max_steps:
        raise UserError(f"--independent {args.independent}: there are fewer steps than experts")
    lr = args.lr or (2e-5 if args.load_weight else RunSettings.lr)
    coeff_lr, coeff_lr_end = recipe["coeff_lr"], recipe["coeff_lr_end"]
    if args.lr_schedule == "constant" and args.coeff_lr_end is not None:
        raise UserError("--coeff-lr-end has no meaning for --lr-schedule constant")
    if recipe["beta2"] == 1:
        raise UserError("--beta2 1: it must be below 1")
    if recipe["cosine_weight"] and process.prediction != "velocity":
        raise UserError(f"--cosine-weight needs --prediction velocity, not {process.prediction}")
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
        freeze=bool(args.freeze),
        min_snr=args.min_snr,
        min_weight=args.min_weight,
        lr_schedule=args.lr_schedule,
        warmup=args.warmup,
        beta2=recipe["beta2"],
        weight_decay=args.weight_decay,
        cosine_weight=recipe["cosine_weight"],
    )


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


def default_prefix(name: str, mixing: dict | None) -> str:
    """Return the name of the run's folder if --prefix does not give it."""
    if not mixing:
        return name.replace("/", "-")
    rank = f"-r{mixing['rank']}" if mixing["rank"] else ""
    return f"{name.replace('/', '-')}-{mixing['n_basis']}-{mixing['n_experts']}{rank}"
