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

from checkpoint import load_weights
from diffusion import Process
from mixing.experts import stored_parameters, stored_state
from models import find_backbone
from runtime.processes import World
from training.batches import Microbatch
from training.experts import experts_of
from training.optimizer import AdamW
from training.posthoc_ema import decay_at
from training.settings import Execution, RunSettings
from training.sharding import gather_model, gather_rows, own_rows, shard_bases, sharded_parameters
from training.statistics import TrainingStats
from training.terms import LossTerm, StepTensors, loss_terms
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
        process: the process, which gives the loss that the terms are added to.
        terms: the terms.

    Attributes:
        names: names of the losses that are reported: those of the process, then those of the terms.
    """

    def __init__(self, model: nn.Module, process: Process, terms: list[LossTerm]):
        super().__init__()
        self.model = model
        self.process = process
        self.terms = terms
        self.names = (*process.loss_names, *(term.name for term in terms))

    def forward(self, batch: Microbatch, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Compute the losses of a microbatch.

        Args:
            batch: see `BatchSampler.microbatches`.
            weights: weight of each term [].

        Returns:
            The loss to differentiate [], and the mean losses without gradient, in the order of `names`. If a mean loss
            is not finite, every gradient is NaN.
        """
        x, t, conditions, noise, extras = batch
        outputs = []

        def network(*args, **kwargs) -> Tensor:
            outputs.append(self.model(*args, **kwargs))
            return outputs[-1]

        losses = self.process.training_losses(network, x, t, conditions, noise)
        means = {name: values.mean() for name, values in losses.items()}  # [B] -> []
        total = means["loss"]
        step = StepTensors(self.model, x, t, conditions, noise, extras, outputs[-1], self.process)
        for term, weight in zip(self.terms, weights, strict=True):
            means[term.name] = term.value(step)
            total = total + weight * means[term.name]
        means = torch.stack([means.get(name, torch.zeros_like(total)) for name in self.names]).detach()
        # After the exchange, the gradients are then NaN on all processes, so that all of them skip the step.
        return total * torch.where(means.isfinite().all(), 1.0, math.nan), means


