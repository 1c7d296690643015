"""The ring of teacher views: correct rays and colors, and failures."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from scene_teacher import SceneTeacher, scene_cameras

from r2l_nerfstudio.distillation import view_ring
from r2l_nerfstudio.distillation.crops import sample_crops
from r2l_nerfstudio.distillation.foreground import TRIES
from r2l_nerfstudio.distillation.hard_rays import HardRayPool
from r2l_nerfstudio.distillation.pose_sampling import PoseSampler, PoseSamplerConfig, capture_cameras
from r2l_nerfstudio.distillation.ray_sample import RECORD_WIDTH, RaySample
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import ViewRenderer, ViewRing
from r2l_nerfstudio.errors import InputError


def renderer(teacher: SceneTeacher | None = None, cache_dir=None, seed: int = 0) -> ViewRenderer:
    teacher = teacher or SceneTeacher()
    cameras = scene_cameras()
    survey = Survey.take(teacher, cameras)
    sampler = PoseSampler(capture_cameras(cameras))
    return ViewRenderer(teacher, sampler, survey, 24, 24, seed, cache_dir)


def test_rays_have_the_teachers_colors() -> None:
    ring = ViewRing(renderer(), 3, "cpu")
    ring.fill()
    sample = ring.sample(500)
    truth = SceneTeacher().scene.trace(sample.origins, sample.directions)
    assert (sample.rgb - truth.rgb).abs().max() <= 0.5 / 255 + 1e-6
    torch.testing.assert_close(sample.accumulation, truth.accumulation)
    hit = truth.accumulation[:, 0] > 0
    torch.testing.assert_close(sample.depth[hit], truth.depth[hit], atol=2e-3, rtol=1e-3)
    assert hit.any() and not hit.all()
    assert (sample.weight == 1).all()


def test_a_share_of_the_rays_comes_from_the_foreground() -> None:
    ring = ViewRing(renderer(), 3, "cpu")
    ring.fill()
    seen = (ring.pixels[..., 3] > 0).float().mean()
    assert 0.1 < seen < 0.9
    for share in (0.0, 0.5, 1.0):
        sample = ring.sample(20000, torch.Generator().manual_seed(0), share)
        assert len(sample.rgb) == 20000
        truth = SceneTeacher().scene.trace(sample.origins, sample.directions)
        torch.testing.assert_close(sample.accumulation, truth.accumulation)
        missed = 1 - (1 - (1 - seen) ** TRIES) * share - seen * (1 - share)
        assert (sample.accumulation == 0).float().mean() == pytest.approx(float(missed), abs=0.015)
    # Where nothing is seen at all, and where everything is, rays are still drawn anywhere.
    for accumulation in (0, 255):
        ring.pixels[..., 3] = accumulation
        centers = ring.sample(200_000, None, 1.0).directions.mean(0)
        torch.testing.assert_close(centers, ring.sample(200_000).directions.mean(0), atol=0.01, rtol=0)


def test_refresh_replaces_the_oldest_view_with_a_new_one() -> None:
    ring = ViewRing(renderer(), 2, "cpu")
    ring.fill()
    before = ring.camera_to_worlds.clone()
    ring.refresh()
    assert len(ring) == 2
    assert not torch.equal(ring.camera_to_worlds[0], before[0]) and torch.equal(ring.camera_to_worlds[1], before[1])


def test_crops_come_from_views_that_are_not_zoomed() -> None:
    made = renderer()
    made.sampler = PoseSampler(made.sampler.cameras, PoseSamplerConfig(focal_range=(1.0, 1.0), zoomed_share=0.5))
    ring = ViewRing(made, 5, "cpu")
    ring.refresh()
    focal = float(ring.intrinsics[0, 0])
    for _ in range(12):
        ring.refresh()
        crops = sample_crops(ring, 60, 1, 4)
        assert ring.crop_views is not None
        assert ring.crop_views.tolist() == [slot for slot in range(len(ring)) if ring.intrinsics[slot, 0] == focal]
        drawn = {tuple(origin) for origin in crops.target.origins[:, 0, 0].tolist()}
        assert drawn == {tuple(ring.camera_to_worlds[slot, :, 3].tolist()) for slot in ring.crop_views}
    single = ViewRing(made, 1, "cpu")
    for _ in range(2):
        single.refresh()
        sample_crops(single, 4, 1, 4)


def test_numbered_views_are_repeatable_and_seeds_differ() -> None:
    first, again, other = renderer().render(4), renderer().render(4), renderer(seed=1).render(4)
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.camera_to_world, again.camera_to_world)
    assert not torch.equal(first.camera_to_world, other.camera_to_world)


def test_non_finite_colors_are_dropped_and_counted(capsys) -> None:
    ring = ViewRing(renderer(SceneTeacher(broken=(3, 5))), 2, "cpu")
    ring.fill()
    sample = ring.sample(20000)
    assert sample.rgb.isfinite().all()
    dropped = sample.weight[:, 0] == 0
    assert 0 < dropped.float().mean() < 0.01
    assert ring.renderer.invalid_pixels == 2
    assert "dropped 1 pixels" in capsys.readouterr().out


def test_a_cache_is_resumed_and_its_broken_files_rendered_again(tmp_path) -> None:
    ViewRing(renderer(cache_dir=tmp_path), 3, "cpu").fill()
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:100])
    teacher = SceneTeacher()
    second = renderer(teacher, cache_dir=tmp_path)
    asked = teacher.views_rendered
    ring = ViewRing(second, 3, "cpu")
    ring.fill()
    assert teacher.views_rendered - asked == 2  # the broken one: a thumbnail and the view
    fresh = renderer()
    for index in range(3):
        assert torch.equal(ring.pixels[index], fresh.render(index).pixels)


def test_the_ring_shrinks_if_memory_is_short_with_a_message(monkeypatch, capsys) -> None:
    monkeypatch.setattr(view_ring, "free_memory", lambda device: 24 * 24 * view_ring.BYTES_PER_PIXEL * 5)
    ring = ViewRing(renderer(), 100, "cpu")
    assert ring.capacity == 4
    assert "4 of 100 teacher views" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(view_ring, "free_memory", lambda device: 10)
    with pytest.raises(InputError, match="view-downscale"):
        ViewRing(renderer(), 100, "cpu")


def test_the_ring_leaves_room_for_training(monkeypatch) -> None:
    view = 24 * 24 * view_ring.BYTES_PER_PIXEL
    monkeypatch.setattr(view_ring, "free_memory", lambda device: view * 15)
    assert ViewRing(renderer(), 100, "cpu", room_bytes=view * 10).capacity == 4
    with pytest.raises(InputError, match="beside training"):
        ViewRing(renderer(), 100, "cpu", room_bytes=view * 14)


def test_free_memory_of_a_cpu_is_the_systems() -> None:
    assert 0 < view_ring.free_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_empty_views_are_refused() -> None:
    made = renderer()
    away = made.sampler.cameras.camera_to_worlds.clone()
    away[:, :, 0] *= -1
    away[:, :, 2] *= -1  # everyone turns around
    turned = PoseSampler(type(made.sampler.cameras)(away, made.sampler.cameras.intrinsics, 24, 24))
    object.__setattr__(turned.config, "kind", "neighbour")
    made.sampler = turned
    with pytest.raises(InputError, match="pose-sampler.kind"):
        made.render(0)


def test_a_teacher_with_only_color_is_enough() -> None:
    teacher = SceneTeacher(geometry=False)
    ring = ViewRing(renderer(teacher), 2, "cpu")
    ring.fill()
    assert not ring.renderer.survey.has_depth and (ring.sample(10).depth == 0).all()


def test_bounds_of_a_bounded_capture_are_its_sphere() -> None:
    cameras = scene_cameras(32, 40)
    bounds = Survey.take(SceneTeacher(), cameras).bounds(capture_cameras(cameras))
    assert bounds.kind == "sphere"
    assert max(abs(c) for c in bounds.center) < 0.02
    assert 0.8 < bounds.radius < 1.2  # the scene lies in the unit sphere
    assert 1.8 < bounds.near < 2.6 < bounds.far < 4.2
    other = Survey.take(SceneTeacher(), cameras).bounds(capture_cameras(cameras), "disparity")
    assert other.kind == "disparity"


def test_a_teacher_without_a_finite_color_is_an_error() -> None:
    teacher = SceneTeacher()
    teacher.broken = (slice(None), slice(None))
    with pytest.raises(InputError, match="no finite color"):
        Survey.take(teacher, scene_cameras())


def test_hard_rays_are_the_worst_and_the_newest() -> None:
    pool = HardRayPool(per_step=2, batches=2, width=1, device="cpu")
    assert len(pool.draw(3)) == 0
    for base in (0.0, 10.0, 20.0):
        pool.add(base + torch.arange(5.0)[:, None], errors=torch.tensor([5.0, 1.0, 4.0, 0.0, 2.0]))
    assert len(pool) == 4
    assert set(pool.draw(200)[:, 0].tolist()) == {10.0, 12.0, 20.0, 22.0}


def test_records_keep_every_field() -> None:
    ring = ViewRing(renderer(), 1, "cpu")
    ring.fill()
    sample = ring.sample(7)
    records = sample.records()
    assert records.shape == (7, RECORD_WIDTH)
    assert torch.equal(RaySample.from_records(records).depth, sample.depth)
    assert torch.equal(RaySample.from_records(records).geometry_weight, sample.geometry_weight)


# The cache.


def stored(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as content:
        return dict(content)


def with_field(name: str, change):
    def edit(file: Path) -> None:
        content = stored(file)
        content[name] = change(content[name])
        # Its hash is that of the changed numbers: whoever changed them can do that too.
        content["sha256"] = np.array(view_ring._digest({k: v for k, v in content.items() if k != "sha256"}))
        np.savez_compressed(file, **content)

    return edit


def flip_a_pixel(file: Path) -> None:
    content = stored(file)
    content["pixels"][3, 3, 0] ^= 1
    np.savez_compressed(file, **content)


@pytest.mark.parametrize(
    "damage",
    [
        with_field("camera_to_world", lambda pose: pose * np.nan),
        with_field("camera_to_world", lambda pose: pose.astype(np.float64)),
        with_field("intrinsics", lambda intrinsics: -intrinsics),
        with_field("intrinsics", lambda intrinsics: intrinsics[:2]),
        with_field("depth", lambda depth: depth[:3]),
        with_field("depth", lambda depth: depth * np.inf),
        with_field("pixels", lambda pixels: pixels[..., :4]),
        with_field("pixels", lambda pixels: np.zeros((4000, 4000, 5), np.uint8)),
        with_field("pixels", lambda pixels: pixels.astype(object)),
        flip_a_pixel,
    ],
)
def test_invalid_cached_views_are_rendered_again(damage, tmp_path: Path) -> None:
    truth = renderer(cache_dir=tmp_path).render(0)
    (file,) = tmp_path.glob("*.npz")
    before = stored(file)
    damage(file)
    again = renderer(cache_dir=tmp_path).render(0)
    assert torch.equal(again.pixels, truth.pixels) and torch.equal(again.camera_to_world, truth.camera_to_world)
    assert stored(file)["sha256"] == before["sha256"]


def test_a_full_disk_ends_the_cache_and_nothing_else(tmp_path: Path, monkeypatch, capsys) -> None:
    made = renderer(cache_dir=tmp_path / "views")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    ring = ViewRing(made, 3, "cpu")
    ring.fill()
    assert len(ring) == 3 and made.cache_dir is None
    assert " ".join(capsys.readouterr().out.split()).count("Going on without the cache") == 1
    assert not list((tmp_path / "views").iterdir())


def test_a_cache_folder_that_cannot_be_created(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert renderer(cache_dir=tmp_path / "file").cache_dir is None
    assert "Going on without the cache" in capsys.readouterr().out


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    names = ("view_0_1.999999999.partial", f"view_0_2.{os.getpid()}.partial", "a.partial")
    old, own, fresh = (tmp_path / name for name in names)
    for file in (old, own, fresh):
        file.touch()
    for file in (old, own):
        os.utime(file, (0, 0))
    renderer(cache_dir=tmp_path)
    assert not old.exists() and own.exists() and fresh.exists()


# Odd teachers.


class OddTeacher(SceneTeacher):
    """Gives some outputs as other numbers."""

    def __init__(self, **numbers: float) -> None:
        super().__init__()
        self.numbers = numbers

    def view(self, camera):
        outputs = super().view(camera)
        return replace(outputs, **{k: torch.full_like(getattr(outputs, k), v) for k, v in self.numbers.items()})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["depth", "accumulation"])
def test_never_finite_outputs_count_as_missing(name: str, value: float) -> None:
    made = renderer(OddTeacher(**{name: value}))
    assert made.survey.has_depth == (name != "depth") and made.survey.has_accumulation == (name != "accumulation")
    view, truth = made.render(0), renderer().render(0)
    assert torch.equal(view.pixels[..., :3], truth.pixels[..., :3])
    assert (view.depth == 0).all() if name == "depth" else (view.pixels[..., 3] == 255).all()
    bounds = made.survey.bounds(made.sampler.cameras)
    assert np.isfinite([*bounds.center, bounds.radius, bounds.near, bounds.far]).all()
