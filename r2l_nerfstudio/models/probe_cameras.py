"""Cameras on which engines and exports are compared with PyTorch: they see the scene that a student was trained on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from r2l_nerfstudio.models.light_field import LightFieldModel

TURNS = (-0.3, 0.0, 0.45)
"""Radians around the mean camera's up axis."""
SIDE = 19
"""Cells along each side of an engine's probe images: no engine compiles for a multiple of it, so padding is compared too."""


def probe_poses(model: LightFieldModel) -> Float[Tensor, "probes 3 4"]:
    """Return poses from which the student's scene is seen, OpenGL axes, in the run's frame, on the CPU.

    Around a bounded object they look at it from outside; in any other scene they stand at its center and look around.
    """
    encoding = model.ray_encoding
    axes = encoding.axes.cpu()
    distance = float(encoding.near + encoding.far) / 2 if encoding.spacing == "sphere" else 0.0
    poses = []
    for turn in TURNS:
        cos, sin = math.cos(turn), math.sin(turn)
        rotation = axes @ torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
        position = encoding.center.cpu() + distance * rotation[:, 2]
        poses.append(torch.cat([rotation, position[:, None]], dim=-1))
    return torch.stack(poses)


def probe_intrinsics(model: LightFieldModel, width: int, height: int) -> Float[Tensor, "4"]:
    """Return fx, fy, cx, cy in pixels of a common lens, at a focal length that the student renders without resampling."""
    focal = model.native_focal(1.2 * max(width, height))
    return torch.tensor([focal, focal, width / 2, height / 2])


@torch.no_grad()
def probe_encoding(model: LightFieldModel) -> Float[Tensor, "*encoded"]:
    """Return the encoding of small images of the scene, on the student's device.

    Returns:
        (images, in_dim, rows, columns) for a network of ray images, else (rays, in_dim).
    """
    side = SIDE * model.factor
    intrinsics = torch.tensor([side, side, side / 2, side / 2], dtype=torch.float32, device=model.device)
    poses = probe_poses(model).to(model.device)
    return torch.cat([model.encoding_for_camera(pose, intrinsics, side, side).encoded for pose in poses])
