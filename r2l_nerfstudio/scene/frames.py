"""Conversion between the scene's world frame and the frame of Nerfstudio's dataparser (and so of teacher and
student)."""

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
    """Return the same undistorted cameras in the world frame, as the capture's `transforms.json` has them.

    A dataparser maps a world point p to scale * (R p + t) with [R | t] = `dataparser_transform`; intrinsics do not
    change.

    Args:
        camera: cameras of any batch shape in the dataparser's frame.
        outputs: what the dataparser returned for the capture.
    """
    pose = camera.camera_to_worlds
    transform = outputs.dataparser_transform.to(pose)
    rotation, shift = transform[:3, :3], transform[:3, 3]
    center = (pose[..., 3] / outputs.dataparser_scale - shift) @ rotation  # Row vectors: x @ R is R^T x.
    return _with_poses(camera, torch.cat([rotation.T @ pose[..., :3], center[..., None]], -1))


def camera_in_dataparser_frame(camera: Cameras, outputs: DataparserOutputs) -> Cameras:
    """Return cameras of any batch shape in the dataparser's frame; the inverse of `camera_in_world_frame`."""
    pose = camera.camera_to_worlds
    transform = outputs.dataparser_transform.to(pose)
    rotation, shift = transform[:3, :3], transform[:3, 3]
    center = (pose[..., 3] @ rotation.T + shift) * outputs.dataparser_scale
    return _with_poses(camera, torch.cat([rotation @ pose[..., :3], center[..., None]], -1))
