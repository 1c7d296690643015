"""The survey: thumbnails from the teacher's training cameras, for the scene's bounds and for plausible views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.rays.spacing import SceneBounds, SpacingKind
from r2l_nerfstudio.teacher import Teacher, TeacherOutputs

MAX_VIEWS = 32
LONG_SIDE = 40


def thumbnail(camera: Cameras, long_side: int = LONG_SIDE, undistorted: bool = False) -> Cameras:
    """Return a copy of one camera, shrunk so that its longer side has at most `long_side` pixels.

    Args:
        camera: one camera, with or without a batch dimension.
        long_side: in pixels.
        undistorted: remove lens distortion, and replace a camera of another kind by a pinhole of 90 degrees across the
            shorter side (rasterizers render pinholes only).
    """
    copy = camera.reshape((1,)).to("cpu")[0:1]
    if undistorted:
        copy = _pinhole(copy)
    longest = max(int(copy.height[0]), int(copy.width[0]))
    if longest > long_side:
        copy.rescale_output_resolution(long_side / longest)
    return copy


def _mean_seen(teacher: Teacher, whole: Cameras, camera: Cameras, outputs: TeacherOutputs) -> float:
    """Return the mean accumulation of a training view, rendered as a pinhole like teacher views."""
    if camera.camera_type.item() != CameraType.PERSPECTIVE.value:
        outputs = teacher.view(thumbnail(whole, undistorted=True))
    if outputs.accumulation is None:
        return 0.0
    known = outputs.rgb.isfinite().all(-1) & outputs.accumulation[..., 0].isfinite()
    return float(outputs.accumulation[known].mean()) if known.any() else 0.0


def _pinhole(camera: Cameras) -> Cameras:
    fx, fy, cx, cy = camera.fx, camera.fy, camera.cx, camera.cy
    width, height = int(camera.width), int(camera.height)
    if camera.camera_type.item() != CameraType.PERSPECTIVE.value:
        # The same rule as `capture_cameras` for teacher views.
        fx = fy = min(width, height) / 2
        cx, cy = width / 2, height / 2
    return Cameras(camera.camera_to_worlds, fx=fx, fy=fy, cx=cx, cy=cy, width=width, height=height, times=camera.times)


@dataclass(frozen=True)
class Survey:
    """What the teacher shows from its training cameras, at thumbnail size."""

    has_accumulation: bool
    has_depth: bool
    points: Float[Tensor, "num 3"]
    """Visible surface points, in the teacher's frame; empty without depth."""
    distances: Float[Tensor, "num"]
    """Their distances along the rays."""
    lowest_accumulation: float
    """Mean accumulation of the emptiest training view; 0 if the teacher has none."""
    nearest_depth: float
    """Tenth percentile of the depth in the training view that comes closest; 0 if the teacher has none."""

    @classmethod
    def take(cls, teacher: Teacher, cameras: Cameras) -> Survey:
        """Render thumbnails of up to 32 training cameras.

        Args:
            teacher: teacher to render with.
            cameras: the training cameras, lens distortion and all.

        Raises:
            InputError: if the teacher returns no finite color at all.
        """
        chosen = torch.linspace(0, len(cameras) - 1, min(MAX_VIEWS, len(cameras))).round().long().unique()
        points, distances, accumulations, nearest = [], [], [], []
        outputs: TeacherOutputs | None = None
        finite = 0
        # Nothing can be learned from outputs without a finite number: they count as missing.
        has_accumulation = has_depth = False
        for index in chosen.tolist():
            camera = thumbnail(cameras[index], undistorted=teacher.views_only)
            outputs = teacher.view(camera)
            good = outputs.rgb.isfinite().all(-1)
            finite += int(good.sum())
            if outputs.accumulation is not None:
                known = good & outputs.accumulation[..., 0].isfinite()
                has_accumulation |= bool(known.any())
                accumulations.append(_mean_seen(teacher, cameras[index], camera, outputs))
                if has_accumulation:
                    good = good & (outputs.accumulation[..., 0] > 0.5)
            if outputs.depth is not None:
                good = good & outputs.depth[..., 0].isfinite() & (outputs.depth[..., 0] > 0)
                has_depth |= bool(good.any())
                if good.sum() < 8:
                    continue
                rays = camera.generate_rays(camera_indices=0, keep_shape=True)
                depth = outputs.depth.cpu()[good.cpu()]
                points.append(rays.origins[good.cpu()] + rays.directions[good.cpu()] * depth)
                distances.append(depth[:, 0])
                nearest.append(float(depth.quantile(0.1)))
        if outputs is None or finite == 0:
            raise InputError(
                f"The teacher {teacher.config_path} renders no finite color from any of its training cameras: its"
                " training has diverged. Train it again, or give an earlier checkpoint's run with --teacher."
            )
        return cls(
            has_accumulation=has_accumulation,
            has_depth=has_depth,
            points=torch.cat(points) if points else torch.zeros(0, 3),
            distances=torch.cat(distances) if distances else torch.zeros(0),
            lowest_accumulation=min(accumulations, default=0.0),
            nearest_depth=min(nearest, default=0.0),
        )

    def bounds(self, cameras: CaptureCameras, kind: SpacingKind | None = None) -> SceneBounds:
        """Return where the scene lies.

        A capture is bounded if nearly everything it shows lies within a sphere around its focus that contains no
        camera; it then gets the `sphere` spacing, any other capture `disparity`.

        Args:
            cameras: the training cameras as pinholes.
            kind: the spacing to use; None decides as above.
        """
        focus = cameras.focus
        camera_distances = (cameras.positions - focus).norm(dim=-1)
        if len(self.points) == 0:  # Without depth, only the cameras indicate the scene's size.
            reach = float(camera_distances.median().clamp_min(1e-3))
            return SceneBounds(kind or "disparity", tuple(focus.tolist()), reach, 0.2 * reach, 4.0 * reach)
        spread = (self.points - focus).norm(dim=-1)
        extent = 1.05 * float(spread.quantile(0.995))
        inside = float((spread < 0.9 * camera_distances.min()).float().mean())
        if kind is None:
            kind = "sphere" if inside > 0.97 else "disparity"
        near = 0.9 * float(self.distances.quantile(0.002))
        far = 1.1 * float(self.distances.quantile(0.998))
        if kind == "sphere":
            bounded = spread[spread < 0.9 * camera_distances.min()]
            radius = 1.05 * float(bounded.quantile(0.998)) if len(bounded) else extent
            return SceneBounds("sphere", tuple(focus.tolist()), radius, near, far)
        # Contraction leaves the middle half of the visible points, and the cameras, in the unit ball.
        everything = torch.cat([self.points, cameras.positions])
        center = everything.median(dim=0).values
        radius = max(
            float((self.points - center).norm(dim=-1).median()), float((cameras.positions - center).norm(dim=-1).max())
        )
        return SceneBounds(kind, tuple(center.tolist()), radius, near, far)
