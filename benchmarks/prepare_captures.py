"""Make the captures of the benchmarks from the files that their authors publish.

| capture | published as | folder in it |
|---|---|---|
| `lego_400` | NeRF-Synthetic (Mildenhall et al. 2020), `nerf_synthetic.zip` | `lego`: 800x800, averaged over 2x2 pixels |
| `fern_504` | LLFF (Mildenhall et al. 2019), `nerf_llff_data.zip` | `fern`: `images_8` and `poses_bounds.npy` |
| `fox_540` | instant-ngp (Müller et al. 2022), its repository | `data/nerf/fox`: 1080x1920, averaged over 2x2 pixels |
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image

from r2l_nerfstudio.atomic_output import atomic_folder
from r2l_nerfstudio.errors import InputError, one_line

CaptureName = Literal["lego", "fern", "fox"]

FOLDERS: dict[CaptureName, str] = {"lego": "lego_400", "fern": "fern_504", "fox": "fox_540"}
MARKS: dict[CaptureName, str] = {"lego": "transforms_train.json", "fern": "poses_bounds.npy", "fox": "transforms.json"}
"""File that shows where in an archive a capture lies."""
SHA256: dict[CaptureName, str] = {
    "lego": "268b0f7c6d738f1d57edee5446b4e3350542bdbb4fb1d29e5f121c6c5e6a25b3",
    "fern": "2638a019434ccbf33253b234219382dd386dc3dfe35c6e3267843826bd81f57e",
    "fox": "120f14e4797aa44dfcdcd6b65baef22f46ed37568274454b9a88555e93d785cc",
}
"""SHA-256 of all names and contents except license texts, as returned by `digest`."""
TEST_EVERY = 8
"""LLFF's split: the first of every eight views is a test view."""
JPEG_QUALITY = 95


@dataclass
class PrepareCaptures:
    """Make lego_400, fern_504 or fox_540, the captures behind the published figures, from its authors' files."""

    capture: tyro.conf.Positional[CaptureName]
    """Which capture."""
    source: tyro.conf.Positional[Path]
    """Downloaded archive (.zip, .tar, .tar.gz) or unpacked folder that holds it: nerf_synthetic.zip, nerf_llff_data.zip, or
    a checkout of instant-ngp."""
    data_dir: Path = Path("data")
    """Folder to write the capture's folder to."""
    accept_any: bool = False
    """Keep a capture whose checksum differs from that of the figures: other versions of Pillow may compress images to
    other bytes."""

    def main(self) -> None:
        """Write the capture and compare it with the checksum.

        Raises:
            InputError: the source holds no such capture or is damaged, the folder exists, or the checksum differs.
        """
        output = self.data_dir / FOLDERS[self.capture]
        make = {"lego": make_lego, "fern": make_fern, "fox": make_fox}[self.capture]
        with capture_in(self.source, self.capture) as folder:
            with atomic_folder(output, overwrite=False, mark=MARKS[self.capture], what="capture") as made:
                try:
                    make(folder, made)
                except (OSError, ValueError, KeyError, IndexError) as error:
                    raise InputError(
                        f"{self.source} is incomplete or damaged ({type(error).__name__}: {one_line(error)}): download it"
                        " again."
                    ) from error
                is_same = digest(made) == SHA256[self.capture]
                if not is_same and not self.accept_any:
                    raise InputError(
                        f"{output} would differ from the capture of the published figures: the source has other images, or"
                        " this version of Pillow compresses them to other bytes. Keep it with --accept-any."
                    )
        state = "equal to the capture of the published figures" if is_same else "not equal to that of the figures"
        CONSOLE.print(f"Written: {output}, {state}.", soft_wrap=True)


@contextmanager
def capture_in(source: Path, capture: CaptureName) -> Iterator[Path]:
    """Yield a capture's folder in a downloaded archive or folder; archives are unpacked for as long as the block runs.

    Raises:
        InputError: there is no such file, it is not an archive, or it does not contain the capture.
    """
    if source.is_dir():
        yield _marked(source, source, capture)
        return
    if not source.is_file():
        raise InputError(f"{source} does not exist: give the downloaded archive, or the folder it was unpacked to.")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _unpack(source, capture, Path(scratch))
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise InputError(f"{source} cannot be unpacked ({one_line(error)}): download it again.") from error
        yield _marked(Path(scratch), source, capture)


def _unpack(source: Path, capture: CaptureName, folder: Path) -> None:
    def is_wanted(name: str) -> bool:
        return f"/{capture}/" in f"/{name}" or Path(name).name in ("README.txt", "LICENSE.txt")

    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if is_wanted(name)])
        return
    with tarfile.open(source) as archive:
        archive.extractall(folder, [member for member in archive if is_wanted(member.name)], filter="data")


