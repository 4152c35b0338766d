"""What the conformance suite does not reach of the fused ops' plumbing."""

import pytest
import torch

import p3d_kernels as p3d
from p3d_kernels import Norm, _backends, ops


def test_compiled_gradients_with_one_norm_without_parameters(triton_backend):
    """The registered op passes the norms' parameters as a list: a missing one must not take the others' gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 2, 5, 5)
    w_s, w_t = torch.randn(8, 4, 1, 3, 3, requires_grad=True), torch.randn(8, 8, 3, 1, 1, requires_grad=True)
    weight, bias = torch.rand(8, requires_grad=True), torch.randn(8, requires_grad=True)

    def step():
        return ops.pseudo3d_conv(x, w_s, Norm(weight, bias), w_t, Norm(), kind="C").square().sum()

    parameters = [w_s, w_t, weight, bias]
    eager = torch.autograd.grad(step(), parameters)
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(), parameters)
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a, b)


@pytest.fixture
def triton_backend():
    with p3d.use_backend("triton"):
        why = _backends.why_not("triton", torch.empty(1))
        if why:
            pytest.skip(why)
        yield
