"""Encode an image folder once, so that training never runs the autoencoder.

    torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path data/imagenet/train --features-path data/imagenet_encoded

Every image is decoded, cropped to a square, encoded together with its mirror image, and stored as one draw of the
VAE's posterior (the draw depends on the seed and the image's number alone), or, with --store moments, as the mean and
deviation from which training draws anew each epoch. Shards are dealt to the processes; what is written does not depend
on how many there are. Started again after an interruption, it goes on with what is missing.
"""

import argparse
import hashlib
import os
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from autoencoder import load_autoencoder
from common import (
    ArgumentParser,
    UserError,
    check_disk,
    check_settings,
    number,
    positive_int,
    remove_leftovers,
    run_script,
    seed_int,
    write_json,
)
from distributed import World, rank0_logger, seed_for, setup
from features import INDEX, SHARD_SIZE, STORES, read_skipped, shard_path, write_index, write_shard
from models import DiT_models
from remix import RemixDiT_models

SETTINGS = "settings.json"  # what made the features; those of other settings must not be mixed in


def main(args: argparse.Namespace):
    # Check everything that can be checked before any device or process group is touched.
    folder = Path(args.features_path)
    images = list_images(args.data_path)
    names = [os.path.relpath(path, args.data_path) for path, _ in images.samples]
    settings = dict(
        images=len(images.samples),
        classes=images.classes,
        image_size=args.image_size,
        vae=args.vae,
        mirror=args.mirror,
        grayscale=args.grayscale,
        seed=args.global_seed,
        names=hashlib.sha256(repr(names).encode()).hexdigest(),
    )
    if args.store == "moments":  # unsaid otherwise, as it was before there was a choice
        settings["store"] = args.store
        if args.vae == "none":
            raise UserError("--store moments is for a VAE's latents: with --vae none there is nothing to draw")
    if args.grayscale and args.vae != "none":
        raise UserError("--grayscale is for pixels: use it with --vae none")
    record = folder / SETTINGS
    if record.exists():
        check_settings(record, settings, "choose another --features-path")
    if (folder / INDEX).exists():
        if not record.exists():
            raise UserError(f"{folder} already holds features: remove them or choose another --features-path")
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{folder} already holds these features, nothing to do")
        return finish(folder, args, print)
    autoencoder = load_autoencoder(args.vae)
    side = args.image_size // autoencoder.factor
    if args.image_size % autoencoder.factor:
        raise UserError(f"--image-size {args.image_size} is not a multiple of the VAE's {autoencoder.factor}")
    if args.model and side % int(args.model[-1]):
        raise UserError(
            f"--image-size {args.image_size} gives features of side {side}, which {args.model}'s patches do not divide"
        )

    def borders(shard: int) -> tuple[int, int]:
        return shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(images.samples))

    views, channels = 2 if args.mirror else 1, 1 if args.grayscale else autoencoder.channels[-1]
    channels *= 2 if args.store == "moments" else 1
    n_shards = -(-len(images.samples) // SHARD_SIZE)
    missing = [k for k in range(n_shards) if not shard_path(folder, "features", k).exists()]  # the last file of a shard
    n_missing = min(len(missing) * SHARD_SIZE, len(images.samples))
    space = check_disk(folder, 4 * channels * side**2 * views * n_missing, "features to encode")

    # Initialize.
    world = setup()
    logger = rank0_logger(world)
    autoencoder = autoencoder.to(world.device)
    if not world.same(len(missing)):
        raise UserError(
            "the processes see different files: all nodes need the same --features-path, on a shared file system"
        )
    if world.is_main:
        remove_leftovers(folder)
        write_json(record, settings)
    world.barrier()
    logger.info(f"{len(images.samples):,} images of {len(images.classes):,} classes, {views} views each -> {folder}")
    logger.info(space)

    # Encode this process's share of the missing shards. One set of readers works ahead, over their borders too.
    mine = missing[world.rank :: world.size]
    batches = [
        range(i, min(i + args.batch_size, last))
        for first, last in map(borders, mine)
        for i in range(first, last, args.batch_size)
    ]
    crops = Crops(images, args.image_size, args.grayscale)
    on_gpu = world.device.type == "cuda"
    read = DataLoader(crops, batch_sampler=batches, num_workers=args.num_workers, collate_fn=join, pin_memory=on_gpu)
    read = iter(read)
    with tqdm(total=len(images.samples), unit="img", desc="encoding", disable=not world.is_main, smoothing=0) as bar:
        bar.update((n_shards - len(missing)) * SHARD_SIZE)
        for shard in mine:
            first, last = borders(shard)
            count = -(-(last - first) // args.batch_size)
            write_shard(folder, shard, *encode(images, islice(read, count), autoencoder, world, args))
            bar.update(min((last - first) * world.size, bar.total - bar.n))
    world.barrier()

    # Report. The index marks the set as whole.
    if world.is_main:
        described = dict(vae=args.vae, scale=autoencoder.scale, image_size=args.image_size, classes=images.classes)
        index = write_index(folder, n_shards, **described, store=args.store)
        logger.info(
            f"Encoded {index['images']:,} images as {index['views']} x {index['shape']} each, in {n_shards} shards."
        )
    finish(folder, args, logger.info)


def finish(folder: Path, args: argparse.Namespace, say):
    """Name the images that could not be read; exit with 1 if there were any, unless --skip-bad."""
    skipped = read_skipped(folder)
    for line in skipped:
        say(f"unreadable: {line}")
    if skipped and not args.skip_bad:
        say(f"{len(skipped)} images could not be read and were left out (--skip-bad accepts that).")
        raise SystemExit(1)


def list_images(path) -> ImageFolder:
    """The images below `path`, one folder a class, in a fixed order. Raises UserError where there are none."""
    if not Path(path).is_dir():
        raise UserError(f"--data-path {path}: no such folder")
    try:
        return ImageFolder(path)
    except FileNotFoundError as error:
        raise UserError(f"--data-path {path} is not a tree of class folders with images in them: {error}") from None


class Crops(Dataset):
    """Each image as its number and uint8 [C, size, size], or, where it cannot be read, the reason."""

    def __init__(self, images: ImageFolder, size: int, grayscale: bool):
        self.images, self.size, self.mode = images, size, "L" if grayscale else "RGB"

    def __len__(self) -> int:
        return len(self.images.samples)

    def __getitem__(self, number: int) -> tuple[int, np.ndarray | str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(self.images.samples[number][0]) as image:
                    pixels = np.array(center_crop(image.convert(self.mode), self.size))
        except Exception as error:  # a decoder may raise anything on a damaged file
            return number, " ".join(f"{type(error).__name__}: {error}".split())
        return number, pixels.reshape(self.size, self.size, -1).transpose(2, 0, 1)


def join(items: list[tuple[int, np.ndarray | str]]) -> tuple[list[int], torch.Tensor | None, dict[int, str]]:
    """A batch of Crops: the numbers of the readable, their pixels [n, C, size, size], and why the others are not."""
    skipped = {number: crop for number, crop in items if isinstance(crop, str)}
    items = [(number, crop) for number, crop in items if number not in skipped]
    pixels = torch.from_numpy(np.stack([crop for _, crop in items])) if items else None
    return [number for number, _ in items], pixels, skipped


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square, `size` pixels a side, as ADM and DiT crop: halve by box filter while twice too large, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale**2 * image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, too long to be made {size} wide")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@torch.no_grad()
def encode(images: ImageFolder, batches, autoencoder, world: World, args) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Encode batches from `join`: features [n, views, C, H, W], labels [n], and a line for each unreadable image."""
    features, labels, skipped = [], [], []
    for numbers, pixels, reasons in batches:
        skipped += [f"{images.samples[number][0]} ({reason})" for number, reason in reasons.items()]
        if pixels is None:
            continue
        pixels = pixels.to(world.device, non_blocking=True).float() / 127.5 - 1
        stacked = torch.stack([pixels, pixels.flip(-1)], dim=1) if args.mirror else pixels.unsqueeze(1)
        mean, std = autoencoder.moments(stacked.flatten(0, 1))
        mean, std = mean.unflatten(0, stacked.shape[:2]), std.unflatten(0, stacked.shape[:2])
        if args.store == "moments":
            mean = torch.cat([mean, std], dim=2)
        elif args.vae != "none":
            generators = [torch.Generator().manual_seed(seed_for(args.global_seed, number)) for number in numbers]
            draws = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
            draws = draws.pin_memory() if world.device.type == "cuda" else draws
            mean = mean + std * draws.to(world.device, non_blocking=True)
        features.append(mean.cpu().numpy())
        labels += [images.samples[number][1] for number in numbers]
    empty = np.zeros((0, 2 if args.mirror else 1, 0, 0, 0))
    return np.concatenate(features) if features else empty, np.array(labels, dtype=np.int64), skipped


if __name__ == "__main__":
    parser = ArgumentParser(description="Encode an image folder (one folder a class) into features for train_fast.py.")
    parser.add_argument("--data-path", required=True, help="the image folder, such as data/imagenet/train")
    parser.add_argument("--features-path", required=True, help="where the features go")
    parser.add_argument(
        "--model", choices=[*DiT_models, *RemixDiT_models], help="check that the features suit this model"
    )
    parser.add_argument("--image-size", type=positive_int, default=256, help="side of the square crop, in pixels")
    parser.add_argument(
        "--vae",
        default="ema",
        help="ema or mse (the published ones), a hub name, a local folder, or none: pixels in [-1, 1]",
    )
    parser.add_argument(
        "--store",
        choices=STORES,
        default="draw",
        help="one draw of the VAE's posterior, as published, or its moments, twice the space: training draws anew each epoch",
    )
    parser.add_argument(
        "--mirror", action=argparse.BooleanOptionalAction, default=True, help="store each image's mirror image too"
    )
    parser.add_argument("--grayscale", action="store_true", help="one channel (with --vae none)")
    parser.add_argument("--skip-bad", action="store_true", help="exit with 0 although some images could not be read")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images encoded at a time, a process")
    parser.add_argument(
        "--num-workers", type=number(int, 0), default=4, help="processes that decode images, for each process"
    )
    parser.add_argument("--global-seed", type=seed_int, default=0, help="seed of the posterior's draws")
    run_script(main, parser)
