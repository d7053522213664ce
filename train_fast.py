"""Train a DiT or a RemixDiT on encoded features.

    torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model RemixDiT-S/2 --load-weight pretrained/DiT_S_2_2M.pt \\
        --data-path data/imagenet_encoded --epochs 20 --prefix RemixDiT-S-4-20-100K --n-basis 4 --n-experts 20

Everything goes to outputs/<prefix>/: checkpoints/<step>.pt, log.txt, metrics.jsonl, config.json. Which images, timesteps,
experts and noise a step uses depends on the seed, the step and the place in the global batch alone: not on the number
of processes, nor on when the run was resumed.
"""

import argparse
import json
import math
import resource
import sys
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from autoencoder import Pixels, load_autoencoder
from checkpoint import (
    CheckpointWriter,
    checkpoints,
    find_corruption,
    load_model,
    model_config,
    read_checkpoint,
)
from common import (
    ArgumentParser,
    UserError,
    atomic_write,
    check_disk,
    folder_name,
    number,
    positive_int,
    remove_leftovers,
    run_script,
    seed_int,
    write_json,
)
from diffusion import create_diffusion
from distributed import PRECISIONS, StopSignal, World, rank0_logger, restore_signals, setup, world_size
from features import FeatureDataset
from interop.shapes import PUBLISHED_VAE
from models import DiT, DiT_models
from remix import MIXED_LAYERS, MIXERS, MODULATION, SCOPES, RemixDiT, RemixDiT_models
from training.batches import microbatches, prefetched, sample_timesteps
from training.loggers import MetricLogger, logger_names
from training.plan import PEAK, USED, AssumedFeatures, activation_bytes, matmul_rate, static_memory, training_flops
from training.previews import SamplePreview
from training.statistics import TrainingStats
from training.trainer import Trainer

RUN_OPTIONS = [
    "max_steps",
    "global_batch_size",
    "experts_per_batch",
    "timesteps",
    "lr",
    "coeff_lr",
    "ema_decay",
    "clip_grad",
    "prior_strength",
    "prior_bonus",
    "precision",
    "global_seed",
    "load_weight",
]  # what a run is, beside its model and data
STOP_CHECK = 4  # steps between the processes' agreements on whether to stop


