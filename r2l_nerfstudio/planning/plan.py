"""Whether a training fits a GPU, how many teacher views beside it, and about how many iterations a time allows."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.models.base_model import ModelConfig

from r2l_nerfstudio.distillation.crop_datamanager import CropDataManagerConfig
from r2l_nerfstudio.distillation.trainer import VIEWS_SHARE, DistillationTrainerConfig
from r2l_nerfstudio.distillation.view_ring import BYTES_PER_PIXEL, affordable_views
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.lpips import without_lpips
from r2l_nerfstudio.planning.cost import Cost, StudentCost, student_cost
from r2l_nerfstudio.planning.device_use import DeviceUse
from r2l_nerfstudio.planning.fake_cuda import fake_cuda

USABLE = 0.94
"""Of a GPU's memory: the rest belongs to its driver, and to a desktop."""
CONTEXT_BYTES = 700 << 20
"""CUDA's context, its libraries and their workspaces."""
FRAGMENTATION = 1.15
"""What an allocator reserves per byte of tensors that come and go."""
LEAST_VIEWS = 20
UNKNOWN_TEACHER_BYTES = 2 << 30
"""For a teacher that cannot be run on fake tensors, such as a splat."""
SHARE_OF_PEAK = 0.45
"""Of a GPU's matrix products per second, that a network's own shapes may reach."""
SHARE_OF_BANDWIDTH = 0.7
SECONDS_PER_KERNEL = 6e-6
"""To launch one: below that a GPU waits for its host."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    name: str
    gigabytes: float
    """Memory, in 2**30 bytes."""
    tflops: float
    """Matrix products in bf16, summed in fp32, without sparsity."""
    gb_per_second: float
    """Memory bandwidth."""

    @property
    def usable_bytes(self) -> int:
        """Bytes that a program can allocate."""
        return int(USABLE * self.gigabytes * 2**30)


GPUS = (
    Gpu("RTX 3070", 8, 40.6, 448),
    Gpu("RTX 3060", 12, 25.5, 360),
    Gpu("RTX 4090", 24, 165.2, 1008),
    Gpu("H100", 80, 989.0, 3350),
)
"""One for each size, by NVIDIA's data sheets."""


@dataclass(frozen=True)
class Capture:
    """What of a capture decides about memory."""

    width: int
    """Of a photo, in pixels."""
    height: int
    photos: int


@dataclass(frozen=True)
class TrainingPlan:
    """What a training takes of a GPU, in bytes, and about how far it comes."""

    gpu: Gpu
    pixels_per_step: int
    teacher_views: int
    """In the ring."""
    view_size: tuple[int, int]
    """Width and height in pixels."""
    ring_bytes: int
    photo_bytes: int
    teacher_bytes: int
    """Weights, and a chunk of rays while it renders."""
    student: StudentCost
    seconds_per_step: float
    iterations: int
    minutes: float

    @property
    def total_bytes(self) -> int:
        """At the peak of training, with a viewer open."""
        fixed = CONTEXT_BYTES + self.teacher_bytes + self.student.held_bytes + self.photo_bytes + self.ring_bytes
        return fixed + working_bytes(self.student)


def working_bytes(student: StudentCost) -> int:
    """Of a training step, or of a frame that a viewer draws between two of them."""
    return int(FRAGMENTATION * max(student.step.peak_bytes, student.frame.peak_bytes))


def make_plan(
    config: DistillationTrainerConfig,
    capture: Capture,
    gpu: Gpu,
    minutes: float,
    teacher_bytes: int,
    student: StudentCost | None = None,
) -> TrainingPlan:
    """Plan a training.

    Args:
        config: of the method, with its options.
        capture: to learn from.
        gpu: to train on.
        minutes: of training, teacher views included.
        teacher_bytes: of `teacher_bytes`.
        student: of `student_cost`, if it is known.

    Raises:
        InputError: if it cannot fit, with the flag to lower.
    """
    data = config.pipeline.datamanager
    width, height = (max(1, round(side / data.view_downscale)) for side in (capture.width, capture.height))
    student = student or student_cost(config, width, height)
    is_crops = isinstance(data, CropDataManagerConfig)
    photo_bytes = 0
    if data.photo_iterations:
        of_crops = 4 * width * height if is_crops else 0
        of_rays = 3 * capture.width * capture.height if not is_crops or data.single_ray_share > 0 else 0
        photo_bytes = capture.photos * (of_crops + of_rays)
    view_bytes = width * height * BYTES_PER_PIXEL
    fixed = CONTEXT_BYTES + teacher_bytes + student.held_bytes + photo_bytes + working_bytes(student)
    # As the ring itself decides during training.
    views = min(data.num_views, affordable_views(gpu.usable_bytes, fixed, width, height))
    if views < min(LEAST_VIEWS, data.num_views):
        raise InputError(_refusal(config, student, gpu, (width, height), fixed, view_bytes))
    seconds = step_seconds(student.step, gpu)
    return TrainingPlan(
        gpu=gpu,
        pixels_per_step=pixels_per_step(config, width, height),
        teacher_views=views,
        view_size=(width, height),
        ring_bytes=views * view_bytes,
        photo_bytes=photo_bytes,
        teacher_bytes=teacher_bytes,
        student=student,
        seconds_per_step=seconds,
        iterations=int(60 * minutes * (1 - VIEWS_SHARE) / seconds),
        minutes=minutes,
    )


