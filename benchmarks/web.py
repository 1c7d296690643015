"""Size of a student's web page, frame times on the CPU in a browser, and its PSNR against PyTorch."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.figures import RESULTS, results_stem, write_figures
from benchmarks.render import fill_ball
from benchmarks.render import student as random_student
from benchmarks.web_page import CANVAS, ELEMENT, browser, canvas_image, served, state
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, look_along
from r2l_nerfstudio.engines.cache import device_name
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.navigation import start_pose
from r2l_nerfstudio.export.training_cameras import training_cameras
from r2l_nerfstudio.export.web_folder import FALLBACK, RUNTIME, SCENE, UNREAD, PageOptions, export_web
from r2l_nerfstudio.export.web_runtime import FILES, VERSION, fetch_runtime
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.student import Student, load_student

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

METHODS = ("mobile-r2l", "mobile-r2l-lite")
PUBLISHED = (
    ("MobileNeRF", "125.8", "201.5"),
    ("SNeRG", "86.8", "337.3"),
    ("MobileR2L", "8.3", "8.3"),
)
"""Megabytes on disk for a synthetic and a forward-facing scene, from MobileR2L's paper (table 3)."""
PATIENCE_MS = 600_000.0
FEWEST = 2
"""Least number of timed frames; the page's first one is not timed."""
MOST = 30
_FIELD_OF_VIEW = 0.6
_RADIUS = 4.0


@dataclass
class Web:
    """Bytes of every file of a web export, milliseconds of a frame in headless Chromium (WebAssembly), and PSNR of the
    page's canvas against PyTorch. Sizes and times do not depend on the weights, which are random."""

    methods: tuple[str, ...] = METHODS
    """Methods to measure, of those that read ray images."""
    sizes: tuple[int, ...] = (200, 400, 800)
    """Pixels along each side of the frame."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of WebAssembly threads; as many cores are needed."""
    seconds: float = 4.0
    """Seconds of rendering per figure, at least two frames and at most thirty; the fastest and the median are reported."""
    load_config: Path | None = None
    """A trained student to compare with PyTorch; if not given, that table is left out."""
    data: Path | None = None
    """The capture's location, if it has moved since training."""
    poses: int = 10
    """Number of views of the comparison, spread evenly over the allowed region."""
    runtime: Path | None = None
    """The npm package onnxruntime-web as a .tgz file; by default npm downloads it once."""
    results_dir: Path = RESULTS
    """Folder for the figures."""

    def main(self) -> None:
        """Measure and write `web_DEVICE.{json,md}`."""
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise InputError(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}.")
        cores = os.cpu_count() or 1
        if max(self.threads) > cores:
            raise InputError(f"--threads {max(self.threads)}: this machine has {cores} cores; choose no more.")
        runtime = fetch_runtime(self.runtime)
        name = device_name(torch.device("cpu"))
        stem = results_stem(self.results_dir, "web", name)
        with browser("--disable-gpu") as chromium, tempfile.TemporaryDirectory() as scratch:
            figures: dict[str, Any] = {
                "device": name,
                "browser": f"headless Chromium {chromium.version}",
                "runtime": f"onnxruntime-web {VERSION}, wasm",
                "load_average_at_start": round(os.getloadavg()[0], 2),
                "frames": [],
            }
            if self.load_config is not None:
                figures["trained"] = self._compare(chromium, runtime, Path(scratch) / "trained")
            for method in self.methods:
                for side in self.sizes:
                    folder = Path(scratch) / f"{method}-{side}"
                    figures["frames"].append(self._frame(chromium, runtime, folder, method, side))
                    write_figures(stem, figures, as_markdown(figures))
        CONSOLE.print(as_markdown(figures), markup=False, highlight=False, soft_wrap=True)
        CONSOLE.print(f"Written: {stem}.json, .md")

    def _frame(self, chromium: Browser, runtime: Path, folder: Path, method: str, side: int) -> dict[str, Any]:
        CONSOLE.print(f"{method}, {side}x{side} …")
        model, _ = random_student(method, side, torch.device("cpu"))
        # Not bounded, so that every cell is evaluated.
        bounds = SceneBounds("near-far", (0.0, 0.0, 0.0), 1.0, 2.0, 6.0)
        focal = side / _FIELD_OF_VIEW
        model.set_scene(bounds, torch.eye(3), torch.ones(3), has_accumulation=True, has_depth=True, focal=focal)
        fill_ball(model)
        with model.network_run_by(lambda encoded: model.network(encoded)):  # builds no engine during the measurement
            made = export_web(
                Student(model, method), ring_of_cameras(side, focal), runtime, folder, PageOptions(method)
            )
        taken = {}
        for count in self.threads:
            with visited(chromium, folder, f"?backend=wasm&threads={count}", side) as page:
                taken[str(count)] = self._time(page, side, count)
        return {
            "method": method,
            "frame": f"{side}x{side}",
            "factor": model.factor,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "weights": "random",
            "bytes": made.bytes,
            "milliseconds": taken,
        }

    def _time(self, page: Page, side: int, count: int) -> dict[str, float]:
        found = state(page)
        if found["backend"] != f"WebAssembly, {count} thread{'s' * (count > 1)}":
            raise InputError(
                f"Chromium renders with {found['backend']}, not with {count} threads: choose other --threads."
            )
        size = page.evaluate(f"[{CANVAS}.width, {CANVAS}.height]")
        if size != [side, side]:
            raise InputError(
                f"The page rendered {size[0]}x{size[1]} pixels, not {side}x{side}: this is a bug of the page."
            )
        taken: list[float] = []
        end = time.monotonic() + self.seconds
        while len(taken) < FEWEST or (len(taken) < MOST and time.monotonic() < end):
            move(page, {"azimuth": 1.5 * (len(taken) % 2) + 1.0})
            taken.append(float(state(page)["milliseconds"]))
        return {"fastest": round(min(taken), 1), "median": round(statistics.median(taken), 1), "frames": len(taken)}

    def _compare(self, chromium: Browser, runtime: Path, folder: Path) -> dict[str, Any]:
        student = load_student(self.load_config, device="cpu", engine="torch")
        cameras = training_cameras(self.load_config, self.data)
        made = export_web(student, cameras, runtime, folder, PageOptions(student.method_name))
        scene = json.loads((folder / SCENE).read_text())
        picture = scene["picture"]
        across, down, focal = picture["width"], picture["height"], picture["focal"]
        side = round(math.sqrt(across * down))
        found = []
        with visited(chromium, folder, f"?backend=wasm&size={side}", across, down) as page:
            for number in range(self.poses):
                move(page, wanted_view(scene["view"], number))
                canvas = torch.from_numpy(canvas_image(page))
                height, width = canvas.shape[:2]
                share = height / down if not student.model.reads_ray_image else 1.0
                pose = start_pose(shown_view(scene["view"], state(page)["view"]))
                intrinsics = [focal * share, focal * share, width / 2, height / 2]
                truth = torch.from_numpy(student.render(pose.numpy(), intrinsics, width, height))
                found.append(psnr(canvas, truth.clamp(0, 1)))
        return {
            "method": student.method_name,
            "picture": f"{across}x{down}",
            "backend": "wasm",
            "poses": self.poses,
            "psnr_lowest": round(min(found), 2),
            "psnr_mean": round(sum(found) / len(found), 2),
            "bytes": made.bytes,
        }


