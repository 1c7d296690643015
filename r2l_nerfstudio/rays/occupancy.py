"""Occupancy: where the scene is, one bit per cell of a grid over the scene's box."""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool3d, interpolate, max_pool3d, pad

from r2l_nerfstudio.rays.constants import constant
from r2l_nerfstudio.rays.scene_grid import SceneGrid

_BYTES_PER_CELL = 16
"""Peak memory while the grid points of occupied cells are numbered."""


class OccupancyGrid(nn.Module):
    """One bit per cell of the unit cube of a `SceneGrid`; a checkpoint holds the bits packed.

    A grid that was never marked is occupied everywhere: what is unknown must not be hidden.
    """

    cells: Tensor
    """uint8 [z, y, x], 1 where the scene may be."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = SceneGrid()
        self.register_buffer("cells", torch.ones(4, 4, 4, dtype=torch.uint8), persistent=False)

    @property
    def resolution(self) -> tuple[int, int, int]:
        """Cells along x, y, z."""
        z, y, x = self.cells.shape
        return x, y, z

    def get_extra_state(self) -> dict[str, Any]:
        return {"shape": list(self.cells.shape), "bits": packed(self.cells)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        shape, bits = checked_resolution(state["shape"]), state["bits"]
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.numel() != -(-math.prod(shape) // 8):
            raise ValueError(f"the occupancy of {shape} cells is not stored in as many bits")
        self.cells = _unpacked(bits.flatten(), shape).to(self.cells.device)

    def clear(self, resolution: tuple[int, int, int]) -> None:
        """Start with an empty grid of this many cells along x, y, z."""
        x, y, z = resolution
        self.cells = torch.zeros(z, y, x, dtype=torch.uint8, device=self.cells.device)

    def mark(self, cells: UInt8[Tensor, "z y x"], dilation: int = 1) -> None:
        """Set cells, and this many around each of them."""
        if dilation:
            cells = max_pool3d(cells[None, None].float(), 2 * dilation + 1, stride=1, padding=dilation)[0, 0]
        self.cells = self.cells | cells.to(torch.uint8)

    def counts(self, points: Float[Tensor, "points 3"]) -> Int32[Tensor, "z y x"]:
        """Return how many of these points, in scene coordinates, lie in each cell; points outside the box count on its
        surface."""
        numbers = self.flat_cell(self.scene(points))
        return torch.bincount(numbers, minlength=self.cells.numel()).to(torch.int32).view_as(self.cells)

    def flat_cell(self, unit_points: Float[Tensor, "*batch 3"]) -> Int32[Tensor, "*batch"]:
        """Return the index in raster order of the cell that contains a point of the unit cube."""
        x, y, z = self.resolution
        cell = (unit_points * constant(unit_points, [x, y, z])).to(torch.int32)
        ix, iy, iz = (cell[..., axis].clamp(max=size - 1) for axis, size in enumerate((x, y, z)))
        return (iz * y + iy) * x + ix

    def forward(self, unit_points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
        """Return 1 where the cell of a point of the unit cube is occupied, else 0."""
        return gathered(self.cells, self.flat_cell(unit_points)).to(unit_points.dtype)

    def share(self) -> float:
        """Return the share of occupied cells."""
        return float(self.cells.float().mean())


def checked_resolution(sizes: Any) -> tuple[int, int, int]:
    """Return the resolution of a grid from a checkpoint.

    Raises:
        ValueError: it is not three sizes, or this machine has no memory for as many cells.
    """
    if not isinstance(sizes, list | tuple) or len(sizes) != 3 or not all(type(size) is int for size in sizes):
        raise ValueError(f"{sizes!r} is no resolution of a grid"[:200])
    if min(sizes) < 1 or _BYTES_PER_CELL * math.prod(sizes) > psutil.virtual_memory().available:
        raise ValueError(f"no grid can have {list(sizes)} cells here"[:200])
    return (sizes[0], sizes[1], sizes[2])


def gathered(table: Tensor, numbers: Int32[Tensor, "*batch"]) -> Tensor:
    """Return entries of a table by their indices in raster order; exporters make one Gather of it."""
    # Core ML's converter loses the type int32.
    return table.flatten().index_select(0, numbers.flatten().to(torch.int32)).view(numbers.shape)


def grid_point_index(cells: UInt8[Tensor, "oz oy ox"], resolution: tuple[int, int, int]) -> Int32[Tensor, "z y x"]:
    """Number the grid points of a volume that touch an occupied cell.

    Args:
        cells: occupancy, at a resolution of its own.
        resolution: cells of the volume along x, y, z; it has one grid point more along each axis.

    Returns:
        [z + 1, y + 1, x + 1]: 0 where a grid point touches no occupied cell, else 1, 2, … in raster order.
    """
    x, y, z = resolution
    coarse = cells[None, None].float()
    # A volume's cell may straddle several of the grid's: it counts if any of them is occupied.
    sizes = tuple(-(-size // grid) * grid for size, grid in zip((z, y, x), cells.shape, strict=True))
    fine = adaptive_max_pool3d(interpolate(coarse, sizes, mode="nearest-exact"), (z, y, x))
    touched = max_pool3d(pad(fine, (1,) * 6), 2, stride=1)[0, 0] > 0
    numbers = touched.flatten().cumsum(0, dtype=torch.int32) * touched.flatten()
    return numbers.view(touched.shape).to(torch.int32)


def packed(cells: UInt8[Tensor, "z y x"]) -> UInt8[Tensor, "bytes"]:
    """Eight cells in raster order per byte, the first in its lowest bit."""
    flat = cells.flatten().cpu()
    flat = pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _unpacked(bits: UInt8[Tensor, "bytes"], shape: tuple[int, int, int]) -> UInt8[Tensor, "z y x"]:
    flat = (bits.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return flat.flatten()[: shape[0] * shape[1] * shape[2]].view(shape)
