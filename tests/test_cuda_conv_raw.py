"""The Hopper kernel for convolutions of training whose operand is in memory as it is, against float64."""

from __future__ import annotations

import pytest
import torch

from operands import DTYPES, TILE_SIZES, assert_nan_at, assert_replays, record
from p3d_kernels._norm import Norm
from p3d_kernels.ops import _conv, _cuda, _gram
from p3d_kernels.ops._triton import Operand
from test_cuda_conv_train import _check_statistics, _check_sums, _expected, _like, _weight
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

SIZES = [*TILE_SIZES, (41, 8, 11, 13)]  # the last: more tiles than the card has room for at once
CHANNELS = [(64, 64), (256, 256), (512, 192), (192, 1024)]  # Ci, Co
TILES = [(0, 0, 0), (64, 64, 1), (128, 128, 1), (128, 256, 1)]


def _judge(x, w, stride=1, tile=(0, 0, 0), **arguments):
    y, part = _cuda.conv_train(Operand("raw", x), w, stride=stride, tile=tile, **arguments)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    check(y, _expected(Operand("raw", x[..., ::stride, ::stride]), w, **arguments), x.dtype, name=f"{tile}")
    if "below" in arguments:
        _check_sums(part, y, *arguments["below"])
    elif arguments.get("stats"):
        _check_statistics(part, y)
    else:
        assert part is None


def _gradients(size, co, dtype=torch.bfloat16, mean=0.0):
    """What the input gradient may have beside dz and w."""
    o, below = _like(size, co, dtype), (_like(size, co, dtype, mean), record(co, mean))
    return {}, {"o": o}, {"below": below}, {"o": o, "below": below}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size, channels, dtype):
    ci, co = channels
    for tile in TILES:
        if tile[1] and co % tile[1]:
            continue
        for taps, stride in ((1, 1), (3, 1), (1, 2), (1, 3)):
            x = _like(size, ci, dtype)
            _judge(x, _weight(Operand("raw", x), co, taps), stride, tile, stats=True)
    _judge(x, _weight(Operand("raw", x), co))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient(size, channels, dtype):
    ci, co = channels
    for tile in TILES[:3]:
        if tile[1] and co % tile[1]:
            continue
        for taps in (1, 3):
            dz = _like(size, ci, dtype)
            for arguments in _gradients(size, co, dtype):
                _judge(dz, _weight(Operand("raw", dz), co, taps, True), tile=tile, transposed=True, **arguments)


@pytest.mark.gpu
def test_a_mean_of_300_deviations():
    size = 3, 4, 21, 13
    for tile in TILES:
        for taps in (1, 3):
            x = _like(size, 256, mean=300.0)
            _judge(x, _weight(Operand("raw", x), 256, taps), tile=tile, stats=True)
            if tile[1] < 256:
                w, below = _weight(Operand("raw", x), 256, taps, True), _gradients(size, 256, mean=300.0)[2]
                _judge(x, w, tile=tile, transposed=True, **below)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES[1:3], ids=str)
def test_a_nan_stays_where_it_is(tile):
    size, (n, t, h, w) = (2, 4, 9, 7), (at := (0, 1, 2, 3))
    for taps in (1, 3):
        for transposed in (False, True):
            x = _like(size, 256)
            x[n, 5, t, h, w] = torch.nan
            of = Operand("raw", x)
            y, _ = _cuda.conv_train(of, _weight(of, 256, taps, transposed), transposed, tile=tile)
            assert_nan_at(y, at, taps)
        below = _like(size, 256), record(256)
        below[0][n, 9, t, h, w] = torch.nan
        dz = Operand("raw", _like(size, 256))
        y, part = _cuda.conv_train(dz, _weight(dz, 256, taps, True), True, below=below, tile=tile)
        assert not y.isnan().any() and part.isnan().any((0, 1)).nonzero().flatten().tolist() == [9]
    y, part = _cuda.conv_train(of, _weight(of, 256), stats=True, tile=tile)
    assert part[:, 1:].isnan().any((0, 1)).all() and not part[:, 0].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_runs_are_equal_and_a_graph_replays_them(tile):
    size = 9, 4, 21, 13
    x = Operand("raw", _like(size, 256))
    for taps in (1, 3):
        cases = [(_weight(x, 256, taps), {"stats": True})]
        if tile[1] < 256:
            cases += [(_weight(x, 256, taps, True), {"transposed": True, **a}) for a in _gradients(size, 256)]
        for w, arguments in cases:
            assert_replays(lambda w=w, arguments=arguments: _cuda.conv_train(x, w, tile=tile, **arguments), 3)


