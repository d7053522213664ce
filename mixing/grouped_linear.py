"""Fast implementations of what remix.py computes: mixing the bases, and linear layers on the groups of a batch.

The results do not depend on the implementation, except for rounding. benchmarks/README.md has the measurements.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

# PyTorch for GPUs comes with Triton on Linux. Triton needs a C compiler. Counting the GPUs does not start CUDA.
TRITON = (
    torch.cuda.device_count() > 0
    and importlib.util.find_spec("triton") is not None
    and any(shutil.which(compiler) for compiler in (os.environ.get("CC", "gcc"), "clang"))
)
if TRITON:
    from mixing import kernels

# From this number of groups on, the backward pass mixes the weights again instead of keeping them in memory.
RECOMPUTED_GROUPS = 8


def compiled_as_operator(function: Callable) -> Callable:
    """Decorate a function that compiled code calls as a custom operator, which the compiler does not look into.

    Other code calls the function itself, because the first call of a custom operator imports the compiler. The result
    has the decorator `register_fake` of `torch.library.custom_op`.
    """
    operator = torch.library.custom_op(f"remix::{function.__name__}", function, mutates_args=())

    @functools.wraps(function)
    def call(*args):
        return (operator if torch.compiler.is_compiling() else function)(*args)

    call.register_fake = operator.register_fake
    return call


def mixed_linear(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mix K linear layers into one for each of G groups, and apply mixture g to the g-th equal part of the batch.

    The mixtures Theta_G = alpha_G beta (paper, section 3.2) and the gradients of alpha and beta are summed in float32.
    Bases are nearly equal, and the gradient of alpha depends on their differences, which a product in bf16 or TF32
    would lose. Mixtures are rounded once, to the dtype of the output. Their own gradients have the dtype of x.

    Args:
        x: input [B, ..., in]. G divides B.
        alpha: coefficients [G, K], float32.
        weight: weights [K, out, in] of the bases, float32.
        bias: biases [K, out] of the bases, float32; None for layers without biases.

    Returns:
        Output [B, ..., out], in the autocast dtype if autocast is enabled, otherwise in the dtype of x.
    """
    if torch._C._are_functorch_transforms_active():
        return differentiable_linear(x.to(product_dtype(x)), alpha, weight, bias)
    # DDP counts each argument of the function several times when it decides where to cut a compiled graph.
    weight, bias = weight.view(weight.shape), None if bias is None else bias.view(bias.shape)
    return MixedLinearFunction.apply(x.to(product_dtype(x)), alpha, weight, bias)


