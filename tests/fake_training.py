"""A student's training on fake CUDA, set up as `ns-train` sets it up; teacher views and photos are real host tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from distil import own_writers, student_config
from nerfstudio.engine.callbacks import TrainingCallbackAttributes
from rehearsal import Rehearsal, on_host, rehearsed

from r2l_nerfstudio.distillation import photo_views, photos, pipeline, scene_occupancy
from r2l_nerfstudio.distillation.datamanager import DistillationDataManager
from r2l_nerfstudio.distillation.pose_sampling import PoseSampler
from r2l_nerfstudio.distillation.progress import TrainingProgress
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.trainer import DistillationTrainer
from r2l_nerfstudio.distillation.view_ring import TeacherView, ViewRenderer

SIZE = 24
STEPS = 12


@contextmanager
def fake_training(
    method: str, capture: Path, output: Path, has_corrections: bool = False, **overrides: Any
) -> Iterator[tuple[DistillationTrainer, Rehearsal]]:
    """A trainer before its first iteration, on fake CUDA for as long as the context lasts.

    Args:
        method: as `ns-train` lists it.
        capture: views of 24x24 pixels.
        output: where the run's folder would be.
        has_corrections: whether the teacher has learned pose corrections.
        **overrides: configuration by dotted name.
    """
    config = student_config(None, output, method, **{"machine.device_type": "cuda", **overrides})
    data = config.pipeline.datamanager
    data.data = capture
    config.pipeline.model.fit_to(SIZE, SIZE)
    generator = torch.Generator().manual_seed(0)
    points = 0.2 * torch.randn(500, 3, generator=generator)
    survey = Survey(True, True, points, 0.8 + 0.1 * torch.rand(500, generator=generator), 0.5, 0.7)
    with ExitStack() as stack:
        put = lambda target, name, value: stack.enter_context(mock.patch.object(target, name, value))  # noqa: E731
        with mock.patch.object(DistillationDataManager, "setup_eval", lambda self: None):
            datamanager = data.setup(device="cuda:0", test_mode="val", world_size=1, local_rank=0)
        put(data, "_target", lambda *_, **__: datamanager)
        for target, name in (
            (type(datamanager), "view_cameras"),
            (Survey, "bounds"),
            (PoseSampler, "__init__"),
            (pipeline, "scene_of_capture"),
            (scene_occupancy, "choose_sampler"),
            (photos, "read_photo"),
            (photos, "_stored_size"),
        ):
            put(target, name, on_host(getattr(target, name)))
        put(pipeline, "STATISTICS_BATCHES", 2)
        put(pipeline, "check_cameras", lambda *_: None)
        put(pipeline, "background_of", lambda _: torch.ones(3))
        put(pipeline, "view_size", lambda *_: (SIZE, SIZE))
        put(pipeline.Survey, "take", lambda *_: survey)
        put(photo_views, "undistorted_photo", lambda *_: torch.full((SIZE, SIZE, 4), 200, dtype=torch.uint8))
        put(ViewRenderer, "render", on_host(_view))
        watch = stack.enter_context(rehearsed())
        put(pipeline, "load_teacher", lambda *_: _teacher(len(datamanager.train_dataset) if has_corrections else 0))
        stack.enter_context(own_writers())
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.pipeline = config.pipeline.setup(device=trainer.device, test_mode="val")
        trainer.pipeline.train()
        trainer.optimizers = trainer.setup_optimizers()
        trainer.progress = TrainingProgress(STEPS)
        trainer.pipeline.follow(trainer.progress)
        attributes = TrainingCallbackAttributes(
            optimizers=trainer.optimizers, grad_scaler=trainer.grad_scaler, pipeline=trainer.pipeline, trainer=None
        )
        trainer.callbacks = trainer.pipeline.get_training_callbacks(attributes)
        yield trainer, watch


def _view(renderer: ViewRenderer, index: int) -> TeacherView:
    generator = torch.Generator().manual_seed(index)
    pose, intrinsics = torch.eye(3, 4), torch.tensor([SIZE, SIZE, SIZE / 2, SIZE / 2])
    size = (renderer.height, renderer.width)
    pixels = torch.randint(1, 255, (*size, 5), generator=generator, dtype=torch.uint8)
    return TeacherView(pose, intrinsics, pixels, torch.rand(size, generator=generator).half())


def _teacher(corrections: int) -> SimpleNamespace:
    made = torch.zeros(corrections, 3, 4, device="cuda:0") if corrections else None
    return SimpleNamespace(pose_corrections=lambda: made, fingerprint=lambda: "none")
