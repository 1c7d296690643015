"""Measurements of a finished student: quality, stability, frame times, sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.nn.functional import interpolate

from r2l_nerfstudio.capture import CaptureError, parse_capture
from r2l_nerfstudio.console import progress_bar
from r2l_nerfstudio.dataparsers import dataparser_at
from r2l_nerfstudio.distillation.datamanager import DistillationDataManagerConfig
from r2l_nerfstudio.distillation.learning_curve import CurvePoint, read_learning_curve
from r2l_nerfstudio.distillation.photos import read_photo
from r2l_nerfstudio.distillation.pose_sampling import PoseSampler, PoseSamplerConfig, capture_cameras
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import TeacherView, ViewRenderer
from r2l_nerfstudio.engines.cache import device_name
from r2l_nerfstudio.engines.parity import parity
from r2l_nerfstudio.engines.protocol import EngineName, Precision
from r2l_nerfstudio.engines.registry import build_engine, engine_module
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.metrics import detail_share, gmsd, image_metrics, psnr
from r2l_nerfstudio.run_config import capture_path, checkpoint_path, load_run_config, resolve_run
from r2l_nerfstudio.student import load_student
from r2l_nerfstudio.students.mobile import MobileR2L
from r2l_nerfstudio.students.resmlp import ResMLP
from r2l_nerfstudio.teacher import Teacher

Image = Float[Tensor, "height width 3"]

UNSEEN_SEED = 31_415_926
ZOOMS = (0.5, 2.0)
SIZES = (0.4, 0.75, 1.5)
"""Sizes at which a camera is rendered again, as shares of its own."""
QUALITY = ("psnr", "ssim", "lpips", "gmsd")
"""Metrics against photos."""
FRAMES = 5
"""Frames to time per engine; the median counts."""
PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class ViewScore:
    """Quality at one held-out photo."""

    name: str
    """File name of the photo."""
    student: dict[str, float]
    """`psnr` (dB), `ssim`, `gmsd` and, if its weights could be loaded, `lpips`, against the photo."""
    teacher: dict[str, float] | None = None
    """The same for the teacher."""
    against_teacher: float | None = None
    """PSNR in dB of the student against the teacher."""
    detail: float | None = None
    """The student's share of the energy of the teacher's fine detail: below 1, it is blurrier. None without a teacher, or if
    its image has none."""


@dataclass(frozen=True)
class UnseenScores:
    """Agreement with the teacher at sampled cameras that no training saw; PSNR in dB."""

    cameras: int
    mean: float
    lowest: float
    zoom: dict[str, float]
    """Mean at other focal lengths, by factor."""


@dataclass(frozen=True)
class EngineTime:
    """How fast an engine renders a frame, or why it does not."""

    engine: EngineName
    precision: Precision | None = None
    milliseconds: float | None = None
    """Milliseconds of a whole frame: rays, encoding, network."""
    parity: float | None = None
    """PSNR in dB of its values against fp32 PyTorch; infinity for equal ones."""
    skipped: str | None = None


@dataclass(frozen=True)
class ComparedView:
    """Renders to show side by side, [0, 1], on the CPU."""

    name: str
    photo: Image | None
    teacher: Image | None
    student: Image


@dataclass
class Measurements:
    """All contents of a report."""

    run: str
    method: str
    device: str
    resolution: tuple[int, int]
    """Width and height of the photos, pixels."""
    photos_in_test_split: int
    views: list[ViewScore]
    teacher: dict[str, Any] | None
    """`method`, `iterations` and `checkpoint_megabytes`; None if the teacher's run is missing."""
    unseen: UnseenScores | None
    between_sizes: float
    """Lowest PSNR in dB between renders of one camera at its own size and at others, resampled to the smaller."""
    teacher_between_sizes: float | None
    """The same for the teacher: one ray per pixel is not an average over the pixel, so it is finite there too."""
    engines: list[EngineTime]
    frame_milliseconds: dict[str, float]
    """Median time of a frame of the test views, by `student` and `teacher`, in this run."""
    sizes: dict[str, float]
    learning_curve: list[CurvePoint]
    shown: list[ComparedView] = field(default_factory=list)

    def mean(self, who: str, metric: str) -> float | None:
        """Return the mean over all test views of a metric; None where a view has none.

        Args:
            who: `student` or `teacher`.
            metric: one of `QUALITY`.
        """
        scores = [getattr(view, who) for view in self.views]
        values = [None if score is None else score.get(metric) for score in scores]
        return fmean(cast(list[float], values)) if values and None not in values else None

    @property
    def detail(self) -> float | None:
        """Mean over the test views of the student's share of the teacher's fine detail; None without a teacher."""
        shares = [view.detail for view in self.views if view.detail is not None]
        return fmean(shares) if shares else None

    def worst(self, count: int = 3) -> list[ViewScore]:
        """Return the test views with the lowest PSNR of the student, lowest first."""
        return sorted(self.views, key=lambda view: view.student["psnr"])[:count]

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, without images, as plain JSON types."""
        figures = {key: value for key, value in vars(self).items() if key != "shown"}
        means = {who: {metric: self.mean(who, metric) for metric in QUALITY} for who in ("student", "teacher")}
        figures |= {"mean": means, "detail": self.detail, "worst_views": [view.name for view in self.worst()]}
        return cast(dict[str, Any], _plain(figures))


def _plain(value: Any) -> Any:
    """Convert to JSON types: dataclasses to objects, numbers to few digits, non-finite numbers to null."""
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


@torch.no_grad()
def measure(
    run: Path,
    data: Path | None = None,
    teacher: Path | None = None,
    test_views: int = 25,
    unseen_cameras: int = 8,
    engines: tuple[EngineName, ...] = (),
    shown_views: int = 6,
    pose_sampler: PoseSamplerConfig | None = None,
) -> Measurements:
    """Measure a finished student.

    Args:
        run: its config.yml or folder.
        data: the capture's location, if it has moved since training.
        teacher: the teacher's run, if it has moved since training. Without one, figures that need it are None.
        test_views: at most this many photos of the test split, evenly spaced.
        unseen_cameras: sampled cameras to compare with the teacher at.
        engines: engines to time.
        shown_views: at most this many views are kept as images, the worst one among them.
        pose_sampler: how unseen cameras are sampled; as in training, but with its default extent, by default.

    Raises:
        InputError: the run, its capture or an explicitly given teacher cannot be read.
    """
    config_path = resolve_run(Path(run))
    config = load_run_config(config_path)
    student = load_student(config_path, engine="torch")
    model = student.model
    datamanager = cast(DistillationDataManagerConfig, config.pipeline.datamanager)
    place = capture_path(config, config_path) if data is None else Path(data)
    loaded_teacher = _load_teacher(teacher, getattr(config.pipeline, "teacher", None), place, model.device)
    parser = dataparser_at(config, place)
    try:
        splits = {split: parse_capture(parser, split) for split in ("train", "test")}
    except CaptureError as error:
        raise InputError(
            f"The capture {place} cannot be read ({one_line(error)}): give its folder with --data."
        ) from error
    train, test = (InputDataset(outputs, datamanager.camera_res_scale_factor) for outputs in splits.values())

    seconds: dict[str, list[float]] = {"student": [], "teacher": []}

    def timed(who: str, render: Callable[[], Tensor]) -> Image:
        start = time.perf_counter()
        image = render().clamp(0, 1).cpu()
        seconds[who].append(time.perf_counter() - start)
        return image

    def student_view(camera: Cameras) -> Image:
        return timed("student", lambda: model.render_camera(camera)["rgb"])

    teacher_view: Callable[[Cameras], Image] | None = None
    if loaded_teacher is not None:
        render_teacher = loaded_teacher.view
        teacher_view = lambda camera: timed("teacher", lambda: render_teacher(camera).rgb)  # noqa: E731

    chosen = torch.linspace(0, len(test) - 1, min(test_views, len(test))).round().long().tolist()
    views, kept = [], []
    with progress_bar() as bar:
        for index in bar.track(chosen, description="Test views"):
            camera = test.cameras[index : index + 1].to(model.device)
            photo = torch.from_numpy(read_photo(test, index, model.background.cpu()).rgb).float() / 255
            image = student_view(camera)
            truth = None if teacher_view is None else teacher_view(camera)
            name = Path(test.image_filenames[index]).name
            views.append(
                ViewScore(
                    name,
                    image_metrics(image, photo) | {"gmsd": gmsd(image, photo)},
                    None if truth is None else image_metrics(truth, photo) | {"gmsd": gmsd(truth, photo)},
                    None if truth is None else psnr(image, truth),
                    None if truth is None else detail_share(image, truth),
                )
            )
            kept.append(ComparedView(name, photo, truth, image))
    frame_milliseconds = {who: 1e3 * median(values) for who, values in seconds.items() if values}
    order = sorted(range(len(views)), key=lambda index: views[index].student["psnr"])
    spread = torch.linspace(0, len(order) - 1, min(shown_views, len(order))).round().long().tolist()
    shown = [kept[order[index]] for index in spread]

    sampled = pose_sampler or PoseSamplerConfig(kind=datamanager.pose_sampler.kind)
    sampler = PoseSampler(capture_cameras(train.cameras), sampled)
    unseen = None
    if loaded_teacher is not None and teacher_view is not None and unseen_cameras > 0:
        renderer = ViewRenderer(
            loaded_teacher,
            sampler,
            Survey.take(loaded_teacher, train.cameras),
            sampler.cameras.height,
            sampler.cameras.width,
            seed=UNSEEN_SEED,
        )
        unseen = _unseen(renderer, unseen_cameras, student_view, teacher_view, model.device)
    first = test.cameras[chosen[0] : chosen[0] + 1].to(model.device)
    steady = between_sizes(student_view, first)
    teacher_steady = None if teacher_view is None else min(between_sizes(teacher_view, first))
    checkpoint = checkpoint_path(config, config_path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {
        "network_parameters": parameters,
        "network_megabytes_fp16": 2 * parameters / 1e6,
        "checkpoint_megabytes": checkpoint.stat().st_size / 1e6,
        "flop_per_pixel": flops_per_pixel(model),
    }
    return Measurements(
        run=str(config_path.parent),
        method=student.method_name,
        device=device_name(model.device),
        resolution=(int(test.cameras.width[0]), int(test.cameras.height[0])),
        photos_in_test_split=len(test),
        views=views,
        teacher=None if loaded_teacher is None else _about(loaded_teacher),
        unseen=unseen,
        between_sizes=min(steady),
        teacher_between_sizes=teacher_steady,
        engines=time_engines(model, first, engines),
        frame_milliseconds=frame_milliseconds,
        sizes=sizes,
        learning_curve=read_learning_curve(config_path.parent),
        shown=shown,
    )


def _load_teacher(named: Path | None, remembered: Path | None, data: Path, device: torch.device) -> Teacher | None:
    """Load the given teacher, or else the one in the run's configuration if it can still be read."""
    if named is not None:
        return Teacher.load(named, device=device, data=data)
    if remembered is None:
        return None
    try:
        return Teacher.load(remembered, device=device, data=data)
    except InputError as error:
        CONSOLE.print(f"[yellow]Skipping the comparison with the teacher:[/yellow] {error}", soft_wrap=True)
        return None


