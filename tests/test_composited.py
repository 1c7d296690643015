"""The composited ray encoding: the same values on CPU, on GPU and in graphs, and an occupancy that hides nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from student_runs import tiny_composited_mobile_r2l, tiny_composited_r2l, write_run
from torch import Tensor

from r2l_nerfstudio import load_student
from r2l_nerfstudio.distillation import scene_occupancy
from r2l_nerfstudio.distillation.averaging import WeightAverage
from r2l_nerfstudio.distillation.optimization import move_state
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, look_along
from r2l_nerfstudio.distillation.scene_occupancy import SceneOccupancy
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.export.onnx_file import export_onnx
from r2l_nerfstudio.models.composited_encoding import (
    CompositedEncoding,
    CompositedSettings,
    RaySpan,
    encode_single_rays,
)
from r2l_nerfstudio.rays.occupancy import OccupancyGrid, grid_point_index
from r2l_nerfstudio.rays.pinhole import image_rays
from r2l_nerfstudio.rays.placement import place_samples
from r2l_nerfstudio.rays.ray_encoding import RayEncoding
from r2l_nerfstudio.rays.ray_image import CellPixels
from r2l_nerfstudio.rays.spacing import SceneBounds

KINDS = [("sphere", "ball"), ("disparity", "contracted"), ("disparity", "frustum"), ("near-far", "contracted")]


def encoding(spacing: str, warp: str) -> CompositedEncoding:
    """A shell around the center, or a wall before a forward-facing camera, with random features."""
    torch.manual_seed(0)
    encoding = RayEncoding("points", 8, 4)
    encoding.set_bounds(SceneBounds(spacing, (0.1, 0.2, 0.3), 1.3, 0.3, 6.0), torch.eye(3))
    made = CompositedEncoding(encoding, CompositedSettings())
    points = 0.7 * torch.nn.functional.normalize(torch.randn(4000, 3), dim=-1)
    if warp == "frustum":
        points[:, 2] = -0.8
    scene = made.occupancy.scene
    scene.fit(warp, points, torch.tensor([0.0, 0.0, 3.5]), torch.eye(3))
    made.occupancy.clear(scene.resolution(scene.cell_of(24)))
    made.occupancy.mark((made.occupancy.counts(points) > 0).to(torch.uint8))
    made.lay_out(scene.resolution(scene.cell_of(40)))
    rows = made.volume.rows.data
    rows[1:] = torch.randn_like(rows[1:])
    rows[1:, 0] += 1.0
    return made


def rays(number: int = 1500) -> tuple[Tensor, Tensor]:
    """From around a camera on the z axis; some of them miss everything."""
    generator = torch.Generator().manual_seed(1)
    origins = torch.tensor([0.1, 0.2, 4.3]) + 0.3 * torch.randn(number, 3, generator=generator)
    directions = torch.tensor([0.0, 0.0, -1.0]) + 0.25 * torch.randn(number, 3, generator=generator)
    return origins, torch.nn.functional.normalize(directions, dim=-1)


def span_of(made: CompositedEncoding, origins: torch.Tensor, directions: torch.Tensor, group: int = 1) -> RaySpan:
    """Rays in groups: of more than one, each with its own small turn of the group's first ray."""
    origins, directions = origins[:, None], directions[:, None]
    turns = 0.01 * torch.randn(len(origins), group, 3, generator=torch.Generator().manual_seed(1))
    turns[:, 0] = 0.0
    directions = torch.nn.functional.normalize(directions + turns, dim=-1)
    return made.span(origins, directions)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("spacing", "warp"), KINDS)
