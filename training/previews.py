"""Previews while training: grids of samples and heat maps of the coefficients."""

from pathlib import Path

import torch

from autoencoder import Pixels
from common import first_line
from diffusion.solvers import QUICK, make_sampler
from distributed import World, seed_for
from figures import save_coefficients, save_grid
from models import DiT
from remix import RemixDiT
from training.loggers import MetricLogger

SAMPLES = 16  # images of a grid
GUIDANCE = 1.5


class SamplePreview:
    """Draws samples/<step>.png, a grid of samples, and coefficients/<step>.png, a heat map, into a run's folder.

    Sample i's label and noise are the same each time, functions of the seed and i: one sees them change, and nothing else
    that is random in the run does. autoencoder: what decodes the samples, or None to show three latent channels as colours.
    A picture that cannot be made is reported; training does not end for it.
    """

    def __init__(self, run: Path, config: dict, autoencoder: Pixels | None, world: World, board: MetricLogger, logger):
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
