"""The scores, as ADM's evaluator defines them: Frechet distance, Inception Score, precision and recall, KID."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# k: Precision and Recall use the distance from each point to its k-th nearest neighbour.
NEIGHBOURS = 3
# Bootstrap samples of the uncertainty of FID.
RESAMPLES = 20


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Compute the Frechet distance between two Gaussian distributions.

    The distance is |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), equation 6 of Heusel et al.,
    arXiv 1706.08500. FID is this distance for Inception's pooled features. sFID is this distance for its spatial
    features (Nash et al., arXiv 2103.03841). The trace of the matrix root is the sum of the square roots of the
    eigenvalues of sigma1 sigma2.

    Args:
        mu1: mean of the first distribution, [D].
        sigma1: covariance of the first distribution, [D, D], symmetric.
        mu2: mean of the second distribution, [D].
        sigma2: covariance of the second distribution, [D, D], symmetric.

    Returns:
        The distance, computed in float64 on the CPU.

    Raises:
        ValueError: if the shapes do not match.
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
    # Importing scipy takes a quarter of a second, and only a run that computes FID needs it.
    import scipy.linalg

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
        ref_mu: mean of the reference, [D].
        ref_sigma: covariance of the reference, [D, D].
        pooled_features: features of the samples, [n, D].
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


def fid_std(ref_mu, ref_sigma, pooled_features: Tensor, resamples: int = RESAMPLES) -> float:
    """Estimate the standard deviation of the FID over sets of as many samples, by the bootstrap over the samples.

    It says how much the FID would change with another seed of the samples. It does not include the reference's own
    spread, nor the bias of few samples (see `fid_bias`), which bootstrap samples have twice.

    Args:
        ref_mu: mean of the reference, [D].
        ref_sigma: covariance of the reference, [D, D].
        pooled_features: features of the samples, [n, D].
        resamples: number of bootstrap samples, each of n samples drawn with replacement, from seeds 0, 1, ...
    """
    n, fids = len(pooled_features), []
    for seed in tqdm(range(resamples), desc="bootstrap of FID", unit="resample", leave=False, delay=2):
        chosen = torch.randint(n, (n,), generator=torch.Generator().manual_seed(seed))
        statistics = GaussianStatistics()
        for rows in chosen.split(4096):
            statistics.add(pooled_features[rows])
        fids.append(frechet_distance(ref_mu, ref_sigma, *statistics.result()))
    return float(np.std(fids, ddof=1))


def inception_score(probs, split_size: int = 5000) -> float:
    """Compute the Inception Score (Salimans et al., arXiv 1606.03498, section 4).

    The score of a split is exp(E_x KL(p(y|x) || p(y))), where p(y) is the mean of p(y|x) over the split. The result is
    the mean over consecutive splits, the last of which may be shorter, as in ADM's evaluator.

    Args:
        probs: class probabilities p(y|x) of n images, [n, classes].
        split_size: images per split.

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
        ref_features: features of the reference, [n, D]. Distances are computed in float32 on their device.
        sample_features: features of the samples, [m, D], on the same device.
        k: number of the neighbour that defines the radius.
        block: distances are computed for block x block pairs at a time.

    Returns:
        Precision and recall, each from 0 to 1.

    Raises:
        ValueError: if one of the sides has k images or fewer.
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


def kernel_distance(ref_features: Tensor, sample_features: Tensor) -> tuple[float, float]:
    """Compute KID, the kernel Inception distance (Binkowski et al., arXiv 1801.01401), with torch-fidelity.

    KID is the unbiased estimate of the squared maximum mean discrepancy with the kernel (x y / D + 1)^3. The result is
    the mean over 100 random subsets of at most 1,000 images per side. It is not multiplied by 1,000, as in some papers.

    Args:
        ref_features: features of the reference, [n, D].
        sample_features: features of the samples, [m, D].

    Returns:
        The estimate, which may be negative; and the standard deviation over 100 random subsets of at most 1,000 images
        and at most half of the images per side.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    fewest = min(len(ref_features), len(sample_features))
    size, half = min(1000, fewest), min(1000, fewest // 2)

    def distance(size: int) -> dict[str, float]:
        # It would print a line of its own for each size.
        return kid_features_to_metric(ref_features, sample_features, kid_subset_size=size, verbose=False)

    whole = distance(size)
    # Subsets of all images do not differ.
    halves = whole if half == size else distance(half)
    return whole[KEY_METRIC_KID_MEAN], halves[KEY_METRIC_KID_STD]


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
            rows: features, [n, D].
            block: the products of the covariance are computed for this number of features at a time.
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
