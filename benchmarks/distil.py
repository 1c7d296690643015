"""Quality, speed, and size of a student beside its teacher on a real capture."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from benchmarks.figures import RESULTS, write_figures
from r2l_nerfstudio.engines.cache import device_name
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.report import measure as measurements
from r2l_nerfstudio.scripts.contact_sheet import contact_sheet
from r2l_nerfstudio.scripts.small_nerfacto import PROCEDURAL_RANGE, procedural_dataparser, small_nerfacto

UNSEEN_SEED = 31_415_926
UNSEEN_VIEWS = 8
ZOOMED_VIEWS = 3


@dataclass(frozen=True)
class Capture:
    """A capture and its teacher, small enough for two CPU cores."""

    folder: str
    dataparser: Callable[[Path], DataParserConfig]
    scale: float = 1.0
    """Resolution, as a share of the dataparser's."""
    object_range: tuple[float, float] | None = None
    optimize_cameras: bool = False


LEGO = Capture("lego_400", lambda data: BlenderDataParserConfig(data=data), 0.25, object_range=(2.0, 6.0))
CAPTURES = {
    "lego": LEGO,
    "lego-200": replace(LEGO, scale=0.5),
    "fern": Capture("fern_504", lambda data: NerfstudioDataParserConfig(data=data, downscale_factor=1), 0.25),
    "fox": Capture(
        "fox_540", lambda data: NerfstudioDataParserConfig(data=data, downscale_factor=4), optimize_cameras=True
    ),
    # Of `hard-scenes`.
    "wires": Capture("wires", procedural_dataparser, object_range=PROCEDURAL_RANGE),
    "mirrors": Capture("mirrors", procedural_dataparser, object_range=PROCEDURAL_RANGE),
}


@dataclass
class Distil:
    """Train a teacher, then a student, on a real capture and measure PSNR and SSIM on test views, PSNR against the
    teacher at unseen cameras, seconds per frame of both, and sizes. Test views are used for the final figures only."""

    capture: str
    """lego (at 100x100), lego-200 (at 200x200), fern, fox, wires or mirrors of --data-dir, or a name for the capture at
    --data."""
    data_dir: Path | None = None
    """Folder that holds lego_400, fern_504, fox_540, or what hard-scenes wrote."""
    data: Path | None = None
    """Any other capture."""
    dataparser: str = "nerfstudio-data"
    """Dataparser for --data, as `ns-train` names it: nerfstudio-data, blender-data, colmap, ..."""
    method: str = "r2l-lite"
    """The student's method, as for ns-train."""
    teacher: Path | None = None
    """A trained teacher; without it, a small nerfacto is trained."""
    teacher_iterations: int = 2500
    """Iterations of the small nerfacto."""
    iterations: int = 3000
    """Iterations of the student."""
    max_minutes: float | None = None
    """Minutes of the student's training, teacher views included; the schedule is planned for them."""
    rays: int = 4096
    """Pixels per iteration of the student."""
    num_views: int = 150
    """Teacher views in the ring."""
    view_downscale: float = 1.0
    """Downscaling factor of teacher views relative to the photos."""
    photo_iterations: int = 500
    """Length of the photo stage in iterations."""
    max_grid_points: int | None = None
    """Grid points of the student's features, at most; the method's own by default."""
    test_views: int = 25
    """At most this many test views, evenly spaced, for the final figures."""
    cache_dir: Path | None = None
    """Folder to keep teacher views in, for the next run with this teacher."""
    output_dir: Path = Path("outputs/benchmark")
    """Folder of all runs."""
    results_dir: Path = RESULTS
    """Folder of the figures."""

    def main(self) -> None:
        """Run and write `distil_CAPTURE_METHOD.{json,md,png}`."""
        teacher_config = self.teacher or self._train_teacher()
        config_path, seconds = self._train_student(teacher_config)
        figures, rows = measure(config_path, teacher_config, self.test_views)
        figures = {
            "capture": self.capture,
            "method": self.method,
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "student_iterations": self.iterations,
            "student_rays_per_iteration": self.rays,
            "ring_views": self.num_views,
            "view_downscale": self.view_downscale,
            "photo_iterations": self.photo_iterations,
            **({} if self.max_grid_points is None else {"max_grid_points": self.max_grid_points}),
            "student_minutes_in_all": round(seconds / 60, 1),
            **figures,
        }
        self.results_dir.mkdir(parents=True, exist_ok=True)
        stem = self.results_dir / f"distil_{self.capture}_{self.method}"
        write_figures(stem, figures, as_table(figures))
        contact_sheet(rows, ["teacher", "student", "difference x4"]).save(stem.with_suffix(".png"))
        CONSOLE.print(as_table(figures), markup=False)
        CONSOLE.print(f"Written: {stem}.json, .md, .png")

    def _train_teacher(self) -> Path:
        from nerfstudio.scripts.train import main

        from r2l_nerfstudio.lpips import without_lpips

        capture, data = find_capture(self.capture, self.data_dir, self.data, self.dataparser)
        config = small_nerfacto(
            capture.dataparser(data),
            self.output_dir,
            self.teacher_iterations,
            capture.object_range,
            capture.scale,
            capture.optimize_cameras,
        )
        config.experiment_name = self.capture
        with without_lpips():
            main(config)
        return config.get_base_dir() / "config.yml"

    def _train_student(self, teacher: Path) -> tuple[Path, float]:
        from nerfstudio.configs.method_configs import all_methods
        from nerfstudio.scripts.train import main

        config = copy.deepcopy(all_methods[self.method])
        config.teacher = teacher
        config.output_dir = self.output_dir
        config.experiment_name = self.capture
        config.max_num_iterations = self.iterations
        config.max_minutes = self.max_minutes
        config.steps_per_save = 500
        config.vis = "tensorboard"
        config.viewer.quit_on_train_completion = True
        datamanager = config.pipeline.datamanager
        datamanager.train_num_rays_per_batch = self.rays
        datamanager.num_views = self.num_views
        datamanager.view_downscale = self.view_downscale
        datamanager.photo_iterations = self.photo_iterations
        datamanager.cache_dir = self.cache_dir
        if self.max_grid_points is not None:
            config.pipeline.model.max_grid_points = self.max_grid_points
        start = time.perf_counter()
        main(config)
        return config.get_base_dir() / "config.yml", time.perf_counter() - start


