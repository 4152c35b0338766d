"""The Hopper kernel for a convolution alone in inference, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import max_of_pairs
from p3d_kernels.ops import _conv, _cuda
from p3d_kernels.ops._conv import Epilogue, conv, pointwise, spatial, taps_of, temporal
from p3d_kernels.ops._triton import Operand
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

DTYPES = (torch.bfloat16, torch.float16)
JOINS = ("none", "relu", "relu_add", "add_relu", "mean_relu")
GEOMETRIES = {
    "1x1x1": pointwise(),
    "1x1x1/2": pointwise(2),
    "1x1x1/4": pointwise(4),
    "3x1x1": temporal(),
    "3x1x1/2": temporal()._replace(stride=(1, 2)),
    "1x3x3": spatial(),
    "1x3x3/2": spatial(2),
}
# N, Ci, T, H, W, Co: one position, one frame, odd sizes, tiles that are full, nearly empty and of several clips, more
# tiles than a card has multiprocessors, few positions and long sums.
SHAPES = [
    (1, 64, 1, 1, 1, 64),
    (2, 64, 3, 5, 7, 128),
    (1, 128, 1, 9, 13, 64),
    (3, 192, 2, 1, 6, 320),
    (1, 256, 2, 10, 10, 256),
    (11, 128, 4, 20, 20, 256),
    (32, 256, 2, 10, 10, 512),
    (7, 512, 1, 5, 5, 512),
    (1, 1024, 1, 5, 5, 256),
    (40, 64, 4, 19, 23, 64),
]
# Every tile there is, with as many splits as it takes.
TILES = [(64, 64, 1), (128, 64, 1), (128, 128, 1), (128, 256, 1), (64, 32, 2), (64, 32, 8), (64, 64, 2), (64, 64, 4)]
TILES += [(64, 64, 8), (128, 64, 2), (128, 64, 4), (128, 128, 2), (128, 128, 4), (128, 128, 8)]


def _activation(shape, dtype):
    return torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last_3d)


def _arguments(shape, geometry, dtype, join, same=False):
    """What `conv_infer` takes but for its tile; nobody may read the record's last two rows."""
    n, ci, *dims, co = shape
    taps = geometry.taps[0] * geometry.taps[1] * geometry.taps[2]
    w = torch.randn(co, taps, ci, device="cuda", dtype=dtype) / (taps * ci) ** 0.5
    rows = [torch.randn(co), 0.5 + torch.rand(co), 0.5 * torch.randn(co), *[torch.full((co,), torch.nan)] * 2]
    record = torch.stack(rows).cuda()
    x = _activation((n, ci, *dims), dtype)
    o = None
    if join not in ("none", "relu"):
        o = x if same else _activation((n, co, *geometry.out_shape(*dims)), dtype)
    return x, w, *geometry, record, join, o


def _in_float64(x, w, taps, stride, record, join, o):
    mean, scale, bias = (row.double().view(1, -1, 1, 1, 1) for row in record[:3])
    (kt, kh, kw), step = taps, stride[1]
    t, h, width = x.shape[2:]
    padded = torch.nn.functional.pad(x.double(), (kw // 2, kw // 2, kh // 2, kh // 2, kt // 2, kt // 2))
    u = 0
    for tap in range(kt * kh * kw):
        dt, dh, dw = tap // (kh * kw), tap // kw % kh, tap % kw
        part = padded[:, :, dt : dt + t, dh : dh + h : step, dw : dw + width : step]
        u = u + torch.einsum("oc,ncthw->nothw", w[:, tap].double(), part)
    u = (u - mean) * scale + bias
    if join in ("none", "relu"):
        return u if join == "none" else u.relu()
    o = o.double()
    return {"relu_add": u.relu() + o, "add_relu": (u + o).relu(), "mean_relu": (0.5 * u + 0.5 * o).relu()}[join]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_float64(shape, name, dtype):
    arguments = _arguments(shape, GEOMETRIES[name], dtype, JOINS[SHAPES.index(shape) % len(JOINS)])
    y = _cuda.conv_infer(*arguments)
    check(y, _in_float64(*arguments), dtype)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, t)))
