"""Run the whole pipeline on handwritten digits: encode, train, sample, score and draw, in minutes on a CPU.

    python demo.py

The dataset is scikit-learn's: 1,797 images of 8x8 pixels, which need no download. The demo prints each command before
it runs it. The commands are the project's scripts with ordinary flags, and can be copied for other data. All files are
written below --out. Steps that an earlier run finished are skipped.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from evaluation.networks import save_program
from runtime.command_line import ArgumentParser, flags, positive_int, run_script

ROOT = Path(__file__).resolve().parent
# Prefix of each run: its name in the table of scores, and its model.
MODELS = {
    "pretrained": ("pretrained DiT", "DiT-T/2"),
    "continued": ("continued training", "DiT-T/2"),
    "remix": ("Remix-DiT 4-20", "RemixDiT-T/2"),
    "flow": ("DiT, flow matching", "DiT-T/2"),
}


def main(args: argparse.Namespace):
    start = time.perf_counter()
    out = Path(args.out or ("demo-quick" if args.quick else "demo"))
    digits, features, outputs, samples = out / "digits", out / "features", out / "outputs", out / "samples"
    if args.quick:
        pretraining_steps, finetuning_steps, n_samples, sampling_steps = 60, 40, 100, 10
    else:
        pretraining_steps, finetuning_steps, n_samples, sampling_steps = 4000, 2000, 1000, 100

    print_heading("1. Write handwritten digits as image folders, and train a small classifier for the scores")
    if not (digits / "classifier.pt2").exists():
        write_digits(digits)

    print_heading("2. Encode the images: as pixels here, with a VAE on ImageNet")
    if not (features / "index.json").exists():
        pixels = flags(vae="none", image_size=8, grayscale=True, mirror=False, num_workers=0)
        run(args.processes, "extract_features.py", *flags(data_path=digits / "train", features_path=features), *pixels)

    print_heading(
        "3. Train a DiT, then continue its training as a DiT and as a Remix-DiT for the same number of steps; train a "
        "DiT with flow matching for as many steps as the first one"
    )
    checkpoints = train(features, outputs, pretraining_steps, finetuning_steps, args.processes)

    print_heading(f"4. Sample {n_samples:,} digits from each model")
    common = flags(num_fid_samples=n_samples, num_sampling_steps=sampling_steps, per_proc_batch_size=100)
    for prefix, ckpt in checkpoints.items():
        if not (samples / prefix / "samples.npz").exists():
            run(args.processes, "sample_ddp.py", *flags(ckpt=ckpt, sample_dir=samples, name=prefix), *common)

    print_heading("5. Score the samples against digits that were not used for training")
    for prefix in MODELS:
        files = flags(weights=digits / "classifier.pt2", json=samples / prefix / "scores.json")
        run(1, "evaluator.py", digits / "heldout.npz", samples / prefix / "samples.npz", *files)

    print_heading("6. Draw the learned mixing coefficients")
    for suffix in (".png", ".csv"):
        (out / f"coefficients{suffix}").unlink(missing_ok=True)
    run(1, "visualize.py", "coefficients", checkpoints["remix"], *flags(out=out / "coefficients.png"))
    shutil.copyfile(samples / "remix" / "grid.png", out / "digits.png")

    table = score_table(samples)
    (out / "scores.txt").write_text(table + "\n")
    print_heading(f"Done in {(time.perf_counter() - start) / 60:.1f} minutes")
    print(table)
    print(f"{n_samples:,} samples of one seed against 300 held-out digits, {finetuning_steps:,} fine-tuning steps")
    print(f"Generated digits       {out / 'digits.png'}")
    print(f"Mixing coefficients    {out / 'coefficients.png'}")


def write_digits(out: Path):
    """Write the splits of the digits, and a classifier whose features evaluator.py uses instead of Inception's.

    A split is a folder of PNG images, with one folder per class, and an .npz file for evaluator.py. The classifier,
    classifier.pt2, is written last: if it exists, all other files do.
    """
    splits = split_digits()
    for split, (images, labels) in splits.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = out / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        np.savez(out / f"{split}.npz", arr_0=np.repeat(images[..., None], 3, axis=-1), arr_1=labels)

    classifier = train_classifier(*splits["train"])
    for split, (images, labels) in splits.items():
        with torch.no_grad():
            accuracy = np.mean(classifier(as_input(images))[2].argmax(1).numpy() == labels)
        print(f"{split}: {len(images)} images, classifier accuracy {accuracy:.3f}", flush=True)
    save_program(classifier, out / "classifier.pt2", side=8)


def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the images and labels of three disjoint splits, which are the same on every call.

    Returns:
        For "train", "validation" (300 images for choosing settings) and "heldout" (300 images for reported results):
        images, uint8 [n, 8, 8] (the dataset's 0..16 scaled to 0..255), and labels [n].
    """
    # Only the first run reads the digits.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
    rest, heldout = train_test_split(np.arange(len(images)), test_size=300, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=300, stratify=labels[rest], random_state=0)
    rows = {"train": train, "validation": validation, "heldout": heldout}
    return {split: (images[i], labels[i]) for split, i in rows.items()}


