"""diffusers' layout, read and written. Exported folders run in a process that cannot import this project."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, relative, run, training_flags
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint import load_model, model_config
from diffusion import as_denoiser, create_process
from diffusion.intervals import LEVEL_DTYPES, equal_boundaries, inner_boundaries
from features.autoencoder import Normalization, load_autoencoder
from interop import diffusers
from interop.own import fingerprint, save_checkpoint
from models import DIT, DiT, DiT_models
from remix import RemixDiT_models
from runtime.errors import UserError
from runtime.processes import seed_for
from sampling.experts import FoldedRemix
from sampling.guidance import GuidedDenoiser, make_schedule
from sampling.loading import load_denoiser

LABELS = [2, 0, 1]
# Of two flows, what a file records, and what is read back. The first is a bare state dict that the user calls a flow.
FLOW = {"process": "flow", "path": "linear", "prediction": "velocity"}
FLOWS = {"flow-dit": ({"process": "flow"}, FLOW), "flow-remix": (FLOW | {"shift": 3.0}, FLOW | {"shift": 3.0})}


def perturbed(model):
    """Add noise to all weights of a model. Modulation and output layers start at zero, which would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad and name != "logits":
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model.eval()


def save(path, model, name, data, diffusion=None):
    """Save a model whose EMA weights are its raw weights."""
    config = {"model": model_config(name, model), "diffusion": diffusion or {}, "data": data, "training": {}}
    save_checkpoint(path, {"config": config, "model": model.state_dict(), "ema": model.state_dict()})
    return path


def make_transformer(**changes):
    """Make a random DiTTransformer2DModel whose blocks have equal embedders, as converted DiTs have."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    shape = dict(
        num_attention_heads=3, attention_head_dim=16, in_channels=3, out_channels=6, num_layers=3, sample_size=8
    )
    model = DiTTransformer2DModel(**shape | dict(num_embeds_ada_norm=3, norm_eps=1e-6) | changes)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def make_scheduler_config(name: str, **changes) -> dict:
    """Return the config that a scheduler of diffusers stores."""
    import diffusers as theirs

    return json.loads(getattr(theirs, name)(**changes).to_json_string())


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """The folder of a DiTTransformer2DModel."""
    path = tmp_path_factory.mktemp("hub") / "dit"
    make_transformer().save_pretrained(path)
    return path


def published(model):
    """Give diffusers' class the timestep frequencies of facebookresearch/DiT, 10000^(-i/128)."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def batch(channels: int = 3):
    """Return noisy images, timesteps and labels, one of which is the null class."""
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([0, 1, 250, 499, 500, 999])
    return torch.randn(6, channels, 8, 8, generator=generator), t, torch.tensor([0, 1, 2, 3, 0, 1])


@torch.no_grad()
def run_model(model) -> torch.Tensor:
    """Return a model's outputs for `batch`, of this project or of diffusers."""
    out = model(*batch())
    return out if isinstance(out, torch.Tensor) else out.sample


