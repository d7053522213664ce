"""Turn a checkpoint into a file that other code reads.

    python convert.py outputs/RUN/checkpoints/0100000.pt original.pt --to original    the original Remix-DiT repository
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to dit --expert 3    facebookresearch/DiT, one expert

Both weights, averaged and raw, are converted; what is written are state dicts under "ema" and "model".
"""

import argparse
from pathlib import Path

import torch

from checkpoint import load_model, original_state
from common import ArgumentParser, UserError, atomic_write, number, positive_int, run_script
from remix import RemixDiT


def main(args: argparse.Namespace):
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: choose another name")
    overrides = {"num_heads": args.num_heads} if args.num_heads else {}
    states = {}
    for name, ema in (("ema", True), ("model", False)):
        model, _ = load_model(args.ckpt, ema=ema, **overrides)
        if args.to == "original":
            states[name] = original_state(model)
        elif not isinstance(model, RemixDiT):
            states[name] = model.state_dict()
        elif args.expert is None:
            raise UserError(f"{args.ckpt} holds {model.n_experts} experts: say which with --expert")
        elif args.expert >= model.n_experts:
            raise UserError(f"--expert {args.expert}: {args.ckpt} has the experts 0 to {model.n_experts - 1}")
        else:
            states[name] = model.expert(args.expert).state_dict()
    with atomic_write(args.out) as temporary:
        torch.save(states, temporary)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parser = ArgumentParser(description="Turn a checkpoint into a file that other code reads.")
    parser.add_argument("ckpt", help="a checkpoint that this project reads")
    parser.add_argument("out", help="the file to write")
    parser.add_argument(
        "--to",
        choices=["original", "dit"],
        required=True,
        help="the original Remix-DiT's format, or facebookresearch/DiT's",
    )
    parser.add_argument("--expert", type=number(int, 0), help="the expert to fold, with --to dit")
    parser.add_argument(
        "--num-heads", type=positive_int, help="attention heads, for a foreign file that fits no registered model"
    )
    run_script(main, parser)
