"""Helpers and fixtures shared by all tests: reference vectors, small datasets and runs, and running the scripts."""

import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path

# Two processes on two cores must not compete for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# All processes of a run of the tests share what the compiler writes. The processes of pytest-xdist inherit the folder.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="torchinductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED.name
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402

from runtime.files import lock_folder  # noqa: E402

torch.set_num_threads(1)
GOLDEN = ROOT / "tests" / "golden"
# The devices that tests of kernels and of compilation run on.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Processes are forked from a server that has imported what the scripts and the tests need, which takes several seconds.
# The tests' own threads make forks of their processes unsafe.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "train_fast", "extract_features", "sample_ddp", "evaluator", "torch._inductor.utils"]
)
# The default backend of torch.compile takes half a minute for a small model on a CPU. The others trace the same graphs,
# but write no kernels.
INDUCTOR = pytest.param("inductor", marks=[] if torch.cuda.is_available() else pytest.mark.slow)
# Flags of extract_features.py for the small images below, and of sample_ddp.py for few samples in few steps.
PIXELS = ("--vae=none", "--image-size=8", "--num-workers=0")
FEW_SAMPLES = ("--num-fid-samples=14", "--num-sampling-steps=8")
# How an error says that a file is missing, on the disk or on the Hugging Face hub.
MISSING = re.compile(r"no such f|the hub cannot be reached", re.IGNORECASE)


# Numbers


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the norm of a - b relative to the norm of b."""
    return ((a - b).norm() / b.norm()).item()


def golden(name: str):
    """Load reference vectors from tests/golden/."""
    return torch.load(GOLDEN / name, weights_only=True)


# Scripts and processes


def run(script: str, *flags, processes: int = 1, expect: int = 0) -> subprocess.CompletedProcess:
    """Run a script as a user does.

    Args:
        script: path of the script relative to the project.
        *flags: command line, converted to strings.
        processes: number of processes. One runs in this process, which saves the imports; several are forks with the
            environment variables of torchrun. test_faults.py runs torchrun itself.
        expect: exit code; the test fails if the script exits with another one.

    Returns:
        The exit code and what the script printed.
    """
    arguments = [str(ROOT / script), *map(str, flags)]
    if processes > 1:
        done = _run_forks(arguments, processes)
    else:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", arguments)
            try:
                runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def start(arguments: list, out: Path, err: Path, **variables) -> multiprocessing.Process:
    """Start a script in a process of its own, the leader of a process group, and return this process.

    Args:
        arguments: path of the script and its command line, converted to strings.
        out: file to which the process appends what it prints.
        err: the same for errors and the log.
        **variables: environment variables in addition to those of this process, converted to strings.
    """
    environment = dict(os.environ) | {name: str(value) for name, value in variables.items()}
    process = FORKS.Process(target=_run_fork, args=(list(map(str, arguments)), str(out), str(err), environment))
    process.start()
    return process


def _run_fork(arguments: list[str], out: str, err: str, environment: dict[str, str]):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    # A script that is started by a user has this default. Here it would be that of the server.
    multiprocessing.set_start_method("fork", force=True)
    # The files stay open as long as the process runs.
    sys.stdout, sys.stderr = (open(path, "a", buffering=1) for path in (out, err))  # noqa: SIM115
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _run_forks(arguments: list[str], processes: int) -> subprocess.CompletedProcess:
    """Run a script in several processes of one group, and return the first exit code other than 0."""
    # Like torchrun, this process holds the store by which the processes find each other.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        ranks = [
            start(arguments, out, err, **group, WORLD_SIZE=processes, RANK=rank, LOCAL_RANK=rank)
            for rank in range(processes)
        ]
        running, code, deadline = {process.sentinel: process for process in ranks}, 0, time.monotonic() + 300
        while running and time.monotonic() < deadline:
            for sentinel in wait(running, timeout=1):
                process = running.pop(sentinel)
                process.join()
                code = code or process.exitcode
                # The others may wait for a process that has failed.
                deadline = min(deadline, time.monotonic() + 10) if code else deadline
        for process in running.values():
            process.kill()
            process.join()
        return subprocess.CompletedProcess(arguments, code or bool(running), out.read_text(), err.read_text())


@contextmanager
def locked(folder: Path):
    """Lock a folder in another process, as a run that writes to it does, and yield that process."""
    context = multiprocessing.get_context("fork")
    ready, process = context.Event(), None

    def hold():
        lock_folder(folder, "--name")
        ready.set()
        time.sleep(300)

    process = context.Process(target=hold)
    process.start()
    try:
        assert ready.wait(30)
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def file_limit(size: int):
    """Let writing fail beyond `size` bytes of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def disk_full_of(path: Path):
    """Let a disk have no free space as long as the file `path` exists; the file is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    measure = shutil.disk_usage

    def disk_usage(folder):
        return measure(folder)._replace(free=0) if path.exists() else measure(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_usage)
        yield
    assert not path.exists()


def wait_for(condition: Callable, seconds: float = 60):
    """Wait until a condition holds; the test fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} seconds"
        time.sleep(0.01)


