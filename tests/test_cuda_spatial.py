"""The Hopper spatial kernel against float64, shape by shape; run as a script it prints times against cuDNN."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F

from p3d_kernels.ops import _cuda
from p3d_kernels.ops._triton import Splits, sum_splits
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

DTYPES = (torch.bfloat16, torch.float16)
# N, T, H, W, Ci, Co: every tile size of the kernel, odd and thin frames, several chunks, half-filled blocks of couts.
RESIDENT = [
    (1, 1, 1, 1, 64, 64),
    (1, 2, 1, 9, 64, 64),
    (1, 2, 9, 1, 64, 64),
    (2, 3, 7, 5, 64, 64),
    (1, 2, 20, 120, 64, 64),
    (33, 8, 11, 13, 64, 64),
    (4, 4, 40, 57, 64, 64),
    (5, 4, 40, 40, 64, 64),
    (1, 3, 41, 190, 64, 64),
]
STREAMED = [
    (1, 1, 1, 1, 64, 128),
    (2, 3, 7, 5, 128, 64),
    (1, 2, 9, 13, 192, 192),
    (1, 2, 9, 1, 256, 128),
    (1, 1, 40, 40, 320, 64),
    (4, 1, 5, 5, 512, 512),
    (16, 2, 10, 10, 256, 256),
    (32, 2, 10, 10, 256, 256),
    (5, 1, 7, 190, 128, 128),
    (8, 2, 5, 190, 64, 128),
    (33, 8, 20, 5, 128, 128),
    (33, 8, 10, 9, 128, 128),
    (33, 8, 18, 3, 128, 128),
    (3, 1, 40, 41, 256, 128),
    (12, 4, 20, 20, 128, 128),
]
# The weight gradient's tiles: parts of rows, the last of them narrower or one column, rows that do not divide, more
# turns than stages, frames of few pixels, stages of P3D-63.
WGRAD = [
    (1, 2, 3, 300, 64, 64),
    (1, 1, 2, 173, 128, 64),
    (2, 3, 41, 71, 64, 128),
    (1, 1, 300, 1, 64, 64),
    (64, 4, 1, 1, 64, 64),
    (40, 4, 2, 3, 128, 64),
    (32, 8, 40, 40, 64, 64),
    (32, 4, 20, 20, 128, 128),
    (31, 2, 19, 21, 64, 192),
    (32, 1, 5, 5, 512, 512),
]
# What inference takes another kernel for: every tile size of it, one and two chunks, rows that do not divide, more
# stores than one a tile, several turns, several blocks of couts.
BOXES = [
    (2, 3, 7, 5, 64, 64),
    (1, 2, 9, 1, 64, 128),
    (32, 8, 40, 40, 64, 64),
    (32, 8, 39, 40, 64, 64),
    (32, 4, 20, 20, 128, 128),
    (12, 4, 20, 20, 128, 64),
    (33, 8, 10, 9, 128, 128),
    (33, 8, 20, 5, 128, 192),
    (1, 2, 300, 1, 64, 64),
    (4, 5, 17, 25, 64, 192),
]
# The same where weights pass through the rings of two blocks: an odd number of tiles, more chunks than halo tiles.
PAIRS = [
    (1, 1, 1, 1, 256, 128),
    (33, 4, 20, 20, 256, 128),
    (32, 2, 10, 10, 256, 256),
    (64, 2, 10, 10, 256, 256),
    (11, 3, 10, 10, 256, 256),
    (5, 3, 10, 10, 256, 256),
    (7, 1, 9, 13, 320, 384),
    (5, 1, 23, 23, 256, 128),
    (12, 1, 5, 5, 512, 512),
]
# What training takes yet another kernel for, as for most of the above; here an odd number of tiles and several turns of
# pairs of blocks, one row a tile, one column, odd numbers of blocks of couts.
TRAIN = [
    (65, 1, 10, 10, 256, 256),
    (131, 1, 10, 10, 256, 256),
    (2, 3, 5, 57, 64, 64),
    (1, 2, 3, 120, 64, 64),
    (1, 1, 169, 1, 64, 128),
    (44, 2, 13, 19, 64, 320),
    (67, 4, 9, 19, 128, 128),
]
# Where the warpgroups of training's blocks have halves of the channels: several frames a tile, the last one of fewer,
# several turns, an odd number of tiles or of blocks of couts, one frame a tile and some of its rows.
HALVES = [
    (31, 1, 5, 5, 512, 512),
    (63, 1, 5, 5, 512, 512),
    (45, 2, 3, 6, 128, 320),
    (131, 3, 1, 2, 256, 384),
    (99, 2, 3, 3, 384, 256),
    (59, 1, 6, 4, 256, 512),
    (16, 2, 10, 10, 256, 256),
    (5, 3, 10, 10, 256, 256),
]
ALL = [*RESIDENT, *STREAMED, *BOXES, *PAIRS, *TRAIN, *HALVES[:6]]


def _names(shape):
    return "x".join(map(str, shape))


def _activation(n, c, t, h, w, dtype):
    return torch.randn(n, c, t, h, w, device="cuda", dtype=dtype).to(memory_format=torch.channels_last_3d)


def _weight(co, ci, dtype):
    """An OIDHW weight and its packed form [Co, 9, Ci]."""
    w = (torch.randn(co, ci, 1, 3, 3, device="cuda") / (9 * ci) ** 0.5).to(dtype)
    return w, w.permute(0, 2, 3, 4, 1).reshape(co, 9, ci).contiguous()


def _affine(c, mean=0.0):
    return torch.stack([mean + torch.randn(c), 0.5 + torch.rand(c), 0.5 * torch.randn(c)]).cuda()


def _bn_relu(z, affine):
    """relu((z - mean) * scale + bias) in the dtype of z."""
    mean, scale, bias = (row.to(z.dtype).view(1, -1, 1, 1, 1) for row in affine)
    return torch.relu((z - mean) * scale + bias)


def _open(z, affine):
    """Where relu passes (z - mean) * scale + bias: the sign that float32 with one rounding gives, found in float64."""
    mean, scale, bias = (row.view(1, -1, 1, 1, 1) for row in affine)
    return ~((z.float() - mean).double() * scale.double() + bias.double() <= 0)


def _bn_bwd(g, z, affine, sums):
    """The gradient of z from g, that of relu(u), in the dtype of g."""
    mean, scale, c0, c1 = (row.double().view(1, -1, 1, 1, 1) for row in (affine[0], affine[1], *sums))
    return (scale * (torch.where(_open(z, affine), g.double(), 0) - c0 - (z.double() - mean) * c1)).to(g.dtype)


def _gradient(shape, dtype):
    """g, z, affine and sums [2, Co] of a convolution's output."""
    n, t, h, w, _, co = shape
    g, z = (_activation(n, co, t, h, w, dtype) for _ in range(2))
    return g, z, _affine(co), 0.3 * torch.randn(2, co, device="cuda")


