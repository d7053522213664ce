"""The dry run: a run's size, memory, disk space, operations and the bytes that it sends (train_fast.py --dry-run)."""

import copy
import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import data_shape
from runtime.command_line import counted
from runtime.errors import UserError
from runtime.processes import PRECISIONS
from training.batches import microbatch_shape
from training.experts import experts_of
from training.run import Run
from training.sharding import bytes_sent

# What a process holds on the GPU for CUDA, cuBLAS and NCCL, in bytes.
CUDA_CONTEXT = 2**30
# Result files of benchmarks/benchmark.py.
MEASUREMENTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def dry_run(run: Run) -> list[str]:
    """Return the lines that --dry-run prints: the run, its memory, disk space and steps. Nothing is computed.

    Args:
        run: the run, with its model on the meta device. The model cannot be used afterwards.
    """
    settings, execution, experts = run.settings, run.execution, experts_of(run.model)
    lines = [f"each of {run.args.independent} independent experts:"] if run.args.independent else []
    lines += run.describe(counted(execution.processes, "GPU"))
    try:
        disk = run.check_space(0)
    except UserError as error:
        disk = f"on this machine: {error}"
    n_images, groups = microbatch_shape(settings, execution, experts.n_experts)
    speeds = measured_speeds(run, n_images, groups)
    step = [f"{step_flops(run, n_images) / 1e12:.2f} TFLOP per step and GPU"]
    if execution.processes > 1:
        step.append(f"{bytes_sent(experts, settings, execution) / 1e9:.2f} GB sent by each GPU")
    memory = memory_bytes(run)
    memory["CUDA and NCCL (assumed)"] = CUDA_CONTEXT
    parts = ", ".join(f"{part_size / 2**30:.2f} {part}" for part, part_size in memory.items())
    lines += [f"memory per GPU: {sum(memory.values()) / 2**30:.1f} GiB (estimate): {parts}", disk]
    return [*lines, f"step: {', '.join(step)}", *speeds]


def measured_speeds(run: Run, n_images: int, groups: int | None) -> list[str]:
    """Return a line for each device on which training steps of the same model and precision were measured.

    If several numbers of images and of experts were measured on a device, the closest to those of the run is chosen.

    Args:
        run: the run.
        n_images: images per microbatch.
        groups: number of equal groups of a RemixDiT's microbatch; None for a plain DiT.

    Returns:
        The lines, each with the device and the result file, or one line that says that nothing was measured.
    """
    trained = experts_of(run.model).count_parameters().trained
    precision = run.settings.precision
    kind, size = run.args.model.split("-")
    required = {"model": size, "input_size": run.dataset.shape[-1], "precision": precision, "compile": True}
    closest = {}
    for path in sorted(MEASUREMENTS.glob("*.json")):
        result = json.loads(path.read_text())
        settings, device = result["settings"], result["machine"]["device"]
        if any(settings[key] != value for key, value in required.items()):
            continue
        for row in result.get("training", []):
            # The numbers of parameters tell models of other ranks and numbers of bases apart. Those of models with
            # other numbers of classes and experts differ by less.
            same = abs(1e6 * row.get("parameters, M", 0) / trained - 1) < 0.02
            if not same or row["model"].split()[0] != kind:
                continue
            measured_groups = int(row["model"].partition("G=")[2] or 1)
            distance = abs(settings["batch_size"] - n_images), abs(measured_groups - (groups or 1))
            experts = f" and {counted(measured_groups, 'expert')}" if groups else ""
            images = f"{counted(settings['batch_size'], 'image')}{experts} per process and step"
            line = f"measured: {row['images/s']:,.0f} images/s on {device}, {images} ({path.name})"
            closest[device] = min(closest.get(device, (distance, line)), (distance, line))
    lines = [line for _, line in closest.values()]
    return lines or [f"the speed of this model in {precision} was not measured"]


def step_flops(run: Run, n_images: int) -> float:
    """Count the FLOPs of the matrix products of a training step on one GPU, without those of mixing.

    Args:
        run: the run.
        n_images: images per microbatch.
    """
    experts = experts_of(run.model)
    flops = (experts.training_flops() + experts.low_rank_flops()) * n_images
    runs = 4 / 3 if run.execution.checkpoint_activations else 1
    return runs * flops * run.execution.grad_accum


def memory_bytes(run: Run) -> dict[str, float]:
    """Estimate the largest memory of a training step on one GPU, without the CUDA context, by what it holds.

    Args:
        run: the run, with its model on the meta device. The model cannot be used afterwards.

    Returns:
        Bytes. Gradients count only where they do not fit into the memory that the activations leave.
    """
    execution, experts = run.execution, experts_of(run.model)
    counts = experts.count_parameters()
    fixed = sum(p.numel() for p in run.model.parameters()) - counts.trained
    owned = counts.trained - (counts.bases * (1 - 1 / execution.processes) if execution.shard else 0)
    n_images, groups = microbatch_shape(run.settings, execution, experts.n_experts)
    activations = activation_bytes(run, n_images, groups)
    if execution.checkpoint_activations:
        experts.recompute_blocks(compiled=False)
        inputs = activation_bytes(run, n_images, groups)
        # The backward pass has the activations of one block at a time.
        activations = inputs + (activations - inputs) // len(experts.blocks)
    gradients = 4 * owned
    if execution.processes == 1 and execution.grad_accum == 1:
        # The backward pass frees activations while it computes gradients.
        gradients = max(0, gradients - activations)
    memory = {"weights": 4 * (owned + fixed), "gradients": gradients, "EMA": 4 * (owned + fixed)}
    memory |= {"AdamW's moments": 8 * owned, f"activations of {n_images} images (not compiled)": activations}
    if execution.shard:
        # Sent and received, in flight at the same time.
        memory["mixtures in exchange"] = 2 * PRECISIONS[run.settings.precision].itemsize * groups * counts.mixture
    if run.settings.ema_stds:
        memory["averages for post-hoc EMA"] = memory["EMA"] * len(run.settings.ema_stds)
    return memory


def activation_bytes(run: Run, n_images: int, groups: int | None) -> int:
    """Count the bytes that autograd stores in the forward pass, without computing anything.

    torch.compile stores less.

    Args:
        run: the run, with its model on the meta device. The model is not changed.
        n_images: images per microbatch.
        groups: number of equal groups of a Remix's microbatch; None for a plain model.
    """
    model, config = copy.deepcopy(run.model), run.config["model"]["backbone"]
    precision = PRECISIONS[run.settings.precision]
    stored = {}

    def store(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        stored[storage._cdata] = storage.nbytes()
        return tensor

    # The fake tensors pretend to be on a CPU, because the meta device does not support autocast.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        x = torch.empty(n_images, *data_shape(config))
        y = torch.empty(n_images, dtype=torch.long)
        t = torch.zeros(n_images, dtype=run.process.scale.dtype)
        conditions = {"y": y, "label_drop": y > 0} | ({"groups": groups} if groups else {})
        with (
            torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=precision != torch.float32),
        ):
            # While the graph exists, no two storages have the same address.
            graph = run.process.training_losses(model, x, t, conditions, x)
        for parameter in model.parameters():
            stored.pop(parameter.untyped_storage()._cdata, None)
        del graph
    return sum(stored.values())
