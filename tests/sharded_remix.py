"""The checks of mixing/test_fsdp.py that run in two processes: sharded_remix.py FOLDER KIND RANK,... CHECK ..."""

import copy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from conftest import relative
from safetensors import safe_open
from test_any_transformer import LEVELS, make, randomize, sample
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from interop.expert_folder import write_experts
from mixing.fsdp import fully_shard
from remix import Remix


class Block(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x, t):
        return x + self.down((self.up(self.norm(x)) + t).tanh())


class Odd(nn.Module):
    """Two blocks of sizes that two processes cannot divide equally, which share a layer, and layers of one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(7, 7), nn.Linear(7, 7)
        self.last.weight = self.first.weight
        self.blocks = nn.ModuleList(Block(7, 13) for _ in range(2))
        self.blocks[1].down = self.blocks[0].down
        self.enable_gradient_checkpointing()

    def enable_gradient_checkpointing(self, function=lambda block, *args: block(*args)):
        self.run = function

    def forward(self, hidden_states, timestep):
        x = self.first(hidden_states)
        for block in self.blocks:
            x = self.run(block, x, timestep.to(x.dtype).view(-1, 1, 1))
        return SimpleNamespace(sample=self.last(x))


def make_odd(rank: int | None, **options) -> Remix:
    torch.manual_seed(0)
    layers = ["blocks.*.up", "blocks.*.down"]
    remix = Remix(Odd(), layers, 3, 4, timestep="timestep", highest_level=1, rank=rank, **options)
    return randomize(remix)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss(remix: Remix, arguments: dict, samples: range) -> torch.Tensor:
    """A sum over samples, which have random weights of their own."""
    positions = ("img_ids", "txt_ids")
    parts = {k: v if k in positions else v[samples.start : samples.stop] for k, v in arguments.items()}
    groups = {} if remix.rank else {"groups": len(samples)}
    out = remix(**parts, **groups).sample.float()
    weights = torch.randn(4, *out.shape[1:], generator=torch.Generator().manual_seed(1))
    return (out * weights[samples.start : samples.stop]).sum() + 0.1 * remix.prior_loss()


def own_samples() -> range:
    return range(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


def gradients(remix: Remix, arguments: dict, samples: range | None = None) -> dict[str, torch.Tensor]:
    """The gradients of the mean over both processes; those of the whole model without `samples`."""
    remix.zero_grad()
    if samples is None:
        (loss(remix, arguments, range(2)) + loss(remix, arguments, range(2, 4))).mul(0.5).backward()
    else:
        loss(remix, arguments, samples).backward()
    return {name: whole(p.grad).clone() for name, p in remix.named_parameters() if p.grad is not None}


def assert_near(actual: dict, expected: dict, tolerance: float):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error, largest = (actual[name] - value).abs().max().item(), value.abs().max().item()
        assert error <= tolerance * max(largest, 1e-3), (name, error, largest)


def parameters(remix: Remix) -> dict[str, torch.Tensor]:
    for module in remix.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {name: whole(p.detach()).clone() for name, p in remix.named_parameters()}


def check_gradients(remix: Remix, arguments: dict, shard, folder: Path):
    """Gradients and their norm are those of one process, with gradient checkpointing too."""
    expected = gradients(remix, arguments)
    for checkpointed in (False, True):
        sharded = shard(copy.deepcopy(remix))
        if checkpointed:
            sharded.enable_gradient_checkpointing()
        found = gradients(sharded, arguments, own_samples())
        assert_near(found, expected, 1e-6 if not checkpointed else 2e-6)
    norms = [whole(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)).item() for model in (sharded, remix)]
    assert abs(norms[0] - norms[1]) <= 1e-5 * norms[1]


def check_accumulation(remix: Remix, arguments: dict, shard, folder: Path):
    """Gradients that are averaged over the processes after the last of several backward passes."""
    remix.zero_grad()
    sum(loss(remix, arguments, range(i, i + 1)) for i in range(4)).mul(0.5).backward()
    expected = {name: p.grad.clone() for name, p in remix.named_parameters() if p.grad is not None}
    sharded = shard(copy.deepcopy(remix))
    for i in own_samples():
        sharded.set_requires_gradient_sync(i % 2 == 1)
        loss(sharded, arguments, range(i, i + 1)).backward()
    assert_near({name: whole(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}, expected, 2e-6)


def check_compiled(remix: Remix, arguments: dict, shard, folder: Path):
    expected = gradients(remix, arguments)
    sharded = shard(copy.deepcopy(remix))
    sharded.compile(backend="aot_eager")
    assert_near(gradients(sharded, arguments, own_samples()), expected, 2e-6)


def check_average(remix: Remix, arguments: dict, shard, folder: Path):
    """diffusers' EMAModel averages the parts of each process."""
    from diffusers.training_utils import EMAModel

    models = [copy.deepcopy(remix), shard(copy.deepcopy(remix))]
    averages = [EMAModel(model.parameters(), decay=0.5, min_decay=0.5) for model in models]
    for _ in range(2):
        for model, average in zip(models, averages, strict=True):
            gradients(model, arguments, own_samples() if model is models[1] else None)
            torch.optim.SGD(model.parameters(), lr=1e-2).step()
            average.step(model.parameters())
    for model, average in zip(models, averages, strict=True):
        average.copy_to(model.parameters())
    assert_near(parameters(models[1]), parameters(models[0]), 1e-6)
    plain = models[1].expert(1)
    if plain is not None:
        torch.testing.assert_close(plain.state_dict(), models[0].expert(1).state_dict())


