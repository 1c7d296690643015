"""R2L: a trained Nerfstudio model as one network evaluation per pixel."""

from __future__ import annotations

from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.plugins.types import MethodSpecification

from r2l_nerfstudio.distillation.datamanager import DistillationDataManagerConfig
from r2l_nerfstudio.distillation.optimization import MuonOptimizerConfig, WarmupCosineSchedulerConfig
from r2l_nerfstudio.distillation.pipeline import DistillationPipelineConfig
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.models.r2l import R2LModelConfig


def r2l_config(
    method_name: str, model: R2LModelConfig, max_num_iterations: int, rays_per_batch: int
) -> DistillationTrainerConfig:
    """The parts that every R2L variant shares."""
    return DistillationTrainerConfig(
        method_name=method_name,
        max_num_iterations=max_num_iterations,
        steps_per_save=1000,
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        mixed_precision=False,  # the pipeline's own bf16 instead
        pipeline=DistillationPipelineConfig(
            datamanager=DistillationDataManagerConfig(train_num_rays_per_batch=rays_per_batch),
            model=model,
        ),
        optimizers={
            "hidden": {"optimizer": MuonOptimizerConfig(lr=2e-3), "scheduler": WarmupCosineSchedulerConfig()},
            "volume": {
                "optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15),
                "scheduler": WarmupCosineSchedulerConfig(),
            },
            "ends": {"optimizer": AdamOptimizerConfig(lr=1e-3, eps=1e-8), "scheduler": WarmupCosineSchedulerConfig()},
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 16, default_composite_depth=False),
        vis="viewer",
    )


r2l = MethodSpecification(
    config=r2l_config("r2l", R2LModelConfig(), max_num_iterations=30000, rays_per_batch=32768),
    description="R2L: distil --teacher into a neural light field, one network evaluation per pixel.",
)

r2l_lite = MethodSpecification(
    config=r2l_config(
        "r2l-lite",
        R2LModelConfig(width=128, depth=12, num_frequencies=6, jitter_points=False, volume_resolution=40),
        max_num_iterations=20000,
        rays_per_batch=4096,
    ),
    description="R2L, a tenth of the size, with a small learned feature volume: minutes on a CPU, interactive there.",
)
