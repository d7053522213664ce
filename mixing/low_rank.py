"""Low-rank bases: experts that differ from one linear layer by a weighted sum of K pairs of small matrices."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class LowRankPairs(nn.Module):
    """K pairs of small matrices, the low-rank bases that are added to a linear layer.

    They start as in LoRA (Hu et al., arXiv 2106.09685, section 4.1): A_k is random and B_k is zero.

    Args:
        linear: the layer. It gives the shapes, the device and the dtype.
        n_basis: number of bases K.
        rank: rank r of each pair.
    """

    def __init__(self, linear: nn.Linear, n_basis: int, rank: int):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        options = pair_options(linear)
        self.lora_A = nn.Parameter(torch.empty(n_basis, rank, linear.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(n_basis, linear.out_features, rank, **options))
        self.reset_parameters()

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        """Apply sum_k alpha[g, k] B_k A_k to the g-th of the G equal parts of x [B, ..., in] -> [B, ..., out]."""
        a = self.lora_A.flatten(0, 1).to(x.dtype)  # [K * r, in]
        b = self.lora_B.transpose(0, 1).flatten(1).to(x.dtype)  # [out, K * r]
        h = F.linear(x, a)  # [B, ..., K * r]
        # The coefficients multiply in float32: their gradients are sums over all tokens of a group.
        scales = alpha.repeat_interleave(self.lora_A.shape[1], dim=1)[:, None]  # [G, 1, K * r]
        h = (h.reshape(len(alpha), -1, h.shape[-1]) * scales).view(h.shape).to(h.dtype)
        return F.linear(h, b)

    @torch.no_grad()
    def reset_parameters(self):
        """Draw the initial pairs. The linear layer is not changed."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def extra_repr(self) -> str:
        n_basis, rank, _ = self.lora_A.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, n_basis={n_basis}, rank={rank}"


