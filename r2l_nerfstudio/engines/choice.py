"""Which engine is the fastest of those that agree with the network: built, compared, timed, remembered."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.cache import EngineCache
from r2l_nerfstudio.engines.parity import parity
from r2l_nerfstudio.engines.protocol import PARITY_DB, Engine, EngineName, Order, Precision
from r2l_nerfstudio.engines.registry import engine_module, make
from r2l_nerfstudio.engines.sizes import is_grid
from r2l_nerfstudio.engines.weights import weights_hash

SECONDS_PER_TIMING = 0.5
_MOST_ROWS = 16384
"""Of a code for timing: what more take is a multiple."""


@dataclass(frozen=True)
class Candidate:
    """An engine in a precision."""

    name: EngineName
    precision: Precision
    only_without: frozenset[EngineName] = frozenset()
    """Not tried once one of these has passed: it takes long to build, and has never been much faster than they are."""

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


def candidates(device: torch.device, is_exact: bool) -> list[Candidate]:
    """What `auto` tries, in this order.

    Args:
        device: where the student runs.
        is_exact: for figures and files rather than for the eye: fp32 on CPUs; fp16 on GPUs, where it is as good.
    """
    if device.type == "cuda":
        names: tuple[EngineName, ...] = ("torch", "tensorrt", "triton", "inductor")
        return [Candidate(name, "fp16") for name in names]
    openvino: frozenset[EngineName] = frozenset({"openvino"})
    either: frozenset[EngineName] = frozenset({"openvino", "onnxruntime"})
    if is_exact:
        return [
            Candidate("openvino", "fp32"),
            Candidate("onnxruntime", "fp32", openvino),
            Candidate("inductor", "fp32", either),
        ]
    return [
        Candidate("torch", "bf16"),
        Candidate("openvino", "bf16"),
        Candidate("openvino", "fp32", openvino),
        Candidate("onnxruntime", "fp32", openvino),
        Candidate("inductor", "bf16", either),
    ]


def named(name: EngineName, device: torch.device, is_exact: bool) -> list[Candidate]:
    """A named engine in the precisions that suit, best first."""
    low: Precision = "fp16" if device.type == "cuda" else "bf16"
    precisions: list[Precision] = ["fp32"] if is_exact and device.type != "cuda" else [low, "fp32"]
    return [Candidate(name, precision, frozenset({name})) for precision in precisions]


@dataclass
class Choice:
    """What came of choosing."""

    engine: Engine | None = None
    """The fastest that passed; None if none did."""
    milliseconds: float = math.inf
    """On the shape it was timed with."""
    psnr: float = -math.inf
    """In dB, on the probe, against the network in fp32."""
    others: list[str] = field(default_factory=list)
    """Why not the others, a few words each."""

    def describe(self) -> str:
        """One line: what was chosen, precision, milliseconds, PSNR, and why not the others."""
        chosen = "torch fp32, as nothing else passed"
        if self.engine is not None:
            agreement = "equal to fp32" if math.isinf(self.psnr) else f"{self.psnr:.0f} dB"
            chosen = f"{self.engine.name} {self.engine.precision}, {self.milliseconds:.1f} ms, {agreement}"
        return f"Engine: {chosen}" + (f" ({'; '.join(self.others)})." if self.others else ".")


@dataclass(frozen=True)
class Task:
    """What to choose for."""

    network: nn.Module
    """A copy that nobody trains, in fp32 and evaluation mode."""
    device: torch.device
    probe: Float[Tensor, "*code"]
    """Code to compare engines on."""
    shape: tuple[int, ...]
    """Of the code of a frame, or of the part of one that the network gets at a time."""
    cache_folder: Path | None
    """Where to remember."""
    is_stopped: Callable[[], bool] = lambda: False
    """Asked between engines: whether the answer is no longer wanted."""


def choose(task: Task, wanted: Iterable[Candidate]) -> Choice:
    """The fastest candidate that agrees with the network. Never raises on behalf of an engine.

    What is remembered is built and compared again before it is used; only the others are spared.
    """
    wanted = list(wanted)
    cache = None
    if task.cache_folder is not None:
        cache = EngineCache(task.cache_folder, weights_hash(task.network), task.device)
    key = _key(task, wanted)
    if cache is not None:
        choice = _remembered(task, wanted, cache, key)
        if choice is not None:
            return choice
    choice, built = Choice(), []
    for candidate, engine, said, found in _passing(task, wanted, cache):
        if engine is None:
            choice.others.append(f"{candidate}: {said}")
        else:
            built.append((candidate, engine, found))
    taken = milliseconds([engine for _, engine, _ in built], _timing_code(task))
    for (candidate, engine, found), time_taken in sorted(zip(built, taken, strict=True), key=lambda pair: pair[1]):
        if choice.engine is None:
            choice.engine, choice.milliseconds, choice.psnr = engine, time_taken, found
        else:
            choice.others.append(f"{candidate}: {time_taken:.1f} ms")
    if cache is not None and choice.engine is not None and not task.is_stopped():
        cache.write(
            key,
            {
                "engine": choice.engine.name,
                "precision": choice.engine.precision,
                "versions": _versions(wanted),
                "milliseconds": choice.milliseconds,
                "psnr": str(choice.psnr),
                "others": choice.others,
            },
        )
    return choice


def _passing(
    task: Task, wanted: list[Candidate], cache: EngineCache | None
) -> Iterator[tuple[Candidate, Engine | None, str, float]]:
    """Each candidate with its engine and PSNR, or without one and with the reason."""
    passed: set[EngineName] = set()
    for candidate in wanted:
        if task.is_stopped():
            return
        better = candidate.only_without & passed
        if better:
            if candidate.name not in better:
                yield candidate, None, f"not tried beside {', '.join(sorted(better))}", 0.0
            continue
        engine, said, found = _built(task, candidate, cache)
        if engine is not None:
            passed.add(candidate.name)
        yield candidate, engine, said, found


def _built(task: Task, candidate: Candidate, cache: EngineCache | None) -> tuple[Engine | None, str, float]:
    try:
        module = engine_module(candidate.name)
        reason = module.why_not(task.device, candidate.precision)
        if reason is not None:
            return None, reason.rstrip("."), 0.0
        folder = None if cache is None else cache.artefacts(candidate.name, module.version())
        engine = _built_from_cache(task, candidate, folder)
        found = parity(engine, task.network, task.device, task.probe)
    except Exception as error:  # each library raises its own
        said = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {said[0][:200] if said else 'no reason given'}", 0.0
    if not found >= PARITY_DB[candidate.precision]:
        return None, "values that are not finite" if found == -math.inf else f"only {found:.0f} dB", found
    return engine, "", found


def _built_from_cache(task: Task, candidate: Candidate, folder: Path | None) -> Engine:
    module = engine_module(candidate.name)
    order = Order(task.network, candidate.precision, task.device, folder)
    if folder is None or not folder.exists():
        return make(module, order)
    try:
        engine = make(module, order)
        if parity(engine, task.network, task.device, task.probe) >= PARITY_DB[candidate.precision]:
            return engine
    except Exception:  # a file that is cut short, or of another make: build it anew
        pass
    shutil.rmtree(folder)
    return make(module, order)


def _remembered(task: Task, wanted: list[Candidate], cache: EngineCache, key: str) -> Choice | None:
    record = cache.read(key)
    if record is None:
        return None
    try:
        candidate = next(c for c in wanted if (c.name, c.precision) == (record["engine"], record["precision"]))
        if record["versions"] != _versions(wanted):
            return None
        taken, others = float(record["milliseconds"]), [str(other) for other in record["others"]]
    except (StopIteration, KeyError, TypeError, ValueError):
        return None
    engine, _, found = _built(task, candidate, cache)
    return None if engine is None else Choice(engine, taken, found, [*others, "remembered"])


def _versions(wanted: list[Candidate]) -> dict[str, str]:
    """Of all engines: a choice made with others, or without one that is there now, is none."""
    found = {}
    for candidate in wanted:
        try:
            found[candidate.name] = engine_module(candidate.name).version()
        except Exception:  # not installed, or broken
            found[candidate.name] = ""
    return found


def _key(task: Task, wanted: list[Candidate]) -> str:
    """Of the record on disk: what was asked for, and the size to the next power of two."""
    size = task.shape[-1] * task.shape[-2] if is_grid(task.network) else min(task.shape[0], _MOST_ROWS)
    asked = "_".join(dict.fromkeys(f"{c.name}-{c.precision}" for c in wanted))
    return f"{asked}_{1 << max(0, size - 1).bit_length()}"


def _timing_code(task: Task) -> Tensor:
    shape = task.shape if is_grid(task.network) else (min(task.shape[0], _MOST_ROWS), *task.shape[1:])
    return torch.rand(shape, device=task.device, dtype=torch.float32)


def milliseconds(calls: Sequence[Callable[[Tensor], Any]], code: Tensor) -> list[float]:
    """Of one call of each: the fastest of some, taken in turns, so that other work on the machine meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:  # the first one, which allocates
        call(code)
    while calls and (len(times[0]) < 4 or sum(map(sum, times)) < SECONDS_PER_TIMING * len(calls)):
        for call, taken in zip(calls, times, strict=True):
            _synchronize(code.device)
            start = time.perf_counter()
            call(code)
            _synchronize(code.device)
            taken.append(time.perf_counter() - start)
    return [1e3 * min(taken) for taken in times]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