@pytest.mark.gpu
def test_a_chain_waits_for_each_of_its_links():
    size = 2, 2, 10, 10
    x = _like(size, 256)
    weights = [_weight(Operand("raw", x), 256, 1 + i % 2 * 2, i % 3 == 2) for i in range(12)]
    torch.cuda.synchronize()

    def run(wait):
        y = x
        for i, w in enumerate(weights):
            transposed = i % 3 == 2
            y, _ = _cuda.conv_train(Operand("raw", y), w, transposed, stats=not transposed, tile=(0, 0, 0))
            if wait:
                torch.cuda.synchronize()
        return y

    expected = run(True)
    for _ in range(10):
        assert torch.equal(run(False), expected)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    clips = 2**31 // (8 * 20 * 20 * 256) + 2
    ends = slice(0, 1), slice(clips - 1, clips)
    x = torch.zeros(clips, 8, 20, 20, 256, dtype=torch.bfloat16, device="cuda").permute(0, 4, 1, 2, 3)
    for part in ends:
        x[part] = torch.randn_like(x[part])
    of = Operand("raw", x)
    y, part = _cuda.conv_train(of, w := _weight(of, 256), stats=True)
    for end in ends:
        check(y[end], _expected(Operand("raw", x[end]), w), torch.bfloat16)
    assert part[:, 0, 0].double().sum() == x.numel() // 256


@pytest.mark.gpu
def test_conv_takes_the_kernel_and_triton_agrees(monkeypatch):
    size = 2, 3, 9, 7
    x, dims = Operand("raw", _like(size, 512)), size[1:]

    def packed(taps=1, transposed=False):
        w = _weight(x, 256, taps, transposed).permute(0, 2, 1)[..., None, None]
        return w.contiguous(memory_format=torch.channels_last_3d)

    stats, gradients = _conv.Epilogue(stats=True), _gradients(size, 256)
    cases = [(x, packed(), _conv.pointwise(), stats), (x, packed(), _conv.pointwise(2), stats)]
    cases += [(x, packed(3), _conv.temporal(), stats)]
    for arguments in (gradients[0], *gradients[2:]):
        epilogue = _conv.Epilogue(join="add" if "o" in arguments else "none", **arguments)
        cases += [(x, packed(1, True), _conv.pointwise(), epilogue, dims)]
        cases += [(x, packed(3, True), _conv.temporal(), epilogue, dims)]
    with monkeypatch.context() as patch:
        patch.setattr(_conv, "_train_arguments", lambda *_: None)
        theirs = [_conv.conv(*case) for case in cases]
    monkeypatch.setattr(_conv, "plan_for", None)
    for case, (y, part) in zip(cases, theirs):
        own, own_part = _conv.conv(*case)
        check(own, y.double(), torch.bfloat16)
        assert (part is None) == (own_part is None)


def _beside(size, m, co, dtype=torch.bfloat16):
    """g, x, w and c of `gram_raw`."""
    w = (torch.randn(co + m, m, device="cuda") / (co + m) ** 0.5).to(dtype)
    return _like(size, co, dtype), _like(size, m, dtype), w, torch.randn(5, m, device="cuda")


