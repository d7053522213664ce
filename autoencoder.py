"""Between images and what the model sees: diffusers' AutoencoderKL, or nothing at all (pixels)."""

import torch
from torch import Tensor

from common import UserError, first_line

SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}  # the published choices


class Pixels:
    """No autoencoder: the model sees the pixels in [-1, 1]."""

    factor = 1  # image pixels a latent pixel, along a side
    scale = 1.0
    bounded = True  # within [-1, 1]
    channels = (1, 3)  # what a model may have

    def to(self, device: torch.device) -> "Pixels":
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros_like(images)

    def decode(self, samples: Tensor) -> Tensor:
        """Samples [B, C, H, W] -> uint8 RGB images [B, H, W, 3]."""
        samples = samples.expand(-1, 3, -1, -1) if samples.shape[1] == 1 else samples
        return (127.5 * samples + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class Latents(Pixels):
    """diffusers' AutoencoderKL; latents are multiplied by `scale` (the VAE's own scaling factor, 0.18215 for DiT's)."""

    bounded = False

    def __init__(self, name: str):
        from diffusers import AutoencoderKL  # seconds to import, and pixel runs never need it
        from diffusers.utils import logging

        logging.set_verbosity_error()  # what it would warn of is said in one line below
        try:
            self.vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the VAE {name!r} (a hub name or a folder that holds a diffusers AutoencoderKL): {first_line(error)}"
            ) from None
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scale = self.vae.config.scaling_factor
        self.channels = (self.vae.config.latent_channels,)

    def to(self, device: torch.device) -> "Latents":
        self.vae.to(device)
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, C, H / factor, W / factor] of the scaled latents of images in [-1, 1]."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean * self.scale, posterior.std * self.scale

    def decode(self, samples: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> uint8 RGB images [B, H, W, 3]."""
        return super().decode(self.vae.decode(samples / self.scale).sample)


def load_autoencoder(name: str) -> Pixels:
    """Pixels for "none", else "ema" or "mse" (the published VAEs), any hub name, or a local folder. Raises UserError."""
    return Pixels() if name == "none" else Latents(SHORT_NAMES.get(name, name))
