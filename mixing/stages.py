"""The stages of a Remix: modules of one class, each of which runs the experts of one interval of noise levels.

Stage s denoises boundaries[s] <= level < boundaries[s + 1]. Expert i of stage s is theta_s + sum_k alpha_ik B_k A_k.
The low-rank pairs are shared by all stages, and theta_s is frozen. A Remix of one module has one stage.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixing import fsdp, wrapping
from mixing.low_rank import LowRankPairs, StageLinear


@dataclass(frozen=True)
class Stages:
    """Which module runs each interval of noise levels.

    Attributes:
        boundaries: S + 1 increasing noise levels, the first one 0.
        expert_boundaries: N + 1 increasing noise levels of the experts, among them those of the stages.
        modules: the module of each stage [S]. Stage 0 has the least noise.
        shared: the modules with what all stages share.
    """

    boundaries: list[float]
    expert_boundaries: list[float]
    modules: Sequence[nn.Module]
    shared: Sequence[nn.Module] = ()

    def __len__(self) -> int:
        return len(self.modules)

    def module(self, s: int) -> nn.Module:
        """Return the module of stage s."""
        return self.modules[s]

    def experts(self, s: int) -> range:
        """Return the experts of stage s."""
        low, high = self.boundaries[s : s + 2]
        return range(self.expert_boundaries.index(low), self.expert_boundaries.index(high))

    def of(self, i: int) -> int:
        """Return the stage of expert i.

        Raises:
            IndexError: if i is not from 0 to N - 1.
        """
        last = len(self.expert_boundaries) - 2
        if not 0 <= i <= last:
            raise IndexError(f"the expert index must be from 0 to {last}, but it is {i}")
        return bisect_right(self.boundaries, self.expert_boundaries[i]) - 1

    def divide(self, experts: Tensor) -> dict[int, Tensor]:
        """Return the stages of the experts [G], and which of the G groups each stage runs. The host waits."""
        groups = {}
        for group, expert in enumerate(experts.tolist()):
            groups.setdefault(self.of(expert), []).append(group)
        return {s: torch.tensor(groups[s], device=experts.device) for s in sorted(groups)}

    def activate(self, s: int, device: torch.device | str):
        """Move stage s and what all stages share to a device, and the other stages to the host."""
        active = self.module(s)
        for module in self.modules:
            if module is not active:
                module.to("cpu")
        for module in (*self.shared, active):
            module.to(device)


def find_modules(module: Any, stages: Sequence[float] | None, rank: int | None) -> list[Any]:
    """Return the modules of a Remix as a list.

    Args:
        module, stages, rank: see `remix.Remix`.

    Raises:
        ValueError: if `stages` and several modules are not given together, or without a rank; if `stages` is no list;
            or if the modules differ in their class or layout, or are one module.
    """
    if stages is None:
        if isinstance(module, list | tuple):
            raise ValueError(f"stages must be given for {len(module)} modules: the noise levels between them")
        return [module]
    if not isinstance(module, list | tuple):
        raise ValueError(f"stages needs a list of modules, but got one {type(module).__name__}")
    if not hasattr(stages, "__len__"):
        raise ValueError(f"stages must be a list of noise levels, such as [0, 875, 1000], but it is {stages!r}")
    modules = [*module]
    if len(modules) < 2 or len(stages) != len(modules) + 1:
        raise ValueError(
            f"stages needs at least 2 modules and one more noise level, but got {len(modules)} modules and "
            f"{len(stages)} noise levels"
        )
    if rank is None:
        raise ValueError("stages needs rank: the bases that stages share are pairs of low rank")
    if len({*map(id, modules)}) < len(modules):
        raise ValueError("stages needs different modules, but one of them is given twice")
    for s, other in enumerate(modules):
        if not isinstance(other, nn.Module):
            raise ValueError(f"stages needs nn.Modules, such as a pipeline's transformers, but {s} is {other!r}")
        if type(other) is not type(modules[0]):
            raise ValueError(f"stages: module 0 is a {type(modules[0]).__name__}, but {s} is a {type(other).__name__}")
        if found := find_difference(layout(modules[0]), layout(other)):
            raise ValueError(f"stages: module {s} differs from module 0 in its layout, such as {found}")
    return modules


def layout(module: nn.Module) -> dict[str, Any]:
    """Return the shapes of a module's linear layers, whether quantized or not, and of its other tensors, by name."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            found[name] = [part.out_features, part.in_features, part.bias is not None]
        else:
            tensors = {**part._parameters, **part._buffers}
            found |= {f"{name}.{key}".lstrip("."): [*x.shape] for key, x in tensors.items() if x is not None}
    return found


