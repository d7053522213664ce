"""Low-rank bases: experts that differ from one linear layer by a weighted sum of K pairs of small matrices."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """A linear layer with K low-rank bases. Mixture g has the weight W + sum_k alpha[g, k] B_k A_k.

    The pairs start as in LoRA (Hu et al., arXiv 2106.09685, section 4.1): A_k is random and B_k is zero, so that every
    mixture starts as the linear layer. The mixtures are not computed: the pairs are applied to the input.

    Args:
        linear: the layer whose weight W and bias are used, and trained if they require gradients.
        n_basis: number of bases K.
        rank: rank r of each pair.
        batch_coefficients: holds the coefficients of the current batch, a `remix.BatchCoefficients`.
        row: index of this layer's coefficients in `batch_coefficients.alpha`.
    """

    def __init__(self, linear: nn.Linear, n_basis: int, rank: int, batch_coefficients, row: int = 0):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.batch_coefficients = batch_coefficients
        self.row = row
        self.weight, self.bias = linear.weight, linear.bias
        # Their updates would be lost in half precision, in which a frozen W is often stored.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(linear.weight.new_empty(n_basis, rank, linear.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(linear.weight.new_empty(n_basis, linear.out_features, rank, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply mixture g to the g-th of the G equal parts of the batch, x [B, ..., in] -> [B, ..., out]."""
        alpha = self.batch_coefficients.of(self.row)  # [G, K]
        a = self.lora_A.flatten(0, 1).to(x.dtype)  # [K * r, in]
        b = self.lora_B.transpose(0, 1).flatten(1).to(x.dtype)  # [out, K * r]
        h = F.linear(x, a)  # [B, ..., K * r]
        # The coefficients multiply in float32: their gradients are sums over all tokens of a group.
        scales = alpha.repeat_interleave(self.lora_A.shape[1], dim=1)[:, None]  # [G, 1, K * r]
        h = (h.reshape(len(alpha), -1, h.shape[-1]) * scales).view(h.shape).to(h.dtype)
        return F.linear(x, self.weight, self.bias) + F.linear(h, b)

    @torch.no_grad()
    def reset_parameters(self):
        """Draw the initial pairs. The linear layer is not changed."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def bases(self) -> list[nn.Parameter]:
        """See `remix.RemixLinear.bases`."""
        return [self.lora_A, self.lora_B]

    def gram(self) -> tuple[Tensor, Tensor]:
        """See `remix.RemixLinear.gram`."""
        a, b = self.lora_A, self.lora_B
        # <B_j A_j, B_k A_k> is the sum of the products of B_j^T B_k [r, r] and A_j A_k^T [r, r].
        inner = torch.einsum("jor,kos,jri,ksi->jk", b, b, a, a)  # [K, K]
        cross = torch.einsum("kor,oi,kri->k", b, self.weight.to(a.dtype), a)  # <W, B_k A_k>, [K]
        norm = self.weight.square().sum() + (2 * cross + inner.diagonal()).mean()
        centered = inner - inner.mean(0)
        return centered - centered.mean(1, keepdim=True), norm

    @staticmethod
    def fold(layers: list["LowRankLinear"], linears: list[nn.Linear], alpha: list[float]):
        """See `remix.RemixLinear.fold`."""
        for layer, linear in zip(layers, linears, strict=True):
            a, b = layer.lora_pair(alpha)
            # GPUs may compute products of float32 in TF32.
            linear.weight.copy_(layer.weight + b.double() @ a.double())
            if layer.bias is not None:
                linear.bias.copy_(layer.bias)

    def lora_pair(self, alpha: list[float]) -> tuple[Tensor, Tensor]:
        """Return A [K * r, in] and B [out, K * r] of the mixture W + B A with the coefficients alpha [K]."""
        scales = torch.tensor(alpha, dtype=torch.float32, device=self.lora_B.device).view(-1, 1, 1)
        b = (scales * self.lora_B).to(self.lora_B.dtype).transpose(0, 1).flatten(1)  # [out, K * r]
        return self.lora_A.flatten(0, 1), b

    def extra_repr(self) -> str:
        n_basis, rank, _ = self.lora_A.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, n_basis={n_basis}, rank={rank}"
