"""The learning curve of a student on a real capture, in slices that can be run one at a time."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.distil import CAPTURES, measure
from benchmarks.figures import RESULTS
from r2l_nerfstudio.checkpoints import read_checkpoint
from r2l_nerfstudio.distillation.learning_curve import HELD_OUT
from r2l_nerfstudio.engines.cache import device_name
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.lpips import without_lpips
from r2l_nerfstudio.scripts.contact_sheet import contact_sheet

CaptureName = Literal["lego", "fern", "fox"]
PUBLISHED = {"r2l": {"lego": 32.53, "fern": 26.87}}
"""PSNR in dB on test views as the papers' code reports it for single captures; R2L's teachers have 31.42 on lego, and
26.86 on fern."""
MARK = HELD_OUT
STEPS_PER_EVAL = {"cuda": 500, "cpu": 20}
"""Iterations between measurements on the held-out views."""


@dataclass
class Curve:
    """Train a student for a number of minutes and plot its PSNR on held-out views over time. Run it again to continue
    where a slice, or an interruption, ended; the final figures on test views are measured once, at the end."""

    capture: CaptureName
    """Which capture."""
    data_dir: Path
    """Folder that holds lego_400, fern_504, fox_540."""
    teacher: Path | None = None
    """A trained teacher; without it, a nerfacto with Nerfstudio's defaults is trained first."""
    teacher_iterations: int = 30_000
    """Iterations of that nerfacto; the default is Nerfstudio's."""
    method: str = "r2l"
    """The student's method, as for ns-train."""
    minutes: float = 25.0
    """Total minutes of the student's training, including teacher views."""
    slice_minutes: float | None = None
    """Stop this call after this many minutes, with everything saved."""
    rays: int | None = None
    """Pixels per iteration of the student; by default the method's own."""
    scale: float = 1.0
    """Resolution, as a share of the capture's."""
    test_views: int = 25
    """Maximum number of test views, evenly spaced, for the final figures."""
    cache_dir: Path | None = None
    """Folder for teacher views, so that later slices do not render them again."""
    output_dir: Path = Path("outputs/curve")
    """Folder of all runs."""
    results_dir: Path = RESULTS
    """Folder of the figures."""

    def main(self) -> None:
        """Run a slice; write `curve_CAPTURE_METHOD.{json,png}`, and at the end `curve_CAPTURE_METHOD_views.png`."""
        from nerfstudio.configs.method_configs import all_methods
        from nerfstudio.scripts.train import main

        teacher = self.teacher or self.train_teacher()
        config = copy.deepcopy(all_methods[self.method])
        config.teacher = teacher
        config.output_dir = self.output_dir
        config.experiment_name = self.capture
        config.timestamp = "curve"
        config.max_minutes = self.minutes
        config.vis = "tensorboard"
        config.viewer.quit_on_train_completion = True
        config.steps_per_save = 250
        device = config.machine.device_type if torch.cuda.is_available() else "cpu"
        config.pipeline.steps_per_eval_held_out = STEPS_PER_EVAL[device]
        config.pipeline.datamanager.cache_dir = self.cache_dir
        if self.rays is not None:
            config.pipeline.datamanager.train_num_rays_per_batch = self.rays
        folder = config.get_base_dir()
        figures_file = self.results_dir / f"curve_{self.capture}_{self.method}.json"
        if figures_file.exists() and "student_psnr" in json.loads(figures_file.read_text()):
            raise InputError(f"{figures_file} is a finished curve: give another --results-dir, or delete it.")
        if any((folder / "nerfstudio_models").glob("*.ckpt")):
            config.load_dir = folder / "nerfstudio_models"
        end = threading.Timer(60 * (self.slice_minutes or math.inf), os.kill, (os.getpid(), signal.SIGINT))
        if self.slice_minutes is not None:
            end.start()
        try:
            main(config)
        finally:
            end.cancel()
        newest = max((folder / "nerfstudio_models").glob("*.ckpt"), default=None)
        if newest is None:
            raise InputError(
                f"The training stopped before its first checkpoint in {folder}: --slice-minutes counts the time to load the"
                f" teacher and render its views too, so give more than {self.slice_minutes}."
            )
        done = float(read_checkpoint(newest, "student").pipeline["done"])
        figures: dict[str, Any] = {
            "capture": self.capture,
            "method": self.method,
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "minutes": self.minutes,
            "rays_per_iteration": config.pipeline.datamanager.train_num_rays_per_batch,
            "published_test_psnr": PUBLISHED.get(self.method, {}).get(self.capture),
            "curve": read_curve(folder, self.minutes),
        }
        self.results_dir.mkdir(parents=True, exist_ok=True)
        if done >= 1.0:
            measured, rows = measure(folder / "config.yml", teacher, self.test_views)
            figures |= measured
            sheet = contact_sheet(rows, ["teacher", "student", "difference x4"])
            sheet.save(figures_file.with_name(f"{figures_file.stem}_views.png"))
        figures_file.write_text(json.dumps(figures, indent=1) + "\n")
        draw(figures, figures_file.with_suffix(".png"))
        CONSOLE.print(
            f"{done:.0%} of {self.minutes:g} minutes are trained. Written: {figures_file}, .png", markup=False
        )

    def train_teacher(self) -> Path:
        """Train a nerfacto of default size, or find the one of an earlier call; return its config.yml."""
        from nerfstudio.configs.method_configs import all_methods
        from nerfstudio.scripts.train import main

        capture = CAPTURES[self.capture]
        config: TrainerConfig = copy.deepcopy(all_methods["nerfacto"])
        config.output_dir, config.experiment_name, config.timestamp = self.output_dir, self.capture, "curve"
        config.max_num_iterations = self.teacher_iterations
        config.vis = "tensorboard"
        config.viewer.quit_on_train_completion = True
        config.pipeline.datamanager.dataparser = capture.dataparser(self.data_dir / capture.folder)
        config.pipeline.datamanager.camera_res_scale_factor = self.scale
        if capture.object_range is not None:
            near, far = capture.object_range
            model = config.pipeline.model
            model.near_plane, model.far_plane, model.background_color = near, far, "white"
            model.disable_scene_contraction = True
            model.camera_optimizer.mode = "off"
            # As Nerfstudio's documentation has it for Blender's captures; with an average appearance, colors turned gray.
            model.use_average_appearance_embedding = False
            model.proposal_initial_sampler, model.distortion_loss_mult = "uniform", 0.0
        path = config.get_base_dir() / "config.yml"
        if not any(config.get_checkpoint_dir().glob(f"*{config.max_num_iterations - 1:09d}.ckpt")):
            with without_lpips():
                main(config)
        return path


