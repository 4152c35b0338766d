"""Choosing a backend: order, force, environment, refusals and warnings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import p3d_kernels as p3d
from p3d_kernels import _backends

CPU = torch.zeros(1)


class Cuda:
    """What `choose` looks at of a tensor on a GPU."""

    def __init__(self, dtype=torch.bfloat16):
        self.dtype, self.device = dtype, torch.device("cuda", 0)


def willing(backend):
    return None


@pytest.fixture
def card(monkeypatch):
    """A pretended GPU of any capability, with the extension built or not."""

    def pretend(capability=(9, 0), built=True, triton=None):
        monkeypatch.setattr(_backends, "_capability", lambda index: capability)
        monkeypatch.setattr(_backends, "native", lambda: object() if built else "p3d_kernels._C is not built (test)")
        monkeypatch.setattr(_backends, "triton_missing", lambda: triton)

    _backends._warn_once.cache_clear()
    yield pretend
    _backends._warn_once.cache_clear()


@pytest.mark.parametrize(
    "capability, built, triton, dtype, expected",
    [
        ((9, 0), True, None, torch.bfloat16, "cuda"),
        ((9, 0), True, None, torch.float32, "triton"),
        ((9, 0), False, None, torch.bfloat16, "triton"),
        ((10, 0), True, None, torch.float16, "triton"),
        ((8, 0), True, None, torch.float16, "triton"),
        ((7, 5), True, None, torch.float16, "aten"),
        ((9, 0), True, "no Triton", torch.bfloat16, "cuda"),
        ((9, 0), False, "no Triton", torch.bfloat16, "aten"),
        ((9, 0), True, None, torch.float64, "aten"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*falls back:RuntimeWarning")
def test_the_first_backend_that_can(card, capability, built, triton, dtype, expected):
    card(capability, built, triton)
    assert _backends.choose("op", Cuda(dtype), willing) == expected


def test_the_op_has_a_say(card):
    card()
    assert _backends.choose("op", Cuda(), lambda b: "too wide" if b == "cuda" else None) == "triton"
    assert _backends.choose("op", Cuda(), willing, ("triton", "aten")) == "triton"
    with pytest.warns(RuntimeWarning, match="op falls back to plain PyTorch .too wide"):
        assert _backends.choose("op", Cuda(), lambda b: "too wide") == "aten"


def test_a_fallback_is_warned_of_once_a_reason(card):
    card((7, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("op", "op", "other"):
            assert _backends.choose(name, Cuda(), willing) == "aten"
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "7, 5" in messages[0] and "p3d_kernels.other" in messages[1]


def test_no_warning_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(_backends, "interpreting", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.choose("op", CPU, willing) == "aten"


def test_forced(card):
    card()
    with p3d.use_backend("triton"):
        assert _backends.choose("op", Cuda(), willing) == "triton"
        with p3d.use_backend("aten"):
            assert _backends.choose("op", Cuda(), willing) == "aten"
            with p3d.use_backend(None):
                assert _backends.choose("op", Cuda(), willing) == "cuda"
        assert _backends.forced() == "triton"
    assert _backends.forced() is None


def test_forcing_ends_with_an_exception():
    with pytest.raises(KeyError), p3d.use_backend("aten"):
        raise KeyError
    assert _backends.forced() is None


def test_forced_but_impossible_says_why(card):
    card((8, 0))
    with p3d.use_backend("cuda"), pytest.raises(RuntimeError, match=r"op: backend 'cuda' .* capability \(8, 0\)"):
        _backends.choose("op", Cuda(), willing)
    with p3d.use_backend("triton"), pytest.raises(RuntimeError, match="op: backend 'triton' .* too wide"):
        _backends.choose("op", Cuda(), lambda b: "too wide")
    with p3d.use_backend("triton"), pytest.raises(RuntimeError, match="dtype torch.float64"):
        _backends.choose("op", Cuda(torch.float64), willing)


def test_cuda_is_a_wish_where_an_op_has_no_cuda_kernel(card):
    card()
    with p3d.use_backend("cuda"):
        assert _backends.choose("op", Cuda(), willing, ("triton", "aten")) == "triton"


def test_unknown_names():
    with pytest.raises(ValueError, match="backend: expected one of .* got 'cudnn'"), p3d.use_backend("cudnn"):
        pass


def run(code: str, first: str = "", **environment: str) -> subprocess.CompletedProcess:
    """`code` in a fresh interpreter, from the root of the package."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "P3D_BACKEND")}
    root = os.path.dirname(os.path.dirname(os.path.abspath(p3d.__file__)))
    command = [sys.executable, "-c", f"{first}\nimport torch, p3d_kernels as p3d\n{code}"]
    return subprocess.run(command, env=clean | environment, cwd=root, capture_output=True, text=True)


def test_the_environment_variable():
    say = "print(p3d._backends.forced())"
    assert run(say, P3D_BACKEND="aten").stdout.strip() == "aten"
    assert run(say, P3D_BACKEND="").stdout.strip() == "None"
    inner = "with p3d.use_backend('aten'): " + say
    assert run(inner, P3D_BACKEND="triton").stdout.strip() == "aten"
    refusal = run(say, P3D_BACKEND="cudnn").stderr
    assert "P3D_BACKEND: expected one of ('cuda', 'triton', 'aten'), got 'cudnn'" in refusal


def test_reasons_on_a_cpu(monkeypatch):
    assert "the tensor is on cpu" in _backends.why_not("cuda", CPU)
    monkeypatch.setattr(_backends, "interpreting", lambda: False)
    assert "cpu" in _backends.why_not("triton", CPU) or "not installed" in _backends.why_not("triton", CPU)
    assert _backends.why_not("aten", CPU) is None


@pytest.mark.parametrize("missing", ["triton", "p3d_kernels._C"])
def test_import_and_use_without(missing):
    """Neither Triton nor the extension is needed to import the package and to run its ops."""
    code = """
assert not torch.cuda.is_initialized()
y = p3d.ops.spatial_conv(torch.ones(1, 2, 1, 3, 3), torch.ones(4, 2, 1, 3, 3))
assert y.shape == (1, 4, 1, 3, 3)
p3d.ops.bn_relu(y, p3d.Norm())
"""
    done = run(code, f"import sys; sys.modules[{missing!r}] = None")  # its import then raises ImportError
    assert done.returncode == 0, done.stderr
