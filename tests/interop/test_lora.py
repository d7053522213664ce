"""LoRA files of a Remix: the names that their readers expect, the rank, the means of stages, and reading a file."""

import copy
import json
import math
import re

import diffusers
import pytest
import torch
from conftest import relative
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from interop.lora import (
    FORMATS,
    PREFIXES,
    Reduction,
    lora_state,
    mixture_pairs,
    read_lora,
    reduce_rank,
    write_stage_loras,
)
from interop.wan import diffusers_name
from mixing.presets import PRESETS
from remix import Remix
from runtime.errors import UserError
from sampling.experts import FoldedRemix

HEADS = dict(num_attention_heads=2, attention_head_dim=12)
FLUX = dict(in_channels=16, num_layers=2, axes_dims_rope=(4, 4, 4), joint_attention_dim=16, pooled_projection_dim=16)
SD3 = dict(sample_size=8, pos_embed_max_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=16)
MODELS = {
    "WanTransformer3DModel": HEADS
    | dict(in_channels=4, out_channels=4, ffn_dim=32, num_layers=2, text_dim=16, freq_dim=16, rope_max_seq_len=32)
    | dict(image_dim=8, added_kv_proj_dim=24),
    "FluxTransformer2DModel": HEADS | FLUX | dict(num_single_layers=1),
    "SD3Transformer2DModel": HEADS
    | SD3
    | dict(caption_projection_dim=24, pooled_projection_dim=16, dual_attention_layers=(0,), qk_norm="rms_norm"),
    "QwenImageTransformer2DModel": HEADS
    | dict(in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 4)),
    "ZImageTransformer2DModel": dict(in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    | dict(cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[64, 32, 32]),
}
PIPELINES = {
    "WanTransformer3DModel": "WanPipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
    "ZImageTransformer2DModel": "ZImagePipeline",
}
# The readers' rules for the names of layers, as their code says it: that of the original's layers after
# "diffusion_model.", and in kohya's format after "lora_unet_".
IN_BLOCK = {
    "WanTransformer3DModel": r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])",
    "FluxTransformer2DModel": r"double_blocks\.\d+\.((img|txt)_attn\.(qkv|proj)|(img|txt)_mlp\.[02])"
    r"|single_blocks\.\d+\.linear[12]",
    "SD3Transformer2DModel": r"joint_blocks\.\d+\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12])",
    "QwenImageTransformer2DModel": r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|(img|txt)_mlp\.net\.(0\.proj|2))",
    "ZImageTransformer2DModel": r"(layers|noise_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
}
classes = pytest.mark.parametrize("name", MODELS)


def make(name: str = "WanTransformer3DModel", **settings) -> Remix:
    """A Remix with random pairs whose other parameters are frozen."""
    torch.manual_seed(0)
    options = dict(n_basis=3, n_experts=4, rank=2) | {key: settings.pop(key) for key in [*settings] if key in OPTIONS}
    remix = Remix(getattr(diffusers, name)(**MODELS[name] | settings), **options)
    for _, layer in remix.mixed():
        nn.init.normal_(layer.lora_B)
    if remix.mixer == "softmax":
        nn.init.normal_(remix.logits)
    remix.freeze_shared()
    return remix.eval()


OPTIONS = ("n_basis", "n_experts", "rank", "layers", "mixer", "scope", "boundaries")


def pairs_of(remix: Remix, i: int = 1) -> dict:
    return mixture_pairs(remix, remix.coefficients.per_expert()[i])


