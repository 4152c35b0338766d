"""Weight gradients of 1x1x1, 3x1x1 and 1x3x3 convolutions of raw tensors, several a launch: csrc/raw_wgrad.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from ._common import _DTYPES, _check_activation, _check_dtype, _conv_wgrad_out, _native

RAW_WGRADS = 5  # in a launch


class RawWgrad(NamedTuple):
    """A weight gradient of a 1x1x1, 3x1x1 or 1x3x3 convolution, of two tensors as they are."""

    g: Tensor  # [N, Co, To, Ho, Wo], or, of 1x1x1, on the grid of x
    x: Tensor  # [N, Ci, T, H, W]
    taps: tuple[int, int, int]
    stride: tuple[int, int]

    def sizes(self) -> tuple:
        n, ci, *dims = self.x.shape
        out = _conv_wgrad_out(dims, self.stride)
        space = self.stride[1] if out != tuple(dims) else 1
        return n, *dims, ci, self.g.size(1), math.prod(self.taps), space, tuple(self.g.shape[2:]) != out


def raw_wgrad_why_not(w: RawWgrad) -> str | None:
    """Why `raw_wgrads` cannot run this gradient, or None."""
    if w.x.dtype not in _DTYPES:
        return f"raw_wgrad: dtype {w.x.dtype} (expected bfloat16 or float16)"
    if w.taps not in ((1, 1, 1), (3, 1, 1), (1, 3, 3)) or w.stride[0] != 1:
        return f"raw_wgrad: taps {w.taps}, stride {w.stride} (expected 1x1x1, 3x1x1 or 1x3x3, stride 1 in time)"
    if w.x.numel() == 0:
        return "raw_wgrad: no positions"
    native = _backends.native()
    if isinstance(native, str):
        return native
    return native.raw_wgrad_why_not(w.sizes())


def raw_wgrads(wgrads: Sequence[RawWgrad], tiles: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
    """dw[co, tap, ci] = sum_p g[p, co] x[p * stride + tap, ci] of up to five gradients in one launch, each in parts.

    What `conv_wgrad` and `spatial_wgrad` do, for raw operands of 128 channels and more. Together they need fewer parts
    each to fill the card. float32 accumulation. `tiles`: (channels, 128 or 256 and the same of all, and parts) of each;
    0: any.

    Returns:
        of each, float32 [R, Co * taps * Ci], each row [Co, taps, Ci], the sum over a part of the positions. Runs of the
        same shapes on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `raw_wgrad_why_not` says), or CUDA failed.
    """
    if not 1 <= len(wgrads) <= RAW_WGRADS:
        raise ValueError(f"wgrads: expected 1 to {RAW_WGRADS}, got {len(wgrads)}")
    dtype, device = wgrads[0].x.dtype, wgrads[0].x.device
    _check_dtype("x", dtype)
    for w in wgrads:
        n, _, *dims = w.x.shape
        out = _conv_wgrad_out(dims, w.stride)
        if w.taps == (1, 1, 1) and tuple(w.g.shape[2:]) == tuple(dims):
            out = tuple(dims)
        _check_activation("x", w.x, tuple(w.x.shape), dtype)
        _check_activation("g", w.g, (n, w.g.size(1), *out), dtype)
    sizes = [w.sizes() for w in wgrads]
    tiles = [(0, 0)] * len(wgrads) if tiles is None else list(tiles)

    def build() -> NativePlan:
        native = _native()
        with torch.cuda.device(device):
            chosen = native.raw_wgrad_plan(sizes, tiles)
        plan = NativePlan(lambda stream, *addresses: native.raw_wgrad(addresses, sizes, chosen, _DTYPES[dtype], stream))
        plan.rows = [splits for _, splits in chosen]
        return plan

    plan = plan_for(("raw_wgrads", *sizes, *tiles, dtype, device), build)
    parts = [alloc((rows, w.g.size(1) * math.prod(w.taps) * w.x.size(1)), device) for rows, w in zip(plan.rows, wgrads)]
    plan(*[tensor for w, part in zip(wgrads, parts) for tensor in (w.g, w.x, part)])
    return parts
