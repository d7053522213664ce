"""Remix of the transformers of diffusers: mixed batches, gradients, pipelines, files of the experts, and errors."""

import copy
import json
import pickle
import re
from collections import UserDict, defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from interop.expert_folder import find_expert, write_experts
from mixing.experts import stored_parameters
from mixing.options import MIXERS
from models import DiT
from remix import Remix, RemixDiT
from runtime.errors import UserError
from sampling.experts import FoldedRemix

HEADS = dict(num_attention_heads=2, attention_head_dim=12)


def tiny_sd3(**settings):
    from diffusers import SD3Transformer2DModel

    text = dict(joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=16)
    size = dict(sample_size=8, pos_embed_max_size=8, in_channels=4, out_channels=4, num_layers=2)
    return SD3Transformer2DModel(**HEADS, **text, **(size | settings))


def tiny_sd35(**settings):
    return tiny_sd3(dual_attention_layers=(0,), qk_norm="rms_norm", **settings)


def tiny_flux(**settings):
    from diffusers import FluxTransformer2DModel

    text = dict(joint_attention_dim=16, pooled_projection_dim=16)
    size = dict(in_channels=16, num_layers=1, num_single_layers=1, axes_dims_rope=(4, 4, 4))
    return FluxTransformer2DModel(**HEADS, **text, **size, **settings)


def tiny_wan(**settings):
    from diffusers import WanTransformer3DModel

    size = dict(in_channels=4, out_channels=4, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    return WanTransformer3DModel(**HEADS, **(size | settings), text_dim=16, freq_dim=16)


def tiny_wan_image(**settings):
    return tiny_wan(image_dim=8, added_kv_proj_dim=24, **settings)


def tiny_pixart(**settings):
    from diffusers import PixArtTransformer2DModel

    size = dict(sample_size=8, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4)
    text = dict(cross_attention_dim=24, caption_channels=16, use_additional_conditions=True)
    return PixArtTransformer2DModel(**HEADS, **(size | text | settings))


def tiny_dit(**settings):
    from diffusers import DiTTransformer2DModel

    size = dict(sample_size=8, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4, num_embeds_ada_norm=10)
    return DiTTransformer2DModel(**HEADS, **(size | settings))


def image_text(size: int) -> dict:
    return dict(hidden_states=torch.randn(size, 4, 8, 8), encoder_hidden_states=torch.randn(size, 5, 16))


def sd3_arguments(size: int) -> dict:
    return dict(**image_text(size), pooled_projections=torch.randn(size, 16))


def flux_arguments(size: int) -> dict:
    # As many tokens as samples, so that a batch of positions would be noticed.
    positions = torch.arange(size * 3.0).view(size, 3)
    text = dict(encoder_hidden_states=torch.randn(size, size, 16), txt_ids=torch.zeros(size, 3))
    image = dict(hidden_states=torch.randn(size, size, 16), img_ids=positions)
    return dict(**text, **image, pooled_projections=torch.randn(size, 16))


def guided_flux_arguments(size: int) -> dict:
    return dict(**flux_arguments(size), guidance=torch.rand(size) * 4)


def wan_arguments(size: int) -> dict:
    return dict(hidden_states=torch.randn(size, 4, 2, 4, 4), encoder_hidden_states=torch.randn(size, 5, 16))


def wan_image_arguments(size: int) -> dict:
    text = torch.randn(size, 512, 16)
    return wan_arguments(size) | dict(encoder_hidden_states=text, encoder_hidden_states_image=torch.randn(size, 3, 8))


def pixart_arguments(size: int) -> dict:
    conditions = dict(resolution=torch.rand(size, 2) * 64, aspect_ratio=torch.rand(size, 1))
    mask = (torch.arange(5) < torch.arange(1, size + 1)[:, None]).float()
    return dict(**image_text(size), added_cond_kwargs=conditions, encoder_attention_mask=mask)


def dit_arguments(size: int) -> dict:
    return dict(hidden_states=torch.randn(size, 4, 8, 8), class_labels=torch.arange(size) % 10)


# name: (model, arguments other than the timestep, highest noise level)
KINDS = {
    "sd3": (tiny_sd3, sd3_arguments, 1000),
    "sd3.5": (tiny_sd35, sd3_arguments, 1000),
    "flux": (tiny_flux, flux_arguments, 1),
    "guided flux": (lambda: tiny_flux(guidance_embeds=True), guided_flux_arguments, 1),
    "wan": (tiny_wan, wan_arguments, 1000),
    "wan image": (tiny_wan_image, wan_image_arguments, 1000),
    "pixart": (tiny_pixart, pixart_arguments, 1000),
    "dit": (tiny_dit, dit_arguments, 1000),
}
kinds = pytest.mark.parametrize("kind", KINDS)
# One of each class
CLASSES = ("sd3", "flux", "wan", "pixart", "dit")
classes = pytest.mark.parametrize("kind", CLASSES)
models = pytest.mark.parametrize(("kind", "rank"), [*((kind, None) for kind in CLASSES), ("sd3", 2)])
ranks = pytest.mark.parametrize("rank", [None, 2])
# Noise levels of four samples, relative to the highest one, and the experts of N = 4 that own them.
LEVELS, EXPERTS = torch.tensor([0.1, 0.9, 0.3, 0.95]), [0, 3, 1, 3]


def randomize(remix: Remix, std: float = 0.1) -> Remix:
    """Make the bases of a Remix differ."""
    with torch.no_grad():
        for _, layer in remix.mixed():
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.ndim > 2 or (name == "bias" and parameter.ndim > 1):
                    parameter += std * torch.randn_like(parameter)
    return remix


def make(kind: str, **settings) -> tuple[Remix, dict]:
    """A Remix with random bases, K = 4 and N = 4, and the arguments of a batch of four samples of three experts."""
    torch.manual_seed(0)
    model, arguments, highest = KINDS[kind]
    remix = randomize(Remix(model().eval(), **({"n_experts": 4} | settings)))
    return remix, dict(**arguments(4), timestep=LEVELS * highest)


def sample(arguments: dict, i: int) -> dict:
    """The arguments of sample i."""
    positions = ("img_ids", "txt_ids")
    return {
        key: value if key in positions else tree_map(lambda x: x[i : i + 1], value) for key, value in arguments.items()
    }


def gradients(remix: Remix, output: Tensor) -> dict[str, Tensor]:
    """The gradients of a random function of the output."""
    remix.zero_grad()
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    return {name: p.grad.clone() for name, p in remix.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4):
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * max(value.norm(), 1e-3 * largest), name


# Presets and mixed batches


@kinds
def test_presets_mix_the_attention_and_the_mlps_of_all_blocks(kind):
    model = KINDS[kind][0]()
    in_blocks = re.compile(r"((single_)?transformer_)?blocks\.\d+\.(?!norm)")
    expected = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and in_blocks.match(name)]
    remix = Remix(model, n_experts=4)
    assert sorted(name for name, _ in remix.mixed()) == sorted(expected)
    assert remix.boundaries[-1] == KINDS[kind][2]


def test_a_preset_fits_a_model_of_one_block():
    assert len(Remix(tiny_sd3(num_layers=1), n_experts=2).mixed()) == 9


@kinds
def test_every_sample_of_a_mixed_batch_is_denoised_by_its_own_expert(kind):
    remix, arguments = make(kind)
    with torch.no_grad():
        mixed = remix(**arguments).sample
        alone = torch.cat([remix.expert(e)(**sample(arguments, i)).sample for i, e in enumerate(EXPERTS)])
        (as_tuple,) = remix(**arguments, return_dict=False)
        grouped = remix(**arguments, groups=4).sample
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grouped, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(as_tuple, mixed)
    assert not torch.allclose(mixed[1], remix.expert(0)(**sample(arguments, 1)).sample, rtol=0.01)


