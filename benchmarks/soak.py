"""Render at ever new sizes for a long time, and measure memory, threads and open files.

    python -m benchmarks soak RUN --minutes 30

Each engine renders in its own process, and so does the viewer, which two browser tabs move, resize and reconnect to. All of
them run at once.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import tyro
from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.web import browser
from r2l_nerfstudio.engines.protocol import EngineName
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.process_memory import limit_caches, return_freed_memory
from r2l_nerfstudio.run_config import resolve_run
from r2l_nerfstudio.student import load_student

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIDES = (48, 512)
"""Least and most pixels along each side of a frame."""
MOST_GROWTH = 0.05
"""Of the memory after the settling time: what may come on top and still count as flat."""
_WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
_SECONDS_BETWEEN_SAMPLES = 0.5
_MOVES_PER_PAGE = 12


@dataclass(frozen=True)
class Sample:
    """State of a process."""

    seconds: float
    """Since its first frame."""
    megabytes: float
    """Resident memory."""
    threads: int
    descriptors: int


@dataclass(frozen=True)
class Growth:
    """What became of a process that rendered for long."""

    name: str
    frames: int
    """Rendered by an engine; sent to the browser's tabs by the viewer."""
    settled: Sample
    """Medians of the samples of the first quarter after the settling time."""
    last: Sample
    """Medians of those of the last quarter."""

    @property
    def growth(self) -> float:
        """Of the memory, as a share."""
        return self.last.megabytes / self.settled.megabytes - 1

    @property
    def is_flat(self) -> bool:
        """Whether nothing grew."""
        return (
            self.growth <= MOST_GROWTH
            and self.last.threads <= self.settled.threads + 1
            and self.last.descriptors <= self.settled.descriptors + 2
        )


@dataclass
class Soak:
    """Memory, threads and open files of every engine and of r2l-view over a long time, at ever new image sizes."""

    run: tyro.conf.Positional[Path]
    """The student's run: its config.yml, or its folder."""
    minutes: float = 30.0
    """How long; everything runs at once."""
    settle_minutes: float = 2.0
    """Growth before this time does not count: libraries load, caches fill."""
    engines: tuple[EngineName, ...] = ("torch", "inductor", "openvino", "onnxruntime")
    """Engines to render with."""
    viewer: bool = True
    """Watch r2l-view too, through Chromium."""
    results_dir: Path = Path("benchmarks/results")
    """Where figures go."""

    def main(self) -> None:
        """Measure and write `soak.{json,md}`.

        Raises:
            InputError: the run cannot be read, or a time makes no sense.
            SystemExit: with code 1, if something grew.
        """
        if not 0 <= self.settle_minutes < self.minutes:
            raise InputError(f"--settle-minutes must be between 0 and --minutes (got {self.settle_minutes:g}).")
        run = resolve_run(self.run)
        seconds, settle = 60 * self.minutes, 60 * self.settle_minutes
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max(1, len(self.engines)), mp_context=spawn) as pool:
            jobs = {name: pool.submit(render, run, name, seconds) for name in self.engines}
            found = [watch_viewer(run, seconds, settle)] if self.viewer else []
            found = [judge(name, *job.result(), settle) for name, job in jobs.items()] + found
        load = os.getloadavg()[0]
        self.results_dir.mkdir(parents=True, exist_ok=True)
        text = as_markdown(found, self.minutes, self.settle_minutes, load)
        figures = {"minutes": self.minutes, "load_average": round(load, 1), "growth": [asdict(each) for each in found]}
        (self.results_dir / "soak.json").write_text(json.dumps(figures, indent=2) + "\n")
        (self.results_dir / "soak.md").write_text(text)
        CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)
        if not all(each.is_flat for each in found):
            raise SystemExit(1)


def render(
    run: Path,
    engine: EngineName,
    seconds: float,
    frames: int = sys.maxsize,
    between_samples: float = _SECONDS_BETWEEN_SAMPLES,
) -> tuple[list[Sample], int]:
    """Render frames of random sizes, poses and focal lengths in this process, which returns memory as r2l-view does.

    Args:
        run: the student's.
        engine: that renders.
        seconds: how long.
        frames: how many at most.
        between_samples: seconds.

    Returns:
        samples of this process, and the number of frames.
    """
    limit_caches()
    draw = random.Random(0)
    student = load_student(run, device="cpu", engine=engine)
    center = student.model.ray_encoding.center.numpy()
    radius = float(student.model.ray_encoding.radius)
    samples: list[Sample] = []
    count, returned, start = 0, 0.0, time.monotonic()
    while time.monotonic() - start < seconds and count < frames:
        width, height = draw.randint(*SIDES), draw.randint(*SIDES)
        pose = np.eye(4)[:3]
        pose[:, 3] = center + [0.0, 0.0, draw.uniform(2.0, 4.0) * radius]
        focal = draw.uniform(0.7, 2.0) * max(width, height)
        student.render(pose, [focal, focal, width / 2, height / 2], width, height)
        count += 1
        now = time.monotonic() - start
        if now - returned > 1.0:
            returned = now
            return_freed_memory()
        if not samples or now - samples[-1].seconds > between_samples:
            samples.append(sample(psutil.Process(), now))
    return samples, count


