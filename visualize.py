"""Draw what a run has learned; the numbers of every figure are written beside it as CSV.

    python visualize.py coefficients outputs/RUN/checkpoints/0100000.pt       mixing coefficients (paper, figure 4a-b)
    python visualize.py losses outputs/RUN/checkpoints/0100000.pt \\
        --pretrained pretrained/DiT_S_2_2M.pt --data-path data/encoded         each expert's loss everywhere (figure 4c)
    python visualize.py training outputs/RUN                                  the coefficients over the run
    python visualize.py grids samples/A/samples.npz samples/B/samples.npz     the same samples of several models
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_model
from common import ArgumentParser, UserError, atomic_write, positive_int, run_script, seed_int
from diffusion import create_diffusion
from features import FeatureDataset
from figures import intervals, save_coefficients, save_grid
from models import DiT
from remix import RemixDiT
from training.statistics import noise_errors


def main(args: argparse.Namespace):
    out = Path(args.out) if args.out else args.default_out(args)
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the figure is a .png")
    args.draw(args, out)
    print(f"wrote {out}" + (f" and {out.with_suffix('.csv')}" if out.with_suffix(".csv").exists() else ""))


def coefficients(args: argparse.Namespace, out: Path):
    """Heat map of alpha: experts along x with their timesteps, bases along y, values in the cells."""
    model, config = load_remix(args)
    save_coefficients(out, model, f"{config['model']['name']}: mixing coefficients")
    alpha = model.coefficients().detach().view(-1, model.n_experts, model.n_basis)
    blocks, _, n_basis = alpha.shape
    header = ["block", "expert", "first_timestep", "last_timestep", *(f"basis_{k}" for k in range(n_basis))]
    rows = []
    for block, experts in enumerate(alpha.tolist()):
        for i, ((low, high), values) in enumerate(zip(intervals(model), experts, strict=True)):
            rows.append(["all" if blocks == 1 else block, i, low, high - 1, *values])
    write_table(out, header, rows)


def losses(args: argparse.Namespace, out: Path):
    """Each expert's error over all timesteps, relative to the pretrained model's there: lowest inside its own interval."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    remix, config = load_remix(args)
    pretrained, _ = load_model(args.pretrained, allow_pickle=args.trust_pickle, **heads(args))
    if not isinstance(pretrained, DiT) or pretrained.config != remix.backbone_config:
        raise UserError(f"{args.pretrained} is not the plain DiT that {args.ckpt} could have started from")
    dataset = FeatureDataset(args.data_path)
    backbone = remix.backbone_config
    if dataset.shape != (backbone["in_channels"], backbone["input_size"], backbone["input_size"]):
        raise UserError(f"{args.data_path} holds features of shape {dataset.shape}, which {args.ckpt} was not made for")
    x, y = dataset.__getitems__(
        np.random.default_rng(args.global_seed).permutation(len(dataset))[: args.images].tolist()
    )
    x, y, remix, pretrained = x.to(device), y.to(device), remix.to(device), pretrained.to(device)
    diffusion = create_diffusion(**config["diffusion"])
    bounds = intervals(remix)
    timesteps = [np.linspace(low, high - 1, args.per_interval).round().astype(int) for low, high in bounds]

    def errors(model: DiT) -> np.ndarray:
        """Mean over each interval, [N]."""
        values = noise_errors(model, diffusion, x, y, np.concatenate(timesteps), min(32, len(x)), args.global_seed)
        return values.view(len(bounds), -1).mean(1).cpu().numpy()

    reference = errors(pretrained)
    table = np.stack([errors(remix.expert(i)) for i in tqdm(range(remix.n_experts), desc="experts")]) / reference - 1
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    # Differences of tenths of a percent are the news; an expert far outside its interval may be ten times worse.
    scale = matplotlib.colors.SymLogNorm(linthresh=0.5, vmin=-100, vmax=100)
    image = axis.imshow(100 * table, cmap="RdBu_r", norm=scale)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.set_xlabel("interval of timesteps (0 is the least noise)")
    axis.set_ylabel("expert")
    ticks = [-100, -10, -1, 0, 1, 10, 100]
    figure.colorbar(image, label="error relative to the pretrained model, %", ticks=ticks, format="%d")
    own = float((table.argmin(0) == np.arange(len(bounds))).mean())
    axis.set_title(
        f"{config['model']['name']}: {own:.0%} of the intervals are served best by their own expert", fontsize=10
    )
    save(figure, out)
    header = ["expert", *(f"t_{low}_{high - 1}" for low, high in bounds)]
    write_table(
        out, header, [["pretrained, absolute", *reference], *([i, *row] for i, row in enumerate(table.tolist()))]
    )