@classes
@torch.no_grad()
def test_low_rank_batches_of_several_experts_are_one_call(kind):
    remix, arguments = make(kind, rank=2)
    calls = []
    remix.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    mixed = remix(**arguments).sample
    assert len(calls) == 1
    alone = torch.cat([remix.expert(e)(**sample(arguments, i)).sample for i, e in enumerate(EXPERTS)])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scope", "rank"), [("global", 2), ("local", None)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_experts_are_folded_for_all_mixers_scopes_and_ranks(mixer, scope, rank):
    remix, arguments = make("sd3", mixer=mixer, scope=scope, rank=rank)
    folded = FoldedRemix(remix)
    with torch.no_grad():
        mixed = remix(**arguments).sample
        for i, expert in enumerate(EXPERTS):
            for model in (remix.expert(expert), folded):
                one = model(**sample(arguments, i)).sample
                torch.testing.assert_close(one, mixed[i : i + 1], rtol=1e-4, atol=1e-5)
    assert remix.prior_loss().isfinite()


def test_the_expert_of_a_sample_with_several_noise_levels_is_that_of_the_highest():
    """Wan 2.2 5B has one timestep per token: 0 for those of a given image."""
    remix, arguments = make("wan")
    timestep = arguments.pop("timestep")[:, None].expand(4, 8).clone()
    timestep[:, :4] = 0
    with torch.no_grad():
        mixed = remix(**arguments, timestep=timestep).sample
        for i, expert in enumerate(EXPERTS):
            alone = remix.expert(expert)(**sample(arguments, i), timestep=timestep[i : i + 1]).sample
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@classes
@pytest.mark.parametrize("settings", [{}, {"rank": 2}], ids=str)
def test_experts_folded_inside_one_autocast_use_their_own_weights(kind, settings):
    """Autocast keeps the casts of parameters, which are overwritten when the expert changes."""
    remix, arguments = make(kind, **settings)
    samples = [sample(arguments, i) for i in (0, 1, 2, 3, 0)]
    folded, plain = FoldedRemix(remix), remix.expert(0)
    with torch.no_grad():
        expected = []
        for one in samples:
            with torch.autocast("cpu", torch.bfloat16):
                expected.append(folded(**one).sample)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(folded(**one).sample, out) for one, out in zip(samples, expected, strict=True))
            for expert, one, out in zip((*EXPERTS, 0), samples, expected, strict=True):
                remix.fold_(plain, expert)
                # Low-rank pairs are applied to activations.
                assert relative(plain(**one).sample, out) <= (0.02 if remix.rank else 0)
    assert not torch.allclose(expected[0], expected[1], rtol=0.1)


def test_a_function_selects_the_experts():
    remix, arguments = make("dit", timestep=lambda hidden_states, timestep, **_: 1000 - timestep)
    assert remix.expert_index(remix.times(**arguments)).tolist() == [3, 0, 2, 0]


# Gradients


def stacked(remix: Remix, arguments: dict) -> Tensor:
    """Run each sample through a model of its own, whose weights are the mixtures."""
    names = stored_parameters(remix.backbone)
    shared = {name: p for name, p in names.items() if name not in basis_names(remix)}
    outputs = []
    for i, expert in enumerate(EXPERTS):
        parameters = dict(shared)
        alpha = remix.coefficients()[expert]  # [K]
        for name, layer in remix.mixed():
            if remix.rank is None:
                parameters[f"{name}.weight"] = torch.einsum("k,koi->oi", alpha, layer.weight)
                parameters[f"{name}.bias"] = alpha @ layer.bias
            else:
                parameters[f"{name}.weight"] = layer.weight + torch.einsum(
                    "k,kor,kri->oi", alpha, layer.lora_B, layer.lora_A
                )
        outputs.append(functional_call(remix.expert(0), parameters, kwargs=sample(arguments, i)).sample)
    return torch.cat(outputs)


def basis_names(remix: Remix) -> set[str]:
    dense = ("weight", "bias") if remix.rank is None else ("lora_A", "lora_B")
    return {f"{name}.{kind}" for name, _ in remix.mixed() for kind in dense}


@models
def test_gradients_equal_those_of_separately_stacked_models(kind, rank):
    remix, arguments = make(kind, rank=rank)
    expected = gradients(remix, stacked(remix, arguments))
    assert "coefficients.logits" in expected
    assert_close(gradients(remix, remix(**arguments).sample), expected)
    assert_close(gradients(remix, remix(**arguments, groups=4).sample), expected)


@classes
def test_gradient_checkpointing_computes_the_same_gradients(kind):
    remix, arguments = make(kind)
    expected = gradients(remix, remix(**arguments).sample)
    remix.enable_gradient_checkpointing()
    assert remix.is_gradient_checkpointing
    assert_close(gradients(remix, remix(**arguments).sample), expected, 1e-6)
    assert_close(gradients(remix, remix(**arguments, groups=4).sample), expected)


def test_low_rank_pairs_of_full_rank_are_whole_bases():
    """With coefficients that sum to 1, W + sum_k alpha_k (beta_k - W) = sum_k alpha_k beta_k."""
    for dense, low_rank, arguments in full_rank_models():
        for (_, bases), (_, pairs) in zip(dense.mixed(), low_rank.mixed(), strict=True):
            size = bases.in_features
            pairs.lora_A.data.zero_()[:, :size] = torch.eye(size)
            pairs.lora_B.data.zero_()[:, :, :size] = bases.weight.data - pairs.weight.data
        low_rank.logits.data = dense.logits.data.clone()
        with torch.no_grad():
            outputs = [model(**arguments) for model in (low_rank, dense)]
        outputs = [getattr(output, "sample", output) for output in outputs]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def full_rank_models():
    """Pairs of models with dense and low-rank bases on one backbone, with their arguments."""
    dense, arguments = make("sd3")
    low_rank, _ = make("sd3", rank=96)
    yield equal_biases(dense, low_rank), low_rank, arguments
    torch.manual_seed(0)
    dit = DiT(8, 2, 4, 24, 2, 2, num_classes=10).eval()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    dense = randomize(RemixDiT(dit, n_basis=4, n_experts=20)).eval()
    low_rank = RemixDiT(dit, n_basis=4, n_experts=20, rank=96).eval()
    arguments = dict(x=torch.randn(4, 4, 8, 8), t=LEVELS * 1000, y=torch.arange(4))
    yield equal_biases(dense, low_rank), low_rank, arguments


def equal_biases(dense: Remix, low_rank: Remix) -> Remix:
    for (_, bases), (_, pairs) in zip(dense.mixed(), low_rank.mixed(), strict=True):
        bases.bias.data[:] = pairs.bias.data
    return dense


# Modules like others


def test_state_dicts_and_copies():
    remix, arguments = make("sd3")
    with torch.no_grad():
        expected = remix(**arguments).sample
        other = Remix(tiny_sd3().eval(), n_experts=4)
        assert not torch.equal(other(**arguments).sample, expected)
        other.load_state_dict(remix.state_dict())
        assert torch.equal(other(**arguments).sample, expected)
        twin = copy.deepcopy(remix)
        for parameter in remix.parameters():
            parameter.zero_()
        assert torch.equal(twin(**arguments).sample, expected)


def test_what_holds_one_expert_only_is_refused():
    remix, _ = make("sd3")
    folded = FoldedRemix(remix)
    for model, names, message in (
        (remix, ("save_pretrained", "push_to_hub"), r"saved with torch\.save"),
        (remix, ("load_lora_adapter", "add_adapter"), r"no adapters such as LoRA: use a FoldedRemix"),
        (remix, ("fuse_qkv_projections",), r"only the projections of a plain expert"),
        (folded, ("save_pretrained", "push_to_hub"), r"write_experts\(remix, folder\)"),
        (folded, ("fuse_qkv_projections", "fuse_lora"), r"fuse those of a plain one, remix\.expert\(i\)"),
    ):
        for name in names:
            with pytest.raises(AttributeError, match=message):
                getattr(model, name)("folder")


