"""The Hopper kernel by tiles: convolutions in training of any channels in multiples of 64, and with a stride."""

from __future__ import annotations

import pytest
import torch

from operands import (
    DTYPES,
    TILE_SIZES,
    assert_nan_at,
    assert_nan_of_open,
    assert_replays,
    normalised,
    operand,
    record,
    value,
)
from p3d_kernels.ops import _conv, _cuda, _gram
from p3d_kernels.ops._triton import Operand
from test_cuda_conv_train import READS, _check_statistics, _check_sums, _expected, _like, _weight, _x
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

SIZES = [*TILE_SIZES, (17, 8, 11, 13)]  # the last: more tiles than the card has multiprocessors
CHANNELS = [(64, 64), (256, 256), (512, 192), (192, 640)]  # Ci, Co
ACTIVATIONS = ("raw", "bn_relu", "join_port", "join_b", "join_c")
TILES = [(rows, columns, splits) for rows, columns in ((64, 64), (64, 128), (128, 128)) for splits in (1, 2, 4, 8)]


def _thin(x, stride):
    """What a stride in space leaves of an operand."""
    a, b = (None if z is None else z[..., ::stride, ::stride] for z in (x.a, x.b))
    return Operand(x.read, a, b, x.record_a, x.record_b, x.sums)


