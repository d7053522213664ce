"""A Remix that is divided among processes by FSDP2, DDP and accelerate, and what cannot be divided."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, relative, run
from sharded_remix import make_odd
from test_any_transformer import LEVELS
from test_low_rank import SIGMA, Scaled, Tiny, quantize, wrap
from torch import nn

from mixing.fsdp import fully_shard
from remix import Remix

SHARDED, ACCELERATED = ROOT / "tests" / "sharded_remix.py", ROOT / "tests" / "accelerated_remix.py"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "rank 2"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_a_sharded_remix_equals_that_of_one_process(kind, rank, tmp_path):
    """Gradients, steps, CPU offload, a policy of bf16, checkpoints of torch.distributed and folded experts."""
    checks = ("gradients", "steps", "offload", "precision", "checkpoints", "folding")
    printed = run(SHARDED, tmp_path / "files", kind, rank, *checks, processes=2).stdout
    assert all(f"{name} passed" in printed for name in checks)


@pytest.mark.parametrize(
    "checks",
    [
        ("gradients", "accumulation", "folding"),
        pytest.param(("steps", "offload", "compiled", "average"), marks=pytest.mark.slow),
    ],
    ids=",".join,
)
def test_layers_of_odd_sizes_and_those_of_several_blocks_are_sharded(checks, tmp_path):
    """Whole bases and pairs, in one run."""
    printed = run(SHARDED, tmp_path / "files", "odd", "0,2", *checks, processes=2).stdout
    assert all(printed.count(f"{name} passed") == 2 for name in checks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_accelerate_prepares_a_remix(kind):
    pytest.importorskip("accelerate")
    assert f"{kind} passed" in run(ACCELERATED, kind, processes=2).stdout


@pytest.mark.slow
def test_the_ema_of_diffusers_averages_a_remix():
    training_utils = pytest.importorskip("diffusers.training_utils")
    remix, x = wrap(Tiny()), torch.randn(4, 5, 6)
    ema = training_utils.EMAModel(remix.parameters(), decay=0.5, use_ema_warmup=False, min_decay=0.5)
    before = copy.deepcopy(remix)
    with torch.no_grad():
        # The first step copies the parameters.
        for _ in range(2):
            for parameter in remix.parameters():
                parameter.add_(1)
            ema.step(remix.parameters())
        averaged = copy.deepcopy(remix)
        ema.copy_to(averaged.parameters())
        for parameter, old in zip(averaged.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(parameter, old + 1.5)
        assert averaged(x, SIGMA).isfinite().all()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_cannot_be_sharded_is_refused(one_process):
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as pytorch

    def refused(remix: nn.Module, message: str, **options):
        with pytest.raises(ValueError, match=message):
            fully_shard(remix, mesh=one_process, **options)

    refused(Tiny(), "fully_shard expects a Remix, but got a Tiny: use PyTorch's fully_shard")
    refused(wrap(Tiny()), r"blocks: nothing matches 'blocks\.\*' in Tiny", blocks=["blocks.*"])
    refused(wrap(Tiny()), r"blocks must be a list of names of modules, but it is 'blocks\.\*'", blocks="blocks.*")
    refused(make_odd(2), "blocks: blocks is a ModuleList, which is not called: name the modules in it", blocks=["*"])
    message = r"FSDP cannot train a\.lora_A in torch\.float32 with a\.linear\.weight in torch\.bfloat16: freeze what is"
    refused(wrap(Tiny().bfloat16()), message)
    remix = wrap(Tiny(Scaled))
    pytorch(remix.backbone, mesh=one_process)
    refused(remix, "the Remix, or a part of it, is sharded already")
    with pytest.raises(ValueError, match=r"not sharded by mixing\.fsdp\.fully_shard: load its full state dict"):
        remix.expert(0)
    whole = Remix(Tiny(), ["a", "b"], 2, 4, timestep="sigma", highest_level=1)
    pytorch(whole, mesh=one_process, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with pytest.raises(TypeError, match=r"must be float32, but their logits were cast to torch\.bfloat16"):
        whole(torch.randn(4, 5, 6), SIGMA, groups=4)
    module = Tiny()
    pytorch(module.a, mesh=one_process)
    for rank in (None, 2):
        with pytest.raises(ValueError, match="the module is sharded already: wrap it first, then shard its Remix"):
            wrap(module, rank=rank)


@pytest.mark.parametrize("rank", [None, 2])
def test_blocks_inside_blocks_are_gathered_alone_and_logits_stay_in_float32(rank, one_process):
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    remix, x = make_odd(rank), torch.randn(4, 5, 7)
    expected = remix(x, LEVELS, groups=4).sample
    blocks = ["blocks.*", "blocks.*.up"]
    sharded = fully_shard(copy.deepcopy(remix), blocks, one_process)
    names = {name for name, part in sharded.backbone.named_modules() if isinstance(part, FSDPModule)}
    inside = {"blocks.0", "blocks.0.up", "blocks.0.down", "blocks.1", "blocks.1.up"}
    assert names == {"", *inside}
    torch.testing.assert_close(sharded(x, LEVELS, groups=4).sample, expected)
    policy = MixedPrecisionPolicy(torch.bfloat16)
    rounded = fully_shard(copy.deepcopy(remix), blocks, one_process, policy)(x, LEVELS, groups=4).sample
    assert 0 < relative(rounded.float(), expected) < 0.02
    halved = fully_shard(copy.deepcopy(remix), mesh=one_process).to(torch.bfloat16)
    assert halved.backbone.blocks[0].up.bases()[0].dtype == torch.bfloat16
    assert halved.coefficients().dtype == torch.float32
    rounded = halved(x.bfloat16(), LEVELS, groups=4).sample
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float(), expected) < 0.02


def test_quantized_weights_are_not_sharded(one_process):
    module = Tiny(width=64).bfloat16().requires_grad_(False)
    quantize(module, "torchao int8")
    with pytest.raises(ValueError, match=r"quantized weights such as backbone\.a\.linear\.weight cannot be sharded"):
        fully_shard(wrap(module), mesh=one_process)
