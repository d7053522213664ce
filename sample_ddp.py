"""Sample images from a checkpoint, for pictures and for FID.

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/RemixDiT-S-4-20-100K/checkpoints/0100000.pt

The checkpoint says what the model, its classes, the image size, the diffusion and the VAE are. Sample i's label and noise
come from (seed, i): the batch size and the number of processes change nothing but rounding. Results go to a folder of
their own: samples.npz (arr_0 uint8 [n, H, W, 3], arr_1 the labels), grid.png, settings.json. Started again after an
interruption, the same command finishes what is missing.
"""

import argparse
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from tqdm import tqdm

from autoencoder import load_autoencoder
from checkpoint import load_denoiser
from common import ArgumentParser, UserError, atomic_write, folder_name, number, positive_int, run_script, seed_int
from diffusion import create_diffusion
from distributed import World, rank0_logger, seed_for, setup
from figures import save_grid
from models import DiT_models
from remix import RemixDiT_models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(args: argparse.Namespace):
    # Check everything that can be checked before any device or process group is touched.
    overrides = {name: value for name in ("model", "num_heads") if (value := getattr(args, name))}
    model, config = load_denoiser(args.ckpt, ema=args.ema, **overrides)
    data, backbone = config["data"], config["model"]["backbone"]
    n_classes = backbone["num_classes"]
    for flag, asked, known in (
        ("image-size", args.image_size, data["image_size"]),
        ("num-classes", args.num_classes, n_classes),
    ):
        if asked not in (None, known):
            raise UserError(f"--{flag} {asked}, but {args.ckpt[0]} was trained with {known}")
    try:
        diffusion = create_diffusion(args.num_sampling_steps, **config["diffusion"])
    except ValueError as error:
        raise UserError(f"--num-sampling-steps {args.num_sampling_steps}: {error}") from None
    folder = Path(args.sample_dir) / (args.name or default_name(args))
    settings = describe(args, data)
    if finished(folder, settings):
        return

    # Initialize.
    world = setup()
    logger = rank0_logger(world)
    autoencoder = load_autoencoder(args.vae or data["vae"], world.device)
    model = model.to(world.device).requires_grad_(False)
    shape = (backbone["in_channels"], backbone["input_size"], backbone["input_size"])
    side = backbone["input_size"] * autoencoder.factor
    partial, marks = folder / "samples.partial.npy", folder / "done.partial.npy"
    if world.is_main:
        begin(folder, settings, partial, marks, (args.num_fid_samples, side, side, 3))
    world.barrier()
    images, done = open_memmap(partial, mode="r+"), open_memmap(marks, mode="r+")
    how = f"{args.sampler} with {diffusion.num_timesteps} steps, guidance {args.cfg_scale}"
    logger.info(f"{args.num_fid_samples:,} samples by {how} -> {folder}")

    # Sample this process's batches; those marked as done are on disk.
    n = args.per_proc_batch_size
    batches = [range(i, min(i + n, args.num_fid_samples)) for i in range(0, args.num_fid_samples, n)]
    with tqdm(total=args.num_fid_samples, unit="img", desc="sampling", disable=not world.is_main, smoothing=0) as bar:
        for numbers in batches[world.rank :: world.size]:
            rows = slice(numbers.start, numbers.stop)
            if not done[rows].all():
                images[rows] = sample(
                    args,
                    numbers,
                    model,
                    diffusion,
                    autoencoder,
                    shape,
                    world,
                    n_classes,
                    show=len(batches) <= world.size,
                )
                images.flush()
                done[rows] = True
                done.flush()
            bar.update(min(len(numbers) * world.size, bar.total - bar.n))
    world.barrier()

    # Pack, draw, and report.
    if world.is_main:
        labels = np.array([label_of(args.global_seed, i, n_classes) for i in range(args.num_fid_samples)])
        if args.save_png:
            for i, image in enumerate(tqdm(images, desc="writing PNGs")):
                with atomic_write(folder / "png" / f"{i:06d}.png") as temporary:
                    Image.fromarray(image).save(temporary, format="PNG")
        shown = np.argsort(labels[:100], kind="stable")
        save_grid(folder / "grid.png", images[shown], [caption(data["classes"], label) for label in labels[shown]])
        pack(folder / "samples.npz", partial, labels)
        marks.unlink()
        partial.unlink()
        logger.info(f"wrote {folder / 'samples.npz'} and {folder / 'grid.png'}")
    world.barrier()


def default_name(args: argparse.Namespace) -> str:
    path = Path(args.ckpt[0]).resolve()
    run = f"{path.parent.parent.name}-{path.stem}" if path.parent.name == "checkpoints" else path.stem
    return f"{run}{'' if args.ema else '-raw'}-{args.sampler}{args.num_sampling_steps}-cfg{args.cfg_scale}-seed{args.global_seed}"


def describe(args: argparse.Namespace, data: dict) -> dict:
    """Everything that the images depend on."""
    digests = []
    for path in args.ckpt:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    names = [
        "num_fid_samples",
        "sampler",
        "num_sampling_steps",
        "cfg_scale",
        "cfg_all_channels",
        "ema",
        "global_seed",
        "per_proc_batch_size",
        "precision",
    ]
    return {
        "ckpt": args.ckpt,
        "ckpt_sha256": digests,
        "vae": args.vae or data["vae"],
        **{name: getattr(args, name) for name in names},
    }


