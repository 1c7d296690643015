"""Headless Chromium on the viewer's page, for tests of what a user sees."""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Frame, Locator, Page

PATIENCE = 180.0
"""Seconds to wait for anything on the page: the CPU draws WebGL too, beside other work."""
CHANGED = 4.0
"""Steps of 8-bit color between images of different views."""
SAME = 1.9
"""What JPEG and the page's own resampling may add up to."""
SIMILAR = 4.0
"""Below it, background or another engine's picture are taken for the same."""


def wait_for(page: Page | Frame, expression: str, seconds: float = PATIENCE) -> None:
    """Wait until a JavaScript expression is true.

    From outside: the page's Content-Security-Policy forbids what Playwright's own waiting does, evaluating text in the page.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"after {seconds:.0f} s it is still not true: {expression}"
        time.sleep(0.05)


_SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    # WebGL in software.
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    # Nothing but the page.
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_GPU_SWITCHES = (
    "--no-sandbox",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    # Its pictures reach the page only if the page is drawn by the same software.
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    # It would end a browser that computes for long.
    "--disable-gpu-watchdog",
    *_SWITCHES[-5:],
)
"""WebGPU in software."""
_FEWER_FRAMES = """
const next = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = (draw) => setTimeout(() => next(draw), 150);
window.cancelAnimationFrame = clearTimeout;
"""
"""The viewer's page redraws its scene all the time, which keeps a core busy where software draws WebGL."""
_HOST = "127.0.0.1"


@contextmanager
def chromium(profile: Path, width: int = 1000, height: int = 640, has_gpu: bool = False) -> Iterator[BrowserContext]:
    """A browser with a new profile. It talks to this machine only, so that the page is the same everywhere.

    Args:
        profile: empty folder for the browser's own files.
        width: of its pages in pixels.
        height: of its pages in pixels.
        has_gpu: whether pages have WebGPU, in software.
    """
    executable = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=executable,
            headless=True,
            args=list(_GPU_SWITCHES if has_gpu else _SWITCHES),
            viewport={"width": width, "height": height},
            timeout=1e3 * PATIENCE,
        )
        context.set_default_timeout(1e3 * PATIENCE)
        # The title bar's logo is elsewhere.
        context.route(re.compile(rf"^https?://(?!{re.escape(_HOST)}[:/])"), lambda route: route.abort())
        try:
            yield context
        finally:
            context.close()


