"""What a training run will take, before it takes anything: sizes, memory and time, from shapes alone."""

import time

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
from distributed import PRECISIONS
from models import DiT

PEAK = 312e12  # FLOP/s of an A100, bf16 products
USED = 0.3  # of it: an assumption; wide models reach more, narrow ones less


class AssumedFeatures:
    """Stands in for features that are not made yet: ImageNet's training set, through the published VAE."""

    def __init__(self, image_size: int = 256):
        if image_size % 8:
            raise UserError(f"--image-size {image_size} is not a multiple of the VAE's 8")
        self.image_size, self.shape, self.views = image_size, (4, image_size // 8, image_size // 8), 2
        self.labels, self.classes = torch.tensor([0, 999]), None
        self.vae, self.scale, self.store = None, None, "draw"

    def __len__(self) -> int:
        return 1_281_167


def static_memory(model: nn.Module) -> dict[str, int]:
    """Bytes that a GPU holds all along, by what for, in float32."""
    size = 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"weights": size, "gradients": trained, "their average": size, "AdamW's moments": 2 * trained}


def activation_bytes(model: nn.Module, diffusion, n_images: int, groups: int | None, precision: torch.dtype) -> int:
    """Bytes that autograd keeps of the forward pass of `n_images` images, counted without computing.

    model is on the meta device, and is spoilt; torch.compile keeps less. groups: as `RemixDiT.forward`'s.
    """
    config = getattr(model, "backbone_config", None) or model.config
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):  # as if on a CPU, which unlike "meta" knows autocast
        model = model.to_empty(device="cpu")
        x = torch.empty(n_images, config["in_channels"], config["input_size"], config["input_size"])
        t = torch.empty(n_images, dtype=torch.long)
        conditions = {"y": t, "label_drop": t > 0} | ({"groups": groups} if groups else {})
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=precision != torch.float32),
        ):
            graph = diffusion.training_losses(model, x, t, conditions, x)  # while it lives, no two storages share an id
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        del graph
    return sum(kept.values())


def training_flops(config: dict) -> int:
    """FLOPs of a training step of a DiT(**config), per image: those of the matrix products, forward and twice that backward.

    A RemixDiT's are counted as its backbone's: mixing is not what it is for.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        dit = DiT(**config).eval()
        x = torch.empty(1, dit.in_channels, config["input_size"], config["input_size"])
        dit(x, torch.empty(1), torch.empty(1, dtype=torch.long))
    return 3 * counter.get_total_flops()


def matmul_rate(device: torch.device, precision: str, times: int = 3) -> float:
    """FLOP/s of a large matrix product in "fp32" (TF32 where that is on), "fp64", "bf16" or "fp16": the best of `times`."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(torch.float64 if precision == "fp64" else PRECISIONS[precision])
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
