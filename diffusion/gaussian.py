"""The Gaussian diffusion process: DDPM (arXiv 2006.11239), Improved DDPM (2102.09672), DDIM (2010.02502)."""

import math

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


class GaussianDiffusion:
    """Forward process, losses and samplers for one sequence of betas.

    betas: float64 [S], the variance of each step. timestep_map: [S], the original timestep that the model is told at
    each step. predict_xstart: the model predicts x_0 instead of the noise. variance: "learned_range" (Improved DDPM,
    eq. 15; the model then has 2C output channels), "fixed_large" (beta_t) or "fixed_small" (the posterior's).
    loss: "mse", "rescaled_mse" (its bound weighted by S / 1000), or "kl" (the bound alone, times S).
    Indices t in the methods are steps of this process, 0 (least noise) to S - 1.
    """

    def __init__(
        self,
        betas: np.ndarray,
        *,
        timestep_map: list[int] | None = None,
        predict_xstart: bool = False,
        variance: str = "learned_range",
        loss: str = "mse",
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one row of numbers in (0, 1]")
        if variance not in ("learned_range", "fixed_large", "fixed_small"):
            raise ValueError(f"unknown variance {variance!r}")
        if loss not in ("mse", "rescaled_mse", "kl"):
            raise ValueError(f"unknown loss {loss!r}")
        self.num_timesteps = len(betas)
        self.timestep_map = list(range(len(betas))) if timestep_map is None else list(timestep_map)
        self.predict_xstart = predict_xstart
        self.variance = variance
        self.loss = loss

        # Schedule, DDPM eq. 4.
        self.betas = betas
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # Posterior q(x_{t-1} | x_t, x_0), DDPM eq. 6-7. Its variance is 0 at t = 0, so the logarithm there is t = 1's.
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
        self._tables = {}

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Row `name` of the schedule at steps t [B], float32, shaped to broadcast over `like`."""
        return self._table(name, t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._tables:  # copied to each device once: a copy a step would make the host wait
            row = torch.as_tensor(getattr(self, name))
            self._tables[name, device] = row.to(device, torch.long if name == "timestep_map" else torch.float32)
        return self._tables[name, device]

    def _predict(self, model, x: Tensor, t: Tensor, model_kwargs: dict | None) -> Tensor:
        out = model(x, self._table("timestep_map", t.device)[t], **(model_kwargs or {})).to(x.dtype)
        channels = x.shape[1] * (2 if self.variance == "learned_range" else 1)
        if out.shape[1] != channels:
            raise ValueError(
                f"with {self.variance} variance the model must give {channels} channels, it gives {out.shape[1]}"
            )
        return out

    # Forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Diffuse x_start [B, ...] to step t [B] (DDPM, eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        return self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t

    # Reverse process

    def _interpret(self, out: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        """The Gaussian p(x_{t-1} | x_t) that a model output stands for."""
        if self.variance == "learned_range":
            out, fraction = out.chunk(2, dim=1)
            low, high = self._at("posterior_log_variance_clipped", t, x), self._at("_log_betas", t, x)
            fraction = (fraction + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
            variance = log_variance.exp()
        elif self.variance == "fixed_large":
            variance = self._at("_fixed_large_variance", t, x).expand_as(x)
            log_variance = self._at("_fixed_large_log_variance", t, x).expand_as(x)
        else:
            variance = self._at("posterior_variance", t, x).expand_as(x)
            log_variance = self._at("posterior_log_variance_clipped", t, x).expand_as(x)
        if not self.predict_xstart:
            out = self._at("sqrt_recip_alphas_cumprod", t, x) * x - self._at("sqrt_recipm1_alphas_cumprod", t, x) * out
        x_start = out.clamp(-1, 1) if clip_denoised else out
        mean = self.q_posterior_mean(x_start, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x_start}

    def p_mean_variance(
        self, model, x: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: dict | None = None
    ) -> dict[str, Tensor]:
        """The model's Gaussian p(x_{t-1} | x_t) at steps t [B]: mean, variance, log_variance, pred_xstart, each like x.

        model(x, original timesteps, **model_kwargs); clip_denoised keeps the predicted x_0 within [-1, 1].
        """
        return self._interpret(self._predict(model, x, t, model_kwargs), x, t, clip_denoised)

    def p_sample(
        self,
        model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step x_t -> x_{t-1} (DDPM, algorithm 2): sample and pred_xstart, each like x. t = 0 adds no noise."""
        out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        noise = torch.randn_like(x) if noise is None else noise
        moving = (t != 0).view(-1, *[1] * (x.ndim - 1))
        sample = out["mean"] + moving * (0.5 * out["log_variance"]).exp() * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        eta: float = 0.0,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One DDIM step (eq. 12; eta scales sigma, eq. 16): sample and pred_xstart, each like x."""
        x_start = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)["pred_xstart"]
        epsilon = (self._at("sqrt_recip_alphas_cumprod", t, x) * x - x_start) / self._at(
            "sqrt_recipm1_alphas_cumprod", t, x
        )
        now, before = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
        sample = before.sqrt() * x_start + (1 - before - sigma**2).sqrt() * epsilon
        if eta:
            sample = sample + sigma * (torch.randn_like(x) if noise is None else noise)
        return {"sample": sample, "pred_xstart": x_start}

    @torch.no_grad()
    def _loop(self, step, shape, noise, device, progress: bool, step_noise, draws: bool) -> Tensor:
        x = torch.randn(*shape, device=device) if noise is None else noise
        steps = tqdm(range(self.num_timesteps), desc="sampling", leave=False, disable=not progress)
        for i in steps:
            t = torch.full((shape[0],), self.num_timesteps - 1 - i, device=x.device, dtype=torch.long)
            last = i == self.num_timesteps - 1
            draw = step_noise(i) if step_noise is not None and draws and not last else None
            x = step(x, t, noise=draw)["sample"]
        return x

    def p_sample_loop(
        self,
        model,
        shape,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device=None,
        progress: bool = False,
        step_noise=None,
    ) -> Tensor:
        """Draw a sample of `shape` by DDPM's ancestral steps, starting from `noise`.

        step_noise(i) gives the noise of the i-th step taken (i = 0 first), of `shape`; by default it is drawn on the spot.
        """
        return self._loop(
            lambda x, t, noise: self.p_sample(model, x, t, clip_denoised, model_kwargs, noise),
            shape, noise, device, progress, step_noise, draws=True,
        )  # fmt: skip

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device=None,
        progress: bool = False,
        step_noise=None,
        eta: float = 0.0,
    ) -> Tensor:
        """Draw a sample of `shape` by DDIM steps; the arguments are `p_sample_loop`'s, and eta as in `ddim_sample`."""
        return self._loop(
            lambda x, t, noise: self.ddim_sample(model, x, t, clip_denoised, eta, model_kwargs, noise),
            shape, noise, device, progress, step_noise, draws=eta > 0,
        )  # fmt: skip

    # Losses

    def _bound(self, out: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound in bits per dimension, [B]: L_{t-1}, or L_0 where t = 0 (DDPM, eq. 5)."""
        model = self._interpret(out, x_t, t, clip_denoised=False)
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        kl = 0.5 * (
            -1  # the order of the terms is the published code's: they nearly cancel, and float32 remembers the order
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
        """The training loss of each sample, and its parts.

        x_start [B, C, H, W], t [B], noise like x_start (drawn if not given). Returns `loss` [B] and, as they apply, `mse`
        [B] (DDPM, eq. 14) and `vb` [B], the bound in bits per dimension that trains the learned variance, its mean
        prediction held fixed (Improved DDPM, section 3.1).
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        out = self._predict(model, x_t, t, model_kwargs)
        if self.loss == "kl":
            return {"loss": self._bound(out, x_start, x_t, t) * self.num_timesteps}
        losses = {}
        prediction = out
        if self.variance == "learned_range":
            prediction, fraction = out.chunk(2, dim=1)
            losses["vb"] = self._bound(torch.cat([prediction.detach(), fraction], dim=1), x_start, x_t, t)
            if self.loss == "rescaled_mse":
                losses["vb"] = losses["vb"] * (self.num_timesteps / 1000)
        target = x_start if self.predict_xstart else noise
        losses["mse"] = (target - prediction).square().flatten(1).mean(1)
        losses["loss"] = losses["mse"] + losses["vb"] if "vb" in losses else losses["mse"]
        return losses


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability in nats, like x, of 8-bit values x (scaled to [-1, 1]) under a Gaussian cut into 256 bins.

    DDPM, eq. 13, with the normal distribution function by its tanh approximation, as published.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    def log(p: Tensor) -> Tensor:
        return p.clamp(min=1e-12).log()

    precision = (-log_scales).exp()
    upper = cdf(precision * (x - means + 1 / 255))
    lower = cdf(precision * (x - means - 1 / 255))
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))
