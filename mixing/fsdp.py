"""A Remix whose parameters are divided among processes by PyTorch's FSDP2, `torch.distributed.fsdp.fully_shard`.

Expert i is theta_i = sum_k alpha_ik beta_k, and alpha must not be rounded. A policy of mixed precision is therefore not
applied to the logits, to whole bases, which are mixed in float32, and to the noise levels.
"""

import copy
from collections.abc import Iterator, Sequence
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
    `expert`, `fold_`, `merge` and `distances`, `interop.expert_folder.write_experts` and
    `interop.lora.write_stage_loras` must be called by every process; the plain models are made on rank 0 only, in host
    memory, and None on the others.

    Args:
        remix: the Remix, the same on every process.
        blocks: names of the modules that are gathered one at a time, in which * stands for any text without a dot.
            None: the blocks of the mixed layers.
        mesh: the `DeviceMesh` of the processes. None: all of them.
        mp_policy: the `MixedPrecisionPolicy` of everything but the logits, whole bases and noise levels.
        **options: further arguments of PyTorch's `fully_shard`, such as `offload_policy` and `reshard_after_forward`.

    Raises:
        ValueError: if a part of the Remix is sharded already, a weight is quantized, or a name of `blocks` matches no
            module.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as shard

    if not hasattr(remix, "batch_coefficients"):
        raise ValueError(f"fully_shard expects a Remix, but got a {type(remix).__name__}: use PyTorch's fully_shard")
    if is_sharded(remix):
        raise ValueError("the Remix, or a part of it, is sharded already")
    for name, parameter in remix.named_parameters():
        if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
            raise ValueError(f"quantized weights such as {name} cannot be sharded: each process needs them whole")
    names, layers = [name for name, _ in remix.backbone.named_modules()], dict(remix.mixed())
    if blocks is None:
        chosen = [name for name in dict.fromkeys(map(wrapping.block_name, layers)) if name not in layers]
    else:
        chosen = [name for name in names if wrapping.matches(name, blocks)]
        for pattern in blocks:
            if not any(wrapping.matches(name, [pattern]) for name in chosen):
                raise ValueError(f"blocks: nothing matches {pattern!r} in {type(remix.backbone).__name__}")

    remix.plain_on_meta = [_plain_on_meta(remix, s) for s in range(len(remix.stages))]
    # The last dimension of a mesh is that of the parts; another one has copies of them.
    size = mesh.shape[-1] if mesh is not None else dist.get_world_size()
    bases = {basis for layer in layers.values() for basis in layer.bases()}
    policy = mp_policy or MixedPrecisionPolicy()
    shard = partial(shard, mesh=mesh, shard_placement_fn=partial(_placement, bases=bases, size=size), **options)
    shard(remix.coefficients)
    if policy.param_dtype is not None and remix.rank is None:
        # Rounded bases would lose their small differences, and with them the gradient of alpha.
        for layer in layers.values():
            shard(layer)
    if len(remix.stages) > 1:
        # Their parameters are gathered when a layer of any stage calls them.
        for layer in layers.values():
            shard(layer.pairs[0], mp_policy=replace(policy, cast_forward_inputs=False))
    for stage in remix.stages.modules:
        for name in chosen:
            shard(stage.get_submodule(name), mp_policy=policy)
        shard(stage, mp_policy=replace(policy, cast_forward_inputs=False))
        if policy.param_dtype is not None and policy.cast_forward_inputs:
            cast = partial(_cast_inputs, remix.arguments, policy.param_dtype)
            stage.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)
    return remix


def is_sharded(module: nn.Module) -> bool:
    """Return whether a part of a module is sharded by FSDP2."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


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
        memo = {id(layer): wrapping.plain_linear(layer, "meta") for _, layer in remix.mixed(s)}
    stage = remix.stages.module(s)
    tensors = (*stage.named_parameters(), *stage.named_buffers())
    for _, tensor in tensors:
        if id(tensor) not in memo:
            empty = torch.empty_like(tensor, device="meta")
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return copy.deepcopy(stage, memo).eval()


@torch.no_grad()
def gather_plain(remix: nn.Module, s: int) -> nn.Module | None:
    """Return a plain copy of stage s of a sharded Remix on rank 0, whose mixed layers are not initialized."""
    if not hasattr(remix, "plain_on_meta"):
        raise ValueError(
            "this Remix was not sharded by mixing.fsdp.fully_shard: load its full state dict into a whole Remix"
        )
    reshard(remix)
    plain = copy.deepcopy(remix.plain_on_meta[s]).to_empty(device="cpu") if dist.get_rank() == 0 else None
    stage = remix.stages.module(s)
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
def gathered(layer: nn.Module) -> Iterator[None]:
    """Let a mixed layer have whole parameters. Every process must enter this, after `reshard`."""
    modules = layer.owners() if isinstance(layer, LowRankLinear) else (layer,)
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