def test_tiles_and_joins(tile, join):
    geometries = list(GEOMETRIES.values())
    for i, shape in enumerate([(5, 128, 3, 7, 9, 256), (32, 512, 2, 5, 5, 1024), (9, 256, 4, 20, 20, 256)]):
        geometry = geometries[(TILES.index(tile) + i) % len(geometries)]
        if tile[2] > geometry.taps[0] * geometry.taps[1] * geometry.taps[2] * shape[1] // 64:
            geometry = spatial()
        arguments = _arguments(shape, geometry, torch.bfloat16, join)
        check(
            _cuda.conv_infer(*arguments, tile=tile), _in_float64(*arguments), torch.bfloat16, name=f"{tile} {geometry}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [(0, 0, 0), *TILES], ids=lambda t: "x".join(map(str, t)))
def test_what_is_pooled_or_picked_here_or_elsewhere_has_the_same_bits(tile, dtype):
    shapes = [(5, 512, 3, 7, 9, 256), (32, 512, 2, 5, 5, 256), (1, 512, 1, 9, 13, 256), (1, 512, 5, 1, 1, 256)]
    for n, ci, t, h, w, co in [*shapes, (9, 512, 4, 10, 10, 512), (70, 512, 6, 11, 7, 256)]:
        x, weight, _, _, record, join, o = _arguments((n, ci, t, h, w, co), pointwise(), dtype, "add_relu")
        wide = _activation((n, co, t, 2 * h, 2 * w - 1), dtype)
        wide[..., ::2, ::2] = o
        start, rest = (x, weight, *pointwise(), record, join), dict(tile=tile)
        y = _cuda.conv_infer(*start, o, **rest)
        assert torch.equal(_cuda.conv_infer(*start, wide, **rest, o_strided=True), y)
        for frames in {max(1, t // 2), (t + 1) // 2}:
            want = max_of_pairs(y, frames)
            for other, strided in ((o, False), (wide, True)):
                got = _cuda.conv_infer(*start, other, **rest, o_strided=strided, frames=frames)
                assert torch.equal(got, want) and got.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(128, 128, 1), (64, 64, 1), (64, 64, 4)], ids=str)
def test_nan_wins_where_it_is_pooled(tile):
    arguments = _arguments((2, 256, 5, 5, 7, 128), pointwise(), torch.bfloat16, "add_relu")
    arguments[0][0, 1, 1, 2, 3] = torch.nan
    for t in (2, 3, 4):
        arguments[6][1, 5, t, t, 6] = torch.nan
    y = _cuda.conv_infer(*arguments, tile=tile)
    for frames in (2, 3):
        pooled, want = _cuda.conv_infer(*arguments, tile=tile, frames=frames), max_of_pairs(y, frames)
        assert torch.equal(pooled.isnan(), want.isnan()) and torch.equal(pooled.nan_to_num(), want.nan_to_num())
        assert pooled.isnan().sum() == 128 + frames


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(0, 0, 0), (128, 128, 1), (64, 64, 4)], ids=str)
def test_o_may_be_x(tile):
    for join in JOINS[2:]:
        arguments = _arguments((3, 128, 4, 9, 5, 128), temporal(), torch.bfloat16, join, same=True)
        check(_cuda.conv_infer(*arguments, tile=tile), _in_float64(*arguments), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(128, 128, 1), (64, 64, 1), (64, 64, 4)], ids=str)
@pytest.mark.parametrize("join", JOINS)
def test_nan_stays_where_it_is(join, tile):
    for geometry in (spatial(), spatial(2), temporal()):
        arguments = _arguments((3, 128, 4, 9, 7, 128), geometry, torch.bfloat16, join)
        arguments[0][1, 1, 2, 4, 3] = torch.nan
        y = _cuda.conv_infer(*arguments, tile=tile)
        assert torch.equal(y.isnan(), _in_float64(*arguments).isnan()) and y.isnan().any() and not y.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, t)))
def test_runs_are_equal_and_a_graph_replays_them(tile):
    arguments = _arguments((13, 128, 4, 21, 13, 256), spatial(), torch.bfloat16, "add_relu")
    first = _cuda.conv_infer(*arguments, tile=tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [_cuda.conv_infer(*arguments, tile=tile) for _ in range(3)]
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(first, y) for y in results)


@pytest.mark.gpu
def test_a_chain_waits_for_each_of_its_links():
    links = [
        _arguments((1, 256, 2, 10, 10, 256), g, torch.bfloat16, "relu")[1:-1] for g in (pointwise(), temporal()) * 8
    ]
    x = _activation((1, 256, 2, 10, 10), torch.bfloat16)
    torch.cuda.synchronize()
    expected = x
    for link in links:
        expected = _cuda.conv_infer(expected, *link)
        torch.cuda.synchronize()
    for _ in range(10):
        y = x
        for link in links:
            y = _cuda.conv_infer(y, *link)
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 40 * 40 * 64) + 2
    for geometry in (pointwise(), spatial()):
        arguments = _arguments((clips, 64, 8, 40, 40, 64), geometry, torch.bfloat16, "relu")
        y = _cuda.conv_infer(*arguments)
        for part in (slice(0, 1), slice(clips - 1, clips)):
            check(y[part], _in_float64(arguments[0][part], *arguments[1:]), torch.bfloat16)
        del arguments, y


