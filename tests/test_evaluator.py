import numpy as np
import pytest
import torch
from conftest import GOLDEN, run

from evaluator import AdmInception, GaussianStatistics, frechet_distance, inception_score, precision_recall


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
    a, b = generator.normal(size=(200, 30)) @ generator.normal(size=(30, 30)), generator.normal(size=(300, 30)) + 0.3
    (mu1, s1), (mu2, s2) = statistics(a), statistics(b)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mu1, s1, mu1, s1) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="do not match"):
        frechet_distance(mu1, s1, mu2[:5], s2[:5, :5])


@pytest.mark.parametrize(("score", "split"), [("isc", 5000), ("isc_split200", 200)])
def test_inception_score(g, score, split):
    probs = torch.softmax(torch.from_numpy(g["sample_pool"] @ g["logit_weight"]), dim=1)
    assert inception_score(probs, split) == pytest.approx(float(g[score]), rel=1e-4)


def test_inception_score_with_zero_probabilities():
    assert inception_score(np.eye(4).repeat(5, axis=0)) == pytest.approx(4)


def test_precision_recall(g):
    precision, recall = precision_recall(g["ref_pool"], g["sample_pool"])
    assert precision == pytest.approx(float(g["precision"]), abs=0.01)
    assert recall == pytest.approx(float(g["recall"]), abs=0.01)


def test_precision_recall_by_the_definition():
    generator = np.random.default_rng(1)
    ref, sample = generator.normal(size=(60, 3)), generator.normal(size=(50, 3)) * 1.7

    def share(points, centres):
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(1).mean()

    assert precision_recall(ref, sample) == pytest.approx((share(sample, ref), share(ref, sample)))
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(ref[:3], sample)


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
