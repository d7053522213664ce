import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_images, run, training_flags
from PIL import Image
from torch._dynamo.utils import counters

from checkpoint import build_model, load_model, save_checkpoint
from diffusion import create_diffusion
from diffusion.solvers import SOLVERS
from distributed import seed_for
from features import FeatureDataset
from sample_ddp import label_of
from training.statistics import noise_errors

FEW = ("--num-fid-samples", 14, "--num-sampling-steps", "8")


def images(folder) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"]


@pytest.fixture(scope="module")
def sampled(ckpt, tmp_path_factory):
    path = tmp_path_factory.mktemp("samples")
    run("sample_ddp.py", "--ckpt", ckpt, *FEW, "--sample-dir", path, "--name", "one", "--save-png")
    return path / "one"


def test_results(sampled):
    x = images(sampled)
    assert (x.shape, x.dtype) == ((14, 8, 8, 3), np.uint8)
    assert sorted(path.name for path in sampled.iterdir()) == ["grid.png", "png", "samples.npz", "settings.json"]
    assert np.array_equal(np.array(Image.open(sampled / "png" / "000009.png")), x[9])
    labels = np.load(sampled / "samples.npz")["arr_1"]
    assert labels.tolist() == [label_of(0, i, 3) for i in range(14)]
    assert Image.open(sampled / "grid.png").width > 10 * 48


@pytest.mark.parametrize(("batch", "processes"), [(7, 1), (32, 2), (5, 2)])
def test_a_sample_is_its_index(ckpt, sampled, tmp_path, batch, processes):
    flags = ("--ckpt", ckpt, *FEW, "--sample-dir", tmp_path, "--name", "other", "--per-proc-batch-size", batch)
    run("sample_ddp.py", *flags, processes=processes)
    difference = np.abs(images(tmp_path / "other").astype(int) - images(sampled).astype(int))
    assert difference.max() <= 1


