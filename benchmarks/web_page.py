"""A web export in headless Chromium: serve it, open it, read its state and its canvas."""

from __future__ import annotations

import base64
import io
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.web_server import WebServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ELEMENT = "document.querySelector('light-field')"
CANVAS = f"{ELEMENT}.shadowRoot.querySelector('canvas')"


@contextmanager
def browser(*switches: str) -> Iterator[Browser]:
    """Start headless Chromium.

    Args:
        *switches: further switches of its command line.

    Raises:
        InputError: if Chromium or Playwright, which controls it, is missing.
    """
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        raise InputError("This benchmark needs Chromium, which was not found: apt install chromium.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise InputError(
            "This benchmark needs the package playwright, which is not installed: pip install playwright."
        ) from error
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", *switches])
        try:
            yield started
        finally:
            started.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as `r2l-export web --serve` does, and yield its address."""
    with WebServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


def state(page: Page) -> dict[str, str]:
    """Return the data attributes of the page's `<light-field>`."""
    return page.evaluate(f"({{...{ELEMENT}.dataset}})")


def canvas_image(page: Page) -> np.ndarray:
    """Return the canvas's pixels, (height, width, 3) fp32 in [0, 1]."""
    url = page.evaluate(f"{CANVAS}.toDataURL('image/png')")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
