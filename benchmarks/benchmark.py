"""Measure the whole path on this machine, beside what it is compared with and, for what computes, its floor.

    python benchmarks/benchmark.py --model S/2 --batch-size 8 --precision bf16

Compared things take turns, step by step, in one process, so that what else the machine does falls on both alike; times
are medians after a warm-up, on GPUs by device events. Floors are the bytes and FLOPs of this design, one after the other, over
the copy bandwidth and the matrix product rate measured here. Results: <out>/<name>.json, and <name>.md for people.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ArgumentParser, UserError, atomic_write, number, positive_int, run_script
from diffusion import create_diffusion
from distributed import PRECISIONS, World, setup
from features import SHARD_SIZE, FeatureDataset, write_index, write_shard
from models import DiT_models, classifier_free_guidance
from remix import FoldedRemixDiT, RemixDiT, RemixLinear
from training.batches import BatchSampler, sample_timesteps
from training.plan import matmul_rate, training_flops
from training.trainer import Trainer

N_BASIS, N_EXPERTS = 4, 20
STEPS_OF_A_CHAIN = 250  # DDPM's, of which the sampling part runs a contiguous piece


def main(args: argparse.Namespace):
    world = setup()
    floors = measure_floors(world, args.precision)
    results = {"machine": describe_machine(world), "settings": vars(args), "floors": floors}
    lines = [f"# {args.name or default_name(args, world)}", "", "`" + " ".join(["python", *sys.argv]) + "`", ""]
    lines += [f"{key}: {value}  " for key, value in results["machine"].items()]
    lines += [f"copy bandwidth: {floors['copy_gb_s']:.1f} GB/s (bytes read and written)  "]
    lines += [f"matrix product: {floors['tflops']:.2f} TFLOP/s in {args.precision}  "]
    name = args.name or default_name(args, world)
    for part in args.parts:
        results[part] = PARTS[part](args, world, floors)
        lines += ["", f"## {part}", "", *table(results[part])]
        for suffix, text in (("json", json.dumps(results, indent=1, default=str)), ("md", "\n".join(lines))):
            with atomic_write(args.out / f"{name}.{suffix}") as temporary:  # what is measured is kept if the next fails
                temporary.write_text(text + "\n")
    print("\n".join(lines), f"\n\nwrote {args.out / name}.json and .md")


# What the machine is, and can


def describe_machine(world: World) -> dict:
    """Device, versions, commit."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else f"{cpu}, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}"
        + (f", CUDA {torch.version.cuda}" if cuda else ""),
        "commit": os.environ.get("COMMIT") or commit or "unknown",  # a copy without .git is told by its environment
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def default_name(args: argparse.Namespace, world: World) -> str:
    device = torch.cuda.get_device_name(world.device).split()[-1] if world.device.type == "cuda" else "cpu"
    compiled = "compiled" if args.compile else "eager"
    return f"{device}-{args.model}-b{args.batch_size}-{args.precision}-{compiled}".replace("/", "").lower()


def measure_floors(world: World, precision: str) -> dict:
    source = torch.randn(2**26, device=world.device)
    target = torch.empty_like(source)
    seconds = min(Clock(world).time(lambda: target.copy_(source)) for _ in range(6))
    return {
        "copy_gb_s": 2 * source.nbytes / seconds / 1e9,
        "tflops": matmul_rate(world.device, precision, 50) / 1e12,
    }


class Clock:
    """Times named stages by device events on GPUs, and else by the host's clock."""

    def __init__(self, world: World):
        self.cuda, self.marks = world.device.type == "cuda", []

    def mark(self, stage: str):
        """The end of a stage, which began at the mark before."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((stage, event))
        else:
            self.marks.append((stage, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Seconds of each stage since the last reading, and of all as "total". Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        stages, marks, self.marks = {}, self.marks, []
        for (_, before), (stage, now) in pairwise(marks):
            seconds = before.elapsed_time(now) / 1e3 if self.cuda else now - before
            stages[stage] = stages.get(stage, 0) + seconds
        return stages | {"total": sum(stages.values())}

    def time(self, function) -> float:
        self.mark("start")
        function()
        self.mark("end")
        return self.read()["total"]


def peak_memory(world: World, function) -> int:
    """Bytes by which memory in use rises, at most, above what it is at rest, while `function` runs. 0 where nothing tells."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - rest
    status = Path("/proc/self/status")
    if not status.exists():
        return 0

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    rest = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    function()
    return field("VmHWM") - rest


