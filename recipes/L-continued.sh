#!/usr/bin/env bash
# Continued training of DiT-L/2, the baseline: 100k steps more.
# Should meet FID 3.57 (paper, table 1: 50k images, guidance 1.5, 250 steps).
# On 8 A100 about 4.6 hours of training and 3.0 of sampling (estimates, at 30 % of their peak: see common.sh).
. "$(dirname "$0")/common.sh"

torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path data/imagenet/train --features-path data/imagenet_encoded
torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model DiT-L/2 --load-weight pretrained/DiT_L_2_1M.pt --data-path data/imagenet_encoded --epochs 20 --prefix DiT-L-continued-100K --ckpt-every 50000 --resume auto
torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/DiT-L-continued-100K/checkpoints/0100000.pt --name DiT-L-continued-100K
python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/DiT-L-continued-100K/samples.npz
