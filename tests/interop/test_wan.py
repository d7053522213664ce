"""Wan 2.2's pair of transformers: read as stages from all layouts, run in WanPipeline, and written back."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_any_transformer import for_pipeline, generate, make, pipeline, sample, tiny_wan, tiny_wan_image, wan_arguments
from torch import Tensor, nn

from interop.lora import write_stage_loras
from interop.wan import diffusers_name, infer_config, read_original, read_pair, write_pair
from remix import Remix
from runtime.errors import UserError
from sampling.experts import FoldedRemix


@pytest.fixture(scope="module")
def pair():
    """A WanPipeline with two different transformers."""
    return pipeline("wan", for_pipeline("wan"), transformer_2=for_pipeline("wan", seed=1), boundary_ratio=0.875)


def randomize(remix: Remix) -> Remix:
    torch.manual_seed(0)
    for _, layer in remix.mixed():
        nn.init.normal_(layer.lora_A, std=0.3)
        nn.init.normal_(layer.lora_B)
    return remix


def read_copy(pair, **options) -> tuple:
    """The Remix of a copy of a pair, and this pipeline with the Remix in the place of both transformers."""
    pair = copy.deepcopy(pair)
    pair.transformer = pair.transformer_2 = remix = read_pair(pair, rank=2, **options)
    return remix.eval(), pair


# The pair in a pipeline


def test_the_remix_of_a_pair_gives_the_videos_of_the_pair(pair):
    expected = generate("wan", pair, guidance_scale_2=3.0)
    assert not torch.equal(generate("wan", pipeline("wan", pair.transformer)), expected)
    remix, pipe = read_copy(pair, n_experts=5)
    again = copy.deepcopy(pair)
    weights = [again.transformer_2.proj_out.weight, again.transformer.blocks[0].attn1.to_q.weight]
    stages = read_pair(again, rank=2).stages
    owned = [stages.module(0).proj_out.weight, stages.module(1).blocks[0].attn1.to_q.linear.weight]
    assert all(a is b for a, b in zip(owned, weights, strict=True)), "no tensor is copied"
    assert (remix.stages.boundaries, remix.n_experts) == ([0, 875, 1000], 5)
    assert torch.equal(generate("wan", pipe, guidance_scale_2=3.0), expected)
    randomize(remix)
    trained = generate("wan", pipe, guidance_scale_2=3.0)
    assert (trained - expected).abs().max() > 0.1
    pipe.transformer = pipe.transformer_2 = FoldedRemix(remix)
    torch.testing.assert_close(generate("wan", pipe, guidance_scale_2=3.0), trained, rtol=1e-3, atol=1e-3)


def test_a_lora_of_one_stage_is_loaded_into_its_module(pair, tmp_path):
    pytest.importorskip("peft")
    write_stage_loras(randomize(read_copy(pair)[0]), tmp_path / "lora")
    files = {s: tmp_path / f"lora_{kind}_noise.safetensors" for s, kind in enumerate(("low", "high"))}
    plain = copy.deepcopy(pair)
    for s, file in files.items():
        plain.load_lora_weights(file.parent, weight_name=file.name, load_into_transformer_2=s == 0)
    _, pipe = read_copy(pair)
    pipe.transformer = pipe.transformer_2 = folded = FoldedRemix(pipe.transformer)
    for s, module in enumerate((folded.plain, *folded.other_stages)):
        module.load_lora_adapter(type(pair).lora_state_dict(files[s]))
    torch.testing.assert_close(generate("wan", pipe), generate("wan", plain))


def run_steps(pipe, shift: float, sigmas: list[float] | None):
    """Sample with the default steps of a shift, or with those of some noise levels before the shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    set_timesteps = scheduler.set_timesteps
    if sigmas:
        scheduler.set_timesteps = lambda *_, **__: set_timesteps(sigmas=sigmas)
    text = dict(prompt_embeds=torch.zeros(1, 5, 16), height=16, width=16, num_frames=5, guidance_scale=1.0)
    pipe(**text, num_inference_steps=len(sigmas or range(4)), output_type="latent")