@pytest.mark.gpu
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_takes_it_in_inference(name):
    geometry = GEOMETRIES[name]
    arguments = _arguments((2, 64, 3, 9, 7, 128), geometry, torch.bfloat16, "add_relu")
    x, w, record, o = arguments[0], arguments[1], arguments[4], arguments[6]
    w = w.view(128, *geometry.taps, 64).permute(0, 4, 1, 2, 3)
    assert taps_of(w).data_ptr() == w.data_ptr()
    y, part = conv(Operand("raw", x), w, geometry, Epilogue(record=record, join="add_relu", o=o))
    assert part is None and torch.equal(y, _cuda.conv_infer(*arguments))


GRADIENTS = [tile for tile in TILES if tile[2] == 1 and tile[1] <= 128]


def _gradient(shape, dtype, o_masked=True, masked=False):
    """dz, w, o and the masks of `point_dgrad`."""
    n, ci, *dims, co = shape
    w = torch.randn(ci, co, device="cuda", dtype=dtype) / ci**0.5
    dz, *like = (_activation((n, c, *dims), dtype) for c in (ci, co, co, co))
    return dz, w, like[0], like[1] if o_masked else None, like[2] if masked else None


def _gradient_in_float64(dz, w, o, o_mask, mask):
    v = torch.einsum("ncthw,co->nothw", dz.double(), w.double())
    v = v + (o.double() if o_mask is None else torch.where(o_mask <= 0, 0, o.double()))
    return v if mask is None else torch.where(mask <= 0, 0, v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_gradient_of_a_pointwise_convolution(shape, dtype):
    for tile in ((0, 0, 0), *GRADIENTS):
        if tile[1] and shape[-1] % tile[1]:
            continue
        for masks in ((False, False), (True, False), (False, True), (True, True)):
            arguments = _gradient(shape, dtype, *masks)
            dx = _cuda.point_dgrad(*arguments, tile)
            check(dx, _gradient_in_float64(*arguments), dtype, name=f"{tile} {masks}")
            assert dx.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(0, 0, 0), *GRADIENTS], ids=str)
def test_runs_of_the_gradient_are_equal_and_a_graph_replays_them(tile):
    arguments = _gradient((13, 256, 4, 21, 13, 512), torch.bfloat16, True, True)
    first = _cuda.point_dgrad(*arguments, tile=tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [_cuda.point_dgrad(*arguments, tile=tile) for _ in range(3)]
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(first, dx) for dx in results)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", GRADIENTS, ids=str)
def test_a_nan_of_the_gradient_stays_where_it_is(tile):
    dz, w, o, mask, _ = _gradient((2, 128, 4, 9, 7, 256), torch.bfloat16)
    o[1, 7, 2, 4, 3] = torch.nan
    for value, seen in ((-1.0, 0), (1.0, 1), (torch.nan, 1)):
        mask[1, 7, 2, 4, 3] = value
        for masks in ((mask, None), (None, mask)):
            dx = _cuda.point_dgrad(dz, w, o, *masks, tile)
            assert dx.isnan().sum() == seen == dx[1, 7, 2, 4, 3].isnan()


@pytest.mark.gpu
def test_conv_takes_the_gradient_and_triton_agrees(monkeypatch):
    dz, w, o, mask, _ = _gradient((2, 256, 3, 9, 7, 512), torch.bfloat16)
    epilogue, dims = Epilogue(join="add", o=o, o_mask=mask), tuple(dz.shape[2:])
    arguments = Operand("raw", dz), w[..., None, None, None], pointwise(), epilogue, dims
    own, part = conv(*arguments)
    assert part is None and torch.equal(own, _cuda.point_dgrad(dz, w, o, mask))
    monkeypatch.setattr(_conv, "cuda_allowed", lambda x: False)
    check(own, conv(*arguments)[0].double(), torch.bfloat16)


