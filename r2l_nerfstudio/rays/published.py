"""Frames, near and far of the published R2L and MobileR2L, for captures around an object and forward-facing ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.rays.conventions import RayConventions

BLENDER_RADIUS = 4.0311
"""Distance of NeRF-Synthetic's cameras from the origin."""
BLENDER_NEAR, BLENDER_FAR = 2.0, 6.0
LLFF_BOUND_FACTOR = 0.75
"""Forward-facing captures are scaled so that the nearest bound lies at 1 / this."""
NEAR_SHARE = 0.9
"""Near distance of a forward-facing R2L, as a share of the nearest bound."""
R2L_PIXEL_OFFSET, MOBILE_PIXEL_OFFSET = 0.0, 0.5


@dataclass(frozen=True)
class Similarity:
    """x' = scale * rotation @ x + translation, in double precision."""

    rotation: Float[Tensor, "3 3"]
    scale: float
    translation: Float[Tensor, "3"]

    @property
    def rows(self) -> tuple[tuple[float, float, float, float], ...]:
        """Return the similarity in the form of `RayConventions.frame`."""
        matrix = torch.cat([self.scale * self.rotation, self.translation[:, None]], dim=-1).double()
        return tuple(tuple(row) for row in matrix.tolist())

    def poses(self, camera_to_worlds: Float[Tensor, "*batch 3 4"]) -> Float[Tensor, "*batch 3 4"]:
        """Return camera-to-world matrices in the other frame."""
        poses = camera_to_worlds.double()
        positions = self.scale * poses[..., 3] @ self.rotation.T + self.translation
        return torch.cat([self.rotation @ poses[..., :3], positions[..., None]], dim=-1)

    def inverse(self) -> Similarity:
        """Return the inverse similarity."""
        rotation = self.rotation.T
        return Similarity(rotation, 1 / self.scale, -(rotation @ self.translation) / self.scale)

    def then(self, other: Similarity) -> Similarity:
        """Return this similarity followed by another."""
        return Similarity(
            other.rotation @ self.rotation,
            other.scale * self.scale,
            other.scale * other.rotation @ self.translation + other.translation,
        )


IDENTITY = Similarity(torch.eye(3, dtype=torch.float64), 1.0, torch.zeros(3, dtype=torch.float64))


def from_dataparser(transform: Float[Tensor, "3 4"], scale: float) -> Similarity:
    """Return the similarity from a dataparser's frame to that of the capture's files: a dataparser maps a point p to
    scale * (R p + t)."""
    transform = transform.double()
    return Similarity(transform[:, :3], float(scale), float(scale) * transform[:, 3]).inverse()


def fit_similarity(
    source: Float[Tensor, "num 3 4"], target: Float[Tensor, "num 3 4"]
) -> tuple[Similarity, float, float]:
    """Return the least-squares similarity between two sets of poses of the same cameras.

    The rotation is the chordal mean of the cameras' rotations, which unlike that of their centers (Umeyama 1991) is
    determined even for centers on one line; scale and translation are least squares over the centers.

    Args:
        source: camera-to-world matrices.
        target: the same cameras in the other frame.

    Returns:
        The similarity from source to target; the root mean square distance of the fitted centers from the target's, as
        a share of the target centers' spread; and the largest angle between fitted and target axes in degrees.
    """
    source, target = source.double(), target.double()
    left, _, right = torch.linalg.svd((target[:, :, :3] @ source[:, :, :3].mT).mean(0))
    flip = torch.diag(torch.tensor([1.0, 1.0, float(torch.linalg.det(left @ right).sign())], dtype=torch.float64))
    rotation = left @ flip @ right
    ours, theirs = source[:, :, 3], target[:, :, 3]
    ours_mean, theirs_mean = ours.mean(0), theirs.mean(0)
    turned = (ours - ours_mean) @ rotation.T
    spread = (theirs - theirs_mean).square().sum(-1).mean().sqrt()
    scale = float(((theirs - theirs_mean) * turned).sum() / turned.square().sum().clamp_min(1e-30))
    if not scale > 0:  # The centers do not correspond at all.
        scale = float(spread / turned.square().sum(-1).mean().sqrt().clamp_min(1e-15)) or 1.0
    fitted = Similarity(rotation, scale, theirs_mean - scale * rotation @ ours_mean)
    moved = fitted.poses(source)
    residual = float((moved[:, :, 3] - theirs).square().sum(-1).mean().sqrt() / spread.clamp_min(1e-12))
    # From the chord, since the cosine of a small angle is mostly rounding.
    chord = (moved[:, :, :3] - target[:, :, :3]).flatten(1).norm(dim=-1).max()
    degrees = torch.rad2deg(2 * (chord / 8**0.5).clamp_max(1.0).asin())
    return fitted, residual, float(degrees)


