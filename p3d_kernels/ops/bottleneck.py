"""The P3D bottleneck block as one autograd Function: reduce, S and T, expand, residual, each with BN and ReLU.

    y = relu(bn_e(E a) + r),   a = join of S and T of relu(bn_r(R x)),   r = x or bn_d(D x)

Raw outputs of the narrow convolutions R, S, T are stored, and y. The wide outputs E a and D x are not (`_gram.py`):
their statistics are formed of a and x alone, and of each a product of the size of its weights is kept. Where no kernel
makes bn_d(D x) on the way to y, it is stored until then. A block of small tensors (`stores`) keeps all of them instead,
each raw and finished, and BN is a pass of its own (`_apply.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends, reference
from .._checks import check_activation, check_choice, check_positive, check_weight
from .._norm import Norm, check_norm
from . import _cuda
from ._apply import applied, bn_applied, bn_apply, bn_bwd_apply, bn_bwd_open
from ._conv import Epilogue, WeightGrad, conv, conv_wgrads, cuda_allowed, pointwise, taps_of
from ._fused import MEMORY, SCHEDULES, Config, Schedule, dispatch
from ._gram import gram, gram_bwd
from ._tape import taped
from ._triton import Operand, Splits, bn_bwd_finalise, bn_finalise, cdiv, empty_ndhwc, input_precision, summed
from .max_pool import pool_fwd
from .pseudo3d import check_st, join_dgrad, join_of, s_infer, st_bwd, st_fwd, t_infer, t_operands

# --- schedule --------------------------------------------------------------------------------------------------------


def _split(items: list, config: Config) -> tuple[list, list, list, list]:
    """Weights, norms or records by convolution: ([reduce], [S, T], [expand], [down])."""
    inner = 2 if config.kind == "2d" else 3
    return items[:1], items[1:inner], items[inner : inner + 1], items[inner + 1 :]


STORED = 32 << 20  # bytes of a wide tensor that is stored: others of its size fit in the second-level cache beside it


def stores(x: Tensor, weights: list[Tensor], norms: list[Norm], config: Config) -> bool:
    """Whether a block in training stores E a and D x, and what its convolutions read, as passes over raw tensors.

    Where E a is small, a pass over it takes less than its statistics do when formed of a. With more than 128 channels
    inside, a convolution has several tiles of output channels, each of which would finish anew what it reads.
    """
    w_e = _split(weights, config)[2][0]
    wide = math.prod(_dims(x, config)) * w_e.size(0) * x.element_size()
    return w_e.size(1) > 128 and wide <= STORED and all(norm.training for norm in norms)


def _fwd(x, weights, norms, config, thin=False):
    """thin: y at every second row and column alone; statistics are those of all of it."""
    if stores(x, weights, norms, config):
        return _fwd_stored(x, weights, norms, config, thin)
    (w_r,), w_st, (w_e,), w_d = _split(weights, config)
    (norm_r,), norm_st, (norm_e,), norm_d = _split(norms, config)
    stride, source = pointwise(config.stride), Operand("raw", x)
    z_r, part = conv(source, w_r, stride, Epilogue(stats=norm_r.training))
    record_r = bn_finalise(norm_r, z_r.size(1), part, x.device)
    a_r = Operand("bn_relu", z_r, record_a=record_r)
    join, records_st, raws_st, _ = st_fwd(a_r, w_st, norm_st, config, centred=norm_e.training)
    kept = []
    record_e = _wide_record(join, w_e, norm_e, kept)
    record_d = [_wide_record(source, w, norm, kept, config.stride) for w, norm in zip(w_d, norm_d)]
    records, raws = [record_r, *records_st, record_e, *record_d], [z_r, *raws_st, *kept]
    return _output(x, join, weights, record_e, record_d, config, thin), records, raws


def _output(
    x: Tensor,
    join: Operand,
    weights: list[Tensor],
    record_e: Tensor,
    record_d: list[Tensor],
    config: Config,
    thin: bool = False,
) -> Tensor:
    """y of the join of S and T."""
    _, _, (w_e,), w_d = _split(weights, config)
    residual = x
    if w_d:
        pair = join, taps_of(w_e)[:, 0], x, taps_of(w_d[0])[:, 0]
        if cuda_allowed(x) and _cuda.conv_pair_why_not(*pair) is None:
            return _cuda.conv_pair(*pair, record_e, *record_d)
        residual, _ = conv(Operand("raw", x), w_d[0], pointwise(config.stride), Epilogue(*record_d))
    if thin and cuda_allowed(x):
        shape = (*join.a.shape[:3], *residual[..., ::2, ::2].shape[3:]), x.dtype, w_e.size(0)
        if _cuda.conv_infer_why_not(*shape, *pointwise(), "add_relu", tuple(residual.shape[3:])) is None:
            return _expand(applied(join, 2), w_e, record_e, residual, None)
    step = 2 if thin else 1
    return conv(join, w_e, pointwise(step), Epilogue(record_e, "add_relu", residual, o_stride=step))[0]


def _fwd_stored(x, weights, norms, config, thin):
    (w_r,), w_st, (w_e,), w_d = _split(weights, config)
    (norm_r,), norm_st, (norm_e,), norm_d = _split(norms, config)
    stride, source, stats = pointwise(config.stride), Operand("raw", x), Epilogue(stats=True)
    z_r, part = conv(source, w_r, stride, stats)
    a_r, record_r = bn_apply(norm_r, z_r, part)
    join, records_st, raws_st, finished = st_fwd(Operand("raw", a_r), w_st, norm_st, config, stored=True)
    residual, record_d, z_d = x, [], []
    if w_d:
        residual, part = conv(source, w_d[0], stride, stats)
        record_d, z_d = [bn_finalise(norm_d[0], residual.size(1), part, x.device)], [residual]
    z_e, part = conv(join, w_e, pointwise(), stats)
    y, record_e = bn_apply(norm_e, z_e, part, "add_relu", residual, *record_d, step=2 if thin else 1)
    return y, [record_r, *records_st, record_e, *record_d], [z_r, *raws_st, a_r, *finished, z_e, *z_d]


def _wide_record(x: Operand, w: Tensor, norm: Norm, kept: list[Tensor], stride: int = 1) -> Tensor:
    """The record of the norm of W x, in training of sums over x: what `gram` keeps of these goes to `kept`."""
    if not norm.training:
        return bn_finalise(norm, w.size(0), None, w.device)
    of_x, record = gram(x, w, norm, stride)
    kept.append(of_x)
    return record


class Inner(NamedTuple):
    """The backward of a block but for R: gradients of weights and sums [4, C] in the order of the schedule.

    Of weights, some are still to be made, by one launch.
    """

    dz_r: Operand
    o: Tensor | None  # dx through D, on the grid of its output
    dws: list[Tensor | Splits | WeightGrad | None]
    sums: list[Tensor]


def _bwd(
    dy, x, y, weights, norms, records, raws, config, needs_x, needs_w, thin=False, masked=False, mask_x=False, over=None
):
    """`masked`: dy is masked by y, the output of a ReLU, already; `mask_x`: so shall dx be by x, that of another.

    thin: as in `_fwd`; so is dy. over: x or dy, where nothing reads it after this: dx may take its place.
    """
    y = None if masked else y
    (w_r,), _, _, w_d = _split(weights, config)
    stride, source = pointwise(config.stride), Operand("raw", x)
    inner = _inner_stored if stores(x, weights, norms, config) else _inner
    dz_r, o, dws, sums = inner(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w, thin)
    dx = dw_r = None
    if needs_x and needs_w[0] and _reduce_fits(x, weights, config, thin):
        dx, part = _cuda.reduce_bwd(dz_r, x, taps_of(w_r)[:, 0], dy, y, mask_x, over)
        dw_r = Splits(part, 1, x.size(1))
    elif needs_w[0]:
        dw_r = WeightGrad(dz_r, source, stride)
    dws = summed(conv_wgrads([dw_r, *dws]))  # before dx, which the block below then finds in the second-level cache
    if needs_x and dx is None:
        o, o_mask, step = (o, None, config.stride) if w_d else (dy, y, 2 if thin else 1)
        epilogue = Epilogue(join="add", o=o, o_mask=o_mask, o_stride=step, mask=x if mask_x else None)
        dx, _ = conv(dz_r, w_r, stride, epilogue, tuple(x.shape[2:]))
    return dx, dws, sums


def _inner(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w, thin) -> Inner:
    _, w_st, (w_e,), w_d = _split(weights, config)
    (norm_r,), norm_st, (norm_e,), norm_d = _split(norms, config)
    (record_r,), records_st, (record_e,), record_d = _split(records, config)
    _, needs_st, _, _ = _split(needs_w, config)
    z_r, *raws_st = raws
    kept_d = raws_st.pop() if w_d and norm_d[0].training else None
    kept = raws_st.pop() if norm_e.training else None
    join, step = join_of(records_st, raws_st, config), 2 if thin else 1
    v, parts, dw_e, sums_e = gram_bwd(dy, y, w_e, norm_e, record_e, join, kept, step, True, config.kind, thin)
    a_r, below = Operand("bn_relu", z_r, record_a=record_r), (z_r, record_r)
    da, part, dw_st, sums_st = st_bwd(v, parts, a_r, w_st, norm_st, records_st, raws_st, config, below, True, needs_st)
    sums_r = bn_bwd_finalise(part, record_r, z_r.numel() // z_r.size(1), norm_r.training)
    dz_r = Operand("bn_bwd", da, z_r, record_b=record_r, sums=sums_r)
    o, dws, sums = None, [*dw_st, dw_e], [sums_r, *sums_st, sums_e]
    if w_d:
        of_d = w_d[0], norm_d[0], record_d[0], Operand("raw", x), kept_d, config.stride, needs_x
        o, _, dw_d, sums_d = gram_bwd(dy, y, *of_d)
        dws, sums = [*dws, dw_d], [*sums, sums_d]
    return Inner(dz_r, o, dws, sums)


def _inner_stored(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w, thin) -> Inner:
    _, w_st, (w_e,), w_d = _split(weights, config)
    _, norm_st, _, _ = _split(norms, config)
    (record_r,), records_st, (record_e,), record_d = _split(records, config)
    _, needs_st, (needs_e,), needs_d = _split(needs_w, config)
    z_r, *rest = raws
    raws_st, (a_r, *finished) = rest[: len(w_st)], rest[len(w_st) : len(rest) - 1 - len(w_d)]
    z_e, *z_d = rest[len(rest) - 1 - len(w_d) :]
    of_wide = bn_bwd_open(dy, y, [z_e, *z_d], [record_e, *record_d], 2 if thin else 1)
    dz_e, sums_e = next(of_wide)
    dw_e = WeightGrad(dz_e, Operand("raw", finished[-1]), pointwise()) if needs_e else None
    v, parts = join_dgrad(dz_e, w_e, join_of(records_st, raws_st, config), config.kind)
    below = z_r, record_r
    da, part, dw_st, sums_st = st_bwd(
        v, parts, Operand("raw", a_r), w_st, norm_st, records_st, raws_st, config, below, True, needs_st, finished
    )
    dz_r, sums_r = bn_bwd_apply(da, *below, part)
    o, dws, sums = None, [*dw_st, dw_e], [sums_r, *sums_st, sums_e]
    if w_d:
        dz_d, sums_d = next(of_wide)
        dw_d = WeightGrad(dz_d, Operand("raw", x), pointwise(config.stride)) if needs_d[0] else None
        dws, sums = [*dws, dw_d], [*sums, sums_d]
        if needs_x:
            o, _ = conv(dz_d, w_d[0], pointwise(), None, tuple(dz_d.a.shape[2:]))
    return Inner(dz_r, o, dws, sums)


def _reduce_fits(x: Tensor, weights: list[Tensor], config: Config, thin: bool) -> bool:
    """Whether one CUDA kernel takes both gradients of R and adds the residual's, which x then is."""
    (w_r,), _, _, w_d = _split(weights, config)
    return not w_d and cuda_allowed(x) and _cuda.reduce_bwd_why_not(tuple(x.shape), x.dtype, w_r.size(0), thin) is None