class Classifier(nn.Module):
    """A small convolutional classifier of 10 classes of images of 8x8 pixels."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()
        )
        self.high = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 [B, 3, 8, 8].

        Returns:
            Pooled features [B, 64], spatial features [B, 128] and logits [B, 10].
        """
        low = self.low(images.float().mean(1, keepdim=True) / 127.5 - 1)  # [B, 64, 4, 4]
        pool = self.high(low)  # [B, 64]
        return pool, low[:, :8].flatten(1), self.logits(pool)


def train_classifier(images: np.ndarray, labels: np.ndarray) -> Classifier:
    """Train a classifier of images [n, 8, 8] and labels [n] for 30 epochs, from seed 0."""
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    x, y = as_input(images), torch.from_numpy(labels)
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(x[rows])[2], y[rows]).backward()
            optimizer.step()
    return classifier.eval()


def as_input(images: np.ndarray) -> Tensor:
    """Repeat grayscale images [n, H, W] as three channels, [n, 3, H, W]."""
    return torch.from_numpy(images).unsqueeze(1).expand(-1, 3, -1, -1)


def train(
    features: Path, outputs: Path, pretraining_steps: int, finetuning_steps: int, processes: int
) -> dict[str, Path]:
    """Train all MODELS that are not trained yet, and return their checkpoints by prefix."""
    common = flags(data_path=features, results_dir=outputs, global_batch_size=128, ema_decay=0.999)
    common += flags(log_every=500, num_workers=0, resume="auto")
    checkpoints = {}
    for prefix, (_, model) in MODELS.items():
        from_scratch = prefix in ("pretrained", "flow")
        steps = pretraining_steps if from_scratch else finetuning_steps
        checkpoints[prefix] = outputs / prefix / "checkpoints" / f"{steps:07d}.pt"
        if checkpoints[prefix].exists():
            continue
        words = flags(model=model, prefix=prefix, max_steps=steps)
        if from_scratch:
            words += flags(lr=2e-3, process="flow" if prefix == "flow" else None)
        else:
            words += flags(lr=1e-3, load_weight=checkpoints["pretrained"])
        if prefix == "remix":
            # On so few images, the published prior had a lower error on validation images than stronger ones.
            words += flags(n_basis=4, n_experts=20, prior_bonus=3)
        run(processes, "train_fast.py", *words, *common)
    return checkpoints


def score_table(samples: Path) -> str:
    """Return the scores of all models as a table."""
    lines = [f"{'':20} {'IS':>7} {'FID':>7} {'sFID':>7} {'Prec.':>7} {'Recall':>7}"]
    for prefix, (name, _) in MODELS.items():
        scores = json.loads((samples / prefix / "scores.json").read_text())
        values = (value for score, value in scores.items() if not score.endswith(" std"))
        lines.append(f"{name:20} " + " ".join(f"{value:7.2f}" for value in values))
    return "\n".join(lines)


def print_heading(text: str):
    print(f"\n== {text}", flush=True)


def run(processes: int, script: str, *words):
    """Print a script's command line as a user would type it, and run it; several processes run under torchrun."""
    words = [str(word) for word in words]
    line = shlex.join([script, *words])
    command, environment = [sys.executable], os.environ
    if processes > 1:
        print(f"$ OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node={processes} {line}", flush=True)
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        # Two processes on two cores must not compete for them.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
    else:
        print(f"$ python {line}", flush=True)
    done = subprocess.run([*command, ROOT / script, *words], env=environment)
    if done.returncode:
        raise SystemExit(f"demo.py: the command above failed (exit code {done.returncode})")


if __name__ == "__main__":
    parser = ArgumentParser(
        description="Encode, train, sample, score and draw, on handwritten digits, in minutes on a CPU."
    )
    parser.add_argument("--out", help="folder to write (default: demo, or demo-quick)")
    parser.add_argument(
        "--processes", type=positive_int, default=min(2, os.cpu_count() or 1), help="number of processes"
    )
    parser.add_argument("--quick", action="store_true", help="few steps and samples, to test that everything runs")
    run_script(main, parser)
