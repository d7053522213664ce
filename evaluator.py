"""Evaluate samples against a reference: Inception Score, FID, sFID, Precision and Recall as defined by ADM's evaluator.

    python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/NAME/samples.npz

The reference and the samples are each an .npz file or a folder of images. An .npz file holds images (arr_0, uint8
[n, H, W, 3]), statistics (mu, sigma, mu_s, sigma_s, as in ADM's reference files) or both. Statistics in a file are used
instead of statistics computed from its images. The features come from ADM's Inception network, converted by
torch-fidelity, or from any exported program. The features of a file are cached under the hash of its contents.
"""

import argparse
import hashlib
import io
import json
import math
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import ArgumentParser, UserError, atomic_write, cache_folder, positive_int, run_script, write_json
from images import describe_kinds, is_image, read_image

# k: Precision and Recall use the distance from each point to its k-th nearest neighbour.
NEIGHBOURS = 3
# Published tables use this number of samples.
STANDARD_COUNT = 50_000
# The covariance matrix of more features would need more than 3 GB.
MAX_FEATURES = 20_000
# ADM's network. Any .pth file is taken to hold its weights.
INCEPTION = "inception-2015-12-05"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
EXTRA_SCORES = {"kid": "KID", "fd-dinov2": "FD-DINOv2"}


def main(args: argparse.Namespace):
    # Check the flags and every input file.
    if not args.samples and not args.save_stats:
        raise UserError("no samples to score: list sample files after the reference, or use --save-stats")
    paths = [args.reference, *args.samples]
    for path in paths:
        check_file(path)
        print_left_out(path)
    for flag, path in (("json", args.json), ("save-stats", args.save_stats)):
        if path and Path(path).is_dir():
            raise UserError(f"--{flag} {path} is a folder: name a file")
    if args.weights and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights}: no such file")

    # Set up the feature networks, and run each of them on two images of every file that is not in the cache.
    # The rounding of TF32 would change the scores.
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = content_hash(args.weights) if args.weights and args.weights.endswith(".pt2") else INCEPTION
    for path in paths:
        check_networks(args.reference, path, network)
    cache = None if str(args.cache) == "none" else Path(args.cache)
    extra = args.also or []
    name = content_hash(args.weights) if args.weights else INCEPTION
    extractors = {"": FeatureExtractor(lambda: load_network(args.weights), name, 3, cache, args.batch_size, device)}
    if "fd-dinov2" in extra and has_images(args.reference):
        extractors["_dinov2"] = FeatureExtractor(load_dinov2, "dinov2-vit-l-14", 1, cache, args.batch_size, device)
    for path in filter(has_images, paths):
        for extractor in extractors.values():
            extractor.check(path)

    # Compute the features of the reference.
    ref = image_features(args.reference, extractors)
    if args.save_stats:
        source = read_network(args.reference) if has_statistics(args.reference) else network
        with atomic_write(args.save_stats) as temporary, open(temporary, "wb") as file:
            np.savez(file, network=source, **{key: ref[key] for key in STATISTICS})

    # Score the sample files one after the other.
    results = {}
    for path in args.samples:
        sample = image_features(path, extractors)
        check_match(args.reference, ref, path, sample)
        scores = evaluate(ref, sample, extra, device)
        print_notes(args.reference, ref, path, sample, scores)
        if len(args.samples) == 1:
            print_scores(scores)
        else:
            print_row(path, scores, width=max(map(len, args.samples)), header=not results)
        results[path] = scores

    if args.json and results:
        # JSON has no nan.
        results = {
            path: {key: None if math.isnan(value) else value for key, value in scores.items()}
            for path, scores in results.items()
        }
        write_json(args.json, results[args.samples[0]] if len(args.samples) == 1 else results)


# Scores of a pair of files


def image_features(path, extractors: dict[str, "FeatureExtractor"]) -> dict[str, np.ndarray]:
    """Return the features of a file from all networks.

    Args:
        path: an .npz file or a folder of images.
        extractors: the networks, by the suffix that is appended to the names of their results.

    Returns:
        The results of `FeatureExtractor` under keys such as "mu" and, for DINOv2, "mu_dinov2". Statistics that the file
        holds replace those computed from its images.
    """
    features = {}
    if has_images(path):
        for suffix, extractor in extractors.items():
            features |= {f"{key}{suffix}": value for key, value in extractor(path).items()}
    return features | (read_statistics(path) if has_statistics(path) else {})