def _about(teacher: Teacher) -> dict[str, Any]:
    return {
        "method": teacher.config.method_name,
        "iterations": teacher.step + 1,
        "checkpoint_megabytes": teacher.checkpoint.stat().st_size / 1e6,
    }


def _unseen(
    renderer: ViewRenderer,
    number: int,
    student_view: Callable[[Cameras], Image],
    teacher_view: Callable[[Cameras], Image],
    device: torch.device,
) -> UnseenScores:
    scores: list[float] = []
    zoomed: dict[float, list[float]] = {zoom: [] for zoom in ZOOMS}
    with progress_bar() as bar:
        for index in bar.track(range(number), description="Unseen cameras"):
            view = renderer.render(index)
            camera = _camera(view, renderer).to(device)
            scores.append(psnr(student_view(camera), view.pixels[..., :3].cpu().float() / 255))
            if index < math.ceil(number / 3):
                for zoom, values in zoomed.items():
                    other = _camera(view, renderer, zoom).to(device)
                    values.append(psnr(student_view(other), teacher_view(other)))
    return UnseenScores(number, fmean(scores), min(scores), {f"{zoom:g}": fmean(v) for zoom, v in zoomed.items()})


def _camera(view: TeacherView, renderer: ViewRenderer, zoom: float = 1.0) -> Cameras:
    """Return the camera of a teacher view, at `zoom` times its focal length."""
    fx, fy, cx, cy = view.intrinsics.tolist()
    pose, width, height = view.camera_to_world[None], renderer.width, renderer.height
    return Cameras(pose, zoom * fx, zoom * fy, cx, cy, width=width, height=height)


