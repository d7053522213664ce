"""Evaluate samples against a reference: Inception Score, FID, sFID, Precision and Recall as defined by ADM's evaluator.

    python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/NAME/samples.npz

The reference and the samples are each an .npz file, a folder of images or a folder of sample_ddp.py. An .npz file holds
images (arr_0, uint8 [n, H, W, 3]), statistics (mu, sigma, mu_s, sigma_s, as in ADM's reference files) or both.
Statistics in a file are used instead of statistics computed from its images. The features come from ADM's Inception
network, converted by torch-fidelity, or from any exported program. The features of a file are cached under the hash of
its contents.

    python evaluator.py data/my_images.npz --fit-classifier data/classifier.pt2

trains a small classifier on labelled images and writes it as such a program, for --weights.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from evaluation.files import (
    STATISTICS,
    check_file,
    compare_sizes,
    has_images,
    has_statistics,
    read_images,
    read_network,
)
from evaluation.networks import (
    FEATURE_BATCH,
    FeatureExtractor,
    check_networks,
    image_features,
    load_dinov2,
    make_extractor,
    network_name,
)
from evaluation.scores import (
    RESAMPLES,
    fid_bias,
    fid_std,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from features.images import find_files
from runtime.command_line import ArgumentParser, counted, positive_int, run_script
from runtime.errors import UserError
from runtime.files import SETTINGS, atomic_write, cache_folder, check_unused, write_json

# Names that other programs import from this file.
__all__ = ["frechet_distance", "inception_score", "precision_recall"]
# Published tables use this number of samples.
STANDARD_COUNT = 50_000
EXTRA_SCORES = {"kid": "KID", "fd-dinov2": "FD-DINOv2"}
# The name of a score's standard deviation is that of the score with this ending.
STD = " std"
# What may differ between samples of several seeds: the same checkpoint may be called by different paths.
SEED_ONLY = ("global_seed", "save_png", "ckpt", "guide_ckpt")


def main(args: argparse.Namespace):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.fit_classifier:
        return fit(args, device)

    # Check the flags and every input file.
    if not args.samples and not args.save_stats:
        raise UserError("no samples to score: list sample files after the reference, or use --save-stats")
    # The files of the samples, by what the user calls them.
    files = {path: samples_of(path) for path in args.samples}
    args.reference = samples_of(args.reference)
    paths = [args.reference, *files.values()]
    for path in paths:
        check_file(path)
        print_left_out(path)
    for flag, path in (("json", args.json), ("save-stats", args.save_stats)):
        if path and Path(path).is_dir():
            raise UserError(f"--{flag} {path} is a folder: name a file")
    network = network_name(args.weights)

    # Set up the feature networks, and run each of them on two images of every file that is not in the cache.
    for path in paths:
        check_networks(args.reference, path, network)
    cache = None if str(args.cache) == "none" else Path(args.cache)
    extra = args.also or []
    extractors = {"": make_extractor(args.weights, cache, args.batch_size, device)}
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

    # Score the sample files one after the other, and print the results when all progress bars have ended.
    results, notes = {}, []
    for name, path in files.items():
        sample = image_features(path, extractors)
        check_match(args.reference, ref, path, sample)
        results[name] = evaluate(ref, sample, extra, device)
        notes += describe_notes(args.reference, ref, path, sample, results[name])
    for note in notes:
        print(note, file=sys.stderr)
    if len(results) == 1:
        print_scores(*results.values())
    elif results:
        print_table(results | means_over_seeds(results))

    if args.json and results:
        # JSON has no nan.
        results = {
            path: {key: None if math.isnan(value) else value for key, value in scores.items()}
            for path, scores in results.items()
        }
        write_json(args.json, results[args.samples[0]] if len(args.samples) == 1 else results)


def fit(args: argparse.Namespace, device: torch.device):
    """Train and write the classifier of --fit-classifier, and print its accuracy.

    Raises:
        UserError: if other flags of scores are given, or the file's name does not end in .pt2.
    """
    from evaluation.classifier import write_classifier

    out = Path(args.fit_classifier)
    if args.samples or args.weights or args.also or args.json or args.save_stats:
        raise UserError(
            "--fit-classifier takes labelled images only: score samples with a second command and --weights"
        )
    if out.suffix != ".pt2":
        raise UserError(f"--fit-classifier {out}: the file name must end in .pt2")
    check_unused(out)
    check_file(args.reference)
    print(write_classifier(args.reference, out, device))


def samples_of(path: str) -> str:
    """Return the file of samples in a folder of sample_ddp.py, and any other path as it is.

    Raises:
        UserError: if the sampling into this folder has not finished.
    """
    folder = Path(path)
    if sample_settings(folder) is None:
        return path
    if not (folder / "samples.npz").is_file():
        raise UserError(f"{path} holds no samples.npz: the sampling has not finished, run its command again")
    return str(folder / "samples.npz")


def sample_settings(folder: Path) -> dict | None:
    """Return the settings that sample_ddp.py recorded in a folder; None if it is not a folder of samples."""
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        return settings if "num_fid_samples" in settings else None
    except (OSError, ValueError, TypeError):
        return None


def means_over_seeds(results: dict[str, dict]) -> dict[str, dict]:
    """Return the means and standard deviations of samples that differ only in their seeds, by what to call them.

    Args:
        results: the scores by the path of the samples.
    """
    groups: dict[str, dict[int, str]] = {}
    for path in results:
        settings = sample_settings(Path(path)) or sample_settings(Path(path).parent)
        if settings:
            # Later versions record more settings, as None where they have no meaning.
            key = {name: value for name, value in settings.items() if name not in SEED_ONLY and value is not None}
            # The same samples may be given twice.
            groups.setdefault(json.dumps(key), {}).setdefault(settings.get("global_seed"), path)
    means = {}
    for group in groups.values():
        paths = [*group.values()]
        if len(paths) > 1:
            means[f"mean of {len(paths)} seeds, from {paths[0]}"] = {
                key: statistic([results[path][score] for path in paths])
                for score in results[paths[0]]
                if not score.endswith(STD)
                for key, statistic in ((score, np.mean), (score + STD, partial(np.std, ddof=1)))
            }
    return means


def check_match(reference, ref: dict, path, sample: dict):
    """Raise UserError if two files have different numbers of features, or features that are not finite."""
    for name, key in (("pooled", "mu"), ("spatial", "mu_s")):
        if len(ref[key]) != len(sample[key]):
            raise UserError(f"{reference} has {len(ref[key])} {name} features, {path} has {len(sample[key])}")
    for file, features in ((reference, ref), (path, sample)):
        if not all(np.isfinite(values).all() for values in features.values()):
            raise UserError(f"the features of {file} are not finite")


def evaluate(ref: dict, sample: dict, extra: list[str], device: torch.device) -> dict[str, float]:
    """Compute all scores.

    Args:
        ref: features of the reference, from `image_features`.
        sample: features of the samples, likewise.
        extra: names of further scores, of EXTRA_SCORES.
        device: device that computes precision, recall and KID.

    Returns:
        The scores by name. Inception Score is nan if the samples hold no images. Precision, Recall and the extra scores
        are nan if one of the files holds no images. Those of FID and KID are followed by their standard deviations;
        that of FID is nan if there are as many samples as usual, or no images of them.
    """
    missing = float("nan")
    scores = {
        "Inception Score": float(sample.get("inception_score", missing)),
        "FID": frechet_distance(ref["mu"], ref["sigma"], sample["mu"], sample["sigma"]),
        "FID std": missing,
        "sFID": frechet_distance(ref["mu_s"], ref["sigma_s"], sample["mu_s"], sample["sigma_s"]),
        "Precision": missing,
        "Recall": missing,
    }
    for name in extra:
        scores[EXTRA_SCORES[name]] = missing
        if name == "kid":
            scores["KID std"] = missing
    if len(sample.get("pools", ())) in range(1, STANDARD_COUNT):
        scores["FID std"] = fid_std(ref["mu"], ref["sigma"], torch.from_numpy(sample["pools"]).to(device))
    if "pools" in ref and "pools" in sample:
        pooled = [torch.from_numpy(features["pools"]).to(device) for features in (ref, sample)]
        scores["Precision"], scores["Recall"] = precision_recall(*pooled)
        if "kid" in extra:
            scores["KID"], scores["KID std"] = kernel_distance(*pooled)
    if "mu_dinov2" in ref and "mu_dinov2" in sample:
        statistics = [features[key] for features in (ref, sample) for key in ("mu_dinov2", "sigma_dinov2")]
        scores["FD-DINOv2"] = frechet_distance(*statistics)
    return scores


def describe_notes(reference, ref: dict, path, sample: dict, scores: dict[str, float]) -> list[str]:
    """Say which scores are missing, and how FID depends on the number of samples if that is not STANDARD_COUNT."""
    notes = []
    without_images = [str(file) for file in (reference, path) if not has_images(file)]
    if without_images:
        missing = ", ".join(key for key, value in scores.items() if math.isnan(value) and not key.endswith(STD))
        notes.append(f"note: {missing} need images, and there are none in {' and '.join(without_images)}")
    if has_images(path):
        size = next(read_images(path, 1))[0].shape[1:3]
        if difference := compare_sizes(reference, f"the images of {path}", size):
            notes.append(f"warning: {difference}")
    if not has_images(path) or has_statistics(path) or len(sample["pools"]) == STANDARD_COUNT:
        return notes
    count, width = sample["pools"].shape
    bias = fid_bias(ref["mu"], ref["sigma"], torch.from_numpy(sample["pools"]), scores["FID"])
    # FID is linear in 1 / count only if each half of the samples has more images than features.
    about = "about" if count > 2 * width else "very roughly"
    notes.append(
        f"warning: {path} has {count:,} images instead of the usual {STANDARD_COUNT:,}, which changes its FID by "
        f"{about} {bias * (1 - count / STANDARD_COUNT):+.3g} ({bias:+.3g} relative to infinitely many images; "
        f"arXiv 1911.07023); FID std is that of {counted(RESAMPLES, 'bootstrap sample')}"
    )
    return notes


def with_std(name: str, scores: dict[str, float], between: str) -> str:
    """Return a score as text, with its standard deviation if there is one."""
    std = scores.get(name + STD, float("nan"))
    text = format_score(name, scores[name])
    return text if math.isnan(std) else f"{text}{between}{format_score(name, std)}"


def print_scores(scores: dict[str, float]):
    """Print one score per line, and all of them as a row of a LaTeX table unless a score is missing."""
    names = [name for name in scores if not name.endswith(STD)]
    for key, value in scores.items():
        if key in names or not math.isnan(value):
            print(f"{key}: {value}")
    # Scores are nan if a file holds no images.
    if not any(math.isnan(scores[name]) for name in names):
        print(" & ".join(with_std(name, scores, r" $\pm$ ") for name in names) + r" \\")


def print_table(results: dict[str, dict[str, float]]):
    """Print the scores of several files as a table."""
    names = [name for name in next(iter(results.values())) if not name.endswith(STD)]
    rows = [["", *names]]
    rows += [[path, *(with_std(name, scores, " ± ") for name in names)] for path, scores in results.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (text.rjust(max(8, width)) for text, width in zip(row[1:], widths[1:], strict=True))
        print(row[0].ljust(widths[0]), *cells, sep="  ")


def format_score(name: str, value: float) -> str:
    return f"{value:.{5 if name == 'KID' else 2}f}"


def print_left_out(folder):
    """Print how many files below a folder are not read, because they are hidden or of other kinds."""
    for note in find_files(folder).notes():
        print(f"note: {folder}: {note}", file=sys.stderr)


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
        help=".npz of images (arr_0), of statistics (mu, sigma, mu_s, sigma_s) or of both, a folder of images, or a "
        "folder of sample_ddp.py; extract_features.py --reference writes one of your own images",
    )
    parser.add_argument("samples", nargs="*", help="same formats; several are printed as a table")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="torch-fidelity's Inception weights (.pth) or an exported program (.pt2); default: download the weights",
    )
    parser.add_argument("--batch-size", type=positive_int, default=FEATURE_BATCH, help="images per batch")
    parser.add_argument(
        "--also",
        type=extra_scores,
        metavar="NAMES",
        help="further scores: kid (not multiplied by 1,000), fd-dinov2 (torch.hub downloads and runs "
        "facebookresearch/dinov2), or kid,fd-dinov2",
    )
    parser.add_argument(
        "--fit-classifier",
        metavar="PT2",
        help="instead of scoring, train a small classifier on the reference, which must hold labels (arr_1), and write "
        "it to this file for --weights; its accuracy on held-out images is printed",
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
