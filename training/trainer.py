"""One step of training: losses, gradients, AdamW, the weights' average. The host never waits for the device in it."""

import copy
import math
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoint import load_weights
from diffusion import GaussianDiffusion
from distributed import World
from grouped_linear import choose_attention
from models import DiT
from remix import RemixDiT
from training.statistics import PARTS, TrainingStats


class Trainer:
    """A model in training with all that a checkpoint keeps of it.

    lr and coeff_lr are the peak learning rates of the weights and of pi (set_progress lowers them), ema_decay the decay of
    the weights' average a step; clip_grad is the largest gradient norm, 0 for none. Numbers that are not finite, on any
    process, leave the weights as they are.
    """

    def __init__(
        self,
        model: DiT | RemixDiT,
        diffusion: GaussianDiffusion,
        world: World,
        lr: float,
        coeff_lr: float = 1e-2,
        ema_decay: float = 0.9999,
        clip_grad: float = 0.0,
        precision: str = "fp32",
        compile: bool = False,
    ):
        self.diffusion, self.world, self.clip_grad, self.precision = diffusion, world, clip_grad, precision
        self.model = model.to(world.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.ema_params = [e for p, e in zip(model.parameters(), self.ema.parameters(), strict=True) if p.requires_grad]
        self.average = get_ema_multi_avg_fn(ema_decay)
        self.coefficients = [model.logits] if isinstance(model, RemixDiT) and model.logits.requires_grad else []
        others = [p for p in self.trained if not any(p is c for c in self.coefficients)]
        groups = [{"params": others, "peak_lr": lr}, {"params": self.coefficients, "peak_lr": coeff_lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0, fused=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.window = TrainingStats(world)
        if compile:
            choose_attention(model, world.device)
            model.compile(dynamic=False)  # sizes do not change, and a symbol in their place is slower
        self.network = model
        if world.size > 1:
            self.network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.mark = lambda stage: None  # called at the end of each stage of a step, for who wants to time them

    def state_dict(self) -> dict:
        """The parts of a checkpoint; tensors are the live ones."""
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict, source):
        """Go on from a checkpoint's parts and its window; `source` names it in errors."""
        load_weights(self.model, state["model"], source)
        load_weights(self.ema, state["ema"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.window.load(state["window"])

    def set_progress(self, progress: float):
        """Set the learning rates for a run done to this part: a cosine decay to half."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (0.75 + 0.25 * math.cos(math.pi * progress))

    def step(self, step: int, microbatches: Iterable, prior_weight: float = 0.0):
        """Train on a global batch's rows of this process: a list of (x, t, conditions, noise), for `training_losses`."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(PARTS), device=self.world.device)
        microbatches = list(microbatches)
        for i, (x, t, conditions, noise) in enumerate(microbatches):
            more_to_come = self.world.size > 1 and i < len(microbatches) - 1
            with self.network.no_sync() if more_to_come else nullcontext():
                with self.world.autocast(self.precision):
                    losses = self.diffusion.training_losses(self.network, x, t, conditions, noise)
                parts = {name: value.mean() for name, value in losses.items()}
                loss = parts["loss"]
                if self.coefficients:
                    parts["prior"] = self.model.prior_loss()
                    loss = loss + prior_weight * parts["prior"]
                self.mark("forward")
                self.scaler.scale(loss / len(microbatches)).backward()
                self.mark("backward")
            for name, value in parts.items():
                sums[PARTS.index(name)] += value.detach() / len(microbatches)
        self._update(step, sums)

    def _update(self, step: int, sums: Tensor):
        """Update the weights and their average, unless a number is not finite.

        The host does not wait to know: a loss that is not finite on any process spoils a gradient on all, and where the
        gradients' norm is not finite the fused step leaves the weights alone (their average then moves towards weights
        that it has seen before).
        """
        flaws = self.world.sum((~sums.isfinite()).any().float())
        self.trained[0].grad.masked_fill_(flaws > 0, math.inf)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained], foreach=True)
        bad = ~norm.isfinite()
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip_grad, norm, foreach=True)
        self.mark("checks")
        if not self.scaler.is_enabled():  # the scaler sets it itself
            self.optimizer.found_inf = bad.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.mark("optimizer")
        self.average(self.ema_params, self.trained, None)
        self.window.add(step, sums, norm, bad)
        self.mark("average")
