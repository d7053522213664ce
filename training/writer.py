"""Writes the checkpoints of a run in a background thread."""

import threading
from pathlib import Path

from torch import Tensor

from interop.own import checkpoints, save_checkpoint
from runtime.errors import first_line
from training.posthoc_ema import write_snapshot


class CheckpointWriter:
    """Write the checkpoints of a run in a background thread, one at a time, and delete old ones.

    An error, such as a full disk, is logged and does not end the training. The last good checkpoint is kept.

    Args:
        folder: the folder of the checkpoints.
        logger: has the methods `info` and `error`.
        keep: number of most recent checkpoints to keep. None keeps all of them.
        keep_every: checkpoints at multiples of this number of steps are kept as well.

    Attributes:
        failed: whether the latest checkpoint could not be written. It is valid after `wait`.
    """

    def __init__(self, folder: Path, logger, keep: int | None = None, keep_every: int | None = None):
        self.folder = Path(folder)
        self.logger = logger
        self.keep = keep
        self.keep_every = keep_every
        self.thread = None
        self.failed = False

    def save(self, step: int, state: dict):
        """Start writing a state, after the previous checkpoint has been written.

        Args:
            step: number of steps done.
            state: the content, in host memory. It must not be changed afterwards.
        """
        self._start(self._write, self.folder / f"{step:07d}.pt", state)

    def save_snapshot(self, step: int, averages: dict[str, dict[str, Tensor]], dtype: str):
        """Start writing a snapshot for post-hoc EMA, likewise; see `posthoc_ema.write_snapshot` for the arguments."""
        self._start(self._write_snapshot, step, averages, dtype)

    def _start(self, write, *arguments):
        """Call a function in the thread, after the previous file has been written."""
        self.wait()
        self.thread = threading.Thread(target=write, args=arguments)
        self.thread.start()

    def wait(self):
        """Wait until no checkpoint is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, path: Path, state: dict):
        self.failed = True
        try:
            save_checkpoint(path, state)
        except Exception as error:
            # File systems raise errors of many kinds, and none of them may end the training.
            self.logger.error(f"COULD NOT SAVE {path}: {first_line(error)}; the last good checkpoint is kept")
            return
        self.failed = False
        self.logger.info(f"saved {path}")
        try:
            self._delete_old(path)
        except OSError as error:
            self.logger.error(f"could not delete an old checkpoint: {error}")

    def _write_snapshot(self, step: int, averages: dict[str, dict[str, Tensor]], dtype: str):
        try:
            write_snapshot(self.folder.parent, step, averages, dtype)
        except Exception as error:
            self.logger.error(f"COULD NOT SAVE the snapshot of step {step}: {first_line(error)}; training continues")

    def _delete_old(self, saved: Path):
        """Delete the checkpoints that are not to be kept.

        Checkpoints of later steps than `saved` are left alone: they exist when a run was resumed from an earlier step.
        """
        older = [path for path in checkpoints(self.folder) if int(path.stem) <= int(saved.stem)]
        for path in older[self.keep :] if self.keep else []:
            if not (self.keep_every and int(path.stem) % self.keep_every == 0):
                path.unlink(missing_ok=True)
