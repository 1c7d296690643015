"""Every example runs as its docstring says."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from student_runs import tiny_mobile_r2l, tiny_r2l, write_run

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
