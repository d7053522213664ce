"""Model file formats, of this project and of others, one module per format.

FORMATS lists the formats. The module of each has the two functions below. `checkpoint.load_model` calls the `read`
functions in turn until one of them recognizes the file. `convert.py` calls the `write` function of the format that the
user chooses.

    read(path, content, ema, overrides)

        Args:
            path: what the user gave: a file, or for diffusers a folder or a hub name.
            content: the loaded content of the file, a dict.
            ema: read the EMA weights if the file has them, otherwise the raw weights.
            overrides: the overrides of `checkpoint.load_model`, which `shapes.make_config` checks.

        Returns:
            The config (see own.py) and the state dict under this project's parameter names, or None if the
            content has another format.

        Raises:
            UserError: if the content has this format but is damaged, or contradicts the overrides.

    write(path, models, config)

        Args:
            path: the file or folder to create.
            models: "ema" maps to the model with the EMA weights, and "model" to the model with the raw weights. A
                format that holds one set of weights uses "ema".
            config: the config of the checkpoint that the models come from.

        Raises:
            UserError: if the format cannot represent the model.

To add a format, write a module with these two functions and add it to FORMATS.

wan.py and expert_folder.py are for experts of any transformer, which have no checkpoints of this project. Their
functions take and return a `remix.Remix`.
"""

from dataclasses import dataclass
from types import ModuleType

from interop import diffusers, dit, lightningdit, original, own, rae, sit


@dataclass(frozen=True)
class FileFormat:
    """A file format.

    Attributes:
        module: the module that reads and writes it.
        description: what it is, for the help of convert.py.
        raw_weights: whether its files hold the raw weights too, beside the EMA weights.
        experts: "one" if its files hold a plain model, such as one expert; "all" if an expert alone belongs in another
            format; "any" if they hold either.
        low_rank: whether its files can hold low-rank bases. Otherwise they are written as whole ones.
        backbones: names of the backbones that its files can hold; None for all.
    """

    module: ModuleType
    description: str
    raw_weights: bool = True
    experts: str = "one"
    low_rank: bool = False
    backbones: tuple[str, ...] | None = ("DiT",)


# By the names of --to, in the order in which they are read. Files of an original Remix-DiT, of LightningDiT and of SiT
# may have all the tensor names of a published DiT, and are tried before it.
FORMATS = {
    "diffusers": FileFormat(diffusers, "a folder for diffusers", raw_weights=False, experts="any"),
    "safetensors": FileFormat(
        own, "safetensors with the config", raw_weights=False, experts="any", low_rank=True, backbones=None
    ),
    "original": FileFormat(original, "of the original Remix-DiT", experts="all"),
    "lightningdit": FileFormat(lightningdit, "of hustvl/LightningDiT", backbones=("LightningDiT",)),
    "rae": FileFormat(rae, "of bytetriper/RAE", raw_weights=False, backbones=("DiTDH",)),
    "sit": FileFormat(sit, "of willisma/SiT"),
    "dit": FileFormat(dit, "of facebookresearch/DiT"),
}