@pytest.mark.parametrize("ratio", [0.875, 0.9])
def test_every_step_of_a_pipeline_runs_the_transformer_that_it_chooses(ratio):
    """WanPipeline compares t with ratio * 1000, also where a step is on the boundary or rounded below it."""
    high, low = (tiny_wan(in_channels=16, out_channels=16, num_layers=1).eval() for _ in range(2))
    pipe = pipeline("wan", high, transformer_2=low, boundary_ratio=ratio)
    remix, mixed = read_copy(pipe, n_experts=8)
    folded = copy.copy(mixed)
    folded.transformer = folded.transformer_2 = FoldedRemix(remix)
    used = []
    for modules in ((low, high), remix.stages.modules, (folded.transformer.plain, *folded.transformer.other_stages)):
        for s, module in enumerate(modules):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, s=s: used[-1].append((s, kwargs["timestep"].item())), with_kwargs=True
            )
    for shift in (3.0, 5.0, 12.0):
        # After the shift, this is the ratio.
        sigma = ratio / (shift - (shift - 1) * ratio)
        for sigmas in (None, [1.0, sigma * (1 + 1e-7), sigma, sigma * (1 - 1e-7), 0.05]):
            used.clear()
            for transformers in (pipe, mixed, folded):
                used.append([])
                run_steps(transformers, shift, sigmas)
            plain, *others = used
            assert others == [plain, plain]
            assert {s for s, _ in plain} == {0, 1}
            assert not sigmas or sum(abs(t - 1000 * ratio) < 0.001 for _, t in plain) == 3


# Folders


def test_a_pair_is_written_as_it_was_read(pair, tmp_path):
    pair.save_pretrained(tmp_path / "read")
    remix = read_pair(tmp_path / "read", torch.float32, n_experts=3)
    write_pair(remix, tmp_path / "written")
    for part in ("transformer", "transformer_2"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        read, written = load_file(tmp_path / "read" / file), load_file(tmp_path / "written" / file)
        assert read.keys() == written.keys()
        assert all(torch.equal(tensor, written[name]) for name, tensor in read.items()), part
    parts = {name: pair.components[name] for name in ("vae", "scheduler", "text_encoder", "tokenizer")}
    again = type(pair).from_pretrained(tmp_path / "written", **parts)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate("wan", again), generate("wan", pair))
    # A pipeline's other parts stay as they are, and so does the Remix that was read from the files.
    before = {name: value.clone() for name, value in randomize(remix).state_dict().items()}
    write_pair(remix, tmp_path / "read")
    assert all(torch.equal(value, before[name]) for name, value in remix.state_dict().items())
    index = json.loads((tmp_path / "read" / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    # Each stage is the mean of its experts.
    trained = type(pair).from_pretrained(tmp_path / "read", **parts)
    for transformer, weights in ((trained.transformer_2, [1, 1, 0]), (trained.transformer, [0, 0, 1])):
        expected = remix.merge(weights).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in transformer.state_dict().items())


def test_a_folder_is_read_in_bf16(pair, tmp_path):
    pair.save_pretrained(tmp_path)
    remix = read_pair(tmp_path)
    kinds = {p.dtype for p in remix.stages.module(1).parameters()}
    assert remix.mixed(1)[0][1].weight.dtype == torch.bfloat16
    # diffusers keeps norms and the embedding of the time.
    assert kinds == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in remix.parameters() if p.requires_grad} == {torch.float32}


# Files of the original


def original_name(name: str) -> str:
    """The original's name of a parameter of diffusers, from the other direction than in interop/wan.py."""
    parts = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
        "attn1.to_out.0": "self_attn.o",
        "attn2.to_out.0": "cross_attn.o",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "add_k_proj": "k_img",
        "add_v_proj": "v_img",
        "norm_added_k": "norm_k_img",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "norm2": "norm3",
        "proj_out": "head.head",
    }
    if name.endswith("scale_shift_table"):
        return name.replace("scale_shift_table", "modulation" if name.startswith("blocks") else "head.modulation")
    for ours, theirs in parts.items():
        if f".{ours}." in f".{name}.":
            name = f".{name}.".replace(f".{ours}.", f".{theirs}.").strip(".")
    return name


