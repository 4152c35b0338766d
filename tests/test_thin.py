"""Stages whose output is made where the next stage reads it alone: the same as making all of it, and who decides."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import p3d_kernels as p3d
from nets import MODES, assert_same_step, assert_within, distance, randomise, set_mode
from p3d_kernels import _backends
from p3d_kernels.models import P3D, PlainP3D, _common
from p3d_kernels.nn import Bottleneck, BottleneckRow
from p3d_kernels.ops.bottleneck import bottlenecks

CASES = [  # T, H, W of what is made thin
    ("AB", "author", (3, 3, 4), "train"),
    ("BC", "author", (1, 4, 5), "train"),
    pytest.param("CA", "author", (2, 1, 3), "train", marks=pytest.mark.gpu),
    ("AC", "port", (2, 2, 1), "train"),
    (("2d", "2d"), "port", (2, 3, 3), "train"),
    ("AB", "port", (1, 3, 2), "frozen"),
    pytest.param("AC", "author", (1, 2, 3), "eval", marks=pytest.mark.gpu),
]


@pytest.fixture
def kernels(device):
    """Our kernels wherever the tests run: the default on a GPU, Triton's interpreter on a CPU."""
    with p3d.use_backend(None if device.type == "cuda" else "triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        yield


def row(kinds, wiring="author", channels=16) -> BottleneckRow:
    blocks = [Bottleneck(24, channels, kinds[0], wiring)]
    return randomise(BottleneckRow(*blocks, *(Bottleneck(4 * channels, channels, kind, wiring) for kind in kinds[1:])))


def step(net: BottleneckRow, x, thin=True):
    """What a step through the thin output leaves; not thin: all of the output is computed, and a quarter taken."""
    net.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = bottlenecks(x, net.joined(), thin)
    y = y if thin else y[..., ::2, ::2]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (y * weights.to(y)).sum().backward()
    named = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in net.named_buffers() if b.is_floating_point()}
    return {"y": y.detach(), "dx": x.grad, **named, **buffers}


def expected(net, x):
    """The step in float64 by plain PyTorch, all of it computed."""
    with p3d.use_backend("aten"):
        return step(copy.deepcopy(net).double(), x.double(), thin=False)


def distances(got, want):
    assert got.keys() == want.keys()
    return {name: distance(got[name], value) for name, value in want.items()}


