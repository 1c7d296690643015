"""Input that `ns-train r2l` cannot use: one paragraph, exit code 1, and no run that appears finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from distil import distil, student_config
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from teachers import train_teacher, write_capture

from r2l_nerfstudio.distillation.frame_check import check_frame
from r2l_nerfstudio.distillation.pose_sampling import PoseSamplerConfig
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.rays.ray_encoding import RayEncoding
from r2l_nerfstudio.teacher import TeacherOutputs


@pytest.fixture
def run(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher's run, to be damaged."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


@pytest.fixture
def capture(tiny_capture: Path, tmp_path: Path) -> Path:
    """A copy of the tiny capture, to be damaged."""
    return Path(shutil.copytree(tiny_capture, tmp_path / "capture"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """A function that trains a tiny student, sees it refused, and returns the paragraph that says why."""

    def refuse(teacher: Path | None, **overrides: Any) -> str:
        return refuse_config(student_config(teacher, tmp_path / "students", **overrides))

    def refuse_config(config: DistillationTrainerConfig) -> str:
        with pytest.raises(SystemExit) as caught:
            distil(config)
        assert caught.value.code == 1
        *_, last = capsys.readouterr().out.rstrip().splitlines()
        assert last.startswith("Error: ")
        assert not list((tmp_path / "students").rglob("config.yml"))
        assert not list((tmp_path / "students").rglob("*.ckpt"))
        return last

    refuse.config = refuse_config
    return refuse


def edit(file: Path, old: str, new: str) -> None:
    """Replace text that must be there."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# The teacher.


def test_missing_teacher_option(refused) -> None:
    assert "--teacher" in refused(None)


