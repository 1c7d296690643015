"""Optimizers and schedules of students, as Nerfstudio configs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass
class MuonOptimizerConfig(OptimizerConfig):
    """Muon for the hidden matrices: momentum, orthogonalised (Jordan et al. 2024), with Adam's step size."""

    _target: type = torch.optim.Muon
    lr: float = 2e-3
    weight_decay: float = 0.0
    adjust_lr_fn: str = "match_rms_adamw"


@dataclass
class WarmupCosineSchedulerConfig(SchedulerConfig):
    """Linear warm-up, then half a cosine down to a share of the learning rate."""

    _target: type = field(default_factory=lambda: WarmupCosineScheduler)
    warmup_steps: int = 200
    """Iterations of warm-up, from a fifth of the learning rate (R2L's)."""
    final_share: float = 0.01
    """Learning rate at the end, as a share of the highest."""
    max_steps: int = 30000
    """Iterations in all; set from --max-num-iterations."""


class WarmupCosineScheduler(Scheduler):
    """See `WarmupCosineSchedulerConfig`."""

    config: WarmupCosineSchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LRScheduler:
        """Schedule as a multiple of `lr_init`, in Python floats: checkpoints then load with `weights_only`."""
        config = self.config

        def share(step: int) -> float:
            warmup = min(1.0, 0.2 + 0.8 * step / max(1, config.warmup_steps))
            progress = min(1.0, step / max(1, config.max_steps))
            return warmup * (config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * progress)))

        return LambdaLR(optimizer, lr_lambda=share)
