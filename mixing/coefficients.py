"""The coefficients of the batch in flight, which all mixed layers share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor


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
