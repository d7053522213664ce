"""Train a small autoencoder of Fashion-MNIST, AutoencoderKL of diffusers: 32x32 pixels become latents of 4x8x8.

    python studies/vae.py --data data/fashion --out studies/results/fashion/vae

--data is the folder that studies/fashion.py wrote. --out is then a folder that extract_features.py and sample_ddp.py
take as --vae. It also holds reconstructions.png (validation images above their reconstructions) and scores.json: the
peak signal-to-noise ratio of the reconstructions of the validation and the test images, in dB, and the FID of the
latter against the test images in the classifier's features. An interrupted training continues; what is finished is not
computed again.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from classifiers import as_input, save_split
from diffusers import AutoencoderKL
from runs import run
from torch import Tensor
from tqdm import tqdm

from figures import save_grid
from runtime.command_line import ArgumentParser, flags, positive_int, run_script
from runtime.errors import UserError
from runtime.files import atomic_write, write_json

BATCH = 32
# The weight of the KL divergence, as small as in the VAEs of latent diffusion (arXiv 2112.10752).
KL_WEIGHT = 1e-6
SAVE_EVERY = 500


def main(args: argparse.Namespace):
    data, out = Path(args.data), Path(args.out)
    for name in ("train-32.npz", "validation-32.npz", "test-32.npz", "classifier-32.pt2"):
        if not (data / name).is_file():
            raise UserError(f"{data / name}: no such file: run studies/fashion.py --out {data}")
    if (out / "scores.json").exists():
        return print(f"{out} is finished, nothing to do")

    vae = train(read_images(data, "train"), out / "training.pt", args.steps)
    vae.register_to_config(scaling_factor=1 / latent_std(vae, read_images(data, "train")[:2000]))
    vae.save_pretrained(out)

    validation, test = read_images(data, "validation"), read_images(data, "test")
    rebuilt = {"validation": reconstruct(vae, validation), "test": reconstruct(vae, test)}
    pictures = np.concatenate([validation[:10], rebuilt["validation"][:10]])
    captions = ["original"] * len(validation[:10]) + ["reconstruction"] * len(validation[:10])
    save_grid(out / "reconstructions.png", np.repeat(pictures[..., None], 3, axis=-1), captions)
    save_split(data, "test-32-reconstructed", rebuilt["test"], np.zeros(len(test), np.int64))
    files = data / "test-32.npz", data / "test-32-reconstructed.npz"
    scores = data / "test-32-reconstructed.json"
    run("evaluator.py", *files, *flags(weights=data / "classifier-32.pt2", json=scores, cache="none", batch_size=200))
    # The scores are written last: if they exist, all other files do.
    results = {
        "steps": args.steps,
        "validation_psnr": psnr(validation, rebuilt["validation"]),
        "test_psnr": psnr(test, rebuilt["test"]),
        "test_fid": json.loads(scores.read_text())["FID"],
    }
    write_json(out / "scores.json", results)
    (out / "training.pt").unlink()
    print(results)


def read_images(data: Path, split: str) -> np.ndarray:
    """Return the images of a split, uint8 [n, 32, 32]."""
    with np.load(data / f"{split}-32.npz") as file:
        return file["arr_0"][..., 0]


def as_pixels(images: np.ndarray) -> Tensor:
    """Return images [n, H, W] as the VAE's input, [n, 3, H, W] in [-1, 1]."""
    return as_input(images).float() / 127.5 - 1


def build_vae() -> AutoencoderKL:
    """Return an untrained AutoencoderKL of 0.24 M parameters that divides the image's side by 4."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 32],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )


def train(images: np.ndarray, state_path: Path, steps: int) -> AutoencoderKL:
    """Train a VAE on the absolute error of the pixels and the KL divergence of the posterior.

    The images and the noise of a step are functions of the step.

    Args:
        images: uint8 [n, 32, 32].
        state_path: file of the training's state, from which an interrupted training continues.
        steps: number of steps.
    """
    torch.manual_seed(0)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0, fused=True)
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    with tqdm(total=steps, initial=first, unit="step", desc="VAE", smoothing=0) as bar:
        for step in range(first, steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            x = as_pixels(images[np.random.default_rng(step).integers(len(images), size=BATCH)])
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample
            optimizer.zero_grad()
            ((decoded - x).abs().mean() + KL_WEIGHT * posterior.kl().mean()).backward()
            optimizer.step()
            bar.update()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                with atomic_write(state_path) as temporary:
                    torch.save(state, temporary)
    return vae.eval().requires_grad_(False)


def latent_std(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the standard deviation of the latents of images [n, H, W] over all their elements."""
    generator = torch.Generator().manual_seed(0)
    latents = [vae.encode(x).latent_dist.sample(generator) for x in as_pixels(images).split(200)]
    return torch.cat(latents).std().item()


def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode images [n, H, W], and decode the means of the posteriors, uint8 [n, H, W]."""
    rebuilt = []
    for part in tqdm(np.array_split(images, -(-len(images) // 200)), desc="reconstructing", unit="batch"):
        # [b, 3, H, W] -> [b, H, W]
        decoded = vae.decode(vae.encode(as_pixels(part)).latent_dist.mean).sample.mean(1)
        rebuilt.append((127.5 * decoded + 128).clamp(0, 255).to(torch.uint8).numpy())
    return np.concatenate(rebuilt)


def psnr(images: np.ndarray, rebuilt: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of uint8 images, in dB."""
    error = np.square(images.astype(np.float64) - rebuilt).mean()
    return float(10 * np.log10(255**2 / error)) if error else math.inf


if __name__ == "__main__":
    parser = ArgumentParser(description="Train an autoencoder of Fashion-MNIST, from 32x32 pixels to 4x8x8 latents.")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="folder that studies/fashion.py wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the VAE to write")
    parser.add_argument("--steps", type=positive_int, default=6000, help="training steps of 32 images")
    run_script(main, parser)