def test_cpu_kernels_equal_torch(spacing: str, warp: str, group: int) -> None:
    made = encoding(spacing, warp)
    span = span_of(made, *rays(), group)
    found, is_empty = made.composited(span)
    reference, reference_empty = made.in_torch(span, False, made.settings.samples)
    assert torch.equal(is_empty, reference_empty)
    if warp != "contracted":  # there something is always in sight
        assert 0.05 < is_empty.float().mean() < 0.95
    assert float(reference.accumulation.mean()) > (0.01 if warp == "frustum" else 0.1)
    for ours, theirs in zip(found, reference, strict=True):
        # At the edge of a cell the last digit decides; all other rays agree to rounding.
        assert float((ours - theirs).abs().mean()) < 1e-5
        assert float(((ours - theirs).abs().amax(-1) > 1e-4).float().mean()) < 0.01


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("spacing", "warp"), KINDS)
def test_gradients_of_the_cpu_kernels_equal_torchs(spacing: str, warp: str, group: int) -> None:
    made = encoding(spacing, warp)
    weights = torch.randn(
        group * len(rays()[0]), made.settings.channels + 5, generator=torch.Generator().manual_seed(2)
    )
    gradients = []
    for compute in (made.composited, lambda span: made.in_torch(span, False, 24)):
        made.volume.rows.grad = None
        (torch.cat(compute(span_of(made, *rays(), group))[0], dim=-1) * weights).sum().backward()
        gradients.append(made.volume.rows.grad.clone())
    ours, theirs = gradients
    assert theirs.abs().sum() > 0 and not ours[0].any() and not theirs[0].any()
    assert float((ours - theirs).abs().sum() / theirs.abs().sum()) < 1e-3


def test_sample_points_lie_in_occupied_cells_only() -> None:
    made = encoding("sphere", "ball")
    span = span_of(made, *rays())
    placed = place_samples(
        made.occupancy,
        span.lead_start,
        span.lead_step,
        made.middles(),
        24,
        torch.tensor([40.0, 40.0, 40.0]),
        jitter=True,
    )
    met = ~placed.is_empty
    points = made.occupancy.scene(
        span.lead_start[met, None] + placed.fractions[met, :, None] * span.lead_step[met, None]
    )
    # Bins are as wide as cells: a point may lie just beyond the cell at its bin's middle.
    assert float(made.occupancy(points).mean()) > 0.9
    assert bool((placed.fractions[met].diff(dim=-1) >= -1e-6).all())
    again = place_samples(made.occupancy, span.lead_start, span.lead_step, made.middles(), 24, torch.ones(3))
    twice = place_samples(made.occupancy, span.lead_start, span.lead_step, made.middles(), 24, torch.ones(3))
    assert torch.equal(again.fractions, twice.fractions)


def test_rays_from_inside_the_scene_and_non_finite_poses() -> None:
    made = encoding("sphere", "ball")
    origins, directions = rays(64)
    found, is_empty = made.composited(span_of(made, torch.zeros_like(origins), directions))
    assert not is_empty.all() and all(part.isfinite().all() for part in found)
    origins[:8] = torch.nan
    found, _ = made.composited(span_of(made, origins, directions))
    assert all(part[8:].isfinite().all() for part in found)


class Ring:
    """As `SceneOccupancy` reads a ring of teacher views."""

    device = torch.device("cpu")

    def __init__(self, poses: Tensor, accumulation: Tensor, depth: Tensor, focal: float) -> None:
        self.camera_to_worlds = poses
        views, self.height, self.width = accumulation.shape
        self.intrinsics = torch.tensor([focal, focal, self.width / 2, self.height / 2]).repeat(views, 1)
        self.pixels = torch.zeros(views, self.height, self.width, 5, dtype=torch.uint8)
        self.pixels[..., 3] = (255 * accumulation).round().to(torch.uint8)
        self.pixels[..., 4] = 1
        self.depth = depth.half()
        self.views_put = self.capacity = views

    def __len__(self) -> int:
        return len(self.pixels)


def ring_of(sees: list[Tensor], has_depth: bool = True, views: int = 16, side: int = 40) -> tuple[Ring, CaptureCameras]:
    """Views from a ring of distance 4 of points, each of a share of one pixel."""
    angles = torch.arange(views) * (2 * torch.pi / views)
    poses = []
    for angle in angles:
        position = torch.stack([4 * angle.cos(), 4 * angle.sin(), torch.tensor(0.8)])
        axes = look_along(-position, torch.tensor([0.0, 0.0, 1.0]))
        poses.append(torch.cat([axes, position[:, None]], dim=-1))
    camera_to_worlds = torch.stack(poses)
    focal = 1.5 * side
    accumulation, depth = torch.zeros(views, side, side), torch.zeros(views, side, side)
    for points, share in sees:
        for view, pose in enumerate(camera_to_worlds):
            points = points[(points - pose[:, 3]).norm(dim=-1).argsort(descending=True)]  # the nearest is drawn last
            local = (points - pose[:, 3]) @ pose[:, :3]
            column = (local[:, 0] / -local[:, 2] * focal + side / 2).long().clamp(0, side - 1)
            row = (side / 2 - local[:, 1] / -local[:, 2] * focal).long().clamp(0, side - 1)
            accumulation[view, row, column] = share
            # Where little is seen, the median depth of a NeRF is that of the background.
            depth[view, row, column] = (points - pose[:, 3]).norm(dim=-1) if share > 0.5 else 50.0
    if not has_depth:
        depth.zero_()
    ring = Ring(camera_to_worlds, accumulation, depth, focal)
    return ring, CaptureCameras(camera_to_worlds, ring.intrinsics, side, side)


