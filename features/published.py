"""Published features of LightningDiT: latents of images and of their mirror images in safetensors shards.

A shard latents_rank<RR>_shard<SSS>.safetensors holds `latents` and `latents_flip` [n, C, H, W], which are not
normalized, and `labels` [n].
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from features.shards import OpenShards
from runtime.errors import UserError, first_line

PATTERN = "latents_rank*_shard*.safetensors"
VIEWS = ("latents", "latents_flip")


def find_shards(folder: Path) -> list[Path]:
    """Return the shards in a folder or in one folder below it, in the order of their names; none if there are none.

    Raises:
        UserError: if several folders hold shards.
    """
    shards = sorted(folder.rglob(PATTERN))
    if len(folders := sorted({path.parent for path in shards})) > 1:
        raise UserError(f"{folder} holds published features in {' and '.join(map(str, folders))}: give one of them")
    return shards


class PublishedShards:
    """The images of all shards, in the order of the shards' names.

    Args:
        paths: the shards.

    Attributes:
        labels: labels [images], int64.
        shape: shape (C, H, W) of a latent.

    Raises:
        UserError: if a shard is damaged, or its tensors have other shapes than described above.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        labels, self.shape = [], None
        for path in paths:
            file = _open(path)
            missing = {*VIEWS, "labels"} - set(file.keys())
            if missing:
                raise UserError(f"{path} holds no {' and no '.join(sorted(missing))}")
            stored = file.get_tensor("labels")
            labels.append(stored.long().numpy())
            if stored.ndim != 1 or not torch.equal(stored, stored.trunc()):
                raise UserError(f"{path} holds labels that are not one class number per image")
            slices = [file.get_slice(view) for view in VIEWS]
            if any("F" not in part.get_dtype() for part in slices):
                raise UserError(f"{path} holds latents that are not floating-point numbers")
            shapes = [tuple(part.get_shape()) for part in slices]
            self.shape = self.shape or shapes[0][1:]
            if len(self.shape) != 3:
                raise UserError(f"{path} holds {VIEWS[0]} of the shape {shapes[0]}, not (n, C, H, W)")
            expected = (len(stored), *self.shape)
            if shapes != [expected, expected]:
                raise UserError(
                    f"{path} holds {' and '.join(VIEWS)} of the shapes {' and '.join(map(str, shapes))}, not {expected}"
                )
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise UserError(f"{paths[0]} and the other shards in its folder hold no images")
        self.open_shards = OpenShards(np.cumsum([0, *map(len, labels)]), self._open_shard)

    def _open_shard(self, shard: int):
        return _open(self.paths[shard])

    def read(self, image: int, view: int) -> torch.Tensor:
        """Return one latent [C, H, W], float32, of an image (view 0) or of its mirror image (view 1)."""
        file, place = self.open_shards.find(image)
        return file.get_slice(VIEWS[view])[place].float()


def _open(path: Path):
    """Open a shard. Raises UserError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        # A damaged file can cause errors of any kind.
        raise UserError(f"{path} is not a complete .safetensors file: {first_line(error)}") from None
