"""Measure the overhead of `r2l-fleet` per stage, and its driver's needs: many captures, stand-in stages of one second,
real Ray.

    python benchmarks/fleet_scale.py --captures 1000 --slots 16

Ray is given more CPUs than the machine has, since a stand-in sleeps. Figures go to benchmarks/results/fleet_scale.json and
.md.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
from PIL import Image
from rich.console import Console

from benchmarks.figures import RESULTS, write_figures
from r2l_nerfstudio.fleet.cluster import open_cluster
from r2l_nerfstudio.fleet.config import (
    CaptureConfig,
    ExportConfig,
    FleetConfig,
    ReportConfig,
    StudentConfig,
    TeacherConfig,
)
from r2l_nerfstudio.fleet.gallery import write_gallery
from r2l_nerfstudio.fleet.plan import make_plan, read_state
from r2l_nerfstudio.fleet.scheduler import Scheduler
from r2l_nerfstudio.fleet.storage import Storage

_RUN = 'mkdir -p "$0/nerfstudio_models" && : > "$0/nerfstudio_models/step-1.ckpt" && : > "$0/config.yml"'
TRAIN = f"sh -c 'sleep {{seconds}} && {_RUN}' {{run}}"
WRITE = 'sh -c \'sleep {seconds} && mkdir -p "$0" && echo page > "$0/index.html"\' {output}'
WINDOW_SECONDS = 10.0
ESTIMATE_MINUTES = 20.0
ESTIMATE_GPUS = (8, 64)


@dataclass
class Scale:
    """Run a fleet of stand-in stages, and measure what is not the stages themselves."""

    captures: int = 1000
    slots: int = 16
    """Stages at a time: the number of CPUs that Ray is given."""
    seconds: float = 1.0
    """Length of a stand-in stage."""
    output: Path = RESULTS / "fleet_scale"
    """Path of the figures, without a suffix."""

    def main(self) -> None:
        """Measure, print and write."""
        with tempfile.TemporaryDirectory() as scratch:
            figures = self.measure(Path(scratch))
        write_figures(self.output, figures, markdown(figures))
        print(markdown(figures))

    def measure(self, root: Path) -> dict[str, Any]:
        """All figures."""
        for index in range(self.captures):
            folder = root / "captures" / f"capture-{index:04d}"
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 12), (index % 256, 100, 100)).save(folder / "0.png")
            (folder / "transforms.json").write_text(json.dumps({"index": index, "frames": [{"file_path": "0.png"}]}))
        light = {"gpus": 0.0, "cpus": 1.0, "minutes": 1.0}
        train, write = (text.replace("{seconds}", f"{self.seconds:g}") for text in (TRAIN, WRITE))
        fleet = FleetConfig(
            output=str(root / "out"),
            captures=[CaptureConfig(path=str(root / "captures" / "*"))],
            teacher=TeacherConfig(command=train, **light),
            students={"mobile": StudentConfig(command=train, **light)},
            report=ReportConfig(command=write, **light),
            exports={"web": ExportConfig(command=write, **light)},
            num_cpus=self.slots,
            num_gpus=0,
            dashboard=False,
        )
        started = time.perf_counter()
        plan = make_plan(fleet, Console(quiet=True))
        planning = time.perf_counter() - started
        storage = Storage(fleet.output)
        started = time.perf_counter()
        with open_cluster(fleet) as cluster:
            starting = time.perf_counter() - started
            scheduler = Scheduler(plan, storage, cluster)
            memory = Memory()
            started, cpu = time.perf_counter(), time.process_time()
            scheduler.run()
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            ray_bytes = memory.finish()
        stages = [stage for capture in scheduler.state.captures for stage in capture.stages]
        assert all(stage.status == "done" for stage in stages), "a stand-in failed"
        inside = [stage.details["seconds"] - self.seconds for stage in stages]
        started = time.perf_counter()
        write_gallery(storage, scheduler.state, is_running=False)
        gallery = time.perf_counter() - started
        started = time.perf_counter()
        read_state(storage)
        status = time.perf_counter() - started
        started = time.perf_counter()
        again = Scheduler(make_plan(fleet, Console(quiet=True)), storage, cluster=_Idle())
        again.run()
        second = time.perf_counter() - started
        return {
            "captures": self.captures,
            "stages": len(stages),
            "stage_seconds": self.seconds,
            "slots": self.slots,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": [round(value, 1) for value in os.getloadavg()],
            "planning_seconds": round(planning, 2),
            "ray_start_seconds": round(starting, 1),
            "wall_seconds": round(wall, 1),
            "ideal_seconds": round(len(stages) * self.seconds / self.slots, 1),
            "overhead_per_stage_seconds": round(wall * self.slots / len(stages) - self.seconds, 3),
            "rates": rates([marker["finished"] for marker in markers(storage)], self.slots, self.seconds),
            "in_attempt_overhead_seconds": {
                "median": round(statistics.median(inside), 3),
                "p99": round(sorted(inside)[math.ceil(0.99 * len(inside)) - 1], 3),
            },
            "driver_cpu_per_stage_milliseconds": round(1000 * cpu / len(stages), 2),
            "driver_peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "ray_processes_peak_megabytes": round(ray_bytes / 1e6),
            "gallery_seconds": round(gallery, 3),
            "gallery_kilobytes": round((Path(fleet.output) / "index.html").stat().st_size / 1e3),
            "status_seconds": round(status, 2),
            "second_run_seconds": round(second, 2),
        }


def markers(storage: Storage) -> list[dict[str, Any]]:
    """The completion markers of all stages."""
    return [entry for name, entry in storage.read_all_json("state").items() if name.endswith(".done.json")]


def rates(finished: list[float], slots: int, seconds: float) -> dict[str, Any]:
    """How many stages end per second, over windows of ten seconds: a shared machine is not equally fast all the time.

    Args:
        finished: times when the stages ended, in seconds.
        slots: stages at a time.
        seconds: length of a stage.

    Returns:
        deciles of the rate in stages per second, and the overhead of a stage at the ninth decile in seconds.
    """
    start = min(finished)
    counts = Counter(int((end - start) // WINDOW_SECONDS) for end in finished)
    whole = [counts[window] / WINDOW_SECONDS for window in range(int((max(finished) - start) // WINDOW_SECONDS))]
    deciles = statistics.quantiles(whole, n=10) if len(whole) > 1 else [len(finished) / (max(finished) - start)] * 9
    return {
        "stages_per_second_deciles": [round(rate, 1) for rate in deciles],
        "overhead_per_stage_seconds_at_ninth_decile": round(slots / deciles[-1] - seconds, 3),
    }


class Memory:
    """Peak memory of all child processes, workers and stand-ins included. Shared pages count once."""

    def __init__(self) -> None:
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def finish(self) -> int:
        """Bytes."""
        self._over.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._over.wait(20.0):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    pass
            self._peak = max(self._peak, total)


class _Idle:
    """A cluster that nothing may be submitted to."""

    def capacity(self):
        from r2l_nerfstudio.fleet.cluster import Capacity

        return Capacity(1.0, 0.0)

    def submit(self, job):
        raise AssertionError("a second run repeats a finished stage")

    def wait(self, handles, seconds):
        return []

    def stop(self, handles, seconds=0.0):
        pass


def markdown(figures: dict[str, Any]) -> str:
    """The figures, and an estimate from them."""
    inside, steady = figures["in_attempt_overhead_seconds"], figures["rates"]
    rows = [
        ("captures x stages", f"{figures['captures']} x {figures['stages'] // figures['captures']}"),
        ("stages at a time (Ray CPUs; virtual)", figures["slots"]),
        ("machine", f"{figures['machine']}, load average at the end {figures['load_average']}"),
        ("wall time, and without any overhead", f"{figures['wall_seconds']} s, {figures['ideal_seconds']} s"),
        ("overhead of a stage, over the whole run", f"{figures['overhead_per_stage_seconds']} s"),
        (
            "stages per second over windows of 10 s: first, fifth, ninth decile",
            ", ".join(str(steady["stages_per_second_deciles"][index]) for index in (0, 4, 8)),
        ),
        (
            "overhead of a stage at the ninth decile",
            f"{steady['overhead_per_stage_seconds_at_ninth_decile']} s",
        ),
        (
            "of it within the attempt (start, log, marker): median, 99th percentile",
            f"{inside['median']} s, {inside['p99']} s",
        ),
        ("processor time of the driver per stage", f"{figures['driver_cpu_per_stage_milliseconds']} ms"),
        ("peak memory of the driver", f"{figures['driver_peak_megabytes']} MB"),
        ("peak memory of Ray's processes and workers", f"{figures['ray_processes_peak_megabytes']} MB"),
        ("reading and planning the captures", f"{figures['planning_seconds']} s"),
        ("start of Ray", f"{figures['ray_start_seconds']} s"),
        ("gallery: time to write, size", f"{figures['gallery_seconds']} s, {figures['gallery_kilobytes']} kB"),
        ("`r2l-fleet status`: time to read the state", f"{figures['status_seconds']} s"),
        ("a second run that finds everything done", f"{figures['second_run_seconds']} s"),
    ]
    lines = [
        "# r2l-fleet at scale",
        "",
        "Measured with stand-in stages that sleep for one second. The load average shows how busy the machine was with other"
        " work, and the deciles what that cost.",
        "",
    ]
    lines += ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    overhead = float(figures["overhead_per_stage_seconds"])
    lines += [
        f"Estimate, not measured: 1,000 captures x {ESTIMATE_MINUTES:g} minutes of one GPU, with this overhead.",
        "",
    ]
    lines += ["| GPUs | hours |", "|---|---|"]
    for gpus in ESTIMATE_GPUS:
        rounds = math.ceil(1000 / gpus)
        lines.append(f"| {gpus} | {rounds * (60 * ESTIMATE_MINUTES + overhead) / 3600:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(Scale, description=__doc__).main()
