"""Three blocks of one stage in training, half precision: every gradient as good as plain PyTorch's at the same dtype.

Gradients of a downsample's BN all but cancel, so they show a small coherent error of any block after it.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn

import p3d_kernels as p3d
from p3d_kernels import _backends
from p3d_kernels._judge import season


class Stage(nn.Module):
    def __init__(self, channels: int, wiring: str):
        super().__init__()
        self.bn = nn.BatchNorm3d(channels)
        blocks = [p3d.nn.Bottleneck(channels if k == "A" else 4 * channels, channels, k, wiring) for k in "ABC"]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(4 * channels, 10)

    def forward(self, x):
        x = self.blocks(torch.relu(self.bn(x)))
        return self.fc(x.mean((2, 3, 4), dtype=torch.promote_types(x.dtype, torch.float32)).to(self.fc.weight.dtype))


def gradients(net, x, labels, backend, dtype=None):
    net = copy.deepcopy(net)
    autocast = torch.autocast(x.device.type, dtype) if dtype else contextlib.nullcontext()
    with p3d.use_backend(backend), autocast:
        loss = nn.functional.cross_entropy(net(x).to(x.dtype), labels)
    scale = 1024.0
    (loss * scale).backward()
    return {name: p.grad.double() / scale for name, p in net.named_parameters()}


def check(backend, device, channels, shape, dtype, wiring):
    torch.manual_seed(0)
    x = torch.randn(shape[0], channels, *shape[1:], device=device)
    net = season(Stage(channels, wiring).to(device), x, dtype).train()
    labels = torch.randint(0, 10, (len(x),), device=device)
    reference = gradients(copy.deepcopy(net).double(), x.double(), labels, "aten")
    plain = gradients(net, x, labels, "aten", dtype)
    ours = gradients(net, x, labels, backend, dtype)
    off = {}
    for name, want in reference.items():
        error, allowed = ((g[name] - want).norm() / want.norm() for g in (ours, plain))
        if not error <= 3 * allowed + 0.01:
            off[name] = f"{error:.4f} (plain PyTorch {allowed:.4f})"
    assert not off, off


@pytest.mark.parametrize("wiring", ["author", pytest.param("port", marks=pytest.mark.gpu)])
def test_small(wiring):
    with p3d.use_backend("triton"):
        why = _backends.why_not("triton", torch.empty(1))
    if why:
        pytest.skip(why)
    check("triton", "cpu", 16, (2, 2, 10, 10), torch.float16, wiring)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("backend", ["triton", None])
def test_first_stage(backend, wiring, dtype):
    check(backend, "cuda", 64, (8, 8, 40, 40), dtype, wiring)
