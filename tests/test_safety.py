"""Nobody is let in: files from strangers, images from anywhere, flags from anyone. And numbers that are not finite."""

import io
import itertools
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import PIXELS, make_images, run, training_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from checkpoint import checkpoints, find_corruption, load_model
from common import ArgumentParser, number
from diffusion import space_timesteps
from features import FeatureDataset, write_index, write_shard

# Strangers' files


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/remix-dit-test-was-here",))


def test_an_exported_program_whose_pickles_would_run_a_command(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "p.pt2", "w") as archive,
        archive.open("p/data/sample_inputs/model.pt", "w") as file,
    ):
        torch.save(Harmful(), file)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    files = (tmp_path / "a.npz", tmp_path / "a.npz", "--weights", tmp_path / "p.pt2")
    assert "cannot be loaded" in run("evaluator.py", *files, expect=2).stderr
    assert not os.path.exists("/tmp/remix-dit-test-was-here")


def test_an_exported_network_whose_weights_are_called_pickles(tmp_path):
    """Since PyTorch 2.9 a program's own configuration says which of its tensors are to be unpickled."""
    honest, harmful = tmp_path / "honest.pt2", tmp_path / "harmful.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),)), honest)
    pickled = io.BytesIO()
    torch.save(Harmful(), pickled)
    with zipfile.ZipFile(honest) as archive, zipfile.ZipFile(harmful, "w") as changed:
        config = next(name for name in archive.namelist() if name.endswith("weights_config.json"))
        entries = json.loads(archive.read(config))
        entry = next(iter(entries["config"].values()))
        entry["use_pickle"] = True
        for name in archive.namelist():
            content = pickled.getvalue() if name.endswith(f"/{entry['path_name']}") else archive.read(name)
            changed.writestr(name, json.dumps(entries) if name == config else content)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    files = (tmp_path / "a.npz", tmp_path / "a.npz", "--weights", harmful)
    assert "holds pickles" in run("evaluator.py", *files, expect=2).stderr
    assert not os.path.exists("/tmp/remix-dit-test-was-here")


def write_npz_header(path, shape):
    """An .npz whose arr_0 claims a shape and holds nothing."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def test_headers_that_lie(tmp_path):
    write_npz_header(tmp_path / "lie.npz", (10, 10**6, 10**6, 3))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}] * 9, dtype=object))
    for name in ("lie", "objects"):
        assert "not as long" in run("evaluator.py", tmp_path / f"{name}.npz", tmp_path / f"{name}.npz", expect=2).stderr


def bomb(side: int) -> bytes:
    """A PNG that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_images_that_are_bombs_cut_short_or_no_images(tmp_path):
    tree = make_images(tmp_path / "images", classes=1, per_class=3)
    Image.new("L", (1, 20_000_000)).save(tree / "class0/needle.png")
    (tree / "class0/bomb.png").write_bytes(bomb(60_000))
    (tree / "class0/text.png").write_text("hello")
    (tree / "class0/cut.png").write_bytes((tree / "class0/0.png").read_bytes()[:70])
    done = run("extract_features.py", "--data-path", tree, "--features-path", tmp_path / "f", *PIXELS, expect=1)
    for name in (
        "bomb.png (DecompressionBombError",
        "needle.png (DecompressionBombError",
        "text.png (UnidentifiedImageError",
        "cut.png (OSError",
    ):
        assert name in done.stderr
    assert len(FeatureDataset(tmp_path / "f")) == 3


# Numbers that are not finite


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """48 images in batches of 12, one of them all NaN: it spoils one step of four."""
    path = tmp_path_factory.mktemp("poisoned")
    rows = np.random.default_rng(0).normal(size=(48, 1, 3, 8, 8))
    rows[5] = np.nan
    write_shard(path, 0, rows, np.arange(48) % 3, [])
    write_index(path, 1, vae="none", scale=1.0, image_size=8, classes=["a", "b", "c"])
    return path


