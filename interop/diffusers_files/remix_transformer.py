"""DiT and Remix-DiT models for diffusers, with the timestep frequencies of the published DiT.

This file is stored beside exported weights and requires only diffusers and PyTorch.

The published DiT embeds a timestep t as the sines and cosines of t 10000^(-i/128) for i = 0..127. diffusers'
DiTTransformer2DModel has t 10000^(-i/127) instead. The classes below use the frequencies 10000^(-i/(128 - s)) that the
weights were trained with. Their config stores s as `frequency_shift`, 0 by default.

diffusers executes this file again whenever it loads a model, so that two models have different classes of the same
name. Therefore no code here compares the class of a module of a model.
"""

import functools
import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import Tensor, nn

logger = logging.get_logger(__name__)


class SavedWithCode:
    """Base class of models whose save_pretrained stores this file too, so that AutoModel loads the folder again."""

    code = Path(__file__).read_text()
    saved_name: str | None = None

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """See ConfigMixin. Entries of the config that are not arguments are kept without a warning."""
        others = {"auto_map", "frequency_shift", "flow"} - inspect.signature(cls.__init__).parameters.keys()
        arguments = {key: value for key, value in config_dict.items() if key not in others}
        init_dict, unused, hidden = super().extract_init_dict(arguments, **kwargs)
        return init_dict, unused, hidden | {key: config_dict[key] for key in others & config_dict.keys()}

    def save_config(self, save_directory: str | Path, **kwargs):
        """Write config.json and this file to a folder. The arguments are those of ConfigMixin.save_config."""
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        config = json.loads((folder / "config.json").read_text())
        # The parent class adds its own arguments, which the class may not accept.
        accepted = {"frequency_shift", "flow", *inspect.signature(type(self).__init__).parameters}
        config = {key: value for key, value in config.items() if key.startswith("_") or key in accepted}
        config["_class_name"] = self.saved_name or type(self).__name__
        config["auto_map"] = {"AutoModel": f"remix_transformer.{type(self).__name__}"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "remix_transformer.py").write_text(self.code)


class PublishedDiTTransformer2DModel(SavedWithCode, DiTTransformer2DModel):
    """diffusers' DiTTransformer2DModel with the timestep frequencies that its config gives."""

    # Programs that cannot run this file recognize the architecture by this name.
    saved_name = "DiTTransformer2DModel"

    def forward(self, *args, **kwargs):
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = self.config.get("frequency_shift", 0)
        return super().forward(*args, **kwargs)


