"""Rays on which engines are compared: the same ones each time, of the scene that the student knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.sizes import is_grid
from r2l_nerfstudio.rays.ray_code import RayCode

SIDE = 19
"""Rays along each side of a probe picture: what engines compile for does not divide it, so that padding is probed too."""


def probe_code(
    ray_code: RayCode, encode: Callable[[Tensor, Tensor], Tensor], network: nn.Module, rays_per_cell: int = 1
) -> Float[Tensor, "*code"]:
    """Code of four small pictures of the scene, from where its cameras were.

    Args:
        ray_code: knows where the scene lies and how it was looked at.
        encode: from origins and directions [4 rows columns 3], or of so many more rays, to code [4 rows columns in_dim].
        network: that reads the code.
        rays_per_cell: rays along each side that `encode` makes one cell of.

    Returns:
        [4, in_dim, rows, columns] for a network of ray images, else [rays, in_dim].
    """
    right, up, backward = ray_code.axes.float().unbind(-1)
    distance = (ray_code.near + ray_code.far) / 2 if ray_code.spacing == "sphere" else 0 * ray_code.radius
    side = SIDE * rays_per_cell
    intrinsics = ray_code.center.new_tensor([side, side, side / 2, side / 2])
    rays = []
    for across, down in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        aside = 0.3 * ray_code.radius * (across * right + down * up)
        pose = torch.stack([right, up, backward, ray_code.center + distance * backward + aside], dim=-1)
        rays.append(ray_code.image_rays(pose, intrinsics, side, side))
    origins, directions = (torch.stack(parts) for parts in zip(*rays, strict=True))
    with torch.no_grad():
        code = encode(origins, directions)
    return code.permute(0, 3, 1, 2) if is_grid(network) else code.flatten(0, 2)
