"""Photographs as rays: the teacher's rays, its pose corrections, masks, and views that stay unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.model_components.ray_generators import RayGenerator
from PIL import Image
from teachers import write_blender_capture

from r2l_nerfstudio.distillation.photographs import Photographs, split_holdout
from r2l_nerfstudio.distillation.pipeline import background_of
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
    """Add to what the capture says of its camera."""
    meta = json.loads((capture / "transforms.json").read_text())
    (capture / "transforms.json").write_text(json.dumps({**meta, **fields}))


CAMERAS = {
    "pinhole": {},
    "distorted": {"camera_model": "OPENCV", "k1": 0.1, "k2": -0.03, "p1": 0.01, "p2": -0.004, "cx": 13.2, "cy": 10.9},
    "fisheye": {"camera_model": "OPENCV_FISHEYE", "k1": 0.05, "k2": 0.01, "k3": 0.0, "k4": 0.0},
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("kind", CAMERAS)
def test_every_pixel_has_nerfstudios_ray_and_its_colour(kind: str, scale: float, capture: Path) -> None:
    edit(capture, **CAMERAS[kind])
    dataset = dataset_of(capture, scale)
    photographs = Photographs(dataset, [1, 4], None, WHITE, "cpu")
    side = round(24 * scale)
    assert len(photographs.pixels) == 2 * side * side
    sample = photographs.rays(torch.arange(len(photographs.pixels)))
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
    assert (sample.geometry_weight == 0).all()  # a photograph says nothing of depth or opacity


@pytest.mark.parametrize("mode", ["SO3xR3", "SE3"])
def test_pose_corrections_are_those_of_the_teachers_training(mode: str, tiny_capture: Path) -> None:
    dataset = dataset_of(tiny_capture)
    optimizer = CameraOptimizerConfig(mode=mode).setup(num_cameras=6, device="cpu")
    torch.nn.init.normal_(optimizer.pose_adjustment, std=0.2)
    corrections = optimizer(torch.arange(6)).detach()
    photographs = Photographs(dataset, [0, 3, 5], corrections, WHITE, "cpu")
    chosen = torch.randint(3 * 24 * 24, (50,), generator=torch.Generator().manual_seed(2))
    sample = photographs.rays(chosen)
    views = torch.tensor([0, 3, 5])[chosen // 576]
    indices = torch.stack([views, chosen % 576 // 24, chosen % 24], dim=-1)
    bundle = RayGenerator(dataset.cameras)(indices)
    uncorrected = bundle.directions.clone()
    optimizer.apply_to_raybundle(bundle)
    torch.testing.assert_close(sample.origins, bundle.origins.detach())
    torch.testing.assert_close(sample.directions, bundle.directions.detach())
    assert (uncorrected - sample.directions).abs().max() > 0.05


def test_a_trained_teachers_corrections_reach_the_photographs(tiny_teacher: Path, tiny_capture: Path) -> None:
    teacher = Teacher.load(tiny_teacher)
    dataset = dataset_of(tiny_capture)
    sample = Photographs(dataset, [2], teacher.pose_corrections(), WHITE, "cpu").rays(torch.tensor([30, 500]))
    bundle = RayGenerator(dataset.cameras)(torch.tensor([[2, 30 // 24, 30 % 24], [2, 500 // 24, 500 % 24]]))
    before = bundle.origins.clone()
    teacher.model.camera_optimizer.apply_to_raybundle(bundle)
    torch.testing.assert_close(sample.origins, bundle.origins)
    torch.testing.assert_close(sample.directions, bundle.directions)
    assert not torch.equal(sample.origins, before)


def test_masked_pixels_are_never_drawn(capture: Path) -> None:
    meta = json.loads((capture / "transforms.json").read_text())
    (capture / "masks").mkdir()
    for index, frame in enumerate(meta["frames"]):
        mask = np.zeros((24, 24), dtype=np.uint8)
        mask[index : index + 9, 5:19] = 255
        frame["mask_path"] = f"masks/{index:03d}.png"
        Image.fromarray(mask).save(capture / frame["mask_path"])
    edit(capture, frames=meta["frames"])
    dataset = dataset_of(capture)
    photographs = Photographs(dataset, [0, 1, 2, 3, 4, 5], None, WHITE, "cpu")
    assert len(photographs.pixels) == 6 * 9 * 14
    for view in range(6):
        rows = photographs.rows[photographs.views == view]
        columns = photographs.columns[photographs.views == view]
        first = int(dataset.image_filenames[view].stem)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (first, first + 8, 5, 18)
        assert dataset.get_data(view)["mask"][rows.long(), columns.long()].all()


def test_transparent_photographs_lie_on_the_background(tmp_path: Path) -> None:
    capture = write_blender_capture(tmp_path / "blender")
    for alpha_color in (None, "white"):
        config = BlenderDataParserConfig(data=capture, alpha_color=alpha_color)
        dataset = InputDataset(config.setup().get_dataparser_outputs("train"))
        background = torch.tensor([0.1, 0.7, 0.3])
        photographs = Photographs(dataset, [0, 1], None, background, "cpu")
        assert photographs.pixels.shape[-1] == (4 if alpha_color is None else 3)
        sample = photographs.rays(torch.arange(576))
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
def test_background_of_a_student_is_its_teachers(color, alpha_color, expected, tiny_teacher: Path) -> None:
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
def test_held_out_views_are_apart_and_spread(views: int, fraction: float) -> None:
    kept, held = split_holdout(views, fraction)
    assert sorted(kept + held) == list(range(views)) and not set(kept) & set(held)
    assert len(held) == max(1, round(fraction * views))
    if len(held) > 1:
        gaps = [later - earlier for earlier, later in zip(held, held[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1
    assert split_holdout(views, fraction) == (kept, held)


def test_nothing_is_held_out_for_a_fraction_of_zero() -> None:
    assert split_holdout(5, 0.0) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize(("views", "fraction"), [(1, 0.1), (5, 1.0), (3, 2.0)])
def test_no_view_left_is_an_error(views: int, fraction: float) -> None:
    with pytest.raises(InputError, match="--pipeline.datamanager.holdout-fraction"):
        split_holdout(views, fraction)


def test_pixels_of_held_out_views_are_never_drawn(tiny_capture: Path) -> None:
    dataset = dataset_of(tiny_capture)
    kept, held = split_holdout(6, 0.4)
    assert len(held) == 2
    photographs = Photographs(dataset, kept, None, WHITE, "cpu")
    sample = photographs.sample(20000)
    positions = dataset.cameras.camera_to_worlds[:, :, 3]
    nearest = torch.cdist(sample.origins, positions).argmin(-1)
    assert set(nearest.tolist()) == set(kept)
    watched = Photographs(dataset, held, None, WHITE, "cpu").sample(2000)
    assert set(torch.cdist(watched.origins, positions).argmin(-1).tolist()) == set(held)


def test_a_draw_can_be_repeated(tiny_capture: Path) -> None:
    photographs = Photographs(dataset_of(tiny_capture), [0, 1], None, WHITE, "cpu")
    draws = [photographs.sample(30, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0].rgb, draws[1].rgb) and not torch.equal(draws[0].rgb, draws[2].rgb)
