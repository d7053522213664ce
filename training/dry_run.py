"""The plan of a training run: its settings, and the memory, disk space and time it will take (--dry-run).

Times are estimates from counted FLOPs and bytes at assumed rates. They have not been confirmed on a GPU.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion import FlowMatching, GaussianDiffusion, create_process
from features.dataset import FeatureDataset
from interop.own import checkpoints
from mixing.grouped_linear import RECOMPUTED_GROUPS
from models import DiT
from remix import RemixDiT, RemixLinear
from runtime.command_line import counted
from runtime.errors import UserError
from runtime.files import check_disk
from runtime.processes import PRECISIONS
from training.batches import count_groups
from training.posthoc_ema import TRACKED_STDS
from training.settings import RunSettings
from training.sharding import can_shard
from training.trainer import recompute_blocks

# Peak rates of an H100 SXM: FLOP/s of dense matrix products (TF32 in fp32), and bytes/s of its memory, of NVLink in one
# direction, and of a network of 400 Gbit/s per GPU between nodes of NODE GPUs.
PEAK_FLOPS = {"fp32": 494e12, "bf16": 989e12, "fp16": 989e12}
PEAK_MEMORY = 3.35e12
PEAK_NVLINK = 450e9
PEAK_NETWORK = 50e9
NODE = 8
# The parts of these rates that training is assumed to reach.
REACHED_FLOPS = 0.6
REACHED_BYTES = 0.8
# What a process holds on the GPU for CUDA, cuBLAS and NCCL, in bytes.
CUDA_CONTEXT = 2**30


class AssumedFeatures:
    """Features that do not exist yet, for a dry run: ImageNet's training set, encoded by the published VAE.

    Args:
        path: the folder that does not exist.
        image_size: side of the images in pixels.

    Raises:
        UserError: if the VAE cannot encode images of that size.
    """

    def __init__(self, path: str, image_size: int):
        if image_size % 8:
            raise UserError(f"--image-size {image_size} is not a multiple of 8, which the VAE needs")
        self.path = Path(path)
        self.image_size = image_size
        self.shape = (4, image_size // 8, image_size // 8)
        self.labels = torch.tensor([0, 999])
        self.classes = None

    def __len__(self) -> int:
        return 1_281_167


def describe_run(
    name: str,
    model: DiT | RemixDiT,
    dataset: FeatureDataset | AssumedFeatures,
    settings: RunSettings,
    process: dict,
    devices: str,
) -> list[str]:
    """Return the lines that describe a run: its model, its data, its steps, and what is special about its loss.

    Args:
        name: name of the model.
        model: the model; its parameters may be on the meta device.
        dataset: the encoded images.
        settings: the settings of the run.
        process: keyword arguments of `create_process`.
        devices: the number and kind of the devices.
    """
    remix = isinstance(model, RemixDiT)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    shape = " x ".join(map(str, dataset.shape))
    source = f"from {dataset.path}"
    if isinstance(dataset, AssumedFeatures):
        source = f"ImageNet, assumed because {dataset.path} does not exist"
    experts = f", {counted(settings.experts_per_batch, 'expert')} per batch" if remix else ""
    batch = f"batch {settings.global_batch_size} on {devices}, {settings.precision}"
    flow = [f"{name}={value}" for name, value in process.items() if name != "process"]
    lines = [
        f"{name}: {parameters:,.2f} M parameters, from {settings.load_weight or 'scratch'}",
        f"{counted(len(dataset), 'image')} of {counted(model.num_classes, 'class', 'classes')} as {shape} ({source})",
        f"{counted(settings.max_steps, 'step')} of {batch}{experts}",
        *([f"flow matching: {', '.join(flow)}"] if flow else []),
    ]
    if settings.min_snr:
        lines.append(f"loss weight min(SNR, {settings.min_snr}) / SNR, at least {settings.min_weight or 0}")
    return lines


@dataclass(frozen=True)
class Parallelism:
    """How a step is divided among GPUs, and how a GPU runs its part.

    Attributes:
        size: number of GPUs R.
        grad_accum: microbatches per GPU and step.
        sharded: whether the bases are sharded over the GPUs (training/sharding.py).
        checkpoint_activations: whether blocks run again in the backward pass instead of storing activations.
    """

    size: int = 1
    grad_accum: int = 1
    sharded: bool = False
    checkpoint_activations: bool = False


def microbatch(model: DiT | RemixDiT, settings: RunSettings, size: int, grad_accum: int) -> tuple[int, int | None]:
    """Return the images of a microbatch and the number of its groups, which is None for a plain DiT.

    Args:
        model: the model; its parameters may be on the meta device.
        settings: the settings of the run.
        size: number of processes.
        grad_accum: microbatches per process and step.
    """
    n_images = settings.global_batch_size // size // grad_accum
    if not isinstance(model, RemixDiT):
        return n_images, None
    return n_images, count_groups(n_images, settings.global_batch_size // settings.experts_per_batch)


def choose_sharding(
    requested: bool | None, model: DiT | RemixDiT, settings: RunSettings, size: int, grad_accum: int
) -> tuple[bool, list[str]]:
    """Decide whether the bases are sharded over the processes.

    Args:
        requested: --shard-bases or --no-shard-bases; None to shard them among more than NODE
            processes if that sends less.
        model: the model, whole; its parameters may be on the meta device.
        settings: the settings of the run.
        size: number of processes.
        grad_accum: microbatches per process and step.

    Returns:
        The decision, and a line that gives what is sent; no line for one process or a plain DiT.

    Raises:
        UserError: if sharding is requested but not possible.
    """
    if size == 1 or not isinstance(model, RemixDiT):
        if requested and size > 1:
            raise UserError("--shard-bases: a DiT has no bases")
        return False, []
    if not can_shard(model, size):
        if requested and model.rank is not None:
            raise UserError("--shard-bases: low-rank bases are not sharded")
        if requested:
            raise UserError(f"--shard-bases: {size} processes do not divide the outputs of every mixed layer")
        return False, []
    trained, bases, mixture = count_parameters(model)
    _, groups = microbatch(model, settings, size, grad_accum)
    mixtures = mixture * grad_accum * groups
    width = PRECISIONS[settings.precision].itemsize
    ways = Parallelism(size, sharded=True), Parallelism(size)
    sharded, whole = (bytes_sent(trained, bases, mixtures, width, way) for way in ways)
    # Within a node the network is fast, and a step without sharded bases is probably faster: it is a CUDA graph.
    # This was measured for RemixDiT-S/2 with one process only.
    shard = size > NODE and sharded < whole if requested is None else requested
    sent = [f"{sharded / 2**20:,.1f} MiB per step if they are", f"{whole / 2**20:,.1f} MiB if they are not"]
    return shard, [f"bases {'' if shard else 'not '}sharded: a process sends {', '.join(sent)}"]


def dry_run(
    name: str,
    model: DiT | RemixDiT,
    dataset: FeatureDataset | AssumedFeatures,
    settings: RunSettings,
    process: dict,
    parallelism: Parallelism,
    folder: Path,
    n_checkpoints: int,
) -> list[str]:
    """Return the lines that --dry-run prints: the run, its memory, disk space and time. Nothing is computed.

    Args:
        name: name of the model.
        model: the model on the meta device. It cannot be used afterwards.
        dataset: the encoded images.
        settings: the settings of the run.
        process: keyword arguments of `create_process`.
        parallelism: how a step is divided among GPUs.
        folder: the run's folder.
        n_checkpoints: number of checkpoints that the run needs space for.
    """
    size = parallelism.size
    lines = describe_run(name, model, dataset, settings, process, counted(size, "GPU"))
    try:
        disk = check_checkpoint_space(folder, model, n_checkpoints)
    except UserError as error:
        disk = f"on this machine: {error}"
    n_images, groups = microbatch(model, settings, size, parallelism.grad_accum)
    costs = step_costs(model, n_images, groups, settings.precision, parallelism)
    memory = memory_bytes(model, create_process(**process), n_images, groups, settings.precision, parallelism)
    if settings.ema_stds:
        memory["averages for post-hoc EMA"] = memory["EMA"] * len(settings.ema_stds)
    memory["CUDA and NCCL (assumed)"] = CUDA_CONTEXT
    parts = ", ".join(f"{part_size / 2**30:.2f} {part}" for part, part_size in memory.items())
    lines += [f"memory per GPU: {sum(memory.values()) / 2**30:.1f} GiB (estimate): {parts}", disk]
    lines.append(describe_step(costs, settings.precision, size))
    hours = settings.max_steps * costs.step_seconds(settings.precision, size) / 3600
    lines.append(f"time: {hours:,.2f} hours (estimate)")
    return lines


def describe_step(costs: "StepCosts", precision: str, size: int) -> str:
    """Return the line that says how long a step takes, and why.

    Args:
        costs: what a step costs one GPU.
        precision: precision of the matrix products.
        size: number of GPUs.
    """
    seconds = costs.seconds(precision, size)
    traffic = ", ".join(f"{part_size / 1e9:.1f} {part}" for part, part_size in costs.traffic.items())
    parts = [
        f"{1e3 * seconds['compute']:.1f} ms of compute ({costs.flops / 1e12:.2f} TFLOP per step and GPU)",
        f"{1e3 * seconds['memory traffic']:.1f} ms of memory traffic ({traffic} GB)",
    ]
    if size > 1:
        parts.append(f"{1e3 * seconds['network']:.1f} ms of network beside them ({costs.sent / 1e9:.2f} GB sent)")
    step_ms = 1e3 * costs.step_seconds(precision, size)
    return (
        f"step: {step_ms:.1f} ms (estimate): {', '.join(parts)}; bound by {costs.bound(precision, size)}, at "
        f"{REACHED_FLOPS:.0%} of an H100's matrix products and {REACHED_BYTES:.0%} of its other rates"
    )


def count_checkpoints(
    folder: Path, first_step: int, max_steps: int, every: int, keep: int | None, keep_every: int | None
) -> int:
    """Return the number of checkpoints that a run needs additional space for.

    Args:
        folder: the run's folder.
        first_step: number of steps already done.
        max_steps: number of steps of the run.
        every: steps between checkpoints; one more is written after the last step.
        keep: number of recent checkpoints to keep; None for all.
        keep_every: number of steps, of which every checkpoint of a multiple is kept too.
    """
    count = -(-max_steps // every) - first_step // every
    if keep:
        always = range(keep_every, max_steps + 1, keep_every) if keep_every else range(0)
        removable = sum(int(path.stem) not in always for path in checkpoints(folder / "checkpoints"))
        kept = sum(step > first_step for step in always)
        # A new checkpoint is written before the oldest one is deleted.
        count = min(count, kept + keep + 1 - removable)
    return max(1, count)


def check_checkpoint_space(
    folder: Path, model: nn.Module, count: int, n_snapshots: int = 0, snapshot_bytes: int = 0
) -> str:
    """Check that a run's checkpoints, and its snapshots for post-hoc EMA, fit on the disk.

    Args:
        folder: the run's folder.
        model: the model in training.
        count: number of checkpoints.
        n_snapshots: number of snapshots of the averages for post-hoc EMA, which checkpoints hold too.
        snapshot_bytes: bytes per number in a snapshot.

    Returns:
        One line with the needed and the free space.

    Raises:
        UserError: if they do not fit.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # float32: the weights, their EMA, and the two moments of AdamW.
    size = 4 * (2 * parameters + 2 * trained)
    what = counted(count, "more checkpoint")
    averages = len(TRACKED_STDS) * trained if n_snapshots else 0
    if n_snapshots:
        size += 4 * averages
        what = f"{counted(n_snapshots, 'snapshot')} of averages and {what}"
    needed = count * size + n_snapshots * averages * snapshot_bytes
    return check_disk(folder, needed, f"{what} of {size / 2**20:,.1f} MiB")


