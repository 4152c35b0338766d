"""Convolutions in inference whose sums several programs share: as good as one program's, and equal bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import p3d_kernels as p3d
from p3d_kernels import _backends
from p3d_kernels.ops import _conv, _tape
from p3d_kernels.ops._conv import Epilogue, Geometry, conv, pack_weight, pointwise, spatial, temporal
from p3d_kernels.ops._tape import Tape
from p3d_kernels.ops._triton import Operand
from tolerance import check

JOINS = {
    "none": lambda u, o: u,
    "relu": lambda u, o: u.relu(),
    "add_relu": lambda u, o: (u + o).relu(),
    "relu_add": lambda u, o: u.relu() + o,
    "mean_relu": lambda u, o: (u / 2 + o / 2).relu(),
}
# Geometry, join, input shape, output channels, splits; steps of the sum: taps x chunks of 16 input channels.
CASES = [
    (pointwise(), "relu", (2, 64, 1, 5, 5), 32, 4),
    (pointwise(2), "none", (1, 40, 3, 5, 7), 20, 2),  # 3 steps
    (pointwise(), "add_relu", (3, 33, 2, 3, 5), 70, 3),
    (spatial(), "relu", (1, 20, 2, 7, 5), 36, 5),  # 18 steps: the last share is smaller
    (spatial(2), "relu", (2, 16, 1, 9, 9), 16, 9),
    (temporal(), "mean_relu", (1, 16, 4, 6, 3), 16, 3),
    (Geometry((3, 1, 1), (1, 2)), "relu_add", (2, 48, 3, 5, 5), 48, 3),
]
DTYPES = (torch.float16, torch.float32, torch.bfloat16) if torch.cuda.is_available() else (torch.float16, torch.float32)


@pytest.fixture
def split(monkeypatch, device):
    """force(splits): of every convolution in inference from now on, with small tiles."""
    with p3d.use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

        def force(splits: int) -> None:
            def tile(positions, ci, co, taps, *_):
                shape = {"BLOCK_P": 32, "BLOCK_CO": 32, "BLOCK_CI": 16, "num_warps": 4, "num_stages": 3}
                return shape, _conv.even(taps * -(-ci // 16), splits)

            monkeypatch.setattr(_tape, "_plans", {})
            monkeypatch.setattr(_tape, "_tapes", {})
            monkeypatch.setattr(_conv, "_infer_tile", tile)

        yield force


def problem(geometry, join, shape, co, dtype, device):
    """(operand, weight, epilogue) and the result in float64."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    fan_in = shape[1] * geometry.taps[0] * geometry.taps[1] * geometry.taps[2]
    w = (torch.randn(co, shape[1], *geometry.taps) / fan_in**0.5).to(dtype)
    record = torch.rand(5, co) + 0.5
    (st, sh), padding = geometry.stride, [k // 2 for k in geometry.taps]
    z = F.conv3d(x.double(), w.double(), stride=(st, sh, sh), padding=padding)
    mean, scale, bias = (row.double().view(-1, 1, 1, 1) for row in record[:3])
    o = torch.randn(z.shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    want = JOINS[join]((z - mean) * scale + bias, o.double())
    o = None if join in ("none", "relu") else o.to(device)
    epilogue = Epilogue(record=record.to(device), join=join, o=o)
    return Operand("raw", x.to(device)), pack_weight(w.to(device), dtype), epilogue, want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("geometry", "join", "shape", "co", "splits"), CASES)
def test_shared_sums(split, geometry, join, shape, co, splits, dtype, device):
    x, w, epilogue, want = problem(geometry, join, shape, co, dtype, device)
    split(splits)
    y, _ = conv(x, w, geometry, epilogue)
    plans = [plan for plan in _tape._plans.values() if plan.kernel is _conv.conv_kernel]
    assert [plan.grid[1] for plan in plans] == [splits]
    check(y, want, dtype)
    for _ in range(3):
        assert torch.equal(conv(x, w, geometry, epilogue)[0], y)


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 72])
def test_no_share_is_empty(steps):
    for wanted in range(1, steps + 1):
        splits = _conv.even(steps, wanted)
        share = -(-steps // splits)
        assert splits <= wanted and (splits - 1) * share < steps <= splits * share


def test_a_pass_zeroes_its_counters_once(split, device):
    """And its launches leave them zero: the second finds what the first left."""
    split(4)
    x, w, epilogue, _ = problem(pointwise(), "relu", (2, 64, 1, 5, 5), 64, torch.float32, device)

    def pass_():
        z, _ = conv(x, w, pointwise(), epilogue)
        return [conv(Operand("raw", z), w, pointwise(), epilogue)[0]], []

    want = pass_()[0][0]
    tape = Tape(pass_, [x.a, w, epilogue.record])
    assert [plan.kernel for plan, _ in tape.steps] == [_conv.zero_kernel, _conv.conv_kernel, _conv.conv_kernel]
    for got in (tape.first[0][0], *(tape.run([x.a, w, epilogue.record])[0][0] for _ in range(3))):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_frozen_stage(split, dtype, device):
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*(p3d.nn.Bottleneck(c, 16, kind) for c, kind in ((32, "A"), (64, "B"), (64, "C"))))
    engine = p3d.freeze(blocks.eval().to(device), dtype)
    x = torch.randn(1, 32, 2, 5, 5, device=device).to(dtype)
    with torch.no_grad():
        split(1)
        want = engine.net(x)
        split(3)
        got = engine.net(x)
        check(got, want.double(), dtype, chain=True)
        assert torch.equal(engine.net(x), got)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_of_one_net_at_the_same_time(batch, device):
    """Runs on several streams, one of them captured, share no counter."""
    net = p3d.p3d63(num_classes=7).eval().to(device)
    engine = p3d.freeze(net, torch.bfloat16)
    x = torch.randn(batch, 3, 16, 112, 112, device=device)
    with torch.inference_mode(), p3d.use_backend("triton"):
        want = engine(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = engine(x)
        streams = [torch.cuda.Stream() for _ in range(3)]
        results = []
        torch.cuda.synchronize()
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(engine(x))
            graph.replay()
            results.append(captured.clone())
        torch.cuda.synchronize()
    for got in results:
        assert torch.equal(got, want)
