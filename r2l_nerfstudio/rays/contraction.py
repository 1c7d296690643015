"""Scene contraction for unbounded captures."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def contract(positions: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """Map all of space into a ball of radius 2 and keep the unit ball unchanged (mip-NeRF 360, eq. 10).

    Args:
        positions: points, in units of the scene's radius around its center.

    Returns:
        x inside the unit ball, else (2 - 1/|x|) x/|x|.
    """
    norm = positions.norm(dim=-1, keepdim=True).clamp_min(1.0)
    return positions * ((2.0 - 1.0 / norm) / norm)
