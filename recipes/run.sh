#!/usr/bin/env bash
# Run an experiment on ImageNet 256x256, from images to scores; the text below explains the arguments.

set -euo pipefail

usage() {
  cat <<'TEXT'
usage: recipes/run.sh SIZE RUN [--dry-run]

Run an experiment on ImageNet 256x256 with 8 GPUs: encode the images, train, sample, compute the scores.
Each command is printed before it runs. After an interruption, the same line resumes the experiment.

SIZE:
  S, B, L                       the paper's DiT-S/2, DiT-B/2, DiT-L/2 and the Remix-DiTs of these sizes
  SiT-S, SiT-B, SiT-L, SiT-XL   flows of these sizes, from the weights of SiT, which are downloaded
RUN:
  pretraining    DiT from scratch, 2M steps for S and 1M for B and L; their other runs start from its weights
  published      only for SiT: the downloaded weights as they are, to compare with the scores that SiT publishes
  continued      baseline: the pretrained model, trained for 100k further steps
  4-8            Remix-DiT with K = 4 bases and N = 8 experts, 100k steps from the pretrained model
  4-20           Remix-DiT with K = 4 bases and N = 20 experts, 100k steps from the pretrained model
  independent    baseline: 8 independent experts, 12,500 steps each from the pretrained DiT; not for SiT

options:
  --dry-run      print the commands, and the size and memory of each training; needs no GPU and no data
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

# The weights that all runs but pretraining start from: the paper's under the names that its README uses, and SiT's on the
# Hugging Face hub. Flows are sampled with the SDE, which gives SiT's best scores.
kind=DiT process=() sampler=()
case $size in
  S) steps=2000000 pretrained=pretrained/DiT_S_2_2M.pt ;;
  B | L) steps=1000000 pretrained=pretrained/DiT_${size}_2_1M.pt ;;
  SiT-S | SiT-B | SiT-L | SiT-XL)
    kind=SiT process=(--process flow) sampler=(--sampler sde)
    pretrained=hf:nyu-visionx/SiT-collections/$size-2-256.pt ;;
  *) fail "unknown SIZE '$size', expected S, B, L, SiT-S, SiT-B, SiT-L or SiT-XL" ;;
esac
case $size/$experiment in
  */continued | */4-8 | */4-20 | [SBL]/pretraining | [SBL]/independent | SiT-*/published) ;;
  [SBL]/*) fail "unknown RUN '$experiment' for $size, expected pretraining, continued, 4-8, 4-20 or independent" ;;
  *) fail "unknown RUN '$experiment' for $size, expected published, continued, 4-8 or 4-20" ;;
esac
size=${size#SiT-}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch=(torchrun --nnodes=1 --nproc_per_node=8)
features=data/imagenet_encoded

# Print a command and, except in a dry run, execute it.
run() {
  echo "\$ $*"
  [ -n "$dry_run" ] || "$@"
}

# Train with the given flags. A dry run prints the size and memory of the training instead.
train() {
  run "${launch[@]}" train_fast.py "$@" --data-path "$features" --resume auto
  [ -z "$dry_run" ] || WORLD_SIZE=8 python train_fast.py "$@" --data-path "$features" --resume auto --dry-run
}

# Sample 50,000 images of the given checkpoints, with the flags behind them, to samples/$name.
sample() {
  run "${launch[@]}" sample_ddp.py --ckpt "$@" --name "$name"
}

if [ "$experiment" = published ]; then
  # The two samplers whose scores SiT publishes.
  name=$kind-$size-published-sde
  sample "$pretrained" "${process[@]}" "${sampler[@]}"
  name=$kind-$size-published-ode
  sample "$pretrained" "${process[@]}" --sampler dopri5
  run python evaluator.py data/VIRTUAL_imagenet256_labeled.npz samples/$kind-"$size"-published-{sde,ode}/samples.npz
  exit
fi

run "${launch[@]}" extract_features.py --data-path data/imagenet/train --features-path "$features"

# Set the checkpoints to sample with, and the name of the samples.
case $experiment in
  pretraining)
    name=DiT-$size-${steps%000000}M
    train --model "DiT-$size/2" --max-steps "$steps" --prefix "$name" --ckpt-every 50000 --keep 2
    checkpoints=("outputs/$name/checkpoints/$steps.pt") ;;
  continued)
    name=$kind-$size-continued-100K
    train --model "DiT-$size/2" "${process[@]}" --load-weight "$pretrained" --epochs 20 --prefix "$name" \
      --ckpt-every 50000
    checkpoints=("outputs/$name/checkpoints/0100000.pt") ;;
  4-*)
    name=Remix$kind-$size-$experiment-100K
    train --model "RemixDiT-$size/2" "${process[@]}" --n-basis 4 --n-experts "${experiment#4-}" \
      --load-weight "$pretrained" --epochs 20 --prefix "$name" --ckpt-every 50000
    checkpoints=("outputs/$name/checkpoints/0100000.pt") ;;
  independent)
    name=DiT-$size-independent-8
    train --model "DiT-$size/2" --load-weight "$pretrained" --independent 8 --max-steps 100000 \
      --prefix "DiT-$size-expert"
    checkpoints=("outputs/DiT-$size-expert-"?/checkpoints/0012500.pt) ;;
esac

sample "${checkpoints[@]}" "${sampler[@]}"
run python evaluator.py data/VIRTUAL_imagenet256_labeled.npz "samples/$name/samples.npz"

if [ "$experiment" = pretraining ]; then
  run install -D "${checkpoints[0]}" "$pretrained"
fi