def _refusal(
    config: DistillationTrainerConfig,
    student: StudentCost,
    gpu: Gpu,
    size: tuple[int, int],
    fixed: int,
    view_bytes: int,
) -> str:
    data = config.pipeline.datamanager
    needed = fixed + int(1.25 * min(LEAST_VIEWS, data.num_views) * view_bytes)  # The ring leaves a fifth free.
    what = (
        f"{config.method_name} takes {needed / 2**30:.1f} GiB at {size[0]}x{size[1]} pixels, and of a GPU of"
        f" {gpu.gigabytes:g} GiB {gpu.usable_bytes / 2**30:.1f} can be used"
    )
    working = working_bytes(student)
    room = gpu.usable_bytes - (needed - working)
    whole_images = getattr(data, "whole_images", 0)
    share = room / working if student.step.peak_bytes >= student.frame.peak_bytes else 0.0
    if whole_images and share * whole_images >= 1:
        flag = f"--pipeline.datamanager.whole-images to {int(share * whole_images)} (now {whole_images})"
    elif not whole_images and share * data.train_num_rays_per_batch >= 1024:
        lower = int(share * data.train_num_rays_per_batch) // 1024 * 1024
        flag = f"--pipeline.datamanager.train-num-rays-per-batch to {lower} (now {data.train_num_rays_per_batch})"
    else:
        factor = math.ceil(10 * math.sqrt(needed / gpu.usable_bytes)) / 10
        return (
            f"{what}: make views smaller with --pipeline.datamanager.view-downscale {data.view_downscale * factor:.1f}."
        )
    return f"{what}: lower {flag}."


def pixels_per_step(config: DistillationTrainerConfig, width: int, height: int) -> int:
    """Pixels of one training iteration on views of this size."""
    data = config.pipeline.datamanager
    return getattr(data, "whole_images", 0) * width * height or data.train_num_rays_per_batch


def step_seconds(step: Cost, gpu: Gpu) -> float:
    """Estimate of the time of a training step: the slowest of arithmetic, memory traffic and launches."""
    return max(
        step.flops / (SHARE_OF_PEAK * gpu.tflops * 1e12),
        step.traffic_bytes / (SHARE_OF_BANDWIDTH * gpu.gb_per_second * 1e9),
        step.kernels * SECONDS_PER_KERNEL,
    )


def teacher_bytes(config: ModelConfig, photos: int) -> int:
    """Bytes of a teacher and of a chunk of rays that it renders, by running it on fake CUDA tensors.

    Args:
        config: of its model. Of nerfacto its PyTorch implementation counts, which takes more than tiny-cuda-nn's.
        photos: training photos, for each of which it may hold an embedding.

    Returns:
        `UNKNOWN_TEACHER_BYTES` for models that cannot be run on fake tensors.
    """
    try:
        return _teacher_bytes(config, photos)
    except Exception:  # a method's own code may do anything
        return UNKNOWN_TEACHER_BYTES


@torch.no_grad()
def _teacher_bytes(config: Any, photos: int) -> int:
    config = copy.deepcopy(config)
    if hasattr(config, "implementation"):
        config.implementation = "torch"
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    with without_lpips():
        model = config.setup(
            scene_box=box, num_train_data=photos, metadata={}, device="cpu", grad_scaler=None, seed_points=None
        )
    with fake_cuda(), DeviceUse() as use:
        model = model.to("cuda").eval()
        held = use.bytes
        use.restart()
        rays = config.eval_num_rays_per_chunk
        origins = torch.zeros(rays, 3, device="cuda")
        bundle = RayBundle(
            origins=origins,
            directions=torch.ones_like(origins),
            pixel_area=torch.ones(rays, 1, device="cuda"),
            camera_indices=torch.zeros(rays, 1, dtype=torch.long, device="cuda"),
        )
        model(bundle)
        return held + int(FRAGMENTATION * (use.peak_bytes - held))
