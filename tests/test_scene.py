"""The procedural scene against closed forms, and its capture through Nerfstudio's own dataparser."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from benchmarks import hard_scenes
from benchmarks.hard_scenes import HardScenes
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.scene import (
    Scene,
    band_poses,
    camera_in_dataparser_frame,
    camera_in_world_frame,
    pinhole_rays,
    write_capture,
)
from r2l_nerfstudio.scene.capture import ELEVATION, RADIUS, _look_at_origin, band_cameras
from r2l_nerfstudio.scene.procedural import Thing
from r2l_nerfstudio.scene.shapes import Box, Cylinder, Sphere
from r2l_nerfstudio.scene.textures import checker, solid

SHAPES = {
    "sphere": Sphere((0.1, -0.2, 0.3), 0.5),
    "box": Box((0.1, -0.2, 0.3), (0.2, 0.3, 0.4), turn=35.0),
    "cylinder": Cylinder((0.1, -0.2, 0.3), 0.4, 0.25),
}


def random_rays(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    origins = 3 * torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    targets = 0.8 * torch.randn(count, 3, generator=generator)
    return origins, torch.nn.functional.normalize(targets - origins, dim=-1)


def inside(shape: Sphere | Box | Cylinder, points: torch.Tensor) -> torch.Tensor:
    """Membership, written from the solids' definitions and not from their intersection code."""
    x, y, z = (points - torch.tensor(shape.center)).unbind(-1)
    if isinstance(shape, Sphere):
        return x**2 + y**2 + z**2 <= shape.radius**2
    if isinstance(shape, Cylinder):
        return (x**2 + y**2 <= shape.radius**2) & (z.abs() <= shape.half_height)
    turn = math.radians(-shape.turn)
    u, v = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
    return (u.abs() <= shape.half_size[0]) & (v.abs() <= shape.half_size[1]) & (z.abs() <= shape.half_size[2])


