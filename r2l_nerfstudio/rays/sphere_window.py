"""The window of a camera's image that shows a bounded scene; the rest need not be rendered."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Window(NamedTuple):
    """A part of an image: from the left and upper to the right and lower edge, in whole pixels."""

    left: int
    top: int
    right: int
    bottom: int


def sphere_window(
    camera_to_world: Float[Tensor, "3 4"],
    intrinsics: Float[Tensor, "4"],
    height: int,
    width: int,
    center: Float[Tensor, "3"],
    radius: float,
    spill: int = 0,
) -> Window:
    """Return the smallest window that contains a sphere's silhouette; the whole image for a camera that is not clear of
    the sphere.

    Across the image, the planes through the camera and its vertical axis that touch the sphere have the slopes
    (x d ± r sqrt(x² + d² - r²)) / (d² - r²) for the center's offset x to the right and depth d; the same downwards.

    Args:
        camera_to_world: OpenGL camera axes in the world frame.
        intrinsics: fx, fy, cx, cy in pixels.
        height: height of the image in pixels.
        width: width of the image in pixels.
        center: center of the sphere in the world frame.
        radius: radius of the sphere.
        spill: pixels to add on every side.

    Returns:
        A window within the image, with no pixels if the sphere is out of sight.
    """
    x, y, z = ((center - camera_to_world[:, 3]) @ camera_to_world[:, :3]).tolist()
    fx, fy, cx, cy = intrinsics.tolist()
    depth, clear = -z, z**2 - radius**2
    # Non-finite poses come here too.
    if not (depth > 0 and clear > 0 and math.isfinite(x + y)):
        return Window(0, 0, width, height)
    edges = []
    for place, focal, middle, size in ((x, fx, cx, width), (-y, fy, cy, height)):
        reach = radius * math.sqrt(place**2 + clear)
        for sign, rounded in ((-1, math.floor), (1, math.ceil)):
            edge = rounded(middle + focal * (place * depth + sign * reach) / clear) + sign * spill
            edges.append(min(max(edge, 0), size))
    left, right, top, bottom = edges
    return Window(left, top, right, bottom)
