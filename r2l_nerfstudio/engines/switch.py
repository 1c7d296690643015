"""What a model calls for every frame: PyTorch at first, a faster engine once one is ready and agrees."""

from __future__ import annotations

import _thread
import atexit
import copy
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.parity import parity, random_encoding
from r2l_nerfstudio.engines.protocol import PARITY_DB, Engine, EngineName
from r2l_nerfstudio.engines.registry import engine_module
from r2l_nerfstudio.engines.selection import (
    Candidate,
    Selection,
    SelectionJob,
    candidates,
    candidates_named,
    select_engine,
)
from r2l_nerfstudio.engines.sizes import device_of
from r2l_nerfstudio.engines.torch_engine import TorchEngine, is_bf16_fast
from r2l_nerfstudio.engines.weights import weights_of, weights_state
from r2l_nerfstudio.errors import InputError

EngineOption = Literal["auto", EngineName]

SECONDS_AT_REST = 1.0
SECONDS_AT_REST_AFTER_TRAINING = 5.0
"""Longer than `SECONDS_AT_REST`: a training step may take seconds."""
SECONDS_BEFORE_EXACT = 5.0
"""Seconds of rendering for figures and files after which `auto` selects an engine, which takes about as long."""
_SECONDS_BETWEEN_LOOKS = 0.25


@dataclass
class _Ready:
    """An engine and the weights it was built from. It is replaced, never changed, so that readers need no lock."""

    state: int
    engine: Engine


@dataclass
class _EngineSlot:
    """Engine state for one kind of frame: for a viewer, or for figures and files."""

    is_exact: bool
    live: TorchEngine | None = None
    """Follows the weights while they are trained."""
    ready: _Ready | None = None
    selection: Selection | None = None
    error: str = ""
    """Why an engine that was chosen by name does not run."""
    requested: tuple[int, str] | None = None
    """Weights and engine for which a worker was last started."""
    shape: tuple[int, ...] = ()
    """Shape of the latest input."""
    seconds: float = 0.0
    """Seconds spent in `live` on weights that do not change."""
    stage: str = ""
    """What the worker is doing, in a word or two; empty if it is idle."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by the worker; a render thread reads its state and never waits for it."""


