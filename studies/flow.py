"""Compare flow matching with Gaussian diffusion on handwritten digits: held-out error, and FID in 5 to 250 steps.

    python studies/flow.py

For each seed, two DiTs are trained from scratch with the same settings on the same images in the same order: one with
Gaussian diffusion, one with flow matching (linear path, velocity prediction, uniform times). FID uses the features of
the small classifier of studies/digits.py, and the held-out digits as the reference. Finished parts are skipped. Writes
flow.csv (one row per sampler, number of steps and seed), flow_errors.csv (one row per process and seed) and flow.png.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import runs  # Before torch: it sets the number of threads.
import torch
from digit_runs import prepare, sample_and_score, train
from runs import mean_and_std, output_to, write_csv
from tqdm import tqdm

from diffusion import create_diffusion, create_process
from runtime.command_line import ArgumentParser, positive_int, run_script
from sampling.loading import load_denoiser
from training.statistics import noise_errors

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Process and label of each sampler.
SAMPLERS = {
    "ddpm": ("gaussian", "DDPM"),
    "dpmpp": ("gaussian", "DPM-Solver++ (2M)"),
    "euler": ("flow", "flow, Euler"),
    "heun": ("flow", "flow, Heun"),
    "sde": ("flow", "flow, SDE"),
    "dopri5": ("flow", "flow, dopri5"),
}
# Network evaluations per sample. Heun's method takes half as many steps, and dopri5 chooses its steps.
EVALUATIONS = (5, 10, 20, 50, 100, 250)


def main(args: argparse.Namespace):
    if args.quick:
        args.seeds, args.evaluations, args.train, args.samples = 1, (5, 10), 60, 100
        args.work, args.out = f"{args.work}-quick", f"{args.work}-quick"
    work, out = Path(args.work), Path(args.out)
    with output_to(work / "data.log"):
        prepare(work)
    rows, errors = [], []
    combinations = [(name, n) for name in SAMPLERS for n in ([None] if name == "dopri5" else args.evaluations)]
    with tqdm(total=args.seeds * (2 + len(combinations)), unit="part", smoothing=0) as bar:
        for seed in range(args.seeds):
            with output_to(work / f"flow-{seed}.log"):
                models = {}
                for process in ("gaussian", "flow"):
                    values = dict(max_steps=args.train, global_seed=seed, process=process)
                    models[process] = train(work, f"{process}-{seed}", **values)
                    errors.append({"process": process, "seed": seed, "error": heldout_error(models[process], work)})
                    bar.update()
                for name, n in combinations:
                    rows.append(measure_fid(work, models[SAMPLERS[name][0]], name, n, seed, args.samples))
                    bar.update()

    write_csv(out / "flow.csv", rows)
    write_csv(out / "flow_errors.csv", errors)
    draw(out / "flow.png", rows)
    for process in ("gaussian", "flow"):
        values = [row["error"] for row in errors if row["process"] == process]
        print(f"held-out error of the noise, {process}: {mean_and_std(values, 5)}")
    print_table(rows, args.evaluations)


def heldout_error(path: Path, work: Path, per_timestep: int = 300) -> float:
    """Return the mean squared error of the predicted noise on held-out digits, over the noise levels of DDPM.

    A velocity x_1 - eps at x_t = t x_1 + (1 - t) eps predicts eps = x_t - t v, so the error of the noise is t^2 times
    the error of the velocity. The times of the flow are those with the ratio of noise to data of DDPM's timesteps.

    Args:
        path: checkpoint of a DiT.
        work: folder of the study.
        per_timestep: images per timestep.
    """
    model, config = load_denoiser([path])
    x, y = runs.shuffled_images(work / "heldout")
    process, timesteps = create_process(**config["diffusion"]), np.arange(0, 1000, 4)
    if not config["diffusion"]:
        return noise_errors(model, process, x, y, timesteps, per_timestep).mean().item()
    data = create_diffusion().alphas_cumprod[timesteps]
    times = 1 / (1 + np.sqrt((1 - data) / data))
    errors = noise_errors(model, process, x, y, times.tolist(), per_timestep)
    return (errors * torch.from_numpy(times) ** 2).mean().item()


def measure_fid(work: Path, ckpt: Path, sampler: str, evaluations: int | None, seed: int, n_samples: int) -> dict:
    """Return the row of one model and sampler; sample and score unless the FID is saved."""
    steps = evaluations // 2 if sampler == "heun" else evaluations
    name = f"flow-study-{sampler}-{evaluations or 'adaptive'}-{seed}"
    scores = work / "scores" / f"{name}.json"
    if not scores.exists():
        sample_and_score(work, ckpt, name, scores, sampler, steps, seed, n_samples)
    fid = json.loads(scores.read_text())["FID"]
    evaluations = 2 * steps if sampler == "heun" else evaluations or count_evaluations(ckpt)
    return {"sampler": sampler, "steps": steps or "", "evaluations": evaluations, "seed": seed, "fid": fid}


@torch.no_grad()
def count_evaluations(ckpt: Path, batch: int = 500) -> int:
    """Return the network evaluations of dopri5 for one batch of noise."""
    model, config = load_denoiser([ckpt])
    shape = (batch, model.in_channels, model.config["input_size"], model.config["input_size"])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y, count = torch.arange(batch) % model.num_classes, 0

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return model(x, t, y)

    create_process(**config["diffusion"]).ode_sample_loop(denoise, shape, noise=noise, method="dopri5")
    return count


def draw(path: Path, rows: list[dict]):
    """Draw the mean FID over the seeds against the number of network evaluations."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for sampler, (process, label) in SAMPLERS.items():
        mine = [row for row in rows if row["sampler"] == sampler]
        steps = sorted({row["steps"] for row in mine})
        x = [np.mean([row["evaluations"] for row in mine if row["steps"] == step]) for step in steps]
        fids = [np.mean([row["fid"] for row in mine if row["steps"] == step]) for step in steps]
        style = "--" if process == "gaussian" else "-"
        # dopri5 is one point.
        marker = (
            {"marker": "*", "markersize": 11, "zorder": 3} if sampler == "dopri5" else {"marker": "o", "markersize": 4}
        )
        axes.plot(x, fids, style, **marker, label=label)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per sample")
    axes.set_ylabel("FID, features of the digits' classifier")
    axes.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    axes.set_yticks([70, 100, 150, 200, 300], ["70", "100", "150", "200", "300"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def print_table(rows: list[dict], numbers: list[int]):
    """Print the FIDs as a Markdown table."""
    fixed = [name for name in SAMPLERS if name != "dopri5"]
    print("| network evaluations | " + " | ".join(SAMPLERS[name][1] for name in fixed) + " |")
    print("|" + " --- |" * (1 + len(fixed)))
    for n in numbers:
        steps = {name: n // 2 if name == "heun" else n for name in fixed}
        cells = [
            mean_and_std([row["fid"] for row in rows if (row["sampler"], row["steps"]) == (name, steps[name])], 2)
            for name in fixed
        ]
        print(f"| {n} | {' | '.join(cells)} |")
    adaptive = [row for row in rows if row["sampler"] == "dopri5"]
    fid = mean_and_std([row["fid"] for row in adaptive], 2)
    print(f"\ndopri5: {fid} with {', '.join(str(row['evaluations']) for row in adaptive)} evaluations")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=positive_int, default=1, help="number of models per process, each with its own samples"
    )
    parser.add_argument(
        "--evaluations", type=positive_int, nargs="+", default=EVALUATIONS, help="network evaluations per sample"
    )
    parser.add_argument("--train", type=positive_int, default=3000, help="training steps")
    parser.add_argument("--samples", type=positive_int, default=500, help="samples for FID")
    parser.add_argument("--work", default="outputs/studies", help="folder of the runs, samples and scores")
    parser.add_argument("--out", default="studies/results/flow", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="few steps and samples, to test that it runs")
    run_script(main, parser)