@torch.no_grad()
def test_outputs_equal_those_of_diffusers(transformer, tmp_path):
    model, config = load_model(transformer)
    assert isinstance(model, DiT)
    assert (config["model"]["name"], model.config["input_size"], model.num_classes) == ("DiT-T/2", 8, 3)
    assert relative(model(*batch()), published(make_transformer())(*batch()).sample) < 1e-5
    torch.save(load_file(transformer / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text((transformer / "config.json").read_text())
    assert torch.equal(load_model(tmp_path)[0](*batch()), model(*batch())), "older folders hold a .bin file"
    assert fingerprint(tmp_path) != fingerprint(transformer)
    with pytest.raises(UserError, match="num_heads=3, not 4"):
        load_model(transformer, num_heads=4)
    with pytest.raises(UserError, match="not DiT-S/2"):
        load_model(transformer, model="DiT-S/2")


def test_a_folder_starts_training_and_sampling(transformer, features, vae, tmp_path):
    from diffusers import AutoencoderKL

    flags = [*training_flags(features, tmp_path, "warm"), "--max-steps=1", "--lr=1e-9", "--coeff-lr=0"]
    run("train_fast.py", *flags, "--load-weight", transformer)
    started, _ = load_model(tmp_path / "warm/checkpoints/0000001.pt")
    base = load_model(transformer)[0].blocks[1].attn.qkv.weight
    torch.testing.assert_close(started.expert(4).blocks[1].attn.qkv.weight, base, rtol=1e-5, atol=1e-6)

    folder = tmp_path / "pipeline"
    make_transformer(in_channels=4, out_channels=8).save_pretrained(folder / "transformer")
    AutoencoderKL.from_pretrained(vae).save_pretrained(folder / "vae")
    assert load_model(folder)[1]["data"] == {
        "image_size": 16,
        "classes": None,
        "vae": str(folder / "vae"),
        "scale": 0.5,
        "shift": 0.0,
    }
    few = ("--num-fid-samples=4", "--num-sampling-steps=3", f"--sample-dir={tmp_path / 'samples'}")
    run("sample_ddp.py", "--ckpt", folder, *few)
    with np.load(tmp_path / "samples/pipeline-ddpm3-cfg1.5-seed0/samples.npz") as file:
        assert file["arr_0"].shape == (4, 16, 16, 3)
    assert "nothing to do" in run("sample_ddp.py", "--ckpt", folder, *few).stdout


def test_the_scheduler_of_a_pipeline_is_read(transformer, tmp_path):
    """What it says of the process is taken, or refused; what concerns sampling only has no effect."""
    shutil.copytree(transformer, tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    config_file, scheduler_file = tmp_path / "transformer/config.json", tmp_path / "scheduler/scheduler_config.json"
    gaussian, published = json.loads(config_file.read_text()), make_scheduler_config("DDIMScheduler")

    def read(scheduler: dict, transformer: dict) -> dict:
        scheduler_file.write_text(json.dumps(scheduler))
        config_file.write_text(json.dumps(transformer))
        with warnings.catch_warnings(action="ignore"):
            return load_model(tmp_path)[1]["diffusion"]

    cosine = {"noise_schedule": "squaredcos_cap_v2"}
    betas = make_scheduler_config("DDPMScheduler", trained_betas=np.linspace(0.0001, 0.02, 1000).tolist())
    taken = [
        (published, {}),
        (make_scheduler_config("DDIMScheduler", timestep_spacing="trailing", steps_offset=1, clip_sample=False), {}),
        (make_scheduler_config("DDPMScheduler", variance_type="learned_range"), {}),
        (betas, {}),
        (make_scheduler_config("DPMSolverMultistepScheduler", beta_schedule="squaredcos_cap_v2"), cosine),
        (make_scheduler_config("DDIMScheduler", prediction_type="sample"), {"predict_xstart": True}),
        (
            make_scheduler_config("DDPMScheduler", num_train_timesteps=500, beta_start=0.0002, beta_end=0.04),
            {"diffusion_steps": 500},
        ),
    ]
    for scheduler, expected in taken:
        assert read(scheduler, gaussian) == {"process": "gaussian"} | expected
        create_process(**expected)
    flow = gaussian | {"flow": {"path": "linear", "prediction": "velocity", "shift": 3.0}}
    assert read(make_scheduler_config("FlowMatchEulerDiscreteScheduler", shift=3.0), flow)["shift"] == 3
    unipc = make_scheduler_config("UniPCMultistepScheduler", use_flow_sigmas=True, flow_shift=3.0)
    assert read(unipc, flow)["shift"] == 3
    refused = [
        (
            make_scheduler_config("DDIMScheduler", beta_schedule="scaled_linear"),
            gaussian,
            "beta_schedule=scaled_linear",
        ),
        (make_scheduler_config("DDIMScheduler", beta_end=0.012), gaussian, "beta_end=0.012"),
        (make_scheduler_config("DDIMScheduler", num_train_timesteps=500), gaussian, "num_train_timesteps=500"),
        (make_scheduler_config("DDIMScheduler", rescale_betas_zero_snr=True), gaussian, "zero_snr=True"),
        (make_scheduler_config("DDIMScheduler", prediction_type="v_prediction"), gaussian, "prediction_type=v_pred"),
        (make_scheduler_config("DDPMScheduler", variance_type="learned"), gaussian, "variance_type=learned"),
        (make_scheduler_config("FlowMatchEulerDiscreteScheduler"), gaussian, "of another process"),
        (unipc, gaussian, "of another process"),
        (make_scheduler_config("EDMEulerScheduler"), gaussian, "not a scheduler of Gaussian diffusion"),
        (published, flow, "of another process"),
        (make_scheduler_config("FlowMatchEulerDiscreteScheduler", shift=1.0), flow, r"has shift=1.0, but .* 3.0"),
        (make_scheduler_config("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True), flow, "shift=dynamic"),
        (make_scheduler_config("FlowMatchEulerDiscreteScheduler", shift=3.0, num_train_timesteps=500), flow, "=500"),
        ([], gaussian, "not the config of a scheduler"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_end": "x"}, gaussian, "not the config of"),
    ]
    for scheduler, config, message in refused:
        with pytest.raises(UserError, match=message) as error:
            read(scheduler, config)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (dict(max_shard_size="100KB"), "diffusion_pytorch_model-*.safetensors"),
        (dict(variant="fp16"), "diffusion_pytorch_model.fp16.safetensors"),
        (dict(variant="bf16", max_shard_size="100KB"), "diffusion_pytorch_model.bf16-*.safetensors"),
        (dict(safe_serialization=False, max_shard_size="100KB"), "diffusion_pytorch_model-*.bin"),
    ],
)
def test_shards_and_variants_are_read(transformer, tmp_path, options, files):
    """Bit for bit, and a change of any file changes the fingerprint."""
    make_transformer().save_pretrained(tmp_path, **options)
    expected, _ = load_model(transformer)
    back, _ = load_model(tmp_path)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in expected.state_dict().items())
    present = sorted(tmp_path.glob(files))
    assert (len(present) > 2) == ("max_shard_size" in options)
    before = fingerprint(tmp_path)
    if len(present) > 1:
        shutil.copy(present[0], present[-1])
        assert fingerprint(tmp_path) != before

    # Whole weights without a variant precede those of a variant.
    if "variant" in options:
        make_transformer(num_layers=2).save_pretrained(tmp_path / "whole")
        for path in [*present, *tmp_path.glob("*.index.*")]:
            shutil.copy(path, tmp_path / "whole" / path.name)
        assert load_model(tmp_path / "whole")[0].config["depth"] == 2


def test_incomplete_shards_and_several_variants(transformer, tmp_path):
    for variant in ("fp16", "bf16"):
        make_transformer().save_pretrained(tmp_path / "variants", variant=variant)
    with pytest.raises(UserError, match="variants bf16 and fp16, and no weights without a variant"):
        load_model(tmp_path / "variants")
    folder = tmp_path / "shards"
    make_transformer().save_pretrained(folder, max_shard_size="100KB")
    index, shard = folder / "diffusion_pytorch_model.safetensors.index.json", sorted(folder.glob("*-of-*"))[2]
    content = json.loads(index.read_text())
    last = list(content["weight_map"])[-1]
    for damage, message in (
        (lambda: shard.rename(folder / "other"), f"{shard.name}, which is missing"),
        (
            lambda: index.write_text(json.dumps({"weight_map": {"x": "../variants/config.json"}})),
            "not the name of a file",
        ),
        (lambda: index.write_text("[]"), "not an index"),
        (lambda: index.write_text(json.dumps({"weight_map": {last: content["weight_map"][last]}})), "is missing"),
    ):
        damage()
        with pytest.raises(UserError, match=message) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)


def constant_transformer(dtype: torch.dtype, flow: bool, learned: bool):
    """Return a transformer that predicts -0.75 for class 0, and -0.5 for the null class, exact in every type."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    class Constant(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, in_channels=3, sample_size=4, num_embeds_ada_norm=1, flow=None):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, t, y):
            assert x.dtype == self.dtype, "the network gets its own type"
            out = (-0.75 + 0.25 * y).to(x.dtype)[:, None, None, None].expand(-1, 6 if learned else 3, 4, 4)
            return Transformer2DModelOutput(out * self.scale)

    return Constant(flow={"path": "linear"} if flow else None).to(dtype)


@pytest.mark.parametrize("scale", [1, 2.5])
@pytest.mark.parametrize(
    "name",
    [
        "DDPM",
        "DDIM",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "EulerDiscrete",
        "FlowMatchEulerDiscrete",
        "FlowMatchHeunDiscrete",
    ],
)
def test_a_pipeline_in_reduced_precision_steps_in_float32(name, scale):
    """A network whose output is exact in bfloat16 gives the latents of float32, bit for bit."""
    import diffusers as theirs

    from interop.diffusers_files.pipeline import RemixDiTPipeline

    flow, learned = name.startswith("FlowMatch"), name == "DDPM"
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scheduler = getattr(theirs, f"{name}Scheduler")(**{"variance_type": "learned_range"} if learned else {})
        pipe = RemixDiTPipeline(constant_transformer(dtype, flow, learned), scheduler)
        pipe.set_progress_bar_config(disable=True)
        guide = constant_transformer(torch.float32, flow, learned)
        settings = dict(class_labels=[0], num_inference_steps=50, guidance_scale=scale, output_type="latent")
        for options in ({"latents": torch.ones(1, 3, 4, 4, dtype=dtype)}, {}, {"guide": guide}):
            x = pipe(**settings, generator=torch.Generator().manual_seed(0), **options).images
            assert x.dtype == torch.float32
            results.append(x)
    assert all(torch.equal(x, results[i % 3]) for i, x in enumerate(results))
    if name == "FlowMatchEulerDiscrete":
        # From noise to data the time runs from 1 to 0, and the pipeline negates the velocity.
        velocity = -0.75 if scale == 1 else -0.5 + 2.5 * -0.25
        torch.testing.assert_close(results[0], torch.full_like(results[0], 1 + velocity), rtol=0, atol=1e-5)


def change(folder, config: dict | None = None, **tensors):
    """Change entries of a folder's config and tensors. None removes an entry."""
    stored = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({key: v for key, v in stored.items() if v is not None}))
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | tensors
    save_file({key: value for key, value in state.items() if value is not None}, file)


TABLE = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f, {"_class_name": "UNet2DModel"}), "a UNet2DModel, not a DiTTransformer2DModel"),
        (lambda f: change(f, {"norm_type": "ada_norm"}), "norm_type=ada_norm"),
        (lambda f: change(f, {"_class_name": "Transformer2DModel", "activation_fn": None}), "activation_fn=None"),
        (lambda f: change(f, {"norm_eps": 0.1}), "norm_eps=0.1"),
        (lambda f: change(f, {"num_embeds_ada_norm": 7}), "num_embeds_ada_norm=7"),
        (lambda f: change(f, {"num_layers": 2}), "has num_layers=2, but its tensors have 3"),
        (lambda f: change(f, {"in_channels": 4}), "has in_channels=4, but its tensors have 3"),
        (lambda f: change(f, {"out_channels": 3}), "has out_channels=3, but its tensors have 6"),
        (lambda f: change(f, {"patch_size": 4}), "has patch_size=4, but its tensors have 2"),
        (lambda f: change(f, {"attention_head_dim": 24}), "3 heads of 24"),
        (lambda f: change(f, {"sample_size": 10**9}), "500000000 patches per side"),
        (lambda f: change(f, {"sample_size": None}), "'sample_size' is missing"),
        (lambda f: change(f, {"sample_size": "8"}), "no DiT in diffusers' layout"),
        (lambda f: change(f, **{TABLE: torch.ones(4, 48)}), "different values of class_embedder.embedding_table"),
        (lambda f: change(f, **{"proj_out_2.bias": None}), "'proj_out_2.bias' is missing"),
        (lambda f: change(f, **{"transformer_blocks.999999999.attn1.to_q.weight": torch.ones(1)}), "is missing"),
        (lambda f: change(f, **{"transformer_blocks.0.attn1.to_q.weight": torch.ones(1, 2, 3)}), "holds no DiT"),
        (
            lambda f: change(f, **{"adapter.weight": torch.ones(1)}),
            "tensors that a DiT does not have, such as adapter.weight",
        ),
        (lambda f: change(f, **{"proj_out_2.bias": torch.ones(5)}), "(does not fit|but its tensors have)"),
        (lambda f: (f / "config.json").write_text("[1]"), "no DiT in diffusers' layout"),
        (lambda f: (f / "config.json").write_bytes(b"\xff{"), "no DiT in diffusers' layout"),
        (lambda f: (f / "config.json").unlink(), "there is no"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "there is no"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"x"), "not a complete .safetensors file"),
    ],
)
def test_folders_without_a_dit(tmp_path, transformer, damage, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in transformer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_model(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert "folder" in str(caught.value)


def test_a_hub_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = run("sample_ddp.py", "--ckpt", "nobody/DiT-missing", "--sample-dir", tmp_path, expect=2)
    assert "nobody/DiT-missing: not a file or folder, and not found on the Hugging Face hub" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_paths_of_files_are_not_hub_names(tmp_path):
    existing = tmp_path / "x.npz"
    existing.touch()
    for path in ("pretrained/DiT_S_2_2M.pt", "a/b/c", "file", tmp_path / "missing", existing):
        assert diffusers.find_transformer(path) is None
        assert diffusers.read(path, {}, True, {}) is None


@pytest.fixture(scope="module")
def exported(ckpt, vae, tmp_path_factory):
    """Folders of a DiT, an expert, a pixel pipeline, a latent pipeline with a VAE, and pipelines of two flows."""
    path = tmp_path_factory.mktemp("exported")
    dit = perturbed(DiT_models["DiT-T/4"](input_size=8, in_channels=4, num_classes=3, learn_sigma=False))
    shape = dict(input_size=8, in_channels=4, num_classes=3, n_basis=3, n_experts=7, scope="local")
    latent = perturbed(RemixDiT_models["RemixDiT-T/2"](**shape, layers=[*DIT.mixed_layers, *DIT.modulation]))
    data = {"vae": "somewhere", "scale": 0.7, "shift": 0.0, "image_size": 16, "classes": None}
    save(path / "dit.pt", dit, "DiT-T/4", data)
    save(path / "latent.pt", latent, "RemixDiT-T/2", data)
    run("convert.py", path / "dit.pt", path / "dit", "--to", "diffusers")
    run("convert.py", path / "dit.pt", path / "dit-pipeline", "--to", "diffusers", "--vae", vae)
    run("convert.py", ckpt, path / "expert", "--to", "diffusers", "--expert", 4)
    run("convert.py", ckpt, path / "pixels", "--to", "diffusers", "--vae", "none")
    run("convert.py", path / "latent.pt", path / "latents", "--to", "diffusers", "--vae", vae)
    save(path / "flow-dit.pt", dit, "DiT-T/4", data, FLOWS["flow-dit"][0])
    # Two of the steps are on boundaries: with a shift of 3, 0.1 becomes 0.25, and 0.5 becomes 0.75.
    shape = dict(input_size=8, in_channels=4, num_classes=3, n_basis=3, n_experts=4, boundaries=[0, 0.25, 0.6, 0.75, 1])
    remix = perturbed(RemixDiT_models["RemixDiT-T/2"](**shape))
    save(path / "flow-remix.pt", remix, "RemixDiT-T/2", data, FLOWS["flow-remix"][0])
    run("convert.py", path / "flow-dit.pt", path / "flow-dit", "--to", "diffusers", "--vae", vae)
    run("convert.py", path / "flow-remix.pt", path / "flow-remix", "--to", "diffusers")
    return path


USE_EXPORTED = """
import sys
import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline, DiTTransformer2DModel

for name in ("remix", "models", "interop"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")

def load_pipeline(name, **options):
    pipe = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe

given = torch.load("given.pt", weights_only=True)
results = {}
# All models are loaded before one is used, so that diffusers executes the exported code several times.
pipes = {name: load_pipeline(name) for name in ("pixels", "latents")}
models = {name: AutoModel.from_pretrained(name, trust_remote_code=True) for name in ("dit", "expert")}
again = load_pipeline("pixels")
with torch.no_grad():
    for name, model in models.items():
        x, t, y = given[name]
        results[name] = model(x, t, y).sample
        results[f"{name}-stock"] = DiTTransformer2DModel.from_pretrained(name)(x, t, y).sample
        model.save_pretrained(f"{name}-saved")
        saved = AutoModel.from_pretrained(f"{name}-saved", trust_remote_code=True)
        assert torch.equal(saved(x, t, y).sample, results[name])
    for name, pipe in pipes.items():
        published = pipe.scheduler
        settings = dict(class_labels=given["labels"], num_inference_steps=10)
        for sampler, (scheduler, changes) in given["schedulers"].items():
            pipe.scheduler = getattr(diffusers, scheduler).from_config(published.config, **changes)
            draws = [torch.Generator().manual_seed(seed) for seed in given["seeds"]]
            results[f"{name}-{sampler}"] = pipe(**settings, generator=draws, output_type="latent").images
        settings["latents"] = given[f"{name}-noise"]
        x, t, y = given[f"{name}-noise"], torch.full((3,), 700), torch.tensor([0, 1, 3])
        unguided = dict(**settings, guidance_scale=1)
        results[f"{name}-unguided"] = pipe(**unguided, output_type="pt").images
        latent = lambda **options: pipe(**settings, output_type="latent", **options).images
        guided = latent()
        assert torch.equal(latent(guidance_interval=(0, 1000)), guided)
        assert torch.equal(latent(guidance_scale=[(1.5, 0, 300), (1.5, 300, 1000)]), guided)
        results[f"{name}-interval"] = latent(guidance_scale=2.5, guidance_interval=(200, 800))
        results[f"{name}-own-guide"] = latent(guidance_scale=1), latent(guidance_scale=3.0, guide=pipe.transformer)
        results[f"{name}-size"] = [image.size for image in pipe(**settings, output_type="pil").images]
        pipe.scheduler = published
        pipe.save_pretrained(f"{name}-saved")
        draw = lambda pipe: pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="pt").images
        expected = draw(pipe)
        assert torch.equal(draw(load_pipeline(f"{name}-saved")), expected)
        for folder in (name, f"{name}-saved"):
            model = AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True)
            assert torch.equal(model(x, t, y).sample, pipe.transformer(x, t, y).sample)
        own = AutoModel.from_pretrained(name, subfolder="transformer", trust_remote_code=True)
        given_own = load_pipeline(name, transformer=own)
        assert given_own.transformer is own
        assert torch.equal(draw(given_own), expected)
        if name == "pixels":
            assert torch.equal(draw(again), expected)
        # Weights that change in place are used at the next call, without a change of the expert.
        before = model(x, t, y).sample
        model.logits[:, :, 0] += 5
        assert not torch.equal(model(x, t, y).sample, before)
        model.logits[:, :, 0] -= 5
        model.transformer_blocks[1].ff.net[2].weight *= 1.01
        assert not torch.allclose(model(x, t, y).sample, before)
        try:
            pipe.transformer(x, torch.tensor([0, 999, 999]), y)
        except ValueError as error:
            results["several experts"] = str(error)
        for label in (-1, 3):
            try:
                pipe([0, label], num_inference_steps=1)
            except ValueError as error:
                results[f"label {label}"] = str(error)
        few = dict(num_inference_steps=4, output_type="latent")
        twice = pipe([2, 0], num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **few).images
        listed = pipe([2, 2, 0, 0], generator=torch.Generator().manual_seed(0), **few).images
        assert torch.equal(twice, listed)
        one = pipe(1, generator=torch.Generator().manual_seed(0), **few).images
        assert torch.equal(one, pipe([1], generator=torch.Generator().manual_seed(0), **few).images)
    settings = dict(class_labels=given["labels"], latents=given["latents-noise"], num_inference_steps=10)
    pipe = load_pipeline("dit-pipeline")
    results["dit-pipeline-size"] = [image.size for image in pipe(**settings, output_type="pil").images]
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    results["dit-pipeline"] = pipe(**settings, output_type="latent").images
    pipe.save_pretrained("dit-pipeline-saved")
    again = load_pipeline("dit-pipeline-saved")
    assert torch.equal(again(**settings, output_type="latent").images, results["dit-pipeline"])
    for name in ("flow-dit", "flow-remix"):
        settings = dict(class_labels=given["labels"], latents=given["latents-noise"], num_inference_steps=10)
        pipe = load_pipeline(name)
        results[name] = pipe(**settings, output_type="latent").images
        assert torch.equal(pipe(**settings, guidance_interval=(0, 1), output_type="latent").images, results[name])
        pieces = dict(guidance_scale=[(2.5, 0.5, 1), (1.0, 0, 0.3), (2.0, 0.3, 0.5)])
        results[f"{name}-pieces"] = pipe(**settings, **pieces, output_type="latent").images
        pipe.save_pretrained(f"{name}-saved")
        again = load_pipeline(f"{name}-saved")
        assert torch.equal(again(**settings, output_type="latent").images, results[name])
        if name == "flow-dit":
            # diffusers' own class is stored without our code.
            stock = DiTTransformer2DModel.from_pretrained(name, subfolder="transformer")
            load_pipeline(name, transformer=stock).save_pretrained("stock")
            assert type(load_pipeline("stock").transformer) is DiTTransformer2DModel
        if again.vae is not None:
            results["flow-size"] = [image.size for image in again(**settings).images]
        again.scheduler = diffusers.DDPMScheduler()
        try:
            again(**settings)
        except ValueError as error:
            results[f"{name}-scheduler"] = str(error)
    for name, pipe in pipes.items():
        pipe.to(torch.bfloat16)
        assert pipe([0, 1], num_inference_steps=4, output_type="latent").images.isfinite().all()
assert "timm" not in sys.modules
torch.save(results, "results.pt")
"""

# Our samplers: number of steps, the class of diffusers, and the settings that it needs beside those of the export.
SCHEDULERS = {
    "ddpm": ("10", "DDPMScheduler", {}),
    "ddim": ("ddim10", "DDIMScheduler", {"timestep_spacing": "leading"}),
    "dpmpp": ("10", "DPMSolverMultistepScheduler", {}),
    "unipc": ("10", "UniPCMultistepScheduler", {}),
    "euler": ("10", "EulerDiscreteScheduler", {}),
}


@pytest.fixture(scope="module")
def results(exported, tmp_path_factory):
    """The outputs of the exported folders in a process that cannot import this project and has no caches."""
    given = {
        "dit": batch(4),
        "expert": batch(3),
        "labels": LABELS,
        "seeds": [seed_for(0, i) for i in range(3)],
        "schedulers": {sampler: settings for sampler, (_, *settings) in SCHEDULERS.items()},
        "pixels-noise": draw_all(3)(None),
        "latents-noise": draw_all(4)(None),
    }
    torch.save(given, exported / "given.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", USE_EXPORTED]
    done = subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("passed to (Published|Remix)DiT", done.stderr), "the exported classes know their configs"
    return torch.load(exported / "results.pt", weights_only=True)


def draw_all(channels: int):
    """Return a function that draws the noise of sample_ddp.py's first samples, the next one in every call."""
    generators = [torch.Generator().manual_seed(seed_for(0, i)) for i in range(3)]
    return lambda _: torch.stack([torch.randn(channels, 8, 8, generator=g) for g in generators])


@torch.no_grad()
def test_exported_dits_give_our_outputs(exported, results, ckpt):
    for name, model in (("dit", load_model(exported / "dit.pt")[0]), ("expert", load_model(ckpt)[0].expert(4))):
        ours = model(*batch(model.in_channels))
        assert (results[name] - ours).abs().max() < 1e-5 * ours.abs().max()
        stock = relative(results[f"{name}-stock"], ours)
        assert stock > 1e-3, "diffusers' class now has the published frequencies: update the documentation"
        back, _ = load_model(exported / name, **({} if name == "expert" else {"model": "DiT-T/4"}))
        for key, value in model.state_dict().items():
            torch.testing.assert_close(back.state_dict()[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("name", ["pixels", "latents"])
@torch.no_grad()
def test_exported_pipelines_give_our_samples(exported, results, ckpt, name, sampler):
    model, _ = load_denoiser([ckpt if name == "pixels" else exported / "latent.pt"])
    assert isinstance(model, FoldedRemix)
    pixels, labels = name == "pixels", torch.tensor(LABELS)
    draw = draw_all(3 if pixels else 4)

    def denoise(x, t):
        both = [torch.cat(pair) for pair in ((x, x), (t, t), (labels, torch.full_like(labels, 3)))]
        return model.forward_with_cfg(*both, 1.5)[:3]

    noise = draw(None)
    # diffusers' solvers do not clip.
    clip = pixels and sampler in ("ddpm", "ddim")
    sample = create_process().make_sampler(sampler, SCHEDULERS[sampler][0])
    ours = sample(as_denoiser(denoise), noise, clip_denoised=clip, step_noise=draw)
    theirs = results[f"{name}-{sampler}"]
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)
    assert ours.std() > 0.1


@torch.no_grad()
def test_a_dit_of_latents_becomes_a_whole_pipeline(exported, results, vae):
    """With --vae: it gives our samples, holds the VAE with the checkpoint's normalization, and is read back."""
    model, config = load_denoiser([exported / "dit.pt"])
    labels, noise = torch.tensor(LABELS), draw_all(4)(None)
    denoise = GuidedDenoiser(model, labels, 3, make_schedule(1.5, None, 1000))
    ours = create_process(learn_sigma=False).make_sampler("euler", "10")(denoise, noise, clip_denoised=False)
    assert (results["dit-pipeline"] - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)
    assert results["dit-pipeline-size"] == [(16, 16)] * 3
    back, config_back = load_model(exported / "dit-pipeline")
    assert config_back["model"]["backbone"] == config["model"]["backbone"]
    assert config_back["data"]["scale"] == 0.7
    for key, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_exported_flows_give_our_samples(exported, results, name):
    model, config = load_denoiser([exported / f"{name}.pt"])
    labels, noise = torch.tensor(LABELS), draw_all(4)(None)

    def denoise(x, time):
        t = torch.full((6,), time)
        network = model.for_timestep(time) if name == "flow-remix" else model
        return network.forward_with_cfg(torch.cat([x, x]), t, torch.cat([labels, torch.full_like(labels, 3)]), 1.5)[:3]

    ours = create_process(**config["diffusion"]).make_sampler("euler", "10")(denoise, noise)
    theirs = results[name]
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)
    assert (ours - noise).std() > 0.1
    assert "needs a FlowMatch scheduler" in results[f"{name}-scheduler"]


@pytest.mark.parametrize("name", ["pixels", *FLOWS])
@torch.no_grad()
def test_exported_pipelines_guide_in_intervals_as_we_do(exported, results, ckpt, name):
    model, config = load_denoiser([ckpt if name == "pixels" else exported / f"{name}.pt"])
    guidance = (2.5, [200, 800], 1000) if name == "pixels" else ("1@0:0.3,2@0.3:0.5,2.5@0.5:1", None, 1)
    noise = draw_all(3 if name == "pixels" else 4)(None)
    denoise = GuidedDenoiser(model, torch.tensor(LABELS), 3, make_schedule(*guidance))
    ours = create_process(**config["diffusion"]).make_sampler("euler", "10")(denoise, noise, clip_denoised=False)
    theirs = results["pixels-interval" if name == "pixels" else f"{name}-pieces"]
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)
    if name == "pixels":
        unguided, own_guide = results["pixels-own-guide"]
        assert (own_guide - unguided).abs().max() < 1e-4 * unguided.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", FLOWS)
def test_exported_flows_are_read_back(exported, results, name):
    ours, config = load_model(exported / f"{name}.pt")
    for folder in (name, f"{name}-saved"):
        back, config_back = load_model(exported / folder)
        assert config_back["diffusion"] == FLOWS[name][1]
        assert config_back["model"] == config["model"]
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in ours.state_dict().items())
    assert results["flow-size"] == [(16, 16)] * 3, "a flow DiT's pipeline holds the VAE"


