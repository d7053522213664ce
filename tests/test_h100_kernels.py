"""The kernels that the compiler would write for mixed layers on a GPU. This needs no GPU."""

import math
import sys

import pytest
import torch
from conftest import ROOT, run

if not torch.__version__.startswith("2.11."):
    pytest.skip("needs the internals of PyTorch 2.11", allow_module_level=True)

sys.path.insert(0, str(ROOT / "benchmarks"))
from h100_kernels import compiled_graphs, layer_shape, mixed_layer_kernels

from grouped_linear import RECOMPUTED_GROUPS

CASES = [(size, n_basis, groups) for size in ("B/2", "XL/2") for n_basis in (4, 8) for groups in (1, 2, 4, 16)]
# The other cases take up to 30 seconds each.
QUICK = [("B/2", 4, 1), ("XL/2", 4, 2)]


@pytest.mark.parametrize(
    ("size", "n_basis", "groups"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_mixing_loads_the_bases_once_and_spreads_its_reductions(size, n_basis, groups):
    out_features, in_features = layer_shape(size, "fc1")
    graphs = mixed_layer_kernels(out_features, in_features, n_basis, groups, tokens=16)
    bases = n_basis, out_features, in_features
    assert math.prod(bases) <= graphs["forward"].numbers_loaded(bases) <= 1.1 * math.prod(bases)
    kernels = graphs["forward"].kernels + graphs["backward"].kernels
    # One product in the forward pass, and two in the backward pass.
    assert sum(kernel.kind == "extern_kernels.bmm" for kernel in kernels) == 3
    assert not any(kernel.starved for kernel in kernels)


def test_compiled_mixtures_of_many_groups_are_not_stored():
    """From RECOMPUTED_GROUPS groups on, the backward pass mixes the weights again, and gets no mixtures as inputs."""

    def backward_inputs(groups: int) -> list:
        graphs = mixed_layer_kernels(48, 32, n_basis=2, groups=groups, images=8, tokens=4)
        return list(graphs["backward"].inputs.values())

    assert (4, 48, 32) in backward_inputs(4)
    assert (RECOMPUTED_GROUPS, 48, 32) not in backward_inputs(RECOMPUTED_GROUPS)


def test_a_long_reduction_to_few_numbers_is_found():
    """The plain form of mixing: its backward pass reduces 2,359,296 numbers on 8 rows."""
    alpha, weight = torch.full((2, 4), 0.25, requires_grad=True), torch.randn(4, 3072, 768, requires_grad=True)
    graphs = compiled_graphs(
        lambda alpha, weight: (alpha[:, :, None, None] * weight).sum(1).bfloat16(), (alpha, weight)
    )
    assert any(kernel.starved for kernel in graphs["backward"].kernels)
    assert graphs["forward"].numbers_loaded((4, 3072, 768)) == 2 * weight.numel()


def test_error_for_another_version_of_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    assert "2.12.0 is installed" in run("benchmarks/h100_kernels.py", expect=2).stderr
