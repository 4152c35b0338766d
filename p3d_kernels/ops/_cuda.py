"""The Hopper kernels as functions of tensors: allocation, checks and the current stream around `p3d_kernels._C`.

A tensor's "affine" is float32 [3, C], rows mean, scale and bias: u = (z - mean) * scale + bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _sizes(x_shape: tuple[int, ...], ci: int, co: int) -> tuple[int, int, int, int, int]:
    n, _, t, h, w = x_shape
    return n * t, h, w, ci, co


def why_not(x_shape: tuple[int, ...], dtype: torch.dtype, ci: int, co: int, stride: int = 1) -> str | None:
    """Why the spatial kernel cannot convolve x [N, Ci, T, H, W] to Co channels on the current device, or None."""
    if dtype not in _DTYPES:
        return f"spatial_conv: dtype {dtype} (expected bfloat16 or float16)"
    if stride != 1:
        return f"spatial_conv: stride {stride} (expected 1)"
    native = _backends.native()
    if isinstance(native, str):
        return native
    return native.spatial_conv_why_not(*_sizes(x_shape, ci, co))


def spatial_conv_fwd(
    x: Tensor,  # [N, Ci, T, H, W] channels_last_3d
    w_packed: Tensor,  # [Co, 9, Ci]; [Ci, 9, Co] with flip
    affine: Tensor | None = None,  # [3, Ci]
    out_affine: Tensor | None = None,  # [3, Co]
    stats: bool = False,
    flip: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = epi(conv(pro(x), w)), a 1x3x3 convolution of stride 1 and padding 1, float32 accumulation.

    `affine`: pro(x) = relu((x - mean) * scale + bias) rounded to the dtype, zero padding after it.
    `out_affine`: epi(y) likewise. `stats`: also return the partial statistics of the rounded y.
    `flip`: `w_packed` is that of the convolution whose input gradient y is, x being its output's gradient.

    Returns:
        y [N, Co, T, H, W] channels_last_3d, and float32 [R, 3, Co] rows (n, mean, M2), some with n = 0, or None.
        Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `why_not` says), or CUDA failed.
    """
    ci, co = (w_packed.size(0), w_packed.size(2)) if flip else (w_packed.size(2), w_packed.size(0))
    n, _, t, h, w = x.shape
    if x.size(1) != ci or w_packed.size(1) != 9:
        want = f"[{x.size(1)}, 9, Co]" if flip else f"[Co, 9, {x.size(1)}]"
        raise ValueError(f"w_packed: expected {want}, got {list(w_packed.shape)}")
    if x.dtype not in _DTYPES or w_packed.dtype != x.dtype:
        raise ValueError(f"x, w_packed: expected one dtype, bfloat16 or float16, got {x.dtype}, {w_packed.dtype}")
    if not x.is_contiguous(memory_format=torch.channels_last_3d) or not w_packed.is_contiguous():
        raise ValueError("x, w_packed: expected channels_last_3d and contiguous memory")
    if x.data_ptr() % 16 or w_packed.data_ptr() % 16:
        raise ValueError("x, w_packed: expected 16-byte alignment")
    for name, rows, channels in (("affine", affine, ci), ("out_affine", out_affine, co)):
        if rows is None:
            continue
        if rows.shape != (3, channels) or rows.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32 [3, {channels}], got {rows.dtype} {list(rows.shape)}")
        if not rows.is_contiguous() or rows.data_ptr() % 16:
            raise ValueError(f"{name}: expected contiguous memory of 16-byte alignment")
    if stats and out_affine is not None:
        raise ValueError("stats: expected False with out_affine, got True")
    native = _backends.native()
    if isinstance(native, str):
        raise RuntimeError(native)

    y = torch.empty((n, co, t, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if x.numel() == 0:
        return y, torch.zeros(1, 3, co, device=x.device) if stats else None
    sizes = _sizes(x.shape, ci, co)
    with torch.cuda.device(x.device):
        partials = None
        if stats:
            partials = torch.empty(native.spatial_conv_partials(*sizes), 3, co, device=x.device)
        native.spatial_conv(
            x.data_ptr(),
            w_packed.data_ptr(),
            y.data_ptr(),
            0 if affine is None else affine.data_ptr(),
            0 if out_affine is None else out_affine.data_ptr(),
            0 if partials is None else partials.data_ptr(),
            *sizes,
            _DTYPES[x.dtype],
            flip,
            torch.cuda.current_stream().cuda_stream,
        )
    return y, partials
