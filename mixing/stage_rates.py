"""One learning rate per stage."""

import math
from collections.abc import Sequence

import torch
from torch import nn


def set_stage_rates(optimizer: torch.optim.Optimizer, remix: nn.Module, factors: Sequence[float]):
    """Multiply the learning rate of the mixing coefficients by one number per stage.

    The rows of the logits are the only parameters of a single stage: the low-rank bases belong to all stages, and learn
    from each in proportion to the weight of its samples in the loss. Groups of parameters cannot divide the logits, and
    an optimizer such as Adam undoes a factor of their gradients. So the steps of their rows are multiplied, including
    the weight decay, with any optimizer whose steps are in proportion to the learning rate.

    Args:
        optimizer: the optimizer, also one that accelerate has prepared. It keeps its own learning rate, which a
            schedule may change.
        remix: a `remix.Remix` with stages, whose logits the optimizer trains.
        factors: the factor of each stage [S], stage 0 with the least noise.

    Returns:
        Two handles, whose `remove` ends this.

    Raises:
        ValueError: if there are not S finite factors of at least 0, or the optimizer does not train the logits.
    """
    logits = remix.logits
    # The optimizer of accelerate wraps the one that takes the steps.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if len(factors) != len(remix.stages) or not all(0 <= factor < math.inf for factor in factors):
        raise ValueError(
            f"expected {len(remix.stages)} finite factors of at least 0, one per stage, but got {list(factors)}"
        )
    if not any(parameter is logits for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer does not train the logits of the Remix")
    scale = torch.ones(remix.n_experts, 1, dtype=logits.dtype, device=logits.device)  # [N, 1]
    for s, factor in enumerate(factors):
        scale[list(remix.stages.experts(s))] = factor
    scale = scale.expand(logits.shape).contiguous()
    if hasattr(logits, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        scale = distribute_tensor(scale, logits.device_mesh, logits.placements)
    before = []

    def keep(*_):
        before[:] = [logits.detach().clone()]

    @torch.no_grad()
    def multiply(*_):
        # With a factor of 1, lerp gives the optimizer's result exactly.
        logits.copy_(torch.lerp(before.pop(), logits.detach(), scale))

    return optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(multiply)
