import json
import re
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
    mu, std = np.full(d, 0.05), np.sqrt(np.linspace(0.8, 0.02, d))
    limit = frechet_distance(*ref, mu, np.diag(std**2))
    found, estimated = [], []
    for _ in range(10):
        rows = generator.normal(size=(n, d))
        if tails == "heavy":
            rows *= np.sqrt(generator.gamma(1.5, 1 / 1.5, size=(n, 1)))  # the covariance stays as it is
        rows = mu + rows * std
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


def scores_of(out: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split(": ") for line in out.splitlines() if ": " in line)}


def evaluated(files, *flags) -> dict[str, float]:
    return scores_of(run("evaluator.py", *flags, "--weights", files / "toy.pt2").stdout)


def toy_features(path) -> list[torch.Tensor]:
    with np.load(path) as file, torch.no_grad():
        return list(Toy()(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)))


def test_reference_statistics_are_used_as_they_are(files, tmp_path):
    d, s = 12, 16
    np.savez(tmp_path / "stats.npz", mu=np.full(d, 7.0), sigma=np.eye(d), mu_s=np.zeros(s), sigma_s=np.eye(s))
    done = run("evaluator.py", tmp_path / "stats.npz", files / "sample.npz", "--weights", files / "toy.pt2")
    scores = scores_of(done.stdout)
    assert scores["FID"] > 40 * d, "the means are more than 6 apart in each of the dimensions"
    assert np.isnan([scores["Precision"], scores["Recall"]]).all()
    assert "stats.npz without images: no Precision, Recall" in done.stderr