def _wgrad_in_float64(dz, a):
    """dw [Co, 9, Ci] of a 1x3x3 convolution of a, and the sums of the terms' magnitudes."""
    h, w = a.shape[3:]
    rows = dz.double().transpose(0, 1).flatten(1)
    padded = F.pad(a.double(), (1, 1, 1, 1))
    taps = [padded[..., i : i + h, j : j + w].transpose(0, 1).flatten(1).T for i in range(3) for j in range(3)]
    return torch.stack([rows @ tap for tap in taps], 1), torch.stack([rows.abs() @ tap.abs() for tap in taps], 1)


def _check_wgrad(part, dz, a, rounded):
    """`rounded`: dz and a were rounded by the kernel, now and then to the other neighbour than in float64.

    The matrix unit cuts sums off instead of rounding them: each 16 positions lose up to 2^-23 of the sum so far, all in
    one direction; that sum is half of the whole in the mean. It is most of the error where products have a mean.

    Two float32 evaluations of a prologue differ by some 2^-24 of its terms, and by 8 * 2^-24 of its value in the mean,
    where terms cancel included; a rounding boundary lies between them once in eps / (8 * 2^-24) values (of dz and a
    together 70 of 409,600 in float16 by an emulation in float64, where this says 200). Such a flip moves a value by at
    most eps of it, up or down: of n of them 6 sqrt(n) in the mean square are allowed, and two of the largest.
    """
    expected, magnitude = _wgrad_in_float64(dz, a)
    positions, eps = dz.numel() // dz.size(1), torch.finfo(dz.dtype).eps
    bound = (1e-5 + positions / part.size(0) / 16 * 2**-24) * magnitude + 1e-30
    if rounded:
        dz, a = dz.double(), a.double()
        flips = 8 * 2**-24 / eps * positions
        typical = dz.square().mean().sqrt() * a.square().mean().sqrt()
        bound += eps * (2 * dz.abs().max() * a.abs().max() + 6 * flips**0.5 * typical)
    error = (part.double().sum(0).view_as(expected) - expected).abs()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"error {error.flatten()[worst]:.3g}, {bound.flatten()[worst]:.3g} is allowed"


