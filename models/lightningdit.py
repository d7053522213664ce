"""LightningDiT (Yao et al., arXiv 2501.01423): a DiT with rotary embeddings, RMSNorm and SwiGLU, each optional.

Parameter names and shapes are those of hustvl/LightningDiT. Shapes in comments: B samples, L tokens, D hidden size,
C channels, P patch size, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .dit import (
    DIT_SIZES,
    SINUSOIDS,
    Attention,
    DiT,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    check_sizes,
    choose_attention,
    classifier_free_guidance,
    initialize,
    sincos_positions,
)


class RMSNorm(nn.Module):
    """Divide by the root mean square (Zhang & Sennrich, arXiv 1910.07467), computed in float32, and scale each channel.

    Args:
        size: number of channels.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., size] -> [..., size]."""
        return F.rms_norm(x.float(), self.weight.shape, eps=1e-6).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """The gated MLP of Shazeer (arXiv 2002.05202): SiLU(a) * b, with a and b from one linear layer.

    Args:
        hidden_size: size D of the tokens.
        inner_size: size of a and of b.
    """

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the tokens x [B, L, D] -> [B, L, D]."""
        a, b = self.w12(x).chunk(2, dim=-1)  # [B, L, inner_size] each
        return self.w3(F.silu(a) * b)


def swiglu_size(inner_size: int) -> int:
    """Return the inner size of a SwiGLU that has as many weights as a plain MLP of an inner size."""
    return int(2 / 3 * inner_size)


