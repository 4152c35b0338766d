"""How a fused op (several convolutions, each with its normalisation) meets autograd, torch.compile and inference.

An op is a `Schedule` of three functions that launch kernels; this file gives it what autograd wants: saved tensors, the
gradients in the parameters' own dtypes, running statistics that move once the forward has succeeded, and registered
twins (p3d::<name>, p3d::<name>_bwd, p3d::<name>_infer) for tracing. Eager calls do not pass through the dispatcher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backends
from .._checks import compute_dtype
from .._norm import Norm, in_one_launch, update_running
from ._conv import pack, pack_weight, packed_in, weight_grad
from ._tape import Layout, keep, taped
from ._triton import bn_finalise, input_precision, ndhwc, why_not


class Config(NamedTuple):
    """What distinguishes two calls of a fused op beside their tensors."""

    kind: str
    wiring: str
    stride: int = 1
    memory: str = "default"


MEMORY = ("default", "less")  # what a bottleneck block keeps for its backward


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The passes of a fused op. x is NDHWC; weights are packed; a record is float32 [5, C].

    fwd(x, weights, norms, config)                       -> y, records, raws     one record a norm; raws: for bwd
    bwd(dy, x, y, weights, norms, records, raws, config, needs_x, needs_w) -> dx, dws, sums [4, C]
    infer(x, weights, records, config)                   -> y                    no norm in training
    out_shape(x, weights, config)                        -> shape of y
    raw_shapes(x, weights, norms, config)                -> shapes of raws

    A raw of five dimensions is an activation; another is float32.
    """

    name: str
    fwd: Callable
    bwd: Callable
    infer: Callable
    out_shape: Callable
    raw_shapes: Callable


def _stats(norms: list[Norm]) -> list[Tensor | None]:
    """What a forward reads of its norms."""
    running = (None if n.training else t for n in norms for t in (n.running_mean, n.running_var))
    return [t for n in norms for t in (n.weight, n.bias)] + list(running)


@dataclasses.dataclass(eq=False)
class Call:
    """A call whose arguments were checked: the key of its tapes."""

    in_one_launch: bool  # for `update_running`


_settled: dict[tuple, Call] = {}  # by what a checked call depends on