def _combine(partials):
    """Chan's formula in float64: n, mean and M2 of all rows [R, 3, C] together."""
    n, mean, m2 = partials.double().unbind(1)
    total = n.sum(0)
    centre = (n * mean).sum(0) / total
    return total, centre, (m2 + n * (mean - centre) ** 2).sum(0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RESIDENT + STREAMED + BOXES + PAIRS, ids=_names)
def test_plain(shape, dtype):
    n, t, h, w, ci, co = shape
    x, (weight, packed) = _activation(n, ci, t, h, w, dtype), _weight(co, ci, dtype)
    y, partials = _cuda.spatial_conv_fwd(x, packed)
    assert partials is None and y.is_contiguous(memory_format=torch.channels_last_3d)
    padding = (0, 1, 1)
    check(y, F.conv3d(x.double(), weight.double(), padding=padding), dtype, vendor=F.conv3d(x, weight, padding=padding))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("shape", ALL, ids=_names)
def test_prologue_and_statistics(shape, dtype, prologue):
    n, t, h, w, ci, co = shape
    x, (weight, packed) = _activation(n, ci, t, h, w, dtype), _weight(co, ci, dtype)
    affine = _affine(ci) if prologue else None
    y, partials = _cuda.spatial_conv_fwd(x, packed, affine=affine, stats=True)
    u = _bn_relu(x.float(), affine).to(dtype) if prologue else x
    check(y, F.conv3d(u.double(), weight.double(), padding=(0, 1, 1)), dtype)

    assert partials.shape[1:] == (3, co)
    count, mean, m2 = _combine(partials)
    rows = y.double().transpose(0, 1).reshape(co, -1)
    assert (count == rows.size(1)).all()
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m2, ((rows - rows.mean(1, keepdim=True)) ** 2).sum(1), rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ALL, ids=_names)
def test_plain_dgrad(shape, dtype):
    n, t, h, w, ci, co = shape
    dy, (weight, packed) = _activation(n, co, t, h, w, dtype), _weight(co, ci, dtype)
    dx, part = _cuda.spatial_conv_dgrad(dy, None, None, None, packed)
    assert part is None and dx.is_contiguous(memory_format=torch.channels_last_3d)
    check(dx, F.conv_transpose3d(dy.double(), weight.double(), padding=(0, 1, 1)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologue, add", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", ALL, ids=_names)
def test_dgrad_with_the_sums_below(shape, dtype, prologue, add):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), (weight, packed) = _gradient(shape, dtype), _weight(co, ci, dtype)
    o = _activation(n, ci, t, h, w, dtype) if add else None
    below, below_affine = _activation(n, ci, t, h, w, dtype), _affine(ci)
    pending = (z, affine, sums) if prologue else (None, None, None)
    dx, part = _cuda.spatial_conv_dgrad(g, *pending, packed, o, (below, below_affine))
    dz = _bn_bwd(g, z, affine, sums) if prologue else g
    reference = F.conv_transpose3d(dz.double(), weight.double(), padding=(0, 1, 1))
    check(dx, reference + o.double() if add else reference, dtype)

    assert part.shape[1:] == (2, ci)
    masked = torch.where(_open(below, below_affine), dx.double(), 0)
    centred = (below.float() - below_affine[0].view(1, -1, 1, 1, 1)).double()
    for row, terms in zip(part.double().sum(0), (masked, masked * centred)):
        error = (row - terms.sum((0, 2, 3, 4))).abs()
        assert (error <= 3e-6 * terms.abs().sum((0, 2, 3, 4))).all()


