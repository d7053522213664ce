"""Experts as plain modules: the mixed weights of a Remix are written into plain layers."""

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mixing import fsdp
from mixing.low_rank import LowRankExpert, LowRankLinear
from mixing.wrapping import plain_linear


def plain_stage(remix: nn.Module, s: int) -> nn.Module | None:
    """Return a copy of stage s with plain layers, in eval mode, of which the mixed ones are not initialized.

    If the Remix is sharded, every process must call this, and the result is None on all but the first.
    """
    if fsdp.is_sharded(remix):
        return fsdp.gather_plain(remix, s)
    plain = {id(layer): plain_linear(layer) for _, layer in remix.mixed(s)}
    module = remix.stages.module(s)
    return copy.deepcopy(module, plain | without_graphs(module)).eval()


def plain_expert(remix: nn.Module, alpha: list[list[float]], s: int) -> nn.Module | None:
    """Return the expert of stage s with the coefficients alpha [1 or depth][K]; see `plain_stage`."""
    plain = plain_stage(remix, s)
    fold_stage(remix, plain, alpha, s)
    return plain


def switching_stage(remix: nn.Module, s: int) -> nn.Module:
    """Return a module to fold the experts of stage s into, one after the other, in eval mode.

    With low-rank bases, it shares all tensors with the Remix.

    Raises:
        ValueError: if the Remix is sharded.
    """
    if fsdp.is_sharded(remix):
        raise ValueError("a sharded Remix cannot be folded in place: sample with the Remix, or with its experts")
    if remix.rank is None:
        return plain_stage(remix, s)
    module = remix.stages.module(s)
    shared = {id(layer): LowRankExpert(layer) for _, layer in remix.mixed(s)}
    shared |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    # Moving a module replaces its buffers, and quantized parameters.
    shared |= {id(owned): owned for part in module.modules() for owned in (part._parameters, part._buffers)}
    return copy.deepcopy(module, shared | without_graphs(module)).eval()


def without_graphs(module: nn.Module) -> dict[int, Tensor]:
    """Return what `copy.deepcopy` takes for results of autograd that modules keep, which it refuses to copy.

    Such as activations, also in lists, and weights that `torch.nn.utils.weight_norm` has computed.
    """
    kept = (value for part in module.modules() for value in tree_leaves(vars(part)) if isinstance(value, Tensor))
    return {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}


@torch.no_grad()
def fold_stage(remix: nn.Module, module: nn.Module | None, alpha: list[list[float]], s: int):
    """Write the mixed weights of stage s for the coefficients alpha [1 or depth][K] into a plain module, in place."""
    if fsdp.is_sharded(remix):
        return fsdp.fold_gathered(remix, module, alpha, s)
    fold_layers(remix.mixed(s), module, alpha)
    # Autocast would use the casts of the weights of the expert before.
    torch.clear_autocast_cache()


def fold_layers(mixed: list[tuple[str, nn.Module]], module: nn.Module, alpha: list[list[float]]):
    """Write the mixtures of layers into the plain layers of a module, in place.

    Args:
        mixed: the mixed layers and their names.
        module: a module that has plain layers of these names.
        alpha: coefficients [1 or depth][K].
    """
    rows = {}
    for name, layer in mixed:
        layers, linears = rows.setdefault(layer.row, ([], []))
        layers.append(layer)
        linears.append(module.get_submodule(name))
    for row, (layers, linears) in rows.items():
        layers[0].fold(layers, linears, alpha[row])


@torch.no_grad()
def copy_unmixed(remix: nn.Module, module: nn.Module | None, s: int):
    """Copy the tensors of stage s outside of the mixed layers into a plain module of any stage, in place.

    The module may have got adapters (LoRA). If the Remix is sharded, see `plain_stage`.
    """
    source = fsdp.gather_plain(remix, s) if fsdp.is_sharded(remix) else remix.stages.module(s)
    if module is None:
        return
    layers = remix.stages.module(s).named_modules(remove_duplicate=False)
    mixed = tuple(f"{name}." for name, layer in layers if isinstance(layer, LowRankLinear))
    # peft moves the layers that it adapts.
    own = {name.replace(".base_layer", ""): tensor for name, tensor in named_tensors(module)}
    for name, tensor in named_tensors(source):
        if not name.startswith(mixed):
            own[name].copy_(tensor)


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all parameters and buffers of a module, also those that checkpoints do not hold, by all their names."""
    options = dict(remove_duplicate=False)
    return [*module.named_parameters(**options), *module.named_buffers(**options)]