def test_sphere_hit_in_closed_form():
    sphere = Sphere((0.0, 0.0, 0.0), 0.5)
    offset = 0.3
    distance, normal = sphere.intersect(torch.tensor([[offset, 0.0, 4.0]]), torch.tensor([[0.0, 0.0, -1.0]]))
    assert distance.item() == pytest.approx(4 - math.sqrt(0.25 - offset**2), abs=1e-5)
    torch.testing.assert_close(normal[0], torch.tensor([0.6, 0.0, 0.8]))
    missed, _ = sphere.intersect(torch.tensor([[0.51, 0.0, 4.0]]), torch.tensor([[0.0, 0.0, -1.0]]))
    behind, _ = sphere.intersect(torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert missed.item() == math.inf and behind.item() == math.inf


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_hit_is_where_a_march_along_the_ray_enters(shape):
    origins, directions = random_rays(800)
    distance, normal = shape.intersect(origins, directions)
    steps = torch.arange(0, 6, 0.004)
    member = inside(shape, origins[:, None] + steps[:, None] * directions[:, None])
    marched = torch.where(member.any(1), steps[member.float().argmax(1)], torch.inf)
    hit = marched.isfinite()
    assert 60 < hit.sum() < 700
    assert (marched[hit] - distance[hit]).abs().max() < 0.0045
    # A march may step over a corner that the ray only grazes.
    assert (distance.isfinite() & ~hit).sum() <= 4
    torch.testing.assert_close(normal[hit].norm(dim=-1), torch.ones(int(hit.sum())))
    surface = origins[hit] + distance[hit, None] * directions[hit]
    assert not inside(shape, surface + 1e-3 * normal[hit]).any()
    assert inside(shape, surface - 1e-3 * normal[hit]).float().mean() > 0.99
    assert ((normal[hit] * directions[hit]).sum(-1) < 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_ray_from_inside_hits_the_far_wall(shape):
    _, directions = random_rays(100)
    distance, normal = shape.intersect(torch.tensor(shape.center).expand(100, 3), directions)
    back, _ = shape.intersect(torch.tensor(shape.center) + 5 * directions, -directions)
    torch.testing.assert_close(distance, 5 - back, atol=1e-5, rtol=0)
    assert ((normal * directions).sum(-1) > 0).all()


def test_axis_parallel_rays_give_no_nan():
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    picture = Scene().trace(-2 * axes, axes)
    assert picture.rgb.isfinite().all() and not picture.depth.isnan().any()
    assert picture.accumulation.all()


def test_mask_area_of_a_sphere_seen_from_afar():
    scene = Scene(things=(Thing(Sphere((0.0, 0.0, 0.0), 0.5), solid((0.5, 0.5, 0.5))),))
    size = 64
    picture = scene.render(band_cameras(band_poses(1, seed=3), size)[0], supersample=4)
    # A ball at distance D is a disc of angular radius asin(r / D).
    radius = 1.4 * size * math.tan(math.asin(0.5 / RADIUS))
    assert picture.accumulation.sum().item() == pytest.approx(math.pi * radius**2, rel=0.01)
    corner = picture.rgb[0, 0]
    torch.testing.assert_close(corner, torch.ones(3))
    center = picture.depth[size // 2, size // 2].item()
    assert center == pytest.approx(RADIUS - 0.5, abs=1e-3)
    assert picture.depth[0, 0].item() == math.inf


def test_render_is_the_mean_of_the_finer_render():
    scene = Scene()
    poses = band_poses(1, seed=5)
    coarse = scene.render(band_cameras(poses, 16)[0], supersample=2)
    fine = scene.render(band_cameras(poses, 32)[0], supersample=1)
    pooled = fine.rgb.reshape(16, 2, 16, 2, 3).mean((1, 3))
    torch.testing.assert_close(coarse.rgb, pooled, atol=1e-5, rtol=0)
    assert ((coarse.accumulation > 0) & (coarse.accumulation < 1)).any()


def test_only_the_glossy_object_depends_on_the_direction():
    scene = Scene()

    def seen_from(point: torch.Tensor, eyes: torch.Tensor) -> torch.Tensor:
        directions = torch.nn.functional.normalize(point - eyes, dim=-1)
        picture = scene.trace(eyes, directions)
        torch.testing.assert_close(picture.depth[:, 0], (point - eyes).norm(dim=-1), atol=1e-4, rtol=0)
        return picture.rgb

    table = torch.tensor([0.60, -0.05, -0.36])
    ball = torch.tensor([0.16, 0.30, 0.02]) + 0.38 * torch.nn.functional.normalize(torch.tensor(scene.lamp), dim=0)
    eyes = torch.tensor([[1.2, -0.5, 2.5], [0.8, 0.0, 3.0], [0.9, 0.5, 2.8]])
    assert seen_from(table, eyes).std(0).max() < 1e-4
    assert seen_from(ball, eyes).std(0).max() > 0.05


def test_shadow_darkens_the_table():
    scene = Scene(things=(Scene().things[0], Thing(Sphere((0.0, 0.0, 0.2), 0.2), solid((1.0, 0.0, 0.0)))))
    lone = Scene(things=scene.things[:1])
    lamp = torch.nn.functional.normalize(torch.tensor(scene.lamp), dim=0)
    below = torch.tensor([0.0, 0.0, 0.2]) - lamp * (0.56 / lamp[2])
    eye = torch.tensor([[below[0] - 0.9, below[1] + 0.9, 1.0]])
    direction = torch.nn.functional.normalize(below - eye, dim=-1)
    assert (scene.trace(eye, direction).rgb < 0.85 * lone.trace(eye, direction).rgb).all()


def test_checker_alternates():
    color = checker((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), cell=0.5, sharpness=20.0)
    squares = color(torch.tensor([[0.25, 0.25, 0.0], [0.75, 0.25, 0.0], [0.75, 0.75, 0.0], [-0.25, 0.25, 0.0]]))
    torch.testing.assert_close(squares[:, 0], torch.tensor([1.0, 0.0, 1.0, 0.0]), atol=1e-4, rtol=0)


def test_rays_are_nerfstudios_and_a_known_point_lands_on_its_pixel():
    camera = Cameras(band_poses(1, seed=1), fx=40.0, fy=44.0, cx=15.0, cy=11.0, width=32, height=24)
    origins, directions = pinhole_rays(camera[0])
    theirs = camera.generate_rays(camera_indices=0)
    torch.testing.assert_close(origins, theirs.origins)
    torch.testing.assert_close(directions, theirs.directions, atol=1e-6, rtol=0)

    point = torch.tensor([0.2, -0.3, 0.1])
    pose = camera.camera_to_worlds[0]
    x, y, z = pose[:, :3].T @ (point - pose[:, 3])
    assert z < 0  # OpenGL: in front is negative
    column, row = 15.0 + 40.0 * x / -z, 11.0 - 44.0 * y / -z
    ray = directions[int(row), int(column)]
    towards = torch.nn.functional.normalize(point - pose[:, 3], dim=0)
    assert torch.linalg.cross(ray, towards).norm() < 0.75 / 40  # within that pixel


def test_ball_appears_where_its_center_projects():
    center = torch.tensor([0.3, 0.1, 0.2])
    scene = Scene(things=(Thing(Sphere(tuple(center.tolist()), 0.15), solid((0.0, 0.0, 0.0))),))
    for camera in band_cameras(band_poses(3, seed=4), 64):
        pose = camera.camera_to_worlds
        x, y, z = pose[:, :3].T @ (center - pose[:, 3])
        mask = scene.render(camera).accumulation[..., 0]
        rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
        assert ((mask * columns).sum() / mask.sum()).item() == pytest.approx((32 - 89.6 * x / z).item(), abs=0.3)
        assert ((mask * rows).sum() / mask.sum()).item() == pytest.approx((32 + 89.6 * y / z).item(), abs=0.3)


@pytest.mark.parametrize("spiral", [True, False])
def test_band_cameras_look_inward_from_the_band(spiral):
    poses = band_poses(50, seed=2, spiral=spiral)
    rotation, center = poses[..., :3], poses[..., 3]
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, torch.eye(3).expand(50, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50))
    torch.testing.assert_close(center, RADIUS * rotation[..., 2], atol=1e-5, rtol=0)
    elevation = torch.rad2deg(torch.asin(center[:, 2] / RADIUS))
    assert elevation.min() >= ELEVATION[0] - 1e-3 and elevation.max() <= ELEVATION[1] + 1e-3
    assert (rotation[:, 2, 1] > 0).all()  # up is up
    assert torch.equal(poses, band_poses(50, seed=2, spiral=spiral))


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_capture(tmp_path_factory.mktemp("scene") / "capture", num_train=5, num_test=2, size=24, seed=7)


@pytest.mark.parametrize(
    "options",
    [{}, {"orientation_method": "none", "center_method": "none", "auto_scale_poses": False, "scale_factor": 0.3}],
    ids=["defaults", "fixed"],
)
def test_capture_through_nerfstudios_dataparser(capture, options):
    parser = NerfstudioDataParserConfig(data=capture, **options).setup()
    train, test = parser.get_dataparser_outputs("train"), parser.get_dataparser_outputs("test")
    assert len(train.image_filenames) == 5 and len(test.image_filenames) == 2
    assert [path.name for path in parser.get_dataparser_outputs("val").image_filenames] == [
        "test_000.png",
        "test_001.png",
    ]

    world = camera_in_world_frame(train.cameras, train)
    torch.testing.assert_close(world.camera_to_worlds, band_poses(5, seed=7, spiral=True), atol=2e-5, rtol=0)
    back = camera_in_dataparser_frame(world, train)
    torch.testing.assert_close(back.camera_to_worlds, train.cameras.camera_to_worlds, atol=2e-5, rtol=0)

    # The photo is the truth at the pose that the dataparser gives.
    for outputs in (train, test):
        truth = Scene().render(camera_in_world_frame(outputs.cameras, outputs)[1]).rgb
        photo = torch.from_numpy(np.array(Image.open(outputs.image_filenames[1]))) / 255
        assert ((photo - truth) ** 2).mean() < 1e-4


def test_depth_scales_with_the_frame(capture):
    outputs = NerfstudioDataParserConfig(data=capture).setup().get_dataparser_outputs("train")
    origins, directions = pinhole_rays(outputs.cameras[0])
    world = camera_in_world_frame(outputs.cameras, outputs)[0]
    depth = Scene().render(world, supersample=1).depth
    covered = depth[..., 0].isfinite()
    points = origins[covered] + depth[covered] * outputs.dataparser_scale * directions[covered]
    transform = outputs.dataparser_transform
    world_origins, world_directions = pinhole_rays(world)
    expected = world_origins[covered] + depth[covered] * world_directions[covered]
    expected = outputs.dataparser_scale * (expected @ transform[:3, :3].T + transform[:3, 3])
    torch.testing.assert_close(points, expected, atol=1e-4, rtol=0)


def test_capture_is_written_once_and_an_incomplete_one_again(tmp_path):
    folder = tmp_path / "capture"
    settings = {"num_train": 2, "num_test": 1, "size": 8}
    counts = []
    write_capture(folder, **settings, on_picture=lambda done, total: counts.append((done, total)))
    assert counts == [(1, 3), (2, 3), (3, 3)]
    image = folder / "images" / "train_000.png"
    good = image.read_bytes()

    write_capture(folder, **settings, on_picture=lambda done, total: pytest.fail("a complete capture was rewritten"))

    (folder / "transforms.json").unlink()
    image.write_bytes(b"cut short")
    write_capture(folder, **settings)
    assert image.read_bytes() == good and (folder / "transforms.json").exists()

    image.unlink()
    write_capture(folder, **settings)
    assert image.read_bytes() == good


def test_interrupted_capture_is_incomplete(tmp_path):
    folder = tmp_path / "capture"

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_capture(folder, num_train=2, num_test=1, size=8, on_picture=interrupt)
    assert not (folder / "transforms.json").exists()


def test_foreign_folders_are_not_touched(tmp_path):
    settings = {"num_train": 2, "num_test": 1, "size": 8}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "transforms.json").write_text(json.dumps({"frames": []}))
    with pytest.raises(InputError, match="foreign"):
        write_capture(foreign, **settings)
    with pytest.raises(InputError, match="foreign"):
        write_capture(foreign, **settings, overwrite=True)
    assert json.loads((foreign / "transforms.json").read_text()) == {"frames": []}

    strange = tmp_path / "strange"
    (strange / "images").mkdir(parents=True)
    (strange / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="thesis.tex"):
        write_capture(strange, **settings, overwrite=True)

    folder = write_capture(tmp_path / "capture", **settings)
    with pytest.raises(InputError, match="--force"):
        write_capture(folder, num_train=3, num_test=1, size=8)
    write_capture(folder, num_train=3, num_test=1, size=8, overwrite=True)
    assert len(list((folder / "images").glob("*.png"))) == 4


def test_hard_scenes(tmp_path: Path) -> None:
    fence = hard_scenes.wires()
    eye = torch.tensor([[0.0, 3.0, 0.9]])
    camera = band_cameras(_look_at_origin(eye), 60)[0]
    above = fence.render(camera).accumulation[:20]  # rods alone
    assert (above > 0).sum() > 5 and (above < 1).all()
    # A ray onto the middle of the mirroring ball comes back to the red box, straight ahead of it.
    scene = hard_scenes.mirrors()
    ball, box = scene.things[1].shape, scene.things[4].shape
    assert isinstance(ball, Sphere) and isinstance(box, Box)
    towards = torch.nn.functional.normalize(torch.tensor(box.center) - torch.tensor(ball.center), dim=0)
    start = torch.tensor(ball.center) + (ball.radius + 0.05) * towards
    red, green, blue = scene.trace(start[None], -towards[None]).rgb[0]
    assert red > 2 * green and red > 2 * blue
    HardScenes(tmp_path, size=16, num_train=2, num_test=1).main()
    HardScenes(tmp_path, size=16, num_train=2, num_test=1).main()  # once more: nothing to do
    with pytest.raises(InputError, match="other settings"):
        write_capture(tmp_path / "wires", num_train=2, num_test=1, size=16)
