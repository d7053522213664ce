"""Encode a dataset of images once, so that training never runs the autoencoder.

    torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path data/imagenet/train \\
        --features-path data/imagenet_encoded

Every image is decoded, cropped to a square and encoded together with its mirror image. By default one draw from the
VAE's posterior is stored, which is a function of the seed and the image's index. With --store moments, the posterior's
mean and standard deviation are stored, and training draws from them anew each epoch.

With --reference OUT.npz, the crops themselves are written instead, as the reference of evaluator.py.

Shards of images are divided among the processes; the files do not depend on the number of processes. If the extraction
is interrupted, the same command encodes what is missing. It also tries the images again that could not be read before.
"""

import argparse
import hashlib
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from features.autoencoder import (
    Autoencoder,
    Normalization,
    load_autoencoder,
    load_normalization,
    weights_fingerprint,
)
from features.dataset import (
    DTYPES,
    INDEX,
    SHARD_SIZE,
    STORES,
    read_skipped,
    shard_path,
    write_index,
    write_record,
    write_shard,
)
from features.images import MAX_PIXELS, describe_counts, read_image, write_images
from features.sources import LabelledImages, load_images
from features.statistics import LATENT_STATS_FLAG, load_statistics
from models import build_plain, meta_device, model_names
from runtime.command_line import ArgumentParser, counted, number, positive_int, run_script, seed_int
from runtime.errors import LocalError, UserError, is_first_process
from runtime.files import (
    SETTINGS,
    atomic_write,
    check_disk,
    check_settings,
    check_unused,
    lock_folder,
    remove_leftovers,
    write_json,
)
from runtime.processes import SampleGenerators, World, rank0_logger, setup, worker_count

# Channels whose standard deviations differ by more than this factor are normalized one by one.
CHANNELS_DIFFER = 1.5


def main(args: argparse.Namespace):
    # Check everything that can be checked before any device or process group is used.
    images = load_images(args.data_path)
    if args.reference:
        return make_reference(Path(args.reference), images, args) if is_first_process() else None
    folder = Path(args.features_path)
    check_pixel_flags(args.vae, args.store, args.grayscale, args.latent_stats)
    normalization = load_normalization(args.vae)
    if args.latent_stats:
        normalization = load_statistics(args.latent_stats)
    contents = images.samples()
    settings = record_settings(args, images, normalization) | contents
    complete = finished(folder, settings, added=["vae_fingerprint", *contents])
    crops = Crops(images, args.image_size, args.grayscale, args.max_pixels)
    repaired = repaired_shards(folder, crops)
    if complete and not repaired:
        log = print if is_first_process() else lambda line: None
        log(f"{folder} already holds these features, nothing to do")
        return report_skipped(folder, args.skip_bad, log)
    autoencoder = load_autoencoder(args.vae)
    autoencoder.normalization = normalization
    if args.store == "moments" and not autoencoder.draws:
        raise UserError(f"--store moments: {args.vae} encodes an image to one latent, so that there is nothing to draw")
    side = features_side(args.image_size, autoencoder, args.model)
    if args.latent_stats:
        load_statistics(args.latent_stats, (autoencoder.channels[0], side, side))
    lock_folder(folder, "--features-path")
    remove_leftovers(folder)
    n_shards = count_shards(images)
    missing = [i for i in range(n_shards) if i in repaired or not shard_path(folder, "features", i).exists()]
    n_missing = sum(len(shard_images(shard, images)) for shard in missing)
    disk = check_space(folder, args, n_missing, autoencoder, side) if is_first_process() else None

    # Set up the processes, the device and the folder.
    world = setup()
    logger = rank0_logger(world)
    world.check_same_files(len(missing), "--features-path")
    if world.is_main:
        write_json(folder / SETTINGS, settings)
        # The index is deleted first, so that the features are never taken for complete.
        for path in [folder / INDEX, *(shard_path(folder, "features", shard) for shard in repaired)]:
            path.unlink(missing_ok=True)
    world.barrier()
    logger.info(
        f"{counted(len(images), 'image')} of {counted(len(images.classes), 'class', 'classes')}, "
        f"{counted(2 if args.mirror else 1, 'view')} each -> {folder}"
    )
    for note in [*images.notes, disk]:
        logger.info(note)

    # Encode this process's share of the missing shards.
    autoencoder = autoencoder.to(world.device)
    encoder = Encoder(autoencoder, args.store, args.mirror, args.global_seed, world.device, args.dtype)
    encode_shards(crops, encoder, missing, args, world, logger)
    world.barrier()

    # Write the index, which marks the features as complete.
    if world.is_main:
        described = dict(vae=args.vae, **autoencoder.normalization.record())
        if fingerprint := settings.get("vae_fingerprint"):
            described |= dict(vae_fingerprint=fingerprint)
        described |= dict(image_size=args.image_size, classes=images.classes)
        drawn = args.store == "draw" and autoencoder.draws
        seed = args.global_seed if drawn else None
        index = write_index(folder, n_shards, seed, **described, store=args.store, dtype=args.dtype)
        logger.info(
            f"Encoded {counted(index['images'], 'image')} as {index['views']} x {index['shape']} each, "
            f"in {counted(n_shards, 'shard')}."
        )
        if index["treated"]:
            logger.info(f"of the images' files: {describe_counts(index['treated'])}")
    report_skipped(folder, args.skip_bad, logger.info)