def _can_mask(
    x: Tensor, z_r: Tensor, weights: list[Tensor], config: Config, needs_w: list[bool], thin: bool, stored: bool
) -> bool:
    """Whether `_bwd` can mask dx by x: in the kernel of both gradients of R, `point_dgrad` or Triton's."""
    if not cuda_allowed(x):
        return True
    if _reduce_fits(x, weights, config, thin):
        return needs_w[0]
    plain = stored and not thin and not _split(weights, config)[3]
    return plain and _cuda.point_dgrad_why_not(z_r, x.size(1)) is None


def _infer(x, weights, records, config):
    return _chain(x, [Frozen(weights, records, config)], False)


def _dims(x, config):
    return (x.size(0), *pointwise(config.stride).out_shape(*x.shape[2:]))


def _out_shape(x, weights, config):
    n, *dims = _dims(x, config)
    return n, _split(weights, config)[2][0].size(0), *dims


def _raw_shapes(x, weights, norms, config):
    n, *dims = _dims(x, config)
    (w_r,), w_st, *wide = _split(weights, config)
    if stores(x, weights, norms, config):
        finished = [w_r, *w_st] if config.kind != "B" else [w_r, w_st[1]]
        return [(n, w.size(0), *dims) for w in (w_r, *w_st, *finished, *itertools.chain(*wide))]
    pairs = zip(itertools.chain(*wide), itertools.chain(*_split(norms, config)[2:]))
    kept = [(w.numel() + w.size(1),) for w, norm in pairs if norm.training]
    return [(n, w.size(0), *dims) for w in (w_r, *w_st)] + kept


