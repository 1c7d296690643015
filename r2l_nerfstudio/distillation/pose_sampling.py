"""Sampled cameras near the capture, by a sampler that fits its layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal, get_args

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.ranges import FloatRange, IntRange

SamplerKind = Literal["auto", "neighbour", "sphere", "box"]


@dataclass
class PoseSamplerConfig:
    """How cameras are sampled."""

    kind: SamplerKind = "auto"
    """neighbour: between neighboring training cameras; sphere: in the band they cover around an object; box: in the
    box of positions and viewing axes of a forward-facing capture; auto: by the capture's layout."""
    num_neighbours: Annotated[int, IntRange(1, 10**6)] = 4
    """neighbour: number of nearest cameras to interpolate to."""
    jitter: Annotated[float, FloatRange(0, 100)] = 0.3
    """Random displacement, as a share of the distance to neighboring cameras."""
    focal_range: tuple[Annotated[float, FloatRange(0.01, 100)], Annotated[float, FloatRange(0.01, 100)]] = (0.95, 1.25)
    """Focal lengths, as multiples of the training cameras'."""
    overscan: Annotated[float, FloatRange(0, 10)] = 0.0
    """neighbour, box: how far teacher views extend past the training cameras' field of view, as a share of it: what a
    wider image from the same place shows, such as a viewer's window."""
    zoomed_share: Annotated[float, FloatRange(0, 0.5)] = 0.0
    """Share of the teacher views that have focal lengths of `zoomed_focal_range` and no overscan, where a student of ray
    images begins with single rays (--pipeline.datamanager.single-ray-share). Crops are not drawn from them, single rays
    are: closer views show what a pixel of the others averages."""
    zoomed_focal_range: tuple[Annotated[float, FloatRange(0.01, 100)], Annotated[float, FloatRange(0.01, 100)]] = (
        0.95,
        1.25,
    )
    """Focal lengths of the zoomed views, as multiples of the training cameras'."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises: InputError: for an unknown kind, from a command line or a file."""
        if self.kind not in get_args(SamplerKind):
            raise InputError(
                f"Unknown pose sampler {self.kind!r}: choose --pipeline.datamanager.pose-sampler.kind from "
                f"{', '.join(get_args(SamplerKind))}."
            )

    def check_focal_range(self) -> None:
        """Raises: InputError: for an empty range. It is not checked while a command line is parsed, where it would be a
        traceback."""
        for flag, (low, high) in (("focal-range", self.focal_range), ("zoomed-focal-range", self.zoomed_focal_range)):
            if not low <= high:
                raise InputError(
                    f"--pipeline.datamanager.pose-sampler.{flag} must go from the smaller to the larger focal length"
                    f" (got {low:g} {high:g})."
                )


@dataclass(frozen=True)
class CaptureCameras:
    """The training cameras, as pinholes of one resolution."""

    camera_to_worlds: Float[Tensor, "num 3 4"]
    """OpenGL axes in the teacher's frame."""
    intrinsics: Float[Tensor, "num 4"]
    """fx, fy, cx, cy in pixels of a `width` x `height` image."""
    width: int
    height: int

    @cached_property
    def positions(self) -> Float[Tensor, "num 3"]:
        return self.camera_to_worlds[:, :, 3]

    @cached_property
    def axes(self) -> Float[Tensor, "num 3"]:
        """Unit viewing axes."""
        return -self.camera_to_worlds[:, :, 2] / self.camera_to_worlds[:, :, 2].norm(dim=-1, keepdim=True)

    @cached_property
    def up(self) -> Float[Tensor, "3"]:
        """Up direction of the capture, unit length: perpendicular to all cameras' right axes, since cameras are seldom
        rolled."""
        right, mean_up = self.camera_to_worlds[:, :, 0], self.camera_to_worlds[:, :, 1].mean(0)
        # The small term decides if right axes leave a choice, as in forward-facing captures.
        spread = right.T @ right / len(right) - 0.01 * torch.outer(mean_up, mean_up)
        up = torch.linalg.eigh(spread).eigenvectors[:, 0]
        return up if up @ mean_up >= 0 else -up

    @cached_property
    def focus(self) -> Float[Tensor, "3"]:
        """The least-squares point nearest to all viewing axes."""
        across = torch.eye(3) - self.axes[:, :, None] * self.axes[:, None, :]
        # The small term keeps parallel axes solvable: their focus stays near the cameras.
        system = across.mean(0) + 1e-4 * torch.eye(3)
        target = (across @ self.positions[:, :, None]).mean(0) + 1e-4 * self.positions.mean(0)[:, None]
        return torch.linalg.solve(system, target)[:, 0]

    @cached_property
    def neighbour_distances(self) -> Float[Tensor, "num num"]:
        """Distances between positions; a camera's distance to itself is infinite."""
        distances = torch.cdist(self.positions, self.positions)
        return distances.fill_diagonal_(math.inf)

    @cached_property
    def mean_axes(self) -> Float[Tensor, "3 3"]:
        """Columns: the capture's mean right, up and backward directions, orthonormal."""
        return look_along(self.axes.mean(0), self.up)


