"""The small image of rays that a MobileR2L student reads: its geometry."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

MARGIN = 1
"""Cells around a picture that are drawn and dropped: with their neighbours at hand, its border pixels are as any other."""


def ray_image_size(height: int, width: int, factor: int, margin: int = MARGIN) -> tuple[int, int]:
    """Rows and columns of cells, margin included, that cover a picture of any size in pixels."""
    return math.ceil(height / factor) + 2 * margin, math.ceil(width / factor) + 2 * margin


def ray_image_intrinsics(
    intrinsics: Float[Tensor, "*batch 4"],
    factor: int,
    corner: Float[Tensor, "*batch 2"] | None = None,
    margin: int = MARGIN,
) -> Float[Tensor, "*batch 4"]:
    """Intrinsics of the ray image, in cells: its rays pass through the centres of `factor` x `factor` pixels.

    Args:
        intrinsics: fx, fy, cx, cy of the picture in pixels.
        factor: pixels per cell along each side.
        corner: (x, y) in pixels at which the first cell inside the margin begins; the picture's own corner by default.
        margin: cells around the picture.
    """
    cells = intrinsics / factor
    if corner is not None:
        cells[..., 2:] -= corner / factor
    cells[..., 2:] += margin
    return cells
