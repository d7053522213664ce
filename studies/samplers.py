"""How many steps does a sampler need? The evaluator's FID over the number of steps, on handwritten digits.

    python studies/samplers.py

Samples from the pretrained models of studies/tables.py (which are trained here, where they are not yet) with DDPM, DDIM
and DPM-Solver++ in 5 to 250 steps. The features of the FID are those of the small classifier of studies/digits.py, the
reference is the held-out digits. Writes studies/samplers.csv (a row for every sampler, number of steps and seed) and
studies/figures/samplers.png. What is finished is not done again.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from tables import prepare, quiet, run, spread, train
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp": "DPM-Solver++ (2M)"}
STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 250)


def main(args: argparse.Namespace):
    work, out = Path(args.work), Path(args.out)
    (work / "samplers").mkdir(parents=True, exist_ok=True)
    with quiet(work / "data.log"):
        prepare(work)
    cells = [(sampler, steps, seed) for seed in range(args.seeds) for sampler in SAMPLERS for steps in args.steps]
    rows = []
    for sampler, steps, seed in tqdm(cells, unit="run", smoothing=0):
        with quiet(work / f"samplers-{seed}.log"):
            rows.append(
                {"sampler": sampler, "steps": steps, "seed": seed, "fid": fid(args, work, sampler, steps, seed)}
            )
    (out / "figures").mkdir(parents=True, exist_ok=True)
    with open(out / "samplers.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    draw(rows, args, out / "figures" / "samplers.png")
    print("| steps | " + " | ".join(SAMPLERS.values()) + " |\n|" + " --- |" * (1 + len(SAMPLERS)))
    for steps in args.steps:
        print(f"| {steps} | " + " | ".join(spread(values_of(rows, sampler, steps), 2) for sampler in SAMPLERS) + " |")


def fid(args: argparse.Namespace, work: Path, sampler: str, steps: int, seed: int) -> float:
    """The FID of one seed's model and samples: trained, sampled and scored, unless that is done."""
    name = f"{sampler}-{steps}-{seed}"
    scores = work / "samplers" / f"{name}.json"
    if not scores.exists():
        (checkpoint,), _ = train(args, work, "pretrained", seed)
        samples = work / "samples" / f"samplers-{name}"
        how = ["--num-fid-samples", args.samples, "--sampler", sampler, "--num-sampling-steps", steps, "--cfg-scale", 1]
        how += [
            "--global-seed",
            seed,
            "--per-proc-batch-size",
            500,
            "--sample-dir",
            work / "samples",
            "--name",
            samples.name,
        ]
        run("sample_ddp.py", "--ckpt", checkpoint, *how)
        how = ["--weights", work / "digits" / "classifier.pt2", "--batch-size", 500, "--json", scores]
        run("evaluator.py", work / "digits" / "heldout.npz", samples / "samples.npz", *how)
        shutil.rmtree(samples)
    return json.loads(scores.read_text())["FID"]


def values_of(rows: list[dict], sampler: str, steps: int) -> list[float]:
    return [row["fid"] for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]


def draw(rows: list[dict], args: argparse.Namespace, path: Path):
    """Mean FID over the seeds against the number of steps, with a standard deviation to either side."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for sampler, label in SAMPLERS.items():
        values = np.array([values_of(rows, sampler, steps) for steps in args.steps])
        mean, std = values.mean(1), values.std(1, ddof=1) if args.seeds > 1 else np.zeros(len(values))
        (line,) = axes.plot(args.steps, mean, marker="o", markersize=4, label=label)
        axes.fill_between(args.steps, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="FID, features of the digits' classifier")
    axes.set_xticks(args.steps, [str(steps) for steps in args.steps])
    axes.set_yticks([20, 30, 40, 60, 80], ["20", "30", "40", "60", "80"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="models, each with samples of its own")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of steps")
    parser.add_argument("--pretrain", type=int, default=16000, help="steps of training")
    parser.add_argument("--samples", type=int, default=5000, help="samples for the evaluator's FID")
    parser.add_argument("--work", default="outputs/studies", help="where runs, samples and scores are kept")
    parser.add_argument("--out", default="studies", help="where samplers.csv and figures/ go")
    parser.add_argument("--quick", action="store_true", help="far less of everything, to see that it runs")
    args = parser.parse_args()
    args.finetune = 0  # what tables.train asks for, and this study has none of
    if args.quick:
        args.seeds, args.steps, args.pretrain, args.samples = 2, (5, 10), 60, 100
        args.work, args.out = f"{args.work}-quick", f"{args.work}-quick"
    main(args)
