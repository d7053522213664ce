"""The presets of transformers of diffusers: names of layers, direction of the times, and experts of tiny models."""

import copy
import importlib
import re

import pytest
import torch
from conftest import ROOT, relative
from tiny_pipelines import RUNS, run
from tiny_transformers import EXPERTS, TINY, Tiny, arguments_of, randomize, tiny
from torch import Tensor, nn

from interop.expert_folder import find_expert, write_experts
from mixing.presets import PRESETS, WITHOUT_PRESET, Preset
from remix import Remix
from runtime.errors import UserError
from sampling.experts import FoldedRemix


def make(name: str, **options) -> tuple[Remix, dict]:
    """A Remix with random bases, and the arguments of four samples of three experts."""
    remix = randomize(Remix(tiny(name), n_experts=4, **options))
    return remix, arguments_of(name)


def result(output) -> Tensor:
    """What a transformer returns, as one tensor: of video and audio [B, ...], or of a list of images."""
    parts = [output.sample, getattr(output, "audio_sample", None)]
    parts = [torch.stack(list(part)) if isinstance(part, list | tuple) else part for part in parts if part is not None]
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)


def sample(remix: Remix, arguments: dict, i: int) -> dict:
    """The arguments of sample i."""
    return remix.arguments.take(torch.tensor([i]), len(EXPERTS), (), arguments)[1]


def loss(remix: Remix, arguments: dict, call=None) -> Tensor:
    # Some classes drop labels in training.
    torch.manual_seed(0)
    return result((remix if call is None else call)(**arguments, groups=4)).square().sum()


def gradients(remix: Remix, arguments: dict, call=None) -> dict[str, Tensor]:
    remix.zero_grad()
    loss(remix, arguments, call).backward()
    return {name: parameter.grad.clone() for name, parameter in remix.named_parameters() if parameter.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]):
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-4 * max(value.norm(), 1e-3 * largest), name


def installed() -> dict[str, Tiny]:
    """The classes that the installed version of diffusers has."""
    module = importlib.import_module("diffusers")
    return {name: model for name, model in TINY.items() if hasattr(module, name)}


def test_presets_name_the_layers_of_every_class():
    """Every linear of the attention and of the MLPs in the blocks is mixed, but for what the presets leave out."""
    kinds = "joint_transformer_|single_transformer_|visual_transformer_|temporal_transformer_|transformer_|double_"
    kinds += "|double_stream_|single_stream_|txt_mode_|vace_|"
    blocks = re.compile(rf"(({kinds})blocks|mode_blocks\.\w+|layers|noise_refiner|face_adapter)\.\d+\.")
    not_mixed = r"norm|modulation|_mod\.|adaln|vace_blocks\.\d+\.proj_|ff_i\.experts|img_mlp\.gate$"
    not_mixed = re.compile(rf"{not_mixed}|encoder_proj|plucker_proj")
    for name, model in installed().items():
        with torch.device("meta"):
            module = getattr(importlib.import_module("diffusers"), name)(**model.settings)
            linears = {key for key, part in module.named_modules() if isinstance(part, nn.Linear)}
            remix = Remix(module, n_experts=4, rank=2)
        expected = {key for key in linears if blocks.match(key) and not not_mixed.search(key)}
        if name == "ErnieImageTransformer2DModel":
            expected = {key for key in expected if ".mlp." not in key}
        assert {key for key, _ in remix.mixed()} == expected, name
        assert remix.boundaries[-1] == PRESETS[name].highest_level


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_experts_of_every_class(name, tmp_path, monkeypatch):
    """What the table of docs/any-transformer.md says of a class."""
    if name == "Kandinsky6SRTransformer3DModel":
        # PyTorch refuses gradients of FlexAttention on CPUs, although only its compiled form has none.
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    without = TINY[name].without
    check_experts(name)
    check_training(name, without)
    check_pipeline(name, without)
    check_files(name, without, tmp_path)


