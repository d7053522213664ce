"""One training step: losses, gradients, the AdamW update and the EMA. In a step, the host does not wait for a GPU."""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from checkpoint import load_weights
from diffusion import FlowMatching, GaussianDiffusion
from mixing.grouped_linear import choose_attention
from models import DiT
from remix import RemixDiT
from runtime.processes import World
from training.posthoc_ema import decay_at
from training.sharding import gather_model, gather_rows, own_rows, shard_bases, sharded_parameters
from training.statistics import LOSSES, TrainingStats
from training.writer import CheckpointWriter

# DDP cuts a compiled graph where its buckets end, and exchanges a bucket while the next one is computed.
BUCKETS = 4
# To save memory, the compiler may place the wait for an exchange directly after its start. With these options,
# exchanges start earlier and the waits come later, so that they overlap with computation.
OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits", "raise_comms"],
}


def bucket_mib(parameters: list[Tensor]) -> float:
    """Return the size of DDP's buckets in MiB: the size of the gradients divided by BUCKETS, but at least 25."""
    # PyTorch's default is 25 MiB, which is less than one block of a large model.
    return max(25, sum(p.nbytes for p in parameters) / BUCKETS / 2**20)


class TrainingLoss(nn.Module):
    """A model and its training losses in one module, which can be compiled as one graph.

    Args:
        model: the model in training.
        diffusion: the process that gives the training losses.
        names: names of the losses to report.
        prior: whether to add the prior's cross-entropy of a RemixDiT to the loss.
    """

    def __init__(
        self,
        model: DiT | RemixDiT,
        diffusion: GaussianDiffusion | FlowMatching,
        names: tuple[str, ...],
        prior: bool,
    ):
        super().__init__()
        self.names = names
        self.model = model
        self.diffusion = diffusion
        self.prior = prior

    def forward(
        self, x: Tensor, t: Tensor, conditions: dict, noise: Tensor, prior_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of a microbatch.

        Args:
            x, t, conditions, noise: see `BatchSampler.microbatches`.
            prior_weight: weight of the prior's cross-entropy in the loss [].

        Returns:
            The loss to differentiate [], and the mean losses without gradient, in the order of `names`. If a mean loss
            is not finite, every gradient is NaN.
        """
        losses = self.diffusion.training_losses(self.model, x, t, conditions, noise)
        means = {name: values.mean() for name, values in losses.items()}  # [B] -> []
        total = means["loss"]
        if self.prior:
            means["prior"] = self.model.prior_loss()
            total = total + prior_weight * means["prior"]
        means = torch.stack([means.get(name, torch.zeros_like(total)) for name in self.names]).detach()
        # After the exchange, the gradients are then NaN on all processes, so that all of them skip the step.
        return total * torch.where(means.isfinite().all(), 1.0, math.nan), means


class Trainer:
    """The model, its EMA, optimizer, gradient scaler and statistics: the training state that a checkpoint stores.

    Args:
        model: the model at step 0. It is moved to the device of `world` and trained in place.
        diffusion: the diffusion process, which computes the losses.
        world: the processes of the run, and the rank and device of this one.
        lr: peak learning rate of the bases and shared weights, which a cosine lowers to half of this value.
        coeff_lr: peak learning rate of the mixing logits.
        coeff_lr_end: final learning rate of the mixing logits; None for half of `lr`, as published.
        ema_decay: EMA decay per step.
        clip_grad: largest gradient norm; 0 for no clipping.
        precision: precision of the matrix products: "fp32" (TF32 on GPUs), "bf16" or "fp16".
        compile: whether to compile the model with its losses. On GPUs, forward and backward pass are then recorded as
            CUDA graphs, unless the bases are sharded.
        checkpoint_activations: whether to store only the inputs of each block in the forward pass, and to compute its
            activations again in the backward pass.
        shard: whether to shard the bases over the processes; see sharding.py.
        ema_stds: relative standard deviations of the power-function averages for post-hoc EMA; see posthoc_ema.py.

    Attributes:
        model: the model in training.
        loss: `model` with its losses, wrapped in DistributedDataParallel if there are several processes.
        ema: copy of the model with the EMA of the weights, in eval mode.
        trained: the parameters that are trained.
        shards: the sharded parameters in `trained`, by their names in `model`. This process holds a part of each.
        replicated: the other parameters in `trained`, which DDP keeps equal on all processes.
        averages: for each of `ema_stds`, the average of each parameter of `trained`.
        ema_params: the parameters of `ema` that correspond to `trained`.
        logit_params: the mixing logits if they are trained, as a list of one parameter; otherwise an empty list.
        optimizer: AdamW, with one group for the weights and one for the mixing logits.
        scaler: gradient scaler of fp16; it does nothing in other precisions.
        loss_names: names of the losses that are reported.
        stats: running sums of the losses, and the non-finite steps.
        optimize_ddp: whether a compiled graph is cut where DDP's buckets end.
        cuda_graphs: whether the compiled forward and backward pass are recorded as CUDA graphs. A graph starts all its
            kernels at once. Its results are overwritten when it runs again. It keeps the memory of its activations and
            gradients between the steps.
        mark: callback mark(name), called at the end of each stage of a step. Benchmarks replace it.
    """

    def __init__(
        self,
        model: DiT | RemixDiT,
        diffusion: GaussianDiffusion | FlowMatching,
        world: World,
        lr: float,
        coeff_lr: float = 1e-2,
        coeff_lr_end: float | None = None,
        ema_decay: float = 0.9999,
        clip_grad: float = 0.0,
        precision: str = "fp32",
        compile: bool = False,
        checkpoint_activations: bool = False,
        shard: bool = False,
        ema_stds: Iterable[float] = (),
    ):
        self.world = world
        self.clip_grad = clip_grad
        self.precision = precision
        # The loss of a flow has no parts "mse" and "vb".
        self.loss_names = ("loss", "prior") if isinstance(diffusion, FlowMatching) else LOSSES
        self.stats = TrainingStats(world, self.loss_names)
        self.mark = lambda stage: None

        if shard:
            shard_bases(model, world)
        self.model = model.to(world.device).train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        pairs = zip(model.parameters(), self.ema.parameters(), strict=True)
        self.shards = sharded_parameters(model)
        self.replicated = [p for p in self.trained if all(p is not shard for shard in self.shards.values())]
        self.ema_params = [ema for parameter, ema in pairs if parameter.requires_grad]
        self.update_ema = get_ema_multi_avg_fn(ema_decay)
        self.averages = {std: [p.detach().clone() for p in self.trained] for std in ema_stds}

        # One-hot coefficients are fixed: their logits are not trained.
        self.logit_params = [model.logits] if isinstance(model, RemixDiT) and model.logits.requires_grad else []
        weights = [p for p in self.trained if not any(p is logits for logits in self.logit_params)]
        groups = [{"params": weights}, {"params": self.logit_params}]
        # set_progress sets the learning rates before each step.
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0, fused=True)
        # First and last learning rate of each group.
        self.lr_ranges = [(lr, lr / 2), (coeff_lr, lr / 2 if coeff_lr_end is None else coeff_lr_end)]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")

        if checkpoint_activations:
            recompute_blocks(model, compile)
        prior = bool(self.logit_params)
        diffusion = diffusion.to(world.device)
        if compile:
            choose_attention(model, world.device)
        self.loss = TrainingLoss(self.model, diffusion, self.loss_names, prior)
        # With sharded bases the graph must stay whole: it has to wait for the exchanges that it starts, because the
        # compiler may otherwise reuse their memory. CUDA graphs that hold exchanges were not tested with several GPUs.
        self.optimize_ddp = not shard
        self.cuda_graphs = compile and world.device.type == "cuda" and not shard
        if compile:
            options = OVERLAP if shard else {"triton.cudagraphs": self.cuda_graphs}
            # The shapes do not change during a run, and symbolic sizes would be slower.
            self.loss.compile(dynamic=False, options=options)
        if world.size > 1:
            names = [f"model.{name}" for name in self.shards]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.loss, names)
            # The model has no buffers that change. Gradients that are views of the buckets need no copy.
            self.loss = DistributedDataParallel(
                self.loss,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=bucket_mib(self.replicated),
            )

    def state_dict(self) -> dict[str, dict]:
        """Return the weights, the EMA, the optimizer and the scaler for a checkpoint, as copies in host memory.

        Every process must call this. The result holds tensors only on rank 0. Sharded bases are gathered.
        """
        gather = partial(gather_rows, rank=self.world.rank, size=self.world.size)
        state = {
            "model": self._map_weights(self.model.state_dict(), gather, self._copy_to_host),
            "ema": self._map_weights(self.ema.state_dict(), gather, self._copy_to_host),
            "optimizer": self._map_moments(self.optimizer.state_dict(), gather, self._copy_to_host),
            "scaler": self.scaler.state_dict(),
        }
        return state | ({"averages": self.whole_averages()} if self.averages else {})

    def whole_averages(self) -> dict[str, dict[str, Tensor]]:
        """Return the power-function averages of the trained tensors as copies in host memory, by width and name.

        Every process must call this. Only on rank 0 the result holds the tensors. Sharded bases are put together.
        """
        gather = partial(gather_rows, rank=self.world.rank, size=self.world.size)
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return {
            str(std): self._map_weights(dict(zip(names, tensors, strict=True)), gather, self._copy_to_host)
            for std, tensors in self.averages.items()
        }

    def _copy_to_host(self, tensor: Tensor) -> Tensor | None:
        """Return a copy of a tensor in host memory, on rank 0 only."""
        return tensor.detach().to("cpu", copy=True) if self.world.is_main else None

    def _map_weights(self, state: dict[str, Tensor], sharded: Callable, other: Callable) -> dict[str, Tensor]:
        """Apply one function to the sharded tensors of a model's state dict, and another one to all others."""
        return {name: (sharded if name in self.shards else other)(tensor) for name, tensor in state.items()}

    def _map_moments(self, state: dict, sharded: Callable, other: Callable) -> dict:
        """Do the same to the tensors of the optimizer's state dict."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sharded_indices = {i for i, p in enumerate(parameters) if any(p is shard for shard in self.shards.values())}
        moments = {}
        for i, tensors in state["state"].items():
            # The number of steps is the same for all rows.
            functions = {name: sharded if i in sharded_indices and name != "step" else other for name in tensors}
            moments[i] = {name: functions[name](tensor) for name, tensor in tensors.items()}
        return state | {"state": moments}

    def whole_ema(self, everywhere: bool = False) -> DiT | RemixDiT | None:
        """Return the EMA model with whole bases, on rank 0 only, or on every process. Every process must call this.

        If the bases are sharded, it is a copy that has them in host memory.
        """
        if self.shards:
            return gather_model(self.ema, self.world, everywhere)
        return self.ema if self.world.is_main or everywhere else None

    def load_state_dict(self, state: dict, path: Path | str):
        """Continue from a checkpoint.

        Args:
            state: the checkpoint: what `state_dict` returns on rank 0, and the state of `stats` under "window". Its
                tensors may be mapped from the file; each process then reads only those parts that it needs.
            path: the checkpoint's file, for error messages.

        Raises:
            UserError: if the weights do not fit the model.
        """
        own = partial(own_rows, rank=self.world.rank, size=self.world.size)
        for model, part in ((self.model, "model"), (self.ema, "ema")):
            load_weights(model, self._map_weights(state[part], own, lambda tensor: tensor), path)
        for std, tensors in self.averages.items():
            saved = self._map_weights(state["averages"][str(std)], own, lambda tensor: tensor)
            torch._foreach_copy_(tensors, list(saved.values()))
        # On CPUs, the optimizer keeps the tensors that it loads. They must not be those of the file.
        copy_to_device = partial(Tensor.to, device=self.world.device, copy=True)
        self.optimizer.load_state_dict(self._map_moments(state["optimizer"], own, copy_to_device))
        self.scaler.load_state_dict(state["scaler"])
        self.stats.load_state_dict(state["window"])

    def set_progress(self, progress: float):
        """Set the learning rates by a cosine schedule, from their first to their last value.

        Args:
            progress: completed fraction of the schedule, from 0 to 1.
        """
        for group, (first, last) in zip(self.optimizer.param_groups, self.lr_ranges, strict=True):
            group["lr"] = last + (first - last) * (1 + math.cos(math.pi * progress)) / 2

    def learning_rates(self) -> dict[str, float]:
        """Return the current learning rates: "lr" of the bases and shared weights, "coeff_lr" of the mixing logits."""
        weights, logits = self.optimizer.param_groups
        return {"lr": weights["lr"], "coeff_lr": logits["lr"]}

    def step(self, step: int, microbatches: Iterable[tuple[Tensor, Tensor, dict, Tensor]], prior_weight: float = 0.0):
        """Train on this process's rows of one global batch.

        A non-finite loss or gradient on any process leaves the weights and the optimizer unchanged on all processes.

        Args:
            step: the training step, from 0.
            microbatches: (x, t, conditions, noise) of each microbatch of b images, from `BatchSampler.microbatches`:
                x and noise [b, C, H, W] float32, t [b] int64 (float32 for a flow), and the keyword arguments of the
                model with labels y [b].
            prior_weight: weight of the prior's cross-entropy in the loss.
        """
        # A tensor, because compiled code would be specific to the value of a number.
        prior_weight = torch.full((), prior_weight, device=self.world.device)
        # The compiler reads this setting of the process in the first step.
        torch._dynamo.config.optimize_ddp = self.optimize_ddp
        microbatches = list(microbatches)
        if self.world.size > 1 and len(microbatches) > 1 and self.replicated[0].grad is None:
            # DDP moves the gradients into its buckets in the first exchange, and rebuilds the buckets in the second.
            # Run both before accumulating, and discard the results. Otherwise the sums need a second copy of all
            # gradients.
            for _ in range(2):
                self._accumulate_gradients(microbatches[:1], prior_weight)
        losses = self._accumulate_gradients(microbatches, prior_weight)
        norm, nonfinite = self._check_gradients()
        self.mark("checks")
        self._update_weights(nonfinite)
        self.mark("optimizer")
        # After a non-finite step the EMA moves towards the unchanged weights.
        self.update_ema(self.ema_params, self.trained, None)
        for std, tensors in self.averages.items():
            torch._foreach_lerp_(tensors, [p.detach() for p in self.trained], 1 - decay_at(step + 1, std))
        self.stats.add(step, losses, norm)
        self.mark("ema")

    def _accumulate_gradients(self, microbatches: list, prior_weight: Tensor) -> Tensor:
        """Sum the gradients of the microbatches and return the mean losses, in the order of `loss_names`."""
        # A CUDA graph overwrites the gradients that it returned. Those of several microbatches are added to tensors
        # that stay: parts of DDP's buckets, or tensors of their own.
        keep = len(microbatches) > 1 and (self.world.size > 1 or self.cuda_graphs)
        self.optimizer.zero_grad(set_to_none=not keep)
        if keep and self.trained[0].grad is None:
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
        means = []
        for i, microbatch in enumerate(microbatches):
            # The processes exchange gradients once per step, after the last microbatch.
            skip_exchange = self.world.size > 1 and i < len(microbatches) - 1
            with self.loss.no_sync() if skip_exchange else nullcontext():
                with self.world.autocast(self.precision):
                    loss, losses = self.loss(*microbatch, prior_weight)
                self.mark("forward")
                self.scaler.scale(loss / len(microbatches)).backward()
                self.mark("backward")
            # A CUDA graph overwrites its results when it runs again.
            means.append(losses.clone())
        return torch.stack(means).mean(0)

    def _check_gradients(self) -> tuple[Tensor, Tensor]:
        """Clip the gradients, and return their norm before clipping [] float32 and whether it is non-finite [] bool.

        A loss that is not finite on one process makes the norm non-finite on all processes, so all of them skip the
        update. The host does not wait for the device.
        """
        if self.shards:
            grads = [p.grad for p in self.shards.values()]
            scale = self.scaler.scale(torch.ones((), device=self.world.device))
            squared_norm = self.world.sum((torch.nn.utils.get_total_norm(grads, foreach=True) / scale).square())
            # The gradient of a shard may overflow on its process only, and every process must skip the update.
            self.replicated[0].grad.masked_fill_(~squared_norm.isfinite(), math.inf)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.replicated], foreach=True)
        if self.shards:
            norm = (norm.square() + squared_norm).sqrt()
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip_grad, norm, foreach=True)
        return norm, ~norm.isfinite()

    def _update_weights(self, nonfinite: Tensor):
        """Run AdamW. If `nonfinite` is true, the weights and moments stay unchanged. The check runs on the device."""
        # AdamW(fused=True) reads found_inf and skips the update. The scaler of fp16 sets it itself.
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = nonfinite.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def save_checkpoint(writer: CheckpointWriter, trainer: Trainer, config: dict, step: int):
    """Start to write the checkpoint of a step. Every process must call this."""
    # Wait for the previous write, because host memory may have room for only one copy of the state.
    writer.wait()
    saved = {"config": config, "step": step, "window": trainer.stats.state_dict()} | trainer.state_dict()
    if trainer.world.is_main:
        writer.save(step, saved)


def recompute_blocks(model: DiT | RemixDiT, compile: bool):
    """Let every block of a model store only its inputs in the forward pass, and run again in the backward pass.

    Args:
        model: the model, which is changed in place.
        compile: whether the model will be compiled.
    """
    options = {"use_reentrant": False, "preserve_rng_state": False}
    remix = isinstance(model, RemixDiT)
    # Without compilation, the backward pass calls the block again, when the batch's coefficients are already cleared.
    # These contexts restore them.
    if remix and not compile:
        options["context_fn"] = model.batch_coefficients.contexts
    for block in (model.backbone if remix else model).blocks:
        block.forward = partial(checkpoint, block.forward, **options)
