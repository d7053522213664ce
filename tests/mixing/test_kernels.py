"""The Triton kernels. On a CPU they run in Triton's interpreter; test_grouped_linear.py runs them on a GPU."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")

# The interpreter is selected before Triton is imported, and for a whole process.
PROGRAM = """
import json, sys
import torch
from mixing import kernels

# PyTorch accepts only kernels that are not interpreted.
kernels.wrap_triton = lambda kernel: kernel

def errors(groups, n_basis, shape, dtype, accurate):
    torch.manual_seed(0)
    alpha = torch.rand(groups, n_basis, dtype=accurate)
    bases = torch.randn(shape, dtype=accurate) + 1e-3 * torch.randn(n_basis, *shape, dtype=accurate)
    grads = torch.randn(groups, *shape, dtype=dtype)
    results = kernels.mix(alpha, bases, accurate), *kernels.mix_backward(alpha, grads, bases)
    assert [result.dtype for result in results] == [accurate] * 3
    # The interpreter does not round to the nearest number.
    rounded = kernels.mix(alpha, bases, dtype)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.to(accurate), results[0], rtol=torch.finfo(dtype).eps, atol=1e-7)
    # The differences of the gradients of alpha are those that matter.
    results = [*results, results[1] - results[1][:, :1]]
    alpha, bases, grads = alpha.double(), bases.double(), grads.double()
    products = torch.einsum("g...,k...->gk", grads, bases)
    expected = [
        torch.einsum("gk,k...->g...", alpha, bases),
        products,
        torch.einsum("gk,g...->k...", alpha, grads),
        products - products[:, :1],
    ]
    return [((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(results, expected)]

print(json.dumps([errors(*eval(case)) for case in json.loads(sys.argv[1])]))
"""
# Sizes that are no multiple of a block, and numbers of bases for which a thread takes fewer numbers of each.
CASES = {
    "(1, 1, (3,), torch.float32, torch.float32)": 1e-6,
    "(3, 4, (48, 33), torch.bfloat16, torch.float32)": 1e-6,
    "(16, 8, (19, 37), torch.float16, torch.float32)": 1e-6,
    "(2, 20, (7, 5), torch.float32, torch.float32)": 1e-6,
    "(5, 100, (7, 5), torch.float32, torch.float32)": 1e-6,
    "(2, 4, (48, 33), torch.float64, torch.float64)": 1e-14,
}


def test_mixtures_and_gradients_are_those_of_the_equations():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(CASES))]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for (case, tolerance), (*errors, difference) in zip(CASES.items(), json.loads(result.stdout), strict=True):
        assert max(errors) < tolerance, case
        # Differences of bases that are 1e-3 apart have 1000 times the relative error.
        assert difference < 1e4 * tolerance, case
