"""The factorised convolutions as ops: spatial 1x3x3, temporal 3x1x1 and pointwise 1x1x1 (kernels: `_conv.py`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backends, reference
from .._checks import check_activation, check_positive, check_weight, compute_dtype
from ._conv import (
    Geometry,
    conv,
    conv_wgrad,
    pack_weight,
    pointwise,
    spatial,
    spatial_dgrad,
    spatial_fwd,
    spatial_wgrad,
    temporal,
    weight_grad,
)
from ._triton import Operand, empty_ndhwc, ndhwc, sum_splits, why_not


def conv_fwd(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    packed = pack_weight(w, x.dtype)
    if geometry == spatial():
        return spatial_fwd(Operand("raw", ndhwc(x)), packed)[0]
    return conv(Operand("raw", ndhwc(x)), packed, geometry)[0]


def conv_bwd(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    g = Operand("raw", ndhwc(dy))
    dx = dw = None
    if need_x:
        packed, dims = pack_weight(w, x.dtype), tuple(x.shape[2:])
        dx, _ = spatial_dgrad(g, packed) if geometry == spatial() else conv(g, packed, geometry, out_dims=dims)
    if need_w:
        a = Operand("raw", ndhwc(x))
        splits = spatial_wgrad(g, a) if geometry == spatial() else conv_wgrad(g, a, geometry)
        dw = weight_grad(sum_splits([splits])[0], w)
    return dx, dw


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, geometry):
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return conv_fwd(x, w, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *conv_bwd(dy, *ctx.saved_tensors, ctx.geometry, *ctx.needs_input_grad[:2]), None


def _register(name: str, make: Callable) -> Callable:
    """Register p3d::<name> and p3d::<name>_bwd, the traceable twins of `_Conv` with the geometry `make(stride)`."""

    @torch.library.custom_op(f"p3d::{name}", mutates_args=())
    def fwd(x: Tensor, w: Tensor, stride: int) -> Tensor:
        return conv_fwd(x, w, make(stride))

    @fwd.register_fake
    def _(x, w, stride):
        return empty_ndhwc((x.size(0), w.size(0), *make(stride).out_shape(*x.shape[2:])), x)

    @torch.library.custom_op(f"p3d::{name}_bwd", mutates_args=())
    def bwd(dy: Tensor, x: Tensor, w: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        return conv_bwd(dy, x, w, make(stride), True, True)

    @bwd.register_fake
    def _(dy, x, w, stride):
        return empty_ndhwc(x.shape, x), w.new_empty(w.shape)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.stride = inputs[2]

    fwd.register_autograd(lambda ctx, dy: (*bwd(dy, *ctx.saved_tensors, ctx.stride), None), setup_context=setup)
    return fwd


_REGISTERED = {make.__name__: _register(f"{make.__name__}_conv", make) for make in (spatial, temporal, pointwise)}


def _run(make: Callable, x: Tensor, w: Tensor, stride: int) -> Tensor:
    name = f"{make.__name__}_conv"
    check_activation("x", x)
    check_positive("stride", stride)
    dtype, weight_dtype = compute_dtype(x)
    check_weight("w", w, (None, x.size(1), *make().taps), x, weight_dtype)
    x = x.to(dtype)
    if _backends.choose(name, x, lambda _: why_not(x), ("cuda", "triton", "aten")) == "aten":
        return getattr(reference, name)(x, w, stride)
    if torch.compiler.is_compiling():
        return _REGISTERED[make.__name__](x, w, stride)
    return _Conv.apply(x, w, make(stride))


def spatial_conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """S, the spatial convolution: y[n, co, t, h, w] = sum x[n, ci, t, h s + i - 1, w s + j - 1] w[co, ci, 0, i, j].

    Equivalent to `F.conv3d(x, w, stride=(1, s, s), padding=(0, 1, 1))`.

    Args:
        x: [N, Ci, T, H, W], float32, float16 or bfloat16 (float64 on the aten path). Read in NDHWC memory
            (`torch.channels_last_3d`); another layout is copied once.
        w: [Co, Ci, 1, 3, 3], the dtype of x; any float dtype under `torch.autocast`.
        stride: s, in space.

    Returns:
        [N, Co, T, ceil(H / s), ceil(W / s)] in NDHWC memory (conv3d's choice on the aten path).

    Numerics: float32 accumulation; float32 inputs use TF32 where `torch.backends.cudnn.allow_tf32` is set. Forward,
        dgrad and wgrad are this package's kernels and equal bit for bit from run to run.
    Raises: TypeError or ValueError naming the argument, before any launch.
    Source: Qiu, Yao, Mei, ICCV 2017, section 3.1 (S).
    """
    return _run(spatial, x, w, stride)


def temporal_conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """T, the temporal convolution: y[n, co, t, h, w] = sum x[n, ci, t s + i - 1, h, w] w[co, ci, i, 0, 0].

    Equivalent to `F.conv3d(x, w, stride=(s, 1, 1), padding=(1, 0, 0))`. w [Co, Ci, 3, 1, 1]; stride is in time; all
    else as in `spatial_conv`.
    """
    return _run(temporal, x, w, stride)


def pointwise_conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """1x1x1 convolution: y[n, co, t, h, w] = sum x[n, ci, t, h s, w s] w[co, ci, 0, 0, 0].

    Equivalent to `F.conv3d(x, w, stride=(1, s, s))`. w [Co, Ci, 1, 1, 1]; stride is in space; all else as in
    `spatial_conv`.
    """
    return _run(pointwise, x, w, stride)
