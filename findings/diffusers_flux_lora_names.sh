#!/usr/bin/env bash
# diffusers 0.42.1 (with torch 2.11.0, transformers 5.24.0, peft 0.21.2): FluxPipeline.load_lora_weights with a LoRA file
# that has the names of the original repository after "diffusion_model.", as ComfyUI reads and writes them.
#
# Expected: the pair of a layer is read alike as lora_A and lora_B, and as lora_down and lora_up. WanPipeline reads
# "diffusion_model." with lora_A and lora_B.
# Behaviour: with lora_A and lora_B the call returns, logs that nothing was found and that this is safe to ignore, and
# adds no adapter: the pipeline goes on without the LoRA. With lora_down and lora_up the same tensors are read.
# Output seen:
#     diffusion_model.double_blocks.0.img_attn.proj.lora_A, lora_B: the output changes by 0.000, adapters {}
#     diffusion_model.double_blocks.0.img_attn.proj.lora_down, lora_up: the output changes by 0.667, adapters
#     {'transformer': ['default_0']}
# Exits with 0 while this is so, and with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

torch.manual_seed(0)
size = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16)
size |= dict(num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8))
a, b = torch.randn(4, 32), torch.randn(32, 4)


def effect(first, second, prefix):
    """Return the change of a Flux transformer's output by one file with one layer, under these names of its pair."""
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(**size).eval()
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)
    inputs = dict(hidden_states=torch.ones(1, 4, 4), encoder_hidden_states=torch.ones(1, 3, 32))
    inputs |= dict(pooled_projections=torch.ones(1, 32), timestep=torch.ones(1), guidance=None)
    inputs |= dict(img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3))
    with torch.no_grad():
        before = transformer(**inputs).sample
        layer = f"{prefix}double_blocks.0.img_attn.proj"
        pipeline.load_lora_weights({f"{layer}.{first}.weight": a, f"{layer}.{second}.weight": b})
        after = transformer(**inputs).sample
    change = (after - before).abs().max().item()
    print(f"{layer}.{first}, {second}: the output changes by {change:.3f}, adapters {pipeline.get_list_adapters()}")
    return change


ignored = effect("lora_A", "lora_B", "diffusion_model.")
read = effect("lora_down", "lora_up", "diffusion_model.")
raise SystemExit(ignored != 0 or not read > 0.1)
PYTHON