def products(state: dict, prefix: str = "transformer.") -> dict:
    """The product B A of each layer of a file in diffusers' format."""
    layers = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    assert len(state) == 2 * len(layers)
    found = {key.removeprefix(prefix): state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"] for key in layers}
    assert len(found) == len(layers)
    return found


def assert_equal(found: dict, pairs: dict):
    assert found.keys() == pairs.keys()
    for layer, (a, b) in pairs.items():
        torch.testing.assert_close(found[layer], b @ a, rtol=1e-5, atol=1e-5)


# Names


@classes
@pytest.mark.parametrize("lora", FORMATS)
def test_names_follow_the_readers_rules(name, lora):
    remix = make(name)
    pairs = pairs_of(remix)
    state = lora_state(remix.backbone, pairs, lora, torch.float32)
    parts = r"lora_[AB]\.weight"
    if lora == "diffusers":
        layer = "|".join(re.escape(layer) for layer in pairs)
    elif lora == "original":
        layer = IN_BLOCK[name]
        parts = r"(lora_(down|up)\.weight|alpha)" if name.startswith("Flux") else parts
    else:
        layer, parts = IN_BLOCK[name].replace(r"\.", "_"), r"(lora_(down|up)\.weight|alpha)"
    prefix = {"diffusers": r"transformer\.", "original": r"diffusion_model\.", "kohya": "lora_unet_"}[lora]
    pattern = re.compile(rf"{prefix}({layer})\.{parts}")
    assert all(pattern.fullmatch(key) for key in state), [key for key in state if not pattern.fullmatch(key)]
    for key, tensor in state.items():
        if key.endswith(".alpha"):
            assert tensor == len(state[key.replace(".alpha", ".lora_down.weight")])
    # diffusers splits `linear1` of Flux by the widths of the published model; see below.
    pairs = {layer: pair for layer, pair in pairs.items() if lora == "diffusers" or not layer.startswith("single_")}
    state = lora_state(remix.backbone, pairs, lora, torch.float32)
    # It reads everything but SD3's original names.
    if lora == "diffusers" or not name.startswith("SD3"):
        assert_equal(products(getattr(diffusers, PIPELINES[name]).lora_state_dict(state)), pairs)


class Whole(dict):
    """The weights of a model in its original layout, zero where a LoRA file changes nothing."""

    def pop(self, key, *default):
        return super().pop(key, *default or [torch.zeros(6, 2)])


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SD3Transformer2DModel"])
def test_original_names_are_those_of_whole_models(name):
    """ComfyUI adds B A to the weight of the name after "diffusion_model."; diffusers converts such weights."""
    remix = make(name)
    pairs = pairs_of(remix)
    state = lora_state(remix.backbone, pairs, "original", torch.float32)
    weights = Whole({f"{layer}.weight": product for layer, product in products(state, "diffusion_model.").items()})
    if name.startswith("Wan"):
        # The reader of whole files of this project has the same names.
        assert {diffusers_name(key) for key in weights} == {f"{layer}.weight" for layer in pairs}
        converted = single_file_utils.convert_wan_transformer_to_diffusers(weights)
    else:
        weights["context_embedder.weight"] = torch.zeros(24, 16)
        converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    assert not weights
    assert_equal({layer: converted[f"{layer}.weight"] for layer in pairs}, pairs)


@pytest.mark.parametrize("lora", ["original", "kohya"])
def test_fused_layers_of_flux_at_the_width_that_diffusers_expects(lora):
    """The parts may have different ranks, and some of them no pair."""
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    torch.manual_seed(0)
    block, double = "single_transformer_blocks.0", "transformer_blocks.0.attn"
    layers = {f"{block}.attn.to_q": 2, f"{block}.attn.to_k": 2, f"{block}.attn.to_v": 2, f"{block}.proj_mlp": 2}
    for ranks in (
        layers,
        {f"{block}.attn.to_v": 2, f"{block}.proj_mlp": 1},
        {f"{double}.to_k": 3, f"{double}.to_q": 3},
    ):
        shapes = {layer: flux.get_submodule(layer) for layer in ranks}
        pairs = {
            layer: (torch.randn(rank, shapes[layer].in_features), torch.randn(shapes[layer].out_features, rank))
            for layer, rank in ranks.items()
        }
        state = diffusers.FluxPipeline.lora_state_dict(lora_state(flux, pairs, lora, torch.float32))
        x = torch.randn(3072, 2)
        found = {key.removesuffix(".lora_A.weight").removeprefix("transformer.") for key in state if "lora_A" in key}
        assert found == {*ranks} | ({f"{double}.to_v"} if len(ranks) == 2 and f"{double}.to_k" in ranks else found)
        for layer in found:
            a, b = (state[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
            ours = pairs.get(layer, (torch.zeros(1, 3072), torch.zeros(len(b), 1)))
            torch.testing.assert_close(b @ (a @ x), ours[1] @ (ours[0] @ x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("lora", ["original", "kohya"])
def test_modulation_of_flux_has_names(lora):
    """sd-scripts trains it too."""
    norms = ["transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear"]
    remix = make("FluxTransformer2DModel", layers=[*norms, "single_transformer_blocks.*.norm.linear"])
    pairs = pairs_of(remix)
    assert len(pairs) == 5
    state = lora_state(remix.backbone, pairs, lora, torch.float32)
    assert_equal(products(diffusers.FluxPipeline.lora_state_dict(state)), pairs)


def call(name: str, model) -> torch.Tensor:
    """The output of a transformer for two samples at the noise levels of the second of four experts."""
    torch.manual_seed(1)
    tokens = dict(hidden_states=torch.randn(2, 16, 16), encoder_hidden_states=torch.randn(2, 5, 16))
    t = torch.full((2,), 0.3)
    video = dict(hidden_states=torch.randn(2, 4, 2, 4, 4), encoder_hidden_states=torch.randn(2, 512, 16))
    pictures = dict(x=[*torch.randn(2, 4, 1, 4, 4)], cap_feats=[*torch.randn(2, 5, 16)])
    arguments = {
        "WanTransformer3DModel": video | dict(encoder_hidden_states_image=torch.randn(2, 3, 8), timestep=1000 * t),
        "FluxTransformer2DModel": tokens
        | dict(pooled_projections=torch.randn(2, 16), timestep=t, txt_ids=torch.zeros(5, 3), img_ids=torch.ones(16, 3)),
        "QwenImageTransformer2DModel": tokens
        | dict(timestep=t, img_shapes=[[(1, 4, 4)]] * 2)
        | dict(encoder_hidden_states_mask=torch.ones(2, 5, dtype=torch.long)),
        "ZImageTransformer2DModel": pictures | dict(t=1 - t),
    }[name]
    with torch.no_grad():
        output = model(**arguments)
    return output.sample if isinstance(output.sample, torch.Tensor) else torch.stack(output.sample)


@pytest.mark.parametrize("lora", ["original", "kohya"])
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("SD3")])
def test_models_with_the_adapter_are_the_expert(name, lora):
    # diffusers cannot split `linear1` of a small Flux.
    settings, layers = {}, None
    if name.startswith("Flux"):
        settings = dict(num_single_layers=0)
        layers = [layer for layer in PRESETS[name].layers if not layer.startswith("single_")]
    remix = make(name, layers=layers, **settings)
    torch.manual_seed(0)
    plain = getattr(diffusers, name)(**MODELS[name] | settings).eval()
    before = call(name, plain)
    state = lora_state(remix.backbone, pairs_of(remix), lora, torch.float32)
    plain.load_lora_adapter(getattr(diffusers, PIPELINES[name]).lora_state_dict(state))
    expected = call(name, remix)
    torch.testing.assert_close(call(name, plain), expected, rtol=1e-4, atol=1e-5)
    assert relative(before, expected) > 1e-3


def test_formats_without_names_are_refused(tmp_path):
    def refused(message, remix, **settings):
        with pytest.raises(UserError, match=message):
            write_stage_loras(remix, tmp_path / "a", **settings)

    refused("must be one of diffusers, original, kohya, but it is 'peft'", make(), lora="peft")
    torch.manual_seed(0)
    chroma = diffusers.ChromaTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    chroma = Remix(chroma, n_experts=2, rank=1)
    chroma.freeze_shared()
    refused(
        "kohya format has names for Wan.*, but not for a ChromaTransformer2DModel: use lora=.diffusers.",
        chroma,
        lora="kohya",
    )
    layers = ["blocks.*.attn1.to_q", "condition_embedder.time_proj"]
    refused("original format has no name for condition_embedder.time_proj of a Wan", make(layers=layers))
    for rank in (7, 2.5, 0):
        refused(f"rank of the LoRA files must be an integer from 1 to K \\* r = 6, but it is {rank}", make(), rank=rank)
    for dtype in (torch.int8, "bf16"):
        refused("dtype of LoRA files must be a floating-point torch.dtype, but it is .*", make(), dtype=dtype)
    refused("need a Remix with low-rank bases, but this is a FoldedRemix", FoldedRemix(make()))
    own = nn.Sequential(nn.Linear(2, 2))
    own = Remix(own, ["0"], 2, 2, timestep=lambda input: input[:, 0], highest_level=1, rank=1)
    for lora in FORMATS:
        refused("pipelines of a Sequential have no load_lora_weights: write whole experts", own, lora=lora)
    assert not [*tmp_path.iterdir()]


# The rank


def test_the_rank_is_reduced_to_the_closest_product():
    torch.manual_seed(0)
    pairs = {
        "wide": (torch.randn(6, 20, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)),
        "narrow": (torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)),
        "zero": (torch.randn(6, 5, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)),
    }
    reduced, lost = reduce_rank(pairs, 4)
    expected, total = {}, 0.0
    for name, (a, b) in pairs.items():
        assert [*reduced[name][0].shape, *reduced[name][1].shape] == [4, a.shape[1], len(b), 4]
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ v[:4]
        torch.testing.assert_close(reduced[name][1] @ reduced[name][0], best, rtol=1e-9, atol=1e-9)
        expected[name], total = s[4:].square().sum().item(), total + s.square().sum().item()
    assert expected["narrow"] < 1e-20 < expected["wide"]
    assert lost.layer == "wide"
    a, b = pairs["wide"]
    assert lost.worst == pytest.approx(math.sqrt(expected["wide"] / (b @ a).square().sum()))
    assert lost.share == pytest.approx(math.sqrt(expected["wide"] / total))
    assert re.fullmatch(r"\d+\.\d% lost over all layers, \d+\.\d% in wide", str(lost))
    # Pairs that have the rank stay as they are.
    again, nothing = reduce_rank(reduced, 4)
    assert all(again[name] is pair or torch.equal(again[name][0], pair[0]) for name, pair in reduced.items())
    assert nothing == Reduction()


# Stages


def make_pair(boundaries=(0, 300, 600, 875, 1000), **settings) -> Remix:
    """A Remix of two different frozen transformers of text to video: three experts of low noise and one of high."""
    torch.manual_seed(0)
    text = MODELS["WanTransformer3DModel"] | dict(image_dim=None, added_kv_proj_dim=None)
    pair = [diffusers.WanTransformer3DModel(**text) for _ in range(2)]
    options = dict(n_basis=3, rank=2, stages=[0, 875, 1000], boundaries=boundaries) | settings
    remix = Remix(pair, **options).eval()
    for _, layer in remix.mixed():
        nn.init.normal_(layer.lora_B, std=0.3)
    nn.init.normal_(remix.logits)
    remix.freeze_shared()
    return remix


def test_a_file_per_stage_is_the_mean_of_its_experts(tmp_path):
    remix = make_pair(scope="local")
    written = write_stage_loras(remix, tmp_path / "a")
    assert {path.name: lost for path, lost in written.items()} == dict.fromkeys(
        ("a_low_noise.safetensors", "a_high_noise.safetensors"), Reduction()
    )
    write_stage_loras(remix, tmp_path / "b", "kohya", dtype=torch.float32)
    for stage, experts, bounds in (("low_noise", (0, 1, 2), [0, 300, 600, 875]), ("high_noise", (3,), [875, 1000])):
        mean = {}
        for i in experts:
            for layer, (a, b) in pairs_of(remix, i).items():
                mean[layer] = mean.get(layer, 0) + b @ a / len(experts)
        exact = diffusers.WanPipeline.lora_state_dict(load_file(tmp_path / f"b_{stage}.safetensors"))
        rounded = load_file(tmp_path / f"a_{stage}.safetensors")
        assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
        for layer, product in products(exact).items():
            torch.testing.assert_close(product, mean[layer], rtol=1e-5, atol=1e-5)
        for layer, product in products(diffusers.WanPipeline.lora_state_dict(rounded)).items():
            assert relative(product.float(), mean[layer]) < 0.02
        with safe_open(tmp_path / f"a_{stage}.safetensors", "pt") as file:
            header = file.metadata()
        assert header.pop("format") == "pt"
        assert json.loads(header.pop("boundaries")) == bounds
        assert header == {
            "base_model": "WanTransformer3DModel",
            "lora_format": "original",
            "rank": "6",
            "stage": stage,
            "lost": "0.0",
        }


def test_the_lost_share_of_a_stage_is_reported(tmp_path):
    remix = make_pair(scope="local")
    pairs = pairs_of(remix, 3)
    lost = write_stage_loras(remix, tmp_path / "a", rank=2, dtype=torch.float32)[tmp_path / "a_high_noise.safetensors"]
    found = products(diffusers.WanPipeline.lora_state_dict(load_file(tmp_path / "a_high_noise.safetensors")))
    errors = {layer: (found[layer] - b @ a).norm() for layer, (a, b) in pairs.items()}
    norms = {layer: (b @ a).norm() for layer, (a, b) in pairs.items()}
    total = torch.stack([*errors.values()]).norm() / torch.stack([*norms.values()]).norm()
    assert lost.share == pytest.approx(total.item(), rel=1e-3)
    assert 0.05 < lost.share < lost.worst == pytest.approx((errors[lost.layer] / norms[lost.layer]).item(), rel=1e-3)
    assert lost.worst == pytest.approx(max((errors[layer] / norms[layer]).item() for layer in pairs), rel=1e-3)


def videos(high, low) -> torch.Tensor:
    """Latents of one video from a pipeline of a pair, which sends timesteps of at least 875 to the first one."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5)
    parts = dict(transformer=high, transformer_2=low, scheduler=scheduler, boundary_ratio=0.875)
    pipe = diffusers.WanPipeline(**parts, vae=None, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    prompt = torch.randn(2, 1, 5, 16, generator=random)
    settings = dict(height=32, width=32, num_frames=5, num_inference_steps=5, output_type="latent", guidance_scale=3.0)
    embeddings = dict(prompt_embeds=prompt[0], negative_prompt_embeds=prompt[1])
    return pipe(**embeddings, **settings, guidance_scale_2=2.0, generator=random).frames


@pytest.mark.parametrize("boundaries", [(0, 875, 1000), (0, 300, 875, 900, 1000)], ids=str)
@pytest.mark.parametrize("lora", FORMATS)
def test_a_pipeline_with_both_files_gives_the_videos_of_the_remix(lora, boundaries, tmp_path):
    remix = make_pair(boundaries)
    low, high = (copy.deepcopy(remix.expert(i)) for i in (0, remix.n_experts - 1))
    for plain, s in ((low, 0), (high, 1)):
        for layer, mixed in remix.mixed(s):
            plain.get_submodule(layer).load_state_dict(mixed.linear.state_dict())
    if len(boundaries) == 3:
        expected = videos(remix, remix)
    else:
        expected = videos(remix.merge([0.0, 0.0, 1.0, 1.0]), remix.merge([1.0, 1.0, 0.0, 0.0]))
    before = videos(high, low)
    write_stage_loras(remix, tmp_path / "a", lora, dtype=torch.float32)
    pipe = diffusers.WanPipeline(
        transformer=high, transformer_2=low, scheduler=None, vae=None, text_encoder=None, tokenizer=None
    )
    pipe.load_lora_weights(tmp_path, weight_name="a_high_noise.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="a_low_noise.safetensors", load_into_transformer_2=True)
    torch.testing.assert_close(videos(high, low), expected, rtol=0, atol=1e-5)
    assert relative(before, expected) > 0.01


def test_a_remix_of_one_module_has_one_file(tmp_path):
    remix = make()
    assert [path.name for path in write_stage_loras(remix, tmp_path / "a", "kohya")] == ["a.safetensors"]


# Reading


def write(path, state: dict, **metadata):
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=metadata or None)
    return path


@classes
@pytest.mark.parametrize("lora", FORMATS)
def test_every_expert_starts_as_the_files(name, lora, tmp_path):
    source = make(name, n_basis=1, rank=3)
    pairs = pairs_of(source)
    state = lora_state(source.backbone, pairs, lora, torch.float32)
    alphas = [key for key in state if key.endswith(".alpha")]
    for key in alphas:
        state[key] = state[key] / 2
    remix, scale = make(name, rank=4), 0.5 if alphas else 1.0
    # Other trainers write no prefix, but the name of the adapter.
    bare = {key.removeprefix(PREFIXES[lora]).replace("lora_A", "lora_A.default"): state[key] for key in state}
    for tensors, i in ((state, 0), (state, 3), *([(bare, 3)] if lora != "kohya" else [])):
        remix.reset_bases()
        assert read_lora(remix, write(tmp_path / "a.safetensors", tensors)) == Reduction()
        assert_equal({layer: b @ a / scale for layer, (a, b) in pairs_of(remix, i).items()}, pairs)


def test_fused_names_of_z_image_are_read(tmp_path):
    remix = make("ZImageTransformer2DModel")
    torch.manual_seed(0)
    a, b = torch.randn(2, 24), torch.randn(72, 2)
    out = torch.randn(2, 24), torch.randn(24, 2)
    state = {"layers_1_attention_qkv": (a, b), "layers_1_attention_out": out}
    state = {
        f"lora_unet_{name}.lora_{end}.weight": tensor
        for name, pair in state.items()
        for end, tensor in zip(("down", "up"), pair, strict=True)
    }
    read_lora(remix, write(tmp_path / "a.safetensors", state))
    names = ("to_q", "to_k", "to_v", "to_out.0")
    expected = dict.fromkeys((layer for layer, _ in remix.mixed()), 0)
    expected |= {
        f"layers.1.attention.{name}": product
        for name, product in zip(names, (*(b @ a).split(24), out[1] @ out[0]), strict=True)
    }
    for layer, (a, b) in pairs_of(remix).items():
        torch.testing.assert_close(b @ a, expected[layer] + torch.zeros(len(b), a.shape[1]), rtol=1e-5, atol=1e-5)


def test_a_file_of_peft_is_read_with_its_alpha(tmp_path):
    from peft import LoraConfig

    arguments = dict(hidden_states=torch.randn(2, 4, 2, 4, 4), encoder_hidden_states=torch.randn(2, 512, 16))
    arguments |= dict(encoder_hidden_states_image=torch.randn(2, 3, 8), timestep=torch.tensor([10, 950]))
    torch.manual_seed(1)
    model = diffusers.WanTransformer3DModel(**MODELS["WanTransformer3DModel"]).eval()
    remix = Remix(copy.deepcopy(model), n_basis=2, n_experts=4, rank=4).eval()
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], alpha_pattern={"blocks.1.attn2.to_q": 1})
    )
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    model.save_lora_adapter(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    with torch.no_grad():
        before, expected = remix(**arguments).sample, model(**arguments).sample
        read_lora(remix, file)
        torch.testing.assert_close(remix(**arguments).sample, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-2)
    # The names of peft need its configuration, which is in another file.
    state = {f"base_model.model.{key}": tensor for key, tensor in load_file(file).items()}
    (tmp_path / "peft").mkdir()
    other = write(tmp_path / "peft" / "adapter_model.safetensors", state)
    with pytest.raises(
        UserError, match=r"names of peft, whose alpha is in .*adapter_config.json, which does not exist"
    ):
        read_lora(remix, other)
    config = dict(r=2, lora_alpha=6, alpha_pattern={"blocks.1.attn2.to_q": 1})
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with torch.no_grad():
        remix.mixed()[0][1].lora_B.zero_()
        read_lora(remix, other)
        torch.testing.assert_close(remix(**arguments).sample, expected, rtol=1e-4, atol=1e-5)
    for text, message in (
        (json.dumps(config | dict(use_dora=True)), "is a DoRA"),
        ("{", "configuration of peft in .*adapter_config.json is no JSON object"),
        ("[]", "is no JSON object"),
    ):
        (tmp_path / "peft" / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_lora(remix, other)


def test_a_remix_with_stages_starts_from_the_file_of_one(tmp_path):
    source, remix = make_pair(n_basis=1), make_pair()
    write_stage_loras(source, tmp_path / "a", "kohya", dtype=torch.float32)
    read_lora(remix, tmp_path / "a_high_noise.safetensors")
    for i in (0, 3):
        assert_equal({layer: b @ a for layer, (a, b) in pairs_of(remix, i).items()}, pairs_of(source, 3))


def test_a_higher_rank_is_reduced_on_request(tmp_path):
    source = make(n_basis=2)
    file = write(tmp_path / "a.safetensors", lora_state(source.backbone, pairs_of(source), "original", torch.float32))
    remix = make(rank=3)
    with pytest.raises(UserError, match=r"has rank 4, and the bases have rank 3: use .* or reduce=True"):
        read_lora(remix, file)
    lost = read_lora(remix, file, reduce=True)
    best, expected = reduce_rank(pairs_of(source), 3)
    assert lost == expected
    assert lost.share > 0.01
    assert_equal({layer: b @ a for layer, (a, b) in pairs_of(remix).items()}, best)


def test_equal_bases_do_not_stay_equal(tmp_path):
    source = make(n_basis=1)
    file = write(tmp_path / "a.safetensors", lora_state(source.backbone, pairs_of(source), "kohya", torch.float32))
    remix = make().train()
    read_lora(remix, file)
    layer = remix.mixed()[0][1]
    assert torch.equal(layer.lora_B[0], layer.lora_B[1])
    optimizer = torch.optim.SGD([p for p in remix.parameters() if p.requires_grad], lr=0.1)
    inputs = dict(hidden_states=torch.randn(4, 4, 2, 4, 4), encoder_hidden_states=torch.randn(4, 512, 16))
    inputs |= dict(encoder_hidden_states_image=torch.randn(4, 3, 8), timestep=torch.tensor([100, 300, 600, 900]))
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        remix(**inputs).sample.square().mean().backward()
        gradients.append(remix.logits.grad.norm().item())
        optimizer.step()
    assert gradients[0] < 1e-4 * gradients[1]
    assert relative(layer.lora_B[0], layer.lora_B[1]) > 1e-5


def test_files_that_do_not_fit_are_refused(tmp_path):
    remix = make()
    file = tmp_path / "a.safetensors"
    before = {name: tensor.clone() for name, tensor in remix.state_dict().items()}

    def refused(message, state, remix=remix, **metadata):
        with pytest.raises(UserError, match=message) as error:
            read_lora(remix, write(file, state, **metadata))
        assert "\n" not in str(error.value)

    flux, wan = make("FluxTransformer2DModel"), make()
    for lora in FORMATS:
        state = lora_state(flux.backbone, pairs_of(flux), lora, torch.float32)
        refused(
            "is no LoRA of this Remix of a WanTransformer3DModel: .* are not among the mixed layers, such as", state
        )
    state = lora_state(wan.backbone, pairs_of(wan), "original", torch.float32)
    first = next(key for key in state if key.endswith("lora_A.weight"))
    refused(r"is a layer from 24 to 24 channels, and the file has \[6, 25\] and", state | {first: torch.zeros(6, 25)})
    refused("is a layer from 24 to 24 channels", {key: state[key] for key in state if key != first})
    refused(f"holds numbers in {first} that are not finite", state | {first: state[first] * math.nan})
    refused("holds .*diff_b", state | {"diffusion_model.blocks.0.ffn.0.diff_b": torch.zeros(32)})
    refused("holds .*alpha \\[2\\]", state | {"diffusion_model.blocks.0.ffn.0.alpha": torch.ones(2)})
    twice = state | lora_state(wan.backbone, pairs_of(wan), "diffusers", torch.float32)
    refused("holds several pairs of blocks.0.attn1.to_", twice)
    refused("in .*a.safetensors is no JSON object", state, lora_adapter_metadata="no json")
    refused("holds no pairs", {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(1.0)})
    refused(
        "among the mixed layers, such as diffusion_model.blocks.0.cross_attn.k",
        state,
        make(layers=["blocks.*.attn1.to_q"]),
    )
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        read_lora(remix, tmp_path / "none.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in remix.state_dict().items())

    raw = make(mixer="raw")
    with torch.no_grad():
        raw.logits[1] *= 2
    refused(r"must sum to 1, but those of this Remix with mixer='raw' sum to 1 to 2", state, raw)
    refused("this Remix has whole layers as bases", state, Remix(copy.deepcopy(wan.expert(0)), n_experts=2))
    refused("need a Remix with low-rank bases, but this is a WanTransformer3DModel", state, wan.expert(0))
    # Half of a fused layer that the Remix does not mix.
    part = make("FluxTransformer2DModel", layers=["transformer_blocks.*.attn.to_q"])
    state = lora_state(
        flux.backbone,
        {
            key: pair
            for key, pair in pairs_of(flux).items()
            if key.startswith("transformer_blocks.0.attn.to_") and "out" not in key
        },
        "kohya",
        torch.float32,
    )
    refused("changes transformer_blocks.0.attn.to_k, which is no mixed layer", state, part)
