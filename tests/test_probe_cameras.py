"""Cameras on which engines and exports are compared."""

from __future__ import annotations

import pytest
import torch
from nerfstudio.data.scene_box import SceneBox

from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModel, MobileR2LModelConfig
from r2l_nerfstudio.models.probe_cameras import TURNS, probe_encoding, probe_intrinsics, probe_poses
from r2l_nerfstudio.models.r2l import R2LModelConfig
from r2l_nerfstudio.rays.spacing import SceneBounds, SpacingKind

CENTER = torch.tensor([1.0, 2.0, 3.0])
CONFIGS = {
    "r2l": R2LModelConfig(width=8, depth=4, num_points=4),
    "mobile-r2l": MobileR2LModelConfig(width=8, blocks=1, upsampling_factor=4, up_width=8, last_width=8, num_points=4),
}


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def student(kind: str, spacing: SpacingKind = "sphere") -> LightFieldModel:
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    model: LightFieldModel = CONFIGS[kind].setup(scene_box=box, num_train_data=1, metadata={})
    bounds = SceneBounds(spacing, (1.0, 2.0, 3.0), 0.5, 1.0, 3.0)
    model.set_scene(bounds, torch.eye(3), torch.ones(3), has_accumulation=True, has_depth=True, focal=30.0)
    return model.eval()


def test_probe_cameras_see_the_scene(kind: str) -> None:
    outside = probe_poses(student(kind))
    offset = CENTER - outside[:, :, 3]
    torch.testing.assert_close(offset / offset.norm(dim=-1, keepdim=True), -outside[:, :, 2])
    inside = probe_poses(student(kind, "disparity"))
    torch.testing.assert_close(inside[:, :, 3], CENTER.expand(3, 3))
    assert (inside[0, :, 2] - inside[2, :, 2]).norm() > 0.5  # they look in different directions


def test_probe_images_need_no_resampling(kind: str) -> None:
    model = student(kind)
    fx, fy, cx, cy = probe_intrinsics(model, 24, 16).tolist()
    assert (cx, cy) == (12.0, 8.0) and fx == fy == pytest.approx(30.0 if model.reads_ray_image else 28.8)
    if isinstance(model, MobileR2LModel):
        assert model.drawn_size(fx, fy, 24, 16) == (24, 16)


def test_probe_encodings_are_the_networks_input(kind: str) -> None:
    model = student(kind)
    encoded = probe_encoding(model)
    assert encoded.isfinite().all()
    assert encoded.shape[0] == len(TURNS) * (1 if model.reads_ray_image else 19 * 19)
    with torch.no_grad():
        assert model.network(encoded).shape[1] == 5
