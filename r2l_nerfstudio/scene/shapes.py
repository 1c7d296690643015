"""Solids with closed-form ray intersections.

Every solid is convex, so a ray is inside it on one interval [enter, leave] of its length, and a solid cut out of several
simpler ones (a box is three slabs) is the intersection of their intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

# A closer hit is the surface on which the ray starts.
EPSILON = 1e-4


class Shape(Protocol):
    """A solid in world coordinates."""

    def intersect(
        self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> tuple[Float[Tensor, "rays"], Float[Tensor, "rays 3"]]:
        """Intersect rays with the solid.

        Args:
            origins: starts of the rays, world units; they may be inside the solid.
            directions: unit vectors.

        Returns:
            Distance along the ray (inf where it misses) and the outward unit normal there (anything where it misses).
        """
        ...

    def local(self, points: Float[Tensor, "rays 3"]) -> Float[Tensor, "rays 3"]:
        """Return world points in the solid's own axes, from its own center, for textures."""
        ...


def _first_surface(enter: Tensor, leave: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of the first surface in front of the ray's start, and whether it is the far one (start
    inside)."""
    inside = enter < EPSILON
    distance = torch.where(inside, leave, enter)
    hit = (enter <= leave) & (distance > EPSILON)
    return torch.where(hit, distance, torch.inf), inside


def _slab(position: Tensor, slope: Tensor, half: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the interval in which |position + t * slope| <= half, element by element."""
    # A ray parallel to the slab divides by a tiny number of the right sign, which gives an infinite or an empty
    # interval instead of NaN.
    slope = torch.where(slope.abs() < 1e-12, torch.full_like(slope, 1e-12), slope)
    first, second = (-half - position) / slope, (half - position) / slope
    return torch.minimum(first, second), torch.maximum(first, second)


@dataclass(frozen=True)
class Sphere:
    """A ball."""

    center: tuple[float, float, float]
    radius: float

    def local(self, points: Float[Tensor, "rays 3"]) -> Float[Tensor, "rays 3"]:
        """See `Shape.local`."""
        return points - points.new_tensor(self.center)

    def intersect(
        self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> tuple[Float[Tensor, "rays"], Float[Tensor, "rays 3"]]:
        """See `Shape.intersect`."""
        start = self.local(origins)
        along = (start * directions).sum(-1)
        # The distance of the center from the ray's line is far better conditioned than b^2 - c for a distant start.
        aside = start - along[:, None] * directions
        half_chord = (self.radius**2 - (aside**2).sum(-1)).clamp(min=-1.0)
        root = torch.where(half_chord >= 0, half_chord.clamp(min=0).sqrt(), -torch.inf)
        distance, _ = _first_surface(-along - root, -along + root)
        at = torch.where(distance.isfinite(), distance, 0.0)
        return distance, (start + at[:, None] * directions) / self.radius


@dataclass(frozen=True)
class Box:
    """A box that stands upright, turned about the vertical (z) axis by `turn` degrees."""

    center: tuple[float, float, float]
    half_size: tuple[float, float, float]
    turn: float = 0.0

    def _axes(self, like: Tensor) -> Float[Tensor, "3 3"]:
        """Rows: the box's own axes in world coordinates."""
        cos, sin = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
        return like.new_tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])

    def local(self, points: Float[Tensor, "rays 3"]) -> Float[Tensor, "rays 3"]:
        """See `Shape.local`."""
        return (points - points.new_tensor(self.center)) @ self._axes(points).T

    def intersect(
        self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> tuple[Float[Tensor, "rays"], Float[Tensor, "rays 3"]]:
        """See `Shape.intersect`."""
        axes = self._axes(origins)
        slope = directions @ axes.T
        enter, leave = _slab(self.local(origins), slope, origins.new_tensor(self.half_size))
        (first, entered), (last, left) = enter.max(-1), leave.min(-1)
        distance, inside = _first_surface(first, last)
        side = torch.where(inside, left, entered)
        # A ray enters a face against its outward normal, and leaves along it.
        sign = slope.gather(-1, side[:, None]).sign()[:, 0] * torch.where(inside, 1.0, -1.0)
        return distance, sign[:, None] * axes[side]


@dataclass(frozen=True)
class Cylinder:
    """An upright (z axis) cylinder with both lids."""

    center: tuple[float, float, float]
    radius: float
    half_height: float

    def local(self, points: Float[Tensor, "rays 3"]) -> Float[Tensor, "rays 3"]:
        """See `Shape.local`."""
        return points - points.new_tensor(self.center)

    def intersect(
        self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> tuple[Float[Tensor, "rays"], Float[Tensor, "rays 3"]]:
        """See `Shape.intersect`."""
        start = self.local(origins)
        lid_in, lid_out = _slab(start[:, 2], directions[:, 2], self.half_height)
        # The mantle from above: a circle met by a line whose speed is less than one.
        flat = directions[:, :2]
        speed = flat.norm(dim=-1).clamp(min=1e-12)
        heading = flat / speed[:, None]
        along = (start[:, :2] * heading).sum(-1)
        aside = start[:, :2] - along[:, None] * heading
        half_chord = self.radius**2 - (aside**2).sum(-1)
        root = torch.where(half_chord >= 0, half_chord.clamp(min=0).sqrt(), -torch.inf)
        mantle_in, mantle_out = (-along - root) / speed, (-along + root) / speed
        distance, inside = _first_surface(torch.maximum(lid_in, mantle_in), torch.minimum(lid_out, mantle_out))
        on_lid = torch.where(inside, lid_out < mantle_out, lid_in > mantle_in)
        at = torch.where(distance.isfinite(), distance, 0.0)
        point = start + at[:, None] * directions
        lid = torch.stack([torch.zeros_like(at), torch.zeros_like(at), point[:, 2].sign()], -1)
        mantle = torch.cat([point[:, :2] / self.radius, torch.zeros_like(point[:, 2:])], -1)
        return distance, torch.where(on_lid[:, None], lid, mantle)
