"""Bases that are sharded over the processes of a training run (train_fast.py --shard-bases).

With R processes, each process owns 1/R of the output features (rows) of every basis, with their gradients, optimizer
state and EMA. It mixes its rows for the groups of all processes, and an all-to-all sends every mixture to the process
whose group needs it. The backward pass sends the gradients of the mixtures back in the same way. What is sent depends
on the number of groups, but not on the number of bases.

The exchanges of all layers start at the beginning of the forward pass, and each layer waits for its own. In the
backward pass each layer starts its exchange, and the mixing at the end waits for them.
"""

import copy
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixing.coefficients import BatchCoefficients
from mixing.grouped_linear import LinearPerGroupFunction, mix, mix_layer_backward, product_dtype
from remix import Remix, RemixLinear
from runtime.errors import UserError
from runtime.processes import PRECISIONS, World
from training.batches import microbatch_shape
from training.experts import Experts
from training.settings import Execution, RunSettings

# The functional collectives return at once. `wait_tensor` makes the device wait, and the compiler keeps all of them.
collectives = torch.ops._c10d_functional
# GPUs per node.
NODE = 8


def shard_bases(model: Remix, world: World):
    """Divide the bases of a model among the processes, in place. Afterwards it can only be trained.

    Args:
        model: the model, the same on every process. Its forward pass then needs `groups`, and every process must take
            part in it with equally many groups.
        world: this process's place among all processes. `choose_sharding` must allow it.
    """
    coefficients = ShardedCoefficients(world.size)
    for name, layer in model.mixed():
        sharded = ShardedRemixLinear(layer, coefficients, world.rank)
        coefficients.layers.append(sharded)
        model.backbone.set_submodule(name, sharded)
    model.batch_coefficients = coefficients


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of which this process owns a part, by their names in the model."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, ShardedRemixLinear)}
    return {f"{name}.{part}": p for name, module in modules.items() for part, p in module.named_parameters()}


def choose_sharding(
    requested: bool | None, experts: Experts, settings: RunSettings, execution: Execution
) -> tuple[bool, list[str]]:
    """Decide whether the bases are sharded over the processes.

    Args:
        requested: --shard-bases or --no-shard-bases; None to shard them among more than NODE processes if that sends
            less.
        experts: the experts of the model, whose parameters may be on the meta device.
        settings: the settings of the run.
        execution: how the work is divided; whether it is sharded has no effect.

    Returns:
        The decision, and a line that gives what is sent; no line for one process or a plain model.

    Raises:
        UserError: if sharding is requested but not possible.
    """
    size = execution.processes
    if size == 1 or not experts.n_experts:
        if requested and size > 1:
            raise UserError("--shard-bases: a plain model has no bases")
        return False, []
    if not experts.count_parameters().bases:
        if requested:
            raise UserError("--shard-bases: low-rank bases are not sharded")
        return False, []
    if any(layer.out_features % size for layer in experts.layers.values()):
        if requested:
            raise UserError(f"--shard-bases: {size} processes do not divide the outputs of every mixed layer")
        return False, []
    sharded, whole = (bytes_sent(experts, settings, replace(execution, shard=shard)) for shard in (True, False))
    # Within a node the network is fast, and a step without sharded bases is probably faster: it is a CUDA graph.
    # This was measured for RemixDiT-S/2 with one process only.
    shard = size > NODE and sharded < whole if requested is None else requested
    sent = [f"{sharded / 2**20:,.1f} MiB per step if they are", f"{whole / 2**20:,.1f} MiB if they are not"]
    return shard, [f"bases {'' if shard else 'not '}sharded: a process sends {', '.join(sent)}"]


