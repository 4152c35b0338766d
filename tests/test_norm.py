"""`Norm`: what it takes from a module, how running statistics move, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from p3d_kernels import Norm, _norm
from p3d_kernels._norm import check_norm, in_one_launch, update_running

X = torch.randn(2, 6, 3, 4, 5)


def test_of_shares_the_tensors_of_the_module():
    module = nn.BatchNorm3d(6, momentum=0.3, eps=1e-3)
    norm = Norm.of(module)
    for field in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(norm, field) is getattr(module, field)
    assert (norm.training, norm.momentum, norm.eps) == (True, 0.3, 1e-3)


@pytest.mark.parametrize(
    "options, train, training, updates",
    [
        ({}, True, True, True),
        ({}, False, False, False),
        ({"track_running_stats": False}, True, True, False),
        ({"track_running_stats": False}, False, True, False),  # batch statistics even in eval
        ({"affine": False}, True, True, True),
        ({"momentum": None}, True, True, True),
    ],
)
def test_of_follows_the_mode(options, train, training, updates):
    norm = Norm.of(nn.BatchNorm3d(6, **options).train(train))
    assert (norm.training, norm.updates) == (training, updates)
    assert (norm.weight is None) == ("affine" in options)


def test_of_takes_every_batch_norm():
    for module in (nn.BatchNorm1d(6), nn.BatchNorm2d(6), nn.SyncBatchNorm(6)):
        check_norm("norm", Norm.of(module), 6, X)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_update_running_is_what_batch_norm_does(momentum):
    modules = [nn.BatchNorm3d(6, momentum=momentum) for _ in range(2)]
    twins = copy.deepcopy(modules)
    for step in range(3):
        batches = [torch.randn(2, 6, 3, 4, 5) + step, 2 * torch.randn(2, 6, 3, 4, 5)]
        for module, x in zip(modules, batches):
            module(x)
        var, mean = zip(*(torch.var_mean(x, (0, 2, 3, 4)) for x in batches))
        update_running([Norm.of(t) for t in twins], list(mean), list(var))
    for module, twin in zip(modules, twins):
        torch.testing.assert_close(twin.state_dict(), module.state_dict())
        assert twin.num_batches_tracked == 3


def test_update_running_of_mixed_norms():
    """Different momenta, one frozen, one without statistics: each moves by its own rule."""
    modules = [nn.BatchNorm3d(6), nn.BatchNorm3d(6, momentum=None), nn.BatchNorm3d(6).eval()]
    modules += [nn.BatchNorm3d(6, momentum=0.5), nn.BatchNorm3d(6, track_running_stats=False)]
    twins = copy.deepcopy(modules)
    for _ in range(2):
        var, mean = torch.var_mean(X, (0, 2, 3, 4))
        for module in modules:
            module(X)
        update_running([Norm.of(t) for t in twins], [mean] * 5, [var] * 5)
    for module, twin in zip(modules, twins):
        torch.testing.assert_close(twin.state_dict(), module.state_dict())


def test_update_running_without_a_counter():
    norm = Norm(running_mean=torch.zeros(6), running_var=torch.ones(6), momentum=0.5)
    update_running([norm], [torch.ones(6)], [torch.ones(6)])
    assert torch.equal(norm.running_mean, torch.full((6,), 0.5))


def test_update_running_keeps_the_dtype_of_the_statistics():
    module = nn.BatchNorm3d(6).to(torch.bfloat16)
    update_running([Norm.of(module)], [torch.ones(6)], [torch.ones(6)])
    assert module.running_mean.dtype == torch.bfloat16 and (module.running_mean > 0).all()


def test_update_running_records_no_gradient():
    module = nn.BatchNorm3d(6)
    update_running([Norm.of(module)], [torch.ones(6, requires_grad=True)], [torch.ones(6, requires_grad=True)])
    assert not module.running_mean.requires_grad


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_one_launch_moves_running_statistics_as_foreach_does():
    """More norms than a launch takes, of odd sizes, frozen or without a counter among them."""
    modules = [nn.BatchNorm3d(1 + 37 * i % 1100, momentum=(0.1, 0.0, 1.0, 0.7)[i % 4]).cuda() for i in range(150)]
    modules[3].eval()
    modules[70].num_batches_tracked = None
    twins, x = copy.deepcopy(modules), torch.empty(0, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        batch = [torch.randn(2, m.num_features, device="cuda") for m in modules]
        norms, version = [Norm.of(m) for m in modules], modules[0].running_mean._version
        assert in_one_launch(norms, x)
        addresses = [[b[i].data_ptr() for b in batch] for i in (0, 1)]
        update_running(norms, *addresses, holder=batch[0])
        assert modules[0].running_mean._version > version
        update_running([Norm.of(t) for t in twins], [b[0] for b in batch], [b[1] for b in batch])
    for module, twin in zip(modules, twins):
        for name, value in module.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name


def test_norms_that_one_launch_does_not_move(monkeypatch):
    monkeypatch.setattr(_norm._backends, "why_not", lambda backend, x: None)
    modules = [nn.BatchNorm3d(6), nn.BatchNorm3d(6, momentum=None), nn.BatchNorm3d(6).half(), nn.BatchNorm3d(6).eval()]
    assert [in_one_launch([Norm.of(m)], C6) for m in modules] == [True, False, False, True]  # the last has none
    assert not in_one_launch([Norm.of(m) for m in modules], C6) and in_one_launch(
        [Norm.of(m) for m in modules[::3]], C6
    )
    strided = Norm(running_mean=torch.zeros(12)[::2], running_var=torch.ones(6))
    assert not in_one_launch([strided], C6)


def test_a_norm_that_two_ops_share_moves_twice():
    module, twin = nn.BatchNorm3d(6), nn.BatchNorm3d(6)
    means, var = [torch.randn(6) for _ in range(3)], torch.ones(6)
    with _norm.together():
        update_running([Norm.of(module)] * 2, means[:2], [var, var])
        update_running([Norm.of(module)], means[2:], [var])
        assert module.num_batches_tracked == 0 and not module.running_mean.any()
    for mean in means:
        update_running([Norm.of(twin)], [mean], [var])
    assert module.num_batches_tracked == 3
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), twin.buffers()))


def test_together_moves_all_or_none():
    modules, batch = [nn.BatchNorm3d(6), nn.BatchNorm3d(6, momentum=None), nn.BatchNorm3d(6)], torch.ones(6)
    before = copy.deepcopy([m.state_dict() for m in modules])

    def forward(fails):
        with _norm.together(), _norm.together():
            update_running([Norm.of(m) for m in modules[:2]], [batch] * 2, [batch] * 2)
            _norm.remember(Norm.of(modules[2]))
            modules[2](torch.randn(2, 6, 1, 2, 2))
            if fails:
                raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        forward(True)
    for module, state in zip(modules, before):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    forward(False)
    assert all(m.num_batches_tracked == 1 and m.running_mean.any() for m in modules)


C5, C6 = torch.ones(5), torch.ones(6)


@pytest.mark.parametrize(
    "norm, error, match",
    [
        (nn.BatchNorm3d(6), TypeError, r"^norm_s: expected a Norm, got BatchNorm3d"),
        (None, TypeError, r"^norm_s: expected a Norm, got NoneType"),
        (Norm(weight=C5), ValueError, r"^norm_s.weight: expected shape \(6,\), got \(5,\)"),
        (Norm(bias=C6[None]), ValueError, r"^norm_s.bias: expected shape \(6,\), got \(1, 6\)"),
        (Norm(running_mean=C6, running_var=C5), ValueError, r"^norm_s.running_var: expected shape"),
        (Norm(weight=C6.to("meta")), ValueError, r"^norm_s.weight: expected device cpu, got meta"),
        (Norm(running_mean=C6), ValueError, r"^norm_s: expected running_mean and running_var together"),
        (Norm(running_var=C6), ValueError, r"^norm_s: expected running_mean and running_var together"),
        (Norm(training=False), ValueError, r"^norm_s: expected running statistics when training=False"),
    ],
)
def test_check_norm_refuses(norm, error, match):
    with pytest.raises(error, match=match):
        check_norm("norm_s", norm, 6, X)


def test_check_norm_refuses_one_value_a_channel_only_when_training():
    one = torch.zeros(1, 6, 1, 1, 1)
    with pytest.raises(ValueError, match="norm: expected more than 1 value per channel"):
        check_norm("norm", Norm(), 6, one)
    check_norm("norm", Norm(running_mean=C6, running_var=C6, training=False), 6, one)
    check_norm("norm", Norm(), 6, torch.zeros(0, 6, 1, 1, 1))
    check_norm("norm", Norm(), 6, X)


def test_a_norm_is_a_value():
    norm = Norm()
    with pytest.raises(AttributeError):
        norm.eps = 1.0
