"""Fixtures of all tests. Without a GPU, Triton kernels run on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: before any kernel of ours

from p3d_kernels import _backends, use_backend  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items):
    if DEVICE.type == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CUDA device where there is one, else the CPU."""
    return DEVICE


@pytest.fixture(params=_backends.BACKENDS[::-1])
def backend(request):
    """Every backend in turn, forced for the whole test; skipped with the reason where it cannot run at all."""
    probe = torch.empty(1, device=DEVICE, dtype=torch.float16)
    with use_backend(request.param):
        if why := _backends.why_not(request.param, probe):
            pytest.skip(why)
        yield request.param


@pytest.fixture
def hopper(request):
    """For the tests of CUDA kernels: those that need a card skip, with the reason, where the extension cannot run."""
    if "gpu" in request.keywords:
        if why := _backends.why_not("cuda", torch.empty(1, device=DEVICE, dtype=torch.float16)):
            pytest.skip(why)


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers for every test, and uninitialised memory that is NaN: an unwritten output shows."""
    torch.manual_seed(0)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    """A P3D_BACKEND of the caller's shell would change what the tests test."""
    monkeypatch.setattr(_backends, "_forced", None)
