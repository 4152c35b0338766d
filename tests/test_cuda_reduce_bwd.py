"""The Hopper kernel for both gradients of a 1x1x1 convolution to 64 or 128 channels, against float64."""

from __future__ import annotations

import importlib

import pytest
import torch

from operands import activation, operand, rows, value
from p3d_kernels.nn import Bottleneck, BottleneckRow
from p3d_kernels.ops import _cuda, _fused
from p3d_kernels.ops._triton import Operand
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

bottleneck = importlib.import_module("p3d_kernels.ops.bottleneck")  # ops.bottleneck is the op

DTYPES = (torch.bfloat16, torch.float16)
PASSES = 2  # of a new tape: one compiles ahead, one records
CHANNELS = [(256, 64), (512, 128), (512, 64), (256, 128), (768, 64)]  # Ci, Co
# N, T, H, W: one position; less than a unit of 64 positions, exactly one, and numbers off it; less than, about and
# several times as many units as the card has multiprocessors.
SIZES = [(1, 1, 1, 1), (2, 3, 2, 5), (1, 1, 8, 8), (1, 2, 13, 10), (5, 4, 21, 20), (9, 8, 11, 13), (13, 8, 20, 21)]


def _arguments(size, channels, dtype, masked=False, mean=0.0):
    """What `reduce_bwd` takes but for mask_x."""
    (n, *dims), (ci, co) = size, channels
    dz, like = operand("bn_bwd", (n, co, *dims), dtype, mean), (n, ci, *dims)
    w = (torch.randn(co, ci, device="cuda") / co**0.5).to(dtype)
    return dz, activation(like, dtype), w, activation(like, dtype), activation(like, dtype) if masked else None


def _judge(dz, x, w, o, o_mask=None, mask_x=False):
    dx, part = _cuda.reduce_bwd(dz, x, w, o, o_mask, mask_x)
    g = value(dz)
    expected = torch.einsum("ncthw,ci->nithw", g, w.double())
    expected += o.double() if o_mask is None else torch.where(o_mask <= 0, 0, o.double())
    check(dx, torch.where(x <= 0, 0, expected) if mask_x else expected, x.dtype, name="dx")
    assert dx.is_contiguous(memory_format=torch.channels_last_3d)
    dw = rows(g) @ rows(x.double()).T
    scale = (x.numel() // x.size(1)) ** -0.5  # sums of 40,000 products leave float16
    assert part.dtype == torch.float32
    check((part.double().sum(0) * scale).to(x.dtype), dw.flatten() * scale, x.dtype, kind="wgrad", name="dw")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_gradients(size, channels, dtype):
    for masked, mask_x in ((False, False), (True, False), (False, True), (True, True)):
        _judge(*_arguments(size, channels, dtype, masked), mask_x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS[:2], ids=str)
def test_a_mean_of_300_deviations(channels, dtype):
    dz, *rest = _arguments((3, 4, 7, 5), channels, dtype, True, 300.0)
    _judge(dz, *rest, True)
    dz.sums[1] *= 1000  # past the last position dz is zero: that of z = 0 is infinite in float16
    _judge(dz, *rest, True)


THIN_SIZES = [(2, 3, 2, 6), (1, 1, 1, 2), (1, 2, 13, 10), (5, 4, 21, 20), (3, 2, 1, 130), (4, 8, 40, 40)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS[:3], ids=str)
@pytest.mark.parametrize("size", THIN_SIZES, ids=str)
def test_a_thin_residual(size, channels, dtype):
    """To the bit what the kernel makes of o that is zero but at every second row and column."""
    dz, x, w, *wide = _arguments(size, channels, dtype, True)
    o, mask = (t[..., ::2, ::2].contiguous(memory_format=torch.channels_last_3d) for t in wide)
    spread = torch.zeros_like(wide[0])
    spread[..., ::2, ::2] = o
    for mask_x in (False, True):
        expected = _cuda.reduce_bwd(dz, x, w, spread, wide[1], mask_x)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(_cuda.reduce_bwd(dz, x, w, o, mask, mask_x), expected))


