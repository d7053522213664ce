"""Remix-DiT (Fang et al., NeurIPS 2024, arXiv 2412.05628): N denoising experts that are learned mixtures of K basis models.

Theta = alpha beta: expert i, which owns the timesteps t with floor(i T / N) <= t < floor((i + 1) T / N), is the average
of the K bases weighted by row i of the coefficients alpha = softmax(pi), and has a plain DiT's shape.
"""

import bisect
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouped_linear import batched_linear, grouped_linear
from models import DiT, DiT_models, classifier_free_guidance

MIXERS = ("softmax", "raw", "one-hot")
SCOPES = ("global", "local")
MIXED_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODULATION = "adaLN_modulation.1"  # a block's conditioning, which may be mixed too


class BatchCoefficients:
    """The coefficients of the batch in flight, shared by all mixed layers: alpha [blocks or 1, G, K], or None at rest."""

    alpha: Tensor | None = None


class RemixLinear(nn.Module):
    """K linear layers, mixed into one for each of the G groups of the batch in flight.

    weight [K, out, in] and bias [K, out]; `shared` carries the coefficients, `row` is this layer's in them.
    """

    def __init__(self, in_features: int, out_features: int, n_basis: int, shared: BatchCoefficients, row: int = 0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shared, self.row = shared, row
        self.weight = nn.Parameter(torch.empty(n_basis, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(n_basis, out_features))
        self.reset_parameters()

    def reset_parameters(self):
        """Draw each basis separately, at the scale of one linear layer."""
        for basis in self.weight:
            nn.init.xavier_uniform_(basis)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def copy_(self, linear: nn.Linear):
        """Make every basis a copy of `linear`."""
        self.weight.copy_(linear.weight.expand_as(self.weight))
        self.bias.copy_(linear.bias.expand_as(self.bias))

    def mix(self, alpha: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Theta_G = alpha_G beta for coefficients [G, K]: weight [G, out, in] and bias [G, out], rounded to `dtype` once."""
        with torch.autocast(alpha.device.type, enabled=False):  # it would round the K bases before it averages them
            if torch.compiler.is_compiling():  # one pass from the bases to the result, without anything between
                weight = (alpha[:, :, None, None] * self.weight).sum(1)
            else:
                weight = (alpha @ self.weight.flatten(1)).view(-1, self.out_features, self.in_features)
            return weight.to(dtype), (alpha @ self.bias).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] -> [B, ..., out]; the g-th of the G equal parts of the batch meets the g-th mixture."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        weight, bias = self.mix(self.shared.alpha[self.row], dtype)
        return (grouped_linear if device == "cpu" else batched_linear)(x.to(dtype), weight, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, n_basis={len(self.weight)}"


class RemixDiT(nn.Module):
    """A DiT whose blocks' linears are mixtures of `n_basis` bases, one mixture for each of `n_experts` experts.

    Every basis starts as a copy of `backbone` (which is left as it is); everything but the mixed layers is shared.
    mixer: "softmax"; "raw" (pi itself, no constraint); "one-hot" (the prior partition, fixed). scope: "global", one pi
    [N, K] for all blocks; "local", one a block, [depth, N, K]. pi starts at unit normal noise plus `prior_bonus` on the
    basis that a hand-made partition would choose, floor(i K / N) for expert i. mixed_layers: names within a block.
    Raises ValueError for numbers or names that cannot be.
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
    ):
        super().__init__()
        if n_basis < 1:
            raise ValueError(f"n_basis must be at least 1, not {n_basis}")
        if not 1 <= n_experts <= num_timesteps:
            raise ValueError(f"n_experts must be from 1 to the {num_timesteps} timesteps, not {n_experts}")
        if mixer not in MIXERS or scope not in SCOPES:
            raise ValueError(f"mixer is one of {MIXERS} and scope one of {SCOPES}, not {mixer!r} and {scope!r}")
        self.n_basis, self.n_experts, self.num_timesteps = n_basis, n_experts, num_timesteps
        self.mixer, self.scope, self.mixed_layers = mixer, scope, tuple(mixed_layers)
        self.backbone = copy.deepcopy(backbone)
        self.shared = BatchCoefficients()
        for index, block in enumerate(self.backbone.blocks):
            for name in self.mixed_layers:
                linear = block.get_submodule(name)
                row = index if scope == "local" else 0
                bases = RemixLinear(linear.in_features, linear.out_features, n_basis, self.shared, row)
                bases.copy_(linear)
                block.set_submodule(name, bases.to(linear.weight))

        self.register_buffer("prior", torch.arange(n_experts) * n_basis // n_experts, persistent=False)
        prior = F.one_hot(self.prior, n_basis).float()
        logits = prior.expand(len(self.backbone.blocks), -1, -1) if scope == "local" else prior
        if mixer != "one-hot":
            logits = torch.randn(logits.shape) + prior_bonus * logits
        if mixer == "raw":
            logits = logits.softmax(-1)  # the experts start as averages of the bases under every mixer
        like = self.backbone.final_layer.linear.weight
        self.logits = nn.Parameter(logits.to(like).contiguous(), requires_grad=mixer != "one-hot")  # pi
        self.prior = self.prior.to(like.device)

    @property
    def config(self) -> dict:
        """The keyword arguments, beside the backbone, that build this model."""
        names = ("n_basis", "n_experts", "mixer", "scope", "num_timesteps", "mixed_layers")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}

    @property
    def backbone_config(self) -> dict:
        """The keyword arguments of the DiT it wraps."""
        return dict(self.backbone.config)

    @property
    def in_channels(self) -> int:
        return self.backbone.in_channels

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    def expert_index(self, t: Tensor | int) -> Tensor | int:
        """The expert that owns each original timestep: the last i with floor(i T / N) <= t."""
        return (self.n_experts * (t + 1) - 1) // self.num_timesteps

    def coefficients(self) -> Tensor:
        """alpha [N, K], or [depth, N, K] when scope is local."""
        return self.logits.softmax(-1) if self.mixer == "softmax" else self.logits

    def prior_loss(self) -> Tensor:
        """Cross-entropy between softmax(pi) and the one-hot prior, mean over the experts, unweighted."""
        target = self.prior.expand(self.logits.shape[:-1])
        return F.cross_entropy(self.logits.flatten(0, -2), target.flatten())

    def reset_bases(self):
        """Draw every basis of every mixed layer anew and separately, for training from scratch (modulation starts at zero)."""
        for name, module in self._mixed():
            if not name.endswith(MODULATION):
                module.reset_parameters()

    def _mixed(self) -> list[tuple[str, RemixLinear]]:
        return [(name, module) for name, module in self.backbone.named_modules() if isinstance(module, RemixLinear)]

    @torch.no_grad()
    def distances(self) -> tuple[Tensor, Tensor]:
        """How far apart the bases are, [K, K], and how far the experts lie from their mean, a number.

        Root mean squares over the mixed weights, relative to the bases' own. All zero is a collapse.
        """
        apart, spread, size = 0, 0, 0
        alpha = self.coefficients().view(-1, self.n_experts, self.n_basis)
        alpha = alpha - alpha.mean(1, keepdim=True)
        for _, module in self._mixed():
            bases = module.weight.flatten(1)
            size = size + bases.square().sum() / self.n_basis
            bases = bases - bases.mean(0)  # the bases are alike: without their mean no digits are lost
            gram = bases @ bases.T
            apart = apart + gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
            row = alpha[module.row]
            spread = spread + ((row @ gram) * row).sum(1).mean()
        return (apart.clamp(min=0) / size).sqrt(), (spread / size).sqrt()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, groups: int | None = None, label_drop: Tensor | None = None
    ) -> Tensor:
        """Denoise every sample by its own expert; arguments and result are `DiT.forward`'s.

        groups: a promise that the batch is that many equal contiguous groups, each within one expert's timesteps. The
        groups then run side by side, without a host sync; otherwise the experts present run one after the other.
        Raises ValueError where `groups` does not divide the batch.
        """
        experts = self.expert_index(t)
        if groups is not None:
            if groups < 1 or len(x) % groups:
                raise ValueError(f"{groups} groups do not divide a batch of {len(x)}")
            return self._denoise(x, t, y, label_drop, experts.view(groups, -1)[:, 0])
        present, counts = experts.unique(return_counts=True)
        if len(present) == 1:
            return self._denoise(x, t, y, label_drop, present)
        order = experts.argsort(stable=True)
        outs = []
        for expert, rows in zip(present.split(1), order.split(counts.tolist()), strict=True):
            outs.append(
                self._denoise(x[rows], t[rows], y[rows], None if label_drop is None else label_drop[rows], expert)
            )
        return torch.cat(outs)[order.argsort()]

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None, experts: Tensor) -> Tensor:
        """Run the backbone with the batch's equal parts under `experts` [G]."""
        alpha = self.coefficients()
        self.shared.alpha = alpha.view(-1, self.n_experts, self.n_basis)[:, experts]
        try:
            return self.backbone(x, t, y, label_drop)
        finally:
            self.shared.alpha = None

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3) -> Tensor:
        """See `models.guide`."""
        return classifier_free_guidance(self, x, t, y, cfg_scale, guided_channels)

    def expert(self, i: int) -> DiT:
        """Expert i as a plain DiT of its own, in eval mode. Raises IndexError for i outside 0..N-1."""
        dit = DiT(**self.backbone.config).to(self.logits)
        shared = {k: v for k, v in self.backbone.state_dict().items() if k in self._shared_names()}
        dit.load_state_dict(shared, strict=False)
        self.fold_(dit, i)
        return dit.eval()

    def _shared_names(self) -> set[str]:
        mixed = {name for name, _ in self._mixed()}
        return {name for name in self.backbone.state_dict() if name.rpartition(".")[0] not in mixed}

    @torch.no_grad()
    def fold_(self, dit: DiT, i: int):
        """Write expert i's mixed weights into `dit`, in place."""
        if not 0 <= i < self.n_experts:
            raise IndexError(f"expert {i} of {self.n_experts}")
        alpha = self.coefficients().view(-1, self.n_experts, self.n_basis)[:, i].tolist()
        folded, bases, rows = [], [], []
        for name, module in self._mixed():
            linear = dit.get_submodule(name)
            folded += [linear.weight, linear.bias]
            bases += [module.weight, module.bias]
            rows += [alpha[module.row]] * 2
        torch._foreach_zero_(folded)  # all layers at once, and no matrix product, which on GPUs may be TF32
        for k in range(self.n_basis):
            torch._foreach_add_(folded, torch._foreach_mul([basis[k] for basis in bases], [row[k] for row in rows]))


