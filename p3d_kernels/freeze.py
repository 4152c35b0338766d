"""`freeze`: a P3D net for inference, batch normalisation in the kernels' epilogues, weights packed once."""

from __future__ import annotations

import copy
import functools
import os

import torch
from torch import Tensor, nn

from . import _backends, reference
from ._checks import FLOATS, check_activation, check_clips, check_positive
from ._norm import Norm
from .checkpoints import read_file
from .engine import FORMAT, Engine
from .models import P3D
from .models._common import normalise, stem_pool_fits
from .nn import Bottleneck, BottleneckRow, MaxPool3d, Pseudo3dConv, hooked, why_not_fused
from .ops._conv import pack_weight
from .ops._fused import SCHEDULES, Config, infer
from .ops._head import global_mean, linear
from .ops._triton import ndhwc, why_not
from .ops.bottleneck import Frozen, chain_shapes, clips_at_once, infer_chain, pooled_frames
from .ops.stem import pack_stem_weight, stem_infer, stem_shapes
from .ops.stem import why_not as why_not_stem


def _record(norm: Norm) -> Tensor:
    """The record [5, C] of a norm in eval mode (see ops/_triton.py): rows mean, scale, bias, invstd, variance."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    invstd = (var + norm.eps).rsqrt()
    scale = invstd if norm.weight is None else invstd * norm.weight.double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    return torch.stack([mean, scale, bias, invstd, var]).float().detach()


def _norm(record: Tensor, dtype: torch.dtype) -> Norm:
    """A Norm that computes (z - mean) * scale + bias on activations of `dtype`."""
    record = record.to(torch.promote_types(dtype, torch.float32))
    eps = 2.0**-20  # PyTorch on a GPU wants one; 1 - eps and their sum 1 are exact
    return Norm(record[1], record[2], record[0], torch.full_like(record[0], 1 - eps), training=False, eps=eps)


class _Packed(nn.Module):
    """A layer of several convolutions in eval mode: packed weights and one record each."""

    def __init__(self, layer: Bottleneck | Pseudo3dConv, dtype: torch.dtype):
        super().__init__()
        arguments = layer.arguments()
        self.config = Config(layer.kind, layer.wiring, getattr(layer, "stride", 1))
        self.dtype = dtype
        pairs = [pair for pair in zip(arguments[::2], arguments[1::2], strict=True) if pair[0] is not None]
        self.count = len(pairs)
        for i, (w, norm) in enumerate(pairs):
            self.register_buffer(f"weight{i}", pack_weight(w, dtype).clone())
            self.register_buffer(f"record{i}", _record(norm))

    def frozen(self) -> Frozen:
        of = range(self.count)
        return Frozen([self._buffers[f"weight{i}"] for i in of], [self._buffers[f"record{i}"] for i in of], self.config)


class _FrozenBlock(_Packed):
    def forward(self, x: Tensor) -> Tensor:
        return _run(x, [self.frozen()], self.dtype)


class _FrozenPseudo3d(_Packed):
    def forward(self, x: Tensor) -> Tensor:
        weights, records, config = self.frozen()
        x = _as_input(x, weights, self.dtype)
        if _backends.choose("pseudo3d_conv", x, lambda _: why_not(x)) != "aten":
            return infer(SCHEDULES["pseudo3d_conv"], ndhwc(x), weights, records, config)
        pairs = _plain(weights, records, self.dtype)
        return reference.pseudo3d_conv(x, *pairs, kind=config.kind, wiring=config.wiring)


_PACKED = {Bottleneck: _FrozenBlock, Pseudo3dConv: _FrozenPseudo3d}


class _FrozenStage(nn.Sequential):
    """Blocks in a row, which pass more to each other than a tensor."""

    def frozen(self) -> list[Frozen]:
        return [block.frozen() for block in self]

    def forward(
        self,
        x: Tensor,
        thin: bool = False,
        thinned: bool = False,
        into: Tensor | None = None,
        frames: int | None = None,
    ) -> Tensor:
        """thin: of the output, only every second row and column is wanted. thinned: so is x, for the first stride.

        into: where the output is to go, or None. frames: to how many the output is pooled (`pooled_frames`), or None.
        """
        blocks = self.frozen()
        if thinned:
            blocks[0] = blocks[0]._replace(config=blocks[0].config._replace(stride=1))
        return _run(x, blocks, self[0].dtype, thin, into, frames)


def _run(
    x: Tensor,
    blocks: list[Frozen],
    dtype: torch.dtype,
    thin: bool = False,
    into: Tensor | None = None,
    frames: int | None = None,
) -> Tensor:
    if x.dim() == 4:  # 2-D blocks inside a net that folds frames into the batch
        return _run(x.unsqueeze(2), blocks, dtype, thin).squeeze(2)
    x = _as_input(x, blocks[0].weights, dtype)
    if _backends.choose("bottleneck", x, lambda _: why_not(x)) != "aten":
        return infer_chain(ndhwc(x), blocks, thin, into, frames)
    for weights, records, config in blocks:
        pairs = _plain(weights, records, dtype)
        if config.kind == "2d":
            pairs[4:4] = None, None
        x = reference.bottleneck(x, *pairs, kind=config.kind, wiring=config.wiring, stride=config.stride)
    x = x[..., ::2, ::2] if thin else x
    if frames not in (None, x.size(2)):
        x = reference.max_pool(x, (2, 1, 1), (2, 1, 1), ceil_mode=2 * frames > x.size(2))
    return x if into is None else into.copy_(x)


def _as_input(x: Tensor, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    check_activation("x", x, weights[0].size(1))
    return x.to(dtype)


def _plain(weights: list[Tensor], records: list[Tensor], dtype: torch.dtype) -> list:
    """(weight, norm) of each convolution, flat, as `reference` takes them."""
    return [a for w, r in zip(weights, records, strict=True) for a in (w, _norm(r, dtype))]


class _FrozenStem(nn.Module):
    """The stem of a `P3D` in eval mode."""

    def __init__(self, net: P3D, dtype: torch.dtype):
        super().__init__()
        self.wiring, self.dtype = net.wiring, dtype
        self.maxpool = net.maxpool
        weight = net.conv1_custom.weight.detach().to(dtype)
        self.register_buffer("weight", weight.clone())
        self.register_buffer("packed", pack_stem_weight(weight, dtype))
        self.register_buffer("record", _record(Norm.of(net.bn1)))
        # of frames as they are decoded: mean, std and weights in the order of their channels
        spec = net.input_spec if weight.size(1) == len(net.input_spec.mean) else None
        step = -1 if spec is not None and spec.order == "BGR" else 1
        self.statistics = None if spec is None else (spec.mean[::step], spec.std[::step])
        weight = weight.flip(1) if step < 0 else weight.clone()
        self.register_buffer("frames_weight", None if spec is None else weight)
        self.register_buffer("frames_packed", None if spec is None else pack_stem_weight(weight, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Of clips, or of uint8 frames as `clips` gives them."""
        if x.dtype == torch.uint8:
            if self._fused(x, self.frames_weight):
                weights = self.frames_weight, self.frames_packed
                return stem_infer(x, *weights, self.record, self.wiring, *self.statistics)
            x = normalise(x.permute(0, 2, 3, 4, 1), self.wiring)
        if self._fused(x, x):
            return stem_infer(x, self.weight, self.packed, self.record, self.wiring)
        norm = _norm(self.record, self.dtype)
        z = torch.nn.functional.conv3d(x.to(self.dtype), self.weight, stride=(1, 2, 2), padding=(0, 3, 3))
        return self.maxpool(reference.bn_relu(z, norm))

    def clips(self, frames: Tensor) -> Tensor:
        """uint8 frames [N, T, H, W, C] or [T, H, W, C], as `normalise` takes them, by the order [N, C, T, H, W]."""
        channels = self.weight.size(1)
        if self.statistics is None:
            raise TypeError(f"x: expected a floating-point dtype of a net with {channels} input channels, got uint8")
        if frames.dim() not in (4, 5) or frames.size(-1) != channels or frames.numel() == 0:
            raise ValueError(
                f"x: expected uint8 frames [N, T, H, W, {channels}] or [T, H, W, {channels}], got {list(frames.shape)}"
            )
        return (frames if frames.dim() == 5 else frames.unsqueeze(0)).permute(0, 4, 1, 2, 3)

    def _fused(self, x: Tensor, like: Tensor) -> bool:
        """Whether kernels of this package take the clips x; like: a tensor of a dtype that backends know."""

        def reason(backend: str) -> str | None:
            return why_not(x) or why_not_stem(backend, x, self.weight)

        fits = stem_pool_fits(x, self.wiring)  # else the pool's window is cut: nn.MaxPool3d
        return fits and _backends.choose("stem", like, reason, ("triton", "aten")) != "aten"


