"""Pictures while training: a grid of samples, and a heat map of the mixing coefficients."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffusion import Process
from diffusion.samplers import time_tensor
from features.autoencoder import Autoencoder, Normalization, Pixels, load_autoencoder
from features.dataset import FeatureDataset
from figures import save_coefficients, save_grid
from interop.shapes import PUBLISHED_VAE
from models import classifier_free_guidance, data_shape
from remix import Remix
from runtime.command_line import counted
from runtime.errors import UserError, first_line
from runtime.processes import SampleGenerators
from training.experts import experts_of

# Number of images in a grid, and their guidance scale.
SAMPLES = 16
GUIDANCE = 1.5


@dataclass(frozen=True)
class SamplePreview:
    """Draws samples/<step>.png and coefficients/<step>.png in a run's folder.

    The label and noise of sample i depend only on the seed and i, so the grids of all steps show the same samples.
    Drawing does not change any other random draw of the run. A plain DiT has no coefficients.

    Attributes:
        folder: the run's folder.
        model_name: name of the model, for the title of the heat map.
        seed: global seed of the run.
        class_names: names of the classes; None to show their numbers.
        autoencoder: decodes the samples; None to show three latent channels as colours.
        process: the process; None to draw no samples.
        autocast: function that returns the context the model runs in.
        device: device that the model runs on.
        log: the run's logger, which reports pictures that cannot be drawn.
    """

    folder: Path
    model_name: str
    seed: int
    class_names: list[str] | None
    autoencoder: Autoencoder | None
    process: Process | None
    autocast: Callable[[], AbstractContextManager]
    device: torch.device
    log: logging.Logger

    def draw(self, step: int, model: nn.Module) -> dict[str, Path]:
        """Draw the pictures of a step.

        Args:
            step: number of steps done.
            model: the model to show, in eval mode. It is moved to the device.

        Returns:
            The files that were written, by their kind: "samples" or "coefficients".
        """
        kinds = {}
        if self.process is not None:
            kinds["samples"] = self._draw_samples
        if experts_of(model).n_experts:
            kinds["coefficients"] = self._draw_coefficients
        pictures = {}
        for kind, draw in kinds.items():
            path = self.folder / kind / f"{step:07d}.png"
            try:
                draw(path, model)
                pictures[kind] = path
            # For example a full disk, or too little GPU memory for the samples.
            except Exception as error:
                self.log.error(f"COULD NOT DRAW {path}: {first_line(error)}; training continues")
        return pictures

    def _draw_coefficients(self, path: Path, model: Remix):
        """Draw the heat map of the mixing coefficients."""
        save_coefficients(path, model, f"{self.model_name}: mixing coefficients")

    @torch.no_grad()
    def _draw_samples(self, path: Path, model: nn.Module):
        """Draw the grid of samples, with classifier-free guidance and few sampling steps."""
        backbone = experts_of(model).backbone.config
        device = self.device
        model.to(device)
        noise = SampleGenerators(self.seed, range(SAMPLES)).randn(data_shape(backbone)).to(device)
        classes = torch.arange(SAMPLES) * backbone["num_classes"] // SAMPLES
        # For guidance, the second half of the batch has the null class.
        labels = torch.cat([classes, torch.full_like(classes, backbone["num_classes"])]).to(device)

        def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
            both = torch.cat([x, x])
            with self.autocast():
                return classifier_free_guidance(model, both, time_tensor(both, time), labels, GUIDANCE)[: len(x)]

        name, steps = self.process.quick
        sample = self.process.make_sampler(name, steps)
        bounded = self.autoencoder is not None and self.autoencoder.bounded
        samples = sample(denoise, noise, clip_denoised=bounded)
        captions = [self.class_names[c] if self.class_names else str(c) for c in classes.tolist()]
        save_grid(path, self._decode(samples).cpu().numpy(), captions, columns=8)

    def _decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Convert samples [n, C, H, W] to images [n, H, W, 3], uint8."""
        if self.autoencoder is None:
            # Latents have unit variance: a third of them is mostly within [-1, 1].
            return Pixels().decode(samples[:, : 3 if samples.shape[1] >= 3 else 1] / 3)
        autoencoder = self.autoencoder.to(samples.device)
        # Decoding needs much memory, so it takes a few samples at a time.
        return torch.cat([autoencoder.decode(part) for part in samples.split(4)])


def choose_decoder(
    sample_every: int, can_sample: bool, vae: str | None, dataset: FeatureDataset, loaded: Autoencoder | None
) -> tuple[Autoencoder | None, str]:
    """Choose what decodes the samples that are drawn while training.

    Args:
        sample_every: steps between pictures; 0 for none.
        can_sample: whether the run trains on all noise levels.
        vae: name of the VAE; None to show latents as colours.
        dataset: the encoded images.
        loaded: that VAE, or what decodes pixels, if it has been loaded already.

    Returns:
        The decoder, or None if nothing is decoded; and a line that says what will be drawn.

    Raises:
        UserError: if the VAE does not decode as many channels as the features have.
    """
    if not sample_every:
        return None, "no pictures (--sample-every 0)"
    when = f"pictures every {counted(sample_every, 'step')}"
    if not can_sample:
        return None, f"{when}, without samples: the model is trained on some noise levels only"
    name = vae or ("none" if dataset.vae == "none" else None)
    if name is None:
        return None, f"{when}; samples show three latent channels as colours (--vae decodes them)"
    if loaded:
        return loaded, when
    autoencoder = load_autoencoder(name)
    if dataset.shape[0] not in autoencoder.channels:
        raise UserError(
            f"--vae {name} does not decode features of {dataset.shape[0]} channels, which {dataset.path} holds"
        )
    if dataset.normalization or dataset.shape[0] == 4:
        autoencoder.normalization = dataset.normalization or Normalization.from_record(PUBLISHED_VAE)
    return autoencoder, when
