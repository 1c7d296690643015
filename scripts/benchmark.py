"""Measure students on real captures: quality beside the teacher's, speed in one run, size. Figures go to benchmarks/."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.rich_utils import CONSOLE
from r2l_nerfstudio.scripts.benchmark_recipes import Recipes
from r2l_nerfstudio.scripts.benchmark_render import Render
from r2l_nerfstudio.scripts.benchmark_train import Train
from r2l_nerfstudio.scripts.benchmark_web import Web
from r2l_nerfstudio.scripts.contact_sheet import contact_sheet
from r2l_nerfstudio.scripts.small_nerfacto import small_nerfacto
from torch import Tensor
from torch.nn.functional import interpolate

from r2l_nerfstudio.errors import InputError, command_line
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.metrics import psnr, ssim
from r2l_nerfstudio.students.mobile import MobileR2L

UNSEEN_SEED = 31_415_926
UNSEEN_VIEWS = 8
ZOOMED_VIEWS = 3


@dataclass(frozen=True)
class Capture:
    """A capture and the teacher it gets when two CPU cores must do."""

    folder: str
    dataparser: Callable[[Path], DataParserConfig]
    scale: float = 1.0
    """Resolution, as a share of the dataparser's."""
    object_range: tuple[float, float] | None = None
    optimize_cameras: bool = False


CAPTURES = {
    "lego": Capture("lego_400", lambda data: BlenderDataParserConfig(data=data), 0.25, object_range=(2.0, 6.0)),
    "fern": Capture("fern_504", lambda data: NerfstudioDataParserConfig(data=data, downscale_factor=1), 0.25),
    "fox": Capture(
        "fox_540", lambda data: NerfstudioDataParserConfig(data=data, downscale_factor=4), optimize_cameras=True
    ),
}


@dataclass
class Distil:
    """Teacher, then student, on a real capture: PSNR and SSIM on test views, PSNR against the teacher on unseen poses,
    seconds per frame of both in one run, size. Test views are used for nothing but the final figures."""

    capture: Literal["lego", "fern", "fox"]
    """Which capture."""
    data_dir: Path
    """Folder that holds lego_400, fern_504, fox_540."""
    method: str = "r2l-lite"
    """The student's method, as for ns-train."""
    teacher: Path | None = None
    """A trained run to use; without it, a shrunk nerfacto is trained."""
    teacher_iterations: int = 2500
    """Iterations of the shrunk nerfacto."""
    iterations: int = 3000
    """Iterations of the student."""
    rays: int = 4096
    """Pixels per iteration of the student."""
    num_views: int = 150
    """Teacher views in the ring."""
    view_downscale: float = 1.0
    """Teacher views for training are this much smaller than the photographs."""
    real_iterations: int = 500
    """Last iterations, with photographs."""
    test_views: int = 25
    """At most this many test views, evenly spaced, for the final figures."""
    cache_dir: Path | None = None
    """Folder to keep the teacher's views in, for the next run with this teacher."""
    output_dir: Path = Path("outputs/benchmark")
    """Where runs go."""
    results_dir: Path = Path("benchmarks/results")
    """Where figures go."""

    def main(self) -> None:
        """Run and write `distil_CAPTURE_METHOD.{json,md,png}`."""
        teacher_config = self.teacher or self._train_teacher()
        config_path, seconds = self._train_student(teacher_config)
        figures, rows = measure(config_path, teacher_config, self.test_views)
        figures = {
            "capture": self.capture,
            "method": self.method,
            "device": device_name(),
            "student_iterations": self.iterations,
            "student_rays_per_iteration": self.rays,
            "ring_views": self.num_views,
            "view_downscale": self.view_downscale,
            "real_iterations": self.real_iterations,
            "student_minutes_in_all": round(seconds / 60, 1),
            **figures,
        }
        self.results_dir.mkdir(parents=True, exist_ok=True)
        stem = self.results_dir / f"distil_{self.capture}_{self.method}"
        stem.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
        stem.with_suffix(".md").write_text(as_table(figures))
        contact_sheet(rows, ["teacher", "student", "difference x4"]).save(stem.with_suffix(".png"))
        CONSOLE.print(as_table(figures), markup=False)
        CONSOLE.print(f"Written: {stem}.json, .md, .png")

    def _train_teacher(self) -> Path:
        from nerfstudio.scripts.train import main

        from r2l_nerfstudio.lpips import without_lpips

        capture = CAPTURES[self.capture]
        data = self.data_dir / capture.folder
        if not data.exists():
            raise InputError(f"There is no capture at {data}: name the folder that holds it with --data-dir.")
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
        config.steps_per_save = 500
        config.vis = "tensorboard"
        config.viewer.quit_on_train_completion = True
        datamanager = config.pipeline.datamanager
        datamanager.train_num_rays_per_batch = self.rays
        datamanager.num_views = self.num_views
        datamanager.view_downscale = self.view_downscale
        datamanager.real_iterations = self.real_iterations
        datamanager.cache_dir = self.cache_dir
        start = time.perf_counter()
        main(config)
        return config.get_base_dir() / "config.yml", time.perf_counter() - start


