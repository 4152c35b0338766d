"""Weight gradients of 1x1x1 and 3x1x1 convolutions of operands that are read: csrc/conv_wgrad.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from .._triton import Operand
from ._common import _DTYPES, _TENSORS, _check_dtype, _check_operand, _conv_wgrad_out, _native


def _conv_wgrad_sizes(
    g: Operand, x: Operand, taps: tuple[int, int, int], stride: tuple[int, int], totals: bool
) -> tuple:
    n, ci, *dims = x.a.shape
    out = _conv_wgrad_out(dims, stride)
    space = stride[1] if out != tuple(dims) else 1  # a stride of maps of one position skips nothing
    strided = tuple(g.a.shape[2:]) != out
    return n, *dims, ci, g.channels, taps[0], space, strided, totals, g is x, g.read, x.read


_CENTRED = ("raw", "bn_relu", "join_port", "join_b", "join_c")  # reads that a centre may be taken off


def conv_wgrad_why_not(
    g: Operand,
    x: Operand,
    taps: tuple[int, int, int],
    stride: tuple[int, int],
    totals: bool = False,
    centre: Tensor | None = None,
) -> str | None:
    """Why `conv_wgrad` cannot run these operands, or None."""
    if centre is not None and (g is not x or x.read not in _CENTRED):
        return f"conv_wgrad: centre of reads {g.read}, {x.read} (expected one operand, {', '.join(_CENTRED)})"
    for operand in (g, x):
        if operand.a.dtype not in _DTYPES:
            return f"conv_wgrad: dtype {operand.a.dtype} (expected bfloat16 or float16)"
        if operand.read not in _TENSORS:
            return f"conv_wgrad: read {operand.read} (expected one of {', '.join(_TENSORS)})"
    if taps not in ((1, 1, 1), (3, 1, 1)) or stride[0] != 1:
        return f"conv_wgrad: taps {taps}, stride {stride} (expected 1x1x1 or 3x1x1, stride 1 in time)"
    native = _backends.native()
    if isinstance(native, str):
        return native
    return native.conv_wgrad_why_not(_conv_wgrad_sizes(g, x, taps, stride, totals))


def conv_wgrad(
    g: Operand,  # [N, Co, To, Ho, Wo], or, of 1x1x1, on the grid of x
    x: Operand,  # [N, Ci, T, H, W]
    taps: tuple[int, int, int],
    stride: tuple[int, int],
    totals: bool = False,
    centre: Tensor | None = None,  # [Ci] float32, values of the dtype
) -> Tensor:
    """dw[co, tap, ci] = sum_p g[p, co] x[p * stride + tap, ci] of a 1x1x1 or 3x1x1 convolution, in parts.

    `stride`: (time, space), (1, 1), or (1, 2) of 1x1x1; g on the grid of x is read with it too. An operand is what its
    read makes of its tensors, rounded to the dtype, once an element and block; float32 accumulation. `totals`: also sum
    g over positions, with 1x1x1. Where g is x, pass one object: it is read once where it can be. `centre`: taken off
    that one operand, the differences rounded to the dtype.

    Returns:
        float32 [R, Co * taps * Ci], or with `totals` [R, Co * Ci + Co], each row [Co, taps, Ci], then [Co], the sum
        over a part of the positions. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `conv_wgrad_why_not` says), or CUDA failed.
    """
    n, ci, *dims = x.a.shape
    dtype, co, out = x.a.dtype, g.channels, _conv_wgrad_out(dims, stride)
    _check_dtype("x.a", dtype)
    if totals and taps != (1, 1, 1):
        raise ValueError(f"totals: expected False with taps {taps}, got True")
    if centre is not None and (g is not x or x.read not in _CENTRED):
        raise ValueError(f"centre: expected None unless g is x, read as one of {', '.join(_CENTRED)}")
    if centre is not None and (centre.dtype != torch.float32 or centre.shape != (ci,) or not centre.is_contiguous()):
        raise ValueError(f"centre: expected contiguous float32 [{ci}], got {centre.dtype} {list(centre.shape)}")
    grid = tuple(g.a.shape[2:])
    if taps == (1, 1, 1) and grid == tuple(dims):
        out = grid
    _check_operand("x", x, tuple(x.a.shape), dtype)
    _check_operand("g", g, (n, co, *out), dtype)
    outputs = co * (taps[0] * ci + totals)
    if x.a.numel() == 0:
        return torch.zeros(1, outputs, device=x.a.device)
    sizes = _conv_wgrad_sizes(g, x, taps, stride, totals)

    def build() -> NativePlan:
        native = _native()
        plan = NativePlan(lambda stream, *addresses: native.conv_wgrad(*addresses, sizes, _DTYPES[dtype], stream))
        with torch.cuda.device(x.a.device):
            plan.rows = native.conv_wgrad_partials(sizes)
        return plan

    plan = plan_for(("conv_wgrad in CUDA", sizes, dtype, x.a.device), build)
    part = alloc((plan.rows, outputs), x.a.device)
    plan(*g.args(), *x.args(), centre, part)
    return part
