"""Pieces that the Triton kernels of all ops share: how a tensor is read (prologue), summed (partials) and finalised.

A tensor travels raw, with a BN *record*, float32 [5, C], rows (mean, scale, bias, invstd, unbiased variance):

    u = (z - mean) * scale + bias              the centred form is exact at mean/std of 300

so its consumer normalises as it reads and its producer leaves per-tile statistics as it writes. A gradient travels as
g, the gradient of relu(u) or of u; its consumer forms, with c0 = sum(g)/P and c1 = invstd^2 sum(g (z - mean))/P,

    dz = scale * (g * [u > 0] - c0 - (z - mean) * c1)

Reductions run in a fixed order: results are equal bit for bit from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .._norm import Norm
from ._tape import Plan, alloc, cdiv, plan_for

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below are then never launched: `_backends.why_not` says so first

    class triton:  # noqa: N801
        @staticmethod
        def jit(function=None, **_):
            return function or (lambda f: f)

    tl = None

MAX_POSITIONS = 2**31 - 2**20  # positions are counted in int32, elements in int64


def block(n: int, least: int, most: int) -> int:
    """The power of two that covers n, within [least, most]."""
    return max(least, min(most, 1 << (n - 1).bit_length()))


@dataclasses.dataclass
class Operand:
    """One or two raw tensors [N, C, T, H, W] (NDHWC memory) and what happens to an element as it is read.

    read          value
    raw           a
    bn_relu       relu(u_a)
    join_port     relu(u_a) + relu(u_b)                a, b: outputs of S and T
    join_b        relu(relu(u_a) + u_b)
    join_c        relu(0.5 relu(u_a) + 0.5 u_b)
    masked        a * [b > 0]                          a: gradient of relu's output b
    masked_scaled a * [b > 0] * scale_b
    scaled        a * scale_b
    bn_bwd        scale_b (a [u_b > 0] - c0 - (b - mean_b) c1)      a: gradient of relu(u_b)
    bn_bwd_open   scale_b (a           - c0 - (b - mean_b) c1)      a: gradient of u_b
    """

    read: str
    a: Tensor
    b: Tensor | None = None
    record_a: Tensor | None = None  # [5, C]
    record_b: Tensor | None = None  # [5, C]
    sums: Tensor | None = None  # [4, C], rows (c0, c1, dweight, dbias)
    centre: Tensor | None = None  # [C], near the mean of the values: by `bn_finalise`

    def args(self) -> tuple:
        """The kernel arguments that stand for this operand."""
        return self.a, self.b, self.record_a, self.record_b, self.sums

    @property
    def channels(self) -> int:
        return self.a.size(1)


@triton.jit
def begin(PDL: tl.constexpr):
    """First in a kernel of `dependent_launch`: wait until the one before has written, and let the next one start.

    In this order: kernels that start while several before them run would take the card from those.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def relu(v):
    return tl.where(v < 0, 0.0, v)  # keeps NaN, as torch does


