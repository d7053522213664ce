from dataclasses import replace

import pytest
import torch
from conftest import golden, relative
from torch import nn

from models import DIT, Attention, DiT, DiT_models, Mlp, PatchEmbed, TanhGELU, choose_attention


@pytest.fixture(scope="module")
def published():
    vectors = golden("dit.pt")
    model = DiT(**vectors["config"])
    fresh = model.pos_embed.clone()
    model.load_state_dict(vectors["state_dict"])
    return model.eval(), vectors, fresh


@torch.no_grad()
def test_forward_matches_the_published_implementation(published):
    model, g, _ = published
    assert relative(model(g["x"], g["t"], g["y"]), g["out"]) < 1e-5


@torch.no_grad()
def test_guidance_matches_the_published_implementation(published):
    model, g, _ = published
    cfg = g["cfg"]
    assert relative(model.forward_with_cfg(cfg["x"], cfg["t"], cfg["y"], cfg["scale"]), cfg["out"]) < 1e-5
    all_channels = model.forward_with_cfg(cfg["x"], cfg["t"], cfg["y"], cfg["scale"], guided_channels=4)
    assert relative(all_channels[:, :3], cfg["out"][:, :3]) < 1e-5
    assert relative(all_channels[:, 3], cfg["out"][:, 3]) > 1e-3


def test_positions_match_the_published_implementation(published):
    _, g, fresh = published
    torch.testing.assert_close(fresh, g["state_dict"]["pos_embed"], rtol=0, atol=1e-6)


def test_numbers_of_parameters_and_registry():
    count = sum(p.numel() for p in DiT_models["DiT-S/2"]().parameters())
    assert round(count / 1e6, 2) == 32.96
    assert {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)} < set(DiT_models)


@pytest.mark.parametrize("size", [dict(input_size=8), dict(input_size=8, learn_sigma=False, mlp_ratio=3.3)])
def test_operations_are_those_of_a_forward_pass(size):
    config = DiT_models["DiT-T/2"](**size).config
    assert DIT.count_flops(config) == replace(DIT, flops=None).count_flops(config)


def test_an_untrained_model_predicts_zero():
    model = DiT_models["DiT-T/2"](input_size=8, num_classes=5)
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 4]))
    assert out.shape == (2, 8, 8, 8)
    assert not out.any()


def test_dropped_labels_become_the_null_class(published):
    model, g, _ = published
    x, t, y = g["x"][:2], g["t"][:2], g["y"][:2]
    with torch.no_grad():
        dropped = model(x, t, y, label_drop=torch.tensor([True, False]))
        assert torch.equal(dropped[0], model(x, t, torch.full_like(y, 10))[0])
        assert torch.equal(dropped[1], model(x, t, y)[1])
        embedder = model.y_embedder.train()
        many = embedder(torch.zeros(20_000, dtype=torch.long))
        model.eval()
    share = (many == embedder.embedding_table.weight[10]).all(1).double().mean().item()
    assert abs(share - 0.1) < 0.01


@pytest.mark.parametrize("sizes", [{"input_size": 7}, {"num_heads": 5}])
def test_invalid_sizes(sizes):
    with pytest.raises(ValueError):
        DiT_models["DiT-T/2"](**{"input_size": 8} | sizes)


@pytest.mark.parametrize("layer", ["patches", "fused attention", "attention", "mlp"])
def test_layers_equal_those_of_timm_bit_for_bit(layer):
    import timm.layers
    from timm.layers.attention import Attention as TimmAttention

    def make(build) -> nn.Module:
        torch.manual_seed(0)
        return build()

    def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    torch.manual_seed(1)
    tokens = torch.randn(3, 16, 48)
    if layer == "patches":
        ours = make(lambda: PatchEmbed(8, 2, 4, 48))
        timms = make(lambda: timm.layers.PatchEmbed(8, 2, 4, 48))
        x = torch.randn(3, 4, 8, 8)
    elif layer == "mlp":
        ours = make(lambda: Mlp(48, 100))
        timms = make(lambda: timm.layers.Mlp(48, 100, act_layer=TanhGELU))
        x = tokens
    else:
        ours = make(lambda: Attention(48, 3))
        timms = make(lambda: TimmAttention(48, num_heads=3, qkv_bias=True))
        ours.fused_attn = timms.fused_attn = layer == "fused attention"
        x = tokens
    state, expected = ours.state_dict(), timms.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state), "the same random draws"
    for dtype in (torch.float32, torch.bfloat16):
        results, references = (run(module.to(dtype), x.to(dtype)) for module in (ours, timms))
        assert all(map(torch.equal, results, references)), dtype


@pytest.mark.parametrize("shape", [(4, 16), (6, 6)])
def test_images_of_another_size_are_refused(shape):
    model = DiT_models["DiT-T/2"](input_size=8)
    with pytest.raises(ValueError, match=f"height and width of 8, not {shape[0]} and {shape[1]}"):
        model(torch.zeros(1, 4, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_new_classes_keep_embeddings_by_label():
    dit = DiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    old = dit.y_embedder.embedding_table.weight.clone()
    DIT.reset_classes(dit, 5, {4: 0, 1: 2})
    new = dit.y_embedder.embedding_table.weight
    assert new.shape == (6, 16)
    assert torch.equal(new[[4, 1, 5]], old[[0, 2, 3]]), "two classes and the null class"
    assert not torch.isin(new[[0, 2, 3]], old).any()
    assert dit.config["num_classes"] == 5
    x, t, y = torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.tensor([5])
    assert dit.eval()(x, t, y).shape == (1, 8, 4, 4)


def test_attention_is_fused_except_on_a_cpu():
    model = DiT_models["DiT-T/2"](input_size=8)
    fused = [block.attn.fused_attn for block in model.blocks]
    choose_attention(model, torch.device("cuda"))
    assert [block.attn.fused_attn for block in model.blocks] == fused
    choose_attention(model, torch.device("cpu"))
    assert not any(block.attn.fused_attn for block in model.blocks)