def ring_of_cameras(side: int, focal: float) -> CaptureCameras:
    """Return a dozen cameras around the origin, with square images."""
    angles = torch.linspace(0, 2 * math.pi, 13)[:-1]
    outwards = torch.stack([angles.cos(), angles.sin(), torch.full_like(angles, 0.3)], dim=-1)
    rotations = torch.stack([look_along(-axis, torch.tensor([0.0, 0.0, 1.0])) for axis in outwards])
    poses = torch.cat([rotations, _RADIUS * outwards[..., None]], dim=-1)
    intrinsics = torch.tensor([[focal, focal, side / 2, side / 2]]).expand(len(poses), 4)
    return CaptureCameras(poses, intrinsics, side, side)


@contextmanager
def visited(chromium: Browser, folder: Path, query: str, width: int, height: int | None = None) -> Iterator[Page]:
    """Open the page of a folder and wait for its final image."""
    with served(folder) as address:
        # Waiting runs scripts in the page, which its Content-Security-Policy forbids.
        page = chromium.new_page(viewport={"width": width, "height": height or width}, bypass_csp=True)
        try:
            page.set_default_timeout(PATIENCE_MS)
            page.goto(f"{address}{query}")
            settle(page)
            yield page
        finally:
            page.close()


def settle(page: Page) -> None:
    """Wait until the image has its final resolution.

    Raises:
        InputError: if the page shows an error.
    """
    page.wait_for_function(f"['resting', 'failed'].includes({ELEMENT}.dataset.state)")
    if state(page)["state"] == "failed":
        raise InputError(f"The page shows an error: {page.locator('#message').inner_text()}")


