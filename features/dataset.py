"""The encoded-dataset format: packed shards that are memory-mapped, and an index.

A folder of features holds for shard k (SHARD_SIZE images of the image list, in its order):

- features-<k>.npy, float32 or float16 [images, views, C, H, W]. View 0 is the image; view 1, if stored, is its mirror
  image.
- labels-<k>.npy, int64 [images].
- record-<k>.json, a hash of the crops of the images, and what of their files was applied or left out.
- skipped-<k>.txt, one line per unreadable image, if there are any: its name (see sources.py), a tab, and why.

index.json is written last. It records the VAE, its scale and shift, the image size, the classes, the counts, and what
is stored in which type. Its fingerprint is equal for equal images in the same order with equal labels, views and draws,
also if another device encoded them. "draw" is one draw from the VAE's posterior per view. "moments" are the posterior's
mean and standard deviation, concatenated along the channels to [images, views, 2C, H, W].
"""

import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from features.autoencoder import Normalization, encoder_name
from features.published import PATTERN, VIEWS, PublishedShards, find_shards
from features.shards import OpenShards
from features.statistics import load_statistics
from runtime.errors import UserError
from runtime.files import atomic_write, cache_folder, wait_for_lock, write_array, write_json
from runtime.processes import seed_for

STORES = ("draw", "moments")
DTYPES = ("float32", "float16")
SHARD_SIZE = 1024
INDEX = "index.json"
# The attributes of `FeatureDataset` that say how features are encoded; the original layout does not record all of them.
ENCODING = ("shape", "vae", "vae_fingerprint", "normalization", "image_size", "classes")
SUFFIXES = {"skipped": "txt", "record": "json"}
# So many images, evenly spaced, give the fingerprint of features that do not record it.
SAMPLES = 64
# More labels of the original layout than this are kept in the cache: reading ImageNet's million files takes minutes.
FEW_LABELS = 10_000
# So many files of more labels are looked at for changes. On a network file system, each takes up to a millisecond.
STATED_LABELS = 4096
# The statistics of published features, if they are in the same folder.
STATISTICS = "latents_stats.pt"


def shard_path(folder: Path, kind: str, shard: int) -> Path:
    """Return the path of a shard's file; kind is "features", "labels", "record" or "skipped"."""
    return Path(folder) / f"{kind}-{shard:05d}.{SUFFIXES.get(kind, 'npy')}"


def write_shard(
    folder: Path, shard: int, features: np.ndarray, labels: np.ndarray, skipped: dict[str, str], dtype: str = "float32"
):
    """Write one shard. Its features file is written last, so that its presence means that the shard is complete.

    Args:
        folder: folder of features.
        shard: index of the shard.
        features: features [images, views, C, H, W].
        labels: labels [images], stored as int64.
        skipped: the reason for each unreadable image, by its name.
        dtype: type in which the features are stored, one of DTYPES.
    """
    shard_path(folder, "skipped", shard).unlink(missing_ok=True)
    if skipped:
        with atomic_write(shard_path(folder, "skipped", shard)) as temporary:
            temporary.write_text("".join(f"{name}\t{reason}\n" for name, reason in skipped.items()))
    for kind, array in (("labels", labels.astype(np.int64)), ("features", features.astype(dtype))):
        write_array(shard_path(folder, kind, shard), array)


def read_skipped(folder: Path) -> dict[str, str]:
    """Return the reason for each unreadable image of all shards, by its name."""
    files = sorted(Path(folder).glob("skipped-*.txt"))
    lines = [line for path in files for line in path.read_text().splitlines()]
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines)}


def write_record(folder: Path, shard: int, record: dict):
    """Write a shard's record, before the shard: "crops", a hash of what was encoded, and "treated", see images.py."""
    write_json(shard_path(folder, "record", shard), record)


def read_record(folder: Path, shard: int) -> dict:
    """Return the record of a shard; an empty one if there is none."""
    path = shard_path(folder, "record", shard)
    return json.loads(path.read_text()) if path.exists() else {}


