"""The record of a backbone: what the rest of the code needs to know about it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class SkipNormal(TorchFunctionMode):
    """Leave out the initialization with normal numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **kwargs or {})


@contextmanager
def meta_device() -> Iterator[None]:
    """Build modules whose tensors have shapes but no storage, as with torch.device("meta"), to look at the shapes.

    The state of the global random generator is the same afterwards.

    Normal numbers are left out. On this device, PyTorch implements them by Python code that imports the compiler, which
    takes two thirds of the time of importing PyTorch.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), SkipNormal():
        yield


def data_shape(config: dict) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of what a backbone denoises, by the keyword arguments of its class."""
    return config["in_channels"], config["input_size"], config["input_size"]


@dataclass(frozen=True)
class Backbone:
    """What the rest of the code knows about a backbone: its class, its sizes, and where its parts are.

    The class is called as `DiT` is, model(x, t, y, label_drop=None), with an output of C or 2C channels. Its attribute
    `config` is a dict of the keyword arguments that build it, in plain types. Each class has the arguments input_size,
    in_channels, num_classes and class_dropout_prob, with the meanings that they have for `DiT`. The number of its
    blocks, if it is an argument, is called depth, or has a name that ends so; it is a list if there are several kinds
    of blocks.

    Attributes:
        name: name of the backbone, such as "DiT". Its models are named after it and their size: "DiT-S/2", and with
            experts "RemixDiT-S/2".
        module: the class.
        sizes: keyword arguments of each size, by its name such as "S/2".
        mixed_layers: names of the `nn.Linear` layers that a Remix mixes, in which * stands for text without a dot.
            Those that a model does not have, because of its options, are left out.
        modulation: names of layers that --mix-modulation mixes too. They start at zero.
        file_options: arguments of the class that do not depend on the size or the data. A run that starts from a file
            takes them from there.
        blocks: name of the list of blocks. Their activations can be computed again in the backward pass.
        class_embedding: name of the `nn.Embedding` of the classes. The null class, if there is one, is its last row.
        before_compile: function that is called with a model that will be compiled, and the device that it will run on,
            and changes the model in place; None if nothing changes.
        latents: number of channels of the latents that the published models denoise, and pixels of an image per latent
            along each side.
        sampling: by the name of a process, the settings of sample_ddp.py with which the published models are sampled,
            which are then the defaults. `guided_channels` may be "all". With `closed_interval`, the interval of
            guidance holds both of its ends.
        flops: function that `count_flops` calls; None to count the operations of a forward pass without data, which
            imports the compiler.
    """

    name: str
    module: type[nn.Module]
    sizes: dict[str, dict]
    mixed_layers: tuple[str, ...]
    modulation: tuple[str, ...] = ()
    file_options: tuple[str, ...] = ()
    blocks: str = "blocks"
    class_embedding: str = "y_embedder.embedding_table"
    before_compile: Callable[[nn.Module, torch.device], None] | None = None
    latents: tuple[int, int] = (4, 8)
    sampling: dict[str, dict] = field(default_factory=dict)
    flops: Callable[[dict], int] | None = None

    def models(self) -> dict[str, Callable[..., nn.Module]]:
        """Return what builds the model of each size, by the model's name. It takes further keyword arguments."""
        return {f"{self.name}-{size}": partial(self.module, **arguments) for size, arguments in self.sizes.items()}

    def find_size(self, config: dict) -> str | None:
        """Return the name of the size that has these keyword arguments, or None.

        Those that are missing match any. `file_options` are not compared.
        """
        for size, arguments in self.sizes.items():
            compared = arguments.keys() - {*self.file_options}
            if all(config.get(key, arguments[key]) == arguments[key] for key in compared):
                return size
        return None

    def find_blocks(self, module: nn.Module) -> list[nn.Module]:
        """Return the blocks of a model of this class."""
        return list(module.get_submodule(self.blocks))

    def count_flops(self, config: dict) -> int:
        """Count the FLOPs of the matrix products of one forward pass, per image.

        Args:
            config: the keyword arguments of the class.
        """
        if self.flops is not None:
            return self.flops(config)
        from torch.utils.flop_counter import FlopCounterMode

        with meta_device(), FlopCounterMode(display=False) as counter:
            model = self.module(**config).eval()
            x = torch.empty(1, *data_shape(config))
            model(x, torch.empty(1), torch.empty(1, dtype=torch.long))
        return counter.get_total_flops()

    @torch.no_grad()
    def reset_classes(self, module: nn.Module, num_classes: int, kept: dict[int, int]):
        """Replace the table of the class embeddings by a newly initialized one for other classes.

        The embedding of the null class is kept.

        Args:
            module: a model of this class, which is changed in place.
            num_classes: number of new classes.
            kept: old label of each new class whose embedding is kept.
        """
        old, old_classes = module.get_submodule(self.class_embedding), module.config["num_classes"]
        null_classes = old.num_embeddings - old_classes
        new = nn.Embedding(num_classes + null_classes, old.embedding_dim).to(old.weight)
        nn.init.normal_(new.weight, std=0.02)
        rows = kept | {num_classes + i: old_classes + i for i in range(null_classes)}
        for row, old_row in rows.items():
            new.weight[row] = old.weight[old_row]
        module.set_submodule(self.class_embedding, new)
        module.config["num_classes"] = num_classes
