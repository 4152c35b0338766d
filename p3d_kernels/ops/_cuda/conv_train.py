"""1x1x1 and 3x1x1 convolutions in training, also transposed: csrc/conv_train.cu, conv_tiles.cu, conv_infer.cu."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from .._triton import Operand
from ._common import (
    _DTYPES,
    _TENSORS,
    _check_activation,
    _check_matrix,
    _check_operand,
    _check_rows,
    _conv_wgrad_out,
    _native,
)

_TRAIN_READS = tuple([read for read in _TENSORS if read != "masked"])


def _conv_train_sizes(
    x: Operand, w: Tensor, transposed: bool, o: Tensor | None, o_mask: Tensor | None, below: tuple | None, sums: bool
) -> tuple:
    n, ci, t, *size = x.a.shape
    loads = (o is not None) + (o_mask is not None) + (below is not None)
    return n, t, size[0] * size[1], ci, w.size(2 if transposed else 0), w.size(1), transposed, x.read, loads, sums


def _operand_why_not(kernel: str, x: Operand) -> str | None:
    if x.a.dtype not in _DTYPES:
        return f"{kernel}: dtype {x.a.dtype} (expected bfloat16 or float16)"
    if x.read not in _TRAIN_READS:
        return f"{kernel}: read {x.read} (expected one of {', '.join(_TRAIN_READS)})"
    return None


def conv_train_why_not(
    x: Operand,
    w: Tensor,
    transposed: bool = False,
    o: Tensor | None = None,
    o_mask: Tensor | None = None,
    below: tuple[Tensor, Tensor] | None = None,
    stats: bool = False,
) -> str | None:
    """Why `conv_train` cannot run these, or None."""
    if why := _operand_why_not("conv_train", x):
        return why
    native = _backends.native()
    if isinstance(native, str):
        return native
    sums = stats or below is not None
    return native.conv_train_why_not(_conv_train_sizes(x, w, transposed, o, o_mask, below, sums))


def _tiles_sizes(
    x: Operand, w: Tensor, transposed: bool, stride: int, dims: Sequence[int] | None, loads: tuple, sums: bool
) -> tuple:
    """(sizes, W, stride, gram) as the kernel by tiles takes them: of the larger grid, `dims` transposed."""
    n, ci, *size = x.a.shape
    t, h, width = dims if transposed and dims is not None else size
    sizes = n, t, h * width, ci, w.size(2 if transposed else 0), w.size(1), transposed, x.read
    return (*sizes, sum(load is not None for load in loads), sums), width, stride, False


def conv_tiles_why_not(
    x: Operand,
    w: Tensor,
    transposed: bool = False,
    o: Tensor | None = None,
    o_mask: Tensor | None = None,
    below: tuple[Tensor, Tensor] | None = None,
    stats: bool = False,
    stride: int = 1,
    dims: Sequence[int] | None = None,
) -> str | None:
    """Why `conv_train` has no kernel by tiles for these, or None."""
    if why := _operand_why_not("conv_tiles", x):
        return why
    if transposed and stride != 1 and (o_mask is not None or below is not None):
        return "conv_tiles: o_mask or below with a stride (expected neither in the gradient)"
    native = _backends.native()
    if isinstance(native, str):
        return native
    sums = stats or below is not None
    return native.conv_tiles_why_not(*_tiles_sizes(x, w, transposed, stride, dims, (o, o_mask, below), sums))


def conv_train(
    x: Operand,  # [N, Ci, T, H, W]
    w: Tensor,  # [Co, taps, Ci], transposed [Ci, taps, Co]
    transposed: bool = False,
    record: Tensor | None = None,  # [3, Co] or more rows
    o: Tensor | None = None,  # like y, as are the next two
    o_mask: Tensor | None = None,
    relu: bool = False,
    below: tuple[Tensor, Tensor] | None = None,  # and its record
    stats: bool = False,
    stride: int = 1,
    dims: Sequence[int] | None = None,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, part) of a 1x1x1 or 3x1x1 convolution of what x reads, by w, or its input gradient `transposed`.

    3x1x1 is padded by 1 in time. Forward, y = relu(bn(sum) + o), each part of it if its argument is given, bn the
    affine of `record`; the gradient is sum + o, o counted where not o_mask <= 0. `stride`: of 1x1x1, in space; its
    gradient has `dims` (T, H, W), and o lies on the grid of x. float32 accumulation.

    Three kernels: of 1x1x1, where one side has 64 or 128 channels and the stride is 1, an operand is read and rounded
    once an element or, of 128 channels, twice; else, or with `tile` (rows, columns, splits; 0: any), once for each tile
    of output channels. There products take a raw x from memory as it is, but for a strided gradient, `o_mask` and what
    the forward pass normalises or joins; of these gradients w may be read while the kernel before this one in the
    stream still runs.

    Returns:
        y [N, Co, T, H, W], H and W those of the stride, channels_last_3d, and float32 parts or None: with `stats`
        [R, 3, Co] rows (n, mean, M2) of the rounded y, some with n = 0; with `below` [R, 2, Co] rows (sum g,
        sum g (below - mean)), g the rounded y where the ReLU of `below` passes it, else 0. Runs of the same shape on
        the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: neither kernel can run (what `conv_train_why_not` and `conv_tiles_why_not` say), or CUDA failed.
    """
    (n, ci, *grid), dtype, device = x.a.shape, x.a.dtype, x.a.device
    if dtype not in _DTYPES or x.read not in _TRAIN_READS:
        raise ValueError(f"x: expected bfloat16 or float16 and a read that the kernel has, got {dtype}, {x.read!r}")
    if w.dim() != 3 or w.size(1) not in (1, 3) or w.size(0 if transposed else 2) != ci:
        form = f"[{ci}, taps, Co]" if transposed else f"[Co, taps, {ci}]"
        raise ValueError(f"w: expected {form} of 1 or 3 taps, got {list(w.shape)}")
    _check_operand("x", x, tuple(x.a.shape), dtype)
    _check_matrix("w", w, tuple(w.shape), dtype)
    co = w.size(2 if transposed else 0)
    below, below_record = below or (None, None)
    out = _conv_wgrad_out(grid, (1, stride))
    if transposed:
        out = tuple(grid if dims is None else dims)
        if _conv_wgrad_out(out, (1, stride)) != tuple(grid):
            raise ValueError(f"dims: expected T, H, W of which stride {stride} makes {grid}, got {list(out)}")
        if stride != 1 and (o_mask is not None or below is not None):
            raise ValueError("o_mask, below: expected None with a stride")
    if stride != 1 and w.size(1) != 1:
        raise ValueError(f"stride: expected 1 of 3x1x1, got {stride}")
    o_grid = grid if transposed else out
    for name, tensor, of in (("o", o, o_grid), ("o_mask", o_mask, out), ("below", below, out)):
        if tensor is not None:
            _check_activation(name, tensor, (n, co, *of), dtype)
    for name, rows in (("record", record), ("below's record", below_record)):
        if rows is not None:
            _check_rows(name, rows, 3, co)
    if transposed and (record is not None or relu or stats):
        raise ValueError("record, relu, stats: expected none of them with transposed")
    if not transposed and (o_mask is not None or below is not None):
        raise ValueError("o_mask, below: expected None unless transposed")
    if o is None and o_mask is not None:
        raise ValueError("o: expected a tensor with o_mask, got None")

    y = alloc((n, co, *out), device, dtype)
    sums = stats or below is not None
    if y.numel() == 0:
        return y, torch.zeros(1, 3 if stats else 2, co, device=device) if sums else None
    tiles = _tiles_sizes(x, w, transposed, stride, dims, (o, o_mask, below), sums)
    raw = None
    if x.read == "raw" and record is None and not relu and o_mask is None and (stride == 1 or not transposed):
        if transposed or o is None:
            raw = n, *grid, ci, co, w.size(1), stride, transposed, o is not None, below is not None

    def build() -> NativePlan:
        native = _native()
        with torch.cuda.device(device):
            return _train_plan(native, tiles, raw, tile, relu, _DTYPES[dtype])

    plan = plan_for(("conv_train", tiles, raw, tile, relu, dtype, device), build)
    part = alloc((plan.rows, 3 if stats else 2, co), device) if sums else None
    plan(*x.args(), w, y, record, o, o_mask, below, below_record, part)
    return y, part


