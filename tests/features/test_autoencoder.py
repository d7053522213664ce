"""VAEs with a scale, a shift or statistics per channel: normalization, the whole pipeline, the exported pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images, make_vae, run, sampled_images, training_flags

from checkpoint import load_model
from features.autoencoder import Latents, Normalization, load_autoencoder
from features.dataset import FeatureDataset
from runtime.errors import UserError

MEAN = [0.1 * i - 1 for i in range(32)]
STD = [0.5 + 0.1 * i for i in range(32)]
# The configs of the VAEs of SD, SD3, Flux, VA-VAE (its class has a scaling factor by default) and Playground v2.5.
CONFIGS = {
    "sd": dict(latent_channels=4),
    "sd3": dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
    "flux": dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
    "va-vae": dict(latent_channels=32, latents_mean=MEAN, latents_std=STD),
    "playground": dict(latent_channels=4, scaling_factor=0.5, latents_mean=MEAN[:4], latents_std=STD[:4]),
}


def channels_of(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


# What diffusers' pipelines compute from latents z.
EXPECTED = {
    "sd": lambda z: z * 0.18215,
    "sd3": lambda z: (z - 0.0609) * 1.5305,
    "flux": lambda z: (z - 0.1159) * 0.3611,
    "va-vae": lambda z: (z - channels_of(MEAN)) / channels_of(STD),
    "playground": lambda z: (z - channels_of(MEAN[:4])) * 0.5 / channels_of(STD[:4]),
}


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request, tmp_path_factory) -> tuple[str, Path]:
    """The name and the folder of a tiny VAE with an image side of four latent pixels."""
    return request.param, make_vae(tmp_path_factory.mktemp("vae"), depth=3, **CONFIGS[request.param])


@torch.no_grad()
def test_moments_and_decoding_are_normalized_as_in_diffusers(kind):
    name, path = kind
    autoencoder = load_autoencoder(str(path))
    assert (autoencoder.factor, autoencoder.channels) == (4, (CONFIGS[name]["latent_channels"],))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = autoencoder.vae.encode(images).latent_dist
    mean, std = autoencoder.moments(images)
    torch.testing.assert_close(mean, EXPECTED[name](posterior.mean))
    z = posterior.mean + posterior.std
    torch.testing.assert_close(mean + std, EXPECTED[name](z), msg="the shift applies to the mean only")
    theirs = (127.5 * autoencoder.vae.decode(z).sample + 128).clamp(0, 255).permute(0, 2, 3, 1)
    assert (autoencoder.decode(mean + std).float() - theirs).abs().max() <= 1.01


def test_a_scale_alone_is_a_factor():
    normalization = Normalization.from_record({"vae": "ema", "scale": 0.18215, "shift": 0.0})
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normalization.apply(z, z)[0], z * 0.18215)
    assert torch.equal(normalization.apply(z, z)[1], z * 0.18215)
    assert torch.equal(normalization.invert(z), z / 0.18215)
    assert normalization.record() == {"scale": 0.18215, "shift": 0.0}


@pytest.mark.parametrize("kind", ["sd3", "va-vae"], indirect=True)
def test_from_images_to_samples_and_to_a_pipeline(kind, tmp_path):
    """The features, the checkpoint and the exported folder have the VAE's channels, factor and normalization."""
    from diffusers import AutoencoderKL, DDPMScheduler

    from interop.diffusers_files.pipeline import RemixDiTPipeline
    from interop.diffusers_files.remix_transformer import RemixDiTTransformer2DModel

    name, path = kind
    channels, normalization = CONFIGS[name]["latent_channels"], load_autoencoder(str(path)).normalization
    flags = (f"--data-path={make_images(tmp_path / 'images', per_class=4, size=16)}", f"--vae={path}")
    settings = ("--image-size=16", "--num-workers=0", "--store=moments", "--model=RemixDiT-T/2")
    run("extract_features.py", *flags, f"--features-path={tmp_path / 'f'}", *settings)
    dataset = FeatureDataset(tmp_path / "f")
    assert (dataset.shape, dataset.normalization) == ((channels, 4, 4), normalization)

    run("train_fast.py", *training_flags(tmp_path / "f", tmp_path, "run"), "--max-steps=1", f"--vae={path}")
    ckpt = tmp_path / "run/checkpoints/0000001.pt"
    assert Normalization.from_record(load_model(ckpt)[1]["data"]) == normalization
    few = ("--num-fid-samples=3", "--num-sampling-steps=2", f"--sample-dir={tmp_path}", "--name=samples")
    run("sample_ddp.py", "--ckpt", ckpt, *few)
    assert sampled_images(tmp_path / "samples").shape == (3, 16, 16, 3)

    run("convert.py", ckpt, tmp_path / "pipe", "--to=diffusers", f"--vae={path}")
    transformer = RemixDiTTransformer2DModel.from_pretrained(tmp_path / "pipe/transformer")
    exported = AutoencoderKL.from_pretrained(tmp_path / "pipe/vae")
    x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = RemixDiTPipeline(transformer, DDPMScheduler(), exported)._decode(x, "np")
    assert np.abs(load_autoencoder(str(path)).decode(x).numpy() - 255 * theirs).max() <= 1
    again = Normalization.from_record(load_model(tmp_path / "pipe")[1]["data"])
    np.testing.assert_allclose(again.scale, normalization.scale)
    np.testing.assert_allclose(again.shift, normalization.shift)


