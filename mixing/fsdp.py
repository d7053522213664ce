"""A Remix whose parameters are divided among processes by PyTorch's FSDP2, `torch.distributed.fsdp.fully_shard`.

Expert i is theta_i = sum_k alpha_ik beta_k, and alpha must not be rounded. A policy of mixed precision is therefore not
applied to the logits, to whole bases, which are mixed in float32, and to the noise levels.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from mixing import wrapping
from mixing.low_rank import LowRankLinear


def fully_shard(remix: nn.Module, blocks: Sequence[str] | None = None, mesh=None, mp_policy=None, **options):
    """Divide the parameters of a Remix among processes, in place, and return it.

    Afterwards every process calls it with its own part of the global batch, and the gradients are averaged. The methods
    `expert`, `fold_`, `merge` and `distances`, `interop.expert_folder.write_experts`, `interop.lora.write_stage_loras`
    and `interop.wan.write_pair` must be called by every process; the plain models are made on rank 0 only, in host
    memory, and None on the others.

    Args:
        remix: the Remix, the same on every process.
        blocks: names of the modules that are gathered one at a time, in which * stands for any text without a dot.
            None: the blocks of the mixed layers.
        mesh: the `DeviceMesh` of the processes. None: all of them.
        mp_policy: the `MixedPrecisionPolicy` of everything but the logits, whole bases and noise levels.
        **options: further arguments of PyTorch's `fully_shard`, such as `offload_policy` and `reshard_after_forward`.

    Raises:
        ValueError: if a part of the Remix is sharded already, a weight is quantized, a name of `blocks` matches no
            module that is called, or parameters that are gathered together are trained in two dtypes.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as pytorch

    _check_shardable(remix)
    layers = dict(remix.mixed())
    chosen = _find_blocks(remix.backbone, layers, blocks)
    remix.plain_on_meta = [_plain_on_meta(remix, s) for s in range(len(remix.stages))]
    # The last dimension of a mesh is that of the parts; another one has copies of them.
    size = mesh.shape[-1] if mesh is not None else dist.get_world_size()
    bases = {basis for layer in layers.values() for basis in layer.bases()}
    policy = mp_policy or MixedPrecisionPolicy()
    pytorch = partial(pytorch, mesh=mesh, shard_placement_fn=partial(_placement, bases=bases, size=size), **options)

    def shard(module: nn.Module, policy: MixedPrecisionPolicy):
        if not isinstance(module, FSDPModule):
            pytorch(module, mp_policy=policy)

    shard(remix.coefficients, MixedPrecisionPolicy())
    alone = policy.param_dtype is not None and remix.rank is None
    for stage in remix.stages.modules:
        _check_dtypes(stage, chosen, bases if alone or len(remix.stages) > 1 else ())
    if alone:
        # Rounded bases would lose their small differences, and with them the gradient of alpha.
        for layer in layers.values():
            shard(layer, MixedPrecisionPolicy())
    if len(remix.stages) > 1:
        # Their parameters are gathered when a layer of any stage calls them.
        for layer in layers.values():
            shard(layer.pairs[0], replace(policy, cast_forward_inputs=False))
    for stage in remix.stages.modules:
        # A layer that several modules call cannot be gathered with one of them.
        callers = Counter(part for module in stage.modules() for part in module.children())
        for part in (part for part, count in callers.items() if count > 1 and [*part.parameters()]):
            shard(part, policy)
        # The inner ones first.
        for name in reversed(chosen):
            shard(stage.get_submodule(name), policy)
        shard(stage, replace(policy, cast_forward_inputs=False))
        if policy.param_dtype is not None and policy.cast_forward_inputs:
            cast = partial(_cast_inputs, remix.arguments, policy.param_dtype)
            stage.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)
    return remix


