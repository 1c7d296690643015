"""Code for a GPU, rehearsed on fake CUDA tensors: devices, shapes and types of a whole training, of frames and of engines.

What a value decides is answered by `rehearsal.Rehearsal`; what is not covered is listed in docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_training import fake_training
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from rehearsal import Rehearsal, rehearsed
from student_runs import (
    fill,
    fill_occupancy,
    tiny_composited_mobile_r2l,
    tiny_composited_r2l,
    tiny_mobile_r2l,
    tiny_r2l,
)
from torch import Tensor

from r2l_nerfstudio.distillation.crops import sample_crops
from r2l_nerfstudio.distillation.hard_rays import HardRayPool
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import ViewRenderer, ViewRing
from r2l_nerfstudio.engines import cuda_graph
from r2l_nerfstudio.engines.torch_engine import TorchEngine
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.student import Student
from r2l_nerfstudio.teacher import Teacher
from r2l_nerfstudio.viewer.panel import FrameTime

METHODS = ("r2l", "r2l-lite", "r2l-paper", "mobile-r2l", "mobile-r2l-lite", "mobile-r2l-paper")

TRAINING_WAITS = {
    (
        "view_ring.py:put",
        "copy from the host",
    ): "a teacher view comes from a thread of its own, once in many iterations",
    ("photos.py:rays", "_unique2"): "Nerfstudio's cameras, for the rays of 32 iterations at once",
    ("photos.py:rays", "copy from the host"): "likewise",
    ("photos.py:rays", "item"): "likewise",
    ("photos.py:rays", "nonzero"): "likewise",
}
"""Where a training iteration may wait for the GPU, and why."""
FRAME_WAITS = {
    ("camera_rays.py:is_pinhole", "item"): "before anything is drawn: the GPU has nothing else to do",
    ("camera_rays.py:camera_rays", "item"): "the camera's size, likewise",
    ("light_field.py:get_outputs_for_camera", "item"): "the camera's size, likewise",
    ("mobile_r2l.py:render_pinhole", "item"): "focal lengths decide the size that is drawn, before anything is",
    ("mobile_r2l.py:drawn_size", "item"): "likewise",
    ("r2l.py:_supersampling", "item"): "likewise",
    ("r2l.py:render_rays", "nonzero"): "rays that miss a bounded scene cost no network evaluation",
    ("r2l.py:_render_composited", "nonzero"): "likewise",
    ("camera_rays.py:pinhole_parameters", "copy from the host"): "a pose and four numbers, before anything is drawn",
    ("panel.py:_now", "synchronize"): "once, when a frame is drawn: the panel shows how long that took",
}
"""Where a frame may wait for the GPU, and why."""


def unexpected(watch: Rehearsal, allowed: dict[tuple[str, str], str]) -> list[str]:
    """Waits that no entry of a list allows."""
    return sorted({str(wait) for wait in watch.waits if (Path(wait.where).name, wait.operator) not in allowed})


# Training.


@pytest.mark.parametrize("method", METHODS)
def test_a_training_from_the_first_view_to_the_checkpoint(method: str, tiny_capture: Path, tmp_path: Path) -> None:
    first = {"pipeline.datamanager.single_ray_share": 0.5} if method == "mobile-r2l-lite" else {}
    with fake_training(method, tiny_capture, tmp_path, method == "r2l", **first) as (trainer, watch):
        pipeline = trainer.pipeline
        assert pipeline.datamanager.ring.pixels.device.type == "cuda"
        pipeline.progress.fraction = 0.2
        pipeline._update_occupancy(200)
        assert pipeline.model.composited is None or pipeline.model.composited.prunings == 1
        watch.waits.clear()
        for step in (0, 10, 11):  # the last one with photos
            _, losses, _ = trainer.train_iteration(step)
            pipeline.update_average(step)
            assert all(loss.device.type == "cuda" for loss in losses.values())
        assert pipeline.datamanager.in_photo_stage
        assert unexpected(watch, TRAINING_WAITS) == []
        for name, parameter in pipeline.model.network.named_parameters():
            assert parameter.grad is not None and parameter.grad.device.type == "cuda", name
        pipeline._evaluate_held_out(500)
        pipeline._update_occupancy(600)
        check_checkpoint(trainer)
        pipeline.finish(12)


def check_checkpoint(trainer: Any) -> None:
    """What a checkpoint holds is on the GPU, or plain; and goes back there from a file, which is read on the host."""
    pipeline, optimizers = trainer.pipeline, trainer.optimizers
    state = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in pipeline.state_dict().items()}
    for name, value in pipeline.state_dict().items():  # counters of the host are no dimension large
        assert not isinstance(value, Tensor) or value.device.type == "cuda" or value.ndim == 0, name
    for optimizer in optimizers.optimizers.values():
        saved = optimizer.state_dict()
        for entry in saved["state"].values():
            for name, value in entry.items():
                assert not isinstance(value, Tensor) or name == "step" or value.device.type == "cuda", name
                entry[name] = value.cpu() if isinstance(value, Tensor) else value
        optimizer.load_state_dict(saved)
        for entry in optimizer.state.values():
            assert all(v.device.type == "cuda" for k, v in entry.items() if isinstance(v, Tensor) and k != "step")
    average = {key.removeprefix("average."): v for key, v in state.items() if key.startswith("average.")}
    if pipeline.average is not None:
        pipeline.average.load_state_dict(average)
        pipeline.average.update()


def test_a_teacher_renders_its_views_on_the_gpu() -> None:
    """Model, teacher, survey's thumbnails and the view that goes into the ring; the model is a stand-in."""

    class Model(torch.nn.Module):
        def get_outputs_for_camera(self, camera: Cameras) -> dict[str, Tensor]:
            assert camera.device.type == "cuda"
            size = (int(camera.height[0]), int(camera.width[0]), 1)
            near = camera.camera_to_worlds[0, 0, 0] * torch.rand(size, device=camera.device)
            return {"rgb": near.expand(-1, -1, 3), "accumulation": near, "depth": 1 + near}

    with rehearsed(integer=24) as watch:
        fields = dict.fromkeys(("config", "config_path", "checkpoint", "dataparser_config", "dataparser_outputs"))
        teacher = Teacher(
            **fields, step=0, device=torch.device("cuda"), model=Model(), background=torch.zeros(3, device="cuda")
        )  # fmt: skip
        survey = Survey(True, True, torch.zeros(0, 3), torch.zeros(0), 0.5, 0.5)
        camera = torch.eye(3, 4), torch.tensor([24.0, 24.0, 12.0, 12.0])
        sampler: Any = SimpleNamespace(sample=lambda *_: camera, is_zoomed=lambda _: False)
        renderer = ViewRenderer(teacher, sampler, survey, 24, 24, seed=0)
        ring = ViewRing(renderer, 2, "cuda")
        ring.refresh()
        view = ring.render_next()
        assert view.pixels.device.type == view.depth.device.type == "cpu"
        assert ring.pixels.device.type == "cuda" and len(ring) == 1
        assert any(wait.operator == "copy to the host" for wait in watch.waits)


