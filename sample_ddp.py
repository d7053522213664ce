"""Sample images from a checkpoint, for viewing and for computing FID.

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/RemixDiT-S-4-20-100K/checkpoints/0100000.pt

The checkpoint records the model, its classes, the image size, the diffusion process and the VAE. The label
and the noise of sample i depend only on the seed, i and the type of device, so the batch size and the number of
processes change the images by rounding only.

The results of a checkpoint and its settings go to a folder of their own, which holds:

- samples.npz: arr_0 are the images, uint8 [n, H, W, 3], and arr_1 the labels, int64 [n].
- grid.png: the first samples, sorted by label.
- settings.json: the checkpoint and the settings.

If sampling is interrupted, the same command samples what is missing.
"""

import argparse
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from diffusion import PROCESSES, create_process
from diffusion.flow import LAST_STEPS
from diffusion.interpolants import DIFFUSION_FORMS
from diffusion.intervals import TIMESTEPS
from features.autoencoder import weights_fingerprint
from features.images import write_images
from features.statistics import LATENT_STATS_FLAG, load_statistics
from figures import save_grid
from interop.own import find_checkpoint, fingerprint
from interop.shapes import (
    NUM_HEADS_FLAG,
    TIMESTEP_FREQUENCIES_FLAG,
    TRUST_PICKLE_FLAG,
    flow_target,
    given_overrides,
)
from models import BACKBONES, data_shape, model_names
from runtime.command_line import ArgumentParser, counted, folder_name, number, positive_int, run_script, seed_int
from runtime.errors import UserError, is_first_process, warn
from runtime.files import (
    SETTINGS,
    atomic_write,
    check_disk,
    check_settings,
    lock_folder,
    name_write_errors,
    remove_leftovers,
    write_array,
    write_json,
)
from runtime.processes import PRECISIONS, World, rank0_logger, setup
from sampling.guidance import parse_pieces
from sampling.loading import check_data, choose_process, load_denoiser
from sampling.pipeline import (
    SAMPLE_BATCH,
    Pipeline,
    SampleSettings,
    label_of,
    make_pipeline,
    published_settings,
    sample,
    trained_classes,
)

GRID_IMAGES = 100
# The guidance scale of the published DiT.
CFG_SCALE = 1.5
# What a guide has in common with the model: the shape of the samples.
SHAPE = ("in_channels", "input_size")
# dopri5 chooses its steps. This is an estimate of its network evaluations.
ADAPTIVE_EVALUATIONS = 100


def main(args: argparse.Namespace):
    # Check everything that can be checked before any device or process group is used.
    args.ckpt = [find_checkpoint(path) for path in args.ckpt]
    args.guide_ckpt = args.guide_ckpt and find_checkpoint(args.guide_ckpt)
    overrides = ({"model": args.model} if args.model else {}) | given_overrides(args)
    model, config = load_denoiser(args.ckpt, args.ema, args.trust_pickle, **overrides)
    choose_process(args.ckpt[0], config, args.process)
    check_data_flags(args.image_size, args.num_classes, config, args.ckpt[0])
    check_original_flags(args.n_basis, args.n_experts, args.tf32, config, args.ckpt[0])
    args.labels = class_numbers(args.labels, config, args.ckpt[0])
    settings = sample_settings(args, config)
    if args.latent_stats:
        config["data"] |= latent_statistics(args, config)
    vae = args.vae or config["data"]["vae"]
    if vae is None:
        raise UserError(f"{args.ckpt[0]} does not record the VAE of its latents: set --vae")
    guide = load_guide(args, config) if args.guide_ckpt else None
    pipeline = make_pipeline(model, guide, config, settings, vae, args.ckpt[0])
    folder = Path(args.sample_dir) / (args.name or default_name(args, settings))
    record = record_settings(args, config, vae, settings, pipeline)
    if finished(folder, record):
        return
    lock_folder(folder, "--name")
    remove_leftovers(folder, folder / "parts")
    total, size = settings.num_fid_samples, settings.per_proc_batch_size
    batches = [range(i, min(i + size, total)) for i in range(0, total, size)]
    missing = [numbers for numbers in batches if not part_path(folder, numbers).exists()]
    disk = check_space(folder, pipeline, settings, sum(map(len, missing))) if is_first_process() else None
    compiled = args.compile
    if compiled is None:
        evaluations = pipeline.evaluations or ADAPTIVE_EVALUATIONS
        compiled = torch.cuda.is_available() and len(missing) * evaluations >= 1000

    # Set up the processes, the device and the folder.
    world = setup()
    logger = rank0_logger(world)
    pipeline.autoencoder.to(world.device)
    for network in filter(None, (pipeline.model, pipeline.guide)):
        network.to(world.device).requires_grad_(False)
    world.check_same_files(len(missing), "--sample-dir")
    identity = json.dumps([record[key] for key in ("ckpt_fingerprint", "guide_fingerprint", "vae_fingerprint")])
    [differ] = world.any(world.from_main(identity) != identity)
    if differ:
        raise UserError(
            "the processes have read different files: a run has written a checkpoint in between; name the checkpoint "
            "instead of the run's folder"
        )
    if world.is_main:
        write_json(folder / SETTINGS, record)
    world.barrier()
    logger.info(f"{counted(total, 'sample')} by {describe_sampler(settings, pipeline.evaluations)} -> {folder}")
    logger.info(disk)

    # Sample this process's share of the missing batches. Each batch is written to a file of its own.
    sample_batches(pipeline, settings, missing, folder, world, compiled)
    world.barrier()

    # Pack all batches into one file.
    if world.is_main:
        write_results(pipeline, settings, batches, folder)
        logger.info(f"wrote {folder / 'samples.npz'} and {folder / 'grid.png'}")


