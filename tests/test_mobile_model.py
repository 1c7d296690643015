"""The MobileR2L model: pinholes of any size, other lenses, and its supervision."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from student_runs import fill, fill_occupancy
from torch import Tensor

from r2l_nerfstudio.distillation.crops import joined, sample_crops
from r2l_nerfstudio.distillation.photo_views import PhotoViews
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models import mobile_r2l
from r2l_nerfstudio.models.any_camera import render_by_faces
from r2l_nerfstudio.models.camera_rays import CameraRays
from r2l_nerfstudio.models.composited_encoding import EncodedRays
from r2l_nerfstudio.models.mobile_r2l import MAX_CELLS, MobileR2LModel, MobileR2LModelConfig
from r2l_nerfstudio.rays.pinhole import image_rays
from r2l_nerfstudio.rays.spacing import SceneBounds

FOCAL = 30.0
POSE = torch.tensor([[0.96, 0.0, 0.28, 0.9], [0.0, 1.0, 0.0, -0.2], [-0.28, 0.0, 0.96, 3.0]])


def model(factor: int = 4, accumulation: bool = True, depth: bool = True, **config) -> MobileR2LModel:
    """A student with random weights of a scene in the unit ball."""
    torch.manual_seed(1)
    made = MobileR2LModelConfig(
        width=16, blocks=1, upsampling_factor=factor, up_width=8, last_width=8, zero_init=False, **config
    ).setup(scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]])), num_train_data=1, metadata={})
    torch.nn.init.normal_(made.network.tail.weight, std=0.7)  # so that pixels differ
    bounds = SceneBounds("sphere", (0.0, 0.0, 0.0), 1.0, 2.0, 4.0)
    made.set_scene(bounds, torch.eye(3), torch.tensor([0.2, 0.4, 0.9]), accumulation, depth, focal=FOCAL)
    return made.eval()


def camera(width: int = 24, height: int = 17, zoom: float = 1.0, kind=CameraType.PERSPECTIVE, **fields) -> Cameras:
    """A camera at distance 3 that looks at the scene; at zoom 1 of the trained pitch."""
    where = {"cx": width / 2, "cy": height / 2, **fields}
    return Cameras(POSE[None], fx=FOCAL * zoom, fy=FOCAL * zoom, width=width, height=height, camera_type=kind, **where)


# Sizes, crops, zoom.


@pytest.mark.parametrize("factor", [4, 8, 12])
@pytest.mark.parametrize(("width", "height"), [(24, 16), (23, 17), (1, 1), (5, 31)])
def test_every_size_is_rendered_completely(width: int, height: int, factor: int) -> None:
    outputs = model(factor).get_outputs_for_camera(camera(width, height))
    assert list(outputs) == ["rgb", "accumulation", "depth"]
    for key, value in outputs.items():
        assert value.shape == (height, width, 3 if key == "rgb" else 1) and value.isfinite().all()


@pytest.mark.parametrize("factor", [4, 8])
def test_a_size_that_the_factor_does_not_divide_is_a_crop_of_one_that_it_does(factor: int) -> None:
    student = model(factor)
    whole = student.get_outputs_for_camera(camera(32, 24, cx=16.0, cy=12.0))
    part = student.get_outputs_for_camera(camera(19, 13, cx=16.0, cy=12.0))
    for key, value in part.items():
        torch.testing.assert_close(value, whole[key][:13, :19], atol=1e-5, rtol=1e-4)
    assert whole["rgb"].std() > 0.01


def test_border_pixels_equal_other_pixels() -> None:
    student = model(4)
    whole = student.get_outputs_for_camera(camera(32, 24, cx=16.0, cy=12.0))["rgb"]
    inner = student.get_outputs_for_camera(camera(12, 8, cx=16.0 - 8, cy=12.0 - 4))["rgb"]
    torch.testing.assert_close(inner, whole[4:12, 8:20], atol=1e-5, rtol=1e-4)


def test_accumulation_and_depth_exist_if_the_teacher_has_them() -> None:
    keys = {(True, False): ["rgb", "accumulation"], (False, False): ["rgb"]}
    for (accumulation, depth), expected in keys.items():
        outputs = model(accumulation=accumulation, depth=depth).get_outputs_for_camera(camera())
        assert list(outputs) == expected
    outputs = model().get_outputs_for_camera(camera())
    rgba = model().get_rgba_image(outputs)
    assert rgba.shape == (17, 24, 4) and torch.equal(rgba[..., 3:], outputs["accumulation"])
    origins, directions = image_rays(POSE, torch.tensor([FOCAL, FOCAL, 12, 8.5]), 17, 24)
    inside = (origins + outputs["depth"] * directions).norm(dim=-1)
    middle = -(origins * directions).sum(-1)
    reach = (origins + middle[..., None] * directions).norm(dim=-1).clamp_min(1.0)
    assert (inside <= reach + 1e-3).all()  # in the sphere, or as near as the ray comes


@pytest.mark.parametrize("zoom", [0.5, 0.8, 1.25, 2.0])
def test_other_zooms_are_rendered_at_the_trained_pitch(zoom: float) -> None:
    student = model(4)
    # The network, as a function of direction alone that is smooth: a camera's picture is then known at any zoom.
    student.encode_rays = lambda origins, directions: EncodedRays(directions)
    student.network = _Directions(4)
    student.ray_encoding.radius.fill_(100.0)  # no ray misses the scene
    width, height = 36, 28
    rgb = student.get_outputs_for_camera(camera(width, height, zoom))["rgb"]
    _, directions = image_rays(POSE, torch.tensor([FOCAL * zoom, FOCAL * zoom, 18, 14]), height, width)
    inner = slice(2, -2)  # resampling has no neighbors beyond the border
    torch.testing.assert_close(rgb[inner, inner], (0.5 + 0.4 * directions)[inner, inner], atol=0.004, rtol=0)


class _Directions(torch.nn.Module):
    """Rays of cells to colors of pixels, by interpolation: what a trained network comes down to in a smooth scene."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, encoded: Tensor) -> Tensor:
        up = torch.nn.functional.interpolate(encoded, scale_factor=self.factor, mode="bilinear")
        color = 0.5 + 0.4 * up / up.norm(dim=1, keepdim=True)
        return torch.cat([color, color[:, :2]], dim=1)


