"""What each implementation of a case is: plain modules, the rivals made from them, and ours with the same weights.

Every case starts from a master, a plain float32 module, seeded. A rival is the master rewritten; ours is loaded with
its state dict. All use the port's wiring, which is what users of plain PyTorch have.

    p3d_kernels     this package (`freeze` for inference)
    p3d_kernels_less_memory
                    the same with memory="less", in training
    eager           PyTorch, channels_last_3d; BN folded into the convolutions for inference
    eager_ncdhw     the same in PyTorch's default layout
    compile         `eager` under torch.compile
    conv2d          `eager` as 2-D convolutions, pools and BN on free views of NDHWC: S and 1x1x1 as 2-D convolutions of
                    [N*T, C, H, W], T as (3, 1) of [N, C, T, H*W]. The strongest rival made of PyTorch alone
    conv2d_compile  the same under torch.compile
    conv3d_full     `eager` with one 3x3x3 convolution in place of S and T: other weights, judged by its own reference
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import p3d_kernels as p3d
from p3d_kernels import models
from p3d_kernels import nn as p3d_nn
from p3d_kernels._judge import arranged
from p3d_kernels._norm import Norm
from p3d_kernels.models.plain import PlainBottleneck, PlainBottleneck2d, PlainP3D

from .cases import DEPTHS, Case

WIRING = "port"
OURS = "p3d_kernels"
LESS_MEMORY = "p3d_kernels_less_memory"


@dataclasses.dataclass(frozen=True)
class Rival:
    """How a master is rewritten."""

    channels_last: bool = True
    views_2d: bool = False
    compile: bool = False


RIVALS = {
    "eager": Rival(),
    "eager_ncdhw": Rival(channels_last=False),
    "compile": Rival(compile=True),
    "conv2d": Rival(views_2d=True),
    "conv2d_compile": Rival(views_2d=True, compile=True),
    "conv3d_full": Rival(),
}
IMPLEMENTATIONS = (OURS, LESS_MEMORY, *RIVALS)


def applies(implementation: str, case: Case, pass_: str = "train") -> bool:
    """Whether an implementation says anything about a case (a single convolution has nothing to compile)."""
    if implementation == LESS_MEMORY:
        return case.op in DEPTHS and pass_ != "infer"
    if implementation == "conv3d_full":
        whole = case.op in ("bottleneck", "pseudo3d_conv")
        return case.op in DEPTHS or case.op == "spatial_conv" or (whole and case.kind == "A")
    return not (RIVALS.get(implementation, Rival()).compile and case.op.endswith("_conv") and case.kind is None)


# The masters


class PlainStem(nn.Module):
    """Convolution 1x7x7, BN, ReLU and max-pool of `PlainP3D`."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1_custom = nn.Conv3d(in_channels, channels, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((2, 3, 3), (2, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1_custom(x))))


