"""An exponential moving average (EMA) of a student's weights, which renders better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class WeightAverage(nn.Module):
    """EMA of a module's parameters and normalization statistics. It is saved with the pipeline, so that a resumed run
    continues with it, and an interrupted run can be loaded with it.

    Args:
        module: module whose parameters are averaged.
        decay: share of the average that is kept at each update; smaller at first, so that the initial weights are
            forgotten.
    """

    updates: torch.Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        statistics = [tensor for tensor in normalization_statistics(module) if tensor.is_floating_point()]
        self._followed = [*module.parameters(), *statistics]
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        # Host copy of `updates`, for which a GPU would have to be synchronized; None if unknown.
        self._count: int | None = 0
        for index, parameter in enumerate(self._followed):
            self.register_buffer(f"weight_{index}", parameter.detach().clone())

    @property
    def _averages(self) -> list[torch.Tensor]:
        return [self.get_buffer(f"weight_{index}") for index in range(len(self._followed))]

    @torch.no_grad()
    def reset(self) -> None:
        """Restart the average from the current weights."""
        self.updates.zero_()
        self._count = 0
        torch._foreach_copy_(self._averages, [p.detach() for p in self._followed])

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        if self._count is None:
            self._count = int(self.updates)
        keep = min(self.decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._followed], 1 - keep)
        self.updates += 1
        self._count += 1

    def restart(self, parameter: nn.Parameter) -> None:
        """Restart the average of a parameter, which may have got another shape, from its current value.

        Args:
            parameter: one of the module's parameters.
        """
        (index,) = [i for i, followed in enumerate(self._followed) if followed is parameter]
        setattr(self, f"weight_{index}", parameter.detach().clone())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, in place."""
        kept = [p.detach().clone() for p in self._followed]
        torch._foreach_copy_([p.detach() for p in self._followed], self._averages)
        torch._foreach_copy_(self._averages, kept)


def saved_average(pipeline_state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state of a `WeightAverage` from a pipeline's checkpoint; empty if none was kept, or training was
    finished."""
    return {k.removeprefix("average."): value for k, value in pipeline_state.items() if k.startswith("average.")}


def put_average(module: nn.Module, average: dict[str, torch.Tensor]) -> None:
    """Replace the weights of an interrupted run by their average, which renders better.

    Args:
        module: module with the run's weights.
        average: from `saved_average`; nothing changes if it is empty.
    """
    if average:
        holder = WeightAverage(module, decay=0.0)
        holder.load_state_dict(average)
        holder.swap()


def normalization_statistics(module: nn.Module) -> list[torch.Tensor]:
    """Return the running means, variances and counts of all BatchNorm layers, by reference."""
    norms: Iterable[nn.Module] = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]