def check_pixel_flags(vae: str, store: str, grayscale: bool, latent_stats: str | None):
    """Raise UserError for flags that do not suit a VAE, or its absence."""
    if store == "moments" and vae == "none":
        raise UserError("--store moments is for a VAE's latents: with --vae none there is nothing to draw")
    if latent_stats and vae == "none":
        raise UserError("--latent-stats is for the latents of a VAE, not for --vae none")
    if grayscale and vae != "none":
        raise UserError("--grayscale is for pixels: use it with --vae none")


def record_settings(args: argparse.Namespace, images: LabelledImages, normalization: Normalization) -> dict:
    """Return what the features depend on besides the images' content, for the file SETTINGS."""
    settings = dict(
        images=len(images),
        classes=images.classes,
        image_size=args.image_size,
        vae=args.vae,
        mirror=args.mirror,
        grayscale=args.grayscale,
        seed=args.global_seed,
        names=images.fingerprint(),
        store=args.store,
        dtype=args.dtype,
    )
    # Pixels have no normalization.
    if args.vae != "none":
        settings |= normalization.record()
        settings |= dict(vae_fingerprint=weights_fingerprint(args.vae))
    return settings


def finished(folder: Path, settings: dict, added: Iterable[str]) -> bool:
    """Return whether a folder holds all features of these settings. Raises UserError if it holds other features.

    `added` names the settings that earlier versions did not record.
    """
    record = folder / SETTINGS
    if record.exists():
        # A row that could not be read may have been repaired.
        check_settings(record, settings, "choose another --features-path", read_skipped(folder), added)
    if not (folder / INDEX).exists():
        return False
    if not record.exists():
        raise UserError(f"{folder} already holds features: remove them or choose another --features-path")
    return True


def repaired_shards(folder: Path, crops: "Crops") -> set[int]:
    """Return the shards with an image that could not be read when they were encoded, and can be read now."""
    unreadable = read_skipped(folder)
    shards = [shard for shard in range(count_shards(crops.images)) if shard_path(folder, "skipped", shard).exists()]
    return {
        shard
        for shard in shards
        for i in shard_images(shard, crops.images)
        if crops.images.name(i) in unreadable and not isinstance(crops[i][1], str)
    }


def features_side(image_size: int, autoencoder: Autoencoder, model: str | None) -> int:
    """Return the side of the features. Raises UserError if the image size does not suit the VAE or the model."""
    if autoencoder.image_size not in (None, image_size):
        raise UserError(f"--image-size {image_size}, but the autoencoder is for images of {autoencoder.image_size}")
    if image_size % autoencoder.factor:
        raise UserError(f"--image-size {image_size} is not a multiple of the VAE's factor {autoencoder.factor}")
    side = image_size // autoencoder.factor
    if model:
        try:
            with meta_device():
                build_plain(model, input_size=side)
        except ValueError as error:
            raise UserError(f"--image-size {image_size} gives features of side {side}. {model}: {error}") from None
    return side


