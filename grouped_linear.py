"""Fast implementations of what remix.py computes: mixing the bases, and linear layers on the groups of a batch.

The results do not depend on the implementation, except for rounding. benchmarks/README.md has the measurements.
"""

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn


def mix_weights(alpha: Tensor, weight: Tensor) -> Tensor:
    """Compute one weighted sum of the bases' weights for each of G groups: Theta_G = alpha_G beta.

    Args:
        alpha: coefficients [G, K].
        weight: weights [K, out, in] of the K bases.

    Returns:
        Mixed weights [G, out, in].
    """
    if torch.compiler.is_compiling():
        # The compiler fuses this into one pass over the bases and never stores the [G, K, out, in] product.
        return (alpha[:, :, None, None] * weight).sum(1)
    return (alpha @ weight.flatten(1)).view(-1, *weight.shape[1:])


def linear_per_group(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply linear layer g to the g-th of G equal contiguous groups of the batch.

    Args:
        x: input [B, ..., in]; G divides B.
        weight: weights [G, out, in].
        bias: biases [G, out].

    Returns:
        Output [B, ..., out], in the autocast dtype if autocast is enabled, otherwise in the dtype of x.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    kernel = grouped_linear if device == "cpu" else batched_linear
    return kernel(x.to(dtype), weight.to(dtype), bias.to(dtype))


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `linear_per_group` by one batched matrix product, for GPUs, which one small group would not fill."""
    out = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2)) + bias.unsqueeze(1)
    return out.view(*x.shape[:-1], -1)


# A custom operator, because torch.compile would turn the writes into parts of one output into copies.
@torch.library.custom_op("remix::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `linear_per_group` one group after the other, for CPUs, whose batched matrix products are slower."""
    groups = x.reshape(len(weight), -1, x.shape[-1])
    out = x.new_empty(*groups.shape[:2], weight.shape[1])
    for g in range(len(weight)):
        torch.addmm(bias[g], groups[g], weight[g].T, out=out[g])
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op("remix::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight and bias from the gradient [B, ..., out] of the output."""
    grads = grad.reshape(len(weight), -1, grad.shape[-1])
    groups = x.reshape(len(weight), -1, x.shape[-1])
    grad_x = torch.empty_like(groups)
    grad_weight = torch.empty_like(weight)
    for g in range(len(weight)):
        torch.mm(grads[g], weight[g], out=grad_x[g])
        torch.mm(grads[g].T, groups[g], out=grad_weight[g])
    return grad_x.view(x.shape), grad_weight, grads.sum(1)


@grouped_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@grouped_linear_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


grouped_linear.register_autograd(
    lambda ctx, grad: grouped_linear_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


def choose_attention(model: nn.Module, device: torch.device):
    """Select the faster attention for a model that will be compiled.

    On CPUs, two matrix products with a compiled softmax between them are faster than PyTorch's fused attention kernel.

    Args:
        model: its timm `Attention` modules are changed in place.
        device: the device the model will run on. Nothing changes unless it is a CPU.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
