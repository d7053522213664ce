"""The settings that determine a run, beside its model and data."""

from dataclasses import dataclass


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
        ema_stds: widths of the averages for post-hoc EMA; None if there are none.
        freeze: whether only the bases and the coefficients are trained; None if all parameters are.
        min_snr: gamma of the loss weight, see `GaussianDiffusion`; None for no weight.
        min_weight: lower bound of the loss weight; None for 0.
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
    ema_stds: list[float] | None = None
    freeze: bool | None = None
    min_snr: float | None = None
    min_weight: float | None = None
    schedule_steps: int | None = None
