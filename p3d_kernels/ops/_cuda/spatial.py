"""The 1x3x3 convolution in training and its gradients: csrc/spatial_conv.cu, spatial_dgrad.cu and spatial_wgrad.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from ._common import _DTYPES, _check_activation, _check_dtype, _check_rows, _native


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


def _plan(name: str, x: Tensor, ci: int, co: int, *form) -> NativePlan:
    """The launch of the extension's function `name`; its `rows` are those of the partial sums, of sizes and form."""

    def build() -> NativePlan:
        native = _native()
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
    _check_dtype("g", g.dtype)
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
