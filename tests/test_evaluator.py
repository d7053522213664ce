import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, run
from PIL import Image

from evaluator import (
    AdmInception,
    GaussianStatistics,
    fid_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of activations for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remix-dit"


def test_the_scores_need_no_network_library():
    script = "import sys, evaluator; sys.exit('torch_fidelity' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def g():
    return np.load(GOLDEN / "evaluator.npz")


def statistics(rows: np.ndarray, batch: int = 64):
    gathered = GaussianStatistics()
    for part in torch.from_numpy(rows).split(batch):
        gathered.add(part)
    return gathered.result()


def test_streamed_statistics(g):
    rows = g["ref_pool"].astype(np.float64) + 1000  # far from zero, where sums of squares lose digits
    mu, sigma = statistics(rows)
    np.testing.assert_allclose(mu, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("score", "kind", "rows"),
    [("fid", "pool", (700, 900)), ("sfid", "spatial", (700, 900)), ("fid_rank_deficient", "pool", (50, 40))],
)
def test_frechet_distance(g, score, kind, rows):
    ref, sample = g[f"ref_{kind}"][: rows[0]], g[f"sample_{kind}"][: rows[1]]
    assert frechet_distance(*statistics(ref), *statistics(sample)) == pytest.approx(float(g[score]), rel=1e-4)


def test_frechet_distance_by_scipy():
    import scipy.linalg

    generator = np.random.default_rng(0)
    a, b = (
        generator.normal(size=(700, 300)) @ generator.normal(size=(300, 300)),
        generator.normal(size=(900, 300)) + 0.3,
    )
    (mu1, s1), (mu2, s2) = statistics(a), statistics(b)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mu1, s1, mu1, s1) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="do not match"):
        frechet_distance(mu1, s1, mu2[:5], s2[:5, :5])


@pytest.mark.parametrize(("n", "m"), [(40, 400), (400, 40), (40, 50)])
@pytest.mark.parametrize("decay", [0, 3])
def test_frechet_distance_of_singular_covariances(n, m, decay):
    """From fewer images than features; the trace of the root is the sum of singular values of the rows' own product."""
    generator = np.random.default_rng(0)
    scale = np.arange(1, 101.0) ** -decay
    a, b = generator.normal(size=(n, 100)) * scale, generator.normal(size=(m, 100)) * scale * 1.1
    centred = [(rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (a, b)]
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((rows**2).sum() for rows in centred)
    expected -= 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    assert frechet_distance(*statistics(a), *statistics(b)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "tails"), [(1200, "light"), (1200, "heavy"), (600, "light")])
def test_fid_bias_of_known_gaussians(n, tails):
    """The FID of n draws less that of the distribution they are drawn from, over 10 draws."""
    generator = np.random.default_rng(0)
    d = 200
    ref = np.zeros(d), np.diag(np.linspace(1, 0.01, d))
    mu, deviation = np.full(d, 0.05), np.sqrt(np.linspace(0.8, 0.02, d))
    limit = frechet_distance(*ref, mu, np.diag(deviation**2))
    found, estimated = [], []
    for _ in range(10):
        rows = generator.normal(size=(n, d))
        if tails == "heavy":
            rows *= np.sqrt(generator.gamma(1.5, 1 / 1.5, size=(n, 1)))  # the covariance stays as it is
        rows = mu + rows * deviation
        fid = frechet_distance(*ref, *statistics(rows))
        found.append(fid - limit)
        estimated.append(fid_bias(*ref, torch.from_numpy(rows), fid))
    assert np.mean(estimated) == pytest.approx(np.mean(found), rel=0.1 if n > 1000 else 0.25)
    assert np.std(estimated) < 0.1 * np.mean(found)


@pytest.mark.parametrize(("score", "split"), [("isc", 5000), ("isc_split200", 200)])
def test_inception_score(g, score, split):
    probs = torch.softmax(torch.from_numpy(g["sample_pool"] @ g["logit_weight"]), dim=1)
    assert inception_score(probs, split) == pytest.approx(float(g[score]), rel=1e-4)


def test_inception_score_by_the_definition():
    probs = np.random.default_rng(0).dirichlet(np.full(1008, 0.05), size=12) + 1e-30
    scores = []
    for part in (probs[:5], probs[5:10], probs[10:]):  # consecutive, the last one shorter
        mean = part.mean(0)
        scores.append(np.exp(np.mean([sum(p * (np.log(p) - np.log(mean))) for p in part])))
    assert inception_score(probs, 5) == pytest.approx(np.mean(scores), rel=1e-6)


def test_inception_score_with_zero_probabilities():
    assert inception_score(np.eye(4).repeat(5, axis=0)) == pytest.approx(4)


def test_precision_recall(g):
    precision, recall = precision_recall(g["ref_pool"], g["sample_pool"])
    assert precision == pytest.approx(float(g["precision"]), abs=0.01)
    assert recall == pytest.approx(float(g["recall"]), abs=0.01)


@pytest.mark.parametrize("block", [7, 32, 1024])
def test_precision_recall_by_the_definition(block):
    generator = np.random.default_rng(1)
    ref, sample = generator.normal(size=(60, 3)) + 50, generator.normal(size=(50, 3)) * 1.7 + 50

    def share(points, centres):
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(1).mean()

    found = precision_recall(ref, sample, block=block)
    assert found == pytest.approx((share(sample, ref), share(ref, sample)))
    assert 0.2 < found[0] < found[1] < 1
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(ref[:3], sample)