def write_index(folder: Path, n_shards: int, seed: int | None = None, **described) -> dict:
    """Count the images of the shards and write the index, with a fingerprint if all shards have a record.

    Args:
        folder: folder of features that holds all shards.
        n_shards: number of shards.
        seed: seed of the draws that are stored; None if there are no draws.
        **described: the index's entries vae, vae_fingerprint if there is one (see `autoencoder.weights_fingerprint`),
            scale, shift (see `Normalization.record`; by default 0), image_size, classes, store (by default "draw") and
            dtype (by default "float32").

    Returns:
        The index.

    Raises:
        UserError: if no shard holds any image.
    """
    labels = [np.load(shard_path(folder, "labels", shard)) for shard in range(n_shards)]
    counts = [*map(len, labels)]
    first = next((shard for shard, count in enumerate(counts) if count), None)
    if first is None:
        raise UserError("none of the images could be read")
    _, views, channels, *sides = np.load(shard_path(folder, "features", first), mmap_mode="r").shape
    described = {"shift": 0.0, "store": "draw", "dtype": "float32"} | described
    shape = [channels // 2 if described["store"] == "moments" else channels, *sides]
    records = [read_record(folder, shard) for shard in range(n_shards)]
    treated = sum((Counter(record.get("treated", {})) for record in records), Counter())
    index = {
        "format": "remix-dit-features",
        "version": 1,
        **described,
        "shape": shape,
        "views": views,
        "images": sum(counts),
        "skipped": len(read_skipped(folder)),
        "shards": counts,
        "treated": dict(sorted(treated.items())),
    }
    if all(records):
        digest = hashlib.sha256(json.dumps([views, seed, [record["crops"] for record in records]]).encode())
        digest.update(np.concatenate(labels).tobytes())
        index["fingerprint"] = digest.hexdigest()
    write_json(Path(folder) / INDEX, index)
    return index


class FeatureDataset(Dataset):
    """Encoded images: packed shards of this project, the original layout of one .npy file per image, or published.py.

    An item is addressed as image, (image, view) or (image, view, draw); view and draw default to 0. If the VAE's
    posterior is stored, `draw` selects one draw from it, which is a function of (draw, image, view) alone. Otherwise
    `draw` has no effect.

    Args:
        path: folder of features. The original layout is a folder that holds *_features/ and *_labels/.
        statistics: file of the statistics by which published features are normalized, see `load_statistics`; None for
            the file latents_stats.pt in the folder.
        normalization: how published features are normalized, instead of `statistics`.

    Attributes:
        shape: shape (C, H, W) of an item.
        views: number of stored views per image.
        labels: labels [images], int64.
        store: "draw" or "moments".
        dtype: type in which the features are stored, "float32" or "float16"; None if they do not record it. An item is
            float32 in any case.
        classes: class names. None if the features do not record them.
        vae: name of the VAE. None if the features do not record it.
        normalization: what was done to the VAE's latents, in published features when an item is read. None for the
            original layout.
        image_size: side of the images in pixels. None if the features do not record it.
        vae_fingerprint: see `autoencoder.weights_fingerprint`. None if the features do not record it.
        recorded_fingerprint: the fingerprint in the index; None if there is none.

    Raises:
        UserError: if the folder is missing, holds neither layout, or is damaged.
    """

    def __init__(self, path, statistics: str | None = None, normalization: Normalization | None = None):
        self.path = Path(path)
        self.published = None
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder of features")
        if (self.path / INDEX).is_file():
            self._open_packed()
        elif folders := self._find_original():
            self._open_original(*folders)
        elif shards := find_shards(self.path):
            self._open_published(shards, statistics, normalization)
        else:
            raise UserError(
                f"{self.path} holds no features: "
                f"neither {INDEX} (run extract_features.py to its end) nor *_features/ and *_labels/ nor {PATTERN}"
            )
        if statistics and not self.published:
            raise UserError(
                f"--latent-stats is for published features: {self.path} holds none, and its features are normalized"
            )
        self.size = len(self.labels)

    def _open_packed(self):
        """Open this project's layout."""
        self.files = None
        self._read_index()
        self.open_shards = OpenShards(self.starts, partial(self._load, "features"))
        shards = range(len(self.starts) - 1)
        self.labels = np.concatenate([np.array(self._load("labels", shard)) for shard in shards])
        # A truncated file is reported now, not in the middle of a run.
        for shard in shards:
            self._load("features", shard)
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise UserError(f"{self.path}: the labels do not match {INDEX}")

    def _read_index(self):
        """Read what the index records; `starts` is the index of each shard's first image, and the number of images."""
        try:
            index = json.loads((self.path / INDEX).read_text())
            self.vae = index["vae"]
            self.normalization = Normalization.from_record(index)
            self.image_size = index["image_size"]
            self.classes = index["classes"]
            self.shape = tuple(index["shape"])
            self.views = index["views"]
            self.store = index["store"]
            self.dtype = index["dtype"]
            self.starts = np.cumsum([0, *index["shards"]])
            self.recorded_fingerprint = index.get("fingerprint")
            self.vae_fingerprint = index.get("vae_fingerprint")
            if self.store not in STORES or self.dtype not in DTYPES:
                raise ValueError(f"store {self.store!r}, dtype {self.dtype!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path / INDEX} is not an index of features ({error!r})") from None

    def _open_published(self, shards: list[Path], statistics: str | None, normalization: Normalization | None):
        """Open the layout of LightningDiT, see published.py."""
        self.files = None
        self.published = PublishedShards(shards)
        self.labels, self.shape = self.published.labels, self.published.shape
        self.views = len(VIEWS)
        self.normalization = normalization
        if normalization is None:
            beside = shards[0].with_name(STATISTICS)
            if not statistics and not beside.is_file():
                raise UserError(
                    f"{self.path} holds latents that are not normalized, without {STATISTICS}: set --latent-stats"
                )
            self.normalization = load_statistics(statistics or str(beside), self.shape)
        self.vae = self.image_size = self.classes = self.dtype = None
        self.vae_fingerprint = self.recorded_fingerprint = None
        self.store = "draw"

    def _find_original(self) -> tuple[Path, Path] | None:
        """Return the original layout's folders of features and labels, or None."""
        for features in sorted(self.path.glob("*_features"))[:1]:
            labels = features.with_name(features.name.replace("_features", "_labels"))
            if labels.is_dir():
                return features, labels
        return None

    def _open_original(self, features: Path, labels: Path):
        """Open the original layout: <n>.npy with features [views, C, H, W], and <n>.npy with one label."""
        self.files = sorted(features.glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
        if not self.files or {path.name for path in self.files} != {path.name for path in labels.glob("*.npy")}:
            raise UserError(f"{features} and {labels} do not hold one .npy file each for the same images")
        names = [path.name for path in self.files]
        self.labels = self._cached_labels(labels, names) if len(names) > FEW_LABELS else self._labels(labels, names)
        first = self._load_floats(self.files[0]).shape
        if len(first) != 4 or 0 in first:
            raise UserError(f"{self.files[0]} has shape {first}, not [views, C, H, W]")
        self.views, *shape = first
        image_size = re.search(r"(\d+)_features$", features.name)
        self.shape = tuple(shape)
        self.image_size = int(image_size[1]) if image_size else None
        self.vae = None
        self.normalization = None
        self.classes = None
        self.store = "draw"
        self.dtype = None
        self.vae_fingerprint = self.recorded_fingerprint = None

    def _cached_labels(self, folder: Path, names: list[str]) -> np.ndarray:
        """Return the labels of many files, from the cache if possible.

        The first process that needs them reads the files, while the others wait for it. The cache is valid for the same
        names and the same times of the last changes of the folder and of STATED_LABELS evenly spaced files. Some labels
        are compared with their files, because tools that copy files can keep these times.
        """
        some, stated = (np.linspace(0, len(names) - 1, n).astype(int) for n in (64, STATED_LABELS))
        try:
            times = [path.stat().st_mtime_ns for path in (folder, *(folder / names[i] for i in stated))]
        # A link to a file that is missing.
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error}") from None
        key = hashlib.sha256("\n".join([*map(str, times), *names]).encode()).hexdigest()
        where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
        cache = cache_folder() / f"labels-{where}.npz"
        with wait_for_lock(cache.with_suffix(".lock")):
            try:
                with np.load(cache, allow_pickle=False) as saved:
                    known, labels = str(saved["key"]) == key, saved["labels"]
                if known and (labels[some] == self._labels(folder, [names[i] for i in some])).all():
                    return labels
            # There is none, or it is damaged.
            except Exception:
                pass
            labels = self._labels(folder, names)
            with suppress(OSError), atomic_write(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, key=key, labels=labels)
        return labels

    def _labels(self, folder: Path, names: list[str]) -> np.ndarray:
        """Read the labels of the original layout's files with these names."""
        with ThreadPoolExecutor(16) as pool:
            return np.array(list(pool.map(lambda name: self._label(folder / name), names)))

    def _label(self, path: Path) -> int:
        """Read the label of the original layout's file of one image."""
        labels = self._load_file(path)
        if labels.size != 1 or labels.dtype.kind not in "iuf" or not float(labels.item()).is_integer():
            raise UserError(
                f"{path} holds {labels.dtype} {labels.shape}, not one class number: the original layout has one image "
                "per file, with its label as an integer"
            )
        return int(labels.item())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides which number belongs to which draw: images, their order, labels and views.

        It is that of the index. If features do not record it, it is computed from their labels and from SAMPLES
        images, so that another device that encodes the same images gives another one.
        """
        if self.recorded_fingerprint:
            return self.recorded_fingerprint
        digest = hashlib.sha256(repr((self.views, self.shape)).encode() + self.labels.astype(np.int64).tobytes())
        for image in sorted({i * (len(self) - 1) // (SAMPLES - 1) for i in range(SAMPLES)}):
            if self.published:
                stored = torch.stack([self.published.read(image, view) for view in range(self.views)]).numpy()
            else:
                stored = self._original_image(image) if self.files else self._packed_image(image)
            digest.update(np.ascontiguousarray(stored).tobytes())
        return digest.hexdigest()

    def check_encoding(self, flag: str, encoding: dict, num_classes: int, other):
        """Check that these features are encoded as others, and have no other labels than a model.

        Args:
            flag: the flag that gives these features, for error messages.
            encoding: the others' attributes by name, all of ENCODING; what is None is not known.
            num_classes: number of classes of the model.
            other: what the others are called in error messages.

        Raises:
            UserError: if an attribute that both know differs, or if a label is not one of the model's. VAEs may have
                different names if their encoders are the same (see `autoencoder.encoder_name`) or their weights are.
        """
        same_weights = self.vae_fingerprint is not None and self.vae_fingerprint == encoding["vae_fingerprint"]
        for name, expected in encoding.items():
            given = getattr(self, name)
            if expected is None or given is None or expected == given:
                continue
            # A folder has other names on other machines.
            if name == "vae" and (same_weights or encoder_name(expected) == encoder_name(given)):
                continue
            values = f": {given}, not {expected}"
            values = values if len(values) < 200 else ""
            raise UserError(f"{flag} {self.path} differs from {other} in {name}{values}")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= num_classes:
            raise UserError(f"{flag} {self.path} has labels from {low} to {high}, the model has 0 to {num_classes - 1}")

    def _load(self, kind: str, shard: int) -> np.ndarray:
        """Map a shard's features or labels and check their shape against the index."""
        count = self.starts[shard + 1] - self.starts[shard]
        channels = self.shape[0] * (2 if self.store == "moments" else 1)
        expected = (count, self.views, channels, *self.shape[1:]) if kind == "features" else (count,)
        # A shard none of whose images could be read is stored with another shape.
        if count == 0:
            return np.zeros(expected, np.int64)
        array = self._load_file(shard_path(self.path, kind, shard))
        if array.shape != expected or (kind == "features" and self.dtype not in (None, array.dtype)):
            raise UserError(f"{shard_path(self.path, kind, shard)} does not match {INDEX}")
        return array

    @staticmethod
    def _load_file(path: Path) -> np.ndarray:
        """Map a .npy file; the size in its header is compared with the file's length before any memory is allocated."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("an archive")
            return array
        # A damaged header may cause any exception.
        except Exception as error:
            raise UserError(f"{path} is missing or not a complete .npy file: {error}") from None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int | tuple[int, int] | tuple[int, int, int]) -> tuple[torch.Tensor, int]:
        """Return the features [C, H, W] (float32) and the label of image, (image, view) or (image, view, draw)."""
        image, view, draw = (*item, 0)[:3] if isinstance(item, tuple) else (item, 0, 0)
        if not 0 <= image < self.size:
            raise IndexError(image)
        if self.published:
            return self.normalization.normalize(self.published.read(image, view)), int(self.labels[image])
        stored = self._original_image(image) if self.files else self._packed_image(image)
        # A copy, because the file is mapped read-only. torch converts float16 three times as fast as numpy.
        features = torch.from_numpy(np.array(stored[view])).float()
        if self.store == "moments":
            # [2C, H, W] -> [C, H, W] each
            mean, std = features.chunk(2)
            generator = torch.Generator().manual_seed(seed_for(draw, image, view))
            features = mean + std * torch.randn(mean.shape, generator=generator)
        return features, int(self.labels[image])

    def _load_floats(self, path: Path) -> np.ndarray:
        """Map an image's file of the original layout. Pixels of 8 bits would be taken for features otherwise."""
        features = self._load_file(path)
        if features.dtype.kind != "f":
            raise UserError(f"{path} holds {features.dtype}, but features are floating-point numbers")
        return features

    def _original_image(self, image: int) -> np.ndarray:
        """Map an image's file [views, C, H, W]."""
        features = self._load_floats(self.files[image])
        expected = (self.views, *self.shape)
        if features.shape != expected:
            raise UserError(f"{self.files[image]} has shape {features.shape}, but {self.files[0]} has {expected}")
        return features

    def _packed_image(self, image: int) -> np.ndarray:
        """Return an image's part [views, channels, H, W] of its shard."""
        features, place = self.open_shards.find(image)
        return features[place]

    def __getitems__(self, items: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch: the features [B, C, H, W] (float32) and the labels [B] (int64) of a list of items."""
        features, labels = zip(*(self[item] for item in items), strict=True)
        return torch.stack(features), torch.tensor(labels)