@dataclass(frozen=True)
class StepCosts:
    """What a training step costs one GPU.

    Attributes:
        flops: FLOPs of the matrix products.
        traffic: bytes that are read and written in the GPU's memory, by their purpose.
        sent: bytes that are sent to other GPUs.
    """

    flops: float
    traffic: dict[str, float]
    sent: float

    def seconds(self, precision: str, size: int) -> dict[str, float]:
        """Return the seconds of "compute", "memory traffic" and "network" of a step at the assumed rates.

        Args:
            precision: precision of the matrix products.
            size: number of GPUs.
        """
        return {
            "compute": self.flops / (REACHED_FLOPS * PEAK_FLOPS[precision]),
            "memory traffic": sum(self.traffic.values()) / (REACHED_BYTES * PEAK_MEMORY),
            "network": self.sent / (REACHED_BYTES * (PEAK_NVLINK if size <= NODE else PEAK_NETWORK)),
        }

    def step_seconds(self, precision: str, size: int) -> float:
        """Return the seconds of a step. The network works while the GPU computes; the arguments are as in `seconds`."""
        seconds = self.seconds(precision, size)
        return max(seconds["compute"] + seconds["memory traffic"], seconds["network"])

    def bound(self, precision: str, size: int) -> str:
        """Return which of `seconds` limits the speed of the step."""
        seconds = self.seconds(precision, size)
        if self.step_seconds(precision, size) == seconds["network"]:
            return "network"
        return max(("compute", "memory traffic"), key=seconds.get)