def take_turns(args, clocks: dict[str, Clock], runs: dict) -> dict[str, list[dict]]:
    """Run each of `runs` (name -> function of the round), in turns, and read its clock: name -> the rounds' stages."""
    times = {name: [] for name in runs}
    for turn in tqdm(range(args.warmup + args.rounds), desc="rounds", disable=None):
        for name, run in runs.items():
            clocks[name].mark("start")
            run(turn)
            stages = clocks[name].read()
            if turn >= args.warmup:
                times[name].append(stages)
    return times


def median(rounds: list[dict], stage: str = "total") -> float:
    return statistics.median(stages.get(stage, 0) for stages in rounds)


def ratio(rounds: list[dict], reference: list[dict]) -> float:
    """The reference's time over this one's: the median over the turns, in which both met the same machine."""
    return statistics.median(theirs["total"] / ours["total"] for ours, theirs in zip(rounds, reference, strict=True))


def table(rows: list[dict]) -> list[str]:
    """Rows as a Markdown table; the columns are those of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value) -> str:
        return "" if value is None else value if isinstance(value, str) else f"{value:,.4g}"

    lines = [columns, ["---"] * len(columns), *([text(row.get(key)) for key in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


# Training


def training(args, world: World, floors: dict) -> list[dict]:
    """The whole step of DiT, of RemixDiT at several numbers of experts a batch, and of DiT trained the usual way."""
    diffusion = create_diffusion()
    torch.manual_seed(0)
    dit = DiT_models[f"DiT-{args.model}"](input_size=args.input_size)
    images = torch.randn(args.batch_size, dit.in_channels, args.input_size, args.input_size, device=world.device)
    noise, y = torch.randn_like(images), torch.zeros(args.batch_size, dtype=torch.long, device=world.device)
    label_drop = torch.zeros(args.batch_size, dtype=torch.bool, device=world.device)
    flops, runs, clocks, states = training_flops(dit.config) * args.batch_size, {}, {}, {}

    def batch(turn: int, groups: int | None):
        n = N_EXPERTS if groups else 1
        t = torch.from_numpy(sample_timesteps(0, turn, args.batch_size, n, groups or 1))
        conditions = {"y": y, "label_drop": label_drop} | ({"groups": groups} if groups else {})
        return [(images, t.to(world.device, non_blocking=True), conditions, noise)]

    def add(name: str, model, groups: int | None):
        clocks[name] = Clock(world)
        trainer = Trainer(model, diffusion, world, lr=1e-5, precision=args.precision, compile=args.compile)
        trainer.mark = clocks[name].mark

        def run(turn: int):
            for i in range(args.steps):
                trainer.step(turn * args.steps + i, batch(turn * args.steps + i, groups), 1e-4)

        runs[name] = run
        bases = [p for layer in model.modules() if isinstance(layer, RemixLinear) for p in layer.parameters()]
        states[name] = sum(p.numel() for p in trainer.trained), sum(p.numel() for p in bases)

    if not args.skip_usual:
        runs["DiT, the usual way"], clocks["DiT, the usual way"] = usual_training(args, world, dit, diffusion, batch)
    add("DiT", copy.deepcopy(dit), None)
    for groups in args.experts_per_batch:
        if args.batch_size % groups:
            raise UserError(f"--experts-per-batch {groups} does not divide --batch-size {args.batch_size}")
        add(f"RemixDiT G={groups}", RemixDiT(dit, N_BASIS, N_EXPERTS), groups)
    times = take_turns(args, clocks, runs)
    rows = []
    for name, rounds in times.items():
        row = {"model": name, "ms/step": median(rounds) / args.steps * 1e3}
        row["images/s"] = args.batch_size / row["ms/step"] * 1e3
        row["MFU"] = flops / args.batch_size * row["images/s"] / floors["tflops"] / 1e12
        row["speed / DiT"] = ratio(rounds, times["DiT"])
        if "DiT, the usual way" in times:
            row["speed / usual"] = ratio(rounds, times["DiT, the usual way"])
        if name in states:
            trained, mixed = states[name]
            groups = int(name.partition("G=")[2] or 0)
            row["floor ms"] = 1e3 * step_floor(flops, trained, mixed, groups, floors, args.precision)
            plain = 1e3 * step_floor(flops, states["DiT"][0], 0, 0, floors, args.precision)
            row["floor's speed / DiT"] = plain / row["floor ms"]
            rest = 5 * 4 * trained  # weights, their average, AdamW's moments, gradients
            row["peak GiB"] = (rest + peak_memory(world, partial(runs[name], args.warmup + args.rounds))) / 2**30
            for stage in ("forward", "backward", "checks", "optimizer", "ema"):
                row[f"{stage} %"] = 100 * median(rounds, stage) / median(rounds)
        rows.append(row)
    return rows


def step_floor(flops: int, trained: int, bases: int, groups: int, floors: dict, precision: str) -> float:
    """Seconds that a step takes if its matrix products and the bytes of its weights run at the rates measured here.

    For each of `trained` numbers (float32) AdamW reads it, its gradient and two moments and writes three of them; the
    average reads both and writes one; the gradient is written once, and read once to see that it is finite: 12 passes.
    A product's weight is read and rounded once (written), read forward and backward, and its gradient written and read,
    all but the first in `precision`. Of the trained numbers `bases` are mixed: they are read twice, for the mixtures and for
    the coefficients' gradient, and the rest is done with `groups` mixtures.
    """
    width = torch.finfo(PRECISIONS[precision]).bits // 8
    weights = (4 + 5 * width) * (trained - bases) + 2 * 4 * bases + 5 * width * groups * bases // N_BASIS
    return flops / floors["tflops"] / 1e12 + (4 * 12 * trained + weights) / floors["copy_gb_s"] / 1e9


def usual_training(args, world: World, dit, diffusion, batch):
    """A step as training scripts have it: eager, fp32, AdamW as it comes, the average by a loop, loss.item() each step."""
    model = copy.deepcopy(dit).to(world.device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0)
    clock = Clock(world)

    def run(turn: int):
        for i in range(args.steps):
            x, t, conditions, noise = batch(turn * args.steps + i, None)[0]
            loss = diffusion.training_losses(model, x, t, conditions, noise)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.mul_(0.9999).add_(fast, alpha=1e-4)
            loss.item()
            clock.mark("step")

    return run, clock


# Sampling


@torch.no_grad()
def sampling(args, world: World, floors: dict) -> list[dict]:
    """A guided DDPM step of a plain DiT, of a RemixDiT folded, and of one that mixes its bases in every step."""
    diffusion = create_diffusion(str(STEPS_OF_A_CHAIN))
    original = [int(t) for t in diffusion.timestep_map]
    torch.manual_seed(0)
    dit = DiT_models[f"DiT-{args.model}"](input_size=args.input_size).to(world.device).eval()
    remix = RemixDiT(dit, N_BASIS, N_EXPERTS).to(world.device).eval()
    folded = FoldedRemixDiT(remix)
    run_guided = torch.compile(classifier_free_guidance) if args.compile else classifier_free_guidance
    shape = (args.batch_size, dit.in_channels, args.input_size, args.input_size)
    y = torch.cat([torch.zeros(len_ := args.batch_size, dtype=torch.long), torch.full((len_,), dit.num_classes)])
    y, clocks = y.to(world.device), {}

    def chain(name: str, network_at):
        clocks[name] = Clock(world)

        def run(turn: int):
            x = torch.randn(shape, device=world.device)
            for i in range(args.sampling_steps):
                step = STEPS_OF_A_CHAIN - 1 - (turn * args.sampling_steps + i) % STEPS_OF_A_CHAIN
                network = network_at(original[step])

                def denoise(x, t, network=network):
                    with world.autocast(args.precision):
                        return run_guided(network, torch.cat([x, x]), torch.cat([t, t]), y, 1.5, 3)[: len(x)]

                x = diffusion.p_sample(denoise, x, torch.full((len(x),), step, device=x.device), False)["sample"]
            clocks[name].mark("steps")

        return run

    class Mixed(torch.nn.Module):
        def forward(self, x, t, y):
            return remix(x, t, y, groups=1)

    mixed = Mixed()
    runs = {"DiT": chain("DiT", lambda t: dit), "folded": chain("folded", folded.at)}
    runs["mixed in every step"] = chain("mixed in every step", lambda t: mixed)
    times = take_turns(args, clocks, runs)

    def total(rounds: list[dict]) -> float:
        return sum(stages["total"] for stages in rounds)

    flops = training_flops(dit.config) / 3 * 2 * args.batch_size
    return [
        {
            "model": name,
            "ms/step": total(rounds) / len(rounds) / args.sampling_steps * 1e3,
            "speed / DiT": total(times["DiT"]) / total(rounds),  # not by medians: folding is rare, and counts
            "floor ms": flops / floors["tflops"] / 1e9,
        }
        for name, rounds in times.items()
    ]


# Data


def data(args, world: World, floors: dict) -> list[dict]:
    """Packed features as training reads them, by two processes: all shards open, or none, as among ImageNet's thousands."""
    import features

    rows, kept_open = [], features.OPEN_SHARDS
    with tempfile.TemporaryDirectory() as folder:
        shards = 2 if args.toy else 8
        shape = (4, args.input_size, args.input_size)
        for shard in range(shards):
            array = np.random.default_rng(shard).standard_normal((SHARD_SIZE, 2, *shape), np.float32)
            write_shard(folder, shard, array, np.zeros(SHARD_SIZE), [])
        write_index(folder, shards, vae="ema", scale=0.18215, image_size=8 * args.input_size, classes=["one"])
        sampler = BatchSampler(0, args.data_batch_size, world)
        n = 5 if args.toy else 100
        for open_shards in (kept_open, 1):
            features.OPEN_SHARDS = open_shards
            try:
                with sampler.load(FeatureDataset(folder), range(n + 10), num_workers=2) as batches:
                    for _ in range(10):
                        next(batches)
                    start = time.perf_counter()
                    for _ in tqdm(range(n), desc="loading", disable=None):
                        next(batches)[0].to(world.device, non_blocking=True)
                    rate = n * args.data_batch_size / (time.perf_counter() - start)
            finally:
                features.OPEN_SHARDS = kept_open
            what = "shards stay open" if open_shards > 1 else "each image opens its shard"
            gb_s = 4 * int(np.prod(shape)) * rate / 1e9
            rows.append({"loader (2 processes)": what, "images/s": rate, "GB/s": gb_s, "needed images/s": 2000})
    return rows


