"""Small captures with the cameras of the published images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

BLENDER_RADIUS = 4.0311


def around(num: int) -> Float[Tensor, "num 3 4"]:
    """Cameras at 4.03 around the origin, looking at it."""
    poses = []
    for index in range(num):
        azimuth, elevation = 2 * math.pi * index / num, 0.3 + 0.5 * (index % 3) / 3
        back = torch.tensor(
            [
                math.cos(azimuth) * math.cos(elevation),
                math.sin(azimuth) * math.cos(elevation),
                math.sin(elevation),
            ]
        )
        right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), back), dim=0)
        poses.append(torch.stack([right, torch.linalg.cross(back, right), back, BLENDER_RADIUS * back], dim=-1))
    return torch.stack(poses)


def blender_capture(folder: Path, pose: Float[np.ndarray, "3 4"], height: int, width: int, focal: float) -> Path:
    """A Blender capture: the given camera first, its pictures gray noise."""
    poses = [torch.from_numpy(pose), *around(7)]
    rows = [[*p.double().tolist(), [0.0, 0.0, 0.0, 1.0]] for p in poses]
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        frames = []
        for index, matrix in enumerate(rows):
            write_noise(folder / split / f"r_{index}.png", height, width, index)
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": matrix})
        angle = 2 * math.atan(0.5 * width / focal)
        (folder / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    return folder


def mirrored(pose: Float[np.ndarray, "3 4"]) -> Float[np.ndarray, "num 3 4"]:
    """Cameras whose mean is the identity, the given one first: its mirror images in two planes, and one that cancels its
    height."""
    poses = []
    for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
        mirror = np.diag([x, y, 1.0])
        poses.append(np.concatenate([mirror @ pose[:, :3] @ mirror, mirror @ pose[:, 3:]], axis=1))
    poses.append(np.concatenate([np.eye(3), [[0.0], [0.0], [-4 * pose[2, 3]]]], axis=1))
    return np.stack(poses)


def llff_capture(
    folder: Path,
    pose: Float[np.ndarray, "3 4"],
    height: int,
    width: int,
    focal: float,
    bounds: tuple[float, float] = (4 / 3, 9.0),
    stretch: float = 3.7,
) -> Path:
    """An LLFF capture in whose published frame the first camera has this pose; its files are in another frame and unit.

    Args:
        folder: to be made.
        pose: camera to world in the published frame, OpenGL axes.
        height: in pixels.
        width: in pixels.
        focal: in pixels.
        bounds: nearest and farthest distance in the published unit; the nearest is 1 / 0.75 there.
        stretch: unit of the files, in published units.
    """
    poses = mirrored(pose.astype(np.float64))
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    turn *= np.linalg.det(turn)
    raw = np.concatenate([turn @ poses[:, :, :3], stretch * (turn @ poses[:, :, 3:]) + [[1.0], [2.0], [-0.5]]], axis=2)
    right, up, back, center = (raw[:, :, k] for k in range(4))
    hwf = np.broadcast_to(np.array([height, width, focal], dtype=np.float64), right.shape)
    rows = np.stack([-up, right, back, center, hwf], axis=-1).reshape(len(raw), 15)
    depth = np.broadcast_to(stretch * np.array(bounds), (len(raw), 2))
    (folder / "images").mkdir(parents=True)
    np.save(folder / "poses_bounds.npy", np.concatenate([rows, depth], axis=1))
    frames = []
    for index, matrix in enumerate(raw):
        write_noise(folder / "images" / f"image{index:03d}.png", height, width, index)
        whole = [*matrix.tolist(), [0.0, 0.0, 0.0, 1.0]]
        frames.append({"file_path": f"images/image{index:03d}.png", "transform_matrix": whole})
    names = [frame["file_path"] for frame in frames]
    text = {
        "camera_model": "OPENCV",
        "w": width,
        "h": height,
        "fl_x": focal,
        "fl_y": focal,
        "cx": width / 2,
        "cy": height / 2,
        "frames": frames,
        "train_filenames": names,
        "val_filenames": names,
        "test_filenames": names,
    }
    (folder / "transforms.json").write_text(json.dumps(text))
    return folder


def write_noise(path: Path, height: int, width: int, seed: int) -> None:
    """A picture of smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path)
