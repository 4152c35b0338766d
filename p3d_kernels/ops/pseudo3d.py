"""The pseudo-3-D convolution of one P3D block: S and T, each with BN and ReLU, joined by kind and wiring.

Only the raw outputs z_s and z_t are stored. Their join is an `Operand`: whoever reads it normalises and joins on the
way. Backward starts from the gradient of the join and needs no mask tensor (see `Operand`'s bn_bwd):

    kind A    dz_t = bn_bwd(v, z_t),  da_s = T' dz_t,      dz_s = bn_bwd(da_s, z_s),  dx = S' dz_s
    kind B    dz_t = bn_bwd(v, z_t),  dz_s = bn_bwd(v, z_s),                          dx = S' dz_s + T' dz_t
    kind C    dz_t = bn_bwd(v, z_t),  da_s = T' dz_t + v,  dz_s = bn_bwd(da_s, z_s),  dx = S' dz_s
    kind 2d                           dz_s = bn_bwd(v, z_s),                          dx = S' dz_s

with v the gradient of the join, times the mask of its outer ReLU in the author's B and C (and 0.5 in C).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import reference
from .._checks import check_activation, check_choice, check_weight
from .._norm import Norm, check_norm
from ..reference import KINDS, WIRINGS
from . import _cuda
from ._apply import bn_apply, bn_bwd_apply
from ._conv import (
    Epilogue,
    Geometry,
    WeightGrad,
    conv,
    conv_wgrad,
    cuda_allowed,
    pointwise,
    spatial,
    spatial_dgrad,
    spatial_finished,
    spatial_fwd,
    spatial_wgrad,
    taps_of,
    temporal,
)
from ._fused import SCHEDULES, Config, Schedule, dispatch
from ._triton import (
    Operand,
    Plan,
    Splits,
    affine,
    alloc,
    block,
    bn_bwd_finalise,
    bn_finalise,
    cdiv,
    empty_ndhwc,
    plan_for,
    read_operand,
    relu,
    sum_splits,
    tl,
    triton,
    write_sums,
)

_JOINS = {("B", "port"): "join_port", ("C", "port"): "join_port", ("B", "author"): "join_b", ("C", "author"): "join_c"}
_INFER_JOINS = {"bn_relu": "relu", "join_port": "relu_add", "join_b": "add_relu", "join_c": "mean_relu"}


def join_read(config: Config) -> str:
    """How the join of S and T is read (`Operand.read`)."""
    return _JOINS.get((config.kind, config.wiring), "bn_relu")


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["P"])
def join_fwd_kernel(
    a_ptr,
    b_ptr,
    record_a,
    record_b,
    y_ptr,
    P,
    C: tl.constexpr,
    READ: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    p = tl.program_id(0) // C_TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < P)[:, None] & (c < C)[None, :]
    offsets = p.to(tl.int64)[:, None] * C + c[None, :]
    y = read_operand(a_ptr, b_ptr, record_a, record_b, None, offsets, mask, c, c < C, C, READ)
    tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit
def join_bwd(
    g,  # [rows, channels] float32: gradient of the join
    v_ptr,  # v of the formulas above is stored here
    a_ptr,
    b_ptr,
    record_a,
    record_b,
    part_a,  # [R, 2, C] sums for the normalisation of a, or None
    part_b,  # the same for b
    offsets,
    mask,
    tile,
    c,
    c_mask,
    C: tl.constexpr,
    READ: tl.constexpr,
):
    if READ == "join_b" or READ == "join_c":
        u_a = affine(tl.load(a_ptr + offsets, mask=mask, other=0.0).to(tl.float32), record_a, c, c_mask, C)
        u_b = affine(tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32), record_b, c, c_mask, C)
        g = tl.where(relu(u_a) + u_b <= 0, 0.0, g)
        if READ == "join_c":
            g = 0.5 * g
    v = g.to(v_ptr.dtype.element_ty)
    tl.store(v_ptr + offsets, v, mask=mask)
    g = v.to(tl.float32)
    if part_a is not None:
        write_sums(part_a, g, a_ptr, record_a, offsets, mask, tile, c, c_mask, C, False)
    if part_b is not None:
        write_sums(part_b, g, b_ptr, record_b, offsets, mask, tile, c, c_mask, C, READ != "join_port")


@triton.jit(do_not_specialize=["P"])
def join_bwd_kernel(
    dy_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    record_a,
    record_b,
    part_a,
    part_b,
    P,
    C: tl.constexpr,
    READ: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // C_TILES
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < P)[:, None] & (c < C)[None, :]
    offsets = p.to(tl.int64)[:, None] * C + c[None, :]
    g = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    join_bwd(g, v_ptr, a_ptr, b_ptr, record_a, record_b, part_a, part_b, offsets, mask, tile, c, c < C, C, READ)


# --- the schedule of S and T, also the heart of the bottleneck block -------------------------------------------------


def st_fwd(
    x: Operand, weights: list[Tensor], norms: list[Norm], config: Config, centred: bool = False, stored: bool = False
) -> tuple[Operand, list[Tensor], list[Tensor], list[Tensor]]:
    """(join, records, raws, finished) of S and, unless kind is "2d", T; weights and norms in that order.

    centred: the join gets a centre. stored: what S and T read, and the join, are stored, the latter `finished`: what T
    reads of S, if it does, and the join.
    """
    (w_s, *w_t), (norm_s, *norm_t) = weights, norms
    z_s, part = spatial_fwd(x, w_s, Epilogue(stats=norm_s.training))
    a_s, alone, finished = Operand("bn_relu", z_s), config.kind == "2d", []
    if stored and config.kind != "B":
        a, a_s.record_a = bn_apply(norm_s, z_s, part)
        finished.append(a)
    else:
        a_s.record_a = bn_finalise(norm_s, z_s.size(1), part, z_s.device, a_s if centred and alone else None)
    read_s = Operand("raw", finished[0]) if finished else a_s
    if alone:
        return read_s, [a_s.record_a], [z_s], finished
    z_t, part = conv(x if config.kind == "B" else read_s, w_t[0], temporal(), Epilogue(stats=norm_t[0].training))
    join = join_of([a_s.record_a, None], [z_s, z_t], config)
    if stored:
        a, record_t = bn_apply(norm_t[0], z_t, part, join.read, *(() if join.b is None else (z_s, a_s.record_a)))
        return Operand("raw", a), [a_s.record_a, record_t], [z_s, z_t], [*finished, a]
    record_t = bn_finalise(norm_t[0], z_t.size(1), part, z_t.device, join if centred else None)
    records, raws = [a_s.record_a, record_t], [z_s, z_t]
    return dataclasses.replace(join_of(records, raws, config), centre=join.centre), records, raws, finished


def join_of(records: list[Tensor], raws: list[Tensor], config: Config) -> Operand:
    """The join of S and T as an operand."""
    if config.kind in ("A", "2d"):
        return Operand("bn_relu", raws[-1], record_a=records[-1])
    return Operand(join_read(config), raws[0], raws[1], records[0], records[1])


def join_parts(join: Operand, kind: str, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for the partial sums [rows, 2, C] that the gradient of the join leaves for the norms of its a and b."""

    def part():
        return alloc((rows, 2, join.channels), join.a.device)

    # In kind C the gradient of relu(bn_s) is complete only after T's dgrad.
    return part() if kind != "C" else None, part() if join.b is not None else None