def sample_settings(args: argparse.Namespace, config: dict) -> SampleSettings:
    """Return the settings that the flags give, with the defaults of the sampler and of the published models.

    Args:
        args: the flags.
        config: config of the checkpoint.

    Raises:
        UserError: if the sampler is not one of the process, if a flag has no meaning for the sampler, or if two flags
            contradict each other.
    """
    process, published = create_process(**config["diffusion"]), published_settings(config)
    values = {field.name: getattr(args, field.name) for field in fields(SampleSettings)}
    sampler = args.sampler or next(iter(process.samplers))
    if sampler not in process.samplers:
        kind, names = f"a model of the process {process.name}", ", ".join(process.samplers)
        raise UserError(f"--sampler {sampler}: {args.ckpt[0]} is {kind}: use one of {names}")
    defaults = process.sampler_settings(sampler)
    defaults |= {name: published[name] for name in defaults.keys() & published.keys()}
    for name in ("num_sampling_steps", "diffusion_form", "last_step", "last_step_size", "time_shift", "last_level"):
        if values[name] is None:
            values[name] = defaults.get(name)
        elif name not in defaults:
            raise UserError(f"--{name.replace('_', '-')} has no meaning for --sampler {sampler}")
    if published and "time_shift" in defaults and values["time_shift"] is None:
        values["time_shift"] = config["diffusion"].get("shift", 1.0)
    if args.last_step == "none" and args.last_step_size is not None:
        raise UserError("--last-step-size has no meaning for --last-step none")
    if args.cfg_all_channels and args.guided_channels:
        raise UserError("--cfg-all-channels and --guided-channels contradict each other: give one of them")
    if args.cfg_scale is None:
        values["cfg_scale"] = published.get("cfg_scale", CFG_SCALE)
    if args.guidance_interval is None and not isinstance(values["cfg_scale"], str) and values["cfg_scale"] != 1:
        values["guidance_interval"] = published.get("guidance_interval")
    if args.guided_channels is None and not args.cfg_all_channels and "guided_channels" in published:
        channels, guided = config["model"]["backbone"]["in_channels"], published["guided_channels"]
        values["guided_channels"] = channels if guided == "all" else min(guided, channels)
    return SampleSettings(**values | {"sampler": sampler})


def latent_statistics(args: argparse.Namespace, config: dict) -> dict:
    """Return entries for the config's part "data": the VAE and the normalization that --latent-stats gives.

    Raises:
        UserError: if the checkpoint records its normalization, if no VAE is given, or if the statistics do not fit.
    """
    if config["training"]:
        raise UserError(f"--latent-stats: {args.ckpt[0]} records the normalization of its latents")
    if args.vae in (None, "none"):
        raise UserError("--latent-stats needs the --vae that decodes the latents")
    shape = data_shape(config["model"]["backbone"])
    return {"vae": args.vae, **load_statistics(args.latent_stats, shape).record()}