def test_a_nan_on_one_process_of_two_is_skipped_on_both(poisoned, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        run("train_fast.py", *training_flags(poisoned, tmp_path, name), "--max-steps", 8, processes=processes)
    one, two = (load_model(tmp_path / name / "checkpoints/0000008.pt")[0].state_dict() for name in ("one", "two"))
    for key, value in one.items():
        assert value.isfinite().all()
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-4)
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        counts = [line["bad_steps"] for line in lines]
        assert counts[-1] == 2
        went_bad = [now > before for before, now in itertools.pairwise([0, *counts])]
        assert went_bad == [line["loss"] is None for line in lines]
    state = torch.load(tmp_path / "one/checkpoints/0000008.pt", weights_only=True)
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {6}, (
        "AdamW counts good steps alone"
    )


def test_too_many_bad_steps_in_a_row_end_the_run(poisoned, tmp_path):
    np.save(tmp_path / "x.npy", 0)
    rows = np.full((48, 1, 3, 8, 8), np.nan)
    write_shard(tmp_path / "f", 0, rows, np.arange(48) % 3, [])
    write_index(tmp_path / "f", 1, vae="none", scale=1.0, image_size=8, classes=["a", "b", "c"])
    flags = [
        *training_flags(tmp_path / "f", tmp_path, "nan"),
        "--max-steps",
        50,
        "--max-bad-steps",
        5,
        "--ckpt-every",
        2,
    ]
    said = run("train_fast.py", *flags, expect=1).stderr
    assert "5 steps in a row" in said
    assert "the last, step 4: experts [0, 1, 2, 3, 4, 5], timesteps" in said
    assert "gradient norm nan" in said
    assert all(find_corruption(path) is None for path in checkpoints(tmp_path / "nan/checkpoints"))


# Properties


@given(st.text(max_size=12))
def test_number_flags_take_a_number_within_bounds_or_nothing(text):
    for kind, low, high in ((int, 1, 1000), (float, 0, 1)):
        try:
            value = number(kind, low, high)(text)
        except Exception as error:
            assert type(error).__name__ == "ArgumentTypeError"
        else:
            assert isinstance(value, kind)
            assert low <= value <= high


@given(st.lists(st.sampled_from(["--a", "--b", "1", "-1", "nan", "1e9", "--", "x"]), max_size=6))
@settings(deadline=None)
def test_the_parser_ends_with_values_or_one_line_and_2(flags):
    parser = ArgumentParser(prog="p")
    parser.add_argument("--a", type=number(int, 1, 9), default=1)
    parser.add_argument("--b", type=number(float, 0, above=True))
    try:
        args = parser.parse_args(flags)
    except SystemExit as end:
        assert end.code == 2
    else:
        assert 1 <= args.a <= 9
        assert args.b is None or args.b > 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 2000))
def test_spaced_timesteps_are_ascending_distinct_and_as_many_as_asked(counts, steps):
    try:
        chosen = space_timesteps(steps, counts)
    except ValueError:
        assert any(count > steps // len(counts) for count in counts)
    else:
        assert len(chosen) == sum(counts)
        assert chosen == sorted(set(chosen))
        assert chosen[0] >= 0
        assert chosen[-1] < steps


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 2), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_features_written_are_features_read(tmp_path_factory, counts, views, seed):
    if not sum(counts):
        counts = [*counts, 1]
    folder, generator = tmp_path_factory.mktemp("shards"), np.random.default_rng(seed)
    everything, labels = [], []
    for shard, count in enumerate(counts):
        rows = generator.normal(size=(count, views, 2, 3, 3)).astype(np.float32)
        everything += [*rows] if count else []
        labels.append(generator.integers(0, 4, count))
        write_shard(folder, shard, rows if count else np.zeros((0, views, 0, 0, 0)), labels[-1], [])
    write_index(folder, len(counts), vae="none", scale=1.0, image_size=3, classes=list("abcd"))
    dataset = FeatureDataset(folder)
    assert dataset.labels.tolist() == np.concatenate(labels).tolist()
    for i, image in enumerate(everything):
        for view in range(views):
            assert np.array_equal(dataset[i, view][0].numpy(), image[view])