def check_networks(reference, path, network: str):
    """Check that the features of two files come from one network.

    Args:
        reference: a file of images or statistics.
        path: another one, or the same.
        network: name of the network that processes images.

    Raises:
        UserError: if a file holds statistics of another network.
    """
    sources = {}
    for file in (reference, path):
        if has_statistics(file):
            sources[f"the statistics in {file}"] = read_network(file)
        if has_images(file):
            sources["the network for images (--weights)"] = network
    if len(set(sources.values())) > 1:
        names = ", ".join(f"{source}: {name}" for source, name in sources.items())
        raise UserError(f"features of different networks cannot be compared ({names})")


def check_match(reference, ref: dict, path, sample: dict):
    """Raise UserError if two files have different numbers of features, or features that are not finite."""
    for name, key in (("pooled", "mu"), ("spatial", "mu_s")):
        if len(ref[key]) != len(sample[key]):
            raise UserError(f"{reference} has {len(ref[key])} {name} features, {path} has {len(sample[key])}")
    for file, features in ((reference, ref), (path, sample)):
        if not all(np.isfinite(values).all() for values in features.values()):
            raise UserError(f"the features of {file} are not finite")


def evaluate(ref: dict, sample: dict, extra: list[str], device: torch.device) -> dict[str, float]:
    """Compute all scores from the image_features of the reference and the samples.

    Inception Score is nan if the samples hold no images. Precision, Recall and the extra scores are nan if one of the
    files holds no images.
    """
    missing = float("nan")
    scores = {
        "Inception Score": float(sample.get("inception_score", missing)),
        "FID": frechet_distance(ref["mu"], ref["sigma"], sample["mu"], sample["sigma"]),
        "sFID": frechet_distance(ref["mu_s"], ref["sigma_s"], sample["mu_s"], sample["sigma_s"]),
        "Precision": missing,
        "Recall": missing,
        **{EXTRA_SCORES[name]: missing for name in extra},
    }
    if "pools" in ref and "pools" in sample:
        pooled = [torch.from_numpy(features["pools"]).to(device) for features in (ref, sample)]
        scores["Precision"], scores["Recall"] = precision_recall(*pooled)
        if "kid" in extra:
            scores["KID"] = kernel_distance(*pooled)
    if "mu_dinov2" in ref and "mu_dinov2" in sample:
        statistics = [features[key] for features in (ref, sample) for key in ("mu_dinov2", "sigma_dinov2")]
        scores["FD-DINOv2"] = frechet_distance(*statistics)
    return scores


def print_notes(reference, ref: dict, path, sample: dict, scores: dict[str, float]):
    """Print which scores are missing, and how much FID changes if the number of samples is not STANDARD_COUNT."""
    without_images = [str(file) for file in (reference, path) if not has_images(file)]
    if without_images:
        missing = ", ".join(key for key, value in scores.items() if math.isnan(value))
        files = " and ".join(without_images)
        print(f"note: {missing} need images, and there are none in {files}", file=sys.stderr)
    if not has_images(path) or has_statistics(path) or len(sample["pools"]) == STANDARD_COUNT:
        return
    count, width = sample["pools"].shape
    bias = fid_bias(ref["mu"], ref["sigma"], torch.from_numpy(sample["pools"]), scores["FID"])
    # FID is linear in 1 / count only if each half of the samples has more images than features.
    about = "about" if count > 2 * width else "very roughly"
    print(
        f"warning: {path} has {count:,} images instead of the usual {STANDARD_COUNT:,}, which changes its FID by "
        f"{about} {bias * (1 - count / STANDARD_COUNT):+.3g} ({bias:+.3g} relative to infinitely many images; "
        "arXiv 1911.07023)",
        file=sys.stderr,
    )


def print_scores(scores: dict[str, float]):
    """Print one score per line, and all of them as a row of a LaTeX table unless a score is missing."""
    for key, value in scores.items():
        print(f"{key}: {value}")
    # Scores are nan if a file holds no images.
    if not any(map(math.isnan, scores.values())):
        print(" & ".join(format_score(key, value) for key, value in scores.items()) + r" \\")


