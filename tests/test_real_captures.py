"""Regressions from public bug reports: cut-out photos, unusual cameras, dynamic scenes, incomplete captures."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.dnerf_dataparser import DNeRFDataParserConfig
from nerfstudio.data.dataparsers.minimal_dataparser import MinimalDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image
from scene_teacher import SceneTeacher, scene_cameras
from teachers import teacher_config, train, write_blender_capture

from r2l_nerfstudio.capture import CaptureError, _Downscaled, parse_capture
from r2l_nerfstudio.distillation.background import background_of
from r2l_nerfstudio.distillation.frame_check import check_frame
from r2l_nerfstudio.distillation.photos import Photos, read_photo
from r2l_nerfstudio.distillation.pose_sampling import PoseSampler, capture_cameras
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import ViewRenderer
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.teacher import Teacher, TeacherOutputs

# The color behind the scene.


@pytest.fixture(scope="module")
def cut_out(tiny_capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny capture with photos that are transparent outside a disc; what is there is not black."""
    capture = Path(shutil.copytree(tiny_capture, tmp_path_factory.mktemp("captures") / "cut_out"))
    y, x = np.mgrid[:24, :24] - 11.5
    alpha = Image.fromarray((255 * (x**2 + y**2 < 64)).astype(np.uint8))
    for file in (capture / "images").iterdir():
        with Image.open(file) as photo:
            photo.putalpha(alpha)
            photo.save(file)
    return capture


class Compositing:
    """Renders each photo as a model trained with some background color has learned to."""

    views_only = False
    config_path = Path("teacher/config.yml")

    def __init__(self, teacher: Teacher, dataset: InputDataset, background: torch.Tensor) -> None:
        self.dataset, self.behind = dataset, background
        self.dataparser_outputs = teacher.dataparser_outputs

    def view(self, camera: Cameras) -> TeacherOutputs:
        distances = (self.dataset.cameras.camera_to_worlds - camera.camera_to_worlds).flatten(1).norm(dim=-1)
        image = torch.from_numpy(self.dataset.get_numpy_image(int(distances.argmin()))).float() / 255
        if image.shape[-1] == 4:
            image = image[..., :3] * image[..., 3:] + self.behind * (1 - image[..., 3:])
        return TeacherOutputs(image, None, None)


# As RGBRenderer.blend_background_for_loss_computation puts photos in training; `random` leaves the choice.
@pytest.mark.parametrize(("color", "behind"), [("white", 1.0), ("black", 0.0), ("last_sample", 0.0), ("random", 0.0)])
@pytest.mark.parametrize("kind", ["rgba", "rgb"])
def test_one_background_for_teacher_photos_and_student(
    color: str, behind: float, kind: str, cut_out: Path, tiny_capture: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_teacher, tmp_path / "run"))
    text = (run / "config.yml").read_text()
    assert "background_color: last_sample" in text
    (run / "config.yml").write_text(text.replace("background_color: last_sample", f"background_color: {color}"))
    teacher = Teacher.load(run, data=cut_out if kind == "rgba" else tiny_capture)
    found = background_of(teacher)
    if kind == "rgba" or color != "last_sample":
        assert torch.equal(found, torch.full((3,), behind))
    if color == "random":
        assert torch.equal(teacher.background, found)
    dataset = InputDataset(teacher.dataparser_outputs)
    fake = Compositing(teacher, dataset, torch.full((3,), behind))
    check_frame(fake, dataset, found)
    photos = Photos(dataset, [1], None, found, "cpu")
    seen = fake.view(dataset.cameras[1:2]).rgb.reshape(-1, 3)
    error = (photos.rays(torch.arange(576)).rgb - seen).square().mean()
    assert error < 1e-4  # 40 dB between the photo stage's photos and the teacher


def test_a_background_that_only_the_teacher_has(tiny_teacher: Path) -> None:
    teacher = Teacher.load(tiny_teacher)

    class Gray:
        config = teacher.model.config

        def get_outputs_for_camera(self, camera: Cameras) -> dict[str, torch.Tensor]:
            shape = (int(camera.height[0]), int(camera.width[0]))
            accumulation = torch.zeros(*shape, 1)
            accumulation[:4] = 1.0
            rgb = torch.where(accumulation > 0, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.6, 0.7]))
            return {"rgb": rgb, "accumulation": accumulation}

    teacher.model = Gray()
    torch.testing.assert_close(background_of(teacher), torch.tensor([0.5, 0.6, 0.7]))


