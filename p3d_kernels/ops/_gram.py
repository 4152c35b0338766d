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
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._norm import Norm
from ._conv import conv_wgrad, pointwise, sm_count, tap_row
from ._tape import Plan, alloc, cdiv, plan_for
from ._triton import Operand, block, empty_ndhwc, input_precision, read_operand, tl, triton
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
            z = tl.dot(a, w, z, input_precision=PRECISION)
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
            acc = tl.dot(a, q, acc, input_precision=PRECISION)
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
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
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
def gram_wgrad_kernel(
    m_ptr,  # [CO, CI] float32: g^T a
    sum_g,  # [CO]
    gram_ptr,  # [CI, CI] float32: a^T a; None when BN is frozen
    sum_a,  # [CI]
    w_ptr,  # [CO, CI]
    record,  # [5, CO]
    dw_ptr,  # [CO, CI] float32
    sums,  # [4, CO] rows (s q, s sum_g / P, dweight, dbias)
    P,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    co = tl.program_id(0) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    co_mask = co < CO
    scale = tl.load(record + CO + co, mask=co_mask, other=0.0)
    invstd = tl.load(record + 3 * CO + co, mask=co_mask, other=0.0)
    g = tl.load(sum_g + co, mask=co_mask, other=0.0)
    dot_mw = tl.zeros((BLOCK_CO,), tl.float32)
    for start in range(0, CI, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = co[:, None] * CI + k[None, :]
        mask = co_mask[:, None] & (k < CI)[None, :]
        m = tl.load(m_ptr + offsets, mask=mask, other=0.0)
        if gram_ptr is not None:  # about the mean of z = W a itself, not of z as rounded: g may be far from centred
            m -= g[:, None] * (tl.load(sum_a + k, mask=k < CI, other=0.0) / P)[None, :]
        dot_mw += tl.sum(m * tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 1)
    if gram_ptr is None:
        dot_mw -= tl.load(record + co, mask=co_mask, other=0.0) * g
    dweight = invstd * dot_mw
    q = dweight * invstd / P
    tl.store(sums + co, scale * q, mask=co_mask)
    tl.store(sums + CO + co, scale * g / P, mask=co_mask)
    tl.store(sums + 2 * CO + co, dweight, mask=co_mask)
    tl.store(sums + 3 * CO + co, g, mask=co_mask)

    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    j_mask = j < CI
    offsets = co[:, None] * CI + j[None, :]
    mask = co_mask[:, None] & j_mask[None, :]
    dw = tl.load(m_ptr + offsets, mask=mask, other=0.0)
    if gram_ptr is not None:  # W (S - sum_a sum_a^T / P), centred before the product
        a_j = tl.load(sum_a + j, mask=j_mask, other=0.0)
        wc = tl.zeros((BLOCK_CO, BLOCK_K), tl.float32)
        for start in range(0, CI, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_mask = k < CI
            a_k = tl.load(sum_a + k, mask=k_mask, other=0.0)
            c = tl.load(gram_ptr + k[:, None] * CI + j[None, :], mask=k_mask[:, None] & j_mask[None, :], other=0.0)
            c -= a_k[:, None] * (a_j / P)[None, :]
            w = tl.load(w_ptr + co[:, None] * CI + k[None, :], mask=co_mask[:, None] & k_mask[None, :], other=0.0)
            wc = tl.dot(w.to(tl.float32), c, wc, input_precision=PRECISION)
        dw -= g[:, None] * (a_j / P)[None, :] + q[:, None] * wc
    tl.store(dw_ptr + offsets, scale[:, None] * dw, mask=mask)


@triton.jit
def gram_q_kernel(
    w_ptr,  # [CO, CI]
    sums,  # [4, CO] of gram_wgrad_kernel
    sum_a,  # [CI]
    q_ptr,  # [CI, CI]: -Q / q_scale
    q_scale,  # [CI], written when SCALED: the most of each column, which keeps Q within float16
    c_ptr,  # [programs along k, CI]: c in parts
    P,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_CI: tl.constexpr,  # covers CI with SCALED
    BLOCK_J: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    j_mask = j < CI
    k = tl.program_id(1) * BLOCK_CI + tl.arange(0, BLOCK_CI)
    q = tl.zeros((BLOCK_CI, BLOCK_J), tl.float32)
    c = tl.zeros((BLOCK_J,), tl.float32)
    for start in range(0, CO, BLOCK_CO):
        co = start + tl.arange(0, BLOCK_CO)
        co_mask = co < CO
        w_j = tl.load(w_ptr + co[:, None] * CI + j[None, :], mask=co_mask[:, None] & j_mask[None, :], other=0.0)
        w_k = tl.load(w_ptr + co[None, :] * CI + k[:, None], mask=co_mask[None, :] & (k < CI)[:, None], other=0.0)
        w_j = w_j.to(tl.float32)
        c -= tl.sum(w_j * tl.load(sums + CO + co, mask=co_mask, other=0.0)[:, None], 0)
        w_j = -w_j * tl.load(sums + co, mask=co_mask, other=0.0)[:, None]
        q = tl.dot(w_k.to(tl.float32), w_j, q, input_precision=PRECISION)
    most = tl.full((BLOCK_J,), 1.0, tl.float32)
    if SCALED:
        most = tl.maximum(tl.max(tl.abs(q), 0), 1e-30)
    q = (q / most[None, :]).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + k[:, None] * CI + j[None, :], q, mask=(k < CI)[:, None] & j_mask[None, :])
    if tl.program_id(1) > 0:
        c = tl.zeros_like(c)
    mean_a = tl.load(sum_a + k, mask=k < CI, other=0.0) / P
    c -= most * tl.sum(mean_a[:, None] * q.to(tl.float32), 0)
    tl.store(c_ptr + tl.program_id(1) * CI + j, c, mask=j_mask)
    if SCALED:
        tl.store(q_scale + j, most, mask=j_mask)


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
    return {"BLOCK_P": block_p, "BLOCK_CO": block(co, 16, block_co), "BLOCK_CI": block_ci, "num_warps": 4}


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
    key = x.a.shape, dy.shape, dy.dtype, dy.device, x.read, stride, norm.training, kind
    wgrad, q_plan, dgrad = plan_for(("gram_bwd", *key), lambda: _gram_plans(dy, x, stride, kind))
    wgrad(m, sum_g, gram, sum_a, w, record, dw, sums)
    if not needs_x:
        return None, (None, None), dw, sums
    q = q_scale = c = None
    if norm.training:
        q = alloc((ci, ci), dy.device, dy.dtype)
        q_scale, c = alloc((ci,), dy.device), alloc((q_plan.grid[1], ci), dy.device)
        q_plan(w, sums, sum_a, q, q_scale, c)
    parts = (None, None) if kind is None else join_parts(x, kind, dgrad.rows)
    da = empty_ndhwc((n, ci, *out), dy)
    dgrad(dy, y, record, w, *x.args()[:4], q, q_scale, c, da, *parts)
    return da, parts, dw, sums


def _gram_plans(dy: Tensor, x: Operand, stride: int, kind: str | None) -> tuple[Plan, Plan, Plan]:
    """The launches of `gram_bwd`: gram_wgrad_kernel, gram_q_kernel, gram_dgrad_kernel."""
    co, ci, positions = dy.size(1), x.channels, dy.numel() // dy.size(1)
    wide = dy.dtype == torch.float32
    precision = "ieee" if wide else "tf32"  # of products of parameter size, whose results meet operands of dtype
    block_k = block(ci, 16, 64)
    wgrad = Plan(
        gram_wgrad_kernel, (cdiv(co, 32), cdiv(ci, block_k)), (float(positions),),
        CI=ci, CO=co, PRECISION=precision, BLOCK_CO=32, BLOCK_K=block_k,
    )  # fmt: skip
    scaled = dy.dtype == torch.float16
    q_tile = {"BLOCK_CI": block(ci, 16, 64), "BLOCK_J": block(ci, 16, 64), "BLOCK_CO": 64, "num_warps": 4}
    if scaled:  # a program sees whole columns
        q_tile = {"BLOCK_CI": block(ci, 16, 4096), "BLOCK_J": 16, "BLOCK_CO": 32, "num_warps": 8}
    q = Plan(
        gram_q_kernel, (cdiv(ci, q_tile["BLOCK_J"]), cdiv(ci, q_tile["BLOCK_CI"])), (float(positions),),
        CI=ci, CO=co, PRECISION=precision, SCALED=scaled, **q_tile,
    )  # fmt: skip
    tile = _gram_tile(positions, ci, dy.dtype)
    rows = cdiv(positions, tile["BLOCK_P"])
    dgrad = Plan(
        gram_dgrad_kernel, (rows * cdiv(ci, tile["BLOCK_CI"]),), (positions, *x.a.shape[2:], *dy.shape[2:]),
        CI=ci, CO=co, SH=stride, READ=x.read, PRECISION=_precision(dy), SCALED=scaled, C_PARTS=q.grid[1], **tile,
    )  # fmt: skip
    dgrad.rows = rows
    return wgrad, q, dgrad


def _gram_tile(positions: int, ci: int, dtype: torch.dtype) -> dict:
    wide = dtype == torch.float32
    block_p = 64 if positions >= 64 * 64 else 32
    block_ci, block_k = block(ci, 16, 64 if wide or block_p == 32 else 128), 32 if wide else 64
    return {"BLOCK_P": block_p, "BLOCK_CI": block_ci, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
