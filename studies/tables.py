"""Repeat tables 1 and 2 of the paper at a small scale, on handwritten digits.

    python studies/tables.py

Pretrains a tiny DiT for each seed, fine-tunes every variant from it on the same number of images, and measures the
error of each variant on held-out digits. Every part is a run of the project's scripts with ordinary flags. Finished
models are skipped. Writes studies/results.csv (one row per variant and seed) and the tables of studies/README.md (mean
and standard deviation over the seeds).
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from digit_runs import BATCH, prepare, pretrain, sample_and_score, train
from runs import heldout_errors, mean_and_std, output_to
from tqdm import tqdm

# Images of 8x8 pixels in patches of 4x4.
TOKENS = 4
FINETUNING = dict(lr=1e-3)


def remix(k: int, n: int, **values) -> dict:
    """Return the training flags of a Remix-DiT with k bases and n experts."""
    return dict(model="RemixDiT-T/4", n_basis=k, n_experts=n, **values)


# The training flags of each variant.
DIT = dict(model="DiT-T/4")
VARIANTS = {
    "continued": DIT,
    "independent-8": DIT,
    "remix-4-8": remix(4, 8),
    "remix-4-20": remix(4, 20),
    "remix-4-8-equal-flops": remix(4, 8),
    "remix-4-20-equal-flops": remix(4, 20),
    **{f"experts-per-batch-{e}": remix(4, 20, experts_per_batch=e) for e in (1, 2, 4, 8, 20)},
    "one-hot": remix(4, 20, mixer="one-hot"),
    "raw": remix(4, 20, mixer="raw"),
    "local": remix(4, 20, mixer_scope="local"),
    "modulation-too": remix(4, 20, mix_modulation=True),
    **{f"remix-{k}-{n}": remix(k, n) for k, n in ((4, 4), (4, 100), (2, 20), (8, 20))},
}
# These variants are trained with at most three seeds.
THREE_SEEDS = {"one-hot", "raw", "local", "modulation-too", "remix-4-4", "remix-4-100", "remix-2-20", "remix-8-20"}
SCORES = ["heldout_error", "validation_error", "fid", "sfid", "inception_score", "precision", "recall"]
COLUMNS = ["variant", "seed", "steps", *SCORES]


@dataclass(frozen=True)
class Budget:
    """Steps of pretraining and fine-tuning, number of samples for FID, and DDIM steps."""

    pretraining: int
    finetuning: int
    samples: int
    sampling: str


def main(args: argparse.Namespace):
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    with output_to(work / "data.log"):
        prepare(work)

    budget = Budget(args.pretrain, args.finetune, args.samples, args.sampling_steps)
    pretrained = [("pretrained", seed) for seed in range(args.seeds)]
    finetuned = [
        (name, seed) for name in VARIANTS for seed in range(min(3, args.seeds) if name in THREE_SEEDS else args.seeds)
    ]
    workers = ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"))
    with workers, tqdm(total=len(pretrained) + len(finetuned), unit="model", smoothing=0) as bar:
        for jobs in (pretrained, finetuned):
            for job in as_completed([workers.submit(run_variant, work, budget, *job) for job in jobs]):
                job.result()
                bar.update()

    rows = [json.loads((work / "scores" / f"{name}-{seed}.json").read_text()) for name, seed in pretrained + finetuned]
    write_results(Path(args.out), rows)


def run_variant(work: Path, budget: Budget, name: str, seed: int):
    """Train, sample and score one variant with one seed, unless its scores exist."""
    torch.set_num_threads(1)
    scores = work / "scores" / f"{name}-{seed}.json"
    if scores.exists():
        return
    with output_to(work / f"{name}-{seed}.log"):
        checkpoints, steps = train_variant(work, name, seed, budget.pretraining, budget.finetuning)
        sampling = dict(num_fid_samples=budget.samples, num_sampling_steps=budget.sampling, sampler="ddim")
        sampling |= dict(per_proc_batch_size=250)
        evaluated = work / "evaluated" / scores.name
        results = sample_and_score(work, checkpoints, f"{name}-{seed}", evaluated, **sampling)
        results = {key.lower().replace(" ", "_"): value for key, value in results.items()}
        for split, timesteps in (("heldout", range(1000)), ("validation", range(0, 1000, 4))):
            errors = heldout_errors(checkpoints, work / split, timesteps, per_timestep=60)
            results[f"{split}_error"] = errors.mean().item()
        row = {"variant": name, "seed": seed, "steps": steps, **results}
        scores.parent.mkdir(exist_ok=True)
        scores.with_suffix(".tmp").write_text(json.dumps({column: row[column] for column in COLUMNS}))
        scores.with_suffix(".tmp").rename(scores)


def train_variant(work: Path, name: str, seed: int, pretraining: int, finetuning: int) -> tuple[list[Path], int]:
    """Train a variant, unless its checkpoints exist.

    Args:
        work: Folder of the study.
        name: "pretrained" or a key of VARIANTS.
        seed: Seed of the pretrained model.
        pretraining: Steps of pretraining.
        finetuning: Steps of fine-tuning.

    Returns:
        The checkpoints (one per independent expert, otherwise one) and the total number of steps.
    """
    pretrained = pretrain(work, seed, pretraining)
    if name == "pretrained":
        return [pretrained], pretraining
    steps = finetuning
    if name.endswith("-equal-flops"):
        steps = round(steps / relative_flops(**VARIANTS[name]))
    independent = 8 if name == "independent-8" else 1
    values = FINETUNING | VARIANTS[name] | dict(load_weight=pretrained, global_seed=1000 + seed)
    return train(work, f"{name}-{seed}", independent, max_steps=steps, **values), steps


def relative_flops(n_basis: int, n_experts: int, **values) -> float:
    """Return the FLOPs of a Remix-DiT's training step relative to a plain DiT's, in the mixed layers.

    A plain step takes 6 FLOPs per weight and token. Mixing K bases for G groups takes 6 G K per weight: the product of
    alpha and beta, and its two gradients.
    """
    groups = max(e for e in range(1, min(16, n_experts) + 1) if BATCH % e == 0)
    return 1 + groups * n_basis / (BATCH * TOKENS)


# The tables of README.md: their titles and variants.
TABLES = {
    "Table 1: the same number of images, and the same FLOPs for `-equal-flops`": [
        "pretrained",
        "continued",
        "independent-8",
        "remix-4-8",
        "remix-4-20",
        "remix-4-8-equal-flops",
        "remix-4-20-equal-flops",
    ],
    "Table 2: mixers": ["remix-4-20", "raw", "one-hot"],
    "Table 2: scopes": ["remix-4-20", "local"],
    "Table 2: mixed layers": ["remix-4-20", "modulation-too"],
    "Table 2: K and N": ["remix-4-4", "remix-4-8", "remix-4-20", "remix-4-100", "remix-2-20", "remix-8-20"],
    "Not in the paper: experts per batch of 80 images (remix-4-20 has 16)": [
        *(f"experts-per-batch-{e}" for e in (1, 2, 4, 8)),
        "remix-4-20",
        "experts-per-batch-20",
    ],
}
MARK = "<!-- tables.py writes everything below this line -->"


def write_results(out: Path, rows: list[dict]):
    """Write results.csv, and replace the tables in README.md."""
    with open(out / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    machine = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()}), PyTorch {torch.__version__}"
    command = shlex.join(["python", "studies/tables.py", *sys.argv[1:]])
    origin = f"Made by `{command}` on {machine}, {time.strftime('%Y-%m-%d')}."
    head, _, _ = (out / "README.md").read_text().partition(MARK)
    parts = [origin, *(markdown_table(title, names, rows) for title, names in TABLES.items())]
    (out / "README.md").write_text(f"{head}{MARK}\n\n" + "\n\n".join(parts) + "\n")


def markdown_table(title: str, names: list[str], rows: list[dict]) -> str:
    """Return a Markdown table of variants, each compared with continued training of the same seed."""
    continued = {row["seed"]: row["heldout_error"] for row in rows if row["variant"] == "continued"}
    lines = [
        f"## {title}",
        "",
        "| variant | seeds | held-out error | reduction relative to continued, % | seeds with a reduction | FID |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        variant = [row for row in rows if row["variant"] == name]
        reductions = [100 * (1 - row["heldout_error"] / continued[row["seed"]]) for row in variant]
        better = f"{sum(reduction > 0 for reduction in reductions)} of {len(reductions)}"
        cells = [
            name,
            str(len(variant)),
            mean_and_std([row["heldout_error"] for row in variant], 5),
            mean_and_std(reductions, 2),
            "-" if name == "continued" else better,
            mean_and_std([row["fid"] for row in variant], 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds of table 1 and of experts per batch; table 2 has at most three"
    )
    parser.add_argument("--pretrain", type=int, default=16000, help="steps of pretraining")
    parser.add_argument("--finetune", type=int, default=2000, help="steps of fine-tuning")
    parser.add_argument("--samples", type=int, default=5000, help="samples for FID")
    parser.add_argument("--sampling-steps", default="20", help="DDIM steps")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models in parallel, with one core each")
    parser.add_argument("--work", default="outputs/studies", help="folder of the runs, samples and scores")
    parser.add_argument("--out", default="studies", help="folder of results.csv and README.md")
    main(parser.parse_args())
