"""The checks of mixing/test_stages.py that run in two processes: sharded_stages.py FOLDER."""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_remix import assert_near, whole
from test_any_transformer import tiny_wan, wan_arguments
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from interop.lora import write_stage_loras
from interop.wan import write_pair
from mixing.fsdp import fully_shard
from mixing.stage_rates import set_stage_rates
from remix import Remix


def make() -> tuple[Remix, dict]:
    torch.manual_seed(0)
    modules = [tiny_wan(num_layers=1).eval() for _ in range(2)]
    remix = Remix(modules, n_experts=4, rank=2, stages=[0, 500, 1000])
    for _, layer in remix.mixed():
        nn.init.normal_(layer.lora_B, std=0.1)
    return remix, wan_arguments(4)


def loss(model: nn.Module, arguments: dict, timestep: torch.Tensor, rank: int) -> torch.Tensor:
    """A sum over two samples, which have random weights of their own."""
    own = slice(2 * rank, 2 * rank + 2)
    out = model(**{key: value[own] for key, value in arguments.items()}, timestep=timestep[own]).sample
    return (out * torch.randn(4, *out.shape[1:], generator=torch.Generator().manual_seed(1))[own]).sum()


def gradients(remix: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: whole(p.grad).clone() for name, p in remix.named_parameters() if p.grad is not None}
    remix.zero_grad()
    return found


def check_rates_and_files(remix: Remix, sharded: Remix, folder: Path):
    """Steps with learning rates of the stages, and the LoRA files of the stages."""
    for model in (remix, sharded):
        optimizer = torch.optim.SGD([model.logits], lr=1.0)
        set_stage_rates(optimizer, model, [0.5, 2.0])
        model.logits.grad = torch.ones_like(model.logits)
        optimizer.step()
    assert torch.equal(whole(sharded.logits), remix.logits)
    write_stage_loras(sharded, folder / "sharded", dtype=torch.float32)
    if dist.get_rank() == 0:
        write_stage_loras(remix, folder / "whole", dtype=torch.float32)
        for stage in ("low_noise", "high_noise"):
            files = [safe_open(folder / f"{name}_{stage}.safetensors", "pt") for name in ("sharded", "whole")]
            assert files[0].metadata() == files[1].metadata()
            assert [*files[0].keys()] == [*files[1].keys()]
            assert all(torch.equal(*(file.get_tensor(key) for file in files)) for key in files[0].keys())  # noqa: SIM118


def check_pair(remix: Remix, sharded: Remix, folder: Path):
    """The pair of a sharded Remix."""
    write_pair(sharded, folder / "pair")
    index = json.loads((folder / "pair" / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.5
    for part, experts in (("transformer", [0, 0, 1, 1]), ("transformer_2", [1, 1, 0, 0])):
        state = load_file(folder / "pair" / part / "diffusion_pytorch_model.safetensors")
        expected = remix.merge(experts).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    remix, arguments = make()
    # The processes have samples of other stages; of both; and of one.
    cases = {"other": [100.0, 300, 600, 900], "both": [100.0, 900, 300, 600], "one": [600.0, 900, 700, 800]}
    distributed = DistributedDataParallel(copy.deepcopy(remix))
    sharded = fully_shard(copy.deepcopy(remix))
    for name, levels in cases.items():
        timestep = torch.tensor(levels)
        (loss(remix, arguments, timestep, 0) + loss(remix, arguments, timestep, 1)).mul(0.5).backward()
        expected = gradients(remix)
        assert len(expected) == 1 + 2 * len(remix.mixed())
        loss(distributed, arguments, timestep, rank).backward()
        assert_near(gradients(distributed.module), expected, 1e-6)
        if name == "other":
            try:
                sharded(**arguments, timestep=timestep[2 * rank].expand(4))
                raise AssertionError("not refused")
            except ValueError as error:
                assert "need samples of the same stages on every process" in str(error)
            continue
        loss(sharded, arguments, timestep, rank).backward()
        assert_near(gradients(sharded), expected, 1e-6)
    plain = sharded.expert(0)
    sharded.fold_(plain, 3)
    if rank == 0:
        theirs = remix.expert(3).state_dict()
        assert all(torch.allclose(value, theirs[key]) for key, value in plain.state_dict().items())
        print("ddp passed", "fsdp passed", flush=True)
    check_rates_and_files(remix, sharded, Path(sys.argv[1]))
    check_pair(remix, sharded, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