def measure(
    config_path: Path, teacher_path: Path, test_views: int
) -> tuple[dict[str, Any], list[tuple[str, list[Tensor]]]]:
    """All figures of a finished student, and images for its contact sheet.

    Args:
        config_path: of the student's run.
        teacher_path: of its teacher's run.
        test_views: at most this many, evenly spaced.

    Returns:
        figures, and the rows of a contact sheet: teacher, student, difference.
    """
    from nerfstudio.utils.eval_utils import eval_setup

    from r2l_nerfstudio.distillation.datamanager import capture_cameras
    from r2l_nerfstudio.distillation.pose_sampling import PoseSampler, PoseSamplerConfig
    from r2l_nerfstudio.distillation.survey import Survey
    from r2l_nerfstudio.distillation.view_ring import ViewRenderer
    from r2l_nerfstudio.teacher import Teacher

    config, pipeline, checkpoint, _ = eval_setup(config_path, test_mode="test")
    model, datamanager = pipeline.model, pipeline.datamanager
    teacher = Teacher.load(teacher_path, device=model.device, data=config.pipeline.datamanager.data)

    def student_view(camera: Cameras) -> Float[Tensor, "height width 3"]:
        return model.get_outputs_for_camera(camera)["rgb"].cpu()

    def teacher_view(camera: Cameras) -> Float[Tensor, "height width 3"]:
        return teacher.view(camera).rgb.cpu()

    views = {"teacher": teacher_view, "student": student_view}
    scores: dict[str, list[float]] = {f"{who}_{what}": [] for who in views for what in ("psnr", "ssim", "seconds")}
    rows = []
    dataset = datamanager.eval_dataset
    chosen = torch.linspace(0, len(dataset) - 1, min(test_views, len(dataset))).round().long().tolist()
    for index in chosen:
        camera = dataset.cameras[index : index + 1].to(model.device)
        truth = model.blend(dataset.get_data(index)["image"].to(model.device)).cpu()
        images = []
        for who, view in views.items():
            start = time.perf_counter()
            images.append(view(camera))
            scores[f"{who}_seconds"].append(time.perf_counter() - start)
            scores[f"{who}_psnr"].append(psnr(images[-1], truth))
            scores[f"{who}_ssim"].append(ssim(images[-1], truth))
        if index in chosen[:: max(1, math.ceil(len(chosen) / 3))]:
            rows.append(("", [*images, (4 * (images[1] - images[0]).abs()).clamp(0, 1)]))
    # One way to draw unseen poses for all methods, so that their figures compare.
    poses = PoseSamplerConfig(kind=config.pipeline.datamanager.pose_sampler.kind)
    sampler = PoseSampler(capture_cameras(datamanager.train_dataset.cameras), poses)
    survey = Survey.take(teacher, datamanager.train_dataset.cameras)
    size = (sampler.cameras.height, sampler.cameras.width)
    renderer = ViewRenderer(teacher, sampler, survey, *size, seed=UNSEEN_SEED)
    unseen = []
    zoomed: dict[float, list[float]] = {0.5: [], 2.0: []}
    steady: list[float] = []
    for index in range(UNSEEN_VIEWS):
        view = renderer.render(index)
        fx, fy, cx, cy = view.intrinsics.tolist()
        camera = Cameras(view.camera_to_world[None], fx, fy, cx, cy, width=size[1], height=size[0]).to(model.device)
        unseen.append(psnr(student_view(camera), view.pixels[..., :3].cpu().float() / 255))
        if index < ZOOMED_VIEWS:
            for zoom, values in zoomed.items():
                nearer = Cameras(camera.camera_to_worlds, zoom * fx, zoom * fy, cx, cy, width=size[1], height=size[0])
                values.append(psnr(student_view(nearer.to(model.device)), teacher_view(nearer.to(model.device))))
            steady += between_sizes(student_view, camera)
    seconds = {who: sorted(scores.pop(f"{who}_seconds")) for who in views}
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "resolution": f"{size[1]}x{size[0]}",
        "test_views": f"{len(chosen)} of {len(dataset)}",
        **{key: round(sum(values) / len(values), 4) for key, values in scores.items()},
        "student_psnr_against_teacher_unseen": round(sum(unseen) / len(unseen), 4),
        **{
            f"student_psnr_against_teacher_zoom_{zoom}": round(sum(values) / len(values), 4)
            for zoom, values in zoomed.items()
        },
        "student_lowest_psnr_between_sizes": round(min(steady), 4),
        **{f"{who}_seconds_per_frame": round(values[len(values) // 2], 4) for who, values in seconds.items()},
        "student_train_rays_per_second": train_rays_per_second(config_path.parent),
        "network_parameters": parameters,
        "network_megabytes_fp16": round(2 * parameters / 1e6, 2),
        "flop_per_pixel": round(flops_per_pixel(model)),
        "student_checkpoint_megabytes": round(checkpoint.stat().st_size / 1e6, 1),
        "teacher_checkpoint_megabytes": round(teacher.checkpoint.stat().st_size / 1e6, 1),
        "teacher_method": teacher.config.method_name,
        "teacher_iterations": teacher.step + 1,
        "pose_sampler": config.pipeline.datamanager.pose_sampler.kind,
        "scene": model.describe_scene(),
    }, rows


def between_sizes(view: Callable[[Cameras], Tensor], camera: Cameras) -> list[float]:
    """PSNR in dB between pictures of one camera at its own size and at others, all resampled to the smaller of the two."""
    own = view(camera)
    found = []
    for scale in (0.4, 0.75, 1.5):
        width, height = (round(scale * size) for size in own.shape[1::-1])
        across, down = width / own.shape[1], height / own.shape[0]  # exactly the same field of view
        cx, cy = camera.cx * across, camera.cy * down
        fx, fy = camera.fx * across, camera.fy * down
        other = Cameras(camera.camera_to_worlds, fx, fy, cx, cy, width=width, height=height)
        pictures = [own.permute(2, 0, 1)[None], view(other).permute(2, 0, 1)[None]]
        size = min((picture.shape[2:] for picture in pictures), key=lambda shape: shape[0])
        resampled = [interpolate(picture, size, mode="bilinear", antialias=True)[0] for picture in pictures]
        found.append(psnr(*(picture.permute(1, 2, 0) for picture in resampled)))
    return found


def flops_per_pixel(model: LightFieldModel) -> float:
    """Floating-point operations of the network for one pixel at the trained pitch."""
    if isinstance(model.network, MobileR2L):
        return model.network.flops_per_cell / model.network.factor**2
    return model.network.flops_per_ray


def train_rays_per_second(run: Path) -> float | None:
    """Median of what Nerfstudio logged while training; None where no log was kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run))
    log.Reload()
    tags = [tag for tag in log.Tags()["scalars"] if tag.startswith("Train Rays / Sec")]
    if not tags:
        return None
    values = sorted(event.value for event in log.Scalars(tags[0]))
    return round(values[len(values) // 2])


def device_name() -> str:
    """The machine that figures belong to."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def as_table(figures: dict[str, Any]) -> str:
    """Figures as a Markdown table."""
    lines = ["| figure | value |", "|---|---|"]
    return "\n".join(lines + [f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items()]) + "\n"


def main() -> None:
    """Console entry point `r2l-benchmark`."""
    with command_line():
        from r2l_nerfstudio.scripts.benchmark_curve import Curve  # it measures as this module does

        commands = {"distil": Distil, "curve": Curve, "render": Render, "train": Train, "recipes": Recipes, "web": Web}
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, prog="r2l-benchmark").main()


if __name__ == "__main__":
    main()
