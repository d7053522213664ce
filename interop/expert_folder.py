"""All experts of a Remix as files of the wrapped class, in one folder with an index.

The index, `experts.json`, has these entries:

    class       name of the wrapped class
    timestep    the argument of the class that selects the expert; null for a function of the arguments
    boundaries  the N + 1 noise levels: expert i denoises boundaries[i] <= level < boundaries[i + 1]
    reverses    true, if the argument is the last boundary minus the noise level, as that of Lumina 2 and Z-Image
    exact       true, if rounded levels are compared with the boundaries as they are; only for a pair of Wan
    format      "diffusers" (folders that `from_pretrained` of the class reads), "state dict" or "lora" (safetensors)
    experts     the N folders or files, expert 0 first
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from diffusion.intervals import DIRECT, EITHER, REVERSED, find_interval, level_dtype
from mixing import fsdp
from remix import Remix
from runtime.errors import UserError
from runtime.files import atomic_write, write_json

INDEX = "experts.json"
# The parameters that a LoRA file represents: the low-rank bases and the coefficients.
IN_LORA = ("lora_A", "lora_B", "logits")


def write_experts(remix: Remix, folder, lora: bool = False):
    """Write all experts of a Remix and the index.

    Args:
        remix: the Remix. A model of diffusers is written with `save_pretrained`, another one as a safetensors file of
            its state dict. If it is sharded (`mixing.fsdp`), every process calls this, and rank 0 writes.
        folder: the folder to create.
        lora: write low-rank bases as LoRA files of rank K * r in diffusers' (peft) format, which the
            `load_lora_weights` of pipelines reads. All parameters outside the low-rank bases must be frozen: the files
            do not hold them.

    Raises:
        UserError: if LoRA files cannot represent the experts.
    """
    if lora:
        _check_lora(remix)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    diffusers = not lora and hasattr(remix.backbone, "save_pretrained")
    names = [f"expert{i}" if diffusers else f"expert{i}.safetensors" for i in range(remix.n_experts)]
    sharded = fsdp.is_sharded(remix)
    if sharded:
        fsdp.reshard(remix)
    for i, name in enumerate(names):
        expert = None if lora else remix.expert(i)
        state = lora_state(remix, i) if lora else None
        if sharded and dist.get_rank() > 0:
            continue
        if diffusers:
            expert.save_pretrained(folder / name)
            continue
        state = state or expert.state_dict()
        with atomic_write(folder / name) as temporary:
            # Tensors in one storage, such as those of tied layers, are refused.
            save_file({key: value.clone() for key, value in state.items()}, temporary, metadata={"format": "pt"})
    timestep = remix.arguments.timestep
    index = {
        "class": remix.arguments.owner,
        "timestep": timestep if isinstance(timestep, str) else None,
        "boundaries": remix.boundaries,
        "format": "lora" if lora else "diffusers" if diffusers else "state dict",
        "experts": names,
    }
    if remix.arguments.reverses:
        index["reverses"] = True
    if remix.intervals.exact:
        index["exact"] = True
    if not sharded or dist.get_rank() == 0:
        write_json(folder / INDEX, index)
    if sharded:
        dist.barrier()


def find_expert(folder, level: float | torch.Tensor) -> str:
    """Return the name of the file or folder in `folder` of the expert for what the argument of the class holds.

    A step on a boundary belongs to the expert above, also if its level is rounded below the boundary: an integer is
    exact, and a tensor is rounded as its type says. Another number is a float32 level.

    Raises:
        ValueError: if the level is outside the boundaries.
    """
    index = json.loads((Path(folder) / INDEX).read_text())
    dtype = torch.long if index.get("exact") else None
    directions = EITHER if index["timestep"] is None else DIRECT
    if index.get("reverses"):
        dtype, directions = dtype or level_dtype(level), REVERSED
        level = index["boundaries"][-1] - np.float32(float(level))
    return index["experts"][find_interval(index["boundaries"], level, dtype, directions)]


@torch.no_grad()
def lora_state(remix: Remix, i: int) -> dict[str, torch.Tensor]:
    """Return expert i as LoRA weights in diffusers' format, each A [K * r, in] and B [out, K * r]."""
    alpha = remix.coefficients.per_expert()[i]
    state = {}
    for name, layer in remix.mixed():
        with fsdp.gathered(layer):
            a, b = layer.lora_pair(alpha[layer.row])
        state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return state


def _check_lora(remix: Remix):
    name = remix.arguments.owner
    if remix.rank is None or remix.rest == "separate":
        kind = "whole layers as bases" if remix.rank is None else 'the setting rest="separate"'
        raise UserError(f"LoRA files need low-rank bases and a shared rest, but this Remix has {kind}")
    if not hasattr(remix.backbone, "load_lora_adapter"):
        raise UserError(f"the pipelines of a {name} have no load_lora_weights; write whole experts with lora=False")
    names = [key for key, p in remix.named_parameters() if p.requires_grad and key.split(".")[-1] not in IN_LORA]
    if names:
        raise UserError(
            f"LoRA files need all parameters outside the low-rank bases frozen (Remix.freeze_shared), but {len(names)} "
            f"are not, such as {names[0]}"
        )