def st_bwd(
    v: Tensor,
    parts: tuple[Tensor | None, Tensor | None],
    x: Operand,
    weights: list[Tensor],
    norms: list[Norm],
    records: list[Tensor],
    raws: list[Tensor],
    config: Config,
    below: tuple[Tensor, Tensor] | None,
    needs_x: bool,
    needs_w: list[bool],
    finished: list[Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Splits | WeightGrad | None], list[Tensor]]:
    """(dx, its partial sums for the layer `below`, dws, sums) from the gradient v of the join and its `parts`.

    dws are still to be summed over splits. finished: of a stored `st_fwd`; then the gradients are stored, too, and dws
    still to be made of them.
    """
    positions = v.numel() // v.size(1)
    dims = tuple(v.shape[2:])
    part_s, part_t = (parts[0], None) if config.kind == "2d" else (parts[::-1] if config.kind == "A" else parts)
    dws, sums = [None] * len(weights), [None] * len(weights)

    def gradient(g, part, i, read="bn_bwd"):
        if finished is None:
            sums[i] = bn_bwd_finalise(part, records[i], positions, norms[i].training)
            return Operand(read, g, raws[i], record_b=records[i], sums=sums[i])
        dz, sums[i] = bn_bwd_apply(g, raws[i], records[i], part, read)
        return dz

    a_s = Operand("bn_relu", raws[0], record_a=records[0]) if finished is None else Operand("raw", finished[0])
    g_s, o = v, None  # gradient of relu(bn_s(z_s)); what T adds to dx
    needs_t = finished is None and any(needs_w[1:])
    if config.kind != "2d":
        outer = join_read(config) in ("join_b", "join_c")
        dz_t = gradient(v, part_t, 1, "bn_bwd_open" if outer else "bn_bwd")
        if config.kind == "B":
            o, _, dws[1] = _t_bwd(dz_t, x, weights[1], Epilogue(), dims, needs_x, needs_t)
        else:
            join, o_c = ("add", v) if config.kind == "C" else ("none", None)
            epilogue = Epilogue(join=join, o=o_c, below=(raws[0], records[0]))
            g_s, part_s, dws[1] = _t_bwd(dz_t, a_s, weights[1], epilogue, dims, True, needs_t)
        if needs_w[1] and finished is not None:
            dws[1] = WeightGrad(dz_t, x if config.kind == "B" else a_s, temporal())
    dz_s = gradient(g_s, part_s, 0)
    if needs_w[0] and finished is not None:
        dws[0] = WeightGrad(dz_s, x, spatial())
    elif needs_w[0]:
        room = spatial_finished(dz_s, x) if needs_x else None
        dws[0] = spatial_wgrad(dz_s, x, room)
        dz_s = dz_s if room is None else Operand("raw", room)
    dx = part = None
    if needs_x:
        epilogue = Epilogue(join="none" if o is None else "add", o=o, below=below)
        dx, part = spatial_dgrad(dz_s, weights[0], epilogue, dims)
    return dx, part, dws, sums


