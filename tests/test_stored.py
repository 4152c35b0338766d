"""Blocks that store what their convolutions read, with BN as a pass of its own: against float64, and who does so."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

import p3d_kernels as p3d
from nets import assert_within, distance, randomise
from p3d_kernels import _backends
from p3d_kernels.nn import Bottleneck, BottleneckRow
from p3d_kernels.ops import _apply
from p3d_kernels.ops._fused import Config
from p3d_kernels.ops.bottleneck import bottlenecks

bottleneck = importlib.import_module("p3d_kernels.ops.bottleneck")  # of this name there is a function, too

CASES = [  # kinds, wiring, stride of the first, thin, T, H, W
    ("CA", "author", 2, False, (3, 5, 4)),
    ("BB", "author", 1, True, (1, 3, 4)),
    (("2d", "2d"), "port", 2, True, (2, 5, 4)),
    pytest.param("ABC", "author", 2, True, (2, 7, 6), marks=pytest.mark.gpu),
    pytest.param("CBA", "port", 1, False, (4, 3, 3), marks=pytest.mark.gpu),
]


@pytest.fixture
def kernels(device):
    with p3d.use_backend(None if device.type == "cuda" else "triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        yield


def row(kinds, wiring, stride, channels=16) -> BottleneckRow:
    blocks = [Bottleneck(24, channels, kinds[0], wiring, stride)]
    return randomise(BottleneckRow(*blocks, *(Bottleneck(4 * channels, channels, kind, wiring) for kind in kinds[1:])))


def step(net: BottleneckRow, x: torch.Tensor, thin: bool) -> dict[str, torch.Tensor]:
    """What a step leaves; float64 is plain PyTorch's."""
    net.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    plain = x.dtype == torch.float64
    y = net(x)[..., ::2, ::2] if plain and thin else net(x) if plain else bottlenecks(x, net.joined(), thin)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (y * weights.to(y)).sum().backward()
    named = {name: p.grad for name, p in net.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **named, **{n: b.clone() for n, b in net.named_buffers() if b.dim()}}


def expected(net: BottleneckRow, x: torch.Tensor, thin: bool) -> dict[str, torch.Tensor]:
    with p3d.use_backend("aten"):
        return step(copy.deepcopy(net).double(), x.double(), thin)


@pytest.mark.parametrize("kinds, wiring, stride, thin, size", CASES, ids=str)
def test_a_step_against_float64(kinds, wiring, stride, thin, size, kernels, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    taken = []
    monkeypatch.setattr(bottleneck, "stores", lambda *of: taken.append(of) or True)
    if not thin:  # the second block makes again what the first keeps
        monkeypatch.setattr(bottleneck, "AGAIN", 30_000)
    else:  # several blocks of positions to a program, and statistics finalised by a launch of their own
        monkeypatch.setattr(_apply, "TWICE", 1)
        tile = {"BLOCK_P": 16, "BLOCK_C": 16, "BLOCKS": 2, "num_warps": 1}
        monkeypatch.setattr(_apply, "_tile", lambda *_: tile)
    net, x = row(kinds, wiring, stride).to(device), torch.randn(2, 24, *size, device=device)
    want = expected(net, x, thin)
    for _ in range(2):  # recorded, then replayed
        got = step(copy.deepcopy(net), x, thin)
        assert_within(1e-5, {name: distance(got[name], value) for name, value in want.items()})
    assert taken


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels, size", [(256, (2, 20, 20)), (256, (3, 9, 7)), (512, (1, 10, 10))])
@pytest.mark.parametrize("thin", [False, True])
def test_a_step_in_16_bits(channels, size, dtype, thin, device):
    """No further from float64 than plain PyTorch under autocast."""
    for kinds, wiring in (("ABC", "author"), ("CBA", "port"), (("2d", "2d"), "port")):
        net = row(kinds, wiring, 2, channels).to(device)
        x = torch.randn(4, 24, *size, device=device).to(dtype).to(memory_format=torch.channels_last_3d)
        want = expected(net, x, thin)
        with torch.autocast("cuda", dtype):
            first, again = (step(copy.deepcopy(net), x, thin) for _ in range(2))
            with p3d.use_backend("aten"):
                eager = copy.deepcopy(net)
                eager.zero_grad()
                leaf = x.detach().clone().requires_grad_()
                y = eager(leaf)[..., ::2, ::2] if thin else eager(leaf)
                weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
                (y * weights.to(y)).sum().backward()
        theirs = {"y": y.detach(), "dx": leaf.grad, **{name: p.grad for name, p in eager.named_parameters()}}
        theirs = {name: distance(value, want[name]) for name, value in theirs.items()}
        ours = {name: distance(first[name], want[name]) for name in theirs}
        worse = {name: (value, theirs[name]) for name, value in ours.items() if not value < 1.5 * theirs[name] + 4e-3}
        assert not worse, worse
        assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_who_stores():
    def stores(mid, size, training=True, dtype=torch.bfloat16):
        block = Bottleneck(4 * mid, mid, "A", "author").train(training)
        weights = [p for name, p in block.named_parameters() if p.dim() == 5]
        x = torch.empty(size[0], 4 * mid, *size[1:], dtype=dtype, device="meta")
        norms = [p3d.Norm.of(m) for m in block.modules() if isinstance(m, torch.nn.BatchNorm3d)]
        return bottleneck.stores(x, weights, norms, Config("A", "author"))

    assert stores(256, (32, 2, 10, 10)) and stores(512, (32, 1, 5, 5))
    assert not stores(128, (1, 1, 4, 4))  # one tile of output channels
    assert not stores(256, (32, 2, 10, 10), training=False)  # no statistics to make
    assert stores(256, (81, 2, 10, 10)) and not stores(256, (82, 2, 10, 10))  # 32 MiB
    assert not stores(256, (41, 2, 10, 10), dtype=torch.float32)
