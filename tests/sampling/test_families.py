"""LightningDiT and DiT^DH: the published losses, guidance and sampling chains, and the settings of sampling they bring.

Each is read from a file by load_model, plain and as a Remix with one expert.
"""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import check_sampling_refused, golden, make_vae, relative, run, sampled_images
from torch import nn

from checkpoint import load_model
from diffusion import create_flow, create_process
from features.autoencoder import load_autoencoder
from models import LightningDiT_models
from remix import RemixDiT
from runtime.processes import SampleGenerators
from sampling.experts import for_sampling
from sampling.guidance import GuidedDenoiser, make_schedule
from training.batches import Microbatch
from training.experts import experts_of
from training.settings import RunSettings
from training.terms import loss_terms
from training.trainer import TrainingLoss

FILES = {"lightningdit": ("lightningdit.pt", "xl-vavae"), "ditdh": ("ditdh.pt", "dh")}
CHAINS = {family: list(golden(f"{family}_transport.pt")["chains"]) for family in FILES}


def read(path, family: str, name: str, with_experts: bool = False) -> tuple[nn.Module, dict]:
    """Write a published network to a file, read it, and return it, or a Remix of it, with its config."""
    vectors = golden(FILES[family][0])[name]
    torch.save({"ema": vectors["state_dict"]}, path)
    model, config = load_model(path, num_heads=vectors["config"]["num_heads"])
    if with_experts:
        model = RemixDiT(model, n_basis=1, n_experts=1, mixer="one-hot", boundaries=[0, 1]).eval()
    return model, config


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "remix"])
def models(request, tmp_path_factory) -> dict[str, tuple[nn.Module, dict]]:
    """The network of the chains and losses of each family, and its config."""
    folder = tmp_path_factory.mktemp("files")
    return {family: read(folder / f"{family}.pt", family, name, request.param) for family, (_, name) in FILES.items()}


def guided(model: nn.Module, y: torch.Tensor, scale: float, interval: list[float], channels: int) -> GuidedDenoiser:
    """The denoiser of a family: both ends of the interval of noise levels are guided."""
    schedule = make_schedule(scale, interval, 1, closed=True)
    return GuidedDenoiser(for_sampling(model), y, 10, schedule, channels=channels)


@pytest.mark.parametrize("key", CHAINS["lightningdit"])
@torch.no_grad()
def test_chains_of_lightningdit(models, key):
    """Shifts s of the time t are shifts 1 / s of noise levels, and guidance from t on is that below a noise level."""
    g, (model, config) = golden("lightningdit_transport.pt"), models["lightningdit"]
    points, shift, scale, start = (float(value) for value in re.findall(r"=([\d.]+)", key))
    process = create_process(**config["diffusion"])
    sampler = process.make_sampler("euler", int(points) - 1, shift=1 / shift if shift else 1.0)
    assert sampler.evaluations == 10
    out = sampler(guided(model, g["y"], scale, [0, 1 - start], channels=3), g["z"])
    assert relative(out, g["chains"][key]) < 1e-4


@pytest.mark.parametrize("key", CHAINS["ditdh"])
@torch.no_grad()
def test_chains_of_ditdh(models, key):
    g, (model, config) = golden("ditdh_transport.pt"), models["ditdh"]
    points, shift, scale, *interval = (float(value) for value in re.findall(r"[=,]([\d.]+)", key))
    process = create_process(**config["diffusion"])
    sampler = process.make_sampler("euler", int(points) - 1, shift=shift, last_level=0.001)
    out = sampler(guided(model, g["y"], scale, interval or [0, 1], channels=24), g["z"])
    assert relative(out, g["chains"][key]) < 1e-4


@torch.no_grad()
def test_losses(models):
    """LightningDiT's two terms, and RAE's loss for two shifts at the times that uniform numbers give, per sample."""
    g, (model, config) = golden("lightningdit_transport.pt"), models["lightningdit"]
    terms = [term for term in loss_terms(experts_of(model), RunSettings(cosine_weight=1.0)) if term.name == "cosine"]
    loss = TrainingLoss(model, create_process(**config["diffusion"]), terms)
    for i in range(3):
        x, t, y, noise = (g[name][i : i + 1] for name in ("x1", "t", "y", "x0"))
        _, means = loss(Microbatch(x, t, {"y": y}, noise, {}), (torch.tensor(1.0),) * len(terms))
        assert relative(means, torch.stack([g["mse"][i], g["cos"][i]])) < 1e-5
    g, (model, _) = golden("ditdh_transport.pt"), models["ditdh"]
    for key, vectors in g["losses"].items():
        flow = create_flow(shift=float(key.partition("=")[2]), time_max=0.999)
        t = torch.from_numpy(flow.quantile_times(g["uniform"].double().numpy() / 0.999))
        assert relative(1 - t, vectors["t"]) < 1e-5
        losses = flow.training_losses(model, g["x1"], t, {"y": g["y"]}, g["x0"])["loss"]
        assert relative(losses, vectors["loss"]) < 1e-5


