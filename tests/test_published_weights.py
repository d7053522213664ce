"""LightningDiT and DiT^DH from images to scores by their recipes: Fashion-MNIST in the latents of the study's VAE.

Three of the ten classes are enough for 300 steps; the classifier knows all ten. Each model is trained, continued and
trained as a Remix 4-8, sampled, scored, converted, and read and sampled again.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, relative, run, sampled_images
from PIL import Image
from safetensors.torch import save_file

from checkpoint import load_model
from features.dataset import FeatureDataset
from models import find_model
from studies.dataset import CLASSES, DEBIAN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist"),
]
NETWORKS = ROOT / "studies" / "results" / "fashion"
VAE, CLASSIFIER = NETWORKS / "vae", NETWORKS / "classifier-32.pt2"
# Labels of the original data.
CHOSEN = (1, 3, 8)
IMAGES, SAMPLES = 1200, 60
MODELS = {"lightningdit": "LightningDiT-T/2", "rae": "DiTDH-T/1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of Fashion-MNIST images of 32 pixels."""
    folder = tmp_path_factory.mktemp("fashion")
    pixels, labels = (
        np.frombuffer(gzip.decompress((DEBIAN / name).read_bytes())[skipped:], np.uint8)
        for name, skipped in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8))
    )
    chosen = np.flatnonzero(np.isin(labels, CHOSEN))[:IMAGES]
    pixels, labels = np.pad(pixels.reshape(-1, 28, 28)[chosen], ((0, 0), (2, 2), (2, 2))), labels[chosen]
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (folder / "images" / f"{label}-{CLASSES[label]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "images" / f"{label}-{CLASSES[label]}" / f"{i:05d}.png")
    np.savez(folder / "reference.npz", arr_0=np.repeat(pixels[..., None], 3, axis=-1), arr_1=labels)
    return folder


def encode(images: Path, out: Path, *flags) -> FeatureDataset:
    common = [f"--data-path={images / 'images'}", f"--vae={VAE}", "--image-size=32", "--num-workers=0"]
    run("extract_features.py", *common, f"--features-path={out}", *flags)
    return FeatureDataset(out)


@pytest.fixture(scope="module")
def encoded(images) -> FeatureDataset:
    """The latents of the images and of their mirror images."""
    return encode(images, images / "encoded")


@pytest.fixture(params=MODELS)
def trained_from(request, images, encoded, tmp_path) -> tuple[str, Path, list[str]]:
    """The recipe, a file of published statistics, and the flags that name features normalized with it."""
    z, y = encoded.__getitems__([(i, 0) for i in range(IMAGES)])
    z, statistics = encoded.normalization.invert(z), tmp_path / "statistics.pt"
    if request.param == "rae":
        torch.save({"mean": z.mean(0), "var": z.var(0)}, statistics)
        encode(images, tmp_path / "features", f"--latent-stats={statistics}", "--no-mirror")
        return "rae", statistics, [f"--data-path={tmp_path / 'features'}"]
    flipped = encoded.normalization.invert(encoded.__getitems__([(i, 1) for i in range(IMAGES)])[0])
    mean, std = (values.view(1, -1, 1, 1) for values in (z.mean((0, 2, 3)), z.std((0, 2, 3))))
    torch.save({"mean": mean, "std": std}, statistics)
    (tmp_path / "features").mkdir()
    tensors = {"latents": z.contiguous(), "latents_flip": flipped.contiguous(), "labels": y}
    save_file(tensors, tmp_path / "features" / "latents_rank00_shard000.safetensors")
    flags = [f"--data-path={tmp_path / 'features'}", f"--latent-stats={statistics}", f"--vae={VAE}"]
    return "lightningdit", statistics, [*flags, f"--num-classes={len(CHOSEN)}", "--image-size=32"]


def found_classes(folder: Path) -> float:
    """The part of the samples in which the study's classifier finds the requested class."""
    pixels = torch.from_numpy(sampled_images(folder)).permute(0, 3, 1, 2)
    with np.load(folder / "samples.npz") as file:
        labels = torch.from_numpy(file["arr_1"])
    _, _, logits = torch.export.load(CLASSIFIER).module()(pixels)
    return (logits.argmax(1) == torch.tensor(CHOSEN)[labels]).float().mean().item()


def test_from_images_to_scores(trained_from, images, tmp_path):
    recipe, statistics, data = trained_from
    model = MODELS[recipe]
    common = [*data, f"--recipe={recipe}", f"--results-dir={tmp_path}", "--global-batch-size=64", "--num-workers=0"]
    common += ["--sample-every=0", "--ema-decay=0.97", "--log-every=50"]

    def train(name, *flags) -> Path:
        run("train_fast.py", *common, f"--prefix={name}", *flags)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert ("cosine" in lines[0]) == (recipe == "lightningdit")
        return tmp_path / name

    def sample(name, ckpt, *flags) -> Path:
        few = [f"--num-fid-samples={SAMPLES}", "--num-sampling-steps=20", "--cfg-scale=2", "--cfg-all-channels"]
        few += ["--labels=equal", f"--sample-dir={tmp_path / 'samples'}", f"--per-proc-batch-size={SAMPLES}"]
        run("sample_ddp.py", "--ckpt", ckpt, f"--name={name}", *few, *flags)
        return tmp_path / "samples" / name

    start = train("start", f"--model={model}", "--max-steps=300", "--lr=6e-3", "--warmup=20")
    further = [f"--load-weight={start}", "--max-steps=100", "--lr=2e-3"]
    runs = {"continued": train("continued", f"--model={model}", *further)}
    runs["remix"] = train("remix", f"--model=Remix{model}", "--n-basis=4", "--n-experts=8", *further)
    samples = {name: sample(name, folder) for name, folder in runs.items()}
    found = {name: found_classes(folder) for name, folder in samples.items()}
    assert min(found.values()) >= 0.7, found

    files = [folder / "samples.npz" for folder in samples.values()]
    scores = tmp_path / "scores.json"
    run("evaluator.py", images / "reference.npz", *files, f"--weights={CLASSIFIER}", f"--json={scores}")
    assert all(0 < row["FID"] < 1000 for row in json.loads(scores.read_text()).values())

    # The continued model, written as a published file, gives the same samples with the published statistics.
    run("convert.py", runs["continued"], tmp_path / "continued.pt", f"--to={recipe}")
    # Its image size contradicts the published VAE, which files with four channels are read for.
    content = torch.load(tmp_path / "continued.pt", weights_only=True)
    torch.save({"ema": content.get("ema", content)}, tmp_path / "continued.pt")
    more = [f"--vae={VAE}", f"--latent-stats={statistics}"]
    again = sample("again", tmp_path / "continued.pt", *more)
    difference = np.abs(sampled_images(again).astype(int) - sampled_images(samples["continued"]))
    assert difference.mean() < 0.05
    run("convert.py", runs["remix"], tmp_path / "expert.pt", f"--to={recipe}", "--expert=5")
    remix, _ = load_model(runs["remix"])
    content = torch.load(tmp_path / "expert.pt", weights_only=True)
    torch.save({"ema": content.get("ema", content)}, tmp_path / "expert.pt")
    expert, config = load_model(tmp_path / "expert.pt")
    assert config["model"]["architecture"] == find_model(model).backbone.name
    x, y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    t = torch.full((2,), 1 - sum(remix.boundaries[5:7]) / 2)
    with torch.no_grad():
        assert relative(expert(x, t, y), remix(x, t, y)) < 1e-5
