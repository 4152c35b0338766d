"""`accelerate` on nets that are not ours: a port-style one of other class names, and nets it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nets import MODES, assert_same_step, randomise, set_mode
from p3d_kernels import use_backend
from p3d_kernels.accelerate import AccelerateReport, accelerate
from p3d_kernels.models import P3D, PlainP3D, frozen_bn
from p3d_kernels.nn import Bottleneck, MaxPool3d

STEM_LEFT = {"conv1_custom": "the net's own forward calls the layers of its stem one by one"}


@pytest.fixture(autouse=True)
def _aten():
    with use_backend("aten"):
        yield


class Unit(nn.Module):
    """A bottleneck as the PyTorch port has it: names, order, attributes; `gain` makes it one that P3D has not."""

    def __init__(self, inplanes, planes, number, stride=1, downsample=None, gain=1.0):
        super().__init__()
        self.downsample = downsample
        self.conv1 = nn.Conv3d(inplanes, planes, 1, stride=(1, stride, stride), bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.id, self.ST, self.gain = number, "ABC"[number % 3], gain
        self.conv2 = nn.Conv3d(planes, planes, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, planes, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn3 = nn.BatchNorm3d(planes)
        self.conv4 = nn.Conv3d(planes, 4 * planes, 1, bias=False)
        self.bn4 = nn.BatchNorm3d(4 * planes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        s = self.relu(self.bn2(self.conv2(out)))
        t = self.relu(self.bn3(self.conv3(out if self.ST == "B" else s)))
        out = self.gain * self.bn4(self.conv4(t if self.ST == "A" else s + t))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class FlatUnit(nn.Module):
    """The port's 2-D bottleneck, on [N, C, H, W]."""

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.downsample = downsample
        self.conv1 = nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv_normal = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn_normal = nn.BatchNorm2d(planes)
        self.conv4 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn4(self.conv4(self.relu(self.bn_normal(self.conv_normal(out)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class PortNet(nn.Module):
    """The port's net, thin (8 channels), with its folding of one frame into the batch."""

    def __init__(self, gains=None):
        super().__init__()
        gains = gains or {}
        self.conv1_custom = nn.Conv3d(3, 8, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((2, 3, 3), stride=2, padding=(0, 1, 1))
        self.maxpool_2 = nn.MaxPool3d((2, 1, 1), padding=0, stride=(2, 1, 1))
        number, width = 0, 8
        for stage, depth in enumerate((3, 2, 2)):
            units = []
            for i in range(depth):
                planes, stride, down = 4 << stage, 2 if stage and not i else 1, None
                if not i:
                    conv = nn.Conv3d(width, 4 * planes, 1, stride=(1, stride, stride), bias=False)
                    down = nn.Sequential(conv, nn.BatchNorm3d(4 * planes))
                units.append(Unit(width, planes, number, stride, down, gains.get(number, 1.0)))
                number, width = number + 1, 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*units))
        down = nn.Sequential(nn.Conv2d(width, 128, 1, stride=2, bias=False), nn.BatchNorm2d(128))
        self.layer4 = nn.Sequential(FlatUnit(width, 32, 2, down), FlatUnit(128, 32))
        self.fc = nn.Linear(128, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1_custom(x))))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = self.maxpool_2(layer(x))
        x = self.layer4(x.view(-1, x.size(1), x.size(3), x.size(4)))
        return self.fc(x.mean((2, 3)))


def clips():
    return torch.randn(2, 3, 16, 48, 40, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_port_style_net(mode):
    theirs = set_mode(randomise(PortNet()).double(), mode)
    net = copy.deepcopy(theirs)
    parameters, keys = list(net.parameters()), list(net.state_dict())
    modes = {name: module.training for name, module in net.named_modules()}
    report = AccelerateReport()
    assert accelerate(net, report) is net
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == keys
    assert {name: module.training for name, module in net.named_modules()} == modes
    stages = {f"layer{i}": [(block.kind, block.wiring) for block in getattr(net, f"layer{i}")] for i in (1, 2, 3, 4)}
    kinds = [kind for i in (1, 2, 3) for kind, _ in stages[f"layer{i}"]]
    assert kinds == list("ABCABCA")
    assert [kind for kind, _ in stages["layer4"]] == ["2d", "2d"]
    assert {wiring for i in (1, 2, 3) for _, wiring in stages[f"layer{i}"]} == {"port"}
    assert isinstance(net.maxpool, MaxPool3d) and isinstance(net.maxpool_2, MaxPool3d)
    assert len(report.swapped) == 11 and report.left == STEM_LEFT
    assert_same_step(net, theirs, clips(), 1e-9)


@pytest.mark.parametrize("wiring", ["author", "port"])
def test_either_wiring_is_found(wiring):
    theirs = randomise(PlainP3D((3, 1, 1, 1), 9, wiring=wiring, dropout=0.0)).double()
    for module in theirs.modules():  # T at zero: the wirings then give the same, and are still told apart
        if hasattr(module, "conv3"):
            nn.init.zeros_(module.conv3.weight), nn.init.zeros_(module.bn3.bias)
    net = accelerate(copy.deepcopy(theirs))
    assert [(block.kind, block.wiring) for block in net.layer1[1:]] == [("B", wiring), ("C", wiring)]
    assert_same_step(net, theirs, clips(), 1e-9)


def test_an_optimiser_and_parameter_hooks_stay():
    theirs = PortNet().double()
    net = copy.deepcopy(theirs)
    seen = []
    net.layer2[0].conv3.weight.register_hook(lambda g: seen.append(g.shape))
    optimisers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in (net, theirs)]
    accelerate(net)
    x = clips()
    for n, optimiser in zip((net, theirs), optimisers, strict=True):
        for _ in range(2):
            optimiser.zero_grad()
            n(x).square().sum().backward()
            optimiser.step()
    for (name, p), q in zip(net.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert len(seen) == 2


def test_state_dicts_go_both_ways():
    theirs, other = PortNet(), PortNet()
    net = accelerate(copy.deepcopy(theirs))
    net.load_state_dict(other.state_dict())
    theirs.load_state_dict(net.state_dict())
    for p, q in zip(theirs.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_blocks_with_hooks_are_left():
    net = PortNet().double()
    seen = []
    for module in (net.layer1[0], net.layer1[1].bn2, net.layer2[0].downsample[0], net.maxpool):
        module.register_forward_hook(lambda m, a, y: seen.append(m))
    theirs, report = copy.deepcopy(net), AccelerateReport()
    accelerate(net, report)
    assert set(report.left) == {"layer1.0", "layer1.1", "layer2.0", "maxpool", *STEM_LEFT}
    assert "hooks" in report.left["layer1.0"] and "bn2" in report.left["layer1.1"]
    assert "downsample.0" in report.left["layer2.0"]
    assert type(net.layer1[0]) is Unit and type(net.maxpool) is nn.MaxPool3d
    assert "layer1.0: left" in str(report)
    seen.clear()
    assert_same_step(net, theirs, clips(), 1e-9)
    assert net.layer1[0] in seen and net.layer1[1].bn2 in seen


def test_a_block_that_computes_something_else_is_left():
    theirs = PortNet(gains={1: 0.5, 4: 1.0001}).double()
    net, report = copy.deepcopy(theirs), AccelerateReport()
    accelerate(net, report)
    reason = "its forward computes none of the kinds A, B, C, 2d of either wiring"
    assert report.left == STEM_LEFT | {"layer1.1": reason, "layer2.1": reason}
    assert_same_step(net, theirs, clips(), 1e-9)


def _extra_layer(unit):
    unit.se = nn.Linear(2, 2)


def _sync(unit):
    unit.bn2 = nn.SyncBatchNorm.convert_sync_batchnorm(unit.bn2)


def _dilated(unit):
    unit.conv2 = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2), bias=False)


def _biased(unit):
    unit.conv3 = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))


