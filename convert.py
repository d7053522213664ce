"""Convert a checkpoint to a file format of another project, or to safetensors.

    python convert.py outputs/RUN/checkpoints/0100000.pt original.pt --to original
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to dit --expert 3
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to sit --expert 3
    python convert.py outputs/RUN/checkpoints/0100000.pt expert3.pt --to lightningdit --expert 3
    python convert.py outputs/RUN/checkpoints/0100000.pt remix.safetensors --to safetensors
    python convert.py outputs/RUN/checkpoints/0100000.pt remix --to diffusers --vae ema
    python convert.py outputs/RUN/checkpoints/0100000.pt merged.safetensors --to safetensors --merge mean

original: a file of the original Remix-DiT repository, with state dicts under "ema" and "model".
dit: a file of facebookresearch/DiT, with the same keys: a plain DiT, or one expert of a RemixDiT folded into a DiT.
sit: a training checkpoint of willisma/SiT, likewise, from a model that was trained with --process flow.
lightningdit: a file of hustvl/LightningDiT with the same keys and its config, from a LightningDiT or an expert of one.
rae: the EMA weights of a DiTDH, or of an expert of one, as a bare state dict for bytetriper/RAE.
safetensors: the EMA weights and the config. Loading a .safetensors file never executes code.
diffusers: a folder with the EMA weights: a pipeline for a RemixDiT or a flow, or with --vae for a DiT; otherwise a
    DiTTransformer2DModel.
A file or folder that exists is not replaced.
--ema-std makes an EMA of any width, if the training stored snapshots (train_fast.py --ema-snapshots).
--merge makes one plain model of all experts, as a baseline or as a start for distillation, in any format but original.
"""

import argparse

import torch
from torch import nn

from checkpoint import load_models, model_config
from diffusion import PROCESSES
from diffusion.intervals import intervals
from features.autoencoder import Latents, load_autoencoder
from interop import FORMATS, diffusers
from interop.own import find_checkpoint
from interop.shapes import NUM_HEADS_FLAG, TIMESTEP_FREQUENCIES_FLAG, TRUST_PICKLE_FLAG, given_overrides
from mixing.experts import stored_state
from remix import Remix, RemixDiT
from runtime.command_line import ArgumentParser, counted, number, run_script
from runtime.errors import UserError
from runtime.files import check_unused
from sampling.loading import choose_process
from training.posthoc_ema import WIDEST, fit_snapshots, reconstruct


def main(args: argparse.Namespace):
    check_unused(args.out)
    if args.vae and args.to != "diffusers":
        raise UserError(f"--vae is stored in a pipeline: use it with --to diffusers, not --to {args.to}")
    format = FORMATS[args.to]
    chosen = args.expert is not None or args.merge is not None
    if chosen and format.experts == "all":
        raise UserError(f"--expert and --merge give a plain model: use another format, not --to {args.to}")

    keys = ("ema", "model") if format.raw_weights else ("ema",)
    models, config = load_models(args.ckpt, keys, args.trust_pickle, **given_overrides(args))
    if args.ema_std:
        fit = fit_snapshots(find_checkpoint(args.ckpt), args.ema_std)
        print(fit)
        models["ema"].load_state_dict(reconstruct(fit, stored_state(models["ema"])))
        config["source"] = f"post-hoc EMA of relative standard deviation {args.ema_std} of {args.ckpt}"
    choose_process(args.ckpt, config, args.process)
    name, architecture = config["model"]["name"], config["model"]["architecture"]
    if format.backbones and architecture not in format.backbones:
        raise UserError(f"--to {args.to} is for a {' or '.join(format.backbones)}, {args.ckpt} holds a {architecture}")
    if chosen or format.experts == "one":
        if config["model"]["remix"]:
            models = {key: fold_experts(model, args.expert, args.merge, args.ckpt) for key, model in models.items()}
        elif chosen:
            flag = "--merge" if args.merge else f"--expert {args.expert}"
            raise UserError(f"{flag}: {args.ckpt} holds a plain {architecture}, which has no experts")
        name = name.removeprefix("Remix")
        if args.merge:
            config["source"] = f"experts of {args.ckpt}, merged with the weights {args.merge}"
    elif config["model"]["remix"] and config["model"]["remix"]["rank"] and not format.low_rank:
        models = {key: whole_bases(model, args.to) for key, model in models.items()}
    config["model"] = model_config(name, models["ema"])

    options = {}
    if args.vae:
        if args.expert is not None and not diffusers.is_pipeline(config):
            raise UserError("--vae is stored in a pipeline, and one expert denoises only its own noise levels")
        options = {"vae": load_vae(args.vae), "pipeline": True}
    format.module.write(args.out, models, config, **options)
    print(f"wrote {args.out}")


