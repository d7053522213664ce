#!/usr/bin/env bash
# torch 2.8.0: fully_shard (FSDP2) of a model on two CPU processes of the backend gloo.
#
# Expected: as with NCCL, and as with DistributedDataParallel on gloo, the gradients are the mean over the processes.
# Behaviour: they are the sum, twice the mean. There is no warning or error. torch 2.9.0 gives the mean.
# Output seen:
#     torch 2.8.0+cu128: gradient of the mean 1.500, DistributedDataParallel 1.500, fully_shard 3.000
# Exits with 0 while this is so, and with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.8.0 numpy==2.3.5
cd "$folder"
cat > two.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()


def gradient(wrap):
    """Return the gradient of w x for the inputs 1 and 2 of the processes."""
    model = nn.Linear(1, 2, bias=False)
    nn.init.ones_(model.weight)
    model = wrap(model)
    model(torch.full((1, 1), rank + 1.0)).sum().backward()
    (parameter,) = model.parameters()
    value = parameter.grad
    return (value.full_tensor() if hasattr(value, "full_tensor") else value)[0, 0].item()


averaged = gradient(DistributedDataParallel)
sharded = gradient(lambda model: fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,))))
if rank == 0:
    print(
        f"torch {torch.__version__}: gradient of the mean 1.500, DistributedDataParallel {averaged:.3f}, "
        f"fully_shard {sharded:.3f}"
    )
dist.destroy_process_group()
raise SystemExit((averaged, sharded) != (1.5, 3.0))
PYTHON
OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 two.py
