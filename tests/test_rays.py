"""Rays against Nerfstudio's own and against closed forms."""

import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.field_components.spatial_distortions import SceneContraction

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.rays.contraction import contract
from r2l_nerfstudio.rays.encoding import encoded_dim, frequency_encode, frequency_encode_into
from r2l_nerfstudio.rays.pinhole import image_rays, pinhole_rays, pixel_centers
from r2l_nerfstudio.rays.ray_encoding import RayEncoding
from r2l_nerfstudio.rays.spacing import SceneBounds, cross_sphere, stratified


def some_pose() -> torch.Tensor:
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))
    rotation = rotation * torch.linalg.det(rotation).sign()
    return torch.cat([rotation, torch.tensor([[0.3], [-1.2], [2.0]])], dim=-1)


def some_rays(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    return 2 * torch.randn(count, 3, generator=generator), directions


def test_pinhole_rays_equal_nerfstudios() -> None:
    pose = some_pose()
    camera = Cameras(pose[None], fx=31.0, fy=33.0, cx=12.5, cy=9.0, width=26, height=17)
    bundle = camera.generate_rays(camera_indices=0, keep_shape=True)
    intrinsics = torch.tensor([31.0, 33.0, 12.5, 9.0])
    for origins, directions in (
        image_rays(pose, intrinsics, 17, 26),
        pinhole_rays(pose.expand(17, 26, 3, 4), intrinsics.expand(17, 26, 4), pixel_centers(17, 26)),
    ):
        torch.testing.assert_close(origins, bundle.origins)
        torch.testing.assert_close(directions, bundle.directions, atol=1e-6, rtol=1e-5)


def test_encoding_is_the_published_one() -> None:
    values = torch.tensor([[0.25, -0.5]])
    encoded = frequency_encode(values, 3)
    expected = [0.25, -0.5]
    expected += [math.sin(f * v) for f in (1, 2, 4) for v in (0.25, -0.5)]
    expected += [math.cos(f * v) for f in (1, 2, 4) for v in (0.25, -0.5)]
    torch.testing.assert_close(encoded, torch.tensor([expected]))
    assert RayEncoding("points", 16, 10).dim == 1008  # R2L
    assert RayEncoding("points", 8, 6).dim == 312  # MobileR2L
    assert encoded_dim(5, 0) == 5


@pytest.mark.parametrize("octaves", [0, 1, 6, 10, 13])
def test_encoding_without_gradients_is_the_same(octaves: int) -> None:
    values = torch.rand(200, 24, generator=torch.Generator().manual_seed(1)) * 4 - 2
    encoding = torch.full((200, 24 * (2 * octaves + 1) + 5), 7.0)
    frequency_encode_into(values, octaves, encoding[:, :-5])
    error = encoding[:, :-5].double() - frequency_encode(values.double().float(), octaves).double()
    assert float(error.abs().max()) < 2e-4 and float(error.square().mean()) < 1e-11  # 110 dB
    assert (encoding[:, -5:] == 7).all(), "written beyond its own columns"
    exact = torch.cat([(2.0**k * values.double()).sin() for k in range(octaves)] or [values.double()[:, :0]], dim=-1)
    error = encoding[:, 24 : 24 * (octaves + 1)].double() - exact
    assert octaves == 0 or float(error.square().mean()) < 1e-11


def test_gradients_go_through_an_encoding() -> None:
    encoding = RayEncoding("points", 4, 3)
    origins, directions = some_rays()
    origins.requires_grad_()
    encoding(origins, directions).square().sum().backward()
    assert origins.grad.abs().max() > 0


def test_encoding_stays_in_fp32_under_autocast() -> None:
    encoding = RayEncoding("points", 4, 10)
    origins, directions = some_rays()
    expected = encoding(origins, directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoding(origins, directions), expected)


def test_contraction_equals_nerfstudios() -> None:
    points = 5 * torch.randn(100, 3)
    torch.testing.assert_close(contract(points), SceneContraction(order=None)(points))


def test_sphere_interval() -> None:
    center, radius = torch.tensor([0.0, 0.0, -5.0]), torch.tensor(2.0)
    ahead = torch.tensor([[0.0, 0.0, -1.0]])
    enter, leave, _ = cross_sphere(torch.zeros(1, 3), ahead, center, radius)
    assert (float(enter), float(leave)) == pytest.approx((3.0, 7.0))
    enter, leave, _ = cross_sphere(torch.tensor([[1.0, 0.0, 0.0]]), ahead, center, radius)
    assert float(leave - enter) == pytest.approx(2 * 3**0.5)
    enter, leave, _ = cross_sphere(torch.tensor([[9.0, 0.0, 0.0]]), ahead, center, radius)
    assert float((enter + leave) / 2) == pytest.approx(5.0)  # a miss: around the closest approach


def test_stratified_points() -> None:
    fixed = stratified(5, (2,), False, torch.device("cpu"))
    torch.testing.assert_close(fixed[0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    drawn = stratified(5, (4000,), True, torch.device("cpu"))
    edges = torch.tensor([0.0, 0.125, 0.375, 0.625, 0.875, 1.0])
    assert (drawn >= edges[:-1]).all() and (drawn <= edges[1:]).all()
    torch.testing.assert_close(drawn.mean(0), (edges[1:] + edges[:-1]) / 2, atol=0.01, rtol=0)
    assert drawn[:, 2].std() > 0.05  # every ray has its own draw


@pytest.mark.parametrize("kind", ["sphere", "near-far", "disparity"])
def test_distance_and_fraction_are_inverse(kind) -> None:
    encoding = RayEncoding()
    encoding.set_bounds(SceneBounds(kind, (0.1, 0.2, -0.3), 1.5, 0.2, 6.0), torch.eye(3))
    origins, directions = some_rays()
    fractions = torch.linspace(0.02, 0.98, 7).expand(64, 7)
    distances = encoding.to_distance(origins, directions, fractions)
    assert (distances.diff(dim=-1) > 0).all()
    torch.testing.assert_close(encoding.to_fraction(origins, directions, distances), fractions, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["points", "plucker"])
def test_sliding_a_camera_along_its_ray_changes_nothing_in_a_bounded_scene(kind) -> None:
    encoding = RayEncoding(kind, 8, 4)
    encoding.set_bounds(SceneBounds("sphere", (0.0, 0.1, 0.0), 1.2, 0.5, 5.0), torch.eye(3))
    origins, directions = some_rays()
    moved = encoding.values(origins + 1.7 * directions, directions)
    torch.testing.assert_close(encoding.values(origins, directions), moved, atol=2e-5, rtol=1e-4)


def test_two_plane_encoding_lies_on_its_planes() -> None:
    encoding = RayEncoding("two-plane", num_frequencies=0)
    encoding.set_bounds(SceneBounds("near-far", (0.0, 0.0, 0.0), 2.0, 0.5, 5.0), torch.eye(3))
    values = encoding(torch.tensor([[0.0, 0.0, 6.0]]), torch.tensor([[0.6, 0.0, -0.8]]))
    # In units of the radius the ray starts at z = 3 with slope x/z = -0.75: x = 3 at z = -1, 1.5 at z = 1.
    torch.testing.assert_close(values, torch.tensor([[3.0, 0.0, 1.5, 0.0]]))
    along = encoding(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    assert along.isfinite().all()


@pytest.mark.parametrize("kind", ["near-far", "disparity"])
def test_unbounded_encodings_stay_in_the_contracted_ball(kind) -> None:
    encoding = RayEncoding("points", 8, 0)
    encoding.set_bounds(SceneBounds(kind, (0.0, 0.0, 0.0), 0.5, 0.05, 1e4), torch.eye(3))
    points = encoding(*some_rays()).view(64, 8, 3)
    assert points.norm(dim=-1).max() <= 2.0


def test_bounds_are_in_the_checkpoint(tmp_path) -> None:
    encoding = RayEncoding("points", 4, 2)
    encoding.set_bounds(SceneBounds("disparity", (1.0, 2.0, 3.0), 4.0, 0.5, 60.0), torch.eye(3))
    torch.save(encoding.state_dict(), tmp_path / "encoding.ckpt")
    other = RayEncoding("points", 4, 2)
    other.load_state_dict(torch.load(tmp_path / "encoding.ckpt", weights_only=True), strict=True)
    assert other.spacing == "disparity"
    assert torch.equal(other(*some_rays()), encoding(*some_rays()))


def test_unknown_ray_encoding_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(InputError, match="points, plucker, two-plane"):
        RayEncoding("pluecker")


def test_rays_that_miss_a_bounded_scene() -> None:
    encoding = RayEncoding()
    encoding.set_bounds(SceneBounds("sphere", (1.0, 0.0, 0.0), 0.5, 1.0, 4.0), torch.eye(3))
    forward = torch.tensor([0.0, 0.0, -1.0])
    origins = torch.tensor([[1.0, 0, 3], [1.49, 0, 3], [1.51, 0, 3], [1.0, 0, -3], [1.0, 0, 0.2], [1.0, 0, -0.2]])
    missed = encoding.misses_scene(origins, forward.expand(6, 3))
    assert missed[:, 0].tolist() == [False, False, True, True, False, False]
    encoding.set_bounds(SceneBounds("disparity", (1.0, 0.0, 0.0), 0.5, 1.0, 4.0), torch.eye(3))
    assert not encoding.misses_scene(origins, forward.expand(6, 3)).any()
