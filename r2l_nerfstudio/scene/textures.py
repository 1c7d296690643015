"""Surface colors as functions of a point in the solid's own axes.

Their edges are soft, so that a small network can learn them and an image of 100 pixels can show them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Color = tuple[float, float, float]
Texture = Callable[[Float[Tensor, "points 3"]], Float[Tensor, "points 3"]]


def _blend(first: Color, second: Color, wave: Tensor, sharpness: float) -> Float[Tensor, "points 3"]:
    """Return `first` where the wave is +1, `second` where it is -1."""
    share = 0.5 + 0.5 * torch.tanh(sharpness * wave)[:, None]
    return share * wave.new_tensor(first) + (1 - share) * wave.new_tensor(second)


def solid(color: Color) -> Texture:
    """One color everywhere."""
    return lambda points: points.new_tensor(color).expand(points.shape[0], 3)


def checker(first: Color, second: Color, cell: float, sharpness: float = 4.0) -> Texture:
    """A chessboard in x and y with squares of side `cell` (world units)."""

    def color(points: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
        wave = torch.sin(math.pi * points[:, 0] / cell) * torch.sin(math.pi * points[:, 1] / cell)
        return _blend(first, second, wave, sharpness)

    return color


def stripes(first: Color, second: Color, width: float, along: Color, sharpness: float = 3.0) -> Texture:
    """Stripes of `width` (world units) across the unit direction `along`."""

    def color(points: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
        wave = torch.sin(math.pi * (points @ points.new_tensor(along)) / width)
        return _blend(first, second, wave, sharpness)

    return color