@torch.no_grad()
def test_exported_pipelines_decode_as_we_do(exported, results, vae):
    assert results["pixels-size"] == [(8, 8)] * 3
    assert results["latents-size"] == [(16, 16)] * 3
    assert "belong to 0 to 6" in results["several experts"]
    assert results["label 3"] == "class_labels must be from 0 to 2, but 3 is among them"
    assert results["label -1"] == "class_labels must be from 0 to 2, but -1 is among them"
    model, _ = load_denoiser([exported / "latent.pt"])
    noise = draw_all(4)(None)
    denoise = as_denoiser(model, {"y": torch.tensor(LABELS)})
    x = create_process().make_sampler("euler", "10")(denoise, noise, clip_denoised=False)
    autoencoder = load_autoencoder(str(vae))
    # The checkpoint's scale, which differs from the one in the VAE's config.
    autoencoder.normalization = Normalization(0.7)
    theirs = (results["latents-unguided"] * 255).round().permute(0, 2, 3, 1)
    assert (autoencoder.decode(x).float() - theirs).abs().max() <= 1


def test_a_pipeline_stores_the_bases_once(exported, ckpt):
    model, _ = load_model(ckpt)
    size = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    (weights,) = (exported / "pixels").rglob("*.safetensors")
    assert weights.stat().st_size < 1.05 * size
    assert not (exported / "pixels" / "vae").exists()


