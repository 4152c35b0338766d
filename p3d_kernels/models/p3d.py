"""P3D ResNet (Qiu, Yao, Mei, ICCV 2017) on fused blocks, in both wirings that carry the name."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_choice, check_clips, check_positive
from .._norm import Norm, together
from ..nn import (
    Bottleneck,
    BottleneckRow,
    MaxPool3d,
    MemoryOfBlocks,
    explain_unfused,
    hooked,
    remember_norms,
    why_not_fused,
)
from ..ops._head import linear_of_few, mean_over_positions
from ..reference import WIRINGS
from ._common import DEPTHS, MODALITIES, InputSpec, initialise, input_spec, run_stages, stem_pool_fits


class P3D(MemoryOfBlocks, nn.Module):
    """P3D ResNet: clips x [N, C, T, H, W] to logits [N, num_classes]; any T, H and W.

    Stem (1x7x7 convolution of stride (1, 2, 2), BN, ReLU, (2, 3, 3) max-pool of stride 2), three stages of P3D
    bottlenecks whose kinds cycle A, B, C down the net, each followed by a (2, 1, 1) max-pool, a stage of 2-D
    bottlenecks on every frame, a mean over what is left, dropout, fc. Parameter names are those of the PyTorch port.

    The two wirings differ in blocks B and C (`nn.Pseudo3dConv`), in the padding of the pools (author: none, sizes
    rounded up; port: the first padded (0, 1, 1), sizes rounded down) and in what they read (`input_spec`). Weights of
    one predict nonsense in the other. A pool window longer than its axis is cut to it, so one frame is enough.

    Args:
        depths: blocks of stages 1 to 4.
        num_classes: outputs of fc.
        wiring: "author" (the released Caffe graphs) or "port" (the PyTorch port).
        modality: "rgb" (3 channels) or "flow" (2 channels).
        in_channels: input channels, where they are not those of the modality.
        dropout: before fc; 0.9 in the paper's fine-tuning.
        memory: of all blocks (`nn.Bottleneck`): "less" trades a little time of a training step for memory. An attribute
            of the net, and of its stages `layer1` to `layer4`, that may be set later.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        num_classes: int = 400,
        *,
        wiring: str = "author",
        modality: str = "rgb",
        in_channels: int | None = None,
        dropout: float = 0.5,
        memory: str = "default",
    ):
        super().__init__()
        check_choice("wiring", wiring, WIRINGS)
        check_choice("modality", modality, tuple(MODALITIES))
        check_positive("num_classes", num_classes)
        if in_channels is not None:
            check_positive("in_channels", in_channels)
        if len(depths) != 4:
            raise ValueError(f"depths: expected the blocks of 4 stages, got {depths!r}")
        self.depths, self.wiring, self.modality = tuple(depths), wiring, modality
        self.in_channels = in_channels or MODALITIES[modality]

        self.conv1_custom = nn.Conv3d(self.in_channels, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.relu = nn.ReLU()
        author = wiring == "author"
        self.maxpool = MaxPool3d((2, 3, 3), 2, 0 if author else (0, 1, 1), ceil_mode=author)
        self.maxpool_2 = MaxPool3d((2, 1, 1), (2, 1, 1), ceil_mode=author)
        block, channels = 0, 64
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                kind = "2d" if stage == 3 else "ABC"[block % 3]
                stride = 2 if stage and i == 0 else 1
                blocks.append(Bottleneck(channels, 64 << stage, kind, wiring, stride, memory))
                block, channels = block + 1, 4 * (64 << stage)
            self.add_module(f"layer{stage + 1}", BottleneckRow(*blocks))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    @property
    def options(self) -> dict:
        """The arguments that make a net of these shapes."""
        return {
            "depths": self.depths,
            "num_classes": self.fc.out_features,
            "wiring": self.wiring,
            "modality": self.modality,
            "in_channels": self.in_channels,
        }

    @property
    def input_spec(self) -> InputSpec:
        """Channel order, mean and std of what the published net of this wiring reads; `models.normalise` applies it."""
        return input_spec(self.wiring, self.modality)

    def features(self, x: Tensor) -> Tensor:
        """pool5: clips [N, C, T, H, W] to the mean of the last stage [N, 2048], float32 (float64 of a float64 net)."""
        check_clips("x", x, self.in_channels)
        with _statistics_together():
            stages = [self.layer1, self.layer2, self.layer3, self.layer4]
            return mean_over_positions(run_stages(self._stem(x), stages, self.maxpool_2))

    def classify(self, features: Tensor) -> Tensor:
        """Features [N, 2048] to logits [N, num_classes]."""
        features = self.dropout(features.to(next(self.fc.parameters(), features).dtype))
        if type(self.fc) is nn.Linear and not hooked(self.fc):
            return linear_of_few(features, self.fc.weight, self.fc.bias)
        return self.fc(features)

    def forward(self, x: Tensor) -> Tensor:
        with _statistics_together():
            return self.classify(self.features(x))

    def _stem(self, x: Tensor) -> Tensor:
        why = why_not_fused((("conv1_custom", self.conv1_custom), ("bn1", self.bn1), ("relu", self.relu)))
        if why is None and stem_pool_fits(x, self.wiring):
            return ops.stem(x, self.conv1_custom.weight, Norm.of(self.bn1), self.wiring)
        explain_unfused("the stem", why or f"the pool's window is longer than an axis of {tuple(x.shape)}", x)
        remember_norms(self.bn1)
        return self.maxpool(self.relu(self.bn1(self.conv1_custom(x))))

    def extra_repr(self) -> str:
        return f"wiring={self.wiring}, modality={self.modality}"


def _statistics_together():
    """`_norm.together`, but for tracing, which turns what moves into outputs of its own."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else together()


def p3d63(num_classes: int = 400, **options) -> P3D:
    """P3D-63, on the 50-layer ResNet: blocks 3, 4, 6, 3; 25.75 M parameters at 400 classes. Options of `P3D`."""
    return P3D(DEPTHS["p3d63"], num_classes, **options)


def p3d131(num_classes: int = 400, **options) -> P3D:
    """P3D-131, on the 101-layer ResNet: blocks 3, 4, 23, 3; 48.09 M parameters at 400 classes. Options of `P3D`."""
    return P3D(DEPTHS["p3d131"], num_classes, **options)


def p3d199(num_classes: int = 400, **options) -> P3D:
    """P3D-199, on the 152-layer ResNet: blocks 3, 8, 36, 3; 66.49 M parameters at 400 classes. Options of `P3D`."""
    return P3D(DEPTHS["p3d199"], num_classes, **options)