class PlainPseudo3d(nn.Module):
    """S and T of one block in the port's wiring, named as in `p3d_kernels.nn.Pseudo3dConv`."""

    def __init__(self, in_channels: int, channels: int, kind: str):
        super().__init__()
        self.kind = kind
        self.conv_s = nn.Conv3d(in_channels, channels, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn_s = nn.BatchNorm3d(channels)
        self.conv_t = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn_t = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        spatial = self.relu(self.bn_s(self.conv_s(x)))
        temporal = self.relu(self.bn_t(self.conv_t(x if self.kind == "B" else spatial)))
        return temporal if self.kind == "A" else spatial + temporal


class PlainFull(nn.Sequential):
    """What S and T stand for: convolution 3x3x3, BN, ReLU."""

    def __init__(self, in_channels: int, channels: int):
        conv = nn.Conv3d(in_channels, channels, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm3d(channels), nn.ReLU(inplace=True))


class PlainFrames(PlainBottleneck2d):
    """A 2-D block over the frames of x [N, C, T, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return _unframe(super().forward(_frames(x)), x.size(0))


def master(case: Case, full: bool = False) -> nn.Module:
    """The plain module of a case, in float32; with `full`, 3x3x3 in place of S and T."""
    ci, co = case.channels[0], case.channels[-1]
    if case.op in DEPTHS:
        model = PlainP3D(DEPTHS[case.op], co, wiring=WIRING, dropout=0.0, conv3d_full=full)
    elif case.op == "stem":
        model = PlainStem(ci, co)
    elif case.op == "pseudo3d_conv":
        model = PlainFull(ci, co) if full else PlainPseudo3d(ci, co, case.kind)
    elif case.op == "bottleneck" and case.kind == "2d":
        model = PlainFrames(ci, case.channels[1], case.stride)
    elif case.op == "bottleneck":
        model = PlainBottleneck(ci, case.channels[1], "full" if full else case.kind, WIRING, case.stride)
    else:
        taps = {"spatial_conv": (1, 3, 3), "temporal_conv": (3, 1, 1), "pointwise_conv": (1, 1, 1)}[case.op]
        taps = (3, 3, 3) if full else taps
        model = nn.Conv3d(ci, co, taps, padding=tuple(k // 2 for k in taps), bias=False)
    return model


# Ours


class _Op(nn.Module):
    """A functional op on the parameters of a master."""

    def __init__(self, case: Case, model: nn.Module):
        super().__init__()
        self.case = case
        if case.op == "stem":
            self.conv1_custom, self.bn1 = model.conv1_custom, model.bn1
        else:
            self.weight = model.weight

    def forward(self, x: Tensor) -> Tensor:
        op = getattr(p3d.ops, self.case.op)
        if self.case.op == "stem":
            return op(x, self.conv1_custom.weight, Norm.of(self.bn1), WIRING)
        return op(x, self.weight, self.case.stride)


def ours(case: Case, model: nn.Module, memory: str = "default") -> nn.Module:
    """This package's module with the weights and statistics of the master `model`."""
    state = model.state_dict()
    if case.op in DEPTHS:
        options = {"wiring": WIRING, "in_channels": case.channels[0], "dropout": 0.0, "memory": memory}
        mine = getattr(models, case.op)(case.channels[1], **options)
    elif case.op == "bottleneck":
        mine = p3d_nn.Bottleneck(case.channels[0], case.channels[1], case.kind, WIRING, case.stride)
    elif case.op == "pseudo3d_conv":
        mine = p3d_nn.Pseudo3dConv(*case.channels, case.kind, WIRING)
    else:
        return _Op(case, copy.deepcopy(model))
    mine.load_state_dict(state)
    return mine.to(next(model.parameters()).device)


def frozen_stem(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The stem of the engine of a net that has the stem `model`."""
    weight = model.conv1_custom.weight
    net = models.P3D((1, 1, 1, 1), wiring=WIRING, in_channels=weight.size(1)).to(weight.device).eval()
    net.conv1_custom, net.bn1 = model.conv1_custom, model.bn1
    return p3d.freeze(net, dtype).net.stem


# The rewriting


def _frames(x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N*T, C, H, W], a view of NDHWC."""
    return x.transpose(1, 2).flatten(0, 1)


def _unframe(y: Tensor, n: int) -> Tensor:
    return y.unflatten(0, (n, -1)).transpose(1, 2)


class _Conv2d(nn.Conv2d):
    """A Conv3d of one frame (on frames) or of one column (on [N, C, T, H*W]) as the 2-D convolution it is."""

    @classmethod
    def of(cls, conv: nn.Conv3d) -> _Conv2d:
        (kt, kh, kw), (st, sh, sw), (pt, ph, pw) = conv.kernel_size, conv.stride, conv.padding
        temporal = kt > 1
        geometry = ((kt, 1), (st, 1), (pt, 0)) if temporal else ((kh, kw), (sh, sw), (ph, pw))
        mine = cls(conv.in_channels, conv.out_channels, *geometry, bias=conv.bias is not None)
        mine.temporal = temporal
        mine.weight = nn.Parameter(conv.weight.detach().flatten(3) if temporal else conv.weight.detach().squeeze(2))
        if conv.bias is not None:
            mine.bias = nn.Parameter(conv.bias.detach())
        return mine

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return super().forward(x)
        if self.temporal:
            return super().forward(x.flatten(3)).unflatten(3, x.shape[3:])
        return _unframe(super().forward(_frames(x)), x.size(0))


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else _unframe(super().forward(_frames(x)), x.size(0))


class _MaxPool2d(nn.MaxPool3d):
    """A 3-D max-pool as one over frames and one over time: the maximum of a box is separable."""

    def forward(self, x: Tensor) -> Tensor:
        (kt, *k), (st, *s), (pt, *p) = self.kernel_size, self.stride, self.padding
        if k != [1, 1]:
            x = _unframe(F.max_pool2d(_frames(x), k, s, p, ceil_mode=self.ceil_mode), x.size(0))
        kt = min(kt, x.size(2) + 2 * pt)  # as in `PlainP3D`: a window longer than its axis is cut
        y = F.max_pool2d(x.flatten(3), (kt, 1), (st, 1), (pt, 0), ceil_mode=self.ceil_mode)
        return y.unflatten(3, x.shape[3:])


class _PlainP3D2d(PlainP3D):
    """`PlainP3D` that calls its pools, which are 2-D here."""

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1_custom(x))))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = self.maxpool_2(stage(x))
        y = self.layer4(_frames(x)).mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return y.unflatten(0, (x.size(0), -1)).mean(1)


