"""What one training step and one frame of a student take of a GPU, by running both on fake CUDA tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.optimizers import Optimizers
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from r2l_nerfstudio.distillation.averaging import WeightAverage
from r2l_nerfstudio.distillation.crop_datamanager import CropDataManagerConfig
from r2l_nerfstudio.distillation.crops import sample_crops
from r2l_nerfstudio.distillation.datamanager import Batch, to_ray_bundle
from r2l_nerfstudio.distillation.hard_rays import HardRayPool
from r2l_nerfstudio.distillation.ray_datamanager import RayDataManagerConfig
from r2l_nerfstudio.distillation.ray_sample import RECORD_WIDTH, RaySample
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.distillation.view_ring import BYTES_PER_PIXEL, ViewRenderer, ViewRing
from r2l_nerfstudio.engines.weights import FixedNetwork
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModel
from r2l_nerfstudio.models.r2l import R2LModel
from r2l_nerfstudio.planning.device_use import DeviceUse
from r2l_nerfstudio.planning.fake_cuda import fake_cuda
from r2l_nerfstudio.rays.spacing import SceneBounds

_RING = 4
"""Views in the ring that batches are drawn from here; the real one is counted apart."""


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes of a GPU."""

    peak_bytes: int
    """Beyond what is held all the time."""
    flops: int
    """Floating-point operations of matrix products and convolutions, a multiply-add counted as two."""
    traffic_bytes: int
    """Read and written, every operator on its own: a compiler that fuses them moves less."""
    kernels: int


@dataclass(frozen=True)
class StudentCost:
    """What a student takes of a GPU."""

    held_bytes: int
    """Held while training: weights, gradients' moments, the average of the weights, hard rays."""
    step: Cost
    """One training iteration."""
    frame: Cost
    """One frame of the teacher views' size, drawn in fp16."""


class StudentWork:
    """A student with random weights and teacher views without content, ready to train and draw on a device.

    Args:
        config: of a method, its batch and network as they would be trained; it is left as it is.
        width: of teacher views, in pixels.
        height: likewise.
        device: `cuda`, within `fake_cuda` or with a GPU; or `cpu`.
    """

    def __init__(self, config: DistillationTrainerConfig, width: int, height: int, device: str) -> None:
        config = copy.deepcopy(config)
        config.pipeline.model.fit_to(width, height)
        self.size = width, height
        self.device = device
        self.is_bf16 = config.pipeline.bf16
        self.model, self.fixed = _student(config.pipeline.model, width, device)
        ring = _ring(width, height, device)
        self.ring_bytes = ring.capacity * height * width * BYTES_PER_PIXEL
        self.draw = _drawer(config.pipeline.datamanager, self.model, ring)
        self.optimizers = Optimizers(config.optimizers, self.model.get_param_groups())
        decay = config.pipeline.ema_decay
        self.average = WeightAverage(self.model, decay) if decay > 0 else None

    def step(self) -> None:
        """One training iteration as `ns-train` runs it."""
        self.model.train()
        self.optimizers.zero_grad_all()
        # Nothing of the forward pass is named here: it has to be freed as the backward pass goes on.
        self._loss().backward()
        self.optimizers.optimizer_step_all()
        if self.average is not None:
            self.average.update()

    def _loss(self) -> Tensor:
        batch = self.draw()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.is_bf16):
            outputs = self.model(batch.ray_bundle)
        _, truth = batch.as_nerfstudio()
        return torch.stack([*self.model.get_loss_dict(outputs, truth).values()]).sum()

    @torch.no_grad()
    def frame(self) -> Tensor:
        """The network's numbers for every pixel of a frame of the teacher views' size."""
        width, height = self.size
        intrinsics = torch.tensor([width, width, width / 2, height / 2], device=self.device)
        pose = torch.eye(3, 4, device=self.device)
        if isinstance(self.model, MobileR2LModel):
            return self.model._draw(pose, intrinsics, height, width, spill=1)
        model = cast(R2LModel, self.model)
        return model.render_rays(*model.ray_encoding.image_rays(pose, intrinsics, height, width))


def student_cost(config: DistillationTrainerConfig, width: int, height: int) -> StudentCost:
    """Run two training steps and a frame of a student on fake CUDA tensors. Seconds; needs no GPU.

    Args:
        config: of a method, its batch and network as they would be trained.
        width: of teacher views, in pixels.
        height: likewise.
    """
    with fake_cuda(), DeviceUse() as use:
        work = StudentWork(config, width, height, "cuda")
        work.step()  # makes the optimizers' state
        work.optimizers.zero_grad_all()
        held = use.bytes
        use.restart()
        work.step()
        step = _since(use, held)
        work.optimizers.zero_grad_all()
        work.model.eval()
        before = use.bytes
        use.restart()
        with work.model.drawn_by(work.fixed):
            work.frame()
        return StudentCost(held - work.ring_bytes, step, _since(use, before))


def _since(use: DeviceUse, held: int) -> Cost:
    return Cost(use.peak_bytes - held, use.flops, use.traffic_bytes, use.kernels)


def _student(config: Any, width: int, device: str) -> tuple[LightFieldModel, FixedNetwork]:
    """A student of an unbounded scene, in which every ray meets something, with as many features as it may have; and what
    draws with it."""
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    with _disable_current_modes():  # an empty volume asks how many rows it has
        model = config.setup(scene_box=box, num_train_data=1, metadata={})
        fixed = FixedNetwork(model.network, "fp16")
    model, fixed = model.to(device), fixed.to(device)
    kind = "near-far" if config.published_rays else "disparity"
    bounds = SceneBounds(kind, (0.0, 0.0, 0.0), 1.0, 0.1, 10.0)
    model.set_scene(bounds, torch.eye(3), torch.ones(3), True, True, float(width))
    encoding = model.composited
    if encoding is not None:
        encoding.occupancy.scene.warp = "contracted"
        encoding.occupancy.clear((config.occupancy_cells,) * 3)
        side = 4 * config.occupancy_cells
        volume = encoding.volume
        volume.index = torch.zeros(side, side, side, dtype=torch.int32, device=device)
        rows = torch.zeros(config.max_grid_points + 1, 1 + volume.channels, device=device)
        volume.rows = torch.nn.Parameter(rows)
    return model, fixed


def _ring(width: int, height: int, device: str) -> ViewRing:
    ring = ViewRing(cast(ViewRenderer, SimpleNamespace(width=width, height=height)), _RING, device)
    ring.pixels.fill_(200)
    ring.depth.fill_(1.0)
    ring.camera_to_worlds.copy_(torch.eye(3, 4, device=device))
    ring.intrinsics.copy_(torch.tensor([width, width, width / 2, height / 2], device=device))
    ring._filled = ring.capacity
    return ring


def _drawer(data: Any, model: LightFieldModel, ring: ViewRing) -> Callable[[], Batch]:
    """How the data manager of a configuration draws a batch of teacher views."""
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