def test_missing_teacher(refused, tmp_path: Path) -> None:
    message = refused(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "config.yml" in message


def test_missing_checkpoint(refused, run: Path) -> None:
    shutil.rmtree(run / "nerfstudio_models")
    message = refused(run)
    assert str(run / "nerfstudio_models") in message and "Train it" in message


def test_truncated_checkpoint(refused, run: Path) -> None:
    (file,) = (run / "nerfstudio_models").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    message = refused(run)
    assert str(file) in message and "truncated" in message and "train the teacher again" in message


def test_checkpoint_of_another_model(refused, run: Path) -> None:
    edit(run / "config.yml", "hidden_dim_color: 16", "hidden_dim_color: 24")
    message = refused(run)
    assert "step-000000029.ckpt" in message and "does not fit" in message and "another run" in message


def test_configuration_that_would_run_code(refused, run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with (run / "config.yml").open("a") as file:
        file.write(f"evil: !!python/object/apply:os.system [touch {mark}]\n")
    message = refused(run)
    assert str(run / "config.yml") in message and "os.system" in message and "ns-train wrote" in message
    assert not mark.exists()


def test_method_that_is_not_installed(refused, run: Path) -> None:
    edit(run / "config.yml", "nerfstudio.models.nerfacto.", "absent_method.model.")
    message = refused(run)
    assert str(run / "config.yml") in message and "Install that package" in message and "absent_method" in message


@dataclass
class ColorlessModelConfig(NerfactoModelConfig):
    _target: type = field(default_factory=lambda: ColorlessModel)


class ColorlessModel(NerfactoModel):
    """Sees where things are, not what they look like."""

    def get_outputs_for_camera(self, camera: Cameras, obb_box=None) -> dict[str, torch.Tensor]:
        outputs = super().get_outputs_for_camera(camera, obb_box)
        return {"depth": outputs["depth"], "thermal": outputs["accumulation"]}


def test_teacher_without_color(refused, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(run / "config.yml", "nerfstudio.models.nerfacto.Nerfacto", f"{__name__}.Colorless")
    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", f"colorless={__name__}:method")
    message = refused(run)
    assert str(run / "config.yml") in message and "depth, thermal" in message and "Choose a teacher" in message


def test_untrained_teacher(refused, run: Path) -> None:
    (file,) = (run / "nerfstudio_models").iterdir()
    content = torch.load(file, weights_only=False)  # nerfacto's schedulers put numpy scalars there
    for key, value in content["pipeline"].items():
        if key.startswith("_model.field.mlp_head."):
            value.zero_()  # gray wherever it looks
    torch.save(content, file)
    message = refused(run, **{"pipeline.check_frame": True})
    assert str(run) in message and "--data" in message and "--pipeline.check-frame False" in message


# The capture.


def test_missing_capture(refused, tiny_teacher: Path, tmp_path: Path) -> None:
    message = refused(tiny_teacher, data=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "--data" in message


def test_capture_in_another_frame(refused, tiny_teacher: Path, tmp_path: Path) -> None:
    other = write_capture(tmp_path / "other", distance=2.1)
    message = refused(tiny_teacher, data=other)
    assert str(other) in message and "different frames" in message and "--data" in message


def test_missing_training_images(refused, tiny_teacher: Path, capture: Path) -> None:
    for name in ("002.png", "005.png"):
        (capture / "images" / name).unlink()
    message = refused(tiny_teacher, data=capture)
    assert str(capture / "images" / "002.png") in message and "lacks 2 of its 6" in message and "--data" in message


def test_missing_evaluation_image(refused, tiny_teacher: Path, capture: Path) -> None:
    (capture / "images" / "004.png").unlink()
    message = refused(tiny_teacher, data=capture)
    assert str(capture / "images" / "004.png") in message and "--data" in message


@pytest.mark.parametrize("name", ["001.png", "004.png"])  # one of training, one of evaluation
def test_image_cut_short(name: str, refused, tiny_teacher: Path, capture: Path) -> None:
    file = capture / "images" / name
    file.write_bytes(file.read_bytes()[:100])
    message = refused(tiny_teacher, data=capture)
    assert str(capture) in message and "--data" in message


def test_damaged_transforms(refused, tiny_teacher: Path, capture: Path) -> None:
    (capture / "transforms.json").write_text((capture / "transforms.json").read_text()[:300])
    message = refused(tiny_teacher, data=capture)
    assert str(capture) in message and "--data" in message


class PhotoTeacher:
    """Shows each training camera the photo of the one `shift` further."""

    config_path = Path("teacher/config.yml")
    views_only = False

    def __init__(self, dataset: InputDataset, shift: int) -> None:
        self.dataset, self.shift = dataset, shift
        self.dataparser_outputs = dataset._dataparser_outputs

    def view(self, camera: Cameras) -> TeacherOutputs:
        distances = (self.dataset.cameras.camera_to_worlds - camera.camera_to_worlds).flatten(1).norm(dim=-1)
        index = (int(distances.argmin()) + self.shift) % len(self.dataset)
        return TeacherOutputs(self.dataset.get_image_float32(index), None, None)


@pytest.mark.parametrize("shift", [0, 2, 3])
def test_photos_of_another_place(shift: int, tiny_capture: Path) -> None:
    outputs = NerfstudioDataParserConfig(data=tiny_capture).setup().get_dataparser_outputs("train")
    dataset = InputDataset(outputs)
    teacher = PhotoTeacher(dataset, shift)
    if shift == 0:
        check_frame(teacher, dataset, torch.ones(3))
        return
    with pytest.raises(InputError, match="no better than from others") as caught:
        check_frame(teacher, dataset, torch.ones(3))
    assert "--data" in str(caught.value) and str(tiny_capture) in str(caught.value)


# Options.


def test_no_view_left_after_the_hold_out(refused, tiny_teacher: Path) -> None:
    message = refused(tiny_teacher, **{"pipeline.datamanager.held_out_fraction": 1.0})
    assert "No training view is left" in message and "--pipeline.datamanager.held-out-fraction" in message


# Set behind the parser's back, as a configuration file read with --load-config does.
@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ("pipeline.model.ray_encoding", "--pipeline.model.ray-encoding"),
        ("pipeline.model.spacing", "--pipeline.model.spacing"),
        ("pipeline.datamanager.pose_sampler.kind", "--pipeline.datamanager.pose-sampler.kind"),
    ],
)
def test_unknown_option_values(option: str, flag: str, refused, tiny_teacher: Path) -> None:
    message = refused(tiny_teacher, **{option: "spiral"})
    assert "'spiral'" in message and flag in message


def test_unknown_option_values_in_python() -> None:
    with pytest.raises(InputError, match="--pipeline.datamanager.pose-sampler.kind from auto, neighbour, sphere, box"):
        PoseSamplerConfig(kind="spiral")
    with pytest.raises(InputError, match="--pipeline.model.ray-encoding from points, plucker, two-plane"):
        RayEncoding("spiral")


@pytest.mark.parametrize(
    ("flag", "known"),
    [
        ("--pipeline.model.ray-encoding", "two-plane"),
        ("--pipeline.model.spacing", "disparity"),
        ("--pipeline.datamanager.pose-sampler.kind", "neighbour"),
    ],
)
def test_unknown_option_values_on_the_command_line(flag: str, known: str, capsys: pytest.CaptureFixture) -> None:
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    with pytest.raises(SystemExit) as caught:
        tyro.cli(AnnotatedBaseConfigUnion, args=["r2l", "--teacher", "run", flag, "spiral"])
    assert caught.value.code != 0
    said = "".join(capsys.readouterr())
    assert flag in said and "spiral" in said and known in said


def test_odd_number_of_layers(refused, tiny_teacher: Path) -> None:
    assert "--pipeline.model.depth must be an even number of at least 4 (got 5)" in refused(
        tiny_teacher, **{"pipeline.model.depth": 5}
    )


@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_no_checkpoint_to_resume_from(what: str, refused, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    if what == "empty":
        folder.mkdir()
    elif what == "file":
        folder.write_text("")
    message = refused(tiny_teacher, load_dir=folder)
    assert f"--load-dir {folder}" in message and "nerfstudio_models" in message


def test_resuming_from_another_student(refused, tiny_teacher: Path, tmp_path: Path) -> None:
    wider = distil(student_config(tiny_teacher, tmp_path / "wider", **{"pipeline.model.width": 24}))
    message = refused(tiny_teacher, load_dir=wider / "nerfstudio_models")
    assert "network.head.weight" in message and "--load-dir" in message and "--pipeline.model" in message


def test_resuming_from_a_truncated_checkpoint(refused, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-000000010.ckpt").write_bytes(b"PK")
    message = refused(tiny_teacher, load_dir=folder)
    assert str(folder) in message and "--load-dir" in message


# Students of whole images.


def test_impossible_upsampling_factor(refused, tiny_teacher: Path, tmp_path: Path) -> None:
    config = student_config(
        tiny_teacher, tmp_path / "students", "mobile-r2l-lite", **{"pipeline.model.upsampling_factor": 5}
    )
    assert "--pipeline.model.upsampling-factor must be one of 2, 3, 4, 6, 8, 12, 16 (got 5)" in refused.config(config)


def test_views_smaller_than_a_cell(refused, tiny_teacher: Path, tmp_path: Path) -> None:
    overrides = {"pipeline.model.upsampling_factor": 12, "pipeline.datamanager.view_downscale": 3.0}
    config = student_config(tiny_teacher, tmp_path / "students", "mobile-r2l-lite", **overrides)
    said = refused.config(config)
    assert "8x8" in said and "--pipeline.datamanager.view-downscale" in said


def test_lens_that_cannot_be_undistorted(refused, capture: Path, tmp_path: Path) -> None:
    edit(capture / "transforms.json", '"w"', '"camera_model": "EQUIRECTANGULAR", "w"')
    teacher = train_teacher("nerfacto", capture, tmp_path / "runs", iterations=2)
    config = student_config(teacher, tmp_path / "students", "mobile-r2l-lite")
    assert "--pipeline.datamanager.photo-iterations 0" in refused.config(config)


@pytest.mark.parametrize(
    "option", ["photo_fraction", "hard_fraction", "held_out_fraction", "foreground_fraction", "refresh_share"]
)
def test_shares_out_of_range(option: str, refused, tiny_teacher: Path) -> None:
    said = refused(tiny_teacher, **{f"pipeline.datamanager.{option}": 1.5})
    assert f"--pipeline.datamanager.{option.replace('_', '-')} must be between 0 and 1 (got 1.5)" in said