def training(args: argparse.Namespace, out: Path):
    """The coefficients of every expert over the run, from its metrics.jsonl."""
    path = Path(args.run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if "coefficients" in line]
    if not lines:
        raise UserError(f"{path} has no coefficients: the run trains a plain DiT, or has not logged yet")
    steps = [line["step"] for line in lines]
    alpha = np.array([line["coefficients"] for line in lines])
    alpha = alpha if alpha.ndim == 3 else alpha.mean(1)  # with a pi a block, their mean
    n_experts, n_basis = alpha.shape[1:]
    figure, axes = plt.subplots(
        n_basis, 1, sharex=True, sharey=True, layout="constrained", squeeze=False, figsize=(8, 1.6 * n_basis + 1)
    )
    colors = plt.get_cmap("plasma")(np.linspace(0, 0.9, n_experts))
    for k, axis in enumerate(axes[:, 0]):
        for i in range(n_experts):
            axis.plot(steps, alpha[:, i, k], color=colors[i], linewidth=1)
        axis.set_ylabel(f"basis {k}")
    axes[-1, 0].set_xlabel("step")
    scale = plt.cm.ScalarMappable(plt.Normalize(0, n_experts - 1), plt.matplotlib.colors.ListedColormap(colors))
    figure.colorbar(scale, ax=axes[:, 0].tolist(), label="expert (0 serves the least noise)")
    save(figure, out)
    header = ["step", *(f"expert_{i}_basis_{k}" for i in range(n_experts) for k in range(n_basis))]
    write_table(out, header, [[step, *row.ravel()] for step, row in zip(steps, alpha, strict=True)])


def grids(args: argparse.Namespace, out: Path):
    """The same samples of several models, one row a model: samples of one seed start from the same noise."""
    rows, names = [], []
    for path in args.samples:
        try:
            with np.load(path, allow_pickle=False) as file:
                rows.append(file["arr_0"][: args.images])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is not a file of samples: {error}") from None
        names.append(Path(path).parent.name or Path(path).stem)
    if len({row.shape for row in rows}) > 1:
        raise UserError(
            f"the files hold images of different sizes or too few: {', '.join(str(row.shape) for row in rows)}"
        )
    captions = [name if i == 0 else "" for name in names for i in range(len(rows[0]))]
    save_grid(out, np.concatenate(rows), captions, columns=len(rows[0]), clip_captions=False)


def load_remix(args: argparse.Namespace) -> tuple[RemixDiT, dict]:
    model, config = load_model(args.ckpt, ema=args.ema, allow_pickle=args.trust_pickle, **heads(args))
    if not isinstance(model, RemixDiT):
        raise UserError(f"{args.ckpt} holds a plain DiT, which has no mixing coefficients")
    return model, config


def heads(args: argparse.Namespace) -> dict:
    return {"num_heads": args.num_heads} if args.num_heads else {}


def save(figure, path: Path):
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def write_table(path: Path, header: list, rows: list[list]):
    with atomic_write(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def beside(kind: str):
    return lambda args: Path(args.ckpt).with_name(f"{Path(args.ckpt).stem}-{kind}.png")


if __name__ == "__main__":
    parser = ArgumentParser(description="Draw what a run has learned, as PNG, with the numbers as CSV.")
    figures = parser.add_subparsers(required=True, metavar="FIGURE", help="coefficients, losses, training or grids")
    drawn = figures.add_parser("coefficients", help="heat map of the mixing coefficients (paper, figure 4a-b)")
    drawn.set_defaults(draw=coefficients, default_out=beside("coefficients"))
    drawn.add_argument("ckpt", help="a RemixDiT's checkpoint")
    drawn = figures.add_parser(
        "losses", help="each expert's loss over all timesteps, relative to the pretrained model (figure 4c)"
    )
    drawn.set_defaults(draw=losses, default_out=beside("losses"))
    drawn.add_argument("ckpt", help="a RemixDiT's checkpoint")
    drawn.add_argument("--pretrained", required=True, help="the DiT that it started from")
    drawn.add_argument("--data-path", required=True, help="features to judge on, best those of images not trained on")
    drawn.add_argument("--images", type=positive_int, default=256, help="how many of them")
    drawn.add_argument(
        "--per-interval", type=positive_int, default=10, help="timesteps judged in each expert's interval"
    )
    drawn.add_argument("--global-seed", type=seed_int, default=0, help="of the images and the noise")
    for figure in figures.choices.values():
        figure.add_argument(
            "--ema", action=argparse.BooleanOptionalAction, default=True, help="the averaged weights, or the raw ones"
        )
        figure.add_argument(
            "--num-heads", type=positive_int, help="attention heads, for a foreign file that fits no registered model"
        )
        figure.add_argument("--trust-pickle", action="store_true", help="let the files run code: for your own alone")
    drawn = figures.add_parser("training", help="the coefficients over a run, from its metrics.jsonl")
    drawn.set_defaults(draw=training, default_out=lambda args: Path(args.run) / "coefficients-over-training.png")
    drawn.add_argument("run", help="a run's folder, outputs/<prefix>")
    drawn = figures.add_parser("grids", help="the same samples of several models, side by side")
    drawn.set_defaults(draw=grids, default_out=lambda args: Path("grids.png"))
    drawn.add_argument("samples", nargs="+", help="samples.npz files of the same seed, one a model")
    drawn.add_argument("--images", type=positive_int, default=10, help="of each model")
    for figure in figures.choices.values():
        figure.add_argument("--out", help="the .png to write (default: beside the checkpoint or in the run's folder)")
    run_script(main, parser)
