"""BN after a 1x1x1 convolution whose output z = W a, the widest tensor of a block, is never stored.

With P positions and the covariance of the narrow operand,

    mean_a = sum a / P,    C = (a - mean_a)^T (a - mean_a)          one pass over a

its statistics are mean = W mean_a and P var = rowsum(W C * W) (`gram`). Forward then computes relu(bn(z) + r) in one
pass, and keeps mean_a and W C for the backward, which uses the Gram identity: with g = dy [y > 0] and

    M = g^T a,    sum_g         one pass over what is stored anyway

the gradients are (s = weight * invstd, all vectors a channel; docs/derivations.md)

    dweight = invstd * rowsum((M - sum_g mean_a^T) * W),    dbias = sum_g
    dW      = s * (M - sum_g mean_a^T - q W C),   q = dweight * invstd / P
    da      = (s g) W - a Q + c,   Q = W^T diag(s q) W,   c = Q^T mean_a - W^T (s sum_g / P)

so da is one kernel with two products; or, where the pass over g has room for it, that makes v = g (s W) beside M, s W
rounded, and a small kernel da = v - a Q + c: the wide g is read once (`_cuda.gram_bwd`). Where g and a are in memory as
they are, one kernel multiplies them by s W, rounded, and -Q, which lie in one tensor (`_cuda.gram_raw`). Q is rounded
to the dtype, and c is of Q and s W as rounded: over all positions da then sums to zero as it must. The error of a
constant would grow from block to block; that of a position averages out.

Sums of products in float32 lose what a varies by where that is small beside a, so they are formed about a centre: the
mean of some positions, in steps of a power of two near the deviation. Of so few bits, a - centre is exact in the dtype
wherever a is not small beside the centre, and elsewhere rounded without bias.

W C and Q are W times a float32 matrix. It is split in two, which keeps 16 bits of it with bfloat16 and 22 with TF32,
in which float16 is multiplied; of float16's Q the first part is enough.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._norm import Norm
from . import _cuda
from ._conv import conv_wgrad, cuda_allowed, pointwise, tap_row, taps_of
from ._tape import Plan, alloc, cdiv, plan_for
from ._triton import (
    SAMPLE,
    Operand,
    begin,
    block,
    dependent_launch,
    dot,
    empty_ndhwc,
    input_precision,
    load_affine,
    read_operand,
    relu,
    sum_of_splits,
    tl,
    to_tf32,
    triton,
    write_centre,
    write_record,
)
from .pseudo3d import join_bwd, join_parts

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def store_parts(v, out, offsets, mask, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """v as a sum of PARTS tensors of SIZE elements of the dtype of out: each takes what rounding left of v so far."""
    for i in tl.static_range(PARTS):
        rounded = v.to(out.dtype.element_ty)
        if PARTS > 1 and out.dtype.element_ty == tl.float32:
            rounded = to_tf32(v)
        tl.store(out + i * SIZE + offsets, rounded, mask=mask)
        v -= rounded.to(tl.float32)


@triton.jit(do_not_specialize=["P", "step"])
def centre_kernel(
    x,  # [P, C]
    centre,  # [C] float32
    P,
    step,  # positions from one of the sample to the next
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, SAMPLE) * step
    mask = (p < P)[:, None] & (c < C)[None, :]
    begin(PDL)
    v = tl.load(x + p.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)
    write_centre(centre, v, mask, tl.minimum(P, SAMPLE).to(tl.float32), c, c < C, PRECISION)


@triton.jit(do_not_specialize=["P", "splits"])
def gram_sum_kernel(
    part,  # [splits, CI * CI + CI]: (a - centre)^T (a - centre), sum of a - centre; to be summed
    centre,  # [CI] or None: zero
    cov_ptr,  # [PARTS, CI, CI]: C
    mean_ptr,  # [CI] float64: mean of a
    mean_a,  # [CI] float32: the same
    arrived,  # [TILES] int32, set to zero for gram_kernel; or None
    P,
    splits,
    CI: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    N: tl.constexpr = CI * CI + CI
    COLUMNS: tl.constexpr = (CI + BLOCK_J - 1) // BLOCK_J
    M_SIZE: tl.constexpr = triton.next_power_of_2(BLOCK_I + BLOCK_J)
    begin_i = tl.program_id(0) // COLUMNS * BLOCK_I
    begin_j = tl.program_id(0) % COLUMNS * BLOCK_J
    at = tl.arange(0, BLOCK_I * BLOCK_J)
    i = begin_i + at // BLOCK_J
    j = begin_j + at % BLOCK_J
    mask = (i < CI) & (j < CI)
    own = tl.arange(0, M_SIZE)  # totals: those of the columns, then those of the rows
    of = tl.where(own < BLOCK_J, begin_j + own, begin_i + own - BLOCK_J)
    begin(PDL)
    if arrived is not None:
        if tl.program_id(0) == 0:
            tile = tl.arange(0, triton.next_power_of_2(TILES))
            tl.store(arrived + tile, tl.zeros_like(tile), mask=tile < TILES)
    if centre is not None:
        about = tl.load(centre + of, mask=of < CI, other=0.0).to(tl.float64)
    s, total = sum_of_splits(
        part, i * CI + j, mask, CI * CI + of, of < CI, splits, N, BLOCK_S, BLOCK_I * BLOCK_J, M_SIZE, STAGES
    )
    s -= tl.gather(total, BLOCK_J + at // BLOCK_J, 0) / P * tl.gather(total, at % BLOCK_J, 0)
    store_parts(s, cov_ptr, i * CI + j, mask, CI * CI, PARTS)
    if begin_i == 0:
        mean = total.to(tl.float64) / P
        if centre is not None:
            mean += about
        of_mask = (own < BLOCK_J) & (of < CI)
        tl.store(mean_ptr + of, mean, mask=of_mask)
        tl.store(mean_a + of, mean.to(tl.float32), mask=of_mask)


@triton.jit(do_not_specialize=["CI_END", "P"], do_not_specialize_on_alignment=["weight", "bias"])
def gram_kernel(
    w_ptr,  # [CO, CI]
    cov_ptr,  # of gram_sum_kernel: [PARTS, CI, CI]; it is symmetric
    mean_ptr,  # [CI] float64
    wc_ptr,  # [CO, CI] float32: W C
    record,  # [5, CO] of the norm of W a
    weight,  # [CO] or None
    bias,  # [CO] or None
    shares,  # [columns, 2, CO] float64: mean and sum of squares of W a, to be summed; or None: one column
    arrived,  # [row tiles] int32, zero before
    CI_END,  # CI, where the loop ends: of a loop whose length it knows, ptxas 12.8 may leave out the products
    P,
    eps,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,  # of the convolution by W
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMNS: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    co = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column * BLOCK_N + tl.arange(0, BLOCK_N)
    co_mask = co < CO
    j_mask = j < CI
    mask = co_mask[:, None] & j_mask[None, :]
    begin(PDL)
    scale, shift = load_affine(weight, bias, co, co_mask, BLOCK_M)
    mean_j = tl.load(mean_ptr + j, mask=j_mask, other=0.0)
    w_j = tl.load(w_ptr + co[:, None] * CI + j[None, :], mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, CI_END, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < CI
        w = tl.load(w_ptr + co[:, None] * CI + k[None, :], mask=co_mask[:, None] & k_mask[None, :], other=0.0)
        if PRECISION == "tf32":
            w = to_tf32(w)
        for part in tl.static_range(PARTS):
            offsets = part * CI * CI + j[None, :] * CI + k[:, None]
            cov = tl.load(cov_ptr + offsets, mask=k_mask[:, None] & j_mask[None, :], other=0.0)
            if w_ptr.dtype.element_ty == tl.float16:  # in TF32, to which the parts are rounded already
                acc = tl.dot(w.to(tl.float32), cov, acc, input_precision="tf32")
            else:
                acc = tl.dot(w, cov, acc, input_precision="ieee")
    tl.store(wc_ptr + co[:, None] * CI + j[None, :], acc, mask=mask)
    w_j = w_j.to(tl.float32)  # not sooner: that would be waited for before the loop
    if PRECISION == "tf32":
        w_j = to_tf32(w_j)
    mean = tl.sum(w_j.to(tl.float64) * mean_j[None, :], 1)
    m2 = tl.sum(acc * w_j, 1).to(tl.float64)
    if COLUMNS == 1:
        write_moments(record, mean, m2, P, scale, shift, eps, co, co_mask, CO)
    else:
        row = shares + column * (2 * CO) + co
        tl.store(row, mean, mask=co_mask)
        tl.store(row + CO, m2, mask=co_mask)
        tl.debug_barrier()  # the share is written by all threads, and one of them tells so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == COLUMNS - 1:
            mean = tl.zeros((BLOCK_M,), tl.float64)
            m2 = tl.zeros((BLOCK_M,), tl.float64)
            for i in tl.static_range(COLUMNS):  # in the order of the columns, whoever came last
                row = shares + i * (2 * CO) + co
                mean += tl.load(row, mask=co_mask, other=0.0, cache_modifier=".cg")
                m2 += tl.load(row + CO, mask=co_mask, other=0.0, cache_modifier=".cg")
            write_moments(record, mean, m2, P, scale, shift, eps, co, co_mask, CO)


@triton.jit
def write_moments(record, mean, m2, P, scale, shift, eps, c, c_mask, C: tl.constexpr):
    """The record of P values of which m2 is the sum of squares about the mean, but for rounding."""
    m2 = relu(m2)
    count = tl.zeros_like(m2) + P
    write_record(record, mean, m2 / count, m2 / tl.maximum(count - 1.0, 1.0), scale, shift, eps, c, c_mask, C)


@triton.jit
def left_out_row(p, frames, H, W, Ho, Wo):
    """(row, exists) of the p-th position [frames, H, W] that a stride of 2 skips: those of odd rows come first."""
    Hl = tl.maximum(H - Ho, 1)
    Wl = tl.maximum(W - Wo, 1)
    odd_rows = frames * (H - Ho) * W
    row = (p // (W * Hl) * H + p // W % Hl * 2 + 1) * W + p % W
    p_even = p - odd_rows
    even = (p_even // (Wl * Ho) * H + p_even // Wl % Ho * 2) * W + p_even % Wl * 2 + 1
    return tl.where(p_even < 0, row, even), p_even < frames * Ho * (W - Wo)


@triton.jit(do_not_specialize=["P", "T", "H", "W", "To", "Ho", "Wo"])
def gram_dgrad_kernel(
    g_ptr,  # [N, To, Ho, Wo, CO] gradient of y
    y_ptr,  # like g; None where g is masked already
    record,  # [5, CO] of the BN after W
    w_ptr,  # [CO, CI]
    a_ptr,  # operand: [N, T, H, W, CI]
    b_ptr,
    record_a,
    record_b,
    q_ptr,  # [CI, CI], -Q / q_scale in the dtype of g; None when BN is frozen
    q_scale,  # [CI] float32, a column; read when SCALED
    c_ptr,  # [C_PARTS, CI] float32, to be summed
    da_ptr,  # [N, To, Ho, Wo, CI]; THIN: like a
    part_a,  # [R, 2, CI] or None: sums for the norms of the operand's a and b
    part_b,
    P,
    T,
    H,
    W,
    To,
    Ho,
    Wo,
    CI: tl.constexpr,
    CO: tl.constexpr,
    SH: tl.constexpr,
    THIN: tl.constexpr,  # where the stride skips a, there is no g, but a gradient still
    READ: tl.constexpr,
    READ_G: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    C_PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CI_TILES: tl.constexpr = (CI + BLOCK_CI - 1) // BLOCK_CI
    tile = tl.program_id(0) // CI_TILES
    ci = (tl.program_id(0) % CI_TILES) * BLOCK_CI + tl.arange(0, BLOCK_CI)
    ci_mask = ci < CI
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    p_mask = p < P
    row, exists, co_end = p, p_mask, CO  # row: of a
    if SH != 1:
        w_o = p % Wo
        h_o = p // Wo % Ho
        t_o = p // (Wo * Ho) % To
        n = p // (Wo * Ho * To)
        row, exists = tap_row(n, t_o, h_o, w_o, 0, 0, 0, T, H, W, 1, 1, 1, 1, SH, False)
        exists = exists & p_mask
    if THIN:  # tiles of positions without g follow those with it
        rest = tile - (P + BLOCK_P - 1) // BLOCK_P
        left_out, there = left_out_row(rest * BLOCK_P + tl.arange(0, BLOCK_P), P // (Ho * Wo), H, W, Ho, Wo)
        row, exists = tl.where(rest >= 0, left_out, row), tl.where(rest >= 0, there, exists)
        co_end = tl.where(rest >= 0, 0, CO)

    acc = tl.zeros((BLOCK_P, BLOCK_CI), tl.float32)
    if q_ptr is not None:
        for start in range(0, CI, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            offsets = row.to(tl.int64)[:, None] * CI + k[None, :]
            mask = exists[:, None] & (k < CI)[None, :]
            a = read_operand(a_ptr, b_ptr, record_a, record_b, None, offsets, mask, k, k < CI, CI, READ)
            q_mask = (k < CI)[:, None] & ci_mask[None, :]
            q = tl.load(q_ptr + k[:, None] * CI + ci[None, :], mask=q_mask, other=0.0)
            acc = dot(a, q, acc, PRECISION)
        # Scaled, it is a sum of its own until the end: were it scaled here and the next loop added to it, ptxas 12.8
        # would leave out every product of the loop above (HGMMA of nothing in its place) where that loop is long.
        if SCALED:
            acc_q = acc
            acc = tl.zeros((BLOCK_P, BLOCK_CI), tl.float32)
    for start in range(0, co_end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = p.to(tl.int64)[:, None] * CO + k[None, :]
        mask = p_mask[:, None] & (k < CO)[None, :]
        g = read_operand(g_ptr, y_ptr, None, record, None, offsets, mask, k, k < CO, CO, READ_G)
        w = tl.load(w_ptr + k[:, None] * CI + ci[None, :], mask=(k < CO)[:, None] & ci_mask[None, :], other=0.0)
        acc = dot(g, w, acc, PRECISION)
    if q_ptr is not None:
        c = tl.zeros((BLOCK_CI,), tl.float32)
        for i in range(C_PARTS):
            c += tl.load(c_ptr + i * CI + ci, mask=ci_mask, other=0.0)
        acc += c[None, :]
        if SCALED:
            acc += acc_q * tl.load(q_scale + ci, mask=ci_mask, other=0.0)[None, :]

    if THIN:
        p, p_mask = row, exists
    mask = p_mask[:, None] & ci_mask[None, :]
    offsets = p.to(tl.int64)[:, None] * CI + ci[None, :]
    join_bwd(acc, da_ptr, a_ptr, b_ptr, record_a, record_b, part_a, part_b, offsets, mask, tile, ci, ci_mask, CI, READ)


@triton.jit(do_not_specialize=["splits"])
def gram_operands_kernel(
    part,  # [splits, CO * CI + CO]: M = g^T a, sum g; to be summed
    wc_ptr,  # of gram_kernel: [CO, CI]; None when BN is frozen
    mean_a,  # [CI]
    w_ptr,  # [CO, CI]
    record,  # [5, CO]
    sums,  # [4, CO] rows (s q, most of |W|, dweight, dbias)
    dw_ptr,  # [CO, CI] float32
    qw_ptr,  # [PARTS, CI, CO]: -(diag(s q) W)^T; or None
    wg_ptr,  # [programs, CI]: (s W)^T (sum_g / P) in parts, with qw
    sw_ptr,  # [CO, CI]: s W, with qw and ROUNDED; or None
    P,
    splits,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PARTS: tl.constexpr,
    ROUNDED: tl.constexpr,  # s W is, in what c goes with
    PDL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,  # covers CI
    STAGES: tl.constexpr,
):
    N: tl.constexpr = CO * CI + CO
    co = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    co_mask = co < CO
    k = tl.arange(0, BLOCK_K)
    offsets = co[:, None] * CI + k[None, :]
    mask = co_mask[:, None] & (k < CI)[None, :]
    at = tl.arange(0, BLOCK_R * BLOCK_K)
    row = tl.program_id(0) * BLOCK_R + at // BLOCK_K
    column = at % BLOCK_K
    begin(PDL)
    scale = tl.load(record + CO + co, mask=co_mask, other=0.0)
    invstd = tl.load(record + 3 * CO + co, mask=co_mask, other=0.0)
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if wc_ptr is None:
        mean = tl.load(record + co, mask=co_mask, other=0.0)
    else:
        mean = tl.load(mean_a + k, mask=k < CI, other=0.0)
        wc = tl.load(wc_ptr + offsets, mask=mask, other=0.0)
    exists = (row < CO) & (column < CI)
    m, g = sum_of_splits(
        part, row * CI + column, exists, CO * CI + co, co_mask, splits, N, BLOCK_S, BLOCK_R * BLOCK_K, BLOCK_R, STAGES
    )
    m = tl.reshape(m, (BLOCK_R, BLOCK_K))
    if wc_ptr is not None:  # about the mean of z = W a itself, not of z as rounded: g may be far from centred
        m -= g[:, None] * mean[None, :]
    dot_mw = tl.sum(m * w, 1)
    if wc_ptr is None:
        dot_mw -= mean * g
    dweight = invstd * dot_mw
    sq = scale * (dweight * invstd / P)
    tl.store(sums + co, sq, mask=co_mask)
    tl.store(sums + CO + co, tl.max(tl.abs(w), 1), mask=co_mask)
    tl.store(sums + 2 * CO + co, dweight, mask=co_mask)
    tl.store(sums + 3 * CO + co, g, mask=co_mask)
    dw = scale[:, None] * m
    if wc_ptr is not None:
        dw -= sq[:, None] * wc
    tl.store(dw_ptr + offsets, dw, mask=mask)
    if qw_ptr is not None:
        sw = w * scale[:, None]
        if ROUNDED:  # TF32 keeps as many digits as float16
            sw = to_tf32(sw) if w_ptr.dtype.element_ty == tl.float16 else sw.to(w_ptr.dtype.element_ty).to(tl.float32)
        if sw_ptr is not None:
            tl.store(sw_ptr + offsets, sw, mask=mask)
        tl.store(wg_ptr + tl.program_id(0) * CI + k, tl.sum(sw * (g / P)[:, None], 0), mask=k < CI)
        store_parts(-sq[:, None] * w, qw_ptr, k[None, :] * CO + co[:, None], mask, CI * CO, PARTS)


@triton.jit(do_not_specialize=["CO_END"])
def gram_q_kernel(
    w_ptr,  # [CO, CI]
    qw_ptr,  # of gram_operands_kernel: [PARTS, CI, CO]
    sums,  # [4, CO]
    wg_ptr,  # [WG_ROWS, CI]
    mean_a,  # [CI]
    q_ptr,  # [CI, CI]: -Q / q_scale
    q_scale,  # [CI], written when SCALED: keeps each column of Q within float16
    c_ptr,  # [row tiles, CI]: c in parts
    CO_END,  # CO, where the loop ends (see `gram_kernel`)
    CI: tl.constexpr,
    CO: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    WG_ROWS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMNS: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMNS
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (tl.program_id(0) % COLUMNS) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_mask = i < CI
    j_mask = j < CI
    Q_TILES: tl.constexpr = (CI + BLOCK_M - 1) // BLOCK_M
    SHARE: tl.constexpr = (WG_ROWS + Q_TILES - 1) // Q_TILES  # of wg: the tiles of a column add all of it
    BLOCK_S: tl.constexpr = min(triton.next_power_of_2(SHARE), 128)
    begin(PDL)
    mean = tl.load(mean_a + i, mask=i_mask, other=0.0)
    wg = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, SHARE, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        mask = (row < SHARE) & (tile * SHARE + row < WG_ROWS)
        offsets = (tile * SHARE + row)[:, None] * CI + j[None, :]
        wg += tl.load(wg_ptr + offsets, mask=mask[:, None] & j_mask[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    scale = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, CO_END, BLOCK_K):
        co = start + tl.arange(0, BLOCK_K)
        co_mask = co < CO
        w = tl.load(w_ptr + co[None, :] * CI + i[:, None], mask=co_mask[None, :] & i_mask[:, None], other=0.0)
        for part in tl.static_range(PARTS):
            offsets = part * CI * CO + j[None, :] * CO + co[:, None]
            qw = tl.load(qw_ptr + offsets, mask=co_mask[:, None] & j_mask[None, :], other=0.0)
            acc = dot(w.to(qw.dtype), qw, acc, PRECISION)
            if SCALED:  # no element of the column is larger
                scale += tl.sum(tl.abs(qw) * tl.load(sums + CO + co, mask=co_mask, other=0.0)[:, None], 0)
    if SCALED:
        scale = tl.maximum(scale / 32768.0, 1e-30)
        acc /= scale[None, :]
        tl.store(q_scale + j, scale, mask=j_mask)
    q = acc.to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + i[:, None] * CI + j[None, :], q, mask=i_mask[:, None] & j_mask[None, :])
    c = -tl.sum(mean[:, None] * q.to(tl.float32), 0)
    if SCALED:
        c *= scale
    c -= tl.sum(wg, 0)
    tl.store(c_ptr + tile * CI + j, c, mask=j_mask)


# --- launchers -------------------------------------------------------------------------------------------------------


def gram(x: Operand, w: Tensor, norm: Norm, stride: int = 1) -> tuple[Tensor, Tensor]:
    """(kept, record) of z = W a, W [Co, Ci] packed, of the operand a at every stride-th row and column.

    kept: W C and the mean of a, [Co * Ci + Ci] float32. record: of `norm`, the norm of z in training. a should have a
    centre; a raw one is given it.
    """
    ci, co, device = x.channels, w.size(0), x.a.device
    if x.read == "raw":
        x = Operand("raw", x.a, centre=_centre(x.a))
    part = conv_wgrad(x, x, pointwise(stride), totals=True, centre=x.centre).part
    affine = norm.weight, norm.bias
    key = x.a.shape, x.a.dtype, device, stride, w.shape, part.size(0), x.centre is None, _precision(x.a), norm.eps
    key += tuple([None if t is None else t.dtype for t in affine])
    sums, products = plan_for(("gram", *key), lambda: _gram_plans(x, w, stride, part.size(0), norm))
    kept = alloc((co * ci + ci,), device)
    cov, mean = alloc((sums.parts, ci, ci), device, sums.dtype), alloc((ci,), device, torch.float64)
    record, shares, arrived = alloc((5, co), device), None, None
    if products.columns > 1:
        shares = alloc((products.columns, 2, co), device, torch.float64)
        arrived = alloc((products.rows,), device, torch.int32)
    sums(part, x.centre, cov, mean, kept[co * ci :], arrived)
    products(w, cov, mean, kept[: co * ci], record, *affine, shares, arrived)
    return kept, record


def _centre(x: Tensor) -> Tensor:
    """The centre [C] of x [N, C, T, H, W]."""
    channels, precision = x.size(1), _precision(x)

    def build() -> Plan:
        positions, block_c = x.numel() // channels, block(channels, 1, 16)
        return Plan(
            centre_kernel, (cdiv(channels, block_c),), (positions, max(1, positions // SAMPLE)),
            C=channels, PRECISION=precision, **dependent_launch(x.device), SAMPLE=SAMPLE, BLOCK_C=block_c,
        )  # fmt: skip

    centre = alloc((channels,), x.device)
    plan_for(("centre", x.shape, x.dtype, x.device, precision), build)(x, centre)
    return centre


def _precision(x: Tensor) -> str:
    return input_precision(x.dtype, x.device)


def _gram_plans(x: Operand, w: Tensor, stride: int, splits: int, norm: Norm) -> tuple[Plan, Plan]:
    """The launches of `gram`: gram_sum_kernel, gram_kernel."""
    n, ci, *dims = x.a.shape
    co, positions, pdl = w.size(0), n * math.prod(pointwise(stride).out_shape(*dims)), dependent_launch(x.a.device)
    parts = 1 if x.a.dtype == torch.float32 else 2
    tile = _gram_tile(ci, x.a.dtype)
    rows, columns = cdiv(co, tile["BLOCK_M"]), cdiv(ci, tile["BLOCK_N"])
    products = Plan(
        gram_kernel, (rows * columns,), (ci, positions, norm.eps),
        CI=ci, CO=co, PARTS=parts, PRECISION=_precision(x.a), **pdl, **tile,
    )  # fmt: skip
    products.rows, products.columns = rows, columns
    tile = _square_tile(ci, x.a.device)
    sums = Plan(
        gram_sum_kernel, (cdiv(ci, tile["BLOCK_I"]) * cdiv(ci, tile["BLOCK_J"]),), (positions, splits),
        CI=ci, PARTS=parts, TILES=rows, **pdl, **tile,
    )  # fmt: skip
    sums.parts, sums.dtype = parts, torch.bfloat16 if x.a.dtype == torch.bfloat16 else torch.float32
    return sums, products


def _gram_tile(ci: int, dtype: torch.dtype) -> dict:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": block(ci, 16, 64), "BLOCK_K": 32, "num_warps": 4}
    if dtype == torch.float16:
        return {"BLOCK_M": 64, "BLOCK_N": block(ci, 16, 64), "BLOCK_K": 32, "num_warps": 4}
    if ci <= 256:
        return {"BLOCK_M": 64, "BLOCK_N": block(ci, 16, 32), "BLOCK_K": block(ci, 16, 64), "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def _rows_tile(rows: int, columns: int, device: torch.device) -> dict:
    """Whole rows of `columns` to a program; 4, or of many columns 16, won a sweep on an H200."""
    block_k = block(columns, 16, 1 << 30)
    block_r = block(min(cdiv(rows, 128), 4 if block_k <= 256 else 16, max(1, 8192 // block_k)), 1, 16)
    return {"BLOCK_R": block_r, "BLOCK_K": block_k, **_sum_tile(block_r * block_k, device)}


def _square_tile(size: int, device: torch.device) -> dict:
    """Some rows and 16 columns of a square to a program, which reads the totals of these alone."""
    block_i = block(cdiv(size * cdiv(size, 16), 128), 4, 64)
    return {"BLOCK_I": block_i, "BLOCK_J": 16, **_sum_tile(16 * block_i + block(16 + block_i, 1, 128), device)}


def _sum_tile(size: int, device: torch.device) -> dict:
    """Of `sum_of_splits`: room for more under way than half of a multiprocessor's shared memory, so that no two
    programs are on one. They start as the kernel before leaves, and the first that it leaves would have them all.
    """
    half = _shared_memory(device) // 8 + 512  # elements
    block_s = 1 << max(1, 8192 // size).bit_length() - 1
    stages = cdiv(half, block_s * size) + 1 if block_s * size <= half else 1  # rows that are longer go to registers
    return {"BLOCK_S": block_s, "STAGES": stages, "num_warps": 32}


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor; a Hopper card's where there is none."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_multiprocessor", 228 << 10)


def gram_bwd(
    dy: Tensor,
    y: Tensor | None,
    w: Tensor,
    norm: Norm,
    record: Tensor,
    x: Operand,
    kept: Tensor | None,
    stride: int,
    needs_x: bool,
    kind: str | None = None,
    thin: bool = False,
) -> tuple[Tensor | None, tuple, Tensor, Tensor]:
    """(da, its partial sums, dW, sums [4, Co]) of y = relu(bn(W a) + ...) for the operand a, W [Co, Ci] packed.

    Without y, dy is masked already. kept: by `gram`; None when BN is frozen. kind: that of the join when the operand is
    one, whose norms then get their partial sums; None for a plain operand. thin: bn is over all positions of a, of
    which y has those of the stride; da is of all.
    """
    n, co, *out = dy.shape
    ci, out = x.channels, x.a.shape[2:] if thin else out
    fused = norm.training and needs_x and (thin or stride == 1) and cuda_allowed(dy)
    fused = fused and _cuda.gram_bwd_why_not(x, dy, y) is None
    raw = norm.training and needs_x and not fused and not thin and stride == 1 and _is_raw(x, dy, y)
    if fused:
        *v, part = _cuda.gram_bwd(dy, y, record, taps_of(w)[:, 0], x)
    else:
        g = Operand("raw", dy) if y is None else Operand("masked", dy, y)
        part = conv_wgrad(g, x, pointwise(stride), True).part  # of M and sum g
    sums, dw = alloc((4, co), dy.device), alloc((co * ci,), dy.device)
    key = x.a.shape, dy.shape, dy.dtype, dy.device, x.read, stride, norm.training, needs_x, kind, _precision(dy)
    key, rounded = ("gram_bwd", *key, part.size(0), y is None, thin, fused, raw), fused or raw
    operands, products, dgrad = plan_for(key, lambda: _gram_bwd_plans(dy, y, x, stride, thin, part.size(0), rounded))
    wc = mean_a = qw = wg = sw = q = q_scale = c = None
    if norm.training:
        wc, mean_a = kept[: co * ci], kept[co * ci :]
        if needs_x:
            qw, wg = alloc((operands.parts, ci, co), dy.device, operands.dtype), alloc((operands.rows, ci), dy.device)
            sw_q = alloc((co + ci if raw else ci, ci), dy.device, dy.dtype)
            sw, q = sw_q[:-ci] if raw else None, sw_q[-ci:]
            q_scale, c = alloc((ci,), dy.device), alloc((products.rows, ci), dy.device)
    operands(part, wc, mean_a, w, record, sums, dw, qw, wg, sw)
    if not needs_x:
        return None, (None, None), dw, sums
    if norm.training:
        products(w, qw, sums, wg, mean_a, q, q_scale, c)
    scale = q_scale if dy.dtype == torch.float16 else None
    sums_of = kind not in (None, "C"), kind is not None and x.b is not None  # as join_parts
    if fused:
        return *_cuda.gram_add(*v, x, q, scale, c, *sums_of), dw, sums
    if raw:
        return _cuda.gram_raw(dy, x.a, sw_q, c), (None, None), dw, sums
    if norm.training and not thin and cuda_allowed(dy) and _in_cuda(x, dy, stride):
        return *_cuda.gram_dgrad(dy, y, record, taps_of(w)[:, 0], x, q, scale, c, *sums_of, stride), dw, sums
    parts = (None, None) if kind is None else join_parts(x, kind, dgrad.rows)
    da = empty_ndhwc((n, ci, *out), dy)
    dgrad(dy, y, record, w, *x.args()[:4], q, q_scale, c, da, *parts)
    return da, parts, dw, sums


def _is_raw(x: Operand, dy: Tensor, y: Tensor | None) -> bool:
    """Whether `gram_raw` takes them, of bfloat16 alone: float16's Q has a scale, which s W has not."""
    taken = x.read == "raw" and y is None and dy.dtype == torch.bfloat16 and cuda_allowed(dy)
    return taken and _cuda.gram_raw_why_not(x.a, dy) is None


