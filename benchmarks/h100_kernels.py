"""Print the kernels that torch.compile would write for a mixed layer on an H100, on a machine without a GPU.

    python benchmarks/h100_kernels.py --size B/2 --layer fc1 --n-basis 4 --groups 2

The layer is traced on the CPU. Its forward and backward graphs, as AOTAutograd cuts them, are then lowered by inductor
as if their tensors were on an H100. Nothing is compiled or run on a GPU. The tables show which kernels there are, what
they load, and over how many rows a reduction is spread. They cannot show time. The internals of inductor that this
script uses are those of PyTorch 2.11.
"""

import argparse
import copy
import itertools
import math
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as config
import torch._inductor.scheduler as scheduler
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton as triton_checks
from functorch.compile import make_boxed_func
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grouped_linear
from common import ArgumentParser, UserError, atomic_write, positive_int, run_script
from models import DiT_models
from remix import MIXED_LAYERS

TORCH_VERSION = "2.11"
MULTIPROCESSORS = 132
H100 = types.SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=MULTIPROCESSORS,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
    gcnArchName="",
)
# A reduction of more numbers than this on fewer rows than there are multiprocessors leaves most of the GPU idle.
LONG_REDUCTION = 65536
# Images and tokens per image of the layer's input. The kernels that mix the bases do not depend on them.
IMAGES, TOKENS = 16, 256


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled graph.

    Attributes:
        kind: "pointwise", "reduction" or "persistent reduction", or the name of a library function.
        rows: number of results, which are spread over the multiprocessors; 0 for a library function.
        reduced: numbers that are reduced to one result; 1 if nothing is reduced.
        loads: for each argument, the number of instructions that load one number per row and reduced number.
            Instructions that load the same number everywhere are not counted.
        source: Triton source, or the call of the library function.
    """

    kind: str
    rows: int
    reduced: int
    loads: dict[str, int]
    source: str

    @property
    def starved(self) -> bool:
        """Whether this is a long reduction on fewer rows than the GPU has multiprocessors."""
        return self.rows < MULTIPROCESSORS and self.reduced > LONG_REDUCTION

    def numbers_loaded(self, argument: str) -> int:
        """Return how many numbers the kernel loads from one of its arguments."""
        return self.rows * self.reduced * self.loads.get(argument, 0)


@dataclass(frozen=True)
class Graph:
    """The kernels of a forward or backward graph, and the shapes of its inputs by name."""

    kernels: list[Kernel]
    inputs: dict[str, tuple[int, ...]]

    def numbers_loaded(self, shape: tuple[int, ...]) -> int:
        """Return how many numbers all kernels load from the inputs of a shape."""
        names = [name for name, size in self.inputs.items() if size == shape]
        return sum(kernel.numbers_loaded(name) for kernel in self.kernels for name in names)


def main(args: argparse.Namespace):
    require_torch()
    lines = ["# Kernels of mixed layers on an H100", "", "`" + " ".join(["python", *sys.argv]) + "`", ""]
    lines += [f"Written by inductor of PyTorch {torch.__version__} on a machine without a GPU. No time was measured."]
    for size, n_basis, groups in itertools.product(args.size, args.n_basis, args.groups):
        out_features, in_features = layer_shape(size, args.layer)
        graphs = mixed_layer_kernels(out_features, in_features, n_basis, groups)
        bases = n_basis, out_features, in_features
        loaded = graphs["forward"].numbers_loaded(bases) / math.prod(bases)
        lines += ["", f"## {args.layer} of {size} [{out_features}, {in_features}], K = {n_basis}, G = {groups}", ""]
        lines += [f"The forward pass loads each number of the bases {loaded:.2f} times.", "", *kernel_table(graphs)]
    print("\n".join(lines))
    if args.out:
        with atomic_write(args.out) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


def require_torch():
    """Raise UserError if the installed PyTorch has other internals than this script uses."""
    if not torch.__version__.startswith(TORCH_VERSION + "."):
        raise UserError(f"this script needs PyTorch {TORCH_VERSION}, but {torch.__version__} is installed")


def layer_shape(size: str, layer: str) -> tuple[int, int]:
    """Return the outputs and the inputs of a mixed layer ("fc1", ...) of a DiT of a size ("B/2", ...)."""
    with torch.device("meta"):
        block = DiT_models[f"DiT-{size}"](input_size=32).blocks[0]
    linear = block.get_submodule(next(name for name in MIXED_LAYERS if name.endswith(layer)))
    return linear.out_features, linear.in_features


def mixed_layer_kernels(
    out_features: int, in_features: int, n_basis: int, groups: int, images: int = IMAGES, tokens: int = TOKENS
) -> dict[str, Graph]:
    """Return the graphs of one mixed layer in bf16 on a GPU: "forward" and "backward"."""
    x = torch.randn(images, tokens, in_features, requires_grad=True)
    alpha = torch.rand(groups, n_basis, requires_grad=True)
    weight = torch.randn(n_basis, out_features, in_features, requires_grad=True)
    bias = torch.randn(n_basis, out_features, requires_grad=True)
    # The tensors are on the CPU, but the implementations for GPUs are traced.
    with mock.patch.object(grouped_linear, "on_cpu", lambda tensor: False):
        return compiled_graphs(grouped_linear.mixed_linear, (x, alpha, weight, bias), torch.bfloat16)


def compiled_graphs(function: Callable, inputs: tuple, autocast: torch.dtype | None = None) -> dict[str, Graph]:
    """Return the kernels of a compiled function and of its backward pass.

    Args:
        function: takes `inputs` and returns one tensor. It must not depend on the device of its inputs.
        inputs: tensors on the CPU. The graphs are executed once on the CPU, without compilation.
        autocast: autocast dtype; None without autocast.

    Returns:
        The graph "forward", and "backward" if the result requires a gradient.
    """
    captured = {}

    def capture(graph, example_inputs, is_backward=False, **options):
        with V.set_fake_mode(torch._guards.detect_fake_mode(example_inputs)):
            lowered = copy.deepcopy(graph)
            post_grad_passes(lowered, is_inference=False)
        captured["backward" if is_backward else "forward"] = lowered
        return make_boxed_func(graph.forward)

    def backend(graph, example_inputs):
        return compile_fx.compile_fx(graph, example_inputs, inner_compile=capture)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = compiled(*inputs)
    if out.requires_grad:
        out.float().sum().backward()
    with assumed_h100():
        return {part: lower(captured[part], part == "backward") for part in ("forward", "backward") if part in captured}


@contextmanager
def assumed_h100() -> Iterator[None]:
    """Let inductor find an H100, whose properties are those in `H100`."""

    class Interface(device_interface.CudaInterface):
        class Worker:
            get_device_properties = staticmethod(lambda device=None: H100)
            current_device = staticmethod(lambda: 0)
            set_device = staticmethod(lambda device: None)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        get_compute_capability = staticmethod(lambda device=None: 90)
        get_device_properties = staticmethod(lambda device=None: H100)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda stream: 0)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    def true(*args, **kwargs) -> bool:
        return True

    cuda = dict(
        get_device_properties=lambda *args, **kwargs: H100,
        get_device_capability=lambda *args, **kwargs: (9, 0),
        get_device_name=lambda *args: H100.name,
        current_device=lambda: 0,
        device_count=lambda: 1,
        is_available=true,
        _lazy_init=lambda: None,
    )
    triton = dict(triton_hash_with_backend=lambda *args, **kwargs: "x", has_triton=true, has_triton_package=true)
    settings = {"compile_threads": 1, "fx_graph_cache": False, "autotune_local_cache": False}
    # This call fills the table of interfaces, which would otherwise overwrite the patched entries later.
    device_interface.get_interface_for_device("cpu")
    with ExitStack() as stack:
        interfaces = {"cuda": Interface, "cuda:0": Interface}
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(triton_checks, **triton))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", true))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        stack.enter_context(config.patch(settings | {"triton.autotune_at_compile_time": False}))
        yield


def lower(module: torch.fx.GraphModule, is_backward: bool) -> Graph:
    """Generate the code of a graph as if its tensors were on a GPU, and return its kernels."""
    nodes = module.graph.nodes
    values = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    mode = torch._guards.detect_fake_mode(values)

    def on_gpu(value):
        if not isinstance(value, torch.Tensor):
            return value
        meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        return fake_tensor.FakeTensor(mode, meta, torch.device("cuda:0"))

    for node in nodes:
        if "val" in node.meta:
            value = node.meta["val"]
            is_sequence = isinstance(value, tuple | list)
            node.meta["val"] = type(value)(map(on_gpu, value)) if is_sequence else on_gpu(value)
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    placeholders = [node for node in nodes if node.op == "placeholder"]
    inputs = [node.meta["val"] for node in placeholders]
    compile_fx.record_original_output_strides(module)
    lowering = GraphLowering(
        module, example_inputs=inputs, shape_env=mode.shape_env, is_inference=False, is_backward=is_backward
    )
    with V.set_fake_mode(mode), V.set_graph_handler(lowering), V.set_debug_handler(mock.MagicMock()):
        lowering.run(*inputs)
        code = lowering.codegen()[0].value
    shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in inputs]
    return Graph(read_kernels(code), dict(zip((node.name for node in placeholders), shapes, strict=True)))


def read_kernels(code: str) -> list[Kernel]:
    """Return the kernels that inductor's generated code calls, in the order of the calls."""
    sources = dict(re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.M | re.S))
    kernels = []
    for line in code.split("def call(")[-1].splitlines():
        if call := re.match(r"\s*(triton_\w+)\.run\((.*)\)", line):
            kernels.append(read_kernel(sources[call[1]], [name.strip() for name in call[2].split(",")]))
        elif call := re.search(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", line):
            kernels.append(Kernel(call[1], 0, 1, {}, line.strip()))
    return kernels


def read_kernel(source: str, arguments: list[str]) -> Kernel:
    """Return a Triton kernel that is called with these arguments."""
    parameters = re.search(r"^def \w+\((.*?)\):", source, re.M)[1].split(", ")
    argument = dict(zip(parameters, arguments, strict=False))
    loads = {}
    for parameter, index in re.findall(r"tl\.load\((\w+) \+ \((.*?)\), ", source):
        # An index without a variable of the row (x) or of the reduction (r) is the same everywhere.
        if re.search(r"\b[xyr]\w*\d", index):
            loads[argument[parameter]] = loads.get(argument[parameter], 0) + 1

    def size(name: str) -> int:
        match = re.search(rf"^\s*{name} = (\d+)$", source, re.M)
        return int(match[1]) if match else 1

    kind = re.search(r"@triton_heuristics\.(\w+)", source)[1].replace("_", " ")
    rows, reduced = size("xnumel") * size("ynumel"), size("r0_numel") * size("r1_numel")
    return Kernel(kind, rows, reduced, loads, source)


def kernel_table(graphs: dict[str, Graph]) -> list[str]:
    """Return the lines of a Markdown table of the kernels."""
    lines = ["| pass | kernel | rows | numbers reduced per row | loads per row and number | |", "|" + " --- |" * 6]
    for part, graph in graphs.items():
        for kernel in graph.kernels:
            mark = "long reduction on too few rows" if kernel.starved else ""
            rows, loads = (f"{kernel.rows:,}", str(sum(kernel.loads.values()))) if kernel.rows else ("", "")
            reduced = f"{kernel.reduced:,}" if kernel.reduced > 1 else ""
            lines.append(f"| {part} | {kernel.kind} | {rows} | {reduced} | {loads} | {mark} |")
    return lines


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    sizes = sorted({name.removeprefix("DiT-") for name in DiT_models})
    parser.add_argument("--size", nargs="+", choices=sizes, default=["B/2"], metavar="SIZE", help="S/2, B/2, XL/2, ...")
    layers = [name.rpartition(".")[2] for name in MIXED_LAYERS]
    parser.add_argument("--layer", choices=layers, default="fc1", help="mixed layer of a block")
    parser.add_argument("--n-basis", type=positive_int, nargs="+", default=[4], metavar="K", help="numbers of bases")
    parser.add_argument(
        "--groups",
        type=int,
        # They divide the number of images.
        choices=[1, 2, 4, 8, 16],
        nargs="+",
        default=[2],
        metavar="G",
        help="numbers of experts per batch on one GPU: 1, 2, 4, 8 or 16",
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write the tables to")
    run_script(main, parser)
