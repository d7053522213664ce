"""Labelled images in a fixed order: a folder with one folder of images per class, or a Hugging Face dataset."""

import hashlib
import io
import os
import re
from pathlib import Path

from features.images import describe_hidden, describe_kinds, find_files, is_hidden, is_image
from runtime import hub
from runtime.errors import LocalError, UserError, first_line, is_first_process
from runtime.hub import PREFIX

# So many images, evenly spaced, tell a dataset from another one with the same labels or names of files.
SAMPLES = 64
# Names of folders that hold one split of a data set rather than one class, also with a number: "train", "val2017".
SPLIT_NAME = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?|unlabell?ed)[-_ ]?\d*", re.IGNORECASE
)
# A word for a split in the name of a folder or file, as the package datasets finds it: "crash_test", "val-0.png".
SPLIT_WORD = re.compile(r"(^|[-._ 0-9])(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?)([-._ 0-9]|$)")


class LabelledImages:
    """A list of images with labels.

    Args:
        labels: label of each image, an index of `classes`.
        classes: names of the classes. Classes without images are left out, and the others are numbered from 0.

    Attributes:
        labels: label of each image.
        classes: names of the classes that have images.
        notes: remarks about what is left out.
    """

    def __init__(self, labels: list[int], classes: list[str]):
        numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
        empty = [name for label, name in enumerate(classes) if label not in numbers]
        self.labels = [numbers[label] for label in labels]
        self.classes = [classes[label] for label in numbers]
        self.notes = [f"classes without images are left out: {', '.join(empty)}"] if empty else []

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Return a name of image i for messages, which no other image has."""
        raise NotImplementedError

    def file(self, i: int) -> str | io.BytesIO:
        """Return the path or the content of image i's file."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a hash that is equal for the same list of images."""
        raise NotImplementedError

    def samples(self) -> dict[str, str]:
        """Return hashes of the contents of at most SAMPLES evenly spaced images, by their names."""
        rows = sorted({i * (len(self) - 1) // (SAMPLES - 1) for i in range(SAMPLES)})
        return {self.name(i): hashlib.sha256(self._content(i)).hexdigest()[:16] for i in rows}

    def _content(self, i: int) -> bytes:
        """Return the content of image i's file, or its path if it cannot be read."""
        try:
            file = self.file(i)
        except ValueError:
            return b""
        if isinstance(file, io.BytesIO):
            return file.getvalue()
        try:
            return Path(file).read_bytes()
        except OSError:
            return str(file).encode()


class FolderImages(LabelledImages):
    """The images below a folder, in ImageFolder's order. Hidden files and folders are left out.

    Args:
        path: folder with one folder of images per class.

    Raises:
        UserError: if there are no images, or if the folders are the splits of a data set rather than its classes.
    """

    def __init__(self, path):
        if Path(path).is_file():
            raise UserError(f"--data-path {path} is a file: unpack it to a folder with one folder of images per class")
        # Importing torchvision takes longer than importing PyTorch, and Hugging Face datasets do not need it.
        from features.class_folders import ClassFolders

        if not Path(path).is_dir():
            raise UserError(f"--data-path {path}: no such folder")
        others, hidden = _find_unclassed(path)
        start = len(os.path.join(path, ""))

        def select(name: str) -> bool:
            if is_hidden(name[start:]):
                if is_image(name):
                    hidden.append(name[start:])
                return False
            if not is_image(name):
                others.append(name)
            return is_image(name)

        try:
            images = ClassFolders(path, is_valid_file=select, allow_empty=True)
        except FileNotFoundError:
            images = None
        if images is None or not images.samples:
            found = f", but {describe_kinds(others)}" if others else ""
            if any(name.endswith((".arrow", ".parquet")) for name in others):
                found += f": for a Hugging Face dataset use --data-path {PREFIX}{path}"
            raise UserError(f"--data-path {path} does not hold one folder of images per class{found}")
        super().__init__([label for _, label in images.samples], images.classes)
        self._check_splits(path, [file[start:] for file, _ in images.samples])
        if hidden:
            self.notes.append(describe_hidden(sorted(hidden)))
        if others:
            self.notes.append(f"files that are not images in class folders are left out: {describe_kinds(others)}")
        self.path = path
        self.files = [file for file, _ in images.samples]

    def _check_splits(self, path, files: list[str]):
        """Raise UserError if the folders are splits: two or more are named so, or all of them, with folders in them."""
        splits = [name for name in self.classes if SPLIT_NAME.fullmatch(name)]
        nested = sorted({file.split(os.sep)[0] for file in files if file.count(os.sep) > 1} & {*splits})
        all_named_so = len(splits) == len(self.classes)
        if (len(splits) > 1 and (nested or all_named_so)) or (nested and all_named_so):
            # A split without folders in it has no classes.
            remedy = f"use --data-path {Path(path) / nested[0]}" if nested else "put the images into folders by class"
            names = ", ".join(splits)
            raise UserError(f"--data-path {path} holds the splits of a data set ({names}), not its classes: {remedy}")

    def name(self, i: int) -> str:
        return os.path.relpath(self.files[i], self.path)

    def file(self, i: int) -> str:
        return self.files[i]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr([self.name(i) for i in range(len(self))]).encode()).hexdigest()


class TableImages(LabelledImages):
    """The rows of one split of a Hugging Face dataset, in their order.

    Args:
        path: hf:NAME or hf:NAME@SPLIT, where NAME is a folder or a dataset on the Hugging Face hub. The default is the
            only split, or "train".

    Raises:
        UserError: if the dataset cannot be loaded, or if it is not clear which split or columns to use.
    """

    def __init__(self, path: str):
        table = _load_split(path)
        # The package is installed, because _load_split has imported it.
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        columns = {
            kind: [name for name, feature in table.features.items() if isinstance(feature, kind)]
            for kind in (ImageFeature, ClassLabel)
        }
        if any(len(names) != 1 for names in columns.values()):
            types = (f"{name} ({_type_of(feature)})" for name, feature in table.features.items())
            raise UserError(
                f"--data-path {path} must have one column of type Image and one of type ClassLabel, "
                f"but its columns are {', '.join(types)}"
            )
        (self.column,), (label_column,) = columns.values()
        if not len(table):
            raise UserError(f"--data-path {path} holds no rows")
        labels = table.select_columns([label_column])[:][label_column]
        missing = next((i for i, label in enumerate(labels) if label is None or label < 0), None)
        if missing is not None:
            raise UserError(f"--data-path {path}: row {missing} has no label in the column {label_column}")
        super().__init__(labels, table.features[label_column].names)
        self.table = table.select_columns([self.column]).cast_column(self.column, ImageFeature(decode=False))

    def name(self, i: int) -> str:
        return f"row {i}"

    def file(self, i: int) -> str | io.BytesIO:
        stored = self.table[i][self.column] or {}
        if stored.get("bytes") is not None:
            return io.BytesIO(stored["bytes"])
        if stored.get("path") is None:
            raise ValueError("the row has no image")
        return stored["path"]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.column, self.labels)).encode()).hexdigest()