# --- what a block keeps ----------------------------------------------------------------------------------------------

# With memory="less" the backward makes again, of what is kept and by the kernels that made them, so bit for bit: z_r,
# and y where it is the input of the next block of a row. A *lean* block that stores tensors keeps the raw outputs of R,
# S and T alone, and makes the others again.


def _drops_reduced(x: Tensor, weights: list[Tensor], norms: list[Norm], config: Config) -> bool:
    """Whether z_r is dropped: not where x is much wider, of which it would be made."""
    (w_r,), _, _, _ = _split(weights, config)
    drops = config.memory == "less" and w_r.size(1) <= 2 * w_r.size(0)
    return drops and not stores(x, weights, norms, config)


def _kept(raws: list, x, weights, norms, config, lean) -> list:
    """Of what `_fwd` leaves, or of its shapes, that which is kept."""
    if lean and stores(x, weights, norms, config):
        return raws[: 1 + len(_split(weights, config)[1])]
    return raws[1:] if _drops_reduced(x, weights, norms, config) else raws


def _kept_fwd(x, weights, norms, config, thin=False, lean=False):
    y, records, raws = _fwd(x, weights, norms, config, thin)
    return y, records, _kept(raws, x, weights, norms, config, lean)


def _kept_bwd(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w):
    raws = _all_raws(x, weights, norms, records, raws, config)
    return _bwd(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w)


