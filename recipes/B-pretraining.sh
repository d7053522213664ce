#!/usr/bin/env bash
# DiT-B/2 from scratch, 1M steps: what the other B recipes start from.
# Should meet FID 10.11 (paper, table 1: 50k images, guidance 1.5, 250 steps).
# On 8 A100 about 13 hours of training and 0.9 of sampling (estimates, at 30 % of their peak: see common.sh).
. "$(dirname "$0")/common.sh"

torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path data/imagenet/train --features-path data/imagenet_encoded
torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model DiT-B/2 --data-path data/imagenet_encoded --max-steps 1000000 --prefix DiT-B-1M --ckpt-every 50000 --keep 2 --resume auto
torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt outputs/DiT-B-1M/checkpoints/1000000.pt --name DiT-B-1M
python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/DiT-B-1M/samples.npz
install -D outputs/DiT-B-1M/checkpoints/1000000.pt pretrained/DiT_B_2_1M.pt
