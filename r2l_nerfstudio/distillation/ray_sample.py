"""Rays with the values that a student learns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

RECORD_WIDTH = 13


@dataclass
class RaySample:
    """Rays in any arrangement with colors, and geometry if known."""

    origins: Float[Tensor, "*batch 3"]
    """In the teacher's frame."""
    directions: Float[Tensor, "*batch 3"]
    """Unit length, or planar where the student's ray encoding reads planar ones."""
    rgb: Float[Tensor, "*batch 3"]
    accumulation: Float[Tensor, "*batch 1"]
    depth: Float[Tensor, "*batch 1"]
    """Distance along the ray, in the teacher's unit; 0 where there is none."""
    weight: Float[Tensor, "*batch 1"]
    """1, or 0 where the color is not learned."""
    geometry_weight: Float[Tensor, "*batch 1"]
    """1, or 0 where accumulation and depth are unknown (photos)."""

    def records(self) -> Float[Tensor, "*batch 13"]:
        """All fields side by side."""
        return torch.cat(self.fields(), dim=-1)

    def fields(self) -> list[Tensor]:
        """Return all fields, in order."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_records(cls, records: Float[Tensor, "*batch 13"]) -> RaySample:
        """Return the sample of `records`."""
        return cls(*records.split([3, 3, 3, 1, 1, 1, 1], dim=-1))
