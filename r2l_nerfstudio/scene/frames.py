"""Between the scene's world and the frame Nerfstudio's dataparser puts a capture (and so teacher and student) in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor


def _with_poses(camera: Cameras, poses: Float[Tensor, "*batch 3 4"]) -> Cameras:
    return Cameras(
        camera_to_worlds=poses,
        fx=camera.fx,
        fy=camera.fy,
        cx=camera.cx,
        cy=camera.cy,
        width=camera.width,
        height=camera.height,
        camera_type=camera.camera_type,
    )


def camera_in_world_frame(camera: Cameras, outputs: DataparserOutputs) -> Cameras:
    """The same undistorted cameras as the capture's `transforms.json` would state them.

    A dataparser maps a world point p to scale * (R p + t) with [R | t] = `dataparser_transform`; intrinsics stay.

    Args:
        camera: Cameras of any batch shape in the dataparser's frame.
        outputs: What the dataparser returned for the capture.
    """
    pose = camera.camera_to_worlds
    transform = outputs.dataparser_transform.to(pose)
    rotation, shift = transform[:3, :3], transform[:3, 3]
    centre = (pose[..., 3] / outputs.dataparser_scale - shift) @ rotation  # row vectors: x @ R is R^T x
    return _with_poses(camera, torch.cat([rotation.T @ pose[..., :3], centre[..., None]], -1))


def camera_in_dataparser_frame(camera: Cameras, outputs: DataparserOutputs) -> Cameras:
    """Inverse of `camera_in_world_frame`: cameras of any batch shape from the world into the dataparser's frame."""
    pose = camera.camera_to_worlds
    transform = outputs.dataparser_transform.to(pose)
    rotation, shift = transform[:3, :3], transform[:3, 3]
    centre = (pose[..., 3] @ rotation.T + shift) * outputs.dataparser_scale
    return _with_poses(camera, torch.cat([rotation @ pose[..., :3], centre[..., None]], -1))
