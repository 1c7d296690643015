"""`ns-render` along a camera path, by every engine that runs without a GPU and without a compiler."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ENGINES = ["torch", "onnxruntime", "openvino"]
"""Not inductor, which compiles for a quarter of a minute: `test_engines` has it."""
SIDE = 16
TURN = 1.0
"""In radians, around the image's vertical, from one frame to the next."""


@pytest.fixture
def camera_path(tmp_path: Path) -> Path:
    """Two frames as the viewer writes them: one straight down on the origin, and one aside from the same place."""
    frames = []
    for turn in (0.0, TURN):
        cos, sin = np.cos(turn), np.sin(turn)
        frames.append(np.array([[cos, 0, sin, 0], [0, 1, 0, 0], [-sin, 0, cos, 1], [0, 0, 0, 1]]))
    path = {
        "camera_type": "perspective",
        "render_width": SIDE,
        "render_height": SIDE,
        "seconds": 1.0,
        "camera_path": [{"camera_to_world": pose.flatten().tolist(), "fov": 60.0} for pose in frames],
    }
    file = tmp_path / "camera_path.json"
    file.write_text(json.dumps(path))
    return file


@pytest.mark.parametrize("student", ["tiny_student", "tiny_mobile_student"])
def test_every_engine_renders_the_same_camera_path(
    student: str, request: pytest.FixtureRequest, camera_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    from nerfstudio.scripts.render import RenderCameraPath

    if shutil.which("ffmpeg") is None:  # `ns-render` insists on it, even for images
        (pytest.fail if os.environ.get("CI") else pytest.skip)("ffmpeg is not installed: apt-get install ffmpeg")
    text = (request.getfixturevalue(student) / "config.yml").read_text()
    pictures: dict[str, list[np.ndarray]] = {}
    for name in ENGINES:
        config = tmp_path / "config.yml"
        config.write_text(text.replace("engine: auto", f"engine: {name}"))
        RenderCameraPath(
            load_config=config,
            output_path=tmp_path / name,
            image_format="png",
            rendered_output_names=["rgb"],
            camera_path_filename=camera_path,
            output_format="images",
        ).main()
        assert f"Engine: {name} fp32" in capsys.readouterr().out, f"{name} drew nothing"
        pictures[name] = [np.asarray(Image.open(file), int) for file in sorted((tmp_path / name).glob("*.png"))]
    first, second = pictures["torch"]
    assert first.shape == (SIDE, SIDE, 3)
    assert np.abs(first - second).max() > 8, "both frames are one picture"
    for name, frames in pictures.items():
        for frame, expected in zip(frames, pictures["torch"], strict=True):
            assert np.abs(frame - expected).max() <= 1, name