def find_capture(name: str, data_dir: Path | None, data: Path | None, dataparser: str) -> tuple[Capture, Path]:
    """Return how to train on a capture, and its location.

    Args:
        name: one of `CAPTURES`, or any name where `data` is given.
        data_dir: folder of the captures in `CAPTURES`.
        data: another capture.
        dataparser: how `data` is read, by Nerfstudio's name.

    Raises:
        InputError: there is no such capture or dataparser.
    """
    if data is None:
        if name not in CAPTURES or data_dir is None:
            raise InputError(
                f"--capture {name} needs --data, the folder of a capture; or choose one of {', '.join(CAPTURES)} and name"
                " with --data-dir the folder that holds it."
            )
        capture, place = CAPTURES[name], data_dir / CAPTURES[name].folder
    else:
        from nerfstudio.configs.dataparser_configs import all_dataparsers

        if dataparser not in all_dataparsers:
            raise InputError(f"--dataparser must be one of {', '.join(sorted(all_dataparsers))} (got {dataparser}).")

        def configured(place: Path) -> DataParserConfig:
            config = copy.deepcopy(all_dataparsers[dataparser])
            config.data = place
            return config

        capture, place = Capture(str(data), configured, optimize_cameras=True), data
    if not place.exists():
        raise InputError(f"There is no capture at {place}: give its folder with --data, or its parent with --data-dir.")
    return capture, place


def measure(
    config_path: Path, teacher_path: Path, test_views: int
) -> tuple[dict[str, Any], list[tuple[str, list[Tensor]]]]:
    """Return all figures of a finished student, and images for its contact sheet.

    Args:
        config_path: config.yml of the student's run.
        teacher_path: config.yml of its teacher's run.
        test_views: at most this many, evenly spaced.

    Returns:
        figures, and the rows of a contact sheet: teacher, student, difference.
    """
    found = measurements.measure(config_path, teacher=teacher_path, test_views=test_views, shown_views=3)
    assert found.teacher is not None and found.unseen is not None
    rows = [
        ("", [view.teacher, view.student, (4 * (view.student - view.teacher).abs()).clamp(0, 1)])
        for view in found.shown
        if view.teacher is not None
    ]
    return {
        "resolution": f"{found.resolution[0]}x{found.resolution[1]}",
        "test_views": f"{len(found.views)} of {found.photos_in_test_split}",
        **{
            f"{who}_{metric}": rounded(found.mean(who, metric))
            for who in ("teacher", "student")
            for metric in ("psnr", "ssim", "gmsd")
        },
        "student_share_of_teacher_detail": rounded(found.detail),
        "student_psnr_against_teacher_unseen": rounded(found.unseen.mean),
        **{f"student_psnr_against_teacher_zoom_{zoom}": rounded(psnr) for zoom, psnr in found.unseen.zoom.items()},
        "student_lowest_psnr_between_sizes": rounded(found.between_sizes),
        "teacher_lowest_psnr_between_sizes": rounded(found.teacher_between_sizes),
        **{f"{who}_seconds_per_frame": rounded(ms / 1e3) for who, ms in found.frame_milliseconds.items()},
        "student_train_rays_per_second": train_rays_per_second(config_path.parent),
        "network_parameters": found.sizes["network_parameters"],
        "network_megabytes_fp16": rounded(found.sizes["network_megabytes_fp16"]),
        "flop_per_pixel": round(found.sizes["flop_per_pixel"]),
        "student_checkpoint_megabytes": rounded(found.sizes["checkpoint_megabytes"]),
        "teacher_checkpoint_megabytes": rounded(found.teacher["checkpoint_megabytes"]),
        "teacher_method": found.teacher["method"],
        "teacher_iterations": found.teacher["iterations"],
    }, rows


def rounded(value: float | None) -> float | None:
    """Round to four digits."""
    return None if value is None else round(value, 4)


def train_rays_per_second(run: Path) -> float | None:
    """Return the median of what Nerfstudio logged during training; None if there is no log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run))
    log.Reload()
    tags = [tag for tag in log.Tags()["scalars"] if tag.startswith("Train Rays / Sec")]
    if not tags:
        return None
    values = sorted(event.value for event in log.Scalars(tags[0]))
    return round(values[len(values) // 2])


def as_table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| figure | value |", "|---|---|"]
    return "\n".join(lines + [f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items()]) + "\n"