@pytest.mark.gpu
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("sums_below", [False, True])
@pytest.mark.parametrize(
    "shape",
    [RESIDENT[3], RESIDENT[5], STREAMED[1], STREAMED[2], STREAMED[6], BOXES[4], PAIRS[2], TRAIN[0], HALVES[0]],
    ids=_names,
)
def test_dgrad_options_are_independent(shape, sums_below, add, prologue):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), (weight, packed) = _gradient(shape, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    o = _activation(n, ci, t, h, w, torch.bfloat16) if add else None
    below = (_activation(n, ci, t, h, w, torch.bfloat16), _affine(ci)) if sums_below else None
    prologue_args = (z, affine, sums) if prologue else (None, None, None)
    dx, part = _cuda.spatial_conv_dgrad(g, *prologue_args, packed, o, below)
    assert (part is not None) == sums_below
    dz = _bn_bwd(g, z, affine, sums) if prologue else g
    reference = F.conv_transpose3d(dz.double(), weight.double(), padding=(0, 1, 1))
    check(dx, reference + o.double() if add else reference, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [RESIDENT[3], STREAMED[2], BOXES[4], TRAIN[0]], ids=_names)
def test_dgrad_masks_a_nan_of_g_and_passes_it_where_the_relu_is_open(shape):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), (weight, packed) = _gradient(shape, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    spot = (0, 1, 0, 2, 0)
    g[spot] = torch.nan
    for value, seen in ((-100.0, False), (100.0, True), (torch.nan, True)):
        z[spot] = value
        dx, _ = _cuda.spatial_conv_dgrad(g, z, affine, sums, packed)
        spread = torch.zeros_like(g)
        spread[spot] = torch.nan if seen else 0
        reference = F.conv_transpose3d(spread, torch.ones_like(weight), padding=(0, 1, 1))
        assert torch.equal(dx.isnan(), reference.isnan())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [RESIDENT[3], STREAMED[2], BOXES[4], TRAIN[0]], ids=_names)
def test_dgrad_at_a_mean_of_300_deviations(shape):
    n, t, h, w, ci, co = shape
    (g, z, _, sums), (weight, packed) = _gradient(shape, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    z, below = ((v.float() + 300).bfloat16() for v in (z, _activation(n, ci, t, h, w, torch.bfloat16)))
    affine, below_affine = _affine(co, mean=300.0), _affine(ci, mean=300.0)
    dx, part = _cuda.spatial_conv_dgrad(g, z, affine, sums, packed, None, (below, below_affine))
    dz = _bn_bwd(g, z, affine, sums)
    check(dx, F.conv_transpose3d(dz.double(), weight.double(), padding=(0, 1, 1)), torch.bfloat16)
    terms = torch.where(_open(below, below_affine), dx.double(), 0)
    terms = terms * (below.double() - below_affine[0].double().view(1, -1, 1, 1, 1))
    error = (part[:, 1].double().sum(0) - terms.sum((0, 2, 3, 4))).abs()
    assert (error <= 3e-6 * terms.abs().sum((0, 2, 3, 4))).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(4, 4, 21, 13, 64, 64), (4, 4, 21, 13, 128, 192), BOXES[2], BOXES[4], PAIRS[2], TRAIN[1], HALVES[0], HALVES[1]],
    ids=_names,
)
def test_runs_of_training_are_equal(shape):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), (_, packed) = _gradient(shape, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    o, below = (_activation(n, ci, t, h, w, torch.bfloat16) for _ in range(2))
    below_affine = _affine(ci)

    def run():
        rest = packed, o, (below, below_affine)
        dgrad = (
            *_cuda.spatial_conv_dgrad(g, None, None, None, *rest),
            *_cuda.spatial_conv_dgrad(g, z, affine, sums, *rest),
        )
        return *dgrad, *_cuda.spatial_conv_fwd(below, packed, affine=below_affine, stats=True)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [BOXES[2], BOXES[4], PAIRS[2]], ids=_names)
