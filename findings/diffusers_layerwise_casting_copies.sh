#!/usr/bin/env bash
# diffusers 0.42.1 (with torch 2.11.0): copy.deepcopy of a model after enable_layerwise_casting, as for an EMA or a target
# network.
#
# Expected: the copy computes with its own weights.
# Behaviour: the layers of the copy compute with the weights of the original. Under autocast this is silent, with float8
# as with bfloat16 storage; without autocast a call of the copy ends in an error about the dtypes of a matrix product.
# Output seen:
#     output of a layer: 1.516, of its copy with weights of zero: 1.516
#     output of the copy when the weights of the original are zero too: 0.000
# Exits with 0 while this is so, and with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 diffusers==0.42.1
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import copy

import torch
from diffusers import SD3Transformer2DModel

torch.manual_seed(0)
size = dict(sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2)
size |= dict(joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8)
model = SD3Transformer2DModel(**size)
model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
layer, copied = (part.transformer_blocks[0].ff.net[2] for part in (model, copy.deepcopy(model)))


@torch.no_grad()
def largest(linear):
    """Return the largest output of a layer for an input of ones."""
    with torch.autocast("cpu", torch.bfloat16):
        return linear(torch.ones(1, linear.in_features)).abs().max().item()


with torch.no_grad():
    before = largest(layer)
    copied.weight.zero_()
    copied.bias.zero_()
    own = largest(copied)
    print(f"output of a layer: {before:.3f}, of its copy with weights of zero: {own:.3f}")
    layer.weight.zero_()
    layer.bias.zero_()
    after = largest(copied)
    print(f"output of the copy when the weights of the original are zero too: {after:.3f}")
raise SystemExit(not (before == own > 0.1 and after == 0))
PYTHON