def _no_shortcut(unit):
    unit.downsample = None


def _raising(unit):
    unit.ST = property()
    unit.gain = "loud"


@pytest.mark.parametrize(
    "change, reason",
    [
        (_extra_layer, "has further layers ['se']"),
        (_sync, "bn2 is a SyncBatchNorm"),
        (_dilated, "conv2.padding: expected (0, 1, 1), got (0, 2, 2)"),
        (_biased, "conv3.bias: expected False, got True"),
        (_no_shortcut, "the shortcut changes its shape without a downsample layer"),
        (_raising, "a copy of it did not run on a small input"),
    ],
)
def test_reasons(change, reason):
    net, report = PortNet(), AccelerateReport()
    change(net.layer1[0])
    accelerate(net, report)
    assert reason in report.left["layer1.0"] and type(net.layer1[0]) is Unit
    assert isinstance(net.layer1[1], Bottleneck)


def test_twice_and_ours():
    net = accelerate(PortNet())
    block, report = net.layer1[0], AccelerateReport()
    accelerate(net, report)
    assert net.layer1[0] is block and not report.swapped
    accelerate(P3D((1, 1, 1, 1)))


def test_wrapped_half_and_frozen_nets():
    net = frozen_bn(PortNet()).half()
    report = AccelerateReport()
    accelerate(nn.DataParallel(net), report)
    assert "module.layer1.0" in report.swapped and isinstance(net.layer4[1], Bottleneck)
    assert net.layer1[0].conv1.weight.dtype == torch.float16
    assert not net.train().layer1[0].bn2.training


def test_a_shared_block_stays_shared():
    net = PortNet()
    net.layer1[2] = net.layer1[1]
    accelerate(net)
    assert net.layer1[2] is net.layer1[1] and isinstance(net.layer1[1], Bottleneck)


def test_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    net = PortNet()
    torch.set_rng_state(state)
    accelerate(net)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_swap_raises_and_changes_nothing():
    net = nn.Sequential(nn.Conv3d(3, 4, 1), nn.MaxPool3d(2))
    with pytest.raises(ValueError, match="model: nothing could be swapped in Sequential .*no P3D bottleneck"):
        accelerate(net)
    assert type(net[1]) is nn.MaxPool3d
    net = PortNet(gains=dict.fromkeys(range(7), 0.5))
    del net.layer4
    with pytest.raises(ValueError, match="nothing could be swapped in PortNet .*layer1.0: its forward computes none"):
        accelerate(net)
    assert type(net.layer1[0]) is Unit and type(net.maxpool) is nn.MaxPool3d
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        accelerate({})
