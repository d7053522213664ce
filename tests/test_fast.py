"""The fast paths: as right as the slow ones, compiled once, and without memory that grows with the number of bases."""

import copy

import pytest
import torch
from conftest import relative
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import profile

from diffusion import create_diffusion
from distributed import World
from grouped_linear import batched_linear, grouped_linear
from models import DiT, classifier_free_guidance
from remix import (
    BatchCoefficients,
    FoldedRemixDiT,
    IndependentExperts,
    RemixDiT,
    RemixLinear,
)
from training.batches import BatchSampler, sample_timesteps
from training.trainer import Trainer

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 off: it is another precision than the one whose tolerance is asked."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_float32_matmul_precision(before)


def remix_dit(device: str = "cpu", depth: int = 2, width: int = 32, side: int = 8) -> RemixDiT:
    """Bases, modulation and output drawn at random: every path matters to the result."""
    torch.manual_seed(0)
    dit = DiT(side, 2, 4, width, depth, 2, num_classes=10)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    remix = RemixDiT(dit, n_basis=4, n_experts=20)
    for module in remix.modules():
        if isinstance(module, RemixLinear):
            module.weight.data += 0.1 * torch.randn_like(module.weight)
    return remix.to(device)


def a_batch(step: int = 0, size: int = 8, groups: int = 4, device: str = "cpu", side: int = 8):
    generator = torch.Generator().manual_seed(1)
    t = torch.from_numpy(sample_timesteps(0, step, size, 20, groups))
    x, noise = torch.randn(2, size, 4, side, side, generator=generator)
    y, label_drop = torch.arange(size) % 10, torch.zeros(size, dtype=torch.bool)
    x, noise, t, y, label_drop = (tensor.to(device) for tensor in (x, noise, t, y, label_drop))
    return x, t, {"y": y, "label_drop": label_drop, "groups": groups}, noise


