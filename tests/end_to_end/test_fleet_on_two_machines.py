"""`r2l-fleet` on a local Ray with two CPUs: real commands on tiny captures, and lost workers with stand-ins."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from fleets import STAND_IN, need, ran, run_fleet, stand_in_fleet, statuses, write_folder
from teachers import TINY, train_teacher

from r2l_nerfstudio import load_student
from r2l_nerfstudio.fleet.cluster import RayCluster, listening_addresses, open_cluster
from r2l_nerfstudio.fleet.config import (
    CaptureConfig,
    ExportConfig,
    FleetConfig,
    ReportConfig,
    StudentConfig,
    TeacherConfig,
)
from r2l_nerfstudio.fleet.plan import read_state
from r2l_nerfstudio.fleet.stages import COMMANDS
from r2l_nerfstudio.fleet.storage import Storage
from r2l_nerfstudio.scene import write_capture

TEACHER = {
    **TINY["vanilla-nerf"],
    "max-num-iterations": 20,
    "pipeline.datamanager.train-num-rays-per-batch": 128,
    "logging.local-writer.enable": False,
    "logging.profiler": "none",
}
STUDENT = {
    "max-num-iterations": 12,
    "logging.local-writer.enable": False,
    "logging.profiler": "none",
    "pipeline.check-frame": False,
    "pipeline.datamanager.num-views": 3,
    "pipeline.datamanager.train-num-rays-per-batch": 256,
    "pipeline.datamanager.photo-iterations": 4,
    "pipeline.datamanager.crop-cells": 3,
    "pipeline.model.width": 16,
    "pipeline.model.blocks": 1,
}


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One Ray for all tests of this file, started as `r2l-fleet run` starts it."""
    need("ray")
    with open_cluster(FleetConfig(num_cpus=2, num_gpus=0)) as cluster:
        yield cluster


