"""Pipeline that samples images from a Remix-DiT with any scheduler of diffusers.

This file is stored beside exported weights and requires only diffusers and PyTorch:

    pipe = DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)
    images = pipe(class_labels=[207]).images
"""

import inspect
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# The variance types with which a scheduler reads the variance from the second half of the model's output channels.
LEARNED = ("learned", "learned_range")


# The names that model_index.json gives to the file of the transformer's class, and to the classes in it.
TRANSFORMERS = "remix_transformer"
CLASSES = ("RemixDiTTransformer2DModel", "PublishedDiTTransformer2DModel")

# For `from_pretrained(..., transformer=model)`, diffusers looks up the type of the model in the module that
# model_index.json names, which has not been imported: it lies in the pipeline's folder. This one accepts every model.
sys.modules.setdefault(TRANSFORMERS, ModuleType(TRANSFORMERS))
for _name in ("ModelMixin", *CLASSES):
    if not hasattr(sys.modules[TRANSFORMERS], _name):
        setattr(sys.modules[TRANSFORMERS], _name, ModelMixin)


class RemixDiTPipeline(DiffusionPipeline):
    """Class-conditional image generation with a Remix-DiT.

    The latents, the noise, guidance and the scheduler's steps are float32, also if the transformer has another type.

    Args:
        transformer: a RemixDiTTransformer2DModel or a PublishedDiTTransformer2DModel.
        scheduler: a scheduler for models that predict noise, whose defaults are those of the published DiT; or for
            flows one for models that predict the velocity (FlowMatch...).
        vae: the autoencoder that decodes the latents, or None for a model of pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012, as in diffusers
    code = Path(__file__).read_text()

    def __init__(self, transformer: ModelMixin, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """See ConfigMixin. `auto_map` is for AutoModel, and would be reported as an unknown argument here."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_config(self, save_directory: str | Path, **kwargs):
        """Write model_index.json and this file to a folder. The arguments are those of ConfigMixin.save_config."""
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = ["pipeline", type(self).__name__]
        library, name = index["transformer"]
        if library != "diffusers":
            index["transformer"] = [TRANSFORMERS, name]
            # AutoModel looks here, also for a subfolder.
            index["auto_map"] = {"AutoModel": f"{TRANSFORMERS}.{name}"}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (folder / "pipeline.py").write_text(self.code)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        guidance_scale: float | list[tuple[float, float, float]] = 1.5,
        num_inference_steps: int = 250,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        guided_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: ModelMixin | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images of the given classes.

        Args:
            class_labels: the class of each image, from 0 to the number of classes - 1, or one class.
            guidance_scale: scale of classifier-free guidance (arXiv 2207.12598), or a list of (scale, low, high) for
                intervals of noise levels: timesteps, or for flows numbers from 0 to 1. 1 means no guidance, as at the
                levels that are in no interval.
            num_inference_steps: number of denoising steps.
            num_images_per_prompt: number of images per label. The images of a label follow each other.
            generator: random generator, or a list with one per image.
            latents: the noise [B, C, H, W] to start from. By default it is drawn from `generator`.
            guided_channels: number of channels of the prediction that are guided, the first ones. By default three of
                four, as in the published DiT, and all of any other number.
            guidance_interval: lowest and highest noise level with guidance (arXiv 2404.07724). Default: all levels.
            guide: a weaker transformer, which takes the place of the model without a class (arXiv 2406.02507).
            output_type: "pil", "np" [B, H, W, C] or "pt" [B, C, H, W] for images in [0, 1], or "latent" for the
                denoised input of the transformer. A model of latents without a VAE always returns the latter.
            return_dict: whether to return an ImagePipelineOutput instead of a tuple.

        Returns:
            The images.

        Raises:
            ValueError: if a label is out of range, or if only one of model and scheduler is for flows.
        """
        config = self.transformer.config
        device = self._execution_device
        channels = config.in_channels
        labels = self._repeat_labels(class_labels, num_images_per_prompt).to(device)
        shape = (len(labels), channels, config.sample_size, config.sample_size)
        # Steps of a reduced precision are lost: in bfloat16, a velocity of 0.7 moves 1 by 0.38 in 250 steps.
        x = latents
        if x is None:
            x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        scheduler, flow = self.scheduler, bool(config.get("flow"))
        if flow != type(scheduler).__name__.startswith("FlowMatch"):
            kind = "a flow, which needs a FlowMatch scheduler" if flow else "no flow"
            raise ValueError(f"the scheduler is a {type(scheduler).__name__}, but the model is {kind}")
        uses_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in LEARNED
        if not uses_variance and scheduler.config.get("variance_type") in LEARNED:
            # This setting comes from the config of a DDPMScheduler. The scheduler gets the predicted noise only.
            scheduler = scheduler.from_config(scheduler.config, variance_type=None)
        # DDIM computes the noise again from the clipped prediction of the image, as in the published DiT.
        options = {"generator": generator, "use_clipped_model_output": True}
        options = {key: options[key] for key in options.keys() & inspect.signature(scheduler.step).parameters.keys()}
        _set_timesteps(scheduler, num_inference_steps, device)
        x = x.to(device, torch.float32) * getattr(scheduler, "init_noise_sigma", 1)
        for t in self.progress_bar(scheduler.timesteps):
            # The time of a flow is 1 for data. The scheduler's is 0 for data, and its velocity has the other sign.
            scaled = x if flow else scheduler.scale_model_input(x, t)
            time, sign = (1 - t / scheduler.config.num_train_timesteps, -1) if flow else (t, 1)
            level = float(t) / scheduler.config.num_train_timesteps if flow else float(t)
            scale = _scale_at(guidance_scale, guidance_interval, level, flow)
            guided = min(guided_channels or (3 if channels == 4 else channels), channels)
            out = sign * self._predict(scaled, time, labels, scale, guided, guide)
            out = out if uses_variance else out[:, :channels]
            x = scheduler.step(out, t, x, **options).prev_sample

        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _repeat_labels(self, class_labels: int | list[int], repeats: int) -> Tensor:
        """Return the labels, each of them `repeats` times. Raises ValueError if a label is out of range."""
        labels = [class_labels] if isinstance(class_labels, int) else [int(label) for label in class_labels]
        num_classes = self.transformer.config.num_embeds_ada_norm
        for label in labels:
            if not 0 <= label < num_classes:
                raise ValueError(f"class_labels must be from 0 to {num_classes - 1}, but {label} is among them")
        return torch.tensor(labels).repeat_interleave(repeats)

    def _predict(
        self, x: Tensor, t: Tensor, labels: Tensor, scale: float, guided_channels: int, guide: ModelMixin | None
    ) -> Tensor:
        """Run the transformer on x [B, C, H, W] at timestep t with the labels [B], guided unless the scale is 1."""
        if scale == 1:
            return _run(self.transformer, x, t, labels)
        if guide is not None:
            out, weak = _run(self.transformer, x, t, labels), _run(guide, x, t, labels)
        else:
            null = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
            out, weak = _run(self.transformer, torch.cat([x, x]), t, torch.cat([labels, null])).chunk(2)
        strong, rest = out[:, :guided_channels], out[:, guided_channels:]
        weak = weak[:, :guided_channels]
        return torch.cat([weak + scale * (strong - weak), rest], dim=1)

    def _latents(self, x: Tensor) -> Tensor:
        """Undo the normalization of latents [B, C, H, W] that the config of the VAE describes."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return x / config.scaling_factor + (config.get("shift_factor") or 0)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (mean, std))
        return x * std / config.scaling_factor + mean

    def _decode(self, x: Tensor, output_type: str):
        """Decode denoised samples [B, C, H, W] into images of the given type."""
        if self.vae is not None and output_type != "latent":
            x = self.vae.decode(self._latents(x).to(self.vae.dtype)).sample.float()
        if output_type == "latent" or x.shape[1] not in (1, 3):
            return x
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        x = x.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(x) if output_type == "pil" else x