def as_defined(layer: RemixLinear, alpha, x):
    """The sum of the bases' outputs, weighted by the coefficients of the sample's group."""
    weights = alpha.repeat_interleave(len(x) // len(alpha), 0)
    outs = torch.stack([nn.functional.linear(x, w, b) for w, b in zip(layer.weight, layer.bias, strict=True)], 1)
    return (weights[:, :, None, None] * outs).sum(1)


# Right


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_and_its_gradients_are_as_defined(device, dtype, compiled):
    torch.manual_seed(0)
    shared = BatchCoefficients()
    layer = RemixLinear(32, 48, 4, shared).to(device)
    nn.init.normal_(layer.bias)
    alpha, x = torch.randn(2, 4, device=device).softmax(1), torch.randn(6, 5, 32, device=device)
    results = []
    for fast in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (alpha, x)]
        shared.alpha = inputs[0].unsqueeze(0)
        layer.zero_grad()
        if fast:
            run = torch.compile(layer, fullgraph=True) if compiled else layer
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                out = run(inputs[1])
        else:
            out = as_defined(layer, *inputs)
        assert out.dtype == (dtype if fast else torch.float32)
        out.float().square().mean().backward()
        results.append([out.float(), *(tensor.grad for tensor in (*inputs, layer.weight, layer.bias))])
    for fast, slow in zip(*results, strict=True):
        assert fast.isfinite().all() and fast.norm() > 0
        assert relative(fast, slow) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_forms_of_the_product_agree(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 5, 32).to(dtype), torch.randn(3, 48, 32).to(dtype), torch.randn(3, 48).to(dtype)
    assert relative(batched_linear(x, weight, bias), grouped_linear(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_training_in_bf16_and_compiled_follows_fp32(device):
    """Twenty steps: the weights' way, and the loss, stay close to those of the slow path."""
    ways, losses = [], []
    for precision, compiled in (("fp32", False), ("bf16", True)):
        model = remix_dit(device)
        start = copy.deepcopy(model.state_dict())
        world = World(0, 1, torch.device(device))
        trainer = Trainer(model, create_diffusion(), world, lr=1e-3, precision=precision, compile=compiled)
        for step in range(20):
            trainer.step(step, [a_batch(step, device=device)], 1e-4)
        ways.append(torch.cat([(model.state_dict()[key] - start[key]).flatten() for key in start]))
        losses.append(trainer.stats.read()[0]["loss"])
    assert nn.functional.cosine_similarity(*ways, dim=0) > 0.9  # Adam's first steps are signs: rounding turns some
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


# Compiled once


@pytest.mark.parametrize("device", DEVICES)
def test_fifty_steps_with_changing_experts_compile_once(device):
    world = World(0, 1, torch.device(device))
    trainer = Trainer(remix_dit(device), create_diffusion(), world, lr=1e-4, precision="bf16", compile=True)
    met = set()
    for step in range(52):
        batch = a_batch(step, device=device)
        met.add(tuple(trainer.model.expert_index(batch[1]).tolist()))
        trainer.step(step, [batch])
        if step == 1:
            warm = counters["stats"]["unique_graphs"]
    assert len(met) > 10
    assert counters["stats"]["unique_graphs"] == warm == 1
    assert not counters["graph_break"]


def test_each_number_of_groups_is_compiled_for_itself(monkeypatch):
    """The second would otherwise be a symbol, serve the third too, and be slower than either."""
    identity = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: identity(self, backend="aot_eager", **options))
    for groups in (2, 4, 8):
        world = World(0, 1, torch.device("cpu"))
        trainer = Trainer(remix_dit(depth=1), create_diffusion(), world, lr=1e-4, precision="bf16", compile=True)
        trainer.step(0, [a_batch(size=16, groups=groups)])
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["folded", "independent"])
@torch.no_grad()
def test_sampling_compiles_once_for_all_experts(device, kind):
    remix = remix_dit(device).eval()
    model = FoldedRemixDiT(remix)
    if kind == "independent":
        model = IndependentExperts([remix.expert(i) for i in range(20)], list(range(0, 1001, 50)))
    x = torch.randn(4, 4, 8, 8, device=device)
    y = torch.tensor([3, 4, 10, 10], device=device)
    fast = torch.compile(classifier_free_guidance)
    for t in range(975, 0, -50):
        ts = torch.full((4,), t, device=device)
        expected = classifier_free_guidance(lambda x, t, y: remix(x, t, y, groups=1), x, ts, y, 1.5)
        assert relative(fast(model.for_timestep(t), x, ts, y, 1.5, 3), expected) < 1e-4
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# Memory, and waiting


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_mixing_takes_no_memory_times_the_bases(compiled, groups):
    """Beside the bases' gradient nothing is allocated, at any time, that is larger than some mixtures together."""
    n_basis, width = 16, 256
    shared = BatchCoefficients()
    layer = RemixLinear(width, width, n_basis, shared)
    run = torch.compile(layer, fullgraph=True) if compiled else layer

    def train():
        shared.alpha = torch.full((1, groups, n_basis), 1 / n_basis, requires_grad=True)
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x)
        out.float().sum().backward()

    x = torch.randn(groups, 4, width)
    train()
    layer.zero_grad(set_to_none=True)
    with profile(profile_memory=True) as record:
        train()
    used, peak = 0, 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    mixture = 4 * width * width
    assert n_basis * mixture <= peak  # the gradient was seen
    assert peak <= n_basis * mixture + 4 * groups * mixture


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waiting for a device takes one")
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", True)])
def test_a_training_step_does_not_wait_for_the_device(precision, compiled):
    world = World(0, 1, torch.device("cuda"))
    trainer = Trainer(
        remix_dit("cuda"), create_diffusion(), world, lr=1e-4, clip_grad=1.0, precision=precision, compile=compiled
    )
    sampler = BatchSampler(0, 8, world, n_experts=20, experts_per_batch=4)
    batch = torch.randn(8, 4, 8, 8).pin_memory(), torch.zeros(8, dtype=torch.long).pin_memory()

    def step(number: int):
        trainer.step(number, sampler.microbatches(number, batch))
        trainer.stats.longest_streak()

    step(0)
    step(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 6):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
