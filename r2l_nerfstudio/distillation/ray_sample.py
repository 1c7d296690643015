"""Rays with the answers a student learns, whoever gave them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

RECORD_WIDTH = 13


@dataclass
class RaySample:
    """A batch of rays with colours, and geometry where it is known."""

    origins: Float[Tensor, "rays 3"]
    """In the teacher's frame."""
    directions: Float[Tensor, "rays 3"]
    """Unit length."""
    rgb: Float[Tensor, "rays 3"]
    accumulation: Float[Tensor, "rays 1"]
    depth: Float[Tensor, "rays 1"]
    """Distance along the ray, in the teacher's unit; 0 where there is none."""
    weight: Float[Tensor, "rays 1"]
    """1, or 0 where the colour is not to be learnt."""
    geometry_weight: Float[Tensor, "rays 1"]
    """1, or 0 where accumulation and depth are unknown (photographs)."""

    def records(self) -> Float[Tensor, "rays 13"]:
        """All fields side by side."""
        return torch.cat([getattr(self, field.name) for field in fields(self)], dim=-1)

    @classmethod
    def from_records(cls, records: Float[Tensor, "rays 13"]) -> RaySample:
        """Inverse of `records`."""
        return cls(*records.split([3, 3, 3, 1, 1, 1, 1], dim=-1))
