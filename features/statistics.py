"""Published statistics of latents: LightningDiT's latents_stats.pt, and stat.pt of RAE."""

import torch
from torch import Tensor

from features.autoencoder import Normalization
from runtime.errors import UserError, first_line
from runtime.hub import local_file

# Added to RAE's variances (arXiv 2510.11690).
VARIANCE_EPS = 1e-5
LATENT_STATS_FLAG = dict(
    metavar="FILE",
    help="published statistics of the latents, also hf:OWNER/REPOSITORY/FILE: latents_stats.pt of LightningDiT (mean "
    "and std of each channel) or stat.pt of RAE (mean and var of each position)",
)


def load_statistics(path: str, shape: tuple[int, ...] | None = None) -> Normalization:
    """Read statistics of latents, by which latents are normalized.

    Args:
        path: a file of torch.save, or hf:OWNER/REPOSITORY/FILE. Of `mean` and `std`, each [1, C, 1, 1] or [C], the
            normalization is (z - mean) / std per channel (arXiv 2501.01423). Of `mean` and `var`, each [C, H, W], it is
            (z - mean) / sqrt(var + 1e-5) per position (arXiv 2510.11690).
        shape: shape (C, H, W) of the latents, which the statistics must fit; None for any.

    Returns:
        The normalization.

    Raises:
        UserError: if the file is missing, holds no such statistics, or those of another size.
    """
    try:
        stored = torch.load(local_file(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--latent-stats {path}: {error.strerror or first_line(error)}") from None
    except UserError:
        raise
    except Exception as error:
        # A damaged file can cause errors of any kind.
        raise UserError(f"--latent-stats {path} is not a file of statistics: {first_line(error)}") from None
    stored = stored if isinstance(stored, dict) else {}
    mean, std, var = (stored.get(name) for name in ("mean", "std", "var"))
    spread = std if var is None else var
    if not (isinstance(mean, Tensor) and isinstance(spread, Tensor) and mean.shape == spread.shape):
        raise UserError(f"--latent-stats {path} holds no mean and std, and no mean and var, of equal shapes")
    # [1, C, H, W] -> [C, H, W]
    sizes = mean.shape[1:] if mean.ndim == 4 and len(mean) == 1 else mean.shape
    per_channel = var is None
    channels = len(sizes) == 1 or (mean.ndim == 4 and len(sizes) == 3 and sizes[1:] == (1, 1))
    if not (mean.numel() and (channels if per_channel else len(sizes) == 3)):
        kind = "mean and std, each [1, C, 1, 1]" if per_channel else "mean and var, each [C, H, W]"
        raise UserError(f"--latent-stats {path} holds no {kind}: the shape is {list(mean.shape)}")
    mean, spread = (part.double().reshape(sizes) for part in (mean, spread))
    scale = 1 / spread if per_channel else (spread + VARIANCE_EPS).rsqrt()
    if not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all() and (spread >= 0).all()):
        limit = "std that is not above 0" if per_channel else "var below 0"
        raise UserError(f"--latent-stats {path} holds a number that is not finite, or a {limit}")
    found, needed = (sizes[:1], shape and shape[:1]) if per_channel else (sizes, shape)
    if needed is not None and tuple(found) != tuple(needed):
        numbers = " of {}, but the latents have {}".format(*(" x ".join(map(str, part)) for part in (found, needed)))
        kind = "channels" if per_channel else "numbers"
        raise UserError(f"--latent-stats {path} holds statistics{numbers} {kind}")
    if per_channel:
        return Normalization(scale.flatten().tolist(), mean.flatten().tolist())
    return Normalization.from_tensors(scale, mean)
