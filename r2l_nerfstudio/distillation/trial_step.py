"""A training step on views without content: what it takes of a GPU decides how many teacher views fit beside it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from nerfstudio.data.scene_box import SceneBox
from torch import Tensor
from torch.cuda import OutOfMemoryError

from r2l_nerfstudio.distillation.crop_datamanager import CropDataManagerConfig
from r2l_nerfstudio.distillation.crops import sample_crops
from r2l_nerfstudio.distillation.datamanager import Batch, DistillationDataManagerConfig, to_ray_bundle
from r2l_nerfstudio.distillation.hard_rays import HardRayPool
from r2l_nerfstudio.distillation.ray_datamanager import RayDataManagerConfig
from r2l_nerfstudio.distillation.ray_sample import RECORD_WIDTH, RaySample
from r2l_nerfstudio.distillation.view_ring import ViewRenderer, ViewRing
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.light_field import LightFieldModel, LightFieldModelConfig
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModel
from r2l_nerfstudio.models.r2l import R2LModel
from r2l_nerfstudio.rays.spacing import SceneBounds

_VIEWS = 4
_COPIES_OF_WEIGHTS = 3
"""Adam's two moments, and the average of the weights."""


class TrialStep:
    """A student and teacher views without content, ready for forward passes of a training and for frames.

    Args:
        model: student of `blank_model`, on its device.
        data: the data manager's configuration, its batch as it would be trained.
        width: width of teacher views in pixels.
        height: height of teacher views in pixels.
        is_bf16: whether the network runs in bfloat16.
    """

    def __init__(
        self, model: LightFieldModel, data: DistillationDataManagerConfig, width: int, height: int, is_bf16: bool
    ) -> None:
        self.model = model
        self.size = width, height
        self.device = model.device
        self.is_bf16 = is_bf16
        set_blank_scene(model, width)
        self.ring = _ring(width, height, self.device)
        self.draw = _drawer(data, model, self.ring)
        self.draw_single_rays = _single_ray_drawer(data, model, self.ring)
        """None if the training has no stage of them."""

    def loss(self, draw: Callable[[], Batch] | None = None) -> Tensor:
        """Return the loss of a batch, ready for its backward pass.

        Args:
            draw: draws it; `self.draw` by default.
        """
        batch = (draw or self.draw)()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            outputs = self.model(batch.ray_bundle)
        _, truth = batch.as_nerfstudio()
        return torch.stack([*self.model.get_loss_dict(outputs, truth).values()]).sum()

    @torch.no_grad()
    def frame(self) -> Tensor:
        """Return the network's numbers for every pixel of a frame of the teacher views' size."""
        width, height = self.size
        intrinsics = torch.tensor([width, width, width / 2, height / 2], device=self.device)
        pose = torch.eye(3, 4, device=self.device)
        if isinstance(self.model, MobileR2LModel):
            return self.model._draw(pose, intrinsics, height, width, spill=1)
        model = cast(R2LModel, self.model)
        return model.render_rays(*model.ray_encoding.image_rays(pose, intrinsics, height, width))


def training_bytes(config: Any, width: int, height: int, device: torch.device) -> int:
    """Return the bytes that a training allocates on a GPU beside its teacher views, by running a step and a frame.

    What the teacher took to render so far counts too, since it renders on during training.

    Args:
        config: configuration of the pipeline.
        width: width of teacher views in pixels.
        height: height of teacher views in pixels.
        device: the GPU.

    Raises:
        InputError: the step does not fit.
    """
    rendering = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    data = config.datamanager
    try:
        trial = TrialStep(blank_model(config.model).to(device), data, width, height, config.bf16)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in trial.model.parameters())
        trial.model.train()
        trial.loss().backward()
        if trial.draw_single_rays is not None:
            trial.loss(trial.draw_single_rays).backward()
        trial.model.eval()
        trial.frame()
    except OutOfMemoryError as error:
        is_images = bool(getattr(data, "whole_images", 0))
        flag = "whole-images" if is_images else "train-num-rays-per-batch"
        now = data.whole_images if is_images else data.train_num_rays_per_batch
        raise InputError(
            f"A training step does not fit {device}: lower --pipeline.datamanager.{flag} (now {now}); r2l-plan finds"
            " what fits."
        ) from error
    found = torch.cuda.max_memory_allocated(device) - before
    del trial
    gc.collect()
    torch.cuda.empty_cache()
    return rendering + found + _COPIES_OF_WEIGHTS * weights


