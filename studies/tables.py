"""The paper's tables 1 and 2 in miniature, on handwritten digits.

    python studies/tables.py

Pretrains a tiny DiT for each seed, fine-tunes every variant from it for the same number of images, and measures each on
held-out digits. Every part is a run of the project's own scripts with ordinary flags; what is finished is not done again.
Writes studies/results.csv (a row for every variant and seed) and studies/README.md (tables with mean and spread).
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import platform
import runpy
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one process a core
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import load_denoiser  # noqa: E402
from diffusion import create_diffusion  # noqa: E402
from features import FeatureDataset  # noqa: E402
from training.statistics import noise_errors  # noqa: E402

TOKENS = 4  # an image of 8x8 in patches of 4
BATCH = 80  # divisible by every number of experts a batch that is tried
PRETRAIN = ["--model", "DiT-T/4", "--lr", "2e-3"]
FINETUNE = ["--lr", "1e-3"]
REMIX = ["--model", "RemixDiT-T/4"]


def remix(k: int, n: int, *flags) -> list[str]:
    return [*REMIX, "--n-basis", str(k), "--n-experts", str(n), *flags]


MAIN = remix(4, 20)
VARIANTS = {  # name: (flags, how many seeds of those asked for: all of them, or three)
    "continued": (["--model", "DiT-T/4"], "all"),
    "independent-8": (["--model", "DiT-T/4"], "all"),
    "remix-4-8": (remix(4, 8), "all"),
    "remix-4-20": (MAIN, "all"),
    "remix-4-8-equal-flops": (remix(4, 8), "all"),
    "remix-4-20-equal-flops": (MAIN, "all"),
    **{f"experts-per-batch-{e}": ([*MAIN, "--experts-per-batch", str(e)], "all") for e in (1, 2, 4, 8, 20)},
    "one-hot": ([*MAIN, "--mixer", "one-hot"], "three"),
    "raw": ([*MAIN, "--mixer", "raw"], "three"),
    "local": ([*MAIN, "--mixer-scope", "local"], "three"),
    "modulation-too": ([*MAIN, "--mix-modulation"], "three"),
    **{f"remix-{k}-{n}": (remix(k, n), "three") for k, n in ((4, 4), (4, 100), (2, 20), (8, 20))},
}
COLUMNS = [
    "variant",
    "seed",
    "steps",
    "heldout_error",
    "choice_error",
    "fid",
    "sfid",
    "inception_score",
    "precision",
    "recall",
]


def main(args: argparse.Namespace):
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    with quiet(work / "data.log"):
        prepare(work)
    pretrained = [("pretrained", seed) for seed in range(args.seeds)]
    finetuned = [
        (name, seed)
        for name, (_, seeds) in VARIANTS.items()
        for seed in range(args.seeds if seeds == "all" else min(3, args.seeds))
    ]
    workers = ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"))
    with workers, tqdm(total=len(pretrained) + len(finetuned), unit="model", smoothing=0) as bar:
        for jobs in (pretrained, finetuned):
            for job in as_completed([workers.submit(do, args, *job) for job in jobs]):
                job.result()
                bar.update()
    rows = [json.loads((work / "scores" / f"{name}-{seed}.json").read_text()) for name, seed in pretrained + finetuned]
    write_results(rows, args)


def prepare(work: Path):
    """The digits' three splits, encoded, and the classifier."""
    if not (work / "digits" / "classifier.pt2").exists():
        run("studies/digits.py", "--out", work / "digits")
    for split in ("train", "choice", "heldout"):
        if not (work / split / "index.json").exists():
            how = ["--vae", "none", "--image-size", 8, "--grayscale", "--no-mirror", "--num-workers", 0]
            run("extract_features.py", "--data-path", work / "digits" / split, "--features-path", work / split, *how)


def do(args: argparse.Namespace, name: str, seed: int):
    """Train, sample and score one variant with one seed, unless that is done."""
    torch.set_num_threads(1)
    work = Path(args.work)
    scores = work / "scores" / f"{name}-{seed}.json"
    if scores.exists():
        return
    with quiet(work / f"{name}-{seed}.log"):
        checkpoints, steps = train(args, work, name, seed)
        samples = work / "samples" / f"{name}-{seed}"
        how = [
            "--num-fid-samples",
            args.samples,
            "--num-sampling-steps",
            args.sampling_steps,
            "--sampler",
            "ddim",
            "--cfg-scale",
            1,
        ]
        how += ["--per-proc-batch-size", 250, "--sample-dir", work / "samples", "--name", samples.name]
        run("sample_ddp.py", "--ckpt", *checkpoints, *how)
        evaluated = work / "evaluated" / scores.name
        how = ["--weights", work / "digits" / "classifier.pt2", "--batch-size", 500, "--json", evaluated]
        run("evaluator.py", work / "digits" / "heldout.npz", samples / "samples.npz", *how)
        found = {key.lower().replace(" ", "_"): value for key, value in json.loads(evaluated.read_text()).items()}
        model, config = load_denoiser(checkpoints)
        for split, timesteps in (("heldout", range(1000)), ("choice", range(0, 1000, 4))):
            dataset = FeatureDataset(work / split)
            x, y = dataset.__getitems__(list(range(len(dataset))))
            errors = noise_errors(model, create_diffusion(**config["diffusion"]), x, y, timesteps, per_timestep=60)
            found[f"{split}_error"] = errors.mean().item()
        row = {"variant": name, "seed": seed, "steps": steps, **found}
        scores.parent.mkdir(exist_ok=True)
        scores.with_suffix(".tmp").write_text(json.dumps({column: row[column] for column in COLUMNS}))
        scores.with_suffix(".tmp").rename(scores)


