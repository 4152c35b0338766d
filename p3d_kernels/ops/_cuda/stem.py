"""The stem, a 1x7x7 convolution, BN, ReLU and a pool, in training and inference: csrc/stem_*.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends, reference
from .._tape import NativePlan, alloc, plan_for
from ..max_pool import out_sizes
from ._common import _DTYPES, _check_activation, _check_rows, _native

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
        native = _native()
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
        native = _native()
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
        native = _native()
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
        native = _native()
        scale, bias = [1 / s for s in std], [-m / s for m, s in zip(mean, std)]
        rest = *x.shape, x.stride(), _PIXELS[x.dtype], _DTYPES[dtype], _padded(wiring), scale, bias
        return NativePlan(lambda stream, *addresses: native.stem_infer(*addresses, *rest, stream))

    key = "stem_infer", x.shape, x.stride(), x.dtype, x.device, dtype, wiring, mean, std
    plan_for(key, build)(x, w_packed, record, y)
    return y
