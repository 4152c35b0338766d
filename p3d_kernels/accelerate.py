"""Swap the layers of an existing P3D net for fused ones, in place, keeping its parameters and state dict.

A block is known by the names and shapes of its layers, and what it computes is found out by asking it: a copy with
random weights is run on a small input, and its answers in eval and train mode must be those of one of the kinds A, B,
C or 2d in one of the two wirings. So the class of the net does not matter, nor what it calls its kinds.
"""

from __future__ import annotations

import copy
import dataclasses
import logging

import torch
from torch import Tensor, nn

from ._backends import use_backend
from ._checks import check_choice
from .models import P3D
from .nn import FROZEN, Bottleneck, BottleneckRow, MaxPool3d, hooked, set_memory, why_not_fused
from .ops._fused import MEMORY

_log = logging.getLogger("p3d_kernels")

_NAMES_3D = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "conv4", "bn4")
_NAMES_2D = ("conv1", "bn1", "conv_normal", "bn_normal", "conv4", "bn4")
_STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_CANDIDATES = (("A", "port"), ("B", "port"), ("C", "port"), ("B", "author"), ("C", "author"))


@dataclasses.dataclass
class AccelerateReport:
    """What `accelerate` did, by module name.

    Args:
        swapped: module name to what is there now.
        left: module name to the reason why it stays as it was.
    """

    swapped: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {len(self.left)} left"]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


class _Left(Exception):
    """The reason why a module is not swapped."""


