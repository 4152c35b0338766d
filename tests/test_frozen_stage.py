"""Blocks in a row, as an engine runs them, against the same blocks in float64 one by one."""

from __future__ import annotations

import copy

import pytest
import torch

import p3d_kernels as p3d
from nets import randomise
from p3d_kernels import _backends
from tolerance import check

# Kinds of the blocks. Thin: only every second row and column of the output is wanted. The last block then works on
# those alone, from S on (A, C) or from S and T on (B), and the one before may store only those.
ROWS = ["A", "B", "AB", "AC", "BCA", "ABC", "CAB", ("2d", "2d")]


def stage(kinds, inputs, channels, wiring, stride):
    blocks = [p3d.nn.Bottleneck(inputs, channels, kinds[0], wiring, stride)]
    blocks += [p3d.nn.Bottleneck(4 * channels, channels, kind, wiring) for kind in kinds[1:]]
    return randomise(torch.nn.Sequential(*blocks)).eval()


def judge(kinds, wiring, thin, stride, shape, channels, dtype, device, inputs=None):
    torch.manual_seed(0)
    inputs = inputs or 2 * channels
    blocks = stage(kinds, inputs, channels, wiring, stride)
    engine = p3d.freeze(blocks.to(device), dtype)
    x = torch.randn(shape[0], inputs, *shape[1:], device=device).to(dtype)
    exact = copy.deepcopy(blocks).double()
    for p in exact.parameters():
        if p.dim() > 1:
            p.data = p.data.to(dtype).double()
    with torch.no_grad(), p3d.use_backend("aten"):
        want = exact(x.double())
    with torch.no_grad():
        got = engine.net(x, thin=thin)
    if thin:
        want = want[..., ::2, ::2]
    assert got.is_contiguous(memory_format=torch.channels_last_3d) or _backends.forced() == "aten"
    check(got, want.contiguous(), dtype, chain=True)


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("kinds", ROWS, ids="".join)
def test_a_row_in_triton(kinds, wiring, thin, device):
    with p3d.use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        judge(kinds, wiring, thin, 2, (1, 3, 9, 12), 16, torch.float16, device)


@pytest.mark.parametrize("backend", ["aten", "triton", "cuda"])
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("kind", ["A", "B", "C"])
def test_a_pseudo3d_conv_alone(kind, wiring, backend, device):
    dtype = torch.float16
    with p3d.use_backend(backend):
        if why := _backends.why_not(backend, torch.empty(1, device=device, dtype=dtype)):
            pytest.skip(why)
        layer = randomise(p3d.nn.Pseudo3dConv(64, 64, kind, wiring)).eval().to(device)
        x = torch.randn(1, 64, 3, 5, 6, device=device).to(dtype)
        got = p3d.freeze(layer, dtype)(x)
        with torch.no_grad(), p3d.use_backend("aten"):
            for conv in (layer.conv_s, layer.conv_t):
                conv.weight.data = conv.weight.data.to(dtype).float()
            want = layer.double()(x.double())
        check(got, want, dtype, chain=True)


def test_a_clip_of_other_channels():
    engine = p3d.freeze(torch.nn.Sequential(p3d.nn.Bottleneck(64, 16)).eval())
    with pytest.raises(ValueError, match="x: expected 64 channels, got 32"):
        engine(torch.zeros(1, 32, 2, 8, 8))
    with pytest.raises(ValueError, match="x: expected 8 channels, got 32"):
        p3d.freeze(p3d.nn.Pseudo3dConv(8, 8).eval())(torch.zeros(1, 32, 2, 8, 8))


def test_a_row_in_plain_pytorch():
    with p3d.use_backend("aten"):
        judge("AB", "author", True, 2, (1, 3, 5, 6), 16, torch.float32, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("kinds", ROWS, ids="".join)
@pytest.mark.parametrize("channels", [64, 128])
def test_a_row_on_the_card(channels, kinds, wiring, thin, dtype, device):
    judge(kinds, wiring, thin, 1, (2, 4, 21, 18), channels, dtype, device)
    judge(kinds, wiring, thin, 2, (1, 1, 13, 13), channels, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("kinds", ROWS, ids="".join)
def test_the_row_of_stage_1_on_the_card(kinds, wiring, thin, dtype, device):
    for stride in (1, 2):  # of 1, the first block's down convolution is part of its tail
        judge(kinds, wiring, thin, stride, (2, 4, 21, 18), 64, dtype, device, inputs=64)
