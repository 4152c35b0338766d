"""Blocks in a row, as an engine runs them, against the same blocks in float64 one by one."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch

import p3d_kernels as p3d
from nets import randomise
from operands import max_of_pairs
from p3d_kernels import _backends
from p3d_kernels.ops import _tape
from tolerance import check

bottleneck = importlib.import_module("p3d_kernels.ops.bottleneck")  # ops.bottleneck is the op

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


def in_parts(monkeypatch, run, most):
    """(run(), the largest workspace of its tapes), the outputs of blocks up to `most` bytes."""
    monkeypatch.setattr(_tape, "_tapes", {})
    monkeypatch.setattr(bottleneck, "WIDEST", most)
    run()
    y = run()  # the tapes' own
    return y, max((tape.size for tape in _tape._tapes.values()), default=0), len(_tape._tapes)


def clip_bytes(channels, *dims):
    return 4 * channels * math.prod(dims) * 2  # of a block's output, 16-bit


@pytest.mark.parametrize("kinds", ["AB", "BCA"])
@pytest.mark.parametrize("clips, at_once, shapes, thin", [(4, 2, 1, True), (5, 2, 2, False), (33, 12, 1, False)])
def test_parts_of_a_batch_give_the_same_bits(monkeypatch, clips, at_once, shapes, thin, kinds, device):
    sizes = (2, 5, 6) if clips < 10 else (1, 2, 2)
    blocks = p3d.freeze(stage(kinds, 32, 16, "author", 1).to(device), torch.float16).net
    for name, buffer in blocks.named_buffers():  # whose sums are exact in any order: tiles may differ
        if "weight" in name:
            buffer.copy_((torch.randn(buffer.shape) / buffer[0].numel() ** 0.5).round().clamp(-1, 1))
        else:
            buffer.copy_(torch.tensor([0.0, 0.5, 1.0, 0.0, 0.0]).view(5, 1))
    x = torch.randint(-4, 5, (clips, 32, *sizes), device=device).half()
    with p3d.use_backend("triton"), torch.no_grad():
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        whole, all_of_it, one = in_parts(monkeypatch, lambda: blocks(x, thin=thin), 1 << 40)
        parts, some_of_it, kept = in_parts(monkeypatch, lambda: blocks(x, thin=thin), at_once * clip_bytes(16, *sizes))
    assert torch.equal(whole, parts) and (one, kept) == (1, shapes)
    assert parts.is_contiguous(memory_format=torch.channels_last_3d)
    assert some_of_it < 0.8 * all_of_it


@pytest.mark.gpu
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("kinds", ["ABC", "CAB"])
def test_parts_of_a_batch_give_the_same_bits_on_the_card(monkeypatch, kinds, thin, device):
    blocks = p3d.freeze(stage(kinds, 64, 64, "author", 1).to(device), torch.bfloat16).net
    x = torch.randn(13, 64, 8, 40, 40, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        whole, *_ = in_parts(monkeypatch, lambda: blocks(x, thin=thin), 1 << 40)
        parts, *_ = in_parts(monkeypatch, lambda: blocks(x, thin=thin), 7 * clip_bytes(64, 8, 40, 40))
    assert torch.equal(whole, parts)


def pooled_outside(blocks, x, thin, frames):
    return max_of_pairs(blocks(x, thin=thin), frames)


@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("clips, at_once", [(1, 1), (3, 2)])
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("time, frames", [(1, 1), (3, 1), (3, 2), (4, 2)])
def test_a_pooled_row(monkeypatch, time, frames, thin, clips, at_once, backend, device):
    blocks = p3d.freeze(stage("AB", 32, 16, "author", 1).to(device), torch.float16).net
    x = torch.randn(clips, 32, time, 5, 6, device=device).half()
    with p3d.use_backend(backend), torch.no_grad():
        if why := _backends.why_not(backend, x):
            pytest.skip(why)
        monkeypatch.setattr(bottleneck, "WIDEST", at_once * clip_bytes(16, time, 5, 6))
        want = pooled_outside(blocks, x, thin, frames)
        got = blocks(x, thin=thin, frames=frames)
        into = torch.empty_like(got)
        again = blocks(x, thin=thin, into=into, frames=frames)
    assert torch.equal(got, want) and again is into and torch.equal(into, want)


@pytest.mark.gpu
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("kinds", ["A", "AB", "ABC", ("2d", "2d")], ids="".join)
@pytest.mark.parametrize("channels", [64, 128, 256])
def test_a_pooled_row_on_the_card(channels, kinds, wiring, thin, device):
    for clips, time, size in [(1, 4, 10), (3, 5, 13), (32, 2, 10), (5, 3, 40)]:
        blocks = p3d.freeze(stage(kinds, 4 * channels, channels, wiring, 1).to(device), torch.bfloat16).net
        x = torch.randn(clips, 4 * channels, time, size, size + 1, device=device).bfloat16()
        for frames in {time // 2, (time + 1) // 2}:
            with torch.no_grad():
                assert torch.equal(blocks(x, thin=thin, frames=frames), pooled_outside(blocks, x, thin, frames))


def test_how_a_batch_is_cut():
    def at_once(clips, channels=64, time=8, size=40, dtype=torch.bfloat16):
        blocks = p3d.freeze(stage("ABC", channels, channels, "author", 1), dtype).net.frozen()
        return bottleneck.clips_at_once((clips, channels, time, size, size), blocks, True, dtype)

    assert at_once(32) == 16 and at_once(16) == 16 and at_once(8, size=56) == 8
    assert at_once(33) == 11 and at_once(35) == 12 and at_once(1, size=2000) == 1 and at_once(0) == 0
    assert at_once(32, dtype=torch.float32) == 8
    assert at_once(1000, 1, 1, 200) == 250 and at_once(1000, 1, 1, 201) == 1000  # else the parts were not aligned


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("wiring", ["author", "port"])
def test_the_stem_and_the_first_stage_go_together(monkeypatch, wiring, frames, device):
    net = randomise(p3d.models.P3D((2, 1, 1, 1), 10, wiring=wiring)).eval().to(device)
    engine = p3d.freeze(net)
    if frames:
        x = torch.randint(0, 256, (5, 4, 32, 40, 3), dtype=torch.uint8, device=device)
    else:
        x = torch.randn(5, 3, 4, 32, 40, device=device)
    whole, *_ = in_parts(monkeypatch, lambda: engine(x), 1 << 40)
    seen = []
    engine.net.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    parts, *_ = in_parts(monkeypatch, lambda: engine(x), 2 * 2 * clip_bytes(64, 2, 8, 10))
    assert seen == 2 * [2, 2, 1]
    assert (parts - whole).norm() <= 1e-5 * whole.norm()


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
