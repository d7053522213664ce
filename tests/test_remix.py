import copy
import math

import pytest
import torch
from conftest import GOLDEN, golden, relative

from checkpoint import load_model
from diffusion import create_diffusion
from models import DiT, DiT_models
from remix import (
    MIXED_LAYERS,
    MODULATION,
    FoldedRemixDiT,
    IndependentExperts,
    RemixDiT,
    RemixDiT_models,
    RemixLinear,
)
from training.batches import sample_timesteps

ORIGINAL = GOLDEN / "remix_original_checkpoint.pt"


@pytest.fixture(scope="module")
def pretrained() -> DiT:
    vectors = golden("dit.pt")
    model = DiT(**vectors["config"])
    model.load_state_dict(vectors["state_dict"])
    return model.eval()


@pytest.fixture(params=["softmax-global", "softmax-local", "raw-global", "one-hot-local"])
def remix(request, pretrained) -> RemixDiT:
    """Six experts of four bases that differ: neither K divides N nor N divides T."""
    mixer, _, scope = request.param.rpartition("-")
    torch.manual_seed(0)
    model = RemixDiT(pretrained, n_basis=4, n_experts=6, mixer=mixer, scope=scope)
    for module in model.modules():
        if isinstance(module, RemixLinear):
            module.weight.data += 0.05 * torch.randn_like(module.weight)
            module.bias.data += 0.05 * torch.randn_like(module.bias)
    return model.eval()


def batch(t: list[int]):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(t), 4, 8, 8, generator=generator)
    return x, torch.tensor(t), torch.randint(10, (len(t),), generator=generator)


# The published implementation


@pytest.mark.parametrize("weights", ["ema", "model"])
@torch.no_grad()
def test_experts_are_the_published_ones(weights):
    g = golden("remix.pt")
    model, config = load_model(ORIGINAL, ema=weights == "ema", num_heads=4)
    assert config["model"]["remix"] == {"n_basis": g["n_basis"], "n_experts": g["n_experts"]}
    folded = FoldedRemixDiT(model)
    for i, expert in g["experts"].items():
        for denoise in (model, folded, model.expert(int(i))):
            assert relative(denoise(g["x"], expert["t"], g["y"]), expert[f"out_{weights}"]) < 1e-5
    if weights == "ema":
        torch.testing.assert_close(model.coefficients(), g["alpha_ema"], rtol=1e-6, atol=0)
    else:
        assert math.isclose(model.prior_loss().item(), g["prior_loss"].mean().item(), rel_tol=1e-5)


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_gradients_are_the_published_ones(groups):
    g, inputs = golden("remix_grads.pt"), golden("remix.pt")
    model, _ = load_model(ORIGINAL, ema=False, num_heads=4)
    loss = model(inputs["x"], g["t"], inputs["y"], groups=groups).square().mean()
    loss.backward()
    assert math.isclose(loss.item(), g["loss"].item(), rel_tol=1e-5)
    for name, gradient in g["grads"].items():
        ours = model.logits if name == "coefficients.weight" else model.backbone.get_parameter(name)
        assert relative(ours.grad, gradient) < 1e-4, name


# Properties


def test_every_basis_starts_as_the_pretrained_model(pretrained):
    model = RemixDiT(pretrained, n_basis=3, n_experts=7)
    x, t, y = batch([0, 142, 500, 999])
    with torch.no_grad():
        assert relative(model(x, t, y), pretrained(x, t, y)) < 1e-5
    assert pretrained.blocks[0].attn.qkv.weight.shape == (192, 64), "the backbone passed in must stay as it was"


@torch.no_grad()
def test_folded_equals_mixed(remix):
    folded = FoldedRemixDiT(remix)
    for i, t in [(0, 0), (0, 165), (1, 166), (3, 500), (5, 999), (2, 333)]:
        assert remix.expert_index(torch.tensor(t)) == i
        x, ts, y = batch([t, t])
        mixed = remix(x, ts, y)
        assert relative(remix.expert(i)(x, ts, y), mixed) < 1e-5
        assert relative(folded(x, ts, y), mixed) < 1e-5
    assert relative(remix.expert(0)(x, ts, y), mixed) > 1e-3, "the experts of this test must differ"
    with pytest.raises(ValueError, match="one expert at a time"):
        folded(*batch([0, 999]))


@torch.no_grad()
def test_mixed_batch_equals_its_samples(remix):
    x, t, y = batch([999, 3, 400, 401, 166, 165, 3])
    one_by_one = torch.cat([remix(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(t))])
    assert relative(remix(x, t, y), one_by_one) < 1e-5


def test_groups_equal_the_general_path(remix):
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
    with pytest.raises(ValueError, match="do not divide"):
        remix(x, t, y, groups=3)


