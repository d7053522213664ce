"""Hugging Face datasets as input of extraction. The hub cannot be reached in tests."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import PIXELS, make_images, run

from features.dataset import FeatureDataset
from features.sources import FolderImages, TableImages
from runtime.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Let the library keep its files in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def make_table(images, **columns) -> "datasets.Dataset":
    """Return the images of a folder, in ImageFolder's order, as a dataset whose rows hold the files' bytes."""
    folder = FolderImages(images)
    rows = {"image": [{"bytes": Path(file).read_bytes(), "path": None} for file in folder.files]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=folder.classes)}
    features |= dict.fromkeys(columns, datasets.Value("string"))
    return datasets.Dataset.from_dict(rows | {"label": folder.labels} | columns, features=datasets.Features(features))


def assert_same_features(a, b):
    for file in ("features-00000.npy", "labels-00000.npy", "index.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_a_saved_dataset_gives_the_features_of_the_same_folder(features, images, tmp_path):
    table = make_table(images, caption=["text"] * 24)
    table.save_to_disk(tmp_path / "saved")
    run("extract_features.py", f"--data-path=hf:{tmp_path / 'saved'}", f"--features-path={tmp_path / 'f'}", *PIXELS)
    assert_same_features(tmp_path / "f", features)
    assert FeatureDataset(tmp_path / "f").classes == ["class0", "class1", "class2"]
    flags = (f"--data-path=hf:{tmp_path / 'saved'}", f"--features-path={tmp_path / 'f'}", *PIXELS)
    assert "nothing to do" in run("extract_features.py", *flags).stdout
    table.select(range(23, -1, -1)).save_to_disk(tmp_path / "reversed")
    stderr = run("extract_features.py", *flags, f"--data-path=hf:{tmp_path / 'reversed'}", expect=2).stderr
    assert "another names" in stderr
    other = make_images(tmp_path / "other", seed=1)
    make_table(other).save_to_disk(tmp_path / "same-labels")
    stderr = run("extract_features.py", *flags, f"--data-path=hf:{tmp_path / 'same-labels'}", expect=2).stderr
    assert "row 0=" in stderr and stderr.count("\n") == 1
    stderr = run("extract_features.py", *flags, f"--data-path={tmp_path / 'saved'}", expect=2).stderr
    assert f"for a Hugging Face dataset use --data-path hf:{tmp_path / 'saved'}" in stderr


def test_parquet_files_read_by_a_loader_process(features, images, tmp_path):
    (tmp_path / "data").mkdir()
    make_table(images).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    flags = (f"--data-path=hf:{tmp_path}", f"--features-path={tmp_path / 'f'}")
    run("extract_features.py", *flags, "--vae=none", "--image-size=8", "--num-workers=1")
    assert_same_features(tmp_path / "f", features)


def test_damaged_rows_are_skipped_and_tried_again(features, images, tmp_path):
    table = make_table(images)
    good = table.cast_column("image", datasets.Image(decode=False))[5]["image"]["bytes"]
    rows = table.cast_column("image", datasets.Image(decode=False)).to_dict()
    for content in (b"no image", good):
        rows["image"][5]["bytes"] = content
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.Dataset.from_dict(rows, features=table.features).save_to_disk(tmp_path / "saved")
        flags = (f"--data-path=hf:{tmp_path / 'saved'}", f"--features-path={tmp_path / 'f'}", *PIXELS)
        done = run("extract_features.py", *flags, expect=0 if content is good else 1)
        assert ("unreadable: row 5 (UnidentifiedImageError: cannot identify image file)" in done.stderr) == (
            content is not good
        )
    assert_same_features(tmp_path / "f", features)
    rows["image"][5] = None
    datasets.Dataset.from_dict(rows, features=table.features).save_to_disk(tmp_path / "none")
    flags = (f"--data-path=hf:{tmp_path / 'none'}", f"--features-path={tmp_path / 'g'}", *PIXELS)
    assert "row 5 (ValueError: the row has no image)" in run("extract_features.py", *flags, expect=1).stderr


def test_classes_without_images_are_left_out(images):
    table = make_table(images).filter(lambda row: row["label"] != 1)
    assert set(table["label"]) == {0, 2}
    table.save_to_disk(images.parent / "two")
    found = TableImages(f"hf:{images.parent / 'two'}")
    assert (found.classes, sorted(set(found.labels))) == (["class0", "class2"], [0, 1])
    assert found.notes == ["classes without images are left out: class1"]


def test_the_split(images, tmp_path):
    table = make_table(images)
    splits = {"train": table, "validation": table.select(range(8))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert len(TableImages(f"hf:{tmp_path / 'both'}")) == 24
    assert len(TableImages(f"hf:{tmp_path / 'both'}@validation")) == 8
    with pytest.raises(UserError, match=r"choose one of the splits train, validation, as in hf:.*@train"):
        TableImages(f"hf:{tmp_path / 'both'}@test")
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="choose one of the splits a, b"):
        TableImages(f"hf:{tmp_path / 'other'}")


def test_columns_that_are_not_clear_are_an_error_with_their_types(images, tmp_path):
    table = make_table(images, caption=["text"] * 24)
    cases = {
        "two": table.add_column("fine", table["label"]).cast_column("fine", table.features["label"]),
        "none": table.remove_columns("image"),
    }
    for name, case in cases.items():
        case.save_to_disk(tmp_path / name)
        flags = (f"--data-path=hf:{tmp_path / name}", f"--features-path={tmp_path / 'f'}", *PIXELS)
        last = run("extract_features.py", *flags, expect=2).stderr.splitlines()[-1]
        assert "one column of type Image and one of type ClassLabel" in last
        assert "label (ClassLabel), caption (string)" in last
    unlabelled = table.map(lambda row, i: {"label": -1 if i == 3 else row["label"]}, with_indices=True)
    unlabelled.save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(UserError, match="row 3 has no label in the column label"):
        TableImages(f"hf:{tmp_path / 'unlabelled'}")


def test_data_paths_that_hold_nothing(images, tmp_path):
    make_table(images).select([]).save_to_disk(tmp_path / "empty")
    cases = {
        f"hf:{tmp_path / 'empty'}": "holds no rows$",
        "hf:": "needs a name",
        "hf:@train": "needs a name",
        f"hf:{tmp_path / 'missing'}": "missing: no such folder$",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            TableImages(path)


def test_a_hub_that_cannot_be_reached_and_a_missing_package(monkeypatch, tmp_path):
    monkeypatch.setattr("runtime.hub.offline", lambda: True)
    with pytest.raises(UserError, match=r"hf:owner/name@train: .* the hub cannot be reached"):
        TableImages("hf:owner/name@train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    flags = ("--data-path=hf:owner/name", f"--features-path={tmp_path / 'f'}", *PIXELS)
    stderr = run("extract_features.py", *flags, expect=2).stderr
    assert "needs the package datasets: pip install datasets" in stderr and stderr.count("\n") == 1
    (tmp_path / "datasets.py").write_text("raise ImportError('pyarrow requires NumPy 2')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets")
    stderr = run("extract_features.py", *flags, expect=2).stderr
    assert "datasets cannot be imported: pyarrow requires NumPy 2" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (("apple/0.png", "crash_test/0.png", "training_shoe/0.png"), "crash_test, training_shoe"),
        (("apple/0.png", "train station/0.png", "train-set/0.png"), "train station, train-set"),
        (("train/apple/0.png", "train/crash_test/0.png"), "crash_test"),
        (("cat/0.png", "dog/0_val.png"), "0_val.png"),
        (("train/cat/0.png", "train/dog/0.png", "validation/cat/0.png"), None),
        (("cat/0.png", "contest/testimony.png"), None),
    ],
)
def test_class_names_that_the_package_takes_for_splits_are_refused(images, tmp_path, files, named):
    for file in files:
        (tmp_path / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "class0/0.png", tmp_path / "tree" / file)
    if named is None:
        assert len(TableImages(f"hf:{tmp_path / 'tree'}")) == 2
        return
    with pytest.raises(UserError, match=f"the package datasets takes {named} for a split, because"):
        TableImages(f"hf:{tmp_path / 'tree'}")
    root = tmp_path / "tree/train" if files[0].startswith("train/") else tmp_path / "tree"
    assert len(FolderImages(root)) == len(files), "what the refusal proposes"