class EngineSwitch:
    """Run a student's network on the engine that suits the machine, the purpose and the state of its weights.

    A render thread may be interrupted at any line: here it takes no lock, waits for nothing, builds nothing, and
        changes state by single assignments.

    Args:
        network: returns the student's network, in fp32; it may be trained, moved and loaded meanwhile.
        choice: `auto`, or an engine's name.
        probe: returns the ray encodings to compare engines on; numbers of order one by default.
        interrupts: exceptions that a caller raises in the middle of a call, and that are not an engine's fault.
        say: called with one line on what was selected and what went wrong.
        margin: as of `parity`.

    Raises:
        InputError: for an engine that cannot run here, with the reason and the remedy.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        choice: EngineOption = "auto",
        probe: Callable[[], Tensor] | None = None,
        interrupts: tuple[type[BaseException], ...] = (),
        say: Callable[[str], None] = lambda line: None,
        margin: int = 0,
    ) -> None:
        if choice != "auto":
            engine_module(choice)  # Raises for an unknown name.
        self._network = network
        self.cache_folder: Path | None = None
        """The user's folder, never a run's (`user_cache.engine_cache_folder`); None keeps nothing."""
        self.choice: EngineOption = choice
        self._probe = probe
        self._interrupts = interrupts
        self._say = say
        self._margin = margin
        self._listed: tuple[nn.Module, list[Tensor]] | None = None
        self._slots = {False: _EngineSlot(is_exact=False), True: _EngineSlot(is_exact=True)}
        self.newest: Engine | None = None
        """The engine that produced the latest values."""

    @property
    def network(self) -> nn.Module:
        """The student's network."""
        return self._network()

    def _state(self) -> int:
        """Return `weights_state` of the network. Its weights are listed once, since the viewer traces every line of
        that."""
        network, listed = self.network, self._listed
        if listed is None or listed[0] is not network:
            listed = self._listed = (network, weights_of(network))
        return weights_state(listed[1])

    def choose(self, choice: EngineOption) -> None:
        """Change to another engine, or to `auto`; PyTorch renders until it is ready.

        Raises:
            InputError: for an engine that cannot run here, with the reason and the remedy; nothing changes then.
        """
        self.check(choice)
        self.choice = choice
        for slot in self._slots.values():
            slot.ready, slot.selection, slot.requested, slot.error = None, None, None, ""

    def check(self, choice: EngineOption | None = None) -> None:
        """Check that an engine, by default the chosen one, can run on this machine, without building it.

        Raises:
            InputError: if not, with the reason and the remedy.
        """
        name = choice or self.choice
        if name == "auto":
            return
        device = device_of(self.network)
        module = engine_module(name)
        reasons = [module.why_not(device, c.precision) for c in candidates_named(name, device, is_exact=False)]
        if all(reason is not None for reason in reasons):
            raise InputError(f"The engine {name} cannot run on this machine: {reasons[-1]}")

    def __call__(self, encoded: Float[Tensor, "*encoded"], is_exact: bool = True) -> Float[Tensor, "*values"]:
        """Return the network's values from the best engine that is ready.

        Args:
            encoded: fp32, as the network reads it.
            is_exact: for figures and files: fp32 (on GPUs fp16, if it agrees); otherwise the fastest that agrees.

        Returns:
            fp32.

        Raises:
            InputError: if an engine was chosen by name and fails, and the frame is not for a viewer.
        """
        slot = self._slots[is_exact]
        slot.shape = tuple(encoded.shape)
        state = self._state()
        if is_exact and self.choice != "auto" and slot.requested is None:
            # An engine chosen by name, and no viewer: wait for it. If training changes the weights later, it is built
            # again once they stop changing.
            slot.requested = (state, self.choice)
            self._prepare(slot, state)
        if slot.error and is_exact:
            raise InputError(slot.error)
        ready = slot.ready
        if ready is not None and ready.state == state:
            try:
                values = ready.engine(encoded)
                self.newest = ready.engine
                return values
            except self._interrupts:
                raise
            except Exception as error:  # Each library raises its own exceptions, and the frame is needed.
                self._give_up(slot, ready.engine, error)
        self._call_worker(slot, state)
        if slot.live is None and is_exact:
            slot.live = TorchEngine(self.network, "fp32")
        live = slot.live
        start = time.perf_counter()
        if live is None:  # The viewer's worker is still copying the weights.
            values = self.network(encoded).float()
        else:
            live.refresh()
            values = live(encoded)
        slot.seconds += time.perf_counter() - start
        self.newest = live
        return values

    def describe(self) -> str:
        """Return the engine and precision that render for a viewer, with pending work or errors."""
        slot, engine = self._slots[False], self.newest
        name = "torch fp32" if engine is None else f"{engine.name} {engine.precision}"
        if slot.error:
            return f"{name} ({slot.error})"
        return f"{name} ({slot.stage})" if slot.stage else name

    def _give_up(self, slot: _EngineSlot, engine: Engine, error: Exception) -> None:
        """Fall back to PyTorch; the worker is not started again for the same weights."""
        slot.ready = None
        said = f"The engine {engine.name} failed ({type(error).__name__}: {error}): rendering with PyTorch."
        self._say(said)
        if self.choice != "auto":
            slot.error = said

    def _call_worker(self, slot: _EngineSlot, state: int) -> None:
        key = (state, self.choice)
        if slot.requested == key or slot.lock.locked():
            return
        if self.choice == "auto" and slot.is_exact and slot.seconds < SECONDS_BEFORE_EXACT:
            return
        # A single call that cannot be interrupted half-way, unlike `threading.Thread.start`. If the next line is not
        # reached, the next frame starts another worker, which finds the first one's lock.
        _thread.start_new_thread(self._work, (slot,))
        slot.requested = key

    def _work(self, slot: _EngineSlot) -> None:
        """Wait until the weights stop changing, select an engine and hand it over."""
        if not slot.lock.acquire(blocking=False):
            return
        _WORKING.add(slot.lock)
        slot.stage = "choosing…"
        try:
            if not slot.is_exact:
                self._make_live(slot)
            state = self._wait_for_rest(slot)
            slot.stage = "choosing…"
            if state is not None:
                self._prepare(slot, state)
        except Exception as error:  # Nothing can catch an exception of a thread.
            self._say(f"No engine could be selected ({type(error).__name__}: {error}): rendering with PyTorch.")
        finally:
            slot.stage = ""
            slot.lock.release()

    def _wait_for_rest(self, slot: _EngineSlot) -> int | None:
        state, since, is_trained = self._state(), time.monotonic(), False
        while time.monotonic() - since < (SECONDS_AT_REST_AFTER_TRAINING if is_trained else SECONDS_AT_REST):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            if _STOPPING.is_set():
                return None
            now = self._state()
            if now != state:
                state, since, is_trained = now, time.monotonic(), True
                slot.stage = "live weights"
        return state

    def _make_live(self, slot: _EngineSlot) -> None:
        """Prepare PyTorch for a viewer: in bf16 where the machine is fast at it and it agrees; bf16 has the range of
        fp32."""
        device = device_of(self.network)
        snapshot = None
        while slot.live is None and snapshot is None and not _STOPPING.is_set():
            snapshot, _ = self._snapshot()  # None in the middle of a training step.
        if snapshot is None:
            return
        live = TorchEngine(snapshot, "fp32")
        if is_bf16_fast(device):
            lower = TorchEngine(snapshot, "bf16")
            if parity(lower, snapshot, device, self._probe_encoding(), self._margin) >= PARITY_DB["bf16"]:
                live = lower
        live.follow(self.network)
        slot.live = live

    def _prepare(self, slot: _EngineSlot, state: int) -> None:
        """Select an engine for the current weights, and hand it over if they have not changed since."""
        choice_wanted = self.choice
        snapshot, found = self._snapshot()
        if snapshot is None or found != state:
            return
        device = device_of(snapshot)
        if choice_wanted == "auto":
            wanted: list[Candidate] = candidates(device, slot.is_exact)
        else:
            wanted = candidates_named(choice_wanted, device, slot.is_exact)

        def is_stopped() -> bool:
            return _STOPPING.is_set() or self.choice != choice_wanted or self._state() != state

        job = SelectionJob(
            snapshot, device, self._probe_encoding(), slot.shape, self.cache_folder, is_stopped, self._margin
        )
        selection = select_engine(job, wanted)
        if is_stopped():
            return
        slot.selection = selection
        if selection.engine is None and choice_wanted != "auto":
            slot.error = (
                f"The engine {choice_wanted} cannot run: {'; '.join(selection.others)}. Choose another engine, or auto."
            )
            self._say(slot.error)
            return
        if selection.engine is not None:
            slot.ready = _Ready(state, selection.engine)
        self._say(selection.describe())

    def _snapshot(self) -> tuple[nn.Module | None, int]:
        """Return a copy of the network and its state; None if the weights were written to meanwhile."""
        state = self._state()
        snapshot = copy.deepcopy(self.network).eval().requires_grad_(False)
        return (snapshot if self._state() == state else None), state

    def _probe_encoding(self) -> Tensor:
        device = device_of(self.network)
        return random_encoding(self.network, device) if self._probe is None else self._probe()


_STOPPING = threading.Event()
_WORKING: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _let_workers_end() -> None:
    """Wait for workers: a library that compiles while the process ends may crash it."""
    _STOPPING.set()
    for lock in list(_WORKING):
        lock.acquire(timeout=20.0)
