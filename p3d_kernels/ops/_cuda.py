"""The Hopper kernels as functions of tensors: checks, buffers and launch plans around `p3d_kernels._C`.

A tensor's "affine" is float32 [3, C], rows mean, scale and bias: u = (z - mean) * scale + bias. Activations are
[N, C, T, H, W] in channels_last_3d memory, bfloat16 or float16; everything is 16-byte aligned.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends, reference
from ._tape import NativePlan, alloc, plan_for
from ._triton import Operand
from .max_pool import out_sizes

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _sizes(x_shape: tuple[int, ...], ci: int, co: int) -> tuple[int, int, int, int, int]:
    n, _, t, h, w = x_shape
    return n * t, h, w, ci, co


def why_not(x_shape: tuple[int, ...], dtype: torch.dtype, ci: int, co: int, stride: int = 1) -> str | None:
    """Why the spatial kernel cannot convolve x [N, Ci, T, H, W] to Co channels on the current device, or None.

    The input gradient is a convolution of Co channels to Ci.
    """
    if stride != 1:
        return f"spatial_conv: stride {stride} (expected 1)"
    return _why_not("spatial_conv", x_shape, dtype, ci, co)


def wgrad_why_not(x_shape: tuple[int, ...], dtype: torch.dtype, ci: int, co: int) -> str | None:
    """Why the weight gradient's kernel cannot run for x [N, Ci, T, H, W] and Co channels, or None."""
    return _why_not("spatial_wgrad", x_shape, dtype, ci, co)


def _why_not(name: str, x_shape: tuple[int, ...], dtype: torch.dtype, ci: int, co: int) -> str | None:
    if dtype not in _DTYPES:
        return f"{name}: dtype {dtype} (expected bfloat16 or float16)"
    native = _backends.native()
    return native if isinstance(native, str) else getattr(native, f"{name}_why_not")(*_sizes(x_shape, ci, co))


def _check_activation(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.dtype != dtype or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last_3d) or x.data_ptr() % 16:
        raise ValueError(f"{name}: expected channels_last_3d memory of 16-byte alignment")


def _check_input(name: str, x: Tensor, w_packed: Tensor, ci: int, form: str) -> None:
    if x.dtype not in _DTYPES or w_packed.dtype != x.dtype:
        raise ValueError(f"{name}, w_packed: expected one dtype, bfloat16 or float16, got {x.dtype}, {w_packed.dtype}")
    if x.size(1) != ci or w_packed.size(1) != 9:
        raise ValueError(f"w_packed: expected {form.format(x.size(1))}, got {list(w_packed.shape)}")
    if not w_packed.is_contiguous() or w_packed.data_ptr() % 16:
        raise ValueError("w_packed: expected contiguous memory of 16-byte alignment")
    _check_activation(name, x, x.shape, x.dtype)


def _check_gradient(g: Tensor, z: Tensor | None, record: Tensor | None, sums: Tensor | None) -> None:
    if len({z is None, record is None, sums is None}) > 1:
        raise ValueError("z, record, sums: expected all or none of them")
    if z is not None:
        _check_activation("z", z, g.shape, g.dtype)
        _check_rows("record", record, 3, g.size(1))
        _check_rows("sums", sums, 2, g.size(1))


def _check_rows(name: str, rows: Tensor, least: int, channels: int) -> None:
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.size(0) < least or rows.size(1) != channels:
        raise ValueError(f"{name}: expected float32 [{least}, {channels}], got {rows.dtype} {list(rows.shape)}")
    if not rows.is_contiguous() or rows.data_ptr() % 16:
        raise ValueError(f"{name}: expected contiguous memory of 16-byte alignment")


def _plan(name: str, x: Tensor, ci: int, co: int, *form) -> NativePlan:
    """The launch of the extension's function `name`; its `rows` are those of the partial sums, of sizes and form."""

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        launch, sizes, dtype = getattr(native, name), _sizes(x.shape, ci, co), _DTYPES[x.dtype]
        plan = NativePlan(lambda stream, *addresses: launch(*addresses, *sizes, dtype, stream))
        with torch.cuda.device(x.device):
            plan.rows = getattr(native, f"{name}_partials")(*sizes, *form)
        return plan

    return plan_for((name, x.shape, x.dtype, x.device, ci, co, *form), build)


