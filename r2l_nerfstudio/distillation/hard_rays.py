"""The worst rays, again: R2L's hard-ray pool, on the device, without a sort or a permutation on the host."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class HardRayPool:
    """A ring of the rays a student got most wrong, from which part of every batch is drawn (R2L, sec. 3.3).

    Args:
        per_step: hard rays added, and drawn, at every step.
        batches: how many steps' worth of rays the pool holds.
        width: numbers per ray record.
        device: where the pool lives.
    """

    def __init__(self, per_step: int, batches: int, width: int, device: torch.device | str) -> None:
        self.per_step = per_step
        self._records = torch.zeros(max(per_step * batches, 1), width, device=device)
        self._next = 0
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def add(self, records: Float[Tensor, "rays width"], errors: Float[Tensor, "rays"]) -> None:
        """Keep the `per_step` rays with the largest errors, in place of the oldest."""
        count = min(self.per_step, len(records))
        if count == 0:
            return
        worst = errors.topk(count, sorted=False).indices
        slots = (self._next + torch.arange(count, device=records.device)) % len(self._records)
        self._records[slots] = records[worst]
        self._next = (self._next + count) % len(self._records)
        self._filled = min(self._filled + count, len(self._records))

    def draw(self, count: int) -> Float[Tensor, "rays width"]:
        """`count` rays drawn uniformly, with replacement; none while the pool is empty."""
        if self._filled == 0:
            return self._records[:0]
        return self._records[torch.randint(self._filled, (count,), device=self._records.device)]
