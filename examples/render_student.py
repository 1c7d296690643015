"""Render a student from Python, from a camera that faces the center of its scene.

    python examples/render_student.py outputs/…/r2l-lite/… render.png

Only the run's folder is needed: no capture, no teacher.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from r2l_nerfstudio import load_student


def main(run: Path, output: Path, size: int = 400) -> None:
    """Write one image of `size` x `size` pixels."""
    student = load_student(run)
    encoding = student.model.ray_encoding
    # The mean training camera's axes (right, up, backward), moved back from the scene's center.
    axes, center = encoding.axes.cpu(), encoding.center.cpu()
    distance = (encoding.near + encoding.far).cpu() / 2
    camera_to_world = torch.cat([axes, (center + distance * axes[:, 2])[:, None]], dim=1)
    intrinsics = [1.2 * size, 1.2 * size, size / 2, size / 2]  # fx, fy, cx, cy in pixels
    image = student.render(camera_to_world.numpy(), intrinsics, size, size)
    Image.fromarray((np.asarray(image) * 255).round().astype("uint8")).save(output)
    print(f"{output}: {student.method_name}, outputs {', '.join(student.outputs)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
