"""Draw figures of runs and of trained models. The numbers of a PNG figure are written to a CSV file of the same name.

Files that exist are not replaced: choose another name with --out, or remove them.

    python visualize.py run outputs/RUN
    python visualize.py compare outputs/RUN1 outputs/RUN2
    python visualize.py coefficients outputs/RUN/checkpoints/0100000.pt
    python visualize.py losses outputs/RUN/checkpoints/0100000.pt --pretrained DiT.pt --data-path data/encoded
    python visualize.py training outputs/RUN
    python visualize.py grids samples/A/samples.npz samples/B/samples.npz
    python visualize.py ema outputs/RUN/checkpoints/0100000.pt --data-path data/held_out

run: a page (HTML) of one or more runs: curves, samples and coefficients over the steps, errors of the experts, configs.
compare: the numbers of runs as a table, also as Markdown.
coefficients: heat map of the mixing coefficients (figures 4a and 4b of the paper).
losses: error of every expert over all timesteps, relative to the pretrained model (figure 4c of the paper), and to the
    best expert of each interval.
training: mixing coefficients over the steps of a run.
grids: the same samples of several models, one row per model; no CSV file.
ema: held-out error, FID or both over the width of the EMA, from the snapshots of a run with --ema-snapshots.
"""

import argparse
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import load_model
from diffusion import create_process
from diffusion.intervals import scale_of
from evaluation.scores import NEIGHBOURS
from features.autoencoder import Normalization
from features.dataset import ENCODING, FeatureDataset
from figures import save_coefficients, save_grid, save_png, write_csv
from interop.own import find_checkpoint
from interop.shapes import NUM_HEADS_FLAG, TIMESTEP_FREQUENCIES_FLAG, TRUST_PICKLE_FLAG, given_overrides
from models import data_shape
from remix import Remix
from reports.ema import Measure, draw_ema, ema_scores, error_measure
from reports.losses import draw_losses, expert_errors
from reports.page import write_page
from reports.plots import coefficients_over_steps, draw_coefficients_over_steps
from reports.runs import read_runs
from reports.table import table_files, write_table
from runtime.command_line import ArgumentParser, number, positive_int, run_script, seed_int
from runtime.errors import UserError
from runtime.files import check_unused
from runtime.processes import World
from sampling.loading import check_data
from training.posthoc_ema import WIDEST, fit_snapshots
from training.scoring import FID_SAMPLES, ScoreSettings, make_fid
from training.statistics import HeldOutErrors


def main(args: argparse.Namespace):
    out = Path(args.out) if args.out else default_out(args)
    suffix = ".html" if args.figure == "run" else ".png"
    if out.suffix != suffix:
        raise UserError(f"--out {out}: the file name must end in {suffix}")
    written = files_of(args.figure, out)
    # The page of a run that is still training is written again and again, to the place that is meant for it.
    if args.figure != "run" or args.out or len(args.runs) > 1:
        check_unused(*written)
    draw = dict(
        run=draw_page,
        compare=draw_table,
        coefficients=draw_coefficients,
        losses=draw_losses_of,
        training=draw_training,
        grids=draw_grids,
        ema=draw_ema_of,
    )[args.figure]
    draw(out, args)
    print(f"wrote {' and '.join(map(str, written))}")


def files_of(figure: str, out: Path) -> list[Path]:
    """Return the files of a figure whose first file is `out`."""
    if figure in ("run", "grids"):
        return [out]
    return table_files(out) if figure == "compare" else [out, out.with_suffix(".csv")]


def draw_page(out: Path, args: argparse.Namespace):
    """Write the page of runs."""
    write_page(out, read_runs(args.runs, args.scores))


def draw_table(out: Path, args: argparse.Namespace):
    """Write the table of runs, and print it."""
    write_table(out, read_runs(args.runs, args.scores))
    print(out.with_suffix(".md").read_text(), end="")


def draw_coefficients(out: Path, args: argparse.Namespace):
    """Draw a heat map of alpha. Columns are experts with their noise levels, rows are bases."""
    model, config = load_remix(args)
    save_coefficients(out, model, f"{config['model']['name']}: mixing coefficients")
    alpha = model.coefficients().detach().view(-1, model.n_experts, model.n_basis)
    blocks, _, n_basis = alpha.shape
    scale = scale_of(model.boundaries)
    ends = [scale.ends(low, high) for low, high in pairwise(model.boundaries)]
    header = ["block", "expert", *scale.columns, *(f"basis_{k}" for k in range(n_basis))]
    rows = []
    for block, experts in enumerate(alpha.tolist()):
        for i, (levels, values) in enumerate(zip(ends, experts, strict=True)):
            rows.append(["all" if blocks == 1 else block, i, *levels, *values])
    write_csv(out, header, rows)