def sample(process: psutil.Process, seconds: float) -> Sample:
    """Measure a process."""
    return Sample(seconds, process.memory_info().rss / 1e6, process.num_threads(), process.num_fds())


def watch_viewer(run: Path, seconds: float, settle: float) -> Growth:
    """Serve r2l-view from a process of its own, and have two browser tabs move, resize and reconnect.

    Raises:
        InputError: there is no browser, or the viewer ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(run, port), daemon=True)
    server.start()
    try:
        _wait_for(port, server)
        process, samples, done = psutil.Process(server.pid), [], threading.Event()
        start = time.monotonic()

        def keep_sampling() -> None:
            while not done.wait(_SECONDS_BETWEEN_SAMPLES):
                samples.append(sample(process, time.monotonic() - start))

        sampler = threading.Thread(target=keep_sampling, daemon=True)
        sampler.start()
        with browser(*_WEBGL) as chromium:
            frames = visit(chromium, f"http://127.0.0.1:{port}", seconds)
        done.set()
        sampler.join()
        return judge("r2l-view", samples, frames, settle)
    finally:
        server.terminate()
        server.join()


def serve(run: Path, port: int) -> None:
    """Serve r2l-view in this process until it is ended."""
    from r2l_nerfstudio.scripts.view import View

    View(run, port=port).main()


def visit(chromium: Browser, address: str, seconds: float) -> int:
    """Keep two tabs on a viewer busy: drag the camera, resize the window, and after some moves close and reopen the tab.

    Returns:
        the images that the viewer sent.
    """
    draw, frames = random.Random(0), 0

    def count(payload: bytes | str) -> None:
        nonlocal frames
        frames += isinstance(payload, bytes) and b"BackgroundImage" in payload

    @contextlib.contextmanager
    def tab() -> Iterator[Page]:
        page = chromium.new_page(viewport={"width": draw.randint(300, 1000), "height": draw.randint(300, 700)})
        page.on("websocket", lambda socket: socket.on("framereceived", count))
        page.goto(address, wait_until="domcontentloaded")
        yield page
        page.close()

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with tab() as first, tab() as second:
            for _ in range(_MOVES_PER_PAGE):
                page = draw.choice((first, second))
                size = {"width": draw.randint(300, 1000), "height": draw.randint(300, 700)}
                page.set_viewport_size(size)
                x, y = size["width"] / 3, size["height"] / 2
                page.mouse.move(x, y)
                page.mouse.down()
                page.mouse.move(x + draw.uniform(-90, 90), y + draw.uniform(-60, 60), steps=4)
                page.mouse.up()
                page.wait_for_timeout(500)
    return frames


def _wait_for(port: int, server: Any, patience: float = 300.0) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if not server.is_alive():
            raise InputError("r2l-view ended before it served anything; the reason is above.")
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise InputError(f"r2l-view did not start within {patience:.0f} s.")


def judge(name: str, samples: list[Sample], frames: int, settle: float) -> Growth:
    """Compare the first quarter of the samples after `settle` seconds with the last one."""
    later = [each for each in samples if each.seconds >= settle]
    if len(later) < 8:
        raise InputError(f"Only {len(later)} samples of {name} after {settle:.0f} s: set a longer --minutes.")
    quarter = len(later) // 4
    return Growth(name, frames, _median(later[:quarter]), _median(later[-quarter:]))


def _median(samples: list[Sample]) -> Sample:
    columns = zip(*(vars(each).values() for each in samples), strict=True)
    return Sample(*(type(column[0])(statistics.median(column)) for column in columns))


def as_markdown(found: list[Growth], minutes: float, settle: float, load: float) -> str:
    """The table, and how it was made."""
    lines = [
        f"Random image sizes of {SIDES[0]} to {SIDES[1]} pixels a side for {minutes:g} minutes, all rows at once,"
        f" load average {load:.1f} at the end. After {settle:g} minutes and at the end: medians of a quarter of the"
        " remaining time.",
        "",
        "| what | frames | MB after settling | MB at the end | growth | threads | descriptors |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        first, last = each.settled, each.last
        lines.append(
            f"| {each.name} | {each.frames} | {first.megabytes:.0f} | {last.megabytes:.0f} | {100 * each.growth:+.1f}% |"
            f" {first.threads} → {last.threads} | {first.descriptors} → {last.descriptors} |"
        )
    return "\n".join(lines) + "\n"
