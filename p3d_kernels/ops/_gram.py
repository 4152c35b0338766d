"""BN after a 1x1x1 convolution whose output, the widest tensor of a block, is never stored.

Forward runs the product z = W a twice: for its statistics, and (`conv`) for relu(bn(z) + r). Backward uses the Gram
identity. With g = dy [y > 0], P positions, and

    M = g^T a,   S = a^T a,   sums of g and of a        (one pass each over what is stored anyway)

the gradients are (s = weight * invstd, all vectors a channel; docs/derivations.md)

    dweight = invstd * (rowsum(M * W) - mean * sum_g),    dbias = sum_g
    dW      = s * (M - sum_g sum_a^T / P - q (W S - mean sum_a^T)),   q = dweight * invstd / P
    da      = (s g) W - a Q + c,   Q = W^T diag(s q) W,   c = Q^T sum_a / P - W^T (s sum_g / P)

so da is one kernel with two products. Q is rounded to the dtype, and c is of the rounded Q: over all positions da then
sums to zero as it must. The error of a constant would grow from block to block; that of a position averages out.

dW and Q are W times a float32 matrix. One launch forms these matrices and what sums over a row of W, one multiplies
them. For bfloat16 they are split in two, which keeps 16 bits of them; float16 is multiplied in TF32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._norm import Norm
from . import _cuda
from ._conv import conv_wgrad, cuda_allowed, pointwise, sm_count, tap_row, taps_of
from ._tape import Plan, alloc, cdiv, plan_for
from ._triton import Operand, block, dot, empty_ndhwc, input_precision, read_operand, tl, triton
from .pseudo3d import join_bwd, join_parts

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["P", "chunk"])
def expand_stats_kernel(
    a_ptr,  # operand: [P, CI]
    b_ptr,
    record_a,
    record_b,
    w_ptr,  # [CO, CI]
    part,  # [splits, 3, CO] statistics of W a, which is not stored
    P,
    chunk,  # positions a split
    CI: tl.constexpr,
    CO: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
):
    CHUNKS: tl.constexpr = (CI + BLOCK_CI - 1) // BLOCK_CI
    split = tl.program_id(1)
    co = tl.program_id(0) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    co_mask = co < CO
    rows = tl.arange(0, BLOCK_P)
    begin = split * chunk
    end = tl.minimum(P, begin + chunk)
    about = tl.zeros((BLOCK_CO,), tl.float32)
    first = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    second = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    for start in range(begin - BLOCK_P, end, BLOCK_P):  # the first tile is read twice: it gives the point to sum about
        p = tl.maximum(start, begin) + rows
        p_mask = p < end
        z = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
        for i in tl.static_range(CHUNKS):
            ci = i * BLOCK_CI + tl.arange(0, BLOCK_CI)
            ci_mask = ci < CI
            offsets = p.to(tl.int64)[:, None] * CI + ci[None, :]
            mask = p_mask[:, None] & ci_mask[None, :]
            a = read_operand(a_ptr, b_ptr, record_a, record_b, None, offsets, mask, ci, ci_mask, CI, READ)
            w_mask = ci_mask[:, None] & co_mask[None, :]
            w = tl.load(w_ptr + co[None, :] * CI + ci[:, None], mask=w_mask, other=0.0)
            z = dot(a, w, z, PRECISION)
        if start < begin:
            about = tl.sum(z, 0) / tl.minimum(end - begin, BLOCK_P).to(tl.float32)
        else:
            d = tl.where(p_mask[:, None], z - about[None, :], 0.0)
            first += d
            second += d * d
    n = (end - begin).to(tl.float32)
    shift = tl.sum(first, 0) / n
    row = part + split * 3 * CO + co
    tl.store(row, tl.zeros_like(shift) + n, mask=co_mask)
    tl.store(row + CO, about + shift, mask=co_mask)
    tl.store(row + 2 * CO, tl.sum(second, 0) - n * shift * shift, mask=co_mask)


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
    gram_ptr,  # [CI, CI] float32: a^T a; None when BN is frozen
    sum_a,  # [CI]
    w_ptr,  # [CO, CI]
    record,  # [5, CO]
    sums,  # [4, CO] rows (s q, most of |W|, dweight, dbias)
    dw_ptr,  # [CO, CI] float32, written when BN is frozen
    centred_ptr,  # [PARTS, CI, CI]: S - sum_a sum_a^T / P
    qw_ptr,  # [PARTS, CI, CO]: -(diag(s q) W)^T; or None
    wg_ptr,  # [blocks of CO, CI]: W^T (s sum_g / P) in parts, with qw
    P,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CO + BLOCK_R - 1) // BLOCK_R
    block = tl.program_id(0)
    if block < BLOCKS:
        co = block * BLOCK_R + tl.arange(0, BLOCK_R)
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
            if gram_ptr is None:
                tl.store(dw_ptr + offsets, scale[:, None] * m, mask=mask)
            else:  # about the mean of z = W a itself, not of z as rounded: g may be far from centred
                m -= g[:, None] * (tl.load(sum_a + k, mask=k < CI, other=0.0) / P)[None, :]
            dot_mw += tl.sum(m * w, 1)
            most = tl.maximum(most, tl.max(tl.abs(w), 1))
            if qw_ptr is not None:
                tl.store(wg_ptr + block * CI + k, tl.sum(w * (scale * g / P)[:, None], 0), mask=k < CI)
        if gram_ptr is None:
            dot_mw -= tl.load(record + co, mask=co_mask, other=0.0) * g
        dweight = invstd * dot_mw
        sq = scale * (dweight * invstd / P)
        tl.store(sums + co, sq, mask=co_mask)
        tl.store(sums + CO + co, most, mask=co_mask)
        tl.store(sums + 2 * CO + co, dweight, mask=co_mask)
        tl.store(sums + 3 * CO + co, g, mask=co_mask)
        if qw_ptr is not None:
            for start in range(0, CI, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                offsets = co[:, None] * CI + k[None, :]
                mask = co_mask[:, None] & (k < CI)[None, :]
                w = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                store_parts(-sq[:, None] * w, qw_ptr, k[None, :] * CO + co[:, None], mask, CI * CO, PARTS)
    elif gram_ptr is not None:
        i = (block - BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
        mean = tl.load(sum_a + i, mask=i < CI, other=0.0) / P
        for start in range(0, CI, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            offsets = i[:, None] * CI + k[None, :]
            mask = (i < CI)[:, None] & (k < CI)[None, :]
            c = tl.load(gram_ptr + offsets, mask=mask, other=0.0)
            c -= mean[:, None] * tl.load(sum_a + k, mask=k < CI, other=0.0)[None, :]
            store_parts(c, centred_ptr, offsets, mask, CI * CI, PARTS)


@triton.jit
def q_tile(
    w_ptr, qw_ptr, sums, wg_ptr, sum_a, q_ptr, q_scale, c_ptr, P, K, tile, j, CI: tl.constexpr, CO: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr, WG_ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `tile` and columns j of -Q, and what they and their share of wg make of c."""
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i_mask = i < CI
    j_mask = j < CI
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    scale = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
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
    mean = tl.load(sum_a + i, mask=i_mask, other=0.0) / P
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