def step_costs(
    model: DiT | RemixDiT, n_images: int, groups: int | None, precision: str, parallelism: Parallelism
) -> StepCosts:
    """Count the FLOPs and bytes of a compiled training step on one GPU.

    Args:
        model: the model, whole; its parameters may be on the meta device.
        n_images: images per microbatch.
        groups: number of equal groups of a RemixDiT's microbatch; None for a plain DiT.
        precision: precision of the matrix products.
        parallelism: how the step is divided among GPUs.
    """
    config = model.backbone_config
    width = torch.finfo(PRECISIONS[precision]).bits // 8
    trained, bases, mixture = count_parameters(model)
    # With R GPUs, each mixes 1/R of the rows for the groups of all GPUs: R times the groups on 1/R of the bases.
    own_bases = bases / parallelism.size if parallelism.sharded else bases
    owned = trained - bases + own_bases
    runs = 4 / 3 if parallelism.checkpoint_activations else 1
    per_microbatch = {
        "activations": activation_traffic(config, n_images, width, parallelism.checkpoint_activations),
        # Each is read in float32 and rounded, read in the forward and the backward pass, and its gradient is written,
        # read and stored in float32.
        "weights": (4 + 5 * width + 4) * (trained - bases),
        "mixing": mixing_traffic(own_bases, mixture * groups, width, groups) if groups else 0,
    }
    traffic = {part: parallelism.grad_accum * size for part, size in per_microbatch.items() if size}
    # AdamW reads a parameter, its gradient and two moments, and writes all but the gradient. The EMA reads two and
    # writes one. The check for non-finite numbers reads the gradient.
    traffic |= {"optimizer": 4 * (7 + 1) * owned, "EMA": 4 * 3 * owned}
    mixtures = mixture * (groups or 0) * parallelism.grad_accum
    sent = bytes_sent(trained, bases, mixtures, width, parallelism)
    if parallelism.size > 1:
        # What is sent is also received. Gradients are copied to the buckets of DDP. Mixtures that are received, and
        # their gradients, are copied into another order.
        reduced, exchanged = exchanged_numbers(trained, bases, mixtures, parallelism)
        traffic["exchange"] = 2 * sent + 2 * 4 * reduced + 2 * 2 * width * exchanged
    flops = training_flops(config) * n_images + low_rank_flops(model, n_images)
    return StepCosts(runs * flops * parallelism.grad_accum, traffic, sent)


