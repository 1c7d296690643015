"""The viewer on a student, in a real browser."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browser import CHANGED, SAME, SIMILAR, ViewerPage, chromium, difference, find_chromium, wait_until
from forked_command import start_command

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

MAX_RES = 164
LEAST_RES = 64
"""Positions of the viewer's slider that leave little to draw."""
SCREENSHOTS = Path(__file__).parents[2] / "artifacts" / "viewer"


@dataclass
class Served:
    """A process that serves the viewer."""

    process: BaseProcess
    port: int
    log: Path

    def check(self) -> None:
        """Fail if the process has ended or one of its render threads has."""
        text = self.log.read_text(errors="replace")
        assert self.process.is_alive(), text[-4000:]
        assert "Exception in thread" not in text, text[-4000:]


@contextmanager
def serve(
    command: list[str], environment: dict[str, str], folder: Path, flags: str = "--viewer.websocket-"
) -> Iterator[Served]:
    """Run a command that has a viewer, on a free port of this machine, until the viewer answers.

    Args:
        command: with its arguments.
        environment: of the process.
        folder: current folder of the process, and where its output goes.
        flags: how the command's flags for port and host begin.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    log.touch()
    address = [f"{flags}port", str(port), f"{flags}host", "127.0.0.1"]
    process = start_command([*command, *address], environment, folder, log)
    served = Served(process, port, log)

    def answers() -> bool:
        served.check()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers, "the viewer to start", seconds=400)
        yield served
    finally:
        process.terminate()
        process.join(30)
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with chromium(tmp_path_factory.mktemp("browser")) as context:
        yield context


@pytest.fixture(scope="module", params=["visible_student", "visible_mobile_student"])
def viewer(
    request: pytest.FixtureRequest,
    browser: BrowserContext,
    command: Callable[..., list[str]],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """`ns-viewer` on a tiny student of either kind."""
    arguments = command("ns-viewer", "--load-config", request.getfixturevalue(request.param) / "config.yml")
    with serve(arguments, environment, tmp_path_factory.mktemp("viewer")) as served:
        yield served


@pytest.fixture(scope="module")
def open_page(browser: BrowserContext, viewer: Served) -> ViewerPage:
    page = ViewerPage(browser.new_page(), viewer.port, check=viewer.check)
    # Pictures are compared to the last bit or so: let one engine draw them all.
    page.wait_until(lambda: "Engine: " in viewer.log.read_text(errors="replace"), "an engine to be chosen")
    page.limit_resolution(MAX_RES)
    return page


@pytest.fixture
def page(open_page: ViewerPage, viewer: Served) -> Iterator[ViewerPage]:
    """A browser before a settled picture, with every box clear; it and the viewer must outlive the test."""
    for box in open_page.page.get_by_role("checkbox", checked=True).all()[::-1]:
        box.uncheck()
    open_page.settle()
    yield open_page
    viewer.check()
    assert not open_page.crashes


def test_crop_box_leaves_only_what_is_inside(page: ViewerPage):
    before = page.settle()
    enable = page.row("Enable", folder="Crop Viewport")
    enable.check()
    # A large box on the right of a new browser's camera, which is at (0.3, 0.3, 0.3) and looks at the origin.
    side = 2000.0  # a teacher so briefly trained may see everything far away
    aside = side / 2 / 2**0.5
    box = {
        "Crop center": (0.3 - aside, 0.3 + aside, 0.3),
        "Crop scale": (side, side, side),
        "Crop rotation": (0.0, 0.0, np.pi / 4),
    }
    for label, values in box.items():
        page.wait_until(lambda label=label: page.row(label).count() == 3, f"the numbers of {label}")
        for number, value in zip(page.row(label).all(), values, strict=True):
            number.fill(f"{value:.4f}")
            number.press("Enter")
    middle = before.shape[1] // 2
    left, right = np.s_[:, : middle - 12], np.s_[:, middle + 12 :]
    background = np.full_like(before, (38, 42, 55))  # the panel's choice
    page.wait_until(lambda: difference(background[left], page.picture()[left]) < SIMILAR, "the crop")
    cropped = page.settle()
    page.save(SCREENSHOTS / "cropped.png")
    assert difference(background[left], cropped[left]) < SIMILAR
    assert difference(before[right], cropped[right]) < SAME
    enable.uncheck()
    page.wait_until(lambda: difference(before, page.picture()) < SAME, "the crop to end")


def test_moving_the_camera_changes_the_image(page: ViewerPage):
    before = page.settle()
    assert before.std() > 2, "the canvas shows one color only"
    page.save(SCREENSHOTS / "student.png")
    page.drag(120, 20)
    after = page.settle()
    assert difference(before, after) > CHANGED
    page.save(SCREENSHOTS / "student_moved.png")


def test_the_panel_shows_the_frame_rate(page: ViewerPage):
    assert page.pace("Student") > 0
    assert page.pace("Teacher") is None


def test_depth_is_not_composited_by_default(page: ViewerPage):
    box = page.row("Composite depth")
    assert not box.is_checked()
    box.check()
    page.drag(120, 0)
    page.settle()
    box.uncheck()
    page.drag(-60, 0)


def test_an_idle_viewer_draws_nothing(page: ViewerPage):
    page.settle()
    page.page.wait_for_timeout(2000)
    drawn = page.images_received
    assert drawn > 0
    page.page.wait_for_timeout(4000)
    assert page.images_received == drawn


def test_split_shows_the_teacher_on_the_right(page: ViewerPage):
    before = page.settle()
    middle = before.shape[1] // 2
    # Its line in between, and where the page blends it with its neighbors.
    left, right = np.s_[:, : middle - 12], np.s_[:, middle + 12 :]
    box = page.row("Split with teacher")
    assert not box.is_checked()
    box.check()
    page.wait_until(lambda: page.pace("Teacher") is not None, "the teacher to load")
    page.wait_until(lambda: difference(before[right], page.picture()[right]) > CHANGED, "the teacher's half")
    split = page.settle()
    page.save(SCREENSHOTS / "student_and_teacher.png")
    assert difference(before[right], split[right]) > CHANGED
    assert difference(before[left], split[left]) < SAME

    page.drag(120, 0)
    moved = page.settle()
    assert difference(split[right], moved[right]) > CHANGED
    assert difference(split[left], moved[left]) > CHANGED
    box.uncheck()
    page.wait_until(lambda: difference(moved[right], page.picture()[right]) > CHANGED, "the student's right half")
    page.wait_until(lambda: page.pace("Teacher") is None, "the panel's line on the teacher to go")
    page.wait_until(lambda: difference(moved[left], page.picture()[left]) < SAME, "the student's left half as it was")


def test_windows_of_odd_sizes(page: ViewerPage):
    def is_in_shape() -> bool:
        (width, height), box = page.resolution(), page.canvas()
        return abs(width / height * box["height"] / box["width"] - 1) < 0.1

    size = page.page.viewport_size
    for width, height in ((733, 411), (517, 900), (size["width"], size["height"])):
        page.page.set_viewport_size({"width": width, "height": height})
        page.wait_until(is_in_shape, "a picture of the window's shape")
        # A resized canvas is blank until the next picture is drawn.
        page.wait_until(lambda: page.settle().std() > 2, "a picture in the resized window")


def test_every_output_can_be_shown(page: ViewerPage):
    before = page.settle()
    for output in ("depth", "accumulation", "rgb"):
        row = page.row("Output type").first
        row.click()
        page.page.get_by_role("option", name=output, exact=True).click()
        page.page.wait_for_timeout(1000)
        shown = page.settle()
        if output == "depth":
            assert difference(before, shown) > CHANGED
    assert difference(before, shown) < SAME


def test_browsers_do_not_disturb_each_other(page: ViewerPage, browser: BrowserContext, viewer: Served):
    before = page.settle()
    other = ViewerPage(browser.new_page(), viewer.port, check=viewer.check)
    other.drag(120, 0)
    assert difference(before, page.settle()) < SAME
    other.page.close()
    page.drag(-120, 0)


def test_browsers_may_leave_while_they_move(page: ViewerPage, browser: BrowserContext, viewer: Served):
    for _ in range(2):
        other = ViewerPage(browser.new_page(), viewer.port, check=viewer.check)
        other.start_drag(150, 20)
        other.page.close()
    page.drag(-120, 0)


def test_the_viewer_shows_a_training(
    browser: BrowserContext,
    train_student: Callable[..., list[str]],
    environment: dict[str, str],
    tmp_path: Path,
):
    """`ns-train … --vis viewer` trains on while a browser looks, moves and leaves."""
    command = train_student(tmp_path / "students", "--vis", "viewer", "--max-num-iterations", 10**6)
    with serve(command, environment, tmp_path) as training:
        page = ViewerPage(browser.new_page(), training.port, check=training.check)
        page.limit_resolution(LEAST_RES)

        def step() -> int:
            return int(re.search(r"Step: (\d+)", page.panel())[1])

        page.wait_until(lambda: step() > 30, "training to go on")
        page.drag(200, 20)
        page.row("Split with teacher").check()
        page.wait_until(lambda: page.pace("Teacher") is not None, "the teacher to load")
        seen = step()
        page.wait_until(lambda: step() > seen, "training to go on beside the teacher")
        page.save(SCREENSHOTS / "training.png")
        page.page.close()
        training.check()


def test_without_a_browser_ci_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt install chromium"):
        find_chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt install chromium"):
        find_chromium()
