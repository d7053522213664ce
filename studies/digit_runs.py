"""What the studies of samplers and of flow matching share: the encoded splits, the training runs and the scores."""

import shutil
from pathlib import Path

import runs

from runtime.command_line import flags


def prepare(work: Path):
    """Write and encode the splits of the digits, and train the classifier, unless they exist."""
    if not (work / "digits" / "classifier.pt2").exists():
        runs.run("studies/digits.py", *flags(out=work / "digits"))
    for split in ("train", "heldout"):
        if not (work / split / "index.json").exists():
            folders = flags(data_path=work / "digits" / split, features_path=work / split)
            pixels = flags(vae="none", image_size=8, grayscale=True, mirror=False, num_workers=0)
            runs.run("extract_features.py", *folders, *pixels)


def train(work: Path, prefix: str, **values) -> Path:
    """Train a DiT on the digits from scratch, see `runs.train`, and return its checkpoint."""
    common = dict(data_path=work / "train", model="DiT-T/4", global_batch_size=80, lr=2e-3, ema_decay=0.999)
    return runs.train(work / "runs", prefix, **common, **values)[0]


def sample_and_score(
    work: Path, checkpoint: Path, name: str, scores: Path, sampler: str, steps: int | None, seed: int, n_samples: int
):
    """Run sample_ddp.py without guidance and evaluator.py against the held-out digits. The samples are not kept.

    Args:
        work: folder of the study.
        checkpoint: checkpoint to sample from.
        name: folder of the samples, below work/samples.
        scores: JSON file of the scores to write.
        sampler: a sampler of sample_ddp.py.
        steps: number of sampling steps; None if the sampler chooses them.
        seed: seed of the samples.
        n_samples: number of samples.
    """
    output = flags(ckpt=checkpoint, cfg_scale=1, sample_dir=work / "samples", name=name)
    sampling = dict(num_fid_samples=n_samples, num_sampling_steps=steps, sampler=sampler)
    runs.run("sample_ddp.py", *output, *flags(**sampling, global_seed=seed, per_proc_batch_size=500))
    files = work / "digits" / "heldout.npz", work / "samples" / name / "samples.npz"
    runs.run("evaluator.py", *files, *flags(weights=work / "digits" / "classifier.pt2", batch_size=500, json=scores))
    shutil.rmtree(work / "samples" / name)