def training_processes(prefix: str) -> list[int]:
    """Return the process ids of the running training processes with this --prefix, in the order of their ranks."""
    processes = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [int(item[5:]) for item in environment if item.startswith(b"RANK=")]
        if entry.name.isdigit() and f"--prefix={prefix}".encode() in words and ranks:
            processes.append((ranks[0], int(entry.name)))
    return [pid for _, pid in sorted(processes)]


@pytest.fixture(scope="module")
def no_hub():
    """The Hugging Face hub cannot be reached and its cache is empty, whether or not this is so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.hub.offline", lambda: True)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/no/such/cache")
        yield


# Training runs


def training_flags(features: Path, results: Path, prefix: str, model: str = "RemixDiT-T/2") -> list[str]:
    """Return the flags of a tiny training run.

    Args:
        features: folder of features.
        results: parent folder of the run.
        prefix: name of the run.
        model: name of the architecture; a RemixDiT has K = 2 bases and N = 6 experts.
    """
    flags = [f"--data-path={features}", f"--results-dir={results}", f"--prefix={prefix}", f"--model={model}"]
    if model.startswith("Remix"):
        flags += ["--n-basis=2", "--n-experts=6"]
    return [*flags, "--num-workers=0", "--global-batch-size=12", "--log-every=1", "--lr=1e-3", "--ema-decay=0.9"]


def losses(run_folder: Path) -> dict[int, float]:
    """Return a run's logged losses by step, and check that every step is logged once."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    # Scores have lines of their own.
    lines = [line for line in lines if "loss" in line]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "every step is logged once"
    return {line["step"]: line["loss"] for line in lines}


def assert_same_weights(a: Path, b: Path, exact: bool = True):
    """Check that two checkpoints have the same weights and EMA, bit for bit or within rounding."""
    from interop.own import read_checkpoint

    a, b = read_checkpoint(a), read_checkpoint(b)
    for part in ("model", "ema"):
        for key, value in a[part].items():
            if exact:
                assert torch.equal(value, b[part][key]), f"{part}.{key}"
            else:
                # Where a gradient consists of rounding errors only, Adam turns its sign into a full step.
                torch.testing.assert_close(value, b[part][key], rtol=1e-3, atol=2e-4, msg=f"{part}.{key}")


def sampled_images(folder: Path) -> np.ndarray:
    """Return the images [n, H, W, 3] of sample_ddp.py's folder."""
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"]


