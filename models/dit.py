"""The diffusion transformer (DiT, Peebles & Xie, arXiv 2212.09748), and the parts that other backbones share with it.

Parameter names and shapes are those of facebookresearch/DiT, so its checkpoints load unchanged. Patch embedding,
attention and MLP compute what timm's do, but importing timm takes longer than importing PyTorch. Shapes in comments:
B samples, L tokens, D hidden size, C channels, P patch size, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift the tokens x [B, L, D] by one vector per sample, shift and scale [B, D] (adaLN)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


# Number of sinusoids of the time embedding.
SINUSOIDS = 256


class TimestepEmbedder(nn.Module):
    """Embed timesteps: sinusoids (DDPM, arXiv 2006.11239, appendix B) followed by a two-layer MLP.

    Args:
        hidden_size: size D of the embedding.
        frequencies: number of sinusoids, half of them cosines.
        shift: see `sinusoid_frequencies`.
    """

    def __init__(self, hidden_size: int, frequencies: int = SINUSOIDS, shift: int = 0):
        super().__init__()
        self.shift = shift
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        """Embed the timesteps t [B] -> [B, D]."""
        frequencies = sinusoid_frequencies(self.frequencies, t.device, self.shift)
        angles = t[:, None].float() * frequencies  # [B, frequencies / 2]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, frequencies]
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))  # [B, D]


# Choices of --timestep-frequencies, and the `frequency_shift` of a DiT that they stand for.
TIMESTEP_FREQUENCIES = {"published": 0, "diffusers": 1}


def sinusoid_frequencies(n: int, device=None, shift: int = 0) -> Tensor:
    """Return the frequencies 10000^(-i / (n / 2 - shift)) of n sinusoids, the first half of which are cosines, [n / 2].

    `shift` is 0 in the published DiT, and 1 in diffusers' class.
    """
    half = n // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / (half - shift))


class LabelEmbedder(nn.Module):
    """Embed class labels, some of which are replaced by the null class during training (label dropout).

    Args:
        num_classes: number of classes. The null class has this index.
        hidden_size: size D of the embedding.
        dropout_prob: probability of replacing a label. With 0 there is no null class.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.dropout_prob = dropout_prob

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class."""
        return self.embedding_table.num_embeddings - (self.dropout_prob > 0)

    def forward(self, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Embed the labels y [B] -> [B, D]. See `DiT.forward` for `label_drop` [B]."""
        if label_drop is None and self.training and self.dropout_prob > 0:
            label_drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if label_drop is not None:
            y = y.masked_fill(label_drop, self.num_classes)
        return self.embedding_table(y)


