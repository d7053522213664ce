"""Score samples against a reference: Inception Score, FID, sFID, Precision and Recall as ADM's evaluator defines them.

    python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/NAME/samples.npz

Each is an .npz file of images (arr_0, uint8 [n, H, W, 3]), of statistics (mu, sigma, mu_s, sigma_s, as ADM's references
hold them; used as they are) or of both, or a folder of images. The network is ADM's Inception, converted by
torch-fidelity, or any exported program. What it makes of a file is kept under the file's hash, and computed once.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from common import ArgumentParser, UserError, atomic_write, positive_int, run_script, write_json

NEIGHBOURS = 3  # of a point, whose farthest bounds its part of the manifold
USUAL_COUNT = 50_000  # of samples, in published tables
MOST_FEATURES = 20_000  # whose covariance still fits into memory
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
EXTRA = {"kid": "KID", "fd-dinov2": "FD-DINOv2"}


def main(args: argparse.Namespace):
    if not args.samples and not args.save_stats:
        raise UserError("no samples to score: name them after the reference (or give --save-stats)")
    paths, also = [args.reference, *args.samples], args.also or []
    for path in paths:
        check_file(path)
    if args.weights and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights}: no such file")

    # Say what the networks are, and try them on every file that they have not seen.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # whose rounding would show in the scores
    how = dict(device=device, batch_size=args.batch_size, cache=None if args.cache == "none" else Path(args.cache))
    name = content_hash(args.weights) if args.weights else "inception-2015-12-05"
    networks = {"": Activations(lambda: load_network(args.weights), name, 3, **how)}
    if "fd-dinov2" in also and has_images(args.reference):
        networks["_dinov2"] = Activations(load_dinov2, "dinov2-vit-l-14", 1, **how)
    for path in filter(has_images, paths):
        for network in networks.values():
            network.check(path)

    # Score one file of samples after another.
    ref = image_features(args.reference, networks)
    if args.save_stats:
        with atomic_write(args.save_stats) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{key: ref[key] for key in STATISTICS})
    table = []
    for path in args.samples:
        sample = image_features(path, networks)
        check_match(args.reference, ref, path, sample)
        table.append(evaluate(ref, sample, also, device))
        remark(args.reference, ref, path, sample, table[-1])
        if len(args.samples) == 1:
            for key, value in table[0].items():
                print(f"{key}: {value}")
            print(" & ".join(map(shortened, table[0], table[0].values())) + r" \\")
        else:
            width = max(map(len, args.samples))
            if len(table) == 1:
                print(" " * width, *(f"{key:>8}" for key in table[0]), sep="  ")
            row = (shortened(key, value).rjust(max(8, len(key))) for key, value in table[-1].items())
            print(path.ljust(width), *row, sep="  ", flush=True)
    if args.json and table:
        table = [{key: None if math.isnan(value) else value for key, value in row.items()} for row in table]
        write_json(args.json, table[0] if len(table) == 1 else dict(zip(args.samples, table, strict=True)))


def image_features(path, networks: dict[str, "Activations"]) -> dict[str, np.ndarray]:
    """What the scores need of a file: what the networks make of its images, and statistics (its own, if it holds any)."""
    found = {}
    if has_images(path):
        for suffix, network in networks.items():
            found |= {f"{key}{suffix}": value for key, value in network(path).items()}
    return found | (read_statistics(path) if has_statistics(path) else {})


def check_match(reference, ref: dict, path, sample: dict):
    """Raise UserError where two files are not described by the same features, or by any that are not finite."""
    for name, key in (("pooled", "mu"), ("spatial", "mu_s")):
        if len(ref[key]) != len(sample[key]):
            raise UserError(f"{reference} has {len(ref[key])} {name} features, {path} has {len(sample[key])}")
    for where, found in ((reference, ref), (path, sample)):
        if not all(np.isfinite(values).all() for values in found.values()):
            raise UserError(f"the features of {where} are not finite")


def evaluate(ref: dict, sample: dict, also: list[str], device: torch.device) -> dict[str, float]:
    """All scores of samples against a reference, as `describe` gives them; nan for those that need images not there."""
    missing = float("nan")
    scores = {
        "Inception Score": float(sample.get("inception_score", missing)),
        "FID": frechet_distance(ref["mu"], ref["sigma"], sample["mu"], sample["sigma"]),
        "sFID": frechet_distance(ref["mu_s"], ref["sigma_s"], sample["mu_s"], sample["sigma_s"]),
        "Precision": missing,
        "Recall": missing,
        **{EXTRA[name]: missing for name in also},
    }
    if "pools" in ref and "pools" in sample:
        pools = [torch.from_numpy(found["pools"]).to(device) for found in (ref, sample)]
        scores["Precision"], scores["Recall"] = precision_recall(*pools)
        if "kid" in also:
            scores["KID"] = kernel_distance(*pools)
    if "mu_dinov2" in ref and "mu_dinov2" in sample:
        statistics = [found[key] for found in (ref, sample) for key in ("mu_dinov2", "sigma_dinov2")]
        scores["FD-DINOv2"] = frechet_distance(*statistics)
    return scores


def shortened(name: str, value: float) -> str:
    return f"{value:.{5 if name == 'KID' else 2}f}"


def remark(reference, ref: dict, path, sample: dict, scores: dict[str, float]):
    """Say which scores there cannot be, and how much an unusual number of samples adds to their FID."""
    without = [str(file) for file in (reference, path) if not has_images(file)]
    if without:
        missing = ", ".join(key for key, value in scores.items() if math.isnan(value))
        print(f"note: {' and '.join(without)} without images: no {missing}", file=sys.stderr)
    if not has_images(path) or has_statistics(path) or len(sample["pools"]) == USUAL_COUNT:
        return
    count, width = sample["pools"].shape
    bias = fid_bias(ref["mu"], ref["sigma"], torch.from_numpy(sample["pools"]), scores["FID"])
    about = "about" if count > 2 * width else "very roughly"  # the law needs more samples than features
    print(
        f"warning: {path} has {count:,} images, not the usual {USUAL_COUNT:,}: this alone makes its FID {about} "
        f"{bias * (1 - count / USUAL_COUNT):+.3g} ({bias:+.3g} beside infinitely many; arXiv 1911.07023)",
        file=sys.stderr,
    )


# Definitions


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """The Frechet distance between two Gaussians: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    mu [D], sigma [D, D] (symmetric). Heusel et al., arXiv 1706.08500, eq. 6. The trace of the root needs the product's
    eigenvalues alone.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(a, dtype=torch.float64, device="cpu").numpy() for a in (mu1, sigma1, mu2, sigma2)
    )
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (*mu1.shape, *mu1.shape):
        shapes = ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"means and covariances {shapes} do not match")
    trace_of_root = np.sqrt(_eigenvalues_of_product(sigma1, sigma2).clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root)


