"""Scores against ADM's evaluator and the definitions, the evaluator's command, its cache and its input errors."""

import io
import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import DEVICES, GOLDEN, ROOT, ToyNetwork, export_network, file_limit, relative, run, start
from PIL import Image

from evaluation.classifier import read_labelled
from evaluation.files import content_hash
from evaluation.networks import AdmInception, load_network
from evaluation.scores import GaussianStatistics, fid_bias, fid_std, kernel_distance
from evaluator import describe_notes, frechet_distance, inception_score, precision_recall


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A separate feature cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remix-dit"


@pytest.fixture(scope="module")
def adm():
    """Features and the scores that ADM's evaluator gives them."""
    return np.load(GOLDEN / "evaluator.npz")


def statistics(rows: np.ndarray, batch: int = 64):
    accumulated = GaussianStatistics()
    for part in torch.from_numpy(rows).split(batch):
        accumulated.add(part)
    return accumulated.result()


def test_statistics_of_batches_match_numpy(adm):
    # Far from zero, sums of squares lose precision.
    rows = adm["ref_pool"].astype(np.float64) + 1000
    mu, sigma = statistics(rows)
    np.testing.assert_allclose(mu, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("score", "kind", "rows"),
    [("fid", "pool", (700, 900)), ("sfid", "spatial", (700, 900)), ("fid_rank_deficient", "pool", (50, 40))],
)
def test_frechet_distance_matches_adm(adm, score, kind, rows):
    ref, sample = adm[f"ref_{kind}"][: rows[0]], adm[f"sample_{kind}"][: rows[1]]
    assert frechet_distance(*statistics(ref), *statistics(sample)) == pytest.approx(float(adm[score]), rel=1e-4)


def test_frechet_distance_matches_scipy():
    import scipy.linalg

    generator = np.random.default_rng(0)
    a = generator.normal(size=(700, 300)) @ generator.normal(size=(300, 300))
    b = generator.normal(size=(900, 300)) + 0.3
    (mu1, s1), (mu2, s2) = statistics(a), statistics(b)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mu1, s1, mu1, s1) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="do not match"):
        frechet_distance(mu1, s1, mu2[:5], s2[:5, :5])


@pytest.mark.parametrize(("n", "m", "decay"), [(40, 400, 3), (400, 40, 0), (40, 50, 0), (40, 50, 3)])
def test_frechet_distance_of_singular_covariances(n, m, decay):
    """With fewer images than features, the trace of the root is the sum of the singular values of the rows' product."""
    generator = np.random.default_rng(0)
    scale = np.arange(1, 101.0) ** -decay
    a, b = generator.normal(size=(n, 100)) * scale, generator.normal(size=(m, 100)) * scale * 1.1
    centred = [(rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (a, b)]
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((rows**2).sum() for rows in centred)
    expected -= 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    assert frechet_distance(*statistics(a), *statistics(b)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "tails"), [(1200, "light"), (1200, "heavy"), (600, "light")])
def test_fid_bias_of_known_distributions(n, tails):
    """The estimate matches the FID of n samples minus the FID of their distribution, on average over 10 draws."""
    generator = np.random.default_rng(0)
    d = 200
    ref = np.zeros(d), np.diag(np.linspace(1, 0.01, d))
    mu, std = np.full(d, 0.05), np.sqrt(np.linspace(0.8, 0.02, d))
    limit = frechet_distance(*ref, mu, np.diag(std**2))
    actual, estimated = [], []
    for _ in range(10):
        rows = generator.normal(size=(n, d))
        if tails == "heavy":
            # The covariance does not change.
            rows *= np.sqrt(generator.gamma(1.5, 1 / 1.5, size=(n, 1)))
        rows = mu + rows * std
        fid = frechet_distance(*ref, *statistics(rows))
        actual.append(fid - limit)
        estimated.append(fid_bias(*ref, torch.from_numpy(rows), fid))
    assert np.mean(estimated) == pytest.approx(np.mean(actual), rel=0.1 if n > 1000 else 0.25)
    assert np.std(estimated) < 0.1 * np.mean(actual)


@pytest.mark.parametrize(("score", "split"), [("isc", 5000), ("isc_split200", 200)])
def test_inception_score_matches_adm(adm, score, split):
    probs = torch.softmax(torch.from_numpy(adm["sample_pool"] @ adm["logit_weight"]), dim=1)
    assert inception_score(probs, split) == pytest.approx(float(adm[score]), rel=1e-4)


def test_inception_score_matches_the_definition():
    probs = np.random.default_rng(0).dirichlet(np.full(1008, 0.05), size=12) + 1e-30
    scores = []
    # Consecutive splits, the last one shorter.
    for part in (probs[:5], probs[5:10], probs[10:]):
        mean = part.mean(0)
        scores.append(np.exp(np.mean([sum(p * (np.log(p) - np.log(mean))) for p in part])))
    assert inception_score(probs, 5) == pytest.approx(np.mean(scores), rel=1e-6)


