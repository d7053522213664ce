"""diffusers' AutoencoderRAE, a tiny random one: extraction, training and sampling, and published statistics."""

import json

import numpy as np
import pytest
import torch
from conftest import make_images, run, sampled_images, training_flags

from features.autoencoder import Normalization, load_autoencoder
from features.dataset import FeatureDataset
from features.statistics import load_statistics
from runtime.errors import UserError

MEAN, STD = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def rae(tmp_path_factory):
    """A tiny AutoencoderRAE: images of 16 pixels, resized to 8 for the encoder, and latents [64, 4, 4]."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("rae")
    encoder = dict(encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=2, encoder_input_size=8)
    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    statistics = dict(latents_mean=MEAN, latents_std=STD.abs(), scaling_factor=0.5)
    model = AutoencoderRAE(patch_size=4, decoder_intermediate_size=32, **encoder, **decoder, **statistics)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def test_encoding_and_decoding_are_those_of_diffusers(rae):
    from diffusers import AutoencoderRAE

    theirs, autoencoder = AutoencoderRAE.from_pretrained(rae).eval(), load_autoencoder(str(rae))
    assert (autoencoder.factor, autoencoder.channels, autoencoder.image_size) == (4, (64,), 16)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z, std = autoencoder.moments(2 * images - 1)
    torch.testing.assert_close(z, theirs.encode(images).latent, rtol=1e-4, atol=1e-4)
    assert not std.any()
    decoded = 255 * theirs.decode(z).sample.permute(0, 2, 3, 1) + 0.5
    assert (autoencoder.decode(z).float() - decoded.clamp(0, 255)).abs().max() <= 1.01


def test_images_become_features_and_samples(rae, tmp_path):
    """With the autoencoder's own normalization, and with RAE's published statistics instead of it."""
    images = make_images(tmp_path / "images", per_class=2, size=16)
    torch.save({"mean": MEAN, "var": STD.square()}, tmp_path / "stat.pt")
    common = [f"--data-path={images}", f"--vae={rae}", "--image-size=16", "--num-workers=0"]
    run("extract_features.py", *common, f"--features-path={tmp_path / 'own'}")
    run(
        "extract_features.py",
        *common,
        f"--features-path={tmp_path / 'given'}",
        f"--latent-stats={tmp_path / 'stat.pt'}",
    )
    own, given = FeatureDataset(tmp_path / "own"), FeatureDataset(tmp_path / "given")
    assert given.normalization == load_statistics(str(tmp_path / "stat.pt"))
    assert own.shape == (64, 4, 4)
    raw = [dataset.normalization.invert(dataset[3][0]) for dataset in (own, given)]
    torch.testing.assert_close(*raw, rtol=1e-3, atol=1e-3)
    assert "fingerprint" in json.loads((tmp_path / "own/index.json").read_text())
    run(
        "train_fast.py",
        *training_flags(tmp_path / "given", tmp_path, "run", "DiT-T/2"),
        "--recipe=rae",
        "--max-steps=1",
    )
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["diffusion"]["shift"] == pytest.approx(0.5), "64 x 4 x 4 numbers are a quarter of 4096"
    assert Normalization.from_record(config["data"]) == given.normalization
    few = ("--num-fid-samples=2", "--num-sampling-steps=2", f"--sample-dir={tmp_path}", "--name=samples")
    run("sample_ddp.py", "--ckpt", tmp_path / "run", *few)
    assert sampled_images(tmp_path / "samples").shape == (2, 16, 16, 3)
    for flags, message in (
        (("--store=moments",), "encodes an image to one latent"),
        (("--image-size=32",), "is for images of 16"),
    ):
        stderr = run("extract_features.py", *common, *flags, f"--features-path={tmp_path / 'new'}", expect=2).stderr
        assert message in stderr and len(stderr.splitlines()) == 1


def test_wrong_configs(rae, tmp_path):
    config = json.loads((rae / "config.json").read_text())
    for change, message in (
        ({"latents_std": None}, "must be lists of numbers"),
        ({"latents_std": [1.0]}, "of equal shapes"),
        ({"scaling_factor": None}, "scaling_factor must be a number above 0"),
        ({"latents_mean": np.zeros((64, 4, 4)).tolist()}, "is not that of its weights"),
    ):
        for path in rae.iterdir():
            (tmp_path / path.name).unlink(missing_ok=True)
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_autoencoder(str(tmp_path))
