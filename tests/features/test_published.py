"""Published statistics and features of latents: LightningDiT's and RAE's numbers, and a run on published features."""

import json

import numpy as np
import pytest
import torch
from conftest import check_sampling_refused, golden, make_vae, relative, run, sampled_images, training_flags
from safetensors.torch import save_file

from checkpoint import load_model
from features.autoencoder import Normalization, pack, unpack
from features.dataset import FeatureDataset
from features.published import VIEWS
from features.statistics import load_statistics
from runtime.errors import UserError
from visualize import load_features


@pytest.fixture(scope="module")
def vectors() -> dict:
    return golden("lightningdit_transport.pt")["features"]


@pytest.fixture(scope="module")
def published(vectors, tmp_path_factory):
    """The folder of published features: two shards, and their statistics in a file beside the folder."""
    folder = tmp_path_factory.mktemp("published") / "train"
    folder.mkdir()
    torch.save({name: vectors[name] for name in ("mean", "std")}, folder.parent / "latents_stats.pt")
    for shard, rows in enumerate((slice(0, 3), slice(3, 5))):
        tensors = {name: vectors[name][rows].contiguous() for name in ("latents", "latents_flip", "labels")}
        save_file(tensors, folder / f"latents_rank00_shard{shard:03d}.safetensors")
    return folder


def test_statistics_per_channel_and_per_position(vectors, published, tmp_path):
    channels = load_statistics(str(published.parent / "latents_stats.pt"), (32, 4, 4))
    assert relative(channels.normalize(vectors["latents"]), vectors["normalized"]) < 1e-6
    positions = golden("ditdh_transport.pt")["statistics"]
    torch.save({name: positions[name] for name in ("mean", "var")}, tmp_path / "stat.pt")
    normalization = load_statistics(str(tmp_path / "stat.pt"), (24, 4, 4))
    assert relative(normalization.normalize(positions["latents"]), positions["normalized"]) < 1e-6
    assert relative(normalization.invert(positions["normalized"]), positions["latents"]) < 1e-5
    # As it is recorded in an index and in a checkpoint.
    assert Normalization.from_record(json.loads(json.dumps(normalization.record()))) == normalization
    with pytest.raises(UserError, match="no normalization per position"):
        normalization.vae_config()


def test_numbers_become_text_and_back():
    values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(values)), values)
    with pytest.raises(ValueError, match="does not stand for numbers"):
        unpack("float64:2:AAAA")


@pytest.mark.parametrize(
    ("content", "shape", "message"),
    [
        (None, None, "No such file"),
        (b"text", None, "is not a file of statistics"),
        ({"mean": torch.zeros(4)}, None, "holds no mean and std, and no mean and var"),
        ([1, 2], None, "holds no mean and std"),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, None, "a std that is not above 0"),
        ({"mean": torch.zeros(4, 8, 8), "std": torch.ones(4, 8, 8)}, None, "no mean and std, each [1, C, 1, 1]"),
        ({"mean": torch.zeros(0), "std": torch.ones(0)}, None, "the shape is [0]"),
        ({"mean": torch.zeros(4), "std": torch.tensor([-1.0, 1, 1, 1])}, None, "a std that is not above 0"),
        ({"mean": torch.zeros(4), "var": torch.ones(4)}, None, "no mean and var, each [C, H, W]: the shape is [4]"),
        ({"mean": torch.zeros(2, 4, 8, 8), "var": torch.ones(2, 4, 8, 8)}, None, "the shape is [2, 4, 8, 8]"),
        ({"mean": torch.zeros(4, 8, 8), "var": -torch.ones(4, 8, 8)}, None, "a var below 0"),
        ({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, (32, 8, 8), "of 4, but the latents have 32"),
        (
            {"mean": torch.zeros(4, 8, 8), "var": torch.ones(4, 8, 8)},
            (4, 4, 4),
            "4 x 8 x 8, but the latents have 4 x 4",
        ),
    ],
)
def test_wrong_statistics(content, shape, message, tmp_path):
    path = tmp_path / "stats.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_statistics(str(path), shape)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_published_features_are_read_as_they_are(vectors, published):
    dataset = FeatureDataset(published, str(published.parent / "latents_stats.pt"))
    assert (len(dataset), dataset.shape, dataset.views) == (5, (32, 4, 4), 2)
    x, y = dataset.__getitems__([(i, 0) for i in range(5)])
    assert relative(x, vectors["normalized"]) < 1e-6
    assert torch.equal(y, vectors["labels"])
    flipped = FeatureDataset(published, normalization=dataset.normalization)[4, 1][0]
    assert relative(flipped, dataset.normalization.normalize(vectors["latents_flip"][4])) < 1e-6
    assert dataset.fingerprint == FeatureDataset(published, normalization=dataset.normalization).fingerprint


