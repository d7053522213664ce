"""Gaussian diffusion processes: training losses, and sampling with DDPM and DDIM.

Equation numbers refer to DDPM (arXiv 2006.11239), Improved DDPM (arXiv 2102.09672) and DDIM (arXiv 2010.02502).
"""

import math
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .intervals import TIMESTEPS, timestep_scale
from .process import Process
from .samplers import SOLVERS, Ancestral, ODESolver, as_denoiser, ddim, ddpm
from .schedules import beta_schedule, respace, space_timesteps

VARIANCES = ("learned_range", "fixed_large", "fixed_small")
LOSSES = ("mse", "rescaled_mse", "kl")


def create_diffusion(
    timestep_respacing: str | list[int] | None = "",
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    *,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = TIMESTEPS,
    min_snr: float | None = None,
    min_weight: float = 0.0,
) -> "GaussianDiffusion":
    """Build a diffusion process.

    The arguments have the names and meanings of facebookresearch/DiT, which does not have the last two.

    Args:
        timestep_respacing: timesteps to keep. "" keeps all of them, "250" that many evenly spaced ones, "ddim50" every
            20th of 1000, and "10,15,20" that many in each of equally long sections. See `space_timesteps`.
        noise_schedule: "linear" or "squaredcos_cap_v2". See `beta_schedule`.
        use_kl: train with the variational bound alone.
        sigma_small: with a fixed variance, use the variance of the posterior instead of beta_t.
        predict_xstart: the model predicts x_0 instead of the noise.
        learn_sigma: the model predicts the variance too.
        rescale_learned_sigmas: multiply the variational bound by the number of kept timesteps divided by 1000.
        diffusion_steps: number of timesteps T of the original process.
        min_snr: the gamma of the Min-SNR loss weight. By default, the mean squared error is not weighted.
        min_weight: lower bound of that weight.

    Returns:
        The process, respaced.

    Raises:
        ValueError: if the schedule is unknown, or the respacing or the loss weight is invalid.
    """
    return GaussianDiffusion(
        beta_schedule(noise_schedule, diffusion_steps),
        timesteps=space_timesteps(diffusion_steps, timestep_respacing or [diffusion_steps]),
        predict_xstart=predict_xstart,
        variance="learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        loss="kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
        min_snr=min_snr,
        min_weight=min_weight,
    )


