"""What the tests of CUDA kernels share: sizes, random operands (`ops._triton.Operand`), what they read in float64."""

from __future__ import annotations

import torch

from p3d_kernels.ops._cuda._common import _TENSORS
from p3d_kernels.ops._triton import Operand

DTYPES = (torch.bfloat16, torch.float16)
# N, T, H, W: one position; numbers off the rows of any tile; one frame.
ODD_SIZES = [(1, 1, 1, 1), (2, 3, 7, 5), (3, 1, 9, 5)]
# Of kernels whose teams walk in units of 64 positions of a frame: more of these than the card has teams; runs that hold
# several clips, and runs that begin within one.
RUN_SIZES = [(17, 8, 11, 13), (300, 7, 3, 3), (9, 4, 20, 20)]
# Of those of T: also two frames; frames of exactly and more than 64 positions; fewer steps than teams.
TEMPORAL_SIZES = [*ODD_SIZES, (1, 2, 8, 8), (1, 5, 13, 10), *RUN_SIZES, (11, 8, 40, 40)]
# Of kernels by tiles of rows: also clips of two frames and of one.
TILE_SIZES = [*ODD_SIZES, (5, 2, 10, 10), (32, 1, 5, 5)]


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


def assert_replays(run, times=1):
    """What `run` leaves, tensors and None, is equal bit for bit in a graph that has it `times`, whenever that runs."""
    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run() for _ in range(times)]
    for _ in range(3):
        graph.replay()
        for again in results:
            for a, b in zip(first, again, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def assert_nan_at(y, at, taps=1):
    """All channels of y [N, C, T, H, W] are NaN at n, t, h, w, and at the frames beside it that `taps` reach."""
    n, t, h, w = at
    there = y[n, :, max(t - taps // 2, 0) : t + taps // 2 + 1, h, w]
    assert there.isnan().all() and y.isnan().sum() == there.numel()


def assert_nan_of_open(run, o, mask, at):
    """A NaN of o at n, t, h, w is in what `run` leaves, and alone, unless the mask there is zero or less."""
    n, t, h, w = at
    o[n, 7, t, h, w] = torch.nan
    for value, seen in ((-1.0, 0), (1.0, 1), (torch.nan, 1)):
        mask[n, 7, t, h, w] = value
        y = run()
        assert y.isnan().sum() == seen == y[n, 7, t, h, w].isnan()