def count_parameters(model: DiT | RemixDiT) -> tuple[int, int, int]:
    """Return the numbers of trained parameters, of those that are mixed, and of those of one mixture.

    Low-rank bases are not mixed.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mixed = sum(p.numel() for m in model.modules() if isinstance(m, RemixLinear) for p in m.bases())
    return trained, mixed, mixed // model.n_basis if mixed else 0


def activation_traffic(config: dict, n_images: int, width: int, twice: bool) -> float:
    """Count the bytes of activations that the kernels between the matrix products read and write in a step.

    They are the kernels that the compiler of PyTorch 2.11 would write for one block on a GPU.
    Vectors that are the same for all tokens of an image do not count. Per token and channel of a block:

    forward: the two residual additions, normalizations and modulations (16 bytes of the float32 residual and 5
    activations), attention (4 activations) and GELU (8). backward: GELU (12), attention (10), the concatenation of its
    three gradients (6), the gradients of the biases (9), and the normalizations, modulations and gates (44 bytes in
    float32 and 10 activations).

    Args:
        config: the keyword arguments of the DiT.
        n_images: images per microbatch.
        width: bytes of an activation.
        twice: whether the forward pass of the blocks runs twice.
    """
    forward, backward = 16 + 17 * width, 44 + 47 * width
    tokens = n_images * (config["input_size"] // config["patch_size"]) ** 2
    return tokens * config["depth"] * config["hidden_size"] * (forward * (2 if twice else 1) + backward)


def mixing_traffic(bases: float, mixtures: float, width: int, groups: int) -> float:
    """Count the bytes that mixing reads and writes in a forward and backward pass.

    The forward pass reads the bases in float32 and writes the mixtures, and a matrix product reads them. In the
    backward pass a matrix product reads them again, or they are mixed again if there are many groups. Another product
    writes their gradients. These and the bases are read for the gradients of alpha and of the bases, which are written.

    Args:
        bases: parameters of the bases that a GPU mixes.
        mixtures: parameters of all mixtures that a GPU computes.
        width: bytes of a number of a mixture.
        groups: number of groups per GPU.
    """
    again = 4 * bases + width * mixtures if groups >= RECOMPUTED_GROUPS else 0
    return 3 * 4 * bases + 5 * width * mixtures + again


def bytes_sent(trained: int, bases: int, mixtures: int, width: int, parallelism: Parallelism) -> float:
    """Count the bytes that a GPU sends in a step: a ring reduces gradients in float32, and mixtures go there and back.

    Args:
        trained: number of trained parameters.
        bases: number of those that belong to bases.
        mixtures: number of parameters of the mixtures of a step on one GPU.
        width: bytes of a number of a mixture.
        parallelism: how the step is divided among GPUs.
    """
    reduced, exchanged = exchanged_numbers(trained, bases, mixtures, parallelism)
    return 2 * (4 * reduced + width * exchanged) * (parallelism.size - 1) / parallelism.size


def exchanged_numbers(trained: int, bases: int, mixtures: int, parallelism: Parallelism) -> tuple[int, int]:
    """Return how many gradients are reduced and how many numbers of mixtures are exchanged."""
    return (trained - bases, mixtures) if parallelism.sharded else (trained, 0)


def memory_bytes(
    model: DiT | RemixDiT,
    diffusion: GaussianDiffusion | FlowMatching,
    n_images: int,
    groups: int | None,
    precision: str,
    parallelism: Parallelism,
) -> dict[str, float]:
    """Estimate the largest memory of a training step on one GPU, without the CUDA context, by what it holds.

    Args:
        model: the model on the meta device, whole. It cannot be used afterwards.
        diffusion: the process that gives the training losses.
        n_images, groups, precision, parallelism: see `step_costs`.

    Returns:
        Bytes. Gradients count only where they do not fit into the memory that the activations leave.
    """
    size = parallelism.size
    trained, bases, mixture = count_parameters(model)
    fixed = sum(p.numel() for p in model.parameters()) - trained
    owned = trained - bases * (1 - 1 / size) if parallelism.sharded else trained
    dtype = PRECISIONS[precision]
    activations = activation_bytes(copy.deepcopy(model), diffusion, n_images, groups, dtype)
    if parallelism.checkpoint_activations:
        depth = len((model.backbone if groups else model).blocks)
        recompute_blocks(model, compile=False)
        inputs = activation_bytes(model, diffusion, n_images, groups, dtype)
        # The backward pass has the activations of one block at a time.
        activations = inputs + (activations - inputs) // depth
    gradients = 4 * owned
    if size == 1 and parallelism.grad_accum == 1:
        # The backward pass frees activations while it computes gradients.
        gradients = max(0, gradients - activations)
    memory = {"weights": 4 * (owned + fixed), "gradients": gradients, "EMA": 4 * (owned + fixed)}
    memory |= {"AdamW's moments": 8 * owned, f"activations of {n_images} images (not compiled)": activations}
    if parallelism.sharded:
        # Sent and received, in flight at the same time.
        memory["mixtures in exchange"] = 2 * dtype.itemsize * groups * mixture
    return memory


def activation_bytes(
    model: DiT | RemixDiT,
    diffusion: GaussianDiffusion | FlowMatching,
    n_images: int,
    groups: int | None,
    precision: torch.dtype,
) -> int:
    """Count the bytes that autograd stores in the forward pass, without computing anything.

    torch.compile stores less.

    Args:
        model: the model on the meta device. It cannot be used afterwards.
        diffusion: the process that gives the training losses.
        n_images: images per microbatch.
        groups: number of equal groups of a RemixDiT's microbatch; None for a plain DiT.
        precision: dtype of the matrix products.
    """
    config = model.backbone_config
    stored = {}

    def store(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        stored[storage._cdata] = storage.nbytes()
        return tensor

    # The fake tensors pretend to be on a CPU, because the meta device does not support autocast.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        x = torch.empty(n_images, config["in_channels"], config["input_size"], config["input_size"])
        y = torch.empty(n_images, dtype=torch.long)
        t = y.float() if isinstance(diffusion, FlowMatching) else y
        conditions = {"y": y, "label_drop": y > 0} | ({"groups": groups} if groups else {})
        with (
            torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=precision != torch.float32),
        ):
            # While the graph exists, no two storages have the same address.
            graph = diffusion.training_losses(model, x, t, conditions, x)
        for parameter in model.parameters():
            stored.pop(parameter.untyped_storage()._cdata, None)
        del graph
    return sum(stored.values())


def training_flops(config: dict) -> int:
    """Count the FLOPs of a training step per image: those of the matrix products, forward and twice as many backward.

    The FLOPs of a RemixDiT are counted as those of its backbone, without the mixing and without low-rank bases.

    Args:
        config: the keyword arguments of the DiT.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        dit = DiT(**config).eval()
        x = torch.empty(1, dit.in_channels, config["input_size"], config["input_size"])
        dit(x, torch.empty(1), torch.empty(1, dtype=torch.long))
    return 3 * counter.get_total_flops()


