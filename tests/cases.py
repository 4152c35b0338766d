"""The cases of the conformance suite, and how each is turned into tensors, run and judged.

A case is data: the op, its sizes and its options. `inputs` draws its tensors; `evaluate` runs a function on them and
returns the output, every gradient and the running statistics; `reference_of` is the float64 judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from p3d_kernels import Norm, reference

NORMS = {
    "batch": {},
    "cumulative": {"momentum": None},
    "no_affine": {"affine": False},
    "no_tracking": {"tracking": False},
    "frozen": {"training": False},
    "frozen_no_affine": {"training": False, "affine": False},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: x has `shape`, `co` channels come out; a bottleneck has `mid` inside."""

    op: str
    shape: tuple[int, int, int, int, int]  # N, Ci, T, H, W
    co: int = 0
    mid: int = 0
    layout: str = "ndhwc"  # or "ncdhw", "sliced"
    norm: str = "batch"  # a key of NORMS
    offset: float = 0.0  # mean of a normalised tensor over its standard deviation
    residual: bool = False
    down: bool = False
    options: tuple[tuple[str, object], ...] = ()  # keyword arguments of the op

    @property
    def id(self) -> str:
        flags = [self.layout] * (self.layout != "ndhwc") + [self.norm] * (self.norm != "batch")
        flags += [f"offset{self.offset:g}"] * bool(self.offset) + ["residual"] * self.residual + ["down"] * self.down
        flags += [f"{k}={v}".replace(" ", "") for k, v in self.options]
        sizes = ["x".join(map(str, self.shape)), *(str(c) for c in (self.mid, self.co) if c)]
        return ",".join([self.op, "-".join(sizes), *flags])

    @property
    def fused(self) -> bool:
        """Whether tensors pass from one kernel to another inside the op."""
        return self.op in ("stem", "pseudo3d_conv", "bottleneck")

    def weights(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of every convolution weight, by the name of the op's argument."""
        ci, co, mid, option = self.shape[1], self.co, self.mid, dict(self.options)
        if self.op in ("bn_relu", "max_pool"):
            return {}
        if self.op == "pseudo3d_conv":
            temporal = {"A": (co, co, 3, 1, 1), "B": (co, ci, 3, 1, 1), "C": (co, co, 3, 1, 1), "2d": None}
            return {"w_s": (co, ci, 1, 3, 3), "w_t": temporal[option["kind"]]}
        if self.op == "bottleneck":
            shapes = {"w_reduce": (mid, ci, 1, 1, 1), "w_s": (mid, mid, 1, 3, 3)}
            shapes["w_t"] = None if option["kind"] == "2d" else (mid, mid, 3, 1, 1)
            shapes["w_expand"] = (co, mid, 1, 1, 1)
            return {**shapes, "w_down": (co, ci, 1, 1, 1)} if self.down else shapes
        taps = {"spatial_conv": (1, 3, 3), "temporal_conv": (3, 1, 1), "pointwise_conv": (1, 1, 1), "stem": (1, 7, 7)}
        return {"w": (co, ci, *taps[self.op])}

    def norms(self) -> dict[str, int | None]:
        """The channels of every normalisation, by the name of the op's argument."""
        if self.op == "bn_relu":
            return {"norm": self.shape[1]}
        if not self.fused:
            return {}
        return {name.replace("w", "norm", 1): shape and shape[0] for name, shape in self.weights().items()}


@dataclasses.dataclass
class Inputs:
    """The tensors of a case. A leaf's or buffer's name is the op's argument, or argument.field of a Norm."""

    case: Case
    leaves: dict[str, Tensor]
    buffers: dict[str, Tensor]
    dy: Tensor

    def to(self, dtype: torch.dtype, norm_dtype: torch.dtype = torch.float32) -> Inputs:
        """A copy with its own memory and the same strides; parameters and buffers of a Norm get `norm_dtype`."""

        def copy(name, t):
            target = norm_dtype if "." in name else dtype
            return t.detach().clone() if t.dtype in (target, torch.int64) else t.detach().to(target)

        leaves = {k: copy(k, t).requires_grad_() for k, t in self.leaves.items()}
        return Inputs(self.case, leaves, {k: copy(k, t) for k, t in self.buffers.items()}, self.dy.to(dtype))

    def arguments(self) -> dict:
        """The keyword arguments of the op."""
        mode = NORMS[self.case.norm]
        call = {k: t for k, t in self.leaves.items() if "." not in k}
        call |= {name: None for name, shape in self.case.weights().items() if shape is None}
        for name, channels in self.case.norms().items():
            fields = {**self.leaves, **self.buffers}
            members = {k.split(".")[1]: t for k, t in fields.items() if k.startswith(name + ".")}
            rest = {"training": mode.get("training", True), "momentum": mode.get("momentum", 0.1)}
            call[name] = Norm(**members, **rest) if channels else None
        return {**call, **dict(self.case.options)}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; "sliced" leaves gaps along C, H and W."""
    if layout == "ncdhw":
        return values.contiguous()
    if layout == "ndhwc":
        return values.contiguous(memory_format=torch.channels_last_3d)
    n, c, t, h, w = values.shape
    whole = torch.full((n, c + 3, t, h + 2, 2 * w), float("nan"), dtype=values.dtype, device=values.device)
    x = whole.contiguous(memory_format=torch.channels_last_3d)[:, 1 : c + 1, :, 1 : h + 1, ::2]
    return x.copy_(values)


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The tensors of `case`, the same for every backend; values are representable in `dtype`."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    mode = NORMS[case.norm]
    x = normal(*case.shape)
    leaves, buffers = {}, {}
    for name, shape in case.weights().items():
        if shape is not None:
            leaves[name] = normal(*shape) * (shape[1] * shape[2] * shape[3] * shape[4]) ** -0.5
    if case.offset and case.op == "bn_relu":
        x += case.offset
    elif case.offset:  # integers, so that the first convolution is exact and only its normalisation is judged
        x = x.mul(1.5).round().clamp(-3, 3)
        x[:, -1] = 1
        name = next(iter(leaves))
        w = leaves[name] = leaves[name].sign()
        std = (w[:, :-1].square().sum((1, 2, 3, 4)) * x[:, :-1].var()).sqrt()
        w[:, -1] = 0
        w[:, -1, w.size(2) // 2, w.size(3) // 2, w.size(4) // 2] = (case.offset * std).round()
    leaves = {"x": x, **leaves}
    if case.residual:
        leaves["residual"] = normal(*case.shape)
    for name, channels in case.norms().items():
        if channels and mode.get("affine", True):
            weight = (torch.rand(channels, generator=generator) + 0.5) * normal(channels).sign()
            bias = 0.5 * normal(channels)
            if channels > 4:
                weight[1], bias[1] = 0, 0.5  # a channel that training has switched off: all its positions tie
            leaves |= {f"{name}.weight": weight, f"{name}.bias": bias}
        if channels and mode.get("tracking", True):
            buffers[f"{name}.running_mean"] = 0.5 * normal(channels) + (case.offset if case.op == "bn_relu" else 0)
            buffers[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
            buffers[f"{name}.num_batches_tracked"] = torch.tensor(3)
    made = Inputs(case, leaves, buffers, torch.zeros(0))
    with torch.no_grad():
        dy = normal(*getattr(reference, case.op)(**made.to(torch.float32).arguments()).shape)
    for name, t in leaves.items():
        t = t.to(device) if "." in name else t.to(dtype).to(device)
        leaves[name] = laid_out(t, case.layout if name in ("x", "residual") else "ncdhw")
    made.buffers = {k: t.to(device) for k, t in buffers.items()}
    made.dy = laid_out(dy.to(dtype).to(device), case.layout)
    return made


def evaluate(function, given: Inputs, grad: bool = True) -> dict[str, Tensor]:
    """y, the gradient of every leaf (under the leaf's name), and the buffers afterwards."""
    with torch.set_grad_enabled(grad):
        y = function(**given.arguments())
    results = {"y": y.detach()}
    if grad:
        names, leaves = zip(*given.leaves.items())
        results |= dict(zip(names, torch.autograd.grad(y, leaves, given.dy)))
    return results | given.buffers


def kind_of(name: str) -> str:
    """What the checker calls the result of this name."""
    if "." in name:
        return "bn_sum"
    return "wgrad" if name.startswith("w") else "output"


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, dtype):
        ctx.dtype = dtype
        return t.to(dtype).to(t.dtype)

    @staticmethod
    def backward(ctx, g):
        return g.to(ctx.dtype).to(g.dtype), None


@contextlib.contextmanager
def stored_as(dtype: torch.dtype, unstored: Tensor | None = None):
    """Inside, the reference rounds to `dtype` what enters and leaves a convolution, forward and backward.

    Those tensors lie in memory in that dtype, or enter a matrix unit in it, whoever computes. A ReLU or a pool selects
    on them: a judge that did not round would call each selection within a rounding of a tie an error of full size.

    Args:
        unstored: the weight of a convolution whose result stays in float32 (a bottleneck's expand).
    """
    functional = SimpleNamespace(**{k: getattr(F, k) for k in dir(F) if not k.startswith("_")})

    def conv3d(x, w, **options):
        z = F.conv3d(_Round.apply(x, dtype), w, **options)
        return z if w is unstored else _Round.apply(z, dtype)

    functional.conv3d = conv3d
    reference.F = functional
    try:
        yield
    finally:
        reference.F = F


def reference_of(given: Inputs, dtype: torch.dtype, grad: bool = True) -> dict[str, Tensor]:
    """The results in float64 from the rounded inputs."""
    exact = given.to(torch.float64, torch.float64)
    rounds = given.case.fused and dtype in (torch.float16, torch.bfloat16)
    with stored_as(dtype, exact.leaves.get("w_expand")) if rounds else contextlib.nullcontext():
        return evaluate(getattr(reference, given.case.op), exact, grad)


def _pool(kernel, stride, padding=(0, 0, 0), ceil_mode=False):
    return (("kernel", kernel), ("stride", stride), ("padding", padding), ("ceil_mode", ceil_mode))


def _block(kind, wiring, stride=None):
    return (("kind", kind), ("wiring", wiring)) + ((("stride", stride),) if stride else ())


# Small: every one runs in Triton's interpreter. Odd sizes, channels off the tile, lone frames and rows.
CASES = [
    Case("spatial_conv", (2, 8, 3, 7, 9), 20),
    Case("spatial_conv", (1, 5, 1, 1, 6), 45, layout="ncdhw"),
    Case("spatial_conv", (1, 20, 2, 5, 1), 8, layout="sliced"),
    Case("spatial_conv", (1, 72, 2, 6, 5), 40, options=(("stride", 2),)),
    Case("temporal_conv", (2, 20, 4, 3, 5), 8),
    Case("temporal_conv", (1, 45, 1, 5, 3), 72, layout="ncdhw"),
    Case("temporal_conv", (2, 5, 3, 4, 4), 20, layout="sliced", options=(("stride", 2),)),
    Case("pointwise_conv", (2, 20, 3, 5, 7), 45),
    Case("pointwise_conv", (2, 45, 2, 7, 5), 5, layout="sliced", options=(("stride", 2),)),
    Case("pointwise_conv", (1, 72, 1, 8, 1), 40, layout="ncdhw"),
    Case("bn_relu", (2, 20, 3, 7, 9)),
    Case("bn_relu", (2, 5, 3, 7, 9), layout="sliced", norm="cumulative", residual=True),
    Case("bn_relu", (1, 72, 1, 8, 1), layout="ncdhw", norm="no_affine"),
    Case("bn_relu", (2, 20, 4, 16, 20), norm="no_tracking", residual=True),
    Case("bn_relu", (2, 20, 3, 5, 7), norm="frozen"),
    Case("bn_relu", (1, 45, 1, 1, 1), norm="frozen_no_affine", residual=True),
    Case("bn_relu", (2, 40, 3, 7, 9), offset=100, residual=True),
    Case("bn_relu", (2, 8, 4, 24, 28), offset=300),
    Case("max_pool", (2, 8, 5, 7, 9), options=_pool((2, 3, 3), (2, 2, 2), ceil_mode=True)),
    Case("max_pool", (2, 20, 5, 8, 6), layout="sliced", options=_pool((2, 3, 3), (2, 2, 2), (0, 1, 1))),
    Case("max_pool", (1, 5, 4, 5, 7), layout="ncdhw", options=_pool((2, 1, 1), (2, 1, 1))),
    Case("max_pool", (1, 45, 2, 6, 5), options=_pool((2, 3, 3), (1, 1, 1), (1, 1, 1))),
    Case("stem", (2, 3, 2, 9, 7), 16, options=(("wiring", "author"),)),
    Case("stem", (1, 2, 3, 6, 9), 16, norm="no_tracking", layout="sliced", options=(("wiring", "port"),)),
    Case("stem", (1, 3, 2, 8, 5), 32, norm="frozen", layout="ncdhw", options=(("wiring", "author"),)),
    *(
        Case("pseudo3d_conv", (2, 8, 3, 5, 7), 20, options=_block(kind, wiring))
        for kind in reference.KINDS
        for wiring in reference.WIRINGS
    ),
    Case("pseudo3d_conv", (1, 20, 1, 7, 3), 5, layout="ncdhw", norm="cumulative", options=_block("A", "author")),
    Case("pseudo3d_conv", (1, 20, 2, 5, 3), 8, layout="sliced", norm="frozen", options=_block("B", "author")),
    Case("pseudo3d_conv", (2, 8, 2, 5, 4), 8, norm="no_affine", options=_block("C", "port")),
    Case("pseudo3d_conv", (2, 8, 3, 8, 9), 8, offset=100, options=_block("B", "port")),
    *(
        Case("bottleneck", (2, 20, 3, 5, 7), 20, 8, options=_block(kind, wiring))
        for kind, wiring in (("A", "author"), ("B", "author"), ("B", "port"), ("C", "author"), ("C", "port"))
    ),
    Case("bottleneck", (2, 12, 2, 7, 9), 20, 8, down=True, options=_block("A", "author", 2)),
    Case("bottleneck", (2, 20, 2, 6, 7), 40, 5, down=True, layout="sliced", options=_block("2d", "author", 2)),
    Case("bottleneck", (1, 12, 2, 5, 3), 20, 8, down=True, norm="frozen", options=_block("B", "port", 1)),
    Case("bottleneck", (2, 20, 2, 5, 4), 20, 8, norm="cumulative", layout="ncdhw", options=_block("C", "author")),
    Case("bottleneck", (1, 20, 3, 5, 4), 20, 8, norm="frozen", options=_block("A", "author")),
    Case("bottleneck", (2, 20, 3, 8, 9), 20, 8, offset=100, options=_block("A", "port")),
]

# The stages of a P3D net at a clip of 16x160x160, for a GPU: (mid, T, H).
STAGES = [(64, 8, 40), (128, 4, 20), (256, 2, 10), (512, 1, 5)]
STAGE_CASES = [
    Case("stem", (2, 3, 16, 160, 160), 64, options=(("wiring", "author"),)),
    Case("stem", (1, 2, 15, 112, 113), 64, options=(("wiring", "port"),)),
    Case("bn_relu", (2, 256, 8, 40, 40), residual=True),
    Case("max_pool", (2, 256, 8, 40, 40), options=_pool((2, 1, 1), (2, 1, 1))),
    Case("spatial_conv", (2, 64, 8, 40, 40), 64),
    Case("spatial_conv", (2, 64, 16, 56, 56), 144),
    Case("temporal_conv", (2, 144, 16, 56, 56), 64),
    Case("pointwise_conv", (2, 256, 8, 40, 40), 512, options=(("stride", 2),)),
    *(
        Case("pseudo3d_conv", (2, mid, t, h, h), mid, options=_block(kind, "author"))
        for (mid, t, h), kind in zip(STAGES, ("A", "B", "C", "2d"))
    ),
    *(
        Case("bottleneck", (2, 4 * mid, t, h, h), 4 * mid, mid, options=_block(kind, "author"))
        for (mid, t, h), kind in zip(STAGES, ("B", "C", "A", "2d"))
    ),
    *(
        Case("bottleneck", (2, 4 * mid, t, h, h), 4 * mid, mid, norm="frozen", options=_block(kind, "port"))
        for (mid, t, h), kind in zip(STAGES[:3], "CAB")
    ),
    Case("bottleneck", (2, 64, 8, 40, 40), 256, 64, down=True, options=_block("A", "author", 1)),
    Case("bottleneck", (2, 256, 4, 40, 40), 512, 128, down=True, options=_block("B", "author", 2)),
]


def first_of_each(cases: list[Case]) -> list[Case]:
    """One case an op, with batch statistics where the op has any."""
    return list({case.op: case for case in reversed(cases) if case.norm == "batch" and not case.offset}.values())
