"""The Hopper kernel for T alone in inference, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import DTYPES, assert_nan_at, assert_replays
from p3d_kernels.ops import _cuda
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

# N, M, T, H, W: odd and tiny sizes, one frame, frames of less than, exactly and more than 64 positions, fewer steps
# than the card has multiprocessors, runs that begin within a clip and runs that hold several.
SHAPES = [
    (1, 64, 1, 1, 1),
    (2, 64, 3, 5, 7),
    (3, 64, 1, 9, 5),
    (1, 64, 5, 13, 10),
    (1, 64, 2, 8, 8),
    (2, 64, 8, 40, 40),
    (17, 64, 8, 40, 40),
    (300, 64, 7, 3, 3),
    (2, 128, 3, 5, 7),
    (1, 128, 1, 9, 13),
    (11, 128, 4, 20, 20),
    (400, 128, 5, 5, 3),
]
# Without a join from 128 channels on there is another kernel, of 64 of them a block: each of its tile sizes, several
# turns, more frames than a tile has rows and rows that do not divide, columns that do not.
BOXES = [
    (1, 128, 1, 1, 1),
    (2, 128, 3, 5, 7),
    (1, 128, 1, 9, 13),
    (32, 128, 4, 20, 20),
    (3, 128, 19, 7, 11),
    (32, 128, 2, 10, 10),
    (33, 128, 5, 10, 9),
    (5, 128, 4, 3, 3),
    (2, 128, 70, 2, 2),
]
# Of kind A; B in the wirings port and author; C likewise: how T is joined, and with what.
JOINS = [("relu", None), ("relu_add", "own"), ("add_relu", "own"), ("relu_add", "x"), ("mean_relu", "x")]


def _activation(shape, dtype):
    return torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last_3d)


def _arguments(shape, dtype, join, source):
    """What `temporal_infer` takes; nobody may read the record's last two rows."""
    m = shape[1]
    x = _activation(shape, dtype)
    o = {"own": _activation(shape, dtype), "x": x, None: None}[source]
    w = torch.randn(m, 3, m, device="cuda", dtype=dtype) / (3 * m) ** 0.5
    rows = [torch.randn(m), 0.5 + torch.rand(m), 0.5 * torch.randn(m), *[torch.full((m,), torch.nan)] * 2]
    return x, o, join, w, torch.stack(rows).cuda()


def _in_float64(x, o, join, w, record):
    mean, scale, bias = (row.double().view(1, -1, 1, 1, 1) for row in record[:3])
    taps = torch.nn.functional.pad(x.double(), (0, 0, 0, 0, 1, 1)).unfold(2, 3, 1)
    u = (torch.einsum("oac,ncthwa->nothw", w.double(), taps) - mean) * scale + bias
    if join == "relu":
        return torch.relu(u)
    o = o.double()
    return {"relu_add": u.relu() + o, "add_relu": (u + o).relu(), "mean_relu": (0.5 * u + 0.5 * o).relu()}[join]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("join", JOINS, ids=lambda j: f"{j[0]}_{j[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_float64(shape, join, dtype):
    arguments = _arguments(shape, dtype, *join)
    y = _cuda.temporal_infer(*arguments)
    check(y, _in_float64(*arguments), dtype)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BOXES, ids=lambda s: "x".join(map(str, s)))
def test_without_a_join_against_float64(shape, dtype):
    arguments = _arguments(shape, dtype, "relu", None)
    y = _cuda.temporal_infer(*arguments)
    check(y, _in_float64(*arguments), dtype)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(y, _cuda.temporal_infer(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [64, 128])
def test_nan_stays_where_it_is(m):
    for join in JOINS:
        arguments = _arguments((2, m, 4, 9, 7), torch.bfloat16, *join)
        arguments[0][0, 1, 0, 2, 3] = torch.nan
        y = _cuda.temporal_infer(*arguments)
        assert torch.equal(y.isnan(), _in_float64(*arguments).isnan())
        assert_nan_at(y, (0, 0, 2, 3), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [64, 128])
def test_runs_are_equal_and_a_graph_replays_them(m):
    for join in JOINS:
        arguments = _arguments((37, m, 4, 21, 13), torch.bfloat16, *join)
        assert_replays(lambda a=arguments: (_cuda.temporal_infer(*a),))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 64) + 2
    arguments = _arguments((clips, 64, 8, 40, 40), torch.bfloat16, "relu", None)
    y = _cuda.temporal_infer(*arguments)
    for part in (slice(0, 1), slice(clips - 1, clips)):
        check(y[part], _in_float64(arguments[0][part], *arguments[1:]), torch.bfloat16)


@pytest.mark.gpu
def test_reasons():
    def why(n=2, m=64, t=8, h=40, dtype=torch.bfloat16):
        return _cuda.temporal_why_not((n, m, t, h, 40), dtype)

    assert why() is None and why(m=128) is None
    assert _cuda.temporal_why_not((2, 128, 4, 10, 10), torch.bfloat16, "relu") is None
    assert "float32" in why(dtype=torch.float32)
    assert "256" in why(m=256)
    assert "H * W" in why(h=2**26) and "2^30" in why(n=2**26)


def test_arguments_are_checked_before_any_launch():
    x = torch.zeros(1, 64, 2, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    good = dict(x=x, o=None, join="relu", w=torch.zeros(64, 3, 64, dtype=x.dtype), record=torch.zeros(3, 64))

    def run(**changes):
        return _cuda.temporal_infer(**{**good, **changes})

    with pytest.raises(ValueError, match="x: expected bfloat16"):
        run(x=x.float())
    with pytest.raises(ValueError, match="x: expected channels_last_3d"):
        run(x=x.contiguous())
    with pytest.raises(ValueError, match="join, o: expected relu without o"):
        run(o=x)
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 64, 2, 4, 4\]"):
        run(o=x[:, :, :1], join="relu_add")
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[64, 3, 64\]"):
        run(w=good["w"][:, :2])
    with pytest.raises(ValueError, match=r"record: expected float32 \[3, 64\]"):
        run(record=torch.zeros(3, 128))
    empty = torch.zeros(0, 64, 2, 4, 4, dtype=x.dtype).to(memory_format=torch.channels_last_3d)
    assert run(x=empty).shape == empty.shape
