"""Conversion between images and what the model denoises: a VAE's latents (diffusers' AutoencoderKL) or plain pixels."""

from pathlib import Path

import torch
from torch import Tensor

from common import UserError, first_line
from hub import offline

# The VAEs published with latent diffusion and used by DiT.
SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class Pixels:
    """No autoencoder: the model denoises pixels in [-1, 1].

    Attributes:
        factor: image pixels per latent pixel, along each side.
        scale: factor by which the VAE's latents are multiplied.
        bounded: whether the model's data lie in [-1, 1].
        channels: numbers of channels that a model may have.
    """

    factor = 1
    scale = 1.0
    bounded = True
    channels = (1, 3)

    def to(self, device: torch.device) -> "Pixels":
        """Move the weights to a device and return self."""
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the encoded images: the images themselves and zeros.

        Args:
            images: images [B, C, H, W] in [-1, 1].
        """
        return images, torch.zeros_like(images)

    def decode(self, samples: Tensor) -> Tensor:
        """Convert samples to images.

        Args:
            samples: samples [B, C, H, W]; one channel is repeated to give three.

        Returns:
            RGB images [B, H, W, 3], uint8.
        """
        samples = samples.expand(-1, 3, -1, -1) if samples.shape[1] == 1 else samples
        return (127.5 * samples + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class Latents(Pixels):
    """diffusers' AutoencoderKL, whose latents are multiplied by its scaling factor (0.18215 for DiT's VAEs).

    Args:
        name: name on the Hugging Face hub, or a local folder.

    Raises:
        UserError: if the VAE cannot be loaded.
    """

    bounded = False

    def __init__(self, name: str):
        # The import takes seconds, and runs on pixels never need it.
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        # The one-line error below replaces diffusers' warnings.
        logging.set_verbosity_error()
        on_hub = not (Path(name).exists() or Path(name).is_absolute())
        cached_only = on_hub and offline()
        try:
            vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False, local_files_only=cached_only)
        except (OSError, ValueError) as error:
            reason = "the Hugging Face hub cannot be reached" if cached_only else first_line(error)
            raise UserError(
                f"cannot load the VAE {name!r} ({reason}): use --vae PATH for a local folder of a diffusers "
                "AutoencoderKL, or --vae none for models of pixels"
            ) from None
        self.vae = vae.eval().requires_grad_(False)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scale = self.vae.config.scaling_factor
        self.channels = (self.vae.config.latent_channels,)

    def to(self, device: torch.device) -> "Latents":
        self.vae.to(device)
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the scaled latents, each [B, C, H / factor, W / factor].

        Args:
            images: images [B, 3, H, W] in [-1, 1].
        """
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean * self.scale, posterior.std * self.scale

    def decode(self, samples: Tensor) -> Tensor:
        """Convert scaled latents [B, C, h, w] to RGB images [B, h * factor, w * factor, 3], uint8."""
        return super().decode(self.vae.decode(samples / self.scale).sample)


def load_autoencoder(name: str) -> Pixels:
    """Load an autoencoder by name.

    Args:
        name: "none" for pixels, "ema" or "mse" for the published VAEs, another name on the Hugging Face hub, or a local
            folder.

    Raises:
        UserError: if the VAE cannot be loaded.
    """
    return Pixels() if name == "none" else Latents(SHORT_NAMES.get(name, name))
