"""The Hopper kernels of the stem against float64: sizes, dtypes, layouts, wirings, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import p3d_kernels as p3d
from p3d_kernels import _backends, reference
from p3d_kernels.ops import _cuda, _tape
from p3d_kernels.ops.max_pool import pool_fwd
from p3d_kernels.ops.stem import pack_stem_weight, stem, stem_infer
from test_stem import emulated_relu, pooled_raw
from tolerance import check

pytestmark = pytest.mark.usefixtures("hopper")

HALVES = (torch.bfloat16, torch.float16)
PIXELS = (torch.bfloat16, torch.float16, torch.float32, torch.uint8)
MEAN, STD = (110.0, 99.0, 94.0, 128.0), (59.0, 54.0, 56.0, 64.0)
# N, Ci, T, H, W: one tile of each width and several, strips, cut windows, odd and small sizes, 1 to 4 channels.
SIZES = [
    (1, 3, 2, 16, 16),
    (1, 3, 16, 160, 160),
    (2, 3, 5, 37, 53),
    (40, 3, 4, 20, 24),
    (2, 3, 15, 111, 113),
    (1, 3, 8, 112, 112),
    (3, 3, 4, 30, 128),
    (2, 3, 3, 224, 224),
    (1, 3, 2, 17, 700),
    (1, 3, 2, 5, 5),
    (2, 2, 16, 160, 160),
    (1, 2, 3, 21, 300),
    (2, 1, 4, 33, 47),
    (1, 4, 4, 40, 56),
    (1, 4, 3, 19, 250),
]


def _names(shape):
    return "x".join(map(str, shape))


def _pixels(shape, dtype):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, device="cuda", dtype=dtype)
    return torch.randn(shape, device="cuda").to(dtype)


def _laid_out(x, layout):
    """The same clip in other memory."""
    if layout == "ndhwc":
        return x.to(memory_format=torch.channels_last_3d)
    wide = x.new_zeros(*x.shape[:-1], 2 * x.size(-1) + 16)
    view = {
        "planes": wide[..., : x.size(-1)].contiguous(),
        "cropped": wide[..., 16 : 16 + x.size(-1)],
        "shifted": wide[..., 1 : 1 + x.size(-1)],
        "strided": wide[..., : 2 * x.size(-1) : 2],
        "frames last": wide.new_zeros(*x.shape[:2], *x.shape[3:], x.size(2)).permute(0, 1, 4, 2, 3),
    }[layout]
    return view.copy_(x)


def _weight(ci):
    return torch.randn(64, ci, 1, 7, 7, device="cuda") / (49 * ci) ** 0.5


def _record():
    """mean, scale of either sign, bias."""
    return torch.stack([0.3 * torch.randn(64), torch.randn(64), 0.5 * torch.randn(64)]).cuda()


def _statistics(x):
    return (MEAN[: x.size(1)], STD[: x.size(1)]) if x.dtype == torch.uint8 else (None, None)


def _run(x, w, record, wiring, dtype):
    return _cuda.stem_infer(x, _cuda.stem_pack(w, dtype), record, wiring, *_statistics(x))


def _pool(u, wiring):
    geometry = reference.stem_pool(wiring)
    return reference.max_pool(u, **geometry)


def _reference(x, w, record, wiring, dtype):
    if x.dtype == torch.uint8:
        mean, std = (torch.tensor(v, device="cuda").view(1, -1, 1, 1, 1) for v in _statistics(x))
        x = (x - mean) / std
    z = F.conv3d(x.to(dtype).double(), w.to(dtype).double(), stride=(1, 2, 2), padding=(0, 3, 3))
    mean, scale, bias = (row.double().view(1, -1, 1, 1, 1) for row in record)
    return _pool(torch.relu((z - mean) * scale + bias), wiring)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("layout", ["planes", "ndhwc"])
@pytest.mark.parametrize("shape", SIZES, ids=_names)
def test_sizes(shape, layout, wiring, dtype):
    x, w, record = _laid_out(_pixels(shape, dtype), layout), _weight(shape[1]), _record()
    y = _run(x, w, record, wiring, dtype)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last_3d)
    check(y, _reference(x, w, record, wiring, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "ndhwc", "cropped", "shifted", "strided", "frames last"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_and_layouts(channels, pixels, dtype, layout):
    w, record = _weight(channels), _record()
    for width, wiring in ((72, "author"), (45, "port")):
        x = _laid_out(_pixels((2, channels, 3, 22, width), pixels), layout)
        check(_run(x, w, record, wiring, dtype), _reference(x, w, record, wiring, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("wiring", reference.WIRINGS)
def test_channels_far_from_zero(wiring):
    x, w, record = _pixels((2, 3, 4, 40, 48), torch.bfloat16) + 20, _weight(3), _record()
    record[0] = 20 * w.bfloat16().float().sum((1, 2, 3, 4))
    check(_run(x, w, record, wiring, torch.float16), _reference(x, w, record, wiring, torch.float16), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("width", [48, 45])
def test_what_is_not_finite_stays_near_its_pixel(width, wiring, value):
    x, w, record = _pixels((2, 3, 4, 40, width), torch.bfloat16), _weight(3), _record()
    hit = torch.zeros(2, 1, 4, 40, width, device="cuda")
    for n, c, t, h, column in ((0, 1, 1, 0, 0), (0, 2, 2, 21, 20), (1, 0, 3, 39, width - 1), (1, 2, 0, 12, 31)):
        x[n, c, t, h, column], hit[n, 0, t, h, column] = value, 1
    y = _run(x, w, record, wiring, torch.bfloat16)
    clean = _run(x.where(hit == 0, 0), w, record, wiring, torch.bfloat16)
    # A window, and the pixel before it, which meets a zero weight.
    near = F.conv3d(F.pad(hit, (4, 3, 3, 3)), torch.ones(1, 1, 1, 7, 8, device="cuda"), stride=(1, 2, 2))
    near = (_pool(near, wiring) > 0).expand_as(y)
    assert (_reference(x, w, record, wiring, torch.bfloat16).isfinite() | ~y.isfinite()).all()
    assert (y.isfinite() | near).all() and torch.equal(y[~near], clean[~near])
    if value != value:
        assert _reference(x, w, record, wiring, torch.bfloat16).isnan().any()


@pytest.mark.gpu
def test_the_order_of_maximum_and_normalisation_is_the_channel_s_own():
    x, w, record = _pixels((1, 3, 4, 32, 40), torch.bfloat16), _weight(3), _record()
    record[1, :8], record[2, 4:8] = 0, -1
    y = _run(x, w, record, "author", torch.bfloat16)
    check(y, _reference(x, w, record, "author", torch.bfloat16), torch.bfloat16)
    assert torch.equal(y[0, :4], record[2, :4].relu().bfloat16().view(-1, 1, 1, 1).expand_as(y[0, :4]))
    assert (y[0, 4:8] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
def test_runs_are_equal_and_a_batch_is_its_clips(pixels):
    x, w, record = _pixels((37, 3, 6, 44, 56), pixels), _weight(3), _record()
    y = _run(x, w, record, "port", torch.bfloat16)
    assert torch.equal(_run(x, w, record, "port", torch.bfloat16), y)
    for n in (0, 36):  # planned otherwise, but every output is the same sum
        assert torch.equal(_run(x[n : n + 1], w, record, "port", torch.bfloat16), y[n : n + 1])


@pytest.mark.gpu
def test_a_graph_can_hold_it():
    x, w, record = _pixels((2, 3, 4, 40, 48), torch.bfloat16), _cuda.stem_pack(_weight(3), torch.bfloat16), _record()
    expected = _cuda.stem_infer(x, w, record, "author")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _cuda.stem_infer(x, w, record, "author")
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_more_than_2_31_pixels():
    """The last of 1,800 clips must come out as it does alone."""
    x = torch.empty(1800, 3, 16, 160, 160, device="cuda", dtype=torch.uint8)
    x[-1:] = _pixels((1, *x.shape[1:]), torch.uint8)
    w, record = _weight(3), _record()
    y = _run(x, w, record, "author", torch.bfloat16)[-1:]
    assert torch.equal(y, _run(x[-1:], w, record, "author", torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("wiring", reference.WIRINGS)
def test_the_op_takes_it(wiring):
    w, record = _weight(3).bfloat16(), torch.cat([_record(), torch.ones(2, 64, device="cuda")])
    packed = pack_stem_weight(w, torch.bfloat16)
    for dtype in PIXELS:
        x = _pixels((2, 3, 4, 40, 48), dtype)
        y = stem_infer(x, w, packed, record, wiring, *_statistics(x))
        assert torch.equal(y, _run(x, w, record, wiring, torch.bfloat16))
        with p3d.use_backend("triton"):
            check(y, stem_infer(x, w, packed, record, wiring, *_statistics(x)).double(), torch.bfloat16)


@pytest.mark.gpu
def test_an_empty_batch():
    y = _run(_pixels((0, 3, 4, 40, 48), torch.bfloat16), _weight(3), _record(), "author", torch.bfloat16)
    assert y.shape == (0, 64, 2, 10, 12)


# N, Ci, T, H, W: one tile a row and several, lone and odd rows and columns, blocks of one tile and of many.
WGRAD_SIZES = [
    *SIZES,
    (1, 3, 2, 7, 330),
    (3, 4, 5, 23, 161),
    (2, 2, 3, 6, 322),
    (1, 1, 7, 160, 160),
    (16, 3, 16, 64, 64),
]


def _gradient(x, w, wiring, dtype):
    """(g, tap, record, sums) of a stem's backward, some windows off."""
    z = _conv(x, w, dtype)
    record = torch.cat([_record(), torch.ones(2, 64, device="cuda")])
    y, tap, _ = pool_fwd(z, **reference.stem_pool(wiring), record=record, save_tap=True)
    return torch.randn_like(y), tap, record, 0.1 * torch.randn(4, 64, device="cuda")


