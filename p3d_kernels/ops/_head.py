"""The end of a net: the mean over (T, H, W) and the linear layer of few rows, each one launch; two for its gradients.

cuBLAS takes 20 us for a few rows of 2048 channels by 400 classes in float32; here a program owns a few classes, and
brings their weights while the kernel before still runs. In training nothing is cast: under autocast PyTorch rounds
features, weights and bias in a kernel each, and turns gradients back in as many. The gradient of the mean is written
once, in the memory order and dtype that the layer before wants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backends
from .._checks import compute_dtype
from ._tape import alloc
from ._triton import Plan, begin, block, cdiv, dependent_launch, ndhwc, plan_for, tl, triton, why_not


@triton.jit
def mean_kernel(x, y, P, C: tl.constexpr, PDL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [N, P, C] to y [N, C] float32, for one n and BLOCK_C channels."""
    begin(PDL)
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        offsets = ((n.to(tl.int64) * P + p) * C)[:, None] + c[None, :]
        total += tl.load(x + offsets, mask=(p < P)[:, None] & c_mask[None, :], other=0.0).to(tl.float32)
    tl.store(y + n.to(tl.int64) * C + c, tl.sum(total, 0) / P, mask=c_mask)


@triton.jit(do_not_specialize_on_alignment=["dy"])
def mean_bwd_kernel(dy, dx, P, C: tl.constexpr, PDL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx [N, P, C] = dy [N, C] float32 / P, for one n and BLOCK_C channels."""
    begin(PDL)
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    value = (tl.load(dy + n.to(tl.int64) * C + c, mask=c_mask, other=0.0) / P).to(dx.dtype.element_ty)
    value = tl.broadcast_to(value[None, :], (BLOCK_P, BLOCK_C))
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        offsets = ((n.to(tl.int64) * P + p) * C)[:, None] + c[None, :]
        tl.store(dx + offsets, value, mask=(p < P)[:, None] & c_mask[None, :])


@triton.jit(do_not_specialize_on_alignment=["dy", "w"])
def linear_dgrad_kernel(
    dy, w, dx, N, K: tl.constexpr, CO: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx [N, K] = dy [N, CO] w [CO, K], float32 but perhaps dy."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, CO, BLOCK_CO):
        co = first + tl.arange(0, BLOCK_CO)
        mask = (n < N)[:, None] & (co < CO)[None, :]
        gradient = tl.load(dy + n[:, None] * CO + co[None, :], mask=mask, other=0.0).to(tl.float32)
        weights = tl.load(w + co[:, None] * K + k[None, :], mask=(co < CO)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(gradient, weights, total, input_precision="ieee")
    tl.store(dx + n[:, None] * K + k[None, :], total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize_on_alignment=["dy", "x"])
def linear_wgrad_kernel(
    dy, x, dw, dbias, N, K: tl.constexpr, CO: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw [CO, K] = dy [N, CO]^T x [N, K] and dbias [CO] = sum dy, or None; float32 but perhaps dy."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    co = tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    begin(PDL)
    total = tl.zeros((BLOCK_CO, BLOCK_K), tl.float32)
    sums = tl.zeros((BLOCK_CO,), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        mask = (co < CO)[:, None] & (n < N)[None, :]
        gradient = tl.load(dy + n[None, :] * CO + co[:, None], mask=mask, other=0.0).to(tl.float32)
        row = tl.load(x + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(gradient, row, total, input_precision="ieee")
        sums += tl.sum(gradient, 1)
    tl.store(dw + co[:, None] * K + k[None, :], total, mask=(co < CO)[:, None] & (k < K)[None, :])
    if dbias is not None:
        tl.store(dbias + co, sums, mask=(co < CO) & (tl.program_id(0) == 0))


@triton.jit
def _weights(w, co, k, CO: tl.constexpr, K: tl.constexpr):
    return tl.load(w + co[:, None] * K + k[None, :], mask=(co < CO)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def linear_kernel(
    x, w, bias, y, N, K: tl.constexpr, CO: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [N, CO] = x [N, K] w [CO, K]^T + bias, float32 but perhaps y, products too; bias may be None."""
    co = tl.program_id(0) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    part = _weights(w, co, k, CO, K)  # does not depend on the kernel before
    begin(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_CO, BLOCK_K), tl.float32)
    for first in tl.static_range(0, K, BLOCK_K):
        if first > 0:
            part = _weights(w, co, first + k, CO, K)
        inside = (n < N)[:, None] & (first + k < K)[None, :]
        row = tl.load(x + n.to(tl.int64)[:, None] * K + first + k[None, :], mask=inside, other=0.0)
        total += row[:, None, :] * part[None, :, :]
    out = tl.sum(total, 2)
    mask = (n < N)[:, None] & (co < CO)[None, :]
    if bias is not None:
        out += tl.load(bias + co, mask=co < CO, other=0.0)[None, :]
    tl.store(y + n.to(tl.int64)[:, None] * CO + co[None, :], out, mask=mask)


