"""Crops of teacher views, and in the photo stage of photos: the data of students of ray images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.distillation.crops import Views, joined, sample_crops
from r2l_nerfstudio.distillation.datamanager import (
    Batch,
    DistillationDataManager,
    DistillationDataManagerConfig,
    to_ray_bundle,
)
from r2l_nerfstudio.distillation.photo_views import PhotoViews, photo_views
from r2l_nerfstudio.distillation.photos import Photos
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, PoseSamplerConfig
from r2l_nerfstudio.distillation.ray_sample import RaySample
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.ranges import FloatRange, IntRange
from r2l_nerfstudio.rays.ray_image import MARGIN, StudentRays

HELD_OUT_PIXELS = 32768


@dataclass
class CropDataManagerConfig(DistillationDataManagerConfig):
    """Supervision by crops: teacher views, then undistorted photos."""

    _target: type = field(default_factory=lambda: CropDataManager)
    pose_sampler: PoseSamplerConfig = field(
        default_factory=lambda: PoseSamplerConfig(focal_range=(1.0, 1.0), overscan=0.25)
    )
    """How cameras are sampled. They have one focal length: the student renders at the pitch it was trained at, and
    zooming out shows more of the scene, not the same at a coarser resolution."""
    crop_cells: Annotated[int, IntRange(1, 4096)] = 8
    """Cells along each side of a crop; fewer if a view has fewer."""
    whole_images: int = 0
    """Whole views per iteration instead of square crops, as published; then neither --train-num-rays-per-batch nor
    --crop-cells is used. 0: square crops."""
    single_ray_share: Annotated[float, FloatRange(0, 1)] = 0.0
    """Share of the training, at its start, on single rays of all views and photos instead of crops, for students with
    composited features. Single rays train the features and the layers that read them; the pixels of a crop share few
    features."""


class CropDataManager(DistillationDataManager):
    """Batches of square crops, all of one angular pitch."""

    config: CropDataManagerConfig
    in_single_ray_stage = False
    """Whether batches are of single rays."""
    photo_rays: Photos | None = None
    """Photos for the stage of single rays."""

    def begins_with_single_rays(self) -> bool:
        # Only pixels with rays of their own can be learned alone.
        has_pixels = self.rays.rays_per_cell == self.rays.factor
        return has_pixels and self.config.single_ray_share > 0

    def read_by(self, rays: StudentRays) -> StudentRays:
        # A crop from inside a view has neighbors, whatever the border of a whole image sees.
        return rays if self.config.whole_images else dataclasses.replace(rays, margin=max(rays.margin, MARGIN))

    def view_cameras(self) -> CaptureCameras:
        """Return them as pinholes of one focal length, the capture's median."""
        cameras = super().view_cameras()
        intrinsics = cameras.intrinsics.clone()
        intrinsics[:, :2] = intrinsics[
            :, :2
        ].median()  # If all are equal, exactly their value: cached views depend on it.
        return dataclasses.replace(cameras, intrinsics=intrinsics)

    @cached_property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of cells of a crop.

        Raises:
            InputError: if a view is smaller than one cell.
        """
        cameras = self.view_cameras()
        factor = self.rays.factor
        rows, columns = cameras.height // factor, cameras.width // factor
        if not self.config.whole_images:
            rows = columns = min(self.config.crop_cells, rows, columns)
        if min(rows, columns) < 1:
            raise InputError(
                f"Views of {cameras.width}x{cameras.height} pixels are smaller than one cell of {factor}x{factor}"
                " pixels: lower --pipeline.datamanager.view-downscale or --pipeline.model.upsampling-factor."
            )
        return rows, columns

    def read_photos(self, indices: list[int], corrections: Float[Tensor, "num_train 3 4"] | None) -> PhotoViews:
        cameras = self.view_cameras()
        size = (cameras.height, cameras.width)
        return photo_views(
            self.train_dataset, indices, cameras.intrinsics, size, corrections, self.background, self.device
        )

    def _read_photo_rays(self) -> None:
        if self.photos is None or not self.begins_with_single_rays():
            return
        conventions = self.rays.conventions
        if self.photo_rays is None:
            self.photo_rays = Photos(self.train_dataset, *self._photo_source, self.background, self.device, conventions)
        self.photo_rays.read_by(conventions)

    def note_progress(self, fraction: float, steps: int) -> None:
        super().note_progress(fraction, steps)
        is_early = fraction < self.config.single_ray_share
        self.in_single_ray_stage = self.begins_with_single_rays() and is_early and not self.in_photo_stage

    def hold_out(self, source: Views, generator: torch.Generator | None) -> Batch:
        return self._crops(source, HELD_OUT_PIXELS, generator)

    def draw(self, num_photo_pixels: int) -> Batch:
        """Draw crops of teacher views, then crops of photos; at first single rays of both."""
        if self.in_single_ray_stage:
            return self._single_rays()
        num_fresh = self.get_train_rays_per_batch() - num_photo_pixels
        fresh = self._crops(self.ring, num_fresh, foreground_fraction=self.config.foreground_fraction)
        return joined(fresh, self._crops(self.photos, num_photo_pixels)) if num_photo_pixels else fresh

    def _single_rays(self) -> Batch:
        total = self.get_train_rays_per_batch()
        # Photos from the start: they show more fine detail than the teacher, on the rays of their own lens.
        with_photos = self.photo_rays is not None and self.config.photo_iterations > 0
        num_photo_rays = int(self.config.photo_fraction * total) if with_photos else 0
        sample = self.ring.sample(total - num_photo_rays, None, self.config.foreground_fraction, self.rays.conventions)
        if num_photo_rays:
            assert self.photo_rays is not None
            sample = RaySample.from_records(torch.cat([sample.records(), self.photo_rays.draw(num_photo_rays)]))
        return Batch(to_ray_bundle(sample), sample)

    def _crops(
        self,
        source: Views,
        num_pixels: int,
        generator: torch.Generator | None = None,
        foreground_fraction: float = 0.0,
    ) -> Batch:
        rows, columns = self.cells
        num_crops = max(1, round(num_pixels / (rows * columns * self.rays.factor**2)))
        return sample_crops(
            source,
            num_crops,
            self.cells,
            self.rays.factor,
            generator,
            foreground_fraction,
            margin=self.rays.margin,
            rays_per_cell=self.rays.rays_per_cell,
            conventions=self.rays.conventions,
        )

    def get_train_rays_per_batch(self) -> int:
        """Pixels per iteration."""
        if not self.config.whole_images:
            return self.config.train_num_rays_per_batch
        rows, columns = self.cells
        return self.config.whole_images * rows * columns * self.rays.factor**2
