"""Wan 2.2's pair of transformers in the layout of diffusers: read as a Remix with two experts, and written back.

Of the pair, `transformer` denoises the timesteps of at least 1000 * `boundary_ratio`, and `transformer_2` those below.
As a Remix it has K = N = 2 bases and experts, without mixing. Expert 0, which has the least noise, is `transformer_2`.
The Remix compares timesteps of all types with the boundary as they are, as WanPipeline does.
"""

import json
from pathlib import Path

import torch
from torch import nn

from remix import Remix
from runtime.errors import UserError
from runtime.files import write_json

INDEX = "model_index.json"


def read_pair(source, dtype: torch.dtype = torch.float32) -> Remix:
    """Read a pair of transformers as a Remix with the mixer "one-hot" and separate parameters.

    Args:
        source: the folder of a pipeline; or a loaded pipeline, whose transformer_2 becomes a part of the Remix. Use
            the Remix in the place of both.
        dtype: dtype of the parameters that are read from a folder.

    Raises:
        UserError: if the pipeline has no pair, or its transformers differ in their shapes or dtypes.
    """
    if isinstance(source, str | Path):
        high, low, ratio = _load(Path(source), dtype)
    else:
        high, low, ratio = source.transformer, source.transformer_2, source.config.boundary_ratio
    if high is None or low is None or ratio is None:
        raise UserError(
            "a pair needs transformer, transformer_2 and boundary_ratio, but "
            f"transformer is {type(high).__name__}, transformer_2 is {type(low).__name__}, boundary_ratio is {ratio}"
        )
    own = high.state_dict()
    if _layout(own) != _layout(low.state_dict()):
        raise UserError("the transformers of the pair differ in the names, shapes or dtypes of their parameters")

    remix = Remix(low, n_basis=2, boundaries=[0, 1000 * ratio, 1000], mixer="one-hot", rest="separate")
    remix.intervals.exact = True
    with torch.no_grad():
        for name, layer in remix.mixed():
            for kind, bases in (("weight", layer.weight), ("bias", layer.bias)):
                if f"{name}.{kind}" in own:
                    bases[1].copy_(own.pop(f"{name}.{kind}"))
    # What is left is not mixed.
    remix.copies[0].load_state_dict(own, strict=False)
    return remix


def write_pair(remix: Remix, folder):
    """Write the two experts of a Remix of a WanTransformer3DModel as a pair.

    Args:
        remix: the Remix, with any mixer.
        folder: folder of a pipeline, of which the pair is replaced; or a new folder, to which the other parts of a
            pipeline can be added. `WanPipeline.from_pretrained` takes them as arguments too.

    Raises:
        UserError: if the Remix has another number of experts, or is no Remix of a WanTransformer3DModel.
    """
    name = type(remix.backbone).__name__
    if name != "WanTransformer3DModel" or remix.n_experts != 2:
        raise UserError(
            f"a pair is written from 2 experts of a WanTransformer3DModel, not from {remix.n_experts} of a {name}"
        )
    folder = Path(folder)
    experts = {"transformer": 1, "transformer_2": 0}
    for part, i in experts.items():
        remix.expert(i).save_pretrained(folder / part)
    config = remix.backbone.config
    # The transformers of image-to-video also get the latents of the image.
    image = config.in_channels > config.out_channels
    index = {"_class_name": "WanImageToVideoPipeline" if image else "WanPipeline"}
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
    index |= {part: ["diffusers", name] for part in experts}
    write_json(folder / INDEX, index | {"boundary_ratio": remix.boundaries[1] / remix.boundaries[2]})


def _load(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, float | None]:
    """Return both transformers and the boundary of a pipeline's folder."""
    from diffusers import WanTransformer3DModel

    for part in (INDEX, "transformer", "transformer_2"):
        if not (folder / part).exists():
            raise UserError(f"{folder} holds no pair of transformers in diffusers' layout: there is no {folder / part}")
    pair = [
        WanTransformer3DModel.from_pretrained(folder / part, torch_dtype=dtype)
        for part in ("transformer", "transformer_2")
    ]
    return *pair, json.loads((folder / INDEX).read_text()).get("boundary_ratio")


def _layout(state: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