def draw_losses_of(out: Path, args: argparse.Namespace):
    """Measure and draw the errors of a checkpoint's experts.

    Raises:
        UserError: if the pretrained model is another one than that of the checkpoint.
    """
    model, config = load_remix(args)
    plain, pretrained = config["model"] | {"remix": None}, None
    if args.pretrained:
        pretrained, pretrained_config = load_model(
            args.pretrained, allow_pickle=args.trust_pickle, **given_overrides(args)
        )
        plain["name"] = pretrained_config["model"]["name"]
        if pretrained_config["model"] != plain:
            raise UserError(
                f"{args.pretrained} is not the plain {plain['architecture']} that {args.ckpt} was trained from"
            )
        check_data("--pretrained", args.pretrained, pretrained_config, args.ckpt, config)
        pretrained.to(device())
    measure = held_out_errors(args, config)
    reference, errors = expert_errors(model.to(device()), pretrained, measure, args.per_interval)
    draw_losses(out, reference, errors, model, config["model"]["name"], relative_to_best=pretrained is None)


def draw_ema_of(out: Path, args: argparse.Namespace):
    """Measure and draw what the width of the EMA of a checkpoint changes.

    Raises:
        UserError: if flags are missing or contradict each other, or the checkpoint is not of a run with --ema-
            snapshots.
    """
    args.ckpt = find_checkpoint(args.ckpt)
    model, config = load_model(args.ckpt)
    if not args.data_path and not args.score_against:
        raise UserError("ema needs --data-path for the held-out error, --score-against for FID, or both")
    if (args.weights or args.score_samples or args.vae) and not args.score_against:
        raise UserError("--weights, --score-samples and --vae need --score-against")
    if not config["training"]:
        raise UserError(f"{args.ckpt} is not a checkpoint of a run with --ema-snapshots")
    fits = [fit_snapshots(args.ckpt, std) for std in args.stds]
    print(*fits, sep="\n")
    measures = {}
    if args.data_path:
        measures["error"] = error_measure(held_out_errors(args, config), config["training"]["timesteps"])
    if args.score_against:
        vae = args.vae or config["data"]["vae"]
        scores = ScoreSettings(None, args.score_against, args.weights, args.score_samples, vae=vae)
        fid = make_fid(scores, config, model, args.ckpt)
        fid.start(World(0, 1, device()))
        measures["FID"] = Measure(
            fid.evaluate, lambda network: fid.measure(fid.parts[0], network), len(fid.parts), str(fid)
        )
    draw_ema(out, ema_scores(model, fits, measures, device()), config["model"]["name"])


def load_remix(args: argparse.Namespace) -> tuple[Remix, dict]:
    """Return the model of `args.ckpt`, which becomes the path of its file, and its config.

    Raises:
        UserError: if it is a plain model.
    """
    args.ckpt = find_checkpoint(args.ckpt)
    model, config = load_model(args.ckpt, ema=args.ema, allow_pickle=args.trust_pickle, **given_overrides(args))
    if not config["model"]["remix"]:
        architecture = config["model"]["architecture"]
        raise UserError(f"{args.ckpt} holds a plain {architecture}, which has no mixing coefficients")
    return model, config


def device() -> torch.device:
    """Return the device of the models."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_out(args: argparse.Namespace) -> Path:
    """Return the path of the figure without --out: in the folder of the checkpoint, or in the run's folder."""
    if args.figure == "grids":
        return Path("grids.png")
    if args.figure == "compare":
        return Path("runs.png")
    if args.figure == "run":
        return Path(args.runs[0]) / "page.html" if len(args.runs) == 1 else Path("runs.html")
    if args.figure == "training":
        return Path(args.run) / "coefficients-over-training.png"
    ckpt = Path(args.ckpt)
    # A run's folder stands for its newest checkpoint.
    return ckpt / f"{args.figure}.png" if ckpt.is_dir() else ckpt.with_name(f"{ckpt.stem}-{args.figure}.png")


