"""The encoded-dataset format: packed shards, stored moments, the original layout, damaged files."""

import json
import multiprocessing
import os
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses, run, training_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from checkpoint import load_model
from extract_features import center_crop
from features.autoencoder import load_autoencoder
from features.dataset import ENCODING, FeatureDataset, write_index, write_shard
from runtime.errors import UserError
from training.batches import GlobalBatches


def test_pixels_are_stored_exactly(images, features):
    dataset = FeatureDataset(features)
    assert (len(dataset), dataset.shape, dataset.views) == (24, (3, 8, 8), 2)
    assert dataset.classes == ["class0", "class1", "class2"]
    x, label = dataset[9]
    image = np.array(center_crop(Image.open(images / "class1" / "1.png"), 8))
    assert label == 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(image))
    assert torch.equal(dataset[9, 1][0], x.flip(-1))


def test_shards_hold_every_image_once(tmp_path):
    """Several shards, one of them with an unreadable image."""
    counts = [4, 3, 2]
    for shard, count in enumerate(counts):
        rows = np.arange(count * 2 * 3).reshape(count, 2, 3, 1, 1) + 100 * shard
        write_shard(tmp_path, shard, rows, np.full(count, shard), {"bad.png": "why"} if shard == 1 else {})
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
        write_shard(tmp_path, shard, np.full((1, 1, 1, 1, 1), shard), np.zeros(1), {})
    write_index(tmp_path, 300, vae="none", scale=1.0, image_size=1, classes=["a"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        dataset = FeatureDataset(tmp_path)
        assert [int(dataset[i][0]) for i in range(300)] == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 2), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_features_are_read_as_they_were_written(tmp_path_factory, counts, views, seed):
    """For any numbers of images per shard, including none."""
    if not sum(counts):
        counts = [*counts, 1]
    folder, generator = tmp_path_factory.mktemp("shards"), np.random.default_rng(seed)
    everything, labels = [], []
    for shard, count in enumerate(counts):
        rows = generator.normal(size=(count, views, 2, 3, 3)).astype(np.float32)
        everything += [*rows] if count else []
        labels.append(generator.integers(0, 4, count))
        write_shard(folder, shard, rows if count else np.zeros((0, views, 0, 0, 0)), labels[-1], {})
    write_index(folder, len(counts), vae="none", scale=1.0, image_size=3, classes=list("abcd"))
    dataset = FeatureDataset(folder)
    assert dataset.labels.tolist() == np.concatenate(labels).tolist()
    for i, image in enumerate(everything):
        for view in range(views):
            assert np.array_equal(dataset[i, view][0].numpy(), image[view])


def test_draws_from_stored_moments(moments, vae):
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
    assert torch.equal(dataset[4][0], dataset[4, 0, 0][0]), "view and draw default to 0"
    others = [dataset[4, 0, 1], dataset[3, 0, 0], dataset[4, 1, 0]]
    noises = [(x - mean[0]) / std[0] for x, _ in [dataset[4, 0, 0], *others]]
    assert len({noise[0, 0, 0].item() for noise in noises}) == 4


def test_every_epoch_draws_anew_for_any_number_of_processes(moments):
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
    flags = [*training_flags(moments, tmp_path, "run", "DiT-T/2"), "--global-batch-size=6", "--max-steps=4"]
    run("train_fast.py", *flags, "--ckpt-every", 2)
    last = tmp_path / "run/checkpoints/0000004.pt"
    last.rename(tmp_path / "uninterrupted.pt")
    run("train_fast.py", *flags, "--ckpt-every", 2, "--resume", "auto")
    for key, value in torch.load(tmp_path / "uninterrupted.pt", weights_only=True)["model"].items():
        assert torch.equal(value, torch.load(last, weights_only=True)["model"][key])
    index = json.loads((moments / "index.json").read_text())
    shutil.copytree(moments, tmp_path / "drawn")
    (tmp_path / "drawn/index.json").write_text(json.dumps(index | {"store": "draw", "shape": [8, 8, 8]}))
    refused = run("train_fast.py", *flags, f"--data-path={tmp_path / 'drawn'}", "--resume=auto", expect=2).stderr
    assert "data.store=moments, this run asks for draw" in refused
    (tmp_path / "drawn/index.json").write_text(json.dumps(index | {"store": "dice"}))
    with pytest.raises(UserError, match="not an index"):
        FeatureDataset(tmp_path / "drawn")


def test_moments_in_float16(moments, vae, tmp_path):
    flags = [f"--data-path={moments.parent / 'images'}", f"--features-path={tmp_path / 'half'}", f"--vae={vae}"]
    settings = ("--image-size=16", "--num-workers=0", "--store=moments", "--dtype=float16")
    run("extract_features.py", *flags, *settings)
    half, single = FeatureDataset(tmp_path / "half"), FeatureDataset(moments)
    items = [(image, view, 5) for image in range(9) for view in (0, 1)]
    difference = half.__getitems__(items)[0] - single.__getitems__(items)[0]
    assert 0 < difference.abs().max() < 5e-3, "the same draws, from rounded moments"


def test_training_on_float16_features_gives_nearly_the_same_losses(features, tmp_path):
    folder = shutil.copytree(features, tmp_path / "half")
    write_shard(folder, 0, np.load(folder / "features-00000.npy"), np.load(folder / "labels-00000.npy"), {}, "float16")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"dtype": "float16"}))
    for path in (features, folder):
        run("train_fast.py", *training_flags(path, tmp_path, path.name), "--max-steps=20")
    single, half = (np.array(list(losses(tmp_path / path.name).values())) for path in (features, folder))
    assert 0 < np.abs(half / single - 1).max() < 1e-3
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert config["data"]["dtype"] == "float16"
    checkpoint = tmp_path / features.name / "checkpoints/0000020.pt"
    assert load_model(checkpoint)[1]["data"]["dtype"] == "float32"


