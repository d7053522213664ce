"""The plan of a training run: its settings, and the memory, disk space and time it will take (--dry-run)."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import checkpoints
from common import UserError, check_disk, counted
from diffusion import FlowMatching, GaussianDiffusion, create_process
from distributed import PRECISIONS, world_size
from features import FeatureDataset
from models import DiT
from remix import RemixDiT, RemixLinear
from training.batches import count_groups

# Rate of bf16 matrix products of an A100, in FLOP/s.
PEAK = 312e12
# The part of PEAK that training is assumed to reach. Wide models reach more, narrow ones less.
UTILISATION = 0.3


@dataclass(frozen=True)
class RunSettings:
    """The settings that determine a run, beside its model and data; the "training" part of a checkpoint's config.

    Attributes:
        max_steps: number of steps.
        global_batch_size: images per step, over all processes.
        experts_per_batch: experts per global batch; 1 for a plain DiT.
        timesteps: lowest timestep, and highest timestep plus one; for a flow the lowest and highest noise level.
        lr: peak learning rate of the bases and shared weights.
        coeff_lr: peak learning rate of the mixing logits.
        coeff_lr_end: final learning rate of the mixing logits; None for a plain DiT.
        ema_decay: EMA decay per step.
        clip_grad: largest gradient norm; 0 for no clipping.
        prior_strength: weight of the prior's cross-entropy at step 0.
        prior_bonus: initial lead of the prior's basis in the mixing logits.
        precision: precision of the matrix products.
        global_seed: seed of all random draws.
        load_weight: file that the weights at step 0 come from; None for random weights.
        schedule_steps: number of steps over which the learning rates and the prior's weight fall; None for max_steps.
    """

    max_steps: int
    global_batch_size: int
    experts_per_batch: int
    timesteps: list[float]
    lr: float
    coeff_lr: float
    coeff_lr_end: float | None
    ema_decay: float
    clip_grad: float
    prior_strength: float
    prior_bonus: float
    precision: str
    global_seed: int
    load_weight: str | None
    schedule_steps: int | None = None


class AssumedFeatures:
    """Features that do not exist yet, for a dry run: ImageNet's training set, encoded by the published VAE.

    Args:
        path: the folder that does not exist.
        image_size: side of the images in pixels.

    Raises:
        UserError: if the VAE cannot encode images of that size.
    """

    def __init__(self, path: str, image_size: int = 256):
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
    """Return the lines that describe a run: its model, its data, its steps, and its process if that is a flow.

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
    return [
        f"{name}: {parameters:,.2f} M parameters, from {settings.load_weight or 'scratch'}",
        f"{counted(len(dataset), 'image')} of {counted(model.num_classes, 'class', 'classes')} as {shape} ({source})",
        f"{counted(settings.max_steps, 'step')} of {batch}{experts}",
        *([f"flow matching: {', '.join(flow)}"] if flow else []),
    ]


def dry_run(
    name: str,
    model: DiT | RemixDiT,
    dataset: FeatureDataset | AssumedFeatures,
    settings: RunSettings,
    process: dict,
    grad_accum: int,
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
        grad_accum: microbatches per process and step.
        folder: the run's folder.
        n_checkpoints: number of checkpoints that the run needs space for.
    """
    lines = describe_run(name, model, dataset, settings, process, counted(world_size(), "GPU"))
    try:
        disk = check_checkpoint_space(folder, model, n_checkpoints)
    except UserError as error:
        disk = f"on this machine: {error}"

    remix = isinstance(model, RemixDiT)
    backbone = model.backbone_config if remix else model.config
    n_images = settings.global_batch_size // world_size() // grad_accum
    groups = count_groups(n_images, settings.global_batch_size // settings.experts_per_batch) if remix else None
    activations = activation_bytes(model, create_process(**process), n_images, groups, PRECISIONS[settings.precision])
    stored = f"activations of {counted(n_images, 'image')} (estimate, not compiled)"
    memory = static_memory(model) | {stored: activations}
    parts = ", ".join(f"{size / 2**30:.2f} {part}" for part, size in memory.items())
    lines.append(f"memory per GPU: {sum(memory.values()) / 2**30:.1f} GiB: {parts}")
    lines.append(disk)

    flops = training_flops(backbone) * n_images * grad_accum
    hours = settings.max_steps * flops / (UTILISATION * PEAK) / 3600
    rate = f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s, an A100's peak in bf16"
    lines.append(f"time: {hours:,.2f} hours (estimate: {flops / 1e12:.2f} TFLOP per step and GPU, at {rate})")
    return lines


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


def check_checkpoint_space(folder: Path, model: nn.Module, count: int) -> str:
    """Check that a run's checkpoints fit on the disk.

    Args:
        folder: the run's folder.
        model: the model in training.
        count: number of checkpoints.

    Returns:
        One line with the needed and the free space.

    Raises:
        UserError: if they do not fit.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # float32: the weights, their EMA, and the two moments of AdamW.
    size = 4 * (2 * parameters + 2 * trained)
    return check_disk(folder, count * size, f"{counted(count, 'more checkpoint')} of {size / 2**20:,.1f} MiB")


def static_memory(model: nn.Module) -> dict[str, int]:
    """Return the bytes that a GPU holds during the whole run, in float32, by what they hold."""
    size = 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"weights": size, "gradients": trained, "EMA": size, "AdamW's moments": 2 * trained}


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
    config = model.backbone_config if isinstance(model, RemixDiT) else model.config
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

    The FLOPs of a RemixDiT are counted as those of its backbone, without the mixing.

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
    # [K, out, in] and [K, out]
    bases = sum(p.numel() for module in model.modules() if isinstance(module, RemixLinear) for p in module.parameters())
    return 3 * 2 * n_groups * bases


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
