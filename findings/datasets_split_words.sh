#!/usr/bin/env bash
# datasets 5.2.0 (with pillow 13.0.0): load_dataset("imagefolder") on a folder with one folder of images per class.
#
# Expected: every image is in the split "train", and the feature "label" has the names of the folders.
# Behaviour: if the name of one class holds a word for a split between separators, such as "crash_test", its images are
# all that is loaded, as the split "test". The images of the other classes are left out without a warning or an error,
# and there is no feature "label".
# Output seen:
#     parked, crash, wet_road: train 9 of 9 images, labels ['crash', 'parked', 'wet_road']
#     parked, crash_test, wet_road: test 3 of 9 images, labels None
# Exits with 0 while this is so, and with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
from pathlib import Path

from datasets import load_dataset
from PIL import Image


def load(classes):
    """Write three images of each class, and return how many images each split has and the names of the labels."""
    root = Path("-".join(classes))
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name / f"{i}.png")
    splits = load_dataset("imagefolder", data_dir=str(root))
    labels = [split.features["label"].names if "label" in split.features else None for split in splits.values()]
    counts = {name: len(split) for name, split in splits.items()}
    for (name, count), names in zip(counts.items(), labels, strict=True):
        print(f"{', '.join(classes)}: {name} {count} of {3 * len(classes)} images, labels {names}")
    return counts, labels


plain = load(["parked", "crash", "wet_road"])
split_word = load(["parked", "crash_test", "wet_road"])
raise SystemExit(plain != ({"train": 9}, [["crash", "parked", "wet_road"]]) or split_word != ({"test": 3}, [None]))
PYTHON
