"""The data of all students behind Nerfstudio's DataManager interface: teacher views, then photos."""

from __future__ import annotations

import copy
import hashlib
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from nerfstudio.data.utils.nerfstudio_collate import nerfstudio_collate
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from r2l_nerfstudio.distillation.photos import split_held_out
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, PoseSampler, PoseSamplerConfig, capture_cameras
from r2l_nerfstudio.distillation.ray_sample import RaySample
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import TeacherView, ViewRenderer, ViewRing
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.ranges import FloatRange, IntRange
from r2l_nerfstudio.rays.ray_image import StudentRays
from r2l_nerfstudio.renamed_fields import RenamedFields
from r2l_nerfstudio.teacher import Teacher

HELD_OUT_VIEWS = 4
HELD_OUT_SEED_OFFSET = 7_654_321
MOST_FAILURES = 3
"""Consecutive teacher views that may fail during training before rendering stops."""


@dataclass
class DistillationDataManagerConfig(RenamedFields, VanillaDataManagerConfig):
    """Supervision for a student: a ring of teacher views, then photos."""

    RENAMED: ClassVar[dict[str, str]] = {
        "real_iterations": "photo_iterations",
        "real_fraction": "photo_fraction",
        "holdout_fraction": "held_out_fraction",
    }

    _target: type = field(default_factory=lambda: DistillationDataManager)
    dataparser: tyro.conf.Suppress[DataParserConfig] = field(default_factory=NerfstudioDataParserConfig)
    """Inherited from the teacher, so that both share one frame."""
    train_num_rays_per_batch: Annotated[int, IntRange(1, 10**8)] = 65536
    """Pixels per training iteration."""
    num_views: Annotated[int, IntRange(1, 10**7)] = 300
    """Teacher views held on the device."""
    view_downscale: Annotated[float, FloatRange(0.01, 1024)] = 1.0
    """Downscaling factor of teacher views relative to the training photos."""
    pose_sampler: PoseSamplerConfig = field(default_factory=PoseSamplerConfig)
    """How cameras for teacher views are sampled."""
    foreground_fraction: Annotated[float, FloatRange(0, 1)] = 0.75
    """Share of the rays of teacher views that are drawn from foreground pixels: a white background is soon learned."""
    refresh_share: Annotated[float, FloatRange(0, 1)] = 0.15
    """Share of the training time that may be used to replace teacher views by new ones; 0 keeps the first ones."""
    # The aliases are the flags' former names, which scripts of users hold.
    photo_iterations: Annotated[
        int, IntRange(0, 10**9), tyro.conf.arg(aliases=["--pipeline.datamanager.real-iterations"])
    ] = 2000
    """Iterations of the photo stage: the last iterations, which mix in rays of photos; 0 learns from the teacher
    only."""
    photo_fraction: Annotated[
        float, FloatRange(0, 1), tyro.conf.arg(aliases=["--pipeline.datamanager.real-fraction"])
    ] = 0.5
    """Share of photos in each batch of the photo stage."""
    held_out_fraction: Annotated[
        float, FloatRange(0, 1), tyro.conf.arg(aliases=["--pipeline.datamanager.holdout-fraction"])
    ] = 0.1
    """Share of the training photos that is held out, to measure on and never train on."""
    cache_dir: Path | None = None
    """Folder to keep rendered teacher views in, so that the next run with this teacher starts at once."""
    seed: Annotated[int, IntRange(0, 2**31 - 1)] = 42
    """Seed of the sampled cameras."""
    fill_minutes: tyro.conf.Suppress[float | None] = None
    """Seconds after which training starts, however few views there are; set from --max-minutes."""

    # Settings of Nerfstudio's data managers that this one does not use.
    masks_on_gpu: tyro.conf.Suppress[bool] = False
    images_on_gpu: tyro.conf.Suppress[bool] = False
    train_num_images_to_sample_from: tyro.conf.Suppress[int] = -1
    train_num_times_to_repeat_images: tyro.conf.Suppress[int] = -1
    patch_size: tyro.conf.Suppress[int] = 1
    pixel_sampler: tyro.conf.Suppress[PixelSamplerConfig] = field(default_factory=PixelSamplerConfig)
    collate_fn: tyro.conf.Suppress[Callable[[Any], Any]] = staticmethod(nerfstudio_collate)
    camera_res_scale_factor: tyro.conf.Suppress[float] = 1.0
    """Inherited from the teacher."""


