"""The Hopper kernels for 1x1x1 convolutions in training."""

from __future__ import annotations

import copy

import pytest
import torch

import p3d_kernels as p3d
from operands import (
    DTYPES,
    ODD_SIZES,
    RUN_SIZES,
    activation,
    assert_nan_at,
    assert_nan_of_open,
    assert_replays,
    normalised,
    operand,
    record,
    value,
)
from p3d_kernels.ops import _conv, _cuda
from p3d_kernels.ops._cuda._common import _TENSORS
from p3d_kernels.ops._triton import Operand
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

READS = tuple([read for read in _TENSORS if read != "masked"])
# Frames of less than, exactly and more than 64 positions; more units than the card has warpgroups.
SIZES = [*ODD_SIZES, (1, 5, 8, 8), (1, 2, 13, 10), *RUN_SIZES]
NARROW = [(64, 64), (256, 64), (192, 64), (128, 128), (512, 128), (64, 128)]  # Ci, Co
WIDE = [(64, 256), (128, 512), (128, 256), (64, 768)]


def _x(read, size, channels, dtype=torch.bfloat16, mean=0.0):
    n, *dims = size
    return operand(read, (n, channels, *dims), dtype, mean)


def _like(size, channels, dtype=torch.bfloat16, mean=0.0):
    n, *dims = size
    return activation((n, channels, *dims), dtype, mean)


def _weight(x, co, taps=1, transposed=False):
    ci = x.channels
    shape = (ci, taps, co) if transposed else (co, taps, ci)
    return (torch.randn(shape, device="cuda") / (taps * ci) ** 0.5).to(x.a.dtype)


def _product(x, w, transposed):
    """In float64 [N, Co, T, H, W]."""
    a, w = value(x), w.double()
    if transposed:
        w = w.flip(1).transpose(0, 2)
    pad = w.size(1) // 2
    t = a.size(2)
    a = torch.nn.functional.pad(a, (0, 0, 0, 0, pad, pad))
    return sum(torch.einsum("ncthw,oc->nothw", a[:, :, k : k + t], w[:, k]) for k in range(w.size(1)))


def _expected(x, w, transposed=False, record=None, o=None, o_mask=None, relu=False, **_):
    v = _product(x, w, transposed)
    if record is not None:
        mean, scale, bias = (row.double().view(1, -1, 1, 1, 1) for row in record[:3])
        v = (v - mean) * scale + bias
    if o is not None:
        o = o.double()
        v = v + (o if o_mask is None else torch.where(o_mask.double() <= 0, 0, o))
    return torch.relu(v) if relu else v


