"""The intervals of noise levels of the experts, and how different the experts are."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.intervals import (
    LEVEL_DTYPES,
    check_levels,
    find_interval,
    inner_boundaries,
    separates_steps,
    warn_of_short_intervals,
)
from mixing.coefficients import Coefficients, prior_bases
from mixing.fsdp import gathered, is_sharded, reshard
from mixing.low_rank import LowRankLinear


class ExpertIntervals(nn.Module):
    """The intervals of noise levels of N experts.

    Args:
        boundaries: N + 1 increasing noise levels. Expert i denoises boundaries[i] <= level < boundaries[i + 1].
        n_basis: number of bases K.
        device: device of the tensors.
        directions, unrounded: see `diffusion.intervals.inner_boundaries`.

    Attributes:
        inner: the N - 1 boundaries between experts for each type of noise levels, [len(LEVEL_DTYPES), N - 1].
        prior: the basis of each expert in the prior [N].
    """

    def __init__(
        self,
        boundaries: list[float],
        n_basis: int,
        device: torch.device,
        directions: tuple[bool, ...],
        unrounded: Sequence[float],
    ):
        super().__init__()
        self.boundaries = boundaries
        self.n_basis = n_basis
        # How levels of each type are compared with the boundaries.
        self.rules = directions, tuple(unrounded)
        self.separated = [dtype for dtype in LEVEL_DTYPES if separates_steps(boundaries, dtype, *self.rules)]
        self._register(device)

    def _register(self, device: torch.device):
        """Create the buffers on a device."""
        prior = prior_bases(self.n_basis, len(self.boundaries) - 1, device)
        # For all types, so that no call copies them to the device.
        inner = [inner_boundaries(self.boundaries, dtype, *self.rules) for dtype in LEVEL_DTYPES]
        inner = torch.tensor(inner, dtype=torch.float32, device=device)
        self.register_buffer("prior", prior, persistent=False)
        self.register_buffer("inner", inner, persistent=False)

    def _apply(self, *args, **kwargs) -> "ExpertIntervals":
        """Move the buffers, and keep the boundaries in float32."""
        super()._apply(*args, **kwargs)
        # They may come from the meta device, where they have no values.
        self._register(self.inner.device)
        return self

    def find(self, level: Tensor | float, dtype: torch.dtype) -> Tensor | int:
        """Return the index of the expert that denoises each noise level, a tensor or a number.

        Args:
            level: the noise levels, in float32.
            dtype: one of `LEVEL_DTYPES`, in which they have arrived.
        """
        if not isinstance(level, Tensor):
            return find_interval(self.boundaries, level, dtype, *self.rules)
        if dtype not in self.separated and not torch.compiler.is_compiling():
            warn_of_short_intervals(dtype)
        return torch.bucketize(level.contiguous(), self.inner[LEVEL_DTYPES.index(dtype)], right=True)

    def check(self, level: Tensor, dtype: torch.dtype):
        """Raise ValueError if a noise level is outside the boundaries. The host waits for the device."""
        check_levels(self.boundaries, *torch.stack(level.aminmax()).tolist(), dtype, self.rules[0])


def restore_intervals(remix: nn.Module, incompatible_keys):
    """Give the intervals of a Remix their values after its parameters were loaded with assign=True.

    Parameters leave the meta device then, without `_apply`. The signature is that of a hook after `load_state_dict`.
    """
    if remix.intervals.inner.is_meta:
        remix.intervals._register(remix.logits.device)


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model with the names of checkpoints.

    Checkpoints have "logits", and the weight and the bias of a low-rank layer without ".linear". `load_state_dict`
    reads both kinds of names.
    """
    renamed = _stored_prefixes(model)
    return {_stored_name(key, renamed): value for key, value in model.state_dict().items()}


def stored_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model with the names and in the order of checkpoints and their optimizer states.

    The parameters of the linear layer in a low-rank layer come before the pairs.
    """
    renamed, groups = _stored_prefixes(model), {}
    for name, parameter in model.named_parameters():
        stored = _stored_name(name, renamed)
        groups.setdefault(stored.rpartition(".")[0], []).append((stored == name, stored, parameter))
    return {name: p for group in groups.values() for _, name, p in sorted(group, key=lambda item: item[0])}


def _stored_prefixes(model: nn.Module) -> dict[str, str]:
    """Return the prefixes of names that are others in checkpoints, with these."""
    prefixes = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Coefficients | LowRankLinear):
            inner = name if isinstance(module, Coefficients) else f"{name}.linear"
            prefixes[f"{inner}."] = f"{inner.rpartition('.')[0]}.".removeprefix(".")
    return prefixes


def _stored_name(name: str, prefixes: dict[str, str]) -> str:
    prefix = f"{name.rpartition('.')[0]}."
    return prefixes[prefix] + name.removeprefix(prefix) if prefix in prefixes else name


def centered_gram(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inner products [K, K] of K weights [K, ...] minus their mean, and the mean squared norm of one []."""
    bases = weight.flatten(1)
    norm = bases.square().sum() / len(bases)
    # Bases are nearly equal: their products are accurate only after subtracting the mean.
    bases = bases - bases.mean(0)
    return bases @ bases.T, norm


@torch.no_grad()
def measure_distances(remix: nn.Module) -> tuple[Tensor, Tensor]:
    """Measure how different the bases are and how different the experts are. A distance of 0 means equal weights.

    Every process must call this if the bases are divided among several.

    Returns:
        The distances [K, K] between the bases, and the root mean square distance of the experts from their mean (a
        scalar). Both are over the mixed weights, relative to the root mean square norm of the bases.
    """
    if is_sharded(remix):
        reshard(remix)
    layers = [layer for s in range(len(remix.stages)) for _, layer in remix.mixed(s)]
    squared_distances, squared_spread, squared_norm = 0, 0, 0
    alpha = remix.coefficients_per_row()
    alpha = alpha - alpha.mean(1, keepdim=True)  # [1 or depth, N, K]
    for layer in layers:
        with gathered(layer):
            gram, norm = layer.gram()  # [K, K], []
        squared_norm = squared_norm + norm
        squared_distances = squared_distances + gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
        row = alpha[layer.row]  # [N, K]
        squared_spread = squared_spread + ((row @ gram) * row).sum(1).mean()
    sums = torch.cat([squared_distances.flatten(), squared_spread.view(1), squared_norm.view(1)])  # [K * K + 2]
    *_, squared_spread, squared_norm = sums = remix.batch_coefficients.sum(sums)
    n_basis = alpha.shape[-1]
    distances = (sums[:-2].clamp(min=0) / squared_norm).sqrt().view(n_basis, n_basis)
    return distances, (squared_spread / squared_norm).sqrt()
