"""Turn a checkpoint into a file that other code reads.

    python convert.py outputs/RUN/checkpoints/0100000.pt original.pt --to original    the original Remix-DiT repository
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to dit --expert 3    facebookresearch/DiT, one expert
    python convert.py outputs/RUN/checkpoints/0100000.pt remix.safetensors --to safetensors    the averaged weights and the config
    python convert.py outputs/RUN/checkpoints/0100000.pt remix --to diffusers --vae ema    a folder for diffusers

The first two hold state dicts under "ema" and "model". A .safetensors file cannot run code, whoever wrote it. diffusers'
folder holds the averaged weights: of a whole Remix-DiT a pipeline, of a plain DiT or an --expert a DiTTransformer2DModel.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import load_model, original_state
from common import ArgumentParser, UserError, atomic_write, number, positive_int, run_script
from interop.diffusers import export_pipeline, export_transformer
from models import DiT
from remix import RemixDiT


def main(args: argparse.Namespace):
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: choose another name")
    overrides = {"num_heads": args.num_heads} if args.num_heads else {}
    if args.vae and args.to != "diffusers":
        raise UserError(f"--vae goes into a pipeline, with --to diffusers, not --to {args.to}")
    if args.to == "diffusers":
        write_folder(args, *load_model(args.ckpt, allow_pickle=args.trust_pickle, **overrides))
        return
    states = {}
    for name, ema in (("ema", True), ("model", False)):
        model, config = load_model(args.ckpt, ema=ema, allow_pickle=args.trust_pickle, **overrides)
        if args.to == "original":
            states[name] = original_state(model)
        elif args.to == "safetensors":
            states[name] = model.state_dict()
        else:
            states[name] = one_dit(args, model).state_dict()
    with atomic_write(args.out) as temporary:
        if args.to == "safetensors":
            save_file(states["ema"], temporary, metadata={"config": json.dumps(config)})
        else:
            torch.save(states, temporary)
    print(f"wrote {args.out}")


def write_folder(args: argparse.Namespace, model: DiT | RemixDiT, config: dict):
    """A pipeline of a whole Remix-DiT, a transformer of a plain DiT or an expert."""
    if isinstance(model, RemixDiT) and args.expert is None:
        export_pipeline(model, config, args.out, args.vae or "none")
    elif args.vae:
        raise UserError("--vae goes into the pipeline of a whole Remix-DiT: this is the folder of one DiT")
    else:
        export_transformer(one_dit(args, model), config, args.out)
    print(f"wrote {args.out}")


def one_dit(args: argparse.Namespace, model: DiT | RemixDiT) -> DiT:
    """The plain DiT that the checkpoint holds, or the expert that --expert names."""
    if not isinstance(model, RemixDiT):
        return model
    if args.expert is None:
        raise UserError(f"{args.ckpt} holds {model.n_experts} experts: say which with --expert")
    if args.expert >= model.n_experts:
        raise UserError(f"--expert {args.expert}: {args.ckpt} has the experts 0 to {model.n_experts - 1}")
    return model.expert(args.expert)


if __name__ == "__main__":
    parser = ArgumentParser(description="Turn a checkpoint into a file that other code reads.")
    parser.add_argument("ckpt", help="a checkpoint that this project reads")
    parser.add_argument("out", help="the file to write, or diffusers' folder")
    parser.add_argument(
        "--to",
        choices=["original", "dit", "safetensors", "diffusers"],
        required=True,
        help="the original Remix-DiT's format, facebookresearch/DiT's, safetensors, or a folder for diffusers",
    )
    parser.add_argument("--trust-pickle", action="store_true", help="let the checkpoint run code: for your own alone")
    parser.add_argument("--expert", type=number(int, 0), help="the expert to fold, with --to dit or diffusers")
    parser.add_argument(
        "--vae", help="ema, mse, a hub name or a local folder: the VAE to store in the pipeline of --to diffusers"
    )
    parser.add_argument(
        "--num-heads", type=positive_int, help="attention heads, for a foreign file that fits no registered model"
    )
    run_script(main, parser)