def extraction(args, world: World, floors: dict) -> list[dict]:
    """Images decoded, cropped and encoded: by both ends together, and by each alone. The VAE's weights are random."""
    from diffusers import AutoencoderKL
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from autoencoder import load_autoencoder
    from extract_features import Crops, encode, join

    small = args.toy or world.device.type == "cpu"
    n, size, batch = (8, 32, 4) if args.toy else (64, 64, 8) if small else (4096, 256, 64)
    widths = (32, 32, 32, 32) if small else (128, 256, 512, 512)
    shape = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(block_out_channels=widths, layers_per_block=2, **shape).save_pretrained(f"{folder}/vae")
        (Path(folder) / "images" / "one").mkdir(parents=True)
        picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(picture).resize((500, 375), Image.Resampling.BICUBIC)
        for i in range(n):
            picture.save(f"{folder}/images/one/{i:05d}.jpg", quality=90)
        images = ImageFolder(f"{folder}/images")
        autoencoder = load_autoencoder(f"{folder}/vae").to(world.device)
        options = Namespace(mirror=True, store="draw", vae="ema", global_seed=0)
        reader = DataLoader(
            Crops(images, size, False),
            batch,
            num_workers=min(12, torch.multiprocessing.cpu_count()),
            collate_fn=join,
            pin_memory=world.device.type == "cuda",
        )
        ready = list(reader)
        encode(images, ready[:2], autoencoder, world, options)
        seconds = {
            "VAE alone": timed(lambda: encode(images, ready, autoencoder, world, options))[1],
            "readers alone": timed(lambda: list(reader))[1],
            "both": timed(lambda: encode(images, reader, autoencoder, world, options))[1],
        }
    what = f"VAE of widths {widths}, {size} pixels, {reader.num_workers} readers"
    return [
        {
            "extraction": f"{name} ({what})",
            "images/s": n / s,
            "VAE busy": seconds["VAE alone"] / s if name == "both" else None,
        }
        for name, s in seconds.items()
    ]


