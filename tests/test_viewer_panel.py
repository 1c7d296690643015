"""The student's parts of the viewer, without a browser: interrupts, frame rate, the split with the teacher."""

from __future__ import annotations

import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.data.scene_box import OrientedBox, SceneBox
from nerfstudio.model_components import renderers
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer.viewer import Viewer
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

from r2l_nerfstudio.models.r2l import R2LModel, R2LModelConfig
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.teacher import Teacher, TeacherOutputs
from r2l_nerfstudio.viewer import panel
from r2l_nerfstudio.viewer.panel import FrameTime
from r2l_nerfstudio.viewer.teacher_split import TeacherSplit

BOX = OrientedBox(R=torch.eye(3), T=torch.zeros(3), S=torch.full((3,), 0.5))


def tiny_model(has_depth: bool = True) -> R2LModel:
    torch.manual_seed(0)
    config = R2LModelConfig(
        width=16, depth=6, num_points=4, num_frequencies=3, zero_init=False, eval_num_rays_per_chunk=100
    )
    model = config.setup(scene_box=SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3])), num_train_data=1)
    bounds = SceneBounds("near-far", (0.0, 0.0, 0.0), 1.0, 0.2, 2.5)
    model.set_scene(bounds, torch.eye(3), torch.ones(3), has_accumulation=True, has_depth=has_depth, focal=20.0)
    return model.eval()


def camera(height: int = 17, width: int = 23, camera_type: CameraType = CameraType.PERSPECTIVE) -> Cameras:
    """A camera at (0, 0, 1.3) that looks at the origin, as the viewer makes them."""
    pose = torch.eye(4)[None, :3]
    pose[:, 2, 3] = 1.3
    return Cameras(
        pose, float(height), float(height), width / 2, height / 2, width, height,
        camera_type=camera_type, times=torch.zeros(1), metadata={"cam_idx": 0},
    )  # fmt: skip


class Interrupter:
    """Raises the viewer's interrupt at one of the lines that run inside it, counted from 0; None only counts."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.lines = 0

    def __enter__(self) -> Interrupter:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(self.before)

    def _trace(self, frame, event, arg):
        if frame.f_code is Interrupter.__exit__.__code__:
            return None
        if event == "line":
            self.lines += 1
            if self.at is not None and self.lines > self.at:
                self.at = None
                raise IOChangeException
        return self._trace


class RenderThread(RenderStateMachine):
    """Runs a function where the viewer renders: in a render thread of its own, in a state of the viewer's."""

    def __init__(self, job: Callable[[], Any], state: str) -> None:
        threading.Thread.__init__(self, daemon=True)
        self.job, self.state = job, state
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.job()
        except BaseException as error:
            self.error = error


def in_viewer(job: Callable[[], Any], state: str = "high") -> Any:
    thread = RenderThread(job, state)
    thread.start()
    thread.join()
    if thread.error is not None:
        raise thread.error
    return thread.result


@pytest.mark.parametrize("box", [None, BOX], ids=["whole", "cropped"])
def test_a_render_interrupted_at_any_line_spoils_no_later_one(box: OrientedBox | None):
    model = tiny_model()

    def render() -> dict[str, torch.Tensor]:
        return model.get_outputs_for_camera(camera(), obb_box=box)

    expected = render()
    with Interrupter(None) as counter:
        render()
    assert counter.lines > 100
    for line in random.Random(0).sample(range(counter.lines), 80):
        with pytest.raises(IOChangeException), Interrupter(line):
            render()
        assert renderers.BACKGROUND_COLOR_OVERRIDE is None
        assert not model.training
        # An interrupt inside torch's own no_grad may leave gradients off: for this thread, and a viewer's wants none.
        torch.set_grad_enabled(True)
        after = render()
        assert after.keys() == expected.keys()
        assert all(torch.equal(after[key], expected[key]) for key in expected)


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (1, 1), (1, 30), (30, 1)])
@pytest.mark.parametrize("box", [None, BOX], ids=["whole", "cropped"])
def test_any_size_is_rendered(size: tuple[int, int], box: OrientedBox | None):
    outputs = tiny_model().get_outputs_for_camera(camera(*size), obb_box=box)
    assert list(outputs)[0] == "rgb", "the viewer shows the first output"
    assert outputs["rgb"].shape == (*size, 3)
    assert outputs["accumulation"].shape == outputs["depth"].shape == (*size, 1)
    assert all(value.isfinite().all() for value in outputs.values())


