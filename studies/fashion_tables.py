"""Repeat tables 1 and 2 of the paper on Fashion-MNIST, from images to FID.

Table 3 compares low-rank bases, table 4 other numbers of fine-tuning steps and other widths of the model, table 5 ideas
that go past the paper, on validation images, and table 6 the best of them, on test images.

    python studies/fashion_tables.py 1 --setting pixels --seeds 0 1 2 3 4
    python studies/fashion_tables.py 2 --setting pixels --seeds 0 1 2
    python studies/fashion_tables.py 3 --setting pixels --seeds 0 1 2
    python studies/fashion_tables.py 4 --setting pixels --seeds 0 1 2
    python studies/fashion_tables.py 5 --setting pixels --seeds 0 1 2
    python studies/fashion_tables.py 6 --setting pixels --seeds 0 1 2 3 4

Pretrains a tiny DiT for each seed, fine-tunes every variant of the table from it on the same number of images, and
measures each variant's errors and the scores of its samples. Every part is a run of the project's scripts with ordinary
flags. The settings are pixels (16x16 pixels, DiT-T/4) and latents (32x32 pixels encoded by studies/vae.py as 4x8x8,
DiT-T/2).

Results are added to --out as soon as they exist, and what exists there is not computed again; an interrupted run
continues. --out holds for each setting <setting>.csv (one row per variant and seed) and, below folders, the pretrained
models' EMA weights, the errors of every timestep, and pictures of samples; and README.md, whose tables are made from
these files.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import runs
import torch
from fashion_page import (
    MAIN,
    OTHER_STEPS,
    OTHER_WIDTHS,
    SCORES,
    SETTINGS,
    STEPS,
    TABLES,
    append_row,
    baseline,
    errors_path,
    read_results,
    write_page,
)
from runs import ROOT, heldout_errors, output_to
from tqdm import tqdm

from features.dataset import FeatureDataset
from models import DiT, DiT_models
from remix import RemixDiT_models, build_remix
from runtime.command_line import ArgumentParser, flags, positive_int, run_script, seed_int
from runtime.errors import UserError
from runtime.files import atomic_write
from training.batches import default_experts_per_batch
from training.dry_run import mixing_flops, training_flops

BATCH = 128
EMA_DECAY = 0.999


def remix(k: int, n: int, **values) -> dict:
    """Return the training flags of a Remix-DiT with k bases and n experts, by default with the published prior."""
    return dict(n_basis=k, n_experts=n, prior_bonus=3) | values


def power_boundaries(n_experts: int, power: float) -> list[int]:
    """Return the N + 1 boundaries 1000 (i / N)^power, rounded. With powers above 1, intervals grow with the noise."""
    return [round(1000 * (i / n_experts) ** power) for i in range(n_experts + 1)]


# A loss weight: Min-SNR, but at least 0.2.
WEIGHTED = dict(min_snr=5, min_weight=0.2)
# The training flags of each variant; and "length", the number of fine-tuning steps relative to the others', and
# "width". 128 images cannot be divided among 20 experts: that variant has more steps of 120.
VARIANTS = {
    "pretrained": {},
    "continued": {},
    "independent-8": {},
    "remix-4-8": remix(4, 8),
    "remix-4-20": remix(4, 20),
    "remix-4-8-equal-flops": remix(4, 8),
    "remix-4-20-equal-flops": remix(4, 20),
    **{f"experts-per-batch-{e}": remix(4, 20, experts_per_batch=e) for e in (1, 4, 8)},
    "experts-per-batch-20": remix(4, 20, experts_per_batch=20, global_batch_size=120),
    "one-hot": remix(4, 20, mixer="one-hot"),
    "raw": remix(4, 20, mixer="raw"),
    "local": remix(4, 20, mixer_scope="local"),
    "modulation-too": remix(4, 20, mix_modulation=True),
    **{f"remix-{k}-{n}": remix(k, n) for k, n in ((2, 20), (8, 20), (4, 100))},
    "no-prior": remix(4, 20, prior_bonus=0, prior_strength=0),
    "bonus-0": remix(4, 20, prior_bonus=0),
    "bonus-8": remix(4, 20, prior_bonus=8),
    "strength-0": remix(4, 20, prior_strength=0),
    "strength-1e-2": remix(4, 20, prior_strength=1e-2),
    "coefficients-to-1e-5": remix(4, 20, coeff_lr_end=1e-5),
    "recipe-paper": dict(n_basis=4, n_experts=20, recipe="paper"),
    **{f"rank-{r}": remix(4, 20, rank=r) for r in (4, 8, 16)},
    "rank-16-frozen": remix(4, 20, rank=16, freeze=True),
    # Ideas that go past the paper.
    **{f"bonus-{bonus}": remix(4, 20, prior_bonus=bonus) for bonus in (5, 12)},
    "bonus-8-coefficients-1e-3": remix(4, 20, prior_bonus=8, coeff_lr=1e-3),
    "bonus-8-local": remix(4, 20, prior_bonus=8, mixer_scope="local"),
    "bonus-8-8-20": remix(8, 20, prior_bonus=8),
    "continued-min-snr-5": dict(min_snr=5),
    **{f"bonus-8-min-snr-{gamma}": remix(4, 20, prior_bonus=8, min_snr=gamma) for gamma in (5, 50)},
    "continued-weighted": WEIGHTED,
    "independent-8-weighted": WEIGHTED,
    "remix-4-20-weighted": remix(4, 20, **WEIGHTED),
    "bonus-8-weighted": remix(4, 20, prior_bonus=8, **WEIGHTED),
    "strength-1e-1": remix(4, 20, prior_strength=1e-1),
    # The lengths of the intervals of the least and of the most noise are 11 and 74 timesteps, or 136 and 34.
    "bonus-8-fine-at-low-noise": remix(4, 20, prior_bonus=8, boundaries=power_boundaries(20, 1.5)),
    # A plain DiT with the same training timesteps, in groups of one interval: with one basis, all experts are the same.
    "continued-fine-at-low-noise": remix(1, 20, boundaries=power_boundaries(20, 1.5)),
    "independent-8-fine-at-low-noise": dict(boundaries=power_boundaries(8, 1.5)),
    "bonus-8-fine-at-high-noise": remix(4, 20, prior_bonus=8, boundaries=power_boundaries(20, 1 / 1.5)),
    **{f"continued-steps-{steps}": dict(length=steps / STEPS) for steps in OTHER_STEPS},
    **{f"remix-4-20-steps-{steps}": remix(4, 20, length=steps / STEPS) for steps in OTHER_STEPS},
    **{f"pretrained-width-{width}": dict(width=width) for width in OTHER_WIDTHS},
    **{f"continued-width-{width}": dict(width=width) for width in OTHER_WIDTHS},
    **{f"independent-8-width-{width}": dict(width=width) for width in OTHER_WIDTHS},
    **{f"remix-4-20-width-{width}": remix(4, 20, width=width) for width in OTHER_WIDTHS},
    **{f"bonus-8-width-{width}": remix(4, 20, prior_bonus=8, width=width) for width in OTHER_WIDTHS},
}
# The sizes of the scripts have one tiny model, of width 48. The scripts run in this process and find these too.
for width, patch in itertools.product(OTHER_WIDTHS, (2, 4)):
    name = f"DiT-T{width}/{patch}"
    DiT_models[name] = partial(DiT, patch_size=patch, depth=3, hidden_size=width, num_heads=3)
    RemixDiT_models[f"Remix{name}"] = partial(build_remix, name)
# Scoring takes about as long as this number of training steps.
SCORING = 3000
# Variants whose samples of the first seed are shown.
SHOWN = ("pretrained", "continued", "remix-4-20")


@dataclass(frozen=True)
class Study:
    """The models and files of one setting.

    Attributes:
        setting: key of SETTINGS.
        work: folder of the dataset and its features.
        runs: folder of the runs, samples and logs.
        out: folder of the results.
        pretraining: steps of pretraining.
        finetuning: steps of fine-tuning.
        samples: samples for FID.
        sampling_steps: DDPM steps.
        per_timestep: images for the error of each timestep.
        vae: steps of training the VAE.
        compile: run the models through torch.compile.
        command: command line, recorded with the results.
    """

    setting: str
    work: Path
    runs: Path
    out: Path
    pretraining: int
    finetuning: int
    samples: int
    sampling_steps: int
    per_timestep: int
    vae: int
    compile: bool
    command: str

    @property
    def side(self) -> int:
        return SETTINGS[self.setting][0]

    @property
    def table(self) -> Path:
        return self.out / f"{self.setting}.csv"

    def features(self, split: str) -> Path:
        # Beside the runs, because --quick has a VAE of its own.
        return self.runs.parent / "features" / f"{self.setting}-{split}"

    def weights(self, seed: int, width: int | None = None) -> Path:
        """The EMA weights of a pretrained model, of another width if it is given."""
        name = f"{self.setting}-width-{width}-{seed}" if width else f"{self.setting}-{seed}"
        return self.out / "pretrained" / f"{name}.safetensors"


def main(args: argparse.Namespace):
    command = shlex.join(["python", "studies/fashion_tables.py", *sys.argv[1:]])
    work, out = Path(args.work), Path(args.out)
    if args.quick:
        folders = dict(work=work, runs=work / "quick" / "runs", out=work / "quick" / "results")
        steps = dict(pretraining=60, finetuning=30, vae=2, sampling_steps=5)
        study = Study(args.setting, **folders, **steps, samples=50, per_timestep=4, compile=False, command=command)
    else:
        folders = dict(work=work, runs=work / "runs", out=out)
        steps = dict(pretraining=20_000, finetuning=STEPS, vae=6_000, sampling_steps=100)
        study = Study(args.setting, **folders, **steps, samples=10_000, per_timestep=100, compile=True, command=command)
    # First the variants that the others are compared with.
    names = ["continued", "remix-4-20"]
    for part in TABLES[args.table].values():
        names += [name for name in part if name not in names]
    if args.variants:
        if unknown := set(args.variants) - {"pretrained", *names}:
            known = ", ".join(["pretrained", *names])
            raise UserError(f"--variants {' '.join(sorted(unknown))}: the variants of table {args.table} are {known}")
        # The page shows no variant without its baseline, which is trained from a pretrained model of its width.
        baselines = set(map(baseline, args.variants))
        chosen = {*args.variants, *baselines, *(name.replace("continued", "pretrained") for name in baselines)}
        names = [name for name in names if name in chosen]
    with output_to(study.runs / "data.log"):
        prepare(study, args.source)

    done = {(row["variant"], row["seed"]) for row in read_results(study.table)}
    seeds = sorted(set(args.seeds))
    missing = {(name, seed) for seed in seeds for name in ["pretrained", *names]} - done
    print(f"{len(missing)} results are missing in {study.table}")
    # Each run has a process of its own, which loads the code as it is then.
    spawn = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1)
    progress = "{percentage:.0f}% |{bar}| {elapsed}<{remaining}"
    total = sum(cost(study, name) for name, _ in missing)
    with workers, tqdm(total=total, bar_format=progress, smoothing=0) as bar:
        pretrained = ["pretrained", *(name for name in names if name.startswith("pretrained"))]
        first = [name for name in names if name in ("continued", "remix-4-20")]
        for group in (pretrained, first, [name for name in names if name not in pretrained + first]):
            jobs = {
                workers.submit(run_variant, study, name, seed): name
                for name in group
                for seed in seeds
                if (name, seed) in missing
            }
            for job in as_completed(jobs):
                try:
                    job.result()
                except BaseException:
                    workers.shutdown(wait=False, cancel_futures=True)
                    raise
                bar.update(cost(study, jobs[job]))
                write_page(study.out)
    write_page(study.out)


def cost(study: Study, name: str) -> int:
    """Estimate the time to train and score a variant, in training steps."""
    if name.startswith("pretrained"):
        return SCORING + study.pretraining
    return SCORING + round(study.finetuning * VARIANTS[name].get("length", 1))


def prepare(study: Study, source: str | None):
    """Write, encode and split the images, and compute the features of the reference images, unless they exist."""
    work, out = study.work, study.out
    # All sessions score with the classifiers of the first one.
    classifiers = [f"classifier-{side}.pt2" for side, _ in SETTINGS.values()]
    for name in classifiers:
        copy_new(out / name, work / name)
    if not all((work / name).exists() for name in (*classifiers, f"test-{study.side}.npz")):
        runs.run("studies/fashion.py", *flags(out=work, source=source))
    for name in classifiers:
        copy_new(work / name, out / name)

    encoding = dict(vae="none", grayscale=True)
    if study.setting == "latents":
        if not (out / "vae" / "scores.json").exists():
            runs.run("studies/vae.py", *flags(data=work, out=out / "vae", steps=study.vae))
        encoding = dict(vae=out / "vae", store="moments")
    for split in ("train", "validation", "test"):
        if not (study.features(split) / "index.json").exists():
            folders = flags(data_path=work / split, features_path=study.features(split))
            sizes = flags(image_size=study.side, mirror=False, num_workers=0, batch_size=256)
            runs.run("extract_features.py", *folders, *sizes, *flags(**encoding))
    for _, split, network in references(study):
        output = flags(weights=network, save_stats=work / "statistics.npz", **scoring(work))
        runs.run("evaluator.py", work / f"{split}-{study.side}.npz", *output)


def copy_new(source: Path, target: Path):
    """Copy a file, unless it does not exist or the target exists."""
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def references(study: Study, name: str = "pretrained") -> list[tuple[str, str, Path]]:
    """Return how a variant's samples are scored.

    EfficientNet takes a fifth of the time of a variant, so it scores MAIN only, and only if it is installed.

    Returns:
        The beginning of the scores' names in SCORES, the split, and the network.
    """
    classifier = study.out / f"classifier-{study.side}.pt2"
    imagenet = study.work / "efficientnet-lite0.pt2"
    scores = [("", "test", classifier), ("validation_", "validation", classifier)]
    if imagenet.exists() and name in MAIN:
        scores.append(("imagenet_", "test", imagenet))
    return scores


def scoring(work: Path) -> dict:
    """Return flags of evaluator.py."""
    return dict(batch_size=200, cache=work / "cache")


def run_variant(study: Study, name: str, seed: int):
    """Train and score one variant with one seed, and add its row to the results."""
    torch.set_num_threads(1)
    start, commit = time.perf_counter(), current_commit()
    prefix = f"{study.setting}-{name}-{seed}"
    with output_to(study.runs / f"{prefix}.log"):
        checkpoints, steps = train(study, name, seed)
        if not all(path.exists() for path in checkpoints):
            raise RuntimeError(f"the training of {prefix} was stopped by a signal")
        errors = {}
        for split in ("test", "validation"):
            folder = study.features(split)
            errors[split] = heldout_errors(checkpoints, folder, range(1000), study.per_timestep).numpy()
        path = errors_path(study.out, study.setting, name, seed)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **errors)
        row = {"variant": name, "seed": seed, "steps": steps}
        row |= {f"{split}_error": f"{values.mean():.7f}" for split, values in errors.items()}
        row |= {key: f"{value:.6g}" for key, value in sample_and_score(study, checkpoints, name, seed).items()}
    minutes = f"{(time.perf_counter() - start) / 60:.1f}"
    date = time.strftime("%Y-%m-%d")
    row |= dict(minutes=minutes, commit=commit, command=study.command, machine=machine(), date=date)
    append_row(study.table, row)


def train(study: Study, name: str, seed: int) -> tuple[list[Path], int]:
    """Train a variant, unless its checkpoints exist.

    Args:
        study: the study.
        name: key of VARIANTS.
        seed: seed of the pretrained model.

    Returns:
        The checkpoints (one per independent expert, otherwise one) and the total number of steps.
    """
    values = dict(global_batch_size=BATCH) | VARIANTS[name]
    width, length = values.pop("width", None), values.pop("length", 1)
    weights = study.weights(seed, width)
    common = dict(data_path=study.features("train"), compile=study.compile, precision="fp32")
    model = f"DiT-T{width or ''}/{SETTINGS[study.setting][1]}"
    prefix = f"{study.setting}-{name}-{seed}"
    if name.startswith("pretrained"):
        if not weights.exists():
            common |= dict(model=model, lr=2e-3, ema_decay=EMA_DECAY, global_seed=seed)
            (path,) = runs.train(study.runs, prefix, max_steps=study.pretraining, **common, **values)
            runs.run("convert.py", path, weights, *flags(to="safetensors"))
        return [weights], study.pretraining

    values["model"] = f"Remix{model}" if "n_basis" in values else model
    steps = round(study.finetuning * length) * BATCH // values["global_batch_size"]
    if name.endswith("-equal-flops"):
        dataset = FeatureDataset(study.features("train"))
        shape = {key: values[key] for key in ("model", "n_basis", "n_experts", "global_batch_size")}
        steps = round(steps / relative_flops(dataset, **shape))
    common |= dict(lr=1e-3, load_weight=weights, global_seed=1000 + seed)
    independent = 1
    if name.startswith("independent-8"):
        # To compile eight short runs takes longer than it saves.
        independent, common["compile"] = 8, False
    # The average covers the same part of a shorter or longer run. With a decay of 0.999, the average of an independent
    # expert after its 625 steps would have 54 % of the pretrained weights; that of 5,000 steps has 0.7 %.
    common["ema_decay"] = EMA_DECAY ** (independent / length)
    paths = runs.train(study.runs, prefix, independent, max_steps=steps, **common, **values)
    return paths, steps


def relative_flops(dataset: FeatureDataset, model: str, n_basis: int, n_experts: int, global_batch_size: int) -> float:
    """Return the FLOPs of a Remix-DiT's training step, with the mixing, relative to a plain DiT's."""
    channels, side, _ = dataset.shape
    groups = default_experts_per_batch(global_batch_size, n_experts)
    with torch.device("meta"):
        shape = dict(input_size=side, in_channels=channels, num_classes=len(dataset.classes))
        network = RemixDiT_models[model](**shape, n_basis=n_basis, n_experts=n_experts)
    return 1 + mixing_flops(network, groups) / (global_batch_size * training_flops(network.backbone_config))


def sample_and_score(study: Study, checkpoints: list[Path], name: str, seed: int) -> dict[str, float]:
    """Sample from a variant without guidance, and score the samples.

    Returns:
        The scores in SCORES, those with EfficientNet only where `references` names it.
    """
    prefix = f"{study.setting}-{name}-{seed}"
    sampling = dict(num_fid_samples=study.samples, num_sampling_steps=study.sampling_steps, per_proc_batch_size=500)
    output = dict(ckpt=checkpoints, cfg_scale=1, global_seed=seed, sample_dir=study.runs / "samples", name=prefix)
    vae = study.out / "vae" if study.setting == "latents" else None
    runs.run("sample_ddp.py", *flags(**output, **sampling, vae=vae, compile=study.compile))
    folder = study.runs / "samples" / prefix
    if name in SHOWN and seed == 0:
        (study.out / "samples").mkdir(exist_ok=True)
        shutil.copyfile(folder / "grid.png", study.out / "samples" / f"{prefix}.png")

    samples, results = folder / "samples.npz", {}
    for kind, split, network in references(study, name):
        output = flags(weights=network, json=folder / "scores.json", also="kid", **scoring(study.work))
        runs.run("evaluator.py", study.work / f"{split}-{study.side}.npz", samples, *output)
        scores = json.loads((folder / "scores.json").read_text())
        results |= {f"{kind}{key.lower().replace(' ', '_')}": value for key, value in scores.items()}
    # The samples' features are in the cache, where the references' are older. Other processes delete there too.
    for entry in (study.work / "cache").glob("*.npz"):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat().st_mtime > samples.stat().st_mtime:
                entry.unlink()
    shutil.rmtree(folder)
    return {key: results[key] for key in SCORES if key in results}


def current_commit() -> str:
    """Return the variable COMMIT, for a copy without .git, or the commit of the code, with "-dirty" if it changed."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!studies/results"]).returncode
    return commit.stdout.strip() + ("-dirty" if changed else "")


