"""Encoding a folder of images: what is written, resuming, unreadable and malicious images."""

import json
import logging
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import PIXELS, disk_full_of, locked, make_images, make_vae, run, training_flags
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

from extract_features import center_crop, report_scale, unit_config
from features.autoencoder import Normalization, load_autoencoder
from features.dataset import FeatureDataset


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_processes_writes_the_same_bytes(features, images, tmp_path):
    run("extract_features.py", "--data-path", images, "--features-path", tmp_path / "two", *PIXELS, processes=2)
    assert contents(tmp_path / "two") == contents(features)


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
    assert (folder / "features-00000.npy").stat().st_mtime_ns == before, "finished shards are not encoded again"
    assert "seed=0, not 1" in run("extract_features.py", *flags, "--global-seed", 1, expect=2).stderr
    (folder / "settings.json").unlink()
    assert "already holds features" in run("extract_features.py", *flags, expect=2).stderr


def test_a_killed_writers_file_does_not_fill_the_disk(images, tmp_path):
    with disk_full_of(tmp_path / "encoded/.features-00000.npy.99999.tmp"):
        run("extract_features.py", "--data-path", images, "--features-path", tmp_path / "encoded", *PIXELS)


def test_a_second_extraction_into_the_same_folder_is_refused(images, tmp_path):
    with locked(tmp_path / "encoded") as writer:
        flags = ("--data-path", images, "--features-path", tmp_path / "encoded", *PIXELS)
        stderr = run("extract_features.py", *flags, expect=2).stderr
    assert f"is in use by process {writer.pid}" in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "encoded").iterdir()] == [".lock"]


