"""The kernels of the stem, max_pool(relu(bn(conv(x)))): conv 1x7x7 of stride (1, 2, 2); three forward, five backward.

Forward. The clip has 1 to 4 channels, so a convolution by channel blocks would multiply mostly zeros. Here the
contraction runs over a patch of pixels: one row of the left operand holds the 7 rows x (2 G + 6) columns x Ci channels
that G neighbouring outputs of one image row see (G = 2 for RGB: 10 columns, 30 of 32 slots in use), and the weight is
laid out for all G at once. The columns start one to the left of the window, at an even address. The patch is read
straight from the clip by its strides and cast on the way: no layout copy, no cast pass, no im2col in memory.
The kernel writes z raw, with partial statistics of the rounded values; the pool normalises as it reads (max_pool.py).
On Hopper, in half precision and with 64 channels out, z is not stored: the slope of the normalisation has the sign of
gamma, so a CUDA kernel pools z before its statistics are known (csrc/stem_fwd.cu), and what it took is normalised.

Backward. The pool sends the gradient of each window to one position, so the sums that batch normalisation needs,
sum g and sum g (z - mean), are sums over the pooled tensor. The weight gradient forms dz from g, the pool's bytes and z
as it reads them and multiplies it with the same patches; positions are walked by pooling cell (2 x 2 outputs), because
the parity of a position says how many windows cover it. On Hopper, in half precision and with 64 channels out, a CUDA
kernel does the same in tiles of two rows and forms z again (csrc/stem_wgrad.cu). The gradient of the clip reads z, too:
where it was not stored, it is formed once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import _cuda
from ._conv import cuda_allowed, sm_count
from ._triton import (
    Plan,
    affine,
    alloc,
    begin,
    block,
    bn_bwd_finalise,
    bn_finalise,
    cdiv,
    dependent_launch,
    dot,
    empty_ndhwc,
    input_precision,
    ndhwc,
    plan_for,
    relu,
    tl,
    triton,
)
from .max_pool import pool_fwd, pool_gradient

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _read_patch(x, base, h0, w0, kh0, H, W, sC, sH, sW, CI: tl.constexpr, COLS: tl.constexpr, KB: tl.constexpr,
                KH: tl.constexpr, LAST: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Pixels [rows, KH * KB] of image rows h0 + kh0 ... and columns w0 ... w0 + COLS, zero outside the image.

    LAST: the clip lies as [H, W, Ci] and a patch row is one run of memory; else k counts (channel, column).
    """
    kh = kh0 + tl.arange(0, KH)
    h = h0[:, None] + kh[None, :]
    row_mask = (h >= 0) & (h < H) & (kh < 7)[None, :]
    r = tl.arange(0, KB)
    if LAST:
        run = (w0 * CI)[:, None] + r[None, :]
        mask = (run >= 0) & (run < W * CI)
    else:
        c = r // COLS
        w = w0[:, None] + (r % COLS)[None, :]  # COLS and w0 are even, so pixels are read in pairs
        mask = (w >= 0) & (w < W) & (c < CI)[None, :]
        run = w0[:, None] * sW + (c * sC + r % COLS * sW)[None, :]
    at = (h * sH)[:, :, None] + run[:, None, :]
    patch = tl.load(x + base + at, mask=row_mask[:, :, None] & mask[:, None, :], other=0.0)
    return tl.reshape(patch.to(dtype), (h0.shape[0], KH * KB))