def _marked(root: Path, source: Path, capture: CaptureName) -> Path:
    if (root / MARKS[capture]).is_file():
        return root
    found = [path.parent for path in sorted(root.rglob(MARKS[capture])) if path.parent.name == capture]
    if not found:
        raise InputError(
            f"{source} holds no folder {capture} with a {MARKS[capture]}: give the archive of its authors."
        )
    return found[0]


def make_lego(source: Path, output: Path) -> None:
    """Write NeRF-Synthetic's lego at half resolution; every eighth test view stands for validation."""
    splits: dict[str, Any] = {
        split: json.loads((source / f"transforms_{split}.json").read_text()) for split in ("train", "test")
    }
    for split, transforms in splits.items():
        (output / split).mkdir()
        for frame in transforms["frames"]:
            name = f"{split}/{Path(frame['file_path']).name}.png"
            with Image.open(source / name) as image:
                _save_png(image.reduce(2), output / name)
    splits["val"] = {**splits["test"], "frames": splits["test"]["frames"][::TEST_EVERY]}
    for split, transforms in splits.items():
        _write_json(output / f"transforms_{split}.json", transforms)
    _copy_text(source.parent / "README.txt", output / "README_nerf_synthetic.txt")


def make_fern(source: Path, output: Path) -> None:
    """Write LLFF's fern from its images of an eighth of the resolution, with its poses in Nerfstudio's format."""
    poses = np.load(source / "poses_bounds.npy", allow_pickle=False)
    np.save(output / "poses_bounds.npy", poses)
    (output / "images").mkdir()
    names = sorted(path.name for path in (source / "images_8").glob("*.png"))
    if len(names) != len(poses):
        raise ValueError(f"{len(names)} images and {len(poses)} poses")
    for name in names:
        with Image.open(source / "images_8" / name) as image:
            _save_png(image.convert("RGB"), output / "images" / name)
    frames = []
    for name, row in zip(names, poses, strict=True):
        down, right, backward, position, (height, width, focal) = row[:15].reshape(3, 5).T
        matrix = np.stack([right, -down, backward, position], axis=-1)  # LLFF's axes are down, right, backward
        frames.append({"file_path": f"images/{name}", "transform_matrix": [*matrix.tolist(), [0.0, 0.0, 0.0, 1.0]]})
    transforms = {
        "camera_model": "OPENCV",
        "w": int(width) // 8,
        "h": int(height) // 8,
        "fl_x": float(focal) / 8,
        "fl_y": float(focal) / 8,
        "cx": float(width) / 16,
        "cy": float(height) / 16,
        **dict.fromkeys(("k1", "k2", "p1", "p2"), 0),
        "frames": frames,
    }
    paths = [frame["file_path"] for frame in frames]
    test, train = _split(paths)
    _write_json(
        output / "transforms.json",
        {**transforms, "train_filenames": train, "val_filenames": test, "test_filenames": test},
    )


def make_fox(source: Path, output: Path) -> None:
    """Write instant-ngp's fox at half resolution, with images of a half and a quarter of that."""
    transforms = json.loads((source / "transforms.json").read_text())
    frames = [frame for frame in transforms["frames"] if (source / frame["file_path"]).is_file()]
    for folder in ("images", "images_2", "images_4"):
        (output / folder).mkdir()
    for frame in frames:
        name = Path(frame["file_path"]).name
        with Image.open(source / "images" / name) as image:
            half = image.reduce(2)
        for folder, made in (("images", half), ("images_2", half.reduce(2)), ("images_4", half.reduce(4))):
            made.save(output / folder / name, quality=JPEG_QUALITY)
    halved = {key: transforms[key] / 2 for key in ("fl_x", "fl_y", "cx", "cy")}
    sizes = {key: int(transforms[key]) // 2 for key in ("w", "h")}
    test, train = _split([frame["file_path"] for frame in frames])
    _write_json(
        output / "transforms.json",
        {
            **transforms,
            **halved,
            **sizes,
            "frames": frames,
            "test_filenames": test,
            "val_filenames": test,
            "train_filenames": train,
        },
    )
    _copy_text(source.parents[2] / "LICENSE.txt", output / "LICENSE.txt")


def _split(paths: list[str]) -> tuple[list[str], list[str]]:
    """Return test and training views."""
    test = paths[::TEST_EVERY]
    return test, [path for path in paths if path not in test]


def _save_png(image: Image.Image, path: Path) -> None:
    image.info.clear()  # resolution and the renderer's notes
    image.save(path, optimize=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def _copy_text(source: Path, target: Path) -> None:
    if source.is_file():
        target.write_bytes(source.read_bytes())


def digest(folder: Path, is_counted: Callable[[Path], bool] = lambda path: path.suffix != ".txt") -> str:
    """Return the SHA-256 of the names and contents of a folder's files.

    Args:
        folder: to read.
        is_counted: which files count; all but license texts by default.
    """
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_counted(path):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return found.hexdigest()
