"""Photos of the scene, written as an ordinary Nerfstudio capture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from PIL import Image
from torch import Tensor

from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.scene.procedural import Scene

RADIUS = 3.0
"""Distance of the cameras from the origin, world units."""
ELEVATION = (12.0, 62.0)
"""Lowest and highest camera, degrees above the horizon."""
FOCAL = 1.4
"""Focal length in image widths: the object just fits."""
SCENE_VERSION = 1
"""Version of the scene, increased when it changes, so that captures of the old scene are not reused."""


def _look_at_origin(eyes: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 4"]:
    back = torch.nn.functional.normalize(eyes, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(eyes.new_tensor([[0.0, 0.0, 1.0]]), back), dim=-1)
    up = torch.linalg.cross(back, right)
    return torch.stack([right, up, back, eyes], -1)


def band_poses(num: int, seed: int, spiral: bool = False) -> Float[Tensor, "n 3 4"]:
    """Return cameras on a band of the upper hemisphere, looking at the origin.

    Args:
        num: number of cameras.
        seed: seed of the generator; the same cameras every time.
        spiral: spread them evenly along a spiral, slightly jittered (like a careful photographer), instead of uniformly
            over the band's area.

    Returns:
        Camera-to-world matrices, world frame, OpenGL convention.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(num, 2, generator=generator)
    if spiral:
        golden = math.pi * (3 - math.sqrt(5))
        index = torch.arange(num)
        azimuth = index * golden + 0.3 * (draw[:, 0] - 0.5)
        share = (index + draw[:, 1]) / num
    else:
        azimuth, share = 2 * math.pi * draw[:, 0], draw[:, 1]
    low, high = (math.sin(math.radians(angle)) for angle in ELEVATION)
    height = low + (high - low) * share
    flat = (1 - height**2).sqrt()
    return _look_at_origin(RADIUS * torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), height], -1))


def band_cameras(poses: Float[Tensor, "n 3 4"], size: int) -> Cameras:
    """Return the capture's camera at other poses: square pinhole images of `size` pixels."""
    return Cameras(
        camera_to_worlds=poses,
        fx=FOCAL * size,
        fy=FOCAL * size,
        cx=size / 2,
        cy=size / 2,
        width=size,
        height=size,
        camera_type=CameraType.PERSPECTIVE,
    )


def write_capture(
    folder: Path,
    num_train: int = 60,
    num_test: int = 6,
    size: int = 96,
    seed: int = 0,
    overwrite: bool = False,
    scene: Scene | None = None,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write photos and `transforms.json`, unless they already exist.

    `transforms.json` is written last and atomically: an interrupted capture has none, and is written again. Test photos
    are at random poses of the same band and serve as both the `val` and the `test` split of Nerfstudio.

    Args:
        folder: folder to write; created if missing.
        num_train: number of training photos.
        num_test: number of test photos.
        size: width and height in pixels.
        seed: seed of the poses.
        overwrite: replace a complete capture of this scene, even with other settings.
        scene: another scene than the default one, with a name that tells its captures apart.
        on_picture: called after each photo with the number of finished photos and of all photos.

    Returns:
        The folder.

    Raises:
        InputError: if the folder holds anything but a capture written here with the same settings.
    """
    settings: dict[str, int | str] = {
        "version": SCENE_VERSION,
        "num_train": num_train,
        "num_test": num_test,
        "size": size,
        "seed": seed,
    }
    if scene is not None:
        settings["scene"] = scene.name
    transforms = folder / "transforms.json"
    if _is_complete(folder, settings) and not overwrite:
        return folder
    _refuse_foreign(folder, settings, overwrite)
    transforms.unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for stale in (folder / "images").glob("*.png"):
        stale.unlink()

    poses = torch.cat([band_poses(num_train, seed, spiral=True), band_poses(num_test, seed + 1)])
    names = [f"images/train_{i:03d}.png" for i in range(num_train)]
    names += [f"images/test_{i:03d}.png" for i in range(num_test)]
    scene = scene or Scene()
    cameras = band_cameras(poses, size)
    for i, file in enumerate(names):
        rgb = scene.render(cameras[i]).rgb
        Image.fromarray((rgb * 255).round().to(torch.uint8).numpy()).save(folder / file)
        on_picture(i + 1, len(names))

    pictures = [
        {"file_path": name, "transform_matrix": [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]}
        for name, pose in zip(names, poses, strict=True)
    ]
    text = json.dumps(
        {
            "camera_model": "OPENCV",
            "fl_x": FOCAL * size,
            "fl_y": FOCAL * size,
            "cx": size / 2,
            "cy": size / 2,
            "w": size,
            "h": size,
            "train_filenames": names[:num_train],
            "val_filenames": names[num_train:],
            "test_filenames": names[num_train:],
            "procedural_scene": settings,
            "frames": pictures,
        },
        indent=1,
    )
    write_atomically(transforms, text)
    return folder


def _read_settings(folder: Path) -> dict | None:
    """Return the settings that an earlier `write_capture` saved in the folder, {} for another capture, None for
    none."""
    transforms = folder / "transforms.json"
    if not transforms.exists():
        return None
    try:
        return json.loads(transforms.read_text(encoding="utf-8")).get("procedural_scene", {})
    except (ValueError, AttributeError):
        return {}


def _is_complete(folder: Path, settings: dict) -> bool:
    if _read_settings(folder) != settings:
        return False
    meta = json.loads((folder / "transforms.json").read_text(encoding="utf-8"))
    return all((folder / frame["file_path"]).is_file() for frame in meta["frames"])


def _refuse_foreign(folder: Path, settings: dict, overwrite: bool) -> None:
    """Refuse to replace anything that was not written here."""
    if not folder.exists():
        return
    found = _read_settings(folder)
    ours = {"images", "transforms.json", "transforms.json.partial"}
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    strangers += [path.name for path in (folder / "images").glob("*") if path.suffix != ".png"]
    if found == {} or strangers:
        raise InputError(
            f"{folder} is not a capture of the procedural scene"
            + (f" (it holds {', '.join(strangers[:3])})" if strangers else "")
            + ", so nothing was written there. Give another folder, or empty this one."
        )
    if found not in (None, settings) and not overwrite:
        raise InputError(
            f"{folder} holds a capture of the procedural scene with other settings ({found}; wanted {settings}). Give"
            " another folder, or pass --force to write it again."
        )
