"""BN as a pass of its own, for tensors that stay in the second-level cache: what is read is then stored finished.

Between large tensors BN and its backward happen in the prologue of whoever reads them. Where a product is made in many
tiles of output channels each tile repeats that, and where a tensor is small a pass over it costs less than that. Each
program of a pass can finalise the BN of its own channels first, which spares a launch where partial results are few:

    fwd   a  = relu(u), a join, or relu(u + r);     u = (z - mean) scale + bias         see `Operand` and `bn_apply`
    bwd   dz = scale (g [..] - c0 - (z - mean) c1)                                      see `bn_bwd_apply`

Statistics, the centred form and rounding are those of `_triton.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._norm import Norm
from . import _cuda
from ._conv import cuda_allowed, tap_row
from ._tape import Plan, alloc, cdiv, plan_for
from ._triton import (
    _UNALIGNED,
    Operand,
    activation,
    affine,
    begin,
    block,
    bn_finalise,
    combine_stats,
    combine_sums,
    dependent_launch,
    empty_ndhwc,
    fold,
    load_affine,
    relu,
    tl,
    triton,
    variances,
    write_record,
    write_totals,
)

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def strided_row(p, H, W, Ho, Wo, STEP: tl.constexpr):
    """The row in [frames, H, W] of position p in [frames, Ho, Wo], its every STEP-th row and column."""
    row = p
    if STEP != 1:
        row, _ = tap_row(p // (Wo * Ho), 0, p // Wo % Ho, p % Wo, 0, 0, 0, 1, H, W, 1, 1, 1, 1, STEP, False)
    return row


@triton.jit
def load_pair(a, b, p, row, P, c, c_mask, C: tl.constexpr):
    """Elements of a, and of b unless it is None, at rows `row`, where position p exists."""
    offsets = row.to(tl.int64)[:, None] * C + c[None, :]
    mask = (p < P)[:, None] & c_mask[None, :]
    first = tl.load(a + offsets, mask=mask, other=0.0)
    second = first
    if b is not None:
        second = tl.load(b + offsets, mask=mask, other=0.0)
    return first, second


@triton.jit(do_not_specialize=["R", "P", "H", "W", "Ho", "Wo"], do_not_specialize_on_alignment=_UNALIGNED)
def bn_apply_kernel(
    record,  # [5, C]
    out,  # [frames, Ho, Wo, C]
    z,  # [frames, H, W, C]
    part,  # [R, 3, C]; or None: the record is there
    weight,  # [C] or None
    bias,  # [C] or None
    o,  # like z: what it is joined with; or None
    o_record,  # [5, C] or None: o as it is
    R,
    eps,
    P,  # positions of out
    H,
    W,
    Ho,
    Wo,
    C: tl.constexpr,
    READ: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,  # of positions, to a program
    BLOCK_R: tl.constexpr,
    UNROLL: tl.constexpr,
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // C_TILES
    c = tl.program_id(0) % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    p = tile * (BLOCKS * BLOCK_P) + tl.arange(0, BLOCK_P)
    if part is not None:
        scale, shift = load_affine(weight, bias, c, c_mask, BLOCK_C)
    begin(PDL)
    v, other = load_pair(z, o, p, strided_row(p, H, W, Ho, Wo, STEP), P, c, c_mask, C)
    if part is not None:
        count, mean, m2 = combine_stats(part, R, c, c_mask, C, BLOCK_R, BLOCK_C, UNROLL)
        var, unbiased = variances(count, m2)
        first = c_mask & (tile == 0)  # all programs make the record, one stores it
        mean, scale, shift = write_record(record, mean, var, unbiased, scale, shift, eps, c, first, C)
    else:
        mean = tl.load(record + c, mask=c_mask, other=0.0)
        scale = tl.load(record + C + c, mask=c_mask, other=0.0)
        shift = tl.load(record + 2 * C + c, mask=c_mask, other=0.0)
    for i in range(BLOCKS):
        here, u, r = p, (v.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :], other.to(tl.float32)
        p += BLOCK_P
        if i + 1 < BLOCKS:  # under way while this block is finished
            v, other = load_pair(z, o, p, strided_row(p, H, W, Ho, Wo, STEP), P, c, c_mask, C)
        if o_record is not None:
            r = affine(r, o_record, c, c_mask, C)
        if READ == "add_relu":
            y = relu(u + r)
        elif READ == "bn_relu":
            y = activation(u, None, READ)
        else:
            y = activation(r, u, READ)
        mask = (here < P)[:, None] & c_mask[None, :]
        tl.store(out + here.to(tl.int64)[:, None] * C + c[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def masked_gradient(g, g_mask, offsets, mask):
    """g at `offsets` in float32, zero unless g_mask, if there is one, is positive there.

    What `read_operand` does in more instructions, as it zeroes what `mask` leaves out again.
    """
    v = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
    if g_mask is not None:
        v = tl.where(tl.load(g_mask + offsets, mask=mask, other=0.0) <= 0, 0.0, v)
    return v


@triton.jit(do_not_specialize=["P", "H", "W", "Ho", "Wo"])
def bn_sums_kernel(
    g,  # [frames, Ho, Wo, C]
    g_mask,  # like g, or None
    z,  # [frames, H, W, C]
    record,  # [5, C]
    part,  # [tiles, 2, C]: sum g and sum g (z - mean)
    z_d,  # like z, with a record and sums of its own; or None
    record_d,
    part_d,
    P,  # positions of g
    H,
    W,
    Ho,
    Wo,
    C: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,  # of positions, to a tile
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // C_TILES
    c = tl.program_id(0) % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    begin(PDL)
    mean = tl.load(record + c, mask=c_mask, other=0.0)[None, :]
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if z_d is not None:
        mean_d = tl.load(record_d + c, mask=c_mask, other=0.0)[None, :]
        sum_gd = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(BLOCKS):
        p = (tile * BLOCKS + i) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & c_mask[None, :]
        v = masked_gradient(g, g_mask, p.to(tl.int64)[:, None] * C + c[None, :], mask)
        offsets = strided_row(p, H, W, Ho, Wo, STEP).to(tl.int64)[:, None] * C + c[None, :]
        sum_g += v
        d = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32) - mean
        sum_gz += tl.where(mask, v * d, 0.0)
        if z_d is not None:
            d = tl.load(z_d + offsets, mask=mask, other=0.0).to(tl.float32) - mean_d
            sum_gd += tl.where(mask, v * d, 0.0)
    total = tl.sum(sum_g, 0)
    row = part + tile * 2 * C + c
    tl.store(row, total, mask=c_mask)
    tl.store(row + C, tl.sum(sum_gz, 0), mask=c_mask)
    if z_d is not None:
        row = part_d + tile * 2 * C + c
        tl.store(row, total, mask=c_mask)
        tl.store(row + C, tl.sum(sum_gd, 0), mask=c_mask)


@triton.jit(do_not_specialize=["R", "P", "H", "W", "Ho", "Wo"])
def bn_bwd_apply_kernel(
    sums,  # [4, C], rows (c0, c1, dweight, dbias)
    dz,  # [frames, H, W, C]
    g,  # [frames, Ho, Wo, C]: at every STEP-th row and column of z, and zero elsewhere
    g_mask,  # like g, or None
    z,  # like dz
    record,  # [5, C]
    part,  # [R, 2, C]
    R,
    P,  # positions of z
    H,
    W,
    Ho,
    Wo,
    C: tl.constexpr,
    OPEN: tl.constexpr,  # g is the gradient of u, not of relu(u)
    STEP: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNROLL: tl.constexpr,
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // C_TILES
    c = tl.program_id(0) % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    begin(PDL)
    mean = tl.load(record + c, mask=c_mask, other=0.0)
    scale = tl.load(record + C + c, mask=c_mask, other=0.0)
    bias = tl.load(record + 2 * C + c, mask=c_mask, other=0.0)
    invstd = tl.load(record + 3 * C + c, mask=c_mask, other=0.0)
    sum_g, sum_gz = combine_sums(part, R, c, c_mask, C, BLOCK_R, BLOCK_C, UNROLL)
    first = c_mask & (tile == 0)
    c0, c1 = write_totals(sums, sum_g, sum_gz, invstd, P, c, first, C)
    for i in range(BLOCKS):
        p = (tile * BLOCKS + i) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & c_mask[None, :]
        offsets = p.to(tl.int64)[:, None] * C + c[None, :]
        g_row, there = p, mask
        if STEP != 1:
            g_row, exists = tap_row(p // (W * H), 0, p // W % H, p % W, 0, 0, 0, 1, Ho, Wo, 1, 1, 1, 1, STEP, True)
            there = mask & exists[:, None]
        v = masked_gradient(g, g_mask, g_row.to(tl.int64)[:, None] * C + c[None, :], there)
        d = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        if not OPEN:
            v = tl.where(d * scale[None, :] + bias[None, :] <= 0, 0.0, v)
        v = scale[None, :] * (v - c0[None, :] - d * c1[None, :])
        tl.store(dz + offsets, v.to(dz.dtype.element_ty), mask=mask)


# --- launchers -------------------------------------------------------------------------------------------------------


def bn_apply(
    norm: Norm,
    z: Tensor,
    part: Tensor,
    read: str = "bn_relu",
    o: Tensor | None = None,
    o_record: Tensor | None = None,
    step: int = 1,
) -> tuple[Tensor, Tensor]:
    """(a, record) of `norm` in training on raw z [N, C, T, H, W], of its partial statistics [R, 3, C].

    read: "bn_relu": a = relu(u); a join: of o, raw with its record, and z; "add_relu": a = relu(u + o), o as it is or
    normalised by its record. step: a at every step-th row and column alone.
    """
    part = fold(part)
    if z.numel() > TWICE * step * step:
        record = bn_finalise(norm, z.size(1), part, z.device)
        return bn_applied(z, record, read, o, o_record, step), record
    record = alloc((5, z.size(1)), z.device)
    return _apply(z, record, part, (norm.weight, norm.bias), norm.eps, read, o, o_record, step), record


def bn_applied(
    z: Tensor,
    record: Tensor,
    read: str = "bn_relu",
    o: Tensor | None = None,
    o_record: Tensor | None = None,
    step: int = 1,
) -> Tensor:
    """The a of `bn_apply`, given the record."""
    return _apply(z, record, None, (None, None), 0.0, read, o, o_record, step)


def applied(x: Operand, step: int = 1) -> Tensor:
    """What x, "bn_relu" or a join, reads, at every step-th row and column."""
    if x.b is None:
        return bn_applied(x.a, x.record_a, x.read, step=step)
    return bn_applied(x.b, x.record_b, x.read, x.a, x.record_a, step)


def _apply(z, record, part, affines, eps, read, o, o_record, step) -> Tensor:
    n, channels, t, h, w = z.shape
    out = empty_ndhwc((n, channels, t, cdiv(h, step), cdiv(w, step)), z)
    given = tuple([None if t is None else (t.shape, t.dtype) for t in (part, *affines)])
    key = z.shape, z.dtype, z.device, given, read, o is None, o_record is None, step, eps

    def build() -> Plan:
        sizes, rows = (out.numel() // channels, h, w, *out.shape[3:]), 0 if part is None else part.size(0)
        return _plan(bn_apply_kernel, channels, sizes, rows, (eps,), z.device, READ=read, STEP=step)

    plan_for(("bn_apply", *key), build)(record, out, z, part, *affines, o, o_record)
    return out


def bn_sums(g: Tensor, g_mask: Tensor | None, zs: list[Tensor], records: list[Tensor], step: int = 1) -> list[Tensor]:
    """The partial sums [R, 2, C] of g for the norms of one or two raw tensors, with no ReLU between.

    g: at every step-th row and column of these; masked by [g_mask > 0] if there is one.
    """
    channels, device = g.size(1), g.device
    key = g.shape, g.dtype, device, zs[0].shape, g_mask is None, len(zs), step

    def build() -> Plan:
        sizes = g.numel() // channels, *zs[0].shape[3:], *g.shape[3:]
        return _plan(bn_sums_kernel, channels, sizes, None, (), device, STEP=step)

    plan = plan_for(("bn_sums", *key), build)
    parts = [alloc((plan.rows, 2, channels), device) for _ in zs]
    given = [t for triple in zip(zs, records, parts) for t in triple]
    plan(g, g_mask, *given, *[None] * (6 - len(given)))
    return parts


def bn_bwd_apply(
    g: Tensor,
    z: Tensor,
    record: Tensor,
    part: Tensor,
    read: str = "bn_bwd",
    g_mask: Tensor | None = None,
    step: int = 1,
) -> tuple[Operand, Tensor]:
    """(dz, stored, sums [4, C]) of a norm in training from the gradient g and its partial sums [R, 2, C].

    read: "bn_bwd" or "bn_bwd_open", see `Operand`. g, g_mask, step: as in `bn_sums`.
    """
    channels, part = z.size(1), fold(part)
    dz, sums = empty_ndhwc(z.shape, z), alloc((4, channels), z.device)
    key = z.shape, z.dtype, z.device, g.shape, part.shape, part.dtype, read, g_mask is None, step

    def build() -> Plan:
        sizes = z.numel() // channels, *z.shape[3:], *g.shape[3:]
        return _plan(
            bn_bwd_apply_kernel, channels, sizes, part.size(0), (), z.device, OPEN=read == "bn_bwd_open", STEP=step
        )

    plan_for(("bn_bwd_apply", *key), build)(sums, dz, g, g_mask, z, record, part)
    return Operand("raw", dz), sums


def bn_bwd_open(
    g: Tensor, g_mask: Tensor | None, zs: list[Tensor], records: list[Tensor], step: int = 1
) -> Iterator[tuple[Operand, Tensor]]:
    """(dz, stored, sums [4, C]) of the norm of each of one or two raw tensors, made when it is asked for.

    The norms have no ReLU of their own. g, g_mask, step: as in `bn_sums`. Where a tensor and its gradient fit in the
    card's shared memory one kernel reads them once, and g for each tensor; else sums are a pass of their own.
    """
    if step == 1 and cuda_allowed(g) and _cuda.bn_bwd_why_not(zs[0]) is None:
        for z, record in zip(zs, records):
            dz, sums = _cuda.bn_bwd(g, z, record, g_mask)
            yield Operand("raw", dz), sums
        return
    for z, record, part in zip(zs, records, bn_sums(g, g_mask, zs, records, step)):
        yield bn_bwd_apply(g, z, record, part, "bn_bwd_open", g_mask, step)


TWICE = 1 << 22  # elements beyond which the programs of a forward pass are too many to combine statistics each


def _plan(
    kernel, channels: int, sizes: tuple, rows: int | None, scalars: tuple, device: torch.device, **constants
) -> Plan:
    """A pass over `sizes` = (positions, H, W, Ho, Wo); rows: of partial results that each program combines, or None."""
    tile = _tile(kernel, sizes[0], channels)
    tiles = cdiv(sizes[0], tile["BLOCK_P"] * tile["BLOCKS"])
    if rows is not None:
        block_r = max(1, 32 * tile["num_warps"] // tile["BLOCK_C"])
        constants |= {"BLOCK_R": block_r, "UNROLL": block(cdiv(max(rows, 1), block_r), 1, 8)}
        scalars = rows, *scalars
    plan = Plan(
        kernel, (tiles * cdiv(channels, tile["BLOCK_C"]),), (*scalars, *sizes),
        C=channels, **tile, **dependent_launch(device), **constants,
    )  # fmt: skip
    plan.rows = tiles
    return plan


def _tile(kernel, positions: int, channels: int) -> dict:
    """Fastest on an H200 at the sizes of P3D-63: few programs, as each combines partial results anew."""
    large = positions * channels > TWICE
    if kernel is bn_sums_kernel:
        block_p, block_c, blocks = (128, 32, 5) if large else (64, 32, 2)
    elif positions * channels <= 1 << 19:
        block_p, block_c, blocks = 32, 64, 1
    else:
        block_p, block_c, blocks = 64, 64, 4 if large else 2
    block_p, block_c = block(positions, 16, block_p), block(channels, 16, block_c)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCKS": blocks, "num_warps": max(1, block_p * block_c // 512)}