def bytes_sent(experts: Experts, settings: RunSettings, execution: Execution) -> float:
    """Count the bytes that a process sends in a step.

    A ring reduces gradients in float32, and sharded mixtures go there and back.

    Args:
        experts: the experts of the model, whose parameters may be on the meta device.
        settings: the settings of the run.
        execution: how the work is divided.
    """
    trained, bases, mixture = experts.count_parameters()
    reduced, exchanged = trained, 0
    if execution.shard:
        _, groups = microbatch_shape(settings, execution, experts.n_experts)
        reduced, exchanged = trained - bases, mixture * groups * execution.grad_accum
    numbers = 4 * reduced + PRECISIONS[settings.precision].itemsize * exchanged
    return 2 * numbers * (execution.processes - 1) / execution.processes


class ShardedCoefficients(BatchCoefficients):
    """The coefficients of the groups of all processes, and the exchanges in flight.

    Args:
        size: number of processes R.

    Attributes:
        layers: the mixed layers, which hold this process's rows.
        received: for each layer, the numbers that are being received.
    """

    def __init__(self, size: int):
        self.size = size
        self.group_name = dist.group.WORLD.group_name
        self.layers: list[ShardedRemixLinear] = []
        self.received: list[Tensor] = []

    def start(self, alpha: Tensor, experts: Tensor, size: int, per_sample: bool = False):
        """Collect the experts of all processes and start the exchanges; see `BatchCoefficients.start`."""
        experts = collectives.all_gather_into_tensor(experts.contiguous(), self.size, self.group_name)
        self.alpha = alpha[:, collectives.wait_tensor(experts)]  # [1 or depth, R * G, K]
        dtype = product_dtype(self.alpha)
        for layer in self.layers:
            sent = MixRowsFunction.apply(self.alpha[layer.row], layer.weight, layer.bias, self.size, dtype)
            self.received.append(StartExchange.apply(sent, self.group_name))

    def end(self):
        super().end()
        # A new list, because blocks that run again in the backward pass use the present one.
        self.received = []

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values