def _run(network: ModelMixin, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Return the output of a network in the type of x [B, C, H, W]; only the network itself runs in its own type."""
    return network(x.to(network.dtype), t.expand(len(x)), labels).sample.to(x.dtype)


def _scale_at(
    scale: float | list[tuple[float, float, float]], interval: tuple[float, float] | None, level: float, flow: bool
) -> float:
    """Return the guidance scale at a noise level; see `RemixDiTPipeline.__call__`."""
    pieces = scale if isinstance(scale, list) else [(scale, 0, math.inf)]
    low, high = interval or (0, math.inf)
    # An interval holds its lowest level and not its highest, except that of a flow's pure noise, 1. The noise levels of
    # flows are rounded.
    level = min(level + 2**-20, math.nextafter(1, 0)) if flow else level
    for value, start, end in pieces:
        if max(start, low) <= level < min(end, high):
            return value
    return 1.0


def _set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device):
    """Set the timesteps of a scheduler.

    Those that EulerDiscreteScheduler chooses itself are not integers, and its last step is a short one. It gets the
    integers that the other solvers use, evenly spaced from T - 1 to about T / num_inference_steps. For flows, Euler's
    noise levels are evenly spaced from 1 to 0, before the scheduler shifts them.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        return
    if not isinstance(scheduler, EulerDiscreteScheduler):
        scheduler.set_timesteps(num_inference_steps, device=device)
        return
    timesteps = np.linspace(0, scheduler.config.num_train_timesteps - 1, num_inference_steps + 1).round()[:0:-1]
    scheduler.set_timesteps(timesteps=timesteps.tolist(), device=device)
