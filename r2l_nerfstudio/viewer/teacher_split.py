"""Student on the left, teacher on the right, in the viewer's own picture."""

from __future__ import annotations

from pathlib import Path

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer_elements import ViewerCheckbox
from torch import Tensor

from r2l_nerfstudio.errors import InputError


class TeacherSplit:
    """A tick box that loads the teacher when it is first ticked, and draws it over the right half."""

    def __init__(self) -> None:
        self.teacher_path: Path | None = None
        self.device: torch.device | str = "cpu"
        self._teacher = None
        self.checkbox = ViewerCheckbox(
            "Split with teacher",
            False,
            cb_hook=self._toggled,
            hint="Right half: the teacher this student was distilled from. Loaded when ticked; its run must be there.",
        )

    def _toggled(self, checkbox: ViewerCheckbox) -> None:
        """Load outside the render thread, which may be interrupted at any line."""
        if not checkbox.value or self._teacher is not None:
            return
        from r2l_nerfstudio.teacher import Teacher

        try:
            if self.teacher_path is None:
                raise InputError("this student's run does not say which teacher it had.")
            self._teacher = Teacher.load(self.teacher_path, device=self.device)
        except InputError as error:
            CONSOLE.print(f"[bold yellow]The teacher cannot be shown: {error}")

    def apply(self, rgb: Tensor, camera: Cameras) -> Tensor:
        """The image with the teacher's right half, if the box is ticked and the teacher is loaded.

        Args:
            rgb: the student's (height width 3).
            camera: what it shows.
        """
        teacher = self._teacher
        if teacher is None or not self.checkbox.value:
            return rgb
        height, width = rgb.shape[:2]
        middle = width // 2
        camera = camera.reshape((1,))
        # A cropped camera gives the crop of the full render: half the picture at half the cost.
        right = Cameras(
            camera_to_worlds=camera.camera_to_worlds,
            fx=camera.fx,
            fy=camera.fy,
            cx=camera.cx - middle,
            cy=camera.cy,
            width=width - middle,
            height=height,
            camera_type=camera.camera_type,
        )
        half = teacher.view(right).rgb.to(rgb)
        split = torch.cat([rgb[:, :middle], half], dim=1)
        split[:, middle] = 1.0
        return split