def load_guide(args: argparse.Namespace, config: dict) -> nn.Module:
    """Load the guide, and check that it denoises the same data, classes and process as the model of this config.

    Raises:
        UserError: if they do not.
    """
    guide, guide_config = load_denoiser([args.guide_ckpt], args.ema, args.trust_pickle)
    choose_process(args.guide_ckpt, guide_config, args.process)
    # Flows may differ in their training times.
    processes = [flow_target(part["diffusion"]) or part["diffusion"] for part in (config, guide_config)]
    for what, ours, theirs in (
        ("process", *processes),
        ("number of classes", trained_classes(config), trained_classes(guide_config)),
        *((key, config["model"]["backbone"][key], guide_config["model"]["backbone"][key]) for key in SHAPE),
    ):
        if ours != theirs:
            raise UserError(
                f"--guide-ckpt {args.guide_ckpt} has another {what} than {args.ckpt[0]}: {theirs}, not {ours}"
            )
    check_data("--guide-ckpt", args.guide_ckpt, guide_config, args.ckpt[0], config)
    return guide


def check_data_flags(image_size: int | None, num_classes: int | None, config: dict, ckpt: str):
    """Raise UserError if --image-size or --num-classes is given and differs from the checkpoint."""
    for flag, given, trained in (
        ("image-size", image_size, config["data"]["image_size"]),
        ("num-classes", num_classes, trained_classes(config)),
    ):
        if given not in (None, trained):
            raise UserError(f"--{flag} {given}, but {ckpt} was trained with {trained}")


def check_original_flags(n_basis: int | None, n_experts: int | None, tf32: bool, config: dict, ckpt: str):
    """Raise UserError if flags that only the original repository needs contradict the checkpoint or this script."""
    mixing = config["model"]["remix"]
    for flag, given, key in (("n-basis", n_basis, "n_basis"), ("n-experts", n_experts, "n_experts")):
        recorded = f"was trained with {mixing[key]}" if mixing else "is a plain DiT"
        if given is not None and (mixing or {}).get(key) != given:
            raise UserError(f"--{flag} {given}, but {ckpt} {recorded}: leave the flag out, the checkpoint replaces it")
    if not tf32:
        raise UserError(
            "--no-tf32: --precision replaces it; for fp32 without TF32 set NVIDIA_TF32_OVERRIDE=0 in the environment"
        )


def record_settings(
    args: argparse.Namespace, config: dict, vae: str, settings: SampleSettings, pipeline: Pipeline
) -> dict:
    """Return what the samples depend on, for the file SETTINGS."""
    record = {
        "ckpt": args.ckpt,
        "ckpt_fingerprint": [fingerprint(path) for path in args.ckpt],
        "backbone": config["model"]["backbone"],
        "process": config["diffusion"]["process"],
        "vae": vae,
        **asdict(settings),
        "guide_ckpt": args.guide_ckpt,
        "guide_fingerprint": args.guide_ckpt and fingerprint(args.guide_ckpt),
        "vae_fingerprint": weights_fingerprint(vae),
        "latent_stats": None,
        "step_sizes": None,
    }
    if args.latent_stats:
        # Statistics of each position are long.
        statistics = pipeline.autoencoder.normalization.record()
        record["latent_stats"] = hashlib.sha256(json.dumps(statistics).encode()).hexdigest()
    if pipeline.evaluations is None:
        record["step_sizes"] = "adaptive, common to each batch: the samples depend on per_proc_batch_size"
    return record


def describe_sampler(settings: SampleSettings, evaluations: int | None) -> str:
    """Describe how samples are drawn, with the network's evaluations per sample, or None for adaptive steps."""
    steps = "adaptive" if evaluations is None else f"{evaluations:,}"
    sampler = f"{settings.sampler}, {steps} network evaluations per sample, guidance scale {settings.cfg_scale}"
    if settings.guidance_interval:
        sampler += " at noise levels {:g} to {:g}".format(*settings.guidance_interval)
    return sampler


def default_name(args: argparse.Namespace, settings: SampleSettings) -> str:
    """Return the name of the folder for the flags, and the settings that follow from them."""
    run = run_name(args.ckpt[0])
    weights = "" if settings.ema else "-raw"
    sampler = f"{settings.sampler}{settings.num_sampling_steps or ''}-cfg{settings.cfg_scale}".replace(":", "-")
    if settings.guidance_interval:
        sampler += "-in{:g}-{:g}".format(*settings.guidance_interval)
    for what, given in (("shift", args.time_shift), ("to", args.last_level), ("channels", args.guided_channels)):
        sampler += "" if given is None else f"-{what}{given:.4g}"
    if args.guide_ckpt:
        sampler += f"-by-{run_name(args.guide_ckpt)}"
    labels = "" if settings.labels is None else "-equal" if settings.labels == "equal" else "-chosen"
    return f"{run}{weights}-{sampler}{labels}-seed{settings.global_seed}"


