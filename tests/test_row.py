"""Blocks in a row as one op: the same bits as the blocks one by one, forward, backward and in running statistics."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

import p3d_kernels as p3d
from nets import batch_norms, randomise, set_mode
from p3d_kernels import _backends
from p3d_kernels.nn import Bottleneck, BottleneckRow
from p3d_kernels.ops import _conv, _cuda, _fused
from p3d_kernels.ops._fused import Config
from p3d_kernels.ops._triton import Operand
from p3d_kernels.ops.bottleneck import RowConfig


@pytest.fixture
def triton(device):
    with p3d.use_backend("triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        yield


def row(kinds, wiring="author", stride=2) -> BottleneckRow:
    blocks = [Bottleneck(24, 16, kinds[0], wiring, stride)]
    return randomise(BottleneckRow(*blocks, *(Bottleneck(64, 16, kind, wiring) for kind in kinds[1:])))


def apart(blocks: BottleneckRow) -> torch.nn.Sequential:
    """A copy whose blocks run one by one."""
    return torch.nn.Sequential(*copy.deepcopy(blocks))


def step(net, x):
    x = x.detach().clone().requires_grad_()
    y = net(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (y * weights).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


FLAT = ("2d", "2d", "2d")
CASES = [("BCA", "author", "train", "less"), ("BCA", "author", "frozen", "default"), (FLAT, "author", "train", "less")]
MORE = [("AB", "author", "train"), ("CC", "author", "train"), ("BCA", "port", "train"), ("BCA", "author", "eval")]
MORE = [(*case, memory) for case in MORE for memory in ("default", "less")]
MORE += [
    ("BCA", "author", "train", "default"),
    ("BCA", "author", "frozen", "less"),
    (FLAT, "author", "train", "default"),
]
CASES += [pytest.param(*case, marks=pytest.mark.gpu) for case in MORE]  # 15 s each in the interpreter


@pytest.mark.parametrize("kinds, wiring, mode, memory", CASES)
def test_a_step_is_that_of_its_blocks(kinds, wiring, mode, memory, triton, device, monkeypatch):
    together = set_mode(row(kinds, wiring).to(device), mode)
    alone = set_mode(apart(together), mode)
    together.memory = memory
    bottleneck = importlib.import_module("p3d_kernels.ops.bottleneck")  # of this name there is a function, too
    monkeypatch.setattr(_fused, "_settled", {})  # no tape of another test's
    monkeypatch.setattr(bottleneck, "RUN", 2)  # so that one output is kept and one made again, or, stored, both of two
    if kinds == FLAT:
        monkeypatch.setattr(bottleneck, "RUN", 4)
        monkeypatch.setattr(bottleneck, "stores", lambda *_: True)
    calls = []
    one = Bottleneck.forward
    monkeypatch.setattr(Bottleneck, "forward", lambda block, x: calls.append(block) or one(block, x))
    x = torch.randn(1, 24, 3, 5, 6, device=device)
    for _ in range(2):  # recorded, then replayed
        want, got = step(alone, x), step(together, x)
        for a, b in zip(want, got, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert not set(calls) & set(together)  # one op


@pytest.mark.parametrize("mode", ["train", pytest.param("frozen", marks=pytest.mark.gpu)])
def test_a_block_hands_its_gradient_down_masked(mode, triton, device, monkeypatch):
    """By the ReLU that made its input, which the block below then does not read; the bits are the same."""
    net, x, read = set_mode(row("BCA").to(device), mode), torch.randn(1, 24, 3, 5, 6, device=device), []
    bottleneck = importlib.import_module("p3d_kernels.ops.bottleneck")  # of this name there is a function, too
    gram_bwd = bottleneck.gram_bwd
    monkeypatch.setattr(bottleneck, "gram_bwd", lambda dy, y, *rest: read.append(y) or gram_bwd(dy, y, *rest))
    monkeypatch.setattr(_fused, "_settled", {})  # no tape of another test's
    masked = step(copy.deepcopy(net), x)
    assert [y is None for y in read[-4:]] == [False, True, True, True]  # the last block's; the first has D as well
    read.clear()
    monkeypatch.setattr(bottleneck, "_can_mask", lambda *_: False)
    monkeypatch.setattr(_fused, "_settled", {})  # nor of this step
    for a, b in zip(masked, step(net, x), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert read and all(y is not None for y in read)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kinds, wiring", [("BCA", "author"), ("ABC", "port")])
def test_a_gradient_in_the_place_of_another(kinds, wiring, device, monkeypatch):
    """`reduce_bwd` writes dx over what it reads, where that is not read again. The bits are the same elsewhere."""
    blocks = [Bottleneck(64, 64, kinds[0], wiring), *(Bottleneck(256, 64, kind, wiring) for kind in kinds[1:])]
    default, x, over = randomise(BottleneckRow(*blocks)).to(device), torch.randn(2, 64, 4, 20, 20, device=device), []
    less = copy.deepcopy(default)
    less.memory = "less"
    elsewhere = copy.deepcopy(default)
    with torch.autocast("cuda", torch.bfloat16):
        found = [step(default, x), step(less, x)]
        reduce_bwd = _cuda.reduce_bwd
        monkeypatch.setattr(_cuda, "reduce_bwd", lambda *of: over.append(of[6]) or reduce_bwd(*of[:6]))
        monkeypatch.setattr(_fused, "_settled", {})
        found.append(step(elsewhere, x))
    assert any(tensor is not None for tensor in over)
    for got in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], got, strict=True))


def test_what_less_memory_drops(triton, device):
    """Bytes that autograd is given to keep: z_r of the first block, and its output."""
    net, x, kept = row("AB").to(device), torch.randn(1, 24, 2, 5, 5, device=device), []
    for memory in ("default", "less"):
        net.memory = memory
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x)
    dropped = 4 * (16 + 64) * 2 * 3 * 3
    assert dropped <= kept[0] - kept[1] < dropped + 64  # what aligns them beside


def test_which_inputs_a_row_keeps():
    def kept(*memory):
        config = RowConfig(tuple(Config("A", "author", memory=m) for m in memory), (5,) * len(memory))
        return [i for i, keeps in enumerate(config.keeps_input()) if keeps]

    assert kept("default", "default", "default") == [1, 2] and kept("less", "less", "less") == []
    assert kept("less", "default", "less") == [2]  # the output of the second
    assert kept(*["less"] * 6) == [4] and kept(*["less"] * 36) == [6, 12, 18, 24, 30]


def test_memory_may_be_set_at_every_level():
    net = p3d.models.P3D((2, 1, 1, 1), 9, memory="less")
    assert net.memory == net.layer1.memory == net.layer1[1].memory == "less"
    net.layer1.memory = "default"
    assert (net.memory, net.layer1.memory, net.layer2[0].memory) == ("mixed", "default", "less")
    assert p3d.accelerate(net).memory == "mixed" and p3d.accelerate(net, memory="less").memory == "less"
    assert copy.deepcopy(net).memory == "less" and "memory=less" in repr(net)
    with pytest.raises(ValueError, match="memory: expected one of .*'default', 'less'.*got 'more'"):
        Bottleneck(24, 16, memory="more")
    for module in (net, net.layer1, net.layer1[0]):
        with pytest.raises(ValueError, match="memory: .*got None"):
            module.memory = None
    with pytest.raises(ValueError, match="memory: .*got 1"):
        p3d.accelerate(net, memory=1)
    with pytest.raises(ValueError, match="memory: .*got 'more'"):
        block = net.layer1[1]
        p3d.ops.bottleneck(torch.zeros(1, 256, 1, 2, 2), *block.arguments(), kind=block.kind, memory="more")
    assert net.memory == "less"


def test_a_mask_lets_nan_pass(triton, device):
    def of(shape):
        return torch.randn(shape, device=device).to(memory_format=torch.channels_last_3d)

    dz, w, o, mask = of((1, 16, 2, 3, 3)), of((16, 32, 1, 1, 1)), of((1, 32, 2, 3, 3)), of((1, 32, 2, 3, 3))
    mask[0, 3, 1, 2, 0] = torch.nan
    args = Operand("raw", dz), w, _conv.pointwise()
    plain, _ = _conv.conv(*args, _conv.Epilogue(join="add", o=o), (2, 3, 3))
    got, _ = _conv.conv(*args, _conv.Epilogue(join="add", o=o, mask=mask), (2, 3, 3))
    assert torch.equal(got, torch.where(mask <= 0, 0, plain)) and got[0, 3, 1, 2, 0] != 0


def test_inference_is_that_of_its_blocks(triton, device):
    together = row("ABC").to(device).eval()
    x = torch.randn(1, 24, 3, 7, 6, device=device)
    with torch.no_grad():
        torch.testing.assert_close(together(x), apart(together)(x), rtol=1e-5, atol=1e-5)


def test_a_clip_that_needs_no_gradient(triton, device):
    together = row("AB").to(device)
    alone = apart(together)
    x = torch.randn(1, 24, 2, 5, 5, device=device)
    for net in (together, alone):
        net(x).square().sum().backward()
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def counted(monkeypatch) -> list:
    calls, one = [], Bottleneck.forward
    monkeypatch.setattr(Bottleneck, "forward", lambda block, x: calls.append(block) or one(block, x))
    return calls


def test_blocks_run_alone_where_something_must_happen_between_them(monkeypatch):
    calls = counted(monkeypatch)
    x = torch.randn(1, 24, 2, 5, 5)
    net = row("AB")
    net(x)
    assert not calls
    seen = []
    handle = net[0].register_forward_hook(lambda *_: seen.append(1))
    net(x)
    assert seen and len(calls) == 2
    handle.remove()
    handle = net[1].conv2.register_forward_hook(lambda *_: seen.append(2))
    net(x)
    assert seen[-1] == 2 and len(calls) == 4
    handle.remove()
    net[0].requires_grad_(False)
    net(x)
    assert len(calls) == 6  # the first block has nothing to train: its backward costs nothing
    with torch.no_grad():
        net(x)
    assert len(calls) == 6


def test_bad_arguments_name_the_argument():
    net = row("AB")
    with pytest.raises(ValueError, match="w_reduce: expected shape .*32"):
        net(torch.zeros(1, 32, 2, 5, 5))
    net[1].conv4 = torch.nn.Conv3d(16, 48, 1, bias=False)
    with pytest.raises(ValueError, match="norm_expand"):
        net(torch.zeros(1, 24, 2, 5, 5))
    assert all(norm.num_batches_tracked == 0 for norm in batch_norms(net))


def test_the_layers_of_a_net_are_rows():
    net = p3d.p3d63(10)
    assert all(type(layer) is BottleneckRow for layer in (net.layer1, net.layer2, net.layer3, net.layer4))
    plain = p3d.models.PlainP3D((2, 1, 1, 1), 10, wiring="port")
    names = list(plain.state_dict())
    p3d.accelerate(plain)
    assert type(plain.layer1) is BottleneckRow and list(plain.state_dict()) == names