def test_an_index_must_say_the_type_that_is_stored(features, tmp_path):
    folder = shutil.copytree(features, tmp_path / "other")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"dtype": "float16"}))
    with pytest.raises(UserError, match=r"does not match index\.json"):
        FeatureDataset(folder)
    index.pop("dtype")
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not an index of features"):
        FeatureDataset(folder)


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
    expected = np.load(tmp_path / "imagenet256_features/11.npy")[1]
    assert np.array_equal(dataset[11, 1][0].numpy(), expected)
    flags = training_flags(tmp_path, tmp_path / "outputs", "run", "DiT-T/2")
    assert "labels from 0 to 4" in run("train_fast.py", *flags, "--num-classes", 4, expect=2).stderr
    assert not (tmp_path / "outputs").exists()
    run("train_fast.py", *flags, "--max-steps", 1)
    assert load_model(tmp_path / "outputs/run/checkpoints/0000001.pt")[1]["data"]["scale"] == 0.18215


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((32, 4, 4, 4), np.float32), np.arange(32), r"holds int64 \(32,\), not one class number"),
        (np.zeros((1, 4, 4, 4), np.float32), np.eye(10)[3], r"holds float64 \(10,\), not one class number"),
        (np.zeros((1, 4, 4, 4), np.float32), np.array([2.5]), "not one class number"),
        (np.zeros((1, 4, 4, 4), np.float32), np.array([True]), "not one class number"),
        (np.zeros((1, 4, 4, 4), np.float32), np.array([np.nan]), "not one class number"),
        (np.zeros((1, 4, 4, 4), np.float32), np.zeros(0, np.int64), "not one class number"),
        (np.zeros((1, 3, 4, 4), np.uint8), np.array([3]), "holds uint8, but features are floating-point numbers"),
        (np.float32(1), np.array([3]), r"has shape \(\), not"),
        (np.zeros((0, 4, 4, 4), np.float32), np.array([3]), r"has shape \(0, 4, 4, 4\), not"),
    ],
)
def test_the_original_layout_has_one_image_and_one_label_per_file(tmp_path, features, labels, message):
    write_original_layout(tmp_path, [0, 1, 2])
    assert FeatureDataset(tmp_path).labels.tolist() == [0, 1, 2]
    np.save(tmp_path / "imagenet8_features/0.npy", features)
    np.save(tmp_path / "imagenet8_labels/0.npy", labels)
    with pytest.raises(UserError, match=message):
        FeatureDataset(tmp_path)


