"""Nerfstudio's own tools on a student whose teacher is gone: ns-eval, and every kind of ns-render."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.image.lpip
import yaml
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.models.base_model import Model
from nerfstudio.scripts.eval import ComputePSNR
from nerfstudio.scripts.render import DatasetRender, RenderCameraPath, RenderInterpolated, SpiralRender
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image

from r2l_nerfstudio.models import metrics
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.teacher import Teacher


@pytest.fixture(scope="module", params=["tiny_student", "tiny_mobile_student"])
def orphan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student's config.yml as it is elsewhere, with no teacher to be found."""
    output = tmp_path_factory.mktemp("orphans")
    trained: Path = request.getfixturevalue(request.param)
    run = Path(shutil.copytree(trained, output.joinpath(*trained.parts[-3:])))
    config = load_run_config(run)
    config.output_dir = output
    config.teacher = config.pipeline.teacher = output / "deleted" / "config.yml"
    (run / "config.yml").write_text(yaml.dump(config))
    return run / "config.yml"


@pytest.fixture
def copied(orphan: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a copy of the student with another checkpoint or configuration; its config.yml."""

    def copy_with(
        checkpoint: Callable[[dict], Any] = lambda content: None, config: Callable[[Any], Any] = lambda config: None
    ) -> Path:
        run = Path(shutil.copytree(orphan.parent, tmp_path.joinpath(*orphan.parts[-4:-1])))
        changed = load_run_config(run)
        changed.output_dir = tmp_path
        config(changed)
        (run / "config.yml").write_text(yaml.dump(changed))
        (file,) = (run / "nerfstudio_models").iterdir()
        content = torch.load(file, weights_only=True)
        checkpoint(content)
        torch.save(content, file)
        return run / "config.yml"

    return copy_with


@pytest.fixture(autouse=True)
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may even look for the teacher."""

    def load(*args, **kwargs):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(Teacher, "load", load)


@pytest.fixture
def ffmpeg() -> None:
    """Skip where there is none: `ns-render` insists on it, even for images."""
    if shutil.which("ffmpeg") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("ffmpeg is not installed: apt-get install ffmpeg")


def model_of(config: Path) -> Model:
    return eval_setup(config)[1].model


def picture(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).float() / 255


def same(image: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to eight bits."""
    return image.shape == expected.shape and bool(((image - expected).abs() <= 1.001 / 255).all())


# ns-eval.


def test_eval(orphan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(**kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchmetrics.image.lpip, "_NoTrainLpips", build)
    metrics._lpips.cache_clear()
    ComputePSNR(orphan, tmp_path / "result.json", tmp_path / "renders").main()
    metrics._lpips.cache_clear()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method_name"] == orphan.parts[-3] and result["experiment_name"] == "tiny"
    assert result["checkpoint"] == str(orphan.parent / "nerfstudio_models" / "step-000000029.ckpt")
    figures = result["results"]
    assert set(figures) == {
        key + suffix for key in ("psnr", "ssim", "num_rays_per_sec", "fps") for suffix in ("", "_std")
    }
    dataset = eval_setup(orphan)[1].datamanager.eval_dataset
    student = model_of(orphan)
    expected = []
    for index in range(len(dataset)):
        rgb = student.get_outputs_for_camera(dataset.cameras[index])["rgb"]
        expected.append(float(-10 * (rgb - dataset[index]["image"]).square().mean().log10()))
        pair = picture(tmp_path / "renders" / f"eval_img_{index:04d}.png")
        assert same(pair, torch.cat([dataset[index]["image"], rgb], dim=1))
    assert len(expected) == 2
    assert figures["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)


def _deepened(config: Any) -> None:
    model = config.pipeline.model
    if hasattr(model, "depth"):
        model.depth += 2
    else:
        model.blocks += 1


def test_checkpoint_of_other_options(copied: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    deeper = copied(config=_deepened)
    with pytest.raises(SystemExit) as caught:
        eval_setup(deeper)
    assert caught.value.code == 1
    *_, last = capsys.readouterr().out.rstrip().splitlines()
    assert last.startswith("Error: ") and "network.blocks." in last and "config.yml" in last


def test_missing_capture_is_an_error(
    copied: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lost = copied(config=lambda config: setattr(config.pipeline.datamanager, "data", tmp_path / "lost"))
    with pytest.raises(SystemExit) as caught:
        eval_setup(lost)
    assert caught.value.code == 1
    *_, last = capsys.readouterr().out.rstrip().splitlines()
    assert last.startswith("Error: ") and str(tmp_path / "lost") in last and "config.yml" in last


# ns-render dataset.


def test_render_dataset(orphan: Path, tmp_path: Path) -> None:
    DatasetRender(orphan, output_path=tmp_path, image_format="png", split="train+test").main()
    student = model_of(orphan)
    datamanager = eval_setup(orphan)[1].datamanager
    for split, dataset in (("train", datamanager.train_dataset), ("test", datamanager.eval_dataset)):
        names = [file.name for file in dataset.image_filenames]
        assert len(names) == {"train": 6, "test": 2}[split]
        for output in ("rgb", "accumulation", "depth", "gt-rgb"):
            assert sorted(file.name for file in (tmp_path / split / output).iterdir()) == sorted(names)
        for index, name in enumerate(names):
            outputs = student.get_outputs_for_camera(dataset.cameras[index])
            assert same(picture(tmp_path / split / "rgb" / name), outputs["rgb"])
            assert same(picture(tmp_path / split / "gt-rgb" / name), dataset[index]["image"])


def test_render_dataset_raw_and_transparent(orphan: Path, tmp_path: Path) -> None:
    DatasetRender(orphan, output_path=tmp_path, image_format="png", rendered_output_names=["raw-depth", "rgba"]).main()
    _, pipeline, _, _ = eval_setup(orphan)
    dataset = pipeline.datamanager.eval_dataset
    scale = dataset._dataparser_outputs.dataparser_scale
    for index, file in enumerate(dataset.image_filenames):
        outputs = pipeline.model.get_outputs_for_camera(dataset.cameras[index])
        with gzip.open((tmp_path / "test" / "raw-depth" / file.name).with_suffix(".npy.gz")) as stored:
            depth = np.load(stored)
        np.testing.assert_allclose(depth, outputs["depth"].numpy() / scale, rtol=1e-5)
        rgba = picture(tmp_path / "test" / "rgba" / file.name)
        assert rgba.shape == (24, 24, 4)
        assert same(rgba[..., 3:], outputs["accumulation"])


@pytest.mark.parametrize(
    ("accumulation", "depth", "outputs"),
    [
        (False, False, {"rgb", "gt-rgb"}),
        (True, False, {"rgb", "gt-rgb", "accumulation"}),
        (False, True, {"rgb", "gt-rgb", "accumulation", "depth"}),
    ],
)
def test_render_dataset_of_students_without_depth_or_accumulation(
    accumulation: bool, depth: bool, outputs: set[str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    def forget(content: dict) -> None:
        content["pipeline"]["_model._extra_state"].update(has_accumulation=accumulation, has_depth=depth)

    DatasetRender(copied(forget), output_path=tmp_path / "renders").main()
    assert {folder.name for folder in (tmp_path / "renders" / "test").iterdir()} == outputs


# ns-render along a path.


def path_of(cameras: Cameras, width: int, height: int, **more: Any) -> dict:
    """A camera path as the viewer saves it: the student's own cameras."""
    poses = [torch.cat([pose, torch.tensor([[0.0, 0, 0, 1]])]).flatten().tolist() for pose in cameras.camera_to_worlds]
    steps = [{"camera_to_world": pose, "fov": 50, "aspect": width / height} for pose in poses]
    return {"camera_path": steps, "render_width": width, "render_height": height, "seconds": 0.5, **more}


def render_path(config: Path, path: dict, folder: Path, **options: Any) -> list[Path]:
    """The images that `ns-render camera-path` makes."""
    folder.mkdir(exist_ok=True)
    (folder / "path.json").write_text(json.dumps(path))
    RenderCameraPath(
        config,
        camera_path_filename=folder / "path.json",
        output_path=folder / "out",
        output_format="images",
        image_format="png",
        **options,
    ).main()
    return sorted((folder / "out").glob("*.png"))


def test_render_camera_path(ffmpeg: None, orphan: Path, tmp_path: Path) -> None:
    _, pipeline, _, _ = eval_setup(orphan)
    cameras = pipeline.datamanager.train_dataset.cameras[:3]
    images = render_path(orphan, path_of(cameras, 21, 13), tmp_path / "plain")
    assert len(images) == 3
    focal = 13 / 2 / np.tan(np.radians(25))
    for pose, image in zip(cameras.camera_to_worlds, images, strict=True):
        camera = Cameras(pose[None], fx=focal, fy=focal, cx=10.5, cy=6.5, width=21, height=13)
        assert same(picture(image), pipeline.model.get_outputs_for_camera(camera)["rgb"])
    assert not same(picture(images[0]), picture(images[1]))
    both = render_path(orphan, path_of(cameras, 20, 14), tmp_path / "both", rendered_output_names=["rgb", "depth"])
    assert picture(both[0]).shape == (14, 40, 3)


@pytest.mark.parametrize("kind", ["equirectangular", "fisheye"])
def test_render_camera_path_of_other_cameras(kind: str, ffmpeg: None, orphan: Path, tmp_path: Path) -> None:
    cameras = eval_setup(orphan)[1].datamanager.train_dataset.cameras[:1]
    (image,) = render_path(orphan, path_of(cameras, 32, 16, camera_type=kind), tmp_path / kind)
    assert picture(image).shape == (16, 32, 3)


def test_render_camera_path_with_a_crop(ffmpeg: None, orphan: Path, tmp_path: Path) -> None:
    cameras = eval_setup(orphan)[1].datamanager.train_dataset.cameras[:1]
    crop = {"crop_center": [9e5, 9e5, 9e5], "crop_scale": [1, 1, 1], "crop_bg_color": {"r": 10, "g": 200, "b": 30}}
    (image,) = render_path(orphan, path_of(cameras, 16, 16, crop=crop), tmp_path / "crop")
    assert same(picture(image), torch.tensor([10.0, 200, 30]).div(255).expand(16, 16, 3))


def frames_of(video: Path) -> int:
    """How many frames a video holds."""
    command = ["ffmpeg", "-v", "error", "-i", str(video), "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    data = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    return len(data) // (24 * 24)


def test_render_interpolate(ffmpeg: None, orphan: Path, tmp_path: Path) -> None:
    video = tmp_path / "between.mp4"
    RenderInterpolated(orphan, output_path=video, pose_source="eval", interpolation_steps=4).main()
    assert frames_of(video) == 4
    RenderInterpolated(
        orphan,
        output_path=tmp_path / "images",
        pose_source="train",
        interpolation_steps=2,
        order_poses=True,
        output_format="images",
        downscale_factor=2.5,
        render_nearest_camera=True,
    ).main()
    images = list((tmp_path / "images").iterdir())
    assert len(images) == 10 and picture(images[0]).shape[0] == 9


def test_render_spiral(ffmpeg: None, orphan: Path, tmp_path: Path) -> None:
    SpiralRender(orphan, output_path=tmp_path / "spiral.mp4", seconds=0.25, frame_rate=12).main()
    assert frames_of(tmp_path / "spiral.mp4") == 3
