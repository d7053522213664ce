#!/usr/bin/env bash
# Run one of the paper's experiments on ImageNet 256x256, from images to scores; the text below explains the arguments.

set -euo pipefail

usage() {
  cat <<'TEXT'
usage: recipes/run.sh SIZE RUN [--dry-run]

Run one of the paper's experiments on ImageNet 256x256 with 8 GPUs: encode the images, train, sample, compute the scores.
Each command is printed before it runs. After an interruption, the same line resumes the experiment.

SIZE: S, B or L (DiT-S/2, DiT-B/2, DiT-L/2 and the Remix-DiTs of these sizes)
RUN:
  pretraining    DiT from scratch, 2M steps for S and 1M for B and L; the other runs start from its weights
  continued      baseline: the pretrained DiT, trained for 100k further steps
  4-8            Remix-DiT with K = 4 bases and N = 8 experts, 100k steps from the pretrained DiT
  4-20           Remix-DiT with K = 4 bases and N = 20 experts, 100k steps from the pretrained DiT
  independent    baseline: 8 independent experts, 12,500 steps each from the pretrained DiT

options:
  --dry-run      print the commands, and the size, memory and time of each training; needs no GPU and no data
  -h, --help     print this text
TEXT
}

fail() {
  echo "recipes/run.sh: $1 (see --help)" >&2
  exit 2
}

dry_run=
arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit ;;
    --dry-run) dry_run=1 ;;
    -*) fail "unknown option $argument" ;;
    *) arguments+=("$argument") ;;
  esac
done
[ ${#arguments[@]} = 2 ] || fail "expected SIZE and RUN, got ${#arguments[@]} arguments"
size=${arguments[0]}
experiment=${arguments[1]}

# The weights that all runs but pretraining start from, under the names that the published README uses.
case $size in
  S) steps=2000000 pretrained=pretrained/DiT_S_2_2M.pt ;;
  B | L) steps=1000000 pretrained=pretrained/DiT_${size}_2_1M.pt ;;
  *) fail "unknown SIZE '$size', expected S, B or L" ;;
esac
case $experiment in
  pretraining | continued | 4-8 | 4-20 | independent) ;;
  *) fail "unknown RUN '$experiment', expected pretraining, continued, 4-8, 4-20 or independent" ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch=(torchrun --nnodes=1 --nproc_per_node=8)
features=data/imagenet_encoded

# Print a command and, except in a dry run, execute it.
run() {
  echo "\$ $*"
  [ -n "$dry_run" ] || "$@"
}

# Train with the given flags. A dry run prints the size, memory and time of the training instead.
train() {
  run "${launch[@]}" train_fast.py "$@" --data-path "$features" --resume auto
  [ -z "$dry_run" ] || WORLD_SIZE=8 python train_fast.py "$@" --data-path "$features" --resume auto --dry-run
}

run "${launch[@]}" extract_features.py --data-path data/imagenet/train --features-path "$features"

# Set the checkpoints to sample with, and the name of the samples.
case $experiment in
  pretraining)
    name=DiT-$size-${steps%000000}M
    train --model "DiT-$size/2" --max-steps $steps --prefix "$name" --ckpt-every 50000 --keep 2
    checkpoints=("outputs/$name/checkpoints/$steps.pt") ;;
  continued)
    name=DiT-$size-continued-100K
    train --model "DiT-$size/2" --load-weight "$pretrained" --epochs 20 --prefix "$name" --ckpt-every 50000
    checkpoints=("outputs/$name/checkpoints/0100000.pt") ;;
  4-*)
    name=RemixDiT-$size-$experiment-100K
    train --model "RemixDiT-$size/2" --n-basis 4 --n-experts "${experiment#4-}" --load-weight "$pretrained" \
      --epochs 20 --prefix "$name" --ckpt-every 50000
    checkpoints=("outputs/$name/checkpoints/0100000.pt") ;;
  independent)
    name=DiT-$size-independent-8
    for i in 0 1 2 3 4 5 6 7; do
      train --model "DiT-$size/2" --load-weight "$pretrained" --max-steps 12500 --prefix "DiT-$size-expert-$i" \
        --timesteps $((125 * i)) $((125 * (i + 1)))
    done
    checkpoints=("outputs/DiT-$size-expert-"?/checkpoints/0012500.pt) ;;
esac

run "${launch[@]}" sample_ddp.py --ckpt "${checkpoints[@]}" --name "$name"
run python evaluator.py data/VIRTUAL_imagenet256_labeled.npz "samples/$name/samples.npz"

if [ "$experiment" = pretraining ]; then
  run install -D "${checkpoints[0]}" "$pretrained"
fi
