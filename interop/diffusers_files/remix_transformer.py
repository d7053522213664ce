"""DiT and Remix-DiT models for diffusers, with the timestep frequencies of the published DiT.

This file is stored beside exported weights and requires only diffusers and PyTorch.

The published DiT embeds a timestep t as the sines and cosines of t 10000^(-i/128) for i = 0..127. diffusers'
DiTTransformer2DModel has t 10000^(-i/127) instead. The weights were trained with the former, which the classes below
use.
"""

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class PublishedDiTTransformer2DModel(DiTTransformer2DModel):
    """diffusers' DiTTransformer2DModel with the timestep frequencies of the published DiT."""

    def forward(self, *args, **kwargs):
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
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


class Conditioning(nn.Module):
    """Replaces the embedders of the blocks, and returns the embedding that was computed once for all blocks."""

    value = None

    def forward(self, *args, **kwargs) -> Tensor:
        return self.value


class RemixDiTTransformer2DModel(DiTTransformer2DModel):
    """Remix-DiT (arXiv 2412.05628) for inference: N experts that are weighted averages of K basis DiTs.

    Expert i denoises the timesteps t with floor(i T / N) <= t < floor((i + 1) T / N). All timesteps of a call must
    belong to the same expert, as they do in the steps of a sampler.

    Args:
        n_basis: the number K of basis models.
        n_experts: the number N of experts.
        num_timesteps: the number T of timesteps of the diffusion process.
        local_scope: whether every block has mixing coefficients of its own.
        mixed_layers: names of the mixed linear layers within a block. All other layers are shared by the experts.

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
        num_timesteps: int,
        local_scope: bool,
        mixed_layers: list[str],
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
        self.embedder.time_proj.downscale_freq_shift = 0
        self.conditioning = Conditioning()
        for index, block in enumerate(self.transformer_blocks):
            block.norm1.emb = self.conditioning
            for name in mixed_layers:
                parent, _, child = name.rpartition(".")
                linear = MixedLinear(block.get_submodule(name), n_basis, index if local_scope else 0)
                setattr(block.get_submodule(parent), child, linear)
        self.coefficients = nn.Parameter(torch.empty(num_layers if local_scope else 1, n_experts, n_basis))
        self.folded = None

    @torch.no_grad()
    def select(self, timestep: Tensor):
        """Mix the weights of the expert that the timesteps belong to, unless it is the expert of the previous call.

        Args:
            timestep: timesteps [B] from 0 to T - 1.

        Raises:
            ValueError: if the timesteps belong to several experts.
        """
        config = self.config
        first, last = ((config.n_experts * (int(t) + 1) - 1) // config.num_timesteps for t in timestep.aminmax())
        if first != last:
            raise ValueError(f"the timesteps of a call must belong to one expert, these belong to {first} to {last}")
        state = (first, self.device, self.dtype)
        if state != self.folded:
            for module in self.modules():
                if isinstance(module, MixedLinear):
                    module.mix(self.coefficients[:, first].to(module.weight.device))
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