@pytest.mark.gpu
def test_a_nan_stays_where_it_is():
    at, (ci, co) = (1, 2, 3, 1), (512, 128)
    dz, x, w, o, mask = _arguments((2, 4, 9, 7), (ci, co), torch.bfloat16, True)
    n, t, h, w_at = at
    for positive, seen in ((-1.0, 0), (1.0, 1), (torch.nan, 1)):  # of either mask
        o[n, 7, t, h, w_at] = torch.nan
        mask[n, 7, t, h, w_at], x[n, 7, t, h, w_at] = positive, 1.0
        dx, part = _cuda.reduce_bwd(dz, x, w, o, mask, True)
        assert dx.isnan().sum() == seen == dx[n, 7, t, h, w_at].isnan() and not part.isnan().any()
        mask[n, 7, t, h, w_at], x[n, 7, t, h, w_at] = 1.0, positive
        dx, part = _cuda.reduce_bwd(dz, x, w, o, mask, True)
        assert dx.isnan().sum() == seen == dx[n, 7, t, h, w_at].isnan()
        dw = part.sum(0).view(co, ci)
        assert dw.isnan().sum() == co * x.isnan().sum() and (dw[:, 7].isnan() == x.isnan().any()).all()
    o[n, 7, t, h, w_at] = 0.0
    x[n, 7, t, h, w_at] = 1.0
    dz.a[n, 5, t, h, w_at], dz.b[n, 5, t, h, w_at] = torch.nan, dz.record_b[0, 5] + 100
    dx, part = _cuda.reduce_bwd(dz, x, w, o)
    assert dx[n, :, t, h, w_at].isnan().all() and dx.isnan().sum() == ci
    dw = part.sum(0).view(co, ci)
    assert dw[5].isnan().all() and dw.isnan().sum() == ci


@pytest.mark.gpu
@pytest.mark.parametrize("channels", CHANNELS[:2], ids=str)
def test_runs_are_equal_and_a_graph_replays_them(channels):
    arguments = *_arguments((37, 4, 21, 13), channels, torch.bfloat16, True), True
    first = _cuda.reduce_bwd(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = _cuda.reduce_bwd(*arguments)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 256) + 2
    ends = slice(0, 1), slice(clips - 1, clips)
    dz, x, w, o, _ = _arguments((2, 8, 40, 40), (256, 64), torch.bfloat16)
    dz.sums[:2] = 0  # so that dz is zero where g is

    def between(v):
        whole = torch.zeros(clips, *v.shape[2:], v.size(1), dtype=v.dtype, device="cuda").permute(0, 4, 1, 2, 3)
        for end, of in zip(ends, v.split(1)):
            whole[end] = of
        return whole

    far = Operand("bn_bwd", between(dz.a), between(dz.b), record_b=dz.record_b, sums=dz.sums)
    near, near_part = _cuda.reduce_bwd(dz, x, w, o, None, True)
    dx, part = _cuda.reduce_bwd(far, between(x), w, between(o), None, True)
    for end, of in zip(ends, near.split(1)):
        assert torch.equal(dx[end], of)
    expected = near_part.double().sum(0)
    check(part.double().sum(0).bfloat16(), expected, torch.bfloat16, kind="wgrad", name="dw")


