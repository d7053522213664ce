"""The settings of a run: those that determine its results, and how its work is divided and computed."""

from dataclasses import dataclass, field

from diffusion.intervals import TIMESTEPS
from mixing.options import PRIOR_BONUS

LR_SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class RunSettings:
    """The settings that determine a run, in addition to its model and data: the "training" part of a config.

    Attributes:
        max_steps: number of steps.
        global_batch_size: images per step, over all processes.
        experts_per_batch: experts per global batch; 1 for a plain model.
        timesteps: lowest timestep, and highest timestep plus one; for a flow the lowest and highest noise level.
        lr: peak learning rate of the bases and shared weights, which the cosine lowers to half of this value.
        coeff_lr: peak learning rate of the mixing logits.
        coeff_lr_end: final learning rate of the mixing logits; None for half of `lr`, as published.
        lr_schedule: "cosine", or "constant" for learning rates that stay at their peaks.
        warmup: number of steps at the beginning in which the learning rates rise linearly to those of the schedule.
        beta2: decay of AdamW's second moments per step.
        weight_decay: weight decay of AdamW, which is multiplied by the learning rate; not for the mixing logits.
        ema_decay: EMA decay per step.
        clip_grad: largest gradient norm; 0 for no clipping.
        cosine_weight: weight of 1 minus the cosine similarity of the predicted velocity and its target.
        prior_strength: weight of the prior's cross-entropy at step 0.
        prior_bonus: initial lead of the prior's basis in the mixing logits.
        precision: precision of the matrix products: "fp32" (TF32 on GPUs), "bf16" or "fp16".
        global_seed: seed of all random draws.
        load_weight: file that the weights at step 0 come from; None for random weights.
        ema_stds: relative standard deviations of the power-function averages for post-hoc EMA; None if there are none.
        freeze: whether only the bases and the coefficients are trained.
        min_snr: gamma of the loss weight, see `GaussianDiffusion`; None for no weight.
        min_weight: lower bound of the loss weight; None for 0.
        schedule_steps: number of steps over which the learning rates and the terms' weights fall; None for max_steps.
    """

    max_steps: int = 100_000
    global_batch_size: int = 256
    experts_per_batch: int = 1
    timesteps: list[float] = field(default_factory=lambda: [0, TIMESTEPS])
    lr: float = 1e-4
    coeff_lr: float = 1e-2
    coeff_lr_end: float | None = None
    ema_decay: float = 0.9999
    clip_grad: float = 0.0
    prior_strength: float = 1e-4
    prior_bonus: float = PRIOR_BONUS
    precision: str = "fp32"
    global_seed: int = 0
    load_weight: str | None = None
    ema_stds: list[float] | None = None
    freeze: bool = False
    min_snr: float | None = None
    min_weight: float | None = None
    schedule_steps: int | None = None
    lr_schedule: str = "cosine"
    warmup: int = 0
    beta2: float = 0.999
    weight_decay: float = 0.0
    cosine_weight: float = 0.0


@dataclass(frozen=True)
class Execution:
    """How the work of a step is divided among processes and computed, which changes the results by rounding only.

    Attributes:
        processes: number of processes R, each with its GPU.
        grad_accum: microbatches per process and step.
        shard: whether the bases are sharded over the processes; see training/sharding.py.
        checkpoint_activations: whether only the inputs of each block are stored in the forward pass, and its
            activations computed again in the backward pass.
        compile: whether the model is compiled with its losses. On GPUs, forward and backward pass are then recorded as
            CUDA graphs, unless the bases are sharded.
    """

    processes: int = 1
    grad_accum: int = 1
    shard: bool = False
    checkpoint_activations: bool = False
    compile: bool = False