@pytest.mark.parametrize(("mixer", "scope"), [("softmax", "global"), ("raw", "global"), ("one-hot", "local")])
def test_a_remix_dit_is_read_back(tmp_path, mixer, scope):
    """Bit for bit and with its config, by load_model and through convert.py."""
    options = dict(mixer=mixer, scope=scope, frequency_shift=int(scope == "local"))
    if mixer == "raw":
        options |= dict(layers=[*DIT.mixed_layers, *DIT.modulation], boundaries=[0, 100.5, 333.3, 800, 1000])
    shape = dict(input_size=8, in_channels=3, num_classes=3, n_basis=2, n_experts=4)
    model = perturbed(RemixDiT_models["RemixDiT-T/4"](**shape, **options))
    ours = save(tmp_path / "a.pt", model, "RemixDiT-T/4", {"vae": "none", "scale": 1.0, "shift": 0.0})
    run("convert.py", ours, tmp_path / "folder", "--to=diffusers")
    run("convert.py", tmp_path / "folder", tmp_path / "b.safetensors", "--to=safetensors")
    for path in (tmp_path / "folder", tmp_path / "folder/transformer", tmp_path / "b.safetensors"):
        back, config = load_model(path)
        assert config["model"] == model_config("RemixDiT-T/4", model)
        assert back.mixing_config == model.mixing_config
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
    for key, value in (("mixer", "softmax"), ("n_experts", 5), ("frequency_shift", 2)):
        if {**model.mixing_config, **options}[key] != value:
            with pytest.raises(UserError, match=key):
                load_model(tmp_path / "folder", **{key: value})

    # The exported model computes what ours does, with the same experts at the boundaries.
    exported, x = diffusers._mixed_transformer(model, {"diffusion": {}}).eval(), torch.randn(1, 3, 8, 8)
    for t in (0, 100, 101, 249, 250, 333, 334, 749, 750, 999):
        assert exported.expert_index(t) == model.expert_index(t)
        with torch.no_grad():
            theirs = exported(x, torch.tensor([t]), torch.tensor([2])).sample
            assert relative(theirs, model(x, torch.tensor([t]), torch.tensor([2]))) < 1e-5


