"""The convolutions of inference, 1x1x1, 3x1x1 and 1x3x3: csrc/conv_infer.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from ._common import (
    _DTYPES,
    _check_activation,
    _check_dtype,
    _check_frames,
    _check_matrix,
    _check_rows,
    _conv_wgrad_out,
    _native,
)


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns every second one is."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


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
    _check_dtype("x", dtype)
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
        native = _native()
        sizes = _conv_infer_sizes(x.shape, co, taps, stride, join, o_size, frames)
        with torch.cuda.device(x.device):
            rest = sizes, native.conv_infer_plan(sizes, tile), join, _DTYPES[dtype]
        return NativePlan(lambda stream, *addresses: native.conv_infer(*addresses, *rest, stream))

    key = "conv_infer", x.shape, dtype, x.device, co, taps, stride, join, tile, o_size, frames
    plan_for(key, build)(x, o, w, record, y)
    return y
