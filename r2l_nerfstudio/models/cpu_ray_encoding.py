"""Ray encoding for rendering on a CPU: what `LightFieldModel.encode` returns, without gradients, in a fraction of its
time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from r2l_nerfstudio.engines.sizes import chunk_rows
from r2l_nerfstudio.engines.weights import weights_state
from r2l_nerfstudio.rays.encoding import frequency_encode_into
from r2l_nerfstudio.rays.ray_encoding import RayEncoding
from r2l_nerfstudio.students.ray_features import FeatureVolume


@dataclass
class _Table:
    """A feature volume as rows, one for each grid point, x running fastest. It is replaced, never changed."""

    state: int
    rows: Float[Tensor, "points channels"]


class CpuRayEncoding:
    """Ray encoding on a CPU. Coordinates are stored one after the other, points before rays, so that each step is one
    pass over contiguous numbers; sines are doubled from octave to octave; a feature volume is read with weighted sums
    of rows.

    Equal to `RayEncoding.forward` and `FeatureVolume.forward` to 120 dB.

    Args:
        ray_encoding: the student's encoding.
        volume: the student's volume, if it has one.
        volume_points: points per ray at which it is read.
    """

    def __init__(self, ray_encoding: RayEncoding, volume: FeatureVolume | None, volume_points: int) -> None:
        self._ray_encoding = ray_encoding
        self._volume = volume
        self._volume_points = volume_points
        self._dim = ray_encoding.dim + (0 if volume is None else volume.grid.shape[1] * volume_points)
        self._table: _Table | None = None

    def __call__(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"]
    ) -> Float[Tensor, "*batch encoded"]:
        """Return the encoding of rays: fp32, contiguous, and without gradients.

        Args:
            origins: in the teacher's frame, fp32, on a CPU.
            directions: unit length.
        """
        rows = chunk_rows(directions.device)
        encoded = directions.new_empty(*directions.shape[:-1], self._dim)
        parts = [tensor.detach().reshape(-1, tensor.shape[-1]).split(rows) for tensor in (origins, directions, encoded)]
        with torch.autocast(device_type=directions.device.type, enabled=False):
            for part in zip(*parts, strict=True):
                self._write(*part)
        return encoded

    def _write(self, origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], encoded: Tensor) -> None:
        ray_encoding = self._ray_encoding
        # One coordinate after the other in memory, whatever the input's layout.
        origins, directions = torch.stack([origins.T, directions.T]).mT
        points: Tensor | None = None
        if ray_encoding.kind == "points":
            points = self._points(origins, directions, ray_encoding.num_points)
            values = points.flatten(0, 1).T.contiguous()
        else:
            values = ray_encoding.values(origins, directions)
        frequency_encode_into(values, ray_encoding.num_frequencies, encoded[:, : ray_encoding.dim])
        if self._volume is not None:
            if points is None or ray_encoding.num_points != self._volume_points:
                points = self._points(origins, directions, self._volume_points)
            self._read(points, self._volume, encoded[:, ray_encoding.dim :])

    def _points(
        self, origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], count: int
    ) -> Float[Tensor, "count 3 n"]:
        """Return `RayEncoding.points` without jitter."""
        start, step = self._ray_encoding.line(origins, directions)
        positions = self._ray_encoding.positions(torch.linspace(0.0, 1.0, count, device=start.device))
        points = start.new_empty(count, 3, len(start))
        torch.addcmul(start.T, positions[:, None, None], step.T, out=points)
        if not self._ray_encoding.is_contracted:
            return points
        # Like `contract`, whose norm is slow along any axis but the last.
        norm = points.square().sum(1, keepdim=True).sqrt_().clamp_min_(1.0)
        return points.mul_((2.0 - 1.0 / norm).div_(norm))

    def _read(self, points: Float[Tensor, "count 3 n"], volume: FeatureVolume, features: Tensor) -> None:
        """Write what `FeatureVolume.forward` returns: each point's eight corners, weighted and summed."""
        count, _, n = points.shape
        resolution = volume.grid.shape[-1]
        half = (resolution - 1) / 2
        where = points.transpose(0, 1).contiguous().mul_(half / volume.extent).add_(half).clamp_(0.0, resolution - 1.0)
        where.nan_to_num_(0.0)  # Nerfstudio's camera paths contain non-finite poses, which give no index.
        # On the last face the cell before it is read, with all weight on its far corners.
        low = where.floor().clamp_(max=max(resolution - 2, 0))
        x, y, z = where.sub_(low)
        first = torch.add(low[0], low[1], alpha=resolution).add_(low[2], alpha=resolution**2)
        ends = torch.arange(2, dtype=torch.int32, device=where.device) * (resolution > 1)
        corners = (ends[:, None, None] * resolution + ends[:, None]) * resolution + ends
        weights = where.new_empty(8, count, n)
        far = z * y
        sides = ((1.0 - z).sub_(y).add_(far), y - far, z - far, far)
        for side, (near_x, far_x) in zip(sides, weights.unflatten(0, (4, 2)), strict=True):
            torch.mul(side, x, out=far_x)
            torch.sub(side, far_x, out=near_x)
        read = embedding_bag(
            first.to(torch.int32).flatten()[:, None] + corners.flatten(),
            self._rows(volume),
            mode="sum",
            # PyTorch copies three axes several times as fast as a transpose of two.
            per_sample_weights=weights.permute(1, 2, 0).contiguous().flatten(0, 1),
        )
        features.unflatten(-1, (volume.grid.shape[1], count)).copy_(read.unflatten(0, (count, n)).permute(1, 2, 0))

    def _rows(self, volume: FeatureVolume) -> Float[Tensor, "points channels"]:
        grid = volume.grid.detach()
        state, table = weights_state([grid]), self._table
        if table is None or table.state != state:
            table = self._table = _Table(state, grid[0].permute(1, 2, 3, 0).reshape(-1, grid.shape[1]).contiguous())
        return table.rows
