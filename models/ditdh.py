"""DiT^DH (Zheng et al., arXiv 2510.11690): a deep transformer conditions a shallow and wide one, the head, per token.

Parameter names and shapes are those of bytetriper/RAE, whose time and velocity have the opposite direction; interop/
changes the weights of its files accordingly. Shapes in comments: B samples, L tokens, D and E the widths of encoder and
head, C channels, P patch size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .dit import (
    DiT,
    LabelEmbedder,
    PatchEmbed,
    check_sizes,
    choose_attention,
    classifier_free_guidance,
    initialize,
    sincos_positions,
)
from .lightningdit import (
    LIGHTNINGDIT,
    LightningDiTBlock,
    LightningFinalLayer,
    RotaryEmbedding,
    block_flops,
)

# Number of the random frequencies of the time embedding.
FREQUENCIES = 256


class FourierEmbedder(nn.Module):
    """Embed times: sines and cosines of random frequencies (Tancik et al., arXiv 2006.10739), and a two-layer MLP.

    Args:
        hidden_size: size D of the embedding.
        frequencies: number of frequencies.

    Attributes:
        W: frequencies, in periods per unit of time. They are not trained.
    """

    def __init__(self, hidden_size: int, frequencies: int = FREQUENCIES):
        super().__init__()
        # A parameter rather than a buffer, so that it is initialized and stored like the others.
        self.W = nn.Parameter(torch.empty(frequencies), requires_grad=False)
        nn.init.normal_(self.W)
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed the times t [B] -> [B, D]."""
        angles = 2 * math.pi * t[:, None].float() * self.W  # [B, frequencies]
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [B, 2 * frequencies]
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))  # [B, D]