def test_a_folded_remix_is_copied_and_pickled():
    remix, arguments = make("sd3")
    folded, one = FoldedRemix(remix), sample(arguments, 1)
    with torch.no_grad():
        for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert type(twin) is FoldedRemix
            assert torch.equal(twin(**one).sample, folded(**one).sample)


# Layers that are not called


@pytest.mark.parametrize("kind", ["sd3", "flux", "wan", "pixart"])
def test_fused_projections_are_refused(kind):
    model, arguments = KINDS[kind][0](), KINDS[kind][1](4)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"is not called, because the projections are fused: call unfuse_qkv"):
        Remix(model, n_experts=4)
    model.unfuse_qkv_projections()
    remix = Remix(model, n_experts=4)
    remix(**arguments, timestep=LEVELS * KINDS[kind][2]).sample.square().sum().backward()
    assert all(layer.weight.grad is not None for _, layer in remix.mixed())


@pytest.mark.parametrize("settings", [{}, {"rank": 2}], ids=str)
def test_layers_that_the_first_call_does_not_reach_are_refused(settings):
    class Unused(Tiny):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
            self.unused = nn.Linear(6, 6)

        def forward(self, x, sigma):
            return self.heads[1](super().forward(x, sigma))

    options = dict(n_basis=2, n_experts=2, timestep="sigma", highest_level=1, **settings)
    x, sigma = torch.randn(2, 6), torch.tensor([0.1, 0.1])
    remix = Remix(Unused(), ["a", "heads.*", "unused"], **options)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layers: a Unused was called and did not call unused, which would not"):
            remix(x, sigma)
    # One layer of a name is enough, as in a mixture of experts.
    remix = Remix(Unused(), ["a", "heads.*"], **options)
    remix(x, sigma)
    assert not any(layer._forward_pre_hooks for _, layer in remix.mixed())


@models
def test_modules_in_half_precision(kind, rank):
    remix, arguments = make(kind, rank=rank)
    arguments = tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, arguments)
    with torch.no_grad():
        expected = remix.expert(3)(**tree_map(lambda x: x.float() if x.is_floating_point() else x, arguments)).sample
    boundaries = remix.intervals.inner.clone()
    remix.bfloat16()
    assert remix.dtype == torch.bfloat16
    assert torch.equal(remix.intervals.inner, boundaries)
    assert remix.logits.dtype == torch.float32
    output = remix(**arguments).sample
    assert output.dtype == torch.bfloat16
    assert relative(output[1].float(), expected[1]) < 0.05
    assert relative(remix.expert(3).bfloat16()(**arguments).sample[1], output[1]) < 0.02
    assert all(grad.isfinite().all() for grad in gradients(remix, output).values())
    assert remix.logits.grad.abs().sum() > 0


def test_low_rank_pairs_of_a_model_in_half_precision_are_trained_in_float32():
    torch.manual_seed(0)
    remix = randomize(Remix(tiny_sd3().eval().bfloat16(), n_experts=4, rank=2))
    remix.freeze_shared()
    arguments = tree_map(Tensor.bfloat16, sd3_arguments(4) | dict(timestep=LEVELS * 1000))
    output = remix(**arguments, groups=4).sample
    assert output.dtype == remix.dtype == torch.bfloat16
    grads = gradients(remix, output)
    assert len(grads) == 1 + 2 * len(remix.mixed())
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    for i, expert in enumerate(EXPERTS):
        folded = remix.expert(expert)
        assert folded.dtype == torch.bfloat16
        assert relative(folded(**sample(arguments, i)).sample.float(), output[i : i + 1].float()) < 0.02
    assert all(distance.isfinite().all() for distance in remix.distances())


@pytest.mark.slow
@classes
def test_compiled_models_run_groups_without_graph_breaks(kind):
    torch._dynamo.reset()
    remix, arguments = make(kind)
    compiled = torch.compile(remix, backend="aot_eager", fullgraph=True)
    expected = gradients(remix, remix(**arguments, groups=4).sample)
    assert_close(gradients(remix, compiled(**arguments, groups=4).sample), expected)


@pytest.mark.parametrize("kind", ["tiny", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CLASSES)])
def test_compiled_models_checkpoint_their_activations(kind):
    torch._dynamo.reset()
    if kind == "tiny":
        arguments = dict(x=torch.randn(4, 6), sigma=torch.tensor([0.1, 0.3, 0.6, 0.9]))
        remix = wrap_tiny(Checkpointed())
    else:
        remix, arguments = make(kind)
    expected = gradients(remix, first(remix(**arguments, groups=4)))
    remix.enable_gradient_checkpointing()
    compiled = torch.compile(remix, backend="aot_eager", fullgraph=True)
    assert_close(gradients(remix, first(compiled(**arguments, groups=4))), expected, 5e-7 if kind == "tiny" else 1e-4)
    # An eager call restores the coefficients in the backward pass.
    assert_close(gradients(remix, first(remix(**arguments, groups=4))), expected, 5e-7 if kind == "tiny" else 1e-4)


def first(output) -> Tensor:
    return getattr(output, "sample", output)


# Pipelines


