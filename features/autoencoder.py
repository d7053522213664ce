"""Conversion between images and what the model denoises: a VAE's latents (diffusers' AutoencoderKL) or plain pixels."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError, first_line
from runtime.hub import offline

# The VAEs published with latent diffusion and used by DiT.
SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
# The default of AutoencoderKL.
DEFAULT_SCALING_FACTOR = 0.18215


@dataclass(frozen=True)
class Normalization:
    """The affine map from a VAE's latents z to what the model denoises: x = (z - shift) * scale.

    Attributes:
        scale: the factor, one for all channels or a list with one per channel.
        shift: what is subtracted, one number for all channels or a list with one per channel.
    """

    scale: float | list[float] = 1.0
    shift: float | list[float] = 0.0

    @classmethod
    def from_vae(cls, config: Mapping) -> "Normalization":
        """Read the normalization from the config of a diffusers.AutoencoderKL, as diffusers' pipelines do.

        With `latents_mean` and `latents_std`, as of VA-VAE, it is (z - mean) / std * scaling_factor per channel.
        Otherwise it is (z - shift_factor) * scaling_factor.

        Raises:
            ValueError: if an entry is not a finite number, if the scaling factor is not above 0, or if the statistics
                are incomplete or do not suit the number of channels.
        """
        scale, shift = config.get("scaling_factor", DEFAULT_SCALING_FACTOR), config.get("shift_factor")
        shift = 0.0 if shift is None else shift
        if not _finite([scale, shift]) or scale <= 0:
            raise ValueError("scaling_factor must be a number above 0, and shift_factor a number or null")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None and std is None:
            return cls(float(scale), float(shift))
        channels = config.get("latent_channels", 4)
        if not (_finite(mean) and _finite(std) and len(mean) == len(std) == channels and min(std) > 0):
            raise ValueError(f"latents_mean and latents_std must be {channels} numbers each, and latents_std above 0")
        # AutoencoderKL stores its default also in the config of a VAE whose statistics alone give unit variance.
        scale = 1.0 if scale == DEFAULT_SCALING_FACTOR else scale
        return cls([scale / s for s in std], list(mean))

    @classmethod
    def from_record(cls, data: Mapping) -> "Normalization":
        """Read the normalization from an index of features or from the "data" part of a checkpoint's config."""
        return cls(data["scale"], data["shift"])

    def record(self) -> dict:
        """Return the entries for an index of features or a config."""
        return {"scale": self.scale, "shift": self.shift}

    def vae_config(self) -> dict:
        """Return the entries for the config of a diffusers.AutoencoderKL."""
        if isinstance(self.scale, list):
            std = [1 / scale for scale in self.scale]
            return dict(scaling_factor=1.0, shift_factor=None, latents_mean=self.shift, latents_std=std)
        return dict(scaling_factor=self.scale, shift_factor=self.shift or None, latents_mean=None, latents_std=None)

    def apply(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize the mean and the standard deviation of latents, each [B, C, H, W]; only the mean is shifted."""
        scale = _per_channel(self.scale, mean)
        return (mean - _per_channel(self.shift, mean)) * scale, std * scale

    def invert(self, x: Tensor) -> Tensor:
        """Convert what the model denoises, [B, C, H, W], to latents."""
        return x / _per_channel(self.scale, x) + _per_channel(self.shift, x)


def _finite(values) -> bool:
    """Return whether something read from a config is a list of finite numbers."""
    return isinstance(values, list | tuple) and all(type(x) in (int, float) and math.isfinite(x) for x in values)


def _per_channel(value: float | list[float], like: Tensor) -> float | Tensor:
    """Return a list as a tensor [C, 1, 1] of the type and on the device of another tensor; a number as it is."""
    return like.new_tensor(value)[:, None, None] if isinstance(value, list) else value


class Autoencoder:
    """Base class of what turns images into the data that a model denoises, and its samples into images.

    Attributes:
        factor: image pixels per pixel of the data, along each side.
        normalization: what is done to the latents.
        bounded: whether the data lie in [-1, 1].
        channels: numbers of channels that a model may have.
    """

    factor: int
    normalization = Normalization()
    bounded: bool
    channels: tuple[int, ...]

    def to(self, device: torch.device) -> "Autoencoder":
        """Move the weights to a device and return self."""
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of encoded images, each [B, C, H / factor, W / factor].

        Args:
            images: images [B, C, H, W] in [-1, 1].
        """
        raise NotImplementedError

    def decode(self, samples: Tensor) -> Tensor:
        """Convert samples to images.

        Args:
            samples: samples [B, C, H, W].

        Returns:
            RGB images [B, H * factor, W * factor, 3], uint8.
        """
        raise NotImplementedError


class Pixels(Autoencoder):
    """No autoencoder: the model denoises pixels in [-1, 1], of one or three channels."""

    factor = 1
    bounded = True
    channels = (1, 3)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images themselves, and zeros."""
        return images, torch.zeros_like(images)

    def decode(self, samples: Tensor) -> Tensor:
        return to_uint8(samples)


class Latents(Autoencoder):
    """diffusers' AutoencoderKL, whose latents are normalized as its config says (times 0.18215 for DiT's VAEs).

    Args:
        name: name on the Hugging Face hub, or a local folder. A hub name may end with the folder that holds the VAE,
            as in OWNER/REPOSITORY/vae.

    Raises:
        UserError: if the VAE cannot be loaded.
    """

    bounded = False

    def __init__(self, name: str):
        from diffusers import AutoencoderKL

        self.normalization = load_normalization(name)
        with _located(name) as (repository, where):
            vae = AutoencoderKL.from_pretrained(repository, low_cpu_mem_usage=False, **where)
        self.vae = vae.eval().requires_grad_(False)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.channels = (self.vae.config.latent_channels,)

    def to(self, device: torch.device) -> "Latents":
        self.vae.to(device)
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of the normalized latents, see `Autoencoder.moments`."""
        posterior = self.vae.encode(images).latent_dist
        return self.normalization.apply(posterior.mean, posterior.std)

    def decode(self, samples: Tensor) -> Tensor:
        """Convert normalized latents to images, see `Autoencoder.decode`."""
        return to_uint8(self.vae.decode(self.normalization.invert(samples)).sample)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images [B, 1 or 3, H, W] in [-1, 1] to [B, H, W, 3], uint8; one channel is repeated to give three."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load_autoencoder(name: str) -> Autoencoder:
    """Load an autoencoder by name.

    Args:
        name: "none" for pixels, "ema" or "mse" for the published VAEs, or the name of `Latents`.

    Raises:
        UserError: if the VAE cannot be loaded.
    """
    return Pixels() if name == "none" else Latents(SHORT_NAMES.get(name, name))


