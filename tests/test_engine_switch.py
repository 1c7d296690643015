"""`auto` starts at once, selects the fastest correct engine and remembers it, and survives interrupts and failures."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from networks import encoded, network
from torch import Tensor, nn

from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.engines import cache as cache_module
from r2l_nerfstudio.engines import selection as selection_module
from r2l_nerfstudio.engines import switch as switch_module
from r2l_nerfstudio.engines.protocol import BuildSpec
from r2l_nerfstudio.engines.selection import Candidate, Selection, SelectionJob, candidates, select_engine
from r2l_nerfstudio.engines.switch import EngineSwitch
from r2l_nerfstudio.errors import InputError

CPU = torch.device("cpu")


class Interrupt(Exception):
    """As a viewer raises it."""


@dataclass
class Fake:
    """An engine and its module: the network with an error, a duration, and a failure at will."""

    name: str
    precision: str = "fp32"
    error: float = 0.0
    seconds: float = 0.0
    reason: str | None = None
    may_build: threading.Event | None = None
    build_error: Exception | None = None
    run_error: Exception | None = None
    release: str = "1"
    builds: int = 0
    artifact: bytes | None = None
    network: nn.Module | None = None

    def version(self) -> str:
        return self.release

    def why_not(self, device: torch.device, precision: str) -> str | None:
        return self.reason

    def build(self, order: BuildSpec) -> Fake:
        self.builds += 1
        if self.may_build is not None:
            assert self.may_build.wait(60)
        if self.build_error is not None:
            raise self.build_error
        if self.artifact is not None and order.cache is not None:
            file = order.cache / "artifact"
            if file.exists() and file.read_bytes() != self.artifact:
                raise RuntimeError("not an artifact of mine")
            write_atomically(file, self.artifact)
        self.network, self.precision = order.network, order.precision
        return self

    def __call__(self, read: Tensor) -> Tensor:
        if self.run_error is not None and threading.current_thread() is threading.main_thread():
            raise self.run_error
        time.sleep(self.seconds)
        return self.network(read) + self.error


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Fake]]:
    """Puts fakes in place of all engines, which `auto` tries in the order given, and takes all waiting out."""
    monkeypatch.setattr(switch_module, "SECONDS_AT_REST", 0.02)
    monkeypatch.setattr(switch_module, "SECONDS_AT_REST_AFTER_TRAINING", 0.2)
    monkeypatch.setattr(switch_module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(selection_module, "SECONDS_PER_TIMING", 0.01)

    def put(*fakes: Fake) -> dict[str, Fake]:
        by_name = {fake.name: fake for fake in fakes}
        monkeypatch.setattr(selection_module, "engine_module", by_name.__getitem__)
        monkeypatch.setattr(switch_module, "engine_module", by_name.__getitem__)
        wanted = [Candidate(fake.name, fake.precision) for fake in fakes]
        monkeypatch.setattr(switch_module, "candidates", lambda device, is_exact: wanted)
        return by_name

    return put


def job(folder: Path | None = None, net: nn.Module | None = None) -> SelectionJob:
    return SelectionJob(net or network("r2l"), CPU, encoded("r2l", 50), (50, 40), folder)


def wanted(fakes: dict[str, Fake]) -> list[Candidate]:
    return [Candidate(fake.name, fake.precision) for fake in fakes.values()]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def viewing(switch: EngineSwitch) -> switch_module._EngineSlot:
    return switch._slots[False]


def test_the_fastest_that_agrees_is_selected_and_the_others_are_reported(engines: Callable[..., dict[str, Fake]]):
    fakes = engines(
        Fake("slow", seconds=0.1),
        Fake("wrong", error=1e-3),
        Fake("rough", "bf16", error=1e-3, seconds=0.08),
        Fake("nan", error=float("nan")),
        Fake("absent", reason="it needs a GPU."),
        Fake("broken", build_error=OSError("libfoo.so is missing\nlong story")),
        Fake("fast", error=1e-6, seconds=0.001),
        Fake("late", seconds=0.15),
    )
    chosen = select_engine(job(), wanted(fakes))
    assert chosen.engine is fakes["fast"] and chosen.psnr == pytest.approx(120, abs=1)
    line = chosen.describe()
    assert "\n" not in line and line.startswith("Engine: fast fp32, ") and " ms, 120 dB (" in line
    for part in (
        "wrong fp32: only 60 dB",
        "nan fp32: non-finite values",
        "absent fp32: it needs a GPU",
        "broken fp32: OSError: libfoo.so is missing",
    ):
        assert part in line, part
    for other in ("slow fp32", "rough bf16", "late fp32"):
        assert re.search(rf"{other}: \d+\.\d ms", line), other


def test_no_faster_engine_is_not_a_failure(engines: Callable[..., dict[str, Fake]]):
    fakes = engines(Fake("broken", build_error=RuntimeError("no")))
    chosen = select_engine(job(), wanted(fakes))
    assert chosen.engine is None and "torch fp32" in chosen.describe() and "RuntimeError: no" in chosen.describe()


def test_slow_builds_are_only_tried_if_no_other_engine_works(engines: Callable[..., dict[str, Fake]]):
    fakes = engines(Fake("quick"), Fake("long"))
    order = [Candidate("quick", "fp32"), Candidate("long", "fp32", frozenset({"quick"}))]
    assert "long fp32: not tried beside quick" in select_engine(job(), order).describe()
    fakes["quick"].reason = "absent"
    assert select_engine(job(), order).engine is fakes["long"]


@pytest.mark.parametrize("is_exact", [True, False])
def test_precisions_suit_the_device(is_exact: bool, monkeypatch: pytest.MonkeyPatch):
    found = {(c.name, c.precision) for c in candidates(CPU, is_exact)}
    assert (("openvino", "bf16") in found) == (not is_exact) and ("openvino", "fp32") in found
    on_gpu = candidates(torch.device("cuda"), is_exact)
    assert {c.precision for c in on_gpu} == {"fp16"} and {"tensorrt", "inductor"} < {c.name for c in on_gpu}


def test_the_choice_is_remembered(engines: Callable[..., dict[str, Fake]], tmp_path: Path):
    fakes = engines(Fake("slow", seconds=0.05), Fake("fast", artifact=b"code"))
    first = select_engine(job(tmp_path), wanted(fakes))
    assert (fakes["slow"].builds, fakes["fast"].builds) == (1, 1)
    again = select_engine(job(tmp_path), wanted(fakes))
    assert (fakes["slow"].builds, fakes["fast"].builds) == (1, 2)
    assert again.engine is first.engine and "remembered" in again.describe() and "slow fp32: " in again.describe()


def _record(folder: Path) -> Path:
    (file,) = folder.glob("*/*.json")
    return file


def _other_weights(folder: Path, fakes: dict[str, Fake]) -> SelectionJob:
    return job(folder, network("r2l", seed=9))


def _new_version(folder: Path, fakes: dict[str, Fake]) -> SelectionJob:
    fakes["slow"].release = "2"
    return job(folder)


def _other_device(folder: Path, fakes: dict[str, Fake]) -> SelectionJob:
    return job(folder)


def _torn_record(folder: Path, fakes: dict[str, Fake]) -> SelectionJob:
    text = _record(folder).read_text()
    _record(folder).write_text(text[: len(text) // 2])
    return job(folder)


def _foreign_record(folder: Path, fakes: dict[str, Fake]) -> SelectionJob:
    _record(folder).write_text(json.dumps({"engine": "fast", "precision": 7}))
    return job(folder)


def _list_record(folder: Path, fakes: dict[str, Fake]) -> SelectionJob:
    _record(folder).write_text("[1, 2]")
    return job(folder)


def _now_wrong(folder: Path, fakes: dict[str, Fake]) -> SelectionJob:
    fakes["fast"].error = 0.1
    return job(folder)


@pytest.mark.parametrize(
    "spoil",
    [_other_weights, _new_version, _other_device, _torn_record, _foreign_record, _list_record, _now_wrong],
)
def test_a_record_of_something_else_is_ignored(
    spoil: Callable, engines: Callable[..., dict[str, Fake]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fakes = engines(Fake("slow", seconds=0.05), Fake("fast"))
    select_engine(job(tmp_path), wanted(fakes))
    if spoil is _other_device:
        monkeypatch.setattr(cache_module, "device_name", lambda device: "another machine")
    chosen = select_engine(spoil(tmp_path, fakes), wanted(fakes))
    assert fakes["slow"].builds == 2 and "remembered" not in chosen.describe()
    assert chosen.engine is fakes["slow" if spoil is _now_wrong else "fast"]


def test_a_broken_artifact_is_rebuilt(engines: Callable[..., dict[str, Fake]], tmp_path: Path):
    fakes = engines(Fake("fast", artifact=b"the whole artifact"))
    select_engine(job(tmp_path), wanted(fakes))
    (file,) = tmp_path.rglob("artifact")
    file.write_bytes(b"the who")
    chosen = select_engine(job(tmp_path), wanted(fakes))
    assert chosen.engine is fakes["fast"] and file.read_bytes() == b"the whole artifact"


def test_without_a_writable_folder_only_the_record_is_lost(engines: Callable[..., dict[str, Fake]], tmp_path: Path):
    fakes = engines(Fake("fast"))
    (tmp_path / "file").write_text("in the way")
    assert select_engine(job(tmp_path / "file"), wanted(fakes)).engine is fakes["fast"]


def test_auto_renders_at_once_and_switches_when_ready(engines: Callable[..., dict[str, Fake]]):
    may_build = threading.Event()
    fakes = engines(Fake("fast", may_build=may_build))
    said: list[str] = []
    net = network("r2l")
    switch = EngineSwitch(lambda: net, say=said.append)
    read = encoded("r2l", 30)
    torch.testing.assert_close(switch(read, is_exact=False), net(read))
    wait_for(lambda: fakes["fast"].builds == 1)
    for _ in range(3):  # while it is being built
        torch.testing.assert_close(switch(read, is_exact=False), net(read), atol=0.02, rtol=0)
        assert switch.newest.name == "torch" and "choosing" in switch.describe()
    may_build.set()
    wait_for(lambda: viewing(switch).ready is not None and not viewing(switch).lock.locked())
    torch.testing.assert_close(switch(read, is_exact=False), net(read))
    assert switch.newest is fakes["fast"] and switch.describe() == "fast fp32"
    assert said == [viewing(switch).selection.describe()]


def test_exact_calls_use_torch_until_rendering_has_taken_long(
    engines: Callable[..., dict[str, Fake]], monkeypatch: pytest.MonkeyPatch
):
    fakes = engines(Fake("fast"))
    net = network("r2l")
    switch = EngineSwitch(lambda: net)
    read = encoded("r2l", 30)
    for _ in range(5):
        assert torch.equal(switch(read), net(read)), "torch fp32 is to give the very same numbers"
    assert not fakes["fast"].builds
    monkeypatch.setattr(switch_module, "SECONDS_BEFORE_EXACT", 0.0)
    switch(read)
    wait_for(lambda: switch._slots[True].ready is not None)
    switch(read)
    assert switch.newest is fakes["fast"]


def test_weights_in_training_are_never_stale(engines: Callable[..., dict[str, Fake]], monkeypatch: pytest.MonkeyPatch):
    fakes = engines(Fake("fast"))
    net = network("r2l")
    switch = EngineSwitch(lambda: net)
    read = encoded("r2l", 30)
    switch(read, is_exact=False)
    wait_for(lambda: viewing(switch).ready is not None)
    builds = fakes["fast"].builds
    for name in ("SECONDS_AT_REST", "SECONDS_AT_REST_AFTER_TRAINING"):  # however busy the machine is
        monkeypatch.setattr(switch_module, name, 600.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(10):
        net(read).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            # bf16 where the machine has it
            torch.testing.assert_close(switch(read, is_exact=False), net(read), atol=0.02, rtol=0)
        assert switch.newest.name == "torch"
        time.sleep(0.02)
    assert switch.describe().endswith("(live weights)")
    assert fakes["fast"].builds == builds, "built for weights that do not rest"
    for name in ("SECONDS_AT_REST", "SECONDS_AT_REST_AFTER_TRAINING"):
        monkeypatch.setattr(switch_module, name, 0.1)
    wait_for(lambda: switch(read, is_exact=False) is not None and switch.newest is fakes["fast"])
    torch.testing.assert_close(switch(read, is_exact=False), net(read).detach())


def test_an_engine_that_fails_while_rendering_is_dropped(engines: Callable[..., dict[str, Fake]]):
    fakes = engines(Fake("fast"))
    said: list[str] = []
    net = network("r2l")
    switch = EngineSwitch(lambda: net, say=said.append)
    read = encoded("r2l", 30)
    switch(read, is_exact=False)
    wait_for(lambda: viewing(switch).ready is not None)
    fakes["fast"].run_error = RuntimeError("device lost")
    for _ in range(3):
        torch.testing.assert_close(switch(read, is_exact=False), net(read), atol=0.02, rtol=0)
        assert switch.newest.name == "torch"
    assert len([line for line in said if "device lost" in line]) == 1


def test_an_engine_by_name_that_cannot_run_is_an_error_with_the_reason(engines: Callable[..., dict[str, Fake]]):
    engines(Fake("fast"), Fake("tensorrt", reason="it needs an NVIDIA GPU."))
    net = network("r2l")
    switch = EngineSwitch(lambda: net)
    with pytest.raises(InputError, match="tensorrt cannot run on this machine: it needs an NVIDIA GPU"):
        switch.choose("tensorrt")
    assert switch.choice == "auto"
    configured = EngineSwitch(lambda: net, "tensorrt")
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        configured.check()
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        configured(encoded("r2l", 30))
    # A viewer shows a message and renders.
    torch.testing.assert_close(configured(encoded("r2l", 30), is_exact=False), net(encoded("r2l", 30)))
    wait_for(lambda: "needs an NVIDIA GPU" in configured.describe())


def test_an_engine_by_name_computes_exact_calls(engines: Callable[..., dict[str, Fake]]):
    fakes = engines(Fake("fast"), Fake("named", seconds=0.05))
    net = network("r2l")
    switch = EngineSwitch(lambda: net, "named")
    switch(encoded("r2l", 30))
    assert switch.newest is fakes["named"] and fakes["named"].precision == "fp32"
    assert not fakes["fast"].builds


def test_the_engine_is_changed_between_frames(engines: Callable[..., dict[str, Fake]]):
    fakes = engines(Fake("fast"), Fake("named"))
    net = network("r2l")
    switch = EngineSwitch(lambda: net)
    read = encoded("r2l", 30)
    for choice, expected in (("named", "named"), ("auto", None), ("fast", "fast")):
        switch.choose(choice)
        wait_for(lambda: switch(read, is_exact=False) is not None and viewing(switch).ready is not None)
        switch(read, is_exact=False)
        assert switch.newest in fakes.values() and expected in (None, switch.newest.name)


class Interrupter:
    """Raises at one of the lines that run inside it, counted from 0; None only counts."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> Interrupter:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(self.before)

    def _trace(self, frame, event, arg):
        if frame.f_code is Interrupter.__exit__.__code__:
            return None
        if event == "line":
            self.lines += 1
            if self.at is not None and self.lines > self.at:
                self.at = None
                raise Interrupt
        return self._trace


