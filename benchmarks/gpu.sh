#!/usr/bin/env bash
# GPU benchmarks: run the tests of the fast paths on a GPU, then measure training, sampling, data, extraction and evaluation.
#
#   benchmarks/gpu.sh                   the stages for one GPU, and those for several if there are several
#   OUT=/tmp/x benchmarks/gpu.sh b s    some stages, with another folder for the results
#   python benchmarks/table.py          the table of training speeds from the results
#
# Stages for one GPU: checks, s, b, l, xl, sampling, path. For all GPUs of this machine: s-all, b-all, l-all, xl-all.
# A measurement that fails, for example because the memory is too small, does not end the others. They are listed at the
# end, and the exit code is then 1. In a copy without .git, set COMMIT in the environment. Needs torch. The
# stage `checks` also needs pytest, and `path` needs torchvision, diffusers and scipy. Compilation takes most of the time:
# each model of S/2 or B/2 takes about one minute, and each of XL/2 more than two.

set -uo pipefail
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-benchmarks/results}
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ $# -eq 0 ]; then
  set -- checks s b l xl sampling path
  [ "$GPUS" -lt 2 ] || set -- "$@" s-all b-all l-all xl-all
fi
for stage in "$@"; do
  case $stage in
    checks | s | b | l | xl | sampling | path | s-all | b-all | l-all | xl-all) ;;
    *)
      echo "unknown stage $stage" >&2
      exit 2 ;;
  esac
done
mkdir -p "$OUT"

failed=()

run() {
  "$@" || failed+=("$*")
}

checks() {
  python -m pytest tests/mixing/test_grouped_linear.py tests/training/test_trainer.py tests/test_remix.py \
    tests/test_models.py tests/test_evaluator.py::test_an_exported_program_moves_to_a_device -vv -p no:cacheprovider 2>&1 | tee "$OUT/gpu-checks.txt"
}

measure() {
  run python benchmarks/benchmark.py --out "$OUT" "$@"
}

# Each command holds a DiT and the RemixDiTs on the GPU at the same time.
training() {
  measure --parts training --steps 5 --skip-usual --model "$@"
}

# On all GPUs: first with the bases on every GPU, then sharded. Their memory does not fit together for XL/2.
training_all() {
  measure_all --model "$1"
  measure_all --model "$1" --shard-bases
}

measure_all() {
  run torchrun --standalone --nproc_per_node="$GPUS" benchmarks/benchmark.py --out "$OUT" --parts training --steps 5 \
    --batch-size 32 --experts-per-batch 2 "$@"
}

for stage in "$@"; do
  case $stage in
    # The compiled, fused and bf16 paths equal the plain ones, never wait for the device, and compile once.
    checks) checks || failed+=(checks) ;;
    s)
      training S/2 --batch-size 32 --experts-per-batch 2 4
      training S/2 --batch-size 256 --experts-per-batch 1 8 16
      training S/2 --batch-size 240 --experts-per-batch 20 ;;
    b)
      training B/2 --batch-size 256 --experts-per-batch 4
      training B/2 --batch-size 256 --experts-per-batch 16
      training B/2 --batch-size 32 --experts-per-batch 2 4 ;;
    l)
      training L/2 --batch-size 32 --experts-per-batch 2
      training L/2 --batch-size 64 --experts-per-batch 4 ;;
    xl)
      training XL/2 --batch-size 32 --experts-per-batch 2
      training XL/2 --batch-size 128 --experts-per-batch ;;
    sampling)
      measure --parts sampling --model B/2 --batch-size 64 --sampling-steps 25 --name gpu-sampling ;;
    path) measure --parts data extraction evaluator --name gpu-path ;;
    s-all) training_all S/2 ;;
    b-all) training_all B/2 ;;
    l-all) training_all L/2 ;;
    xl-all) training_all XL/2 ;;
  esac
done

[ ${#failed[@]} -eq 0 ] && exit 0
printf 'failed: %s\n' "${failed[@]}" >&2
exit 1