def test_a_block_leaves_one_row_of_partial_sums(shape):
    n, t, h, w, ci, co = shape
    (g, _, affine, _), (_, packed) = _gradient(shape, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    most = torch.cuda.get_device_properties("cuda").multi_processor_count // (co // (64 if co < 256 else 128))
    assert _cuda.spatial_conv_fwd(g, packed, affine=affine, stats=True)[1].size(0) <= most
    assert _cuda.spatial_conv_dgrad(g, None, None, None, packed, None, (g, affine))[1].size(0) <= most


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RESIDENT + STREAMED + WGRAD, ids=_names)
def test_plain_wgrad(shape, dtype):
    n, t, h, w, ci, co = shape
    dz, a = _activation(n, co, t, h, w, dtype), _activation(n, ci, t, h, w, dtype)
    part = _cuda.spatial_wgrad(dz, None, None, None, a)
    assert part.dtype == torch.float32 and part.shape[1:] == (co * 9 * ci,)
    _check_wgrad(part, dz, a, rounded=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RESIDENT + STREAMED + WGRAD, ids=_names)
def test_wgrad_with_both_prologues(shape, dtype):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), a, a_affine = _gradient(shape, dtype), _activation(n, ci, t, h, w, dtype), _affine(ci)
    finished, dz = torch.full_like(g, torch.nan), _bn_bwd(g, z, affine, sums)
    part = _cuda.spatial_wgrad(g, z, affine, sums, a, a_affine, finished)
    _check_wgrad(part, dz, _bn_relu(a.float(), a_affine).to(dtype), rounded=True)
    error, dz = (finished.double() - dz.double()).abs(), dz.double().abs()
    assert (error <= torch.finfo(dtype).eps * dz + 1e-5).all()  # now and then the other neighbour
    assert torch.equal(part, _cuda.spatial_wgrad(g, z, affine, sums, a, a_affine))


@pytest.mark.gpu
@pytest.mark.parametrize("prologues", [(False, True), (True, False)], ids=str)
@pytest.mark.parametrize(
    "shape", [RESIDENT[3], RESIDENT[5], *STREAMED[1:3], STREAMED[6], *WGRAD[:3], WGRAD[5]], ids=_names
)
def test_wgrad_prologues_are_independent(shape, prologues):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), a = _gradient(shape, torch.bfloat16), _activation(n, ci, t, h, w, torch.bfloat16)
    a_affine = _affine(ci) if prologues[1] else None
    part = _cuda.spatial_wgrad(g, *((z, affine, sums) if prologues[0] else (None, None, None)), a, a_affine)
    dz = _bn_bwd(g, z, affine, sums) if prologues[0] else g
    _check_wgrad(part, dz, _bn_relu(a.float(), a_affine).bfloat16() if prologues[1] else a, rounded=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [RESIDENT[3], STREAMED[2]], ids=_names)
def test_wgrad_at_a_mean_of_300_deviations(shape):
    n, t, h, w, ci, co = shape
    (g, z, _, sums), a = _gradient(shape, torch.bfloat16), _activation(n, ci, t, h, w, torch.bfloat16)
    (z, a), affine, a_affine = ((v.float() + 300).bfloat16() for v in (z, a)), _affine(co, 300.0), _affine(ci, 300.0)
    part = _cuda.spatial_wgrad(g, z, affine, sums, a, a_affine)
    _check_wgrad(part, _bn_bwd(g, z, affine, sums), _bn_relu(a.double(), a_affine).bfloat16(), rounded=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [RESIDENT[3], STREAMED[2]], ids=_names)
