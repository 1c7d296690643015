"""R2L's data: single rays of teacher views, hard rays, and in the photo stage rays of photos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.distillation.datamanager import (
    Batch,
    DistillationDataManager,
    DistillationDataManagerConfig,
    to_ray_bundle,
)
from r2l_nerfstudio.distillation.hard_rays import HardRayPool
from r2l_nerfstudio.distillation.photos import Photos
from r2l_nerfstudio.distillation.ray_sample import RECORD_WIDTH, RaySample
from r2l_nerfstudio.distillation.view_ring import ViewRing
from r2l_nerfstudio.ranges import FloatRange, IntRange
from r2l_nerfstudio.rays.ray_image import StudentRays

HELD_OUT_RAYS = 8192


@dataclass
class RayDataManagerConfig(DistillationDataManagerConfig):
    """Supervision ray by ray: teacher views, hard rays, then photos."""

    _target: type = field(default_factory=lambda: RayDataManager)
    hard_fraction: Annotated[float, FloatRange(0, 1)] = 0.2
    """Share of every batch drawn from the rays with the largest errors so far."""
    hard_pool_batches: Annotated[int, IntRange(1, 10**6)] = 20
    """Iterations whose hard rays are kept."""
    published_hard_rays: bool = False
    """Use hard rays as the published code does: none until the pool is full, then the worst of all rays of a batch, old
    hard ones included, replace those just drawn."""


class RayDataManager(DistillationDataManager):
    """Batches of single rays."""

    config: RayDataManagerConfig

    def restart(self, config: DistillationDataManagerConfig, rays: StudentRays) -> None:
        super().restart(config, rays)
        if self.photos is not None:
            self.photos.read_by(rays.conventions)

    def _begin(self) -> None:
        num_hard = int(self.config.hard_fraction * self.config.train_num_rays_per_batch)
        waits = self.config.published_hard_rays
        self.hard_rays = HardRayPool(num_hard, self.config.hard_pool_batches, RECORD_WIDTH, self.device, waits)

    def read_photos(self, indices: list[int], corrections: Float[Tensor, "num_train 3 4"] | None) -> Photos:
        return Photos(self.train_dataset, indices, corrections, self.background, self.device, self.rays.conventions)

    def hold_out(self, source: Photos | ViewRing, generator: torch.Generator | None) -> Batch:
        if isinstance(source, ViewRing):
            sample = source.sample(HELD_OUT_RAYS, generator, conventions=self.rays.conventions)
        else:
            sample = source.sample(HELD_OUT_RAYS, generator)
        return Batch(to_ray_bundle(sample), sample)

    def draw(self, num_photo_pixels: int) -> Batch:
        """Draw new rays of teacher views first, then hard rays, then rays of photos."""
        total = self.config.train_num_rays_per_batch
        num_hard = self.hard_rays.available
        if num_photo_pixels:
            num_hard = int(num_hard * (1 - self.config.photo_fraction))
        fresh = total - num_hard - num_photo_pixels
        if self.config.published_hard_rays:  # Until the pool is full its share of the batch is left out.
            fresh = min(fresh, total - self.hard_rays.per_step)
        parts = [
            self.ring.sample(fresh, None, self.config.foreground_fraction, self.rays.conventions).records(),
            self.hard_rays.draw(num_hard),
        ]
        if num_photo_pixels:
            parts.append(self.photos.draw(num_photo_pixels))
        sample = RaySample.from_records(torch.cat(parts))
        return Batch(to_ray_bundle(sample), sample, fresh)

    def learn_from(self, batch: Batch, errors: Float[Tensor, "rays"]) -> None:
        """Put the worst of a batch's new rays, or as published of all its rays, into the pool (R2L, sec. 3.3)."""
        count = len(errors) if self.config.published_hard_rays else batch.fresh
        self.hard_rays.add(batch.target.records()[:count], errors[:count])