def spatial_conv_fwd(
    x: Tensor,  # [N, Ci, T, H, W]
    w_packed: Tensor,  # [Co, 9, Ci]
    affine: Tensor | None = None,  # [3, Ci]
    out_affine: Tensor | None = None,  # [3, Co]
    stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = epi(conv(pro(x), w)), a 1x3x3 convolution of stride 1 and padding 1, float32 accumulation.

    `affine`: pro(x) = relu((x - mean) * scale + bias) rounded to the dtype, zero padding after it.
    `out_affine`: epi(y) likewise. `stats`: also return the partial statistics of the rounded y.

    Returns:
        y [N, Co, T, H, W] channels_last_3d, and float32 [R, 3, Co] rows (n, mean, M2), some with n = 0, or None.
        Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `why_not` says), or CUDA failed.
    """
    (co, _, ci), (n, _, t, h, w) = w_packed.shape, x.shape
    _check_input("x", x, w_packed, ci, "[Co, 9, {}]")
    for name, rows, channels in (("affine", affine, ci), ("out_affine", out_affine, co)):
        if rows is not None:
            _check_rows(name, rows, 3, channels)
    if stats and out_affine is not None:
        raise ValueError("stats: expected False with out_affine, got True")

    y = alloc((n, co, t, h, w), x.device, x.dtype)
    if x.numel() == 0:
        return y, torch.zeros(1, 3, co, device=x.device) if stats else None
    plan = _plan("spatial_conv", x, ci, co)
    partials = alloc((plan.rows, 3, co), x.device) if stats else None
    plan(x, w_packed, y, affine, out_affine, partials)
    return y, partials


def spatial_conv_dgrad(
    g: Tensor,  # [N, Co, T, H, W]
    z: Tensor | None,  # like g
    record: Tensor | None,  # [3, Co] or more rows
    sums: Tensor | None,  # [2, Co] or more rows
    w_packed: Tensor,  # [Co, 9, Ci]
    o: Tensor | None = None,  # [N, Ci, T, H, W]
    below: tuple[Tensor, Tensor] | None = None,  # like o, and [3, Ci] or more rows
) -> tuple[Tensor, Tensor | None]:
    """The input gradient dx of the convolution by w, plus o, from the gradient dz of its output; float32 accumulation.

    dz is g where z is None. Else g is the gradient of relu(u), u = (z - mean) * scale + bias, with `record` the affine
    of z, and, rounded to the dtype, dz = scale * ([u > 0] g - c0 - (z - mean) * c1), with `sums` the rows c0 and c1;
    that is slower, for where `spatial_wgrad` has not stored dz.
    `below`: what made the input, raw, and its affine: also return the sums that its own gradient needs.

    Returns:
        dx [N, Ci, T, H, W] channels_last_3d, and float32 [R, 2, Ci] rows (sum g, sum g (below - mean)) with g the
        rounded dx where the ReLU of `below` passes it, else 0; or None. Runs of the same shape on the same card give
        the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `why_not` says), or CUDA failed.
    """
    (co, _, ci), (n, _, t, h, w) = w_packed.shape, g.shape
    _check_input("g", g, w_packed, co, "[{}, 9, Ci]")
    _check_gradient(g, z, record, sums)
    if o is not None:
        _check_activation("o", o, (n, ci, t, h, w), g.dtype)
    below, below_record = below or (None, None)
    if below is not None:
        _check_activation("below", below, (n, ci, t, h, w), g.dtype)
        _check_rows("below's record", below_record, 3, ci)

    dx = alloc((n, ci, t, h, w), g.device, g.dtype)
    if g.numel() == 0:
        return dx, None if below is None else torch.zeros(1, 2, ci, device=g.device)
    plan = _plan("spatial_dgrad", g, co, ci, z is None)
    partials = None if below is None else alloc((plan.rows, 2, ci), g.device)
    plan(g, z, record, sums, w_packed, o, below, below_record, dx, partials)
    return dx, partials


def spatial_wgrad(
    g: Tensor,  # [N, Co, T, H, W]
    z: Tensor | None,  # like g
    record: Tensor | None,  # [3, Co] or more rows
    sums: Tensor | None,  # [2, Co] or more rows
    a: Tensor,  # [N, Ci, T, H, W]
    a_record: Tensor | None = None,  # [3, Ci] or more rows
    finished: Tensor | None = None,  # like g
) -> Tensor:
    """The weight gradient of a 1x3x3 convolution of stride 1 and padding 1 of pro(a), in parts; float32 accumulation.

    dz is as in `spatial_conv_dgrad`; with z, it is stored in `finished`. `a_record`: pro(a) = relu((a - mean) * scale +
    bias) rounded to the dtype, zero padding after it.

    Returns:
        float32 [R, Co * 9 * Ci], each row [Co, 9, Ci] the sum over a part of the positions. Runs of the same shape on
        the same card give the same bits. A NaN at the edge of a frame reaches all nine taps.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `wgrad_why_not` says), or CUDA failed.
    """
    (n, co, t, h, w), ci = g.shape, a.size(1)
    if g.dtype not in _DTYPES:
        raise ValueError(f"g: expected bfloat16 or float16, got {g.dtype}")
    _check_activation("g", g, g.shape, g.dtype)
    _check_gradient(g, z, record, sums)
    _check_activation("a", a, (n, ci, t, h, w), g.dtype)
    if a_record is not None:
        _check_rows("a_record", a_record, 3, ci)
    if finished is not None:
        if z is None:
            raise ValueError("finished: expected None without z")
        _check_activation("finished", finished, g.shape, g.dtype)
    if g.numel() == 0:
        return torch.zeros(1, co * 9 * ci, device=g.device)
    plan = _plan("spatial_wgrad", g, ci, co)
    part = alloc((plan.rows, co * 9 * ci), g.device)
    plan(g, z, record, sums, a, a_record, part, finished)
    return part


_TENSORS = {  # which of an operand's a, b, record_a, record_b, sums each read that the kernel has takes
    "raw": (True, False, False, False, False),
    "bn_relu": (True, False, True, False, False),
    "join_port": (True, True, True, True, False),
    "join_b": (True, True, True, True, False),
    "join_c": (True, True, True, True, False),
    "masked": (True, True, False, False, False),
    "bn_bwd": (True, True, False, True, True),
    "bn_bwd_open": (True, True, False, True, True),
}


def _conv_wgrad_sizes(
    g: Operand, x: Operand, taps: tuple[int, int, int], stride: tuple[int, int], totals: bool
) -> tuple:
    n, ci, *dims = x.a.shape
    out = _conv_wgrad_out(dims, stride)
    space = stride[1] if out != tuple(dims) else 1  # a stride of maps of one position skips nothing
    strided = tuple(g.a.shape[2:]) != out
    return n, *dims, ci, g.channels, taps[0], space, strided, totals, g is x, g.read, x.read


def _conv_wgrad_out(dims: Sequence[int], stride: tuple[int, int]) -> tuple[int, int, int]:
    (t, h, w), (_, space) = dims, stride
    return t, (h - 1) // space + 1, (w - 1) // space + 1


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


def _check_operand(name: str, o: Operand, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if o.read not in _TENSORS:
        raise ValueError(f"{name}: expected a read among {', '.join(_TENSORS)}, got {o.read!r}")
    if tuple([t is not None for t in o.args()]) != _TENSORS[o.read]:
        raise ValueError(f"{name}: expected the tensors of {o.read}, no more and no fewer")
    for part, tensor in (("a", o.a), ("b", o.b)):
        if tensor is not None:
            _check_activation(f"{name}.{part}", tensor, shape, dtype)
    for part, rows, least in (("record_a", o.record_a, 3), ("record_b", o.record_b, 3), ("sums", o.sums, 2)):
        if rows is not None:
            _check_rows(f"{name}.{part}", rows, least, o.channels)


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
    if dtype not in _DTYPES:
        raise ValueError(f"x.a: expected bfloat16 or float16, got {dtype}")
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
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        plan = NativePlan(lambda stream, *addresses: native.conv_wgrad(*addresses, sizes, _DTYPES[dtype], stream))
        with torch.cuda.device(x.a.device):
            plan.rows = native.conv_wgrad_partials(sizes)
        return plan

    plan = plan_for(("conv_wgrad in CUDA", sizes, dtype, x.a.device), build)
    part = alloc((plan.rows, outputs), x.a.device)
    plan(*g.args(), *x.args(), centre, part)
    return part


RAW_WGRADS = 4  # in a launch


class RawWgrad(NamedTuple):
    """A weight gradient of a 1x1x1 or 3x1x1 convolution, of two tensors as they are."""

    g: Tensor  # [N, Co, To, Ho, Wo], or, of 1x1x1, on the grid of x
    x: Tensor  # [N, Ci, T, H, W]
    taps: tuple[int, int, int]
    stride: tuple[int, int]

    def sizes(self) -> tuple:
        n, ci, *dims = self.x.shape
        out = _conv_wgrad_out(dims, self.stride)
        space = self.stride[1] if out != tuple(dims) else 1
        return n, *dims, ci, self.g.size(1), self.taps[0], space, tuple(self.g.shape[2:]) != out


def raw_wgrad_why_not(w: RawWgrad) -> str | None:
    """Why `raw_wgrads` cannot run this gradient, or None."""
    if w.x.dtype not in _DTYPES:
        return f"raw_wgrad: dtype {w.x.dtype} (expected bfloat16 or float16)"
    if w.taps not in ((1, 1, 1), (3, 1, 1)) or w.stride[0] != 1:
        return f"raw_wgrad: taps {w.taps}, stride {w.stride} (expected 1x1x1 or 3x1x1, stride 1 in time)"
    if w.x.numel() == 0:
        return "raw_wgrad: no positions"
    native = _backends.native()
    if isinstance(native, str):
        return native
    return native.raw_wgrad_why_not(w.sizes())


def raw_wgrads(
    wgrads: Sequence[RawWgrad], tiles: Sequence[tuple[int, int]] | None = None, blocks: int = 0
) -> list[Tensor]:
    """dw[co, tap, ci] = sum_p g[p, co] x[p * stride + tap, ci] of up to four gradients in one launch, each in parts.

    What `conv_wgrad` does for raw operands of 128 couts and more. Together they need fewer parts each to fill the card.
    float32 accumulation. `tiles`: (couts, 128 or of 1x1x1 256, and parts) of each, `blocks` of a cluster, 1 or 2; 0:
    any.

    Returns:
        of each, float32 [R, Co * taps * Ci], each row [Co, taps, Ci], the sum over a part of the positions. Runs of the
        same shapes on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `raw_wgrad_why_not` says), or CUDA failed.
    """
    if not 1 <= len(wgrads) <= RAW_WGRADS:
        raise ValueError(f"wgrads: expected 1 to {RAW_WGRADS}, got {len(wgrads)}")
    dtype, device = wgrads[0].x.dtype, wgrads[0].x.device
    if dtype not in _DTYPES:
        raise ValueError(f"x: expected bfloat16 or float16, got {dtype}")
    for w in wgrads:
        n, _, *dims = w.x.shape
        out = _conv_wgrad_out(dims, w.stride)
        if w.taps == (1, 1, 1) and tuple(w.g.shape[2:]) == tuple(dims):
            out = tuple(dims)
        _check_activation("x", w.x, tuple(w.x.shape), dtype)
        _check_activation("g", w.g, (n, w.g.size(1), *out), dtype)
    sizes = [w.sizes() for w in wgrads]
    tiles = [(0, 0)] * len(wgrads) if tiles is None else list(tiles)

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        with torch.cuda.device(device):
            chosen, pair = native.raw_wgrad_plan(sizes, tiles, blocks)
        plan = NativePlan(
            lambda stream, *addresses: native.raw_wgrad(addresses, sizes, chosen, pair, _DTYPES[dtype], stream)
        )
        plan.rows = [splits for _, splits in chosen]
        return plan

    plan = plan_for(("raw_wgrads", *sizes, *tiles, blocks, dtype, device), build)
    parts = [alloc((rows, w.g.size(1) * w.taps[0] * w.x.size(1)), device) for rows, w in zip(plan.rows, wgrads)]
    plan(*[tensor for w, part in zip(wgrads, parts) for tensor in (w.g, w.x, part)])
    return parts


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns every second one is."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _check_frames(frames: int | None, time: int) -> None:
    if frames is not None and (frames < 1 or abs(2 * frames - time) > 1):
        raise ValueError(f"frames: expected None or half of {time}, rounded down or up, got {frames}")


_INFER_JOINS = {"none": False, "relu": False, "relu_add": True, "add_relu": True, "mean_relu": True}  # which take an o


def _conv_infer_sizes(
    x_shape: tuple[int, ...],
    co: int,
    taps: tuple[int, int, int],
    stride: tuple[int, int],
    join: str,
    o_size: tuple[int, int] | None,
    frames: int | None,
) -> tuple:
    n, ci, *dims = x_shape
    return n, *dims, ci, co, taps[0], taps[1], stride[1], _INFER_JOINS[join], *(o_size or (0, 0)), frames or 0


def conv_infer_why_not(
    x_shape: tuple[int, ...],
    dtype: torch.dtype,
    co: int,
    taps: tuple[int, int, int],
    stride: tuple[int, int],
    join: str = "none",
    o_size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> str | None:
    """Why `conv_infer` cannot convolve x [N, Ci, T, H, W] to Co channels on the current device, or None.

    `o_size`: H and W of a strided o.
    """
    if dtype not in _DTYPES:
        return f"conv_infer: dtype {dtype} (expected bfloat16 or float16)"
    if taps not in ((1, 1, 1), (3, 1, 1), (1, 3, 3)) or stride[0] != 1:
        return f"conv_infer: taps {taps}, stride {stride} (expected 1x1x1, 3x1x1 or 1x3x3, stride 1 in time)"
    if join not in _INFER_JOINS:
        return f"conv_infer: join {join} (expected one of {', '.join(_INFER_JOINS)})"
    if frames is not None and join != "add_relu":
        return f"conv_infer: frames with join {join} (expected add_relu)"
    native = _backends.native()
    if isinstance(native, str):
        return native
    return native.conv_infer_why_not(_conv_infer_sizes(x_shape, co, taps, stride, join, o_size, frames))


def conv_infer(
    x: Tensor,  # [N, Ci, T, H, W]
    w: Tensor,  # [Co, taps, Ci]
    taps: tuple[int, int, int],
    stride: tuple[int, int],
    record: Tensor,  # [3, Co] or more rows
    join: str = "none",
    o: Tensor | None = None,  # [N, Co, T, Ho, Wo], may be x
    tile: tuple[int, int, int] = (0, 0, 0),
    o_strided: bool = False,
    frames: int | None = None,
) -> Tensor:
    """join((conv(x, w) - mean) * scale + bias, o) in inference: 1x1x1, 3x1x1 or 1x3x3, zero padding, one rounding.

    `stride`: (1, space); of 1x3x3 space is 1 or 2. `join`, of u: "none", "relu", or with o "relu_add", "add_relu",
    "mean_relu", as `Epilogue`'s. float32 accumulation. `tile`: (rows, columns, splits) of the plan, 0 for any.
    `o_strided`, of 1x1x1 and stride 1: in place of o, o[..., ::2, ::2] is joined. `frames`, of these and the join
    "add_relu": T / 2, rounded down or up; the result is pooled to as many by windows (2, 1, 1) of that stride.
    w may be read while the kernel before this one in the stream still runs.

    Returns:
        [N, Co, T or frames, Ho, Wo], channels_last_3d. Runs of the same shape on the same card give the same bits,
        and these are the same whether o or the result is picked and pooled here or elsewhere.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `conv_infer_why_not` says), or CUDA failed.
    """
    n, ci, *dims = x.shape
    co, dtype = w.size(0), x.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"x: expected bfloat16 or float16, got {dtype}")
    if join not in _INFER_JOINS or _INFER_JOINS[join] != (o is not None):
        raise ValueError(f"join, o: expected none or relu, or with o relu_add, add_relu or mean_relu, got {join!r}")
    _check_activation("x", x, x.shape, dtype)
    _check_matrix("w", w, (co, taps[0] * taps[1] * taps[2], ci), dtype)
    _check_rows("record", record, 3, co)
    time, *size = _conv_wgrad_out(dims, stride)
    o_size = tuple(o.shape[3:]) if o_strided and o is not None else None
    if o_strided and (o_size is None or (taps, stride) != ((1, 1, 1), (1, 1)) or _halved(o_size) != tuple(size)):
        raise ValueError(
            "o_strided: expected False unless o has twice the rows and columns of a 1x1x1 result, got True"
        )
    _check_frames(frames, time)
    if frames is not None and ((taps, stride) != ((1, 1, 1), (1, 1)) or join != "add_relu"):
        raise ValueError(f"frames: expected None unless 1x1x1, stride 1, add_relu, got {taps}, {stride}, {join!r}")
    if o is not None:
        _check_activation("o", o, (n, co, time, *(o_size or size)), dtype)
    y = alloc((n, co, frames or time, *size), x.device, dtype)
    if x.numel() == 0:
        return y

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        sizes = _conv_infer_sizes(x.shape, co, taps, stride, join, o_size, frames)
        with torch.cuda.device(x.device):
            rest = sizes, native.conv_infer_plan(sizes, tile), join, _DTYPES[dtype]
        return NativePlan(lambda stream, *addresses: native.conv_infer(*addresses, *rest, stream))

    key = "conv_infer", x.shape, dtype, x.device, co, taps, stride, join, tile, o_size, frames
    plan_for(key, build)(x, o, w, record, y)
    return y


_TRAIN_READS = tuple([read for read in _TENSORS if read != "masked"])


def _conv_train_sizes(
    x: Operand, w: Tensor, transposed: bool, o: Tensor | None, o_mask: Tensor | None, below: tuple | None, sums: bool
) -> tuple:
    n, ci, t, *size = x.a.shape
    loads = (o is not None) + (o_mask is not None) + (below is not None)
    return n, t, size[0] * size[1], ci, w.size(2 if transposed else 0), w.size(1), transposed, x.read, loads, sums


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
    if x.a.dtype not in _DTYPES:
        return f"conv_train: dtype {x.a.dtype} (expected bfloat16 or float16)"
    if x.read not in _TRAIN_READS:
        return f"conv_train: read {x.read} (expected one of {', '.join(_TRAIN_READS)})"
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
    if x.a.dtype not in _DTYPES:
        return f"conv_tiles: dtype {x.a.dtype} (expected bfloat16 or float16)"
    if x.read not in _TRAIN_READS:
        return f"conv_tiles: read {x.read} (expected one of {', '.join(_TRAIN_READS)})"
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
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
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
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        return NativePlan(lambda stream, *addresses: native.conv_pair(*addresses, sizes, _DTYPES[dtype], stream))

    plan_for(("conv_pair", sizes, dtype, device), build)(*x.args(), w, record, down, w_down, record_down, y)
    return y


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
    if dtype not in _DTYPES:
        raise ValueError(f"x.a: expected bfloat16 or float16, got {dtype}")
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
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
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
    if dtype not in _DTYPES:
        raise ValueError(f"x.a: expected bfloat16 or float16, got {dtype}")
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
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
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
    if dtype not in _DTYPES:
        raise ValueError(f"x.a: expected bfloat16 or float16, got {dtype}")
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
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
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
    if dtype not in _DTYPES:
        raise ValueError(f"x: expected bfloat16 or float16, got {dtype}")
    _check_activation("x", x, x.shape, dtype)
    _check_activation("g", g, (n, co, *dims), dtype)
    _check_matrix("w", w, (co + m, m), dtype)
    _check_rows("c", c, 1, m)
    da = alloc((n, m, *dims), device, dtype)
    if da.numel() == 0:
        return da
    sizes = _gram_raw_sizes(x, g)

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        with torch.cuda.device(device):
            rest = c.size(0), sizes, native.gram_raw_plan(sizes, tile), _DTYPES[dtype]
        return NativePlan(lambda stream, *addresses: native.gram_raw(*addresses, *rest, stream))

    plan_for(("gram_raw", sizes, tile, c.size(0), dtype, device), build)(g, x, w, c, da)
    return da


def _point_dgrad_sizes(dz: Tensor, co: int, masks: int) -> tuple:
    n, ci, t, h, w = dz.shape
    return n, t * h * w, ci, co, masks


def point_dgrad_why_not(dz: Tensor, co: int) -> str | None:
    """Why `point_dgrad` cannot run dz [N, Ci, T, H, W] for Co channels, or None."""
    if dz.dtype not in _DTYPES:
        return f"point_dgrad: dtype {dz.dtype} (expected bfloat16 or float16)"
    native = _backends.native()
    return native if isinstance(native, str) else native.point_dgrad_why_not(_point_dgrad_sizes(dz, co, 2))


def point_dgrad(
    dz: Tensor,  # [N, Ci, T, H, W]
    w: Tensor,  # [Ci, Co]
    o: Tensor,  # [N, Co, T, H, W]
    o_mask: Tensor | None = None,  # like o
    mask: Tensor | None = None,  # like o
    tile: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """dz w + o: the input gradient of a 1x1x1 convolution of stride 1, whose channels are Co to Ci, plus o.

    o counts where not o_mask <= 0, the sum where not mask <= 0, if these are given; else zero does. float32
    accumulation, one rounding. `tile`: (rows, columns, 1) of the plan, 0 for any. w may be read while the kernel before
    this one in the stream still runs.

    Returns:
        [N, Co, T, H, W], channels_last_3d. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `point_dgrad_why_not` says), or CUDA failed.
    """
    (n, ci, *dims), co, dtype = dz.shape, w.size(-1), dz.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dz: expected bfloat16 or float16, got {dtype}")
    _check_activation("dz", dz, dz.shape, dtype)
    _check_matrix("w", w, (ci, co), dtype)
    for name, tensor in (("o", o), ("o_mask", o_mask), ("mask", mask)):
        if tensor is not None:
            _check_activation(name, tensor, (n, co, *dims), dtype)
    dx = alloc((n, co, *dims), dz.device, dtype)
    if dx.numel() == 0:
        return dx
    sizes = _point_dgrad_sizes(dz, co, (o_mask is not None) + (mask is not None))

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        with torch.cuda.device(dz.device):
            rest = sizes, native.point_dgrad_plan(sizes, tile), _DTYPES[dtype]
        return NativePlan(lambda stream, *addresses: native.point_dgrad(*addresses, *rest, stream))

    plan_for(("point_dgrad", sizes, dtype, dz.device, tile), build)(dz, w, o, o_mask, mask, dx)
    return dx


def reduce_bwd_why_not(x_shape: tuple[int, ...], dtype: torch.dtype, co: int, thin: bool = False) -> str | None:
    """Why `reduce_bwd` cannot run for x [N, Ci, T, H, W], Co channels and a thin o on the current device, or None."""
    if dtype not in _DTYPES:
        return f"reduce_bwd: dtype {dtype} (expected bfloat16 or float16)"
    native = _backends.native()
    return native if isinstance(native, str) else native.reduce_bwd_why_not(*_reduce_sizes(x_shape, co, thin))


def _reduce_sizes(x_shape: tuple[int, ...], co: int, thin: bool) -> tuple[int, int, int, int, int]:
    n, ci, t, h, w = x_shape
    return n * t * h * w, ci, co, h * thin, w * thin


def reduce_bwd(
    dz: Operand,  # read bn_bwd, [N, Co, T, H, W]
    x: Tensor,  # [N, Ci, T, H, W]
    w: Tensor,  # [Co, Ci]
    o: Tensor,  # like x; or, thin, [N, Ci, T, ceil(H / 2), W / 2]
    o_mask: Tensor | None = None,  # like o
    mask_x: bool = False,
    over: Tensor | None = None,  # x or o, like x
) -> tuple[Tensor, Tensor]:
    """(dx, part): both gradients of a 1x1x1 convolution of stride 1, x to z = w x, from dz; float32 accumulation.

    dx = dz w + o, o counted where not o_mask <= 0, if that is given. `mask_x`: dx is zero where x <= 0, which makes it
    the gradient before the ReLU whose output x is. dz is rounded to the dtype; it and x are read once. A thin o is that
    of every second row and column, zero elsewhere; W is then even and o_mask given. over: dx takes its place: the block
    that writes an element of dx is the only one to read that of x and of o, and has done so.

    Returns:
        dx like x, channels_last_3d, and float32 [R, Co * Ci], each row [Co, Ci] the sum of dz[co] x[ci] over a part of
        the positions. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of the read differ from the above.
        RuntimeError: the kernel cannot run (what `reduce_bwd_why_not` says), or CUDA failed.
    """
    (n, ci, *dims), co, dtype, device = x.shape, dz.channels, x.dtype, x.device
    if dtype not in _DTYPES or dz.read != "bn_bwd":
        raise ValueError(f"x, dz: expected bfloat16 or float16 and the read bn_bwd, got {dtype}, {dz.read!r}")
    _check_activation("x", x, x.shape, dtype)
    _check_operand("dz", dz, (n, co, *dims), dtype)
    _check_matrix("w", w, (co, ci), dtype)
    thin = o.shape != x.shape
    for name, tensor in (("o", o), ("o_mask", o_mask)):
        if tensor is not None:
            _check_activation(name, tensor, (n, ci, *_conv_wgrad_out(dims, (1, 1 + thin))), dtype)
    if thin and o_mask is None:
        raise ValueError("o_mask: expected a tensor with a thin o, got None")
    if over is not None and over is not x and (over is not o or thin):
        raise ValueError("over: expected x, or o of its shape, got another tensor")
    dx = alloc((n, ci, *dims), device, dtype) if over is None else over
    if x.numel() == 0:
        return dx, torch.zeros(1, co * ci, device=device)
    sizes = _reduce_sizes(tuple(x.shape), co, thin)

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        rest = *sizes, mask_x, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.reduce_bwd(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.reduce_bwd_partials(*sizes)
        return plan

    plan = plan_for(("reduce_bwd", sizes, mask_x, dtype, device), build)
    part = alloc((plan.rows, co * ci), device)
    plan(*dz.args()[:2], dz.record_b, dz.sums, x, w, o, o_mask, dx, part)
    return dx, part


STEM_COUTS = 64
_FLOATS = {**_DTYPES, torch.float32: "float32"}
_PIXELS = {**_FLOATS, torch.uint8: "uint8"}


def stem_pack(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w [64, Ci, 1, 7, 7] as the registers of `stem_infer` take it, [steps, 128, 8] (csrc/stem_infer.cu says how)."""
    co, ci = w.shape[:2]
    taps = w.new_zeros((co, max(2, ci), 8, 8))  # rows and columns of the window; a row of zeros, a column before it
    taps[:, :ci, :7, 1:] = w.detach()[:, :, 0]
    steps = [torch.stack([taps[:, c, kh], taps[:, c + 1, kh]], 1) for c in range(0, ci - 1, 2) for kh in range(7)]
    if ci == 1:
        steps = [torch.stack([taps[:, 0, kh], taps[:, 1, kh]], 1) for kh in range(7)]
    elif ci % 2:
        steps += [taps[:, ci - 1, kh : kh + 2] for kh in range(0, 8, 2)]
    # cout = 16 warp + 8 m + row, k = 8 half + 2 quad + e; lane = 4 row + quad; register 2 half + m
    packed = torch.stack(steps).view(len(steps), 4, 2, 8, 2, 4, 2).permute(0, 1, 3, 5, 4, 2, 6)
    return packed.reshape(len(steps), 128, 8).to(dtype)


