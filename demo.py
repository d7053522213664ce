"""The whole pipeline on real images, on a laptop: handwritten digits in, generated digits, their scores and figures out.

    python demo.py

Runs the project's scripts with ordinary flags and prints each command first: copy them for data of your own. Everything
is written below --out; a step that an earlier run finished is not done again.
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

from common import ArgumentParser, positive_int, run_script

ROOT = Path(__file__).resolve().parent
MODELS = {  # prefix: (what the table calls it, the model)
    "pretrained": ("pretrained DiT", "DiT-T/2"),
    "continued": ("continued training", "DiT-T/2"),
    "remix": ("Remix-DiT 4-20", "RemixDiT-T/2"),
}


def main(args: argparse.Namespace):
    began = time.perf_counter()
    out = Path(args.out or ("demo-quick" if args.quick else "demo"))
    digits, features, outputs, samples = out / "digits", out / "features", out / "outputs", out / "samples"
    pretraining, finetuning, n_samples, steps = (60, 40, 100, 10) if args.quick else (4000, 2000, 1000, 100)

    say("1. Handwritten digits as an image folder, and a small classifier to score with")
    if not (digits / "classifier.pt2").exists():
        run(1, "studies/digits.py", "--out", digits)

    say("2. Encode them: here as pixels, on ImageNet through a VAE")
    if not (features / "index.json").exists():
        how = ["--vae", "none", "--image-size", 8, "--grayscale", "--no-mirror", "--num-workers", 0]
        run(args.processes, "extract_features.py", "--data-path", digits / "train", "--features-path", features, *how)

    say("3. Train a DiT; then, from it and for the same budget, go on with it or remix it")
    pretrained = outputs / "pretrained" / "checkpoints" / f"{pretraining:07d}.pt"
    checkpoints = {}
    for prefix, (_, model) in MODELS.items():
        budget = pretraining if prefix == "pretrained" else finetuning
        checkpoints[prefix] = outputs / prefix / "checkpoints" / f"{budget:07d}.pt"
        if checkpoints[prefix].exists():
            continue
        flags = [
            "--model",
            model,
            "--data-path",
            features,
            "--results-dir",
            outputs,
            "--prefix",
            prefix,
            "--max-steps",
            budget,
        ]
        flags += ["--global-batch-size", 128, "--ema-decay", 0.999, "--log-every", 500, "--num-workers", 0]
        flags += ["--lr", 2e-3] if prefix == "pretrained" else ["--lr", 1e-3, "--load-weight", pretrained]
        flags += ["--n-basis", 4, "--n-experts", 20] if prefix == "remix" else []
        run(args.processes, "train_fast.py", *flags, "--resume", "auto")

    say(f"4. Sample {n_samples:,} digits from each")
    for prefix, ckpt in checkpoints.items():
        flags = ["--num-fid-samples", n_samples, "--num-sampling-steps", steps, "--per-proc-batch-size", 100]
        if not (samples / prefix / "samples.npz").exists():
            run(args.processes, "sample_ddp.py", "--ckpt", ckpt, *flags, "--sample-dir", samples, "--name", prefix)

    say("5. Score them against digits that no model has seen")
    for prefix in MODELS:
        flags = ["--weights", digits / "classifier.pt2", "--json", samples / prefix / "scores.json"]
        run(1, "evaluator.py", digits / "heldout.npz", samples / prefix / "samples.npz", *flags)

    say("6. Draw the mixing coefficients that were learned")
    run(1, "visualize.py", "coefficients", checkpoints["remix"], "--out", out / "coefficients.png")
    shutil.copyfile(samples / "remix" / "grid.png", out / "digits.png")

    table = [f"{'':20} {'IS':>7} {'FID':>7} {'sFID':>7} {'Prec.':>7} {'Recall':>7}"]
    for prefix, (name, _) in MODELS.items():
        scores = json.loads((samples / prefix / "scores.json").read_text())
        table.append(f"{name:20} " + " ".join(f"{value:7.2f}" for value in scores.values()))
    (out / "scores.txt").write_text("\n".join(table) + "\n")
    say(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes")
    print("\n".join(table))
    print(
        f"{n_samples:,} samples of one seed against 300 held-out digits; fine-tuned for {finetuning:,} steps each.\n"
        f"Generated digits       {out / 'digits.png'}\nMixing coefficients    {out / 'coefficients.png'}"
    )


def say(text: str):
    print(f"\n== {text}", flush=True)


def run(processes: int, script: str, *flags):
    """Print a command as one would type it, and run it."""
    line = shlex.join(map(str, (script, *flags)))
    if processes > 1:
        print(f"$ OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node={processes} {line}", flush=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two processes on two cores must not fight
    else:
        print(f"$ python {line}", flush=True)
        command, environment = [sys.executable], os.environ
    done = subprocess.run([*command, ROOT / script, *map(str, flags)], env=environment)
    if done.returncode:
        raise SystemExit(f"demo.py: the command above failed (exit code {done.returncode})")


if __name__ == "__main__":
    parser = ArgumentParser(
        description="Encode, train, sample, score and draw, on handwritten digits, in minutes on a CPU."
    )
    parser.add_argument("--out", help="the folder to write (default: demo, or demo-quick)")
    parser.add_argument("--processes", type=positive_int, default=min(2, os.cpu_count() or 1), help="for torchrun")
    parser.add_argument("--quick", action="store_true", help="far fewer steps and samples, to see that everything runs")
    run_script(main, parser)
