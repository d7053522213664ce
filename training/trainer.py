"""One training step: losses, gradients, the AdamW update and the EMA. The host never waits for the device."""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoint import load_weights
from diffusion import FlowMatching, GaussianDiffusion
from distributed import World
from grouped_linear import choose_attention
from models import DiT
from remix import RemixDiT
from sharding import gather_model, gather_rows, own_rows, shard_bases, sharded_parameters
from training.statistics import LOSSES, TrainingStats

# DDP cuts a compiled graph where its buckets end, and exchanges a bucket while the next one is computed.
BUCKETS = 4


def bucket_mib(parameters: list[Tensor]) -> float:
    """Return the size of DDP's buckets for the gradients of some parameters, in MiB: a few blocks of the model."""
    # PyTorch's default is 25 MiB, which is less than one block of a large model.
    return max(25, sum(p.nbytes for p in parameters) / BUCKETS / 2**20)


class Trainer:
    """A model in training, with everything about it that a checkpoint stores.

    Args:
        model: the model at step 0. It is moved to the device of `world` and trained in place.
        diffusion: the process that gives the training losses.
        world: this process's place among all processes.
        lr: peak learning rate of the bases and shared weights; it falls to half of it.
        coeff_lr: peak learning rate of the mixing logits.
        coeff_lr_end: final learning rate of the mixing logits; None for half of `lr`, as published.
        ema_decay: EMA decay per step.
        clip_grad: largest gradient norm; 0 for no clipping.
        precision: precision of the matrix products: "fp32", "bf16" or "fp16".
        compile: whether to compile the model.
        shard: whether to shard the bases over the processes; see sharding.py.

    Attributes:
        ema: copy of the model with the EMA of the weights, in eval mode.
        trained: the parameters that are trained.
        ema_params: the parameters of `ema` that correspond to `trained`.
        loss_names: names of the losses that are reported.
        stats: running sums of the losses, and the non-finite steps.
        mark: function that is called with the name of each stage of a step when the stage ends; for benchmarks.
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
        shard: bool = False,
    ):
        self.diffusion = diffusion
        self.world = world
        self.clip_grad = clip_grad
        self.precision = precision
        # A flow's loss has no parts.
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

        # One-hot coefficients are fixed: their logits are not trained.
        self.logits = [model.logits] if isinstance(model, RemixDiT) and model.logits.requires_grad else []
        weights = [p for p in self.trained if not any(p is logits for logits in self.logits)]
        groups = [{"params": weights}, {"params": self.logits}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0, fused=True)
        # First and last learning rate of each group.
        self.lr_ranges = [(lr, lr / 2), (coeff_lr, lr / 2 if coeff_lr_end is None else coeff_lr_end)]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")

        if compile:
            choose_attention(model, world.device)
            # DDP has the compiled graph cut where its buckets end. A graph must wait for the exchanges that it starts,
            # because the compiler reuses memory without knowing of exchanges in other graphs.
            torch._dynamo.config.optimize_ddp = not shard
            # The shapes do not change during a run, and symbolic sizes would be slower.
            model.compile(dynamic=False)
        self.network = model
        if world.size > 1:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(self.shards))
            self.network = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=bucket_mib(self.replicated),
            )

    def state_dict(self) -> dict[str, dict]:
        """Return the weights, the EMA, the optimizer and the scaler for a checkpoint, as copies in host memory.

        Every process must call this. Only on rank 0 the result holds the tensors. Sharded bases are put together.
        """
        gather = partial(gather_rows, rank=self.world.rank, size=self.world.size)

        def copy_to_host(tensor: Tensor) -> Tensor | None:
            return tensor.detach().to("cpu", copy=True) if self.world.is_main else None

        return {
            "model": self._map_weights(self.model.state_dict(), gather, copy_to_host),
            "ema": self._map_weights(self.ema.state_dict(), gather, copy_to_host),
            "optimizer": self._map_moments(self.optimizer.state_dict(), gather, copy_to_host),
            "scaler": self.scaler.state_dict(),
        }

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

    def whole_ema(self) -> DiT | RemixDiT | None:
        """Return the EMA model with whole bases, on rank 0 only. Every process must call this.

        If the bases are sharded, it is a copy that has them in host memory.
        """
        if self.shards:
            return gather_model(self.ema, self.world)
        return self.ema if self.world.is_main else None

    def load_state_dict(self, state: dict, path: Path | str):
        """Continue from a checkpoint.

        Args:
            state: the checkpoint: what `state_dict` returns on rank 0, and the state of `stats` under "window". It may
                be mapped from the file; each process reads what it needs of it.
            path: the checkpoint's file, for error messages.

        Raises:
            UserError: if the weights do not fit the model.
        """
        own = partial(own_rows, rank=self.world.rank, size=self.world.size)
        for model, part in ((self.model, "model"), (self.ema, "ema")):
            load_weights(model, self._map_weights(state[part], own, lambda tensor: tensor), path)
        # On CPUs, the optimizer keeps the tensors that it loads. They must not be those of the file.
        copy_to_device = partial(Tensor.to, device=self.world.device, copy=True)
        self.optimizer.load_state_dict(self._map_moments(state["optimizer"], own, copy_to_device))
        self.scaler.load_state_dict(state["scaler"])
        self.stats.load_state_dict(state["window"])

    def set_progress(self, progress: float):
        """Set the learning rates by a cosine schedule, from their first to their last value.

        Args:
            progress: completed part of the run, from 0 to 1.
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
            microbatches: (x, t, conditions, noise) of each microbatch, from `BatchSampler.microbatches`.
            prior_weight: weight of the prior's cross-entropy in the loss.
        """
        microbatches = list(microbatches)
        if self.world.size > 1 and len(microbatches) > 1 and self.replicated[0].grad is None:
            # DDP makes the gradients parts of its buckets in the first exchange, and of new buckets in the second one.
            # Sums over microbatches before that would be a second copy of all gradients.
            for _ in range(2):
                self._accumulate_gradients(microbatches[:1], prior_weight)
        losses = self._accumulate_gradients(microbatches, prior_weight)
        norm, nonfinite = self._check_gradients(losses)
        self.mark("checks")
        self._update_weights(nonfinite)
        self.mark("optimizer")
        # After a non-finite step the EMA moves towards the unchanged weights.
        self.update_ema(self.ema_params, self.trained, None)
        self.stats.add(step, losses, norm, nonfinite)
        self.mark("ema")

    def _accumulate_gradients(self, microbatches: list, prior_weight: float) -> Tensor:
        """Sum the gradients of the microbatches and return the mean losses, in the order of `loss_names`."""
        # With several microbatches, the gradients stay parts of DDP's buckets.
        self.optimizer.zero_grad(set_to_none=self.world.size == 1 or len(microbatches) == 1)
        means = torch.zeros(len(self.loss_names), device=self.world.device)
        for i, (x, t, conditions, noise) in enumerate(microbatches):
            # The processes exchange gradients once per step, after the last microbatch.
            skip_exchange = self.world.size > 1 and i < len(microbatches) - 1
            with self.network.no_sync() if skip_exchange else nullcontext():
                with self.world.autocast(self.precision):
                    losses = self.diffusion.training_losses(self.network, x, t, conditions, noise)
                # [B] -> []
                losses = {name: values.mean() for name, values in losses.items()}
                total = losses["loss"]
                if self.logits:
                    losses["prior"] = self.model.prior_loss()
                    total = total + prior_weight * losses["prior"]
                self.mark("forward")
                self.scaler.scale(total / len(microbatches)).backward()
                self.mark("backward")
            for name, loss in losses.items():
                means[self.loss_names.index(name)] += loss.detach() / len(microbatches)
        return means

    def _check_gradients(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients, and return their norm [] and whether the step is non-finite on any process [], bool.

        If a loss or the gradient of a shard is not finite on any process, a gradient that all processes have is set to
        infinity. Then the norm is not finite either, and it alone decides. The host does not wait for the device.
        """
        norms = torch.zeros(2, device=self.world.device)
        norms[0] = (~losses.isfinite()).any()
        if self.shards:
            grads = [p.grad for p in self.shards.values()]
            norms[1] = torch.nn.utils.get_total_norm(grads, foreach=True) / self.scaler.scale(torch.ones_like(norms[1]))
        n_processes_affected, squared_norm = self.world.sum(norms.square())
        nonfinite = (n_processes_affected > 0) | ~squared_norm.isfinite()
        self.replicated[0].grad.masked_fill_(nonfinite, math.inf)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.replicated], foreach=True)
        if self.shards:
            norm = (norm.square() + squared_norm).sqrt()
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip_grad, norm, foreach=True)
        return norm, ~norm.isfinite()

    def _update_weights(self, nonfinite: Tensor):
        """Take an AdamW step, which on the device leaves the weights and moments unchanged if `nonfinite` is set."""
        # The scaler of fp16 sets found_inf itself.
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = nonfinite.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