def _t_bwd(
    dz: Operand,
    x: Operand,
    w: Tensor,
    epilogue: Epilogue,  # of dx: o is the gradient that dz is made of, below what x is made of
    dims: tuple[int, int, int],
    needs_x: bool,
    needs_w: bool,
) -> tuple[Tensor | None, Tensor | None, Splits | None]:
    """(dx, its partial sums for the layer below, dw) of T: by one CUDA kernel where it has both, else by two."""
    if needs_x and needs_w and cuda_allowed(dz.a):
        arguments = dz, x, taps_of(w), epilogue.o is not None, epilogue.below is not None
        if _cuda.temporal_bwd_why_not(*arguments) is None:
            dx, part, dw = _cuda.temporal_bwd(*arguments)
            return dx, part, Splits(dw, 3, x.channels)
    dw = conv_wgrad(dz, x, temporal()) if needs_w else None
    dx, part = conv(dz, w, temporal(), epilogue, dims) if needs_x else (None, None)
    return dx, part, dw


def s_infer(x: Tensor, weights: list[Tensor], records: list[Tensor], stride: int = 1) -> Tensor:
    """relu(bn_s(S x)) of the activation x, at every stride-th row and column."""
    return spatial_fwd(Operand("raw", x), weights[0], Epilogue(record=records[0], join="relu"), stride)[0]


