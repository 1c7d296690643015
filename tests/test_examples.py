"""Every example runs as described in its docstring."""

from __future__ import annotations

import copy
import importlib
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from distil import distil, own_writers, shrunk
from PIL import Image
from student_runs import tiny_mobile_r2l, tiny_r2l, write_run

from r2l_nerfstudio import load_student

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that runs an example with command-line arguments."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_every_example_has_a_test() -> None:
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested] == []


def test_render_student(example: Callable[..., None], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_r2l())
    example("render_student.py", run, tmp_path / "render.png", 24)
    with Image.open(tmp_path / "render.png") as image:
        assert image.size == (24, 24) and len(image.getcolors(576) or []) > 10


def test_camera_path_video(example: Callable[..., None], tmp_path: Path) -> None:
    if shutil.which("ffmpeg") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("FFmpeg is not installed")
    run = write_run(tmp_path / "run", tiny_mobile_r2l())
    example("camera_path_video.py", run, tmp_path / "turn.mp4", 3, 32)
    assert (tmp_path / "turn.mp4").stat().st_size > 500


def test_embed_page(example: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("the exported page")
    example("embed_page.py", tmp_path / "page", tmp_path / "site" / "index.html")
    assert 'src="student/?plain#' in (tmp_path / "site" / "index.html").read_text()
    assert (tmp_path / "site" / "student" / "index.html").read_text() == "the exported page"
    with pytest.raises(SystemExit, match="holds no exported page"):
        example("embed_page.py", tmp_path / "site" / "nowhere", tmp_path / "other" / "index.html")


def test_custom_ray_encoding(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", "r2l-harmonics=custom_ray_encoding:method")
    method = importlib.import_module(Path("custom_ray_encoding.py").stem).method
    overrides = {"teacher": tiny_teacher, "output_dir": tmp_path, "max_num_iterations": 3}
    run = distil(shrunk(copy.deepcopy(method.config), "r2l-harmonics", **overrides))
    student = load_student(run, device="cpu")
    model = student.model
    assert model.network.in_dim == model.ray_encoding.dim + 16
    origins, directions = torch.zeros(1, 3), torch.tensor([[0.6, 0.0, 0.8]])
    encoded = model.encode(origins, directions)
    # The first harmonics: a constant, then multiples of the direction's y, z and x.
    torch.testing.assert_close(encoded[0, -16:-12], torch.tensor([0.28209, 0.0, 0.48860 * 0.8, 0.48860 * 0.6]))
    assert np.isfinite(student.render(np.eye(4)[:3], [20, 20, 8, 6], 16, 12)).all()


PLUGIN = """
from dataclasses import dataclass, field

from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.plugins.types import MethodSpecification


@dataclass
class OtherModelConfig(NerfactoModelConfig):
    _target: type = field(default_factory=lambda: OtherModel)


class OtherModel(NerfactoModel):
    pass


method = MethodSpecification(TrainerConfig(method_name="other"), "a method of another plugin")
"""


def test_distil_from_a_teacher_of_another_plugin(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", "other=other_plugin:method")
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    text = (teacher / "config.yml").read_text()
    assert "nerfstudio.models.nerfacto.Nerfacto" in text
    (teacher / "config.yml").write_text(text.replace("nerfstudio.models.nerfacto.Nerfacto", "other_plugin.Other"))
    functions = runpy.run_path(str(EXAMPLES / "distil_any_teacher.py"))
    config = functions["student_config"](teacher, tmp_path / "outputs")
    assert config.teacher == teacher and config.max_minutes == 20
    with own_writers():
        run = functions["distil"](shrunk(config, "r2l-lite", max_minutes=None, max_num_iterations=3))
    assert load_student(run, device="cpu").outputs == ("rgb", "accumulation", "depth")
