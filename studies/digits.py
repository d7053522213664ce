"""Prepare a small real dataset that needs no download: scikit-learn's handwritten digits, 1,797 images of 8x8 pixels.

    python studies/digits.py --out data/digits

Writes three disjoint splits: train, validation (for choosing settings) and heldout (for reported results). A split is a
folder of PNG images, with one folder per class, and an .npz file for evaluator.py. Also writes classifier.pt2, a small
network trained on the training split, which evaluator.py uses instead of Inception.
"""

import argparse
from pathlib import Path

import numpy as np
from classifiers import accuracy, export, save_split, train_classifier
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from runtime.command_line import ArgumentParser, run_script

SPLITS = {"train": 1197, "validation": 300, "heldout": 300}


def main(args: argparse.Namespace):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    splits = split_digits()
    for split, (images, labels) in splits.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = out / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        save_split(out, split, images, labels)

    classifier = train_classifier(*splits["train"], epochs=30)
    for split, (images, labels) in splits.items():
        print(f"{split}: {len(images)} images, classifier accuracy {accuracy(classifier, images, labels):.3f}")
    # The classifier is written last: if it exists, all other files do.
    export(classifier, 8, out / "classifier.pt2")
    print(f"wrote {out}")


def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the images and labels of each split, which are the same on every call.

    Returns:
        For each split, images, uint8 [n, 8, 8] (the dataset's 0..16 scaled to 0..255), and labels [n].
    """
    digits = load_digits()
    images, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
    rest, heldout = train_test_split(
        np.arange(len(images)), test_size=SPLITS["heldout"], stratify=labels, random_state=0
    )
    train, validation = train_test_split(rest, test_size=SPLITS["validation"], stratify=labels[rest], random_state=0)
    rows = {"train": train, "validation": validation, "heldout": heldout}
    return {split: (images[i], labels[i]) for split, i in rows.items()}


if __name__ == "__main__":
    parser = ArgumentParser(description="Write scikit-learn's digits as image folders, with a small classifier.")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    run_script(main, parser)
