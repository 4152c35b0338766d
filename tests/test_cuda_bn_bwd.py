"""The Hopper kernel that makes the gradient of a normalised tensor in one launch, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import DTYPES, activation, assert_replays, record
from p3d_kernels.ops import _apply, _cuda
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

# C, (N, T, H, W): one position, which leaves a block without any; fewer and more positions than a block has threads,
# odd ones; rows of 16, 32 and 64 channels by clusters of one and two blocks; the most that there is room for.
SIZES = [
    (16, (1, 1, 1, 1)),
    (48, (1, 1, 7, 1)),
    (80, (4, 5, 10, 5)),
    (160, (3, 3, 19, 3)),
    (1024, (2, 3, 5, 7)),
    (1024, (32, 2, 10, 10)),
    (1024, (5, 2, 719, 1)),
    (2048, (32, 1, 5, 5)),
    (2048, (1, 4, 29, 31)),
    (2112, (1, 1, 11, 3)),
    (4096, (1, 2, 3, 5)),
    (8192, (1, 3, 1, 7)),
]


def _arguments(channels, size, dtype=torch.bfloat16, masked=True, mean=0.0):
    """What `bn_bwd` takes."""
    n, *dims = size
    shape, rows = (n, channels, *dims), record(channels, mean)
    rows[3] = 0.5 + torch.rand(channels)
    g, z = activation(shape, dtype, 0.25), activation(shape, dtype, mean)
    if why := _cuda.bn_bwd_why_not(z):
        pytest.skip(why)  # a card of fewer multiprocessors
    return g, z, rows, activation(shape, dtype) if masked else None


def _expected(g, z, record, g_mask):
    mean, scale, _, invstd = (row.double().view(1, -1, 1, 1, 1) for row in record[:4])
    g = g.double() if g_mask is None else torch.where(g_mask <= 0, 0, g.double())
    d = z.double() - mean
    sum_g, sum_gz = (v.sum((0, 2, 3, 4), keepdim=True) for v in (g, g * d))
    c0, c1 = sum_g / (g.numel() // g.size(1)), invstd**2 * sum_gz / (g.numel() // g.size(1))
    sums = torch.stack([row.flatten() for row in (c0, c1, invstd * sum_gz, sum_g)])
    return scale * (g - c0 - d * c1), sums


def _judge(g, z, record, g_mask):
    dz, sums = _cuda.bn_bwd(g, z, record, g_mask)
    expected, expected_sums = _expected(g, z, record, g_mask)
    check(dz, expected, z.dtype, name="dz")
    assert dz.is_contiguous(memory_format=torch.channels_last_3d)
    for name, row, of in zip(("c0", "c1", "dweight", "dbias"), sums, expected_sums):
        check(row, of, torch.float32, kind="bn_sum", name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels, size", SIZES, ids=str)
def test_against_float64(channels, size, masked, dtype):
    _judge(*_arguments(channels, size, dtype, masked))


@pytest.mark.gpu
@pytest.mark.parametrize("channels, size", SIZES[4:8], ids=str)
def test_a_mean_of_300_deviations(channels, size):
    _judge(*_arguments(channels, size, torch.float16, mean=300.0))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels, size", SIZES[4:8], ids=str)
def test_the_two_passes_agree(channels, size, masked):
    g, z, rows, g_mask = _arguments(channels, size, masked=masked)
    dz, sums = _cuda.bn_bwd(g, z, rows, g_mask)
    (part,) = _apply.bn_sums(g, g_mask, [z], [rows])
    theirs, their_sums = _apply.bn_bwd_apply(g, z, rows, part, "bn_bwd_open", g_mask)
    check(dz, theirs.a.double(), z.dtype, name="dz")
    check(sums, their_sums.double(), torch.float32, kind="bn_sum", name="sums")


@pytest.mark.gpu
@pytest.mark.parametrize("channels, size", SIZES[4:8], ids=str)
def test_a_nan_stays_in_its_channel(channels, size):
    g, z, rows, g_mask = _arguments(channels, size)
    at = size[0] - 1, 9, 0, 2, 0
    for value in (torch.nan, torch.inf):
        g[at] = value
        g_mask[at] = -1.0
        dz, sums = _cuda.bn_bwd(g, z, rows, g_mask)
        assert dz.isfinite().all() and sums.isfinite().all()
        g_mask[at] = torch.nan  # which masks nothing
        dz, sums = _cuda.bn_bwd(g, z, rows, g_mask)
        assert not dz[:, 9].isfinite().any() and not sums[:, 9].isfinite().any()
        assert (~dz.isfinite()).sum() == dz[:, 9].numel() and (~sums.isfinite()).sum() == 4
    g[at] = 1.0
    _judge(g, z, rows, g_mask)
    z[at] = torch.nan
    dz, sums = _cuda.bn_bwd(g, z, rows, None)
    assert dz[:, 9].isnan().all() and dz.isnan().sum() == dz[:, 9].numel()
    assert sums.isnan().sum() == sums[1:3, 9].isnan().sum() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("channels, size", SIZES[4:9], ids=str)
def test_runs_are_equal_and_a_graph_replays_them(channels, size):
    arguments = _arguments(channels, size)
    assert_replays(lambda: _cuda.bn_bwd(*arguments))


@pytest.mark.gpu
def test_who_takes_the_kernel(monkeypatch):
    kernel, calls = _cuda.bn_bwd, []
    monkeypatch.setattr(_cuda, "bn_bwd", lambda *a: calls.append(a) or kernel(*a))
    g, z, rows, g_mask = _arguments(1024, (2, 3, 6, 8))
    z_d, rows_d = z.neg(), rows.roll(1, 1).contiguous()
    made = _apply.bn_bwd_open(g, g_mask, [z, z_d], [rows, rows_d])
    for i, of in enumerate(((z, rows), (z_d, rows_d))):
        dz, sums = next(made)
        assert dz.read == "raw" and len(calls) == i + 1
        check(dz.a, _expected(g, *of, g_mask)[0], z.dtype)
        check(sums, _expected(g, *of, g_mask)[1], torch.float32, kind="bn_sum")
    assert not list(made)
    thin = [t[..., ::2, ::2].contiguous(memory_format=torch.channels_last_3d) for t in (g, g_mask)]
    wide, wide_mask = torch.zeros_like(g), torch.ones_like(g)
    wide[..., ::2, ::2], wide_mask[..., ::2, ::2] = thin
    ((dz, _),) = _apply.bn_bwd_open(*thin, [z], [rows], 2)
    check(dz.a, _expected(wide, z, rows, wide_mask)[0], z.dtype)
    assert len(calls) == 2


@pytest.mark.gpu
def test_reasons():
    def why(channels=1024, positions=6400, dtype=torch.bfloat16):
        return _cuda.bn_bwd_why_not(torch.empty(1, channels, 1, 1, positions, dtype=dtype, device="meta"))

    assert why() is None and why(2048, 800) is None and why(16, 1) is None
    assert "float32" in why(dtype=torch.float32) and "16 channels" in why(24) and "16 channels" in why(positions=0)
    assert "do not fit" in why(positions=20_000) and "do not fit" in why(1 << 15, 1)


def _on_the_host(n=1):
    g = torch.zeros(n, 64, 2, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    return dict(g=g, z=g, record=torch.zeros(5, 64))


def test_arguments_are_checked_before_any_launch():
    good = _on_the_host()
    z = good["z"]

    def run(**changes):
        _cuda.bn_bwd(**{**good, **changes})

    assert "float32" in _cuda.bn_bwd_why_not(z.float())
    with pytest.raises(ValueError, match="z: expected bfloat16 or float16"):
        run(z=z.float())
    with pytest.raises(ValueError, match=r"g: expected torch.bfloat16 \[1, 64, 2, 4, 4\]"):
        run(g=z[..., :2])
    with pytest.raises(ValueError, match="g_mask: expected channels_last_3d"):
        run(g_mask=z.contiguous())
    with pytest.raises(ValueError, match=r"record: expected float32 \[4, 64\]"):
        run(record=torch.zeros(3, 64))


def test_no_positions_need_no_launch():
    dz, sums = _cuda.bn_bwd(**_on_the_host(0))
    assert dz.shape == (0, 64, 2, 4, 4) and sums.shape == (4, 64) and not sums.any()