def check_space(folder: Path, args: argparse.Namespace, n_images: int, autoencoder: Autoencoder, side: int) -> str:
    """Return a line about the disk space that images to encode need. Raises UserError if there is not enough."""
    channels = (1 if args.grayscale else autoencoder.channels[-1]) * (2 if args.store == "moments" else 1)
    n_views = 2 if args.mirror else 1
    needed = n_images * n_views * channels * side**2 * np.dtype(args.dtype).itemsize
    return check_disk(folder, needed, "features to encode")


def count_shards(images: LabelledImages) -> int:
    """Return the number of shards of all images."""
    return -(-len(images) // SHARD_SIZE)


def shard_images(shard: int, images: LabelledImages) -> range:
    """Return the indices of a shard's images."""
    return range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(images)))


def report_skipped(folder: Path, accept: bool, log):
    """Log the images that could not be read. Exits with code 1 if there are any, unless they are accepted."""
    skipped = read_skipped(folder)
    for name, reason in skipped.items():
        log(f"unreadable: {name} ({reason})")
    if skipped and not accept:
        log(
            f"{counted(len(skipped), 'image')} could not be read: left out. The same command tries again; --skip-bad "
            "accepts that, and --max-pixels accepts larger images."
        )
        raise SystemExit(1)


def make_reference(out: Path, images: LabelledImages, args: argparse.Namespace):
    """Write the crops of all images and their labels to an .npz file for evaluator.py.

    Unreadable images are left out and reported. They end the script with exit code 1, unless --skip-bad accepts them.

    Args:
        out: the file: arr_0 are the crops, uint8 [n, size, size, 3], and arr_1 the labels, int64 [n].
        images: the images.
        args: the flags, of which those about the autoencoder and the features have no effect.

    Raises:
        UserError: if the file's name does not end in .npz, or no image could be read.
        SystemExit: with code 1, if images were left out and --skip-bad is not given.
    """
    if out.suffix != ".npz":
        raise UserError(f"--reference {out}: the file name must end in .npz")
    check_unused(out)
    size = args.image_size
    for note in [*images.notes, check_disk(out.parent, 2 * 3 * size**2 * len(images), "images and a copy of them")]:
        print(note)
    crops = Crops(images, size, args.grayscale, args.max_pixels)
    loader = DataLoader(crops, args.batch_size, num_workers=worker_count(args.num_workers), collate_fn=join)
    labels, skipped = [], {}
    with (
        atomic_write(out) as temporary,
        tempfile.TemporaryFile(dir=out.parent) as pixels,
        tqdm(total=len(images), unit="img", desc="cropping", smoothing=0) as bar,
    ):
        for indices, batch, reasons, _ in loader:
            skipped |= {images.name(i): reason for i, reason in reasons.items()}
            labels += [images.labels[i] for i in indices]
            if batch is not None:
                # [n, C, size, size] -> [n, size, size, 3]; gray pixels have three equal channels.
                pixels.write(batch.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy().data)
            bar.update(len(indices) + len(reasons))
        if not labels:
            name, reason = next(iter(skipped.items()))
            raise UserError(f"none of the images could be read, such as {name} ({reason})")
        pixels.seek(0)
        write_images(temporary, iter(partial(pixels.read, 2**24), b""), (len(labels), size, size, 3), np.array(labels))
    print(f"wrote {out}: {counted(len(labels), 'image')} of {size}x{size} pixels with their labels")
    for name, reason in skipped.items():
        print(f"unreadable: {name} ({reason})")
    if skipped and not args.skip_bad:
        print(f"{counted(len(skipped), 'image')} could not be read: left out; --skip-bad accepts that")
        raise SystemExit(1)