@pytest.mark.parametrize("kind", ["r2l", "mobile-r2l"])
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_an_interrupt_at_any_line_leaves_no_broken_engine(kind: str, engine: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(switch_module, "SECONDS_AT_REST", 0.02)
    monkeypatch.setattr(switch_module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(selection_module, "SECONDS_PER_TIMING", 0.01)
    net = network(kind)
    said: list[str] = []
    switch = EngineSwitch(lambda: net, engine, interrupts=(Interrupt,), say=said.append)
    read = encoded(kind, 13, 14)
    truth = net(read).detach()

    def draw(line: int | None) -> int:
        with Interrupter(line) as counter:
            values = switch(read, is_exact=False)
        torch.testing.assert_close(values, truth, atol=0.05, rtol=0)
        return counter.lines

    # From the very first call on: copying weights, starting the worker, changing over, and thereafter.
    first = draw(None)
    switch = EngineSwitch(lambda: net, engine, interrupts=(Interrupt,), say=said.append)
    chance = random.Random(0)
    for line in sorted(chance.sample(range(first), 10)):
        with pytest.raises(Interrupt):
            draw(line)
            raise Interrupt  # it was shorter this time
    wait_for(lambda: draw(None) > 0 and viewing(switch).ready is not None)
    lines = draw(None)
    for line in chance.sample(range(lines), min(60, lines)):
        with pytest.raises(Interrupt):
            draw(line)
            raise Interrupt
        assert torch.is_grad_enabled()
    draw(None)
    assert switch.newest.name == engine
    # Weights that change meanwhile are taken over whole.
    with torch.no_grad():
        net.tail.bias += 0.3
    truth = net(read).detach()
    lines = draw(None)
    for line in chance.sample(range(lines), min(10, lines)):
        with torch.no_grad():
            net.tail.bias += 0.1
        truth = net(read).detach()
        with pytest.raises(Interrupt):
            draw(line)
            raise Interrupt
        draw(None)
    assert not [line for line in said if "failed" in line], said
    wait_for(lambda: not viewing(switch).lock.locked())


def test_describe_without_an_engine():
    assert "torch fp32" in Selection(others=["openvino bf16: absent"]).describe()
