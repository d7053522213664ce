"""Triton kernels that mix bases on GPUs. Each of them reads every number once and writes every result once.

The backward pass also writes and reads the inner products of each block, which are few unless there are many bases.
Compiled from PyTorch's operations, the mixing of one layer would be hundreds of operations in a graph, which take the
compiler minutes. These kernels are one operation each. Sums are in the dtype of the coefficients (float32).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton_op("remix::mix", mutates_args=())
def mix(alpha: Tensor, bases: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute G weighted sums of K tensors; see `grouped_linear.mix`.

    Args:
        alpha: coefficients [G, K].
        bases: K tensors [K, ...].
        dtype: dtype that each sum is rounded to.

    Returns:
        The sums [G, ...].
    """
    alpha, bases = alpha.contiguous(), bases.contiguous()
    out = torch.empty(len(alpha), *bases.shape[1:], dtype=dtype, device=bases.device)
    n = bases[0].numel()
    block = 4 * block_of_a_warp(len(bases))
    # Triton starts kernels on the current device.
    with torch.cuda.device_of(bases):
        wrap_triton(mix_kernel)[(triton.cdiv(n, block),)](out, alpha, bases, n, *alpha.shape, block, num_warps=4)
    return out


@triton_op("remix::mix_backward", mutates_args=())
def mix_backward(alpha: Tensor, grads: Tensor, bases: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `mix`; see `grouped_linear.mix_backward`.

    Args:
        alpha: coefficients [G, K].
        grads: gradients of the sums [G, ...].
        bases: K tensors [K, ...].

    Returns:
        The gradients of the coefficients [G, K] and of the K tensors [K, ...], in the dtype of alpha.
    """
    alpha, grads, bases = alpha.contiguous(), grads.contiguous(), bases.contiguous()
    grad_bases = torch.empty_like(bases, dtype=alpha.dtype)
    n = bases[0].numel()
    # The products of one warp need no synchronization with other warps.
    block = block_of_a_warp(len(bases))
    programs = triton.cdiv(n, block)
    products = torch.empty(programs, *alpha.shape, dtype=alpha.dtype, device=alpha.device)
    arguments = grad_bases, products, alpha, grads, bases, n, *alpha.shape, block
    with torch.cuda.device_of(bases):
        wrap_triton(mix_backward_kernel)[(programs,)](*arguments, num_warps=1)
    return products.sum(0), grad_bases


def block_of_a_warp(n_basis: int) -> int:
    """Return how many numbers of each basis a warp takes: at most 8 per thread, and fewer if there are many bases.

    A thread keeps its numbers of all bases in registers, and in the backward pass those of all gradients.

    Args:
        n_basis: number of bases K.
    """
    return 32 * max(1, min(8, 64 // triton.next_power_of_2(n_basis)))


@triton.jit
def mix_kernel(out, alpha, bases, n, G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Compute BLOCK numbers of each sum: out[g, i] = sum_k alpha[g, k] bases[k, i].

    Args:
        out: the sums [G, n], which are written.
        alpha: coefficients [G, K].
        bases: K tensors of n numbers [K, n].
        n: numbers of each tensor.
        G, K: numbers of sums and of bases.
        BLOCK: numbers of each tensor that a program reads and writes.
    """
    # Tensors of more than 2^31 numbers need offsets in int64.
    n = tl.cast(n, tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tiles = ()
    for k in tl.static_range(K):
        tiles = tiles + (tl.load(bases + k * n + i, inside).to(alpha.dtype.element_ty),)
    for g in range(G):
        total = tl.load(alpha + g * K) * tiles[0]
        for k in tl.static_range(1, K):
            total += tl.load(alpha + g * K + k) * tiles[k]
        tl.store(out + g * n + i, total, inside)


@triton.jit
def mix_backward_kernel(
    grad_bases, products, alpha, grads, bases, n, G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute BLOCK numbers of each gradient, and this block's part of the inner products of grads and bases.

    grad_bases[k, i] = sum_g alpha[g, k] grads[g, i], and products[program, g, k] = sum_i grads[g, i] bases[k, i].

    Args:
        grad_bases: gradients of the bases [K, n], which are written.
        products: inner products of each program's block [programs, G, K], which are written.
        grads: gradients of the sums [G, n].
        alpha, bases, n, G, K, BLOCK: see `mix_kernel`.
    """
    n = tl.cast(n, tl.int64)
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tiles = ()
    sums = ()
    for k in tl.static_range(K):
        tiles = tiles + (tl.load(bases + k * n + i, inside, 0).to(alpha.dtype.element_ty),)
        sums = sums + (tl.zeros([BLOCK], alpha.dtype.element_ty),)
    for g in range(G):
        grad = tl.load(grads + g * n + i, inside, 0).to(alpha.dtype.element_ty)
        new_sums = ()
        for k in tl.static_range(K):
            new_sums = new_sums + (sums[k] + tl.load(alpha + g * K + k) * grad,)
            tl.store(products + (program * G + g) * K + k, tl.sum(grad * tiles[k]))
        sums = new_sums
    for k in tl.static_range(K):
        tl.store(grad_bases + k * n + i, sums[k], inside)
