"""Gradients of a bottleneck where its kernels change tiles: small blocks in the interpreter, a net's stages on a GPU.

What a block reads is far from zero on average, as behind a ReLU: `a Q` and c of `_gram.py`, which all but cancel, then
are large, and neither can be missing unseen.
"""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import p3d_kernels as p3d
from cases import stored_as
from p3d_kernels import Norm
from p3d_kernels._judge import season
from p3d_kernels.ops._conv import pack_weight
from p3d_kernels.ops._fused import Config
from p3d_kernels.ops._gram import gram, gram_bwd
from p3d_kernels.ops._triton import Operand
from p3d_kernels.ops.pseudo3d import join_of
from tolerance import CHAIN, NORM_LIMIT


class Block(NamedTuple):
    ci: int
    mid: int
    kind: str
    wiring: str
    stride: int
    n: int
    t: int
    h: int  # and width

    @property
    def down(self) -> bool:
        return self.stride != 1 or self.ci != 4 * self.mid


SMALL = [
    Block(32, 16, "A", "port", 1, 1, 4, 8),
    Block(32, 16, "A", "port", 2, 2, 3, 9),
    Block(64, 16, "B", "author", 1, 1, 4, 7),
    Block(64, 16, "C", "author", 1, 1, 4, 7),
    Block(40, 20, "2d", "port", 2, 4, 1, 9),
]
LARGE = [
    Block(64, 64, "A", "port", 1, 8, 8, 40),
    Block(256, 128, "A", "port", 2, 8, 4, 40),
    Block(512, 256, "B", "port", 2, 16, 2, 20),
    Block(1024, 512, "2d", "port", 2, 32, 1, 10),
    Block(256, 64, "C", "port", 1, 8, 8, 40),
    Block(512, 128, "B", "author", 1, 16, 4, 20),
    Block(1024, 256, "C", "author", 1, 32, 2, 10),
]
HALVES = torch.float16, torch.bfloat16

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def each(which=lambda block: True):
    """Parametrise a test by (block, dtype) over those of the blocks."""
    small = [(block, torch.float16) for block in SMALL if which(block)]
    large = [pytest.param(*of, marks=pytest.mark.gpu) for of in itertools.product(filter(which, LARGE), HALVES)]

    def label(value):
        return "-".join(map(str, value)) if isinstance(value, Block) else str(value).removeprefix("torch.")

    return pytest.mark.parametrize(("block", "dtype"), small + large, ids=label)


def limit(dtype: torch.dtype, kind: str) -> float:
    """The relative error of a whole tensor that a block may have."""
    return CHAIN[kind] * NORM_LIMIT[str(dtype).removeprefix("torch.")]


def off(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# --- the whole block -------------------------------------------------------------------------------------------------


def behind_relu(shape: tuple[int, ...]) -> Tensor:
    return torch.relu(1.5 + torch.randn(shape))


def nearly_constant(shape: tuple[int, ...]) -> Tensor:
    return 1.5 + 0.5 * torch.rand(shape)


def drawn(block: Block, dtype: torch.dtype, device: torch.device, values) -> tuple[nn.Module, Tensor, Tensor]:
    """(module, x, dy), all weights and values representable in dtype; values(shape) draws x."""
    x = values((block.n, block.ci, block.t, block.h, block.h)).to(device, dtype).float()
    net = p3d.nn.Bottleneck(block.ci, block.mid, block.kind, block.wiring, block.stride).to(device)
    with p3d.use_backend("aten"):
        season(net, x, dtype)
    h = -(-block.h // block.stride)
    return net.train(), x, torch.randn(block.n, 4 * block.mid, block.t, h, h).to(device, dtype)


def gradients(call, net: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """In float64: that of x and of every parameter, of y = call(net, x)."""
    x = x.clone().requires_grad_()
    leaves, y = {"x": x, **dict(net.named_parameters())}, call(net, x)
    return {k: g.double() for k, g in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)))}


def on(backend: str, dtype: torch.dtype):
    """A call of the module under autocast."""

    def call(net, x):
        with p3d.use_backend(backend), torch.autocast(x.device.type, dtype):
            return net(x)

    return call


def exactly(dtype: torch.dtype):
    """The same in the dtype of x, but for the tensors that lie in memory, which are rounded to dtype."""

    def call(net, x):
        arguments, how = net.arguments(), {"kind": net.kind, "wiring": net.wiring, "stride": net.stride}
        with stored_as(dtype, unstored=arguments[6]):  # that of expand
            return p3d.reference.bottleneck(x, *arguments, **how)

    return call


