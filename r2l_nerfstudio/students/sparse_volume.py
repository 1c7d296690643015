"""Learned density and features in space, kept only where the scene is, and composited along rays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int8, Int32, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding

from r2l_nerfstudio.rays.constants import constant
from r2l_nerfstudio.rays.occupancy import gathered

EMPTY_DENSITY = -8.0
"""Raw density of grid points outside the scene."""
DENSITY_SHIFT = -2.0
"""Density is exp(raw + this) per cell: nearly transparent at the start of training."""
MAX_EXPONENT = 10.0
STOP = 1e-3
"""Least remaining light; samples behind it are left out."""
LEAST_HELD = 0.1
"""Share of a new grid point's interpolation weights that former grid points must have; else it starts afresh."""
POINTS_AT_ONCE = 1 << 18
"""Points that are read at once where another resolution is computed."""


class Composited(NamedTuple):
    """What a ray meets, each weighted by the share of light that comes from there."""

    features: Float[Tensor, "rays channels"]
    accumulation: Float[Tensor, "rays 1"]
    fraction: Float[Tensor, "rays 1"]
    """Position in [0, 1] of the ray's span."""
    point: Float[Tensor, "rays 3"]
    """Point of the unit cube."""


class SparseVolume(nn.Module):
    """Raw density and features at the grid points that touch an occupied cell, read trilinearly.

    Args:
        channels: features per grid point, besides the density.
    """

    index: Tensor
    """int32 [z, y, x]: the row of each grid point; 0, which is empty space, where it has none."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        empty = torch.zeros(1, 1 + channels)
        empty[0, 0] = EMPTY_DENSITY
        self.rows = nn.Parameter(empty)
        self.register_buffer("index", torch.zeros(2, 2, 2, dtype=torch.int32), persistent=False)

    def lay_out(self, index: Int32[Tensor, "z y x"], spare: int = 0) -> Int64[Tensor, "rows"]:
        """Hold these grid points from now on. Points held before keep their numbers; new ones start transparent.

        The parameter remains the same object, and keeps its shape if it has room, since graphs of earlier iterations
            refer to it.

        Args:
            index: 1, 2, … in raster order where a grid point is held, else 0.
            spare: rows to leave room for, if the parameter needs another shape.

        Returns:
            For each row its former row, or 0 if it is new or spare.
        """
        needed = int(index.max()) + 1
        is_regrown = index.shape == self.index.shape
        rows = self.rows.detach()
        total = len(rows) if is_regrown and needed <= len(rows) else needed + spare
        former = torch.zeros(total, dtype=torch.long, device=rows.device)
        if is_regrown:
            held = index > 0
            former[index[held].long()] = self.index[held].long()
        made = self._fresh(total).to(rows)
        made[0] = 0.0
        made[0, 0] = EMPTY_DENSITY
        kept = former > 0
        made[kept] = rows[former[kept]]
        if made.shape == rows.shape:
            rows.copy_(made)
        else:
            self.rows.data = made
        self.index = index
        return former

    def _fresh(self, count: int) -> Float[Tensor, "count values"]:
        made = 0.1 * torch.randn(count, 1 + self.channels)
        made[:, 0] = 0.0
        return made

    def resample(self, index: Int32[Tensor, "z y x"]) -> Callable[[Tensor], Tensor]:
        """Hold grid points of another resolution from now on, interpolated from the former ones. Points without a
        former neighbor start transparent.

        The parameter keeps its shape, for the reason that `lay_out` gives.

        Args:
            index: as for `lay_out`; at most as many grid points as there are rows besides the first.

        Returns:
            Converts what else has a value per row, like an optimizer's state.
        """
        z, y, x = index.shape
        numbers = index.flatten().nonzero()[:, 0]
        corners = torch.stack([numbers % x, numbers // x % y, numbers // (x * y)], dim=-1)
        points = corners / corners.new_tensor([x - 1, y - 1, z - 1])
        former, numbered = self.index, index.flatten()[numbers].long()

        def convert(rows: Tensor) -> Tensor:
            made = torch.zeros_like(rows)
            parts = [read_rows(rows, former, part) for part in points.split(POINTS_AT_ONCE)]
            made[numbered] = torch.cat(parts).to(rows.dtype)
            return made

        rows = self.rows.detach()
        held = torch.ones_like(rows[:, :1])
        held[0] = 0.0
        share = convert(held)  # of what was read; the rest was empty space
        made = (convert(rows) - (1.0 - share) * rows[0]) / share.clamp_min(LEAST_HELD)
        # Density is per cell: smaller cells are crossed in more steps.
        made[:, 0] -= math.log((x - 1) * (y - 1) * (z - 1) / math.prod(self.cells)) / 3
        made = torch.where(share < LEAST_HELD, self._fresh(len(rows)).to(rows), made)
        made[0] = rows[0]
        rows.copy_(made)
        self.index = index
        return convert

    @property
    def num_grid_points(self) -> int:
        """Number of grid points that are held."""
        return int(self.index.max())

    def trim(self) -> Int64[Tensor, "rows"]:
        """Release spare rows; returns as `lay_out`."""
        self.rows.data = self.rows.data[: self.num_grid_points + 1].clone()
        return torch.arange(len(self.rows), device=self.rows.device)

    @property
    def cells(self) -> tuple[int, int, int]:
        """Cells along x, y, z."""
        z, y, x = self.index.shape
        return x - 1, y - 1, z - 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}rows")
        if saved is not None and saved.shape[1:] == self.rows.shape[1:]:
            # The checkpoint decides the number of rows, which belongs to its scene.
            self.rows.data = self.rows.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def moved_rows(former: Int64[Tensor, "rows"], values: Float[Tensor, "former_rows *n"]) -> Float[Tensor, "rows *n"]:
    """Return values of rows that moved, zero for rows without a former one (0)."""
    made = values.new_zeros(len(former), *values.shape[1:])
    made[former > 0] = values[former[former > 0]]
    return made


def int8_rows(rows: Float[Tensor, "rows values"]) -> tuple[Int8[Tensor, "rows values"], Float[Tensor, "values"]]:
    """Rows rounded to 255 levels, and the width of a level of each column."""
    widths = rows.abs().amax(0).clamp_min(1e-8) / 127
    return (rows / widths).round().to(torch.int8), widths


def read_rows(
    rows: Float[Tensor, "rows values"], index: Int32[Tensor, "z y x"], points: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch values"]:
    """Read trilinearly with eight gathers, which every runtime supports. Values are weighted and summed in fp32.

    Args:
        rows: of any dtype.
        index: the row of each grid point.
        points: in the unit cube.
    """
    z, y, x = index.shape
    where = points * constant(points, [x - 1, y - 1, z - 1])
    low = torch.minimum(where.floor(), constant(where, [x - 2, y - 2, z - 2]))
    shares = where - low
    ix, iy, iz = low.to(torch.int32).unbind(-1)
    first = (iz * y + iy) * x + ix
    read: Tensor | float = 0.0
    for corner in range(8):
        far = [(corner >> axis) & 1 for axis in range(3)]
        weights = [shares[..., a : a + 1] if far[a] else 1.0 - shares[..., a : a + 1] for a in range(3)]
        offset = (far[2] * y + far[1]) * x + far[0]
        # Core ML's converter loses the type int32.
        read = read + embedding(gathered(index, first + offset).to(torch.int32), rows).float() * (
            weights[0] * weights[1] * weights[2]
        )
    assert isinstance(read, Tensor)
    return read


def composite(
    values: Float[Tensor, "rays samples values"],
    lengths: Float[Tensor, "rays samples"],
    fractions: Float[Tensor, "rays samples"],
    points: Float[Tensor, "rays samples 3"],
    is_empty: Bool[Tensor, "rays"],
) -> Composited:
    """Alpha-composite features along rays, front to back (NeRF, eq. 3; features instead of colors as in SNeRG, sec.
    4).

    `students.cpu_compositing` has the same function for a CPU.

    Args:
        values: raw density and features of the samples.
        lengths: of the samples, in cells.
        fractions: positions of the samples in the ray's span.
        points: of the samples, in the unit cube.
        is_empty: rays that meet nothing.

    Returns:
        Sums, each weighted by the light from there; none is divided by the accumulation.
    """
    weights = rendering_weights(values[..., 0], lengths, is_empty)
    return Composited(
        (weights[..., None] * values[..., 1:]).sum(-2),
        weights.sum(-1, keepdim=True),
        (weights * fractions).sum(-1, keepdim=True),
        (weights[..., None] * points).sum(-2),
    )


def rendering_weights(
    density: Float[Tensor, "rays samples"], lengths: Float[Tensor, "rays samples"], is_empty: Bool[Tensor, "rays"]
) -> Float[Tensor, "rays samples"]:
    """Return the weight of each sample in its ray's color (NeRF, eq. 3).

    Args:
        density: raw density of the samples.
        lengths: of the samples, in cells.
        is_empty: rays that meet nothing.
    """
    thickness = (density + DENSITY_SHIFT).clamp(max=MAX_EXPONENT).exp() * lengths
    thickness = thickness * (1.0 - is_empty[:, None].to(lengths.dtype))
    light = (thickness - thickness.cumsum(-1)).exp()
    return light * (1.0 - (-thickness).exp()) * (light >= STOP).to(light.dtype)
