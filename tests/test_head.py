"""The mean over positions and the linear layer at the end of an engine, against torch."""

import sys

import pytest
import torch

import p3d_kernels as p3d
from p3d_kernels import _backends
from p3d_kernels.ops._head import global_mean, linear
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n, k, co", [(1, 2048, 10), (5, 96, 3), (6, 1300, 7)])
def test_linear(n, k, co, bias, device):
    x, w = torch.randn(n, k, device=device), torch.randn(co, k, device=device)
    b = torch.randn(co, device=device) if bias else None
    expected = x.double() @ w.double().T + (0 if b is None else b.double())
    check(linear(x, w, b), expected, torch.float32)
    moved = torch.empty(w.numel() + 1, device=device)[1:].view_as(w).copy_(w)  # not aligned to 16 bytes
    assert torch.equal(linear(x, moved, b), linear(x, w, b))


def test_a_nan_stays_in_its_row(device):
    x, w = torch.randn(5, 64, device=device), torch.randn(9, 64, device=device)
    x[1, 3] = torch.nan
    y = linear(x, w, None)
    assert y[1].isnan().all() and y.isnan().sum() == 9


def test_an_engine_takes_them_where_it_may(device, monkeypatch):
    taken = []
    monkeypatch.setattr(sys.modules["p3d_kernels.freeze"], "linear", lambda *a: taken.append(a) or linear(*a))
    net = p3d.models.P3D((1, 1, 1, 1), 10).eval().to(device)
    x = torch.randn(1, 3, 2, 16, 16, device=device)
    assert p3d.freeze(net)(x).shape == (1, 10) and len(taken) == 1
    net.fc = torch.nn.Sequential(torch.nn.Linear(2048, 7))
    assert p3d.freeze(net)(x).shape == (1, 7) and len(taken) == 1
    net.fc = torch.nn.Linear(2048, 7, dtype=torch.float64)
    assert p3d.freeze(net, torch.float32)(x).dtype == torch.float64 and len(taken) == 1
