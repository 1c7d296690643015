"""Rays of any Nerfstudio camera; pinhole cameras take an analytic path."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.utils.math import intersect_obb
from torch import Tensor

from r2l_nerfstudio.rays.pinhole import image_rays


def is_perspective(camera: Cameras) -> bool:
    """Return whether a camera is a perspective one, with lens distortion or without."""
    return int(camera.camera_type.flatten()[0]) == CameraType.PERSPECTIVE.value


def is_pinhole(camera: Cameras) -> bool:
    """Return whether a camera is an undistorted perspective one."""
    if not is_perspective(camera):
        return False
    return camera.distortion_params is None or not bool(camera.distortion_params.any())


def pinhole_parameters(camera: Cameras, device: torch.device) -> tuple[Float[Tensor, "3 4"], Float[Tensor, "4"]]:
    """Return camera to world, and fx, fy, cx, cy in pixels, of a batch of one camera, on a device in fp32."""
    intrinsics = torch.cat([camera.fx[0], camera.fy[0], camera.cx[0], camera.cy[0]]).to(device, torch.float32)
    return camera.camera_to_worlds[0].to(device, torch.float32), intrinsics


def camera_rays(
    camera: Cameras, device: torch.device
) -> tuple[Float[Tensor, "height width 3"], Float[Tensor, "height width 3"]]:
    """Return origins and unit directions of all pixels of one camera.

    Pinholes take an analytic path: `Cameras.generate_rays` takes 0.9 s for 800x800 on two cores.

    Args:
        camera: one camera, with or without a batch dimension.
        device: device of the rays.
    """
    camera = camera.reshape((1,))
    if is_pinhole(camera):
        pose, intrinsics = pinhole_parameters(camera, device)
        return image_rays(pose, intrinsics, int(camera.height[0]), int(camera.width[0]))
    bundle = camera.to(device).generate_rays(camera_indices=0, keep_shape=True)
    return bundle.origins, bundle.directions


class CameraRays:
    """One camera and the rays through its pixels, which are computed once, when they are first read.

    Args:
        camera: one camera, with or without a batch dimension.
        device: device of the rays.
    """

    def __init__(self, camera: Cameras, device: torch.device) -> None:
        self.camera = camera.reshape((1,))
        self.device = device
        self.height, self.width = int(self.camera.height[0]), int(self.camera.width[0])
        self.is_pinhole = is_pinhole(self.camera)
        self.is_distorted = is_perspective(self.camera) and not self.is_pinhole
        """Whether it is a perspective camera with lens distortion."""

    @cached_property
    def pinhole(self) -> tuple[Float[Tensor, "3 4"], Float[Tensor, "4"]]:
        """Camera to world, and fx, fy, cx, cy in pixels, of an undistorted perspective camera."""
        return pinhole_parameters(self.camera, self.device)

    @cached_property
    def rays(self) -> tuple[Float[Tensor, "height width 3"], Float[Tensor, "height width 3"]]:
        """Origins and unit directions through the pixel centers, in the run's frame."""
        return camera_rays(self.camera, self.device)


def distorted_rays(
    camera: Cameras, height: int, width: int, border: int, device: torch.device
) -> tuple[Float[Tensor, "rows columns 3"], Float[Tensor, "rows columns 3"]]:
    """Return origins and unit directions of a grid of pixels that may extend past the image of a perspective camera with
    lens distortion.

    Args:
        camera: batch of one camera.
        height: rows of pixels inside the border.
        width: columns of pixels inside the border.
        border: pixels around them; the first pixel inside it is the image's first.
        device: device of the rays.
    """
    rows, columns = (torch.arange(-border, size + border, device=device) + 0.5 for size in (height, width))
    coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    bundle = camera.to(device).generate_rays(camera_indices=0, coords=coords)
    return bundle.origins, bundle.directions


def crop_interval(
    origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], box: OrientedBox
) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """Return distances at which rays enter and leave a crop box; the entry is beyond the exit where they miss it."""
    shape = origins.shape[:-1]
    box = OrientedBox(R=box.R.to(origins), T=box.T.to(origins), S=box.S.to(origins))
    enter, leave = intersect_obb(origins.reshape(-1, 3), directions.reshape(-1, 3), box)
    # A ray that misses has 1e10 at both ends.
    leave = torch.where(enter >= 1e9, 0.0, leave)
    return enter.reshape(*shape, 1), leave.reshape(*shape, 1)
