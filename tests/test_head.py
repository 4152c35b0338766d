"""The mean over positions and the linear layer at the end of an engine, against torch."""

import sys

import pytest
import torch

import p3d_kernels as p3d
from p3d_kernels import _backends
from p3d_kernels.ops import _head
from p3d_kernels.ops._head import global_mean, linear, linear_of_few, mean_over_positions
from tolerance import check

pytestmark = pytest.mark.usefixtures("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def triton(device):
    with p3d.use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1, 1, 1), (3, 72, 1, 5, 7), (2, 130, 3, 5, 5)], ids=str)
def test_global_mean(shape, dtype, device):
    x = (torch.randn(shape, device=device) + 2).to(dtype).to(memory_format=torch.channels_last_3d)
    y = global_mean(x)
    assert y.dtype == torch.float32
    check(y, x.double().mean((2, 3, 4)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1, 1, 1), (3, 72, 1, 5, 7), (2, 130, 3, 5, 5)], ids=str)
def test_the_gradient_of_the_mean(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    y, dy = mean_over_positions(x), torch.randn(2 * shape[0], shape[1], device=device)[::2]
    y.backward(dy)
    assert y.dtype == torch.float32 and x.grad.dtype == dtype
    check(y, x.double().mean((2, 3, 4)), torch.float32)
    check(x.grad, (dy.double() / x[0, 0].numel()).view(*dy.shape, 1, 1, 1).expand(shape), dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n, k, co", [(1, 2048, 10), (5, 96, 3), (6, 1300, 7)])
def test_linear(n, k, co, bias, device):
    x, w = torch.randn(n, k, device=device), torch.randn(co, k, device=device)
    b = torch.randn(co, device=device) if bias else None
    expected = x.double() @ w.double().T + (0 if b is None else b.double())
    check(linear(x, w, b), expected, torch.float32)
    moved = torch.empty(w.numel() + 1, device=device)[1:].view_as(w).copy_(w)  # not aligned to 16 bytes
    assert torch.equal(linear(x, moved, b), linear(x, w, b))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("n, k, co, bias", [(1, 40, 10, True), (5, 300, 70, False), (37, 130, 9, True)])
def test_the_gradient_of_the_linear_layer(n, k, co, bias, autocast, device):
    tensors = [torch.randn(n, k, device=device), torch.randn(co, k, device=device) / k**0.5]
    tensors += [torch.randn(co, device=device)] if bias else []
    leaves, exact = ([t.to(d).requires_grad_() for t in tensors] for d in (torch.float32, torch.float64))
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = linear_of_few(*leaves, *([] if bias else [None]))
    dtype = torch.bfloat16 if autocast else torch.float32
    assert y.dtype == dtype and isinstance(y.grad_fn, _head._Linear._backward_cls)
    expected = torch.nn.functional.linear(*exact)
    check(y, expected, dtype)
    dy = torch.randn(n, co, device=device).to(dtype)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, exact, dy.double())):
        check(a, b, torch.float32, kind="wgrad")


def test_other_linear_layers_are_torchs(device):
    w = torch.randn(7, 64, device=device)
    for x in (
        torch.randn(65, 64, device=device),
        torch.randn(2, 3, 64, device=device),
        torch.randn(0, 64, device=device),
    ):
        assert torch.equal(linear_of_few(x, w, None), torch.nn.functional.linear(x, w))


def test_a_nan_stays_in_its_row(device):
    x, w = torch.randn(5, 64, device=device), torch.randn(9, 64, device=device)
    x[1, 3] = torch.nan
    y = linear(x, w, None)
    assert y[1].isnan().all() and y.isnan().sum() == 9


@pytest.mark.gpu  # a net in the interpreter takes a minute
def test_an_engine_takes_them_where_it_may(device, monkeypatch):
    taken = []
    monkeypatch.setattr(sys.modules["p3d_kernels.freeze"], "linear", lambda *a: taken.append(a) or linear(*a))
    net = p3d.models.P3D((1, 1, 1, 1), 10).eval().to(device)
    x = torch.randn(1, 3, 2, 16, 16, device=device)
    assert p3d.freeze(net)(x).shape == (1, 10) and len(taken) == 1
    net.fc = torch.nn.Sequential(torch.nn.Linear(2048, 7)).to(device)
    assert p3d.freeze(net)(x).shape == (1, 7) and len(taken) == 1
    net.fc = torch.nn.Linear(2048, 7, dtype=torch.float64, device=device)
    assert p3d.freeze(net, torch.float32)(x).dtype == torch.float64 and len(taken) == 1
