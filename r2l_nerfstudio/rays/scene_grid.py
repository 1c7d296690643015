"""Coordinates of a student's volume: a box around what its teacher showed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.rays.contraction import contract

GridWarp = Literal["ball", "contracted", "frustum"]
WARPS: tuple[GridWarp, ...] = ("ball", "contracted", "frustum")
NEAREST = 0.05
"""Depth in scene radii below which a frustum's coordinates no longer grow."""
OUTLIERS = 0.001
"""Share of outliers at each end: a teacher's stray depths must not make a box large."""
DEPTH_SHARE = 0.3
"""Cells along a frustum's depth per cell along its longer side."""


class SceneGrid(nn.Module):
    """Map scene coordinates to the unit cube that a feature volume and an occupancy grid fill.

    - `ball`: scene coordinates as they are, for a bounded scene.
    - `contracted`: contracted scene coordinates (mip-NeRF 360, eq. 10), for captures from inside a scene.
    - `frustum`: image coordinates and disparity of the capture's mean camera, for forward-facing captures (the idea of
      NDC, NeRF, appendix C): all pixels get equally many cells.

    Scene coordinates are relative to the scene's center, in units of its radius.
    """

    low: Tensor
    """Corner of the box in the warp's coordinates, [3]."""
    extent: Tensor
    """Sides of the box, [3]."""
    origin: Tensor
    """Apex of the frustum in scene coordinates, [3]."""
    axes: Tensor
    """Columns: right, up, backward of the frustum, [3, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.warp: GridWarp = "ball"
        self.register_buffer("low", torch.full((3,), -1.05))
        self.register_buffer("extent", torch.full((3,), 2.1))
        self.register_buffer("origin", torch.zeros(3))
        self.register_buffer("axes", torch.eye(3))

    def get_extra_state(self) -> dict[str, Any]:
        return {"warp": self.warp}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["warp"] not in WARPS:
            raise ValueError(f"its scene is warped by {state['warp']!r}"[:200])
        self.warp = state["warp"]

    def fit(
        self,
        warp: GridWarp,
        points: Float[Tensor, "points 3"],
        origin: Float[Tensor, "3"],
        axes: Float[Tensor, "3 3"],
        margin: float = 0.04,
    ) -> None:
        """Choose the box around points, all but the outermost thousandth at each end of each axis.

        Args:
            warp: kind of coordinates.
            points: what the teacher showed, in scene coordinates; without any, the whole ball, or all of contracted space.
            origin: apex of the frustum, in scene coordinates.
            axes: columns right, up, backward of the frustum.
            margin: on every side, as a share of the box.
        """
        self.warp = warp
        self.origin.copy_(origin)
        self.axes.copy_(axes)
        if len(points) == 0:
            half = 1.05 if warp == "ball" else 2.0
            self.low.fill_(-half)
            self.extent.fill_(2 * half)
            return
        warped = self.warped(points[:: max(1, len(points) >> 20)])
        ends = torch.quantile(warped, warped.new_tensor([OUTLIERS, 1 - OUTLIERS]), dim=0)
        middle, half = ends.mean(0), (ends[1] - ends[0]) / 2
        half = (1 + 2 * margin) * torch.maximum(half, 0.05 * half.max().clamp_min(1e-3))
        self.low.copy_(middle - half)
        self.extent.copy_(2 * half)

    def include(self, points: Float[Tensor, "points 3"]) -> None:
        """Widen the box so that it holds these points, in scene coordinates."""
        if len(points) == 0:
            return
        warped = self.warped(points)
        low = torch.minimum(self.low, warped.amin(0))
        self.extent.copy_(torch.maximum(self.low + self.extent, warped.amax(0)) - low)
        self.low.copy_(low)

    def resolution(self, cell: float) -> tuple[int, int, int]:
        """Return the cells of this side along x, y, z, in the warp's unit; along a frustum's depth they have their own
        side."""
        x, y, z = (max(4, round(side / cell)) for side in self.extent.tolist())
        return (x, y, max(8, round(DEPTH_SHARE * max(x, y)))) if self.warp == "frustum" else (x, y, z)

    def cell_of(self, cells: int) -> float:
        """Return the side of a cell, for about `cells`^3 of them."""
        u, v, w = self.extent.tolist()
        if self.warp == "frustum":
            return (u * v * DEPTH_SHARE * max(u, v)) ** (1 / 3) / cells
        return (u * v * w) ** (1 / 3) / cells

    def pixel_cell(self, points: Float[Tensor, "points 3"], footprints: Float[Tensor, "points"]) -> float:
        """Return the side of a cell as large as a pixel: the median over surface points.

        Args:
            points: in scene coordinates.
            footprints: sides of the pixels that show them, at their depth, in scene radii.
        """
        moved = [points + footprints[:, None] * self.axes[:, axis] for axis in (0, 1)]
        here = self.warped(points)
        sides = torch.stack([(self.warped(there) - here).norm(dim=-1) for there in moved])
        return float(sides.mean(0).median().clamp_min(1e-6))

    def warped(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Convert scene coordinates to those of the warp."""
        if self.warp == "ball":
            return points
        if self.warp == "contracted":
            return contract(points)
        local = (points - self.origin) @ self.axes
        disparity = 1.0 / (-local[..., 2:]).clamp_min(NEAREST)
        return torch.cat([local[..., :2] * disparity, disparity], dim=-1)

    def forward(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Convert scene coordinates to the unit cube; points outside the box move to its surface."""
        return ((self.warped(points) - self.low) / self.extent).clamp(0.0, 1.0)

    def box_span(
        self, start: Float[Tensor, "*batch 3"], step: Float[Tensor, "*batch 3"]
    ) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
        """Return where lines in scene coordinates enter and leave a ball's box, in their steps and from their start on.

        Returns:
            Entry and exit; the exit comes first on lines that miss the box.
        """
        safe = torch.where(step.abs() < 1e-9, torch.full_like(step, 1e-9), step)
        first, second = (self.low - start) / safe, (self.low + self.extent - start) / safe
        enter = torch.minimum(first, second).amax(-1, keepdim=True).clamp_min(0.0)
        return enter, torch.maximum(first, second).amin(-1, keepdim=True)
