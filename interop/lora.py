"""LoRA files of a Remix with low-rank bases, in the formats that pipelines, ComfyUI and trainers read.

A pair of a layer is A [R, in] and B [out, R], and the file stands for the weight W + (alpha / R) B A. Where it has no
alpha, alpha is R. The formats differ in the names of the pairs:

    diffusers   transformer.LAYER.lora_A.weight and lora_B.weight, with the names of the class in diffusers (peft's)
    original    diffusion_model.LAYER.lora_A.weight and lora_B.weight, with the names of the original repository; for
                Flux, lora_down, lora_up and alpha, because diffusers reads only these
    kohya       lora_unet_LAYER.lora_down.weight, lora_up.weight and alpha, with _ for the dots of the original names

Where the original computes several layers of the class as one, such as queries, keys and values, their pairs are one
pair of a block-diagonal B and the sum of their ranks.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mixing import fsdp
from remix import Remix
from runtime.errors import UserError
from runtime.files import atomic_write

FORMATS = ("diffusers", "original", "kohya")
PREFIXES = {"diffusers": "transformer.", "original": "diffusion_model.", "kohya": "lora_unet_"}
# What files have before the names of layers if peft has written them.
PEFT = "base_model.model."
# The names of A and of B in files.
A_NAMES, B_NAMES = r"(?P<a>lora_A|lora_down|lora\.down)", r"(?P<b>lora_B|lora_up|lora\.up)"
TENSORS = re.compile(rf"(?P<layer>.+)\.(?:{A_NAMES}|{B_NAMES})(\.default)?\.weight")
# The parameters that a LoRA file represents: the low-rank bases and the coefficients.
IN_LORA = ("lora_A", "lora_B", "logits")

# The pairs of a file, A [R, in] and B [out, R], by the names of the layers.
Pairs = dict[str, tuple[Tensor, Tensor]]


def _inside(ours: str, theirs: str, layers: dict[str, str]) -> dict[str, str]:
    """Return the names of the layers of all blocks of a list, in diffusers and in the original."""
    return {f"{ours}.*.{name}": f"{theirs}.*.{original}" for name, original in layers.items()}


def _attention(ours: str, theirs: str, fused: bool = True) -> dict[str, str]:
    """Return the names of the projections of an attention layer in diffusers and in the original."""
    names = ("qkv", "qkv", "qkv", "proj") if fused else ("q", "k", "v", "o")
    layers = zip(("to_q", "to_k", "to_v", "to_out.0"), names, strict=True)
    return {f"{ours}.{name}": f"{theirs}.{original}" for name, original in layers}


def _text_attention(theirs: str) -> dict[str, str]:
    """Return the names of the text's projections of a joint attention in diffusers and in the original."""
    fused = {f"attn.add_{part}_proj": f"{theirs}.qkv" for part in ("q", "k", "v")}
    return fused | {"attn.to_add_out": f"{theirs}.proj"}


def _feed_forward(ours: str, first: str, second: str) -> dict[str, str]:
    """Return the names of the two layers of an MLP in diffusers and in the original."""
    return {f"{ours}.net.0.proj": first, f"{ours}.net.2": second}


@dataclass(frozen=True)
class Layout:
    """The names of the layers of a class in its original repository.

    Attributes:
        names: the original's name of each layer of the class in diffusers, with * for the number of the block. Layers
            with the same name are parts of one layer, in this order. None: the names of the class.
        fused: names that are read beside those of `names`, likewise.
        down_up: whether a file in the original format has the tensors of the kohya format.
    """

    names: dict[str, str] | None
    fused: dict[str, str] | None = None
    down_up: bool = False


