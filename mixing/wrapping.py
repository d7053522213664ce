"""What `remix.Remix` finds out about the module that it wraps: layers by their names, and the arguments of a call."""

import copy
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from mixing.low_rank import is_hooked, plain_dtype
from mixing.presets import Preset
from runtime.command_line import counted


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of some patterns, in which * stands for any text without a dot."""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]*"), name) for pattern in patterns)


def find_linears(
    module: nn.Module, patterns: Sequence[str], optional: Sequence[str], subclasses: bool
) -> dict[nn.Linear, list[str]]:
    """Return the layers of a module whose names match patterns, each with all its names, in the module's order.

    Args:
        module: the module.
        patterns: names in which * stands for any text without a dot.
        optional: more of them, which need not match.
        subclasses: whether layers may be of subclasses of `nn.Linear`, which may compute something else.

    Raises:
        ValueError: if one of `patterns` matches no layer, or a layer is no `nn.Linear`, or shares a parameter.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    found = set()
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"layers must be a list of names of nn.Linear layers, but it is {patterns!r}")
    for pattern in (*patterns, *optional):
        matched = {name for name in modules if name and matches(name, [pattern])}
        if not matched and pattern not in optional:
            examples = [name for name, layer in modules.items() if isinstance(layer, nn.Linear)]
            some = f"linear layers such as {', '.join(examples[:4])}" if examples else "no linear layer"
            raise ValueError(f"layers: nothing matches {pattern!r} in {type(module).__name__}, which has {some}")
        found |= matched
    for name in modules:
        if name in found:
            check_linear(name, modules, subclasses)
    check_not_tied(found, module)
    matched, names = {modules[name] for name in found}, {}
    for name, layer in modules.items():
        if layer in matched:
            names.setdefault(layer, []).append(name)
    return names


def find_present(module: nn.Module, patterns: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Return patterns as of `find_linears` without those of the optional ones that match nothing in a module."""
    names = [name for name, _ in module.named_modules()]
    missing = {pattern for pattern in optional if not any(matches(name, [pattern]) for name in names)}
    return [pattern for pattern in patterns if pattern not in missing]


def check_linear(name: str, modules: dict[str, nn.Module], subclasses: bool):
    """Raise ValueError if a layer cannot be replaced by a mixed layer.

    A subclass of `nn.Linear` may compute something else, and some modules read the weights of their layers.
    """
    kind, layer = type(modules[name]), modules[name]
    parent = modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(f"layers: {name} is in an nn.MultiheadAttention, which reads its weight without calling it")
    if isinstance(getattr(layer, "base_layer", None), nn.Linear):
        raise ValueError(f"layers: {name} has adapters of peft: name {name}.base_layer, or merge them before")
    if kind is not nn.Linear and not (subclasses and isinstance(layer, nn.Linear)):
        rank = "" if subclasses or not isinstance(layer, nn.Linear) else "; with rank, subclasses can be mixed too"
        raise ValueError(f"layers: {name} is a {kind.__module__}.{kind.__name__}, but must be an nn.Linear{rank}")
    if re.search(r"(^|\.)_orig_mod$", name):
        raise ValueError(f"layers: {name} was compiled by itself, and cannot be replaced: compile it after wrapping")
    if is_hooked(layer) and not subclasses:
        raise ValueError(
            f"layers: {name} has hooks or a forward of its own, which whole bases would not run: remove them, or give "
            "rank"
        )
    if is_traceable_wrapper_subclass(layer.weight) and not subclasses:
        kind = type(layer.weight).__name__
        raise ValueError(f"layers: the weight of {name} is a {kind}: only with rank can quantized layers be mixed")
    if name.rpartition(".")[2] in PROJECTIONS and is_fused(parent):
        raise ValueError(
            f"layers: {name} is not called, because the projections are fused: call unfuse_qkv_projections() before"
        )


def check_not_tied(names: Iterable[str], module: nn.Module):
    """Raise ValueError if a parameter of layers is also one of another layer, as it would not be in the experts."""
    owners = {}
    for name, part in module.named_modules():
        for key, parameter in part._parameters.items():
            owners.setdefault(id(parameter), []).append((name, key))
    for name in names:
        for key, parameter in module.get_submodule(name)._parameters.items():
            if parameter is not None and len(owners[id(parameter)]) > 1:
                other = next(".".join(owner) for owner in owners[id(parameter)] if owner != (name, key))
                raise ValueError(
                    f"layers: {name}.{key} is also {other}, but would be another parameter in the experts: leave "
                    f"{name} out, or give it a parameter of its own"
                )


def leave_fast_paths(module: nn.Module):
    """Let PyTorch's encoder layers call the linear layers in them that were replaced, whose weights they may read."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.TransformerEncoderLayer)]
    # Subclasses may have other layers.
    parts = {x: [getattr(x, name, None) for name in ("linear1", "linear2")] for x in layers}
    mixed = {x for x, linears in parts.items() if not all(isinstance(linear, nn.Linear) for linear in linears)}
    for layer in mixed:
        # The fast path has these activations only.
        layer.activation_relu_or_gelu = 0
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder) and mixed & {*encoder.layers}:
            encoder.use_nested_tensor = False


