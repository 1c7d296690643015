"""Where a visitor of the web page may move: near the training cameras, around an object or inside a scene."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, look_along

INWARD = math.radians(30)
"""Mean angle past their common focus below which cameras look at an object; otherwise they look around."""
OPEN_GAP = math.radians(75)
"""A wider sector without cameras limits the azimuth."""
BEYOND = math.radians(2)
MOST_POSITIONS = 96


def view_limits(cameras: CaptureCameras, is_bounded: bool, radius: float) -> dict[str, Any]:
    """Return the region and a start in it, as the web page reads them (`OrbitLimits` or `WalkLimits` in its types).

    Args:
        cameras: training cameras.
        is_bounded: whether the student shows a bounded object and nothing around it, which may be seen from farther and
            nearer.
        radius: radius of the scene, in the run's unit.

    Returns:
        Angles in radians, lengths in the run's unit.
    """
    forward = torch.linalg.cross(cameras.up, cameras.mean_axes[:, 0])
    frame = look_along(forward, cameras.up)
    offset = cameras.positions - cameras.focus
    distances = offset.norm(dim=-1).clamp_min(1e-6)
    past = (-(offset * cameras.axes).sum(-1) / distances).clamp(-1, 1).acos().mean()
    if past > INWARD:
        return _walk(cameras, frame)
    azimuth, elevation = _angles(offset / distances[:, None] @ frame)
    start = _most_usual(azimuth, elevation)
    low, high = float(distances.min()), float(distances.max())
    return {
        "kind": "orbit",
        "center": cameras.focus.tolist(),
        "frame": frame.T.tolist(),
        "azimuth": _way_around(azimuth, float(azimuth[start])),
        "elevation": _range(elevation),
        "distance": [0.75 * low, 1.3 * high] if is_bounded else [0.95 * low, 1.05 * high],
        "shift": 0.35 * radius if is_bounded else 0.1 * low,
        "start": {
            "azimuth": float(azimuth[start]),
            "elevation": float(elevation[start]),
            "distance": float(distances[start]),
        },
    }


def start_pose(view: dict[str, Any]) -> Float[Tensor, "3 4"]:
    """Return the pose at a region's start: OpenGL axes, in the run's frame."""
    azimuth, elevation = view["start"]["azimuth"], view["start"]["elevation"]
    frame = torch.tensor(view["frame"]).T
    sin_a, cos_a, sin_e, cos_e = math.sin(azimuth), math.cos(azimuth), math.sin(elevation), math.cos(elevation)
    rotation = frame @ torch.tensor(
        [[cos_a, -sin_a * sin_e, sin_a * cos_e], [0.0, cos_e, sin_e], [-sin_a, -cos_a * sin_e, cos_a * cos_e]]
    )
    if view["kind"] == "walk":
        position = torch.tensor(view["start"]["position"])
    else:
        position = torch.tensor(view["center"]) + view["start"]["distance"] * rotation[:, 2]
    return torch.cat([rotation, position[:, None]], dim=-1)


def _walk(cameras: CaptureCameras, frame: Float[Tensor, "3 3"]) -> dict[str, Any]:
    """Return the region for cameras that look around: their positions and directions."""
    azimuth, elevation = _angles(-cameras.axes @ frame)
    chosen = torch.linspace(0, len(azimuth) - 1, min(len(azimuth), MOST_POSITIONS)).round().long()
    positions = cameras.positions[chosen]
    if len(chosen) > 1:
        spacing = torch.cdist(positions, positions).fill_diagonal_(math.inf).min(-1).values.median()
    else:
        spacing = torch.tensor(0.1)
    start = int((cameras.positions - cameras.positions.median(0).values).norm(dim=-1).argmin())
    return {
        "kind": "walk",
        "frame": frame.T.tolist(),
        "positions": positions.tolist(),
        "reach": max(float(spacing), 1e-4),
        "azimuth": _way_around(azimuth, float(azimuth[start])),
        "elevation": _range(elevation),
        "start": {
            "azimuth": float(azimuth[start]),
            "elevation": float(elevation[start]),
            "position": cameras.positions[start].tolist(),
        },
    }


def _angles(backward: Float[Tensor, "num 3"]) -> tuple[Float[Tensor, "num"], Float[Tensor, "num"]]:
    """Return azimuth and elevation, in radians, of unit vectors (right, up, backward)."""
    return torch.atan2(backward[:, 0], backward[:, 2]), backward[:, 1].clamp(-1, 1).asin()


def _most_usual(azimuth: Float[Tensor, "num"], elevation: Float[Tensor, "num"]) -> int:
    """Return the camera nearest to the middle of all, which face azimuth 0 on average."""
    return int((azimuth.abs() / math.pi + (elevation - elevation.median()).abs()).argmin())


def _way_around(azimuth: Float[Tensor, "num"], start: float) -> list[float] | None:
    """Return the sector that contains all azimuths and `start`; None if no gap is wide."""
    angles = azimuth.sort().values
    gaps = torch.cat([angles[1:] - angles[:-1], (angles[:1] + 2 * math.pi) - angles[-1:]])
    widest = int(gaps.argmax())
    if float(gaps[widest]) < OPEN_GAP:
        return None
    low = float(angles[(widest + 1) % len(angles)])
    high = low + 2 * math.pi - float(gaps[widest])
    turns = 2 * math.pi * math.floor((start - low + 1e-6) / (2 * math.pi))
    return [low + turns - BEYOND, high + turns + BEYOND]


def _range(elevation: Float[Tensor, "num"]) -> list[float]:
    limit = math.radians(86)
    return [max(float(elevation.min()) - BEYOND, -limit), min(float(elevation.max()) + BEYOND, limit)]