class MixedLinear(nn.Module):
    """K linear layers, one weighted average of which is used at a time.

    Its parameters are `weight` [K, out, in] and `bias` [K, out].

    Args:
        linear: the linear layer to replace, which gives the shapes.
        n_basis: the number K of linear layers.
        row: the index of this layer's mixing coefficients.
    """

    def __init__(self, linear: nn.Linear, n_basis: int, row: int):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.new_empty(n_basis, *linear.weight.shape))
        self.bias = nn.Parameter(linear.bias.new_empty(n_basis, *linear.bias.shape))
        self.row = row
        self.mixed = None

    def mix(self, coefficients: Tensor):
        """Compute the weighted average of the K layers for one expert, in float32.

        Args:
            coefficients: the coefficients [rows, K] of the expert.
        """
        self.mixed = []
        for bases in (self.weight, self.bias):
            total = torch.zeros_like(bases[0], dtype=torch.float32)
            for coefficient, basis in zip(coefficients[self.row].float(), bases, strict=True):
                total.addcmul_(coefficient, basis.float())
            self.mixed.append(total.to(bases.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.mixed)


def tensor_state(tensor: Tensor) -> tuple:
    """Return what changes when a tensor is moved, replaced, or changed in place."""
    # Tensors made in inference mode do not count their changes.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.device, tensor.dtype, tensor.data_ptr(), version


class Conditioning(nn.Module):
    """Replaces the embedders of the blocks, and returns the embedding that was computed once for all blocks."""

    value = None

    def forward(self, *args, **kwargs) -> Tensor:
        return self.value


@functools.lru_cache
def inner_boundaries(boundaries: tuple[float, ...], dtype: torch.dtype, flow: bool) -> list[float]:
    """Return the N - 1 boundaries between experts, lowered for comparison with rounded noise levels.

    Many samplers take steps on boundaries. With lowered boundaries, these steps belong to the expert above, although
    the noise level may be rounded: to float32, or once or twice to a type of less precision. Integers are exact. The
    project that has exported this file has the same rule in diffusion/intervals.py, which explains it.

    Args:
        boundaries: N + 1 increasing noise levels.
        dtype: the type of the timesteps.
        flow: whether the timesteps are 1 minus the noise level.
    """
    levels = torch.tensor(boundaries, dtype=torch.float64, device="cpu")
    if not dtype.is_floating_point or len(boundaries) < 3:
        return levels[1:-1].tolist()
    error, highest = 2.0**-20, boundaries[-1]
    found = [levels - error * highest, levels + error * highest]
    parts = (highest - levels if flow else levels) / highest
    for unit in (1, 1000, highest) if dtype.itemsize < 4 else ():
        for shift in (-error, error):
            first = ((parts + shift) * unit).float().to(dtype).double() / unit
            second = ((first + shift) * highest).float().to(dtype).double()
            found.append(highest - second if flow else second)
    low, high = torch.stack(found).amin(0), torch.stack(found).amax(0)
    inner = torch.maximum(low, (levels + levels.roll(1)) / 2)[1:-1]
    if not torch.equal(inner, low[1:-1]) or not (high[1:-2] < inner[1:]).all():
        logger.warning(
            f"some intervals of experts are too short for the spacing of {dtype} timesteps, so that a step on a "
            "boundary can run a neighbouring expert"
        )
    return inner.tolist()


class RemixDiTTransformer2DModel(SavedWithCode, DiTTransformer2DModel):
    """Remix-DiT (arXiv 2412.05628) for inference: N experts that are weighted averages of K basis DiTs.

    Expert i denoises the timesteps from boundary i to boundary i + 1. All timesteps of a call must belong to the same
    expert, as they do in the steps of a sampler.

    Args:
        n_basis: the number K of basis models.
        n_experts: the number N of experts.
        mixer: "softmax" if the mixing coefficients are the softmax of the logits; "raw" or "one-hot" if they are the
            logits.
        scope: "local" if every block has mixing coefficients of its own, otherwise "global".
        mixed_layers: names of the mixed linear layers within a block. All other layers are shared by the experts.
        boundaries: N + 1 increasing timesteps from 0 to T, or noise levels from 0 to 1 for a flow.
        frequency_shift: the shift s of the timestep frequencies 10000^(-i/(128 - s)).
        flow: the settings of a flow, whose timesteps are 1 minus the noise level; None for Gaussian diffusion.

    The other arguments are those of DiTTransformer2DModel.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        sample_size: int,
        patch_size: int,
        num_embeds_ada_norm: int,
        norm_eps: float,
        n_basis: int,
        n_experts: int,
        mixer: str,
        scope: str,
        mixed_layers: list[str],
        boundaries: list[float],
        frequency_shift: int = 0,
        flow: dict | None = None,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=num_embeds_ada_norm,
            norm_eps=norm_eps,
        )
        self.embedder = self.transformer_blocks[0].norm1.emb
        self.embedder.time_proj.downscale_freq_shift = frequency_shift
        self.conditioning = Conditioning()
        # Kept as a list, because the classes of two models differ. See the start of this file.
        self.mixed = []
        for index, block in enumerate(self.transformer_blocks):
            block.norm1.emb = self.conditioning
            for name in mixed_layers:
                parent, _, child = name.rpartition(".")
                linear = MixedLinear(block.get_submodule(name), n_basis, index if scope == "local" else 0)
                setattr(block.get_submodule(parent), child, linear)
                self.mixed.append(linear)
        self.logits = nn.Parameter(torch.empty(num_layers if scope == "local" else 1, n_experts, n_basis))
        self.folded = None

    def expert_index(self, timestep: float, dtype: torch.dtype | None = None) -> int:
        """Return the index of the expert that a timestep belongs to.

        Args:
            timestep: the timestep.
            dtype: the type that it has arrived in, see `inner_boundaries`. None: float32, or an integer.
        """
        config, level = self.config, torch.tensor(timestep, dtype=torch.float32, device="cpu")
        dtype = dtype or (torch.long if isinstance(timestep, int) else torch.float32)
        inner = inner_boundaries(tuple(config.boundaries), dtype, bool(config.flow))
        inner = torch.tensor(inner, dtype=torch.float32, device="cpu")
        return int(torch.bucketize(1 - level if config.flow else level, inner, right=True))

    @torch.no_grad()
    def select(self, timestep: Tensor):
        """Mix the weights of the expert that the timesteps belong to, unless they are those of the previous call.

        Args:
            timestep: timesteps [B] from 0 to T - 1.

        Raises:
            ValueError: if the timesteps belong to several experts.
        """
        first, last = (self.expert_index(t.item(), timestep.dtype) for t in timestep.aminmax())
        if first != last:
            raise ValueError(f"the timesteps of a call must belong to one expert, these belong to {first} to {last}")
        state = (first, *map(tensor_state, [self.logits, *(p for layer in self.mixed for p in layer.parameters())]))
        if state != self.folded:
            logits = self.logits[:, first].float()
            coefficients = logits.softmax(-1) if self.config.mixer == "softmax" else logits
            for layer in self.mixed:
                layer.mix(coefficients.to(layer.weight.device))
            self.folded = state

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ):
        """Predict the noise, and the variance if the model has learned it.

        Args:
            hidden_states: noisy images or latents [B, C, H, W].
            timestep: timesteps [B] from 0 to T - 1, which belong to one expert.
            class_labels: class labels [B]. `num_embeds_ada_norm` is the null class of classifier-free guidance.
            cross_attention_kwargs: see DiTTransformer2DModel.
            return_dict: whether to return a Transformer2DModelOutput instead of a tuple.

        Returns:
            A Transformer2DModelOutput whose `sample` has the shape [B, C or 2C, H, W], or a tuple of that tensor.
        """
        self.select(timestep)
        self.conditioning.value = self.embedder(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        try:
            return super().forward(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
        finally:
            self.conditioning.value = None