def t_operands(x: Tensor, s: Tensor, config: Config) -> tuple[Tensor, Tensor | None, str]:
    """What T reads, what its result is joined with, and how (`Epilogue.join`), of activations x and s = `s_infer`."""
    return x if config.kind == "B" else s, None if config.kind == "A" else s, _INFER_JOINS[join_read(config)]


def st_infer(x: Tensor, weights: list[Tensor], records: list[Tensor], config: Config) -> Tensor:
    """The join, from activations to activations: BN and ReLU in the epilogues of S and T."""
    s = s_infer(x, weights, records)
    return s if config.kind == "2d" else t_infer(x, s, weights, records, config)


def t_infer(
    x: Tensor, s: Tensor, weights: list[Tensor], records: list[Tensor], config: Config, stride: int = 1
) -> Tensor:
    """The join of s = `s_infer(x, ..., stride)` and T: by the CUDA kernel where it has one for this, else `conv`."""
    source, o, join = t_operands(x, s, config)
    w = weights[1]
    if source.shape == s.shape and w.size(0) == w.size(1) and cuda_allowed(source):
        if _cuda.temporal_why_not(tuple(source.shape), source.dtype, join) is None:
            return _cuda.temporal_infer(source, o, join, taps_of(w), records[1])
    geometry = Geometry((3, 1, 1), (1, stride if source is x else 1))
    return conv(Operand("raw", source), w, geometry, Epilogue(record=records[1], join=join, o=o))[0]


# --- the op ----------------------------------------------------------------------------------------------------------


