"""The analytic scene as a teacher: exact color, accumulation and depth at any pose."""

from __future__ import annotations

from pathlib import Path

import torch
from nerfstudio.cameras.cameras import Cameras

from r2l_nerfstudio.scene.capture import band_poses
from r2l_nerfstudio.scene.procedural import Scene
from r2l_nerfstudio.teacher import TeacherOutputs


class SceneTeacher:
    """Answers `view` as a `Teacher` does.

    Args:
        broken: (row, column) of a pixel whose color comes back as NaN, in every view.
        geometry: whether accumulation and depth are answered too.
    """

    config_path = Path("scene/config.yml")
    background = torch.ones(3)
    views_only = False

    def __init__(self, broken: tuple[int, int] | None = None, geometry: bool = True) -> None:
        self.scene = Scene()
        self.broken = broken
        self.geometry = geometry
        self.views_rendered = 0

    def view(self, camera: Cameras) -> TeacherOutputs:
        picture = self.scene.render(camera, supersample=1)
        rgb = picture.rgb.clone()
        if self.broken is not None:
            rgb[self.broken] = float("nan")
        self.views_rendered += 1
        if not self.geometry:
            return TeacherOutputs(rgb, None, None)
        return TeacherOutputs(rgb, picture.accumulation, picture.depth.nan_to_num(posinf=0.0))

    def pose_corrections(self) -> None:
        return None

    def fingerprint(self) -> str:
        return "scene"


def scene_cameras(count: int = 12, size: int = 24) -> Cameras:
    """Cameras around the scene."""
    return Cameras(band_poses(count, seed=0, spiral=True), fx=1.5 * size, fy=1.5 * size, cx=size / 2, cy=size / 2,
                   width=size, height=size)  # fmt: skip