@each()
def test_gradients(backend, block, dtype, device):
    net, x, dy = drawn(block, dtype, device, behind_relu)
    reference = gradients(exactly(dtype), copy.deepcopy(net).double(), x.double(), dy)
    ours, plain = (gradients(on(name, dtype), net, x, dy) for name in (backend, "aten"))
    wrong = {}
    for name, expected in reference.items():
        kind = "output" if name == "x" else "wgrad" if expected.dim() > 1 else "bn_sum"
        error, theirs = off(ours[name], expected), off(plain[name], expected)
        if not error <= 2 * theirs + limit(dtype, kind):
            wrong[name] = f"{error:.1e} (plain PyTorch {theirs:.1e})"
    assert not wrong, wrong


@each(lambda block: block.down)
def test_gradient_of_a_constant(backend, block, dtype, device):
    """Normalisations absorb a constant, so dx sums to nothing over positions; what rounding leaves must not add up."""
    net, x, dy = drawn(block, dtype, device, nearly_constant)
    ours, plain = (gradients(on(name, dtype), net, x, dy)["x"] for name in (backend, "aten"))
    total, theirs = (g.sum((0, 2, 3, 4)).norm() for g in (ours, plain))
    assert total < 2 * theirs


# --- the gradient through a 1x1x1 convolution and its normalisation --------------------------------------------------


def channels(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1, 1)


def operand(block: Block, dtype: torch.dtype, device: torch.device) -> tuple[Operand, Tensor, Tensor | float]:
    """What expand reads: (operand, its value a, what the outer ReLU of a join multiplies the gradient of a by)."""
    shape = block.n, block.mid, block.t, -(-block.h // block.stride), -(-block.h // block.stride)
    raws, records, u = [], [], []
    for _ in range(1 if block.kind == "2d" else 2):
        z = torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
        mean, scale, bias = (torch.randn(3, block.mid) + torch.tensor([[0.0], [0.0], [1.0]])).to(device)
        raws.append(z)
        records.append(torch.stack([mean, scale, bias, scale, scale]))
        u.append((z.double() - channels(mean)) * channels(scale) + channels(bias))
    join = join_of(records, raws, Config(block.kind, block.wiring))
    relu = torch.relu
    if join.read == "bn_relu":
        a, slope = relu(u[-1]), 1.0
    elif join.read == "join_port":
        a, slope = relu(u[0]) + relu(u[1]), 1.0
    else:
        share = 0.5 if join.read == "join_c" else 1.0
        a = relu(share * (relu(u[0]) + u[1]))
        slope = share * (a > 0)
    return join, a.to(dtype).double(), slope


def judge(x: Operand, a: Tensor, slope, co: int, stride: int, kind: str | None) -> None:
    """`gram_bwd` against its formula in float64, in which `a Q` matters."""
    dtype, device, ci = x.a.dtype, x.a.device, a.size(1)
    w = (torch.randn(co, ci) / ci**0.5).to(device, dtype)
    weight = (torch.rand(co) + 0.5).to(device)
    rows = a.movedim(1, -1).flatten(0, -2)  # [P, Ci]
    z = rows @ w.double().T
    var, mean = torch.var_mean(z, 0, correction=0)
    invstd = (var + 1e-5).rsqrt()
    scale = weight * invstd

    def like_output(t: Tensor) -> Tensor:  # [P, Co] -> [N, Co, T, H, W]
        return t.to(dtype).view(*a.shape[:1], *a.shape[2:], co).movedim(-1, 1)

    dy, y = like_output(torch.randn_like(z) + (z - mean) * invstd), like_output(torch.randn_like(z))
    record = torch.stack([mean, scale, torch.zeros_like(mean), invstd, var]).float()
    norm = Norm(weight, torch.zeros_like(weight))
    packed = pack_weight(w.view(co, ci, 1, 1, 1), dtype)
    kept, _ = gram(x, packed, norm, stride)
    da = gram_bwd(dy, y, packed, norm, record, x, kept, stride, True, kind)[0]

    g = torch.where(y > 0, dy, 0).movedim(1, -1).flatten(0, -2).double()
    centred = z - mean
    along = centred * invstd**2 * (g * centred).mean(0)  # what a Q takes away, less its mean
    expected, term = ((scale * t) @ w.double() for t in (g - g.mean(0) - along, along))
    assert term.norm() >= 0.1 * expected.norm(), "a Q could be missing unseen"
    expected = expected.view(*a.shape[:1], *a.shape[2:], ci).movedim(-1, 1) * slope
    error = off(da.double(), expected)
    assert error <= limit(dtype, "output"), f"relative error {error:.1e}"


@each()
def test_input_gradient_of_expand(backend, block, dtype, device):
    join, a, slope = operand(block, dtype, device)
    judge(join, a, slope, 4 * block.mid, 1, block.kind)


@each(lambda block: block.down)
def test_input_gradient_of_downsample(backend, block, dtype, device):
    x = behind_relu((block.n, block.ci, block.t, block.h, block.h)).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    a = x[..., :: block.stride, :: block.stride].double()
    judge(Operand("raw", x), a, 1.0, 4 * block.mid, block.stride, None)
