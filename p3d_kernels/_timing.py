"""Clocks, memory, progress and tables, shared by `bench`, `demo` and the benchmarks."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Medians and interquartile range of one step in milliseconds, peak memory in MiB."""

    median_ms: float
    iqr_ms: float
    peak_mib: float
    repeats: int


def measure(
    step: Callable[[], object],
    device: torch.device,
    repeats: int = 20,
    warmup: int = 3,
    before: Callable[[], object] | None = None,
    least_ms: float = 1.0,
) -> Measurement:
    """Time `step` on `device`: CUDA events on a GPU, the wall clock on a CPU.

    A step shorter than `least_ms` is called several times between two readings. `before` drops what the last step
    left (outputs, gradients), so that peak memory counts them: see `peak_mib`.
    """
    for _ in range(warmup):
        step()
    _synchronize(device)
    if before:
        before()
    peak = peak_mib(step, device)
    once = _clock([step], device)
    inner = max(1, min(100, round(least_ms / max(once, 1e-3))))
    times = [_clock([step] * inner, device) / inner for _ in range(repeats)]
    quarter = statistics.quantiles(times, n=4) if repeats > 1 else [times[0]] * 3
    return Measurement(statistics.median(times), quarter[2] - quarter[0], peak, repeats)


def _clock(steps: Iterable[Callable], device: torch.device) -> float:
    """Milliseconds from the start of the first step to the end of the last."""
    if device.type != "cuda":
        start = time.perf_counter()
        for step in steps:
            step()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for step in steps:
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(step: Callable[[], object], device: torch.device) -> float:
    """The most that is allocated during `step` less what was allocated before it, in MiB.

    On a CPU, where no allocator counts, it is the largest sum of the tensors that live at one time.
    """
    if device.type != "cuda":
        with _LiveBytes() as live:
            step()
        return live.peak / MIB
    gc.collect()
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    _synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


class _LiveBytes(TorchDispatchMode):
    """The bytes of the storages made inside the block and still alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known[storage] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size


def captured(
    step: Callable[[], object],
    prepare: Callable[[], object] | None = None,
    before: Callable[[], object] | None = None,
    warmup: int = 3,
) -> tuple[Callable[[], None], float]:
    """A CUDA graph of `step`: (its replay, MiB allocated by the capture). RuntimeError if it cannot be captured.

    `prepare` runs once, uncaptured, on the stream of the capture (a forward whose backward is the step: autograd runs
    a backward on the stream of its forward); `before` as in `measure`.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        if prepare:
            prepare()
        for _ in range(warmup):
            step()
        if before:
            before()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph, stream=side):
        step()
    torch.cuda.synchronize()
    return graph.replay, (torch.cuda.max_memory_allocated() - held) / MIB


class Progress:
    """A progress bar on stderr: `with Progress(total) as bar: bar("what is being done")`."""

    def __init__(self, total: int, stream=None):
        self.total, self.done, self.stream = total, 0, stream or sys.stderr

    def __enter__(self) -> Progress:
        return self

    def __call__(self, what: str) -> None:
        filled = 24 * self.done // self.total
        end = "\r" if self.stream.isatty() else "\n"
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {what}"
        print(f"{line:<78}", end=end, file=self.stream, flush=True)
        self.done = min(self.done + 1, self.total)

    def __exit__(self, *_) -> None:
        if self.stream.isatty():
            print(" " * 78, end="\r", file=self.stream, flush=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        lines.append("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip())
    return "\n".join(lines)