def recentered(poses: Float[Tensor, "num 3 4"], center: Float[Tensor, "3"] | None = None) -> Similarity:
    """Return the rigid motion into the frame of the mean camera, as LLFF's loader recenters poses.

    Args:
        poses: camera-to-world matrices, OpenGL axes.
        center: origin of the new frame; the mean of the camera centers by default.
    """
    poses = poses.double()
    backward = poses[:, :, 2].sum(0)
    backward = backward / backward.norm()
    right = torch.linalg.cross(poses[:, :, 1].sum(0), backward)
    right = right / right.norm()
    rotation = torch.stack([right, torch.linalg.cross(backward, right), backward])
    origin = poses[:, :, 3].mean(0) if center is None else center.double()
    return Similarity(rotation, 1.0, -(rotation @ origin))


def llff_frame(poses: Float[Tensor, "num 3 4"], nearest: float, center: Float[Tensor, "3"] | None = None) -> Similarity:
    """Return the published frame of a forward-facing capture: recentered, and scaled by 1 / (0.75 x the nearest bound).

    Args:
        poses: camera-to-world matrices of all its cameras, OpenGL axes.
        nearest: smallest visible distance, in the unit of the poses.
        center: as for `recentered`.
    """
    rigid = recentered(poses, center)
    scale = 1.0 / (LLFF_BOUND_FACTOR * nearest)
    return Similarity(rigid.rotation, scale, scale * rigid.translation)


def blender_residual(poses: Float[Tensor, "num 3 4"]) -> float:
    """Return how far cameras are from NeRF-Synthetic's geometry: at 4.03 from the origin, looking at it.

    Returns:
        The median of each camera's deviation in distance, as a share of 4.03, plus the sine of the angle by which it
        looks past the origin.
    """
    positions = poses[:, :, 3].double()
    distances = positions.norm(dim=-1).clamp_min(1e-9)
    past = torch.linalg.cross(positions / distances[:, None], poses[:, :, 2].double()).norm(dim=-1)
    return float(((distances / BLENDER_RADIUS - 1).abs() + past).median())


@dataclass(frozen=True)
class PublishedScene:
    """Settings of a published student's ray encoding that depend on the scene."""

    conventions: RayConventions
    near: float
    """Position of the first sample point, in units of the conventions' frame, or in normalized device coordinates."""
    far: float


def published_scene(
    similarity: Similarity,
    reads_ray_image: bool,
    is_inward: bool,
    bounds: tuple[float, float],
    ndc: tuple[float, float] | None = None,
) -> PublishedScene:
    """Return conventions, near and far of a published student.

    Args:
        similarity: from the run's frame to the published one.
        reads_ray_image: MobileR2L rather than R2L.
        is_inward: whether the capture is around an object, rather than forward-facing.
        bounds: nearest and farthest visible distance, in the published frame's unit; not used around an object.
        ndc: 2 focal / width and 2 focal / height, for a student that works in normalized device coordinates.
    """
    conventions = RayConventions(
        is_planar=True,
        pixel_offset=MOBILE_PIXEL_OFFSET if reads_ray_image else R2L_PIXEL_OFFSET,
        is_contracted=False,
        frame=similarity.rows,
        ndc=ndc,
    )
    if ndc is not None:
        return PublishedScene(conventions, 0.0, 1.0)
    if is_inward:
        return PublishedScene(conventions, BLENDER_NEAR, BLENDER_FAR)
    return PublishedScene(conventions, NEAR_SHARE * bounds[0], bounds[1])