def move(page: Page, view: dict[str, float]) -> None:
    """Set a view in the address, and wait for its image."""
    before = int(state(page)["frames"])
    page.evaluate("hash => { location.hash = hash }", "&".join(f"{key}={value:.4f}" for key, value in view.items()))
    page.wait_for_function(f"{ELEMENT}.dataset.frames > {before}")
    settle(page)


def wanted_view(limits: dict[str, Any], number: int) -> dict[str, float]:
    """Return one of many views, spread evenly over a page's region, as options of its address."""
    shares = [(0.5 + (number + 1) * step) % 1 for step in (0.7548776662, 0.5698402910, 0.3819660113)]
    low, high = limits["azimuth"] or [limits["start"]["azimuth"] - math.pi, limits["start"]["azimuth"] + math.pi]
    down, up = limits["elevation"]
    view = {
        "azimuth": math.degrees(low + (high - low) * shares[0]),
        "elevation": math.degrees(down + (up - down) * shares[1]),
    }
    if limits["kind"] == "orbit":
        near, far = limits["distance"]
        view["distance"] = near + (far - near) * shares[2]
    return view


def shown_view(limits: dict[str, Any], address: str) -> dict[str, Any]:
    """Return a page's region with the start at the view that the page shows."""
    shown = {key: float(value) for key, value in (part.split("=") for part in address.split("&"))}
    start = {"azimuth": math.radians(shown["azimuth"]), "elevation": math.radians(shown["elevation"])}
    if "distance" in shown:
        start["distance"] = shown["distance"]
    return {**limits, "start": {**limits["start"], **start}}


def loaded_bytes(files: dict[str, int], backend: Literal["webgpu", "wasm"]) -> int:
    """Return the bytes that a visitor loads: page and student, and without WebGPU the runtime."""
    page = sum(size for name, size in files.items() if "/" not in name and name not in (*UNREAD, FALLBACK))
    if backend == "webgpu":
        return page
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    runtime = [f"{RUNTIME}/{name}" for name in FILES]
    return page - weights + sum(files[name] for name in [*runtime, FALLBACK, "worker.js"])


def as_markdown(figures: dict[str, Any]) -> str:
    """Return the figures as tables."""
    lines = [
        f"# The web page on {figures['device']}",
        "",
        f"`python -m benchmarks web`, {figures['browser']}, {figures['runtime']}; load average"
        f" {figures['load_average_at_start']} at the start. Weights are random unless noted, which changes neither sizes"
        " nor times.",
        "",
    ]
    counts = list(figures["frames"][0]["milliseconds"]) if figures["frames"] else []
    if counts:
        lines += [
            "## Milliseconds of a frame, fastest (median)",
            "",
            "| student | frame | " + " | ".join(f"{count} thread{'s' * (count != '1')}" for count in counts) + " |",
            "|---|---|" + "---|" * len(counts),
        ]
    for row in figures["frames"]:
        taken = " | ".join(f"{found['fastest']:g} ({found['median']:g})" for found in row["milliseconds"].values())
        lines.append(f"| `{row['method']}` | {row['frame']}, factor {row['factor']} | {taken} |")
    if figures["frames"]:
        lines += [
            "",
            "## Megabytes of a scene",
            "",
            "| | synthetic | forward-facing |",
            "|---|---|---|",
            *(f"| {name} (published) | {synthetic} | {facing} |" for name, synthetic, facing in PUBLISHED),
        ]
    for row in figures["frames"]:
        size = row["bytes"]["student.fp16.safetensors"] / 1e6
        lines.append(f"| `{row['method']}`, {row['frame']}: student.fp16.safetensors | {size:.1f} | {size:.1f} |")
    for row in figures["frames"]:
        files = row["bytes"]
        lines += [
            "",
            f"## Bytes of the folder: {row['method']}, {row['frame']}",
            "",
            f"A visitor loads {loaded_bytes(files, 'webgpu') / 1e6:.2f} MB where there is WebGPU, and"
            f" {loaded_bytes(files, 'wasm') / 1e6:.1f} MB with WebAssembly; the whole folder has"
            f" {sum(files.values()) / 1e6:.1f} MB.",
            "",
            "| file | bytes |",
            "|---|---|",
            *(f"| {name} | {size} |" for name, size in files.items()),
        ]
    if "trained" in figures:
        found = figures["trained"]
        lines += [
            "",
            "## The canvas against torch",
            "",
            f"A trained `{found['method']}`, {found['picture']} pixels, {found['poses']} poses over where a visitor may"
            f" go, on WebAssembly: {found['psnr_lowest']} dB at the worst, {found['psnr_mean']} dB on average (rounding"
            " to 8 bits leaves 59).",
        ]
    return "\n".join(lines) + "\n"
