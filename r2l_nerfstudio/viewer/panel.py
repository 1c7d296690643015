"""Frame times of student and teacher in the viewer's panel."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from nerfstudio.viewer.viewer_elements import ViewerControl

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer
    from viser import GuiMarkdownHandle

SECONDS_BETWEEN_UPDATES = 0.25


class FrameTime:
    """Time and size of the newest frame; written by render threads, read by the panel.

    There are no locks: the viewer may interrupt a render thread at any line, and a lock would stay locked.
    """

    def __init__(self) -> None:
        self._newest: tuple[float, int, int] | None = None
        self._newest_network: float | None = None
        # One thread per browser: each adds up its own frame.
        self._frame = threading.local()

    @contextmanager
    def measure(self, height: int, width: int) -> Iterator[None]:
        """Time a frame of this size. An interrupted frame leaves the previous measurement in place."""
        self._frame.network, self._frame.events = None, []
        start = time.perf_counter()
        yield
        self._newest = (_now() - start, height, width)
        self._newest_network = self._network_seconds()

    @contextmanager
    def network(self) -> Iterator[None]:
        """Time the network's share of the current thread's frame; may be used several times per frame.

        On a GPU by events, which nothing waits for before the frame is drawn. NOT VERIFIED on a GPU.
        """
        if torch.cuda.is_initialized():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            getattr(self._frame, "events", []).append(events)
            return
        start = time.perf_counter()
        yield
        self._frame.network = (getattr(self._frame, "network", None) or 0.0) + time.perf_counter() - start

    def _network_seconds(self) -> float | None:
        """The network's share of this thread's frame, which is drawn; None where the network was not called."""
        if not self._frame.events:
            return self._frame.network
        return sum(1e-3 * first.elapsed_time(last) for first, last in self._frame.events)

    @property
    def newest(self) -> tuple[float, int, int] | None:
        """Seconds, height and width of the newest frame, another object after each; None before the first one."""
        return self._newest

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the newest frame in pixels; None before the first one."""
        return None if self._newest is None else self._newest[1:]

    def seconds(self, height: int, width: int) -> float | None:
        """Return the time in seconds of a frame of this size, scaled from the newest one; None before the first one."""
        if self._newest is None:
            return None
        taken, newest_height, newest_width = self._newest
        return taken * (height * width) / max(newest_height * newest_width, 1)

    def describe(self, name: str, size: tuple[int, int] | None = None) -> str:
        """Return one line of Markdown on the speed of `name`, for frames of a (height, width), by default the newest
        one's."""
        size = size or self.size
        seconds = None if size is None else self.seconds(*size)
        if not seconds:
            return f"**{name}**: no frame yet"
        taken = f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
        # The frame's size is in the line above; together they would not fit into one line.
        return f"**{name}**: {1 / seconds:.3g} fps ({taken})"

    def describe_network(self, engine: str) -> str:
        """Return one line of Markdown on the network's share of the newest frame; empty before the first one.

        Args:
            engine: name of the engine that ran it.
        """
        if self._newest_network is None:
            return ""
        return f"Network: {1e3 * self._newest_network:.3g} ms, {engine}"


class _RenderThreads(dict):
    """Nerfstudio's render threads by browser, with an inert one for each browser that has disconnected.

    Nerfstudio looks them up for every camera message, and one may arrive after its browser was closed. The KeyError
    would be raised inside viser's `atomic`, which then never releases its lock: no browser would get another frame.
    """

    def __missing__(self, client_id: int) -> SimpleNamespace:
        return SimpleNamespace(action=lambda action: None, running=False)


class ViewerPanel(ViewerControl):
    """Set up the viewer for a student: no depth compositing, a line on speed, and no crash when a browser is closed.

    Args:
        frame_time: measurements that the line shows.
    """

    def __init__(self, frame_time: FrameTime) -> None:
        self.frame_time = frame_time

    def _setup(self, viewer: Viewer) -> None:
        """Set up the control; Nerfstudio's viewer calls this once, before the first frame."""
        super()._setup(viewer)
        self._outlive_browsers(viewer)
        # Compositing sends a depth image with every frame, which takes longer than rendering a student.
        compositing = getattr(viewer.control_panel, "_layer_depth", None)
        if compositing is not None:
            compositing.value = False
            # Without depth to composite, ticking the box would end the render thread.
            compositing.set_disabled(not getattr(viewer.get_model(), "has_depth", True))
        # Directly below Nerfstudio's step and resolution; by default it would be at the very end of the panel.
        order = getattr(getattr(viewer, "stats_markdown", None), "order", None)
        text = self._text()
        line = viewer.viser_server.gui.add_markdown(text, order=None if order is None else order + 0.5)
        # Updated from another thread than the render threads, which can be interrupted at any line.
        threading.Thread(target=self._keep_updated, args=(line, text), daemon=True).start()

    def _outlive_browsers(self, viewer: Viewer) -> None:
        threads = getattr(viewer, "render_statemachines", None)
        if isinstance(threads, dict):
            viewer.render_statemachines = _RenderThreads(threads)
            viewer.render_statemachines.update(threads)  # a browser may have come in between
        # Filled after this; until then "Hide Train Cams" fails like a closed browser.
        if not hasattr(viewer, "camera_handles"):
            viewer.camera_handles = {}

    def _text(self) -> str:
        model = self.viewer.get_model()
        lines = [self.frame_time.describe("Student")]
        menu = getattr(model, "engine_menu", None)
        if menu is not None:
            lines.append(self.frame_time.describe_network(menu.describe()))
        split = getattr(model, "teacher_split", None)
        if split is not None:
            lines.append(split.describe(self.frame_time.size))
        return "  \n".join(filter(None, lines))

    def _keep_updated(self, line: GuiMarkdownHandle, shown: str) -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_UPDATES)
            text = self._text()
            if text != shown:
                line.content = shown = text


def _now() -> float:
    """Return the time in seconds at the end of this thread's work on the GPU: a launched frame is not yet rendered."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return time.perf_counter()
