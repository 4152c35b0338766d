"""bn_relu beyond the conformance suite: reductions over many steps, what is saved, what is computed, registration."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import p3d_kernels as p3d
from p3d_kernels import Norm, reference
from p3d_kernels._backends import why_not
from tolerance import check

module = importlib.import_module("p3d_kernels.ops.bn_relu")  # `ops.bn_relu` is the function
bn_relu = module.bn_relu


@pytest.fixture(autouse=True)
def triton_backend(device):
    with p3d.use_backend("triton"):
        if why := why_not("triton", torch.zeros(1, device=device)):
            pytest.skip(why)
        yield


def draw(device, shape=(2, 6, 3, 5, 7), dtype=torch.float32):
    """(x, residual, norm) with parameters that want gradients."""
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[1], device=device)
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    norm = Norm(weight.requires_grad_(), bias.requires_grad_(), mean, var)
    return x.requires_grad_(), residual.requires_grad_(), norm


def twin(norm, dtype=torch.float64):
    """The same normalisation in float64, on the CPU, with its own memory."""
    fields = {k: getattr(norm, k) for k in ("weight", "bias", "running_mean", "running_var")}
    fields = {k: t.detach().cpu().to(dtype, copy=True).requires_grad_(t.requires_grad) for k, t in fields.items()}
    return Norm(**fields, training=norm.training)


@pytest.mark.parametrize("tiles", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 3, 16, 17), (1, 70, 2, 12, 13)])
def test_few_tiles_of_many_steps(device, monkeypatch, shape, tiles):
    """What a tensor of 10^8 elements does: several steps a tile, the last one short."""
    monkeypatch.setattr(module, "MAX_TILES", tiles)
    x, _, norm = draw(device, shape)
    exact = twin(norm)
    z = x.detach().cpu().double().requires_grad_()
    dy = torch.randn(shape)
    y, y_exact = bn_relu(x, norm), reference.bn_relu(z, exact)
    y.backward(dy.to(device))
    y_exact.backward(dy.double())
    check(y, y_exact, torch.float32)
    check(x.grad, z.grad, torch.float32, name="dx")
    for name in ("weight", "bias"):
        check(getattr(norm, name).grad, getattr(exact, name).grad, torch.float32, kind="bn_sum", name=name)
    for name in ("running_mean", "running_var"):
        check(getattr(norm, name), getattr(exact, name), torch.float32, kind="bn_sum", name=name)


def test_the_pivot_may_be_far_from_the_rest(device, monkeypatch):
    """A black frame first, then values at 100: the variance does not drown in the square of the mean."""
    monkeypatch.setattr(module, "MAX_TILES", 1)
    x = torch.randn(1, 8, 4, 16, 16, device=device) + 100
    x[:, :, 0] = 0
    norm = Norm(running_mean=torch.zeros(8, device=device), running_var=torch.zeros(8, device=device), momentum=1.0)
    bn_relu(x, norm)
    var, mean = torch.var_mean(x.cpu().double(), (0, 2, 3, 4))
    check(norm.running_mean, mean, torch.float32, kind="bn_sum")
    check(norm.running_var, var, torch.float32, kind="bn_sum")


@pytest.mark.parametrize("residual", [False, True])
def test_what_is_saved(device, residual):
    """x, the record, y if there is a residual, and the parameters themselves: no mask, no normalised tensor."""
    x, r, norm = draw(device, dtype=torch.float16)
    big = []

    def pack(t):
        big.extend([t] if t.numel() >= x.numel() else [])
        return t

    x.data = x.data.contiguous(memory_format=torch.channels_last_3d)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = bn_relu(x, norm, r if residual else None)
    assert len(big) == 1 + residual
    assert {t.data_ptr() for t in big} == {x.data_ptr(), y.data_ptr()} if residual else {x.data_ptr()}


def test_frozen_statistics_without_parameter_gradients_need_no_sums(device, monkeypatch):
    x, _, norm = draw(device)
    frozen = Norm(norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var, training=False)
    monkeypatch.setattr(module, "bn_relu_sums_kernel", None)  # a launch would raise
    y = bn_relu(x, frozen)
    y.sum().backward()
    expected = (y > 0) * (frozen.weight / (1 + frozen.eps) ** 0.5).view(1, -1, 1, 1, 1)
    check(x.grad, expected.detach().cpu().double(), torch.float32)


def test_the_running_statistics_wait_for_the_forward(device, monkeypatch):
    x, _, norm = draw(device)
    monkeypatch.setattr(module, "bn_relu_apply_kernel", None)  # fails after the statistics
    with pytest.raises(TypeError):
        bn_relu(x, norm)
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()


def test_a_module_and_the_op_train_alike(device):
    ours, theirs = (nn.BatchNorm3d(6).to(device) for _ in range(2))
    for _ in range(3):
        x = 5 + 3 * torch.randn(2, 6, 3, 5, 7, device=device)
        check(bn_relu(x, Norm.of(ours)), torch.relu(theirs(x)).detach().cpu().double(), torch.float32)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()
    check(bn_relu(x, Norm.of(ours)), torch.relu(theirs(x)).detach().cpu().double(), torch.float32)


def test_half_parameters(device):
    """A network in float16 through and through: parameters and statistics too."""
    layer = nn.BatchNorm3d(6).to(device).half()
    x = torch.randn(2, 6, 3, 5, 7, device=device).half()
    y = bn_relu(x, Norm.of(layer))
    y.sum().backward()
    assert layer.weight.grad.dtype == layer.running_mean.dtype == torch.float16
    check(y, torch.relu(nn.functional.batch_norm(x.cpu().double(), None, None, training=True)), torch.float16)


def test_nan_and_infinity_come_through(device):
    """Loss scaling looks for them."""
    x, r, norm = draw(device)
    frozen = Norm(running_mean=norm.running_mean, running_var=norm.running_var, training=False)
    bad = x.detach().clone()
    bad[0, 0, 0, 0, 0], bad[0, 1, 0, 0, 0] = float("nan"), float("inf")
    y = bn_relu(bad, frozen)
    assert y[0, 0, 0, 0, 0].isnan() and y[0, 1, 0, 0, 0].isinf() and y.isfinite().sum() == y.numel() - 2
    dy = torch.ones_like(y)
    dy[0, 2] = float("nan")
    z = x.detach().abs().requires_grad_()
    bn_relu(z, frozen).backward(dy)
    assert z.grad[0, 2].isnan().all() and z.grad.isnan().sum() == z.grad[0, 2].numel()


def test_an_input_changed_in_place_is_noticed(device):
    x, _, norm = draw(device)
    x = x * 1
    x.data = x.data.contiguous(memory_format=torch.channels_last_3d)
    y = bn_relu(x, norm)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_registration(device, residual, training):
    x, r, norm = draw(device)
    r = r if residual else None
    stats = norm.running_mean, norm.running_var
    torch.library.opcheck(torch.ops.p3d.bn_relu.default, (x, r, norm.weight, norm.bias, *stats, training, 1e-5))
    y, record = (t.detach() for t in torch.ops.p3d.bn_relu(x, r, norm.weight, norm.bias, *stats, training, 1e-5))
    arguments = torch.randn_like(y), x.detach(), y if residual else None, record, training
    torch.library.opcheck(torch.ops.p3d.bn_relu_bwd.default, arguments)
