"""Select the fastest engine that agrees with the network: build, compare, time, remember."""

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
from r2l_nerfstudio.engines.protocol import BuildSpec, Engine, EngineName, Precision, least_psnr
from r2l_nerfstudio.engines.registry import engine_module, make
from r2l_nerfstudio.engines.sizes import reads_ray_image
from r2l_nerfstudio.engines.weights import weights_hash
from r2l_nerfstudio.errors import first_line

SECONDS_PER_TIMING = 0.5
_MOST_ROWS = 16384
"""Rays of an input for timing; the time of more rays is proportional."""


@dataclass(frozen=True)
class Candidate:
    """An engine in one precision."""

    name: EngineName
    precision: Precision
    only_without: frozenset[EngineName] = frozenset()
    """Not tried once one of these has passed: it takes long to build and has never been much faster than they are."""

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


def candidates(device: torch.device, is_exact: bool) -> list[Candidate]:
    """Return the candidates of `auto`, in the order in which they are tried.

    Args:
        device: device that the student runs on.
        is_exact: for figures and files rather than for a viewer: fp32 on CPUs; fp16 on GPUs, which is accurate enough
            there.
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


def candidates_named(name: EngineName, device: torch.device, is_exact: bool) -> list[Candidate]:
    """Return a named engine in the precisions that suit, best first."""
    low: Precision = "fp16" if device.type == "cuda" else "bf16"
    precisions: list[Precision] = ["fp32"] if is_exact and device.type != "cuda" else [low, "fp32"]
    return [Candidate(name, precision, frozenset({name})) for precision in precisions]


@dataclass
class Selection:
    """Result of a selection."""

    engine: Engine | None = None
    """The fastest engine that passed; None if none did."""
    milliseconds: float = math.inf
    """Milliseconds on the shape that was timed."""
    psnr: float = -math.inf
    """PSNR in dB on the probe, against the network in fp32."""
    others: list[str] = field(default_factory=list)
    """Why the others were not selected, a few words each."""

    def describe(self) -> str:
        """Return one line: the engine, precision, milliseconds, PSNR, and why not the others."""
        chosen = "torch fp32, as nothing else passed"
        if self.engine is not None:
            agreement = "equal to fp32" if math.isinf(self.psnr) else f"{self.psnr:.0f} dB"
            chosen = f"{self.engine.name} {self.engine.precision}, {self.milliseconds:.1f} ms, {agreement}"
        return f"Engine: {chosen}" + (f" ({'; '.join(self.others)})." if self.others else ".")


@dataclass(frozen=True)
class SelectionJob:
    """What to select an engine for."""

    network: nn.Module
    """A copy that is not being trained, in fp32 and evaluation mode."""
    device: torch.device
    probe: Float[Tensor, "*encoded"]
    """Encoded rays to compare engines on."""
    shape: tuple[int, ...]
    """Shape of a frame's encoded rays, or of the part that the network reads at a time."""
    cache_folder: Path | None
    """Folder to remember the result in."""
    is_stopped: Callable[[], bool] = lambda: False
    """Called between engines; True ends the selection."""
    margin: int = 0
    """As of `parity`."""


def select_engine(job: SelectionJob, wanted: Iterable[Candidate]) -> Selection:
    """Return the fastest candidate that agrees with the network. Errors of engines are reported, not raised.

    A remembered engine is built and compared again before it is used; the other candidates are skipped.
    """
    wanted = list(wanted)
    cache = None
    if job.cache_folder is not None:
        cache = EngineCache(job.cache_folder, weights_hash(job.network), job.device)
    key = _key(job, wanted)
    if cache is not None:
        selection = _remembered(job, wanted, cache, key)
        if selection is not None:
            return selection
    selection, built = Selection(), []
    for candidate, engine, said, found in _passing(job, wanted, cache):
        if engine is None:
            selection.others.append(f"{candidate}: {said}")
        else:
            built.append((candidate, engine, found))
    taken = milliseconds([engine for _, engine, _ in built], _timing_encoding(job))
    for (candidate, engine, found), time_taken in sorted(zip(built, taken, strict=True), key=lambda pair: pair[1]):
        if selection.engine is None:
            selection.engine, selection.milliseconds, selection.psnr = engine, time_taken, found
        else:
            selection.others.append(f"{candidate}: {time_taken:.1f} ms")
    if cache is not None and selection.engine is not None and not job.is_stopped():
        cache.write(
            key,
            {
                "engine": selection.engine.name,
                "precision": selection.engine.precision,
                "versions": _versions(wanted),
                "milliseconds": selection.milliseconds,
                "psnr": str(selection.psnr),
                "others": selection.others,
            },
        )
    return selection