def in_unit_ball(**settings: int) -> CompositedEncoding:
    encoding = RayEncoding("points", 8, 4)
    encoding.set_bounds(SceneBounds("sphere", (0.0, 0.0, 0.0), 1.0, 2.5, 5.5), torch.eye(3))
    return CompositedEncoding(encoding, CompositedSettings(**settings))


def has_empty_ray(made: CompositedEncoding, ring: Ring) -> bool:
    """Whether a ray on which a view shows something has no occupied cell."""
    for view in range(len(ring)):
        origins, directions = image_rays(ring.camera_to_worlds[view], ring.intrinsics[view], ring.height, ring.width)
        seen = ring.pixels[view, ..., 3] > 128
        _, is_empty = made.composited(span_of(made, origins[seen], directions[seen]))
        if is_empty.any():
            return True
    return False


def occupied_by(ring: Ring, cameras: CaptureCameras, has_depth: bool = True) -> CompositedEncoding:
    made = in_unit_ball()
    SceneOccupancy(made, 32, 50_000, has_depth).start(ring, cameras)
    return made


BALL = 0.4 * torch.nn.functional.normalize(torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
WIRE = torch.stack([torch.full((400,), 0.6), torch.full((400,), 0.1), torch.linspace(-0.5, 0.5, 400)], dim=-1)
PLANE = torch.cartesian_prod(torch.linspace(-0.7, 0.7, 200), torch.linspace(-0.7, 0.7, 200))
PLANE = torch.cat([PLANE, torch.full((len(PLANE), 1), -0.5)], dim=-1)


@pytest.mark.parametrize(("thing", "share"), [(WIRE, 0.3), (PLANE, 1.0)], ids=["a wire", "a plane seen edge-on"])
def test_thin_things_are_never_lost(thing: Tensor, share: float) -> None:
    made = occupied_by(*ring_of([(BALL, 1.0), (thing, share)]))
    inside = thing[thing.norm(dim=-1) < 0.95]
    assert float(made.occupancy(made.occupancy.scene(inside)).mean()) > 0.99
    assert made.occupancy.share() < 0.6


@pytest.mark.parametrize("has_depth", [True, False])
def test_occupancy_holds_a_ball_and_little_else(has_depth: bool) -> None:
    made = occupied_by(*ring_of([(BALL, 1.0)], has_depth, side=80), has_depth)
    # Of its underside no view shows anything.
    assert float(made.occupancy(made.occupancy.scene(BALL)).mean()) > 0.9
    corner = torch.tensor([[0.95, 0.95, 0.2], [-0.95, 0.9, 0.5]])
    assert has_depth or float(made.occupancy(made.occupancy.scene(corner)).sum()) == 0


def test_an_empty_teacher_leaves_no_cell_out() -> None:
    made = occupied_by(*ring_of([]))
    assert made.occupancy.share() == 1.0 and len(made.volume.rows) > 1000


def test_wrong_depth_does_not_lose_anything_visible() -> None:
    ring, cameras = ring_of([(BALL, 1.0)])
    generator = torch.Generator().manual_seed(3)
    holes = torch.rand(ring.depth.shape, generator=generator) < 0.3
    ring.depth[holes] = 0.0  # holes
    floaters = torch.rand(ring.depth.shape, generator=generator) < 0.02
    ring.depth[floaters] *= 0.6
    made = occupied_by(ring, cameras)
    assert not has_empty_ray(made, ring)


def test_a_fog_of_stray_depths_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unbounded scene, where something is behind everything: each of its cells costs features."""
    ring, cameras = ring_of([(BALL, 1.0)], side=80)
    ring.pixels[..., 3] = 255
    stray = torch.rand(ring.depth.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    walls = torch.where(ring.depth > 0, ring.depth, 8.0)
    ring.depth = torch.where(stray, walls * torch.rand(walls.shape, generator=torch.Generator().manual_seed(4)), walls)
    shares = []
    for least in (0.0, 1 / 20_000):
        monkeypatch.setattr(scene_occupancy, "LEAST_SHARE", least)
        encoding = RayEncoding("points", 8, 4)
        encoding.set_bounds(SceneBounds("disparity", (0.0, 0.0, 0.0), 4.0, 0.5, 20.0), torch.eye(3))
        made = CompositedEncoding(encoding, CompositedSettings())
        SceneOccupancy(made, 32, 50_000, True).start(ring, cameras)
        shares.append(made.occupancy.share())
        assert float(made.occupancy(made.occupancy.scene(BALL / 4.0)).mean()) > 0.9
    assert shares[1] < 0.8 * shares[0]


def test_new_views_add_cells_and_rows_keep_their_features() -> None:
    few, cameras = ring_of([(BALL, 1.0)])
    made = in_unit_ball()
    scene = SceneOccupancy(made, 32, 50_000, True)
    scene.start(few, cameras)
    made.occupancy.cells[:, :, : made.occupancy.cells.shape[2] // 2] = 0  # as if half had been out of sight
    made.lay_out(made.volume.cells)
    made.volume.rows.data.normal_()
    rows, index = made.volume.rows.detach().clone(), made.volume.index.clone()
    average, optimizer = WeightAverage(made, 0.5), torch.optim.Adam([made.volume.rows], lr=0.1)
    made.volume.rows.grad = torch.ones_like(made.volume.rows)
    optimizer.step()
    rows = made.volume.rows.detach().clone()
    assert scene.grow(few) is None  # nothing is new
    few.views_put += len(few)
    convert = scene.grow(few)
    assert convert is not None and made.volume.num_grid_points > int(index.max())
    assert len(made.volume.rows) == len(rows)  # it had room
    move_state(optimizer, made.volume.rows, convert)
    average.restart(made.volume.rows)
    held = index > 0
    assert torch.equal(made.volume.rows[made.volume.index[held].long()], rows[index[held].long()])
    momentum = optimizer.state[made.volume.rows]["exp_avg"]
    is_kept = torch.zeros(len(rows), dtype=torch.bool)
    is_kept[made.volume.index[held].long()] = True
    assert torch.equal(momentum != 0, is_kept[:, None].expand_as(momentum))
    made.volume.rows.grad = torch.ones_like(made.volume.rows)
    optimizer.step()
    average.update()


def test_without_room_for_new_cells_all_cells_become_larger() -> None:
    ring, cameras = ring_of([(BALL, 1.0)])
    made = in_unit_ball()
    scene = SceneOccupancy(made, 32, 1500, True)
    scene.start(ring, cameras)
    fitting, half = made.volume.cells, made.occupancy.cells.clone()
    half[:, :, : half.shape[2] // 2] = 0
    made.occupancy.cells = half
    x, y, z = (round(1.2 * size) for size in fitting)
    made.lay_out((x, y, z))
    assert made.volume.num_grid_points < 1500
    made.volume.rows.data[1:, 1:] = 3.0
    ring.views_put += len(ring)
    assert scene.grow(ring) is not None
    assert made.volume.cells < (x, y, z)
    assert made.volume.num_grid_points <= 1500
    rows = made.volume.rows[1 : made.volume.num_grid_points + 1].detach()
    is_new = rows[:, 1:].abs().amax(-1) < 1.0
    assert 0.2 < float(is_new.float().mean()) < 0.8
    assert float(rows[is_new, 0].min()) > -1.0  # transparent, but not empty: it can learn
    assert not has_empty_ray(made, ring)


def dense_at(made: CompositedEncoding, things: list[Tensor], radius: float) -> None:
    """A volume as if it had learned that only these points are there, with features that are linear in space."""
    z, y, x = (torch.arange(n) / (n - 1) for n in made.volume.index.shape)
    at = torch.stack(torch.meshgrid(z, y, x, indexing="ij"), dim=-1).flip(-1)
    held = made.volume.index > 0
    at = at[held]
    scene = made.occupancy.scene
    near = torch.cdist(at * scene.extent + scene.low, torch.cat(things)[::5]).amin(-1) < radius
    made.volume.rows.data[1:] = 0.0
    made.volume.rows.data[made.volume.index[held].long()] = torch.cat(
        [torch.where(near, 6.0, -8.0)[:, None], at, at[:, :1]], -1
    )


def test_pruned_cells_make_room_for_smaller_cells() -> None:
    ring, cameras = ring_of([(BALL, 1.0), (WIRE, 1.0)], side=80)
    stray = 0.6 * torch.rand(ring.depth.shape, generator=torch.Generator().manual_seed(1)) - 0.3
    stray[torch.rand(ring.depth.shape, generator=torch.Generator().manual_seed(2)) < 0.8] = 0.0
    ring.depth += stray * (ring.depth > 0)
    made = in_unit_ball(samples=64)
    scene = SceneOccupancy(made, 32, 8000, True)
    scene.start(ring, cameras)
    dense_at(made, [BALL, WIRE], 0.08)
    before = made.occupancy.cells
    optimizer = torch.optim.Adam([made.volume.rows], lr=1e-6)
    made.volume.rows.grad = torch.ones_like(made.volume.rows)
    optimizer.step()
    rays = image_rays(ring.camera_to_worlds[0], ring.intrinsics[0], ring.height, ring.width)
    rays = rays[0].reshape(-1, 3), rays[1].reshape(-1, 3)
    seen = encode_single_rays(made, *rays)
    shape, cells = made.volume.rows.shape, made.volume.cells

    move_state(optimizer, made.volume.rows, scene.prune(ring))
    assert made.prunings == 1 and made.volume.rows.shape == shape
    assert float(made.occupancy.cells.sum()) < 0.7 * float(before.sum())
    assert not bool((made.occupancy.cells > before).any())
    assert all(now > then for now, then in zip(made.volume.cells, cells, strict=True))
    assert 4000 < made.volume.num_grid_points <= 8000
    # What rays meet is the same, and smaller cells are not more transparent.
    again = encode_single_rays(made, *rays)
    assert seen.geometry is not None and again.geometry is not None
    solid = (seen.geometry[:, 0] > 0.95) & (again.geometry[:, 0] > 0.95)
    assert int(solid.sum()) > 0.8 * int((seen.geometry[:, 0] > 0.95).sum()) > 100
    difference = (seen.encoded[solid, :3] - again.encoded[solid, :3]).detach().abs()
    assert float(difference.mean()) < 0.02
    momentum = optimizer.state[made.volume.rows]["exp_avg"][1 : made.volume.num_grid_points + 1]
    assert torch.allclose(momentum, momentum[:1], rtol=0.5) and bool((momentum > 0).all())

    # New views of the same do not bring the cells back, neither now nor in a resumed training.
    kept = made.occupancy.cells
    ring.views_put += len(ring)
    scene.grow(ring)
    assert not bool((made.occupancy.cells & before & (1 - kept)).any())
    other = in_unit_ball(samples=64)
    resumed = SceneOccupancy(other, 32, 8000, True)
    resumed.start(ring, cameras)
    other.load_state_dict(made.state_dict())
    resumed.resume(ring)
    assert other.prunings == 1 and torch.equal(other.occupancy.cells, made.occupancy.cells)
    ring.views_put += len(ring)
    resumed.grow(ring)
    assert not bool((other.occupancy.cells & before & (1 - kept)).any())


def test_pruning_leaves_no_ray_without_a_cell() -> None:
    ring, cameras = ring_of([(BALL, 1.0), (WIRE, 1.0)])
    made = in_unit_ball()
    scene = SceneOccupancy(made, 32, 50_000, True)
    scene.start(ring, cameras)
    dense_at(made, [BALL], 0.08)
    scene.prune(ring)
    assert not has_empty_ray(made, ring)


def test_grids_of_other_resolutions_have_a_point_wherever_a_cell_is() -> None:
    cells = (torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.2).to(torch.uint8)
    for resolution in ((7, 6, 5), (14, 13, 9), (4, 4, 4)):
        index = grid_point_index(cells, resolution)
        assert tuple(index.shape) == tuple(size + 1 for size in reversed(resolution))
        assert sorted(index[index > 0].tolist()) == list(range(1, int(index.max()) + 1))
        middles = torch.cartesian_prod(*[(torch.arange(n) + 0.5) / n for n in cells.shape])[cells.flatten() > 0]
        low = (middles * torch.tensor(list(reversed(resolution)))).long()
        assert bool((index[low[:, 0], low[:, 1], low[:, 2]] > 0).all())
    grid = OccupancyGrid()
    grid.cells = cells
    other = OccupancyGrid()
    other.load_state_dict(grid.state_dict())
    assert torch.equal(other.cells, cells)


@pytest.mark.parametrize("config", [tiny_composited_r2l(), tiny_composited_mobile_r2l()], ids=["r2l", "mobile-r2l"])
@pytest.mark.parametrize("spacing", ["sphere", "disparity"])
def test_students_load_and_render_all_sizes(config, spacing: str, tmp_path: Path) -> None:  # noqa: ANN001
    student = load_student(write_run(tmp_path / "run", config, spacing), device="cpu", engine="torch")
    pose = torch.cat([torch.eye(3), torch.tensor([[0.1], [0.0], [2.5]])], dim=-1)
    for width, height in ((1, 1), (37, 21), (64, 48)):
        found = student.render_all(pose, torch.tensor([50.0, 50.0, width / 2, height / 2]), width, height)
        assert all(value.shape[:2] == (height, width) and value.isfinite().all() for value in found.values())
    assert found["rgb"].std() > 0.01 and 0 < float(found["accumulation"].mean())
    again = copy.deepcopy(student.model.composited)
    assert torch.equal(again.volume.index, student.model.composited.volume.index)


def test_empty_rays_are_background_and_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = load_student(write_run(tmp_path / "run", tiny_composited_r2l()), device="cpu", engine="torch")
    evaluated = []
    run = student.model.run_network
    monkeypatch.setattr(student.model, "run_network", lambda encoded: evaluated.append(len(encoded)) or run(encoded))
    pose = torch.cat([torch.eye(3), torch.tensor([[0.1], [-0.1], [3.0]])], dim=-1)
    found = student.render_all(pose, torch.tensor([50.0, 50.0, 32.0, 32.0]), 64, 64)
    empty = found["accumulation"][..., 0] == 0
    assert sum(evaluated) <= int((~empty).sum()) + 64 < 64 * 64
    torch.testing.assert_close(found["rgb"][empty], student.model.background.expand(int(empty.sum()), 3))


def test_pixels_of_cells_and_back() -> None:
    image, pixels = torch.randn(2, 8, 12, 3), CellPixels(4)
    by_cell = pixels.by_cell(image)
    assert torch.equal(by_cell[0, 1, 2, 5], image[0, 4 + 1, 8 + 1])
    assert torch.equal(pixels.to_image(by_cell), image)


OLD_RUNS = Path(__file__).parent / "data" / "before_composited"


@pytest.mark.parametrize("name", ["r2l-lite", "mobile-r2l-lite"])
def test_students_trained_before_still_load_render_and_export(name: str, tmp_path: Path) -> None:
    """Runs and images written by the version before the composited encoding, with random weights."""
    student = load_student(OLD_RUNS / name, device="cpu", engine="torch")
    assert student.model.composited is None
    pose = np.concatenate([np.eye(3), [[0.1], [0.0], [2.5]]], axis=1).astype(np.float32)
    found = student.render_all(pose, [50.0, 50.0, 16.0, 12.0], 32, 24)
    with np.load(OLD_RUNS / name / "picture.npz") as kept:
        assert set(kept) == set(found) and kept["rgb"].std() > 0.01
        for output, value in kept.items():
            np.testing.assert_allclose(found[output], value, atol=2e-3)
    assert export_onnx(student, GraphSpec("camera", "fp32", 27, 18), tmp_path / "student.onnx") > 100


def test_int8_features_are_the_same_in_graphs_and_in_the_quality_check() -> None:
    made = encoding("sphere", "ball")
    span = span_of(made, *rays())
    graph = made.for_graph(torch.int8)
    assert graph.volume.rows.dtype == torch.int8
    before = made.volume.rows.detach().clone()
    with torch.no_grad(), made.in_int8():
        ours, _ = made.composited(span)
    theirs, _ = graph.composited(span)
    assert torch.equal(made.volume.rows, before)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).detach().abs().mean()) < 1e-5
    full, _ = made.composited(span)
    apart = (full.features - theirs.features).detach().abs()
    assert 0 < float(apart.mean()) < 0.05, "int8 is near fp32, and not the same"