def print_row(path: str, scores: dict[str, float], width: int, header: bool):
    """Print the scores of one of several files as a row of a table, below the table's header if `header`."""
    if header:
        print(" " * width, *(f"{key:>8}" for key in scores), sep="  ")
    cells = (format_score(key, value).rjust(max(8, len(key))) for key, value in scores.items())
    print(path.ljust(width), *cells, sep="  ", flush=True)


def format_score(name: str, value: float) -> str:
    return f"{value:.{5 if name == 'KID' else 2}f}"


# Definitions of the scores


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Compute the Frechet distance between two Gaussian distributions.

    The distance is |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), equation 6 of Heusel et al.,
    arXiv 1706.08500. FID is this distance for Inception's pooled features. sFID is this distance for its spatial
    features (Nash et al., arXiv 2103.03841). The trace of the matrix root is the sum of the square roots of the
    eigenvalues of sigma1 sigma2.

    Args:
        mu1: Mean of the first distribution, [D].
        sigma1: Covariance of the first distribution, [D, D], symmetric.
        mu2: Mean of the second distribution, [D].
        sigma2: Covariance of the second distribution, [D, D], symmetric.

    Returns:
        The distance, computed in float64 on the CPU.

    Raises:
        ValueError: The shapes do not match.
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
    """Return the eigenvalues of the product of two symmetric positive semidefinite matrices a and b.

    If b = r r', they are the eigenvalues of r' a r. If b is singular, some eigenvalues that are 0 are left out.
    """
    try:
        # LAPACK takes the Cholesky factor of b as r.
        return scipy.linalg.eigh(a, b, type=2, eigvals_only=True, driver="gv")
    except scipy.linalg.LinAlgError:
        # b is singular if there are fewer images than features. The pivoted Cholesky factor has fewer columns.
        lower, order, rank, _ = scipy.linalg.lapack.dpstrf(b, lower=1)
        root, order = np.tril(lower)[:, :rank], order - 1
        return scipy.linalg.eigvalsh(root.T @ a[np.ix_(order, order)] @ root)


def fid_bias(ref_mu, ref_sigma, pooled_features: Tensor, fid: float) -> float:
    """Estimate how much the FID of n samples exceeds the FID of infinitely many samples, to first order in 1 / n.

    FID_n = FID_inf + c / n (Chong & Forsyth, arXiv 1911.07023). Each half of the samples has FID_inf + 2 c / n, so the
    halves exceed the whole by c / n.

    Args:
        ref_mu: Mean of the reference, [D].
        ref_sigma: Covariance of the reference, [D, D].
        pooled_features: Features of the samples, [n, D].
        fid: FID of all n samples.

    Returns:
        The estimate of c / n.
    """
    half_fids = []
    for half in torch.randperm(len(pooled_features), generator=torch.Generator().manual_seed(0)).chunk(2):
        statistics = GaussianStatistics()
        for rows in half.split(4096):
            statistics.add(pooled_features[rows])
        half_fids.append(frechet_distance(ref_mu, ref_sigma, *statistics.result()))
    return float(np.mean(half_fids)) - fid


def inception_score(probs, split_size: int = 5000) -> float:
    """Compute the Inception Score (Salimans et al., arXiv 1606.03498, section 4).

    The score of a split is exp(E_x KL(p(y|x) || p(y))), where p(y) is the mean of p(y|x) over the split. The result is
    the mean over consecutive splits, the last of which may be shorter, as in ADM's evaluator.

    Args:
        probs: Class probabilities p(y|x) of n images, [n, classes].
        split_size: Images per split.

    Returns:
        The score, computed in float64.
    """
    scores = []
    for part in torch.as_tensor(probs).double().split(split_size):
        divergence = torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())