def _train_plan(
    native, tiles: tuple, raw: tuple | None, tile: tuple[int, int, int] | None, relu: bool, dtype: str
) -> NativePlan:
    """That of the kernel of three that runs, with the rows of its partials; `raw`: sizes of `conv_raw`, if it can."""
    sizes, width, stride, _ = tiles
    wish, by_tiles = tile or (0, 0, 0), None
    if tile is None and stride == 1 and native.conv_train_why_not(sizes) is None:
        rows = native.conv_train_partials(sizes)
    elif raw is not None:
        how, rows = native.conv_raw_plan(raw, wish)
        used = operator.itemgetter(0, 5, 6, 8, 10, 11, 12)  # x.a, w, y, o, below, its record, partials
        plan = NativePlan(lambda stream, *addresses: native.conv_raw(*used(addresses), raw, how, dtype, stream))
        plan.rows = rows
        return plan
    else:
        how, rows = native.conv_tiles_plan(*tiles, wish)
        by_tiles = width, stride, how
    plan = NativePlan(lambda stream, *addresses: native.conv_train(*addresses, sizes, relu, dtype, stream, by_tiles))
    plan.rows = rows
    return plan


def _conv_pair_sizes(x: Operand, w: Tensor, down: Tensor) -> tuple:
    return x.a.numel() // x.channels, x.channels, down.size(1), w.size(0), x.read


