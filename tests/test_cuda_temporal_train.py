"""The Hopper kernel for T in training, forward with statistics, and for its gradient from a raw one."""

from __future__ import annotations

import pytest
import torch

from operands import DTYPES, TEMPORAL_SIZES, assert_nan_at, assert_replays, record
from p3d_kernels.ops import _conv, _cuda, pseudo3d
from p3d_kernels.ops._triton import Operand
from test_cuda_conv_train import _check_statistics, _expected, _weight, _x
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")


def _judge(x, w, transposed=False, stats=True):
    y, part = _cuda.temporal_train(x, w, transposed, stats)
    check(y, _expected(x, w, transposed), x.a.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert (part is not None) == stats
    if stats:
        assert part.size(0) <= torch.cuda.get_device_properties(0).multi_processor_count and part[:, 0].all()
        _check_statistics(part, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("size", TEMPORAL_SIZES, ids=str)
def test_against_float64(size, channels, dtype):
    x = _x("bn_relu", size, channels, dtype)
    _judge(x, _weight(x, channels, 3))
    x = _x("raw", size, channels, dtype)
    _judge(x, _weight(x, channels, 3, True), transposed=True, stats=False)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("read", ["raw", "bn_relu"])
def test_every_form(read, channels):
    for transposed in (False, True):
        for stats in (False, True):
            x = _x(read, (2, 3, 7, 11), channels)
            _judge(x, _weight(x, channels, 3, transposed), transposed, stats)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_a_mean_of_300_deviations(channels):
    x = _x("bn_relu", (3, 4, 21, 13), channels, mean=300.0)
    _judge(x, _weight(x, channels, 3))
    _judge(Operand("raw", x.a), _weight(x, channels, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_padding_is_zero_and_not_what_the_read_makes_of_zero(channels):
    x = _x("bn_relu", (2, 3, 7, 5), channels, torch.float16)
    x.record_a[0], x.record_a[1], x.record_a[2] = -300.0, 300.0, 0.5  # relu(bn(0)) is infinite in float16
    x.a.fill_(-300.0)
    _judge(x, _weight(x, channels, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_a_nan_stays_where_it_is(channels):
    for at in (0, 2, 3):
        x = _x("bn_relu", (2, 4, 9, 7), channels)
        x.a[1, 5, at, 2, 3] = torch.nan
        y, part = _cuda.temporal_train(x, _weight(x, channels, 3), stats=True)
        assert_nan_at(y, (1, at, 2, 3), 3)
        assert part[:, 1:].isnan().any(0).all() and not part[:, 0].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_runs_are_equal_and_a_graph_replays_them(channels):
    x = _x("bn_relu", (37, 4, 21, 13), channels)
    w = _weight(x, channels, 3)
    assert_replays(lambda: _cuda.temporal_train(x, w, stats=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 64) + 2
    ends = slice(0, 1), slice(clips - 1, clips)
    x = torch.zeros(clips, 8, 40, 40, 64, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3)
    for end in ends:
        x[end] = torch.randn_like(x[end])
    rows = record(64)
    x = Operand("bn_relu", x, record_a=rows)
    w = _weight(x, 64, 3)
    y, part = _cuda.temporal_train(x, w, stats=True)
    for end in ends:
        check(y[end], _expected(Operand("bn_relu", x.a[end], record_a=rows), w), torch.bfloat16)
    assert part[:, 0, 0].double().sum() == x.a.numel() // 64


@pytest.mark.gpu
def test_conv_takes_the_kernel_and_another_agrees(monkeypatch):
    x = _x("bn_relu", (2, 3, 9, 7), 64)
    w = _weight(x, 64, 3).permute(0, 2, 1)[..., None, None].contiguous(memory_format=torch.channels_last_3d)
    cases = [
        (x, w, _conv.temporal(), _conv.Epilogue(stats=True)),
        (Operand("raw", x.a), w, _conv.temporal(), _conv.Epilogue(), (3, 9, 7)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(_cuda, "temporal_train_why_not", lambda *_: "not wanted")
        theirs = [_conv.conv(*case)[0] for case in cases]
    monkeypatch.setattr(_conv, "_train_arguments", None)
    for case, y in zip(cases, theirs):
        check(_conv.conv(*case)[0], y.double(), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["A", "B", "C"])
def test_the_forward_takes_the_kernel(kind, monkeypatch):
    kernel, calls = _cuda.temporal_train, []
    monkeypatch.setattr(_cuda, "temporal_train", lambda *a: calls.append(a) or kernel(*a))
    x = _x("raw", (3, 4, 9, 7), 64)
    weights = [torch.randn(64, 64, *taps, device="cuda") * 0.05 for taps in ((1, 3, 3), (3, 1, 1))]
    weights = [w.bfloat16().contiguous(memory_format=torch.channels_last_3d) for w in weights]
    norms = [pseudo3d.Norm.of(torch.nn.BatchNorm3d(64).cuda()) for _ in weights]
    pseudo3d.st_fwd(x, weights, norms, pseudo3d.Config(kind, "author"))
    (call,) = calls
    assert call[0].read == ("raw" if kind == "B" else "bn_relu") and call[2:] == (False, True)


@pytest.mark.gpu
def test_reasons():
    def why(n=2, c=64, h=40, taps=3, dtype=torch.bfloat16, read="bn_relu", out=None):
        x = Operand(read, torch.empty(n, c, 8, h, 40, dtype=dtype, device="meta"))
        return _cuda.temporal_train_why_not(x, torch.empty(out or c, taps, c, dtype=dtype))

    assert why() is None and why(c=128) is None and why(read="raw") is None
    assert "float32" in why(dtype=torch.float32) and "join_b" in why(read="join_b")
    assert "256" in why(c=256) and "w [128, 3, 64]" in why(out=128) and "w [64, 1, 64]" in why(taps=1)
    assert "H * W" in why(h=2**26) and "2^24" in why(n=2**26)


def _on_the_host(n=1):
    a = torch.zeros(n, 64, 2, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    return dict(x=Operand("bn_relu", a, record_a=torch.zeros(5, 64)), w=torch.zeros(64, 3, 64, dtype=a.dtype))


def test_arguments_are_checked_before_any_launch():
    good = _on_the_host()
    a = good["x"].a

    def run(**changes):
        _cuda.temporal_train(**{**good, **changes})

    with pytest.raises(ValueError, match="x: expected .*'bn_bwd'"):
        run(x=Operand("bn_bwd", a, a))
    with pytest.raises(ValueError, match="x: expected bfloat16 or float16"):
        run(x=Operand("raw", a.float()))
    with pytest.raises(ValueError, match="x: expected the tensors of bn_relu"):
        run(x=Operand("bn_relu", a))
    with pytest.raises(ValueError, match="x.a: expected channels_last_3d"):
        run(x=Operand("raw", a.contiguous()))
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[64, 3, 64\]"):
        run(w=good["w"][:, :2])


def test_no_positions_need_no_launch():
    y, part = _cuda.temporal_train(**_on_the_host(0), stats=True)
    assert y.shape == (0, 64, 2, 4, 4) and part.shape == (1, 3, 64) and not part.any()
