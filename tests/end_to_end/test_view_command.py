"""`r2l-view` on a run's folder only, seen through a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import student_runs
from browser import CHANGED, ViewerPage, chromium, difference
from test_viewer import LEAST_RES, SCREENSHOTS, serve

STUDENTS = {
    "r2l": student_runs.tiny_composited_r2l,
    "mobile-r2l": student_runs.tiny_composited_mobile_r2l,
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_without_its_capture(
    kind: str, command: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    run = student_runs.write_run(tmp_path / "run", STUDENTS[kind]()).parent
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    arguments = command("r2l-view", run, "--engine", "torch")
    with serve(arguments, environment, tmp_path, "--") as served, chromium(tmp_path / "browser") as browser:
        listening = {c.laddr.ip for c in psutil.Process(served.process.pid).net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        page = ViewerPage(browser.new_page(), served.port)
        page.limit_resolution(LEAST_RES)
        picture = page.settle()
        assert picture.std() > 2, "the canvas shows one colour only"
        page.drag(150, 20)
        assert difference(picture, page.settle()) > CHANGED
        page.page.screenshot(path=SCREENSHOTS / f"r2l_view_{kind}.png")
        assert page.pace("Student") > 0
        served.check()
        assert not page.crashes
    after = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert after == before, "r2l-view wrote into the run"


def test_a_folder_that_is_no_run(
    command: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    import subprocess

    found = subprocess.run(command("r2l-view", tmp_path), env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1 and "Traceback" not in found.stdout + found.stderr
    assert "config.yml" in found.stdout
