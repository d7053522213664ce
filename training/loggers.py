"""Loggers of a run's metrics and pictures: metrics.jsonl, TensorBoard and Weights & Biases."""

import argparse
import importlib.util
import json
import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.errors import UserError, first_line
from runtime.files import atomic_write

LOGGERS = ("tensorboard", "wandb")


def logger_names(text: str) -> str:
    """Check a comma-separated list of installed loggers, as an argparse type."""
    for name in text.split(","):
        if name not in LOGGERS:
            raise argparse.ArgumentTypeError(
                f"unknown logger {name!r}: use {' or '.join(LOGGERS)}, or both separated by a comma"
            )
        # A folder named wandb, which wandb itself creates, is found too, but without an origin.
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise argparse.ArgumentTypeError(f"{name} is not installed: pip install {name}")
    return text


class MetricsFile:
    """metrics.jsonl: one JSON object per report, with all metrics, and one per scored step, with its scores.

    When a run is resumed, the lines of the steps that will be repeated are removed, as are incomplete lines.

    Args:
        path: the file.
        first_step: number of steps already done.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line for line in lines if self._is_before(line, first_step)))

    @staticmethod
    def _is_before(line: str, first_step: int) -> bool:
        """Return whether a line is complete and belongs to one of the steps already done."""
        try:
            # A new run has no line yet, not even one of step 0.
            return line.endswith("\n") and first_step > 0 and json.loads(line)["step"] <= first_step
        except (ValueError, KeyError):
            return False

    def log_metrics(self, step: int, metrics: dict):
        # Arrays, such as the coefficients, are rounded to keep the file small.
        rounded = {
            name: np.round(value, 5).tolist() if isinstance(value, list) else value for name, value in metrics.items()
        }
        length = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(rounded) + "\n")
        except OSError:
            # A full disk may have taken a part of the line, which the next line would continue.
            with suppress(OSError):
                os.truncate(self.path, length)
            raise

    def log_image(self, step: int, name: str, path: Path):
        pass

    def close(self):
        pass


class TensorBoardLogger:
    """TensorBoard, in the folder tensorboard/ of the run.

    Args:
        folder: the run's folder.
        first_step: number of steps already done. TensorBoard hides what was logged before for later steps, by an
            interrupted run, or by an earlier run in the folder if the run is new.
    """

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1 if first_step else 0)

    def log_metrics(self, step: int, metrics: dict):
        for name, value in scalars(metrics).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_image(self, step: int, name: str, path: Path):
        self.writer.add_image(name, np.array(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandbLogger:
    """Weights & Biases. The environment variable WANDB_PROJECT names the project.

    Args:
        folder: the run's folder. Its wandb-id.txt identifies the run, so that a resumed run continues the same one.
        config: the run's configuration.
        first_step: number of steps already done.

    Raises:
        UserError: if wandb cannot start.
    """

    def __init__(self, folder: Path, config: dict, first_step: int):
        import wandb

        id_file = folder / "wandb-id.txt"
        created = [path for path in (id_file, folder / "wandb") if not path.exists()]
        # wandb drops steps below those that it has. A new run must not continue one that was lost.
        if id_file in created or not first_step:
            with atomic_write(id_file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "remix-dit"),
                name=folder.name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=str(folder),
                config=config,
                # log.txt holds the output already.
                settings=wandb.Settings(console="off"),
            )
        # Without a key or a connection wandb may raise any exception.
        except Exception as error:
            for path in created:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            raise UserError(
                f"--log-to wandb: {first_line(error)} (WANDB_MODE=offline needs neither a key nor a network)"
            ) from None

    def log_metrics(self, step: int, metrics: dict):
        self.run.log(scalars(metrics), step=step)

    def log_image(self, step: int, name: str, path: Path):
        import wandb

        self.run.log({name: wandb.Image(str(path))}, step=step)

    def close(self):
        self.run.finish()


class MetricLogger:
    """Passes metrics and pictures to several loggers.

    A logger that fails, for example because the disk is full, is reported, and training continues.

    Args:
        loggers: objects with the methods log_metrics, log_image and close, such as TensorBoardLogger.
        log: the run's logger, which reports failures.
    """

    def __init__(self, loggers: list, log: logging.Logger):
        self.loggers = loggers
        self.log = log

    def log_metrics(self, step: int, metrics: dict):
        """Log the metrics of a step, from `training.statistics.build_metrics`."""
        self._call_all("log_metrics", step, metrics)

    def log_image(self, step: int, name: str, path: Path):
        """Log a picture (a PNG file) of a step."""
        self._call_all("log_image", step, name, path)

    def close(self):
        """Close all loggers."""
        self._call_all("close")

    def _call_all(self, method: str, *arguments):
        """Call a method of every logger. A failure is reported and does not affect the other loggers."""
        for logger in self.loggers:
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                self.log.error(f"COULD NOT LOG to {type(logger).__name__}: {first_line(error)}; training continues")


def open_loggers(names: str | None, folder: Path, config: dict, first_step: int) -> list:
    """Open metrics.jsonl and the loggers of --log-to."""
    names = names.split(",") if names else []
    # wandb may be unable to start. It is opened first, so that nothing has been written to the folder then.
    loggers = [WandbLogger(folder, config, first_step)] if "wandb" in names else []
    if "tensorboard" in names:
        loggers.append(TensorBoardLogger(folder, first_step))
    return [MetricsFile(folder / "metrics.jsonl", first_step), *loggers]


def scalars(metrics: dict) -> dict[str, float]:
    """Return the metrics that are single numbers, and the mean of the experts' entropies."""
    if "entropy" in metrics:
        metrics = metrics | {"entropy": float(np.mean(metrics["entropy"]))}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
