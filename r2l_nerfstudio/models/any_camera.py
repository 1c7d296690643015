"""Render any camera from pinhole images, for students that render whole images only."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.camera_rays import CameraRays

WIDEST = math.tan(math.radians(60))
"""Tangent of half the field of view up to which one image serves a lens; beyond it six do."""

RenderPinhole = Callable[[Tensor, Tensor, int, int], Tensor]


def render_by_faces(
    camera: CameraRays, focal: float, render_pinhole: RenderPinhole
) -> Float[Tensor, "height width channels"]:
    """Render a camera with lens distortion, a fisheye or a panorama from pinhole images at its center.

    Args:
        camera: the camera, on the device to render on.
        focal: focal length of the pinhole images in pixels.
        render_pinhole: from pose [3, 4], intrinsics [4], height, width to [height, width, channels].

    Raises:
        InputError: if the camera's rays have more than one origin, as those of a stereo panorama.
    """
    origins, directions = camera.rays
    spread = (origins - origins[:1, :1]).norm(dim=-1).max()
    if float(spread) > 1e-5 * (1 + float(origins[0, 0].norm())):
        raise InputError(
            "This student renders from one point at a time, but the rays of an omnidirectional stereo panorama or an"
            " orthophoto have many origins: choose a perspective, fisheye or equirectangular camera, or an r2l"
            " student, which renders any ray."
        )
    # The origin of the rays, which for one eye of VR180 is not the camera's.
    pose = torch.cat([camera.camera.camera_to_worlds[0, :, :3].to(directions), origins[0, 0, :, None]], dim=-1)
    local = directions @ pose[:, :3]
    tangents = local[..., :2] / -local[..., 2:]
    if bool((local[..., 2] < 0).all()) and float(tangents.abs().max()) <= WIDEST:
        return _read(local, torch.eye(3).to(local), tangents.abs().amax((0, 1)), pose, focal, render_pinhole)
    picture: Tensor | None = None
    nearest = local.abs().argmax(-1)
    for axis in range(3):
        for sign in (-1.0, 1.0):
            here = (nearest == axis) & (local.gather(-1, nearest[..., None])[..., 0] * sign > 0)
            if not here.any():
                continue
            face = _face(axis, sign).to(local)
            read = _read(local[here][None], face, local.new_ones(2), pose, focal, render_pinhole)[0]
            if picture is None:
                picture = read.new_empty(*local.shape[:2], read.shape[-1])
            picture[here] = read
    assert picture is not None  # Every direction has a nearest axis.
    return picture


def _face(axis: int, sign: float) -> Float[Tensor, "3 3"]:
    """Return the rotation (columns right, up, backward) of a camera that looks along an axis."""
    backward = torch.zeros(3)
    backward[axis] = -sign
    up = torch.tensor([0.0, 1.0, 0.0] if axis != 1 else [0.0, 0.0, 1.0])
    return torch.stack([torch.linalg.cross(up, backward), up, backward], dim=-1)


def _read(
    local: Float[Tensor, "height width 3"],
    face: Float[Tensor, "3 3"],
    extent: Float[Tensor, "2"],
    pose: Float[Tensor, "3 4"],
    focal: float,
    render_pinhole: RenderPinhole,
) -> Float[Tensor, "height width channels"]:
    """Render one pinhole image that spans `extent` (tangents) around a face's axis, and sample it along directions."""
    # One pixel more on every side, so that sampling between pixels stays inside.
    half = (extent * focal).ceil() + 1
    width, height = (2 * int(value) for value in half.tolist())
    intrinsics = torch.stack([half.new_tensor(focal), half.new_tensor(focal), half[0], half[1]])
    face_pose = torch.cat([pose[:, :3] @ face, pose[:, 3:]], dim=-1)
    picture = render_pinhole(face_pose, intrinsics, height, width)
    seen = local @ face
    where = torch.stack([seen[..., 0] / -seen[..., 2], -seen[..., 1] / -seen[..., 2]], dim=-1) * focal / half
    channels = picture.permute(2, 0, 1)[None]
    return grid_sample(channels, where[None], align_corners=False, padding_mode="border")[0].permute(1, 2, 0)