class Crops(Dataset):
    """Square crops of images.

    Item i is (i, crop, treatment) with the crop as uint8 [C, size, size] and what `read_image` says of its file, or
    (i, reason, []) if the image cannot be read.

    Args:
        images: the images.
        size: side of the crops, in pixels.
        grayscale: convert to one channel instead of three.
        max_pixels: largest number of pixels of an image.
    """

    def __init__(self, images: LabelledImages, size: int, grayscale: bool, max_pixels: int = MAX_PIXELS):
        self.images = images
        self.size = size
        self.mode = "L" if grayscale else "RGB"
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[int, np.ndarray | str, list[str]]:
        try:
            # read_image raises an error where Pillow warns.
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                image, treatment = read_image(self.images.file(i), self.mode, self.max_pixels)
            pixels = np.array(center_crop(image, self.size))
        # A decoder may raise any exception on a damaged file.
        except Exception as error:
            # Objects are named with their addresses, which differ from run to run.
            reason = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
            return i, " ".join(reason.split()), []
        # [size, size] or [size, size, 3] -> [C, size, size]
        return i, pixels.reshape(self.size, self.size, -1).transpose(2, 0, 1), treatment


class CropBatch(NamedTuple):
    """Items of Crops.

    Attributes:
        indices: indices of the readable images.
        pixels: their crops [n, C, size, size]; None if there are none.
        skipped: the reason for each unreadable image, by its index.
        treated: how many images have what `read_image` says of their files.
    """

    indices: list[int]
    pixels: torch.Tensor | None
    skipped: dict[int, str]
    treated: Counter


def join(items: list[tuple[int, np.ndarray | str, list[str]]]) -> CropBatch:
    """Collate items of Crops."""
    skipped = {i: crop for i, crop, _ in items if isinstance(crop, str)}
    readable = [(i, crop) for i, crop, _ in items if i not in skipped]
    pixels = torch.from_numpy(np.stack([crop for _, crop in readable])) if readable else None
    treated = Counter(line for _, _, treatment in items for line in treatment)
    return CropBatch([i for i, _ in readable], pixels, skipped, treated)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square, `size` pixels per side, resized as ADM and DiT do.

    The image is halved with a box filter while it is at least twice too large, and then resized with a bicubic filter.

    Raises:
        PIL.Image.DecompressionBombError: if the image is so elongated that the resized image would be too large.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale**2 * image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"an image of {image.width} x {image.height} pixels is too elongated to resize to a side of {size}"
        )
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class Encoder:
    """Encodes crops into the features that are stored.

    Attributes:
        autoencoder: the VAE, or pixels.
        store: "draw" or "moments", see features/dataset.py.
        mirror: also encode each image's mirror image.
        seed: seed of the draws from the posterior.
        device: device of the autoencoder.
        dtype: type of the features, one of features.DTYPES.
    """

    autoencoder: Autoencoder
    store: str
    mirror: bool
    seed: int
    device: torch.device
    dtype: str = "float32"

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, indices: list[int]) -> np.ndarray:
        """Encode a batch.

        Args:
            pixels: crops [n, C, size, size], uint8.
            indices: indices of the images; image i's draw is a function of (seed, i).

        Returns:
            Features [n, views, C or 2C, H, W]. Values that the type cannot represent become infinite.
        """
        x = pixels.to(self.device, non_blocking=True).float() / 127.5 - 1
        x = torch.stack([x, x.flip(-1)], dim=1) if self.mirror else x.unsqueeze(1)
        # mean, std: [n, views, C, H, W]
        mean, std = (moment.unflatten(0, x.shape[:2]) for moment in self.autoencoder.moments(x.flatten(0, 1)))
        if self.store == "moments":
            return self._stored(torch.cat([mean, std], dim=2))
        if self.autoencoder.draws:
            # Drawn on the CPU, so that the features do not depend on the device.
            noise = SampleGenerators(self.seed, indices).randn(mean.shape[1:])
            noise = noise.pin_memory() if self.device.type == "cuda" else noise
            mean = mean + std * noise.to(self.device, non_blocking=True)
        return self._stored(mean)

    def _stored(self, features: torch.Tensor) -> np.ndarray:
        """Convert features to the type in which they are stored."""
        return features.to(getattr(torch, self.dtype)).cpu().numpy()