def capture_cameras(cameras: Cameras, downscale: float = 1.0) -> CaptureCameras:
    """Return the training cameras as undistorted pinholes of one resolution, the capture's median divided by
    `downscale`.

    Fisheye and panoramic cameras become pinholes of 90 degrees, since teacher views are pinhole images.
    """
    cameras = cameras.to("cpu").flatten()
    width = max(1, round(float(cameras.width.float().median()) / downscale))
    height = max(1, round(float(cameras.height.float().median()) / downscale))
    intrinsics = torch.cat(
        [
            cameras.fx * width / cameras.width,
            cameras.fy * height / cameras.height,
            cameras.cx * width / cameras.width,
            cameras.cy * height / cameras.height,
        ],
        dim=-1,
    ).float()
    wide = cameras.camera_type[:, 0] != CameraType.PERSPECTIVE.value
    if wide.any():
        side = min(width, height) / 2
        intrinsics[wide] = torch.tensor([side, side, width / 2, height / 2])
    return CaptureCameras(cameras.camera_to_worlds.float(), intrinsics, width, height)


def look_along(axis: Float[Tensor, "3"], up: Float[Tensor, "3"]) -> Float[Tensor, "3 3"]:
    """Return the rotation (columns right, up, backward) of a camera that looks along `axis`."""
    backward = -axis / axis.norm().clamp_min(1e-8)
    right = torch.linalg.cross(up, backward)
    if right.norm() < 1e-4:  # The view is along the up direction, so any right is valid.
        other = torch.tensor([1.0, 0.0, 0.0]) if backward[0].abs() < 0.9 else torch.tensor([0.0, 1.0, 0.0])
        right = torch.linalg.cross(other, backward)
    right = right / right.norm()
    return torch.stack([right, torch.linalg.cross(backward, right), backward], dim=-1)


def choose_sampler(cameras: CaptureCameras) -> Literal["neighbour", "sphere", "box"]:
    """Return the sampler that fits a capture's layout.

    `box` if all cameras look the same way (within 30 degrees of their mean), `sphere` if they look inwards at one point
    (15 degrees on average) from at least half way around it and nearly one distance, `neighbour` otherwise.
    """
    if len(cameras.positions) < 3:
        return "neighbour"
    mean_axis = -cameras.mean_axes[:, 2]
    if (cameras.axes @ mean_axis).min() > math.cos(math.radians(30)):
        return "box"
    to_focus = cameras.focus - cameras.positions
    radii = to_focus.norm(dim=-1)
    inward = ((to_focus * cameras.axes).sum(-1) / radii.clamp_min(1e-6)).clamp(-1, 1).acos().mean()
    if inward < math.radians(15) and radii.max() < 1.8 * radii.min() and _azimuth_gap(cameras) < math.radians(180):
        return "sphere"
    return "neighbour"


