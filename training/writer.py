"""Writes the checkpoints of a run in a background thread, and counts the disk space that they need."""

import threading
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from interop.own import checkpoints, save_checkpoint
from runtime.command_line import counted
from runtime.errors import first_line
from runtime.files import check_disk
from training.posthoc_ema import TRACKED_STDS, write_snapshot


@dataclass(frozen=True)
class Retention:
    """Which checkpoints a run writes and keeps.

    Attributes:
        every: steps between checkpoints; one more is written after the last step.
        keep: number of recent checkpoints to keep; None for all.
        keep_every: number of steps, of which every checkpoint of a multiple is kept too.
    """

    every: int
    keep: int | None = None
    keep_every: int | None = None


class CheckpointWriter:
    """Write the checkpoints of a run in a background thread, one at a time, and delete old ones.

    An error, such as a full disk, is logged and does not end the training. The last good checkpoint is kept.

    Args:
        folder: the folder of the checkpoints.
        logger: has the methods `info` and `error`.
        retention: which checkpoints are kept.

    Attributes:
        failed: whether the latest checkpoint could not be written. It is valid after `wait`.
    """

    def __init__(self, folder: Path, logger, retention: Retention):
        self.folder = Path(folder)
        self.logger = logger
        self.retention = retention
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
        """Start writing a snapshot for post-hoc EMA, after the previous file; see `posthoc_ema.write_snapshot`."""
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
        keep, keep_every = self.retention.keep, self.retention.keep_every
        for path in older[keep:] if keep else []:
            if not (keep_every and int(path.stem) % keep_every == 0):
                path.unlink(missing_ok=True)


def count_checkpoints(folder: Path, first_step: int, max_steps: int, retention: Retention) -> int:
    """Return the number of checkpoints that a run needs additional space for.

    Args:
        folder: the run's folder.
        first_step: number of steps already done.
        max_steps: number of steps of the run.
        retention: which checkpoints are written and kept.
    """
    every, keep, keep_every = retention.every, retention.keep, retention.keep_every
    count = -(-max_steps // every) - first_step // every
    if keep:
        always = range(keep_every, max_steps + 1, keep_every) if keep_every else range(0)
        removable = sum(int(path.stem) not in always for path in checkpoints(folder / "checkpoints"))
        kept = sum(step > first_step for step in always)
        # A new checkpoint is written before the oldest one is deleted.
        count = min(count, kept + keep + 1 - removable)
    return max(1, count)


def check_checkpoint_space(folder: Path, model: nn.Module, count: int, n_snapshots: int, snapshot_bytes: int) -> str:
    """Check that a run's checkpoints, and its snapshots for post-hoc EMA, fit on the disk.

    Args:
        folder: the run's folder.
        model: the model in training.
        count: number of checkpoints.
        n_snapshots: number of snapshots of the averages for post-hoc EMA, which checkpoints hold too.
        snapshot_bytes: bytes per number in a snapshot.

    Returns:
        One line with the needed and the free space.

    Raises:
        UserError: if they do not fit.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # float32: the weights, their EMA, and the two moments of AdamW.
    size = 4 * (2 * parameters + 2 * trained)
    what = counted(count, "more checkpoint")
    averages = len(TRACKED_STDS) * trained if n_snapshots else 0
    if n_snapshots:
        size += 4 * averages
        what = f"{counted(n_snapshots, 'snapshot')} of averages and {what}"
    needed = count * size + n_snapshots * averages * snapshot_bytes
    return check_disk(folder, needed, f"{what} of {size / 2**20:,.1f} MiB")