def find_difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Return the name of a part in which two layouts differ; None if they are equal."""
    return next((name for name in {**first, **second} if first.get(name) != second.get(name)), None)


def share_pairs(
    modules: Sequence[nn.Module], pairs: nn.Module, name: str, shape: tuple[int, int], *coefficients
) -> list[StageLinear]:
    """Return one layer for each stage that applies the same low-rank pairs, in the place of a linear layer.

    Args:
        modules: the module of each stage.
        pairs: the module that owns the pairs. They get the layer's name in it.
        name: the name of the layer in each of the modules.
        shape: number of bases K and rank r.
        *coefficients: `batch_coefficients` and `row` of `low_rank.LowRankLinear`.
    """
    own = LowRankPairs(modules[0].get_submodule(name), *shape)
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in pairs._modules:
            pairs.add_module(parent, nn.Module())
        pairs = pairs._modules[parent]
    pairs.add_module(last, own)
    return [StageLinear(module.get_submodule(name), own, *coefficients) for module in modules]


def run(remix: nn.Module, experts: Tensor, size: int, args: tuple, kwargs: dict, per_sample: bool = False) -> Any:
    """Run each stage of a Remix on its part of a batch.

    Args:
        remix: the Remix.
        experts: the experts [G] of G equal groups.
        size: number of samples.
        args, kwargs: the arguments of the module.
        per_sample: whether the groups are the samples.

    Raises:
        ValueError: if the Remix is sharded, and other processes need other stages.
    """
    if not remix.stage_boundaries:
        return run_stage(remix, 0, experts, (args, kwargs), size, per_sample)
    groups = remix.stages.divide(experts)
    if fsdp.is_sharded(remix):
        fsdp.check_same_stages([*groups], experts.device)
    if len(groups) == 1:
        return run_stage(remix, *groups, experts, (args, kwargs), size, per_sample)
    rows = torch.arange(size, device=experts.device).view(len(experts), -1)  # [G, B / G]
    parts = [(s, rows[own].flatten(), experts[own]) for s, own in groups.items()]
    return run_parts(remix, parts, size, args, kwargs, per_sample)


def run_stage(
    remix: nn.Module, s: int, experts: Tensor, arguments: tuple[tuple, dict], size: int, per_sample: bool
) -> Any:
    """Run the module of stage s on G equal groups of experts [G]; see `run`. `arguments` are args and kwargs."""
    remix.batch_coefficients.start(remix.coefficients_per_row(), experts, size, per_sample)
    try:
        return wrapping.call(remix.stages.module(s), remix.unchecked, *arguments)
    finally:
        remix.batch_coefficients.end()


def run_parts(
    remix: nn.Module,
    parts: list[tuple[int, Tensor, Tensor]],
    size: int,
    args: tuple,
    kwargs: dict,
    per_sample: bool = False,
) -> Any:
    """Run parts of a batch one after the other; see `run`. Each is a stage, the indices of its samples, and experts."""
    outputs = []
    for s, rows, experts in parts:
        taken = remix.arguments.take(rows, size, args, kwargs)
        outputs.append(run_stage(remix, s, experts, taken, len(rows), per_sample))
    rows = [rows for _, rows, _ in parts]
    lists = remix.arguments.batches_are_lists(size, args, kwargs)
    return wrapping.join_outputs(outputs, torch.cat(rows), [*map(len, rows)], lists)
