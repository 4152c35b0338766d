"""Random operands (`ops._triton.Operand`) for the tests of CUDA kernels, and what they read, in float64."""

from __future__ import annotations

import torch

from p3d_kernels.ops._cuda._common import _TENSORS
from p3d_kernels.ops._triton import Operand


def activation(shape, dtype, mean=0.0):
    z = mean + torch.randn(shape, device="cuda")
    return z.to(dtype).to(memory_format=torch.channels_last_3d)


def record(c, mean=0.0):
    """[5, C], whose last two rows nobody may read."""
    rows = [mean + torch.randn(c), 0.5 + torch.rand(c), 0.5 * torch.randn(c)]
    return torch.stack([*rows, *[torch.full((c,), torch.nan)] * 2]).cuda()


def operand(read, shape, dtype, mean=0.0):
    """An operand of random tensors; `mean`: of those that a record normalises."""
    c = shape[1]
    _, two, has_a, has_b, has_sums = _TENSORS[read]
    a, b = activation(shape, dtype, mean * has_a), activation(shape, dtype, mean * has_b) if two else None
    sums = 0.3 * torch.randn(4, c, device="cuda") if has_sums else None
    return Operand(read, a, b, record(c, mean) if has_a else None, record(c, mean) if has_b else None, sums)


def normalised(z, record):
    """(z - mean) * scale + bias, centred in float32 and rounded once: its sign is the kernel's."""
    mean, scale, bias = (row.view(1, -1, 1, 1, 1) for row in record[:3])
    return (z.float() - mean).double() * scale.double() + bias.double()


def value(o):
    """What the operand reads, found in float64 and rounded to the dtype."""
    a, b = o.a.double(), None if o.b is None else o.b.double()
    u_a, u_b = (None if r is None else normalised(z, r) for z, r in ((o.a, o.record_a), (o.b, o.record_b)))
    relu = torch.relu
    if o.read in ("bn_bwd", "bn_bwd_open"):
        mean, scale, c0, c1 = (
            row.double().view(1, -1, 1, 1, 1) for row in (o.record_b[0], o.record_b[1], o.sums[0], o.sums[1])
        )
        g = a if o.read == "bn_bwd_open" else torch.where(u_b <= 0, 0, a)
        value = scale * (g - c0 - (b - mean) * c1)
    else:
        value = {
            "raw": lambda: a,
            "bn_relu": lambda: relu(u_a),
            "join_port": lambda: relu(u_a) + relu(u_b),
            "join_b": lambda: relu(relu(u_a) + u_b),
            "join_c": lambda: relu(0.5 * relu(u_a) + 0.5 * u_b),
            "masked": lambda: torch.where(b <= 0, 0, a),
        }[o.read]()
    return value.to(o.a.dtype).double()


def rows(value):
    return value.permute(1, 0, 2, 3, 4).flatten(1)


def max_of_pairs(y: torch.Tensor, frames: int) -> torch.Tensor:
    """y [N, C, T, H, W] max-pooled to `frames` frames by windows of two, by PyTorch."""
    t = y.size(2)
    return torch.nn.functional.max_pool3d(y, (min(2, t), 1, 1), (2, 1, 1), ceil_mode=2 * frames > t)