def test_inception_score_with_zero_probabilities():
    assert inception_score(np.eye(4).repeat(5, axis=0)) == pytest.approx(4)


def test_precision_recall_matches_adm(adm):
    precision, recall = precision_recall(adm["ref_pool"], adm["sample_pool"])
    assert precision == pytest.approx(float(adm["precision"]), abs=0.01)
    assert recall == pytest.approx(float(adm["recall"]), abs=0.01)


def half_precision_recall(ref, sample, round_every_term: bool = True) -> tuple[float, float]:
    """Precision and recall with the distances in half precision, as ADM's evaluator computes them on a CPU.

    `round_every_term` says whether the sum of a squared norm is rounded after every term, or once.
    """

    def half(x):
        return x.half().float()

    def norms(x):
        if not round_every_term:
            return half(half(x.square()).sum(1))
        total = torch.zeros(len(x))
        for column in half(x.square()).T:
            total = half(total + column)
        return total

    def distances(a, b):
        a, b = half(torch.as_tensor(a)), half(torch.as_tensor(b))
        return half(half(norms(a)[:, None] - half(2 * half(a @ b.T))) + norms(b)).clamp(min=0)

    def radii(x):
        return distances(x, x).kthvalue(4, dim=1).values

    between = distances(ref, sample)
    covered = (between <= radii(ref)[:, None]).any(0), (between <= radii(sample)).any(1)
    return tuple(points.double().mean().item() for points in covered)


def test_adm_takes_distances_in_half_precision(adm):
    """This explains the whole difference between ADM's scores and ours. docs/evaluation.md gives numbers."""
    assert half_precision_recall(adm["ref_pool"], adm["sample_pool"]) == pytest.approx(
        (float(adm["precision"]), float(adm["recall"])), abs=1e-12
    )
    # As many points and features as in the documentation, with the norm of Inception's features.
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(20, 2048, generator=generator) / 20**0.5
    ref, sample = (
        torch.nn.functional.softplus(2 * std * torch.randn(1500, 20, generator=generator) @ common - 1) * 0.45
        for std in (1, 0.95)
    )
    scores = [precision_recall(ref, sample), *(half_precision_recall(ref, sample, every) for every in (False, True))]
    documented = [(0.7707, 0.6180), (0.7727, 0.6193), (0.7920, 0.6433)]
    assert np.array(scores) == pytest.approx(np.array(documented), abs=0.002)
    assert scores[0][1] < scores[1][1] < scores[2][1]


@pytest.mark.parametrize("block", [7, 1024])
def test_precision_recall_matches_the_definition(block):
    generator = np.random.default_rng(1)
    ref, sample = generator.normal(size=(60, 3)) + 50, generator.normal(size=(50, 3)) * 1.7 + 50

    def fraction(points, centres):
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(1).mean()

    scores = precision_recall(ref, sample, block=block)
    assert scores == pytest.approx((fraction(sample, ref), fraction(ref, sample)))
    assert 0.2 < scores[0] < scores[1] < 1
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(ref[:3], sample)


def test_precision_recall_in_float32_matches_float64():
    """With 3,000 x 256 features, at most one point in 10,000 is decided differently."""
    generator = np.random.default_rng(2)
    common = generator.normal(size=(32, 256))
    ref, sample = (np.maximum(generator.normal(size=(3000, 32)) @ common / 6 + 0.5, 0).astype("f") for _ in range(2))
    sample = sample * 0.8 + 0.2 * np.roll(sample, 1, axis=0)

    def squared(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T

    def fraction(points, centres):
        return (squared(points, centres) <= np.sort(squared(centres, centres), axis=1)[:, 3]).any(1).mean()

    scores = precision_recall(ref, sample)
    assert scores == pytest.approx((fraction(sample, ref), fraction(ref, sample)), abs=1e-4)
    assert min(scores) < 0.98


def test_kernel_distance_matches_the_definition():
    """With subsets as large as the set, KID is the unbiased estimate of MMD^2 with the kernel (x y / D + 1)^3."""
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 6)) + 0.5

    def kernel(a, b):
        return [[(np.dot(u, v) / 6 + 1) ** 3 for v in b] for u in a]

    within = [np.sum(kernel(a, a)) - np.trace(kernel(a, a)) for a in (x, y)]
    expected = sum(within) / (40 * 39) - 2 * np.mean(kernel(x, y))
    distance, std = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert distance == pytest.approx(expected, rel=1e-6)
    # Subsets of all images do not differ. The spread is that of halves.
    halves = [generator.permutation(40)[:20] for _ in range(400)]

    def estimate(a, b):
        within = [np.sum(kernel(part, part)) - np.trace(kernel(part, part)) for part in (a, b)]
        return sum(within) / (20 * 19) - 2 * np.mean(kernel(a, b))

    spread = np.std([estimate(x[rows], y[generator.permutation(40)[:20]]) for rows in halves[:60]])
    assert std == pytest.approx(spread, rel=0.35)


