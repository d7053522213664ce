"""Measure the speed of training, sampling, data loading, extraction and evaluation on this machine.

    python benchmarks/benchmark.py --model S/2 --batch-size 8 --precision bf16
    python benchmarks/benchmark.py --parts training --backbone LightningDiT --model S/1 --input-size 16
    torchrun --nproc_per_node=8 benchmarks/benchmark.py --parts training --model B/2

Every part is compared with a reference implementation or a lower bound of its time. Implementations that are compared
run in turns in one process, so that other work on the machine affects all of them. Times are medians after a warm-up,
measured with device events on GPUs. A lower bound ("floor") is the time for the bytes and the FLOPs of this design, one
after the other, at the copy bandwidth and the matrix product rate of this machine. Results are printed, and written to
<out>/<name>.json.
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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffusion import create_diffusion, create_flow
from features.dataset import DTYPES, SHARD_SIZE, FeatureDataset, write_index, write_shard
from models import BACKBONES, DIT, DiT_models, build_plain, classifier_free_guidance, meta_device
from remix import Remix, RemixDiT
from runtime.command_line import ArgumentParser, number, positive_int, run_script
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.processes import PRECISIONS, World, setup, world_size
from sampling.experts import FoldedRemix
from training.batches import BatchSampler, Microbatch, draw_times
from training.experts import Experts, experts_of
from training.settings import Execution, RunSettings
from training.statistics import matmul_rate
from training.trainer import Trainer

N_BASIS, N_EXPERTS = 4, 20
# Steps of a DDPM chain. The sampling part runs a contiguous piece of it.
CHAIN_STEPS = 250


def main(args: argparse.Namespace):
    for groups in args.experts_per_batch:
        if "training" in args.parts and args.batch_size % groups:
            raise UserError(f"--experts-per-batch {groups} does not divide --batch-size {args.batch_size}")
    if world_size() > 1 and args.parts != ["training"]:
        raise UserError("several processes can only measure --parts training")
    if args.backbone != DIT.name and args.parts != ["training"]:
        raise UserError(f"--backbone {args.backbone} can only measure --parts training")
    if args.model not in BACKBONES[args.backbone].sizes:
        raise UserError(f"--model {args.model}: a {args.backbone} has {', '.join(BACKBONES[args.backbone].sizes)}")
    args.input_size = args.input_size or 256 // BACKBONES[args.backbone].latents[1]
    try:
        with meta_device():
            plain_model(args)
    except ValueError as error:
        raise UserError(f"--input-size {args.input_size}: {error}") from None
    if world_size() == 1 and args.shard_bases:
        raise UserError("--shard-bases needs several processes (torchrun)")
    if args.rank and args.shard_bases:
        raise UserError("--rank: low-rank bases are not sharded")
    world = setup()
    name = args.name or default_name(args, world)
    machine = describe_machine(world)
    floors = measure_floors(world, args)
    results = {"machine": machine, "settings": vars(args), "floors": floors}
    lines = [f"# {name}", "", *(f"{key}: {value}" for key, value in machine.items())]
    lines += [f"copy bandwidth: {floors['copy_gb_s']:.1f} GB/s (bytes read and written)"]
    lines += [f"matrix product: {floors['tflops']:.2f} TFLOP/s in {args.precision}"]
    for part in args.parts:
        results[part] = PARTS[part](args, world, floors)
        lines += ["", f"## {part}", "", *markdown_table(results[part])]
        if not world.is_main:
            continue
        # The file is written after every part, so that an error in the next part loses no results.
        with atomic_write(args.out / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1, default=str) + "\n")
    if world.is_main:
        print("\n".join(lines), f"\n\nwrote {args.out / name}.json")


def plain_model(args: argparse.Namespace) -> torch.nn.Module:
    """Build the plain model that --backbone, --model and --input-size name."""
    return build_plain(f"{args.backbone}-{args.model}", input_size=args.input_size)


def describe_machine(world: World) -> dict[str, str]:
    """Return the device, the versions, the commit and the date."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
        versions += f", CUDA {torch.version.cuda}"
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        device = f"{next(models, 'CPU')}, {torch.get_num_threads()} threads"
    if world.size > 1:
        device = f"{world.size} x {device}"
    # A copy without .git gets its commit from the environment.
    commit = os.environ.get("COMMIT") or git_commit() or "unknown"
    return {"device": device, "versions": versions, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def git_commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def default_name(args: argparse.Namespace, world: World) -> str:
    device = torch.cuda.get_device_name(world.device).split()[-1] if world.device.type == "cuda" else "cpu"
    device = f"{world.size}x{device}" if world.size > 1 else device
    compiled = "compiled" if args.compile else "eager"
    sharded = "-sharded" if args.shard_bases else ""
    model = args.model if args.backbone == DIT.name else f"{args.backbone}-{args.model}"
    return f"{device}-{model}-b{args.batch_size}-{args.precision}-{compiled}{sharded}".replace("/", "").lower()


def measure_floors(world: World, args: argparse.Namespace) -> dict[str, float]:
    """Measure the copy bandwidth (GB/s, read and written) and the rate of a large matrix product (TFLOP/s)."""
    source = torch.randn(2**26, device=world.device)
    target = torch.empty_like(source)
    seconds = min(Clock(world).time(lambda: target.copy_(source)) for _ in range(6))
    return {
        "copy_gb_s": 2 * source.nbytes / seconds / 1e9,
        "tflops": matmul_rate(world.device, args.precision, 3 if args.toy else 50) / 1e12,
    }


class Clock:
    """Measures the time of named stages, with device events on GPUs and the host's clock otherwise."""

    def __init__(self, world: World):
        self.cuda = world.device.type == "cuda"
        self.marks = []

    def mark(self, stage: str):
        """Record the end of a stage, which began at the previous mark."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((stage, event))
        else:
            self.marks.append((stage, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call, and their sum as "total". Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        stages, marks, self.marks = {}, self.marks, []
        for (_, start), (stage, end) in pairwise(marks):
            seconds = start.elapsed_time(end) / 1e3 if self.cuda else end - start
            stages[stage] = stages.get(stage, 0) + seconds
        return stages | {"total": sum(stages.values())}

    def time(self, function: Callable) -> float:
        """Return the seconds that a function takes."""
        self.mark("start")
        function()
        self.mark("end")
        return self.read()["total"]


def peak_memory(world: World, function: Callable) -> int:
    """Return the largest increase of the memory in use during a function in bytes, or 0 if it cannot be measured."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        return 0

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    before = field("VmRSS")
    # Reset the peak, VmHWM.
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return field("VmHWM") - before


def take_turns(runs: dict[str, Callable], clocks: dict[str, Clock], warmup: int, rounds: int) -> dict[str, list[dict]]:
    """Run functions in turns and measure their stages.

    Args:
        runs: functions of the number of the round, by name.
        clocks: the clock of each function.
        warmup: rounds that are not measured.
        rounds: rounds that are measured.

    Returns:
        For each name, the seconds of the stages in each round. On GPUs, "host" is the time in which the host started
        all kernels: if it is as long as "total", the GPU waited for the host.
    """
    times = {name: [] for name in runs}
    for turn in tqdm(range(warmup + rounds), desc="rounds", disable=None):
        for name, run in runs.items():
            clocks[name].mark("start")
            start = time.perf_counter()
            run(turn)
            host = time.perf_counter() - start
            stages = clocks[name].read()
            if clocks[name].cuda:
                stages["host"] = host
            if turn >= warmup:
                times[name].append(stages)
    return times


def timed(function: Callable) -> tuple:
    """Return the result of a function and its seconds."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def median(rounds: list[dict], stage: str = "total") -> float:
    return statistics.median(stages.get(stage, 0) for stages in rounds)


def relative_speed(rounds: list[dict], reference: list[dict]) -> float:
    """Return the median over the rounds of the reference's time divided by this function's time."""
    return statistics.median(theirs["total"] / ours["total"] for ours, theirs in zip(rounds, reference, strict=True))


def markdown_table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table with the columns of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value) -> str:
        return "" if value is None else value if isinstance(value, str) else f"{value:,.4g}"

    lines = [columns, ["---"] * len(columns), *([text(row.get(key)) for key in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


# What follows the backbone's name in the name of the reference loop.
USUAL = ", the usual way"


@dataclass(frozen=True)
class TrainingRun:
    """A model in training.

    Attributes:
        run: run(turn) trains for `--steps` steps.
        clock: measures the stages of the steps.
        parameters: number of parameters that this process trains; 0 for the usual loop, whose memory is not measured.
        floor_ms: lower bound of the time of a step of one process.
    """

    run: Callable[[int], None]
    clock: Clock
    parameters: int = 0
    floor_ms: float = 0


def training_runs(args: argparse.Namespace, world: World, floors: dict) -> dict[str, TrainingRun]:
    """Return the models to train by name: a usual loop, the plain model, and its Remix with several experts per batch.

    DiTs are trained with Gaussian diffusion, other backbones as flows.
    """
    diffusion = create_diffusion() if args.backbone == DIT.name else create_flow()
    boundaries = None if args.backbone == DIT.name else diffusion.expert_boundaries(N_EXPERTS)
    torch.manual_seed(0)
    plain = plain_model(args)
    images = torch.randn(args.batch_size, plain.in_channels, args.input_size, args.input_size, device=world.device)
    noise = torch.randn_like(images)
    y = torch.zeros(args.batch_size, dtype=torch.long, device=world.device)
    label_drop = torch.zeros(args.batch_size, dtype=torch.bool, device=world.device)
    runs = {}

    def batch(step: int, groups: int | None) -> list[Microbatch]:
        """Return the only microbatch of a step."""
        boundaries = diffusion.expert_boundaries(N_EXPERTS if groups else 1)
        t = torch.from_numpy(draw_times(0, step, args.batch_size, diffusion, boundaries, groups or 1))
        conditions = {"y": y, "label_drop": label_drop} | ({"groups": groups} if groups else {})
        return [Microbatch(images, t.to(world.device, non_blocking=True), conditions, noise)]

    def add(name: str, model: torch.nn.Module, groups: int | None):
        """Add a model to `runs`."""
        sharded = args.shard_bases and groups is not None
        experts = experts_of(model)
        flops = args.batch_size * (experts.training_flops() + experts.low_rank_flops())
        compute_ms = flops / floors["tflops"] / 1e9
        traffic_ms = weight_traffic(experts, groups, args.precision) / floors["copy_gb_s"] / 1e6
        settings = RunSettings(lr=1e-5, precision=args.precision)
        execution = Execution(world.size, shard=sharded, compile=args.compile)
        trainer = Trainer(model, diffusion, world, settings, execution)
        clock = Clock(world)
        trainer.mark = clock.mark

        def run(turn: int):
            for step in range(turn * args.steps, (turn + 1) * args.steps):
                trainer.step(step, batch(step, groups))

        runs[name] = TrainingRun(run, clock, sum(p.numel() for p in trainer.trained), compute_ms + traffic_ms)

    # The usual loop has one process.
    if not args.skip_usual and world.size == 1:
        runs[args.backbone + USUAL] = usual_training(plain, diffusion, batch, args.steps, world)
    add(args.backbone, copy.deepcopy(plain), None)
    make = partial(RemixDiT, plain, N_BASIS, N_EXPERTS, boundaries=boundaries)
    for groups in args.experts_per_batch:
        name = f"Remix{args.backbone} G={groups}" + (", sharded bases" if args.shard_bases else "")
        add(name, make(), groups)
        for rank in args.rank:
            add(f"Remix{args.backbone} rank {rank} G={groups}", make(rank=rank), groups)
    return runs


def training(args: argparse.Namespace, world: World, floors: dict) -> list[dict]:
    """Measure the training step of a plain model, of its Remix with several experts per batch, and of a usual loop."""
    runs = training_runs(args, world, floors)
    functions = {name: training_run.run for name, training_run in runs.items()}
    clocks = {name: training_run.clock for name, training_run in runs.items()}

    def peaks(turn: int, n_tensors: int) -> dict[str, float]:
        """Return the memory of each model in bytes: that of `n_tensors` float32 per parameter and that of a turn."""
        return {
            name: 4 * n_tensors * training_run.parameters + peak_memory(world, partial(training_run.run, turn))
            for name, training_run in runs.items()
            if training_run.parameters
        }

    # On a GPU the first steps allocate the memory of a CUDA graph. There are weights and EMA, no moments and gradients.
    memory = peaks(0, 2) if world.device.type == "cuda" else {}
    times = take_turns(functions, clocks, args.warmup, args.rounds)
    # On a CPU the first steps compile.
    memory = memory or peaks(args.warmup + args.rounds, 5)
    with torch.device("meta"):
        flops = experts_of(plain_model(args)).training_flops()
    rows = []
    for name, rounds in times.items():
        row = {"model": name, "ms/step": median(rounds) / args.steps * 1e3}
        row["images/s"] = args.batch_size * world.size / row["ms/step"] * 1e3
        row["MFU"] = flops * row["images/s"] / world.size / floors["tflops"] / 1e12
        row[f"speed / {args.backbone}"] = relative_speed(rounds, times[args.backbone])
        if runs[name].parameters:
            row["parameters, M"] = runs[name].parameters / 1e6
            if world.size == 1:
                row["floor ms"] = runs[name].floor_ms
                row[f"floor's speed / {args.backbone}"] = runs[args.backbone].floor_ms / row["floor ms"]
            row["peak GiB"] = memory[name] / 2**30
            for stage in (stage for stage in rounds[0] if stage != "total"):
                row[f"{stage} %"] = 100 * median(rounds, stage) / median(rounds)
        rows.append(row)
    return rows


def weight_traffic(experts: Experts, groups: int | None, precision: str) -> float:
    """Count the bytes of weights that a training step of one process reads and writes.

    Args:
        experts: the experts of the model.
        groups: number of equal groups of a RemixDiT's batch; None for a plain DiT.
        precision: precision of the matrix products.
    """
    width = PRECISIONS[precision].itemsize
    trained, bases, mixture = experts.count_parameters()
    # A plain weight is read in float32 and rounded, read in the forward and the backward pass, and its gradient is
    # written, read and stored in float32.
    plain = (4 + 5 * width + 4) * (trained - bases)
    # Bases are read for the mixtures, and for the gradients of alpha and of the bases, which are written. A mixture is
    # written, and read in the forward and the backward pass. Its gradient is written and read.
    mixing = 3 * 4 * bases + 5 * width * mixture * (groups or 0)
    # AdamW reads a parameter, its gradient and two moments, and writes all but the gradient. The EMA reads two and
    # writes one. The check for non-finite numbers reads the gradient.
    return plain + mixing + 4 * (7 + 3 + 1) * trained


def usual_training(dit: torch.nn.Module, diffusion, batch: Callable, steps: int, world: World) -> TrainingRun:
    """Return a training loop as many scripts have it.

    It is eager and in fp32, with the default AdamW, a loop over the parameters for the EMA, and loss.item() in every
    step.
    """
    model = copy.deepcopy(dit).to(world.device).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0)
    clock = Clock(world)

    def run(turn: int):
        for step in range(turn * steps, (turn + 1) * steps):
            x, t, conditions, noise, _ = batch(step, None)[0]
            loss = diffusion.training_losses(model, x, t, conditions, noise)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for ema_param, param in zip(ema.parameters(), model.parameters(), strict=True):
                    ema_param.mul_(0.9999).add_(param, alpha=1e-4)
            loss.item()
            clock.mark("step")

    return TrainingRun(run, clock)


@torch.no_grad()
def sampling(args: argparse.Namespace, world: World, floors: dict) -> list[dict]:
    """Measure a guided DDPM step of a plain DiT, of a folded RemixDiT, and of a RemixDiT that mixes in every step."""
    diffusion = create_diffusion(str(CHAIN_STEPS))
    original = [int(t) for t in diffusion.timestep_map]
    torch.manual_seed(0)
    dit = DiT_models[f"DiT-{args.model}"](input_size=args.input_size).to(world.device).eval()
    remix = RemixDiT(dit, N_BASIS, N_EXPERTS).to(world.device).eval()
    folded = FoldedRemix(remix)
    guided = torch.compile(classifier_free_guidance) if args.compile else classifier_free_guidance
    n = args.batch_size
    shape = (n, dit.in_channels, args.input_size, args.input_size)
    y = torch.cat([torch.zeros(n, dtype=torch.long), torch.full((n,), dit.num_classes)]).to(world.device)
    clocks = {}

    def chain(name: str, network_for: Callable[[int], torch.nn.Module]) -> Callable:
        """Return a function that runs the steps of a round, with the network for each original timestep."""
        clocks[name] = Clock(world)

        def run(turn: int):
            x = torch.randn(shape, device=world.device)
            for i in range(args.sampling_steps):
                step = CHAIN_STEPS - 1 - (turn * args.sampling_steps + i) % CHAIN_STEPS
                network = network_for(original[step])

                def denoise(x, t, network=network):
                    with world.autocast(args.precision):
                        return guided(network, torch.cat([x, x]), torch.cat([t, t]), y, 1.5, 3)[: len(x)]

                x = diffusion.p_sample(denoise, x, torch.full((n,), step, device=x.device), False)["sample"]
            clocks[name].mark("steps")

        return run

    class Mixed(torch.nn.Module):
        def forward(self, x, t, y):
            return remix(x, t, y, groups=1)

    mixed = Mixed()
    networks = {"DiT": lambda t: dit, "folded": folded.for_timestep, "mixed in every step": lambda t: mixed}
    runs = {name: chain(name, network_for) for name, network_for in networks.items()}
    times = take_turns(runs, clocks, args.warmup, args.rounds)

    # Sums instead of medians: folding is rare, and must count.
    totals = {name: sum(stages["total"] for stages in rounds) for name, rounds in times.items()}
    # A training step is counted as three forward passes. A guided step takes two.
    flops = experts_of(dit).training_flops() / 3 * 2 * n
    return [
        {
            "model": name,
            "ms/step": total / args.rounds / args.sampling_steps * 1e3,
            "speed / DiT": totals["DiT"] / total,
            "floor ms": flops / floors["tflops"] / 1e9,
        }
        for name, total in totals.items()
    ]


def adapters(args: argparse.Namespace, world: World, floors: dict) -> list[dict]:
    """Measure training steps of low-rank experts of an SD3 in bf16 with frozen weights, and of a LoRA of equal size.

    The batch has 16 samples of 16 experts, which run as one batch, or as 16 groups. The LoRA is peft's, of rank K * r.
    """
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    n, rank, heads, side = (4, 2, 2, 4) if args.toy else (16, 4, 8, 32)
    text = dict(joint_attention_dim=64, pooled_projection_dim=64, caption_projection_dim=64 * heads)
    size = dict(sample_size=side, pos_embed_max_size=side, in_channels=4, out_channels=4, num_layers=3)
    torch.manual_seed(0)
    base = SD3Transformer2DModel(num_attention_heads=heads, attention_head_dim=64, **size, **text).bfloat16()
    inputs = dict(hidden_states=torch.randn(n, 4, side, side), encoder_hidden_states=torch.randn(n, 16, 64))
    inputs |= dict(pooled_projections=torch.randn(n, 64), timestep=(torch.arange(n) + 0.5) * (1000 / n))
    inputs = {name: value.to(world.device, torch.bfloat16) for name, value in inputs.items()}
    lora, remix = copy.deepcopy(base).requires_grad_(False), Remix(base, n_basis=N_BASIS, n_experts=n, rank=rank)
    targets = [name for name, _ in remix.mixed()]
    lora.add_adapter(LoraConfig(r=N_BASIS * rank, lora_alpha=N_BASIS * rank, target_modules=targets))
    remix.freeze_shared()
    runs, clocks = {}, {}

    def add(name: str, model: torch.nn.Module, **options):
        model.to(world.device).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        clock = clocks[name] = Clock(world)

        def run(turn: int):
            for _ in range(args.steps):
                model(**inputs, **options).sample.float().square().mean().backward()
                for parameter in trained:
                    parameter.grad = None
            clock.mark("step")

        runs[name] = run

    reference = f"peft LoRA of rank {N_BASIS * rank}"
    add(reference, lora)
    add(f"Remix of rank {rank}, {n} experts at once", remix)
    add(f"Remix of rank {rank}, groups={n}", remix, groups=n)
    times = take_turns(runs, clocks, args.warmup, args.rounds)
    return [
        {
            "model": name,
            "ms/step": median(rounds) / args.steps * 1e3,
            "speed / LoRA": relative_speed(rounds, times[reference]),
        }
        for name, rounds in times.items()
    ]


def data(args: argparse.Namespace, world: World, floors: dict) -> list[dict]:
    """Measure how fast two processes read packed features and draw noise as in training.

    The shards all stay open, or one at a time, as with the thousands of shards of ImageNet. The features are stored as
    float32 or as float16.
    """
    from features import shards as open_files

    rows, default_open = [], open_files.OPEN_SHARDS
    with tempfile.TemporaryDirectory() as folder:
        shards = 2 if args.toy else 8
        shape = (4, args.input_size, args.input_size)
        for dtype in DTYPES:
            (Path(folder) / dtype).mkdir()
            for shard in range(shards):
                array = np.random.default_rng(shard).standard_normal((SHARD_SIZE, 2, *shape), np.float32)
                write_shard(f"{folder}/{dtype}", shard, array, np.zeros(SHARD_SIZE), {}, dtype)
            described = dict(vae="ema", scale=0.18215, image_size=8 * args.input_size, classes=["one"], dtype=dtype)
            write_index(f"{folder}/{dtype}", shards, **described)
        sampler = BatchSampler(0, args.data_batch_size, world)
        n = 5 if args.toy else 100
        for dtype, open_shards in product(DTYPES, (default_open, 1)):
            open_files.OPEN_SHARDS = open_shards
            try:
                with sampler.load(FeatureDataset(f"{folder}/{dtype}"), range(n + 10), num_workers=2) as batches:
                    for _ in range(10):
                        next(batches)
                    start = time.perf_counter()
                    for _ in tqdm(range(n), desc="loading", disable=None):
                        sampler.microbatches(next(batches))
                    rate = n * args.data_batch_size / (time.perf_counter() - start)
            finally:
                open_files.OPEN_SHARDS = default_open
            case = "shards stay open" if open_shards > 1 else "each image opens its shard"
            gb_s = np.dtype(dtype).itemsize * int(np.prod(shape)) * rate / 1e9
            rows.append(
                {"loader (2 processes)": f"{case}, {dtype}", "images/s": rate, "GB/s": gb_s, "needed images/s": 2000}
            )
    return rows


def extraction(args: argparse.Namespace, world: World, floors: dict) -> list[dict]:
    """Measure decoding with cropping, encoding, and both together. The VAE's weights are random."""
    from diffusers import AutoencoderKL
    from PIL import Image
    from torch.utils.data import DataLoader

    from extract_features import Crops, Encoder, encode_images, join
    from features.autoencoder import load_autoencoder
    from features.sources import load_images

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
        images = load_images(f"{folder}/images")
        autoencoder = load_autoencoder(f"{folder}/vae").to(world.device)
        encoder = Encoder(autoencoder, store="draw", mirror=True, seed=0, device=world.device)
        crops = Crops(images, size, False)
        reader = DataLoader(
            crops,
            batch,
            num_workers=min(12, torch.multiprocessing.cpu_count()),
            collate_fn=join,
            pin_memory=world.device.type == "cuda",
        )
        ready = list(reader)
        encode_images(crops, ready[:2], encoder)
        seconds = {
            "VAE alone": timed(lambda: encode_images(crops, ready, encoder))[1],
            "readers alone": timed(lambda: list(reader))[1],
            "both": timed(lambda: encode_images(crops, reader, encoder))[1],
        }
    setting = f"VAE of widths {widths}, {size} pixels, {reader.num_workers} readers"
    return [
        {
            "extraction": f"{name} ({setting})",
            "images/s": n / s,
            "VAE busy": seconds["VAE alone"] / s if name == "both" else None,
        }
        for name, s in seconds.items()
    ]


def evaluator(args: argparse.Namespace, world: World, floors: dict) -> list[dict]:
    """Measure FID, sFID, precision and recall from features: the evaluator's, and simple ones with scipy and numpy."""
    from evaluation.scores import precision_recall

    n, dim, spatial = (400, 64, 60) if args.toy else (10_000, 2048, 2023)
    random = np.random.default_rng(0)
    real = random.standard_normal((n, dim), np.float32) @ random.standard_normal((dim, dim), np.float32) / dim**0.5
    fake = real[random.permutation(n)] + 0.3 * random.standard_normal((n, dim), np.float32)
    on_device = [torch.from_numpy(a).to(world.device) for a in (real, fake)]

    # As in evaluator.py, without TF32.
    torch.set_float32_matmul_precision("highest")
    rates = {precision: matmul_rate(world.device, precision, 3 if args.toy else 50) for precision in ("fp32", "fp64")}
    jobs, floor = {}, {}
    for name, width in (("FID", dim), ("sFID", spatial)):
        jobs[name] = (
            lambda width=width: fast_fid(*(features[:, :width] for features in on_device)),
            lambda width=width: numpy_fid(real[:, :width], fake[:, :width]),
        )
        # Half of each of the two covariance products, and an eigenvalue problem.
        floor[name] = (2 * n * width**2 + 4 * width**3) / rates["fp64"]
    jobs["precision and recall"] = lambda: precision_recall(*on_device), lambda: numpy_precision_recall(real, fake)
    # Half of the distances within each set, and all distances between the sets.
    floor["precision and recall"] = 2 * n * 2 * n * dim / rates["fp32"]

    rows = []
    for name, (fast, slow) in tqdm(jobs.items(), desc="evaluator", disable=None):
        (scores, seconds), (slow_scores, slow_seconds) = timed(fast), timed(slow)
        difference = float(np.max(np.abs(np.subtract(scores, slow_scores)) / np.abs(slow_scores)))
        row = {"scores": name, "s": seconds, "floor s": floor[name], "scipy and numpy s": slow_seconds}
        rows.append(row | {"relative difference": difference})
    seconds = ("s", "floor s", "scipy and numpy s")
    rows.append({"scores": "all", **{key: sum(row[key] for row in rows) for key in seconds}})
    for row in rows:
        row["speed / slow"] = row["scipy and numpy s"] / row["s"]
    return rows


def fast_fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Compute FID as the evaluator does."""
    from evaluation.scores import GaussianStatistics, frechet_distance

    results = []
    for features in (real, fake):
        accumulated = GaussianStatistics()
        for rows in features.split(256):
            accumulated.add(rows)
        results += accumulated.result()
    return frechet_distance(*results)


def numpy_fid(real: np.ndarray, fake: np.ndarray) -> float:
    """Compute FID with numpy's covariance and scipy's matrix root."""
    import scipy.linalg

    mu1, mu2 = (features.mean(0, np.float64) for features in (real, fake))
    sigma1, sigma2 = (np.cov(features, rowvar=False, dtype=np.float64) for features in (real, fake))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * np.trace(root.real))


def numpy_precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """Compute precision and recall with numpy, all distances of a block of rows at a time."""

    def distance_blocks(a, b):
        for rows in (a[i : i + block] for i in range(0, len(a), block)):
            yield np.maximum((rows * rows).sum(1)[:, None] + (b * b).sum(1) - 2 * rows @ b.T, 0)

    def radii(points):
        return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in distance_blocks(points, points)])

    def covered(points, centres, radii):
        return float(np.concatenate([(d <= radii).any(1) for d in distance_blocks(points, centres)]).mean())

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


PARTS = {
    "training": training,
    "sampling": sampling,
    "adapters": adapters,
    "data": data,
    "extraction": extraction,
    "evaluator": evaluator,
}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--backbone", choices=BACKBONES, default=DIT.name, help="kind of the plain model (training)")
    sizes = sorted({size for backbone in BACKBONES.values() for size in backbone.sizes})
    parser.add_argument("--model", choices=sizes, default="S/2", metavar="SIZE", help="S/2, B/2, XL/2, ...")
    parser.add_argument(
        "--input-size", type=positive_int, help="side of the latents (default: of images of 256 pixels, 32 for a DiT)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images per process and step")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="precision of matrix products")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    parser.add_argument(
        "--experts-per-batch",
        type=positive_int,
        nargs="*",
        default=[1, 4, 8],
        metavar="G",
        help="numbers of experts per process and step to measure for RemixDiT; without a number only DiT is measured",
    )
    parser.add_argument(
        "--shard-bases", action="store_true", help="shard the bases of RemixDiT over the processes (training)"
    )
    parser.add_argument(
        "--rank", type=positive_int, nargs="+", default=[], metavar="R", help="also measure low-rank bases of rank R"
    )
    parser.add_argument("--skip-usual", action="store_true", help="do not measure the usual training loop")
    parser.add_argument("--steps", type=positive_int, default=1, help="training steps per round (more on fast devices)")
    parser.add_argument("--sampling-steps", type=positive_int, default=4, help="sampling steps per round")
    parser.add_argument("--data-batch-size", type=positive_int, default=256, help="images per batch of the loader")
    parser.add_argument("--warmup", type=number(int, 1), default=2, help="rounds that are not measured")
    parser.add_argument("--rounds", type=positive_int, default=9, help="rounds that are measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--name", help="name of the result file (default: device, model, batch size and precision)")
    parser.add_argument("--toy", action="store_true", help="tiny data and arrays, to test that everything runs")
    run_script(main, parser)
