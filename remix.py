"""Remix-DiT: N denoising experts that are learned mixtures of K basis models (Fang et al., 2024, arXiv 2412.05628).

By default, expert i denoises the timesteps t with floor(i T / N) <= t < floor((i + 1) T / N). In the mixed layers, its
parameters are the average of the K bases' parameters beta, weighted by row i of the coefficients alpha: Theta = alpha
beta with alpha = softmax(pi). The other layers are shared by all experts. Once its layers are mixed, an expert is a
plain DiT with the cost of a plain DiT.
"""

import bisect
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouped_linear import mixed_linear
from models import DiT, DiT_models, classifier_free_guidance


class RemixLinear(nn.Module):
    """K linear layers (the bases), mixed into one linear layer for each of the G groups of the batch.

    Args:
        in_features: number of input channels.
        out_features: number of output channels.
        n_basis: number of bases K.
        batch_coefficients: holds the coefficients of the current batch.
        row: index of this layer's coefficients in `batch_coefficients.alpha`.
    """

    def __init__(
        self, in_features: int, out_features: int, n_basis: int, batch_coefficients: "BatchCoefficients", row: int = 0
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.batch_coefficients = batch_coefficients
        self.row = row
        self.weight = nn.Parameter(torch.empty(n_basis, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(n_basis, out_features))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply mixture g to the g-th of the G equal parts of the batch, x [B, ..., in] -> [B, ..., out]."""
        alpha = self.batch_coefficients.alpha[self.row]  # [G, K]
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
        self.bias.copy_(linear.bias.expand_as(self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, n_basis={len(self.weight)}"


class BatchCoefficients:
    """The coefficients of the current batch, shared by all mixed layers.

    sharding.py has a subclass for bases that are divided among several processes.
    """

    # [1 or depth, G, K] while RemixDiT.forward runs
    alpha: Tensor | None = None

    def start(self, alpha: Tensor, experts: Tensor):
        """Select the coefficients of the experts [G] of a batch from those of all experts [1 or depth, N, K]."""
        self.alpha = alpha[:, experts]

    def end(self):
        """Forget the batch."""
        self.alpha = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the processes that the bases are divided among."""
        return values

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return two contexts for activation checkpointing: one for the forward pass and one for its repetition.

        The second one restores the batch.
        """
        return nullcontext(), self._restored(vars(self).copy())

    @contextmanager
    def _restored(self, batch: dict) -> Iterator[None]:
        current = vars(self).copy()
        vars(self).update(batch)
        try:
            yield
        finally:
            # PyTorch stops the repetition with an exception as soon as it has all activations.
            vars(self).update(current)


MIXERS = ("softmax", "raw", "one-hot")
SCOPES = ("global", "local")

# Names within a DiT block. The adaLN modulation is shared by all experts, unless it is added to the mixed layers.
MIXED_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODULATION = "adaLN_modulation.1"


class RemixDiT(nn.Module):
    """A DiT whose blocks contain mixed linear layers. All other layers are shared by the experts.

    The one-hot prior assigns basis floor(i K / N) to expert i. With the mixer "softmax", the logits pi start as unit
    normal noise, plus `prior_bonus` at the basis of the prior. With "raw", pi starts as the softmax of these numbers.
    With "one-hot", pi is the prior.

    Args:
        backbone: a DiT, which is not changed. Every basis starts as a copy of its weights.
        n_basis: number of bases K.
        n_experts: number of experts N, at most `num_timesteps`.
        mixer: "softmax" (alpha = softmax(pi)), "raw" (alpha = pi, without a constraint) or "one-hot" (alpha is the
            prior and is not trained).
        scope: "global" (one pi [N, K] for all blocks) or "local" (one per block, [depth, N, K]).
        num_timesteps: number of timesteps T of the diffusion process.
        mixed_layers: names, within a block, of the linear layers to mix.
        prior_bonus: number added to the initial logit of each expert's basis in the prior.
        boundaries: N + 1 increasing noise levels. Expert i denoises boundaries[i] <= level < boundaries[i + 1]. The
            last expert also denoises the last boundary. For Gaussian diffusion the level is the timestep t, from 0 to
            `num_timesteps`. For flow matching it is 1 - t, from 0 to 1. None: equal intervals of the timesteps.

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
        prior_bonus: float = 3.0,
        boundaries: list[float] | None = None,
    ):
        super().__init__()
        if n_basis < 1:
            raise ValueError(f"n_basis must be at least 1, but it is {n_basis}")
        if not 1 <= n_experts <= num_timesteps:
            raise ValueError(f"n_experts must be from 1 to num_timesteps={num_timesteps}, but it is {n_experts}")
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, but it is {mixer!r}")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, but it is {scope!r}")
        if boundaries is not None:
            check_boundaries(boundaries, n_experts, num_timesteps)
        self.n_basis = n_basis
        self.n_experts = n_experts
        self.boundaries = None if boundaries is None else list(boundaries)
        self.num_timesteps = num_timesteps
        self.mixer = mixer
        self.scope = scope
        self.mixed_layers = tuple(mixed_layers)
        self.backbone = copy.deepcopy(backbone)
        self.batch_coefficients = BatchCoefficients()
        for index, block in enumerate(self.backbone.blocks):
            row = index if scope == "local" else 0
            for name in self.mixed_layers:
                linear = block.get_submodule(name)
                mixed = RemixLinear(linear.in_features, linear.out_features, n_basis, self.batch_coefficients, row)
                mixed.copy_(linear)
                block.set_submodule(name, mixed.to(linear.weight))

        # The preferred basis of each expert.
        prior = torch.arange(n_experts) * n_basis // n_experts  # [N]
        logits = F.one_hot(prior, n_basis).float()  # [N, K]
        if scope == "local":
            logits = logits.expand(len(self.backbone.blocks), -1, -1)  # [depth, N, K]
        if mixer != "one-hot":
            logits = torch.randn(logits.shape) + prior_bonus * logits
        if mixer == "raw":
            # The rows are then non-negative and sum to 1: these experts also start as averages of the bases.
            logits = logits.softmax(-1)
        like = self.backbone.final_layer.linear.weight
        self.register_buffer("prior", prior.to(like.device), persistent=False)
        inner = torch.tensor(inner_boundaries(self.boundaries) if self.boundaries else [], dtype=torch.float32)
        self.register_buffer("inner_boundaries", inner.to(like.device), persistent=False)  # [N - 1] or empty
        # The paper's pi.
        self.logits = nn.Parameter(logits.to(like).contiguous(), requires_grad=mixer != "one-hot")

    @property
    def config(self) -> dict:
        """The keyword arguments that build this model from its backbone."""
        names = ("n_basis", "n_experts", "mixer", "scope", "num_timesteps")
        config = {name: getattr(self, name) for name in names} | {"mixed_layers": list(self.mixed_layers)}
        # Omitted for the default, so that configs written by earlier versions still match.
        return config if self.boundaries is None else config | {"boundaries": self.boundaries}

    @property
    def backbone_config(self) -> dict:
        """The keyword arguments that build its backbone, a `DiT`."""
        return dict(self.backbone.config)

    @property
    def in_channels(self) -> int:
        return self.backbone.in_channels

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    def expert_index(self, t: Tensor | int | float) -> Tensor | int:
        """Return the index of the expert that owns each time t, a tensor or a number.

        By default it is the last i with floor(i T / N) <= t. With boundaries it is the last i whose boundary is not
        above the noise level of t.
        """
        if self.boundaries is None:
            return (self.n_experts * (t + 1) - 1) // self.num_timesteps
        if isinstance(t, Tensor):
            level = 1 - t.float() if self.boundaries[-1] == 1 else t.float()
            return torch.bucketize(level, self.inner_boundaries, right=True)
        return find_interval(self.boundaries, t)

    def coefficients(self) -> Tensor:
        """Return the coefficients alpha [N, K], or [depth, N, K] if the scope is local."""
        return self.logits.softmax(-1) if self.mixer == "softmax" else self.logits

    def _coefficients_per_row(self) -> Tensor:
        """Return the coefficients [1 or depth, N, K] for every scope."""
        return self.coefficients().view(-1, self.n_experts, self.n_basis)

    def prior_loss(self) -> Tensor:
        """Return the cross-entropy between softmax(pi) and the one-hot prior, averaged over the experts, unweighted."""
        target = self.prior.expand(self.logits.shape[:-1])  # [N] or [depth, N]
        return F.cross_entropy(self.logits.flatten(0, -2), target.flatten())

    def reset_bases(self):
        """Draw every basis separately, for training from scratch. Mixed modulation layers keep their initial zeros."""
        for name, layer in self.mixed():
            if not name.endswith(MODULATION):
                layer.reset_parameters()

    def mixed(self) -> list[tuple[str, RemixLinear]]:
        """Return the mixed layers and their names within the backbone."""
        return [(name, layer) for name, layer in self.backbone.named_modules() if isinstance(layer, RemixLinear)]

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
            bases = layer.weight.flatten(1)  # [K, out * in]
            squared_norm = squared_norm + bases.square().sum() / self.n_basis
            # Bases are nearly equal: their products are accurate only after subtracting the mean.
            bases = bases - bases.mean(0)
            gram = bases @ bases.T  # [K, K]
            squared_distances = squared_distances + gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
            row = alpha[layer.row]  # [N, K]
            squared_spread = squared_spread + ((row @ gram) * row).sum(1).mean()
        sums = torch.cat([squared_distances.flatten(), squared_spread.view(1), squared_norm.view(1)])  # [K * K + 2]
        *_, squared_spread, squared_norm = sums = self.batch_coefficients.sum(sums)
        distances = (sums[:-2].clamp(min=0) / squared_norm).sqrt().view(self.n_basis, self.n_basis)
        return distances, (squared_spread / squared_norm).sqrt()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, groups: int | None = None, label_drop: Tensor | None = None
    ) -> Tensor:
        """Denoise every sample by its own expert.

        Args:
            x: noisy images or latents [B, C, H, W].
            t: timesteps [B] of the original process.
            y: class labels [B].
            groups: if given, the caller promises that the batch is this many equal contiguous groups, each within the
                timesteps of one expert. They run as one batch, without a host sync. By default, the experts of the
                batch run one after the other.
            label_drop: see `DiT.forward`.

        Returns:
            Output [B, C or 2C, H, W] of the backbone.

        Raises:
            ValueError: if `groups` does not divide the batch size.
        """
        experts = self.expert_index(t)  # [B]
        if groups is not None:
            if groups < 1 or len(x) % groups:
                raise ValueError(f"groups must divide the batch size {len(x)}, but it is {groups}")
            return self._denoise(x, t, y, label_drop, experts.view(groups, -1)[:, 0])
        present, counts = experts.unique(return_counts=True)
        if len(present) == 1:
            return self._denoise(x, t, y, label_drop, present)
        order = experts.argsort(stable=True)  # [B]
        outputs = []
        for expert, rows in zip(present.split(1), order.split(counts.tolist()), strict=True):
            drop = None if label_drop is None else label_drop[rows]
            outputs.append(self._denoise(x[rows], t[rows], y[rows], drop, expert))
        return torch.cat(outputs)[order.argsort()]

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None, experts: Tensor) -> Tensor:
        """Run the backbone on G equal groups, with the experts [G]."""
        self.batch_coefficients.start(self._coefficients_per_row(), experts)
        try:
            return self.backbone(x, t, y, label_drop)
        finally:
            self.batch_coefficients.end()

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = None
    ) -> Tensor:
        """See `models.classifier_free_guidance`."""
        return classifier_free_guidance(self, x, t, y, cfg_scale, guided_channels)

    def expert(self, i: int) -> DiT:
        """Return expert i as a plain DiT with its own parameters, in eval mode. See `fold_` for errors."""
        dit = self._shared_dit()
        self.fold_(dit, i)
        return dit

    def merge(self, weights: list[float] | None = None) -> DiT:
        """Return a weighted mean of the experts' weights as a plain DiT with its own parameters, in eval mode.

        Experts are linear in their coefficients, so the mean of the experts is the expert of the mean coefficients.

        Args:
            weights: weight of each expert, at least 0 [N]; they are divided by their sum. Default: equal weights.

        Raises:
            ValueError: if there are not N weights, or one of them is negative, or all are 0.
        """
        weights = torch.ones(self.n_experts) if weights is None else torch.tensor(weights)
        if len(weights) != self.n_experts or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"expected {self.n_experts} weights of at least 0, not all of them 0")
        alpha = self._coefficients_per_row().detach().double().cpu()  # [1 or depth, N, K]
        weights = (weights.double() / weights.double().sum())[:, None]  # [N, 1]
        dit = self._shared_dit()
        self._fold(dit, (weights * alpha).sum(1).tolist())
        return dit

    def _shared_dit(self) -> DiT:
        """Return a plain DiT in eval mode with the layers that all experts share; the mixed ones are random."""
        dit = DiT(**self.backbone.config).to(self.logits)
        mixed = {name for name, _ in self.mixed()}
        shared = {k: v for k, v in self.backbone.state_dict().items() if k.rpartition(".")[0] not in mixed}
        dit.load_state_dict(shared, strict=False)
        return dit.eval()

    @torch.no_grad()
    def fold_(self, dit: DiT, i: int):
        """Write the mixed weights of expert i into `dit`, in place.

        Raises:
            IndexError: if i is not from 0 to N - 1.
        """
        if not 0 <= i < self.n_experts:
            raise IndexError(f"the expert index must be from 0 to {self.n_experts - 1}, but it is {i}")
        self._fold(dit, self._coefficients_per_row()[:, i].tolist())

    @torch.no_grad()
    def _fold(self, dit: DiT, alpha: list[list[float]]):
        """Write the mixed weights for the coefficients alpha [1 or depth][K] into `dit`, in place.

        The weights are summed elementwise in float32, because GPUs may compute matrix products in TF32. No temporary
        copy of the weights is made.
        """
        layers_of_row = {}
        for name, layer in self.mixed():
            layers_of_row.setdefault(layer.row, []).append((dit.get_submodule(name), layer))
        for row, layers in layers_of_row.items():
            folded = [tensor for linear, _ in layers for tensor in (linear.weight, linear.bias)]
            torch._foreach_zero_(folded)
            for k in range(self.n_basis):
                bases = [tensor[k] for _, layer in layers for tensor in (layer.weight, layer.bias)]
                torch._foreach_add_(folded, bases, alpha=alpha[row][k])


