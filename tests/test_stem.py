"""The stem against the reference in float64: geometry, layouts, normalisations, modes, registration, refusals."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F

import p3d_kernels as p3d
from cases import Case, evaluate, inputs, kind_of, reference_of
from p3d_kernels import Norm, _backends, reference
from p3d_kernels.ops import _cuda, _fused, _stem, _tape
from p3d_kernels.ops._stem import stem_conv, stem_pack
from p3d_kernels.ops._tape import Layout
from p3d_kernels.ops._triton import bn_finalise
from p3d_kernels.ops.stem import pack_stem_weight, stem, stem_infer, why_not
from tolerance import check


def wired(wiring):
    return (("wiring", wiring),)


# More tiles than the interpreter has programs; odd sizes, lone frames and columns, 1 to 4 channels in, any number out.
CASES = [
    Case("stem", (1, 3, 3, 17, 35), 16, layout="ncdhw", options=wired("author")),
    Case("stem", (1, 3, 5, 14, 16), 32, options=wired("port")),
    Case("stem", (2, 2, 2, 13, 9), 16, norm="no_affine", options=wired("port")),
    Case("stem", (2, 3, 1, 12, 11), 24, layout="sliced", norm="cumulative", options=wired("author")),
    Case("stem", (1, 4, 2, 8, 10), 16, norm="frozen", options=wired("port")),
    Case("stem", (1, 4, 2, 9, 6), 16, layout="ncdhw", norm="frozen_no_affine", options=wired("author")),
    Case("stem", (1, 1, 1, 9, 7), 80, layout="ncdhw", norm="no_tracking", options=wired("author")),
    Case("stem", (2, 3, 2, 12, 18), 16, offset=30, options=wired("author")),
    Case("stem", (1, 3, 2, 21, 2), 64, options=wired("port")),
]
HALF = (1, 5, 8)  # also in float16
SMALL = Case("stem", (1, 2, 2, 8, 7), 16, options=wired("port"))


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture
def triton(device):
    with p3d.use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        yield


def judge(case, actual, expected, dtype, tf32=False, vendor=None):
    for name, value in actual.items():
        if value.dtype == torch.int64:
            assert value.item() == expected[name].item(), name
        else:
            how = {"kind": kind_of(name), "tf32": tf32, "name": f"{case.id}: {name}"}
            theirs = None if vendor is None else vendor[name].to(dtype)
            check(value.to(dtype), expected[name], dtype, theirs, selects=vendor is not None, **how)


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in CASES] + [(CASES[i], torch.float16) for i in HALF],
    ids=lambda v: getattr(v, "id", str(v)),
)
def test_values_gradients_and_statistics(case, dtype, triton, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    given = inputs(case, dtype, device)
    expected = reference_of(given, dtype)
    actual = evaluate(stem, given.to(dtype))
    assert actual["y"].dtype == dtype and actual["y"].is_contiguous(memory_format=torch.channels_last_3d)
    judge(case, actual, expected, dtype)
    judge(case, evaluate(stem, given.to(dtype), grad=False), expected, dtype)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("layout", ["ncdhw", "sliced"])
def test_a_replay_is_what_was_recorded(layout, norm, triton, device, monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    monkeypatch.setattr(_fused, "_settled", {})
    case = dataclasses.replace(SMALL, layout=layout, norm=norm)
    given, again = (inputs(case, torch.float32, device).to(torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(given.leaves.values(), again.leaves.values()))
    first, second = evaluate(stem, given), evaluate(stem, again)
    assert len(_tape._tapes) == 2 and len(_fused._settled) == 1
    assert all(torch.equal(second[name], first[name]) for name in first)


def pooled_raw(z, gamma, wiring):
    """(pooled, tap) of a raw z as `_cuda.stem_fwd` means them: the least where gamma < 0, else the largest."""
    geometry = reference.stem_pool(wiring)
    sign = torch.where((torch.ones_like(z[0, :, 0, 0, 0]) if gamma is None else gamma) < 0, -1.0, 1.0)
    sign = sign.to(z.dtype).view(1, -1, 1, 1, 1)
    kernel, stride, padding, ceil_mode = (geometry[k] for k in ("kernel", "stride", "padding", "ceil_mode"))
    pooled, at = F.max_pool3d(z * sign, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
    tap = torch.zeros_like(at)
    for axis, inner in ((2, z.size(3) * z.size(4)), (3, z.size(4)), (4, 1)):
        shape = [1, 1, 1, 1, 1]
        shape[axis] = -1
        first = 2 * torch.arange(at.size(axis), device=z.device).view(shape) - padding[axis - 2]
        tap = 3 * tap + at // inner % z.size(axis) - first
    return pooled * sign, tap


def emulated_fwd(x, w, gamma, dtype, wiring, stats=False, save_tap=False):
    """`_cuda.stem_fwd` in plain PyTorch."""
    z = F.conv3d(x.to(dtype).float(), w.to(dtype).float(), stride=(1, 2, 2), padding=(0, 3, 3)).to(dtype)
    pooled, tap = pooled_raw(z.float(), gamma, wiring)
    seen = z.double().movedim(1, -1).flatten(0, -2)
    part = torch.stack([torch.full_like(seen[0], len(seen)), seen.mean(0), seen.var(0, correction=0) * len(seen)])
    layout = {"memory_format": torch.channels_last_3d}
    tap = tap.to(torch.uint8).contiguous(**layout) if save_tap else None
    return pooled.to(dtype).contiguous(**layout), tap, part.float()[None] if stats else None


def emulated_relu(pooled, record, tap, x, w, gamma, wiring):
    """`_cuda.stem_relu` in plain PyTorch."""
    if tap is not None and gamma is not None:
        flat, pads = gamma == 0, reference.stem_pool(wiring)["padding"]
        t, h, v = (2 * torch.arange(n, device=x.device) - pad for n, pad in zip(pooled.shape[2:], pads))
        z = F.conv3d(x.to(pooled.dtype).float(), w.to(pooled.dtype).float(), stride=(1, 2, 2), padding=(0, 3, 3))
        first = z[:, :, t][:, :, :, h.clamp(0)][..., v.clamp(0)].to(pooled.dtype)
        pooled[:, flat] = first[:, flat]
        tap[:, flat] = (3 * (h < 0).byte()[:, None] + (v < 0).byte()).expand_as(tap[:, flat])
    mean, scale, bias = (row.view(1, -1, 1, 1, 1) for row in record[:3])
    u = (pooled.float() - mean) * scale + bias
    if tap is not None:
        tap[u <= 0] = 255
    return torch.where(u < 0, 0, u).to(pooled.dtype)


def emulate(monkeypatch):
    """The path that pools before it normalises, of any channels and dtype, its CUDA kernels in plain PyTorch."""
    monkeypatch.setattr(_stem, "pools_raw", lambda *a: True)
    monkeypatch.setattr(_cuda, "stem_fwd", emulated_fwd)
    monkeypatch.setattr(_cuda, "stem_relu", emulated_relu)


@pytest.fixture
def pooled_first(triton, monkeypatch):
    def untaped(key, pass_, inputs):  # for a tape holds launches alone
        outputs, kept = pass_()
        return outputs, Layout(kept).pack(kept), Layout(kept)

    emulate(monkeypatch)
    monkeypatch.setattr(_fused, "taped", untaped)
    monkeypatch.setattr(importlib.import_module("p3d_kernels.ops.stem"), "taped", untaped)


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in CASES] + [(CASES[i], torch.float16) for i in HALF],
    ids=lambda v: getattr(v, "id", str(v)),
)
def test_the_pool_before_the_normalisation(case, dtype, pooled_first, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    given = inputs(case, dtype, device)
    expected = reference_of(given, dtype)
    judge(case, evaluate(stem, given.to(dtype)), expected, dtype)
    judge(case, evaluate(stem, given.to(dtype), grad=False), expected, dtype)


@pytest.mark.parametrize("wiring", reference.WIRINGS)
def test_both_orders_of_pool_and_normalisation_route_alike(wiring, triton, device, monkeypatch):
    """Equal values, slopes of both signs, windows that are off: the same taps, and the same bits of all gradients."""
    x = torch.randint(-2, 3, (2, 3, 3, 13, 18), device=device).float()
    w = torch.randint(-1, 2, (16, 3, 1, 7, 7), device=device).float() / 8
    weight, bias = torch.linspace(-2, 2.5, 16, device=device), torch.linspace(-1, 1, 16, device=device)
    results = []
    for patched in (False, True):
        if patched:
            emulate(monkeypatch)
        y, record, z, tap, winner = _stem.stem_fwd(x, w, Norm(weight, bias), wiring, torch.float32, True)
        assert (z is None) == patched and tap.eq(255).any() and tap.lt(255).any()
        g = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
        results.append((tap, winner, *_stem.stem_bwd(g, x, w, z, record, tap, winner, True, wiring, True, True)))
    for first, second in zip(*results):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("wiring", reference.WIRINGS)
def test_a_gamma_of_zero_takes_the_first_of_a_window(wiring, pooled_first, device):
    x, w = torch.randn(2, 3, 3, 13, 14, device=device), torch.randn(16, 3, 1, 7, 7, device=device)
    dy = torch.randn(stem(x, w, Norm(), wiring).shape, device=device)
    gradients = []
    for function in (stem, reference.stem):
        weight, bias = torch.ones(16, device=device), torch.ones(16, device=device)
        weight[:3] = 0
        y = function(x, w, Norm(weight.requires_grad_(), bias), wiring)
        assert y[:, :3].eq(1).all()
        gradients += torch.autograd.grad(y, weight, dy)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_a_gamma_that_is_no_number_spares_other_channels(pooled_first, device):
    x, w = torch.randn(1, 3, 2, 12, 12, device=device), torch.randn(16, 3, 1, 7, 7, device=device)
    weight = torch.ones(16, device=device)
    clean = stem(x, w, Norm(weight))
    weight[3] = torch.nan
    y = stem(x, w, Norm(weight))
    others = torch.arange(16, device=device) != 3
    assert y[:, 3].isnan().all() and torch.equal(y[:, others], clean[:, others])


def test_plain_pytorch_is_the_reference(device):
    given = inputs(CASES[2], torch.float32, device)
    with p3d.use_backend("aten"):
        actual = evaluate(stem, given.to(torch.float32))
    expected = evaluate(reference.stem, given.to(torch.float32))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_autocast_reads_a_float32_clip_as_it_lies(layout, triton, device):
    given = inputs(dataclasses.replace(SMALL, layout=layout), torch.float16, device)

    def call(**arguments):
        with torch.autocast(device.type, torch.float16):
            return stem(**arguments)

    actual = evaluate(call, given.to(torch.float32))
    assert actual["y"].dtype == torch.float16 and actual["x"].dtype == actual["w"].dtype == torch.float32
    expected = evaluate(stem, given.to(torch.float16))
    for name, value in actual.items():
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name


@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_packed_inference(wiring, layout, triton, device):
    case = Case("stem", (1, 3, 2, 11, 14), 64, layout=layout, norm="frozen", options=wired(wiring))
    given = inputs(case, torch.float16, device)
    call = given.arguments()
    with torch.no_grad():
        expected = stem(**call)
        w, record = call["w"], bn_finalise(call["norm"], 64, None, device)
        packed = pack_stem_weight(w, torch.float16)
        assert torch.equal(stem_infer(call["x"], w, packed, record, wiring), expected)


@pytest.mark.parametrize("mean", [300.0, -100.0])
def test_statistics_far_from_zero(mean, triton, device):
    """z = mean + a pattern of standard deviation 1, from a clip that starts with black frames."""
    x = torch.randn(2, 2, 4, 24, 40, device=device)
    x[:, 1] = 1
    w = torch.zeros(16, 2, 1, 7, 7, device=device)
    w[:, 0, 0, 3, 3] = torch.linspace(0.1, 1, 16, device=device)
    w[:, 1, 0, 3, 3] = mean
    z, part = stem_conv(x, stem_pack(w, torch.float32, False), 16, None, True)
    record = bn_finalise(Norm(), 16, part, device)
    want = z.double()
    var, center = torch.var_mean(want, (0, 2, 3, 4))
    assert part[:, 0].sum(0).eq(want[:, 0].numel()).all()
    torch.testing.assert_close(record[0].double(), center, rtol=1e-6, atol=0)
    torch.testing.assert_close(record[4].double(), var, rtol=1e-5, atol=0)


def test_a_nan_stays_near_its_pixel_and_a_dead_channel_is_constant(triton, device):
    x = torch.randn(1, 3, 2, 16, 40, device=device)
    x[0, 1, 0, 8, 20] = float("nan")
    w = torch.randn(16, 3, 1, 7, 7, device=device)
    weight, bias = torch.ones(16, device=device), torch.full((16,), 0.5, device=device)
    weight[3] = 0
    norm = Norm(weight, bias, torch.zeros(16, device=device), torch.ones(16, device=device), training=False)
    y, clean = stem(x, w, norm), stem(x.nan_to_num(), w, norm)
    expected = reference.stem(x, w, norm).isnan()
    assert y.isnan().ge(expected).all() and expected.any() and y.isnan().sum() <= 2 * expected.sum()
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])
    assert clean[:, 3].eq(0.5).all()


def test_nothing_moves_without_training(triton, device):
    given = inputs(CASES[4], torch.float32, device)
    run = given.to(torch.float32)
    evaluate(stem, run)
    assert all(torch.equal(run.buffers[name], given.buffers[name]) for name in run.buffers)


def test_two_runs_are_equal_bit_for_bit(triton, device):
    given = inputs(SMALL, torch.float16, device)
    first, second = (evaluate(stem, given.to(torch.float16)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_gradients_that_are_wanted(triton, device):
    given = inputs(SMALL, torch.float32, device)
    whole = evaluate(stem, given.to(torch.float32))
    for name in given.leaves:
        run = given.to(torch.float32)
        for other, t in run.leaves.items():
            t.requires_grad_(other == name)
        (g,) = torch.autograd.grad(stem(**run.arguments()), run.leaves[name], run.dy)
        assert torch.equal(g, whole[name]), name


def test_compiles_without_a_graph_break(backend, device):
    given = inputs(SMALL, torch.float32, device)
    torch.compiler.reset()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    for grad in (True, False):
        actual, eager = (evaluate(f, given.to(torch.float32), grad) for f in (compiled, stem))
        for name in eager:
            torch.testing.assert_close(actual[name], eager[name], rtol=1e-5, atol=1e-6)


def test_registration(triton, device):
    given = inputs(SMALL, torch.float32, device)
    call = given.to(torch.float32).arguments()
    norm = call["norm"]
    args = norm.weight, norm.bias, norm.running_mean, norm.running_var, True, 1e-5, "port", torch.float32, True
    torch.library.opcheck(torch.ops.p3d.stem.default, (call["x"].detach(), call["w"], *args))


def test_empty_batch(device):
    given = inputs(dataclasses.replace(CASES[4], shape=(0, 4, 2, 8, 10)), torch.float32, device)
    assert evaluate(stem, given.to(torch.float32))["y"].shape == (0, 16, 1, 2, 3)


def test_reasons(device):
    w = torch.zeros(16, 5, 1, 7, 7, device=device)
    x = torch.zeros(1, 5, 2, 8, 8, device=device)
    assert "5 input channels" in why_not("triton", x, w) and why_not("triton", x[:, :4], w) is None
    wide = torch.empty_strided((1, 2, 2, 8, 8), (1, 2**31, 64, 8, 1), device="meta")
    assert "2^31" in why_not("triton", wide, w)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 3, 16, 16)}, ValueError, "x: expected 5 dimensions"),
        ({"x": torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8)}, TypeError, "x: expected float"),
        ({"x": torch.zeros(1, 2, 2, 16, 16)}, ValueError, "w: expected shape"),
        ({"x": torch.zeros(1, 3, 1, 16, 16), "wiring": "port"}, ValueError, "x: expected .* the pool fits"),
        ({"x": torch.zeros(1, 3, 2, 2, 16)}, ValueError, "x: expected .* the pool fits"),
        ({"w": torch.zeros(16, 3, 1, 7, 5)}, ValueError, "w: expected shape"),
        ({"w": torch.zeros(16, 3, 1, 7, 7).half()}, TypeError, "w: expected dtype"),
        ({"norm": Norm(torch.ones(8))}, ValueError, "norm.weight: expected shape"),
        ({"norm": Norm(training=False)}, ValueError, "norm: expected running statistics"),
        ({"wiring": "other"}, ValueError, "wiring: expected one of"),
    ],
)
def test_bad_arguments(change, error, message):
    norm = Norm(running_mean=torch.zeros(16), running_var=torch.ones(16))
    call = {"x": torch.zeros(1, 3, 2, 16, 16), "w": torch.zeros(16, 3, 1, 7, 7), "norm": norm, **change}
    with pytest.raises(error, match=message):
        stem(**call)
    assert norm.running_var.eq(1).all()


REAL = [
    Case("stem", (2, 3, 16, 160, 160), 64, layout=layout, options=wired(wiring))
    for layout in ("ncdhw", "ndhwc")
    for wiring in reference.WIRINGS
] + [
    Case("stem", (2, 3, 15, 111, 113), 64, layout="sliced", options=wired("author")),
    Case("stem", (1, 2, 16, 224, 224), 64, layout="ncdhw", options=wired("port")),
    Case("stem", (2, 3, 8, 112, 112), 64, norm="frozen", options=wired("author")),
    Case("stem", (2, 4, 8, 112, 112), 128, offset=100, options=wired("author")),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each(REAL)
def test_real_sizes(case, dtype, triton, device):
    given = inputs(case, dtype, device)
    expected = reference_of(given, dtype)
    vendor = evaluate(reference.stem, given.to(dtype))
    judge(case, evaluate(stem, given.to(dtype)), expected, dtype, vendor=vendor)
    judge(case, evaluate(stem, given.to(dtype), grad=False), expected, dtype, vendor=vendor)


@pytest.mark.gpu
@each(REAL[:4])
def test_real_sizes_under_autocast(case, triton, device):
    given = inputs(case, torch.bfloat16, device)

    def call(**arguments):
        with torch.autocast("cuda", torch.bfloat16):
            return stem(**arguments)

    actual, expected = evaluate(call, given.to(torch.float32)), evaluate(stem, given.to(torch.bfloat16))
    for name, value in actual.items():
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name


@pytest.mark.gpu
def test_real_sizes_in_float32(triton, device, monkeypatch):
    given = inputs(REAL[0], torch.float32, device)
    expected = reference_of(given, torch.float32)
    for tf32 in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        vendor = evaluate(reference.stem, given.to(torch.float32))
        judge(REAL[0], evaluate(stem, given.to(torch.float32)), expected, torch.float32, tf32, vendor)


@pytest.mark.gpu
def test_more_than_2_31_elements(device, triton):
    """The activation of 330 clips passes 2^31 elements: the last clip must come out as it does alone."""
    x = torch.randn(330, 3, 16, 160, 160, device=device, dtype=torch.bfloat16)
    w = torch.randn(64, 3, 1, 7, 7, device=device, dtype=torch.bfloat16) / 12
    norm = Norm(running_mean=torch.zeros(64, device=device), running_var=torch.ones(64, device=device), training=False)
    with torch.no_grad():
        assert torch.equal(stem(x, w, norm)[-1:], stem(x[-1:], w, norm))
