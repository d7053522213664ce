"""Pipeline that samples images from a Remix-DiT with any scheduler of diffusers.

This file is stored beside exported weights and requires only diffusers and PyTorch:

    pipe = DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)
    images = pipe(class_labels=[207]).images
"""

import inspect

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# The variance types with which a scheduler reads the variance from the second half of the model's output channels.
LEARNED = ("learned", "learned_range")


class RemixDiTPipeline(DiffusionPipeline):
    """Class-conditional image generation with a Remix-DiT.

    Args:
        transformer: a RemixDiTTransformer2DModel.
        scheduler: a scheduler for models that predict noise. Its defaults are those of the published DiT.
        vae: the autoencoder that decodes the latents, or None for a model of pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012, as in diffusers

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
        """Generate one image per label.

        Args:
            class_labels: the class of every image.
            guidance_scale: scale of classifier-free guidance (arXiv 2207.12598). 1 means no guidance.
            num_inference_steps: number of denoising steps.
            generator: random generator, or a list with one per image.
            latents: the noise [B, C, H, W] to start from. By default it is drawn from `generator`.
            guided_channels: number of channels of the predicted noise that are guided, the first ones. The published
                DiT guides three of four.
            output_type: "pil", "np" [B, H, W, C] or "pt" [B, C, H, W] for images in [0, 1], or "latent" for the
                denoised input of the transformer. A model of latents without a VAE always returns the latter.
            return_dict: whether to return an ImagePipelineOutput instead of a tuple.

        Returns:
            The images.
        """
        config = self.transformer.config
        device = self._execution_device
        channels = config.in_channels
        labels = torch.tensor(class_labels, device=device)
        if guidance_scale != 1:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        x = latents
        if x is None:
            shape = (len(class_labels), channels, config.sample_size, config.sample_size)
            x = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)

        scheduler = self.scheduler
        uses_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in LEARNED
        if not uses_variance and scheduler.config.get("variance_type") in LEARNED:
            # This setting comes from the config of a DDPMScheduler. The scheduler gets the predicted noise only.
            scheduler = scheduler.from_config(scheduler.config, variance_type=None)
        # DDIM computes the noise again from the clipped prediction of the image, as in the published DiT.
        options = {"generator": generator, "use_clipped_model_output": True}
        options = {key: options[key] for key in options.keys() & inspect.signature(scheduler.step).parameters.keys()}
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = x.to(device) * scheduler.init_noise_sigma
        for t in self.progress_bar(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t).to(self.transformer.dtype)
            out = self._predict(scaled, t, labels, guidance_scale, min(guided_channels, channels))
            out = out if uses_variance else out[:, :channels]
            x = scheduler.step(out, t, x, **options).prev_sample

        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, guidance_scale: float, guided_channels: int) -> Tensor:
        """Run the transformer on x [B, C, H, W] at timestep t, with guidance if there are 2B labels."""
        if guidance_scale == 1:
            return self.transformer(x, t.expand(len(x)), labels).sample
        x = torch.cat([x, x])
        conditional, unconditional = self.transformer(x, t.expand(len(x)), labels).sample.chunk(2)
        noise = conditional[:, :guided_channels]
        rest = conditional[:, guided_channels:]
        unconditional = unconditional[:, :guided_channels]
        return torch.cat([unconditional + guidance_scale * (noise - unconditional), rest], dim=1)

    def _decode(self, x: Tensor, output_type: str):
        """Decode denoised samples [B, C, H, W] into images of the given type."""
        if self.vae is not None and output_type != "latent":
            x = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        if output_type == "latent" or x.shape[1] not in (1, 3):
            return x
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        x = x.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(x) if output_type == "pil" else x
