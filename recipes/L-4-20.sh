#!/usr/bin/env bash
# Remix-DiT 4-20 on L/2: 4 bases, 20 experts, 100k steps from the pretrained DiT.
# Should meet FID 3.22 (paper, table 1: 50k images, guidance 1.5, 250 steps).
# On 8 A100 about 4.6 hours of training and 3.0 of sampling (estimates, at 30 % of their peak: see common.sh).
. "$(dirname "$0")/common.sh"

torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path data/imagenet/train --features-path data/imagenet_encoded
torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model RemixDiT-L/2 --load-weight pretrained/DiT_L_2_1M.pt --data-path data/imagenet_encoded --epochs 20 --prefix RemixDiT-L-4-20-100K --ckpt-every 50000 --n-basis 4 --n-experts 20 --resume auto
torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/RemixDiT-L-4-20-100K/checkpoints/0100000.pt --name RemixDiT-L-4-20-100K
python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/RemixDiT-L-4-20-100K/samples.npz
