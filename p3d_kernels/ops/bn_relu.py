"""Batch normalisation, ReLU and an optional residual in one pass over the tensor; two when batch statistics are needed.

Inside a block no such pass exists: the convolutions normalise as they read. This op is for what stands alone.

With P positions a channel, z = x, xhat = (z - mean) invstd, u = weight xhat + bias, y = relu(u + residual) and
g = dy [y > 0]:

    dresidual = g      dbias = sum g      dweight = sum g xhat
    dx = weight invstd (g - dbias/P - xhat dweight/P)      batch statistics
    dx = weight invstd g                                   running statistics
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .._backends import choose
from .._checks import check_activation
from .._norm import Norm, check_norm, update_running
from ._triton import (
    MAX_POSITIONS,
    affine,
    block,
    bn_bwd_finalise,
    bn_finalise,
    cdiv,
    empty_ndhwc,
    ndhwc,
    relu,
    tl,
    triton,
)

MAX_TILES = 2048  # rows of partial sums; a tile takes more steps instead


@triton.jit
def bn_relu_stats_kernel(x, part, P, steps, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row `tile` of the partial statistics [R, 3, C] of x [P, C]: (n, mean, sum of squares about it), in float64.

    Sums are taken about a pivot, the mean of the tile's first step, so that a large mean cancels before it is squared.
    """
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    first = tile.to(tl.int64) * steps * BLOCK_P
    p = first + tl.arange(0, BLOCK_P)
    mask = (p < P)[:, None] & c_mask[None, :]
    v = tl.load(x + p[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(v, 0) / tl.minimum(P - first, BLOCK_P).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(steps):
        p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & c_mask[None, :]
        v = tl.load(x + p[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, v - pivot[None, :], 0.0)
        total += d
        square += d * d
    n = tl.minimum(P - first, steps * BLOCK_P).to(tl.float64)
    shift = tl.sum(total, 0).to(tl.float64) / n
    row = part + tile.to(tl.int64) * 3 * C + c
    tl.store(row, tl.zeros_like(shift) + n, mask=c_mask)
    tl.store(row + C, pivot.to(tl.float64) + shift, mask=c_mask)
    tl.store(row + 2 * C, tl.sum(square, 0).to(tl.float64) - n * shift * shift, mask=c_mask)


@triton.jit
def bn_relu_apply_kernel(
    x,  # [P, C]
    residual,  # [P, C] or None
    record,  # [5, C]
    y,  # [P, C]
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    mask = (p < P)[:, None] & c_mask[None, :]
    offsets = p[:, None] * C + c[None, :]
    u = affine(tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32), record, c, c_mask, C)
    if residual is not None:
        u += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, relu(u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def masked_gradient(dy, x, y, record, offsets, mask, c, c_mask, C: tl.constexpr):
    """(g, x): dy where the ReLU was open, by its output y where that was saved, else by recomputing u from x."""
    g = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        closed = tl.load(y + offsets, mask=mask, other=0.0) <= 0
    else:
        closed = affine(v, record, c, c_mask, C) <= 0
    return tl.where(closed, 0.0, g), v


@triton.jit
def bn_relu_sums_kernel(
    dy,  # [P, C]
    x,  # [P, C]
    y,  # [P, C] or None
    record,  # [5, C]
    part,  # [R, 2, C], rows (sum g, sum g (x - mean))
    P,
    steps,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    first = tile.to(tl.int64) * steps * BLOCK_P
    mean = tl.load(record + c, mask=c_mask, other=0.0)[None, :]
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(steps):
        p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & c_mask[None, :]
        g, v = masked_gradient(dy, x, y, record, p[:, None] * C + c[None, :], mask, c, c_mask, C)
        g = tl.where(mask, g, 0.0)
        sum_g += g
        sum_gx += tl.where(mask, g * (v - mean), 0.0)
    row = part + tile.to(tl.int64) * 2 * C + c
    tl.store(row, tl.sum(sum_g, 0), mask=c_mask)
    tl.store(row + C, tl.sum(sum_gx, 0), mask=c_mask)


@triton.jit
def bn_relu_bwd_kernel(
    dy,  # [P, C]
    x,  # [P, C]
    y,  # [P, C] or None
    record,  # [5, C]
    sums,  # [4, C], rows (c0, c1, dweight, dbias); None with running statistics
    dx,  # [P, C] or None
    dresidual,  # [P, C] or None
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    mask = (p < P)[:, None] & c_mask[None, :]
    offsets = p[:, None] * C + c[None, :]
    g, v = masked_gradient(dy, x, y, record, offsets, mask, c, c_mask, C)
    if dresidual is not None:
        tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=mask)
    if dx is not None:
        if sums is not None:  # dz = scale (g - c0 - (z - mean) c1)
            mean = tl.load(record + c, mask=c_mask, other=0.0)[None, :]
            c0 = tl.load(sums + c, mask=c_mask, other=0.0)[None, :]
            c1 = tl.load(sums + C + c, mask=c_mask, other=0.0)[None, :]
            g = g - c0 - (v - mean) * c1
        g *= tl.load(record + C + c, mask=c_mask, other=0.0)[None, :]
        tl.store(dx + offsets, g.to(dx.dtype.element_ty), mask=mask)


def _tile(channels: int) -> dict:
    block_c = block(channels, 1, 64)
    return {"BLOCK_P": 4096 // block_c, "BLOCK_C": block_c, "num_warps": 4}


def _grid(positions: int, channels: int, tile: dict) -> tuple[int, int]:
    return cdiv(positions, tile["BLOCK_P"]), cdiv(channels, tile["BLOCK_C"])


def _tiles(positions: int, tile: dict) -> tuple[int, int]:
    """(tiles, steps a tile) for a reduction over positions: set by the shape alone, so sums are reproducible."""
    steps = cdiv(positions, tile["BLOCK_P"] * MAX_TILES)
    return cdiv(positions, tile["BLOCK_P"] * steps), steps


def _forward(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """y and the BN record [5, C] (rows mean, scale, bias, invstd, unbiased variance) in float32."""
    channels, positions = x.size(1), x.numel() // x.size(1)
    x, residual = ndhwc(x), None if residual is None else ndhwc(residual)
    tile = _tile(channels)
    grid = _grid(positions, channels, tile)
    with torch.cuda.device_of(x):
        part = None
        if norm.training:
            tiles, steps = _tiles(positions, tile)
            part = torch.empty((tiles, 3, channels), device=x.device, dtype=torch.float64)
            bn_relu_stats_kernel[(tiles, grid[1])](x, part, positions, steps, C=channels, **tile)
        record = bn_finalise(norm, channels, part, x.device)
        y = empty_ndhwc(x.shape, x)
        bn_relu_apply_kernel[grid](x, residual, record, y, positions, C=channels, **tile)
    return y, record


def _backward(
    dy: Tensor, x: Tensor, y: Tensor | None, record: Tensor, training: bool, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, sums [4, C]), each only if `wanted`; y masks if given, else u recomputed from x."""
    channels, positions = x.size(1), x.numel() // x.size(1)
    dy, x = ndhwc(dy), ndhwc(x)
    tile = _tile(channels)
    grid = _grid(positions, channels, tile)
    want_dx, want_dresidual, want_sums = wanted
    dx = dresidual = sums = None
    with torch.cuda.device_of(x):
        if want_sums or (want_dx and training):
            tiles, steps = _tiles(positions, tile)
            part = torch.empty((tiles, 2, channels), device=x.device, dtype=torch.float32)
            bn_relu_sums_kernel[(tiles, grid[1])](dy, x, y, record, part, positions, steps, C=channels, **tile)
            sums = bn_bwd_finalise(part, record, positions, training)
        if want_dx or want_dresidual:
            dx = empty_ndhwc(x.shape, x) if want_dx else None
            dresidual = empty_ndhwc(x.shape, x) if want_dresidual else None
            args = dy, x, y, record, sums if training else None, dx, dresidual
            bn_relu_bwd_kernel[grid](*args, positions, C=channels, **tile)
    return dx, dresidual, sums


class _BnRelu(torch.autograd.Function):
    """Saves x, the record and, with a residual, y."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, norm):
        y, record = _forward(x, residual, norm)
        ctx.save_for_backward(x, record, None if residual is None else y, weight, bias)
        ctx.training = norm.training
        ctx.mark_non_differentiable(record)
        return y, record

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, record, y, weight, bias = ctx.saved_tensors
        want_dx, want_dresidual, want_dweight, want_dbias, _ = ctx.needs_input_grad
        wanted = want_dx, want_dresidual, want_dweight or want_dbias
        dx, dresidual, sums = _backward(dy, x, y, record, ctx.training, wanted)
        dweight = sums[2].to(weight.dtype) if want_dweight else None
        dbias = sums[3].to(bias.dtype) if want_dbias else None
        return dx, dresidual, dweight, dbias, None


# The same for torch.compile and torch.export, which cannot look into a kernel launch. Eager calls go past it: a
# registered op costs tens of microseconds a call.


@torch.library.custom_op(
    "p3d::bn_relu",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "bool training, float eps) -> (Tensor, Tensor)",
)
def _bn_relu_op(x, residual, weight, bias, running_mean, running_var, training, eps):
    return _forward(x, residual, Norm(weight, bias, running_mean, running_var, training=training, eps=eps))


@_bn_relu_op.register_fake
def _(x, residual, weight, bias, running_mean, running_var, training, eps):
    return empty_ndhwc(x.shape, x), x.new_empty((5, x.size(1)), dtype=torch.float32)


@torch.library.custom_op(
    "p3d::bn_relu_bwd",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? y, Tensor record, bool training) -> (Tensor, Tensor, Tensor)",
)
def _bn_relu_bwd_op(dy, x, y, record, training):
    dx, dresidual, sums = _backward(dy, x, y, record, training, (True, y is not None, True))
    return dx, dx.new_empty(0) if dresidual is None else dresidual, sums


@_bn_relu_bwd_op.register_fake
def _(dy, x, y, record, training):
    dresidual = x.new_empty(0) if y is None else empty_ndhwc(x.shape, x)
    return empty_ndhwc(x.shape, x), dresidual, x.new_empty((4, x.size(1)), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, _, ctx.training, _ = inputs
    y, record = output
    ctx.dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x, record, None if residual is None else y)


def _op_backward(ctx, dy, _):
    x, record, y = ctx.saved_tensors
    dx, dresidual, sums = torch.ops.p3d.bn_relu_bwd(dy, x, y, record, ctx.training)
    dweight, dbias = (None if dtype is None else s.to(dtype) for dtype, s in zip(ctx.dtypes, (sums[2], sums[3])))
    return dx, None if y is None else dresidual, dweight, dbias, None, None, None, None


_bn_relu_op.register_autograd(_op_backward, setup_context=_setup_context)


def bn_relu(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """y = relu(bn(x)) or relu(bn(x) + residual), with bn(x) = (x - mean) / sqrt(var + eps) * weight + bias.

    Equivalent to `relu(batch_norm(x) [+ residual])` with the BatchNorm3d that `norm` describes.

    Args:
        x: [N, C, T, H, W]; float32, float16 or bfloat16 (float64 in plain PyTorch); any strides, any device.
        norm: parameters, running statistics and mode, [C] each. Running statistics move after the forward succeeded.
        residual: the shape, dtype and device of x, or None.

    Returns:
        [N, C, T, H, W] of x's dtype in NDHWC memory (channels_last_3d; PyTorch's choice on the aten path).

    Numerics: statistics, normalisation and sum in float32 (combined in float64), rounded once at the end. Sums run in
    a fixed order: forward and backward are equal bit for bit from run to run. Autocast changes nothing: the op runs in
    the dtype of x, as batch_norm does.

    Passes: statistics, apply, backward sums and backward are Triton kernels; plain PyTorch runs where they cannot.

    Raises:
        TypeError: x is no floating-point tensor, norm is no Norm, residual has another dtype.
        ValueError: x has not 5 dimensions, a member of norm has another shape or device, residual has another shape
            or device, or there is one value a channel when training.

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, section 3; the backward is derived above.
    """
    check_activation("x", x)
    check_norm("norm", norm, x.size(1), x)
    if residual is not None:
        check_activation("residual", residual, x.size(1))
        for what, got, want in (
            ("shape", list(residual.shape), list(x.shape)),
            ("device", residual.device, x.device),
        ):
            if got != want:
                raise ValueError(f"residual: expected {what} {want} (that of x), got {got}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected dtype {x.dtype} (that of x), got {residual.dtype}")

    def reason(backend: str) -> str | None:
        positions = x.numel() // x.size(1)
        return None if positions <= MAX_POSITIONS else f"{positions} positions (at most {MAX_POSITIONS})"

    if x.numel() == 0 or choose("bn_relu", x, reason, ("triton", "aten")) == "aten":
        return reference.bn_relu(x, norm, residual)

    leaves = x, residual, norm.weight, norm.bias
    if torch.compiler.is_compiling():
        stats = norm.running_mean, norm.running_var
        y, record = torch.ops.p3d.bn_relu(x, residual, norm.weight, norm.bias, *stats, norm.training, norm.eps)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        y, record = _BnRelu.apply(*leaves, norm)
    else:
        y, record = _forward(x, residual, norm)
    if norm.updates:
        update_running([norm], [record[0]], [record[4]])
    return y
