import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import PIXELS, make_images, run, training_flags
from PIL import Image

from checkpoint import load_model
from common import UserError
from extract_features import center_crop
from features import FeatureDataset, write_index, write_shard
from training.batches import GlobalBatches


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pixels_are_stored_exactly(images, features):
    dataset = FeatureDataset(features)
    assert (len(dataset), dataset.shape, dataset.views, dataset.classes) == (
        24,
        (3, 8, 8),
        2,
        ["class0", "class1", "class2"],
    )
    x, label = dataset[9]
    image = np.array(center_crop(Image.open(images / "class1" / "1.png"), 8))
    assert label == 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(image))
    assert torch.equal(dataset[9, 1][0], x.flip(-1))


def test_any_number_of_processes_writes_the_same_bytes(features, images, tmp_path, monkeypatch):
    run("extract_features.py", "--data-path", images, "--features-path", tmp_path / "two", *PIXELS, processes=2)
    assert contents(tmp_path / "two") == contents(features)


def test_shards_hold_every_image_once(tmp_path):
    """Several shards, one of them with an image that could not be read."""
    counts = [4, 3, 2]
    for shard, count in enumerate(counts):
        rows = np.arange(count * 2 * 3).reshape(count, 2, 3, 1, 1) + 100 * shard
        write_shard(tmp_path, shard, rows, np.full(count, shard), ["bad.png (why)"] if shard == 1 else [])
    index = write_index(tmp_path, 3, vae="none", scale=1.0, image_size=1, classes=["a", "b", "c"])
    assert (index["images"], index["skipped"]) == (9, 1)
    dataset = FeatureDataset(tmp_path)
    assert [dataset[i][1] for i in range(9)] == [0] * 4 + [1] * 3 + [2] * 2
    assert dataset[5, 1][0].flatten().tolist() == [109, 110, 111]
    x, y = dataset.__getitems__([(0, 0), (8, 1)])
    assert x.shape == (2, 3, 1, 1)
    assert y.tolist() == [0, 2]


