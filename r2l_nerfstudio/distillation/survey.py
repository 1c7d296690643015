"""A quick look through the teacher at its own training cameras: the scene's bounds, and what a plausible view is."""

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
    """A copy of one camera, shrunk so that its longer side has at most `long_side` pixels.

    Args:
        camera: one camera, with or without a batch dimension.
        long_side: in pixels.
        undistorted: without lens distortion, and as a pinhole of 90 degrees across the shorter side where it is of another
            kind (rasterizers draw pinholes only).
    """
    copy = camera.reshape((1,)).to("cpu")[0:1]
    if undistorted:
        copy = _pinhole(copy)
    longest = max(int(copy.height[0]), int(copy.width[0]))
    if longest > long_side:
        copy.rescale_output_resolution(long_side / longest)
    return copy


def _mean_seen(teacher: Teacher, whole: Cameras, camera: Cameras, outputs: TeacherOutputs) -> float:
    """Mean accumulation of a training view, as the pinhole that teacher views are would show it."""
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
        # As `capture_cameras` has it for the teacher views.
        fx = fy = min(width, height) / 2
        cx, cy = width / 2, height / 2
    return Cameras(camera.camera_to_worlds, fx=fx, fy=fy, cx=cx, cy=cy, width=width, height=height, times=camera.times)


@dataclass(frozen=True)
class Survey:
    """What the teacher shows from its training cameras, at thumbnail size."""

    has_accumulation: bool
    has_depth: bool
    points: Float[Tensor, "num 3"]
    """Surface points seen, in the teacher's frame; empty without depth."""
    distances: Float[Tensor, "num"]
    """Their distances along the rays."""
    lowest_accumulation: float
    """Mean accumulation of the emptiest training view; 0 where the teacher has none."""
    nearest_depth: float
    """Tenth percentile of the depth in the training view that comes closest; 0 where the teacher has none."""

    @classmethod
    def take(cls, teacher: Teacher, cameras: Cameras) -> Survey:
        """Render thumbnails of up to 32 training cameras.

        Args:
            teacher: who is asked.
            cameras: the training cameras, lens distortion and all.

        Raises:
            InputError: if the teacher returns no finite colour at all.
        """
        chosen = torch.linspace(0, len(cameras) - 1, min(MAX_VIEWS, len(cameras))).round().long().unique()
        points, distances, accumulations, nearest = [], [], [], []
        outputs: TeacherOutputs | None = None
        finite = 0
        # Of outputs without a single finite number nothing can be learnt: they count as missing.
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
                f"The teacher {teacher.config_path} returns no finite colour from any of its training cameras: its"
                " training has diverged. Train it again, or name an earlier checkpoint's run with --teacher."
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
        """Where the scene lies.

        A capture is bounded if nearly everything it shows lies within a sphere around its focus that holds no camera;
        it then gets the `sphere` spacing, any other capture `disparity`.

        Args:
            cameras: the training cameras as pinholes.
            kind: the spacing to use; None decides as above.
        """
        focus = cameras.focus
        camera_distances = (cameras.positions - focus).norm(dim=-1)
        if len(self.points) == 0:  # no depth: the cameras alone say how large the scene is
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
        # Contraction leaves the middle half of what is seen, and the cameras, in the unit ball.
        everything = torch.cat([self.points, cameras.positions])
        center = everything.median(dim=0).values
        radius = max(
            float((self.points - center).norm(dim=-1).median()), float((cameras.positions - center).norm(dim=-1).max())
        )
        return SceneBounds(kind, tuple(center.tolist()), radius, near, far)
