import copy
import gc
import math
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import DEVICES, GOLDEN, INDUCTOR, ROOT, golden, random_remix_dit, relative
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint import load_model
from diffusion import create_diffusion
from diffusion.intervals import equal_boundaries
from mixing.coefficients import BatchCoefficients
from models import DIT, DiT, DiT_models, classifier_free_guidance
from remix import Remix, RemixDiT, RemixDiT_models, RemixLinear
from sampling.experts import FoldedRemix, IndependentExperts
from training.batches import draw_times

ORIGINAL = GOLDEN / "remix_original_checkpoint.pt"

# Largest relative error of a layer, for each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def pretrained() -> DiT:
    vectors = golden("dit.pt")
    model = DiT(**vectors["config"])
    model.load_state_dict(vectors["state_dict"])
    return model.eval()


@pytest.fixture(params=["softmax-global", "softmax-local", "raw-global", "one-hot-local"])
def remix(request, pretrained) -> RemixDiT:
    """N = 6 experts of K = 4 different bases: K does not divide N, and N does not divide T."""
    mixer, _, scope = request.param.rpartition("-")
    torch.manual_seed(0)
    model = RemixDiT(pretrained, n_basis=4, n_experts=6, mixer=mixer, scope=scope)
    for module in model.modules():
        if isinstance(module, RemixLinear):
            module.weight.data += 0.05 * torch.randn_like(module.weight)
            module.bias.data += 0.05 * torch.randn_like(module.bias)
    return model.eval()


def batch(t: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x, the timesteps t, random labels y."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(t), 4, 8, 8, generator=generator)
    return x, torch.tensor(t), torch.randint(10, (len(t),), generator=generator)


@pytest.mark.parametrize("weights", ["ema", "model"])
@torch.no_grad()
def test_experts_match_the_published_implementation(weights):
    g = golden("remix.pt")
    model, config = load_model(ORIGINAL, ema=weights == "ema", num_heads=4)
    assert config["model"]["remix"] == model.mixing_config
    assert (model.n_basis, model.n_experts, model.mixer) == (g["n_basis"], g["n_experts"], "softmax")
    folded = FoldedRemix(model)
    for i, expert in g["experts"].items():
        for denoise in (model, folded, model.expert(int(i))):
            assert relative(denoise(g["x"], expert["t"], g["y"]), expert[f"out_{weights}"]) < 1e-5
    if weights == "ema":
        torch.testing.assert_close(model.coefficients(), g["alpha_ema"], rtol=1e-6, atol=0)
    else:
        assert math.isclose(model.prior_loss().item(), g["prior_loss"].mean().item(), rel_tol=1e-5)


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_gradients_match_the_published_implementation(groups):
    g, inputs = golden("remix_grads.pt"), golden("remix.pt")
    model, _ = load_model(ORIGINAL, ema=False, num_heads=4)
    loss = model(inputs["x"], g["t"], inputs["y"], groups=groups).square().mean()
    loss.backward()
    assert math.isclose(loss.item(), g["loss"].item(), rel_tol=1e-5)
    for name, gradient in g["grads"].items():
        ours = model.logits if name == "coefficients.weight" else model.backbone.get_parameter(name)
        assert relative(ours.grad, gradient) < 1e-4, name


def test_every_basis_starts_as_the_pretrained_model(pretrained):
    model = RemixDiT(pretrained, n_basis=3, n_experts=7)
    x, t, y = batch([0, 142, 500, 999])
    with torch.no_grad():
        assert relative(model(x, t, y), pretrained(x, t, y)) < 1e-5
    assert pretrained.blocks[0].attn.qkv.weight.shape == (192, 64), "the backbone that is passed in must not change"


@torch.no_grad()
def test_folded_experts_equal_mixed_experts(remix):
    folded = FoldedRemix(remix)
    for i, t in [(0, 0), (0, 165), (1, 166), (3, 500), (5, 999), (2, 333)]:
        assert remix.expert_index(torch.tensor(t)) == i
        x, ts, y = batch([t, t])
        mixed = remix(x, ts, y)
        assert relative(remix.expert(i)(x, ts, y), mixed) < 1e-5
        assert relative(folded(x, ts, y), mixed) < 1e-5
    assert relative(remix.expert(0)(x, ts, y), mixed) > 1e-3, "the experts of this test must be different"
    with pytest.raises(ValueError, match="must belong to one expert"):
        folded(*batch([0, 999]))


def test_changing_the_expert_neither_waits_for_the_device_nor_copies_the_weights(remix):
    # Tensors on the meta device have no numbers: a transfer to the host would be an error.
    folded = FoldedRemix(remix).to("meta")
    new_tensors = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            is_new = not operation.is_view and not operation._schema.is_mutable
            new_tensors.extend(tree_leaves(result) if is_new else [])
            return result

    with Record():
        folded.for_timestep(999)
    assert folded.folded == 5
    assert not new_tensors


@torch.no_grad()
def test_a_batch_of_several_experts_equals_its_samples_one_by_one(remix):
    x, t, y = batch([999, 3, 400, 401, 166, 165, 3])
    one_by_one = torch.cat([remix(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(t))])
    assert relative(remix(x, t, y), one_by_one) < 1e-5


def test_groups_give_the_result_of_no_groups(remix):
    x, t, y = batch([0, 160, 999, 998, 400, 333, 166, 332])
    results = []
    for groups in (None, 4, 8):
        model = copy.deepcopy(remix)
        out = model(x, t, y, groups=groups)
        out.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((out, gradients))
    for out, gradients in results[1:]:
        assert relative(out, results[0][0]) < 1e-5
        for a, b in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="must divide the batch size"):
        remix(x, t, y, groups=3)


