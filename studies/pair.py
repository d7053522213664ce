"""Compare low-rank bases that two stages share with LoRAs of their own, on Fashion-MNIST.

    python studies/pair.py --seeds 0 1 2

The pair of a seed is the pretrained DiT-T/4 of the study in pixels, fine-tuned once for t < 500 and once for t >= 500.
Both are frozen then. Every variant adapts the pair to images that are turned upside down, with the same images, noise,
timesteps and number of trained parameters of the pairs. Results are added to --out as soon as they exist, and what
exists there is not computed again. The pairs are kept in --work.
"""

import csv
import math
import os
import sys
import time
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import read_sheets
from measurements import append_row, code_version
from tables import markdown, mean_and_std, with_star

from diffusion import create_process
from models import DIT, DiT_models
from remix import Remix
from runtime.command_line import ArgumentParser, number, positive_int, run_script, seed_int
from runtime.files import atomic_write, lock_folder
from training.statistics import HeldOutErrors

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = ROOT / "studies" / "results" / "fashion" / "pretrained"
STAGES = [0, 500, 1000]
# A total rank of 16: one LoRA of rank 8 for each stage, one of rank 16 for both, and four bases of rank 4 with
# learned mixing for eight experts, four of each stage.
VARIANTS = {
    "two-loras": dict(n_basis=2, n_experts=2, rank=8, mixer="one-hot"),
    "one-lora": dict(n_basis=1, n_experts=2, rank=16, mixer="one-hot"),
    "shared": dict(n_basis=4, n_experts=8, rank=4),
    "shared-bonus-0": dict(n_basis=4, n_experts=8, rank=4, prior_bonus=0),
}
REFERENCE = "two-loras"
RATES = [1e-2, 3e-3]
PRIOR_STRENGTH = 1e-4
BATCH = 128
COLUMNS = ["variant", "lr", "seed", "steps", "error", "low", "high", "minutes", "commit", "date"]


def main(args):
    torch.set_num_threads(1)
    out, work = Path(args.out), Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    lock_folder(out, "--out")
    train, test = read_sheets("train"), read_sheets("test")
    # Before the runs, in which the code may change.
    code = code_version()
    done = {(row["variant"], float(row["lr"]), int(row["seed"]), int(row["steps"])) for row in read_results(out)}
    for lr in (0.0, *args.rates):
        steps = args.steps if lr else 0
        for seed, variant in product(args.seeds, VARIANTS if lr else ["pair"]):
            if (variant, lr, seed, steps) in done:
                continue
            start = time.perf_counter()
            stages = make_pair(work / f"pair-{seed}-{args.pair_steps}.safetensors", train, seed, args.pair_steps)
            model = adapt(stages, variant, upside_down(train), seed, steps, lr)
            errors = measure(model, upside_down(test), args.per_timestep)  # [250]
            low, high = errors[:125].mean(), errors[125:].mean()
            row = dict(variant=variant, lr=lr, seed=seed, steps=steps)
            row |= {"error": f"{errors.mean():.7f}", "low": f"{low:.7f}", "high": f"{high:.7f}"}
            row |= dict(minutes=f"{(time.perf_counter() - start) / 60:.1f}", commit=code, date=time.strftime("%F"))
            append_row(out / "pair.csv", COLUMNS, row)
            print(*row.values(), flush=True)
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(make_table(read_results(out)))


