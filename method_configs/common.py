"""What every student's method has in common."""

from __future__ import annotations

from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig

from r2l_nerfstudio.distillation.datamanager import DistillationDataManagerConfig
from r2l_nerfstudio.distillation.optimization import MuonOptimizerConfig, WarmupCosineSchedulerConfig
from r2l_nerfstudio.distillation.pipeline import DistillationPipelineConfig
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.models.light_field import LightFieldModelConfig


def student_config(
    method_name: str,
    datamanager: DistillationDataManagerConfig,
    model: LightFieldModelConfig,
    max_num_iterations: int,
    ends_lr: float = 1e-3,
    ema_decay: float = 0.0,
) -> DistillationTrainerConfig:
    """A method's configuration for `ns-train`."""
    return DistillationTrainerConfig(
        method_name=method_name,
        max_num_iterations=max_num_iterations,
        steps_per_save=1000,
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        mixed_precision=False,  # the pipeline's own bf16 instead
        pipeline=DistillationPipelineConfig(datamanager=datamanager, model=model, ema_decay=ema_decay),
        optimizers={
            "hidden": {"optimizer": MuonOptimizerConfig(lr=2e-3), "scheduler": WarmupCosineSchedulerConfig()},
            "volume": {
                "optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15),
                "scheduler": WarmupCosineSchedulerConfig(),
            },
            "ends": {
                "optimizer": AdamOptimizerConfig(lr=ends_lr, eps=1e-8),
                "scheduler": WarmupCosineSchedulerConfig(),
            },
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 16, default_composite_depth=False),
        vis="viewer",
    )