@triton.jit
def dw_tile(
    w_ptr, centred_ptr, sums, m_ptr, sum_g, sum_a, record, dw_ptr, P, K, tile, j, CI: tl.constexpr, CO: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `tile` and columns j of dW = s (M - sum_g sum_a^T / P) - diag(s q) W (S - sum_a sum_a^T / P)."""
    co = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    co_mask = co < CO
    j_mask = j < CI
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < CI
        w = tl.load(w_ptr + co[:, None] * CI + k[None, :], mask=co_mask[:, None] & k_mask[None, :], other=0.0)
        for part in tl.static_range(PARTS):
            offsets = part * CI * CI + j[None, :] * CI + k[:, None]  # symmetric: read along its rows
            s = tl.load(centred_ptr + offsets, mask=k_mask[:, None] & j_mask[None, :], other=0.0)
            acc = dot(w.to(s.dtype), s, acc, PRECISION)
    offsets = co[:, None] * CI + j[None, :]
    mask = co_mask[:, None] & j_mask[None, :]
    g = tl.load(sum_g + co, mask=co_mask, other=0.0)
    scale = tl.load(record + CO + co, mask=co_mask, other=0.0)
    sq = tl.load(sums + co, mask=co_mask, other=0.0)
    mean = tl.load(sum_a + j, mask=j_mask, other=0.0) / P
    dw = tl.load(m_ptr + offsets, mask=mask, other=0.0) - g[:, None] * mean[None, :]
    tl.store(dw_ptr + offsets, scale[:, None] * dw - sq[:, None] * acc, mask=mask)


@triton.jit(do_not_specialize=["P", "CI_END", "CO_END"])
def gram_products_kernel(
    w_ptr,  # [CO, CI]
    centred_ptr,  # of gram_operands_kernel: [PARTS, CI, CI]
    qw_ptr,  # [PARTS, CI, CO]; None: no Q
    wg_ptr,  # [WG_ROWS, CI]
    sums,  # [4, CO]
    m_ptr,  # [CO, CI] float32: g^T a
    sum_g,  # [CO]
    sum_a,  # [CI]
    record,  # [5, CO]
    dw_ptr,  # [CO, CI] float32
    q_ptr,  # [CI, CI]: -Q / q_scale
    q_scale,  # [CI], written when SCALED: keeps each column of Q within float16
    c_ptr,  # [row tiles of Q, CI]: c in parts
    P,
    CI_END,  # CI and CO, where loops end: of a loop whose length it knows, ptxas 12.8 may leave out the products
    CO_END,
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
    Q_TILES: tl.constexpr = (CI + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0) // COLUMNS
    j = (tl.program_id(0) % COLUMNS) * BLOCK_N + tl.arange(0, BLOCK_N)
    if qw_ptr is None:
        dw_tile(
            w_ptr, centred_ptr, sums, m_ptr, sum_g, sum_a, record, dw_ptr, P, CI_END, tile, j, CI, CO,
            PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif tile < Q_TILES:  # the longer sums first
        q_tile(
            w_ptr, qw_ptr, sums, wg_ptr, sum_a, q_ptr, q_scale, c_ptr, P, CO_END, tile, j, CI, CO,
            PARTS, PRECISION, SCALED, WG_ROWS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        dw_tile(
            w_ptr, centred_ptr, sums, m_ptr, sum_g, sum_a, record, dw_ptr, P, CI_END, tile - Q_TILES, j, CI, CO,
            PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


# --- launchers -------------------------------------------------------------------------------------------------------


def expand_stats(x: Operand, w: Tensor) -> Tensor:
    """Partial statistics [R, 3, Co] of W a for the operand a, W [Co, Ci] packed."""
    key = "expand_stats", x.a.shape, x.a.dtype, x.a.device, x.read, w.shape, _precision(x.a)
    plan = plan_for(key, lambda: _stats_plan(x, w))
    part = alloc(plan.part_shape, x.a.device)
    plan(*x.args()[:4], w, part)
    return part


def _precision(x: Tensor) -> str:
    return input_precision(x.dtype, x.device)


def _stats_plan(x: Operand, w: Tensor) -> Plan:
    ci, co, positions = x.channels, w.size(0), x.a.numel() // x.channels
    tile = _stats_tile(ci, co, x.a.dtype)
    tiles = cdiv(co, tile["BLOCK_CO"])
    splits = max(1, min(2 * sm_count(x.a.device) // tiles, cdiv(positions, 2 * tile["BLOCK_P"])))
    chunk = cdiv(cdiv(positions, splits), tile["BLOCK_P"]) * tile["BLOCK_P"]
    plan = Plan(
        expand_stats_kernel, (tiles, cdiv(positions, chunk)), (positions, chunk),
        CI=ci, CO=co, READ=x.read, PRECISION=_precision(x.a), **tile,
    )  # fmt: skip
    plan.part_shape = cdiv(positions, chunk), 3, co
    return plan


def _stats_tile(ci: int, co: int, dtype: torch.dtype) -> dict:
    wide = dtype == torch.float32
    block_ci = block(ci, 16, 32 if wide else 64)
    block_p, block_co = (32, 128) if ci <= 128 and not wide else (64, 64)
    # Stages hold all channels of a tile: of float32 they would not fit.
    tile = {"BLOCK_P": block_p, "BLOCK_CO": block(co, 16, block_co), "BLOCK_CI": block_ci}
    return {**tile, "num_warps": 8 if wide else 4, "num_stages": 1 if wide else 3}


def gram_bwd(
    dy: Tensor,
    y: Tensor,
    w: Tensor,
    norm: Norm,
    record: Tensor,
    x: Operand,
    stride: int,
    needs_x: bool,
    kind: str | None = None,
) -> tuple[Tensor | None, tuple, Tensor, Tensor]:
    """(da, its partial sums, dW, sums [4, Co]) of y = relu(bn(W a) + ...) for the operand a, W [Co, Ci] packed.

    kind: that of the join when the operand is one, whose norms then get their partial sums; None for a plain operand.
    """
    n, co, *out = dy.shape
    ci = x.channels
    geometry = pointwise(stride)
    m, sum_g = conv_wgrad(Operand("masked", dy, y), x, geometry, totals=True)  # [Co * Ci], [Co]
    gram, sum_a = conv_wgrad(x, x, geometry, totals=True) if norm.training else (None, None)
    sums, dw = alloc((4, co), dy.device), alloc((co * ci,), dy.device)
    key = x.a.shape, dy.shape, dy.dtype, dy.device, x.read, stride, norm.training, needs_x, kind, _precision(dy)
    operands, products, dgrad = plan_for(("gram_bwd", *key), lambda: _gram_plans(dy, x, stride, norm.training, needs_x))
    centred = qw = wg = q = q_scale = c = None
    if norm.training:
        centred = alloc((operands.parts, ci, ci), dy.device, operands.dtype)
        if needs_x:
            qw, wg = alloc((operands.parts, ci, co), dy.device, operands.dtype), alloc((operands.blocks, ci), dy.device)
            q, q_scale = alloc((ci, ci), dy.device, dy.dtype), alloc((ci,), dy.device)
            c = alloc((products.q_tiles, ci), dy.device)
    operands(m, sum_g, gram, sum_a, w, record, sums, dw, centred, qw, wg)
    if norm.training:
        products(w, centred, qw, wg, sums, m, sum_g, sum_a, record, dw, q, q_scale, c)
    if not needs_x:
        return None, (None, None), dw, sums
    if norm.training and cuda_allowed(dy) and _cuda.gram_dgrad_why_not(x, dy) is None:
        scale = q_scale if dy.dtype == torch.float16 else None
        sums_of = kind not in (None, "C"), kind is not None and x.b is not None  # as join_parts
        return *_cuda.gram_dgrad(dy, y, record, taps_of(w)[:, 0], x, q, scale, c, *sums_of), dw, sums
    parts = (None, None) if kind is None else join_parts(x, kind, dgrad.rows)
    da = empty_ndhwc((n, ci, *out), dy)
    dgrad(dy, y, record, w, *x.args()[:4], q, q_scale, c, da, *parts)
    return da, parts, dw, sums


def _gram_plans(dy: Tensor, x: Operand, stride: int, training: bool, needs_x: bool) -> tuple[Plan, Plan, Plan]:
    """The launches of `gram_bwd`: gram_operands_kernel, gram_products_kernel, gram_dgrad_kernel."""
    co, ci, positions = dy.size(1), x.channels, dy.numel() // dy.size(1)
    parts = 2 if dy.dtype == torch.bfloat16 else 1
    scaled = dy.dtype == torch.float16
    precision = "tf32" if scaled else "ieee"
    tile = _operands_tile(ci)
    blocks = cdiv(co, tile["BLOCK_R"])
    operands = Plan(
        gram_operands_kernel, (blocks + training * cdiv(ci, tile["BLOCK_R"]),), (float(positions),),
        CI=ci, CO=co, PARTS=parts, **tile,
    )  # fmt: skip
    operands.blocks, operands.parts, operands.dtype = blocks, parts, torch.bfloat16 if parts > 1 else torch.float32
    tile = _products_tile(ci, dy.dtype)
    q_tiles = cdiv(ci, tile["BLOCK_M"])
    products = Plan(
        gram_products_kernel, ((needs_x * q_tiles + cdiv(co, tile["BLOCK_M"])) * cdiv(ci, tile["BLOCK_N"]),),
        (float(positions), ci, co), CI=ci, CO=co, PARTS=parts, PRECISION=precision, SCALED=scaled, WG_ROWS=blocks,
        **tile,
    )  # fmt: skip
    products.q_tiles = q_tiles
    tile = _gram_tile(positions, ci, dy.dtype)
    rows = cdiv(positions, tile["BLOCK_P"])
    dgrad = Plan(
        gram_dgrad_kernel, (rows * cdiv(ci, tile["BLOCK_CI"]),), (positions, *x.a.shape[2:], *dy.shape[2:]),
        CI=ci, CO=co, SH=stride, READ=x.read, PRECISION=_precision(dy), SCALED=scaled, C_PARTS=q_tiles, **tile,
    )  # fmt: skip
    dgrad.rows = rows
    return operands, products, dgrad


def _operands_tile(ci: int) -> dict:
    rows, warps = (16, 4) if ci <= 128 else (8, 4) if ci <= 256 else (16, 8)
    return {"BLOCK_R": rows, "BLOCK_K": block(ci, 16, 512), "num_warps": warps}


def _products_tile(ci: int, dtype: torch.dtype) -> dict:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": block(ci, 16, 64), "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if ci <= 256:
        return {"BLOCK_M": 64, "BLOCK_N": block(ci, 16, 32), "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}


def _gram_tile(positions: int, ci: int, dtype: torch.dtype) -> dict:
    wide = dtype == torch.float32
    block_p = 64 if positions >= 64 * 64 else 32
    block_ci, block_k = block(ci, 16, 64 if wide or block_p == 32 else 128), 32 if wide else 64
    return {"BLOCK_P": block_p, "BLOCK_CI": block_ci, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
