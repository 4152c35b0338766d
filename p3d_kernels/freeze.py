"""`freeze`: a P3D net for inference, batch normalisation in the kernels' epilogues, weights packed once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import _backends, reference
from ._checks import FLOATS
from ._norm import Norm
from .models import P3D
from .nn import Bottleneck, why_not_fused
from .ops._conv import pack_weight
from .ops._fused import SCHEDULES, Config, infer
from .ops._triton import ndhwc, why_not
from .ops.stem import pack_stem_weight, stem_infer
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
    return Norm(record[1], record[2], record[0], torch.ones_like(record[0]), training=False, eps=0.0)


class _FrozenBlock(nn.Module):
    """A `Bottleneck` in eval mode: packed weights and one record a convolution."""

    def __init__(self, block: Bottleneck, dtype: torch.dtype):
        super().__init__()
        arguments = block.arguments()
        self.config = Config(block.kind, block.wiring, block.stride)
        self.present = [w is not None for w in arguments[::2]]
        self.dtype = dtype
        for i, (w, norm) in enumerate(p for p in zip(arguments[::2], arguments[1::2], strict=True) if p[0] is not None):
            self.register_buffer(f"weight{i}", pack_weight(w, dtype).clone())
            self.register_buffer(f"record{i}", _record(norm))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:  # a 2-D block inside a net that folds frames into the batch
            return self.forward(x.unsqueeze(2)).squeeze(2)
        x, count = x.to(self.dtype), sum(self.present)
        weights = [self._buffers[f"weight{i}"] for i in range(count)]
        records = [self._buffers[f"record{i}"] for i in range(count)]
        if _backends.choose("bottleneck", x, lambda _: why_not(x)) != "aten":
            return infer(SCHEDULES["bottleneck"], ndhwc(x), weights, records, self.config)
        pairs = ((w, _norm(r, self.dtype)) for w, r in zip(weights, records, strict=True))
        arguments = [a for present in self.present for a in (next(pairs) if present else (None, None))]
        config = self.config
        return reference.bottleneck(x, *arguments, kind=config.kind, wiring=config.wiring, stride=config.stride)


class _FrozenStem(nn.Module):
    """The stem of a `P3D` in eval mode."""

    def __init__(self, net: P3D, dtype: torch.dtype):
        super().__init__()
        self.wiring, self.dtype = net.wiring, dtype
        self.maxpool = net.maxpool
        self.register_buffer("weight", net.conv1_custom.weight.detach().to(dtype).clone())
        self.register_buffer("record", _record(Norm.of(net.bn1)))
        self._packed: dict[torch.device, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        def reason(backend: str) -> str | None:
            return why_not(x) or why_not_stem(backend, x, self.weight)

        small = min(x.shape[2:]) < 5  # the pool's window is cut there: nn.MaxPool3d
        if small or _backends.choose("stem", x, reason, ("triton", "aten")) == "aten":
            norm = _norm(self.record, self.dtype)
            z = torch.nn.functional.conv3d(x.to(self.dtype), self.weight, stride=(1, 2, 2), padding=(0, 3, 3))
            return self.maxpool(reference.bn_relu(z, norm))
        if x.device not in self._packed:
            self._packed[x.device] = pack_stem_weight(self.weight, self.dtype)
        return stem_infer(x, self._packed[x.device], self.record, self.wiring)


class Engine(nn.Module):
    """A frozen net: clips x [N, C, T, H, W] of any float dtype to what the net returns. Made by `freeze`."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def train(self, mode: bool = True) -> Engine:
        if mode:
            raise RuntimeError("a frozen net is for inference only; train the net it was made from and freeze it again")
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """`P3D.features` of the frozen net: [N, 2048], float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.net.features(x)


def freeze(model: nn.Module, dtype: torch.dtype | None = None) -> Engine:
    """A copy of `model` for inference: every block from activations to activations, without a pass for BN or ReLU.

    BN of the running statistics is a scale and shift in the epilogue of each convolution, in float32, so weights keep
    their own rounding. Weights are copied and packed once: later changes of `model` do not reach the engine. Freeze
    again after training.

    Args:
        model: a `P3D`, or a net whose blocks `accelerate` has swapped, in eval mode. It stays as it is.
        dtype: of weights and activations: bfloat16, float16 or float32; None: that of the model's first parameter.
            Give the float32 model here, not `model.bfloat16()`: the normalisation then keeps its precision.

    Returns:
        An `Engine`, a module without parameters: `engine(clips)`, `engine.features(clips)`.

    Raises:
        TypeError: `model` is no module, or `dtype` no float dtype.
        ValueError: `model` is in training mode, or has no block that can be frozen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Engine):
        raise ValueError("model: expected a net that is not frozen yet, got an Engine")
    if model.training or any(m.training for m in model.modules() if isinstance(m, Bottleneck)):
        raise ValueError("model: expected eval mode (model.eval()), got training mode")
    dtype = dtype or next(model.parameters()).dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {FLOATS}, got {dtype}")
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError("model: expected a P3D net or one that accelerate() has swapped, got none of their blocks")
    for name, block in blocks:
        why = why_not_fused((n, layer) for n, layer in block._modules.items() if layer is not None)
        if why is not None:
            raise ValueError(f"model: {name} cannot be frozen ({why})")
    net = copy.deepcopy(model).requires_grad_(False)
    for name, _ in blocks:
        parent, _, child = name.rpartition(".")
        holder = net.get_submodule(parent)
        setattr(holder, child, _FrozenBlock(getattr(holder, child), dtype))
    if isinstance(net, P3D):
        net.frozen_stem = _FrozenStem(net, dtype)
        object.__setattr__(net, "_stem", net.frozen_stem)  # shadows the method
        del net.conv1_custom, net.bn1
    return Engine(net.eval(), dtype)