def finished(folder: Path, settings: dict) -> bool:
    """Whether the folder already holds these very samples. Raises UserError if it holds others."""
    record = folder / "settings.json"
    if not record.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: choose another --name or --sample-dir")
        return False
    before = json.loads(record.read_text())
    for key, value in settings.items():
        if key != "ckpt" and before.get(key) != value:
            raise UserError(
                f"{folder} holds samples with {key}={before.get(key)}, not {value}: choose another --name or remove it"
            )
    if (folder / "samples.npz").exists():
        print(f"{folder / 'samples.npz'} is already there, nothing to do")
        return True
    return False


def begin(folder: Path, settings: dict, partial: Path, marks: Path, shape: tuple[int, ...]):
    """Make the files that the processes fill in together, unless an interrupted run left them."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
    for path, dtype, size in ((partial, np.uint8, shape), (marks, np.bool_, shape[:1])):
        if not path.exists():
            with atomic_write(path) as temporary:
                open_memmap(temporary, mode="w+", dtype=dtype, shape=size).flush()


def label_of(seed: int, i: int, n_classes: int) -> int:
    return int(np.random.default_rng([seed, i]).integers(n_classes))


def caption(classes: list[str] | None, label: int) -> str:
    return classes[label] if classes else str(label)


@torch.no_grad()
def sample(
    args, numbers: range, model, diffusion, autoencoder, shape, world: World, n_classes: int, show: bool
) -> np.ndarray:
    """The numbered samples as uint8 [n, H, W, 3]."""
    generators = [torch.Generator(world.device).manual_seed(seed_for(args.global_seed, i)) for i in numbers]
    labels = torch.tensor([label_of(args.global_seed, i, n_classes) for i in numbers], device=world.device)
    null = torch.full_like(labels, n_classes)

    def draw(_step: int | None = None) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g, device=world.device) for g in generators])

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(world.device.type, DTYPES[args.precision], enabled=args.precision != "fp32"):
            if args.cfg_scale == 1:
                return model(x, t, labels)
            channels = shape[0] if args.cfg_all_channels else 3
            both = [torch.cat([a, b]) for a, b in ((x, x), (t, t), (labels, null))]
            return model.forward_with_cfg(*both, args.cfg_scale, channels)[: len(x)]

    loop = diffusion.ddim_sample_loop if args.sampler == "ddim" else diffusion.p_sample_loop
    latents = loop(
        denoise,
        (len(numbers), *shape),
        noise=draw(),
        clip_denoised=autoencoder.bounded,
        device=world.device,
        progress=show and world.is_main,
        step_noise=draw,
    )
    return autoencoder.decode(latents).cpu().numpy()


def pack(path: Path, images: Path, labels: np.ndarray):
    """Write the .npz that ADM's evaluator reads, streaming the images from their .npy file."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with open(images, "rb") as source, archive.open("arr_0.npy", "w", force_zip64=True) as target:
            shutil.copyfileobj(source, target, 1 << 24)
        with archive.open("arr_1.npy", "w") as target:
            np.save(target, labels)


if __name__ == "__main__":
    parser = ArgumentParser(description="Sample images from a checkpoint; --ckpt alone suffices.")
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--ckpt",
        required=True,
        nargs="+",
        help="a checkpoint of this project, of facebookresearch/DiT or of the original Remix-DiT; or several of this project's "
        "plain DiTs, independent experts whose --timesteps tile all of them",
    )
    group.add_argument(
        "--model", choices=[*DiT_models, *RemixDiT_models], metavar="NAME", help="checked against the checkpoint"
    )
    group.add_argument(
        "--num-heads", type=positive_int, help="attention heads, for a foreign file that fits no registered model"
    )
    group.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="the averaged weights, or the raw ones"
    )
    group.add_argument(
        "--vae", help="ema, mse, a hub name, a local folder, or none (default: what the checkpoint says)"
    )
    group.add_argument("--image-size", type=positive_int, help="checked against the checkpoint")
    group.add_argument("--num-classes", type=positive_int, help="checked against the checkpoint")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="images")
    group.add_argument("--num-sampling-steps", default="250", help="such as 250, ddim50 or 10,15,20")
    group.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="DDIM is run without noise (eta 0)")
    group.add_argument("--cfg-scale", type=number(float, 0), default=1.5, help="classifier-free guidance; 1 for none")
    group.add_argument(
        "--cfg-all-channels", action="store_true", help="guide all channels, not the first three as DiT does"
    )
    group.add_argument("--global-seed", type=seed_int, default=0, help="sample i is drawn from (seed, i)")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images at a time, a process")
    group.add_argument(
        "--precision", choices=DTYPES, default="fp32", help="of the matrix products (fp32 is TF32 on GPUs)"
    )
    group = parser.add_argument_group("results")
    group.add_argument("--sample-dir", default="samples", help="where the folders of samples are")
    group.add_argument("--name", type=folder_name, help="of the folder (default: from the checkpoint and the settings)")
    group.add_argument("--save-png", action="store_true", help="write every image as a PNG too")
    run_script(main, parser)
