"""Both gradients of a 1x1x1 convolution of few output channels: csrc/reduce_bwd.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from .._triton import Operand
from ._common import _DTYPES, _check_activation, _check_matrix, _check_operand, _conv_wgrad_out, _native


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
        native = _native()
        rest = *sizes, mask_x, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.reduce_bwd(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.reduce_bwd_partials(*sizes)
        return plan

    plan = plan_for(("reduce_bwd", sizes, mask_x, dtype, device), build)
    part = alloc((plan.rows, co * ci), device)
    plan(*dz.args()[:2], dz.record_b, dz.sums, x, w, o, o_mask, dx, part)
    return dx, part