def check_steps(remix: Remix, arguments: dict, shard, folder: Path):
    """The parameters after three steps are those of one process."""
    for make_optimizer, lr, tolerance in ((torch.optim.SGD, 1e-4, 1e-6), (torch.optim.AdamW, 1e-3, None)):
        reference, sharded = copy.deepcopy(remix), shard(copy.deepcopy(remix))
        optimizers = [make_optimizer(model.parameters(), lr=lr) for model in (reference, sharded)]
        for _ in range(3):
            gradients(reference, arguments)
            gradients(sharded, arguments, own_samples())
            for optimizer in optimizers:
                optimizer.step()
        found, expected = parameters(sharded), parameters(reference)
        if tolerance:
            assert_near(found, expected, tolerance)
            continue
        # Gradients of rounding errors only are turned into full steps.
        large = {name: p.grad.abs() > 1e-4 * p.grad.abs().max() for name, p in reference.named_parameters()}
        for name, value in expected.items():
            error = (found[name] - value).abs()[large[name]]
            assert not error.numel() or error.max() <= 0.01 * lr, (name, error.max())


def check_offload(remix: Remix, arguments: dict, shard, folder: Path):
    offloaded = partial(shard, offload_policy=CPUOffloadPolicy(pin_memory=False))
    check_gradients(remix, arguments, offloaded, folder)
    check_steps(remix, arguments, offloaded, folder)


def check_precision(remix: Remix, arguments: dict, shard, folder: Path):
    """Under a policy of bf16, gradients are as near to those of float32 as under autocast, and times are exact."""
    expected = gradients(remix, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = gradients(remix, arguments)
    sharded = shard(copy.deepcopy(remix), mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    arrived = []
    sharded.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: arrived.append((kwargs["timestep"], kwargs["hidden_states"])), with_kwargs=True
    )
    found = gradients(sharded, arguments, own_samples())
    for timestep, hidden in arrived:
        assert (timestep.dtype, hidden.dtype) == (torch.float32, torch.bfloat16)
    errors = [relative(grads["coefficients.logits"], expected["coefficients.logits"]) for grads in (found, autocast)]
    if dist.get_rank() == 0:
        print("error of the gradient of the logits, with a policy of bf16 and with autocast:", errors)
    assert errors[0] <= max(1.5 * errors[1], 0.05), errors
    part = "lora_B" if remix.rank else "attn.to_q.weight"
    bases = [name for name, value in expected.items() if name.endswith(part) and value.any()]
    for name in bases:
        errors = [relative(grads[name], expected[name]) for grads in (found, autocast)]
        assert errors[0] <= max(1.5 * errors[1], 0.05), (name, errors)


def check_checkpoints(remix: Remix, arguments: dict, shard, folder: Path):
    """Full and sharded state dicts, and resuming."""
    sharded, other = shard(copy.deepcopy(remix)), shard(randomize(copy.deepcopy(remix)))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (sharded, other)]

    def step(model, optimizer):
        gradients(model, arguments, own_samples())
        optimizer.step()

    step(sharded, optimizers[0])
    model, state = get_state_dict(sharded, optimizers[0])
    checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder / "dcp")
    step(sharded, optimizers[0])
    model, state = get_state_dict(other, optimizers[1])
    checkpoint.load({"model": model, "optimizer": state}, checkpoint_id=folder / "dcp")
    set_state_dict(other, optimizers[1], model_state_dict=model, optim_state_dict=state)
    step(other, optimizers[1])
    for (name, ours), theirs in zip(parameters(other).items(), parameters(sharded).values(), strict=True):
        assert torch.equal(ours, theirs), name
    # A full state dict is that of a whole Remix.
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    single = copy.deepcopy(remix)
    single.load_state_dict(full)
    values = parameters(sharded)
    assert all(torch.equal(p, values[name]) for name, p in single.named_parameters())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, remix.state_dict() if dist.get_rank() == 0 else {}, options=options)
    assert all(torch.equal(value, remix.get_parameter(name)) for name, value in parameters(other).items())