def stem_why_not(x: Tensor, dtype: torch.dtype, co: int, wiring: str) -> str | None:
    """Why `stem_infer` cannot run clips x to Co channels of `dtype` on the current device, or None."""
    if dtype not in _DTYPES:
        return f"stem_infer: dtype {dtype} (expected bfloat16 or float16)"
    if x.dtype not in _PIXELS:
        return f"stem_infer: pixels of {x.dtype} (expected float32, float16, bfloat16 or uint8)"
    if co != STEM_COUTS:
        return f"stem_infer: {co} output channels (expected {STEM_COUTS})"
    native = _backends.native()
    return native if isinstance(native, str) else native.stem_infer_why_not(*x.shape, _padded(wiring))


def stem_fwd_why_not(x: Tensor, w: Tensor, gamma: Tensor | None, dtype: torch.dtype, wiring: str) -> str | None:
    """Why `stem_fwd` cannot run clips x and w [Co, Ci, 1, 7, 7] to `dtype` on the current device, or None."""
    return _stem_why_not("stem_fwd", x, w, dtype, wiring, gamma)


def stem_wgrad_why_not(x: Tensor, w: Tensor, dtype: torch.dtype, wiring: str) -> str | None:
    """Why `stem_wgrad` cannot run for clips x, w [Co, Ci, 1, 7, 7] and g of `dtype` on the current device, or None."""
    return _stem_why_not("stem_wgrad", x, w, dtype, wiring)


