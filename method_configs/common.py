"""Settings that all methods share."""

from __future__ import annotations

from typing import Any

from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig, OptimizerConfig
from torch.optim import Adam, AdamW

from r2l_nerfstudio.distillation.datamanager import DistillationDataManagerConfig
from r2l_nerfstudio.distillation.optimization import (
    MuonOptimizerConfig,
    PublishedSchedulerConfig,
    WarmupCosineSchedulerConfig,
)
from r2l_nerfstudio.distillation.pipeline import DistillationPipelineConfig
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.models.light_field import LightFieldModelConfig


def student_config(
    method_name: str,
    datamanager: DistillationDataManagerConfig,
    model: LightFieldModelConfig,
    max_num_iterations: int,
    optimizers: dict[str, Any],
    ema_decay: float = 0.0,
    bf16: bool = True,
    sync_batch_norm: bool = False,
) -> DistillationTrainerConfig:
    """Return a method's configuration for `ns-train`."""
    return DistillationTrainerConfig(
        method_name=method_name,
        max_num_iterations=max_num_iterations,
        steps_per_save=1000,
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        mixed_precision=False,  # The pipeline's bf16 is used instead.
        pipeline=DistillationPipelineConfig(
            datamanager=datamanager, model=model, ema_decay=ema_decay, bf16=bf16, sync_batch_norm=sync_batch_norm
        ),
        optimizers=optimizers,
        viewer=ViewerConfig(num_rays_per_chunk=1 << 16, default_composite_depth=False),
        vis="viewer",
    )


def our_optimizers(
    hidden: float = 2e-3, ends: float = 1e-3, volume: float = 1e-2, warmup_steps: int = 200
) -> dict[str, Any]:
    """Return Muon for the hidden matrices, Adam for the rest, with half a cosine.

    Args:
        hidden: learning rate of the matrices between hidden layers.
        ends: learning rate of the network's other weights.
        volume: learning rate of the features in space.
        warmup_steps: iterations of warm-up.
    """
    optimizers: dict[str, OptimizerConfig] = {
        "hidden": MuonOptimizerConfig(lr=hidden),
        "volume": AdamOptimizerConfig(lr=volume, eps=1e-15),
        "ends": AdamOptimizerConfig(lr=ends, eps=1e-8),
    }
    return {
        group: {"optimizer": optimizer, "scheduler": WarmupCosineSchedulerConfig(warmup_steps=warmup_steps)}
        for group, optimizer in optimizers.items()
    }


def small_optimizers() -> dict[str, Any]:
    """Return the rates that learned most per minute for networks that a CPU trains in minutes; they were not tried on
    large ones."""
    return our_optimizers(hidden=8e-3, ends=4e-3, volume=1e-1, warmup_steps=50)


def published_optimizers(weight_decay: float = 0.0, decay_steps: int = 0) -> dict[str, Any]:
    """Return one Adam with R2L's rate and schedule.

    Args:
        weight_decay: decoupled from the gradient, as in AdamW; 0 for plain Adam.
        decay_steps: iterations to a tenth of the rate; 0 for R2L's, by the kind of capture.
    """
    target = AdamW if weight_decay > 0 else Adam
    return {
        group: {
            "optimizer": AdamOptimizerConfig(_target=target, lr=5e-4, eps=1e-8, weight_decay=weight_decay),
            "scheduler": PublishedSchedulerConfig(decay_steps=decay_steps),
        }
        for group in ("hidden", "volume", "ends")
    }