LAYOUTS = {
    "WanTransformer3DModel": Layout(
        _inside(
            "blocks",
            "blocks",
            _attention("attn1", "self_attn", fused=False)
            | _attention("attn2", "cross_attn", fused=False)
            | {"attn2.add_k_proj": "cross_attn.k_img", "attn2.add_v_proj": "cross_attn.v_img"}
            | _feed_forward("ffn", "ffn.0", "ffn.2"),
        )
    ),
    "FluxTransformer2DModel": Layout(
        _inside(
            "transformer_blocks",
            "double_blocks",
            _attention("attn", "img_attn")
            | _text_attention("txt_attn")
            | _feed_forward("ff", "img_mlp.0", "img_mlp.2")
            | _feed_forward("ff_context", "txt_mlp.0", "txt_mlp.2")
            | {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"},
        )
        | _inside(
            "single_transformer_blocks",
            "single_blocks",
            dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1")
            | {"proj_out": "linear2", "norm.linear": "modulation.lin"},
        ),
        down_up=True,
    ),
    "SD3Transformer2DModel": Layout(
        _inside(
            "transformer_blocks",
            "joint_blocks",
            _attention("attn", "x_block.attn")
            | _attention("attn2", "x_block.attn2")
            | _text_attention("context_block.attn")
            | _feed_forward("ff", "x_block.mlp.fc1", "x_block.mlp.fc2")
            | _feed_forward("ff_context", "context_block.mlp.fc1", "context_block.mlp.fc2"),
        )
    ),
    "QwenImageTransformer2DModel": Layout(None),
    # The names that diffusers and ComfyUI read after diffusion_model, and that musubi-tuner writes, are not fused.
    "ZImageTransformer2DModel": Layout(
        None,
        fused={
            f"{blocks}.*.attention.{name}": f"{blocks}.*.attention.{original}"
            for blocks in ("layers", "noise_refiner", "context_refiner")
            for name, original in (("to_q", "qkv"), ("to_k", "qkv"), ("to_v", "qkv"), ("to_out.0", "out"))
        },
    ),
}


@dataclass(frozen=True)
class Reduction:
    """What a reduction of the rank left out: norms of the differences of B A, relative to the norms of B A.

    Attributes:
        share: the Frobenius norm over all layers, relative to that of all layers.
        worst: the largest relative norm of one layer.
        layer: the name of this layer; empty if nothing was reduced.
    """

    share: float = 0.0
    worst: float = 0.0
    layer: str = ""

    def __str__(self) -> str:
        if not self.layer:
            return "nothing lost"
        return f"{self.share:.1%} lost over all layers, {self.worst:.1%} in {self.layer}"


def write_stage_loras(
    remix: Remix, name, lora: str = "original", rank: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[Path, Reduction]:
    """Write one LoRA file per stage, the mean of the stage's experts.

    The files of two stages are NAME_low_noise.safetensors and NAME_high_noise.safetensors. That of a single stage is
    NAME.safetensors, and those of more are NAME_stage0.safetensors and so on, stage 0 with the least noise.

    Args:
        remix: the Remix, with low-rank bases; all its other parameters must be frozen. If it is sharded
            (`mixing.fsdp`), every process calls this, and rank 0 writes.
        name: path of the files without the end of their names; .safetensors may be given.
        lora: the format, one of `FORMATS`.
        rank: reduce the rank of each layer of the class to this one, by the best approximation of B A (a truncated
            singular value decomposition). None: the rank K * r of all bases, without loss.
        dtype: dtype of the pairs. Rounding to it is not part of the reported loss.

    Returns:
        The path of each file, and what the reduction of its rank left out.

    Raises:
        UserError: if LoRA files in this format and dtype cannot represent the experts, or the rank is out of range.
    """
    check_lora(remix, lora, dtype)
    whole = remix.n_basis * remix.rank
    if rank is not None and not (isinstance(rank, Integral) and 1 <= rank <= whole):
        raise UserError(f"the rank of the LoRA files must be an integer from 1 to K * r = {whole}, but it is {rank}")
    experts = torch.tensor(remix.coefficients.per_expert(), dtype=torch.float64)  # [N, 1 or depth, K]
    written = {}
    for s, stage in enumerate(stage_names(remix)):
        rows = remix.stages.experts(s)
        pairs, lost = mixture_pairs(remix, experts[list(rows)].mean(0).tolist()), Reduction()
        if rank is not None and rank < whole:
            pairs, lost = reduce_rank(pairs, rank)
        path = Path(f"{str(name).removesuffix('.safetensors')}{f'_{stage}' if stage else ''}.safetensors")
        levels = remix.boundaries[rows[0] : rows[-1] + 2]
        save_lora(remix, pairs, path, lora, dtype, stage=stage, boundaries=levels, lost=lost.share)
        written[path] = lost
    return written


def stage_names(remix: Remix) -> list[str]:
    """Return the name of each stage in the names of files; tools know those of two stages. That of one is empty."""
    n_stages = len(remix.stages)
    return {1: [""], 2: ["low_noise", "high_noise"]}.get(n_stages, [f"stage{s}" for s in range(n_stages)])


def check_lora(remix: Remix, lora: str, dtype: torch.dtype):
    """Check that LoRA files in a format and a dtype can represent the experts of a Remix.

    Raises:
        UserError: if they cannot, or the format is unknown, or has no names for the class or for a mixed layer.
    """
    _check_low_rank(remix)
    name = remix.arguments.owner
    if lora not in FORMATS:
        raise UserError(f"the format of LoRA files must be one of {', '.join(FORMATS)}, but it is {lora!r}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"the dtype of LoRA files must be a floating-point torch.dtype, but it is {dtype!r}")
    if not hasattr(remix.backbone, "load_lora_adapter"):
        raise UserError(
            f"the pipelines of a {name} have no load_lora_weights: write whole experts (write_experts with lora=False)"
        )
    if lora != "diffusers":
        layout = find_layout(remix.backbone)
        if layout is None:
            raise UserError(
                f'the {lora} format has names for {", ".join(LAYOUTS)}, but not for a {name}: use lora="diffusers"'
            )
        missing = [layer for layer, _ in remix.mixed() if _original_name(layer, layout.names) is None]
        if missing:
            raise UserError(f'the {lora} format has no name for {missing[0]} of a {name}: use lora="diffusers"')
    names = [key for key, p in remix.named_parameters() if p.requires_grad and key.split(".")[-1] not in IN_LORA]
    if names:
        raise UserError(
            f"LoRA files need all parameters outside the low-rank bases frozen (Remix.freeze_shared), but {len(names)} "
            f"are not, such as {names[0]}"
        )


def _check_low_rank(remix: nn.Module):
    """Raise UserError unless a module is a Remix with low-rank bases."""
    if not isinstance(remix, Remix):
        raise UserError(f"LoRA files need a Remix with low-rank bases, but this is a {type(remix).__name__}")
    if remix.rank is None:
        raise UserError("LoRA files need low-rank bases, but this Remix has whole layers as bases: give it a rank")


def find_layout(module: nn.Module) -> Layout | None:
    """Return the layout of a module's class, or of a class that it extends; None if there is none."""
    return next((LAYOUTS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in LAYOUTS), None)


@torch.no_grad()
def mixture_pairs(remix: Remix, alpha: list[list[float]]) -> Pairs:
    """Return the pairs of rank K * r of the mixture with the coefficients alpha [1 or depth][K], in host memory."""
    if fsdp.is_sharded(remix):
        fsdp.reshard(remix)
    pairs = {}
    for name, layer in remix.mixed():
        with fsdp.gathered(layer, bases_only=True):
            a, b = layer.lora_pair(alpha[layer.row])
            pairs[name] = a.detach().cpu(), b.cpu()
    return pairs


def save_lora(remix: Remix, pairs: Pairs, path: Path, lora: str, dtype: torch.dtype, **facts):
    """Write the pairs of the mixed layers to a safetensors file.

    Args:
        remix: the Remix. If it is sharded, every process calls this, and rank 0 writes.
        pairs: the pairs, all of the same rank.
        path: the file.
        lora: the format.
        dtype: dtype of the pairs.
        **facts: what the file's header says beside the class, the format and the rank.
    """
    rank = len(next(iter(pairs.values()))[0])
    facts = dict(base_model=remix.arguments.owner, lora_format=lora, rank=rank, **facts)
    header = {"format": "pt"} | {key: str(fact) for key, fact in facts.items() if fact != ""}
    with fsdp.written_once(remix) as writes:
        if writes:
            with atomic_write(path) as temporary:
                save_file(lora_state(remix.backbone, pairs, lora, dtype), temporary, metadata=header)


def lora_state(module: nn.Module, pairs: Pairs, lora: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Args:
        module: the transformer.
        pairs: the pairs by the names of the module's layers.
        lora: the format.
        dtype: dtype of the pairs; alpha is float32.
    """
    layout = Layout(None) if lora == "diffusers" else find_layout(module)
    down_up = lora == "kohya" or (lora == "original" and layout.down_up)
    down, up = ("lora_down", "lora_up") if down_up else ("lora_A", "lora_B")
    state = {}
    for name, layers in _original_layers(module, layout.names, pairs).items():
        a = torch.cat([pairs[layer][0].to(dtype) for layer in layers if layer in pairs])
        # A part without a pair has rows of zeros.
        sizes = [module.get_submodule(layer).out_features for layer in layers]
        parts = [
            pairs[layer][1] if layer in pairs else torch.empty(size, 0)
            for layer, size in zip(layers, sizes, strict=True)
        ]
        b = torch.block_diag(*(part.to(dtype) for part in parts))
        key = PREFIXES[lora] + (name.replace(".", "_") if lora == "kohya" else name)
        state[f"{key}.{down}.weight"], state[f"{key}.{up}.weight"] = a, b
        if down_up:
            state[f"{key}.alpha"] = torch.tensor(len(a), dtype=torch.float32)
    return state


def _find_block(layer: str) -> tuple[str, str]:
    """Return the name of a layer with * for the number of its block, and the number."""
    number = re.search(r"(?<=\.)\d+(?=\.)", layer)
    return (layer, "") if number is None else (f"{layer[: number.start()]}*{layer[number.end() :]}", number[0])


def _original_name(layer: str, names: dict[str, str] | None) -> str | None:
    """Return the original's name of a layer, or None if it has none."""
    if names is None:
        return layer
    pattern, number = _find_block(layer)
    name = names.get(pattern)
    return name and name.replace("*", number)


def _original_layers(module: nn.Module, names: dict[str, str] | None, wanted: Iterable[str]) -> dict[str, list[str]]:
    """Return the layers of a module that each layer of the original consists of, in the order of their rows.

    Args:
        module: the transformer.
        names: see `Layout`.
        wanted: layers of the module. Only the layers of the original that contain one of them are returned.
    """
    found, wanted = {}, {*wanted}
    # The parts of one layer stand beside each other in a module, but perhaps not in the order of their rows.
    order = {pattern: i for i, pattern in enumerate(names or ())}
    for layer, part in module.named_modules():
        if hasattr(part, "out_features") and (name := _original_name(layer, names)) is not None:
            found.setdefault(name, []).append(layer)
    for layers in found.values():
        layers.sort(key=lambda layer: order.get(_find_block(layer)[0], 0))
    return {name: layers for name, layers in found.items() if not wanted.isdisjoint(layers)}


@torch.no_grad()
def reduce_rank(pairs: Pairs, rank: int) -> tuple[Pairs, Reduction]:
    """Return pairs of a lower rank whose products B A are as close as possible, and what they lack.

    The singular values of B A are those of R_B R_A^T [R, R], where B = Q_B R_B and A^T = Q_A R_A. The product
    [out, in] is not computed.

    Args:
        pairs: the pairs, each of at least this rank; others are kept.
        rank: the rank. Pairs of layers with fewer channels are filled with zeros.
    """
    reduced, lost, norms = {}, {}, {}
    for name, (a, b) in pairs.items():
        if len(a) <= rank:
            reduced[name] = a, b
            continue
        q_a, r_a = torch.linalg.qr(a.double().T)  # [in, m], [m, R]
        q_b, r_b = torch.linalg.qr(b.double())  # [out, m'], [m', R]
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(len(b), rank)
        new_a[:kept] = (root[:, None] * (v[:kept] @ q_a.T)).to(a.dtype)
        new_b[:, :kept] = ((q_b @ u[:, :kept]) * root).to(b.dtype)
        reduced[name] = new_a, new_b
        lost[name], norms[name] = s[kept:].square().sum().item(), s.square().sum().item()
    if not lost:
        return reduced, Reduction()
    # The norms of the pairs that are kept count too.
    total = math.fsum(norms[name] if name in norms else _squared_norm(*pair) for name, pair in pairs.items())
    shares = {name: math.sqrt(lost[name] / norms[name]) if norms[name] else 0.0 for name in lost}
    layer = max(shares, key=shares.get)
    return reduced, Reduction(math.sqrt(math.fsum(lost.values()) / total) if total else 0.0, shares[layer], layer)


def _squared_norm(a: Tensor, b: Tensor) -> float:
    """Return the squared Frobenius norm of B A."""
    return ((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum().item()


@torch.no_grad()
def read_lora(remix: Remix, path, reduce: bool = False) -> Reduction:
    """Start the low-rank bases of a Remix from a LoRA file, so that every expert is W + B A of the file.

    The coefficients of an expert sum to 1, so all K bases become the file's pair. What is left of the rank r, and the
    layers that the file lacks, start as usual: A random and B zero. Equal bases give the logits of a softmax no
    gradient in the first step. They do not stay equal: the gradient of basis k is the sum of the experts' gradients,
    weighted by their coefficients alpha[i, k], which differ between the bases, as the initial logits are random and
    prefer the basis of the prior.

    Args:
        remix: the Remix. The values of its pairs are replaced, and its coefficients are kept.
        path: a safetensors file in one of the three formats of this module, with any rank and alpha, also one written
            by others: by the `save_lora_weights` of pipelines, by peft (with its adapter_config.json beside it), or by
            the trainers that use these names. The prefixes transformer. and diffusion_model. may be missing.
        reduce: approximate pairs of a higher rank than r by those of rank r. Otherwise they are refused.

    Returns:
        What the reduction of the rank left out.

    Raises:
        UserError: if the file is of another model or holds what pairs cannot represent, its rank is too high, the
            coefficients of an expert do not sum to 1, or the Remix has no low-rank bases or is sharded.
    """
    _check_low_rank(remix)
    if fsdp.is_sharded(remix):
        raise UserError("read the LoRA file before the Remix is sharded")
    sums = torch.tensor(remix.coefficients.per_expert(), dtype=torch.float64).sum(-1)
    if (sums - 1).abs().max() > 1e-3:
        raise UserError(
            f"the coefficients of an expert must sum to 1, but those of this Remix with mixer={remix.mixer!r} sum to "
            f"{sums.min():.3g} to {sums.max():.3g}: read the LoRA file before training, or use another mixer"
        )
    pairs = load_pairs(remix, Path(path))
    rank = max(len(a) for a, _ in pairs.values())
    if rank > remix.rank and not reduce:
        raise UserError(
            f"{path} has rank {rank}, and the bases have rank {remix.rank}: use a Remix of this rank, or reduce=True "
            "for the best approximation"
        )
    pairs, lost = reduce_rank(pairs, remix.rank)
    for name, layer in remix.mixed():
        layer.reset_parameters()
        if name in pairs:
            a, b = pairs[name]
            layer.lora_A[:, : len(a)] = a.to(layer.lora_A)
            layer.lora_B[:, :, : len(a)] = b.to(layer.lora_B)
    return lost


def load_pairs(remix: Remix, path: Path) -> Pairs:
    """Return the pairs of a LoRA file by the names of the mixed layers, in float32 and with alpha in B.

    Raises:
        UserError: see `read_lora`.
    """
    kind = remix.arguments.owner
    header, pairs, alphas = _read_tensors(path)
    known, mixed = _readable_layers(remix), dict(remix.mixed())
    others = [name for name in pairs if name not in known]
    if others:
        raise UserError(
            f"{path} is no LoRA of this Remix of a {kind}: {len(others)} of its {len(pairs)} layers are not among the "
            f"mixed layers, such as {others[0]}"
        )
    config = _peft_config(path, header, any(name.startswith(PEFT) for name in pairs))
    found = {}
    for name, pair in pairs.items():
        layers = known[name]
        modules = [remix.backbone.get_submodule(layer) for layer in layers]
        sizes, width = [module.out_features for module in modules], modules[0].in_features
        if pair.keys() != {"a", "b"} or pair["a"].shape != (pair["b"].shape[1], width) or len(pair["b"]) != sum(sizes):
            shapes = " and ".join(str(list(tensor.shape)) for tensor in pair.values())
            raise UserError(
                f"{path} is no LoRA of this {kind}: {name} is a layer from {width} to {sum(sizes)} channels, and the "
                f"file has {shapes}"
            )
        a, rank = pair["a"], len(pair["a"])
        scale = alphas[name] / rank if name in alphas else _peft_scale(config, layers[0], rank)
        for layer, b in zip(layers, (scale * pair["b"]).split(sizes), strict=True):
            # The pair of a part of a block-diagonal one.
            used = b.any(0) if len(layers) > 1 else slice(None)
            if layer in found:
                raise UserError(f"{path} holds several pairs of {layer}, such as {name}")
            if layer in mixed:
                found[layer] = a[used], b[:, used]
            elif b.any():
                raise UserError(f"{path} changes {layer}, which is no mixed layer of this Remix")
    return found


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Tensor]], dict[str, float]]:
    """Return the header of a LoRA file, and by the names in it, the tensors "a" and "b" of the layers, and their alpha.

    Raises:
        UserError: if it is no LoRA file, or holds what pairs cannot represent.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None
    pairs, alphas = {}, {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key.removesuffix(".alpha")] = float(tensor)
            continue
        match = TENSORS.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise UserError(f"{path} holds {key} {list(tensor.shape)}, which pairs of linear layers cannot represent")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise UserError(f"{path} holds numbers in {key} that are not finite")
        pairs.setdefault(match["layer"], {})["a" if match["a"] else "b"] = tensor
    if not pairs:
        raise UserError(f"{path} is no LoRA file: it holds no pairs")
    return header, pairs, alphas


def _readable_layers(remix: Remix) -> dict[str, list[str]]:
    """Return the layers that each name in a LoRA file stands for; at least one of them is a mixed layer."""
    module, layers = remix.backbone, [name for name, _ in remix.mixed()]
    known = {f"{prefix}{layer}": [layer] for layer in layers for prefix in ("", PREFIXES["diffusers"], PEFT)}
    layout = find_layout(module)
    tables = [] if layout is None else [layout.names, *([layout.fused] if layout.fused else [])]
    for names in tables:
        for name, parts in _original_layers(module, names, layers).items():
            kohya = PREFIXES["kohya"] + name.replace(".", "_")
            known |= dict.fromkeys((name, PREFIXES["original"] + name, kohya), parts)
    return known


def _peft_config(path: Path, header: dict[str, str], from_peft: bool) -> dict:
    """Return peft's configuration of a file: that of its header, or of the file beside it; empty if it has none."""
    source, text = path, header.get("lora_adapter_metadata")
    if text is None:
        if not from_peft:
            return {}
        source = path.parent / "adapter_config.json"
        if not source.is_file():
            raise UserError(f"{path} has the names of peft, whose alpha is in {source}, which does not exist")
        text = source.read_text()
    try:
        config = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(f"the configuration of peft in {source} is no JSON object") from None
    if config.get("use_dora"):
        raise UserError(f"{path} is a DoRA, which low-rank pairs cannot represent")
    return config


def _peft_scale(config: dict, layer: str, rank: int) -> float:
    """Return the factor of B A by peft's configuration, or 1 without one."""
    if "lora_alpha" not in config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    found = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
    alpha = found[0] if found else config["lora_alpha"]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
