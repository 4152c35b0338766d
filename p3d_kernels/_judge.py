"""One step of a model (inference, training, one pass of a convolution) and whether its answers are right.

Shared by `bench`, `demo` and the benchmarks, which time nothing before it was judged here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The largest relative error that passes, whatever plain PyTorch does, by dtype: of one convolution; of what has BN and
# several convolutions; of the gradient of one parameter there, which moves by more when a maximum or the sign under a
# ReLU is decided another way. Beyond it an answer may be twice (the last: three times) as far off as plain PyTorch.
LIMITS = {
    torch.float64: (1e-12, 1e-9, 1e-6),
    torch.float32: (1e-5, 1e-4, 1e-2),
    torch.float16: (5e-4, 5e-3, 5e-2),
    torch.bfloat16: (4e-3, 2e-2, 2e-1),
}
SANE = 0.5  # nothing may be further off than this, plain PyTorch included: unrelated answers are off by 1 and more


class WrongAnswer(AssertionError):
    """An answer is off; it is not timed."""


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 without TF32 and without cuDNN's search for the fastest, for references on a GPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@torch.no_grad()
def season(model: nn.Module, x: Tensor, dtype: torch.dtype, seed: int = 1) -> nn.Module:
    """Random weights that behave like a trained net's, in place: seeded, of `dtype` exactly, statistics those of x.

    Convolutions keep the size of what they read, normalisations have scales and shifts, and residual branches add
    little: a deep net whose blocks all add much amplifies rounding to noise, and then no answer can be judged.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(parameter: Tensor, low: float, high: float) -> None:
        parameter.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)

    norms = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.copy_((torch.randn(module.weight.shape, generator=generator) * std).to(dtype))
        elif isinstance(module, nn.Linear):
            module.weight.copy_((torch.randn(module.weight.shape, generator=generator) * 0.02).to(dtype))
            module.bias.zero_()
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms.append((module, module.momentum))
            module.momentum = 1.0
            low, high = (0.05, 0.15) if name.endswith("bn4") else (0.5, 1.5)
            uniform(module.weight, low, high)
            uniform(module.bias, -0.3, 0.7)
    if norms:
        with exact_float32():
            model.train()(x)
    for module, momentum in norms:
        module.momentum = momentum
    return model


def layout(tensor: Tensor, channels_last: bool) -> Tensor:
    """A 4-D or 5-D tensor in the channels-last or the default memory format; another as it is."""
    if not channels_last or tensor.dim() not in (4, 5):
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


def arranged(model: nn.Module, channels_last: bool = True) -> nn.Module:
    """`model` in place with its weights in that layout (`Module.to` takes no net of both 2-D and 3-D layers)."""
    for parameter in model.parameters():
        parameter.data = layout(parameter.data, channels_last)
    return model


class Step:
    """One model and one pass, ready to be called.

    infer: forward without gradients. train: forward under autocast, loss (cross-entropy of labels; of a floating-point
    target, the sum of output times target) and backward, the gradients set to None before. fwd, dgrad, wgrad: that
    pass of one convolution.

    Args:
        model: in train mode for "train", else in eval mode or frozen.
        x: input. It gets a gradient in "dgrad", and in "train" with `input_gradient`.
        target: labels [N] (int64), or the gradient of the output; None without a backward.
        pass_: "infer", "train", "fwd", "dgrad" or "wgrad".
        autocast: the dtype to autocast to, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | None,
        pass_: str,
        autocast: torch.dtype | None = None,
        input_gradient: bool = False,
    ):
        self.model, self.x, self.target, self.pass_, self.autocast = model, x.detach(), target, pass_, autocast
        self.x.requires_grad_(pass_ == "dgrad" or (pass_ == "train" and input_gradient))
        model.requires_grad_(pass_ in ("train", "wgrad"))
        self.parameters = list(model.parameters())  # once, as an optimiser does
        self.forward: Tensor | None = None
        self.output: Tensor | None = None

    def prepare(self) -> None:
        """What the step starts from, on the current stream: the forward of a single backward pass."""
        if self.pass_ in ("dgrad", "wgrad"):
            self.forward = self.model(self.x)

    def clear(self) -> None:
        """Drop what the last call left."""
        self.output = self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self) -> None:
        self.clear()
        if self.pass_ in ("dgrad", "wgrad"):
            wanted = self.x if self.pass_ == "dgrad" else self.model.weight
            (self.output,) = torch.autograd.grad(self.forward, wanted, self.target, retain_graph=True)
            return
        mixed = torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.pass_ == "train"), mixed:
            y = self.model(self.x)
        if self.pass_ == "train" and self.target.dtype == torch.long:
            F.cross_entropy(y.float() if y.dtype != torch.float64 else y, self.target).backward()
        elif self.pass_ == "train":
            y.backward(self.target.to(y.dtype))
        self.output = y.detach()

    def answers(self) -> dict[str, Tensor]:
        """Output and gradients of the last call."""
        found = {"output": self.output}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found[name.removeprefix("_orig_mod.")] = parameter.grad
        if self.x.grad is not None:
            found["input"] = self.x.grad
        return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| of whole tensors in float64; infinity for another size or a value that is not finite."""
    if got.numel() != want.numel():
        return float("inf")
    got, want = got.detach().reshape(-1).double(), want.detach().reshape(-1).double()
    error, size = (got - want).norm(), want.norm()
    value = float(error / size) if size > 0 else float(error)
    return value if value == value else float("inf")


def errors(answers: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every answer, and of all gradients as one vector ("gradients").

    The gradient of one parameter may all but cancel (of a shift before another BN, say), and is then rounding. So its
    error is relative to its size, but at least to a hundredth of what it has on average in the whole vector.
    """
    if answers.keys() != reference.keys():
        raise WrongAnswer(f"expected answers {sorted(reference)}, got {sorted(answers)}")
    found = {name: relative_error(answers[name], want) for name, want in reference.items()}
    sizes = {name: float(want.double().norm()) for name, want in reference.items() if name != "output"}
    if sizes:
        whole = sum(size**2 for size in sizes.values()) ** 0.5
        wrong = {name: found[name] * (size or 1.0) for name, size in sizes.items()}
        found["gradients"] = sum(w**2 for w in wrong.values()) ** 0.5 / (whole or 1.0)
        total = sum(reference[name].numel() for name in sizes)
        for name, size in sizes.items():
            least = 0.01 * whole * (reference[name].numel() / total) ** 0.5
            found[name] = wrong[name] / (max(size, least) or 1.0)
    return found


def judge(
    what: str, found: dict[str, float], plain: dict[str, float], dtype: torch.dtype, single: bool = False
) -> float:
    """The larger of the errors of the output and of all gradients as one vector. WrongAnswer if any answer is off.

    Args:
        what: named in the message.
        found, plain: `errors` of the answers, and of plain PyTorch's at the same dtype; see `LIMITS`.
        single: the answers are those of one convolution.
    """
    one, several, parameter = LIMITS[dtype]
    for name, error in found.items():
        if single or name in ("output", "gradients"):
            allowed = min(max(one if single else several, 2 * plain[name]), SANE)
        else:
            allowed = max(parameter, 3 * plain[name])
        if not error <= allowed:
            raise WrongAnswer(
                f"{what}: {name} is {error:.2e} off the reference, allowed {allowed:.2e} "
                f"(plain PyTorch: {plain[name]:.2e})"
            )
    return max(found["output"], found.get("gradients", 0.0))
