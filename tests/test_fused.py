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


def test_a_wrong_argument_is_seen_after_calls_that_passed(triton_backend):
    def norm(channels=8, **others):
        return Norm(**{"weight": torch.ones(channels), "bias": torch.zeros(channels)} | others)

    good = {
        "x": torch.randn(1, 4, 2, 5, 5),
        "w_s": torch.randn(8, 4, 1, 3, 3),
        "norm_s": norm(),
        "w_t": torch.randn(8, 8, 3, 1, 1),
        "norm_t": norm(),
        "kind": "A",
    }
    for _ in range(2):
        ops.pseudo3d_conv(**good)
    wrong = {
        "x": (good["x"].double(), good["x"][:, :3], good["x"][0]),
        "w_s": (good["w_s"].half(), good["w_s"][:, :, 0], good["w_s"].tolist()),
        "norm_s": (norm(7), norm(training=False), norm(weight=torch.ones(8, device="meta")), None),
        "norm_t": (norm(running_mean=torch.zeros(8)), "norm"),
        "w_t": (None, good["w_t"][:7, :7]),
        "kind": ("D", ["A"], "2d"),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError)):
                ops.pseudo3d_conv(**good | {name: value})


@pytest.fixture
def triton_backend():
    with p3d.use_backend("triton"):
        why = _backends.why_not("triton", torch.empty(1))
        if why:
            pytest.skip(why)
        yield
