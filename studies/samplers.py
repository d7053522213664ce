"""Measure the evaluator's FID of DDPM, DDIM and DPM-Solver++ in 5 to 250 steps, on handwritten digits.

    python studies/samplers.py

For each seed, a DiT is trained from scratch. FID uses the features of the small classifier of studies/digits.py, and
the held-out digits as the reference. Finished parts are skipped. Writes samplers.csv (one row per sampler, number of
steps and seed) and samplers.png.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from digit_runs import prepare, sample_and_score, train
from runs import mean_and_std, output_to, write_csv
from tqdm import tqdm

from runtime.command_line import ArgumentParser, positive_int, run_script

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp": "DPM-Solver++ (2M)"}
STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 250)


def main(args: argparse.Namespace):
    if args.quick:
        args.seeds, args.steps, args.pretrain, args.samples = 2, (5, 10), 60, 100
        args.work, args.out = f"{args.work}-quick", f"{args.work}-quick"
    work, out = Path(args.work), Path(args.out)
    (work / "samplers").mkdir(parents=True, exist_ok=True)
    with output_to(work / "data.log"):
        prepare(work)

    combinations = [
        (sampler, steps, seed) for seed in range(args.seeds) for sampler in SAMPLERS for steps in args.steps
    ]
    rows = []
    for sampler, steps, seed in tqdm(combinations, unit="run", smoothing=0):
        with output_to(work / f"samplers-{seed}.log"):
            fid = measure_fid(work, sampler, steps, seed, args.pretrain, args.samples)
        rows.append({"sampler": sampler, "steps": steps, "seed": seed, "fid": fid})

    write_csv(out / "samplers.csv", rows)
    draw(out / "samplers.png", rows, args.steps)
    print(table(rows, args.steps))


def measure_fid(work: Path, sampler: str, steps: int, seed: int, pretraining: int, n_samples: int) -> float:
    """Return the FID of one seed's model with one sampler; train, sample and score unless the FID is saved."""
    name = f"{sampler}-{steps}-{seed}"
    scores = work / "samplers" / f"{name}.json"
    if not scores.exists():
        checkpoint = train(work, f"pretrained-{seed}", max_steps=pretraining, global_seed=seed)
        sample_and_score(work, checkpoint, f"samplers-{name}", scores, sampler, steps, seed, n_samples)
    return json.loads(scores.read_text())["FID"]


def fids_of(rows: list[dict], sampler: str, steps: int) -> list[float]:
    return [row["fid"] for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]


def table(rows: list[dict], numbers_of_steps: list[int]) -> str:
    """Return the mean and standard deviation of FID over the seeds as a Markdown table."""
    lines = ["| steps | " + " | ".join(SAMPLERS.values()) + " |", "|" + " --- |" * (1 + len(SAMPLERS))]
    for steps in numbers_of_steps:
        cells = [mean_and_std(fids_of(rows, sampler, steps), 2) for sampler in SAMPLERS]
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict], numbers_of_steps: list[int]):
    """Draw the mean FID over the seeds, plus and minus one standard deviation, against the number of steps."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for sampler, label in SAMPLERS.items():
        values = np.array([fids_of(rows, sampler, steps) for steps in numbers_of_steps])  # [steps, seeds]
        mean = values.mean(1)
        std = values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
        (line,) = axes.plot(numbers_of_steps, mean, marker="o", markersize=4, label=label)
        axes.fill_between(numbers_of_steps, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="FID, features of the digits' classifier")
    axes.set_xticks(numbers_of_steps, [str(steps) for steps in numbers_of_steps])
    axes.set_yticks([20, 30, 40, 60, 80], ["20", "30", "40", "60", "80"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive_int, default=3, help="number of models, each with its own samples")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=STEPS, help="numbers of sampling steps")
    parser.add_argument("--pretrain", type=positive_int, default=16000, help="steps of training")
    parser.add_argument("--samples", type=positive_int, default=5000, help="samples for FID")
    parser.add_argument("--work", default="outputs/studies", help="folder of the runs, samples and scores")
    parser.add_argument("--out", default="studies/results/samplers", help="folder of samplers.csv and samplers.png")
    parser.add_argument("--quick", action="store_true", help="few models, steps and samples, to test that it runs")
    run_script(main, parser)
