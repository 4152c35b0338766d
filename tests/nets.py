"""Comparing two nets with the same weights: one step through both, everything that a step leaves behind compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MODES = ("train", "eval", "frozen")


def randomise(net: nn.Module) -> nn.Module:
    """Normalisations with random parameters and statistics, so that each of them matters."""
    for norm in batch_norms(net):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """By name: the order of registration differs between nets of the same names."""
    named = sorted(net.named_modules(), key=lambda item: item[0])
    return [m for _, m in named if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def set_mode(net: nn.Module, mode: str) -> nn.Module:
    """train, eval, or "frozen": training with every normalisation but the first in eval mode."""
    net.train(mode != "eval")
    if mode == "frozen":
        for norm in batch_norms(net)[1:]:
            norm.eval()
    return net


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(output, gradient of x, gradients by layer: those of one layer together) of a fixed random loss."""
    net.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = net(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # the same in every dtype
    (y * weights.to(y)).sum().backward()
    layers: dict[str, list[Tensor]] = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            layers.setdefault(name.rpartition(".")[0], []).append(p.grad.flatten())
    return y.detach(), x.grad, {name: torch.cat(grads) for name, grads in layers.items()}


def distance(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, 2-norms in float64; infinite where something is not finite."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    a, e = actual.double(), expected.double()
    if not a.isfinite().all():
        return float("inf")
    return ((a - e).norm() / e.norm().clamp_min(1e-300)).item()


def differences(ours: nn.Module, theirs: nn.Module, x: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Distances after one step through both, by name: (output and buffers, gradients)."""
    y, dx, grads = step(ours, x)
    want_y, want_dx, want = step(theirs, x)
    values, buffers = {"output": distance(y, want_y)}, dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if buffer.is_floating_point():
            values[name] = distance(buffer, buffers[name])
        else:
            assert torch.equal(buffer, buffers[name]), name
    assert grads.keys() == want.keys()
    return values, {"dx": distance(dx, want_dx)} | {name: distance(grads[name], want[name]) for name in want}


def assert_within(limit: float, distances: dict[str, float]) -> None:
    worst = sorted((-value, name) for name, value in distances.items() if not value <= limit)
    assert not worst, f"{len(worst)} beyond {limit}, the worst: {[(name, -value) for value, name in worst[:6]]}"


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: Tensor, limit: float) -> None:
    """Output, every buffer, gradient of x and gradients of every layer agree to `limit` after one step."""
    values, grads = differences(ours, theirs, x)
    assert_within(limit, values | grads)


def assert_same_step_float32(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], limit: float) -> None:
    """`assert_same_step` of deep nets in float32, where the gradient for one input in six must agree.

    Among millions of activations one may lie so near to 0 that the two nets round it to different sides of the ReLU;
    the gradient then jumps by 1e-3 in a correct net. On another input it does not; a wrong net is wrong on all.
    """
    for _ in range(6):
        values, grads = differences(ours, theirs, torch.randn(shape))
        assert_within(limit, values)
        if max(grads.values()) <= limit:
            break
    assert_within(limit, grads)
