"""Modules over the functional ops, with PyTorch's own parameter names, shapes and BN semantics.

Convolutions are subclasses of `torch.nn.Conv3d` and batch normalisations are plain `torch.nn.BatchNorm3d` / `2d`, so
initialisers, optimisers, state dicts, `.eval()` freezing and SyncBatchNorm conversion see what they expect. A block
hands all its layers to one op. It calls them one by one instead, in the same wiring, as soon as one of them must be
called for itself: `why_not_fused` says when.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.modules.utils import _triple

from . import ops
from ._backends import _warn_once
from ._checks import check_choice, check_positive
from ._norm import Norm, remember
from .ops._fused import MEMORY, Config
from .ops.bottleneck import bottlenecks
from .reference import KINDS, WIRINGS


class PointwiseConv3d(nn.Conv3d):
    """1x1x1 convolution, stride (1, s, s), no bias. x [N, Ci, T, H, W], weight [Co, Ci, 1, 1, 1]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, device=None, dtype=None):
        super().__init__(in_channels, out_channels, 1, (1, stride, stride), bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.pointwise_conv(x, self.weight, self.stride[1])


class SpatialConv3d(nn.Conv3d):
    """S: 1x3x3 convolution, stride (1, s, s), padding (0, 1, 1), no bias. weight [Co, Ci, 1, 3, 3]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, device=None, dtype=None):
        geometry = (1, 3, 3), (1, stride, stride), (0, 1, 1)
        super().__init__(in_channels, out_channels, *geometry, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.spatial_conv(x, self.weight, self.stride[1])


class TemporalConv3d(nn.Conv3d):
    """T: 3x1x1 convolution, stride (s, 1, 1), padding (1, 0, 0), no bias. weight [Co, Ci, 3, 1, 1]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, device=None, dtype=None):
        geometry = (3, 1, 1), (stride, 1, 1), (1, 0, 0)
        super().__init__(in_channels, out_channels, *geometry, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.temporal_conv(x, self.weight, self.stride[0])


class MaxPool3d(nn.MaxPool3d):
    """`torch.nn.MaxPool3d` in NDHWC, without dilation and indices. A window longer than its axis is cut to it.

    So a clip of one frame passes a temporal pool unchanged, where PyTorch raises or, in ceil mode, does the same.
    """

    def __init__(self, kernel_size, stride=None, padding=0, ceil_mode: bool = False):
        super().__init__(_triple(kernel_size), _triple(stride or kernel_size), _triple(padding), ceil_mode=ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:  # [C, T, H, W], which torch.nn takes too
            return self.forward(x.unsqueeze(0)).squeeze(0)
        sides = zip(self.kernel_size, x.shape[2:], self.padding, strict=False)  # another rank: the op says so
        kernel = tuple(min(k, n + 2 * p) for k, n, p in sides)
        return ops.max_pool(x, kernel, self.stride, self.padding, self.ceil_mode)


class _Frozen:
    """Eval mode and fixed parameters, whatever `train()` says."""

    def train(self, mode: bool = True):
        return super().train(False)


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that stays in eval mode through `model.train()`. Same state dict."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that stays in eval mode through `model.train()`. Same state dict."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that stays in eval mode through `model.train()`, so never communicates."""


FROZEN = {
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}

_PLAIN = frozenset(
    (nn.Conv2d, nn.Conv3d, PointwiseConv3d, SpatialConv3d, TemporalConv3d)
    + (nn.BatchNorm2d, nn.BatchNorm3d, *FROZEN.values())
    + (nn.ReLU, nn.Sequential)
)


def hooked(module: nn.Module) -> bool:
    """Whether something is to run when `module` itself is called: a hook, or a `forward` of the instance's own."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def why_not_fused(layers: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Why these layers must be called one by one and not handed to one op, or None.

    A hook would be passed over, and a SyncBatchNorm, a parametrised, quantised or otherwise replaced layer computes
    something that the op knows nothing of.
    """
    if _has_any_global_hook():
        return "a global module hook is registered"
    for name, layer in layers:
        if type(layer) not in _PLAIN:
            return f"{name} is a {type(layer).__name__}"
        if hooked(layer):
            return f"{name} has hooks or a forward of its own"
        if type(layer) is nn.Sequential:
            why = why_not_fused(layer._modules.items())
            if why is not None:
                return f"{name}.{why}"
    return None


def remember_norms(module: nn.Module) -> None:
    """`_norm.remember` of every BatchNorm layer in `module`, which is about to call them one by one."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            remember(Norm.of(layer))


def explain_unfused(what: str, why: str, x: Tensor) -> None:
    """Warn once a process and reason that a block runs layer by layer, where that costs speed."""
    if x.is_cuda and not torch.compiler.is_compiling():
        _warn_once(f"p3d_kernels: {what} runs layer by layer, unfused ({why})")


def _join(x: Tensor, s: Tensor, t, kind: str, wiring: str, relu) -> Tensor:
    """Layer-by-layer form of the table in `reference.py`: s = relu(bn_s(S x)), t(y) = bn_t(T y)."""
    if kind == "A":
        return relu(t(s))
    u = t(x if kind == "B" else s)
    if wiring == "port":
        return s + relu(u)
    return relu(s + u) if kind == "B" else relu(0.5 * s + 0.5 * u)


class Pseudo3dConv(nn.Module):
    """The spatial and temporal convolutions of one P3D block, with their normalisations, as one op.

    Instead of a 3x3x3 convolution, BN and ReLU: x [N, Ci, T, H, W] to [N, Co, T, H, W]. With s = relu(bn_s(S x)):

        A serial      relu(bn_t(T s))
        B parallel    relu(s + bn_t(T x))               port: s + relu(bn_t(T x))
        C both        relu(0.5 s + 0.5 bn_t(T s))       port: s + relu(bn_t(T s))

    Args:
        in_channels, out_channels: Ci, Co.
        kind: "A", "B" or "C".
        wiring: "author" (released Caffe graphs) or "port" (PyTorch port).

    Source: Qiu, Yao, Mei, ICCV 2017, section 3.1.
    """

    def __init__(self, in_channels: int, out_channels: int, kind: str = "A", wiring: str = "author"):
        super().__init__()
        check_choice("kind", kind, KINDS[:3])
        check_choice("wiring", wiring, WIRINGS)
        self.kind, self.wiring = kind, wiring
        self.conv_s = SpatialConv3d(in_channels, out_channels)
        self.bn_s = nn.BatchNorm3d(out_channels)
        self.conv_t = TemporalConv3d(in_channels if kind == "B" else out_channels, out_channels)
        self.bn_t = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        how = {"kind": self.kind, "wiring": self.wiring}
        why = why_not_fused(self._modules.items())
        if why is None:
            return ops.pseudo3d_conv(x, *self.arguments(), **how)
        explain_unfused("Pseudo3dConv", why, x)
        remember_norms(self)
        return _join(x, F.relu(self.bn_s(self.conv_s(x))), lambda y: self.bn_t(self.conv_t(y)), **how, relu=F.relu)

    def arguments(self) -> tuple:
        """(weight, norm) of S and T, flat, as `ops.pseudo3d_conv` takes them after x."""
        return *_pair(self.conv_s, self.bn_s), *_pair(self.conv_t, self.bn_t)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, wiring={self.wiring}"


def set_memory(module: nn.Module, memory: str) -> None:
    """Set `memory` of every `Bottleneck` in `module`."""
    check_choice("memory", memory, MEMORY)
    for block in module.modules():
        if isinstance(block, Bottleneck):
            block.memory = memory


class MemoryOfBlocks:
    """A module whose `memory` is that of the `Bottleneck` blocks in it: "mixed", where they differ."""

    @property
    def memory(self) -> str:
        found = {m.memory for m in self.modules() if isinstance(m, Bottleneck)} or {MEMORY[0]}
        return found.pop() if len(found) == 1 else "mixed"

    @memory.setter
    def memory(self, memory: str) -> None:
        set_memory(self, memory)


class Bottleneck(nn.Module):
    """P3D bottleneck: relu(bn(expand(join(relu(bn(reduce x))))) + r), r = x or bn(downsample x), as one op.

    Layers carry the names of the PyTorch port: `conv1 bn1` reduce, `conv2 bn2` S, `conv3 bn3` T, `conv4 bn4` expand,
    `downsample.0 .1`; a block of kind "2d" (stage 4) has `conv1 bn1 conv_normal bn_normal conv4 bn4` with 4-D weights
    and BatchNorm2d, and treats every frame alike. The stride (1, s, s) sits on reduce and on downsample.

    x [N, Ci, T, H, W] to [N, 4 M, T, H / s, W / s] (rounded up), any T; kind "2d" also takes x [N, Ci, H, W].

    Args:
        in_channels: Ci.
        channels: M, the channels of the joined convolutions; the block gives `expansion` times as many.
        kind: "A", "B", "C" (see `Pseudo3dConv`) or "2d".
        wiring: "author" or "port".
        stride: s. With s > 1 or Ci != 4 M the block has a downsample.
        memory: "default", or "less": in training our kernels drop what one of them makes again in the backward. In a
            `BottleneckRow` that is the block's output, but for the last; and where Ci <= 2 M, that of its reduce,
            unless it is small. Outputs and gradients are the same, bit for bit. May be set later. No effect in plain
            PyTorch (backend "aten") and under torch.compile.
    """

    expansion = 4
    _memory = MEMORY[0]

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kind: str = "A",
        wiring: str = "author",
        stride: int = 1,
        memory: str = "default",
    ):
        super().__init__()
        self.memory = memory
        check_choice("kind", kind, KINDS)
        check_choice("wiring", wiring, WIRINGS)
        for name, value in (("in_channels", in_channels), ("channels", channels), ("stride", stride)):
            check_positive(name, value)
        self.kind, self.wiring, self.stride = kind, wiring, stride
        out_channels = self.expansion * channels
        if kind == "2d":
            bn = nn.BatchNorm2d
            self.conv1 = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.bn1 = bn(channels)
            self.conv_normal = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn_normal = bn(channels)
            self.conv4 = nn.Conv2d(channels, out_channels, 1, bias=False)
        else:
            bn = nn.BatchNorm3d
            self.conv1 = PointwiseConv3d(in_channels, channels, stride)
            self.bn1 = bn(channels)
            self.conv2 = SpatialConv3d(channels, channels)
            self.bn2 = bn(channels)
            self.conv3 = TemporalConv3d(channels, channels)
            self.bn3 = bn(channels)
            self.conv4 = PointwiseConv3d(channels, out_channels)
        self.bn4 = bn(out_channels)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            if kind == "2d":
                conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            else:
                conv = PointwiseConv3d(in_channels, out_channels, stride)
            self.downsample = nn.Sequential(conv, bn(out_channels))

    @classmethod
    def of(cls, layers: dict[str, nn.Module], kind: str, wiring: str, stride: int) -> Bottleneck:
        """A block around existing layers (names as above, their order kept): it shares them, nothing is copied."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.kind, block.wiring, block.stride = kind, wiring, stride
        for name, layer in layers.items():
            block.add_module(name, layer)
        for name, default in (("relu", nn.ReLU()), ("downsample", None)):
            if name not in layers:
                setattr(block, name, default)
        return block

    @property
    def memory(self) -> str:
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        check_choice("memory", memory, MEMORY)
        self._memory = memory

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "2d" and x.dim() == 4:
            return self.forward(x.unsqueeze(2)).squeeze(2)
        why = self.why_not_fused()
        if why is not None:
            explain_unfused("Bottleneck", why, x)
            return self._frames(x) if self.kind == "2d" else self._one_by_one(x)
        how = {"kind": self.kind, "wiring": self.wiring, "stride": self.stride, "memory": self.memory}
        return ops.bottleneck(x, *self.arguments(), **how)

    def arguments(self) -> tuple:
        """(weight, norm) of reduce, S, T, expand and downsample, flat, as `ops.bottleneck` takes them after x."""
        layers = self._modules  # attribute access costs several times as much, on each block's path
        if self.kind == "2d":
            middle = *_pair(layers["conv_normal"], layers["bn_normal"]), None, None
        else:
            middle = *_pair(layers["conv2"], layers["bn2"]), *_pair(layers["conv3"], layers["bn3"])
        down = layers.get("downsample")
        return (
            *_pair(layers["conv1"], layers["bn1"]),
            *middle,
            *_pair(layers["conv4"], layers["bn4"]),
            *((None, None) if down is None else _pair(*down._modules.values())),
        )

    def _one_by_one(self, x: Tensor) -> Tensor:
        """Every layer called for itself, so that its hooks run and its own class decides what it computes."""
        remember_norms(self)
        a = self.relu(self.bn1(self.conv1(x)))
        if self.kind == "2d":
            a = self.relu(self.bn_normal(self.conv_normal(a)))
        else:
            s = self.relu(self.bn2(self.conv2(a)))
            a = _join(a, s, lambda y: self.bn3(self.conv3(y)), self.kind, self.wiring, self.relu)
        a = self.bn4(self.conv4(a))
        return self.relu(a + (x if self.downsample is None else self.downsample(x)))

    def why_not_fused(self) -> str | None:
        """Why this block must call its layers one by one, or None."""
        return why_not_fused((name, layer) for name, layer in self._modules.items() if layer is not None)

    def _frames(self, x: Tensor) -> Tensor:
        """`_one_by_one` over frames as a batch, as 2-D layers want them."""
        n, _, t, _, _ = x.shape
        y = self._one_by_one(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (n, t)).transpose(1, 2)

    def extra_repr(self) -> str:
        memory = "" if self.memory == MEMORY[0] else f", memory={self.memory}"
        return f"kind={self.kind}, wiring={self.wiring}, stride={self.stride}{memory}"


class BottleneckRow(MemoryOfBlocks, nn.Sequential):
    """`Bottleneck` blocks in a row, run as one op where nothing must happen between them: the host works once for all.

    A block with hooks, or one that calls its layers one by one, or has nothing to train while others have, makes all of
    them run for themselves; so does tracing.
    """

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.joined() if x.dim() == 5 else None
        if blocks is not None:
            return bottlenecks(x, blocks)
        for block in self._modules.values():
            x = block(x)
        return x

    def joined(self) -> list[tuple[tuple, Config]] | None:
        """The blocks as `bottlenecks` takes them, where nothing must happen between them; else None."""
        blocks = list(self._modules.values())
        if len(blocks) < 2 or torch.compiler.is_compiling() or not all(map(_may_join, blocks)):
            return None
        arguments = [block.arguments() for block in blocks]
        if torch.is_grad_enabled() and not all(map(_trains, arguments)):
            return None
        configs = [Config(block.kind, block.wiring, block.stride, block.memory) for block in blocks]
        return list(zip(arguments, configs))


def _may_join(block: nn.Module) -> bool:
    return type(block) is Bottleneck and not hooked(block) and block.why_not_fused() is None


def _trains(arguments: tuple) -> bool:
    tensors = (t for w, norm in zip(arguments[::2], arguments[1::2]) if w is not None for t in (w, norm.weight))
    return any(t is not None and t.requires_grad for t in tensors)


def _pair(conv: nn.Conv2d | nn.Conv3d, bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Norm]:
    """The weight of a convolution as [Co, Ci, kT, kH, kW], kT = 1 for a 2-D one, and its normalisation."""
    weight = conv._parameters["weight"]
    return weight if weight.dim() == 5 else weight.unsqueeze(2), Norm.of(bn)