def test_precision_recall_of_many_features():
    """3,000 x 256 in float32 decide as float64 does, but for one point in 10,000."""
    generator = np.random.default_rng(2)
    common = generator.normal(size=(32, 256))
    ref, sample = (np.maximum(generator.normal(size=(3000, 32)) @ common / 6 + 0.5, 0).astype("f") for _ in range(2))
    sample = sample * 0.8 + 0.2 * np.roll(sample, 1, axis=0)

    def squared(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T

    def share(points, centres):
        return (squared(points, centres) <= np.sort(squared(centres, centres), axis=1)[:, 3]).any(1).mean()

    found = precision_recall(ref, sample)
    assert found == pytest.approx((share(sample, ref), share(ref, sample)), abs=1e-4)
    assert min(found) < 0.98


def test_kernel_distance_by_the_definition():
    """Subsets as large as the set are the set: the unbiased estimate of MMD^2 with the kernel (x y / D + 1)^3."""
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 6)) + 0.5

    def kernel(a, b):
        return [[(np.dot(u, v) / 6 + 1) ** 3 for v in b] for u in a]

    same = [np.sum(kernel(a, a)) - np.trace(kernel(a, a)) for a in (x, y)]
    expected = sum(same) / (40 * 39) - 2 * np.mean(kernel(x, y))
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-6)


class Toy(torch.nn.Module):
    """Any program from images to pooled features, spatial features and logits will do."""

    def forward(self, images):
        x = images.float() / 255
        pool = torch.nn.functional.avg_pool2d(x, 4).flatten(1)
        return pool, x[:, 0, ::2, ::2].flatten(1), pool[:, :5] * 9


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluator")
    generator = np.random.default_rng(0)
    for name, n in (("ref", 80), ("sample", 90)):
        np.savez(folder / f"{name}.npz", arr_0=generator.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(
        torch.export.export(Toy(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),), dynamic_shapes=shapes),
        folder / "toy.pt2",
    )
    return folder


def test_command(files):
    out = run(
        "evaluator.py", files / "ref.npz", files / "sample.npz", "--weights", files / "toy.pt2", "--batch-size", 32
    ).stdout.splitlines()
    assert [line.split(":")[0] for line in out[:5]] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    values = [float(line.split(":")[1]) for line in out[:5]]
    assert out[5] == " & ".join(f"{v:.2f}" for v in values) + r" \\"
    pools = {}
    for name in ("ref", "sample"):
        with torch.no_grad():
            pools[name] = Toy()(torch.from_numpy(np.load(files / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2))
    moments = [
        (p.double().mean(0), torch.cov(p.double().T)) for i in (0, 1) for p in (pools["ref"][i], pools["sample"][i])
    ]
    assert values[1] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-5)
    assert values[2] == pytest.approx(frechet_distance(*moments[2], *moments[3]), rel=1e-5)
    assert values[3:] == pytest.approx(precision_recall(pools["ref"][0], pools["sample"][0]))


def test_reference_statistics_are_used_as_they_are(files):
    d, s = 12, 16
    np.savez(files / "stats.npz", mu=np.full(d, 7.0), sigma=np.eye(d), mu_s=np.zeros(s), sigma_s=np.eye(s))
    out = run("evaluator.py", files / "stats.npz", files / "sample.npz", "--weights", files / "toy.pt2").stdout
    scores = dict(line.split(": ") for line in out.splitlines()[:5])
    assert float(scores["FID"]) > 40 * d, "the means are more than 6 apart in each of the dimensions"
    assert scores["Precision"] == scores["Recall"] == "nan"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a zip"), "not a whole .npz"),
        (lambda path: np.savez(path, arr_0=np.zeros((4, 8, 8))), "uint8 images"),
        (lambda path: np.savez(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8)), "at least 4"),
        (lambda path: np.savez(path, arr_0=np.zeros((9, 12, 12, 3), np.uint8)), "does not take the images"),
        (lambda path: np.savez(path, other=np.zeros(3)), "neither images"),
    ],
)
def test_wrong_files(files, tmp_path, make, message):
    make(tmp_path / "wrong.npz")
    done = run("evaluator.py", files / "ref.npz", tmp_path / "wrong.npz", "--weights", files / "toy.pt2", expect=2)
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_inception_through_torch_fidelity(files, tmp_path, monkeypatch):
    """Random weights in torch-fidelity's own format stand in for the file that it downloads."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    torch.manual_seed(0)
    network = AdmInception(None)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pool, spatial, logits = network(images)
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 7 * 17 * 17), (2, 1008))
    branch = {}
    network.inception.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: branch.update(out=o))
    network(images)
    assert spatial[1, 7 * (17 * 4 + 5) + 3] == branch["out"][1, 3, 4, 5], "NHWC: the channel varies fastest"
    monkeypatch.undo()
    torch.save(network.inception.state_dict(), tmp_path / "inception.pth")
    with np.load(files / "ref.npz") as file:
        np.savez(tmp_path / "few.npz", arr_0=file["arr_0"][:8])
    out = run(
        "evaluator.py", tmp_path / "few.npz", tmp_path / "few.npz", "--weights", tmp_path / "inception.pth"
    ).stdout
    scores = dict(line.split(": ") for line in out.splitlines()[:5])
    assert abs(float(scores["FID"])) < 1e-2
    assert float(scores["Precision"]) == float(scores["Recall"]) == 1
