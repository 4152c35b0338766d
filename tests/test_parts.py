"""Pieces of the Triton kernels: what they leave in parts, added up (statistics, sums, weight gradients), and TF32."""

import pytest
import torch

from p3d_kernels import Norm, _backends, use_backend
from p3d_kernels.ops._conv import is_packed, pack, pack_weight, packed_in
from p3d_kernels.ops._triton import FOLD, Splits, bn_bwd_finalise, bn_finalise, sum_splits, tl, to_tf32, triton


@pytest.fixture(autouse=True)
def _triton(device):
    with use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)


def statistics(rows: int, channels: int, offset: float, device: torch.device) -> torch.Tensor:
    """[rows, 3, channels] float64: parts of 64 values and a last one of 17, one empty, the first far from the rest."""
    std = 0.5 + torch.rand(channels, dtype=torch.float64)
    part = torch.empty(rows, 3, channels, dtype=torch.float64)
    part[:, 0], part[-1, 0] = 64, 17
    part[:, 1] = offset * std + torch.randn(rows, channels, dtype=torch.float64) * std / 8
    part[0, 1] += 5 * std
    part[:, 2] = (part[:, 0] - 1) * std**2
    if rows > 2:
        part[rows // 2] = 0
    return part.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 300])
@pytest.mark.parametrize("rows, channels", [(1, 5), (7, 48), (130, 12), (300, 5), (FOLD + 1, 33)])
def test_statistics(device, rows, channels, offset, dtype):
    part = statistics(rows, channels, offset, device).to(dtype)
    weight, bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    norm = Norm(weight, bias)
    n, mean, m2 = part.double().unbind(1)
    count = n.sum(0)
    mu = (n * mean).sum(0) / count
    m2 = (m2 + n * (mean - mu) ** 2).sum(0)
    std = (m2 / count + norm.eps).sqrt()
    record = bn_finalise(norm, channels, part, device)
    assert torch.equal(record, bn_finalise(norm, channels, part, device))

    u = torch.linspace(-3, 3, 101, dtype=torch.float64, device=device)[:, None]
    got_mean, got_scale, got_bias, got_invstd, unbiased = record.double()
    ours = (mu + u * std - got_mean) * got_scale + got_bias
    torch.testing.assert_close(ours, u * weight + bias, rtol=0, atol=3e-6)
    torch.testing.assert_close(got_invstd, 1 / std, rtol=2e-7, atol=0)
    torch.testing.assert_close(unbiased, m2 / (count - 1), rtol=2e-7, atol=0)


@pytest.mark.parametrize("row, reaches", [(1, [0, 1, 2, 3, 4]), (2, [1, 2, 3, 4])])
@pytest.mark.parametrize("rows", [9, FOLD + 1])
def test_a_nan_stays_in_its_channel(device, rows, row, reaches):
    part = statistics(rows, 8, 1, device).float()
    part[rows - 1, row, 3] = float("nan")
    nan = bn_finalise(Norm(), 8, part, device).isnan()
    assert nan[reaches, 3].all() and nan.sum() == nan[:, 3].sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows, channels", [(1, 5), (130, 12), (FOLD + 1, 33)])
def test_sums(device, rows, channels, training):
    part, record = torch.randn(rows, 2, channels, device=device), torch.rand(5, channels, device=device) + 0.5
    sum_g, sum_gz = part.double().sum(0)
    invstd = record[3].double()
    want = [sum_g / 1000 * training, invstd**2 * sum_gz / 1000 * training, invstd * sum_gz, sum_g]
    got = bn_bwd_finalise(part, record, 1000, training)
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "splits, co, taps, ci",
    [(1, 1, 1, 64), (3, 1, 1, 70), (37, 5, 1, 33), (5, 3, 3, 7), (19, 5, 9, 33), (133, 1, 9, 20)],
)
def test_sum_of_splits(device, splits, co, taps, ci):
    part = torch.randn(splits, co, taps, ci, device=device)
    (got,) = sum_splits([Splits(part.flatten(1), taps, ci)])
    torch.testing.assert_close(got.view(co, ci, taps).double(), part.double().sum(0).mT, rtol=1e-6, atol=2e-6)


def test_sums_of_several_gradients(device):
    """More than one launch takes, of different forms, some of them absent."""
    forms = [(3, 5, 9, 33), (70, 4, 1, 20), None, (2, 16, 3, 16), (1, 7, 9, 5), (1, 4, 1, 20), None, (33, 3, 1, 7)]
    forms.append((5, 4, 1, 6))
    parts = [None if form is None else torch.randn(form, device=device) for form in forms]
    got = sum_splits([None if p is None else Splits(p.flatten(1), *p.shape[2:]) for p in parts])
    for part, total in zip(parts, got, strict=True):
        assert (part is None) == (total is None)
        if part is not None:
            (alone,) = sum_splits([Splits(part.flatten(1), *part.shape[2:])])
            assert torch.equal(total, alone)
            want = part.double().sum(0).mT.flatten()
            torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_packed_weights(device, dtype):
    """Many at once, some alike; other layouts and strides, what lies well already, odd sizes, an unaligned slice."""
    shapes = [(24, 16, 1, 1, 1), (16, 20, 1, 3, 3), (40, 33, 3, 1, 1), (7, 5, 3, 3, 3)] + [(4, 8, 1, 3, 3)] * 17
    weights = [torch.randn(shape, device=device) for shape in (*shapes, shapes[1])]
    weights += [
        torch.randn(40, 66, 3, 1, 1, device=device)[:, ::2],
        torch.randn(16, 20, 1, 3, 3, device=device).transpose(3, 4),
        torch.randn(5, 9, 3, 3, 3, device=device)[..., :2],
        torch.randn(70, 33, 1, 3, 3, device=device).contiguous(memory_format=torch.channels_last_3d),
        pack_weight(torch.randn(8, 24, 1, 3, 3, device=device), dtype),
        torch.randn(3, 4, 1, 3, 3, device=device, dtype=torch.float16),
        torch.randn(1 + 12 * 9, device=device)[1:].view(3, 4, 1, 3, 3),
    ]
    packed, buffer = pack(weights, dtype)
    for got in (packed, packed_in(buffer, weights, dtype)):
        for ours, w in zip(got, weights, strict=True):
            assert torch.equal(ours, w.to(dtype)) and is_packed(ours, dtype)
    assert pack([packed[0]], dtype)[1] is None


@triton.jit
def to_tf32_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, to_tf32(tl.load(x + at)))


def test_to_tf32(device):
    exact = torch.tensor([0.0, 1.0, 1 + 2**-10, 3.0, 2.0**-120, float("inf")])
    halfway = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 - 2**-23])
    rounded = torch.tensor([1 + 2**-10, 1 + 2**-9, 1.0])
    x, want = torch.cat([exact, halfway]), torch.cat([exact, rounded])
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x, want = (torch.cat([v, -v, nan, 1 + torch.rand(12)]).to(device) for v in (x, want))
    want[-12:] = (x[-12:].double() * (1 + 2**-40)).half().float()  # TF32 has the fraction of float16
    y = torch.empty_like(x)
    assert x.numel() == 32
    to_tf32_kernel[(1,)](x, y, BLOCK=32)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