@dataclass
class Batch:
    """Rays for a student, and the values to learn for their pixels."""

    ray_bundle: RayBundle
    target: RaySample
    fresh: int = 0
    """Number of rays, from the first, that were newly drawn from teacher views."""

    def as_nerfstudio(self) -> tuple[RayBundle, dict[str, Tensor]]:
        """Return what Nerfstudio's data managers return: rays, and a dictionary in which colors are called `image`."""
        fields = {name: value for name, value in vars(self.target).items() if name != "rgb"}
        return self.ray_bundle, {"image": self.target.rgb, **fields}


class DistillationDataManager(VanillaDataManager[InputDataset]):
    """A ring of teacher views, and photos in the photo stage; subclasses decide what a batch is made of.

    Evaluation is Nerfstudio's. Training needs `attach_teacher` first; without it, as in `ns-viewer`, `ns-render` and
    `ns-eval`, no teacher is loaded.
    """

    config: DistillationDataManagerConfig

    def __init__(self, config: DistillationDataManagerConfig, *args: Any, **kwargs: Any) -> None:
        """Args: as `VanillaDataManager`.

        Raises:
            InputError: if the capture cannot be read.
        """
        try:
            super().__init__(config, *args, **kwargs)
        except (Exception, SystemExit) as error:  # Every dataparser raises its own exceptions.
            raise InputError(
                f"The capture {config.data or config.dataparser.data} cannot be read ({one_line(error)}): restore it,"
                " or give its location with --data (ns-train) or in the run's config.yml"
                " (pipeline.datamanager.data)."
            ) from error

    def setup_train(self) -> None:
        """Load nothing yet: the pipeline attaches the teacher."""
        self.in_photo_stage = False
        """Whether batches include photos."""
        self.background = torch.ones(3)

    def _get_pixel_sampler(self, dataset: InputDataset, num_rays_per_batch: int) -> PixelSampler:
        """Set up Nerfstudio's evaluation, without a trace in the configuration."""
        # A sampler writes a tensor into its configuration. Ours is saved again, and config.yml would then hold pickles.
        kept, self.config.pixel_sampler = self.config.pixel_sampler, copy.deepcopy(self.config.pixel_sampler)
        try:
            return super()._get_pixel_sampler(dataset, num_rays_per_batch)
        finally:
            self.config.pixel_sampler = kept

    def view_cameras(self) -> CaptureCameras:
        """Return the training cameras as pinholes with the size and focal lengths of teacher views."""
        return capture_cameras(self.train_dataset.cameras, self.config.view_downscale)

    def attach_teacher(
        self,
        teacher: Teacher,
        survey: Survey,
        background: Float[Tensor, "3"],
        rays: StudentRays,
        room_bytes: int = 0,
    ) -> None:
        """Fill the ring of teacher views and read the photos.

        Args:
            teacher: teacher to render views with.
            survey: what the teacher shows from its training cameras.
            background: color behind photos with an alpha channel.
            rays: which rays the student reads.
            room_bytes: bytes of the device's free memory that training needs for itself.

        Raises:
            InputError: if no plausible view is found, no view fits the device, or no training view is left.
        """
        config = self.config
        self.background = background
        self.rays = self.read_by(rays)
        sampled = config.pose_sampler
        if not self.begins_with_single_rays():  # Nothing would be drawn from zoomed views.
            sampled = replace(sampled, zoomed_share=0.0)
        sampler = PoseSampler(self.view_cameras(), sampled)
        config.pose_sampler.kind = sampled.kind = sampler.kind
        CONSOLE.print(f"Sampling cameras with the {sampler.kind} sampler.")

        def renderer(seed: int, cache_dir: Path | None) -> ViewRenderer:
            return ViewRenderer(
                teacher, sampler, survey, sampler.cameras.height, sampler.cameras.width, seed, cache_dir
            )

        seed = config.seed + self.local_rank
        # Photos first: a capture that cannot be used must fail before the teacher has rendered for minutes.
        self.photos: Any = None
        self._photo_source: tuple[list[int], Tensor | None] = ([], None)
        self.held_out_photos: Batch | None = None
        if config.photo_iterations > 0:
            kept, held = split_held_out(len(self.train_dataset), config.held_out_fraction)
            corrections = teacher.pose_corrections()
            self.photos = self.read_photos(kept, corrections)
            if len(self.photos) == 0:
                CONSOLE.print("[yellow]No photo has a pixel outside its mask: learning from the teacher only.")
                self.photos = None
            self._photo_source = kept, corrections
            self._read_photo_rays()
            if held and self.photos is not None:
                generator = torch.Generator().manual_seed(config.seed)
                held_out = self.read_photos(held, corrections)
                if len(held_out):
                    self.held_out_photos = self.hold_out(held_out, generator)
                else:
                    CONSOLE.print("[yellow]No held-out photo has a pixel outside its mask: no PSNR against photos.")
        self._held_ring = ViewRing(renderer(seed + HELD_OUT_SEED_OFFSET, None), HELD_OUT_VIEWS, self.device)
        self._held_ring.fill()
        self.held_views = self.hold_out(self._held_ring, None)
        renders = renderer(seed, self._cache_dir(teacher, sampler))
        self.ring = ViewRing(renders, config.num_views, self.device, room_bytes)
        self.ring.fill(None if config.fill_minutes is None else 60 * config.fill_minutes)
        self._training_seconds = 0.0
        self._last_call: float | None = None
        self._seconds_before = self.ring.renderer.seconds
        self._renderer_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        self._side_stream = torch.cuda.Stream(self.device) if torch.device(self.device).type == "cuda" else None
        self._next_view: Future[TeacherView] | None = None
        self._failures = 0
        self._begin()

    def _read_photo_rays(self) -> None:  # noqa: B027
        """Read what the first stage of a training learns from photos; called before the ring takes the memory."""

    def _begin(self) -> None:  # noqa: B027
        """Prepare what one student's training keeps; called when a training starts."""

    @abstractmethod
    def read_photos(self, indices: list[int], corrections: Float[Tensor, "num_train 3 4"] | None) -> Any:
        """Return some training photos in the form in which this data manager draws from them.

        Args:
            indices: indices of the photos.
            corrections: the teacher's pose corrections for all training views.

        Raises:
            InputError: if a photo cannot be used.
        """

    @abstractmethod
    def hold_out(self, source: Any, generator: torch.Generator | None) -> Batch:
        """Return a batch to measure on and never train on.

        Args:
            source: a ring, or what `read_photos` gave.
            generator: for a repeatable draw.
        """

    @abstractmethod
    def draw(self, num_photo_pixels: int) -> Batch:
        """Return a batch to learn from, `num_photo_pixels` of its `train_num_rays_per_batch` pixels from photos."""

    def begins_with_single_rays(self) -> bool:
        """Return whether a student of ray images learns from single rays before it learns from crops.

        Not a property: the viewer reads all of those, and without a teacher this one has no answer.
        """
        return False

    def read_by(self, rays: StudentRays) -> StudentRays:
        """Return the rays that batches hold for a student that reads these."""
        return rays

    def restart(self, config: DistillationDataManagerConfig, rays: StudentRays) -> None:
        """Restart with the existing teacher views, for another student.

        Args:
            config: new configuration; views and photos must be configured as before.
            rays: which rays it reads; held-out photos keep the conventions that they were drawn for.
        """
        self.config = config
        self.in_photo_stage = False
        self.rays = self.read_by(rays)
        self.__dict__.pop("cells", None)
        self.held_views = self.hold_out(self._held_ring, None)
        self._read_photo_rays()
        self._begin()

    def note_progress(self, fraction: float, steps: int) -> None:
        """Choose the stage of the training, which decides what batches hold.

        Args:
            fraction: share of the training that is done.
            steps: iterations of the whole training.
        """
        share = self.config.photo_iterations / max(1, steps)
        self.in_photo_stage = share > 0 and fraction >= 1 - share - 1e-9

    def learn_from(self, batch: Batch, errors: Float[Tensor, "*batch"]) -> None:  # noqa: B027
        """Receive the student's error per pixel after each iteration."""

    def _cache_dir(self, teacher: Teacher, sampler: PoseSampler) -> Path | None:
        """Return a folder per teacher, sampler and resolution, so that views of another kind are never read."""
        if self.config.cache_dir is None:
            return None
        cameras = sampler.cameras
        digest = hashlib.sha256(f"{teacher.fingerprint()} {sampler.config} {cameras.width}x{cameras.height}".encode())
        for tensor in (cameras.camera_to_worlds, cameras.intrinsics):
            digest.update(tensor.numpy().tobytes())
        return self.config.cache_dir / digest.hexdigest()[:16]

    def next_batch(self, step: int) -> Batch:
        """Return a batch of rays with the values to learn for them.

        Args:
            step: training step.
        """
        self.train_count += 1
        self._refresh()
        with_photos = self.photos is not None and self.in_photo_stage
        return self.draw(int(self.config.photo_fraction * self.get_train_rays_per_batch()) if with_photos else 0)

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """Return `next_batch` in Nerfstudio's form."""
        return self.next_batch(step).as_nerfstudio()

    def _refresh(self) -> None:
        """Add a teacher view, or replace the oldest in a full ring, if the teacher's share of the time allows it.

        Another thread renders it: no iteration waits for it.
        """
        now = time.perf_counter()
        if self._last_call is not None:
            self._training_seconds += now - self._last_call
        self._last_call = now
        if self._next_view is not None and self._next_view.done():
            self._take(self._next_view)
            self._next_view = None
        if self._failures >= MOST_FAILURES:
            return
        spent = self.ring.renderer.seconds - self._seconds_before
        if self._next_view is None and spent < self.config.refresh_share * self._training_seconds:
            self._next_view = self._renderer_thread.submit(self._render_next)

    def _take(self, rendered: Future[TeacherView]) -> None:
        """Put a view into the ring; a failed one does not end a training that has others to learn from."""
        try:
            self.ring.put(rendered.result())
            self._failures = 0
        except Exception as error:  # A method may raise anything, and a GPU's memory may be full for a moment.
            self._failures += 1
            if self._failures == MOST_FAILURES:
                CONSOLE.print(
                    f"[bold yellow]No more teacher views after {MOST_FAILURES} failures ({type(error).__name__}:"
                    f" {one_line(error)}): training continues with the existing {len(self.ring)}.",
                    soft_wrap=True,
                )

    def _render_next(self) -> TeacherView:
        if self._side_stream is None:
            return self.ring.render_next()
        with torch.cuda.stream(self._side_stream):
            return self.ring.render_next()

    def get_train_rays_per_batch(self) -> int:
        return self.config.train_num_rays_per_batch


def to_ray_bundle(sample: RaySample) -> RayBundle:
    """Return the same rays in Nerfstudio's container."""
    return RayBundle(origins=sample.origins, directions=sample.directions, pixel_area=torch.zeros_like(sample.weight))
