"""Drawing from the foreground, where the teacher's accumulation is above zero."""

from __future__ import annotations

from jaxtyping import Int64, UInt8
from torch import Tensor

TRIES = 8
LEAST_ACCUMULATION = 2  # Of 255: less is a teacher's haze.


def first_in_foreground(accumulation: UInt8[Tensor, "tries draws"]) -> Int64[Tensor, "draws"]:
    """Return for every draw the try to take: the first in the foreground, else the first of all.

    Tries need no list of all foreground pixels, which would have to follow every new view and synchronize with a GPU.

    Args:
        accumulation: accumulation of the pixels tried, of 255.
    """
    return (accumulation > LEAST_ACCUMULATION).int().argmax(0)
