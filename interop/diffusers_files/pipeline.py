"""Samples a Remix-DiT with any of diffusers' schedulers; needs nothing but diffusers and PyTorch.

DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)(class_labels=[207])
"""

import inspect

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

LEARNED = ("learned", "learned_range")


class RemixDiTPipeline(DiffusionPipeline):
    """transformer: a RemixDiTTransformer2DModel; vae: what its latents are decoded with, if there is one."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012, diffusers' own way

    def __init__(self, transformer: ModelMixin, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        guided_channels: int = 3,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw an image for each label.

        guidance_scale: classifier-free guidance, 1 for none, of the first `guided_channels` channels of the noise (DiT's
        published choice is three of four). generator: one, or one an image. latents [B, C, H, W]: the noise to start
        from. output_type: "pil", "np", "pt" (images in [0, 1]) or "latent" (what the transformer sees; also what comes of
        a latent model without a VAE).
        """
        config, device, n = self.transformer.config, self._execution_device, len(class_labels)
        channels, guided = config.in_channels, guidance_scale != 1
        guided_channels = min(guided_channels, channels)
        labels = torch.tensor(class_labels, device=device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        x = latents
        if x is None:
            shape = (n, channels, config.sample_size, config.sample_size)
            x = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)

        scheduler = self.scheduler
        uses_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in LEARNED
        if not uses_variance and scheduler.config.get("variance_type") in LEARNED:
            scheduler = scheduler.from_config(
                scheduler.config, variance_type=None
            )  # inherited from DDPM's; dropped below
        options = {
            "generator": generator,
            "use_clipped_model_output": True,
        }  # the second is DDIM's, as DiT's code has it
        options = {key: options[key] for key in options.keys() & inspect.signature(scheduler.step).parameters.keys()}
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = x.to(device) * scheduler.init_noise_sigma
        for t in self.progress_bar(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t).to(self.transformer.dtype)
            seen = torch.cat([seen, seen]) if guided else seen
            out = self.transformer(seen, t.expand(len(seen)), labels).sample
            if guided:
                out, unconditional = out.chunk(2)
                noise, unconditional = out[:, :guided_channels], unconditional[:, :guided_channels]
                rest = out[:, guided_channels:]
                out = torch.cat([unconditional + guidance_scale * (noise - unconditional), rest], dim=1)
            out = out if uses_variance else out[:, :channels]
            x = scheduler.step(out, t, x, **options).prev_sample

        if self.vae is not None and output_type != "latent":
            x = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        if output_type != "latent" and x.shape[1] in (1, 3):
            x = (x / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                x = x.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                x = self.numpy_to_pil(x)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)
