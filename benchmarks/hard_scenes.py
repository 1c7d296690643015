"""Two ray-traced captures that are hard for a student: things thinner than a pixel, and mirrors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from r2l_nerfstudio.scene.capture import write_capture
from r2l_nerfstudio.scene.procedural import Scene, Thing
from r2l_nerfstudio.scene.shapes import EPSILON, Box, Cylinder, Shape, Sphere
from r2l_nerfstudio.scene.textures import checker, solid, stripes

WIRE = 0.008
"""Half the thickness in world units: three quarters of a pixel of a 100x100 image are seen of a wire."""
REFLECTED = 0.75
"""Share of the light that a mirror reflects."""

_TABLE = Thing(Cylinder((0.0, 0.0, -0.45), 0.88, 0.04), checker((0.93, 0.88, 0.76), (0.30, 0.42, 0.52), cell=0.29))


def wires() -> Scene:
    """A fence of wires, a grid of rods and a plate that is seen edge-on from half of the cameras, on the table."""
    things = [_TABLE]
    for number in range(9):
        across = -0.6 + 0.15 * number
        things.append(Thing(Cylinder((across, 0.45, 0.0), WIRE, 0.42), solid((0.10, 0.12, 0.15))))
    for number in range(5):
        height = -0.3 + 0.17 * number
        things.append(Thing(Box((0.0, 0.45, height), (0.62, WIRE, WIRE)), solid((0.75, 0.15, 0.12))))
        things.append(Thing(Box((-0.45, 0.0, height), (WIRE, 0.35, WIRE), turn=20.0), solid((0.12, 0.42, 0.30))))
    plate = stripes((0.98, 0.78, 0.20), (0.13, 0.38, 0.33), width=0.10, along=(0.0, 0.0, 1.0))
    things.append(Thing(Box((0.3, -0.25, -0.06), (0.32, WIRE, 0.34), turn=-35.0), plate))
    return Scene(things=tuple(things), name="wires")


@dataclass(frozen=True)
class MirrorScene(Scene):
    """A scene in which some solids reflect the others, once."""

    mirrors: tuple[int, ...] = ()
    """Which of the things."""

    def _shade(self, point: Tensor, normal: Tensor, to_eye: Tensor, index: Tensor) -> Tensor:
        rgb = super()._shade(point, normal, to_eye, index)
        seen = torch.isin(index, index.new_tensor(self.mirrors))
        facing = (normal[seen] * to_eye[seen]).sum(-1, keepdim=True)
        away = torch.nn.functional.normalize(2 * facing * normal[seen] - to_eye[seen], dim=-1)
        plain = Scene(self.things, self.background)
        reflection = plain.trace(point[seen] + 10 * EPSILON * normal[seen], away).rgb
        rgb[seen] = (1 - REFLECTED) * rgb[seen] + REFLECTED * reflection
        return rgb


def mirrors() -> Scene:
    """A ball and a wall that mirror two colored solids, on the table."""
    silver = solid((0.75, 0.77, 0.80))
    shapes: list[Shape] = [Sphere((0.20, 0.25, 0.0), 0.40), Box((-0.45, 0.35, 0.0), (0.30, 0.03, 0.40), turn=35.0)]
    blue = stripes((0.25, 0.50, 0.85), (0.95, 0.95, 0.97), width=0.10, along=(0.6, 0.0, 0.8))
    things = (
        _TABLE,
        *(Thing(shape, silver) for shape in shapes),
        Thing(Sphere((0.22, -0.44, -0.20), 0.20), blue),
        Thing(Box((-0.40, -0.30, -0.21), (0.16, 0.16, 0.20), turn=28.0), solid((0.80, 0.16, 0.13))),
    )
    return MirrorScene(things=things, name="mirrors", mirrors=(1, 2))


@dataclass
class HardScenes:
    """Write two ray-traced captures, `wires` and `mirrors`, for `distil --capture wires` and `mirrors`."""

    data_dir: Path = Path("data")
    """Folder to write the captures' folders to."""
    size: int = 100
    """Width and height of the photos in pixels."""
    num_train: int = 100
    """Training photos."""
    num_test: int = 25
    """Test photos."""

    def main(self) -> None:
        """Write the captures that do not exist.

        Raises:
            InputError: if a folder holds anything else.
        """
        for scene in (wires(), mirrors()):
            folder = write_capture(self.data_dir / scene.name, self.num_train, self.num_test, self.size, scene=scene)
            CONSOLE.print(f"Written: {folder}.", soft_wrap=True, highlight=False)
