"""The one checker that every numerical test uses, tested itself in `test_tolerance.py`.

A result is judged against a float64 reference computed from the already rounded inputs. All must hold:

1. whole tensor: |y - ref| / |ref| (2-norms) at most `NORM_LIMIT` of the dtype, 1e-5 for float32 wgrad and BN sums;
2. against the vendor's result at the same dtype: the largest error at most twice the vendor's own (three times for
   wgrad) plus two roundings to that dtype at the size of max|ref|;
3. the worst element at most `WORST_LIMIT` of max|ref|; the first and last slices along T, H and W are judged again,
   each axis against the largest reference value on those slices, so that a wrong border cannot hide.

NaN and infinity always fail where the reference is finite.

These are the limits of one op. In a chain of them (`chain=True`: a whole bottleneck in half precision) the roundings of
the tensors between add up, and the gradient of a BN bias is a sum whose terms cancel: `CHAIN` times criteria 1 and 3.
Over the bottlenecks of `cases.py` in float16 the relative error of ours is at most 7.9e-4 in outputs and weights and
2.2e-3 in BN sums; that of PyTorch on a CPU 1.1e-3 and 2.6e-3, and 10 times that where one of its ReLUs flips.

At the sizes of a net some of millions of activations lie within a rounding of a tie, and whoever rounds decides them
another way: each is an error of full size in the gradient (`selects=True`). There the vendor, who meets the same, is
the measure where the limits are below it: twice its error in criterion 1, twice its worst element in 3. On an H200 dx
of the blocks at 2 clips is 4e-3 to 2.3e-2 off in float16 and 1.2e-2 to 3.5e-2 in bfloat16, without any one kernel
being so.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_LIMIT = {"bfloat16": 4e-3, "float16": 5e-4, "tf32": 1e-3, "float32": 2e-6}
SUM_LIMIT = {**NORM_LIMIT, "float32": 1e-5}  # wgrad and BN sums
WORST_LIMIT = {"bfloat16": 8e-3, "float16": 1e-3, "tf32": 1e-3, "float32": 1e-5}
CHAIN = {"output": 2, "wgrad": 2, "bn_sum": 6}  # half precision only
KINDS = ("output", "wgrad", "bn_sum")


def rounding(dtype: torch.dtype, tf32: bool = False) -> float:
    """The largest relative error of rounding a number to `dtype` (TF32 has float16's 10 bits of fraction)."""
    return torch.finfo(torch.float16 if tf32 else dtype).eps / 2


def borders(shape: torch.Size) -> list[tuple[str, Tensor]]:
    """(name, mask) of the border along each of T, H, W of [N, C, T, H, W]; none where the axis is all border."""
    regions = []
    for axis, dim in zip("THW", (2, 3, 4)):
        if len(shape) == 5 and shape[dim] > 2:
            mask = torch.zeros(shape, dtype=torch.bool)
            mask.index_fill_(dim, torch.tensor([0, shape[dim] - 1]), True)
            regions.append((f"the border along {axis}", mask))
    return regions


def check(
    actual: Tensor,
    reference: Tensor,
    dtype: torch.dtype,
    vendor: Tensor | None = None,
    kind: str = "output",
    tf32: bool = False,
    chain: bool = False,
    selects: bool = False,
    name: str = "result",
) -> None:
    """Raise AssertionError unless `actual` is `reference` to the tolerances above.

    Args:
        actual: the result, of `dtype`.
        reference: the same in float64, computed from the already rounded inputs.
        dtype: the dtype the op ran in; with `tf32`, float32 whose products are formed in TF32.
        vendor: PyTorch's own result at that dtype, or None to leave criterion 2 out.
        kind: "output" (and the gradient of an activation), "wgrad" (of a convolution's weight) or "bn_sum" (of BN's
            weight and bias, and the running statistics: all sums over positions).
        chain: the op is a chain of others, judged by `CHAIN` where it stores half precision between them.
        selects: the op has ReLUs or a pool and millions of elements; `vendor` is needed.
        name: what to call the tensor in the message.
    """
    assert vendor is not None or not selects, f"{name}: selects needs the vendor's result"
    assert kind in KINDS, f"kind: expected one of {KINDS}, got {kind!r}"
    assert reference.dtype == torch.float64, f"{name}: the reference must be float64, got {reference.dtype}"
    assert actual.dtype == dtype, f"{name}: expected dtype {dtype}, got {actual.dtype}"
    assert actual.shape == reference.shape, f"{name}: expected shape {list(reference.shape)}, got {list(actual.shape)}"
    y, ref = actual.detach().cpu().double(), reference.detach().cpu()
    assert ref.isfinite().all(), f"{name}: the reference itself is not finite"
    bad = ~y.isfinite()
    assert not bad.any(), f"{name}: {int(bad.sum())} of {y.numel()} elements are not finite, first at {_where(bad)}"
    if not y.numel():
        return

    key = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    error, scale = (y - ref).abs(), ref.abs()
    slack = CHAIN[kind] if chain and key in ("float16", "bfloat16") else 1
    limit = slack * (NORM_LIMIT if kind == "output" else SUM_LIMIT)[key]
    worst_limit = slack * WORST_LIMIT[key]
    norm = error.norm().item()
    theirs = (vendor.detach().cpu().double() - ref).abs() if vendor is not None and vendor.shape == ref.shape else None
    if selects:
        limit = max(limit, 2 * theirs.norm().item() / max(ref.norm().item(), 1e-300))
    assert norm <= limit * ref.norm().item(), (
        f"{name} ({key}): relative error {norm / max(ref.norm().item(), 1e-300):.3e} of the whole tensor, "
        f"allowed {limit:.1e}"
    )

    regions = [("the tensor", torch.ones_like(bad))]
    if kind == "output":
        regions += borders(ref.shape)
    for region, mask in regions:
        worst, largest = error[mask].max().item(), scale[mask].max().item()
        if selects and worst <= 2 * theirs.max().item():
            continue
        assert worst <= worst_limit * largest, (
            f"{name} ({key}): worst element is {worst / max(largest, 1e-300):.3e} of max|ref| off, allowed "
            f"{worst_limit:.1e}, at {_where(mask & (error == worst))} of {region}"
        )

    if vendor is not None:
        assert vendor.shape == ref.shape, f"{name}: the vendor's shape is {list(vendor.shape)}, not {list(ref.shape)}"
        factor = 3 if kind == "wgrad" else 2
        allowed = factor * theirs.max().item() + 2 * rounding(dtype, tf32) * scale.max().item()
        assert error.max().item() <= allowed, (
            f"{name} ({key}): largest error {error.max().item():.3e} at {_where(error == error.max())}, allowed "
            f"{allowed:.3e} = {factor} x the vendor's {theirs.max().item():.3e} and two roundings"
        )


def _where(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