def load_images(path: str) -> LabelledImages:
    """List the images of --data-path: a folder with one folder per class, or hf:NAME (see `TableImages`)."""
    return TableImages(path) if str(path).startswith(PREFIX) else FolderImages(path)


def _find_unclassed(path) -> tuple[list[str], list[str]]:
    """Return the names of the files beside the class folders, and the paths of the images in hidden folders there."""
    others, hidden = [], []
    for entry in os.scandir(path):
        if entry.is_file() and not is_hidden(entry.name):
            others.append(entry.name)
        elif entry.is_dir() and is_hidden(entry.name):
            found = find_files(entry.path)
            hidden += [os.path.relpath(file, path) for file in found.images + found.hidden]
    return others, hidden


def _check_split_words(path: str, name: str):
    """Raise UserError if the package datasets would take classes or files of a folder of images for splits.

    It divides a folder by the words for splits in the names of its folders and files, unless README.md lists the files.
    The images of a class such as crash_test are then another split, and those of classes without such a word are lost.
    """
    readme = Path(name, "README.md")
    if readme.is_file() and "data_files" in readme.read_text(errors="replace"):
        return
    files = [os.path.relpath(file, name).split(os.sep) for file in find_files(name).images]
    # A folder at the top that is named as a split is one.
    parts = [part for file in files for part in file[SPLIT_NAME.fullmatch(file[0]) is not None and len(file) > 1 :]]
    words = sorted({part for part in parts if SPLIT_WORD.search(part)})
    if words:
        raise UserError(
            f"--data-path {path}: the package datasets takes {', '.join(words[:3])} for a split, because of the word "
            f"in its name: use --data-path with the folder that holds the classes, without {PREFIX}"
        )


def _type_of(feature) -> str:
    """Return the name of a feature's type: that of its class, or of its numbers."""
    return getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__


def _load_split(path: str):
    """Load one split of a Hugging Face dataset as a datasets.Dataset. See `TableImages`."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"--data-path {path} needs the package datasets: pip install datasets") from None
    except ImportError as error:
        # Its package pyarrow may need another version of NumPy.
        raise UserError(f"--data-path {path}: the package datasets cannot be imported: {first_line(error)}") from None
    if not is_first_process():
        datasets.disable_progress_bars()
    name, split = path.removeprefix(PREFIX), ""
    if "@" in name and not Path(name).is_dir():
        name, _, split = name.rpartition("@")
    if not name:
        raise UserError(f"--data-path {path} needs a name, as in {PREFIX}NAME or {PREFIX}NAME@SPLIT")
    if Path(name).is_absolute() and not Path(name).exists():
        raise UserError(f"--data-path {path}: no such folder")
    table = _load_dataset(path, name)
    if not isinstance(table, dict):
        table = {str(table.split or "train"): table}
    if not split:
        split = "train" if "train" in table else next(iter(table)) if len(table) == 1 else split
    if split not in table:
        raise UserError(
            f"--data-path {path}: choose one of the splits {', '.join(table)}, as in {PREFIX}{name}@{next(iter(table))}"
        )
    return table[split]


def _load_dataset(path: str, name: str):
    """Load all splits of a Hugging Face dataset, or the single table of a folder, by the name in --data-path."""
    import datasets

    unreachable = not Path(name).is_dir() and hub.offline()
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(name)
        if Path(name).is_dir():
            _check_split_words(path, name)
        # Without this, the library would retry for half a minute.
        datasets.config.HF_HUB_OFFLINE = unreachable
        return datasets.load_dataset(name)
    except UserError:
        raise
    except IndexError:
        # load_from_disk finds no file of a dataset without rows.
        raise LocalError(f"--data-path {path} holds no rows") from None
    except Exception as error:
        # The network, the hub and the library raise errors of many kinds.
        reason = "the hub cannot be reached, and the dataset is not in its cache" if unreachable else first_line(error)
        failure = "not a Hugging Face dataset" if Path(name).is_dir() else "no such folder, and not found on the hub"
        raise LocalError(f"--data-path {path}: {failure}: {reason}") from None