def find_tokens_first(module: nn.Module, names: Iterable[str]) -> str | None:
    """Return the name of the first layer, of some, that is in a transformer layer of PyTorch without `batch_first`."""
    for name in names:
        parent = module.get_submodule(name.rpartition(".")[0])
        known = isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        if known and not getattr(getattr(parent, "self_attn", None), "batch_first", True):
            return name
    return None


# The projections that diffusers' fuse_qkv_projections replaces.
PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def is_fused(attention: nn.Module) -> bool:
    """Return whether an attention of diffusers runs fused projections in the place of its separate ones."""
    if not getattr(attention, "fused_projections", False):
        return False
    # The class `Attention` keeps the flag when its projections are separated again; only its processor changes.
    processor = type(getattr(attention, "processor", None)).__name__
    return hasattr(attention, "unfuse_projections") or processor.startswith("Fused")


def call(module: nn.Module, unchecked: list[str], args: tuple, kwargs: dict) -> Any:
    """Call a module, and check in the first call that it reaches the mixed layers.

    A call may skip some layers, but it must reach at least one of those that match each name. Nothing is checked if a
    part of the module is compiled, because the check would be compiled too.

    Args:
        module: the module.
        unchecked: names of its mixed layers, in which * stands for any text without a dot. The list is emptied.
        args, kwargs: the arguments of the module.

    Returns:
        The result of the module.

    Raises:
        ValueError: if no layer that matches a name is called.
    """
    if torch.compiler.is_compiling() or not unchecked:
        return module(*args, **kwargs)
    modules = dict(module.named_modules(remove_duplicate=False))
    if any(part._compiled_call_impl or hasattr(part, "_orig_mod") for part in modules.values()):
        return module(*args, **kwargs)
    layers = {name: {part for key, part in modules.items() if matches(key, [name])} for name in unchecked}
    called, mixed = set(), set().union(*layers.values())
    handles = [part.register_forward_pre_hook(lambda part, _: called.add(part)) for part in mixed]
    try:
        output = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in unchecked if not layers[name] & called]
    if missing:
        raise ValueError(
            f"layers: a {type(module).__name__} was called and did not call {', '.join(missing)}, which would not be "
            "trained: leave these names out, or let the first call be one that needs them"
        )
    unchecked.clear()
    return output


def plain_linear(layer: nn.Module, device: str | None = None) -> nn.Linear:
    """Return a plain linear layer with the shape of a mixed layer, not initialized, on its device or another one."""
    # The weights of an offloaded layer are on the meta device, but not its bases.
    device = device or (layer.bases()[0] if layer.weight.is_meta else layer.weight).device
    options = dict(bias=layer.bias is not None, device=device, dtype=plain_dtype(layer))
    linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, **options)
    return linear.requires_grad_(layer.weight.requires_grad)


def block_name(layer: str) -> str:
    """Return a layer's name up to the first number, such as "blocks.3", or the whole name."""
    return re.match(r"(.*?\.\d+)(\.|$)|.*", layer)[1] or layer


def has_rows(value: Any, size: int) -> bool:
    """Return whether a value is a tensor or an array whose first dimension has a size."""
    # Before PyTorch 2.10, torch.compile cannot trace a union of types.
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0 and len(value) == size