class LowRankLinear(LowRankPairs):
    """A linear layer with K low-rank bases. Mixture g has the weight W + sum_k alpha[g, k] B_k A_k.

    Every mixture starts as the linear layer. The mixtures are not computed: the linear layer is called, and the pairs
    are applied to its input.

    Args:
        linear: the layer whose output the pairs add to. It may be of a subclass of `nn.Linear`, and its weight may be
            quantized. It is trained if its parameters require gradients.
        n_basis: number of bases K.
        rank: rank r of each pair.
        batch_coefficients: holds the coefficients of the current batch, a `remix.BatchCoefficients`.
        row: index of this layer's coefficients in `batch_coefficients.alpha`.
    """

    def __init__(self, linear: nn.Linear, n_basis: int, rank: int, batch_coefficients, row: int = 0):
        super().__init__(linear, n_basis, rank)
        self.linear = linear
        self.batch_coefficients = batch_coefficients
        self.row = row

    @property
    def weight(self) -> Tensor:
        """The weight W of the linear layer, as it is stored."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear layer."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply mixture g to the g-th of the G equal parts of the batch, x [B, ..., in] -> [B, ..., out]."""
        update = super().forward(x, self.batch_coefficients.of(self.row, x))
        return self.linear(x) + update

    def owners(self) -> tuple[nn.Module, ...]:
        """Return the modules that own the parameters of this layer, that of the pairs first."""
        return self, self.linear

    def bases(self) -> list[nn.Parameter]:
        """See `remix.RemixLinear.bases`."""
        return [self.lora_A, self.lora_B]

    def gram(self) -> tuple[Tensor, Tensor]:
        """See `remix.RemixLinear.gram`."""
        a, b = self.lora_A, self.lora_B
        weight = dense_layer(self.linear)[0].to(a)
        # <B_j A_j, B_k A_k> is the sum of the products of B_j^T B_k [r, r] and A_j A_k^T [r, r].
        inner = torch.einsum("jor,kos,jri,ksi->jk", b, b, a, a)  # [K, K]
        cross = torch.einsum("kor,oi,kri->k", b, weight, a)  # <W, B_k A_k>, [K]
        norm = weight.square().sum() + (2 * cross + inner.diagonal()).mean()
        centered = inner - inner.mean(0)
        return centered - centered.mean(1, keepdim=True), norm

    @staticmethod
    def fold(layers: list["LowRankLinear"], linears: list[nn.Linear], alpha: list[float]):
        """See `remix.RemixLinear.fold`. The layers may be `LowRankExpert`s, which get the pairs only."""
        for layer, linear in zip(layers, linears, strict=True):
            # Pairs that are made in inference mode could not be used in a later call with gradients.
            with torch.inference_mode(False), torch.no_grad():
                a, b = layer.lora_pair(alpha)
            # peft wraps the layers that it adapts.
            if isinstance(expert := getattr(linear, "base_layer", linear), LowRankExpert):
                expert.a, expert.b = a, b
                continue
            weight, bias = dense_layer(layer.linear)
            # GPUs may compute products of float32 in TF32.
            linear.weight.copy_(weight.double() + (b.double() @ a.double()).to(weight.device))
            if bias is not None:
                linear.bias.copy_(bias)

    def lora_pair(self, alpha: list[float]) -> tuple[Tensor, Tensor]:
        """Return A [K * r, in] and B [out, K * r] of the mixture W + B A with the coefficients alpha [K]."""
        scales = torch.tensor(alpha, dtype=torch.float32, device=self.lora_B.device).view(-1, 1, 1)
        b = (scales * self.lora_B).to(self.lora_B.dtype).transpose(0, 1).flatten(1)  # [out, K * r]
        return self.lora_A.flatten(0, 1), b

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args):
        """Also read the names of checkpoints, in which the linear layer is no submodule; see `stored_names`."""
        own = [f"{prefix}{name}" for name in ("lora_A", "lora_B", "linear.")]
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(tuple(own))]:
            state_dict[f"{prefix}linear.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class StageLinear(LowRankLinear):
    """A low-rank layer whose pairs are those of several layers, one in each stage, and not its own parameters.

    Args:
        linear, batch_coefficients, row: see `LowRankLinear`.
        pairs: the pairs.
    """

    def __init__(self, linear: nn.Linear, pairs: LowRankPairs, batch_coefficients, row: int = 0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear = linear
        # In a list, so that they are no submodule: they stay where they are when a stage is moved or converted.
        self.pairs = [pairs]
        self.batch_coefficients = batch_coefficients
        self.row = row

    @property
    def lora_A(self) -> nn.Parameter:
        """The matrices A_k [K, r, in]."""
        return self.pairs[0].lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """The matrices B_k [K, out, r]."""
        return self.pairs[0].lora_B

    def forward(self, x: Tensor) -> Tensor:
        """See `LowRankLinear.forward`."""
        update = self.pairs[0](x, self.batch_coefficients.of(self.row, x))
        return self.linear(x) + update

    def owners(self) -> tuple[nn.Module, ...]:
        return self.pairs[0], self.linear


class LowRankExpert(nn.Linear):
    """One expert of a low-rank layer, as a linear layer without a weight of its own.

    Args:
        layer: the low-rank layer, whose linear layer is called. `LowRankLinear.fold` chooses the expert.
    """

    def __init__(self, layer: LowRankLinear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # In a list, so that it is no submodule: adapters are for this layer.
        self.layers = [layer]
        self.register_buffer("a", None, persistent=False)  # [K * r, in]
        self.register_buffer("b", None, persistent=False)  # [out, K * r]

    @property
    def weight(self) -> Tensor:
        """See `LowRankLinear.weight`."""
        return self.layers[0].weight

    @property
    def bias(self) -> Tensor | None:
        """See `LowRankLinear.bias`."""
        return self.layers[0].bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the expert, x [..., in] -> [..., out]."""
        h = F.linear(x, self.a.to(x.dtype))
        return self.layers[0].linear(x) + F.linear(h, self.b.to(h.dtype))


def pair_options(linear: nn.Linear) -> dict:
    """Return the device and the dtype of the parameters of a Remix that are added to a linear layer, in this order."""
    # The weights of a layer that accelerate has offloaded are on the meta device while it is not called.
    device = getattr(getattr(linear, "_hf_hook", None), "execution_device", None)
    # Their updates would be lost in half precision, in which a frozen W is often stored.
    dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
    return dict(device=linear.weight.device if device is None else torch.device(device), dtype=dtype)


def is_hooked(linear: nn.Linear) -> bool:
    """Return whether a call of a layer runs hooks or another forward than that of its class."""
    return bool(linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))


def plain_dtype(linear: nn.Linear | LowRankLinear) -> torch.dtype:
    """Return the dtype of the weight of a layer when it is dequantized, or cast for a call."""
    linear = getattr(linear, "linear", linear)
    weight = linear.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        return state.dtype
    # Those of diffusers for layerwise casting.
    for hook in getattr(getattr(linear, "_diffusers_hook", None), "hooks", {}).values():
        if (dtype := getattr(hook, "compute_dtype", None)) is not None:
            return dtype
    plain = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    return weight.dtype if plain else torch.get_default_dtype()


@torch.no_grad()
def dense_layer(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return the weight [out, in] and the bias [out] that a linear layer applies, without quantization.

    Raises:
        ValueError: if the layer is of a class that computes something that is not linear.
    """
    weight, bias = linear.weight, linear.bias
    if getattr(weight, "quant_state", None) is not None:
        # Four bits of bitsandbytes.
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state), bias
    if is_traceable_wrapper_subclass(weight) and hasattr(weight, "dequantize"):
        return weight.dequantize(), bias
    device = pair_options(linear)["device"]
    stored = type(linear).forward is nn.Linear.forward and weight.device == device
    if stored and not is_hooked(linear):
        return weight, bias
    inputs = torch.eye(linear.in_features, dtype=plain_dtype(linear), device=device)
    point = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(0)).to(inputs)
    found = linear(point).float()

    def computes(weight: Tensor, bias: Tensor | None, error: float) -> bool:
        expected = F.linear(point, weight.to(point), None if bias is None else bias.to(point)).float()
        return bool((found - expected).norm() <= error * expected.norm())

    # Hooks may compute the weight in the call, as that of weight normalization does, or change nothing.
    if stored and computes(linear.weight, bias, torch.finfo(point.dtype).eps):
        return linear.weight, bias
    offset = linear(torch.zeros_like(point))[0]  # [out]
    weight = (linear(inputs) - offset).T
    if not computes(weight, offset, 0.05):
        raise ValueError(f"a {type(linear).__name__} is not linear in its input: its experts cannot be folded")
    if bias is None and offset.any():
        raise ValueError(f"a {type(linear).__name__} without a bias adds one: its experts cannot be folded")
    return weight, None if bias is None else offset