def fold_experts(model: Remix, expert: int | None, merge: str | None, path: str) -> nn.Module:
    """Fold experts into one plain model.

    Args:
        model: the model.
        expert: index of the expert.
        merge: take all experts instead: "mean" with equal weights, or "interval" with the lengths of their intervals of
            noise levels as weights.
        path: the checkpoint, for error messages.

    Raises:
        UserError: if there is no such expert, or no expert is chosen.
    """
    if merge:
        return model.merge([high - low for low, high in intervals(model.boundaries)] if merge == "interval" else None)
    if expert is None:
        raise UserError(f"{path} holds {counted(model.n_experts, 'expert')}: choose one with --expert, or use --merge")
    if expert >= model.n_experts:
        raise UserError(f"--expert {expert}: {path} has the experts 0 to {model.n_experts - 1}")
    return model.expert(expert)


def whole_bases(model: Remix, format: str) -> RemixDiT:
    """Return a Remix with low-rank bases as an equal one with whole bases.

    The weight of basis k is W + B_k A_k. The coefficients of an expert must add up to 1.

    Raises:
        UserError: if the mixer is "raw", whose coefficients may have any sum.
    """
    if model.mixer == "raw":
        raise UserError(
            f"--to {format} has no low-rank bases, and raw coefficients do not fit whole ones: "
            "use --to safetensors, or fold an expert with --expert"
        )
    plain = model.expert(0)
    whole = RemixDiT(plain, **model.mixing_config | {"rank": None})
    whole.load_state_dict({"logits": model.logits}, strict=False)
    with torch.no_grad():
        for k, alpha in enumerate(torch.eye(model.n_basis).tolist()):
            for (name, layer), (_, bases) in zip(model.mixed(), whole.mixed(), strict=True):
                linear = plain.get_submodule(name)
                layer.fold([layer], [linear], alpha)
                bases.weight[k] = linear.weight
                if bases.bias is not None:
                    bases.bias[k] = linear.bias
    return whole.eval()


def load_vae(name: str | None):
    """Return the diffusers.AutoencoderKL of --vae, or None if the pipeline gets none.

    Raises:
        UserError: if it is no AutoencoderKL.
    """
    autoencoder = load_autoencoder(name or "none")
    if not isinstance(autoencoder, Latents) and name not in (None, "none"):
        raise UserError(f"--vae {name}: the pipeline takes an AutoencoderKL, and this is an AutoencoderRAE")
    return autoencoder.vae if isinstance(autoencoder, Latents) else None


if __name__ == "__main__":
    parser = ArgumentParser(description="Convert a checkpoint to a file format of another project, or to safetensors.")
    parser.add_argument("ckpt", help="a checkpoint in any format that this project reads")
    parser.add_argument("out", help="the file to write, or the folder for diffusers")
    parser.add_argument(
        "--to",
        choices=[*FORMATS],
        required=True,
        help="the format: " + "; ".join(f"{name}: {format.description}" for name, format in FORMATS.items()),
    )
    parser.add_argument("--trust-pickle", **TRUST_PICKLE_FLAG)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--expert", type=number(int, 0), help="the expert to fold into a plain model")
    group.add_argument(
        "--merge",
        choices=["mean", "interval"],
        help="make one plain model of all experts: the mean of their weights, or their mean weighted by the lengths of "
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
        choices=PROCESSES,
        help="what the model was trained for, if the file does not say it: a bare state dict of SiT is a flow",
    )
    parser.add_argument(
        "--vae",
        help="the VAE to store in the pipeline of --to diffusers: ema, mse, a hub name, a local folder, or none for a "
        "model of pixels; a DiT becomes a pipeline only with this flag",
    )
    parser.add_argument("--num-heads", **NUM_HEADS_FLAG)
    parser.add_argument("--timestep-frequencies", **TIMESTEP_FREQUENCIES_FLAG)
    run_script(main, parser)