def _check_statistics(part, y):
    n, mean, m2 = part.double().unbind(1)  # [R, C]
    values = y.double().transpose(0, 1).flatten(1)  # [C, P]
    count = values.size(1)
    total = (n * mean).sum(0) / count
    torch.testing.assert_close(n.sum(0), torch.full_like(total, count), rtol=0, atol=0)
    rounding = 3e-7 * values.mean(1).abs()
    assert ((total - values.mean(1)).abs() <= 1e-5 * values.std(1, unbiased=False) + rounding + 1e-12).all()
    squares = m2.sum(0) + (n * (mean - total) ** 2).sum(0)
    expected = (values - values.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(squares, expected, rtol=3e-5, atol=1e-9)


def _check_sums(part, g, z, rows, masks=True):
    """Of g and g (z - mean), where g is not masked by the ReLU of z."""
    g = torch.where(normalised(z, rows) <= 0, 0, g.double()) if masks else g.double()
    centred = z.double() - rows[0].double().view(1, -1, 1, 1, 1)
    for sums, terms in zip(part.double().sum(0), (g, g * centred)):
        size = terms.abs().sum((0, 2, 3, 4))
        assert ((sums - terms.sum((0, 2, 3, 4))).abs() <= 1e-5 * size + 1e-12).all()


def _judge(x, w, **arguments):
    y, part = _cuda.conv_train(x, w, **arguments)
    check(y, _expected(x, w, **arguments), x.a.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    below = arguments.get("below")
    if below is not None:
        _check_sums(part, y, *below)
    elif arguments.get("stats"):
        _check_statistics(part, y)
    else:
        assert part is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", NARROW, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_to_few_channels(size, channels, dtype):
    ci, co = channels
    x = _x("raw", size, ci, dtype)
    _judge(x, _weight(x, co), stats=True)
    _judge(x, _weight(x, co))
    x = _x("bn_bwd", size, ci, dtype)
    _judge(x, _weight(x, co, 1, True), transposed=True, o=_like(size, co, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", WIDE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_to_many_channels(size, channels, dtype):
    ci, co = channels
    x, o = _x("join_c", size, ci, dtype), _like(size, co, dtype)
    _judge(x, _weight(x, co), record=record(co), o=o, relu=True)
    x = _x("bn_relu", size, ci, dtype)
    _judge(x, _weight(x, co), record=record(co), o=o, relu=True)
    x = _x("bn_bwd", size, ci, dtype)
    _judge(x, _weight(x, co, 1, True), transposed=True, o=o, o_mask=_like(size, co, dtype))


# Units and slices: none left over by turns of all teams, few and so many that they are no longer shared out.
LEFT_OVER = [(1, 1, 132 * 64, 2), (1, 1, 132 * 64, 5), (1, 3, 132 * 32 - 1, 3), (2, 1, 132 * 16 + 7, 7)]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", WIDE, ids=str)
@pytest.mark.parametrize("size", LEFT_OVER, ids=str)
def test_units_that_are_left_over(size, channels):
    ci, co = channels
    x = _x("bn_relu", size, ci)
    _judge(x, _weight(x, co), record=record(co), o=_like(size, co), relu=True)
    _judge(x, _weight(x, co, 1, True), transposed=True, o=_like(size, co), o_mask=_like(size, co))


def _pair_arguments(read, size, co, dtype=torch.bfloat16, mean=0.0):
    x, down = _x(read, size, 64, dtype, mean), _like(size, 64, dtype, mean)
    w, w_down = (_weight(Operand("raw", t), co)[:, 0] for t in (x.a, down))
    return x, w, down, w_down, record(co), record(co)


def _judge_pair(x, w, down, w_down, rows, rows_down):
    y = _cuda.conv_pair(x, w, down, w_down, rows, rows_down)
    of_down = _expected(Operand("raw", down), w_down[:, None], record=rows_down)
    check(y, _expected(x, w[:, None], record=rows, o=of_down, relu=True), x.a.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("co", [256, 768])
@pytest.mark.parametrize("size", SIZES + LEFT_OVER, ids=str)
def test_a_pair(size, co, dtype):
    _judge_pair(*_pair_arguments("bn_relu", size, co, dtype))
    _judge_pair(*_pair_arguments("join_c", size, co, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", READS)
def test_a_pair_of_every_read(read, dtype):
    _judge_pair(*_pair_arguments(read, (2, 3, 7, 11), 256, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_of_means_of_300_deviations(dtype):
    """Both products lie at 300 of their deviations, about which their records centre them."""
    x, w, down, w_down, *_ = _pair_arguments("bn_relu", (3, 4, 21, 13), 256, dtype, 300.0)
    rows = []
    for a, weight in ((x, w), (Operand("raw", down), w_down)):
        z = _product(a, weight[:, None], False).transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(z, 1, correction=0)
        rows.append(torch.stack([mean, var.rsqrt(), torch.randn_like(mean), mean, mean]).float())
    _judge_pair(x, w, down, w_down, *rows)


@pytest.mark.gpu
def test_a_nan_in_either_of_a_pair_stays_where_it_is():
    for of_down in (False, True):
        arguments = _pair_arguments("bn_relu", (2, 4, 9, 7), 256)
        tensor = arguments[2] if of_down else arguments[0].a
        tensor[1, 5, 2, 3, 4] = torch.nan
        assert_nan_at(_cuda.conv_pair(*arguments), (1, 2, 3, 4))
    arguments = _pair_arguments("bn_relu", (2, 4, 9, 7), 256)
    arguments[5][1] = 0  # a scale of zero
    _judge_pair(*arguments)


@pytest.mark.gpu
def test_a_block_takes_the_pair_and_triton_agrees(monkeypatch):
    block, x = p3d.nn.Bottleneck(64, 64, "A").cuda(), _like((2, 3, 9, 7), 64).relu()
    own, calls, pair = copy.deepcopy(block), [], _cuda.conv_pair
    monkeypatch.setattr(_cuda, "conv_pair", lambda *arguments: calls.append(arguments) or pair(*arguments))
    with torch.autocast("cuda", torch.bfloat16):
        y = own(x)
        with p3d.use_backend("triton"):
            theirs = block(x)
    assert len(calls) == 2  # a new tape's passes: one compiles ahead, one records
    assert (y - theirs).double().norm() < 1e-2 * theirs.double().norm()
    for a, b in zip(own.buffers(), block.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", READS)
def test_every_read(read, dtype):
    size = 2, 3, 7, 11
    for ci, co in ((64, 64), (192, 128), (64, 256), (128, 256)):
        x = _x(read, size, ci, dtype)
        _judge(x, _weight(x, co))
        _judge(x, _weight(x, co, 1, True), transposed=True)


@pytest.mark.gpu
def test_every_epilogue_of_a_gradient():
    for size in ((2, 3, 7, 11), (40, 8, 13, 10)):
        for ci, co in ((256, 64), (256, 128)):
            x = _x("bn_bwd", size, ci)
            w, o, mask = _weight(x, co, 1, True), _like(size, co), _like(size, co)
            below = _like(size, co), record(co)
            for arguments in ({}, {"o": o}, {"o": o, "o_mask": mask}):
                _judge(x, w, transposed=True, **arguments)
                _judge(x, w, transposed=True, below=below, **arguments)


@pytest.mark.gpu
def test_a_mean_of_300_deviations():
    size = 3, 4, 21, 13
    for ci, co in ((64, 64), (256, 128)):
        x = _x("bn_relu", size, ci, mean=300.0)
        w = _weight(x, co)
        _judge(x, w, stats=True)
        _judge(Operand("raw", x.a), w, stats=True)
        x = _x("bn_bwd", size, ci, mean=300.0)
        below = _like(size, co, mean=300.0), record(co, 300.0)
        _judge(x, _weight(x, co, 1, True), transposed=True, below=below)
    x = _x("join_b", size, 64, mean=300.0)
    _judge(x, _weight(x, 256), record=record(256), o=_like(size, 256), relu=True)


@pytest.mark.gpu
def test_a_nan_stays_where_it_is():
    size, (n, t, h, w) = (2, 4, 9, 7), (at := (0, 1, 2, 3))
    for ci, co in ((128, 64), (64, 256), (128, 256)):
        x = _x("bn_relu", size, ci)
        x.a[n, 5, t, h, w] = torch.nan
        y, _ = _cuda.conv_train(x, _weight(x, co), record=record(co), o=_like(size, co), relu=True)
        assert_nan_at(y, at)
        g, o, mask = _x("bn_bwd", size, ci), _like(size, co), _like(size, co)
        arguments = {"transposed": True, "o": o, "o_mask": mask}
        w_t = _weight(g, co, 1, True)
        assert_nan_of_open(lambda g=g, w=w_t, a=arguments: _cuda.conv_train(g, w, **a)[0], o, mask, at)
    x = _x("raw", size, 64)
    x.a[n, 5, t, h, w] = torch.nan
    assert _cuda.conv_train(x, _weight(x, 64), stats=True)[1][:, 1:].isnan().any(0).all()


def _runs(size):
    """Launches of each form, with all that they may leave."""
    for ci, co in ((256, 64), (256, 128)):
        x, g = _x("bn_relu", size, ci), _x("bn_bwd", size, ci)
        w, w_t, below = _weight(x, co), _weight(g, co, 1, True), (_like(size, co), record(co))
        yield lambda x=x, w=w: _cuda.conv_train(x, w, stats=True)
        yield lambda g=g, w=w_t, b=below: _cuda.conv_train(g, w, transposed=True, o=b[0], below=b)
    for ci, co in ((64, 256), (128, 512)):
        x, g, o, mask = _x("join_c", size, ci), _x("bn_bwd", size, ci), _like(size, co), _like(size, co)
        rows, w, w_t = record(co), _weight(x, co), _weight(g, co, 1, True)
        yield lambda x=x, w=w, r=rows, o=o: _cuda.conv_train(x, w, record=r, o=o, relu=True)
        yield lambda g=g, w=w_t, o=o, m=mask: _cuda.conv_train(g, w, transposed=True, o=o, o_mask=m)
    arguments = _pair_arguments("join_c", size, 256)
    yield lambda a=arguments: (_cuda.conv_pair(*a),)


@pytest.mark.gpu
def test_runs_are_equal_and_a_graph_replays_them():
    for run in _runs((37, 4, 21, 13)):
        assert_replays(run)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 64) + 2
    ends = slice(0, 1), slice(clips - 1, clips)
    x = torch.zeros(clips, 8, 40, 40, 64, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3)
    for part in ends:
        x[part] = torch.randn_like(x[part])
    rows = record(64)
    x = Operand("bn_relu", x, record_a=rows)
    w = _weight(x, 64)
    y, part = _cuda.conv_train(x, w, stats=True)
    for end in ends:
        check(y[end], _expected(Operand("bn_relu", x.a[end], record_a=rows), w), torch.bfloat16)
    assert part[:, 0, 0].double().sum() == x.a.numel() // 64


@pytest.mark.gpu
def test_conv_takes_the_kernel_and_triton_agrees(monkeypatch):
    size = 2, 3, 9, 7
    x, g, o, mask = _x("join_b", size, 64), _x("bn_bwd", size, 64), _like(size, 256), _like(size, 256)
    w = _weight(x, 256).permute(0, 2, 1)[..., None, None].contiguous(memory_format=torch.channels_last_3d)
    dims, below = size[1:], (_like(size, 64), record(64))
    w_n = _weight(g, 64).permute(0, 2, 1)[..., None, None].contiguous(memory_format=torch.channels_last_3d)
    wide = _conv.Epilogue(record(256), "add_relu", o)
    masked = _conv.Epilogue(join="add", o=o, o_mask=mask)
    w_r = _weight(g, 256, 1, True).permute(0, 2, 1)[..., None, None].contiguous(memory_format=torch.channels_last_3d)
    cases = [
        (x, w, _conv.pointwise(), wide),
        (g, w_r, _conv.pointwise(), masked, dims),
        (Operand("bn_relu", g.a, record_a=below[1]), w_n, _conv.pointwise(), _conv.Epilogue(stats=True)),
        (g, w_n, _conv.pointwise(), _conv.Epilogue(below=below), dims),
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
    def why(ci=64, co=64, transposed=False, taps=1, **arguments):
        x = Operand("raw", torch.empty(2, ci, 3, 9, 5, dtype=torch.bfloat16, device="cuda"))
        w = torch.empty((ci, taps, co) if transposed else (co, taps, ci), dtype=torch.bfloat16, device="cuda")
        return _cuda.conv_train_why_not(x, w, transposed, **arguments)

    assert why() is None and why(512, 128) is None and why(128, 512) is None
    assert why(192, 64, transposed=True) is None and "taps" in why(taps=3)
    assert "multiples of 64" in why(96) and "multiples of 64" in why(64, 32)
    assert "multiples of 256" in why(64, 192) and "multiples of 256" in why(64, 256, stats=True)
    assert "fit" in why(2048, 128)

    def pair(m=64, ci=64, co=256, size=(2, 3, 9, 5)):
        w, w_down = (torch.empty(co, c, dtype=torch.bfloat16, device="cuda") for c in (m, ci))
        return _cuda.conv_pair_why_not(_x("raw", (2, 3, 9, 5), m), w, _like(size, ci), w_down)

    assert pair() is None and pair(co=512) is None
    assert "expected 64" in pair(128) and "down_channels" in pair(ci=128) and "multiples of 256" in pair(co=320)
    assert "stride" in pair(size=(2, 3, 5, 3))


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)


def test_arguments_are_checked_before_any_launch():
    a, rows = _zeros(1, 64, 2, 4, 4), torch.zeros(5, 64)
    x, w, wide = Operand("raw", a), torch.zeros(64, 1, 64, dtype=torch.bfloat16), _zeros(1, 128, 2, 4, 4)

    def run(x=x, w=w, **arguments):
        _cuda.conv_train(x, w, **arguments)

    with pytest.raises(ValueError, match="x: expected bfloat16"):
        run(Operand("raw", a.float()))
    with pytest.raises(ValueError, match="x: expected .*'masked'"):
        run(Operand("masked", a, a))
    with pytest.raises(ValueError, match="x.a: expected channels_last_3d"):
        run(Operand("raw", a.contiguous()))
    with pytest.raises(ValueError, match="x: expected the tensors of bn_bwd"):
        run(Operand("bn_bwd", a, a))
    with pytest.raises(ValueError, match=r"w: expected \[Co, taps, 64\]"):
        run(w=torch.zeros(64, 1, 128, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="w: expected torch.bfloat16"):
        run(w=w.half())
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 64, 2, 4, 4\]"):
        run(o=wide)
    with pytest.raises(ValueError, match=r"record: expected float32 \[3, 64\]"):
        run(record=rows[:2])
    with pytest.raises(ValueError, match="expected none of them with transposed"):
        run(transposed=True, stats=True)
    with pytest.raises(ValueError, match="o_mask, below: expected None unless transposed"):
        run(below=(a, rows))
    with pytest.raises(ValueError, match="o: expected a tensor"):
        run(transposed=True, o_mask=a)

    def pair(down=a, w=w[:, 0], w_down=w[:, 0], **arguments):
        _cuda.conv_pair(x, w, down, w_down, **{"record": rows, "record_down": rows, **arguments})

    with pytest.raises(ValueError, match=r"down: expected .*\[1, 64, 2, 4, 4\]"):
        pair(down=wide)
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[64, 64\]"):
        pair(w=w[:, 0].half())
    with pytest.raises(ValueError, match=r"record_down: expected float32 \[3, 64\]"):
        pair(record_down=rows[:2])


def test_no_positions_need_no_launch():
    x = Operand("raw", _zeros(0, 64, 2, 4, 4))
    w = torch.zeros(64, 1, 64, dtype=torch.bfloat16)
    y, part = _cuda.conv_train(x, w, stats=True)
    assert _cuda.conv_pair(x, w[:, 0], x.a, w[:, 0], *[torch.zeros(5, 64)] * 2).shape == y.shape
    assert y.shape == (0, 64, 2, 4, 4) and part.shape == (1, 3, 64) and not part.any()
