"""Which backend runs an op, and why another does not.

`cuda`    hand-written Hopper kernels, compiled at install (`p3d_kernels._C`)
`triton`  Triton kernels; on a CPU only under Triton's interpreter (TRITON_INTERPRET=1)
`aten`    plain PyTorch (`reference.py`), anywhere

An op names, for each backend above `aten`, the reason why it cannot run there, or None. `choose` takes the first
backend without a reason. A fallback that costs speed is never silent: it is warned of once a process and reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "aten")

_forced = os.environ.get("P3D_BACKEND") or None


def _constant(function):
    """Call `function` once for each set of arguments; torch.compile takes the result as a constant."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*args):
        return cached(*args)

    call.cache_clear = cached.cache_clear
    return torch.compiler.assume_constant_result(call)


@_constant
def native():
    """The compiled extension, or the reason (a string) why it is missing."""
    try:
        return importlib.import_module("p3d_kernels._C")
    except ImportError as error:
        return f"p3d_kernels._C is not built ({error}); reinstall with P3D_BUILD_CUDA=1 where nvcc 12.3+ is found"


@_constant
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install triton"
    return None


@_constant
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (decided by the environment at import of the kernels)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def why_not(backend: str, x: Tensor) -> str | None:
    """Why `backend` cannot run on the device and dtype of `x` at all, whatever the op; None if it can."""
    if backend == "aten":
        return None
    if torch.version.hip is not None:
        return f"{backend}: AMD cards are not supported"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{backend}: dtype {x.dtype} (expected float32, float16 or bfloat16)"
    if backend == "cuda":
        if x.device.type != "cuda":
            return f"cuda: the tensor is on {x.device.type}"
        if isinstance(native(), str):
            return f"cuda: {native()}"
        if _capability(x.device.index) != (9, 0):
            return f"cuda: compute capability {_capability(x.device.index)} (compiled for 9.0)"
        if x.dtype == torch.float32:
            return "cuda: float32 (expected bfloat16 or float16)"
        return None
    if triton_missing():
        return f"triton: {triton_missing()}"
    if x.device.type == "cpu" and interpreting():
        return None if forced() == "triton" else "triton: its interpreter runs on request only (use_backend)"
    if x.device.type != "cuda":
        return f"triton: the tensor is on {x.device.type}"
    if _capability(x.device.index) < (8, 0):
        return f"triton: compute capability {_capability(x.device.index)} (needs 8.0 or later)"
    return None


@_constant
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on one backend ("cuda", "triton", "aten"), or by choice again (None).

    An op that the named backend cannot run raises RuntimeError with the reason. The setting is the process's: all
    threads see it. The environment variable P3D_BACKEND does the same for a whole process.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS} or None, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that `use_backend` or P3D_BACKEND names, or None."""
    if _forced is not None and _forced not in BACKENDS:
        raise ValueError(f"P3D_BACKEND: expected one of {BACKENDS}, got {_forced!r}")
    return _forced


def choose(op: str, x: Tensor, reason: Callable[[str], str | None], offers: tuple[str, ...] = BACKENDS) -> str:
    """The backend to run `op` on `x` with: the first of `offers` for which neither `why_not` nor `reason` objects.

    `reason(backend)` says why this op cannot run these arguments there, or None. A backend the op does not offer is
    passed over in silence: `cuda` falls to `triton`, which then is the op's best.
    """

    def objection(backend: str) -> str | None:
        if backend == "aten":
            return None
        if backend not in offers:
            return f"{backend}: {op} has no {backend} kernel"
        return why_not(backend, x) or reason(backend)

    name = forced()
    if name is not None:
        # "cuda" means cuda where the op has a kernel for it, else triton
        candidates = ("cuda", "triton") if name == "cuda" and "cuda" not in offers else (name,)
        for backend in candidates:
            why = objection(backend)
            if backend in offers and why is None:
                return backend
        raise RuntimeError(f"{op}: backend {name!r} was asked for but cannot run it: {why}")
    why = None
    for backend in BACKENDS:
        if backend not in offers:
            continue
        why = objection(backend)
        if why is None:
            return backend
        if x.device.type == "cuda" and backend == "triton":
            _warn_once(f"p3d_kernels.{op} falls back to plain PyTorch ({why})")
    return "aten"
