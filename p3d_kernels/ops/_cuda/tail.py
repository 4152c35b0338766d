"""The tail of a bottleneck in inference and the reduce of the next: csrc/tail_infer.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from ._common import _DTYPES, _check_activation, _check_frames, _check_join, _check_matrix, _check_rows, _native


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
        native = _native()
        sizes = n, t, h * w, m, ci or 0, frames or 0, join, _DTYPES[x.dtype], w if thin else 0
        return NativePlan(lambda stream, *addresses: native.tail_infer(*addresses, *sizes, stream))

    plan = plan_for(("tail_infer", x.shape, x.dtype, x.device, ci, join, thin, frames), build)
    plan(x, o, residual, w_t, w_e, w_r, w_d, record_t, record_e, record_r, record_d, y, z)
    return y, z