def draw_training(out: Path, args: argparse.Namespace):
    """Draw the coefficients of every expert over the steps of a run, from the metrics.jsonl in its folder.

    Raises:
        UserError: if the run has logged no coefficients.
    """
    # The grids and --help do not need matplotlib.
    from matplotlib.figure import Figure

    [run] = read_runs([args.run])
    steps, alpha = coefficients_over_steps(run)
    if not len(steps):
        raise UserError(f"{args.run} has logged no coefficients: the run trains a plain model, or has not reported yet")
    title = f"{run.name}: mixing coefficients over training"
    if run.config["model"]["remix"]["scope"] == "local":
        title += ", mean over the blocks"
    n_experts, n_basis = alpha.shape[1:]
    figure = Figure((8, max(1.2, 0.07 * n_experts) * n_basis + 1), layout="constrained")
    draw_coefficients_over_steps(figure, steps, alpha, run.last_step)
    figure.suptitle(title, fontsize=10)
    save_png(figure, out)

    header = ["step", *(f"expert_{i}_basis_{k}" for i in range(n_experts) for k in range(n_basis))]
    write_csv(out, header, [[step, *row.ravel()] for step, row in zip(steps, alpha, strict=True)])


def held_out_errors(args: argparse.Namespace, config: dict) -> HeldOutErrors:
    """Return what measures the errors of models on the images of --data-path."""
    x, y = load_features(args.data_path, args.images, args.global_seed, args.ckpt, config)
    process = create_process(**config["diffusion"])
    return HeldOutErrors(process, x.to(device()), y.to(device()), min(32, len(x)), args.global_seed)


def load_features(data_path: str, count: int, seed: int, ckpt: str, config: dict) -> tuple[Tensor, Tensor]:
    """Return random encoded images and their labels.

    Args:
        data_path: folder of features. Published ones are normalized as the checkpoint records it.
        count: largest number of images.
        seed: seed of the choice of images.
        ckpt: name of the checkpoint, for error messages.
        config: config of its model.

    Returns:
        The images [n, C, H, W], and their labels [n].

    Raises:
        UserError: if the images do not have the shape that the model takes, or, as far as both record it, the VAE and
            the classes that it was trained with.
    """
    data, backbone = config["data"], config["model"]["backbone"]
    normalization = Normalization.from_record(data)
    dataset = FeatureDataset(data_path, normalization=normalization)
    if dataset.shape != data_shape(backbone):
        raise UserError(f"{data_path} holds features of shape {dataset.shape}, which {ckpt} cannot process")
    # Files of other projects, and runs on the original layout, assume the published VAE.
    encoding = {}
    if config["training"] and data["dtype"]:
        encoding = data | {"normalization": normalization}
    encoding = {name: encoding.get(name) for name in ENCODING}
    dataset.check_encoding("--data-path", encoding, backbone["num_classes"], f"the features of {ckpt}")
    return dataset.__getitems__(np.random.default_rng(seed).permutation(len(dataset))[:count].tolist())


def draw_grids(out: Path, args: argparse.Namespace):
    """Draw the first samples of several files, one row per file.

    Samples of the same seed start from the same noise, so each column shows what the models make of one noise.

    Raises:
        UserError: if a file holds no samples, or if the images of a column have different sizes or different classes.
    """
    rows, names, labels = [], [], {}
    for path in args.samples:
        path = Path(path) / "samples.npz" if Path(path).is_dir() else Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                rows.append(file["arr_0"][: args.images])
                if "arr_1" in file:
                    labels[path] = file["arr_1"][: args.images].tolist()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is not a file of samples: {error}") from None
        names.append(path.parent.name or path.stem)
    if len({row.shape for row in rows}) > 1:
        shapes = ", ".join(str(row.shape) for row in rows)
        raise UserError(f"the files hold images of different sizes, or too few images: {shapes}")
    # Files of other projects may hold no labels.
    for path, other in list(labels.items())[1:]:
        first_path, first = next(iter(labels.items()))
        for i, pair in enumerate(zip_longest(first, other)):
            if pair[0] != pair[1]:
                raise UserError(
                    f"sample {i} has the label {pair[0]} in {first_path}, and {pair[1]} in {path}: compare samples of "
                    "the same --global-seed and --labels"
                )
    captions = [name if i == 0 else "" for name in names for i in range(len(rows[0]))]
    save_grid(out, np.concatenate(rows), captions, columns=len(rows[0]), clip_captions=False)


