#!/usr/bin/env bash
# DiT-S/2 from scratch, 2M steps: what the other S recipes start from.
# Should meet FID 26.51 (paper, table 1: 50k images, guidance 1.5, 250 steps).
# On 8 A100 about 6.9 hours of training and 0.2 of sampling (estimates, at 30 % of their peak: see common.sh).
. "$(dirname "$0")/common.sh"

torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path data/imagenet/train --features-path data/imagenet_encoded
torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model DiT-S/2 --data-path data/imagenet_encoded --max-steps 2000000 --prefix DiT-S-2M --ckpt-every 50000 --keep 2 --resume auto
torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/DiT-S-2M/checkpoints/2000000.pt --name DiT-S-2M
python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/DiT-S-2M/samples.npz
install -D outputs/DiT-S-2M/checkpoints/2000000.pt pretrained/DiT_S_2_2M.pt
