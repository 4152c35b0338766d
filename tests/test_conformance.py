"""One suite for every op over every backend: values, gradients, statistics, layout, modes, refusals.

The judge is `p3d_kernels.reference` in float64 on the already rounded inputs (see `cases.reference_of`), the vendor the
same function at the same dtype on the same device.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import p3d_kernels as p3d
from cases import CASES, STAGE_CASES, Case, Inputs, evaluate, first_of_each, inputs, kind_of, reference_of
from p3d_kernels import Norm, reference
from tolerance import check

MODES = ("float32", "tf32", "float16", "bfloat16") if torch.cuda.is_available() else ("float32", "float16")
FIRST = first_of_each(CASES)


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def op(name: str):
    return getattr(p3d.ops, name)


def kernels(case: Case, backend: str) -> None:
    """Skip where there is no kernel of `backend` to test."""
    if backend != "aten" and op(case.op) is getattr(reference, case.op):
        pytest.skip(f"p3d_kernels.ops.{case.op} is the reference function itself")


@pytest.fixture
def precision(request, monkeypatch):
    """(dtype, whether float32 products are formed in TF32) of a mode; torch's own switch is set to match."""
    mode = getattr(request, "param", "float32")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", mode == "tf32")
    return (torch.float32, True) if mode == "tf32" else (getattr(torch, mode), False)


def judge(given: Inputs, actual: dict, expected: dict, vendor: dict | None, dtype: torch.dtype, tf32: bool) -> None:
    """Every result against the reference; counters exactly."""
    case = given.case
    selects = case in STAGE_CASES and case.fused
    for name, value in actual.items():
        if value.dtype == torch.int64:
            assert value.item() == expected[name].item(), name
            continue
        # The sums of a lone BN are float32 all through; those of a fused op are as good as the tensors they sum.
        own = dtype if case.fused else value.dtype
        theirs = vendor[name].to(own) if vendor else None
        if "." in name and value.device.type == "cpu":
            theirs = None  # PyTorch's CPU kernels sum in float64
        chain = case.op == "bottleneck"
        check(value.to(own), expected[name], own, theirs, kind_of(name), tf32, chain, selects, f"{case.id}: {name}")


def run_and_judge(case: Case, backend: str, device: torch.device, dtype: torch.dtype, tf32: bool) -> None:
    given = inputs(case, dtype, device)
    expected = reference_of(given, dtype)
    vendor = evaluate(getattr(reference, case.op), given.to(dtype))
    # TF32 decides which way a ReLU or a pool goes, and a gradient then has errors of full size: forward only.
    gradients = not (tf32 and case.fused)
    run = given.to(dtype)
    versions = {name: t._version for name, t in run.leaves.items()}
    actual = evaluate(op(case.op), run, gradients)
    assert actual["y"].dtype == dtype
    judge(given, actual, expected, vendor, dtype, tf32)
    for name, t in run.leaves.items():
        assert torch.equal(t, given.leaves[name]) and t._version == versions[name], f"{name} was written to"
    if case.norm.startswith("frozen"):
        for name, t in run.buffers.items():
            assert torch.equal(t, given.buffers[name]), f"{name} moved"
    if backend != "aten":
        assert actual["y"].is_contiguous(memory_format=torch.channels_last_3d)
    inference = evaluate(op(case.op), given.to(dtype), grad=False)
    judge(given, inference, expected, vendor, dtype, tf32)


@pytest.mark.parametrize("precision", MODES, indirect=True)
@each(CASES)
def test_values_gradients_and_statistics(case, backend, device, precision):
    kernels(case, backend)
    dtype, tf32 = precision
    if backend == "aten" and (dtype != torch.float32 or tf32 or case.offset):
        pytest.skip("plain PyTorch is the vendor: float64 judges it in float32, nothing does below")
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("the cuda backend computes in bfloat16 and float16")
    run_and_judge(case, backend, device, dtype, tf32)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"], indirect=True)
