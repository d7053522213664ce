"""Logging backends of a run: TensorBoard and Weights & Biases."""

import argparse
import importlib.util
import os
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, atomic_write, first_line

LOGGERS = ("tensorboard", "wandb")


def logger_names(text: str) -> list[str]:
    """An argparse type: loggers, separated by commas, that are installed."""
    names = text.split(",")
    for name in names:
        if name not in LOGGERS:
            raise argparse.ArgumentTypeError(
                f"unknown logger {name!r}: use {' or '.join(LOGGERS)}, or both with a comma"
            )
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name, which wandb leaves about
            raise argparse.ArgumentTypeError(f"{name} is not installed: pip install {name}")
    return names


class MetricLogger:
    """Sends a run's numbers and pictures to the loggers named; what one of them cannot take is reported, and not sent again.

    Raises UserError for a logger that cannot be started. A resumed run goes on in the same place.
    """

    def __init__(self, names: list[str] | None, run: Path, config: dict, first_step: int, logger):
        names = names or []
        self.logger, self.tensorboard, self.wandb = logger, None, None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=first_step + 1 if first_step else None)
        if "wandb" in names:
            self.wandb = start_wandb(run, config)

    def numbers(self, step: int, values: dict[str, float]):
        with self._reporting():
            if self.tensorboard:
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, step)
                self.tensorboard.flush()
            if self.wandb:
                self.wandb.log(values, step=step)

    def picture(self, step: int, name: str, path: Path):
        with self._reporting():
            if self.tensorboard:
                self.tensorboard.add_image(name, np.array(Image.open(path).convert("RGB")), step, dataformats="HWC")
                self.tensorboard.flush()
            if self.wandb:
                import wandb

                self.wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self):
        with self._reporting():
            if self.tensorboard:
                self.tensorboard.close()
            if self.wandb:
                self.wandb.finish()

    @contextmanager
    def _reporting(self):
        try:
            yield
        except Exception as error:  # a full disk, a lost connection: a logger is not worth a run
            self.logger.error(f"COULD NOT LOG: {first_line(error)}; training goes on")


def start_wandb(run: Path, config: dict):
    """Start the run of Weights & Biases that belongs to the folder, or go on with it; WANDB_PROJECT names the project."""
    import wandb

    record = run / "wandb-id.txt"
    if not record.exists():
        with atomic_write(record) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8])
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "remix-dit"),
            name=run.name,
            id=record.read_text().strip(),
            resume="allow",
            dir=run,
            config=config,
            settings=wandb.Settings(console="off"),  # log.txt has it
        )
    except Exception as error:  # no key, no connection
        raise UserError(
            f"--log-to wandb: {first_line(error)} (WANDB_MODE=offline needs neither key nor network)"
        ) from None
