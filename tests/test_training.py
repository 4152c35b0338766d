"""What a training loop does with a net: checkpointing, accumulation, loss scaling, capture; and how exact it is."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import p3d_kernels as p3d
from nets import batch_norms, randomise, set_mode
from p3d_kernels import _backends
from p3d_kernels._judge import season
from p3d_kernels.models import DEPTHS, P3D, PlainP3D
from p3d_kernels.models.plain import PlainBottleneck, PlainBottleneck2d
from p3d_kernels.nn import Bottleneck, BottleneckRow

TINY = (1, 1, 1, 1)


@pytest.fixture
def kernels(device):
    """Our kernels wherever the tests run: the default on a GPU, Triton's interpreter on a CPU."""
    with p3d.use_backend(None if device.type == "cuda" else "triton"):
        if why := _backends.why_not("triton", torch.empty(1, device=device)):
            pytest.skip(why)
        yield


def row(device) -> BottleneckRow:
    return randomise(BottleneckRow(Bottleneck(24, 16, "A", stride=2), Bottleneck(64, 16, "C"))).to(device)


def clips(device, n=1):
    return torch.randn(n, 24, 2, 4, 3, device=device, requires_grad=True)


def gradients(net, x):
    return [x.grad, *(p.grad for p in net.parameters())]


def clear(net, x):
    net.zero_grad(set_to_none=True)
    x.grad = None


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_checkpointing_computes_the_same(reentrant, kernels, device):
    net = row(device)
    x = clips(device)
    twin = copy.deepcopy(net)
    twin.memory = "less"
    y = net(x)
    y.square().sum().backward()
    want = [y.detach(), *gradients(net, x)]
    x.grad = None
    y = checkpoint(twin, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for a, b in zip(want, [y.detach(), *gradients(twin, x)], strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gradients_accumulate(kernels, device):
    net = set_mode(row(device), "frozen")
    parts, sums = [clips(device), clips(device)], []
    for x in parts:
        net(x).square().sum().backward()
        sums.append([p.grad.clone() for p in net.parameters()])
        clear(net, x)
    for x in parts:
        net(x).square().sum().backward()
    for p, *each in zip(net.parameters(), *sums, strict=True):
        assert torch.equal(p.grad, sum(each))


def test_two_forwards_before_their_backwards(kernels, device):
    net = row(device)
    parts = [clips(device), clips(device)]
    want = []
    for x in parts:
        net(x).square().sum().backward()
        want.append([g.clone() for g in gradients(net, x)])
        clear(net, x)
    outputs = [net(x) for x in parts]
    for x, y, expected in zip(parts[::-1], outputs[::-1], want[::-1], strict=True):
        y.square().sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(gradients(net, x), expected, strict=True))
        clear(net, x)


@pytest.mark.gpu
def test_loss_scaling_skips_a_step_that_overflows_and_takes_the_next(device):
    net, x = row(device), clips(device)
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [p.detach().clone() for p in net.parameters()]
    moved = []
    for _ in range(60):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16):
            loss = net(x).square().mean()
        scaler.scale(loss).backward()
        finite = all(g.isfinite().all() for g in gradients(net, x)[1:])
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(a, p) for a, p in zip(before, net.parameters(), strict=True))
        assert changed == finite
        moved.append(finite)
        if finite:
            break
    assert not moved[0] and moved[-1]


@pytest.mark.parametrize("where", ["layer3.0", "layer2.0.bn3", "fc"])
def test_a_failure_in_the_middle_leaves_the_net_as_it_was(where, device):
    """An error in a hook, before or after most blocks have run, some of them layer by layer because of it."""
    net = randomise(P3D(TINY, 9)).to(device).train()
    x = torch.randn(2, 3, 4, 32, 32, device=device)
    before = copy.deepcopy(net.state_dict())

    def fails(module, args):
        raise RuntimeError("in the middle")

    hook = net.get_submodule(where).register_forward_pre_hook(fails)
    for run in (net, net.features)[: 1 if where == "fc" else 2]:
        with pytest.raises(RuntimeError, match="in the middle"):
            run(x)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    hook.remove()
    net(x)
    assert all(norm.num_batches_tracked == 1 for norm in batch_norms(net))