def dispatch(
    op: str,
    x: Tensor,
    weights: list[Tensor | None],
    norms: list[Norm | None],
    config: Config,
    check: Callable[[torch.dtype | None], None],
    plain: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run an op: by our kernels where they can, else plain PyTorch. Arguments like those of an earlier call are known.

    Args:
        op: its name, and that of its schedule.
        weights, norms: None where the op has none; in the order of the schedule otherwise.
        check: raises unless all arguments fit; called with the dtype that weights must have (`compute_dtype`).
        plain: the op in plain PyTorch, of x in the dtype to compute in.
    """
    dtype, weight_dtype = compute_dtype(x)
    key, call = checked_before(op, x, weights, norms, config, dtype, weight_dtype)
    known = call is not None
    if not known:
        check(weight_dtype)
    x = x.to(dtype)
    if not known:
        if _backends.choose(op, x, lambda _: why_not(x)) == "aten":
            return plain(x)
        if key is not None:
            call = settle(key, norms, x)
    present = ([a for a in of if a is not None] for of in (weights, norms))
    return _run(SCHEDULES[op], x, *present, config, call)


def checked_before(op, x, weights, norms, config, dtype, weight_dtype) -> tuple[tuple | None, Call | None]:
    """(key, call): the call is that of an equal one that `settle` was told of; no key: there can be none."""
    if torch.compiler.is_compiling():  # what only traces has no addresses
        return None, None
    try:
        key = _call_key(op, x, weights, norms, config, dtype, weight_dtype)
        return key, _settled.get(key)
    except (AttributeError, TypeError, RuntimeError):  # of a wrong type, or fake: checked anew each time
        return None, None


def settle(key: tuple, norms: list[Norm | None], x: Tensor) -> Call:
    """The call of this key, checked and for our kernels, from now on; x: in the dtype to compute in."""
    return keep(_settled, key, Call(in_one_launch([n for n in norms if n is not None], x)))


def _call_key(op, x, weights, norms, config, dtype, weight_dtype) -> tuple:
    """All that the checks of a call and the launches of its passes depend on."""
    tensors, modes = [x], []
    for n in norms:
        if n is not None:
            mean, var = n.running_mean, n.running_var
            dense = mean is not None and n.training and mean.is_contiguous() and var.is_contiguous()
            tensors += n.weight, n.bias, mean, var, n.num_batches_tracked
            modes += n.training, n.eps, n.momentum, dense
        else:
            modes.append(None)
    layouts = [None if w is None else (w.shape, w.dtype, w.device, w.stride(), w.data_ptr() & 15) for w in weights]
    kinds = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    precision = input_precision(dtype, x.device)
    return op, dtype, weight_dtype, config, precision, _backends.forced(), (*kinds, *layouts), tuple(modes)


def taped_fwd(
    name: str,
    call: Call,
    pass_: Callable[[], tuple[list, list]],
    inputs: list[Tensor | None],
    norms: list[Norm],
    rows: Callable[[], list[tuple[int, int, int]]],
) -> tuple[list[Tensor | None], Tensor | None, Layout]:
    """`taped`, of a forward: it also reads the norms, whose running statistics move once it has succeeded.

    rows: finds mean and unbiased variance of each norm in turn among what is kept (`Layout.cut`).
    """
    outputs, kept, layout = taped((name, call), pass_, [*inputs, *_stats(norms)])
    if any(norm.updates for norm in norms):
        if call.in_one_launch:
            batch, holder = layout.addresses(kept, rows), kept
        else:
            batch, holder = layout.cut(kept, rows), None
        update_running(norms, batch[::2], batch[1::2], holder)
    return outputs, kept, layout


class _Function(torch.autograd.Function):
    """y = apply(schedule, config, norms, key, x, *weights, *affine), affine = weight, bias of each norm.

    Moves the running statistics at the end of the forward.
    """

    @staticmethod
    def forward(ctx, schedule, config, norms, key, x, *parameters):
        weights = parameters[: -2 * len(norms)]
        x_in = ndhwc(x)

        def pass_():
            packed, buffer = pack([w.detach() for w in weights], x_in.dtype)
            y, records, raws = schedule.fwd(x_in, packed, norms, config)
            return [y], [*records, *raws, *([] if buffer is None else [buffer])]

        def rows():  # mean and unbiased variance of each record [5, C]
            channels = [w.size(0) for w in weights]
            return [(i, row * c, c) for i, c in enumerate(channels) for row in (0, 4)]

        (y,), kept, layout = taped_fwd("fwd", key, pass_, [x_in, *weights], norms, rows)
        ctx.save_for_backward(x_in, y, kept, *weights)
        ctx.schedule, ctx.config, ctx.norms, ctx.layout, ctx.key = schedule, config, norms, layout, key
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, kept, *weights = ctx.saved_tensors
        schedule, config, norms, layout = ctx.schedule, ctx.config, ctx.norms, ctx.layout
        count, dy = len(weights), ndhwc(dy)
        needs_x, *needs = ctx.needs_input_grad[4:]
        needs_w = needs[:count]

        def pass_():
            views = layout.views(kept)
            records, rest = views[:count], views[count:]
            raws = rest[: len(schedule.raw_shapes(x, weights, norms, config))]
            packed = packed_in((rest[len(raws) :] or [None])[0], weights, x.dtype)
            dx, dws, sums = schedule.bwd(dy, x, y, packed, norms, records, raws, config, needs_x, needs_w)
            return [dx], [*(dw for dw, need in zip(dws, needs_w) if need), *sums]

        def pieces():  # each dw, then dweight and dbias of each norm's sums [4, C]
            found = [(i, 0, w.numel()) for i, w in enumerate(w for w, need in zip(weights, needs_w) if need)]
            sums = enumerate([w.size(0) for w in weights], len(found))
            return found + [(i, row * c, c) for i, c in sums for row in (2, 3)]

        key = "bwd", needs_x, *needs_w, ctx.key
        (dx,), grads, grads_layout = taped(key, pass_, [dy, x, y, kept, *weights])
        grads = iter(grads_layout.cut(grads, pieces))
        dws = [weight_grad(next(grads), w) if need else None for w, need in zip(weights, needs_w)]
        affine = [p for norm in norms for p in (norm.weight, norm.bias)]
        affine = [
            None if p is None else g if p.dtype == torch.float32 else g.to(p.dtype) for p, g in zip(affine, grads)
        ]
        return None, None, None, None, dx, *dws, *affine


def records_of(norms: list[Norm], x: Tensor) -> list[Tensor]:
    """The records of norms that use their running statistics."""
    return [bn_finalise(norm, norm.running_mean.numel(), None, x.device) for norm in norms]


def infer(schedule: Schedule, x: Tensor, packed: list[Tensor], records: list[Tensor], config: Config) -> Tensor:
    """schedule.infer on NDHWC x, packed weights and their records."""
    shapes, precision = tuple([w.shape for w in packed]), input_precision(x.dtype, x.device)
    key = "infer", schedule.name, config, x.shape, x.dtype, x.device, shapes, precision, _backends.forced()
    return taped(key, lambda: ([schedule.infer(x, packed, records, config)], []), [x, *packed, *records])[0][0]


def _run(
    schedule: Schedule, x: Tensor, weights: list[Tensor], norms: list[Norm], config: Config, key: Call | None
) -> Tensor:
    """Run `schedule` on checked arguments and move the running statistics. key: that of its tapes, if they have one."""
    affine = [p for norm in norms for p in (norm.weight, norm.bias)]
    frozen = not any(norm.training for norm in norms)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights, *affine))
    if torch.compiler.is_compiling():
        call = _infer_op if frozen and not grad else _fwd_op
        flat = _flatten(norms)
        outputs = call(schedule.name, x, weights, *flat, config.kind, config.wiring, config.stride)
        if call is _infer_op:
            return outputs
        y, *records = outputs[: 1 + len(norms)]
        update_running(norms, [r[0] for r in records], [r[4] for r in records])
        return y
    if frozen and not grad:
        return infer(schedule, ndhwc(x), [pack_weight(w, x.dtype) for w in weights], records_of(norms, x), config)
    key = key or Call(False)  # of which there is no second
    return _Function.apply(schedule, config, norms, key, x, *weights, *affine)


# --- registered twins, for torch.compile and export ------------------------------------------------------------------

SCHEDULES: dict[str, Schedule] = {}


def _flatten(norms: list[Norm]) -> tuple[list[Tensor], list[Tensor], list[bool], list[float], list[bool]]:
    """Tensors that exist only: autograd takes a list with a None in it for one leaf, and gives it no gradient."""
    affine = [p for n in norms for p in (n.weight, n.bias)]
    running = [p for n in norms if not n.training for p in (n.running_mean, n.running_var)]
    present = [p is not None for p in affine]
    return [p for p in affine if p is not None], running, present, [n.eps for n in norms], [n.training for n in norms]


def _norms(affine, running, present, eps, training) -> list[Norm]:
    affine, running = iter(affine), iter(running)
    norms = []
    for i, train in enumerate(training):
        weight, bias = (next(affine) if there else None for there in present[2 * i : 2 * i + 2])
        statistics = (None, None) if train else (next(running), next(running))
        norms.append(Norm(weight, bias, *statistics, None, train, 0.0, eps[i]))
    return norms


@torch.library.custom_op("p3d::fused", mutates_args=())
def _fwd_op(
    name: str,
    x: Tensor,
    weights: list[Tensor],
    affine: list[Tensor],
    running: list[Tensor],
    present: list[bool],
    eps: list[float],
    training: list[bool],
    kind: str,
    wiring: str,
    stride: int,
) -> list[Tensor]:
    schedule, norms = SCHEDULES[name], _norms(affine, running, present, eps, training)
    packed = [pack_weight(w, x.dtype) for w in weights]
    y, records, raws = schedule.fwd(ndhwc(x), packed, norms, Config(kind, wiring, stride))
    return [y, *records, *raws]


@_fwd_op.register_fake
def _(name, x, weights, affine, running, present, eps, training, kind, wiring, stride):
    schedule, config = SCHEDULES[name], Config(kind, wiring, stride)
    raw_shapes = schedule.raw_shapes(x, weights, _norms(affine, running, present, eps, training), config)
    y, *raws = (
        x.new_empty(shape).to(memory_format=torch.channels_last_3d)
        if len(shape) == 5
        else x.new_empty(shape, dtype=torch.float32)
        for shape in (schedule.out_shape(x, weights, config), *raw_shapes)
    )
    channels = [w.size(0) for w in weights]
    return [y, *(x.new_empty((5, c), dtype=torch.float32) for c in channels), *raws]


@torch.library.custom_op("p3d::fused_bwd", mutates_args=())
def _bwd_op(
    name: str,
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weights: list[Tensor],
    affine: list[Tensor],
    running: list[Tensor],
    present: list[bool],
    eps: list[float],
    training: list[bool],
    records: list[Tensor],
    raws: list[Tensor],
    kind: str,
    wiring: str,
    stride: int,
) -> list[Tensor]:
    schedule, norms, config = (
        SCHEDULES[name],
        _norms(affine, running, present, eps, training),
        Config(kind, wiring, stride),
    )
    packed = [pack_weight(w, x.dtype) for w in weights]
    dx, dws, sums = schedule.bwd(
        ndhwc(dy), ndhwc(x), y, packed, norms, records, raws, config, True, [True] * len(weights)
    )
    return [dx, *(weight_grad(dw, w) for dw, w in zip(dws, weights)), *sums]


@_bwd_op.register_fake
def _(name, dy, x, y, weights, affine, running, present, eps, training, records, raws, kind, wiring, stride):
    dws = [weight_grad(w.new_empty(w.shape), w) for w in weights]
    sums = [x.new_empty((4, w.size(0)), dtype=torch.float32) for w in weights]
    return [torch.empty_like(x, memory_format=torch.channels_last_3d), *dws, *sums]


def _setup(ctx, inputs, output):
    name, x, weights, affine, running, present, eps, training, *config = inputs
    ctx.save_for_backward(x, output[0], *weights, *output[1:])
    ctx.affine, ctx.running = affine, running
    ctx.static = name, present, eps, training, config


def _backward(ctx, grads):
    name, present, eps, training, config = ctx.static
    x, y, *rest = ctx.saved_tensors
    count = len(eps)
    weights, records, raws = rest[:count], rest[count : 2 * count], rest[2 * count :]
    norms = ctx.affine, ctx.running, present, eps, training
    dx, *grads = _bwd_op(name, grads[0], x, y, weights, *norms, records, raws, *config)
    rows = [grads[count + i // 2][2 + i % 2] for i, there in enumerate(present) if there]
    affine = [row.to(p.dtype) for row, p in zip(rows, ctx.affine)]
    return None, dx, grads[:count], affine, [None] * len(ctx.running), None, None, None, None, None, None


_fwd_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("p3d::fused_infer", mutates_args=())
def _infer_op(
    name: str,
    x: Tensor,
    weights: list[Tensor],
    affine: list[Tensor],
    running: list[Tensor],
    present: list[bool],
    eps: list[float],
    training: list[bool],
    kind: str,
    wiring: str,
    stride: int,
) -> Tensor:
    packed = [pack_weight(w, x.dtype) for w in weights]
    records = records_of(_norms(affine, running, present, eps, training), x)
    return SCHEDULES[name].infer(ndhwc(x), packed, records, Config(kind, wiring, stride))


@_infer_op.register_fake
def _(name, x, weights, affine, running, present, eps, training, kind, wiring, stride):
    shape = SCHEDULES[name].out_shape(x, weights, Config(kind, wiring, stride))
    return x.new_empty(shape).to(memory_format=torch.channels_last_3d)