def _stem_why_not(
    name: str, x: Tensor, w: Tensor, dtype: torch.dtype, wiring: str, gamma: Tensor | None = None
) -> str | None:
    if dtype not in _DTYPES:
        return f"{name}: dtype {dtype} (expected bfloat16 or float16)"
    if x.dtype not in _FLOATS or w.dtype not in _FLOATS:
        return f"{name}: pixels of {x.dtype}, weights of {w.dtype} (expected float32, float16 or bfloat16)"
    if gamma is not None and gamma.dtype not in _FLOATS:
        return f"{name}: gamma of {gamma.dtype} (expected float32, float16 or bfloat16)"
    if w.size(0) != STEM_COUTS:
        return f"{name}: {w.size(0)} output channels (expected {STEM_COUTS})"
    native = _backends.native()
    return native if isinstance(native, str) else getattr(native, f"{name}_why_not")(*x.shape, _padded(wiring))


def _padded(wiring: str) -> bool:
    return wiring == "port"


def _check_stem(x: Tensor, w: Tensor, dtype: torch.dtype) -> None:
    if x.dtype not in _FLOATS or w.dtype not in _FLOATS or dtype not in _DTYPES:
        raise ValueError(f"x, w, dtype: expected floats and bfloat16 or float16, got {x.dtype}, {w.dtype}, {dtype}")
    shape = STEM_COUTS, x.size(1), 1, 7, 7
    if w.shape != shape or not w.is_contiguous():
        raise ValueError(f"w: expected contiguous {list(shape)}, got {list(w.shape)}")


