"""What the kernels' functions share: dtypes, the reads of an operand, sizes, and the checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends
from .._triton import Operand

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _native():
    """The extension, or RuntimeError with why there is none."""
    native = _backends.native()
    if isinstance(native, str):
        raise RuntimeError(native)
    return native


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: expected bfloat16 or float16, got {dtype}")


def _check_activation(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.dtype != dtype or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last_3d) or x.data_ptr() % 16:
        raise ValueError(f"{name}: expected channels_last_3d memory of 16-byte alignment")


def _check_rows(name: str, rows: Tensor, least: int, channels: int) -> None:
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.size(0) < least or rows.size(1) != channels:
        raise ValueError(f"{name}: expected float32 [{least}, {channels}], got {rows.dtype} {list(rows.shape)}")
    if not rows.is_contiguous() or rows.data_ptr() % 16:
        raise ValueError(f"{name}: expected contiguous memory of 16-byte alignment")


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


def _conv_wgrad_out(dims: Sequence[int], stride: tuple[int, int]) -> tuple[int, int, int]:
    (t, h, w), (_, space) = dims, stride
    return t, (h - 1) // space + 1, (w - 1) // space + 1


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


def _check_frames(frames: int | None, time: int) -> None:
    if frames is not None and (frames < 1 or abs(2 * frames - time) > 1):
        raise ValueError(f"frames: expected None or half of {time}, rounded down or up, got {frames}")


def _check_matrix(name: str, w: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if w.dtype != dtype or tuple(w.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {w.dtype} {list(w.shape)}")
    if not w.is_contiguous() or w.data_ptr() % 16:
        raise ValueError(f"{name}: expected contiguous memory of 16-byte alignment")


def _check_join(x: Tensor, o: Tensor | None, join: str) -> None:
    _check_dtype("x", x.dtype)
    if join not in ("relu", "relu_add", "add_relu", "mean_relu") or (join == "relu") != (o is None):
        raise ValueError(f"join, o: expected relu without o, or relu_add, add_relu or mean_relu with it, got {join!r}")
    _check_activation("x", x, x.shape, x.dtype)
    if o is not None:
        _check_activation("o", o, x.shape, x.dtype)