def test_rays_that_miss_the_crop_box_have_the_viewers_background():
    color = torch.tensor([0.1, 0.2, 0.3])
    model = tiny_model()
    far = OrientedBox(R=torch.eye(3), T=torch.tensor([0.0, 5.0, 0.0]), S=torch.full((3,), 0.5))
    with renderers.background_color_override_context(color):
        outputs = model.get_outputs_for_camera(camera(), obb_box=far)
    assert torch.equal(outputs["rgb"], color.expand_as(outputs["rgb"]))
    assert not outputs["accumulation"].any()


def test_crop_box_around_everything_changes_nothing():
    model = tiny_model()
    all_of_it = OrientedBox(R=torch.eye(3), T=torch.zeros(3), S=torch.full((3,), 20.0))
    whole, cropped = (model.get_outputs_for_camera(camera(), obb_box=box) for box in (None, all_of_it))
    assert all(torch.equal(whole[key], cropped[key]) for key in whole)


def test_the_frame_rate_is_of_the_last_finished_frame(monkeypatch: pytest.MonkeyPatch):
    clock = iter([1.0, 1.04, 5.0, 6.0, 8.0])
    # Only here: other tests' panels read the clock too.
    monkeypatch.setattr(panel, "time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=time.sleep))
    pace = FrameTime()
    assert pace.describe("Student") == "**Student**: no frame yet"
    assert pace.size is None and pace.seconds(1, 1) is None
    with pace.measure(30, 40):
        pass
    assert pace.describe("Student") == "**Student**: 25 fps (40 ms)"
    with pytest.raises(IOChangeException), pace.measure(300, 400):
        raise IOChangeException
    assert pace.describe("Student") == "**Student**: 25 fps (40 ms)"
    assert pace.describe("Teacher", (60, 80)) == "**Teacher**: 6.25 fps (160 ms)"
    with pace.measure(30, 40):
        pass
    assert pace.describe("Student") == "**Student**: 0.5 fps (2.0 s)"


class PaintedTeacher:
    """Answers with one color, through Nerfstudio's global background as teachers on random backgrounds do."""

    COLOR = torch.tensor([0.2, 0.4, 0.6])

    def __init__(self) -> None:
        self.cameras: list[Cameras] = []

    def view(self, camera: Cameras) -> TeacherOutputs:
        self.cameras.append(camera)
        with renderers.background_color_override_context(self.COLOR):
            rgb = renderers.BACKGROUND_COLOR_OVERRIDE.expand(int(camera.height), int(camera.width), 3).clone()
        return TeacherOutputs(rgb, None, None)


def split_with(teacher: Any) -> TeacherSplit:
    split = TeacherSplit()
    split.checkbox.default_value = True
    split._teacher = teacher
    return split


def test_split_interrupted_at_any_line_restores_nerfstudios_background():
    split = split_with(PaintedTeacher())
    rgb = torch.zeros(6, 8, 3)
    outside = torch.tensor([0.5, 0.5, 0.5])

    def render(line: int | None) -> tuple[torch.Tensor | None, int]:
        with renderers.background_color_override_context(outside):
            try:
                with Interrupter(line) as counter:
                    result = split.apply(rgb, camera(6, 8))
            except IOChangeException:
                result = None
            assert renderers.BACKGROUND_COLOR_OVERRIDE is outside
        return result, counter.lines

    expected, lines = in_viewer(lambda: render(None))
    assert torch.equal(expected[:, 5:], PaintedTeacher.COLOR.expand(6, 3, 3))
    step = max(1, lines // 150)
    at = sorted({*range(0, lines, step), *range(lines - 100, lines)})
    for line in at:
        assert in_viewer(lambda line=line: render(line))[0] is None
        assert torch.equal(in_viewer(lambda: render(None))[0], expected)


@pytest.mark.parametrize("size", [(37, 53), (8, 2), (5, 1)])
def test_split_keeps_the_students_left_half(size: tuple[int, int]):
    height, width = size
    rgb = torch.rand(height, width, 3)
    before = rgb.clone()
    split = in_viewer(lambda: split_with(PaintedTeacher()).apply(rgb, camera(height, width)))
    middle = width // 2
    assert split.shape == rgb.shape
    assert torch.equal(split[:, :middle], rgb[:, :middle])
    assert torch.equal(split[:, middle + 1 :], PaintedTeacher.COLOR.expand(height, width - middle - 1, 3))
    assert torch.equal(rgb, before), "the student's own picture was painted over"


def test_split_only_applies_in_the_viewer():
    rgb = torch.rand(6, 8, 3)
    assert split_with(PaintedTeacher()).apply(rgb, camera(6, 8)) is rgb


def test_split_renders_a_slow_teacher_coarser_while_the_camera_moves():
    teacher = PaintedTeacher()
    split = split_with(teacher)
    split._frame_time._newest = (10.0, 100, 100)
    moving = in_viewer(lambda: split.apply(torch.zeros(100, 200, 3), camera(100, 200)), state="low_move")
    assert moving.shape == (100, 200, 3)
    drawn = teacher.cameras[-1]
    # A hundredth of the time: a tenth of the rows and columns, over the same field of view.
    assert (int(drawn.height), int(drawn.width)) == (10, 10)
    assert float(drawn.fx) == float(drawn.fy) == 10.0
    assert (float(drawn.cx), float(drawn.cy)) == (0.0, 5.0)
    split._frame_time._newest = (10.0, 100, 100)
    in_viewer(lambda: split.apply(torch.zeros(100, 200, 3), camera(100, 200)), state="high")
    assert (int(teacher.cameras[-1].height), int(teacher.cameras[-1].width)) == (100, 100)


def test_split_shows_the_teachers_render(tiny_teacher: Path):
    split = TeacherSplit()
    split.teacher_path = tiny_teacher / "config.yml"
    rgb = torch.zeros(12, 17, 3)
    split.checkbox.default_value = True
    assert torch.equal(in_viewer(lambda: split.apply(rgb, camera(12, 17))), rgb), "loaded before it was asked for"
    split._toggled(split.checkbox)
    assert "**Teacher**" in split.describe((12, 17))
    for kind in (CameraType.PERSPECTIVE, CameraType.EQUIRECTANGULAR):
        shown = in_viewer(lambda kind=kind: split.apply(rgb, camera(12, 17, kind)))
        whole = Teacher.load(tiny_teacher).view(camera(12, 17, kind)).rgb
        torch.testing.assert_close(shown[:, 9:], whole[:, 9:], atol=1e-4, rtol=0)
        assert not shown[:, :8].any()


@pytest.mark.parametrize(
    ("path", "reason"), [(None, "does not name its teacher"), (Path("gone") / "config.yml", "no trained run")]
)
def test_split_without_its_teacher_shows_the_reason_and_the_student(path: Path | None, reason: str):
    split = TeacherSplit()
    split.teacher_path = path
    split.checkbox.default_value = True
    split._toggled(split.checkbox)
    assert reason in split.describe(None)
    rgb = torch.rand(6, 8, 3)
    assert torch.equal(in_viewer(lambda: split.apply(rgb, camera(6, 8))), rgb)
    split.checkbox.default_value = False
    assert split.describe(None) == ""


def test_split_survives_a_teacher_that_fails_while_rendering():
    class Broken(PaintedTeacher):
        def view(self, camera: Cameras) -> TeacherOutputs:
            raise AttributeError("no such part")

    split = split_with(Broken())
    rgb = torch.rand(6, 8, 3)
    assert torch.equal(in_viewer(lambda: split.apply(rgb, camera(6, 8))), rgb)
    assert "AttributeError: no such part" in split.describe((6, 8))


@pytest.fixture
def open_viewer(tmp_path: Path) -> Iterator[Callable[[R2LModel], Viewer]]:
    """Opens Nerfstudio's viewer on a model, with compositing on by default as `ns-viewer` has it."""
    opened: list[Viewer] = []

    def open_(model: R2LModel) -> Viewer:
        pipeline = torch.nn.Module()
        pipeline.model = model
        pipeline.datamanager = SimpleNamespace(includes_time=False)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = ViewerConfig(websocket_host="127.0.0.1", websocket_port=port)
        viewer = Viewer(config, tmp_path / "log.txt", tmp_path, pipeline, train_lock=threading.Lock())
        opened.append(viewer)
        return viewer

    yield open_
    for viewer in opened:
        viewer.viser_server.stop()


def test_viewer_shows_the_split_and_keeps_depth(open_viewer: Callable[[R2LModel], Viewer]):
    viewer = open_viewer(tiny_model())
    assert [element.name for _, element in viewer.viewer_elements] == ["Engine", "Split with teacher"]
    assert not viewer.control_panel.layer_depth
    assert not viewer.control_panel._layer_depth.gui_handle.disabled


def test_viewer_survives_messages_that_are_too_late_or_too_early(open_viewer: Callable[[R2LModel], Viewer]):
    viewer = open_viewer(tiny_model())
    with viewer.viser_server.atomic():
        viewer.render_statemachines[7].action("of a browser that has gone")
    # Clicked before the training cameras are drawn.
    viewer.set_camera_visibility(False)
    thread = object()
    viewer.render_statemachines[8] = thread
    assert viewer.render_statemachines[8] is thread and len(viewer.render_statemachines) == 1


def test_depth_cannot_be_composited_without_the_teachers_depth(open_viewer: Callable[[R2LModel], Viewer]):
    viewer = open_viewer(tiny_model(has_depth=False))
    assert not viewer.control_panel.layer_depth
    assert viewer.control_panel._layer_depth.gui_handle.disabled
