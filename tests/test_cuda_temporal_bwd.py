"""The Hopper kernel for both gradients of T, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import DTYPES, TEMPORAL_SIZES, assert_nan_at, assert_replays, operand, rows, value
from p3d_kernels._norm import Norm
from p3d_kernels.ops import _cuda, pseudo3d
from p3d_kernels.ops._fused import Config
from p3d_kernels.ops._triton import Operand, sum_splits
from test_cuda_conv_train import _check_sums
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

# Of kind A and the port's C; of the author's C; of B in both wirings; of a B whose input is no block's.
FORMS = [
    ("bn_bwd", "bn_relu", False, True),
    ("bn_bwd", "bn_relu", True, True),
    ("bn_bwd_open", "bn_relu", True, True),
    ("bn_bwd", "bn_relu", False, False),
    ("bn_bwd_open", "bn_relu", False, False),
    ("bn_bwd_open", "raw", False, False),
]


def _arguments(form, size, channels, dtype=torch.bfloat16, mean=0.0):
    dz_read, x_read, add, sums = form
    n, *dims = size
    dz, x = (operand(read, (n, channels, *dims), dtype, mean) for read in (dz_read, x_read))
    w = (torch.randn(channels, 3, channels, device="cuda") / (3 * channels) ** 0.5).to(dtype)
    return dz, x, w, add, sums


def _in_float64(dz, x, w, add, *_):
    """dx, dw [M, 3, M]."""
    t = dz.a.size(2)
    own, padded = value(dz), torch.nn.functional.pad(value(dz), (0, 0, 0, 0, 1, 1))
    dx = sum(torch.einsum("ncthw,cd->ndthw", padded[:, :, 2 - k : 2 - k + t], w[:, k].double()) for k in range(3))
    padded = torch.nn.functional.pad(value(x), (0, 0, 0, 0, 1, 1))
    dw = torch.stack([rows(own) @ rows(padded[:, :, k : k + t]).T for k in range(3)], 1)
    return dx + dz.a.double() if add else dx, dw


def _judge(arguments):
    dz, x, w, _, sums = arguments
    dx, part, dw = _cuda.temporal_bwd(*arguments)
    expected, expected_dw = _in_float64(*arguments)
    check(dx, expected, dx.dtype)
    assert dx.is_contiguous(memory_format=torch.channels_last_3d)
    scale = (dz.a.numel() // dz.channels) ** -0.5  # sums of 40,000 products leave float16
    result = (dw.double().sum(0).view_as(w) * scale).to(dx.dtype)
    check(result, expected_dw * scale, dx.dtype, kind="wgrad", name="dw")
    assert (part is not None) == sums
    if sums:
        _check_sums(part, dx, x.a, x.record_a)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("size", TEMPORAL_SIZES, ids=str)
def test_against_float64(size, channels, dtype):
    for form in FORMS[1:3]:
        _judge(_arguments(form, size, channels, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form(form, channels, dtype):
    for size in ((2, 3, 7, 11), (40, 8, 13, 10)):
        _judge(_arguments(form, size, channels, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_a_mean_of_300_deviations(channels):
    _judge(_arguments(FORMS[1], (3, 4, 21, 13), channels, mean=300.0))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_what_lies_past_a_frame_is_zero_and_not_what_the_read_makes_of_zero(channels):
    arguments = _arguments(FORMS[0], (2, 3, 7, 5), channels, torch.float16)
    record = arguments[1].record_a
    record[0], record[1], record[2] = -300.0, 300.0, 0.5  # relu(bn(0)) is infinite in float16
    arguments[1].a.fill_(-300.0)
    _judge(arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_a_nan_stays_where_it_is(channels):
    for at, taps, form in ((1, 3, FORMS[0]), (3, 2, FORMS[2])):
        dz, x, *rest = _arguments(form, (2, 4, 9, 7), channels)
        dz.a[0, 5, at, 2, 3] = torch.nan
        dz.b[0, 5, at, 2, 3] = 100.0  # open
        dx, part, dw = _cuda.temporal_bwd(dz, x, *rest)
        assert_nan_at(dx, (0, at, 2, 3), 3)
        dw = dw.view(-1, channels, 3, channels).sum(0).isnan()
        assert dw[5, :taps].all() and dw.sum() == taps * channels
        dz, x, *rest = _arguments(form, (2, 4, 9, 7), channels)
        x.a[1, 7, at, 2, 3] = torch.nan
        dx, part, dw = _cuda.temporal_bwd(dz, x, *rest)
        assert not dx.isnan().any() and part[:, 1].isnan().any(0).sum() == 1
        dw = dw.view(-1, channels, 3, channels).sum(0).isnan()
        assert dw[:, 3 - taps :, 7].all() and dw.sum() == taps * channels


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
def test_runs_are_equal_and_a_graph_replays_them(channels):
    for form in FORMS[1:4]:
        arguments = _arguments(form, (37, 4, 21, 13), channels)
        assert_replays(lambda a=arguments: _cuda.temporal_bwd(*a))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 64) + 2
    ends = slice(0, 1), slice(clips - 1, clips)
    small = _arguments(FORMS[0], (2, 8, 40, 40), 64)

    def large(a):
        out = torch.zeros(clips, 8, 40, 40, 64, dtype=a.dtype, device="cuda").permute(0, 4, 1, 2, 3)
        for i, end in enumerate(ends):
            out[end] = a[i : i + 1]
        return out

    dz, x, w, *rest = small
    dz = Operand(dz.read, large(dz.a), large(dz.b), record_b=dz.record_b, sums=dz.sums)
    dx, _, _ = _cuda.temporal_bwd(dz, Operand(x.read, large(x.a), record_a=x.record_a), w, *rest)
    expected, _ = _in_float64(*small)
    for i, end in enumerate(ends):
        check(dx[end], expected[i : i + 1], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("kind", ["A", "B", "C"])
@pytest.mark.parametrize("channels", [64, 128])
def test_the_backward_takes_the_kernel_and_two_kernels_agree(channels, kind, wiring, monkeypatch):
    config = Config(kind, wiring)
    shape = 3, channels, 4, 9, 7
    weights = [torch.randn(channels, channels, *taps, device="cuda") * 0.05 for taps in ((1, 3, 3), (3, 1, 1))]
    weights = [w.bfloat16().contiguous(memory_format=torch.channels_last_3d) for w in weights]
    norms = [Norm.of(torch.nn.BatchNorm3d(channels).cuda()) for _ in weights]
    x, dy = (torch.randn(shape, device="cuda").bfloat16().to(memory_format=torch.channels_last_3d) for _ in range(2))
    y, records, raws = pseudo3d._fwd(x, weights, norms, config)
    kernel, calls = _cuda.temporal_bwd, []
    monkeypatch.setattr(_cuda, "temporal_bwd", lambda *a: calls.append(a) or kernel(*a))

    def run():
        return pseudo3d._bwd(dy, x, y, weights, norms, records, raws, config, True, [True, True])

    dx, dws, _ = run()
    assert len(calls) == 1
    monkeypatch.setattr(_cuda, "temporal_bwd_why_not", lambda *_: "not wanted")
    expected, expected_dws, _ = run()
    assert len(calls) == 1
    check(dx, expected.double(), torch.bfloat16, chain=True)
    for dw, reference in zip(dws, expected_dws):
        check(dw.bfloat16(), reference.double(), torch.bfloat16, kind="wgrad", chain=True)


@pytest.mark.gpu
def test_the_sum_of_its_splits_has_the_weight_s_shape():
    dz, x, w, *rest = _arguments(FORMS[0], (5, 4, 9, 7), 128)
    dw = _cuda.temporal_bwd(dz, x, w, *rest)[2]
    summed = sum_splits([pseudo3d.Splits(dw, 3, 128)])[0].view(128, 128, 3)
    torch.testing.assert_close(summed, dw.view(-1, 128, 3, 128).sum(0).transpose(1, 2), rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
def test_reasons():
    def why(n=2, m=64, h=40, taps=3, dtype=torch.bfloat16, dz_read="bn_bwd", x_read="bn_relu", x_channels=None):
        dz = Operand(dz_read, torch.empty(n, m, 8, h, 40, dtype=dtype, device="meta"))
        x = Operand(x_read, torch.empty(n, x_channels or m, 8, h, 40, dtype=dtype, device="meta"))
        return _cuda.temporal_bwd_why_not(dz, x, torch.empty(m, taps, m, dtype=dtype))

    assert why() is None and why(m=128) is None and why(dz_read="bn_bwd_open", x_read="raw") is None
    assert "float32" in why(dtype=torch.float32)
    assert "256" in why(m=256) and "[2, 128, 8, 40, 40]" in why(x_channels=128) and "w [64, 1, 64]" in why(taps=1)
    assert "join_b" in why(x_read="join_b") and "masked" in why(dz_read="masked")
    assert "H * W" in why(h=2**26) and "2^24" in why(n=2**26)


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)


def _on_the_host(n=1):
    a, r = _zeros(n, 64, 2, 4, 4), torch.zeros(5, 64)
    dz, x = Operand("bn_bwd", a, a, record_b=r, sums=torch.zeros(4, 64)), Operand("bn_relu", a, record_a=r)
    return dict(dz=dz, x=x, w=torch.zeros(64, 3, 64, dtype=a.dtype))


def test_arguments_are_checked_before_any_launch():
    good = _on_the_host()
    a = good["x"].a

    def run(**changes):
        _cuda.temporal_bwd(**{**good, **changes})

    with pytest.raises(ValueError, match="dz: expected .*'raw'"):
        run(dz=Operand("raw", a))
    with pytest.raises(ValueError, match="dz: expected the tensors of bn_bwd"):
        run(dz=Operand("bn_bwd", a, a))
    with pytest.raises(ValueError, match="x: expected to be read bn_relu or, without sums, raw, got 'raw'"):
        run(x=Operand("raw", a), sums=True)
    with pytest.raises(ValueError, match=r"x.a: expected .*\[1, 64, 2, 4, 4\]"):
        run(x=Operand("raw", _zeros(1, 128, 2, 4, 4)))
    with pytest.raises(ValueError, match="x.a: expected channels_last_3d"):
        run(x=Operand("raw", a.contiguous()))
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[64, 3, 64\]"):
        run(w=good["w"][:, :2])


def test_no_positions_need_no_launch():
    dx, part, dw = _cuda.temporal_bwd(**_on_the_host(0), sums=True)
    assert dx.shape == (0, 64, 2, 4, 4) and part.shape == (1, 2, 64) and not part.any()
    assert dw.shape == (1, 64 * 3 * 64) and not dw.any()
