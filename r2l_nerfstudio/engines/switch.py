"""What a model calls for every picture: torch at once, a faster engine as soon as one is ready and agrees."""

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

from r2l_nerfstudio.engines.parity import parity, random_code
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
"""Weights that were seen to change may do so again: a step may take seconds."""
SECONDS_BEFORE_EXACT = 5.0
"""Of work for figures and files before `auto` looks for something faster: that costs about as much."""
_SECONDS_BETWEEN_LOOKS = 0.25


@dataclass
class _Ready:
    """An engine, and the weights it was built from. Never changed, only replaced: readers need no lock."""

    state: int
    engine: Engine


@dataclass
class _EngineSlot:
    """Pictures for the eye, or for figures and files: each has an engine of its own."""

    is_exact: bool
    live: TorchEngine | None = None
    """Follows the weights."""
    ready: _Ready | None = None
    selection: Selection | None = None
    error: str = ""
    """Why the engine that was asked for by name does not run."""
    asked: tuple[int, str] | None = None
    """Weights and name for which a worker was started last."""
    shape: tuple[int, ...] = ()
    """Of the newest code."""
    seconds: float = 0.0
    """Spent by `live` on weights at rest."""
    stage: str = ""
    """What the worker is at, in a word or two; empty when it is not."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by the worker; a render thread looks at it and never waits for it."""


