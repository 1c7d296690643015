"""Students loaded from their run's folder, with nothing else on the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from student_runs import STEP, tiny_mobile_r2l, tiny_r2l, write_run

import r2l_nerfstudio
from r2l_nerfstudio import load_student
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.probe_cameras import probe_poses

LENS = np.array([50.0, 50.0, 12.0, 9.0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny R2L's config.yml. Read only."""
    return write_run(tmp_path_factory.mktemp("runs") / "r2l", tiny_r2l())


@pytest.mark.parametrize("config", [tiny_r2l(), tiny_mobile_r2l()], ids=["r2l", "mobile-r2l"])
def test_renders_what_nerfstudio_renders(config, tmp_path: Path) -> None:
    student = load_student(write_run(tmp_path / "run", config))
    assert student.outputs == ("rgb", "accumulation", "depth")
    pose = probe_poses(student.model)[0]
    camera = Cameras(pose[None], 50.0, 50.0, 12.0, 9.0, width=25, height=18)
    truth = student.model.get_outputs_for_camera(camera)
    assert truth["rgb"].std() > 0.01
    for name, channels in (("rgb", 3), ("accumulation", 1), ("depth", 1)):
        image = student.render(pose.numpy(), LENS, 25, 18, output=name)
        assert isinstance(image, np.ndarray) and image.dtype == np.float32 and image.shape == (18, 25, channels)
        np.testing.assert_array_equal(image, truth[name].numpy())


def test_accepts_tensors_and_matrices(run: Path) -> None:
    student = load_student(str(run), device="cpu", step=STEP)
    pose = probe_poses(student.model)[1]
    image = student.render(pose, torch.from_numpy(LENS), 24, 18)
    assert isinstance(image, torch.Tensor)
    square = torch.cat([pose, torch.tensor([[0.0, 0.0, 0.0, 1.0]])])
    matrix = torch.tensor([[50.0, 0.0, 12.0], [0.0, 50.0, 9.0], [0.0, 0.0, 1.0]])
    assert torch.equal(student.render(square, matrix, 24, 18), image)
    np.testing.assert_array_equal(student.render(square.tolist(), LENS, 24, 18), image.numpy())


def test_outputs_match_the_teachers(tmp_path: Path) -> None:
    student = load_student(write_run(tmp_path / "run", tiny_r2l(), has_depth=False))
    assert student.outputs == ("rgb", "accumulation")
    with pytest.raises(InputError, match="renders rgb, accumulation, not 'depth'"):
        student.render(probe_poses(student.model)[0], LENS, 4, 4, output="depth")


@pytest.mark.parametrize(
    ("camera", "said"),
    [
        ({"camera_to_world": np.eye(3)}, r"camera_to_world has the shape \[3, 3\]: pass \[3, 4\] or \[4, 4\]"),
        ({"camera_to_world": "here"}, "camera_to_world is not numeric"),
        ({"camera_to_world": np.full((3, 4), np.nan)}, "non-finite"),
        ({"intrinsics": [50.0, 50.0]}, "intrinsics has the shape"),
        ({"intrinsics": [0.0, 50.0, 1.0, 1.0]}, r"both focal lengths must be above 0 \(got 0 and 50"),
        ({"width": 0}, r"width must be a positive integer \(got 0\)"),
        ({"height": 2.5}, r"height must be a positive integer \(got 2.5\)"),
    ],
)
def test_invalid_cameras(run: Path, camera: dict, said: str) -> None:
    student = load_student(run)
    with pytest.raises(InputError, match=said):
        student.render(**{"camera_to_world": np.eye(4), "intrinsics": LENS, "width": 4, "height": 4, **camera})


def test_missing_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained run"):
        load_student(tmp_path / "nowhere" / "config.yml")


def test_run_of_another_method(tiny_teacher: Path) -> None:
    with pytest.raises(InputError, match="a 'nerfacto' run, not a student"):
        load_student(tiny_teacher)


def test_missing_step(run: Path) -> None:
    with pytest.raises(InputError, match=rf"no checkpoint of step 3 .*only of \[{STEP}\]"):
        load_student(run, step=3)


@pytest.mark.parametrize("damage", ["cut", "text", "no pipeline", "code"])
def test_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", tiny_r2l())
    (file,) = (config.parent / "nerfstudio_models").iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "text":
        file.write_text("weights")
    else:
        torch.save({"step": 7} if damage == "no pipeline" else {"step": 7, "pipeline": Path}, file)
    with pytest.raises(InputError, match="damaged or (not a checkpoint|holds more than tensors)"):
        load_student(config)


@pytest.mark.parametrize("change", ["one is missing", "another shape"])
def test_weights_of_another_student(change: str, tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", tiny_r2l())
    (file,) = (config.parent / "nerfstudio_models").iterdir()
    content = torch.load(file, weights_only=True)
    if change == "one is missing":
        del content["pipeline"]["_model.background"]
    else:
        content["pipeline"]["_model.network.tail.bias"] = torch.zeros(4)
    torch.save(content, file)
    with pytest.raises(InputError, match="does not fit the student"):
        load_student(config)


def test_runs_on_an_engine_by_name(run: Path) -> None:
    truth = load_student(run, device="cpu", engine="torch")
    pose = probe_poses(truth.model)[0]
    image = load_student(run, device="cpu", engine="onnxruntime").render(pose, LENS, 24, 18)
    assert torch.allclose(image, truth.render(pose, LENS, 24, 18), atol=1e-5)


@pytest.mark.parametrize(("engine", "said"), [("warp", "Unknown engine 'warp'"), ("tensorrt", "needs an NVIDIA GPU")])
def test_engine_that_cannot_run(engine: str, said: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=said):
        load_student(run, device="cpu", engine=engine)


def test_importing_the_package_stays_light() -> None:
    probe = "import sys, r2l_nerfstudio; print('torch' in sys.modules or 'nerfstudio' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr
    with pytest.raises(AttributeError):
        r2l_nerfstudio.nothing_of_this_name  # noqa: B018