def check_experts(name: str):
    """Mixed batches and groups equal folded experts, for both kinds of bases."""
    for options in ({}, {"rank": 2}):
        remix, arguments = make(name, **options)
        assert remix.expert_index(remix.times(**arguments)).tolist() == EXPERTS
        with torch.no_grad():
            alone = [result(remix.expert(e)(**sample(remix, arguments, i))) for i, e in enumerate(EXPERTS)]
            alone = torch.cat(alone)
            assert relative(result(remix(**arguments)), alone) < 1e-4
            assert relative(result(remix(**arguments, groups=4)), alone) < 1e-4
            assert relative(result(remix.expert(0)(**arguments)), alone) > 1e-3, "the experts differ"
        for cache in PRESETS[name].caches:
            with pytest.raises(ValueError, match=f"{cache} would pass activations of one expert"):
                remix(**arguments, **{cache: object()})


def check_training(name: str, without: dict[str, str]):
    """A step reduces the loss. Compilation and checkpointing do not change the gradients, as far as they exist."""
    remix, arguments = make(name)
    expected = gradients(remix.train(), arguments)
    trained = {"coefficients.logits", *(f"backbone.{key}" for key, _ in remix.mixed())}
    with_gradients = {key if key in trained else key.rpartition(".")[0] for key, grad in expected.items() if grad.any()}
    assert trained - with_gradients == {f"backbone.{key}" for key in TINY[name].unused}
    # The graph of a class may be captured only after a first call, which fills its buffers of positions.
    torch._dynamo.reset()
    compiled = torch.compile(remix, backend="eager", fullgraph=True)
    if "compile" in without:
        # Neither does that of the plain class.
        plain = torch.compile(tiny(name), backend="eager", fullgraph=True)
        with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
            plain(**arguments)
    else:
        assert_close(gradients(remix, arguments, compiled), expected)
    assert remix._supports_gradient_checkpointing == ("checkpointing" not in without)
    if "checkpointing" not in without:
        remix.enable_gradient_checkpointing()
        assert_close(gradients(remix, arguments), expected)
    before = loss(remix, arguments).item()
    size = 0.01 * before / sum(grad.square().sum().item() for grad in expected.values())
    with torch.no_grad():
        for key, grad in expected.items():
            remix.get_parameter(key).sub_(size * grad)
        assert 0.98 * before < loss(remix, arguments) < 0.995 * before


def check_pipeline(name: str, without: dict[str, str]):
    """Its pipeline passes the levels of the preset, from the most noise on, to a Remix and to a FoldedRemix."""
    remix = randomize(Remix(tiny(name, **RUNS[name].settings), n_experts=4, rank=2), 0.5).eval()
    used = []

    def record(module, args, kwargs):
        used.extend(remix.expert_index(remix.times(*args, **kwargs)).tolist())

    handle = remix.register_forward_pre_hook(record, with_kwargs=True)
    mixed = run(name, remix)
    handle.remove()
    assert used[0] == 3 and used == sorted(used, reverse=True) and len({*used}) > 2
    assert relative(run(name, FoldedRemix(remix)), mixed) < 1e-3
    assert relative(run(name, remix.expert(0)), mixed) > 0.01


def check_files(name: str, without: dict[str, str], folder):
    """Files of LoRA are read by the pipeline, or by the transformer if its pipeline has no function for it."""
    plain = tiny(name, **RUNS[name].settings)
    remix = randomize(Remix(copy.deepcopy(plain), n_experts=4, rank=2), 0.5).eval()
    remix.freeze_shared()
    if "LoRA" in without:
        with pytest.raises(UserError, match="have no load_lora_weights"):
            write_lora(remix, folder)
        return
    write_lora(remix, folder)
    expected = run(name, remix.expert(3))
    assert relative(run(name, remix.expert(0)), expected) > 0.01
    file = dict(weight_name="expert3.safetensors", adapter_name="expert3")
    by_pipeline = TINY[name].lora == "pipeline"

    def read(pipe):
        assert hasattr(pipe, "load_lora_weights") == by_pipeline
        if by_pipeline:
            pipe.load_lora_weights(folder, **file)

    if not by_pipeline:
        plain.load_lora_adapter(folder, **file)
    assert relative(run(name, plain, read), expected) < 1e-3