def test_the_bootstrap_gives_the_spread_of_fid_over_seeds():
    """The estimate from one set of samples is the standard deviation of the FIDs of many sets."""
    generator = np.random.default_rng(0)
    ref = np.zeros(8), np.eye(8)
    draws = [torch.from_numpy(generator.normal(size=(400, 8)) * 1.3 + 0.2) for _ in range(60)]
    fids = [frechet_distance(*ref, *statistics(rows.numpy(), batch=400)) for rows in draws]
    estimates = [fid_std(*ref, rows) for rows in draws[:12]]
    assert np.mean(estimates) == pytest.approx(np.std(fids, ddof=1), rel=0.25)
    assert fid_std(*ref, draws[0]) == estimates[0], "the same in every run"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluator")
    generator = np.random.default_rng(0)
    for name, n in (("ref", 80), ("sample", 90)):
        np.savez(folder / f"{name}.npz", arr_0=generator.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))
    export_network(ToyNetwork(), folder / "toy.pt2")
    return folder


def parse_scores(stdout: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split(": ") for line in stdout.splitlines() if ": " in line)}


def scores_of(files, *flags) -> dict[str, float]:
    """The printed scores of the evaluator with the toy network."""
    return parse_scores(run("evaluator.py", *flags, "--weights", files / "toy.pt2").stdout)


def toy_outputs(path) -> list[torch.Tensor]:
    """The toy network's outputs for the images of an .npz file."""
    with np.load(path) as file, torch.no_grad():
        return list(ToyNetwork()(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)))


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_an_exported_program_moves_to_a_device(tmp_path, device):
    """The code of a program names the device that it was exported on."""

    class Network(ToyNetwork):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.rand(()))

        def forward(self, images):
            pool, *others = super().forward(images)
            return self.scale * pool + torch.arange(pool.shape[1], device=images.device), *others

    network = load_network(str(export_network(Network(), tmp_path / "network.pt2")))
    images = torch.arange(2 * 3 * 8 * 8).remainder(256).to(torch.uint8).view(2, 3, 8, 8)
    expected = network(images)
    outputs = network.to(torch.device(device))(images.to(device))
    for output, reference in zip(outputs, expected, strict=True):
        assert (output.device.type, output.shape) == (device, reference.shape)
        if device != "meta":
            assert relative(output.cpu(), reference) < 1e-5


def test_printed_scores_match_the_functions(files):
    flags = (f"--weights={files / 'toy.pt2'}", "--batch-size=32")
    out = run("evaluator.py", files / "ref.npz", files / "sample.npz", *flags).stdout.splitlines()
    names = ["Inception Score", "FID", "FID std", "sFID", "Precision", "Recall"]
    assert [line.split(":")[0] for line in out[:6]] == names
    values = [float(line.split(":")[1]) for line in out[:6]]
    std = values.pop(2)
    cells = [f"{v:.2f}" for v in values]
    cells[1] += rf" $\pm$ {std:.2f}"
    assert out[6] == " & ".join(cells) + r" \\"
    ref, sample = toy_outputs(files / "ref.npz"), toy_outputs(files / "sample.npz")
    for value, i in ((values[1], 0), (values[2], 1)):
        moments = [(x.double().mean(0), torch.cov(x.double().T)) for x in (ref[i], sample[i])]
        assert value == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-5)
    assert values[3:] == pytest.approx(precision_recall(ref[0], sample[0]))


def test_statistics_in_the_reference_file_are_used(files, tmp_path):
    d, s = 12, 16
    network = content_hash(files / "toy.pt2")
    arrays = dict(mu=np.full(d, 7.0), sigma=np.eye(d), mu_s=np.zeros(s), sigma_s=np.eye(s))
    np.savez(tmp_path / "stats.npz", network=network, **arrays)
    done = run("evaluator.py", tmp_path / "stats.npz", files / "sample.npz", "--weights", files / "toy.pt2")
    scores = parse_scores(done.stdout)
    assert scores["FID"] > 40 * d, "the means differ by more than 6 in every dimension"
    assert np.isnan([scores["Precision"], scores["Recall"]]).all()
    assert "note: Precision, Recall need images, and there are none in" in done.stderr


