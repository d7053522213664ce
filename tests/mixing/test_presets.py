"""The presets of transformers of diffusers: names of layers, direction of the times, and experts of tiny models."""

import importlib
import re

import pytest
import torch
from conftest import ROOT, relative
from torch import nn

from interop.expert_folder import find_expert, write_experts
from mixing.presets import PRESETS, Preset, preset_table
from remix import Remix

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
SIDE, TEXT = 4, 5


def image(n: int, channels: int = 4) -> dict:
    return dict(hidden_states=torch.randn(n, channels, SIDE, SIDE))


def text(n: int, width: int = 16) -> dict:
    return dict(encoder_hidden_states=torch.randn(n, TEXT, width))


def tokens(n: int, width: int) -> dict:
    return dict(hidden_states=torch.randn(n, SIDE * SIDE, width))


def positions(axes: int) -> dict:
    grid = torch.arange(SIDE * SIDE * float(axes)).view(-1, axes) % SIDE
    return dict(img_ids=grid, txt_ids=torch.zeros(TEXT, axes))


def video(n: int, channels: int = 4) -> dict:
    return dict(hidden_states=torch.randn(n, channels, 2, SIDE, SIDE))


def mask(n: int, **_) -> dict:
    return dict(encoder_attention_mask=torch.ones(n, TEXT, dtype=torch.bool))


# name: (arguments of the class, arguments of a call with n samples)
TINY = {
    "ChromaTransformer2DModel": (
        dict(**HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16)
        | dict(
            axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
        ),
        lambda n: tokens(n, 16) | text(n) | positions(3),
    ),
    "Flux2Transformer2DModel": (
        dict(**HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16)
        | dict(axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16),
        lambda n: tokens(n, 16) | text(n) | positions(4) | dict(guidance=torch.rand(n)),
    ),
    "QwenImageTransformer2DModel": (
        dict(**HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8)),
        lambda n: (
            tokens(n, 16)
            | text(n)
            | dict(img_shapes=[[(1, SIDE, SIDE)]] * n, encoder_hidden_states_mask=torch.ones(n, TEXT, dtype=torch.long))
        ),
    ),
    "AuraFlowTransformer2DModel": (
        dict(**HEADS, sample_size=SIDE, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16)
        | dict(caption_projection_dim=32, pos_embed_max_size=16),
        lambda n: image(n) | text(n),
    ),
    "Lumina2Transformer2DModel": (
        dict(sample_size=SIDE, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, cap_feat_dim=16)
        | dict(num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(32, 16, 16)),
        lambda n: image(n) | text(n) | mask(n),
    ),
    "ZImageTransformer2DModel": (
        dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16)
        | dict(axes_dims=[4, 4, 8], axes_lens=[64, 32, 32]),
        lambda n: dict(x=[*torch.randn(n, 4, 1, SIDE, SIDE)], cap_feats=[*torch.randn(n, TEXT, 16)]),
    ),
    "HunyuanVideoTransformer3DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1)
        | dict(text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 8)),
        lambda n: (
            video(n) | text(n) | mask(n) | dict(pooled_projections=torch.randn(n, 8), guidance=torch.full((n,), 1000.0))
        ),
    ),
    "MochiTransformer3DModel": (
        dict(**HEADS, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4)
        | dict(max_sequence_length=TEXT),
        lambda n: video(n) | text(n) | mask(n),
    ),
    "LTXVideoTransformer3DModel": (
        dict(**HEADS, in_channels=16, out_channels=16, cross_attention_dim=32, num_layers=2, caption_channels=16),
        lambda n: tokens(n, 16) | text(n) | mask(n) | dict(num_frames=1, height=SIDE, width=SIDE),
    ),
    "CogVideoXTransformer3DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=16, num_layers=2)
        | dict(sample_width=SIDE, sample_height=SIDE, sample_frames=5, max_text_seq_length=TEXT),
        lambda n: dict(hidden_states=torch.randn(n, 2, 4, SIDE, SIDE)) | text(n),
    ),
    "CogView4Transformer2DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=16, time_embed_dim=8)
        | dict(condition_dim=4, pos_embed_max_size=8, sample_size=SIDE, rope_axes_dim=(8, 8)),
        lambda n: (
            image(n)
            | text(n)
            | {name: torch.full((n, 2), 4.0) for name in ("original_size", "target_size", "crop_coords")}
        ),
    ),
    "SanaTransformer2DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, sample_size=SIDE)
        | dict(cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16),
        lambda n: image(n) | text(n),
    ),
}
# QwenImage computes a text in its last block that it does not use.
TEXT_OF_QWEN = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
UNUSED = {f"transformer_blocks.1.{name}" for name in TEXT_OF_QWEN}
LEVELS, EXPERTS = torch.tensor([0.1, 0.9, 0.3, 0.95]), [0, 3, 1, 3]


def one(value, i: int, n: int = 4):
    if isinstance(value, torch.Tensor):
        return value[i : i + 1] if len(value) == n else value
    return value[i : i + 1] if isinstance(value, list) and len(value) == n else value


def make(name: str, **options) -> tuple[Remix, dict]:
    """A Remix with random bases, and the arguments of four samples of three experts."""
    settings, arguments = TINY[name]
    torch.manual_seed(0)
    module = getattr(importlib.import_module("diffusers"), name)(**settings).eval()
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    remix = Remix(module, n_experts=4, **options)
    with torch.no_grad():
        for _, layer in remix.mixed():
            for basis in layer.bases():
                basis += 0.1 * torch.randn_like(basis)
    preset = PRESETS[name]
    levels = 1 - LEVELS if preset.reverses else LEVELS
    return remix, arguments(4) | {preset.timestep: levels * preset.highest_level}