def _spherical(cameras: CaptureCameras) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return azimuth, elevation (radians) and radius of the cameras around the focus, and the frame (columns) they
    refer to."""
    frame = look_along(torch.linalg.cross(cameras.up, cameras.mean_axes[:, 0]), cameras.up)
    offset = (cameras.positions - cameras.focus) @ frame
    radius = offset.norm(dim=-1)
    elevation = (offset[:, 1] / radius.clamp_min(1e-6)).clamp(-1, 1).asin()
    return torch.atan2(offset[:, 0], offset[:, 2]), elevation, radius, frame


def _azimuth_gap(cameras: CaptureCameras) -> float:
    """Return the widest sector around the focus without a camera, in radians."""
    azimuth = _spherical(cameras)[0].sort().values
    gaps = torch.cat([azimuth[1:] - azimuth[:-1], (azimuth[:1] + 2 * math.pi) - azimuth[-1:]])
    return float(gaps.max())


@dataclass(frozen=True)
class PoseSampler:
    """Samples cameras; the same generator state gives the same camera.

    Args:
        cameras: the training cameras.
        config: kind and extent.
    """

    cameras: CaptureCameras
    config: PoseSamplerConfig = field(default_factory=PoseSamplerConfig)

    def __post_init__(self) -> None:
        self.config.check()  # A configuration from a file was never constructed.

    @cached_property
    def kind(self) -> SamplerKind:
        """The sampler in use, with `auto` resolved."""
        return choose_sampler(self.cameras) if self.config.kind == "auto" else self.config.kind

    def is_zoomed(self, index: int) -> bool:
        """Return whether teacher view number `index` is one of the zoomed ones; they lie evenly between the others, and
        the first one is not zoomed."""
        share = self.config.zoomed_share
        return math.floor((index + 1) * share) > math.floor(index * share)

    def sample(
        self, generator: torch.Generator, is_zoomed: bool = False
    ) -> tuple[Float[Tensor, "3 4"], Float[Tensor, "4"]]:
        """Sample one camera.

        Args:
            generator: CPU generator.
            is_zoomed: whether it is for a zoomed view.

        Returns:
            Camera-to-world (OpenGL axes, teacher's frame) and fx, fy, cx, cy in pixels of the capture's resolution.
        """
        base = int(torch.randint(len(self.cameras.positions), (1,), generator=generator))
        focal_range = self.config.zoomed_focal_range if is_zoomed else self.config.focal_range
        low, high = (math.log(value) for value in focal_range)
        zoom = math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
        intrinsics = self.cameras.intrinsics[base].clone()
        intrinsics[:2] *= zoom
        pose = {"neighbour": self._neighbour, "sphere": self._sphere, "box": self._box}[self.kind](base, generator)
        if self.config.overscan > 0 and not is_zoomed and self.kind != "sphere":
            # The difference of two uniform draws is more often near the middle.
            first, second = torch.rand(2, 2, generator=generator)
            size = torch.tensor([self.cameras.width, self.cameras.height])
            intrinsics[2:] += self.config.overscan * size * (first - second)
        return pose, intrinsics

    def _neighbour(self, base: int, generator: torch.Generator) -> Tensor:
        cameras = self.cameras
        if len(cameras.positions) == 1:
            return cameras.camera_to_worlds[base].clone()
        count = min(self.config.num_neighbours, len(cameras.positions) - 1)
        near_distances, near = cameras.neighbour_distances[base].topk(count, largest=False)
        other = int(near[torch.randint(count, (1,), generator=generator)])
        share = torch.rand((), generator=generator)
        position = torch.lerp(cameras.positions[base], cameras.positions[other], share)
        position = position + self.config.jitter * near_distances.mean() * torch.randn(3, generator=generator) / 3**0.5
        # Rotations of neighbors are close: a normalized blend of axes replaces the geodesic.
        axis = torch.lerp(cameras.axes[base], cameras.axes[other], share)
        up = torch.lerp(cameras.camera_to_worlds[base, :, 1], cameras.camera_to_worlds[other, :, 1], share)
        between = torch.arccos((cameras.axes[base] @ cameras.axes[other]).clamp(-1, 1))
        spread = self.config.jitter * between.clamp(0.02, 0.5)
        axis = axis / axis.norm().clamp_min(1e-6) + spread * torch.randn(3, generator=generator) / 3**0.5
        return torch.cat([look_along(axis, up), position[:, None]], dim=-1)

    def _sphere(self, base: int, generator: torch.Generator) -> Tensor:
        cameras = self.cameras
        azimuths, elevations, radii, frame = _spherical(cameras)
        draw = torch.rand(3, generator=generator)
        # Near a training azimuth, within its widest gap: an arc is filled, and what is outside it is not entered.
        gap = min(_azimuth_gap(cameras), math.pi / 3)
        azimuth = azimuths[base] + gap * (draw[0] - 0.5)
        elevation = torch.lerp(elevations.min(), elevations.max(), draw[1])
        radius = torch.lerp(radii.min(), radii.max(), draw[2])
        level = torch.stack([azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()])
        position = cameras.focus + radius * (frame @ level)
        target = cameras.focus + 0.1 * self.config.jitter * radius * torch.randn(3, generator=generator) / 3**0.5
        return torch.cat([look_along(target - position, cameras.up), position[:, None]], dim=-1)

    def _box(self, base: int, generator: torch.Generator) -> Tensor:
        cameras = self.cameras
        frame = cameras.mean_axes
        positions = _within_box(cameras.positions @ frame, generator)
        axis = _within_box(cameras.axes @ frame, generator)
        return torch.cat([look_along(frame @ axis, cameras.up), (frame @ positions)[:, None]], dim=-1)


def _within_box(points: Float[Tensor, "num 3"], generator: torch.Generator) -> Float[Tensor, "3"]:
    """Draw uniformly from the points' bounding box, enlarged by 1.1 (R2L's forward-facing sampler)."""
    low, high = points.min(0).values, points.max(0).values
    middle, half = (low + high) / 2, 1.1 * (high - low) / 2
    return middle + half * (2 * torch.rand(3, generator=generator) - 1)
