"""The batch normalisation an op is given: parameters, running statistics and mode in one value."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import _backends

_TENSORS = ("weight", "bias", "running_mean", "running_var")


class Norm(NamedTuple):
    """One batch normalisation over [N, T, H, W], exactly as `torch.nn.BatchNorm3d` defines it.

    u = (z - mean) / sqrt(var + eps) * weight + bias, a channel at a time. With `training` the mean and biased variance
    of this batch are used, and the running statistics, if any, move towards them (unbiased variance) once the op has
    succeeded; otherwise the running statistics are used.

    Args:
        weight, bias: [C] or None (1 and 0).
        running_mean, running_var: [C], float32 as a rule, or None.
        num_batches_tracked: int64 scalar or None; counted up with the running statistics.
        training: use batch statistics.
        momentum: weight of the new statistics; None for a cumulative mean (needs num_batches_tracked).
        eps: added to the variance.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.modules.batchnorm._BatchNorm) -> Norm:
        """The normalisation a BatchNorm module would do in its present mode."""
        own, buffers = module._parameters, module._buffers  # half the time of attribute access, on each block's path
        return cls(
            own["weight"],
            own["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"] if module.track_running_stats else None,
            module.training or buffers["running_mean"] is None,
            module.momentum,
            module.eps,
        )

    @property
    def updates(self) -> bool:
        """Whether a forward moves the running statistics."""
        return self.training and self.running_mean is not None


def check_norm(name: str, norm: Norm, channels: int, x: Tensor) -> None:
    """Raise TypeError or ValueError unless `norm` normalises `channels` channels on the device of `x`."""
    if not isinstance(norm, Norm):
        raise TypeError(f"{name}: expected a Norm, got {type(norm).__name__}")
    for field in _TENSORS:
        value = getattr(norm, field)
        if value is None:
            continue
        if tuple(value.shape) != (channels,):
            raise ValueError(f"{name}.{field}: expected shape ({channels},), got {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name}.{field}: expected device {x.device}, got {value.device}")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{name}: expected running_mean and running_var together, got one alone")
    if not norm.training and norm.running_mean is None:
        raise ValueError(f"{name}: expected running statistics when training=False, got None")
    if norm.training and channels and x.numel() // max(x.size(1), 1) == 1:
        raise ValueError(
            f"{name}: expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )


# --- running statistics ----------------------------------------------------------------------------------------------


class _Waiting(threading.local):
    moves: list | None = None  # of the ops that have run inside `together`, as `_move` takes them
    before: list  # (tensor, its value then) of what has moved by itself there


_waiting = _Waiting()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside, the running statistics of our ops wait: all move at the end, or none, if the body fails.

    What PyTorch moves at once, as a `torch.nn.BatchNorm3d` called for itself does, is put back if `remember` was told
    before. Inner uses join the outermost. A thread's own.
    """
    if _waiting.moves is not None:
        yield
        return
    _waiting.moves, _waiting.before = [], []
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in reversed(_waiting.before):
                tensor.copy_(value)
        raise
    else:
        _move(_waiting.moves)
    finally:
        _waiting.moves, _waiting.before = None, []


def remember(norm: Norm) -> None:
    """Have `together`, if it is around, put back what PyTorch is about to move of this norm's statistics."""
    if torch.compiler.is_compiling() or _waiting.moves is None or not norm.updates:
        return
    state = norm.running_mean, norm.running_var, norm.num_batches_tracked
    _waiting.before += [(t, t.clone()) for t in state if t is not None]


def update_running(
    norms: list[Norm],
    means: list[Tensor] | list[int],
    variances: list[Tensor] | list[int],
    holder: Tensor | None = None,
) -> None:
    """Move the running statistics of `norms` towards this batch's means and unbiased variances ([C], float32).

    Called once an op's forward has succeeded, with every norm of the op: nothing is half-updated. Inside `together`
    they move at its end. holder: a tensor that holds the means and variances, which are then given by their addresses;
    for norms that may move `in_one_launch`.
    """
    live = [(n, m, v) for n, m, v in zip(norms, means, variances) if n.updates]
    if torch.compiler.is_compiling():
        _move_by_foreach(live)
    elif _waiting.moves is None:
        _move([(live, holder)])
    else:
        _waiting.moves.append((live, holder))


def in_one_launch(norms: Iterable[Norm], x: Tensor) -> bool:
    """Whether a kernel of the extension can move the running statistics of an op on x that has these norms."""
    live = [n for n in norms if n.updates]
    statistics = [t for n in live for t in (n.running_mean, n.running_var)]
    counters = [n.num_batches_tracked for n in live if n.num_batches_tracked is not None]
    return (
        all(n.momentum is not None for n in live)
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in statistics)
        and all(t.dtype == torch.int64 for t in counters)
        and _backends.forced() != "triton"
        and _backends.why_not("cuda", x) is None
    )


@torch.no_grad()
def _move(moves: list[tuple[list[tuple], Tensor | None]]) -> None:
    """The (norm, mean, variance) of each op and who holds these, as `update_running` has them, in the order of ops."""
    everything = [one for live, _ in moves for one in live]
    if len({id(n.running_mean) for n, _, _ in everything}) < len(everything):  # shared: by one op after the other
        groups = [([one], holder is not None) for live, holder in moves for one in live]
    else:
        groups = [([one for live, h in moves if (h is not None) == way for one in live], way) for way in (True, False)]
    for live, way in groups:
        if live:
            (_move_in_one_launch if way else _move_by_foreach)(live)


def _move_in_one_launch(live: list[tuple[Norm, int, int]]) -> None:
    tensors = [t for n, _, _ in live for t in (n.running_mean, n.running_var, n.num_batches_tracked)]
    own = iter([0 if t is None else t.data_ptr() for t in tensors])
    addresses = [a for (_, m, v), *moved in zip(live, own, own, own) for a in (m, v, *moved)]
    sizes = [(n.running_mean.numel(), n.momentum) for n, _, _ in live]
    with torch.cuda.device(tensors[0].device):
        _backends.native().running_stats(addresses, sizes, torch.cuda.current_stream().cuda_stream)
    increment_version([t for t in tensors if t is not None])


@torch.no_grad()
def _move_by_foreach(live: list[tuple[Norm, Tensor, Tensor]]) -> None:
    counters = [n.num_batches_tracked for n, _, _ in live if n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    for momentum in {n.momentum for n, _, _ in live}:
        running, batch = [], []
        for n, m, v in live:
            if n.momentum == momentum:
                running += [n.running_mean, n.running_var]
                batch += [m, v]
        batch = [b if b.dtype == r.dtype else b.to(r.dtype) for r, b in zip(running, batch)]
        if momentum is None:  # cumulative mean: no host read of the counter, so one tensor at a time
            counts = [n.num_batches_tracked for n, _, _ in live if n.momentum is None for _ in range(2)]
            for r, b, count in zip(running, batch, counts):
                r.lerp_(b, 1.0 / count.to(r.dtype))
        else:
            torch._foreach_lerp_(running, batch, momentum)
