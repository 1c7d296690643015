"""A split view: student on the left, teacher on the right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.model_components import renderers
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer_elements import ViewerCheckbox
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException
from torch import Tensor
from torch.nn.functional import interpolate

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.viewer.panel import FrameTime
from r2l_nerfstudio.viewer.render_thread import current_render_thread

if TYPE_CHECKING:
    from r2l_nerfstudio.teacher import Teacher

SECONDS_WHILE_MOVING = 0.1
"""Time limit in seconds of the teacher's half while the camera moves, which limits its pixels. A still camera gets all
pixels."""

LINE_COLOR = (0.133, 0.157, 0.192)
"""Color of the dividing line, as in the viewer's split of two outputs."""


class TeacherSplit:
    """A checkbox that loads the teacher when it is first ticked, and renders it over the right half."""

    def __init__(self) -> None:
        self.teacher_path: Path | None = None
        self.teacher_time: float | None = None
        self.device: torch.device | str = "cpu"
        self._teacher: Teacher | None = None
        self._frame_time = FrameTime()
        self._status = ""
        self.checkbox = ViewerCheckbox(
            "Split with teacher",
            False,
            cb_hook=self._toggled,
            hint="Right half: the teacher of this student, loaded on demand; its run must still exist.",
        )

    def describe(self, size: tuple[int, int] | None) -> str:
        """Return one line of Markdown: the teacher's speed for frames of a (height, width), or why it is not shown."""
        if not self.checkbox.value:
            return ""
        return self._status or self._frame_time.describe("Teacher", size)

    def _toggled(self, checkbox: ViewerCheckbox) -> None:
        """Load the teacher in the callback's thread: the render thread may be interrupted at any line."""
        if not checkbox.value or self._teacher is not None:
            return
        from r2l_nerfstudio.teacher import Teacher

        self._status = "Loading the teacher…"
        try:
            if self.teacher_path is None:
                raise InputError("this student's run does not name its teacher.")
            teacher = Teacher.load(self.teacher_path, device=self.device, time=self.teacher_time)
            # Twice: what the method imports or compiles for its first view must be neither interrupted nor timed.
            for _ in range(2):
                self._draw(teacher, _thumbnail(teacher))
        except Exception as error:  # A method may raise anything, and the viewer continues without a teacher.
            self._give_up(error)
        else:
            self._teacher, self._status = teacher, ""

    def apply(self, rgb: Float[Tensor, "height width 3"], camera: Cameras) -> Float[Tensor, "height width 3"]:
        """Return the image with the teacher's right half if the box is ticked, the teacher is loaded and the viewer is
        rendering.

        Other renders, such as an evaluation during training, are returned unchanged.

        Args:
            rgb: the student's image.
            camera: camera of the image.
        """
        teacher, thread = self._teacher, current_render_thread()
        if teacher is None or not self.checkbox.value or thread is None:
            return rgb
        height, width = rgb.shape[:2]
        middle = width // 2
        scale = 1.0
        if thread.state != "high":
            seconds = self._frame_time.seconds(height, width - middle)
            scale = min(1.0, (SECONDS_WHILE_MOVING / seconds) ** 0.5) if seconds else 1.0
        try:
            half = self._draw(teacher, _right_part(camera.reshape((1,)), height, width, middle, scale))
        except IOChangeException:  # The viewer's interrupt.
            raise
        except Exception as error:  # It would end the viewer's render thread.
            self._teacher = None
            self._give_up(error)
            return rgb
        channels = interpolate(half.to(rgb).movedim(-1, 0)[None], (height, width - middle), mode="nearest")[0]
        split = torch.cat([rgb[:, :middle], channels.movedim(0, -1)], dim=1)
        split[:, middle] = rgb.new_tensor(LINE_COLOR)
        return split

    def _draw(self, teacher: Teacher, camera: Cameras) -> Float[Tensor, "height width 3"]:
        background = renderers.BACKGROUND_COLOR_OVERRIDE
        try:
            with self._frame_time.measure(int(camera.height), int(camera.width)):
                return teacher.view(camera).rgb
        finally:
            # An interrupt may have come just before Nerfstudio restores its global.
            renderers.BACKGROUND_COLOR_OVERRIDE = background

    def _give_up(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        self._status = f"The teacher cannot be shown: {reason}"
        CONSOLE.print(self._status, style="bold yellow", markup=False)


def _right_part(camera: Cameras, height: int, width: int, middle: int, scale: float) -> Cameras:
    """Return the camera of an image's columns from `middle` on, at about `scale` times as many rows and columns."""
    # A cropped camera gives the crop of the full render: half the image at half the cost.
    rows = max(1, round(height * scale))
    columns = max(1, round((width - middle) * scale))
    across, down = columns / (width - middle), rows / height
    return Cameras(
        camera_to_worlds=camera.camera_to_worlds,
        fx=camera.fx * across,
        fy=camera.fy * down,
        cx=(camera.cx - middle) * across,
        cy=camera.cy * down,
        width=columns,
        height=rows,
        camera_type=camera.camera_type,
    )


def _thumbnail(teacher: Teacher, size: int = 32) -> Cameras:
    """Return a small view from the teacher's first training camera."""
    pose = teacher.dataparser_outputs.cameras.camera_to_worlds[:1].to(teacher.device)
    return Cameras(pose, fx=float(size), fy=float(size), cx=size / 2, cy=size / 2, width=size, height=size)