def check_boundaries(boundaries: list[float], n_experts: int, num_timesteps: int = 1000):
    """Check the boundaries of a RemixDiT.

    Raises:
        ValueError: unless they are `n_experts` + 1 increasing numbers from 0 to `num_timesteps`, or to 1 for a flow.
    """
    if len(boundaries) != n_experts + 1:
        raise ValueError(f"{n_experts} experts need {n_experts + 1} boundaries, but there are {len(boundaries)}")
    if boundaries[0] != 0 or boundaries[-1] not in (1, num_timesteps):
        raise ValueError(
            f"boundaries must run from 0 to {num_timesteps}, or from 0 to 1 for a flow, "
            f"but they run from {boundaries[0]:g} to {boundaries[-1]:g}"
        )
    if any(low >= high for low, high in pairwise(boundaries)):
        raise ValueError(f"boundaries must increase, but they are {', '.join(f'{b:g}' for b in boundaries)}")


def inner_boundaries(boundaries: list[float]) -> list[float]:
    """Return the N - 1 boundaries between experts, for comparison with rounded noise levels.

    A flow's noise level 1 - t is rounded, and many samplers take steps on boundaries, such as 0.15. The boundaries of
    flows are therefore lowered by 2^-20, so that these steps belong to the expert above. Training keeps twice this
    distance from every boundary (`diffusion.flow.MARGIN`).
    """
    return [boundary - (2.0**-20 if boundaries[-1] == 1 else 0) for boundary in boundaries[1:-1]]


