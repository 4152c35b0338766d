"""The Hopper kernels of the Gram identity that read the wide gradient once: the pass over it, and the end of da."""

from __future__ import annotations

import pytest
import torch

from operands import activation, normalised, operand, record, value
from p3d_kernels._norm import Norm
from p3d_kernels.ops import _cuda, _gram
from p3d_kernels.ops._cuda.gram import _thin
from p3d_kernels.ops._triton import Operand
from test_cuda_conv_train import DTYPES, SIZES, _check_sums
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

CHANNELS = [(64, 256), (128, 512), (64, 512), (128, 256)]  # M, Co
# Even and odd H and W; units that are 1, 2, 4, 8, 16, 32 or 64 positions wide.
THIN_SIZES = [(10, 4, 6, 2), (3, 4, 20, 20), (1, 5, 8, 6), (2, 3, 9, 7), (17, 8, 11, 13), (3, 2, 7, 1), (1, 2, 6, 150)]
THIN_SIZES += [(2, 3, 1, 9), (2, 3, 2, 1)]
READS = [("raw", None), ("bn_relu", "A"), ("join_port", "B"), ("join_b", "B"), ("join_c", "C")]  # and a kind


def _tensors(read, size, m, co, dtype, mean=0.0, thin=False):
    """x, dy, y, record and w."""
    n, *dims = size
    x = operand(read, (n, m, *dims), dtype, mean)
    dims = _thin(dims) if thin else dims
    dy, y = (activation((n, co, *dims), dtype) for _ in range(2))
    return x, dy, y, record(co), (torch.randn(co, m, device="cuda") / co**0.5).to(dtype)


def _rows(t):
    return t.double().movedim(1, -1).flatten(0, -2)


def _scaled(rows, w):
    """scale * w, of as many digits as the dtype has."""
    fraction, exponent = torch.frexp(rows[1][:, None] * w.float())
    return torch.ldexp(fraction.to(w.dtype).double(), exponent)


def _whole(v, scales):
    """v in float64 [P, M], its parts added up."""
    v = v.double().movedim(2, -1).flatten(1, -2)
    return (v * scales.double().repeat_interleave(64, 2)).sum(0)


def _check_products(m, expected):
    """In a few hundred positions one value of a, rounded to the other neighbour, is 3e-5 of it all."""
    assert (m - expected).norm() <= 1e-4 * expected.norm()


def _check_v(v, expected):
    """float16 with a scale for each 16 positions and 64 channels: right to half a unit of what is largest there."""
    error = (v - expected).abs()
    assert error.norm() <= 4e-4 * expected.norm() and error.max() <= 2**-10 * expected.abs().max()


def _judge_pass(x, dy, y, rows, w):
    v, scales, part = _cuda.gram_bwd(dy, y, rows, w, x)
    a = value(x)
    a, g = _rows(a if a.shape[2:] == dy.shape[2:] else a[..., ::2, ::2]), _rows(dy)
    if y is not None:
        g = torch.where(_rows(y) <= 0, 0, g)
    co, m = w.shape
    _check_v(_whole(v, scales), g @ _scaled(rows, w))
    sums = part.double().sum(0)
    _check_products(sums[: co * m].view(co, m), g.T @ a)
    assert ((sums[co * m :] - g.sum(0)).abs() <= 1e-5 * g.abs().sum(0) + 1e-12).all()


