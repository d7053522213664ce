"""The encoded-dataset format: packed shards that are memory-mapped, and one small index.

A folder of features holds, for shard k of the image list (SHARD_SIZE images each, in ImageFolder order):
features-<k>.npy [images, views, C, H, W] float32, where view 0 is the image and view 1, if stored, its mirror image;
labels-<k>.npy [images] int64; skipped-<k>.txt, the unreadable images, if there were any. index.json, written last,
names the VAE, its scale, the image size, the classes, the counts, and what is stored: "draw", one draw of the VAE's
posterior, or "moments", its mean and then its standard deviation, [images, views, 2C, H, W].
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common import UserError, atomic_write, write_json
from distributed import seed_for

STORES = ("draw", "moments")
SHARD_SIZE = 1024
INDEX = "index.json"
OPEN_SHARDS = 128


def shard_path(folder: Path, kind: str, shard: int) -> Path:
    """The file of a shard; kind is "features", "labels" or "skipped"."""
    return Path(folder) / f"{kind}-{shard:05d}.{'txt' if kind == 'skipped' else 'npy'}"


def write_shard(folder: Path, shard: int, features: np.ndarray, labels: np.ndarray, skipped: list[str]):
    """Write one shard: features [n, views, C, H, W], labels [n], names of the unreadable. Its features file comes last."""
    if skipped:
        with atomic_write(shard_path(folder, "skipped", shard)) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in skipped))
    for kind, array in (("labels", labels.astype(np.int64)), ("features", features.astype(np.float32))):
        with atomic_write(shard_path(folder, kind, shard)) as temporary, open(temporary, "wb") as file:
            np.save(file, array)


def read_skipped(folder: Path) -> list[str]:
    """A line for each unreadable image."""
    return [line for path in sorted(Path(folder).glob("skipped-*.txt")) for line in path.read_text().splitlines()]


def write_index(folder: Path, n_shards: int, **described) -> dict:
    """Count the images of the shards on disk and write the index; `described` is vae, scale, image_size, classes, store."""
    counts = [len(np.load(shard_path(folder, "labels", shard))) for shard in range(n_shards)]
    first = next((shard for shard, count in enumerate(counts) if count), None)
    if first is None:
        raise UserError("none of the images could be read")
    _, views, channels, *sides = np.load(shard_path(folder, "features", first), mmap_mode="r").shape
    shape = [channels // 2 if described.get("store") == "moments" else channels, *sides]
    index = {
        "format": "remix-dit-features",
        "version": 1,
        **described,
        "shape": shape,
        "views": views,
        "images": sum(counts),
        "skipped": len(read_skipped(folder)),
        "shards": counts,
    }
    write_json(Path(folder) / INDEX, index)
    return index


class FeatureDataset(Dataset):
    """Encoded images: this project's packed shards, or the original layout of one .npy file an image.

    Items are addressed as (image, view), or as (image, view, draw): where the VAE's posterior is stored (`store` is
    "moments"), an item is the draw of that number, a function of (draw, image, view) alone; otherwise there is but one.
    `shape` is (C, H, W); `views` the number of stored views of each image; `classes` the class names, `vae`, `scale` and
    `image_size` as extracted (None where the original layout does not say).
    Raises UserError for a folder that holds neither.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder of features")
        originals = sorted(self.path.glob("*_features"))
        if (self.path / INDEX).is_file():
            self._open_packed()
        elif (
            originals and (labels := originals[0].with_name(originals[0].name.replace("_features", "_labels"))).is_dir()
        ):
            self._open_original(originals[0], labels)
        else:
            raise UserError(
                f"{self.path} holds no features: neither {INDEX} (finish extract_features.py) nor *_features/ and *_labels/"
            )

    def _open_packed(self):
        try:
            index = json.loads((self.path / INDEX).read_text())
            self.vae, self.scale, self.image_size = index["vae"], index["scale"], index["image_size"]
            self.classes, self.shape, self.views = index["classes"], tuple(index["shape"]), index["views"]
            self.store = index.get("store", "draw")
            if self.store not in STORES:
                raise ValueError(f"store {self.store!r}")
            self.starts = np.cumsum([0, *index["shards"]])
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.path / INDEX} is not an index of features ({error!r})") from None
        shards = range(len(self.starts) - 1)
        self.labels = np.concatenate([np.array(self._load("labels", shard)) for shard in shards])
        for shard in shards:
            self._load("features", shard)  # a file cut short is found now, not in the middle of a run
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise UserError(f"{self.path}: the labels do not match {INDEX}")
        self.files = None
        self.open_shards = {}  # memory maps, opened where they are read: they must not travel to a worker
        self.size = len(self.labels)

    def _open_original(self, features: Path, labels: Path):
        self.files = sorted(features.glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
        if not self.files or {path.name for path in self.files} != {path.name for path in labels.glob("*.npy")}:
            raise UserError(f"{features} and {labels} do not hold one .npy file each for the same images")
        with ThreadPoolExecutor(16) as pool:  # a million small files: a minute, once
            found = pool.map(lambda path: int(self._load_file(labels / path.name).reshape(-1)[0]), self.files)
            self.labels = np.array(list(found))
        self.views, *shape = self._load_file(self.files[0]).shape
        if len(shape) != 3:
            raise UserError(f"{self.files[0]} has shape {(self.views, *shape)}, not [views, C, H, W]")
        self.shape, self.size = tuple(shape), len(self.files)
        size = re.search(r"(\d+)_features$", features.name)
        self.vae, self.scale, self.classes, self.store = None, None, None, "draw"
        self.image_size = int(size[1]) if size else None

    def _load(self, kind: str, shard: int) -> np.ndarray:
        count = self.starts[shard + 1] - self.starts[shard]
        channels = self.shape[0] * (2 if self.store == "moments" else 1)
        expected = (count, self.views, channels, *self.shape[1:]) if kind == "features" else (count,)
        if count == 0:  # none of its images could be read
            return np.zeros(expected, np.int64)
        array = self._load_file(shard_path(self.path, kind, shard))
        if array.shape != expected:
            raise UserError(f"{shard_path(self.path, kind, shard)} does not match {INDEX}")
        return array

    @staticmethod
    def _load_file(path: Path) -> np.ndarray:
        """Map a .npy file: what its header claims is checked against its length before any memory is taken."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("an archive")
            return array
        except Exception as error:  # a damaged header may provoke anything
            raise UserError(f"{path} is missing or not a whole .npy file: {error}") from None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int | tuple[int, int] | tuple[int, int, int]) -> tuple[torch.Tensor, int]:
        """Features [C, H, W] (float32) and label of (image, view, draw); view and draw are 0 where they are left out."""
        image, view, draw = (*item, 0)[:3] if isinstance(item, tuple) else (item, 0, 0)
        if not 0 <= image < self.size:
            raise IndexError(image)
        if self.files:
            features = self._load_file(self.files[image])
            if features.shape != (self.views, *self.shape):
                raise UserError(
                    f"{self.files[image]} has shape {features.shape}, not {(self.views, *self.shape)} as the first"
                )
        else:
            features = self._shard(int(np.searchsorted(self.starts, image, side="right")) - 1, image)
        features = torch.from_numpy(features[view].astype(np.float32))
        if self.store == "moments":
            mean, std = features.chunk(2)
            generator = torch.Generator().manual_seed(seed_for(draw, image, view))
            features = mean + std * torch.randn(mean.shape, generator=generator)
        return features, int(self.labels[image])

    def _shard(self, shard: int, image: int) -> np.ndarray:
        """An image's features [views, C, H, W] in its shard; only so many shards are kept open as any system allows."""
        if shard not in self.open_shards:
            if len(self.open_shards) == OPEN_SHARDS:
                del self.open_shards[next(iter(self.open_shards))]
            self.open_shards[shard] = self._load("features", shard)
        return self.open_shards[shard][image - self.starts[shard]]

    def __getitems__(self, items: list) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch at once: features [B, C, H, W] and labels [B]."""
        features, labels = zip(*(self[item] for item in items), strict=True)
        return torch.stack(features), torch.tensor(labels)