class ShardedRemixLinear(RemixLinear):
    """A mixed layer of which this process owns some rows.

    Args:
        whole: the layer with all rows.
        coefficients: holds the exchange of this layer.
        rank: index of this process.
    """

    def __init__(self, whole: RemixLinear, coefficients: ShardedCoefficients, rank: int):
        with torch.device("meta"):
            super().__init__(whole.in_features, whole.out_features, len(whole.weight), coefficients, whole.row)
        self.weight = nn.Parameter(own_rows(whole.weight.detach(), rank, coefficients.size))  # [K, out / R, in]
        if whole.bias is not None:
            self.bias = nn.Parameter(own_rows(whole.bias.detach(), rank, coefficients.size))  # [K, out / R]
        else:
            # The mixtures of zeros are sent, so that the exchange is the same for all layers.
            del self.bias
            self.register_buffer("bias", self.weight.new_zeros(self.weight.shape[:2]), persistent=False)
        self.index = len(coefficients.layers)

    def forward(self, x: Tensor) -> Tensor:
        """See `RemixLinear.forward`."""
        coefficients = self.batch_coefficients
        received = FinishExchange.apply(coefficients.received[self.index], coefficients.group_name)
        weight, bias = self.arrange(received, coefficients.size)
        return LinearPerGroupFunction.apply(x.to(weight.dtype), weight, bias)

    def arrange(self, received: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Arrange what the R processes have sent [R, G * out / R * (in + 1)] as [G, out, in] and [G, out]."""
        rows = self.out_features // size
        groups = received.shape[1] // (rows * (self.in_features + 1))
        weight, bias = received.split([groups * rows * self.in_features, groups * rows], dim=1)
        weight = weight.view(size, groups, rows, self.in_features).transpose(0, 1)
        bias = bias.view(size, groups, rows).transpose(0, 1)
        return weight.reshape(groups, -1, self.in_features), bias.reshape(groups, -1)


def own_rows(whole: Tensor, rank: int, size: int) -> Tensor:
    """Copy the rows [K, out / R, ...] that a process owns of a tensor [K, out, ...]."""
    return whole.chunk(size, dim=1)[rank].clone()


def gather_rows(rows: Tensor, rank: int, size: int, everywhere: bool = False) -> Tensor | None:
    """Return the tensor [K, out, ...] whose rows [K, out / R, ...] the processes own, in host memory.

    Every process must call this. The result is on rank 0 only, or on every process if `everywhere`.
    """
    parts = [torch.empty_like(rows) for _ in range(size)] if rank == 0 or everywhere else None
    if everywhere:
        dist.all_gather(parts, rows.contiguous())
    else:
        dist.gather(rows.contiguous(), parts)
    return torch.cat(parts, dim=1).cpu() if parts else None


def gather_model(model: Remix, world: World, everywhere: bool) -> Remix | None:
    """Return a copy of a sharded model with whole bases in host memory, in eval mode.

    Every process must call this. The result is on rank 0 only, or on every process if `everywhere`.
    """
    whole = copy.deepcopy(model) if world.is_main or everywhere else None
    coefficients = BatchCoefficients()
    gather = partial(gather_rows, rank=world.rank, size=world.size, everywhere=everywhere)
    for name, layer in model.mixed():
        tensors = {part: gather(tensor) for part, tensor in layer.state_dict().items()}
        if whole is not None:
            with torch.device("meta"):
                shape = layer.in_features, layer.out_features, model.n_basis
                linear = RemixLinear(*shape, coefficients, layer.row, bias="bias" in tensors)
            linear.load_state_dict(tensors, assign=True)
            whole.backbone.set_submodule(name, linear)
    if whole is not None:
        whole.batch_coefficients = coefficients
        whole.eval().requires_grad_(False)
    return whole


class MixRowsFunction(torch.autograd.Function):
    """Mix this process's rows for the groups of all processes, as `grouped_linear.mixed_linear` mixes whole layers.

    The result [R, G * out / R * (in + 1)] is, for each process, the mixtures of the weights and then of the biases.
    """

    @staticmethod
    def forward(ctx, alpha: Tensor, weight: Tensor, bias: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(alpha, weight, bias)
        ctx.size = size
        parts = mix(alpha, weight, dtype), mix(alpha, bias, dtype)  # [R * G, out / R, in], [R * G, out / R]
        return torch.cat([part.view(size, -1) for part in parts], dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        alpha, weight, bias = ctx.saved_tensors
        n_weights = grad.shape[1] * weight.shape[2] // (weight.shape[2] + 1)
        grad_weight, grad_bias = grad.split([n_weights, grad.shape[1] - n_weights], dim=1)
        grad_weight = grad_weight.reshape(-1, *weight.shape[1:])  # [R * G, out / R, in]
        grad_bias = grad_bias.reshape(-1, *bias.shape[1:])  # [R * G, out / R]
        # The gradient of alpha is from these rows and all groups, and DDP averages it over the processes. Those of the
        # bases are divided by the number of processes here: the loss of a step is the mean of the processes' losses.
        share = alpha / ctx.size
        needs_alpha = ctx.needs_input_grad[0]
        return *mix_layer_backward(share, (grad_weight, grad_bias), (weight, bias), needs_alpha), None, None


class StartExchange(torch.autograd.Function):
    """Start sending row r of a tensor [R, n] to process r. The result must not be read before `FinishExchange`."""

    @staticmethod
    def forward(ctx, sent: Tensor, group_name: str) -> Tensor:
        return exchange(sent, group_name)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.wait_tensor(grad), None


class FinishExchange(torch.autograd.Function):
    """Wait for an exchange. The backward pass starts the exchange of the gradients."""

    @staticmethod
    def forward(ctx, received: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return collectives.wait_tensor(received)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return exchange(grad.contiguous(), ctx.group_name), None


def exchange(sent: Tensor, group_name: str) -> Tensor:
    """Start an all-to-all of a tensor [R, n]."""
    ones = [1] * len(sent)
    return collectives.all_to_all_single(sent, ones, ones, group_name)