def test_saved_statistics_replace_images(files, tmp_path):
    flags = ["--save-stats", tmp_path / "ref", "--weights", files / "toy.pt2"]
    assert run("evaluator.py", files / "ref.npz", *flags).stdout == "", "without samples, no scores are printed"
    pool = toy_outputs(files / "ref.npz")[0].double()
    with np.load(tmp_path / "ref") as file:
        assert set(file) == {"network", "mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_allclose(file["mu"], pool.mean(0), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], torch.cov(pool.T), rtol=1e-5, atol=1e-8)
    by_images = scores_of(files, files / "ref.npz", files / "sample.npz")
    by_statistics = scores_of(files, tmp_path / "ref", files / "sample.npz", "--json", tmp_path / "scores.json")
    for name in ("Inception Score", "FID", "sFID"):
        assert by_statistics[name] == pytest.approx(by_images[name], rel=1e-9)
    assert json.loads((tmp_path / "scores.json").read_text())["Precision"] is None
    # With statistics on both sides no network is loaded: the weights file is empty.
    (tmp_path / "none.pth").touch()
    run("evaluator.py", files / "sample.npz", "--save-stats", tmp_path / "sample", "--weights", files / "toy.pt2")
    out = run("evaluator.py", tmp_path / "ref", tmp_path / "sample", "--weights", tmp_path / "none.pth").stdout
    assert parse_scores(out)["FID"] == pytest.approx(by_images["FID"], rel=1e-9)
    assert np.isnan(parse_scores(out)["Inception Score"])
    assert "&" not in out, "no row of a LaTeX table without all scores"


@pytest.mark.slow
def test_the_documented_feature_network(files, tmp_path, monkeypatch):
    """The example of docs/evaluation.md, without the download of its weights and for smaller images."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/evaluation.md").read_text(), re.MULTILINE | re.DOTALL)
    assert '"DEFAULT"' in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"DEFAULT"', "None").replace("256, 256", "8, 8"), {})
    images = (files / "ref.npz", files / "sample.npz")
    out = run("evaluator.py", *images, "--weights", tmp_path / "resnet18.pt2", "--cache=none", "--batch-size=7").stdout
    assert all(np.isfinite(value) for value in parse_scores(out).values())


def test_a_folder_of_images_equals_an_array(files, tmp_path):
    with np.load(files / "sample.npz") as file:
        images = file["arr_0"]
    for i, image in enumerate(images):
        path = tmp_path / "images" / f"part{i // 50}" / f"{i:06d}.{'PNG' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    scores = scores_of(files, files / "ref.npz", tmp_path / "images", "--batch-size", 7)
    assert scores == pytest.approx(scores_of(files, files / "ref.npz", files / "sample.npz"), rel=1e-6)


def test_files_that_cannot_be_written(files, tmp_path):
    flags = [files / "ref.npz", files / "sample.npz", "--weights", files / "toy.pt2", "--cache=none"]
    for flag in ("--json", "--save-stats"):
        stderr = run("evaluator.py", *flags, flag, tmp_path, expect=2).stderr
        assert stderr == f"evaluator.py: error: {flag} {tmp_path} is a folder: name a file\n"
    with file_limit(1000):
        stderr = run("evaluator.py", *flags, "--save-stats", tmp_path / "stats.npz", expect=2).stderr
    assert stderr.splitlines()[-1] == f"evaluator.py: error: {tmp_path / 'stats.npz'}: File too large"


def test_several_files_are_printed_as_a_table(files, tmp_path):
    paths = [str(files / f"{name}.npz") for name in ("sample", "ref")]
    flags = ["--weights", files / "toy.pt2", "--also", "kid", "--json", tmp_path / "scores.json"]
    header, *rows = run("evaluator.py", files / "ref.npz", *paths, *flags).stdout.splitlines()
    assert re.split("  +", header.strip()) == ["Inception Score", "FID", "sFID", "Precision", "Recall", "KID"]
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert [row.split()[0] for row in rows] == paths == list(saved)
    for path, row in zip(paths, rows, strict=True):
        assert len(row) == len(header)
        alone = scores_of(files, files / "ref.npz", path, "--also", "kid")
        assert saved[path] == pytest.approx(alone, abs=1e-9)
        assert list(alone) == ["Inception Score", "FID", "FID std", "sFID", "Precision", "Recall", "KID", "KID std"]
        printed = [float(value) for value in row.split()[1:] if value != "±"]
        assert printed == pytest.approx(list(alone.values()), abs=0.006)
    assert saved[paths[1]]["FID"] == pytest.approx(0, abs=1e-6)
    pools = [toy_outputs(path)[0] for path in (files / "ref.npz", paths[0])]
    assert saved[paths[0]]["KID"] == pytest.approx(kernel_distance(*pools)[0], rel=1e-4)
    assert saved[paths[0]]["KID std"] == pytest.approx(kernel_distance(*pools)[1], rel=1e-4)
    assert saved[paths[0]]["FID std"] == pytest.approx(fid_std(*statistics(pools[0].numpy()), pools[1]), rel=1e-4)


def write_samples(folder, seed: int, source, png: bool = False, **settings):
    """Write a folder as sample_ddp.py leaves it, also after --save-png."""
    folder.mkdir()
    with np.load(source) as file:
        images = np.roll(file["arr_0"], seed, axis=2)
    np.savez(folder / "samples.npz", arr_0=images)
    (folder / "settings.json").write_text(
        json.dumps({"num_fid_samples": len(images), "global_seed": seed, "save_png": seed == 0} | settings)
    )
    Image.new("RGB", (50, 60)).save(folder / "grid.png")
    (folder / "png").mkdir()
    for i, image in enumerate(images if png else ()):
        Image.fromarray(image).save(folder / f"png/{i:06d}.png")


def test_folders_of_samples_and_seeds(files, tmp_path):
    """A folder of sample_ddp.py stands for its samples.npz. Samples that differ in the seed alone have a mean."""
    for seed, name in enumerate("abc"):
        write_samples(tmp_path / name, seed, files / "sample.npz", png=True, sampler="ddpm" if name != "c" else "ddim")
    folders = [tmp_path / name for name in "abc"]
    flags = ["--weights", files / "toy.pt2", "--json", tmp_path / "scores.json"]
    done = run("evaluator.py", files / "ref.npz", *folders, *flags)
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert list(saved) == [str(folder) for folder in folders]
    assert saved[str(folders[0])] == pytest.approx(scores_of(files, files / "ref.npz", files / "sample.npz"))
    rows = done.stdout.splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == [*saved, f"mean of 2 seeds, from {folders[0]}"]
    both = [saved[str(folder)]["FID"] for folder in folders[:2]]
    assert f"{np.mean(both):.2f} ± {np.std(both, ddof=1):.2f}" in rows[-1]
    # Samples of one seed twice are one seed.
    assert "mean of 2 seeds" in run("evaluator.py", files / "ref.npz", folders[0], *folders[:2], *flags[:2]).stdout
    twice = [folders[0], folders[0] / "samples.npz"]
    assert "mean of" not in run("evaluator.py", files / "ref.npz", *twice, *flags[:2]).stdout
    (folders[0] / "samples.npz").unlink()
    refused = run("evaluator.py", files / "ref.npz", folders[0], *flags[:2], expect=2).stderr
    assert "the sampling has not finished" in refused


def test_a_classifier_of_own_images(files, tmp_path):
    """It is trained on nine tenths, its accuracy on the rest is printed, and its features give scores."""
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    # The class is the row that is bright.
    images = generator.integers(0, 100, (120, 8, 8, 3), dtype=np.uint8)
    images[np.arange(120), labels * 2] += 100
    np.savez(tmp_path / "own.npz", arr_0=images, arr_1=labels)
    out = tmp_path / "classifier.pt2"
    done = run("evaluator.py", tmp_path / "own.npz", "--fit-classifier", out)
    accuracy, n_held_out = re.search(r"accuracy (\S+) on (\d+) held-out images of 3 classes", done.stdout).groups()
    assert float(accuracy) > 0.9 and n_held_out == "12"
    with torch.no_grad():
        pooled, spatial, logits = load_network(str(out))(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (logits.argmax(1).numpy() == labels).mean() > 0.9
    assert (pooled.shape[1], spatial.shape[1]) == (128, 2048)
    scores = parse_scores(run("evaluator.py", tmp_path / "own.npz", files / "sample.npz", "--weights", out).stdout)
    assert scores["FID"] > 0 and 1 <= scores["Inception Score"] <= 3

    # Numbers of classes may have gaps.
    np.savez(tmp_path / "gaps.npz", arr_0=images, arr_1=np.array([-5, 7, 10**12])[labels])
    assert read_labelled(tmp_path / "gaps.npz")[1].tolist() == labels.tolist()

    flags = ("--fit-classifier", tmp_path / "other.pt2")
    scored = run("evaluator.py", tmp_path / "own.npz", *flags, "--json", tmp_path / "s.json", expect=2).stderr
    assert "score samples with a second command" in scored
    np.savez(tmp_path / "few.npz", arr_0=images, arr_1=labels[:7])
    for reference, message in (
        (files / "ref.npz", "holds no labelled images: write them with extract_features.py --reference"),
        (tmp_path / "few.npz", "expected the labels of 120 images"),
    ):
        assert message in run("evaluator.py", reference, *flags, expect=2).stderr
    assert "exists: choose" in run("evaluator.py", tmp_path / "own.npz", "--fit-classifier", out, expect=2).stderr
    assert not (tmp_path / "other.pt2").exists()


def test_another_size_of_the_images_is_warned_about(files, tmp_path):
    """The network of the scores may resize them, as Inception does."""
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 12, 16, 3), np.uint8))
    features = {"mu": np.zeros(2), "sigma": np.eye(2), "pools": np.random.default_rng(0).normal(size=(5, 2))}

    def notes(path) -> str:
        return " ".join(describe_notes(files / "ref.npz", features, path, features, {"FID": 1.0}))

    found = notes(tmp_path / "large.npz")
    assert "large.npz have 16x12 pixels" in found and "ref.npz have 8x8" in found
    assert "pixels" not in notes(files / "sample.npz")


def test_an_unusual_number_of_samples_is_warned_about(files):
    """The warning estimates the difference to 50,000 samples: fid_bias times 1 - 90 / 50,000."""
    done = run("evaluator.py", files / "ref.npz", files / "sample.npz", "--weights", files / "toy.pt2")
    pools = [toy_outputs(files / f"{name}.npz")[0] for name in ("ref", "sample")]
    ref = statistics(pools[0].numpy())
    bias = fid_bias(*ref, pools[1], frechet_distance(*ref, *statistics(pools[1].numpy())))
    assert bias > 0
    assert "90 images instead of the usual 50,000" in done.stderr
    difference = f"{bias * (1 - 90 / 50_000):+.3g} ({bias:+.3g} relative to infinitely many images"
    assert f"its FID by about {difference}" in done.stderr


def test_features_are_computed_once(files, cache):
    flags = (files / "ref.npz", files / "sample.npz", "--weights", files / "toy.pt2")
    first = parse_scores(run("evaluator.py", *flags, "--cache", "none").stdout)
    assert not cache.exists()
    assert parse_scores(run("evaluator.py", *flags).stdout) == first
    assert len(list(cache.iterdir())) == 2
    done = run("evaluator.py", *flags)
    assert parse_scores(done.stdout) == first
    assert "img/s" not in done.stderr, "no images were processed"
    # The scores come from the cached arrays.
    for entry in cache.iterdir():
        with np.load(entry) as file:
            changed = dict(file) | {"mu": file["mu"] + len(file["pools"])}
        np.savez(entry, **changed)
    assert parse_scores(run("evaluator.py", *flags).stdout)["FID"] == pytest.approx(first["FID"] + 12 * 10**2, rel=0.02)
    for i, entry in enumerate(sorted(cache.iterdir())):
        data = entry.read_bytes()
        entry.write_bytes(data[: len(data) // 2] if i else data[:5000] + b"x" + data[5001:])
    done = run("evaluator.py", *flags)
    assert parse_scores(done.stdout) == first
    assert done.stderr.count("is damaged and is computed again") == 2
    assert "is damaged" not in run("evaluator.py", *flags).stderr


def test_every_network_and_file_has_its_own_cache_entry(files, tmp_path, cache):
    scores_of(files, files / "ref.npz", files / "sample.npz")
    # Another program that computes the same.
    export_network(torch.nn.Sequential(torch.nn.Identity(), ToyNetwork()), tmp_path / "other.pt2")
    run("evaluator.py", files / "ref.npz", files / "sample.npz", "--weights", tmp_path / "other.pt2")
    assert len(list(cache.iterdir())) == 4
    with np.load(files / "sample.npz") as file:
        np.savez(tmp_path / "reversed.npz", arr_0=file["arr_0"][::-1])
    scores_of(files, files / "ref.npz", tmp_path / "reversed.npz")
    assert len(list(cache.iterdir())) == 5


def test_two_processes_share_a_cache(files, tmp_path):
    command = [ROOT / "evaluator.py", files / "ref.npz", files / "sample.npz"]
    command += ["--weights", files / "toy.pt2", "--cache", tmp_path / "shared"]
    outs = [tmp_path / "first", tmp_path / "second"]
    both = [start(command, out, tmp_path / "log") for out in outs]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert outs[0].read_text() == outs[1].read_text() != ""
    assert sorted(path.suffix for path in (tmp_path / "shared").iterdir()) == [".npz", ".npz"]


def test_scores_do_not_need_a_writable_cache(files, tmp_path):
    (tmp_path / "file").touch()
    flags = (f"--weights={files / 'toy.pt2'}", f"--cache={tmp_path / 'file' / 'cache'}")
    done = run("evaluator.py", files / "ref.npz", files / "sample.npz", *flags)
    assert "could not be cached" in done.stderr
    assert "FID" in parse_scores(done.stdout)


def write_small_dinov2(hub, width: int = 6):
    """Write torch.hub's folder as after loading facebookresearch/dinov2, with a small random network instead."""
    repository = hub / "hub" / "facebookresearch_dinov2_main"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(
        "import torch\n"
        "def dinov2_vitl14(pretrained=True):\n"
        f"    network = torch.nn.Sequential(torch.nn.Conv2d(3, {width}, 14, 14), torch.nn.GELU(),\n"
        "        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    for values in network.parameters():\n"
        "        values.data = torch.randn(values.shape, generator=generator) / 14\n"
        "    return network\n"
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A separate torch.hub folder, without network access."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path / "torch"


def test_fd_dinov2_matches_the_definition(files, tmp_path, hub):
    """FD-DINOv2 equals PIL's resizing and the formula. torch.hub and torch-fidelity are real, the network is random."""
    write_small_dinov2(hub)
    with np.load(files / "ref.npz") as ref, np.load(files / "sample.npz") as sample:
        images = {"ref": ref["arr_0"], "sample": sample["arr_0"] // 2}
    np.savez(tmp_path / "sample.npz", arr_0=images["sample"])
    scores = scores_of(files, files / "ref.npz", tmp_path / "sample.npz", "--also", "fd-dinov2,kid")
    assert list(scores)[6:] == ["FD-DINOv2", "KID", "KID std"]
    network = torch.hub.load(hub / "hub/facebookresearch_dinov2_main", "dinov2_vitl14", source="local")
    moments = []
    for array in images.values():
        resized = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in array]
        pixels = (np.stack(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            features = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).double()
        moments += [features.mean(0), torch.cov(features.T)]
    assert scores["FD-DINOv2"] == pytest.approx(frechet_distance(*moments), rel=1e-2)


def test_dinov2_that_cannot_be_downloaded(files, hub):
    flags = ["--weights", files / "toy.pt2", "--also", "fd-dinov2"]
    message = run("evaluator.py", files / "ref.npz", files / "sample.npz", *flags, expect=2).stderr.splitlines()[-1]
    assert "torch.hub cannot load facebookresearch/dinov2" in message
    assert str(hub / "hub") in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a zip"), "not a complete .npz"),
        (lambda path: np.savez(path, arr_0=np.zeros((4, 8, 8))), "uint8 images"),
        (lambda path: np.savez(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8)), "at least 4"),
        (
            lambda path: np.savez(path, arr_0=np.zeros((9, 16, 12, 3), np.uint8)),
            "12x16 pixels but the network takes 8x8",
        ),
        (lambda path: np.savez(path, other=np.zeros(3)), "neither images"),
        (lambda path: save_statistics(path, mu=np.zeros(11)), "mu (11,) and sigma (12, 12) do not match"),
        (lambda path: save_statistics(path, mu=np.array(0.0)), "is not a mean or covariance"),
        (lambda path: save_statistics(path, mu=np.zeros(12, int)), "is not a mean or covariance"),
        (lambda path: save_images(path, (8, 8), (8, 8), (8, 8)), "holds 3 images"),
        (lambda path: save_images(path, *[(8, 8)] * 70, (8, 9)), "0070.png is 8x9, "),
        (lambda path: save_images(path, *[(8, 8)] * 4, mode="F", suffix="tif"), "pixels are 32-bit floats"),
        (lambda path: [save_images(path, *[(8, 8)] * 4), (path / "a.jpg").write_text("x")], "a.jpg cannot be read"),
    ],
)
def test_errors_for_wrong_files(files, tmp_path, make, message):
    make(tmp_path / "wrong.npz")
    done = run("evaluator.py", files / "ref.npz", tmp_path / "wrong.npz", "--weights", files / "toy.pt2", expect=2)
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mu=np.zeros(11), sigma=np.eye(11)), "has 12 pooled features"),
        (dict(mu=np.full(12, np.nan)), "are not finite"),
    ],
)
def test_errors_for_wrong_statistics(files, tmp_path, changes, message):
    save_statistics(tmp_path / "wrong.npz", network=content_hash(files / "toy.pt2"), **changes)
    done = run("evaluator.py", files / "ref.npz", tmp_path / "wrong.npz", "--weights", files / "toy.pt2", expect=2)
    assert message in done.stderr.splitlines()[-1]


