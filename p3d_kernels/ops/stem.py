"""The stem as an op: max_pool(relu(bn(conv(x)))), conv 1x7x7 of stride (1, 2, 2) (kernels: `_stem.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backends, reference
from .._checks import check_activation, check_choice, check_weight, compute_dtype
from .._norm import Norm, check_norm, update_running
from . import _cuda
from ._conv import cuda_allowed, weight_grad
from ._fused import Call, checked_before, settle, taped_fwd
from ._stem import channels_last, pools_raw, stem_bwd, stem_conv, stem_fwd, stem_pack
from ._tape import taped
from ._triton import MAX_POSITIONS, empty_ndhwc, ndhwc
from .max_pool import out_sizes, pool_fwd

# --- autograd and registration ---------------------------------------------------------------------------------------


class _Stem(torch.autograd.Function):
    """y = apply(x, w, weight, bias, norm, wiring, dtype, call); the running statistics have moved at the end."""

    @staticmethod
    def forward(ctx, x, w, weight, bias, norm, wiring, dtype, call):
        w_in, co = w.contiguous(), w.size(0)

        def pass_():
            y, record, z, tap, winner = stem_fwd(x, w_in, norm, wiring, dtype, True)
            return [y], [record, tap, winner, *([] if z is None else [z])]

        rows = (0, 0, co), (0, 4 * co, co)
        (y,), kept, ctx.layout = taped_fwd("stem", call, pass_, [x, w_in], [norm], lambda: rows)
        ctx.save_for_backward(x, w, kept)
        ctx.affine, ctx.mode, ctx.call = (weight, bias), (norm.training, wiring), call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, kept = ctx.saved_tensors
        g, w_in, needs, co = ndhwc(g), w.contiguous(), ctx.needs_input_grad[:2], w.size(0)

        def pass_():
            record, tap, winner, *z = ctx.layout.views(kept)
            z = z[0] if z else None
            dx, dw, sums = stem_bwd(g, x, w_in, z, record, tap, winner, *ctx.mode, *needs)
            return [dx], [sums, *([] if dw is None else [dw])]

        (dx,), grads, layout = taped(("stem bwd", *needs, ctx.call), pass_, [g, x, w_in, kept])
        pieces = [(0, 2 * co, co), (0, 3 * co, co), *([(1, 0, w.numel())] if needs[1] else [])]
        dweight, dbias, *dw = layout.cut(grads, lambda: pieces)
        affine = (_like(gradient, p) for gradient, p in zip((dweight, dbias), ctx.affine))
        return dx, weight_grad(dw[0], w) if dw else None, *affine, None, None, None, None


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)


@torch.library.custom_op(
    "p3d::stem",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "bool training, float eps, str wiring, ScalarType dtype, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(x, w, weight, bias, running_mean, running_var, training, eps, wiring, dtype, save):
    norm = Norm(weight, bias, running_mean, running_var, training=training, eps=eps)
    y, record, *saved = stem_fwd(x, w, norm, wiring, dtype, save)
    return y, record, *(y.new_empty(0) if s is None else s for s in saved)


@_op.register_fake
def _(x, w, weight, bias, running_mean, running_var, training, eps, wiring, dtype, save):
    z_shape, y_shape = stem_shapes(tuple(x.shape), w.size(0), wiring)
    y = empty_ndhwc(y_shape, x).to(dtype)
    record = x.new_empty((5, w.size(0)), dtype=torch.float32)
    if not save:
        return y, record, *(y.new_empty(0) for _ in range(3))
    raw = pools_raw(x, w, weight, dtype, wiring)
    z = y.new_empty(0) if raw else empty_ndhwc(z_shape, x).to(dtype)
    return y, record, z, torch.empty_like(y, dtype=torch.uint8), torch.empty_like(y)


@torch.library.custom_op(
    "p3d::stem_bwd",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor w, Tensor z, Tensor record, Tensor tap, Tensor winner, bool training, "
    "str wiring, bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _op_bwd(g, x, w, z, record, tap, winner, training, wiring, need_dx, need_dw):
    z = z if z.numel() else None
    dx, dw, sums = stem_bwd(g, x, w, z, record, tap, winner, training, wiring, need_dx, need_dw)
    grads = dx, None if dw is None else weight_grad(dw, w), sums[2].clone(), sums[3].clone()
    return tuple(g.new_empty(0) if d is None else d for d in grads)


@_op_bwd.register_fake
def _(g, x, w, z, record, tap, winner, training, wiring, need_dx, need_dw):
    dx = empty_ndhwc(x.shape, x) if need_dx else g.new_empty(0)
    dw = w.new_empty(w.shape) if need_dw else g.new_empty(0)
    return dx, dw, record.new_empty(record.size(1)), record.new_empty(record.size(1))


def _setup(ctx, inputs, output):
    x, w, weight, bias, _, _, training, _, wiring, _, _ = inputs
    _, record, z, tap, winner = output
    ctx.save_for_backward(x, w, weight, bias, z, record, tap, winner)
    ctx.mode = training, wiring


def _backward(ctx, g, *_):
    x, w, weight, bias, *saved = ctx.saved_tensors
    need_dx, need_dw = ctx.needs_input_grad[:2]
    dx, dw, dweight, dbias = torch.ops.p3d.stem_bwd(g, x, w, *saved, *ctx.mode, need_dx, need_dw)
    grads = dx if need_dx else None, dw if need_dw else None, _like(dweight, weight), _like(dbias, bias)
    return *grads, None, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


# --- public ----------------------------------------------------------------------------------------------------------


def stem_shapes(shape: tuple[int, ...], co: int, wiring: str) -> tuple[tuple, tuple]:
    """The shapes of z and of the pooled output, given that of x."""
    n, _, t, h, w = shape
    sizes = t, (h - 1) // 2 + 1, (w - 1) // 2 + 1
    return (n, co, *sizes), (n, co, *out_sizes(sizes, **reference.stem_pool(wiring)))


def why_not(backend: str, x: Tensor, w: Tensor) -> str | None:
    """Why `backend` cannot run the stem on x and w, or None."""
    n, ci, t, h, width = x.shape
    positions = n * t * ((h + 1) // 2) * ((width + 1) // 2)
    frame = max((ci - 1) * x.stride(1) + (h - 1) * x.stride(3) + (width - 1) * x.stride(4), h * width * w.size(0))
    if ci > 4:
        return f"{backend}: {ci} input channels (1 to 4)"
    if positions > MAX_POSITIONS or frame > MAX_POSITIONS:
        return f"{backend}: shape {tuple(x.shape)}, strides {x.stride()} (2^31 positions, or elements a frame)"
    return None


def pack_stem_weight(w: Tensor, dtype: torch.dtype) -> Tensor | None:
    """w [64, Ci, 1, 7, 7] as the Hopper kernel of `stem_infer` reads it, or None where that does not take it."""
    half = dtype in (torch.bfloat16, torch.float16)
    return _cuda.stem_pack(w, dtype) if half and w.size(0) == _cuda.STEM_COUTS and w.size(1) <= 4 else None


def stem_infer(
    x: Tensor,
    w: Tensor,
    packed: Tensor | None,
    record: Tensor,
    wiring: str = "author",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """The stem in the dtype of w, `packed` by `pack_stem_weight`; record: of BN, [5, Co] (`_triton.py`). No gradient.

    x may also be uint8 frames, with `mean` and `std` a channel: the stem of (x - mean) / std.
    """
    dtype, co = w.dtype, w.size(0)
    if packed is not None and cuda_allowed(packed):
        if _cuda.stem_why_not(x, dtype, co, wiring) is None:
            return _cuda.stem_infer(x, packed, record, wiring, mean, std)
    if x.dtype == torch.uint8:
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1, 1) for v in (mean, std))
        x = ((x - mean) / std).to(dtype)
    a, _ = stem_conv(x, stem_pack(w, dtype, channels_last(x)), co, record, False)
    return pool_fwd(a, **reference.stem_pool(wiring))[0]


def stem(x: Tensor, w: Tensor, norm: Norm, wiring: str = "author") -> Tensor:
    """max_pool(relu(bn(conv(x)))): conv 1x7x7, stride (1, 2, 2), padding (0, 3, 3); pool (2, 3, 3) of stride 2.

    The pool is unpadded with ceil_mode in wiring "author", padded by (0, 1, 1) in wiring "port". Equivalent to

        z = F.conv3d(x, w, stride=(1, 2, 2), padding=(0, 3, 3))
        y = F.max_pool3d(F.relu(F.batch_norm(z, ...)), (2, 3, 3), 2, **padding)

    Args:
        x: [N, Ci, T, H, W], float32, float16 or bfloat16, any strides: the clip is read in place. Under autocast it is
            cast as it is read.
        w: [Co, Ci, 1, 7, 7], Ci up to 4; in the dtype of x unless under autocast.
        norm: the batch normalisation; its running statistics move if it is training.
        wiring: "author" or "port".

    Returns:
        [N, Co, To, Ho, Wo], channels_last_3d, in the dtype of x or of autocast.

    Numerics: products accumulate in float32 (TF32 operands for float32 on CUDA where
    `torch.backends.cudnn.allow_tf32`); z is stored in the compute dtype and its statistics are those of the rounded
    values, but inference does not round z before the normalisation. The maximum is taken before BN, of z, where the
    order is the same. Every reduction runs in a fixed order: runs are equal bit for bit on one device. An infinity or
    NaN in the clip also reaches outputs one position beside those whose window it lies in. All passes are our own
    kernels; more than 4 input channels and an empty batch run in plain PyTorch.

    Raises:
        TypeError, ValueError: a tensor of the wrong type, dtype, shape or device; an unknown wiring; running statistics
            missing; an output axis would be empty.

    Source: the stem of the released P3D networks (see `reference.py`); how it is computed heads `_stem.py`.
    """
    check_activation("x", x)
    dtype, weight_dtype = compute_dtype(x)
    key, call = checked_before("stem", x, [x, w], [norm], wiring, dtype, weight_dtype)  # x is read as it lies
    if call is None:
        check_choice("wiring", wiring, reference.WIRINGS)
        check_weight("w", w, (None, x.size(1), 1, 7, 7), x, weight_dtype)
        check_norm("norm", norm, w.size(0), x)
        _, out = stem_shapes(tuple(x.shape), w.size(0), wiring)
        if min(out[2:]) < 1:
            raise ValueError(f"x: expected (T, H, W) that the pool fits, got {tuple(x.shape[2:])} (output {out[2:]})")
        if x.numel() == 0 or _backends.choose("stem", x, lambda b: why_not(b, x, w), ("triton", "aten")) == "aten":
            return reference.stem(x, w, norm, wiring)
        if key is not None:
            call = settle(key, [norm], x.new_empty(0, dtype=dtype))
    affine = norm.weight, norm.bias
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, *affine))
    if torch.compiler.is_compiling():
        stats = norm.running_mean, norm.running_var
        y, record, *_ = torch.ops.p3d.stem(x, w, *affine, *stats, norm.training, norm.eps, wiring, dtype, save)
    elif save:
        return _Stem.apply(x, w, *affine, norm, wiring, dtype, call or Call(False))
    else:
        y, record, *_ = stem_fwd(x, w, norm, wiring, dtype, False)
    update_running([norm], [record[0]], [record[4]])
    return y