def test_groups_compile_to_one_graph(remix):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(remix, fullgraph=True, backend="aot_eager")
    for ts in ([1, 2, 900, 901], [500, 501, 3, 4], [340, 341, 700, 701]):
        x, t, y = batch(ts)
        assert relative(compiled(x, t, y, groups=2), remix(x, t, y)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("n_experts", [1, 3, 6, 7, 20, 999, 1000])
def test_intervals_tile_the_timesteps(pretrained, n_experts):
    t = torch.arange(1000)
    owner = RemixDiT(pretrained, 1, n_experts).expert_index(t)
    for i in range(n_experts):
        assert torch.equal(t[owner == i], torch.arange(i * 1000 // n_experts, (i + 1) * 1000 // n_experts))


def test_prior(pretrained):
    model = RemixDiT(pretrained, n_basis=4, n_experts=6)
    assert model.prior.tolist() == [0, 0, 1, 2, 2, 3]
    many = RemixDiT(pretrained, n_basis=4, n_experts=1000)
    preferred = many.logits.gather(1, many.prior[:, None])
    assert abs(preferred.mean().item() - 3) < 0.15
    assert abs((many.logits.sum() - preferred.sum()).item() / 3000) < 0.1
    one_hot = RemixDiT(pretrained, n_basis=4, n_experts=6, mixer="one-hot")
    assert one_hot.coefficients().argmax(1).tolist() == [0, 0, 1, 2, 2, 3]
    assert not one_hot.logits.requires_grad


def test_bases_from_scratch_are_drawn_separately_at_a_linear_layers_scale():
    torch.manual_seed(0)
    model = RemixDiT_models["RemixDiT-T/2"](input_size=8, n_basis=3, n_experts=5)
    plain = DiT_models["DiT-T/2"](input_size=8)
    for name in ("attn.qkv", "mlp.fc2"):
        bases, linear = model.backbone.blocks[0].get_submodule(name).weight, plain.blocks[0].get_submodule(name).weight
        assert not torch.equal(bases[0], bases[1])
        for basis in bases:
            assert abs(basis.std() / linear.std() - 1) < 0.05


def test_size():
    model = RemixDiT_models["RemixDiT-S/2"](n_basis=4, n_experts=20)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 96.79


@pytest.mark.parametrize(
    "wrong", [{"n_basis": 0}, {"n_experts": 0}, {"n_experts": 1001}, {"mixer": "max"}, {"scope": "none"}]
)
def test_what_cannot_be(pretrained, wrong):
    with pytest.raises(ValueError):
        RemixDiT(pretrained, **{"n_basis": 2, "n_experts": 4} | wrong)


def test_gradient_of_pi_is_dense_with_all_experts_in_a_batch(pretrained):
    model = RemixDiT(pretrained, n_basis=4, n_experts=6)
    for module in model.modules():
        if isinstance(module, RemixLinear):
            module.weight.data += 0.05 * torch.randn_like(module.weight)
    for per_batch, dense in ((6, True), (3, False)):
        x, t, y = batch(sample_timesteps(0, 0, 12, 6, per_batch).tolist())
        model.zero_grad()
        model(x, t, y, groups=per_batch).square().mean().backward()
        assert model.logits.grad.any(1).all().item() == dense


@torch.no_grad()
def test_independent_experts_are_dealt_over_the_timesteps(pretrained):
    other = copy.deepcopy(pretrained)
    other.final_layer.linear.bias += 1
    model = IndependentExperts([pretrained, other], [0, 300, 1000])
    for t, expert in ((0, pretrained), (299, pretrained), (300, other), (999, other)):
        x, ts, y = batch([t, t])
        assert torch.equal(model(x, ts, y), expert(x, ts, y))
    with pytest.raises(ValueError, match="one expert at a time"):
        model(*batch([299, 300]))


@pytest.mark.parametrize("mixer", ["softmax", "one-hot"])
def test_modulation_may_be_mixed_too(pretrained, mixer):
    model = RemixDiT(pretrained, 3, 6, mixer=mixer, mixed_layers=(*MIXED_LAYERS, MODULATION))
    assert model.backbone.blocks[0].adaLN_modulation[1].weight.shape == (3, 384, 64)
    x, t, y = batch([0, 160, 999, 998])
    with torch.no_grad():
        assert relative(model(x, t, y, groups=2), pretrained(x, t, y)) < 1e-5
        assert relative(model.expert(0)(x[:2], t[:2], y[:2]), pretrained(x[:2], t[:2], y[:2])) < 1e-5
    fresh = RemixDiT_models["RemixDiT-T/2"](input_size=8, mixed_layers=(*MIXED_LAYERS, MODULATION))
    assert not fresh.backbone.blocks[0].adaLN_modulation[1].weight.any(), "adaLN-Zero"


def test_distances_by_the_definition(remix):
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


def test_distances_of_a_collapse(pretrained):
    bases, spread = RemixDiT(pretrained, 3, 6).distances()
    assert not bases.any()
    assert spread < 1e-6


def test_one_hot_bases_with_shared_parts_frozen_are_independent_models(pretrained):
    """K = N, one-hot: training all experts at once equals training each DiT's mixed layers on its interval alone."""
    n, diffusion = 4, create_diffusion()
    together = RemixDiT(pretrained, n, n, mixer="one-hot")
    apart = [copy.deepcopy(pretrained) for _ in range(n)]
    mixed = {f"{name}.{part}" for name, _ in together._mixed() for part in ("weight", "bias")}
    optimizers = []
    for backbone in (together.backbone, *apart):
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in mixed)
        optimizers.append(
            torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
        )
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        t = torch.from_numpy(sample_timesteps(0, step, 16, n, n))
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
            "something was learned"
        )
        for name, value in together.expert(i).state_dict().items():
            assert relative(value, model.state_dict()[name]) < 1e-5 or not value.any(), name
