"""The open files of features that are stored in shards."""

from collections.abc import Callable
from typing import Any

import numpy as np

# Every shard that is open holds a file descriptor, and systems limit these, often to 1024.
OPEN_SHARDS = 128


class OpenShards:
    """The shards that this process has open: at most OPEN_SHARDS, of which the first is closed to open another one.

    A pickled copy, such as that of a spawned DataLoader's worker, has none open.

    Args:
        starts: index of the first image of each shard, and the number of images.
        open_shard: function that opens a shard by its number.
    """

    def __init__(self, starts: np.ndarray, open_shard: Callable[[int], Any]):
        self.starts = starts
        self.open_shard = open_shard
        self.opened = {}

    def find(self, image: int) -> tuple[Any, int]:
        """Return the shard that holds an image, and the place of the image in it."""
        shard = int(np.searchsorted(self.starts, image, side="right")) - 1
        if shard not in self.opened:
            if len(self.opened) == OPEN_SHARDS:
                del self.opened[next(iter(self.opened))]
            self.opened[shard] = self.open_shard(shard)
        return self.opened[shard], int(image - self.starts[shard])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": {}}
