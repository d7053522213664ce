"""Models and their configs: building a model, and loading it from any format that interop/ reads."""

from torch import Tensor, nn

from interop import FORMATS, diffusers
from interop.own import find_checkpoint, read_checkpoint
from interop.shapes import recognize_other
from mixing.experts import stored_state
from models import BACKBONES, find_backbone, meta_device
from remix import Remix, RemixDiT
from runtime.errors import UserError, first_line


def build_model(config: dict) -> nn.Module:
    """Build the model that the "model" part of a config specifies, with newly initialized weights.

    Raises:
        ValueError: if there is no such backbone, or an argument is out of range.
    """
    name = config["architecture"]
    if name not in BACKBONES:
        raise ValueError(f"its architecture is {name!r}, which is none of {', '.join(BACKBONES)}")
    backbone = BACKBONES[name].module(**config["backbone"])
    return RemixDiT(backbone, **config["remix"]) if config["remix"] else backbone


def model_config(name: str, model: nn.Module) -> dict:
    """Return the "model" part of a config, from which `build_model` builds the same architecture.

    Args:
        name: the model's name, such as "RemixDiT-S/2".
        model: one of the backbones of models/, or a Remix of one.
    """
    remix = isinstance(model, Remix)
    backbone = model.backbone if remix else model
    return {
        "name": name,
        "architecture": find_backbone(backbone).name,
        "backbone": dict(backbone.config),
        "remix": dict(model.mixing_config) if remix else None,
    }


def load_model(
    path, ema: bool = True, allow_pickle: bool = False, verify: bool = False, **overrides
) -> tuple[nn.Module, dict]:
    """Load a model for inference.

    Args:
        path: a checkpoint of this project, of facebookresearch/DiT, willisma/SiT, LightningDiT or RAE (a state dict,
            also under "ema" or "model"), of REPA, REPA-E or the original Remix-DiT, or a DiT in diffusers' layout (a
            folder or a name on the Hugging Face hub). hf:OWNER/REPOSITORY/FILE is a file on the hub. The folder of a
            run of this project stands for its newest checkpoint.
        ema: load the EMA weights if the file has them, otherwise the raw weights.
        allow_pickle: let the file execute code.
        verify: compare the file with its checksums first.
        overrides: what the caller expects or knows about the model: `model`, its name such as "RemixDiT-S/2", and its
            keyword arguments. `num_heads` (two for a DiTDH) is required if the file holds no config, no registered
            model has its width and depth, and the tensors do not show it.

    Returns:
        The model in eval mode on the CPU, and its config. If the file holds no config, the config is determined from
        the shapes of the tensors, and its part "training" is None.

    Raises:
        UserError: if the file is missing or damaged, has an unknown format, or contradicts the overrides.
    """
    key = "ema" if ema else "model"
    models, config = load_models(path, (key,), allow_pickle, verify, **overrides)
    return models[key], config


def load_models(
    path, keys: tuple[str, ...], allow_pickle: bool = False, verify: bool = False, **overrides
) -> tuple[dict[str, nn.Module], dict]:
    """Load models from one file, as `load_model` does: for the key "ema" with the EMA, for "model" with raw weights.

    The file is read once. Only the keys that are given are in the result.

    Raises:
        UserError: see `load_model`.
    """
    path = find_checkpoint(path)
    # Configs hold lists.
    overrides = {key: [*value] if isinstance(value, tuple) else value for key, value in overrides.items()}
    transformer = diffusers.find_transformer(path)
    files = transformer[1] if transformer else [path]
    # Only a folder of diffusers has several files, each with some of the tensors.
    content = {}
    for file in files:
        content |= read_checkpoint(file, allow_pickle, verify)
    models = {}
    for key in keys:
        config, state = _read_any(path, content, key == "ema", overrides)
        try:
            check_shapes(path, config["model"], state)
            model = build_model(config["model"])
        except UserError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} specifies a model that cannot be built: {error}") from None
        load_weights(model, state, path)
        # Files of other projects do not give all arguments.
        config["model"] = model_config(config["model"]["name"], model)
        models[key] = model.eval()
    return models, config


def _read_any(path, content: dict, ema: bool, overrides: dict) -> tuple[dict, dict[str, Tensor]]:
    """Return the config and the state dict of a file of any known format."""
    for format in FORMATS.values():
        if found := format.module.read(path, content, ema, overrides):
            return found
    if kind := recognize_other(content):
        raise UserError(f"{path} holds {kind}")
    raise UserError(f"{path} holds no state dict of a model in a known format")


def check_shapes(path, config: dict, state: dict[str, Tensor]):
    """Check that the tensors of a file fit the model that its config specifies, without allocating the model.

    Args:
        path: the file, for error messages.
        config: the "model" part of the config.
        state: the state dict.

    Raises:
        UserError: if a tensor has another shape than in the model, or if the model has more blocks than the file has
            tensors.
    """
    depths = [value for key, value in config["backbone"].items() if key.endswith("depth")]
    depth = sum(sum(value) if isinstance(value, list) else value for value in depths)
    if depth > len(state):
        raise UserError(f"{path} does not fit the model: {depth} blocks, but {len(state)} tensors")
    with meta_device():
        expected = stored_state(build_model(config))
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            shapes = f"{list(state[key].shape)}, not {list(value.shape)}"
            raise UserError(f"{path} does not fit the model: {key} has the shape {shapes}")


def load_weights(model: nn.Module, state: dict[str, Tensor], path):
    """Load a state dict into a model. Raises a UserError of one line, which names `path`, if it does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # The first line of the message contains only the name of the class.
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else first_line(error)
        raise UserError(f"{path} does not fit the model: {reason[:300]}") from None
