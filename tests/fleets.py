"""Fleets of stand-in commands, for tests."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from r2l_nerfstudio.fleet.cluster import Capacity, Cluster
from r2l_nerfstudio.fleet.config import (
    CaptureConfig,
    ExportConfig,
    FleetConfig,
    ReportConfig,
    StudentConfig,
    TeacherConfig,
)
from r2l_nerfstudio.fleet.plan import FleetState, make_plan
from r2l_nerfstudio.fleet.scheduler import Scheduler
from r2l_nerfstudio.fleet.storage import Storage
from r2l_nerfstudio.fleet.task import Job, Outcome, run_stage

STAND_IN = f"python {Path(__file__).with_name('stand_in.py')}"
QUIET = Console(quiet=True)


def write_folder(folder: Path, text: str = '{"frames": [{"file_path": "images/0.png"}]}') -> Path:
    """A capture that only stand-ins can use: one photo and a transforms.json."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 48), "teal").save(folder / "images" / "0.png")
    (folder / "transforms.json").write_text(text)
    return folder


def stand_in_fleet(root: Path, captures: Sequence[str | CaptureConfig], output: str = "") -> FleetConfig:
    """A fleet of four stages for each capture: teacher, student, its report and its page; no GPU, half a core."""
    record = f"--record {root / 'ran.txt'}"
    light: dict[str, Any] = {"gpus": 0.0, "cpus": 0.5, "minutes": 1.0}
    return FleetConfig(
        output=output or str(root / "out"),
        captures=[CaptureConfig(path=capture) if isinstance(capture, str) else capture for capture in captures],
        teacher=TeacherConfig(
            command=f"{STAND_IN} train {{run}} --label {{name}}-teacher {record} {{options}}", **light
        ),
        students={
            "mobile": StudentConfig(
                command=f"{STAND_IN} train {{run}} --label {{name}}-student {record} {{options}}", **light
            )
        },
        report=ReportConfig(
            command=f"{STAND_IN} write {{output}} --label {{name}}-report {record} {{options}}", **light
        ),
        exports={
            "web": ExportConfig(
                command=f"{STAND_IN} write {{output}} --label {{name}}-web {record} {{options}}", **light
            )
        },
        num_cpus=2,
        num_gpus=0,
        dashboard=False,
        work_dir=str(root / "work"),
    )


def ran(root: Path) -> Counter[str]:
    """How often each stand-in was started: "CAPTURE-teacher", "-student", "-report", "-web"."""
    record = root / "ran.txt"
    return Counter(record.read_text().splitlines()) if record.exists() else Counter()


def run_fleet(config: FleetConfig, cluster: Cluster, lines: list[str] | None = None) -> FleetState:
    """Run a fleet to its end, and return its state."""
    scheduler = Scheduler(
        make_plan(config, QUIET), Storage(config.output), cluster, (lines if lines is not None else []).append
    )
    scheduler.run()
    return scheduler.state


def statuses(state: FleetState) -> dict[str, list[str]]:
    """The status of each stage, by capture."""
    return {capture.name: [stage.status for stage in capture.stages] for capture in state.captures}


class ThreadCluster:
    """Runs jobs in threads of this process: for file systems that no other process can see."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._outcomes: dict[int, Outcome] = {}
        self.jobs: list[Job] = []

    def capacity(self) -> Capacity:
        return Capacity(2.0, 0.0)

    def submit(self, job: Job) -> int:
        handle = len(self.jobs)
        self.jobs.append(job)
        threading.Thread(target=lambda: self._outcomes.__setitem__(handle, run_stage(job, self._stop))).start()
        return handle

    def wait(self, handles: Sequence[int], seconds: float) -> list[tuple[int, Outcome]]:
        end = time.time() + seconds
        while not any(handle in self._outcomes for handle in handles) and time.time() < end:
            time.sleep(0.01)
        return [(handle, self._outcomes[handle]) for handle in handles if handle in self._outcomes]

    def stop(self, handles: Sequence[int], seconds: float = 10.0) -> None:
        self._stop.set()
        end = time.time() + seconds
        while not all(handle in self._outcomes for handle in handles) and time.time() < end:
            time.sleep(0.01)


def need(module: str) -> None:
    """Fail in CI and skip elsewhere where a library of the extra `fleet` is missing."""
    if importlib.util.find_spec(module) is None:
        lacks = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        lacks(f"{module} is not installed: pip install 'r2l-nerfstudio[fleet]'")