def test_very_wide_views_are_rendered_coarser() -> None:
    student = model(4)
    assert student.drawn_size(FOCAL, FOCAL, 37, 21) == (37, 21)
    assert student.drawn_size(2 * FOCAL, FOCAL, 37, 21) == (18, 21)
    width, height = student.drawn_size(0.01, 0.01, 100, 50)
    assert width * height <= 1.01 * MAX_CELLS * 16 and width == pytest.approx(2 * height, abs=1)


# Other lenses.


def of_direction(pose: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    return image_rays(pose, intrinsics, height, width)[1]


@pytest.mark.parametrize(
    "of",
    [
        camera(distortion_params=torch.tensor([[0.2, -0.05, 0.0, 0.0, 0.01, -0.02]])),
        camera(kind=CameraType.FISHEYE),
        camera(64, 64, zoom=0.5, kind=CameraType.FISHEYE),
        camera(40, 20, kind=CameraType.EQUIRECTANGULAR),
        camera(20, 20, kind=CameraType.VR180_L),
    ],
    ids=["distorted", "fisheye", "wide fisheye", "equirectangular", "vr180"],
)
def test_other_lenses_see_every_direction_where_it_is(of: Cameras) -> None:
    rays = of.generate_rays(camera_indices=0, keep_shape=True)
    expected = rays.directions
    picture = render_by_faces(CameraRays(of, torch.device("cpu")), 60.0, of_direction)
    assert picture.shape == expected.shape
    torch.testing.assert_close(torch.nn.functional.normalize(picture, dim=-1), expected, atol=2e-3, rtol=0)
    where = render_by_faces(CameraRays(of, torch.device("cpu")), 60.0, lambda pose, *_: pose[:, 3].expand(*_[1:], 3))
    torch.testing.assert_close(where, rays.origins)
    outputs = model().get_outputs_for_camera(of)
    assert outputs["rgb"].shape == expected.shape and outputs["depth"].isfinite().all()


def composited_model(**config) -> MobileR2LModel:
    """Random features on a shell around the origin."""
    sizes = {"num_samples": 6, "num_probes": 16, "occupancy_cells": 8, "pixel_samples": 4, "join_width": 8}
    made = model(ray_encoding="composited", join_blocks=1, **sizes, **config)
    fill_occupancy(made)
    fill(made)
    return made


def test_a_lens_of_the_trained_pitch_is_rendered_without_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    student = composited_model()
    monkeypatch.setattr(mobile_r2l, "render_by_faces", lambda *_: pytest.fail("it is resampled"))
    # Between the pixels of an image with its principal point in the middle, where resampling blurs most.
    where = {"width": 26, "height": 17, "cx": 13.4, "cy": 8.1}
    nearly_none = torch.tensor([[1e-6, 0.0, 0.0, 0.0, 0.0, 0.0]])
    lens = student.get_outputs_for_camera(camera(**where, distortion_params=nearly_none))
    pinhole = student.get_outputs_for_camera(camera(**where))
    assert pinhole["rgb"].std() > 0.02
    for key, value in pinhole.items():
        torch.testing.assert_close(lens[key], value, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "of",
    [
        camera(zoom=0.7, distortion_params=torch.tensor([[0.01, 0.0, 0.0, 0.0, 0.0, 0.0]])),
        camera(distortion_params=torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0, 0.0]])),
    ],
    ids=["of another pitch", "strongly distorted"],
)
def test_other_lenses_are_resampled_from_the_trained_pitch(of: Cameras, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = mock.Mock(side_effect=render_by_faces)
    monkeypatch.setattr(mobile_r2l, "render_by_faces", faces)
    assert composited_model().get_outputs_for_camera(of)["rgb"].isfinite().all()
    faces.assert_called_once()


@pytest.mark.parametrize("kind", [CameraType.OMNIDIRECTIONALSTEREO_R, CameraType.ORTHOPHOTO])
def test_rays_of_many_origins_are_refused(kind: CameraType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match="r2l student"):
        render_by_faces(CameraRays(camera(16, 16, kind=kind), torch.device("cpu")), 30.0, of_direction)
    with pytest.raises(SystemExit):
        model().get_outputs_for_camera(camera(16, 16, kind=kind))
    assert "Error: " in capsys.readouterr().out


def test_single_rays_are_rendered_as_images_of_one_pixel() -> None:
    student = model(4)
    of = camera(1, 1)
    bundle = of.generate_rays(camera_indices=0, keep_shape=True).flatten()
    assert POSE[1, 0] == POSE[1, 2] == 0  # an upright camera
    outputs = student(bundle)
    expected = student.get_outputs_for_camera(of)
    for key in ("rgb", "accumulation", "depth"):
        torch.testing.assert_close(outputs[key], expected[key][0], atol=1e-5, rtol=1e-4)
    straight_up = bundle.origins * 0, torch.tensor([[0.0, 1.0, 0.0]])
    assert student._answer_rays(*straight_up)["rgb"].isfinite().all()


# Factors.


@pytest.mark.parametrize(
    ("size", "factor"), [((400, 400), 4), ((100, 60), 4), ((800, 800), 8), ((1008, 756), 12), ((4000, 3000), 12)]
)
def test_the_upsampling_factor_fits_the_capture_unless_it_is_set(size: tuple[int, int], factor: int) -> None:
    config = MobileR2LModelConfig()
    config.fit_to(*size)
    assert config.upsampling_factor == factor
    config = MobileR2LModelConfig(upsampling_factor=6)
    config.fit_to(*size)
    assert config.upsampling_factor == 6
    with pytest.raises(InputError, match="--pipeline.model.upsampling-factor"):
        MobileR2LModelConfig(upsampling_factor=5).fit_to(*size)


@pytest.mark.parametrize(
    ("size", "factor", "block"), [((100, 100), 0, 2), ((400, 400), 0, 4), ((800, 800), 6, 2), ((40, 30), 0, 1)]
)
def test_blocks_of_pixels_divide_a_cell_and_are_at_most_two_cells_of_the_occupancy_wide(
    size: tuple[int, int], factor: int, block: int
) -> None:
    config = MobileR2LModelConfig(upsampling_factor=factor)
    config.fit_to(*size)
    assert config.placement_block == block
    with pytest.raises(InputError, match="--pipeline.model.placement-block 5 "):
        MobileR2LModelConfig(placement_block=5).fit_to(*size)


# Crops.


def views(count: int = 3, height: int = 20, width: int = 28) -> PhotoViews:
    """Views whose colors are their rays' directions, in 8 bits."""
    torch.manual_seed(0)
    poses = torch.cat([torch.linalg.qr(torch.randn(count, 3, 3)).Q, torch.randn(count, 3, 1)], dim=-1)
    intrinsics = torch.tensor([FOCAL, FOCAL, width / 2, height / 2]).expand(count, 4) + torch.rand(count, 4)
    pictures = [image_rays(p, i, height, width)[1] for p, i in zip(poses, intrinsics, strict=True)]
    color = ((0.5 + 0.5 * torch.stack(pictures)) * 255).round().to(torch.uint8)
    extra = torch.full_like(color[..., :2], 255)
    extra[..., 1] = 1
    return PhotoViews(torch.cat([color, extra], dim=-1), torch.ones(color.shape[:3]).half(), poses, intrinsics)


@pytest.mark.parametrize("factor", [4, 6])
def test_pixels_of_crops_match_their_rays(factor: int) -> None:
    batch = sample_crops(views(), 40, 3, factor)
    side = 3 * factor
    assert batch.target.rgb.shape == (40, side, side, 3) and batch.ray_bundle.origins.shape == (40, 5, 5, 3)
    torch.testing.assert_close(batch.target.rgb, 0.5 + 0.5 * batch.target.directions, atol=0.003, rtol=0)
    torch.testing.assert_close(batch.target.origins[:, 0, 0], batch.ray_bundle.origins[:, 0, 0])
    assert len(batch.target.rgb.flatten(1).unique(dim=0)) > 30  # places and views differ


@pytest.mark.parametrize("factor", [4, 6])
def test_a_cells_ray_is_the_middle_of_its_pixels(factor: int) -> None:
    source = views(1)
    batch = sample_crops(source, 5, 3, factor)
    rotation = source.camera_to_worlds[0, :, :3]

    def tangents(directions: Tensor) -> Tensor:
        local = directions @ rotation
        return local[..., :2] / -local[..., 2:]

    blocks = tangents(batch.target.directions).unfold(1, factor, factor).unfold(2, factor, factor).mean((-1, -2))
    cells = tangents(batch.ray_bundle.directions)
    torch.testing.assert_close(cells[:, 1:-1, 1:-1], blocks, atol=1e-5, rtol=1e-4)
    step = cells[:, 1:, 1:] - cells[:, :-1, :-1]  # the margin continues the grid
    torch.testing.assert_close(step, step[:, :1, :1].expand_as(step), atol=1e-5, rtol=1e-4)


def test_a_crop_equals_that_part_of_the_full_image() -> None:
    student, source = model(4), views(1, 16, 16)
    fx, _, cx, cy = source.intrinsics[0].tolist()
    student.focal.fill_(fx)
    intrinsics = torch.tensor([fx, fx, cx, cy])
    source.intrinsics[0] = intrinsics
    outputs = student(sample_crops(source, 1, 4, 4).ray_bundle)
    whole = student.render_pinhole(source.camera_to_worlds[0], intrinsics, 16, 16)
    torch.testing.assert_close(outputs["rgb"][0], whole[..., :3], atol=1e-5, rtol=1e-4)


def test_a_share_of_the_crops_comes_from_the_foreground() -> None:
    source = views(4, 48, 48)
    seen = torch.zeros(48, 48, dtype=torch.bool)
    seen[10:26, 20:36] = True  # an eighth of the places where a crop's middle may be
    source.pixels[..., 3] = 255 * seen
    for share, least, most in ((0.0, 0.1, 0.3), (1.0, 0.7, 1.0)):
        batch = sample_crops(source, 400, 3, 4, torch.Generator().manual_seed(0), share)
        middles = batch.target.accumulation[:, 6, 6, 0] > 0
        assert len(middles) == 400 and least < middles.float().mean() < most
        torch.testing.assert_close(batch.target.rgb, 0.5 + 0.5 * batch.target.directions, atol=0.003, rtol=0)


def test_photos_supervise_no_geometry_and_mix_with_teacher_views() -> None:
    known, unknown = views(), views()
    known.has_geometry = True
    both = joined(sample_crops(known, 2, 3, 4), sample_crops(unknown, 3, 3, 4))
    assert both.ray_bundle.origins.shape == (5, 5, 5, 3) and both.target.rgb.shape == (5, 12, 12, 3)
    assert both.target.geometry_weight.flatten(1).mean(1).tolist() == [1, 1, 0, 0, 0]
    bundle, batch = both.as_nerfstudio()
    losses = model().get_loss_dict(model()(bundle), batch)
    assert set(losses) == {"rgb_loss", "accumulation_loss", "depth_loss"}
    assert all(math.isfinite(float(loss)) for loss in losses.values())


def test_pixels_without_weight_have_no_gradient() -> None:
    source = views()
    batch = sample_crops(source, 4, 3, 4)
    student = model()
    outputs = student(batch.ray_bundle)
    loss = student.get_loss_dict(outputs, batch.as_nerfstudio()[1])["rgb_loss"]
    batch.target.weight[:, :6] = 0
    batch.target.rgb[:, :6] = 7.0
    other = student.get_loss_dict(outputs, batch.as_nerfstudio()[1])["rgb_loss"]
    expected = (outputs["rgb"] - batch.target.rgb)[:, 6:].square().mean()
    torch.testing.assert_close(other, expected)
    assert not torch.isclose(loss, other)


def test_pixels_learned_alone_are_those_of_a_crop_whose_cells_say_nothing() -> None:
    student = composited_model(placement_block=1, jitter_points=False).train()
    student.begin_with_single_rays()
    source = views(4, 24, 24)
    crops = sample_crops(source, 3, 2, 4, torch.Generator().manual_seed(2), rays_per_cell=4)
    rays = RayBundle(
        origins=crops.target.origins.reshape(-1, 3),
        directions=crops.target.directions.reshape(-1, 3),
        pixel_area=torch.ones(3 * 8 * 8, 1),
    )
    together, alone = student(crops.ray_bundle), student(rays)
    assert together["rgb"].std() > 0.02
    for name, value in together.items():
        torch.testing.assert_close(alone[name], value.reshape(-1, value.shape[-1]), atol=1e-4, rtol=1e-3)
    # What they teach: the features, and the layers that read those of a pixel.
    alone["rgb"].square().sum().backward()
    learned = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert learned == {
        "composited.volume.rows",
        *(f"network.{layer}.{kind}" for layer in ("join", "tail") for kind in ("weight", "bias")),
        *(f"network.join_blocks.0.{layer}.{kind}" for layer in ("first", "second") for kind in ("weight", "bias")),
    }
    assert not student.network.join.weight.grad[:, : -student.network.joined].any()