def test_wgrad_passes_a_nan_to_its_channels_only(shape):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), a = _gradient(shape, torch.bfloat16), _activation(n, ci, t, h, w, torch.bfloat16)
    g[0, 1, 0, 2, 1] = torch.nan
    for value, seen in ((-100.0, False), (100.0, True)):
        z[0, 1, 0, 2, 1] = value
        dw = _cuda.spatial_wgrad(g, z, affine, sums, a, _affine(ci)).sum(0).view(co, 9, ci)
        assert dw[1].isnan().all() == seen and dw.isnan().any() == seen
    a[0, 3, 0, 2, 1] = torch.nan
    dw = _cuda.spatial_wgrad(g.nan_to_num(), z, affine, sums, a, _affine(ci)).sum(0).view(co, 9, ci)
    assert dw[:, :, 3].isnan().all() and dw.isnan().sum() == 9 * co


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 4, 21, 13, 64, 64), (4, 4, 21, 13, 128, 192)], ids=_names)
def test_wgrad_runs_are_equal(shape):
    n, t, h, w, ci, co = shape
    (g, z, affine, sums), a = _gradient(shape, torch.bfloat16), _activation(n, ci, t, h, w, torch.bfloat16)
    args = g, z, affine, sums, a, _affine(ci)
    first, again = (torch.full_like(g, torch.nan) for _ in range(2))
    assert torch.equal(_cuda.spatial_wgrad(*args, first), _cuda.spatial_wgrad(*args, again))
    assert torch.equal(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize(
    "shape", [RESIDENT[3], RESIDENT[5], STREAMED[1], STREAMED[2], STREAMED[6], *BOXES, *PAIRS], ids=_names
)
def test_inference_epilogue(shape, dtype, prologue):
    n, t, h, w, ci, co = shape
    x, (weight, packed) = _activation(n, ci, t, h, w, dtype), _weight(co, ci, dtype)
    affine, out_affine = _affine(ci) if prologue else None, _affine(co)
    y, _ = _cuda.spatial_conv_fwd(x, packed, affine=affine, out_affine=out_affine)
    u = _bn_relu(x.float(), affine).to(dtype) if prologue else x
    check(y, _bn_relu(F.conv3d(u.double(), weight.double(), padding=(0, 1, 1)), out_affine), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 4, 21, 13, 64, 64), (3, 4, 21, 13, 128, 128), TRAIN[0], HALVES[0]], ids=_names)
def test_statistics_of_a_mean_of_300_deviations(shape):
    """The centre tap is the identity and x is constant but for its last bits."""
    n, t, h, w, ci, co = shape
    packed = torch.zeros(co, 9, ci, device="cuda", dtype=torch.bfloat16)
    packed[:, 4] = torch.eye(co, ci)
    x = (300 + 2 * torch.randint(0, 2, (n, ci, t, h, w), device="cuda")).bfloat16()
    x = x.to(memory_format=torch.channels_last_3d)
    y, partials = _cuda.spatial_conv_fwd(x, packed, stats=True)
    assert torch.equal(y, x)
    _, mean, m2 = _combine(partials)
    rows = x.double().transpose(0, 1).reshape(co, -1)
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2, ((rows - rows.mean(1, keepdim=True)) ** 2).sum(1), rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [RESIDENT[3], STREAMED[2], BOXES[4], TRAIN[0]], ids=_names)
def test_prologue_of_a_mean_of_300_deviations(shape):
    n, t, h, w, ci, co = shape
    x = (_activation(n, ci, t, h, w, torch.bfloat16).float() + 300).bfloat16()
    (weight, packed), affine = _weight(co, ci, torch.bfloat16), _affine(ci, mean=300.0)
    y, _ = _cuda.spatial_conv_fwd(x, packed, affine=affine)
    u = _bn_relu(x.double(), affine).bfloat16()
    check(y, F.conv3d(u.double(), weight.double(), padding=(0, 1, 1)), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [RESIDENT[3], STREAMED[2]], ids=_names)
def test_nan_passes_through_both_relus_and_reaches_its_neighbours_only(shape):
    n, t, h, w, ci, co = shape
    x, (weight, packed) = _activation(n, ci, t, h, w, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    x[0, 1, 0, 2, 0] = torch.nan
    y, _ = _cuda.spatial_conv_fwd(x, packed, affine=_affine(ci), out_affine=_affine(co))
    assert torch.equal(y.isnan(), F.conv3d(x, torch.ones_like(weight), padding=(0, 1, 1)).isnan())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [RESIDENT[3], BOXES[3], BOXES[4], PAIRS[2], TRAIN[3], HALVES[0]], ids=_names)
