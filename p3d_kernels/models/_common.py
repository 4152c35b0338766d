"""What `P3D` and `PlainP3D` share: depths, input conventions, initialisation."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .. import _backends
from .._checks import check_choice
from ..nn import FROZEN, BottleneckRow, MaxPool3d, hooked
from ..ops._triton import why_not
from ..ops.bottleneck import bottlenecks
from ..reference import WIRINGS

DEPTHS = {"p3d63": (3, 4, 6, 3), "p3d131": (3, 4, 23, 3), "p3d199": (3, 8, 36, 3)}  # blocks of stages 1 to 4
MODALITIES = {"rgb": 3, "flow": 2}  # input channels


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What a net reads: (value - mean) / std of 8-bit values, channels in this order, clips of this size in training.

    Args:
        order: channel order, "BGR", "RGB" or "xy" (optical flow).
        mean, std: a channel each, in units of 0..255.
        frames, height, width: of the clips that the published nets were trained on; others work.
    """

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 16
    height: int = 160
    width: int = 160


def stem_pool_fits(x: Tensor, wiring: str) -> bool:
    """Whether no window of the stem's pool is longer than its axis, for clips x."""
    _, _, t, h, w = x.shape
    return t >= 2 and (wiring == "port" or min(h, w) >= 5)


def run_stages(x: Tensor, stages: list[nn.Module], pool: nn.Module) -> Tensor:
    """`stages` in a row, with `pool` after each but the last. What the next stage would not read is not computed.

    A stage that begins with a stride of 2 reads a quarter of the positions. Kernels of ours leave out the other three
    where both stages run as one op each and nothing else sees what lies between them: neither they nor the pool have
    hooks.
    """
    ours = _by_kernels(x)
    rows = [_row_of(stage, pool) if ours else None for stage in stages]
    thinned = False
    for i, (stage, row) in enumerate(zip(stages, rows)):
        after = None if i + 1 == len(stages) or rows[i + 1] is None else stages[i + 1]
        thin = row is not None and after is not None and after[0].stride == 2 and stage[-1].downsample is None
        if thinned:
            arguments, config = row[0]
            row[0] = arguments, config._replace(stride=1)
        x = bottlenecks(x, row, thin) if thin or thinned else stage(x)
        x = pool(x) if i + 1 < len(stages) else x
        thinned = thin
    return x


def _by_kernels(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and _backends.choose("bottleneck", x, lambda _: why_not(x)) != "aten"


def _row_of(stage: nn.Module, pool: nn.Module) -> list | None:
    """The blocks of a stage that may leave positions out for the pool, or be given fewer by it; None if it may not."""
    if type(stage) is not BottleneckRow or type(pool) is not MaxPool3d or hooked(stage) or hooked(pool):
        return None
    in_space = pool.kernel_size[1:], pool.stride[1:], pool.padding[1:]
    return stage.joined() if in_space == ((1, 1), (1, 1), (0, 0)) else None


def _of_unit(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(255 * v for v in values)


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB, in units of 0..1
_SPECS = {
    ("author", "rgb"): InputSpec("BGR", (104.0, 117.0, 123.0), (1.0, 1.0, 1.0)),
    ("author", "flow"): InputSpec("xy", (128.0, 128.0), (1.0, 1.0)),
    ("port", "rgb"): InputSpec("RGB", _of_unit(_MEAN), _of_unit(_STD)),
    ("port", "flow"): InputSpec("xy", _of_unit((0.5,) * 2), _of_unit((sum(_STD) / 3,) * 2)),
}


def input_spec(wiring: str = "author", modality: str = "rgb") -> InputSpec:
    """The input convention that belongs to a wiring ("author", "port") and modality ("rgb", "flow")."""
    check_choice("wiring", wiring, WIRINGS)
    check_choice("modality", modality, tuple(MODALITIES))
    return _SPECS[wiring, modality]


def normalise(frames: Tensor, wiring: str = "author") -> Tensor:
    """Decoded video to network input, after `input_spec(wiring, modality)`; 2 channels are flow, 3 are RGB.

    Args:
        frames: uint8 [N, T, H, W, C] or [T, H, W, C] (then N = 1), C = 3 (RGB) or C = 2 (flow x, y; 128 is none).
        wiring: "author" (BGR, mean 104, 117, 123; flow: mean 128) or "port" (RGB, ImageNet mean and std; flow: 127.5
            and the mean of ImageNet's std).

    Returns:
        float32 [N, C, T, H, W] with channels_last_3d strides, on the device of `frames`.

    Raises:
        TypeError: not a uint8 tensor.
        ValueError: another shape, or an unknown wiring.
    """
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        raise TypeError(f"frames: expected a uint8 Tensor, got {getattr(frames, 'dtype', type(frames).__name__)}")
    if frames.dim() not in (4, 5) or frames.size(-1) not in (2, 3):
        raise ValueError(f"frames: expected shape [N, T, H, W, C] or [T, H, W, C], C 2 or 3, got {tuple(frames.shape)}")
    spec = input_spec(wiring, "flow" if frames.size(-1) == 2 else "rgb")
    clip = frames if frames.dim() == 5 else frames.unsqueeze(0)
    if spec.order == "BGR":
        clip = clip.flip(-1)
    mean, std = (torch.tensor(v, device=frames.device) for v in (spec.mean, spec.std))
    return clip.float().sub_(mean).div_(std).permute(0, 4, 1, 2, 3)


def initialise(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out) (He et al. 2015), BN 1 and 0, fc as PyTorch does.

    For training from nothing; the paper starts from a 2-D ImageNet ResNet (`load_checkpoint` inflates one).
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def frozen_bn(model: nn.Module) -> nn.Module:
    """Freeze every batch normalisation of `model` but the first, in place: the paper's recipe for fine-tuning.

    Frozen ones use their running statistics, `model.train()` or not, and their weight and bias want no gradient (as
    `frozen: true` in the author's graphs). Parameters, names and state dict stay. Convert to SyncBatchNorm, if at all,
    before: the conversion makes every layer an ordinary one again.

    Returns:
        model.

    Raises:
        ValueError: `model` has no BatchNorm2d, BatchNorm3d or SyncBatchNorm.
    """
    norms = [m for m in model.modules() if isinstance(m, tuple(FROZEN))]
    if not norms:
        raise ValueError("model: expected a net with BatchNorm2d, BatchNorm3d or SyncBatchNorm layers, got none")
    for norm in norms[1:]:
        norm.__class__ = FROZEN.get(type(norm), type(norm))
        norm.eval().requires_grad_(False)
    return model