def between_sizes(view: Callable[[Cameras], Image], camera: Cameras) -> list[float]:
    """Return the PSNR in dB between renders of a camera at its own size and at `SIZES`, resampled to the smaller of
    both."""
    own = view(camera)
    found = []
    for scale in SIZES:
        width, height = (round(scale * size) for size in own.shape[1::-1])
        across, down = width / own.shape[1], height / own.shape[0]  # exactly the same field of view
        cx, cy = camera.cx * across, camera.cy * down
        fx, fy = camera.fx * across, camera.fy * down
        other = Cameras(camera.camera_to_worlds, fx, fy, cx, cy, width=width, height=height)
        found.append(psnr_of_sizes(own, view(other)))
    return found


def psnr_of_sizes(one: Image, other: Image) -> float:
    """Return the PSNR in dB of two images of one view, resampled to the smaller of both sizes."""
    pictures = [picture.permute(2, 0, 1)[None] for picture in (one, other)]
    size = min((picture.shape[2:] for picture in pictures), key=lambda shape: shape[0])
    first, second = (interpolate(picture, size, mode="bilinear", antialias=True)[0] for picture in pictures)
    return psnr(first.permute(1, 2, 0), second.permute(1, 2, 0))


def time_engines(model: LightFieldModel, camera: Cameras, engines: tuple[EngineName, ...]) -> list[EngineTime]:
    """Time a frame on each engine, in the lowest precision that it supports here and that agrees with fp32.

    Args:
        model: the student, in evaluation mode.
        camera: of the frame.
        engines: engines to time.
    """
    found = []
    with progress_bar() as bar:
        for name in bar.track(engines, description="Engines"):
            found.append(_time_engine(model, camera, name))
    return found