@triton.jit
def to_tf32(v):
    """float32 to the nearest TF32, away from zero if halfway (cvt.rna.tf32): the tensor core only drops bits."""
    rounded = ((v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(v == v, rounded, v)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, of float32 as `input_precision` says."""
    if PRECISION == "tf32":
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def affine(v, record, c, c_mask, C: tl.constexpr):
    mean = tl.load(record + c, mask=c_mask, other=0.0)
    scale = tl.load(record + C + c, mask=c_mask, other=0.0)
    bias = tl.load(record + 2 * C + c, mask=c_mask, other=0.0)
    return (v - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def activation(u_a, u_b, READ: tl.constexpr):
    """What `Operand` says of reads that normalise forward, of u_a and, in joins, u_b."""
    if READ == "bn_relu":
        v = relu(u_a)
    elif READ == "join_port":
        v = relu(u_a) + relu(u_b)
    elif READ == "join_b":
        v = relu(relu(u_a) + u_b)
    else:
        tl.static_assert(READ == "join_c")
        v = relu(0.5 * relu(u_a) + 0.5 * u_b)
    return v


@triton.jit
def read_operand(a_ptr, b_ptr, record_a, record_b, sums, offsets, mask, c, c_mask, C: tl.constexpr, READ: tl.constexpr):
    """The operand's tile [rows, channels] at `offsets`, in the storage dtype, zero where masked (see `Operand`)."""
    a = tl.load(a_ptr + offsets, mask=mask, other=0.0)
    if READ == "raw":
        value = a
    else:
        v = a.to(tl.float32)
        if READ == "bn_relu":
            v = activation(affine(v, record_a, c, c_mask, C), None, READ)
        elif READ == "scaled":
            v = v * tl.load(record_b + C + c, mask=c_mask, other=0.0)[None, :]
        else:
            b = tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if READ == "join_port" or READ == "join_b" or READ == "join_c":
                v = activation(affine(v, record_a, c, c_mask, C), affine(b, record_b, c, c_mask, C), READ)
            elif READ == "masked":
                v = tl.where(b <= 0, 0.0, v)
            elif READ == "masked_scaled":
                scale = tl.load(record_b + C + c, mask=c_mask, other=0.0)
                v = tl.where(b <= 0, 0.0, v) * scale[None, :]
            else:
                tl.static_assert(READ == "bn_bwd" or READ == "bn_bwd_open")
                mean = tl.load(record_b + c, mask=c_mask, other=0.0)[None, :]
                scale = tl.load(record_b + C + c, mask=c_mask, other=0.0)[None, :]
                if READ == "bn_bwd":
                    bias = tl.load(record_b + 2 * C + c, mask=c_mask, other=0.0)[None, :]
                    v = tl.where((b - mean) * scale + bias <= 0, 0.0, v)
                c0 = tl.load(sums + c, mask=c_mask, other=0.0)[None, :]
                c1 = tl.load(sums + C + c, mask=c_mask, other=0.0)[None, :]
                v = scale * (v - c0 - (b - mean) * c1)
        value = tl.where(mask, v, 0.0).to(a.dtype)  # padding is zero after the affine, not before
    return value


@triton.jit
def write_stats(part, v, valid, tile, n_valid, c, c_mask, C: tl.constexpr):
    """Row `tile` of the partial statistics [R, 3, C] of v [rows, channels]: (n, mean, sum of squares about it)."""
    n = n_valid.to(tl.float32)
    mean = tl.sum(tl.where(valid, v, 0.0), 0) / n
    d = tl.where(valid, v - mean[None, :], 0.0)
    row = part + tile.to(tl.int64) * 3 * C + c
    tl.store(row, tl.zeros_like(mean) + n, mask=c_mask)
    tl.store(row + C, mean, mask=c_mask)
    tl.store(row + 2 * C, tl.sum(d * d, 0), mask=c_mask)


@triton.jit
def write_sums(part, g, z_ptr, record, offsets, mask, tile, c, c_mask, C: tl.constexpr, OPEN: tl.constexpr):
    """Row `tile` of the partial sums [R, 2, C] of the layer below: sum g and sum g (z - mean), g masked by its ReLU.

    OPEN: z's normalisation has no ReLU of its own, so g is not masked.
    """
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(record + c, mask=c_mask, other=0.0)[None, :]
    g = tl.where(mask, g, 0.0)
    if not OPEN:
        g = tl.where(affine(z, record, c, c_mask, C) <= 0, 0.0, g)
    row = part + tile.to(tl.int64) * 2 * C + c
    tl.store(row, tl.sum(g, 0), mask=c_mask)
    tl.store(row + C, tl.sum(tl.where(mask, g * (z - mean), 0.0), 0), mask=c_mask)


_UNALIGNED = ["weight", "bias", "running_mean", "running_var"]  # parameters may be slices of a flat buffer


@triton.jit
def combine_stats(
    part, R, c, c_mask, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr
):
    """(count, mean, sum of squares about it), float64, of the partial statistics [R, 3, C].

    Chan's combination of all rows at once, about the mean of the first: no cancellation.
    """
    rows = tl.arange(0, BLOCK_R)
    about = tl.load(part + C + c, mask=c_mask, other=0.0)
    n = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, R, BLOCK_R * UNROLL):
        loaded = ()  # all of them before any is used
        for u in tl.static_range(UNROLL):
            r = start + u * BLOCK_R + rows
            mask = (r < R)[:, None] & c_mask[None, :]
            row = part + r.to(tl.int64)[:, None] * (3 * C) + c[None, :]
            for kind in tl.static_range(3):
                loaded += (tl.load(row + kind * C, mask=mask, other=0.0),)
        for u in tl.static_range(UNROLL):
            n_r = loaded[3 * u].to(tl.float64)
            d = tl.where(n_r > 0, loaded[3 * u + 1] - about[None, :], 0.0).to(tl.float64)
            nd = n_r * d
            n += n_r
            first += nd
            second += nd * d + loaded[3 * u + 2].to(tl.float64)
    firsts, seconds = tl.split(tl.sum(tl.join(tl.join(n, first), tl.join(second, second)), 0))  # threads meet once
    count, first = tl.split(firsts)
    second, _ = tl.split(seconds)
    shift = first * (1.0 / count)
    return count, about.to(tl.float64) + shift, relu(second - first * shift)


@triton.jit
def combine_sums(
    part, R, c, c_mask, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr
):
    """Both sums, float64, over the rows of the partial sums [R, 2, C]."""
    rows = tl.arange(0, BLOCK_R)
    g = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    gz = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, R, BLOCK_R * UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            r = start + u * BLOCK_R + rows
            mask = (r < R)[:, None] & c_mask[None, :]
            row = part + r.to(tl.int64)[:, None] * (2 * C) + c[None, :]
            for kind in tl.static_range(2):
                loaded += (tl.load(row + kind * C, mask=mask, other=0.0),)
        for u in tl.static_range(UNROLL):
            g += loaded[2 * u].to(tl.float64)
            gz += loaded[2 * u + 1].to(tl.float64)
    return tl.split(tl.sum(tl.join(g, gz), 0))


@triton.jit(do_not_specialize=["R", "chunk"])
def fold_kernel(
    part,  # [R, 3, C] statistics or [R, 2, C] sums
    out,  # [programs along 1, 3 or 2, C], each of `chunk` rows of part
    R,
    chunk,
    C: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    begin = tl.program_id(1) * chunk
    R = tl.minimum(R - begin, chunk)
    if STATS:
        part += begin.to(tl.int64) * 3 * C
        n, mean, m2 = combine_stats(part, R, c, c_mask, C, BLOCK_R, BLOCK_C, UNROLL)
        row = out + tl.program_id(1) * 3 * C + c
        tl.store(row, n, mask=c_mask)
        tl.store(row + C, mean, mask=c_mask)
        tl.store(row + 2 * C, m2, mask=c_mask)
    else:
        part += begin.to(tl.int64) * 2 * C
        g, gz = combine_sums(part, R, c, c_mask, C, BLOCK_R, BLOCK_C, UNROLL)
        row = out + tl.program_id(1) * 2 * C + c
        tl.store(row, g, mask=c_mask)
        tl.store(row + C, gz, mask=c_mask)


@triton.jit
def load_affine(weight, bias, c, c_mask, BLOCK_C: tl.constexpr):
    """weight and bias, each [C] or None, in float64: to be loaded before the statistics are there."""
    scale = tl.full((BLOCK_C,), 1.0, tl.float64)
    shift = tl.zeros((BLOCK_C,), tl.float64)
    if weight is not None:
        scale = tl.load(weight + c, mask=c_mask, other=0.0).to(tl.float64)
    if bias is not None:
        shift = tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float64)
    return scale, shift


@triton.jit
def variances(count, m2):
    """(biased, unbiased) of `combine_stats`."""
    return m2 * (1.0 / count), m2 / tl.maximum(count - 1.0, 1.0)  # the quotient is there already


@triton.jit
def write_record(record, mean, var, unbiased, scale, shift, eps, c, c_mask, C: tl.constexpr):
    """The record [5, C] of float64 statistics and `load_affine`; returns its rows mean, scale and bias."""
    invstd = tl.rsqrt(var + eps)
    scale *= invstd
    rounded = mean.to(tl.float32)
    shift += (rounded.to(tl.float64) - mean) * scale  # what rounding the mean moves u by
    tl.store(record + c, rounded, mask=c_mask)
    tl.store(record + C + c, scale.to(tl.float32), mask=c_mask)
    tl.store(record + 2 * C + c, shift.to(tl.float32), mask=c_mask)
    tl.store(record + 3 * C + c, invstd.to(tl.float32), mask=c_mask)
    tl.store(record + 4 * C + c, unbiased.to(tl.float32), mask=c_mask)
    return rounded, scale.to(tl.float32), shift.to(tl.float32)


@triton.jit
def write_totals(sums, sum_g, sum_gz, invstd, P, c, mask, C: tl.constexpr, TRAINING: tl.constexpr = True):
    """The sums [4, C] of `combine_sums` over P positions; returns their rows c0 and c1, zero unless TRAINING."""
    sum_g = sum_g.to(tl.float32)
    sum_gz = sum_gz.to(tl.float32)
    c0 = tl.zeros_like(sum_g)
    c1 = tl.zeros_like(sum_g)
    if TRAINING:
        c0 = sum_g / P
        c1 = invstd * invstd * (sum_gz / P)
    tl.store(sums + c, c0, mask=mask)
    tl.store(sums + C + c, c1, mask=mask)
    tl.store(sums + 2 * C + c, invstd * sum_gz, mask=mask)
    tl.store(sums + 3 * C + c, sum_g, mask=mask)
    return c0, c1


@triton.jit
def write_centre(centre, v, mask, n, c, c_mask, PRECISION: tl.constexpr):
    """The mean of n sampled values v [rows, channels], in steps of a power of two near the deviation: of few bits."""
    mean = tl.sum(v.to(tl.float32), 0) / n
    d = tl.where(mask, v.to(tl.float32) - mean[None, :], 0.0)
    var = tl.sum(d * d, 0) / n
    exponent = ((var.to(tl.int32, bitcast=True) >> 23) - 127) >> 1
    unit = ((exponent + 127) << 23).to(tl.float32, bitcast=True)  # at most the deviation, and above half of it
    value = (tl.floor(mean / unit + 0.5) * unit).to(v.dtype).to(tl.float32)
    if PRECISION == "tf32":
        value = to_tf32(value)
    tl.store(centre + c, value, mask=c_mask)


@triton.jit(do_not_specialize=["R", "P", "step"], do_not_specialize_on_alignment=_UNALIGNED)
def bn_finalise_kernel(
    record,  # [5, C]
    part,  # [R, 3, C], or unused
    weight,  # [C] or None
    bias,  # [C] or None
    running_mean,  # [C], read when not TRAINING
    running_var,  # [C]
    centre,  # [C] float32 or None: of the activation or join that z, normalised by this record, completes
    z,  # [P, C]
    o,  # like z: the other operand of a join
    o_record,  # [5, C]
    R,
    eps,
    P,
    step,  # positions from one of the sample to the next
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    begin(PDL)
    if centre is not None:
        p = tl.arange(0, SAMPLE) * step
        mask = (p < P)[:, None] & c_mask[None, :]
        offsets = p.to(tl.int64)[:, None] * C + c[None, :]
        v = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
        if READ != "bn_relu":
            u_o = affine(tl.load(o + offsets, mask=mask, other=0.0).to(tl.float32), o_record, c, c_mask, C)
    scale, shift = load_affine(weight, bias, c, c_mask, BLOCK_C)
    if TRAINING:
        count, mean, m2 = combine_stats(part, R, c, c_mask, C, BLOCK_R, BLOCK_C, UNROLL)
        var, unbiased = variances(count, m2)
    else:
        mean = tl.load(running_mean + c, mask=c_mask, other=0.0).to(tl.float64)
        var = tl.load(running_var + c, mask=c_mask, other=1.0).to(tl.float64)
        unbiased = var
    mean, scale, shift = write_record(record, mean, var, unbiased, scale, shift, eps, c, c_mask, C)
    if centre is not None:
        u = (v - mean[None, :]) * scale[None, :] + shift[None, :]
        if READ == "bn_relu":
            v = activation(u, None, READ)
        else:
            v = activation(u_o, u, READ)
        v = tl.where(mask, v, 0.0).to(z.dtype.element_ty)
        write_centre(centre, v, mask, tl.minimum(P, SAMPLE).to(tl.float32), c, c_mask, PRECISION)


@triton.jit(do_not_specialize=["R"])
def bn_bwd_finalise_kernel(
    part,  # [R, 2, C]
    record,  # [5, C]
    sums,  # [4, C], rows (c0, c1, dweight, dbias)
    R,
    P,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    begin(PDL)
    invstd = tl.load(record + 3 * C + c, mask=c_mask, other=0.0)
    sum_g, sum_gz = combine_sums(part, R, c, c_mask, C, BLOCK_R, BLOCK_C, UNROLL)
    write_totals(sums, sum_g, sum_gz, invstd, P, c, c_mask, C, TRAINING)


@triton.jit
def sum_of_splits(
    part,
    n,
    mask,
    m,
    m_mask,
    splits,
    N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SIZE: tl.constexpr,
    M_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Elements n [SIZE], and m [M_SIZE] or None, of the rows of part [splits, N], summed over rows in fixed order.

    STAGES - 1 blocks of rows are under way at a time, to shared memory: ptxas would wait for nearly every load to
    registers before it issues the next.
    """
    rows = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, SIZE), tl.float32)
    if m is not None:
        m_acc = tl.zeros((BLOCK_S, M_SIZE), tl.float32)
    for start in tl.range(0, splits, BLOCK_S, num_stages=STAGES):
        r = start + rows
        exists = (r < splits)[:, None]
        row = part + r.to(tl.int64)[:, None] * N
        acc += tl.load(row + n[None, :], mask=exists & mask[None, :], other=0.0)
        if m is not None:
            m_acc += tl.load(row + m[None, :], mask=exists & m_mask[None, :], other=0.0)
    if m is None:
        return tl.sum(acc, 0)
    else:
        return tl.sum(acc, 0), tl.sum(m_acc, 0)


@triton.jit
def sum_splits_tile(
    part,  # [splits, N], a row [CO, TAPS, CI]
    out,  # [CO, CI, TAPS]
    program,
    splits,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    CI: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (CI + BLOCK_CI - 1) // BLOCK_CI
    co = program // TILES
    begin = program % TILES * BLOCK_CI
    column = tl.arange(0, BLOCK_T * BLOCK_CI)
    tap = column // BLOCK_CI
    ci = begin + column % BLOCK_CI
    n = (co * TAPS + tap) * CI + ci
    mask = (tap < TAPS) & (ci < CI)
    total = sum_of_splits(part, n, mask, None, None, splits, N, BLOCK_S, BLOCK_T * BLOCK_CI, 0, STAGES)
    total = tl.trans(tl.reshape(total, (BLOCK_T, BLOCK_CI)))
    ci = (begin + tl.arange(0, BLOCK_CI))[:, None]
    tap = tl.arange(0, BLOCK_T)[None, :]
    tl.store(out + (co * CI + ci) * TAPS + tap, total, mask=(ci < CI) & (tap < TAPS))


@triton.jit
def sum_splits_kernel(
    part0,  # of `sum_splits_tile`, or None
    part1,
    part2,
    part3,
    part4,
    out0,
    out1,
    out2,
    out3,
    out4,
    BEGIN: tl.constexpr,  # the first program of each, and the end
    SPLITS: tl.constexpr,  # of each, as all below
    N: tl.constexpr,
    TAPS: tl.constexpr,
    CI: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    parts = (part0, part1, part2, part3, part4)
    outs = (out0, out1, out2, out3, out4)
    begin(PDL)
    for i in tl.static_range(len(SPLITS)):
        if (program >= BEGIN[i]) & (program < BEGIN[i + 1]):
            sum_splits_tile(
                parts[i], outs[i], program - BEGIN[i], SPLITS[i], N[i], TAPS[i], CI[i],
                BLOCK_S[i], BLOCK_T[i], BLOCK_CI[i], STAGES[i],
            )  # fmt: skip


class Splits(NamedTuple):
    """A weight gradient in parts that are still to be summed."""

    part: Tensor  # [splits, Co * taps * Ci]
    taps: int
    ci: int


AT_ONCE = 5  # gradients that a launch sums


def sum_splits(gradients: list[Splits | None]) -> list[Tensor | None]:
    """Each summed over its splits, in fixed order, as [Co * Ci * taps]; None stays None. Few launches for all."""
    whole = [g is not None and g.taps == 1 and g.part.size(0) == 1 for g in gradients]  # nothing to sum or to turn
    given = [g for g, done in zip(gradients, whole) if g is not None and not done]
    sums = iter([total for i in range(0, len(given), AT_ONCE) for total in _sum(given[i : i + AT_ONCE])])
    return [None if g is None else g.part[0] if done else next(sums) for g, done in zip(gradients, whole)]


def summed(gradients: list[Tensor | Splits | None]) -> list[Tensor | None]:
    """`sum_splits` of those that are in splits; the others as they are."""
    sums = iter(sum_splits([g for g in gradients if isinstance(g, Splits)]))
    return [next(sums) if isinstance(g, Splits) else g for g in gradients]


def _sum(gradients: list[Splits]) -> list[Tensor]:
    parts, absent = [g.part for g in gradients], [None] * (AT_ONCE - len(gradients))
    outs = [alloc((part.size(1),), part.device) for part in parts]
    key = "sum_splits", parts[0].device, *((g.part.shape, g.taps, g.ci) for g in gradients)
    plan_for(key, lambda: _sum_plan(gradients))(*parts, *absent, *outs, *absent)
    return outs


def _sum_plan(gradients: list[Splits]) -> Plan:
    begin, shapes = [0], []
    for part, taps, ci in gradients:
        splits, n = part.shape
        ci = n if taps == 1 else ci  # nothing to turn: one row
        tile = _sum_tile(splits, taps, ci)
        begin.append(begin[-1] + n // (taps * ci) * cdiv(ci, tile[2]))
        shapes.append((splits, n, taps, ci, *tile))
    names = "SPLITS", "N", "TAPS", "CI", "BLOCK_S", "BLOCK_T", "BLOCK_CI", "STAGES"
    constants = {**dict(zip(names, zip(*shapes))), **dependent_launch(gradients[0].part.device)}
    return Plan(sum_splits_kernel, (begin[-1],), (), BEGIN=tuple(begin), **constants, num_warps=8)


def split_blocks(splits: int, size: int, elements: int) -> tuple[int, int]:
    """(BLOCK_S, STAGES) of `sum_of_splits` of `size` elements: blocks of about `elements`, 32 KB of them under way.

    Six programs of eight warps then share a multiprocessor, and a block's gradients are one wave. One stage, of rows
    that are longer than this: they go to registers.
    """
    block_s = block(min(splits, max(1, elements // size)), 1, 64)
    return block_s, min(cdiv(splits, block_s), 8192 // (block_s * size)) + 1


def _sum_tile(splits: int, taps: int, ci: int) -> tuple[int, int, int, int]:
    """(BLOCK_S, BLOCK_T, BLOCK_CI, STAGES): the more splits, the fewer columns: eight blocks or so a sum."""
    block_t = block(taps, 1, 32)
    elements = 2048 if taps <= 4 else 4096
    block_ci = block(ci, 16, max(16, elements // block(max(1, splits // 8), 1, 32) // block_t))
    block_s, stages = split_blocks(splits, block_t * block_ci, elements)
    return block_s, block_t, block_ci, stages


def _finalise_tile(rows: int, sampled: bool) -> dict:
    """An element a thread, and where there is more to read the most threads: of programs of few, the multiprocessors
    that the kernel before leaves first would have eight each."""
    block_r = 128 if rows > 64 or sampled else 32 if rows > 32 else 16
    unroll = min(cdiv(rows, block_r), 4)
    return {"BLOCK_R": block_r, "BLOCK_C": 8, "UNROLL": unroll, "num_warps": block_r * 8 // 32}


FOLD = 1024  # rows that one launch finalises well: it has a few channels a program


def _fold_tile(rows: int) -> tuple[int, dict]:
    """(rows a program, tile)."""
    return 8 * cdiv(rows, 8 * 64), {"BLOCK_R": 8, "BLOCK_C": 32, "UNROLL": 8, "num_warps": 8}


def fold(part: Tensor) -> Tensor:
    """The partial statistics [R, 3, C] or sums [R, 2, C]; where R is large, combined to few rows, float64."""
    rows, kinds, channels = part.shape
    if rows <= FOLD:
        return part
    plan = plan_for(("fold", part.device, part.shape, part.dtype), lambda: _fold_plan(rows, kinds, channels))
    folded = alloc((plan.grid[1], kinds, channels), part.device, torch.float64)
    plan(part, folded)
    return folded


def _fold_plan(rows: int, kinds: int, channels: int) -> Plan:
    chunk, tile = _fold_tile(rows)
    grid = cdiv(channels, tile["BLOCK_C"]), cdiv(rows, chunk)
    return Plan(fold_kernel, grid, (rows, chunk), C=channels, STATS=kinds == 3, **tile)


SAMPLE = 256  # positions that a centre is the mean of


def bn_finalise(
    norm: Norm,
    channels: int,
    part: Tensor | None,
    device: torch.device,
    completes: Operand | None = None,
) -> Tensor:
    """The record [5, C] of `norm`: from the partial statistics [R, 3, C] when training, else the running ones.

    completes: "bn_relu" or a join that lacks this record alone: it gets the record, and its centre.
    """
    part = fold(part) if norm.training else None
    record = alloc((5, channels), device)
    rows = part.size(0) if norm.training else 0
    running = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    tensors = part, norm.weight, norm.bias, *running
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    sampled, sample = (None,) * 4, None
    if completes is not None:
        x = completes
        x.centre = alloc((channels,), device)
        if x.b is None:
            x.record_a, sampled = record, (x.centre, x.a, None, None)
        else:
            x.record_b, sampled = record, (x.centre, x.b, x.a, x.record_a)
        sample = x.a.numel() // channels, x.read, x.a.dtype, input_precision(x.a.dtype, device)
    plan = plan_for(
        ("bn_finalise", device, channels, rows, norm.eps, norm.training, dtypes, sample),
        lambda: _finalise_plan(bn_finalise_kernel, channels, rows, norm.eps, norm.training, device, sample),
    )
    plan(record, *tensors, *sampled)
    return record


def bn_bwd_finalise(part: Tensor, record: Tensor, positions: int, training: bool) -> Tensor:
    """[4, C], rows (c0, c1, dweight, dbias), from the partial sums [R, 2, C]; c0 = c1 = 0 unless training."""
    part = fold(part)
    rows, _, channels = part.shape
    sums = alloc((4, channels), part.device)
    plan = plan_for(
        ("bn_bwd_finalise", part.device, channels, rows, positions, training, part.dtype),
        lambda: _finalise_plan(bn_bwd_finalise_kernel, channels, rows, float(positions), training, part.device),
    )
    plan(part, record, sums)
    return sums


def _finalise_plan(
    kernel, channels: int, rows: int, scalar: float, training: bool, device: torch.device, sample: tuple | None = None
) -> Plan:
    constants = {**dependent_launch(device), **_finalise_tile(max(rows, 1), sample is not None)}
    scalars = rows, scalar
    if kernel is bn_finalise_kernel:
        positions, read, _, precision = sample or (0, None, None, None)
        scalars += positions, max(1, positions // SAMPLE)
        constants |= {"READ": read, "PRECISION": precision, "SAMPLE": SAMPLE}
    return Plan(kernel, (cdiv(channels, constants["BLOCK_C"]),), scalars, C=channels, TRAINING=training, **constants)


@functools.cache
def dependent_launch(device: torch.device) -> dict:
    """Constants of a kernel that calls `begin`: on Hopper and later it starts while the kernel before it still runs."""
    ready = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if ready and hasattr(tl.extra.cuda, "gdc_wait") else {"PDL": False}


def why_not(x: Tensor) -> str | None:
    """Why the kernels of this package cannot run on activations of this shape, or None."""
    if x.numel() == 0:
        return "the input is empty"
    if x.numel() // x.size(1) > MAX_POSITIONS:
        return f"more than {MAX_POSITIONS} positions"
    return None


def ndhwc(x: Tensor) -> Tensor:
    """x [N, C, T, H, W] in NDHWC memory of 16-byte alignment: itself when it lies so, else a copy."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return x if x.data_ptr() & 15 == 0 else x.clone()


def empty_ndhwc(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor in NDHWC memory, of the dtype and device of `like`."""
    return alloc(shape, like.device, like.dtype)


def input_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 products are formed: torch's own switch for convolutions decides; "tf32" or "ieee"."""
    tf32 = dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return "tf32" if tf32 else "ieee"
