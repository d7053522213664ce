import pytest
import torch
from conftest import relative

from grouped_linear import batched_linear, choose_attention, grouped_linear, linear_per_group
from models import DiT_models

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cpu_and_gpu_kernels_agree(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 5, 32).to(dtype), torch.randn(3, 48, 32).to(dtype), torch.randn(3, 48).to(dtype)
    assert relative(batched_linear(x, weight, bias), grouped_linear(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_output_has_the_autocast_dtype(dtype):
    x, weight, bias = torch.randn(6, 5, 32), torch.randn(3, 48, 32), torch.randn(3, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = linear_per_group(x, weight, bias)
    assert (out.dtype, out.shape) == (dtype, (6, 5, 48))


def test_attention_is_fused_except_on_a_cpu():
    model = DiT_models["DiT-T/2"](input_size=8)
    fused = [block.attn.fused_attn for block in model.blocks]
    choose_attention(model, torch.device("cuda"))
    assert [block.attn.fused_attn for block in model.blocks] == fused
    choose_attention(model, torch.device("cpu"))
    assert not any(block.attn.fused_attn for block in model.blocks)
