"""Optimizers and schedules of students, as Nerfstudio configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class MatrixMuon(torch.optim.Muon):
    """Torch's Muon, which takes matrices alone, for 1x1 convolutions too: it works on views of their weights.

    Args:
        params: weights of linear layers (out in) or of 1x1 convolutions (out in 1 1).
        **settings: as torch's.
    """

    def __init__(self, params: Iterable[Parameter], **settings: Any) -> None:
        self._weights = list(params)
        self._matrices = [p if p.ndim == 2 else Parameter(p.detach().flatten(1)) for p in self._weights]
        super().__init__(self._matrices, **settings)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            if matrix is not weight:
                matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None


@dataclass
class MuonOptimizerConfig(OptimizerConfig):
    """Muon for the hidden matrices: momentum, orthogonalised (Jordan et al. 2024), with Adam's step size."""

    _target: type = MatrixMuon
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