def upside_down(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Turn images [n, 1, 16, 16] upside down; the labels stay."""
    x, y = images
    return x.flip(2), y


def make_pair(path: Path, images: tuple[Tensor, Tensor], seed: int, steps: int) -> list[nn.Module]:
    """Return the two stages of a seed, that of the least noise first. They are trained unless their file exists."""
    stages = []
    for s, interval in enumerate(pairwise(STAGES)):
        part = path.with_stem(f"{path.stem}-{s}")
        model = DiT_models["DiT-T/4"](input_size=16, in_channels=1, num_classes=10)
        model.load_state_dict(load_file(part if part.exists() else PRETRAINED / f"pixels-{seed}.safetensors"))
        if not part.exists():
            optimize(model, images, [interval], seed, steps, lr=1e-3)
            with atomic_write(part) as temporary:
                save_file(model.state_dict(), temporary)
        stages.append(model)
    return stages


def adapt(
    stages: list[nn.Module], variant: str, images: tuple[Tensor, Tensor], seed: int, steps: int, lr: float
) -> nn.Module:
    """Return a pair with the trained bases of a variant, or for "pair" without."""
    torch.manual_seed(seed)
    options = dict(timestep="t", highest_level=1000, stages=STAGES)
    settings = VARIANTS.get(variant) or dict(n_basis=1, n_experts=2, rank=1, mixer="one-hot")
    remix = Remix(stages, DIT.mixed_layers, **options, **settings)
    if variant != "pair":
        # The same timesteps for all: eight intervals, with as many samples of each.
        optimize(remix, images, [(i * 125, (i + 1) * 125) for i in range(8)], 1000 + seed, steps, lr)
    return remix


def optimize(
    model: nn.Module, images: tuple[Tensor, Tensor], intervals: list[tuple[int, int]], seed: int, steps: int, lr: float
):
    """Train a model, in place. The images, the noise and the timesteps of a step depend on the seed and the step only.

    Args:
        model: the model, or a Remix with a loss of the prior.
        images: images [n, 1, 16, 16] and labels [n].
        intervals: intervals of timesteps, with equally many samples per step.
        seed: seed of the draws.
        steps: number of steps of BATCH images.
        lr: peak learning rate. It falls to 0 by a cosine.
    """
    process, (images, labels) = create_process(), images
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(intervals).repeat_interleave(BATCH // len(intervals), dim=0).T
    model.train()
    # For the labels that are dropped.
    torch.manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        t = low + ((high - low) * torch.rand(BATCH, generator=generator)).long()
        noise = torch.randn(BATCH, *images.shape[1:], generator=generator)
        loss = process.training_losses(model, images[rows], t, dict(y=labels[rows]), noise)["loss"].mean()
        if isinstance(model, Remix):
            loss = loss + PRIOR_STRENGTH * model.prior_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def measure(model: nn.Module, images: tuple[Tensor, Tensor], per_timestep: int) -> np.ndarray:
    """Return the errors of held-out images at every fourth timestep [250]."""
    order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(0))
    errors = HeldOutErrors(create_process(), *(part[order] for part in images), per_time=per_timestep)
    return errors(model.eval(), range(2, 1000, 4)).double().numpy()


def read_results(out: Path) -> list[dict]:
    """Return the rows of the results, with text as values."""
    path = out / "pair.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def make_table(results: list[dict]) -> str:
    """Return the table of the results: mean errors, and their changes relative to two LoRAs of equal rate and steps."""
    values = {}
    for row in results:
        errors = np.array([float(row[key]) for key in ("error", "low", "high")])
        values.setdefault((row["variant"], float(row["lr"]), int(row["steps"])), {})[row["seed"]] = errors
    lines = []
    for (variant, *setting), errors in values.items():
        reference = values.get((REFERENCE, *setting), {})
        changes = [100 * (errors[seed] / reference[seed] - 1) for seed in errors if seed in reference]
        changes = ["-"] * 3 if variant == REFERENCE or not changes else [with_star(x) for x in np.transpose(changes)]
        error = mean_and_std([row[0] for row in errors.values()], 5)
        lines.append([variant, *(f"{x:g}" if x else "-" for x in setting), str(len(errors)), error, *changes])
    return markdown("variant | rate | steps | seeds | error | change, % | t < 500, % | t >= 500, %", lines) + "\n"


if __name__ == "__main__":
    parser = ArgumentParser(description="Compare shared low-rank bases of two stages with LoRAs of their own.")
    parser.add_argument("--seeds", type=seed_int, nargs="+", default=[0, 1, 2], help="seeds of the pretrained models")
    parser.add_argument(
        "--rates", type=number(float, 0, above=True), nargs="+", default=RATES, help="learning rates of each variant"
    )
    parser.add_argument("--steps", type=positive_int, default=300, help="training steps of each variant")
    parser.add_argument("--pair-steps", type=positive_int, default=300, help="training steps of each stage of the pair")
    parser.add_argument("--per-timestep", type=positive_int, default=100, help="images for the error of each timestep")
    parser.add_argument("--out", default=os.path.relpath(ROOT / "studies" / "results" / "pair"), help="results")
    parser.add_argument("--work", default="outputs/pair", help="folder of the trained pairs")
    run_script(main, parser)