def _mean_plan(kernel, shape: torch.Size, device: torch.device) -> Plan:
    n, c, *dims = shape
    constants = {**dependent_launch(device), "BLOCK_P": 32, "BLOCK_C": block(c, 16, 64), "num_warps": 4}
    return Plan(kernel, (n, cdiv(c, constants["BLOCK_C"])), (dims[0] * dims[1] * dims[2],), C=c, **constants)


def global_mean(x: Tensor) -> Tensor:
    """The mean over positions of x [N, C, T, H, W] in NDHWC memory: [N, C] float32, float32 sums. No gradient."""
    y = alloc(tuple(x.shape[:2]), x.device)
    plan_for(("global_mean", x.shape, x.dtype, x.device), lambda: _mean_plan(mean_kernel, x.shape, x.device))(x, y)
    return y


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kind = x.shape, x.dtype, x.device
        return global_mean(ndhwc(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        shape, dtype, device = ctx.kind
        dx = alloc(tuple(shape), device, dtype)
        key = "global_mean bwd", *ctx.kind
        plan_for(key, lambda: _mean_plan(mean_bwd_kernel, shape, device))(dy.contiguous(), dx)
        return dx


def mean_over_positions(x: Tensor) -> Tensor:
    """x.mean((2, 3, 4)) in float32 (float64 of float64), with a gradient: by our kernels where they can."""
    if not torch.compiler.is_compiling() and x.numel():
        if _backends.choose("global_mean", x, lambda _: why_not(x), ("triton", "aten")) != "aten":
            return _GlobalMean.apply(x)
    return x.mean((2, 3, 4), dtype=torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """x w^T + bias of float32 x [N, K], w [CO, K] and bias [CO], packed; float32 products and sums. No gradient."""
    (n, k), co, device = x.shape, w.size(0), x.device
    y = alloc((n, co), device, dtype)

    def build() -> Plan:
        tile = {"BLOCK_N": block(n, 1, 4), "BLOCK_CO": 4, "BLOCK_K": block(k, 32, 1024), "num_warps": 8}
        grid = cdiv(co, tile["BLOCK_CO"]), cdiv(n, tile["BLOCK_N"])
        return Plan(linear_kernel, grid, (n,), K=k, CO=co, **dependent_launch(device), **tile)

    aligned = (w.data_ptr() | (0 if bias is None else bias.data_ptr())) % 16 == 0  # as plans are told of
    plan_for(("linear", x.shape, w.shape, bias is None, aligned, device, dtype), build)(x, w, bias, y)
    return y


def linear_bwd(dy: Tensor, x: Tensor, w: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dw, dbias), float32, of `linear` and the gradient dy [N, CO] of its output."""
    (n, k), co, device = x.shape, w.size(0), x.device
    dx, dw = alloc((n, k), device), alloc((co, k), device)
    dbias = alloc((co,), device) if has_bias else None
    shapes = {"K": k, "CO": co, **dependent_launch(device)}

    def dgrad() -> Plan:
        tile = {"BLOCK_N": block(n, 16, 32), "BLOCK_CO": 64, "BLOCK_K": 16, "num_warps": 4}
        return Plan(linear_dgrad_kernel, (cdiv(k, 16), cdiv(n, tile["BLOCK_N"])), (n,), **shapes, **tile)

    def wgrad() -> Plan:
        tile = {"BLOCK_N": 16, "BLOCK_CO": 16, "BLOCK_K": 128, "num_warps": 4}
        return Plan(linear_wgrad_kernel, (cdiv(k, 128), cdiv(co, 16)), (n,), **shapes, **tile)

    key = n, k, co, has_bias, device, dy.dtype
    plan_for((linear_dgrad_kernel, *key), dgrad)(dy, w, dx)
    plan_for((linear_wgrad_kernel, *key), wgrad)(dy, x, dw, dbias)
    return dx, dw, dbias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, dtype):
        x = x.contiguous()
        ctx.save_for_backward(x, w)
        ctx.has_bias = bias is not None
        return linear(x, w, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *linear_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.has_bias), None


MOST_ROWS = 64  # that are few


def linear_of_few(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, w, bias)` with a gradient, in autocast's dtype under it: by our kernels where they can.

    That is of a few rows [N, K] and of float32 alone. Products are those of float32, under autocast, too.
    """
    tensors = (x, w) if bias is None else (x, w, bias)
    ours = not torch.compiler.is_compiling() and x.dim() == 2 and 0 < len(x) <= MOST_ROWS
    ours = ours and all(t.dtype == torch.float32 and t.device == x.device for t in tensors)
    ours = ours and w.is_contiguous() and w.size(1) == x.size(1) and w.numel() > 0
    if ours and _backends.choose("linear", x, lambda _: None, ("triton", "aten")) != "aten":
        return _Linear.apply(x, w, bias, compute_dtype(x)[0])
    return F.linear(x, w, bias)