def _judge_end(x, kind, dtype, parts, thin=False):
    n, m, *dims = x.a.shape
    v = torch.randn(parts, n, *(_thin(dims) if thin else dims), m, device="cuda").half().movedim(-1, 2)
    scales = 2.0 ** torch.randint(-3, 4, (parts, v[0, :, 0].numel(), m // 64), device="cuda")
    q, c = (torch.randn(m, m, device="cuda") / m**0.5).to(dtype), torch.randn(3, m, device="cuda")
    q_scale = 0.5 + torch.rand(m, device="cuda") if dtype == torch.float16 else None
    sums = kind not in (None, "C"), kind is not None and x.b is not None
    da, (part_a, part_b) = _cuda.gram_add(v, scales, x, q, q_scale, c, *sums)
    u = (_rows(value(x)) @ q.double()) * (1 if q_scale is None else q_scale.double())
    u = (u + c.double().sum(0)).view(n, *dims, m).movedim(-1, 1)
    (u[..., ::2, ::2] if thin else u).add_(_whole(v, scales).view(n, *v.shape[3:], m).movedim(-1, 1))
    if x.read in ("join_b", "join_c"):
        u_a, u_b = normalised(x.a, x.record_a).float(), normalised(x.b, x.record_b).float()
        u = torch.where(torch.relu(u_a) + u_b <= 0, 0, u)
    check(da, 0.5 * u if x.read == "join_c" else u, dtype)
    assert da.is_contiguous(memory_format=torch.channels_last_3d)
    assert (part_a is not None, part_b is not None) == sums
    if part_a is not None:
        _check_sums(part_a, da, x.a, x.record_a)
    if part_b is not None:
        _check_sums(part_b, da, x.b, x.record_b, x.read == "join_port")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(size, channels, dtype):
    for read, kind in READS:
        x, dy, y, *rest = _tensors(read, size, *channels, dtype)
        _judge_pass(x, dy, y, *rest)
        _judge_pass(x, dy, None, *rest)
        _judge_end(x, kind, dtype, channels[1] // 256)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", THIN_SIZES, ids=str)
def test_every_size_thin(size, channels, dtype):
    for read, kind in READS:
        x, dy, y, *rest = _tensors(read, size, *channels, dtype, thin=True)
        _judge_pass(x, dy, y, *rest)
        _judge_pass(x, dy, None, *rest)
        _judge_end(x, kind, dtype, channels[1] // 256, thin=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_of_300_deviations(dtype):
    for read, kind in READS[1:]:
        x, *rest = _tensors(read, (3, 4, 21, 13), 64, 256, dtype, 300.0)
        _judge_pass(x, *rest)
        _judge_end(x, kind, dtype, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", CHANNELS[:2], ids=str)
def test_gradients_and_scales_of_any_size(channels):
    """Neither overflows or underflows in float16 while v itself is no subnormal of float32."""
    for power in (-20, 12):
        x, dy, y, rows, w = _tensors("join_b", (2, 3, 9, 7), *channels, torch.float16)
        rows[1] *= 2.0**power
        _judge_pass(x, dy, y, rows, w)
    x, dy, y, rows, w = _tensors("join_b", (2, 3, 9, 7), *channels, torch.bfloat16)
    _judge_pass(x, dy * 2.0**60, y, rows, w)
    _judge_pass(x, dy * 2.0**-60, y, rows, w)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", CHANNELS[:2], ids=str)
def test_a_nan_stays_where_it_is(channels):
    x, dy, y, rows, w = _tensors("raw", (2, 4, 9, 7), *channels, torch.bfloat16)
    for positive, seen in ((-1.0, 0), (1.0, 1), (torch.nan, 1)):
        dy[0, 7, 1, 2, 3], y[0, 7, 1, 2, 3] = torch.nan, positive
        v, _, part = _cuda.gram_bwd(dy, y, rows, w, x)
        assert v[0, 0, :, 1, 2, 3].isnan().all() == bool(seen) and v.isnan().sum() == seen * x.channels
        assert part[:, : w.numel()].isnan().any(0).view_as(w).sum() == seen * x.channels


@pytest.mark.gpu
@pytest.mark.parametrize("channels", CHANNELS[:2], ids=str)
def test_a_nan_where_v_is_thin_stays_where_it_is(channels):
    x, dy, _, rows, w = _tensors("raw", (2, 4, 9, 7), *channels, torch.bfloat16, thin=True)
    x.a[..., 1::2, :] = torch.nan  # nobody reads them in the pass
    x.a[..., 1::2] = torch.nan
    v, scales, part = _cuda.gram_bwd(dy, None, rows, w, x)
    assert not v.isnan().any() and not part.isnan().any()
    x.a.nan_to_num_(0.0)
    x.a[1, 5, 2, 5, 2], v[0, 1, 3, 2, 1, 0] = torch.nan, torch.nan
    q, c = torch.randn_like(w[: channels[0]]), torch.randn(2, channels[0], device="cuda")
    da, _ = _cuda.gram_add(v, scales, x, q, None, c)
    assert da[1, :, 2, 5, 2].isnan().all() and da[1, 3, 2, 2, 0].isnan() and da.isnan().sum() == x.channels + 1


@pytest.mark.gpu
def test_runs_are_equal_and_a_graph_replays_them():
    for channels in CHANNELS[:2]:
        for masked, thin in ((True, False), (False, False), (True, True)):
            x, dy, y, rows, w = _tensors("join_b", (37, 4, 21, 13), *channels, torch.bfloat16, thin=thin)
            q, c = torch.randn_like(w[: channels[0]]), torch.randn(2, channels[0], device="cuda")

            def run(x=x, dy=dy, y=y if masked else None, rows=rows, w=w, q=q, c=c):
                *v, part = _cuda.gram_bwd(dy, y, rows, w, x)
                da, parts = _cuda.gram_add(*v, x, q, None, c, True, True)
                return *v, part, da, *parts

            first = run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = run()
            for _ in range(3):
                graph.replay()
                assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 256) + 2
    ends = slice(0, 1), slice(clips - 1, clips)
    dy = torch.zeros(clips, 8, 40, 40, 256, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3)
    a = torch.zeros(clips, 8, 40, 40, 64, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3)
    for end in ends:
        dy[end], a[end] = torch.randn_like(dy[end]), torch.randn_like(a[end])
    rows, w = record(256), (torch.randn(256, 64, device="cuda") / 16).bfloat16()
    v, scales, part = _cuda.gram_bwd(dy, None, rows, w, Operand("raw", a))
    g, x = (torch.cat([_rows(t[end]) for end in ends]) for t in (dy, a))
    _check_products(part[:, : w.numel()].double().sum(0).view_as(w), g.T @ x)
    positions = 8 * 40 * 40
    for end, at in zip(ends, (slice(0, positions), slice(-positions, None))):
        _check_v(_whole(v[:, end], scales[:, at]), _rows(dy[end]) @ _scaled(rows, w))


@pytest.mark.gpu
@pytest.mark.parametrize("thin", [False, True], ids=["", "thin"])
@pytest.mark.parametrize("channels", CHANNELS[:2], ids=str)
@pytest.mark.parametrize(("read", "kind"), READS)
def test_the_identity_takes_the_kernels_and_triton_agrees(read, kind, channels, thin, monkeypatch):
    m, co = channels
    x, dy, y, _, w = _tensors(read, (2, 3, 9, 7), m, co, torch.bfloat16, thin=thin)
    w = w.view(co, m, 1, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    norm = Norm.of(torch.nn.BatchNorm3d(co).cuda())
    kept, rows = _gram.gram(x, w, norm=norm)
    masked = torch.where(y <= 0, 0, dy)

    def both():
        pairs, stride = ((dy, y), (masked, None)), 1 + thin
        return [_gram.gram_bwd(*g, w, norm, rows, x, kept, stride, True, kind, thin) for g in pairs]

    with monkeypatch.context() as patch:
        patch.setattr(_cuda, "gram_dgrad", None)
        own, own_masked = both()
    assert torch.equal(own[0], own_masked[0]) and torch.equal(own[2], own_masked[2])
    monkeypatch.setattr(_gram, "cuda_allowed", lambda x: False)
    theirs, theirs_masked = both()
    for i, limit in ((0, 6e-3), (2, 1e-4)):  # what is rounded differs: scale w or scale g
        assert (own[i].double() - theirs[i].double()).norm() <= limit * theirs[i].double().norm()
        assert (theirs_masked[i].double() - theirs[i].double()).norm() <= 1e-2 * limit * theirs[i].double().norm()
    assert [p is None for p in own[1]] == [p is None for p in theirs[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS[:2], ids=str)
@pytest.mark.parametrize("thin", [False, True], ids=["", "thin"])
def test_over_all_positions_the_gradient_sums_to_zero(thin, channels, dtype, monkeypatch):
    m, co = channels
    x, dy, y, _, w = _tensors("bn_relu", (4, 4, 21, 13), m, co, dtype, thin=thin)
    w = w.view(co, m, 1, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    norm = Norm.of(torch.nn.BatchNorm3d(co).cuda())
    kept, rows = _gram.gram(x, w, norm=norm)
    monkeypatch.setattr(_cuda, "gram_dgrad", None)
    da = _rows(_gram.gram_bwd(dy + 1, y, w, norm, rows, x, kept, 1 + thin, True, "A", thin)[0])
    assert (da.sum(0).abs() <= 3e-4 * da.abs().sum(0)).all()


@pytest.mark.gpu
def test_reasons():
    def why(m=64, co=256, size=(2, 3, 9, 5), read="raw", dtype=torch.bfloat16):
        x, *_ = _tensors(read, (2, 3, 9, 5), m, co, dtype)
        return _cuda.gram_bwd_why_not(x, activation((2, co, *size[1:]), dtype), None)

    assert why() is None and why(128, 512) is None and why(dtype=torch.float16) is None
    assert why(size=(2, 3, 5, 3)) is None
    assert "64 or 128" in why(256, 1024) and "256 or 512" in why(64, 192) and "gradient at" in why(size=(2, 3, 4, 3))
    assert "activation" in why(read="bn_bwd") and "dtype" in why(dtype=torch.float32)


def _zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last_3d)


def test_arguments_are_checked_before_any_launch():
    a, wide = _zeros(1, 64, 2, 4, 4), _zeros(1, 256, 2, 4, 4)
    x, w, q = Operand("raw", a), torch.zeros(256, 64, dtype=a.dtype), torch.zeros(64, 64, dtype=a.dtype)

    def pass_over(g=wide, y=wide, rows=None, w=w):
        _cuda.gram_bwd(g, y, torch.zeros(5, 256) if rows is None else rows, w, x)

    with pytest.raises(ValueError, match=r"y: expected .*\[1, 256, 2, 4, 4\]"):
        pass_over(y=a)
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[256, 64\]"):
        pass_over(w=q)
    with pytest.raises(ValueError, match=r"record: expected float32 \[3, 256\]"):
        pass_over(rows=torch.zeros(2, 256))

    half = a.half()[None]

    def end(v=half, scales=None, **arguments):
        scales = torch.zeros(1, 32, 1) if scales is None else scales
        _cuda.gram_add(v, scales, x, q, None, torch.zeros(2, 64), **arguments)

    with pytest.raises(ValueError, match="v: expected torch.float16"):
        end(a[None])
    with pytest.raises(ValueError, match="v: expected one part or two"):
        end(half.expand(3, *a.shape))
    with pytest.raises(ValueError, match="scales: expected torch.float32"):
        end(scales=torch.zeros(1, 1, 1, 4))
    thin = _zeros(1, 64, 2, 2, 2).half()[None]
    with pytest.raises(ValueError, match=r"scales: expected torch.float32 \[1, 8, 1\]"):
        end(thin)
    with pytest.raises(ValueError, match="sums_a, sums_b"):
        end(sums_a=True)


def test_no_positions_need_no_launch():
    x, g = Operand("raw", _zeros(0, 64, 2, 4, 4)), _zeros(0, 256, 2, 4, 4)
    v, scales, part = _cuda.gram_bwd(g, None, torch.zeros(5, 256), torch.zeros(256, 64, dtype=g.dtype), x)
    assert v.shape == (1, 0, 64, 2, 4, 4) and scales.shape == (1, 0, 1) and not part.any()
    da, parts = _cuda.gram_add(v, scales, x, torch.zeros(64, 64, dtype=g.dtype), None, torch.zeros(1, 64))
    assert da.shape == x.a.shape and parts == (None, None)