def test_a_solvers_sample_is_its_index(ckpt, tmp_path):
    flags = ("--ckpt", ckpt, *FEW, "--sample-dir", tmp_path, "--sampler", "dpmpp")
    run("sample_ddp.py", *flags, "--name", "one")
    run("sample_ddp.py", *flags, "--name", "two", "--per-proc-batch-size", 5)
    one, two = (images(tmp_path / name).astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1
    assert one.std() > 10


@torch.no_grad()
def test_sampling_is_the_plain_loop(ckpt, sampled):
    """Folding, guidance and batching change nothing: sample 5 again, by hand, with the unfolded model."""
    model, _ = load_model(ckpt)
    generator = torch.Generator().manual_seed(seed_for(0, 5))
    draws = [torch.randn(3, 8, 8, generator=generator) for _ in range(8)]
    y = torch.tensor([label_of(0, 5, 3), 3])
    x = create_diffusion("8").p_sample_loop(
        model.forward_with_cfg,
        (2, 3, 8, 8),
        noise=draws[0].expand(2, -1, -1, -1),
        model_kwargs={"y": y, "cfg_scale": 1.5},
        step_noise=lambda i: draws[i + 1].expand(2, -1, -1, -1),
    )
    by_hand = (127.5 * x[0] + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.abs(by_hand.astype(int) - images(sampled)[5].astype(int)).max() <= 1


def test_an_interrupted_sampling_is_finished(ckpt, sampled, tmp_path):
    flags = ("--ckpt", ckpt, *FEW, "--sample-dir", tmp_path, "--name", "again", "--per-proc-batch-size", 7)
    run("sample_ddp.py", *flags)
    folder = tmp_path / "again"
    done = images(folder)
    (folder / "samples.npz").unlink()
    (folder / "parts").mkdir()
    np.save(folder / "parts" / "000000.npy", 255 - done[:7])  # a mark: what is there is not sampled again
    run("sample_ddp.py", *flags)
    assert np.array_equal(images(folder), np.concatenate([255 - done[:7], done[7:]]))
    assert "nothing to do" in run("sample_ddp.py", *flags).stdout
    refused = run("sample_ddp.py", *flags, "--cfg-scale", 4, expect=2)
    assert "cfg_scale=1.5, not 4.0" in refused.stderr


@pytest.mark.parametrize(
    "how",
    [
        ("--sampler", "ddim"),
        *(("--sampler", name) for name in SOLVERS),
        ("--cfg-scale", 1),
        ("--cfg-all-channels", "--precision", "bf16"),
        ("--no-ema",),
    ],
)
def test_other_ways(ckpt, sampled, tmp_path, how):
    run("sample_ddp.py", "--ckpt", ckpt, *FEW, "--sample-dir", tmp_path, *how)
    (folder,) = tmp_path.iterdir()
    assert images(folder).shape == (14, 8, 8, 3)
    if "--cfg-all-channels" not in how:  # three channels are all of a pixel model's
        assert not np.array_equal(images(folder), images(sampled))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ckpt", "/nowhere.pt"), "no such file"),
        (("--model", "RemixDiT-S/2"), "not RemixDiT-S/2"),
        (("--num-classes", "10"), "was trained with 3"),
        (("--num-sampling-steps", "2000"), "cannot keep 2000"),
        (("--sampler", "dpmpp", "--num-sampling-steps", "ddim50"), "dpmpp takes a whole number of steps"),
        (("--cfg-scale", "-1"), "at least 0"),
        (("--name", "../x"), "plain folder name"),
        (("--vae", "/no/such/vae"), "cannot load the VAE"),
        (("--ckpt", str(GOLDEN / "remix_original_checkpoint.pt")), "number of heads"),
    ],
)
def test_wrong_input(ckpt, tmp_path, flags, message):
    done = run("sample_ddp.py", "--ckpt", ckpt, "--sample-dir", tmp_path / "out", *FEW, *flags, expect=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_coefficients_are_drawn(ckpt, tmp_path):
    run("visualize.py", "coefficients", ckpt, "--out", tmp_path / "alpha.png")
    rows = [line.split(",") for line in (tmp_path / "alpha.csv").read_text().splitlines()]
    assert rows[0] == ["block", "expert", "first_timestep", "last_timestep", "basis_0", "basis_1"]
    alpha = load_model(ckpt)[0].coefficients()
    assert [[float(v) for v in row[4:]] for row in rows[1:]] == [pytest.approx(row) for row in alpha.tolist()]
    assert [row[2:4] for row in rows[1:]][:2] == [["0", "165"], ["166", "332"]]
    assert Image.open(tmp_path / "alpha.png").width > 500


def test_coefficients_of_a_plain_model(tmp_path):
    torch.save(torch.load(GOLDEN / "dit.pt", weights_only=True)["state_dict"], tmp_path / "dit.pt")
    assert "plain DiT" in run("visualize.py", "coefficients", tmp_path / "dit.pt", "--num-heads", 4, expect=2).stderr


def test_settings_say_what_made_the_samples(ckpt, sampled):
    settings = json.loads((sampled / "settings.json").read_text())
    assert settings["ckpt"] == [str(ckpt)]
    assert settings["num_sampling_steps"] == "8"


def test_independent_experts(features, tmp_path):
    files = []
    for low, high in ((400, 1000), (0, 400)):
        flags = training_flags(features, tmp_path, f"expert-{low}", "DiT-T/2")
        run("train_fast.py", *flags, "--max-steps", 2, "--timesteps", low, high)
        files.append(tmp_path / f"expert-{low}/checkpoints/0000002.pt")
    run("sample_ddp.py", "--ckpt", *files, *FEW, "--sample-dir", tmp_path, "--name", "dealt")
    run("sample_ddp.py", "--ckpt", files[0], *FEW, "--sample-dir", tmp_path, "--name", "alone")
    assert not np.array_equal(images(tmp_path / "dealt"), images(tmp_path / "alone"))
    for wrong, message in (
        ((files[0], files[0]), "do not tile"),
        ((files[0], GOLDEN / "dit.pt"), "holds no state dict"),
    ):
        assert message in run("sample_ddp.py", "--ckpt", *wrong, *FEW, "--sample-dir", tmp_path / "no", expect=2).stderr


def test_experts_losses_are_drawn(ckpt, features, tmp_path):
    """A row an expert, a column an interval: the ratio of its error to the pretrained model's, less one."""
    state = torch.load(ckpt, weights_only=True)
    config = {**state["config"]["model"], "name": "DiT-T/2", "remix": None}
    torch.save(build_model(config).state_dict(), tmp_path / "dit.pt")
    how = ("--data-path", features, "--pretrained", tmp_path / "dit.pt", "--images", 8, "--per-interval", 3)
    run("visualize.py", "losses", ckpt, *how, "--out", tmp_path / "losses.png")
    rows = [line.split(",") for line in (tmp_path / "losses.csv").read_text().splitlines()]
    assert rows[0][:3] == ["expert", "t_0_165", "t_166_332"]
    assert len(rows) == 2 + 6
    model, _ = load_model(ckpt)
    x, y = FeatureDataset(features).__getitems__(np.random.default_rng(0).permutation(24)[:8].tolist())
    diffusion = create_diffusion()
    mine = noise_errors(model.expert(3), diffusion, x, y, [500, 582, 665], per_timestep=8).mean()
    base, _ = load_model(tmp_path / "dit.pt")
    theirs = noise_errors(base, diffusion, x, y, [500, 582, 665], per_timestep=8).mean()
    assert float(rows[2 + 3][1 + 3]) == pytest.approx(float(mine / theirs - 1), abs=1e-4)
    assert "not the plain DiT" in run("visualize.py", "losses", ckpt, *how[:2], "--pretrained", ckpt, expect=2).stderr


def test_coefficients_over_training_are_drawn(trained, tmp_path):
    run("visualize.py", "training", trained, "--out", tmp_path / "training.png")
    rows = [line.split(",") for line in (tmp_path / "training.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "1", "2", "3", "4"]
    raw, _ = load_model(trained / "checkpoints/0000004.pt", ema=False)
    assert [float(v) for v in rows[-1][1:]] == pytest.approx(raw.coefficients().flatten().tolist(), abs=1e-5)


def test_grids_side_by_side(sampled, tmp_path):
    run(
        "visualize.py",
        "grids",
        sampled / "samples.npz",
        sampled / "samples.npz",
        "--images",
        5,
        "--out",
        tmp_path / "two.png",
    )
    picture = np.array(Image.open(tmp_path / "two.png"))
    half = picture.shape[0] // 2
    assert np.array_equal(picture[20:half], picture[half + 18 : 2 * half - 2])


def test_latent_models_from_images_to_images(vae, tmp_path):
    tree = make_images(tmp_path / "images", size=16)
    run(
        "extract_features.py",
        "--data-path",
        tree,
        "--features-path",
        tmp_path / "f",
        "--vae",
        vae,
        "--image-size",
        16,
        "--num-workers",
        0,
    )
    run("train_fast.py", *training_flags(tmp_path / "f", tmp_path, "latent"), "--max-steps", 3, "--num-classes", 9)
    ckpt = tmp_path / "latent/checkpoints/0000003.pt"
    state = torch.load(ckpt, weights_only=True)
    state["ema"]["backbone.final_layer.linear.weight"] += 0.3 * torch.randn(
        32, 48, generator=torch.Generator().manual_seed(0)
    )
    save_checkpoint(ckpt, state)
    flags = ("--ckpt", ckpt, *FEW, "--sample-dir", tmp_path / "samples")
    run("sample_ddp.py", *flags, "--name", "three")
    run("sample_ddp.py", *flags, "--name", "four", "--cfg-all-channels")
    three, four = images(tmp_path / "samples/three"), images(tmp_path / "samples/four")
    assert three.shape == (14, 16, 16, 3)
    assert not np.array_equal(three, four), "DiT guides three of the four latent channels"
    labels = np.load(tmp_path / "samples/three/samples.npz")["arr_1"]
    assert set(labels) <= {0, 1, 2}, "only classes that there were images of"
    refused = run("sample_ddp.py", *flags, "--name", "pixels", "--vae", "none", expect=2).stderr
    assert "denoises 4 channels" in refused
    assert not (tmp_path / "samples/pixels").exists()


def test_compiled_sampling_is_the_same_and_compiles_once(ckpt, sampled, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    flags = ("--ckpt", ckpt, *FEW, "--sample-dir", tmp_path, "--compile", "--per-proc-batch-size", 4)
    run("sample_ddp.py", *flags, "--name", "compiled")
    difference = np.abs(images(tmp_path / "compiled").astype(int) - images(sampled).astype(int))
    assert difference.max() <= 1
    assert counters["stats"]["unique_graphs"] == 1  # four batches, the last one of two
