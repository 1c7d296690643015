"""CUDA graphs: many small kernels of a network launched as one.

Frames through them agreed with eager ones on an H100; tests use stand-ins for `torch.cuda`.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

KEPT = 6
"""Graphs kept at a time: each holds the memory of all activations of its shape."""
_CAPTURING = threading.Lock()
"""Held by the thread that captures: one may not begin while another is at it."""
_WARM_UP = 3
"""Calls before a capture, in which libraries choose kernels and allocate workspaces."""


@dataclass
class _Graph:
    """The graph of one shape, with the memory that it reads and writes. One thread may call it at a time."""

    encoded: Tensor
    values: Tensor
    graph: torch.cuda.CUDAGraph

    def __call__(self, encoded: Tensor) -> Tensor:
        self.encoded.copy_(encoded)
        self.graph.replay()
        return self.values.clone()


class CudaGraphs:
    """Call a function eagerly until a graph of it has been captured for the shape of its input; replay that graph from
    then on.

    A traced thread, like the viewer's render threads, captures nothing, holds no lock and waits for nothing, since it may be
        interrupted at any line: it takes a graph out of a list, so that no other thread can, and puts it back. If it is
        interrupted in between, the graph is lost and another one is captured, in a thread of its own. Any other thread
        captures by itself: until a capture has ended, `torch.cuda.synchronize` fails in every thread. Without a free
        graph, or after a failed capture, the function itself is called.

    Args:
        run: from inputs to outputs on the GPU: the same kernels at every call, without waiting for the GPU. Weights stay
            at their addresses; they may be written to in place.
        device: the GPU.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._run = run
        self._device = device
        # The newest is last. The tuple is replaced, never changed, and only by the capturing thread.
        self._free: dict[tuple[int, ...], list[_Graph]] = {}
        self.has_failed = False

    def __call__(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        free = self._free.get(tuple(encoded.shape), [])
        try:
            graph = free.pop()
        except IndexError:  # There is none yet, or another thread has it.
            graph = None
        if graph is None:
            if not self.has_failed and not _CAPTURING.locked():
                if sys.gettrace() is None:
                    self._capture(tuple(encoded.shape))
                else:
                    # A single call that cannot be interrupted half-way, unlike `threading.Thread.start`.
                    _thread.start_new_thread(self._capture, (tuple(encoded.shape),))
            return self._run(encoded)
        values = graph(encoded)
        free.append(graph)
        return values

    def _capture(self, shape: tuple[int, ...]) -> None:
        if not _CAPTURING.acquire(blocking=False):
            return
        try:
            graph = self._captured(shape)
            probe = torch.rand(shape, device=self._device, dtype=torch.float32)
            # The same kernels on the same numbers: a difference beyond rounding means that the capture is incomplete.
            if not torch.allclose(graph(probe), self._run(probe), atol=1e-2):
                raise RuntimeError("the graph gives other values")
            # The current shape last; the oldest are dropped. A graph in use is freed when its thread is done with the
            # list.
            kept = {old: graphs for old, graphs in self._free.items() if old != shape}
            self._free = {**dict([*kept.items()][-(KEPT - 1) :]), shape: [graph]}
        except Exception:  # CUDA raises many types; eager calls continue.
            self.has_failed = True
        finally:
            _CAPTURING.release()

    def _captured(self, shape: tuple[int, ...]) -> _Graph:
        encoded = torch.zeros(shape, device=self._device, dtype=torch.float32)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._run(encoded)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads keep rendering and allocating meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            values = self._run(encoded)
        return _Graph(encoded, values, graph)
