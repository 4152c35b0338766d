"""The Hopper kernel for the weight gradients of 1x1x1 and 3x1x1 convolutions and for Gram products, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import operand as _operand
from operands import rows as _rows
from operands import value as _value
from p3d_kernels.ops import _conv, _cuda
from p3d_kernels.ops._cuda._common import _TENSORS
from p3d_kernels.ops._cuda.conv_wgrad import _CENTRED
from p3d_kernels.ops._triton import Operand
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

DTYPES = (torch.bfloat16, torch.float16)
READS = tuple(_TENSORS)
EXACT = ("raw", "masked")  # what float64 rounds to the same values
POINT, TIME = (1, 1, 1), (3, 1, 1)
# N, T, H, W, Ci, Co: one position; numbers of them off the box; more boxes than blocks; each tile of dW, and several.
SHAPES = [
    (1, 1, 1, 1, 64, 64),
    (2, 3, 7, 5, 64, 64),
    (1, 5, 13, 9, 256, 64),
    (2, 1, 9, 5, 64, 256),
    (3, 2, 11, 7, 128, 128),
    (1, 2, 9, 13, 192, 192),
    (2, 2, 5, 5, 512, 128),
    (2, 2, 7, 5, 128, 512),
    (33, 8, 11, 13, 64, 64),
    (9, 4, 20, 20, 256, 64),
    (4, 1, 5, 5, 512, 2048),
]
SMALL = [shape for shape in SHAPES if shape[-2] <= 192 and shape[-1] <= 192]


def _names(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) and len(value) > 3 else None


def _in_float64(g, x, taps, stride, totals):
    """[Co * taps * Ci (+ Co)]."""
    g_value, x_value = _value(g), _value(x)
    if taps == TIME:
        padded = torch.nn.functional.pad(x_value, (0, 0, 0, 0, 1, 1))
        dw = torch.stack([_rows(g_value) @ _rows(padded[:, :, k : k + x_value.size(2)]).T for k in range(3)], 1)
    else:
        x_value = x_value[..., :: stride[1], :: stride[1]]
        if g_value.shape[2:] != x_value.shape[2:]:
            g_value = g_value[..., :: stride[1], :: stride[1]]
        dw = _rows(g_value) @ _rows(x_value).T
    return torch.cat([dw.flatten(), *([_rows(g_value).sum(1)] if totals else [])])


def _judge(g, x, taps=POINT, stride=(1, 1), totals=False):
    part = _cuda.conv_wgrad(g, x, taps, stride, totals)
    expected = _in_float64(g, x, taps, stride, totals)
    assert part.dtype == torch.float32 and part.shape[1:] == expected.shape
    exact = g.read in EXACT and x.read in EXACT
    # Rounded operands now and then have the other neighbour of float64's.
    dtype = torch.float32 if exact else x.a.dtype
    size = g.channels * taps[0] * x.channels
    scale = (g.a.numel() // g.channels) ** -0.5  # sums of 40,000 products leave float16
    result, expected = (part.double().sum(0) * scale).to(dtype), expected * scale
    check(result[:size], expected[:size], dtype, kind="wgrad", name="dw")
    if totals:
        check(result[size:], expected[size:], dtype, kind="wgrad", name="totals")


def _shapes(shape):
    n, t, h, w, ci, co = shape
    return (n, co, t, h, w), (n, ci, t, h, w)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("totals", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=_names)
def test_raw(shape, totals, dtype):
    g, x = _shapes(shape)
    _judge(_operand("raw", g, dtype), _operand("raw", x, dtype), totals=totals)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g_read", READS)
@pytest.mark.parametrize("x_read", READS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=_names)
def test_every_pair_of_reads(shape, x_read, g_read, dtype):
    g, x = _shapes(shape)
    _judge(_operand(g_read, g, dtype), _operand(x_read, x, dtype), totals=True)


@pytest.mark.gpu
@pytest.mark.parametrize("reads", [("masked", "join_c"), ("bn_bwd", "raw"), ("masked", "bn_relu")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=_names)
def test_the_reads_of_a_bottleneck(shape, reads):
    g, x = _shapes(shape)
    totals = reads[0] == "masked"
    _judge(_operand(reads[0], g, torch.bfloat16), _operand(reads[1], x, torch.bfloat16), totals=totals)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reads", [("raw", "raw"), ("bn_bwd", "bn_relu"), ("bn_bwd_open", "join_b")], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=_names)
def test_taps_in_time(shape, reads, dtype):
    g, x = _shapes(shape)
    _judge(_operand(reads[0], g, dtype), _operand(reads[1], x, dtype), TIME)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", ["raw", "bn_relu", "join_port"])
@pytest.mark.parametrize("channels", [64, 128, 192, 256, 512])
def test_one_operand_twice(channels, read, dtype):
    x = _operand(read, (3, channels, 2, 9, 7), dtype)
    _judge(x, x, totals=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (10, 10), (21, 13), (40, 6)], ids=str)
def test_stride_2(size, dtype):
    n, t, (h, w) = 3, 2, size
    x, out = (n, 256, t, h, w), (n, 128, t, (h + 1) // 2, (w + 1) // 2)
    a = _operand("raw", x, dtype)
    _judge(_operand("bn_bwd", out, dtype), a, stride=(1, 2))
    _judge(_operand("masked", out, dtype), a, stride=(1, 2), totals=True)
    _judge(a, a, stride=(1, 2), totals=True)
    _judge(_operand("masked", (n, 64, t, h, w), dtype), _operand("join_c", x, dtype), stride=(1, 2), totals=True)


@pytest.mark.gpu
@pytest.mark.parametrize("taps", [POINT, TIME], ids=str)
def test_a_mean_of_300_deviations(taps):
    g, x = _shapes((2, 3, 7, 5, 128, 64))
    _judge(_operand("bn_bwd", g, torch.bfloat16, 300.0), _operand("bn_relu", x, torch.bfloat16, 300.0), taps)
    _judge(_operand("bn_bwd", g, torch.bfloat16, 300.0), _operand("join_b", x, torch.bfloat16, 300.0), taps)


@pytest.mark.gpu
def test_a_nan_reaches_its_channels_only():
    g, x = _operand("masked", (2, 128, 3, 7, 5), torch.bfloat16), _operand("bn_relu", (2, 64, 3, 7, 5), torch.bfloat16)
    g.a[0, 1, 0, 2, 1] = torch.nan
    for value, seen in ((-1.0, False), (1.0, True), (torch.nan, True)):
        g.b[0, 1, 0, 2, 1] = value
        dw = _cuda.conv_wgrad(g, x, POINT, (1, 1), True).sum(0)
        dw, total = dw[: 128 * 64].view(128, 64), dw[128 * 64 :]
        assert dw[1].isnan().all() == seen and dw.isnan().sum() == 64 * seen
        assert total[1].isnan() == seen and total.isnan().sum() == seen
    g.a.nan_to_num_()
    x.a[0, 3, 0, 2, 1] = torch.nan
    dw = _cuda.conv_wgrad(g, x, TIME, (1, 1)).sum(0).view(128, 3, 64)
    assert dw[:, 1:, 3].isnan().sum() == 128 and dw[:, :2, 3].isnan().all() and dw.isnan().sum() == 2 * 128


@pytest.mark.gpu
@pytest.mark.parametrize("taps", [POINT, TIME], ids=str)
def test_runs_are_equal_and_a_graph_replays_them(taps):
    g, x = _shapes((7, 4, 21, 13, 128, 128))
    g, x = _operand("bn_bwd", g, torch.bfloat16), _operand("join_c", x, torch.bfloat16)
    first = _cuda.conv_wgrad(g, x, taps, (1, 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = _cuda.conv_wgrad(g, x, taps, (1, 1))
    for _ in range(3):
        graph.replay()
        assert torch.equal(first, again)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 256) + 2
    x, g = (
        torch.zeros(clips, 8, 40, 40, c, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3) for c in (256, 64)
    )
    for part in (slice(0, 1), slice(clips - 1, clips)):
        x[part], g[part] = torch.randn_like(x[part]), torch.randn_like(g[part])
    expected = sum(_rows(g[p].double()) @ _rows(x[p].double()).T for p in (slice(0, 1), slice(clips - 1, clips)))
    part = _cuda.conv_wgrad(Operand("raw", g), Operand("raw", x), POINT, (1, 1))
    check(part.double().sum(0).bfloat16(), expected.flatten(), torch.bfloat16, kind="wgrad", name="dw")


@pytest.mark.gpu
@pytest.mark.parametrize("totals", [False, True])
def test_the_op_takes_the_kernel_and_triton_agrees(totals, monkeypatch):
    g, x = _operand("masked", (2, 128, 2, 9, 7), torch.bfloat16), _operand("join_b", (2, 64, 2, 9, 7), torch.bfloat16)
    theirs = _conv._conv_wgrad(g, x, *_conv.pointwise(), totals).double().sum(0)
    monkeypatch.setattr(_conv, "_conv_wgrad", None)
    ours = _conv.conv_wgrad(g, x, _conv.pointwise(), totals).part.double().sum(0)
    assert ours.shape == theirs.shape
    dw, total = ours.split([g.channels * x.channels, g.channels * totals])
    check(dw.bfloat16(), theirs[: dw.numel()], torch.bfloat16, kind="wgrad", name="dw")
    if totals:
        check(total.bfloat16(), theirs[dw.numel() :], torch.bfloat16, kind="wgrad", name="totals")


@pytest.mark.gpu
@pytest.mark.parametrize("read", _CENTRED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [64, 128, 192, 256, 512])
def test_about_a_centre(c, dtype, read):
    """One operand near 300, or twice that, about a number below: what lies outside the maps is zero, not -centre."""
    x = _operand(read, (3, c, 2, 11, 7), dtype)
    for record in {id(r): r for r in (x.record_a, x.record_b) if r is not None}.values():
        record[2] += 300
    if read == "raw":
        x.a += 300
    near = 600 if read in ("join_port", "join_b") else 300
    centre = (near - 4 - 4 * torch.rand(c, device="cuda")).to(dtype).float()
    value = _rows((_value(x) - centre.double().view(1, -1, 1, 1, 1)).to(dtype).double())
    expected = torch.cat([(value @ value.T).flatten(), value.sum(1)])
    part = _cuda.conv_wgrad(x, x, POINT, (1, 1), True, centre)
    theirs = _conv._conv_wgrad(x, x, *_conv.pointwise(), True, centre)
    scale = value.size(1) ** -0.5  # sums of so many squares leave float16
    for result in (part.double().sum(0) * scale, theirs.double().sum(0) * scale):
        check(result[: c * c].to(dtype), expected[: c * c] * scale, dtype, kind="wgrad", name="products")
        check(result[c * c :].to(dtype), expected[c * c :] * scale, dtype, kind="wgrad", name="totals")


@pytest.mark.gpu
def test_reasons():
    def why(ci=64, co=64, taps=POINT, stride=(1, 1), read="raw", dtype=torch.bfloat16):
        x, g = (torch.empty(2, c, 3, 9, 5, dtype=dtype, device="cuda") for c in (ci, co))
        return _cuda.conv_wgrad_why_not(Operand(read, g), Operand("raw", x), taps, stride)

    assert why() is None and why(ci=192, co=320) is None and why(taps=TIME) is None and why(stride=(1, 2)) is None
    assert "multiples of 64" in why(ci=96) and "multiples of 64" in why(co=32)
    assert "stride" in why(stride=(1, 3)) and "stride" in why(taps=TIME, stride=(1, 2))


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)


def test_reasons_that_need_no_card():
    def why(g=None, taps=POINT, stride=(1, 1), dtype=torch.bfloat16):
        x = Operand("raw", _zeros(1, 64, 2, 4, 4).to(dtype))
        return _cuda.conv_wgrad_why_not(g or x, x, taps, stride)

    assert "float32" in why(dtype=torch.float32)
    assert "masked_scaled" in why(Operand("masked_scaled", _zeros(1, 64, 2, 4, 4)))
    assert "(1, 3, 3)" in why(taps=(1, 3, 3)) and "(2, 1)" in why(taps=TIME, stride=(2, 1))

    x, centre = Operand("masked", *[_zeros(1, 64, 2, 4, 4)] * 2), torch.zeros(64)
    assert "centre" in _cuda.conv_wgrad_why_not(x, x, POINT, (1, 1), True, centre)


def test_arguments_are_checked_before_any_launch():
    a, wide, rows = _zeros(1, 64, 2, 4, 4), _zeros(1, 128, 2, 4, 4), torch.zeros(5, 64)
    x = Operand("raw", a)

    def run(g=x, x=x, taps=POINT, stride=(1, 1), totals=False, centre=None):
        _cuda.conv_wgrad(g, x, taps, stride, totals, centre)

    with pytest.raises(ValueError, match="x.a: expected bfloat16"):
        run(x=Operand("raw", a.float()))
    with pytest.raises(ValueError, match="x.a: expected channels_last_3d"):
        run(x=Operand("raw", a.contiguous()))
    with pytest.raises(ValueError, match="totals: expected False"):
        run(taps=TIME, totals=True)
    with pytest.raises(ValueError, match="g: expected a read among .*'masked_scaled'"):
        run(Operand("masked_scaled", a, a, record_b=rows))
    with pytest.raises(ValueError, match="g: expected the tensors of masked"):
        run(Operand("masked", a))
    with pytest.raises(ValueError, match="x: expected the tensors of raw"):
        run(x=Operand("raw", a, record_a=rows))
    with pytest.raises(ValueError, match=r"g.a: expected .*\[1, 64, 2, 2, 2\]"):
        run(Operand("raw", _zeros(1, 64, 2, 3, 4)), stride=(1, 2))
    with pytest.raises(ValueError, match=r"g.b: expected .*\[1, 64, 2, 4, 4\]"):
        run(Operand("masked", a, wide))
    with pytest.raises(ValueError, match="g.a: expected torch.bfloat16"):
        run(Operand("raw", a.half()))
    with pytest.raises(ValueError, match=r"x.record_a: expected float32 \[3, 128\]"):
        run(x=Operand("bn_relu", wide, record_a=rows))
    with pytest.raises(ValueError, match=r"g.sums: expected float32 \[2, 64\]"):
        run(Operand("bn_bwd", a, a, record_b=rows, sums=rows[:1]))
    masked = Operand("masked", a, a)
    with pytest.raises(ValueError, match="centre: expected None"):
        run(masked, masked, centre=rows[0])
    normalised = Operand("bn_relu", a, record_a=rows)
    with pytest.raises(ValueError, match=r"centre: expected contiguous float32 \[64\]"):
        run(normalised, normalised, centre=rows)


def test_no_positions_need_no_launch():
    x = Operand("raw", _zeros(0, 64, 2, 4, 4))
    part = _cuda.conv_wgrad(Operand("raw", _zeros(0, 128, 2, 4, 4)), x, POINT, (1, 1), True)
    assert part.shape == (1, 128 * 64 + 128) and not part.any()
