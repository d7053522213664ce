"""A backbone that is no DiT needs its class and one record: everything else accepts it and a Remix of it."""

import json

import numpy as np
import pytest
import torch
from conftest import FEW_SAMPLES, relative, run, training_flags
from torch.utils.checkpoint import checkpoint
from toy_backbone import TOY, Toy

import models
from checkpoint import build_model, load_model, model_config
from interop.own import save_checkpoint, save_safetensors
from models import DIT, DiT_models, build_plain, find_backbone, find_model, model_names
from remix import RemixDiT, build_remix
from runtime.errors import UserError
from sampling.experts import FoldedRemix
from sampling.loading import load_denoiser
from training.experts import experts_of
from training.initial import InitialWeights, make_model

SHAPE = dict(input_size=4, in_channels=3, num_classes=5)
# One sample of each of the experts with equal intervals of N = 4.
TIMES = torch.tensor([10, 260, 510, 999])


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The record is registered."""
    monkeypatch.setitem(models.BACKBONES, "Toy", TOY)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 4, 4, generator=generator), TIMES, torch.tensor([0, 1, 4, 5])


def random_remix(**options) -> RemixDiT:
    torch.manual_seed(0)
    remix = build_remix("RemixToy-S", **SHAPE, n_basis=2, n_experts=4, **options)
    for _, layer in remix.mixed():
        for basis in layer.bases():
            basis.data += 0.3 * torch.randn_like(basis)
    return remix.eval()


def save(path, model, name):
    config = {"model": model_config(name, model), "diffusion": {"process": "gaussian"}, "training": None}
    config["data"] = {"image_size": 4, "classes": None, "vae": "none", "scale": 1.0, "shift": 0.0}
    state = model.state_dict()
    save_checkpoint(path, {"config": config, "model": state, "ema": state})
    return config


def test_names():
    assert {"Toy-S", "Toy-M", "RemixToy-S", "RemixToy-M", "DiT-S/2", "RemixDiT-XL/8"} < set(model_names())
    assert find_model("RemixToy-M") == (TOY, "M", True)
    assert find_model("DiT-S/2") == (DIT, "S/2", False)
    for unknown in ("Toy", "Toy-L", "RemixRemixToy-S", "custom"):
        with pytest.raises(KeyError):
            find_model(unknown)
    toy = build_plain("Toy-S", **SHAPE)
    assert find_backbone(toy) is TOY
    assert TOY.find_size(toy.config) == "S"
    with pytest.raises(ValueError, match="a Linear is none of the backbones DiT, LightningDiT, DiTDH, Toy"):
        find_backbone(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"scope": "local", "boundaries": [0, 100, 400, 700, 1000]}])
@torch.no_grad()
def test_a_folded_expert_equals_the_mixed_one(options):
    remix = random_remix(**options)
    x, t, y = inputs()
    out = remix(x, t, y)
    assert relative(remix(x, t, y, groups=4), out) < 1e-5
    folded = FoldedRemix(remix)
    for i, sample in enumerate(zip(x.split(1), t.split(1), y.split(1), strict=True)):
        assert remix.expert_index(int(t[i])) == i
        assert relative(remix.expert(i)(*sample), out[i : i + 1]) < 1e-5
        assert relative(folded(*sample), out[i : i + 1]) < 1e-5
        assert relative(remix.expert(3 - i)(*sample), out[i : i + 1]) > 1e-3
    assert type(remix.expert(0)) is Toy


def test_which_layers_are_mixed():
    remix = random_remix(layers=[*TOY.mixed_layers, *TOY.modulation])
    names = [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "modulation")
    ]
    assert sorted(name for name, _ in remix.mixed()) == sorted(names)
    fresh = build_remix("Toy-S", **SHAPE, layers=[*TOY.mixed_layers, *TOY.modulation])
    assert not fresh.backbone.layers[0].modulation.weight.any(), "modulation starts at zero"
    assert not torch.equal(*fresh.backbone.layers[0].attn.qkv.weight[:2]), "bases are drawn separately"


@pytest.mark.parametrize("name", ["Toy-S", "RemixToy-S"])
def test_it_is_saved_and_loaded(tmp_path, name):
    model = random_remix(scope="local") if name.startswith("Remix") else build_plain(name, **SHAPE)
    config = save(tmp_path / "a.pt", model, name)
    save_safetensors(tmp_path / "a.safetensors", model, config)
    assert config["model"]["architecture"] == "Toy"
    assert model_config(name, build_model(config["model"])) == config["model"]
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        back, back_config = load_model(path, model=name, width=16)
        assert back_config == config
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
        with pytest.raises(UserError, match="holds width=16, not 24"):
            load_model(path, width=24)
    denoiser, _ = load_denoiser([tmp_path / "a.pt"])
    x, _, y = inputs()
    t = torch.full((4,), 300)
    with torch.no_grad():
        assert relative(denoiser(x, t, y), model.eval()(x, t, y)) < 1e-5


def test_an_unknown_architecture_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "a.pt", build_plain("Toy-S", **SHAPE), "Toy-S")
    monkeypatch.delitem(models.BACKBONES, "Toy")
    with pytest.raises(UserError, match="its architecture is 'Toy', which is none of DiT"):
        load_model(tmp_path / "a.pt")


def test_it_is_converted(tmp_path):
    remix = random_remix()
    save(tmp_path / "a.pt", remix, "RemixToy-S")
    run("convert.py", tmp_path / "a.pt", tmp_path / "all.safetensors", "--to=safetensors")
    assert load_model(tmp_path / "all.safetensors")[1]["model"] == model_config("RemixToy-S", remix)
    run("convert.py", tmp_path / "a.pt", tmp_path / "one.safetensors", "--to=safetensors", "--expert=2")
    expert, config = load_model(tmp_path / "one.safetensors")
    assert config["model"] == model_config("Toy-S", remix.expert(2))
    assert all(torch.equal(value, expert.state_dict()[key]) for key, value in remix.expert(2).state_dict().items())
    for to in ("original", "dit", "sit", "diffusers"):
        stderr = run("convert.py", tmp_path / "a.pt", tmp_path / "out", "--to", to, expect=2).stderr
        assert f"--to {to} is for a DiT, {tmp_path / 'a.pt'} holds a Toy" in stderr
    run("visualize.py", "coefficients", tmp_path / "a.pt", "--out", tmp_path / "coefficients.png")
    stderr = run("visualize.py", "coefficients", tmp_path / "one.safetensors", expect=2).stderr
    assert "holds a plain Toy, which has no mixing coefficients" in stderr


def test_its_operations_are_counted():
    tokens, width = 16, 16
    block = 2 * tokens * width * (3 * width + width + 4 * width + 2 * width) + 2 * 2 * tokens**2 * width
    expected = 2 * block + 2 * (2 * width * width) + 2 * width + 2 * 2 * tokens * 3 * width
    assert TOY.count_flops(build_plain("Toy-S", **SHAPE).config) == expected


def test_new_classes_keep_embeddings():
    toy = build_plain("Toy-S", **SHAPE)
    old = toy.classes.weight.clone()
    TOY.reset_classes(toy, 3, {2: 4})
    assert toy.config["num_classes"] == 3
    assert torch.equal(toy.classes.weight[[2, 3]], old[[4, 5]]), "a class and the null class"
    assert not torch.isin(toy.classes.weight[:2], old).any()


def test_it_starts_a_run(tmp_path):
    """From its own weights, as experts, with other classes; but not from the weights of another backbone."""
    toy = build_plain("Toy-S", **SHAPE)
    save(tmp_path / "toy.pt", toy, "Toy-S")
    mixing = dict(n_basis=2, n_experts=4, boundaries=None)
    started = make_model("RemixToy-S", SHAPE, mixing, 8.0, InitialWeights(tmp_path / "toy.pt"))
    assert all(torch.equal(basis, toy.layers[1].mlp.w3.weight) for basis in started.backbone.layers[1].mlp.w3.weight)
    other = make_model(
        "Toy-S", SHAPE | {"num_classes": 7}, None, 8.0, InitialWeights(tmp_path / "toy.pt", new_classes=True)
    )
    assert other.classes.weight.shape == (8, 16)
    save(tmp_path / "remix.pt", started, "RemixToy-S")
    make_model("RemixToy-S", SHAPE, mixing, 8.0, InitialWeights(tmp_path / "remix.pt"))
    save(tmp_path / "dit.pt", DiT_models["DiT-T/2"](**SHAPE), "DiT-T/2")
    for file, name, wanted, message in (
        ("dit.pt", "Toy-S", None, "holds a DiT, this run trains a Toy"),
        ("toy.pt", "Toy-M", None, "has width=16, this run needs 24"),
        ("remix.pt", "Toy-S", None, "holds a RemixDiT, which cannot start a Toy-S"),
        ("remix.pt", "RemixToy-S", mixing | {"n_basis": 3}, "has n_basis=2, this run asks for 3"),
    ):
        with pytest.raises(UserError, match=message):
            make_model(name, SHAPE, wanted, 8.0, InitialWeights(tmp_path / file))


def test_its_blocks_can_run_again_in_the_backward_pass():
    gradients = []
    for again in (False, True):
        remix = random_remix()
        for block in TOY.find_blocks(remix.backbone) if again else ():
            contexts = remix.batch_coefficients.contexts
            block.forward = _repeated(block.forward, contexts)
        remix(*inputs(), groups=4).square().mean().backward()
        gradients.append([p.grad for p in remix.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def _repeated(forward, contexts):
    return lambda *args: checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize(
    ("process", "model"),
    [
        ("gaussian", "RemixToy-S"),
        ("flow", "Toy-S"),
        pytest.param("gaussian", "Toy-S", marks=pytest.mark.slow),
        pytest.param("flow", "RemixToy-S", marks=pytest.mark.slow),
    ],
)
def test_it_is_trained_scored_and_sampled(features, tmp_path, model, process):
    """With pictures, held-out losses, recomputed activations, a dry run and a resumed run."""
    flags = [
        *training_flags(features, tmp_path, "run", model),
        f"--process={process}",
        "--ckpt-every=2",
        "--sample-every=2",
    ]
    report = run("train_fast.py", *flags, "--dry-run").stdout
    assert f"{model}: " in report and "TFLOP per step and GPU" in report
    refused = run("train_fast.py", *flags, "--timestep-frequencies=diffusers", expect=2).stderr
    assert "--timestep-frequencies: a Toy has no such option" in refused
    flags += ["--score-every=2", f"--held-out={features}", "--checkpoint-activations"]
    run("train_fast.py", *flags, "--max-steps=4")
    last = tmp_path / "run/checkpoints/0000004.pt"
    whole = torch.load(last, weights_only=True)["model"]
    last.unlink()
    (tmp_path / "run/metrics.jsonl").unlink()
    run("train_fast.py", *flags, "--max-steps=4", "--resume=auto")
    resumed = torch.load(last, weights_only=True)
    assert resumed["config"]["model"]["architecture"] == "Toy"
    assert all(torch.equal(value, resumed["model"][key]) for key, value in whole.items())
    assert (tmp_path / "run/samples/0000004.png").exists()
    assert (tmp_path / "run/coefficients/0000004.png").exists() == model.startswith("Remix")
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "held_out_loss" in metrics[-1]
    run("sample_ddp.py", "--ckpt", last, f"--sample-dir={tmp_path}", "--name=out", *FEW_SAMPLES)
    with np.load(tmp_path / "out/samples.npz") as samples:
        assert samples["arr_0"].shape == (14, 8, 8, 3)


def test_the_operations_of_its_low_rank_bases_are_counted():
    experts = experts_of(random_remix(rank=2))
    pairs = sum(p.numel() for layer in experts.layers.values() for p in layer.bases())
    assert experts.low_rank_flops() == 3 * 2 * pairs * 16, "each pair is applied to 16 tokens"
    assert experts_of(random_remix()).low_rank_flops() == 0