def _kept_shapes(x, weights, norms, config, lean=False):
    return _kept(_raw_shapes(x, weights, norms, config), x, weights, norms, config, lean)


def _all_raws(x, weights, norms, records, raws, config, lean=False) -> list[Tensor]:
    """The raws of `_fwd`, given those of `_kept_fwd`."""
    (w_r,), w_st, (w_e,), w_d = _split(weights, config)
    source, stride, stats = Operand("raw", x), pointwise(config.stride), Epilogue(stats=norms[0].training)
    if lean and stores(x, weights, norms, config):
        (record_r,), records_st, _, _ = _split(records, config)
        finished = [bn_applied(raws[0], record_r)]
        if config.kind in ("A", "C"):
            finished.append(bn_applied(raws[1], records_st[0]))
        finished.append(applied(join_of(records_st, raws[1:], config)))
        z_e, _ = conv(Operand("raw", finished[-1]), w_e, pointwise(), stats)
        return [*raws, *finished, z_e, *[conv(source, w, stride, stats)[0] for w in w_d]]
    if not _drops_reduced(x, weights, norms, config):
        return raws
    return [conv(source, w_r, stride, stats)[0], *raws]


def _output_again(x, weights, norms, records, raws, config, lean) -> Tensor:
    """The y of `_fwd`, given the raws of `_kept_fwd`."""
    _, records_st, (record_e,), record_d = _split(records, config)
    if stores(x, weights, norms, config):
        raws = _all_raws(x, weights, norms, records, raws, config, lean)
        z_e, *z_d = raws[len(raws) - 1 - len(record_d) :]
        return bn_applied(z_e, record_e, "add_relu", *(z_d or [x]), *record_d)
    first = 0 if _drops_reduced(x, weights, norms, config) else 1
    join = join_of(records_st, raws[first : first + len(records_st)], config)
    return _output(x, join, weights, record_e, record_d, config)


SCHEDULES["bottleneck"] = Schedule("bottleneck", _kept_fwd, _kept_bwd, _infer, _out_shape, _kept_shapes)


# --- blocks in a row, in inference ----------------------------------------------------------------------------------


class Frozen(NamedTuple):
    """A block in inference: packed weights and records [5, C], one a convolution, in the order of the schedule."""

    weights: list[Tensor]
    records: list[Tensor]
    config: Config


WIDEST = 100 << 20  # bytes that the output of a block may have; 2 to 3 times as much is then alive beside it


def chain_shapes(
    shape: tuple[int, ...], blocks: list[Frozen], thin: bool, frames: int | None = None
) -> list[tuple[int, ...]]:
    """The shapes of the outputs of blocks in a row, given that of x, and of what is pooled of the last.

    `thin`, `frames`: see `infer_chain`.
    """
    shapes, (n, _, *dims) = [], shape
    for i, block in enumerate(blocks):
        step = 2 if thin and i + 1 == len(blocks) else 1
        dims = pointwise(block.config.stride * step).out_shape(*dims)
        shapes.append((n, _split(block.weights, block.config)[2][0].size(0), *dims))
    if frames is not None:
        shapes.append((*shapes[-1][:2], frames, *shapes[-1][3:]))
    return shapes