def test_an_exported_remix_dit_starts_training(exported, ckpt, features, tmp_path):
    flags = [*training_flags(features, tmp_path, "warm"), "--max-steps=1", "--lr=1e-9", "--coeff-lr=0"]
    run("train_fast.py", *flags, "--load-weight", exported / "pixels")
    before, started = load_model(ckpt)[0], load_model(tmp_path / "warm/checkpoints/0000001.pt")[0]
    for key, value in before.state_dict().items():
        torch.testing.assert_close(started.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_damaged_remix_dits(exported, tmp_path):
    shutil.copytree(exported / "pixels", tmp_path / "damaged")
    folder = tmp_path / "damaged" / "transformer"
    for damage, message in (
        (lambda: change(folder, {"mixer": "softplus"}), "mixer must be one of"),
        (lambda: change(folder, {"mixer": "raw", "n_basis": 7}), "(does not fit|but its tensors have)"),
        (lambda: change(folder, {"n_basis": 2, "scope": None}), "'scope' is missing"),
        (lambda: change(folder, {"scope": "global"}, logits=None), "'logits' is missing"),
    ):
        damage()
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "damaged")


def test_timestep_frequencies_of_diffusers(transformer, features, tmp_path, capsys):
    """Weights that were trained with diffusers' own class give its outputs with --timestep-frequencies diffusers."""
    theirs = run_model(make_transformer())
    model, config = load_model(transformer, frequency_shift=1)
    assert not capsys.readouterr().err
    assert relative(run_model(model), theirs) < 1e-5
    assert relative(run_model(load_model(transformer)[0]), theirs) > 1e-3
    assert "does not say" in capsys.readouterr().err

    # A file of facebookresearch/DiT does not record it.
    flag = "--timestep-frequencies=diffusers"
    done = run("convert.py", transformer, tmp_path / "dit.pt", "--to=dit", flag)
    assert "cannot record the timestep frequencies" in done.stderr
    assert torch.equal(run_model(load_model(tmp_path / "dit.pt", frequency_shift=1)[0]), run_model(model))

    # All files of this project record it.
    flags = [*training_flags(features, tmp_path, "warm"), "--max-steps=1", "--lr=1e-9", "--coeff-lr=0"]
    done = run("train_fast.py", *flags, "--load-weight", transformer, flag)
    assert "does not say" not in done.stderr
    started = tmp_path / "warm/checkpoints/0000001.pt"
    run("convert.py", started, tmp_path / "expert", "--to=diffusers", "--expert=0")
    for path in (started, tmp_path / "expert"):
        back, config = load_model(path)
        assert config["model"]["backbone"]["frequency_shift"] == 1
        assert relative(run_model(back), theirs) < 1e-4
        done = run("sample_ddp.py", "--ckpt", path, "--timestep-frequencies=published", expect=2)
        assert "frequency_shift=1, not 0" in done.stderr
    assert not capsys.readouterr().err


