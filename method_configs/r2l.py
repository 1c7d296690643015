"""R2L: a trained Nerfstudio model as one network evaluation per pixel."""

from __future__ import annotations

from nerfstudio.plugins.types import MethodSpecification
from r2l_nerfstudio.method_configs.common import student_config

from r2l_nerfstudio.distillation.ray_datamanager import RayDataManagerConfig
from r2l_nerfstudio.models.r2l import R2LModelConfig

r2l = MethodSpecification(
    config=student_config(
        "r2l",
        RayDataManagerConfig(train_num_rays_per_batch=32768),
        R2LModelConfig(),
        max_num_iterations=30000,
    ),
    description="R2L: distil --teacher into a neural light field, one network evaluation per pixel.",
)

r2l_lite = MethodSpecification(
    config=student_config(
        "r2l-lite",
        RayDataManagerConfig(train_num_rays_per_batch=4096),
        R2LModelConfig(width=128, depth=12, num_frequencies=6, jitter_points=False, volume_resolution=40),
        max_num_iterations=20000,
    ),
    description="R2L, a tenth of the size, with a small learned feature volume: minutes on a CPU, interactive there.",
)