def result(output) -> torch.Tensor:
    output = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(output)) if isinstance(output, list | tuple) else output


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_experts_of_every_class(name):
    """Mixed batches equal folded experts and groups, for both kinds of bases; gradients, also with checkpointing."""
    for options in ({}, {"rank": 2}):
        remix, arguments = make(name, **options)
        blocks = r"((joint_|single_)?(transformer_)?blocks|layers|noise_refiner)"
        inside = re.compile(blocks + r"\.\d+\.(?!.*(norm|mod|adaLN))")
        linears = {n for n, m in remix.backbone.named_modules() if isinstance(m, nn.Linear) and inside.match(n)}
        assert not {n for n in linears if not n.endswith(".linear")}, "every linear of attention and MLP is mixed"
        assert remix.expert_index(remix.times(**arguments)).tolist() == EXPERTS
        with torch.no_grad():
            mixed = result(remix(**arguments))
            grouped = result(remix(**arguments, groups=4))
            alone = []
            for i, expert in enumerate(EXPERTS):
                alone.append(result(remix.expert(expert)(**{key: one(v, i) for key, v in arguments.items()})))
        alone = torch.cat(alone)
        assert relative(mixed, alone) < 1e-4
        assert relative(grouped, alone) < 1e-4
        assert relative(result(remix.expert(0)(**arguments)).detach(), alone) > 1e-3, "the experts differ"
        expected = gradients(remix, arguments)
        if remix._supports_gradient_checkpointing:
            remix.enable_gradient_checkpointing()
            for ours, theirs in zip(gradients(remix, arguments), expected, strict=True):
                assert relative(ours, theirs) < 1e-4 or not theirs.any()


def gradients(remix: Remix, arguments: dict) -> list[torch.Tensor]:
    remix.train().zero_grad()
    result(remix(**arguments, groups=4)).square().sum().backward()
    assert remix.logits.grad.any()
    bases = [basis.grad for name, layer in remix.mixed() if name not in UNUSED for basis in layer.bases()]
    return [grad.clone() for grad in [remix.logits.grad, *bases]]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(1, 1)})])

    def forward(self, x, t):
        return self.layers[0]["a"](x)


@torch.no_grad()
def test_expert_0_gets_the_least_noise_where_times_are_highest_for_data(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "Denoiser", Preset(["layers.*.a"], timestep="t", highest_level=1, reverses=True))
    remix = Remix(Denoiser(), n_basis=4, n_experts=4, mixer="one-hot")
    remix.backbone.layers[0]["a"].weight.zero_()
    remix.backbone.layers[0]["a"].bias.copy_(torch.arange(4.0)[:, None])
    write_experts(remix, tmp_path)
    x = torch.zeros(5, 1)
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.tensor([1, 0.8, 0.75, 0.3, 0], dtype=dtype)
        assert remix(x, t)[:, 0].tolist() == [0, 0, 1, 2, 3]
        assert [find_expert(tmp_path, level) for level in t] == [f"expert{i}.safetensors" for i in (0, 0, 1, 2, 3)]
    # Of several times, the one of the most noise selects the expert.
    assert remix(x[:1], torch.tensor([[1, 0.1]]))[0].item() == 3
    # Whoever gives a function says which level it returns.
    assert Remix(Denoiser(), n_experts=4, timestep=lambda x, t: t).expert_index(0.9) == 3


def test_a_class_with_another_signature_than_its_preset_is_refused(monkeypatch):
    monkeypatch.setitem(PRESETS, "Denoiser", Preset(["layers.*.a"], timestep="timestep"))
    with pytest.raises(ValueError, match="the preset of a Denoiser does not fit this version of it, which has no"):
        Remix(Denoiser(), n_experts=4)


def test_the_documentation_lists_the_presets():
    page = (ROOT / "docs" / "any-transformer.md").read_text()
    assert "\n".join(preset_table()) in page
    # The page says that these are tested, here and in test_any_transformer.py.
    from test_any_transformer import KINDS

    elsewhere = {type(build()).__name__ for build, *_ in KINDS.values()}
    assert {*TINY} | elsewhere == {*PRESETS}


WAN = dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40)
LARGE = {
    "FLUX.1": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "FLUX.2": ("Flux2Transformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Wan 14B": ("WanTransformer3DModel", WAN),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_memory_of_large_models_is_that_of_their_numbers(name):
    page = (ROOT / "docs" / "large-models.md").read_text()
    kind, settings = LARGE[name]
    with torch.device("meta"):
        module = getattr(importlib.import_module("diffusers"), kind)(**settings)
        total = sum(p.numel() for p in module.parameters()) / 1e9
        remix = Remix(module, n_basis=4, n_experts=4, rank=16)
    mixed = sum(layer.weight.numel() for _, layer in remix.mixed()) / 1e9
    pairs = sum(basis.numel() for _, layer in remix.mixed() for basis in layer.bases()) / 1e9
    for text, memory, divided in (
        ("rank 16, base in bf16", 2 * total + 16 * pairs, True),
        ("rank 16, base in int8", 1.01 * mixed + 2 * (total - mixed) + 16 * pairs, False),
        ("4 whole bases", 4 * 16 * mixed + 2 * (total - mixed), True),
    ):
        numbers = [f"{memory / (n if divided else 1):,.0f}" for n in (1, 2, 8)]
        assert f"| {name}, {text} | {total:.1f} | {mixed:.1f} | {' | '.join(numbers)} |" in page
