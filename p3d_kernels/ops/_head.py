"""The end of a net in inference: the mean over (T, H, W) and the linear layer, each one launch.

cuBLAS takes 20 us for a few rows of 2048 channels by 400 classes in float32; here a program owns a few classes, and
brings their weights while the kernel before still runs.
"""

from __future__ import annotations

from torch import Tensor

from ._tape import alloc
from ._triton import Plan, begin, block, cdiv, dependent_launch, plan_for, tl, triton


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


@triton.jit
def _weights(w, co, k, CO: tl.constexpr, K: tl.constexpr):
    return tl.load(w + co[:, None] * K + k[None, :], mask=(co < CO)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def linear_kernel(
    x, w, bias, y, N, K: tl.constexpr, CO: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [N, CO] = x [N, K] w [CO, K]^T + bias, all float32, products too; bias may be None."""
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


def global_mean(x: Tensor) -> Tensor:
    """The mean over positions of x [N, C, T, H, W] in NDHWC memory: [N, C] float32, float32 sums."""
    (n, c, *dims), device = x.shape, x.device
    y = alloc((n, c), device)

    def build() -> Plan:
        constants = {**dependent_launch(device), "BLOCK_P": 32, "BLOCK_C": block(c, 16, 64), "num_warps": 4}
        positions = dims[0] * dims[1] * dims[2]
        return Plan(mean_kernel, (n, cdiv(c, constants["BLOCK_C"])), (positions,), C=c, **constants)

    plan_for(("global_mean", x.shape, x.dtype, device), build)(x, y)
    return y


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x w^T + bias of float32 x [N, K], w [CO, K] and bias [CO], packed; float32 products and sums."""
    (n, k), co, device = x.shape, w.size(0), x.device
    y = alloc((n, co), device)

    def build() -> Plan:
        tile = {"BLOCK_N": block(n, 1, 4), "BLOCK_CO": 4, "BLOCK_K": block(k, 32, 1024), "num_warps": 8}
        grid = cdiv(co, tile["BLOCK_CO"]), cdiv(n, tile["BLOCK_N"])
        return Plan(linear_kernel, grid, (n,), K=k, CO=co, **dependent_launch(device), **tile)

    aligned = (w.data_ptr() | (0 if bias is None else bias.data_ptr())) % 16 == 0  # as plans are told of
    plan_for(("linear", x.shape, w.shape, bias is None, aligned, device), build)(x, w, bias, y)
    return y
