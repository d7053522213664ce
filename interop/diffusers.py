"""DiTs in diffusers' layout: found in a folder or on the Hugging Face hub, their tensors renamed, and written for diffusers.

diffusers keeps an attention's three projections apart and gives every block the timestep and label embedders of its own
(which in a converted DiT are all the same); everything else has one counterpart.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import Latents, load_autoencoder
from common import LocalError, UserError, first_line
from models import DiT, sincos_positions
from remix import RemixDiT

BLOCK_LAYERS = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
OTHER_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
CONFIG = {  # what a DiT's config must say; norm_eps may be 1e-5, diffusers' default, though the weights were trained with 1e-6
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is what older versions called it
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
LARGEST_SIDE = 256  # patches: no claim of a file's that cannot be checked may take all the memory
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".tar")
OUR_FILES = Path(__file__).resolve().parent / "diffusers_files"


def find_transformer(name) -> tuple[Path, Path] | None:
    """The config.json and the weights of the model that a folder or a hub name stands for; None where `name` is a file's.

    The folder holds a DiTTransformer2DModel, or a DiTPipeline with one in transformer/. A hub name (facebook/DiT-XL-2-256)
    is fetched by huggingface_hub, unless it was before. Raises UserError for a folder without a model.
    """
    folder = Path(name)
    mistyped = folder.suffix.lower() in FILE_SUFFIXES or folder.parent.is_dir()  # a path that is not there
    if not folder.exists() and HUB_NAME.fullmatch(str(name)) and not mistyped:
        folder = _fetch(str(name))
    if not folder.is_dir():
        return None
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config, weights = folder / "config.json", [folder / file for file in WEIGHTS if (folder / file).is_file()]
    if not config.is_file() or not weights:
        missing = "config.json" if not config.is_file() else WEIGHTS[0]
        raise UserError(f"{name} holds no DiTTransformer2DModel in diffusers' layout: there is no {folder / missing}")
    return config, weights[0]


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        for weights in WEIGHTS:  # the pickle only where there is nothing better
            places = [weights, f"transformer/{weights}"]
            folder = Path(snapshot_download(name, allow_patterns=["config.json", "transformer/config.json", *places]))
            if any((folder / place).is_file() for place in places):
                break
        return folder
    except Exception as error:  # the network, the hub and its library fail in many ways
        raise LocalError(
            f"{name}: no such file or folder, and not to be had from the Hugging Face hub: {first_line(error)}"
        ) from None


def read_transformer(name, config_file: Path, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """A DiTTransformer2DModel's tensors under our names, and its number of heads. Raises UserError for what is no DiT."""
    try:
        config = json.loads(config_file.read_text())
        kind = config.get("_class_name")
        if kind not in CLASSES:
            raise UserError(f"{name} holds a {kind}, not a DiTTransformer2DModel")
        for key, wanted in CONFIG.items():
            if (found := config.get(key, wanted if kind == CLASSES[0] else None)) != wanted:
                raise UserError(f"{name} has {key}={found}, a DiT has {wanted}")
        if config.get("norm_eps", 1e-5) > 1e-5:
            raise UserError(f"{name} has norm_eps={config['norm_eps']}, a DiT has 1e-06")
        heads, width = config["num_attention_heads"], len(state["pos_embed.proj.bias"])
        if heads * config["attention_head_dim"] != width or heads < 1:
            raise UserError(f"{name} has {heads} heads of {config['attention_head_dim']} in a width of {width}")
        side = config["sample_size"] // state["pos_embed.proj.weight"].shape[-1]
        if not 1 <= side <= LARGEST_SIDE:
            raise UserError(f"{name} has sample_size={config['sample_size']}, {side} patches a side")
        state = from_diffusers(name, state)
        state.setdefault("pos_embed", sincos_positions(width, side).unsqueeze(0))
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        if config["num_embeds_ada_norm"] != classes:
            raise UserError(
                f"{name} has num_embeds_ada_norm={config['num_embeds_ada_norm']}, its table {classes} classes"
            )
        return state, heads
    except KeyError as error:
        raise UserError(f"{name} holds no DiT in diffusers' layout: {error} is missing") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file may provoke anything
        raise UserError(f"{name} holds no DiT in diffusers' layout: {first_line(error)}") from None