# The guided chains show it for a Remix, too.
@pytest.mark.parametrize("with_experts", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_guidance(with_experts, tmp_path):
    """On three channels from a time on, or on all channels between two times, as the published functions apply it."""
    for family, (file, _) in FILES.items():
        vectors = golden(file)
        for name, g in vectors.items():
            model, _ = read(tmp_path / "a.pt", family, name, with_experts)
            for cfg in g["cfg"]:
                x, y, times, channels = cfg["x"][:3], cfg["y"][:3], cfg["t"][:3], g["config"]["in_channels"]
                if family == "lightningdit":
                    out = guided(model, y, cfg["scale"], [0, 1 - cfg["interval_start"]], 3)(x, times[0].item())
                else:
                    # The rows have times of their own, some of which are outside the interval.
                    rows = [
                        guided(model, y[i : i + 1], cfg["scale"], list(cfg["interval"]), channels)(
                            x[i : i + 1], 1 - times[i].item()
                        )
                        for i in range(3)
                    ]
                    out = -torch.cat(rows)
                assert relative(out[:, :channels], cfg["out"][:3]) < 1e-5, name


@torch.no_grad()
def published_samples(model: nn.Module, steps: int, shift: float, last: float, guided_channels: int) -> torch.Tensor:
    """Samples 0 and 1 of seed 0 and these labels, by Euler's method with the guidance of a family."""
    channels, side = model.config["in_channels"], model.config["input_size"]
    scale, highest = (6.7, 0.875) if guided_channels == 3 else (1.42, 1)
    x, y = SampleGenerators(0, range(2)).randn((channels, side, side)), torch.arange(2)
    levels = torch.linspace(1, last, steps + 1, dtype=torch.float64)
    levels = shift * levels / (1 + (shift - 1) * levels)
    for level, following in pairwise(levels.tolist()):
        t = torch.full((2,), 1 - level)
        v, guide = (model(x, t, labels)[:, :channels] for labels in (y, torch.full_like(y, 10)))
        if level <= highest:
            guided = guide + scale * (v - guide)
            v = torch.cat([guided[:, :guided_channels], v[:, guided_channels:]], dim=1)
        x = x + (level - following) * v
    return x


@pytest.mark.parametrize("family", FILES)
def test_a_file_brings_the_settings_of_its_family(family, tmp_path, monkeypatch):
    model, _ = read(tmp_path / "a.pt", family, FILES[family][1])
    channels = {"lightningdit": 32, "ditdh": 24}[family]
    vae = make_vae(tmp_path / "vae", latent_channels=channels)
    flags = ("--ckpt", tmp_path / "a.pt", "--vae", vae, "--num-fid-samples=2", f"--sample-dir={tmp_path}")

    def settings(name, *more):
        run("sample_ddp.py", *flags, f"--name={name}", *more)
        stored = json.loads((tmp_path / name / "settings.json").read_text())
        names = ("num_sampling_steps", "time_shift", "last_level", "cfg_scale", "guidance_interval", "guided_channels")
        return [stored[name] for name in names]

    shift = 1 / 0.3 if family == "lightningdit" else (24 * 16 / 4096) ** 0.5
    with monkeypatch.context() as patch:
        # 249 steps would take seconds.
        patch.setattr("sampling.pipeline.sample", lambda pipeline, *_: np.zeros((2, 8, 8, 3), np.uint8))
        if family == "lightningdit":
            assert settings("own") == ["249", pytest.approx(shift), None, 6.7, [0, 0.875], 3]
        else:
            assert settings("own") == ["49", pytest.approx(shift), 0.001, 1.42, None, 24]
    settings("few", "--num-sampling-steps=8", "--labels=0,1")
    last, guided_channels = (0, 3) if family == "lightningdit" else (0.001, channels)
    expected = load_autoencoder(str(vae)).decode(published_samples(model, 8, shift, last, guided_channels))
    np.testing.assert_allclose(sampled_images(tmp_path / "few").astype(int), expected.numpy(), atol=1)
    changed = ("--num-sampling-steps=2", "--time-shift=1", "--last-level=0", "--cfg-scale=1", "--guided-channels=2")
    assert settings("changed", *changed) == ["2", 1, 0, 1, None, 2]
    assert settings("sde", "--sampler=sde", "--num-sampling-steps=2", "--cfg-all-channels")[1:3] == [
        pytest.approx(shift),
        None,
    ]
    message = f"--guided-channels 33: {tmp_path / 'a.pt'} denoises {channels} channels"
    check_sampling_refused(tmp_path / "a.pt", tmp_path / "out", (f"--vae={vae}", "--guided-channels=33"), message)


def test_a_model_of_a_family_that_is_no_flow_has_the_usual_settings(tmp_path):
    from interop.own import save_safetensors

    model = LightningDiT_models["LightningDiT-T/1"](input_size=4, in_channels=3, num_classes=3, learn_sigma=True)
    data = {"image_size": 4, "classes": None, "vae": "none", "scale": 1.0, "shift": 0.0}
    parts = {"name": "LightningDiT-T/1", "architecture": "LightningDiT", "backbone": dict(model.config), "remix": None}
    config = {"model": parts, "diffusion": {"process": "gaussian"}, "data": data, "training": None}
    save_safetensors(tmp_path / "a.safetensors", model, config)
    flags = ("--num-fid-samples=1", "--num-sampling-steps=2", f"--sample-dir={tmp_path}", "--name=out")
    run("sample_ddp.py", "--ckpt", tmp_path / "a.safetensors", *flags)
    stored = json.loads((tmp_path / "out/settings.json").read_text())
    assert (stored["sampler"], stored["cfg_scale"], stored["guided_channels"]) == ("ddpm", 1.5, None)