def clips_at_once(
    shape: tuple[int, ...], blocks: list[Frozen], thin: bool, dtype: torch.dtype, frames: int | None = None
) -> int:
    """How many of the N clips of x to run through blocks together, so that no output of theirs is above WIDEST."""
    n, *rest = shape
    clips = [math.prod(s[1:]) * dtype.itemsize for s in chain_shapes(shape, blocks, thin, frames)]  # bytes of one
    parts = cdiv(n * max(clips), WIDEST)
    aligned = math.prod(rest) * dtype.itemsize % 16 == 0 == clips[-1] % 16
    return cdiv(n, parts) if parts > 1 and aligned else n


def pooled_frames(time: int, ceil_mode: bool) -> int:
    """How many frames max-pool (2, 1, 1) of that stride makes of T; a window longer than the axis is cut to it."""
    return (time + ceil_mode) // 2 if time > 1 else time


def infer_chain(
    x: Tensor, blocks: list[Frozen], thin: bool = False, into: Tensor | None = None, frames: int | None = None
) -> Tensor:
    """The output of blocks in a row on NDHWC x; `thin`: at every second row and column, the rest is not computed.

    Large tensors are cut: some clips go through all blocks, then others. into: where the output is to go, or None.
    frames: `pooled_frames` of T, and the output is pooled to as many; or None.
    """
    frames = None if frames == x.size(2) else frames
    size = clips_at_once(tuple(x.shape), blocks, thin, x.dtype, frames)
    if 0 < size < x.size(0):
        y = empty_ndhwc(chain_shapes(tuple(x.shape), blocks, thin, frames)[-1], x) if into is None else into
        for part, y_part in zip(x.split(size), y.split(size)):
            _infer_chain(part, blocks, thin, y_part, frames)
        return y
    return _infer_chain(x, blocks, thin, into, frames)


def _infer_chain(x: Tensor, blocks: list[Frozen], thin: bool, into: Tensor | None, frames: int | None) -> Tensor:
    shapes, configs = tuple([w.shape for b in blocks for w in b.weights]), tuple([b.config for b in blocks])
    key = "chain", configs, thin, frames, x.shape, x.dtype, x.device, shapes, input_precision(x.dtype, x.device)
    inputs = [x, *(t for b in blocks for t in (*b.weights, *b.records))]
    into = None if into is None else [into]
    return taped((*key, _backends.forced()), lambda: ([_chain(x, blocks, thin, frames)], []), inputs, into)[0][0]


def _chain(x: Tensor, blocks: list[Frozen], thin: bool, frames: int | None = None) -> Tensor:
    a = None
    for i, block in enumerate(blocks):
        after = blocks[i + 1 :]
        x, a = _link(x, a, block, after, thin, None if after else frames)
    return x


def _link(
    x: Tensor, a: Tensor | None, block: Frozen, after: list[Frozen], thin: bool, frames: int | None
) -> tuple[Tensor, Tensor | None]:
    """(y, relu(bn_r(R y)) of the next block or None) of one block, given its own a = relu(bn_r(R x)) if that exists.

    The last block of a thin chain works on every second row and column from S on. The one before stores only those of
    y, if the next block's a is made of y on the way. frames: to how many y is pooled, or None.
    """
    config = block.config
    (w_r,), w_st, (w_e,), w_d = _split(block.weights, config)
    (record_r,), records_st, (record_e,), record_d = _split(block.records, config)
    step = 2 if thin and not after else 1
    source, stride = Operand("raw", x), config.stride
    if a is None:
        a, _ = conv(source, w_r, pointwise(stride), Epilogue(record_r, "relu"))
    s = s_infer(a, w_st, records_st, step)
    down_inside = bool(w_d) and stride == step == 1 and _tail_fits(a, s, w_st, w_e, config, x.size(1))
    residual = x  # or, with D inside, what the tail makes it of
    if w_d and not down_inside:
        residual, _ = conv(source, w_d[0], pointwise(stride * step), Epilogue(record_d[0]))
    if _tail_fits(a, s, w_st, w_e, config):
        residual = _thinned(residual, s)
        w_z = record_z = None
        if after and after[0].config.stride == 1 and tuple(after[0].weights[0].shape[:2]) == w_e.shape[1::-1]:
            w_z, record_z = taps_of(after[0].weights[0])[:, 0], after[0].records[0]
        unread = thin and len(after) == 1 and w_z is not None and not _split(after[0].weights, after[0].config)[3]
        weights = taps_of(w_st[1]), records_st[1], taps_of(w_e)[:, 0], record_e, w_z, record_z
        down = (taps_of(w_d[0])[:, 0], record_d[0]) if down_inside else ()
        t, o, join = t_operands(a, s, config)
        inside = None if down_inside or _cuda.tail_why_not(tuple(s.shape), s.dtype, 0, frames) else frames
        y, z = _cuda.tail_infer(t, o, join, residual, *weights, *down, thin=unread, frames=inside)
        return _pooled(y, frames), z
    t = s if config.kind == "2d" else t_infer(a, s, w_st, records_st, config, step)
    return _expand(t, w_e, record_e, residual, frames), None


