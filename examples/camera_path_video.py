"""Render a camera path to a video: a half turn around the scene's center.

    python examples/camera_path_video.py outputs/…/r2l-lite/… turn.mp4

Needs FFmpeg.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import mediapy
import numpy as np
import torch

from r2l_nerfstudio import load_student


def turn(angle: float) -> torch.Tensor:
    """Rotation [3, 3] by `angle` radians around the y axis."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])


def main(run: Path, output: Path, frames: int = 60, size: int = 400) -> None:
    """Write `frames` images of `size` x `size` pixels at 30 frames per second."""
    student = load_student(run)
    encoding = student.model.ray_encoding
    axes, center = encoding.axes.cpu(), encoding.center.cpu()
    distance = (encoding.near + encoding.far).cpu() / 2
    intrinsics = [1.2 * size, 1.2 * size, size / 2, size / 2]
    images = []
    for angle in np.linspace(-math.pi / 2, math.pi / 2, frames):
        rotation = axes @ turn(float(angle))
        pose = torch.cat([rotation, (center + distance * rotation[:, 2])[:, None]], dim=1)
        images.append(student.render(pose.numpy(), intrinsics, size, size))
    mediapy.write_video(str(output), images, fps=30)
    print(f"{output}: {frames} frames")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