def _in_cuda(x: Operand, dy: Tensor, stride: int) -> bool:
    return _cuda.gram_tiles_why_not(x, dy, stride) is None


def _gram_bwd_plans(
    dy: Tensor, y: Tensor | None, x: Operand, stride: int, thin: bool, splits: int, rounded: bool
) -> tuple[Plan, Plan, Plan]:
    """The launches of `gram_bwd`: gram_operands_kernel, gram_q_kernel, gram_dgrad_kernel. `rows`: their row tiles."""
    co, ci, positions = dy.size(1), x.channels, dy.numel() // dy.size(1)
    everywhere = x.a.numel() // ci if thin else positions  # that bn is over
    parts = 2 if dy.dtype == torch.bfloat16 else 1
    scaled = dy.dtype == torch.float16
    pdl, tile = dependent_launch(dy.device), _rows_tile(co, ci, dy.device)
    operands = Plan(
        gram_operands_kernel, (cdiv(co, tile["BLOCK_R"]),), (float(everywhere), splits),
        CI=ci, CO=co, PARTS=parts, ROUNDED=rounded, **pdl, **tile,
    )  # fmt: skip
    operands.rows, operands.parts = operands.grid[0], parts
    operands.dtype = torch.bfloat16 if parts > 1 else torch.float32
    tile = _q_tile(ci, dy.dtype)
    q_rows = cdiv(ci, tile["BLOCK_M"])
    products = Plan(
        gram_q_kernel, (q_rows * cdiv(ci, tile["BLOCK_N"]),), (co,),
        CI=ci, CO=co, PARTS=parts, PRECISION="tf32" if scaled else "ieee", SCALED=scaled, WG_ROWS=operands.rows,
        **pdl, **tile,
    )  # fmt: skip
    products.rows = q_rows
    tile = _dgrad_tile(everywhere, ci, dy.dtype)
    rows = cdiv(positions, tile["BLOCK_P"]) + cdiv(everywhere - positions, tile["BLOCK_P"])
    dgrad = Plan(
        gram_dgrad_kernel, (rows * cdiv(ci, tile["BLOCK_CI"]),), (positions, *x.a.shape[2:], *dy.shape[2:]),
        CI=ci, CO=co, SH=stride, THIN=thin, READ=x.read, READ_G="scaled" if y is None else "masked_scaled",
        PRECISION=_precision(dy), SCALED=scaled, C_PARTS=q_rows, **tile,
    )  # fmt: skip
    dgrad.rows = rows
    return operands, products, dgrad


def _q_tile(ci: int, dtype: torch.dtype) -> dict:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": block(ci, 16, 64), "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if ci > 512 and dtype == torch.bfloat16:  # as many products as W C, and as it is divided
        return _gram_tile(ci, dtype)
    return {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}  # of a sweep on an H200


def _dgrad_tile(positions: int, ci: int, dtype: torch.dtype) -> dict:
    wide = dtype == torch.float32
    block_p = 64 if positions >= 64 * 64 else 32
    block_ci, block_k = block(ci, 16, 64 if wide or block_p == 32 else 128), 32 if wide else 64
    return {"BLOCK_P": block_p, "BLOCK_CI": block_ci, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