@pytest.mark.gpu
def test_a_row_takes_the_kernel_and_its_gradients_stay(monkeypatch):
    """Those of a row by the kernel, masked on the way down or not, are as near to float64 as without it."""
    torch.manual_seed(0)
    net = BottleneckRow(Bottleneck(64, 64, "A"), Bottleneck(256, 64, "B"), Bottleneck(256, 64, "C")).cuda()
    exact = BottleneckRow(Bottleneck(64, 64, "A"), Bottleneck(256, 64, "B"), Bottleneck(256, 64, "C")).cuda().double()
    exact.load_state_dict(net.state_dict())
    x = torch.randn(3, 64, 4, 13, 11, device="cuda").bfloat16()
    dy = torch.randn(3, 256, 4, 13, 11, device="cuda").bfloat16()

    def gradients(of, dtype):
        monkeypatch.setattr(_fused, "_settled", {})  # no tape of another way
        source = x.detach().to(dtype).requires_grad_()
        of.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = of(source)
        y.backward(dy.to(y.dtype))
        return torch.cat([t.flatten().double() for t in (source.grad, *(p.grad for p in of.parameters()))])

    calls, run = [], _cuda.reduce_bwd
    monkeypatch.setattr(_cuda, "reduce_bwd", lambda *a: calls.append(a[4:]) or run(*a))
    expected, together = gradients(exact, torch.float64), gradients(net, torch.bfloat16)
    assert [(mask is None, mask_x) for mask, mask_x in calls] == [(False, True), (True, True)] * PASSES
    monkeypatch.setattr(bottleneck, "_can_mask", lambda *_: False)
    apart = gradients(net, torch.bfloat16)
    assert [(mask is None, mask_x) for mask, mask_x in calls[2 * PASSES :]] == [(False, False)] * 2 * PASSES
    monkeypatch.setattr(bottleneck, "_reduce_fits", lambda *_: False)
    theirs = gradients(net, torch.bfloat16)
    limit = 1.2 * (theirs - expected).norm()
    assert len(calls) == 4 * PASSES and (together - expected).norm() < limit and (apart - expected).norm() < limit


@pytest.mark.gpu
def test_reasons():
    def why(ci=256, co=64, size=(2, 3, 5, 7), dtype=torch.bfloat16):
        return _cuda.reduce_bwd_why_not((size[0], ci, *size[1:]), dtype, co)

    assert why() is None and why(512, 128) is None and why(8192, 128) is None
    assert "multiple of 256" in why(128) and "multiple of 256" in why(16384)
    assert "64 or 128" in why(co=256) and "64 or 128" in why(co=32)
    assert "positions" in why(size=(2, 0, 5, 7)) and "positions" in why(size=(2**11, 2**8, 2**6, 2**6))


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)


def test_arguments_are_checked_before_any_launch():
    narrow, wide, record = _zeros(1, 64, 2, 4, 4), _zeros(1, 256, 2, 4, 4), torch.zeros(5, 64)
    dz = Operand("bn_bwd", narrow, narrow, record_b=record, sums=record)
    weight = torch.zeros(64, 256, dtype=torch.bfloat16)

    def run(dz=dz, x=wide, w=weight, o=wide, o_mask=None):
        _cuda.reduce_bwd(dz, x, w, o, o_mask)

    assert "float32" in _cuda.reduce_bwd_why_not((1, 256, 2, 4, 4), torch.float32, 64)
    with pytest.raises(ValueError, match="x, dz: expected bfloat16"):
        run(x=wide.float())
    with pytest.raises(ValueError, match="x, dz: expected .*'raw'"):
        run(Operand("raw", narrow))
    with pytest.raises(ValueError, match="dz: expected the tensors of bn_bwd"):
        run(Operand("bn_bwd", narrow, narrow, record_b=record))
    with pytest.raises(ValueError, match=r"dz.a: expected .*\[1, 64, 2, 4, 2\]"):
        run(x=_zeros(1, 256, 2, 4, 2))
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[64, 256\]"):
        run(w=weight.T.contiguous())
    with pytest.raises(ValueError, match="o: expected channels_last_3d"):
        run(o=wide.contiguous())
    with pytest.raises(ValueError, match=r"o_mask: expected .*\[1, 256, 2, 4, 4\]"):
        run(o_mask=narrow)


def test_no_positions_need_no_launch():
    narrow, wide, record = _zeros(0, 64, 2, 4, 4), _zeros(0, 256, 2, 4, 4), torch.zeros(5, 64)
    dz = Operand("bn_bwd", narrow, narrow, record_b=record, sums=record)
    dx, part = _cuda.reduce_bwd(dz, wide, torch.zeros(64, 256, dtype=torch.bfloat16), wide)
    assert dx.shape == wide.shape and part.shape == (1, 64 * 256) and not part.any()