def autoencoder():
    """A tiny VAE with random weights: 4 latent channels at half the image's side."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    torch.manual_seed(0)
    latents = dict(latent_channels=4, scaling_factor=0.5, shift_factor=0.1)
    return AutoencoderKL(**blocks, **latents, block_out_channels=[8, 8], norm_num_groups=4)


def wan_autoencoder():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    down = [False, True, True]
    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=down)


def pipeline(kind: str, transformer: nn.Module, **settings):
    """The pipeline of a class around a transformer, without text encoders."""
    import diffusers

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3)
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    name, n_text, scheduler = {
        "sd3": ("StableDiffusion3Pipeline", 6, flow),
        "flux": ("FluxPipeline", 4, flow),
        "wan": ("WanPipeline", 2, flow),
        "pixart": ("PixArtAlphaPipeline", 2, diffusers.DPMSolverMultistepScheduler()),
        "dit": ("DiTPipeline", 0, diffusers.DDIMScheduler()),
    }[kind]
    vae = wan_autoencoder() if kind == "wan" else autoencoder()
    parts = dict(transformer=transformer, vae=vae, scheduler=scheduler, **dict.fromkeys(text[:n_text]))
    pipe = getattr(diffusers, name)(**parts, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(kind: str, pipe, **settings) -> Tensor:
    """Two images or videos with classifier-free guidance, in 4 steps, with fixed prompts and noise."""
    random = torch.Generator().manual_seed(0)

    def embeddings(*shape):
        return torch.randn(2, *shape, generator=random).to(pipe.transformer.dtype)

    names = {"dit": (), "flux": ("prompt_embeds",)}.get(kind, ("prompt_embeds", "negative_prompt_embeds"))
    arguments = {name: embeddings(5, 16) for name in names}
    if kind in ("sd3", "flux"):
        arguments |= {name.replace("prompt", "pooled_prompt"): embeddings(16) for name in names}
    if kind == "pixart":
        masks = {name.replace("embeds", "attention_mask"): torch.ones(2, 5) for name in names}
        arguments |= dict(**masks, negative_prompt=None, use_resolution_binning=False)
    arguments |= dict(class_labels=[1, 2]) if kind == "dit" else dict(height=16, width=16)
    arguments |= dict(num_frames=5) if kind == "wan" else {}
    result = pipe(**arguments, num_inference_steps=4, generator=random, output_type="np", **settings)
    return torch.as_tensor(result[0])


# The settings that these pipelines need.
FOR_PIPELINES = {
    "wan": dict(in_channels=16, out_channels=16),
    "pixart": dict(use_additional_conditions=False),
    "dit": dict(num_embeds_ada_norm=1000),
}


def for_pipeline(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return KINDS[kind][0](**FOR_PIPELINES.get(kind, {})).eval()


@classes
def test_a_remix_runs_in_the_pipeline_of_its_class(kind):
    model = for_pipeline(kind)
    plain = generate(kind, pipeline(kind, model))
    # Low-rank experts start equal to the model.
    remix = Remix(model, n_experts=4, rank=2).eval()
    torch.testing.assert_close(generate(kind, pipeline(kind, remix)), plain, rtol=1e-3, atol=1e-3)
    randomize(remix, 0.3)
    mixed = generate(kind, pipeline(kind, remix))
    assert not torch.allclose(mixed, plain, atol=0.01)
    assert not torch.allclose(mixed, generate(kind, pipeline(kind, remix.expert(0))), atol=0.01)
    folded = generate(kind, pipeline(kind, FoldedRemix(remix)))
    torch.testing.assert_close(folded, mixed, rtol=1e-3, atol=1e-3)


def test_a_pipeline_moves_a_remix_to_half_precision():
    remix = randomize(Remix(for_pipeline("sd3"), n_experts=3).eval())
    images = []
    for transformer in (FoldedRemix(remix), remix):
        pipe = pipeline("sd3", transformer).to(torch.bfloat16)
        assert pipe.dtype == torch.bfloat16
        images.append(generate("sd3", pipe))
    assert relative(*images) < 0.05
    assert remix.logits.dtype == remix.intervals.inner.dtype == torch.float32


# LoRA in the pipeline of a FoldedRemix


def write_lora(kind: str, targets: list[str], path, seed: int):
    from peft import LoraConfig, get_peft_model_state_dict

    model = for_pipeline(kind)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    torch.manual_seed(seed)
    state = {f"transformer.{key}": 0.5 * torch.randn_like(v) for key, v in get_peft_model_state_dict(model).items()}
    save_file(state, path)


@pytest.mark.parametrize(
    ("kind", "rank", "stages"),
    [
        ("sd3", None, None),
        pytest.param("flux", None, None, marks=pytest.mark.slow),
        pytest.param("wan", None, None, marks=pytest.mark.slow),
        ("sd3", 2, None),
        ("wan", 2, [0, 500, 1000]),
    ],
)
def test_loras_of_a_folded_remix_are_managed_as_those_of_a_plain_model(kind, rank, stages, tmp_path):
    # proj_out is not mixed in any block of SD3 and Wan.
    outside = {"sd3": "proj_out", "flux": "x_embedder", "wan": "proj_out"}[kind]
    files = {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors"}
    write_lora(kind, ["to_q", outside], files["a"], 1)
    write_lora(kind, ["to_v"], files["b"], 2)
    modules = for_pipeline(kind) if stages is None else [for_pipeline(kind, seed) for seed in (0, 1)]
    remix = randomize(Remix(modules, n_experts=4, rank=rank, stages=stages).eval())
    arguments = KINDS[kind][1](4) | dict(timestep=LEVELS * KINDS[kind][2])
    if kind == "wan":
        arguments["hidden_states"] = torch.randn(4, 16, 2, 4, 4)
    folded = FoldedRemix(remix)
    pipe = pipeline(kind, folded)

    def check(weights: dict[str, float]):
        for i, expert in enumerate(EXPERTS):
            plain = pipeline(kind, remix.expert(expert))
            for name in weights:
                plain.load_lora_weights(files[name], adapter_name=name)
            if weights:
                plain.set_adapters(list(weights), list(weights.values()))
            with torch.no_grad():
                expected = plain.transformer(**sample(arguments, i)).sample
                tolerance = dict(rtol=1e-4, atol=1e-4) if rank else {}
                torch.testing.assert_close(folded(**sample(arguments, i)).sample, expected, **tolerance)

    pipe.load_lora_weights(files["a"], adapter_name="a")
    check({"a": 1})
    pipe.load_lora_weights(files["b"], adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 2])
    check({"a": 0.5, "b": 2})
    assert pipe.get_active_adapters() == ["a", "b"]
    pipe.disable_lora()
    check({})
    pipe.enable_lora()
    pipe.delete_adapters("b")
    pipe.set_adapters("a", 0.5)
    check({"a": 0.5})
    with pytest.raises(AttributeError, match="fuse those of a plain one"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    check({})


# Files of all experts


@pytest.mark.parametrize(
    ("kind", "scope", "lora"),
    [
        ("sd3", "global", "diffusers"),
        ("sd3", "local", True),
        ("flux", "global", "diffusers"),
        ("wan", "local", "kohya"),
    ],
)
def test_load_lora_weights_reads_the_experts(kind, scope, lora, tmp_path):
    model = for_pipeline(kind)
    remix = randomize(Remix(copy.deepcopy(model), n_experts=4, rank=2, scope=scope).eval(), 0.3)
    remix.freeze_shared()
    write_experts(remix, tmp_path, lora=lora, dtype=torch.float32)
    pipe = pipeline(kind, model)
    images = []
    for expert in (0, 3):
        pipe.load_lora_weights(tmp_path, weight_name=f"expert{expert}.safetensors", adapter_name=f"expert{expert}")
        pipe.set_adapters(f"expert{expert}")
        images.append(generate(kind, pipe))
        expected = generate(kind, pipeline(kind, remix.expert(expert)))
        torch.testing.assert_close(images[-1], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(*images, atol=0.01)


def test_whole_experts_are_read_by_the_wrapped_class(tmp_path):
    remix, arguments = make("pixart")
    write_experts(remix, tmp_path)
    highest = 0
    for i, expert in enumerate(EXPERTS):
        name = find_expert(tmp_path, arguments["timestep"][i])
        assert name == f"expert{expert}"
        model = type(remix.backbone).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            expected = remix(**sample(arguments, i)).sample
            torch.testing.assert_close(model(**sample(arguments, i)).sample, expected, rtol=1e-4, atol=1e-5)
        highest = max(highest, expert)
    assert highest == remix.n_experts - 1


def test_experts_of_other_modules_are_written_as_state_dicts(tmp_path):
    remix = randomize(Remix(Denoiser(), ["layers.*"], n_experts=3, timestep="sigma", highest_level=1))
    write_experts(remix, tmp_path)
    index = json.loads((tmp_path / "experts.json").read_text())
    assert index == {
        "class": "Denoiser",
        "timestep": "sigma",
        "boundaries": remix.boundaries,
        "format": "state dict",
        "experts": ["expert0.safetensors", "expert1.safetensors", "expert2.safetensors"],
    }
    plain = Denoiser()
    plain.load_state_dict(load_file(tmp_path / find_expert(tmp_path, 0.5)))
    x = torch.randn(4, 3)
    torch.testing.assert_close(plain(x, torch.full((4,), 0.5)), remix(x, torch.full((4,), 0.5)))


def test_experts_that_lora_files_cannot_represent_are_refused(tmp_path):
    def refused(message, kind="sd3", frozen=True, **settings):
        remix, _ = make(kind, **settings)
        if frozen:
            remix.freeze_shared()
        with pytest.raises(UserError, match=message):
            write_experts(remix, tmp_path / "experts", lora=True)

    refused("need low-rank bases, but this Remix has whole layers as bases")
    refused(r"need all parameters outside the low-rank bases frozen .* such as backbone\.", rank=2, frozen=False)
    for kind in ("pixart", "dit"):
        refused("Transformer2DModel have no load_lora_weights", kind, rank=2)
    assert not (tmp_path / "experts").exists()


# Errors


class Denoiser(nn.Module):
    """A module of no known class."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.norm = nn.LayerNorm(3)

    def forward(self, x, sigma):
        return self.layers[1](self.norm(self.layers[0](x)) + sigma[:, None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layers=["blocks.*.mlp"]), r"nothing matches 'blocks\.\*\.mlp' in Denoiser, .* such as layers\.0, layers"),
        (dict(layers=[]), r"must be a list of names of nn\.Linear layers, but it is \[\]"),
        (dict(layers="layers.0"), "must be a list of names of nn.Linear layers, but it is 'layers.0'"),
        (dict(layers=["norm"]), r"norm is a torch\.nn\..*\.LayerNorm, but must be an nn\.Linear"),
        (dict(timestep="t"), r"Denoiser\.forward has no argument 't', only x, sigma"),
        (dict(timestep=None), "layers and timestep must be given for a Denoiser; presets exist for DiTTransformer2D"),
        (dict(n_experts=None), "n_experts or boundaries must be given"),
        (dict(boundaries=[0, 0.5]), "2 experts need 3 boundaries"),
        (dict(rank=0), "rank must be at least 1, but it is 0"),
        (dict(rank=1.5), r"rank must be an integer, but it is 1\.5"),
        (dict(n_basis=2.5), r"n_basis must be an integer, but it is 2\.5"),
        (dict(n_basis=None), "n_basis must be an integer, but it is None"),
        (dict(n_experts=4.0), r"n_experts must be an integer, but it is 4\.0"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    module = Denoiser()
    with pytest.raises(ValueError, match=message):
        Remix(module, **(dict(layers=["layers.*"], n_experts=2, timestep="sigma", highest_level=1) | settings))
    assert isinstance(module.layers[0], nn.Linear), "the module is not changed"


@pytest.mark.parametrize("groups", [0, 3, 2.0, 2.5])
def test_groups_that_do_not_divide_the_batch_are_refused(groups):
    remix = Remix(Denoiser(), layers=["layers.*"], n_experts=2, timestep="sigma", highest_level=1)
    with pytest.raises(ValueError, match=f"groups must divide the batch size 4, but it is {groups}"):
        remix(torch.zeros(4, 3), torch.zeros(4), groups=groups)


def test_a_pipeline_is_no_module():
    with pytest.raises(ValueError, match=r"such as a pipeline's transformer, but it is a StableDiffusion3Pipeline"):
        Remix(pipeline("sd3", tiny_sd3()), n_experts=2)


@pytest.mark.parametrize("level", [-0.1, 1.5, float("nan")])
def test_noise_levels_outside_the_boundaries_are_refused(level):
    remix = Remix(Denoiser(), ["layers.*"], n_experts=2, timestep="sigma", highest_level=1)
    for model in (remix, FoldedRemix(remix)):
        with pytest.raises(ValueError, match=f"noise levels must be from 0 to 1, but they are from .*{level}"):
            model(torch.randn(2, 3), torch.tensor([0.5, level]))


def test_a_missing_noise_level_is_refused():
    remix, arguments = make("sd3")
    arguments.pop("timestep")
    for value in (None, 500):
        with pytest.raises(TypeError, match=f"'timestep', which must be a tensor .* SD3Transformer.* got {value}"):
            remix(**arguments, timestep=value)


# The documentation


@pytest.mark.parametrize("steps", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["short", "as it stands"])
def test_the_documentation_trains_and_samples(steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "any-transformer.md").read_text()
    # The last section needs files of Wan 2.2.
    code = "".join(re.findall(r"^```python\n(.*?)^```", page.partition("## Stages")[0], re.MULTILINE | re.DOTALL))
    if steps:
        code = re.sub(r"\bsteps=\d+", f"steps={steps}", code)
    names = {}
    exec(compile(code, "any-transformer.md", "exec"), names)
    torch.testing.assert_close(names["with_adapters"], names["with_remix"], rtol=1e-3, atol=1e-3)
    if not steps:
        from sklearn.neighbors import KNeighborsClassifier

        classifier = KNeighborsClassifier().fit(names["images"].flatten(1), names["labels"])
        assert (classifier.predict(names["digits"].flatten(1)) == np.arange(100) % 10).mean() > 0.75


class Tiny(nn.Module):
    """Two linear layers; the noise level is `sigma`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, sigma, *extra):
        return self.b(self.a(x).tanh() + sum(extra))


class Checkpointed(Tiny):
    """Computes its layers again in the backward pass, with the function that it gets as a model of diffusers does."""

    checkpoint = None

    def enable_gradient_checkpointing(self, function):
        self.checkpoint = function

    def forward(self, x, sigma):
        x = self.a(x) if self.checkpoint is None else self.checkpoint(self.a, x)
        return self.b(x.tanh())


def wrap_tiny(module: nn.Module | None = None, level="sigma", **options) -> Remix:
    torch.manual_seed(0)
    remix = Remix(module or Tiny(), ["a", "b"], 4, timestep=level, boundaries=[0, 0.25, 0.5, 0.75, 1], **options)
    for _, layer in remix.mixed():
        for basis in layer.bases():
            basis.data += torch.randn_like(basis)
    return remix


def test_additional_positional_arguments_are_divided_too():
    remix, x, sigma = wrap_tiny(), torch.randn(4, 6), torch.tensor([0.9, 0.1, 0.6, 0.3])
    extra = torch.randn(2, 4, 6)
    one_by_one = [remix(x[i : i + 1], sigma[i : i + 1], *extra[:, i : i + 1]) for i in range(4)]
    torch.testing.assert_close(remix(x, sigma, *extra), torch.cat(one_by_one))


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2)])
def test_results_that_are_no_batches_are_refused(sizes):
    class Other(Tiny):
        def forward(self, x, sigma):
            return self.result(super().forward(x, sigma))

    remix, x = wrap_tiny(Other()), torch.randn(4, 6)
    sigma = torch.tensor([0.1, 0.9]).repeat_interleave(torch.tensor(sizes))
    no_batch = r"first dimension is the batch, but it returned \["
    for result, message in {
        Tensor.sum: no_batch,
        # As many losses as samples.
        lambda out: (out, [out.sum(), out.mean()]): no_batch,
        # As many rows in all as samples.
        lambda out: out[[0, 0]] if sizes == (1, 3) else out[:1]: no_batch,
        lambda out: (out, out.sum().item()): "must return equal values for all parts of a batch of several experts",
    }.items():
        remix.backbone.result = result
        with pytest.raises(TypeError, match=message):
            remix(x, sigma)


class Timed(Tiny):
    """Its result depends on the noise level."""

    def forward(self, x, sigma):
        return super().forward(x + sigma[:, None].sin(), sigma)


@ranks
@pytest.mark.parametrize("groups", [None, 4])
def test_functions_of_torch_func_transform_a_remix(rank, groups):
    """As in MeanFlow, whose target has the derivative by the noise level, and for gradients of single samples."""
    remix, kwargs = wrap_tiny(Timed(), rank=rank).double(), dict(groups=groups)
    x, sigma = torch.randn(4, 6).double(), torch.tensor([0.9, 0.1, 0.6, 0.3]).double()

    def call(x, sigma):
        return remix(x, sigma, **kwargs)

    out, tangent = torch.func.jvp(call, (x, sigma), (x, torch.ones(4).double()))
    step = 1e-5
    expected = (call(x + step * x, sigma + step) - call(x - step * x, sigma - step)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)
    parameters = dict(remix.named_parameters())
    expected = torch.autograd.grad(call(x, sigma).square().sum(), parameters.values())
    # A call without transformations must get the gradients through the result of one with them.
    through = torch.autograd.grad(out.square().sum(), parameters.values())

    def loss(parameters, x, sigma):
        return functional_call(remix, parameters, (x[None], sigma[None]), dict(groups=1)).square().sum()

    inputs = {name: p.detach() for name, p in parameters.items()}, x, sigma
    samples = torch.vmap(torch.func.grad(loss), (None, 0, 0))(*inputs).values()
    for theirs, ours, single in zip(expected, through, samples, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(single.sum(0), theirs, rtol=1e-4, atol=1e-5)
    first = torch.func.jvp(FoldedRemix(remix), (x[:1], sigma[:1]), (x[:1], torch.ones(1).double()))[1]
    torch.testing.assert_close(first, tangent[:1], rtol=1e-4, atol=1e-5)


class Keywords(Tiny):
    def forward(self, x, **conditions):
        return super().forward(x, conditions["sigma"])


def test_the_noise_level_may_be_one_of_any_named_arguments():
    remix, x, sigma = wrap_tiny(Keywords()), torch.randn(4, 6), torch.tensor([0.9, 0.1, 0.6, 0.3])
    alone = [remix(x[i : i + 1], sigma=sigma[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(remix(x, sigma=sigma), torch.cat(alone))
    with pytest.raises(TypeError, match=r"must be a tensor .*, given by its name, but Keywords got None"):
        remix(x)


class Grouped(Tiny):
    def forward(self, x, sigma, groups=None):
        return super().forward(x, sigma)


def test_modules_that_would_not_run_as_promised_are_refused():
    with pytest.raises(ValueError, match=r"has an argument 'groups', which a Remix takes itself: rename it"):
        wrap_tiny(Grouped())
    for wrapped in (nn.DataParallel(Tiny()), nn.Sequential(nn.DataParallel(Tiny()))):
        with pytest.raises(ValueError, match=r"make a Remix of its `module`, then a DistributedDataParallel"):
            Remix(wrapped, ["module.a"], 2, 2, timestep=lambda x, sigma: sigma, highest_level=1)
    module = Tiny()
    module.a = torch.compile(module.a, backend="eager")
    with pytest.raises(ValueError, match=r"a\._orig_mod was compiled by itself, .*: compile it after wrapping"):
        Remix(module, ["a._orig_mod"], 2, 2, timestep="sigma", highest_level=1)
    module = Tiny()
    module.a.base_layer = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"a has adapters of peft: name a\.base_layer, or merge them before"):
        Remix(module, ["a"], 2, 2, timestep="sigma", highest_level=1, rank=2)


@ranks
def test_rows_of_tokens_are_no_groups_of_samples(rank):
    class Tokens(Tiny):
        def forward(self, x, sigma):
            return super().forward(x.transpose(0, 1), sigma).transpose(0, 1)

    # Six tokens are two groups of three, but four samples have the same number of rows each.
    remix, sigma = wrap_tiny(Tokens(), rank=rank), torch.tensor([0.1, 0.1, 0.9, 0.9])
    with pytest.raises(ValueError, match=r"mixed layer's input \[6, 4, 6\] is not the batch of 4 samples"):
        remix(torch.randn(4, 6, 6), sigma, groups=2)
    x = torch.randn(4, 6, 6)
    alone = torch.cat([remix(x[i : i + 1], sigma[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(remix(x, sigma), alone)


def test_a_call_within_a_call_is_refused():
    class Twice(Tiny):
        def forward(self, x, sigma):
            return super().forward(x, sigma) if other is None else other(x, sigma)

    other, remix = None, wrap_tiny(Twice())
    x, sigma = torch.randn(2, 6), torch.tensor([0.1, 0.9])
    expected = remix(x, sigma)
    other = remix
    with pytest.raises(RuntimeError, match="was called while it runs, such as in two threads"):
        remix(x, sigma)
    other = None
    torch.testing.assert_close(remix(x, sigma), expected)


def test_a_copy_that_is_made_in_a_call_can_be_called():
    """As of a model that is sampled, by another thread."""
    remix, copies = wrap_tiny(), []
    x, sigma = torch.randn(2, 6), torch.tensor([0.1, 0.9])
    remix.backbone.b.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(remix)))
    out = remix(x, sigma)
    for part in copies[0].backbone.children():
        part._forward_pre_hooks.clear()
    torch.testing.assert_close(copies[0](x, sigma), out)


def test_compiled_blocks_are_compiled_at_most_twice_for_all_batch_sizes():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    remix = wrap_tiny()
    torch._dynamo.reset()
    remix.backbone.compile(backend=count, fullgraph=True)
    for size in (4, 8, 12):
        remix(torch.randn(size, 6), torch.tensor([0.1, 0.9]).repeat_interleave(size // 2), groups=2)
    assert len(graphs) == 2


@pytest.mark.parametrize("kind", ["subclass", "parametrized", "attention"])
def test_layers_that_compute_something_else_are_refused(kind):
    class Scaled(nn.Linear):
        pass

    module, name = Tiny(), "a"
    if kind == "subclass":
        module.a = Scaled(6, 6)
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(module.a)
    else:
        module.a, name = nn.TransformerEncoderLayer(6, 2, 8), "a.self_attn.out_proj"
    with pytest.raises(ValueError, match=f"layers: {name}"):
        Remix(module, [name], 2, 2, timestep="sigma", highest_level=1)


class Motion(nn.Module):
    """A transformer of PyTorch's layers, whose fast path reads weights without calling the layers."""

    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)

    def forward(self, x, sigma, padding=None):
        sigma = sigma.view(-1, 1, 1) if sigma.ndim == 1 else sigma
        return self.encoder(x + sigma, src_key_padding_mask=padding)