# Frames.


def model(config: Any, spacing: str) -> LightFieldModel:
    """A student with random weights, on the host."""
    made = config.setup(scene_box=None, num_train_data=1, metadata={})
    bounds = SceneBounds(spacing, (0.1, -0.1, 0.05), 0.8, 1.0, 3.0)
    made.set_scene(bounds, torch.eye(3), torch.ones(3), True, True, 30.0)
    if made.composited is not None:
        fill_occupancy(made)
    fill(made)
    return made.eval()


CAMERAS = {
    "pinhole": {},
    "distorted": {"distortion_params": torch.tensor([[0.2, -0.05, 0.0, 0.0, 0.01, -0.02]])},
    "fisheye": {"camera_type": CameraType.FISHEYE},
    "panorama": {"camera_type": CameraType.EQUIRECTANGULAR},
}
STUDENTS = {
    "r2l": tiny_r2l,
    "mobile-r2l": tiny_mobile_r2l,
    "r2l composited": tiny_composited_r2l,
    "mobile-r2l composited": tiny_composited_mobile_r2l,
}


@contextmanager
def graphs_at_once() -> Iterator[None]:
    """CUDA graphs that are captured before the call that wants them goes on, and that replay nothing."""
    graph = SimpleNamespace(replay=lambda: None)
    with (
        mock.patch("torch.cuda.CUDAGraph", lambda: graph),
        mock.patch("torch.cuda.graph", lambda *_, **__: nullcontext()),
        mock.patch.object(cuda_graph._thread, "start_new_thread", lambda function, arguments: function(*arguments)),
    ):
        yield


def generate_rays(self: Cameras, *_: Any, **__: Any) -> RayBundle:
    """In place of Nerfstudio's own, in which values decide about everything."""
    directions = torch.nn.functional.normalize(torch.rand(18, 18, 3, device=self.device), dim=-1)
    origins = self.camera_to_worlds[0, :, 3].expand(18, 18, 3)
    return RayBundle(origins, directions, pixel_area=torch.ones(18, 18, 1, device=self.device))


