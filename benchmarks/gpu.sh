#!/usr/bin/env bash
# What only a GPU can tell: whether the fast paths are right on it, then the figures that are to be reached there.
#
#   benchmarks/gpu.sh                   all of it, about 25 minutes on an H200; results go to benchmarks/results/
#   OUT=/tmp/x benchmarks/gpu.sh b s    some of it, into another folder: checks, b, s, xl, sampling, path
#
# Where there is no .git, COMMIT in the environment says what is measured. Needs torch, torchvision and timm; `checks` pytest as well, `path` diffusers and scipy.

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
    checks) # bf16, compiled, fused: against the slow path; no waiting, no second compilation
      python -m pytest tests/test_fast.py tests/test_models.py -q -p no:cacheprovider 2>&1 | tee "$OUT/gpu-checks.txt" || failed=1 ;;
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
      echo "unknown part $stage" >&2
      exit 2 ;;
  esac
done
exit "$failed"