def test_more_shards_than_files_may_be_open(tmp_path):
    for shard in range(300):
        write_shard(tmp_path, shard, np.full((1, 1, 1, 1, 1), shard), np.zeros(1), [])
    write_index(tmp_path, 300, vae="none", scale=1.0, image_size=1, classes=["a"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        dataset = FeatureDataset(tmp_path)
        assert [int(dataset[i][0]) for i in range(300)] == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_interrupted_extraction_is_finished(features, images, tmp_path):
    folder = tmp_path / "again"
    flags = ("--data-path", images, "--features-path", folder, *PIXELS)
    run("extract_features.py", *flags)
    (folder / "index.json").unlink()
    assert "mirror=True, not False" in run("extract_features.py", *flags, "--no-mirror", expect=2).stderr
    before = (folder / "features-00000.npy").stat().st_mtime_ns
    run("extract_features.py", *flags)
    assert "nothing to do" in run("extract_features.py", *flags).stdout
    assert contents(folder) == contents(features)
    assert (folder / "features-00000.npy").stat().st_mtime_ns == before, "finished work is not done again"
    assert "seed=0, not 1" in run("extract_features.py", *flags, "--global-seed", 1, expect=2).stderr
    (folder / "settings.json").unlink()
    assert "already holds features" in run("extract_features.py", *flags, expect=2).stderr


def test_unreadable_images(tmp_path):
    tree = make_images(tmp_path / "images", classes=2, per_class=3)
    (tree / "class0" / "1.png").write_bytes(b"no image at all")
    cut = tree / "class1" / "2.png"
    cut.write_bytes(cut.read_bytes()[:60])
    flags = ("--data-path", tree, *PIXELS)
    done = run("extract_features.py", *flags, "--features-path", tmp_path / "a", expect=1)
    assert "class0/1.png" in done.stderr
    assert "class1/2.png" in done.stderr
    assert "2 images could not be read" in done.stderr
    run("extract_features.py", *flags, "--features-path", tmp_path / "b", "--skip-bad", processes=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert FeatureDataset(tmp_path / "a").labels.tolist() == [0, 0, 1, 1]


def test_latents_of_a_local_vae(vae, tmp_path):
    tree = make_images(tmp_path / "images", per_class=3, size=16)
    flags = ("--data-path", tree, "--vae", vae, "--image-size", 16, "--num-workers", 1, "--batch-size", 4)
    run("extract_features.py", *flags, "--features-path", tmp_path / "one", "--model", "DiT-T/2")
    run("extract_features.py", *flags, "--features-path", tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    dataset = FeatureDataset(tmp_path / "one")
    assert (dataset.shape, dataset.scale, dataset.vae) == ((4, 8, 8), 0.5, str(vae))

    from autoencoder import load_autoencoder

    autoencoder = load_autoencoder(str(vae))
    pixels = (
        torch.from_numpy(np.array(center_crop(Image.open(tree / "class0" / "0.png"), 16))).permute(2, 0, 1)[None]
        / 127.5
        - 1
    )
    with torch.no_grad():
        mean, std = autoencoder.moments(pixels)
        direct = autoencoder.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, direct.mean * 0.5)
        noise = (dataset[0][0] - mean[0]) / std[0]
        assert autoencoder.decode(mean).shape == (1, 16, 16, 3)
    assert 0.5 < noise.std() < 1.5, "one draw of the posterior"


@pytest.fixture(scope="module")
def moments(vae, tmp_path_factory):
    """9 images' posteriors under the tiny VAE."""
    folder = tmp_path_factory.mktemp("moments")
    tree = make_images(folder / "images", per_class=3, size=16)
    flags = ["--data-path", tree, "--features-path", folder / "encoded", "--vae", vae, "--image-size", 16]
    run("extract_features.py", *flags, "--num-workers", 0, "--store", "moments", "--model", "DiT-T/2")
    assert "holds results with" in run("extract_features.py", *flags, expect=2).stderr
    return folder / "encoded"


def test_draws_from_stored_moments(moments, vae):
    from autoencoder import load_autoencoder

    dataset = FeatureDataset(moments)
    assert (dataset.store, dataset.shape, dataset.views, len(dataset)) == ("moments", (4, 8, 8), 2, 9)
    image = Image.open(moments.parent / "images/class1/1.png")
    pixels = torch.from_numpy(np.array(center_crop(image, 16))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean, std = load_autoencoder(str(vae)).moments(torch.cat([pixels, pixels.flip(-1)]))
    for view in (0, 1):
        draws = torch.stack([dataset[4, view, draw][0] for draw in range(2000)])
        standard = (draws - mean[view]) / std[view]
        assert standard.mean(0).abs().max() < 5 / 2000**0.5
        assert (standard.std(0) - 1).abs().max() < 5 / (2 * 2000) ** 0.5
        assert abs(standard.mean()) < 5 / standard.numel() ** 0.5
    assert torch.equal(dataset[4][0], dataset[4, 0, 0][0]), "whoever asks for no draw always gets the same"
    others = [dataset[4, 0, 1], dataset[3, 0, 0], dataset[4, 1, 0]]
    noises = [(x - mean[0]) / std[0] for x, _ in [dataset[4, 0, 0], *others]]
    assert len({noise[0, 0, 0].item() for noise in noises}) == 4


def test_every_epoch_draws_anew_whatever_the_processes(moments):
    dataset = FeatureDataset(moments)

    def batches(steps, rows=slice(0, 3)):
        return [dataset.__getitems__(items) for items in GlobalBatches(9, 1, 3, 0, steps, rows)]

    epochs = [dict(), dict()]
    for step, items in enumerate(GlobalBatches(9, 1, 3, 0, range(6), slice(0, 3))):
        epochs[step // 3] |= {item[0]: dataset[item][0] for item in items}
    assert all((epochs[0][image] != epochs[1][image]).all() for image in range(9))
    whole = batches(range(6))
    for step, (x, _) in enumerate(batches(range(4, 6)), 4):
        assert torch.equal(x, whole[step][0]), "a resumed run draws what the uninterrupted one drew"
    for (a, _), (b, _), (both, _) in zip(
        batches(range(6), slice(0, 1)), batches(range(6), slice(1, 3)), whole, strict=True
    ):
        assert torch.equal(torch.cat([a, b]), both)


def test_training_on_moments(moments, tmp_path):
    flags = [*training_flags(moments, tmp_path, "run", "DiT-T/2"), "--global-batch-size", 6, "--ckpt-every", 2]
    run("train_fast.py", *flags, "--max-steps", 4)
    whole = tmp_path / "run/checkpoints/0000004.pt"
    whole.rename(tmp_path / "whole.pt")
    run("train_fast.py", *flags, "--max-steps", 4, "--resume", "auto")
    for key, value in torch.load(tmp_path / "whole.pt", weights_only=True)["model"].items():
        assert torch.equal(value, torch.load(whole, weights_only=True)["model"][key])
    index = json.loads((moments / "index.json").read_text())
    shutil.copytree(moments, tmp_path / "drawn")
    (tmp_path / "drawn/index.json").write_text(json.dumps(index | {"store": "draw", "shape": [8, 8, 8]}))
    said = run(
        "train_fast.py", *flags, "--data-path", tmp_path / "drawn", "--max-steps", 4, "--resume", "auto", expect=2
    )
    assert "data.store=moments, this run asks for None" in said.stderr
    (tmp_path / "drawn/index.json").write_text(json.dumps(index | {"store": "dice"}))
    with pytest.raises(UserError, match="not an index"):
        FeatureDataset(tmp_path / "drawn")


def test_pixels_have_no_moments(images, tmp_path):
    flags = ["--data-path", images, "--features-path", tmp_path / "out", *PIXELS]
    said = run("extract_features.py", *flags, "--store", "moments", expect=2).stderr
    assert "nothing to draw" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_original_layout(tmp_path):
    (tmp_path / "imagenet256_features").mkdir()
    (tmp_path / "imagenet256_labels").mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        np.save(tmp_path / f"imagenet256_features/{i}.npy", generator.normal(size=(2, 4, 8, 8)).astype(np.float32))
        np.save(tmp_path / f"imagenet256_labels/{i}.npy", np.array([i % 5]))
    dataset = FeatureDataset(tmp_path)
    assert (len(dataset), dataset.shape, dataset.views, dataset.image_size) == (12, (4, 8, 8), 2, 256)
    assert [dataset[i][1] for i in range(12)] == [i % 5 for i in range(12)], "numbered files in numeric order"
    flags = training_flags(tmp_path, tmp_path / "outputs", "run", "DiT-T/2")
    assert "labels up to 4" in run("train_fast.py", *flags, "--num-classes", 4, expect=2).stderr
    assert not (tmp_path / "outputs").exists()
    run("train_fast.py", *flags, "--max-steps", 1)
    assert load_model(tmp_path / "outputs/run/checkpoints/0000001.pt")[1]["data"]["scale"] == 0.18215
    expected = np.load(tmp_path / "imagenet256_features/11.npy")[1]
    assert np.array_equal(dataset[11, 1][0].numpy(), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "index.json").unlink(), "holds no features"),
        (lambda folder: (folder / "index.json").write_text("{"), "not an index"),
        (lambda folder: (folder / "labels-00000.npy").unlink(), "missing or not a whole"),
        (lambda folder: np.save(folder / "labels-00000.npy", np.zeros(23, np.int64)), "does not match"),
        (lambda folder: np.save(folder / "labels-00000.npy", np.full(24, 3)), "do not match"),
        (lambda folder: np.save(folder / "features-00000.npy", np.zeros((24, 2, 3, 4, 4))), "does not match"),
        (lambda folder: os.truncate(folder / "features-00000.npy", 5000), "not a whole"),
    ],
)
def test_damaged_features(features, tmp_path, find_corruption, message):
    folder = tmp_path / "copy"
    shutil.copytree(features, folder)
    find_corruption(folder)
    with pytest.raises(UserError, match=message):
        FeatureDataset(folder)


def test_center_crop():
    image = Image.new("RGB", (300, 100))
    image.paste((255, 0, 0), (100, 0, 200, 100))
    crop = np.array(center_crop(image, 32))
    assert crop.shape == (32, 32, 3)
    assert (crop[:, 2:-2] == [255, 0, 0]).all()
