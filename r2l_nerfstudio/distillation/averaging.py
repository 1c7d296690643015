"""An exponential moving average of a student's weights, which does better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class WeightAverage(nn.Module):
    """Follows the parameters and normalization statistics of a module; saved with the pipeline, so that a resumed run goes
    on with it, and a viewer can show it of a run that was killed.

    Args:
        module: whose parameters.
        decay: share of the average that is kept at each update; fewer at first, so that the beginning is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        statistics = [tensor for tensor in normalization_statistics(module) if tensor.is_floating_point()]
        self._followed = [*module.parameters(), *statistics]
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._count: int | None = 0  # `updates`, which a GPU would have to be asked for; None: not known
        for index, parameter in enumerate(self._followed):
            self.register_buffer(f"weight_{index}", parameter.detach().clone())

    @property
    def _averages(self) -> list[torch.Tensor]:
        return [self.get_buffer(f"weight_{index}") for index in range(len(self._followed))]

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew at the weights as they are."""
        self.updates.zero_()
        self._count = 0
        torch._foreach_copy_(self._averages, [p.detach() for p in self._followed])

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        if self._count is None:
            self._count = int(self.updates)
        keep = min(self.decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._followed], 1 - keep)
        self.updates += 1
        self._count += 1

    def follow_rows(self, parameter: nn.Parameter, former: torch.Tensor) -> None:
        """After a parameter got other rows: those it had keep their average, new ones start at their weights.

        Args:
            parameter: one of the module's.
            former: for each row the one it was, 0 for a new one.
        """
        (index,) = [i for i, followed in enumerate(self._followed) if followed is parameter]
        name = f"weight_{index}"
        moved = parameter.detach().clone()
        moved[former > 0] = self.get_buffer(name)[former[former > 0]]
        setattr(self, name, moved)

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
    """The state of a `WeightAverage` in a pipeline's checkpoint; empty where none was kept, or training was finished."""
    return {k.removeprefix("average."): value for k, value in pipeline_state.items() if k.startswith("average.")}


def put_average(module: nn.Module, average: dict[str, torch.Tensor]) -> None:
    """Replace the weights of a run that was killed by their average, which draws better.

    Args:
        module: with the run's weights.
        average: from `saved_average`; nothing changes if it is empty.
    """
    if average:
        holder = WeightAverage(module, decay=0.0)
        holder.load_state_dict(average)
        holder.swap()


def normalization_statistics(module: nn.Module) -> list[torch.Tensor]:
    """The running means, variances and counts of all BatchNorm layers, by reference."""
    norms: Iterable[nn.Module] = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]
