#!/usr/bin/env bash
# 8 independent experts of DiT-S/2, the other baseline: 12,500 steps each, 100k in all.
# Should meet FID 25.00 (paper, table 1: 50k images, guidance 1.5, 250 steps).
# On 8 A100 about 0.3 hours of training and 0.2 of sampling (estimates, at 30 % of their peak: see common.sh).
. "$(dirname "$0")/common.sh"

torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path data/imagenet/train --features-path data/imagenet_encoded
for i in 0 1 2 3 4 5 6 7; do
  torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model DiT-S/2 --load-weight pretrained/DiT_S_2_2M.pt --data-path data/imagenet_encoded --max-steps 12500 --prefix DiT-S-expert-$i --timesteps $((125 * i)) $((125 * (i + 1))) --resume auto
done
torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/DiT-S-expert-?/checkpoints/0012500.pt --name DiT-S-independent-8
python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/DiT-S-independent-8/samples.npz
