"""Code for a GPU, rehearsed on fake CUDA tensors: devices, shapes and types of teacher views, of frames and of the engine.

What a value decides is answered by `fake_cuda.Rehearsal`; what is not covered is listed in docs/gpu.md.
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
from fake_cuda import Rehearsal, rehearsed
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from student_runs import (
    fill,
    fill_occupancy,
    tiny_composited_mobile_r2l,
    tiny_composited_r2l,
    tiny_mobile_r2l,
    tiny_r2l,
)
from torch import Tensor

from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import ViewRenderer, ViewRing
from r2l_nerfstudio.engines import cuda_graph
from r2l_nerfstudio.engines.torch_engine import TorchEngine
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.teacher import Teacher

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


# Teacher views.


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
        sampler: Any = SimpleNamespace(sample=lambda _: (torch.eye(3, 4), torch.tensor([24.0, 24.0, 12.0, 12.0])))
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
        # Of a camera's kind a value decides.
        with (
            mock.patch("r2l_nerfstudio.models.camera_rays.is_pinhole", lambda _: is_pinhole),
            mock.patch("r2l_nerfstudio.models.any_camera.WIDEST", -1.0 if kind == "panorama" else 1.0),
            made.drawn_by(engine),
        ):
            watch.waits.clear()
            outputs = made.get_outputs_for_camera(camera)
        assert all(value.device.type == "cuda" and value.dtype == torch.float32 for value in outputs.values())
        assert not engine._graphs.has_failed
        if is_pinhole:
            graphs = {("cuda_graph.py:_capture", op) for op in ("item", "allclose")}
            assert unexpected(watch, {**FRAME_WAITS, **dict.fromkeys(graphs, "once for each shape")}) == []
