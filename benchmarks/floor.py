"""A lower bound on the time of a case: the bytes and flops that no implementation can avoid, over measured ceilings.

A pass cannot be shorter than its bytes over the copy rate, nor than its flops over the rate of a matrix product (but
for what the stride of the next stage skips, which the floor counts and an engine leaves out). What
must move: each input once, each output once, weights once; 2 bytes an element. In training a block also stores its
narrow convolution outputs (the widest, the expand's, need not exist), and backward reads the stored tensors, the block
input and the incoming gradient, and writes the gradient of the input. A model is the sum over stem, blocks and pools;
a temporal pool is taken as part of the block before it.
"""

from __future__ import annotations

import dataclasses
from math import prod

from .cases import DEPTHS, STAGES, Case

BYTES = 2  # bf16 and fp16


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution: channels, number of taps, positions (N*T*H*W) read and written."""

    ci: int
    co: int
    taps: int
    read: int
    written: int

    @property
    def flops(self) -> int:
        return 2 * self.ci * self.co * self.taps * self.written

    @property
    def output(self) -> int:
        return self.co * self.written

    @property
    def weights(self) -> int:
        return self.ci * self.co * self.taps


def convolutions(case: Case, batch: int) -> list[Conv]:
    """The convolutions of a case that is not a model, in order, reduce first and downsample last."""
    t, h, w = case.size
    s = case.stride
    p, q = batch * t * h * w, batch * t * -(-h // s) * -(-w // s)
    ci, co = case.channels[0], case.channels[-1]
    if case.op == "stem":
        return [Conv(ci, co, 49, p, batch * t * -(-h // 2) * -(-w // 2))]
    if case.op == "pseudo3d_conv":
        return [Conv(ci, co, 9, p, p)] + ([] if case.kind == "2d" else [Conv(co, co, 3, p, p)])
    if case.op == "bottleneck":
        mid = case.channels[1]
        between = [Conv(mid, mid, 9, q, q)] + ([] if case.kind == "2d" else [Conv(mid, mid, 3, q, q)])
        down = [] if ci == co and s == 1 else [Conv(ci, co, 1, q, q)]
        return [Conv(ci, mid, 1, q, q), *between, Conv(mid, co, 1, q, q), *down]
    taps = {"spatial_conv": 9, "temporal_conv": 3, "pointwise_conv": 1}[case.op]
    return [Conv(ci, co, taps, q if case.op == "pointwise_conv" else p, q)]


def parts(case: Case) -> list[tuple[Case, int]]:
    """A model as (stem or block, frames that a pool leaves of each 2 of its output); another case is its own part."""
    if case.op not in DEPTHS:
        return [(case, 2)]
    t, h, w = case.size
    found = [(Case("stem", "stem", case.passes, (case.channels[0], 64), case.size), 2)]
    t, h, w = t // 2, -(-h // 4), -(-w // 4)
    ci, index = 64, 0
    for stage, depth in enumerate(DEPTHS[case.op], 1):
        mid = STAGES[stage][0]
        for i in range(depth):
            stride = 2 if i == 0 and stage > 1 else 1
            kind = "2d" if stage == 4 else "ABC"[index % 3]
            pooled = 1 if i == depth - 1 and stage < 4 else 2
            block = Case("block", "bottleneck", case.passes, (ci, mid, 4 * mid), (t, h, w), kind, stride)
            found.append((block, pooled))
            h, w = -(-h // stride), -(-w // stride)
            ci, index = 4 * mid, index + 1
        t = max(t // 2, 1) if stage < 4 else t
    return found


def work(case: Case, pass_: str, batch: int, pooled: int = 2) -> tuple[int, int]:
    """(bytes, flops) of one pass over one part."""
    convs = convolutions(case, batch)
    flops = sum(c.flops for c in convs)
    weights = sum(c.weights for c in convs)
    x = convs[0].ci * convs[0].read  # a stride leaves positions unread
    dx = prod(case.input_shape(batch))
    if case.op == "stem":
        y = convs[0].output // 8
    elif case.op == "bottleneck":
        y = case.channels[-1] * convs[0].written * pooled // 2
    else:
        y = convs[-1].output
    if pass_ in ("infer", "fwd", "dgrad", "wgrad"):
        return BYTES * (x + y + weights), flops
    if case.op == "stem":  # no gradient of the clip: x and y, then gradient and x; one product less
        return BYTES * (2 * (x + y) + 2 * weights), 2 * flops
    stored = sum(c.output for c in convs) - sum(c.output for c in convs if case.op == "bottleneck" and c.co > c.ci)
    return BYTES * ((x + y + stored) + (y + x + stored + dx) + 3 * weights), 3 * flops


def floor_ms(case: Case, pass_: str, batch: int, copy_tb_s: float, matmul_tflop_s: float) -> float:
    """The bound in milliseconds for ceilings in TB/s (bytes read and written) and TFLOP/s."""
    total = 0.0
    for part, pooled in parts(case):
        moved, flops = work(part, pass_, batch, pooled)
        total += max(moved / (copy_tb_s * 1e12), flops / (matmul_tflop_s * 1e12))
    return total * 1e3