def read(path: Path) -> str | tuple:
    """The content of a file. In one of safetensors, the order of the header's entries is random."""
    if path.suffix != ".safetensors":
        return path.read_text()
    with safe_open(path, framework="pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return file.metadata(), {key: (value.dtype, value.tolist()) for key, value in values.items()}


def check_folding(remix: Remix, arguments: dict, shard, folder: Path):
    """Every process calls, and rank 0 gets what a whole Remix gives."""
    remix, first = copy.deepcopy(remix), dist.get_rank() == 0
    if remix.rank:
        remix.freeze_shared()
    sharded = shard(copy.deepcopy(remix))
    loss(sharded, arguments, own_samples())  # leaves the root gathered
    assert torch.allclose(sharded.coefficients(), remix.coefficients())
    for ours, theirs in zip(sharded.distances(), remix.distances(), strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = sharded.expert(3)
    assert (plain is not None) == first
    models = [(plain, remix.expert(3)), (sharded.merge(), remix.merge())]
    if first:
        for ours, theirs in models:
            assert type(ours) is type(theirs)
            for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, msg=name)
            with torch.no_grad():
                one = sample(arguments, 1)
                torch.testing.assert_close(ours(**one).sample, theirs(**one).sample)
    sharded.fold_(plain, 0)
    for lora in (False, True) if remix.rank and hasattr(remix.backbone, "load_lora_adapter") else (False,):
        folders = [folder / f"{name}{lora}" for name in ("sharded", "whole")]
        write_experts(sharded, folders[0], lora)
        if first:
            write_experts(remix, folders[1], lora)
            files = [{path.relative_to(root): read(path) for path in root.rglob("*.*")} for root in folders]
            assert files[0] == files[1]
            assert {path.parts[0].split(".")[0] for path in files[0]} == {*(f"expert{i}" for i in range(4)), "experts"}
    if first:
        expected = remix.expert(0)
        assert all(torch.equal(plain.state_dict()[key], value) for key, value in expected.state_dict().items())
    try:
        from sampling.experts import FoldedRemix

        FoldedRemix(sharded)
        raise AssertionError("not refused")
    except ValueError as error:
        assert "a sharded Remix cannot be folded in place" in str(error)
    if sharded.rank is None:
        try:
            sharded(**arguments)
            raise AssertionError("not refused")
        except ValueError as error:
            assert "a sharded Remix needs groups" in str(error)


CHECKS = {
    "gradients": check_gradients,
    "accumulation": check_accumulation,
    "compiled": check_compiled,
    "average": check_average,
    "steps": check_steps,
    "offload": check_offload,
    "precision": check_precision,
    "checkpoints": check_checkpoints,
    "folding": check_folding,
}


def main(folder: Path, kind: str, ranks: list[int], checks: list[str]):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    shard = partial(fully_shard, mesh=init_device_mesh("cpu", (2,)))
    for rank in ranks:
        if kind == "odd":
            remix, arguments = make_odd(rank or None), dict(hidden_states=torch.randn(4, 5, 7), timestep=LEVELS)
        else:
            remix, arguments = make(kind, rank=rank or None)
            sharded = shard(copy.deepcopy(remix))
            for _, layer in sharded.mixed():
                assert all(basis.placements[0].dim == 1 for basis in layer.bases())
            blocks = [name for name, m in sharded.backbone.named_modules() if hasattr(m, "unshard") and "." in name]
            assert len(blocks) == 2, blocks
        for name in checks:
            CHECKS[name](remix, arguments, shard, folder / str(rank))
            if dist.get_rank() == 0:
                print(name, "passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(rank) for rank in sys.argv[3].split(",")], sys.argv[4:])
