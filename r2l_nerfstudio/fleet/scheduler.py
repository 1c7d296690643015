"""The scheduler: which stage is submitted when, and what follows from its outcome. Ray decides where it runs."""

from __future__ import annotations

import dataclasses
import heapq
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.fleet.cluster import Capacity, Cluster
from r2l_nerfstudio.fleet.failures import RETRIED
from r2l_nerfstudio.fleet.plan import PLAN, FleetState, Plan, read_state
from r2l_nerfstudio.fleet.stages import Stage
from r2l_nerfstudio.fleet.storage import Storage
from r2l_nerfstudio.fleet.task import Job, Outcome

LOCK = "fleet.running.json"
LOCK_SECONDS = 120.0
POLL_SECONDS = 5.0
"""Seconds between checks of what runs and of the cluster's size."""
_FORWARDED = ("NERFSTUDIO_METHOD_CONFIGS", "NERFSTUDIO_DATAPARSER_CONFIGS")

_Id = tuple[str, str]


class Scheduler:
    """Runs the unfinished stages of a plan.

    Args:
        plan: captures and stages.
        storage: the output.
        cluster: cluster that runs the stages.
        say: called with a sentence on each event.
        look: called often, for tables and the gallery; with force if the state has changed.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        cluster: Cluster,
        say: Callable[[str], None] = lambda line: None,
        look: Callable[[FleetState, Capacity], None] = lambda state, capacity: None,
    ) -> None:
        self.plan, self.storage, self.cluster, self.say, self.look = plan, storage, cluster, say, look
        self.state = current_state(plan, storage)
        self._captures = {capture.name: capture for capture in plan.captures}
        self._stages = {(name, stage.id): stage for name, stages in plan.stages.items() for stage in stages}
        self._states = {(capture.name, stage.id): stage for capture in self.state.captures for stage in capture.stages}
        self._order = {key: index for index, key in enumerate(self._stages)}
        self._followers: dict[_Id, list[_Id]] = defaultdict(list)
        for (name, _), stage in self._stages.items():
            for other in stage.depends:
                self._followers[(name, other)].append((name, stage.id))
        self._attempts: dict[_Id, int] = defaultdict(int)
        self._reasons: dict[_Id, str] = {}
        self._ready: dict[tuple[float, ...], list[tuple[int, _Id]]] = defaultdict(list)
        """Return the stages that can start, by their resources; the earliest capture comes first, so that captures are
        finished early."""
        self._delayed: list[tuple[float, _Id]] = []
        self._running: dict[Any, _Id] = {}
        self._capacity = cluster.capacity()
        self._looked = 0.0

    def run(self) -> None:
        """Run until every stage is done, failed or blocked. A KeyboardInterrupt stops all stages, and is raised again.

        Raises:
            InputError: this machine lacks resources of a stage, or another process runs this fleet.
        """
        self._check_claims()
        with self._lock():
            self.storage.write_json(PLAN, self.plan.describe())
            for key in self._stages:
                self._queue_if_ready(key)
            self._refresh(force=True)
            try:
                while self._running or self._delayed or any(self._ready.values()):
                    self._submit()
                    for handle, outcome in self.cluster.wait(list(self._running), 1.0):
                        self._finish(self._running.pop(handle), outcome)
                    self._refresh()
            except KeyboardInterrupt:
                self.say("Stopping: running stages save what they have. Press Ctrl-C again to leave at once.")
                self.cluster.stop(list(self._running))
                for handle, outcome in self.cluster.wait(list(self._running), 1.0):
                    key = self._running.pop(handle)
                    if outcome.failure is None:
                        self._finish(key, outcome)
                    else:
                        self._states[key].details, self._states[key].status = {}, "waiting"
                raise

    def _queue_if_ready(self, key: _Id) -> None:
        state = self._states[key]
        if state.status != "waiting":
            return
        before = [self._states[(key[0], other)].status for other in self._stages[key].depends]
        if any(status in ("failed", "blocked") for status in before):
            state.status = "blocked"
            for follower in self._followers[key]:
                self._queue_if_ready(follower)
        elif all(status == "done" for status in before):
            heapq.heappush(self._ready[self._claim(key)], (self._order[key], key))

    def _claim(self, key: _Id) -> tuple[float, ...]:
        stage = self._stages[key]
        return stage.cpus, stage.gpus, stage.memory_gb

    def _submit(self) -> None:
        now = time.time()
        while self._delayed and self._delayed[0][0] <= now:
            _, key = heapq.heappop(self._delayed)
            heapq.heappush(self._ready[self._claim(key)], (self._order[key], key))
        submitted: dict[tuple[float, ...], int] = defaultdict(int)
        for key in self._running.values():
            submitted[self._claim(key)] += 1
        for claim, queue in self._ready.items():
            shares = [there / claimed for there, claimed in zip(self._capacity, claim, strict=True) if claimed]
            fitting = int(min(shares))
            # A few more than fit keep machines busy and let a cluster grow. Submitting all at once would leave no
            # choice of order.
            while queue and submitted[claim] < fitting + max(8, fitting // 4):
                _, key = heapq.heappop(queue)
                self._running[self.cluster.submit(self._job(key))] = key
                submitted[claim] += 1

    def _job(self, key: _Id) -> Job:
        stage, capture = self._stages[key], self._captures[key[0]]
        self._attempts[key] += 1
        return Job(
            stage=stage,
            output=self.storage.root,
            work_dir=self.plan.config.work_dir,
            source=capture.source,
            fingerprint=capture.fingerprint,
            teacher=capture.teacher,
            inputs={other: self._states[(key[0], other)].details["result"] for other in stage.depends},
            environment={name: os.environ[name] for name in _FORWARDED if name in os.environ},
            attempt=self._attempts[key],
        )

    def _finish(self, key: _Id, outcome: Outcome) -> None:
        stage, state = self._stages[key], self._states[key]
        label = f"{key[0]} {stage.id}"
        if outcome.failure is None:
            state.status, state.details = "done", asdict(outcome)
            self.say(f"{label}: done in {_duration(outcome.seconds)}")
            for follower in self._followers[key]:
                self._queue_if_ready(follower)
            return
        if outcome.failure in ("lost", "stopped"):
            # The worker could not clean up.
            self.storage.remove(f"{stage.state}.running.json")
        state.status, state.details = "waiting", {}
        if (again := self._next_attempt(key, outcome)) is not None:
            self._stages[key] = again
            delay = 0.0 if outcome.failure == "lost" else min(60.0, 2.0 ** self._attempts[key])
            heapq.heappush(self._delayed, (time.time() + delay, key))
            self.say(f"{label}: {outcome.reason}. Trying again.")
            return
        state.status, state.details = "failed", {**asdict(outcome), "attempts": self._attempts[key], "log": stage.log}
        try:
            self.storage.write_json(f"{stage.state}.failed.json", state.details)
        except OSError as error:
            self.say(f"The reason of a failure could not be kept in {self.storage.root} ({error}).")
        self.say(f"{label}: failed ({outcome.failure}): {outcome.reason}. Log: {stage.log}")
        for follower in self._followers[key]:
            self._queue_if_ready(follower)

    def _next_attempt(self, key: _Id, outcome: Outcome) -> Stage | None:
        """Return the stage for another attempt; None if another attempt makes no sense."""
        stage = self._stages[key]
        if outcome.failure == "out-of-memory" and 0 < stage.gpus < 1:
            # Once more with a whole GPU: the stages beside it may have used up the memory.
            return dataclasses.replace(stage, gpus=1.0)
        is_same = self._reasons.get(key) == outcome.reason
        self._reasons[key] = outcome.reason
        if outcome.failure == "crash" and is_same:
            return None
        retried = outcome.failure in RETRIED or outcome.failure == "stopped"
        return stage if retried and self._attempts[key] <= stage.retries else None

    def _refresh(self, force: bool = False) -> None:
        now = time.time()
        if now - self._looked > POLL_SECONDS or force:
            self._looked = now
            self._capacity = self.cluster.capacity()
            for key in self._running.values():
                running = self.storage.read_json(f"{self._stages[key].state}.running.json")
                state = self._states[key]
                state.status, state.details = ("waiting", {}) if running is None else ("running", running)
            self._write_lock()
        self.look(self.state, self._capacity)

    def _check_claims(self) -> None:
        """Check that this machine has the resources of every stage, which would otherwise wait forever."""
        if self.plan.config.address:
            return
        names = {"GPUs": "gpus", "CPU cores": "cpus", "GB of memory": "memory_gb"}
        for key, stage in self._stages.items():
            if self._states[key].status != "waiting":
                continue
            for what, claimed, there in (
                ("GPUs", stage.gpus, self._capacity.gpus),
                ("CPU cores", stage.cpus, self._capacity.cpus),
                ("GB of memory", stage.memory_gb, self._capacity.memory_gb),
            ):
                if claimed > there:
                    raise InputError(
                        f"The stage {stage.id} claims {claimed:g} {what}, and Ray found {there:g} on this machine: lower its"
                        f" `{names[what]}`, or name a cluster with `address`."
                    )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Refuse to run beside another process with the same output."""
        other = self.storage.read_json(LOCK)
        if other is not None and time.time() - other.get("seen", 0.0) < LOCK_SECONDS:
            is_here = other.get("host") == socket.gethostname()
            if not (is_here and not Path(f"/proc/{other.get('pid')}").exists() and Path("/proc/self").exists()):
                raise InputError(
                    f"Another r2l-fleet (process {other.get('pid')} on {other.get('host')}) runs the fleet in"
                    f" {self.storage.root}: wait for it, or remove {LOCK} there if it is gone."
                )
        self._write_lock()
        try:
            yield
        finally:
            self.storage.remove(LOCK)

    def _write_lock(self) -> None:
        try:
            self.storage.write_json(LOCK, {"host": socket.gethostname(), "pid": os.getpid(), "seen": time.time()})
        except OSError:
            pass  # A full disk, which the stages report.


def current_state(plan: Plan, storage: Storage) -> FleetState:
    """Determine what is done of a plan. Failed stages count as waiting, and so do done ones whose result was
    removed."""
    state = read_state(storage, plan.describe())
    for capture in state.captures:
        for stage in capture.stages:
            gone = stage.status == "done" and storage.is_local and not storage.exists(stage.details["result"])
            if gone:
                storage.remove(f"{stage.state}.done.json")
            if gone or stage.status != "done":
                stage.status, stage.details = "waiting", {}
    return state


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