@pytest.mark.parametrize("label", [np.array([4]), np.int64(4), np.array([[4]], np.uint8), np.array([4.0])])
def test_the_label_of_the_original_layout_is_one_number_of_any_shape(tmp_path, label):
    write_original_layout(tmp_path, [0, 1])
    np.save(tmp_path / "imagenet8_labels/1.npy", label)
    assert FeatureDataset(tmp_path).labels.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "index.json").unlink(), "holds no features"),
        (lambda folder: (folder / "index.json").write_text("{"), "not an index"),
        (lambda folder: (folder / "labels-00000.npy").unlink(), "missing or not a complete"),
        (lambda folder: np.save(folder / "labels-00000.npy", np.zeros(23, np.int64)), "does not match"),
        (lambda folder: np.save(folder / "labels-00000.npy", np.full(24, 3)), "do not match"),
        (lambda folder: np.save(folder / "features-00000.npy", np.zeros((24, 2, 3, 4, 4))), "does not match"),
        (lambda folder: os.truncate(folder / "features-00000.npy", 5000), "not a complete"),
    ],
)
def test_damaged_features(features, tmp_path, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(features, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        FeatureDataset(folder)


def write_original_layout(folder: Path, labels: list[int]):
    for kind in ("features", "labels"):
        (folder / f"imagenet8_{kind}").mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(labels):
        np.save(folder / f"imagenet8_features/{i}.npy", np.zeros((1, 1, 1, 1), np.float32))
        np.save(folder / f"imagenet8_labels/{i}.npy", np.array([label]))


def test_many_labels_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr("features.dataset.FEW_LABELS", 50)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_original_layout(tmp_path, list(range(80)))

    def opened() -> tuple[int, list[int]]:
        """Open the dataset, and return how many label files were read, and the labels."""
        read = []
        load = FeatureDataset._load_file
        with monkeypatch.context() as patch:
            patch.setattr(FeatureDataset, "_load_file", staticmethod(lambda path: (read.append(path), load(path))[1]))
            labels = FeatureDataset(tmp_path).labels.tolist()
        return sum("labels" in path.parent.name for path in read), labels

    assert opened() == (80, list(range(80)))
    assert opened() == (64, list(range(80))), "some labels are compared with their files"
    compared = np.linspace(0, 79, 64).astype(int)
    times = (tmp_path / "imagenet8_labels/0.npy").stat()
    np.save(tmp_path / "imagenet8_labels/0.npy", np.array([7]))
    os.utime(tmp_path / "imagenet8_labels/0.npy", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert opened()[1][0] == 7, "also if the time is kept"
    other = next(i for i in range(80) if i not in compared)
    np.save(tmp_path / f"imagenet8_labels/{other}.npy", np.array([9]))
    assert opened()[1][other] == 9
    (tmp_path / "imagenet8_labels/.#0.npy.swp").symlink_to("absent")
    write_original_layout(tmp_path, [5] * 81)
    assert opened() == (81, [5] * 81)
    (cache,) = (tmp_path / "cache/remix-dit").glob("*.npz")
    cache.write_bytes(b"damaged")
    assert opened() == (81, [5] * 81)
    (tmp_path / "imagenet8_labels/3.npy").rename(tmp_path / "3.npy")
    (tmp_path / "imagenet8_labels/3.npy").symlink_to("absent")
    with pytest.raises(UserError, match="labels cannot be read"):
        FeatureDataset(tmp_path)


def test_processes_that_start_together_read_many_labels_once(tmp_path, monkeypatch):
    monkeypatch.setattr("features.dataset.FEW_LABELS", 50)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_original_layout(tmp_path, list(range(80)))
    load, context = FeatureDataset._load_file, multiprocessing.get_context("fork")
    read = context.Value("i", 0)

    def count(path):
        if "labels" in path.parent.name:
            with read.get_lock():
                read.value += 1
        return load(path)

    monkeypatch.setattr(FeatureDataset, "_load_file", staticmethod(count))
    processes = [context.Process(target=FeatureDataset, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert read.value == 80 + 2 * 64


def test_the_fingerprint_of_features_that_do_not_record_it(features, tmp_path):
    """It is computed, for packed shards and for the original layout, and tells other labels, images and views."""
    folder = shutil.copytree(features, tmp_path / "packed")
    index = json.loads((folder / "index.json").read_text())
    recorded = index.pop("fingerprint")
    (folder / "index.json").write_text(json.dumps(index))
    computed = FeatureDataset(folder).fingerprint
    assert computed == FeatureDataset(folder).fingerprint != recorded
    stored, labels = np.load(folder / "features-00000.npy"), np.load(folder / "labels-00000.npy")
    write_shard(folder, 0, stored[[0, 1, 3, 2, *range(4, 24)]], labels, {})
    assert FeatureDataset(folder).fingerprint != computed, "another order"
    write_original_layout(tmp_path / "original", [0, 1, 2])
    prints = [FeatureDataset(tmp_path / "original").fingerprint]
    np.save(tmp_path / "original/imagenet8_labels/2.npy", np.array([1]))
    prints.append(FeatureDataset(tmp_path / "original").fingerprint)
    np.save(tmp_path / "original/imagenet8_features/1.npy", np.ones((1, 1, 1, 1), np.float32))
    prints.append(FeatureDataset(tmp_path / "original").fingerprint)
    for i in range(3):
        np.save(tmp_path / f"original/imagenet8_features/{i}.npy", np.zeros((2, 1, 1, 1), np.float32))
    prints.append(FeatureDataset(tmp_path / "original").fingerprint)
    assert len({*prints}) == 4


def test_the_vae_of_other_features_may_have_another_name(features):
    dataset = FeatureDataset(features)
    for vae, own, other, accepted in (
        ("ema", None, None, True),
        ("stabilityai/sd-vae-ft-mse", None, "a", True),
        ("folder/vae/", "a", "a", True),
        ("folder/vae/", "a", None, False),
        ("ema", "a", "b", False),
    ):
        dataset.vae, dataset.vae_fingerprint = vae, own
        others = dict.fromkeys(ENCODING) | {"vae": "mse", "vae_fingerprint": other}
        with nullcontext() if accepted else pytest.raises(UserError, match="differs from the others in vae"):
            dataset.check_encoding("--held-out", others, 3, "the others")
    dataset.vae = "./folder/vae"
    dataset.check_encoding("--held-out", dict.fromkeys(ENCODING) | {"vae": "folder/vae/"}, 3, "the others")


def test_a_run_does_not_resume_on_other_features(features, images, tmp_path):
    flags = [*training_flags(features, tmp_path, "run", "DiT-T/2"), "--max-steps=2", "--ckpt-every=1"]
    run("train_fast.py", *flags)
    (tmp_path / "run/checkpoints/0000002.pt").unlink()
    tree = shutil.copytree(images, tmp_path / "images")
    shutil.copy(tree / "class2/0.png", tree / "class2/1.png")
    single = ("--data-path", images, "--features-path", tmp_path / "single", "--vae=none", "--image-size=8")
    run("extract_features.py", *single, "--no-mirror", "--num-workers=0")
    other = ("--data-path", tree, "--features-path", tmp_path / "other", "--vae=none", "--image-size=8")
    run("extract_features.py", *other, "--num-workers=0")
    for name, message in (("single", "data.views=2, this run asks for 1"), ("other", "was trained on other features")):
        stderr = run("train_fast.py", *flags, f"--data-path={tmp_path / name}", "--resume=auto", expect=2).stderr
        assert message in stderr and stderr.count("\n") == 1
    # The same features in another folder.
    shutil.copytree(features, tmp_path / "moved")
    run("train_fast.py", *flags, f"--data-path={tmp_path / 'moved'}", "--resume=auto")