def main(args: argparse.Namespace):
    if args.dry_run:
        return dry_run(args)

    # Check the whole plan before any device or process group is touched.
    dataset = FeatureDataset(args.data_path)
    resolve_defaults(args, dataset)
    torch.manual_seed(args.global_seed)
    model = make_model(args, dataset)
    config = run_config(args, dataset, model)
    run = Path(args.results_dir) / args.prefix
    state, damaged = find_resume(args, run, config)
    first_step = state["step"] if state else 0
    autoencoder, showing = choose_decoder(args, dataset)
    space = disk_plan(args, run, model, first_step)

    # Initialize.
    world = setup()
    stop = StopSignal()
    if not world.same(first_step):
        raise UserError(
            "the processes found different checkpoints: all nodes need the same --results-dir, on a shared file system"
        )
    if world.is_main:
        for path in damaged:
            path.rename(path.with_suffix(".pt.damaged"))
        remove_leftovers(run, run / "checkpoints", run / "samples", run / "coefficients")
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", config)
        keep_metrics(run / "metrics.jsonl", first_step)
    logger = rank0_logger(world, run / "log.txt")
    introduce(
        args,
        logger,
        world,
        dataset,
        model,
        first_step,
        [*(f"SKIPPED {path}: {reason}" for path, reason in damaged.items()), space, showing],
    )

    # Setup training state.
    diffusion = create_diffusion(**config["diffusion"])
    names = ("lr", "coeff_lr", "ema_decay", "clip_grad", "precision", "compile")
    trainer = Trainer(model, diffusion, world, **{name: getattr(args, name) for name in names})
    if state:
        trainer.load_state_dict(state, args.resume)
        logger.info(f"resumed from {args.resume}")
    del state
    window = trainer.window
    flops = training_flops(config["model"]["backbone"])
    peak = matmul_rate(world.device, args.precision) * world.size
    rows = slice(*(rank * args.global_batch_size // world.size for rank in (world.rank, world.rank + 1)))
    writer = CheckpointWriter(run / "checkpoints", logger, args.keep, args.keep_every)
    board = MetricLogger(args.log_to if world.is_main else None, run, config, first_step, logger)
    gallery = (
        SamplePreview(run, config, autoencoder, world, board, logger) if world.is_main and args.sample_every else None
    )

    def save(done: int):
        state = {"config": config, "step": done, "window": window.state()}
        if world.is_main:
            writer.save(done, state | trainer.state_dict())

    # Train.
    clock, clock_step = time.perf_counter(), first_step
    with closing(board), prefetched(args, dataset, range(first_step, args.max_steps), rows, world) as batches:
        for step in range(first_step, args.max_steps):
            progress = step / args.max_steps
            prior_weight = args.prior_strength * (1 - progress)
            trainer.set_progress(progress)
            trainer.step(step, microbatches(args, step, next(batches), model, rows, world), prior_weight)

            # Report status, save, and stop if there is reason to.
            done = step + 1
            last = done == args.max_steps
            if done % args.log_every == 0 or last:
                losses = window.read()  # the device has done all steps, and the clock may be read
                speed = (done - clock_step) * args.global_batch_size / (time.perf_counter() - clock)
                report(args, run, logger, board, trainer, losses, prior_weight, done, speed, speed * flops / peak)
                clock, clock_step = time.perf_counter(), done
            if done % args.ckpt_every == 0 or last:
                save(done)
                clock, clock_step = time.perf_counter(), done  # this is not a step's time
            if args.sample_every and done % args.sample_every == 0:
                if gallery:
                    gallery.draw(done, trainer.ema)  # the other processes wait in the next step
                clock, clock_step = time.perf_counter(), done
            if world.size > 1 and done % STOP_CHECK and not last:
                continue
            hopeless = window.longest_streak() >= args.max_bad_steps
            if world.any(hopeless):
                writer.wait()
                explain_bad_steps(args, logger, model, window)
                raise SystemExit(1)
            if world.any(stop.requested is not None) and not last:
                if done % args.ckpt_every:
                    save(done)
                writer.wait()
                restore_signals()
                who = stop.requested or "another process"
                logger.info(f"stopped by {who} after step {done:,}; go on with --resume auto")
                return
    writer.wait()
    restore_signals()
    logger.info("done")


def dry_run(args: argparse.Namespace):
    """Print what the run would be and what it would take. Touches no device, reads no weights and needs no features."""
    assumed = not Path(args.data_path).exists()
    dataset = AssumedFeatures(args.image_size or 256) if assumed else FeatureDataset(args.data_path)
    args.precision = args.precision or "bf16"
    resolve_defaults(args, dataset)
    start, args.load_weight = args.load_weight or "scratch", None  # the weights' shapes are the model's
    with torch.device("meta"):
        model = make_model(args, dataset)
    images, groups, experts = args.global_batch_size // world_size() // args.grad_accum, None, ""
    if isinstance(model, RemixDiT):
        groups = images // math.gcd(images, args.global_batch_size // args.experts_per_batch)
        experts = f", {args.experts_per_batch} experts a batch"
    where = f"ImageNet, assumed: there is no {args.data_path}" if assumed else f"from {args.data_path}"
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M parameters, from {start}")
    print(f"{len(dataset):,} images of {args.num_classes:,} classes as {' x '.join(map(str, dataset.shape))} ({where})")
    print(
        f"{args.max_steps:,} steps of batch {args.global_batch_size} on {world_size()} GPUs, {args.precision}{experts}"
    )
    flops = training_flops(model_config(args.model, model)["backbone"]) * images
    activations = activation_bytes(model, create_diffusion(), images, groups, PRECISIONS[args.precision])
    memory = static_memory(model) | {f"activations of {images} images (estimate, not compiled)": activations}
    parts = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in memory.items())
    print(f"memory a GPU: {sum(memory.values()) / 2**30:.1f} GiB: {parts}")
    try:
        print(disk_plan(args, Path(args.results_dir) / args.prefix, model, 0))
    except UserError as error:
        print(f"on this machine: {error}")
    print(
        f"time: {args.max_steps * args.grad_accum * flops / (USED * PEAK) / 3600:,.2f} hours "
        f"(estimate: {args.grad_accum * flops / 1e12:.2f} TFLOP a step and GPU, at {USED:.0%} of {PEAK / 1e12:.0f} TFLOP/s, A100)"
    )


def introduce(
    args, logger, world: World, dataset: FeatureDataset, model: DiT | RemixDiT, first_step: int, remarks: list[str]
):
    """Say at the start what is about to happen."""
    size = sum(p.numel() for p in model.parameters())
    logger.info(f"{args.model}: {size / 1e6:,.2f} M parameters")
    logger.info(f"{len(dataset):,} images of {args.num_classes} classes from {args.data_path}")
    how = f"{args.precision}{', compiled' if args.compile else ''}"
    if isinstance(model, RemixDiT):
        how += f", {args.experts_per_batch} experts a batch"
        if args.experts_per_batch < min(4, args.n_experts):
            remarks.append("few experts a batch: more of them learn better (--experts-per-batch)")
    where = f"{world.size} x {world.device.type}"
    logger.info(f"steps {first_step:,} to {args.max_steps:,} of batch {args.global_batch_size} on {where}, {how}")
    for remark in remarks:
        logger.info(remark)


def disk_plan(args: argparse.Namespace, run: Path, model: DiT | RemixDiT, first_step: int) -> str:
    """A line on the space that the run's checkpoints will take. Raises UserError where they do not fit."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = 4 * (
        2 * sum(p.numel() for p in model.parameters()) + 2 * trained
    )  # the weights, their average, AdamW's moments
    count = -(-args.max_steps // args.ckpt_every) - first_step // args.ckpt_every
    if args.keep:
        for_good = (lambda step: step % args.keep_every == 0) if args.keep_every else (lambda step: False)
        goes = sum(not for_good(int(path.stem)) for path in checkpoints(run / "checkpoints"))
        stays = sum(for_good(step) for step in range(first_step + 1, args.max_steps + 1))
        count = min(count, stays + args.keep + 1 - goes)  # the next one is written before the oldest is deleted
    return check_disk(run, max(1, count) * size, f"{max(1, count)} more checkpoints of {size / 2**20:,.1f} MiB")


def resolve_defaults(args: argparse.Namespace, dataset: FeatureDataset):
    """Fill in what depends on the data and on other flags, and refuse what does not fit together."""
    remix = args.model in RemixDiT_models
    args.prefix = args.prefix or args.model.replace("/", "-") + (f"-{args.n_basis}-{args.n_experts}" if remix else "")
    if args.image_size and dataset.image_size and args.image_size != dataset.image_size:
        raise UserError(
            f"--image-size {args.image_size}, but {args.data_path} holds features of {dataset.image_size}-pixel images"
        )
    args.num_classes = args.num_classes or (len(dataset.classes) if dataset.classes else 1000)
    if dataset.labels.min() < 0 or dataset.labels.max() >= args.num_classes:
        raise UserError(
            f"{args.data_path} has labels up to {dataset.labels.max()}, beyond --num-classes {args.num_classes}"
        )
    args.lr = args.lr or (2e-5 if args.load_weight else 1e-4)
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    args.compile = torch.cuda.is_available() if args.compile is None else args.compile
    batch = args.global_batch_size
    if batch % (world_size() * args.grad_accum):
        raise UserError(
            f"--global-batch-size {batch} cannot be dealt evenly to {world_size()} processes"
            + (f" in {args.grad_accum} accumulated parts" if args.grad_accum > 1 else "")
        )
    if args.keep_every and (not args.keep or args.keep_every % args.ckpt_every):
        raise UserError("--keep-every goes with --keep, and is a multiple of --ckpt-every")
    low, high = args.timesteps
    if low >= high or (remix and (low, high) != (0, 1000)):
        raise UserError(
            f"--timesteps {low} {high}: "
            + ("LO must be below HI" if low >= high else "a RemixDiT trains on all of them")
        )
    if not remix:
        args.experts_per_batch = 1
    elif args.experts_per_batch is None:  # never by the number of processes: it must not change a run's character
        args.experts_per_batch = max(e for e in range(1, min(16, args.n_experts) + 1) if batch % e == 0)
    elif batch % args.experts_per_batch:
        raise UserError(
            f"--experts-per-batch {args.experts_per_batch} does not divide --global-batch-size {batch} into equal groups"
        )
    args.max_steps = args.max_steps or max(1, args.epochs * len(dataset) // batch)


def make_model(args: argparse.Namespace, dataset: FeatureDataset) -> DiT | RemixDiT:
    """The model at step 0: drawn from the seed, or started from --load-weight."""
    channels, height, width = dataset.shape
    shape = dict(input_size=height, in_channels=channels, num_classes=args.num_classes)
    options = dict(n_basis=args.n_basis, n_experts=args.n_experts, mixer=args.mixer, scope=args.mixer_scope)
    options["mixed_layers"] = [*MIXED_LAYERS, MODULATION] if args.mix_modulation else [*MIXED_LAYERS]
    remix = args.model in RemixDiT_models
    try:
        if height != width:
            raise ValueError(f"features of {height} x {width} are not square")
        if not args.load_weight:
            if remix:
                return RemixDiT_models[args.model](**shape, **options, prior_bonus=args.prior_bonus)
            return DiT_models[args.model](**shape)
        weights, _ = load_model(args.load_weight, allow_pickle=args.trust_pickle, verify=True)
        found = weights.backbone_config if isinstance(weights, RemixDiT) else weights.config
        wanted = DiT_models[args.model.removeprefix("Remix")](**shape).config
        for key, value in wanted.items():
            if found[key] != value:
                raise UserError(f"--load-weight {args.load_weight} has {key}={found[key]}, this run needs {value}")
        if not isinstance(weights, RemixDiT):
            return RemixDiT(weights, **options, prior_bonus=args.prior_bonus) if remix else weights
        if not remix:
            raise UserError(f"--load-weight {args.load_weight} holds a RemixDiT, which cannot start a {args.model}")
        for key, value in options.items():
            if weights.config[key] != value:
                raise UserError(
                    f"--load-weight {args.load_weight} has {key}={weights.config[key]}, this run asks for {value}"
                )
        return weights
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{args.model} on {args.data_path}: {error}") from None


def run_config(args: argparse.Namespace, dataset: FeatureDataset, model: DiT | RemixDiT) -> dict:
    """The configuration that, with the data, determines the run; it goes into every checkpoint."""
    vae = {"vae": dataset.vae, "scale": dataset.scale} if dataset.vae else PUBLISHED_VAE
    size = dataset.image_size or args.image_size or 256
    data = dict(images=len(dataset), image_size=size, classes=dataset.classes, **vae)
    if dataset.store != "draw":  # unsaid, as in the checkpoints from before there was a choice
        data["store"] = dataset.store
    return {
        "model": model_config(args.model, model),
        "diffusion": {},
        "data": data,
        "training": {name: getattr(args, name) for name in RUN_OPTIONS},
    }


def find_resume(args: argparse.Namespace, run: Path, config: dict) -> tuple[dict | None, dict[Path, str]]:
    """The training state to go on from, if any, and the checkpoints that were passed over, with what is wrong with them.

    Refuses to write over a run, or to go on with another configuration.
    """
    present, damaged = checkpoints(run / "checkpoints"), {}
    if args.resume == "auto":
        for path in present:
            if (reason := find_corruption(path)) is None:
                break
            damaged[path] = reason
        if present and len(damaged) == len(present):
            reason = damaged[present[0]]
            raise UserError(
                f"none of the checkpoints in {run / 'checkpoints'} is whole: remove them to start anew ({reason})"
            )
        args.resume = present[len(damaged)] if present else None
    if args.resume is None:
        if present:
            raise UserError(
                f"{run} already holds a run, up to {present[0].name}: --resume auto goes on, another --prefix starts anew"
            )
        return None, {}
    if present and present[0].parent.resolve() != Path(args.resume).resolve().parent:
        raise UserError(f"{run} already holds another run than --resume {args.resume}: choose another --prefix")
    state = read_checkpoint(args.resume, mmap=False, verify=True)
    if not {"config", "step", "model", "ema", "optimizer", "scaler", "window"} <= state.keys():
        raise UserError(f"--resume {args.resume} holds weights but no training state: use it as --load-weight")
    before, now = flatten(state["config"]), flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key != "training.load_weight":
            raise UserError(
                f"--resume {args.resume} was trained with {key}={before.get(key)}, this run asks for {now.get(key)}"
            )
    return state, damaged


def choose_decoder(args: argparse.Namespace, dataset: FeatureDataset) -> tuple[Pixels | None, str]:
    """What turns samples into images (None: nothing does, they are shown as they are), and a line that says what will be drawn."""
    if not args.sample_every:
        return None, "no pictures (--sample-every 0)"
    when = f"pictures every {args.sample_every:,} steps"
    if list(args.timesteps) != [0, 1000]:
        return None, f"{when}, without samples: an expert for some of the timesteps cannot sample alone"
    name = args.vae or ("none" if dataset.vae == "none" else None)
    if name is None:
        return None, f"{when}; of samples three latent channels, as colours (--vae decodes them)"
    autoencoder = load_autoencoder(name)
    if dataset.shape[0] not in autoencoder.channels:
        raise UserError(f"--vae {name} does not decode features of {dataset.shape[0]} channels, as in {args.data_path}")
    autoencoder.scale = dataset.scale or PUBLISHED_VAE["scale"]
    return autoencoder, when


def flatten(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def keep_metrics(path: Path, last_step: int):
    """Drop the lines of steps that a resumed run will do again, and what a full disk or a kill cut short."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept))


def report(
    args,
    run: Path,
    logger,
    board: MetricLogger,
    trainer: Trainer,
    losses: tuple[dict, list[float]],
    prior_weight: float,
    done: int,
    images_per_s: float,
    mfu: float,
):
    """One line for people in log.txt and one for programs in metrics.jsonl, and the loggers: means since the last one."""
    model, world, groups = trainer.model, trainer.world, trainer.optimizer.param_groups
    means, (bad, *_) = losses
    if not world.is_main:
        return
    if world.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    metrics = {"step": done, **means, "bad_steps": int(bad)}
    if isinstance(model, RemixDiT):
        alpha = model.coefficients().detach()
        entropy = -(alpha * alpha.clamp(min=1e-12).log()).sum(-1).view(-1, model.n_experts).mean(0)
        basis_distances, expert_spread = model.distances()
        metrics |= {
            "prior_weight": prior_weight,
            "coeff_lr": groups[-1]["lr"],
            "coefficients": rounded(alpha),
            "entropy": rounded(entropy),  # nats, an expert: 0 is one-hot
            "basis_distances": rounded(basis_distances),  # all 0: the bases have collapsed into one
            "expert_spread": expert_spread.item(),  # 0: the experts have
        }
    else:
        del metrics["prior"]
    metrics |= {
        "lr": groups[0]["lr"],
        "images_per_s": images_per_s,
        "mfu": mfu,  # model FLOPs utilisation: a plain DiT's FLOPs over what a large matrix product reaches here
        "memory_gib": memory,
    }
    try:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as error:
        logger.error(f"COULD NOT WRITE {run / 'metrics.jsonl'}: {error.strerror}; training goes on")
    numbers = metrics | {"entropy": entropy.mean().item()} if isinstance(model, RemixDiT) else metrics
    board.numbers(done, {name: value for name, value in numbers.items() if isinstance(value, int | float)})
    left = timedelta(seconds=round((args.max_steps - done) * args.global_batch_size / images_per_s))
    shown = "  ".join(
        f"{name} {value:.4f}" for name, value in means.items() if name in ("loss", "mse") and value is not None
    )
    logger.info(
        f"step {done:07d}/{args.max_steps:07d}  {shown or 'no finite loss'}  "
        + (f"entropy {entropy.mean():.3f}  spread {expert_spread:.4f}  " if isinstance(model, RemixDiT) else "")
        + (f"{bad:.0f} bad steps  " if bad else "")
        + f"lr {metrics['lr']:.2e}  {images_per_s:,.0f} images/s  MFU {mfu:.2f}  {memory:.1f} GiB  {left} left"
    )


def explain_bad_steps(args: argparse.Namespace, logger, model: DiT | RemixDiT, window: TrainingStats):
    """Say what is known of the bad steps that end the run."""
    _, (_, _, longest, step, loss, norm) = window.read()
    remix, timesteps = isinstance(model, RemixDiT), args.timesteps
    dealt = args.n_experts if remix else 1
    t = sample_timesteps(args.global_seed, int(step), args.global_batch_size, dealt, args.experts_per_batch, timesteps)
    experts = f"experts {sorted(set(model.expert_of(torch.from_numpy(t)).tolist()))}, " if remix else ""
    if window.world.is_main:
        logger.error(
            f"{longest:.0f} steps in a row with numbers that are not finite; the last, step {step:.0f}: {experts}"
            f"timesteps {t.min()} to {t.max()}, loss {loss}, gradient norm {norm}. Stopped, the weights as they were before; "
            f"to resume repeats it, unless something is changed"
        )


def rounded(values: torch.Tensor) -> list:
    """A tensor as nested lists of numbers of five digits, for metrics.jsonl."""
    return np.round(values.tolist(), 5).tolist()


if __name__ == "__main__":
    parser = ArgumentParser(description="Train a DiT or a RemixDiT on features from extract_features.py.")
    group = parser.add_argument_group("the run")
    group.add_argument("--data-path", required=True, help="features, packed or in the original layout")
    group.add_argument("--prefix", type=folder_name, help="name of the run's folder (default: from the model)")
    group.add_argument("--results-dir", default="outputs", help="where the runs' folders are")
    group.add_argument(
        "--resume", metavar="PATH|auto", help="go on from a checkpoint, or from the run's newest if it has one (auto)"
    )
    group.add_argument("--global-seed", type=seed_int, default=0, help="seed of everything that is drawn")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print sizes, memory and time, and end; needs no GPU and no data (WORLD_SIZE=8 in front: for 8 GPUs)",
    )
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        choices=[*DiT_models, *RemixDiT_models],
        default="RemixDiT-S/2",
        metavar="NAME",
        help="DiT or RemixDiT, -T -S -B -L -XL, /2 /4 /8",
    )
    group.add_argument(
        "--load-weight",
        metavar="PATH",
        help="start from these weights: a DiT's for either model, also in diffusers' layout (a folder or a hub name such as "
        "facebook/DiT-XL-2-256), or a RemixDiT's",
    )
    group.add_argument("--n-basis", type=positive_int, default=4, help="basis models K")
    group.add_argument(
        "--n-experts", type=number(int, 1, 1000), default=20, help="experts N, one an interval of timesteps"
    )
    group.add_argument("--mixer", choices=MIXERS, default="softmax", help="what turns pi into coefficients")
    group.add_argument("--mixer-scope", choices=SCOPES, default="global", help="one pi for all blocks, or one a block")
    group.add_argument(
        "--mix-modulation", action="store_true", help="mix the blocks' adaLN linears too, not the four others alone"
    )
    group.add_argument(
        "--timesteps",
        type=number(int, 0, 1000),
        nargs=2,
        metavar=("LO", "HI"),
        default=[0, 1000],
        help="train a plain DiT on the timesteps LO to HI - 1 alone: one of several independent experts",
    )
    group.add_argument("--image-size", type=positive_int, help="pixels; checked against the features (default: theirs)")
    group.add_argument("--num-classes", type=positive_int, help="(default: the features', or 1000)")
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs",
        type=positive_int,
        default=20,
        help="passes over the images (20 on ImageNet: the published 100k steps)",
    )
    group.add_argument("--max-steps", type=positive_int, help="steps, instead of --epochs")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images a step, over all processes")
    group.add_argument(
        "--grad-accum", type=positive_int, default=1, help="parts that each process's share of a batch is run in"
    )
    group.add_argument(
        "--experts-per-batch",
        type=positive_int,
        metavar="E",
        help="experts a global batch, one an equal part of it (default: 16 or what N and the batch allow; 1 is the paper's rule, "
        "which gives each step one noise level and pi a sparse gradient)",
    )
    group.add_argument(
        "--lr",
        type=number(float, 0, above=True),
        help="peak learning rate (default: the published 2e-5 with --load-weight, else DiT's 1e-4)",
    )
    group.add_argument("--coeff-lr", type=number(float, 0), default=1e-2, help="peak learning rate of pi")
    group.add_argument(
        "--prior-strength",
        type=number(float, 0),
        default=1e-4,
        help="weight of the prior's cross-entropy; falls linearly to 0",
    )
    group.add_argument(
        "--prior-bonus",
        type=number(float, 0),
        default=3.0,
        help="lead of the prior's basis in pi at step 0, in standard deviations",
    )
    group.add_argument("--ema-decay", type=number(float, 0, 1), default=0.9999, help="of the averaged weights, a step")
    group.add_argument(
        "--clip-grad", type=number(float, 0), default=0.0, help="largest gradient norm; 0 for no clipping, as published"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, help="of the matrix products (default: bf16 on GPUs, fp32 on CPUs)"
    )
    group = parser.add_argument_group("speed and reports")
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: on GPUs)"
    )
    group.add_argument(
        "--num-workers", type=number(int, 0), default=4, help="processes that read features, for each process"
    )
    group.add_argument(
        "--max-bad-steps", type=positive_int, default=10, help="not finite in a row, at which the run ends"
    )
    group.add_argument("--keep", type=positive_int, metavar="N", help="recent checkpoints to keep (default: all)")
    group.add_argument(
        "--keep-every", type=positive_int, metavar="STEPS", help="keep every checkpoint of a multiple of these too"
    )
    group.add_argument(
        "--trust-pickle", action="store_true", help="let --load-weight run code: for files of your own alone"
    )
    group.add_argument("--log-every", type=positive_int, default=100, help="steps")
    group.add_argument("--ckpt-every", type=positive_int, default=10_000, help="steps")
    group.add_argument(
        "--sample-every",
        type=number(int, 0),
        default=10_000,
        help="steps between pictures of samples and coefficients in the run's folder; 0 for none (one costs a few steps' time)",
    )
    group.add_argument(
        "--vae",
        help="decodes the samples: ema, mse, a hub name or a local folder (default: latents are shown as colours)",
    )
    group.add_argument("--log-to", type=logger_names, metavar="NAMES", help="tensorboard, wandb, or both with a comma")
    run_script(main, parser)
