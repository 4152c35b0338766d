"""P3D ResNet in torch.nn layers alone: what the fused net is judged and timed against.

Written from the description of the nets (paper, released graphs, port), independently of `reference.py` and the ops.
Same attribute names, so that one state dict fits both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._common import DEPTHS, MODALITIES, initialise


class PlainBottleneck(nn.Module):
    """A P3D bottleneck of `kind` "A", "B" or "C"; with "full", one 3x3x3 convolution in place of S and T."""

    def __init__(self, in_channels: int, channels: int, kind: str, wiring: str, stride: int):
        super().__init__()
        self.kind, self.wiring = kind, wiring
        self.downsample = None
        if stride != 1 or in_channels != 4 * channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, 4 * channels, 1, stride=(1, stride, stride), bias=False),
                nn.BatchNorm3d(4 * channels),
            )
        self.conv1 = nn.Conv3d(in_channels, channels, 1, stride=(1, stride, stride), bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        if kind == "full":
            self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm3d(channels)
        else:
            self.conv2 = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), bias=False)
            self.bn2 = nn.BatchNorm3d(channels)
            self.conv3 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
            self.bn3 = nn.BatchNorm3d(channels)
        self.conv4 = nn.Conv3d(channels, 4 * channels, 1, bias=False)
        self.bn4 = nn.BatchNorm3d(4 * channels)
        self.relu = nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        spatial = self.relu(self.bn2(self.conv2(x)))
        if self.kind == "full":
            return spatial
        temporal = self.bn3(self.conv3(x if self.kind == "B" else spatial))
        if self.kind == "A":
            return self.relu(temporal)
        if self.wiring == "port":
            return spatial + self.relu(temporal)
        if self.kind == "B":
            return self.relu(spatial + temporal)
        return self.relu(0.5 * spatial + 0.5 * temporal)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn4(self.conv4(self.middle(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainBottleneck2d(nn.Module):
    """A 2-D ResNet bottleneck, x [N, C, H, W]."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.downsample = None
        if stride != 1 or in_channels != 4 * channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, 4 * channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(4 * channels),
            )
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv_normal = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn_normal = nn.BatchNorm2d(channels)
        self.conv4 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn_normal(self.conv_normal(out)))
        out = self.bn4(self.conv4(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def _pool(pool: nn.MaxPool3d, x: Tensor) -> Tensor:
    """`pool`, its window cut to the axes that are shorter than it."""
    sides = zip(pool.kernel_size, x.shape[2:], pool.padding, strict=True)
    kernel = tuple(min(window, size + 2 * padding) for window, size, padding in sides)
    if kernel == pool.kernel_size:
        return pool(x)
    return F.max_pool3d(x, kernel, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


class PlainP3D(nn.Module):
    """P3D ResNet, x [N, C, T, H, W] to logits [N, num_classes]. Arguments as in `P3D`.

    Args:
        conv3d_full: one 3x3x3 convolution, BN and ReLU in place of each pair S and T: the net that P3D factorises.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int] = DEPTHS["p3d63"],
        num_classes: int = 400,
        *,
        wiring: str = "author",
        modality: str = "rgb",
        dropout: float = 0.5,
        conv3d_full: bool = False,
    ):
        super().__init__()
        in_channels = MODALITIES[modality]
        self.conv1_custom = nn.Conv3d(in_channels, 64, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.relu = nn.ReLU(inplace=True)
        if wiring == "author":  # Caffe's pools: no padding, the last window may stick out
            self.maxpool = nn.MaxPool3d((2, 3, 3), stride=(2, 2, 2), padding=(0, 0, 0), ceil_mode=True)
        elif wiring == "port":
            self.maxpool = nn.MaxPool3d((2, 3, 3), stride=(2, 2, 2), padding=(0, 1, 1))
        else:
            raise ValueError(f"wiring: expected 'author' or 'port', got {wiring!r}")
        self.maxpool_2 = nn.MaxPool3d((2, 1, 1), (2, 1, 1), (0, 0, 0), ceil_mode=wiring == "author")

        kinds = ["full"] if conv3d_full else ["A", "B", "C"]
        count, in_channels, stages = 0, 64, []
        for stage, depth in enumerate(depths[:3]):
            blocks = []
            for i in range(depth):
                channels, stride = 64 * 2**stage, 2 if stage > 0 and i == 0 else 1
                blocks.append(PlainBottleneck(in_channels, channels, kinds[count % len(kinds)], wiring, stride))
                count, in_channels = count + 1, 4 * channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.layer4 = nn.Sequential(
            *[PlainBottleneck2d(in_channels if i == 0 else 2048, 512, 2 if i == 0 else 1) for i in range(depths[3])]
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        x = _pool(self.maxpool, self.relu(self.bn1(self.conv1_custom(x))))
        x = _pool(self.maxpool_2, self.layer1(x))
        x = _pool(self.maxpool_2, self.layer2(x))
        x = _pool(self.maxpool_2, self.layer3(x))
        n, _, t, _, _ = x.shape
        x = self.layer4(x.transpose(1, 2).flatten(0, 1))  # [N T, 2048, H, W]: every frame for itself
        x = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return x.unflatten(0, (n, t)).mean(1)

    def classify(self, features: Tensor) -> Tensor:
        return self.fc(self.dropout(features.to(next(self.fc.parameters(), features).dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))
