"""Estimate the training speed on eight H100 GPUs from FLOPs and bytes, without a GPU.

    python benchmarks/estimate.py

The table has one row for each size and way of training: a DiT, a RemixDiT whose gradients all GPUs exchange (DDP), and
a RemixDiT whose bases are sharded. The counts and the assumed rates are those of training/dry_run.py, as of
train_fast.py. No time was measured.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffusion import create_diffusion
from models import DiT_models
from remix import RemixDiT
from runtime.command_line import ArgumentParser, positive_int, run_script
from training.batches import count_groups
from training.dry_run import CUDA_CONTEXT, Parallelism, memory_bytes, step_costs

SIZES = ("S/2", "B/2", "L/2", "XL/2")
COLUMNS = ["model", "bases", "TFLOP", "GB: activations", "mixing", "optimizer and EMA", "other", "GB sent"]
COLUMNS += ["ms: compute", "memory traffic", "network", "step", "bound by", "speed / DiT", "memory, GiB"]
N_EXPERTS = 20


def main(args: argparse.Namespace):
    rows = [row for size in args.size for row in estimate(size, args.n_basis, args.images, args.gpus, args.experts)]
    print("\n".join(f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]))


def estimate(size: str, n_basis: list[int], n_images: int, n_gpus: int, experts_per_batch: int) -> list[list[str]]:
    """Return the rows of one size, in bf16.

    Args:
        size: "S/2", ...
        n_basis: numbers of bases of the RemixDiT.
        n_images: images per GPU.
        n_gpus: number of GPUs.
        experts_per_batch: experts per global batch.
    """
    groups = count_groups(n_images, n_images * n_gpus // experts_per_batch)
    cases = [(None, False), *((k, sharded) for k in n_basis for sharded in (False, True))]
    rows, dit_seconds = [], None
    for k, sharded in cases:
        with torch.device("meta"):
            model = DiT_models[f"DiT-{size}"](input_size=32)
            model = RemixDiT(model, k, N_EXPERTS) if k else model
        parallelism = Parallelism(n_gpus, sharded=sharded)
        costs = step_costs(model, n_images, groups if k else None, "bf16", parallelism)
        memory = memory_bytes(model, create_diffusion(), n_images, groups if k else None, "bf16", parallelism)
        seconds, step = costs.seconds("bf16", n_gpus), costs.step_seconds("bf16", n_gpus)
        dit_seconds = dit_seconds or step
        gb = {part: size / 1e9 for part, size in costs.traffic.items()}
        shown = gb["activations"], gb.get("mixing", 0), gb["optimizer"] + gb["EMA"]
        name = f"RemixDiT-{size}, K = {k}" if k else f"DiT-{size}"
        row = [name, ("sharded" if sharded else "DDP") if k else "", f"{costs.flops / 1e12:.2f}"]
        row += [f"{value:.1f}" for value in (*shown, sum(gb.values()) - sum(shown), costs.sent / 1e9)]
        row += [f"{1e3 * value:.1f}" for value in (*seconds.values(), step)]
        row += [costs.bound("bf16", n_gpus), f"{dit_seconds / step:.2f}"]
        row += [f"{(sum(memory.values()) + CUDA_CONTEXT) / 2**30:.0f}"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, nargs="+", default=SIZES, help="sizes")
    parser.add_argument("--n-basis", type=positive_int, nargs="+", default=[4, 8], metavar="K", help="numbers of bases")
    parser.add_argument("--images", type=positive_int, default=32, help="images per GPU")
    parser.add_argument("--gpus", type=positive_int, default=8, help="number of GPUs")
    parser.add_argument("--experts", type=positive_int, default=16, metavar="E", help="experts per global batch")
    run_script(main, parser)