def stored_vae(config_file: Path) -> dict:
    """The "vae" and "scale" of a config's "data" part, where the transformer lies in a pipeline's folder with a VAE."""
    folder = config_file.parent.parent / "vae"
    if config_file.parent.name != "transformer" or not (folder / "config.json").is_file():
        return {}
    try:
        scale = json.loads((folder / "config.json").read_text()).get(
            "scaling_factor", 0.18215
        )  # AutoencoderKL's default
        return {"vae": str(folder), "scale": float(scale)}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is no config of an AutoencoderKL: {error}") from None


def from_diffusers(name, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DiTTransformer2DModel's tensors under facebookresearch/DiT's names.

    Raises KeyError for a tensor that is missing, UserError for one too many or where the blocks' embedders differ.
    """
    left, ours = dict(state), {}
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks.")), default=-1)
    if not 1 <= depth <= len(state):
        raise KeyError("transformer_blocks.0")
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    for layer, theirs in OTHER_LAYERS.items():
        for kind in ("weight", "bias"):
            ours[f"{layer}.{kind}"] = left.pop(f"{theirs}.{kind}")
    for layer, theirs in EMBEDDERS.items():
        for kind in ("weight", "bias") if "mlp" in layer else ("weight",):
            ours[f"{layer}.{kind}"], *others = (left.pop(f"{block}.norm1.emb.{theirs}.{kind}") for block in blocks)
            if not all(torch.equal(other, ours[f"{layer}.{kind}"]) for other in others):
                raise UserError(f"{name} has blocks with different {theirs}s: a DiT has one for all")
    for i, block in enumerate(blocks):
        for layer, theirs in BLOCK_LAYERS.items():
            for kind in ("weight", "bias"):
                ours[f"blocks.{i}.{layer}.{kind}"] = torch.cat([left.pop(f"{block}.{part}.{kind}") for part in theirs])
    if "pos_embed.pos_embed" in left:
        ours["pos_embed"] = left.pop("pos_embed.pos_embed")
    if left:
        raise UserError(f"{name} holds more than a DiT: {sorted(left)[0]}")
    return ours


def to_diffusers(state: dict[str, Tensor], embedders: list[str]) -> dict[str, Tensor]:
    """A DiT's tensors, or a RemixDiT's backbone's, under diffusers' names; `embedders` are where those go."""
    theirs = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if layer in OTHER_LAYERS:
            theirs[f"{OTHER_LAYERS[layer]}.{kind}"] = value
        elif layer in EMBEDDERS:
            theirs |= {f"{place}.{EMBEDDERS[layer]}.{kind}": value for place in embedders}
        elif layer.startswith("blocks."):
            _, i, layer = layer.split(".", 2)
            parts = value.chunk(len(BLOCK_LAYERS[layer]), dim=-2 if kind == "weight" else -1)
            names = (f"transformer_blocks.{i}.{part}.{kind}" for part in BLOCK_LAYERS[layer])
            theirs |= dict(zip(names, parts, strict=True))
    return theirs


def export_transformer(dit: DiT, config: dict, out):
    """Write a DiT as a DiTTransformer2DModel's folder. Raises UserError for one that diffusers cannot express.

    diffusers' own class spaces the timestep's frequencies otherwise than the published DiT; the class in the file beside
    the weights, which AutoModel loads with trust_remote_code=True, does not.
    """
    from diffusers import DiTTransformer2DModel  # seconds to import

    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(dit.config["depth"])]
    theirs = DiTTransformer2DModel(**_transformer_config(dit, config))
    theirs.load_state_dict(to_diffusers(dit.state_dict(), embedders))
    with _new_folder(out) as folder:
        theirs.save_pretrained(folder)
        shutil.copyfile(OUR_FILES / "remix_transformer.py", folder / "remix_transformer.py")
        described = json.loads((folder / "config.json").read_text())
        described["auto_map"] = {"AutoModel": "remix_transformer.PublishedDiTTransformer2DModel"}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def export_pipeline(remix: RemixDiT, config: dict, out, vae: str = "none"):
    """Write a RemixDiT as a pipeline's folder, in which diffusers finds all the code that it needs.

    The K bases are stored once, and mixed where they run. vae: what `autoencoder.load_autoencoder` takes, stored beside
    them unless it is "none". Raises UserError for a model that diffusers cannot express, or a VAE of other channels.
    """
    import diffusers  # seconds to import

    from interop.diffusers_files.remix_transformer import RemixDiTTransformer2DModel

    arguments = _transformer_config(remix.backbone, config) | dict(
        n_basis=remix.n_basis,
        n_experts=remix.n_experts,
        num_timesteps=remix.num_timesteps,
        local_scope=remix.scope == "local",
        mixed_layers=[part for layer in remix.mixed_layers for part in BLOCK_LAYERS[layer]],
    )
    theirs = RemixDiTTransformer2DModel(**arguments)
    coefficients = remix.coefficients().detach().reshape(-1, remix.n_experts, remix.n_basis)
    weights = to_diffusers(remix.backbone.state_dict(), ["embedder"])
    theirs.load_state_dict(weights | {"coefficients": coefficients})
    autoencoder = load_autoencoder(vae)
    decodes = isinstance(autoencoder, Latents)
    if decodes and remix.in_channels not in autoencoder.channels:
        raise UserError(f"the model denoises {remix.in_channels} channels, --vae {vae} takes {autoencoder.channels[0]}")
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range" if remix.backbone.config["learn_sigma"] else "fixed_large",
        clip_sample=config["data"]["vae"] == "none",
        timestep_spacing="linspace",
    )
    parts = {
        "_class_name": ["pipeline", "RemixDiTPipeline"],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "transformer": ["remix_transformer", "RemixDiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"] if decodes else [None, None],
    }
    with _new_folder(out) as folder:
        theirs.save_pretrained(folder / "transformer")
        described = json.loads((folder / "transformer" / "config.json").read_text())
        known = {
            key: value for key, value in described.items() if key[0] == "_" or key in arguments
        }  # the rest is DiT's own
        (folder / "transformer" / "config.json").write_text(json.dumps(known, indent=2) + "\n")
        scheduler.save_pretrained(folder / "scheduler")
        if decodes:
            autoencoder.vae.register_to_config(scaling_factor=config["data"]["scale"])  # the features' own
            autoencoder.vae.save_pretrained(folder / "vae")
        shutil.copyfile(OUR_FILES / "remix_transformer.py", folder / "transformer" / "remix_transformer.py")
        shutil.copyfile(OUR_FILES / "pipeline.py", folder / "pipeline.py")
        (folder / "model_index.json").write_text(json.dumps(parts, indent=2) + "\n")


def _transformer_config(dit: DiT, config: dict) -> dict:
    """DiTTransformer2DModel's keyword arguments for a DiT. Raises UserError where there are none."""
    shape = dit.config
    if shape["mlp_ratio"] != 4 or not shape["class_dropout_prob"]:
        raise UserError("diffusers has DiTs with an MLP ratio of 4 and a null class only")
    positions = sincos_positions(shape["hidden_size"], shape["input_size"] // shape["patch_size"])
    if not torch.allclose(dit.pos_embed[0], positions, atol=1e-5):
        raise UserError("diffusers has DiTs with the published position embedding only")
    if other := set(config["diffusion"]) - {"learn_sigma"}:
        raise UserError(
            f"only the published diffusion process can be exported, not one with another {', '.join(other)}"
        )
    return dict(
        num_attention_heads=shape["num_heads"],
        attention_head_dim=shape["hidden_size"] // shape["num_heads"],
        in_channels=dit.in_channels,
        out_channels=dit.out_channels,
        num_layers=shape["depth"],
        sample_size=shape["input_size"],
        patch_size=shape["patch_size"],
        num_embeds_ada_norm=shape["num_classes"],
        norm_eps=1e-6,
    )


@contextmanager
def _new_folder(path):
    """Yield a folder beside `path` that takes its name on success, and is removed else."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