_HEAD = ("triton", "aten")  # the backends of the mean and the classifier


class _FrozenP3D(nn.Module):
    """A `P3D` in eval mode. What the next stage would not read is not computed."""

    takes_frames = True

    def __init__(self, net: P3D, dtype: torch.dtype):
        super().__init__()
        stages = {name: net.get_submodule(name) for name in ("layer1", "layer2", "layer3", "layer4")}
        why = why_not_fused([(name, net.get_submodule(name)) for name in ("conv1_custom", "bn1", "relu")])
        for name, module in {"it": net, **stages}.items():
            why = f"{name} has hooks or a forward of its own" if hooked(module) else why
        if why is not None:
            raise ValueError(f"model: cannot be frozen ({why})")
        self.options = net.options if isinstance(net.fc, nn.Linear) else None
        self.in_channels = net.in_channels
        self.stem = _FrozenStem(net, dtype)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.maxpool_2, self.fc = net.maxpool_2, net.fc

    def features(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = self.stem.clips(x)
        else:
            check_clips("x", x, self.in_channels)
        stages = self.layer1, self.layer2, self.layer3, self.layer4
        thinned = False
        for stage, after in zip(stages, (*stages[1:], None), strict=True):
            thin = after is not None and after[0].config.stride == 2
            if stage is self.layer1:
                x = self._stem_and_first(x, thin)
            else:
                x = stage(x, thin, thinned, frames=None if after is None else self._frames(x.size(2)))
            if after is not None:
                x, thinned = x if self._plain_pool() else self.maxpool_2(x), thin
        if _backends.choose("global_mean", x, lambda _: why_not(x), _HEAD) != "aten":
            return global_mean(ndhwc(x))
        return x.mean((2, 3, 4), dtype=torch.promote_types(x.dtype, torch.float32))

    def _plain_pool(self) -> bool:
        """Whether stages pool what they give themselves, in place of maxpool_2."""
        pool = self.maxpool_2
        geometry = pool.kernel_size, pool.stride, pool.padding
        plain = type(pool) is MaxPool3d and not hooked(pool) and why_not_fused(()) is None
        return plain and geometry == ((2, 1, 1), (2, 1, 1), (0, 0, 0))

    def _frames(self, time: int) -> int | None:
        return pooled_frames(time, self.maxpool_2.ceil_mode) if self._plain_pool() else None

    def _stem_and_first(self, x: Tensor, thin: bool) -> Tensor:
        """layer1(stem(x)). Their tensors are the largest of the net: some clips go through both, then others."""
        dtype, blocks = self.stem.dtype, self.layer1.frozen()
        _, shape = stem_shapes(tuple(x.shape), self.stem.weight.size(0), self.stem.wiring)
        frames = self._frames(shape[2])
        size = clips_at_once(shape, blocks, thin, dtype, frames)
        if not 0 < size < x.size(0):
            x = self.stem(x)
            return self.layer1(x, thin, frames=self._frames(x.size(2)))
        y = torch.empty(
            chain_shapes(shape, blocks, thin, frames)[-1],
            dtype=dtype, device=x.device, memory_format=torch.channels_last_3d,
        )  # fmt: skip
        for part, y_part in zip(x.split(size), y.split(size), strict=True):
            self.layer1(self.stem(part), thin, into=y_part, frames=frames)
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self._plain_classifier() and _backends.choose("linear", x, lambda _: why_not(x), _HEAD) != "aten":
            return linear(x, self.fc.weight, self.fc.bias)
        return self.fc(x.to(next(self.fc.parameters(), x).dtype))

    def _plain_classifier(self) -> bool:
        """Whether `linear` may stand for fc."""
        plain = type(self.fc) is nn.Linear and not hooked(self.fc) and why_not_fused(()) is None
        return plain and self.fc.weight.dtype == torch.float32 and self.fc.weight.is_contiguous()


def freeze(
    model: nn.Module, dtype: torch.dtype | None = None, *, cuda_graph: bool = False, max_graphs: int = 8
) -> Engine:
    """A copy of `model` for inference: every block from activations to activations, without a pass for BN or ReLU.

    BN of the running statistics is a scale and shift in the epilogue of each convolution, in float32, so weights keep
    their own rounding. Weights are copied and packed once, and again when those of `model` have changed: see `Engine`.

    Args:
        model: a `P3D`, a net whose blocks `accelerate` has swapped, or any net with `nn.Bottleneck` or
            `nn.Pseudo3dConv` in it, in eval mode. It stays as it is.
        dtype: of weights and activations: bfloat16, float16 or float32; None: that of the model's first parameter.
            Give the float32 model here, not `model.bfloat16()`: the normalisation then keeps its precision.
        cuda_graph: capture a CUDA graph at the first call of each input shape and replay it from then on: small
            batches no longer wait for the host.
        max_graphs: how many of them are kept, those used last. They share memory for activations.

    Returns:
        An `Engine`: `engine(clips)`, `engine.features(clips)`, `engine.save(path)`.

    Raises:
        TypeError: `model` is no module, or `dtype` no float dtype.
        ValueError: `model` is in training mode, or has no block that can be frozen, or is not on a GPU with
            `cuda_graph`; `max_graphs` is no positive int.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Engine):
        raise ValueError("model: expected a net that is not frozen yet, got an Engine")
    if model.training or any(m.training for m in model.modules() if isinstance(m, tuple(_PACKED))):
        raise ValueError("model: expected eval mode (model.eval()), got training mode")
    check_positive("max_graphs", max_graphs)
    first = next(model.parameters(), None)
    dtype = dtype or getattr(first, "dtype", None)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {FLOATS}, got {dtype}")
    net = _frozen(model, dtype)
    if cuda_graph and not first.is_cuda:
        raise ValueError(f"model: expected a CUDA device for cuda_graph, got {first.device}")
    graphs = max_graphs if cuda_graph else 0
    return Engine(net, dtype, graphs, model, functools.partial(_frozen, dtype=dtype))


@torch.inference_mode(False)  # its tensors would have no versions
def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, tuple(_PACKED))]
    if not blocks:
        raise ValueError("model: expected a P3D net or one that accelerate() has swapped, got none of their blocks")
    for name, block in blocks:
        why = "it has hooks or a forward of its own" if hooked(block) else None
        why = why or why_not_fused((n, layer) for n, layer in block._modules.items() if layer is not None)
        if why is not None:
            raise ValueError(f"model: {name} cannot be frozen ({why})")
    net = copy.deepcopy(model).eval().requires_grad_(False)
    for name, block in blocks:
        packed = next(p for layer, p in _PACKED.items() if isinstance(block, layer))(net.get_submodule(name), dtype)
        if not name:
            return packed.eval()
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, packed)
    for name, row in list(net.named_modules()):
        if type(row) not in (nn.Sequential, BottleneckRow) or hooked(row):
            continue
        if not len(row) or not all(isinstance(m, _FrozenBlock) for m in row):
            continue
        if not name:
            return _FrozenStage(*row).eval()
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, _FrozenStage(*row))
    return _FrozenP3D(net, dtype).eval() if type(net) is P3D else net


def load_engine(
    path: str | os.PathLike, device: torch.device | str = "cpu", *, cuda_graph: bool = False, max_graphs: int = 8
) -> Engine:
    """The engine that `Engine.save` wrote, on `device`. It follows no net; other arguments as in `freeze`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, or holds no engine.
    """
    check_positive("max_graphs", max_graphs)
    device = torch.device(device)
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device for cuda_graph, got {device}")
    data = read_file("path", path)
    if data.get("format") != FORMAT:
        raise ValueError(f"path: expected an engine ({FORMAT!r}) in {str(path)!r}, got {data.get('format')!r}")
    with torch.device("meta"):
        net = _frozen(P3D(**data["net"]).eval(), data["dtype"])
    engine = Engine(net, data["dtype"], max_graphs if cuda_graph else 0)
    engine.load_state_dict({name: tensor.to(device) for name, tensor in data["state"].items()}, assign=True)
    return engine.eval().requires_grad_(False)