def differentiable_linear(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `mixed_linear` of operations that `torch.func` can transform, such as by `jvp`, all in PyTorch."""

    def mixtures(tensors: Tensor) -> Tensor:
        alpha_k = alpha.T.view(len(tensors), -1, *[1] * (tensors.ndim - 1))  # [K, G, 1, ...]
        return sum(a * tensor for a, tensor in zip(alpha_k, tensors, strict=True)).to(x.dtype)

    parts = x.reshape(len(alpha), -1, x.shape[-1])  # [G, B / G * ..., in]
    out = parts @ mixtures(weight).transpose(1, 2)
    if bias is not None:
        out = out + mixtures(bias)[:, None]
    return out.reshape(*x.shape[:-1], -1)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: the autocast dtype if autocast is enabled, otherwise that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class MixedLinearFunction(torch.autograd.Function):
    """See `mixed_linear`. Eager and compiled code use this function. The products have the dtype of x."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        theta = mix(alpha, weight, x.dtype)  # [G, out, in]
        theta_bias = None if bias is None else mix(alpha, bias, x.dtype)  # [G, out]
        keep = len(alpha) < RECOMPUTED_GROUPS
        ctx.save_for_backward(x, alpha, weight, bias, theta if keep else None)
        return without_base(linear_per_group(x, theta, theta_bias))  # [B, ..., out]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # They would lack the parts through the mixtures, which are kept without their graph.
            raise RuntimeError("whole bases have no second derivatives (create_graph=True): use rank, or torch.func")
        x, alpha, weight, bias, theta = ctx.saved_tensors
        if theta is None:
            theta = mix(in_backward(alpha, grad), weight, x.dtype)
        grad_x, grad_theta, grad_theta_bias = linear_per_group_backward(grad.to(x.dtype), x, theta)
        needs_alpha = ctx.needs_input_grad[1]
        return grad_x, *mix_layer_backward(alpha, (grad_theta, grad_theta_bias), (weight, bias), needs_alpha)


class LinearPerGroupFunction(torch.autograd.Function):
    """`linear_per_group` for weights that are mixed already. x, weight and bias have one dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return without_base(linear_per_group(x, weight, bias))  # [B, ..., out]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = linear_per_group_backward(grad.to(x.dtype), x, weight)
        return grad_x, grad_weight, grad_bias.to(x.dtype)


def without_base(x: Tensor) -> Tensor:
    """Return the same tensor, but no view: a view that a custom function returns cannot be changed in place."""
    return torch.ops.aten._unsafe_view(x, x.shape)


# A custom operator, because the compiler would keep the mixtures of the forward pass instead of mixing again. The
# compiler must compute this operator in the backward pass, because its input `grad` exists only there.
@compiled_as_operator
def in_backward(alpha: Tensor, grad: Tensor) -> Tensor:
    """Return a copy of alpha that exists only in the backward pass, in which `grad` is computed."""
    return alpha.clone()


@in_backward.register_fake
def _(alpha, grad):
    return torch.empty_like(alpha)


def on_cpu(tensor: Tensor) -> bool:
    """Return whether the implementations for CPUs are used for a tensor."""
    return tensor.device.type == "cpu"


def uses_triton(tensor: Tensor) -> bool:
    """Return whether Triton kernels mix a tensor."""
    return TRITON and tensor.device.type == "cuda"


def mix(alpha: Tensor, tensors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute G weighted sums of K tensors in float32, without a matrix product, which may run in TF32.

    Args:
        alpha: coefficients [G, K].
        tensors: K weights [K, out, in] or K biases [K, out].
        dtype: dtype that each sum is rounded to.

    Returns:
        The sums [G, out, in] or [G, out].
    """
    if uses_triton(tensors):
        return kernels.mix(alpha, tensors, dtype)
    if tensors.ndim == 2:
        return (alpha[:, :, None] * tensors).sum(1).to(dtype)
    if torch.compiler.is_compiling():
        # The compiler fuses this into one pass over the tensors and never stores the [G, K, out, in] products.
        return (alpha[:, :, None, None] * tensors).sum(1).to(dtype)
    sums = alpha[:, 0, None, None] * tensors[0]
    for k in range(1, len(tensors)):
        sums.addcmul_(alpha[:, k, None, None], tensors[k])
    return sums.to(dtype)


def mix_into(alpha: list[float], pairs: list[tuple[Tensor, Tensor]]):
    """Write weighted sums of K tensors into tensors, in place.

    The sums are elementwise in float32, because GPUs may compute matrix products in TF32. For tensors in float32, no
    temporary copy is made.

    Args:
        alpha: coefficients [K].
        pairs: K tensors [K, ...], and the tensor [...] that their sum overwrites.
    """
    if any(tensor.dtype.itemsize < 4 for _, tensor in pairs):
        for bases, tensor in pairs:
            tensor.copy_(mix(torch.tensor([alpha], device=bases.device), bases)[0])
        return
    sums = [tensor for _, tensor in pairs]
    torch._foreach_zero_(sums)
    for k, coefficient in enumerate(alpha):
        torch._foreach_add_(sums, [bases[k] for bases, _ in pairs], alpha=coefficient)


def mix_layer_backward(
    alpha: Tensor, grads: tuple[Tensor, Tensor], bases: tuple[Tensor, Tensor | None], needs_alpha: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Compute the gradients of mixing the weights and the biases of a layer.

    Args:
        alpha: coefficients [G, K].
        grads: gradients of the mixed weights [G, out, in] and biases [G, out].
        bases: weights [K, out, in] and biases [K, out] of the bases.
        needs_alpha: whether to compute the gradient of alpha.

    Returns:
        The gradients of alpha [G, K] (or None), of the weights [K, out, in] and of the biases [K, out], in float32.
        That of the biases is None if there are none.
    """
    alpha_by_weight, grad_weight = mix_backward(alpha, grads[0], bases[0], needs_alpha)
    if bases[1] is None:
        return alpha_by_weight if needs_alpha else None, grad_weight, None
    alpha_by_bias, grad_bias = mix_backward(alpha, grads[1], bases[1], needs_alpha)
    return alpha_by_weight + alpha_by_bias if needs_alpha else None, grad_weight, grad_bias


def mix_backward(alpha: Tensor, grads: Tensor, tensors: Tensor, needs_alpha: bool) -> tuple[Tensor | None, Tensor]:
    """Compute the gradients of `mix` in float32.

    Args:
        alpha: coefficients [G, K].
        grads: gradients of the G sums [G, out, in] or [G, out].
        tensors: K weights [K, out, in] or K biases [K, out].
        needs_alpha: whether the gradient of alpha is needed. Otherwise it may be None.

    Returns:
        The gradients of alpha [G, K], which are the inner products of each of `grads` with each of `tensors`, and of
        the K tensors, which are the sums of alpha_G^T `grads`.
    """
    if uses_triton(tensors):
        return kernels.mix_backward(alpha, grads, tensors)
    grads = grads.float()
    return products(grads, tensors) if needs_alpha else None, mix(alpha.T, grads)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product [G, K] of each of G tensors [G, out, ...] with each of K tensors [K, out, ...]."""
    # One sum per output feature first. A single sum would lose the differences between nearly equal bases to rounding.
    if a.ndim == 2:
        return (a[:, None] * b).sum(2)
    # The compiler fuses these sums into one kernel, which loads each number once for all products.
    rows = [(x * y).sum(1) for x in a for y in b]  # G * K tensors [out]
    return torch.stack(rows).sum(1).view(len(a), len(b))


def linear_per_group(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply linear layer g, weight [G, out, in] and bias [G, out], to the g-th of G equal parts of x [B, ..., in]."""
    if on_cpu(x):
        return grouped_linear(x, weight, bias)
    if bias is None:
        return batched_linear(x, weight)
    # The compiler adds the biases in the kernel that reads the result.
    bias = bias.view(len(bias), *[1] * (x.ndim - 1), -1)  # [G, 1, ..., out]
    return (batched_linear(x, weight).unflatten(0, (len(bias), -1)) + bias).flatten(0, 1)


# The matrix products of the groups are custom operators. If a tensor is an input of two batched products, once as a
# view and once transposed, torch.compile makes two copies of it. For CPUs, it turns writes into parts of one output
# into copies.
@compiled_as_operator
def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `linear_per_group` without the biases, for GPUs, whose batched matrix products are faster."""
    parts = x.reshape(len(weight), -1, x.shape[-1])  # [G, B / G * ..., in]
    return torch.bmm(parts, weight.transpose(1, 2)).view(*x.shape[:-1], weight.shape[1])


@compiled_as_operator
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear_per_group` one group after the other, for CPUs, whose batched matrix products are slower."""
    parts = x.reshape(len(weight), -1, x.shape[-1])
    out = x.new_empty(*parts.shape[:2], weight.shape[1])
    for g in range(len(weight)):
        if bias is None:
            torch.mm(parts[g], weight[g].T, out=out[g])
        else:
            torch.addmm(bias[g], parts[g], weight[g].T, out=out[g])
    return out.view(*x.shape[:-1], weight.shape[1])


@compiled_as_operator
def linear_per_group_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, of weight [G, out, in] (contiguous) and of bias [G, out] (float32)."""
    grads = grad.reshape(len(weight), -1, grad.shape[-1])  # [G, B / G * ..., out]
    parts = x.reshape(len(weight), -1, x.shape[-1])  # [G, B / G * ..., in]
    if on_cpu(x):
        grad_x, grad_weight = x.new_empty(parts.shape), weight.new_empty(weight.shape)
        for g in range(len(weight)):
            torch.mm(grads[g], weight[g], out=grad_x[g])
            torch.mm(grads[g].T, parts[g], out=grad_weight[g])
    else:
        grad_x, grad_weight = torch.bmm(grads, weight), torch.bmm(grads.transpose(1, 2), parts)
    return grad_x.view(x.shape), grad_weight, grads.sum(1, dtype=torch.float32)


@batched_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@grouped_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@linear_per_group_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2], dtype=torch.float32)
