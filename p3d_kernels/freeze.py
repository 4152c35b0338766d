"""`freeze`: a P3D net for inference, batch normalisation in the kernels' epilogues, weights packed once."""

from __future__ import annotations

import copy
import functools
import os

import torch
from torch import Tensor, nn

from . import _backends, reference
from ._checks import FLOATS, check_positive
from ._norm import Norm
from .checkpoints import read_file
from .engine import FORMAT, Engine
from .models import P3D
from .models._common import stem_pool_fits
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
    eps = 2.0**-20  # PyTorch on a GPU wants one; 1 - eps and their sum 1 are exact
    return Norm(record[1], record[2], record[0], torch.full_like(record[0], 1 - eps), training=False, eps=eps)


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
        weight = net.conv1_custom.weight.detach().to(dtype)
        self.register_buffer("weight", weight.clone())
        self.register_buffer("record", _record(Norm.of(net.bn1)))
        self.register_buffer("packed", pack_stem_weight(weight, dtype))

    def forward(self, x: Tensor) -> Tensor:
        def reason(backend: str) -> str | None:
            return why_not(x) or why_not_stem(backend, x, self.weight)

        small = not stem_pool_fits(x, self.wiring)  # the pool's window is cut there: nn.MaxPool3d
        if small or _backends.choose("stem", x, reason, ("triton", "aten")) == "aten":
            norm = _norm(self.record, self.dtype)
            z = torch.nn.functional.conv3d(x.to(self.dtype), self.weight, stride=(1, 2, 2), padding=(0, 3, 3))
            return self.maxpool(reference.bn_relu(z, norm))
        return stem_infer(x, self.weight, self.packed, self.record, self.wiring)


def freeze(
    model: nn.Module, dtype: torch.dtype | None = None, *, cuda_graph: bool = False, max_graphs: int = 8
) -> Engine:
    """A copy of `model` for inference: every block from activations to activations, without a pass for BN or ReLU.

    BN of the running statistics is a scale and shift in the epilogue of each convolution, in float32, so weights keep
    their own rounding. Weights are copied and packed once, and again when those of `model` have changed: see `Engine`.

    Args:
        model: a `P3D`, or a net whose blocks `accelerate` has swapped, in eval mode. It stays as it is.
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
    if model.training or any(m.training for m in model.modules() if isinstance(m, Bottleneck)):
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
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError("model: expected a P3D net or one that accelerate() has swapped, got none of their blocks")
    for name, block in blocks:
        why = why_not_fused((n, layer) for n, layer in block._modules.items() if layer is not None)
        if why is not None:
            raise ValueError(f"model: {name} cannot be frozen ({why})")
    net = copy.deepcopy(model).eval().requires_grad_(False)
    for name, _ in blocks:
        parent, _, child = name.rpartition(".")
        holder = net.get_submodule(parent)
        setattr(holder, child, _FrozenBlock(getattr(holder, child), dtype))
    if isinstance(net, P3D):
        net.frozen_stem = _FrozenStem(net, dtype)
        object.__setattr__(net, "_stem", net.frozen_stem)  # shadows the method
        del net.conv1_custom, net.bn1
    return net


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
