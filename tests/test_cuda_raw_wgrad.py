"""The Hopper kernel for weight gradients of raw operands, alone and several in a launch, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import DTYPES, assert_replays, operand, rows
from p3d_kernels.ops import _conv, _cuda
from p3d_kernels.ops._conv import Geometry, WeightGrad, conv_wgrads, pointwise, spatial, temporal
from p3d_kernels.ops._cuda import RawWgrad
from p3d_kernels.ops._triton import Operand
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

POINT, TIME, SPACE = TAPS = (1, 1, 1), (3, 1, 1), (1, 3, 3)
# N, T, H, W, Ci, Co: one position; numbers of them off the box; more boxes than stages; several tiles, an odd number.
SHAPES = [
    (1, 1, 1, 1, 128, 128),
    (2, 3, 7, 5, 128, 256),
    (3, 2, 11, 7, 256, 128),
    (1, 5, 13, 9, 384, 256),
    (9, 4, 20, 20, 128, 256),
    (4, 1, 5, 5, 512, 1024),
    (32, 2, 10, 10, 256, 256),
]
TILES = [(128, 1), (128, 3), (128, 5), (256, 1), (256, 4)]  # channels, splits


def _names(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def _problem(shape, taps=POINT, stride=1, dtype=torch.bfloat16, strided=False):
    n, t, h, w, ci, co = shape
    out = (t, h, w) if strided else (t, (h - 1) // stride + 1, (w - 1) // stride + 1)
    x, g = operand("raw", (n, ci, t, h, w), dtype).a, operand("raw", (n, co, *out), dtype).a
    return RawWgrad(g, x, taps, (1, stride))


def _judge(wgrad, part):
    g, x, taps, (_, stride) = wgrad
    if taps != POINT:
        (t, h, w), (_, _, *size) = taps, x.shape
        padded = torch.nn.functional.pad(x.double(), (w // 2,) * 2 + (h // 2,) * 2 + (t // 2,) * 2)
        for axis, (count, length) in enumerate(zip(taps, size), 2):
            padded = torch.stack([padded.narrow(axis, k, length) for k in range(count)], -1)
        padded = padded.flatten(5).unbind(-1)  # of each tap
        expected = torch.stack([rows(g.double()) @ rows(v).T for v in padded], 1)
    else:
        x = x[..., ::stride, ::stride]
        g = g if g.shape[2:] == x.shape[2:] else g[..., ::stride, ::stride]
        expected = rows(g.double()) @ rows(x.double()).T
    assert part.dtype == torch.float32 and part.shape[1:] == (expected.numel(),)
    # The matrix unit truncates: long sums are as good as their operands, not as float32.
    dtype = torch.float32 if g.numel() // g.size(1) <= 1000 * part.size(0) else x.dtype
    check(part.double().sum(0).to(dtype), expected.flatten(), dtype, kind="wgrad", name="dw")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", TAPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=_names)
def test_one(shape, taps, dtype):
    wgrad = _problem(shape, taps, dtype=dtype)
    _judge(wgrad, *_cuda.raw_wgrads([wgrad]))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=_names)
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 4, 5, 6)], ids=_names)
def test_every_tile(shape, tile):
    channels, splits = tile
    if shape[4] % channels:
        with pytest.raises(RuntimeError, match="no such tile"):
            _cuda.raw_wgrads([_problem(shape)], [tile])
        return
    for taps in TAPS:
        wgrad = _problem(shape, taps)
        (part,) = _cuda.raw_wgrads([wgrad], [tile])
        assert part.size(0) <= splits
        _judge(wgrad, part)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (10, 10), (20, 20), (21, 13), (70, 6), (6, 130)], ids=_names)
def test_stride_2(size, dtype):
    """Boxes of several rows or frames, of fewer positions than a product has."""
    for strided in (False, True):
        wgrad = _problem((5, 2, *size, 256, 128), stride=2, dtype=dtype, strided=strided)
        _judge(wgrad, *_cuda.raw_wgrads([wgrad]))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [0, 3])
def test_taps_of_padding(splits):
    """Frames and clips that some taps do not reach at all, of few positions, and long ones: also as more splits."""
    for n, t, h, w in ((37, 1, 3, 5), (37, 3, 1, 1), (2, 70, 3, 3), (3, 2, 1, 9), (3, 2, 70, 1), (2, 1, 2, 130)):
        for taps in (TIME, SPACE):
            wgrad = _problem((n, t, h, w, 128, 128), taps)
            _judge(wgrad, *_cuda.raw_wgrads([wgrad], [(0, splits)]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several(dtype):
    """Together each is split otherwise; runs are equal, and a graph replays them."""
    wgrads = [
        _problem((32, 2, 10, 10, 1024, 256), dtype=dtype),
        _problem((32, 2, 10, 10, 256, 1024), dtype=dtype),
        _problem((32, 2, 10, 10, 256, 256), TIME, dtype=dtype),
        _problem((32, 1, 10, 10, 256, 512), stride=2, dtype=dtype),
        _problem((32, 2, 10, 10, 256, 256), SPACE, dtype=dtype),
    ]
    for some in (wgrads, wgrads[:2], wgrads[1:3], wgrads[::-1]):
        parts = _cuda.raw_wgrads(some)
        for wgrad, part in zip(some, parts, strict=True):
            _judge(wgrad, part)
    assert_replays(lambda: _cuda.raw_wgrads(some))


@pytest.mark.gpu
def test_more_tiles_than_multiprocessors():
    wgrads = [
        _problem((32, 1, 5, 5, 512, 512), SPACE),
        _problem((32, 1, 5, 5, 1024, 2048)),
        _problem((32, 1, 5, 5, 2048, 512)),
    ]
    for tiles in (None, [(128, 1)] * 3, [(256, 1)] * 3):
        for wgrad, part in zip(wgrads, _cuda.raw_wgrads(wgrads, tiles), strict=True):
            _judge(wgrad, part)


@pytest.mark.gpu
def test_a_nan_reaches_its_channels_only():
    """What the ring held before, and rows that no box fills, do not count."""
    wgrad = _problem((3, 1, 10, 10, 128, 128), stride=2)
    wgrad.g[1, 5, 0, 2, 3] = torch.nan
    (part,) = _cuda.raw_wgrads([wgrad])
    dw = part.sum(0).view(128, 128)
    assert dw[5].isnan().all() and dw.isnan().sum() == 128


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 256) + 2
    x, g = (
        torch.zeros(clips, 8, 40, 40, c, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3) for c in (256, 128)
    )
    for part in (slice(0, 1), slice(clips - 1, clips)):
        x[part], g[part] = torch.randn_like(x[part]), torch.randn_like(g[part])
    expected = sum(rows(g[p].double()) @ rows(x[p].double()).T for p in (slice(0, 1), slice(clips - 1, clips)))
    (part,) = _cuda.raw_wgrads([RawWgrad(g, x, POINT, (1, 1))])
    check(part.double().sum(0).bfloat16(), expected.flatten(), torch.bfloat16, kind="wgrad", name="dw")


@pytest.mark.gpu
def test_the_op_takes_the_kernel(monkeypatch):
    wide, narrow = (operand("raw", (4, c, 2, 9, 7), torch.bfloat16) for c in (256, 128))
    places = pointwise(), temporal(), spatial()
    calls = [WeightGrad(narrow, wide, places[0]), None, *(WeightGrad(narrow, narrow, place) for place in places[1:])]
    theirs = [None if c is None else _conv._conv_wgrad(c.g, c.x, *c.geometry) for c in calls]
    monkeypatch.setattr(_cuda, "conv_wgrad", None)
    monkeypatch.setattr(_cuda, "spatial_wgrad", None)
    monkeypatch.setattr(_conv, "_conv_wgrad", None)
    ours = conv_wgrads(calls)
    alone = _conv.conv_wgrad(*calls[0])
    for splits, part in ((ours[0], theirs[0]), (ours[2], theirs[2]), (ours[3], theirs[3]), (alone, theirs[0])):
        check(splits.part.double().sum(0).float(), part.double().sum(0), torch.float32, kind="wgrad", name="dw")
    assert ours[1] is None and (ours[2].taps, ours[2].ci) == (3, 128) and (ours[3].taps, ours[3].ci) == (9, 128)


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)


def test_several_without_the_kernel(device):
    """Calls become splits one by one; what is none stays."""
    last = {"memory_format": torch.channels_last_3d}
    x, g = (Operand("raw", torch.randn(1, c, 2, 3, 3, device=device).to(**last)) for c in (16, 32))
    kept = torch.ones(3)
    time, same, none, space = conv_wgrads(
        [WeightGrad(g, x, Geometry(TIME, (1, 1))), kept, None, WeightGrad(g, x, spatial())]
    )
    assert same is kept and none is None and (time.taps, time.ci) == (3, 16) and (space.taps, space.ci) == (9, 16)
    for taps, splits in ((TIME, time), (SPACE, space)):
        _judge(RawWgrad(g.a, x.a, taps, (1, 1)), splits.part)


def test_reasons_that_need_no_card():
    x = _zeros(1, 128, 2, 4, 4)
    assert "float32" in _cuda.raw_wgrad_why_not(RawWgrad(x.float(), x.float(), POINT, (1, 1)))
    assert "(3, 3, 3)" in _cuda.raw_wgrad_why_not(RawWgrad(x, x, (3, 3, 3), (1, 1)))
    assert "no positions" in _cuda.raw_wgrad_why_not(RawWgrad(x[:0], x[:0], POINT, (1, 1)))


@pytest.mark.gpu
def test_reasons():
    def why(ci, co, taps=POINT, stride=1):
        return _cuda.raw_wgrad_why_not(_problem((2, 3, 4, 4, ci, co), taps, stride))

    assert why(128, 128) is None and why(128, 128, SPACE) is None and why(128, 256, stride=2) is None
    assert "multiples of 128" in why(192, 128) and "128 up to" in why(128, 64, TIME)
    assert "stride" in why(128, 128, TIME, 2) and "stride" in why(128, 128, SPACE, 2)
    with pytest.raises(RuntimeError, match="no such tile"):
        _cuda.raw_wgrads([_problem((2, 3, 4, 4, 128, 128))], [(256, 0)])


def test_arguments_are_checked_before_any_launch():
    x = _zeros(1, 128, 2, 4, 4)
    with pytest.raises(ValueError, match="wgrads: expected 1 to 5, got 0"):
        _cuda.raw_wgrads([])
    with pytest.raises(ValueError, match="x: expected bfloat16"):
        _cuda.raw_wgrads([RawWgrad(x.float(), x.float(), POINT, (1, 1))])
    with pytest.raises(ValueError, match="x: expected channels_last_3d"):
        _cuda.raw_wgrads([RawWgrad(x, x.contiguous(), POINT, (1, 1))])
    with pytest.raises(ValueError, match=r"g: expected .*\[1, 128, 2, 2, 2\]"):
        _cuda.raw_wgrads([RawWgrad(_zeros(1, 128, 2, 3, 4), x, POINT, (1, 2))])
