"""Run the whole pipeline on Fashion-MNIST: encode, fine-tune, sample, score and draw, in minutes on a CPU.

    python demo.py

The images, 70,000 garments of 16x16 gray pixels (studies/fashion-mnist), the pretrained DiT and the classifier of the
scores (studies/results/fashion) are in the repository, so nothing is downloaded. The demo prints each command before it
runs it. The commands are the project's scripts with ordinary flags, and can be copied for other data. All files are
written below --out. If the demo is interrupted, the same command continues.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np

from runtime.command_line import ArgumentParser, flags, positive_int, run_script
from runtime.errors import UserError
from runtime.files import SETTINGS, atomic_write, check_settings, write_json

ROOT = Path(__file__).resolve().parent
IMAGES = ROOT / "studies" / "fashion-mnist"
STUDY = ROOT / "studies" / "results" / "fashion"
# The results of seeds 0 to 4, which are those of `seed_table`.
RESULTS = STUDY / "demo.csv"
SEEDS = 5
SIDE = 16
# Name of each model in the tables and figures, by the name of its run.
MODELS = {"pretrained": "pretrained DiT", "continued": "continued training", "remix": "Remix-DiT 4-20"}
# Scores of evaluator.py in the tables.
SCORES = ("FID", "Inception Score", "Precision", "Recall")
# Timesteps between two at which the error is measured, and timesteps that are averaged in the figure.
EVERY, BIN = 5, 25
# Seconds of each part of the demo on two cores.
SECONDS = {"images": 15, "encode": 35, "continued": 85, "remix": 110, "sample": 80, "score": 30, "draw": 20}


def main(args: argparse.Namespace):
    out = Path(args.out or "demo" + ("-quick" if args.quick else "") + (f"-seed-{args.seed}" if args.seed else ""))
    open_folder(out, dict(seed=args.seed, quick=args.quick))
    images, features, runs, samples = out / "images", out / "features", out / "runs", out / "samples"
    if args.quick:
        per_class, steps, n_samples, sampling_steps, per_time = 50, 20, 100, 5, 5
    else:
        per_class, steps, n_samples, sampling_steps, per_time = None, 2500, 5000, 50, 100
    checkpoints = {name: runs / name / "checkpoints" / f"{steps:07d}.pt" for name in MODELS}
    checkpoints["pretrained"] = STUDY / "pretrained" / f"pixels-{args.seed}.safetensors"
    progress = Progress()

    progress.heading("images", "Write the images of 55,000 garments for training and 10,000 for testing")
    if not (images / "test.npz").exists():
        write_images(images, per_class)

    progress.heading("encode", "Encode the images: as pixels here, with a VAE on ImageNet")
    for split in ("train", "test"):
        if not (features / split / "index.json").exists():
            pixels = flags(vae="none", image_size=SIDE, grayscale=True, mirror=False, batch_size=256, num_workers=0)
            paths = flags(data_path=images / split, features_path=features / split)
            run(args.processes, "extract_features.py", *paths, *pixels)

    for name in ("continued", "remix"):
        progress.heading(name, f"Fine-tune the pretrained DiT as a {'Remix-DiT' if name == 'remix' else 'DiT'}")
        if not checkpoints[name].exists():
            # The EMA covers the last fifth of the run.
            words = flags(data_path=features / "train", results_dir=runs, prefix=name, max_steps=steps)
            words += flags(
                model="RemixDiT-T/4" if name == "remix" else "DiT-T/4", load_weight=checkpoints["pretrained"]
            )
            # The published prior.
            words += flags(n_basis=4, n_experts=20, prior_bonus=3) if name == "remix" else []
            words += flags(global_batch_size=128, lr=1e-3, ema_decay=0.998, global_seed=1000 + args.seed)
            words += flags(log_every=250, ckpt_every=500, keep=1, sample_every=0, num_workers=0)
            run(args.processes, "train_fast.py", *words, *flags(resume="auto"))

    progress.heading("sample", f"Sample {n_samples:,} images from each model")
    for name, checkpoint in checkpoints.items():
        if not (samples / name / "samples.npz").exists():
            words = flags(ckpt=checkpoint, num_fid_samples=n_samples, num_sampling_steps=sampling_steps, cfg_scale=1)
            words += flags(global_seed=args.seed, per_proc_batch_size=500)
            run(args.processes, "sample_ddp.py", *words, *flags(sample_dir=samples, name=name))

    progress.heading("score", "Score the samples against the test images, in the features of a classifier of garments")
    if not (out / "scores.json").exists():
        words = flags(weights=STUDY / f"classifier-{SIDE}.pt2", batch_size=200, cache=out / "cache")
        paths = [samples / name / "samples.npz" for name in MODELS]
        run(1, "evaluator.py", images / "test.npz", *paths, *words, *flags(json=out / "scores.json"))

    progress.heading("draw", "Draw the mixing coefficients, and the errors of the predicted noise over the timesteps")
    for suffix in (".png", ".csv"):
        (out / f"coefficients{suffix}").unlink(missing_ok=True)
    run(1, "visualize.py", "coefficients", checkpoints["remix"], *flags(out=out / "coefficients.png"))
    draw_garments(samples / "remix" / "samples.npz", out / "garments.png")
    errors = {name: heldout_errors(path, features / "test", per_time) for name, path in checkpoints.items()}
    draw_errors(errors, out / "errors.png")

    rows = collect_results(out / "scores.json", errors, args.seed, steps)
    write_rows(out / "scores.csv", rows)
    progress.end()
    print(score_table(rows))
    print(f"{n_samples:,} samples of each model in {sampling_steps} steps, {steps:,} steps of fine-tuning, one seed")
    print("error: of the predicted noise, on test images, relative to the pretrained DiT")
    print("--quick only tests that everything runs" if args.quick else seed_table(read_rows(RESULTS)))
    print(f"Generated garments           {out / 'garments.png'}")
    print(f"Mixing coefficients          {out / 'coefficients.png'}")
    print(f"Errors over the timesteps    {out / 'errors.png'}")


def open_folder(out: Path, settings: dict):
    """Create the folder of a demo, or check that it is that of an interrupted demo with the same settings."""
    record = out / SETTINGS
    if record.exists():
        check_settings(record, settings, "choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty, and not the folder of a demo: choose another one")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)


def write_images(out: Path, per_class: int | None):
    """Write the splits train and test as folders of PNG images, one folder per class, and test.npz for evaluator.py.

    Args:
        out: folder to write. test.npz is written last: if it exists, all other files do.
        per_class: number of images of each class; None for all.
    """
    from PIL import Image

    for split in ("train", "test"):
        sheets = [(path.stem, cut_sheet(path)[:per_class]) for path in sorted((IMAGES / split).glob("*.png"))]
        for name, images in sheets:
            (out / split / name).mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images):
                # Little compression, because small files take a block of the disk anyway.
                Image.fromarray(image).save(out / split / name / f"{number:04d}.png", compress_level=1)
    with atomic_write(out / "test.npz") as temporary, open(temporary, "wb") as file:
        images = np.concatenate([images for _, images in sheets])
        np.savez(file, arr_0=np.repeat(images[..., None], 3, axis=-1))


def cut_sheet(path: Path) -> np.ndarray:
    """Return the images of a sheet of studies/fashion-mnist, uint8 [n, 16, 16]."""
    from PIL import Image

    sheet = np.asarray(Image.open(path))
    return sheet.reshape(-1, SIDE, sheet.shape[1] // SIDE, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)


def draw_garments(samples: Path, path: Path):
    """Draw up to ten samples of each class, one class per row.

    Args:
        samples: .npz file of sample_ddp.py.
        path: the PNG to write.
    """
    from figures import save_grid

    with np.load(samples) as file:
        images, labels = file["arr_0"], file["arr_1"]
    columns = min(10, np.bincount(labels).min())
    # "9-ankle-boot". Only the first image of a row has a caption, which may be wider than the image.
    names = [sheet.stem.split("-", 1)[1] for sheet in sorted((IMAGES / "test").glob("*.png"))]
    captions = [name if i == 0 else "" for name in names for i in range(columns)]
    rows = [images[labels == label][:columns] for label in range(len(names))]
    save_grid(path, np.concatenate(rows), captions, columns, clip_captions=False)


def heldout_errors(checkpoint: Path, features: Path, per_time: int) -> np.ndarray:
    """Return the mean squared errors of a model's predicted noise on test images, [times], at every EVERY-th timestep.

    The images and their noise at a timestep are the same for all models.

    Args:
        checkpoint: file of the model.
        features: folder of the encoded test images.
        per_time: images per timestep.
    """
    import torch

    from diffusion import create_process
    from features.dataset import FeatureDataset
    from sampling.loading import load_denoiser
    from training.statistics import HeldOutErrors

    # More threads are slower for so small a model.
    torch.set_num_threads(1)
    model, config = load_denoiser([checkpoint])
    dataset = FeatureDataset(features)
    # The images are stored class by class. In this order, any few of them are of many classes.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    x, y = dataset.__getitems__(order.tolist())
    return HeldOutErrors(create_process(**config["diffusion"]), x, y, per_time)(model, range(0, 1000, EVERY)).numpy()


def error_changes(errors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the errors relative to those of the pretrained model, minus 1, in percent, as means of BIN timesteps.

    Args:
        errors: for each of MODELS, the errors at every EVERY-th timestep, from `heldout_errors`.
    """
    ratios = {name: values / errors["pretrained"] for name, values in errors.items()}
    return {name: 100 * (values.reshape(-1, BIN // EVERY).mean(1) - 1) for name, values in ratios.items()}


def draw_errors(errors: dict[str, np.ndarray], path: Path):
    """Draw the errors of the fine-tuned models over the timesteps, relative to those of the pretrained model.

    Args:
        errors: see `error_changes`.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure((7, 3.8), layout="constrained")
    axes = figure.subplots()
    times = np.arange(0, 1000, EVERY).reshape(-1, BIN // EVERY).mean(1)
    for (name, changes), color in zip(error_changes(errors).items(), ("gray", "tab:blue", "tab:red"), strict=True):
        axes.plot(times, changes, color=color, label=MODELS[name])
    # Linear up to 5 %, and logarithmic beyond, because the changes at high noise are much larger.
    axes.set_yscale("symlog", linthresh=5, linscale=1.5)
    ticks = [-60, -40, -20, -10, -5, -4, -3, -2, -1, 0, 1, 2, 5, 10, 20]
    limits = axes.get_ylim()
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.set(ylim=limits, xlim=(0, 1000), xlabel="timestep (0: least noise)")
    axes.set_ylabel(
        "change of the error on test images relative\nto the pretrained DiT, % (below -5: log scale)", size=9
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def collect_results(scores: Path, errors: dict[str, np.ndarray], seed: int, steps: int) -> list[dict]:
    """Return a row with the scores and the error of each model.

    Args:
        scores: the file of evaluator.py, with the models in the order of MODELS.
        errors: the errors of each model, from `heldout_errors`.
        seed: the demo's seed.
        steps: number of steps of fine-tuning.
    """
    by_name = dict(zip(MODELS, json.loads(scores.read_text()).values(), strict=True))
    return [
        dict(seed=seed, model=name, steps=0 if name == "pretrained" else steps)
        | {score: f"{by_name[name][score]:.4f}" for score in SCORES}
        | dict(error=f"{errors[name].mean():.7f}")
        for name in MODELS
    ]


def write_rows(path: Path, rows: list[dict]):
    """Write rows with the same columns as a CSV file."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def score_table(rows: list[dict]) -> str:
    """Return the scores and the error of each model as a table."""
    lines = [f"{'':20} {'FID':>7} {'IS':>7} {'Prec.':>7} {'Recall':>7} {'error':>8}"]
    for row in rows:
        change = 100 * (float(row["error"]) / float(rows[0]["error"]) - 1)
        scores = " ".join(f"{float(row[score]):7.2f}" for score in SCORES)
        lines.append(f"{MODELS[row['model']]:20} {scores} {change:+7.2f}%")
    return "\n".join(lines)


def seed_table(rows: list[dict]) -> str:
    """Return the changes of FID over the seeds of RESULTS: the mean, and the standard deviation over the seeds."""
    fid = {name: np.array([float(row["FID"]) for row in rows if row["model"] == name]) for name in MODELS}
    lines = [f"Change of FID in {len(fid['remix'])} seeds ({RESULTS.relative_to(ROOT)}):"]
    for name, base in (("continued", "pretrained"), ("remix", "continued")):
        change = fid[name] - fid[base]
        lines.append(
            f"  {MODELS[name]} relative to {MODELS[base]}: {change.mean():.2f} ± {change.std(ddof=1):.2f}, "
            f"lower in {(change < 0).sum()} of {len(change)}"
        )
    return "\n".join(lines)


class Progress:
    """Prints a heading for each part of the demo, with the time that is left."""

    def __init__(self):
        self.start = time.perf_counter()
        self.began = {}

    def heading(self, part: str, text: str):
        """Print the heading of a part. The time left is estimated from the time that the parts before it took."""
        now = time.perf_counter()
        self.began[part] = now
        names = list(SECONDS)
        number = names.index(part)
        left = sum(SECONDS[name] for name in names[number:])
        ends = [*self.began.values()]
        # Parts that an earlier run finished take no time.
        taken = {name: end - begin for name, begin, end in zip(self.began, ends, ends[1:], strict=False)}
        taken = {name: seconds for name, seconds in taken.items() if seconds > 1}
        # The estimate of the first parts is worth 30 seconds of measurement.
        expected = sum(SECONDS[name] for name in taken)
        left *= (30 + sum(taken.values())) / (30 + expected)
        print(f"\n== {number + 1} of {len(names)}: {text} ({timedelta(seconds=round(left))} left)", flush=True)

    def end(self):
        print(f"\n== Done in {(time.perf_counter() - self.start) / 60:.1f} minutes", flush=True)


def run(processes: int, script: str, *words):
    """Print a script's command line as a user would type it, and run it; several processes run under torchrun.

    Raises:
        SystemExit: if the command fails.
    """
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
        description="Encode, fine-tune, sample, score and draw, on Fashion-MNIST, in minutes on a CPU."
    )
    parser.add_argument("--out", help="folder to write (default: demo, demo-quick or demo-seed-SEED)")
    parser.add_argument(
        "--processes", type=positive_int, default=min(2, os.cpu_count() or 1), help="number of processes"
    )
    parser.add_argument(
        "--seed", type=int, choices=range(SEEDS), default=0, help="pretrained DiT, and seed of all random draws"
    )
    parser.add_argument("--quick", action="store_true", help="few images, steps and samples, to test that it runs")
    run_script(main, parser)