@pytest.mark.parametrize("kinds, wiring, size, mode", CASES, ids=str)
def test_a_step_is_that_of_all_positions(kinds, wiring, size, mode, kernels, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = set_mode(row(kinds, wiring).to(device), mode)
    x = torch.randn(2, 24, *size, device=device)
    want = expected(net, x)
    for _ in range(2):  # recorded, then replayed
        assert_within(1e-5, distances(step(copy.deepcopy(net), x), want))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels, size", [(64, (4, 40, 40)), (64, (3, 11, 14)), (128, (4, 20, 20)), (256, (2, 9, 7))])
def test_a_step_in_16_bits(channels, size, dtype, device):
    """No further from float64 than the step that computes all positions, but for rounding as it falls."""
    for kinds, wiring in (("ABC", "author"), ("BCA", "author"), ("CAB", "author"), ("ABC", "port")):
        net = row(kinds, wiring, channels).to(device)
        x = torch.randn(4, 24, *size, device=device).to(dtype)
        want = expected(net, x)
        with torch.autocast("cuda", dtype):
            full, thin = (distances(step(copy.deepcopy(net), x, thin), want) for thin in (False, True))
        worse = {name: (value, full[name]) for name, value in thin.items() if not value < 1.5 * full[name] + 4e-3}
        assert not worse, worse


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit(device):
    net, x = row("ABC", channels=64).to(device), torch.randn(8, 24, 4, 40, 40, device=device)
    with torch.autocast("cuda", torch.bfloat16):
        first, second = (step(copy.deepcopy(net), x) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_needs_no_gradient(kernels, device):
    net = row("AB").to(device)
    net[0].conv1.requires_grad_(False), net[1].conv4.requires_grad_(False), net[1].conv2.requires_grad_(False)
    x = torch.randn(1, 24, 2, 5, 4, device=device)
    want = expected(net, x)
    for needs in (True, False):
        x.requires_grad_(needs)
        net.zero_grad(set_to_none=True)
        y = bottlenecks(x, net.joined(), True)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        (y * weights.to(y)).sum().backward()
        got = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert net[1].conv4.weight.grad is None and (x.grad is not None) == needs
        assert_within(1e-5, {name: distance(grad, want[name]) for name, grad in got.items()})
        x.grad = None


def test_inference(kernels, device):
    net = row("BC").to(device).eval()
    x = torch.randn(1, 24, 3, 5, 4, device=device)
    with torch.no_grad():
        y = bottlenecks(x, net.joined(), True)
    assert_within(1e-5, {"y": distance(y, expected(net, x)["y"])})


def test_nan_passes(kernels, device):
    net = set_mode(row("AA").to(device), "eval")
    x = torch.randn(1, 24, 1, 4, 4, device=device)
    x[0, 3, 0, 2, 2] = torch.nan
    y = bottlenecks(x.requires_grad_(), net.joined(), True)
    assert y[0, :, 0, 1, 1].isnan().all()


def test_a_downsample_is_refused():
    net = row("A")
    blocks = [(net[0].arguments(), p3d.ops._fused.Config("A", "author"))]
    with pytest.raises(ValueError, match="thin: expected False"):
        bottlenecks(torch.zeros(1, 24, 1, 4, 4), blocks, True)


def test_formulas_in_float64():
    """The Gram identity where y is a part of the positions, as autograd finds the gradients."""
    positions, ci, co, eps = 60, 5, 9, 1e-5
    seen = torch.arange(positions) % 4 == 0
    a, w, r, dy = (torch.randn(s, dtype=torch.float64) for s in ((positions, ci), (co, ci), *[(positions, co)] * 2))
    a, gamma, beta = torch.relu(a + 1), torch.rand(co).double() + 0.5, torch.randn(co).double()
    r, dy = r[seen], dy[seen]
    leaves = [t.requires_grad_() for t in (a, w, gamma, beta)]
    z = a @ w.T
    var, mean = torch.var_mean(z, 0, correction=0)
    y = torch.relu(((z - mean) * (var + eps).rsqrt() * gamma + beta)[seen] + r)
    expected = torch.autograd.grad(y, leaves, dy)

    with torch.no_grad():
        mean_a = a.mean(0)
        wc = w @ ((a - mean_a).T @ (a - mean_a))
        g = dy * (y > 0)
        m, sum_g, invstd = g.T @ a[seen], g.sum(0), (var + eps).rsqrt()
        s = gamma * invstd
        dgamma = invstd * ((m - torch.outer(sum_g, mean_a)) * w).sum(1)
        q = dgamma * invstd / positions
        dw = s[:, None] * (m - torch.outer(sum_g, mean_a) - q[:, None] * wc)
        q_matrix = w.T @ ((s * q)[:, None] * w)
        da = q_matrix.T @ mean_a - w.T @ (s * sum_g / positions) - a @ q_matrix
        da[seen] += (s * g) @ w
        torch.testing.assert_close((da, dw, dgamma, sum_g), tuple(expected))


# --- the net ---------------------------------------------------------------------------------------------------------


def nets(depths=(2, 2, 2, 2), wiring="author", dtype=torch.float32):
    ours = randomise(P3D(depths, 9, wiring=wiring, dropout=0.0)).to(dtype)
    plain = PlainP3D(depths, 9, wiring=wiring, dropout=0.0).to(dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.fixture
def made_thin(monkeypatch) -> list:
    """For each row of blocks that a net runs, whether it leaves positions out."""
    calls, op = [], _common.bottlenecks
    monkeypatch.setattr(_common, "bottlenecks", lambda x, row, thin: calls.append(thin) or op(x, row, thin))
    return calls


@pytest.fixture
def by_plain_pytorch(made_thin, monkeypatch):
    """What kernels would leave out is left out of plain PyTorch's result."""
    monkeypatch.setattr(_common, "_by_kernels", lambda x: True)
    with p3d.use_backend("aten"):
        yield made_thin


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wiring", ["author", "port"])
def test_a_net_computes_the_same(wiring, mode, by_plain_pytorch):
    ours, plain = (set_mode(net, mode) for net in nets(wiring=wiring, dtype=torch.float64))
    assert_same_step(ours, plain, torch.randn(2, 3, 9, 75, 70).double(), 1e-9)
    assert by_plain_pytorch == [True, True, True, False]


@pytest.mark.gpu
def test_a_step_of_a_net(device, made_thin, monkeypatch):
    net = nets((3, 4, 6, 3))[0].to(device)
    x = torch.randn(4, 3, 16, 96, 112, device=device)

    def run():
        twin = copy.deepcopy(net)
        with torch.autocast("cuda", torch.bfloat16):
            y = twin(x)
        (y * torch.linspace(-1, 1, 9, device=device)).sum().backward()
        return {"y": y.detach(), **{name: p.grad for name, p in twin.named_parameters()}}

    thin = run()
    assert made_thin == [True, True, True, False]
    monkeypatch.setattr(_common, "_row_of", lambda *_: None)
    full = run()
    assert distance(thin["y"], full["y"]) < 0.1  # roundings grow from layer to layer
    assert thin.keys() == full.keys() and all(grad.isfinite().all() for grad in thin.values())


def test_plain_pytorch_computes_all(made_thin):
    with p3d.use_backend("aten"):
        nets()[0].eval()(torch.randn(1, 3, 2, 20, 20))
    assert not made_thin


def test_all_is_computed_where_something_else_may_read_it(by_plain_pytorch):
    net = nets()[0]
    x = torch.randn(1, 3, 9, 40, 40)

    def thin():
        by_plain_pytorch.clear()
        net(x)
        return list(by_plain_pytorch)

    whole = [True, True, True, False]
    assert thin() == whole
    seen = []
    handle = net.layer2.register_forward_hook(lambda module, args, y: seen.append(y.shape[3:]))
    assert thin() == [True, False] and seen == [(5, 5)]  # layer3, and layer4 after it
    handle.remove()
    for module, rest in (
        (net.layer1[1], [True, True, False]),
        (net.layer2[0].conv1, [True, False]),
        (net.layer4[1].bn4, [True, True, False]),
        (net.maxpool_2, []),
    ):
        handle = module.register_forward_pre_hook(lambda *_: None)
        assert thin() == rest
        handle.remove()
    net.layer1.requires_grad_(False)  # its blocks run one by one, and their backward costs nothing
    assert thin() == [True, True, False]
    with torch.no_grad():
        assert thin() == whole
    net.layer1.requires_grad_(True)
    net.maxpool_2 = p3d.nn.MaxPool3d((2, 3, 3), (2, 1, 1), (0, 1, 1))
    assert thin() == []
    net.maxpool_2, net.layer3 = p3d.nn.MaxPool3d((2, 1, 1)), nn.Sequential(*net.layer3)
    assert thin() == [True, False]


def test_a_stage_by_itself_computes_all():
    net = nets()[0]
    with p3d.use_backend("aten"):
        assert net.layer1(torch.randn(1, 64, 2, 6, 7)).shape[3:] == (6, 7)
