"""Measure what part of a basis's gradient comes from the experts that the prior gives it, on Fashion-MNIST.

    python studies/fashion_gradients.py

At the start of a fine-tuning all bases are equal, and the gradient of basis k is the sum over the experts i of
alpha[i, k] G_i, where G_i is the gradient of expert i's loss with respect to its mixed weights. The loss and G_i are
hundreds of times larger at low noise than at high noise. Therefore, unless alpha is nearly one-hot, the experts of low
noise rule the gradients of all bases. This script measures the norms of G_i for the pretrained models that
studies/fashion_tables.py has trained, with the published loss and with two loss weights, and computes for each
prior bonus which part of the gradient of the basis of the highest noise comes from that basis's own experts. Writes
<out>/gradients.csv (one row per seed, loss and expert) and <out>/figures/gradients.png.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import runs  # Before torch: it sets the number of threads.
import torch
from fashion_figures import save_figure
from fashion_tables import WEIGHTED
from scipy.special import softmax
from tqdm import tqdm

from checkpoint import load_model
from diffusion import GaussianDiffusion, create_diffusion
from diffusion.intervals import equal_boundaries
from features.dataset import FeatureDataset
from models import DiT
from remix import MIXED_LAYERS
from runtime.command_line import ArgumentParser, positive_int, run_script
from runtime.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_BASIS, N_EXPERTS = 4, 20
BONUSES = np.arange(0, 13)
# For each loss, the arguments of `create_diffusion`.
LOSSES = {"published": {}, "min-snr-5": dict(min_snr=5), "weighted": WEIGHTED}
# The gradient is that of a group of a training step: 128 images of 16 experts.
GROUP = 8


def main(args: argparse.Namespace):
    out = Path(args.out)
    paths = sorted((out / "pretrained").glob("pixels-[0-9].safetensors"))
    if not paths:
        raise UserError(f"{out}/pretrained has no pretrained models: run studies/fashion_tables.py")
    features = FeatureDataset(Path(args.work) / "features" / "pixels-train")
    rows = []
    for path in tqdm(paths, unit="model"):
        model, _ = load_model(path)
        seed = path.stem.removeprefix("pixels-")
        for loss, weight in LOSSES.items():
            norms = gradient_norms(model, features, args.groups, create_diffusion(**weight))
            rows += [
                {"seed": seed, "loss": loss, "expert": i, "gradient_norm": f"{norm:.4g}"}
                for i, norm in enumerate(norms)
            ]
    runs.write_csv(out / "gradients.csv", rows)
    draw(out / "figures" / "gradients.png", rows)
    print(f"wrote {out / 'gradients.csv'} and {out / 'figures' / 'gradients.png'}")


def gradient_norms(model: DiT, features: FeatureDataset, groups: int, diffusion: GaussianDiffusion) -> np.ndarray:
    """Measure the gradient of the training loss with respect to the weights of the mixed layers, for each expert.

    Args:
        model: a pretrained DiT, as which all experts begin.
        features: the encoded training images.
        groups: number of groups of GROUP images per expert.
        diffusion: the process, with its loss weight.

    Returns:
        Root mean square over the groups of the norm of a group's gradient [N_EXPERTS].
    """
    # The model draws its label dropout from the global generator too.
    torch.manual_seed(0)
    weights = [p for name, p in model.train().named_parameters() if any(f"{layer}." in name for layer in MIXED_LAYERS)]
    squares = np.zeros((N_EXPERTS, groups))
    for expert, (low, high) in enumerate(pairwise(equal_boundaries(N_EXPERTS, 1000))):
        for group in range(groups):
            images = torch.randint(len(features), (GROUP,))
            x, y = features.__getitems__(images.tolist())
            t = torch.randint(low, high, (GROUP,))
            noise = torch.randn(x.shape)
            loss = diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"].mean()
            squares[expert, group] = sum(g.square().sum().item() for g in torch.autograd.grad(loss, weights))
    return np.sqrt(squares.mean(1))


def own_share(norms: np.ndarray, bonus: float, draws: int = 1000) -> float:
    """Return which part of the last basis's gradient comes from its own experts, at the start of a fine-tuning.

    The gradients of different experts are taken as uncorrelated, so that the squares of their norms add up.

    Args:
        norms: norms of the experts' gradients [N_EXPERTS].
        bonus: the prior bonus.
        draws: number of draws of the initial logits.

    Returns:
        Mean over the draws of the ratio of squared norms, from 0 to 1.
    """
    prior = np.arange(N_EXPERTS) * N_BASIS // N_EXPERTS
    logits = np.random.default_rng(0).standard_normal((draws, N_EXPERTS, N_BASIS))
    logits += bonus * (prior[:, None] == np.arange(N_BASIS))
    squares = (softmax(logits, axis=-1)[..., -1] * norms) ** 2  # [draws, N_EXPERTS]
    return float((squares[:, prior == N_BASIS - 1].sum(1) / squares.sum(1)).mean())


def draw(path: Path, rows: list[dict]):
    """Draw the norms of the gradients over the timesteps, and the own share over the bonus, per seed and loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    seeds = sorted({row["seed"] for row in rows})
    for color, loss in enumerate(LOSSES):
        for seed in seeds:
            same = [row for row in rows if (row["seed"], row["loss"]) == (seed, loss)]
            norms = np.array([float(row["gradient_norm"]) for row in same])
            style = dict(marker=".", linewidth=0.8, color=f"C{color}", label=loss if seed == seeds[0] else None)
            left.semilogy((np.arange(N_EXPERTS) + 0.5) * 1000 / N_EXPERTS, norms, **style)
            right.plot(BONUSES, [own_share(norms, bonus) for bonus in BONUSES], **style)
    left.set(xlabel="timestep", ylabel="norm of an expert's gradient")
    right.set(xlabel="prior bonus", ylabel="part from its own experts of the\ngradient of the basis for t >= 750")
    left.legend(title="loss", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(path, figure)


if __name__ == "__main__":
    parser = ArgumentParser(description="Measure what part of a basis's gradient comes from its own experts.")
    parser.add_argument("--groups", type=positive_int, default=32, metavar="N", help="groups of images per expert")
    parser.add_argument("--work", default="data/fashion", metavar="FOLDER", help="folder of the encoded images")
    parser.add_argument("--out", default="studies/results/fashion", metavar="FOLDER", help="results")
    run_script(main, parser)
