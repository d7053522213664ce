"""A small backbone that is no DiT, and the record that makes the project accept it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Backbone


class ToyAttention(nn.Module):
    """Attention of one head."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.transpose(1, 2) / x.shape[-1] ** 0.5).softmax(-1) @ v)


class ToySwiGLU(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.w12 = nn.Linear(width, 4 * width)
        self.w3 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class ToyBlock(nn.Module):
    """A block that is conditioned by a scale of its input."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = ToyAttention(width)
        self.mlp = ToySwiGLU(width)
        self.modulation = nn.Linear(width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x * (1 + self.modulation(c)[:, None])
        x = x + self.attn(x)
        return x + self.mlp(x)


class Toy(nn.Module):
    """Every pixel is a token. The output has C channels."""

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        num_classes: int,
        width: int,
        depth: int,
        class_dropout_prob: float = 0.1,
    ):
        super().__init__()
        self.config = dict(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            width=width,
            depth=depth,
            class_dropout_prob=class_dropout_prob,
        )
        self.embed = nn.Linear(in_channels, width)
        self.positions = nn.Parameter(0.02 * torch.randn(input_size**2, width))
        self.time = nn.Linear(1, width)
        self.classes = nn.Embedding(num_classes + 1, width)
        self.layers = nn.ModuleList([ToyBlock(width) for _ in range(depth)])
        self.out = nn.Linear(width, in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        null = self.classes.num_embeddings - 1
        if label_drop is None and self.training:
            label_drop = torch.rand(y.shape, device=y.device) < self.config["class_dropout_prob"]
        if label_drop is not None:
            y = y.masked_fill(label_drop, null)
        c = self.time(t[:, None].float() / 1000) + self.classes(y)
        tokens = self.embed(x.flatten(2).transpose(1, 2)) + self.positions
        for layer in self.layers:
            tokens = layer(tokens, c)
        return self.out(tokens).transpose(1, 2).reshape(x.shape)


TOY = Backbone(
    name="Toy",
    module=Toy,
    sizes={"S": dict(width=16, depth=2), "M": dict(width=24, depth=3)},
    mixed_layers=("layers.*.attn.qkv", "layers.*.attn.proj", "layers.*.mlp.w12", "layers.*.mlp.w3"),
    modulation=("layers.*.modulation",),
    blocks="layers",
    class_embedding="classes",
)