def blank_model(config: LightFieldModelConfig) -> LightFieldModel:
    """Return a student with random weights."""
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    return config.setup(scene_box=box, num_train_data=1, metadata={})


def set_blank_scene(model: LightFieldModel, width: int) -> None:
    """Give a student an unbounded scene, in which every ray meets something, with as many features as it may have."""
    config = model.config
    kind = "near-far" if config.published_rays else "disparity"
    bounds = SceneBounds(kind, (0.0, 0.0, 0.0), 1.0, 0.1, 10.0)
    model.set_scene(bounds, torch.eye(3), torch.ones(3), True, True, float(width))
    encoding = model.composited
    if encoding is None:
        return
    encoding.occupancy.scene.warp = "contracted"
    cells = config.occupancy_cells
    encoding.occupancy.clear((cells, cells, cells))
    side = 4 * cells
    volume = encoding.volume
    volume.index = torch.zeros(side, side, side, dtype=torch.int32, device=model.device)
    rows = torch.zeros(config.max_grid_points + 1, 1 + volume.channels, device=model.device)
    volume.rows = torch.nn.Parameter(rows)


def _ring(width: int, height: int, device: torch.device) -> ViewRing:
    ring = ViewRing(cast(ViewRenderer, SimpleNamespace(width=width, height=height)), _VIEWS, device)
    ring.pixels.fill_(200)
    ring.depth.fill_(1.0)
    ring.camera_to_worlds.copy_(torch.eye(3, 4, device=device))
    ring.intrinsics.copy_(torch.tensor([width, width, width / 2, height / 2], device=device))
    ring._filled = ring.capacity
    return ring


def _drawer(data: Any, model: LightFieldModel, ring: ViewRing) -> Callable[[], Batch]:
    """Return what draws a batch of teacher views as the data manager of a configuration does."""
    conventions = model.ray_encoding.conventions
    if isinstance(data, RayDataManagerConfig):
        total = data.train_num_rays_per_batch
        pool = HardRayPool(int(data.hard_fraction * total), data.hard_pool_batches, RECORD_WIDTH, ring.device)
        pool._filled = len(pool._records)

        def draw_rays() -> Batch:
            fresh = ring.sample(total - pool.per_step, None, data.foreground_fraction, conventions).records()
            sample = RaySample.from_records(torch.cat([fresh, pool.draw(pool.per_step)]))
            return Batch(to_ray_bundle(sample), sample, total - pool.per_step)

        return draw_rays
    assert isinstance(data, CropDataManagerConfig)
    rows, columns = ring.height // model.factor, ring.width // model.factor
    if data.whole_images:
        count = data.whole_images
    else:
        rows = columns = min(data.crop_cells, rows, columns)
        count = max(1, round(data.train_num_rays_per_batch / (rows * columns * model.factor**2)))
    margin = model.margin if data.whole_images else max(model.margin, 1)
    model.crop_margin = margin

    def draw_crops() -> Batch:
        return sample_crops(
            ring, count, (rows, columns), model.factor, None, data.foreground_fraction, margin, conventions,
            model.rays_per_cell,
        )  # fmt: skip

    return draw_crops


def _single_ray_drawer(data: Any, model: LightFieldModel, ring: ViewRing) -> Callable[[], Batch] | None:
    """Return what draws the single rays of a student of ray images, if it learns from any."""
    is_first = isinstance(data, CropDataManagerConfig) and data.single_ray_share > 0
    if not is_first or model.composited is None:
        return None

    def draw() -> Batch:
        sample = ring.sample(data.train_num_rays_per_batch, None, data.foreground_fraction)
        return Batch(to_ray_bundle(sample), sample)

    return draw