@ranks
@torch.no_grad()
def test_the_mlps_of_encoder_layers_are_called(rank):
    layers = ["encoder.layers.*.linear1", "encoder.layers.*.linear2"]
    remix = randomize(Remix(Motion(), layers, 4, 4, timestep="sigma", highest_level=1, rank=rank)).eval()
    x, sigma = torch.randn(4, 3, 6), torch.tensor([0.9, 0.1, 0.6, 0.3])
    padding = torch.arange(3) >= torch.tensor([[3], [3], [2], [3]])
    for mask in (None, padding):
        out, parts = remix(x, sigma, mask), [None] * 4 if mask is None else mask.split(1)
        for i, expert in enumerate((3, 0, 2, 1)):
            plain = Motion().eval()
            plain.load_state_dict(remix.expert(expert).state_dict())
            length = 3 if mask is None else 3 - mask[i].sum()
            for model in (plain, FoldedRemix(remix)):
                theirs = model(x[i : i + 1], sigma[i : i + 1], parts[i])
                torch.testing.assert_close(out[i : i + 1, :length], theirs[:, :length])


def test_subclasses_of_encoder_layers_may_have_other_layers():
    class Own(nn.TransformerEncoderLayer):
        def __init__(self):
            super().__init__(6, 2, 8)
            del self.self_attn, self.linear2

        def forward(self, x, sigma):
            return self.linear1(x)

    remix = Remix(Own(), ["linear1"], 2, 2, timestep="sigma", highest_level=1)
    assert remix(torch.randn(2, 6), torch.tensor([0.1, 0.9])).shape == (2, 8)