# Evaluation


def evaluator(args, world: World, floors: dict) -> list[dict]:
    """FID, sFID, precision and recall from activations: ours, and by their definitions with scipy and numpy."""
    import scipy.linalg

    from evaluator import GaussianStatistics, frechet_distance, precision_recall

    n, dim, spatial = (400, 64, 60) if args.toy else (10_000, 2048, 2023)
    random = np.random.default_rng(0)
    real = random.standard_normal((n, dim), np.float32) @ random.standard_normal((dim, dim), np.float32) / dim**0.5
    fake = real[random.permutation(n)] + 0.3 * random.standard_normal((n, dim), np.float32)
    on_device = [torch.from_numpy(a).to(world.device) for a in (real, fake)]

    def moments(activations: torch.Tensor):
        statistics = GaussianStatistics()
        for rows in activations.split(256):
            statistics.add(rows)
        return statistics.result()

    def slow_moments(activations: np.ndarray):
        return activations.mean(0, np.float64), np.cov(activations, rowvar=False, dtype=np.float64)

    def slow_distance(mu1, sigma1, mu2, sigma2) -> float:
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * np.trace(root.real))

    def slow_squares(a, b):
        return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0)

    def slow_precision_recall(real, fake, k: int = 3, block: int = 1000):
        def radii(points):
            blocks = (points[i : i + block] for i in range(0, len(points), block))
            return np.concatenate([np.partition(slow_squares(rows, points), k, axis=1)[:, k] for rows in blocks])

        def covered(points, centres, within):
            blocks = (points[i : i + block] for i in range(0, len(points), block))
            return float(np.concatenate([(slow_squares(rows, centres) <= within).any(1) for rows in blocks]).mean())

        return covered(fake, real, radii(real)), covered(real, fake, radii(fake))

    torch.set_float32_matmul_precision("highest")  # as evaluator.py has it
    rates = {precision: matmul_rate(world.device, precision, 50) for precision in ("fp32", "fp64")}
    work = {
        "precision and recall": 2 * n * 2 * n * dim / rates["fp32"]
    }  # half of both squares of distances, one in full
    rows, jobs = [], {}
    for name, width in (("FID", dim), ("sFID", spatial)):
        jobs[name] = (
            lambda width=width: frechet_distance(*moments(on_device[0][:, :width]), *moments(on_device[1][:, :width])),
            lambda width=width: slow_distance(*slow_moments(real[:, :width]), *slow_moments(fake[:, :width])),
        )
        work[name] = (2 * n * width**2 + 4 * width**3) / rates[
            "fp64"
        ]  # half of both products, and an eigenvalue problem
    jobs["precision and recall"] = lambda: precision_recall(*on_device), lambda: slow_precision_recall(real, fake)
    for name, (fast, slow) in tqdm(jobs.items(), desc="evaluator", disable=None):
        (ours, seconds), (theirs, slow_seconds) = timed(fast), timed(slow)
        apart = float(np.max(np.abs(np.subtract(ours, theirs)) / np.abs(theirs)))
        row = {"scores": name, "s": seconds, "floor s": work[name], "scipy and numpy s": slow_seconds}
        rows.append(row | {"apart (relative)": apart})
    rows.append(
        {"scores": "all", **{key: sum(row[key] for row in rows) for key in ("s", "floor s", "scipy and numpy s")}}
    )
    for row in rows:
        row["speed / slow"] = row["scipy and numpy s"] / row["s"]
    return rows


