"""Repeat tables 1 and 2 of the paper on Fashion-MNIST, from images to FID, and extend them.

    python studies/fashion.py 1 --setting pixels --seeds 0 1 2 3 4
    python studies/fashion.py figures
    python studies/fashion.py sheets

Tables 1 and 2 are those of the paper. Table 3 compares low-rank bases, table 4 other numbers of fine-tuning steps and
other widths of the model, table 5 ideas that go past the paper, on validation images, and table 6 the best of them, on
test images. The settings are pixels (16x16 pixels, DiT-T/4) and latents (32x32 pixels encoded as 4x8x8, DiT-T/2).

Pretrains a tiny DiT for each seed, fine-tunes every variant of the table from it on the same number of images, and
measures each variant's errors and the scores of its samples. Every part is a run of the project's scripts with ordinary
flags. Results are added to --out as soon as they exist, and what exists there is not computed again; an interrupted run
continues. "figures" draws the figures from the results. "sheets" writes the copy of the images that the demo reads.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import runpy
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import write_imagenet_features, write_sheets, write_splits
from measurements import SCORES, add_result, code_version, read_results
from plots import draw_figures
from tables import write_tables
from variants import MAIN, SETTINGS, STEPS, TABLES, VARIANTS, baseline

from diffusion import create_process
from features.dataset import FeatureDataset
from models import DIT
from runtime.command_line import ArgumentParser, flags, positive_int, run_script, seed_int
from runtime.files import lock_folder
from sampling.loading import load_denoiser
from training.statistics import HeldOutErrors

ROOT = Path(__file__).resolve().parent.parent
# The VAE and the classifiers, which all results share. The code that trained them is in commit af07844. The path is
# relative, because checkpoints record it.
NETWORKS = Path(os.path.relpath(ROOT / "studies" / "results" / "fashion"))
BATCH = 128
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Study:
    """The files of one setting and the size of its runs.

    Attributes:
        setting: key of SETTINGS.
        work: folder of the dataset.
        folder: folder of the runs, features, samples and logs.
        out: folder of the results.
        pretraining, finetuning: numbers of training steps.
        samples, sampling_steps: samples for FID, and DDPM steps.
        per_timestep: images for the error of each timestep.
        compile: run the models through torch.compile.
    """

    setting: str
    work: Path
    folder: Path
    out: Path
    pretraining: int = 20_000
    finetuning: int = STEPS
    samples: int = 10_000
    sampling_steps: int = 100
    per_timestep: int = 100
    compile: bool = True

    def features(self, split: str) -> Path:
        return self.folder / "features" / f"{self.setting}-{split}"

    def scorings(self, name: str = "pretrained") -> list[tuple[str, Path, Path]]:
        """Return the beginning of the scores' names, the images and the network of each scoring of a variant.

        EfficientNet takes a fifth of the time of a variant, so it scores MAIN only, and only if it is installed.
        """
        side = SETTINGS[self.setting][0]
        classifier, imagenet = NETWORKS / f"classifier-{side}.pt2", self.work / f"efficientnet-lite0-{side}.pt2"
        test, validation = (self.work / f"{split}-{side}.npz" for split in ("test", "validation"))
        scorings = [("", test, classifier), ("validation_", validation, classifier), ("imagenet_", test, imagenet)]
        return scorings if imagenet.exists() and name in MAIN else scorings[:2]


def main(args: argparse.Namespace):
    work, out = Path(args.work), Path(args.out)
    if args.task == "figures":
        return draw_figures(out)
    if args.task == "sheets":
        return write_sheets(work)
    study = Study(args.setting, work, work, out)
    if args.quick:
        sizes = dict(pretraining=60, finetuning=30, samples=50, sampling_steps=5, per_timestep=4, compile=False)
        study = Study(args.setting, work, work / "quick", work / "quick" / "results", **sizes)
    # Models run in parallel, with one core each. GPUs compute in fp32 without TF32, as CPUs do.
    os.environ |= {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    torch.set_num_threads(1)
    with output_to(study.folder / "runs" / "data.log"):
        prepare(study)
    lock_folder(study.out, "--out")

    names = args.variants or " ".join(TABLES[int(args.task)].parts.values()).split()
    # The tables show no variant without its baseline, which is trained from a pretrained model of its width.
    names = {"pretrained", *names, *map(baseline, names)}
    names |= {name.replace("continued", "pretrained") for name in map(baseline, names)} & VARIANTS.keys()
    done = {(row["variant"], row["seed"]) for row in read_results(study.out, study.setting)}
    missing = [(name, seed) for name in VARIANTS if name in names for seed in sorted(set(args.seeds))]
    missing = [pair for pair in missing if pair not in done]
    print(f"{len(missing)} results are missing in {study.out / study.setting}.csv")
    command = shlex.join(["python", "studies/fashion.py", *sys.argv[1:]])
    # Each run has a process of its own, which loads the code as it is then.
    spawn = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1)
    with workers, tqdm(total=len(missing), unit="variant", smoothing=0) as bar:
        # The other variants are fine-tuned from the pretrained models.
        for pretrained in (True, False):
            pairs = [pair for pair in missing if pair[0].startswith("pretrained") == pretrained]
            jobs = [workers.submit(run_variant, study, *pair) for pair in pairs]
            for job in as_completed(jobs):
                if job.exception():
                    workers.shutdown(wait=False, cancel_futures=True)
                row, errors = job.result()
                add_result(study.out, study.setting, row | {"command": command}, errors)
                write_tables(study.out)
                bar.update()


@contextlib.contextmanager
def output_to(log: Path):
    """Append everything that is printed to a file; an error names the file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    except BaseException:
        print(f"stopped: see {log}", file=sys.stderr)
        raise


