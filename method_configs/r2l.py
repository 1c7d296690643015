"""R2L: distil a trained Nerfstudio model into one network evaluation per pixel."""

from __future__ import annotations

from nerfstudio.plugins.types import MethodSpecification

from r2l_nerfstudio.distillation.pose_sampling import PoseSamplerConfig
from r2l_nerfstudio.distillation.ray_datamanager import RayDataManagerConfig
from r2l_nerfstudio.models.r2l import R2LModelConfig

from .common import our_optimizers, published_optimizers, small_optimizers, student_config

r2l = MethodSpecification(
    config=student_config(
        "r2l",
        RayDataManagerConfig(train_num_rays_per_batch=32768),
        # 24 fewer layers than the paper leave room for features in its 12 MB.
        R2LModelConfig(ray_encoding="composited", depth=64, max_grid_points=370_000),
        max_num_iterations=30000,
        optimizers=our_optimizers(),
    ),
    description="R2L: distil --teacher into a neural light field, one network evaluation per pixel.",
)

r2l_lite = MethodSpecification(
    config=student_config(
        "r2l-lite",
        RayDataManagerConfig(train_num_rays_per_batch=2048, hard_fraction=0.0),
        R2LModelConfig(ray_encoding="composited", width=128, depth=6),
        max_num_iterations=30000,
        optimizers=small_optimizers(),
    ),
    description="R2L, a fifth of the size, with composited features: trains on a CPU in minutes, interactive there.",
)

r2l_paper = MethodSpecification(
    config=student_config(
        "r2l-paper",
        RayDataManagerConfig(
            train_num_rays_per_batch=98304,
            pose_sampler=PoseSamplerConfig(focal_range=(1.0, 2.0)),
            photo_iterations=1000,
            photo_fraction=1.0,
            foreground_fraction=0.0,
            hard_fraction=1 / 6,  # 16,384 of 98,304
            hard_pool_batches=100,
            published_hard_rays=True,
        ),
        R2LModelConfig(
            zero_init=False,
            spacing="near-far",
            published_rays=True,
            color_only=True,
            accumulation_weight=0.0,
            depth_weight=0.0,
        ),
        max_num_iterations=600_000,
        optimizers=published_optimizers(),
        bf16=False,
    ),
    description="R2L as published (ECCV 2022), for comparison: days of training.",
)