def _judge_beside(g, x, w, c, tile=(0, 0, 0)):
    da = _cuda.gram_raw(g, x, w, c, tile=tile)
    assert da.is_contiguous(memory_format=torch.channels_last_3d)
    expected = torch.einsum("ncthw,cm->nmthw", torch.cat([g, x], 1).double(), w.double())
    check(da, expected + c.double().sum(0).view(1, -1, 1, 1, 1), x.dtype, name=f"{tile}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(256, 512), (64, 64), (192, 64), (128, 320), (512, 256)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_sum_over_two_tensors(size, channels, dtype):
    for tile in TILES[:3]:
        if channels[0] % (tile[1] or 64) == 0:
            _judge_beside(*_beside(size, *channels, dtype), tile)


@pytest.mark.gpu
def test_a_nan_in_either_of_two_tensors_stays_where_it_is():
    for which in (0, 1):
        arguments = _beside((2, 4, 9, 7), 256, 512)
        arguments[which][1, 70, 2, 3, 4] = torch.nan
        assert_nan_at(_cuda.gram_raw(*arguments), (1, 2, 3, 4))


@pytest.mark.gpu
def test_weights_and_constants_may_come_of_the_kernel_ahead():
    size, (m, co) = (9, 4, 21, 13), (256, 512)
    g, x, *_ = _beside(size, m, co)
    rows = [_like((1, 1, 1, co + m), m) for _ in range(4)]  # of w
    of, record_of = _weight(Operand("raw", rows[0]), m, 1, True), record(m)

    def run(wait):
        results = []
        for row in rows:
            y, c = _cuda.conv_train(Operand("raw", row), of, True, below=(rows[0], record_of), tile=(0, 0, 0))
            if wait:
                torch.cuda.synchronize()
            results.append(_cuda.gram_raw(g, x, y.movedim(1, -1).view(co + m, m), c.view(-1, m)))
        return results

    expected = run(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = run(False)
    for _ in range(5):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, again))
        assert all(torch.equal(a, b) for a, b in zip(expected, run(False)))


@pytest.mark.gpu
def test_the_gram_identity_takes_the_sum_over_two_tensors(monkeypatch):
    m, co, size = 256, 512, (4, 4, 21, 13)
    x, dy = Operand("raw", _like(size, m, mean=1.0)), _like(size, co)
    w = (torch.randn(co, m, 1, 1, 1, device="cuda") / m**0.5).bfloat16()
    w = w.contiguous(memory_format=torch.channels_last_3d)
    norm = Norm.of(torch.nn.BatchNorm3d(co).cuda())
    kept, rows = _gram.gram(x, w, norm)

    def run():
        return _gram.gram_bwd(dy + 1, None, w, norm, rows, x, kept, 1, True)

    with monkeypatch.context() as patch:
        patch.setattr(_cuda, "gram_dgrad", None)
        own = run()
    monkeypatch.setattr(_gram, "_is_raw", lambda *_: False)
    theirs = run()
    assert own[1] == (None, None)
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(own[2:], theirs[2:]))
    assert (own[0].double() - theirs[0].double()).norm() <= 6e-3 * theirs[0].double().norm()
    da = own[0].double().movedim(1, -1).flatten(0, -2)
    assert (da.sum(0).abs() <= 3e-4 * da.abs().sum(0)).all()


@pytest.mark.gpu
def test_reasons_of_a_sum_over_two_tensors():
    x = _like((2, 3, 9, 5), 256)
    assert _cuda.gram_raw_why_not(x, _like((2, 3, 9, 5), 512)) is None
    assert "gradient at" in _cuda.gram_raw_why_not(x, _like((2, 3, 5, 3), 512))
    assert "multiple" in _cuda.gram_raw_why_not(x, _like((2, 3, 9, 5), 96))
    assert "dtype" in _cuda.gram_raw_why_not(x.float(), x.float())
    g, x, w, c = _beside((1, 2, 3, 3), 64, 128)
    for wrong in ((x, x, w, c), (g, x, w[:-1], c), (g, x, w, c[:, :-1])):
        with pytest.raises(ValueError, match="expected"):
            _cuda.gram_raw(*wrong)


@pytest.mark.gpu
def test_a_tile_that_there_is_not():
    x = Operand("raw", _like((1, 1, 3, 3), 256))
    for tile in ((128, 64, 1), (64, 64, 2), (64, 256, 1)):
        with pytest.raises(RuntimeError, match="tile"):
            _cuda.conv_train(x, _weight(x, 256), stats=True, tile=tile)
    with pytest.raises(RuntimeError, match="tile"):
        _cuda.conv_train(x, _weight(x, 256, 1, True), True, tile=(128, 256, 1))