def machine() -> str:
    """Return the GPU, if there is one, the CPU, the number of its cores and the version of PyTorch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    cpu = names[0] if names else platform.machine()
    return ", ".join([*gpu, cpu, f"{os.cpu_count()} cores", f"PyTorch {torch.__version__}"])


if __name__ == "__main__":
    parser = ArgumentParser(description="Repeat a table of the paper on Fashion-MNIST, from images to FID.")
    parser.add_argument(
        "table",
        type=int,
        choices=TABLES,
        help="1, 2: those of the paper; 3: low-rank bases; 4: numbers of steps, widths; 5: ideas past the paper; "
        "6: the best of them",
    )
    parser.add_argument("--setting", choices=SETTINGS, default="pixels", help="what the models denoise")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="variants of the table to compute now (default: all)"
    )
    parser.add_argument("--seeds", type=seed_int, nargs="+", default=[0, 1, 2], metavar="SEED", help="seeds")
    parser.add_argument(
        "--jobs", type=positive_int, default=2, help="models side by side, with one core each; they share a GPU"
    )
    parser.add_argument("--source", metavar="FOLDER", help="the dataset's files, see fashion.py")
    parser.add_argument("--work", default="data/fashion", metavar="FOLDER", help="dataset, runs and samples")
    parser.add_argument("--out", default="studies/results/fashion", metavar="FOLDER", help="results")
    parser.add_argument(
        "--quick", action="store_true", help="few steps and samples, to test that it runs; ignores --out"
    )
    run_script(main, parser)
