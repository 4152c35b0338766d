"""The Hopper kernel for T, expand and the next reduce, with or without the down convolution, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import max_of_pairs
from p3d_kernels.ops import _cuda
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

DTYPES = (torch.bfloat16, torch.float16)
# N, M, T, H, W: odd and tiny sizes, one frame, units of 64 positions that end within a clip or hold several frames,
# an odd number of units, more units than the card runs at once.
SHAPES = [
    (1, 64, 1, 1, 1),
    (2, 64, 3, 5, 7),
    (3, 64, 1, 9, 5),
    (1, 64, 5, 13, 10),
    (1, 64, 2, 8, 8),
    (2, 64, 8, 40, 40),
    (2, 128, 3, 5, 7),
    (1, 128, 1, 9, 13),
    (11, 128, 4, 20, 20),
]
DOWN_SHAPES = [shape for shape in SHAPES if shape[1] == 64]
# Of kind A; B in the wirings port and author; C likewise: how T is joined, and with what.
JOINS = [("relu", None), ("relu_add", "own"), ("add_relu", "own"), ("relu_add", "x"), ("mean_relu", "x")]


def _names(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) and len(value) > 2 else None


def _activation(n, c, t, h, w, dtype):
    return torch.randn(n, c, t, h, w, device="cuda", dtype=dtype).to(memory_format=torch.channels_last_3d)


def _layer(co, *inner, dtype, mean=0.0):
    """A weight [co, *inner] and a record [5, co] whose last two rows nobody may read."""
    w = torch.randn(co, *inner, device="cuda") / torch.Size(inner).numel() ** 0.5
    rows = [mean + torch.randn(co), 0.5 + torch.rand(co), 0.5 * torch.randn(co)]
    return w.to(dtype), torch.stack([*rows, *[torch.full((co,), torch.nan)] * 2]).cuda()


def _arguments(shape, dtype, join, source, reduce=True, down=0):
    """What `tail_infer` takes; `down`: with D inside, of so many channels."""
    n, m, t, h, w = shape
    x = _activation(*shape, dtype)
    o = {"own": _activation(*shape, dtype), "x": x, None: None}[source]
    residual = _activation(n, down or 4 * m, t, h, w, dtype)
    layers = [_layer(m, 3, m, dtype=dtype), _layer(4 * m, m, dtype=dtype)]
    layers.append(_layer(m, 4 * m, dtype=dtype) if reduce else (None, None))
    layers.append(_layer(4 * m, down, dtype=dtype) if down else (None, None))
    return x, o, join, residual, *[a for layer in layers for a in layer]


def _bn(z, record):
    mean, scale, bias = (row.double().view(1, -1, 1, 1, 1) for row in record[:3])
    return (z - mean) * scale + bias


def _pointwise(x, w):
    return torch.einsum("oc,ncthw->nothw", w.double(), x.double())


def _y_in_float64(x, o, join, residual, w_t, record_t, w_e, record_e, w_r, record_r, w_d, record_d):
    if w_d is not None:
        residual = _bn(_pointwise(residual, w_d), record_d).to(x.dtype)
    taps = torch.nn.functional.pad(x.double(), (0, 0, 0, 0, 1, 1)).unfold(2, 3, 1)
    u = _bn(torch.einsum("oac,ncthwa->nothw", w_t.double(), taps), record_t)
    t = {
        "relu": lambda: torch.relu(u),
        "relu_add": lambda: torch.relu(u) + o.double(),
        "add_relu": lambda: torch.relu(u + o.double()),
        "mean_relu": lambda: torch.relu(0.5 * u + 0.5 * o.double()),
    }[join]()
    return torch.relu(_bn(_pointwise(t.to(x.dtype), w_e), record_e) + residual.double())


def _z_in_float64(y, *arguments):
    w_r, record_r = arguments[8:10]
    return torch.relu(_bn(_pointwise(y, w_r), record_r))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("join", JOINS, ids=lambda j: f"{j[0]}_{j[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=_names)
def test_against_float64(shape, join, reduce, dtype):
    arguments = _arguments(shape, dtype, *join, reduce)
    y, z = _cuda.tail_infer(*arguments)
    check(y, _y_in_float64(*arguments), dtype, name="y")
    if reduce:
        check(z, _z_in_float64(y, *arguments), dtype, name="z")  # of y as stored
    else:
        assert z is None
    assert all(v.is_contiguous(memory_format=torch.channels_last_3d) for v in (y, z) if v is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=_names)
def test_a_thin_y_is_every_second_row_and_column(shape, reduce):
    for join in JOINS:
        arguments = _arguments(shape, torch.bfloat16, *join, reduce)
        y, z = _cuda.tail_infer(*arguments)
        thin, same = _cuda.tail_infer(*arguments, thin=True)
        assert thin.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(thin, y[..., ::2, ::2])
        assert z is same is None or torch.equal(z, same)


def _halves(time):
    """What T may be pooled to: rounded down, as long as something is left, and up."""
    return sorted({max(1, time // 2), (time + 1) // 2})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("join", JOINS, ids=lambda j: f"{j[0]}_{j[1]}")
@pytest.mark.parametrize("shape", [*SHAPES, (33, 64, 7, 3, 11), (5, 128, 9, 4, 4)], ids=_names)
def test_a_pooled_y_is_the_maximum_of_every_two_frames(shape, join, dtype):
    arguments = _arguments(shape, dtype, *join, reduce=False)
    y, _ = _cuda.tail_infer(*arguments)
    for frames in _halves(shape[2]):
        pooled, z = _cuda.tail_infer(*arguments, frames=frames)
        assert z is None and torch.equal(pooled, max_of_pairs(y, frames))
        assert pooled.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [64, 128])
def test_nan_wins_where_it_is_pooled(m, dtype):
    arguments = _arguments((2, m, 5, 5, 7), dtype, "relu", None, reduce=False)
    arguments[0][0, 1, 0, 2, 3] = torch.nan
    for t in (2, 3, 4):
        arguments[3][1, 5, t, t, 6] = torch.nan
    y, _ = _cuda.tail_infer(*arguments)
    for frames in (2, 3):
        pooled, want = _cuda.tail_infer(*arguments, frames=frames)[0], max_of_pairs(y, frames)
        assert torch.equal(pooled.isnan(), want.isnan()) and torch.equal(pooled.nan_to_num(), want.nan_to_num())
        assert pooled.isnan().sum() == 4 * m + frames


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("join", JOINS, ids=lambda j: f"{j[0]}_{j[1]}")
@pytest.mark.parametrize("shape", DOWN_SHAPES, ids=_names)
def test_the_residual_made_of_x0(shape, join, reduce, dtype):
    arguments = _arguments(shape, dtype, *join, reduce, down=64)
    y, z = _cuda.tail_infer(*arguments)
    check(y, _y_in_float64(*arguments), dtype, name="y")
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    thin, same = _cuda.tail_infer(*arguments, thin=True)
    assert torch.equal(thin, y[..., ::2, ::2])
    if reduce:
        check(z, _z_in_float64(y, *arguments), dtype, name="z")
        assert torch.equal(z, same)
    else:
        assert z is same is None


@pytest.mark.gpu
@pytest.mark.parametrize("m, down", [(64, 0), (128, 0), (64, 64)])
@pytest.mark.parametrize("join", JOINS, ids=lambda j: f"{j[0]}_{j[1]}")
def test_nan_passes_through_every_relu_and_reaches_its_neighbours_in_time_only(m, down, join):
    arguments = _arguments((2, m, 3, 5, 7), torch.bfloat16, *join, down=down)
    x, residual = arguments[0], arguments[3]
    x[0, 1, 0, 2, 3] = torch.nan
    residual[1, 5, 2, 4, 6] = torch.nan
    y, z = _cuda.tail_infer(*arguments)
    assert torch.equal(y.isnan(), _y_in_float64(*arguments).isnan())
    assert torch.equal(z.isnan(), _z_in_float64(y, *arguments).isnan())
    assert y.isnan()[0, :, :2, 2, 3].all() and y.isnan().sum() == 2 * 4 * m + (4 * m if down else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_of_300_deviations(dtype):
    n, m, t, h, w = shape = (2, 64, 2, 9, 7)
    arguments = list(_arguments(shape, dtype, "relu", None))
    w_e = arguments[6]
    w_e[:, 0] = 1
    arguments[0].fill_(1), arguments[4].fill_(0)  # T x = 0, so t is the relu of its bias
    arguments[5][:3] = torch.tensor([0.0, 1.0, 1.0], device="cuda").view(3, 1)
    arguments[5][2, 0] = 300
    arguments[7][0] = 300
    y, z = _cuda.tail_infer(*arguments)
    check(y, _y_in_float64(*arguments), dtype, name="y")
    check(z, _z_in_float64(y, *arguments), dtype, name="z")


@pytest.mark.gpu
@pytest.mark.parametrize("m, down", [(64, 0), (128, 0), (64, 64)])
def test_runs_are_equal_and_a_graph_replays_them(m, down):
    arguments = _arguments((7, m, 4, 21, 13), torch.bfloat16, "mean_relu", "x", down=down)
    first = _cuda.tail_infer(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = _cuda.tail_infer(*arguments)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 256) + 2
    arguments = list(_arguments((clips, 64, 8, 40, 40), torch.bfloat16, "relu", None))
    y, z = _cuda.tail_infer(*arguments)
    for part in (slice(0, 1), slice(clips - 1, clips)):
        some = [a[part] if i in (0, 3) else a for i, a in enumerate(arguments)]
        check(y[part], _y_in_float64(*some), torch.bfloat16, name="y")
        check(z[part], _z_in_float64(y[part], *some), torch.bfloat16, name="z")
    arguments[8] = arguments[9] = None
    pooled, _ = _cuda.tail_infer(*arguments, frames=4)
    assert torch.equal(pooled[-1:], max_of_pairs(y[-1:], 4))


@pytest.mark.gpu
def test_reasons():
    def why(m=64, t=8, h=40, dtype=torch.bfloat16, down=0, frames=None):
        return _cuda.tail_why_not((2, m, t, h, 40), dtype, down, frames)

    assert why() is None and why(m=128) is None and why(down=64) is None
    assert "128 to 64" in why(down=128) and "256 to 128" in why(m=128, down=256)
    assert "float32" in why(dtype=torch.float32)
    assert "256" in why(m=256)
    assert "T * H * W" in why(t=2**16, h=2**16)
    assert why(t=5, frames=2) is None and why(t=5, frames=3) is None and why(t=1, frames=1) is None
    assert "half of T" in why(frames=3) and "half of T" in why(frames=4, down=64)


def test_arguments_are_checked_before_any_launch():
    def last(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)

    x, residual, rows = last(1, 64, 2, 4, 4), last(1, 256, 2, 4, 4), torch.zeros(3, 256)
    w_t, w_e, w_r = (torch.zeros(s, dtype=torch.bfloat16) for s in ((64, 3, 64), (256, 64), (64, 256)))
    narrow = torch.zeros(3, 64)
    good = dict(x=x, o=None, join="relu", residual=residual, w_t=w_t, record_t=narrow, w_e=w_e, record_e=rows)

    def run(**changes):
        _cuda.tail_infer(**{**good, **changes})

    with pytest.raises(ValueError, match="x: expected bfloat16"):
        run(x=x.float())
    with pytest.raises(ValueError, match="x: expected channels_last_3d"):
        run(x=x.contiguous())
    with pytest.raises(ValueError, match="join, o: expected relu without o"):
        run(o=x)
    with pytest.raises(ValueError, match="join, o: .* got 'add_relu'"):
        run(join="add_relu")
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 64, 2, 4, 4\]"):
        run(join="add_relu", o=residual)
    with pytest.raises(ValueError, match=r"residual: expected .*\[1, 256, 2, 4, 4\]"):
        run(residual=x)
    with pytest.raises(ValueError, match=r"w_t: expected .*\[64, 3, 64\]"):
        run(w_t=w_e)
    with pytest.raises(ValueError, match="w_e: expected contiguous"):
        run(w_e=w_r.T)
    with pytest.raises(ValueError, match=r"record_e: expected float32 \[3, 256\]"):
        run(record_e=narrow)
    with pytest.raises(ValueError, match="w_r, record_r: expected both or neither"):
        run(w_r=w_r)
    with pytest.raises(ValueError, match=r"w_r: expected torch.bfloat16 \[64, 256\]"):
        run(w_r=w_r.half(), record_r=narrow)
    with pytest.raises(ValueError, match="w_d, record_d: expected both or neither"):
        run(record_d=rows)
    with pytest.raises(ValueError, match=r"residual: expected .*\[1, 64, 2, 4, 4\]"):
        run(w_d=w_e, record_d=rows)
    with pytest.raises(ValueError, match=r"w_d: expected .*\[256, 64\]"):
        run(residual=x, w_d=w_e[:128], record_d=rows)
    with pytest.raises(ValueError, match="w_d: expected contiguous"):
        run(residual=x, w_d=w_r.T, record_d=rows)
    with pytest.raises(ValueError, match=r"record_d: expected float32 \[3, 256\]"):
        run(residual=x, w_d=w_e, record_d=narrow)
    with pytest.raises(ValueError, match="frames: expected None or half of 2"):
        run(frames=2)
    with pytest.raises(ValueError, match="frames: expected None with w_r, w_d or thin, got 1"):
        run(frames=1, thin=True)


def test_no_positions_need_no_launch():
    x = torch.zeros(0, 64, 2, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    residual = torch.zeros(0, 256, 2, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    w_t, w_e = torch.zeros(64, 3, 64, dtype=torch.bfloat16), torch.zeros(256, 64, dtype=torch.bfloat16)
    y, z = _cuda.tail_infer(x, None, "relu", residual, w_t, torch.zeros(3, 64), w_e, torch.zeros(3, 256))
    assert y.shape == residual.shape and z is None
    rows = torch.zeros(3, 256)
    y, _ = _cuda.tail_infer(x, None, "relu", x, w_t, torch.zeros(3, 64), w_e, rows, w_d=w_e, record_d=rows)
    assert y.shape == residual.shape
