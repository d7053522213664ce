#!/usr/bin/env bash
# GPU benchmarks: run the tests of the fast paths on a GPU, then measure training, sampling, data, extraction and evaluation.
#
#   benchmarks/gpu.sh                   all stages, about 25 minutes on an H200 (an estimate); results go to benchmarks/results/
#   OUT=/tmp/x benchmarks/gpu.sh b s    some stages, with another folder for the results: checks, b, s, xl, sampling, path
#
# In a copy without .git, set COMMIT in the environment. Needs torch, torchvision and timm. The stage `checks` also needs
# pytest, and `path` needs diffusers and scipy.

set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
[ $# -gt 0 ] || set -- checks b s xl sampling path

training() {
  python benchmarks/benchmark.py --out "$OUT" --parts training --steps 5 "$@"
}

failed=0
for stage in "$@"; do
  case $stage in
    # The compiled, fused and bf16 paths equal the plain ones, never wait for the device, and compile once.
    checks)
      python -m pytest tests/test_grouped_linear.py tests/test_trainer.py tests/test_remix.py tests/test_models.py \
        -q -p no:cacheprovider 2>&1 | tee "$OUT/gpu-checks.txt" || failed=1 ;;
    b)
      training --model B/2 --batch-size 256 --experts-per-batch 4 8
      training --model B/2 --batch-size 32 --experts-per-batch 4 8 --skip-usual ;;
    s)
      training --model S/2 --batch-size 256 --experts-per-batch 1 8 --skip-usual
      training --model S/2 --batch-size 240 --experts-per-batch 20 --skip-usual ;;
    xl) training --model XL/2 --batch-size 128 --experts-per-batch --skip-usual ;;
    sampling)
      python benchmarks/benchmark.py --out "$OUT" --parts sampling --model B/2 --batch-size 64 --sampling-steps 25 --name gpu-sampling ;;
    path) python benchmarks/benchmark.py --out "$OUT" --parts data extraction evaluator --name gpu-path ;;
    *)
      echo "unknown stage $stage" >&2
      exit 2 ;;
  esac
done
exit "$failed"
