"""Convert a checkpoint to a file format of another project, or to safetensors.

    python convert.py outputs/RUN/checkpoints/0100000.pt original.pt --to original
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to dit --expert 3
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to sit --expert 3
    python convert.py outputs/RUN/checkpoints/0100000.pt remix.safetensors --to safetensors
    python convert.py outputs/RUN/checkpoints/0100000.pt remix --to diffusers --vae ema
    python convert.py outputs/RUN/checkpoints/0100000.pt merged.safetensors --to safetensors --merge mean

original: a file of the original Remix-DiT repository, with state dicts under "ema" and "model".
dit: a file of facebookresearch/DiT, with the same keys: a plain DiT, or one expert of a RemixDiT folded into a DiT.
sit: a training checkpoint of willisma/SiT, likewise, from a model that was trained with --process flow.
safetensors: the EMA weights and the config. Loading a .safetensors file never executes code.
diffusers: a folder with the EMA weights: a pipeline for a RemixDiT or a flow, otherwise a DiTTransformer2DModel.
--ema-std makes an EMA of any width, if the training stored snapshots (train_fast.py --ema-snapshots).
--merge makes one plain DiT of all experts, as a baseline or as a start for distillation, in any format but original.
"""

import argparse
from pathlib import Path

import torch

from checkpoint import load_models, model_config
from diffusion import NOISE_LEVELS, process_name
from diffusion.intervals import intervals
from features.autoencoder import Latents, load_autoencoder
from interop import diffusers, dit, original, sit
from interop.own import find_checkpoint, save_safetensors
from interop.shapes import TIMESTEP_FREQUENCIES_FLAG, frequency_override
from models import DiT
from remix import RemixDiT
from runtime.command_line import ArgumentParser, counted, number, positive_int, run_script
from runtime.errors import UserError, warn
from sampling.loading import choose_process
from training.posthoc_ema import WIDEST, reconstruct

# The formats whose files hold the EMA weights and the raw weights.
FILE_FORMATS = {"original": original, "dit": dit, "sit": sit}


def main(args: argparse.Namespace):
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: choose another name")
    if args.vae and args.to != "diffusers":
        raise UserError(f"--vae is stored in a pipeline: use it with --to diffusers, not --to {args.to}")
    chosen = args.expert is not None or args.merge is not None
    if chosen and args.to == "original":
        raise UserError("--expert and --merge give a DiT: use another format, not --to original")

    keys = ("ema", "model") if args.to in FILE_FORMATS else ("ema",)
    overrides = {"num_heads": args.num_heads} if args.num_heads else {}
    overrides |= frequency_override(args.timestep_frequencies)
    models, config = load_models(args.ckpt, keys, args.trust_pickle, **overrides)
    if args.ema_std:
        ema = reconstruct(find_checkpoint(args.ckpt), args.ema_std, models["ema"].state_dict())
        models["ema"].load_state_dict(ema)
        config["source"] = f"post-hoc EMA of relative standard deviation {args.ema_std} of {args.ckpt}"
    choose_process(args.ckpt, config, args.process)
    if args.to in ("original", "dit") and process_name(config["diffusion"]) == "flow":
        warn(f"{args.out} does not say that the model is a flow, a file of --to sit does")
    if args.to in ("dit", "sit") and config["model"]["backbone"].get("frequency_shift"):
        warn(f"{args.out} cannot record the timestep frequencies: load it with --timestep-frequencies diffusers")
    if args.to in ("dit", "sit") or chosen:
        models = {key: fold_experts(model, args.expert, args.merge, args.ckpt) for key, model in models.items()}
        config["model"] = model_config(config["model"]["name"].removeprefix("Remix"), models["ema"])
        if args.merge:
            config["source"] = f"experts of {args.ckpt}, merged with the weights {args.merge}"

    if args.to in ("original", "diffusers"):
        models = {key: whole_bases(model, args.to) for key, model in models.items()}
    if args.to in FILE_FORMATS:
        FILE_FORMATS[args.to].write(args.out, models, config)
    elif args.to == "safetensors":
        save_safetensors(args.out, models["ema"], config)
    else:
        if args.vae and not diffusers.is_pipeline(models["ema"], config):
            raise UserError("--vae is stored in the pipeline of a RemixDiT or a flow, this is the folder of one DiT")
        diffusers.write(args.out, models, config, load_vae(args.vae))
    print(f"wrote {args.out}")


def fold_experts(model: DiT | RemixDiT, expert: int | None, merge: str | None, path: str) -> DiT:
    """Fold experts of a RemixDiT into one plain DiT.

    Args:
        model: the model; a plain DiT is returned as it is.
        expert: index of the expert.
        merge: take all experts instead: "mean" with equal weights, or "interval" with the lengths of their intervals of
            noise levels as weights.
        path: the checkpoint, for error messages.
    """
    if isinstance(model, DiT):
        if merge:
            raise UserError(f"--merge: {path} holds a plain DiT, not the experts of a RemixDiT")
        if expert is not None:
            raise UserError(f"--expert {expert}: {path} holds a plain DiT, which has no experts")
        return model
    if merge:
        return model.merge([high - low for low, high in intervals(model)] if merge == "interval" else None)
    if expert is None:
        raise UserError(f"{path} holds {counted(model.n_experts, 'expert')}: choose one with --expert, or use --merge")
    if expert >= model.n_experts:
        raise UserError(f"--expert {expert}: {path} has the experts 0 to {model.n_experts - 1}")
    return model.expert(expert)


def whole_bases(model: DiT | RemixDiT, format: str) -> DiT | RemixDiT:
    """Return a RemixDiT with low-rank bases as an equal one with whole bases; other models are returned as they are.

    The weight of basis k is W + B_k A_k. The coefficients of an expert must add up to 1.
    """
    if isinstance(model, DiT) or model.rank is None:
        return model
    if model.mixer == "raw":
        raise UserError(
            f"--to {format} has no low-rank bases, and raw coefficients do not fit whole ones: "
            "use --to safetensors, or fold an expert with --expert"
        )
    plain = model.expert(0)
    whole = RemixDiT(plain, **{key: value for key, value in model.config.items() if key != "rank"})
    whole.load_state_dict({"logits": model.logits}, strict=False)
    with torch.no_grad():
        for k, alpha in enumerate(torch.eye(model.n_basis).tolist()):
            for (name, layer), (_, bases) in zip(model.mixed(), whole.mixed(), strict=True):
                linear = plain.get_submodule(name)
                layer.fold([layer], [linear], alpha)
                bases.weight[k] = linear.weight
                bases.bias[k] = linear.bias
    return whole.eval()


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
        choices=[*FILE_FORMATS, "safetensors", "diffusers"],
        required=True,
        help="the format: of the original Remix-DiT, facebookresearch/DiT, willisma/SiT, safetensors, or a folder for "
        "diffusers",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="let the checkpoint execute code: use this only for files that you made yourself",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--expert", type=number(int, 0), help="the expert to fold into a plain DiT")
    group.add_argument(
        "--merge",
        choices=["mean", "interval"],
        help="make one plain DiT of all experts: the mean of their weights, or their mean weighted by the lengths of "
        "the experts' intervals of noise levels",
    )
    parser.add_argument(
        "--ema-std",
        type=number(float, 0.01, WIDEST),
        metavar="STD",
        help="replace the EMA by one of this width, from the snapshots of train_fast.py --ema-snapshots: the standard "
        "deviation of its profile relative to the training time, such as 0.10 (arXiv 2312.02696)",
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
