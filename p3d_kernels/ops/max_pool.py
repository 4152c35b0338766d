"""Max-pool over (T, H, W), forward and backward, in NDHWC memory.

Forward: one program reads the windows of a tile of outputs, a tap at a time, and keeps the largest element and, when a
gradient will be asked for, the tap it came from: one byte, counted row by row inside the window. With a BN record the
kernel pools relu(bn(x)) of a raw x, which is how the stem ends (see `stem.py`).

Backward gathers: an input position sums the gradients of the windows that cover it and whose byte points at it. There
are no atomics, so a run repeats bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backends, reference
from .._checks import check_activation
from ._tape import keep, taped
from ._triton import (
    MAX_POSITIONS,
    Plan,
    affine,
    alloc,
    begin,
    block,
    cdiv,
    dependent_launch,
    empty_ndhwc,
    ndhwc,
    plan_for,
    relu,
    tl,
    triton,
)

OFFERS = ("triton", "aten")
NO_TAP = 255  # the byte of a window whose ReLU is off: no position takes its gradient
UNROLLED_TAPS = 32

_checked: dict[tuple, tuple] = {}  # arguments of calls that our kernels take, by what their checks depend on


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _place(W, BLOCK_P: tl.constexpr):
    """A program's row of positions and its columns, some perhaps past the end: no position is divided by itself."""
    tiles = tl.cdiv(W, BLOCK_P)
    row = tl.program_id(0) // tiles
    return row, (tl.program_id(0) - row * tiles) * BLOCK_P + tl.arange(0, BLOCK_P)


@triton.jit
def _take(k, kw, x, corner, ok, t0, h0, w0, c, best, index, sign, outside, T, H, W, C: tl.constexpr, KH: tl.constexpr,
          KW: tl.constexpr):  # fmt: skip
    """One tap, in row k of the window, of every window of the tile: keep it where it is larger, or NaN, as torch does.

    corner: of the first row, its index among all rows of all frames; int64.
    """
    kt, kh = k // KH, k % KH
    t, h, w = t0 + kt, h0 + kh, w0 + kw
    inside = (t >= 0) & (t < T) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = x + (((corner + kt * H + kh) * W + w) * C)[:, None] + c[None, :]
    v = tl.load(at, mask=inside[:, None] & ok, other=outside).to(tl.float32) * sign
    take = (v > best) | (v != v)
    return tl.where(take, v, best), tl.where(take, k * KW + kw, index)