def _passing(
    job: SelectionJob, wanted: list[Candidate], cache: EngineCache | None
) -> Iterator[tuple[Candidate, Engine | None, str, float]]:
    """Yield each candidate with its engine and PSNR, or without one and with the reason."""
    passed: set[EngineName] = set()
    for candidate in wanted:
        if job.is_stopped():
            return
        better = candidate.only_without & passed
        if better:
            if candidate.name not in better:
                yield candidate, None, f"not tried beside {', '.join(sorted(better))}", 0.0
            continue
        engine, said, found = _built(job, candidate, cache)
        if engine is not None:
            passed.add(candidate.name)
        yield candidate, engine, said, found


def _built(job: SelectionJob, candidate: Candidate, cache: EngineCache | None) -> tuple[Engine | None, str, float]:
    try:
        module = engine_module(candidate.name)
        reason = module.why_not(job.device, candidate.precision)
        if reason is not None:
            return None, reason.rstrip("."), 0.0
        folder = None if cache is None else cache.artifacts(candidate.name, module.version())
        engine = _built_from_cache(job, candidate, folder)
        found = parity(engine, job.network, job.device, job.probe, job.margin)
    except Exception as error:  # Each library raises its own exceptions.
        return None, f"{type(error).__name__}: {first_line(error)}", 0.0
    if not found >= least_psnr(candidate.precision, job.device):
        return None, "non-finite values" if found == -math.inf else f"only {found:.0f} dB", found
    return engine, "", found


def _built_from_cache(job: SelectionJob, candidate: Candidate, folder: Path | None) -> Engine:
    module = engine_module(candidate.name)
    spec = BuildSpec(job.network, candidate.precision, job.device, folder)
    if folder is None or not folder.exists():
        return make(module, spec)
    try:
        engine = make(module, spec)
        if parity(engine, job.network, job.device, job.probe, job.margin) >= least_psnr(
            candidate.precision, job.device
        ):
            return engine
    except Exception:  # The file is truncated, or of another build: compile again.
        pass
    shutil.rmtree(folder)
    return make(module, spec)


def _remembered(job: SelectionJob, wanted: list[Candidate], cache: EngineCache, key: str) -> Selection | None:
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
    engine, _, found = _built(job, candidate, cache)
    return None if engine is None else Selection(engine, taken, found, [*others, "remembered"])


def _versions(wanted: list[Candidate]) -> dict[str, str]:
    """Return the versions of all engines: a selection made with other versions or engines is not reused."""
    found = {}
    for candidate in wanted:
        try:
            found[candidate.name] = engine_module(candidate.name).version()
        except Exception:  # Not installed, or broken.
            found[candidate.name] = ""
    return found


def _key(job: SelectionJob, wanted: list[Candidate]) -> str:
    """Key of the record on disk: the candidates, and the size to the next power of two."""
    size = job.shape[-1] * job.shape[-2] if reads_ray_image(job.network) else min(job.shape[0], _MOST_ROWS)
    asked = "_".join(dict.fromkeys(f"{c.name}-{c.precision}" for c in wanted))
    return f"{asked}_{1 << max(0, size - 1).bit_length()}"


def _timing_encoding(job: SelectionJob) -> Tensor:
    shape = job.shape if reads_ray_image(job.network) else (min(job.shape[0], _MOST_ROWS), *job.shape[1:])
    return torch.rand(shape, device=job.device, dtype=torch.float32)


def milliseconds(calls: Sequence[Callable[[Tensor], Any]], encoded: Tensor) -> list[float]:
    """Return the time of one call of each: the minimum over several, taken in turns so that other load affects all
    equally."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:  # The first call, which allocates.
        call(encoded)
    while calls and (len(times[0]) < 4 or sum(map(sum, times)) < SECONDS_PER_TIMING * len(calls)):
        for call, taken in zip(calls, times, strict=True):
            _synchronize(encoded.device)
            start = time.perf_counter()
            call(encoded)
            _synchronize(encoded.device)
            taken.append(time.perf_counter() - start)
    return [1e3 * min(taken) for taken in times]


def _synchronize(device: torch.device) -> None:
    if (
        device.type == "cuda"
    ):  # The stream's work only: another thread may be capturing a graph, which forbids the rest.
        torch.cuda.current_stream(device).synchronize()