def encode_images(crops: Crops, batches, encoder: Encoder) -> tuple[np.ndarray, np.ndarray, dict[str, str], dict]:
    """Encode batches of images.

    Args:
        crops: the images.
        batches: batches from `join`.
        encoder: the encoder.

    Returns:
        Features [n, views, C or 2C, H, W] and labels [n] of the readable images, the reason for each unreadable image,
        by its name, and the record of the shard (see features/dataset.py).

    Raises:
        LocalError: if the features of an image cannot be represented in the encoder's type.
    """
    features, labels, skipped = [], [], {}
    treated, digest = Counter(), hashlib.sha256()
    for indices, pixels, reasons, treatments in batches:
        treated += treatments
        skipped |= {crops.images.name(i): reason for i, reason in reasons.items()}
        if pixels is not None:
            digest.update(pixels.numpy().tobytes())
            features.append(encoder.encode(pixels, indices))
            finite = np.isfinite(features[-1]).all(axis=(1, 2, 3, 4))
            if not finite.all():
                name, remedy = crops.images.name(indices[int(finite.argmin())]), " (use --dtype float32)"
                remedy = remedy if encoder.dtype == "float16" else ""
                raise LocalError(f"{name}: its features are not finite in {encoder.dtype}{remedy}")
            labels += [crops.images.labels[i] for i in indices]
    if not features:
        features = [np.zeros((0, 2 if encoder.mirror else 1, 0, 0, 0))]
    record = {"crops": digest.hexdigest(), "treated": dict(sorted(treated.items()))}
    return np.concatenate(features), np.array(labels, dtype=np.int64), skipped, record


def encode_shards(
    crops: Crops,
    encoder: Encoder,
    missing: list[int],
    args: argparse.Namespace,
    world: World,
    logger: logging.Logger,
):
    """Encode this process's share of the missing shards and write them to the folder that the flags name."""
    total = len(crops)
    mine = {shard: shard_images(shard, crops.images) for shard in missing[world.rank :: world.size]}
    batches = [part for indices in mine.values() for part in split(indices, args.batch_size)]
    # One loader reads all shards, so that its workers read ahead across the boundaries between shards.
    loader = DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=worker_count(args.num_workers),
        collate_fn=join,
        pin_memory=world.device.type == "cuda",
    )
    with tqdm(total=total, unit="img", desc="encoding", disable=not world.is_main, smoothing=0) as bar:
        bar.update(total - sum(len(shard_images(shard, crops.images)) for shard in missing))
        loaded = iter(loader)
        for shard, indices in mine.items():
            own = islice(loaded, len(split(indices, args.batch_size)))
            features, labels, skipped, record = encode_images(crops, own, encoder)
            write_record(Path(args.features_path), shard, record)
            write_shard(Path(args.features_path), shard, features, labels, skipped, encoder.dtype)
            if shard == missing[0] and not encoder.autoencoder.bounded and len(features):
                report_scale(features, encoder.store, encoder.autoencoder.normalization, logger)
            bar.update(min(len(indices) * world.size, bar.total - bar.n))


def report_scale(features: np.ndarray, store: str, normalization: Normalization, logger: logging.Logger):
    """Log the mean and the standard deviation of latents [n, views, C or 2C, H, W].

    The noise schedules are made for a standard deviation of about 1, so that another one gives a warning, with the
    numbers in the VAE's config that would give 1.

    Args:
        features: the latents, or their moments.
        store: "draw" or "moments".
        normalization: what has been done to the VAE's latents.
        logger: the logger.
    """
    if store == "moments":
        mean, spread = np.split(features.astype(np.float32), 2, axis=2)
    else:
        mean = features.astype(np.float32)
        spread = np.zeros_like(mean)
    # The variance of draws is that of the means plus the mean of the variances.
    std = float(np.sqrt(mean.var() + np.square(spread).mean()))
    logger.info(f"latents of the first shard: mean {mean.mean():.3f}, standard deviation {std:.3f}")
    if not 0.5 <= std <= 2:
        if isinstance(normalization.scale, str):
            advice = "the statistics of each position are those of other latents"
        else:
            advice = f"in a copy of the VAE's config.json, write {unit_config(mean, spread, normalization)}"
        logger.warning(f"warning: the standard deviation should be about 1: {advice} (docs/features.md)")


