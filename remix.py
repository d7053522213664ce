"""Remix-DiT: N denoising experts that are learned mixtures of K basis models (Fang et al., 2024, arXiv 2412.05628).

Expert i denoises one interval of the noise levels. In the mixed layers, its parameters are the average of the K bases'
parameters beta, weighted by row i of the coefficients alpha: Theta = alpha beta with alpha = softmax(pi). The other
layers are shared by all experts. Once its layers are mixed, an expert has the shape and the cost of the plain model.

`Remix` makes experts of any transformer, and `RemixDiT` those of a DiT.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.intervals import (
    check_boundaries,
    check_levels,
    equal_boundaries,
    find_interval,
    inner_boundaries,
    noise_level,
)
from mixing.coefficients import BatchCoefficients
from mixing.grouped_linear import mix, mixed_linear
from mixing.low_rank import LowRankLinear
from mixing.presets import complete_preset
from mixing.wrapping import Arguments, block_name, find_linears, join_outputs
from models import DiT, DiT_models, classifier_free_guidance


class RemixLinear(nn.Module):
    """K linear layers (the bases), mixed into one linear layer for each of the G groups of the batch.

    Args:
        in_features: number of input channels.
        out_features: number of output channels.
        n_basis: number of bases K.
        batch_coefficients: holds the coefficients of the current batch.
        row: index of this layer's coefficients in `batch_coefficients.alpha`.
        bias: whether the layers have biases.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_basis: int,
        batch_coefficients: "BatchCoefficients",
        row: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.batch_coefficients = batch_coefficients
        self.row = row
        self.weight = nn.Parameter(torch.empty(n_basis, out_features, in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(n_basis, out_features))
        else:
            self.register_buffer("bias", torch.empty(n_basis, out_features), persistent=False)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply mixture g to the g-th of the G equal parts of the batch, x [B, ..., in] -> [B, ..., out]."""
        alpha = self.batch_coefficients.of(self.row)  # [G, K]
        return mixed_linear(x, alpha, self.weight, self.bias)  # [B, ..., out]

    def reset_parameters(self):
        """Draw each basis separately, with the initialization of a single linear layer."""
        for basis in self.weight:
            nn.init.xavier_uniform_(basis)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def copy_(self, linear: nn.Linear):
        """Make every basis a copy of `linear`."""
        self.weight.copy_(linear.weight.expand_as(self.weight))
        if linear.bias is not None:
            self.bias.copy_(linear.bias.expand_as(self.bias))

    def bases(self) -> list[nn.Parameter]:
        """Return the parameters of the bases."""
        return list(self.parameters())

    def gram(self) -> tuple[Tensor, Tensor]:
        """Return the inner products [K, K] of the bases' weights minus their mean, and the mean squared norm []."""
        bases = self.weight.flatten(1)  # [K, out * in]
        norm = bases.square().sum() / len(bases)
        # Bases are nearly equal: their products are accurate only after subtracting the mean.
        bases = bases - bases.mean(0)
        return bases @ bases.T, norm

    @staticmethod
    def fold(layers: list["RemixLinear"], linears: list[nn.Linear], alpha: list[float]):
        """Write the mixtures of several layers into plain layers, in place.

        The weights are summed elementwise in float32, because GPUs may compute matrix products in TF32. Of weights in
        float32, no temporary copy is made.

        Args:
            layers: the mixed layers.
            linears: for each of them, the layer whose weight and bias are overwritten.
            alpha: coefficients [K].
        """
        pairs = [
            pair
            for layer, linear in zip(layers, linears, strict=True)
            for pair in ((layer.weight, linear.weight), (layer.bias, linear.bias))
            if pair[1] is not None
        ]
        if any(tensor.dtype.itemsize < 4 for _, tensor in pairs):
            for bases, tensor in pairs:
                tensor.copy_(mix(torch.tensor([alpha], device=bases.device), bases)[0])
            return
        folded = [tensor for _, tensor in pairs]
        torch._foreach_zero_(folded)
        for k, coefficient in enumerate(alpha):
            torch._foreach_add_(folded, [bases[k] for bases, _ in pairs], alpha=coefficient)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, n_basis={len(self.weight)}"


MIXERS = ("softmax", "raw", "one-hot")
SCOPES = ("global", "local")
RESTS = ("shared", "separate")
# The published bonus is 3. With 8, the bases of high noise learn from their own experts: see
# studies/results/fashion/README.md.
PRIOR_BONUS = 8.0


class Remix(nn.Module):
    """Experts of any transformer: a module of which some linear layers are mixed.

    The one-hot prior assigns basis floor(i K / N) to expert i. With the mixer "softmax", the logits pi start as unit
    normal noise, plus `prior_bonus` at the basis of the prior. With "raw", pi starts as the softmax of these numbers.
    With "one-hot", pi is the prior.

    Attributes of the module, such as the `config` that pipelines of diffusers read, are also attributes of this one.

    Args:
        module: the module. It is changed in place: its mixed layers are replaced. Every basis starts as a copy of the
            layer that it replaces.
        layers: names of the `nn.Linear` layers to mix, in which * stands for any text without a dot, such as
            "blocks.*.mlp.fc1"; every name must match a layer. None: those that mixing/presets.py lists for the module's
            class.
        n_basis: number of bases K.
        n_experts: number of experts N, with equal intervals of the noise levels. It may be omitted with `boundaries`.
        boundaries: N + 1 increasing noise levels. Expert i denoises boundaries[i] <= level < boundaries[i + 1]. The
            last expert also denoises the last boundary. Expert 0 has the least noise.
        timestep: the argument of the module that holds the noise level of each sample [B], as its name; or a function
            that is called with the module's arguments and returns the noise levels. If they have more dimensions, the
            expert is that of a sample's highest level. None: that of the preset.
        mixer: "softmax" (alpha = softmax(pi)), "raw" (alpha = pi, without a constraint) or "one-hot" (alpha is the
            prior and is not trained).
        scope: "global" (one pi [N, K] for all blocks) or "local" (one per block, [depth, N, K]). The block of a layer
            is its name up to the first number.
        num_timesteps: highest noise level: the number of timesteps T of the diffusion process, or 1. None: that of the
            preset, or the last of the boundaries.
        prior_bonus: number added to the initial logit of each expert's basis in the prior. The published one is 3.
        rank: rank of low-rank bases; see `low_rank.LowRankLinear`. None: every basis is a whole layer.
        rest: "shared" (the experts share all parameters outside the mixed layers) or "separate" (each expert has its
            own copy of them).
        unbatched: names of arguments that may have as many rows as the batch but are no batches.

    Raises:
        ValueError: if the module is no `nn.Module`, no layer matches, a layer is no `nn.Linear`, the timestep is no
            argument of the module, or another argument is out of range or unknown.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str] | None = None,
        n_basis: int = 4,
        n_experts: int | None = None,
        boundaries: Sequence[float] | None = None,
        timestep: str | Callable[..., Tensor] | None = None,
        mixer: str = "softmax",
        scope: str = "global",
        num_timesteps: int | None = None,
        prior_bonus: float = PRIOR_BONUS,
        rank: int | None = None,
        rest: str = "shared",
        unbatched: Sequence[str] = (),
    ):
        super().__init__()
        wrapped = complete_preset(module, layers, timestep, num_timesteps, unbatched, boundaries)
        if n_experts is None:
            if boundaries is None:
                raise ValueError("n_experts or boundaries must be given")
            n_experts = len(boundaries) - 1
        check_options(n_basis, n_experts, boundaries, mixer, scope, wrapped.highest_level, rank, rest)
        self.n_basis = n_basis
        self.n_experts = n_experts
        if boundaries is None:
            boundaries = equal_boundaries(n_experts, wrapped.highest_level)
        # As Python numbers, also from arrays.
        self.boundaries = [b if isinstance(b, int) else float(b) for b in boundaries]
        self.mixer = mixer
        self.scope = scope
        self.num_timesteps = wrapped.highest_level
        self.rank = rank
        self.rest = rest
        self.arguments = Arguments(module, wrapped.timestep, wrapped.unbatched)
        linears = find_linears(module, wrapped.layers, wrapped.optional_layers)
        blocks = list(dict.fromkeys(block_name(names[0]) for names in linears.values()))

        self.backbone = module
        self.batch_coefficients = BatchCoefficients()
        for linear, names in linears.items():
            row = blocks.index(block_name(names[0])) if scope == "local" else 0
            mixed = mixed_layer(linear, n_basis, rank, self.batch_coefficients, row)
            for name in names:
                module.set_submodule(name, mixed)
        if rest == "separate":
            # The copies have the same mixed layers.
            shared = {id(layer): layer for _, layer in self.mixed()}
            self.copies = nn.ModuleList(copy.deepcopy(module, dict(shared)) for _ in range(n_experts - 1))
        weight = next(iter(linears)).weight
        self._initialize_coefficients(len(blocks), prior_bonus, weight.device, weight.dtype)

    def _initialize_coefficients(self, depth: int, prior_bonus: float, device: torch.device, dtype: torch.dtype):
        """Create the prior, the inner boundaries and the logits pi of the experts."""
        logits = F.one_hot(self._preferred_bases(), self.n_basis).float()  # [N, K]
        if self.scope == "local":
            logits = logits.expand(depth, -1, -1)  # [depth, N, K]
        if self.mixer != "one-hot":
            logits = torch.randn(logits.shape) + prior_bonus * logits
        if self.mixer == "raw":
            # The rows are then non-negative and sum to 1: these experts also start as averages of the bases.
            logits = logits.softmax(-1)
        self._register_intervals(device)
        # The paper's pi. Its updates would be lost in half precision.
        logits = logits.to(device, torch.promote_types(dtype, torch.float32))
        self.logits = nn.Parameter(logits.contiguous(), requires_grad=self.mixer != "one-hot")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("__"):
                raise
            if name == "save_pretrained":
                # It would save the bases as the weights of one plain model.
                raise AttributeError("a Remix is saved with torch.save(remix.state_dict(), path)") from None
            if name == "fuse_qkv_projections":
                # It would read the weights of the layers without the bases.
                raise AttributeError("only the projections of a plain expert can be fused: remix.expert(i)") from None
            return getattr(self.backbone, name)

    def _apply(self, *args, **kwargs) -> "Remix":
        """Move or convert all parameters, but keep the logits and the boundaries in float32 in half precision."""
        logits = self.logits.data
        super()._apply(*args, **kwargs)
        if self.logits.dtype.itemsize < 4:
            gradient, self.logits.grad = self.logits.grad, None
            self.logits.data = logits.to(self.logits.device)
            self.logits.grad = None if gradient is None else gradient.to(logits.dtype)
        # They may come from the meta device, where they have no values.
        self._register_intervals(self.logits.device)
        return self

    def _register_intervals(self, device: torch.device):
        """Create the buffers that follow from the numbers of bases and experts and from the boundaries."""
        inner = torch.tensor(inner_boundaries(self.boundaries), dtype=torch.float32, device=device)
        self.register_buffer("prior", self._preferred_bases(device), persistent=False)
        self.register_buffer("inner_boundaries", inner, persistent=False)  # [N - 1]

    def _preferred_bases(self, device: torch.device | None = None) -> Tensor:
        """Return the basis of each expert in the prior [N]."""
        return torch.arange(self.n_experts, device=device) * self.n_basis // self.n_experts

    def noise_level(self, t: Tensor | float) -> Tensor | np.float32:
        """Return the noise level of what the argument `timestep` holds, a tensor or a number."""
        return t.float() if isinstance(t, Tensor) else np.float32(t)

    def expert_index(self, t: Tensor | float) -> Tensor | int:
        """Return the index of the expert that owns each value of the argument `timestep`, a tensor or a number."""
        level = self.noise_level(t)
        if isinstance(level, Tensor):
            return torch.bucketize(level.contiguous(), self.inner_boundaries, right=True)
        return find_interval(self.boundaries, level)

    def coefficients(self) -> Tensor:
        """Return the coefficients alpha [N, K], or [depth, N, K] if the scope is local."""
        return self._mix(self.logits)

    def coefficients_per_expert(self) -> list[list[list[float]]]:
        """Return the coefficients of each expert, [N][1 or depth][K], computed on the host.

        All devices then fold experts with the same numbers.
        """
        alpha = self._mix(self.logits.detach().cpu())
        return alpha.view(-1, self.n_experts, self.n_basis).transpose(0, 1).tolist()

    def _mix(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.mixer == "softmax" else logits

    def _coefficients_per_row(self) -> Tensor:
        """Return the coefficients [1 or depth, N, K] for every scope."""
        return self.coefficients().view(-1, self.n_experts, self.n_basis)

    def prior_loss(self) -> Tensor:
        """Return the cross-entropy between softmax(pi) and the one-hot prior, averaged over the experts, unweighted."""
        target = self.prior.expand(self.logits.shape[:-1])  # [N] or [depth, N]
        return F.cross_entropy(self.logits.flatten(0, -2), target.flatten())

    def reset_bases(self):
        """Draw every basis separately, for training from scratch."""
        for _, layer in self.mixed():
            layer.reset_parameters()

    def mixed(self) -> list[tuple[str, RemixLinear | LowRankLinear]]:
        """Return the mixed layers and their names within the module."""
        kinds = (RemixLinear, LowRankLinear)
        return [(name, layer) for name, layer in self.backbone.named_modules() if isinstance(layer, kinds)]

    def freeze_shared(self):
        """Let only the bases and the coefficients be trained: with low rank, the pairs and the coefficients."""
        self.requires_grad_(False)
        for _, layer in self.mixed():
            for basis in layer.bases():
                basis.requires_grad_()
        self.logits.requires_grad_(self.mixer != "one-hot")

    @torch.no_grad()
    def distances(self) -> tuple[Tensor, Tensor]:
        """Measure how different the bases are and how different the experts are. A distance of 0 means equal weights.

        Returns:
            The distances [K, K] between the bases, and the root mean square distance of the experts from their mean (a
            scalar). Both are over the mixed weights, relative to the root mean square norm of the bases.
        """
        squared_distances, squared_spread, squared_norm = 0, 0, 0
        alpha = self._coefficients_per_row()
        alpha = alpha - alpha.mean(1, keepdim=True)  # [1 or depth, N, K]
        for _, layer in self.mixed():
            gram, norm = layer.gram()  # [K, K], []
            squared_norm = squared_norm + norm
            squared_distances = squared_distances + gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
            row = alpha[layer.row]  # [N, K]
            squared_spread = squared_spread + ((row @ gram) * row).sum(1).mean()
        sums = torch.cat([squared_distances.flatten(), squared_spread.view(1), squared_norm.view(1)])  # [K * K + 2]
        *_, squared_spread, squared_norm = sums = self.batch_coefficients.sum(sums)
        distances = (sums[:-2].clamp(min=0) / squared_norm).sqrt().view(self.n_basis, self.n_basis)
        return distances, (squared_spread / squared_norm).sqrt()

    def forward(self, *args, groups: int | None = None, **kwargs) -> Any:
        """Denoise every sample by its own expert.

        Args:
            *args, **kwargs: the arguments of the module.
            groups: if given, the caller promises that the batch is this many equal contiguous groups, each within the
                noise levels of one expert. They run as one batch, without a host sync. Noise levels are not checked.
                The first dimension of the inputs of all mixed layers must be the batch. By default, the experts of the
                batch run one after the other. With rest="separate" they always do: `groups` has no effect.

        Returns:
            The result of the module.

        Raises:
            ValueError: if `groups` does not divide the batch size, or a noise level is outside the boundaries.
            TypeError: if the noise level is missing.
        """
        t = self.times(*args, **kwargs)
        experts = self.expert_index(t)  # [B]
        if groups is not None and self.rest == "shared":
            if groups < 1 or len(experts) % groups:
                raise ValueError(f"groups must divide the batch size {len(experts)}, but it is {groups}")
            return self._run(experts.view(groups, -1)[:, 0], args, kwargs)
        self._check_levels(t)
        present, counts = experts.unique(return_counts=True)
        if len(present) == 1:
            return self._run(present, args, kwargs)
        order = experts.argsort(stable=True)  # [B]
        outputs = []
        for expert, rows in zip(present.split(1), order.split(counts.tolist()), strict=True):
            outputs.append(self._run(expert, *self.arguments.take(rows, len(t), args, kwargs)))
        return join_outputs(outputs, order)

    def times(self, *args, **kwargs) -> Tensor:
        """Return what the argument `timestep` holds for each sample, [B] or [1]."""
        return self.arguments.times(args, kwargs)

    def _check_levels(self, t: Tensor):
        check_levels(self.boundaries, *torch.stack(self.noise_level(t).aminmax()).tolist())

    def _run(self, experts: Tensor, args: tuple, kwargs: dict) -> Any:
        """Run the module on G equal groups, with the experts [G]."""
        module = self._module(int(experts)) if self.rest == "separate" else self.backbone
        self.batch_coefficients.start(self._coefficients_per_row(), experts)
        try:
            return module(*args, **kwargs)
        finally:
            self.batch_coefficients.end()

    def _module(self, i: int) -> nn.Module:
        """Return the module that holds the parameters of expert i that are not mixed."""
        return self.copies[i - 1] if self.rest == "separate" and i else self.backbone

    def enable_gradient_checkpointing(self):
        """Let a model of diffusers store only the inputs of each block, and compute the activations again."""
        function = partial(checkpoint, use_reentrant=False, context_fn=self.batch_coefficients.contexts)
        for i in range(self.n_experts if self.rest == "separate" else 1):
            self._module(i).enable_gradient_checkpointing(function)

    def expert(self, i: int) -> nn.Module:
        """Return expert i as a module of the wrapped class with its own parameters, in eval mode.

        See `fold_` for errors.
        """
        plain = self._plain(i)
        self.fold_(plain, i)
        return plain

    def merge(self, weights: list[float] | None = None) -> nn.Module:
        """Return a weighted mean of the experts' weights as a plain module with its own parameters, in eval mode.

        Experts are linear in their coefficients, so the mean of the experts is the expert of the mean coefficients.

        Args:
            weights: weight of each expert, at least 0 [N]; they are divided by their sum. Default: equal weights.

        Raises:
            ValueError: if there are not N weights, or one of them is negative, or all are 0, or the experts have
                separate parameters.
        """
        if self.rest == "separate":
            raise ValueError("experts with separate parameters cannot be merged")
        weights = torch.ones(self.n_experts) if weights is None else torch.tensor(weights)
        if len(weights) != self.n_experts or not weights.min() >= 0 or not weights.sum() > 0:
            raise ValueError(f"expected {self.n_experts} weights of at least 0, not all of them 0")
        alpha = self._coefficients_per_row().detach().double().cpu()  # [1 or depth, N, K]
        weights = (weights.double() / weights.double().sum())[:, None]  # [N, 1]
        plain = self._plain(0)
        self._fold(plain, (weights * alpha).sum(1).tolist(), 0)
        return plain

    def _plain(self, i: int) -> nn.Module:
        """Return a copy of expert i's module with plain layers, in eval mode; the mixed ones are not initialized."""
        plain = {id(layer): plain_linear(layer) for _, layer in self.mixed()}
        return copy.deepcopy(self._module(i), plain).eval()

    @torch.no_grad()
    def fold_(self, module: nn.Module, i: int):
        """Write the parameters of expert i that it does not share into `module`, in place.

        Args:
            module: the result of `expert` for any expert.
            i: the expert.

        Raises:
            IndexError: if i is not from 0 to N - 1.
        """
        if not 0 <= i < self.n_experts:
            raise IndexError(f"the expert index must be from 0 to {self.n_experts - 1}, but it is {i}")
        self._fold(module, self.coefficients_per_expert()[i], i)

    @torch.no_grad()
    def _fold(self, module: nn.Module, alpha: list[list[float]], i: int):
        """Write the mixed weights for the coefficients alpha [1 or depth][K] of expert i into `module`, in place."""
        rows = {}
        for name, layer in self.mixed():
            layers, linears = rows.setdefault(layer.row, ([], []))
            layers.append(layer)
            linears.append(module.get_submodule(name))
        for row, (layers, linears) in rows.items():
            layers[0].fold(layers, linears, alpha[row])
        if self.rest == "separate":
            mixed = tuple(f"{name}." for name, _ in self.mixed())
            own = self._module(i).state_dict()
            module.load_state_dict({k: v for k, v in own.items() if not k.startswith(mixed)}, strict=False)


def check_options(
    n_basis: int,
    n_experts: int,
    boundaries: Sequence[float] | None,
    mixer: str,
    scope: str,
    num_timesteps: int,
    rank: int | None,
    rest: str,
):
    """Raise ValueError if an argument of `Remix` is out of range or unknown."""
    if n_basis < 1:
        raise ValueError(f"n_basis must be at least 1, but it is {n_basis}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, but it is {num_timesteps}")
    if n_experts < 1 or 1 < num_timesteps < n_experts:
        raise ValueError(f"n_experts must be from 1 to num_timesteps={num_timesteps}, but it is {n_experts}")
    for name, value, known in (("mixer", mixer, MIXERS), ("scope", scope, SCOPES), ("rest", rest, RESTS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, but it is {value!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, but it is {rank}")
    if boundaries is not None:
        check_boundaries(boundaries, n_experts, num_timesteps)


def mixed_layer(
    linear: nn.Linear, n_basis: int, rank: int | None, batch_coefficients: BatchCoefficients, row: int
) -> RemixLinear | LowRankLinear:
    """Return the mixed layer that replaces a linear layer."""
    if rank is not None:
        return LowRankLinear(linear, n_basis, rank, batch_coefficients, row)
    shape = linear.in_features, linear.out_features
    with torch.device(linear.weight.device):
        mixed = RemixLinear(*shape, n_basis, batch_coefficients, row, bias=linear.bias is not None)
    mixed = mixed.to(linear.weight.dtype)
    mixed.copy_(linear)
    return mixed


def plain_linear(layer: RemixLinear | LowRankLinear) -> nn.Linear:
    """Return a plain linear layer with the shape of a mixed layer, not initialized."""
    has_bias = isinstance(layer.bias, nn.Parameter)
    options = dict(bias=has_bias, device=layer.weight.device, dtype=layer.weight.dtype)
    linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, **options)
    return linear.requires_grad_(layer.weight.requires_grad)


# Names within a DiT block. The adaLN modulation is shared by all experts, unless it is added to the mixed layers.
MIXED_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODULATION = "adaLN_modulation.1"


class RemixDiT(Remix):
    """A DiT whose blocks contain mixed linear layers. It is called like a DiT.

    Args:
        backbone: a DiT, which is not changed. Every basis starts as a copy of its weights.
        n_basis, n_experts, mixer, scope, prior_bonus, rank: see `Remix`.
        num_timesteps: number of timesteps T of the diffusion process.
        mixed_layers: names, within a block, of the linear layers to mix.
        boundaries: see `Remix`. For Gaussian diffusion the level is the timestep t, from 0 to `num_timesteps`. For
            flow matching it is 1 - t, from 0 to 1. None: floor(i T / N) for the boundary i.

    Raises:
        ValueError: if n_basis or n_experts is out of range, mixer or scope is unknown, or boundaries do not fit.
    """

    def __init__(
        self,
        backbone: DiT,
        n_basis: int,
        n_experts: int,
        mixer: str = "softmax",
        scope: str = "global",
        num_timesteps: int = 1000,
        mixed_layers: tuple[str, ...] = MIXED_LAYERS,
        prior_bonus: float = PRIOR_BONUS,
        boundaries: list[float] | None = None,
        rank: int | None = None,
    ):
        flow = boundaries is not None and boundaries[-1] == 1
        super().__init__(
            copy.deepcopy(backbone),
            [f"blocks.*.{name}" for name in mixed_layers],
            n_basis,
            n_experts,
            boundaries,
            timestep="t",
            mixer=mixer,
            scope=scope,
            num_timesteps=1 if flow else num_timesteps,
            prior_bonus=prior_bonus,
            rank=rank,
        )
        # The keyword arguments that build this model from its backbone.
        self.config = dict(
            n_basis=n_basis,
            n_experts=n_experts,
            mixer=mixer,
            scope=scope,
            num_timesteps=num_timesteps,
            mixed_layers=list(mixed_layers),
        )
        # Omitted for the default, so that configs written by earlier versions still match.
        for name, value in (("boundaries", boundaries), ("rank", rank)):
            if value is not None:
                self.config[name] = value

    @property
    def backbone_config(self) -> dict:
        """The keyword arguments that build its backbone, a `DiT`."""
        return dict(self.backbone.config)

    def noise_level(self, t: Tensor | float) -> Tensor | np.float32:
        """See `diffusion.intervals.noise_level`."""
        return noise_level(self.boundaries, t)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = None
    ) -> Tensor:
        """See `models.classifier_free_guidance`."""
        return classifier_free_guidance(self, x, t, y, cfg_scale, guided_channels)

    def reset_bases(self):
        """Draw every basis separately, for training from scratch. Mixed modulation layers keep their initial zeros."""
        for name, layer in self.mixed():
            if not name.endswith(MODULATION):
                layer.reset_parameters()


def build_remix(
    backbone_name: str,
    *,
    n_basis: int = 4,
    n_experts: int = 20,
    mixer: str = "softmax",
    scope: str = "global",
    num_timesteps: int = 1000,
    mixed_layers: tuple[str, ...] = MIXED_LAYERS,
    prior_bonus: float = PRIOR_BONUS,
    boundaries: list[float] | None = None,
    rank: int | None = None,
    **backbone,
) -> RemixDiT:
    """Build a RemixDiT with separately drawn bases on a DiT of the registry.

    Args:
        backbone_name: name of the DiT, such as "DiT-S/2".
        n_basis, n_experts, mixer, scope, num_timesteps, mixed_layers, prior_bonus, boundaries, rank: see `RemixDiT`.
        **backbone: further arguments of the DiT, such as `input_size`.

    Raises:
        ValueError: see `DiT` and `RemixDiT`.
    """
    dit = DiT_models[backbone_name](**backbone)
    remix = RemixDiT(dit, n_basis, n_experts, mixer, scope, num_timesteps, mixed_layers, prior_bonus, boundaries, rank)
    remix.reset_bases()
    return remix


RemixDiT_models = {f"Remix{name}": partial(build_remix, name) for name in DiT_models}