def read_curve(folder: Path, minutes: float) -> list[dict[str, float]]:
    """Return the measurements on held-out views from a run's TensorBoard log: minutes of training, PSNR in dB.

    Args:
        folder: folder of the run.
        minutes: length of the whole training.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, dict[str, float]] = {}
    for log in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if not tag.startswith(MARK) and tag != "Training done":
                continue
            for event in events.Scalars(tag):
                point = found.setdefault(event.step, {"step": event.step})
                if tag == "Training done":
                    point["minutes"] = round(event.value * minutes, 3)
                else:
                    point["photos" if "photo" in tag else "teacher_views"] = round(event.value, 3)
    return [found[step] for step in sorted(found)]


def draw(figures: dict[str, Any], file: Path) -> None:
    """Plot the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for kind, label in (("teacher_views", "held-out teacher views"), ("photos", "held-out photos")):
        points = [point for point in figures["curve"] if kind in point]
        axis.plot([point["minutes"] for point in points], [point[kind] for point in points], label=label)
    if figures["published_test_psnr"] is not None:
        axis.axhline(figures["published_test_psnr"], ls=":", color="gray", label="published, test views, days")
    axis.set(xlabel="minutes, teacher views included", ylabel="dB", title=f"{figures['capture']}, {figures['method']}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=110)