def test_a_run_on_published_features(published, tmp_path):
    """The normalization is recorded, the run resumes, and samples are decoded with it by the VAE of --vae."""
    vae = make_vae(tmp_path / "vae", latent_channels=32)
    flags = training_flags(published, tmp_path, "run", "DiT-T/2") + ["--recipe=lightningdit", "--num-classes=10"]
    flags += ["--ckpt-every=1", "--sample-every=0", "--image-size=8"]
    missing = run("train_fast.py", *flags, "--max-steps=1", expect=2).stderr
    assert "without latents_stats.pt: set --latent-stats" in missing
    flags += [f"--latent-stats={published.parent / 'latents_stats.pt'}"]
    assert "--vae none is for pixels" in run("train_fast.py", *flags, "--max-steps=1", "--vae=none", expect=2).stderr
    run("train_fast.py", *flags, "--max-steps=1")
    run("train_fast.py", *flags, "--max-steps=2", "--resume=auto")
    ckpt = tmp_path / "run/checkpoints/0000002.pt"
    data = load_model(ckpt)[1]["data"]
    statistics = load_statistics(str(published.parent / "latents_stats.pt"))
    assert (data["vae"], Normalization.from_record(data), data["views"]) == (None, statistics, 2)
    check_sampling_refused(ckpt, tmp_path / "out", (), "does not record the VAE of its latents: set --vae")
    stats = f"--latent-stats={published.parent / 'latents_stats.pt'}"
    check_sampling_refused(ckpt, tmp_path / "out", (stats,), "records the normalization of its latents")
    few = ("--num-fid-samples=2", "--num-sampling-steps=2", f"--sample-dir={tmp_path}", f"--vae={vae}")
    run("sample_ddp.py", "--ckpt", ckpt, *few, "--name=own")
    # A file of another project says nothing of the normalization.
    torch.save(load_model(ckpt)[0].state_dict(), tmp_path / "bare.pt")
    foreign = ("--ckpt", tmp_path / "bare.pt", "--process=flow", *few)
    run("sample_ddp.py", *foreign, stats, "--name=given")
    run("sample_ddp.py", *foreign, "--name=without")
    other = tmp_path / "other.pt"
    torch.save({name: 2 * value for name, value in torch.load(published.parent / "latents_stats.pt").items()}, other)
    refused = run("sample_ddp.py", *foreign, f"--latent-stats={other}", "--name=given", expect=2).stderr
    assert "holds results with another latent_stats" in refused
    assert (sampled_images(tmp_path / "own") == sampled_images(tmp_path / "given")).all()
    assert (sampled_images(tmp_path / "own") != sampled_images(tmp_path / "without")).any()


def test_figures_normalize_published_features_as_the_checkpoint_records_it(published):
    """There are no statistics in the folder of the features."""
    normalization = Normalization([0.5] * 32, [1.0] * 32)
    backbone = {"in_channels": 32, "input_size": 4, "num_classes": 10}
    config = {"model": {"backbone": backbone}, "data": normalization.record(), "training": None}
    x, y = load_features(published, 2, 0, "a.pt", config)
    images = [int(i) for i in np.random.default_rng(0).permutation(5)[:2]]
    expected, labels = FeatureDataset(published, normalization=normalization).__getitems__(images)
    assert torch.equal(x, expected) and torch.equal(y, labels)
    backbone["in_channels"] = 4
    with pytest.raises(UserError, match=r"which a\.pt cannot process"):
        load_features(published, 2, 0, "a.pt", config)


def test_shards_below_the_folder_are_found_unless_there_are_several_folders(vectors, published, tmp_path):
    assert len(FeatureDataset(published.parent, str(published.parent / "latents_stats.pt"))) == 5
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latents_rank00_shard000.safetensors").touch()
    with pytest.raises(UserError, match="give one of them"):
        FeatureDataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_flip": None}, "holds no latents_flip"),
        ({"latents_flip": torch.zeros(4, 32, 4, 4)}, "of the shapes (5, 32, 4, 4) and (4, 32, 4, 4)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "not (3, 32, 4, 4)"),
        ({"labels": torch.zeros(5, 1)}, "labels that are not one class number per image"),
        ({"labels": torch.full((5,), 0.5)}, "labels that are not one class number per image"),
        ({"latents": torch.zeros(5, 32, 4, 4, dtype=torch.uint8)}, "latents that are not floating-point numbers"),
        ({"latents": torch.zeros(5, 8)}, "latents of the shape (5, 8), not (n, C, H, W)"),
        ({name: torch.zeros(0, 32, 4, 4) for name in VIEWS} | {"labels": torch.zeros(0)}, "hold no images"),
        (b"text", "is not a complete .safetensors file"),
    ],
)
def test_damaged_shards(vectors, change, message, tmp_path):
    path = tmp_path / "latents_rank00_shard000.safetensors"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        tensors = {name: vectors[name] for name in ("latents", "latents_flip", "labels")} | change
        save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError) as error:
        FeatureDataset(tmp_path, normalization=Normalization())
    assert message in str(error.value)


def test_statistics_are_for_features_without_a_normalization(features):
    with pytest.raises(UserError, match="is for published features"):
        FeatureDataset(features, "latents_stats.pt")
