"""The convolution over taps: one pair of Triton kernels for 1x3x3, 3x1x1 and 1x1x1, forward and backward.

A convolution is a matrix product over taps: output positions on the rows, output channels on the columns, input
channels of each tap along the sum. The *prologue* is how the operand is read (`Operand`), the *epilogue* is what
happens to a tile before it is stored (`Epilogue`): BN, ReLU, residual, statistics, or the sums that the layer below
needs in its backward. No tensor has a pass of its own for these.

    fwd    y[p, co]       = sum_{tap, ci} x[p * stride + tap, ci] w[co, tap, ci]
    dgrad  dx[p, ci]      = sum_{tap, co} dy[(p - tap) / stride, co] w[co, tap, ci]     where stride divides p - tap
    wgrad  dw[co, tap, ci] = sum_p dy[p, co] x[p * stride + tap, ci]

`spatial_fwd`, `spatial_dgrad` and `spatial_wgrad` are 1x3x3 on the CUDA kernels where these fit; `conv` has one for
inference and three for 1x1x1 and 3x1x1 in training, `conv_wgrad` one for 1x1x1 and 3x1x1, and `conv_wgrads` one for
several weight gradients at once, of raw operands. `spatial_wgrad` leaves what it reads of the gradient
(`spatial_finished`) for `spatial_dgrad`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends
from . import _cuda
from ._tape import Plan, alloc, cdiv, once_a_pass, plan_for
from ._triton import (
    Operand,
    Splits,
    affine,
    begin,
    block,
    dependent_launch,
    dot,
    empty_ndhwc,
    input_precision,
    read_operand,
    relu,
    tl,
    to_tf32,
    triton,
    write_stats,
    write_sums,
)

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def tap_row(n, t, h, w, kt, kh, kw, T, H, W, KT, KH, KW, ST, SH, TRANSPOSED: tl.constexpr):
    """(row, exists) of the input position that tap (kt, kh, kw) of output position (n, t, h, w) reads."""
    if TRANSPOSED:
        t = t + KT // 2 - kt
        h = h + KH // 2 - kh
        w = w + KW // 2 - kw
        exists = (t >= 0) & (h >= 0) & (w >= 0) & (t % ST == 0) & (h % SH == 0) & (w % SH == 0)
        t = t // ST
        h = h // SH
        w = w // SH
    else:
        t = t * ST + kt - KT // 2
        h = h * SH + kh - KH // 2
        w = w * SH + kw - KW // 2
        exists = (t >= 0) & (h >= 0) & (w >= 0)
    exists = exists & (t < T) & (h < H) & (w < W)
    return ((n * T + t) * H + h) * W + w, exists


@triton.jit
def prefetch_rows(ptr, rows, first, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """Into the second-level cache: COUNT elements of 16 bits from `first` on, of rows of LENGTH elements."""
    LINES: tl.constexpr = (COUNT + 63) // 64
    BLOCK: tl.constexpr = triton.next_power_of_2(LINES)
    at = tl.minimum(first + tl.minimum(tl.arange(0, BLOCK), LINES - 1) * 64, LENGTH - 1)
    address = (ptr + rows[:, None] * LENGTH + at[None, :]).to(tl.int64)
    asm: tl.constexpr = "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }"
    tl.inline_asm_elementwise(asm, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["P", "T", "H", "W", "To", "Ho", "Wo"])
def conv_kernel(
    a_ptr,  # operand: [N, T, H, W, CI]
    b_ptr,
    record_a,
    record_b,
    sums,
    w_ptr,  # [CO, taps, CI], or [CI, taps, CO] when TRANSPOSED
    y_ptr,  # [N, To, Ho, Wo, CO], or None: not stored
    y_record,  # [5, CO] or None: normalises the result
    y_mask,  # like y, which is zero unless this is positive; or None
    o_ptr,  # like y, joined to it as JOIN says; its grid: see SO
    o_mask,  # like o, which counts where this is positive
    part,  # statistics [R, 3, CO] of y, or, with z, sums [R, 2, CO] of the layer below; or None
    z_ptr,  # like y: raw output of the layer below
    z_record,  # [5, CO]
    shares,  # [tiles, SPLITS, BLOCK_P, BLOCK_CO] float32, or None: SPLITS == 1
    arrived,  # [tiles] int32, zero before and after
    P,
    T,
    H,
    W,
    To,
    Ho,
    Wo,
    CI: tl.constexpr,
    CO: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    READ: tl.constexpr,
    JOIN: tl.constexpr,
    SO: tl.constexpr,  # y lies at every SO-th row and column of o; TRANSPOSED, o at those of y
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,  # weights into the second-level cache while the kernel before still runs
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
):
    TAPS: tl.constexpr = KT * KH * KW
    CHUNKS: tl.constexpr = (CI + BLOCK_CI - 1) // BLOCK_CI
    SHARE: tl.constexpr = (TAPS * CHUNKS + SPLITS - 1) // SPLITS
    CO_TILES: tl.constexpr = (CO + BLOCK_CO - 1) // BLOCK_CO
    tile = tl.program_id(0) // CO_TILES
    co = (tl.program_id(0) % CO_TILES) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    co_mask = co < CO
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    p_mask = p < P
    w_o = p % Wo
    h_o = p // Wo % Ho
    t_o = p // (Wo * Ho) % To
    n = p // (Wo * Ho * To)

    first, end = 0, TAPS * CHUNKS
    if SPLITS > 1:
        first = tl.program_id(1) * SHARE
        end = tl.minimum(first + SHARE, end)
    if PREFETCH and tile == 0:
        prefetch_rows(w_ptr, tl.minimum(co, CO - 1), first * BLOCK_CI, TAPS * CI, SHARE * BLOCK_CI)
    begin(PDL)
    acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    for step in range(first, end):
        tap = step // CHUNKS
        ci = (step % CHUNKS) * BLOCK_CI + tl.arange(0, BLOCK_CI)
        ci_mask = ci < CI
        kt = tap // (KH * KW)
        kh = tap // KW % KH
        kw = tap % KW
        if TAPS == 1 and ST == 1 and SH == 1:
            row, exists = p, p_mask
        else:
            row, exists = tap_row(n, t_o, h_o, w_o, kt, kh, kw, T, H, W, KT, KH, KW, ST, SH, TRANSPOSED)
            exists = exists & p_mask
        offsets = row.to(tl.int64)[:, None] * CI + ci[None, :]
        x = read_operand(
            a_ptr, b_ptr, record_a, record_b, sums, offsets, exists[:, None] & ci_mask[None, :], ci, ci_mask, CI, READ
        )
        if TRANSPOSED:
            w_offsets = ci[:, None] * (TAPS * CO) + tap * CO + co[None, :]
        else:
            w_offsets = co[None, :] * (TAPS * CI) + tap * CI + ci[:, None]
        w = tl.load(w_ptr + w_offsets, mask=ci_mask[:, None] & co_mask[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)

    if SPLITS > 1:
        cell = tl.arange(0, BLOCK_P)[:, None] * BLOCK_CO + tl.arange(0, BLOCK_CO)[None, :]
        cell += tl.program_id(0) * (SPLITS * BLOCK_P * BLOCK_CO)
        tl.store(shares + cell + tl.program_id(1) * (BLOCK_P * BLOCK_CO), acc)
        tl.debug_barrier()  # the share is written by all threads, and one of them tells so
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(arrived + tl.program_id(0), 0)
        acc = tl.load(shares + cell, cache_modifier=".cg")  # in the order of the sum, whoever came last
        for split in tl.static_range(1, SPLITS):
            acc += tl.load(shares + cell + split * (BLOCK_P * BLOCK_CO), cache_modifier=".cg")

    mask = p_mask[:, None] & co_mask[None, :]
    offsets = p.to(tl.int64)[:, None] * CO + co[None, :]
    if y_record is not None:
        acc = affine(acc, y_record, co, co_mask, CO)
    if JOIN == "relu":
        acc = relu(acc)
    elif JOIN != "none":
        o_offsets, o_there = offsets, mask
        if SO != 1:
            if TRANSPOSED:
                row, exists = tap_row(n, t_o, h_o, w_o, 0, 0, 0, To, (Ho - 1) // SO + 1, (Wo - 1) // SO + 1, 1, 1, 1, 1,
                                      SO, True)  # fmt: skip
                o_there = mask & exists[:, None]
            else:
                row = ((n * To + t_o) * H + h_o * SO) * W + w_o * SO
            o_offsets = row.to(tl.int64)[:, None] * CO + co[None, :]
        o = tl.load(o_ptr + o_offsets, mask=o_there, other=0.0).to(tl.float32)
        if o_mask is not None:
            o = tl.where(tl.load(o_mask + o_offsets, mask=o_there, other=0.0) <= 0, 0.0, o)
        if JOIN == "add":
            acc = acc + o
        elif JOIN == "add_relu":
            acc = relu(acc + o)
        elif JOIN == "relu_add":
            acc = relu(acc) + o
        else:
            tl.static_assert(JOIN == "mean_relu")
            acc = relu(0.5 * acc + 0.5 * o)
    if y_mask is not None:
        acc = tl.where(tl.load(y_mask + offsets, mask=mask, other=0.0) <= 0, 0.0, acc)
    if y_ptr is not None:
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=mask)
        acc = y.to(tl.float32)  # statistics are of the values as stored
    if part is not None:
        if z_ptr is not None:
            write_sums(part, acc, z_ptr, z_record, offsets, mask, tile, co, co_mask, CO, False)
        else:
            write_stats(part, acc, mask, tile, tl.minimum(P - tile * BLOCK_P, BLOCK_P), co, co_mask, CO)


@triton.jit
def off_centre(v, centre, c, c_mask, mask, PRECISION: tl.constexpr):
    """v as it enters products, less centre, rounded to the dtype: exact where v is near it. Zero where masked."""
    if PRECISION == "tf32":
        v = to_tf32(v)
    d = v.to(tl.float32) - tl.load(centre + c, mask=c_mask, other=0.0)[None, :]
    return tl.where(mask, d, 0.0).to(v.dtype)


@triton.jit(do_not_specialize=["P", "chunk", "T", "H", "W", "To", "Ho", "Wo"])
def conv_wgrad_kernel(
    g_a,  # gradient operand: [N, To, Ho, Wo, CO]
    g_b,
    g_record_a,
    g_record_b,
    g_sums,
    x_a,  # input operand: [N, T, H, W, CI]
    x_b,
    x_record_a,
    x_record_b,
    x_sums,
    centre,  # [CI] or None: taken off both operands, which are then one
    part,  # [splits, CO * taps * CI (+ CO with TOTALS: sums of the gradient operand over positions)]
    P,
    chunk,  # positions a split
    T,
    H,
    W,
    To,
    Ho,
    Wo,
    CI: tl.constexpr,
    CO: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    TOTALS: tl.constexpr,
    G_STRIDED: tl.constexpr,  # a 1x1x1 convolution's g lies on the grid of x, of which it reads every SH-th
    READ_G: tl.constexpr,
    READ_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMNS: tl.constexpr = KT * KH * KW * CI
    CO_TILES: tl.constexpr = (CO + BLOCK_CO - 1) // BLOCK_CO
    split = tl.program_id(1)
    co = (tl.program_id(0) % CO_TILES) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    co_mask = co < CO
    k = (tl.program_id(0) // CO_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)  # column: (tap, ci)
    k_mask = k < COLUMNS
    ci = k % CI
    tap = tl.minimum(k // CI, KT * KH * KW - 1)  # past the end, too: g may read the rows of 1x1x1
    kt = (tap // (KH * KW))[None, :]
    kh = (tap // KW % KH)[None, :]
    kw = (tap % KW)[None, :]

    acc = tl.zeros((BLOCK_CO, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_CO,), tl.float32)
    for start in range(split * chunk, tl.minimum(P, (split + 1) * chunk), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        p_mask = p < P
        if KT * KH * KW == 1 and ST == 1 and SH == 1:
            row, exists = p[:, None], p_mask[:, None]
        else:
            w_o = (p % Wo)[:, None]
            h_o = (p // Wo % Ho)[:, None]
            t_o = (p // (Wo * Ho) % To)[:, None]
            n = (p // (Wo * Ho * To))[:, None]
            row, exists = tap_row(n, t_o, h_o, w_o, kt, kh, kw, T, H, W, KT, KH, KW, ST, SH, False)
            exists = exists & p_mask[:, None]
        g_row = row if G_STRIDED else p[:, None]
        g_offsets = g_row.to(tl.int64) * CO + co[None, :]
        g_mask = p_mask[:, None] & co_mask[None, :]
        g = read_operand(g_a, g_b, g_record_a, g_record_b, g_sums, g_offsets, g_mask, co, co_mask, CO, READ_G)
        if centre is not None:
            g = off_centre(g, centre, co, co_mask, g_mask, PRECISION)
        if TOTALS:
            total += tl.sum(g.to(tl.float32), 0)
        x_offsets = row.to(tl.int64) * CI + ci[None, :]
        x_mask = exists & k_mask[None, :]
        x = read_operand(x_a, x_b, x_record_a, x_record_b, x_sums, x_offsets, x_mask, ci, k_mask, CI, READ_X)
        if centre is not None:
            x = off_centre(x, centre, ci, k_mask, x_mask, PRECISION)
        acc = dot(tl.trans(g), x, acc, PRECISION)
    out = part + split.to(tl.int64) * (CO * COLUMNS + CO * TOTALS)
    tl.store(out + co[:, None] * COLUMNS + k[None, :], acc, mask=co_mask[:, None] & k_mask[None, :])
    if TOTALS and tl.program_id(0) < CO_TILES:
        tl.store(out + CO * COLUMNS + co, total, mask=co_mask)


@triton.jit
def pack_tile(
    out,  # [CO, KT, KH, KW, CI]
    w,  # [CO, CI, KT, KH, KW] of any strides
    program,
    N: tl.constexpr,
    CI: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    S_CO: tl.constexpr,
    S_CI: tl.constexpr,
    S_T: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    STEP: tl.constexpr,  # from each tap to the next, or -1: not even
    ROWS: tl.constexpr,
):
    TAPS: tl.constexpr = KT * KH * KW
    BLOCK_T: tl.constexpr = triton.next_power_of_2(TAPS)
    row = program * ROWS + tl.arange(0, ROWS)  # (co, ci)
    tap = tl.arange(0, BLOCK_T)
    if STEP < 0:
        at = tap // (KH * KW) * S_T + tap // KW % KH * S_H + tap % KW * S_W
    else:  # seen as such, the taps of a channel are read together
        at = tap * STEP
    co = row // CI
    ci = row % CI
    at = co.to(tl.int64)[:, None] * S_CO + ci[:, None] * S_CI + at[None, :]
    mask = (row < N // TAPS)[:, None] & (tap < TAPS)[None, :]
    v = tl.load(w + at, mask=mask, other=0.0).to(out.dtype.element_ty)
    at = co[None, :] * (TAPS * CI) + tap[:, None] * CI + ci[None, :]
    tl.store(out + at, tl.trans(v), mask=tl.trans(mask))


_WEIGHTS = [f"w{i}" for i in range(16)]  # that one launch packs


@triton.jit(do_not_specialize_on_alignment=_WEIGHTS)
def pack_kernel(
    packed,  # all weights, each as `pack_tile` leaves it
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,
    w8,
    w9,
    w10,
    w11,
    w12,
    w13,
    w14,
    w15,
    BEGIN: tl.constexpr,  # of weights that are alike, the first program, and the end of the last
    FIRST: tl.constexpr,  # the first weight, and the end of the last
    AT: tl.constexpr,  # offset of the first in packed
    ROOM: tl.constexpr,  # of the next from it
    N: tl.constexpr,  # this and all below: see `pack_tile`
    CI: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    S_CO: tl.constexpr,
    S_CI: tl.constexpr,
    S_T: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    weights = (w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15)
    begin(PDL)
    for i in tl.static_range(len(N)):
        if (program >= BEGIN[i]) & (program < BEGIN[i + 1]):
            COUNT: tl.constexpr = FIRST[i + 1] - FIRST[i]
            OF_ONE: tl.constexpr = (BEGIN[i + 1] - BEGIN[i]) // COUNT
            which = (program - BEGIN[i]) // OF_ONE
            w = weights[FIRST[i]]
            for k in tl.static_range(1, COUNT):
                w = tl.where(which == k, weights[FIRST[i] + k], w)
            out = packed + AT[i] + which.to(tl.int64) * ROOM[i]
            pack_tile(
                out, w, (program - BEGIN[i]) % OF_ONE, N[i], CI[i], KT[i], KH[i], KW[i],
                S_CO[i], S_CI[i], S_T[i], S_H[i], S_W[i], STEP[i], ROWS[i],
            )  # fmt: skip


@triton.jit
def zero_kernel(out, PDL: tl.constexpr, SIZE: tl.constexpr):
    begin(PDL)
    tl.store(out + tl.arange(0, SIZE), tl.zeros((SIZE,), tl.int32))


# --- launchers -------------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """Taps and strides of a convolution with "same" padding."""

    taps: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)  # (time, space)

    def out_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        (st, sh) = self.stride
        return (t - 1) // st + 1, (h - 1) // sh + 1, (w - 1) // sh + 1

    @property
    def constants(self) -> dict:
        return dict(zip(("KT", "KH", "KW", "ST", "SH"), self.taps + self.stride))


def spatial(stride: int = 1) -> Geometry:
    return Geometry((1, 3, 3), (1, stride))


def temporal(stride: int = 1) -> Geometry:
    return Geometry((3, 1, 1), (stride, 1))


def pointwise(stride: int = 1) -> Geometry:
    return Geometry((1, 1, 1), (1, stride))


@dataclasses.dataclass
class Epilogue:
    """What happens to a tile of y before it leaves the kernel; `Operand` is its mirror at the entry.

    record      normalises y
    join        "none"; "relu": relu(y); "add": y + o; "add_relu": relu(y + o); "relu_add": relu(y) + o;
                "mean_relu": relu(0.5 y + 0.5 o)
    o           joined tensor, counted where o_mask > 0
    mask        y is zero unless this is > 0
    o_stride    in space: of dgrad, o and o_mask lie at every o_stride-th row and column of y; of fwd, with the stride
                of the convolution, y lies at those of o
    stats       partial statistics of y
    below       raw output of the layer below and its record: partial sums for that layer's BN backward
    store       whether y is written at all
    """

    record: Tensor | None = None
    join: str = "none"
    o: Tensor | None = None
    o_mask: Tensor | None = None
    mask: Tensor | None = None
    stats: bool = False
    below: tuple[Tensor, Tensor] | None = None
    store: bool = True
    o_stride: int = 1

    def key(self) -> tuple:
        """What a compiled kernel depends on."""
        o = self.o is not None, self.o_mask is not None, self.mask is not None
        return self.record is not None, self.join, self.o_stride, *o, self.stats, self.below is not None, self.store


def is_packed(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether w [Co, Ci, kT, kH, kW] lies as the kernels read it: [Co, taps, Ci] memory, in `dtype`."""
    return w.dtype == dtype and w.is_contiguous(memory_format=torch.channels_last_3d) and w.data_ptr() & 15 == 0