class ExpertSwitch(nn.Module):
    """Plain DiTs for sampling, one an interval of timesteps, with a DiT's interface.

    Every batch must lie within one expert's timesteps, as a sampler's do; ValueError otherwise. Who knows the timestep
    without asking the device for it takes `at(timestep)` and runs that: then the host never waits.
    """

    def expert_index(self, t: int) -> int:
        raise NotImplementedError

    def select(self, i: int) -> DiT:
        raise NotImplementedError

    def for_timestep(self, timestep: int) -> DiT:
        """The plain DiT that serves an original timestep, until the next call."""
        return self.select(self.expert_index(timestep))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        first, last = map(self.expert_index, torch.stack(t.aminmax()).tolist())
        if first != last:
            raise ValueError(f"this model runs one expert at a time, the batch needs {first} to {last}")
        return self.select(first)(x, t, y)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3) -> Tensor:
        """See `models.guide`."""
        return classifier_free_guidance(self, x, t, y, cfg_scale, guided_channels)


class FoldedRemixDiT(ExpertSwitch):
    """A RemixDiT as one plain DiT, whose weights become the expert's, in place, whenever the expert changes."""

    def __init__(self, remix: RemixDiT):
        super().__init__()
        self.remix = remix
        self.dit = remix.expert(0)
        self.folded = 0

    def expert_index(self, t: int) -> int:
        return self.remix.expert_index(t)

    def select(self, i: int) -> DiT:
        if i != self.folded:
            self.remix.fold_(self.dit, i)
            self.folded = i
        return self.dit


class IndependentExperts(ExpertSwitch):
    """Plain DiTs trained apart, the paper's baseline: model i serves the timesteps from bounds[i] to bounds[i + 1].

    bounds: len(models) + 1 ascending timesteps, from 0.
    """

    def __init__(self, models: list[DiT], bounds: list[int]):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.bounds = list(bounds)

    def expert_index(self, t: int) -> int:
        return bisect.bisect_right(self.bounds, t, 1, len(self.bounds) - 1) - 1

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
    **backbone,
) -> RemixDiT:
    dit = DiT_models[backbone_name](**backbone)
    remix = RemixDiT(dit, n_basis, n_experts, mixer, scope, num_timesteps, mixed_layers, prior_bonus)
    remix.reset_bases()
    return remix


RemixDiT_models = {f"Remix{name}": partial(_from_scratch, name) for name in DiT_models}
