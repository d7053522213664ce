"""Convert a checkpoint to a file format of another project, or to safetensors.

    python convert.py outputs/RUN/checkpoints/0100000.pt original.pt --to original
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to dit --expert 3
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to sit --expert 3
    python convert.py outputs/RUN/checkpoints/0100000.pt remix.safetensors --to safetensors
    python convert.py outputs/RUN/checkpoints/0100000.pt remix --to diffusers --vae ema

original: a file of the original Remix-DiT repository, with state dicts under "ema" and "model".
dit: a file of facebookresearch/DiT, with the same keys: a plain DiT, or one expert of a RemixDiT folded into a DiT.
sit: a training checkpoint of willisma/SiT, likewise, from a model that was trained with --process flow.
safetensors: the EMA weights and the config. Loading a .safetensors file never executes code.
diffusers: a folder with the EMA weights: a pipeline for a RemixDiT or a flow, otherwise a DiTTransformer2DModel.
"""

import argparse
from pathlib import Path

from autoencoder import Latents, load_autoencoder
from checkpoint import choose_process, load_model, save_safetensors
from common import (
    TIMESTEP_FREQUENCIES_FLAG,
    ArgumentParser,
    UserError,
    counted,
    frequency_override,
    number,
    positive_int,
    run_script,
    warn,
)
from diffusion import NOISE_LEVELS
from interop import diffusers, dit, original, sit
from models import DiT
from remix import RemixDiT


def main(args: argparse.Namespace):
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: choose another name")
    if args.expert is not None and args.to in ("original", "safetensors"):
        raise UserError(f"--expert gives a DiT: use it with --to dit, sit or diffusers, not --to {args.to}")
    if args.vae and args.to != "diffusers":
        raise UserError(f"--vae is stored in a pipeline: use it with --to diffusers, not --to {args.to}")

    keys = ("ema", "model") if args.to in ("original", "dit", "sit") else ("ema",)
    overrides = {"num_heads": args.num_heads} if args.num_heads else {}
    overrides |= frequency_override(args.timestep_frequencies)
    models, config = load_models(args.ckpt, keys, args.trust_pickle, overrides)
    choose_process(args.ckpt, config, args.process)
    if args.to in ("dit", "sit") and config["model"]["backbone"].get("frequency_shift"):
        warn(f"{args.out} cannot record the timestep frequencies: load it with --timestep-frequencies diffusers")
    if args.to in ("dit", "sit") or (args.to == "diffusers" and args.expert is not None):
        models = {key: fold_expert(model, args.expert, args.ckpt) for key, model in models.items()}

    if args.to == "original":
        original.write(args.out, models, config)
    elif args.to == "dit":
        dit.write(args.out, models, config)
    elif args.to == "sit":
        sit.write(args.out, models, config)
    elif args.to == "safetensors":
        save_safetensors(args.out, models["ema"], config)
    else:
        if args.vae and not diffusers.is_pipeline(models["ema"], config):
            raise UserError("--vae is stored in the pipeline of a RemixDiT or a flow, this is the folder of one DiT")
        diffusers.write(args.out, models, config, load_vae(args.vae))
    print(f"wrote {args.out}")


def load_models(
    path: str, keys: tuple[str, ...], allow_pickle: bool, overrides: dict
) -> tuple[dict[str, DiT | RemixDiT], dict]:
    """Load the model with the EMA weights for the key "ema", and with the raw weights for "model"; and the config."""
    models = {}
    for key in keys:
        models[key], config = load_model(path, ema=key == "ema", allow_pickle=allow_pickle, **overrides)
    return models, config


def fold_expert(model: DiT | RemixDiT, expert: int | None, path: str) -> DiT:
    """Return a plain DiT: expert number `expert` of a RemixDiT, or the model itself if it is a plain DiT."""
    if isinstance(model, DiT):
        if expert is not None:
            raise UserError(f"--expert {expert}: {path} holds a plain DiT, which has no experts")
        return model
    if expert is None:
        raise UserError(f"{path} holds {counted(model.n_experts, 'expert')}: choose one with --expert")
    if expert >= model.n_experts:
        raise UserError(f"--expert {expert}: {path} has the experts 0 to {model.n_experts - 1}")
    return model.expert(expert)


def load_vae(name: str | None):
    """Return the diffusers.AutoencoderKL of --vae, or None if the pipeline gets none."""
    autoencoder = load_autoencoder(name or "none")
    return autoencoder.vae if isinstance(autoencoder, Latents) else None


if __name__ == "__main__":
    parser = ArgumentParser(description="Convert a checkpoint to a file format of another project, or to safetensors.")
    parser.add_argument("ckpt", help="a checkpoint in any format that this project reads")
    parser.add_argument("out", help="the file to write, or the folder for diffusers")
    parser.add_argument(
        "--to",
        choices=["original", "dit", "sit", "safetensors", "diffusers"],
        required=True,
        help="the format: of the original Remix-DiT, facebookresearch/DiT, willisma/SiT, safetensors, or a folder for "
        "diffusers",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="let the checkpoint execute code: use this only for files that you made yourself",
    )
    parser.add_argument(
        "--expert", type=number(int, 0), help="the expert to fold into a DiT, with --to dit, sit or diffusers"
    )
    parser.add_argument(
        "--process",
        choices=[*NOISE_LEVELS],
        help="what the model was trained for, if the file does not say it: a bare state dict of SiT is a flow",
    )
    parser.add_argument(
        "--vae", help="the VAE to store in the pipeline of --to diffusers: ema, mse, a hub name or a local folder"
    )
    parser.add_argument(
        "--num-heads",
        type=positive_int,
        help="number of attention heads, for a file without a config that fits no registered model",
    )
    parser.add_argument("--timestep-frequencies", **TIMESTEP_FREQUENCIES_FLAG)
    run_script(main, parser)