def run_name(ckpt: str) -> str:
    """Return the name of a checkpoint's run and its step, or the name of its file."""
    path = Path(ckpt).resolve()
    return f"{path.parent.parent.name}-{path.stem}" if path.parent.name == "checkpoints" else path.stem


def finished(folder: Path, record: dict) -> bool:
    """Return whether a folder holds all samples of these settings. Raises UserError if it holds other files."""
    path = folder / SETTINGS
    if not path.exists():
        # A run that was killed at its start leaves hidden files behind.
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty: choose another --name or --sample-dir")
        return False
    # The checkpoint may have been moved; its fingerprint is compared instead.
    added = ("vae_fingerprint", "latent_stats")
    check_settings(path, record, "choose another --name", ignored=("ckpt", "guide_ckpt"), added=added)
    if not (folder / "samples.npz").exists():
        return False
    # A run that was killed after packing leaves the parts behind.
    shutil.rmtree(folder / "parts", ignore_errors=True)
    if is_first_process():
        print(f"{folder / 'samples.npz'} already exists, nothing to do")
    return True


def part_path(folder: Path, numbers: range) -> Path:
    """Return the path of a batch's file, which exists until all batches are packed."""
    return folder / "parts" / f"{numbers.start:06d}.npy"


def check_space(folder: Path, pipeline: Pipeline, settings: SampleSettings, n_missing: int) -> str:
    """Return a line about the disk space needed. Raises UserError if there is not enough."""
    image_bytes = 3 * (pipeline.shape[-1] * pipeline.autoencoder.factor) ** 2
    copies = 2 if settings.save_png else 1
    needed = image_bytes * (settings.num_fid_samples + n_missing * copies)
    return check_disk(folder, needed, "samples, including their parts until all are packed")


