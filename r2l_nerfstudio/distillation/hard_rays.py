"""R2L's pool of hard rays, on the device, without a sort or a permutation on the host."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class HardRayPool:
    """A pool of the rays with the largest errors, from which part of every batch is drawn (R2L, sec. 3.3).

    Ours is a ring that is used from the first iteration on. The published one is used once it is full; from then on new
    hard rays replace those that were just drawn.

    Args:
        per_step: hard rays added, and drawn, at every step.
        batches: steps whose rays the pool holds.
        width: numbers per ray record.
        device: device of the pool.
        is_published: fill, draw and replace as the published code does.
    """

    def __init__(
        self, per_step: int, batches: int, width: int, device: torch.device | str, is_published: bool = False
    ) -> None:
        self.per_step = per_step
        self.is_published = is_published
        self._records = torch.zeros(max(per_step * batches, 1), width, device=device)
        self._next = 0
        self._filled = 0
        self._drawn: Int[Tensor, "drawn"] | None = None

    def __len__(self) -> int:
        return self._filled

    @property
    def available(self) -> int:
        """Number of rays that `draw` may be called for."""
        if self.is_published and self._filled < len(self._records):
            return 0
        return min(self.per_step, self._filled)

    def add(self, records: Float[Tensor, "rays width"], errors: Float[Tensor, "rays"]) -> None:
        """Keep the `per_step` rays with the largest errors, in place of the oldest or of those just drawn."""
        count = min(self.per_step, len(records))
        if count == 0:
            return
        worst = errors.topk(count, sorted=False).indices
        if self._drawn is not None:
            slots = self._drawn[:count]
            self._records[slots] = records[worst[: len(slots)]]
            self._drawn = None
            return
        slots = (self._next + torch.arange(count, device=records.device)) % len(self._records)
        self._records[slots] = records[worst]
        self._next = (self._next + count) % len(self._records)
        self._filled = min(self._filled + count, len(self._records))

    def draw(self, count: int) -> Float[Tensor, "rays width"]:
        """Draw `count` rays uniformly: with replacement, or as published without; none while the pool is empty."""
        if self._filled == 0 or count == 0:
            return self._records[:0]
        if self.is_published:
            self._drawn = torch.randperm(self._filled, device=self._records.device)[:count]
            return self._records[self._drawn]
        return self._records[torch.randint(self._filled, (count,), device=self._records.device)]