def test_statistics_of_another_network_are_refused(files, tmp_path):
    """Statistics without a name are ADM's, of Inception. Two files of statistics are compared without any network."""
    adm, other, images = tmp_path / "adm.npz", tmp_path / "other.npz", files / "sample.npz"
    save_statistics(adm)
    save_statistics(other, network="abcd")
    toy = ("--weights", files / "toy.pt2")
    for flags in ((adm, images, *toy), (images, adm, *toy), (other, images, *toy), (other, adm), (other, images)):
        stderr = run("evaluator.py", *flags, expect=2).stderr
        assert "features of different networks cannot be compared" in stderr
        assert stderr.count("\n") == 1
    for path in (adm, other):
        assert parse_scores(run("evaluator.py", path, path, *toy).stdout)["FID"] == pytest.approx(0, abs=1e-6)
    run("evaluator.py", other, "--save-stats", tmp_path / "copy.npz")
    with np.load(tmp_path / "copy.npz") as file:
        assert file["network"] == "abcd"


def save_statistics(path, **changes):
    arrays = dict(mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(16), sigma_s=np.eye(16))
    np.savez(path, **(arrays | changes))


def save_images(folder, *sizes, mode="RGB", suffix="png"):
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.new(mode, size).save(folder / f"{i:04d}.{suffix}")


