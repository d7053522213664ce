"""Evaluate samples against a reference: Inception Score, FID, sFID, Precision and Recall as defined by ADM's evaluator.

    python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/NAME/samples.npz

The reference and the samples are each an .npz file or a folder of images. An .npz file holds images (arr_0, uint8
[n, H, W, 3]), statistics (mu, sigma, mu_s, sigma_s, as in ADM's reference files) or both. Statistics in a file are used
instead of statistics computed from its images. The features come from ADM's Inception network, converted by
torch-fidelity, or from any exported program. The features of a file are cached under the hash of its contents.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

from evaluation.files import STATISTICS, check_file, has_images, has_statistics, read_network
from evaluation.networks import (
    FEATURE_BATCH,
    FeatureExtractor,
    check_networks,
    image_features,
    load_dinov2,
    make_extractor,
    network_name,
)
from evaluation.scores import fid_bias, frechet_distance, inception_score, kernel_distance, precision_recall
from features.images import find_files
from runtime.command_line import ArgumentParser, positive_int, run_script
from runtime.errors import UserError
from runtime.files import atomic_write, cache_folder, write_json

# Names that other programs import from this file.
__all__ = ["frechet_distance", "inception_score", "precision_recall"]
# Published tables use this number of samples.
STANDARD_COUNT = 50_000
EXTRA_SCORES = {"kid": "KID", "fd-dinov2": "FD-DINOv2"}


def main(args: argparse.Namespace):
    # Check the flags and every input file.
    if not args.samples and not args.save_stats:
        raise UserError("no samples to score: list sample files after the reference, or use --save-stats")
    paths = [args.reference, *args.samples]
    for path in paths:
        check_file(path)
        print_left_out(path)
    for flag, path in (("json", args.json), ("save-stats", args.save_stats)):
        if path and Path(path).is_dir():
            raise UserError(f"--{flag} {path} is a folder: name a file")
    network = network_name(args.weights)

    # Set up the feature networks, and run each of them on two images of every file that is not in the cache.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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

    # Score the sample files one after the other.
    results = {}
    for path in args.samples:
        sample = image_features(path, extractors)
        check_match(args.reference, ref, path, sample)
        scores = evaluate(ref, sample, extra, device)
        print_notes(args.reference, ref, path, sample, scores)
        if len(args.samples) == 1:
            print_scores(scores)
        else:
            print_row(path, scores, width=max(map(len, args.samples)), header=not results)
        results[path] = scores

    if args.json and results:
        # JSON has no nan.
        results = {
            path: {key: None if math.isnan(value) else value for key, value in scores.items()}
            for path, scores in results.items()
        }
        write_json(args.json, results[args.samples[0]] if len(args.samples) == 1 else results)


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
        are nan if one of the files holds no images.
    """
    missing = float("nan")
    scores = {
        "Inception Score": float(sample.get("inception_score", missing)),
        "FID": frechet_distance(ref["mu"], ref["sigma"], sample["mu"], sample["sigma"]),
        "sFID": frechet_distance(ref["mu_s"], ref["sigma_s"], sample["mu_s"], sample["sigma_s"]),
        "Precision": missing,
        "Recall": missing,
        **{EXTRA_SCORES[name]: missing for name in extra},
    }
    if "pools" in ref and "pools" in sample:
        pooled = [torch.from_numpy(features["pools"]).to(device) for features in (ref, sample)]
        scores["Precision"], scores["Recall"] = precision_recall(*pooled)
        if "kid" in extra:
            scores["KID"] = kernel_distance(*pooled)
    if "mu_dinov2" in ref and "mu_dinov2" in sample:
        statistics = [features[key] for features in (ref, sample) for key in ("mu_dinov2", "sigma_dinov2")]
        scores["FD-DINOv2"] = frechet_distance(*statistics)
    return scores


def print_notes(reference, ref: dict, path, sample: dict, scores: dict[str, float]):
    """Print which scores are missing, and how much FID changes if the number of samples is not STANDARD_COUNT."""
    without_images = [str(file) for file in (reference, path) if not has_images(file)]
    if without_images:
        missing = ", ".join(key for key, value in scores.items() if math.isnan(value))
        files = " and ".join(without_images)
        print(f"note: {missing} need images, and there are none in {files}", file=sys.stderr)
    if not has_images(path) or has_statistics(path) or len(sample["pools"]) == STANDARD_COUNT:
        return
    count, width = sample["pools"].shape
    bias = fid_bias(ref["mu"], ref["sigma"], torch.from_numpy(sample["pools"]), scores["FID"])
    # FID is linear in 1 / count only if each half of the samples has more images than features.
    about = "about" if count > 2 * width else "very roughly"
    print(
        f"warning: {path} has {count:,} images instead of the usual {STANDARD_COUNT:,}, which changes its FID by "
        f"{about} {bias * (1 - count / STANDARD_COUNT):+.3g} ({bias:+.3g} relative to infinitely many images; "
        "arXiv 1911.07023)",
        file=sys.stderr,
    )


def print_scores(scores: dict[str, float]):
    """Print one score per line, and all of them as a row of a LaTeX table unless a score is missing."""
    for key, value in scores.items():
        print(f"{key}: {value}")
    # Scores are nan if a file holds no images.
    if not any(map(math.isnan, scores.values())):
        print(" & ".join(format_score(key, value) for key, value in scores.items()) + r" \\")


def print_row(path: str, scores: dict[str, float], width: int, header: bool):
    """Print the scores of one of several files as a row of a table, below the table's header if `header`."""
    if header:
        print(" " * width, *(f"{key:>8}" for key in scores), sep="  ")
    cells = (format_score(key, value).rjust(max(8, len(key))) for key, value in scores.items())
    print(path.ljust(width), *cells, sep="  ", flush=True)


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
        help=".npz of images (arr_0), of statistics (mu, sigma, mu_s, sigma_s) or of both, or a folder of images",
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
        help="further scores: kid, fd-dinov2 (torch.hub downloads and runs facebookresearch/dinov2), or kid,fd-dinov2",
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
