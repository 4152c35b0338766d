"""The batch normalisation an op is given: parameters, running statistics and mode in one value."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class Norm:
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


@torch.no_grad()
def update_running(norms: list[Norm], means: list[Tensor], variances: list[Tensor]) -> None:
    """Move the running statistics of `norms` towards this batch's means and unbiased variances ([C], float32).

    Called once an op's forward has succeeded, with every norm of the op: nothing is half-updated.
    """
    live = [(n, m, v) for n, m, v in zip(norms, means, variances) if n.updates]
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