class DiTDH(nn.Module):
    """A class-conditional DiT with a head.

    Lists have two values, one for the encoder and one for the head.

    Args:
        input_size, patch_size, in_channels, mlp_ratio, class_dropout_prob, num_classes: see `DiT`.
        hidden_size: widths [D, E].
        depth: numbers of blocks. The list `blocks` holds those of the encoder, then those of the head.
        num_heads: numbers of attention heads.
        use_qknorm, use_swiglu, use_rope, use_rmsnorm, wo_shift: see `LightningDiT`.
        use_pos_embed: add position embeddings to the tokens of the encoder.

    Raises:
        ValueError: if a list has not two values, or the sizes are not divisible as `LightningDiT` needs them.
    """

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 768,
        hidden_size: list[int] = (1152, 2048),
        depth: list[int] = (28, 2),
        num_heads: list[int] = (16, 16),
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_pos_embed: bool = True,
    ):
        super().__init__()
        for name, values in (("hidden_size", hidden_size), ("depth", depth), ("num_heads", num_heads)):
            if not isinstance(values, list | tuple) or len(values) != 2:
                raise ValueError(f"{name} must have two values, for the encoder and the head, but it is {values}")
        if min(depth) < 1:
            raise ValueError(f"depth must be at least 1 in each part, but it is {depth}")
        for width, heads in zip(hidden_size, num_heads, strict=True):
            check_sizes(input_size, patch_size, width, heads)
        self.config = dict(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=[*hidden_size],
            depth=[*depth],
            num_heads=[*num_heads],
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            use_qknorm=use_qknorm,
            use_swiglu=use_swiglu,
            use_rope=use_rope,
            use_rmsnorm=use_rmsnorm,
            wo_shift=wo_shift,
            use_pos_embed=use_pos_embed,
        )
        self.patch_size = patch_size
        self.in_channels = self.out_channels = in_channels
        side, (width, head_width) = input_size // patch_size, hidden_size

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, head_width)
        self.s_embedder = PatchEmbed(input_size, patch_size, in_channels, width)
        self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.t_embedder = FourierEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, class_dropout_prob)
        positions = nn.Parameter(torch.empty(1, side**2, width), requires_grad=False)  # [1, L, D]
        self.register_parameter("pos_embed", positions if use_pos_embed else None)
        rotary = [
            RotaryEmbedding(w // n, side) if use_rope else None for w, n in zip(hidden_size, num_heads, strict=True)
        ]
        self.enc_feat_rope, self.dec_feat_rope = rotary
        options = dict(use_qknorm=use_qknorm, use_swiglu=use_swiglu, use_rmsnorm=use_rmsnorm, wo_shift=wo_shift)
        self.blocks = nn.ModuleList(
            [
                LightningDiTBlock(w, heads, mlp_ratio, **options)
                for w, n, heads in zip(hidden_size, depth, num_heads, strict=True)
                for _ in range(n)
            ]
        )
        self.final_layer = LightningFinalLayer(head_width, patch_size, in_channels, use_rmsnorm)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the initialization of a DiT, see `dit.initialize`. The frequencies of the times stay as they are."""
        if self.pos_embed is not None:
            self.pos_embed.copy_(sincos_positions(self.config["hidden_size"][0], math.isqrt(self.pos_embed.shape[1])))
        initialize(self, self.x_embedder, self.s_embedder)

    num_classes = DiT.num_classes
    unpatchify = DiT.unpatchify
    forward_with_cfg = classifier_free_guidance

    def forward(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Predict the velocity, or what else the model was trained for.

        Args:
            x: noisy images or latents [B, C, H, W].
            t: times [B], from 0 (noise) to 1 (data) for weights that were read from a file of RAE.
            y: class labels [B].
            label_drop: see `DiT.forward`.

        Returns:
            Output [B, C, H, W].
        """
        depth = self.config["depth"][0]
        t = self.t_embedder(t)  # [B, D]
        c = F.silu(t + self.y_embedder(y, label_drop)).unsqueeze(1)  # [B, 1, D]
        s = self.s_embedder(x)  # [B, L, D] with L = H * W / P^2
        if self.pos_embed is not None:
            s = s + self.pos_embed
        for block in self.blocks[:depth]:
            s = block(s, c, self.enc_feat_rope)  # [B, L, D]
        # The condition of the head, one vector per token.
        s = self.s_projector(F.silu(t.unsqueeze(1) + s))  # [B, L, E]
        x = self.x_embedder(x)  # [B, L, E]
        for block in self.blocks[depth:]:
            x = block(x, s, self.dec_feat_rope)  # [B, L, E]
        return self.unpatchify(self.final_layer(x, s))  # [B, C, H, W]


def ditdh_flops(config: dict) -> int:
    """Count the FLOPs of one forward pass of a `DiTDH`, per image. See `Backbone.count_flops`."""
    (width, head_width), patch = config["hidden_size"], config["patch_size"] ** 2
    tokens = config["input_size"] ** 2 // patch
    (encoder, per_image), (head, per_token) = (block_flops(config, w, tokens) for w in (width, head_width))
    depth, head_depth = config["depth"]
    products = depth * (encoder + per_image) + head_depth * (head + tokens * per_token)
    # The embedding of the times, the patches of both parts, the projector, and the final layer with its modulation.
    products += 2 * FREQUENCIES * width + width**2
    projector = width * head_width if width != head_width else 0
    ends = config["in_channels"] * patch * (width + 2 * head_width)
    products += tokens * (ends + projector + 2 * head_width**2)
    return 2 * products


DITDH_SIZES = {
    "XL": dict(hidden_size=[1152, 2048], depth=[28, 2], num_heads=[16, 16]),
    "S": dict(hidden_size=[384, 2048], depth=[12, 2], num_heads=[6, 16]),
    "T": dict(hidden_size=[48, 64], depth=[2, 1], num_heads=[3, 2]),  # tiny, trains on a laptop
}
DITDH = Backbone(
    name="DiTDH",
    module=DiTDH,
    sizes={f"{size}/1": dict(**shape, patch_size=1) for size, shape in DITDH_SIZES.items()},
    mixed_layers=LIGHTNINGDIT.mixed_layers,
    modulation=LIGHTNINGDIT.modulation,
    file_options=(*LIGHTNINGDIT.file_options, "use_pos_embed"),
    before_compile=choose_attention,
    latents=(768, 16),
    # 50 times, the last of which is not data. The shift is that of the training.
    sampling={
        "flow": dict(
            num_sampling_steps="49",
            last_level=0.001,
            cfg_scale=1.42,
            guided_channels="all",
            closed_interval=True,
        )
    },
    flops=ditdh_flops,
)
DiTDH_models = DITDH.models()