def views_2d(model: nn.Module) -> nn.Module:
    """`model` in place with every 3-D layer as 2-D layers on views; parameters keep their names."""
    if isinstance(model, nn.Conv3d):
        return _Conv2d.of(model)
    if isinstance(model, nn.BatchNorm3d):
        mine = _BatchNorm2d(model.num_features, model.eps, model.momentum)
        mine.load_state_dict(model.state_dict())
        return mine
    if isinstance(model, nn.MaxPool3d):
        model.__class__ = _MaxPool2d
    if type(model) is PlainP3D:
        model.__class__ = _PlainP3D2d
    for name, child in model.named_children():
        setattr(model, name, views_2d(child))
    return model


_PAIRS = [("conv1_custom", "bn1"), *((f"conv{i}", f"bn{i}") for i in range(1, 5)), ("0", "1")]
_PAIRS += [("conv_normal", "bn_normal"), ("conv_s", "bn_s"), ("conv_t", "bn_t")]


def fold(model: nn.Module) -> nn.Module:
    """`model` (in eval mode) in place with each BN folded into the convolution before it."""
    for module in model.modules():
        for conv, bn in _PAIRS:
            pair = module._modules.get(conv), module._modules.get(bn)
            if isinstance(pair[0], (nn.Conv2d, nn.Conv3d)) and isinstance(pair[1], nn.modules.batchnorm._BatchNorm):
                setattr(module, conv, fuse_conv_bn_eval(*pair))
                setattr(module, bn, nn.Identity())
    return model


def rival(name: str, model: nn.Module, infer: bool, dtype: torch.dtype, single: bool) -> nn.Module:
    """The master `model` rewritten as the rival `name`; `single`: one convolution, in `dtype` without autocast."""
    how = RIVALS[name]
    mine = copy.deepcopy(model).train(not infer)
    if infer:
        mine = fold(mine)
    if how.views_2d:
        device = next(mine.parameters()).device
        mine = views_2d(mine).train(not infer).to(device)
    if infer or single:
        mine = mine.to(dtype)
    mine = arranged(mine, how.channels_last)
    if how.compile:
        torch._dynamo.reset()
        mine = torch.compile(mine, dynamic=False)
    return mine