@pytest.mark.gpu
def test_a_whole_step_in_a_graph(device):
    """As the README says. A replay, with less memory, is what a step by itself would have been, to the bit."""
    nets = [P3D(TINY, 9, wiring="author", dropout=0.0).to(device).train() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0].memory = "less"
    data = [(torch.randn(2, 3, 8, 64, 64, device=device), torch.randint(9, (2,), device=device)) for _ in range(4)]
    x, labels = (t.clone() for t in data[0])
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]

    def step(net, optimizer, x, labels):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(nets[0], optimizers[0], x, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(nets[0], optimizers[0], x, labels)
    for _ in range(3):
        step(nets[1], optimizers[1], *data[0])
    for clip, label in data:
        x.copy_(clip)
        labels.copy_(label)
        graph.replay()
        assert torch.equal(loss, step(nets[1], optimizers[1], clip, label))
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("wiring, mode", [("author", "train"), ("port", "train"), ("author", "frozen")])
def test_less_memory(wiring, mode, device):
    """The bits of the default, and a peak that is lower by more than one output of stage 1."""
    net = set_mode(randomise(P3D(DEPTHS["p3d63"], 9, wiring=wiring, dropout=0.0)).to(device), mode)
    state, x, found = copy.deepcopy(net.state_dict()), torch.randn(4, 3, 16, 112, 112, device=device), []
    for memory in ("default", "less"):
        net.memory = memory
        net.load_state_dict(state)
        for _ in range(2):  # recorded, then replayed
            net.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                y = net(x)
            y.square().mean().backward()
            peak = torch.cuda.max_memory_allocated() - before
        tensors = [y.detach(), *(p.grad for p in net.parameters()), *net.buffers()]
        found.append((peak, [t.clone() for t in tensors if t is not None]))
        del y, tensors
    (most, want), (least, got) = found
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert least < most - 2 * 256 * x.size(0) * 8 * 28 * 28


# ---- How exact it is.


class Frame(PlainBottleneck2d):
    """A 2-D block, of clips of one frame."""

    def forward(self, x):
        return super().forward(x.squeeze(2)).unsqueeze(2)


def answers(net, x, weights, dtype=None):
    """Output, gradient of x and of every parameter, in float64, of the sum of output times weights."""
    net.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        y = net(x)
    (y.double() * weights).sum().backward()
    return {"output": y, "x": x.grad} | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def off(found, want):
    """Norms of the errors, of each answer and of all gradients together; and one minus the cosine of the latter."""
    wrong = {name: float((found[name].double() - want[name]).norm()) for name in want}
    mine, true = (torch.cat([a[name].double().flatten() for name in want if name != "output"]) for a in (found, want))
    cosine = 1 - float(F.cosine_similarity(mine, true, 0))
    return wrong | {"gradients": float((mine - true).norm()), "cosine": cosine}


def assert_as_exact(ours, plain, inputs, weights, dtype, mode):
    """The root of the mean square of each error, over several inputs, is at most 1.5 times eager AMP's."""
    exact = copy.deepcopy(plain).double()
    errors = []
    for x in inputs:
        want = {k: v.double() for k, v in answers(set_mode(exact, mode), x.double(), weights).items()}
        errors.append([off(answers(set_mode(net, mode), x, weights, dtype), want) for net in (ours, plain)])
    sizes = {name: float(a.norm()) for name, a in want.items()}
    whole = sum(size**2 for name, size in sizes.items() if name not in ("output", "x")) ** 0.5
    total = sum(a.numel() for name, a in want.items() if name not in ("output", "x"))
    wrong = []
    for name in errors[0][0]:
        mine, theirs = (sum(e[i][name] ** 2 for e in errors) ** 0.5 for i in range(2))
        # Of a gradient that all but cancels nothing but rounding is left: see `_judge.errors`.
        least = 0.01 * whole * (want[name].numel() / total) ** 0.5 if name in want else 0.0
        if not mine <= 1.5 * theirs + 1e-3 * least * len(inputs) ** 0.5:
            wrong.append(f"{name}: {mine / theirs:.2f} times")
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("wiring", ["author", "port"])
def test_gradients_of_a_net(wiring, mode, dtype, device):
    torch.manual_seed(0)
    plain = PlainP3D(DEPTHS["p3d63"], 40, wiring=wiring, dropout=0.0).to(device)
    season(plain, torch.randn(4, 3, 16, 112, 112, device=device), dtype)
    ours = P3D(DEPTHS["p3d63"], 40, wiring=wiring, dropout=0.0).to(device)
    ours.load_state_dict(plain.state_dict())
    assert len(batch_norms(ours)) == len(batch_norms(plain))
    inputs = [torch.randn(4, 3, 16, 112, 112, device=device) for _ in range(4)]
    weights = torch.randn(4, 40, device=device, dtype=torch.float64)
    assert_as_exact(ours, plain, inputs, weights, dtype, mode)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("kind", ["A", "B", "C", "2d"])
@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("channels, size", [(64, (8, 20, 20)), (128, (4, 11, 9)), (256, (2, 10, 10)), (512, (1, 5, 5))])
@pytest.mark.parametrize("down", [False, True])
def test_gradients_of_a_block(channels, size, wiring, kind, mode, down, device):
    if (kind == "2d") != (size[0] == 1):
        pytest.skip("2-D blocks are those of one frame")
    torch.manual_seed(0)
    ci, stride = (2 * channels, 2) if down else (4 * channels, 1)
    make = Frame if kind == "2d" else functools.partial(PlainBottleneck, kind=kind, wiring=wiring)
    plain = randomise(make(ci, channels, stride=stride)).to(device)
    ours = Bottleneck(ci, channels, kind, wiring, stride).to(device)
    ours.load_state_dict(plain.state_dict())
    inputs = [torch.randn(8, ci, *size, device=device).bfloat16() for _ in range(4)]  # as inside a net
    y = copy.deepcopy(plain)(inputs[0].float())
    assert_as_exact(ours, plain, inputs, torch.randn(y.shape, device=device).double(), torch.bfloat16, mode)