def precision_recall(ref_features, sample_features, k: int = NEIGHBOURS, block: int = 1024) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2).

    A point's radius is its distance to its k-th nearest neighbour in its own set. Precision is the fraction of samples
    that lie within the radius of some reference point. Recall is the fraction of reference points that lie within the
    radius of some sample.

    Args:
        ref_features: Features of the reference, [n, D]. Distances are computed in float32 on their device.
        sample_features: Features of the samples, [m, D], on the same device.
        k: Number of the neighbour that defines the radius.
        block: Distances are computed for block x block pairs at a time.

    Returns:
        Precision and recall, each from 0 to 1.

    Raises:
        ValueError: One of the sides has k images or fewer.
    """
    ref = torch.as_tensor(ref_features).float()
    sample = torch.as_tensor(sample_features).float()
    if min(len(ref), len(sample)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    # Dot products of centred vectors are smaller and have smaller rounding errors.
    centre = ref.mean(0)
    ref, sample = ref - centre, sample - centre
    n, m = -(-len(ref) // block), -(-len(sample) // block)
    pairs = n * (n + 1) // 2 + m * (m + 1) // 2 + n * m
    with tqdm(total=pairs, desc="precision and recall", unit="block", leave=False, delay=2) as bar:
        ref_radii = _squared_radii(ref, k, block, bar)
        sample_radii = _squared_radii(sample, k, block, bar)
        ref_covered = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
        sample_covered = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
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
    """Return the squared distances between the rows of a [n, D] and b [m, D], [n, m]."""
    squares_a = torch.linalg.vecdot(a, a)[:, None]
    squares_b = torch.linalg.vecdot(b, b)
    return torch.addmm(squares_b, a, b.T, alpha=-2).add_(squares_a).clamp_(min=0)


def _squared_radii(points: Tensor, k: int, block: int, bar: tqdm) -> Tensor:
    """Return the squared distance from each point to its k-th nearest neighbour, [n]."""
    # The nearest of the k + 1 is the point itself.
    nearest = points.new_full((len(points), k + 1), torch.inf)
    blocks = _slices(points, block)
    for number, i in enumerate(blocks):
        for j in blocks[number:]:
            distances = _squared_distances(points[i], points[j])
            for rows, values in ((i, distances),) if i == j else ((i, distances), (j, distances.T)):
                nearest[rows] = torch.cat([nearest[rows], values], dim=1).topk(k + 1, largest=False).values
            bar.update()
    return nearest[:, -1]


def kernel_distance(ref_features: Tensor, sample_features: Tensor) -> float:
    """Compute KID, the kernel Inception distance (Binkowski et al., arXiv 1801.01401), with torch-fidelity.

    KID is the unbiased estimate of the squared maximum mean discrepancy with the kernel (x y / D + 1)^3. The result is
    the mean over 100 random subsets of at most 1,000 images per side.

    Args:
        ref_features: Features of the reference, [n, D].
        sample_features: Features of the samples, [m, D].

    Returns:
        The estimate, which may be negative.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(1000, len(ref_features), len(sample_features))
    return kid_features_to_metric(ref_features, sample_features, kid_subset_size=size)[KEY_METRIC_KID_MEAN]


class GaussianStatistics:
    """Mean and covariance of rows that are added in batches, accumulated in float64.

    The first batch's mean is subtracted from all rows, because sums of squares lose precision far from zero.
    """

    def __init__(self):
        self.count = 0
        self.shift = None

    def add(self, rows: Tensor, block: int = 256):
        """Add a batch.

        Args:
            rows: Features, [n, D].
            block: The products of the covariance are computed for this number of features at a time.
        """
        rows = torch.as_tensor(rows).double()
        if self.shift is None:
            self.shift = rows.mean(0)
            self.sum = torch.zeros_like(self.shift)
            self.outer = rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(0)
        # The matrix is symmetric: the blocks below the diagonal are not computed.
        for i in range(0, rows.shape[1], block):
            self.outer[i : i + block, i:].addmm_(rows[:, i : i + block].T, rows[:, i:])

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean [D] and the unbiased covariance [D, D] of all rows, float64."""
        mean = self.sum / self.count
        outer = self.outer.triu() + self.outer.triu(1).T
        sigma = (outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (mean + self.shift).cpu().numpy(), sigma.cpu().numpy()


# Networks


class AdmInception(nn.Module):
    """The Inception network (TensorFlow, 2015) of ADM's evaluator, converted by torch-fidelity.

    Args:
        weights: Path of torch-fidelity's weights (.pth). None downloads them.
    """

    def __init__(self, weights: str | None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.inception = FeatureExtractorInceptionV3(
            "adm", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
        self.inception.Mixed_6d.branch1x1.register_forward_hook(self._store_spatial)

    def _store_spatial(self, module, inputs, output: Tensor):
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 [B, 3, H, W].

        Returns:
            Pooled features [B, 2048]; spatial features [B, 2023], the first 7 channels of Mixed_6d's 1x1 branch in NHWC
            order; logits [B, 1008] without bias.
        """
        pool, logits = self.inception(images)
        return pool, self.spatial, logits


