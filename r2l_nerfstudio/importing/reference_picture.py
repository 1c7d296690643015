"""The image that the published code would render, in plain PyTorch, independent of this package's ray encoding and
models."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.importing.published_network import PublishedNetwork


def published_points(
    pose: Float[Tensor, "3 4"],
    rows: int,
    columns: int,
    focal: float,
    pixel_offset: float,
    near: float,
    far: float,
    num_points: int,
    is_ndc: bool,
) -> Float[Tensor, "rows columns points 3"]:
    """Return sample points as published: equal steps of planar depth, both ends included.

    Args:
        pose: camera to world, OpenGL axes, in the published frame.
        rows: rows of pixels, or of a MobileR2L's cells.
        columns: number of columns.
        focal: focal length in the same unit.
        pixel_offset: 0 for R2L, 0.5 for MobileR2L.
        near: position of the first point.
        far: position of the last point.
        num_points: sample points per ray.
        is_ndc: whether they lie in normalized device coordinates.
    """
    y, x = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
    across = (x + pixel_offset - columns / 2) / focal
    down = (y + pixel_offset - rows / 2) / focal
    local = torch.stack([across, -down, -torch.ones_like(across)], dim=-1)
    directions = local @ pose[:, :3].T
    origins = pose[:, 3].expand_as(directions)
    if is_ndc:
        to_plane = -(1.0 + origins[..., 2:]) / directions[..., 2:]
        origins = origins + to_plane * directions
        (ox, oy, oz), (dx, dy, dz) = origins.unbind(-1), directions.unbind(-1)
        wide, high = 2 * focal / columns, 2 * focal / rows
        origins = torch.stack([-wide * ox / oz, -high * oy / oz, 1 + 2 / oz], dim=-1)
        directions = torch.stack([-wide * (dx / dz - ox / oz), -high * (dy / dz - oy / oz), -2 / oz], dim=-1)
    share = torch.linspace(0.0, 1.0, num_points)
    positions = near * (1 - share) + far * share
    return origins[..., None, :] + positions[:, None] * directions[..., None, :]


def published_code(
    points: Float[Tensor, "rows columns points 3"], num_frequencies: int
) -> Float[Tensor, "rows columns encoded"]:
    """Return the frequency encoding in the published order: per coordinate L sines, L cosines, and the coordinate
    itself."""
    phases = points.flatten(-2)[..., None] * 2.0 ** torch.arange(num_frequencies)
    return torch.cat([phases.sin(), phases.cos(), points.flatten(-2)[..., None]], dim=-1).flatten(-2)


@torch.no_grad()
def published_picture(
    network: PublishedNetwork,
    pose: Float[Tensor, "3 4"],
    height: int,
    width: int,
    focal: float,
    near: float,
    far: float,
    is_ndc: bool,
) -> Float[Tensor, "height width 3"]:
    """Render one image with the file's own weights.

    Args:
        network: network read from the file.
        pose: camera to world, OpenGL axes, in the published frame.
        height: in pixels; for a MobileR2L a multiple of its factor.
        width: in pixels.
        focal: focal length in pixels.
        near: position of the first point.
        far: position of the last point.
        is_ndc: whether points lie in normalized device coordinates.
    """
    factor = network.sizes.get("upsampling_factor", 1)
    reads_ray_image = network.kind == "mobile-r2l"
    rows, columns = height // factor, width // factor
    points = published_points(
        pose.float(),
        rows,
        columns,
        focal / factor,
        0.5 if reads_ray_image else 0.0,
        near,
        far,
        network.num_points,
        is_ndc,
    )
    encoded = published_code(points, network.num_frequencies)
    if reads_ray_image:
        return network.run(encoded.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    return network.run(encoded.flatten(0, 1)).view(height, width, 3)
