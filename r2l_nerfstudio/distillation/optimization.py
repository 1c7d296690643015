"""Optimizers and schedules of students, as Nerfstudio configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from r2l_nerfstudio.distillation.muon import Muon

DECAY_STEPS = 500_000
"""Iterations to a tenth of R2L's published learning rate."""
FORWARD_DECAY_STEPS = 250_000
"""The same for forward-facing captures."""


class MatrixMuon(Muon):
    """Muon, which takes matrices only, for 1x1 convolutions too: it works on views of their weights.

    Args:
        params: weights of linear layers (out in) or of 1x1 convolutions (out in 1 1).
        **settings: as `Muon`'s.
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
    """Total number of iterations; set from --max-num-iterations."""

    def share(self, step: int, progress: float) -> float:
        """Return the factor of the learning rate at an iteration and a share of the whole training."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return warmup(step, self.warmup_steps) * (self.final_share + (1 - self.final_share) * cosine)


@dataclass
class PublishedSchedulerConfig(SchedulerConfig):
    """R2L's schedule: linear warm-up from a fifth of the learning rate, then a tenth of it per `decay_steps` iterations."""

    _target: type = field(default_factory=lambda: WarmupCosineScheduler)
    warmup_steps: int = 200
    """Iterations of warm-up."""
    decay_steps: int = 0
    """Iterations to a tenth of the learning rate, whatever the length of the training. 0: as the published R2L has it,
    250,000 for a forward-facing capture and 500,000 for any other."""
    max_steps: int = 1_200_000
    """Total number of iterations; set from --max-num-iterations."""

    def share(self, step: int, progress: float) -> float:
        """Return the factor of the learning rate at an iteration."""
        return warmup(step, self.warmup_steps) * 0.1 ** (step / (self.decay_steps or DECAY_STEPS))

    def settle(self, is_forward_facing: bool) -> None:
        """Choose `decay_steps` by the kind of capture, unless it is set."""
        if self.decay_steps == 0:
            self.decay_steps = FORWARD_DECAY_STEPS if is_forward_facing else DECAY_STEPS


def warmup(step: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate in a linear warm-up from a fifth of it."""
    return min(1.0, 0.2 + 0.8 * step / max(1, warmup_steps))


class WarmupCosineScheduler(Scheduler):
    """Scheduler of `WarmupCosineSchedulerConfig` and `PublishedSchedulerConfig`."""

    config: WarmupCosineSchedulerConfig | PublishedSchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> ScheduledRate:
        return ScheduledRate(optimizer, self.config)


class ScheduledRate(LRScheduler):
    """Set the learning rate by iteration and progress.

    Args:
        optimizer: optimizer whose rate is set.
        config: returns the factor of the learning rate.
    """

    def __init__(self, optimizer: Optimizer, config: WarmupCosineSchedulerConfig | PublishedSchedulerConfig) -> None:
        self._config = config
        self.progress: Callable[[], float] | None = None
        """Returns the share of the training that is done; None to count iterations."""
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        progress = step / max(1, self._config.max_steps) if self.progress is None else self.progress()
        # Python floats, so that checkpoints load with `weights_only`.
        return [float(rate) * self._config.share(step, progress) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration only: all else belongs to the configuration."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]


def move_state(optimizer: Optimizer, parameter: Parameter, convert: Callable[[Tensor], Tensor]) -> None:
    """Follow a parameter that got other rows.

    Args:
        optimizer: optimizer, with or without the parameter.
        parameter: the same object as before, with other rows.
        convert: converts what has a value per row.
    """
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == parameter.ndim and value.shape[1:] == parameter.shape[1:]:
            state[name] = convert(value)