def test_error_for_a_program_with_other_outputs(files, tmp_path):
    program = torch.export.export(torch.nn.Flatten(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),))
    torch.export.save(program, tmp_path / "flat.pt2")
    flags = [files / "ref.npz", files / "sample.npz", "--weights", tmp_path / "flat.pt2"]
    assert "for 2 images, expected 3 outputs" in run("evaluator.py", *flags, expect=2).stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no samples to score"),
        (["sample.npz", "--also", "kid,fvd"], "expected kid or fd-dinov2"),
        (["sample.npz", "--weights", "absent.pth"], "absent.pth: no such file"),
    ],
)
def test_errors_for_wrong_flags(files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    assert message in run("evaluator.py", "ref.npz", *flags, expect=2).stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights in torch-fidelity's format, instead of the file that it downloads."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        torch.manual_seed(0)
        network = AdmInception(None).inception
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            # The running statistics become those of the first batch, so that no layer's output vanishes.
            part.momentum = 1
            torch.nn.init.normal_(part.bias, std=0.2)
    network.train()(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def resized_as_tensorflow_1(image: np.ndarray, side: int = 299) -> np.ndarray:
    """Resize as tf.image.resize_bilinear(align_corners=False): it aligns the corners of pixels, not their centres."""
    rows, columns = (np.arange(side) * n / side for n in image.shape[:2])
    out = np.empty((side, side, 3))
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            dy, dx = y - top, x - left
            out[i, j] = (1 - dy) * ((1 - dx) * image[top, left] + dx * image[top, right])
            out[i, j] += dy * ((1 - dx) * image[bottom, left] + dx * image[bottom, right])
    return out


@pytest.mark.slow
def test_inception_outputs_match_the_tensors_of_adm(inception):
    """The resized input and each of the three outputs match their definitions."""
    network, captured = AdmInception(str(inception)), {}
    parts = network.inception
    for name in ("Conv2d_1a_3x3", "Mixed_6d"):
        getattr(parts, name).register_forward_pre_hook(
            lambda m, i, name=name: captured.update({name: i[0].double().numpy()})
        )
    parts.Mixed_7c.register_forward_hook(lambda m, i, o: captured.update(Mixed_7c=o.double().numpy()))
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    pool, spatial, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))

    expected = (resized_as_tensorflow_1(images[1].astype(np.float64)) - 128) / 128
    np.testing.assert_allclose(captured["Conv2d_1a_3x3"][1].transpose(1, 2, 0), expected, atol=1e-5)

    branch = parts.Mixed_6d.branch1x1
    weight = branch.conv.weight[:7, :, 0, 0].double().numpy()
    mean, variance, gain, bias = (
        getattr(branch.bn, name)[:7].double().numpy() for name in ("running_mean", "running_var", "weight", "bias")
    )
    convolved = np.einsum("nchw,oc->nhwo", captured["Mixed_6d"], weight)
    normed = np.maximum((convolved - mean) / np.sqrt(variance + 0.001) * gain + bias, 0)
    assert 0.1 < (normed > 0).mean() < 0.9
    np.testing.assert_allclose(spatial, normed.reshape(2, -1), rtol=1e-3, atol=1e-4)

    pooled = captured["Mixed_7c"].mean((2, 3))
    np.testing.assert_allclose(pool, pooled, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(logits, pooled @ parts.fc.weight.double().numpy().T, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_scores_with_inception(files, inception, tmp_path):
    with np.load(files / "ref.npz") as file:
        np.savez(tmp_path / "few.npz", arr_0=file["arr_0"][:8])
    scores = parse_scores(run("evaluator.py", *[tmp_path / "few.npz"] * 2, "--weights", inception).stdout)
    assert abs(scores["FID"]) < 1e-2
    assert scores["Precision"] == scores["Recall"] == 1
    with torch.no_grad(), np.load(tmp_path / "few.npz") as file:
        logits = AdmInception(str(inception))(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))[2].double()
    probs = logits.softmax(1)
    divergence = (probs * (probs.log() - probs.mean(0).log())).sum(1).mean()
    assert scores["Inception Score"] == pytest.approx(divergence.exp().item(), rel=1e-4)
    assert scores["Inception Score"] > 1.001


class Harmful:
    """An object whose pickle makes a folder when it is loaded."""

    folder = "/tmp/remix-dit-test-was-here"

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def test_pickles_in_an_exported_program_are_not_loaded(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "p.pt2", "w") as archive,
        archive.open("p/data/sample_inputs/model.pt", "w") as file,
    ):
        torch.save(Harmful(), file)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    files = (tmp_path / "a.npz", tmp_path / "a.npz", "--weights", tmp_path / "p.pt2")
    assert "cannot be loaded" in run("evaluator.py", *files, expect=2).stderr
    assert not os.path.exists(Harmful.folder)


