"""CUDA graphs without a GPU: stand-ins record the calls and replay them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from networks import KINDS, encoded, network
from torch import Tensor
from versions import needs_half_on_cpu

from r2l_nerfstudio.engines import torch_engine
from r2l_nerfstudio.engines.cuda_graph import _CAPTURING, KEPT, CudaGraphs
from r2l_nerfstudio.engines.torch_engine import TorchEngine
from r2l_nerfstudio.psnr import psnr

CPU = torch.device("cpu")


class Gpu:
    """What `torch.cuda` offers for graphs. A call of `run` while capturing is what its graph does when replayed."""

    def __init__(self, run) -> None:
        self.inner = run
        self.eager = self.captures = self.replays = 0
        self.error: Exception | None = None
        self.is_wrong = False
        self._recording: SimpleNamespace | None = None
        self._thread = 0

    def run(self, read: Tensor) -> Tensor:
        values = self.inner(read)
        if self._recording is not None and threading.get_ident() == self._thread:
            self._recording.read, self._recording.values = read, values
        else:
            self.eager += 1
        return values

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        made = SimpleNamespace(read=None, values=None)

        def replay() -> None:
            self.replays += 1
            made.values.copy_(self.inner(made.read) + self.is_wrong)

        made.replay = replay
        return made

    @contextmanager
    def graph(self, made: SimpleNamespace, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        if self.error is not None:
            raise self.error
        self._recording, self._thread = made, threading.get_ident()
        yield
        self._recording = None
        self.captures += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A function that puts a `Gpu` around a function in place of `torch.cuda`."""

    def put(run) -> Gpu:
        made = Gpu(run)
        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        for name, stand_in in {
            "CUDAGraph": made.CUDAGraph,
            "graph": made.graph,
            "Stream": lambda device: stream,
            "stream": lambda _: nullcontext(),
            "current_stream": lambda device: stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        return made

    return put


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def settle(graphs: CudaGraphs, shape: tuple[int, ...]) -> None:
    wait_for(lambda: graphs._free.get(shape) and not _CAPTURING.locked())


def test_the_first_call_is_eager_and_later_ones_replay(gpu):
    cuda = gpu(lambda x: 2 * x)
    graphs = CudaGraphs(cuda.run, CPU)
    read = torch.rand(5, 3)
    assert torch.equal(graphs(read), 2 * read)
    settle(graphs, (5, 3))
    eager, replays = cuda.eager, cuda.replays
    first = graphs(read)
    second = graphs(read + 1)
    assert torch.equal(first, 2 * read), "overwritten by the next call"
    assert torch.equal(second, 2 * (read + 1))
    assert (cuda.eager, cuda.replays, cuda.captures) == (eager, replays + 2, 1)


def test_only_a_traced_thread_leaves_the_capture_to_another(gpu):
    """`torch.cuda.synchronize` fails in every thread until a capture has ended; the viewer traces its render threads, which
    it may interrupt at any line."""
    cuda = gpu(lambda x: x + 1)
    graphs = CudaGraphs(cuda.run, CPU)
    graphs(torch.zeros(3, 2))
    assert cuda.captures == 1 and cuda._thread == threading.get_ident() and not _CAPTURING.locked()
    traced: list[int] = []

    def draw() -> None:
        traced.append(threading.get_ident())
        sys.settrace(lambda *_: None)
        try:
            graphs(torch.zeros(4, 2))
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    settle(graphs, (4, 2))
    assert cuda.captures == 2 and cuda._thread not in (traced[0], threading.get_ident())


def test_one_capture_at_a_time(gpu):
    cuda = gpu(lambda x: x + 1)
    graphs = CudaGraphs(cuda.run, CPU)
    with _CAPTURING:  # another engine's
        assert torch.equal(graphs(torch.ones(3, 2)), torch.full((3, 2), 2.0))
    assert cuda.captures == 0 and not graphs.has_failed
    graphs(torch.ones(3, 2))
    assert cuda.captures == 1


def test_only_the_newest_shapes_are_kept(gpu):
    cuda = gpu(lambda x: x + 1)
    graphs = CudaGraphs(cuda.run, CPU)
    for rows in range(1, KEPT + 3):
        graphs(torch.zeros(rows, 2))
        settle(graphs, (rows, 2))
    assert [*graphs._free] == [(rows, 2) for rows in range(3, KEPT + 3)]


@pytest.mark.parametrize("trouble", ["capture", "values"])
def test_a_failed_graph_capture_falls_back_to_eager_calls(gpu, trouble: str):
    cuda = gpu(lambda x: 3 * x)
    cuda.error = RuntimeError("operation not permitted when stream is capturing") if trouble == "capture" else None
    cuda.is_wrong = trouble == "values"
    graphs = CudaGraphs(cuda.run, CPU)
    read = torch.rand(4, 2)
    graphs(read)
    wait_for(lambda: graphs.has_failed and not _CAPTURING.locked())
    eager, replays = cuda.eager, cuda.replays
    for _ in range(3):
        assert torch.equal(graphs(read), 3 * read)
    assert (cuda.eager, cuda.replays, cuda.captures) == (eager + 3, replays, trouble == "values")


def test_threads_do_not_replay_a_graph_at_once(gpu):
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.0005)
        return x + 1

    cuda = gpu(slow)
    graphs = CudaGraphs(cuda.run, CPU)
    graphs(torch.zeros(3, 2))
    settle(graphs, (3, 2))
    wrong: list[int] = []

    def draw(number: int) -> None:
        for _ in range(30):
            if not torch.equal(graphs(torch.full((3, 2), float(number))), torch.full((3, 2), number + 1.0)):
                wrong.append(number)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    wait_for(lambda: not _CAPTURING.locked())
    assert not graphs.has_failed