def test_unreadable_images(tmp_path):
    tree = make_images(tmp_path / "images", classes=2, per_class=3)
    (tree / "class0" / "1.png").write_bytes(b"not an image")
    truncated = tree / "class1" / "2.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    flags = ("--data-path", tree, *PIXELS)
    done = run("extract_features.py", *flags, "--features-path", tmp_path / "a", expect=1)
    assert "class0/1.png" in done.stderr
    assert "class1/2.png" in done.stderr
    assert "2 images could not be read" in done.stderr
    run("extract_features.py", *flags, "--features-path", tmp_path / "b", "--skip-bad", processes=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert FeatureDataset(tmp_path / "a").labels.tolist() == [0, 0, 1, 1]


def test_a_repaired_image_is_encoded(features, images, tmp_path):
    tree, folder = shutil.copytree(images, tmp_path / "images"), tmp_path / "encoded"
    flags = ("--data-path", tree, "--features-path", folder, *PIXELS)
    for broken in (tree / "class0/1.png", tree / "class2/5.png"):
        broken.write_bytes(b"not an image")
    run("extract_features.py", *flags, expect=1)
    before = contents(folder)
    done = run("extract_features.py", *flags, expect=1)
    assert "nothing to do" in done.stdout
    assert contents(folder) == before
    shutil.copy(images / "class0/1.png", tree / "class0/1.png")
    assert "class2/5.png" in run("extract_features.py", *flags, expect=1).stderr
    assert len(FeatureDataset(folder)) == 23
    shutil.copy(images / "class2/5.png", tree / "class2/5.png")
    run("extract_features.py", *flags)
    assert contents(folder) == contents(features)
    assert "nothing to do" in run("extract_features.py", *flags).stdout


def test_what_is_left_out_is_named(features, images, tmp_path):
    tree = shutil.copytree(images, tmp_path / "images")
    (tree / "class0a/below").mkdir(parents=True)
    for name in ("class1/a.gif", "class1/below/b.GIF", "class2/notes.txt", "README"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("text")
    stderr = run("extract_features.py", "--data-path", tree, "--features-path", tmp_path / "f", *PIXELS).stderr
    assert "classes without images are left out: class0a" in stderr
    assert "left out: 2 .gif, 1 without suffix, 1 .txt" in stderr
    assert contents(tmp_path / "f") == contents(features), "the classes keep their numbers"
    for folder in images.iterdir():
        shutil.rmtree(tree / folder.name)
    flags = ("--data-path", tree, "--features-path", tmp_path / "g", *PIXELS)
    assert "1 without suffix" in run("extract_features.py", *flags, expect=2).stderr


def test_16_bit_images_are_encoded_as_8_bit_images(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    deep = gray.astype(np.uint16) * 257
    for kind in ("8", "16"):
        (tmp_path / kind / "c").mkdir(parents=True)
    for i, suffix in enumerate(("png", "tif", "pgm")):
        Image.fromarray(gray).save(tmp_path / f"8/c/{i}.png")
        if suffix == "pgm":
            (tmp_path / "16/c/2.pgm").write_bytes(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
        else:
            Image.fromarray(deep).save(tmp_path / f"16/c/{i}.{suffix}")
    for kind in ("8", "16"):
        run("extract_features.py", "--data-path", tmp_path / kind, "--features-path", tmp_path / f"f{kind}", *PIXELS)
    shard = "features-00000.npy"
    assert (tmp_path / "f8" / shard).read_bytes() == (tmp_path / "f16" / shard).read_bytes()


def test_32_bit_images_and_large_images_are_refused(tmp_path, monkeypatch):
    # Restored after the test, because the script changes it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    tree = make_images(tmp_path / "images", classes=1, per_class=2)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tree / "class0/float.tif")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tree / "class0/integer.tif")
    Image.new("L", (9, 12)).save(tree / "class0/large.png")
    flags = ("--data-path", tree, "--features-path", tmp_path / "f", *PIXELS, "--max-pixels")
    stderr = run("extract_features.py", *flags, 100, expect=1).stderr
    assert "float.tif (ValueError: pixels are 32-bit floats" in stderr
    assert "integer.tif (ValueError: pixels are 32-bit integers" in stderr
    assert "large.png (ValueError: 9 x 12 pixels exceed the limit of 100" in stderr
    stderr = run("extract_features.py", *flags, 108, expect=1).stderr
    assert "2 images could not be read" in stderr
    assert len(FeatureDataset(tmp_path / "f")) == 3


def png_header(side: int) -> bytes:
    """Return a small PNG file that claims to have side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_decompression_bombs_truncated_images_and_other_files(tmp_path):
    tree = make_images(tmp_path / "images", classes=1, per_class=3)
    Image.new("L", (1, 20_000_000)).save(tree / "class0/elongated.png")
    (tree / "class0/bomb.png").write_bytes(png_header(60_000))
    (tree / "class0/text.png").write_text("hello")
    (tree / "class0/truncated.png").write_bytes((tree / "class0/0.png").read_bytes()[:70])
    done = run("extract_features.py", "--data-path", tree, "--features-path", tmp_path / "f", *PIXELS, expect=1)
    for reason in (
        "bomb.png (DecompressionBombError",
        "elongated.png (DecompressionBombError",
        "text.png (UnidentifiedImageError",
        "truncated.png (OSError",
    ):
        assert reason in done.stderr
    assert len(FeatureDataset(tmp_path / "f")) == 3


def test_an_image_size_that_does_not_suit_the_model_is_refused(tmp_path):
    tree = make_images(tmp_path / "images", per_class=1, size=12)
    flags = (f"--data-path={tree}", f"--features-path={tmp_path / 'f'}", "--vae=none", "--image-size=12")
    stderr = run("extract_features.py", *flags, "--model=RemixDiT-T/8", expect=2).stderr
    assert "--image-size 12 gives features of side 12. RemixDiT-T/8: patch_size must divide" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "f").exists()


def test_latents_of_a_local_vae(vae, tmp_path):
    tree = make_images(tmp_path / "images", per_class=3, size=16)
    flags = (f"--data-path={tree}", f"--vae={vae}", "--image-size=16", "--num-workers=1", "--batch-size=4")
    done = run("extract_features.py", *flags, "--features-path", tmp_path / "one", "--model", "DiT-T/2")
    assert "latents of the first shard: mean" in done.stderr
    run("extract_features.py", *flags, "--features-path", tmp_path / "two", "--num-workers=0")
    assert contents(tmp_path / "one") == contents(tmp_path / "two"), "with readers and without"
    dataset = FeatureDataset(tmp_path / "one")
    assert (dataset.shape, dataset.normalization, dataset.vae) == ((4, 8, 8), Normalization(0.5), str(vae))

    autoencoder = load_autoencoder(str(vae))
    image = torch.from_numpy(np.array(center_crop(Image.open(tree / "class0" / "0.png"), 16)))
    pixels = image.permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean, std = autoencoder.moments(pixels)
        posterior = autoencoder.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, posterior.mean * 0.5)
        noise = (dataset[0][0] - mean[0]) / std[0]
        assert autoencoder.decode(mean).shape == (1, 16, 16, 3)
    assert 0.5 < noise.std() < 1.5, "one draw from the posterior"


def test_results_of_another_vae_of_the_same_name_are_not_mixed(tmp_path):
    tree, vae = make_images(tmp_path / "images", per_class=1, size=16), make_vae(tmp_path / "vae", latent_channels=4)
    flags = [f"--data-path={tree}", f"--vae={vae}", "--image-size=16", "--num-workers=0"]
    run("extract_features.py", *flags, f"--features-path={tmp_path / 'f'}")
    trained = [*training_flags(tmp_path / "f", tmp_path, "run", "DiT-T/2"), "--sample-every=0"]
    run("train_fast.py", *trained, "--max-steps=1")
    few = [f"--ckpt={tmp_path / 'run'}", "--num-fid-samples=1", "--num-sampling-steps=1", f"--sample-dir={tmp_path}"]
    run("sample_ddp.py", *few)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, vae / "diffusion_pytorch_model.safetensors")
    run("extract_features.py", *flags, f"--features-path={tmp_path / 'new'}")
    for command in (
        ["extract_features.py", *flags, f"--features-path={tmp_path / 'f'}"],
        ["sample_ddp.py", *few],
        ["train_fast.py", *trained, f"--data-path={tmp_path / 'new'}", "--max-steps=2", "--resume=auto"],
    ):
        assert "vae_fingerprint" in run(*command, expect=2).stderr
    # Earlier versions did not record it.
    record = json.loads((tmp_path / "f/settings.json").read_text())
    del record["vae_fingerprint"], record["class0/0.png"]
    (tmp_path / "f/settings.json").write_text(json.dumps(record))
    assert "nothing to do" in run("extract_features.py", *flags, f"--features-path={tmp_path / 'f'}").stdout


def test_features_of_other_images_of_the_same_names_are_not_mixed(tmp_path):
    tree = make_images(tmp_path / "images", per_class=2)
    flags = (f"--data-path={tree}", f"--features-path={tmp_path / 'f'}", *PIXELS)
    run("extract_features.py", *flags)
    shutil.copy(tree / "class0/0.png", tree / "class2/1.png")
    assert "holds results with class2/1.png=" in run("extract_features.py", *flags, expect=2).stderr


def test_float16_features_are_the_float32_features_rounded(features, images, tmp_path):
    folder = tmp_path / "half"
    flags = ("--data-path", images, "--features-path", folder, *PIXELS)
    run("extract_features.py", *flags, "--dtype=float16")
    half, single = (np.load(path / "features-00000.npy") for path in (folder, features))
    assert half.dtype == np.float16
    assert np.array_equal(half, single.astype(np.float16))
    assert json.loads((folder / "index.json").read_text())["dtype"] == "float16"
    x, y = FeatureDataset(folder).__getitems__([(0, 0), (9, 1)])
    assert (x.dtype, y.tolist()) == (torch.float32, [0, 1])
    assert np.array_equal(x.numpy(), np.stack([half[0, 0], half[9, 1]]).astype(np.float32))
    (folder / "index.json").unlink()
    stderr = run("extract_features.py", *flags, expect=2).stderr
    assert "dtype=float16, not float32" in stderr and stderr.count("\n") == 1


def test_features_that_float16_cannot_hold_are_an_error(vae, tmp_path):
    tree = make_images(tmp_path / "images", classes=1, per_class=2, size=16)
    large = shutil.copytree(vae, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"scaling_factor": 1e7}))
    flags = (f"--data-path={tree}", f"--features-path={tmp_path / 'f'}", f"--vae={large}", "--image-size=16")
    stderr = run("extract_features.py", *flags, "--num-workers=0", "--dtype=float16", expect=2).stderr
    assert "class0/0.png: its features are not finite in float16 (use --dtype float32)" in stderr.splitlines()[-1]
    assert not (tmp_path / "f/index.json").exists()


def test_latents_of_two_normalizations_are_not_mixed(tmp_path):
    path = make_vae(tmp_path / "vae", latent_channels=4, scaling_factor=0.5)
    tree, folder = make_images(tmp_path / "images", classes=1, per_class=2, size=16), tmp_path / "f"
    flags = (f"--data-path={tree}", f"--features-path={folder}", f"--vae={path}", "--image-size=16", "--num-workers=0")
    run("extract_features.py", *flags)
    config = json.loads((path / "config.json").read_text())
    changes = {
        "scale=0.5, not 0.25": {"scaling_factor": 0.25},
        "shift=0.0, not 0.125": {"shift_factor": 0.125},
        "scale=0.5, not [5.0, 2.5": {"latents_mean": [0, 1, 2, 3], "latents_std": [0.1, 0.2, 0.3, 0.7]},
    }
    for interrupted in (False, True):
        if interrupted:
            (folder / "index.json").unlink()
        for message, change in changes.items():
            (path / "config.json").write_text(json.dumps(config | change))
            stderr = run("extract_features.py", *flags, expect=2).stderr
            assert f"holds results with {message}" in stderr and stderr.count("\n") == 1
    (path / "config.json").write_text(json.dumps(config))
    run("extract_features.py", *flags)
    assert (folder / "index.json").exists()


@pytest.mark.parametrize("store", ["draw", "moments"])
def test_the_scale_of_the_latents_is_logged(store):
    rng = np.random.default_rng(0)
    logger = logging.getLogger("test_the_scale")
    lines = []
    logger.addHandler(type("Lines", (logging.Handler,), {"emit": lambda self, record: lines.append(record.msg)})())
    logger.setLevel(logging.INFO)
    means, stds = 3 * rng.standard_normal((64, 1, 4, 16, 16)) + 1, np.full((64, 1, 4, 16, 16), 4.0)
    for scale, warned in ((1, True), (0.2, False), (0.05, True)):
        lines.clear()
        moments = np.concatenate([means, stds], axis=2) * scale
        draws = (means + stds * rng.standard_normal(means.shape)) * scale
        report_scale(moments if store == "moments" else draws, store, Normalization(0.5, 0.25), logger)
        values = [float(x) for x in re.findall(r"-?\d+\.\d+", lines[0])]
        np.testing.assert_allclose(values, [scale, 5 * scale], rtol=0.05)
        assert [line.startswith("warning: ") for line in lines[1:]] == [True] * warned
        # With the numbers of the warning, the same latents have a mean of 0 and a standard deviation of 1.
        for line in lines[1:]:
            z = draws / 0.5 + 0.25
            advised = json.loads(f"{{{line[line.index('write ') + 6 : line.rindex(' (docs')]}}}")
            assert advised.keys() == {"scaling_factor", "shift_factor"}
            x = (z - advised["shift_factor"]) * advised["scaling_factor"]
            np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=0.05)


def test_the_scale_of_channels_that_differ_is_advised_per_channel():
    """The entries are those of a VAE's config, which give every channel a mean of 0 and a standard deviation of 1."""
    z = np.random.default_rng(0).standard_normal((64, 1, 3, 8, 8)) * [[[1]], [[5]], [[2]]] + [[[0]], [[9]], [[-1]]]
    used = Normalization([0.5, 1.0, 2.0], [0.0, 1.0, 2.0])
    x = used.apply(torch.from_numpy(z[:, 0]), torch.zeros(64, 3, 8, 8))[0].numpy()[:, None]
    advised = json.loads(f"{{{unit_config(x, np.zeros_like(x), used)}}}")
    again = Normalization.from_vae(advised | {"latent_channels": 3}).apply(torch.from_numpy(z[:, 0]), torch.zeros(()))[
        0
    ]
    np.testing.assert_allclose(again.mean((0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(again.std((0, 2, 3)), 1, atol=1e-3)


def test_the_reference_has_the_crops_of_the_features(images, features, tmp_path):
    """The images that the features of pixels hold, with their labels; unreadable ones are left out and reported."""
    tree = shutil.copytree(images, tmp_path / "images")
    flags = ["--data-path", tree, "--image-size=8", "--num-workers=0", "--batch-size=5"]
    done = run("extract_features.py", *flags, "--reference", tmp_path / "ref.npz")
    assert done.stdout.endswith("ref.npz: 24 images of 8x8 pixels with their labels\n")
    x, y = FeatureDataset(features).__getitems__(list(range(24)))
    with np.load(tmp_path / "ref.npz") as file:
        pixels, labels = file["arr_0"], file["arr_1"]
    assert pixels.dtype == np.uint8 and labels.tolist() == y.tolist() == sorted([0, 1, 2] * 8)
    shown = ((x + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    # The dataset draws whether an image is mirrored.
    assert all(np.array_equal(a, b) or np.array_equal(a, b[:, ::-1]) for a, b in zip(shown, pixels, strict=True))
    assert "exists: choose" in run("extract_features.py", *flags, "--reference", tmp_path / "ref.npz", expect=2).stderr

    (tree / "class1/3.png").write_bytes(b"not an image")
    gray = [*flags, "--reference", tmp_path / "gray.npz", "--grayscale"]
    done = run("extract_features.py", *gray, expect=1)
    assert "unreadable: class1/3.png" in done.stdout
    with np.load(tmp_path / "gray.npz") as file:
        assert len(file["arr_0"]) == len(file["arr_1"]) == 23 and file["arr_1"].tolist().count(1) == 7
        assert np.ptp(file["arr_0"], axis=3).max() == 0
    both = run("extract_features.py", *flags, "--reference=r.npz", "--features-path=f", expect=2).stderr
    assert "not allowed with argument" in both
    for path in tree.rglob("*.png"):
        path.write_bytes(b"not an image")
    none = run("extract_features.py", *flags, "--reference", tmp_path / "none.npz", expect=2).stderr
    assert "none of the images could be read" in none and not (tmp_path / "none.npz").exists()


def test_draws_are_not_mixed_with_moments(moments, vae):
    flags = (f"--data-path={moments.parent / 'images'}", f"--features-path={moments}", f"--vae={vae}")
    stderr = run("extract_features.py", *flags, "--image-size=16", expect=2).stderr
    assert "holds results with store=moments, not draw" in stderr


def test_pixels_have_no_moments(images, tmp_path):
    flags = ["--data-path", images, "--features-path", tmp_path / "out", *PIXELS]
    stderr = run("extract_features.py", *flags, "--store", "moments", expect=2).stderr
    assert "nothing to draw" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_center_crop():
    image = Image.new("RGB", (300, 100))
    image.paste((255, 0, 0), (100, 0, 200, 100))
    crop = np.array(center_crop(image, 32))
    assert crop.shape == (32, 32, 3)
    assert (crop[:, 2:-2] == [255, 0, 0]).all()


def test_hidden_folders_and_files_are_no_classes_and_no_images(features, images, tmp_path):
    tree = shutil.copytree(images, tmp_path / "images")
    copies = (
        ".ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/class0/._0.png",
        "@eaDir/0.png/THUMB.png",
        "class0/._0.png",
        "class1/.ipynb_checkpoints/0-checkpoint.png",
        "class2/@eaDir/0.png/THUMB.png",
    )
    for copy in copies:
        (tree / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "class0/0.png", tree / copy)
    (tree / "class0/.DS_Store").touch()
    stderr = run("extract_features.py", "--data-path", tree, "--features-path", tmp_path / "f", *PIXELS).stderr
    assert "hidden images, and those in hidden folders, are left out: 6, such as .ipynb_checkpoints/0" in stderr
    assert "files that are not images" not in stderr
    assert contents(tmp_path / "f") == contents(features)
    for folder in images.iterdir():
        shutil.rmtree(tree / folder.name)
    flags = ("--data-path", tree, "--features-path", tmp_path / "g", *PIXELS)
    assert "does not hold one folder of images per class" in run("extract_features.py", *flags, expect=2).stderr


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (("train/cat/0.png", "val/cat/0.png"), "use --data-path {}/train"),
        (("Training/cat/0.png",), "use --data-path {}/Training"),
        (("train2017/cat/0.png", "val2017/0.png", "extra/cat/0.png"), "use --data-path {}/train2017"),
        (("train/0.png", "test/0.png"), "put the images into folders by class"),
        (("train/cat/0.png", "val/cat/0.png", ".cache/0.png"), "use --data-path {}/train"),
        (("train/0.png", "bus/0.png"), None),
        (("train/side/0.png", "bus/side/0.png", "tram/0.png"), None),
        (("train/0.png",), None),
        (("training_shoe/0.png", "crash_test/0.png"), None),
    ],
)
def test_the_parent_folder_of_splits_is_refused(images, tmp_path, files, remedy):
    for file in files:
        (tmp_path / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "class0/0.png", tmp_path / "tree" / file)
    flags = ("--data-path", tmp_path / "tree", "--features-path", tmp_path / "f", *PIXELS)
    stderr = run("extract_features.py", *flags, expect=2 if remedy else 0).stderr
    if remedy:
        assert "holds the splits of a data set" in stderr and stderr.count("\n") == 1
        assert stderr.strip().endswith(remedy.format(tmp_path / "tree"))
        assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_images_are_encoded_as_they_are_displayed(tmp_path, suffix, orientation):
    """A corner of each image is bright; Pillow's exif_transpose says where it is displayed."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    (tmp_path / "images/c").mkdir(parents=True)
    file = tmp_path / f"images/c/0.{suffix}"
    Image.fromarray(pixels).save(file, exif=exif, **options)
    Image.fromarray(pixels).save(tmp_path / "images/c/1.png")
    flags = ("--data-path", tmp_path / "images", "--features-path", tmp_path / "f", *PIXELS)
    assert "files: EXIF orientation applied (1 image)" in run("extract_features.py", *flags).stderr
    assert json.loads((tmp_path / "f/index.json").read_text())["treated"] == {"EXIF orientation applied": 1}
    bright = (FeatureDataset(tmp_path / "f")[0][0] > 0)[0]
    corners = {2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    expected = torch.zeros(2, 2, dtype=torch.bool)
    expected[corners[orientation]] = True
    assert torch.equal(bright, expected.repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_what_is_not_applied_is_counted(features, tmp_path):
    (tmp_path / "images/c").mkdir(parents=True)
    pixels = Image.fromarray(np.full((8, 8, 4), 100, np.uint8))
    pixels.save(tmp_path / "images/c/alpha.png")
    pixels.convert("RGB").save(tmp_path / "images/c/profile.jpg", icc_profile=b"Display P3")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels.convert("RGB").save(tmp_path / "images/c/srgb.jpg", icc_profile=srgb)
    pages = [pixels.convert("RGB"), Image.new("RGB", (8, 8))]
    pages[0].save(tmp_path / "images/c/pages.tif", save_all=True, append_images=pages[1:])
    # Damaged metadata do not make an image unreadable.
    pixels.convert("RGB").save(tmp_path / "images/c/damaged.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    run("extract_features.py", "--data-path", tmp_path / "images", "--features-path", tmp_path / "f", *PIXELS)
    index = json.loads((tmp_path / "f/index.json").read_text())
    assert index["images"] == 5
    assert index["treated"] == {
        "damaged or unknown colour profile not applied": 1,
        "frames after the first left out": 1,
        "transparency left out": 1,
    }
    assert json.loads((features / "index.json").read_text())["treated"] == {}


def test_the_fingerprint_of_features(features, images, tmp_path):
    """It changes with the images, their order, labels and views, and not with the batch size or the type."""

    def fingerprint(tree, *flags) -> str:
        folder = tmp_path / f"f{len(list(tmp_path.iterdir()))}"
        run("extract_features.py", "--data-path", tree, "--features-path", folder, *PIXELS, *flags)
        return FeatureDataset(folder).fingerprint

    expected = FeatureDataset(features).fingerprint
    assert fingerprint(images, "--batch-size=5", "--dtype=float16", "--global-seed=3") == expected
    assert fingerprint(images, "--no-mirror") != expected
    swapped = shutil.copytree(images, tmp_path / "swapped")
    (swapped / "class1/3.png").rename(swapped / "class1/x.png")
    (swapped / "class1/4.png").rename(swapped / "class1/3.png")
    (swapped / "class1/x.png").rename(swapped / "class1/4.png")
    assert fingerprint(swapped) != expected
    moved = shutil.copytree(images, tmp_path / "moved")
    (moved / "class1/0.png").rename(moved / "class0/9.png")
    assert fingerprint(moved) != expected, "the same images in the same order with another label"