def test_the_recorded_normalization_replaces_the_config_of_the_vae(tmp_path):
    """A VAE of the same weights whose config says something else decodes a checkpoint's samples equally."""
    path = make_vae(tmp_path / "vae", latent_channels=4, scaling_factor=0.5, shift_factor=0.25)
    images = make_images(tmp_path / "images", per_class=4, size=16)
    flags = (f"--data-path={images}", f"--vae={path}", f"--features-path={tmp_path / 'f'}", "--image-size=16")
    run("extract_features.py", *flags, "--num-workers=0")
    run("train_fast.py", *training_flags(tmp_path / "f", tmp_path, "run"), "--max-steps=1")
    other = make_vae(tmp_path / "other-vae", latent_channels=4, latents_mean=MEAN[:4], latents_std=STD[:4])
    few = ("--num-fid-samples=3", "--num-sampling-steps=2", f"--sample-dir={tmp_path}")
    ckpt = tmp_path / "run/checkpoints/0000001.pt"
    run("sample_ddp.py", "--ckpt", ckpt, *few, "--name=own")
    run("sample_ddp.py", "--ckpt", ckpt, *few, "--name=other", f"--vae={other}")
    assert np.array_equal(sampled_images(tmp_path / "own"), sampled_images(tmp_path / "other"))


@pytest.mark.parametrize(
    "change",
    [
        {"latents_std": None},
        {"latents_mean": MEAN[:3]},
        {"latents_std": [1.0, 1.0, 0.0, 1.0]},
        {"latents_mean": 0.5, "latents_std": 2.0},
        {"latents_mean": ["0"] * 4},
        {"scaling_factor": None},
        {"scaling_factor": 0.0},
        {"shift_factor": float("nan")},
        {"_class_name": "AutoencoderDC"},
    ],
)
def test_configs_that_are_refused(tmp_path, change):
    path = make_vae(tmp_path, latent_channels=4, latents_mean=MEAN[:4], latents_std=STD[:4])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"latents_std must be 4 numbers|scaling_factor must be|it is an AutoencoderDC"):
        Latents(str(path))


def test_a_hub_name_with_the_folder_of_the_vae(vae, monkeypatch):
    from diffusers import AutoencoderKL

    asked, loaded = [], AutoencoderKL.from_pretrained(vae)

    def record(name: str, **where):
        asked.append((name, where.get("subfolder")))
        return {}

    monkeypatch.setattr("features.autoencoder.offline", lambda: False)
    monkeypatch.setattr(AutoencoderKL, "load_config", record)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda name, **where: (record(name, **where), loaded)[1])
    for name, expected in (("a/b", ("a/b", None)), ("a/b/vae", ("a/b", "vae"))):
        asked.clear()
        Latents(name)
        assert asked == [expected] * 2