def test_prologue_keeps_a_nan_among_its_neighbours(shape):
    n, t, h, w, ci, co = shape
    x, (weight, packed) = _activation(n, ci, t, h, w, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    x[0, ci - 1, t - 1, h // 2, w - 1] = torch.nan
    y, partials = _cuda.spatial_conv_fwd(x, packed, affine=_affine(ci), stats=True)
    assert torch.equal(y.isnan(), F.conv3d(x, torch.ones_like(weight), padding=(0, 1, 1)).isnan())
    assert partials[:, 1:].isnan().any(0).all() and not partials[:, 0].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BOXES + PAIRS, ids=_names)
def test_inference_keeps_a_nan_among_its_neighbours_and_repeats_itself(shape):
    n, t, h, w, ci, co = shape
    x, (weight, packed) = _activation(n, ci, t, h, w, torch.bfloat16), _weight(co, ci, torch.bfloat16)
    x[0, ci - 1, t - 1, h // 2, w - 1] = torch.nan
    affine = _affine(co)
    y, _ = _cuda.spatial_conv_fwd(x, packed, out_affine=affine)
    assert torch.equal(y.isnan(), F.conv3d(x, torch.ones_like(weight), padding=(0, 1, 1)).isnan())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again, _ = _cuda.spatial_conv_fwd(x, packed, out_affine=affine)
    for _ in range(3):
        again.zero_()
        graph.replay()
        assert torch.equal(y.nan_to_num(), again.nan_to_num())


@pytest.mark.gpu
def test_runs_are_equal_and_a_graph_replays_them():
    x, (_, packed) = _activation(4, 64, 4, 21, 13, torch.bfloat16), _weight(64, 64, torch.bfloat16)
    affine = _affine(64)
    first = _cuda.spatial_conv_fwd(x, packed, affine=affine, stats=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = _cuda.spatial_conv_fwd(x, packed, affine=affine, stats=True)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    frames = 2**31 // (40 * 40 * 64) + 5
    x, (weight, packed) = _activation(frames, 64, 1, 40, 40, torch.bfloat16), _weight(64, 64, torch.bfloat16)
    for stats in (False, True):
        y, partials = _cuda.spatial_conv_fwd(x, packed, stats=stats)
        for part in (slice(0, 2), slice(frames - 2, frames)):
            check(y[part], F.conv3d(x[part].double(), weight.double(), padding=(0, 1, 1)), torch.bfloat16)
    assert (partials[:, 0].double().sum(0) == frames * 40 * 40).all()


@pytest.mark.gpu
def test_reasons():
    def why(w=40, ci=64, co=64, dtype=torch.bfloat16, stride=1):
        return _cuda.why_not((2, ci, 4, 40, w), dtype, ci, co, stride)

    assert why() is None
    assert "float32" in why(dtype=torch.float32)
    assert "stride 2" in why(stride=2)
    assert "60 -> 64" in why(ci=60)
    assert "width" in why(w=2000)


def test_layouts_are_checked_before_any_launch():
    x, w = torch.zeros(1, 64, 1, 4, 4, dtype=torch.bfloat16), torch.zeros(64, 9, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="channels_last_3d"):
        _cuda.spatial_conv_fwd(x, w)
    x = x.to(memory_format=torch.channels_last_3d)
    with pytest.raises(ValueError, match="w_packed"):
        _cuda.spatial_conv_fwd(x, w.transpose(0, 1))
    with pytest.raises(ValueError, match=r"affine: expected .*\[3, 64\]"):
        _cuda.spatial_conv_fwd(x, w, affine=torch.zeros(2, 64))
    with pytest.raises(ValueError, match="stats"):
        _cuda.spatial_conv_fwd(x, w, out_affine=torch.zeros(3, 64), stats=True)
    with pytest.raises(ValueError, match="dtype"):
        _cuda.spatial_conv_fwd(x.float(), w)


def test_layouts_of_the_gradient_are_checked_before_any_launch():
    g, w = torch.zeros(1, 64, 1, 4, 4, dtype=torch.bfloat16), torch.zeros(64, 9, 128, dtype=torch.bfloat16)
    g = g.to(memory_format=torch.channels_last_3d)
    rows, run = torch.zeros(3, 64), _cuda.spatial_conv_dgrad
    with pytest.raises(ValueError, match=r"w_packed: expected \[64, 9, Ci\]"):
        run(g, None, None, None, w.view(128, 9, 64))
    with pytest.raises(ValueError, match="z, record, sums"):
        run(g, g, rows, None, w)
    with pytest.raises(ValueError, match="z: expected"):
        run(g, g.half(), rows, rows, w)
    with pytest.raises(ValueError, match=r"record: expected float32 \[3, 64\]"):
        run(g, g, rows[:2], rows, w)
    with pytest.raises(ValueError, match=r"sums: expected float32 \[2, 64\]"):
        run(g, g, rows, rows.double(), w)
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 128, 1, 4, 4\]"):
        run(g, g, rows, rows, w, g)
    with pytest.raises(ValueError, match=r"below: expected .*\[1, 128, 1, 4, 4\]"):
        run(g, g, rows, rows, w, None, (g, rows))


def test_layouts_of_the_weight_gradient_are_checked_before_any_launch():
    g = torch.zeros(1, 64, 1, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    rows, run = torch.zeros(3, 64), _cuda.spatial_wgrad
    with pytest.raises(ValueError, match="g: expected bfloat16"):
        run(g.float(), None, None, None, g)
    with pytest.raises(ValueError, match="z, record, sums"):
        run(g, g, rows, None, g)
    with pytest.raises(ValueError, match=r"a: expected .*\[1, 64, 1, 4, 4\]"):
        run(g, g, rows, rows, g[..., :3])
    with pytest.raises(ValueError, match="a: expected channels_last_3d"):
        run(g, g, rows, rows, g.contiguous())
    with pytest.raises(ValueError, match=r"a_record: expected float32 \[3, 64\]"):
        run(g, g, rows, rows, g, rows[:2])
    with pytest.raises(ValueError, match="finished: expected None without z"):
        run(g, None, None, None, g, None, g)
    with pytest.raises(ValueError, match="finished: expected torch.bfloat16"):
        run(g, g, rows, rows, g, None, g.half())


def _microseconds(function, calls=20, repeats=11):
    """Median time of a call, many in one CUDA graph: the host's launch rate does not count."""
    for _ in range(3):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[1:])


def _row(batch, t, h, c):
    x, (w, packed) = _activation(batch, c, t, h, h, torch.bfloat16), _weight(c, c, torch.bfloat16)
    w = w.to(memory_format=torch.channels_last_3d)
    z, o, below, finished = (_activation(batch, c, t, h, h, torch.bfloat16) for _ in range(4))
    affine, sums, run, dgrad = _affine(c), torch.randn(2, c).cuda(), _cuda.spatial_conv_fwd, _cuda.spatial_conv_dgrad
    geometry = ([1, 1, 1], [0, 1, 1], [1, 1, 1], False, [0, 0, 0], 1)
    calls = {
        "cudnn": lambda: F.conv3d(x, w, padding=(0, 1, 1)),
        "plain": lambda: run(x, packed),
        "stats": lambda: run(x, packed, stats=True),
        "pro": lambda: run(x, packed, affine=affine),
        "pro+stats": lambda: run(x, packed, affine=affine, stats=True),
        "out_affine": lambda: run(x, packed, out_affine=affine),
        "dgrad": lambda: dgrad(x, None, None, None, packed),
        "dgrad sums": lambda: dgrad(x, None, None, None, packed, None, (below, affine)),
        "dgrad add+sums": lambda: dgrad(x, None, None, None, packed, o, (below, affine)),
        "dgrad pro+sums": lambda: dgrad(x, z, affine, sums, packed, None, (below, affine)),
        "cudnn dgrad": lambda: torch.ops.aten.convolution_backward(x, x, w, None, *geometry, [True, False, False]),
        "wgrad": lambda: _cuda.spatial_wgrad(x, None, None, None, o),
        "wgrad pro": lambda: _cuda.spatial_wgrad(x, z, affine, sums, o, affine),
        "wgrad pro+dz": lambda: _cuda.spatial_wgrad(x, z, affine, sums, o, affine, finished),
        "wgrad pro+sum": lambda: sum_splits([Splits(_cuda.spatial_wgrad(x, z, affine, sums, o, affine), 9, c)]),
        "cudnn wgrad": lambda: torch.ops.aten.convolution_backward(x, o, w, None, *geometry, [False, True, False]),
    }
    times = {name: _microseconds(call) for name, call in calls.items()}
    return times | {"TFLOP/s": 2 * 9 * c * x.numel() / times["plain"] / 1e6}


def main():
    """Microseconds a call at P3D-63's stages, clips of 16 x 160 x 160, bfloat16."""
    torch.backends.cudnn.benchmark = True
    print(torch.cuda.get_device_name(), torch.__version__)
    for batch in (32, 8, 1):
        for t, h, c in ((8, 40, 64), (4, 20, 128), (2, 10, 256), (1, 5, 512)):
            row = _row(batch, t, h, c)
            print(f"{batch:3} x {t} x {h} x {h}, {c}:", "  ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
