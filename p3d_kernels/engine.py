"""`Engine`: a frozen net as it is served. It follows the net it was made from, keeps CUDA graphs, and can be saved."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

FORMAT = "p3d_kernels engine 1"


class Watch:
    """Whether anything in a module was written, replaced, added or moved since this was made.

    Writes are seen by the version counters that autograd keeps: those through `.data` have none and are not seen,
    unless they put another tensor there.
    """

    def __init__(self, module: nn.Module) -> None:
        self.children, self.tensors, self.sizes = [], [], []
        for m in module.modules():
            self.children += [(m._modules, name, child) for name, child in m._modules.items()]
            for held in (m._parameters, m._buffers):
                self.tensors += [(held, k, t, t._version, t.data_ptr()) for k, t in held.items() if t is not None]
            self.sizes += [(held, len(held)) for held in (m._modules, m._parameters, m._buffers)]

    def changed(self) -> bool:
        for held, name, tensor, version, address in self.tensors:
            if held.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return True
        if any(held.get(name) is not child for held, name, child in self.children):
            return True
        return any(len(held) != size for held, size in self.sizes)


class _Graph(NamedTuple):
    """One captured call: written to, replayed, read from."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor


class Engine(nn.Module):
    """A frozen net: clips x [N, C, T, H, W] to logits, or whatever the net returns. Made by `freeze` or `load_engine`.

    Of a `P3D`, x may also be decoded video, uint8 [N, T, H, W, C] or [T, H, W, C] as `models.normalise` takes it: the
    stem normalises as it reads.

    While the net it was made from lives, the engine follows it: after a change of parameters or running statistics
    (an optimiser's step, `load_state_dict`) the next call packs the weights again. Changes through `.data` are not
    seen. The net itself is not kept alive. An engine that is loaded, copied or moved (`engine.to`) follows no net: move
    the net first and freeze it then.

    With CUDA graphs, the first call of each shape captures one, and later calls replay it; the `graphs` shapes used
    last are kept. Calls from several threads and streams are safe: graphs take turns, in the order of the calls.

    Attributes:
        dtype: of weights and activations.
        graphs: the most CUDA graphs that are kept; 0: none are used.
    """

    def __init__(
        self, net: nn.Module, dtype: torch.dtype, graphs: int = 0, source: nn.Module | None = None, refreeze=None
    ) -> None:
        super().__init__()
        self.net, self.dtype, self.graphs = net, dtype, graphs
        self._refreeze: Callable[[nn.Module], nn.Module] | None = refreeze
        self._start(source)

    def _start(self, source: nn.Module | None) -> None:
        self._captured: OrderedDict[tuple, _Graph] = OrderedDict()
        self._pool = self._free = None  # memory that all graphs share, and the event after which it is free
        self._lock = threading.RLock()
        # The net is the key: a reference to its tensors from here alone would keep them alive.
        self._watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()
        if source is not None:
            self._watches[source] = Watch(source)

    def train(self, mode: bool = True) -> Engine:
        if mode:
            raise RuntimeError("a frozen net is for inference only; train the net it was made from and freeze it again")
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self._call("forward", x)

    def features(self, x: Tensor) -> Tensor:
        """`P3D.features` of the frozen net: [N, 2048], float32."""
        return self._call("features", x)

    def save(self, path: str | os.PathLike) -> None:
        """Write the engine to a file that `load_engine` reads. TypeError unless it was made from a `P3D`."""
        options = getattr(self.net, "options", None)
        if options is None:
            raise TypeError("engine: expected one made from a P3D to save, with a Linear as fc, got one of another net")
        with self._lock:
            self._follow()
            state = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        torch.save({"format": FORMAT, "dtype": self.dtype, "net": options, "state": state}, path)

    @torch.no_grad()
    def _call(self, method: str, x: Tensor) -> Tensor:
        self._check(x)
        with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
            if self.graphs == 0 or x.numel() == 0:
                with self._lock:
                    self._follow()
                return getattr(self.net, method)(x)
            with self._lock:
                return self._replay(method, x)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
        if x.requires_grad:
            raise ValueError("x: expected a tensor that requires no grad (an engine has no backward), got one with")
        frames = x.dtype == torch.uint8 and getattr(self.net, "takes_frames", False)
        if not x.is_floating_point() and not frames:
            raise TypeError(f"x: expected a floating-point dtype (of a P3D also uint8 frames), got {x.dtype}")
        device = next(self.buffers()).device
        if x.device != device:
            raise ValueError(f"x: expected device {device} (that of the engine), got {x.device}")

    # Following the net

    def _follow(self) -> bool:
        """Pack the weights again, in place, if the net has changed; whether it had."""
        for source, watch in list(self._watches.items()):
            if watch.changed():
                self._update(source)
                return True
        return False

    @torch.inference_mode(False)  # there, nothing counts versions
    def _update(self, source: nn.Module) -> None:
        watch = Watch(source)  # first: what is written meanwhile is then seen at the next call
        fresh = self._refreeze(source)
        old, new = self.net.state_dict(), fresh.state_dict()
        if {k: (t.shape, t.device) for k, t in old.items()} != {k: (t.shape, t.device) for k, t in new.items()}:
            raise RuntimeError("the layers of the net that this engine follows were changed or moved; freeze it again")
        on_gpu = next(iter(old.values())).is_cuda
        if on_gpu:
            torch.cuda.synchronize()  # another stream may be reading
        with torch.no_grad():
            for name, tensor in old.items():
                tensor.copy_(new[name])
        if on_gpu:
            torch.cuda.synchronize()
        self._watches[source] = watch

    # CUDA graphs

    def _replay(self, method: str, x: Tensor) -> Tensor:
        key = method, x.shape, x.stride(), x.dtype
        stream = torch.cuda.current_stream()
        if self._free is not None:
            stream.wait_event(self._free)
        if key not in self._captured:
            self._follow()
            while len(self._captured) >= self.graphs:
                self._captured.popitem(last=False)
            self._captured[key] = self._capture(method, x)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.x.copy_(x)
        captured.graph.replay()
        if self._follow():  # the card works while this looks; seldom is there something
            captured.graph.replay()
        y = captured.y.clone()
        self._free = torch.cuda.Event()
        self._free.record()
        return y

    def _capture(self, method: str, x: Tensor) -> _Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static, call = x.clone(), getattr(self.net, method)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, records tapes, lets libraries choose
                call(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            y = call(static)
        return _Graph(graph, static, y)

    # What moves or copies an engine

    def _apply(self, fn, recurse: bool = True) -> Engine:
        if fn(torch.empty(0)).dtype != torch.float32:
            raise TypeError(f"an engine stays in its dtype ({self.dtype}); freeze the net again for another")
        with self._lock:
            self._start(None)  # graphs know the old addresses; an engine that moves follows no longer
            return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        drop = ("_captured", "_pool", "_free", "_lock", "_watches")
        return {k: v for k, v in self.__dict__.items() if k not in drop}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._start(None)