def check_sampling_refused(ckpt: Path, out: Path, flags: tuple, message: str):
    """Assert that sample_ddp.py refuses some flags with a message of one line, before it creates its folder `out`."""
    done = run("sample_ddp.py", "--ckpt", ckpt, "--sample-dir", out, *FEW_SAMPLES, *flags, expect=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()


# Datasets, checkpoints and samples


def make_images(folder: Path, classes: int = 3, per_class: int = 8, size: int = 8, seed: int = 0) -> Path:
    """Make smooth random RGB images of (size + 2) x size pixels, one folder per class, and return `folder`."""
    generator = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            small = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            small.resize((size + 2, size), Image.Resampling.BICUBIC).save(folder / f"class{label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 images of 3 classes."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def features(tmp_path_factory, images) -> Path:
    """The 24 images encoded as 8x8 RGB pixels with their mirror images."""
    path = tmp_path_factory.mktemp("features") / "encoded"
    run("extract_features.py", "--data-path", images, "--features-path", path, *PIXELS)
    return path


def make_vae(path: Path, depth: int = 2, **config) -> Path:
    """Save a tiny AutoencoderKL with random weights, whose latents have the image's side divided by 2^(depth - 1)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * depth, "up_block_types": ["UpDecoderBlock2D"] * depth}
    AutoencoderKL(**blocks, block_out_channels=[8] * depth, norm_num_groups=4, **config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A tiny AutoencoderKL: 4 latent channels at half the image's side."""
    return make_vae(tmp_path_factory.mktemp("vae"), latent_channels=4, scaling_factor=0.5)


@pytest.fixture(scope="session")
def moments(vae, tmp_path_factory) -> Path:
    """The posteriors of 9 images under the tiny VAE; the images are in the folder beside it."""
    folder = tmp_path_factory.mktemp("moments")
    tree = make_images(folder / "images", per_class=3, size=16)
    flags = [f"--data-path={tree}", f"--features-path={folder / 'encoded'}", f"--vae={vae}", "--image-size=16"]
    run("extract_features.py", *flags, "--num-workers=0", "--store=moments", "--model=DiT-T/2")
    return folder / "encoded"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, features) -> Path:
    """The folder of a run: a RemixDiT-T/2 with K = 2 and N = 6, trained for four steps."""
    path = tmp_path_factory.mktemp("outputs")
    run("train_fast.py", *training_flags(features, path, "trained"), "--max-steps", 4)
    return path / "trained"


@pytest.fixture(scope="session")
def ckpt(trained, tmp_path_factory) -> Path:
    """The checkpoint of `trained` with noise added to its weights, so that the experts differ."""
    from interop.own import save_checkpoint

    state = torch.load(trained / "checkpoints/0000004.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for key, value in state["ema"].items():
        if value.ndim >= 2 and "pos_embed" not in key:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("sampling") / "run" / "checkpoints" / "0000004.pt"
    save_checkpoint(path, state)
    return path


@pytest.fixture(scope="session")
def sampled(ckpt, tmp_path_factory) -> Path:
    """A folder of 14 samples of `ckpt`, with PNG files."""
    path = tmp_path_factory.mktemp("samples")
    run("sample_ddp.py", "--ckpt", ckpt, *FEW_SAMPLES, "--sample-dir", path, "--name", "one", "--save-png")
    return path / "one"


# Folders of runs


def write_run(
    folder: Path, config: dict, steps: list[int], pictures: list[int], n_experts: int | None = 6, shift: float = 0
):
    """Write a run's folder as training leaves it, with random numbers.

    Args:
        folder: the folder.
        config: a run's config, whose number of experts and boundaries are replaced.
        steps: steps of the reports; every second one is scored too.
        pictures: steps with a picture of samples.
        n_experts: number of experts; None for a plain model.
        shift: what is added to the losses.
    """
    from figures import save_grid

    generator = np.random.default_rng(len(folder.name))
    config = json.loads(json.dumps(config))
    if n_experts is None:
        config["model"] |= {"name": "DiT-T/2", "remix": None}
    else:
        boundaries = [1000 * i // n_experts for i in range(n_experts + 1)]
        config["model"]["remix"] |= {"n_basis": 2, "n_experts": n_experts, "boundaries": boundaries}
    config["training"]["max_steps"] = steps[-1]
    lines = []
    for i, step in enumerate(steps):
        loss = shift + 1 / (1 + i) + 0.01 * generator.random()
        line = {"step": step, "loss": loss, "mse": 0.9 * loss, "bad_steps": 0, "lr": 1e-3 / (1 + i)}
        line |= {"images_per_s": 100 + generator.random(), "mfu": 0.1, "memory_gib": 0.5}
        if n_experts is not None:
            first = generator.random(n_experts).round(5)
            line |= {"coefficients": np.stack([first, (1 - first).round(5)], 1).tolist(), "expert_spread": 0.1 * i}
            line |= {"entropy": generator.random(n_experts).round(5).tolist(), "coeff_lr": 1e-2, "prior": 0.5}
        lines.append(line)
        if i % 2:
            score = {"step": step, "fid": 50 / (1 + i), "held_out_loss": 0.8 * loss}
            owners = range(n_experts or 0)
            lines.append(score | {f"held_out_loss/expert_{n:02d}": 0.1 / (1 + n) / (1 + i) for n in owners})
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in pictures:
        images = generator.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
        save_grid(folder / "samples" / f"{step:07d}.png", images, ["a class"] * 8, columns=4)


@pytest.fixture
def runs(trained, tmp_path) -> tuple[Path, Path]:
    """Folders of runs: a RemixDiT with 20 pictures, and a plain DiT with 2, which is still writing its last line."""
    config = json.loads((trained / "config.json").read_text())
    steps = list(range(50, 1001, 50))
    write_run(tmp_path / "remix", config, steps, steps)
    write_run(tmp_path / "plain", config, [100, 200, 300], [100, 300], None, shift=0.1)
    with open(tmp_path / "plain/metrics.jsonl", "a") as file:
        file.write('{"step": 400, "lo')
    return tmp_path / "remix", tmp_path / "plain"


# Feature networks of the scores


class ToyNetwork(torch.nn.Module):
    """A small network that returns pooled features, spatial features and logits."""

    def forward(self, images):
        x = images.float() / 255
        pool = torch.nn.functional.avg_pool2d(x, 4).flatten(1)
        return pool, x[:, 0, ::2, ::2].flatten(1), pool[:, :5] * 9


def export_network(network: torch.nn.Module, path: Path, side: int = 8) -> Path:
    """Write a network as a program for evaluator.py, for images of side x side pixels, and return `path`."""
    from evaluation.networks import save_program

    save_program(network, path, side)
    return path


# Random models


@pytest.fixture
def exact_products():
    """Compute float32 products without TF32, and start with nothing compiled."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.set_float32_matmul_precision(before)


def random_remix_dit(device: str = "cpu", depth: int = 2, width: int = 32, side: int = 8, boundaries=None):
    """A RemixDiT with K = 4 and N = 20 in which every parameter is random, so that all of them affect the output.

    Its coefficients are mixed. Nearly one-hot ones would have gradients of little more than rounding errors.
    """
    from models import DiT
    from remix import RemixDiT, RemixLinear

    torch.manual_seed(0)
    dit = DiT(side, 2, 4, width, depth, 2, num_classes=10)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    remix = RemixDiT(dit, n_basis=4, n_experts=20, prior_bonus=3, boundaries=boundaries)
    for module in remix.modules():
        if isinstance(module, RemixLinear):
            module.weight.data += 0.1 * torch.randn_like(module.weight)
    return remix.to(device)


def make_trainer(model: torch.nn.Module, process=None, world=None, lr: float = 1e-4, **options):
    """A Trainer with the settings and the execution that `options` name, and equal peak rates of weights and logits."""
    from dataclasses import fields

    from diffusion import create_diffusion
    from runtime.processes import World
    from training.settings import Execution, RunSettings
    from training.trainer import Trainer

    execution = {field.name: options.pop(field.name) for field in fields(Execution) if field.name in options}
    settings = RunSettings(lr=lr, **{"coeff_lr": lr} | options)
    world = world or World(0, 1, torch.device("cpu"))
    return Trainer(model, process or create_diffusion(), world, settings, Execution(**execution))


def random_microbatch(step: int = 0, size: int = 8, groups: int = 4, device: str = "cpu", side: int = 8):
    """One microbatch for `random_remix_dit`, as `Trainer.step` takes it."""
    from diffusion import create_process
    from training.batches import Microbatch, draw_times

    generator = torch.Generator().manual_seed(1)
    process = create_process()
    t = torch.from_numpy(draw_times(0, step, size, process, process.expert_boundaries(20), groups))
    x, noise = torch.randn(2, size, 4, side, side, generator=generator)
    y, label_drop = torch.arange(size) % 10, torch.zeros(size, dtype=torch.bool)
    x, noise, t, y, label_drop = (tensor.to(device) for tensor in (x, noise, t, y, label_drop))
    return Microbatch(x, t, {"y": y, "label_drop": label_drop, "groups": groups}, noise)
