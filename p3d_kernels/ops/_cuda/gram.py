"""Gradients through the Gram identity, ops/_gram.py: csrc/gram_bwd.cu, conv_train.cu, conv_tiles.cu, conv_infer.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from .._triton import Operand
from ._common import (
    _DTYPES,
    _check_activation,
    _check_dtype,
    _check_matrix,
    _check_operand,
    _check_rows,
    _conv_wgrad_out,
    _native,
)


def _gram_sizes(x: Operand, ci: int, loads: int, sums: bool) -> tuple:
    """Those of the gradient of a convolution of x to the `ci` channels of g."""
    n, m, t, *size = x.a.shape
    return n, t, size[0] * size[1], ci, m, 1, True, x.read, loads, sums


def _gram_operand_why_not(name: str, x: Operand) -> str | None:
    if x.a.dtype not in _DTYPES:
        return f"{name}: dtype {x.a.dtype} (expected bfloat16 or float16)"
    if x.read not in ("raw", "bn_relu", "join_port", "join_b", "join_c"):
        return f"{name}: read {x.read} (expected an activation)"
    native = _backends.native()
    return native if isinstance(native, str) else None


def _gram_bwd_sizes(x: Operand, g: Tensor, y: Tensor | None) -> tuple:
    n, m, t, *size = x.a.shape
    return n * t, *size, m, g.size(1), x.read, y is not None, g.shape[2:] != x.a.shape[2:]


def _thin(dims: Sequence[int]) -> tuple[int, int, int]:
    """T, H, W of every second row and column."""
    return _conv_wgrad_out(dims, (1, 2))


def gram_bwd_why_not(x: Operand, g: Tensor, y: Tensor | None) -> str | None:
    """Why `gram_bwd`, or `gram_add` after it, cannot run these, or None."""
    dims = tuple(x.a.shape[2:])
    if tuple(g.shape[2:]) not in (dims, _thin(dims)):
        return f"gram_bwd: a gradient at {list(g.shape[2:])} (expected {list(dims)} or {list(_thin(dims))})"
    if why := _gram_operand_why_not("gram_bwd", x):
        return why
    native = _backends.native()
    why = native.gram_bwd_why_not(_gram_bwd_sizes(x, g, y))
    return why or native.conv_train_why_not(_gram_sizes(x, x.channels, g.size(1) // GRAM_COUTS, False))


GRAM_COUTS = 256  # of g, of which `gram_bwd` makes one v


def gram_bwd(
    g: Tensor,  # [N, Co, T, H, W], or thin [N, Co, T, ceil(H / 2), ceil(W / 2)]
    y: Tensor | None,  # like g
    record: Tensor,  # [3, Co] or more rows
    w: Tensor,  # [Co, M]
    x: Operand,  # [N, M, T, H, W]
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, scales, part): the Gram identity's pass over the wide gradient, ops/_gram.py; M is 64 or 128, Co 256 or 512.

    With g counted where not y <= 0 (everywhere without y) and a what x reads, thin at every second row and column, part
    has M = g^T a and the sums of g, and v is g (scale w), scale of `record`, the factor rounded; float32 accumulation.

    Returns:
        v float16 [Co / 256 parts to be added up, N, M, *grid of g], each channels_last_3d, which is to be multiplied
        with scales, float32 [parts, positions of g, M / 64], powers of two; and float32 [R, Co * M + Co], to be summed.
        Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `gram_bwd_why_not` says), or CUDA failed.
    """
    (n, m, *dims), co, dtype, device = x.a.shape, g.size(1), x.a.dtype, g.device
    _check_dtype("x.a", dtype)
    _check_operand("x", x, tuple(x.a.shape), dtype)
    if tuple(g.shape[2:]) == _thin(dims):
        dims = _thin(dims)
    for name, tensor in (("g", g), ("y", y)):
        if tensor is not None:
            _check_activation(name, tensor, (n, co, *dims), dtype)
    _check_rows("record", record, 3, co)
    _check_matrix("w", w, (co, m), dtype)
    sizes = _gram_bwd_sizes(x, g, y)

    def build() -> NativePlan:
        native = _native()
        rest = sizes, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.gram_bwd(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.gram_bwd_partials(sizes)
        return plan

    v = alloc((max(1, co // GRAM_COUTS), n, *dims, m), device, torch.float16)
    scales = alloc((v.size(0), n * math.prod(dims), m // 64), device)
    if g.numel() == 0:
        return v.movedim(-1, 2), scales, torch.zeros(1, co * m + co, device=device)
    plan = plan_for(("gram_bwd", sizes, dtype, device), build)
    part = alloc((plan.rows, co * m + co), device)
    plan(*x.args()[:4], g, y, record, w, v, scales, part)
    return v.movedim(-1, 2), scales, part


def gram_add(
    v: Tensor,  # float16 [parts, N, M, T, H, W], or thin [parts, N, M, T, ceil(H / 2), ceil(W / 2)]
    scales: Tensor,  # [parts, positions of v, M / 64]
    x: Operand,  # [N, M, T, H, W]
    q: Tensor,  # [M, M]
    q_scale: Tensor | None,  # [M] float32
    c: Tensor,  # [parts, M] float32
    sums_a: bool = False,
    sums_b: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """(da, partial sums for the norms of x's a and b): the end of the gradient through the Gram identity, ops/_gram.py.

    u = sum of v, scaled, + (a q) q_scale + sum of c, a what x reads, rounded; da is, of a join, what its outer ReLU
    passes of u, times 0.5 in join_c. A thin v is that of every second row and column, and zero elsewhere. float32
    accumulation. v and scales: by `gram_bwd`.

    Returns and Raises: as `gram_dgrad`.
    """
    (n, m, *dims), dtype, device = x.a.shape, x.a.dtype, x.a.device
    _check_dtype("x.a", dtype)
    _check_operand("x", x, tuple(x.a.shape), dtype)
    thin = tuple(v.shape[3:]) != tuple(dims)
    of_v = _thin(dims) if thin else dims
    for part in v:
        _check_activation("v", part, (n, m, *of_v), torch.float16)
    if v.size(0) not in (1, 2) or (v.size(0) == 2 and v.stride(0) != v[0].numel()):
        raise ValueError(f"v: expected one part or two that follow one another, got {v.size(0)}")
    _check_matrix("scales", scales, (v.size(0), n * math.prod(of_v), m // 64), torch.float32)
    _check_gram(x, q, q_scale, c, sums_a, sums_b)
    da = alloc((n, m, *dims), device, dtype)
    if da.numel() == 0:
        return da, tuple([torch.zeros(1, 2, m, device=device) if s else None for s in (sums_a, sums_b)])
    sizes = _gram_sizes(x, m, v.size(0), sums_a or sums_b)

    def build() -> NativePlan:
        native = _native()
        rest = c.size(0), dims[-1] if thin else 0, sizes, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.gram_add(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.conv_train_partials(sizes)
        return plan

    plan = plan_for(("gram_add", sizes, dims[-1] if thin else 0, c.size(0), dtype, device), build)
    parts = tuple([alloc((plan.rows, 2, m), device) if s else None for s in (sums_a, sums_b)])
    plan(*x.args()[:4], v, scales, q, q_scale, c, da, *parts)
    return da, parts


def _check_gram(x: Operand, q: Tensor, q_scale: Tensor | None, c: Tensor, sums_a: bool, sums_b: bool) -> None:
    m, dtype = x.channels, x.a.dtype
    _check_matrix("q", q, (m, m), dtype)
    _check_rows("c", c, 1, m)
    if q_scale is not None:
        _check_matrix("q_scale", q_scale, (m,), torch.float32)
    if (sums_a and x.record_a is None) or (sums_b and x.b is None):
        raise ValueError("sums_a, sums_b: expected True for tensors that x normalises only")


def _gram_tiles_sizes(x: Operand, g: Tensor, sums: bool, stride: int) -> tuple:
    return _gram_sizes(x, g.size(1), 0, sums), x.a.size(4), stride, True


def gram_tiles_why_not(x: Operand, g: Tensor, stride: int = 1) -> str | None:
    """Why `gram_dgrad` cannot run these, or None."""
    if why := _gram_operand_why_not("gram_tiles", x):
        return why
    return _backends.native().conv_tiles_why_not(*_gram_tiles_sizes(x, g, False, stride))


def gram_dgrad(
    g: Tensor,  # [N, Co, T, H, W]
    y: Tensor | None,  # like g
    record: Tensor,  # [3, Co] or more rows
    w: Tensor,  # [Co, M]
    x: Operand,  # [N, M, T, H, W], with a stride on the larger grid
    q: Tensor,  # [M, M]
    q_scale: Tensor | None,  # [M] float32
    c: Tensor,  # [parts, M] float32
    sums_a: bool = False,
    sums_b: bool = False,
    stride: int = 1,
    tile: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """(da, partial sums for the norms of x's a and b): the gradient through the Gram identity, ops/_gram.py.

    u = (scale g [y > 0]) W + (a q) q_scale + sum of c, a what x reads, scale of `record`, both operands rounded; of a
    join da is what its outer ReLU passes of u, times 0.5 in join_c. Without y, g is masked already. With a stride in
    space all of x is read at every stride-th row and column. q_scale is of float16 alone. `tile`: (rows, columns,
    splits) of the plan, 0 for any. float32 accumulation.

    Returns:
        da [N, M, *grid of g] channels_last_3d, and for a and b, where asked for, float32 [R, 2, M] rows (sum t,
        sum t (z - mean)), t the rounded da where the ReLU of z passes it (join_b and join_c: all of it for b). Runs of
        the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `gram_tiles_why_not` says), or CUDA failed.
    """
    (n, m, *dims), co, dtype, device = x.a.shape, g.size(1), x.a.dtype, g.device
    dims = _conv_wgrad_out(dims, (1, stride))
    _check_dtype("x.a", dtype)
    _check_operand("x", x, tuple(x.a.shape), dtype)
    for name, tensor in (("g", g), ("y", y)):
        if tensor is not None:
            _check_activation(name, tensor, (n, co, *dims), dtype)
    _check_rows("record", record, 3, co)
    _check_matrix("w", w, (co, m), dtype)
    _check_gram(x, q, q_scale, c, sums_a, sums_b)

    da = alloc((n, m, *dims), device, dtype)
    if da.numel() == 0:
        return da, tuple([torch.zeros(1, 2, m, device=device) if s else None for s in (sums_a, sums_b)])
    tiles = _gram_tiles_sizes(x, g, sums_a or sums_b, stride)

    def build() -> NativePlan:
        native = _native()
        with torch.cuda.device(device):
            how, rows = native.conv_tiles_plan(*tiles, tile)
        sizes, width, *_ = tiles
        rest, where = (c.size(0), sizes, _DTYPES[dtype]), (width, stride, how)
        plan = NativePlan(lambda stream, *addresses: native.gram_tiles(*addresses, *rest, stream, *where))
        plan.rows = rows
        return plan

    plan = plan_for(("gram_dgrad in CUDA", tiles, tile, c.size(0), dtype, device), build)
    parts = tuple([alloc((plan.rows, 2, m), device) if s else None for s in (sums_a, sums_b)])
    plan(*x.args()[:4], g, y, record, w, q, q_scale, c, da, *parts)
    return da, parts


def _gram_raw_sizes(x: Tensor, g: Tensor) -> tuple:
    n, m, *dims = x.shape
    return n, *dims, m, g.size(1)


def gram_raw_why_not(x: Tensor, g: Tensor) -> str | None:
    """Why `gram_raw` cannot run these, or None."""
    if x.dtype not in _DTYPES:
        return f"gram_raw: dtype {x.dtype} (expected bfloat16 or float16)"
    if x.shape[2:] != g.shape[2:]:
        return f"gram_raw: a gradient at {list(g.shape[2:])} (expected {list(x.shape[2:])})"
    native = _backends.native()
    return native if isinstance(native, str) else native.gram_raw_why_not(_gram_raw_sizes(x, g))


def gram_raw(
    g: Tensor,  # [N, Co, T, H, W]
    x: Tensor,  # [N, M, T, H, W]
    w: Tensor,  # [Co + M, M]
    c: Tensor,  # [parts, M] float32
    tile: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """g w[:Co] + x w[Co:] + sum of c: `gram_dgrad` of a g that is masked already and a raw x on one grid.

    w has scale w, rounded, and q. `tile`: (rows, columns, splits) of the plan, 0 for any. float32 accumulation, one
    rounding.

    Returns:
        [N, M, T, H, W] channels_last_3d. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `gram_raw_why_not` says), or CUDA failed.
    """
    (n, m, *dims), co, dtype, device = x.shape, g.size(1), x.dtype, g.device
    _check_dtype("x", dtype)
    _check_activation("x", x, x.shape, dtype)
    _check_activation("g", g, (n, co, *dims), dtype)
    _check_matrix("w", w, (co + m, m), dtype)
    _check_rows("c", c, 1, m)
    da = alloc((n, m, *dims), device, dtype)
    if da.numel() == 0:
        return da
    sizes = _gram_raw_sizes(x, g)

    def build() -> NativePlan:
        native = _native()
        with torch.cuda.device(device):
            rest = c.size(0), sizes, native.gram_raw_plan(sizes, tile), _DTYPES[dtype]
        return NativePlan(lambda stream, *addresses: native.gram_raw(*addresses, *rest, stream))

    plan_for(("gram_raw", sizes, tile, c.size(0), dtype, device), build)(g, x, w, c, da)
    return da