def _expand(t: Tensor, w: Tensor, record: Tensor, residual: Tensor, frames: int | None) -> Tensor:
    """relu(bn(E t) + r), r = residual or every second row and column of it, pooled to `frames` or not."""
    strided = residual.shape[3:] != t.shape[3:]
    if (strided or frames is not None) and cuda_allowed(t):
        shape = tuple(t.shape), t.dtype, w.size(0), *pointwise(), "add_relu"
        if _cuda.conv_infer_why_not(*shape, tuple(residual.shape[3:]) if strided else None, frames) is None:
            epilogue = record, "add_relu", residual
            return _cuda.conv_infer(t, taps_of(w), *pointwise(), *epilogue, o_strided=strided, frames=frames)
    epilogue = Epilogue(record, "add_relu", _thinned(residual, t))
    return _pooled(conv(Operand("raw", t), w, pointwise(), epilogue)[0], frames)


def _thinned(residual: Tensor, like: Tensor) -> Tensor:
    """residual, or every second row and column of it, if so many are in `like`."""
    if residual.shape[3:] == like.shape[3:]:
        return residual
    return pool_fwd(residual, (1, 1, 1), (1, 2, 2), (0, 0, 0), False)[0]


def _pooled(y: Tensor, frames: int | None) -> Tensor:
    """y, or the maxima of pairs of its frames, if `frames` of them are wanted and it has more."""
    if frames in (None, y.size(2)):
        return y
    return pool_fwd(y, (2, 1, 1), (2, 1, 1), (0, 0, 0), 2 * frames > y.size(2))[0]


def _tail_fits(a: Tensor, s: Tensor, w_st: list[Tensor], w_e: Tensor, config: Config, down_channels: int = 0) -> bool:
    """Whether one CUDA kernel takes T, expand and the next reduce, and D of `down_channels`."""
    m, positions = s.size(1), s.numel() // s.size(1)
    if config.kind == "2d" or (config.kind == "B" and a.shape != s.shape):
        return False
    if m == 128 and positions < 64 * 64:  # its units keep too little of a card busy: T, expand, reduce are faster
        return False
    if tuple(w_st[1].shape[:2]) != (m, m) or w_e.size(0) != 4 * m or not cuda_allowed(a):
        return False
    return _cuda.tail_why_not(tuple(s.shape), s.dtype, down_channels) is None


# --- blocks in a row, in training ------------------------------------------------------------------------------------


RUN = 4  # blocks, at least, from one kept input to the next
AGAIN = 256 << 20  # bytes that the blocks of a row which store tensors keep of what they can make again


class RowConfig(NamedTuple):
    """What distinguishes two rows of blocks beside their tensors."""

    blocks: tuple[Config, ...]
    counts: tuple[int, ...]  # convolutions of each
    thin: bool = False  # of the last block's output, every second row and column alone; it has no D

    def of_blocks(self) -> list[tuple[Config, bool]]:
        """(config, thin) of each."""
        return [(block, self.thin and i == len(self.blocks)) for i, block in enumerate(self.blocks, 1)]

    def keeps_input(self) -> list[bool]:
        """Whether the input of each is kept, but for x. Some always are, or too many would be made again at once."""
        run, memory = max(RUN, math.isqrt(len(self.blocks))), [block.memory for block in self.blocks]
        return [i > 0 and (memory[i - 1] == "default" or i % run == 0) for i in range(len(memory))]


def _by_block(items: list, counts: Iterable[int]) -> list[list]:
    items = iter(items)
    return [list(itertools.islice(items, count)) for count in counts]


def _row_fwd(x, weights, norms, config):
    """As `_kept_fwd` of each block; the input of one that keeps it is among its raws, before its own."""
    blocks, records, raws = [_by_block(items, config.counts) for items in (weights, norms)], [], []
    lean, _ = _row_shapes(x, weights, norms, config)
    for (block, thin), keeps, w, n, is_lean in zip(config.of_blocks(), config.keeps_input(), *blocks, lean):
        if keeps:
            raws.append(x)
        x, block_records, block_raws = _kept_fwd(x, w, n, block, thin, is_lean)
        records += block_records
        raws += block_raws
    return x, records, raws


