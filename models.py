"""The diffusion transformer (DiT, Peebles & Xie, arXiv 2212.09748), with timm's parts inside.

Parameter names and shapes are facebookresearch/DiT's, so its checkpoints load unchanged.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.layers.attention import Attention
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, D] scaled and shifted by one vector a sample, shift and scale [B, D] (adaLN)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Timesteps [B] -> [B, D]: sinusoids of 256 frequencies (DDPM, section B), then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies[None]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, D]. With label dropout the table has one more row: the null class, numbered `num_classes`."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        if label_drop is None and self.training and self.dropout_prob > 0:
            label_drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if label_drop is not None:
            y = y.masked_fill(label_drop, self.num_classes)
        return self.embedding_table(y)


class TanhGELU(nn.Module):
    """GELU by its tanh approximation (arXiv 1606.08415): with z = sqrt(2 / pi) (x + 0.044715 x^3), x (1 + tanh z) / 2."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        y = x.float()  # (1 + tanh z) / 2 = sigmoid(2 z), which compiles to a fraction of a tanh's instructions
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * y * (1 + 0.044715 * y * y))).to(x.dtype)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning: tokens x [B, L, D], condition c [B, D] -> [B, L, D]."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=TanhGELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens [B, L, D] -> patches [B, L, patch * patch * channels]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """A class-conditional diffusion transformer.

    Sizes are in latent pixels: `input_size` is the side of the (square) input, which `patch_size` must divide.
    `learn_sigma` doubles the output channels: the noise, then the variance's interpolation value (Improved DDPM, eq. 15).
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide the input size {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden size {hidden_size} must be divisible by 4 and by the {num_heads} heads")
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
        )
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)  # a parameter in DiT's files
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the published initialisation: Xavier for linears, 0.02 for embeddings, zero for modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # the patch convolution is a linear layer too
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        for linear in (
            *(b.adaLN_modulation[1] for b in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(linear.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches [B, L, patch * patch * channels] -> images [B, channels, H, W]."""
        side, patch = math.isqrt(x.shape[1]), self.patch_size
        x = x.view(x.shape[0], side, side, patch, patch, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, side * patch, side * patch)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Predict the noise (and the variance) in x.

        x [B, C, H, W] noisy images or latents, t [B] original timesteps, y [B] class labels (`num_classes` is the null
        class); drop [B] bool says which labels become the null class: by default drawn at `class_dropout_prob` in
        training mode, none otherwise. Returns [B, C or 2C, H, W].
        """
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, label_drop)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3) -> Tensor:
        """See `guide`."""
        return classifier_free_guidance(self, x, t, y, cfg_scale, guided_channels)


def classifier_free_guidance(
    model: nn.Module, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3
) -> Tensor:
    """Classifier-free guidance as DiT applies it (Ho & Salimans, arXiv 2207.12598, eq. 6).

    The batch is two halves: y's first half holds the labels, its second half the null class; x's second half is ignored
    in favour of its first. Only the first `guided_channels` channels of the noise are guided (DiT's published choice
    is three of the four latent channels); the rest of the output is left as each half predicted it.
    """
    x = x[: len(x) // 2]
    out = model(torch.cat([x, x]), t, y)
    guided = min(guided_channels, x.shape[1])
    noise, rest = out[:, :guided], out[:, guided:]
    conditional, unconditional = noise.chunk(2)
    noise = unconditional + cfg_scale * (conditional - unconditional)
    return torch.cat([torch.cat([noise, noise]), rest], dim=1)


def sincos_positions(dim: int, side: int) -> Tensor:
    """Fixed 2D sine-cosine position embedding [side * side, dim]: half of the channels for x, half for y."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    along_x = line.repeat(side, 1)
    along_y = line.repeat_interleave(side, dim=0)
    return torch.cat([along_x, along_y], dim=1).float()


SIZES = {
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "T": dict(depth=3, hidden_size=48, num_heads=3),  # tiny: trains on a laptop
}
DiT_models = {
    f"DiT-{size}/{patch}": partial(DiT, **shape, patch_size=patch)
    for size, shape in SIZES.items()
    for patch in (2, 4, 8)
}