def train(args: argparse.Namespace, work: Path, name: str, seed: int) -> tuple[list[Path], int]:
    """Run train_fast.py as the variant asks; return its checkpoints and its steps in all."""
    steps = args.pretrain if name == "pretrained" else args.finetune
    pretrained = work / "runs" / f"pretrained-{seed}" / "checkpoints" / f"{args.pretrain:07d}.pt"
    common = [
        "--data-path",
        work / "train",
        "--results-dir",
        work / "runs",
        "--global-batch-size",
        BATCH,
        "--ema-decay",
        0.999,
    ]
    common += ["--num-workers", 0, "--log-every", 500, "--ckpt-every", 10**9, "--resume", "auto"]
    common += ["--global-seed", seed if name == "pretrained" else 1000 + seed]
    flags = PRETRAIN if name == "pretrained" else [*FINETUNE, *VARIANTS[name][0], "--load-weight", pretrained]
    if name.endswith("-equal-flops"):
        steps = round(steps / mixing_cost(flags))
    parts = {f"{name}-{seed}": ([], steps)}
    if name == "independent-8":
        parts = {f"{name}-{seed}-{i}": (["--timesteps", 125 * i, 125 * (i + 1)], steps // 8) for i in range(8)}
    checkpoints = []
    for prefix, (more, part) in parts.items():
        checkpoints.append(work / "runs" / prefix / "checkpoints" / f"{part:07d}.pt")
        if not checkpoints[-1].exists():
            run("train_fast.py", *common, *flags, *more, "--prefix", prefix, "--max-steps", part)
    return checkpoints, steps


def mixing_cost(flags: list[str]) -> float:
    """The FLOPs of a Remix training step over a plain DiT's, in the mixed layers: alpha beta, and its two gradients.

    A plain step does 6 FLOPs a weight and token; mixing G groups out of K bases does 6 G K a weight.
    """
    k, n = (int(flags[flags.index(flag) + 1]) for flag in ("--n-basis", "--n-experts"))
    groups = max(e for e in range(1, min(16, n) + 1) if BATCH % e == 0)
    return 1 + groups * k / (BATCH * TOKENS)


def run(script: str, *flags):
    """Run one of the project's scripts in this process, as `python script flags` would."""
    arguments = [str(ROOT / script), *map(str, flags)]
    print(f"$ python {shlex.join([script, *arguments[1:]])}", flush=True)
    before = sys.argv
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.argv = before


@contextlib.contextmanager
def quiet(log: Path):
    """Send what the scripts print to a file."""
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


TABLES = {
    "Table 1: for the same images and, where it says so, for the same FLOPs": (
        [
            "pretrained",
            "continued",
            "independent-8",
            "remix-4-8",
            "remix-4-20",
            "remix-4-8-equal-flops",
            "remix-4-20-equal-flops",
        ]
    ),
    "Table 2: mixers": ["remix-4-20", "raw", "one-hot"],
    "Table 2: scopes": ["remix-4-20", "local"],
    "Table 2: what is mixed": ["remix-4-20", "modulation-too"],
    "Table 2: K and N": ["remix-4-4", "remix-4-8", "remix-4-20", "remix-4-100", "remix-2-20", "remix-8-20"],
    "Beyond the paper: experts in a batch of 80 (remix-4-20 has 16)": (
        [*(f"experts-per-batch-{e}" for e in (1, 2, 4, 8)), "remix-4-20", "experts-per-batch-20"]
    ),
}


def write_results(rows: list[dict], args: argparse.Namespace):
    """results.csv, a row for every variant and seed, and README.md's tables of mean and spread."""
    out = Path(args.out)
    with open(out / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    pages = [table_of(title, names, rows) for title, names in TABLES.items()]
    machine = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()}), PyTorch {torch.__version__}"
    made = f"Made by `{shlex.join(['python', 'studies/tables.py', *sys.argv[1:]])}` on {machine}, {time.strftime('%Y-%m-%d')}."
    head, _, _ = (out / "README.md").read_text().partition(MARK)
    (out / "README.md").write_text(f"{head}{MARK}\n\n{made}\n\n" + "\n\n".join(pages) + "\n")


MARK = "<!-- below: written by tables.py -->"


def table_of(title: str, names: list[str], rows: list[dict]) -> str:
    """A table in Markdown; a difference is paired with the continued training of the same seed."""
    continued = {row["seed"]: row["heldout_error"] for row in rows if row["variant"] == "continued"}
    lines = [
        f"## {title}",
        "",
        "| variant | seeds | held-out error | less than continued, % | in seeds | FID |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        mine = [row for row in rows if row["variant"] == name]
        gains = [100 * (1 - row["heldout_error"] / continued[row["seed"]]) for row in mine]
        better = "-" if name == "continued" else f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        error, fid = spread([row["heldout_error"] for row in mine], 5), spread([row["fid"] for row in mine], 2)
        lines.append(f"| {name} | {len(mine)} | {error} | {spread(gains, 2)} | {better} | {fid} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds for table 1 and for experts a batch; three at most for table 2"
    )
    parser.add_argument("--pretrain", type=int, default=16000, help="steps of pretraining")
    parser.add_argument("--finetune", type=int, default=2000, help="steps of fine-tuning")
    parser.add_argument("--samples", type=int, default=5000, help="samples for the evaluator's FID")
    parser.add_argument("--sampling-steps", default="20", help="DDIM steps")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at a time, one core each")
    parser.add_argument("--work", default="outputs/studies", help="where runs, samples and scores are kept")
    parser.add_argument("--out", default="studies", help="where results.csv and README.md go")
    main(parser.parse_args())
