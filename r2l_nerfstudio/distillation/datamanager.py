"""Teacher views, then photographs, behind Nerfstudio's DataManager contract: what all students' data have in common."""

from __future__ import annotations

import copy
import hashlib
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

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

from r2l_nerfstudio.distillation.photographs import split_holdout
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, PoseSampler, PoseSamplerConfig, capture_cameras
from r2l_nerfstudio.distillation.ray_sample import RaySample
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import TeacherView, ViewRenderer, ViewRing
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.ranges import FloatRange, IntRange
from r2l_nerfstudio.rays.ray_image import StudentRays
from r2l_nerfstudio.teacher import Teacher

HOLDOUT_VIEWS = 4
HOLDOUT_SEED_OFFSET = 7_654_321
MOST_FAILURES = 3
"""Teacher views in a row that may fail while training before no more are rendered."""


@dataclass
class DistillationDataManagerConfig(VanillaDataManagerConfig):
    """Supervision for a student: a ring of teacher views, then the photographs themselves."""

    _target: type = field(default_factory=lambda: DistillationDataManager)
    dataparser: tyro.conf.Suppress[DataParserConfig] = field(default_factory=NerfstudioDataParserConfig)
    """Inherited from the teacher, so that both live in one frame."""
    train_num_rays_per_batch: Annotated[int, IntRange(1, 10**8)] = 65536
    """Pixels per training iteration."""
    num_views: Annotated[int, IntRange(1, 10**7)] = 300
    """Teacher views held on the device."""
    view_downscale: Annotated[float, FloatRange(0.01, 1024)] = 1.0
    """Teacher views are this much smaller than the training photographs."""
    pose_sampler: PoseSamplerConfig = field(default_factory=PoseSamplerConfig)
    """Where teacher views are taken from."""
    foreground_fraction: Annotated[float, FloatRange(0, 1)] = 0.75
    """Share of what is drawn from teacher views where the teacher sees something: a white background is soon learnt."""
    refresh_share: Annotated[float, FloatRange(0, 1)] = 0.15
    """Share of the training time that may go into replacing teacher views by new ones; 0 keeps the first ones."""
    real_iterations: Annotated[int, IntRange(0, 10**9)] = 2000
    """The last iterations mix in rays of the photographs; 0 learns from the teacher alone."""
    real_fraction: Annotated[float, FloatRange(0, 1)] = 0.5
    """Share of photographs in those iterations."""
    holdout_fraction: Annotated[float, FloatRange(0, 1)] = 0.1
    """Share of the training photographs that is only watched, never learnt."""
    cache_dir: Path | None = None
    """Folder to keep rendered teacher views in, so that another run with this teacher starts at once."""
    seed: Annotated[int, IntRange(0, 2**31 - 1)] = 42
    """Of the pseudo cameras."""
    fill_minutes: tyro.conf.Suppress[float | None] = None
    """Training begins after so long, however few views there are; set from --max-minutes."""

    # What a photograph-driven data manager reads and this one does not.
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
    """Rays for a student, and what is to be learnt of the pixels that they explain."""

    ray_bundle: RayBundle
    target: RaySample
    fresh: int = 0
    """The first so many rays were drawn from teacher views just now."""

    def as_nerfstudio(self) -> tuple[RayBundle, dict[str, Tensor]]:
        """As Nerfstudio's data managers give it: rays, and a dictionary in which colours are called `image`."""
        fields = {name: value for name, value in vars(self.target).items() if name != "rgb"}
        return self.ray_bundle, {"image": self.target.rgb, **fields}


