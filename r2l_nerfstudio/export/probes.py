"""Cameras to compare an export on: they look at the scene that the student keeps in its checkpoint."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModel
from r2l_nerfstudio.models.r2l import R2LModel

TURNS = (-0.3, 0.0, 0.45)
"""Radians around the mean camera's up axis."""


def probe_poses(model: LightFieldModel) -> Float[Tensor, "probes 3 4"]:
    """Poses from which the student's scene is seen, OpenGL axes, in the run's frame.

    Around a bounded object they look at it from outside; in any other scene they stand at its centre and look around.
    """
    code = model.ray_code
    axes = code.axes.cpu()
    distance = float(code.near + code.far) / 2 if code.spacing == "sphere" else 0.0
    poses = []
    for turn in TURNS:
        cos, sin = math.cos(turn), math.sin(turn)
        rotation = axes @ torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
        position = code.center.cpu() + distance * rotation[:, 2]
        poses.append(torch.cat([rotation, position[:, None]], dim=-1))
    return torch.stack(poses)


def probe_intrinsics(model: LightFieldModel, width: int, height: int) -> Float[Tensor, "4"]:
    """fx, fy, cx, cy in pixels: a usual lens; for a MobileR2L student the focal length that it draws at, for a composited
    R2L at least that: it averages coarser pictures, which a graph leaves to its caller."""
    focal = 1.2 * max(width, height)
    if isinstance(model, MobileR2LModel):
        focal = float(model.focal)
    elif isinstance(model, R2LModel) and model.composited is not None:
        focal = max(focal, float(model.focal))
    return torch.tensor([focal, focal, width / 2, height / 2])