def conv_pair_why_not(x: Operand, w: Tensor, down: Tensor, w_down: Tensor) -> str | None:
    """Why `conv_pair` cannot run these, or None."""
    if x.a.dtype not in _DTYPES:
        return f"conv_pair: dtype {x.a.dtype} (expected bfloat16 or float16)"
    if x.read not in _TRAIN_READS:
        return f"conv_pair: read {x.read} (expected one of {', '.join(_TRAIN_READS)})"
    if x.a.shape[2:] != down.shape[2:]:
        return "conv_pair: a stride (expected 1)"
    native = _backends.native()
    return native if isinstance(native, str) else native.conv_pair_why_not(_conv_pair_sizes(x, w, down))


def conv_pair(
    x: Operand,  # [N, M, T, H, W]
    w: Tensor,  # [Co, M]
    down: Tensor,  # [N, Ci, T, H, W]
    w_down: Tensor,  # [Co, Ci]
    record: Tensor,  # [3, Co] or more rows, as is the next
    record_down: Tensor,
) -> Tensor:
    """relu(bn(W a) + bn_down(W_down down)), a what x reads: two 1x1x1 convolutions, each with the affine of its record.

    M = Ci = 64. float32 accumulation and normalisation, one rounding.

    Returns:
        [N, Co, T, H, W], channels_last_3d. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `conv_pair_why_not` says), or CUDA failed.
    """
    (n, m, *dims), dtype, device, (co, ci) = x.a.shape, x.a.dtype, x.a.device, w_down.shape
    if dtype not in _DTYPES or x.read not in _TRAIN_READS:
        raise ValueError(f"x: expected bfloat16 or float16 and a read that the kernel has, got {dtype}, {x.read!r}")
    _check_operand("x", x, tuple(x.a.shape), dtype)
    _check_activation("down", down, (n, ci, *dims), dtype)
    _check_matrix("w", w, (co, m), dtype)
    _check_matrix("w_down", w_down, (co, ci), dtype)
    _check_rows("record", record, 3, co)
    _check_rows("record_down", record_down, 3, co)
    y = alloc((n, co, *dims), device, dtype)
    if y.numel() == 0:
        return y
    sizes = _conv_pair_sizes(x, w, down)

    def build() -> NativePlan:
        native = _native()
        return NativePlan(lambda stream, *addresses: native.conv_pair(*addresses, sizes, _DTYPES[dtype], stream))

    plan_for(("conv_pair", sizes, dtype, device), build)(*x.args(), w, record, down, w_down, record_down, y)
    return y