def _time_engine(model: LightFieldModel, camera: Cameras, name: EngineName) -> EngineTime:
    module = engine_module(name)
    reasons = {precision: module.why_not(model.device, precision) for precision in PRECISIONS}
    reason = reasons["fp32"] or ""
    for precision in PRECISIONS:
        if reasons[precision] is not None:
            continue
        try:
            engine = build_engine(name, model.network, precision, model.device, margin=model.margin)
        except InputError as error:
            reason = str(error)
            continue
        milliseconds = []
        with model.network_run_by(lambda encoded, engine=engine: engine(encoded)):
            for _ in range(FRAMES + 1):
                start = time.perf_counter()
                model.render_camera(camera)["rgb"].cpu()
                milliseconds.append(1e3 * (time.perf_counter() - start))
        agreement = parity(engine, model.network, model.device, margin=model.margin)
        return EngineTime(name, precision, median(milliseconds[1:]), agreement)  # The first one warms up.
    return EngineTime(name, skipped=reason)


def flops_per_pixel(model: LightFieldModel) -> float:
    """Return the floating-point operations of the network for one pixel at the size it was trained for."""
    network = cast(MobileR2L | ResMLP, model.network)
    if isinstance(network, MobileR2L):
        return network.flops_per_cell / network.factor**2
    return network.flops_per_ray