@triton.jit
def stem_pack_kernel(
    w,  # [Co, Ci, 7, 7]
    packed,  # [Co blocks, 8 * KB, G * BLOCK_C]
    Co,
    CI: tl.constexpr,
    G: tl.constexpr,
    KB: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    COLS: tl.constexpr = 2 * G + 6
    kh = tl.program_id(0)
    r = tl.arange(0, KB)[:, None]
    j = tl.arange(0, G * BLOCK_C)[None, :]
    co = tl.program_id(1) * BLOCK_C + j % BLOCK_C
    if LAST:
        c = r % CI
        column = r // CI
    else:
        c = r // COLS
        column = r % COLS
    kw = column - 1 - 2 * (j // BLOCK_C)
    mask = (kh < 7) & (c < CI) & (kw >= 0) & (kw < 7) & (co < Co)
    value = tl.load(w + ((co * CI + c) * 7 + kh) * 7 + kw, mask=mask, other=0.0)
    row = (tl.program_id(1) * 8 + kh) * KB + r
    tl.store(packed + row * (G * BLOCK_C) + j, value.to(packed.dtype.element_ty))


@triton.jit
def stem_conv_kernel(
    x,  # [N, Ci, T, H, W], any strides
    packed,  # [Co blocks, 8 * KB, G * BLOCK_C]
    record,  # [5, Co] or None: write relu(bn(z)) instead of z
    z,  # [N, T, Ho, Wo, Co]
    part,  # [programs * G, 3, Co] or None: statistics of z
    frames,  # N T
    T,
    H,
    W,
    Ho,
    Wo,
    sN,
    sC,
    sT,
    sH,
    sW,
    Co: tl.constexpr,
    CI: tl.constexpr,
    G: tl.constexpr,
    KB: tl.constexpr,
    LAST: tl.constexpr,
    RESIDENT: tl.constexpr,  # the weight stays on chip and one product takes the whole patch; else one image row each
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,  # in groups of G outputs
    BLOCK_C: tl.constexpr,
):
    COLS: tl.constexpr = 2 * G + 6
    J: tl.constexpr = G * BLOCK_C
    dtype: tl.constexpr = z.dtype.element_ty
    k = tl.arange(0, 8 * KB)
    j = tl.arange(0, J)
    co = tl.program_id(1) * BLOCK_C + j % BLOCK_C
    co_mask = co < Co
    packed += tl.program_id(1) * 8 * KB * J
    if RESIDENT:
        weight = tl.load(packed + k[:, None] * J + j[None, :])

    BLOCK_P: tl.constexpr = BLOCK_H * BLOCK_W
    tiles_w = tl.cdiv(Wo, G * BLOCK_W)
    tiles = tl.cdiv(Ho, BLOCK_H) * tiles_w  # of one frame
    p = tl.arange(0, BLOCK_P)
    first = tl.program_id(0)
    pivot = tl.zeros((J,), tl.float32)
    s1 = tl.zeros((BLOCK_P // 16, 8, J), tl.float32)
    s2 = tl.zeros((BLOCK_P // 16, 8, J), tl.float32)
    count = tl.zeros((BLOCK_P, G), tl.int32)
    for tile in range(first, frames * tiles, tl.num_programs(0)):
        frame = tile // tiles
        ho = tile % tiles // tiles_w * BLOCK_H + p // BLOCK_W
        wo = (tile % tiles_w * BLOCK_W + p % BLOCK_W) * G
        h, w = 2 * ho - 3, 2 * wo - 4
        base = (frame // T).to(tl.int64) * sN + (frame % T).to(tl.int64) * sT
        if RESIDENT:
            acc = tl.dot(_read_patch(x, base, h, w, 0, H, W, sC, sH, sW, CI, COLS, KB, 8, LAST, dtype), weight)
        else:
            acc = tl.zeros((BLOCK_P, J), tl.float32)
            for kh in range(7):
                patch = _read_patch(x, base, h, w, kh, H, W, sC, sH, sW, CI, COLS, KB, 1, LAST, dtype)
                row = packed + (kh * KB + tl.arange(0, KB))[:, None] * J + j[None, :]
                acc = dot(patch, tl.load(row), acc, PRECISION)

        ok = ho < Ho
        valid = ok[:, None] & (wo[:, None] + (j // BLOCK_C)[None, :] < Wo) & co_mask[None, :]
        if record is not None:
            acc = relu(affine(acc, record, co, co_mask, Co))
        value = acc.to(dtype)
        at = (ho * Wo + wo)[:, None] * Co + ((j // BLOCK_C) * Co + co)[None, :]
        tl.store(z + frame.to(tl.int64) * Ho * Wo * Co + at, value, mask=valid)
        if part is not None:
            # Sums about the mean of the program's first tile: that tile is part of the sample, so with n tiles a
            # program (about 100) its distance from the mean is at most sqrt(n) standard deviations.
            seen = value.to(tl.float32)
            if tile == first:
                pivot = tl.sum(tl.where(valid, seen, 0.0), 0) / tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
            d = tl.where(valid, seen - pivot[None, :], 0.0)
            d = tl.reshape(d, (BLOCK_P // 16, 2, 8, J))  # rows r and r + 8 are one thread's: no exchange in the loop
            s1 += tl.sum(d, 1)
            s2 += tl.sum(d * d, 1)
            count += (ok[:, None] & (wo[:, None] + tl.arange(0, G)[None, :] < Wo)).to(tl.int32)

    if part is not None:
        n = tl.reshape(tl.broadcast_to(tl.sum(count, 0).to(tl.float32)[:, None], (G, BLOCK_C)), (J,))
        sum1 = tl.sum(tl.sum(s1, 0), 0)
        d = sum1 / tl.maximum(n, 1.0)
        row = part + (first * G + j // BLOCK_C).to(tl.int64) * 3 * Co + co
        tl.store(row, n, mask=co_mask)
        tl.store(row + Co, pivot + d, mask=co_mask)
        tl.store(row + 2 * Co, tl.maximum(tl.sum(tl.sum(s2, 0), 0) - sum1 * d, 0.0), mask=co_mask)


@triton.jit
def stem_sums_kernel(
    g,  # [P, Co], gradient of the pooled output
    winner,  # [P, Co], z where the pool took it
    record,  # [5, Co]
    part,  # [programs, 2, Co]: sum g and sum g (z - mean), g masked by the ReLU, over SHARE positions each
    P,
    SHARE,
    Co: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < Co
    begin(PDL)
    first = tl.program_id(0) * SHARE
    end = tl.minimum(P - first, SHARE)
    g += first.to(tl.int64) * Co
    winner += first.to(tl.int64) * Co
    mean = tl.load(record + c, mask=c_mask, other=0.0)[None, :]
    sum_g = tl.zeros((16, BLOCK_C), tl.float32)
    sum_gz = tl.zeros((16, BLOCK_C), tl.float32)
    for start in range(0, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & c_mask[None, :]
        offsets = (p.to(tl.int64) * Co)[:, None] + c[None, :]
        value = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(winner + offsets, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(affine(z, record, c, c_mask, Co) <= 0, 0.0, value)
        centred = tl.where(mask, value * (z - mean), 0.0)
        # rows r, r + 16, ... are one thread's: no exchange in the loop
        sum_g += tl.sum(tl.reshape(value, (BLOCK_P // 16, 16, BLOCK_C)), 0)
        sum_gz += tl.sum(tl.reshape(centred, (BLOCK_P // 16, 16, BLOCK_C)), 0)
    row = part + tl.program_id(0).to(tl.int64) * 2 * Co + c
    tl.store(row, tl.sum(sum_g, 0), mask=c_mask)
    tl.store(row + Co, tl.sum(sum_gz, 0), mask=c_mask)


@triton.jit
def _read_dz(g, tap_of, z, mean, c0, c1, n, t, ho, wo, ok, c, T, Ho, Wo, Tp, Hp, Wp, Co: tl.constexpr,
             PAD: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr):  # fmt: skip
    """dz / scale at positions (n, t, ho, wo): g as the pool routes it, less what the batch statistics take away."""
    offsets = ((((n * T + t).to(tl.int64) * Ho + ho) * Wo + wo) * Co)[:, None] + c[None, :]
    u = tl.load(z + offsets, mask=ok, other=0.0).to(tl.float32)
    v = pool_gradient(g, tap_of, n, t, ho + PAD, wo + PAD, ok, c, Tp, Hp, Wp, Co, 2, 3, 3, 2, 2, 2, 1, NH, NW, True)
    return tl.where(ok, v - c0[None, :] - (u - mean[None, :]) * c1[None, :], 0.0)


@triton.jit
def stem_wgrad_kernel(
    x,  # [N, Ci, T, H, W], any strides
    g,  # [N, Tp, Hp, Wp, Co]
    tap_of,  # uint8, like g
    z,  # [N, T, Ho, Wo, Co]
    record,  # [5, Co]
    sums,  # [4, Co]
    part,  # [programs, G, 8 * KB, Co]
    N,
    T,
    H,
    W,
    Ho,
    Wo,
    Tp,
    Hp,
    Wp,
    sN,
    sC,
    sT,
    sH,
    sW,
    Co: tl.constexpr,
    CI: tl.constexpr,
    G: tl.constexpr,
    KB: tl.constexpr,
    LAST: tl.constexpr,
    PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,  # in cells of 2 x 2 positions
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    COLS: tl.constexpr = 2 * G + 6
    dtype: tl.constexpr = z.dtype.element_ty
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < Co
    mean = tl.load(record + c, mask=c_mask, other=0.0)
    c0 = tl.load(sums + c, mask=c_mask, other=0.0)
    c1 = tl.load(sums + Co + c, mask=c_mask, other=0.0)
    left = tl.zeros((8 * KB, BLOCK_C), tl.float32)  # of positions in the even column of their cell
    right = tl.zeros((8 * KB, BLOCK_C), tl.float32)
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    tiles_w = tl.cdiv(Wo, 2 * BLOCK_W)
    tiles = tl.cdiv(Ho, 2 * BLOCK_H) * tiles_w  # of one frame
    for tile in range(tl.program_id(0), N * T * tiles, tl.num_programs(0)):
        frame = tile // tiles
        n = tl.zeros_like(p) + frame // T
        t = tl.zeros_like(p) + frame % T
        base = (frame // T).to(tl.int64) * sN + (frame % T).to(tl.int64) * sT
        for dh in tl.static_range(2):
            ho = 2 * (tile % tiles // tiles_w * BLOCK_H + p // BLOCK_W) + dh
            for dw in tl.static_range(2):
                wo = 2 * (tile % tiles_w * BLOCK_W + p % BLOCK_W) + dw
                if dw == 0 or G == 1:
                    patch = _read_patch(x, base, 2 * ho - 3, 2 * wo - 4, 0, H, W, sC, sH, sW,
                                        CI, COLS, KB, 8, LAST, dtype)  # fmt: skip
                ok = ((ho < Ho) & (wo < Wo))[:, None] & c_mask[None, :]
                # windows of 3, two apart: two cover an even padded position, one an odd
                dz = _read_dz(g, tap_of, z, mean, c0, c1, n, t, ho, wo, ok, c, T, Ho, Wo, Tp, Hp, Wp,
                              Co, PAD, 2 - (dh + PAD) % 2, 2 - (dw + PAD) % 2)  # fmt: skip
                if dw == 0 or G == 1:
                    left = dot(tl.trans(patch), dz.to(dtype), left, PRECISION)
                else:
                    right = dot(tl.trans(patch), dz.to(dtype), right, PRECISION)
    k = tl.arange(0, 8 * KB)
    row = part + tl.program_id(0).to(tl.int64) * G * 8 * KB * Co + k[:, None] * Co + c[None, :]
    tl.store(row, left, mask=c_mask[None, :])
    if G == 2:
        tl.store(row + 8 * KB * Co, right, mask=c_mask[None, :])


@triton.jit
def stem_wgrad_reduce_kernel(
    part,  # [R, G, 8 * KB, Co]
    record,  # [5, Co]
    dw,  # [Co, Ci, 7, 7]
    R,
    Co: tl.constexpr,
    CI: tl.constexpr,
    G: tl.constexpr,
    KB: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    COLS: tl.constexpr = 2 * G + 6
    begin(PDL)
    tap = tl.program_id(0)  # one of [Ci, 7, 7]: couts lie side by side
    co = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = co < Co
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for half in tl.static_range(G):
        column = tap % 7 + 1 + 2 * half
        if LAST:
            k = tap // 7 % 7 * KB + column * CI + tap // 49
        else:
            k = tap // 7 % 7 * KB + tap // 49 * COLS + column
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            offsets = ((r.to(tl.int64) * G + half) * (8 * KB * Co))[:, None] + (k * Co + co)[None, :]
            total += tl.load(part + offsets, mask=(r < R)[:, None] & mask[None, :], other=0.0)
    scale = tl.load(record + Co + co, mask=mask, other=0.0)
    tl.store(dw + co * (CI * 49) + tap, tl.sum(total, 0) * scale, mask=mask)


@triton.jit
def stem_dz_kernel(
    g,  # [N, Tp, Hp, Wp, Co]
    tap_of,  # uint8, like g
    z,  # [N, T, Ho, Wo, Co]
    record,  # [5, Co]
    sums,  # [4, Co]
    dz,  # like z
    P,  # N T Ho Wo
    T,
    Ho,
    Wo,
    Tp,
    Hp,
    Wp,
    Co: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < Co
    ok = (p < P)[:, None] & c_mask[None, :]
    mean = tl.load(record + c, mask=c_mask, other=0.0)
    scale = tl.load(record + Co + c, mask=c_mask, other=0.0)
    c0 = tl.load(sums + c, mask=c_mask, other=0.0)
    c1 = tl.load(sums + Co + c, mask=c_mask, other=0.0)
    value = _read_dz(g, tap_of, z, mean, c0, c1, p // Wo // Ho // T, p // Wo // Ho % T, p // Wo % Ho, p % Wo, ok, c,
                     T, Ho, Wo, Tp, Hp, Wp, Co, PAD, 2, 2)  # fmt: skip
    at = dz + (p.to(tl.int64) * Co)[:, None] + c[None, :]
    tl.store(at, (value * scale[None, :]).to(dz.dtype.element_ty), mask=ok)


@triton.jit
def stem_dgrad_kernel(
    dz,  # [N, T, Ho, Wo, Co]
    w,  # [Co, Ci, 7, 7]
    dx,  # [N, T, H, W, Ci]
    P,  # N T ceil(H / 2) ceil(W / 2)
    H,
    W,
    Ho,
    Wo,
    Co: tl.constexpr,
    CI: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Pixels of one parity see the same taps: dx[h] = sum over kh = h + 1 (mod 2) of w[kh] dz[(h + 3 - kh) / 2].
    dh = tl.program_id(1) // 2
    dw = tl.program_id(1) % 2
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    half_h, half_w = (H + 1) // 2, (W + 1) // 2
    w_in = p % half_w * 2 + dw
    h_in = p // half_w % half_h * 2 + dh
    frame = (p // half_w // half_h).to(tl.int64)
    ci = tl.arange(0, 16)
    ok = (p < P) & (h_in < H) & (w_in < W)
    acc = tl.zeros((BLOCK_P, 16), tl.float32)
    for first in range(0, Co, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        for tap in range(16):
            kh = tap // 4 * 2 + 1 - dh
            kw = tap % 4 * 2 + 1 - dw
            ho = (h_in + 3 - kh) // 2
            wo = (w_in + 3 - kw) // 2
            seen = ok & (kh < 7) & (kw < 7) & (h_in + 3 >= kh) & (ho < Ho) & (w_in + 3 >= kw) & (wo < Wo)
            at = (((frame * Ho + ho) * Wo + wo) * Co)[:, None] + c[None, :]
            gradient = tl.load(dz + at, mask=seen[:, None] & (c < Co)[None, :], other=0.0)
            at = w + ((c[:, None] * CI + ci[None, :]) * 7 + kh) * 7 + kw
            taps = tl.load(at, mask=(c < Co)[:, None] & (ci < CI)[None, :] & (kh < 7) & (kw < 7), other=0.0)
            acc = dot(gradient, taps.to(gradient.dtype), acc, PRECISION)
    row = ((frame * H + h_in) * W + w_in) * CI
    tl.store(dx + row[:, None] + ci[None, :], acc.to(dx.dtype.element_ty), mask=ok[:, None] & (ci < CI)[None, :])


# --- launchers -------------------------------------------------------------------------------------------------------


def _packing(ci: int, co: int) -> dict:
    """How patches are packed: outputs a row, slots a patch row (a power of two, at least 16), channels a program."""
    group = 2 if 10 * ci <= 32 else 1
    return {"CI": ci, "G": group, "KB": block((2 * group + 6) * ci, 16, 64), "BLOCK_C": block(co, 16, 64)}


def _pad(wiring: str) -> int:
    return reference.stem_pool(wiring)["padding"][1]


def channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(4) == x.size(1)


def _clip_key(x: Tensor) -> tuple:
    """All that a kernel which reads the clip by its strides is specialised on."""
    return x.shape, x.stride(), x.data_ptr() & 15 == 0, x.dtype, x.device


def stem_pack(w: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    """w [Co, Ci, 1, 7, 7] laid out for `stem_conv_kernel`: [Co blocks, 8 * KB, G * BLOCK_C]."""
    co, ci = w.shape[:2]
    how = _packing(ci, co)
    blocks = cdiv(co, how["BLOCK_C"])
    w = w.detach().contiguous()
    packed = alloc((blocks, 8 * how["KB"], how["G"] * how["BLOCK_C"]), w.device, dtype)
    plan = plan_for(
        (stem_pack_kernel, w.shape, w.dtype, w.data_ptr() & 15 == 0, w.device, dtype, last),
        lambda: Plan(stem_pack_kernel, (8, blocks), (co,), **how, LAST=last, num_warps=8),
    )
    plan(w, packed)
    return packed


def stem_conv(x: Tensor, packed: Tensor, co: int, record: Tensor | None, stats: bool) -> tuple[Tensor, Tensor | None]:
    """(z or relu(bn(z)), partial statistics or None)."""
    precision = input_precision(packed.dtype, x.device)
    plan = plan_for(
        (stem_conv_kernel, _clip_key(x), packed.dtype, co, precision, record is not None, stats),
        lambda: _conv_plan(x, packed, co, precision),
    )
    z = alloc(plan.shape, x.device, packed.dtype)
    part = alloc((plan.rows, 3, co), x.device) if stats else None
    plan(x.detach(), packed, record, z, part)
    return z, part


def _conv_plan(x: Tensor, packed: Tensor, co: int, precision: str) -> Plan:
    n, ci, t, h, w = x.shape
    how = _packing(ci, co)
    half = packed.dtype != torch.float32
    tile = {"BLOCK_H": 4, "BLOCK_W": 8, "num_warps": 4, "num_stages": 1}
    if half:  # 128 registers: two programs fit a multiprocessor, and one loads while the other multiplies
        tile = {"BLOCK_H": 8, "BLOCK_W": 8, "num_warps": 8, "num_stages": 1, "maxnreg": 128}
    ho, wo = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    tiles = n * t * cdiv(ho, tile["BLOCK_H"]) * cdiv(wo, how["G"] * tile["BLOCK_W"])
    programs = min(tiles, 2 * sm_count(x.device))
    plan = Plan(
        stem_conv_kernel, (programs, packed.size(0)), (n * t, t, h, w, ho, wo, *x.stride()), Co=co, **how,
        LAST=channels_last(x), RESIDENT=half, PRECISION=precision, **tile,
    )  # fmt: skip
    plan.shape, plan.rows = (n, co, t, ho, wo), programs * how["G"]
    return plan


def pools_raw(x: Tensor, w: Tensor, gamma: Tensor | None, dtype: torch.dtype, wiring: str) -> bool:
    """Whether the CUDA kernel takes this stem in training: the one that does not store z."""
    return cuda_allowed(x.new_empty(0, dtype=dtype)) and _cuda.stem_fwd_why_not(x, w, gamma, dtype, wiring) is None


def _raw_conv(x: Tensor, w: Tensor, dtype: torch.dtype, stats: bool) -> tuple[Tensor, Tensor | None]:
    """(z, partial statistics or None)."""
    return stem_conv(x, stem_pack(w, dtype, channels_last(x)), w.size(0), None, stats)


def stem_fwd(x, w, norm, wiring, dtype, save):
    """(y, record, z, taps, winners); the last three None unless `save`, z also where it was not stored."""
    co, pool = w.size(0), reference.stem_pool(wiring)
    if not norm.training and not save:
        record = bn_finalise(norm, co, None, x.device)
        a, _ = stem_conv(x, stem_pack(w, dtype, channels_last(x)), co, record, False)
        return pool_fwd(a, **pool)[0], record, None, None, None
    if pools_raw(x, w, norm.weight, dtype, wiring):
        gamma = None if norm.weight is None else norm.weight.detach().contiguous()
        weight = w.detach().contiguous()
        pooled, tap, part = _cuda.stem_fwd(x.detach(), weight, gamma, dtype, wiring, norm.training, save)
        record = bn_finalise(norm, co, part, x.device)
        y = _cuda.stem_relu(pooled, record, tap, x.detach(), weight, gamma, wiring)
        return y, record, None, tap, pooled if save else None
    z, part = _raw_conv(x, w, dtype, norm.training)
    record = bn_finalise(norm, co, part, x.device)
    y, tap, winner = pool_fwd(z, **pool, record=record, save_tap=save, save_winner=save)
    return y, record, z if save else None, tap, winner


def stem_bwd(g, x, w, z, record, tap, winner, training, wiring, need_dx, need_dw):
    """(dx or None, dw or None, sums [4, Co]): dw [w.numel()] float32; of sums, dweight and dbias are the last rows.

    z may be None.
    """
    g, w = ndhwc(g), w.contiguous()
    co, positions = g.size(1), g.numel() // g.size(1)
    precision = input_precision(winner.dtype, x.device)
    key = stem_sums_kernel, positions, co, g.dtype, g.device
    plan = plan_for(key, lambda: _sums_plan(positions, co, g.device))
    part = alloc((plan.rows, 2, co), x.device)
    plan(g, winner, record, part)
    n, _, t, height, width = x.shape
    sums = bn_bwd_finalise(part, record, n * t * ((height + 1) // 2) * ((width + 1) // 2), training)

    dx = dw = None
    in_cuda = cuda_allowed(winner) and _cuda.stem_wgrad_why_not(x, w, winner.dtype, wiring) is None
    if z is None and (need_dx or need_dw and not in_cuda):
        z, _ = _raw_conv(x, w, winner.dtype, False)
    if need_dw:
        dw = _wgrad(g, x, w, z, record, tap, sums, wiring, precision, in_cuda)
    if need_dx:
        key = w.dtype, w.data_ptr() & 15 == 0, wiring, precision
        normalise, dgrad = plan_for(
            (stem_dgrad_kernel, x.shape, x.dtype, x.device, co, z.dtype, *key),
            lambda: _dgrad_plans(x, g, z, wiring, precision),
        )
        dz, dx = empty_ndhwc(z.shape, z), empty_ndhwc(x.shape, x)
        normalise(g, tap, z, record, sums, dz)
        dgrad(dz, w, dx)
    return dx, dw, sums


def _wgrad(g, x, w, z, record, tap, sums, wiring, precision, in_cuda) -> Tensor:
    """dw [w.numel()], float32: the CUDA kernel's sums, which takes no z, or the Triton kernel's."""
    co, ci = w.shape[:2]
    if in_cuda:
        part = _cuda.stem_wgrad(x, g, tap, w, record, sums, wiring)
        key = stem_wgrad_reduce_kernel, part.shape, part.device
        reduce = plan_for(key, lambda: _reduce_plan(part.size(0), co, part.device, CI=ci, G=1, KB=8 * ci, LAST=False))
    else:
        wgrad, reduce = plan_for(
            (stem_wgrad_kernel, _clip_key(x), co, z.dtype, wiring, precision),
            lambda: _wgrad_plans(x, g, z, wiring, precision),
        )
        part = alloc(wgrad.part_shape, x.device)
        wgrad(x, g, tap, z, record, sums, part)
    dw = alloc((w.numel(),), w.device)
    reduce(part, record, dw)
    return dw


def _reduce_plan(rows: int, co: int, device: torch.device, **packing) -> Plan:
    tile = {"BLOCK_R": 64, "BLOCK_C": 16, "num_warps": 4}
    grid = packing["CI"] * 49, cdiv(co, tile["BLOCK_C"])
    return Plan(stem_wgrad_reduce_kernel, grid, (rows,), Co=co, **packing, **dependent_launch(device), **tile)


def _sums_plan(positions: int, co: int, device: torch.device) -> Plan:
    tile = {"BLOCK_P": 64, "BLOCK_C": block(co, 16, 64), "num_warps": 4}
    columns = cdiv(co, tile["BLOCK_C"])
    share = cdiv(positions, min(cdiv(positions, tile["BLOCK_P"]), cdiv(5 * sm_count(device), columns)))
    plan = Plan(
        stem_sums_kernel, (cdiv(positions, share), columns), (positions, share), Co=co, **dependent_launch(device),
        **tile,
    )  # fmt: skip
    plan.rows = plan.grid[0]
    return plan


def _wgrad_plans(x: Tensor, g: Tensor, z: Tensor, wiring: str, precision: str) -> tuple[Plan, Plan]:
    n, ci, t, h, w = x.shape
    co, ho, wo = z.size(1), *z.shape[3:]
    how = _packing(ci, co)
    packing = {"CI": ci, "G": how["G"], "KB": how["KB"], "LAST": channels_last(x)}
    tile = {"BLOCK_H": 4 if z.dtype != torch.float32 else 2, "BLOCK_W": 8, "num_warps": 8, "num_stages": 1}
    tiles = n * t * cdiv(ho, 2 * tile["BLOCK_H"]) * cdiv(wo, 2 * tile["BLOCK_W"])
    programs = min(tiles, sm_count(x.device))
    wgrad = Plan(
        stem_wgrad_kernel, (programs, cdiv(co, how["BLOCK_C"])), (n, t, h, w, ho, wo, *g.shape[2:], *x.stride()),
        Co=co, **packing, PAD=_pad(wiring), PRECISION=precision, **tile, BLOCK_C=how["BLOCK_C"],
    )  # fmt: skip
    wgrad.part_shape = programs, how["G"], 8 * how["KB"], co
    return wgrad, _reduce_plan(programs, co, x.device, **packing)


def _dgrad_plans(x: Tensor, g: Tensor, z: Tensor, wiring: str, precision: str) -> tuple[Plan, Plan]:
    n, ci, t, h, w = x.shape
    co, ho, wo = z.size(1), *z.shape[3:]
    block_c = block(co, 16, 64)
    positions = n * t * ho * wo
    normalise = Plan(
        stem_dz_kernel, (cdiv(positions, 32), cdiv(co, block_c)), (positions, t, ho, wo, *g.shape[2:]), Co=co,
        PAD=_pad(wiring), BLOCK_P=32, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    pixels = n * t * cdiv(h, 2) * cdiv(w, 2)
    dgrad = Plan(
        stem_dgrad_kernel, (cdiv(pixels, 128), 4), (pixels, h, w, ho, wo), Co=co, CI=ci, PRECISION=precision,
        BLOCK_P=128, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return normalise, dgrad