def write_original(model: nn.Module, path, prefix: str = "", **extra: Tensor):
    state = {f"{prefix}{original_name(name)}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(state | extra, path)


@pytest.fixture
def originals(pair, tmp_path):
    """The two files of a pair, that of high noise first."""
    files = [tmp_path / f"wan2.2_t2v_{kind}_noise_14B_fp16.safetensors" for kind in ("high", "low")]
    write_original(pair.transformer, files[0])
    write_original(pair.transformer_2, files[1], prefix="model.diffusion_model.")
    return files


def test_names_are_those_of_diffusers_converter():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = [original_name(name) for name in tiny_wan_image().state_dict()]
    converted = convert_wan_transformer_to_diffusers({name: torch.tensor(i) for i, name in enumerate(names)})
    assert {diffusers_name(name): i for i, name in enumerate(names)} == {k: v.item() for k, v in converted.items()}


def test_two_files_of_the_original_are_the_pair(pair, originals):
    config = dict(pair.transformer.config)
    remix = read_pair(originals, torch.float32, rank=2, boundary_ratio=0.875, config=config).eval()
    arguments = wan_arguments(2) | dict(hidden_states=torch.randn(2, 16, 2, 4, 4), timestep=torch.tensor([900, 100]))
    with torch.no_grad():
        for i, transformer in enumerate((pair.transformer, pair.transformer_2)):
            one = sample(arguments, i)
            assert torch.equal(remix(**one).sample, transformer(**one).sample)
    assert remix.stages.module(1).config.num_layers == 2
    assert read_pair(originals, boundary_ratio=0.9, config=config).boundaries == [0, 900, 1000]


def test_files_and_folders_are_read_in_equal_dtypes(pair, originals, tmp_path):
    pair.save_pretrained(tmp_path)
    options = dict(rank=2, boundary_ratio=0.875)
    files = read_pair(originals, **options, config=dict(pair.transformer.config))
    folder = read_pair(tmp_path, **options)
    for name, theirs in folder.stages.module(0).state_dict().items():
        ours = files.stages.module(0).state_dict()[name]
        assert (ours.dtype, torch.equal(ours, theirs)) == (theirs.dtype, True), name


def test_the_config_is_inferred_from_the_tensors(tmp_path):
    from diffusers import WanTransformer3DModel

    settings = dict(in_channels=36, out_channels=16, num_layers=1, ffn_dim=24, text_dim=16, freq_dim=8)
    settings |= dict(num_attention_heads=1, attention_head_dim=128)
    image = dict(image_dim=8, added_kv_proj_dim=128, pos_embed_seq_len=6)
    for extra in ({}, image, dict(cross_attn_norm=False, patch_size=(1, 1, 2))):
        model = WanTransformer3DModel(**settings, **extra)
        path = tmp_path / "model.safetensors"
        write_original(model, path)
        read = read_original(path, torch.float32)
        assert all(read.config[name] == value for name, value in model.config.items() if not name.startswith("_"))
        assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())
        assert not any(buffer.is_meta for buffer in read.buffers())


def test_scaled_fp8_files_are_dequantized(pair, originals):
    """As ComfyUI writes them: weights in fp8 with a scale for each, and a marker."""
    config, state, expected = dict(pair.transformer.config), load_file(originals[0]), {}
    for name in [name for name in state if name.startswith("blocks.") and state[name].ndim == 2]:
        scale = state[name].abs().max() / 448
        quantized = (state[name] / scale).to(torch.float8_e4m3fn)
        expected[diffusers_name(name)] = quantized.float() * scale
        state |= {name: quantized, name.replace(".weight", ".scale_weight"): scale}
        state[name.replace(".weight", ".scale_input")] = torch.tensor(2.0)
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(state, originals[0])
    high = read_original(originals[0], torch.float32, config).state_dict()
    assert len(expected) == 20
    assert all(torch.equal(high[name], value) for name, value in expected.items())
    save_file(state | {"blocks.0.ffn.0.scale_weight": torch.ones(24)}, originals[0])
    with pytest.raises(UserError, match=r"the scale of blocks\.0\.ffn\.0\.weight is neither .* per row: \[24\]"):
        read_original(originals[0], torch.float32, config)
    save_file(state | {"blocks.0.ffn.0.weight": torch.ones(32, 24, dtype=torch.int8)}, originals[0])
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0\.weight is quantized as torch\.int8, but only fp8"):
        read_original(originals[0], torch.float32, config)
    save_file(state | {"blocks.0.ffn.0.comfy_quant": torch.zeros(2, dtype=torch.uint8)}, originals[0])
    with pytest.raises(UserError, match=r"fit a WanTransformer3DModel: blocks\.0\.ffn\.0\.comfy_quant is not in "):
        read_original(originals[0], torch.float32, config)


def test_no_tensor_of_a_file_is_in_memory_twice(originals, pair):
    """Tensors that keep their dtype are those of the mapped file."""
    model = read_original(originals[0], torch.float32, dict(pair.transformer.config))
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if originals[0].name in line]
    ranges = [tuple(int(end, 16) for end in line.split("-")) for line in maps]
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), name


# Wrong input