def options(values: dict[str, object]) -> str:
    """Options of a command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def broken_capture(folder: Path) -> Path:
    """A capture with a truncated photo, which only reading it shows."""
    write_capture(folder, num_train=6, num_test=2, size=24)
    photo = folder / "images" / "train_000.png"
    photo.write_bytes(photo.read_bytes()[:60])
    return folder


def test_ray_listens_on_loopback_only(local_ray: RayCluster) -> None:
    import ray

    assert ray.get(ray.remote(lambda: 7).remote()) == 7  # a worker is there, and listens too
    addresses = listening_addresses()
    assert "127.0.0.1" in addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    if local_ray.dashboard:  # a busy machine goes without
        assert local_ray.dashboard.startswith("127.0.0.1:")
        with urllib.request.urlopen(f"http://{local_ray.dashboard}", timeout=120) as page:
            assert page.status == 200


def test_captures_become_students_reports_and_exports(tmp_path: Path, local_ray: RayCluster) -> None:
    for index in range(2):
        write_capture(tmp_path / "captures" / f"scene-{index}", num_train=6, num_test=2, size=24, seed=index)
    trained = train_teacher("nerfacto", tmp_path / "captures" / "scene-1", tmp_path / "runs", iterations=20)
    light = {"gpus": 0.0, "cpus": 1.0, "minutes": 15.0}
    offline = f"python {Path(__file__).parents[1] / 'offline_train.py'}"
    fleet = FleetConfig(
        output=str(tmp_path / "out"),
        captures=[
            CaptureConfig(path=str(tmp_path / "captures" / "scene-[0]")),
            CaptureConfig(teacher=str(trained), name="scene-1"),
            CaptureConfig(path=str(broken_capture(tmp_path / "captures" / "broken"))),
        ],
        teacher=TeacherConfig(
            method="vanilla-nerf",
            command=COMMANDS["teacher"].replace("ns-train", offline),
            options=f"--machine.device-type cpu --mixed-precision False {options(TEACHER)}",
            dataparser="nerfstudio-data --eval-mode filename",
            retries=0,
            **light,
        ),
        students={"mobile": StudentConfig(method="mobile-r2l-lite", options=options(STUDENT), **light)},
        report=ReportConfig(command=f"{STAND_IN} write {{output}} --label {{run}}", **light),
        exports={},
        num_cpus=2,
        num_gpus=0,
    )
    lines: list[str] = []
    state = run_fleet(fleet, local_ray, lines)
    assert statuses(state) == {
        "scene-0": ["done"] * 3,
        "broken": ["failed", "blocked", "blocked"],
        "scene-1": ["done"] * 2,
    } or pytest.fail("\n".join(lines))
    broken = next(capture for capture in state.captures if capture.name == "broken").stages[0].details
    assert re.search("image|PNG|truncated", broken["reason"]) and (tmp_path / "out" / broken["log"]).exists()
    for capture in state.captures:
        if capture.name == "broken":
            continue
        stages = {stage.id: stage.details for stage in capture.stages}
        run = tmp_path / "out" / stages["mobile"]["result"]
        assert load_student(run, device="cpu").method_name == "mobile-r2l-lite"
        assert (tmp_path / "out" / "thumbnails" / f"{capture.name}.jpg").exists()
        log = (tmp_path / "out" / "logs" / capture.name / "mobile.log").read_text()
        assert "--teacher" in log and "--machine.device-type cpu" in log
    before = {path: path.stat().st_mtime for path in (tmp_path / "out" / "captures").rglob("*")}
    fleet.captures = [entry for entry in fleet.captures if "broken" not in entry.path]
    lines.clear()
    assert statuses(run_fleet(fleet, local_ray, lines))["scene-0"] == ["done"] * 3
    assert lines == [], "a second run does nothing"
    assert {path: path.stat().st_mtime for path in (tmp_path / "out" / "captures").rglob("*")} == before
    fleet.captures, fleet.exports = fleet.captures[-1:], {"onnx": ExportConfig(format="onnx", **light)}
    lines.clear()
    (capture,) = run_fleet(fleet, local_ray, lines).captures
    assert len(lines) == 1 and lines[0].startswith("scene-1 mobile-onnx: done")
    assert (tmp_path / "out" / capture.stages[-1].details["result"] / "student.onnx").stat().st_size > 1000


def test_a_stage_of_a_killed_worker_runs_again_on_another(tmp_path: Path, local_ray: RayCluster) -> None:
    captures = [str(write_folder(tmp_path / "captures" / name)) for name in ("barn", "church")]
    fleet = stand_in_fleet(
        tmp_path, [CaptureConfig(path=captures[0], options={"mobile": "--do kill-worker"}), captures[1]]
    )
    lines: list[str] = []
    state = run_fleet(fleet, local_ray, lines)
    assert set(sum(statuses(state).values(), [])) == {"done"}
    assert any("barn mobile: The worker process or its machine died" in line for line in lines)
    assert ran(tmp_path)["barn-student"] == 2
    assert ran(tmp_path)["barn-teacher"] == ran(tmp_path)["church-student"] == 1
    # The command of the killed worker, which would have slept for a minute, did not outlive it.
    assert not [p for p in psutil.process_iter(["cmdline"]) if "kill-worker" in " ".join(p.info["cmdline"] or ())]


def test_ctrl_c_stops_the_commands_and_the_same_fleet_continues(tmp_path: Path, local_ray: RayCluster) -> None:
    captures = [str(write_folder(tmp_path / "captures" / name)) for name in ("barn", "church")]
    fleet = stand_in_fleet(tmp_path, captures)
    fleet.teacher.options = "--do sleep-once=300"
    file = tmp_path / "FLEET.yaml"
    settings = {
        "output": fleet.output,
        "captures": captures,
        "teacher": {
            "command": fleet.teacher.command,
            "options": fleet.teacher.options,
            "gpus": 0,
            "cpus": 0.5,
            "minutes": 6,
        },
        "students": {"mobile": {"command": fleet.students["mobile"].command, "gpus": 0, "cpus": 0.5}},
        "report": None,
        "exports": {},
        "num_cpus": 2,
        "num_gpus": 0,
        "dashboard": False,
    }
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "r2l_nerfstudio.scripts.fleet", "run", str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        # Shells let what they start in the background ignore it, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while ran(tmp_path).total() < 2 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.2)
    running = ((each, shlex.join(each.info["cmdline"] or ())) for each in psutil.process_iter(["cmdline"]))
    commands = [each for each, call in running if "sleep-once" in call and str(tmp_path) in call]
    process.send_signal(signal.SIGINT)
    try:
        said, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 130, said
    assert "Interrupted. The same command continues." in said and "0 of 4 stages done" in said
    assert len(commands) == 2
    assert not psutil.wait_procs(commands, timeout=5)[1]
    assert not Storage(fleet.output).exists("fleet.running.json")
    assert (tmp_path / "out" / "index.html").exists()
    fleet.report, fleet.exports = None, {}
    state = run_fleet(fleet, local_ray)
    assert set(sum(statuses(state).values(), [])) == {"done"}
    assert statuses(read_state(Storage(fleet.output))) == statuses(state)
