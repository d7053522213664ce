#!/usr/bin/env bash
# Run an experiment on ImageNet 256x256, from images or published latents to scores; the text below explains the arguments.

set -euo pipefail

usage() {
  cat <<'TEXT'
usage: recipes/run.sh SIZE RUN [--dry-run]

Run an experiment on ImageNet 256x256 with 8 GPUs: encode the images or download their latents, train, sample, and
compute the scores. Each command is printed before it runs. After an interruption, the same line resumes the experiment.

SIZE:
  S, B, L                       the paper's DiT-S/2, DiT-B/2, DiT-L/2 and the Remix-DiTs of these sizes
  SiT-S, SiT-B, SiT-L, SiT-XL   flows of these sizes, from the weights of SiT, which are downloaded
  LightningDiT-XL               from the weights of LightningDiT and its latents of ImageNet, which are downloaded
  DiTDH-XL                      from the weights of RAE, which are downloaded; the images are encoded by its autoencoder
RUN:
  pretraining    DiT from scratch, 2M steps for S and 1M for B and L; their other runs start from its weights
  published      the downloaded weights as they are, to compare with the published scores; not for S, B and L
  continued      baseline: the pretrained model, trained for 100k further steps
  4-8            Remix-DiT with K = 4 bases and N = 8 experts, 100k steps from the pretrained model
  4-20           Remix-DiT with K = 4 bases and N = 20 experts, 100k steps from the pretrained model
  independent    baseline: 8 independent experts, 12,500 steps each from the pretrained DiT; only for S, B and L

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

# The weights that all runs but pretraining start from: the paper's under the names that its README uses, and others on the
# Hugging Face hub. SiT is sampled with the SDE, which gives its best scores. The models of LightningDiT and RAE are
# sampled with their published settings, which are the defaults of sample_ddp.py for them.
# `file` is for reading the weights, `training` for training from them, and `sampling` for sampling any model of the size.
kind=DiT model=DiT-$size/2 features=data/imagenet_encoded file=() training=() sampling=() autoencoder=() images=()
case $size in
  S) steps=2000000 pretrained=pretrained/DiT_S_2_2M.pt ;;
  B | L) steps=1000000 pretrained=pretrained/DiT_${size}_2_1M.pt ;;
  SiT-S | SiT-B | SiT-L | SiT-XL)
    kind=SiT model=DiT-${size#SiT-}/2 file=(--process flow) training=(--process flow) sampling=(--sampler sde)
    pretrained=hf:nyu-visionx/SiT-collections/$size-2-256.pt ;;
  LightningDiT-XL)
    kind=LightningDiT model=LightningDiT-XL/1 training=(--recipe lightningdit)
    pretrained=hf:hustvl/lightningdit-xl-imagenet256-800ep/lightningdit-xl-imagenet256-800ep.pt
    autoencoder=(--vae REPA-E/vavae-hf --latent-stats hf:hustvl/vavae-imagenet256-f16d32-dinov2/latents_stats.pt)
    features=data/imagenet_vavae ;;
  DiTDH-XL)
    kind=DiTDH model=DiTDH-XL/1 training=(--recipe rae) sampling=(--labels equal)
    weights=hf:nyu-visionx/RAE-collections/DiTs/Dinov2/wReg_base/ImageNet256
    pretrained=$weights/DiTDH-XL/stage2_model.pt
    autoencoder=(--vae nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08
      --latent-stats hf:nyu-visionx/RAE-collections/stats/dinov2/wReg_base/imagenet1k/stat.pt)
    # In float32 and with mirror images, the features would take 2 TB.
    features=data/imagenet_rae images=("${autoencoder[@]}" --dtype float16 --no-mirror) ;;
  *) fail "unknown SIZE '$size', expected S, B, L, SiT-S, SiT-B, SiT-L, SiT-XL, LightningDiT-XL or DiTDH-XL" ;;
esac
case $size/$experiment in
  */continued | */4-8 | */4-20 | [SBL]/pretraining | [SBL]/independent | *-*/published) ;;
  [SBL]/*) fail "unknown RUN '$experiment' for $size, expected pretraining, continued, 4-8, 4-20 or independent" ;;
  *) fail "unknown RUN '$experiment' for $size, expected published, continued, 4-8 or 4-20" ;;
esac
size=${size##*-}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch=(torchrun --nnodes=1 --nproc_per_node=8)

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
  # The settings whose scores are published; each name says which.
  published() {
    name=$kind-$size-published-$1
    sample "$pretrained" "${file[@]}" "${autoencoder[@]}" "${@:2}"
    samples+=("samples/$name/samples.npz")
  }
  samples=()
  case $kind in
    SiT)
      echo "# FID of SiT-XL/2: 2.06 with the SDE, 2.15 with the ODE; of S, B and L none is published"
      published sde --sampler sde
      published ode --sampler dopri5 ;;
    LightningDiT)
      echo "# FID: 1.35 with guidance, 2.17 without"
      published guided
      published unguided --cfg-scale 1 ;;
    DiTDH)
      echo "# FID: 1.13 with guidance by DiTDH-S of 14 epochs"
      published guided "${sampling[@]}" --guide-ckpt "$weights/DiTDH-S_ep14/stage2_model.pt" ;;
  esac
  run python evaluator.py data/VIRTUAL_imagenet256_labeled.npz "${samples[@]}"
  exit
fi

if [ "$kind" = LightningDiT ]; then
  run hf download hustvl/imagenet256-latents-vave-f16d32-dinov2 --repo-type dataset --local-dir data/vavae
  # The folder gets its name when it is complete.
  if [ ! -e "$features" ]; then
    run mkdir -p "$features.incomplete"
    echo "\$ cat data/vavae/splits/split_* | tar -xzf - -C $features.incomplete"
    [ -n "$dry_run" ] || cat data/vavae/splits/split_* | tar -xzf - -C "$features.incomplete"
    run mv "$features.incomplete" "$features"
  fi
  training+=("${autoencoder[@]}")
else
  run "${launch[@]}" extract_features.py --data-path data/imagenet/train --features-path "$features" "${images[@]}"
fi

# Set the checkpoints to sample with, and the name of the samples.
case $experiment in
  pretraining)
    name=DiT-$size-${steps%000000}M
    train --model "$model" --max-steps "$steps" --prefix "$name" --ckpt-every 50000 --keep 2
    checkpoints=("outputs/$name/checkpoints/$steps.pt") ;;
  continued)
    name=$kind-$size-continued-100K
    train --model "$model" "${training[@]}" --load-weight "$pretrained" --epochs 20 --prefix "$name" \
      --ckpt-every 50000
    checkpoints=("outputs/$name/checkpoints/0100000.pt") ;;
  4-*)
    name=Remix$kind-$size-$experiment-100K
    train --model "Remix$model" "${training[@]}" --n-basis 4 --n-experts "${experiment#4-}" \
      --load-weight "$pretrained" --epochs 20 --prefix "$name" --ckpt-every 50000
    checkpoints=("outputs/$name/checkpoints/0100000.pt") ;;
  independent)
    name=DiT-$size-independent-8
    train --model "$model" --load-weight "$pretrained" --independent 8 --max-steps 100000 \
      --prefix "DiT-$size-expert"
    checkpoints=("outputs/DiT-$size-expert-"?/checkpoints/0012500.pt) ;;
esac

sample "${checkpoints[@]}" "${sampling[@]}"
run python evaluator.py data/VIRTUAL_imagenet256_labeled.npz "samples/$name/samples.npz"

if [ "$experiment" = pretraining ]; then
  run install -D "${checkpoints[0]}" "$pretrained"
fi