def run(script: str, *words):
    """Run one of the project's scripts in this process, as `python script words`."""
    arguments = [str(ROOT / script), *map(str, words)]
    print(f"$ python {shlex.join([script, *arguments[1:]])}", flush=True)
    argv, sys.argv = sys.argv, arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.argv = argv


def prepare(study: Study):
    """Write, encode and split the images, and compute the features of the reference images, unless they exist."""
    side = SETTINGS[study.setting][0]
    write_splits(study.work)
    write_imagenet_features(study.work / f"efficientnet-lite0-{side}.pt2", side)
    pixels = study.setting == "pixels"
    encoding = dict(vae="none", grayscale=True) if pixels else dict(vae=NETWORKS / "vae", store="moments")
    for split in ("train", "validation", "test"):
        if not (study.features(split) / "index.json").exists():
            folders = flags(data_path=study.work / split, features_path=study.features(split))
            sizes = flags(image_size=side, mirror=False, num_workers=0, batch_size=256)
            run("extract_features.py", *folders, *sizes, *flags(**encoding))
    for _, images, network in study.scorings():
        output = dict(weights=network, save_stats=study.work / "statistics.npz")
        run("evaluator.py", images, *flags(**output, batch_size=200, cache=study.work / "cache"))


def run_variant(study: Study, name: str, seed: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Train and score one variant with one seed.

    Returns:
        The values of COLUMNS, except the command, and the errors of the test and validation images at every timestep.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    # Before the run, in which the code may change.
    commit = code_version()
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    machine = ", ".join([*gpu, platform.machine(), f"{os.cpu_count()} cores", f"PyTorch {torch.__version__}"])
    with output_to(study.folder / "runs" / f"{study.setting}-{name}-{seed}.log"):
        checkpoints, steps = train(study, name, seed)
        if not all(path.exists() for path in checkpoints):
            raise RuntimeError(f"the training of {name} with seed {seed} was stopped by a signal")
        errors = {split: heldout_errors(study, checkpoints, split) for split in ("test", "validation")}
        scores = sample_and_score(study, checkpoints, name, seed)
    row = {"variant": name, "seed": seed, "steps": steps}
    row |= {f"{split}_error": f"{values.mean():.7f}" for split, values in errors.items()}
    row |= {key: f"{scores[key]:.6g}" for key in SCORES if key in scores}
    minutes, date = f"{(time.perf_counter() - start) / 60:.1f}", time.strftime("%Y-%m-%d")
    return row | dict(minutes=minutes, commit=commit, machine=machine, date=date), errors


def train(study: Study, name: str, seed: int) -> tuple[list[Path], int]:
    """Train a variant, unless its checkpoints exist; an interrupted training continues.

    Args:
        study: the study.
        name: key of VARIANTS.
        seed: seed of the pretrained model.

    Returns:
        The checkpoints (one per independent expert, otherwise one) and the total number of steps.
    """
    values = dict(global_batch_size=BATCH) | VARIANTS[name]
    width, length, flops, independent = values.pop("width", None), values.pop("length", 1), values.pop("flops", 1), 1
    weights = study.out / "pretrained" / f"{study.setting}-{f'width-{width}-' if width else ''}{seed}.safetensors"
    model = f"DiT-T{width or ''}/{SETTINGS[study.setting][1]}"
    if width:
        register_width(width, SETTINGS[study.setting][1])
    common = dict(data_path=study.features("train"), compile=study.compile, precision="fp32")
    if name.startswith("pretrained"):
        steps = study.pretraining
        common |= dict(model=model, lr=2e-3, ema_decay=EMA_DECAY, global_seed=seed)
    else:
        values["model"] = f"Remix{model}" if "n_basis" in values else model
        steps = round(round(study.finetuning * length) * BATCH // values["global_batch_size"] / flops)
        common |= dict(lr=1e-3, load_weight=weights, global_seed=1000 + seed)
        if name.startswith("independent-8"):
            # To compile eight short runs takes longer than it saves.
            independent, common["compile"], values["independent"] = 8, False, 8
        # The EMA covers the same part of a shorter or longer run. With a decay of 0.999, the EMA of an independent
        # expert after its 625 steps would have 54 % of the pretrained weights; that of 5,000 steps has 0.7 %.
        common["ema_decay"] = EMA_DECAY ** (independent / length)

    runs, prefix = study.folder / "runs", f"{study.setting}-{name}-{seed}"
    names = [f"{prefix}-{i}" for i in range(independent)] if independent > 1 else [prefix]
    paths = [runs / each / "checkpoints" / f"{steps // independent:07d}.pt" for each in names]
    finished = [weights] if name.startswith("pretrained") else paths
    if all(path.exists() for path in finished):
        return finished, steps
    # Previews are not needed. The newest checkpoint is enough to continue from.
    quiet = flags(num_workers=0, log_every=500, sample_every=0, ckpt_every=1000, keep=1, resume="auto")
    run("train_fast.py", *flags(results_dir=runs, prefix=prefix, max_steps=steps, **common, **values), *quiet)
    if name.startswith("pretrained"):
        run("convert.py", *paths, weights, *flags(to="safetensors"))
    return finished, steps


def register_width(width: int, patch: int):
    """Add a size of another width to the record of DiT in this process, in which the scripts run.

    The sizes of the project have one tiny model, of width 48.
    """
    DIT.sizes[f"T{width}/{patch}"] = dict(patch_size=patch, depth=3, hidden_size=width, num_heads=3)


def heldout_errors(study: Study, checkpoints: list[Path], split: str) -> np.ndarray:
    """Return the mean squared errors of a model's predicted noise on a split, at every timestep, float32 [1000]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_denoiser(checkpoints)
    dataset = FeatureDataset(study.features(split))
    # The images are stored class by class. In this order, any few of them are of many classes.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    x, y = (tensor.to(device) for tensor in dataset.__getitems__(order.tolist()))
    process = create_process(**config["diffusion"])
    errors = HeldOutErrors(process, x, y, study.per_timestep)
    return errors(model.to(device), range(1000)).cpu().numpy()


def sample_and_score(study: Study, checkpoints: list[Path], name: str, seed: int) -> dict[str, float]:
    """Sample from a variant without guidance, and return the scores of the samples."""
    prefix = f"{study.setting}-{name}-{seed}"
    sampling = dict(num_fid_samples=study.samples, num_sampling_steps=study.sampling_steps, per_proc_batch_size=500)
    output = dict(ckpt=checkpoints, cfg_scale=1, global_seed=seed, sample_dir=study.folder / "samples", name=prefix)
    vae = NETWORKS / "vae" if study.setting == "latents" else None
    run("sample_ddp.py", *flags(**output, **sampling, vae=vae, compile=study.compile))
    folder = study.folder / "samples" / prefix
    if name == "remix-4-20" and seed == 0:
        (study.out / "figures").mkdir(exist_ok=True)
        shutil.copyfile(folder / "grid.png", study.out / "figures" / f"samples-{study.setting}.png")
    # A copy of the cache with the references' features, because the samples' features must not stay there.
    shutil.copytree(study.work / "cache", folder / "cache")
    results = {}
    for kind, images, network in study.scorings(name):
        output = flags(weights=network, json=folder / "scores.json", also="kid", batch_size=200, cache=folder / "cache")
        run("evaluator.py", images, folder / "samples.npz", *output)
        scores = json.loads((folder / "scores.json").read_text())
        # The study states the spread over its seeds instead.
        scores = {key: value for key, value in scores.items() if not key.endswith(" std")}
        results |= {f"{kind}{key.lower().replace(' ', '_')}": value for key, value in scores.items()}
    shutil.rmtree(folder)
    return results


if __name__ == "__main__":
    parser = ArgumentParser(description="Repeat a table of the paper on Fashion-MNIST, from images to FID.")
    parser.add_argument(
        "task",
        choices=[*map(str, TABLES), "figures", "sheets"],
        help="number of the table; figures, to draw them from the results; or sheets, to write the demo's images",
    )
    parser.add_argument("--setting", choices=SETTINGS, default="pixels", help="what the models denoise")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        help="variants to compute (default: those of the table)",
    )
    parser.add_argument("--seeds", type=seed_int, nargs="+", default=[0, 1, 2], metavar="SEED", help="seeds")
    parser.add_argument(
        "--jobs", type=positive_int, default=2, help="models side by side, with one core each; they share a GPU"
    )
    parser.add_argument("--work", default="data/fashion", metavar="FOLDER", help="dataset, runs and samples")
    parser.add_argument("--out", default="studies/results/fashion", metavar="FOLDER", help="results")
    parser.add_argument(
        "--quick", action="store_true", help="few steps and samples, to test that it runs; ignores --out"
    )
    run_script(main, parser)