@triton.jit
def max_pool_fwd_kernel(
    x,  # [N, T, H, W, C]
    record,  # [5, C] or None: pool relu(bn(x)) instead of x
    y,  # [N, To, Ho, Wo, C]
    winner,  # like y, or None: the element of x (not normalised) that won
    tap_of,  # uint8, like y, or None: its tap; NO_TAP where the ReLU is off
    T,
    H,
    W,
    To,
    Ho,
    Wo,
    C: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin(PDL)
    row, wo = _place(Wo, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    ok = (wo < Wo)[:, None] & c_mask[None, :]
    t0 = row // Ho % To * ST - PT
    h0 = row % Ho * SH - PH
    w0 = wo * SW - PW
    corner = (row // Ho // To * T + t0).to(tl.int64) * H + h0

    # torch's index starts at the first tap inside the tensor, which is the answer when all of them are -inf
    first = (tl.maximum(-t0, 0) * KH + tl.maximum(-h0, 0)) * KW + tl.maximum(-w0, 0)
    index = tl.zeros((BLOCK_P, BLOCK_C), tl.int32) + first[:, None]
    NORM: tl.constexpr = record is not None
    if NORM:
        # relu(bn(x)) rises with x where scale > 0 and falls where scale < 0, so raw elements are compared, times the
        # sign; where scale = 0 all are equal and the first tap wins. The winner alone is normalised.
        scale = tl.load(record + C + c, mask=c_mask, other=0.0)
        sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))[None, :]
    else:
        sign = tl.full((1, 1), 1.0, tl.float32)
    lowest = tl.where(sign == 0, 0.0, float("-inf"))
    outside = tl.broadcast_to(lowest * sign, (BLOCK_P, BLOCK_C)).to(x.dtype.element_ty)
    best = tl.broadcast_to(lowest, (BLOCK_P, BLOCK_C))
    if KT * KH * KW <= 4:
        for k in tl.static_range(KT * KH * KW):
            best, index = _take(k // KW, k % KW, x, corner, ok, t0, h0, w0, c, best, index, sign, outside, T, H, W,
                                C, KH, KW)  # fmt: skip
    else:
        # A loop over the rows of the window that stays a loop: unrolled, ptxas puts off all choices of `index` to the
        # end and hoards their predicates in registers, bit by bit.
        for k in range(KT * KH):
            if KW <= 8:
                for kw in tl.static_range(KW):
                    best, index = _take(k, kw, x, corner, ok, t0, h0, w0, c, best, index, sign, outside, T, H, W,
                                        C, KH, KW)  # fmt: skip
            else:
                for kw in range(KW):
                    best, index = _take(k, kw, x, corner, ok, t0, h0, w0, c, best, index, sign, outside, T, H, W,
                                        C, KH, KW)  # fmt: skip

    out = ((row.to(tl.int64) * Wo + wo) * C)[:, None] + c[None, :]
    if NORM:
        at = (corner + tl.maximum(-t0, 0) * H + tl.maximum(-h0, 0)) * W + tl.maximum(w0, 0)
        at = x + (at * C)[:, None] + c[None, :]
        best = tl.where(sign == 0, tl.load(at, mask=ok & (sign == 0), other=0.0).to(tl.float32) + best, best * sign)
        if winner is not None:
            tl.store(winner + out, best.to(winner.dtype.element_ty), mask=ok)
        best = affine(best, record, c, c_mask, C)
        index = tl.where(best <= 0, 255, index)
        best = relu(best)
    tl.store(y + out, best.to(y.dtype.element_ty), mask=ok)
    if tap_of is not None:
        tl.store(tap_of + out, index.to(tl.uint8), mask=ok)


@triton.jit
def _routed(k, g, tap_of, n, t, h, w, ok, c, total, To, Ho, Wo, C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr,
            KW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, NH: tl.constexpr,
            NW: tl.constexpr):  # fmt: skip
    """Add what the k-th of the windows around padded positions (n, t, h, w) sends back to them."""
    to = t // ST - k // (NH * NW)
    ho = h // SH - k // NW % NH
    wo = w // SW - k % NW
    kt, kh, kw = t - to * ST, h - ho * SH, w - wo * SW
    covers = (to >= 0) & (to < To) & (ho >= 0) & (ho < Ho) & (wo >= 0) & (wo < Wo)
    covers &= (kt < KT) & (kh < KH) & (kw < KW)
    mask = covers[:, None] & ok
    offsets = ((((n * To + to).to(tl.int64) * Ho + ho) * Wo + wo) * C)[:, None] + c[None, :]
    tap = tl.load(tap_of + offsets, mask=mask, other=255).to(tl.int32)
    gradient = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
    return total + tl.where(tap == ((kt * KH + kh) * KW + kw)[:, None], gradient, 0.0)


@triton.jit
def pool_gradient(g, tap_of, n, t, h, w, ok, c, To, Ho, Wo, C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr,
                  KW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, NT: tl.constexpr,
                  NH: tl.constexpr, NW: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """The gradient [rows, channels], float32, that the pool sends to positions (n, t, h, w) counted from the padding.

    At most NT x NH x NW windows cover a position; they are added in a fixed order.
    """
    total = tl.zeros((w.shape[0], c.shape[0]), tl.float32)
    if UNROLL:
        for k in tl.static_range(NT * NH * NW):
            total = _routed(k, g, tap_of, n, t, h, w, ok, c, total, To, Ho, Wo, C, KT, KH, KW, ST, SH, SW, NH, NW)
    else:
        for k in range(NT * NH * NW):
            total = _routed(k, g, tap_of, n, t, h, w, ok, c, total, To, Ho, Wo, C, KT, KH, KW, ST, SH, SW, NH, NW)
    return total


@triton.jit
def max_pool_bwd_kernel(
    g,  # [N, To, Ho, Wo, C]
    tap_of,  # uint8, like g
    dx,  # [N, T, H, W, C]
    T,
    H,
    W,
    To,
    Ho,
    Wo,
    C: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NT: tl.constexpr,
    NH: tl.constexpr,
    NW: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin(PDL)
    row, w = _place(W, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (w < W)[:, None] & (c < C)[None, :]
    h = row % H
    cells = tl.cdiv(T + PT, ST)  # of frames that the same windows cover: what the first reads is near for the next
    n = row // H // cells
    for i in range(ST):
        t = row // H % cells * ST + i  # counted from the padding
        mask = ok & (t >= PT) & (t < T + PT)
        total = pool_gradient(g, tap_of, n, t, h + PH, w + PW, mask, c, To, Ho, Wo, C, KT, KH, KW, ST, SH, SW,
                              NT, NH, NW, UNROLL)  # fmt: skip
        at = (((n * T + t - PT).to(tl.int64) * H + h) * W + w) * C
        tl.store(dx + at[:, None] + c[None, :], total.to(dx.dtype.element_ty), mask=mask)


# --- launchers -------------------------------------------------------------------------------------------------------


def out_sizes(sizes, kernel, stride, padding, ceil_mode) -> list[int]:
    """The pooled sizes of (T, H, W), as torch counts them: with ceil_mode the last window must start inside."""
    out = []
    for i, k, s, p in zip(sizes, kernel, stride, padding):
        n = (i + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (n - 1) * s >= i + p:
            n -= 1
        out.append(n)
    return out


def _tile(channels: int, width: int) -> dict:
    """All channels where they are few enough, so that a program's memory lies together, and the columns of a row that
    leave the least over. 8 elements a thread: 16 bytes of bfloat16 at a time, and bytes in the same layout.
    """
    block_c = block(channels, 8, 1024)
    most = max(1, 2048 // block_c)
    block_p = min((most >> i for i in range(most.bit_length())), key=lambda b: (cdiv(width, b) * max(b, most // 4), -b))
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": block(block_p * block_c // 256, 1, 8)}


def _geometry(kernel, stride, padding) -> dict:
    names = ("KT", "KH", "KW", "ST", "SH", "SW", "PT", "PH", "PW")
    return dict(zip(names, (*kernel, *stride, *padding)))


def pool_fwd(x, kernel, stride, padding, ceil_mode, record=None, save_tap=False, save_winner=False):
    """(y, tap or None, winner or None) of x in NDHWC memory; with `record`, of relu(bn(x))."""
    geometry = kernel, stride, padding
    key = x.shape, x.dtype, x.device, geometry, ceil_mode, record is None, save_tap, save_winner
    plan = plan_for((max_pool_fwd_kernel, *key), lambda: _fwd_plan(x, geometry, ceil_mode))
    y = empty_ndhwc(plan.shape, x)
    winner = empty_ndhwc(plan.shape, x) if save_winner else None
    tap = alloc(plan.shape, x.device, torch.uint8) if save_tap else None
    plan(x, record, y, winner, tap)
    return y, tap, winner


def _fwd_plan(x: Tensor, geometry: tuple, ceil_mode: bool) -> Plan:
    n, channels, *sizes = x.shape
    out = out_sizes(sizes, *geometry, ceil_mode)
    tile = _tile(channels, out[2])
    programs = n * out[0] * out[1] * cdiv(out[2], tile["BLOCK_P"]), cdiv(channels, tile["BLOCK_C"])
    plan = Plan(
        max_pool_fwd_kernel, programs, (*sizes, *out), C=channels, **_geometry(*geometry),
        **dependent_launch(x.device), **tile,
    )  # fmt: skip
    plan.shape = n, channels, *out
    return plan


def pool_bwd(g, tap, sizes, kernel, stride, padding):
    """dx [N, C, *sizes] from the gradient g and the taps of the forward."""
    g = ndhwc(g)
    geometry = kernel, stride, padding
    plan = plan_for(
        (max_pool_bwd_kernel, g.shape, g.dtype, g.device, sizes, geometry), lambda: _bwd_plan(g, sizes, geometry)
    )
    dx = empty_ndhwc((*g.shape[:2], *sizes), g)
    plan(g, tap, dx)
    return dx


def _bwd_plan(g: Tensor, sizes: tuple, geometry: tuple) -> Plan:
    n, channels, *out = g.shape
    tile = _tile(channels, sizes[2])
    windows = [cdiv(k, s) for k, s in zip(*geometry[:2])]  # that cover a position, at most
    rows = n * cdiv(sizes[0] + geometry[2][0], geometry[1][0]) * sizes[1]
    return Plan(
        max_pool_bwd_kernel, (rows * cdiv(sizes[2], tile["BLOCK_P"]), cdiv(channels, tile["BLOCK_C"])),
        (*sizes, *out), C=channels, **_geometry(*geometry), **dict(zip(("NT", "NH", "NW"), windows)),
        UNROLL=math.prod(windows) <= UNROLLED_TAPS, **dependent_launch(g.device), **tile,
    )  # fmt: skip


# --- autograd and registration ---------------------------------------------------------------------------------------


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *geometry):
        x = ndhwc(x)

        def pass_():
            y, tap, _ = pool_fwd(x, *geometry, save_tap=True)
            return [y], [tap]

        ctx.key = x.shape, x.dtype, x.device, geometry
        (y,), tap, ctx.layout = taped(("max_pool", ctx.key), pass_, [x])
        ctx.save_for_backward(tap)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        g, (tap,), (shape, *_, geometry) = ndhwc(g), ctx.saved_tensors, ctx.key

        def pass_():
            return [pool_bwd(g, *ctx.layout.views(tap), tuple(shape[2:]), *geometry[:3])], []

        (dx,), *_ = taped(("max_pool bwd", ctx.key), pass_, [g, tap])
        return dx, None, None, None, None


@torch.library.custom_op(
    "p3d::max_pool",
    mutates_args=(),
    schema="(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode) -> (Tensor, Tensor)",
)
def _op(x, kernel, stride, padding, ceil_mode):
    return pool_fwd(ndhwc(x), tuple(kernel), tuple(stride), tuple(padding), ceil_mode, save_tap=True)[:2]


@_op.register_fake
def _(x, kernel, stride, padding, ceil_mode):
    y = empty_ndhwc((*x.shape[:2], *out_sizes(x.shape[2:], kernel, stride, padding, ceil_mode)), x)
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.custom_op(
    "p3d::max_pool_bwd",
    mutates_args=(),
    schema="(Tensor g, Tensor tap, SymInt[] sizes, int[] kernel, int[] stride, int[] padding) -> Tensor",
)
def _op_bwd(g, tap, sizes, kernel, stride, padding):
    return pool_bwd(g, tap, tuple(sizes), tuple(kernel), tuple(stride), tuple(padding))


@_op_bwd.register_fake
def _(g, tap, sizes, kernel, stride, padding):
    return empty_ndhwc((*g.shape[:2], *sizes), g)


def _setup(ctx, inputs, output):
    x, *ctx.geometry, _ = inputs
    ctx.sizes = x.shape[2:]
    ctx.save_for_backward(output[1])


def _backward(ctx, g, _):
    return torch.ops.p3d.max_pool_bwd(g, *ctx.saved_tensors, ctx.sizes, *ctx.geometry), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


# --- public ----------------------------------------------------------------------------------------------------------


def _triple(name: str, value) -> tuple[int, int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,) * 3
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, int) for v in value):
        raise TypeError(f"{name}: expected an int or three (T, H, W), got {value!r}")
    if len(value) != 3:
        raise ValueError(f"{name}: expected three sizes (T, H, W), got {value!r}")
    return tuple(value)


def why_not(backend: str, x: Tensor, kernel: tuple[int, int, int]) -> str | None:
    """Why `backend` cannot max-pool x with windows of `kernel`, or None."""
    if math.prod(kernel) > NO_TAP:
        return f"{backend}: a window of {math.prod(kernel)} elements (at most {NO_TAP})"
    if x.numel() // x.size(1) > MAX_POSITIONS:
        return f"{backend}: {x.numel() // x.size(1)} positions (at most {MAX_POSITIONS})"
    return None


def max_pool(x: Tensor, kernel: tuple, stride: tuple, padding: tuple = (0, 0, 0), ceil_mode: bool = False) -> Tensor:
    """Max-pool over (T, H, W), equivalent to `F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode)`.

    NaN propagates. Of equal elements the first in (T, H, W) order takes the gradient, as in torch.

    Args:
        x: [N, C, T, H, W], float; channels_last_3d memory is used in place, any other is converted first.
        kernel, stride, padding: (T, H, W), or one int for all three; padding is at most half the kernel.
        ceil_mode: round the output size up; the last window must start inside the input or its left padding.

    Returns:
        [N, C, To, Ho, Wo] in the dtype of x, channels_last_3d.

    Numerics: the forward is exact. The backward sums in float32 in a fixed order: runs are equal bit for bit. Both
    passes are our own kernels; a window of more than 255 elements and an empty batch run in plain PyTorch.

    Raises:
        TypeError: x is not a floating-point tensor; kernel, stride or padding is not an int or three.
        ValueError: x is not 5-D; not three sizes; a size is not positive; padding above kernel / 2; an output axis
            would be empty.
    """
    key = geometry = None
    if not torch.compiler.is_compiling():
        try:
            key = x.shape, x.dtype, x.device, kernel, stride, padding, ceil_mode, _backends.forced()
            geometry = _checked.get(key)
        except (AttributeError, TypeError):  # of a wrong type, or lists: checked anew each time
            key = None
    if geometry is None:
        geometry = _check(x, kernel, stride, padding, ceil_mode)
        if x.numel() == 0 or _backends.choose("max_pool", x, lambda b: why_not(b, x, geometry[0]), OFFERS) == "aten":
            return reference.max_pool(x, *geometry)
        if torch.compiler.is_compiling():
            return torch.ops.p3d.max_pool(x, *geometry)[0]
        if key is not None:
            keep(_checked, key, geometry)
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x, *geometry)
    return pool_fwd(ndhwc(x), *geometry)[0]


def _check(x: Tensor, kernel, stride, padding, ceil_mode: bool) -> tuple:
    """(kernel, stride, padding, ceil_mode), three sizes each but the last; raises unless they fit each other and x."""
    check_activation("x", x)
    kernel, stride, padding = _triple("kernel", kernel), _triple("stride", stride), _triple("padding", padding)
    for name, value in (("kernel", kernel), ("stride", stride)):
        if min(value) < 1:
            raise ValueError(f"{name}: expected positive sizes, got {value}")
    if any(p < 0 or 2 * p > k for p, k in zip(padding, kernel)):
        raise ValueError(f"padding: expected 0 to half of kernel {kernel}, got {padding}")
    if min(out := out_sizes(x.shape[2:], kernel, stride, padding, ceil_mode)) < 1:
        raise ValueError(f"x: expected (T, H, W) that window {kernel} fits, got {tuple(x.shape[2:])} (output {out})")
    return kernel, stride, padding, ceil_mode