def join_outputs(outputs: list, order: Tensor, sizes: list[int], lists: bool) -> Any:
    """Join what a module has returned for parts of a batch.

    Args:
        outputs: a result for each part: a tensor whose first dimension is the part, or a list with one value per
            sample; or lists, dictionaries, dataclasses or `ModelOutput`s of them and of values that are equal for all
            parts.
        order: indices [B] of the samples in the batch, in the order of the parts.
        sizes: number of samples of each part.
        lists: whether a list of as many tensors as samples has one tensor per sample, whatever their shapes.

    Raises:
        TypeError: if a result has another type, or a tensor of it another first dimension.
    """
    inverse = order.argsort()

    def is_list_of_samples(parts) -> bool:
        pairs = [*zip(parts, sizes, strict=True)]
        if not all(isinstance(part, list) and len(part) == size for part, size in pairs):
            return False
        # Numbers such as losses are those of the layers, and not of the samples.
        if lists or any(isinstance(value, Tensor) and not value.ndim for part in parts for value in part):
            return lists
        return not all(has_rows(value, size) for part, size in pairs for value in part)

    def join_trees(*parts):
        return tree_map(join, *parts, is_leaf=lambda value: isinstance(value, list))

    def join(*parts):
        first = parts[0]
        if is_list_of_samples(parts):
            joined = [value for part in parts for value in part]
            return [joined[i] for i in inverse.tolist()]
        if isinstance(first, list) and len({*map(len, parts)}) == 1:
            return [join_trees(*values) for values in zip(*parts, strict=True)]
        if is_record(first):
            return _with_fields(first, lambda name: join_trees(*(getattr(part, name) for part in parts)))
        if all(isinstance(part, Tensor) and has_rows(part, size) for part, size in zip(parts, sizes, strict=True)):
            return torch.cat(parts)[inverse]
        if first is None or isinstance(first, (str, bool, int, float)):
            if any(type(part) is not type(first) or part != first for part in parts):
                raise TypeError(
                    f"the module must return equal values for all parts of a batch of several experts, but it returned "
                    f"{first!r} and others: use batches of one expert, or groups"
                )
            return first
        pairs = zip(parts, sizes, strict=True)
        part, size = next(
            (part, size) for part, size in pairs if not isinstance(part, Tensor) or not has_rows(part, size)
        )
        found = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise TypeError(
            f"the module must return tensors whose first dimension is the batch, but it returned {found} for "
            f"{counted(size, 'sample')} of {len(order)}: use batches of one expert, or groups"
        )

    return join_trees(*outputs)


# Methods of diffusers' modules that would read the weights of the mixed layers as those of one plain model, and those
# that would not reach whole bases.
NOT_OF_A_REMIX = {
    "save_pretrained": "a Remix is saved with torch.save(remix.state_dict(), path)",
    "push_to_hub": "a Remix is saved with torch.save(remix.state_dict(), path), and uploaded as a file",
    "fuse_qkv_projections": "only the projections of a plain expert can be fused: remix.expert(i)",
    **dict.fromkeys(
        ("load_lora_adapter", "add_adapter"),
        "a Remix takes no adapters such as LoRA: use a FoldedRemix(remix), or give rank for LoRA of its own",
    ),
}
NOT_OF_WHOLE_BASES = {
    "enable_layerwise_casting": "whole bases are not cast by layers: use a FoldedRemix(remix), or give rank",
}


def call_each(name: str, modules: Sequence[nn.Module], *args, **kwargs) -> Any:
    """Call a method of several modules with the same arguments, and return the first result, or all as one context."""
    results = []
    for module in modules:
        # set_attn_processor of diffusers empties the dictionary that it gets.
        values = [value.copy() if isinstance(value, dict) else value for value in args]
        named = {key: value.copy() if isinstance(value, dict) else value for key, value in kwargs.items()}
        results.append(getattr(module, name)(*values, **named))
    return join_contexts(results) if isinstance(results[0], AbstractContextManager) else results[0]


@contextmanager
def join_contexts(contexts: Sequence[AbstractContextManager]) -> Iterator[Any]:
    """Enter several contexts as one."""
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(context) for context in contexts]
        yield first


