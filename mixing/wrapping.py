"""What `remix.Remix` finds out about the module that it wraps: layers by their names, and the arguments of a call."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from runtime.command_line import counted


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of some patterns, in which * stands for any text without a dot."""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]*"), name) for pattern in patterns)


def find_linears(
    module: nn.Module, patterns: Sequence[str], optional: Sequence[str] = ()
) -> dict[nn.Linear, list[str]]:
    """Return the layers of a module whose names match patterns, each with all its names, in the module's order.

    Args:
        module: the module.
        patterns: names in which * stands for any text without a dot.
        optional: more of them, which need not match.

    Raises:
        ValueError: if one of `patterns` matches no layer, or a layer is no `nn.Linear`.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    found = set()
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"layers must be a list of names of nn.Linear layers, but it is {patterns!r}")
    for pattern in (*patterns, *optional):
        matched = {name for name in modules if matches(name, [pattern])}
        if not matched and pattern not in optional:
            examples = [name for name, layer in modules.items() if isinstance(layer, nn.Linear)]
            some = f"linear layers such as {', '.join(examples[:4])}" if examples else "no linear layer"
            raise ValueError(f"layers: nothing matches {pattern!r} in {type(module).__name__}, which has {some}")
        found |= matched
    for name in found:
        check_linear(name, modules)
    matched, names = {modules[name] for name in found}, {}
    for name, layer in modules.items():
        if layer in matched:
            names.setdefault(layer, []).append(name)
    return names


def check_linear(name: str, modules: dict[str, nn.Module]):
    """Raise ValueError if a layer cannot be replaced by a mixed layer.

    A subclass of `nn.Linear` may compute something else, and some modules read the weights of their layers.
    """
    kind = type(modules[name])
    if kind is not nn.Linear:
        raise ValueError(f"layers: {name} is a {kind.__module__}.{kind.__name__}, but must be an nn.Linear")
    parent = modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise ValueError(
            f"layers: {name} is in an nn.TransformerEncoderLayer, which reads its weight without calling it"
        )


def plain_linear(layer: nn.Module) -> nn.Linear:
    """Return a plain linear layer with the shape of a mixed layer, not initialized."""
    options = dict(bias=layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype)
    linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, **options)
    return linear.requires_grad_(layer.weight.requires_grad)


def block_name(layer: str) -> str:
    """Return a layer's name up to the first number, such as "blocks.3", or the whole name."""
    return re.match(r"(.*?\.\d+)(\.|$)|.*", layer)[1] or layer


def join_outputs(outputs: list, order: Tensor) -> Any:
    """Join what a module has returned for parts of a batch.

    Args:
        outputs: a result for each part: a tensor whose first dimension is the part, or lists, dictionaries or
            `ModelOutput`s of them and of values that are equal for all parts.
        order: indices [B] of the samples in the batch, in the order of the parts.

    Raises:
        TypeError: if a result has another type, or a tensor of it another first dimension.
    """
    inverse = order.argsort()

    def join(*parts):
        if isinstance(parts[0], Tensor) and parts[0].ndim and sum(map(len, parts)) == len(order):
            return torch.cat(parts)[inverse]
        if parts[0] is None or isinstance(parts[0], (str, bool, int, float)):
            return parts[0]
        found = list(parts[0].shape) if isinstance(parts[0], Tensor) else type(parts[0]).__name__
        raise TypeError(
            f"the module must return tensors whose first dimension is the batch, but it returned {found} for a part of "
            f"{counted(len(order), 'sample')}: use batches of one expert, or groups"
        )

    return tree_map(join, *outputs)


# Methods of diffusers' modules that would read the weights of the mixed layers as those of one plain model.
NOT_OF_A_REMIX = {
    "save_pretrained": "a Remix is saved with torch.save(remix.state_dict(), path)",
    "fuse_qkv_projections": "only the projections of a plain expert can be fused: remix.expert(i)",
}


class TransparentModule(nn.Module):
    """A module with another one as `backbone`, whose attributes are also attributes of this one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("__"):
                raise
            if name in NOT_OF_A_REMIX:
                raise AttributeError(NOT_OF_A_REMIX[name]) from None
            return getattr(self.backbone, name)


class Arguments:
    """The arguments that a module is called with.

    Args:
        module: the module.
        timestep: name of the argument that holds the noise level of each sample; or a function of the arguments.
        unbatched: names of arguments that are no batches.

    Raises:
        ValueError: if the module has no argument `timestep`.
    """

    def __init__(self, module: nn.Module, timestep: str | Callable[..., Tensor], unbatched: Sequence[str]):
        self.owner = type(module).__name__
        self.names = [*inspect.signature(module.forward).parameters]
        if isinstance(timestep, str) and timestep not in self.names:
            known = ", ".join(self.names)
            raise ValueError(f"timestep: {self.owner}.forward has no argument {timestep!r}, only {known}")
        self.timestep = timestep
        self.unbatched = tuple(unbatched)

    def times(self, args: tuple, kwargs: dict) -> Tensor:
        """Return what the argument `timestep` holds for each sample, [B] or [1]: the highest value, if it has several.

        Raises:
            TypeError: if it is no tensor.
        """
        if callable(self.timestep):
            t = self.timestep(*args, **kwargs)
        else:
            t = kwargs.get(self.timestep)
            position = self.names.index(self.timestep)
            if t is None and position < len(args):
                t = args[position]
        if not isinstance(t, Tensor):
            raise TypeError(
                f"the experts are selected by {self.timestep!r}, which must be a tensor [B], but {self.owner} got {t!r}"
            )
        return t.view(-1) if t.ndim < 2 else t.flatten(1).amax(1)

    def take(self, rows: Tensor, size: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Select some samples of all arguments that are batches of `size` samples."""

        def take(value):
            is_batch = isinstance(value, Tensor) and value.ndim and len(value) == size
            return value[rows] if is_batch else value

        # The last name may be that of *args.
        names = [*self.names, *self.names[-1:] * len(args)]
        named = [*zip(names, args, strict=False)]
        taken = [value if name in self.unbatched else tree_map(take, value) for name, value in named]
        return tuple(taken), {k: v if k in self.unbatched else tree_map(take, v) for k, v in kwargs.items()}
