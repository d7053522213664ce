"""All experts of a Remix as files of the wrapped class, in one folder with an index.

The index, `experts.json`, has these entries:

    class       name of the wrapped class
    timestep    the argument of the class that selects the expert; null for a function of the arguments
    boundaries  the N + 1 noise levels: expert i denoises boundaries[i] <= level < boundaries[i + 1]
    reverses    true, if the argument is the last boundary minus the noise level, as that of Lumina 2 and Z-Image
    stages      the noise levels from one stage's module to the next, if there are several; levels of all types are
                compared with them as they are. Earlier versions wrote `exact`, if this applies to all boundaries
    format      "diffusers" (folders that `from_pretrained` of the class reads), "state dict" or "lora" (safetensors)
    experts     the N folders or files, expert 0 first
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from diffusion.intervals import DIRECT, EITHER, REVERSED, find_interval, level_dtype
from interop.lora import check_lora, mixture_pairs, save_lora, stage_names
from mixing import fsdp
from remix import Remix
from runtime.files import atomic_write, write_json

INDEX = "experts.json"


def write_experts(remix: Remix, folder, lora: bool | str = False, dtype: torch.dtype = torch.bfloat16):
    """Write all experts of a Remix and the index.

    Args:
        remix: the Remix. A model of diffusers is written with `save_pretrained`, another one as a safetensors file of
            its state dict. If it is sharded (`mixing.fsdp`), every process calls this, and rank 0 writes.
        folder: the folder to create.
        lora: write low-rank bases as LoRA files of rank K * r in this format, one of `interop.lora.FORMATS`. True is
            "diffusers", which the `load_lora_weights` of pipelines reads. All parameters outside the low-rank bases
            must be frozen: the files do not hold them.
        dtype: dtype of the pairs in LoRA files. Whole experts keep their dtypes.

    Raises:
        UserError: if LoRA files in this format and dtype cannot represent the experts.
    """
    lora = "diffusers" if lora is True else lora
    if lora:
        check_lora(remix, lora, dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    diffusers = not lora and hasattr(remix.backbone, "save_pretrained")
    names = [f"expert{i}" if diffusers else f"expert{i}.safetensors" for i in range(remix.n_experts)]
    alpha = remix.coefficients.per_expert() if lora else None
    for i, name in enumerate(names):
        if lora:
            pairs = mixture_pairs(remix, alpha[i])
            facts = dict(stage=stage_names(remix)[remix.stages.of(i)], boundaries=remix.boundaries[i : i + 2])
            save_lora(remix, pairs, folder / name, lora, dtype, **facts)
            continue
        # Of a sharded Remix, only rank 0 gets a module.
        if (expert := remix.expert(i)) is None:
            continue
        if diffusers:
            expert.save_pretrained(folder / name)
            continue
        with atomic_write(folder / name) as temporary:
            # Tensors in one storage, such as those of tied layers, are refused.
            state = {key: value.clone() for key, value in expert.state_dict().items()}
            save_file(state, temporary, metadata={"format": "pt"})
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
    if len(remix.stages) > 1:
        index["stages"] = remix.stages.boundaries
    with fsdp.written_once(remix) as writes:
        if writes:
            write_json(folder / INDEX, index)


def find_expert(folder, level: float | torch.Tensor) -> str:
    """Return the name of the file or folder in `folder` of the expert for what the argument of the class holds.

    A step on a boundary belongs to the expert above, also if its level is rounded below the boundary: an integer is
    exact, and a tensor is rounded as its type says. Another number is a float32 level.

    Raises:
        ValueError: if the level is outside the boundaries.
    """
    index = json.loads((Path(folder) / INDEX).read_text())
    boundaries, dtype = index["boundaries"], level_dtype(level)
    directions = EITHER if index["timestep"] is None else DIRECT
    if index.get("reverses"):
        directions = REVERSED
        level = boundaries[-1] - np.float32(float(level))
    unrounded = boundaries if index.get("exact") else index.get("stages", ())
    return index["experts"][find_interval(boundaries, level, dtype, directions, unrounded)]