class DinoV2(nn.Module):
    """The DINOv2 ViT-L/14 network of FD-DINOv2, loaded by torch-fidelity."""

    def __init__(self):
        super().__init__()
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

        self.dinov2 = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute the features of images.

        The images are resized to 224 x 224 in 8 bits, bicubic with antialiasing, as in Stein et al., arXiv 2306.04675.

        Args:
            images: uint8 [B, 3, H, W].

        Returns:
            A tuple of one tensor, the features [B, 1024].
        """
        from torchvision.transforms.functional import InterpolationMode, resize

        return self.dinov2(resize(images, [224, 224], InterpolationMode.BICUBIC, antialias=True))


def load_dinov2() -> DinoV2:
    """Load DINOv2, or raise UserError if torch.hub cannot."""
    try:
        return DinoV2()
    # Without network access, torch.hub raises errors of several types.
    except Exception as error:
        raise UserError(
            f"--also fd-dinov2: torch.hub cannot load facebookresearch/dinov2 "
            f"({type(error).__name__}: {str(error)[:200]}); "
            f"without network access, copy {torch.hub.get_dir()} from a machine that has loaded it"
        ) from None


def load_network(weights: str | None) -> nn.Module:
    """Load the network that computes the features.

    Args:
        weights: Path of torch-fidelity's Inception weights (.pth) or of an exported program (.pt2). None downloads the
            Inception weights.

    Returns:
        A network that maps uint8 images [B, 3, H, W] to pooled features [B, D], spatial features [B, S] and logits
        [B, classes].

    Raises:
        UserError: The file cannot be loaded or could run code, or the download failed.
    """
    try:
        if weights and weights.endswith(".pt2"):
            check_program(weights)
            # torch.export.load warns about read-only buffers, which it copies.
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                return torch.export.load(weights).module()
        if weights:
            # torch-fidelity would run code that is stored in a pickle.
            torch.load(weights, map_location="cpu", weights_only=True)
        return AdmInception(weights)
    # A damaged file or a failed download raises errors of many types.
    except Exception as error:
        problem = (
            f"--weights {weights} cannot be loaded"
            if weights
            else "torch-fidelity could not download Inception's weights (give --weights PATH)"
        )
        raise UserError(f"{problem}: {type(error).__name__}: {str(error)[:200]}") from None


def check_program(path: str):
    """Raise ValueError if torch.export.load would run code from this .pt2 file: pickles or compiled libraries."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "aotinductor" in name:
                raise ValueError("it holds compiled code")
            if name.endswith(".pt"):
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            # These files record how each tensor is stored.
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(name)).get("config", {})
                if any(entry.get("use_pickle") for entry in entries.values()):
                    raise ValueError("it holds pickles")