@pytest.mark.parametrize("kind", CAMERAS)
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("spacing", ["sphere", "disparity"])
def test_frames(student: str, kind: str, spacing: str) -> None:
    made = model(STUDENTS[student](), spacing)
    pose = torch.tensor([[1.0, 0, 0, 0.1], [0, 1, 0, -0.2], [0, 0, 1, 2.0]])
    camera = Cameras(pose[None], 30.0, 31.0, 12.0, 9.0, width=18, height=18, **CAMERAS[kind])
    is_pinhole = kind == "pinhole"
    with (
        rehearsed(number=20.0, integer=18) as watch,
        graphs_at_once(),
        mock.patch.object(Cameras, "generate_rays", generate_rays),
    ):
        made.to("cuda")
        engine = TorchEngine(made.network, "fp16")
        assert engine._graphs is not None
        # Rays of one origin, in a lens that one picture serves; of a panorama six.
        watch.answers["models/any_camera.py:render_by_faces"] = 0.0
        watch.answers["models/mobile_r2l.py:_render_distorted"] = 0.0
        # Of a camera's kind a value decides.
        with (
            mock.patch("r2l_nerfstudio.models.camera_rays.is_pinhole", lambda _: is_pinhole),
            mock.patch("r2l_nerfstudio.models.any_camera.WIDEST", -1.0 if kind == "panorama" else 1.0),
            made.network_run_by(engine),
        ):
            watch.waits.clear()
            outputs = made.get_outputs_for_camera(camera)
        assert all(value.device.type == "cuda" and value.dtype == torch.float32 for value in outputs.values())
        assert not engine._graphs.has_failed
        if is_pinhole:
            graphs = {("cuda_graph.py:_capture", op) for op in ("item", "allclose")}
            assert unexpected(watch, {**FRAME_WAITS, **dict.fromkeys(graphs, "once for each shape")}) == []


def test_a_crop_box_on_the_gpu() -> None:
    made = model(tiny_r2l(), "disparity")
    camera = Cameras(torch.eye(3, 4)[None], 30.0, 31.0, 12.0, 9.0, width=18, height=18)
    box = OrientedBox.from_params((0.1, 0.0, 0.1), (0.3, 0.2, 0.1), (0.7, 0.6, 0.8))
    with rehearsed(number=20.0, integer=18), mock.patch.object(Cameras, "generate_rays", generate_rays):
        made.to("cuda")
        with made.network_run_by(lambda encoded: made.network(encoded)):
            outputs = made.get_outputs_for_camera(camera, box)
    assert all(value.device.type == "cuda" for value in outputs.values())


def test_the_panel_waits_once_for_a_frame() -> None:
    """The network's share is taken from events, however often the network is called."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, end: object) -> float:
            return 4.0

    made = FrameTime()
    with (
        rehearsed() as watch,
        mock.patch("torch.cuda.is_initialized", lambda: True),
        mock.patch("torch.cuda.Event", Event),
        made.measure(10, 20),
    ):
        for _ in range(5):
            with made.network():
                pass
        assert watch.waits == []
    assert made.describe_network("torch").startswith("Network: 20 ms")
    assert [wait.operator for wait in watch.waits] == ["synchronize"]


# Planted bugs: what a rehearsal has to find.


def test_a_generator_of_the_host_on_the_gpu_is_found() -> None:
    """As it was in crops of held-out photos, which no CPU could show."""
    with rehearsed():
        ring = ViewRing(SimpleNamespace(width=16, height=16), 2, "cuda")
        ring._filled = 2
        assert sample_crops(ring, 3, 2, 4, torch.Generator()).target.rgb.device.type == "cuda"
        with pytest.raises(RuntimeError, match="expected a 'cuda' generator but found 'cpu'"):
            torch.randint(5, (3,), generator=torch.Generator(), device="cuda")


def test_a_ring_on_the_host_is_found(tiny_capture: Path, tmp_path: Path) -> None:
    with fake_training("r2l-lite", tiny_capture, tmp_path) as (trainer, _):
        ring = trainer.pipeline.datamanager.ring
        ring.camera_to_worlds = ring.camera_to_worlds.cpu()
        with pytest.raises(RuntimeError, match="same device"):
            trainer.train_iteration(0)


def test_an_average_on_the_host_is_found(tiny_capture: Path, tmp_path: Path) -> None:
    with fake_training("mobile-r2l-lite", tiny_capture, tmp_path) as (trainer, _):
        average = trainer.pipeline.average
        assert average is not None
        average.register_buffer("weight_0", average.get_buffer("weight_0").cpu())
        with pytest.raises(RuntimeError, match="device"):
            trainer.pipeline.update_average(0)


def test_a_wait_for_every_batch_is_found(tiny_capture: Path, tmp_path: Path) -> None:
    def add(self: HardRayPool, records: Tensor, errors: Tensor) -> None:
        self._records[: len(records)] = records[errors > errors.mean().item()][:1]

    with fake_training("r2l", tiny_capture, tmp_path) as (trainer, watch):
        watch.waits.clear()
        with mock.patch.object(HardRayPool, "add", add):
            trainer.train_iteration(0)
        assert unexpected(watch, TRAINING_WAITS)


# Export.


@pytest.mark.parametrize("student", STUDENTS)
def test_graphs_of_exports_on_the_gpu(student: str) -> None:
    """As the exporter of torch-tensorrt runs them."""
    made = model(STUDENTS[student](), "sphere")
    graph = GraphSpec("camera", "fp16", 24, 20).build(Student(made, student.partition(" ")[0]))
    inputs = torch.eye(3, 4), torch.tensor([30.0, 30.0, 12.0, 10.0])
    with rehearsed():
        outputs = graph.to("cuda")(*(tensor.to("cuda") for tensor in inputs))
    assert all(output.device.type == "cuda" for output in outputs)