class Trainer:
    """The model, its EMA, optimizer, gradient scaler and statistics: the training state that a checkpoint stores.

    Args:
        model: the model at step 0. It is moved to the device of `world` and trained in place.
        process: the process, which gives the losses.
        world: the processes of the run, and the rank and device of this one.
        settings: the settings of the run.
        execution: how the work of a step is divided and computed.

    Attributes:
        model: the model in training.
        loss: `model` with its losses, wrapped in DistributedDataParallel if there are several processes.
        experts: the experts of the model, if it has any.
        terms: the terms that are added to the loss of the process.
        ema: copy of the model with the EMA of the weights, in eval mode.
        trained: the parameters that are trained.
        shards: the sharded parameters in `trained`, by their names in `model`. This process holds a part of each.
        replicated: the other parameters in `trained`, which DDP keeps equal on all processes.
        averages: for each width of the settings, the average of each parameter of `trained`.
        ema_params: the parameters of `ema` that correspond to `trained`.
        optimizer: AdamW, with one group for the weights and one for the mixing logits.
        scaler: gradient scaler of fp16; it does nothing in other precisions.
        stats: running sums of the losses, and the non-finite steps.
        compiled: whether the model and its losses are compiled.
        optimize_ddp: whether a compiled graph is cut where DDP's buckets end.
        cuda_graphs: whether the compiled forward and backward pass are recorded as CUDA graphs. A graph starts all its
            kernels at once. Its results are overwritten when it runs again. It keeps the memory of its activations and
            gradients between the steps.
        mark: callback mark(name), called at the end of each stage of a step. Benchmarks replace it.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        world: World,
        settings: RunSettings,
        execution: Execution = Execution(),  # noqa: B008, it cannot be changed
    ):
        self.world = world
        self.settings = settings
        self.mark = lambda stage: None

        if execution.shard:
            shard_bases(model, world)
        self.model = model.to(world.device).train()
        self.experts = experts_of(model)
        self.terms = loss_terms(self.experts, settings)
        self.trained = [p for p in stored_parameters(model).values() if p.requires_grad]
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        pairs = zip(stored_parameters(model).values(), stored_parameters(self.ema).values(), strict=True)
        self.shards = sharded_parameters(model)
        self.replicated = [p for p in self.trained if all(p is not shard for shard in self.shards.values())]
        self.ema_params = [ema for parameter, ema in pairs if parameter.requires_grad]
        self.update_ema = get_ema_multi_avg_fn(settings.ema_decay)
        self.averages = {std: [p.detach().clone() for p in self.trained] for std in settings.ema_stds or ()}

        weights = [p for p in self.trained if not any(p is logits for logits in self.experts.logits)]
        groups = [
            {"params": weights, "weight_decay": settings.weight_decay},
            {"params": self.experts.logits, "weight_decay": 0.0},
        ]
        self.optimizer = AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")

        if execution.checkpoint_activations:
            self.experts.recompute_blocks(execution.compile)
        if execution.compile:
            before_compile = find_backbone(self.experts.backbone).before_compile
            if before_compile is not None:
                before_compile(model, world.device)
        self.loss = TrainingLoss(self.model, process.to(world.device), self.terms)
        self.stats = TrainingStats(world, self.loss.names)
        # With sharded bases the graph must stay whole: it has to wait for the exchanges that it starts, because the
        # compiler may otherwise reuse their memory. CUDA graphs that hold exchanges were not tested with several GPUs.
        self.optimize_ddp = not execution.shard
        self.cuda_graphs = execution.compile and world.device.type == "cuda" and not execution.shard
        self.compiled = execution.compile
        if self.compiled:
            options = OVERLAP if execution.shard else {"triton.cudagraphs": self.cuda_graphs}
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
        self.set_schedule(0)

    def state_dict(self) -> dict[str, dict]:
        """Return the weights, the EMA, the optimizer and the scaler for a checkpoint, as copies in host memory.

        Every process must call this. The result holds tensors only on rank 0. Sharded bases are gathered.
        """
        gather = partial(gather_rows, rank=self.world.rank, size=self.world.size)
        state = {
            "model": self._map_weights(stored_state(self.model), gather, self._copy_to_host),
            "ema": self._map_weights(stored_state(self.ema), gather, self._copy_to_host),
            "optimizer": self._map_moments(self.optimizer.state_dict(), gather, self._copy_to_host),
            "scaler": self.scaler.state_dict(),
        }
        return state | ({"averages": self.whole_averages()} if self.averages else {})

    def whole_averages(self) -> dict[str, dict[str, Tensor]]:
        """Return the power-function averages of the trained tensors as copies in host memory, by width and name.

        Every process must call this. Only on rank 0 the result holds the tensors. Sharded bases are put together.
        """
        gather = partial(gather_rows, rank=self.world.rank, size=self.world.size)
        names = [name for name, p in stored_parameters(self.model).items() if p.requires_grad]
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

    def whole_ema(self, everywhere: bool = False) -> nn.Module | None:
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

    def set_schedule(self, step: int):
        """Set the learning rates and the weights of the terms.

        Args:
            step: number of completed steps.
        """
        settings = self.settings
        progress = min(1, step / (settings.schedule_steps or settings.max_steps))
        warmup = min(1, (step + 1) / settings.warmup) if settings.warmup else 1
        last_coeff_lr = settings.lr / 2 if settings.coeff_lr_end is None else settings.coeff_lr_end
        ranges = [(settings.lr, settings.lr / 2), (settings.coeff_lr, last_coeff_lr)]
        for group, (first, last) in zip(self.optimizer.param_groups, ranges, strict=True):
            last = first if settings.lr_schedule == "constant" else last
            group["lr"] = warmup * (last + (first - last) * (1 + math.cos(math.pi * progress)) / 2)
        self.term_weights = {term.name: term.weight(progress) for term in self.terms}

    def schedule(self) -> dict[str, float]:
        """Return what `set_schedule` has set: "lr" of the bases and shared weights, "coeff_lr" of the mixing logits if
        they are trained, and the weight of each term, as "prior_weight".
        """
        weights, logits = self.optimizer.param_groups
        rates = {"lr": weights["lr"]} | ({"coeff_lr": logits["lr"]} if self.experts.logits else {})
        return rates | {f"{name}_weight": weight for name, weight in self.term_weights.items()}

    def step(self, step: int, microbatches: Iterable[Microbatch]):
        """Train on this process's rows of one global batch.

        A non-finite loss or gradient on any process leaves the weights and the optimizer unchanged on all processes.

        Args:
            step: the training step, from 0.
            microbatches: the microbatches, from `BatchSampler.microbatches`.
        """
        # Tensors, because compiled code would be specific to the value of a number.
        weights = tuple(torch.full((), w, device=self.world.device) for w in self.term_weights.values())
        if self.compiled:
            # The compiler reads this setting of the process in the first step.
            torch._dynamo.config.optimize_ddp = self.optimize_ddp
        microbatches = list(microbatches)
        if self.world.size > 1 and len(microbatches) > 1 and self.replicated[0].grad is None:
            # DDP moves the gradients into its buckets in the first exchange, and rebuilds the buckets in the second.
            # Run both before accumulating, and discard the results. Otherwise the sums need a second copy of all
            # gradients.
            for _ in range(2):
                self._accumulate_gradients(microbatches[:1], weights)
        losses = self._accumulate_gradients(microbatches, weights)
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

    def _accumulate_gradients(self, microbatches: list[Microbatch], weights: tuple[Tensor, ...]) -> Tensor:
        """Sum the gradients of the microbatches and return the mean losses, in the order of `TrainingLoss.names`."""
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
                with self.world.autocast(self.settings.precision):
                    loss, losses = self.loss(microbatch, weights)
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
        if self.settings.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.settings.clip_grad, norm, foreach=True)
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
