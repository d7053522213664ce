"""DiTs for diffusers with the timestep frequencies that they were trained with; a Remix-DiT switches its experts inside.

This file travels with exported weights (convert.py --to diffusers) and needs nothing but diffusers and PyTorch.
The published DiT takes a timestep's sines and cosines at 128 rates 10000^(-i/128), diffusers' class at 10000^(-i/127). No
choice of weights makes up for that, so these classes put it right.
"""

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class PublishedDiTTransformer2DModel(DiTTransformer2DModel):
    """diffusers' DiT with the published DiT's frequencies."""

    def forward(self, *args, **kwargs):
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        return super().forward(*args, **kwargs)


class MixedLinear(nn.Module):
    """K linear layers, of which one mixture runs at a time: weight [K, out, in], bias [K, out]."""

    def __init__(self, linear: nn.Linear, n_basis: int, row: int):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.new_empty(n_basis, *linear.weight.shape))
        self.bias = nn.Parameter(linear.bias.new_empty(n_basis, *linear.bias.shape))
        self.row = row
        self.mixed = None

    def mix(self, shares: Tensor):
        """Average the bases, weighted by the expert's row of the coefficients, shares [rows, K]."""
        self.mixed = []
        for bases in (self.weight, self.bias):
            total = torch.zeros_like(bases[0], dtype=torch.float32)
            for share, basis in zip(shares[self.row].float(), bases, strict=True):
                total.addcmul_(share, basis.float())
            self.mixed.append(total.to(bases.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.mixed)


class Conditioning(nn.Module):
    """Stands where a DiT's blocks have embedders of their own, and gives them what the one embedder made."""

    value = None

    def forward(self, *args, **kwargs) -> Tensor:
        return self.value


class RemixDiTTransformer2DModel(DiTTransformer2DModel):
    """N experts that are mixtures of K DiTs (arXiv 2412.05628), for inference.

    Expert i denoises the timesteps t with floor(i T / N) <= t < floor((i + 1) T / N); a call's timesteps must belong to one
    expert, as a sampler's do. mixed_layers: names within a block. The other arguments are DiTTransformer2DModel's.
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
        """Fold the expert that owns the timesteps, unless it was the last to run. Raises ValueError if there are several."""
        config, (first, last) = self.config, (int(t) for t in timestep.aminmax())
        first, last = ((config.n_experts * (t + 1) - 1) // config.num_timesteps for t in (first, last))
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
        """hidden_states [B, C, H, W], timestep [B] of 0 to T - 1, class_labels [B] (`num_embeds_ada_norm` is the null class)."""
        self.select(timestep)
        self.conditioning.value = self.embedder(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        try:
            return super().forward(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
        finally:
            self.conditioning.value = None