def mixing_flops(model: RemixDiT, n_groups: int) -> int:
    """Count the FLOPs that mixing adds to a training step: Theta = alpha beta, and the gradients of alpha and of beta.

    They depend neither on the number of images nor on their size.

    Args:
        model: the model; its parameters may be on the meta device.
        n_groups: number of groups of the batch, each with one expert.
    """
    _, bases, _ = count_parameters(model)
    return 3 * 2 * n_groups * bases


def low_rank_flops(model: DiT | RemixDiT, n_images: int) -> int:
    """Count the FLOPs that low-rank bases add to a training step, forward and backward; 0 for other models.

    Args:
        model: the model; its parameters may be on the meta device.
        n_images: number of images.
    """
    if not isinstance(model, RemixDiT) or model.rank is None:
        return 0
    tokens = model.backbone.pos_embed.shape[1]
    pairs = sum(p.numel() for _, layer in model.mixed() for p in layer.bases())
    return 3 * 2 * pairs * tokens * n_images


def matmul_rate(device: torch.device, precision: str, times: int = 3) -> float:
    """Measure the rate of a large matrix product, in FLOP/s: the best of several runs.

    Args:
        device: the device to measure.
        precision: "fp32" (TF32 if that is enabled), "fp64", "bf16" or "fp16".
        times: number of runs.
    """
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(torch.float64 if precision == "fp64" else PRECISIONS[precision])
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
