"""Turn a checkpoint into a file that other code reads.

    python convert.py outputs/RUN/checkpoints/0100000.pt original.pt --to original    the original Remix-DiT repository
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to dit --expert 3    facebookresearch/DiT, one expert
    python convert.py outputs/RUN/checkpoints/0100000.pt remix.safetensors --to safetensors    the averaged weights and the config

The first two hold state dicts under "ema" and "model". A .safetensors file cannot run code, whoever wrote it.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import load_model, original_state
from common import ArgumentParser, UserError, atomic_write, number, positive_int, run_script
from remix import RemixDiT


def main(args: argparse.Namespace):
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: choose another name")
    overrides = {"num_heads": args.num_heads} if args.num_heads else {}
    states = {}
    for name, ema in (("ema", True), ("model", False)):
        model, config = load_model(args.ckpt, ema=ema, trust=args.trust_pickle, **overrides)
        if args.to == "original":
            states[name] = original_state(model)
        elif args.to == "safetensors" or not isinstance(model, RemixDiT):
            states[name] = model.state_dict()
        elif args.expert is None:
            raise UserError(f"{args.ckpt} holds {model.n_experts} experts: say which with --expert")
        elif args.expert >= model.n_experts:
            raise UserError(f"--expert {args.expert}: {args.ckpt} has the experts 0 to {model.n_experts - 1}")
        else:
            states[name] = model.expert(args.expert).state_dict()
    with atomic_write(args.out) as temporary:
        if args.to == "safetensors":
            save_file(states["ema"], temporary, metadata={"config": json.dumps(config)})
        else:
            torch.save(states, temporary)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parser = ArgumentParser(description="Turn a checkpoint into a file that other code reads.")
    parser.add_argument("ckpt", help="a checkpoint that this project reads")
    parser.add_argument("out", help="the file to write")
    parser.add_argument(
        "--to",
        choices=["original", "dit", "safetensors"],
        required=True,
        help="the original Remix-DiT's format, facebookresearch/DiT's, or safetensors",
    )
    parser.add_argument("--trust-pickle", action="store_true", help="let the checkpoint run code: for your own alone")
    parser.add_argument("--expert", type=number(int, 0), help="the expert to fold, with --to dit")
    parser.add_argument(
        "--num-heads", type=positive_int, help="attention heads, for a foreign file that fits no registered model"
    )
    run_script(main, parser)