# All kinds of cameras.


KINDS = [
    CameraType.PERSPECTIVE,
    CameraType.FISHEYE,
    CameraType.EQUIRECTANGULAR,
    CameraType.ORTHOPHOTO,
    CameraType.FISHEYE624,
    CameraType.OMNIDIRECTIONALSTEREO_L,
    CameraType.VR180_L,
]


class AnyCameraTeacher(SceneTeacher):
    """As a field, for which rays are made of any camera, or as a splat, which refuses all but pinholes."""

    def __init__(self, views_only: bool) -> None:
        super().__init__()
        self.views_only = views_only

    def view(self, camera: Cameras) -> TeacherOutputs:
        if self.views_only:
            assert camera.camera_type.item() == CameraType.PERSPECTIVE.value and camera.distortion_params is None
        return super().view(camera)


@pytest.mark.parametrize("views_only", [False, True], ids=["field", "splat"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_camera(kind: CameraType, views_only: bool) -> None:
    plain = scene_cameras()
    distortion = torch.zeros(len(plain), 12 if kind == CameraType.FISHEYE624 else 6)
    distortion[:, 0] = 0.01
    cameras = Cameras(
        plain.camera_to_worlds, plain.fx, plain.fy, plain.cx, plain.cy, 24, 24, distortion, camera_type=kind
    )
    teacher = AnyCameraTeacher(views_only)
    survey = Survey.take(teacher, cameras)
    assert survey.has_depth and len(survey.points) > 0
    sampler = PoseSampler(capture_cameras(cameras))
    view = ViewRenderer(teacher, sampler, survey, 24, 24, 0).render(0)
    assert (view.pixels[..., 4] == 1).all()


# Scenes that change.


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of dnerf."""
    folder = tmp_path_factory.mktemp("moving")
    data = write_blender_capture(folder / "capture")
    for file in data.glob("transforms_*.json"):
        meta = json.loads(file.read_text())
        for index, frame in enumerate(meta["frames"]):
            frame["time"] = index / max(1, len(meta["frames"]) - 1)
        file.write_text(json.dumps(meta))
    sizes = {"pipeline.model.num_coarse_samples": 8, "pipeline.model.num_importance_samples": 8}
    config = teacher_config("dnerf", data, folder / "runs", 3, **sizes)
    config.pipeline.datamanager.dataparser = DNeRFDataParserConfig(data=data)
    train(config)
    return config.get_base_dir()


def test_a_time_dependent_scene_needs_an_instant(moving: Path) -> None:
    with pytest.raises(InputError, match="'dnerf', whose scene changes over time.*--teacher-time"):
        Teacher.load(moving)


def test_a_scene_frozen_at_an_instant(moving: Path) -> None:
    frozen = {time: Teacher.load(moving, time=time) for time in (0.0, 1.0)}
    camera = frozen[0.0].dataparser_outputs.cameras[0:1]
    views = {time: teacher.view(camera).rgb for time, teacher in frozen.items()}
    assert frozen[0.0].fingerprint() != frozen[1.0].fingerprint()
    calls: list[Any] = []
    teacher = frozen[1.0]
    forward = teacher.model.temporal_distortion.forward
    teacher.model.temporal_distortion.forward = lambda points, times: (calls.append(times), forward(points, times))[1]
    untimed = copy.deepcopy(camera)
    untimed.times = None
    torch.testing.assert_close(teacher.view(untimed).rgb, views[1.0])
    rays = untimed.generate_rays(camera_indices=0, keep_shape=True)
    torch.testing.assert_close(teacher.rays(rays).rgb, views[1.0], atol=1e-3, rtol=0)
    assert calls and all((times == 1.0).all() for times in calls)


def test_an_instant_of_a_static_scene(tiny_teacher: Path) -> None:
    with pytest.raises(InputError, match="does not change over time: leave --teacher-time out"):
        Teacher.load(tiny_teacher, time=0.5)


# Outputs that cannot be.


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({"rgb": torch.full((24, 24, 3), 200.0)}, "colors between 200 and 200"),
        ({"rgb": torch.full((24, 24, 3), -3.0)}, "colors between -3 and -3"),
        ({"rgb": torch.zeros(24, 24, 4)}, r"color of shape \[24, 24, 4\], and \[24, 24, 3\]"),
        ({"rgb": torch.zeros(100, 3)}, r"color of shape \[100, 3\]"),
        ({"rgb": torch.zeros(3, 24, 24)}, r"color of shape \[3, 24, 24\]"),
        ({"rgb": torch.zeros(24, 24, 3), "depth": torch.zeros(12, 12, 1)}, r"depth of shape \[12, 12, 1\]"),
        (
            {"rgb": torch.zeros(24, 24, 3), "accumulation": torch.zeros(24, 24, 2)},
            r"accumulation of shape \[24, 24, 2\]",
        ),
    ],
)
def test_invalid_outputs(outputs: dict[str, torch.Tensor], said: str, tiny_teacher: Path) -> None:
    teacher = Teacher.load(tiny_teacher)
    teacher.model.get_outputs_for_camera = lambda camera: outputs
    with pytest.raises(InputError, match=said):
        teacher.view(teacher.dataparser_outputs.cameras[0:1])


# Captures.


def edited(capture: Path, folder: Path, **fields: Any) -> Path:
    copied = Path(shutil.copytree(capture, folder / "capture"))
    meta = json.loads((copied / "transforms.json").read_text())
    (copied / "transforms.json").write_text(json.dumps({**meta, **fields}))
    return copied


def with_poses(capture: Path, folder: Path, change) -> Path:
    meta = json.loads((capture / "transforms.json").read_text())
    frames = [{**f, "transform_matrix": change(np.array(f["transform_matrix"])).tolist()} for f in meta["frames"]]
    return edited(capture, folder, frames=frames)


def moved(scale: float):
    def change(pose: np.ndarray) -> np.ndarray:
        pose[:3, 3] *= scale
        return pose

    return change


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_scales_of_all_kinds(scale: float, tiny_capture: Path, tmp_path: Path) -> None:
    outputs = parse_capture(NerfstudioDataParserConfig(data=with_poses(tiny_capture, tmp_path, moved(scale))))
    truth = parse_capture(NerfstudioDataParserConfig(data=tiny_capture))
    torch.testing.assert_close(outputs.cameras.camera_to_worlds, truth.cameras.camera_to_worlds, atol=1e-4, rtol=1e-4)


def test_cameras_in_one_place(tiny_capture: Path, tmp_path: Path) -> None:
    data = with_poses(tiny_capture, tmp_path, moved(0.0))
    with pytest.raises(CaptureError, match="is invalid|all in one place"):
        parse_capture(NerfstudioDataParserConfig(data=data))


def test_non_finite_poses(tiny_capture: Path, tmp_path: Path) -> None:
    data = with_poses(tiny_capture, tmp_path, lambda pose: pose * np.nan)
    with pytest.raises(CaptureError):
        parse_capture(NerfstudioDataParserConfig(data=data))


@pytest.mark.parametrize("focal", [0.0, -24.0])
def test_invalid_focal_lengths(focal: float, tiny_capture: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="the focal length of .* is invalid, .*png being the first"):
        parse_capture(NerfstudioDataParserConfig(data=edited(tiny_capture, tmp_path, fl_x=focal)))


def test_windows_line_endings(tiny_capture: Path, tmp_path: Path) -> None:
    data = edited(tiny_capture, tmp_path)
    text = json.dumps(json.loads((data / "transforms.json").read_text()), indent=1)
    (data / "transforms.json").write_bytes(text.replace("\n", "\r\n").encode())
    assert len(parse_capture(NerfstudioDataParserConfig(data=data)).image_filenames) > 0


def test_missing_downscaled_images(tmp_path: Path) -> None:
    class Parser:
        config = ColmapDataParserConfig(data=tmp_path, images_path=Path("images"), downscale_factor=4)

        def _setup_downscale_factor(self, *files):
            return files

    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / "a.png"]
    with pytest.raises(CaptureError, match="images at 1/4 of their size are missing: .*images_4 .*-resize 25%"):
        _Downscaled(Parser())(files, [], [])
    (tmp_path / "images_4").mkdir()
    assert _Downscaled(Parser())(files, [], []) == (files, [], [])


def test_a_dataparser_that_unpickles(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="unpickles"):
        parse_capture(MinimalDataParserConfig(data=tmp_path))


def test_exr_images(tiny_capture: Path, tmp_path: Path) -> None:
    data = edited(tiny_capture, tmp_path)
    file = data / "images" / "001.png"
    file.write_bytes(b"\x76\x2f\x31\x01" + bytes(500))
    dataset = InputDataset(parse_capture(NerfstudioDataParserConfig(data=data, eval_mode="all")))
    with pytest.raises(InputError, match="001.png cannot be used"):
        read_photo(dataset, 1, torch.ones(3))