def accelerate(model: nn.Module, report: AccelerateReport | None = None, *, memory: str | None = None) -> nn.Module:
    """Swap the bottleneck blocks and max-pools of a port-style P3D net for fused ones, in place.

    A block is any module whose layers are `conv1 bn1 conv2 bn2 conv3 bn3 conv4 bn4` (1x1x1, 1x3x3, 3x1x1, 1x1x1) or, on
    [N, C, H, W], `conv1 bn1 conv_normal bn_normal conv4 bn4`, with or without a `downsample` of a convolution and a
    normalisation. The new block shares those very layers: parameters, buffers, their hooks, optimisers and the state
    dict stay, and outputs and gradients are the same up to rounding. Attributes of the old block beside its layers go.

    The convolution and normalisation of the stem stay: the net's own `forward` calls them one by one.

    Args:
        model: the net; on any device, in any mode. May be wrapped (DistributedDataParallel, ...).
        report: filled with what was swapped and what was left, and why. The same goes to the logger `p3d_kernels`.
        memory: "default" or "less", of all blocks that are ours then (`nn.Bottleneck`); None: as each has it.

    Returns:
        model.

    Raises:
        TypeError: `model` is no module.
        ValueError: no block could be swapped, or an unknown `memory`; says why. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_choice("memory", memory, (*MEMORY, None))
    report = AccelerateReport() if report is None else report
    plan: list[tuple[nn.Module, str, nn.Module]] = []
    made: dict[nn.Module, nn.Module] = {}  # a module that stands in two places is swapped for one and the same
    blocks = 0
    for path, parent in model.named_modules():
        if not isinstance(parent, P3D) and {"conv1_custom", "bn1"} <= parent._modules.keys():
            stem = f"{path}.conv1_custom" if path else "conv1_custom"
            report.left[stem] = "the net's own forward calls the layers of its stem one by one"
        for name, child in parent._modules.items():
            if child is None:
                continue
            full = f"{path}.{name}" if path else name
            try:
                if child not in made:
                    made[child] = _fused_twin(child)
            except _Left as why:
                report.left[full] = str(why)
                continue
            if made[child] is not None:
                plan.append((parent, name, made[child]))
                report.swapped[full] = f"{type(made[child]).__name__}({made[child].extra_repr()})"
                blocks += isinstance(made[child], Bottleneck)
    if not blocks and not any(isinstance(m, Bottleneck) for m in model.modules()):
        why = "; ".join(f"{name}: {reason}" for name, reason in report.left.items()) or "it has no P3D bottleneck block"
        report.swapped.clear()
        raise ValueError(f"model: nothing could be swapped in {type(model).__name__} ({why})")
    for parent, name, twin in plan:
        parent.add_module(name, twin)
    for row in model.modules():
        if type(row) is nn.Sequential and len(row) > 1 and all(type(m) is Bottleneck for m in row):
            row.__class__ = BottleneckRow  # the same object, its hooks and names kept
    if memory is not None:
        set_memory(model, memory)
    _log.info("accelerate: %s", report)
    return model


def _fused_twin(module: nn.Module) -> nn.Module | None:
    """The fused module to put in the place of `module`; None if it is nothing of ours to swap; raises _Left."""
    if isinstance(module, (Bottleneck, MaxPool3d)):
        return None
    if isinstance(module, nn.MaxPool3d):
        return _max_pool(module)
    names = set(module._modules)
    for layers, is_2d in ((_NAMES_3D, False), (_NAMES_2D, True)):
        if names.issuperset(layers):
            return _block(module, layers, is_2d)
    return None


def _max_pool(pool: nn.MaxPool3d) -> MaxPool3d:
    if type(pool) is not nn.MaxPool3d or hooked(pool):
        raise _Left("has hooks or is of a subclass")
    if pool.return_indices or pool.dilation not in (1, (1, 1, 1)):
        raise _Left("gives indices or is dilated")
    return MaxPool3d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode).train(pool.training)


def _block(block: nn.Module, names: tuple[str, ...], is_2d: bool) -> Bottleneck:
    layers = {name: layer for name, layer in block._modules.items() if layer is not None}
    stride = _check_layers(block, layers, names, is_2d)
    kind, wiring = _find_kind(block, stride, is_2d)
    fused = Bottleneck.of(layers, kind, wiring, stride)
    fused.training = block.training  # train() would set the layers' own modes
    return fused


def _check_layers(block: nn.Module, layers: dict[str, nn.Module], names: tuple[str, ...], is_2d: bool) -> int:
    """Raise _Left unless the layers are those of a bottleneck; its stride."""
    other = set(layers) - {*names, "relu", "downsample"}
    if other:
        raise _Left(f"has further layers {sorted(other)}")
    if block._parameters or block._buffers:
        raise _Left(f"has parameters or buffers of its own {sorted([*block._parameters, *block._buffers])}")
    if hooked(block) or any(getattr(block, name, None) for name in _STATE_HOOKS):
        raise _Left("has hooks or a forward of its own")
    why = why_not_fused(layers.items())
    if why is not None:
        raise _Left(why)

    reduce, spatial, expand = (layers[name] for name in (names[0], names[2], "conv4"))
    stride = reduce.stride[-1]
    channels, out_channels = spatial.out_channels, expand.out_channels
    point = (1,) * (2 if is_2d else 3)
    strided = (stride,) * 2 if is_2d else (1, stride, stride)
    _check_conv("conv1", reduce, (reduce.in_channels, channels), point, strided)
    _check_conv(names[2], spatial, (channels, channels), (3, 3) if is_2d else (1, 3, 3), point)
    if not is_2d:
        _check_conv("conv3", layers["conv3"], (channels, channels), (3, 1, 1), point)
    _check_conv("conv4", expand, (channels, out_channels), point, point)
    norms = [(name, layers[name], channels) for name in names[1:-1:2]] + [("bn4", layers["bn4"], out_channels)]
    down = layers.get("downsample")
    if down is not None:
        if [name for name, _ in down.named_children()] != ["0", "1"]:
            raise _Left("downsample: expected a convolution and a normalisation")
        _check_conv("downsample.0", down[0], (reduce.in_channels, out_channels), point, strided)
        norms.append(("downsample.1", down[1], out_channels))
    elif stride != 1 or reduce.in_channels != out_channels:
        raise _Left("the shortcut changes its shape without a downsample layer")
    for name, norm, wanted in norms:
        if not isinstance(norm, (nn.BatchNorm2d if is_2d else nn.BatchNorm3d, FROZEN[nn.SyncBatchNorm])):
            raise _Left(f"{name} is a {type(norm).__name__}")
        if norm.num_features != wanted:
            raise _Left(f"{name}: expected {wanted} channels, got {norm.num_features}")
    return stride


def _check_conv(name: str, conv: nn.Module, channels: tuple[int, int], kernel: tuple, stride: tuple) -> None:
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
        raise _Left(f"{name} is a {type(conv).__name__}")
    want = {
        "channels": channels,
        "kernel_size": kernel,
        "stride": stride,
        "padding": tuple(k // 2 for k in kernel),
        "dilation": (1,) * len(kernel),
        "groups": 1,
        "padding_mode": "zeros",
        "bias": False,
    }
    got = {key: getattr(conv, key, None) for key in want}
    got |= {"channels": (conv.in_channels, conv.out_channels), "bias": conv.bias is not None}
    for key, value in want.items():
        if got[key] != value and not (key == "padding_mode" and not any(want["padding"])):
            raise _Left(f"{name}.{key}: expected {value}, got {got[key]}")


def _find_kind(block: nn.Module, stride: int, is_2d: bool) -> tuple[str, str]:
    """(kind, wiring) of the block, by what a copy of it with random weights computes; raises _Left if none fits."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    candidates = [("2d", "port")] if is_2d else list(_CANDIDATES)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), use_backend("aten"):
            twin = copy.deepcopy(block).to(device="cpu", dtype=torch.float64)
            for tensor in (*twin.parameters(), *twin.buffers()):
                if tensor.is_floating_point():  # [C] or a weight, scaled by 1 / sqrt(fan-in)
                    tensor.copy_(random(*tensor.shape) * tensor[0].numel() ** -0.5)
            for name, tensor in twin.named_buffers():
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
            layers = {name: layer for name, layer in twin._modules.items() if layer is not None}
            x = random(2, twin.conv1.in_channels, *(3,) * (2 if is_2d else 3))
            for training in (False, True):
                want = twin.train(training)(x.clone())
                candidates = [c for c in candidates if _close(Bottleneck.of(layers, *c, stride)(x), want)]
    except Exception as error:
        raise _Left(f"a copy of it did not run on a small input ({type(error).__name__}: {error})") from error
    if not candidates:
        raise _Left("its forward computes none of the kinds A, B, C, 2d of either wiring")
    return candidates[0]


def _close(x: Tensor, want: Tensor) -> bool:
    return x.shape == want.shape and bool((x - want).norm() <= 1e-9 * want.norm())