def find_chromium() -> str:
    """Path of the browser; without one, fails the test in CI and skips it elsewhere."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        message = "the viewer's page needs a browser: apt install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    return path


class ViewerPage:
    """The viewer as a user has it before them.

    Args:
        page: a new page of a browser.
        port: where the viewer serves on this machine.
        full: the viewer's "Max res" by now, in pixels.
        check: raises if the viewer has ended, whose pictures would be waited for in vain.
    """

    def __init__(self, page: Page, port: int, full: int = 512, check: Callable[[], None] = lambda: None) -> None:
        self.page = page
        self.check = check
        page.add_init_script(_FEWER_FRAMES)
        self.crashes: list[str] = []
        self.images_received = 0
        self._full = full
        page.on("pageerror", lambda error: self.crashes.append(str(error)))
        page.on("crash", lambda _: self.crashes.append("the page crashed"))
        page.on("websocket", lambda socket: socket.on("framereceived", self._count_images))
        page.goto(f"http://{_HOST}:{port}", wait_until="domcontentloaded")
        self.wait_until(lambda: self.images_received > 0 and max(self.resolution()) > 0, "a first picture")

    def _count_images(self, payload: bytes | str) -> None:
        if isinstance(payload, bytes) and b"BackgroundImage" in payload:
            self.images_received += 1

    def wait_until(self, condition: Callable[[], bool], what: str | Callable[[], str], pause: float = 0.5) -> None:
        """As the function; the page's events are heard meanwhile."""

        def is_true() -> bool:
            self.check()
            return condition()

        wait_until(is_true, what, pause=pause, sleep=lambda seconds: self.page.wait_for_timeout(1e3 * seconds))

    def canvas(self) -> dict[str, float]:
        """Where the scene is drawn: x, y, width and height in pixels of the page."""
        box = self.page.locator("canvas").last.bounding_box()
        assert box is not None, "the page shows no canvas"
        return {"x": box["x"], "y": box["y"], "width": box["width"], "height": box["height"]}

    def picture(self) -> np.ndarray:
        """The middle of what the canvas shows, [height, width, 3] uint8; the axes in its corner are left out."""
        box = self.canvas()
        clip = {
            "x": box["x"] + 0.1 * box["width"],
            "y": box["y"] + 0.1 * box["height"],
            "width": 0.8 * box["width"],
            "height": 0.7 * box["height"],
        }
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB"))

    def limit_resolution(self, pixels: int) -> None:
        """Set the viewer's "Max res", for all its browsers."""
        number = self.row("Max res").last
        number.fill(str(pixels))
        number.press("Enter")
        self._full = pixels

    def settle(self) -> np.ndarray:
        """Wait for a picture in full resolution that stays as it is, and return it."""
        pictures = [self.picture()]

        def change() -> float:
            pictures[:] = [pictures[-1], self.picture()]
            return difference(*pictures)

        self.wait_until(
            lambda: max(self.resolution()) == self._full and change() < 1.0,
            lambda: f"a settled picture of {self._full} pixels, not {self.resolution()}, changing by {change():.2f}",
            pause=1.0,
        )
        return pictures[-1]

    def save(self, path: Path) -> None:
        """Save the whole page as a picture, the panel from its top."""
        box = self.canvas()
        self.page.mouse.move(box["x"] + 20, box["y"] + 20)
        self.page.get_by_role("button", name="Pause Training").scroll_into_view_if_needed()
        self.page.wait_for_timeout(500)  # for hints to fade
        self.page.screenshot(path=path)

    def drag(self, right: float, down: float) -> None:
        """Move the camera with the mouse by pixels of the page, and wait until another picture has come for it."""
        before, received = self.picture(), self.images_received
        self.start_drag(right, down)
        self.page.mouse.up()
        self.wait_until(
            lambda: self.images_received > received and difference(before, self.picture()) > CHANGED,
            "the picture to follow the mouse",
        )

    def start_drag(self, right: float, down: float) -> None:
        """Press the mouse in the middle of the canvas and move it by pixels, without letting go."""
        box = self.canvas()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        mouse = self.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.move(x + right, y + down, steps=8)

    def resolution(self) -> tuple[int, int]:
        """Width and height of the newest frame, as the panel has it."""
        width, height = re.search(r"Resolution: (\d+)x(\d+)px", self.panel()).groups()
        return int(width), int(height)

    def pace(self, name: str) -> float | None:
        """Frames per second in the panel's line about `name`, or None where it has none."""
        found = re.search(rf"{name}: ([\d.e+-]+) fps \([\d.]+ m?s\)", self.panel())
        return None if found is None else float(found[1])

    def panel(self) -> str:
        """All text of the panel."""
        text = self.page.get_by_text("Resolution:").first.locator("xpath=ancestor::*[.//*[text()='Control']][1]")
        return text.inner_text()

    def row(self, label: str, folder: str | None = None) -> Locator:
        """The inputs of the panel that stand beside `label`, in the folder of that title where several share it."""
        within = self.page if folder is None else self.page.locator(f"xpath=//*[text()='{folder}']/..")
        return within.get_by_text(label, exact=True).locator("xpath=ancestor::*[.//input][1]").locator("input")


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two pictures in steps of 8-bit color, blind to how finely the page draws them."""
    small = [
        np.asarray(Image.fromarray(picture).resize((64, 48), Image.Resampling.BOX), float) for picture in (one, other)
    ]
    return float(np.abs(small[0] - small[1]).mean())


def wait_until(
    condition: Callable[[], bool],
    what: str | Callable[[], str],
    seconds: float = PATIENCE,
    pause: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Poll a condition.

    Raises:
        AssertionError: if `condition` is not true within `seconds`; it tells what was waited for.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(
                f"waited {seconds:.0f} s without success for {what if isinstance(what, str) else what()}"
            )
        sleep(pause)
