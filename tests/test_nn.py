"""Modules against torch.nn and against the plain blocks of `models.plain`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from nets import MODES, assert_same_step, randomise, set_mode
from p3d_kernels import nn as pnn
from p3d_kernels import ops, use_backend
from p3d_kernels.models.plain import PlainBottleneck, PlainBottleneck2d

KIND_WIRINGS = [("A", "author"), ("B", "author"), ("C", "author"), ("B", "port"), ("C", "port")]
IN, MID = 20, 5  # a block without downsample needs IN = 4 MID


@pytest.fixture(autouse=True)
def _aten():
    with use_backend("aten"):
        yield


@pytest.fixture
def fused_calls(monkeypatch):
    """The names of the fused ops that were called."""
    calls = []
    for name in ("bottleneck", "pseudo3d_conv"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _op=op, _name=name, **k: (calls.append(_name), _op(*a, **k))[1])
    return calls


class Frames(nn.Module):
    """A block of 2-D layers over every frame of [N, C, T, H, W]."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        y = self.block(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (x.size(0), x.size(2))).transpose(1, 2)


class Alone(nn.Module):
    """Gives a block the name that `Frames` gives it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


def blocks(kind, wiring, stride=1, in_channels=IN):
    """(ours, plain) in float64, same random weights."""
    ours = pnn.Bottleneck(in_channels, MID, kind, wiring, stride)
    plain = PlainBottleneck2d(in_channels, MID, stride)
    if kind != "2d":
        plain = PlainBottleneck(in_channels, MID, kind, wiring, stride)
    randomise(ours)
    plain.load_state_dict(ours.state_dict())
    return Alone(ours.double()), (Frames(plain) if kind == "2d" else Alone(plain)).double()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "module, kernel, strides, padding",
    [
        (pnn.PointwiseConv3d, (1, 1, 1), lambda s: (1, s, s), (0, 0, 0)),
        (pnn.SpatialConv3d, (1, 3, 3), lambda s: (1, s, s), (0, 1, 1)),
        (pnn.TemporalConv3d, (3, 1, 1), lambda s: (s, 1, 1), (1, 0, 0)),
    ],
)
def test_convolutions_are_conv3d(module, kernel, strides, padding, stride):
    conv = module(4, 6, stride).double()
    plain = nn.Conv3d(4, 6, kernel, strides(stride), padding, bias=False).double()
    assert isinstance(conv, nn.Conv3d) and conv.bias is None
    assert (conv.kernel_size, conv.stride, conv.padding) == (plain.kernel_size, plain.stride, plain.padding)
    plain.load_state_dict(conv.state_dict())
    assert_same_step(Alone(conv), Alone(plain), torch.randn(2, 4, 5, 7, 6).double(), 1e-12)


@pytest.mark.parametrize("kind, wiring", KIND_WIRINGS)
@pytest.mark.parametrize("mode", MODES)
def test_pseudo3d_conv(kind, wiring, mode):
    ours = randomise(pnn.Pseudo3dConv(6, 6, kind, wiring)).double()

    class Plain(PlainBottleneck):
        def forward(self, x):
            return self.middle(x)

    plain = Plain(24, 6, kind, wiring, 1).double()
    for name in ("conv1", "bn1", "conv4", "bn4"):
        delattr(plain, name)
    pairs = {"conv_s": "conv2", "bn_s": "bn2", "conv_t": "conv3", "bn_t": "bn3"}
    for mine, theirs in pairs.items():
        getattr(plain, theirs).load_state_dict(getattr(ours, mine).state_dict())
        setattr(plain, mine, plain._modules.pop(theirs))
        setattr(Plain, theirs, property(lambda self, mine=mine: self._modules[mine]))
    assert_same_step(set_mode(ours, mode), set_mode(plain, mode), torch.randn(2, 6, 3, 5, 4).double(), 1e-11)


def test_pseudo3d_conv_changes_channels():
    for kind in "ABC":
        module = pnn.Pseudo3dConv(6, 9, kind)
        assert module.conv_t.in_channels == (6 if kind == "B" else 9)
        x = torch.randn(2, 6, 3, 4, 4)
        fused = module(x)
        module.conv_s.register_forward_hook(lambda *_: None)
        assert fused.shape == (2, 9, 3, 4, 4)
        torch.testing.assert_close(module(x), fused)


@pytest.mark.parametrize("kind, wiring", [*KIND_WIRINGS, ("2d", "author")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride, in_channels", [(1, IN), (2, 7)])
def test_bottleneck(kind, wiring, mode, stride, in_channels, fused_calls):
    ours, plain = blocks(kind, wiring, stride, in_channels)
    assert list(ours.state_dict()) and set(ours.state_dict()) == set(plain.state_dict())
    x = torch.randn(2, in_channels, 3, 5, 6).double()
    assert_same_step(set_mode(ours, mode), set_mode(plain, mode), x, 1e-11)
    assert fused_calls == ["bottleneck"]


@pytest.mark.parametrize("kind", ["C", "2d"])
def test_layer_by_layer_is_the_same(kind, fused_calls):
    ours, plain = blocks(kind, "author", stride=2)
    seen = []
    for name, layer in ours.block.named_modules():
        if name and not list(layer.children()):
            layer.register_forward_hook(lambda m, a, y, name=name: seen.append(name))
    assert_same_step(ours, plain, torch.randn(2, IN, 3, 5, 6).double(), 1e-11)
    assert not fused_calls
    assert set(seen) == {name for name, layer in ours.block.named_modules() if name and not list(layer.children())}


def _parametrise(block):
    parametrizations.weight_norm(block.conv1)


def _own_forward(block):
    block.bn2.forward = lambda x: nn.BatchNorm3d.forward(block.bn2, x)


def _subclass(block):
    class Loud(nn.BatchNorm3d):
        pass

    block.bn3.__class__ = Loud


UNFUSED = {
    "forward hook": lambda b: b.bn2.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda b: b.conv3.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda b: b.bn4.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda b: b.conv4.register_full_backward_pre_hook(lambda *_: None),
    "hook on the activation": lambda b: b.relu.register_forward_hook(lambda *_: None),
    "hook inside downsample": lambda b: b.downsample[1].register_forward_hook(lambda *_: None),
    "hook on downsample": lambda b: b.downsample.register_forward_hook(lambda *_: None),
    "parametrised": _parametrise,
    "own forward": _own_forward,
    "subclass": _subclass,
}


@pytest.mark.parametrize("what", UNFUSED)
def test_what_unfuses_a_block(what, fused_calls):
    ours, plain = blocks("B", "port", stride=2)
    x = torch.randn(2, IN, 3, 5, 6).double()
    UNFUSED[what](ours.block)
    torch.testing.assert_close(ours(x), plain(x))
    assert not fused_calls


def test_global_hooks_see_every_layer(fused_calls):
    ours, plain = blocks("B", "port")
    x, seen = torch.randn(2, IN, 3, 5, 6).double(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        y = ours(x)
    finally:
        handle.remove()
    torch.testing.assert_close(y, plain(x))
    assert not fused_calls and ours.block.bn3 in seen


def test_a_removed_hook_fuses_again_and_an_outer_hook_does_not_unfuse(fused_calls):
    block = pnn.Bottleneck(IN, MID)
    handle, seen = block.bn2.register_forward_hook(lambda *_: None), []
    block.register_forward_hook(lambda m, a, y: seen.append(y))
    x = torch.randn(2, IN, 3, 4, 4)
    block(x)
    assert not fused_calls
    handle.remove()
    y = block(x)
    assert fused_calls == ["bottleneck"] and seen[-1] is y


def test_backward_hooks_see_the_gradient():
    ours, plain = blocks("A", "author")
    plain.block.relu.inplace = False  # which PyTorch does not allow behind a backward hook
    grads = [[], []]
    for net, got in zip((ours, plain), grads, strict=True):
        net.block.bn3.register_full_backward_hook(lambda m, gi, go, got=got: got.append(go[0].clone()))
    assert_same_step(ours, plain, torch.randn(2, IN, 3, 5, 6).double(), 1e-11)
    torch.testing.assert_close(*(got[0] for got in grads))


def test_sync_batch_norm_unfuses(fused_calls):
    ours, plain = blocks("C", "author", stride=2)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    x = torch.randn(2, IN, 3, 5, 6).double()
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    assert not fused_calls
    assert pnn.why_not_fused(ours.block.named_children()) == "bn1 is a SyncBatchNorm"


def test_2d_block_takes_frames_and_clips():
    ours, plain = blocks("2d", "author", stride=2)
    x = torch.randn(3, IN, 5, 6).double()
    torch.testing.assert_close(ours(x), plain.block(x))
    ours.block.bn1.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(ours(x), plain.block(x))


def test_names_of_the_port():
    layers = ["conv1.weight", "bn1.weight", "conv2.weight", "bn2.weight", "conv3.weight", "bn3.weight", "conv4.weight"]
    weights = [k for k in pnn.Bottleneck(IN, MID).state_dict() if k.endswith("weight")]
    assert weights == [*layers, "bn4.weight"]
    shapes = {k: tuple(v.shape) for k, v in pnn.Bottleneck(7, MID, "2d").state_dict().items() if k.endswith("weight")}
    assert shapes == {
        "conv1.weight": (5, 7, 1, 1),
        "bn1.weight": (5,),
        "conv_normal.weight": (5, 5, 3, 3),
        "bn_normal.weight": (5,),
        "conv4.weight": (20, 5, 1, 1),
        "bn4.weight": (20,),
        "downsample.0.weight": (20, 7, 1, 1),
        "downsample.1.weight": (20,),
    }


@pytest.mark.parametrize("frozen", [pnn.FrozenBatchNorm3d, pnn.FrozenSyncBatchNorm])
def test_frozen_batch_norm_stays_in_eval(frozen, fused_calls):
    norm = frozen(MID)
    for clone in (norm.train(), copy.deepcopy(norm).train(), pickle.loads(pickle.dumps(norm)).train(True)):
        assert not clone.training
    ours, plain = blocks("A", "author")
    for layer in (ours.block.bn2, plain.block.bn2):
        layer.__class__ = frozen
    ours.train(), plain.train()
    before = ours.block.bn2.running_mean.clone()
    assert_same_step(ours, plain, torch.randn(2, IN, 3, 5, 6).double(), 1e-11)
    assert fused_calls and torch.equal(before, ours.block.bn2.running_mean)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    "kernel, stride, padding", [((2, 3, 3), 2, (0, 1, 1)), ((2, 1, 1), None, 0), (3, (1, 2, 2), 1)]
)
def test_max_pool(kernel, stride, padding, ceil_mode):
    ours = pnn.MaxPool3d(kernel, stride, padding, ceil_mode)
    plain = nn.MaxPool3d(kernel, stride, padding, ceil_mode=ceil_mode)
    assert_same_step(Alone(ours), Alone(plain), torch.randn(2, 3, 5, 7, 8).double(), 0.0)
    x = torch.randn(3, 5, 7, 8)
    assert torch.equal(ours(x), plain(x))


def test_max_pool_cuts_its_window():
    x = torch.randn(2, 3, 1, 5, 2)
    assert torch.equal(pnn.MaxPool3d((2, 1, 1))(x), x)
    assert torch.equal(pnn.MaxPool3d((2, 3, 3), 2)(x), F.max_pool3d(x, (1, 3, 2), 2))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"kind: expected one of .*'2d'.*, got 'D'"):
        pnn.Bottleneck(IN, MID, "D")
    with pytest.raises(ValueError, match=r"kind: expected one of \('A', 'B', 'C'\), got '2d'"):
        pnn.Pseudo3dConv(IN, MID, "2d")
    with pytest.raises(ValueError, match="wiring: expected one of .*, got 'caffe'"):
        pnn.Bottleneck(IN, MID, "A", "caffe")
    with pytest.raises(ValueError, match="channels: expected a positive int, got 0"):
        pnn.Bottleneck(IN, 0)
    with pytest.raises(ValueError, match="stride: expected a positive int, got -1"):
        pnn.Bottleneck(IN, MID, stride=-1)
