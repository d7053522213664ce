"""Linear layers on the equal groups of a batch: an operator for CPUs, one batched product for GPUs."""

import torch
from torch import Tensor


@torch.library.custom_op("remix::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear layers weight [G, out, in], bias [G, out] on the G equal parts of x [B, ..., in], one after the other.

    For CPUs, whose libraries know a linear layer better than a batch of products. An operator of its own, so that each
    part's product is written to its place: torch.compile would make copies of splitting and concatenating.
    """
    parts = x.reshape(len(weight), -1, x.shape[-1])
    out = x.new_empty(*parts.shape[:2], weight.shape[1])
    for g in range(len(weight)):
        torch.addmm(bias[g], parts[g], weight[g].T, out=out[g])
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op("remix::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias from that of the result."""
    grads, parts = grad.reshape(len(weight), -1, grad.shape[-1]), x.reshape(len(weight), -1, x.shape[-1])
    grad_x, grad_weight = torch.empty_like(parts), torch.empty_like(weight)
    for g in range(len(weight)):
        torch.mm(grads[g], weight[g], out=grad_x[g])
        torch.mm(grads[g].T, parts[g], out=grad_weight[g])
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


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `linear_by_parts` does in one launch, for GPUs, which small parts would leave idle."""
    out = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2)) + bias.unsqueeze(1)
    return out.view(*x.shape[:-1], -1)
