"""Score samples against a reference: Inception Score, FID, sFID, Precision and Recall as ADM's evaluator defines them.

    python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/NAME/samples.npz

Each file holds arr_0, uint8 images [n, H, W, 3]; a reference's own statistics (mu, sigma, mu_s, sigma_s) are used as they
are. The network is ADM's Inception, converted by torch-fidelity, or any exported program.
"""

import argparse
import io
import json
import math
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import ArgumentParser, UserError, atomic_write, positive_int, run_script

NEIGHBOURS = 3  # of a point, whose farthest bounds its part of the manifold
MOST_FEATURES = 20_000  # whose covariance still fits into memory
STATISTICS = {"mu", "sigma", "mu_s", "sigma_s"}


def main(args: argparse.Namespace):
    for path in (args.reference, args.samples):
        check_file(path)
    if not has_images(args.samples):
        raise UserError(f"{args.samples} holds no images (arr_0)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(args.weights, device)
    for path in (args.reference, args.samples):
        if has_images(path):
            try:
                run_network(network, next(read_images(path, 2))[0], device)
            except Exception as error:  # an exported program's own complaint
                raise UserError(f"the network does not take the images of {path}: {str(error)[:200]}") from None
    scores = evaluate(args.reference, args.samples, network, args.batch_size, device)
    for name, value in scores.items():
        print(f"{name}: {value}")
    print(" & ".join(f"{value:.2f}" for value in scores.values()) + r" \\")
    if args.json:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(scores, indent=1) + "\n")


def evaluate(reference, samples, network, batch_size: int, device: torch.device) -> dict[str, float]:
    """All five scores of one .npz file of samples against a reference, which may hold statistics, images or both."""
    known = read_statistics(reference)
    pools_ref, stats_ref = None, known
    if known is None or has_images(reference):  # precision and recall need the images' own features
        ref = activations(reference, network, batch_size, device, wants_spatial=known is None)
        pools_ref, stats_ref = ref["pools"], known or ref["statistics"]
    sample = activations(samples, network, batch_size, device)
    for i, name in enumerate(("pooled", "spatial")):
        if len(stats_ref[i][0]) != len(sample["statistics"][i][0]):
            raise UserError(
                f"{reference} has {len(stats_ref[i][0])} {name} features, the network gives {len(sample['statistics'][i][0])}"
            )
    scores = {
        "Inception Score": inception_score(sample["probs"]),
        "FID": frechet_distance(*stats_ref[0], *sample["statistics"][0]),
        "sFID": frechet_distance(*stats_ref[1], *sample["statistics"][1]),
    }
    if pools_ref is None:
        return scores | {"Precision": float("nan"), "Recall": float("nan")}
    precision, recall = precision_recall(pools_ref, sample["pools"])
    return scores | {"Precision": precision, "Recall": recall}


# Definitions


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """The Frechet distance between two Gaussians: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    mu [D], sigma [D, D] (symmetric). Heusel et al., arXiv 1706.08500, eq. 6. The trace of the root needs eigenvalues
    alone: those of sigma1 sigma2 are those of the symmetric sigma1^(1/2) sigma2 sigma1^(1/2).
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (*mu1.shape, *mu1.shape):
        shapes = ", ".join(str(tuple(a.shape)) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"means and covariances {shapes} do not match")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root)


def inception_score(probs, split_size: int = 5000) -> float:
    """exp of the mean KL divergence of class probabilities [n, classes] from their mean, averaged over splits.

    Salimans et al., arXiv 1606.03498; consecutive splits, the last one as short as it comes, as in ADM.
    """
    scores = []
    for part in torch.as_tensor(probs).double().split(split_size):
        divergence = torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())


def precision_recall(ref_features, sample_features, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, eq. 1-2) of features [n, D], [m, D].

    Precision is the share of samples that lie within some reference's distance to its k-th neighbour; recall the reverse.
    """
    ref, sample = torch.as_tensor(ref_features).float(), torch.as_tensor(sample_features).float()
    if min(len(ref), len(sample)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    return _share_covered(sample, ref, _radii(ref, k)), _share_covered(ref, sample, _radii(sample, k))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def _radii(points: Tensor, k: int, block: int = 2048) -> Tensor:
    """Squared distance of each point to its k-th nearest other point."""
    nearest = [_squared_distances(rows, points).topk(k + 1, largest=False).values for rows in points.split(block)]
    return torch.cat(nearest)[:, -1]  # the nearest of all is the point itself


def _share_covered(points: Tensor, centres: Tensor, radii: Tensor, block: int = 2048) -> float:
    covered = [(_squared_distances(rows, centres) <= radii).any(1) for rows in points.split(block)]
    return torch.cat(covered).double().mean().item()


class GaussianStatistics:
    """Mean and covariance of rows that arrive in batches, summed in float64 around the first batch's mean."""

    def __init__(self):
        self.count, self.shift, self.sum, self.outer = 0, None, 0, 0

    def add(self, rows: Tensor):
        rows = rows.double()
        self.shift = rows.mean(0) if self.shift is None else self.shift
        rows = rows - self.shift
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.outer = self.outer + rows.T @ rows

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu [D] and the unbiased sigma [D, D]."""
        mean = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (mean + self.shift).cpu().numpy(), sigma.cpu().numpy()


# Networks


class AdmInception(nn.Module):
    """The TensorFlow Inception of 2015 that ADM uses, by torch-fidelity: uint8 [B, 3, H, W] -> pool, spatial, logits.

    pool [B, 2048]; spatial [B, 2023], the first 7 channels of Mixed_6d's 1x1 branch in NHWC order; logits [B, 1008]
    without bias.
    """

    def __init__(self, weights: str | None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.inception = FeatureExtractorInceptionV3(
            "adm", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
        self.inception.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output: Tensor):
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pool, logits = self.inception(images)
        return pool, self.spatial, logits


def load_network(weights: str | None, device: torch.device):
    """Inception with torch-fidelity's weights (fetched by it, or from a .pth file), or an exported program (.pt2).

    Either maps uint8 images [B, 3, H, W] to pooled features [B, D], spatial features [B, S] and logits [B, classes].
    """
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file")
    try:
        if weights and weights.endswith(".pt2"):
            with zipfile.ZipFile(weights) as archive:  # torch.export.load itself would run what its pickles say
                for name in archive.namelist():
                    if name.endswith(".pt"):
                        torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of buffers that it copies at once
                return torch.export.load(weights).module().to(device)
        if weights:
            torch.load(
                weights, map_location="cpu", weights_only=True
            )  # torch-fidelity itself would run what a pickle says
        return AdmInception(weights).to(device)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file, or no network, provokes
        what = (
            f"--weights {weights} cannot be loaded"
            if weights
            else "torch-fidelity could not fetch Inception's weights (give --weights PATH)"
        )
        raise UserError(f"{what}: {type(error).__name__}: {str(error)[:200]}") from None


# Files


def check_file(path):
    """Raise UserError for what is not a whole .npz of statistics, or of uint8 images [n, H, W, 3], or of both."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a whole .npz file")
    try:
        if has_images(path):
            next(read_images(path, 1))
        read_statistics(path)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged archive provokes
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not has_images(path) and not members(path) >= STATISTICS:
        raise UserError(f"{path} holds neither images (arr_0) nor statistics ({', '.join(sorted(STATISTICS))})")