@pytest.mark.parametrize(
    "remix",
    [
        "softmax-local",
        "raw-global",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("softmax-global", "one-hot-local")),
    ],
    indirect=True,
)
def test_groups_compile_to_one_graph(remix):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(remix, fullgraph=True, backend="eager")
    for ts in ([1, 2, 900, 901], [500, 501, 3, 4], [340, 341, 700, 701]):
        x, t, y = batch(ts)
        assert relative(compiled(x, t, y, groups=2), remix(x, t, y)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("n_experts", [1, 7, 20, 999, 1000])
def test_every_timestep_belongs_to_one_expert(pretrained, n_experts):
    t = torch.arange(1000)
    owner = RemixDiT(pretrained, 1, n_experts).expert_index(t)
    for i in range(n_experts):
        assert torch.equal(t[owner == i], torch.arange(i * 1000 // n_experts, (i + 1) * 1000 // n_experts))


def test_logits_start_near_the_prior(pretrained):
    model = RemixDiT(pretrained, n_basis=4, n_experts=6)
    assert model.intervals.prior.tolist() == [0, 0, 1, 2, 2, 3]
    for bonus, options in ((8, {}), (3, dict(prior_bonus=3))):
        many = RemixDiT(pretrained, n_basis=4, n_experts=1000, **options)
        preferred = many.logits.gather(1, many.intervals.prior[:, None])
        assert abs(preferred.mean().item() - bonus) < 0.15
        assert abs((many.logits.sum() - preferred.sum()).item() / 3000) < 0.1
    one_hot = RemixDiT(pretrained, n_basis=4, n_experts=6, mixer="one-hot")
    assert one_hot.coefficients().argmax(1).tolist() == [0, 0, 1, 2, 2, 3]
    assert not one_hot.logits.requires_grad


def test_bases_from_scratch_are_drawn_separately_with_the_std_of_a_linear_layer():
    torch.manual_seed(0)
    model = RemixDiT_models["RemixDiT-T/2"](input_size=8, n_basis=3, n_experts=5)
    plain = DiT_models["DiT-T/2"](input_size=8)
    for name in ("attn.qkv", "mlp.fc2"):
        bases, linear = model.backbone.blocks[0].get_submodule(name).weight, plain.blocks[0].get_submodule(name).weight
        assert not torch.equal(bases[0], bases[1])
        for basis in bases:
            assert abs(basis.std() / linear.std() - 1) < 0.05


def test_number_of_parameters():
    model = RemixDiT_models["RemixDiT-S/2"](n_basis=4, n_experts=20)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 96.79


@pytest.mark.parametrize(
    "arguments", [{"n_basis": 0}, {"n_experts": 0}, {"n_experts": 1001}, {"mixer": "max"}, {"scope": "none"}]
)
def test_invalid_arguments(pretrained, arguments):
    with pytest.raises(ValueError):
        RemixDiT(pretrained, **{"n_basis": 2, "n_experts": 4} | arguments)


def test_every_row_of_pi_has_a_gradient_only_if_all_experts_are_in_the_batch(pretrained):
    model = RemixDiT(pretrained, n_basis=4, n_experts=6)
    for module in model.modules():
        if isinstance(module, RemixLinear):
            module.weight.data += 0.05 * torch.randn_like(module.weight)
    for per_batch, dense in ((6, True), (3, False)):
        x, t, y = batch(draw_times(0, 0, 12, create_diffusion(), equal_boundaries(6, 1000), per_batch).tolist())
        model.zero_grad()
        model(x, t, y, groups=per_batch).square().mean().backward()
        assert model.logits.grad.any(1).all().item() == dense


@torch.no_grad()
def test_independent_experts_are_selected_by_timestep(pretrained):
    other = copy.deepcopy(pretrained)
    other.final_layer.linear.bias += 1
    model = IndependentExperts([pretrained, other], [0, 300, 1000])
    for t, expert in ((0, pretrained), (299, pretrained), (300, other), (999, other)):
        x, ts, y = batch([t, t])
        assert torch.equal(model(x, ts, y), expert(x, ts, y))
    with pytest.raises(ValueError, match="must belong to one expert"):
        model(*batch([299, 300]))


@pytest.mark.parametrize("mixer", ["softmax", "one-hot"])
def test_modulation_can_be_mixed(pretrained, mixer):
    model = RemixDiT(pretrained, 3, 6, mixer=mixer, layers=[*DIT.mixed_layers, *DIT.modulation])
    assert model.backbone.blocks[0].adaLN_modulation[1].weight.shape == (3, 384, 64)
    x, t, y = batch([0, 160, 999, 998])
    with torch.no_grad():
        assert relative(model(x, t, y, groups=2), pretrained(x, t, y)) < 1e-5
        assert relative(model.expert(0)(x[:2], t[:2], y[:2]), pretrained(x[:2], t[:2], y[:2])) < 1e-5
    fresh = RemixDiT_models["RemixDiT-T/2"](input_size=8, layers=[*DIT.mixed_layers, *DIT.modulation])
    assert not fresh.backbone.blocks[0].adaLN_modulation[1].weight.any(), "modulation must start at zero (adaLN-Zero)"


def test_distances_match_the_definition(remix):
    bases, spread = remix.distances()
    flat = [m.weight.detach().flatten(1) for m in remix.modules() if isinstance(m, RemixLinear)]
    size = torch.cat(flat, 1).square().sum(1).mean().sqrt()
    expected = torch.cdist(torch.cat(flat, 1), torch.cat(flat, 1)) / size
    torch.testing.assert_close(bases, expected, rtol=1e-4, atol=1e-5)
    experts = [remix.expert(i) for i in range(remix.n_experts)]
    names = [f"{name}.weight" for name, m in remix.backbone.named_modules() if isinstance(m, RemixLinear)]
    weights = torch.stack([torch.cat([e.get_parameter(name).detach().flatten() for name in names]) for e in experts])
    expected = (weights - weights.mean(0)).square().sum(1).mean().sqrt() / size
    torch.testing.assert_close(spread, expected, rtol=1e-3, atol=1e-6)


def test_distances_of_equal_bases_are_zero(pretrained):
    bases, spread = RemixDiT(pretrained, 3, 6).distances()
    assert not bases.any()
    assert spread < 1e-6


def test_one_hot_bases_train_like_independent_models_if_the_shared_parameters_are_frozen(pretrained):
    """K = N, one-hot: training all experts together equals training the mixed layers of one DiT per interval."""
    n, diffusion = 4, create_diffusion()
    together = RemixDiT(pretrained, n, n, mixer="one-hot")
    apart = [copy.deepcopy(pretrained) for _ in range(n)]
    mixed = {f"{name}.{part}" for name, _ in together.mixed() for part in ("weight", "bias")}
    optimizers = []
    for backbone in (together.backbone, *apart):
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in mixed)
        # Without rounding, the gradient of the keys' biases would be zero. AdamW amplifies it with the default eps.
        trained = [p for p in backbone.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(trained, lr=1e-3, eps=1e-6, weight_decay=0))
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        t = torch.from_numpy(draw_times(0, step, 16, diffusion, diffusion.expert_boundaries(n), n))
        x, noise = (torch.randn(16, 4, 8, 8, generator=generator) for _ in range(2))
        y = torch.randint(10, (16,), generator=generator)
        losses = diffusion.training_losses(together, x, t, {"y": y, "groups": n}, noise)["loss"]
        losses.view(n, -1).mean(1).sum().backward()
        for rows in torch.arange(16).view(n, -1):
            model = apart[together.expert_index(t[rows[0]])]
            diffusion.training_losses(model, x[rows], t[rows], {"y": y[rows]}, noise[rows])["loss"].mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for i, model in enumerate(apart):
        assert relative(model.blocks[0].mlp.fc1.weight, pretrained.blocks[0].mlp.fc1.weight) > 1e-2, (
            "training must change the weights"
        )
        for name, value in together.expert(i).state_dict().items():
            assert relative(value, model.state_dict()[name]) < 1e-5 or not value.any(), name


def sum_of_bases(layer: RemixLinear, alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sum the outputs of the bases, weighted by the coefficients [G, K] of the sample's group."""
    weights = alpha.repeat_interleave(len(x) // len(alpha), 0)
    outs = torch.stack([nn.functional.linear(x, w, b) for w, b in zip(layer.weight, layer.bias, strict=True)], 1)
    return (weights[:, :, None, None] * outs).sum(1)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", [None, "aot_eager", INDUCTOR])
def test_a_layer_and_its_gradients_match_the_definition(device, dtype, backend):
    torch.manual_seed(0)
    coefficients = BatchCoefficients()
    layer = RemixLinear(32, 48, 4, coefficients).to(device)
    nn.init.normal_(layer.bias)
    alpha, x = torch.randn(2, 4, device=device).softmax(1), torch.randn(6, 5, 32, device=device)
    results = []
    for fast in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (alpha, x)]
        coefficients.alpha, coefficients.samples = inputs[0].unsqueeze(0), x
        layer.zero_grad()
        if fast:
            run = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                out = run(inputs[1])
        else:
            out = sum_of_bases(layer, *inputs)
        assert out.dtype == (dtype if fast else torch.float32)
        out.float().square().mean().backward()
        results.append([out.float(), *(tensor.grad for tensor in (*inputs, layer.weight, layer.bias))])
    for fast, slow in zip(*results, strict=True):
        assert fast.isfinite().all() and fast.norm() > 0
        assert relative(fast, slow) < TOLERANCE[dtype]


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", [None, INDUCTOR])
@pytest.mark.parametrize("groups", [1, 2])
def test_mixing_takes_no_memory_per_basis(backend, groups):
    """Peak memory is the gradient of the bases plus a few mixtures, whatever K is."""
    n_basis, width = 16, 256
    coefficients = BatchCoefficients()
    layer = RemixLinear(width, width, n_basis, coefficients)
    run = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer

    def train():
        coefficients.alpha = torch.full((1, groups, n_basis), 1 / n_basis, requires_grad=True)
        coefficients.samples = x
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
    assert n_basis * mixture <= peak, "the profile must include the gradient of the bases"
    assert peak <= n_basis * mixture + 4 * groups * mixture


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.parametrize("kind", ["folded", "independent"])
@torch.no_grad()
def test_sampling_compiles_once_for_all_experts(device, backend, kind):
    remix = random_remix_dit(device).eval()
    model = FoldedRemix(remix)
    if kind == "independent":
        model = IndependentExperts([remix.expert(i) for i in range(20)], list(range(0, 1001, 50)))
    x = torch.randn(4, 4, 8, 8, device=device)
    y = torch.tensor([3, 4, 10, 10], device=device)
    fast = torch.compile(classifier_free_guidance, backend=backend)
    for t in range(975, 0, -50):
        ts = torch.full((4,), t, device=device)
        expected = classifier_free_guidance(lambda x, t, y: remix(x, t, y, groups=1), x, ts, y, 1.5)
        assert relative(fast(model.for_timestep(t), x, ts, y, 1.5, 3), expected) < 1e-4
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_boundaries_assign_noise_levels_to_experts(pretrained):
    gaussian = RemixDiT(pretrained, 2, 2, boundaries=[0, 875, 1000])
    assert gaussian.expert_index(torch.tensor([0, 874, 875, 999])).tolist() == [0, 0, 1, 1]
    flow = RemixDiT(pretrained, 2, 4, boundaries=[0, 0.1, 0.5, 0.875, 1])
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    t[:3] = torch.tensor([0.0, 0.5, 1.0])
    experts = flow.expert_index(t)
    assert experts[:3].tolist() == [3, 2, 0], "noise levels are 1 - t"
    assert [flow.expert_index(float(time)) for time in t] == experts.tolist()


def test_steps_on_a_boundary_belong_to_the_expert_above(pretrained):
    """1 - t is rounded: as float32 numbers, 1 - 0.85 is below 0.15."""
    model = RemixDiT(pretrained, 2, 20, boundaries=[i / 20 for i in range(21)])
    levels = np.arange(1, 101)
    t = torch.tensor(1 - levels / 100, dtype=torch.float32)
    expected = np.minimum(levels // 5, 19).tolist()
    assert model.expert_index(t).tolist() == expected
    assert [model.expert_index(float(time)) for time in t] == expected


@pytest.mark.parametrize("boundaries", [[0, 1000], [0, 500, 500, 1000], [10, 500, 700, 1000]])
def test_invalid_boundaries(pretrained, boundaries):
    with pytest.raises(ValueError, match="boundaries"):
        RemixDiT(pretrained, 2, 3, boundaries=boundaries)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("exact_products")
def test_gradients_of_a_model_in_bf16_are_accurate_for_nearly_equal_bases(compiled):
    """The bases are 0.1 % apart. The reference is the same model in float64, on inputs that bf16 can represent."""
    model = random_remix_dit(width=64).eval()
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, RemixLinear):
            for bases in (module.weight, module.bias):
                bases.data = bases.data[:1] + 1e-3 * bases.data[:1].std() * torch.randn_like(bases)
    x, grad = torch.randn(16, 4, 8, 8).bfloat16(), torch.randn(16, 8, 8, 8).bfloat16()
    t = torch.tensor([10, 260, 510, 760]).repeat_interleave(4)
    y = torch.arange(16) % 10
    gradients = []
    for dtype in (torch.float64, torch.float32):
        clone = copy.deepcopy(model).to(dtype)
        if compiled and dtype == torch.float32:
            clone.compile(dynamic=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = clone(x.to(dtype), t, y, groups=4)
        out.backward(grad.to(out.dtype))
        mixed = [layer for layer in clone.modules() if isinstance(layer, RemixLinear)]
        bases = torch.cat([layer.weight.grad.flatten() for layer in mixed])
        gradients.append((clone.logits.grad, bases, torch.cat([layer.bias.grad.flatten() for layer in mixed])))
    for reference, gradient in zip(*gradients, strict=True):
        assert relative(gradient, reference) < 0.02


def test_merged_experts_are_weighted():
    remix = random_remix_dit()
    weights = [0.0] * 20
    weights[3], weights[7] = 1.0, 3.0
    merged, third, seventh = remix.merge(weights), remix.expert(3), remix.expert(7)
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.bias", "final_layer.linear.weight"):
        expected = 0.25 * third.get_parameter(name) + 0.75 * seventh.get_parameter(name)
        torch.testing.assert_close(merged.get_parameter(name), expected)
    with pytest.raises(ValueError, match="20 weights"):
        remix.merge([1.0])


def test_replaced_layers_are_freed_one_by_one_and_nothing_is_drawn_for_copies(monkeypatch):
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    module.forward = lambda x, sigma: nn.Sequential.forward(module, x)
    alive, most = [weakref.ref(layer) for layer in module], []
    build = RemixLinear.from_linear.__func__

    def from_linear(cls, linear, *args):
        state = torch.get_rng_state()
        mixed = build(cls, linear, *args)
        assert torch.equal(torch.get_rng_state(), state)
        most.append(sum(layer() is not None for layer in alive))
        return mixed

    monkeypatch.setattr(RemixLinear, "from_linear", classmethod(from_linear))
    gc.disable()
    try:
        remix = Remix(module, [*"012345"], 3, 2, timestep="sigma", highest_level=1)
    finally:
        gc.enable()
    # The layers to come, the one that is replaced, and the one that the caller of `from_linear` has replaced before.
    assert all(count <= 6 - i + 1 for i, count in enumerate(most))
    assert sum(layer() is not None for layer in alive) <= 1
    assert remix.backbone[0].weight.shape == (3, 8, 8)


PEAK = """
import sys
from pathlib import Path
from torch import nn
from remix import Remix

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(int(sys.argv[1])))

    def forward(self, x, sigma):
        for layer in self.layers:
            x = layer(x)
        return x

rank = int(sys.argv[2]) or None
net = Net()
Path("/proc/self/clear_refs").write_text("5")
remix = Remix(net, ["layers.*"], 4, 4, timestep="sigma", highest_level=1, rank=rank)
print(memory("VmHWM"), memory("VmRSS"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "least"), [(0, 4 * 500), (16, 500)], ids=["whole", "rank 16"])
def test_building_needs_the_memory_of_one_more_layer(rank, least):
    """125 layers of 4 MiB; a mixed layer of whole bases is of 16 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "125", str(rank)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    peak, final = map(float, done.stdout.split())
    assert final > least
    # Allocators may keep some MiB.
    assert peak - final < 16 + 8
