"""Learned features in space, read along a ray: what a network of rays would otherwise have to memorise."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import grid_sample


class FeatureVolume(nn.Module):
    """A dense grid of features over a cube, read trilinearly at the points of a ray.

    Args:
        resolution: grid points along each side.
        channels: features per grid point.
    """

    extent: Tensor
    """Half the side of the cube, in the points' unit; kept in the checkpoint."""

    def __init__(self, resolution: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("extent", torch.ones(()))
        self.grid = nn.Parameter(0.1 * torch.randn(1, channels, resolution, resolution, resolution))

    def forward(self, points: Float[Tensor, "rays points 3"]) -> Float[Tensor, "rays features"]:
        """Return the features of all points of each ray, side by side, always in fp32; outside the cube those of its
        surface.

        Returns:
            channels * points numbers per ray.
        """
        with torch.autocast(device_type=points.device.type, enabled=False):
            where = (points.float() / self.extent)[None, :, :, None]
            read = grid_sample(self.grid, where, align_corners=True, padding_mode="border")
        return read[0, ..., 0].permute(1, 0, 2).flatten(1)