def test_an_interrupted_call_only_drops_its_graph(gpu):
    class Interrupt(Exception):
        pass

    cuda = gpu(lambda x: x + 1)
    graphs = CudaGraphs(cuda.run, CPU)
    read = torch.rand(3, 2)
    graphs(read)
    settle(graphs, (3, 2))

    def interrupted(_: Tensor) -> Tensor:
        raise Interrupt

    (graph,) = graphs._free[3, 2]
    graph.graph.replay = lambda: interrupted(read)
    with pytest.raises(Interrupt):
        graphs(read)
    assert torch.equal(graphs(read), read + 1)  # eager, and asks for another
    settle(graphs, (3, 2))
    assert torch.equal(graphs(read), read + 1) and cuda.captures == 2


@needs_half_on_cpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_engine_replays_any_size_and_follows_its_weights(gpu, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_engine, "chunk_rows", lambda device: 64)
    monkeypatch.setattr(torch_engine, "_LEAST_ROWS", 32)
    with torch.no_grad():
        net = network(kind)
        engine = TorchEngine(net, "fp16")
        cuda = gpu(engine._network)
        engine._graphs = CudaGraphs(cuda.run, CPU)
        shape = (32, 40) if kind == "r2l" else (1, 24, 8, 16)
        sizes = [(20,), (32,), (84,)] if kind == "r2l" else [(5, 9), (8, 16), (3, 12)]
        engine(encoded(kind, *sizes[0]))
        settle(engine._graphs, shape)
        for seed in (0, 7):
            net.load_state_dict(network(kind, seed=seed).state_dict())
            engine.refresh()
            for rows in sizes:
                replays = cuda.replays
                read = encoded(kind, *rows)
                values, truth = engine(read), net(read)
                if kind == "mobile-r2l":  # the outermost cells' pixels are dropped by the model, and may be others
                    inner = slice(net.factor, -net.factor)
                    values, truth = values[..., inner, inner], truth[..., inner, inner]
                assert values.dtype == torch.float32 and psnr(values, truth) > 50
                assert cuda.replays > replays


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_in_training_are_rendered_without_graphs(precision: str):
    assert TorchEngine(network("r2l"), precision)._graphs is None
