"""Launch plans and tapes: what a pass over an op's kernels costs the host.

A `Plan` is one launch with everything settled but its tensors. A `Tape` is one pass of a fused op: the plans it ran and
the buffers it allocated, recorded when the op is first called with given shapes. Replaying it allocates the outputs and
one workspace and launches the same kernels with new addresses: no shape is looked at again. What a pass does to tensors
must therefore go through `alloc` and plans alone.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_plans: dict[tuple, Plan] = {}
_LIMIT = 8192  # plans or tapes kept: with more shapes than that, start over rather than grow without bound


class _Recording(threading.local):
    recorder: _Recorder | None = None
    ahead = False  # plans compile and do not launch


_recording = _Recording()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Plan:
    """A Triton launch with its grid, scalars and constants settled: only tensors vary from call to call.

    Triton binds and specialises every argument of every launch anew, which on the host costs more than a small kernel
    takes on the card. A plan does so once. Whoever keeps a plan (`plan_for`) keys it by all that Triton specialises on:
    device, dtypes, sizes, and which tensors are None. Tensors are 16-byte aligned, or their parameters are declared
    `do_not_specialize_on_alignment`.
    """

    def __init__(self, kernel, grid: tuple[int, ...], scalars: tuple, **constants) -> None:
        self.kernel, self.grid, self.scalars, self.constants = kernel, (*grid, 1, 1)[:3], scalars, constants
        self.launch: Callable | None = None  # of (stream, *addresses), once compiled

    def __call__(self, *tensors) -> None:
        """Launch on the device of the first tensor, in its current stream."""
        if _recording.ahead:
            if self.launch is None:
                self.kernel.warmup(*tensors, *self.scalars, grid=self.grid, **self.constants)
            return
        if _recording.recorder is not None:
            _recording.recorder.step(self, tensors)
        device = tensors[0].device
        if device.type != "cuda":  # the interpreter
            self.kernel[self.grid](*tensors, *self.scalars, **self.constants)
        elif self.launch is not None and device.index == torch.cuda.current_device():
            self.launch(current_stream(device.index), *[0 if t is None else t.data_ptr() for t in tensors])
        else:
            with torch.cuda.device(device):
                compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constants)
            names = self.kernel.arg_names[len(tensors) + len(self.scalars) :]
            tail = (*self.scalars, *(self.constants[name] for name in names))
            self.launch = _launcher(compiled, self.grid, tail)


def _launcher(compiled, grid: tuple[int, int, int], tail: tuple) -> Callable:
    """launch(stream, *addresses) of a compiled Triton kernel.

    Addresses, not tensors: Triton asks the driver about each tensor's. The launcher's own C function is called where it
    has the form of Triton 3.4 to 3.7, the public way otherwise.
    """
    run = compiled.run
    known = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if all(hasattr(run, name) for name in known) and not (run.global_scratch_size or run.profile_scratch_size):
        go, function, metadata = run.launch, compiled.function, compiled.packed_metadata
        cooperative, pdl = run.launch_cooperative_grid, run.launch_pdl

        def launch(stream, *addresses):
            go(*grid, stream, function, cooperative, pdl, None, None, metadata, None, None, None, *addresses, *tail)

        return launch
    runner = compiled[grid]
    return lambda stream, *addresses: runner(*addresses, *tail, stream=stream)


class NativePlan:
    """A launch of the compiled extension: `launch(stream, *addresses)`, an absent tensor as address 0."""

    def __init__(self, launch: Callable) -> None:
        self.launch = launch

    def __call__(self, *tensors) -> None:
        if _recording.ahead:
            return
        if _recording.recorder is not None:
            _recording.recorder.step(self, tensors)
        device = tensors[0].device
        with torch.cuda.device(device):
            self.launch(current_stream(device.index), *[0 if t is None else t.data_ptr() for t in tensors])


def current_stream(device_index: int) -> int:
    return torch.cuda.current_stream(device_index).cuda_stream


def plan_for(key: tuple, build: Callable[[], Plan]) -> Plan:
    """The plan kept under `key`, built at first need."""
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _LIMIT:
            _plans.clear()
        plan = _plans[key] = build()
    return plan


def alloc(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor; of 5 dimensions, [N, C, T, H, W] in NDHWC memory."""
    layout = torch.channels_last_3d if len(shape) == 5 else torch.contiguous_format
    tensor = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
    if _recording.recorder is not None:
        _recording.recorder.allocated(tensor)
    return tensor