def _row_bwd(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w):
    blocks = [_by_block(items, config.counts) for items in (weights, norms, records, needs_w)]
    lean, shapes = _row_shapes(x, weights, norms, config)
    raws = _by_block(raws, map(len, shapes))
    kept = [own.pop(0) if keeps else None for own, keeps in zip(raws, config.keeps_input())]
    tensors = [x, *kept[1:], y]  # the inputs, then y
    dws, sums, masked = [], [], False
    for i, ((block, thin), w, n, r, needs) in reversed(list(enumerate(zip(config.of_blocks(), *blocks)))):
        if tensors[i] is None:
            first = max(j for j in range(i) if tensors[j] is not None)
            for j in range(first, i):
                of_block = *[items[j] for items in blocks[:3]], raws[j], config.blocks[j], lean[j]
                tensors[j + 1] = _output_again(tensors[j], *of_block)
        source, own = tensors[i], _all_raws(tensors[i], w, n, r, raws[i], block, lean[i])
        # Masked, it spares the block below a read of its output.
        mask_x = i > 0 and _can_mask(source, own[0], w, block, needs, thin, stores(source, w, n, block))
        # dx takes the place of a gradient of ours, or of an output that was made for this
        over = dy if i + 1 < len(raws) else source if mask_x and kept[i] is None else None
        passes = needs_x or i > 0, needs, thin, masked, mask_x, over
        dy, block_dws, block_sums = _bwd(dy, source, tensors[i + 1], w, n, r, own, block, *passes)
        dws, sums, masked = block_dws + dws, block_sums + sums, mask_x
    return dy, dws, sums


def _row_infer(x, weights, records, config):
    pairs = zip(_by_block(weights, config.counts), _by_block(records, config.counts), config.blocks)
    return _chain(x, [Frozen(*pair) for pair in pairs], config.thin)


def _row_out_shape(x, weights, config):
    for block, w in zip(config.blocks, _by_block(weights, config.counts)):
        x = torch.empty(_out_shape(x, w, block), device="meta")
    return tuple(_thin(x).shape if config.thin else x.shape)


def _row_raw_shapes(x, weights, norms, config):
    return list(itertools.chain(*_row_shapes(x, weights, norms, config)[1]))


def _row_shapes(x, weights, norms, config) -> tuple[list[bool], list[list[tuple[int, ...]]]]:
    """(whether it is lean, the shapes of its raws) of each block: the first ones are not, as long as there is room."""
    blocks, lean, shapes, room = [_by_block(items, config.counts) for items in (weights, norms)], [], [], AGAIN
    for block, keeps, w, n in zip(config.blocks, config.keeps_input(), *blocks):
        full, least = (sum(map(math.prod, _kept_shapes(x, w, n, block, is_lean))) for is_lean in (False, True))
        again = (full - least) * x.element_size()
        lean.append(again > room)
        room -= 0 if lean[-1] else again
        shapes.append([tuple(x.shape)] * keeps + _kept_shapes(x, w, n, block, lean[-1]))
        x = x.new_empty(_out_shape(x, w, block), device="meta")
    return lean, shapes


SCHEDULES["bottlenecks"] = Schedule("bottlenecks", _row_fwd, _row_bwd, _row_infer, _row_out_shape, _row_raw_shapes)


def _thin(x: Tensor) -> Tensor:
    return x[..., ::2, ::2]


def bottlenecks(x: Tensor, blocks: list[tuple[tuple, Config]], thin: bool = False) -> Tensor:
    """Blocks in a row as one op, which costs the host less than one op each: `bottleneck` after `bottleneck`.

    blocks: of each, the arguments of `bottleneck` between x and kind, and the rest of them. Not for tracing. thin: of
    the last one's output, which must have no D, every second row and column: the rest is not computed.
    """
    check_activation("x", x)
    arguments = [a for a, _ in blocks]
    counts = tuple([sum(w is not None for w in a[::2]) for a in arguments])
    if thin and arguments[-1][8] is not None:
        raise ValueError("thin: expected False of a row whose last block has w_down, got True")
    config = RowConfig(tuple([c for _, c in blocks]), counts, thin)

    def check(weight_dtype):
        given = x
        for own, block in blocks:
            _check(given, *own, block, weight_dtype)
            strided = given[..., :: block.stride, :: block.stride]
            given = strided[:, :1].expand(-1, own[6].size(0), -1, -1, -1)  # of the shape of the output

    def plain(x):
        for own, block in blocks:
            x = reference.bottleneck(x, *own, kind=block.kind, wiring=block.wiring, stride=block.stride)
        return _thin(x) if thin else x

    weights, norms = [w for a in arguments for w in a[::2]], [n for a in arguments for n in a[1::2]]
    return dispatch("bottlenecks", x, weights, norms, config, check, plain)


