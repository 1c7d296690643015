"""MobileR2L: distil a trained Nerfstudio model into a network on a low-resolution ray image, with upsampling."""

from __future__ import annotations

from nerfstudio.plugins.types import MethodSpecification

from r2l_nerfstudio.distillation.crop_datamanager import CropDataManagerConfig
from r2l_nerfstudio.distillation.pose_sampling import PoseSamplerConfig
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModelConfig

from .common import our_optimizers, published_optimizers, small_optimizers, student_config

mobile_r2l = MethodSpecification(
    config=student_config(
        "mobile-r2l",
        CropDataManagerConfig(train_num_rays_per_batch=1 << 20, crop_cells=16),
        # 9 fewer blocks than the paper leave room for features in its 8.7 MB.
        MobileR2LModelConfig(ray_encoding="composited", blocks=20, max_grid_points=240_000),
        max_num_iterations=30000,
        optimizers=our_optimizers(ends=2e-3),
        ema_decay=0.995,
    ),
    description="MobileR2L: distil --teacher into an 8 MB convolutional student, fast enough for phones.",
)

mobile_r2l_lite = MethodSpecification(
    config=student_config(
        "mobile-r2l-lite",
        CropDataManagerConfig(
            train_num_rays_per_batch=8192,
            crop_cells=6,
            single_ray_share=0.6,
            pose_sampler=PoseSamplerConfig(focal_range=(1.0, 1.0), overscan=0.25, zoomed_share=0.5),
        ),
        MobileR2LModelConfig(
            ray_encoding="composited",
            width=64,
            blocks=2,
            up_width=16,
            join_blocks=2,
            feature_channels=3,
            max_grid_points=120_000,
            pixel_samples=24,
        ),
        max_num_iterations=20000,
        optimizers=small_optimizers(),
        ema_decay=0.99,
    ),
    description="MobileR2L, a fifth of the size, with composited features: interactive on a CPU.",
)

mobile_r2l_paper = MethodSpecification(
    config=student_config(
        "mobile-r2l-paper",
        CropDataManagerConfig(
            train_num_rays_per_batch=10 * 800 * 800,
            whole_images=10,
            pose_sampler=PoseSamplerConfig(focal_range=(1.0, 1.0)),
            photo_iterations=0,
            foreground_fraction=0.0,
        ),
        MobileR2LModelConfig(
            spacing="near-far",
            published_rays=True,
            color_only=True,
            margin=0,
            accumulation_weight=0.0,
            depth_weight=0.0,
        ),
        max_num_iterations=600_000,
        optimizers=published_optimizers(weight_decay=0.01, decay_steps=500_000),
        sync_batch_norm=True,
    ),
    description="MobileR2L as published (CVPR 2023), for comparison: days of training on several GPUs.",
)