class TanhGELU(nn.Module):
    """The tanh approximation of GELU (arXiv 1606.08415): x (1 + tanh z) / 2, z = sqrt(2 / pi) (x + 0.044715 x^3)."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        # (1 + tanh z) / 2 = sigmoid(2 z), which compiles to far fewer instructions than tanh.
        y = x.float()
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * y * (1 + 0.044715 * y * y))).to(x.dtype)


class PatchEmbed(nn.Module):
    """Embed the patches of an image by a convolution whose stride is its kernel size.

    Args:
        input_size: height and width of the input.
        patch_size: side P of a patch.
        in_channels: number of input channels C.
        hidden_size: size D of the tokens.
    """

    def __init__(self, input_size: int, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.input_size = input_size
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the images x [B, C, height, width] -> [B, L, D].

        Raises:
            ValueError: if they have another size.
        """
        height, width = x.shape[2:]
        if height != self.input_size or width != self.input_size:
            raise ValueError(f"the model takes a height and width of {self.input_size}, not {height} and {width}")
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, D, height / P, width / P] -> [B, L, D]


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        hidden_size: size D of the tokens.
        num_heads: number H of heads.

    Attributes:
        fused_attn: use PyTorch's fused kernel, rather than two matrix products with a softmax between them.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the tokens x [B, L, D] -> [B, L, D]."""
        return self.attend(*self.project(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, the keys and the values of the tokens x [B, L, D], [B, H, L, D / H] each."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, L, 3, H, D / H]
        return qkv.permute(2, 0, 3, 1, 4).unbind()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output [B, L, D] for queries, keys and values [B, H, L, D / H]."""
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with `TanhGELU` between them.

    Args:
        hidden_size: size D of the tokens.
        inner_size: size between the layers.
    """

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.act = TanhGELU()
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the tokens x [B, L, D] -> [B, L, D]."""
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning.

    Args:
        hidden_size: size D of the tokens.
        num_heads: number of attention heads.
        mlp_ratio: hidden size of the MLP divided by D.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Transform the tokens x [B, L, D] under the condition c [B, D] -> [B, L, D]."""
        modulation = self.adaLN_modulation(c)  # [B, 6D]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # [B, D] each
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # [B, L, D]
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # [B, L, D]


class FinalLayer(nn.Module):
    """Map tokens to the pixels of their patches.

    Args:
        hidden_size: size D of the tokens.
        patch_size: side P of a patch.
        out_channels: number of output channels.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map the tokens x [B, L, D] under the condition c [B, D] -> patches [B, L, P * P * out_channels]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # [B, D] each
        return self.linear(modulate(self.norm_final(x), shift, scale))


def default_guided_channels(channels: int) -> int:
    """Return how many channels are guided by default: three of four latent channels, as in DiT; otherwise all.

    With the 16 channels of other VAEs, three guided ones would leave most of the latent unguided.
    """
    return 3 if channels == 4 else channels


def classifier_free_guidance(
    model: nn.Module, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = None
) -> Tensor:
    """Run a model with classifier-free guidance as DiT applies it (Ho & Salimans, arXiv 2207.12598, eq. 6).

    Args:
        model: called as model(x, t, y).
        x: noisy images or latents [2B, C, H, W]. The second half is ignored and the first half used twice.
        t: timesteps [2B] of the original process.
        y: class labels [2B]. The first half holds the classes, the second half the null class.
        cfg_scale: guidance scale. 1 means no guidance.
        guided_channels: number of leading noise channels that are guided. None for `default_guided_channels`.

    Returns:
        Output [2B, C or 2C, H, W]. The guided channels are the same in both halves, the others are the model's.
    """
    x = x[: len(x) // 2]  # [B, C, H, W]
    out = model(torch.cat([x, x]), t, y)  # [2B, C or 2C, H, W]
    guided = min(guided_channels or default_guided_channels(x.shape[1]), x.shape[1])
    noise, rest = out[:, :guided], out[:, guided:]
    conditional, unconditional = noise.chunk(2)  # [B, guided, H, W] each
    noise = unconditional + cfg_scale * (conditional - unconditional)
    return torch.cat([torch.cat([noise, noise]), rest], dim=1)


class DiT(nn.Module):
    """A class-conditional diffusion transformer.

    Args:
        input_size: height and width of the input, in pixels of the image or latent.
        patch_size: side P of a patch. It must divide `input_size`.
        in_channels: number of input channels C.
        hidden_size: size D of the tokens. It must be divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: hidden size of the MLPs divided by D.
        class_dropout_prob: probability of replacing a label by the null class in training mode.
        num_classes: number of classes. The null class has this index.
        learn_sigma: predict the variance too (Improved DDPM, arXiv 2102.09672, eq. 15). The output then has 2C
            channels: the noise, then the interpolation value of the variance.
        frequency_shift: see `TimestepEmbedder`.

    Raises:
        ValueError: if the sizes are not divisible as described.
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
        frequency_shift: int = 0,
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
            frequency_shift=frequency_shift,
        )
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.frequency_shift = frequency_shift
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, shift=frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A parameter rather than a buffer, as in the published checkpoints.
        positions = torch.empty(1, (input_size // patch_size) ** 2, hidden_size)  # [1, L, D]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the published initialization, see `initialize`."""
        self.pos_embed.copy_(sincos_positions(self.config["hidden_size"], math.isqrt(self.pos_embed.shape[1])))
        initialize(self, self.x_embedder)

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class."""
        return self.config["num_classes"]

    def unpatchify(self, x: Tensor) -> Tensor:
        """Arrange the patches x [B, L, P * P * out_channels] as images [B, out_channels, H, W]."""
        batch, side, patch = len(x), math.isqrt(x.shape[1]), self.patch_size
        x = x.view(batch, side, side, patch, patch, self.out_channels)  # [B, H/P, W/P, P, P, out_channels]
        x = x.permute(0, 5, 1, 3, 2, 4)  # [B, out_channels, H/P, P, W/P, P]
        return x.reshape(batch, self.out_channels, side * patch, side * patch)  # [B, out_channels, H, W]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Predict the noise, and with `learn_sigma` the variance.

        Args:
            x: noisy images or latents [B, C, H, W].
            t: timesteps [B] of the original process.
            y: class labels [B].
            label_drop: bool [B], the labels to replace by the null class. By default, they are drawn in training mode
                and there are none in eval mode.

        Returns:
            Output [B, C or 2C, H, W].
        """
        x = self.x_embedder(x) + self.pos_embed  # [B, L, D] with L = H * W / P^2
        c = self.t_embedder(t) + self.y_embedder(y, label_drop)  # [B, D]
        for block in self.blocks:
            x = block(x, c)  # [B, L, D]
        x = self.final_layer(x, c)  # [B, L, P * P * out_channels]
        return self.unpatchify(x)  # [B, out_channels, H, W]

    forward_with_cfg = classifier_free_guidance


def check_sizes(input_size: int, patch_size: int, hidden_size: int, num_heads: int):
    """Raise ValueError if the sizes of a backbone are not divisible as it needs them."""
    if input_size % patch_size:
        raise ValueError(f"patch_size must divide input_size, but they are {patch_size} and {input_size}")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size must be divisible by 4 and by num_heads={num_heads}, but it is {hidden_size}")


def initialize(model: nn.Module, *embedders: PatchEmbed):
    """Draw the published initialization of a DiT, or of a backbone with the same names.

    Args:
        model: its linear layers become Xavier uniform, its embeddings of classes and times normal with std 0.02, and
            its modulation and output layers zero.
        embedders: its patch embeddings.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for embedder in embedders:
        # The patch convolution is initialized as the linear layer that it is equal to.
        nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))
        nn.init.zeros_(embedder.proj.bias)
    for embedding in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(embedding.weight, std=0.02)
    for linear in (
        *(b.adaLN_modulation[1] for b in model.blocks),
        model.final_layer.adaLN_modulation[1],
        model.final_layer.linear,
    ):
        nn.init.zeros_(linear.weight)


def sincos_positions(dim: int, side: int) -> Tensor:
    """Return the fixed 2D sine-cosine position embedding [side * side, dim].

    Args:
        dim: number of channels. It must be divisible by 4. The first half encodes x, the second half y.
        side: number of positions along x and along y.

    Returns:
        The embedding, float32, on the CPU.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, dim / 2]
    along_x = line.repeat(side, 1)  # [side * side, dim / 2]
    along_y = line.repeat_interleave(side, dim=0)  # [side * side, dim / 2]
    return torch.cat([along_x, along_y], dim=1).float()


def choose_attention(model: nn.Module, device: torch.device):
    """Select the faster attention for a model that will be compiled.

    On CPUs, two matrix products with a compiled softmax between them are faster than PyTorch's fused attention kernel.

    Args:
        model: its `Attention` modules are changed in place.
        device: the device the model will run on. Nothing changes unless it is a CPU.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False


def dit_flops(config: dict) -> int:
    """Count the FLOPs of the matrix products of one forward pass of a `DiT`, per image. See `Backbone.count_flops`."""
    width, patch = config["hidden_size"], config["patch_size"] ** 2
    tokens = config["input_size"] ** 2 // patch
    channels, out_channels = config["in_channels"], config["in_channels"] * (1 + config["learn_sigma"])
    # Number of weights of the linear layers that are applied to each token: attention and MLP, patches and output.
    block = 4 * width**2 + 2 * width * int(width * config["mlp_ratio"])
    per_token = config["depth"] * block + width * patch * (channels + out_channels)
    # And to each image: the embedding of its timestep from sinusoids, and the modulation layers.
    per_image = SINUSOIDS * width + width**2 + (6 * config["depth"] + 2) * width**2
    # The two products of the attention, for each pair of tokens.
    pairs = config["depth"] * 2 * width
    return 2 * (tokens * per_token + per_image + tokens**2 * pairs)


DIT_SIZES = {
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "T": dict(depth=3, hidden_size=48, num_heads=3),  # tiny, trains on a laptop
}
DIT = Backbone(
    name="DiT",
    module=DiT,
    sizes={f"{size}/{p}": dict(**shape, patch_size=p) for size, shape in DIT_SIZES.items() for p in (2, 4, 8)},
    mixed_layers=("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2"),
    modulation=("blocks.*.adaLN_modulation.1",),
    file_options=("frequency_shift",),
    before_compile=choose_attention,
    flops=dit_flops,
)
DiT_models = DIT.models()