def _join_tile(positions: int, channels: int) -> dict:
    block_c = block(channels, 16, 64)
    return {"BLOCK_P": block(positions, 16, 8192 // block_c), "BLOCK_C": block_c, "num_warps": 8}


def _join_plan(kernel, join: Operand, kind: str) -> Plan:
    shape, dtype, device = join.a.shape, join.a.dtype, join.a.device

    def build():
        channels, positions = shape[1], join.a.numel() // shape[1]
        tile = _join_tile(positions, channels)
        rows = cdiv(positions, tile["BLOCK_P"])
        plan = Plan(kernel, (rows * cdiv(channels, tile["BLOCK_C"]),), (positions,), C=channels, READ=join.read, **tile)
        plan.rows = rows
        return plan

    return plan_for((kernel.__name__, shape, dtype, device, join.read, kind), build)


def _fwd(x, weights, norms, config):
    join, records, raws, _ = st_fwd(Operand("raw", x), weights, norms, config)
    y = empty_ndhwc(join.a.shape, x)
    _join_plan(join_fwd_kernel, join, config.kind)(*join.args()[:4], y)
    return y, records, raws


def join_grad(g: Tensor, join: Operand, kind: str) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """(v, `join_parts` of it) of the gradient g of the join."""
    plan = _join_plan(join_bwd_kernel, join, kind)
    parts, v = join_parts(join, kind, plan.rows), empty_ndhwc(g.shape, g)
    plan(g, v, *join.args()[:4], *parts)
    return v, parts


def join_dgrad(dz: Operand, w: Tensor, join: Operand, kind: str) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """`join_grad` of the input gradient dz W of a 1x1x1 convolution of the join, W packed."""
    dims = tuple(join.a.shape[2:])
    if join.b is None:
        v, part = conv(dz, w, pointwise(), Epilogue(below=(join.a, join.record_a)), dims)
        return v, (part, None)
    return join_grad(conv(dz, w, pointwise(), None, dims)[0], join, kind)


def _bwd(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w):
    v, parts = join_grad(dy, join_of(records, raws, config), config.kind)
    dx, _, dws, sums = st_bwd(
        v, parts, Operand("raw", x), weights, norms, records, raws, config, None, needs_x, needs_w
    )
    return dx, sum_splits(dws), sums


def _shapes(x, weights, config):
    return [(x.size(0), w.size(0), *x.shape[2:]) for w in weights]


SCHEDULES["pseudo3d_conv"] = Schedule(
    "pseudo3d_conv",
    _fwd,
    _bwd,
    st_infer,
    lambda x, weights, config: _shapes(x, weights, config)[-1],
    lambda x, weights, norms, config: _shapes(x, weights, config),
)


def check_st(
    x: Tensor,
    channels: int,
    w_s: Tensor,
    norm_s: Norm,
    w_t: Tensor | None,
    norm_t: Norm | None,
    config: Config,
    weight_dtype: torch.dtype | None,
) -> None:
    """Raise TypeError or ValueError unless the weights and norms of S and T fit an input of `channels` channels."""
    kind = config.kind
    check_choice("kind", kind, KINDS)
    check_choice("wiring", config.wiring, WIRINGS)
    check_weight("w_s", w_s, (None, channels, 1, 3, 3), x, weight_dtype)
    check_norm("norm_s", norm_s, w_s.size(0), x)
    if kind == "2d":
        if w_t is not None or norm_t is not None:
            raise ValueError("w_t, norm_t: expected None for kind '2d', which has no temporal convolution")
        return
    middle = w_s.size(0)
    check_weight(
        "w_t", w_t, (None if kind == "A" else middle, channels if kind == "B" else middle, 3, 1, 1), x, weight_dtype
    )
    check_norm("norm_t", norm_t, w_t.size(0), x)


def pseudo3d_conv(
    x: Tensor,
    w_s: Tensor,
    norm_s: Norm,
    w_t: Tensor | None,
    norm_t: Norm | None,
    *,
    kind: str,
    wiring: str = "author",
) -> Tensor:
    """The spatial and temporal convolutions of a P3D block, each with BN and ReLU, fused. With s = relu(bn_s(S x)):

    kind   wiring="author"                          wiring="port"
    A      relu(bn_t(T s))                          the same
    B      relu(s + bn_t(T x))                      s + relu(bn_t(T x))
    C      relu(0.5 s + 0.5 bn_t(T s))              s + relu(bn_t(T s))
    2d     s                                        the same

    Equivalent to `reference.pseudo3d_conv`.

    Args:
        x: [N, Ci, T, H, W], float32, float16 or bfloat16, read in NDHWC memory (another layout is copied once).
        w_s: [Cm, Ci, 1, 3, 3]; w_t: [Co, Cm, 3, 1, 1], in kind B [Co, Ci, 3, 1, 1]; Co = Cm in kinds B and C.
        norm_s, norm_t: `Norm` of Cm and Co channels; running statistics move when the forward has succeeded.
        kind: "A", "B", "C", or "2d" with w_t = norm_t = None.
        wiring: "author" or "port": the released Caffe graphs or the common PyTorch port.

    Returns:
        [N, Co, T, H, W] in NDHWC memory (conv3d's choice on the aten path).

    Numerics: float32 accumulation and statistics (mean and squares about it, never E[z^2] - E[z]^2); all passes are
        this package's kernels and equal bit for bit from run to run.
    Raises: TypeError or ValueError naming the argument, before any launch.
    Source: Qiu, Yao, Mei, ICCV 2017, section 3.1; derivation of the backward in docs/derivations.md.
    """
    check_activation("x", x)
    config = Config(kind, wiring)

    def check(weight_dtype):
        check_st(x, x.size(1), w_s, norm_s, w_t, norm_t, config, weight_dtype)

    def plain(x):
        return reference.pseudo3d_conv(x, w_s, norm_s, w_t, norm_t, kind=kind, wiring=wiring)

    return dispatch("pseudo3d_conv", x, [w_s, w_t], [norm_s, norm_t], config, check, plain)
