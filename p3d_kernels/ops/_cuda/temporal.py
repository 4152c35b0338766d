"""The 3x1x1 convolution of M to M channels in inference and training, and its gradients: csrc/temporal_*.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backends
from .._tape import NativePlan, alloc, plan_for
from .._triton import Operand
from ._common import _DTYPES, _check_join, _check_matrix, _check_operand, _check_rows, _native


def temporal_why_not(x_shape: tuple[int, ...], dtype: torch.dtype, join: str = "relu_add") -> str | None:
    """Why T has no kernel for x [N, M, T, H, W] and this join on the current device, or None."""
    if dtype not in _DTYPES:
        return f"temporal_infer: dtype {dtype} (expected bfloat16 or float16)"
    native = _backends.native()
    return native if isinstance(native, str) else _temporal_kernel(native, x_shape, join)[1]


def _temporal_kernel(native, x_shape: tuple[int, ...], join: str) -> tuple[str, str | None]:
    """Which of T's two kernels runs, and why it cannot, or None: at 128 channels the one without a join is faster."""
    n, m, t, h, w = x_shape
    if join == "relu" and native.temporal_boxes_why_not(n, t, h * w, m) is None:
        return "temporal_boxes", None
    return "temporal_infer", native.temporal_infer_why_not(n, t, h * w, m)


def temporal_infer(
    x: Tensor,  # [N, M, T, H, W]
    o: Tensor | None,  # like x, or x itself
    join: str,
    w: Tensor,  # [M, 3, M]
    record: Tensor,  # [3, M] or more rows
) -> Tensor:
    """T in inference: relu(u), u = bn(T x), or u joined with o; each as t in `tail_infer`, which does not store it.

    Returns:
        [N, M, T, H, W], channels_last_3d. Runs of the same shape give the same bits.

    Raises:
        ValueError: layout, shape, dtype or alignment differ from the above.
        RuntimeError: the kernel cannot run (what `temporal_why_not` says), or CUDA failed.
    """
    n, m, t, h, width = x.shape
    _check_join(x, o, join)
    _check_matrix("w", w, (m, 3, m), x.dtype)
    _check_rows("record", record, 3, m)
    y = alloc(tuple(x.shape), x.device, x.dtype)
    if x.numel() == 0:
        return y

    def build() -> NativePlan:
        native = _native()
        sizes = n, t, h * width, m, join, _DTYPES[x.dtype]
        with torch.cuda.device(x.device):
            launch = getattr(native, _temporal_kernel(native, tuple(x.shape), join)[0])
        return NativePlan(lambda stream, *addresses: launch(*addresses, *sizes, stream))

    plan_for(("temporal_infer", x.shape, x.dtype, x.device, join), build)(x, o, w, record, y)
    return y


def _temporal_train_sizes(x: Operand) -> tuple:
    n, c, t, h, w = x.a.shape
    return n, t, h * w, c


def temporal_train_why_not(x: Operand, w: Tensor) -> str | None:
    """Why `temporal_train` cannot run these, or None."""
    c = x.channels
    if x.a.dtype not in _DTYPES:
        return f"temporal_train: dtype {x.a.dtype} (expected bfloat16 or float16)"
    if x.read not in ("raw", "bn_relu"):
        return f"temporal_train: read {x.read} (expected raw or bn_relu)"
    if tuple(w.shape) != (c, 3, c):
        return f"temporal_train: w {list(w.shape)} (expected {[c, 3, c]})"
    native = _backends.native()
    return native if isinstance(native, str) else native.temporal_train_why_not(_temporal_train_sizes(x))