def _check_gamma(gamma: Tensor | None) -> None:
    if gamma is not None and (gamma.dtype not in _FLOATS or gamma.shape != (STEM_COUTS,) or not gamma.is_contiguous()):
        raise ValueError(f"gamma: expected contiguous floats [{STEM_COUTS}], got {gamma.dtype} {list(gamma.shape)}")


def _pooled_shape(x: Tensor, wiring: str) -> tuple[int, ...]:
    n, _, t, h, w = x.shape
    sizes = t, (h - 1) // 2 + 1, (w - 1) // 2 + 1
    return n, STEM_COUTS, *out_sizes(sizes, **reference.stem_pool(wiring))


def stem_fwd(
    x: Tensor,  # [N, Ci, T, H, W], any strides
    w: Tensor,  # [64, Ci, 1, 7, 7]
    gamma: Tensor | None,  # [64]
    dtype: torch.dtype,
    wiring: str,
    stats: bool = False,
    save_tap: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The pool of the raw z = conv(x, w), 1x7x7 of stride (1, 2, 2) and padding (0, 3, 3), which is not stored.

    x and w are rounded to `dtype` as they are read, sums are float32, z is rounded once. Of a window the pool takes the
    largest z, or where gamma < 0 the least: relu(bn(pooled)) is then the pool of relu(bn(z)), gamma being the weight of
    bn. A gamma of 0 counts as positive, and so does NaN. `save_tap`: also return where in its window each was,
    (3 kt + kh) 3 + kw, of equal ones the first (-0 is less than 0, and of several NaN the first is taken). `stats`:
    also return the partial statistics of all rounded z. Fastest where x lies in planes or pixel by pixel, rows are
    multiples of 8 pixels and everything is 16-byte aligned. An infinity or NaN in the clip also reaches a z one
    position beside those whose window it lies in.

    Returns:
        pooled [N, 64, Tp, Hp, Wp] channels_last_3d; the tap, uint8 and like it, or None; float32 [R, 3, 64] rows (n,
        mean, M2), or None. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape or dtype differ from the above.
        RuntimeError: the kernel cannot run (what `stem_fwd_why_not` says), or CUDA failed.
    """
    _check_stem(x, w, dtype)
    _check_gamma(gamma)
    shape = _pooled_shape(x, wiring)
    pooled = alloc(shape, x.device, dtype)
    tap = alloc(shape, x.device, torch.uint8) if save_tap else None
    if pooled.numel() == 0:
        return pooled, tap, torch.zeros((1, 3, STEM_COUTS), device=x.device) if stats else None
    gamma_type = "float32" if gamma is None else _FLOATS[gamma.dtype]

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        shape = *x.shape, _padded(wiring)
        rest = *shape, x.stride(), _FLOATS[x.dtype], _FLOATS[w.dtype], gamma_type, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.stem_fwd(*addresses, *rest, stream))
        with torch.cuda.device(x.device):
            plan.rows = native.stem_fwd_partials(*shape)
        return plan

    plan = plan_for(("stem_fwd", x.shape, x.stride(), x.dtype, w.dtype, gamma_type, x.device, dtype, wiring), build)
    part = alloc((plan.rows, 3, STEM_COUTS), x.device) if stats else None
    plan(x, w, gamma, pooled, tap, part)
    return pooled, tap, part


def stem_relu(
    pooled: Tensor,  # [N, 64, Tp, Hp, Wp]
    record: Tensor,  # [3, 64] or more rows
    tap: Tensor | None,  # uint8, like pooled
    x: Tensor,  # [N, Ci, T, H, W], any strides
    w: Tensor,  # [64, Ci, 1, 7, 7]
    gamma: Tensor | None,  # [64]
    wiring: str,
) -> Tensor:
    """relu((pooled - mean) * scale + bias), `record` the affine, of what `stem_fwd` gave for x, w and gamma.

    `tap` becomes 255 where the ReLU is off. Where gamma is 0 all of a window are equal after it: the tap becomes the
    first, before that, and pooled z at that place.

    Returns:
        y, like pooled. Runs of the same shape give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `stem_fwd_why_not` says), or CUDA failed.
    """
    _check_stem(x, w, pooled.dtype)
    _check_gamma(gamma)
    _check_activation("pooled", pooled, _pooled_shape(x, wiring), pooled.dtype)
    if tap is not None:
        _check_activation("tap", tap, pooled.shape, torch.uint8)
    _check_rows("record", record, 3, STEM_COUTS)
    y = alloc(tuple(pooled.shape), x.device, pooled.dtype)
    if y.numel() == 0:
        return y
    gamma_type = "float32" if gamma is None else _FLOATS[gamma.dtype]

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        types = _FLOATS[x.dtype], _FLOATS[w.dtype], gamma_type, _DTYPES[pooled.dtype]
        rest = *x.shape, _padded(wiring), x.stride(), *types
        return NativePlan(lambda stream, *addresses: native.stem_relu(*addresses, *rest, stream))

    key = "stem_relu", x.shape, x.stride(), x.dtype, w.dtype, gamma_type, x.device, pooled.dtype, wiring
    plan_for(key, build)(pooled, record, y, tap, x, w, gamma)
    return y


def stem_wgrad(
    x: Tensor,  # [N, Ci, T, H, W], any strides
    g: Tensor,  # [N, 64, Tp, Hp, Wp]
    tap: Tensor,  # uint8, like g
    w: Tensor,  # [64, Ci, 1, 7, 7]
    record: Tensor,  # [1, 64] or more rows
    sums: Tensor,  # [2, 64] or more rows
    wiring: str,
) -> Tensor:
    """The weight gradient of the stem's convolution in parts, but for the scale; float32 accumulation.

    With z = conv(x, w) as `stem_fwd` rounds it, g is the gradient of relu(bn(z)) pooled, `tap` the position in its
    window that the pool took of each element, (3 kt + kh) 3 + kw, or 255. With r what the pool sends to a position,
    mean a row of `record`, c0 and c1 rows of `sums`, it is the sum of dz / scale = r - c0 - (z - mean) * c1 times x,
    both rounded to the dtype of g. Fastest where pixels of a row lie together, rows are even and 8-byte aligned. What
    is not finite in the clip may also reach taps that meet it only beside the output.

    Returns:
        float32 [R, 64 Ci, 64], each row the sum over a part of the positions: that of (co, c, kh, kw) is element
        [(kh Ci + c) 8 + kw + 1, co], others are undefined. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `stem_wgrad_why_not` says), or CUDA failed.
    """
    _check_stem(x, w, g.dtype)
    _check_activation("g", g, _pooled_shape(x, wiring), g.dtype)
    _check_activation("tap", tap, g.shape, torch.uint8)
    _check_rows("record", record, 1, STEM_COUTS)
    _check_rows("sums", sums, 2, STEM_COUTS)
    if g.numel() == 0:
        return torch.zeros((1, 64 * x.size(1), STEM_COUTS), device=g.device)

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        names = "clips", "channels", "frames", "height", "width", "padded"
        shape = dict(zip(names, (*x.shape, _padded(wiring))))
        types = {"x_type": _FLOATS[x.dtype], "w_type": _FLOATS[w.dtype], "dtype": _DTYPES[g.dtype]}
        rest = {**shape, "strides": x.stride(), **types}
        plan = NativePlan(lambda stream, *addresses: native.stem_wgrad(*addresses, **rest, stream=stream))
        with torch.cuda.device(x.device):
            plan.rows = native.stem_wgrad_partials(**shape)
        return plan

    plan = plan_for(("stem_wgrad", x.shape, x.stride(), x.dtype, w.dtype, x.device, g.dtype, wiring), build)
    part = alloc((plan.rows, 64 * x.size(1), STEM_COUTS), g.device)
    plan(x, g, tap, w, record, sums, part)
    return part


def stem_infer(
    x: Tensor,  # [N, Ci, T, H, W], any strides
    w_packed: Tensor,  # [steps, 128, 8], from `stem_pack`
    record: Tensor,  # [3, 64] or more rows
    wiring: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """max_pool(relu((conv(u) - mean) * scale + bias)), conv 1x7x7 of stride (1, 2, 2), `record` the affine; one pass.

    u is x in the dtype of w_packed, or of uint8 frames (x - mean) / std, a number each a channel, rounded to it;
    the padding is zero after that. float32 accumulation and normalisation, one rounding. Fastest where x lies in planes
    or pixel by pixel, rows are multiples of 8 pixels and everything is 16-byte aligned. An infinity or NaN in the clip
    also reaches outputs one position beside those whose window it lies in; -inf is 0 where the scale is 0.

    Returns:
        [N, 64, To, Ho, Wo] channels_last_3d, in the dtype of w_packed. Runs give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `stem_why_not` says), or CUDA failed.
    """
    dtype = w_packed.dtype
    n, ci, *sizes = x.shape
    if x.dtype not in _PIXELS or dtype not in _DTYPES:
        raise ValueError(f"x, w_packed: expected pixels and bfloat16 or float16, got {x.dtype}, {dtype}")
    steps = {1: 7, 2: 7, 3: 11, 4: 14}.get(ci)
    if w_packed.shape != (steps, 128, 8) or not w_packed.is_contiguous() or w_packed.data_ptr() % 16:
        raise ValueError(f"w_packed: expected what stem_pack makes for {ci} channels, got {list(w_packed.shape)}")
    _check_rows("record", record, 3, STEM_COUTS)
    if (x.dtype == torch.uint8) != (mean is not None and std is not None) or (mean is None) != (std is None):
        raise ValueError("mean, std: expected both of uint8 frames, none of others")
    if mean is not None and not len(mean) == len(std) == ci:
        raise ValueError(f"mean, std: expected {ci} numbers, got {len(mean)}, {len(std)}")
    mean, std = tuple(mean or [0.0] * ci), tuple(std or [1.0] * ci)
    sizes[1:] = [(s - 1) // 2 + 1 for s in sizes[1:]]
    y = alloc((n, STEM_COUTS, *out_sizes(sizes, **reference.stem_pool(wiring))), x.device, dtype)
    if y.numel() == 0:
        return y

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        scale, bias = [1 / s for s in std], [-m / s for m, s in zip(mean, std)]
        rest = *x.shape, x.stride(), _PIXELS[x.dtype], _DTYPES[dtype], _padded(wiring), scale, bias
        return NativePlan(lambda stream, *addresses: native.stem_infer(*addresses, *rest, stream))

    key = "stem_infer", x.shape, x.stride(), x.dtype, x.device, dtype, wiring, mean, std
    plan_for(key, build)(x, w_packed, record, y)
    return y


def tail_why_not(
    x_shape: tuple[int, ...], dtype: torch.dtype, down_channels: int = 0, frames: int | None = None
) -> str | None:
    """Why the tail's kernel cannot run for x [N, M, T, H, W] on the current device, or None.

    `down_channels`: with D inside, of so many channels; 0: without. `frames`: see `tail_infer`.
    """
    if dtype not in _DTYPES:
        return f"tail_infer: dtype {dtype} (expected bfloat16 or float16)"
    n, m, t, h, w = x_shape
    native = _backends.native()
    return native if isinstance(native, str) else native.tail_infer_why_not(n, t, h * w, m, down_channels, frames or 0)


def _check_matrix(name: str, w: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if w.dtype != dtype or tuple(w.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {w.dtype} {list(w.shape)}")
    if not w.is_contiguous() or w.data_ptr() % 16:
        raise ValueError(f"{name}: expected contiguous memory of 16-byte alignment")


def _check_join(x: Tensor, o: Tensor | None, join: str) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected bfloat16 or float16, got {x.dtype}")
    if join not in ("relu", "relu_add", "add_relu", "mean_relu") or (join == "relu") != (o is None):
        raise ValueError(f"join, o: expected relu without o, or relu_add, add_relu or mean_relu with it, got {join!r}")
    _check_activation("x", x, x.shape, x.dtype)
    if o is not None:
        _check_activation("o", o, x.shape, x.dtype)


def tail_infer(
    x: Tensor,  # [N, M, T, H, W]
    o: Tensor | None,  # like x, or x itself
    join: str,
    residual: Tensor,  # [N, 4M, T, H, W], or with w_d [N, Ci, T, H, W]
    w_t: Tensor,  # [M, 3, M]
    record_t: Tensor,  # [3, M] or more rows
    w_e: Tensor,  # [4M, M]
    record_e: Tensor,  # [3, 4M] or more rows
    w_r: Tensor | None = None,  # [M, 4M]
    record_r: Tensor | None = None,  # [3, M] or more rows
    w_d: Tensor | None = None,  # [4M, Ci]
    record_d: Tensor | None = None,  # [3, 4M] or more rows
    thin: bool = False,
    frames: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The tail of a bottleneck in inference and the reduce of the next, in one pass: (y, z).

    u = bn(T x), a 3x1x1 convolution of stride 1 and padding 1; t is relu(u) (`join` "relu", o None), relu(u) + o
    ("relu_add"), relu(u + o) ("add_relu") or relu(u / 2 + o / 2) ("mean_relu"); y = relu(bn(E t) + r), r = residual or,
    with w_d, bn(D residual); z = relu(bn(R y)), or None without w_r. bn is the affine of a record. t, r, y and z are
    rounded to the dtype, sums are float32. Runs of the same shape give the same bits.

    `frames`, without w_r and w_d: T / 2, rounded down or up; y is pooled to as many by windows (2, 1, 1) of that
    stride, of which the last is cut if T is odd and `frames` rounded up.

    Returns:
        y [N, 4M, T or frames, H, W], of which `thin` stores [..., ::2, ::2] only, and z [N, M, T, H, W];
        channels_last_3d.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `tail_why_not` says), or CUDA failed.
    """
    n, m, t, h, w = x.shape
    _check_join(x, o, join)
    if (w_r is None) != (record_r is None):
        raise ValueError("w_r, record_r: expected both or neither")
    if (w_d is None) != (record_d is None):
        raise ValueError("w_d, record_d: expected both or neither")
    _check_frames(frames, t)
    if frames is not None and (w_r is not None or w_d is not None or thin):
        raise ValueError(f"frames: expected None with w_r, w_d or thin, got {frames}")
    ci = None if w_d is None else w_d.size(-1)
    _check_activation("residual", residual, (n, 4 * m if ci is None else ci, t, h, w), x.dtype)
    layers = [("t", w_t, (m, 3, m), record_t), ("e", w_e, (4 * m, m), record_e)]
    layers += [("r", w_r, (m, 4 * m), record_r), ("d", w_d, (4 * m, ci), record_d)]
    for name, weight, shape, record in layers:
        if weight is not None:
            _check_matrix(f"w_{name}", weight, shape, x.dtype)
            _check_rows(f"record_{name}", record, 3, shape[0])

    step = 2 if thin else 1
    y = alloc((n, 4 * m, frames or t, -(-h // step), -(-w // step)), x.device, x.dtype)
    z = None if w_r is None else alloc(tuple(x.shape), x.device, x.dtype)
    if x.numel() == 0:
        return y, z

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        sizes = n, t, h * w, m, ci or 0, frames or 0, join, _DTYPES[x.dtype], w if thin else 0
        return NativePlan(lambda stream, *addresses: native.tail_infer(*addresses, *sizes, stream))

    plan = plan_for(("tail_infer", x.shape, x.dtype, x.device, ci, join, thin, frames), build)
    plan(x, o, residual, w_t, w_e, w_r, w_d, record_t, record_e, record_r, record_d, y, z)
    return y, z


def temporal_why_not(x_shape: tuple[int, ...], dtype: torch.dtype, join: str = "relu_add") -> str | None:
    """Why T has no kernel for x [N, M, T, H, W] and this join on the current device, or None."""
    if dtype not in _DTYPES:
        return f"temporal_infer: dtype {dtype} (expected bfloat16 or float16)"
    native = _backends.native()
    return native if isinstance(native, str) else _temporal_kernel(native, x_shape, join)[1]


def _temporal_kernel(native, x_shape: tuple[int, ...], join: str) -> tuple[str, str | None]:
    """Which of T's two kernels runs, and why it cannot, or None: at 128 channels the one without a join is faster."""
    n, m, t, h, w = x_shape
    if join == "relu" and native.temporal_boxes_why_not(n, t, h * w, m) is None:
        return "temporal_boxes", None
    return "temporal_infer", native.temporal_infer_why_not(n, t, h * w, m)


def temporal_infer(
    x: Tensor,  # [N, M, T, H, W]
    o: Tensor | None,  # like x, or x itself
    join: str,
    w: Tensor,  # [M, 3, M]
    record: Tensor,  # [3, M] or more rows
) -> Tensor:
    """T in inference: relu(u), u = bn(T x), or u joined with o; each as t in `tail_infer`, which does not store it.

    Returns:
        [N, M, T, H, W], channels_last_3d. Runs of the same shape give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `temporal_why_not` says), or CUDA failed.
    """
    n, m, t, h, width = x.shape
    _check_join(x, o, join)
    _check_matrix("w", w, (m, 3, m), x.dtype)
    _check_rows("record", record, 3, m)
    y = alloc(tuple(x.shape), x.device, x.dtype)
    if x.numel() == 0:
        return y

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        sizes = n, t, h * width, m, join, _DTYPES[x.dtype]
        with torch.cuda.device(x.device):
            launch = getattr(native, _temporal_kernel(native, tuple(x.shape), join)[0])
        return NativePlan(lambda stream, *addresses: launch(*addresses, *sizes, stream))

    plan_for(("temporal_infer", x.shape, x.dtype, x.device, join), build)(x, o, w, record, y)
    return y


def _temporal_train_sizes(x: Operand) -> tuple:
    n, c, t, h, w = x.a.shape
    return n, t, h * w, c


def temporal_train_why_not(x: Operand, w: Tensor) -> str | None:
    """Why `temporal_train` cannot run these, or None."""
    c = x.channels
    if x.a.dtype not in _DTYPES:
        return f"temporal_train: dtype {x.a.dtype} (expected bfloat16 or float16)"
    if x.read not in ("raw", "bn_relu"):
        return f"temporal_train: read {x.read} (expected raw or bn_relu)"
    if tuple(w.shape) != (c, 3, c):
        return f"temporal_train: w {list(w.shape)} (expected {[c, 3, c]})"
    native = _backends.native()
    return native if isinstance(native, str) else native.temporal_train_why_not(_temporal_train_sizes(x))


def temporal_train(
    x: Operand,  # [N, C, T, H, W], read raw or bn_relu
    w: Tensor,  # [C, 3, C]
    transposed: bool = False,
    stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, part) of T a, T the 3x1x1 convolution of stride 1 by w, a what x reads; `transposed`: T' a.

        y[p, co] = sum_{tap, ci} a[p + tap, ci] w[co, tap, ci], transposed sum_{tap, ci} a[p - tap, ci] w[ci, tap, co]

    Every element of x is read and rounded once; float32 accumulation.

    Returns:
        y [N, C, T, H, W] channels_last_3d, and with `stats` float32 [R, 3, C] rows (n, mean, M2) of the rounded y, no
        n = 0, else None. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `temporal_train_why_not` says), or CUDA failed.
    """
    shape, dtype, device, c = tuple(x.a.shape), x.a.dtype, x.a.device, x.channels
    if dtype not in _DTYPES or x.read not in ("raw", "bn_relu"):
        raise ValueError(f"x: expected bfloat16 or float16 read raw or bn_relu, got {dtype}, {x.read!r}")
    _check_operand("x", x, shape, dtype)
    _check_matrix("w", w, (c, 3, c), dtype)
    y = alloc(shape, device, dtype)
    if y.numel() == 0:
        return y, torch.zeros(1, 3, c, device=device) if stats else None
    sizes = _temporal_train_sizes(x)

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        rest = x.read, transposed, sizes, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.temporal_train(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.temporal_train_partials(sizes)
        return plan

    plan = plan_for(("temporal_train", sizes, x.read, transposed, dtype, device), build)
    part = alloc((plan.rows, 3, c), device) if stats else None
    plan(*x.args(), w, y, part)
    return y, part


def _temporal_bwd_sizes(dz: Operand, add: bool, sums: bool) -> tuple:
    n, m, t, h, w = dz.a.shape
    return n, t, h * w, m, add, sums


def temporal_bwd_why_not(dz: Operand, x: Operand, w: Tensor, add: bool = False, sums: bool = False) -> str | None:
    """Why `temporal_bwd` cannot run these, or None."""
    m = dz.channels
    if dz.a.dtype not in _DTYPES:
        return f"temporal_bwd: dtype {dz.a.dtype} (expected bfloat16 or float16)"
    if dz.read not in ("bn_bwd", "bn_bwd_open") or x.read not in ("raw", "bn_relu"):
        return f"temporal_bwd: reads {dz.read}, {x.read} (expected bn_bwd or bn_bwd_open, and raw or bn_relu)"
    if x.a.shape != dz.a.shape or tuple(w.shape) != (m, 3, m):
        return f"temporal_bwd: x {list(x.a.shape)}, w {list(w.shape)} (expected {list(dz.a.shape)}, {[m, 3, m]})"
    native = _backends.native()
    return native if isinstance(native, str) else native.temporal_bwd_why_not(_temporal_bwd_sizes(dz, add, sums))


def temporal_bwd(
    dz: Operand,  # [N, M, T, H, W], read bn_bwd or bn_bwd_open
    x: Operand,  # like dz, read raw or bn_relu
    w: Tensor,  # [M, 3, M]
    add: bool = False,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, part, dw) of T x, T the 3x1x1 convolution of stride 1 by w, from the gradient dz of its result.

        dx[p, ci]       = sum_{tap, co} dz[p - tap, co] w[co, tap, ci] + add dz.a[p, ci]
        dw[co, tap, ci] = sum_p dz[p, co] x[p + tap, ci]

    All that both need is read once, and of 128 channels dz twice. An operand is what its read makes of its tensors,
    rounded to the dtype; float32 accumulation. `sums`, of x read bn_relu: what the normalisation of x.a needs.

    Returns:
        dx [N, M, T, H, W] channels_last_3d; with `sums` float32 [R, 2, M] rows (sum g, sum g (x.a - mean)), g the
        rounded dx where the ReLU of x passes it, else 0; or None; float32 [R', M * 3 * M], each row [M, 3, M] the
        sum over a part of the positions. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `temporal_bwd_why_not` says), or CUDA failed.
    """
    shape, dtype, device, m = tuple(dz.a.shape), dz.a.dtype, dz.a.device, dz.channels
    if dtype not in _DTYPES or dz.read not in ("bn_bwd", "bn_bwd_open"):
        raise ValueError(f"dz: expected bfloat16 or float16 read bn_bwd or bn_bwd_open, got {dtype}, {dz.read!r}")
    if x.read not in ("raw", "bn_relu") or (sums and x.read == "raw"):
        raise ValueError(f"x: expected to be read bn_relu or, without sums, raw, got {x.read!r}")
    _check_operand("dz", dz, shape, dtype)
    _check_operand("x", x, shape, dtype)
    _check_matrix("w", w, (m, 3, m), dtype)
    dx = alloc(shape, device, dtype)
    if dx.numel() == 0:
        part = torch.zeros(1, 2, m, device=device) if sums else None
        return dx, part, torch.zeros(1, m * 3 * m, device=device)
    sizes = _temporal_bwd_sizes(dz, add, sums)

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        rest = dz.read, x.read, sizes, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.temporal_bwd(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.temporal_bwd_rows(sizes)
        return plan

    plan = plan_for(("temporal_bwd", sizes, dz.read, x.read, dtype, device), build)
    splits, rows = plan.rows
    part = alloc((rows, 2, m), device) if sums else None
    dw = alloc((splits, m * 3 * m), device)
    plan(*dz.args(), *x.args(), w, dx, part, dw)
    return dx, part, dw


def _bn_bwd_sizes(z: Tensor) -> tuple[int, int]:
    return z.numel() // z.size(1), z.size(1)


def bn_bwd_why_not(z: Tensor) -> str | None:
    """Why `bn_bwd` cannot run for tensors like z, or None."""
    if z.dtype not in _DTYPES:
        return f"bn_bwd: dtype {z.dtype} (expected bfloat16 or float16)"
    native = _backends.native()
    return native if isinstance(native, str) else native.bn_bwd_why_not(*_bn_bwd_sizes(z))


def bn_bwd(
    g: Tensor,  # [N, C, T, H, W]
    z: Tensor,  # like g
    record: Tensor,  # [4, C] or more rows: mean, scale, bias, invstd
    g_mask: Tensor | None = None,  # like g
) -> tuple[Tensor, Tensor]:
    """dz of u = (z - mean) scale + bias in training, from the gradient g of u, with its sums; P positions.

        dz = scale (g - c0 - (z - mean) c1),  c0 = sum g / P,  c1 = invstd^2 sum g (z - mean) / P

    With g_mask g counts where that is not <= 0, else 0. Everything is read once; float32 sums.

    Returns:
        dz [N, C, T, H, W] channels_last_3d, rounded once, and float32 [4, C], rows c0, c1, invstd sum g (z - mean),
        sum g. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `bn_bwd_why_not` says), or CUDA failed.
    """
    dtype, channels = z.dtype, z.size(1)
    if dtype not in _DTYPES:
        raise ValueError(f"z: expected bfloat16 or float16, got {dtype}")
    for name, tensor in (("g", g), ("z", z), ("g_mask", g_mask)):
        if tensor is not None:
            _check_activation(name, tensor, z.shape, dtype)
    _check_rows("record", record, 4, channels)
    dz, sums = alloc(tuple(z.shape), z.device, dtype), alloc((4, channels), z.device)
    if z.numel() == 0:
        return dz, sums.zero_()
    sizes = *_bn_bwd_sizes(z), _DTYPES[dtype]

    def build() -> NativePlan:
        native = _backends.native()
        if isinstance(native, str):
            raise RuntimeError(native)
        return NativePlan(lambda stream, *addresses: native.bn_bwd(*addresses, *sizes, stream))

    plan_for(("bn_bwd", *sizes, z.device), build)(g, g_mask, z, record, dz, sums)
    return dz, sums
