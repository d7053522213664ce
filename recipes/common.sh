# Sourced by the recipes: their commands as they stand, each printed before it runs.
#
#   recipes/S-4-20.sh              run it; started again, it goes on with what is missing
#   recipes/S-4-20.sh --dry-run    print the commands and what each training takes; needs no GPU and no data
#
# The hours that they expect are floating-point operations (of training: --dry-run's; of sampling: 250 steps with guidance, and the
# VAE's) over 30 % of the peak of 8 A100 (312 TFLOP/s in bf16, 156 in TF32): an assumption, above what narrow models (S) reach.
# Encoding ImageNet, once for all recipes, is about 0.5 hours by the same rule, if the images can be read as fast.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -gt 1 ] || { [ $# = 1 ] && [ "$1" != --dry-run ]; }; then
  echo "usage: $0 [--dry-run]" >&2
  exit 2
fi
[ $# = 1 ] && dry_run=1 || dry_run=

torchrun() {
  echo "\$ torchrun $*"
  if [ -z "$dry_run" ]; then
    command torchrun "$@"
  elif [ "$3" = train_fast.py ]; then
    WORLD_SIZE=${2#--nproc_per_node=} command python "${@:3}" --dry-run
  fi
}

install() {
  echo "\$ install $*"
  [ -n "$dry_run" ] || command install "$@"
}

python() {
  echo "\$ python $*"
  [ -n "$dry_run" ] || command python "$@"
}
