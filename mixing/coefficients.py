"""The mixing coefficients: their initial logits, and those of the batch in flight, which all mixed layers share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint


def prior_bases(n_basis: int, n_experts: int, device: torch.device | str) -> Tensor:
    """Return the basis of each expert in the one-hot prior [N]: floor(i K / N) for expert i."""
    return torch.tensor([i * n_basis // n_experts for i in range(n_experts)], device=device)


def initial_logits(n_basis: int, n_experts: int, depth: int | None, mixer: str, prior_bonus: float) -> Tensor:
    """Return the initial logits pi of the experts.

    Args:
        n_basis: number of bases K.
        n_experts: number of experts N.
        depth: number of blocks that have logits of their own; None for one pi for all blocks.
        mixer: see `remix.Remix`.
        prior_bonus: number added to the logit of each expert's basis in the prior.

    Returns:
        pi [N, K], or [depth, N, K], on the CPU.
    """
    logits = F.one_hot(prior_bases(n_basis, n_experts, "cpu"), n_basis).float()  # [N, K]
    if depth is not None:
        logits = logits.expand(depth, -1, -1)  # [depth, N, K]
    if mixer != "one-hot":
        logits = torch.randn(logits.shape, device="cpu") + prior_bonus * logits
    # With "raw", the rows are non-negative and sum to 1: these experts also start as averages of the bases.
    return logits.softmax(-1) if mixer == "raw" else logits


def expert_weights(weights: list[float] | None, n_experts: int) -> Tensor:
    """Return weights of the experts that sum to 1 [N], float64: in proportion to `weights`, or equal ones for None.

    Raises:
        ValueError: if there are not N weights, or one of them is negative, or all are 0.
    """
    weights = torch.ones(n_experts) if weights is None else torch.tensor(weights)
    if len(weights) != n_experts or not weights.min() >= 0 or not weights.sum() > 0:
        raise ValueError(f"expected {n_experts} weights of at least 0, not all of them 0")
    return weights.double() / weights.double().sum()


class Coefficients(nn.Module):
    """The mixing coefficients alpha of all experts. They have a module of their own, which can be sharded on its own.

    Args:
        logits: the initial logits pi [N, K] or [depth, N, K], float32 (float64 in a model of float64).
        mixer: see `remix.Remix`.
    """

    def __init__(self, logits: Tensor, mixer: str):
        super().__init__()
        self.mixer = mixer
        self.logits = nn.Parameter(logits.contiguous(), requires_grad=mixer != "one-hot")

    def forward(self, prior: Tensor | None = None) -> Tensor:
        """Return the coefficients alpha [N, K], or [depth, N, K] if the scope is local.

        Args:
            prior: return the cross-entropy between softmax(pi) and these bases [N] instead, averaged over the experts.

        Raises:
            TypeError: if a policy of mixed precision has cast the logits, whose gradients would be wrong.
        """
        if self.logits.dtype.itemsize < 4:
            raise TypeError(
                f"the mixing coefficients must be float32, but their logits were cast to {self.logits.dtype}: "
                "apply mixing.fsdp.fully_shard, which leaves them out of the mixed precision"
            )
        if prior is not None:
            return F.cross_entropy(self.logits.flatten(0, -2), prior.expand(self.logits.shape[:-1]).flatten())
        return self.logits.softmax(-1) if self.mixer == "softmax" else self.logits

    def _apply(self, fn: Callable, *args, **kwargs) -> "Coefficients":
        """Move or convert the logits, but keep them in float32 in half precision, which would lose their updates."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return converted if converted.dtype.itemsize >= 4 else tensor.to(converted.device)

        return super()._apply(convert, *args, **kwargs)

    def per_expert(self) -> list[list[list[float]]]:
        """Return the coefficients of each expert, [N][1 or depth][K], computed on the host, as equal on all devices.

        Raises:
            ValueError: if the logits have no values, because the Remix is offloaded or on the meta device.
        """
        logits = self.logits.detach()
        if logits.is_meta:
            raise ValueError("a Remix that is offloaded or on the meta device has no experts: make them before")
        # FSDP divides the rows among the processes.
        logits = (logits.full_tensor() if hasattr(logits, "full_tensor") else logits).cpu()
        alpha = logits.softmax(-1) if self.mixer == "softmax" else logits
        return alpha.view(-1, *alpha.shape[-2:]).transpose(0, 1).tolist()


class RowsError(ValueError):
    """The input of a mixed layer cannot be divided among the samples or groups of the batch."""


class BatchCoefficients:
    """The coefficients of the current batch, shared by all mixed layers.

    training/sharding.py has a subclass for bases that are divided among several processes.
    """

    # [1 or depth, G, K] while Remix.forward runs
    alpha: Tensor | None = None
    # An empty row for each sample of the batch [B, 0]. Compiled blocks would be compiled again for each number B, but
    # not for each shape.
    samples: Tensor | None = None
    # Whether the G groups are the samples of the batch.
    per_sample: bool = False

    def start(self, alpha: Tensor, experts: Tensor, size: int, per_sample: bool = False):
        """Select the coefficients of a batch of `size` samples in G equal groups.

        Args:
            alpha: the coefficients of all experts [1 or depth, N, K].
            experts: the experts of the groups [G].
            size: number of samples B.
            per_sample: whether the G groups are the samples.

        Raises:
            RuntimeError: if another batch is in flight.
        """
        # A compiled graph would depend on whether it is the first one.
        if not torch.compiler.is_compiling() and self.alpha is not None:
            raise RuntimeError("a Remix was called while it runs, such as in two threads: use a copy in each of them")
        self.alpha, self.samples, self.per_sample = alpha[:, experts], alpha.new_empty(size, 0), per_sample

    def of(self, row: int, x: Tensor) -> Tensor:
        """Return the current coefficients [G, K] for a layer with this row and its input x [rows, ..., in].

        Each sample has equally many rows, one after the other. Only their number can be checked. A single group may
        have any number of rows.

        Raises:
            RuntimeError: if a layer runs outside `Remix.forward`.
            RowsError: if B does not divide the number of rows, or the groups are samples and it is another number.
        """
        if self.alpha is None:
            raise RuntimeError(
                "a mixed layer runs only while its Remix is called, and not another method of its module; a checkpoint "
                "of activations that repeats it later needs context_fn=remix.batch_coefficients.contexts and "
                "use_reentrant=False"
            )
        n_groups, size = self.alpha.shape[1], len(self.samples)
        if n_groups > 1 and (len(x) != size if self.per_sample else len(x) % size):
            raise RowsError(
                f"the first dimension of a mixed layer's input {list(x.shape)} is not the batch of {size} "
                "samples: use batches of one expert, or leave the layer out"
            )
        return self.alpha[row]

    def end(self):
        """Forget the batch."""
        self.alpha = self.samples = None

    def __getstate__(self) -> dict:
        """Return what copies get: not the batch, which would never end in a copy that is made while it is in flight."""
        return vars(self) | dict.fromkeys(("alpha", "samples"))

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the processes that the bases are divided among."""
        return values

    def checkpoint(self, function: Callable, *args, **kwargs) -> Any:
        """Call a function with activation checkpointing. It may contain mixed layers."""
        # A compiled graph holds the coefficients of both passes, and no graph can enter the contexts.
        options = {} if torch.compiler.is_compiling() else {"context_fn": self.contexts}
        return checkpoint.checkpoint(function, *args, use_reentrant=False, **options, **kwargs)

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
