"""The definition itself: against torch.nn modules, and its gradients against finite differences in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cases import CASES, _pool, evaluate, inputs
from p3d_kernels import Norm, reference

GRADCHECK = list({(c.op, c.norm, c.residual, c.down, c.options): c for c in CASES if not c.offset}.values())


def conv(ci, co, taps, stride, padding):
    return nn.Conv3d(ci, co, taps, stride, padding, bias=False, dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "name, taps, padding, strides",
    [
        ("spatial_conv", (1, 3, 3), (0, 1, 1), lambda s: (1, s, s)),
        ("temporal_conv", (3, 1, 1), (1, 0, 0), lambda s: (s, 1, 1)),
        ("pointwise_conv", (1, 1, 1), (0, 0, 0), lambda s: (1, s, s)),
    ],
)
def test_convolutions_are_conv3d(name, taps, padding, strides, stride):
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    module = conv(4, 3, taps, strides(stride), padding)
    assert torch.equal(getattr(reference, name)(x, module.weight, stride), module(x))


MODULES = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.3, "eps": 1e-3},
    "no affine": {"affine": False},
    "no tracking": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_batch_norm_is_batch_norm_3d(options, training):
    """Outputs, gradients and all state over three batches."""
    module = nn.BatchNorm3d(6, dtype=torch.float64, **options).train(training)
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 1.5)
    twin = copy.deepcopy(module)
    for _ in range(3):
        x = 3 + 2 * torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
        y = reference.batch_norm(x, Norm.of(twin))
        torch.testing.assert_close(y, module(x), rtol=1e-12, atol=1e-12)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)
    if training and module.track_running_stats:
        assert twin.num_batches_tracked == 3


def test_an_empty_batch_leaves_the_running_statistics_finite():
    for momentum in (0.1, None):
        module = nn.BatchNorm3d(4, momentum=momentum)
        reference.bn_relu(torch.zeros(0, 4, 2, 3, 3), Norm.of(module))
        assert module.running_mean.isfinite().all() and module.running_var.isfinite().all()


def test_bn_relu_with_a_residual():
    module = nn.BatchNorm3d(6).eval()
    x, r = torch.randn(2, 2, 6, 3, 4, 5)
    assert torch.equal(reference.bn_relu(x, Norm.of(module), r), torch.relu(module(x) + r))
    assert torch.equal(reference.bn_relu(x, Norm.of(module)), torch.relu(module(x)))


@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("size", [(6, 17, 18), (5, 16, 13)])
def test_stem_is_its_modules(wiring, size):
    pool = {
        "author": nn.MaxPool3d((2, 3, 3), 2, padding=0, ceil_mode=True),
        "port": nn.MaxPool3d((2, 3, 3), 2, padding=(0, 1, 1)),
    }[wiring]
    net = nn.Sequential(conv(3, 8, (1, 7, 7), (1, 2, 2), (0, 3, 3)), nn.BatchNorm3d(8).double(), nn.ReLU(), pool)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = net(x)
    assert torch.equal(reference.stem(x, net[0].weight, Norm.of(net[1]), wiring), expected)


@pytest.mark.parametrize("pool", [_pool((2, 1, 1), (2, 1, 1)), _pool((3, 3, 2), (1, 2, 1), (1, 0, 1), True)])
def test_max_pool_is_max_pool_3d(pool):
    options = dict(pool)
    x = torch.randn(2, 3, 5, 6, 7)
    module = nn.MaxPool3d(options["kernel"], options["stride"], options["padding"], ceil_mode=options["ceil_mode"])
    assert torch.equal(reference.max_pool(x, **options), module(x))


def block(kind, wiring, s, t, x):
    """The table of `reference.py` once more, by hand."""
    relu = torch.relu
    if kind == "2d":
        return relu(s(x))
    if kind == "A":
        return relu(t(relu(s(x))))
    a, u = relu(s(x)), t(x) if kind == "B" else t(relu(s(x)))
    if wiring == "port":
        return a + relu(u)
    return relu(a + u) if kind == "B" else relu((a + u) / 2)


@pytest.mark.parametrize("wiring", reference.WIRINGS)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_bottleneck_is_its_modules(kind, wiring):
    def unit(ci, co, taps, stride=(1, 1, 1), padding=(0, 0, 0)):
        return nn.Sequential(conv(ci, co, taps, stride, padding), nn.BatchNorm3d(co).double())

    reduce, expand, down = unit(6, 4, 1, (1, 2, 2)), unit(4, 8, 1), unit(6, 8, 1, (1, 2, 2))
    s, t = unit(4, 4, (1, 3, 3), padding=(0, 1, 1)), unit(4, 4, (3, 1, 1), padding=(1, 0, 0))
    x = torch.randn(2, 6, 3, 7, 5, dtype=torch.float64)
    units = reduce, s, t if kind != "2d" else (None, None), expand, down
    arguments = [v for u in units for v in (u[0] and u[0].weight, u[1] and Norm.of(u[1]))]
    actual = reference.bottleneck(x, *arguments, kind=kind, wiring=wiring, stride=2)
    expected = torch.relu(expand(block(kind, wiring, s, t, torch.relu(reduce(x)))) + down(x))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda case: case.id)
def test_gradients_are_those_of_finite_differences(case):
    """Along random directions, which costs two evaluations whatever the size."""
    given = inputs(case, torch.float64, torch.device("cpu")).to(torch.float64, torch.float64)
    for name, t in given.leaves.items():
        if name.endswith("weight"):  # a channel that is switched off ties everywhere: no slope for a pool
            t.data.copy_(torch.where(t == 0, 1.0, t))
    gradients = evaluate(getattr(reference, case.op), given)

    def loss(step, directions):
        moved = given.to(torch.float64, torch.float64)
        for name, t in moved.leaves.items():
            t.data.add_(directions[name], alpha=step)
        return (evaluate(getattr(reference, case.op), moved, grad=False)["y"] * given.dy).sum().item()

    for _ in range(2):
        directions = {name: torch.randn_like(t) for name, t in given.leaves.items()}
        slope = sum((gradients[name] * d).sum().item() for name, d in directions.items())
        step = 1e-8
        difference = (loss(step, directions) - loss(-step, directions)) / (2 * step)
        assert slope == pytest.approx(difference, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("kind, wiring", [(k, w) for k in reference.KINDS for w in reference.WIRINGS])
def test_gradcheck(kind, wiring):
    """Every element, on the smallest block."""
    shapes = (1, 2, 2, 3, 2), (2, 2, 1, 3, 3), (2, 2, 3, 1, 1), (4, 2)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def f(x, w_s, w_t, affine):
        norms = Norm(affine[0], affine[1]), Norm(affine[2], affine[3])
        return reference.pseudo3d_conv(x, w_s, norms[0], w_t, norms[1], kind=kind, wiring=wiring)

    assert torch.autograd.gradcheck(f, leaves)