def temporal_train(
    x: Operand,  # [N, C, T, H, W], read raw or bn_relu
    w: Tensor,  # [C, 3, C]
    transposed: bool = False,
    stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, part) of T a, T the 3x1x1 convolution of stride 1 by w, a what x reads; `transposed`: T' a.

        y[p, co] = sum_{tap, ci} a[p + tap, ci] w[co, tap, ci], transposed sum_{tap, ci} a[p - tap, ci] w[ci, tap, co]

    Every element of x is read and rounded once; float32 accumulation.

    Returns:
        y [N, C, T, H, W] channels_last_3d, and with `stats` float32 [R, 3, C] rows (n, mean, M2) of the rounded y, no
        n = 0, else None. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `temporal_train_why_not` says), or CUDA failed.
    """
    shape, dtype, device, c = tuple(x.a.shape), x.a.dtype, x.a.device, x.channels
    if dtype not in _DTYPES or x.read not in ("raw", "bn_relu"):
        raise ValueError(f"x: expected bfloat16 or float16 read raw or bn_relu, got {dtype}, {x.read!r}")
    _check_operand("x", x, shape, dtype)
    _check_matrix("w", w, (c, 3, c), dtype)
    y = alloc(shape, device, dtype)
    if y.numel() == 0:
        return y, torch.zeros(1, 3, c, device=device) if stats else None
    sizes = _temporal_train_sizes(x)

    def build() -> NativePlan:
        native = _native()
        rest = x.read, transposed, sizes, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.temporal_train(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.temporal_train_partials(sizes)
        return plan

    plan = plan_for(("temporal_train", sizes, x.read, transposed, dtype, device), build)
    part = alloc((plan.rows, 3, c), device) if stats else None
    plan(*x.args(), w, y, part)
    return y, part


def _temporal_bwd_sizes(dz: Operand, add: bool, sums: bool) -> tuple:
    n, m, t, h, w = dz.a.shape
    return n, t, h * w, m, add, sums


def temporal_bwd_why_not(dz: Operand, x: Operand, w: Tensor, add: bool = False, sums: bool = False) -> str | None:
    """Why `temporal_bwd` cannot run these, or None."""
    m = dz.channels
    if dz.a.dtype not in _DTYPES:
        return f"temporal_bwd: dtype {dz.a.dtype} (expected bfloat16 or float16)"
    if dz.read not in ("bn_bwd", "bn_bwd_open") or x.read not in ("raw", "bn_relu"):
        return f"temporal_bwd: reads {dz.read}, {x.read} (expected bn_bwd or bn_bwd_open, and raw or bn_relu)"
    if x.a.shape != dz.a.shape or tuple(w.shape) != (m, 3, m):
        return f"temporal_bwd: x {list(x.a.shape)}, w {list(w.shape)} (expected {list(dz.a.shape)}, {[m, 3, m]})"
    native = _backends.native()
    return native if isinstance(native, str) else native.temporal_bwd_why_not(_temporal_bwd_sizes(dz, add, sums))


def temporal_bwd(
    dz: Operand,  # [N, M, T, H, W], read bn_bwd or bn_bwd_open
    x: Operand,  # like dz, read raw or bn_relu
    w: Tensor,  # [M, 3, M]
    add: bool = False,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, part, dw) of T x, T the 3x1x1 convolution of stride 1 by w, from the gradient dz of its result.

        dx[p, ci]       = sum_{tap, co} dz[p - tap, co] w[co, tap, ci] + add dz.a[p, ci]
        dw[co, tap, ci] = sum_p dz[p, co] x[p + tap, ci]

    All that both need is read once, and of 128 channels dz twice. An operand is what its read makes of its tensors,
    rounded to the dtype; float32 accumulation. `sums`, of x read bn_relu: what the normalisation of x.a needs.

    Returns:
        dx [N, M, T, H, W] channels_last_3d; with `sums` float32 [R, 2, M] rows (sum g, sum g (x.a - mean)), g the
        rounded dx where the ReLU of x passes it, else 0; or None; float32 [R', M * 3 * M], each row [M, 3, M] the
        sum over a part of the positions. Runs of the same shape on the same card give the same bits.

    Raises:
        ValueError: layout, shape, dtype, alignment or the tensors of a read differ from the above.
        RuntimeError: the kernel cannot run (what `temporal_bwd_why_not` says), or CUDA failed.
    """
    shape, dtype, device, m = tuple(dz.a.shape), dz.a.dtype, dz.a.device, dz.channels
    if dtype not in _DTYPES or dz.read not in ("bn_bwd", "bn_bwd_open"):
        raise ValueError(f"dz: expected bfloat16 or float16 read bn_bwd or bn_bwd_open, got {dtype}, {dz.read!r}")
    if x.read not in ("raw", "bn_relu") or (sums and x.read == "raw"):
        raise ValueError(f"x: expected to be read bn_relu or, without sums, raw, got {x.read!r}")
    _check_operand("dz", dz, shape, dtype)
    _check_operand("x", x, shape, dtype)
    _check_matrix("w", w, (m, 3, m), dtype)
    dx = alloc(shape, device, dtype)
    if dx.numel() == 0:
        part = torch.zeros(1, 2, m, device=device) if sums else None
        return dx, part, torch.zeros(1, m * 3 * m, device=device)
    sizes = _temporal_bwd_sizes(dz, add, sums)

    def build() -> NativePlan:
        native = _native()
        rest = dz.read, x.read, sizes, _DTYPES[dtype]
        plan = NativePlan(lambda stream, *addresses: native.temporal_bwd(*addresses, *rest, stream))
        with torch.cuda.device(device):
            plan.rows = native.temporal_bwd_rows(sizes)
        return plan

    plan = plan_for(("temporal_bwd", sizes, dz.read, x.read, dtype, device), build)
    splits, rows = plan.rows
    part = alloc((rows, 2, m), device) if sums else None
    dw = alloc((splits, m * 3 * m), device)
    plan(*dz.args(), *x.args(), w, dx, part, dw)
    return dx, part, dw