@each(STAGE_CASES)
def test_the_stages_of_a_net(case, backend, device, precision):
    if backend == "aten" or (backend == "cuda" and precision[1]):
        pytest.skip(f"nothing to learn from {backend} here")
    run_and_judge(case, backend, device, *precision)


@each(FIRST)
def test_two_runs_are_equal_bit_for_bit(case, backend, device):
    kernels(case, backend)
    dtype = torch.float32 if backend == "aten" else torch.float16
    given = inputs(case, dtype, device)
    first, second = (evaluate(op(case.op), given.to(dtype)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@each(FIRST)
def test_only_the_gradients_that_are_wanted(case, backend, device):
    kernels(case, backend)
    dtype = torch.float32
    if backend == "cuda":
        pytest.skip("the cuda backend computes in bfloat16 and float16")
    given = inputs(case, dtype, device)
    whole = evaluate(op(case.op), given.to(dtype))
    names = list(given.leaves)
    for name in {"x", names[len(names) // 2], names[-1]}:
        run = given.to(dtype)
        for other, t in run.leaves.items():
            t.requires_grad_(other == name)
        (g,) = torch.autograd.grad(op(case.op)(**run.arguments()), run.leaves[name], run.dy)
        check(g, whole[name].double().cpu(), dtype, kind=kind_of(name), name=name)


@each(FIRST)
def test_autocast(case, backend, device):
    kernels(case, backend)
    half = torch.float16 if backend == "triton" and device.type == "cpu" else torch.bfloat16
    given = inputs(case, half, device)

    def call(**arguments):
        with torch.autocast(device.type, half):
            return op(case.op)(**arguments)

    actual = evaluate(call, given.to(torch.float32))
    convolves = bool(case.weights())
    if backend != "aten":  # PyTorch's own rules differ from device to device: its CPU pools in float32
        assert actual["y"].dtype == (half if convolves else torch.float32)
    for name, t in actual.items():
        assert name == "y" or t.dtype in (torch.float32, torch.int64), f"{name} has {t.dtype}"
    dtype = half if convolves else torch.float32
    if backend != "aten":
        rounded = {k: t.to(dtype) if kind_of(k) != "bn_sum" else t for k, t in actual.items()}
        judge(given, rounded, reference_of(given, dtype), None, dtype, False)


@each(FIRST)
def test_no_samples(case, device):
    """An empty batch gives an empty result, and gradients and statistics as PyTorch has them."""
    given = inputs(dataclasses.replace(case, shape=(0, *case.shape[1:])), torch.float32, device)
    actual, expected = (evaluate(f, given.to(torch.float32)) for f in (op(case.op), getattr(reference, case.op)))
    assert actual["y"].numel() == 0
    for name, t in actual.items():
        assert t.shape == expected[name].shape and torch.equal(t, expected[name]), name


def refusals():
    """(case, argument, what is wrong, its value from a good one, the error)."""

    def norm_of(**fields):
        return lambda norm: norm._replace(**fields)

    wrong = {
        "activation": [
            ("rank", lambda t: t[0], ValueError),
            ("integers", lambda t: t.to(torch.int32), TypeError),
            ("no tensor", lambda t: t.tolist(), TypeError),
        ],
        "weight": [
            ("rank", lambda t: t[0], ValueError),
            ("channels", lambda t: t[:, 1:], ValueError),
            ("taps", lambda t: torch.cat([t, t, t], -1), ValueError),
            ("dtype", lambda t: t.double(), TypeError),
            ("device", lambda t: t.to("meta"), ValueError),
            ("no tensor", lambda t: t.tolist(), TypeError),
        ],
        "norm": [
            ("no Norm", lambda n: torch.nn.BatchNorm3d(n.weight.numel()), TypeError),
            ("channels", lambda n: Norm(weight=n.weight[1:]), ValueError),
            ("device", norm_of(bias=torch.zeros(1, device="meta")), ValueError),
            ("one statistic", norm_of(running_var=None), ValueError),
            ("no statistics", norm_of(training=False, running_mean=None, running_var=None), ValueError),
        ],
        "kind": [("unknown", lambda _: "D", ValueError)],
        "wiring": [("unknown", lambda _: "tf", ValueError)],
        "stride": [("zero", lambda _: 0, ValueError), ("float", lambda _: 1.5, (TypeError, ValueError))],
        "residual": [
            ("shape", lambda t: t[:, :, :, 1:], ValueError),
            ("dtype", lambda t: t.double(), TypeError),
            ("device", lambda t: t.to("meta"), ValueError),
        ],
        "kernel": [("short", lambda _: (3, 3), ValueError), ("zero", lambda _: (0, 3, 3), ValueError)],
    }
    residual = next(case for case in CASES if case.op == "bn_relu" and case.residual)
    down = next(case for case in CASES if case.op == "bottleneck" and case.down)
    for case in [*FIRST, residual, down]:
        names = ["x", *case.weights(), *case.norms(), *dict(case.options)] + ["residual"] * case.residual
        if case.op.endswith("conv") and case.op != "pseudo3d_conv":
            names.append("stride")
        for name in names:
            sort = "activation" if name == "x" else "weight" if name[0] == "w" and name != "wiring" else name
            sort = "norm" if name.startswith("norm") else sort
            for what, change, error in wrong.get(sort, ()):
                yield pytest.param(case, name, change, error, id=f"{case.op},{'down,' * case.down}{name}: {what}")


@pytest.mark.parametrize("case, name, change, error", list(refusals()))
def test_a_bad_argument_is_refused_by_name_before_anything_changes(case, name, change, error, device):
    if op(case.op) is getattr(reference, case.op):
        pytest.skip(f"p3d_kernels.ops.{case.op} is the reference function itself")
    given = inputs(case, torch.float32, device)
    run = given.to(torch.float32)
    call = run.arguments()
    if name == "stride":
        call.setdefault("stride", 1)
    call[name] = change(call[name])
    with pytest.raises(error, match=rf"\b{name}\b.*expected.*got"):
        op(case.op)(**call)
    for key, t in run.buffers.items():
        assert torch.equal(t, given.buffers[key]), f"{key} moved"


@each(FIRST)
def test_double_backward_is_refused(case, backend, device):
    kernels(case, backend)
    if backend == "aten":
        pytest.skip("PyTorch differentiates its own functions twice")
    run = inputs(case, torch.float16, device).to(torch.float16)
    y = op(case.op)(**run.arguments())
    (g,) = torch.autograd.grad(y, run.leaves["x"], run.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.float().square().sum().backward()


@each(FIRST)
def test_compile_without_a_graph_break(case, backend, device):
    kernels(case, backend)
    dtype = torch.float32 if backend == "aten" else torch.float16
    given = inputs(case, dtype, device)
    torch.compiler.reset()
    compiled = torch.compile(op(case.op), fullgraph=True, backend="aot_eager")
    actual, eager = evaluate(compiled, given.to(dtype)), evaluate(op(case.op), given.to(dtype))
    judge(given, actual, {k: t.double().cpu() for k, t in eager.items()}, None, dtype, False)
    inference = evaluate(compiled, given.to(dtype), grad=False)
    judge(given, inference, {k: t.double().cpu() for k, t in eager.items()}, None, dtype, False)


@pytest.mark.gpu
@each(FIRST)
def test_cuda_graph(case, backend, device):
    """Forward and backward are captured, and a replay computes from what the tensors hold then."""
    kernels(case, backend)
    given = inputs(case, torch.float16, device)
    expected = evaluate(op(case.op), given.to(torch.float16))
    run = given.to(torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            evaluate(op(case.op), run)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = evaluate(op(case.op), run)
    for name, t in run.buffers.items():
        t.copy_(given.buffers[name])
    graph.replay()
    for name in expected:
        if case.op == "max_pool" and backend == "aten":  # its backward adds in any order
            torch.testing.assert_close(actual[name], expected[name])
        else:
            assert torch.equal(actual[name], expected[name]), name
