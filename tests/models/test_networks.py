"""LightningDiT and DiT^DH: the networks equal the published ones, and a Remix of each is like one of a DiT.

Their files are tested in tests/interop/.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FEW_SAMPLES, golden, relative, run, training_flags
from torch import nn

from mixing.wrapping import matches
from models import BACKBONES, DiTDH, LightningDiT, build_plain, find_backbone, find_model
from models.lightningdit import LightningDiTBlock, RMSNorm, RotaryEmbedding, SwiGLU, swiglu_size
from remix import RemixDiT, RemixDiT_models, build_remix
from sampling.experts import FoldedRemix

CLASSES = {"lightningdit.pt": LightningDiT, "ditdh.pt": DiTDH}
VECTORS = [
    *(("lightningdit.pt", name) for name in ("xl-vavae", "qknorm", "qknorm-layernorm", "no-shift")),
    *(("lightningdit.pt", name) for name in ("rope-only", "rmsnorm-only", "learn-sigma")),
    *(("ditdh.pt", name) for name in ("dh", "same-width", "layernorm-gelu", "qknorm-no-pos")),
]
# The four layers that are mixed in each block.
GATED, PLAIN = {"attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"}, {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
# A time of each of the four experts of a flow, whose first expert has the least noise.
TIMES = torch.tensor([0.9, 0.7, 0.3, 0.1])
BOUNDARIES = [0, 0.25, 0.5, 0.75, 1]


@pytest.fixture(scope="module")
def published() -> dict:
    """The reference vectors of each file."""
    return {file: golden(file) for file in CLASSES}


def load(published: dict, file: str, name: str) -> tuple[nn.Module, dict]:
    """A published network, and its vectors."""
    g = published[file][name]
    network = CLASSES[file](**g["config"])
    network.load_state_dict(g["state_dict"])
    return network.eval(), g


@pytest.mark.parametrize(("file", "name"), VECTORS)
@torch.no_grad()
def test_networks_and_their_remix_match_the_published_implementation(published, file, name):
    """With and without experts: one expert with one-hot coefficients, whole and low-rank bases, is the network."""
    network, g = load(published, file, name)
    channels = network.in_channels
    # Files of RAE are not read here: its own times are those of the vectors.
    out = network(g["x"], g["t"], g["y"])
    assert out.shape[1] == channels * (2 if name == "learn-sigma" else 1)
    assert relative(out[:, :channels], g["out"]) < 1e-5
    # Guidance of the first three channels with an interval, or of all channels, without an interval.
    cfg = g["cfg"][0]
    guided = 3 if file == "lightningdit.pt" else channels
    twice = network.forward_with_cfg(cfg["x"], cfg["t"], cfg["y"], cfg["scale"], guided_channels=guided)
    assert relative(twice[:, :channels], cfg["out"]) < 1e-5
    for options in ({}, {"rank": 2}):
        one = RemixDiT(network, n_basis=1, n_experts=1, mixer="one-hot", boundaries=[0, 1], **options)
        for remix in (one, one.expert(0)):
            assert (
                torch.equal(remix(g["x"], g["t"], g["y"]), out) or relative(remix(g["x"], g["t"], g["y"]), out) < 1e-6
            )
    layers = {layer.split(".", 2)[2] for layer, _ in one.mixed()}
    assert layers == (GATED if network.config["use_swiglu"] else PLAIN)
    assert len(one.mixed()) == 4 * len(network.blocks)


@pytest.mark.parametrize(("file", "name"), VECTORS)
def test_fresh_tables_are_those_of_the_published_files(published, file, name):
    g = published[file][name]
    fresh = CLASSES[file](**g["config"]).state_dict()
    assert fresh.keys() == g["state_dict"].keys()
    for key, value in fresh.items():
        if "rope" in key or key == "pos_embed":
            torch.testing.assert_close(value, g["state_dict"][key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["rmsnorm", "swiglu", "rotary"])
def test_layers_equal_those_of_timm(layer):
    import timm.layers

    torch.manual_seed(0)
    x = torch.randn(3, 16, 48)
    if layer == "rmsnorm":
        ours, timms = RMSNorm(48), timm.layers.RmsNorm(48, eps=1e-6)
        nn.init.normal_(ours.weight)
    elif layer == "swiglu":
        # timm's SwiGLU has the two halves in separate layers, its packed one the other way round.
        ours, timms = SwiGLU(48, swiglu_size(192)), timm.layers.SwiGLU(48, swiglu_size(192))
        (a, b), (c, d) = ours.w12.weight.chunk(2), ours.w12.bias.chunk(2)
        state = {"fc1_g.weight": a, "fc1_x.weight": b, "fc1_g.bias": c, "fc1_x.bias": d}
        timms.load_state_dict(state | {"fc2.weight": ours.w3.weight, "fc2.bias": ours.w3.bias})
    else:
        # That of EVA: the frequencies of the pixel grid, y before x, with interleaved pairs.
        ours = RotaryEmbedding(16, 4)
        sin, cos = timm.layers.build_rotary_pos_embed([4, 4], dim=16, temperature=10000.0, in_pixels=False)
        x = torch.randn(3, 2, 16, 16)
        expected = timm.layers.apply_rot_embed(x, sin, cos)
        assert relative(ours(x), expected) < 1e-6
        return
    if layer == "rmsnorm":
        timms.load_state_dict(ours.state_dict())
    assert relative(ours(x), timms(x)) < 1e-6
    low = ours.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert relative(low.float(), timms(x)) < 1e-2


# Tiny models of each family: with published options, with a plain MLP and normalized queries, and with a head.
FAMILIES = {
    "LightningDiT": ("LightningDiT-T/1", dict(depth=1)),
    "other options": ("LightningDiT-T/2", dict(depth=1, use_swiglu=False, use_qknorm=True, wo_shift=True)),
    "DiTDH": ("DiTDH-T/1", dict(depth=[1, 1])),
}


def random_remix(family: str, **options) -> RemixDiT:
    """K = 2 bases and N = 4 experts of a flow, with weights that make them different."""
    name, shape = FAMILIES[family]
    torch.manual_seed(0)
    plain = build_plain(name, input_size=4, in_channels=3, num_classes=5, **shape)
    for parameter in plain.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    remix = RemixDiT(plain, n_basis=2, n_experts=4, boundaries=BOUNDARIES, **options)
    for _, layer in remix.mixed():
        for basis in layer.bases():
            basis.data += 0.1 * torch.randn_like(basis)
    return remix.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch with a sample of each expert."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 4, 4, generator=generator), TIMES, torch.tensor([0, 1, 4, 5])


@pytest.mark.parametrize("options", [{"mixer": "raw"}, {"rank": 2}, {"scope": "local"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_and_grouped_experts_equal_mixed_ones(family, options):
    """With the modulation layers mixed too, and with the gradients of groups."""
    record = find_backbone(random_remix(family).backbone)
    remix = random_remix(family, layers=[*record.mixed_layers, *record.modulation], **options)
    assert sum(matches(name, record.modulation) for name, _ in remix.mixed()) == len(remix.backbone.blocks)
    x, t, y = inputs()
    gradients = []
    for groups in (None, 4):
        remix.zero_grad()
        out = remix(x, t, y, groups=groups)
        out.square().mean().backward()
        gradients.append([p.grad for p in remix.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        assert relative(first, second) < 1e-3
    folded = FoldedRemix(remix)
    with torch.no_grad():
        assert relative(remix(x, t, y), out) < 1e-5
        for i, sample in enumerate(zip(x.split(1), t.split(1), y.split(1), strict=True)):
            assert remix.expert_index(t[i]) == i
            assert relative(folded(*sample), out[i : i + 1]) < 1e-5
            assert relative(remix.expert(i)(*sample), out[i : i + 1]) < 1e-5
        assert relative(remix.expert(0)(*sample), out[i : i + 1]) > 1e-3, "the experts must be different"
    assert type(remix.expert(0)) is record.module


@pytest.mark.parametrize("family", ["LightningDiT", pytest.param("DiTDH", marks=pytest.mark.slow)])
def test_groups_compile_to_one_graph(family):
    remix = random_remix(family)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(remix, fullgraph=True, backend="eager")
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        x, t, y = (value[order] for value in inputs())
        assert relative(compiled(x, t, y, groups=4), remix(x, t, y)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["LightningDiT-T/2", "RemixDiTDH-T/1"])
def test_it_is_trained_scored_and_sampled(features, tmp_path, model):
    """With pictures, held-out losses, recomputed activations, a dry run and a resumed run."""
    flags = [*training_flags(features, tmp_path, "run", model), "--process=flow", "--ckpt-every=2", "--sample-every=2"]
    assert f"{model}: " in run("train_fast.py", *flags, "--dry-run").stdout
    flags += ["--score-every=2", f"--held-out={features}", "--checkpoint-activations"]
    run("train_fast.py", *flags, "--max-steps=4")
    last = tmp_path / "run/checkpoints/0000004.pt"
    whole = torch.load(last, weights_only=True)
    last.unlink()
    (tmp_path / "run/metrics.jsonl").unlink()
    run("train_fast.py", *flags, "--max-steps=4", "--resume=auto")
    resumed = torch.load(last, weights_only=True)
    for part in ("model", "ema"):
        assert all(torch.equal(value, resumed[part][key]) for key, value in whole[part].items())
    flags = (f"--sample-dir={tmp_path}", "--name=out", "--sampler=euler", *FEW_SAMPLES)
    run("sample_ddp.py", "--ckpt", last, *flags)
    with np.load(tmp_path / "out/samples.npz") as samples:
        assert samples["arr_0"].shape == (14, 8, 8, 3)


@pytest.mark.parametrize("name", ["LightningDiT-T/2", "DiTDH-T/1"])
def test_an_untrained_model_predicts_zero_and_drops_labels(name):
    model = build_plain(name, input_size=4, in_channels=3, num_classes=5)
    x, t, y = inputs()
    assert not model(x, t, y).any()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    for block in (*model.blocks, model.final_layer):
        torch.nn.init.normal_(block.adaLN_modulation[1].weight)
    model.eval()
    dropped = model(x, t, y, label_drop=torch.tensor([True, False, False, False]))
    null = y.clone()
    null[0] = 5
    assert torch.equal(dropped, model(x, t, null))
    assert not torch.equal(dropped[0], model(x, t, y)[0])


def test_names_and_sizes():
    for size, (width, depth, heads) in {
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "XL": (1152, 28, 16),
        "1p0B": (1536, 24, 24),
        "1p6B": (1792, 28, 28),
    }.items():
        for patch in (1, 2):
            arguments = find_model(f"RemixLightningDiT-{size}/{patch}").backbone.sizes[f"{size}/{patch}"]
            shape = dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
            assert shape.items() <= arguments.items()
    assert find_model("RemixDiTDH-XL/1").with_experts
    assert {"RemixDiT-S/2", "RemixLightningDiT-XL/1", "RemixDiTDH-XL/1"} < RemixDiT_models.keys()
    record = BACKBONES["LightningDiT"]
    config = build_plain("LightningDiT-T/1", use_qknorm=True).config
    assert record.find_size(config) == "T/1", "the options of a file do not change its size"


@pytest.mark.parametrize(
    ("name", "options"),
    [("LightningDiT-T/2", {}), ("LightningDiT-T/1", dict(use_swiglu=False, wo_shift=True, learn_sigma=True))]
    + [("DiTDH-T/1", {}), ("DiTDH-T/1", dict(hidden_size=[48, 48], num_heads=[3, 3]))],
)
def test_operations_are_those_of_a_forward_pass(name, options):
    model = build_plain(name, input_size=4, **options)
    record = find_backbone(model)
    assert record.count_flops(model.config) == replace(record, flops=None).count_flops(model.config)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LightningDiT-T/2", {"input_size": 5}, "patch_size must divide"),
        ("LightningDiT-T/1", {"num_heads": 5}, "by num_heads=5"),
        ("LightningDiT-T/1", {"num_heads": 8}, "divisible by 4 for rotary embeddings, but it is 6"),
        ("DiTDH-T/1", {"depth": 3}, "depth must have two values, for the encoder and the head, but it is 3"),
    ],
)
def test_invalid_sizes(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_plain(name, **options)


def test_bases_from_scratch_are_drawn_separately():
    remix = build_remix("RemixDiTDH-T/1", input_size=4, in_channels=3, num_classes=5, n_basis=2, n_experts=4)
    block = remix.backbone.blocks[-1]
    assert isinstance(block, LightningDiTBlock)
    assert not torch.equal(*block.mlp.w12.weight)
