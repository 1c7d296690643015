"""Analytic rays of undistorted perspective cameras, in Nerfstudio's convention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def pinhole_rays(
    camera_to_worlds: Float[Tensor, "*batch 3 4"],
    intrinsics: Float[Tensor, "*batch 4"],
    pixels: Float[Tensor, "*batch 2"],
    is_planar: bool = False,
) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
    """Return origins and unit directions of rays through image points, equal to `Cameras.generate_rays` without
    distortion.

    Args:
        camera_to_worlds: OpenGL camera axes (x right, y up, looking along -z) in the world frame.
        intrinsics: fx, fy, cx, cy in pixels.
        pixels: image points (x, y) in pixels; a pixel's center has +0.5 in both.
        is_planar: scale directions to a component of 1 along the viewing axis instead of unit length.

    Returns:
        Origins and directions in the world frame.
    """
    fx, fy, cx, cy = intrinsics.unbind(-1)
    x, y = pixels.unbind(-1)
    local = torch.stack([(x - cx) / fx, -(y - cy) / fy, -torch.ones_like(x)], dim=-1)
    directions = (camera_to_worlds[..., :3, :3] @ local[..., None]).squeeze(-1)
    origins = camera_to_worlds[..., :3, 3].expand_as(directions)
    return origins, directions if is_planar else directions / directions.norm(dim=-1, keepdim=True)


def planar_directions(
    directions: Float[Tensor, "*batch 3"], camera_to_worlds: Float[Tensor, "*batch 3 4"]
) -> Float[Tensor, "*batch 3"]:
    """Scale directions to a component of 1 along their camera's viewing axis.

    Args:
        directions: of any length, of rays that point away from the camera.
        camera_to_worlds: OpenGL camera axes in the same frame.
    """
    along = -(directions * camera_to_worlds[..., :3, 2]).sum(-1, keepdim=True)
    # A lens that sees more than a half space has rays without a planar depth.
    return directions / along.clamp_min(1e-2)


def pixel_centers(height: int, width: int, device: torch.device | str = "cpu") -> Float[Tensor, "height width 2"]:
    """Return the centers (x, y) of the pixels of an image, in pixels: the first one is (0.5, 0.5)."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32) + 0.5,
        torch.arange(width, device=device, dtype=torch.float32) + 0.5,
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1)


def image_rays(
    camera_to_world: Float[Tensor, "3 4"],
    intrinsics: Float[Tensor, "4"],
    height: int,
    width: int,
    pixel_offset: float = 0.5,
    is_planar: bool = False,
) -> tuple[Float[Tensor, "height width 3"], Float[Tensor, "height width 3"]]:
    """Return rays through every pixel of one image, from two small tables and one product, without per-pixel matrices.

    Args:
        camera_to_world: OpenGL camera axes in the world frame.
        intrinsics: fx, fy, cx, cy in pixels.
        height: image height in pixels.
        width: image width in pixels.
        pixel_offset: position in each pixel: 0.5 is the center, 0 the upper left corner.
        is_planar: scale directions to a component of 1 along the viewing axis instead of unit length.

    Returns:
        Origins (a broadcast view) and directions in the world frame. Directions are stored coordinate by coordinate,
        which makes per-pixel operations several times faster.
    """
    fx, fy, cx, cy = intrinsics.unbind(-1)
    device = camera_to_world.device
    x = (torch.arange(width, device=device, dtype=torch.float32) + pixel_offset - cx) / fx
    y = -(torch.arange(height, device=device, dtype=torch.float32) + pixel_offset - cy) / fy
    right, up, backward = camera_to_world[:3, :3, None, None].unbind(1)
    directions = x * right + y[:, None] * up - backward
    if not is_planar:
        # `norm` is 80 times slower across the slowest axis.
        directions = directions / directions.square().sum(0).sqrt()
    directions = directions.permute(1, 2, 0)
    return camera_to_world[:3, 3].expand_as(directions), directions