class _Recorder:
    """Collects the steps of one pass. A tensor is known by its address: (buffer, byte offset)."""

    def __init__(self, inputs: list[Tensor | None]) -> None:
        self.buffers: list[Tensor | None] = []  # inputs, then allocations; held so that no address is used twice
        self.starts: list[tuple[int, int]] = []  # (address, buffer), sorted
        self.steps_taken: list[tuple[Plan | NativePlan, list]] = []
        for tensor in inputs:
            self.allocated(tensor)
        self.inputs = len(inputs)

    def allocated(self, tensor: Tensor | None) -> None:
        self.buffers.append(tensor)
        if tensor is not None and tensor.numel():
            bisect.insort(self.starts, (tensor.data_ptr(), len(self.buffers) - 1))

    def find(self, tensor: Tensor | None) -> tuple[int, int, torch.dtype] | None:
        if tensor is None:
            return None
        at = tensor.data_ptr()
        below = bisect.bisect_right(self.starts, (at, len(self.buffers))) - 1
        start, buffer = self.starts[below] if below >= 0 else (at + 1, 0)
        if not start <= at < start + _bytes(self.buffers[buffer]):
            raise RuntimeError("a pass read a tensor that is neither an input nor allocated by it")
        return buffer, at - start, tensor.dtype

    def step(self, plan: Plan | NativePlan, tensors: tuple) -> None:
        self.steps_taken.append((plan, [self.find(t) for t in tensors]))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Tape:
    """One recorded pass: `run(inputs)` gives what the recorded function gave, for inputs of the same shapes.

    Inputs may be None and must be dense, in the memory order they had at recording. Outputs are whole buffers.
    """

    def __init__(self, pass_: Callable[..., list[Tensor | None]], inputs: list[Tensor | None]) -> None:
        if _recording.recorder is not None:
            raise RuntimeError("tapes do not nest")
        _recording.recorder = recorder = _Recorder(inputs)
        try:
            self.first = pass_()
        finally:
            _recording.recorder = None
        found = [recorder.find(t) for t in self.first]
        if any(f is not None and (f[0] < recorder.inputs or f[1]) for f in found):
            raise RuntimeError("a pass must return buffers of its own")
        self.outputs = [None if f is None else f[0] for f in found]
        buffers = recorder.buffers
        self.specs = [(b.shape, b.dtype, _layout(b)) if i in self.outputs else None for i, b in enumerate(buffers)]
        self.inputs, self.steps = recorder.inputs, recorder.steps_taken
        self.offsets, self.size = _pack(recorder, set(self.outputs))

    def run(self, inputs: list[Tensor | None]) -> list[Tensor | None]:
        device = next(t.device for t in inputs if t is not None)
        made = {
            i: torch.empty(spec[0], dtype=spec[1], device=device, memory_format=spec[2])
            for i, spec in enumerate(self.specs)
            if spec is not None
        }
        workspace = torch.empty(self.size, dtype=torch.uint8, device=device)
        if device.type != "cuda":
            self._interpret(inputs, made, workspace)
        elif device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run(inputs)
        else:
            base = [0 if t is None else t.data_ptr() for t in inputs]
            start = workspace.data_ptr()
            for i, offset in enumerate(self.offsets):
                base.append(made[self.inputs + i].data_ptr() if offset is None else start + offset)
            stream = current_stream(device.index)
            for plan, slots in self.steps:
                plan.launch(stream, *[0 if s is None else base[s[0]] + s[1] for s in slots])
        return [None if i is None else made[i] for i in self.outputs]

    def _interpret(self, inputs: list, made: dict[int, Tensor], workspace: Tensor) -> None:
        """The same on a CPU, where Triton's interpreter wants tensors in the place of addresses."""

        def tensor(slot):
            if slot is None:
                return None
            buffer, offset, dtype = slot
            if buffer < self.inputs or self.offsets[buffer - self.inputs] is None:
                whole = inputs[buffer] if buffer < self.inputs else made[buffer]
                flat = whole.as_strided((whole.numel(),), (1,))
            else:
                flat, offset = workspace, offset + self.offsets[buffer - self.inputs]
            return (
                flat.view(torch.uint8)[offset:].view(dtype) if flat.dtype != dtype else flat[offset // dtype.itemsize :]
            )

        for plan, slots in self.steps:
            plan(*[tensor(slot) for slot in slots])


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if tensor.dim() == 5 else torch.contiguous_format


def _pack(recorder: _Recorder, kept: set[int]) -> tuple[list[int | None], int]:
    """Offsets of the allocations in one workspace (None for those kept as outputs) and its size in bytes.

    Buffers whose uses do not overlap share room: first fit, in the order of first use.
    """
    first, last = {}, {}
    for number, (_, slots) in enumerate(recorder.steps_taken):
        for slot in slots:
            if slot is not None:
                first.setdefault(slot[0], number)
                last[slot[0]] = number
    offsets: list[int | None] = [None if b in kept else 0 for b in range(recorder.inputs, len(recorder.buffers))]
    live: list[tuple[int, int, int]] = []  # (offset, end, last use)
    size = 1
    for b in sorted((b for b in first if b >= recorder.inputs and b not in kept), key=first.get):
        need, at = cdiv(_bytes(recorder.buffers[b]), 512) * 512, 0
        live = sorted(x for x in live if x[2] >= first[b])
        for offset, end, _ in live:
            if at + need <= offset:
                break
            at = max(at, end)
        live.append((at, at + need, last[b]))
        offsets[b - recorder.inputs], size = at, max(size, at + need)
    return offsets, size


@contextlib.contextmanager
def _compiling_ahead() -> Iterator[None]:
    """Inside, a pass compiles its kernels in parallel and launches none: the first call waits for the slowest only."""
    import triton

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, triton.AsyncCompileMode(pool):
        _recording.ahead = True
        try:
            yield
        finally:
            _recording.ahead = False


_tapes: dict[tuple, Tape] = {}


def taped(key: tuple, pass_: Callable[..., list[Tensor | None]], inputs: list[Tensor | None]) -> list[Tensor | None]:
    """pass_(), recorded the first time and replayed with these inputs from then on.

    Args:
        key: whatever the launches of the pass depend on, but for addresses.
        pass_: launches kernels on `inputs` and on buffers from `alloc`, and returns buffers.
        inputs: every tensor that the pass reads.
    """
    tape = _tapes.get(key)
    if tape is not None:
        return tape.run(inputs)
    if len(_tapes) >= _LIMIT:
        _tapes.clear()
    if next(t for t in inputs if t is not None).is_cuda:
        with _compiling_ahead():
            pass_()
    tape = Tape(pass_, inputs)
    outputs, tape.first = tape.first, None
    _tapes[key] = tape
    return outputs
