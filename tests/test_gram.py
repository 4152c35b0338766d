"""Statistics of a 1x1x1 convolution from sums over its narrow operand, against float64; the formulas of `_gram.py`."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch
from torch import Tensor

import p3d_kernels as p3d
from p3d_kernels import Norm
from p3d_kernels.ops import _cuda, _gram
from p3d_kernels.ops._conv import pack_weight
from p3d_kernels.ops._gram import _gram_bwd_plans, _gram_plans, gram, gram_bwd
from p3d_kernels.ops._triton import Operand, bn_finalise

READS = ("raw", "bn_relu", "join_port", "join_b", "join_c")
# N, T, H, W, Ci, Co: fewer positions than the sample of the centre; odd channels; several tiles of W C.
SMALL = [(1, 1, 4, 7, 16, 24), (2, 3, 9, 11, 45, 70), (1, 4, 9, 10, 96, 130)]
LARGE = [(32, 8, 40, 40, 64, 256), (32, 4, 20, 20, 128, 512), (32, 2, 10, 10, 256, 1024), (32, 1, 5, 5, 512, 2048)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # the interpreter cannot multiply bfloat16


def cases():
    small = [pytest.param(shape, dtype, "triton") for shape in SMALL for dtype in DTYPES[:2]]
    large = [
        pytest.param(shape, dtype, backend, marks=pytest.mark.gpu)
        for shape in LARGE
        for dtype, backend in ((DTYPES[0], "triton"), *((d, b) for d in DTYPES[1:] for b in ("triton", "cuda")))
    ]
    return pytest.mark.parametrize(("shape", "dtype", "backend"), small + large, indirect=["backend"])


def operand(read: str, shape: tuple[int, ...], dtype: torch.dtype, bias: float, device) -> tuple[Operand, Tensor]:
    """An operand whose activation is of deviation 1 about `bias`, before ReLUs, and its value in float64 [P, C]."""
    n, t, h, w, c, _ = shape
    if read == "raw":
        z = (
            (bias + torch.randn(n, c, t, h, w, device=device))
            .to(dtype)
            .contiguous(memory_format=torch.channels_last_3d)
        )
        return Operand("raw", z), z.movedim(1, -1).flatten(0, -2).double()
    two = read != "bn_relu"
    tensors = [torch.randn(n, c, t, h, w, device=device).to(dtype) for _ in range(1 + two)]
    tensors = [z.contiguous(memory_format=torch.channels_last_3d) for z in tensors]
    rows = torch.zeros(c), torch.rand(c) + 0.5, bias + torch.randn(c), torch.ones(c), torch.ones(c)
    record = torch.stack(rows).to(device)
    a, *b = (
        (z.float() * record[1].view(1, -1, 1, 1, 1) + record[2].view(1, -1, 1, 1, 1)).movedim(1, -1).flatten(0, -2)
        for z in tensors
    )
    relu = torch.relu
    value = {
        "bn_relu": lambda: relu(a),
        "join_port": lambda: relu(a) + relu(b[0]),
        "join_b": lambda: relu(relu(a) + b[0]),
        "join_c": lambda: relu(0.5 * relu(a) + 0.5 * b[0]),
    }[read]()
    records = (record, record if two else None)
    return Operand(read, tensors[0], tensors[1] if two else None, *records), value.to(dtype).double()


def with_centre(x: Operand) -> Operand:
    """With the centre that the norm of its last tensor leaves, given its statistics as running ones; raw, without."""
    if x.read == "raw":
        return x
    record = x.record_a if x.b is None else x.record_b
    mean, scale, bias, *_ = record
    lacking = {"record_a": None} if x.b is None else {"record_b": None}
    x = dataclasses.replace(x, **lacking)
    norm = Norm(scale, bias, mean, torch.ones_like(mean), training=False, eps=0.0)
    assert torch.equal(bn_finalise(norm, x.channels, None, mean.device, x)[:3], record[:3])
    return x


def weight(shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    *_, ci, co = shape
    return pack_weight((torch.randn(co, ci, 1, 1, 1, device=device) / ci**0.5).to(dtype), dtype)


@pytest.fixture
def ieee():
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@cases()
@pytest.mark.parametrize("bias", [0, 300])
@pytest.mark.parametrize("read", READS)
def test_statistics(read, bias, shape, dtype, backend, device, ieee):
    """Also where a is 300 times what it varies by."""
    x, a = operand(read, shape, dtype, bias, device)
    w = weight(shape, dtype, device)
    kept, record = gram(with_centre(x), w, norm=Norm(eps=0.0))
    record = record.double()
    w = w.flatten(1).double()
    centred = a - a.mean(0)
    wc, mean = w @ (centred.T @ centred), w @ a.mean(0)
    var = (wc * w).sum(1) / (len(a) - 1)
    # What the rounding of a - centre, of products and of sums leaves.
    limit = 1e-5 if dtype == torch.float32 else 1e-3
    assert ((record[4] / var - 1).abs() < limit).all()
    held = record[0] - record[2] / record[1]  # the record's bias makes up for the rounding of its mean
    assert ((held - mean).abs() < limit * var.sqrt()).all()
    ci, co = shape[-2:]
    assert (kept[: co * ci].view(co, ci) - wc).norm() < limit * wc.norm()
    assert ((kept[co * ci :] - a.mean(0)).abs() <= limit * a.std(0) + 2**-24 * a.mean(0)).all()


@cases()
def test_every_second_row_and_column(shape, dtype, backend, device, ieee):
    x, a = operand("raw", shape, dtype, 30, device)
    w = weight(shape, dtype, device)
    kept, record = gram(x, w, Norm(eps=0.0), 2)
    n, t, *size, ci, co = shape
    a = a.view(n, t, *size, ci)[:, :, ::2, ::2].reshape(-1, ci)
    w, mean, centred = w.flatten(1).double(), a.mean(0), a - a.mean(0)
    wc = w @ (centred.T @ centred)
    limit = 1e-5 if dtype == torch.float32 else 1e-3
    assert ((record[4].double() / ((wc * w).sum(1) / (len(a) - 1)) - 1).abs() < limit).all()
    assert (kept[: co * ci].view(co, ci) - wc).norm() < limit * wc.norm()
    assert ((kept[co * ci :] - mean).abs() <= limit * a.std(0) + 2**-24 * mean.abs()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
def test_runs_are_equal_bit_for_bit(backend, device):
    x, _ = operand("join_b", LARGE[1], torch.bfloat16, 3, device)
    w = weight(LARGE[1], torch.bfloat16, device)
    first, second = (gram(with_centre(x), w, norm=Norm()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_nan_reaches_every_channel(backend, device):
    x, _ = operand("bn_relu", SMALL[1], torch.float32, 0, device)
    x.a[1, 3, 2, 5, 5] = torch.nan  # at a position that the sample need not have
    _, record = gram(with_centre(x), weight(SMALL[1], torch.float32, device), norm=Norm())
    assert record[:2].isnan().all()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_frozen_norm_costs_no_sums(backend, device, monkeypatch):
    block = p3d.nn.Bottleneck(32, 16, "A", "port", 2).to(device).eval()
    monkeypatch.setattr(sys.modules["p3d_kernels.ops.bottleneck"], "gram", None)  # ops.bottleneck is the op
    x = torch.randn(1, 32, 2, 5, 5, device=device, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all() and block.conv3.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_gradient_that_is_masked_already(backend, dtype, stride, training, device):
    """Without y, `gram_bwd` of the masked gradient is that with y."""
    shape = (2, 3, 9, 11, 64, 256) if dtype == torch.float16 and backend == "cuda" else SMALL[1]
    x, _ = operand("join_b" if stride == 1 else "bn_relu", shape, dtype, 0, device)
    (n, t, *size, _, co), w = shape, weight(shape, dtype, device)
    dims = n, co, t, *[-(-s // stride) for s in size]
    dy, y = (torch.randn(dims, device=device).to(dtype).to(memory_format=torch.channels_last_3d) for _ in range(2))
    record = torch.rand(5, co, device=device) + 0.5
    norm = Norm(record[1], record[2], record[0], record[4], training=training)
    kept = gram(with_centre(x), w, norm, stride)[0] if training else None
    kind = "B" if stride == 1 else None
    masked = torch.where(y <= 0, 0, dy)
    with_y, without = (gram_bwd(*g, w, norm, record, x, kept, stride, True, kind) for g in ((dy, y), (masked, None)))
    for a, b in zip((with_y[0], *with_y[1], *with_y[2:]), (without[0], *without[1], *without[2:])):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(
    "splits, ci, co",
    [(1, 5, 24), (133, 45, 24), (5, 130, 40)]
    + [pytest.param(*sizes, marks=pytest.mark.gpu) for sizes in ((132, 64, 256), (66, 128, 512), (2, 512, 2048))],
)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_sums_of_many_splits(backend, splits, ci, co, device, ieee):
    """The covariance and mean of a, and M with what comes of it, whatever the tiles and the rows to be summed."""
    positions = 1000
    a = Operand("raw", torch.empty(positions, ci, 1, 1, 1, device=device), centre=torch.randn(ci, device=device))
    w, part = torch.randn(co, ci, device=device), torch.randn(splits, ci * ci + ci, device=device)
    sums, _ = _gram_plans(a, w, 1, splits, Norm())
    cov, mean = torch.empty(sums.parts, ci, ci, device=device), torch.empty(ci, dtype=torch.float64, device=device)
    mean_a, arrived = torch.empty(ci, device=device), torch.full((64,), 7, dtype=torch.int32, device=device)
    sums(part, a.centre, cov, mean, mean_a, arrived)
    square, total = part.double().sum(0).split((ci * ci, ci))
    want = square.view(ci, ci) - total[:, None] * total[None] / positions
    torch.testing.assert_close(cov.double().sum(0), want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(mean, a.centre.double() + total / positions, rtol=1e-6, atol=1e-6)
    assert torch.equal(mean_a, mean.float()) and (arrived[: -(-co // 32)] == 0).all()

    dy, part = torch.empty(positions, co, 1, 1, 1, device=device), torch.randn(splits, co * ci + co, device=device)
    operands, *_ = _gram_bwd_plans(dy, dy, a, 1, False, splits, True)
    wc, record, got = torch.randn(co, ci, device=device), torch.rand(5, co, device=device) + 0.5, torch.empty(4, co)
    got, dw, qw = got.to(device), torch.empty(co, ci, device=device), torch.empty(1, ci, co, device=device)
    wg, sw = torch.empty(operands.rows, ci, device=device), torch.empty(co, ci, device=device)
    operands(part, wc, mean_a, w, record, got, dw, qw, wg, sw)
    m, g = part.double().sum(0).split((co * ci, co))
    m = m.view(co, ci) - g[:, None] * mean_a.double()
    scale, invstd = record[1].double(), record[3].double()
    dweight = invstd * (m * w).sum(1)
    sq = scale * dweight * invstd / positions
    torch.testing.assert_close(got[[0, 2, 3]].double(), torch.stack((sq, dweight, g)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dw.double(), scale[:, None] * m - sq[:, None] * wc, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(qw[0].double(), -(sq[:, None] * w).mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sw, record[1][:, None] * w)
    torch.testing.assert_close(wg.double().sum(0), (scale * g / positions) @ w.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_both_products_have_their_weights_in_one_tensor(backend, device, ieee, monkeypatch):
    """What `gram_bwd` gives the kernel whose sum is over both tensors makes the same gradient."""
    x, _ = operand("raw", SMALL[1], torch.float32, 3, device)
    (n, t, h, w, _, co), weights = SMALL[1], weight(SMALL[1], torch.float32, device)
    dy = torch.randn(n, co, t, h, w, device=device).to(memory_format=torch.channels_last_3d)
    kept, record = gram(with_centre(x), weights, norm=Norm())
    run = functools.partial(gram_bwd, dy, None, weights, Norm(), record, x, kept, 1, True)
    da, parts, dw, sums = run()
    monkeypatch.setattr(_gram, "_is_raw", lambda *_: True)

    def both_products(g, a, both, c):
        return torch.einsum("ncthw,cm->nmthw", torch.cat([g, a], 1), both) + c.sum(0).view(1, -1, 1, 1, 1)

    monkeypatch.setattr(_cuda, "gram_raw", both_products)
    other, other_parts, *rest = run()
    torch.testing.assert_close(other, da, rtol=1e-4, atol=1e-4)
    assert other_parts == parts and all(torch.equal(a, b) for a, b in zip(rest, (dw, sums)))


def test_formulas_in_float64():
    """W C gives statistics, and with M = g^T a every gradient, as autograd finds them."""
    positions, ci, co, eps = 60, 5, 9, 1e-5
    a, w, r, dy = (torch.randn(s, dtype=torch.float64) for s in ((positions, ci), (co, ci), *[(positions, co)] * 2))
    a, gamma, beta = torch.relu(a + 1), torch.rand(co).double() + 0.5, torch.randn(co).double()
    leaves = [t.requires_grad_() for t in (a, w, gamma, beta)]
    z = a @ w.T
    var, mean = torch.var_mean(z, 0, correction=0)
    y = torch.relu((z - mean) * (var + eps).rsqrt() * gamma + beta + r)
    expected = torch.autograd.grad(y, leaves, dy)

    with torch.no_grad():
        mean_a = a.mean(0)
        wc = w @ ((a - mean_a).T @ (a - mean_a))
        torch.testing.assert_close(w @ mean_a, mean)
        torch.testing.assert_close((wc * w).sum(1) / positions, var)
        g = dy * (y > 0)
        m, sum_g, invstd = g.T @ a, g.sum(0), (var + eps).rsqrt()
        s = gamma * invstd
        dgamma = invstd * ((m - torch.outer(sum_g, mean_a)) * w).sum(1)
        q = dgamma * invstd / positions
        dw = s[:, None] * (m - torch.outer(sum_g, mean_a) - q[:, None] * wc)
        q_matrix = w.T @ ((s * q)[:, None] * w)
        da = (s * g) @ w - a @ q_matrix + q_matrix.T @ mean_a - w.T @ (s * sum_g / positions)
        torch.testing.assert_close((da, dw, dgamma, sum_g), tuple(expected))