def test_arguments_of_the_gradient_are_checked_before_any_launch():
    dz = torch.zeros(1, 64, 2, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    w, o = torch.zeros(64, 128, dtype=dz.dtype), torch.cat([dz, dz], 1)
    with pytest.raises(ValueError, match="dz: expected bfloat16"):
        _cuda.point_dgrad(dz.float(), w, o)
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[64, 64\]"):
        _cuda.point_dgrad(dz, w[:32, :64], o)
    assert o.is_contiguous(memory_format=torch.channels_last_3d)
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 128, 2, 4, 4\]"):
        _cuda.point_dgrad(dz, w, dz)
    with pytest.raises(ValueError, match=r"o_mask: expected .*\[1, 128, 2, 4, 4\]"):
        _cuda.point_dgrad(dz, w, o, dz)
    with pytest.raises(ValueError, match=r"mask: expected .*\[1, 128, 2, 4, 4\]"):
        _cuda.point_dgrad(dz, w, o, o, dz)
    assert "float32" in _cuda.point_dgrad_why_not(dz.float(), 128)


@pytest.mark.gpu
def test_reasons():
    def why(n=2, ci=64, co=64, h=9, taps=(1, 3, 3), stride=(1, 1), dtype=torch.bfloat16, join="none", **rest):
        return _cuda.conv_infer_why_not((n, ci, 3, h, 5), dtype, co, taps, stride, join, **rest)

    assert why() is None and why(ci=192, co=320) is None and why(taps=(3, 1, 1), stride=(1, 3)) is None
    assert "multiples of 64" in why(ci=96) and "multiples of 64" in why(co=32)
    assert "stride" in why(stride=(1, 3)) and "stride" in why(stride=(2, 1)) and "taps" in why(taps=(3, 3, 3))
    assert "float32" in why(dtype=torch.float32) and "join add" in why(join="add")
    assert "below 2^31" in why(n=2**20, h=2**12)
    expand = dict(taps=(1, 1, 1), join="add_relu")
    assert why(**expand, frames=1) is None and why(**expand, frames=2, o_size=(17, 10)) is None
    assert "half of T" in why(**expand, frames=3) and "half of T" in why(join="add_relu", frames=1)
    assert "twice H, W" in why(**expand, o_size=(9, 5)) and "frames with join relu" in why(join="relu", frames=1)
    arguments = _arguments((1, 64, 1, 3, 3, 64), pointwise(), torch.bfloat16, "none")
    for tile in ((64, 128, 0), (0, 0, 2), (0, 256, 0)):
        with pytest.raises(RuntimeError, match="tile"):
            _cuda.conv_infer(*arguments, tile=tile)


def test_arguments_are_checked_before_any_launch():
    x = torch.zeros(1, 64, 2, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    w, record = torch.zeros(128, 1, 64, dtype=x.dtype), torch.zeros(3, 128)
    good = dict(x=x, w=w, taps=(1, 1, 1), stride=(1, 2), record=record)

    def run(**changes):
        return _cuda.conv_infer(**{**good, **changes})

    with pytest.raises(ValueError, match="x: expected bfloat16"):
        run(x=x.float())
    with pytest.raises(ValueError, match="x: expected channels_last_3d"):
        run(x=x.contiguous())
    with pytest.raises(ValueError, match="join, o: expected none or relu"):
        run(o=x)
    with pytest.raises(ValueError, match="join, o: expected none or relu"):
        run(join="add_relu")
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 128, 2, 2, 2\]"):
        run(o=x, join="add_relu")
    with pytest.raises(ValueError, match=r"w: expected torch.bfloat16 \[128, 3, 64\]"):
        run(taps=(3, 1, 1))
    with pytest.raises(ValueError, match=r"record: expected float32 \[3, 128\]"):
        run(record=torch.zeros(3, 64))
    expand = dict(stride=(1, 1), join="add_relu", o=torch.zeros(1, 128, 2, 8, 8).to(x))
    with pytest.raises(ValueError, match="o_strided: expected False unless o has twice"):
        run(o_strided=True)
    with pytest.raises(ValueError, match="o_strided: expected False unless o has twice"):
        run(**{**expand, "o": torch.zeros(1, 128, 2, 4, 4).to(x)}, o_strided=True)
    with pytest.raises(ValueError, match=r"o: expected .*\[1, 128, 2, 4, 4\]"):
        run(**expand, frames=1)
    with pytest.raises(ValueError, match="frames: expected None or half of 2"):
        run(**expand, o_strided=True, frames=2)
    with pytest.raises(ValueError, match="frames: expected None unless 1x1x1, stride 1, add_relu"):
        run(frames=1)
    empty = torch.zeros(0, 64, 2, 4, 4, dtype=x.dtype).to(memory_format=torch.channels_last_3d)
    assert run(x=empty).shape == (0, 128, 2, 2, 2)
