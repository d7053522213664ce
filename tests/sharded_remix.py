"""The checks of mixing/test_fsdp.py that run in two processes: sharded_remix.py FOLDER KIND RANK CHECK ..."""

import copy
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import relative
from safetensors.torch import load_file
from test_any_transformer import make, randomize, sample
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


def check_folding(remix: Remix, arguments: dict, shard, folder: Path):
    """Every process calls, and rank 0 gets what a whole Remix gives."""
    sharded, first = shard(copy.deepcopy(remix)), dist.get_rank() == 0
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
    write_experts(sharded, folder / "experts", lora=False)
    if first:
        expected = remix.expert(0)
        assert all(torch.equal(plain.state_dict()[key], value) for key, value in expected.state_dict().items())
        (file,) = (folder / "experts" / "expert0").glob("*.safetensors")
        written = load_file(file)
        assert all(torch.equal(written[key], value) for key, value in expected.state_dict().items() if key in written)
        assert len([*(folder / "experts").iterdir()]) == 5
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
    "steps": check_steps,
    "offload": check_offload,
    "precision": check_precision,
    "checkpoints": check_checkpoints,
    "folding": check_folding,
}


def main(folder: Path, kind: str, rank: int, checks: list[str]):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    remix, arguments = make(kind, rank=rank or None)
    shard = partial(fully_shard, mesh=mesh)
    sharded = shard(copy.deepcopy(remix))
    for _, layer in sharded.mixed():
        assert all(basis.placements[0].dim == 1 for basis in layer.bases())
    blocks = [name for name, m in sharded.backbone.named_modules() if hasattr(m, "unshard") and "." in name]
    assert len(blocks) == 2, blocks
    for name in checks:
        CHECKS[name](remix, arguments, shard, folder)
        if dist.get_rank() == 0:
            print(name, "passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
