"""BN after a 1x1x1 convolution whose output z = W a, the widest tensor of a block, is never stored.

With P positions and the covariance of the narrow operand,

    mean_a = sum a / P,    C = (a - mean_a)^T (a - mean_a)          one pass over a

its statistics are mean = W mean_a and P var = rowsum(W C * W) (`gram`). Forward then computes relu(bn(z) + r) in one
pass (`conv`), and keeps mean_a and W C for the backward, which uses the Gram identity: with g = dy [y > 0] and

    M = g^T a,    sum_g         one pass over what is stored anyway

the gradients are (s = weight * invstd, all vectors a channel; docs/derivations.md)

    dweight = invstd * rowsum((M - sum_g mean_a^T) * W),    dbias = sum_g
    dW      = s * (M - sum_g mean_a^T - q W C),   q = dweight * invstd / P
    da      = (s g) W - a Q + c,   Q = W^T diag(s q) W,   c = Q^T mean_a - W^T (s sum_g / P)

so da is one kernel with two products. Q is rounded to the dtype, and c is of the rounded Q: over all positions da then
sums to zero as it must. The error of a constant would grow from block to block; that of a position averages out.

Sums of products in float32 lose what a varies by where that is small beside a, so they are formed about a centre: the
mean of some positions, in steps of a power of two near the deviation. Of so few bits, a - centre is exact in the dtype
wherever a is not small beside the centre, and elsewhere rounded without bias.

W C and Q are W times a float32 matrix. It is split in two, which keeps 16 bits of it with bfloat16 and 22 with TF32,
in which float16 is multiplied; of float16's Q the first part is enough.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._norm import Norm
from . import _cuda
from ._conv import conv_wgrad, cuda_allowed, pointwise, tap_row, taps_of
from ._tape import Plan, alloc, cdiv, plan_for
from ._triton import (
    Operand,
    begin,
    block,
    dependent_launch,
    dot,
    empty_ndhwc,
    input_precision,
    read_operand,
    tl,
    to_tf32,
    triton,
)
from .pseudo3d import join_bwd, join_parts

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["P", "step"])
def centre_kernel(
    a_ptr,  # operand: [P, C]
    b_ptr,
    record_a,
    record_b,
    centre,  # [C] float32
    P,
    step,  # positions from one of the sample to the next
    C: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, SAMPLE) * step
    mask = (p < P)[:, None] & (c < C)[None, :]
    offsets = p.to(tl.int64)[:, None] * C + c[None, :]
    begin(PDL)
    a = read_operand(a_ptr, b_ptr, record_a, record_b, None, offsets, mask, c, c < C, C, READ).to(tl.float32)
    n = tl.minimum(P, SAMPLE).to(tl.float32)
    mean = tl.sum(a, 0) / n
    d = tl.where(mask, a - mean[None, :], 0.0)
    var = tl.sum(d * d, 0) / n
    exponent = ((var.to(tl.int32, bitcast=True) >> 23) - 127) >> 1
    unit = ((exponent + 127) << 23).to(tl.float32, bitcast=True)  # at most the deviation, and above half of it
    value = (tl.floor(mean / unit + 0.5) * unit).to(a_ptr.dtype.element_ty).to(tl.float32)
    if PRECISION == "tf32":
        value = to_tf32(value)
    tl.store(centre + c, value, mask=c < C)


@triton.jit(do_not_specialize=["P", "CI_END"])
def gram_kernel(
    s_ptr,  # [CI, CI] float32: (a - centre)^T (a - centre)
    total,  # [CI]: sum of a - centre
    centre,  # [CI] or None: zero
    w_ptr,  # [CO, CI]
    wc_ptr,  # [CO, CI] float32: W C
    mean_ptr,  # [CI] float32: mean of a
    part,  # [column tiles, 3, CO] float64: partial statistics of W a; or None
    P,
    CI_END,  # CI, where the loops end: of a loop whose length it knows, ptxas 12.8 may leave out the products
    CI: tl.constexpr,
    CO: tl.constexpr,
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
    total_j = tl.load(total + j, mask=j_mask, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, CI_END, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < CI
        w = tl.load(w_ptr + co[:, None] * CI + k[None, :], mask=co_mask[:, None] & k_mask[None, :], other=0.0)
        c = tl.load(s_ptr + k[:, None] * CI + j[None, :], mask=k_mask[:, None] & j_mask[None, :], other=0.0)
        c -= (tl.load(total + k, mask=k_mask, other=0.0) / P)[:, None] * total_j[None, :]
        if w_ptr.dtype.element_ty == tl.float32:
            if PRECISION == "tf32":
                w = to_tf32(w)
            acc = dot(w, c, acc, "ieee")
        else:
            for _ in tl.static_range(2):
                if w_ptr.dtype.element_ty == tl.bfloat16:
                    rounded = c.to(tl.bfloat16)
                    acc = dot(w, rounded, acc, "ieee")
                else:
                    rounded = to_tf32(c)
                    acc = dot(w.to(tl.float32), rounded, acc, "tf32")
                c -= rounded.to(tl.float32)
    tl.store(wc_ptr + co[:, None] * CI + j[None, :], acc, mask=mask)
    if tile == 0:
        mean = total_j / P
        if centre is not None:
            mean += tl.load(centre + j, mask=j_mask, other=0.0)
        tl.store(mean_ptr + j, mean, mask=j_mask)
    if part is not None:
        w = tl.load(w_ptr + co[:, None] * CI + j[None, :], mask=mask, other=0.0).to(tl.float32)
        if PRECISION == "tf32":
            w = to_tf32(w)
        n = tl.where(column == 0, P, 0).to(tl.float64)  # the other tiles add to the squares alone
        mean = tl.zeros((BLOCK_M,), tl.float64)
        if column == 0:
            for start in range(0, CI_END, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                w_mask = co_mask[:, None] & (k < CI)[None, :]
                v = tl.load(w_ptr + co[:, None] * CI + k[None, :], mask=w_mask, other=0.0).to(tl.float32)
                if PRECISION == "tf32":
                    v = to_tf32(v)
                mean_k = tl.load(total + k, mask=k < CI, other=0.0).to(tl.float64) / P
                mean_k += tl.load(centre + k, mask=k < CI, other=0.0).to(tl.float64)
                mean += tl.sum(v.to(tl.float64) * mean_k[None, :], 1)
        row = part + column * 3 * CO + co
        tl.store(row, tl.zeros_like(mean) + n, mask=co_mask)
        tl.store(row + CO, mean, mask=co_mask)
        tl.store(row + 2 * CO, tl.sum(acc * w, 1).to(tl.float64), mask=co_mask)


@triton.jit(do_not_specialize=["P", "T", "H", "W", "To", "Ho", "Wo"])
def gram_dgrad_kernel(
    g_ptr,  # [N, To, Ho, Wo, CO] gradient of y
    y_ptr,  # like g
    record,  # [5, CO] of the BN after W
    w_ptr,  # [CO, CI]
    a_ptr,  # operand: [N, T, H, W, CI]
    b_ptr,
    record_a,
    record_b,
    q_ptr,  # [CI, CI], -Q / q_scale in the dtype of g; None when BN is frozen
    q_scale,  # [CI] float32, a column; read when SCALED
    c_ptr,  # [C_PARTS, CI] float32, to be summed
    da_ptr,  # [N, To, Ho, Wo, CI]
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
    READ: tl.constexpr,
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

    acc = tl.zeros((BLOCK_P, BLOCK_CI), tl.float32)
    if q_ptr is not None:
        if SH == 1:
            row, exists = p, p_mask
        else:
            w_o = p % Wo
            h_o = p // Wo % Ho
            t_o = p // (Wo * Ho) % To
            n = p // (Wo * Ho * To)
            row, exists = tap_row(n, t_o, h_o, w_o, 0, 0, 0, T, H, W, 1, 1, 1, 1, SH, False)
            exists = exists & p_mask
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
    for start in range(0, CO, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = p.to(tl.int64)[:, None] * CO + k[None, :]
        mask = p_mask[:, None] & (k < CO)[None, :]
        g = read_operand(g_ptr, y_ptr, None, record, None, offsets, mask, k, k < CO, CO, "masked_scaled")
        w = tl.load(w_ptr + k[:, None] * CI + ci[None, :], mask=(k < CO)[:, None] & ci_mask[None, :], other=0.0)
        acc = dot(g, w, acc, PRECISION)
    if q_ptr is not None:
        c = tl.zeros((BLOCK_CI,), tl.float32)
        for i in range(C_PARTS):
            c += tl.load(c_ptr + i * CI + ci, mask=ci_mask, other=0.0)
        acc += c[None, :]
        if SCALED:
            acc += acc_q * tl.load(q_scale + ci, mask=ci_mask, other=0.0)[None, :]

    mask = p_mask[:, None] & ci_mask[None, :]
    offsets = p.to(tl.int64)[:, None] * CI + ci[None, :]
    join_bwd(acc, da_ptr, a_ptr, b_ptr, record_a, record_b, part_a, part_b, offsets, mask, tile, ci, ci_mask, CI, READ)


@triton.jit
def store_parts(v, out, offsets, mask, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """v as a sum of PARTS tensors of SIZE elements of the dtype of out: each takes what rounding left of v so far."""
    for i in tl.static_range(PARTS):
        rounded = v.to(out.dtype.element_ty)
        tl.store(out + i * SIZE + offsets, rounded, mask=mask)
        v -= rounded.to(tl.float32)


@triton.jit
def gram_operands_kernel(
    m_ptr,  # [CO, CI] float32: g^T a
    sum_g,  # [CO]
    wc_ptr,  # of gram_kernel: [CO, CI]; None when BN is frozen
    mean_a,  # [CI]
    w_ptr,  # [CO, CI]
    record,  # [5, CO]
    sums,  # [4, CO] rows (s q, most of |W|, dweight, dbias)
    dw_ptr,  # [CO, CI] float32
    qw_ptr,  # [PARTS, CI, CO]: -(diag(s q) W)^T; or None
    wg_ptr,  # [programs, CI]: W^T (s sum_g / P) in parts, with qw
    P,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    co = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    co_mask = co < CO
    scale = tl.load(record + CO + co, mask=co_mask, other=0.0)
    invstd = tl.load(record + 3 * CO + co, mask=co_mask, other=0.0)
    g = tl.load(sum_g + co, mask=co_mask, other=0.0)
    dot_mw = tl.zeros((BLOCK_R,), tl.float32)
    most = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, CI, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = co[:, None] * CI + k[None, :]
        mask = co_mask[:, None] & (k < CI)[None, :]
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + offsets, mask=mask, other=0.0)
        if wc_ptr is None:
            tl.store(dw_ptr + offsets, scale[:, None] * m, mask=mask)
        else:  # about the mean of z = W a itself, not of z as rounded: g may be far from centred
            m -= g[:, None] * tl.load(mean_a + k, mask=k < CI, other=0.0)[None, :]
        dot_mw += tl.sum(m * w, 1)
        most = tl.maximum(most, tl.max(tl.abs(w), 1))
        if qw_ptr is not None:
            tl.store(wg_ptr + tl.program_id(0) * CI + k, tl.sum(w * (scale * g / P)[:, None], 0), mask=k < CI)
    if wc_ptr is None:
        dot_mw -= tl.load(record + co, mask=co_mask, other=0.0) * g
    dweight = invstd * dot_mw
    sq = scale * (dweight * invstd / P)
    tl.store(sums + co, sq, mask=co_mask)
    tl.store(sums + CO + co, most, mask=co_mask)
    tl.store(sums + 2 * CO + co, dweight, mask=co_mask)
    tl.store(sums + 3 * CO + co, g, mask=co_mask)
    if wc_ptr is not None:
        for start in range(0, CI, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            offsets = co[:, None] * CI + k[None, :]
            mask = co_mask[:, None] & (k < CI)[None, :]
            m = tl.load(m_ptr + offsets, mask=mask, other=0.0)
            m -= g[:, None] * tl.load(mean_a + k, mask=k < CI, other=0.0)[None, :]
            wc = tl.load(wc_ptr + offsets, mask=mask, other=0.0)
            tl.store(dw_ptr + offsets, scale[:, None] * m - sq[:, None] * wc, mask=mask)
            if qw_ptr is not None:
                w = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
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
    mean = tl.load(mean_a + i, mask=i_mask, other=0.0)
    c = -tl.sum(mean[:, None] * q.to(tl.float32), 0)
    if SCALED:
        c *= scale
    Q_TILES: tl.constexpr = (CI + BLOCK_M - 1) // BLOCK_M
    SHARE: tl.constexpr = (WG_ROWS + Q_TILES - 1) // Q_TILES  # of wg: the tiles of a column add all of it
    for start in range(0, SHARE, 16):
        row = start + tl.arange(0, 16)
        mask = (row < SHARE) & (tile * SHARE + row < WG_ROWS)
        offsets = (tile * SHARE + row)[:, None] * CI + j[None, :]
        c -= tl.sum(tl.load(wg_ptr + offsets, mask=mask[:, None] & j_mask[None, :], other=0.0), 0)
    tl.store(c_ptr + tile * CI + j, c, mask=j_mask)


# --- launchers -------------------------------------------------------------------------------------------------------


def gram(x: Operand, w: Tensor, stride: int = 1, stats: bool = False) -> tuple[Tensor, Tensor | None]:
    """(kept, part) of the convolution z = W a of the operand a, W [Co, Ci] packed; a at every stride-th row and column.

    kept: W C and the mean of a, [Co * Ci + Ci] float32. part: partial statistics [R, 3, Co] of z, if wanted; a is then
    an activation, `bn_relu` or a join.
    """
    ci, co, device = x.channels, w.size(0), x.a.device
    key = x.a.shape, x.a.dtype, device, x.read, stride, stats, w.shape, _precision(x.a)
    centring, products = plan_for(("gram", *key), lambda: _gram_plans(x, w, stride, stats))
    centre = part = None
    if stats:
        centre, part = alloc((ci,), device), alloc((products.columns, 3, co), device, torch.float64)
        centring(*x.args()[:4], centre)
    s, total = conv_wgrad(x, x, pointwise(stride), totals=True, centre=centre)
    kept = alloc((co * ci + ci,), device)
    products(s, total, centre, w, kept[: co * ci], kept[co * ci :], part)
    return kept, part


def _precision(x: Tensor) -> str:
    return input_precision(x.dtype, x.device)


def _gram_plans(x: Operand, w: Tensor, stride: int, stats: bool) -> tuple[Plan | None, Plan]:
    """The launches of `gram`: centre_kernel, gram_kernel."""
    n, ci, *dims = x.a.shape
    co, positions, pdl = w.size(0), n * math.prod(pointwise(stride).out_shape(*dims)), dependent_launch(x.a.device)
    centring = None
    if stats:
        tile = {"SAMPLE": 256, "BLOCK_C": 16, "num_warps": 4}
        step = max(1, positions // tile["SAMPLE"])
        centring = Plan(
            centre_kernel, (cdiv(ci, tile["BLOCK_C"]),), (positions, step),
            C=ci, READ=x.read, PRECISION=_precision(x.a), **pdl, **tile,
        )  # fmt: skip
    tile = _gram_tile(ci, x.a.dtype)
    columns = cdiv(ci, tile["BLOCK_N"])
    products = Plan(
        gram_kernel, (cdiv(co, tile["BLOCK_M"]) * columns,), (positions, ci),
        CI=ci, CO=co, PRECISION=_precision(x.a), **pdl, **tile,
    )  # fmt: skip
    products.columns = columns
    return centring, products


def _gram_tile(ci: int, dtype: torch.dtype) -> dict:
    block_m, block_k = (
        (64, block(ci, 16, 64)) if dtype == torch.bfloat16 else (64 if dtype == torch.float16 else 32, 32)
    )
    return {"BLOCK_M": block_m, "BLOCK_N": block(ci, 16, 64), "BLOCK_K": block_k, "num_warps": 4}


def gram_bwd(
    dy: Tensor,
    y: Tensor,
    w: Tensor,
    norm: Norm,
    record: Tensor,
    x: Operand,
    kept: Tensor | None,
    stride: int,
    needs_x: bool,
    kind: str | None = None,
) -> tuple[Tensor | None, tuple, Tensor, Tensor]:
    """(da, its partial sums, dW, sums [4, Co]) of y = relu(bn(W a) + ...) for the operand a, W [Co, Ci] packed.

    kept: by `gram`; None when BN is frozen. kind: that of the join when the operand is one, whose norms then get their
    partial sums; None for a plain operand.
    """
    n, co, *out = dy.shape
    ci = x.channels
    m, sum_g = conv_wgrad(Operand("masked", dy, y), x, pointwise(stride), totals=True)  # [Co * Ci], [Co]
    sums, dw = alloc((4, co), dy.device), alloc((co * ci,), dy.device)
    key = x.a.shape, dy.shape, dy.dtype, dy.device, x.read, stride, norm.training, needs_x, kind, _precision(dy)
    operands, products, dgrad = plan_for(("gram_bwd", *key), lambda: _gram_bwd_plans(dy, x, stride))
    wc = mean_a = qw = wg = q = q_scale = c = None
    if norm.training:
        wc, mean_a = kept[: co * ci], kept[co * ci :]
        if needs_x:
            qw, wg = alloc((operands.parts, ci, co), dy.device, operands.dtype), alloc((operands.rows, ci), dy.device)
            q, q_scale = alloc((ci, ci), dy.device, dy.dtype), alloc((ci,), dy.device)
            c = alloc((products.rows, ci), dy.device)
    operands(m, sum_g, wc, mean_a, w, record, sums, dw, qw, wg)
    if not needs_x:
        return None, (None, None), dw, sums
    if norm.training:
        products(w, qw, sums, wg, mean_a, q, q_scale, c)
    if norm.training and cuda_allowed(dy) and _in_cuda(x, dy, stride):
        scale = q_scale if dy.dtype == torch.float16 else None
        sums_of = kind not in (None, "C"), kind is not None and x.b is not None  # as join_parts
        return *_cuda.gram_dgrad(dy, y, record, taps_of(w)[:, 0], x, q, scale, c, *sums_of, stride), dw, sums
    parts = (None, None) if kind is None else join_parts(x, kind, dgrad.rows)
    da = empty_ndhwc((n, ci, *out), dy)
    dgrad(dy, y, record, w, *x.args()[:4], q, q_scale, c, da, *parts)
    return da, parts, dw, sums


def _in_cuda(x: Operand, dy: Tensor, stride: int) -> bool:
    return _cuda.gram_dgrad_why_not(x, dy) is None or _cuda.gram_tiles_why_not(x, dy, stride) is None


def _gram_bwd_plans(dy: Tensor, x: Operand, stride: int) -> tuple[Plan, Plan, Plan]:
    """The launches of `gram_bwd`: gram_operands_kernel, gram_q_kernel, gram_dgrad_kernel. `rows`: their row tiles."""
    co, ci, positions = dy.size(1), x.channels, dy.numel() // dy.size(1)
    parts = 2 if dy.dtype == torch.bfloat16 else 1
    scaled = dy.dtype == torch.float16
    tile = _operands_tile(ci)
    operands = Plan(
        gram_operands_kernel, (cdiv(co, tile["BLOCK_R"]),), (float(positions),), CI=ci, CO=co, PARTS=parts, **tile
    )
    operands.rows, operands.parts = operands.grid[0], parts
    operands.dtype = torch.bfloat16 if parts > 1 else torch.float32
    tile = _q_tile(ci, dy.dtype)
    q_rows = cdiv(ci, tile["BLOCK_M"])
    products = Plan(
        gram_q_kernel, (q_rows * cdiv(ci, tile["BLOCK_N"]),), (co,),
        CI=ci, CO=co, PARTS=parts, PRECISION="tf32" if scaled else "ieee", SCALED=scaled, WG_ROWS=operands.rows, **tile,
    )  # fmt: skip
    products.rows = q_rows
    tile = _dgrad_tile(positions, ci, dy.dtype)
    rows = cdiv(positions, tile["BLOCK_P"])
    dgrad = Plan(
        gram_dgrad_kernel, (rows * cdiv(ci, tile["BLOCK_CI"]),), (positions, *x.a.shape[2:], *dy.shape[2:]),
        CI=ci, CO=co, SH=stride, READ=x.read, PRECISION=_precision(dy), SCALED=scaled, C_PARTS=q_rows, **tile,
    )  # fmt: skip
    dgrad.rows = rows
    return operands, products, dgrad


def _operands_tile(ci: int) -> dict:
    rows, warps = (16, 4) if ci <= 128 else (8, 4) if ci <= 256 else (16, 8)
    return {"BLOCK_R": rows, "BLOCK_K": block(ci, 16, 512), "num_warps": warps}


def _q_tile(ci: int, dtype: torch.dtype) -> dict:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": block(ci, 16, 64), "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if ci <= 256:
        return {"BLOCK_M": 64, "BLOCK_N": block(ci, 16, 32), "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}


def _dgrad_tile(positions: int, ci: int, dtype: torch.dtype) -> dict:
    wide = dtype == torch.float32
    block_p = 64 if positions >= 64 * 64 else 32
    block_ci, block_k = block(ci, 16, 64 if wide or block_p == 32 else 128), 32 if wide else 64
    return {"BLOCK_P": block_p, "BLOCK_CI": block_ci, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
