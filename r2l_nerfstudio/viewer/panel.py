"""A line in the viewer's panel that says how fast the student draws."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nerfstudio.viewer.viewer_elements import ViewerControl

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer

SECONDS_BETWEEN_UPDATES = 0.25


class FrameTime:
    """Seconds and size of the newest frame; written by render threads, read by the panel."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.size = (0, 0)

    @contextmanager
    def measure(self, height: int, width: int) -> Iterator[None]:
        """Time a frame. A frame that is interrupted leaves the one before it standing."""
        start = time.perf_counter()
        yield
        self.seconds, self.size = time.perf_counter() - start, (height, width)

    def describe(self) -> str:
        """One line of Markdown."""
        if self.seconds <= 0:
            return "**Student**: no frame yet"
        height, width = self.size
        return f"**Student**: {1 / self.seconds:.1f} fps ({1e3 * self.seconds:.0f} ms at {width}x{height})"


class ViewerPanel(ViewerControl):
    """Sets the viewer up for a student: no depth compositing, a line of speed.

    Args:
        frame_time: what the line shows.
    """

    def __init__(self, frame_time: FrameTime) -> None:
        self.frame_time = frame_time

    def _setup(self, viewer: Viewer) -> None:
        """Called once by Nerfstudio's viewer, before the first frame."""
        super()._setup(viewer)
        # Compositing sends a depth image with every frame, which takes longer than a student's own work.
        compositing = getattr(viewer.control_panel, "_layer_depth", None)
        if compositing is not None:
            compositing.value = False
        line = viewer.viser_server.gui.add_markdown(self.frame_time.describe())
        # Updated beside the render threads: those can be interrupted at any line.
        threading.Thread(target=self._keep_updated, args=(line,), daemon=True).start()

    def _keep_updated(self, line) -> None:
        shown = ""
        while True:
            text = self.frame_time.describe()
            if text != shown:
                line.content = shown = text
            time.sleep(SECONDS_BETWEEN_UPDATES)
