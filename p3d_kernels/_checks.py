"""Argument checks shared by the ops: each raises before any launch and names argument, expected and got."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_activation(name: str, x: Tensor, channels: int | None = None) -> None:
    """x must be a floating-point tensor [N, C, T, H, W], with `channels` channels if given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() != 5:
        raise ValueError(f"{name}: expected 5 dimensions [N, C, T, H, W], got {x.dim()} (shape {tuple(x.shape)})")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {x.dtype}")
    if channels is not None and x.size(1) != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {x.size(1)} (shape {tuple(x.shape)})")


def check_clips(name: str, x: Tensor, channels: int) -> None:
    """x must be clips that a net of `channels` input channels takes: of no axis but the batch empty."""
    check_activation(name, x, channels)
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: expected at least one frame, row and column, got shape {tuple(x.shape)}")


def check_weight(
    name: str, w: Tensor, shape: tuple[int | None, ...], x: Tensor, dtype: torch.dtype | None = None
) -> None:
    """w must have `shape` (None: any), live on the device of x, and have its dtype (any float under autocast).

    Args:
        dtype: the dtype that w must have; None under autocast, which casts it.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(w).__name__}")
    want = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
    if w.dim() != len(shape) or any(s is not None and s != d for s, d in zip(shape, w.shape)):
        raise ValueError(f"{name}: expected shape {want}, got {list(w.shape)}")
    if w.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of the input), got {w.device}")
    if dtype is not None and w.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (that of the input), got {w.dtype}; use torch.autocast to mix")
    if w.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point dtype, got {w.dtype}")


def check_choice(name: str, value: object, choices: tuple) -> None:
    """value must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_positive(name: str, value: int) -> None:
    """value must be a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")


def compute_dtype(x: Tensor) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype to compute in, dtype that weights must have or None): autocast decides, as it does for conv3d."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device), None
    return x.dtype, x.dtype