def load_normalization(name: str) -> Normalization:
    """Read the normalization of an autoencoder's latents from its config, without its weights.

    Args:
        name: a name as of `load_autoencoder`.

    Raises:
        UserError: if the config cannot be read, or is not that of an AutoencoderKL.
    """
    if name == "none":
        return Normalization()
    # The import takes seconds, and runs on pixels never need it.
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    # The one-line error replaces diffusers' warnings.
    logging.set_verbosity_error()
    with _located(SHORT_NAMES.get(name, name)) as (repository, where):
        config = AutoencoderKL.load_config(repository, **where)
        kind = config.get("_class_name", "AutoencoderKL")
        # Another class would be read as an AutoencoderKL with random weights.
        if kind != "AutoencoderKL":
            raise ValueError(f"it is an {kind}")
        return Normalization.from_vae(config)


@contextmanager
def _located(name: str) -> Iterator[tuple[str, dict]]:
    """Yield where diffusers finds a VAE: the folder or repository, and further arguments. Errors become UserError."""
    on_hub = not (Path(name).exists() or Path(name).is_absolute())
    cached_only = on_hub and offline()
    parts = name.split("/") if on_hub else [name]
    repository, subfolder = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        yield repository, dict(subfolder=subfolder, local_files_only=cached_only)
    except (OSError, ValueError) as error:
        reason = "the Hugging Face hub cannot be reached" if cached_only else first_line(error)
        raise UserError(
            f"cannot load the VAE {name!r} ({reason}): use --vae PATH for a local folder of a diffusers "
            "AutoencoderKL, or --vae none for models of pixels"
        ) from None
