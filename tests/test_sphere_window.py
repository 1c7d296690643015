"""The part of an image that a bounded scene can cover: complete, and hardly larger."""

from __future__ import annotations

import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox
from torch import Tensor

from r2l_nerfstudio.distillation.pose_sampling import look_along
from r2l_nerfstudio.models import mobile_r2l
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModelConfig
from r2l_nerfstudio.models.r2l import R2LModelConfig
from r2l_nerfstudio.rays.pinhole import image_rays
from r2l_nerfstudio.rays.spacing import SceneBounds, cross_sphere
from r2l_nerfstudio.rays.sphere_window import Window, sphere_window

CENTER = torch.tensor([0.3, -0.2, 0.1])
RADIUS = 0.8
UP = torch.tensor([0.0, 0.0, 1.0])


def cameras(count: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """Pose, intrinsics, height and width of cameras near and far, wide and narrow, that look about the scene."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        away = torch.nn.functional.normalize(torch.randn(3, generator=random), dim=0)
        position = CENTER + away * RADIUS * (0.9 + 4 * torch.rand(1, generator=random))
        forward = torch.nn.functional.normalize(-away + 0.4 * torch.randn(3, generator=random), dim=0)
        focal, shift, height, width = torch.rand(4, generator=random).tolist()
        width, height = 20 + int(40 * width), 20 + int(40 * height)
        intrinsics = torch.tensor([1.0, 0.9, 0.0, 0.0]) * (15 + 120 * focal)
        intrinsics[2:] = torch.tensor([width * (0.3 + 0.4 * shift), height / 2])
        found.append((torch.cat([look_along(forward, UP), position[:, None]], dim=-1), intrinsics, height, width))
    return found


def test_a_window_holds_the_sphere_and_little_else() -> None:
    alone = 0
    for pose, intrinsics, height, width in cameras(300):
        window = sphere_window(pose, intrinsics, height, width, CENTER, RADIUS)
        # Eight rays along each side of every pixel: the silhouette may end in a narrow tip.
        rays = image_rays(pose, 8 * intrinsics, 8 * height, 8 * width)
        hit = ~cross_sphere(*rays, CENTER, torch.tensor(RADIUS)).is_missed[..., 0]
        inside = torch.zeros_like(hit)
        inside[8 * window.top : 8 * window.bottom, 8 * window.left : 8 * window.right] = True
        assert not (hit & ~inside).any()
        if float((CENTER - pose[:, 3]) @ pose[:, 2]) >= -RADIUS:
            assert window == (0, 0, width, height)
        elif hit.any() and 0 < window.left < window.right < width and 0 < window.top < window.bottom < height:
            alone += 1
            down, across = hit.any(1).nonzero()[:, 0] / 8, hit.any(0).nonzero()[:, 0] / 8
            near = (across[0] - window.left, down[0] - window.top)
            far = (window.right - across[-1], window.bottom - down[-1])
            assert max(near + far) < 1.5
    assert alone > 10


def test_cameras_near_the_sphere_leave_nothing_out() -> None:
    intrinsics, pose = torch.tensor([20.0, 20.0, 8.0, 8.0]), torch.eye(4)[:3]
    whole = (0, 0, 16, 16)
    for position in ([0.0, 0.0, 0.5], [0.0, 0.0, -3.0], [5.0, 0.0, 0.5], [math.nan, 0.0, 3.0]):
        pose[:, 3] = torch.tensor(position)
        assert sphere_window(pose, intrinsics, 16, 16, torch.zeros(3), 1.0) == whole
    pose[:, 3] = torch.tensor([9.0, 0.0, 2.0])
    window = sphere_window(pose, intrinsics, 16, 16, torch.zeros(3), 1.0)
    assert window.left == window.right == 0


def student(kind: str) -> LightFieldModel:
    torch.manual_seed(1)
    config = (
        R2LModelConfig(width=16, depth=4, zero_init=False)
        if kind == "r2l"
        else MobileR2LModelConfig(width=16, blocks=1, upsampling_factor=4, up_width=8, last_width=8, zero_init=False)
    )
    made = config.setup(scene_box=SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3])), num_train_data=1, metadata={})
    torch.nn.init.normal_(made.network.tail.weight, std=0.7)  # so that pixels differ
    bounds = SceneBounds("sphere", tuple(CENTER.tolist()), RADIUS, 1.0, 5.0)
    made.set_scene(bounds, torch.eye(3), torch.tensor([0.2, 0.4, 0.9]), True, True, focal=60.0)
    return made.eval()


@pytest.mark.parametrize("kind", ["r2l", "mobile-r2l"])
def test_the_window_changes_no_image(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(kind)
    rays = [0]

    def count(encoded: Tensor) -> Tensor:
        rays[-1] += encoded[:, 0].numel()
        return model.network(encoded)

    views = [
        Cameras(pose[None], *intrinsics.tolist(), width=width, height=height)
        for pose, intrinsics, height, width in cameras(60)
    ]
    with model.network_run_by(count):
        drawn = [model.get_outputs_for_camera(view) for view in views]
    rays.append(0)
    if kind == "r2l":
        nothing = lambda origins, _: torch.zeros_like(origins[..., :1], dtype=torch.bool)  # noqa: E731
        monkeypatch.setattr(model.ray_encoding, "misses_scene", nothing)
    else:
        monkeypatch.setattr(mobile_r2l, "sphere_window", lambda _, __, height, width, *___: Window(0, 0, width, height))
    with model.network_run_by(count):
        whole = [model.get_outputs_for_camera(view) for view in views]
    for wanted_outputs, found in zip(whole, drawn, strict=True):
        for key, wanted in wanted_outputs.items():
            torch.testing.assert_close(found[key], wanted, atol=1e-5, rtol=1e-5)
    few, many = rays
    assert few < 0.8 * many
