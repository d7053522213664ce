#!/usr/bin/env bash
# Start torchrun on this node, alone or as one of several, so that a signal stops the run in its own time.
#
#   scripts/torchrun.sh train_fast.py --model RemixDiT-S/2 ...                       one node
#   NODES=4 HOST=node0 scripts/torchrun.sh train_fast.py --model RemixDiT-B/2 ...    the same line on each of four
#
# HOST is the first node, PORT (29500) a free port there, RUN_ID (remix-dit) a name that no other run there has; GPUS (8) are
# the processes a node; RESTARTS (0) is how often torchrun brings back a run whose process died, if that has --resume auto.

set -euo pipefail
set -m # a group of its own for torchrun: Ctrl-C comes here alone
if [ "${NODES:-1}" = 1 ]; then
  meet=(--standalone)
else
  meet=(--rdzv_backend=c10d --rdzv_endpoint="${HOST:?the first node}:${PORT:-29500}" --rdzv_id="${RUN_ID:-remix-dit}")
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # the agents' restarts each need a store of their own
fi
torchrun --nnodes="${NODES:-1}" --nproc_per_node="${GPUS:-8}" --max-restarts="${RESTARTS:-0}" "${meet[@]}" "$@" &
agent=$!

# torchrun would pass a signal on and kill after 30 seconds what is not gone: too soon for a large checkpoint.
waiting=1
trap 'waiting=1; pkill -USR1 -P "$agent" || true' USR1 TERM INT
while [ -n "$waiting" ]; do # a signal ends the wait, not torchrun
  waiting=
  wait "$agent" && code=0 || code=$?
done
exit "$code"