class FeatureExtractor:
    """Runs one network over files of images and caches the results by the hash of the file and the network's name.

    The network is loaded only when the features of a file are not in the cache.

    Args:
        load: Function that returns the network.
        name: Name of the network in the cache, different for every network.
        outputs: Number of the network's outputs: 3 (pooled features, spatial features, logits) or 1 (pooled features).
        cache: Folder of the cache. None disables it.
        batch_size: Images per batch.
        device: Device of the network.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        name: str,
        outputs: int,
        cache: Path | None,
        batch_size: int,
        device: torch.device,
    ):
        self.load = load
        self.name = name
        self.outputs = outputs
        self.cache = cache
        self.batch_size = batch_size
        self.device = device
        self.entries: dict[str, Path] = {}

    @cached_property
    def network(self) -> nn.Module:
        return self.load().to(self.device)

    def check(self, path):
        """Raise UserError if the file is not in the cache and the network cannot process its images."""
        if self.cache and path not in self.entries:
            self.entries[path] = self.cache / f"{content_hash(path)}-{self.name}-v1.npz"
        if self.cache and self.entries[path].exists():
            return
        network = self.network
        try:
            outputs = self.run(network, next(read_images(path, 2))[0])
            shapes = [tuple(output.shape) for output in outputs]
        # An exported program raises errors of its own.
        except Exception as error:
            raise UserError(f"the network cannot process the images of {path}: {str(error)[:200]}") from None
        if len(outputs) != self.outputs or any(len(shape) != 2 or shape[0] != 2 for shape in shapes):
            raise UserError(
                f"the network returns shapes {shapes} for 2 images, expected {self.outputs} outputs [2, features]"
            )

    def __call__(self, path) -> dict[str, np.ndarray]:
        """Return the features of a checked file, from the cache or computed.

        Returns:
            mu and sigma of the pooled features. A network of three outputs also gives mu_s and sigma_s of the spatial
            features, pools (the pooled features of all images, float32 [n, D]) and inception_score.
        """
        if self.cache is None:
            return self.compute(path)
        entry = self.entries[path]
        try:
            with np.load(entry, allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            pass
        # A damaged archive raises errors of many types.
        except Exception as error:
            print(f"warning: {entry} is damaged and is computed again ({type(error).__name__})", file=sys.stderr)
        features = self.compute(path)
        try:
            with atomic_write(entry) as temporary, open(temporary, "wb") as file:
                np.savez(file, **features)
        # The disk is full, or the folder cannot be written.
        except OSError as error:
            print(f"warning: the features of {path} could not be cached: {error}", file=sys.stderr)
        return features

    def compute(self, path) -> dict[str, np.ndarray]:
        """Run the network over all images of a file."""
        pooled_statistics, spatial_statistics = GaussianStatistics(), GaussianStatistics()
        pooled_features, probs = [], []
        with tqdm(unit="img", desc=Path(path).name, smoothing=0) as bar:
            for batch, total in read_images(path, self.batch_size):
                bar.total = total
                pooled, *rest = self.run(self.network, batch)
                pooled_statistics.add(pooled)
                if rest:
                    spatial, logits = rest
                    spatial_statistics.add(spatial)
                    pooled_features.append(pooled.float())
                    probs.append(logits.float().softmax(1))
                bar.update(len(batch))
        features = dict(zip(("mu", "sigma"), pooled_statistics.result(), strict=True))
        if pooled_features:
            features |= dict(zip(("mu_s", "sigma_s"), spatial_statistics.result(), strict=True))
            features["pools"] = torch.cat(pooled_features).cpu().numpy()
            features["inception_score"] = np.array(inception_score(torch.cat(probs)))
        return features

    @torch.no_grad()
    def run(self, network: nn.Module, batch: np.ndarray) -> tuple[Tensor, ...]:
        """Run the network on uint8 images [B, H, W, 3]."""
        return network(torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).contiguous().to(self.device))


# Files


def check_file(path):
    """Raise UserError if a path is not a folder of images or a complete .npz file of images or statistics."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
    if not Path(path).is_dir() and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a complete .npz file")
    try:
        if has_images(path):
            next(read_images(path, 1))
        if has_statistics(path):
            read_statistics(path)
            read_network(path)
    except UserError:
        raise
    # A damaged archive raises errors of many types.
    except Exception as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not has_images(path) and not has_statistics(path):
        raise UserError(f"{path} holds neither images (arr_0) nor statistics ({', '.join(STATISTICS)})")


