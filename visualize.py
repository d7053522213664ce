"""Draw what a run has learned.

    python visualize.py outputs/RemixDiT-S-4-20-100K/checkpoints/0100000.pt

Writes the heat map of the mixing coefficients (paper, figure 4a-b) as a PNG and the numbers beside it as a CSV.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt
import torch

from checkpoint import load_model
from common import ArgumentParser, UserError, atomic_write, positive_int, run_script
from remix import RemixDiT


def main(args: argparse.Namespace):
    model, config = load_model(args.ckpt, ema=args.ema, **({"num_heads": args.num_heads} if args.num_heads else {}))
    if not isinstance(model, RemixDiT):
        raise UserError(f"{args.ckpt} holds a plain DiT, which has no mixing coefficients")
    out = Path(args.out) if args.out else Path(args.ckpt).with_name(f"{Path(args.ckpt).stem}-coefficients.png")
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the figure is a .png")
    alpha = model.coefficients().detach()
    alpha = alpha.view(-1, model.n_experts, model.n_basis)
    intervals = [
        (i * model.num_timesteps // model.n_experts, (i + 1) * model.num_timesteps // model.n_experts)
        for i in range(model.n_experts)
    ]
    draw_coefficients(out, alpha, intervals, config["model"]["name"])
    write_table(out.with_suffix(".csv"), alpha, intervals)
    print(f"wrote {out} and {out.with_suffix('.csv')}")


def draw_coefficients(path: Path, alpha: torch.Tensor, intervals: list[tuple[int, int]], title: str):
    """Heat map of alpha [blocks or 1, N, K]: experts along x with their timesteps, bases along y, values in the cells."""
    blocks, n_experts, n_basis = alpha.shape
    cell = 0.55 if n_experts <= 40 else 0.12
    figure, axes = plt.subplots(
        blocks,
        1,
        squeeze=False,
        layout="constrained",
        figsize=(max(4, cell * n_experts + 2), max(2, 0.45 * n_basis) * blocks + 1.4),
    )
    for block, axis in enumerate(axes[:, 0]):
        values = alpha[block].T
        image = axis.imshow(values, cmap="viridis", vmin=min(0, values.min()), vmax=max(1, values.max()), aspect="auto")
        axis.set_yticks(range(n_basis), [f"basis {k}" for k in range(n_basis)])
        if n_experts <= 40:
            axis.set_xticks(
                range(n_experts), [f"{i}\n{low}-{high - 1}" for i, (low, high) in enumerate(intervals)], fontsize=6
            )
            for i in range(n_experts):
                for k in range(n_basis):
                    bright = values[k, i] > (image.norm.vmin + image.norm.vmax) / 2
                    axis.text(
                        i,
                        k,
                        f"{values[k, i]:.2f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="black" if bright else "white",
                    )
        if blocks > 1:
            axis.set_title(f"block {block}", fontsize=8)
    axes[-1, 0].set_xlabel("expert and its timesteps (0 is the least noise)")
    figure.suptitle(f"{title}: mixing coefficients", fontsize=10)
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="coefficient")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def write_table(path: Path, alpha: torch.Tensor, intervals: list[tuple[int, int]]):
    """The coefficients as CSV: one row an expert (and block)."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["block", "expert", "first_timestep", "last_timestep", *(f"basis_{k}" for k in range(alpha.shape[2]))]
        )
        for block, experts in enumerate(alpha.tolist()):
            for i, ((low, high), values) in enumerate(zip(intervals, experts, strict=True)):
                rows.writerow(["all" if len(alpha) == 1 else block, i, low, high - 1, *values])


if __name__ == "__main__":
    parser = ArgumentParser(description="Heat map of a RemixDiT's mixing coefficients, as PNG and CSV.")
    parser.add_argument("ckpt", help="a RemixDiT's checkpoint")
    parser.add_argument("--out", help="the .png to write (default: beside the checkpoint)")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="of the averaged weights, or of the raw ones"
    )
    parser.add_argument(
        "--num-heads", type=positive_int, help="attention heads, for a foreign file that fits no registered model"
    )
    run_script(main, parser)