def unit_config(mean: np.ndarray, spread: np.ndarray, normalization: Normalization) -> str:
    """Return the entries of a VAE's config that give latents a mean of 0 and a standard deviation of 1.

    They are one factor and one shift, or statistics per channel if the channels' standard deviations differ by more
    than CHANNELS_DIFFER, or their means by as much of a standard deviation.

    Args:
        mean: normalized latents, or the means of their posteriors, [n, views, C, H, W].
        spread: the posteriors' standard deviations, likewise.
        normalization: how the latents were normalized.
    """
    axes = (0, 1, 3, 4)
    means = mean.mean(axes, dtype=np.float64)
    stds = np.sqrt(mean.var(axes, dtype=np.float64) + np.square(spread).mean(axes, dtype=np.float64))
    if stds.max() > CHANNELS_DIFFER * stds.min() or np.ptp(means) > (CHANNELS_DIFFER - 1) * stds.max():
        # x = (z - shift) scale, so z has the mean of x / scale + shift.
        raw_means, raw_stds = means / normalization.scale + normalization.shift, stds / normalization.scale
        lists = (", ".join(f"{value:.5g}" for value in values) for values in (raw_means, raw_stds))
        return '"latents_mean": [{}], "latents_std": [{}], "scaling_factor": 1.0'.format(*lists)
    scale, shift = (float(np.mean(value)) for value in (normalization.scale, normalization.shift))
    std = np.sqrt(np.mean(stds**2) + means.var())
    factor = f'"scaling_factor": {scale / std:.5g}'
    # A mean of a tenth of the standard deviation is that of the published VAEs.
    return factor if abs(means.mean()) < 0.1 * std else f'{factor}, "shift_factor": {shift + means.mean() / scale:.5g}'


def split(indices: range, size: int) -> list[range]:
    """Split indices into batches of at most `size`."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


if __name__ == "__main__":
    parser = ArgumentParser(description="Encode a dataset of images into features for train_fast.py.")
    parser.add_argument(
        "--data-path",
        required=True,
        help="folder with one folder of images per class, such as data/imagenet/train; or hf:NAME or hf:NAME@SPLIT, a "
        "Hugging Face dataset: a local folder or a name on the hub, such as hf:ILSVRC/imagenet-1k@validation",
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--features-path", help="folder to which the features are written")
    group.add_argument(
        "--reference",
        metavar="NPZ",
        help="instead of encoding, write the images at the crop and size of the features to this file, with their "
        "labels, as the reference of evaluator.py; flags about the autoencoder have no effect",
    )
    parser.add_argument(
        "--model",
        choices=model_names(),
        metavar="NAME",
        help="check that the features suit this architecture, such as RemixDiT-S/2",
    )
    parser.add_argument("--image-size", type=positive_int, default=256, help="side of the square crops, in pixels")
    parser.add_argument(
        "--vae",
        default="ema",
        help="autoencoder: ema or mse (the published VAEs), a hub name, a local folder, or none for pixels in [-1, 1]",
    )
    parser.add_argument("--latent-stats", **LATENT_STATS_FLAG)
    parser.add_argument(
        "--store",
        choices=STORES,
        default="draw",
        help="draw: one draw from the VAE's posterior, as in DiT; moments: the posterior's mean and standard "
        "deviation, which take twice the space and from which training draws anew each epoch",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type in which the features are stored; float16 takes half the space, and training converts it to float32",
    )
    parser.add_argument(
        "--mirror", action=argparse.BooleanOptionalAction, default=True, help="also store each image's mirror image"
    )
    parser.add_argument("--grayscale", action="store_true", help="store one channel; for --vae none only")
    parser.add_argument(
        "--skip-bad", action="store_true", help="exit with code 0 even if some images could not be read"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive_int,
        default=MAX_PIXELS,
        help="largest number of pixels of an image; a larger one counts as unreadable",
    )
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images per batch and process")
    parser.add_argument(
        "--num-workers",
        type=number(int, 0),
        help="worker processes that decode images, per process; 0 decodes in the process itself (default: 4, or the "
        "number of CPU cores if there are fewer)",
    )
    parser.add_argument("--global-seed", type=seed_int, default=0, help="seed of the draws from the VAE's posterior")
    run_script(main, parser)