def _exact(x, w, dtype):
    return F.conv3d(x.to(dtype).double(), w.to(dtype).double(), stride=(1, 2, 2), padding=(0, 3, 3))


def _conv(x, w, dtype):
    return _exact(x, w, dtype).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def _wgrad_part(x, g, tap, w, record, sums, wiring):
    """[R, 64 Ci, 64], NaN where the kernel writes nothing."""
    native, shape = _backends.native(), (*x.shape, wiring == "port")
    part = torch.full((native.stem_wgrad_partials(*shape), 64 * x.size(1), 64), torch.nan, device="cuda")
    types = (str(t.dtype).removeprefix("torch.") for t in (x, w, g))
    pointers = (t.data_ptr() for t in (x, g, tap, w, record, sums, part))
    native.stem_wgrad(*pointers, *shape, x.stride(), *types, torch.cuda.current_stream().cuda_stream)
    return part


def _wgrad(x, g, tap, w, record, sums, wiring):
    """dw / scale [64, Ci, 7, 7]."""
    part = _wgrad_part(x, g, tap, w, record, sums, wiring).sum(0)
    return part[: 56 * x.size(1)].view(7, x.size(1), 8, 64)[:, :, 1:].permute(3, 1, 0, 2)


def _routed(g, tap, sizes, padded):
    """What the pool sends to positions: each sums its windows in their order, rounded to the dtype."""

    def windows(size, pooled, which):  # of each position: window, tap, whether there is such a one
        at = torch.arange(size, device="cuda") + padded
        window, odd = at // 2, at % 2
        tap = odd if which else 2 - odd
        window = window if which else window - 1 + odd
        there = (window >= 0) & (window < pooled) & ((odd == 0) if which else (odd >= 0))
        return window.clamp(0, pooled - 1), tap, there

    frame = torch.arange(sizes[0], device="cuda")
    frames, first, real = (frame // 2).clamp(max=g.size(2) - 1), frame % 2 * 9, frame // 2 < g.size(2)
    total = torch.zeros((*g.shape[:2], *sizes), device="cuda", dtype=g.dtype)
    for a in (0, 1):
        rows, kh, row = windows(sizes[1], g.size(3), a)
        for b in (0, 1):
            columns, kw, column = windows(sizes[2], g.size(4), b)
            there = real.view(-1, 1, 1) & row.view(-1, 1) & column
            code = first.view(-1, 1, 1) + 3 * kh.view(-1, 1) + kw
            value, taken = (t[:, :, frames][:, :, :, rows][..., columns] for t in (g, tap))
            total += value.where(there & (taken == code), 0)
    return total


def _check_wgrad(dw, x, g, tap, w, record, sums, wiring, flips=0.0):
    """Against float64 of dz as the kernel rounds it, now and then to the other neighbour; so z, of a share `flips`."""
    z = _conv(x, w, g.dtype)
    routed = _routed(g, tap, z.shape[2:], wiring == "port").float()
    mean, c0, c1 = (row.view(1, -1, 1, 1, 1) for row in (record[0], *sums[:2]))
    dz = ((mean - z.float()).double() * c1 + (routed - c0).double()).float()
    x, dz = x.to(g.dtype).double(), dz.to(g.dtype).double()

    def gradient(x, dz):
        w = torch.zeros(64, x.size(1), 1, 7, 7, device="cuda", dtype=torch.float64, requires_grad=True)
        F.conv3d(x, w, stride=(1, 2, 2), padding=(0, 3, 3)).backward(dz)
        return w.grad[:, :, 0]

    eps = torch.finfo(g.dtype).eps
    bound = 1e-5 * gradient(x.abs(), dz.abs()) + 2 * eps * dz.abs().max() * x.abs().max() + 1e-30
    bound += eps * (z.double() * c1).abs().max() * x.abs().max() * (flips * z[:, 0].numel()) ** 0.5
    error = (dw - gradient(x, dz)).abs()
    assert (error <= bound).all(), f"error {error.max():.3g} where {bound.flatten()[error.argmax()]:.3g} is allowed"


def _judge_wgrad(x, w, wiring, dtype):
    g, tap, record, sums = _gradient(x, w, wiring, dtype)
    given = x, g, tap, w, record, sums, wiring
    dw = _wgrad(*given)
    _check_wgrad(dw, *given)
    assert torch.equal(_wgrad(*given), dw)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("shape", WGRAD_SIZES, ids=_names)
def test_wgrad_sizes(shape, wiring, dtype):
    _judge_wgrad(_pixels(shape, torch.float32), _weight(shape[1]), wiring, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "ndhwc", "cropped", "shifted", "strided", "frames last"])