def _check_shardable(remix: nn.Module):
    """Raise ValueError if a module is no Remix, is sharded already, or has quantized weights."""
    if not hasattr(remix, "batch_coefficients"):
        raise ValueError(f"fully_shard expects a Remix, but got a {type(remix).__name__}: use PyTorch's fully_shard")
    if is_sharded(remix):
        raise ValueError("the Remix, or a part of it, is sharded already")
    for name, parameter in remix.named_parameters():
        if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
            raise ValueError(f"quantized weights such as {name} cannot be sharded: each process needs them whole")


def _find_blocks(module: nn.Module, layers: Collection[str], patterns: Sequence[str] | None) -> list[str]:
    """Return the names of the modules that are gathered one at a time, in the module's order; see `fully_shard`."""
    modules = dict(module.named_modules())
    # PyTorch refuses modules without a forward, such as an nn.ModuleList.
    called = {name for name, part in modules.items() if type(part).forward is not nn.Module.forward}
    if patterns is None:
        names = dict.fromkeys(map(wrapping.block_name, layers))
        return [name for name in names if name in called and name not in layers]
    if isinstance(patterns, str):
        raise ValueError(f"blocks must be a list of names of modules, but it is {patterns!r}")
    names = [name for name in modules if name and wrapping.matches(name, patterns)]
    for pattern in patterns:
        if not any(wrapping.matches(name, [pattern]) for name in names):
            raise ValueError(f"blocks: nothing matches {pattern!r} in {type(module).__name__}")
    for name in names:
        if name not in called:
            kind = type(modules[name]).__name__
            raise ValueError(f"blocks: {name} is a {kind}, which is not called: name the modules in it")
    return names


def _check_dtypes(module: nn.Module, blocks: Sequence[str], alone: Collection[nn.Parameter]):
    """Raise ValueError if parameters of a block or of the rest, except `alone`, are trained in several dtypes."""
    first = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter not in alone:
            block = next((block for block in reversed(blocks) if name.startswith(f"{block}.")), "")
            other, dtype = first.setdefault(block, (name, parameter.dtype))
            if dtype != parameter.dtype:
                raise ValueError(
                    f"FSDP cannot train {other} in {dtype} with {name} in {parameter.dtype}: freeze what is outside "
                    "the bases (remix.freeze_shared()), or convert it"
                )


def is_sharded(module: nn.Module) -> bool:
    """Return whether a part of a module is sharded by FSDP2."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def written_once(remix: nn.Module) -> Iterator[bool]:
    """Yield whether this process writes the files of a Remix; the processes of a sharded one wait for each other."""
    sharded = is_sharded(remix)
    yield not sharded or dist.get_rank() == 0
    if sharded:
        dist.barrier()


def check_whole(modules: Sequence[nn.Module]):
    """Raise ValueError if a module that is to be wrapped is sharded, or wrapped for several processes or devices."""
    for module in modules:
        for part in module.modules() if isinstance(module, nn.Module) else ():
            if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
                # The replicas of a DataParallel would share the coefficients of one batch.
                raise ValueError(
                    f"a {type(part).__name__} would not know the bases: make a Remix of its `module`, then a "
                    "DistributedDataParallel of it"
                )
        if isinstance(module, nn.Module) and (
            is_sharded(module) or any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
        ):
            raise ValueError("the module is sharded already: wrap it first, then shard its Remix (mixing.fsdp)")


def check_same_stages(stages: Sequence[int], device: torch.device):
    """Raise ValueError on every process if the batches of the processes have samples of different stages.

    Every process must call this. Processes that gather the parameters of different stages would wait for ever.
    """
    mask = sum(1 << s for s in stages)
    extremes = torch.tensor([mask, -mask], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes.sum():
        raise ValueError("sharded stages need samples of the same stages on every process: draw the stage for all")


def _placement(parameter: nn.Parameter, bases: set[nn.Parameter], size: int):
    """Return the dimension on which a basis [K, ...] is divided: not K, which may be less than the processes."""
    from torch.distributed.tensor import Shard

    if parameter not in bases:
        return None
    # FSDP2 can only divide them equally.
    return next((Shard(dim) for dim in range(1, parameter.ndim) if parameter.shape[dim] % size == 0), None)


def _cast_inputs(arguments: wrapping.Arguments, dtype: torch.dtype, module: nn.Module, args: tuple, kwargs: dict):
    """Cast the arguments of a module, but not the noise levels: bf16 rounds 999 to 1000."""

    def cast(name: str, value):
        if name == arguments.timestep:
            return value
        lowest = 2 if callable(arguments.timestep) else 0

        def convert(x):
            floating = isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= lowest
            return x.to(dtype) if floating else x

        return tree_map(convert, value)

    values = [cast(name, value) for name, value in arguments.named(args, kwargs)]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _plain_on_meta(remix: nn.Module, s: int) -> nn.Module:
    """Return stage s as a plain model without values; FSDP's modules cannot be copied."""
    with torch.device("meta"):
        layers = {id(layer): wrapping.plain_linear(layer, "meta") for _, layer in remix.mixed(s)}
    stage = remix.stages.module(s)
    return copy.deepcopy(stage, layers | _without_values(stage, "meta")).eval()