def timed(function):
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


PARTS = {"training": training, "sampling": sampling, "data": data, "extraction": extraction, "evaluator": evaluator}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    sizes = sorted({name.removeprefix("DiT-") for name in DiT_models})
    parser.add_argument("--model", choices=sizes, default="S/2", metavar="SIZE", help="S/2, B/2, XL/2, ...")
    parser.add_argument("--input-size", type=positive_int, default=32, help="side of the latents")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images a step")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the matrix products")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    parser.add_argument(
        "--experts-per-batch",
        type=positive_int,
        nargs="*",
        default=[1, 4, 8],
        metavar="G",
        help="of RemixDiT, each of them measured; none: DiT alone",
    )
    parser.add_argument("--skip-usual", action="store_true", help="leave out the slow training loop for comparison")
    parser.add_argument("--steps", type=positive_int, default=1, help="training steps a turn (more for fast devices)")
    parser.add_argument("--sampling-steps", type=positive_int, default=4, help="sampling steps a turn")
    parser.add_argument("--data-batch-size", type=positive_int, default=256, help="images a batch, for the loader")
    parser.add_argument("--warmup", type=number(int, 1), default=2, help="turns that do not count")
    parser.add_argument("--rounds", type=positive_int, default=9, help="turns that count")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--name", help="of the results' files (default: from device, model, batch, precision)")
    parser.add_argument("--toy", action="store_true", help="tiny data and arrays: to see that everything runs")
    run_script(main, parser)
