"""A ray as the numbers a student reads, and its bounds; both live in the student's checkpoint."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.rays.contraction import contract
from r2l_nerfstudio.rays.encoding import encoded_dim, frequency_encode, frequency_encode_into
from r2l_nerfstudio.rays.spacing import SceneBounds, SpacingKind, SphereCrossing, cross_sphere, stratified

RayCodeKind = Literal["points", "plucker", "two-plane", "composited"]


class RayCode(nn.Module):
    """Turns rays into the encoded numbers a student reads, always in fp32.

    - `points`: K points along the ray (R2L, sec. 3.2), relative to the scene's centre, in units of its radius, contracted
      unless the scene is a sphere.
    - `plucker`: unit direction and moment around the scene's centre (Light Field Networks, eq. 2).
    - `two-plane`: where the ray meets two planes across the capture's viewing axis.

    Args:
        kind: which code.
        num_points: K, for `points`.
        num_frequencies: L of the frequency encoding.

    Raises:
        InputError: for an unknown kind.
    """

    center: Tensor
    radius: Tensor
    near: Tensor
    far: Tensor
    axes: Tensor

    def __init__(self, kind: RayCodeKind = "points", num_points: int = 16, num_frequencies: int = 10) -> None:
        super().__init__()
        if kind not in get_args(RayCodeKind):
            raise InputError(
                f"Unknown ray code {kind!r}: choose --pipeline.model.ray-code from {', '.join(get_args(RayCodeKind))}."
            )
        self.kind = kind
        self.num_points = num_points
        self.num_frequencies = num_frequencies
        self.spacing: SpacingKind = "near-far"
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("radius", torch.ones(()))
        self.register_buffer("near", torch.tensor(0.1))
        self.register_buffer("far", torch.ones(()))
        self.register_buffer("axes", torch.eye(3))

    def get_extra_state(self) -> dict[str, Any]:
        return {"spacing": self.spacing}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.spacing = state["spacing"]

    @property
    def dim(self) -> int:
        """Length of the encoded code."""
        values = {"points": 3 * self.num_points, "plucker": 6, "two-plane": 4}[self.kind]
        return encoded_dim(values, self.num_frequencies)

    def set_bounds(self, bounds: SceneBounds, axes: Float[Tensor, "3 3"]) -> None:
        """Fix the scene's bounds and, for `two-plane`, the capture's mean right, up and backward axes (columns)."""
        self.spacing = bounds.kind
        self.center.copy_(torch.tensor(bounds.center))
        self.radius.fill_(bounds.radius)
        self.near.fill_(bounds.near)
        self.far.fill_(bounds.far)
        self.axes.copy_(axes)

    def forward(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], jitter: bool = False
    ) -> Float[Tensor, "*batch dim"]:
        """Encode rays.

        Args:
            origins: in the teacher's frame.
            directions: unit length.
            jitter: draw the points at random inside their segments, per ray (training).

        Returns:
            fp32 code of length `dim`.
        """
        with torch.autocast(device_type=origins.device.type, enabled=False):
            return self.encoded(self.values(origins.float(), directions.float(), jitter))

    def encoded(self, values: Float[Tensor, "*batch values"]) -> Float[Tensor, "*batch dim"]:
        """The code of `values`; as `frequency_encode`, without its memory where no gradients are wanted."""
        if values.requires_grad:
            return frequency_encode(values, self.num_frequencies)
        code = values.new_empty(*values.shape[:-1], self.dim)
        flat = values.reshape(-1, values.shape[-1])
        frequency_encode_into(flat, self.num_frequencies, code.view(-1, self.dim))
        return code

    def values(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], jitter: bool = False
    ) -> Float[Tensor, "*batch values"]:
        """The code before frequency encoding: numbers of order one."""
        if self.kind == "plucker":
            moments = torch.linalg.cross((origins - self.center) / self.radius, directions)
            return torch.cat([directions, moments], dim=-1)
        if self.kind == "two-plane":
            return self._two_plane(origins, directions)
        return self.points(origins, directions, self.num_points, jitter).flatten(-2)

    def points(
        self,
        origins: Float[Tensor, "*batch 3"],
        directions: Float[Tensor, "*batch 3"],
        num_points: int,
        jitter: bool = False,
    ) -> Float[Tensor, "*batch points 3"]:
        """Points along rays, relative to the scene's centre, in units of its radius, contracted unless it is a sphere."""
        # Without jitter all rays have the same ones.
        fractions = stratified(num_points, tuple(origins.shape[:-1]) if jitter else (), jitter, origins.device)
        start, step = self.line(origins, directions)
        points = start[..., None, :] + self.positions(fractions)[..., None] * step[..., None, :]
        return points if self.spacing == "sphere" else contract(points)

    def line(
        self, origins: Float[Tensor, "*#batch 3"], directions: Float[Tensor, "*#batch 3"]
    ) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
        """Start and step of rays: `start + positions(fraction) * step` are their points, before contraction."""
        start = origins - self.center
        if self.spacing != "sphere":
            return start / self.radius, directions / self.radius
        enter, leave, _ = cross_sphere(origins, directions, self.center, self.radius)
        return (start + enter * directions) / self.radius, (leave - enter) / self.radius * directions

    def positions(self, fractions: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """In steps of `line`, of positions in [0, 1] of the scene's spacing: the same ones for all rays."""
        return fractions if self.spacing == "sphere" else self.distance(fractions, None)

    def _two_plane(self, origins: Tensor, directions: Tensor) -> Tensor:
        local_origins = (origins - self.center) / self.radius @ self.axes
        local_directions = directions @ self.axes
        # A ray along the planes never meets them: keep its slope finite rather than the code infinite.
        slope = local_directions[..., 2:].abs().clamp_min(0.1) * local_directions[..., 2:].sign().add(0.5).sign()
        hits = [
            local_origins[..., :2] + (plane - local_origins[..., 2:]) / slope * local_directions[..., :2]
            for plane in (-1.0, 1.0)
        ]
        return torch.cat(hits, dim=-1)

    def to_distance(
        self,
        origins: Float[Tensor, "*batch 3"],
        directions: Float[Tensor, "*batch 3"],
        fractions: Float[Tensor, "*batch n"],
    ) -> Float[Tensor, "*batch n"]:
        """Distance along the unit ray of positions in [0, 1] of the scene's spacing."""
        return self.distance(fractions, self.crossing(origins, directions))

    def crossing(
        self, origins: Float[Tensor, "*#batch 3"], directions: Float[Tensor, "*#batch 3"]
    ) -> SphereCrossing | None:
        """Where unit rays cross a bounded scene's sphere; None in a scene that has no sphere."""
        if self.spacing != "sphere":
            return None
        return cross_sphere(origins, directions, self.center, self.radius)

    def distance(self, fractions: Float[Tensor, "*n"], crossing: SphereCrossing | None) -> Float[Tensor, "*n"]:
        """As `to_distance`, of rays whose `crossing` is known; all rays alike where it is None."""
        if self.spacing == "disparity":
            return 1.0 / (1.0 / self.near + (1.0 / self.far - 1.0 / self.near) * fractions)
        start, end = (self.near, self.far) if crossing is None else crossing[:2]
        return start + (end - start) * fractions

    def to_fraction(
        self,
        origins: Float[Tensor, "*batch 3"],
        directions: Float[Tensor, "*batch 3"],
        distances: Float[Tensor, "*batch n"],
    ) -> Float[Tensor, "*batch n"]:
        """Inverse of `to_distance`, clamped to [0, 1]: how a student's depth channel is coded."""
        if self.spacing == "disparity":
            near, far = 1.0 / self.near, 1.0 / self.far
            return ((1.0 / distances.clamp_min(1e-6) - near) / (far - near)).clamp(0.0, 1.0)
        crossing = self.crossing(origins, directions)
        start, end = (self.near, self.far) if crossing is None else crossing[:2]
        return ((distances - start) / (end - start)).clamp(0.0, 1.0)

    def misses_scene(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"]
    ) -> Bool[Tensor, "*batch 1"]:
        """Which unit rays pass by a bounded scene's sphere, or leave it behind; none in a scene that has no sphere."""
        crossing = self.crossing(origins, directions)
        return torch.zeros_like(origins[..., :1], dtype=torch.bool) if crossing is None else crossing.is_missed
