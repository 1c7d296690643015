"""The geometry of the low-resolution ray image that a MobileR2L student reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.rays.conventions import OURS, RayConventions

MARGIN = 1
"""Cells around an image that are evaluated and dropped, so that its border pixels have neighbors like any other."""


def ray_image_size(height: int, width: int, factor: int, margin: int = MARGIN) -> tuple[int, int]:
    """Return rows and columns of cells, margin included, that cover an image of any size in pixels."""
    return math.ceil(height / factor) + 2 * margin, math.ceil(width / factor) + 2 * margin


def ray_image_intrinsics(
    intrinsics: Float[Tensor, "*batch 4"],
    factor: int,
    corner: Float[Tensor, "*batch 2"] | None = None,
    rays_per_cell: int = 1,
    margin: int = MARGIN,
) -> Float[Tensor, "*batch 4"]:
    """Return the intrinsics of the ray image, in cells: its rays pass through the centers of `factor` x `factor`
    pixels.

    Args:
        intrinsics: fx, fy, cx, cy of the image in pixels.
        factor: upsampling factor, pixels per cell along each side.
        corner: (x, y) in pixels at which the first cell inside the margin begins; the image's own corner by default.
        rays_per_cell: rays along each side of a cell; with `factor` of them, each pixel has its own.
        margin: cells around the image.
    """
    cells = intrinsics / factor * rays_per_cell
    if corner is not None:
        cells[..., 2:] -= corner / factor * rays_per_cell
    cells[..., 2:] += margin * rays_per_cell
    return cells


@dataclass(frozen=True)
class StudentRays:
    """The rays that a student reads, for a data manager."""

    factor: int = 1
    """Upsampling factor: pixels along each side of a cell; 1 for a student of single rays."""
    rays_per_cell: int = 1
    """Rays along each side of a cell."""
    margin: int = MARGIN
    """Cells around a crop that are evaluated and dropped."""
    conventions: RayConventions = OURS
    """How its encoding reads rays."""


@dataclass(frozen=True)
class CellPixels:
    """Pixels of an image, cell by cell.

    Args:
        factor: pixels along each side of a cell.
    """

    factor: int

    def by_cell(
        self, image: Float[Tensor, "*batch height width values"]
    ) -> Float[Tensor, "*batch rows columns pixels values"]:
        """Return the `factor`² pixels of each cell, row by row."""
        cells = image.unflatten(-2, (-1, self.factor)).unflatten(-4, (-1, self.factor))
        return cells.transpose(-4, -3).flatten(-3, -2)

    def to_image(
        self, cells: Float[Tensor, "*batch rows columns pixels values"]
    ) -> Float[Tensor, "*batch height width values"]:
        """Return the image of `by_cell`'s result."""
        image = cells.unflatten(-2, (self.factor, self.factor)).transpose(-4, -3)
        return image.flatten(-5, -4).flatten(-3, -2)