class RotaryEmbedding(nn.Module):
    """Rotate pairs of channels by angles that are proportional to the position (RoPE, Su et al., arXiv 2104.09864).

    The first half of a head's channels encodes y, the second half x. Neighboring channels are a pair.

    Args:
        head_size: number of channels of a head, divisible by 4.
        side: number of positions along x and along y.

    Attributes:
        freqs_cos, freqs_sin: cosines and sines of the angles of each position and channel [L, head_size]; buffers, as
            in the published files.

    Raises:
        ValueError: if the size is not divisible by 4.
    """

    def __init__(self, head_size: int, side: int):
        super().__init__()
        if head_size % 4:
            raise ValueError(
                f"hidden_size / num_heads must be divisible by 4 for rotary embeddings, but it is {head_size}"
            )
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(side * side, head_size))
        axis = head_size // 2  # number of channels of each axis
        frequencies = 10000.0 ** -(torch.arange(0, axis, 2, dtype=torch.float64, device="cpu") / axis)
        positions = torch.arange(side, dtype=torch.float64, device="cpu")
        angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=1)  # [side, axis]
        along_y, along_x = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
        angles = torch.cat([along_y, along_x], dim=1)  # [L, head_size]
        self.freqs_cos.copy_(angles.cos())
        self.freqs_sin.copy_(angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate queries or keys x [B, H, L, D / H], float32 if the buffers are."""
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)  # by 90 degrees
        return x * self.freqs_cos + turned * self.freqs_sin


class RotaryAttention(Attention):
    """Multi-head self-attention with rotary embeddings and normalized queries and keys, if they are asked for.

    Args:
        hidden_size: size D of the tokens.
        num_heads: number H of heads.
        norm: class of the normalization of each head's queries and keys; None for none.
    """

    def __init__(self, hidden_size: int, num_heads: int, norm: type[nn.Module] | None = None):
        super().__init__(hidden_size, num_heads)
        self.q_norm, self.k_norm = (norm(hidden_size // num_heads) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotary: RotaryEmbedding | None = None) -> Tensor:
        """Transform the tokens x [B, L, D] -> [B, L, D]."""
        q, k, v = self.project(x)  # [B, H, L, D / H] each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        return self.attend(q.to(v.dtype), k.to(v.dtype), v)


def make_norm(hidden_size: int, use_rmsnorm: bool) -> nn.Module:
    """Return the normalization of tokens: RMSNorm with weights, or LayerNorm without."""
    return RMSNorm(hidden_size) if use_rmsnorm else nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class LightningDiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning, by one vector per sample or one per token.

    Args:
        hidden_size: size D of the tokens.
        num_heads: number of attention heads.
        mlp_ratio: inner size of the MLP divided by D; that of a SwiGLU is two thirds of it.
        use_qknorm, use_swiglu, use_rmsnorm, wo_shift: see `LightningDiT`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        use_qknorm: bool = False,
        use_swiglu: bool = False,
        use_rmsnorm: bool = False,
        wo_shift: bool = False,
    ):
        super().__init__()
        self.norm1, self.norm2 = (make_norm(hidden_size, use_rmsnorm) for _ in range(2))
        head_norm = (RMSNorm if use_rmsnorm else nn.LayerNorm) if use_qknorm else None
        self.attn = RotaryAttention(hidden_size, num_heads, head_norm)
        inner_size = int(hidden_size * mlp_ratio)
        self.mlp = SwiGLU(hidden_size, swiglu_size(inner_size)) if use_swiglu else Mlp(hidden_size, inner_size)
        self.wo_shift = wo_shift
        parts = 4 if wo_shift else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rotary: RotaryEmbedding | None = None) -> Tensor:
        """Transform the tokens x [B, L, D] under the condition c [B, 1 or L, D] -> [B, L, D]."""
        modulation = self.adaLN_modulation(c)  # [B, 1 or L, 4D or 6D]
        if self.wo_shift:
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
            x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa), rotary)
            return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa, rotary)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class LightningFinalLayer(FinalLayer):
    """Map tokens to the pixels of their patches. The modulation always shifts.

    Args:
        hidden_size, patch_size, out_channels: see `FinalLayer`.
        use_rmsnorm: see `LightningDiT`.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, use_rmsnorm: bool = False):
        super().__init__(hidden_size, patch_size, out_channels)
        self.norm_final = make_norm(hidden_size, use_rmsnorm)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map the tokens x [B, L, D] under the condition c [B, 1 or L, D] -> patches [B, L, P * P * out_channels]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # [B, 1 or L, D] each
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class LightningDiT(nn.Module):
    """A class-conditional DiT with the options of LightningDiT.

    Args:
        input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, class_dropout_prob, num_classes,
            learn_sigma: see `DiT`.
        use_qknorm: normalize the queries and the keys of each head, by RMSNorm if `use_rmsnorm`, otherwise by LayerNorm
            with weights and biases.
        use_swiglu: use a `SwiGLU` in the place of the MLP, with an inner size of two thirds of the MLP's.
        use_rope: rotate the queries and the keys, see `RotaryEmbedding`.
        use_rmsnorm: use `RMSNorm` in the place of LayerNorm.
        wo_shift: modulate the blocks by scales and gates, without shifts.

    Raises:
        ValueError: if the sizes are not divisible as described.
    """

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        use_qknorm: bool = False,
        use_swiglu: bool = False,
        use_rope: bool = False,
        use_rmsnorm: bool = False,
        wo_shift: bool = False,
    ):
        super().__init__()
        check_sizes(input_size, patch_size, hidden_size, num_heads)
        self.config = dict(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            use_qknorm=use_qknorm,
            use_swiglu=use_swiglu,
            use_rope=use_rope,
            use_rmsnorm=use_rmsnorm,
            wo_shift=wo_shift,
        )
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        side = input_size // patch_size

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A parameter rather than a buffer, as in the published checkpoints.
        self.pos_embed = nn.Parameter(torch.empty(1, side**2, hidden_size), requires_grad=False)  # [1, L, D]
        self.feat_rope = RotaryEmbedding(hidden_size // num_heads, side) if use_rope else None
        options = dict(use_qknorm=use_qknorm, use_swiglu=use_swiglu, use_rmsnorm=use_rmsnorm, wo_shift=wo_shift)
        self.blocks = nn.ModuleList(
            [LightningDiTBlock(hidden_size, num_heads, mlp_ratio, **options) for _ in range(depth)]
        )
        self.final_layer = LightningFinalLayer(hidden_size, patch_size, self.out_channels, use_rmsnorm)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the initialization of a DiT, see `dit.initialize`."""
        self.pos_embed.copy_(sincos_positions(self.config["hidden_size"], math.isqrt(self.pos_embed.shape[1])))
        initialize(self, self.x_embedder)

    num_classes = DiT.num_classes
    unpatchify = DiT.unpatchify
    forward_with_cfg = classifier_free_guidance

    def forward(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Predict the velocity, or what else the model was trained for.

        Args:
            x: noisy images or latents [B, C, H, W].
            t: times [B]. Those of the published weights are from 0 (noise) to 1 (data).
            y: class labels [B].
            label_drop: see `DiT.forward`.

        Returns:
            Output [B, C or 2C, H, W]. Flows do not use the second half of 2C channels.
        """
        x = self.x_embedder(x) + self.pos_embed  # [B, L, D] with L = H * W / P^2
        c = (self.t_embedder(t) + self.y_embedder(y, label_drop)).unsqueeze(1)  # [B, 1, D]
        for block in self.blocks:
            x = block(x, c, self.feat_rope)  # [B, L, D]
        x = self.final_layer(x, c)  # [B, L, P * P * out_channels]
        return self.unpatchify(x)  # [B, out_channels, H, W]


def block_flops(config: dict, hidden_size: int, tokens: int) -> tuple[int, int]:
    """Count the multiplications of one `LightningDiTBlock`.

    Args:
        config: keyword arguments of a backbone with these blocks.
        hidden_size: its width D.
        tokens: number of tokens L.

    Returns:
        The number for all tokens of an image without the modulation, and that of the modulation of one condition.
    """
    inner = int(hidden_size * config["mlp_ratio"])
    mlp = 3 * hidden_size * swiglu_size(inner) if config["use_swiglu"] else 2 * hidden_size * inner
    products = tokens * (4 * hidden_size**2 + mlp) + 2 * tokens**2 * hidden_size
    return products, (4 if config["wo_shift"] else 6) * hidden_size**2


def lightningdit_flops(config: dict) -> int:
    """Count the FLOPs of one forward pass of a `LightningDiT`, per image. See `Backbone.count_flops`."""
    width, patch = config["hidden_size"], config["patch_size"] ** 2
    tokens = config["input_size"] ** 2 // patch
    channels = config["in_channels"] * (2 + config["learn_sigma"])  # of input and output
    block = sum(block_flops(config, width, tokens))
    # The embedding of the time from sinusoids, and the modulation of the final layer.
    per_image = SINUSOIDS * width + width**2 + 2 * width**2
    return 2 * (config["depth"] * block + tokens * width * patch * channels + per_image)


# Sizes of LightningDiT that DiT does not have, and S and T of DiT.
LIGHTNINGDIT_SIZES = {
    "1p6B": dict(depth=28, hidden_size=1792, num_heads=28),
    "1p0B": dict(depth=24, hidden_size=1536, num_heads=24),
    **DIT_SIZES,
}
# The options of the published weights.
PUBLISHED_OPTIONS = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
LIGHTNINGDIT = Backbone(
    name="LightningDiT",
    module=LightningDiT,
    sizes={
        f"{size}/{p}": dict(**shape, patch_size=p, **PUBLISHED_OPTIONS)
        for size, shape in LIGHTNINGDIT_SIZES.items()
        for p in (1, 2)
    },
    mixed_layers=(
        "blocks.*.attn.qkv",
        "blocks.*.attn.proj",
        "blocks.*.mlp.w12",
        "blocks.*.mlp.w3",
        "blocks.*.mlp.fc1",
        "blocks.*.mlp.fc2",
    ),
    modulation=("blocks.*.adaLN_modulation.1",),
    file_options=("mlp_ratio", "use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift"),
    before_compile=choose_attention,
    latents=(32, 16),
    # Those of the weights of 800 epochs: 250 times from noise to data, shifted by 0.3 in t.
    sampling={
        "flow": dict(
            num_sampling_steps="249",
            time_shift=1 / 0.3,
            cfg_scale=6.7,
            guided_channels=3,
            guidance_interval=[0, 0.875],
            closed_interval=True,
        )
    },
    flops=lightningdit_flops,
)
LightningDiT_models = LIGHTNINGDIT.models()
