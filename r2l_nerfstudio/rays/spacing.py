"""Spacing of distances along a ray: one number in [0, 1] per point, for every kind of capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SpacingKind = Literal["sphere", "near-far", "disparity"]

MISSED_FRACTION = 0.5
"""Position at which a ray that passes by a bounded scene is taken to end: where it comes closest."""


@dataclass(frozen=True)
class SceneBounds:
    """Bounds of the scene, in the teacher's frame and its unit of length.

    `sphere` spaces points evenly from the entry into the scene's sphere to the exit from it: sliding a camera along
    its ray changes nothing, which suits captures that look inwards at a bounded object. `near-far` spaces them evenly,
    `disparity` evenly in 1/distance, between two distances from the camera: the latter suits unbounded captures.
    """

    kind: SpacingKind
    center: tuple[float, float, float]
    """Center of the scene."""
    radius: float
    """Radius of the scene around its center; lengths are divided by it before encoding."""
    near: float
    """Nearest distance from a camera at which the teacher shows something."""
    far: float
    """Farthest distance from a camera that is distinguished."""


class SphereCrossing(NamedTuple):
    """Where rays cross a sphere."""

    enter: Float[Tensor, "*batch 1"]
    """Distance along the unit ray, negative behind its origin."""
    leave: Float[Tensor, "*batch 1"]
    is_missed: Bool[Tensor, "*batch 1"]
    """Whether the ray misses the sphere, or has it behind its origin."""


def cross_sphere(
    origins: Float[Tensor, "*#batch 3"],
    directions: Float[Tensor, "*#batch 3"],
    center: Float[Tensor, "3"],
    radius: Float[Tensor, ""],
) -> SphereCrossing:
    """Return where unit rays cross a sphere.

    A ray that misses gets a short interval around its point of closest approach, so that encodings stay continuous across
    the sphere's rim and still depend on the ray's direction.
    """
    offset = origins - center
    middle = -(offset * directions).sum(-1, keepdim=True)
    closest_squared = (offset + middle * directions).square().sum(-1, keepdim=True)
    half = (radius**2 - closest_squared).clamp_min((0.1 * radius) ** 2).sqrt()
    is_outside = offset.square().sum(-1, keepdim=True) > radius**2
    is_missed = (closest_squared > radius**2) | ((middle < 0) & is_outside)
    return SphereCrossing(middle - half, middle + half, is_missed)


def stratified(
    num_points: int, shape: tuple[int, ...], jitter: bool, device: torch.device
) -> Float[Tensor, "*batch points"]:
    """Return positions in [0, 1]: equal steps including both ends, or one uniform draw per ray inside each segment.

    The segments' edges are the mid-points between the steps (R2L, sec. 3.3).
    """
    steps = torch.linspace(0.0, 1.0, num_points, device=device)
    if not jitter:
        return steps.expand(*shape, num_points)
    middles = (steps[1:] + steps[:-1]) / 2
    lower = torch.cat([steps[:1], middles])
    upper = torch.cat([middles, steps[-1:]])
    return lower + (upper - lower) * torch.rand(*shape, num_points, device=device)