def write_lora(remix: Remix, folder):
    write_experts(remix, folder, lora=True, dtype=torch.float32)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(1, 1)})])

    def forward(self, x, t, cache=None):
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


def table() -> list[str]:
    """The lines of the table of docs/any-transformer.md: the presets, and what `test_experts_of_every_class` tests."""
    columns = ("class", "argument", "highest level", "that is", "pipeline", "compile", "checkpointing", "LoRA files")
    lines = [columns, ["---"] * len(columns)]
    for name, preset in sorted(PRESETS.items()):
        tested = {
            "pipeline": RUNS[name].pipeline,
            "compile": "yes",
            "checkpointing": "yes",
            "LoRA": f"{TINY[name].lora}",
        }
        tested |= {what: f"no: {reason}" for what, reason in TINY[name].without.items()}
        end = "data" if preset.reverses else "noise"
        lines.append([f"`{name}`", f"`{preset.timestep}`", f"{preset.highest_level:g}", end, *tested.values()])
    return [f"| {' | '.join(line)} |" for line in lines]


def test_activations_of_another_expert_are_refused(monkeypatch):
    monkeypatch.setitem(PRESETS, "Denoiser", Preset(["layers.*.a"], timestep="t", highest_level=1, caches=("cache",)))
    remix = Remix(Denoiser(), n_experts=4)
    for call in (remix, FoldedRemix(remix)):
        with pytest.raises(ValueError, match="cache would pass activations of one expert of the Denoiser to another"):
            call(torch.zeros(1, 1), torch.zeros(1), object())
        call(torch.zeros(1, 1), torch.zeros(1), cache=None)


def test_a_cache_of_keys_and_values_is_refused():
    """That of diffusers for the text in Nucleus. Other caches are enabled in the module."""
    enabled = []

    class Cached(Denoiser):
        def enable_cache(self, config):
            enabled.append((type(self), config))

    class TextKVCacheConfig:
        pass

    remix = Remix(Cached(), ["layers.*.a"], timestep="t", highest_level=1, n_experts=4)
    for module in (remix, FoldedRemix(remix)):
        with pytest.raises(ValueError, match="a TextKVCacheConfig would pass keys and values of one expert to another"):
            module.enable_cache(TextKVCacheConfig())
        module.enable_cache("another")
    assert enabled == [(Cached, "another")] * 2
    with pytest.raises(AttributeError, match="'Denoiser' object has no attribute 'enable_cache'"):
        Remix(Denoiser(), ["layers.*.a"], timestep="t", highest_level=1, n_experts=4).enable_cache("another")


def test_a_class_without_a_preset_says_why(monkeypatch):
    monkeypatch.setitem(WITHOUT_PRESET, "Denoiser", "its times are secret")
    with pytest.raises(ValueError, match="layers and timestep must be given for a Denoiser: its times are secret"):
        Remix(Denoiser(), n_experts=4)


def test_the_documentation_lists_the_classes():
    page = (ROOT / "docs" / "any-transformer.md").read_text()
    for lines in (table(), [f"| `{name}` | {reason} |" for name, reason in sorted(WITHOUT_PRESET.items())]):
        text = "\n".join(lines)
        assert text in page, f"docs/any-transformer.md lacks this table:\n{text}"
    assert {*TINY} == {*RUNS} == {*PRESETS}


def test_every_class_of_the_installed_diffusers_has_a_preset_or_a_reason():
    names = {
        name
        for name in dir(importlib.import_module("diffusers"))
        if re.fullmatch(r"\w*(Transformer|DiT)[23]DModel", name)
    }
    assert names <= {*PRESETS, *WITHOUT_PRESET}


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
