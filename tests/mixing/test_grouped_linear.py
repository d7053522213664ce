import pytest
import torch
from conftest import DEVICES, relative

from mixing import grouped_linear
from mixing.grouped_linear import (
    RECOMPUTED_GROUPS,
    linear_per_group,
    linear_per_group_backward,
    mixed_linear,
)

pytestmark = pytest.mark.usefixtures("exact_products")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random_layer(
    device: str,
    groups: int,
    n_basis: int,
    distance: float = 1.0,
    width: int = 32,
    out_features: int = 48,
    tokens: int = 5,
) -> tuple[torch.Tensor, ...]:
    """Return inputs x, pi, weight and bias of a mixed layer that require gradients, and a gradient of its output.

    Args:
        device: device of the tensors.
        groups: number of groups G; the batch has two samples for each.
        n_basis: number of bases K.
        distance: relative distance of the bases from each other.
        width: input channels.
        out_features: output channels.
        tokens: tokens per sample.
    """
    torch.manual_seed(0)
    # bf16 can represent x and the gradient, so that float64 and bf16 start from the same numbers.
    x = torch.randn(2 * groups, tokens, width).bfloat16().float()
    grad = torch.randn(2 * groups, tokens, out_features).bfloat16().float()
    pi = torch.randn(groups, n_basis)
    weight = torch.randn(out_features, width) + distance * torch.randn(n_basis, out_features, width)
    bias = torch.randn(out_features) + distance * torch.randn(n_basis, out_features)
    return *(tensor.to(device).requires_grad_() for tensor in (x, pi, weight, bias)), grad.to(device)


