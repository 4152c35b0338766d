"""The gradient of a tensor that is normalised, with its sums, in one launch: csrc/bn_bwd.cu."""

from __future__ import annotations

from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from ._common import _DTYPES, _check_activation, _check_dtype, _check_rows, _native


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
    _check_dtype("z", dtype)
    for name, tensor in (("g", g), ("z", z), ("g_mask", g_mask)):
        if tensor is not None:
            _check_activation(name, tensor, z.shape, dtype)
    _check_rows("record", record, 4, channels)
    dz, sums = alloc(tuple(z.shape), z.device, dtype), alloc((4, channels), z.device)
    if z.numel() == 0:
        return dz, sums.zero_()
    sizes = *_bn_bwd_sizes(z), _DTYPES[dtype]

    def build() -> NativePlan:
        native = _native()
        return NativePlan(lambda stream, *addresses: native.bn_bwd(*addresses, *sizes, stream))

    plan_for(("bn_bwd", *sizes, z.device), build)(g, g_mask, z, record, dz, sums)
    return dz, sums