def test_models_that_diffusers_cannot_represent(tmp_path):
    shape = dict(input_size=8, num_classes=3)
    moved = DiT_models["DiT-T/4"](**shape)
    moved.pos_embed.data += 1
    for model, diffusion, message in (
        (DiT_models["DiT-T/4"](**shape, mlp_ratio=2.0), {}, "MLP ratio"),
        (DiT_models["DiT-T/4"](**shape, class_dropout_prob=0.0), {}, "null class"),
        (moved, {}, "position embedding"),
        (DiT_models["DiT-T/4"](**shape), {"noise_schedule": "squaredcos_cap_v2"}, "noise_schedule"),
        (DiT_models["DiT-T/4"](**shape), {"process": "flow", "path": "GVP"}, "linear path and a velocity"),
        (DiT_models["DiT-T/4"](**shape), {"process": "flow", "prediction": "noise"}, "linear path and a velocity"),
    ):
        config = {"model": model_config("DiT-T/4", model), "diffusion": diffusion, "data": {"vae": "none"}}
        with pytest.raises(UserError, match=message):
            diffusers.write(tmp_path / "out", {"ema": model}, config)
    assert not list(tmp_path.iterdir())


def test_a_vae_with_other_channels_is_refused(tmp_path, vae, ckpt):
    done = run("convert.py", ckpt, tmp_path / "out", "--to", "diffusers", "--vae", vae, expect=2)
    assert "denoises 3 channels" in done.stderr
    assert not list(tmp_path.iterdir())


def test_exported_code_imports_nothing_of_this_project():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"diffusion", "interop", "training"}
    files = list((ROOT / "interop/diffusers_files").glob("*.py"))
    assert len(files) == 2
    for path in files:
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        names = {line.split()[1].split(".")[0] for line in lines}
        assert names
        assert not names & ours


@pytest.mark.parametrize("highest", [1, 1000])
def test_exported_models_have_our_rule_for_rounded_steps_on_boundaries(highest):
    from interop.diffusers_files.remix_transformer import inner_boundaries as exported

    for n, dtype in itertools.product((1, 2, 20, 100), LEVEL_DTYPES):
        boundaries = equal_boundaries(n, highest)
        # The exported flows get the times, 1 minus the noise level.
        assert exported(tuple(boundaries), dtype, highest == 1) == inner_boundaries(boundaries, dtype, (highest == 1,))