if __name__ == "__main__":
    parser = ArgumentParser(description="Draw figures of runs and of trained models, with their numbers as CSV.")
    figures = parser.add_subparsers(
        dest="figure",
        required=True,
        metavar="FIGURE",
        help="run, compare, coefficients, losses, training, grids or ema",
    )
    page = figures.add_parser("run", help="a page (HTML) of one or more runs: curves, samples, coefficients, configs")
    compare = figures.add_parser("compare", help="the numbers of runs as a table: PNG, CSV and Markdown")
    coefficients = figures.add_parser(
        "coefficients", help="heat map of the mixing coefficients (figures 4a and 4b of the paper)"
    )
    losses = figures.add_parser(
        "losses",
        help="error of every expert over all timesteps, relative to the pretrained model (figure 4c of the paper) and "
        "to the best expert",
    )
    training = figures.add_parser("training", help="mixing coefficients over the steps of a run")
    grids = figures.add_parser("grids", help="the same samples of several models, one row per model")

    ema = figures.add_parser("ema", help="error and FID over the width of the EMA (train_fast.py --ema-snapshots)")

    for figure in (page, compare):
        figure.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, outputs/<prefix>")
        figure.add_argument(
            "--scores",
            nargs="+",
            default=[],
            metavar="JSON",
            help="scores of samples of these runs, from evaluator.py --json",
        )
    page.add_argument(
        "--out", metavar="HTML", help="file to write (default: page.html in the folder of the run, or runs.html)"
    )
    compare.add_argument(
        "--out", metavar="PNG", help="file to write, beside which are .csv and .md (default: runs.png)"
    )
    for figure in (coefficients, losses):
        figure.add_argument("ckpt", help="checkpoint of a RemixDiT")
        figure.add_argument(
            "--ema",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="use the EMA weights, or those of the last step",
        )
        figure.add_argument("--num-heads", **NUM_HEADS_FLAG)
        figure.add_argument("--trust-pickle", **TRUST_PICKLE_FLAG)
        figure.add_argument("--timestep-frequencies", **TIMESTEP_FREQUENCIES_FLAG)
    losses.add_argument(
        "--pretrained",
        help="checkpoint of the DiT that the training started from (default: compare only with the best expert)",
    )
    losses.add_argument("--data-path", required=True, help="encoded images, preferably not those of the training")
    losses.add_argument("--images", type=positive_int, default=256, help="number of images")
    losses.add_argument("--per-interval", type=positive_int, default=10, help="timesteps per expert's interval")
    losses.add_argument("--global-seed", type=seed_int, default=0, help="seed of the images and the noise")
    training.add_argument("run", help="folder of a run, outputs/<prefix>")
    grids.add_argument("samples", nargs="+", help="folders of samples, or samples.npz files, of the same seed")
    grids.add_argument("--images", type=positive_int, default=10, help="images per model")
    ema.add_argument("ckpt", help="checkpoint in the folder of a run with snapshots")
    ema.add_argument("--data-path", help="encoded images for the error, preferably not those of the training")
    ema.add_argument("--images", type=positive_int, default=256, help="number of images")
    ema.add_argument(
        "--stds",
        type=number(float, 0.01, WIDEST),
        nargs="+",
        default=[0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2],
        metavar="STD",
        help="relative standard deviations of the averages",
    )
    ema.add_argument("--global-seed", type=seed_int, default=0, help="seed of the images and the noise")
    ema.add_argument("--score-against", metavar="PATH", help="reference of FID, as for train_fast.py")
    ema.add_argument("--weights", metavar="PATH", help="feature network of FID, as for evaluator.py")
    ema.add_argument(
        "--score-samples", type=number(int, NEIGHBOURS + 1), help=f"samples for FID (default: {FID_SAMPLES})"
    )
    ema.add_argument("--vae", metavar="NAME", help="VAE that decodes the samples (default: the checkpoint's)")
    for figure in (coefficients, losses, training, grids, ema):
        figure.add_argument(
            "--out",
            metavar="PNG",
            help="PNG file to write (default: in the folder of the checkpoint or in the run's folder)",
        )
    run_script(main, parser)
