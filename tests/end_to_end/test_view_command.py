"""`r2l-view` on a run's folder only."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import student_runs
from forked_command import start_command
from test_viewer import serve

STUDENTS = {
    "r2l": student_runs.tiny_composited_r2l,
    "mobile-r2l": student_runs.tiny_composited_mobile_r2l,
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_is_served_on_loopback_without_its_capture(
    kind: str, command: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    run = student_runs.write_run(tmp_path / "run", STUDENTS[kind]()).parent
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with serve(command("r2l-view", run, "--engine", "torch"), environment, tmp_path, "--") as served:
        listening = {c.laddr.ip for c in psutil.Process(served.process.pid).net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}", timeout=60) as answer:
            assert answer.status == 200 and b"<html" in answer.read().lower()
        served.check()
    after = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert after == before, "r2l-view wrote into the run"


def test_a_folder_without_a_run_is_an_error(
    command: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    process = start_command(command("r2l-view", tmp_path), environment, tmp_path, log)
    process.join(300)
    printed = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in printed
    assert "config.yml" in printed
