"""The mixing coefficients: their initial logits, and those of the batch in flight, which all mixed layers share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
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


class BatchCoefficients:
    """The coefficients of the current batch, shared by all mixed layers.

    training/sharding.py has a subclass for bases that are divided among several processes.
    """

    # [1 or depth, G, K] while Remix.forward runs
    alpha: Tensor | None = None

    def start(self, alpha: Tensor, experts: Tensor):
        """Select the coefficients of the experts [G] of a batch from those of all experts [1 or depth, N, K]."""
        self.alpha = alpha[:, experts]

    def of(self, row: int) -> Tensor:
        """Return the coefficients [G, K] of the current batch for the layers with this row.

        Raises:
            RuntimeError: if a layer runs outside `Remix.forward`.
        """
        if self.alpha is None:
            raise RuntimeError(
                "a mixed layer runs only while its Remix is called; a checkpoint of activations that repeats it later "
                "needs context_fn=remix.batch_coefficients.contexts"
            )
        return self.alpha[row]

    def end(self):
        """Forget the batch."""
        self.alpha = None

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
