"""The ray encoding that a student reads, and its bounds; both are in the student's checkpoint."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.rays.contraction import contract
from r2l_nerfstudio.rays.conventions import OURS, RayConventions, ndc_rays
from r2l_nerfstudio.rays.encoding import encoded_dim, frequency_encode, frequency_encode_into
from r2l_nerfstudio.rays.pinhole import image_rays, pinhole_rays
from r2l_nerfstudio.rays.spacing import SceneBounds, SpacingKind, SphereCrossing, cross_sphere, stratified

RayEncodingKind = Literal["points", "plucker", "two-plane", "composited"]


class RayEncoding(nn.Module):
    """Encode rays into the numbers that a student reads, always in fp32.

    - `points`: K points along the ray (R2L, sec. 3.2), relative to the scene's center, in units of its radius, contracted
      unless the scene is a sphere.
    - `plucker`: unit direction and moment around the scene's center (Light Field Networks, eq. 2).
    - `two-plane`: where the ray meets two planes across the capture's viewing axis.

    `directions` follow the encoding's conventions: unit length, or planar.

    Args:
        kind: which encoding.
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
    frame: Tensor
    """Similarity [3, 4] of the conventions' frame: scaled rotation, then translation."""
    frame_rotation: Tensor
    ndc: Tensor

    def __init__(self, kind: RayEncodingKind = "points", num_points: int = 16, num_frequencies: int = 10) -> None:
        super().__init__()
        if kind not in get_args(RayEncodingKind):
            raise InputError(
                f"Unknown ray encoding {kind!r}: choose --pipeline.model.ray-encoding from"
                f" {', '.join(get_args(RayEncodingKind))}."
            )
        self.kind = kind
        self.num_points = num_points
        self.num_frequencies = num_frequencies
        self.spacing: SpacingKind = "near-far"
        self.conventions = OURS
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("radius", torch.ones(()))
        self.register_buffer("near", torch.tensor(0.1))
        self.register_buffer("far", torch.ones(()))
        self.register_buffer("axes", torch.eye(3))
        # Kept in the extra state: older checkpoints have no such buffers.
        self.register_buffer("frame", torch.eye(3, 4), persistent=False)
        self.register_buffer("frame_rotation", torch.eye(3), persistent=False)
        self.register_buffer("ndc", torch.ones(2), persistent=False)

    def get_extra_state(self) -> dict[str, Any]:
        return {"spacing": self.spacing, "conventions": self.conventions.to_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.spacing = state["spacing"]
        self.set_conventions(RayConventions.from_state(state.get("conventions", {})))

    @property
    def dim(self) -> int:
        """Length of the encoded ray."""
        values = {"points": 3 * self.num_points, "plucker": 6, "two-plane": 4}[self.kind]
        return encoded_dim(values, self.num_frequencies)

    def set_bounds(self, bounds: SceneBounds, axes: Float[Tensor, "3 3"]) -> None:
        """Set the scene's bounds and, for `two-plane`, the capture's mean right, up and backward axes (columns)."""
        self.spacing = bounds.kind
        self.center.copy_(torch.tensor(bounds.center))
        self.radius.fill_(bounds.radius)
        self.near.fill_(bounds.near)
        self.far.fill_(bounds.far)
        self.axes.copy_(axes)

    def set_conventions(self, conventions: RayConventions) -> None:
        """Set how rays are read.

        Raises:
            InputError: if they do not fit the ray encoding or its spacing.
        """
        if conventions != OURS and (self.kind != "points" or self.spacing == "sphere"):
            raise InputError(
                f"Published ray conventions need points between a near and a far distance (got --pipeline.model.ray-encoding"
                f" {self.kind} with {self.spacing} spacing): set --pipeline.model.ray-encoding points and"
                " --pipeline.model.spacing near-far, or --pipeline.model.published-rays False."
            )
        self.conventions = conventions
        frame = torch.eye(3, 4, dtype=torch.float64)
        if conventions.frame is not None:
            frame = torch.tensor(conventions.frame, dtype=torch.float64)
        self.frame.copy_(frame)
        self.frame_rotation.copy_(frame[:, :3] / conventions.scale)
        self.ndc.copy_(torch.tensor(conventions.ndc or (1.0, 1.0)))

    def image_rays(
        self, camera_to_world: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"], height: int, width: int
    ) -> tuple[Float[Tensor, "height width 3"], Float[Tensor, "height width 3"]]:
        """As `pinhole.image_rays`, by the encoding's conventions."""
        conventions = self.conventions
        return image_rays(camera_to_world, intrinsics, height, width, conventions.pixel_offset, conventions.is_planar)

    def pinhole_rays(
        self,
        camera_to_worlds: Float[Tensor, "*batch 3 4"],
        intrinsics: Float[Tensor, "*batch 4"],
        pixels: Float[Tensor, "*batch 2"],
    ) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
        """As `pinhole.pinhole_rays`, by the encoding's conventions; `pixels` include its offset."""
        return pinhole_rays(camera_to_worlds, intrinsics, pixels, self.conventions.is_planar)

    def forward(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], jitter: bool = False
    ) -> Float[Tensor, "*batch dim"]:
        """Encode rays.

        Args:
            origins: in the teacher's frame.
            directions: unit length, or planar.
            jitter: draw the points at random inside their segments, per ray (training).

        Returns:
            fp32 encoding of length `dim`.
        """
        with torch.autocast(device_type=origins.device.type, enabled=False):
            return self.encoded(self.values(origins.float(), directions.float(), jitter))

    def encoded(self, values: Float[Tensor, "*batch values"]) -> Float[Tensor, "*batch dim"]:
        """The encoding of `values`; as `frequency_encode`, without its memory where no gradients are wanted."""
        if values.requires_grad:
            return frequency_encode(values, self.num_frequencies)
        encoded = values.new_empty(*values.shape[:-1], self.dim)
        flat = values.reshape(-1, values.shape[-1])
        frequency_encode_into(flat, self.num_frequencies, encoded.view(-1, self.dim))
        return encoded

    def values(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], jitter: bool = False
    ) -> Float[Tensor, "*batch values"]:
        """What is encoded by frequencies: numbers of order one."""
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
        """Points along rays in the coordinates that are encoded: relative to the scene's center, in units of its radius,
        contracted unless it is a sphere; or as the conventions have it."""
        # Without jitter all rays have the same ones.
        fractions = stratified(num_points, tuple(origins.shape[:-1]) if jitter else (), jitter, origins.device)
        start, step = self.line(origins, directions)
        points = start[..., None, :] + self.positions(fractions)[..., None] * step[..., None, :]
        return contract(points) if self.is_contracted else points

    @property
    def reads_pixel_centers(self) -> bool:
        """Whether the encoding reads unit rays through pixel centers, as Nerfstudio's cameras give them."""
        return self.conventions.pixel_offset == 0.5 and not self.conventions.is_planar

    @property
    def is_contracted(self) -> bool:
        """Whether points are contracted after they are placed."""
        return self.spacing != "sphere" and self.conventions.is_contracted

    def line(
        self, origins: Float[Tensor, "*#batch 3"], directions: Float[Tensor, "*#batch 3"]
    ) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
        """Start and step of rays: `start + positions(fraction) * step` are their points, before contraction."""
        if self.conventions.frame is not None:
            start = origins @ self.frame[:, :3].T + self.frame[:, 3]
            # Rotated only: near and far are in the frame's unit already.
            step = directions @ self.frame_rotation.T
            return (start, step) if self.conventions.ndc is None else ndc_rays(start, step, self.ndc)
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
        # A ray along the planes never meets them: keep its slope finite rather than the encoding infinite.
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