def array_names(path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def has_images(path) -> bool:
    return Path(path).is_dir() or "arr_0" in array_names(path)


def has_statistics(path) -> bool:
    return not Path(path).is_dir() and array_names(path) >= set(STATISTICS)


def content_hash(path) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of the sizes and contents of a file, or of all images of a folder."""
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
    """Read mu [D], sigma [D, D] (pooled features), mu_s [S] and sigma_s [S, S] (spatial features) from an .npz file."""
    with zipfile.ZipFile(path) as archive:
        for name in STATISTICS:
            with archive.open(f"{name}.npy") as file:
                shape, _, dtype = read_header(path, file, archive.getinfo(f"{name}.npy").file_size)
                fits = shape == ((shape or (0,))[0],) * (2 if name.startswith("sigma") else 1)
                if not fits or not 0 < shape[0] <= MAX_FEATURES or dtype.kind != "f":
                    raise UserError(f"{path}: {name} ({dtype} {shape}) is not a mean or covariance of features")
    with np.load(path, allow_pickle=False) as file:
        statistics = {name: file[name] for name in STATISTICS}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if len(statistics[mu]) != len(statistics[sigma]):
            raise UserError(f"{path}: {mu} {statistics[mu].shape} and {sigma} {statistics[sigma].shape} do not match")
    return statistics


def read_network(path) -> str:
    """Return the name of the network of a file's statistics; ADM's own files, which have no name, are Inception's."""
    with np.load(path, allow_pickle=False) as file:
        return str(file["network"])[:64] if "network" in file else INCEPTION


def read_header(path, file, length: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return the shape, the Fortran order flag and the type of the array in an open .npy file of `length` bytes.

    Raise UserError if they do not match `length`, before any memory is allocated for the array.
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


def read_images(path, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield batches of images, uint8 [b, H, W, 3], with the total number of images, from an .npz file or a folder."""
    if Path(path).is_dir():
        yield from read_folder(path, batch_size)
        return
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, fortran, dtype = read_header(path, file, archive.getinfo("arr_0.npy").file_size)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or shape[0] <= NEIGHBOURS:
            raise UserError(
                f"{path}: arr_0 is {dtype} {shape}, expected at least {NEIGHBOURS + 1} uint8 images [n, H, W, 3] "
                "in C order"
            )
        for first in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - first)
            try:
                data = file.read(count * math.prod(shape[1:]))
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is damaged: {error}") from None
            if len(data) != count * math.prod(shape[1:]):
                raise UserError(f"{path} is truncated")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:]), shape[0]


def list_images(folder) -> list[Path]:
    """Return the image files at any depth below a folder, sorted."""
    return sorted(path for path in Path(folder).rglob("*") if is_image(path) and path.is_file())


def print_left_out(folder):
    """Print how many files below a folder are not read because they are of other kinds."""
    others = [path for path in Path(folder).rglob("*") if not is_image(path) and path.is_file()]
    if others:
        print(f"note: files of other kinds in {folder} are left out: {describe_kinds(others)}", file=sys.stderr)


def read_folder(folder, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Read the images of a folder in batches, as read_images."""
    paths = list_images(folder)
    if len(paths) <= NEIGHBOURS:
        raise UserError(f"{folder} holds {len(paths)} images, expected at least {NEIGHBOURS + 1}")
    first, shape = paths[0], None
    with ThreadPoolExecutor() as threads:
        for i in range(0, len(paths), batch_size):
            images = list(threads.map(read_pixels, paths[i : i + batch_size]))
            shape = shape or images[0].shape
            for path, image in zip(paths[i : i + batch_size], images, strict=True):
                if image.shape != shape:
                    size, first_size = (f"{s[1]}x{s[0]}" for s in (image.shape, shape))
                    raise UserError(f"{path} is {size}, {first} is {first_size}: all images must have one size")
            yield np.stack(images), len(paths)


def read_pixels(path: Path) -> np.ndarray:
    """Read an image as uint8 [H, W, 3]."""
    try:
        return np.asarray(read_image(path))
    # A decoder may raise any error on a damaged file.
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image: {type(error).__name__}: {str(error)[:200]}") from None


def extra_scores(text: str) -> list[str]:
    """Parse names from EXTRA_SCORES, separated by commas (an argparse type)."""
    names = text.split(",")
    if set(names) - set(EXTRA_SCORES):
        raise argparse.ArgumentTypeError(f"expected {' or '.join(EXTRA_SCORES)} (or both, with a comma), got {text!r}")
    return names


if __name__ == "__main__":
    parser = ArgumentParser(
        description="Compute Inception Score, FID, sFID, Precision and Recall of samples against a reference."
    )
    parser.add_argument(
        "reference",
        help=".npz of images (arr_0), of statistics (mu, sigma, mu_s, sigma_s) or of both, or a folder of images",
    )
    parser.add_argument("samples", nargs="*", help="same formats; several are printed as a table")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="torch-fidelity's Inception weights (.pth) or an exported program (.pt2); default: download the weights",
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per batch")
    parser.add_argument(
        "--also",
        type=extra_scores,
        metavar="NAMES",
        help="further scores: kid, fd-dinov2 (torch.hub downloads and runs facebookresearch/dinov2), or kid,fd-dinov2",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the scores to this file")
    parser.add_argument("--save-stats", metavar="PATH", help="write the reference's statistics to this file (.npz)")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        default=cache_folder(),
        help="cache of features (8 KB per image and 70 MB per file), or none",
    )
    run_script(main, parser)
