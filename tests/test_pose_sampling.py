"""Sampled cameras stay near the capture."""

import math

import pytest
import torch

from r2l_nerfstudio.distillation.pose_sampling import (
    CaptureCameras,
    PoseSampler,
    PoseSamplerConfig,
    choose_sampler,
    look_along,
)
from r2l_nerfstudio.errors import InputError

UP = torch.tensor([0.0, 0.0, 1.0])


def capture(positions: torch.Tensor, axes: torch.Tensor) -> CaptureCameras:
    poses = torch.stack([torch.cat([look_along(a, UP), p[:, None]], -1) for p, a in zip(positions, axes, strict=True)])
    return CaptureCameras(poses, torch.tensor([50.0, 50.0, 32.0, 24.0]).expand(len(poses), 4), 64, 48)


def object_capture(count: int = 60, sector: float = 2 * math.pi) -> CaptureCameras:
    generator = torch.Generator().manual_seed(1)
    azimuth = torch.rand(count, generator=generator) * sector
    elevation = 0.2 + 0.8 * torch.rand(count, generator=generator)
    flat = elevation.cos()
    offset = torch.stack([azimuth.cos() * flat, azimuth.sin() * flat, elevation.sin()], -1)
    center = torch.tensor([0.5, -0.2, 0.1])
    return capture(center + 3 * offset, -offset)


def forward_capture(count: int = 20) -> CaptureCameras:
    generator = torch.Generator().manual_seed(2)
    positions = torch.randn(count, 3, generator=generator) * torch.tensor([0.5, 0.02, 0.3])
    axes = torch.tensor([0.0, 1.0, 0.0]) + 0.05 * torch.randn(count, 3, generator=generator)
    return capture(positions, axes)


def walk_capture(count: int = 40) -> CaptureCameras:
    """A walk through a room, looking about."""
    angle = torch.linspace(0, 2 * math.pi, count)
    positions = torch.stack([torch.linspace(0, 4, count), 0.3 * angle.sin(), 0.1 * angle.cos()], -1)
    return capture(positions, torch.stack([angle.cos(), angle.sin(), torch.zeros(count)], -1))


@pytest.mark.parametrize(
    ("cameras", "expected"),
    [(object_capture(), "sphere"), (object_capture(sector=1.5), "neighbour"), (forward_capture(), "box")]
    + [(walk_capture(), "neighbour")],
)
def test_the_layout_chooses_the_sampler(cameras, expected) -> None:
    assert choose_sampler(cameras) == expected
    assert PoseSampler(cameras).kind == expected


def test_focus_is_where_the_axes_meet() -> None:
    torch.testing.assert_close(object_capture().focus, torch.tensor([0.5, -0.2, 0.1]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["neighbour", "sphere", "box"])
@pytest.mark.parametrize(
    "cameras", [object_capture(), forward_capture(), walk_capture()], ids=["object", "front", "walk"]
)
def test_every_sampler_returns_valid_cameras(kind, cameras) -> None:
    sampler = PoseSampler(cameras, PoseSamplerConfig(kind=kind))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        pose, intrinsics = sampler.sample(generator)
        rotation = pose[:, :3]
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-5, rtol=0)
        assert torch.linalg.det(rotation) > 0
        assert 0.95 * 50 <= intrinsics[0] <= 1.25 * 50 and intrinsics[0] == intrinsics[1]
        assert torch.equal(intrinsics[2:], torch.tensor([32.0, 24.0]))


def test_neighbour_stays_near_the_training_cameras() -> None:
    cameras = walk_capture()
    sampler = PoseSampler(cameras, PoseSamplerConfig(kind="neighbour"))
    generator = torch.Generator().manual_seed(0)
    step = cameras.neighbour_distances.min(-1).values.max()
    for _ in range(100):
        pose, _ = sampler.sample(generator)
        distances = (cameras.positions - pose[:, 3]).norm(dim=-1)
        assert distances.min() < 3 * step
        nearest = distances.topk(4, largest=False).indices
        assert (cameras.axes[nearest] @ -pose[:, 2]).max() > math.cos(0.6)


