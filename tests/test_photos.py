"""Photos as rays: the teacher's rays, its pose corrections, masks, and held-out views."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.model_components.ray_generators import RayGenerator
from PIL import Image
from teachers import write_blender_capture

from r2l_nerfstudio.distillation import photo_views as photo_views_module
from r2l_nerfstudio.distillation import photos as photos_module
from r2l_nerfstudio.distillation.background import background_of
from r2l_nerfstudio.distillation.photo_views import photo_views
from r2l_nerfstudio.distillation.photos import Photos, read_photo, split_held_out
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.teacher import Teacher

WHITE = torch.ones(3)


def dataset_of(capture: Path, scale: float = 1.0) -> InputDataset:
    """Its six training views, as the student's data manager has them."""
    config = NerfstudioDataParserConfig(data=capture, eval_mode="interval", eval_interval=4)
    return InputDataset(config.setup().get_dataparser_outputs("train"), scale_factor=scale)


@pytest.fixture
def capture(tiny_capture: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_capture, tmp_path / "capture"))


def edit(capture: Path, **fields) -> None:
    """Add to the capture's camera parameters."""
    meta = json.loads((capture / "transforms.json").read_text())
    (capture / "transforms.json").write_text(json.dumps({**meta, **fields}))


CAMERAS = {
    "pinhole": {},
    "distorted": {"camera_model": "OPENCV", "k1": 0.1, "k2": -0.03, "p1": 0.01, "p2": -0.004, "cx": 13.2, "cy": 10.9},
    "fisheye": {"camera_model": "OPENCV_FISHEYE", "k1": 0.05, "k2": 0.01, "k3": 0.0, "k4": 0.0},
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("kind", CAMERAS)
def test_every_pixel_has_nerfstudios_ray_and_its_color(kind: str, scale: float, capture: Path) -> None:
    edit(capture, **CAMERAS[kind])
    dataset = dataset_of(capture, scale)
    photos = Photos(dataset, [1, 4], None, WHITE, "cpu")
    side = round(24 * scale)
    assert len(photos.pixels) == 2 * side * side
    sample = photos.rays(torch.arange(len(photos.pixels)))
    generator = RayGenerator(dataset.cameras)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for part, view in enumerate([1, 4]):
        indices = torch.stack([torch.full_like(rows, view), rows, columns], dim=-1).reshape(-1, 3)
        bundle = generator(indices)
        own = slice(part * side * side, (part + 1) * side * side)
        torch.testing.assert_close(sample.origins[own], bundle.origins)
        torch.testing.assert_close(sample.directions[own], bundle.directions)
        expected = dataset.get_data(view)["image"].reshape(-1, 3)
        torch.testing.assert_close(sample.rgb[own], expected)
    if kind != "pinhole":
        plain = dataset.cameras.generate_rays(camera_indices=1, disable_distortion=True)
        assert (plain.directions.reshape(-1, 3) - sample.directions[: side * side]).abs().max() > 1e-3
    torch.testing.assert_close(sample.directions.norm(dim=-1), torch.ones(len(sample.directions)))
    assert (sample.weight == 1).all()
    assert (sample.geometry_weight == 0).all()  # a photo has no depth or opacity


@pytest.mark.parametrize("mode", ["SO3xR3", "SE3"])
def test_pose_corrections_match_the_teachers_training(mode: str, tiny_capture: Path) -> None:
    dataset = dataset_of(tiny_capture)
    optimizer = CameraOptimizerConfig(mode=mode).setup(num_cameras=6, device="cpu")
    torch.nn.init.normal_(optimizer.pose_adjustment, std=0.2)
    corrections = optimizer(torch.arange(6)).detach()
    photos = Photos(dataset, [0, 3, 5], corrections, WHITE, "cpu")
    chosen = torch.randint(3 * 24 * 24, (50,), generator=torch.Generator().manual_seed(2))
    sample = photos.rays(chosen)
    views = torch.tensor([0, 3, 5])[chosen // 576]
    indices = torch.stack([views, chosen % 576 // 24, chosen % 24], dim=-1)
    bundle = RayGenerator(dataset.cameras)(indices)
    uncorrected = bundle.directions.clone()
    optimizer.apply_to_raybundle(bundle)
    torch.testing.assert_close(sample.origins, bundle.origins.detach())
    torch.testing.assert_close(sample.directions, bundle.directions.detach())
    assert (uncorrected - sample.directions).abs().max() > 0.05


def test_a_trained_teachers_corrections_reach_the_photos(tiny_teacher: Path, tiny_capture: Path) -> None:
    teacher = Teacher.load(tiny_teacher)
    dataset = dataset_of(tiny_capture)
    sample = Photos(dataset, [2], teacher.pose_corrections(), WHITE, "cpu").rays(torch.tensor([30, 500]))
    bundle = RayGenerator(dataset.cameras)(torch.tensor([[2, 30 // 24, 30 % 24], [2, 500 // 24, 500 % 24]]))
    before = bundle.origins.clone()
    teacher.model.camera_optimizer.apply_to_raybundle(bundle)
    torch.testing.assert_close(sample.origins, bundle.origins)
    torch.testing.assert_close(sample.directions, bundle.directions)
    assert not torch.equal(sample.origins, before)


def test_masked_pixels_are_never_drawn(capture: Path) -> None:
    masks = {index: np.zeros((24, 24), dtype=np.uint8) for index in range(8)}
    for index, mask in masks.items():
        mask[index : index + 9, 5:19] = 255
    write_masks(capture, masks)
    dataset = dataset_of(capture)
    photos = Photos(dataset, [0, 1, 2, 3, 4, 5], None, WHITE, "cpu")
    assert photos.pixels.shape == (6 * 24 * 24, 4)
    counts = photos.pixels[:, 3].view(6, 24, 24)
    assert int(counts.sum()) == 6 * 9 * 14
    for view in range(6):
        assert torch.equal(counts[view].bool(), dataset.get_data(view)["mask"][..., 0])
    drawn = photos.sample(20000, torch.Generator().manual_seed(0))
    assert 0.98 < drawn.weight.mean() <= 1.0
    # Every pixel that counts is drawn about as often as any other.
    rays = photos.rays(counts.flatten().nonzero()[:, 0])
    nearest = torch.cdist(drawn.directions[drawn.weight[:, 0] > 0][:2000], rays.directions).amin(-1)
    assert nearest.max() < 1e-3  # neighbors are forty times as far apart


def test_completely_masked_photos_are_left_out(capture: Path, capsys: pytest.CaptureFixture) -> None:
    masks = {index: 0 if index in (1, 2) else 255 for index in range(8)}
    write_masks(capture, {index: np.full((24, 24), value, np.uint8) for index, value in masks.items()})
    dataset = dataset_of(capture)  # of the files 1, 2, 3, 5, 6, 7
    photos = Photos(dataset, [0, 1, 2], None, WHITE, "cpu")
    assert len(photos) == 1 and len(photos.pixels) == 24 * 24
    assert torch.equal(photos.rays(torch.tensor([0])).origins, dataset.cameras.camera_to_worlds[2:3, :, 3])
    assert "Skipping 2 photos" in capsys.readouterr().out
    assert len(Photos(dataset, [0, 1], None, WHITE, "cpu")) == 0
    views = photo_views(dataset, [0, 1, 2], INTRINSICS.expand(6, 4), (24, 24), None, WHITE, "cpu")
    assert len(views) == 1 and torch.equal(views.camera_to_worlds[0], dataset.cameras.camera_to_worlds[2])


def write_masks(capture: Path, masks: dict[int, np.ndarray]) -> None:
    meta = json.loads((capture / "transforms.json").read_text())
    (capture / "masks").mkdir()
    for index, frame in enumerate(meta["frames"]):
        frame["mask_path"] = f"masks/{index:03d}.png"
        Image.fromarray(masks[index]).save(capture / frame["mask_path"])
    edit(capture, frames=meta["frames"])


INTRINSICS = torch.tensor([24.0, 24.0, 12.0, 12.0])


def test_photos_take_three_bytes_a_pixel_and_one_more_photo_while_they_load(tmp_path: Path) -> None:
    capture, size, count = large_capture(tmp_path), 1000, 12
    dataset = InputDataset(
        NerfstudioDataParserConfig(data=capture, eval_mode="all").setup().get_dataparser_outputs("train")
    )
    Photos(dataset, [0], None, WHITE, "cpu")  # what is loaded once
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    photos = Photos(dataset, list(range(count)), None, WHITE, "cpu")
    done.set()
    watcher.join()
    assert photos.pixels.shape == (count * size * size, 3) and photos.pixels.dtype == torch.uint8
    assert (peak[0] - before) / (count * size * size) < 4.0 + 9.0 / count


def test_photos_shrink_if_memory_is_short(capture: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    dataset = dataset_of(capture)
    whole = Photos(dataset, [1, 4], None, WHITE, "cpu")
    monkeypatch.setattr(photos_module, "free_memory", lambda device: 24 * 24 * 3 * 2 / 0.4 / 3.9)
    small = Photos(dataset, [1, 4], None, WHITE, "cpu")
    assert len(small.pixels) == 2 * 12 * 12
    assert "1/2 of their width and height" in capsys.readouterr().out
    # A pixel of the small photo has the mean color of four, and the ray through their middle.
    colors = whole.pixels[:576].view(12, 2, 12, 2, 3).float().mean(dim=(1, 3)).reshape(-1, 3)
    assert (small.pixels[:144].float() - colors).abs().max() <= 1
    rays = whole.rays(torch.arange(576)).directions.view(12, 2, 12, 2, 3).mean(dim=(1, 3)).reshape(-1, 3)
    mean = torch.nn.functional.normalize(rays, dim=-1)
    torch.testing.assert_close(small.rays(torch.arange(144)).directions, mean, atol=1e-3, rtol=0)
    monkeypatch.setattr(photo_views_module, "free_memory", lambda device: 24 * 24 * 4 * 3 / 0.4)
    views = photo_views(dataset, [0, 1, 2, 3, 4], INTRINSICS.expand(6, 4), (24, 24), None, WHITE, "cpu")
    assert len(views) == 3 and "3 of 5 photos" in capsys.readouterr().out
    assert views.pixels.shape[-1] == 4 and views.depth.untyped_storage().nbytes() <= 2


def large_capture(folder: Path, size: int = 1000, count: int = 12) -> Path:
    (folder / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
        folder / "images/0.bmp"
    )
    frames = []
    for index in range(count):
        if index:
            shutil.copyfile(folder / "images/0.bmp", folder / f"images/{index}.bmp")
        pose = np.eye(4)
        pose[0, 3] = index
        frames.append({"file_path": f"images/{index}.bmp", "transform_matrix": pose.tolist()})
    camera = {"w": size, "h": size, "fl_x": size, "fl_y": size, "cx": size / 2, "cy": size / 2}
    (folder / "transforms.json").write_text(json.dumps({**camera, "frames": frames}))
    return folder


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("CMYK", "CMYK"),
        ("P", "a palette"),
        ("I;16", "mode I;16"),
        ("LA", "gray with alpha"),
        ("1", "one bit"),
        ("F", "mode F"),
    ],
)
def test_images_that_nerfstudio_misreads(mode: str, said: str, capture: Path) -> None:
    file = capture / "images" / "001.png"
    with Image.open(file) as image:
        gray = image.convert("L")
        other = Image.fromarray(np.array(gray).astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
    other.save(file, format={"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG"))
    with pytest.raises(InputError, match=f"001.png is an image of an unusual kind .*{said}.*8-bit RGB"):
        read_photo(dataset_of(capture), 0, WHITE)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_that_nerfstudio_reads(mode: str, capture: Path) -> None:
    file = capture / "images" / "001.png"
    with Image.open(file) as image:
        image.convert(mode).save(file)
        expected = np.array(image.convert(mode).convert("RGB"))
    assert np.array_equal(read_photo(dataset_of(capture), 0, WHITE).rgb, expected)


@pytest.mark.parametrize(("size", "said"), [((24, 36), "on its side"), ((12, 12), "restore the photos")])
def test_photos_of_another_size_than_their_cameras(size: tuple[int, int], said: str, capture: Path) -> None:
    edit(capture, w=36, h=24)
    Image.new("RGB", size).save(capture / "images" / "001.png")
    with pytest.raises(InputError, match=f"001.png has {size[0]}x{size[1]} pixels, and its camera 36x24.*{said}"):
        read_photo(dataset_of(capture), 0, WHITE)


def test_transparent_photos_are_blended_with_the_background(tmp_path: Path) -> None:
    capture = write_blender_capture(tmp_path / "blender")
    for alpha_color in (None, "white"):
        config = BlenderDataParserConfig(data=capture, alpha_color=alpha_color)
        dataset = InputDataset(config.setup().get_dataparser_outputs("train"))
        background = torch.tensor([0.1, 0.7, 0.3])
        photos = Photos(dataset, [0, 1], None, background, "cpu")
        assert photos.pixels.shape[-1] == 3
        sample = photos.rays(torch.arange(576))
        with Image.open(dataset.image_filenames[0]) as image:
            pixels = torch.from_numpy(np.array(image)).reshape(-1, 4).float() / 255
        behind = background if alpha_color is None else WHITE  # already blended by the dataparser's wish
        expected = pixels[:, :3] * pixels[:, 3:] + behind * (1 - pixels[:, 3:])
        torch.testing.assert_close(sample.rgb, expected, atol=1 / 255, rtol=0)
        assert 0 < pixels[:, 3].mean() < 1


@pytest.mark.parametrize(
    ("color", "alpha_color", "expected"),
    [("black", None, 0.0), ("white", None, 1.0), ("last_sample", None, 1.0), ("last_sample", [0.0, 0.5, 0.0], None)],
)
def test_the_student_inherits_the_teachers_background(color, alpha_color, expected, tiny_teacher: Path) -> None:
    teacher = Teacher.load(tiny_teacher)
    teacher.model.config.background_color = color
    if alpha_color is not None:
        teacher.dataparser_outputs.alpha_color = torch.tensor(alpha_color)
    wanted = torch.tensor(alpha_color) if expected is None else torch.full((3,), expected)
    assert torch.equal(background_of(teacher), wanted)
    teacher.background = torch.tensor([0.3, 0.3, 0.3])
    assert torch.equal(background_of(teacher), torch.tensor([0.3, 0.3, 0.3]))


# The views held out.


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.6])
@pytest.mark.parametrize("views", [2, 3, 6, 17, 100])
def test_held_out_views_are_separate_and_spread_out(views: int, fraction: float) -> None:
    kept, held = split_held_out(views, fraction)
    assert sorted(kept + held) == list(range(views)) and not set(kept) & set(held)
    assert len(held) == max(1, round(fraction * views))
    if len(held) > 1:
        gaps = [later - earlier for earlier, later in zip(held, held[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1
    assert split_held_out(views, fraction) == (kept, held)


def test_nothing_is_held_out_for_a_fraction_of_zero() -> None:
    assert split_held_out(5, 0.0) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize(("views", "fraction"), [(1, 0.1), (5, 1.0), (3, 2.0)])
def test_no_view_left_is_an_error(views: int, fraction: float) -> None:
    with pytest.raises(InputError, match="--pipeline.datamanager.held-out-fraction"):
        split_held_out(views, fraction)


def test_pixels_of_held_out_views_are_never_drawn(tiny_capture: Path) -> None:
    dataset = dataset_of(tiny_capture)
    kept, held = split_held_out(6, 0.4)
    assert len(held) == 2
    photos = Photos(dataset, kept, None, WHITE, "cpu")
    sample = photos.sample(20000)
    positions = dataset.cameras.camera_to_worlds[:, :, 3]
    nearest = torch.cdist(sample.origins, positions).argmin(-1)
    assert set(nearest.tolist()) == set(kept)
    watched = Photos(dataset, held, None, WHITE, "cpu").sample(2000)
    assert set(torch.cdist(watched.origins, positions).argmin(-1).tolist()) == set(held)


def test_a_draw_can_be_repeated(tiny_capture: Path) -> None:
    photos = Photos(dataset_of(tiny_capture), [0, 1], None, WHITE, "cpu")
    draws = [photos.sample(30, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0].rgb, draws[1].rgb) and not torch.equal(draws[0].rgb, draws[2].rgb)
