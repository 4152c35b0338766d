"""The input gradient of a 1x1x1 convolution of raw tensors, masked and added: csrc/conv_infer.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from ._common import _DTYPES, _check_activation, _check_dtype, _check_matrix, _native


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
    _check_dtype("dz", dtype)
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
        native = _native()
        with torch.cuda.device(dz.device):
            rest = sizes, native.point_dgrad_plan(sizes, tile), _DTYPES[dtype]
        return NativePlan(lambda stream, *addresses: native.point_dgrad(*addresses, *rest, stream))

    plan_for(("point_dgrad", sizes, dtype, dz.device, tile), build)(dz, w, o, o_mask, mask, dx)
    return dx
