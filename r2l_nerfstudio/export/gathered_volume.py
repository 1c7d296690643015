"""Feature volumes in operators that every runtime has."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import embedding

from r2l_nerfstudio.students.ray_features import FeatureVolume


class GatheredVolume(nn.Module):
    """The features of a `FeatureVolume`, read with eight gathers from a flat table: few runtimes sample 5-D grids.

    Args:
        volume: volume to copy.
        dtype: type of the stored features; they are weighted and summed in fp32.
    """

    extent: Tensor
    table: Tensor
    """One row per grid point, x running fastest: [resolution^3, channels]."""

    def __init__(self, volume: FeatureVolume, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        grid = volume.grid.detach()
        self.resolution = grid.shape[-1]
        self.register_buffer("extent", volume.extent.detach().clone())
        self.register_buffer("table", grid[0].permute(1, 2, 3, 0).reshape(-1, grid.shape[1]).to(dtype, copy=True))

    def forward(self, points: Float[Tensor, "*rays points 3"]) -> Float[Tensor, "*rays features"]:
        """Return `FeatureVolume.forward`: channels * points numbers per ray, all points of the first channel first."""
        where = ((points / self.extent).clamp(-1.0, 1.0) + 1.0) * ((self.resolution - 1) / 2)
        # On the last face the cell before it is read, with all weight on its far corners.
        low = where.floor().clamp(max=max(self.resolution - 2, 0))
        shares = where - low
        x, y, z = low.to(torch.int32).unbind(-1)
        first = (z * self.resolution + y) * self.resolution + x
        step = 1 if self.resolution > 1 else 0
        rows = []
        for corner in range(8):
            beyond = [(corner >> axis) & 1 for axis in range(3)]
            weights = [shares[..., a : a + 1] if beyond[a] else 1.0 - shares[..., a : a + 1] for a in range(3)]
            offset = step * ((beyond[2] * self.resolution + beyond[1]) * self.resolution + beyond[0])
            rows.append(embedding(first + offset, self.table).float() * (weights[0] * weights[1] * weights[2]))
        return functools.reduce(torch.add, rows).transpose(-1, -2).flatten(-2)