def test_an_exported_network_that_declares_its_weights_as_pickles_is_refused(tmp_path):
    """Since PyTorch 2.9, the configuration inside a program's file says which of its tensors are pickled."""
    honest, harmful = tmp_path / "honest.pt2", tmp_path / "harmful.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),)), honest)
    pickled = io.BytesIO()
    torch.save(Harmful(), pickled)
    with zipfile.ZipFile(honest) as archive, zipfile.ZipFile(harmful, "w") as changed:
        config = next(name for name in archive.namelist() if name.endswith("weights_config.json"))
        entries = json.loads(archive.read(config))
        entry = next(iter(entries["config"].values()))
        entry["use_pickle"] = True
        for name in archive.namelist():
            content = pickled.getvalue() if name.endswith(f"/{entry['path_name']}") else archive.read(name)
            changed.writestr(name, json.dumps(entries) if name == config else content)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    files = (tmp_path / "a.npz", tmp_path / "a.npz", "--weights", harmful)
    assert "holds pickles" in run("evaluator.py", *files, expect=2).stderr
    assert not os.path.exists(Harmful.folder)


def write_npz_header(path, shape):
    """Write an .npz file whose arr_0 has a header with this shape and no data."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def test_npz_files_with_a_false_header_are_refused(tmp_path):
    write_npz_header(tmp_path / "false.npz", (10, 10**6, 10**6, 3))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}] * 9, dtype=object))
    for path in (tmp_path / "false.npz", tmp_path / "objects.npz"):
        assert "not as long" in run("evaluator.py", path, path, expect=2).stderr