def sample_batches(
    pipeline: Pipeline, settings: SampleSettings, missing: list[range], folder: Path, world: World, compiled: bool
):
    """Sample this process's share of the missing batches and write them to `folder`."""
    total = settings.num_fid_samples
    show_steps = world.is_main and len(missing) <= world.size
    # A thread writes a batch while the device samples the next.
    with (
        tqdm(total=total, unit="img", desc="sampling", disable=not world.is_main, smoothing=0) as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        bar.update(total - sum(map(len, missing)))
        writing = None
        for numbers in missing[world.rank :: world.size]:
            images = sample(pipeline, settings, numbers, world, compiled, show_steps)
            # Raise the previous batch's write error, if any, and hold at most two batches in memory.
            if writing is not None:
                writing.result()
            writing = writer.submit(write_batch, folder, numbers, images, settings.save_png)
            bar.update(min(len(numbers) * world.size, bar.total - bar.n))
        if writing is not None:
            writing.result()


def scale_argument(text: str) -> float | str:
    """Convert the value of --cfg-scale, as an argparse type: a number of at least 0, or text as in `parse_pieces`."""
    if "@" not in text:
        return number(float, 0)(text)
    try:
        parse_pieces(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected SCALE@LOW:HIGH,... such as 1.0@0:200,2.0@200:1000, got {text!r}"
        ) from None
    return text


def published_defaults(name: str) -> str:
    """Return text for --help: the defaults of a setting that the published models of some backbones have."""
    found = {}
    for backbone in BACKBONES.values():
        for settings in backbone.sampling.values():
            if name in settings:
                value = settings[name]
                value = " ".join(f"{part:g}" for part in value) if isinstance(value, list) else value
                found.setdefault(f"{value:.4g}" if isinstance(value, float) else str(value), []).append(backbone.name)
    return "".join(f"; {value} for {' and '.join(names)}" for value, names in found.items())


def label_list(text: str) -> str | list[int | str]:
    """Convert the value of --labels, as an argparse type: "equal", or numbers and names separated by commas."""
    if text == "equal":
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected equal, or classes separated by commas, got {text!r}")
    return [int(part) if part.isdecimal() else part for part in parts]


def class_numbers(labels: str | list[int | str] | None, config: dict, ckpt: str) -> str | list[int] | None:
    """Return the value of --labels with the numbers of the classes that it names. Numbers stay as they are.

    Raises:
        UserError: if the checkpoint has no class of such a name.
    """
    if not isinstance(labels, list):
        return labels
    classes = config["data"]["classes"] or []
    for label in labels:
        if isinstance(label, str) and label not in classes:
            known = f"the classes {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}" if classes else "no names"
            raise UserError(f"--labels {label}: {ckpt} has {known}")
        if isinstance(label, int) and str(label) in classes and classes.index(str(label)) != label:
            # Names are sorted as text: a class of the name 10 comes before that of the name 2.
            other = classes.index(str(label))
            warn(f"--labels {label} is the class of this number; the class of the name {label} is number {other}")
    return [classes.index(label) if isinstance(label, str) else label for label in labels]


def write_batch(folder: Path, numbers: range, images: np.ndarray, save_png: bool):
    """Write a batch of images [n, H, W, 3] to its file, and each image to a PNG if `save_png`."""
    if save_png:
        (folder / "png").mkdir(parents=True, exist_ok=True)
        for i, image in zip(numbers, images, strict=True):
            path = folder / "png" / f"{i:06d}.png"
            with name_write_errors(path):
                Image.fromarray(image).save(path)
    write_array(part_path(folder, numbers), images)


def write_results(pipeline: Pipeline, settings: SampleSettings, batches: list[range], folder: Path):
    """Write grid.png, which shows the first samples in the order of their labels, and samples.npz; delete the parts."""
    seed, total = settings.global_seed, settings.num_fid_samples
    labels = np.array([label_of(seed, i, pipeline.n_classes, settings.labels) for i in range(total)])
    parts = [part_path(folder, numbers) for numbers in batches]
    n_parts = -(-GRID_IMAGES // settings.per_proc_batch_size)
    first = np.concatenate([np.load(part) for part in parts[:n_parts]])[:GRID_IMAGES]
    order = np.argsort(labels[: len(first)], kind="stable")
    captions = [pipeline.classes[label] if pipeline.classes else str(label) for label in labels[order]]
    save_grid(folder / "grid.png", first[order], captions)
    pack(folder / "samples.npz", parts, labels)
    shutil.rmtree(folder / "parts")


def pack(path: Path, parts: list[Path], labels: np.ndarray):
    """Write the .npz file that ADM's evaluator reads; only one part at a time is in memory."""
    shape = (len(labels), *np.load(parts[0], mmap_mode="r").shape[1:])
    with atomic_write(path) as temporary:
        write_images(temporary, (np.load(part).tobytes() for part in parts), shape, labels)


if __name__ == "__main__":
    parser = ArgumentParser(description="Sample images from a checkpoint. Only --ckpt is required.")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt",
        required=True,
        nargs="+",
        help="checkpoint of this project (a run's folder stands for its newest one), of facebookresearch/DiT, SiT, "
        "REPA, LightningDiT, RAE or the original Remix-DiT, also hf:OWNER/REPOSITORY/FILE on the Hugging Face hub, or "
        "a DiT in diffusers' layout (a folder or a hub name). Several files are independent experts: plain DiTs of "
        "this project, each trained with other --timesteps, which together cover all timesteps",
    )
    group.add_argument(
        "--model",
        choices=model_names(),
        metavar="NAME",
        help="name of the architecture, such as RemixDiT-S/2; required only if the checkpoint does not record it, "
        "otherwise compared with the checkpoint",
    )
    group.add_argument(
        "--process",
        choices=PROCESSES,
        help="process of the model in a file of another project that does not say it: flow for a SiT of linear path "
        "and velocity prediction (default: the checkpoint's, or gaussian)",
    )
    group.add_argument("--num-heads", **NUM_HEADS_FLAG)
    group.add_argument("--timestep-frequencies", **TIMESTEP_FREQUENCIES_FLAG)
    group.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the EMA weights; --no-ema uses the weights of the last step",
    )
    group.add_argument("--trust-pickle", **TRUST_PICKLE_FLAG)
    group.add_argument(
        "--vae",
        help="autoencoder that decodes the samples: ema or mse (the published VAEs), a hub name, a local folder, or "
        "none for models of pixels (default: the checkpoint's)",
    )
    group.add_argument(
        "--latent-stats",
        **LATENT_STATS_FLAG
        | dict(help=LATENT_STATS_FLAG["help"] + "; for files that do not record them (default: the VAE's)"),
    )
    group.add_argument(
        "--image-size", type=positive_int, help="side of the images in pixels, compared with the checkpoint"
    )
    group.add_argument("--num-classes", type=positive_int, help="number of classes, compared with the checkpoint")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="number of images")
    group.add_argument(
        "--num-sampling-steps",
        help=f"number of steps (default: 250{published_defaults('num_sampling_steps')}; dopri5 chooses its own); for "
        "ddpm and ddim also ddim50 (50 steps, spaced as in the DDIM paper) or 10,15,20 (numbers of steps in equal "
        "sections of the timesteps)",
    )
    group.add_argument(
        "--sampler",
        choices=list(dict.fromkeys(name for process in PROCESSES.values() for name in process.samplers)),
        help="for Gaussian diffusion ddpm (the default); ddim, without noise (eta 0); or a solver of diffusers: dpmpp "
        "(DPM-Solver++), unipc or euler. For flows euler (the default); heun, with two network evaluations per step; "
        "dopri5, with adaptive steps that are common to a batch, so that the samples depend on the batch size; or sde, "
        "which adds noise in each step",
    )
    group.add_argument(
        "--diffusion-form",
        choices=DIFFUSION_FORMS,
        help="noise of the sde over time, as in SiT (default: sigma)",
    )
    group.add_argument(
        "--last-step", choices=LAST_STEPS, help="last step of the sde, which adds no noise, as in SiT (default: mean)"
    )
    group.add_argument(
        "--last-step-size",
        type=number(float, 0, 1, above=True),
        help="part of the time that the last step of the sde covers (default: 0.04)",
    )
    group.add_argument(
        "--time-shift",
        type=number(float, 0, above=True),
        metavar="S",
        help="move the noise levels u of a flow's steps to S u / (1 + (S - 1) u); not for dopri5 (default: that of the "
        f"training{published_defaults('time_shift')})",
    )
    group.add_argument(
        "--last-level",
        type=number(float, 0, 1),
        metavar="U",
        help="noise level, before --time-shift, at which the steps of euler and heun end; for flows "
        f"(default: 0{published_defaults('last_level')})",
    )
    group.add_argument(
        "--cfg-scale",
        type=scale_argument,
        metavar="SCALE",
        help="scale of the guidance, 1 for none; or a scale per interval of noise levels, such as "
        "1.0@0:200,2.0@200:1000 (timesteps from 0 to 1000, for flows from 0 to 1) "
        f"(default: {CFG_SCALE}{published_defaults('cfg_scale')})",
    )
    group.add_argument(
        "--guidance-interval",
        type=number(float, 0, TIMESTEPS),
        nargs=2,
        metavar=("LO", "HI"),
        help="guide only at these noise levels, and run the model without guidance at the others (arXiv 2404.07724) "
        f"(default: all{published_defaults('guidance_interval')})",
    )
    group.add_argument(
        "--guide-ckpt",
        metavar="PATH",
        help="guide with this model instead of the unconditional one (autoguidance, arXiv 2406.02507): a DiT or "
        "RemixDiT of the same data that is weaker, for example smaller or trained for fewer steps",
    )
    group.add_argument(
        "--cfg-all-channels",
        action="store_true",
        help="guide all channels; without this flag only the first three of four are guided, as in DiT",
    )
    group.add_argument(
        "--guided-channels",
        type=positive_int,
        metavar="C",
        help="guide the first C channels (default: three of four, and all of any other number"
        f"{published_defaults('guided_channels')})",
    )
    group.add_argument(
        "--labels",
        type=label_list,
        metavar="equal|LIST",
        help="labels that the samples take in turn: equal for all classes, so that each is sampled equally often, or "
        "numbers or names of classes such as 207,360 or Bag,Coat (default: random classes)",
    )
    group.add_argument("--global-seed", type=seed_int, default=0, help="seed; sample i is a function of the seed and i")
    group.add_argument(
        "--per-proc-batch-size", type=positive_int, default=SAMPLE_BATCH, help="images per batch and process"
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="precision of the matrix products; fp32 means TF32 on GPUs",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run the model through torch.compile (default: on GPUs, if there are at least 1000 steps in total)",
    )
    group = parser.add_argument_group(
        "flags of the original repository", "They are not needed, and are compared with the checkpoint."
    )
    group.add_argument("--n-basis", type=positive_int, metavar="K", help="number of bases")
    group.add_argument("--n-experts", type=positive_int, metavar="N", help="number of experts")
    group.add_argument(
        "--tf32", action=argparse.BooleanOptionalAction, default=True, help="--precision fp32 always allows TF32"
    )
    group = parser.add_argument_group("results")
    group.add_argument("--sample-dir", default="samples", help="parent folder of the results")
    group.add_argument(
        "--name",
        type=folder_name,
        help="name of the folder of results below --sample-dir (default: made from the checkpoint and the settings)",
    )
    group.add_argument("--save-png", action="store_true", help="also write every image as a PNG file")
    run_script(main, parser)