def reference(x, pi, weight, bias, grad) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the output and the gradients of a mixed layer from its equations, in float64."""
    x, pi, weight, bias = inputs = [tensor.detach().double().requires_grad_() for tensor in (x, pi, weight, bias)]
    theta = torch.einsum("gk,koi->goi", pi.softmax(1), weight)
    theta_bias = pi.softmax(1) @ bias
    parts = x.unflatten(0, (len(pi), -1))  # [G, B / G, tokens, in]
    out = (torch.einsum("gbti,goi->gbto", parts, theta) + theta_bias[:, None, None]).flatten(0, 1)
    return out, torch.autograd.grad(out, inputs, grad.double())


def mix_and_apply(x, pi, weight, bias):
    return mixed_linear(x, pi.softmax(1), weight, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 3, RECOMPUTED_GROUPS])
def test_output_and_gradients_are_those_of_the_equations(device, dtype, groups):
    *inputs, grad = random_layer(device, groups, n_basis=4)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = mix_and_apply(*inputs)
    gradients = torch.autograd.grad(out, inputs, grad.to(dtype))
    expected, expected_gradients = reference(*inputs, grad)
    assert out.dtype == dtype
    assert all(gradient.dtype == torch.float32 and gradient.is_contiguous() for gradient in gradients)
    assert relative(out, expected) < TOLERANCE[dtype]
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative(gradient, expected_gradient) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["grouped", "batched"])
@pytest.mark.parametrize("groups", [1, 3, RECOMPUTED_GROUPS])
def test_layers_without_biases_equal_those_with_zeros(device, on_cpu, groups, monkeypatch):
    monkeypatch.setattr(grouped_linear, "on_cpu", lambda tensor: on_cpu)
    x, pi, weight, bias, grad = random_layer(device, groups, n_basis=4)
    out = mix_and_apply(x, pi, weight, None)
    gradients = torch.autograd.grad(out, (x, pi, weight), grad)
    expected, expected_gradients = reference(x, pi, weight, torch.zeros_like(bias), grad)
    assert relative(out, expected) < 1e-5
    for gradient, expected_gradient in zip(gradients, expected_gradients[:3], strict=True):
        assert relative(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["grouped", "batched"])
def test_no_tokens_give_no_tokens(device, on_cpu, monkeypatch):
    monkeypatch.setattr(grouped_linear, "on_cpu", lambda tensor: on_cpu)
    *inputs, grad = random_layer(device, 2, n_basis=4, tokens=0)
    out = mix_and_apply(*inputs)
    assert out.shape == grad.shape == (4, 0, 48)
    assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(out, inputs, grad))


# The compiled layers take half a minute each. CI compiles that of 4 groups.
PRECISION_CASES = [(False, 4, 1), (False, 4, 4), (False, 8, 16)]
PRECISION_CASES += [pytest.param(True, *case, marks=pytest.mark.slow) for case in ((4, 1), (4, 4), (8, 16))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("compiled", "n_basis", "groups"), PRECISION_CASES)
def test_gradients_in_bf16_are_accurate_for_nearly_equal_bases(device, compiled, n_basis, groups):
    """The gradient of pi depends on the differences of the bases, which any product in bf16 would lose."""
    function = torch.compile(mix_and_apply, fullgraph=True, dynamic=False) if compiled else mix_and_apply
    for distance in (1e-3, 1e-4):
        *inputs, grad = random_layer(device, groups, n_basis, distance, width=192, out_features=256, tokens=16)
        with torch.autocast(device, torch.bfloat16):
            out = function(*inputs)
        gradients = torch.autograd.grad(out, inputs, grad.bfloat16())
        _, expected = reference(*inputs, grad)
        for name, gradient, value in zip(("x", "pi", "weight", "bias"), gradients, expected, strict=True):
            assert relative(gradient, value) < 0.01, f"{name}, bases {distance} apart"


@pytest.mark.parametrize("device", DEVICES)
def test_fixed_coefficients_have_no_gradient(device):
    """The one-hot mixer does not train its coefficients."""
    x, _, weight, bias, grad = random_layer(device, 2, n_basis=4)
    alpha = torch.eye(4, device=device)[[0, 3]]
    mixed_linear(x, alpha, weight, bias).backward(grad)
    assert alpha.grad is None
    unused = weight.grad[1:3]
    assert torch.equal(unused, torch.zeros_like(unused))
    assert weight.grad[[0, 3]].abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_mixtures_of_many_groups_are_not_stored(device):
    """From RECOMPUTED_GROUPS groups on, the backward pass mixes the weights again."""

    def stored_mixtures(groups: int) -> int:
        *inputs, _ = random_layer(device, groups, n_basis=2)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            mix_and_apply(*inputs)
        return shapes.count((groups, *inputs[2].shape[1:]))

    assert stored_mixtures(RECOMPUTED_GROUPS - 1) == 1
    assert stored_mixtures(RECOMPUTED_GROUPS) == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cpu_and_gpu_kernels_agree(dtype, monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 5, 32).to(dtype), torch.randn(3, 48, 32).to(dtype), torch.randn(3, 48).to(dtype)
    grad = torch.randn(6, 5, 48).to(dtype)
    results = []
    for is_cpu in (True, False):
        monkeypatch.setattr(grouped_linear, "on_cpu", lambda tensor, is_cpu=is_cpu: is_cpu)
        results.append([linear_per_group(x, weight, bias), *linear_per_group_backward(grad, x, weight)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours.float(), theirs.float()) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_contiguous_for_an_input_that_is_not(device):
    """torch.compile trusts the strides that the operator announces."""
    x = torch.randn(2, 8, 5, device=device).transpose(1, 2)
    weight, grad = torch.randn(2, 6, 8, device=device), torch.randn(2, 5, 6, device=device)
    assert all(gradient.is_contiguous() for gradient in linear_per_group_backward(grad, x, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [True, False])
def test_the_output_may_be_changed_in_place(device, biased):
    """As modules do with `x *= scale` and nn.SiLU(inplace=True)."""
    *inputs, grad = random_layer(device, 2, 3)
    inputs = inputs if biased else inputs[:3]

    def layer():
        return mix_and_apply(*inputs, *[] if biased else [None])

    out, expected = layer(), 2 * layer()
    out *= 2
    assert torch.equal(out, expected)
    for ours, theirs in zip(*(torch.autograd.grad(result, inputs, grad) for result in (out, expected)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_are_refused(device):
    x, *inputs, _ = random_layer(device, 2, 3)
    out = mix_and_apply(x, *inputs).square().sum()
    with pytest.raises(RuntimeError, match="whole bases have no second derivatives"):
        torch.autograd.grad(out, x, create_graph=True)