def members(path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def has_images(path) -> bool:
    return "arr_0" in members(path)


def read_statistics(path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
    """The (mu, sigma) of the pooled and of the spatial features that a reference file holds, or None."""
    if not members(path) >= STATISTICS:
        return None
    with zipfile.ZipFile(path) as archive:
        for name in STATISTICS:
            with archive.open(f"{name}.npy") as file:
                shape, _, _ = read_header(path, file, archive.getinfo(f"{name}.npy").file_size)
                if len(shape) != (2 if name.startswith("sigma") else 1) or max(shape) > MOST_FEATURES:
                    raise UserError(f"{path}: {name} of shape {shape} is no statistic of features")
    with np.load(path, allow_pickle=False) as file:
        return (file["mu"], file["sigma"]), (file["mu_s"], file["sigma_s"])


def read_header(path, file, length: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the array that an open .npy of `length` bytes holds.

    Raises UserError where they are not those of `length` bytes: before any memory is taken for what the header claims.
    """
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds an array that cannot be read ({error})") from None
    if dtype.hasobject or min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != length:
        raise UserError(f"{path} holds an array that is not as long as its header says, {dtype} {shape}")
    return shape, fortran, dtype


def read_images(path, batch_size: int):
    """Yield (batch [b, H, W, 3] uint8, number of images in all) from an .npz file without reading all of arr_0."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, fortran, dtype = read_header(path, file, archive.getinfo("arr_0.npy").file_size)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or shape[0] <= NEIGHBOURS:
            raise UserError(
                f"{path}: arr_0 is {dtype} {shape}, not at least {NEIGHBOURS + 1} uint8 images [n, H, W, 3]"
            )
        for first in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - first)
            try:
                data = file.read(count * math.prod(shape[1:]))
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is damaged: {error}") from None
            if len(data) != count * math.prod(shape[1:]):
                raise UserError(f"{path} is cut short")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:]), shape[0]


@torch.no_grad()
def run_network(network, batch: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return network(torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).contiguous().to(device))


@torch.no_grad()
def activations(path, network, batch_size: int, device: torch.device, wants_spatial: bool = True) -> dict:
    """Run the network over a file: statistics of the pooled and spatial features, all pooled features, probabilities."""
    pooled, spatial, pools, probs = GaussianStatistics(), GaussianStatistics(), [], []
    bar = tqdm(unit="img", desc=Path(path).name, smoothing=0)
    for batch, total in read_images(path, batch_size):
        bar.total = total
        pool, space, logits = run_network(network, batch, device)
        pooled.add(pool)
        if wants_spatial:
            spatial.add(space)
        pools.append(pool.float())
        probs.append(logits.float().softmax(1).cpu())
        bar.update(len(batch))
    bar.close()
    statistics = (pooled.result(), spatial.result() if wants_spatial else None)
    return {"statistics": statistics, "pools": torch.cat(pools), "probs": torch.cat(probs)}


if __name__ == "__main__":
    parser = ArgumentParser(
        description="Inception Score, FID, sFID, Precision and Recall of samples against a reference."
    )
    parser.add_argument(
        "reference", help=".npz of images (arr_0), of statistics (mu, sigma, mu_s, sigma_s), or of both"
    )
    parser.add_argument("samples", help=".npz of images (arr_0)")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="torch-fidelity's Inception weights (.pth; default: it fetches them), or an exported program (.pt2)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at a time")
    parser.add_argument("--json", metavar="PATH", help="write the scores there too")
    run_script(main, parser)