class GaussianDiffusion(Process):
    """A diffusion process of S steps: forward process, training losses and samplers.

    The steps t of the methods are indices of this process, from 0 (least noise) to S - 1. The model is called with the
    timesteps of the original process, as model(x, timesteps, **model_kwargs).

    Args:
        betas: variance of each step of the original process, float64 [T].
        timesteps: the timesteps of the original process that are kept [S]. By default, all of them.
        predict_xstart: the model predicts x_0 instead of the noise.
        variance: "learned_range" (the model has 2C output channels, Improved DDPM, eq. 15), "fixed_large" (beta_t) or
            "fixed_small" (the variance of the posterior).
        loss: "mse", "rescaled_mse" (the variational bound is multiplied by S / 1000) or "kl" (the variational bound
            alone, multiplied by S).
        min_snr: the gamma of the Min-SNR loss weight (arXiv 2303.09556, section 3.4): the mean squared error of the
            noise is multiplied by w = min(SNR, gamma) / SNR, that of x_0 by SNR w. None: no weight.
        min_weight: lower bound of w, from 0 to 1. The published weight has none; see docs/features.md.

    Raises:
        ValueError: if an argument is not one of the values above, or the loss has no squared error to weight.
    """

    name = "gaussian"
    title = "Gaussian diffusion"
    loss_names = ("loss", "mse", "vb")
    samplers: ClassVar = {"ddpm": ddpm, "ddim": ddim, **{solver: partial(ODESolver, solver) for solver in SOLVERS}}
    # On handwritten digits, DPM-Solver++ in 20 steps had a lower FID than DDIM and DDPM in 50 (three of three models).
    quick = ("dpmpp", "20")

    def __init__(
        self,
        betas: np.ndarray,
        *,
        timesteps: list[int] | None = None,
        predict_xstart: bool = False,
        variance: str = "learned_range",
        loss: str = "mse",
        min_snr: float | None = None,
        min_weight: float = 0.0,
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be a one-dimensional array of numbers above 0 and at most 1")
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, but it is {variance!r}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, but it is {loss!r}")
        if min_snr is not None and not min_snr > 0:
            raise ValueError(f"min_snr must be above 0, but it is {min_snr}")
        if min_snr is not None and loss == "kl":
            raise ValueError("the loss 'kl' has no mean squared error, which min_snr weights")
        if not 0 <= min_weight <= 1:
            raise ValueError(f"min_weight must be from 0 to 1, but it is {min_weight}")
        if min_weight and min_snr is None:
            raise ValueError("min_weight needs min_snr")
        self.original_betas = betas
        self.scale = timestep_scale(len(betas))
        self.timestep_map = list(range(len(betas))) if timesteps is None else list(timesteps)
        self.num_timesteps = len(self.timestep_map)
        self.predict_xstart = predict_xstart
        self.variance = variance
        # The parts of the loss that `training_losses` returns.
        if loss == "kl":
            self.loss_names = ("loss",)
        elif variance != "learned_range":
            self.loss_names = ("loss", "mse")
        self.loss = loss
        self.min_snr = min_snr
        self.min_weight = min_weight

        # Forward process (DDPM, eq. 4).
        self.betas = betas = respace(betas, self.timestep_map)
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)
        self.mse_weight = None
        if min_snr is not None:
            snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
            self.mse_weight = np.clip(min_snr / snr, min_weight, 1.0) * (snr if predict_xstart else 1.0)

        # Posterior q(x_{t-1} | x_t, x_0) (DDPM, eq. 6-7). The variance is 0 at t = 0, where the logarithm of
        # the variance at t = 1 is used instead.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        floor = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(floor, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (
            (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - self.alphas_cumprod)
        )

        self._log_betas = np.log(betas)
        self._fixed_large_variance = np.append(floor, betas[1:])
        self._fixed_large_log_variance = np.log(self._fixed_large_variance)
        self._tensors = {}

    @classmethod
    def create(cls, **options) -> "GaussianDiffusion":
        return create_diffusion(**options)

    def respaced(self, spacing: str) -> "GaussianDiffusion":
        """Return this process on some of the original timesteps; see `space_timesteps`, "" keeps all of them."""
        timesteps = len(self.original_betas)
        return GaussianDiffusion(
            self.original_betas,
            timesteps=space_timesteps(timesteps, spacing or [timesteps]),
            predict_xstart=self.predict_xstart,
            variance=self.variance,
            loss=self.loss,
            min_snr=self.min_snr,
            min_weight=self.min_weight,
        )

    def __getstate__(self) -> dict:
        # Processes that load data get a copy without the arrays on a device.
        return vars(self) | {"_tensors": {}}

    def sample_times(self, generator: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        # The first timestep of each interval, with boundaries rounded to float32 as in `Remix.expert_index`.
        first, end = (np.ceil(np.asarray(levels, np.float32)).astype(np.int64) for levels in (low, high))
        if (first >= end).any():
            raise ValueError("an interval between boundaries contains no timestep")
        return generator.integers(first, end)

    def expert_boundaries(self, n: int) -> list[float]:
        return self.scale.equal_boundaries(n)

    def seed_numbers(self, times: Tensor) -> Tensor:
        return times.long()

    def held_out_errors(self, model, x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return the squared errors of the predicted noise, like x. See `Process.held_out_errors`."""
        return (model(self.q_sample(x, t, noise), t, y)[:, : x.shape[1]] - noise).square()

    def _extract(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return the array `name` at the steps t [B], float32, shaped to broadcast with `like` [B, ...]."""
        return self._array_on(name, t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def to(self, device: torch.device) -> "GaussianDiffusion":
        """Copy the arrays to a device, and return this process.

        Otherwise each is copied when it is first used, and code that computes losses is then compiled twice.
        """
        # With the index of the GPU, as the devices of tensors have it.
        device = torch.empty(0, device=device).device
        arrays = [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]
        for name in ("timestep_map", *arrays):
            self._array_on(name, device)
        return self

    def _array_on(self, name: str, device: torch.device) -> Tensor:
        """Return the array `name` [S] as a tensor on a device."""
        # Each array is copied to a device once, because the host waits for every copy.
        if (name, device) not in self._tensors:
            array = torch.as_tensor(getattr(self, name))
            self._tensors[name, device] = array.to(device, torch.long if name == "timestep_map" else torch.float32)
        return self._tensors[name, device]

    def _call_model(self, model, x: Tensor, t: Tensor, model_kwargs: dict | None) -> Tensor:
        """Call the model for x [B, C, ...] at steps t [B] and check the number of its output channels."""
        timesteps = self._array_on("timestep_map", t.device)[t]  # [B]
        out = model(x, timesteps, **(model_kwargs or {})).to(x.dtype)  # [B, C or 2C, ...]
        channels = x.shape[1] * (2 if self.variance == "learned_range" else 1)
        if out.shape[1] != channels:
            raise ValueError(
                f"with variance {self.variance!r} the model must return {channels} channels, "
                f"but it returned {out.shape[1]}"
            )
        return out

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t from q(x_t | x_0) (DDPM, eq. 4).

        Args:
            x_start: x_0 [B, ...].
            t: steps [B].
            noise: standard normal noise, same shape as x_start. Drawn by default.

        Returns:
            x_t, same shape as x_start.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) for x_start and x_t [B, ...], t [B] (DDPM, eq. 7)."""
        return (
            self._extract("posterior_mean_coef1", t, x_t) * x_start
            + self._extract("posterior_mean_coef2", t, x_t) * x_t
        )

    def _interpret(self, out: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        """Convert the model output at x [B, C, ...] and t [B] to p(x_{t-1} | x_t). See `p_mean_variance`."""
        if self.variance == "learned_range":
            out, fraction = out.chunk(2, dim=1)  # [B, C, ...] each
            low = self._extract("posterior_log_variance_clipped", t, x)
            high = self._extract("_log_betas", t, x)
            fraction = (fraction + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
            variance = log_variance.exp()
        elif self.variance == "fixed_large":
            variance = self._extract("_fixed_large_variance", t, x).expand_as(x)
            log_variance = self._extract("_fixed_large_log_variance", t, x).expand_as(x)
        else:
            variance = self._extract("posterior_variance", t, x).expand_as(x)
            log_variance = self._extract("posterior_log_variance_clipped", t, x).expand_as(x)
        if not self.predict_xstart:
            scale = self._extract("sqrt_recip_alphas_cumprod", t, x)
            out = scale * x - self._extract("sqrt_recipm1_alphas_cumprod", t, x) * out
        x_start = out.clamp(-1, 1) if clip_denoised else out
        mean = self.q_posterior_mean(x_start, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x_start}

    def p_mean_variance(
        self, model, x: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: dict | None = None
    ) -> dict[str, Tensor]:
        """Compute the model's Gaussian p(x_{t-1} | x_t).

        Args:
            model: called as model(x, timesteps of the original process, **model_kwargs).
            x: x_t [B, C, ...].
            t: steps [B].
            clip_denoised: clip the predicted x_0 to [-1, 1].
            model_kwargs: keyword arguments of the model.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart" (the predicted x_0), each of the shape of x.

        Raises:
            ValueError: if the model returns the wrong number of channels.
        """
        return self._interpret(self._call_model(model, x, t, model_kwargs), x, t, clip_denoised)

    def p_sample(
        self,
        model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} from p(x_{t-1} | x_t) (DDPM, algorithm 2). No noise is added at t = 0.

        Args:
            model, x, t, clip_denoised, model_kwargs: see `p_mean_variance`.
            noise: standard normal noise, same shape as x. Drawn by default.

        Returns:
            "sample" and "pred_xstart", each of the shape of x.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        noise = torch.randn_like(x) if noise is None else noise
        not_last = (t != 0).view(-1, *[1] * (x.ndim - 1))  # [B, 1, ...]
        sample = out["mean"] + not_last * (0.5 * out["log_variance"]).exp() * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        eta: float = 0.0,
        model_kwargs: dict | None = None,
        *,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Take one step of DDIM from x_t to x_{t-1} (DDIM, eq. 12).

        Args:
            model, x, t, clip_denoised, model_kwargs: see `p_mean_variance`.
            eta: scale of the added noise (DDIM, eq. 16), 0 for none.
            noise: standard normal noise, same shape as x. Drawn by default.

        Returns:
            "sample" and "pred_xstart", each of the shape of x.
        """
        x_start = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)["pred_xstart"]
        scaled_noise = self._extract("sqrt_recip_alphas_cumprod", t, x) * x - x_start
        epsilon = scaled_noise / self._extract("sqrt_recipm1_alphas_cumprod", t, x)
        alpha_bar = self._extract("alphas_cumprod", t, x)
        alpha_bar_prev = self._extract("alphas_cumprod_prev", t, x)
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        sample = alpha_bar_prev.sqrt() * x_start + (1 - alpha_bar_prev - sigma**2).sqrt() * epsilon
        if eta:
            sample = sample + sigma * (torch.randn_like(x) if noise is None else noise)
        return {"sample": sample, "pred_xstart": x_start}

    def p_sample_loop(
        self,
        model,
        shape,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device=None,
        *,
        progress: bool = False,
        step_noise=None,
    ) -> Tensor:
        """Draw samples with DDPM.

        Args:
            model, clip_denoised, model_kwargs: see `p_mean_variance`.
            shape: shape [B, C, ...] of the samples.
            noise: standard normal noise of `shape` to start from. Drawn by default.
            device: device of the drawn noise.
            progress: show a progress bar.
            step_noise: step_noise(i) returns the noise, of `shape`, for the i-th step, which is i = 0 at t = S - 1. It
                is not called for the last step, which adds no noise. Drawn by default.

        Returns:
            Samples of `shape`.
        """
        x = torch.randn(*shape, device=device) if noise is None else noise
        sampler = Ancestral(self, self.p_sample, noisy=True)
        return sampler(as_denoiser(model, model_kwargs), x, clip_denoised, step_noise, progress)

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device=None,
        *,
        progress: bool = False,
        step_noise=None,
        eta: float = 0.0,
    ) -> Tensor:
        """Draw samples with DDIM. See `p_sample_loop` for the arguments and `ddim_sample` for eta."""
        x = torch.randn(*shape, device=device) if noise is None else noise
        sampler = Ancestral(self, partial(self.ddim_sample, eta=eta), noisy=eta > 0)
        return sampler(as_denoiser(model, model_kwargs), x, clip_denoised, step_noise, progress)

    def _bound(self, out: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the term L_{t-1} (L_0 at t = 0) of the variational bound in bits per dimension [B] (DDPM, eq. 5)."""
        model = self._interpret(out, x_t, t, clip_denoised=False)
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = self._extract("posterior_log_variance_clipped", t, x_t)
        # The order of the terms is that of the published code. They nearly cancel, so another order rounds differently.
        kl = 0.5 * (
            -1
            + model["log_variance"]
            - true_log_variance
            + (true_log_variance - model["log_variance"]).exp()
            + (true_mean - model["mean"]) ** 2 * (-model["log_variance"]).exp()
        )
        nll = -discretized_gaussian_log_likelihood(x_start, model["mean"], 0.5 * model["log_variance"])
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    def training_losses(
        self, model, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the training loss of each sample and its parts.

        Args:
            model: called as model(x, timesteps of the original process, **model_kwargs).
            x_start: images or latents [B, C, H, W].
            t: steps [B].
            model_kwargs: keyword arguments of the model.
            noise: standard normal noise, same shape as x_start. Drawn by default.

        Returns:
            "loss" [B]. If the loss is not "kl", also "mse" [B], the mean squared error of the prediction (DDPM, eq.
            14) without the Min-SNR weight, and with a learned variance "vb" [B], the variational bound in bits per
            dimension. The bound trains only the variance, because no gradient flows through its mean (Improved DDPM,
            section 3.1).

        Raises:
            ValueError: if the model returns the wrong number of channels.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        out = self._call_model(model, x_t, t, model_kwargs)
        if self.loss == "kl":
            return {"loss": self._bound(out, x_start, x_t, t) * self.num_timesteps}
        losses = {}
        prediction = out  # [B, C or 2C, H, W]
        if self.variance == "learned_range":
            prediction, fraction = out.chunk(2, dim=1)  # [B, C, H, W] each
            losses["vb"] = self._bound(torch.cat([prediction.detach(), fraction], dim=1), x_start, x_t, t)
            if self.loss == "rescaled_mse":
                losses["vb"] = losses["vb"] * (self.num_timesteps / TIMESTEPS)
        target = x_start if self.predict_xstart else noise
        losses["mse"] = (target - prediction).square().flatten(1).mean(1)
        weighted = losses["mse"]
        if self.mse_weight is not None:
            weighted = weighted * self._extract("mse_weight", t, weighted)
        losses["loss"] = weighted + losses["vb"] if "vb" in losses else weighted
        return losses


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Return the log-probability of 8-bit pixel values under a Gaussian that is divided into 256 bins (DDPM, eq. 13).

    The cumulative distribution function is the tanh approximation of the published code.

    Args:
        x: pixel values, scaled to [-1, 1].
        means: means of the Gaussian, same shape as x.
        log_scales: logarithms of the standard deviations, same shape as x.

    Returns:
        Log-probabilities in nats, same shape as x.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    def log(p: Tensor) -> Tensor:
        return p.clamp(min=1e-12).log()

    precision = (-log_scales).exp()
    upper = cdf(precision * (x - means + 1 / 255))
    lower = cdf(precision * (x - means - 1 / 255))
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))
