"""Remix-DiT: N denoising experts that are learned mixtures of K basis models (Fang et al., 2024, arXiv 2412.05628).

Expert i denoises one interval of the noise levels. In the mixed layers, its parameters are the average of the K bases'
parameters beta, weighted by row i of the coefficients alpha: Theta = alpha beta with alpha = softmax(pi). The other
layers are shared by all experts. Once its layers are mixed, an expert has the shape and the cost of the plain model.

`Remix` makes experts of any transformer, and `RemixDiT` those of a DiT.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.intervals import EITHER, TIMESTEPS, level_dtype, scale_of
from mixing import fsdp, wrapping
from mixing.coefficients import BatchCoefficients, Coefficients, RowsError, expert_weights, initial_logits
from mixing.experts import ExpertIntervals, centered_gram, measure_distances, restore_intervals
from mixing.folding import copy_unmixed, fold_stage, plain_expert
from mixing.grouped_linear import mix_into, mixed_linear
from mixing.low_rank import LowRankLinear, pair_options
from mixing.options import PRIOR_BONUS, complete_options
from mixing.presets import Preset, complete_preset
from mixing.stages import Stages, find_modules, run, run_parts, share_pairs
from models import BACKBONES, build_plain, classifier_free_guidance, find_backbone


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
        self, in_features: int, out_features: int, n_basis: int, batch_coefficients: BatchCoefficients, row=0, bias=True
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.batch_coefficients, self.row = batch_coefficients, row
        self.weight = nn.Parameter(torch.empty(n_basis, out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(n_basis, out_features)) if bias else None)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply mixture g to the g-th of the G equal parts of the batch, x [B, ..., in] -> [B, ..., out]."""
        alpha = self.batch_coefficients.of(self.row, x)  # [G, K]
        return mixed_linear(x, alpha, self.weight, self.bias)  # [B, ..., out]

    def reset_parameters(self):
        """Draw each basis separately, with the initialization of a single linear layer."""
        for basis in self.weight:
            nn.init.xavier_uniform_(basis)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, n_basis: int, *coefficients) -> "RemixLinear":
        """Return a mixed layer every basis of which is a copy of `linear`, with `batch_coefficients` and `row`."""
        with torch.device("meta"):
            mixed = cls(linear.in_features, linear.out_features, n_basis, *coefficients, bias=linear.bias is not None)
        mixed.weight = nn.Parameter(linear.weight.repeat(n_basis, 1, 1))
        if linear.bias is not None:
            mixed.bias = nn.Parameter(linear.bias.repeat(n_basis, 1))
        return mixed

    def bases(self) -> list[nn.Parameter]:
        """Return the parameters of the bases."""
        return list(self.parameters())

    def gram(self) -> tuple[Tensor, Tensor]:
        """Return the inner products [K, K] of the bases' weights minus their mean, and the mean squared norm []."""
        return centered_gram(self.weight)

    @staticmethod
    def fold(layers: list["RemixLinear"], linears: list[nn.Linear], alpha: list[float]):
        """Write the mixtures of several layers into plain layers, in place.

        Args:
            layers: the mixed layers.
            linears: for each of them, the layer whose weight and bias are overwritten.
            alpha: coefficients [K].
        """
        parts = [
            (getattr(layer, kind), getattr(linear, kind))
            for layer, linear in zip(layers, linears, strict=True)
            for kind in ("weight", "bias")
        ]
        mix_into(alpha, [(bases, tensor) for bases, tensor in parts if tensor is not None])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, n_basis={len(self.weight)}"


