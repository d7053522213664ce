"""Models for sampling that run one plain model at a time, selected by the noise level."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffusion.intervals import check_boundaries, find_time, level_dtype
from mixing.folding import fold_stage, switching_stage
from mixing.low_rank import LowRankExpert
from mixing.wrapping import TransparentModule
from models import DiT, classifier_free_guidance
from remix import Remix


class ExpertSwitch(nn.Module):
    """Base class of models for sampling that run one plain model at a time, selected by the timestep.

    It is called like the plain model, with a batch whose timesteps belong to one expert. A sampler that knows the
    timestep calls `for_timestep` and runs the result, so that the host does not wait for the device.
    """

    def expert_index(self, t: float, dtype: torch.dtype | None = None) -> int:
        """Return the index of the expert that owns a time.

        Args:
            t: a timestep of the original process, or a flow's time.
            dtype: the type in which it has arrived. None: that of `t`.
        """
        raise NotImplementedError

    def select(self, i: int) -> nn.Module:
        """Return expert i. It is valid until the next call."""
        raise NotImplementedError

    def times(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the times among the arguments of the plain model, by default a DiT."""
        return t

    def for_timestep(self, timestep: float) -> nn.Module:
        """Return the expert that owns a time: a timestep of the original process, or a flow's time.

        It is valid until the next call.
        """
        return self.select(self.expert_index(timestep))

    def forward(self, *args, **kwargs) -> Any:
        """Run the expert that owns the timesteps of the batch, with the arguments of the plain model.

        Raises:
            ValueError: if the timesteps belong to several experts.
        """
        times = self.times(*args, **kwargs).detach()
        dtype = level_dtype(times)
        first, last = (self.expert_index(t, dtype) for t in torch.stack(times.aminmax()).tolist())
        if first != last:
            raise ValueError(
                f"all timesteps of a batch must belong to one expert, but they belong to experts {first} to {last}"
            )
        return self.select(first)(*args, **kwargs)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = None
    ) -> Tensor:
        """See `models.classifier_free_guidance`."""
        return classifier_free_guidance(self, x, t, y, cfg_scale, guided_channels)


# Methods of diffusers' models that would use the weights of one expert for all of them.
NOT_OF_A_FOLDED_REMIX = {
    **dict.fromkeys(
        ("save_pretrained", "push_to_hub"),
        "a FoldedRemix holds one expert: write all with interop.expert_folder.write_experts(remix, folder)",
    ),
    **dict.fromkeys(
        ("fuse_qkv_projections", "fuse_lora"),
        "the weights of a FoldedRemix change with the expert: fuse those of a plain one, remix.expert(i)",
    ),
}


class FoldedRemix(ExpertSwitch, TransparentModule):
    """Runs a Remix as one plain model, whose weights are overwritten when the expert changes.

    With low-rank bases, the plain model shares the parameters of the Remix, and the pairs are applied to activations.

    Attributes of the plain model are also attributes of this one. It may get adapters (LoRA) like a plain model.

    Args:
        remix: the Remix. Its parameters must not change later, because its coefficients are copied to the host.

    Attributes:
        plain: the plain model, with stages that of stage 0.
        other_stages: only with stages: the plain models of the stages 1 to S - 1.
    """

    _inner, _refused = "plain", NOT_OF_A_FOLDED_REMIX

    def __init__(self, remix: Remix):
        super().__init__()
        self.remix = remix
        # On the host, so that a change of the expert does not wait for the device.
        self.alpha = remix.coefficients.per_expert()
        self.plain, *others = [switching_stage(remix, s) for s in range(len(remix.stages))]
        if others:
            self.other_stages = nn.ModuleList(others)
        self.folded = None

    @property
    def __class__(self) -> type:
        # Pipelines of diffusers manage the adapters of a ModelMixin only.
        plain = self.__dict__.get("_modules", {}).get("plain")
        kinds = [kind.__name__ for kind in type(plain).__mro__]
        return type(plain) if "ModelMixin" in kinds else type(self)

    def __reduce__(self) -> tuple:
        # By default, pickle checks __class__.
        return nn.Module.__new__, (type(self),), self.__dict__

    @property
    def boundaries(self) -> list[float]:
        """See `Remix`."""
        return self.remix.boundaries

    def times(self, *args, **kwargs) -> Tensor:
        return self.remix.times(*args, **kwargs)

    def expert_index(self, t: float, dtype: torch.dtype | None = None) -> int:
        return self.remix.expert_index(t, dtype)

    def select(self, i: int) -> nn.Module:
        s = self.remix.stages.of(i)
        plain = self.other_stages[s - 1] if s else self.plain
        if i != self.folded:
            _check_layers(plain, self.remix, s)
            fold_stage(self.remix, plain, self.alpha[i], s)
            self.folded = i
        return plain


def _check_layers(plain: nn.Module, remix: Remix, s: int):
    """Raise ValueError if a layer to fold into was replaced or quantized, as libraries do with all `nn.Linear`s."""
    for name, _ in remix.mixed(s):
        layer = plain.get_submodule(name)
        # peft wraps the layers that it adapts.
        layer = getattr(layer, "base_layer", layer)
        if remix.rank is None:
            valid = layer.weight.is_floating_point() and not is_traceable_wrapper_subclass(layer.weight)
        else:
            valid = isinstance(layer, LowRankExpert)
        if not valid:
            raise ValueError(
                f"the layer {name} of a FoldedRemix was replaced or quantized, so no expert can be written into it: "
                "quantize a Remix with rank before it is folded, or the plain remix.expert(i)"
            )


def for_sampling(model: DiT | Remix) -> DiT | ExpertSwitch:
    """Return what runs the experts of a Remix one at a time, in eval mode; another model is returned as it is."""
    return FoldedRemix(model).eval() if isinstance(model, Remix) else model


class IndependentExperts(ExpertSwitch):
    """Plain DiTs that were trained separately, each on its own interval of noise levels (a baseline of the paper).

    Args:
        models: the N experts.
        boundaries: N + 1 increasing noise levels, as in `RemixDiT`.

    Raises:
        ValueError: if the boundaries do not fit.
    """

    def __init__(self, models: list[DiT], boundaries: list[float]):
        super().__init__()
        check_boundaries(boundaries, len(models), boundaries[-1])
        self.models = nn.ModuleList(models)
        self.boundaries = list(boundaries)

    def expert_index(self, t: float, dtype: torch.dtype | None = None) -> int:
        return find_time(self.boundaries, t, dtype)

    def select(self, i: int) -> DiT:
        return self.models[i]
