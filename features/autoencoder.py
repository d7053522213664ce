"""Conversion between images and what the model denoises: an autoencoder's latents or plain pixels.

The autoencoders are diffusers' AutoencoderKL (a VAE) and AutoencoderRAE (a frozen image encoder and its decoder).
"""

import base64
import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError, first_line
from runtime.hub import offline

# The VAEs published with latent diffusion and used by DiT.
SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
# The default of AutoencoderKL.
DEFAULT_SCALING_FACTOR = 0.18215
# What AutoencoderRAE adds to its standard deviations.
RAE_EPS = 1e-5


@dataclass(frozen=True)
class Normalization:
    """The affine map from a VAE's latents z to what the model denoises: x = (z - shift) * scale.

    Attributes:
        scale: the factor, one for all channels, a list with one per channel, or for one per position [C, H, W] the text
            that `pack` makes of them.
        shift: what is subtracted, likewise.
    """

    scale: float | list[float] | str = 1.0
    shift: float | list[float] | str = 0.0

    @classmethod
    def from_tensors(cls, scale: Tensor, shift: Tensor) -> "Normalization":
        """Return the normalization with one factor and one shift per position, each [C, H, W]."""
        return cls(pack(scale), pack(shift))

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
    def from_rae(cls, config: Mapping) -> "Normalization":
        """Read the normalization from the config of a diffusers.AutoencoderRAE.

        It is (z - latents_mean) / (latents_std + 1e-5) * scaling_factor, with numbers for each position or channel.

        Raises:
            ValueError: if the scaling factor is not a number above 0, or if the statistics are incomplete, of different
                shapes, or not finite.
        """
        scale = config.get("scaling_factor", 1.0)
        if not _finite([scale]) or scale <= 0:
            raise ValueError("scaling_factor must be a number above 0")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None and std is None:
            return cls(float(scale))
        try:
            mean, std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError("latents_mean and latents_std must be lists of numbers") from None
        if mean.shape != std.shape or not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
            raise ValueError(
                "latents_mean and latents_std must be finite numbers of equal shapes, and latents_std >= 0"
            )
        factor = scale / (std + RAE_EPS)
        if mean.numel() == 1:
            return cls(factor.item(), mean.item())
        return cls.from_tensors(factor.squeeze(0), mean.squeeze(0))

    @classmethod
    def from_record(cls, data: Mapping) -> "Normalization":
        """Read the normalization from an index of features or from the "data" part of a checkpoint's config."""
        return cls(data["scale"], data["shift"])

    def record(self) -> dict:
        """Return the entries for an index of features or a config."""
        return {"scale": self.scale, "shift": self.shift}

    def vae_config(self) -> dict:
        """Return the entries for the config of a diffusers.AutoencoderKL.

        Raises:
            UserError: if each position has a number of its own, which that class does not have.
        """
        if isinstance(self.scale, str):
            raise UserError(
                "an AutoencoderKL of diffusers has no normalization per position, as this model's latents do"
            )
        if isinstance(self.scale, list):
            std = [1 / scale for scale in self.scale]
            return dict(scaling_factor=1.0, shift_factor=None, latents_mean=self.shift, latents_std=std)
        return dict(scaling_factor=self.scale, shift_factor=self.shift or None, latents_mean=None, latents_std=None)

    def apply(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize the mean and the standard deviation of latents, each [B, C, H, W]; only the mean is shifted."""
        return self.normalize(mean), std * _per_channel(self.scale, mean)

    def normalize(self, z: Tensor) -> Tensor:
        """Convert latents [..., C, H, W] to what the model denoises."""
        return (z - _per_channel(self.shift, z)) * _per_channel(self.scale, z)

    def invert(self, x: Tensor) -> Tensor:
        """Convert what the model denoises, [B, C, H, W], to latents."""
        return x / _per_channel(self.scale, x) + _per_channel(self.shift, x)


def _finite(values) -> bool:
    """Return whether something read from a config is a list of finite numbers."""
    return isinstance(values, list | tuple) and all(type(x) in (int, float) and math.isfinite(x) for x in values)


def pack(values: Tensor) -> str:
    """Return the numbers of a tensor, rounded to float32, as text: float32, its shape, and the bytes in base64."""
    shape = "x".join(map(str, values.shape))
    return f"float32:{shape}:{base64.b64encode(values.float().numpy().astype('<f4').tobytes()).decode()}"


@functools.cache
def unpack(text: str) -> Tensor:
    """Return the tensor that `pack` has made a text of, float32.

    Raises:
        ValueError: if it is another text.
    """
    kind, _, rest = text.partition(":")
    shape, _, numbers = rest.partition(":")
    if kind != "float32":
        raise ValueError(f"{text[:20]!r} does not stand for numbers")
    values = np.frombuffer(base64.b64decode(numbers, validate=True), "<f4").astype(np.float32)
    return torch.from_numpy(values).view(*map(int, shape.split("x")))


def _per_channel(value: float | list[float] | str, like: Tensor) -> float | Tensor:
    """Return what a `Normalization` holds as it multiplies latents, in the type and on the device of these.

    A number is returned as it is, a list as a tensor [C, 1, 1], and a text as a tensor [C, H, W].
    """
    if isinstance(value, str):
        return unpack(value).to(like)
    return like.new_tensor(value)[:, None, None] if isinstance(value, list) else value


class Autoencoder:
    """Base class of what turns images into the data that a model denoises, and its samples into images.

    Attributes:
        factor: image pixels per pixel of the data, along each side.
        normalization: what is done to the latents.
        bounded: whether the data lie in [-1, 1].
        channels: numbers of channels that a model may have.
        draws: whether encoding gives a distribution, from which features are drawn.
        image_size: the only side of images, in pixels, that it encodes; None for any multiple of the factor.
    """

    factor: int
    normalization = Normalization()
    bounded: bool
    channels: tuple[int, ...]
    draws = False
    image_size: int | None = None

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
    draws = True

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


class RepresentationLatents(Autoencoder):
    """diffusers' AutoencoderRAE: the tokens of a frozen image encoder, and the decoder that was trained for them.

    Its encode and decode normalize the latents. Here this is undone, and `normalization` does the same instead, so that
    it is recorded and can be replaced by published statistics.

    Args:
        name: as for `Latents`.

    Raises:
        UserError: if the autoencoder cannot be loaded.
    """

    bounded = False

    def __init__(self, name: str):
        from diffusers import AutoencoderRAE

        self.normalization = load_normalization(name)
        with _located(name) as (repository, where):
            rae = AutoencoderRAE.from_pretrained(repository, low_cpu_mem_usage=False, **where)
        mean, std = rae._latents_mean, rae._latents_std
        if rae.config.latents_mean is not None and not torch.equal(mean, torch.tensor(rae.config.latents_mean)):
            raise UserError(f"--vae {name}: latents_mean of its config is not that of its weights")
        # It divides by the standard deviation plus RAE_EPS.
        rae._latents_mean, rae._latents_std = torch.zeros_like(mean), torch.full_like(std, 1 - RAE_EPS)
        rae.register_to_config(scaling_factor=1.0)
        self.vae = rae.eval().requires_grad_(False)
        self.factor = rae.decoder_patch_size
        self.image_size = rae.decoder_image_size
        self.channels = (rae.config.encoder_hidden_size,)

    def to(self, device: torch.device) -> "RepresentationLatents":
        self.vae.to(device)
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized latents, and zeros, see `Autoencoder.moments`."""
        z = self.normalization.normalize(self.vae.encode(images / 2 + 0.5).latent)
        return z, torch.zeros_like(z)

    def decode(self, samples: Tensor) -> Tensor:
        """Convert normalized latents to images, see `Autoencoder.decode`."""
        return to_uint8(2 * self.vae.decode(self.normalization.invert(samples)).sample - 1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images [B, 1 or 3, H, W] in [-1, 1] to [B, H, W, 3], uint8; one channel is repeated to give three."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load_autoencoder(name: str) -> Autoencoder:
    """Load an autoencoder by name.

    Args:
        name: "none" for pixels, "ema" or "mse" for the published VAEs, or the name of `Latents` or of
            `RepresentationLatents`.

    Raises:
        UserError: if the VAE cannot be loaded.
    """
    if name == "none":
        return Pixels()
    name = SHORT_NAMES.get(name, name)
    return CLASSES[_read_config(name)[0]](name)


# By the names of diffusers' classes.
CLASSES = {"AutoencoderKL": Latents, "AutoencoderRAE": RepresentationLatents}


def encoder_name(name: str) -> str:
    """Return a name that is equal for autoencoders that encode alike: the published VAEs differ in the decoder only.

    Args:
        name: a name as of `load_autoencoder`.
    """
    if SHORT_NAMES.get(name, name) in SHORT_NAMES.values():
        return SHORT_NAMES["ema"]
    return os.path.normpath(name)


def weights_fingerprint(name: str) -> str | None:
    """Return a hash of the weights of an autoencoder in a local folder, whose content may change under the same name.

    Args:
        name: a name as of `load_autoencoder`. Pixels and names on the hub have no such hash.
    """
    folder = Path(SHORT_NAMES.get(name, name))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if name == "none" or not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_normalization(name: str) -> Normalization:
    """Read the normalization of an autoencoder's latents from its config, without its weights.

    Args:
        name: a name as of `load_autoencoder`.

    Raises:
        UserError: if the config cannot be read, or is not that of a class of `CLASSES`.
    """
    return Normalization() if name == "none" else _read_config(SHORT_NAMES.get(name, name))[1]


def _read_config(name: str) -> tuple[str, Normalization]:
    """Return the class of an autoencoder and its normalization, from its config. Raises UserError if it is another."""
    # The import takes seconds, and runs on pixels never need it.
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    # The one-line error replaces diffusers' warnings.
    logging.set_verbosity_error()
    with _located(name) as (repository, where):
        config = AutoencoderKL.load_config(repository, **where)
        kind = config.get("_class_name", "AutoencoderKL")
        # Another class would be read as an AutoencoderKL with random weights.
        if kind not in CLASSES:
            raise ValueError(f"it is an {kind}")
        return kind, Normalization.from_rae(config) if kind == "AutoencoderRAE" else Normalization.from_vae(config)


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
            "AutoencoderKL or AutoencoderRAE, or --vae none for models of pixels"
        ) from None
