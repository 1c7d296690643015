"""The benchmark captures, made from archives like those that their authors publish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import prepare_captures
from benchmarks.prepare_captures import CaptureName, PrepareCaptures, digest
from r2l_nerfstudio.errors import InputError

RANDOM = np.random.default_rng(0)
POSE = [[1.0, 0.0, 0.0, 0.1], [0.0, 1.0, 0.0, 0.2], [0.0, 0.0, 1.0, 4.0], [0.0, 0.0, 0.0, 1.0]]


def picture(path: Path, width: int, height: int, mode: str = "RGB") -> np.ndarray:
    """Write random pixels and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path, dpi=(72, 72))
    return pixels


def lego(root: Path) -> None:
    for split, number in (("train", 2), ("test", 9)):
        frames = [{"file_path": f"./{split}/r_{index}", "transform_matrix": POSE} for index in range(number)]
        for index in range(number):
            picture(root / f"nerf_synthetic/lego/{split}/r_{index}.png", 8, 8, "RGBA")
        content = {"camera_angle_x": 0.7, "frames": frames}
        (root / f"nerf_synthetic/lego/transforms_{split}.json").write_text(json.dumps(content))
    (root / "nerf_synthetic/README.txt").write_text("Licenses")


def fern(root: Path) -> None:
    rows = []
    for index in range(9):
        picture(root / f"nerf_llff_data/fern/images_8/image{index:03d}.png", 8, 6)
        matrix = np.column_stack(
            [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.1, 0.2, 4.0], [48.0, 64.0, 80.0]]
        )
        rows.append(np.append(matrix.flatten(), [1.0, 9.0]))
    np.save(root / "nerf_llff_data/fern/poses_bounds.npy", np.array(rows))


def fox(root: Path) -> None:
    folder = root / "instant-ngp/data/nerf/fox"
    for index in range(9):
        picture(folder / f"images/{index:04d}.jpg", 16, 32)
    frames = [{"file_path": f"images/{index:04d}.jpg", "transform_matrix": POSE} for index in range(11)]
    sizes = {"w": 16.0, "h": 32.0, "fl_x": 20.5, "fl_y": 21.5, "cx": 8.5, "cy": 15.5, "k1": 0.1}
    (folder / "transforms.json").write_text(json.dumps({**sizes, "frames": frames}))
    (root / "instant-ngp/LICENSE.txt").write_text("License")


@pytest.mark.parametrize("kind", ["zip", "gztar", "folder"])
@pytest.mark.parametrize(("name", "publish"), [("lego", lego), ("fern", fern), ("fox", fox)])
def test_a_capture_is_written_and_checked(
    name: CaptureName, publish, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source = tmp_path / "published"
    publish(source)
    if kind != "folder":
        source = Path(shutil.make_archive(str(tmp_path / "archive"), kind, source))
    made = tmp_path / "data" / prepare_captures.FOLDERS[name]
    with pytest.raises(InputError, match="--accept-any"):
        PrepareCaptures(name, source, tmp_path / "data").main()
    assert not made.exists()
    PrepareCaptures(name, source, tmp_path / "data", accept_any=True).main()
    assert "not equal" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setitem(prepare_captures.SHA256, name, digest(made))
    PrepareCaptures(name, source, tmp_path / "again").main()
    assert "equal to the capture of the published figures" in " ".join(capsys.readouterr().out.split())


def test_lego_is_averaged_over_two_by_two_pixels(tmp_path: Path) -> None:
    lego(tmp_path)
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[::2, ::2, :3] = 55
    Image.fromarray(pixels, "RGBA").save(tmp_path / "nerf_synthetic/lego/train/r_0.png")
    PrepareCaptures("lego", tmp_path, tmp_path / "data", accept_any=True).main()
    folder = tmp_path / "data" / "lego_400"
    with Image.open(folder / "train/r_0.png") as image:
        assert image.size == (4, 4) and not image.info
        assert (np.asarray(image)[..., :3] == 205).all()
    validation = json.loads((folder / "transforms_val.json").read_text())
    assert [frame["file_path"] for frame in validation["frames"]] == ["./test/r_0", "./test/r_8"]
    assert (folder / "README_nerf_synthetic.txt").read_text() == "Licenses"


def test_poses_of_fern_in_nerfstudios_axes(tmp_path: Path) -> None:
    fern(tmp_path)
    PrepareCaptures("fern", tmp_path, tmp_path / "data", accept_any=True).main()
    found = json.loads((tmp_path / "data/fern_504/transforms.json").read_text())
    assert found["frames"][3] == {"file_path": "images/image003.png", "transform_matrix": POSE}
    assert (found["w"], found["h"], found["fl_x"], found["cx"], found["cy"]) == (8, 6, 10.0, 4.0, 3.0)
    assert found["test_filenames"] == found["val_filenames"] == ["images/image000.png", "images/image008.png"]
    assert len(found["train_filenames"]) == 7


def test_fox_keeps_only_frames_with_an_image(tmp_path: Path) -> None:
    fox(tmp_path)
    PrepareCaptures("fox", tmp_path, tmp_path / "data", accept_any=True).main()
    folder = tmp_path / "data" / "fox_540"
    found = json.loads((folder / "transforms.json").read_text())
    assert len(found["frames"]) == 9 and (found["w"], found["h"]) == (8, 16)
    assert (found["fl_x"], found["cy"], found["k1"]) == (10.25, 7.75, 0.1)
    for name, size in (("images", (8, 16)), ("images_2", (4, 8)), ("images_4", (2, 4))):
        with Image.open(folder / name / "0003.jpg") as image:
            assert image.size == size
    assert (folder / "LICENSE.txt").read_text() == "License"


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    fern(tmp_path / "other")
    for source, message in (
        (tmp_path / "absent.zip", "does not exist"),
        (tmp_path / "broken.zip", "cannot be unpacked"),
        (tmp_path / "other", "holds no folder lego"),
    ):
        with pytest.raises(InputError, match=message):
            PrepareCaptures("lego", source, tmp_path / "data").main()
    (tmp_path / "other/nerf_llff_data/fern/images_8/image004.png").unlink()
    with pytest.raises(InputError, match="incomplete or damaged"):
        PrepareCaptures("fern", tmp_path / "other", tmp_path / "data").main()
    assert not list((tmp_path / "data").iterdir())
