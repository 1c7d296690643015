"""The published ray conventions for the capture of a training run."""

from __future__ import annotations

import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, choose_sampler
from r2l_nerfstudio.rays.published import (
    BLENDER_RADIUS,
    PublishedScene,
    Similarity,
    blender_residual,
    from_dataparser,
    llff_frame,
    published_scene,
)
from r2l_nerfstudio.rays.spacing import SceneBounds

BLENDER_TOLERANCE = 0.02
"""Largest `blender_residual` of a capture whose own coordinates are NeRF-Synthetic's."""


def scene_of_capture(
    cameras: CaptureCameras, dataparser_outputs: DataparserOutputs, bounds: SceneBounds, reads_ray_image: bool
) -> PublishedScene:
    """Return frame, near and far as the published code would choose them.

    A capture around an object gets NeRF-Synthetic's: its own coordinates if they are NeRF-Synthetic's, else its focus
    at the origin and its cameras at 4.03. Any other capture gets LLFF's: recentered, the nearest visible point at 1 /
    0.75; a MobileR2L uses normalized device coordinates if all cameras face one way.

    Args:
        cameras: the training cameras.
        dataparser_outputs: of the training split.
        bounds: where the scene lies; its near and far count.
        reads_ray_image: MobileR2L rather than R2L.
    """
    layout = choose_sampler(cameras)
    if layout == "sphere":
        to_files = from_dataparser(dataparser_outputs.dataparser_transform, dataparser_outputs.dataparser_scale)
        if blender_residual(to_files.poses(cameras.camera_to_worlds)) < BLENDER_TOLERANCE:
            return published_scene(to_files, reads_ray_image, True, (0.0, 0.0))
        focus = cameras.focus.double()
        scale = BLENDER_RADIUS / float((cameras.positions.double() - focus).norm(dim=-1).median())
        centered = Similarity(torch.eye(3, dtype=torch.float64), scale, -scale * focus)
        return published_scene(centered, reads_ray_image, True, (0.0, 0.0))
    # A survey widens what the teacher shows by these shares.
    nearest, farthest = bounds.near / 0.9, bounds.far / 1.1
    similarity = llff_frame(cameras.camera_to_worlds, nearest)
    ndc = None
    if reads_ray_image and layout == "box":
        # Contiguous, since PyTorch's median of an expanded tensor is wrong.
        fx, fy = (float(value) for value in cameras.intrinsics[:, :2].contiguous().median(dim=0).values)
        ndc = (2 * fx / cameras.width, 2 * fy / cameras.height)
    seen = (similarity.scale * nearest, similarity.scale * farthest)
    return published_scene(similarity, reads_ray_image, False, seen, ndc)
