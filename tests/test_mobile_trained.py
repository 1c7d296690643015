"""Properties of a trained MobileR2L student: it learns, is stable, and runs in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox
from scene_teacher import SceneTeacher, scene_cameras
from torch import Tensor
from torch.nn.functional import interpolate
from versions import needs_half_on_cpu

from r2l_nerfstudio.distillation.crops import sample_crops
from r2l_nerfstudio.distillation.optimization import MuonOptimizerConfig
from r2l_nerfstudio.distillation.pose_sampling import PoseSampler, PoseSamplerConfig, capture_cameras
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import ViewRenderer, ViewRing
from r2l_nerfstudio.models.metrics import psnr
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModel, MobileR2LModelConfig

SIZE = 40
STEPS = 220


def ring(count: int, seed: int) -> ViewRing:
    """Views of the analytic scene, as training has them."""
    cameras = scene_cameras(12, SIZE)
    teacher = SceneTeacher()
    sampler = PoseSampler(capture_cameras(cameras), PoseSamplerConfig(focal_range=(1.0, 1.0)))
    made = ViewRing(ViewRenderer(teacher, sampler, Survey.take(teacher, cameras), SIZE, SIZE, seed), count, "cpu")
    made.fill()
    return made


@pytest.fixture(scope="module")
def student() -> MobileR2LModel:
    torch.manual_seed(0)
    cameras = scene_cameras(12, SIZE)
    capture = capture_cameras(cameras)
    survey = Survey.take(SceneTeacher(), cameras)
    config = MobileR2LModelConfig(
        width=64, blocks=3, upsampling_factor=4, up_width=16, last_width=16, jitter_points=False, volume_resolution=20
    )
    model = config.setup(scene_box=SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3])), num_train_data=1, metadata={})
    model.set_scene(
        survey.bounds(capture), capture.mean_axes, torch.ones(3), True, True, float(capture.intrinsics[0, 0])
    )
    groups = model.get_param_groups()
    optimizers = [
        MuonOptimizerConfig(lr=4e-3).setup(params=groups["hidden"]),
        torch.optim.Adam(groups["ends"], lr=4e-3),
        torch.optim.Adam(groups["volume"], lr=2e-2),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in optimizers]
    views = ring(40, seed=1)
    for _ in range(STEPS):
        batch = sample_crops(views, 12, 5, model.factor)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch.ray_bundle)
        sum(model.get_loss_dict(outputs, batch.as_nerfstudio()[1]).values()).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def unseen() -> ViewRing:
    return ring(4, seed=2)


def camera_of(views: ViewRing, index: int, shift: float = 0.0) -> Cameras:
    fx, fy, cx, cy = views.intrinsics[index].tolist()
    return Cameras(views.camera_to_worlds[index][None], fx, fy, cx + shift, cy, width=SIZE, height=SIZE)


def resized(image: Tensor, size: int) -> Tensor:
    channels = image.permute(2, 0, 1)[None]
    return interpolate(channels, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def test_it_learns_color_accumulation_and_depth(student: MobileR2LModel, unseen: ViewRing) -> None:
    for index in range(len(unseen)):
        outputs = student.get_outputs_for_camera(camera_of(unseen, index))
        truth = unseen.pixels[index].float() / 255
        assert psnr(outputs["rgb"], truth[..., :3]) > 16
        opaque = truth[..., 3] > 0.5
        assert ((outputs["accumulation"][..., 0] > 0.5) == opaque).float().mean() > 0.95
        depth, known = outputs["depth"][..., 0], unseen.depth[index].float()
        assert ((depth - known).abs() / known.clamp_min(1e-3))[opaque].median() < 0.1


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3, 2.0])
def test_the_image_is_stable_when_the_resolution_changes(
    scale: float, student: MobileR2LModel, unseen: ViewRing
) -> None:
    own, other = camera_of(unseen, 0), camera_of(unseen, 0)
    other.rescale_output_resolution(scale)
    pictures = [student.get_outputs_for_camera(camera)["rgb"] for camera in (own, other)]
    assert pictures[1].shape[0] == int(SIZE * scale)
    smallest = min(picture.shape[0] for picture in pictures)
    assert psnr(*(resized(picture, smallest) for picture in pictures)) > 30


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_the_image_moves_with_the_camera_without_a_visible_grid(
    shift: int, student: MobileR2LModel, unseen: ViewRing
) -> None:
    for index in range(len(unseen)):
        still, moved = (
            student.get_outputs_for_camera(camera_of(unseen, index, by))["rgb"] for by in (0.0, float(shift))
        )
        truth = unseen.pixels[index, ..., :3].float() / 255
        # Nearer to each other than either is to the truth.
        between = psnr(moved[:, shift:], still[:, :-shift])
        assert between > 22 and between > psnr(still, truth) + 2


@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_zooming_shows_the_scene(zoom: float, student: MobileR2LModel, unseen: ViewRing) -> None:
    camera = camera_of(unseen, 1)
    camera.fx, camera.fy = camera.fx * zoom, camera.fy * zoom
    truth = SceneTeacher().view(camera).rgb
    rgb = student.get_outputs_for_camera(camera)["rgb"]
    flat = truth.mean((0, 1), keepdim=True).expand_as(truth)
    assert psnr(rgb, truth) > max(16.0, psnr(flat, truth) + 4)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 40.0), pytest.param(torch.float16, 55.0, marks=needs_half_on_cpu)]
)
def test_half_precision_is_safe(dtype: torch.dtype, bound: float, student: MobileR2LModel, unseen: ViewRing) -> None:
    camera = camera_of(unseen, 2)
    exact = student.get_outputs_for_camera(camera)
    half = copy.deepcopy(student.network).to(dtype)
    with student.network_run_by(lambda encoded: half(encoded.to(dtype)).float()):
        rough = student.get_outputs_for_camera(camera)
    assert not torch.equal(rough["rgb"], exact["rgb"])
    assert psnr(rough["rgb"], exact["rgb"]) > bound
    assert ((rough["depth"] - exact["depth"]).abs() / exact["depth"].clamp_min(1e-3)).mean() < 0.01