def test_sphere_stays_in_the_band_and_looks_at_the_object() -> None:
    cameras = object_capture()
    sampler = PoseSampler(cameras)
    generator = torch.Generator().manual_seed(0)
    elevations, azimuths = [], []
    for _ in range(200):
        pose, _ = sampler.sample(generator)
        offset = pose[:, 3] - cameras.focus
        elevations.append(math.asin(offset[2] / offset.norm()))
        azimuths.append(math.atan2(offset[1], offset[0]))
        assert offset.norm() == pytest.approx(3.0, abs=0.05)
        assert -pose[:, 2] @ (-offset / offset.norm()) > math.cos(0.2)
    assert min(elevations) > 0.15 and max(elevations) < 1.05
    assert len({int((a + math.pi) / (math.pi / 4)) for a in azimuths}) == 8  # all around


def test_box_is_the_training_box_enlarged() -> None:
    cameras = forward_capture()
    sampler = PoseSampler(cameras)
    generator = torch.Generator().manual_seed(0)
    frame = cameras.mean_axes
    local = cameras.positions @ frame
    low, high = local.min(0).values, local.max(0).values
    drawn = torch.stack([sampler.sample(generator)[0][:, 3] for _ in range(200)]) @ frame
    slack = 0.0501 * (high - low)
    assert (drawn >= low - slack).all() and (drawn <= high + slack).all()
    assert (drawn.max(0).values - drawn.min(0).values > 0.9 * (high - low)).all()


def test_the_same_generator_state_gives_the_same_camera() -> None:
    sampler = PoseSampler(object_capture())
    first, second = (sampler.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_single_training_camera_is_enough() -> None:
    cameras = object_capture(1)
    pose, _ = PoseSampler(cameras).sample(torch.Generator().manual_seed(0))
    assert torch.equal(pose, cameras.camera_to_worlds[0])


def test_unknown_sampler_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(InputError, match="auto, neighbour, sphere, box"):
        PoseSamplerConfig(kind="spiral")


@pytest.mark.parametrize(("kind", "moved"), [("neighbour", True), ("box", True), ("sphere", False)])
def test_overscan_extends_the_field_of_view(kind: str, moved: bool) -> None:
    cameras = object_capture()
    sampler = PoseSampler(cameras, PoseSamplerConfig(kind=kind, overscan=0.5))
    generator = torch.Generator().manual_seed(0)
    middles = torch.stack([sampler.sample(generator)[1][2:] for _ in range(400)]) - cameras.intrinsics[0, 2:]
    size = torch.tensor([cameras.width, cameras.height])
    assert (middles.abs() <= 0.5 * size).all()
    reached = (middles.abs().amax(0) > 0.4 * size).all()
    assert bool(reached) == moved
    assert (middles.abs() < 0.17 * size).float().mean() > 0.5  # more often near the middle


def test_zoomed_views_lie_between_the_others() -> None:
    cameras = object_capture()
    for share, expected in ((0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (0.0, [])):
        sampler = PoseSampler(cameras, PoseSamplerConfig(zoomed_share=share))
        assert [index for index in range(8) if sampler.is_zoomed(index)] == expected
    config = PoseSamplerConfig("neighbour", focal_range=(1.0, 1.0), overscan=0.5, zoomed_focal_range=(1.1, 1.2))
    sampler = PoseSampler(cameras, config)
    generator = torch.Generator().manual_seed(0)
    for is_zoomed in (False, True):
        intrinsics = torch.stack([sampler.sample(generator, is_zoomed)[1] for _ in range(50)])
        ratio = intrinsics[:, 0] / cameras.intrinsics[0, 0]
        assert ratio.min() >= (1.1 if is_zoomed else 0.9999) and ratio.max() <= (1.2 if is_zoomed else 1.0001)
        assert torch.equal(intrinsics[:, 2:], cameras.intrinsics[:1, 2:].expand(50, 2)) == is_zoomed