class MotionTokensFirst(Motion):
    def __init__(self):
        super().__init__(batch_first=False)

    def forward(self, x, sigma):
        return super().forward(x.transpose(0, 1), sigma[None, :, None]).transpose(0, 1)


@ranks
def test_as_many_tokens_as_samples_are_no_samples_in_layers_that_put_them_first(rank):
    options = dict(timestep="sigma", highest_level=1, rank=rank)
    remix = randomize(Remix(MotionTokensFirst(), ["encoder.layers.*.linear1"], 4, 4, **options))
    x, sigma = torch.randn(4, 4, 6), torch.tensor([0.9, 0.1, 0.6, 0.3])
    alone = torch.cat([remix(x[i : i + 1], sigma[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(remix(x, sigma), alone)
    with pytest.raises(ValueError, match=r"groups needs batch_first=True in PyTorch's layer around encoder.layers\.0"):
        remix(x, sigma, groups=4)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_layer_with_two_names_stays_one_layer(rank):
    module = Tiny()
    module.b = module.a
    remix = wrap_tiny(module, rank=rank)
    assert remix.backbone.a is remix.backbone.b
    x, sigma = torch.randn(2, 6), torch.tensor([0.1, 0.1])
    torch.testing.assert_close(remix.expert(0)(x, sigma), remix(x, sigma))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_parameter_of_two_layers_is_refused(rank):
    module = Tiny()
    module.table = nn.Embedding(6, 6)
    module.b.weight = module.table.weight
    with pytest.raises(
        ValueError, match=r"layers: b\.weight is also table\.weight, but would be another .* leave b out"
    ):
        wrap_tiny(module, rank=rank)
    module.b.weight = module.a.weight
    with pytest.raises(ValueError, match=r"\.weight is also .\.weight, but would be another parameter"):
        wrap_tiny(module, rank=rank)
    assert isinstance(module.a, nn.Linear)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@ranks
def test_modules_that_keep_results_of_autograd_have_experts(rank):
    class Keeping(Tiny):
        def __init__(self):
            super().__init__()
            self.head = nn.utils.weight_norm(nn.Linear(6, 6))

        def forward(self, x, sigma):
            self.features = super().forward(x, sigma)
            self.maps = [self.features.tanh()]
            return self.head(self.features)

    remix, x, sigma = wrap_tiny(Keeping(), rank=rank), torch.randn(1, 6), torch.tensor([0.3])
    out = remix(x, sigma)
    for model in (remix.expert(1), FoldedRemix(remix)):
        torch.testing.assert_close(model(x, sigma), out)


def test_intervals_are_right_after_the_meta_device():
    with torch.device("meta"):
        remix = Remix(Tiny(), ["a"], 4, timestep="sigma", boundaries=[0, 0.25, 0.5, 0.75, 1])
    remix.to_empty(device="cpu")
    assert remix.expert_index(torch.tensor([0.1, 0.3, 0.6, 0.9])).tolist() == [0, 1, 2, 3]
    assert remix.intervals.prior.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("settings", [{}, {"rank": 2}], ids=str)
def test_layers_without_biases_are_right_after_the_meta_device(settings, assign):
    def build() -> Remix:
        module = Tiny()
        module.a, module.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        return Remix(module, ["a", "b"], 4, timestep="sigma", boundaries=[0, 0.25, 0.5, 0.75, 1], **settings)

    torch.manual_seed(0)
    remix, x, sigma = randomize(build()), torch.randn(4, 6), torch.tensor([0.1, 0.3, 0.6, 0.9])
    with torch.device("meta"):
        other = build()
    if not assign:
        other.to_empty(device="cpu")
        for tensor in other.state_dict(keep_vars=True).values():
            tensor.data.fill_(torch.nan)
    other.load_state_dict(remix.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(other(x, sigma), remix(x, sigma))
        assert torch.equal(other.prior_loss(), remix.prior_loss())
    assert [name for name, _ in other.named_buffers()] == ["intervals.prior", "intervals.inner"]
    assert other.expert(1).a.bias is None


def test_arguments_that_would_select_wrong_experts_are_refused():
    with pytest.raises(ValueError, match="highest_level or boundaries"):
        Remix(Tiny(), ["a"], 4, 4, timestep="sigma")
    with pytest.raises(ValueError, match="unbatched must be a list"):
        wrap_tiny(unbatched="extra")
    for named in (dict(unbatched=["extras"]), dict(batch_dims={"extras": 1})):
        with pytest.raises(ValueError, match=r"Tiny\.forward has no argument 'extras', only x, sigma, extra"):
            wrap_tiny(**named)
    assert wrap_tiny().highest_level == 1
    numpy = Remix(Tiny(), ["a"], 4, timestep="sigma", boundaries=np.linspace(0, 1, 5))
    assert numpy.boundaries == [0, 0.25, 0.5, 0.75, 1]


def test_layers_that_run_outside_of_a_remix_are_an_error():
    for method in (wrap_tiny().backbone, wrap_tiny().backbone.forward):
        with pytest.raises(RuntimeError, match=r"and not another method of its module; .* needs context_fn"):
            method(torch.randn(2, 6), torch.tensor([0.1, 0.1]))


def test_a_remix_without_values_has_no_experts():
    """As one that accelerate's cpu_offload has moved to the host."""
    remix = wrap_tiny().to("meta")
    for make in (FoldedRemix, lambda remix: remix.expert(0)):
        with pytest.raises(ValueError, match="a Remix that is offloaded or on the meta device has no experts"):
            make(remix)


def test_a_pattern_does_not_match_the_module_itself():
    assert [name for name, _ in Remix(Tiny(), ["*"], 2, timestep="sigma", boundaries=[0, 0.5, 1]).mixed()] == ["a", "b"]


class Reference(nn.Module):
    """Returns the bias of its only mixed layer, with which each expert adds its own index to the input."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(1, 1)

    def forward(self, x, sigma, *extra):
        return self.a(torch.zeros_like(x))


def experts_run(boundaries, **options) -> Remix:
    """A Remix that returns the index of the expert of each sample."""
    n = len(boundaries) - 1
    remix = Remix(Reference(), ["a"], n, boundaries=boundaries, mixer="one-hot", **(dict(timestep="sigma") | options))
    remix.backbone.a.bias.data[:, 0] = torch.arange(n)
    return remix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("highest", [1, 1000])
@torch.no_grad()
def test_steps_on_boundaries_run_the_expert_above(highest, dtype, tmp_path):
    """FluxPipeline casts timesteps of 0 to 1000 to the type of the latents, and divides them."""
    remix = experts_run([i * highest / 20 for i in range(21)])
    folded, steps = FoldedRemix(remix), 1000 * torch.arange(20) / 20
    write_experts(remix, tmp_path)
    for levels in ((steps / 1000 * highest).to(dtype), steps.to(dtype) / (1000 / highest)):
        assert remix(torch.zeros(20, 1), levels)[:, 0].tolist() == [*range(20)]
        assert remix(torch.zeros(20, 1), levels, groups=20)[:, 0].tolist() == [*range(20)]
        assert [folded(torch.zeros(1, 1), level.view(1)).item() for level in levels] == [*range(20)]
        assert [find_expert(tmp_path, level) for level in levels] == [f"expert{i}.safetensors" for i in range(20)]


@torch.no_grad()
def test_groups_run_the_expert_of_their_interval_although_levels_are_rounded():
    """In bf16, 0.9995 is 1 of 4, and the first of a group may be rounded to the boundary above it."""
    remix, x = experts_run([0, 0.25, 0.5, 0.75, 1]), torch.zeros(8, 1)
    levels = torch.tensor([0.2499, 0.1, 0.4999, 0.3, 0.7499, 0.6, 0.9999, 0.8], dtype=torch.bfloat16)
    assert levels[0] == 0.25
    assert remix(x, levels, groups=4)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@torch.no_grad()
def test_a_function_may_return_a_rounded_time_or_level():
    for function in (lambda x, sigma, *_: 1 - sigma, lambda x, sigma, *_: sigma):
        remix, steps = experts_run([i / 20 for i in range(21)], timestep=function), torch.arange(20) / 20
        times = steps if function(0, 0) == 0 else 1 - steps
        for rounded in (times.bfloat16(), (1000 * times).bfloat16() / 1000):
            assert remix(torch.zeros(20, 1), rounded)[:, 0].tolist() == [*range(20)]


def test_the_flux_pipeline_in_bf16_runs_each_of_twenty_experts_once():
    remix = Remix(for_pipeline("flux"), n_experts=20, n_basis=2)
    for transformer in (remix, FoldedRemix(remix)):
        pipe, used = pipeline("flux", transformer).to(torch.bfloat16), []
        pipe.scheduler.register_to_config(shift=1.0)
        pipe.scheduler.set_shift(1.0)
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, used=used: used.append(remix.expert_index(kwargs["timestep"]).item()),
            with_kwargs=True,
        )
        text = dict(prompt_embeds=torch.zeros(1, 5, 16).bfloat16(), pooled_prompt_embeds=torch.zeros(1, 16).bfloat16())
        pipe(**text, height=16, width=16, output_type="latent", sigmas=[i / 20 for i in range(20, 0, -1)])
        assert used == [19, *range(19, 0, -1)]


@pytest.mark.parametrize("highest", [np.pi / 2, 14.6146, 0.7, 80])
@torch.no_grad()
def test_levels_up_to_a_highest_one_that_is_no_integer_have_experts(highest):
    remix = Remix(Reference(), ["a"], 4, n_experts=4, timestep="sigma", highest_level=highest)
    assert remix.boundaries == [0, highest / 4, highest / 2, highest * 0.75, highest]
    levels = torch.tensor([0, 0.3, 0.6, 0.999, 1]) * highest
    for dtype in (torch.float32, torch.bfloat16):
        assert remix.expert_index(levels.to(dtype)).tolist() == [0, 1, 2, 3, 3]
        remix(torch.zeros(5, 1), levels.to(dtype))
    assert experts_run([0, 0.5, 1, 1.5, 2]).expert_index(1.7) == 3
    with pytest.raises(ValueError, match="must be a positive number, but it is 0"):
        Remix(Reference(), ["a"], 4, n_experts=4, timestep="sigma", highest_level=0)


# Arguments that are no tensors of the batch


class Images(Tiny):
    """Takes and returns a list of samples, as Z-Image does."""

    def forward(self, images, sigma, captions):
        samples = zip(images, sigma, captions, strict=True)
        return ([self.b(self.a(x).tanh() + s + c.sum()) for x, s, c in samples],)


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("sigma", [[0.9, 0.1, 0.6, 0.3], [0.9, 0.1, 0.95, 0.2]])
@ranks
@torch.no_grad()
def test_lists_of_samples_are_divided_along_the_list(rank, sigma, rows):
    remix, images, sigma = wrap_tiny(Images(), rank=rank), [*torch.randn(4, rows, 6)], torch.tensor(sigma)
    captions = [torch.randn(4 + i) for i in range(4)]
    (mixed,) = remix(images, sigma, captions)
    for i in range(4):
        ((alone,),) = remix(images[i : i + 1], sigma[i : i + 1], captions[i : i + 1])
        torch.testing.assert_close(mixed[i], alone)


class Scaled(Tiny):
    def forward(self, x, sigma, scale, size=None):
        return super().forward(x, sigma) * torch.as_tensor(scale)[:, None]


@pytest.mark.parametrize("make_scale", [list, np.array])
@torch.no_grad()
def test_each_sample_gets_its_own_number(make_scale):
    remix, x, sigma = wrap_tiny(Scaled()), torch.randn(4, 6), torch.tensor([0.9, 0.1, 0.6, 0.3])
    scale = make_scale([1.0, 2.0, 3.0, 4.0])
    alone = [remix(x[i : i + 1], sigma[i : i + 1], scale[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(remix(x, sigma, scale, size=(64, 64)), torch.cat(alone).to(remix(x, sigma, scale).dtype))


class LayerStates(Tiny):
    """Takes one text per layer, [layers, B, 6], as HiDream does."""

    def forward(self, x, sigma, states):
        return super().forward(x, sigma, *states)


@torch.no_grad()
def test_the_dimension_of_the_batch_can_be_named():
    x, sigma, states = torch.randn(4, 6), torch.tensor([0.9, 0.1, 0.6, 0.3]), torch.randn(3, 4, 6)
    module, four = LayerStates(), torch.randn(4, 4, 6)

    def one_by_one(remix, states):
        return torch.cat([remix(x[i : i + 1], sigma[i : i + 1], states[:, i : i + 1]) for i in range(4)])

    for dim, given, value in ((1, states, states), (1, four, four), (0, states, [*states]), (0, four, [*four])):
        remix = wrap_tiny(copy.deepcopy(module), batch_dims={"states": dim})
        torch.testing.assert_close(remix(x, sigma, value), one_by_one(remix, given))
        assert remix.mixing_config["batch_dims"] == {"states": dim}


@dataclass(frozen=True)
class Condition:
    sigma: Tensor
    text: Tensor
    scale: float = 2.0

    def __post_init__(self):
        object.__setattr__(self, "scaled", self.text * self.scale)


class Conditioned(Tiny):
    """Has the noise level in a dataclass, and returns one."""

    def forward(self, x, condition):
        out = super().forward(x, condition.sigma, condition.scaled)
        return Condition(out, out + 1, condition.scale)


@ranks
@torch.no_grad()
def test_dataclasses_of_batches_are_divided_and_joined(rank):
    remix = wrap_tiny(Conditioned(), rank=rank, level=lambda x, condition: condition.sigma)
    x, sigma, text = torch.randn(4, 6), torch.tensor([0.9, 0.1, 0.6, 0.3]), torch.randn(4, 6)
    mixed = remix(x, Condition(sigma, text))
    for i in range(4):
        alone = remix(x[i : i + 1], Condition(sigma[i : i + 1], text[i : i + 1]))
        torch.testing.assert_close(mixed.sigma[i : i + 1], alone.sigma)
        torch.testing.assert_close(mixed.text[i : i + 1], alone.text)
        torch.testing.assert_close(mixed.scaled[i : i + 1], alone.scaled)
    assert mixed.scale == 2


class InDictionary(Tiny):
    def forward(self, batch):
        return super().forward(batch["x"], batch["sigma"], batch["text"])


@ranks
@torch.no_grad()
def test_dictionaries_of_batches_are_divided(rank):
    remix, calls = wrap_tiny(InDictionary(), rank=rank, level=lambda batch: batch["sigma"]), []
    remix.backbone.register_forward_hook(lambda *_: calls.append(1))
    batch = dict(x=torch.randn(4, 6), sigma=torch.tensor([0.9, 0.1, 0.6, 0.3]), text=torch.randn(4, 6), kind="image")
    alone = torch.cat([remix(batch | {key: batch[key][i : i + 1] for key in ("x", "sigma", "text")}) for i in range(4)])
    for kind in (dict, UserDict, partial(defaultdict, list)):
        calls.clear()
        torch.testing.assert_close(remix(kind(batch)), alone)
        assert len(calls) == (1 if rank else 4)


class Packed(Tiny):
    """Takes the tokens of all samples as one sequence [tokens, 6]."""

    def forward(self, x, sigma, lengths):
        return super().forward(x + sigma.repeat_interleave(lengths)[:, None], sigma)


@torch.no_grad()
def test_packed_samples_are_refused_unless_each_token_has_a_level():
    x, sigma, lengths = torch.randn(7, 6), torch.tensor([0.9, 0.1]), torch.tensor([4, 3])
    for rank in (None, 2):
        with pytest.raises(ValueError, match=r"the samples may be in x \[7, 6\], but not along the first dimension"):
            wrap_tiny(Packed(), rank=rank)(x, sigma, lengths)
    remix = wrap_tiny(Packed(), rank=2, level=lambda x, sigma, lengths: sigma.repeat_interleave(lengths))
    alone = [remix(x[:4], sigma[:1], lengths[:1]), remix(x[4:], sigma[1:], lengths[1:])]
    torch.testing.assert_close(remix(x, sigma, lengths), torch.cat(alone))


@pytest.mark.parametrize("kind", ["another dimension", "tuple", "list of batches", "object"])
def test_arguments_that_may_be_batches_are_refused(kind):
    states = {
        "object": SimpleNamespace(text=torch.randn(4, 6)),
        "another dimension": torch.randn(3, 4, 6),
        "tuple": (*torch.randn(4, 6),),
        "list of batches": [*torch.randn(4, 4, 6)],
    }[kind]
    x, sigma = torch.randn(4, 6), torch.tensor([0.9, 0.1, 0.6, 0.3])
    message = (
        r"states (has the shape|is a tuple|is a list|is a Simple\w+ that holds).* Name it in unbatched=\['states'\]"
    )
    with pytest.raises(ValueError, match=message):
        wrap_tiny(LayerStates())(x, sigma, states)


@torch.no_grad()
def test_as_many_states_of_a_controlnet_as_samples_are_batches():
    remix, arguments = make("sd3", rank=2)
    states = [*torch.randn(4, 4, 16, 24)]
    mixed = remix(**arguments, block_controlnet_hidden_states=states).sample
    for i in range(4):
        own = [state[i : i + 1] for state in states]
        alone = remix(**sample(arguments, i), block_controlnet_hidden_states=own).sample
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)