# --- the op ----------------------------------------------------------------------------------------------------------


def bottleneck(
    x: Tensor,
    w_reduce: Tensor,
    norm_reduce: Norm,
    w_s: Tensor,
    norm_s: Norm,
    w_t: Tensor | None,
    norm_t: Norm | None,
    w_expand: Tensor,
    norm_expand: Norm,
    w_down: Tensor | None = None,
    norm_down: Norm | None = None,
    *,
    kind: str,
    wiring: str = "author",
    stride: int = 1,
    memory: str = "default",
) -> Tensor:
    """A P3D bottleneck block: y = relu(bn(E a) + r), a = pseudo3d_conv(relu(bn(R x))), r = x or bn(D x).

    Equivalent to `reference.bottleneck`, which names each step; one autograd Function. In training it stores x, y
    and the raw outputs of R, S and T or, of more than 128 channels inside and where E a has up to 32 MiB, all tensors.

    Args:
        x: [N, Ci, T, H, W], float32, float16 or bfloat16, read in NDHWC memory (another layout is copied once).
        w_reduce: [M, Ci, 1, 1, 1], stride (1, s, s); w_s, w_t, norm_s, norm_t, kind, wiring: see `pseudo3d_conv`.
        w_expand: [Co, M', 1, 1, 1], M' the channels of the join.
        w_down, norm_down: [Co, Ci, 1, 1, 1], stride (1, s, s), and its Norm; None: r = x, which needs Ci = Co, s = 1.
        stride: s, in space.
        memory: "less": the backward makes z = R x again, bit for bit, where Ci <= 2 M and it is not small. Our kernels
            do, by eager launch; plain PyTorch does not.

    Returns:
        [N, Co, T, ceil(H / s), ceil(W / s)] in NDHWC memory (conv3d's choice on the aten path).

    Numerics: as `pseudo3d_conv`; the widest tensor is normalised in float32 before it is rounded for the first time.
    Raises: TypeError or ValueError naming the argument, before any launch.
    Source: Qiu, Yao, Mei, ICCV 2017, section 3.2 and figure 3; docs/derivations.md for the backward.
    """
    check_activation("x", x)
    check_positive("stride", stride)
    config = Config(kind, wiring, stride, memory)
    weights, norms = [w_reduce, w_s, w_t, w_expand, w_down], [norm_reduce, norm_s, norm_t, norm_expand, norm_down]
    arguments = [a for pair in zip(weights, norms) for a in pair]

    def check(weight_dtype):
        _check(x, *arguments, config, weight_dtype)

    def plain(x):
        return reference.bottleneck(x, *arguments, kind=kind, wiring=wiring, stride=stride)

    return dispatch("bottleneck", x, weights, norms, config, check, plain)


def _check(
    x, w_reduce, norm_reduce, w_s, norm_s, w_t, norm_t, w_expand, norm_expand, w_down, norm_down, config, weight_dtype
) -> None:
    check_choice("memory", config.memory, MEMORY)
    check_weight("w_reduce", w_reduce, (None, x.size(1), 1, 1, 1), x, weight_dtype)
    middle = w_reduce.size(0)
    check_norm("norm_reduce", norm_reduce, middle, x)
    check_st(x, middle, w_s, norm_s, w_t, norm_t, config, weight_dtype)
    inner = (w_s if w_t is None else w_t).size(0)
    check_weight("w_expand", w_expand, (None, inner, 1, 1, 1), x, weight_dtype)
    check_norm("norm_expand", norm_expand, w_expand.size(0), x)
    if w_down is None:
        if norm_down is not None:
            raise ValueError("norm_down: expected None without w_down, got a Norm")
        if config.stride != 1 or w_expand.size(0) != x.size(1):
            raise ValueError(
                f"w_down: expected a weight [{w_expand.size(0)}, {x.size(1)}, 1, 1, 1], since x has {x.size(1)} "
                f"channels, y {w_expand.size(0)} and stride is {config.stride}; got None"
            )
    else:
        check_weight("w_down", w_down, (w_expand.size(0), x.size(1), 1, 1, 1), x, weight_dtype)
        check_norm("norm_down", norm_down, w_expand.size(0), x)
