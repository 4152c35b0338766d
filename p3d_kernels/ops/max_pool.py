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
from ._triton import (
    MAX_POSITIONS,
    Plan,
    affine,
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

NO_TAP = 255  # the byte of a window whose ReLU is off: no position takes its gradient
UNROLLED_TAPS = 32


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _take(row, kw, x, offsets, ok, t0, h0, w0, best, index, sign, outside, T, H, W, C: tl.constexpr, KH: tl.constexpr,
          KW: tl.constexpr):  # fmt: skip
    """One tap of every window of the tile: keep it where it is larger, or NaN, as torch does."""
    kt = row // KH
    kh = row % KH
    t, h, w = t0 + kt, h0 + kh, w0 + kw
    inside = (t >= 0) & (t < T) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = x + ((kt * H + kh).to(tl.int64) * W + kw) * C + offsets
    v = tl.load(at, mask=inside[:, None] & ok, other=outside).to(tl.float32) * sign
    take = (v > best) | (v != v)
    return tl.where(take, v, best), tl.where(take, row * KW + kw, index)


@triton.jit
def max_pool_fwd_kernel(
    x,  # [N, T, H, W, C]
    record,  # [5, C] or None: pool relu(bn(x)) instead of x
    y,  # [N, To, Ho, Wo, C]
    winner,  # like y, or None: the element of x (not normalised) that won
    tap_of,  # uint8, like y, or None: its tap; NO_TAP where the ReLU is off
    P,  # N To Ho Wo
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
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin(PDL)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    ok = (p < P)[:, None] & c_mask[None, :]
    t0 = p // Wo // Ho % To * ST - PT
    h0 = p // Wo % Ho * SH - PH
    w0 = p % Wo * SW - PW
    corner = (p // Wo // Ho // To * T + t0).to(tl.int64) * H + h0
    offsets = ((corner * W + w0) * C)[:, None] + c[None, :]

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
    # A loop over the rows of the window that stays a loop: unrolled, ptxas puts off all choices of `index` to the end
    # and hoards their predicates in registers, bit by bit.
    for row in range(KT * KH):
        if KW <= 8:
            for kw in tl.static_range(KW):
                best, index = _take(row, kw, x, offsets, ok, t0, h0, w0, best, index, sign, outside, T, H, W, C, KH, KW)
        else:
            for kw in range(KW):
                best, index = _take(row, kw, x, offsets, ok, t0, h0, w0, best, index, sign, outside, T, H, W, C, KH, KW)

    out = (p.to(tl.int64) * C)[:, None] + c[None, :]
    if NORM:
        at = (tl.maximum(-t0, 0) * H + tl.maximum(-h0, 0)).to(tl.int64) * W + tl.maximum(-w0, 0)
        at = x + (at * C)[:, None] + offsets
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
    total = tl.zeros((n.shape[0], c.shape[0]), tl.float32)
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
    P,  # N T H W
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
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (p < P)[:, None] & (c < C)[None, :]
    n = p // W // H // T
    t = p // W // H % T + PT
    h = p // W % H + PH
    w = p % W + PW
    total = pool_gradient(g, tap_of, n, t, h, w, ok, c, To, Ho, Wo, C, KT, KH, KW, ST, SH, SW, NT, NH, NW, UNROLL)
    tl.store(dx + (p.to(tl.int64) * C)[:, None] + c[None, :], total.to(dx.dtype.element_ty), mask=ok)


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


def _tile(channels: int) -> dict:
    """8 elements a thread: a bfloat16 row of 64 channels is read 16 bytes at a time, and registers stay few."""
    block_c = block(channels, 8, 64)
    return {"BLOCK_P": 1024 // block_c, "BLOCK_C": block_c, "num_warps": 4}


def _geometry(kernel, stride, padding) -> dict:
    names = ("KT", "KH", "KW", "ST", "SH", "SW", "PT", "PH", "PW")
    return dict(zip(names, (*kernel, *stride, *padding)))


def pool_fwd(x, kernel, stride, padding, ceil_mode, record=None, save_tap=False, save_winner=False):
    """(y, tap or None, winner or None) of x in NDHWC memory; with `record`, of relu(bn(x))."""
    geometry = kernel, stride, padding
    key = x.shape, x.dtype, x.device, geometry, ceil_mode, record is None, save_tap, save_winner
    plan = plan_for((max_pool_fwd_kernel, *key), lambda: _fwd_plan(x, geometry, ceil_mode))
    y = empty_ndhwc(plan.shape, x)
    winner = torch.empty_like(y) if save_winner else None
    tap = torch.empty_like(y, dtype=torch.uint8) if save_tap else None
    plan(x, record, y, winner, tap)
    return y, tap, winner


def _fwd_plan(x: Tensor, geometry: tuple, ceil_mode: bool) -> Plan:
    n, channels, *sizes = x.shape
    out = out_sizes(sizes, *geometry, ceil_mode)
    positions, tile = n * math.prod(out), _tile(channels)
    plan = Plan(
        max_pool_fwd_kernel, (cdiv(positions, tile["BLOCK_P"]), cdiv(channels, tile["BLOCK_C"])),
        (positions, *sizes, *out), C=channels, **_geometry(*geometry),
        UNROLL=math.prod(geometry[0]) <= UNROLLED_TAPS, **dependent_launch(x.device), **tile,
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
    positions, tile = n * math.prod(sizes), _tile(channels)
    windows = [cdiv(k, s) for k, s in zip(*geometry[:2])]  # that cover a position, at most
    return Plan(
        max_pool_bwd_kernel, (cdiv(positions, tile["BLOCK_P"]), cdiv(channels, tile["BLOCK_C"])),
        (positions, *sizes, *out), C=channels, **_geometry(*geometry), **dict(zip(("NT", "NH", "NW"), windows)),
        UNROLL=math.prod(windows) <= UNROLLED_TAPS, **tile,
    )  # fmt: skip


# --- autograd and registration ---------------------------------------------------------------------------------------


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, stride, padding, ceil_mode):
        y, tap, _ = pool_fwd(ndhwc(x), kernel, stride, padding, ceil_mode, save_tap=True)
        ctx.save_for_backward(tap)
        ctx.geometry = tuple(x.shape[2:]), kernel, stride, padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return pool_bwd(g, *ctx.saved_tensors, *ctx.geometry), None, None, None, None


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
    check_activation("x", x)
    kernel, stride, padding = _triple("kernel", kernel), _triple("stride", stride), _triple("padding", padding)
    for name, value in (("kernel", kernel), ("stride", stride)):
        if min(value) < 1:
            raise ValueError(f"{name}: expected positive sizes, got {value}")
    if any(p < 0 or 2 * p > k for p, k in zip(padding, kernel)):
        raise ValueError(f"padding: expected 0 to half of kernel {kernel}, got {padding}")
    if min(out := out_sizes(x.shape[2:], kernel, stride, padding, ceil_mode)) < 1:
        raise ValueError(f"x: expected (T, H, W) that window {kernel} fits, got {tuple(x.shape[2:])} (output {out})")
    offers = ("triton", "aten")
    if x.numel() == 0 or _backends.choose("max_pool", x, lambda b: why_not(b, x, kernel), offers) == "aten":
        return reference.max_pool(x, kernel, stride, padding, ceil_mode)
    if torch.compiler.is_compiling():
        return torch.ops.p3d.max_pool(x, kernel, stride, padding, ceil_mode)[0]
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x, kernel, stride, padding, ceil_mode)
    return pool_fwd(ndhwc(x), kernel, stride, padding, ceil_mode)[0]