def _judge(x, w, stride=1, dims=None, tile=None, **arguments):
    y, part = _cuda.conv_train(x, w, stride=stride, dims=dims, tile=tile or (0, 0, 0), **arguments)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    if arguments.get("transposed"):
        expected = _expected(x, w, **arguments)
        if dims is not None:
            small, expected = expected, torch.zeros_like(y, dtype=torch.float64)
            expected[..., ::stride, ::stride] = small
    else:
        expected = _expected(_thin(x, stride), w, **arguments)
    check(y, expected, x.a.dtype)
    below = arguments.get("below")
    if below is not None:
        _check_sums(part, y, *below)
    elif arguments.get("stats"):
        _check_statistics(part, y)
    else:
        assert part is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_1x1x1(size, channels, dtype):
    ci, co = channels
    x, o, mask = _x("raw", size, ci, dtype), _like(size, co, dtype), _like(size, co, dtype)
    _judge(x, _weight(x, co), stats=True)
    x = _x("join_b", size, ci, dtype)
    _judge(x, _weight(x, co), record=record(co), o=o, relu=True)
    x = _x("bn_bwd", size, ci, dtype)
    w = _weight(x, co, 1, True)
    _judge(x, w, transposed=True, o=o, o_mask=mask)
    _judge(x, w, transposed=True, o=o, below=(mask, record(co)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_taps_in_time(size, channels, dtype):
    ci, co = channels
    x = _x("bn_relu", size, ci, dtype)
    _judge(x, _weight(x, co, 3), stats=True)
    x = _x("bn_bwd", size, ci, dtype)
    w, o, below = _weight(x, co, 3, True), _like(size, co, dtype), (_like(size, co, dtype), record(co))
    _judge(x, w, transposed=True)
    _judge(x, w, transposed=True, o=o, below=below)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_strides(size, stride, dtype):
    n, t, h, w = size
    thin = n, t, -(-h // stride), -(-w // stride)
    for ci, co in ((256, 128), (128, 512), (192, 64)):
        x = _x("raw", size, ci, dtype)
        _judge(x, _weight(x, co), stride, stats=True)
        _judge(x, _weight(x, co), stride)
        for read in ("bn_bwd", "raw"):
            x, o = _x(read, thin, ci, dtype), _like(thin, co, dtype)
            _judge(x, _weight(x, co, 1, True), stride, (t, h, w), transposed=True)
            _judge(x, _weight(x, co, 1, True), stride, (t, h, w), transposed=True, o=o)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", READS)
def test_every_read(read, dtype):
    size = 2, 3, 7, 11
    for ci, co, taps in ((256, 256, 1), (192, 64, 3)):
        x = _x(read, size, ci, dtype)
        if read in ACTIVATIONS:
            _judge(x, _weight(x, co, taps))
        if read == "raw" or read not in ACTIVATIONS:
            _judge(x, _weight(x, co, taps, True), transposed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile):
    for size in ((2, 3, 7, 11), (5, 2, 20, 13)):
        for taps in (1, 3):
            x, g = _x("bn_relu", size, 512), _x("bn_bwd", size, 512)
            o, mask, below = _like(size, 256), _like(size, 256), (_like(size, 256), record(256))
            w, w_t = _weight(x, 256, taps), _weight(g, 256, taps, True)
            _judge(x, w, tile=tile, stats=True)
            _judge(x, w, tile=tile, record=record(256), o=o, relu=True)
            _judge(g, w_t, tile=tile, transposed=True, o=o, o_mask=mask, below=below)
        n, t, h, w = size
        thin = n, t, -(-h // 2), -(-w // 2)
        x, g = _x("bn_relu", size, 512), _x("bn_bwd", thin, 512)
        _judge(x, _weight(x, 256), 2, tile=tile, stats=True)
        w_t = _weight(g, 256, 1, True)
        for gradient in (g, Operand("raw", g.a)):
            _judge(gradient, w_t, 2, (t, h, w), tile, transposed=True, o=_like(thin, 256))
        for dtype in DTYPES:
            _judge_gram(*_gram_arguments("join_b", size, 256, 512, dtype, "B"), tile=tile)
            _judge_gram(*_gram_arguments("raw", size, 256, 512, dtype), stride=2, tile=tile)


@pytest.mark.gpu
def test_every_epilogue_of_a_gradient():
    for size in ((2, 3, 7, 11), (11, 4, 13, 10)):
        for ci, co, taps in ((256, 256, 1), (192, 320, 3)):
            x = _x("bn_bwd", size, ci)
            w, o, mask = _weight(x, co, taps, True), _like(size, co), _like(size, co)
            below = _like(size, co), record(co)
            for arguments in ({}, {"o": o}, {"o": o, "o_mask": mask}):
                _judge(x, w, transposed=True, **arguments)
                _judge(x, w, transposed=True, below=below, **arguments)


@pytest.mark.gpu
def test_a_mean_of_300_deviations():
    size = 3, 4, 21, 13
    for ci, co, taps in ((256, 256, 1), (256, 192, 3)):
        x = _x("bn_relu", size, ci, mean=300.0)
        w = _weight(x, co, taps)
        _judge(x, w, stats=True)
        x = _x("bn_bwd", size, ci, mean=300.0)
        below = _like(size, co, mean=300.0), record(co, 300.0)
        _judge(x, _weight(x, co, taps, True), transposed=True, below=below)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(64, 64, 1), (128, 128, 1), (64, 128, 2)], ids=str)
def test_a_nan_stays_where_it_is(tile):
    size, (n, t, h, w) = (2, 4, 9, 7), (at := (0, 1, 2, 3))
    for taps in (1, 3):
        x, co = _x("bn_relu", size, 256), 256
        x.a[n, 5, t, h, w] = torch.nan
        arguments = {"record": record(co), "o": _like(size, co), "relu": True, "tile": tile}
        y, _ = _cuda.conv_train(x, _weight(x, co, taps), **arguments)
        assert_nan_at(y, at, taps)
        g, o, mask = _x("bn_bwd", size, 256), _like(size, co), _like(size, co)
        arguments = {"transposed": True, "o": o, "o_mask": mask, "tile": tile}
        w_t = _weight(g, co, taps, True)
        assert_nan_of_open(lambda g=g, w=w_t, a=arguments: _cuda.conv_train(g, w, **a)[0], o, mask, at)


def _gram_arguments(read, size, m, co, dtype, kind=None):
    x, g, y = _x(read, size, m, dtype), _like(size, co, dtype), _like(size, co, dtype)
    w = (torch.randn(co, m, device="cuda") / co**0.5).to(dtype)
    q, c = (torch.randn(m, m, device="cuda") / m**0.5).to(dtype), torch.randn(3, m, device="cuda")
    scale = 0.5 + torch.rand(m, device="cuda") if dtype == torch.float16 else None
    return g, y, record(co), w, x, q, scale, c, kind is not None and kind != "C", kind is not None and x.b is not None


def _gram_expected(g, y, rows, w, x, q, q_scale, c, *_):
    scaled = (torch.where(y <= 0, 0, g).float() * rows[1].view(1, -1, 1, 1, 1)).to(g.dtype).double()
    v = torch.einsum("ncthw,cm->nmthw", value(x), q.double())
    if q_scale is not None:
        v = v * q_scale.double().view(1, -1, 1, 1, 1)
    v = v + torch.einsum("ncthw,cm->nmthw", scaled, w.double()) + c.double().sum(0).view(1, -1, 1, 1, 1)
    if x.read in ("join_b", "join_c"):
        u_a, u_b = normalised(x.a, x.record_a).float(), normalised(x.b, x.record_b).float()
        v = torch.where(torch.relu(u_a) + u_b <= 0, 0, v)
    return 0.5 * v if x.read == "join_c" else v


def _judge_gram(*arguments, stride=1, tile=(0, 0, 0)):
    g, y, rows, w, x, *rest = arguments
    g, y = (z[..., ::stride, ::stride].contiguous(memory_format=torch.channels_last_3d) for z in (g, y))
    da, (part_a, part_b) = _cuda.gram_dgrad(g, y, rows, w, x, *rest, stride=stride, tile=tile)
    masked, _ = _cuda.gram_dgrad(torch.where(y <= 0, 0, g), None, rows, w, x, *rest, stride=stride, tile=tile)
    assert torch.equal(masked, da)
    x = _thin(x, stride)
    check(da, _gram_expected(g, y, rows, w, x, *rest), x.a.dtype)
    assert (part_a is not None, part_b is not None) == arguments[-2:]
    if part_a is not None:
        _check_sums(part_a, da, x.a, x.record_a)
    if part_b is not None:
        _check_sums(part_b, da, x.b, x.record_b, x.read == "join_port")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(256, 1024), (64, 64), (192, 320)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gram(size, channels, dtype):
    for read, kind in (("raw", None), ("bn_relu", "A"), ("join_b", "B"), ("join_c", "C")):
        _judge_gram(*_gram_arguments(read, size, *channels, dtype, kind))
    for stride in (2, 3):
        _judge_gram(*_gram_arguments("raw", size, *channels, dtype), stride=stride)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", ACTIVATIONS)
def test_gram_of_every_read(read, dtype):
    for kind in ("B", "C") if "join" in read else ("A",) if read == "bn_relu" else (None,):
        _judge_gram(*_gram_arguments(read, (3, 2, 11, 13), 256, 512, dtype, kind))


def _runs(size):
    """Launches of each form, with all that they may leave."""
    n, t, h, w = size
    for tile in ((128, 128, 1), (64, 128, 4)):
        for taps in (1, 3):
            x, g, o = _x("bn_relu", size, 256), _x("bn_bwd", size, 256), _like(size, 256)
            weights, below = (_weight(x, 256, taps), _weight(g, 256, taps, True)), (_like(size, 256), record(256))
            yield lambda x=x, w=weights[0], k=tile: _cuda.conv_train(x, w, stats=True, tile=k)
            yield lambda g=g, w=weights[1], o=o, b=below, k=tile: _cuda.conv_train(
                g, w, transposed=True, o=o, below=b, tile=k
            )
        g = _x("bn_bwd", (n, t, -(-h // 2), -(-w // 2)), 256)
        w_t = _weight(g, 256, 1, True)
        yield lambda g=g, w=w_t, k=tile: _cuda.conv_train(g, w, transposed=True, stride=2, dims=size[1:], tile=k)
        arguments = _gram_arguments("join_b", size, 256, 512, torch.bfloat16, "B")
        yield lambda a=arguments, k=tile: (lambda da, parts: (da, *parts))(*_cuda.gram_dgrad(*a, tile=k))


@pytest.mark.gpu
def test_runs_are_equal_and_a_graph_replays_them():
    for run in _runs((9, 4, 21, 13)):
        assert_replays(run)


@pytest.mark.gpu
@pytest.mark.parametrize("taps", [1, 3])
def test_more_than_2_to_the_31_elements(taps):
    clips = 2**31 // (8 * 20 * 20 * 256) + 2
    ends = slice(0, 1), slice(clips - 1, clips)
    x = torch.zeros(clips, 8, 20, 20, 256, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3)
    for part in ends:
        x[part] = torch.randn_like(x[part])
    rows = record(256)
    x = Operand("bn_relu", x, record_a=rows)
    w = _weight(x, 256, taps)
    y, part = _cuda.conv_train(x, w, stats=True)
    for end in ends:
        check(y[end], _expected(Operand("bn_relu", x.a[end], record_a=rows), w), torch.bfloat16)
    assert part[:, 0, 0].double().sum() == x.a.numel() // 256


def _packed(w):
    return w.permute(0, 2, 1)[..., None, None].contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
def test_conv_takes_the_kernel_and_triton_agrees(monkeypatch):
    size, thin = (2, 3, 9, 7), (2, 3, 5, 4)
    x, g, o, mask = _x("join_b", size, 256), _x("bn_bwd", size, 256), _like(size, 512), _like(size, 512)
    raw, g_thin, o_thin = _x("raw", size, 512), _x("bn_bwd", thin, 256), _like(thin, 512)
    dims, below, stats = size[1:], (_like(size, 256), record(256)), _conv.Epilogue(stats=True)
    w, w_t, w_r = _packed(_weight(x, 512)), _packed(_weight(g, 256, 3, True)), _packed(_weight(g, 512, 1, True))
    cases = [
        (x, w, _conv.pointwise(), _conv.Epilogue(record(512), "add_relu", o)),
        (g, w_r, _conv.pointwise(), _conv.Epilogue(join="add", o=o, o_mask=mask), dims),
        (Operand("bn_relu", g.a, record_a=below[1]), w_t, _conv.temporal(), stats),
        (g, w_t, _conv.temporal(), _conv.Epilogue(below=below), dims),
        (raw, _packed(_weight(raw, 256)), _conv.pointwise(2), stats),
        (g_thin, w_r, _conv.pointwise(2), _conv.Epilogue(join="add", o=o_thin, o_stride=2), dims),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(_conv, "_train_arguments", lambda *_: None)
        theirs = [_conv.conv(*case) for case in cases]
    monkeypatch.setattr(_conv, "plan_for", None)
    for case, (y, part) in zip(cases, theirs):
        own, own_part = _conv.conv(*case)
        check(own, y.double(), torch.bfloat16)
        assert (part is None) == (own_part is None)


@pytest.mark.gpu
def test_reasons():
    x = operand("raw", (2, 256, 3, 9, 5), torch.bfloat16)

    def why(co=256, taps=1, transposed=False, ci=256, **arguments):
        of = Operand("raw", torch.empty(2, ci, 3, 9, 5, dtype=torch.bfloat16, device="cuda"))
        w = torch.empty((ci, taps, co) if transposed else (co, taps, ci), dtype=torch.bfloat16, device="cuda")
        return _cuda.conv_tiles_why_not(of, w, transposed, **arguments)

    assert why() is None and why(2048) is None and why(taps=3, transposed=True) is None and why(stride=2) is None
    assert "multiples of 64" in why(96) and "multiples of 64" in why(ci=32)
    assert "stride" in why(taps=3, stride=2)
    bn_relu = _x("bn_relu", (2, 3, 9, 5), 256)
    assert "read: expected an activation" in _cuda.conv_tiles_why_not(bn_relu, _weight(bn_relu, 256, 1, True), True)
    assert "o_mask" in why(transposed=True, stride=2, dims=(3, 17, 9), below=(x.a, record(256)))
    assert "fit" in _cuda.gram_tiles_why_not(_x("join_b", (2, 3, 9, 5), 8192), _like((2, 3, 9, 5), 8192))
    assert _cuda.gram_tiles_why_not(x, _like((2, 3, 5, 3), 512), 2) is None


@pytest.mark.gpu
def test_the_gram_identity_takes_the_kernel():
    size, thin = (2, 3, 9, 7), (2, 3, 5, 4)
    assert _gram._in_cuda(_x("join_c", size, 256), _like(size, 512), 1)
    assert _gram._in_cuda(_x("raw", size, 256), _like(thin, 512), 2)


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)


def test_arguments_are_checked_before_any_launch():
    x, w, o = (
        Operand("raw", _zeros(1, 64, 2, 4, 4)),
        torch.zeros(64, 1, 64, dtype=torch.bfloat16),
        _zeros(1, 64, 2, 7, 8),
    )

    def run(w=w, **arguments):
        _cuda.conv_train(x, w, stride=2, **arguments)

    with pytest.raises(ValueError, match="dims: expected T, H, W of which stride 2"):
        run(transposed=True, dims=(2, 9, 8))
    with pytest.raises(ValueError, match="o_mask, below: expected None with a stride"):
        run(transposed=True, dims=(2, 7, 8), below=(o, torch.zeros(5, 64)))
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 64, 2, 4, 4\]"):
        run(transposed=True, dims=(2, 7, 8), o=o)
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 64, 2, 2, 2\]"):
        run(o=o)
    with pytest.raises(ValueError, match="stride: expected 1 of 3x1x1"):
        run(w=torch.zeros(64, 3, 64, dtype=torch.bfloat16))
