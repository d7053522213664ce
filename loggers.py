"""What a run shows while it trains: pictures in its folder and, if asked for, TensorBoard or Weights & Biases."""

import argparse
import importlib.util
import os
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autoencoder import Pixels
from common import UserError, atomic_write, first_line
from distributed import World, seed_for
from figures import save_coefficients, save_grid
from models import DiT
from remix import RemixDiT
from solvers import QUICK, make_sampler

LOGGERS = ("tensorboard", "wandb")
SAMPLES = 16  # images of a grid
GUIDANCE = 1.5


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


class Board:
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


class Gallery:
    """Draws samples/<step>.png, a grid of samples, and coefficients/<step>.png, a heat map, into a run's folder.

    Sample i's label and noise are the same each time, functions of the seed and i: one sees them change, and nothing else
    that is random in the run does. autoencoder: what decodes the samples, or None to show three latent channels as colours.
    A picture that cannot be made is reported; training does not end for it.
    """

    def __init__(self, run: Path, config: dict, autoencoder: Pixels | None, world: World, board: Board, logger):
        self.run, self.world, self.board, self.logger = run, world, board, logger
        self.autoencoder = autoencoder and autoencoder.to(world.device)
        self.training, backbone = config["training"], config["model"]["backbone"]
        self.title = f"{config['model']['name']}: mixing coefficients"
        self.classes, self.n_classes = config["data"]["classes"], backbone["num_classes"]
        self.shape = (backbone["in_channels"], backbone["input_size"], backbone["input_size"])
        self.labels = torch.arange(SAMPLES) * self.n_classes // SAMPLES
        self.process, self.loop = config["diffusion"], None

    def draw(self, step: int, model: DiT | RemixDiT):
        """Draw what `model`, in eval mode, has learned by a step."""
        jobs = {"samples": self._samples, "coefficients": self._coefficients}
        if list(self.training["timesteps"]) != [0, 1000]:
            del jobs["samples"]  # an independent expert cannot sample alone
        if not isinstance(model, RemixDiT):
            del jobs["coefficients"]
        for name, job in jobs.items():
            path = self.run / name / f"{step:07d}.png"
            try:
                job(path, model)
            except Exception as error:  # a full disk, or no memory left for the samples
                self.logger.error(f"COULD NOT DRAW {path}: {first_line(error)}; training goes on")
            else:
                self.board.picture(step, name, path)

    def _coefficients(self, path: Path, model: RemixDiT):
        save_coefficients(path, model, self.title)

    @torch.no_grad()
    def _samples(self, path: Path, model: DiT | RemixDiT):
        if self.loop is None:  # it imports diffusers: not for runs that never draw
            self.loop, _ = make_sampler(*QUICK, **self.process)
        device = self.world.device
        seeds = [seed_for(self.training["global_seed"], i) for i in range(SAMPLES)]
        noise = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.n_classes)]).to(device)

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self.world.autocast(self.training["precision"]):
                return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, GUIDANCE)[: len(x)]

        samples = self.loop(
            denoise,
            (SAMPLES, *self.shape),
            noise=torch.stack(noise).to(device),
            clip_denoised=self.autoencoder is not None and self.autoencoder.bounded,
            device=device,
        )
        if self.autoencoder is None:
            images = Pixels().decode(samples[:, : 3 if len(samples[0]) >= 3 else 1] / 3)  # latents are of unit variance
        else:
            images = torch.cat([self.autoencoder.decode(part) for part in samples.split(4)])
        captions = [self.classes[label] if self.classes else str(label) for label in self.labels.tolist()]
        save_grid(path, images.cpu().numpy(), captions, columns=8)