def find_interval(boundaries: list[float], t: float) -> int:
    """Return the index of the interval between boundaries that the time t belongs to.

    The numbers are rounded to float32 as in tensors, so that host and device find the same expert.

    Args:
        boundaries: increasing noise levels, up to 1 for a flow, whose noise level is 1 - t.
        t: the time that the network sees.
    """
    level = np.float32(1) - np.float32(t) if boundaries[-1] == 1 else np.float32(t)
    return bisect.bisect_right([np.float32(boundary) for boundary in inner_boundaries(boundaries)], level)


class ExpertSwitch(nn.Module):
    """Base class of models for sampling that run one plain DiT at a time, selected by the timestep.

    It is called like a DiT, with a batch whose timesteps belong to one expert. A sampler that knows the timestep calls
    `for_timestep` and runs the result, so that the host does not wait for the device.
    """

    def expert_index(self, t: float) -> int:
        """Return the index of the expert that owns the time t: a timestep of the original process, or a flow's time."""
        raise NotImplementedError

    def select(self, i: int) -> DiT:
        """Return expert i. It is valid until the next call."""
        raise NotImplementedError

    def for_timestep(self, timestep: float) -> DiT:
        """Return the expert that owns a time: a timestep of the original process, or a flow's time.

        It is valid until the next call.
        """
        return self.select(self.expert_index(timestep))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Run the expert that owns the timesteps t [B]. See `DiT.forward`.

        Raises:
            ValueError: if the timesteps belong to several experts.
        """
        first, last = map(self.expert_index, torch.stack(t.aminmax()).tolist())
        if first != last:
            raise ValueError(
                f"all timesteps of a batch must belong to one expert, but they belong to experts {first} to {last}"
            )
        return self.select(first)(x, t, y)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = None
    ) -> Tensor:
        """See `models.classifier_free_guidance`."""
        return classifier_free_guidance(self, x, t, y, cfg_scale, guided_channels)


class FoldedRemixDiT(ExpertSwitch):
    """Runs a RemixDiT as one plain DiT, whose weights are overwritten when the expert changes.

    Args:
        remix: the RemixDiT. Its parameters must not change later, because its coefficients are copied to the host.
    """

    def __init__(self, remix: RemixDiT):
        super().__init__()
        self.remix = remix
        # [N][1 or depth][K], on the host, so that a change of the expert does not wait for the device. They are also
        # computed there: then all devices mix with the same numbers.
        logits = remix.logits.detach().cpu()
        alpha = logits.softmax(-1) if remix.mixer == "softmax" else logits
        self.alpha = alpha.view(-1, remix.n_experts, remix.n_basis).transpose(0, 1).tolist()
        self.dit = remix._shared_dit()
        self.folded = None

    @property
    def boundaries(self) -> list[float] | None:
        """See `RemixDiT`."""
        return self.remix.boundaries

    def expert_index(self, t: float) -> int:
        return self.remix.expert_index(t)

    def select(self, i: int) -> DiT:
        if i != self.folded:
            self.remix._fold(self.dit, self.alpha[i])
            self.folded = i
        return self.dit


class IndependentExperts(ExpertSwitch):
    """Plain DiTs that were trained separately, each on its own interval of noise levels (a baseline of the paper).

    Args:
        models: the N experts.
        boundaries: N + 1 increasing noise levels, as in `RemixDiT`.

    Raises:
        ValueError: if the boundaries do not fit.
    """

    def __init__(self, models: list[DiT], boundaries: list[float]):
        super().__init__()
        check_boundaries(boundaries, len(models), boundaries[-1])
        self.models = nn.ModuleList(models)
        self.boundaries = list(boundaries)

    def expert_index(self, t: float) -> int:
        return find_interval(self.boundaries, t)

    def select(self, i: int) -> DiT:
        return self.models[i]


def _from_scratch(
    backbone_name: str,
    *,
    n_basis: int = 4,
    n_experts: int = 20,
    mixer: str = "softmax",
    scope: str = "global",
    num_timesteps: int = 1000,
    mixed_layers: tuple[str, ...] = MIXED_LAYERS,
    prior_bonus: float = 3.0,
    boundaries: list[float] | None = None,
    **backbone,
) -> RemixDiT:
    """Build a RemixDiT with separately drawn bases on a DiT of the registry."""
    dit = DiT_models[backbone_name](**backbone)
    remix = RemixDiT(dit, n_basis, n_experts, mixer, scope, num_timesteps, mixed_layers, prior_bonus, boundaries)
    remix.reset_bases()
    return remix


RemixDiT_models = {f"Remix{name}": partial(_from_scratch, name) for name in DiT_models}