def test_what_is_no_pair_is_refused(pair, originals, tmp_path):
    def refused(message, *args, **options):
        with pytest.raises(UserError, match=message):
            read_pair(*args, **options)

    refused("of a WanPipeline they are WanTransformer3DModel, NoneType and None", pipeline("wan", for_pipeline("wan")))
    refused("of a NoneType they are NoneType, NoneType and None", None)
    refused("a pair is two files, .* there are 2: Wan", [pair.transformer, pair.transformer_2], boundary_ratio=0.9)
    for part in ("transformer", "transformer_2"):
        (tmp_path / "index" / part).mkdir(parents=True)
    (tmp_path / "index" / "model_index.json").write_text("{")
    refused(r"model_index\.json is no JSON: ", tmp_path / "index")
    refused(r"no pair .* there is no .*model_index.json", tmp_path)
    other = pipeline("wan", tiny_wan(), transformer_2=tiny_wan(num_layers=1), boundary_ratio=0.9)
    refused(r"differ in their names or shapes, such as blocks\.1", other)
    refused(r"boundary_ratio is 0\.9, but that of the pipeline is 0\.875", pair, boundary_ratio=0.9)
    refused("config is only for two files", pair, config={})
    config = dict(config=dict(pair.transformer.config))
    refused("boundary_ratio is None", originals, **config)
    refused("must be between 0 and 1, but it is 900", originals, boundary_ratio=900, **config)
    refused("the file of high noise comes first", originals[::-1], boundary_ratio=0.9, **config)
    refused("a pair is two files", originals[:1], boundary_ratio=0.9)
    refused(
        r"has the width 24, no multiple of 128, the size of Wan's heads: give config", originals, boundary_ratio=0.9
    )
    wrong = config["config"] | dict(ffn_dim=16)
    refused(
        r"blocks\.0\.ffn\.0\.weight has the shape \[32, 24\], not \[16, 24\]",
        originals,
        boundary_ratio=0.9,
        config=wrong,
    )
    state = load_file(originals[0])
    del state["blocks.0.ffn.0.weight"]
    save_file(state, originals[0])
    refused(r"blocks\.0\.ffn\.net\.0\.proj\.weight is missing", originals, boundary_ratio=0.9, **config)
    save_file({"x": torch.zeros(1)}, originals[0])
    refused("no transformer of Wan in the original's layout", originals, boundary_ratio=0.9)
    originals[0].write_bytes(b"damaged")
    refused("is not a complete .safetensors file", originals, boundary_ratio=0.9)
    with pytest.raises(UserError, match="from 2 stages, or from 2 experts, of a WanTransformer3DModel, not from 1 "):
        write_pair(make("dit")[0], tmp_path)
    shapes = {"patch_embedding.weight": [24, 4, 1, 2, 2], "head.head.weight": [16, 24]}
    with pytest.raises(UserError, match=r"original's layout: KeyError\('text_embedding\.0\.weight'\)"):
        infer_config("file", shapes)


# The documentation


def test_the_documentation_trains_both_stages(tmp_path, monkeypatch):
    """The loop of docs/wan.md, shortened, lowers both stages' errors of a tiny pair on videos of moving digits."""
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    high, low = (tiny_wan(in_channels=1, out_channels=1, num_layers=1).eval() for _ in range(2))
    pipeline("wan", high, transformer_2=low, boundary_ratio=0.875).save_pretrained("Wan2.2-T2V-A14B-Diffusers")
    images = torch.from_numpy(load_digits().images[:16]).float() / 8 - 1
    # Each digit moves by a pixel per frame.
    videos = torch.stack([images.roll(frame, 2) for frame in range(3)], 1)[:, None]  # [16, 1, 3, 8, 8]
    prompts = torch.randn(16, 5, 16).bfloat16()
    names = {"batches": [(videos, prompts)] * 20, "device": "cpu"}
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "wan.md").read_text(), re.MULTILINE | re.DOTALL)
    assert 20 <= len([line for line in code.splitlines() if line.strip()]) <= 25
    code = code.replace("lr=1e-4", "lr=3e-2").replace("% 50", "% 5").replace("// 50", "// 5")
    torch.manual_seed(0)
    exec(compile(code, "wan.md", "exec"), names)
    remix = names["remix"]
    start = read_pair("Wan2.2-T2V-A14B-Diffusers")
    noise, errors = torch.randn(videos.shape), []
    with torch.no_grad():
        for level in (700.0, 950.0):
            x, t = torch.lerp(videos, noise, level / 1000).bfloat16(), torch.full((16,), level)
            errors.append([(m(x, t, prompts).sample - (noise - videos)).square().mean().item() for m in (remix, start)])
    assert all(trained < 0.9 * before for trained, before in errors), errors
    for file in ("my-lora_high_noise.safetensors", "my-lora_low_noise.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