def pack_weight(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w [Co, Ci, kT, kH, kW] as the kernels read it, outside of a pass."""
    if is_packed(w, dtype):
        return w.detach()
    packed = torch.empty(w.shape, dtype=dtype, device=w.device, memory_format=torch.channels_last_3d)
    return packed.copy_(w.detach())


def pack(weights: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """`pack_weight` of each, by kernels of ours so that a tape can hold it, and the buffer of those it had to copy.

    Few launches for all: one takes longer than most weights do.
    """
    loose = _by_shape(weights, dtype)
    if not loose:
        return [w.detach() for w in weights], None
    buffer = alloc((sum(map(_room, loose)),), loose[0].device, dtype)
    at = 0
    for first in range(0, len(loose), len(_WEIGHTS)):
        some = loose[first : first + len(_WEIGHTS)]
        key = "pack", dtype, buffer.device, tuple(map(_form, some))
        absent = [None] * (len(_WEIGHTS) - len(some))
        plan_for(key, functools.partial(_pack_plan, some))(buffer[at:], *some, *absent)
        at += sum(map(_room, some))
    return packed_in(buffer, weights, dtype), buffer


def packed_in(buffer: Tensor | None, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights as `pack` gave them, with its buffer."""
    views, at = {}, 0
    for w in _by_shape(weights, dtype):
        packed = buffer[at : at + w.numel()].view(w.size(0), *w.shape[2:], w.size(1))
        views[id(w)] = packed.permute(0, 4, 1, 2, 3)
        at += _room(w)
    return [views.get(id(w), w).detach() for w in weights]


def _by_shape(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Those that do not lie as the kernels read them, in the order of `pack`'s buffer: those of one shape together."""
    return sorted((w for w in weights if not is_packed(w, dtype)), key=lambda w: repr(_form(w)))


def _form(w: Tensor) -> tuple:
    return tuple(w.shape), w.stride(), w.dtype


def _room(w: Tensor) -> int:
    """Elements that w takes in `pack`'s buffer: each begins at 512 bytes or a multiple."""
    return cdiv(w.numel(), 256) * 256


def _pack_plan(weights: list[Tensor]) -> Plan:
    begin, first, forms, at = [0], [0], [], 0
    for _, alike in itertools.groupby(weights, _form):
        w, *others = alike
        form = _pack_form(w)
        count = 1 + len(others)
        forms.append((at, _room(w), *form))
        at += count * _room(w)
        first.append(first[-1] + count)
        begin.append(begin[-1] + count * cdiv(w.numel() // (form[2] * form[3] * form[4]), form[-1]))
    constants = dict(zip(_FORM, zip(*forms)))
    constants |= {"BEGIN": tuple(begin), "FIRST": tuple(first), **dependent_launch(weights[0].device)}
    return Plan(pack_kernel, (begin[-1],), (), **constants, num_warps=8)


_FORM = ("AT", "ROOM", "N", "CI", "KT", "KH", "KW", "S_CO", "S_CI", "S_T", "S_H", "S_W", "STEP", "ROWS")


def _pack_form(w: Tensor) -> tuple:
    """The constants of `pack_tile`."""
    n, (_, ci, *taps), strides = w.numel(), w.shape, w.stride()
    if w.is_contiguous(memory_format=torch.channels_last_3d):  # nothing to turn: one row
        ci, taps, strides = n, (1, 1, 1), (n, 1, 1, 1, 1)
    step, span = 1, None
    for k, stride in reversed(list(zip(taps, strides[2:]))):
        if k > 1:
            step = stride if span is None else step if stride == span else -1
            span = stride * k
    return n, ci, *taps, *strides, step, 4096 // block(math.prod(taps), 1, 4096)


@functools.cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _conv_tile(positions: int, ci: int, co: int, taps: int, dtype: torch.dtype, x: Operand) -> dict:
    """Tiles that were fastest on an H200 at the block shapes of P3D ResNet, 16-bit."""
    if dtype == torch.float32:
        tile = block(min(positions, 64), 32, 64), block(co, 16, 64), block(ci, 16, 32), 4, 3
    elif positions < 64 * 64:
        few = positions < 64 * 16  # of what is read raw then in steps of 64 ptxas 12.8 spills a gradient's addresses
        block_ci = block(ci, 16, 128 if few and x.read == "raw" else 64)
        tile = 32 if few else 64, block(co, 16, 64), block_ci, 4, 4
    elif taps == 1 and co > ci:  # expand, and dgrad of reduce: bound by the wide tensors
        single = x.b is None
        if ci <= 64:
            tile = 64, block(co, 16, 64 if single else 128), block(ci, 16, 64), 4 if single or co <= 64 else 8, 3
        elif ci <= 128:
            tile = 64, block(co, 16, 64), 128, 4, 3  # all channels in one step
        else:
            tile = 64, block(co, 16, 128), 64, 4, 3
    elif taps == 1 and x.b is None:
        tile = 128, block(co, 16, 64), block(ci, 16, 64), 4, 3
    else:
        tile = 64, block(co, 16, 128), block(ci, 16, 64), 4, 3
    return dict(zip(("BLOCK_P", "BLOCK_CO", "BLOCK_CI", "num_warps", "num_stages"), tile))


COUNTERS = 1024  # tiles that a launch may split


def _infer_tile(positions: int, ci: int, co: int, taps: int, x: Operand, sms: int) -> tuple[dict, int]:
    """(tile, splits) in inference: few positions make few tiles, so several programs then share a long sum.

    By a sweep on an H200 over the shapes of P3D-63 and P3D-199 at 1, 8 and 32 clips, 16-bit.
    """
    if x.a.dtype == torch.float32:
        return _conv_tile(positions, ci, co, taps, x.a.dtype, x), 1

    def tiles(rows: int, columns: int) -> int:
        return cdiv(positions, rows) * cdiv(co, columns)

    wide = block(co, 16, 128)
    shapes = [(64, wide, 1.5), (64, 64, 0.75), (32, 64, 0.75), (32, 32, 0.75), (16, 32, 0)]
    rows, columns = next((r, c) for r, c, least in shapes if tiles(r, c) >= least * sms)
    long = taps * ci >= 2048 and tiles(64, 64) < 2 * sms
    if long:
        rows, columns = (64, 64) if positions > 64 else (block(positions, 16, 32), 32)
    split = tiles(rows, columns) <= COUNTERS and (long or (rows == 16 and tiles(rows, columns) < 0.75 * sms))
    block_ci, stages = (128, 3) if rows == 64 else (128, 4)
    if columns == 128:
        block_ci, stages = 64, 4 if taps * ci >= 512 else 3
    elif rows == 64 and taps > 1 and not split:
        block_ci, stages = 64, 3 if ci <= 64 else 4
    block_ci, columns = block(ci, 16, block_ci), block(co, 16, columns)
    steps, splits = taps * cdiv(ci, block_ci), 1
    if split and steps >= 8:
        most = 2 * sms if rows == 64 else sms
        splits = even(steps, max(1, min(8, most // tiles(rows, columns), steps // 2)))
    tile = {"BLOCK_P": rows, "BLOCK_CO": columns, "BLOCK_CI": block_ci, "num_warps": 4, "num_stages": stages}
    return tile, splits


def even(steps: int, splits: int) -> int:
    """The number of splits, at most `splits`, of which none is left without a share of cdiv(steps, splits) steps."""
    return cdiv(steps, cdiv(steps, splits))


def zeroed_counters(device: torch.device) -> Tensor:
    """int32 zeros [COUNTERS]. Kernels that count in them leave them zero, so the launches of a pass share them."""

    def make() -> Tensor:
        counters = alloc((COUNTERS,), device, torch.int32)
        constants = {**dependent_launch(device), "SIZE": COUNTERS}
        plan_for(("zero", device), lambda: Plan(zero_kernel, (1,), (), **constants))(counters)
        return counters

    return once_a_pass(("counters", device), make)


def conv(
    x: Operand,
    w: Tensor,  # packed
    geometry: Geometry,
    epilogue: Epilogue | None = None,
    out_dims: tuple[int, int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(y, part): fwd, or dgrad when `out_dims` (T, H, W of the convolution's input) is given.

    fwd in inference, or of D in training: the CUDA kernel where it has one for this.

    part: statistics [R, 3, Co] or sums [R, 2, Co], as the epilogue says; None if it asks for neither.
    """
    epilogue = epilogue or Epilogue()
    if out_dims is not None and _is_point_dgrad(x, w, geometry, epilogue):
        return _cuda.point_dgrad(x.a, taps_of(w)[:, 0], epilogue.o, epilogue.o_mask, epilogue.mask), None
    if _is_temporal(x, w, geometry, epilogue):
        return _cuda.temporal_train(x, taps_of(w), out_dims is not None, epilogue.stats)
    training = _train_arguments(x, w, geometry, epilogue, out_dims)
    if training is not None:
        return _cuda.conv_train(x, taps_of(w), **training)
    shape, dtype, device = x.a.shape, x.a.dtype, x.a.device
    if out_dims is None and _in_cuda(x, w, geometry, epilogue):
        return _cuda.conv_infer(x.a, taps_of(w), *geometry, epilogue.record, epilogue.join, epilogue.o), None
    precision = input_precision(dtype, device)
    key = "conv", shape, dtype, device, w.shape, geometry, out_dims, x.read, epilogue.key(), precision
    plan = plan_for(key, lambda: _conv_plan(x, w, geometry, epilogue, out_dims))
    y = empty_ndhwc(plan.y_shape, x.a) if epilogue.store else None
    part = None
    z, z_record = epilogue.below or (None, None)
    if epilogue.stats or z is not None:
        part = alloc((plan.rows, 3 if epilogue.stats else 2, plan.y_shape[1]), device)
    shares = arrived = None
    if plan.shares is not None:
        shares, arrived = alloc(plan.shares, device), zeroed_counters(device)
    joined = epilogue.record, epilogue.mask, epilogue.o, epilogue.o_mask
    plan(*x.args(), w, y, *joined, part, z, z_record, shares, arrived)
    return y, part


def _conv_plan(x: Operand, w: Tensor, geometry: Geometry, epilogue: Epilogue, out_dims: tuple | None) -> Plan:
    n, ci, *dims = x.a.shape
    out = out_dims or geometry.out_shape(*dims)
    co = w.size(0 if out_dims is None else 1)
    positions = n * out[0] * out[1] * out[2]
    taps = geometry.taps[0] * geometry.taps[1] * geometry.taps[2]
    if x.read == "raw" and epilogue.record is not None:  # of inference, or D in training
        tile, splits = _infer_tile(positions, ci, co, taps, x, sm_count(x.a.device))
        few = positions < 64 * 64 and x.a.dtype != torch.float32  # else others have brought the weights
    else:
        tile, splits, few = _conv_tile(positions, ci, co, taps, x.a.dtype, x), 1, False
    pdl = dependent_launch(x.a.device)
    rows = cdiv(positions, tile["BLOCK_P"])
    tiles = rows * cdiv(co, tile["BLOCK_CO"])
    plan = Plan(
        conv_kernel,
        (tiles, splits),
        (positions, *dims, *out),
        CI=ci,
        CO=co,
        **geometry.constants,
        TRANSPOSED=out_dims is not None,
        READ=x.read,
        JOIN=epilogue.join,
        SO=epilogue.o_stride,
        PRECISION=input_precision(x.a.dtype, x.a.device),
        **pdl,
        PREFETCH=pdl["PDL"] and few and ci % tile["BLOCK_CI"] == 0,
        SPLITS=splits,
        **tile,
    )
    plan.rows, plan.y_shape = rows, (n, co, *out)
    plan.shares = (tiles, splits, tile["BLOCK_P"], tile["BLOCK_CO"]) if splits > 1 else None
    return plan


def conv_wgrad(
    g: Operand,
    x: Operand,
    geometry: Geometry,
    totals: bool = False,
    centre: Tensor | None = None,
) -> Splits:
    """dw [Co * taps * Ci], with totals followed by the sums of g over positions [Co]; split over positions.

    g lies on the output's grid, or, for 1x1x1, on the grid of x: then it is read with the convolution's stride too.
    centre: [Ci] float32, values of the dtype, taken off g and x, which are then one operand of 1x1x1.
    A CUDA kernel where one does this, else `conv_wgrad_kernel`.
    """
    if not totals and centre is None and (raw := _raw_wgrad(g, x, geometry)) is not None:
        (part,) = _cuda.raw_wgrads([raw])
    elif cuda_allowed(x.a) and _cuda.conv_wgrad_why_not(g, x, *geometry, totals, centre) is None:
        part = _cuda.conv_wgrad(g, x, *geometry, totals, centre)
    else:
        part = _conv_wgrad(g, x, *geometry, totals, centre)
    return _splits(part, x, geometry)


class WeightGrad(NamedTuple):
    """A call of `conv_wgrad` or `spatial_wgrad` that is still to be made."""

    g: Operand
    x: Operand
    geometry: Geometry


def conv_wgrads(gradients: list) -> list:
    """Each `WeightGrad` as its `Splits`, in place, all else as it is.

    Those of raw operands are made by few launches: together they need fewer splits each to fill the card. 1x3x3: by
    `spatial_wgrad`, if it is not among these.
    """
    done, raws = list(gradients), []
    for i, call in enumerate(gradients):
        if isinstance(call, WeightGrad):
            if (raw := _raw_wgrad(*call)) is None:
                done[i] = spatial_wgrad(call.g, call.x) if call.geometry == spatial() else conv_wgrad(*call)
            else:
                raws.append((i, call, raw))
    for at in range(0, len(raws), _cuda.RAW_WGRADS):
        places, calls, some = zip(*raws[at : at + _cuda.RAW_WGRADS])
        for i, call, part in zip(places, calls, _cuda.raw_wgrads(some)):
            done[i] = _splits(part, call.x, call.geometry)
    return done


def _raw_wgrad(g: Operand, x: Operand, geometry: Geometry) -> _cuda.RawWgrad | None:
    """This weight gradient as the kernel of raw operands takes it, or None."""
    if g.read != "raw" or x.read != "raw" or not cuda_allowed(x.a):
        return None
    raw = _cuda.RawWgrad(g.a, x.a, *geometry)
    return raw if _cuda.raw_wgrad_why_not(raw) is None else None


def _splits(part: Tensor, x: Operand, geometry: Geometry) -> Splits:
    kt, kh, kw = geometry.taps
    return Splits(part, kt * kh * kw, x.channels)


def _conv_wgrad(
    g: Operand, x: Operand, taps: tuple, stride: tuple, totals: bool = False, centre: Tensor | None = None
) -> Tensor:
    """The splits [R, Co * taps * Ci (+ Co with totals)] of `conv_wgrad` in Triton."""
    geometry = Geometry(taps, stride)
    shape, dtype, device = x.a.shape, x.a.dtype, x.a.device
    precision = input_precision(dtype, device)
    centred = centre is not None
    key = "conv_wgrad", shape, dtype, device, g.a.shape, geometry, totals, x.read, g.read, precision, centred
    plan = plan_for(key, lambda: _wgrad_plan(g, x, geometry, totals))
    part = alloc(plan.part_shape, device)
    plan(*g.args(), *x.args(), centre, part)
    return part


def _wgrad_plan(g: Operand, x: Operand, geometry: Geometry, totals: bool) -> Plan:
    n, ci, *dims = x.a.shape
    co, out = g.channels, geometry.out_shape(*dims)
    columns = ci * geometry.taps[0] * geometry.taps[1] * geometry.taps[2]
    positions = n * out[0] * out[1] * out[2]
    tile = _wgrad_tile(co, columns, columns // ci, g.a.dtype, g, x)
    tiles = cdiv(co, tile["BLOCK_CO"]) * cdiv(columns, tile["BLOCK_K"])
    splits = max(1, min(2 * sm_count(g.a.device) // tiles, cdiv(positions, 4 * tile["BLOCK_P"])))
    chunk = cdiv(cdiv(positions, splits), tile["BLOCK_P"]) * tile["BLOCK_P"]
    plan = Plan(
        conv_wgrad_kernel,
        (tiles, splits),
        (positions, chunk, *dims, *out),
        CI=ci,
        CO=co,
        **geometry.constants,
        TOTALS=totals,
        G_STRIDED=tuple(g.a.shape[2:]) != tuple(out),
        READ_G=g.read,
        READ_X=x.read,
        PRECISION=input_precision(g.a.dtype, g.a.device),
        **tile,
    )
    plan.part_shape = splits, co * (columns + totals)
    return plan


def _wgrad_tile(co: int, columns: int, taps: int, dtype: torch.dtype, g: Operand, x: Operand) -> dict:
    """Tiles that were fastest on an H200 at the block shapes of P3D ResNet, 16-bit."""
    if dtype == torch.float32:
        tile = 32, block(co, 16, 64), block(columns, 16, 64), 4, 2
    elif taps == 1 and columns > co and g.b is not None:  # reduce
        tile = 64, block(co, 16, 64), block(columns, 16, 128), 4, 3
    else:
        tile = 64, block(co, 16, 128), block(columns, 16, 128), 4 if x.b is None else 8, 2
    return dict(zip(("BLOCK_P", "BLOCK_CO", "BLOCK_K", "num_warps", "num_stages"), tile))


def weight_grad(dw: Tensor, w: Tensor) -> Tensor:
    """dw [Co * Ci * taps] float32, as the kernels leave it, with the shape and dtype of w [Co, Ci, kT, kH, kW]."""
    dw = dw.view(w.shape)
    return dw if w.dtype == torch.float32 else dw.to(w.dtype)  # a call that changes nothing costs the host all the same


# --- in CUDA --------------------------------------------------------------------------------------------------------


def cuda_allowed(x: Tensor) -> bool:
    """Whether CUDA kernels may run on tensors like x."""
    return _backends.forced() != "triton" and _backends.why_not("cuda", x) is None


def taps_of(w: Tensor) -> Tensor:
    """A packed w [Co, Ci, kT, kH, kW] by the order of its memory: [Co, taps, Ci]."""
    return w.permute(0, 2, 3, 4, 1).view(w.size(0), -1, w.size(1))


def _in_cuda(x: Operand, w: Tensor, geometry: Geometry, epilogue: Epilogue) -> bool:
    """Whether the CUDA kernel for inference takes this forward convolution."""
    e = epilogue
    plain = x.read == "raw" and e.record is not None and e.o_mask is None and e.mask is None and e.o_stride == 1
    if not plain or e.stats or e.below is not None or not e.store or not cuda_allowed(x.a):
        return False
    return _cuda.conv_infer_why_not(tuple(x.a.shape), x.a.dtype, w.size(0), *geometry, e.join) is None


def _is_point_dgrad(x: Operand, w: Tensor, geometry: Geometry, epilogue: Epilogue) -> bool:
    """Whether this gradient is `_cuda.point_dgrad`'s."""
    e = epilogue
    plain = x.read == "raw" and geometry == pointwise() and e.join == "add" and e.o_stride == 1
    if not plain or e.record is not None or e.stats or e.below is not None or not e.store or not cuda_allowed(x.a):
        return False
    return _cuda.point_dgrad_why_not(x.a, w.size(1)) is None


def _is_temporal(x: Operand, w: Tensor, geometry: Geometry, epilogue: Epilogue) -> bool:
    """Whether this convolution or its gradient is `_cuda.temporal_train`'s."""
    e = epilogue
    plain = geometry == temporal() and e.join == "none" and e.record is None and e.below is None and e.mask is None
    return plain and e.store and cuda_allowed(x.a) and _cuda.temporal_train_why_not(x, taps_of(w)) is None


def _train_arguments(
    x: Operand, w: Tensor, geometry: Geometry, epilogue: Epilogue, out_dims: tuple | None
) -> dict | None:
    """What `_cuda.conv_train` takes beside x and w, where it has a kernel for such a pass of training; else None."""
    e, back = epilogue, out_dims is not None
    temporal, pointwise = geometry.taps == (3, 1, 1), geometry.taps == (1, 1, 1)
    stride = geometry.stride[1]
    fits = temporal and geometry.stride == (1, 1) or pointwise and geometry.stride[0] == 1
    if not fits or not e.store or e.mask is not None or not cuda_allowed(x.a):
        return None
    if back:
        join = e.join == "none" or (e.join == "add" and e.o_stride == stride)
        join = join and e.record is None and not e.stats
    else:  # what is read raw and normalised on the way out has the kernels of inference
        join = e.join == "none" or (e.join == "add_relu" and e.record is not None and not e.stats and e.o_stride == 1)
        join = join and e.o_mask is None and e.below is None and not (x.read == "raw" and e.record is not None)
    loads = {"o": e.o, "o_mask": e.o_mask, "below": e.below}
    if not join:
        return None
    shape = x, taps_of(w), back
    if stride != 1 or _cuda.conv_train_why_not(*shape, **loads, stats=e.stats) is not None:
        if _cuda.conv_tiles_why_not(*shape, **loads, stats=e.stats, stride=stride, dims=out_dims) is not None:
            return None
        n, _, *dims = x.a.shape
        tiles = cdiv(n * math.prod(geometry.out_shape(*dims)), 64) * cdiv(w.size(0), 128)
        many = tiles > 3 * sm_count(x.a.device) and not (x.read == "raw" and e.join == "none")
        if not back and many:  # each reads x anew, and applies its read: then Triton's wider tiles are faster
            return None
    rest = dict(record=e.record, relu=e.join == "add_relu", stats=e.stats)
    return dict(transposed=back, **loads, **rest, stride=stride, dims=out_dims)


def spatial_fwd(
    x: Operand, w: Tensor, epilogue: Epilogue | None = None, stride: int = 1
) -> tuple[Tensor, Tensor | None]:
    """1x3x3: the CUDA kernel where it has one for this operand, epilogue and stride, else `conv`."""
    epilogue = epilogue or Epilogue()
    # In inference at few positions and many channels blocks that share a sum are faster.
    few = epilogue.record is not None and x.a.numel() // x.channels < 1600 and x.channels >= 256
    plain = x.read in ("raw", "bn_relu") and epilogue.below is None and stride == 1 and not few
    plain = plain and (epilogue.record is not None, epilogue.join) in ((False, "none"), (True, "relu"))
    if plain and cuda_allowed(x.a):
        if _cuda.why_not(tuple(x.a.shape), x.a.dtype, w.size(1), w.size(0)) is None:
            affines = (None if r is None else r[:3] for r in (x.record_a, epilogue.record))
            return _cuda.spatial_conv_fwd(x.a, taps_of(w), *affines, epilogue.stats)
    return conv(x, w, spatial(stride), epilogue)


def spatial_dgrad(
    dz: Operand, w: Tensor, epilogue: Epilogue | None = None, dims: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The input gradient of `spatial_fwd`: the CUDA kernel where it has one for this, else `conv` transposed."""
    epilogue = epilogue or Epilogue()
    plain = dz.read in ("raw", "bn_bwd") and epilogue.record is None and not epilogue.stats and epilogue.store
    plain = plain and epilogue.join in ("none", "add") and epilogue.o_mask is None
    if plain and epilogue.mask is None and cuda_allowed(dz.a):
        if _cuda.why_not(tuple(dz.a.shape), dz.a.dtype, w.size(0), w.size(1)) is None:
            return _cuda.spatial_conv_dgrad(dz.a, dz.b, dz.record_b, dz.sums, taps_of(w), epilogue.o, epilogue.below)
    return conv(dz, w, spatial(), epilogue, dims or tuple(dz.a.shape[2:]))


def spatial_wgrad(dz: Operand, x: Operand, room: Tensor | None = None) -> Splits:
    """The weight gradient of `spatial_fwd` in splits: the CUDA kernel where it has one, else `conv_wgrad`.

    room: by `spatial_finished`, where what dz reads is stored.
    """
    if _spatial_wgrad_fits(dz, x):
        part = _cuda.spatial_wgrad(dz.a, dz.b, dz.record_b, dz.sums, x.a, x.record_a, room)
        return Splits(part, 9, x.channels)
    return conv_wgrad(dz, x, spatial())


def spatial_finished(dz: Operand, x: Operand) -> Tensor | None:
    """Room for what dz reads, if `spatial_wgrad` can leave it: `spatial_dgrad` then reads one tensor, not two."""
    return empty_ndhwc(dz.a.shape, dz.a) if dz.read == "bn_bwd" and _spatial_wgrad_fits(dz, x) else None


def _spatial_wgrad_fits(dz: Operand, x: Operand) -> bool:
    if dz.read not in ("raw", "bn_bwd") or x.read not in ("raw", "bn_relu") or not cuda_allowed(dz.a):
        return False
    return _cuda.wgrad_why_not(tuple(x.a.shape), x.a.dtype, x.channels, dz.channels) is None