def test_saved_statistics_take_the_place_of_images(files, tmp_path):
    flags = ["--save-stats", tmp_path / "ref", "--weights", files / "toy.pt2"]
    assert run("evaluator.py", files / "ref.npz", *flags).stdout == "", "no samples, no scores"
    pool = toy_features(files / "ref.npz")[0].double()
    with np.load(tmp_path / "ref") as file:
        assert set(file) == {"mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_allclose(file["mu"], pool.mean(0), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], torch.cov(pool.T), rtol=1e-5, atol=1e-8)
    by_images = evaluated(files, files / "ref.npz", files / "sample.npz")
    by_statistics = evaluated(files, tmp_path / "ref", files / "sample.npz", "--json", tmp_path / "scores.json")
    for name in ("Inception Score", "FID", "sFID"):
        assert by_statistics[name] == pytest.approx(by_images[name], rel=1e-9)
    assert json.loads((tmp_path / "scores.json").read_text())["Precision"] is None
    # On both sides, nothing has to be run: there is no network behind the name.
    (tmp_path / "none.pth").touch()
    run("evaluator.py", files / "sample.npz", "--save-stats", tmp_path / "sample", "--weights", files / "toy.pt2")
    out = run("evaluator.py", tmp_path / "ref", tmp_path / "sample", "--weights", tmp_path / "none.pth").stdout
    assert scores_of(out)["FID"] == pytest.approx(by_images["FID"], rel=1e-9)
    assert np.isnan(scores_of(out)["Inception Score"])


def test_a_folder_of_images_is_as_good_as_an_array(files, tmp_path):
    with np.load(files / "sample.npz") as file:
        images = file["arr_0"]
    for i, image in enumerate(images):
        path = tmp_path / "images" / f"part{i // 50}" / f"{i:06d}.{'PNG' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    found = evaluated(files, files / "ref.npz", tmp_path / "images", "--batch-size", 7)
    assert found == pytest.approx(evaluated(files, files / "ref.npz", files / "sample.npz"), rel=1e-6)


def test_several_files_make_a_table(files, tmp_path):
    paths = [str(files / f"{name}.npz") for name in ("sample", "ref")]
    flags = ["--weights", files / "toy.pt2", "--also", "kid", "--json", tmp_path / "scores.json"]
    header, *rows = run("evaluator.py", files / "ref.npz", *paths, *flags).stdout.splitlines()
    assert re.split("  +", header.strip()) == ["Inception Score", "FID", "sFID", "Precision", "Recall", "KID"]
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [row.split()[0] for row in rows] == paths == list(found)
    for path, row in zip(paths, rows, strict=True):
        assert len(row) == len(header)
        alone = evaluated(files, files / "ref.npz", path, "--also", "kid")
        assert found[path] == pytest.approx(alone, abs=1e-9)
        assert [float(value) for value in row.split()[1:]] == pytest.approx(list(alone.values()), abs=0.006)
    assert found[paths[1]]["FID"] == pytest.approx(0, abs=1e-6)
    pools = [toy_features(path)[0] for path in (files / "ref.npz", paths[0])]
    assert found[paths[0]]["KID"] == pytest.approx(kernel_distance(*pools), rel=1e-4)


def test_few_samples_are_warned_of(files):
    """The estimate is that of fid_bias: of 90 images beside 50,000 all but 90 / 50,000 of it."""
    done = run("evaluator.py", files / "ref.npz", files / "sample.npz", "--weights", files / "toy.pt2")
    pools = [toy_features(files / f"{name}.npz")[0] for name in ("ref", "sample")]
    ref = statistics(pools[0].numpy())
    bias = fid_bias(*ref, pools[1], frechet_distance(*ref, *statistics(pools[1].numpy())))
    assert bias > 0
    assert "90 images, not the usual 50,000" in done.stderr
    assert f"its FID about {bias * (1 - 90 / 50_000):+.3g} ({bias:+.3g} beside infinitely many" in done.stderr


def test_activations_are_computed_once(files, cache):
    flags = (files / "ref.npz", files / "sample.npz", "--weights", files / "toy.pt2")
    first = scores_of(run("evaluator.py", *flags, "--cache", "none").stdout)
    assert not cache.exists()
    assert scores_of(run("evaluator.py", *flags).stdout) == first
    assert len(list(cache.iterdir())) == 2
    done = run("evaluator.py", *flags)
    assert scores_of(done.stdout) == first
    assert "img/s" not in done.stderr, "no images went by"
    for entry in cache.iterdir():  # what is kept is what is used
        with np.load(entry) as file:
            changed = dict(file) | {"mu": file["mu"] + len(file["pools"])}
        np.savez(entry, **changed)
    assert scores_of(run("evaluator.py", *flags).stdout)["FID"] == pytest.approx(first["FID"] + 12 * 10**2, rel=0.02)
    for i, entry in enumerate(sorted(cache.iterdir())):
        data = entry.read_bytes()
        entry.write_bytes(data[: len(data) // 2] if i else data[:5000] + b"x" + data[5001:])
    done = run("evaluator.py", *flags)
    assert scores_of(done.stdout) == first
    assert done.stderr.count("is damaged and computed anew") == 2
    assert "is damaged" not in run("evaluator.py", *flags).stderr


def test_another_network_or_file_has_activations_of_its_own(files, tmp_path, cache):
    evaluated(files, files / "ref.npz", files / "sample.npz")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    other = torch.nn.Sequential(torch.nn.Identity(), Toy())  # which computes the same
    program = torch.export.export(other, (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "other.pt2")
    run("evaluator.py", files / "ref.npz", files / "sample.npz", "--weights", tmp_path / "other.pt2")
    assert len(list(cache.iterdir())) == 4
    with np.load(files / "sample.npz") as file:
        np.savez(tmp_path / "turned.npz", arr_0=file["arr_0"][::-1])
    evaluated(files, files / "ref.npz", tmp_path / "turned.npz")
    assert len(list(cache.iterdir())) == 5


def test_two_at_once_share_a_cache(files, tmp_path):
    command = [sys.executable, ROOT / "evaluator.py", files / "ref.npz", files / "sample.npz"]
    command += ["--weights", files / "toy.pt2", "--cache", tmp_path / "shared"]
    both = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outs[0] == outs[1]
    assert sorted(path.suffix for path in (tmp_path / "shared").iterdir()) == [".npz", ".npz"]


def test_a_cache_that_cannot_be_written_costs_no_score(files, tmp_path):
    (tmp_path / "file").touch()
    done = run(
        "evaluator.py",
        files / "ref.npz",
        files / "sample.npz",
        "--weights",
        files / "toy.pt2",
        "--cache",
        tmp_path / "file" / "cache",
    )
    assert "could not be kept" in done.stderr
    assert "FID" in scores_of(done.stdout)


def stand_in_for_dinov2(hub, width: int = 6):
    """torch.hub's folder as it is after loading facebookresearch/dinov2, with a small random network in its place."""
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
    """torch.hub without a network, and with a folder of its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path / "torch"


def test_fd_dinov2(files, tmp_path, hub):
    """Against PIL's resizing and the plain formula; torch.hub and torch-fidelity are real, the network is not DINOv2's."""
    stand_in_for_dinov2(hub)
    with np.load(files / "ref.npz") as ref, np.load(files / "sample.npz") as sample:
        images = {"ref": ref["arr_0"], "sample": sample["arr_0"] // 2}
    np.savez(tmp_path / "sample.npz", arr_0=images["sample"])
    scores = evaluated(files, files / "ref.npz", tmp_path / "sample.npz", "--also", "fd-dinov2,kid")
    assert list(scores)[5:] == ["FD-DINOv2", "KID"]
    network = torch.hub.load(hub / "hub/facebookresearch_dinov2_main", "dinov2_vitl14", source="local")
    moments = []
    for array in images.values():
        resized = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in array]
        pixels = (np.stack(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            features = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).double()
        moments += [features.mean(0), torch.cov(features.T)]
    assert scores["FD-DINOv2"] == pytest.approx(frechet_distance(*moments), rel=1e-2)


def test_dinov2_that_cannot_be_had(files, hub):
    flags = ["--weights", files / "toy.pt2", "--also", "fd-dinov2"]
    said = run("evaluator.py", files / "ref.npz", files / "sample.npz", *flags, expect=2).stderr.splitlines()[-1]
    assert "torch.hub cannot load facebookresearch/dinov2" in said
    assert str(hub / "hub") in said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a zip"), "not a whole .npz"),
        (lambda path: np.savez(path, arr_0=np.zeros((4, 8, 8))), "uint8 images"),
        (lambda path: np.savez(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8)), "at least 4"),
        (lambda path: np.savez(path, arr_0=np.zeros((9, 12, 12, 3), np.uint8)), "does not take the images"),
        (lambda path: np.savez(path, other=np.zeros(3)), "neither images"),
        (lambda path: save_statistics(path, mu=np.zeros(11)), "mu (11,) and sigma (12, 12) do not match"),
        (lambda path: save_statistics(path, mu=np.zeros(11), sigma=np.eye(11)), "has 12 pooled features"),
        (lambda path: save_statistics(path, sigma_s=np.eye(16)[:5]), "is no statistic"),
        (lambda path: save_statistics(path, mu=np.array(0.0)), "is no statistic"),
        (lambda path: save_statistics(path, mu=np.zeros(12, int)), "is no statistic"),
        (lambda path: save_statistics(path, mu=np.full(12, np.nan)), "are not finite"),
        (lambda path: save_images(path, (8, 8), (8, 8), (8, 8)), "holds 3 images"),
        (lambda path: save_images(path, *[(8, 8)] * 70, (8, 9)), "0070.png is 8x9, "),
        (lambda path: save_images(path, *[(8, 8)] * 4, mode="I;16"), "cannot be read as an image"),
        (lambda path: [save_images(path, *[(8, 8)] * 4), (path / "a.jpg").write_text("x")], "a.jpg cannot be read"),
    ],
)
def test_wrong_files(files, tmp_path, make, message):
    make(tmp_path / "wrong.npz")
    done = run("evaluator.py", files / "ref.npz", tmp_path / "wrong.npz", "--weights", files / "toy.pt2", expect=2)
    assert message in done.stderr.splitlines()[-1]


def save_statistics(path, **changes):
    arrays = dict(mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(16), sigma_s=np.eye(16))
    np.savez(path, **(arrays | changes))


def save_images(folder, *sizes, mode="RGB"):
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.new(mode, size).save(folder / f"{i:04d}.png")


def test_a_program_with_other_outputs(files, tmp_path):
    program = torch.export.export(torch.nn.Flatten(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),))
    torch.export.save(program, tmp_path / "flat.pt2")
    flags = [files / "ref.npz", files / "sample.npz", "--weights", tmp_path / "flat.pt2"]
    assert "of 2 images, not 3 rows of numbers" in run("evaluator.py", *flags, expect=2).stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no samples to score"),
        (["sample.npz", "--also", "kid,fvd"], "expected kid or fd-dinov2"),
        (["sample.npz", "--weights", "absent.pth"], "absent.pth: no such file"),
    ],
)
def test_wrong_flags(files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    assert message in run("evaluator.py", "ref.npz", *flags, expect=2).stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights in torch-fidelity's own format stand in for the file that it downloads."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        torch.manual_seed(0)
        network = AdmInception(None).inception
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):  # keeps what it sees first, so that no layer's output vanishes
            part.momentum = 1
            torch.nn.init.normal_(part.bias, std=0.2)
    network.train()(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def resized_as_tensorflow_1(image: np.ndarray, side: int = 299) -> np.ndarray:
    """tf.image.resize_bilinear, align_corners=False, of [H, W, 3]: corners, not centres, of pixels lie on one another."""
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
def test_inception_gives_what_adm_reads_off_its_graph(inception):
    """Each of the network's three outputs, and its input, by the definition."""
    network, seen = AdmInception(str(inception)), {}
    parts = network.inception
    for name in ("Conv2d_1a_3x3", "Mixed_6d"):
        getattr(parts, name).register_forward_pre_hook(
            lambda m, i, name=name: seen.update({name: i[0].double().numpy()})
        )
    parts.Mixed_7c.register_forward_hook(lambda m, i, o: seen.update(Mixed_7c=o.double().numpy()))
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    pool, spatial, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))

    expected = (resized_as_tensorflow_1(images[1].astype(np.float64)) - 128) / 128
    np.testing.assert_allclose(seen["Conv2d_1a_3x3"][1].transpose(1, 2, 0), expected, atol=1e-5)

    branch = parts.Mixed_6d.branch1x1
    weight = branch.conv.weight[:7, :, 0, 0].double().numpy()
    mean, variance, gain, bias = (
        getattr(branch.bn, name)[:7].double().numpy() for name in ("running_mean", "running_var", "weight", "bias")
    )
    convolved = np.einsum("nchw,oc->nhwo", seen["Mixed_6d"], weight)
    normed = np.maximum((convolved - mean) / np.sqrt(variance + 0.001) * gain + bias, 0)
    assert 0.1 < (normed > 0).mean() < 0.9
    np.testing.assert_allclose(spatial, normed.reshape(2, -1), rtol=1e-3, atol=1e-4)

    pooled = seen["Mixed_7c"].mean((2, 3))
    np.testing.assert_allclose(pool, pooled, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(logits, pooled @ parts.fc.weight.double().numpy().T, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_scores_by_inception(files, inception, tmp_path):
    with np.load(files / "ref.npz") as file:
        np.savez(tmp_path / "few.npz", arr_0=file["arr_0"][:8])
    scores = scores_of(run("evaluator.py", *[tmp_path / "few.npz"] * 2, "--weights", inception).stdout)
    assert abs(scores["FID"]) < 1e-2
    assert scores["Precision"] == scores["Recall"] == 1
    with torch.no_grad(), np.load(tmp_path / "few.npz") as file:
        logits = AdmInception(str(inception))(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))[2].double()
    probs = logits.softmax(1)
    divergence = (probs * (probs.log() - probs.mean(0).log())).sum(1).mean()
    assert scores["Inception Score"] == pytest.approx(divergence.exp().item(), rel=1e-4)
    assert scores["Inception Score"] > 1.001
