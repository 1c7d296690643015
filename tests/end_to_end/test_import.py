"""Published students in Nerfstudio: rendered, evaluated and fine-tuned by its tools, distilled by the `-paper` methods."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distil import distil, student_config
from nerfstudio.scripts.eval import ComputePSNR
from nerfstudio.scripts.render import DatasetRender
from PIL import Image
from published_files import mobile_weights, r2l_weights, write_tar
from teachers import train_teacher, write_blender_capture

from r2l_nerfstudio import load_student
from r2l_nerfstudio.importing.published_network import read_tar
from r2l_nerfstudio.importing.reference_picture import published_picture
from r2l_nerfstudio.models import metrics
from r2l_nerfstudio.scripts.import_checkpoint import ImportCheckpoint


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ball in the format of NeRF-Synthetic, seen from distance 4. Read only."""
    return write_blender_capture(tmp_path_factory.mktemp("captures") / "ball")


@pytest.fixture(scope="module")
def teacher(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yml of a tiny nerfacto of that capture."""
    return train_teacher("nerfacto", capture, tmp_path_factory.mktemp("teachers"), iterations=30)


WEIGHTS = {"r2l": r2l_weights, "mobile-r2l": mobile_weights}


@pytest.fixture(scope="module", params=["r2l", "mobile-r2l"])
def run(request: pytest.FixtureRequest, capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yml of an imported student, its file beside the outputs. Read only."""
    place = tmp_path_factory.mktemp("imported")
    file = write_tar(place / "published.tar", WEIGHTS[request.param]())
    cells = (6, 6) if request.param == "mobile-r2l" else None
    ImportCheckpoint(file, capture, output_dir=place / "outputs", cells=cells).main()
    (config,) = (place / "outputs").rglob("config.yml")
    return config


def test_nerfstudio_renders_and_evaluates_an_imported_student(
    run: Path, capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "lpips", lambda image, truth, network="alex": None)
    DatasetRender(
        load_config=run,
        output_path=tmp_path / "images",
        split="train",
        rendered_output_names=["rgb"],
        image_format="png",
    ).main()
    network = read_tar(run.parents[4] / "published.tar")
    frames = json.loads((capture / "transforms_train.json").read_text())["frames"]
    for index in (0, 3):
        pose = torch.tensor(frames[index]["transform_matrix"])[:3]
        truth = published_picture(network, pose, 24, 24, 24.0, 2.0, 6.0, is_ndc=False).numpy()
        (file,) = (tmp_path / "images").rglob(f"r_{index}.png")
        assert truth.std() > 0.02
        assert np.abs(np.asarray(Image.open(file)) / 255 - truth).max() < 0.51 / 255
    ComputePSNR(load_config=run, output_path=tmp_path / "metrics.json").main()
    assert math.isfinite(json.loads((tmp_path / "metrics.json").read_text())["results"]["psnr"])


@pytest.fixture
def own_frame(run: Path) -> Path:
    """Where `--load-dir` finds the imported student."""
    return run.parent / "nerfstudio_models"


def test_an_imported_student_is_fine_tuned(run: Path, own_frame: Path, teacher: Path, tmp_path: Path) -> None:
    """By the method of its kind, without repeating its settings."""
    method = "mobile-r2l" if "mobile" in str(run) else "r2l"
    config = student_config(teacher, tmp_path, method, load_dir=own_frame)
    folder = distil(config)
    before, after = (load_student(path, device="cpu", engine="torch").model for path in (run, folder))
    assert after.config.published_rays and after.config.width == 8
    assert after.ray_encoding.conventions == before.ray_encoding.conventions
    assert (float(after.ray_encoding.near), float(after.ray_encoding.far)) == (2.0, 6.0)
    moved = (after.network.head.weight - before.network.head.weight).abs().max()
    assert 0 < float(moved) < 0.2


def test_fine_tuning_in_another_frame_is_refused(
    run: Path, own_frame: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = Path(shutil.copytree(own_frame.parent, tmp_path / "other"))
    transforms = other / "dataparser_transforms.json"
    content = json.loads(transforms.read_text())
    transforms.write_text(json.dumps({**content, "scale": 2 * content["scale"]}))
    method = "mobile-r2l" if "mobile" in str(run) else "r2l"
    config = student_config(teacher, tmp_path / "students", method, load_dir=other / "nerfstudio_models")
    with pytest.raises(SystemExit):
        distil(config)
    assert "another frame" in " ".join(capsys.readouterr().out.split())


def test_fine_tuning_by_a_method_of_the_other_kind_is_refused(
    run: Path, own_frame: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    method = "r2l" if "mobile" in str(run) else "mobile-r2l"
    with pytest.raises(SystemExit):
        distil(student_config(teacher, tmp_path / "students", method, load_dir=own_frame))
    assert "cannot resume" in " ".join(capsys.readouterr().out.split())


PAPER = {
    "r2l-paper": {"pipeline.datamanager.hard_pool_batches": 3},
    "mobile-r2l-paper": {"pipeline.datamanager.whole_images": 2, "pipeline.datamanager.photo_iterations": 0},
}


@pytest.mark.parametrize("method", PAPER)
def test_the_paper_methods_distil(method: str, teacher: Path, tmp_path: Path) -> None:
    folder = distil(student_config(teacher, tmp_path, method, **PAPER[method]))
    student = load_student(folder, device="cpu", engine="torch")
    encoding = student.model.ray_encoding
    assert student.outputs == ("rgb",) and student.model.network.tail.bias.shape == (3,)
    assert encoding.conventions.is_planar and not encoding.is_contracted and encoding.conventions.ndc is None
    assert encoding.conventions.pixel_offset == (0.5 if "mobile" in method else 0.0)
    assert (float(encoding.near), float(encoding.far)) == (2.0, 6.0)
    # The capture's own coordinates are Blender's.
    assert torch.allclose(encoding.frame, torch.eye(3, 4), atol=1e-5)
    rgb = student.render(np.eye(4)[:3], [24.0, 24.0, 12.0, 12.0], 24, 24)
    assert rgb.shape == (24, 24, 3) and np.isfinite(rgb).all()
