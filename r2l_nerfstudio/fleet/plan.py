"""All stages of a fleet, and which are done, running, failed or waiting, as its output's files show."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.fleet.captures import Capture, find_captures, read_capture
from r2l_nerfstudio.fleet.cluster import Capacity
from r2l_nerfstudio.fleet.config import FleetConfig, check_fleet
from r2l_nerfstudio.fleet.stages import Stage, plan_stages
from r2l_nerfstudio.fleet.storage import Storage
from r2l_nerfstudio.fleet.task import HEARTBEAT_SECONDS, find_program

Status = Literal["done", "running", "failed", "waiting", "blocked"]
"""blocked: a stage that it depends on has failed."""
PLAN = "fleet.json"
LOST_SECONDS = 6 * HEARTBEAT_SECONDS
"""Seconds without a sign of life after which a stage no longer counts as running."""


@dataclass
class StageState:
    """A stage and its state."""

    id: str
    kind: str
    state: str
    """Path of its state files in the output, without their endings."""
    depends: tuple[str, ...]
    minutes: float
    gpus: float
    cpus: float
    disk_gb: float
    status: Status = "waiting"
    details: dict[str, Any] = field(default_factory=dict)
    """Content of the newest state file."""

    @property
    def minutes_left(self) -> float:
        """Expected minutes to its end."""
        if self.status in ("done", "failed", "blocked"):
            return 0.0
        spent = (time.time() - self.details.get("started", time.time())) / 60 if self.status == "running" else 0.0
        return max(0.0, self.minutes - spent)


@dataclass
class CaptureState:
    """A capture and its state."""

    name: str
    error: str
    stages: list[StageState]

    def figure(self, name: str) -> float | None:
        """Return a quality figure from its newest stage that has one."""
        for stage in reversed(self.stages):
            value = stage.details.get("figures", {}).get(name) if stage.status == "done" else None
            if value is not None:
                return float(value)
        return None


@dataclass
class FleetState:
    """All captures of a fleet."""

    captures: list[CaptureState]
    started: float = 0.0

    def count(self, status: Status) -> int:
        """Return the number of stages with a status."""
        return sum(stage.status == status for capture in self.captures for stage in capture.stages)

    @property
    def total(self) -> int:
        """Return the number of all stages."""
        return sum(len(capture.stages) for capture in self.captures)

    def minutes_left(self, capacity: Capacity) -> float:
        """Estimate the minutes to the end, from the stages' minutes and the machines' resources."""
        stages = [stage for capture in self.captures for stage in capture.stages]
        gpu = sum(stage.minutes_left * stage.gpus for stage in stages) / max(capacity.gpus, 1e-9)
        cpu = sum(stage.minutes_left * stage.cpus for stage in stages) / max(capacity.cpus, 1e-9)
        # However many machines there are, the stages of one capture follow each other.
        longest = max(
            (sum(stage.minutes_left for stage in _longest(capture)) for capture in self.captures), default=0.0
        )
        return max(gpu, cpu, longest)


@dataclass
class Plan:
    """A fleet before anything runs."""

    config: FleetConfig
    captures: list[Capture]
    stages: dict[str, list[Stage]]
    """Stages by capture; none for captures that cannot be read."""

    def describe(self) -> dict[str, Any]:
        """Return what `r2l-fleet status` and the gallery read, from any machine."""
        fields = ("id", "kind", "state", "depends", "minutes", "gpus", "cpus", "disk_gb")
        return {
            "started": time.time(),
            "captures": [
                {
                    "name": capture.name,
                    "error": capture.error,
                    "stages": [
                        {name: getattr(stage, name) for name in fields} for stage in self.stages.get(capture.name, [])
                    ],
                }
                for capture in self.captures
            ],
        }


def make_plan(config: FleetConfig, console: Console) -> Plan:
    """Read all captures and plan their stages.

    Raises:
        InputError: the configuration cannot be used. A capture that cannot be read keeps its error instead.
    """
    check_fleet(config)
    captures = find_captures(config.captures)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Reading captures", total=len(captures))
        # Existing runs first and one by one: reading a configuration imports Nerfstudio, which is not thread-safe.
        for capture in (capture for capture in captures if capture.teacher):
            read_capture(capture)
            bar.advance(task)
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(read_capture, [capture for capture in captures if not capture.teacher]):
                bar.advance(task)
    stages = {capture.name: plan_stages(config, capture) for capture in captures if not capture.error}
    for program in sorted({stage.words[0] for planned in stages.values() for stage in planned}):
        if not config.address:
            find_program(program)
    return Plan(config, captures, stages)


def read_state(storage: Storage, description: dict[str, Any] | None = None) -> FleetState:
    """Return the state of a fleet from its output.

    Args:
        storage: the output.
        description: `Plan.describe`; read from the output when None.

    Raises:
        InputError: no fleet has run there.
    """
    if description is None:
        description = storage.read_json(PLAN)
    if description is None or "captures" not in description:
        raise InputError(f"No fleet has run in {storage.root}: pass its FLEET.yaml, or its output folder.")
    files = storage.read_all_json("state")
    captures = []
    for entry in description["captures"]:
        states: dict[str, StageState] = {}
        for planned in entry["stages"]:
            stage = StageState(**{**planned, "depends": tuple(planned["depends"])})
            name = stage.state.removeprefix("state/")
            _judge(stage, {ending: files.get(f"{name}.{ending}.json") for ending in ("done", "failed", "running")})
            if stage.status == "waiting" and any(
                states[other].status in ("failed", "blocked") for other in stage.depends if other in states
            ):
                stage.status = "blocked"
            states[stage.id] = stage
        captures.append(CaptureState(entry["name"], entry["error"], list(states.values())))
    return FleetState(captures, description.get("started", 0.0))


def state_of(plan: Plan) -> FleetState:
    """Return the state of a fleet before anything has run."""
    captures = [
        CaptureState(entry["name"], entry["error"], [StageState(**stage) for stage in entry["stages"]])
        for entry in plan.describe()["captures"]
    ]
    return FleetState(captures, time.time())


def _judge(stage: StageState, files: dict[str, dict[str, Any] | None]) -> None:
    done, failed, running = files["done"], files["failed"], files["running"]
    if done is not None:
        stage.status, stage.details = "done", done
    elif running is not None and time.time() - running.get("seen", 0.0) < LOST_SECONDS:
        stage.status, stage.details = "running", running
    elif failed is not None:
        stage.status, stage.details = "failed", failed


def _longest(capture: CaptureState) -> list[StageState]:
    """Return the chain of stages that takes the longest."""
    chains: dict[str, list[StageState]] = {}
    for stage in capture.stages:
        before = max(
            (chains[other] for other in stage.depends if other in chains),
            key=lambda chain: sum(entry.minutes_left for entry in chain),
            default=[],
        )
        chains[stage.id] = [*before, stage]
    return max(chains.values(), key=lambda chain: sum(stage.minutes_left for stage in chain), default=[])
