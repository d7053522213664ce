"""A Remix that is divided among processes by FSDP2, DDP and accelerate, and what cannot be divided."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run
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


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    assert "gradients passed" in run(SHARDED, tmp_path / "files", "sd3", 2, "gradients", processes=2).stdout


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
    remix = wrap(Tiny(Scaled))
    pytorch(remix.backbone, mesh=one_process)
    refused(remix, "the Remix, or a part of it, is sharded already")
    with pytest.raises(ValueError, match=r"not sharded by mixing\.fsdp\.fully_shard: load its full state dict"):
        remix.expert(0)
    whole = Remix(Tiny(), ["a", "b"], 2, 4, timestep="sigma", highest_level=1)
    pytorch(whole, mesh=one_process, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with pytest.raises(TypeError, match=r"must be float32, but their logits were cast to torch\.bfloat16"):
        whole(torch.randn(4, 5, 6), SIGMA, groups=4)


def test_quantized_weights_are_not_sharded(one_process):
    module = Tiny(width=64).bfloat16().requires_grad_(False)
    quantize(module, "torchao int8")
    with pytest.raises(ValueError, match=r"quantized weights such as backbone\.a\.linear\.weight cannot be sharded"):
        fully_shard(wrap(module), mesh=one_process)