class EngineSwitch:
    """Runs a student's network on the engine that suits the machine, the purpose and the state of its weights.

    A render thread may be interrupted at any line: here it takes no lock, waits for nothing, builds nothing, and changes
    state by single assignments.

    Args:
        network: gives the student's network, in fp32; it may be trained on, moved and loaded meanwhile.
        choice: `auto`, or an engine's name.
        probe: gives the code to compare engines on; by default one of numbers of order one.
        interrupts: exceptions that a caller's own machinery raises in the middle of a call, and that are no engine's fault.
        say: told in one line what was chosen, and what went wrong.

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
    ) -> None:
        if choice != "auto":
            engine_module(choice)  # knows its name
        self._network = network
        self.cache_folder: Path | None = None
        """The user's own, never a run's (`user_cache.engine_cache_folder`); None keeps nothing."""
        self.choice: EngineOption = choice
        self._probe = probe
        self._interrupts = interrupts
        self._say = say
        self._listed: tuple[nn.Module, list[Tensor]] | None = None
        self._slots = {False: _EngineSlot(is_exact=False), True: _EngineSlot(is_exact=True)}
        self.newest: Engine | None = None
        """That gave the newest values."""

    @property
    def network(self) -> nn.Module:
        """The student's own."""
        return self._network()

    def _state(self) -> int:
        """`weights_state` of the network. Its weights are listed once: the viewer traces each line of that."""
        network, listed = self.network, self._listed
        if listed is None or listed[0] is not network:
            listed = self._listed = (network, weights_of(network))
        return weights_state(listed[1])

    def choose(self, choice: EngineOption) -> None:
        """Change to another engine, or to `auto`; pictures go on with torch until it is ready.

        Raises:
            InputError: for an engine that cannot run here, with the reason and the remedy; nothing changes then.
        """
        self.check(choice)
        self.choice = choice
        for slot in self._slots.values():
            slot.ready, slot.selection, slot.asked, slot.error = None, None, None, ""

    def check(self, choice: EngineOption | None = None) -> None:
        """See whether an engine, by default the chosen one, can run on this machine as far as can be seen without trying.

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

    def __call__(self, code: Float[Tensor, "*code"], is_exact: bool = True) -> Float[Tensor, "*values"]:
        """The network's values, by the best engine that is ready.

        Args:
            code: as the network reads it, fp32.
            is_exact: for figures and files: fp32 (on GPUs fp16, if it agrees); else as fast as agrees with it.

        Returns:
            fp32.

        Raises:
            InputError: if an engine was asked for by name and fails, and the picture is not for a viewer.
        """
        slot = self._slots[is_exact]
        slot.shape = tuple(code.shape)
        state = self._state()
        if is_exact and self.choice != "auto" and slot.asked is None:
            # Asked for by name, and nobody watches: wait for it. Should training change the weights, it is built again
            # when they rest.
            slot.asked = (state, self.choice)
            self._prepare(slot, state)
        if slot.error and is_exact:
            raise InputError(slot.error)
        ready = slot.ready
        if ready is not None and ready.state == state:
            try:
                values = ready.engine(code)
                self.newest = ready.engine
                return values
            except self._interrupts:
                raise
            except Exception as error:  # each library raises its own, and the picture must come
                self._give_up(slot, ready.engine, error)
        self._call_worker(slot, state)
        if slot.live is None and is_exact:
            slot.live = TorchEngine(self.network, "fp32")
        live = slot.live
        start = time.perf_counter()
        if live is None:  # the viewer's worker is still copying the weights
            values = self.network(code).float()
        else:
            live.refresh()
            values = live(code)
        slot.seconds += time.perf_counter() - start
        self.newest = live
        return values

    def describe(self) -> str:
        """What draws, for a viewer: engine and precision, and what is on its way or in its way."""
        slot, engine = self._slots[False], self.newest
        name = "torch fp32" if engine is None else f"{engine.name} {engine.precision}"
        if slot.error:
            return f"{name} ({slot.error})"
        return f"{name} ({slot.stage})" if slot.stage else name

    def _give_up(self, slot: _EngineSlot, engine: Engine, error: Exception) -> None:
        """Torch from here on; the worker is not asked again for the same weights."""
        slot.ready = None
        said = f"The engine {engine.name} failed ({type(error).__name__}: {error}): pictures come from torch."
        self._say(said)
        if self.choice != "auto":
            slot.error = said

    def _call_worker(self, slot: _EngineSlot, state: int) -> None:
        key = (state, self.choice)
        if slot.asked == key or slot.lock.locked():
            return
        if self.choice == "auto" and slot.is_exact and slot.seconds < SECONDS_BEFORE_EXACT:
            return
        # One call that cannot be interrupted half-way, as `threading.Thread.start` can. Should the line below not be
        # reached, the next picture starts another worker, which finds the first one's lock.
        _thread.start_new_thread(self._work, (slot,))
        slot.asked = key

    def _work(self, slot: _EngineSlot) -> None:
        """The worker's life: wait until the weights rest, choose, hand over."""
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
        except Exception as error:  # a thread has nobody to raise to
            self._say(f"No engine could be chosen ({type(error).__name__}: {error}): pictures come from torch.")
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
        """Torch for a viewer: in bf16 where the machine is good at it and it agrees; it overflows no earlier than fp32."""
        device = device_of(self.network)
        snapshot = None
        while slot.live is None and snapshot is None and not _STOPPING.is_set():
            snapshot, _ = self._snapshot()  # None in the middle of a step of training
        if snapshot is None:
            return
        live = TorchEngine(snapshot, "fp32")
        if is_bf16_fast(device):
            lower = TorchEngine(snapshot, "bf16")
            if parity(lower, snapshot, device, self._probe_code()) >= PARITY_DB["bf16"]:
                live = lower
        live.follow(self.network)
        slot.live = live

    def _prepare(self, slot: _EngineSlot, state: int) -> None:
        """Choose for the weights as they are, and hand over if they still are so afterwards."""
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

        job = SelectionJob(snapshot, device, self._probe_code(), slot.shape, self.cache_folder, is_stopped)
        selection = select_engine(job, wanted)
        if is_stopped():
            return
        slot.selection = selection
        if selection.engine is None and choice_wanted != "auto":
            slot.error = (
                f"The engine {choice_wanted} cannot run: {'; '.join(selection.others)}. Choose another one, or auto."
            )
            self._say(slot.error)
            return
        if selection.engine is not None:
            slot.ready = _Ready(state, selection.engine)
        self._say(selection.describe())

    def _snapshot(self) -> tuple[nn.Module | None, int]:
        """A copy of the network and its state; None if the weights were written to meanwhile."""
        state = self._state()
        snapshot = copy.deepcopy(self.network).eval().requires_grad_(False)
        return (snapshot if self._state() == state else None), state

    def _probe_code(self) -> Tensor:
        device = device_of(self.network)
        return random_code(self.network, device) if self._probe is None else self._probe()


_STOPPING = threading.Event()
_WORKING: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _let_workers_end() -> None:
    """Libraries that are still compiling while the process ends may crash it: give them a while."""
    _STOPPING.set()
    for lock in list(_WORKING):
        lock.acquire(timeout=20.0)