def _without_values(module: nn.Module, device: str) -> dict[int, Tensor]:
    """Return what `copy.deepcopy` takes for the tensors of a module: others on a device, which are not initialized."""
    tensors = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device=device)
        parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return tensors


@torch.no_grad()
def gather_plain(remix: nn.Module, s: int) -> nn.Module | None:
    """Return a plain copy of stage s of a sharded Remix on rank 0, whose mixed layers are not initialized.

    Raises:
        ValueError: if another function than `fully_shard` has sharded the Remix.
    """
    if not hasattr(remix, "plain_on_meta"):
        raise ValueError(
            "this Remix was not sharded by mixing.fsdp.fully_shard: load its full state dict into a whole Remix"
        )
    reshard(remix)
    plain, meta, stage = None, remix.plain_on_meta[s], remix.stages.module(s)
    if dist.get_rank() == 0:
        # Unlike `to_empty`, this keeps tied parameters tied.
        plain = copy.deepcopy(meta, _without_values(meta, "cpu"))
    tensors = (*stage.named_parameters(), *stage.named_buffers())
    mixed = tuple(f"{name}." for name, _ in remix.mixed())
    for name, tensor in tensors:
        if name.startswith(mixed):
            continue
        value = whole(tensor)
        if plain is not None:
            owner, _, part = name.rpartition(".")
            getattr(plain.get_submodule(owner), part).copy_(value)
    return plain


def reshard(remix: nn.Module):
    """Let every process hold its parts only, as they are trained: what is gathered may be rounded."""
    from torch.distributed.fsdp import FSDPModule

    for module in remix.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts. Every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def gathered(layer: nn.Module, bases_only: bool = False) -> Iterator[None]:
    """Let a mixed layer have whole parameters, or only whole bases. Every process must enter this, after `reshard`."""
    modules = layer.owners() if isinstance(layer, LowRankLinear) else (layer,)
    modules = modules[:1] if bases_only else modules
    if not any(hasattr(parameter, "full_tensor") for module in modules for parameter in module.parameters()):
        yield
        return
    before = [dict(module._parameters) for module in modules]
    try:
        for module in modules:
            for name, parameter in [*module._parameters.items()]:
                module._parameters[name] = None if parameter is None else whole(parameter.detach())
        yield
    finally:
        for module, parameters in zip(modules, before, strict=True):
            module._parameters.update(parameters)


@torch.no_grad()
def fold_gathered(remix: nn.Module, module: nn.Module | None, alpha: list[list[float]], s: int):
    """Write mixtures of stage s into a plain module, layer after layer. It is None on all processes but the first."""
    reshard(remix)
    for name, layer in remix.mixed(s):
        with gathered(layer):
            if module is not None:
                layer.fold([layer], [module.get_submodule(name)], alpha[layer.row])
