"""What training asks about the experts of a model. A model without experts answers with nothing."""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixing.low_rank import LowRankLinear
from models import data_shape, find_backbone
from remix import Remix, RemixLinear


class ParameterCounts(NamedTuple):
    """Numbers of parameters: of those that are trained, of those of whole bases, and of one mixture of these."""

    trained: int
    bases: int
    mixture: int


class Experts:
    """The experts of a plain model: there are none.

    Args:
        model: the model.

    Attributes:
        model: the model.
        backbone: the plain model, or the one whose layers are mixed.
        n_experts: number of experts N; None if there are none.
        boundaries: the N + 1 noise levels between the experts' intervals; None if there are none.
        logits: the mixing logits, if they are trained, as a list of one parameter; otherwise an empty list.
        layers: the mixed layers by name.
    """

    n_experts: int | None = None
    boundaries: list[float] | None = None

    def __init__(self, model: nn.Module):
        self.model = model
        self.backbone = model
        self.logits: list[nn.Parameter] = []
        self.layers: dict[str, RemixLinear | LowRankLinear] = {}

    def owners(self, times: Iterable[float]) -> list[int] | None:
        """Return the index of the expert that owns each time of the network; None if there are no experts."""
        return None

    def metrics(self) -> dict:
        """Return what metrics.jsonl reports about the experts."""
        return {}

    def count_parameters(self) -> ParameterCounts:
        """Count the parameters. Low-rank bases do not count as bases, because they are not mixed."""
        return ParameterCounts(sum(p.numel() for p in self.model.parameters() if p.requires_grad), 0, 0)

    def training_flops(self) -> int:
        """Count the FLOPs of a training step per image: those of the plain model, forward and twice as many backward.

        Those of mixing and of low-rank bases are not included.
        """
        return 3 * find_backbone(self.backbone).count_flops(self.backbone.config)

    def low_rank_flops(self) -> int:
        """Count the FLOPs that low-rank bases add to a training step per image, forward and backward."""
        return 0

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the backbone."""
        return find_backbone(self.backbone).find_blocks(self.backbone)

    def recompute_blocks(self, compiled: bool):
        """Let every block store only its inputs in the forward pass, and run again in the backward pass.

        Args:
            compiled: whether the model will be compiled.
        """
        options = {"use_reentrant": False, "preserve_rng_state": False} | self._recompute_options(compiled)
        for block in self.blocks:
            block.forward = partial(checkpoint, block.forward, **options)

    def _recompute_options(self, compiled: bool) -> dict:
        return {}


class RemixExperts(Experts):
    """The experts of a Remix. The arguments and attributes are those of `Experts`."""

    def __init__(self, model: Remix):
        super().__init__(model)
        self.backbone = model.backbone
        self.n_experts, self.boundaries = model.n_experts, model.boundaries
        # One-hot coefficients are fixed: their logits are not trained.
        self.logits = [model.logits] if model.logits.requires_grad else []
        self.layers = dict(model.mixed())

    def owners(self, times: Iterable[float]) -> list[int]:
        return [self.model.expert_index(t) for t in times]

    def count_parameters(self) -> ParameterCounts:
        trained = super().count_parameters().trained
        if self.model.rank is not None:
            return ParameterCounts(trained, 0, 0)
        bases = sum(p.numel() for layer in self.layers.values() for p in layer.bases())
        return ParameterCounts(trained, bases, bases // self.model.n_basis)

    def low_rank_flops(self) -> int:
        if self.model.rank is None:
            return 0
        flops, config = 0, self.backbone.config
        with torch.device("meta"):
            plain = find_backbone(self.backbone).module(**config).eval()
            x = torch.empty(1, *data_shape(config))

        def count(pairs: int, linear: nn.Linear, arguments: tuple[Tensor], output: Tensor):
            nonlocal flops
            flops += 3 * 2 * pairs * (arguments[0].numel() // linear.in_features)

        for name, layer in self.layers.items():
            pairs = sum(p.numel() for p in layer.bases())
            plain.get_submodule(name).register_forward_hook(partial(count, pairs))
        plain(x, torch.empty(1, device="meta"), torch.empty(1, dtype=torch.long, device="meta"))
        return flops

    @torch.no_grad()
    def metrics(self) -> dict:
        """Return numbers that show how the experts mix the bases, and whether they have become equal.

        Returns:
            A dict of nested lists and numbers:
            "coefficients": alpha [N, K], or [depth, N, K] if the scope is local.
            "entropy": entropy of each expert's coefficients [N], in nats; 0 is one-hot. Raw coefficients, which may be
                negative, are no distribution and have none.
            "basis_distances": relative distances between the bases [K, K]; all 0 if the bases are equal.
            "expert_spread": relative distance of the experts from their mean; 0 if the experts are equal.
        """
        alpha = self.model.coefficients()
        basis_distances, expert_spread = self.model.distances()
        metrics = {"coefficients": alpha.tolist()}
        if self.model.mixer != "raw":
            entropy: Tensor = -(alpha * alpha.clamp(min=1e-12).log()).sum(-1)
            metrics["entropy"] = entropy.view(-1, self.n_experts).mean(0).tolist()
        metrics["basis_distances"] = basis_distances.tolist()
        metrics["expert_spread"] = expert_spread.item()
        return metrics

    def _recompute_options(self, compiled: bool) -> dict:
        # Without compilation, the backward pass calls the block again when the batch's coefficients are already
        # cleared. These contexts restore them.
        return {} if compiled else {"context_fn": self.model.batch_coefficients.contexts}


def experts_of(model: nn.Module) -> Experts:
    """Return the experts of a model."""
    return RemixExperts(model) if isinstance(model, Remix) else Experts(model)