class DistillationDataManager(VanillaDataManager[InputDataset]):
    """A ring of teacher views, and in the end photographs; what a batch is made of them is for subclasses to say.

    Evaluation is Nerfstudio's own. Training needs `attach_teacher` first; without it, as in `ns-viewer`, `ns-render` and
    `ns-eval`, no teacher is read.
    """

    config: DistillationDataManagerConfig

    def __init__(self, config: DistillationDataManagerConfig, *args: Any, **kwargs: Any) -> None:
        """As `VanillaDataManager`.

        Raises:
            InputError: if the capture cannot be read.
        """
        try:
            super().__init__(config, *args, **kwargs)
        except (Exception, SystemExit) as error:  # every dataparser has failures of its own
            raise InputError(
                f"The capture {config.data or config.dataparser.data} cannot be read ({one_line(error)}):"
                " put it back, or name its new place with --data (ns-train) or in the run's config.yml"
                " (pipeline.datamanager.data)."
            ) from error

    def setup_train(self) -> None:
        """Nothing is loaded here: the teacher is attached by the pipeline."""
        self.photographs_now = False
        """Whether batches take photographs in."""
        self.background = torch.ones(3)

    def _get_pixel_sampler(self, dataset: InputDataset, num_rays_per_batch: int) -> PixelSampler:
        """As Nerfstudio's, but for evaluation alone, and without a trace in the configuration."""
        # A sampler writes a tensor into its configuration, and ours is saved again: config.yml would then hold pickles.
        kept, self.config.pixel_sampler = self.config.pixel_sampler, copy.deepcopy(self.config.pixel_sampler)
        try:
            return super()._get_pixel_sampler(dataset, num_rays_per_batch)
        finally:
            self.config.pixel_sampler = kept

    def view_cameras(self) -> CaptureCameras:
        """The training cameras as pinholes of the size and focal lengths that teacher views have."""
        return capture_cameras(self.train_dataset.cameras, self.config.view_downscale)

    def attach_teacher(
        self,
        teacher: Teacher,
        survey: Survey,
        background: Float[Tensor, "3"],
        rays: StudentRays,
    ) -> None:
        """Fill the ring of teacher views and read the photographs.

        Args:
            teacher: who renders.
            survey: what it shows from its training cameras.
            background: colour behind photographs that have an alpha channel.
            rays: which rays the student reads.

        Raises:
            InputError: if no plausible view is found, no view fits the device, or no training view is left.
        """
        config = self.config
        self.background = background
        self.rays = self.read_by(rays)
        sampler = PoseSampler(self.view_cameras(), config.pose_sampler)
        config.pose_sampler.kind = sampler.kind
        CONSOLE.print(f"Pseudo cameras: {sampler.kind} sampler.")

        def renderer(seed: int, cache_dir: Path | None) -> ViewRenderer:
            return ViewRenderer(
                teacher, sampler, survey, sampler.cameras.height, sampler.cameras.width, seed, cache_dir
            )

        seed = config.seed + self.local_rank
        # Photographs first: a capture that cannot be used must fail before the teacher has rendered for minutes.
        self.photographs: Any = None
        self.held_photographs: Batch | None = None
        if config.real_iterations > 0:
            kept, held = split_holdout(len(self.train_dataset), config.holdout_fraction)
            corrections = teacher.pose_corrections()
            self.photographs = self.read_photographs(kept, corrections)
            if len(self.photographs) == 0:
                CONSOLE.print("[yellow]No photo has a pixel outside its mask: learning from the teacher only.")
                self.photographs = None
            if held and self.photographs is not None:
                generator = torch.Generator().manual_seed(config.seed)
                watched = self.read_photographs(held, corrections)
                if len(watched):
                    self.held_photographs = self.hold_out(watched, generator)
                else:
                    CONSOLE.print("[yellow]No held-out photo has a pixel outside its mask: no figure against photos.")
        self._held_ring = ViewRing(renderer(seed + HOLDOUT_SEED_OFFSET, None), HOLDOUT_VIEWS, self.device)
        self._held_ring.fill()
        self.held_views = self.hold_out(self._held_ring, None)
        self.ring = ViewRing(renderer(seed, self._cache_dir(teacher, sampler)), config.num_views, self.device)
        self.ring.fill(None if config.fill_minutes is None else 60 * config.fill_minutes)
        self._training_seconds = 0.0
        self._last_call: float | None = None
        self._seconds_before = self.ring.renderer.seconds
        self._renderer_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        self._side_stream = torch.cuda.Stream(self.device) if torch.device(self.device).type == "cuda" else None
        self._next_view: Future[TeacherView] | None = None
        self._failures = 0

    @abstractmethod
    def read_photographs(self, indices: list[int], corrections: Float[Tensor, "num_train 3 4"] | None) -> Any:
        """Some training photographs, as this data manager draws from them.

        Args:
            indices: which.
            corrections: the teacher's pose corrections for all training views.

        Raises:
            InputError: if one cannot be used.
        """

    @abstractmethod
    def hold_out(self, source: Any, generator: torch.Generator | None) -> Batch:
        """A batch to watch, never to learn from.

        Args:
            source: a ring, or what `read_photographs` gave.
            generator: for a repeatable draw.
        """

    @abstractmethod
    def draw(self, num_real: int) -> Batch:
        """A batch to learn from, `num_real` of its `train_num_rays_per_batch` pixels from photographs."""

    def read_by(self, rays: StudentRays) -> StudentRays:
        """Return the rays that batches hold for a student that reads these."""
        return rays

    def restart(self, config: DistillationDataManagerConfig, rays: StudentRays) -> None:
        """Begin anew with the teacher views at hand, for another student.

        Args:
            config: what differs of it from the former one must not concern views and photographs.
            rays: which rays it reads; held-out photos keep the conventions that they were drawn for.
        """
        self.config = config
        self.photographs_now = False
        self.rays = self.read_by(rays)
        self.__dict__.pop("cells", None)
        self.held_views = self.hold_out(self._held_ring, None)

    def learn_from(self, batch: Batch, errors: Float[Tensor, "*batch"]) -> None:  # noqa: B027
        """Told after each iteration how wrong the student was, per pixel."""

    def _cache_dir(self, teacher: Teacher, sampler: PoseSampler) -> Path | None:
        """A folder per teacher, sampler and resolution: views of another kind are never mistaken for these."""
        if self.config.cache_dir is None:
            return None
        cameras = sampler.cameras
        digest = hashlib.sha256(f"{teacher.fingerprint()} {sampler.config} {cameras.width}x{cameras.height}".encode())
        for tensor in (cameras.camera_to_worlds, cameras.intrinsics):
            digest.update(tensor.numpy().tobytes())
        return self.config.cache_dir / digest.hexdigest()[:16]

    def next_batch(self, step: int) -> Batch:
        """A batch of rays with what is to be learnt of them.

        Args:
            step: training step.
        """
        self.train_count += 1
        self._refresh()
        real = self.photographs is not None and self.photographs_now
        return self.draw(int(self.config.real_fraction * self.get_train_rays_per_batch()) if real else 0)

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """As `next_batch`, in Nerfstudio's form."""
        return self.next_batch(step).as_nerfstudio()

    def _refresh(self) -> None:
        """Add a teacher view, in a full ring in place of the oldest, whenever the teacher's share of the time allows it.

        It is rendered in a thread of its own: no iteration waits for it.
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
        """Put a view into the ring; one that failed ends no training that has others to learn from."""
        try:
            self.ring.put(rendered.result())
            self._failures = 0
        except Exception as error:  # a method may raise anything, and a GPU's memory may be full for a moment
            self._failures += 1
            if self._failures == MOST_FAILURES:
                CONSOLE.print(
                    f"[bold yellow]No more teacher views, after {MOST_FAILURES} failures ({type(error).__name__}:"
                    f" {one_line(error)}): training goes on with the {len(self.ring)} there are.",
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
    """Nerfstudio's container for the same rays."""
    return RayBundle(origins=sample.origins, directions=sample.directions, pixel_area=torch.zeros_like(sample.weight))