def _eigenvalues_of_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Eigenvalues, but for zeros, of a b, both symmetric and positive semidefinite: those of r' a r where b = r r'."""
    try:  # with the Cholesky factor of b
        return scipy.linalg.eigh(a, b, type=2, eigvals_only=True, driver="gv")
    except scipy.linalg.LinAlgError:  # b is singular, as of fewer images than features, and has a narrower factor
        lower, order, rank, _ = scipy.linalg.lapack.dpstrf(b, lower=1)
        root, order = np.tril(lower)[:, :rank], order - 1
        return scipy.linalg.eigvalsh(root.T @ a[np.ix_(order, order)] @ root)


def fid_bias(ref_mu, ref_sigma, pools: Tensor, fid: float) -> float:
    """How much the FID of pools [n, D] exceeds that of infinitely many samples, to first order in 1 / n.

    FID_n = FID_inf + c / n (Chong & Forsyth, arXiv 1911.07023), so that halves have c / n more than the whole.
    """
    found = []
    for half in torch.randperm(len(pools), generator=torch.Generator().manual_seed(0)).chunk(2):
        gathered = GaussianStatistics()
        for rows in half.split(4096):
            gathered.add(pools[rows])
        found.append(frechet_distance(ref_mu, ref_sigma, *gathered.result()))
    return float(np.mean(found)) - fid


def inception_score(probs, split_size: int = 5000) -> float:
    """exp of the mean KL divergence of class probabilities [n, classes] from their mean, averaged over splits.

    Salimans et al., arXiv 1606.03498; consecutive splits, the last one as short as it comes, as in ADM.
    """
    scores = []
    for part in torch.as_tensor(probs).double().split(split_size):
        divergence = torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())


def precision_recall(ref_features, sample_features, k: int = NEIGHBOURS, block: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, eq. 1-2) of features [n, D], [m, D].

    Precision is the share of samples that lie within some reference's distance to its k-th neighbour; recall the reverse.
    Distances are computed once for a pair, `block` x `block` at a time.
    """
    ref, sample = torch.as_tensor(ref_features).float(), torch.as_tensor(sample_features).float()
    if min(len(ref), len(sample)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    centre = ref.mean(0)  # around which products of vectors are small, and round less
    ref, sample = ref - centre, sample - centre
    n, m = -(-len(ref) // block), -(-len(sample) // block)
    pairs = n * (n + 1) // 2 + m * (m + 1) // 2 + n * m
    with tqdm(total=pairs, desc="precision and recall", unit="block", leave=False, delay=2) as bar:
        ref_radii, sample_radii = _radii(ref, k, block, bar), _radii(sample, k, block, bar)
        ref_covered, sample_covered = (torch.zeros(len(a), dtype=torch.bool, device=a.device) for a in (ref, sample))
        for i in _slices(ref, block):
            for j in _slices(sample, block):
                distances = _squared_distances(ref[i], sample[j])
                sample_covered[j] |= (distances <= ref_radii[i, None]).any(0)
                ref_covered[i] |= (distances <= sample_radii[j]).any(1)
                bar.update()
    return sample_covered.double().mean().item(), ref_covered.double().mean().item()


def _slices(points: Tensor, block: int) -> list[slice]:
    return [slice(i, i + block) for i in range(0, len(points), block)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = torch.linalg.vecdot(b, b), torch.linalg.vecdot(a, a)[:, None]
    return torch.addmm(squares[0], a, b.T, alpha=-2).add_(squares[1]).clamp_(min=0)


def _radii(points: Tensor, k: int, block: int, bar: tqdm) -> Tensor:
    """Squared distance of each point to its k-th nearest other point."""
    nearest = points.new_full((len(points), k + 1), torch.inf)  # the nearest of all is the point itself
    blocks = _slices(points, block)
    for number, i in enumerate(blocks):
        for j in blocks[number:]:
            distances = _squared_distances(points[i], points[j])
            for rows, found in ((i, distances),) if i == j else ((i, distances), (j, distances.T)):
                nearest[rows] = torch.cat([nearest[rows], found], dim=1).topk(k + 1, largest=False).values
            bar.update()
    return nearest[:, -1]


def kernel_distance(ref_features: Tensor, sample_features: Tensor) -> float:
    """KID (Binkowski et al., arXiv 1801.01401) of features [n, D], [m, D] by torch-fidelity: 100 subsets of up to 1,000."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(1000, len(ref_features), len(sample_features))
    return kid_features_to_metric(ref_features, sample_features, kid_subset_size=size)[KEY_METRIC_KID_MEAN]


class GaussianStatistics:
    """Mean and covariance of rows that arrive in batches, summed in float64 around the first batch's mean."""

    def __init__(self):
        self.count, self.shift = 0, None

    def add(self, rows: Tensor, block: int = 256):
        rows = torch.as_tensor(rows).double()
        if self.shift is None:
            self.shift = rows.mean(0)
            self.sum, self.outer = torch.zeros_like(self.shift), rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(0)
        for i in range(0, rows.shape[1], block):  # the blocks below the diagonal are those above it
            self.outer[i : i + block, i:].addmm_(rows[:, i : i + block].T, rows[:, i:])

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu [D] and the unbiased sigma [D, D]."""
        mean = self.sum / self.count
        outer = self.outer.triu() + self.outer.triu(1).T
        sigma = (outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
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


class DinoV2(nn.Module):
    """DINOv2 ViT-L/14 by torch-fidelity: uint8 [B, 3, H, W] -> (features [B, 1024],).

    The images are resized as Stein et al., arXiv 2306.04675, do: to 224 x 224, bicubic with antialiasing, in 8 bits.
    """

    def __init__(self):
        super().__init__()
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

        self.dinov2 = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])

    def forward(self, images: Tensor) -> tuple[Tensor]:
        from torchvision.transforms.functional import InterpolationMode, resize

        return self.dinov2(resize(images, [224, 224], InterpolationMode.BICUBIC, antialias=True))


def load_dinov2() -> DinoV2:
    try:
        return DinoV2()
    except Exception as error:  # whatever no network provokes
        raise UserError(
            f"--also fd-dinov2: torch.hub cannot load facebookresearch/dinov2 ({type(error).__name__}: {str(error)[:200]}); "
            f"without a network, copy {torch.hub.get_dir()} from a machine that has loaded it"
        ) from None


def load_network(weights: str | None):
    """Inception with torch-fidelity's weights (fetched by it, or from a .pth file), or an exported program (.pt2).

    Either maps uint8 images [B, 3, H, W] to pooled features [B, D], spatial features [B, S] and logits [B, classes].
    """
    try:
        if weights and weights.endswith(".pt2"):
            refuse_code(weights)
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of buffers that it copies at once
                return torch.export.load(weights).module()
        if weights:
            torch.load(
                weights, map_location="cpu", weights_only=True
            )  # torch-fidelity itself would run what a pickle says
        return AdmInception(weights)
    except Exception as error:  # whatever a damaged file, or no network, provokes
        what = (
            f"--weights {weights} cannot be loaded"
            if weights
            else "torch-fidelity could not fetch Inception's weights (give --weights PATH)"
        )
        raise UserError(f"{what}: {type(error).__name__}: {str(error)[:200]}") from None


def refuse_code(program: str):
    """Raise ValueError for an exported program (.pt2) that torch.export.load would let run code: pickles, compiled libraries."""
    with zipfile.ZipFile(program) as archive:
        for name in archive.namelist():
            if "aotinductor" in name:
                raise ValueError("it holds compiled code")
            if name.endswith(".pt"):
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            if name.endswith("_config.json"):  # says how each tensor is stored
                entries = json.loads(archive.read(name)).get("config", {})
                if any(entry.get("use_pickle") for entry in entries.values()):
                    raise ValueError("it holds pickles")


class Activations:
    """What one network makes of files, kept in the folder `cache` under the hashes of the file and of the network.

    The network is loaded for the first file that is not there. `name` tells it from others; `outputs` are 3 (pooled and
    spatial features, logits) or 1 (pooled features).
    """

    def __init__(self, load, name: str, outputs: int, cache: Path | None, batch_size: int, device: torch.device):
        self.load, self.name, self.outputs = load, name, outputs
        self.cache, self.batch_size, self.device = cache, batch_size, device
        self.entries: dict[str, Path] = {}

    @cached_property
    def network(self):
        return self.load().to(self.device)

    def check(self, path):
        """Raise UserError if the network has to be run over this file, and cannot be."""
        if self.cache and path not in self.entries:
            self.entries[path] = self.cache / f"{content_hash(path)}-{self.name}-v1.npz"
        if self.cache and self.entries[path].exists():
            return
        network = self.network
        try:
            outputs = self.run(network, next(read_images(path, 2))[0])
            shapes = [tuple(output.shape) for output in outputs]
        except Exception as error:  # an exported program's own complaint
            raise UserError(f"the network does not take the images of {path}: {str(error)[:200]}") from None
        if len(outputs) != self.outputs or any(len(shape) != 2 or shape[0] != 2 for shape in shapes):
            raise UserError(f"the network makes {shapes} of 2 images, not {self.outputs} rows of numbers for each")

    def __call__(self, path) -> dict[str, np.ndarray]:
        """Statistics of the pooled and spatial features, all pooled features, and the Inception Score of a checked file."""
        if self.cache is None:
            return self.compute(path)
        entry = self.entries[path]
        try:
            with np.load(entry, allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever a damaged archive provokes
            print(f"warning: {entry} is damaged and computed anew ({type(error).__name__})", file=sys.stderr)
        found = self.compute(path)
        try:
            with atomic_write(entry) as temporary, open(temporary, "wb") as file:
                np.savez(file, **found)
        except OSError as error:  # a full disk, a folder that cannot be written
            print(f"warning: the activations of {path} could not be kept: {error}", file=sys.stderr)
        return found

    def compute(self, path) -> dict[str, np.ndarray]:
        pooled, spatial, pools, probs = GaussianStatistics(), GaussianStatistics(), [], []
        with tqdm(unit="img", desc=Path(path).name, smoothing=0) as bar:
            for batch, total in read_images(path, self.batch_size):
                bar.total = total
                pool, *rest = self.run(self.network, batch)
                pooled.add(pool)
                if rest:
                    spatial.add(rest[0])
                    pools.append(pool.float())
                    probs.append(rest[1].float().softmax(1))
                bar.update(len(batch))
        found = dict(zip(("mu", "sigma"), pooled.result(), strict=True))
        if pools:
            found |= dict(zip(("mu_s", "sigma_s"), spatial.result(), strict=True))
            found["pools"] = torch.cat(pools).cpu().numpy()
            found["inception_score"] = np.array(inception_score(torch.cat(probs)))
        return found

    @torch.no_grad()
    def run(self, network, batch: np.ndarray) -> tuple[Tensor, ...]:
        return network(torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).contiguous().to(self.device))


# Files


def check_file(path):
    """Raise UserError for what is neither a folder of images nor a whole .npz of uint8 images [n, H, W, 3] or of statistics."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
    if not Path(path).is_dir() and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a whole .npz file")
    try:
        if has_images(path):
            next(read_images(path, 1))
        if has_statistics(path):
            read_statistics(path)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged archive provokes
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not has_images(path) and not has_statistics(path):
        raise UserError(f"{path} holds neither images (arr_0) nor statistics ({', '.join(STATISTICS)})")


def members(path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def has_images(path) -> bool:
    return Path(path).is_dir() or "arr_0" in members(path)


def has_statistics(path) -> bool:
    return not Path(path).is_dir() and members(path) >= set(STATISTICS)


def content_hash(path) -> str:
    """The SHA-256 of a file, or of the images in a folder, as 32 hexadecimal digits."""
    digest = hashlib.sha256()
    files = list_images(path) if Path(path).is_dir() else [Path(path)]
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"hashing {Path(path).name}", leave=False, delay=2) as bar:
        for file in files:
            digest.update(b"%d " % file.stat().st_size)
            with open(file, "rb") as stream:
                while data := stream.read(2**24):
                    digest.update(data)
                    bar.update(len(data))
    return digest.hexdigest()[:32]


def read_statistics(path) -> dict[str, np.ndarray]:
    """mu [D], sigma [D, D] of the pooled and mu_s, sigma_s of the spatial features, as a reference file holds them."""
    with zipfile.ZipFile(path) as archive:
        for name in STATISTICS:
            with archive.open(f"{name}.npy") as file:
                shape, _, dtype = read_header(path, file, archive.getinfo(f"{name}.npy").file_size)
                fits = shape == ((shape or (0,))[0],) * (2 if name.startswith("sigma") else 1)
                if not fits or not 0 < shape[0] <= MOST_FEATURES or dtype.kind != "f":
                    raise UserError(f"{path}: {name}, {dtype} {shape}, is no statistic of features")
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in STATISTICS}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if len(found[mu]) != len(found[sigma]):
            raise UserError(f"{path}: {mu} {found[mu].shape} and {sigma} {found[sigma].shape} do not match")
    return found


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
    """Yield (batch [b, H, W, 3] uint8, number of images in all) from an .npz file or a folder, a batch at a time."""
    if Path(path).is_dir():
        yield from read_folder(path, batch_size)
        return
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


def list_images(folder) -> list[Path]:
    """The PNG and JPEG files at any depth below a folder, sorted."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def read_folder(folder, batch_size: int):
    """read_images, of a folder whose images must be of one size."""
    paths = list_images(folder)
    if len(paths) <= NEIGHBOURS:
        raise UserError(f"{folder} holds {len(paths)} images (.png, .jpg), not at least {NEIGHBOURS + 1}")
    first, shape = paths[0], None
    with ThreadPoolExecutor() as threads:
        for i in range(0, len(paths), batch_size):
            images = list(threads.map(read_image, paths[i : i + batch_size]))
            shape = shape or images[0].shape
            for path, image in zip(paths[i : i + batch_size], images, strict=True):
                if image.shape != shape:
                    sizes = [f"{s[1]}x{s[0]}" for s in (image.shape, shape)]
                    raise UserError(f"{path} is {sizes[0]}, {first} {sizes[1]}: all must be of one size")
            yield np.stack(images), len(paths)


def read_image(path: Path) -> np.ndarray:
    """An image as uint8 [H, W, 3]. Raises UserError for what is none, or has more than 8 bits a channel, or is too large."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF" or image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"mode {image.mode}, {image.width}x{image.height}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise UserError(f"{path} cannot be read as an image: {type(error).__name__}: {str(error)[:200]}") from None


def extra_scores(text: str) -> list[str]:
    """An argparse type: names from EXTRA, with commas between them."""
    names = text.split(",")
    if set(names) - set(EXTRA):
        raise argparse.ArgumentTypeError(f"expected {' or '.join(EXTRA)} (or both, with a comma), got {text!r}")
    return names


if __name__ == "__main__":
    parser = ArgumentParser(
        description="Inception Score, FID, sFID, Precision and Recall of samples against a reference."
    )
    parser.add_argument(
        "reference",
        help=".npz of images (arr_0), of statistics (mu, sigma, mu_s, sigma_s) or of both, or a folder of images",
    )
    parser.add_argument("samples", nargs="*", help="the same; a table, if there are several")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="torch-fidelity's Inception weights (.pth; default: it fetches them), or an exported program (.pt2)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at a time")
    parser.add_argument(
        "--also",
        type=extra_scores,
        metavar="NAMES",
        help="further scores: kid, fd-dinov2 (for which torch.hub fetches and runs facebookresearch/dinov2), or both",
    )
    parser.add_argument("--json", metavar="PATH", help="write the scores there too")
    parser.add_argument("--save-stats", metavar="PATH", help="write the reference's statistics there (.npz)")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        default=os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "remix-dit"),
        help="where activations are kept, 8 KB an image and 70 MB a file; or none",
    )
    run_script(main, parser)