@pytest.mark.parametrize("pixels", PIXELS[:3], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_wgrad_pixels_and_layouts(channels, pixels, layout):
    for width, wiring, dtype, weights in (
        (72, "author", torch.bfloat16, torch.float32),
        (45, "port", torch.float16, torch.bfloat16),
        (160, "port", torch.bfloat16, torch.float16),
    ):
        x = _laid_out(_pixels((2, channels, 3, 22, width), pixels), layout)
        _judge_wgrad(x, _weight(channels).to(weights), wiring, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wiring", reference.WIRINGS)
def test_wgrad_far_from_zero(wiring, dtype):
    x, w = _pixels((4, 3, 4, 80, 96), torch.float32) / 10 + 20, _weight(3)
    g, tap, record, sums = _gradient(x, w, wiring, dtype)
    record[0] = _conv(x, w, dtype).float().mean((0, 2, 3, 4))
    given = x, g, tap, w, record, sums, wiring
    _check_wgrad(_wgrad(*given), *given, flips=0.02)


@pytest.mark.gpu
def test_wgrad_of_a_constant_is_what_rounding_leaves():
    """(z - mean) c1 sums to zero but for the rounding of each: so z must be here what it was in the forward."""
    x, w = _pixels((2, 3, 4, 80, 160), torch.bfloat16), _weight(3)
    x[:, 0] = 1
    g, tap, record, sums = _gradient(x, w, "author", torch.float16)
    z = _conv(x, w, torch.float16).double()
    mean = z.mean((0, 2, 3, 4), keepdim=True).float()
    record[0], sums[0], sums[1] = mean.flatten(), 0, 1
    dw = _wgrad(x, torch.zeros_like(g), tap, w, record, sums, "author")[:, 0, 3, 3]  # meets all ones, never the border
    want = (mean - z.float()).half().double().sum((0, 2, 3, 4))
    assert ((dw - want).abs() <= 1e-5 * (z - mean).abs().sum((0, 2, 3, 4))).all()


@pytest.mark.gpu
def test_wgrad_of_a_graph_that_runs_twice():
    x, w = _pixels((2, 3, 4, 40, 48), torch.float32), _weight(3)
    g, tap, record, sums = _gradient(x, w, "author", torch.bfloat16)
    given = x, g, tap, w, record, sums, "author"
    _wgrad(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dw = _wgrad(*given)
    g.copy_(torch.randn_like(g)), w.copy_(_weight(3))
    graph.replay()
    assert torch.equal(dw, _wgrad(*given))


@pytest.mark.gpu
def test_wgrad_routes_a_gradient_that_is_not_finite_to_its_channel():
    x, w = _pixels((1, 3, 2, 20, 24), torch.float32), _weight(3)
    g, tap, record, sums = _gradient(x, w, "port", torch.bfloat16)
    clean = _wgrad(x, g, tap, w, record, sums, "port")
    g[0, 5, 0, 2, 2], tap[0, 5, 0, 2, 2] = torch.nan, 4
    dw = _wgrad(x, g, tap, w, record, sums, "port")
    others = torch.arange(64, device="cuda") != 5
    assert dw[5].isnan().all() and torch.equal(dw[others], clean[others])


@pytest.mark.gpu
@pytest.mark.parametrize("wiring", reference.WIRINGS)
def test_the_op_takes_the_wgrad(wiring, monkeypatch):
    x, w = _pixels((2, 3, 4, 40, 48), torch.float32), _weight(3)
    weight, bias = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
    taken = []
    kernel = _cuda.stem_wgrad
    monkeypatch.setattr(_tape, "_tapes", {})
    monkeypatch.setattr(_cuda, "stem_wgrad", lambda *a: taken.append(a) or kernel(*a))

    def run(backend):
        leaves = [t.clone().requires_grad_() for t in (w, weight, bias)]
        with p3d.use_backend(backend), torch.autocast("cuda", torch.bfloat16):
            y = stem(x, leaves[0], p3d.Norm(*leaves[1:]), wiring)
            y.backward(torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype))
        return leaves[0].grad

    dw = run(None)
    count = len(taken)  # a tape is recorded after its kernels are compiled by a run that launches none
    theirs = run("triton")
    assert len(taken) == count > 0 and (dw - theirs).norm() <= 3e-3 * theirs.norm()  # each rounds dz by itself


@pytest.mark.gpu
def test_wgrad_of_more_than_2_31_elements():
    """Of 2,700 clips only the last has a gradient: it must come out as it does alone."""
    w, clips = _weight(3), 2700
    x = torch.empty(clips, 3, 16, 160, 160, device="cuda", dtype=torch.bfloat16)
    x[:-1], x[-1:] = 1, _pixels((1, *x.shape[1:]), torch.bfloat16)
    g, tap, record, sums = _gradient(x[-1:], w, "author", torch.bfloat16)
    alone = _wgrad(x[-1:], g, tap, w, record, torch.zeros_like(sums), "author")
    many = []
    for t in (g, tap):
        many.append(t.new_zeros((clips, *(t.size(i) for i in (2, 3, 4, 1)))).permute(0, 4, 1, 2, 3))
        many[-1][-1:] = t
    dw = _wgrad(x, *many, w, record, torch.zeros_like(sums), "author")
    assert alone.norm() > 0 and (dw - alone).norm() <= 1e-3 * alone.norm()  # summed in other parts

    memory = torch.empty(2**31 + 3 * 4 * 40 * 48, device="cuda", dtype=torch.bfloat16)
    far = memory.as_strided((2, 3, 4, 40, 48), (2**31, 4 * 40 * 48, 40 * 48, 48, 1))
    far.copy_(_pixels(far.shape, torch.float32))
    given = _gradient(far, w, "port", torch.bfloat16)
    near = (_wgrad(x, *given[:2], w, *given[2:], "port") for x in (far, far.clone()))
    assert torch.equal(*near)


FWD_SIZES = [*WGRAD_SIZES, (3, 3, 1, 31, 40), (70, 3, 5, 18, 64)]  # lone frames, strips of an odd number of pairs


def _statistics_of(part):
    """(n, mean, M2) [64], float64, of the partial statistics."""
    n, mean, m2 = part.double().unbind(1)
    total = n.sum(0)
    joint = (n * mean).sum(0) / total
    return total, joint, (m2 + n * (mean - joint) ** 2).sum(0)


def _gamma():
    """Slopes of both signs, some 0 and no number."""
    gamma = torch.randn(64, device="cuda")
    gamma[7], gamma[40], gamma[50] = 0, -0.0, torch.nan
    return gamma


def _judge_statistics(part, z):
    """z [N, 64, T, Ho, Wo], float64."""
    seen = z.movedim(1, -1).flatten(0, -2)
    n, mean, m2 = _statistics_of(part)
    deviation = seen.std(0, correction=0)
    assert (n == len(seen)).all()
    assert ((mean - seen.mean(0)).abs() <= 1e-4 * deviation + 1e-6 * seen.mean(0).abs()).all()
    assert ((m2 / n - deviation**2).abs() <= 1e-4 * deviation**2 + 1e-12 * seen.mean(0) ** 2).all()


def _judge_fwd(x, w, dtype, wiring):
    """z is judged by its pool, and a tap by z where it points: sums in another order round some z otherwise."""
    gamma = _gamma()
    pooled, tap, part = _cuda.stem_fwd(x, w, gamma, dtype, wiring, True, True)
    assert pooled.dtype == dtype and pooled.is_contiguous(memory_format=torch.channels_last_3d)
    assert tap.shape == pooled.shape and tap.is_contiguous(memory_format=torch.channels_last_3d)
    exact = _exact(x, w, dtype)
    z = exact.to(dtype).double()
    check(pooled, pooled_raw(exact, gamma, wiring)[0], dtype)
    _judge_statistics(part, z)
    (_, pad, _), sizes = reference.stem_pool(wiring)["padding"], z.shape[2:]
    grid = torch.meshgrid(*(2 * torch.arange(s, device="cuda") for s in tap.shape[2:]), indexing="ij")
    taps = tap.long()
    at = [grid[0] + taps // 9, grid[1] - pad + taps // 3 % 3, grid[2] - pad + taps % 3]
    assert all(((i >= 0) & (i < size)).all() for i, size in zip(at, sizes))
    taken = z.flatten(2).gather(2, ((at[0] * sizes[1] + at[1]) * sizes[2] + at[2]).flatten(2)).view(pooled.shape)
    check(pooled, taken, dtype)
    for again, first in zip(_cuda.stem_fwd(x, w, gamma, dtype, wiring, True, True), (pooled, tap, part)):
        assert torch.equal(again, first)
    alone, *none = _cuda.stem_fwd(x, w, gamma, dtype, wiring)
    assert none == [None, None] and torch.equal(alone, pooled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("layout", ["planes", "ndhwc"])
@pytest.mark.parametrize("shape", FWD_SIZES, ids=_names)
def test_fwd_sizes(shape, layout, wiring, dtype):
    if wiring == "port" and shape[2] == 1:
        pytest.skip("no window of two frames fits")
    _judge_fwd(_laid_out(_pixels(shape, dtype), layout), _weight(shape[1]), dtype, wiring)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("shape", FWD_SIZES, ids=_names)
def test_fwd_takes_the_first_of_equal_values(shape, wiring, dtype):
    """Of small integers every sum is exact: bits and taps are those of the definition, ties and all."""
    if wiring == "port" and shape[2] == 1:
        pytest.skip("no window of two frames fits")
    x = torch.randint(-2, 3, shape, device="cuda").float()
    x[..., : shape[-1] // 3] = 0  # and a border on which all are equal
    w, gamma = torch.randint(-1, 2, (64, shape[1], 1, 7, 7), device="cuda").float(), _gamma()
    pooled, tap, part = _cuda.stem_fwd(x, w, gamma, dtype, wiring, True, True)
    z = _conv(x, w, dtype).double()
    expected, taps = pooled_raw(z, gamma, wiring)
    assert torch.equal(pooled.double(), expected) and torch.equal(tap.long(), taps)
    _judge_statistics(part, z)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "ndhwc", "cropped", "shifted", "strided", "frames last"])
@pytest.mark.parametrize("pixels", PIXELS[:3], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_fwd_pixels_and_layouts(channels, pixels, layout):
    for width, dtype, weights, wiring in (
        (72, torch.bfloat16, torch.float32, "author"),
        (45, torch.float16, torch.bfloat16, "port"),
    ):
        x = _laid_out(_pixels((2, channels, 3, 22, width), pixels), layout)
        _judge_fwd(x, _weight(channels).to(weights), dtype, wiring)


@pytest.mark.gpu
@pytest.mark.parametrize("gammas", [None, *PIXELS[:3]], ids=str)
def test_fwd_gamma(gammas):
    x, w = _pixels((2, 3, 4, 40, 48), torch.bfloat16), _weight(3)
    gamma = None if gammas is None else torch.randn(65, device="cuda").to(gammas)[1:]
    pooled, *_ = _cuda.stem_fwd(x, w, gamma, torch.bfloat16, "author")
    check(pooled, pooled_raw(_exact(x, w, torch.bfloat16), gamma, "author")[0], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("weights", PIXELS[:3], ids=str)
def test_fwd_far_from_zero(weights, wiring):
    x, w = _pixels((4, 3, 4, 80, 96), torch.float32) / 10 + 20, _weight(3).to(weights)
    _judge_fwd(x, w, torch.float16, wiring)
    x[:, :, :, :40] = 0  # what the sums start from is not near the mean
    _judge_fwd(x, w, torch.float16, wiring)


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", PIXELS[:3], ids=str)
def test_fwd_of_a_batch_is_that_of_its_clips(pixels):
    x, w, gamma = _pixels((37, 3, 6, 44, 56), pixels), _weight(3), _gamma()
    pooled, tap, _ = _cuda.stem_fwd(x, w, gamma, torch.bfloat16, "port", save_tap=True)
    for n in (0, 36):  # planned otherwise, but every output is the same sum
        alone = _cuda.stem_fwd(x[n : n + 1], w, gamma, torch.bfloat16, "port", save_tap=True)
        assert torch.equal(alone[0], pooled[n : n + 1]) and torch.equal(alone[1], tap[n : n + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("width", [48, 45])
def test_fwd_keeps_what_is_not_finite_near_its_pixel(width, wiring, value):
    x, w, gamma = _pixels((2, 3, 4, 40, width), torch.bfloat16), _weight(3), _gamma().nan_to_num()
    hit = torch.zeros(2, 1, 4, 40, width, device="cuda")
    for n, c, t, h, column in ((0, 1, 1, 0, 0), (0, 2, 2, 21, 20), (1, 0, 3, 39, width - 1), (1, 2, 0, 12, 31)):
        x[n, c, t, h, column], hit[n, 0, t, h, column] = value, 1
    pooled, tap, part = _cuda.stem_fwd(x, w, gamma, torch.bfloat16, wiring, True, True)
    clean, _, _ = _cuda.stem_fwd(x.where(hit == 0, 0), w, gamma, torch.bfloat16, wiring)
    near = F.conv3d(F.pad(hit, (4, 3, 3, 3)), torch.ones(1, 1, 1, 7, 8, device="cuda"), stride=(1, 2, 2))
    near = (_pool(near, wiring) > 0).expand_as(pooled)
    assert pooled[~near].isfinite().all() and torch.equal(pooled[~near], clean[~near]) and tap.le(17).all()
    reached = pooled_raw(_exact(x, w, torch.bfloat16), gamma, wiring)[0]
    assert pooled[reached.isnan()].isnan().all() and not pooled[reached.isinf()].isfinite().any()
    assert _statistics_of(part)[2].isnan().all()


@pytest.mark.gpu
def test_fwd_in_a_graph():
    x, w, gamma = _pixels((2, 3, 4, 40, 48), torch.float32), _weight(3), _gamma()
    arguments = gamma, torch.bfloat16, "author", True, True
    _cuda.stem_fwd(x, w, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _cuda.stem_fwd(x, w, *arguments)
    x.copy_(_pixels(x.shape, torch.float32)), w.copy_(_weight(3)), gamma.neg_()
    graph.replay()
    for a, b in zip(found, _cuda.stem_fwd(x, w, *arguments)):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_fwd_of_more_than_2_31_elements():
    x, w, gamma = torch.randn(2700, 3, 16, 160, 160, device="cuda", dtype=torch.bfloat16), _weight(3), _gamma()
    pooled, tap, part = _cuda.stem_fwd(x, w, gamma, torch.bfloat16, "author", True, True)
    for i in (0, 1350, 2699):
        alone = _cuda.stem_fwd(x[i : i + 1], w, gamma, torch.bfloat16, "author", save_tap=True)
        assert torch.equal(pooled[i : i + 1], alone[0]) and torch.equal(tap[i : i + 1], alone[1])
    assert (_statistics_of(part)[0] == len(x) * 16 * 80 * 80).all()

    memory = torch.empty(2**31 + 3 * 4 * 40 * 48, device="cuda", dtype=torch.bfloat16)
    far = memory.as_strided((2, 3, 4, 40, 48), (2**31, 4 * 40 * 48, 40 * 48, 48, 1))
    far.copy_(_pixels(far.shape, torch.float32))
    near, _, _ = _cuda.stem_fwd(far.clone(), w, gamma, torch.bfloat16, "port")
    assert torch.equal(_cuda.stem_fwd(far, w, gamma, torch.bfloat16, "port")[0], near)


@pytest.mark.gpu
def test_fwd_of_an_empty_batch():
    x = _pixels((0, 3, 4, 40, 48), torch.bfloat16)
    pooled, tap, part = _cuda.stem_fwd(x, _weight(3), None, torch.bfloat16, "author", True, True)
    assert pooled.shape == tap.shape == (0, 64, 2, 10, 12) and part.shape == (1, 3, 64) and not part.any()


def _judge_relu(x, w, dtype, wiring, gammas=torch.float32):
    """Windows whose u is near zero may be on or off: it is rounded otherwise."""
    gamma = _gamma().nan_to_num(-1).to(gammas)
    pooled, tap, _ = _cuda.stem_fwd(x, w, gamma, dtype, wiring, save_tap=True)
    record = torch.cat([_record(), torch.ones(2, 64, device="cuda")])
    record[1] = gamma.float() * (1 + record[1].abs())
    first, taps = pooled.clone(), tap.clone()
    want = emulated_relu(first, record, taps, x, w, gamma, wiring)
    y = _cuda.stem_relu(pooled, record, tap, x, w, gamma, wiring)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last_3d)
    check(y, want.double(), dtype)
    check(pooled, first.double(), dtype)
    assert torch.equal(pooled[:, gamma != 0], first[:, gamma != 0])
    mean, scale, bias = (row.double().view(1, -1, 1, 1, 1) for row in record[:3])
    near = ((first.double() - mean) * scale + bias).abs() < 1e-4
    assert torch.equal(tap[~near], taps[~near]) and ((tap == taps) | (tap == 255) | (taps == 255)).all()
    assert torch.equal(_cuda.stem_relu(pooled, record, None, x, w, gamma, wiring), y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("shape", FWD_SIZES, ids=_names)
def test_relu_sizes(shape, wiring, dtype):
    if wiring == "port" and shape[2] == 1:
        pytest.skip("no window of two frames fits")
    _judge_relu(_pixels(shape, torch.float32), _weight(shape[1]), dtype, wiring)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["ndhwc", "cropped", "strided", "frames last"])
@pytest.mark.parametrize("pixels", PIXELS[:3], ids=str)
def test_relu_pixels_and_layouts(pixels, layout):
    for channels, dtype, weights, wiring in ((3, *HALVES, "author"), (2, *HALVES[::-1], "port")):
        x = _laid_out(_pixels((2, channels, 5, 22, 45), pixels), layout)
        _judge_relu(x, _weight(channels).to(weights), dtype, wiring, gammas=weights)


@pytest.mark.gpu
def test_relu_keeps_nan_and_infinity():
    x, w, record = _pixels((1, 3, 2, 24, 32), torch.float32), _weight(3), _record()
    record[1] = 1
    pooled, tap, _ = _cuda.stem_fwd(x, w, None, torch.bfloat16, "port", save_tap=True)
    pooled[0, 5, 0, 1, 1], pooled[0, 6, 0, 1, 1], pooled[0, 7, 0, 1, 1] = torch.nan, torch.inf, -torch.inf
    before = tap.clone()
    y = _cuda.stem_relu(pooled, record, tap, x, w, None, "port")
    assert y[0, 5, 0, 1, 1].isnan() and y[0, 6, 0, 1, 1] == torch.inf and y[0, 7, 0, 1, 1] == 0
    assert torch.equal(tap[0, 5:7, 0, 1, 1], before[0, 5:7, 0, 1, 1]) and tap[0, 7, 0, 1, 1] == 255
    assert y.isnan().sum() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wiring", reference.WIRINGS)
def test_the_op_takes_the_fwd(wiring, training, monkeypatch):
    x, w = _pixels((2, 3, 5, 40, 48), torch.float32), _weight(3)
    weight, bias = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
    weight[3], bias[3] = 0, 1
    taken = []
    kernel = _cuda.stem_fwd
    monkeypatch.setattr(_tape, "_tapes", {})
    monkeypatch.setattr(_cuda, "stem_fwd", lambda *a: taken.append(a) or kernel(*a))

    def run(backend):
        mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
        leaves = [t.clone().requires_grad_() for t in (x, w, weight, bias)]
        with p3d.use_backend(backend), torch.autocast("cuda", torch.bfloat16):
            y = stem(*leaves[:2], p3d.Norm(*leaves[2:], mean, var, training=training), wiring)
            y.backward(torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype))
        return y.detach().float(), *(leaf.grad for leaf in leaves), mean, var

    ours = run(None)
    count = len(taken)
    theirs = run("triton")
    assert len(taken) == count > 0
    for name, a, b in zip(("y", "dx", "dw", "dweight", "dbias", "mean", "var"), ours, theirs):
        assert (a - b).norm() <= (4e-3 if name in ("y", "mean", "var") else 2e-2) * b.norm(), name


@pytest.mark.gpu
def test_z_is_not_stored():
    x, w = _pixels((8, 3, 16, 160, 160), torch.bfloat16), _weight(3).bfloat16().requires_grad_()
    stem(x, w, p3d.Norm())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = stem(x, w, p3d.Norm())
    assert y.requires_grad and torch.cuda.max_memory_allocated() - before < 3 * y.numel() * y.element_size()


@pytest.mark.gpu
def test_native_reasons():
    x = torch.empty(1, 5, 2, 16, 16, device="cuda", dtype=torch.bfloat16)
    assert "channels" in _cuda.stem_why_not(x, torch.bfloat16, 64, "port")
    assert "pool" in _cuda.stem_why_not(x[:, :3, :1], torch.bfloat16, 64, "port")
    assert _cuda.stem_why_not(x[:, :3], torch.bfloat16, 64, "port") is None
    assert _cuda.stem_why_not(x[:, :3, :1], torch.bfloat16, 64, "author") is None
    w = _weight(3)
    assert "stem_wgrad: channels" in _cuda.stem_wgrad_why_not(x, _weight(5), torch.bfloat16, "port")
    assert "pool" in _cuda.stem_wgrad_why_not(x[:, :3, :1], w, torch.bfloat16, "port")
    assert _cuda.stem_wgrad_why_not(x[:, :3], w, torch.bfloat16, "port") is None
    assert "stem_fwd: channels" in _cuda.stem_fwd_why_not(x, _weight(5), None, torch.bfloat16, "port")
    assert "pool" in _cuda.stem_fwd_why_not(x[:, :3, :1], w, None, torch.bfloat16, "port")
    assert _cuda.stem_fwd_why_not(x[:, :3, :1], w, None, torch.bfloat16, "author") is None


def test_reasons():
    x = torch.empty(1, 3, 2, 16, 16)
    assert "float32" in _cuda.stem_why_not(x, torch.float32, 64, "author")
    assert "float64" in _cuda.stem_why_not(x.double(), torch.float16, 64, "author")
    assert "32 output channels" in _cuda.stem_why_not(x, torch.float16, 32, "author")
    w = torch.empty(64, 3, 1, 7, 7)
    for why_not in (lambda *a: _cuda.stem_fwd_why_not(*a[:2], None, *a[2:]), _cuda.stem_wgrad_why_not):
        assert "dtype torch.float32" in why_not(x, w, torch.float32, "author")
        assert "uint8" in why_not(x.to(torch.uint8), w, torch.float16, "author")
        assert "weights of torch.float64" in why_not(x, w.double(), torch.float16, "author")
        assert "32 output channels" in why_not(x, w[:32], torch.float16, "author")
    gamma = torch.ones(64, dtype=torch.float64)
    assert "gamma of torch.float64" in _cuda.stem_fwd_why_not(x, w, gamma, torch.float16, "author")


def test_arguments_are_checked_before_any_launch():
    x, w = torch.zeros(1, 3, 2, 16, 16), torch.zeros(11, 128, 8, dtype=torch.float16)
    record, frames, ones = torch.zeros(5, 64), x.to(torch.uint8), (1.0, 1.0, 1.0)

    def run(x=x, w=w, record=record, *statistics):
        _cuda.stem_infer(x, w, record, "author", *statistics)

    for wrong, message in (
        ({"x": x.double()}, "x, w_packed: expected"),
        ({"w": w.float()}, "x, w_packed: expected"),
        ({"x": x[:, :2]}, "w_packed: expected .* 2 channels"),
        ({"x": x.expand(1, 3, 2, 16, 16).repeat(1, 2, 1, 1, 1)}, "w_packed: expected .* 6 channels"),
        ({"w": w[:7]}, "w_packed: expected"),
        ({"w": w.transpose(1, 2).contiguous().transpose(1, 2)}, "w_packed: expected"),
        ({"record": record[:2]}, r"record: expected float32 \[3, 64\]"),
        ({"x": frames}, "mean, std: expected both"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**wrong)
    with pytest.raises(ValueError, match="mean, std: expected both"):
        run(x, w, record, ones, ones)
    with pytest.raises(ValueError, match="mean, std: expected 3 numbers"):
        run(frames, w, record, ones[:2], ones)


def test_arguments_of_the_wgrad_are_checked_before_any_launch():
    def ndhwc(*shape, dtype=torch.float16):
        return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last_3d)

    x, w, g = torch.zeros(1, 3, 2, 16, 16), torch.zeros(64, 3, 1, 7, 7), ndhwc(1, 64, 1, 4, 4)
    given = {"x": x, "g": g, "tap": g.to(torch.uint8), "w": w, "record": torch.zeros(5, 64), "sums": torch.zeros(4, 64)}
    for name, wrong, message in (
        ("x", x.to(torch.uint8), "x, w, dtype: expected floats"),
        ("x", x[..., :12], "g: expected"),
        ("w", w.double(), "x, w, dtype: expected floats"),
        ("w", w[:, :2], r"w: expected contiguous \[64, 3, 1, 7, 7\]"),
        ("g", g.float(), "x, w, dtype: expected floats"),
        ("g", g.contiguous(), "g: expected channels_last_3d"),
        ("g", g[..., :3], "g: expected"),
        ("tap", g, "tap: expected torch.uint8"),
        ("record", torch.zeros(5, 32), r"record: expected float32 \[1, 64\]"),
        ("sums", torch.zeros(1, 64), r"sums: expected float32 \[2, 64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            _cuda.stem_wgrad(**{**given, name: wrong}, wiring="port")


def test_arguments_of_the_fwd_are_checked_before_any_launch():
    x, w, gamma = torch.zeros(1, 3, 2, 16, 16), torch.zeros(64, 3, 1, 7, 7), torch.zeros(64)
    for args, message in (
        ((x.to(torch.uint8), w, gamma, torch.float16), "x, w, dtype: expected floats"),
        ((x, w.double(), gamma, torch.float16), "x, w, dtype: expected floats"),
        ((x, w, gamma, torch.float32), "x, w, dtype: expected floats"),
        ((x[:, :2], w, gamma, torch.float16), r"w: expected contiguous \[64, 2, 1, 7, 7\]"),
        ((x, w[:32], gamma, torch.float16), "w: expected contiguous"),
        ((x, w.transpose(3, 4), gamma, torch.float16), "w: expected contiguous"),
        ((x, w, gamma[:32], torch.float16), r"gamma: expected contiguous floats \[64\]"),
        ((x, w, gamma.double(), torch.float16), "gamma: expected contiguous floats"),
    ):
        with pytest.raises(ValueError, match=message):
            _cuda.stem_fwd(*args, "author")


def test_packing_holds_every_weight_once():
    for channels in (1, 2, 3, 4):
        w = torch.arange(1, 64 * channels * 49 + 1, dtype=torch.float32).view(64, channels, 1, 7, 7)
        packed = _cuda.stem_pack(w, torch.float32)
        assert packed.shape == ({1: 7, 2: 7, 3: 11, 4: 14}[channels], 128, 8)
        assert torch.equal(packed[packed > 0].sort().values, w.flatten())