class Remix(wrapping.TransparentModule):
    """Experts of any transformer: a module of which some linear layers are mixed.

    The one-hot prior assigns basis floor(i K / N) to expert i. With the mixer "softmax", the logits pi start as unit
    normal noise, plus `prior_bonus` at the basis of the prior. With "raw", pi starts as the softmax of these numbers.
    With "one-hot", pi is the prior.

    Attributes of the module, such as the `config` that pipelines of diffusers read, are also attributes of this one.

    Args:
        module: the module. It is changed in place: its mixed layers are replaced. Every basis starts as a copy of the
            layer that it replaces. With `rank`, layers of subclasses of `nn.Linear` and quantized ones can be mixed.
            With `stages`, a list of modules of one class, that of the least noise first.
        layers: names of the `nn.Linear` layers to mix, in which * stands for any text without a dot, such as
            "blocks.*.mlp.fc1"; every name must match a layer. None: those that mixing/presets.py lists for the module's
            class.
        n_basis: number of bases K.
        n_experts: number of experts N, with equal intervals of the noise levels, or as `options.divide_stages` divides
            the stages. It may be omitted with `boundaries`, and with `stages`, each of which is one expert then.
        boundaries: N + 1 increasing noise levels. Expert i denoises boundaries[i] <= level < boundaries[i + 1]. The
            last expert also denoises the last boundary. Expert 0 has the least noise.
        timestep: the argument of the module that holds the noise level of each sample [B], as its name; or a function
            that is called with the module's arguments and returns the noise levels. If they have more dimensions, the
            expert is that of a sample's highest level. None: that of the preset.
        mixer: "softmax" (alpha = softmax(pi)), "raw" (alpha = pi, without a constraint) or "one-hot" (alpha is the
            prior and is not trained).
        scope: "global" (one pi [N, K] for all blocks) or "local" (one per block, [depth, N, K]). The block of a layer
            is its name up to the first number.
        highest_level: highest noise level, such as 1000 or 1. None: that of the preset, or the last of the boundaries,
            or of the stages.
        prior_bonus: number added to the initial logit of each expert's basis in the prior. The published one is 3.
        rank: rank of low-rank bases; see `low_rank.LowRankLinear`. None: every basis is a whole layer.
        stages: S + 1 increasing noise levels, for S modules whose layouts are equal. Module s is frozen, and denoises
            stages[s] <= level < stages[s + 1], compared as they are, also by levels that are rounded. All of `stages`
            must be boundaries of experts. The modules share the low-rank bases. It needs `rank`.
        unbatched: names of arguments that may have as many rows as the batch but are no batches.
        batch_dims: the dimension of the batch in the tensors of some arguments, where it is not the first one, by the
            names of the arguments. A list in these arguments is no batch, but may hold tensors that are.

    Attributes:
        coefficients: a module that returns the coefficients alpha: `coefficients()` is [N, K], or [depth, N, K] if the
            scope is local, in float32.
        mixing_config: the keyword arguments that build this Remix from its module; `prior_bonus`, which concerns only
            the initial logits, is left out.
        pairs: only with `stages`: the low-rank bases, under the names of the layers.
        other_stages: only with `stages`: the modules of the stages 1 to S - 1. That of stage 0 is `backbone`.

    Raises:
        ValueError: if the module is no `nn.Module`, no layer matches, a layer cannot be mixed, the timestep is no
            argument of the module, the modules of stages differ, or another argument is out of range or unknown.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        layers: Sequence[str] | None = None,
        n_basis: int = 4,
        n_experts: int | None = None,
        boundaries: Sequence[float] | None = None,
        timestep: str | Callable[..., Tensor] | None = None,
        *,
        mixer: str = "softmax",
        scope: str = "global",
        highest_level: float | None = None,
        prior_bonus: float = PRIOR_BONUS,
        rank: int | None = None,
        stages: Sequence[float] | None = None,
        unbatched: Sequence[str] = (),
        batch_dims: Mapping[str, int] | None = None,
    ):
        super().__init__()
        module, *others = modules = find_modules(module, stages, rank)
        given = Preset(layers, (), timestep, highest_level, unbatched, batch_dims or {})
        fsdp.check_whole(modules)
        wrapped = complete_preset(module, given, stages if boundaries is None else boundaries)
        options = dict(n_basis=n_basis, n_experts=n_experts, mixer=mixer, scope=scope, boundaries=boundaries)
        options = complete_options(options | dict(highest_level=wrapped.highest_level, rank=rank, stages=stages))
        self.stage_boundaries = options.get("stages")
        self.n_basis, self.n_experts, self.boundaries = n_basis, options["n_experts"], options["boundaries"]
        self.mixer, self.scope, self.rank = mixer, scope, rank
        self.highest_level = wrapped.highest_level
        self.mixing_config = options | dict(layers=layers and [*layers], timestep=wrapped.timestep)
        self.mixing_config |= dict(unbatched=[*unbatched], batch_dims=dict(batch_dims or {}))
        self.arguments = wrapping.Arguments(module, wrapped)
        self.unchecked = [*wrapped.layers]
        if rank is None:
            self._refused = wrapping.NOT_OF_A_REMIX | wrapping.NOT_OF_WHOLE_BASES
        linears = wrapping.find_linears(module, wrapped.layers, wrapped.optional_layers, rank is not None)
        names_of_layers = [*linears.values()]
        self.tokens_first = wrapping.find_tokens_first(module, (names[0] for names in names_of_layers))
        # Whether a batch of several experts is one call of the module. `forward` finds out if it cannot be.
        self.runs_at_once = rank is not None and not self.tokens_first
        blocks = list(dict.fromkeys(wrapping.block_name(names[0]) for names in names_of_layers))
        device, dtype = pair_options(next(iter(linears))).values()
        # Each layer is freed as soon as it is replaced.
        del linears

        # Its logits are the first parameter. They are drawn last.
        self.register_module("coefficients", None)
        self.backbone = module
        self.batch_coefficients = BatchCoefficients()
        if others:
            self.other_stages, self.pairs = nn.ModuleList(others), nn.Module()
            self.requires_grad_(False)
        shape = (n_basis,) if rank is None else (n_basis, rank)
        make = RemixLinear.from_linear if rank is None else LowRankLinear
        for names in names_of_layers:
            row = blocks.index(wrapping.block_name(names[0])) if scope == "local" else 0
            coefficients = self.batch_coefficients, row
            if others:
                mixed = share_pairs(modules, self.pairs, names[0], shape, *coefficients)
            else:
                mixed = [make(module.get_submodule(names[0]), *shape, *coefficients)]
            for stage, layer in zip(modules, mixed, strict=True):
                for name in names:
                    stage.set_submodule(name, layer)
        for stage in modules:
            wrapping.leave_fast_paths(stage)
        unrounded = self.stages.boundaries[1:-1]
        self.intervals = ExpertIntervals(self.boundaries, n_basis, device, self._directions(), unrounded)
        self.register_load_state_dict_post_hook(restore_intervals)
        depth = len(blocks) if scope == "local" else None
        logits = initial_logits(n_basis, self.n_experts, depth, mixer, prior_bonus)
        self.coefficients = Coefficients(logits.to(device, dtype), mixer)

    @property
    def logits(self) -> nn.Parameter:
        """The logits pi of the mixing coefficients [N, K], or [depth, N, K] if the scope is local."""
        return self.coefficients.logits

    @property
    def stages(self) -> Stages:
        """Which module runs each interval of noise levels."""
        modules = [self.backbone, *self._modules.get("other_stages", ())]
        shared = [self._modules[name] for name in ("pairs", "coefficients", "intervals") if self._modules.get(name)]
        levels = self.stage_boundaries or [self.boundaries[0], self.boundaries[-1]]
        return Stages(levels, self.boundaries, modules, shared)

    @property
    def backbone_config(self) -> dict:
        """The keyword arguments that build its module."""
        return dict(self.backbone.config)

    def noise_level(self, t: Tensor | float) -> Tensor | np.float32:
        """Return the noise level of what the argument `timestep` holds, a tensor or a number."""
        t = t.float() if isinstance(t, Tensor) else np.float32(t)
        return self.highest_level - t if self.arguments.reverses else t

    def _directions(self) -> tuple[bool, ...]:
        """Return how noise levels are rounded; see `diffusion.intervals.inner_boundaries`."""
        return EITHER if callable(self.arguments.timestep) else (self.arguments.reverses,)

    def expert_index(self, t: Tensor | float, dtype: torch.dtype | None = None) -> Tensor | int:
        """Return the index of the expert that owns each value of the argument `timestep`, a tensor or a number.

        A step on a boundary belongs to the expert above, also if its noise level is rounded below the boundary, unless
        it is one of stages: `dtype` is the type in which the values have arrived, by default that of `t`.
        """
        return self.intervals.find(self.noise_level(t), dtype or level_dtype(t))

    def coefficients_per_row(self) -> Tensor:
        """Return the coefficients [1 or depth, N, K] for every scope."""
        return self.coefficients().view(-1, self.n_experts, self.n_basis)

    def prior_loss(self) -> Tensor:
        """Return the cross-entropy between softmax(pi) and the one-hot prior, averaged over the experts, unweighted."""
        return self.coefficients(self.intervals.prior)

    def reset_bases(self):
        """Draw every basis separately, for training from scratch."""
        for _, layer in self.mixed():
            layer.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args):
        """Also read the name of the logits in checkpoints; see `experts.stored_state`."""
        if (logits := state_dict.pop(f"{prefix}logits", None)) is not None:
            state_dict[f"{prefix}coefficients.logits"] = logits
        super()._load_from_state_dict(state_dict, prefix, *args)

    def mixed(self, stage: int = 0) -> list[tuple[str, RemixLinear | LowRankLinear]]:
        """Return the mixed layers of a stage, and their names within its module. All stages have the same bases."""
        kinds = (RemixLinear, LowRankLinear)
        modules = self.stages.module(stage).named_modules()
        return [(name, layer) for name, layer in modules if isinstance(layer, kinds)]

    def freeze_shared(self):
        """Let only the bases and the coefficients be trained: with low rank, the pairs and the coefficients."""
        self.requires_grad_(False)
        for basis in (basis for _, layer in self.mixed() for basis in layer.bases()):
            basis.requires_grad_()
        self.logits.requires_grad_(self.mixer != "one-hot")

    def distances(self) -> tuple[Tensor, Tensor]:
        """Return the distances between the bases [K, K] and that of the experts; see `experts.measure_distances`."""
        return measure_distances(self)

    def forward(self, *args, groups: int | None = None, **kwargs) -> Any:
        """Denoise every sample by its own expert.

        Args:
            *args, **kwargs: the arguments of the module.
            groups: if given, the caller promises that the batch is this many equal contiguous groups, each within the
                noise levels of one expert. They run as one batch, without a host sync. Noise levels are not checked.
                The first dimension of the inputs of all mixed layers must be the batch. By default, low-rank bases run
                the whole batch at once too, unless this dimension is another one or the samples are in lists. Whole
                bases run one expert after the other. With stages, a batch is one pass per stage, after a host sync.

        Returns:
            The result of the module.

        Raises:
            ValueError: if `groups` does not divide the batch size, or a layer has the batch as its second dimension; a
                noise level is outside the boundaries; or it is not clear how to divide an argument among the experts.
            TypeError: if the noise level is missing.
        """
        # Forward-mode differentiation has no rules for what follows.
        t = self.times(*args, **kwargs).detach()
        experts = self.expert_index(t)  # [B]
        if groups is not None:
            if isinstance(groups, float) or groups < 1 or len(experts) % groups:
                raise ValueError(f"groups must divide the batch size {len(experts)}, but it is {groups}")
            if groups > 1 and self.tokens_first:
                raise ValueError(f"groups needs batch_first=True in PyTorch's layer around {self.tokens_first}")
            # Rounding can move some samples of a group to the expert above; to the one below only across stages.
            return run(self, experts.view(groups, -1).amin(1), len(t), args, kwargs)
        lists = self.arguments.batches_are_lists(len(t), args, kwargs)
        at_once = self.runs_at_once and not lists
        if at_once and torch.compiler.is_compiling():
            return run(self, experts, len(t), args, kwargs, per_sample=len(experts) > 1)
        self.intervals.check(self.noise_level(t), level_dtype(t))
        present, counts = experts.unique(return_counts=True)
        if len(present) == 1:
            return run(self, present, len(t), args, kwargs)
        if not at_once and fsdp.is_sharded(self):
            raise ValueError("a sharded Remix needs groups: its processes must call the module equally often")
        if at_once:
            try:
                return run(self, experts, len(t), args, kwargs, per_sample=True)
            except RowsError:
                # Layers of this module see other rows than the samples, such as folded frames or routed tokens.
                if fsdp.is_sharded(self):
                    raise
                self.runs_at_once = False
        owners, sizes = torch.stack([present, counts]).tolist()
        rows = experts.argsort(stable=True).split(sizes)  # [B] in all
        parts = zip(map(self.stages.of, owners), rows, present.split(1), strict=True)
        return run_parts(self, [*parts], len(t), args, kwargs)

    def times(self, *args, **kwargs) -> Tensor:
        """Return what the argument `timestep` holds for each sample, [B] or [1]."""
        return self.arguments.times(args, kwargs)

    def enable_gradient_checkpointing(self):
        """Let a model of diffusers store only the inputs of each block, and compute the activations again."""
        for module in self.stages.modules:
            module.enable_gradient_checkpointing(self.batch_coefficients.checkpoint)

    def expert(self, i: int) -> nn.Module:
        """Return expert i as a module of the wrapped class with its own parameters, in eval mode; see `fold_`.

        Every process calls it if the Remix is sharded (`mixing.fsdp`). Only rank 0 gets a module then.
        """
        s = self.stages.of(i)
        return plain_expert(self, self.coefficients.per_expert()[i], s)

    def merge(self, weights: list[float] | None = None) -> nn.Module:
        """Return a weighted mean of the experts' weights as a plain module with its own parameters, in eval mode.

        Experts are linear in their coefficients, so the mean of the experts is the expert of the mean coefficients.

        Args:
            weights: weight of each expert, at least 0 [N]; they are divided by their sum. Default: equal weights.

        Raises:
            ValueError: if there are not N weights, or one of them is negative, or all are 0, or experts of several
                stages have weights.
        """
        weights = expert_weights(weights, self.n_experts)[:, None]  # [N, 1]
        first, *others = {self.stages.of(i) for i in weights.flatten().nonzero().flatten().tolist()}
        if others:
            raise ValueError("experts of several stages cannot be merged: give weights of 0 to those of all but one")
        alpha = self.coefficients_per_row().detach().double().cpu()  # [1 or depth, N, K]
        return plain_expert(self, (weights * alpha).sum(1).tolist(), first)

    def fold_(self, module: nn.Module, i: int):
        """Write the parameters of expert i that it does not share into `module`, in place.

        Args:
            module: the result of `expert` for any expert.
            i: the expert.

        Raises:
            IndexError: if i is not from 0 to N - 1.
        """
        s = self.stages.of(i)
        fold_stage(self, module, self.coefficients.per_expert()[i], s)
        if len(self.stages) > 1:
            copy_unmixed(self, module, s)


class RemixDiT(Remix):
    """A Remix of one of the backbones of models/. It is called like its backbone.

    Args:
        backbone: a DiT or another backbone, which is not changed. Every basis starts as a copy of its weights.
        n_basis, n_experts, mixer, scope: see `Remix`.
        **options: the other options of `Remix`. By default, the layers are those of the backbone's record. For Gaussian
            diffusion the noise level is the timestep t, from 0 to 1000. For flow matching, whose boundaries end at 1,
            it is 1 - t.

    Raises:
        ValueError: see `Remix`; or if the backbone has no record.
    """

    def __init__(
        self, backbone: nn.Module, n_basis: int, n_experts: int, mixer: str = "softmax", scope="global", **options
    ):
        options = {name: value for name, value in options.items() if value is not None}
        scale = scale_of(options.get("boundaries") or [TIMESTEPS])
        highest = TIMESTEPS if scale.whole else scale.highest
        options = dict(timestep="t", highest_level=highest) | options
        usual = find_backbone(backbone).mixed_layers
        options["layers"] = wrapping.find_present(backbone, options.get("layers", usual), optional=usual)
        options |= dict(n_basis=n_basis, n_experts=n_experts, mixer=mixer, scope=scope)
        super().__init__(copy.deepcopy(backbone), **options)

    def noise_level(self, t: Tensor | float) -> Tensor | np.float32:
        """See `diffusion.intervals.NoiseScale.level`."""
        return scale_of(self.boundaries).level(t)

    def _directions(self) -> tuple[bool, ...]:
        return (scale_of(self.boundaries).reverses,)

    forward_with_cfg = classifier_free_guidance

    def reset_bases(self):
        """Draw every basis separately, for training from scratch. Mixed modulation layers keep their initial zeros."""
        modulation = find_backbone(self.backbone).modulation
        for name, layer in self.mixed():
            if not wrapping.matches(name, modulation):
                layer.reset_parameters()


def build_remix(name: str, **options) -> RemixDiT:
    """Build a RemixDiT with separately drawn bases.

    Args:
        name: name of its backbone, such as "DiT-S/2", or its own name, "RemixDiT-S/2".
        **options: the options of `Remix`, by default n_basis=4 and n_experts=20; and further arguments of the backbone,
            such as `input_size`.

    Raises:
        ValueError: see `RemixDiT` and the backbone's class.
    """
    mixing = {key: options.pop(key) for key in inspect.signature(Remix).parameters if key in options}
    remix = RemixDiT(build_plain(name, **options), **dict(n_basis=4, n_experts=20) | mixing)
    remix.reset_bases()
    return remix


RemixDiT_models = {
    f"Remix{name}": partial(build_remix, name) for backbone in BACKBONES.values() for name in backbone.models()
}
