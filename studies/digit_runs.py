"""What the two studies of handwritten digits share: the encoded splits, the training runs and the scores."""

import json
from pathlib import Path

import runs

from common import flags

# Divisible by every number of experts per batch that is tried.
BATCH = 80
PRETRAINING = dict(model="DiT-T/4", lr=2e-3)


def prepare(work: Path):
    """Write and encode the splits of the digits, and train the classifier, unless they exist."""
    if not (work / "digits" / "classifier.pt2").exists():
        runs.run("studies/digits.py", *flags(out=work / "digits"))
    for split in ("train", "validation", "heldout"):
        if not (work / split / "index.json").exists():
            folders = flags(data_path=work / "digits" / split, features_path=work / split)
            pixels = flags(vae="none", image_size=8, grayscale=True, mirror=False, num_workers=0)
            runs.run("extract_features.py", *folders, *pixels)


def train(work: Path, prefix: str, independent: int = 1, **values) -> list[Path]:
    """Run train_fast.py on the digits, see `runs.train`."""
    common = dict(data_path=work / "train", global_batch_size=BATCH, ema_decay=0.999)
    return runs.train(work / "runs", prefix, independent, **common, **values)


def pretrain(work: Path, seed: int, steps: int) -> Path:
    """Train the model that a seed's variants start from, and return its checkpoint."""
    return train(work, f"pretrained-{seed}", max_steps=steps, global_seed=seed, **PRETRAINING)[0]


def sample_and_score(work: Path, checkpoints: list[Path], name: str, scores: Path, **sampling) -> dict[str, float]:
    """Run sample_ddp.py without guidance and evaluator.py against the held-out digits.

    Args:
        work: Folder of the study.
        checkpoints: Checkpoints to sample from.
        name: Folder of the samples, below work/samples.
        scores: JSON file of the scores to write.
        **sampling: Further flags of sample_ddp.py.

    Returns:
        The scores by name.
    """
    output = flags(ckpt=checkpoints, cfg_scale=1, sample_dir=work / "samples", name=name)
    runs.run("sample_ddp.py", *output, *flags(**sampling))
    files = work / "digits" / "heldout.npz", work / "samples" / name / "samples.npz"
    runs.run("evaluator.py", *files, *flags(weights=work / "digits" / "classifier.pt2", batch_size=500, json=scores))
    return json.loads(scores.read_text())
