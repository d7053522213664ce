"""Sample images from a checkpoint, for pictures and for FID.

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/RemixDiT-S-4-20-100K/checkpoints/0100000.pt

The checkpoint says what the model, its classes, the image size, the diffusion and the VAE are. Sample i's label and noise
come from (seed, i): the batch size and the number of processes change nothing but rounding. Results go to a folder of
their own: samples.npz (arr_0 uint8 [n, H, W, 3], arr_1 the labels), grid.png, settings.json. Started again after an
interruption, the same command finishes what is missing.
"""

import argparse
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from autoencoder import load_autoencoder
from checkpoint import fingerprint, load_denoiser
from common import (
    ArgumentParser,
    UserError,
    atomic_write,
    check_disk,
    check_settings,
    folder_name,
    number,
    positive_int,
    remove_leftovers,
    run_script,
    seed_int,
    write_json,
)
from diffusion.solvers import SAMPLERS, make_sampler
from distributed import PRECISIONS, World, rank0_logger, seed_for, setup
from figures import save_grid
from models import DiT_models, classifier_free_guidance
from remix import ExpertSwitch, RemixDiT_models


def main(args: argparse.Namespace):
    # Check everything that can be checked before any device or process group is touched.
    overrides = {name: value for name in ("model", "num_heads") if (value := getattr(args, name))}
    model, config = load_denoiser(args.ckpt, args.ema, args.trust_pickle, **overrides)
    data, backbone = config["data"], config["model"]["backbone"]
    n_classes = len(data["classes"] or []) or backbone["num_classes"]  # those that were trained
    for flag, asked, known in (
        ("image-size", args.image_size, data["image_size"]),
        ("num-classes", args.num_classes, n_classes),
    ):
        if asked not in (None, known):
            raise UserError(f"--{flag} {asked}, but {args.ckpt[0]} was trained with {known}")
    try:
        loop, timesteps = make_sampler(args.sampler, args.num_sampling_steps, **config["diffusion"])
    except ValueError as error:
        raise UserError(f"--num-sampling-steps {args.num_sampling_steps}: {error}") from None
    autoencoder = load_autoencoder(args.vae or data["vae"])
    if backbone["in_channels"] not in autoencoder.channels:
        channels = " or ".join(map(str, autoencoder.channels))
        raise UserError(
            f"{args.ckpt[0]} denoises {backbone['in_channels']} channels, --vae {args.vae or data['vae']} takes {channels}"
        )
    autoencoder.scale = data["scale"]  # by which the features were multiplied
    folder = Path(args.sample_dir) / (args.name or default_name(args))
    settings = sample_settings(args, data)
    if finished(folder, settings):
        return

    n = args.per_proc_batch_size
    batches = [range(i, min(i + n, args.num_fid_samples)) for i in range(0, args.num_fid_samples, n)]
    missing = [numbers for numbers in batches if not part_path(folder, numbers).exists()]
    if args.compile is None:
        args.compile = torch.cuda.is_available() and len(missing) * len(timesteps) >= 1000
    image = 3 * (backbone["input_size"] * autoencoder.factor) ** 2
    needed = image * (args.num_fid_samples + sum(map(len, missing)) * (2 if args.save_png else 1))
    space = check_disk(folder, needed, "samples, and their parts until all are packed")

    # Initialize.
    world = setup()
    logger = rank0_logger(world)
    autoencoder, model = autoencoder.to(world.device), model.to(world.device).requires_grad_(False)
    if not world.same(len(missing)):
        raise UserError(
            "the processes see different files: all nodes need the same --sample-dir, on a shared file system"
        )
    if world.is_main:
        remove_leftovers(folder, folder / "parts")
        write_json(folder / "settings.json", settings)
    world.barrier()
    how = f"{args.sampler} with {len(timesteps)} steps, guidance {args.cfg_scale}"
    logger.info(f"{args.num_fid_samples:,} samples by {how} -> {folder}")
    logger.info(space)

    # Sample this process's share of the missing batches, a file each.
    with tqdm(total=args.num_fid_samples, unit="img", desc="sampling", disable=not world.is_main, smoothing=0) as bar:
        bar.update((len(batches) - len(missing)) * n)
        with ThreadPoolExecutor(1) as writer:  # files are written while the device works
            written = []
            for numbers in missing[world.rank :: world.size]:
                show = len(missing) <= world.size  # a bar for the steps, where there is one batch
                images = sample(args, numbers, model, loop, timesteps, autoencoder, backbone, n_classes, world, show)
                for job in written[-1:]:
                    job.result()  # of what went wrong, now; and not more than two batches in memory
                written.append(writer.submit(store, args, folder, numbers, images))
                bar.update(min(len(numbers) * world.size, bar.total - bar.n))
            for job in written[-1:]:
                job.result()
    world.barrier()

    # Pack, draw, and report.
    if world.is_main:
        labels = np.array([label_of(args.global_seed, i, n_classes) for i in range(args.num_fid_samples)])
        parts = [part_path(folder, numbers) for numbers in batches]
        first = np.concatenate([np.load(part) for part in parts[: -(-100 // n)]])[:100]
        shown = np.argsort(labels[: len(first)], kind="stable")
        save_grid(folder / "grid.png", first[shown], [caption(data["classes"], label) for label in labels[shown]])
        pack(folder / "samples.npz", parts, labels)
        shutil.rmtree(folder / "parts")
        logger.info(f"wrote {folder / 'samples.npz'} and {folder / 'grid.png'}")


def part_path(folder: Path, numbers: range) -> Path:
    """The file of a batch of samples, until all are packed."""
    return folder / "parts" / f"{numbers.start:06d}.npy"


def store(args, folder: Path, numbers: range, images: np.ndarray):
    """Write a batch of samples to its files."""
    if args.save_png:
        (folder / "png").mkdir(parents=True, exist_ok=True)
        for i, image in zip(numbers, images, strict=True):
            Image.fromarray(image).save(folder / "png" / f"{i:06d}.png")
    with atomic_write(part_path(folder, numbers)) as temporary, open(temporary, "wb") as file:
        np.save(file, images)


def default_name(args: argparse.Namespace) -> str:
    path = Path(args.ckpt[0]).resolve()
    run = f"{path.parent.parent.name}-{path.stem}" if path.parent.name == "checkpoints" else path.stem
    return f"{run}{'' if args.ema else '-raw'}-{args.sampler}{args.num_sampling_steps}-cfg{args.cfg_scale}-seed{args.global_seed}"


def sample_settings(args: argparse.Namespace, data: dict) -> dict:
    """Everything that the images depend on."""
    names = [
        "num_fid_samples",
        "sampler",
        "num_sampling_steps",
        "cfg_scale",
        "cfg_all_channels",
        "ema",
        "global_seed",
        "per_proc_batch_size",
        "save_png",
        "precision",
    ]
    return {
        "ckpt": args.ckpt,
        "ckpt_fingerprint": [fingerprint(path) for path in args.ckpt],
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
    check_settings(record, settings, "choose another --name", but=("ckpt",))
    if (folder / "samples.npz").exists():
        shutil.rmtree(folder / "parts", ignore_errors=True)  # which a run killed at the very end leaves
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{folder / 'samples.npz'} is already there, nothing to do")
        return True
    return False


def label_of(seed: int, i: int, n_classes: int) -> int:
    return int(np.random.default_rng([seed, i]).integers(n_classes))


def caption(classes: list[str] | None, label: int) -> str:
    return classes[label] if classes else str(label)


@torch.no_grad()
def sample(
    args,
    numbers: range,
    model,
    loop,
    timesteps: list[int],
    autoencoder,
    backbone: dict,
    n_classes: int,
    world: World,
    show: bool,
) -> np.ndarray:
    """The numbered samples as uint8 [n, H, W, 3]; `timesteps` are those that `loop` asks for, one after the other."""
    wanted = len(numbers)
    if args.compile:  # for one size of batch: what the last one has too little is drawn and thrown away
        numbers = range(numbers.start, numbers.start + min(args.per_proc_batch_size, args.num_fid_samples))
    shape = (backbone["in_channels"], backbone["input_size"], backbone["input_size"])
    generators = [torch.Generator(world.device).manual_seed(seed_for(args.global_seed, i)) for i in numbers]
    labels = torch.tensor([label_of(args.global_seed, i, n_classes) for i in numbers], device=world.device)
    labels = labels if args.cfg_scale == 1 else torch.cat([labels, torch.full_like(labels, backbone["num_classes"])])
    channels = shape[0] if args.cfg_all_channels else 3
    run, run_guided = (
        torch.compile(f, dynamic=False) if args.compile else f for f in (predict, classifier_free_guidance)
    )
    asked = iter(timesteps)  # known here, so that the host need not wait for the device to choose the expert

    def draw(_step: int | None = None) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g, device=world.device) for g in generators])

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        network = model.for_timestep(next(asked)) if isinstance(model, ExpertSwitch) else model
        with world.autocast(args.precision):
            if args.cfg_scale == 1:
                return run(network, x, t, labels)
            out = run_guided(network, torch.cat([x, x]), torch.cat([t, t]), labels, args.cfg_scale, channels)
        return out[: len(x)]

    latents = loop(
        denoise,
        (len(numbers), *shape),
        noise=draw(),
        clip_denoised=autoencoder.bounded,
        device=world.device,
        progress=show and world.is_main,
        step_noise=draw,
    )
    return autoencoder.decode(latents[:wanted]).cpu().numpy()


def predict(network, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return network(x, t, y)


def pack(path: Path, parts: list[Path], labels: np.ndarray):
    """Write the .npz that ADM's evaluator reads, streaming the images from the parts."""
    shape = (len(labels), *np.load(parts[0], mmap_mode="r").shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.save(file, labels)


if __name__ == "__main__":
    parser = ArgumentParser(description="Sample images from a checkpoint; --ckpt alone suffices.")
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--ckpt",
        required=True,
        nargs="+",
        help="a checkpoint of this project, of facebookresearch/DiT or of the original Remix-DiT, or a DiT in diffusers' layout "
        "(a folder or a hub name); or several of this project's plain DiTs, independent experts whose --timesteps tile all of them",
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
    group.add_argument("--trust-pickle", action="store_true", help="let --ckpt run code: for files of your own alone")
    group.add_argument(
        "--vae", help="ema, mse, a hub name, a local folder, or none (default: what the checkpoint says)"
    )
    group.add_argument("--image-size", type=positive_int, help="checked against the checkpoint")
    group.add_argument("--num-classes", type=positive_int, help="checked against the checkpoint")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="images")
    group.add_argument(
        "--num-sampling-steps", default="250", help="such as 250; for ddpm and ddim also ddim50 or 10,15,20"
    )
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="ddpm",
        help="DDIM is run without noise (eta 0); diffusers' solvers are DPM-Solver++ (dpmpp), UniPC and Euler",
    )
    group.add_argument("--cfg-scale", type=number(float, 0), default=1.5, help="classifier-free guidance; 1 for none")
    group.add_argument(
        "--cfg-all-channels", action="store_true", help="guide all channels, not the first three as DiT does"
    )
    group.add_argument("--global-seed", type=seed_int, default=0, help="sample i is drawn from (seed, i)")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images at a time, a process")
    group.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="of the matrix products (fp32 is TF32 on GPUs)"
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the model (default: on GPUs, for a thousand steps and more)",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--sample-dir", default="samples", help="where the folders of samples are")
    group.add_argument("--name", type=folder_name, help="of the folder (default: from the checkpoint and the settings)")
    group.add_argument("--save-png", action="store_true", help="write every image as a PNG too")
    run_script(main, parser)