class TransparentModule(nn.Module):
    """A module with a submodule, by default `backbone`, whose attributes are also attributes of this one.

    If it has `other_stages` too, modules of the same class, the methods of the submodule are called for all of them.

    Attributes:
        _inner: name of the submodule.
        _refused: names of attributes of the submodule that this module does not have, each with what to do instead.
    """

    _inner: str = "backbone"
    _refused: Mapping[str, str] = NOT_OF_A_REMIX

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """Return a parameter or a buffer by its name, as a model of transformers does for accelerate."""
        owner, _, part = name.rpartition(".")
        return getattr(self.get_submodule(owner), part)

    def enable_cache(self, config: Any):
        """Enable a cache of a model of diffusers.

        Raises:
            ValueError: if it stores keys and values of the text for all steps.
            AttributeError: if the submodule has no caches.
        """
        if type(config).__name__ == "TextKVCacheConfig":
            raise ValueError("a TextKVCacheConfig would pass keys and values of one expert to another: leave it out")
        self.__getattr__("enable_cache")(config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self._inner or name.startswith("__"):
                raise
            if name in self._refused:
                raise AttributeError(self._refused[name]) from None
            inner = getattr(self, self._inner)
            value = getattr(inner, name)
            others = self._modules.get("other_stages", ())
            if not (others and inspect.ismethod(value)):
                return value
            return partial(call_each, name, [inner, *others])


class Arguments:
    """The arguments that a module is called with.

    Args:
        module: the module.
        preset: names its arguments; see `mixing.presets.Preset`.

    Raises:
        ValueError: if the module has no argument of the noise level.
    """

    def __init__(self, module: nn.Module, preset: Preset):
        self.owner = type(module).__name__
        parameters = inspect.signature(module.forward).parameters
        self.names = [*parameters]
        self.timestep, self.reverses = preset.timestep, preset.reverses
        any_name = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        if isinstance(self.timestep, str) and self.timestep not in self.names and not any_name:
            known = ", ".join(self.names)
            raise ValueError(f"timestep: {self.owner}.forward has no argument {self.timestep!r}, only {known}")
        if "groups" in self.names:
            raise ValueError(f"{self.owner}.forward has an argument 'groups', which a Remix takes itself: rename it")
        self.unbatched = preset.unbatched
        self.batch_dims = preset.batch_dims
        self.caches = preset.caches

    def times(self, args: tuple, kwargs: dict) -> Tensor:
        """Return what the argument `timestep` holds for each sample, [B] or [1]. Of several, that of the most noise.

        Raises:
            TypeError: if it is no tensor.
            ValueError: if there is a cache of activations.
        """
        for name, value in self.named(args, kwargs) if self.caches else ():
            if name in self.caches and value is not None:
                raise ValueError(
                    f"{name} would pass activations of one expert of the {self.owner} to another: leave it out (some "
                    "pipelines have use_kv_cache=False)"
                )
        if callable(self.timestep):
            t = self.timestep(*args, **kwargs)
        else:
            t = kwargs.get(self.timestep)
            named = self.timestep in self.names
            if t is None and named and self.names.index(self.timestep) < len(args):
                t = args[self.names.index(self.timestep)]
        if not isinstance(t, Tensor):
            by_name = "" if callable(self.timestep) or named else ", given by its name"
            raise TypeError(
                f"the experts are selected by {self.timestep!r}, which must be a tensor [B]{by_name}, but {self.owner} "
                f"got {t!r}"
            )
        if t.ndim < 2:
            return t.view(-1)
        return t.flatten(1).amin(1) if self.reverses else t.flatten(1).amax(1)

    def named(self, args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
        """Return the names and the values of all arguments, the positional ones first."""
        # The last name may be that of *args.
        names = [*self.names, *self.names[-1:] * len(args)][: len(args)]
        return [*zip(names, args, strict=True), *kwargs.items()]

    def batches_are_lists(self, size: int, args: tuple, kwargs: dict) -> bool:
        """Return whether no argument is a tensor with the batch as its first dimension and further dimensions.

        Such a tensor may also be in a dictionary or a dataclass. The samples of other modules are in lists, such as
        images of several sizes.
        """

        def is_batch(value: Any) -> bool:
            if isinstance(value, Mapping):
                return any(map(is_batch, value.values()))
            if is_record(value):
                return any(is_batch(getattr(value, part.name)) for part in fields(value))
            return has_rows(value, size) and value.ndim > 1

        return not any(is_batch(value) for name, value in self.named(args, kwargs) if name not in self.unbatched)

    def take(self, rows: Tensor, size: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Select some samples of all arguments that are batches of `size` samples.

        A batch is a tensor or an array whose first dimension is the batch, a list with one value per sample, or lists,
        tuples, dictionaries and dataclasses of them; or what `batch_dims` says.

        Raises:
            ValueError: if it is not clear whether an argument is a batch.
        """
        indices = rows.tolist()
        lists = self.batches_are_lists(size, args, kwargs)
        # The names of arguments that are divided, but for numbers of the samples, and of tensors that are not.
        divided, whole = [], []

        def select(name: str, value: Tensor | np.ndarray, dim: int) -> Tensor | np.ndarray:
            if value.ndim > 1:
                divided.append(name)
            if isinstance(value, np.ndarray):
                return value.take(indices, dim)
            return value[rows] if dim == 0 else value.index_select(dim, rows)

        def take(name: str, value):
            dim = self.batch_dims.get(name)
            if isinstance(value, Tensor | np.ndarray):
                if has_rows(value, size) and dim is None:
                    return select(name, value, 0)
                if dim is not None and -value.ndim <= dim < value.ndim and value.shape[dim] == size:
                    return select(name, value, dim)
                if dim is None and size in value.shape:
                    raise unclear(name, f"has the shape {list(value.shape)}, whose first dimension is not the batch")
                if value.ndim > 1:
                    whole.append(f"{name} {list(value.shape)}")
                return value
            if isinstance(value, Mapping):
                return _rebuild(value, {key: take(name, item) for key, item in value.items()})
            if is_record(value):
                return _with_fields(value, lambda key: take(name, getattr(value, key)))
            if not isinstance(value, list | tuple):
                if any(has_rows(item, size) for item in getattr(value, "__dict__", {}).values()):
                    kind = type(value).__name__
                    raise unclear(name, f"is a {kind} that holds {size} rows", "or give a dictionary or a dataclass")
                return value
            if dim is None and len(value) == size:
                if isinstance(value, tuple):
                    raise unclear(name, f"is a tuple of {size}, as many as the samples, and not a list")
                if not lists and all(has_rows(item, size) for item in value):
                    raise unclear(name, f"is a list of {size} tensors of {size} rows each, as many as the samples")
                divided.append(name)
                return [value[i] for i in indices]
            return _rebuild(value, [take(name, item) for item in value])

        def unclear(name: str, found: str, otherwise: str = "") -> ValueError:
            otherwise = otherwise or f"or the dimension of the batch in its tensors, batch_dims={{{name!r}: ...}}"
            return ValueError(
                f"a batch of {size} samples of several experts cannot be divided: {name} {found}. Name it in "
                f"unbatched=[{name!r}], {otherwise}"
            )

        taken = [v if k in self.unbatched else take(k, v) for k, v in self.named(args, kwargs)]
        if whole and not divided:
            raise ValueError(
                f"a batch of {size} samples of several experts cannot be divided: the samples may be in "
                f"{', '.join(whole)}, but not along the first dimension. Use batches of one expert, or unbatched=[...] "
                "if they are not; with rank, packed tokens can have a noise level each"
            )
        return tuple(taken[: len(args)]), dict(zip(kwargs, taken[len(args) :], strict=True))


def is_record(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass, whose fields can be divided and joined."""
    return is_dataclass(value) and not isinstance(value, type)


def _with_fields(value: Any, field: Callable[[str], Any]) -> Any:
    """Return a copy of a dataclass with other values of its fields and attributes, by a function of their names."""
    value = copy.copy(value)
    # Such as attributes that __post_init__ has set.
    for name in dict.fromkeys([*(part.name for part in fields(value)), *getattr(value, "__dict__", ())]):
        object.__setattr__(value, name, field(name))
    return value


def _rebuild(value: Any, items: list | dict) -> Any:
    """Return a list, a tuple or a mapping like another one, with other items."""
    if hasattr(value, "_fields"):
        return type(value)(*items)
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, items)
    return type(value)(items)
