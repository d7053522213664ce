#!/usr/bin/env bash
# Start torchrun on one node or several. A signal lets the run finish its step and save a checkpoint, without a time limit.
#
#   scripts/torchrun.sh train_fast.py --model RemixDiT-S/2 ...                       one node
#   NODES=4 HOST=node0 scripts/torchrun.sh train_fast.py --model RemixDiT-B/2 ...    the same line on each of four nodes
#
# Environment variables, with their defaults:
#   NODES (1)            number of nodes
#   HOST                 name of the first node; required for several nodes
#   PORT (29500)         a free port on the first node
#   RUN_ID (remix-dit)   a name that no other run on the first node has
#   GPUS (8)             processes per node
#   RESTARTS (0)         how often torchrun restarts a run after a process has died; the run needs --resume auto

set -euo pipefail
# Job control gives torchrun a process group of its own, so that Ctrl-C reaches only this script.
set -m
if [ "${NODES:-1}" = 1 ]; then
  meet=(--standalone)
else
  meet=(--rdzv_backend=c10d --rdzv_endpoint="${HOST:?the first node}:${PORT:-29500}" --rdzv_id="${RUN_ID:-remix-dit}")
  # torchrun's agents can only restart the processes if each restart has a store of its own.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
torchrun --nnodes="${NODES:-1}" --nproc_per_node="${GPUS:-8}" --max-restarts="${RESTARTS:-0}" "${meet[@]}" "$@" &
agent=$!

# Send SIGUSR1 to the training processes, not to torchrun: torchrun kills after 30 seconds, too soon for a large checkpoint.
waiting=1
trap 'waiting=1; pkill -USR1 -P "$agent" || true' USR1 TERM INT
# A signal interrupts `wait` while torchrun is still running, so wait again.
while [ -n "$waiting" ]; do
  waiting=
  wait "$agent" && code=0 || code=$?
done
exit "$code"
