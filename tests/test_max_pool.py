"""Max-pool against torch, bit for bit: windows, NaN, ties, borders, layouts, registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from p3d_kernels import _backends, use_backend
from p3d_kernels.ops import _tape
from p3d_kernels.ops._triton import ndhwc
from p3d_kernels.ops.max_pool import max_pool, out_sizes, pool_fwd, why_not

GEOMETRIES = [  # kernel, stride, padding, ceil_mode
    ((2, 3, 3), (2, 2, 2), (0, 0, 0), True),  # the author's stem
    ((2, 3, 3), (2, 2, 2), (0, 1, 1), False),  # the port's
    ((2, 1, 1), (2, 1, 1), (0, 0, 0), False),  # between stages
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), False),
    ((2, 2, 3), (3, 4, 2), (1, 0, 1), True),  # strides beyond the window
    ((3, 4, 5), (2, 3, 2), (1, 2, 2), True),  # too many taps to unroll
]


def case(shape, dtype, device):
    """Few distinct values, so that windows tie; NaN and infinities among them."""
    x = torch.randint(-4, 5, shape, device=device).to(dtype)
    x[0, 0, 0, 1, 1] = float("nan")
    x[0, 0, -1] = float("-inf")
    x[0, -1, 0, 0, 0] = float("inf")
    return x


def runs(f, x, dy):
    x = x.detach().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    "dtype, shape",
    [(torch.float32, (1, 9, 5, 6, 7)), (torch.float16, (1, 3, 2, 3, 9)), (torch.bfloat16, (1, 10, 4, 5, 4))],
    ids=str,
)
def test_equals_torch(geometry, dtype, shape, backend, device):
    kernel, stride, padding, ceil_mode = geometry
    x = case(shape, dtype, device)
    # gradients that are whole numbers: their sums are exact in every dtype and order
    shape = F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode).shape
    dy = torch.randint(-4, 5, shape, device=device).to(dtype)
    expected = runs(lambda x: F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode), x, dy)
    actual = runs(lambda x: max_pool(x, kernel, stride, padding, ceil_mode), x, dy)
    for value, want in zip(actual, expected):
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)
    if backend == "triton":
        assert actual[0].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_taps_are_torchs_indices(geometry, triton_backend, device):
    kernel, stride, padding, ceil_mode = geometry
    x = case((2, 5, 5, 6, 7), torch.float32, device)
    _, index = F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
    _, tap, _ = pool_fwd(ndhwc(x), kernel, stride, padding, ceil_mode, save_tap=True)
    tap = tap.long()
    t, h, w = (
        torch.arange(o, device=device).view([-1 if a == axis else 1 for a in range(3)]) * stride[axis] - padding[axis]
        for axis, o in enumerate(tap.shape[2:])
    )
    t, h, w = t + tap // (kernel[1] * kernel[2]), h + tap // kernel[2] % kernel[1], w + tap % kernel[2]
    assert torch.equal((t * 6 + h) * 7 + w, index)


def test_a_replay_is_what_was_recorded(triton_backend, device, monkeypatch):
    monkeypatch.setattr(_tape, "_tapes", {})
    x = torch.randn(2, 8, 4, 5, 6, device=device)
    dy = torch.randn(2, 8, 2, 5, 6, device=device)
    first, second = (runs(lambda x: max_pool(x, (2, 1, 1), (2, 1, 1)), x, dy) for _ in range(2))
    assert len(_tape._tapes) == 2 and all(map(torch.equal, first, second))
    with pytest.raises(ValueError, match="padding"):
        max_pool(x, (2, 1, 1), (2, 1, 1), (2, 0, 0))


@pytest.mark.parametrize("layout", ["ncdhw", "sliced", "misaligned"])
def test_other_layouts(layout, backend, device):
    whole = torch.randn(2, 6, 5, 8, 9, device=device)
    x = {
        "ncdhw": whole,
        "sliced": whole[:, 1:5, ::2, 1:, ::2],
        "misaligned": whole.contiguous(memory_format=torch.channels_last_3d)[1:, :, 1:],
    }[layout]
    dy = torch.ones_like(F.max_pool3d(x, (2, 3, 3), 2, (0, 1, 1)))
    expected = runs(lambda x: F.max_pool3d(x, (2, 3, 3), 2, (0, 1, 1)), x, dy)
    actual = runs(lambda x: max_pool(x, (2, 3, 3), (2, 2, 2), (0, 1, 1)), x, dy)
    assert all(map(torch.equal, actual, expected))


def test_int_arguments_and_no_gradient(backend, device):
    x = torch.randn(1, 4, 4, 5, 5, device=device)
    assert torch.equal(max_pool(x, 2, 2), F.max_pool3d(x, 2, 2))


def test_empty_batch_and_large_window(device):
    assert max_pool(torch.zeros(0, 4, 4, 5, 5, device=device), 2, 2).shape == (0, 4, 2, 2, 2)
    x = torch.randn(1, 2, 8, 8, 8, device=device)
    assert "256" not in (why_not("triton", x, (3, 5, 7)) or "") and "294 elements" in why_not("triton", x, (6, 7, 7))
    with use_backend("aten"):
        assert torch.equal(max_pool(x, (6, 7, 7), 1), F.max_pool3d(x, (6, 7, 7), 1))


@pytest.mark.parametrize("size", range(1, 12))
def test_out_sizes_are_torchs(size):
    for k, s, p in [(2, 2, 0), (3, 2, 0), (3, 2, 1), (1, 3, 0), (4, 3, 2), (5, 4, 1)]:
        for ceil_mode in (False, True):
            n = out_sizes((size,), (k,), (s,), (p,), ceil_mode)[0]
            try:
                want = F.max_pool1d(torch.zeros(1, 1, size), k, s, p, ceil_mode=ceil_mode).size(-1)
            except RuntimeError:
                want = 0
            assert max(n, 0) == want


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"x": torch.zeros(1, 4, 5, 5)}, ValueError, "x: expected 5 dimensions"),
        ({"x": torch.zeros(1, 1, 4, 5, 5, dtype=torch.int32)}, TypeError, "x: expected float"),
        ({"kernel": (2, 3)}, ValueError, "kernel: expected three"),
        ({"kernel": 2.0}, TypeError, "kernel: expected an int"),
        ({"kernel": (0, 3, 3)}, ValueError, "kernel: expected positive"),
        ({"stride": (2, 0, 2)}, ValueError, "stride: expected positive"),
        ({"padding": (2, 1, 1)}, ValueError, "padding: expected 0 to half"),
        ({"padding": -1}, ValueError, "padding: expected 0 to half"),
        ({"x": torch.zeros(1, 2, 1, 5, 5)}, ValueError, "x: expected .* that window"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    call = {"x": torch.zeros(1, 2, 4, 5, 5), "kernel": (2, 3, 3), "stride": (2, 2, 2), **kwargs}
    with pytest.raises(error, match=message):
        max_pool(**call)


def test_compiles_without_a_graph_break(backend, device):
    def f(x):
        return max_pool(x * 2, (2, 3, 3), (2, 2, 2), (0, 1, 1))

    x = torch.randn(2, 5, 4, 7, 6, device=device)
    dy = torch.randn(2, 5, 2, 4, 3, device=device)
    torch.compiler.reset()
    compiled = runs(torch.compile(f, fullgraph=True, backend="aot_eager"), x, dy)
    assert all(map(torch.equal, compiled, runs(f, x, dy)))


def test_registration(triton_backend, device):
    x = torch.randn(1, 4, 4, 5, 6, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.p3d.max_pool.default, (x, [2, 3, 3], [2, 2, 2], [0, 1, 1], False))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
@pytest.mark.parametrize("shape", [(4, 64, 16, 80, 80), (2, 256, 8, 40, 41)], ids=str)
def test_real_sizes(geometry, dtype, shape, device):
    kernel, stride, padding, ceil_mode = geometry
    x = case(shape, dtype, device).contiguous(memory_format=torch.channels_last_3d)
    y = F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    dy = torch.randint(-4, 5, y.shape, device=device).to(dtype)
    with use_backend("triton"):
        actual = runs(lambda x: max_pool(x, kernel, stride, padding, ceil_mode), x, dy)
    expected = runs(lambda x: F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode), x, dy)
    for value, want in zip(actual, expected):
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    """Positions on both sides of the 2^31st element; needs 9 GB."""
    shape, layout = (1, 32, 66, 1024, 1024), torch.channels_last_3d
    x = torch.empty(shape, dtype=torch.float16, device=device, memory_format=layout)
    x.copy_(torch.arange(66, device=device).view(1, 1, -1, 1, 1))
    with use_backend("triton"):
        y = max_pool(x, (2, 1, 1), (2, 1, 1))
    assert torch.equal(y[0, 5, :, 7, 9].float(), torch.arange(1.0, 66, 2, device=device))


@pytest.fixture
def triton_backend(device):
    with use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        yield
